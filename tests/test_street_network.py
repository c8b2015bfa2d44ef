"""The street network: generated, read, downloaded, cut; directions, distances, shortest paths and
held-out pairs."""

import csv
import itertools
import sys
from collections import Counter
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nextlat.errors import NextLatError
from nextlat.tasks.streets import network as module
from nextlat.tasks.streets.network import (
    DIRECTIONS,
    StreetNetwork,
    compass_direction,
    held_out_pairs,
)
from nextlat.tasks.streets.sources import download_place, generate_city, link_network, read_csv


def true_direction(network: StreetNetwork, a: int, b: int) -> str:
    """Direction by plane geometry, independent of the great-circle formula; good to a fraction of a
    degree in a city."""
    east = (network.longitude[b] - network.longitude[a]) * np.cos(np.radians(network.latitude[a]))
    north = network.latitude[b] - network.latitude[a]
    return DIRECTIONS[round(np.degrees(np.arctan2(east, north)) / 45.0) % 8]


def graph(network: StreetNetwork) -> nx.MultiDiGraph:
    """An independent view of the streets."""
    found = nx.MultiDiGraph()
    found.add_nodes_from(range(len(network)))
    found.add_edges_from((a, b) for a, _, b in network.edges.tolist())
    return found


def network_of(targets: list[list[int]]) -> StreetNetwork:
    """Intersections on a line, with these targets for N, NE, ... (missing ones -1)."""
    n = len(targets)
    full = np.array([row + [-1] * (8 - len(row)) for row in targets])
    names = tuple(f"x{i}" for i in range(n))
    return StreetNetwork(names, np.linspace(40.0, 40.1, n), np.full(n, -74.0), full)


RING = [[(i + 1) % 8] for i in range(8)]

# --- the generated city ---------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(4, 14),
    columns=st.integers(4, 14),
    seed=st.integers(0, 2**32),
    one_way=st.floats(0, 1),
    missing=st.floats(0, 0.5),
)
def test_every_city_is_connected_and_truly_labelled(rows, columns, seed, one_way, missing):
    city = generate_city(rows, columns, seed, one_way, missing)
    assert nx.is_strongly_connected(graph(city))
    assert city.node_ids == tuple(str(i) for i in range(len(city)))
    assert len(city) >= 0.8 * rows * columns
    for a, d, b in city.edges.tolist():
        assert a != b
        assert DIRECTIONS[d] == true_direction(city, a, b)
    # The diagonals are the rarest: no two links of a node may have shared a direction.
    assert set(city.edges[:, 1].tolist()) == set(range(8))


@pytest.mark.parametrize(("rows", "columns"), [(5, 5), (40, 40), (5, 40), (40, 5)])
def test_extreme_sizes(rows, columns):
    city = generate_city(rows, columns, seed=3)
    assert nx.is_strongly_connected(graph(city))
    assert set(city.edges[:, 1].tolist()) == set(range(8))
    plain = generate_city(rows, columns, one_way=0, missing=0, diagonal=False, park=False)
    assert len(plain) == rows * columns
    assert len(plain.edges) == 2 * (rows * (columns - 1) + columns * (rows - 1))
    assert set(plain.edges[:, 1].tolist()) == {0, 2, 4, 6}


