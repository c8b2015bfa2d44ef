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
from nextlat.tasks.streets.network import StreetNetwork

USED, UNUSED, INVENTED = "#1a1a1a", "#cfcfcf", "#d7191c"
PAPER, INK, QUIET = "#ffffff", "#1a1a1a", "#6b6b6b"
MILES_PER_DEGREE = 69.0936  # of latitude, on the sphere of `StreetNetwork.miles`
CURVE_POINTS = 24
SMALLEST_PANEL, LARGEST_PANEL = 28.0, 64.0  # square inches of one map
MARGIN = 0.06  # free border as a share of the larger side of a city
NARROWEST = 4.0  # inches, for the caption
MOST_BESIDE = 3  # maps in a row, for their words to be read
DOTTED = 1000  # intersections up to which they are marked


def positions(network: StreetNetwork) -> np.ndarray:
    """(N, 2) miles east and north of the middle of the city: longitudes shrunk by the cosine of its
    latitude."""
    latitude = (network.latitude.min() + network.latitude.max()) / 2
    longitude = (network.longitude.min() + network.longitude.max()) / 2
    east = (network.longitude - longitude) * math.cos(math.radians(latitude))
    return MILES_PER_DEGREE * np.stack([east, network.latitude - latitude], axis=1)


def draw_map(ax: Axes, network: StreetNetwork, reconstructed: ReconstructedMap) -> None:
    """One map on given axes, to scale, without frame.

    An invented street leaves its intersection in the direction that the model gave it, and bends to
    where it has to lead: one that is bent much cannot exist. (True streets are straight here, as
    the network knows only their ends.)
    """
    xy_N2 = positions(network)
    wide = float(np.ptp(xy_N2, axis=0).max()) or 1.0
    # Lines scale with the blocks on paper, within what is visible.
    width = float(np.clip(20 / math.sqrt(max(len(network), 1)), 0.6, 2.0))
    unused = network.edges[~_is_among(network.edges, reconstructed.used)]
    if len(network) <= DOTTED:
        touched = np.isin(np.arange(len(network)), reconstructed.used[:, [0, 2]])
        for nodes, color, above in ((~touched, UNUSED, 1), (touched, USED, 6)):
            ax.scatter(
                xy_N2[nodes, 0],
                xy_N2[nodes, 1],
                s=(2.3 * width) ** 2,
                color=color,
                linewidths=0,
                zorder=above,
            )
    invented = [_curve(xy_N2[a], direction, xy_N2[b]) for a, direction, b in reconstructed.invented]
    red = max(0.9 * width, 0.9)
    for lines, color, thick, layer in (
        (list(xy_N2[unused[:, [0, 2]]]), UNUSED, width, 1.5),
        (list(xy_N2[reconstructed.used[:, [0, 2]]]), USED, width, 2),
        (
            invented,
            PAPER,
            2.2 * red,
            4,
        ),  # a white rim, so that a red line stands out where it crosses black ones
        (invented, INVENTED, red, 5),
    ):
        collection = LineCollection(lines, colors=color, linewidths=thick, zorder=layer)
        collection.set_capstyle("butt" if color == PAPER else "round")
        ax.add_collection(collection)
    for low, high, limit in (
        (*_extent(xy_N2[:, 0]), ax.set_xlim),
        (*_extent(xy_N2[:, 1]), ax.set_ylim),
    ):
        limit(low - MARGIN * wide, high + MARGIN * wide)
    ax.set_aspect("equal")
    ax.set_axis_off()
    _scale_bar(ax, xy_N2, wide)


