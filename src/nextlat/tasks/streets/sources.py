"""Street networks from files and from OpenStreetMap: plain pieces, which `StreetNetwork` puts
together.

CSV files: `nodes.csv` with the columns id, lat, lon (degrees) and `edges.csv` with source, direction, target; other columns
are ignored.  This is the form in which the network of Vafa et al. (arXiv 2406.03689) can be had.
"""

import csv
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nextlat.errors import NextLatError
from nextlat.tasks.streets.compass import DIRECTIONS

RESERVED = {"<pad>", "<unk>", "end", *DIRECTIONS}  # the other tokens of the street task


def read_csv(
    directory_or_nodes: str | Path, edges: str | Path | None = None
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, np.ndarray]:
    """Reads a network from a directory with `nodes.csv` and `edges.csv`, or from two files.

    Streets are taken as they are written: a direction is not compared with the bearing (in the
    Manhattan of Vafa et al. seven of 9,705 differ), loops and dead ends are kept.

    Returns:
        Names, latitude (N,), longitude (N,), targets (N, 8).

    Raises:
        NextLatError: with file and line: a missing file or column, a bad number, an unknown node or
            direction, a second street with the same source and direction, a name that cannot be a
            token.
    """
    nodes_path = Path(directory_or_nodes)
    if edges is None:
        if not nodes_path.is_dir():
            raise NextLatError(
                f"{nodes_path} is no directory: give one that holds nodes.csv and edges.csv, or give both files"
            )
        nodes_path, edges_path = nodes_path / "nodes.csv", nodes_path / "edges.csv"
    else:
        edges_path = Path(edges)
    index: dict[str, int] = {}
    coordinates: list[tuple[float, float]] = []
    for where, (name, lat, lon) in _rows(nodes_path, ("id", "lat", "lon")):
        if not name or name.split() != [name] or name in RESERVED:
            raise NextLatError(
                f"{where}: {name!r} cannot name an intersection: use a word other than {sorted(RESERVED)}"
            )
        if name in index:
            raise NextLatError(
                f"{where}: the intersection {name!r} is listed a second time: remove one of the two lines"
            )
        index[name] = len(index)
        coordinates.append((_degrees(where, "lat", lat, 90.0), _degrees(where, "lon", lon, 180.0)))
    if not index:
        raise NextLatError(
            f"{nodes_path} lists no intersection: give at least one line id,lat,lon below the header"
        )
    targets = np.full((len(index), len(DIRECTIONS)), -1, dtype=np.int64)
    for where, (source, direction, target) in _rows(edges_path, ("source", "direction", "target")):
        for name in (source, target):
            if name not in index:
                raise NextLatError(
                    f"{where}: the intersection {name!r} is not in {nodes_path}: add it there or remove this line"
                )
        if direction not in DIRECTIONS:
            raise NextLatError(
                f"{where}: {direction!r} is no direction: use one of {' '.join(DIRECTIONS)}"
            )
        cell = index[source], DIRECTIONS.index(direction)
        if targets[cell] >= 0:
            raise NextLatError(
                f"{where}: a second street leads {direction} from {source!r}: keep one per direction"
            )
        targets[cell] = index[target]
    latitude, longitude = np.array(coordinates, dtype=np.float64).T
    return tuple(index), latitude, longitude, targets


