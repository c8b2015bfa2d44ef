"""Where street networks come from: CSV files, OpenStreetMap, or a generator.

Shapes: N intersections, L links.
"""

import csv
import math
import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from nextlat.errors import NextLatError
from nextlat.tasks.streets.network import DIRECTIONS, NOWHERE, StreetNetwork, compass_direction

RESERVED = {"<pad>", "<unk>", "end", *DIRECTIONS}  # the other tokens of the street task

# The generated city lies near the southern end of Central Park; a degree of latitude is about
# 111,320 m. Its measures keep every bearing inside its sector of 45 degrees: at worst a diagonal is
# 2 degrees from its edge.
CENTRE = (40.765, -73.975)
METRES_PER_DEGREE = 111_320.0
BLOCK_EAST, BLOCK_NORTH = 110.0, 90.0
SPACING_JITTER, CORNER_JITTER, ROTATION = 0.10, 0.04, 6.0


def link_network(
    node_ids: Sequence[str],
    latitude: np.ndarray,
    longitude: np.ndarray,
    links: np.ndarray,
    lengths: np.ndarray | None = None,
) -> StreetNetwork:
    """A network of links between intersections, each labelled with its compass direction.

    Of several links in one direction from one intersection, the shortest is kept (of equally short
    ones that to the smaller index). Links of an intersection to itself are dropped.

    Args:
        node_ids, latitude, longitude: as in `StreetNetwork`.
        links: (L, 2) node indices from, to.
        lengths: (L,) in any unit; default: great-circle distance.
    """
    bare = StreetNetwork(
        tuple(node_ids), latitude, longitude, np.full((len(node_ids), len(DIRECTIONS)), NOWHERE)
    )
    a, b = np.asarray(links, dtype=np.int64).reshape(-1, 2).T
    length = bare.miles(a, b) if lengths is None else np.asarray(lengths)
    order = np.lexsort((b, length))[::-1]  # longest first: the shortest is written last and stays
    order = order[a[order] != b[order]]
    lat, lon = bare.latitude, bare.longitude
    direction = compass_direction(lat[a], lon[a], lat[b], lon[b])
    targets = bare.targets.copy()
    for link in order.tolist():
        targets[a[link], direction[link]] = b[link]
    return StreetNetwork(bare.node_ids, lat, lon, targets)


# --- CSV files ----------------------------------------------------------------------------------


