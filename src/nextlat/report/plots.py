"""Figures of a comparison: learning curves, metrics, accuracy by position, accepted drafts. Every seed is drawn by itself.

matplotlib's Figure objects only, without global state; None where the runs hold nothing to draw. Colours: Okabe & Ito, safe for the
colour-blind.
"""

import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from nextlat.report.comparison import MetricComparison, TaskComparison
from nextlat.report.glossary import BRANCH, describe
from nextlat.report.runs import Run
from nextlat.report.terminal import ARROWS
from nextlat.tasks.word_problem import group

DPI = 200
WIDTH = 6.2  # inches of every figure: narrow, so that its words can be read on a phone
PALETTE = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # the baseline's first
INK, QUIET, FAINT = "#1a1a1a", "#6b6b6b", "#e4e4e4"
TITLE, LABEL, TICK = 9.5, 8.5, 8.0  # points
PANEL_LINE = 22  # characters of a small panel's title
LEGEND_LINE, LEGEND_GAP = 94, 9  # characters that fit beside one another in a legend, and those that a line and its space take

CROSS_ENTROPY = "next_token"  # the part of the loss that every objective has
NO_LOSS = ("step", "loss", "grad_norm", "learning_rate", "tokens", "seconds", "epoch", CROSS_ENTROPY)
PART_TITLES = {
    "next_h": "Next latent state (Smooth L1)",
    "kl": "KL of predicted and true next token",
    "multi_token": "Tokens beyond the next, nats",
    "pairs": "Pairs: next and previous token",
    "pairs_next": "Pairs: next token, nats",
    "pairs_previous": "Pairs: previous token, nats",
}
MOST_PARTS = 3  # beside one another
WARM_UP_SHARE = 0.15  # of the steps: the steep start, which would flatten all that follows, does not set the axis


LineStyle = Literal["-"] | tuple[float, Sequence[float]]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def learning_curves(task: TaskComparison) -> Figure | None:
    """Cross-entropy of all models on one axis, training thin and held-out with points; the other parts of the loss below."""
    logs = [(color, run) for color, run in _runs(task) if _curve(run, CROSS_ENTROPY)[0].size > 1]
    if not logs:
        return None
    parts = list(dict.fromkeys(key for _, run in logs for line in run.log for key in line if _is_part(key)))
    columns = min(len(parts), MOST_PARTS) or 1
    rows = math.ceil(len(parts) / columns)
    figure = _figure(2.6 + 1.8 * rows)
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[3.0, *[2.0] * rows])
    top = figure.add_subplot(grid[0, :])
    for color, run in logs:
        top.plot(*_curve(run, CROSS_ENTROPY), color=color, linewidth=0.8, alpha=0.45)
        steps, values = _curve(run, f"eval_{CROSS_ENTROPY}")
        top.plot(steps, values, color=color, linewidth=1.2, marker="o", markersize=3.5, markeredgewidth=0, zorder=3)
    _finish(top, "Cross-entropy, nats per token")
    _fit(top, [_curve(run, key) for _, run in logs for key in (CROSS_ENTROPY, f"eval_{CROSS_ENTROPY}")])
    handles = [
        Line2D([], [], color=QUIET, linewidth=0.8, alpha=0.6, label="training"),
        Line2D([], [], color=QUIET, linewidth=1.2, marker="o", markersize=3.5, label="held-out"),
    ]
    top.legend(handles=[*_handles(task), *handles], frameon=False, fontsize=LABEL, labelcolor=INK, ncols=2)
    for place, part in enumerate(parts):
        row, column = divmod(place, columns)
        ax = figure.add_subplot(grid[1 + row, column], sharex=top if columns < MOST_PARTS else None)
        if columns == MOST_PARTS:  # too narrow for the steps that fit above
            ax.set_xlim(0, max(_curve(run, CROSS_ENTROPY)[0].max() for _, run in logs))
            ax.xaxis.set_major_locator(MaxNLocator(3))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        for color, run in logs:
            if any(part in line for line in run.log):
                ax.plot(*_curve(run, part), color=color, linewidth=0.8, alpha=0.8)
        title = PART_TITLES.get(part, part.replace("_", " "))
        _finish(ax, title if columns < MOST_PARTS else "\n".join(textwrap.wrap(title, PANEL_LINE)))
        _fit(ax, [_curve(run, part) for _, run in logs])
        if place + columns >= len(parts):
            ax.set_xlabel("optimiser steps", size=LABEL, color=QUIET)
    if not parts:
        top.set_xlabel("optimiser steps", size=LABEL, color=QUIET)
    top.set_xlim(left=0)
    top.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    return figure