def test_shares_of_closed_blocks_and_of_one_way_streets():
    def pairs(**options: float) -> set[tuple[int, int]]:
        city = generate_city(12, 12, seed=5, diagonal=False, park=False, **options)
        return {(a, b) for a, _, b in city.edges.tolist()}

    blocks = 2 * 12 * 11
    assert len(pairs(one_way=0, missing=0.25)) == 2 * (blocks - blocks // 4)
    one_way = pairs(one_way=0.5, missing=0)
    alone = [(a, b) for a, b in one_way if (b, a) not in one_way]
    # Half of the ten inner lines, each way; the outermost are two-way.
    assert len(alone) == 2 * 5 * 11
    rows = {a // 12: b - a for a, b in alone if abs(a - b) == 1}
    assert sorted(rows.values()) in ([-1, -1, 1, 1, 1], [-1, -1, -1, 1, 1])
    by_row = [rows[row] for row in sorted(rows)]
    assert all(x == -y for x, y in itertools.pairwise(by_row))  # alternating


def test_the_park_has_no_streets_inside():
    with_park, without = (generate_city(20, 20, missing=0, park=park) for park in (True, False))
    assert len(without) - len(with_park) == 6 * 5
    lost = np.flatnonzero(~np.isin(without.latitude, with_park.latitude))
    west, east = without.longitude[lost].min(), without.longitude[lost].max()
    south, north = without.latitude[lost].min(), without.latitude[lost].max()
    assert with_park.latitude.min() < south < north < with_park.latitude.max()
    assert with_park.longitude.min() < west < east < with_park.longitude.max()


def test_a_seed_always_gives_the_same_city():
    assert generate_city(seed=1).fingerprint() == generate_city(seed=1).fingerprint()
    assert generate_city(seed=1).fingerprint() != generate_city(seed=2).fingerprint()
    # Saved runs hold fingerprints: a change here means that they no longer match their city.
    assert generate_city().fingerprint() == "d42e4f115db37213"


# --- geometry and paths ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        (0, "N"),
        (22.4, "N"),
        (22.6, "NE"),
        (67.4, "NE"),
        (67.6, "E"),
        (90, "E"),
        (135, "SE"),
        (180, "S"),
        (202.6, "SW"),
        (270, "W"),
        (315, "NW"),
        (337.4, "NW"),
        (337.6, "N"),
        (359.9, "N"),
    ],
)
def test_sectors_of_45_degrees_around_each_compass_point(degrees, expected):
    angle, lat = np.radians(degrees), 40.75
    north, east = 1e-4 * np.cos(angle), 1e-4 * np.sin(angle) / np.cos(np.radians(lat))
    assert DIRECTIONS[int(compass_direction(lat, -74.0, lat + north, -74.0 + east))] == expected


def test_miles_are_great_circle_miles():
    points = StreetNetwork(
        ("equator", "north", "pole", "east"),
        [0.0, 1.0, 90.0, 60.0],
        [0.0, 0.0, 17.0, 0.0],
        np.full((4, 8), -1),
    )
    quarter = np.pi / 2 * 3958.7613
    assert points.miles(0, 2) == pytest.approx(quarter)
    assert points.miles(0, 1) == pytest.approx(quarter / 90)
    assert points.miles(np.array([0, 3]), np.array([0, 2])) == pytest.approx([0.0, quarter / 3])


@settings(deadline=None)
@given(data=st.data(), n=st.integers(1, 12))
def test_hops_are_those_of_a_breadth_first_search(data, n):
    """Parallel streets, loops and parts that cannot be reached among them."""
    row = st.lists(st.integers(-1, n - 1), max_size=3)
    network = network_of(data.draw(st.lists(row, min_size=n, max_size=n)))
    destinations = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=150))
    reverse = graph(network).reverse()
    expected = np.full((len(destinations), n), -1)
    for row, destination in enumerate(destinations):
        for node, hops in nx.single_source_shortest_path_length(reverse, destination).items():
            expected[row, node] = hops
    np.testing.assert_array_equal(network.hops_to(np.array(destinations)), expected)


def test_degrees_legal_moves_and_edges_agree_with_the_targets():
    network = network_of([[-1, 1, 0], [2], [-1] * 8])
    assert network.out_degree.tolist() == [2, 1, 0]
    assert network.legal_moves.tolist() == [[1, 2], [0, -1], [-1, -1]]
    assert network.edges.tolist() == [[0, 1, 1], [0, 2, 0], [1, 0, 2]]


def test_a_network_cannot_be_changed_nor_be_inconsistent():
    city = generate_city(5, 5)
    with pytest.raises(ValueError, match="read-only"):
        city.targets[0, 0] = 3
    with pytest.raises(ValueError, match="targets"):
        network_of([[1]])
    with pytest.raises(ValueError, match="distinct"):
        StreetNetwork(("a", "a"), [0.0, 0.0], [0.0, 0.0], np.full((2, 8), -1))
    with pytest.raises(ValueError, match="shape"):
        StreetNetwork(("a", "b"), [0.0], [0.0, 0.0], np.full((2, 8), -1))


def test_the_fingerprint_sees_every_part():
    base = dict(
        node_ids=("a", "b"), latitude=[0.0, 1.0], longitude=[0.0, 1.0], targets=np.full((2, 8), -1)
    )
    other = np.full((2, 8), -1)
    other[1, 5] = 0
    variants = [
        {},
        {"node_ids": ("a", "c")},
        {"latitude": [0.0, 2.0]},
        {"longitude": [0.5, 1.0]},
        {"targets": other},
    ]
    prints = {StreetNetwork(**{**base, **variant}).fingerprint() for variant in variants}
    assert len(prints) == len(variants)


# --- parts ----------------------------------------------------------------------------------------


