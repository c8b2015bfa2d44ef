"""Pictures of reconstructed street maps: true streets that rides used in black, unused ones in
grey, invented ones in red.

Shapes: N intersections, E streets, S points of a curve.
"""

import io
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from nextlat.errors import NextLatError
from nextlat.tasks.streets.map import ReconstructedMap
from nextlat.tasks.streets.network import EARTH_RADIUS_MILES, StreetNetwork

USED, UNUSED, INVENTED = "#1a1a1a", "#cfcfcf", "#d7191c"
PAPER, INK, QUIET = "#ffffff", "#1a1a1a", "#6b6b6b"
CURVE_POINTS = 24
MARGIN = 0.1  # free border as a share of the larger side of a city
SMALLEST_PANEL, LARGEST_PANEL = 28.0, 64.0  # square inches of one map
SMALL_PANEL = 15.0  # of one of many
CAPTION, LEGEND = 1.15, 0.5  # inches above each map, and at the bottom
BEND = 0.17  # of an invented street at most, as a share of the larger side: it stays on the map
TITLE_LINE = 0.2  # inches of another line of a title
NARROWEST = 4.0  # inches, for the caption
MAX_COLUMNS = 3  # maps in a row, for their words to be readable
DOTTED = 1000  # intersections up to which they are marked


def positions(network: StreetNetwork) -> np.ndarray:
    """(N, 2) miles east and north of the middle of the city: longitudes shrunk by the cosine of its
    latitude."""
    degrees_N2 = np.stack([network.longitude, network.latitude], axis=1)
    middle = (degrees_N2.min(axis=0) + degrees_N2.max(axis=0)) / 2
    shrunk = np.array([math.cos(math.radians(middle[1])), 1.0])
    return EARTH_RADIUS_MILES * np.radians((degrees_N2 - middle) * shrunk)


def draw_map(ax: Axes, network: StreetNetwork, reconstructed: ReconstructedMap) -> None:
    """One map on given axes, to scale, without frame.

    An invented street leaves its intersection in the direction that the model gave it, and bends to
    where it has to lead: one that is bent much cannot exist. (True streets are straight here, as
    the network knows only their ends.)
    """
    xy_N2, used = positions(network), reconstructed.used
    wide = float(np.ptp(xy_N2, axis=0).max()) or 1.0
    # Lines scale with the blocks on paper, within what is visible.
    width = float(np.clip(20 / math.sqrt(max(len(network), 1)), 0.6, 2.0))
    red = max(0.9 * width, 0.9)
    if len(network) <= DOTTED:
        touched = np.isin(np.arange(len(network)), used[:, [0, 2]])
        for nodes, color, layer in ((~touched, UNUSED, 1), (touched, USED, 6)):
            x, y = xy_N2[nodes].T
            ax.scatter(x, y, s=(2.3 * width) ** 2, color=color, linewidths=0, zorder=layer)
    is_used = np.isin(network.edges[:, :2] @ (8, 1), used[:, :2] @ (8, 1))
    invented = [
        _curve(xy_N2[a], direction, xy_N2[b], BEND * wide)
        for a, direction, b in reconstructed.invented
    ]
    for lines, color, thick, above in (
        (list(xy_N2[network.edges[~is_used][:, [0, 2]]]), UNUSED, width, 1.5),
        (list(xy_N2[used[:, [0, 2]]]), USED, width, 2),
        (invented, PAPER, 2.2 * red, 4),  # a rim, so that red stands out where it crosses black
        (invented, INVENTED, red, 5),
    ):
        collection = LineCollection(lines, colors=color, linewidths=thick, zorder=above)
        collection.set_capstyle("butt" if color == PAPER else "round")
        ax.add_collection(collection)
    (left, bottom), (right, top) = xy_N2.min(axis=0), xy_N2.max(axis=0)
    ax.set_xlim(left - MARGIN * wide, right + MARGIN * wide)
    ax.set_ylim(bottom - MARGIN * wide, top + MARGIN * wide)
    ax.set_aspect("equal")
    ax.set_axis_off()
    # A scale bar below, of a round length of about a fifth of the map.
    power = 10.0 ** math.floor(math.log10(wide / 5))
    miles, y = max(n * power for n in (1, 2, 5) if n * power <= wide / 5), bottom - 0.036 * wide
    ax.add_line(
        Line2D(
            [left, left + miles],
            [y, y],
            color=QUIET,
            linewidth=1.2,
            zorder=5,
            solid_capstyle="butt",
        )
    )
    ax.text(left + miles + 0.012 * wide, y, f"{miles:g} mi", size=8, color=QUIET, va="center")