def metric_panel(task: TaskComparison) -> Figure | None:
    """One small axis per metric: a point with its error per seed, seeds joined by a line, the mean of several as a bar."""
    metrics = [metric for metric in task.metrics if describe(metric.name).headline]
    if not metrics:
        return None
    columns = min(3, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = _figure(1.5 * rows + 0.4)
    figure.legend(
        handles=_handles(task),
        loc="outside upper center",
        ncols=_legend_columns(_handles(task)),
        frameon=False,
        fontsize=LABEL,
        labelcolor=INK,
    )
    grid = figure.add_gridspec(rows, columns)
    for place, metric in enumerate(metrics):
        _draw_metric(figure.add_subplot(grid[divmod(place, columns)]), task, metric)
    return figure


def _draw_metric(ax: Axes, task: TaskComparison, metric: MetricComparison) -> None:
    term = describe(metric.name)
    estimates = dict(metric.estimates)
    if term.counterpart and task.baseline is not None:
        against = next((m.estimates.get(task.baseline) for m in task.metrics if m.name == term.counterpart), None)
        estimates |= {task.baseline: against} if against is not None else {}
    seeds = sorted({seed for estimate in estimates.values() for seed in estimate.seeds})
    for seed in seeds:
        spot = 0.0 if len(seeds) == 1 else 0.36 * (seeds.index(seed) / (len(seeds) - 1) - 0.5)
        points = []
        for x, (label, color) in enumerate(zip(task.models, _colors(task), strict=True)):
            if label not in estimates or seed not in estimates[label].seeds:
                continue
            value, error = estimates[label].seeds[seed]
            points.append((x + spot, value))
            ax.errorbar(x + spot, value, error, fmt="o", color=color, markersize=4, elinewidth=1.1, markeredgewidth=0, zorder=3)
        ax.plot(*zip(*points, strict=True), color="#c4c4c4", linewidth=0.8, zorder=1)
    for x, (label, color) in enumerate(zip(task.models, _colors(task), strict=True)):
        if label in estimates and len(estimates[label].seeds) > 1:
            ax.hlines(estimates[label].value, x - 0.3, x + 0.3, color=color, linewidth=2.2, alpha=0.35, zorder=2)
    if term.reference is not None:
        ax.axhline(term.reference, color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)))
    _finish(
        ax,
        "\n".join(
            textwrap.wrap(
                f"{term.title}\N{NO-BREAK SPACE}{ARROWS[metric.higher_is_better]}", PANEL_LINE, break_on_hyphens=False
            )
        ),
    )
    ax.set_xlim(-0.6, len(task.models) - 0.4)
    ax.set_xticks([])
    ax.margins(y=0.18)
    ax.yaxis.set_major_locator(MaxNLocator(4))
    if term.unit == "share":
        ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{round(100 * share, 6):g} %"))


def accuracy_by_position(task: TaskComparison) -> Figure | None:
    """Word problem: accuracy at every position of the transformers, and of the latent dynamics models run alone."""
    ways: dict[str, tuple[LineStyle, float]] = {"transformer": ("-", 1.0), "dynamics": ((0, (5, 1.6)), 1.2)}
    drawn = [
        (color, way, run.curves[f"{way}_accuracy_by_position"])
        for color, run in _runs(task)
        for way in ways
        if f"{way}_accuracy_by_position" in run.curves
    ]
    if not drawn:
        return None
    figure = _figure(3.1)
    ax = figure.add_subplot()
    for color, way, curve in drawn:
        style, width = ways[way]
        ax.plot(np.arange(1, len(curve) + 1), curve, color=color, linestyle=style, linewidth=width)
    settings = next(run for _, run in _runs(task)).recipe["task"]
    _mark_word_problem(ax, settings)
    _finish(ax, "Accuracy by position")
    ax.set_xlabel("elements read", size=LABEL, color=QUIET)
    ax.set_xlim(left=1)
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    handles = [
        Line2D([], [], color=QUIET, linestyle=ways[way][0], linewidth=ways[way][1], label=label)
        for way, label in (("transformer", "transformer"), ("dynamics", "latent dynamics model run alone"))
        if any(found == way for _, found, _ in drawn)
    ]
    figure.legend(
        handles=[*_handles(task), *handles], loc="outside lower center", ncols=2, frameon=False, fontsize=LABEL, labelcolor=INK
    )
    return figure


