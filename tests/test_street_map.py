"""Reconstruction of a model's map, on a street plan small enough to know every answer, its record
and its picture."""

import json
import sys

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from nextlat.errors import NextLatError
from nextlat.report.maps import INVENTED, UNUSED, USED, draw_map, draw_maps, positions
from nextlat.tasks.streets.map import map_record, read_map_record, reconstruct
from nextlat.tasks.streets.network import StreetNetwork
from nextlat.tasks.streets.sources import generate_city

N, NE, E, SE, S, SW, W, NW = range(8)
STEP = 0.001  # degrees: about 0.07 miles


def grid(rows: int = 3, columns: int = 4) -> StreetNetwork:
    """Two-way streets; node row * columns + column, row 0 in the south."""
    node = np.arange(rows * columns)
    row, column = node // columns, node % columns
    targets = np.full((len(node), 8), -1)
    for direction, dr, dc in ((N, 1, 0), (E, 0, 1), (S, -1, 0), (W, 0, -1)):
        inside = (row + dr >= 0) & (row + dr < rows) & (column + dc >= 0) & (column + dc < columns)
        targets[inside, direction] = (node + dr * columns + dc)[inside]
    return StreetNetwork(tuple(map(str, node)), STEP * row, STEP * column, targets)


def test_legal_rides_need_no_new_street():
    city = grid()
    found = reconstruct(city, [(0, 2, [E, E]), (2, 0, [N, W, S, W]), (0, 1, [E])])
    assert found.invented == []
    assert {tuple(s) for s in found.used.tolist()} == {
        (0, E, 1),
        (1, E, 2),
        (2, N, 6),
        (6, W, 5),
        (5, S, 1),
        (1, W, 0),
    }
    assert found.counts() == {
        "invented": 0,
        "true_used": 6,
        "true_unused": 34 - 6,
        "explained": 3,
        "astray": 0,
        "failed": 0,
        "unclosed": 0,
    }


def test_an_impossible_move_becomes_a_street_to_where_the_rest_can_be_followed_the_longest():
    """From 0 to the west, then N E E: that can be driven from rows 0 and 1 of columns 0 and 1, of
    which 0 is the start itself.

    From 1: N E E ends at 7; from 4: ends at 10; from 5: ends at 11. All follow three moves, so the
    destination decides.
    """
    city = grid()
    for destination, through in ((7, 1), (10, 4), (11, 5)):
        found = reconstruct(city, [(0, destination, [W, N, E, E])])
        assert found.invented == [(0, W, through)]
        assert (found.explained, len(found.used)) == (1, 3)


def test_following_longer_beats_being_near():
    """N N can be followed twice only from row 0: 1 is near; E E E only from column 0: the far node
    8 is chosen for 11."""
    city = grid()
    assert reconstruct(city, [(0, 11, [W, E, E, E])]).invented == [(0, W, 8)]


def test_equally_good_nodes_are_chosen_by_arrival_then_distance_then_order():
    city = grid()
    assert reconstruct(city, [(0, 6, [W, N, E])]).invented == [
        (0, W, 1)
    ]  # N E can be driven from six nodes, 1 leads to 6
    assert reconstruct(city, [(0, 9, [NW])]).invented == [
        (0, NW, 9)
    ]  # nothing left to drive: the destination itself
    aside = reconstruct(
        city, [(11, 0, [N])], max_miles=0.16
    )  # the destination is out of reach: a neighbour, not 3 or 5
    assert [(a, direction) for a, direction, _ in aside.invented] == [(11, N)]
    assert aside.invented[0][2] in (7, 10)
    # No way ends at 5, but W W W can be driven from the last column, of which 3 is nearest; the
    # neighbours follow less.
    assert reconstruct(city, [(1, 5, [S, W, W, W])]).invented == [(1, S, 3)]


def test_invented_streets_serve_later_rides():
    city = grid()
    ride = (0, 2, [W, E])
    found = reconstruct(city, [ride, ride, (4, 3, [S, W, E, E])])
    assert found.invented == [(0, W, 1)]
    assert found.explained == 3


def test_the_length_of_an_invented_street_is_bounded():
    city = grid()
    far, miles = (0, 11, [W]), float(city.miles(0, 11))
    assert 0.2 < miles < 0.3  # 3 columns and 2 rows of 0.07 miles
    assert reconstruct(city, [far], max_miles=miles * 1.001).invented == [(0, W, 11)]
    assert reconstruct(city, [far], max_miles=miles * 0.999).explained == 0
    assert reconstruct(city, [far], max_miles=0.01).failed == 1