def draw_maps(
    path: str | Path,
    maps: Mapping[str, tuple[StreetNetwork, ReconstructedMap]],
    *,
    columns: int | None = None,
    dpi: int = 160,
) -> Path:
    """The maps side by side (from four on in rows) under their titles, with their counts and one
    legend, as a PNG.

    Args:
        path: file to write; its directory must exist.
        maps: title (of one line or several) -> (network, reconstructed map), from left to right,
            from top to bottom.
        columns: of small maps, to be compared with one another; None = large ones, in as few rows
            as can be.
        dpi: dots per inch.

    Raises:
        NextLatError: no map, or a file that cannot be written.
    """
    if not maps:
        raise NextLatError("there is no map to draw: reconstruct at least one.")
    small = columns is not None
    width, height = _panel_size(next(iter(maps.values()))[0], SMALL_PANEL if small else None)
    rows = math.ceil(len(maps) / (columns or MAX_COLUMNS))
    columns = columns or math.ceil(len(maps) / rows)
    more = TITLE_LINE * max(title.count("\n") for title in maps)
    caption = CAPTION + more
    total = rows * (height + caption) + LEGEND
    figure = Figure(figsize=(width * columns, total), facecolor=PAPER)
    FigureCanvasAgg(figure)
    for number, (title, (network, reconstructed)) in enumerate(maps.items()):
        row, column = divmod(number, columns)
        top = total - row * (height + caption)
        bottom = (top - caption - height) / total
        ax = figure.add_axes((column / columns, bottom, 1 / columns, height / total))
        draw_map(ax, network, reconstructed)
        lines = [(0.30 + more / 2, title, 11.5 if small else 15.0, INK)]
        for line, (text, color) in enumerate(_caption(reconstructed)):
            lines.append((0.60 + more + 0.21 * line, text, 10.5, color))
        for below, text, size, color in lines:
            x, y = (column + 0.5) / columns, (top - below) / total
            weight = "bold" if text is title else "normal"
            figure.text(x, y, text, ha="center", va="center", size=size, weight=weight, color=color)
    handles = [
        Line2D([], [], color=color, linewidth=2.2, label=label)
        for color, label in (
            (USED, "true street, used"),
            (UNUSED, "true street, unused"),
            (INVENTED, "invented street"),
        )
    ]
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=3,
        frameon=False,
        fontsize=10.5,
        labelcolor=QUIET,
        bbox_to_anchor=(0.5, 0.08 / total),
    )
    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    with Image.open(drawn) as picture:  # a palette takes a third of the space
        few = picture.convert("RGB").quantize(method=Image.Quantize.MAXCOVERAGE)
        few.save(buffer, format="png", optimize=True)
    try:
        Path(path).write_bytes(buffer.getvalue())
    except OSError as error:
        raise NextLatError(
            f"cannot write the picture {path} ({error.strerror}): choose another output directory."
        ) from error
    return Path(path)


def _caption(reconstructed: ReconstructedMap) -> list[tuple[str, str]]:
    """Its lines, with their colours."""
    invented, used = len(reconstructed.invented), len(reconstructed.used)
    rides, lost = reconstructed.rides, reconstructed.failed + reconstructed.unclosed
    return [
        (f"{invented:,} invented street{'s'[: invented != 1]}", INVENTED if invented else QUIET),
        (f"{used:,} of {used + reconstructed.true_unused:,} true streets used", QUIET),
        (f"of {rides:,} rides {reconstructed.astray:,} end elsewhere, {lost:,} on no map", QUIET),
    ]


def _panel_size(network: StreetNetwork, area: float | None) -> tuple[float, float]:
    """Width and height in inches: the shape of the city; where no area is given, on one that grows
    with the city."""
    spread = np.ptp(positions(network), axis=0)
    spread = spread + 2 * MARGIN * max(float(spread.max()), 1e-9)
    ratio = float(np.clip(spread[0] / spread[1], 0.45, 2.2))
    area = area or float(np.clip(len(network) / 40, SMALLEST_PANEL, LARGEST_PANEL))
    return max(math.sqrt(area * ratio), NARROWEST), math.sqrt(area / ratio)


def _curve(start: np.ndarray, direction: int, end: np.ndarray, most: float) -> np.ndarray:
    """(S, 2) cubic Bezier curve that leaves `start` in a compass direction (0 = north, clockwise)
    and reaches `end`, with handles of at most a length.

    It arrives from the side to which it left, so that one that has to turn back is seen as a loop
    and not as a spike.
    """
    angle = math.radians(45 * direction)
    heading, chord = np.array([math.sin(angle), math.cos(angle)]), end - start
    length = float(np.hypot(*chord)) or 1e-9
    left = np.array([-chord[1], chord[0]]) / length
    side = left if heading @ left >= 0 else -left
    away = start + min(0.45 * length, most) * heading
    toward = end - 0.2 * chord + min(0.35 * length, most) * side
    t = np.linspace(0, 1, CURVE_POINTS)[:, None]
    inner = 3 * t * (1 - t) ** 2 * away + 3 * t**2 * (1 - t) * toward
    return (1 - t) ** 3 * start + inner + t**3 * end
