"""Figures of a comparison: metrics, charts, learning curves. Every seed is drawn by itself; None
where there is nothing to draw.

matplotlib's Figure objects only, without global state. Colours: Okabe & Ito, safe for the
colour-blind.
"""

import itertools
import math
import textwrap
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, PercentFormatter

from nextlat.report.claims import titled
from nextlat.report.comparison import HELD_OUT, NEXT_TOKEN, MetricComparison, TaskComparison
from nextlat.report.elements import plain
from nextlat.results import Chart, Line, Mark

DPI = 200
WIDTH = 6.2  # inches of every figure: narrow, so that its words can be read on a phone
PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, QUIET, FAINT = "#1a1a1a", "#6b6b6b", "#e4e4e4"
TITLE, LABEL, TICK = 9.5, 8.5, 8.0  # points
TITLE_LINE, PANEL_LINE, LEGEND_LINE = 78, 22, 94  # characters: of a figure, a small panel, a legend
LEGEND_GAP = 9  # characters that a line of a legend and its space take
PANELS = 3  # beside one another
WARM_UP = 0.15  # of the steps, which do not set the axis: their fall would flatten all that follows

STYLES = ("-", (0, (5, 1.6)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))  # of the lines of one model
POINT: dict[str, Any] = {"fmt": "o", "markersize": 4, "elinewidth": 1.1, "markeredgewidth": 0}
DOTS: dict[str, Any] = {"marker": "o", "markersize": 3.5, "markeredgewidth": 0}
GUIDE: dict[str, Any] = {"color": QUIET, "linewidth": 0.9, "linestyle": (0, (4, 3))}
NOTE: dict[str, Any] = {"color": QUIET, "size": TICK, "textcoords": "offset points"}
ABOVE = TICK + 6  # points between the axes and a title that has a note below it