def draw_maps(
    path: str | Path, maps: Mapping[str, tuple[StreetNetwork, ReconstructedMap]], *, dpi: int = 160
) -> Path:
    """The maps side by side (from four on in rows) under their titles, with their counts and one
    legend, as a PNG.

    Args:
        path: file to write; its directory must exist.
        maps: title -> (network, reconstructed map), from left to right, from top to bottom.

    Raises:
        NextLatError: no map, or a file that cannot be written.
    """
    if not maps:
        raise NextLatError("there is no map to draw: reconstruct at least one.")
    width, height = _panel_size(next(iter(maps.values()))[0])
    caption, legend = 1.05, 0.5
    rows = math.ceil(len(maps) / MOST_BESIDE)
    columns = math.ceil(len(maps) / rows)
    figure = Figure(figsize=(width * columns, rows * (height + caption) + legend), facecolor=PAPER)
    FigureCanvasAgg(figure)
    total = figure.get_figheight()
    for place, (title, (network, reconstructed)) in enumerate(maps.items()):
        row, column = divmod(place, columns)
        left, share, top = column / columns, 1 / columns, total - row * (height + caption)
        ax = figure.add_axes((left, (top - caption - height) / total, share, height / total))
        draw_map(ax, network, reconstructed)
        middle = left + share / 2
        figure.text(
            middle,
            (top - 0.30) / total,
            title,
            ha="center",
            va="center",
            size=15,
            weight="bold",
            color=INK,
        )
        for line, (text, color) in enumerate(_caption(reconstructed)):
            y = (top - 0.60 - 0.21 * line) / total
            figure.text(middle, y, text, ha="center", va="center", size=10.5, color=color)
    handles = [
        Line2D([], [], color=USED, linewidth=2.2, label="true street, used"),
        Line2D([], [], color=UNUSED, linewidth=2.2, label="true street, unused"),
        Line2D([], [], color=INVENTED, linewidth=2.2, label="invented street"),
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
    with Image.open(
        drawn
    ) as picture:  # a palette does for so few colours, and takes a third of the space
        picture.convert("RGB").quantize(method=Image.Quantize.MAXCOVERAGE).save(
            buffer, format="png", optimize=True
        )
    try:
        Path(path).write_bytes(buffer.getvalue())
    except OSError as error:
        raise NextLatError(
            f"cannot write the picture {path} ({error.strerror}): choose another output directory."
        ) from error
    return Path(path)


def _caption(reconstructed: ReconstructedMap) -> list[tuple[str, str]]:
    used, total = len(reconstructed.used), len(reconstructed.used) + reconstructed.true_unused
    invented = len(reconstructed.invented)
    unexplained = reconstructed.rides - reconstructed.explained
    return [
        (
            f"{invented:,} invented street{'' if invented == 1 else 's'}",
            INVENTED if invented else QUIET,
        ),
        (f"{used:,} of {total:,} true streets used", QUIET),
        (f"{unexplained:,} of {reconstructed.rides:,} rides unexplained", QUIET),
    ]


def _panel_size(network: StreetNetwork) -> tuple[float, float]:
    """Width and height in inches: the shape of the city, on an area that grows with it."""
    xy_N2 = positions(network)
    spread = np.ptp(xy_N2, axis=0)
    spread = spread + 2 * MARGIN * max(float(spread.max()), 1e-9)
    ratio = float(np.clip(spread[0] / spread[1], 0.45, 2.2))
    area = float(np.clip(len(network) / 40, SMALLEST_PANEL, LARGEST_PANEL))
    return max(math.sqrt(area * ratio), NARROWEST), math.sqrt(area / ratio)


def _extent(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _is_among(streets: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(E,) whether each (source, direction) of `streets` is one of `others`."""
    return np.isin(streets[:, 0] * 8 + streets[:, 1], others[:, 0] * 8 + others[:, 1])


def _curve(start: np.ndarray, direction: int, end: np.ndarray) -> np.ndarray:
    """(S, 2) cubic Bezier curve that leaves `start` in a compass direction (0 = north, clockwise)
    and reaches `end`.

    It arrives from the side to which it left, so that one that has to turn back is seen as a loop
    and not as a spike.
    """
    angle = math.radians(45 * direction)
    heading, chord = np.array([math.sin(angle), math.cos(angle)]), end - start
    length = float(np.hypot(*chord)) or 1e-9
    left = np.array([-chord[1], chord[0]]) / length
    side = left if heading @ left >= 0 else -left
    away = start + 0.45 * length * heading
    toward = end - 0.2 * chord + 0.35 * length * side
    t = np.linspace(0, 1, CURVE_POINTS)[:, None]
    return (
        (1 - t) ** 3 * start
        + 3 * t * (1 - t) ** 2 * away
        + 3 * t**2 * (1 - t) * toward
        + t**3 * end
    )


def _scale_bar(ax: Axes, xy_N2: np.ndarray, wide: float) -> None:
    """A round length of about a fifth of the map, below it on the left."""
    about = wide / 5
    power = 10.0 ** math.floor(math.log10(about))
    miles = max(step * power for step in (1, 2, 5) if step * power <= about)
    left, bottom = float(xy_N2[:, 0].min()), float(xy_N2[:, 1].min()) - 0.6 * MARGIN * wide
    ax.plot(
        [left, left + miles],
        [bottom, bottom],
        color=QUIET,
        linewidth=1.2,
        solid_capstyle="butt",
        zorder=5,
    )
    ax.text(
        left + miles + 0.012 * wide,
        bottom,
        f"{miles:g} mi",
        size=8,
        color=QUIET,
        ha="left",
        va="center",
    )