def test_the_largest_strongly_connected_part():
    # 0 -> 1 <-> 2 -> 3 -> 4 -> 5 -> 3, and 5 -> 6, a dead end.
    network = network_of([[1], [2], [1, 3], [4], [5], [3, 6], []])
    part = network.strongly_connected()
    assert part.node_ids == ("x3", "x4", "x5")
    assert part.edges.tolist() == [[0, 0, 1], [1, 0, 2], [2, 0, 0]]
    np.testing.assert_array_equal(part.latitude, network.latitude[3:6])
    # Of equally large parts, the one with the first intersection: 1 <-> 3, not 2 <-> 4.
    assert network_of([[1], [3], [4], [1], [2]]).strongly_connected().node_ids == ("x1", "x3")


def test_a_box_keeps_what_is_inside_and_connected():
    city = generate_city(12, 12, seed=2)
    south, north = city.latitude.min(), float(np.median(city.latitude))
    west, east = city.longitude.min(), float(np.median(city.longitude))
    district = city.within(south, west, north, east)
    assert 10 < len(district) < len(city) / 2
    assert nx.is_strongly_connected(graph(district))
    assert (district.latitude <= north).all()
    assert (district.longitude <= east).all()
    for a, d, b in district.edges.tolist():
        old = city.node_ids.index(district.node_ids[a])
        assert city.node_ids[city.targets[old, d]] == district.node_ids[b]


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ((40.8, -74, 40.7, -73), "south < north"),
        ((40, -73, 41, -74), "south < north"),
        ((float("nan"), -75, 41, -73), "south < north"),
        ((10, 10, 11, 11), "holds 0 intersections"),
    ],
)
def test_boxes_without_streets_are_refused(box, message):
    with pytest.raises(NextLatError, match=message):
        generate_city(5, 5).within(*box)


# --- held-out pairs -------------------------------------------------------------------------------


@pytest.fixture(params=["listed", "sampled"])
def listed(request, monkeypatch) -> bool:
    """Both ways to hold out pairs: with and without a list of all."""
    if request.param == "sampled":
        monkeypatch.setattr(module, "MAX_LISTED_PAIRS", 0)
    return request.param == "listed"


def test_held_out_pairs_are_distinct_near_and_few(listed):
    city = generate_city(6, 6, seed=1)
    pairs = held_out_pairs(city, 90, max_hops=4, seed=3)
    hops = city.hops_to(np.arange(len(city)))
    limit = int(((hops > 0) & (hops <= 4)).sum()) // 10
    assert len(pairs) == min(90, limit) if listed else 0.5 * limit < len(pairs) <= 90
    assert len(set(zip(pairs.source, pairs.destination, strict=True))) == len(pairs)
    between = hops[pairs.destination, pairs.source]
    assert (between.min(), between.max()) == (1, 4)
    again, other = (held_out_pairs(city, 90, max_hops=4, seed=seed) for seed in (3, 4))
    np.testing.assert_array_equal(pairs.source, again.source)
    assert pairs.source.tolist() != other.source.tolist()


@pytest.mark.usefixtures("listed")
def test_held_out_pairs_are_uniform():
    """Every eligible pair is held out equally often, so that no distance is favoured."""
    ring, counts = network_of(RING), Counter()
    for seed in range(400):
        pairs = held_out_pairs(ring, 5, seed=seed, max_hops=6, max_share=0.5)
        counts.update(((pairs.destination - pairs.source) % 8).tolist())
    assert set(counts) == set(range(1, 7))
    assert max(abs(count - 2000 / 6) for count in counts.values()) < 5 * np.sqrt(2000 / 6)


@pytest.mark.usefixtures("listed")
def test_a_city_too_small_to_hold_out_pairs():
    with pytest.raises(NextLatError, match="no pair of intersections"):
        held_out_pairs(network_of([[1], [0]]), 10)


# --- files ----------------------------------------------------------------------------------------

NODES = "id,lat,lon\na,40.1,-73.9\nb,40.2,-73.9\n"
EDGES = "source,direction,target\na,N,b\nb,S,a\n"


def read(tmp_path: Path, nodes: str | bytes = NODES, edges: str | bytes = EDGES) -> StreetNetwork:
    for name, content in (("nodes.csv", nodes), ("edges.csv", edges)):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_csv(tmp_path)


