"""Figures of one task each: accuracy by position, node or equation, and linear probes. None where
there is nothing to draw."""

import math
import re
import textwrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, PercentFormatter

from nextlat.report.comparison import TaskComparison
from nextlat.report.drawing import (
    INK,
    LABEL,
    PALETTE,
    PANEL_LINE,
    QUIET,
    TICK,
    TITLE,
    LineStyle,
    colored_runs,
    dotted,
    finish,
    legend_below,
    model_colors,
    model_handles,
    new_figure,
    shares_by_place,
)
from nextlat.report.glossary import BRANCH
from nextlat.report.models import first_run
from nextlat.tasks.word_problem import group

CORNERS = np.array(
    [[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]]
)  # of the simplex of three states
CORNER_COLORS = np.array([to_rgb(color) for color in PALETTE[:3]])
MOST_SIMPLEXES = 3  # beside one another
LINEAR = 0.1  # nats around the baseline in which probes are drawn on a linear scale
NATS = (-5, -2, -1, -0.5, -0.2, -0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


def accuracy_by_position(task: TaskComparison) -> Figure | None:
    """Word problem: accuracy at every position of the transformers, and of the latent dynamics
    models run alone."""
    ways: dict[str, tuple[LineStyle, float]] = {
        "transformer": ("-", 1.0),
        "dynamics": ((0, (5, 1.6)), 1.2),
    }
    drawn = [
        (color, way, run.curves[f"{way}_accuracy_by_position"])
        for color, run in colored_runs(task)
        for way in ways
        if f"{way}_accuracy_by_position" in run.curves
    ]
    if not drawn:
        return None
    figure = new_figure(3.1)
    ax = figure.add_subplot()
    for color, way, curve in drawn:
        style, width = ways[way]
        ax.plot(np.arange(1, len(curve) + 1), curve, color=color, linestyle=style, linewidth=width)
    settings = next(run for _, run in colored_runs(task)).recipe["task"]
    _mark_word_problem(ax, settings)
    finish(ax, "Accuracy by position")
    ax.set_xlabel("elements read", size=LABEL, color=QUIET)
    ax.set_xlim(left=1)
    ax.set_ylim(0, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    handles = [
        Line2D([], [], color=QUIET, linestyle=ways[way][0], linewidth=ways[way][1], label=label)
        for way, label in (
            ("transformer", "transformer"),
            ("dynamics", "latent dynamics model run alone"),
        )
        if any(found == way for _, found, _ in drawn)
    ]
    legend_below(figure, [*model_handles(task), *handles])
    return figure


def _mark_word_problem(ax: Axes, settings: dict[str, Any]) -> None:
    if "length" in settings:
        ax.axvline(settings["length"], color=QUIET, linewidth=0.9, linestyle=(0, (1, 2)))
        ax.annotate(
            "trained up to here",
            (settings["length"], 0.02),
            (4, 0),
            textcoords="offset points",
            size=TICK,
            color=QUIET,
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
    curves = [
        (color, run.curves["accuracy_by_position"])
        for color, run in colored_runs(task)
        if "accuracy_by_position" in run.curves
    ]
    if not curves:
        return None
    figure = new_figure(2.6)
    ax = figure.add_subplot()
    for color, curve in curves:
        dotted(ax, curve, color)
    arms = next(run for _, run in colored_runs(task)).recipe["task"].get("arms")
    if arms:
        ax.plot(
            [BRANCH - 0.25, BRANCH + 0.25],
            [1 / arms, 1 / arms],
            color=QUIET,
            linewidth=0.9,
            linestyle=(0, (4, 3)),
        )
        ax.annotate(
            "chance",
            (BRANCH + 0.25, 1 / arms),
            (4, 0),
            textcoords="offset points",
            size=TICK,
            color=QUIET,
            va="center",
        )
    finish(ax, "Accuracy by node of the path (2: the branch)")
    shares_by_place(ax, "node of the path")
    legend_below(figure, model_handles(task))
    return figure


def equation_accuracy(task: TaskComparison) -> Figure | None:
    """Countdown: share of true equations at every place, and of problems solved, with seen and with
    held-out targets."""
    styles: dict[str, LineStyle] = {"seen": "-", "held_out": (0, (4, 2))}
    names = {
        split: [m.name for m in task.metrics if re.fullmatch(rf"true_equation_\d+_{split}", m.name)]
        for split in styles
    }
    drawn = [
        (color, split, [run.metrics[name] for name in names[split]])
        for color, run in colored_runs(task)
        for split in styles
        if names[split] and all(name in run.metrics for name in names[split])
    ]
    if not drawn:
        return None
    figure = new_figure(2.9)
    ax = figure.add_subplot()
    for color, split, shares in drawn:
        dotted(ax, shares, color, styles[split])
    finish(ax, "True equations by their place in the derivation")
    shares_by_place(ax, "equation")
    words = {"seen": "targets seen in training", "held_out": "held-out targets"}
    lines = [
        Line2D([], [], color=QUIET, linewidth=1.1, linestyle=styles[split], label=words[split])
        for split in styles
    ]
    legend_below(figure, [*model_handles(task), *lines])
    return figure


def probe_curves(task: TaskComparison) -> Figure | None:
    """Text: held-out cross-entropy of linear probes by how far they look ahead, minus that of the
    baseline's probes at the same seed."""
    name = "probe_cross_entropy"
    base = (
        {}
        if task.baseline is None
        else {s: r.curves[name] for s, r in task.models[task.baseline].items() if name in r.curves}
    )
    drawn = [
        (color, np.subtract(run.curves[name], base[run.seed]))
        for color, run in colored_runs(task)
        if name in run.curves and run.seed in base and len(run.curves[name]) == len(base[run.seed])
    ]
    others = [
        label
        for label, runs in task.models.items()
        if label != task.baseline and any(name in r.curves for r in runs.values())
    ]
    if not drawn or not others:
        return None
    figure = new_figure(2.9)
    ax = figure.add_subplot()
    for color, curve in drawn:
        if curve.any():  # the baseline itself is the line at 0
            dotted(ax, curve, color)
    ax.axhline(0, color=model_colors(task)[0], linewidth=1.4, zorder=1)
    # Near the baseline linear, beyond logarithmic: one token ahead some miss by twenty times what
    # sets them apart further on.
    ax.set_yscale("symlog", linthresh=LINEAR)
    ax.yaxis.set_major_locator(FixedLocator(NATS))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda nats, _: f"{nats:g}"))
    finish(ax, f"Linear probes of the state: cross-entropy minus that of {task.baseline}, nats")
    ax.set_xlabel("tokens ahead", size=LABEL, color=QUIET)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(
        figure,
        [
            handle
            for handle in model_handles(task)
            if handle.get_label() in (task.baseline, *others)
        ],
    )
    return figure


def beliefs(task: TaskComparison) -> Figure | None:
    """Hidden Markov model of three states: the exact beliefs, and those that a linear probe reads
    off each model, in the simplex.

    A belief is a point of the triangle whose corners are certainty of one state (as in Shai et al.,
    arXiv 2405.15943); its colour is that of the exact belief there. The first seed of each model.
    """
    found = {
        label: run.beliefs
        for label, runs in task.models.items()
        if (run := first_run(runs)).beliefs is not None
        and run.beliefs.true.shape[1] == len(CORNERS)
    }
    if not found:
        return None
    exact = next(iter(found.values())).true  # the places are the same for all
    panels = [(f"exact\n{len(exact):,} places", exact, exact)]
    for label, known in found.items():
        title = "\n".join(
            [*textwrap.wrap(label, PANEL_LINE), f"R\N{SUPERSCRIPT TWO} = {known.r2:.3f}"]
        )
        panels.append((title, known.decoded, known.true))
    columns = min(MOST_SIMPLEXES, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(2.15 * rows)
    grid = figure.add_gridspec(rows, columns)
    drawn = np.concatenate([CORNERS, *(points @ CORNERS for _, points, _ in panels)])
    for place, (title, beliefs_PS, true_PS) in enumerate(panels):
        ax = figure.add_subplot(grid[divmod(place, columns)])
        _draw_simplex(ax, beliefs_PS, true_PS)
        ax.set(
            xlim=_extent(drawn[:, 0]), ylim=_extent(drawn[:, 1])
        )  # the same for all, so that the triangles are
        ax.set_title(title, size=TITLE, color=INK)
    return figure


def _draw_simplex(ax: Axes, beliefs_PS: np.ndarray, true_PS: np.ndarray) -> None:
    outline = np.array([*CORNERS, CORNERS[0]])
    ax.plot(*outline.T, color="#b5b5b5", linewidth=0.8, zorder=1)
    x, y = (beliefs_PS @ CORNERS).T
    ax.scatter(x, y, s=2.5, c=(true_PS @ CORNER_COLORS).clip(0, 1), linewidths=0, zorder=2)
    ax.set_aspect("equal")
    ax.set_axis_off()


def _extent(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()) - 0.02, float(values.max()) + 0.02
