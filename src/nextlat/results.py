"""results.json: what was measured on a run, with all that a reader must know to show it.

A task declares each `Metric` once. The declaration travels with the value, so that the report
knows no metric and no task by name, and a new task brings its own words.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from nextlat.errors import NextLatError
from nextlat.scores import Score, mean_score, share_interval
from nextlat.validation import Settings, check_format, read_json

FORMAT = 2
RESULTS, SCORES = "results.json", "scores.npz"

Unit = Literal["share", "nats", "factor", "number"]
Parameter = bool | int | float | str


class Metric(Settings):
    """What is measured, declared once by a task (or by `evaluation`, for what every task has).

    Attributes:
        name: without any parameter in it.
        title: in tables and figures.
        noun: in a sentence, after "higher" or "lower"; default: the title in lower case.
        definition: one sentence or two.
        source: of the definition, "" = none.
        unit: share (shown in per cent), nats, factor (times something) or number.
        higher_is_better: None = neither, and nothing is claimed about it.
        items: what the error is taken over, in the plural.
        parameters: e.g. {"length": 24}; with the name they identify a measurement.
        counterpart: `key` of the baseline's metric to compare with; None = the same one.
        counterpart_name: what that is of the baseline, e.g. "the transformer of".
        reference: a fixed value to compare with instead of a baseline.
        reference_name: what that value stands for.
        headline: whether it gets a sentence and a panel of its own.
        published: key of its counterpart in `Published`, None = there is none.
        note: what must be said below every table that shows it.
    """

    name: str
    title: str
    noun: str = ""
    definition: str = ""
    source: str = ""
    unit: Unit = "share"
    higher_is_better: bool | None = True
    items: str = "items"
    parameters: Mapping[str, Parameter] = {}
    counterpart: str | None = None
    counterpart_name: str = ""
    reference: float | None = None
    reference_name: str = ""
    headline: bool = True
    published: str | None = None
    note: str = ""

    @property
    def key(self) -> str:
        """Name and parameters, e.g. `accuracy[length=24, predictor=dynamics]`."""
        inside = ", ".join(f"{name}={value}" for name, value in sorted(self.parameters.items()))
        return f"{self.name}[{inside}]" if inside else self.name


class MeasuredMetric(Metric):
    """A metric with its value, as results.json holds it."""

    value: float | None  # None where it is not finite
    stderr: float | None = None  # over items; None where it is unknown
    interval: tuple[float, float] | None = None  # 95 % (Wilson), where every item is 0 or 1


@dataclass(frozen=True)
class Measurement:
    """One metric and the score of one model in it: what a task's measure returns."""

    metric: Metric
    score: Score

    def record(self) -> MeasuredMetric:
        """As results.json holds it."""
        value, stderr = (
            x if np.isfinite(x) else None for x in (self.score.value, self.score.stderr)
        )
        return MeasuredMetric(
            **self.metric.model_dump(),
            value=value,
            stderr=stderr,
            interval=share_interval(self.score),
        )


class Line(Settings):
    """One line of a chart."""

    values: list[float]  # at x = first, first + 1, ...
    series: str = ""  # what sets it apart from the model's other lines
    first: int = 1
    dots: bool = False  # whether every value is marked


class Mark(Settings):
    """A value to compare with: horizontal at `y` (from x = `start` to `end`, None = all along), or
    vertical at `x`."""

    text: str
    x: float | None = None
    y: float | None = None
    start: float | None = None
    end: float | None = None


class Chart(Settings):
    """One figure of a model's curves; those of all models and seeds are drawn into one.

    Attributes:
        name: identifies it, and names the file.
        title: above it.
        x: label of the horizontal axis.
        unit: of the values.
        lines: of this model, in the order of their line styles.
        alt: what it shows, for those who do not see it; "{models}" becomes the models' names.
        caption: below it.
        marks: see `Mark`.
        minus_baseline: draw the difference to the baseline's line at the same seed.
        linear_within: values up to which the axis is linear, and logarithmic beyond; None = all.
    """

    name: str
    title: str
    x: str
    unit: Unit = "share"
    lines: list[Line]
    alt: str
    caption: str = ""
    marks: list[Mark] = []
    minus_baseline: bool = False
    linear_within: float | None = None