def test_csv_in_other_people_s_habits(tmp_path):
    """Windows line ends, a byte-order mark, blank lines, other column orders, further columns."""
    network = read(
        tmp_path,
        "\ufeffname, lon ,id,lat\r\nfirst,-73.9,a,40.1\r\n\r\nsecond,-73.9,b,40.2\r\n",
        "source,direction,target,length_m\na,N,b,1.5\n\nb,S,a,\nb,N,b,0\n",
    )
    assert network.node_ids == ("a", "b")
    assert network.latitude.tolist() == [40.1, 40.2]
    assert network.edges.tolist() == [[0, 0, 1], [1, 0, 1], [1, 4, 0]]  # a loop is kept


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"edges": EDGES + "a,E,zzz\n"},
            r"edges\.csv, line 4: the intersection 'zzz' is not in .*nodes\.csv",
        ),
        ({"edges": EDGES + "zzz,E,a\n"}, r"edges\.csv, line 4: the intersection 'zzz'"),
        (
            {"edges": EDGES + "a,up,b\n"},
            r"edges\.csv, line 4: 'up' is no direction: use one of N NE E SE S SW W NW",
        ),
        ({"edges": EDGES + "a,n,b\n"}, r"line 4: 'n' is no direction"),
        ({"edges": EDGES + "\na,N,a\n"}, r"edges\.csv, line 5: a second street leads N from 'a'"),
        ({"edges": EDGES + "a,N\n"}, r"edges\.csv, line 4: 2 values where the header names 3"),
        ({"edges": "from,direction,target\na,N,b\n"}, r"edges\.csv, line 1: .* lacks source"),
        ({"edges": ""}, r"edges\.csv, line 1: the header lacks source, direction, target"),
        ({"nodes": "id,lat\na,40.1\n"}, r"nodes\.csv, line 1: the header lacks lon"),
        ({"nodes": NODES + "c,4O.1,-73.9\n"}, r"nodes\.csv, line 4: lat = '4O\.1' is no number"),
        (
            {"nodes": NODES + "c,40.1,-190\n"},
            r"nodes\.csv, line 4: lon = '-190' is no number of degrees from -180",
        ),
        ({"nodes": NODES + "c,nan,-73\n"}, r"nodes\.csv, line 4: lat = 'nan'"),
        (
            {"nodes": NODES + "a,40.1,-73.9\n"},
            r"nodes\.csv, line 4: the intersection 'a' is listed a second time",
        ),
        ({"nodes": NODES + "end,40.1,-73.9\n"}, r"nodes\.csv, line 4: 'end' cannot name"),
        ({"nodes": NODES + "NW,40.1,-73.9\n"}, r"line 4: 'NW' cannot name"),
        ({"nodes": NODES + "5th Avenue,40.1,-73.9\n"}, r"line 4: '5th Avenue' cannot name"),
        ({"nodes": NODES + ",40.1,-73.9\n"}, r"line 4: '' cannot name"),
        ({"nodes": "id,lat,lon\n"}, r"nodes\.csv lists no intersection"),
        ({"nodes": b"id,lat,lon\n\xff\xfe,1,2\n"}, r"nodes\.csv is no CSV text in UTF-8"),
        ({"nodes": 'id,lat,lon\n"a,1,2\n'}, r"nodes\.csv is no CSV text"),
    ],
)
def test_faults_in_csv_files_are_told_with_file_and_line(tmp_path, files, message):
    with pytest.raises(NextLatError, match=message) as caught:
        read(tmp_path, **files)
    assert "\n" not in str(caught.value)


def test_missing_files_are_told(tmp_path):
    with pytest.raises(NextLatError, match="no directory"):
        read_csv(tmp_path / "nowhere")
    with pytest.raises(NextLatError, match=r"cannot read .*nodes\.csv"):
        read_csv(tmp_path)


def test_manhattan(data_dir):
    manhattan = read_csv(data_dir / "manhattan")
    assert len(manhattan) == 4579
    assert len(manhattan.edges) == 9705
    assert (manhattan.out_degree == 0).sum() == 17
    assert (manhattan.edges[:, 0] == manhattan.edges[:, 2]).sum() == 6
    a, d, b = manhattan.edges[manhattan.edges[:, 0] != manhattan.edges[:, 2]].T
    lat, lon = manhattan.latitude, manhattan.longitude
    assert (compass_direction(lat[a], lon[a], lat[b], lon[b]) == d).mean() > 0.999
    walkable = manhattan.strongly_connected()
    assert len(walkable) > 0.97 * len(manhattan)
    assert walkable.out_degree.min() >= 1
    with (data_dir / "manhattan" / "edges_length.csv").open() as file:
        metres = {
            (row["source"], row["direction"]): float(row["length_m"])
            for row in csv.DictReader(file)
        }
    ids = manhattan.node_ids
    street = [metres[ids[x], DIRECTIONS[y]] for x, y in zip(a.tolist(), d.tolist(), strict=True)]
    straight = manhattan.miles(a, b) * 1609.344
    # A street is as long as the straight line, or longer.
    assert np.median(straight / np.array(street)) == pytest.approx(1.0, abs=0.01)
    village = manhattan.within(40.725, -74.01, 40.74, -73.99)
    assert 100 < len(village) < 500
    assert nx.is_strongly_connected(graph(village))