def write_csv(
    directory: str | Path,
    node_ids: tuple[str, ...],
    latitude: np.ndarray,
    longitude: np.ndarray,
    edges: np.ndarray,
) -> None:
    """Writes what `read_csv` reads; coordinates in full precision, `edges` (E, 3) as indices
    (source, direction, target)."""
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "nodes.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("id", "lat", "lon"))
            writer.writerows(zip(node_ids, latitude.tolist(), longitude.tolist(), strict=True))
        with (directory / "edges.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("source", "direction", "target"))
            writer.writerows(
                (node_ids[a], DIRECTIONS[d], node_ids[b]) for a, d, b in edges.tolist()
            )
    except OSError as error:
        raise NextLatError(f"cannot write the network to {directory}: {error.strerror}") from error


def read_place(
    place: str, cache: str | Path | None = None
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Downloads the drivable streets of a place from OpenStreetMap, with `osmnx` (an optional
    dependency).

    Args:
        place: anything that OpenStreetMap's search resolves to an area ("Piedmont, California,
            USA").
        cache: directory in which answers are kept, so that a second call needs no network; by
            default `nextlat/osm` in the user's cache directory.

    Returns:
        Names (OpenStreetMap node numbers), latitude (N,), longitude (N,), links (E, 2), lengths (E,) in metres along the
        street.  Nodes where nothing branches are merged away, as osmnx does by default.

    Raises:
        NextLatError: osmnx is missing, the place is unknown or no area, it has no streets, or
            OpenStreetMap cannot be reached.
    """
    try:
        import osmnx
    except ImportError as error:
        raise NextLatError(
            "downloading streets needs the package osmnx, which is not installed: pip install 'nextlat[osm]', or give CSV files"
        ) from error
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nextlat" / "osm"
    before = osmnx.settings.use_cache, osmnx.settings.cache_folder
    osmnx.settings.use_cache, osmnx.settings.cache_folder = True, str(cache)
    try:
        graph = osmnx.graph_from_place(place, network_type="drive")
    except (OSError, TypeError, ValueError) as error:
        raise NextLatError(_download_failure(place, cache, error)) from error
    finally:
        osmnx.settings.use_cache, osmnx.settings.cache_folder = before
    nodes = sorted(graph.nodes)
    index = {node: i for i, node in enumerate(nodes)}
    latitude = np.array([float(graph.nodes[node]["y"]) for node in nodes])
    longitude = np.array([float(graph.nodes[node]["x"]) for node in nodes])
    streets = sorted(
        (index[a], index[b], float(data["length"])) for a, b, data in graph.edges(data=True)
    )
    links = np.array([(a, b) for a, b, _ in streets], dtype=np.int64).reshape(-1, 2)
    lengths = np.array([length for _, _, length in streets], dtype=np.float64)
    return [str(node) for node in nodes], latitude, longitude, links, lengths


def _download_failure(place: str, cache: str | Path, error: Exception) -> str:
    """What osmnx's exception means to the user."""
    if (
        type(error).__module__.startswith("requests")
        or type(error).__name__ == "ResponseStatusCodeError"
    ):
        return f"OpenStreetMap cannot be reached for {place!r} ({type(error).__name__}): check the connection, or give CSV files"
    if isinstance(error, OSError):
        return f"cannot keep the answers of OpenStreetMap in {cache} ({error.strerror or error}): give another cache directory"
    # "No result" is an InsufficientResponseError (a ValueError); "a point, no area" is a TypeError.
    return (
        f"OpenStreetMap knows no area with streets called {place!r}: "
        "check the spelling, and name it with its country ('Piedmont, California, USA')"
    )


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """Yields ("file, line n", the named columns stripped) for each row that is not blank."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            absent = [name for name in columns if name not in header]
            if absent:
                raise NextLatError(
                    f"{path}, line 1: the header lacks {', '.join(absent)}: begin the file with {','.join(columns)}"
                )
            places = [header.index(name) for name in columns]
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if not any(cell.strip() for cell in row):
                    continue
                if len(row) != len(header):
                    raise NextLatError(
                        f"{where}: {len(row)} values where the header names {len(header)}: complete the line"
                    )
                yield where, [row[place].strip() for place in places]
    except OSError as error:
        raise NextLatError(f"cannot read {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise NextLatError(f"{path} is no CSV text in UTF-8 ({error}): save it as such") from error


def _degrees(where: str, column: str, text: str, bound: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= bound:  # also false for NaN
        raise NextLatError(
            f"{where}: {column} = {text!r} is no number of degrees from -{bound:g} to {bound:g}: correct it"
        )
    return value
