"""A report on disk: PNG pictures, comparison.json, and report.html with all of it inside."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from nextlat.errors import NextLatError
from nextlat.files import TEMPORARY, move_into, remove, write_errors
from nextlat.report import plots
from nextlat.report.comparison import TaskComparison, compare
from nextlat.report.page import Picture, Pictures, page
from nextlat.report.runs import MAP, Run
from nextlat.report.wording import claims
from nextlat.tasks.street_map import ReconstructedMap
from nextlat.tasks.street_map_record import read_map_record
from nextlat.tasks.street_network import StreetNetwork
from nextlat.tasks.street_picture import draw_maps

PAGE, COMPARISON = "report.html", "comparison.json"

CityMap = tuple[StreetNetwork, ReconstructedMap]


def write_report(runs: Sequence[Run], directory: str | Path) -> Path:
    """Compare runs and write the report into a directory (made if need be), where an older report is replaced.

    Every file is moved into place whole, the page last; if anything fails, what was there stays.

    Returns:
        The path of the page.

    Raises:
        NextLatError: the runs cannot be compared, a map.json is corrupt, or the report cannot be written.
    """
    directory, comparison = Path(directory), compare(runs)
    staging = directory / f"{TEMPORARY}report"
    with write_errors(directory):
        try:
            remove(staging)
            staging.mkdir(parents=True)
            pictures = [
                _draw(task, staging, "" if len(comparison.tasks) == 1 else f"-{task.task}") for task in comparison.tasks
            ]
            said = [{**asdict(claim), "text": claim.text} for task in comparison.tasks for claim in claims(task)]
            content = json.dumps({**comparison.to_dict(), "claims": said}, indent=2, allow_nan=False)
            (staging / COMPARISON).write_text(content + "\n", encoding="utf-8")
            (staging / PAGE).write_text(page(comparison, pictures), encoding="utf-8")
            move_into(staging, directory, last=PAGE)
        finally:
            remove(staging)
    return directory / PAGE


def _draw(task: TaskComparison, folder: Path, suffix: str) -> Pictures:
    """Draw all pictures of a task into a folder; `suffix` keeps those of several tasks apart."""
    labels = ", ".join(task.models)
    drawn: list[tuple[str, Callable[[TaskComparison], Figure | None], str, str]] = [
        (
            "metrics",
            plots.metric_panel,
            f"Every metric for {labels}; the numbers are in the table.",
            "Points: seeds with one standard error over test items; broad bars: means over seeds; dashes: plain decoding.",
        ),
        ("accuracy", plots.accuracy_by_position, f"Accuracy of {labels} by the number of elements read.", ""),
        (
            "accuracy",
            plots.path_accuracy,
            f"Accuracy of {labels} by node of the path.",
            "One line per seed; each node is predicted after the true ones before it.",
        ),
        ("equations", plots.equation_accuracy, f"Share of true equations of {labels} by their place.", "One line per seed."),
        (
            "probes",
            plots.probe_curves,
            f"Cross-entropy of linear probes of {labels} by the number of tokens ahead, minus that of {task.baseline}.",
            "One line per seed, each minus the baseline of the same seed; below zero the state tells more about what is to come.",
        ),
        ("learning-curves", plots.learning_curves, f"Losses of {labels} over the optimiser steps.", "One line per seed."),
        (
            "acceptance",
            plots.acceptance,
            f"Share of drafted tokens accepted by place in the draft, {labels}.",
            "One line per seed.",
        ),
    ]
    figures = []
    for name, draw, alt, caption in drawn:
        figure = draw(task)
        if figure is not None:
            path = folder / f"{name}{suffix}.png"
            plots.save(figure, path)
            figures.append(Picture(path, alt, caption))
    return Pictures(_draw_maps(task, folder, suffix), figures)


def _draw_maps(task: TaskComparison, folder: Path, suffix: str) -> dict[int, list[Picture]]:
    """One picture per model and seed for the page, and for each seed one with all models side by side."""
    found: dict[int, list[Picture]] = {}
    for seed in sorted({seed for runs in task.models.values() for seed in runs}):
        maps = {label: _map(runs[seed]) for label, runs in task.models.items() if seed in runs and runs[seed].map is not None}
        for label, city in maps.items():
            path = folder / f"map{suffix}-{_file_name(label)}-s{seed}.png"
            counts = city[1].counts()
            alt = (
                f"Street map rebuilt from the rides of {label}, seed {seed}: {counts['true_used']} true streets used, "
                f"{counts['invented']} invented."
            )
            found.setdefault(seed, []).append(Picture(draw_maps(path, {label: city}), alt))
        if len(maps) > 1:
            draw_maps(folder / f"maps{suffix}-s{seed}.png", maps)
    return found


def _map(run: Run) -> CityMap:
    assert run.map is not None
    try:
        return read_map_record(run.map)
    except (KeyError, TypeError, ValueError) as error:
        place = run.directory / MAP
        raise NextLatError(f"{place} is corrupt ({error}): run 'nextlat evaluate {run.directory}' again.") from error


def _file_name(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