def _mark_word_problem(ax: Axes, settings: dict[str, Any]) -> None:
    if "length" in settings:
        ax.axvline(settings["length"], color=QUIET, linewidth=0.9, linestyle=(0, (1, 2)))
        ax.annotate(
            "trained up to here", (settings["length"], 0.02), (4, 0), textcoords="offset points", size=TICK, color=QUIET
        )
    if "group" in settings:
        chance = 1 / len(group(settings["group"]).names)
        ax.axhline(chance, color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)))
        ax.annotate(
            "chance", (1, chance), (-4, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
            size=TICK, color=QUIET, ha="right",
        )  # fmt: skip


def path_accuracy(task: TaskComparison) -> Figure | None:
    """Path-Star: accuracy at every node of the path, given the true ones before it."""
    curves = [(color, run.curves["accuracy_by_position"]) for color, run in _runs(task) if "accuracy_by_position" in run.curves]
    if not curves:
        return None
    figure = _figure(2.6)
    ax = figure.add_subplot()
    for color, curve in curves:
        _dotted(ax, curve, color)
    arms = next(run for _, run in _runs(task)).recipe["task"].get("arms")
    if arms:
        ax.plot([BRANCH - 0.25, BRANCH + 0.25], [1 / arms, 1 / arms], color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)))
        ax.annotate(
            "chance", (BRANCH + 0.25, 1 / arms), (4, 0), textcoords="offset points", size=TICK, color=QUIET, va="center"
        )
    _finish(ax, "Accuracy by node of the path (2: the branch)")
    _shares_by_place(ax, "node of the path")
    _legend_below(figure, _handles(task))
    return figure


def equation_accuracy(task: TaskComparison) -> Figure | None:
    """Countdown: share of true equations at every place, and of problems solved, with seen and with held-out targets."""
    styles: dict[str, LineStyle] = {"seen": "-", "held_out": (0, (4, 2))}
    names = {split: [m.name for m in task.metrics if re.fullmatch(rf"true_equation_\d+_{split}", m.name)] for split in styles}
    drawn = [
        (color, split, [run.metrics[name] for name in names[split]])
        for color, run in _runs(task)
        for split in styles
        if names[split] and all(name in run.metrics for name in names[split])
    ]
    if not drawn:
        return None
    figure = _figure(2.9)
    ax = figure.add_subplot()
    for color, split, shares in drawn:
        _dotted(ax, shares, color, styles[split])
    _finish(ax, "True equations by their place in the derivation")
    _shares_by_place(ax, "equation")
    words = {"seen": "targets seen in training", "held_out": "held-out targets"}
    lines = [Line2D([], [], color=QUIET, linewidth=1.1, linestyle=styles[split], label=words[split]) for split in styles]
    _legend_below(figure, [*_handles(task), *lines])
    return figure


def probe_curves(task: TaskComparison) -> Figure | None:
    """Text: held-out cross-entropy of linear probes by how far they look ahead, minus that of the baseline's probes at the same seed."""
    name = "probe_cross_entropy"
    base = (
        {} if task.baseline is None else {s: r.curves[name] for s, r in task.models[task.baseline].items() if name in r.curves}
    )
    drawn = [
        (color, np.subtract(run.curves[name], base[run.seed]))
        for color, run in _runs(task)
        if name in run.curves and run.seed in base and len(run.curves[name]) == len(base[run.seed])
    ]
    others = [
        label for label, runs in task.models.items() if label != task.baseline and any(name in r.curves for r in runs.values())
    ]
    if not drawn or not others:
        return None
    figure = _figure(2.9)
    ax = figure.add_subplot()
    for color, curve in drawn:
        if curve.any():  # the baseline itself is the line at 0
            _dotted(ax, curve, color)
    ax.axhline(0, color=_colors(task)[0], linewidth=1.4, zorder=1)
    _finish(ax, f"Linear probes of the state: cross-entropy minus that of {task.baseline}, nats")
    ax.set_xlabel("tokens ahead", size=LABEL, color=QUIET)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend_below(figure, [handle for handle in _handles(task) if handle.get_label() in (task.baseline, *others)])
    return figure


