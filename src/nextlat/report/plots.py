"""Figures of any task: learning curves, metrics, accepted drafts. Every seed is drawn by itself;
None where there is nothing to draw."""

import math
import textwrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nextlat.report.comparison import MetricComparison, TaskComparison
from nextlat.report.drawing import (
    INK,
    LABEL,
    PANEL_LINE,
    QUIET,
    colored_runs,
    dotted,
    finish,
    legend_below,
    legend_columns,
    model_colors,
    model_handles,
    new_figure,
    shares_by_place,
)
from nextlat.report.glossary import describe
from nextlat.report.runs import Run
from nextlat.report.wording import ARROWS

CROSS_ENTROPY = "next_token"  # the part of the loss that every objective has
NO_LOSS = (
    "step",
    "loss",
    "grad_norm",
    "learning_rate",
    "tokens",
    "seconds",
    "epoch",
    CROSS_ENTROPY,
)
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


def learning_curves(task: TaskComparison) -> Figure | None:
    """Cross-entropy of all models on one axis, training thin and held-out with points; the other
    parts of the loss below."""
    logs = [
        (color, run) for color, run in colored_runs(task) if _curve(run, CROSS_ENTROPY)[0].size > 1
    ]
    if not logs:
        return None
    parts = list(
        dict.fromkeys(key for _, run in logs for line in run.log for key in line if _is_part(key))
    )
    columns = min(len(parts), MOST_PARTS) or 1
    rows = math.ceil(len(parts) / columns)
    figure = new_figure(2.6 + 1.8 * rows)
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[3.0, *[2.0] * rows])
    top = figure.add_subplot(grid[0, :])
    for color, run in logs:
        top.plot(*_curve(run, CROSS_ENTROPY), color=color, linewidth=0.8, alpha=0.45)
        steps, values = _curve(run, f"eval_{CROSS_ENTROPY}")
        top.plot(
            steps,
            values,
            color=color,
            linewidth=1.2,
            marker="o",
            markersize=3.5,
            markeredgewidth=0,
            zorder=3,
        )
    finish(top, "Cross-entropy, nats per token")
    _fit(
        top,
        [_curve(run, key) for _, run in logs for key in (CROSS_ENTROPY, f"eval_{CROSS_ENTROPY}")],
    )
    handles = [
        Line2D([], [], color=QUIET, linewidth=0.8, alpha=0.6, label="training"),
        Line2D([], [], color=QUIET, linewidth=1.2, marker="o", markersize=3.5, label="held-out"),
    ]
    legend_below(figure, [*model_handles(task), *handles])
    for place, part in enumerate(parts):
        row, column = divmod(place, columns)
        ax = figure.add_subplot(grid[1 + row, column], sharex=top if columns == 1 else None)
        if columns > 1:  # too narrow for the steps that fit above
            ax.set_xlim(0, max(_curve(run, CROSS_ENTROPY)[0].max() for _, run in logs))
            ax.xaxis.set_major_locator(MaxNLocator(4 if columns == 2 else 3, steps=[1, 2, 5, 10]))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        for color, run in logs:
            if any(part in line for line in run.log):
                ax.plot(*_curve(run, part), color=color, linewidth=0.8, alpha=0.8)
        title = PART_TITLES.get(part, part.replace("_", " "))
        finish(ax, title if columns < MOST_PARTS else "\n".join(textwrap.wrap(title, PANEL_LINE)))
        _fit(ax, [_curve(run, part) for _, run in logs])
        if place + columns >= len(parts):
            ax.set_xlabel("optimiser steps", size=LABEL, color=QUIET)
    if not parts:
        top.set_xlabel("optimiser steps", size=LABEL, color=QUIET)
    top.set_xlim(left=0)
    top.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    return figure


def metric_panel(task: TaskComparison) -> Figure | None:
    """One small axis per metric: a point with its error per seed, seeds joined by a line, the mean
    of several as a bar."""
    metrics = [metric for metric in task.metrics if describe(metric.name).headline]
    if not metrics:
        return None
    columns = min(3, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = new_figure(1.5 * rows + 0.4)
    figure.legend(
        handles=model_handles(task),
        loc="outside upper center",
        ncols=legend_columns(model_handles(task)),
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
        against = next(
            (m.estimates.get(task.baseline) for m in task.metrics if m.name == term.counterpart),
            None,
        )
        estimates |= {task.baseline: against} if against is not None else {}
    seeds = sorted({seed for estimate in estimates.values() for seed in estimate.seeds})
    for seed in seeds:
        spot = 0.0 if len(seeds) == 1 else 0.36 * (seeds.index(seed) / (len(seeds) - 1) - 0.5)
        points = []
        for x, (label, color) in enumerate(zip(task.models, model_colors(task), strict=True)):
            if label not in estimates or seed not in estimates[label].seeds:
                continue
            value, error = estimates[label].seeds[seed]
            points.append((x + spot, value))
            ax.errorbar(
                x + spot,
                value,
                error,
                fmt="o",
                color=color,
                markersize=4,
                elinewidth=1.1,
                markeredgewidth=0,
                zorder=3,
            )
        ax.plot(*zip(*points, strict=True), color="#c4c4c4", linewidth=0.8, zorder=1)
    for x, (label, color) in enumerate(zip(task.models, model_colors(task), strict=True)):
        if label in estimates and len(estimates[label].seeds) > 1:
            ax.hlines(
                estimates[label].value,
                x - 0.3,
                x + 0.3,
                color=color,
                linewidth=2.2,
                alpha=0.35,
                zorder=2,
            )
    if term.reference is not None:
        ax.axhline(term.reference, color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)))
    finish(
        ax,
        "\n".join(
            textwrap.wrap(
                f"{term.title}\N{NO-BREAK SPACE}{ARROWS[metric.higher_is_better]}",
                PANEL_LINE,
                break_on_hyphens=False,
            )
        ),
    )
    ax.set_xlim(-0.6, len(task.models) - 0.4)
    ax.set_xticks([])
    ax.margins(y=0.18)
    ax.yaxis.set_major_locator(MaxNLocator(4))
    if term.unit == "share":
        ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{round(100 * share, 6):g} %"))


def acceptance(task: TaskComparison) -> Figure | None:
    """Share of drafted tokens accepted, by their place in the draft."""
    drawn = [
        (color, run.decoding["acceptance_by_position"])
        for color, run in colored_runs(task)
        if _accepts(run)
    ]
    if not drawn:
        return None
    figure = new_figure(2.3)
    ax = figure.add_subplot()
    for color, shares in drawn:
        dotted(ax, shares, color)
    finish(ax, "Drafted tokens accepted, by place in the draft")
    shares_by_place(ax, "place in the draft")
    labels = {
        label for label, runs in task.models.items() if any(_accepts(run) for run in runs.values())
    }
    handles = [handle for handle in model_handles(task) if handle.get_label() in labels]
    ax.legend(handles=handles, frameon=False, fontsize=LABEL, labelcolor=INK)
    return figure


def _accepts(run: Run) -> bool:
    return bool(run.decoding.get("acceptance_by_position"))


def _is_part(key: str) -> bool:
    return key not in NO_LOSS and not key.startswith("eval_")


def _curve(run: Run, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of what metrics.jsonl logged under a name."""
    points = [
        (line["step"], line[key]) for line in run.log if isinstance(line.get(key), int | float)
    ]
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
