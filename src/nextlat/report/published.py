"""What reproduces: does a method differ from the baseline in the direction that a paper reports?

Directions only, since the scales differ. A published difference has one whenever its two figures
are not equal (the paper gives no errors); ours has one if the verdict of the comparison is better
or worse.
"""

from dataclasses import dataclass
from typing import Literal

from nextlat.report.claims import tally
from nextlat.report.comparison import Difference, Estimate, MetricComparison, TaskComparison
from nextlat.report.runs import first_run
from nextlat.results import Metric, ObjectiveFacts, Published

Outcome = Literal[
    "same direction",
    "opposite",
    "within noise here",
    "no claim here",
    "no difference published",
    "in words only",
]
RULE = (
    "Directions only: the published figures are of another scale and come without errors, so that "
    "any difference between them counts; one here counts if it is better or worse beyond the noise."
)


@dataclass(frozen=True)
class Reproduction:
    """One metric of one model beside what is published of its method."""

    metric: Metric
    model: str  # label of ours
    published: tuple[float, float] | str  # the method's figure and the baseline's, or words
    estimate: Estimate
    difference: Difference | None  # to the baseline; None of the baseline itself
    outcome: Outcome
    horizon: int | None = None  # of the method's figure, if it is not ours


def reference(task: TaskComparison) -> str | None:
    """What the paper calls the baseline; None where there is no baseline."""
    return None if task.baseline is None else _objective(task, task.baseline).published_as


def reproduction(task: TaskComparison) -> list[Reproduction]:
    """All that can be set beside each other, metric by metric: figures, then words.

    A method whose figures are published by horizon is compared at the horizon nearest to ours.
    """
    published, base = task.task.published or Published(setting="", source=""), reference(task) or ""
    found: list[Reproduction] = []
    for one in task.metrics:
        figures = published.figures.get(one.metric.published or "")
        by_method = figures.by_method if figures is not None else {}
        for label, difference in one.differences.items() if base in by_method else ():
            figure, horizon = _figure(by_method, _objective(task, label))
            if figure is not None:
                pair = (figure, by_method[base])
                outcome, ours = _outcome(pair, one, difference), one.estimates[label]
                row = Reproduction(one.metric, label, pair, ours, difference, outcome, horizon)
                found.append(row)
    for saying in published.sayings:
        for one in task.metrics:
            about = saying.of is not None and one.metric.published == saying.of
            for label, ours in one.estimates.items() if about else ():
                if _objective(task, label).published_as in saying.methods:
                    change, words = one.differences.get(label), saying.text
                    row = Reproduction(one.metric, label, words, ours, change, "in words only")
                    found.append(row)
    return found


def _objective(task: TaskComparison, label: str) -> ObjectiveFacts:
    return first_run(task.models[label]).result.objective


def _figure(
    by_method: dict[str, float], objective: ObjectiveFacts
) -> tuple[float | None, int | None]:
    """The figure of a method, and the horizon of it where that is another than the model's."""
    method = objective.published_as
    if method in by_method:
        return by_method[method], None
    horizons = [
        int(horizon)
        for name in by_method
        if (horizon := name.removeprefix(f"{method} d=")) != name and horizon.isdecimal()
    ]
    if not horizons:
        return None, None
    nearest = min(horizons, key=lambda horizon: (abs(horizon - objective.horizon), horizon))
    return by_method[f"{method} d={nearest}"], nearest if nearest != objective.horizon else None


def _outcome(
    published: tuple[float, float], one: MetricComparison, difference: Difference
) -> Outcome:
    ours, theirs = published
    if ours == theirs:
        return "no difference published"
    if difference.verdict == "within noise":
        return "within noise here"
    if difference.verdict == "no claim":
        return "no claim here"
    better = (ours > theirs) == one.metric.higher_is_better
    return "same direction" if better == (difference.verdict == "better") else "opposite"


def reproduction_summary(task: TaskComparison) -> str:
    """How many published differences came out which way; "" if nothing is published that was
    measured here."""
    outcomes = [one.outcome for one in reproduction(task)]
    if not outcomes:
        return ""
    if {*outcomes} == {"in words only"}:
        return "The paper gives words here, and no figures."
    words = {
        "same direction": "in the same direction here",
        "opposite": "in the opposite one",
        "within noise here": "within the noise",
        "no claim here": "without an error here",
    }
    total = sum(outcome in words for outcome in outcomes)
    if not total:
        return f"No difference to {reference(task)} is published."
    differences = f"{total} published difference{'s' * (total > 1)}"
    return f"Of {differences} to {reference(task)}: {tally(outcomes, words)}."
