"""The pictures of a report: which are drawn of a task, what they show, and where they lie."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from nextlat.errors import NextLatError
from nextlat.report import drawing, plots, task_plots
from nextlat.report.comparison import TaskComparison
from nextlat.report.maps import draw_maps
from nextlat.report.runs import MAP, Run
from nextlat.tasks.streets.map import ReconstructedMap, read_map_record
from nextlat.tasks.streets.network import StreetNetwork

MAPS_TITLE = "The city in the model's head"
MAPS_TEXT = (
    "Rebuilt from the rides that each model generates between places it has never seen paired. A red street does not exist; it bends "
    "from the direction the model took to where it must lead for the ride to make sense."
)

CityMap = tuple[StreetNetwork, ReconstructedMap]


@dataclass(frozen=True)
class Picture:
    """One PNG: its file, what it shows (for those who do not see it), and the line below it."""

    path: Path
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Pictures:
    """The pictures of one task.

    Attributes:
        maps: of each seed, one per model. together: of each seed, all models side by side. figures:
            the others.
    """

    maps: dict[int, list[Picture]]
    together: dict[int, Picture]
    figures: list[Picture]


def draw(task: TaskComparison, folder: Path, suffix: str) -> Pictures:
    """Draw all pictures of a task into a folder; `suffix` keeps those of several tasks apart.

    Raises:
        NextLatError: a map.json is corrupt.
    """
    labels = ", ".join(task.models)
    drawn: list[tuple[str, Callable[[TaskComparison], Figure | None], str, str]] = [
        (
            "metrics",
            plots.metric_panel,
            f"Every metric for {labels}; the numbers are in the table.",
            "Points: seeds with one standard error over test items; broad bars: means over seeds; dashes: plain decoding.",
        ),
        (
            "beliefs",
            task_plots.beliefs,
            f"Exact beliefs about the three hidden states as points of a triangle, and those read off the states of {labels}.",
            "Corners: certainty of one hidden state; colour: the exact belief. Read by a linear probe on held-out sequences; "
            "the first seed of each model.",
        ),
        (
            "accuracy",
            task_plots.accuracy_by_position,
            f"Accuracy of {labels} by the number of elements read.",
            "",
        ),
        (
            "accuracy",
            task_plots.path_accuracy,
            f"Accuracy of {labels} by node of the path.",
            "One line per seed; each node is predicted after the true ones before it.",
        ),
        (
            "equations",
            task_plots.equation_accuracy,
            f"Share of true equations of {labels} by their place.",
            "One line per seed.",
        ),
        (
            "probes",
            task_plots.probe_curves,
            f"Cross-entropy of linear probes of {labels} by the number of tokens ahead, minus that of {task.baseline}.",
            "One line per seed, each minus the baseline of the same seed; below zero the state tells more about what is to come.",
        ),
        (
            "learning-curves",
            plots.learning_curves,
            f"Losses of {labels} over the optimiser steps.",
            "One line per seed.",
        ),
        (
            "acceptance",
            plots.acceptance,
            f"Share of drafted tokens accepted by place in the draft, {labels}.",
            "One line per seed.",
        ),
    ]
    figures = []
    for name, make, alt, caption in drawn:
        figure = make(task)
        if figure is not None:
            path = folder / f"{name}{suffix}.png"
            drawing.save(figure, path)
            figures.append(Picture(path, alt, caption))
    return Pictures(*_draw_maps(task, folder, suffix), figures)


def _draw_maps(
    task: TaskComparison, folder: Path, suffix: str
) -> tuple[dict[int, list[Picture]], dict[int, Picture]]:
    """One picture per model and seed, and for each seed one with all models side by side."""
    single: dict[int, list[Picture]] = {}
    together: dict[int, Picture] = {}
    for seed in sorted({seed for runs in task.models.values() for seed in runs}):
        maps = {
            label: _map(runs[seed])
            for label, runs in task.models.items()
            if seed in runs and runs[seed].map is not None
        }
        for label, city in maps.items():
            path = folder / f"map{suffix}-{_file_name(label)}-s{seed}.png"
            counts = city[1].counts()
            alt = (
                f"Street map rebuilt from the rides of {label}, seed {seed}: {counts['true_used']} true streets used, "
                f"{counts['invented']} invented."
            )
            single.setdefault(seed, []).append(Picture(draw_maps(path, {label: city}), alt))
        if len(maps) == 1:
            [together[seed]] = single[seed]
        elif maps:
            alt = " ".join(picture.alt for picture in single[seed])
            together[seed] = Picture(draw_maps(folder / f"maps{suffix}-s{seed}.png", maps), alt)
    return single, together


def _map(run: Run) -> CityMap:
    assert run.map is not None
    try:
        return read_map_record(run.map)
    except (KeyError, TypeError, ValueError) as error:
        place = run.directory / MAP
        raise NextLatError(
            f"{place} is corrupt ({error}): run 'nextlat evaluate {run.directory}' again."
        ) from error


def _file_name(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
