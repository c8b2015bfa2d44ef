"""What the figures share: sizes, colours, axes, legends. matplotlib's Figure objects only, without
global state.

Colours: Okabe & Ito, safe for the colour-blind.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from nextlat.report.comparison import TaskComparison
from nextlat.report.runs import Run

DPI = 200
WIDTH = 6.2  # inches of every figure: narrow, so that its words can be read on a phone
PALETTE = (
    "#D55E00",
    "#0072B2",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)  # the baseline's first
INK, QUIET, FAINT = "#1a1a1a", "#6b6b6b", "#e4e4e4"
TITLE, LABEL, TICK = 9.5, 8.5, 8.0  # points
PANEL_LINE = 22  # characters of a small panel's title
LEGEND_LINE, LEGEND_GAP = (
    94,
    9,
)  # characters that fit beside one another in a legend, and those that a line and its space take

LineStyle = Literal["-"] | tuple[float, Sequence[float]]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=DPI, metadata={"Software": None})


def new_figure(height: float) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.07, wspace=0.03, hspace=0.05)
    figure = Figure(figsize=(WIDTH, height), facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def model_colors(task: TaskComparison) -> list[str]:
    """One per model; without a baseline its colour stays free."""
    skip = task.baseline is None
    return [PALETTE[(place + skip) % len(PALETTE)] for place in range(len(task.models))]


def colored_runs(task: TaskComparison) -> Iterator[tuple[str, Run]]:
    for color, runs in zip(model_colors(task), task.models.values(), strict=True):
        for run in runs.values():
            yield color, run


def model_handles(task: TaskComparison) -> list[Line2D]:
    return [
        Line2D([], [], color=color, linewidth=2.2, label=label)
        for label, color in zip(task.models, model_colors(task), strict=True)
    ]


def legend_columns(handles: list[Line2D]) -> int:
    """As many as the width of a figure holds."""
    lengths = [len(str(handle.get_label())) for handle in handles]
    for columns in range(len(lengths), 1, -1):
        rows = math.ceil(len(lengths) / columns)
        widest = sum(max(lengths[first : first + rows]) for first in range(0, len(lengths), rows))
        if widest + LEGEND_GAP * columns <= LEGEND_LINE:
            return columns
    return 1


def finish(ax: Axes, title: str) -> None:
    ax.set_title(title, size=TITLE, color=INK, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#b5b5b5")
    ax.tick_params(labelsize=TICK, colors=QUIET, labelcolor=QUIET, length=3)
    ax.grid(axis="y", color=FAINT, linewidth=0.7)
    ax.set_axisbelow(True)


def dotted(
    ax: Axes, values: Sequence[float] | np.ndarray, color: str, style: LineStyle = "-"
) -> None:
    """Values at places 1, 2, ..."""
    places = np.arange(1, len(values) + 1)
    ax.plot(
        places,
        values,
        color=color,
        linestyle=style,
        linewidth=1.1,
        marker="o",
        markersize=3.5,
        markeredgewidth=0,
    )


def shares_by_place(ax: Axes, place: str) -> None:
    ax.set_xlabel(place, size=LABEL, color=QUIET)
    ax.set_ylim(0, 1.04)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))


def legend_below(figure: Figure, handles: list[Line2D]) -> None:
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=legend_columns(handles),
        frameon=False,
        fontsize=LABEL,
        labelcolor=INK,
    )
