"""The pictures of a report: which are drawn of a task, what they show, and where they lie."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from matplotlib.colors import hsv_to_rgb, to_rgb
from matplotlib.figure import Figure as Canvas
from pydantic import model_validator

from nextlat.errors import NextLatError
from nextlat.report import figures
from nextlat.report.comparison import TaskComparison
from nextlat.report.elements import (
    Details,
    Element,
    Figure,
    Heading,
    Paragraph,
    SideBySide,
    plain,
)
from nextlat.report.maps import draw_maps
from nextlat.report.runs import Run, first_run
from nextlat.results import Picture
from nextlat.tasks.streets.map import read_map_record
from nextlat.validation import Settings, read_json

MAX_CORNERS = 12  # states whose beliefs are drawn
FILE_NAME = 80  # characters of one

Content = TypeVar("Content")


class Simplex(Settings, extra="ignore"):
    """What the file of a picture of the kind "simplex" holds, as far as it is drawn.

    Attributes:
        true: exact beliefs about the hidden states, one for each position.
        decoded: those read off the model at the same positions.
        r2: share of variance explained.
    """

    true: list[list[float]]
    decoded: list[list[float]]
    r2: float

    @model_validator(mode="after")
    def _check(self) -> "Simplex":
        shapes = [[len(belief) for belief in beliefs] for beliefs in (self.true, self.decoded)]
        if shapes[0] != shapes[1] or len({*shapes[0]}) != 1:
            raise ValueError("true and decoded beliefs are not of one shape")
        return self


class Drawer:
    """Draws the pictures of one task into a folder, each into a file of its own.

    Args:
        task: the comparison.
        folder: an existing directory.
        suffix: of the names, to keep the pictures of several tasks apart.
    """

    def __init__(self, task: TaskComparison, folder: Path, suffix: str = "") -> None:
        self._task, self._folder, self._suffix = task, folder, suffix

    def of_models(self) -> list[Element]:
        """How each model sees its world, with headings.

        Raises:
            NextLatError: the file of a picture is missing or corrupt.
        """
        kinds = {"map": self._maps, "simplex": self._simplexes}
        pictures = {one.file: one for run in self._task.runs for one in run.result.pictures}
        together: dict[tuple[str, str, str], list[Picture]] = {}
        for one in pictures.values():
            together.setdefault((one.kind, one.title, one.text), []).append(one)
        found: list[Element] = []
        for (kind, title, text), alike in together.items():
            drawn = kinds[kind](alike) if kind else []
            if drawn and title:
                found.append(Heading(title, 3))
            if drawn and text:
                found.append(Paragraph(text))
            found += drawn
        return found

    def of_comparison(self) -> list[Element]:
        """The figures of all models together, with a heading."""
        metrics = [one.metric for one in self._task.metrics if one.metric.headline]
        fixed = dict.fromkeys(m.reference_name for m in metrics if m.reference is not None)
        found = self._save(
            "metrics",
            figures.metric_panel(self._task),
            "Every metric for {models}; the numbers are in the table.",
            "Points: seeds with one standard error over test items; broad bars: means over seeds"
            f"{'; dashes: ' * bool(fixed)}{', '.join(fixed)}.",
        )
        charts = {one.name: one for run in self._task.runs for one in run.result.charts}
        for name, one in charts.items():
            found += self._save(name, figures.chart(self._task, name), one.alt, one.caption)
        found += self._save(
            "speeds",
            figures.decoding_speeds(self._task),
            "Tokens per second of {models}, by the way of decoding.",
            "Greedy decoding of the same prompts, in turns; points: seeds.",
        )
        curves = figures.learning_curves(self._task)
        alt = "Losses of {models} over the optimiser steps."
        found += self._save("learning-curves", curves, alt)
        return [Heading("Figures", 3), *found] if found else []

    def _path(self, name: str, more: str = "") -> Path:
        """A file that does not exist yet."""
        words = re.findall(r"[a-z0-9]+", f"{name} {self._suffix} {more}".lower())
        path = self._folder / f"{'-'.join(words)[:FILE_NAME] or 'figure'}.png"
        while path.exists():
            path = path.with_stem(f"{path.stem}-2")
        return path

    def _save(self, name: str, canvas: Canvas | None, alt: str, caption: str = "") -> list[Figure]:
        """Write what was drawn, if anything was."""
        if canvas is None:
            return []
        path, alt = self._path(name), alt.replace("{models}", ", ".join(self._task.models))
        figures.save(canvas, path)
        return [Figure(path, alt, caption or "One line per seed.")]

    def _maps(self, pictures: Sequence[Picture]) -> list[Element]:
        """The maps of every model and seed, and for each seed all in one file, where those of a
        model are several by their rows and columns."""
        shown: list[tuple[int, SideBySide]] = []
        rows, columns = ([*dict.fromkeys(map(attrgetter(x), pictures))] for x in ("row", "column"))
        ordered = sorted(pictures, key=lambda x: (rows.index(x.row), columns.index(x.column)))
        for seed in self._task.seeds:
            single, maps = [], {}
            for (label, runs), picture in product(self._task.models.items(), ordered):
                if seed not in runs or not _has(runs[seed], picture):
                    continue
                city = _read(runs[seed], picture, read_map_record)
                which = ", ".join(filter(None, (picture.row, picture.column)))
                name = plain(label).replace("$", r"\$")  # between them would be a formula
                title = f"{name}\n{which}" if which else name
                maps[title] = city
                counts = city[1].counts()
                alt = (
                    f"Street map rebuilt from the rides of {label}{', ' * bool(which)}{which}, "
                    f"seed {seed}: {counts['true_used']} true streets used, {counts['invented']} "
                    "invented."
                )
                path = draw_maps(self._path("map", f"{label} {which} s{seed}"), {title: city})
                single.append(Figure(path, alt))
            together = single[:1]
            if len(single) > 1:
                path = self._path("maps", f"s{seed}")
                path = draw_maps(path, maps, columns=len(columns) if len(columns) > 1 else None)
                together = [Figure(path, " ".join(figure.alt for figure in single))]
            shown += [(seed, SideBySide(single, figure)) for figure in together]
        if len(shown) < 2:
            return [beside for _, beside in shown]
        (first, beside), *others = shown
        folded = [Details(f"Seed {seed}", [more]) for seed, more in others]
        return [Paragraph(f"Seed {first}."), beside, *folded]

    def _simplexes(self, pictures: Sequence[Picture]) -> list[Element]:
        """Exact beliefs about the hidden states and those read off each model, as points of the
        polygon whose corners are certainty of one state (of three, the triangle of Shai et al.,
        arXiv 2405.15943)."""
        [picture, *_] = pictures
        found = {
            label: known
            for label, runs in self._task.models.items()
            if _has(run := first_run(runs), picture)
            and len((known := _read(run, picture, Simplex.from_json)).true[0]) <= MAX_CORNERS
        }
        if not found:
            return []
        alt = (
            "Exact beliefs about the hidden states as points of a polygon, and those read off the "
            "states of {models}."
        )
        caption = (
            "Corners: certainty of one hidden state; colour: the exact belief. First seed of each."
        )
        return [*self._save(Path(picture.file).stem, draw_simplexes(found), alt, caption)]


def _has(run: Run, picture: Picture) -> bool:
    return picture.file in {one.file for one in run.result.pictures}


def _read(run: Run, picture: Picture, read: Callable[[Any, str], Content]) -> Content:
    path = run.directory / Path(picture.file).name
    again = f"run 'nextlat evaluate {run.directory}' again"
    try:
        return read(read_json(path, again), f"{path} is corrupt, {again}")
    except FileNotFoundError as error:
        raise NextLatError(f"{path} is missing: {again}.") from error


def _polygon(states: int) -> tuple[np.ndarray, np.ndarray]:
    """(S, 2) corners of a regular polygon, of three states the triangle of side 1 on its base; and
    their (S, 3) colours."""
    angle = math.pi / 2 + 2 * math.pi / states * np.arange(1, states + 1)
    corners = np.stack([np.cos(angle), np.sin(angle)], axis=1) / math.sqrt(3)
    enough = states <= len(figures.PALETTE)
    hues = np.arange(states) / states
    circle = [hsv_to_rgb((hue, 0.9, 0.8)) for hue in hues]
    colors = [to_rgb(color) for color in figures.PALETTE[:states]] if enough else circle
    return corners + np.array([0.5, math.sqrt(1 / 12)]), np.array(colors)


def draw_simplexes(found: Mapping[str, Simplex]) -> Canvas:
    """The exact beliefs, and those read off every model (by label), each in its polygon and in the
    colour of the exact one."""
    exact = np.array(next(iter(found.values())).true)  # the positions are the same for all
    corners, corner_colors = _polygon(exact.shape[1])
    panels = [(f"exact\n{len(exact):,} positions", exact, exact)]
    for label, one in found.items():
        title = f"{figures.wrapped(label, figures.PANEL_LINE)}\nR\N{SUPERSCRIPT TWO} = {one.r2:.3f}"
        panels.append((title, np.array(one.decoded), np.array(one.true)))
    columns = min(figures.PANELS, len(panels))
    rows = math.ceil(len(panels) / columns)
    canvas = figures.new_figure(2.15 * rows)
    grid = canvas.add_gridspec(rows, columns)
    drawn = np.concatenate([corners, *(points @ corners for _, points, _ in panels)])
    (left, low), (right, high) = drawn.min(axis=0) - 0.02, drawn.max(axis=0) + 0.02
    for place, (title, beliefs_PS, true_PS) in enumerate(panels):
        ax = canvas.add_subplot(grid[divmod(place, columns)])
        ax.plot(*np.array([*corners, corners[0]]).T, color="#b5b5b5", linewidth=0.8, zorder=1)
        colors = (true_PS @ corner_colors).clip(0, 1)
        x, y = (beliefs_PS @ corners).T
        ax.scatter(x, y, s=2.5, c=colors, linewidths=0, zorder=2)
        ax.set(xlim=(left, right), ylim=(low, high), aspect="equal")  # so that polygons are alike
        ax.set_axis_off()
        ax.set_title(title, size=figures.TITLE, color=figures.INK)
    return canvas