# --- OpenStreetMap --------------------------------------------------------------------------------


def osm_graph() -> nx.MultiDiGraph:
    """In the form of osmnx: a square with a loop, parallel streets, two streets in one direction,
    and a dead end."""
    found = nx.MultiDiGraph(crs="epsg:4326")
    for node, (lat, lon) in {
        30: (40.0, -74.0),
        10: (40.001, -74.0),
        20: (40.001, -73.999),
        50: (40.002, -74.0),
        40: (39.9, -74),
    }.items():
        found.add_node(node, y=lat, x=lon, street_count=3)
    for a, b, length in (
        (30, 10, 111.0),
        (10, 20, 85.0),
        (20, 30, 140.0),
        (30, 50, 222.0),
        (50, 10, 111.0),
        (30, 10, 500.0),
        (10, 10, 60.0),
        (30, 40, 9000.0),
    ):
        found.add_edge(a, b, osmid=1, length=length, oneway=True)
    return found


def test_a_place_from_openstreetmap(monkeypatch, tmp_path):
    osmnx = pytest.importorskip("osmnx")
    seen = {}

    def graph_from_place(place: str, network_type: str) -> nx.MultiDiGraph:
        seen.update(place=place, network_type=network_type, cache=osmnx.settings.cache_folder)
        return osm_graph()

    monkeypatch.setattr(osmnx, "graph_from_place", graph_from_place)
    before = osmnx.settings.cache_folder
    place = "Piedmont, California, USA"
    network = download_place(place, cache=tmp_path)
    assert seen == {"place": place, "network_type": "drive", "cache": str(tmp_path)}
    assert osmnx.settings.cache_folder == before
    # The dead end 40 is cut off; 50 too, for the longer of the two streets north from 30 leads
    # there and is dropped.
    assert network.node_ids == ("10", "20", "30")
    ids = network.node_ids
    streets = {(ids[a], DIRECTIONS[d], ids[b]) for a, d, b in network.edges.tolist()}
    assert streets == {("30", "N", "10"), ("10", "E", "20"), ("20", "SW", "30")}


def test_of_two_streets_in_one_direction_the_shorter_stays():
    latitude, longitude = np.array([40.0, 40.001, 40.002]), np.full(3, -74.0)
    by_distance = link_network("abc", latitude, longitude, [(0, 2), (0, 1)])
    assert by_distance.edges.tolist() == [[0, 0, 1]]
    by_length = link_network("abc", latitude, longitude, [(0, 1), (0, 2)], [300.0, 250.0])
    assert by_length.edges.tolist() == [[0, 0, 2]]


def test_places_that_cannot_be_had(monkeypatch, tmp_path):
    osmnx = pytest.importorskip("osmnx")
    import requests
    from osmnx import _errors

    for error, message in (
        (
            _errors.InsufficientResponseError("Nominatim geocoder returned 0 results"),
            "knows no area with streets called 'Atlantis'",
        ),
        (
            TypeError("Nominatim did not geocode query to a geometry of type (Multi)Polygon."),
            "knows no area",
        ),
        (ValueError("Found no graph nodes within the requested polygon."), "knows no area"),
        (
            requests.exceptions.ConnectionError("name resolution"),
            "cannot be reached .*ConnectionError.* connection",
        ),
        (requests.exceptions.JSONDecodeError("x", "y", 0), "cannot be reached"),
        (_errors.ResponseStatusCodeError("504 Gateway Timeout"), "cannot be reached"),
        (
            PermissionError(13, "Permission denied"),
            "Permission denied.*give another cache directory",
        ),
    ):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(osmnx, "graph_from_place", fail)
        with pytest.raises(NextLatError, match=message) as caught:
            download_place("Atlantis", cache=tmp_path)
        assert "\n" not in str(caught.value)

    lonely = nx.MultiDiGraph()
    lonely.add_node(1, x=0.0, y=0.0)
    monkeypatch.setattr(osmnx, "graph_from_place", lambda *_, **__: lonely)
    with pytest.raises(NextLatError, match="do not connect two intersections"):
        download_place("Atlantis", cache=tmp_path)


def test_without_osmnx_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "osmnx", None)
    with pytest.raises(NextLatError, match=r"pip install 'nextlat\[osm\]'"):
        download_place("Piedmont, California, USA")