class Picture(Settings):
    """What a file beside results.json lets the report draw.

    Attributes:
        kind: how it is drawn (`report.pictures`): "map" (a street map and how a model sees it),
            "simplex" (exact and decoded beliefs); "" = it is not drawn.
        file: its name.
        title: heading above the pictures of all models, "" = none.
        text: below the heading.
        row: what sets it apart from the model's other pictures of this kind in another row, "" =
            nothing does.
        column: the same of those in another column.
    """

    kind: Literal["map", "simplex", ""] = ""
    file: str
    title: str = ""
    text: str = ""
    row: str = ""
    column: str = ""


class Solved(Settings):
    """When a seed counts as having solved the task, where seeds fall into one of two basins.

    Attributes:
        metric: `key` of the metric that decides.
        at_least: its value from which on the task is solved.
        loss_below: held-out next-token loss that only a model which solves it has, in nats; None =
            unknown.
        definition: both in words.
    """

    metric: str
    at_least: float
    loss_below: float | None = None
    definition: str


class Saying(Settings):
    """What a paper says of some methods in words."""

    methods: tuple[str, ...]  # as the paper names them
    text: str  # without a full stop
    of: str | None = None  # `Metric.published` of what it is about; None = none measured here


class PublishedFigures(Settings):
    """The published figures of one metric."""

    title: str
    unit: Unit = "share"
    by_method: dict[str, float]  # method, or method and horizon ("MTP d=4") -> figure


class Published(Settings):
    """What a paper reports on a task, at its own scale.

    Attributes:
        setting: of what (data, sizes).
        source: the paper.
        figures: by the key that metrics name in `Metric.published`.
        sayings: what it says without a figure.
    """

    setting: str
    source: str
    figures: dict[str, PublishedFigures] = {}
    sayings: list[Saying] = []


class TaskFacts(Settings):
    """What the report must know of a task; see `tasks.task.Task`."""

    name: str
    title: str
    solved: Solved | None = None
    published: Published | None = None


class ObjectiveFacts(Settings):
    """What the report must know of an objective; see `objectives.objective.Objective`."""

    name: str
    title: str
    published_as: str
    horizon: int = 0
    parts: dict[str, str] = {}  # names of its loss parts in metrics.jsonl -> their titles


class DecodingFacts(Settings):
    """How a model decoded its prompts with and without drafts."""

    draft_length: int
    prompts: int
    identical: bool  # whether drafts left the output as it was
    acceptance_by_position: list[float]  # share accepted of those at positions 1, 2, ...
    tokens_per_second: dict[str, float]  # by way of decoding


class Result(Settings):
    """The entry of one run in results.json."""

    task: TaskFacts
    objective: ObjectiveFacts
    seed: int
    steps: int
    metrics: list[MeasuredMetric]
    charts: list[Chart] = []
    pictures: list[Picture] = []
    decoding: DecodingFacts | None = None


class Results(Settings):
    """results.json: the entry of a run, or those of several runs."""

    format: Literal[2] = 2
    runs: list[Result]


def read_results(directory: str | Path) -> list[Result]:
    """The entries of results.json.

    Raises:
        NextLatError: there is no such file, it is corrupt, or it has another format.
    """
    path, again = Path(directory) / RESULTS, f"run 'nextlat evaluate {directory}' again"
    try:
        content = read_json(path, again)
    except FileNotFoundError as error:
        raise NextLatError(
            f"{directory} has no {RESULTS}: run 'nextlat evaluate {directory}' first."
        ) from error
    if isinstance(content, list):  # as format 1 was
        content = {"format": 1}
    if isinstance(content, dict):
        check_format(content.get("format"), FORMAT, path, again)
    return Results.from_json(content, f"{path} is corrupt, {again}").runs


def read_scores(directory: str | Path) -> Mapping[str, Score]:
    """scores.npz: metric key -> what every item contributed; none where there is no such file.

    Raises:
        NextLatError: it is corrupt.
    """
    path = Path(directory) / SCORES
    if not path.exists():
        return {}
    try:
        # Opened here: numpy leaves a damaged file open.
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {key: mean_score(file[key]) for key in file.files}
    except Exception as error:  # zip, header and dtype faults have no common class
        raise NextLatError(
            f"{path} is corrupt ({error}): run 'nextlat evaluate {directory}' again."
        ) from error