def test_the_degree_counts_true_and_invented_streets():
    city = grid()
    assert reconstruct(city, [(5, 6, [NE])]).failed == 1  # 5 has four streets
    rides = [(0, 1, [S]), (0, 1, [W]), (0, 1, [NE])]  # 0 has two
    found = reconstruct(city, rides)
    assert (found.explained, found.failed, len(found.invented)) == (2, 1, 2)
    assert reconstruct(city, rides, max_degree=5).explained == 3
    assert reconstruct(city, rides, max_degree=2).failed == 3


def test_what_a_failed_ride_added_is_taken_back():
    """The corner 0 gets a street to the west; then NE at 5, which has four streets, fails: nothing
    stays, W is free again."""
    city = grid()
    failing = (0, 9, [W, N, NE])
    first = reconstruct(city, [(0, 5, [W, N])])
    assert first.invented == [(0, W, 1)]
    found = reconstruct(city, [failing], max_miles=0.08)
    assert found.failed == 1
    assert (found.invented, len(found.used), found.true_unused) == ([], 0, 34)
    found = reconstruct(city, [failing, (0, 8, [W, N])], max_miles=0.08)
    assert found.invented == [(0, W, 4)]


def test_rides_gone_astray_keep_their_streets_and_unclosed_ones_have_none():
    found = reconstruct(grid(), [(0, 2, [E]), (0, 2, None), (0, 2, []), (0, 8, [W, E, E])])
    assert [street[:2] for street in found.invented] == [
        (0, W)
    ]  # to 1, 4, ...: none leads east and yet to 8
    assert found.counts() == {
        "invented": 1,
        "true_used": 3,
        "true_unused": 31,
        "explained": 0,
        "astray": 3,
        "failed": 0,
        "unclosed": 1,
    }
    assert found.rides == 4


def test_a_ride_that_was_cut_may_be_anywhere_at_the_end():
    found = reconstruct(grid(), [(0, None, [E]), (0, None, [W, E, E]), (0, 11, [E])])
    assert (found.explained, found.astray) == (2, 1)
    [(start, direction, end)] = found.invented
    assert (start, direction) == (0, W)
    assert end in (1, 4)  # the nearest from which two moves east can be made


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 11), st.integers(0, 11), st.lists(st.integers(0, 7), max_size=6)),
        max_size=12,
    )
)
def test_the_map_keeps_its_constraints_and_explains_its_rides(rides):
    city, most, degree = grid(), 0.16, 5
    found = reconstruct(city, rides, max_miles=most, max_degree=degree)
    again = reconstruct(city, rides, max_miles=most, max_degree=degree)
    assert found.counts() == again.counts()
    assert found.invented == again.invented
    assert found.explained + found.failed + found.astray == len(rides)
    streets = city.targets.copy()
    for a, direction, b in found.invented:
        assert streets[a, direction] == -1  # one street per direction
        assert a != b
        assert city.miles(a, b) <= most
        streets[a, direction] = b
    assert ((streets >= 0).sum(axis=1) <= np.maximum(degree, city.out_degree)).all()
    assert all(city.targets[a, direction] == b for a, direction, b in found.used.tolist())
    assert len(found.used) + found.true_unused == len(city.edges)
    arrived = 0
    for source, destination, moves in rides:
        here = source
        for direction in moves:
            here = streets[here, direction] if here >= 0 else -1
        arrived += here == destination
    assert (
        arrived >= found.explained
    )  # a later invention may explain an earlier failure, never the other way round


# --- the record -----------------------------------------------------------------------------------


def test_a_record_gives_back_network_and_map():
    city = grid()
    found = reconstruct(city, [(0, 2, [W, E]), (0, 11, [N, E]), (1, 1, None)])
    network, again = read_map_record(json.loads(json.dumps(map_record(city, found))))
    assert network.fingerprint() == city.fingerprint()
    assert again.invented == found.invented
    np.testing.assert_array_equal(again.used, found.used)
    assert again.counts() == found.counts()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("network",), None, "'network' must be a table"),
        (("network", "targets"), [[0]] * 12, "targets has shape"),
        (("network", "targets", 0, 0), 12, "targets must lie"),
        (("network", "latitude", 0), "north", "latitude.*valid number"),
        (("used",), [[0, W, 3]], "not every street in 'used'"),
        (("used",), [[0, -1, 3]], "greater than or equal to 0"),
        (("invented",), [[0, W, 12]], "out of bounds"),
        (("invented",), [[0, 8, 1]], "out of bounds"),
        (("invented",), [], "'counts' contradicts"),
        (("counts", "explained"), 10**400, "counts"),
        (("counts", "rides"), 1, "unexpected keyword argument 'rides'"),
        (("counts",), {}, "missing"),
    ],
)
def test_a_damaged_record_is_refused_in_one_sentence(path, value, message):
    city = grid()
    record = map_record(city, reconstruct(city, [(0, 2, [W, E])]))
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(NextLatError, match=message) as caught:
        read_map_record(record, "run/map.json is corrupt")
    assert str(caught.value).startswith("run/map.json is corrupt")
    assert "\n" not in str(caught.value)