def metric_panel(task: TaskComparison) -> Figure | None:
    """One small axis per metric: a point with its error per seed, seeds joined by a line, the mean
    of several as a bar."""
    metrics = [one for one in task.metrics if one.metric.headline]
    if not metrics:
        return None
    columns = min(PANELS, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = new_figure(1.5 * rows + 0.4)
    legend(figure, model_handles(task, task.models), "upper")
    grid = figure.add_gridspec(rows, columns)
    for place, one in enumerate(metrics):
        _draw_metric(figure.add_subplot(grid[divmod(place, columns)]), task, one)
    return figure


def _draw_metric(ax: Axes, task: TaskComparison, one: MetricComparison) -> None:
    metric, estimates, colors = one.metric, dict(one.estimates), model_colors(task)
    for other in task.metrics:
        if other.metric.key == metric.counterpart and task.baseline in other.estimates:
            estimates[task.baseline] = other.estimates[task.baseline]
    places = {label: x for x, label in enumerate(task.models)}
    seeds = sorted({seed for estimate in estimates.values() for seed in estimate.seeds})
    for seed in seeds:
        spot = 0.0 if len(seeds) == 1 else 0.36 * (seeds.index(seed) / (len(seeds) - 1) - 0.5)
        points = []
        for label, x in places.items():
            if label in estimates and seed in estimates[label].seeds:
                value, error = estimates[label].seeds[seed]
                points.append((x + spot, value))
                ax.errorbar(x + spot, value, error, color=colors[label], zorder=3, **POINT)
        ax.plot(*zip(*points, strict=True), color="#c4c4c4", linewidth=0.8, zorder=1)
    for label, estimate in estimates.items():
        if len(estimate.seeds) > 1:
            ends = places[label] - 0.3, places[label] + 0.3
            ax.plot(ends, [estimate.value] * 2, color=colors[label], linewidth=2.2, alpha=0.35)
    if metric.reference is not None:
        ax.axhline(metric.reference, **GUIDE)
    finish(ax, titled(metric), PANEL_LINE)
    ax.set_xlim(-0.6, len(task.models) - 0.4)
    ax.set_xticks([])
    ax.margins(y=0.18)
    ax.yaxis.set_major_locator(MaxNLocator(4))
    if metric.unit == "share":
        ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{round(100 * share, 6):g} %"))


def chart(task: TaskComparison, name: str) -> Figure | None:
    """The curves of all models and seeds of one chart."""
    charts = {
        (label, seed): one
        for label, runs in task.models.items()
        for seed, run in runs.items()
        for one in run.result.charts
        if one.name == name
    }
    first = next(iter(charts.values()))
    minus = first.minus_baseline
    lines = [
        (label, line)
        for (label, seed), one in charts.items()
        if not (minus and label == task.baseline)  # which is the line at 0
        for line in (_minus(one, charts.get((task.baseline or "", seed))) if minus else one.lines)
    ]
    if not lines:
        return None
    figure, colors = new_figure(2.9), model_colors(task)
    ax = figure.add_subplot()
    series = dict.fromkeys(line.series for _, line in lines)
    styles: dict[str, Any] = dict(zip(series, itertools.cycle(STYLES), strict=False))
    for label, line in lines:
        x = range(line.first, line.first + len(line.values))
        style = {"linestyle": styles[line.series], **(DOTS if line.dots else {})}
        ax.plot(x, line.values, color=colors[label], linewidth=1.1, **style)
    for mark in first.marks:
        _draw_mark(ax, mark)
    title, shown = first.title, {label for label, _ in lines}
    if minus and task.baseline is not None:
        ax.axhline(0, color=colors[task.baseline], linewidth=1.4, zorder=1)
        title, shown = f"{title}, minus that of {task.baseline}", {*shown, task.baseline}
    above = ABOVE if any(mark.x is not None for mark in first.marks) else None
    finish(ax, title + ", nats" * (first.unit == "nats"), TITLE_LINE, above)
    _set_axes(ax, first)
    named = [_handle(one, linewidth=1.1, linestyle=style) for one, style in styles.items() if one]
    legend(figure, [*model_handles(task, shown), *named])
    return figure


def _minus(one: Chart, base: Chart | None) -> list[Line]:
    """Its lines minus those of the baseline at the same seed, without what that has no line for."""
    theirs = base.lines if base is not None else []
    known = {(line.series, line.first, len(line.values)): line.values for line in theirs}
    return [
        line.model_copy(update={"values": np.subtract(line.values, other).tolist()})
        for line in one.lines
        if (other := known.get((line.series, line.first, len(line.values)))) is not None
    ]


def _draw_mark(ax: Axes, mark: Mark) -> None:
    text = wrapped(mark.text, TITLE_LINE, 1)
    if mark.x is not None:
        ax.axvline(mark.x, **{**GUIDE, "linestyle": (0, (1, 2))})
        at = ("data", "axes fraction")
        ax.annotate(text, (mark.x, 1), (0, 3), xycoords=at, ha="center", **NOTE)
    if mark.y is None:
        return
    if mark.start is not None and mark.end is not None:
        ax.plot([mark.start, mark.end], [mark.y, mark.y], **GUIDE)
        ax.annotate(text, (mark.end, mark.y), (4, 0), va="center", **NOTE)
    else:
        ax.axhline(mark.y, **GUIDE)
        at = ("axes fraction", "data")
        ax.annotate(text, (1, mark.y), (-4, 3), xycoords=at, ha="right", **NOTE)


def _set_axes(ax: Axes, one: Chart) -> None:
    ax.set_xlabel(wrapped(one.x, TITLE_LINE, 1), size=LABEL, color=QUIET)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not any(line.dots for line in one.lines):
        ax.set_xlim(left=min(line.first for line in one.lines))
    if one.unit == "share":
        ax.set_ylim(0, 1.04)
        ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    if one.linear_within is not None:
        sides = [one.linear_within * x for x in (0.5, 1, 2, 5, 10, 20, 50)]
        ax.set_yscale("symlog", linthresh=one.linear_within)
        ax.yaxis.set_major_locator(FixedLocator([*(-x for x in sides), 0, *sides]))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def decoding_speeds(task: TaskComparison) -> Figure | None:
    """Tokens per second of every model that drafts, by the way of decoding: bars are means over
    seeds, points the seeds."""
    rates: dict[str, dict[str, list[float]]] = {}  # model -> way -> seeds
    for label, runs in task.models.items():
        for run in runs.values():
            if (facts := run.result.decoding) is None:
                continue
            for way, rate in facts.tokens_per_second.items():
                name = {"transformers": "transformers' generate", "0": "ours, without drafts"}
                way = name.get(way, f"ours, {way} tokens drafted")
                rates.setdefault(label, {}).setdefault(way, []).append(rate)
    if not rates:
        return None
    rows = [(label, way, seeds) for label, ways in rates.items() for way, seeds in ways.items()]
    figure, colors = new_figure(0.75 + 0.3 * len(rows)), model_colors(task)
    ax = figure.add_subplot()
    for y, (label, way, seeds) in enumerate(rows):
        color = colors[label] if "drafted" in way else FAINT
        ax.barh(y, np.mean(seeds), color=color, height=0.7, zorder=2)
        ax.plot(seeds, [y] * len(seeds), "o", color=INK, markersize=3, zorder=3)
    finish(ax, "Tokens per second", TITLE_LINE)
    ax.set_yticks(range(len(rows)), [wrapped(f"{label}: {way}", 46, 1) for label, way, _ in rows])
    ax.invert_yaxis()
    return figure


def learning_curves(task: TaskComparison) -> Figure | None:
    """Cross-entropy of all models on one axis, training thin and held-out with points; the other
    parts of the loss below."""
    colors = model_colors(task)
    logs = [
        (colors[label], run)
        for label, runs in task.models.items()
        for run in runs.values()
        if run.curve(NEXT_TOKEN).shape[1] > 1
    ]
    if not logs:
        return None
    titles = {NEXT_TOKEN: "Cross-entropy, nats per token"} | {
        name: title
        for _, run in logs
        for name, title in run.result.objective.parts.items()
        if name != NEXT_TOKEN and run.curve(name).size
    }
    columns = min(len(titles) - 1, PANELS) or 1
    rows = math.ceil((len(titles) - 1) / columns)
    figure = new_figure(2.6 + 1.8 * rows)
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[3.0, *[2.0] * rows])
    for place, (name, title) in enumerate(titles.items(), -1):
        row, column = divmod(place, columns)
        top = row < 0
        ax = figure.add_subplot(grid[0, :] if top else grid[1 + row, column])
        names = (name, HELD_OUT) if top else (name,)
        for color, run in logs:
            ax.plot(*run.curve(name), color=color, linewidth=0.8, alpha=0.45 if top else 0.8)
            if top:
                ax.plot(*run.curve(HELD_OUT), color=color, linewidth=1.2, zorder=3, **DOTS)
        finish(ax, title, TITLE_LINE if top or columns < PANELS else PANEL_LINE)
        _fit(ax, [run.curve(name) for _, run in logs for name in names])
        ax.set_xlim(0, max(run.curve(NEXT_TOKEN)[0].max() for _, run in logs))
        steps = 8 if top or columns == 1 else 6 - columns  # as many as fit
        ax.xaxis.set_major_locator(MaxNLocator(steps, steps=[1, 2, 5, 10], integer=True))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        if place + columns > len(titles) - 2:
            ax.set_xlabel("optimiser steps", size=LABEL, color=QUIET)
    training = _handle("training", linewidth=0.8, alpha=0.6)
    held_out = _handle("held-out", linewidth=1.2, **DOTS)
    legend(figure, [*model_handles(task, task.models), training, held_out])
    return figure