def _dotted(ax: Axes, values: Sequence[float] | np.ndarray, color: str, style: LineStyle = "-") -> None:
    """Values at places 1, 2, ..."""
    places = np.arange(1, len(values) + 1)
    ax.plot(places, values, color=color, linestyle=style, linewidth=1.1, marker="o", markersize=3.5, markeredgewidth=0)


def _shares_by_place(ax: Axes, place: str) -> None:
    ax.set_xlabel(place, size=LABEL, color=QUIET)
    ax.set_ylim(0, 1.04)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))


def _legend_below(figure: Figure, handles: list[Line2D]) -> None:
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=_legend_columns(handles),
        frameon=False,
        fontsize=LABEL,
        labelcolor=INK,
    )


def acceptance(task: TaskComparison) -> Figure | None:
    """Share of drafted tokens accepted, by their place in the draft."""
    drawn = [(color, run.decoding["acceptance_by_position"]) for color, run in _runs(task) if _accepts(run)]
    if not drawn:
        return None
    figure = _figure(2.3)
    ax = figure.add_subplot()
    for color, shares in drawn:
        ax.plot(
            np.arange(1, len(shares) + 1), shares, color=color, linewidth=1.1, marker="o", markersize=3.5, markeredgewidth=0
        )
    _finish(ax, "Drafted tokens accepted, by place in the draft")
    ax.set_xlabel("place in the draft", size=LABEL, color=QUIET)
    ax.set_ylim(0, 1.02)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    labels = {label for label, runs in task.models.items() if any(_accepts(run) for run in runs.values())}
    handles = [handle for handle in _handles(task) if handle.get_label() in labels]
    ax.legend(handles=handles, frameon=False, fontsize=LABEL, labelcolor=INK)
    return figure


def _accepts(run: Run) -> bool:
    return bool(run.decoding.get("acceptance_by_position"))


# ---- what the figures share ----


def _figure(height: float) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.07, wspace=0.03, hspace=0.05)
    figure = Figure(figsize=(WIDTH, height), facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _colors(task: TaskComparison) -> list[str]:
    """One per model; without a baseline its colour stays free."""
    skip = task.baseline is None
    return [PALETTE[(place + skip) % len(PALETTE)] for place in range(len(task.models))]


def _runs(task: TaskComparison) -> Iterator[tuple[str, Run]]:
    for color, runs in zip(_colors(task), task.models.values(), strict=True):
        for run in runs.values():
            yield color, run


def _handles(task: TaskComparison) -> list[Line2D]:
    return [
        Line2D([], [], color=color, linewidth=2.2, label=label) for label, color in zip(task.models, _colors(task), strict=True)
    ]


def _legend_columns(handles: list[Line2D]) -> int:
    """As many as the width of a figure holds."""
    lengths = [len(str(handle.get_label())) for handle in handles]
    for columns in range(len(lengths), 1, -1):
        rows = math.ceil(len(lengths) / columns)
        widest = sum(max(lengths[first : first + rows]) for first in range(0, len(lengths), rows))
        if widest + LEGEND_GAP * columns <= LEGEND_LINE:
            return columns
    return 1


def _is_part(key: str) -> bool:
    return key not in NO_LOSS and not key.startswith("eval_")


def _curve(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of what metrics.jsonl logged under a name."""
    points = [(line["step"], line[key]) for line in run.log if isinstance(line.get(key), int | float)]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _fit(ax: Axes, curves: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """The y axis on what comes after the steep start."""
    last = max((steps.max() for steps, _ in curves if steps.size), default=0)
    shown = np.concatenate([values[steps >= WARM_UP_SHARE * last] for steps, values in curves])
    shown = shown[np.isfinite(shown)]
    if shown.size:
        margin = 0.06 * (float(np.ptp(shown)) or 1.0)
        ax.set_ylim(float(shown.min()) - margin, float(shown.max()) + margin)


def _finish(ax: Axes, title: str) -> None:
    ax.set_title(title, size=TITLE, color=INK, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#b5b5b5")
    ax.tick_params(labelsize=TICK, colors=QUIET, labelcolor=QUIET, length=3)
    ax.grid(axis="y", color=FAINT, linewidth=0.7)
    ax.set_axisbelow(True)