def read_csv(directory: str | Path) -> StreetNetwork:
    """Read `nodes.csv` (id, lat, lon in degrees) and `edges.csv` (source, direction, target).

    Other columns are ignored. This is the form in which the network of Vafa et al. (arXiv
    2406.03689) can be had. Streets are taken as they are written: a direction is not compared with
    the bearing (in their Manhattan seven of 9,705 differ), loops and dead ends are kept.

    Raises:
        NextLatError: with file and line: a missing file or column, a bad number, an unknown
            intersection or direction, a second street with the same source and direction, a name
            that cannot be a token.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise NextLatError(
            f"{directory} is no directory: give one that holds nodes.csv and edges.csv."
        )
    nodes_path = directory / "nodes.csv"
    index: dict[str, int] = {}
    coordinates: list[tuple[float, float]] = []
    for where, (name, lat, lon) in _rows(nodes_path, ("id", "lat", "lon")):
        if not name or name.split() != [name] or name in RESERVED:
            raise NextLatError(
                f"{where}: {name!r} cannot name an intersection: use a word other than "
                f"{sorted(RESERVED)}."
            )
        if name in index:
            raise NextLatError(
                f"{where}: the intersection {name!r} is listed a second time: remove one of the "
                "two lines."
            )
        index[name] = len(index)
        coordinates.append((_degrees(where, "lat", lat, 90.0), _degrees(where, "lon", lon, 180.0)))
    if not index:
        raise NextLatError(
            f"{nodes_path} lists no intersection: give at least one line id,lat,lon below the "
            "header."
        )
    targets = np.full((len(index), len(DIRECTIONS)), NOWHERE)
    columns = ("source", "direction", "target")
    for where, (source, direction, target) in _rows(directory / "edges.csv", columns):
        for name in (source, target):
            if name not in index:
                raise NextLatError(
                    f"{where}: the intersection {name!r} is not in {nodes_path}: add it there or "
                    "remove this line."
                )
        if direction not in DIRECTIONS:
            raise NextLatError(
                f"{where}: {direction!r} is no direction: use one of {' '.join(DIRECTIONS)}."
            )
        street = index[source], DIRECTIONS.index(direction)
        if targets[street] != NOWHERE:
            raise NextLatError(
                f"{where}: a second street leads {direction} from {source!r}: keep one per "
                "direction."
            )
        targets[street] = index[target]
    latitude, longitude = np.array(coordinates).T
    return StreetNetwork(tuple(index), latitude, longitude, targets)


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """("file, line n", the named columns stripped) for each row that is not blank."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            absent = [name for name in columns if name not in header]
            if absent:
                raise NextLatError(
                    f"{path}, line 1: the header lacks {', '.join(absent)}: begin the file with "
                    f"{','.join(columns)}."
                )
            indices = [header.index(name) for name in columns]
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if not any(cell.strip() for cell in row):
                    continue
                if len(row) != len(header):
                    raise NextLatError(
                        f"{where}: {len(row)} values where the header names {len(header)}: "
                        "complete the line."
                    )
                yield where, [row[index].strip() for index in indices]
    except OSError as error:
        raise NextLatError(
            f"cannot read {path} ({error.strerror or error}): give a readable file."
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise NextLatError(f"{path} is no CSV text in UTF-8 ({error}): save it as such.") from error


def _degrees(where: str, column: str, text: str, bound: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= bound:  # also false for NaN
        raise NextLatError(
            f"{where}: {column} = {text!r} is no number of degrees from -{bound:g} to {bound:g}: "
            "correct it."
        )
    return value


# --- OpenStreetMap ------------------------------------------------------------------------------


def download_place(place: str, cache: str | Path | None = None) -> StreetNetwork:
    """Download a place's drivable streets from OpenStreetMap, with the optional package `osmnx`.

    Args:
        place: what OpenStreetMap's search resolves to an area ("Piedmont, California, USA").
        cache: directory in which answers are kept, so that a second call needs no network;
            default: `nextlat/osm` in the user's cache directory.

    Returns:
        Their largest strongly connected part, named by OpenStreetMap's node numbers. Nodes where
        nothing branches are merged away, as osmnx does by default.

    Raises:
        NextLatError: osmnx is missing, the place is unknown or no area, its streets connect
            nothing, or OpenStreetMap cannot be reached.
    """
    try:
        import osmnx
    except ImportError as error:
        raise NextLatError(
            "downloading streets needs the package osmnx, which is not installed: pip install "
            "'nextlat[osm]', or give CSV files."
        ) from error
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nextlat" / "osm"
    settings, before = osmnx.settings, (osmnx.settings.use_cache, osmnx.settings.cache_folder)
    settings.use_cache, settings.cache_folder = True, str(cache)
    try:
        graph = osmnx.graph_from_place(place, network_type="drive")
    except (OSError, TypeError, ValueError) as error:
        raise NextLatError(_download_failure(place, cache, error)) from error
    finally:
        settings.use_cache, settings.cache_folder = before
    nodes = sorted(graph.nodes)
    index = {node: i for i, node in enumerate(nodes)}
    network = link_network(
        [str(node) for node in nodes],
        np.array([float(graph.nodes[node]["y"]) for node in nodes]),
        np.array([float(graph.nodes[node]["x"]) for node in nodes]),
        np.array([(index[a], index[b]) for a, b in graph.edges()]),
        np.array([float(metres) for _, _, metres in graph.edges(data="length")]),
    ).strongly_connected()
    if len(network) < 2:
        raise NextLatError(
            f"the streets of {place!r} do not connect two intersections both ways: take a larger "
            "place."
        )
    return network


def _download_failure(place: str, cache: str | Path, error: Exception) -> str:
    """What osmnx's exception means to the user."""
    kind = type(error)
    if kind.__module__.startswith("requests") or kind.__name__ == "ResponseStatusCodeError":
        return (
            f"OpenStreetMap cannot be reached for {place!r} ({kind.__name__}): check the "
            "connection, or give CSV files."
        )
    if isinstance(error, OSError):
        return (
            f"cannot keep the answers of OpenStreetMap in {cache} ({error.strerror or error}): "
            "give another cache directory."
        )
    # "No result" is an InsufficientResponseError (a ValueError); "a point, no area" is a TypeError.
    return (
        f"OpenStreetMap knows no area with streets called {place!r}: check the spelling, and name "
        "it with its country ('Piedmont, California, USA')."
    )


# --- a generated city ---------------------------------------------------------------------------


def generate_city(
    rows: int = 10,
    columns: int = 10,
    seed: int = 0,
    one_way: float = 0.5,
    missing: float = 0.1,
    diagonal: bool = True,
    park: bool = True,
) -> StreetNetwork:
    """A Manhattan in miniature, strongly connected.

    Streets run west-east and avenues south-north on a grid of about 110 by 90 metres, turned by six
    degrees, with uneven spacing and slightly displaced corners. The outermost streets and avenues
    are two-way. A diagonal avenue climbs north-east, and a lane from the south-east corner climbs
    north-west until it meets it, so that all eight compass directions occur. A park in the
    north-west is a rectangle of corners left out.

    Args:
        rows: streets, at least 4.
        columns: avenues, at least 4.
        seed: everything random follows from it.
        one_way: share of the inner streets, and of the inner avenues, that are one-way, in
            alternating directions.
        missing: share of the blocks (stretches between neighbouring corners) that are closed; fewer
            are closed when more would disconnect the city.
        diagonal: whether there are a diagonal avenue (NE/SW) and a diagonal lane (NW/SE).
        park: whether there is a park, with no streets inside.

    Returns:
        The network, its corners named "0", "1", ... from south to north, then from west to east.
    """
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(
        _spacing(rows, BLOCK_NORTH, rng), _spacing(columns, BLOCK_EAST, rng), indexing="ij"
    )
    y = y + rng.uniform(-CORNER_JITTER, CORNER_JITTER, y.shape) * BLOCK_NORTH
    x = x + rng.uniform(-CORNER_JITTER, CORNER_JITTER, x.shape) * BLOCK_EAST

    exists = np.ones((rows, columns), dtype=bool)
    if park:  # in the northern half, one column off the western edge, clear of the diagonal
        exists[rows // 2 : rows // 2 + max(1, rows // 3), 1 : 1 + max(1, columns // 4)] = False
        exists[-1] = True
    index = np.where(exists, np.cumsum(exists).reshape(exists.shape) - 1, -1)

    blocks: list[list[tuple[int, int]]] = []  # each block is one or two links
    for lines in (index, index.T):
        for line, sense in zip(lines, _senses(len(lines), one_way, rng), strict=True):
            for a, b in pairwise(line.tolist()):
                if a >= 0 and b >= 0:
                    blocks.append([(a, b)] * (sense >= 0) + [(b, a)] * (sense <= 0))
    successors: list[set[int]] = [set() for _ in range(int(exists.sum()))]
    for a, b in [
        *(link for block in blocks for link in block),
        *(_diagonals(index) if diagonal else []),
    ]:
        successors[a].add(b)
    to_close = round(missing * len(blocks))
    for which in rng.permutation(len(blocks)).tolist():
        if to_close == 0:
            break
        for a, b in blocks[which]:
            successors[a].remove(b)
        if all(_reaches(successors, a, b) for a, b in blocks[which]):
            to_close -= 1
        else:
            for a, b in blocks[which]:
                successors[a].add(b)

    links = np.array([(a, b) for a, reached in enumerate(successors) for b in sorted(reached)])
    turn = math.radians(ROTATION)
    north, east = y - y.mean(), x - x.mean()
    # Clockwise, as Manhattan is; seven decimals (about a centimetre) as OpenStreetMap stores them.
    latitude = CENTRE[0] + (north * math.cos(turn) - east * math.sin(turn)) / METRES_PER_DEGREE
    longitude = CENTRE[1] + (north * math.sin(turn) + east * math.cos(turn)) / (
        METRES_PER_DEGREE * math.cos(math.radians(CENTRE[0]))
    )
    names = [str(i) for i in range(len(successors))]
    return link_network(names, latitude[exists].round(7), longitude[exists].round(7), links)


def _spacing(lines: int, metres: float, rng: np.random.Generator) -> np.ndarray:
    """(lines,) metres, positions of parallel lines with uneven gaps."""
    gaps = rng.uniform(1 - SPACING_JITTER, 1 + SPACING_JITTER, lines - 1) * metres
    return np.concatenate([[0.0], np.cumsum(gaps)])


def _senses(lines: int, one_way: float, rng: np.random.Generator) -> list[int]:
    """For each parallel line: 0 two-way, 1 forward only, -1 backward only."""
    inner = 1 + rng.choice(lines - 2, round(one_way * (lines - 2)), replace=False)
    senses, sign = [0] * lines, 1 if rng.random() < 0.5 else -1
    for line in sorted(inner.tolist()):
        senses[line], sign = sign, -sign
    return senses


def _diagonals(index: np.ndarray) -> list[tuple[int, int]]:
    """Links, both ways, of the avenue that ends in the north-east corner (or at the eastern edge)
    and of the lane, which stops before it would cross the avenue between two corners.

    Args:
        index: (rows, columns) node index of every corner, -1 in the park.
    """
    rows, columns = index.shape
    offset = max(0, columns - rows)
    steps = [((i, i + offset), (i + 1, i + 1 + offset)) for i in range(min(rows, columns) - 1)]
    row, column = 0, columns - 1
    while row + 1 < rows and column - 1 - offset >= row + 1:
        steps.append(((row, column), (row + 1, column - 1)))
        row, column = row + 1, column - 1
    ends = [(int(index[start]), int(index[end])) for start, end in steps]
    return [link for a, b in ends if a >= 0 and b >= 0 for link in ((a, b), (b, a))]


def _reaches(successors: list[set[int]], start: int, goal: int) -> bool:
    """Whether a path leads from start to goal (breadth first: in a city the detour around a closed
    block is short)."""
    seen, frontier = {start}, {start}
    while frontier:
        frontier = {b for a in frontier for b in successors[a]} - seen
        if goal in frontier:
            return True
        seen |= frontier
    return False