def _fit(ax: Axes, curves: Sequence[np.ndarray]) -> None:
    """The y axis on what comes after the steep start."""
    last = max((steps.max() for steps, _ in curves if steps.size), default=0)
    shown = np.concatenate([values[steps >= WARM_UP * last] for steps, values in curves])
    shown = shown[np.isfinite(shown)]
    if shown.size:
        margin = 0.06 * (float(np.ptp(shown)) or 1.0)
        ax.set_ylim(float(shown.min()) - margin, float(shown.max()) + margin)


def new_figure(height: float) -> Figure:
    """An empty figure of the usual width, this many inches high."""
    layout = ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.07, wspace=0.03, hspace=0.05)
    figure = Figure(figsize=(WIDTH, height), facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG. Its words are words: nothing between dollar signs is a formula."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def model_colors(task: TaskComparison) -> dict[str, str]:
    """One per model; the first is the baseline's, and stays free where there is none."""
    skip = task.baseline is None
    return {k: PALETTE[(place + skip) % len(PALETTE)] for place, k in enumerate(task.models)}


def model_handles(task: TaskComparison, labels: Container[str]) -> list[Line2D]:
    """What a legend shows of some models."""
    shown = [(label, color) for label, color in model_colors(task).items() if label in labels]
    return [_handle(label, color=color, linewidth=2.2) for label, color in shown]


def _handle(label: str, **style: Any) -> Line2D:
    label = wrapped(label, TITLE_LINE, 1).lstrip("_")  # with which matplotlib's own labels begin
    return Line2D([], [], label=label, **{"color": QUIET, **style})


def legend(
    figure: Figure, handles: list[Line2D], side: Literal["upper", "lower"] = "lower"
) -> None:
    """A legend above or below all axes, in as many columns as the width holds."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(len(handles), LEGEND_LINE // (longest + LEGEND_GAP)))
    style: dict[str, Any] = {"loc": f"outside {side} center", "frameon": False, "fontsize": LABEL}
    figure.legend(handles=handles, ncols=columns, labelcolor=INK, **style)


def wrapped(text: str, line: int, lines: int = 3) -> str:
    """Text in so many lines of so many characters; what does not fit is left out."""
    return "\n".join(textwrap.wrap(plain(text)[: lines * line], line, break_on_hyphens=False))


def finish(ax: Axes, title: str, line: int, above: float | None = None) -> None:
    """The frame and the title, broken into lines of so many characters, so many points above."""
    ax.set_title(wrapped(title, line), size=TITLE, color=INK, loc="left", pad=above)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#b5b5b5")
    ax.tick_params(labelsize=TICK, colors=QUIET, labelcolor=QUIET, length=3)
    ax.grid(axis="y", color=FAINT, linewidth=0.7)
    ax.set_axisbelow(True)