# --- the picture ----------------------------------------------------------------------------------


def lines_of(ax) -> dict[str, list[np.ndarray]]:
    """Colour -> the polylines drawn in it."""
    found: dict[str, list[np.ndarray]] = {}
    for collection in ax.collections:
        if isinstance(collection, LineCollection):
            found.setdefault(to_hex(collection.get_colors()[0]), []).extend(
                collection.get_segments()
            )
    return found


def test_each_street_is_drawn_once_in_its_colour_and_place():
    city = grid()
    ax = Figure().add_subplot()
    draw_map(ax, city, reconstruct(city, [(0, 2, [E, E]), (0, 2, [W, E])]))
    found, xy = lines_of(ax), positions(city)
    assert {color: len(found[color]) for color in (USED, UNUSED, INVENTED)} == {
        USED: 2,
        UNUSED: 32,
        INVENTED: 1,
    }
    ends = {tuple(np.round(line, 9).ravel()) for line in found[USED]}
    assert ends == {tuple(np.round(xy[[a, b]], 9).ravel()) for a, b in ((0, 1), (1, 2))}


@pytest.mark.parametrize("direction", range(8))
def test_an_invented_street_leaves_in_its_own_direction(direction):
    """Whatever the true place of its end: here east of the start."""
    city = grid(1, 3)
    ax = Figure().add_subplot()
    draw_map(
        ax, city, reconstruct(city, [(0, 2, [direction])] if direction != E else [(2, 0, [E])])
    )
    (curve,) = lines_of(ax)[INVENTED]
    heading = np.degrees(np.arctan2(*(curve[1] - curve[0]))) % 360
    assert abs((heading - 45 * direction + 180) % 360 - 180) < 15
    xy = positions(city)
    np.testing.assert_allclose(
        curve[[0, -1]], xy[[0, 2]] if direction != E else xy[[2, 0]], atol=1e-9
    )


def test_the_map_is_to_scale_on_the_globe():
    """At 60 degrees north a degree of longitude is half as long; distances on paper are those of
    the network."""
    city = grid()
    north = StreetNetwork(city.node_ids, city.latitude + 60, city.longitude, city.targets)
    xy = positions(north)
    for a, b in ((0, 3), (0, 8), (0, 11)):
        assert np.hypot(*(xy[a] - xy[b])) == pytest.approx(float(north.miles(a, b)), rel=1e-3)
    ax = Figure().add_subplot()
    draw_map(ax, north, reconstruct(north, []))
    assert ax.get_aspect() == 1


def test_maps_side_by_side_as_a_png(tmp_path):
    city = generate_city(rows=6, columns=6, seed=0)
    clean, dirty = reconstruct(city, []), reconstruct(grid(), [(0, 2, [W, E])])
    before = "matplotlib.pyplot" in sys.modules
    one = draw_maps(tmp_path / "one.png", {"true": (city, clean)}, dpi=60)
    two = draw_maps(
        tmp_path / "two.png", {"true": (city, clean), "invented": (grid(), dirty)}, dpi=60
    )
    assert ("matplotlib.pyplot" in sys.modules) == before  # no global figure, no window
    single, double = (matplotlib.image.imread(path)[..., :3] for path in (one, two))
    assert double.shape[::2] == single.shape[::2]
    assert abs(double.shape[1] - 2 * single.shape[1]) <= 1  # whole pixels
    reddish = (double[..., 0] > 0.7) & (double[..., 1:] < 0.3).all(axis=-1)
    panel = slice(int(0.3 * len(double)), int(0.9 * len(double)))
    assert not reddish[panel, : single.shape[1]].any()
    assert reddish[panel, single.shape[1] :].any()
    four = matplotlib.image.imread(
        draw_maps(tmp_path / "four.png", dict.fromkeys("abcd", (city, clean)), dpi=60)
    )
    assert four.shape[1] == double.shape[1]  # two rows under one legend
    assert single.shape[0] < four.shape[0] < 2 * single.shape[0]
    few = dict.fromkeys(("model\n24 moves", "model\n48 moves"), (city, clean))
    grid_of_one = matplotlib.image.imread(draw_maps(tmp_path / "grid.png", few, columns=1, dpi=60))
    assert grid_of_one.shape[0] > 1.5 * grid_of_one.shape[1]  # below one another
    assert grid_of_one.shape[1] < single.shape[1]


def test_pictures_refuse_what_they_cannot_do(tmp_path):
    city = grid()
    with pytest.raises(NextLatError, match="no map"):
        draw_maps(tmp_path / "map.png", {})
    with pytest.raises(NextLatError, match="cannot write"):
        draw_maps(tmp_path / "missing" / "map.png", {"city": (city, reconstruct(city, []))}, dpi=30)
