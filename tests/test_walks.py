"""Random walks, packing, the training stream, conditioned walks, the settings and the tokenizer of
the street task."""

import hashlib
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from conftest import tiny_lm
from nextlat import NextTokenConfig, attach
from nextlat.errors import NextLatError
from nextlat.tasks.rows import Stream
from nextlat.tasks.streets import packing, walks
from nextlat.tasks.streets.network import DIRECTIONS, Pairs, StreetNetwork, held_out_pairs
from nextlat.tasks.streets.packing import (
    END,
    FIRST_DIRECTION,
    FIRST_NODE,
    pack,
    ride_stream,
    tokenizer,
)
from nextlat.tasks.streets.rides import prefix_pairs
from nextlat.tasks.streets.sources import generate_city, read_csv
from nextlat.tasks.streets.streets import StreetsConfig
from nextlat.tasks.streets.walks import (
    Walks,
    conditioned_walks,
    random_walks,
    stopping_rides,
)
from nextlat.tasks.task import PAD, UNK

CITY = generate_city(6, 6, seed=1)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def line(targets: list[list[int]]) -> StreetNetwork:
    n = len(targets)
    full = np.array([row + [-1] * (8 - len(row)) for row in targets])
    names = tuple(map(str, range(n)))
    return StreetNetwork(names, np.linspace(40.0, 40.1, n), np.full(n, -74.0), full)


def documents(row: dict[str, torch.Tensor]) -> list[list[int]]:
    """The documents of a packed row, cut where positions restart; what holds of any is checked."""
    tokens, positions, valid = (
        row[name].tolist() for name in ("input_ids", "position_ids", "attention_mask")
    )
    length = sum(valid)
    assert valid == [1] * length + [0] * (len(valid) - length)
    assert all(token == PAD for token in tokens[length:])
    starts = [i for i in range(length) if positions[i] == 0]
    assert starts[:1] == [0][:length]
    found = []
    for start, end in zip(starts, [*starts[1:], length], strict=True):
        assert positions[start:end] == list(range(end - start))
        assert row["labels"][start:end].tolist() == [-100, -100, *tokens[start + 2 : end]]
        found.append(tokens[start:end])
    assert (row["labels"][length:] == -100).all()
    return found


def packed_documents(rows: dict[str, torch.Tensor]) -> list[list[int]]:
    each = ({name: x[i] for name, x in rows.items()} for i in range(len(rows["input_ids"])))
    return [document for row in each for document in documents(row)]


def follow(network: StreetNetwork, document: list[int]) -> tuple[int, int, int]:
    """Checks that a document is a legal walk that ends exactly at its destination, or was cut;
    source, destination, moves."""
    source, destination, *moves = document
    ended = moves[-1] == END
    moves = moves[:-1] if ended else moves
    node = source - FIRST_NODE
    for move in moves:
        assert FIRST_DIRECTION <= move < FIRST_NODE
        node = int(network.targets[node, move - FIRST_DIRECTION])
        assert node >= 0
    assert ended == (node == destination - FIRST_NODE)
    return source - FIRST_NODE, destination - FIRST_NODE, len(moves)


# --- walks ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    min_moves=st.integers(1, 12),
    extra=st.integers(0, 20),
    count=st.integers(1, 60),
)
def test_walks_are_legal(seed, min_moves, extra, count):
    found = random_walks(
        CITY, count, min_moves=min_moves, max_moves=min_moves + extra, rng=rng(seed)
    )
    assert found.nodes.shape == (count, min_moves + extra + 1)
    assert found.moves.shape == (count, min_moves + extra)
    for length, node, move, destination in zip(*(x.tolist() for x in found), strict=True):
        assert node[length] == destination
        assert min_moves <= length <= min_moves + extra
        assert node[0] != node[length]
        assert all(node[i + 1] == CITY.targets[node[i], move[i]] >= 0 for i in range(length))
        assert set(node[length + 1 :]) | set(move[length:]) <= {-1}


def test_a_seed_always_gives_the_same_walks():
    """Training data and evaluation items of the runs reported so far follow from these."""
    pairs = held_out_pairs(CITY, 60)
    free = random_walks(CITY, 200, min_moves=3, max_moves=20, rng=rng(), exclude=pairs)
    held_out = conditioned_walks(CITY, pairs, min_moves=3, max_moves=20, rng=rng())
    prefixes = prefix_pairs(CITY, 50, max_moves=20)
    drawn = {
        "pairs": (pairs.source, pairs.destination),
        "free": free[:3],
        "held_out": held_out[:3],
        "prefixes": (prefixes.intersection, prefixes.first.moves, prefixes.second.moves),
        "rows": tuple(stream()[30].values()),
    }
    assert {
        name: hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in arrays)).hexdigest()[:16]
        for name, arrays in drawn.items()
    } == {
        "pairs": "8dbc0e5ed9eda817",
        "free": "e928ee4c90f86b5b",
        "held_out": "c414a92d7af69012",
        "prefixes": "bd171b39934d226a",
        "rows": "82a3c8e70b474c2f",
    }


def test_starts_and_moves_are_uniform():
    count = 40_000
    _, nodes, moves, _ = random_walks(CITY, count, min_moves=9, max_moves=9, rng=rng())
    # A walk back to its start is drawn again, which favours some starts by a little; hence the wide
    # margin there.
    starts = np.bincount(nodes[:, 0], minlength=len(CITY)) / count * len(CITY)
    assert abs(starts - 1).max() < 0.25
    for node in range(len(CITY)):
        # The moves in the middle of a walk; every legal one equally often, within five standard
        # errors.
        taken = np.bincount(moves[:, 4][nodes[:, 4] == node], minlength=8)
        legal = CITY.targets[node] >= 0
        share = 1 / legal.sum()
        assert not taken[~legal].any()
        margin = 5 * np.sqrt(taken.sum() * share * (1 - share)) + 0.05 * taken.sum()
        assert (abs(taken[legal] - taken.sum() * share) <= margin).all()


def test_lengths_are_uniform_though_walks_are_drawn_again():
    # A ring of 5 with a dead end at each corner: half of all moves end a walk, and five moves lead
    # back to the start.
    ring = line([[(i + 1) % 5, 5 + i] for i in range(5)] + [[]] * 5)
    lengths, nodes, *_ = random_walks(ring, 6000, min_moves=1, max_moves=6, rng=rng())
    shares = np.bincount(lengths, minlength=7)[1:] / 6000
    assert abs(shares - 1 / 6).max() < 5 * np.sqrt(1 / 6 * 5 / 6 / 6000)
    inner = nodes[np.arange(6000), lengths - 1]
    assert (inner < 5).all()  # a dead end is at most the last intersection


def test_impossible_walks_are_told():
    back_and_forth = line([[1], [0]])
    odd = random_walks(back_and_forth, 10, min_moves=3, max_moves=3, rng=rng())
    assert (odd.lengths == 3).all()
    with pytest.raises(NextLatError, match=r"no walk of 2 moves.*strongly connected"):
        random_walks(back_and_forth, 10, min_moves=2, max_moves=2, rng=rng())


# --- packing --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(4, 40), max_size=60),
    capacity=st.integers(40, 64),
    rows=st.none() | st.integers(1, 12),
)
def test_documents_share_rows_without_overlap(sizes, capacity, rows):
    row_of, start_of, used = packing._best_fit(sizes, capacity, rows)
    taken = set()
    for row, start, size in zip(row_of, start_of, sizes, strict=False):
        assert start + size <= capacity
        cells = {(row, i) for i in range(start, start + size)}
        assert not cells & taken
        taken |= cells
    assert sorted(taken) == [(row, i) for row in range(len(used)) for i in range(used[row])]
    if rows is None:
        assert len(row_of) == len(sizes)
    else:
        assert len(used) <= rows
        if len(row_of) < len(sizes):  # the first one left out has no room anywhere
            assert len(used) == rows
            assert max(capacity - tokens for tokens in used) < sizes[len(row_of)]


def test_packed_rows_hold_the_walks_in_full():
    found = random_walks(CITY, 200, min_moves=1, max_moves=20, rng=rng())
    rows = pack(found, 64)
    expected = [
        [node[0] + 11, node[length] + 11, *(move + 3 for move in moves[:length]), 2]
        for length, node, moves, _ in zip(*(x.tolist() for x in found), strict=True)
    ]
    assert sorted(packed_documents(rows)) == sorted(expected)
    assert all(tensor.dtype == torch.int64 for tensor in rows.values())
    with pytest.raises(NextLatError, match="does not fit in a row of 8"):
        pack(found, 8)


# --- the training stream --------------------------------------------------------------------------


def stream(
    seed: int = 0,
    *,
    network: StreetNetwork = CITY,
    row_length: int = 48,
    count: int = 40,
    min_moves: int = 3,
    max_moves: int = 20,
    exclude: Pairs | None = None,
) -> Stream:
    draw = partial(random_walks, network, min_moves=min_moves, max_moves=max_moves, exclude=exclude)
    mean_moves = (min_moves + max_moves) / 2
    return ride_stream(draw, row_length=row_length, seed=seed, mean_moves=mean_moves, count=count)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_row_depends_on_seed_and_index_alone(monkeypatch):
    monkeypatch.setattr(packing, "TOKENS_PER_CHUNK", 48 * 4)  # many chunks: the cache is emptied
    forward = list(stream())
    assert len(forward) == 40
    data = stream()
    for index in np.random.default_rng(0).permutation(40).tolist():
        assert same(data[index], forward[index])
    assert same(stream(count=1000)[39], forward[39])
    assert len({tuple(row["input_ids"].tolist()) for row in [*forward, *stream(seed=1)]}) == 80


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_makes_batches(workers):
    data = stream()
    batches = list(torch.utils.data.DataLoader(data, batch_size=8, num_workers=workers))
    assert [batch["input_ids"].shape for batch in batches] == [(8, 48)] * 5
    assert same({name: tensor[3] for name, tensor in batches[2].items()}, data[19])


def test_rows_are_nearly_full():
    data = stream(count=2000, row_length=128, max_moves=60)
    assert np.mean([data[i]["attention_mask"].float().mean() for i in range(0, 2000, 7)]) > 0.96
    # Packing must not change which lengths occur: the longest are the first to find no room.
    lengths = np.array([len(document) - 3 for i in range(1500) for document in documents(data[i])])
    assert lengths.mean() == pytest.approx((3 + 60) / 2, abs=5 * 16.7 / np.sqrt(len(lengths)))
    assert (lengths.min(), lengths.max()) == (3, 60)


def test_training_never_sees_a_held_out_pair():
    pairs = held_out_pairs(CITY, 10_000, seed=0, max_share=0.3)
    held_out = set(zip(pairs.source.tolist(), pairs.destination.tolist(), strict=True))
    seen, free = (
        Counter(follow(CITY, document)[:2] for row in data for document in documents(row))
        for data in (
            stream(count=700, row_length=96, min_moves=1, max_moves=30, exclude=exclude)
            for exclude in (pairs, None)
        )
    )
    assert sum(seen.values()) > 3000
    assert not held_out & set(seen)
    # Without the exclusion they would be there, and most other pairs still are.
    assert held_out & set(free)
    assert len(seen) > 0.75 * (len(CITY) * (len(CITY) - 1) - len(held_out))


@pytest.mark.slow
def test_manhattan_walks(data_dir):
    """The network as it is, with its dead ends and loops; sequences of at most 100 tokens."""
    manhattan = read_csv(data_dir / "manhattan")
    pairs = held_out_pairs(manhattan, 1000, seed=0)
    assert len(pairs) == 1000
    data = stream(
        network=manhattan, row_length=256, min_moves=1, max_moves=97, exclude=pairs, count=20
    )
    found = [document for row in data for document in documents(row)]
    assert all(follow(manhattan, document) and len(document) <= 100 for document in found)
    held_out = conditioned_walks(manhattan, pairs[:20], min_moves=1, max_moves=97, rng=rng())
    ends = [follow(manhattan, document)[:2] for document in packed_documents(pack(held_out, 2000))]
    assert ends == list(zip(pairs.source[:20], pairs.destination[:20], strict=True))


# --- held-out sequences ---------------------------------------------------------------------------


def all_walks(
    network: StreetNetwork, source: int, destination: int, longest: int
) -> dict[tuple[int, ...], float]:
    """Every walk of 1..longest moves between two intersections, with its share of the probability
    (lengths uniform)."""
    found: dict[tuple[int, ...], float] = {}
    frontier: dict[tuple[int, ...], tuple[int, float]] = {(): (source, 1.0)}
    for _ in range(longest):
        frontier = {
            (*moves, move): (int(network.targets[node, move]), chance / network.out_degree[node])
            for moves, (node, chance) in frontier.items()
            for move in np.flatnonzero(network.targets[node] >= 0).tolist()
        }
        found |= {
            moves: chance for moves, (node, chance) in frontier.items() if node == destination
        }
    total = sum(found.values())
    return {moves: chance / total for moves, chance in found.items()}


def seen_moves(found: Walks) -> Counter:
    return Counter(
        tuple(moves[:length])
        for moves, length in zip(found.moves.tolist(), found.lengths.tolist(), strict=True)
    )


def test_conditioned_walks_follow_the_law_of_training():
    city = generate_city(4, 4, seed=0)
    count = 20_000
    source, destination = 2, 9
    expected = all_walks(city, source, destination, 6)
    assert len(expected) > 20
    pairs = Pairs(np.full(count, source), np.full(count, destination))
    drawn = conditioned_walks(city, pairs, min_moves=1, max_moves=6, rng=rng())
    assert_drawn_from(seen_moves(drawn), expected)
    # And so does the sampler of training, except that a walk back to its start is drawn again with
    # its length kept, so that a length that often leads back weighs more: by one over its share of
    # walks that do not.
    n = len(city)
    step = np.zeros((n, n))
    for a, _, b in city.edges.tolist():
        step[a, b] += 1 / city.out_degree[a]
    kept = [1 - np.trace(np.linalg.matrix_power(step, length)) / n for length in range(7)]
    reweighted = {walk: chance / kept[len(walk)] for walk, chance in expected.items()}
    total = sum(reweighted.values())
    found = random_walks(city, 300_000, min_moves=1, max_moves=6, rng=rng())
    ours = (found.source == source) & (found.destination == destination)
    seen = seen_moves(Walks(*(x[ours] for x in found)))
    assert_drawn_from(seen, {walk: weight / total for walk, weight in reweighted.items()})


def assert_drawn_from(drawn: Counter, expected: dict[tuple[int, ...], float]) -> None:
    """Pearson's statistic within five standard deviations, by its exact variance under the expected
    law."""
    assert set(drawn) <= set(expected)
    count, cells, chance = sum(drawn.values()), len(expected), np.array(list(expected.values()))
    statistic = sum((drawn[walk] - count * p) ** 2 / (count * p) for walk, p in expected.items())
    variance = 2 * (cells - 1) + ((1 / chance).sum() - cells**2 - 2 * cells + 2) / count
    assert statistic < cells - 1 + 5 * np.sqrt(variance)


def test_conditioned_walks_of_many_pairs(monkeypatch):
    monkeypatch.setattr(walks, "TABLE_BYTES", 8 * len(CITY) * 26 * 7)  # seven pairs at a time
    pairs = held_out_pairs(CITY, 60)
    found = conditioned_walks(CITY, pairs, min_moves=5, max_moves=25, rng=rng())
    for i, (length, nodes, moves, _) in enumerate(zip(*(x.tolist() for x in found), strict=True)):
        document = [nodes[0] + 11, nodes[length] + 11, *(move + 3 for move in moves[:length]), 2]
        assert follow(CITY, document) == (pairs.source[i], pairs.destination[i], length)
        assert set(nodes[length + 1 :]) | set(moves[length:]) <= {-1}
        assert 5 <= length <= 25
    far = Pairs(np.array([0]), np.array([len(CITY) - 1]))
    message = f"no walk of 1 to 2 moves leads from 0 to {len(CITY) - 1}"
    with pytest.raises(NextLatError, match=message):
        conditioned_walks(CITY, far, min_moves=1, max_moves=2, rng=rng())


# --- rides that stop where they arrive ------------------------------------------------------------


def all_rides(
    network: StreetNetwork, source: int, destination: int, longest: int, noise: float
) -> dict[tuple[int, ...], tuple[float, bool]]:
    """Every ride between two intersections with its probability, and whether it arrives."""
    found: dict[tuple[int, ...], tuple[float, bool]] = {}
    frontier = {(): (source, 1.0)}
    for _ in range(longest):
        step = {}
        for moves, (node, chance) in frontier.items():
            legal = np.flatnonzero(network.targets[node] >= 0).tolist()
            hops = network.hops[destination]
            nearer = [m for m in legal if hops[network.targets[node, m]] < hops[node]]
            for move in legal:
                p = noise / len(legal) + (1 - noise) * (move in nearer) / len(nearer)
                if p > 0:
                    step[(*moves, move)] = int(network.targets[node, move]), chance * p
        found |= {moves: (p, True) for moves, (node, p) in step.items() if node == destination}
        frontier = {m: (node, p) for m, (node, p) in step.items() if node != destination}
    return found | {moves: (p, False) for moves, (_, p) in frontier.items()}


@pytest.mark.parametrize(("noise", "arrive"), [(0.0, True), (0.3, True), (1.0, False)])
def test_rides_to_a_destination_follow_their_law(noise, arrive):
    city, count = generate_city(4, 4, seed=0), 40_000
    # A pair with a choice of shortest paths.
    near = np.argwhere((city.hops > 0) & (city.hops <= 5)).tolist()
    destination, source = max(near, key=lambda pair: len(all_rides(city, *pair[::-1], 5, 0.0)))
    assert len(all_rides(city, source, destination, 5, 0.0)) > 1
    rides = all_rides(city, source, destination, 5, noise)
    kept = {moves: p for moves, (p, arrived) in rides.items() if arrived or not arrive}
    total = sum(kept.values())
    assert total == pytest.approx(1.0) or (noise > 0 and arrive)
    pairs = Pairs(np.full(count, source), np.full(count, destination))
    options = {"max_moves": 5, "noise": noise, "arrive": arrive}
    drawn = stopping_rides(city, count, rng=rng(), pairs=pairs, **options)
    assert_drawn_from(seen_moves(drawn), {moves: p / total for moves, p in kept.items()})
    rows = zip(drawn.moves.tolist(), drawn.lengths, drawn.arrived, strict=True)
    assert all(rides[tuple(moves[:length])][1] == arrived for moves, length, arrived in rows)
    # Without given pairs, source and destination are any two of the city, but those excluded.
    free = stopping_rides(city, 3000, rng=rng(), exclude=pairs[:1], **options)
    ends = set(zip(free.source.tolist(), free.destination.tolist(), strict=True))
    assert (free.source != free.destination).all()
    assert (source, destination) not in ends
    far = int((city.hops > 5).sum()) if arrive else 0
    assert len(ends) == len(city) * (len(city) - 1) - 1 - far
    if noise == 0:
        np.testing.assert_array_equal(free.lengths, city.hops[free.destination, free.source])


def test_rides_that_cannot_arrive_are_told():
    far = Pairs(np.array([0]), np.array([len(CITY) - 1]))
    with pytest.raises(NextLatError, match="no ride of at most 2 moves arrived"):
        stopping_rides(CITY, 1, max_moves=2, noise=0.0, arrive=True, rng=rng(), pairs=far)


@pytest.mark.parametrize("kind", ["shortest-paths", "noisy-shortest-paths", "stop-on-arrival"])
def test_rows_of_rides_that_stop(kind):
    task = StreetsConfig(
        rows=5, columns=5, rides=kind, min_moves=1, max_moves=15, row_length=64, tests=40
    ).build()
    held_out = set(zip(task.pairs.source.tolist(), task.pairs.destination.tolist(), strict=True))
    data = task.train_dataset(0)
    found = [document for i in range(300) for document in documents(data[i])]
    assert np.mean([data[i]["attention_mask"].float().mean() for i in range(300)]) > 0.9
    cut = [document for document in found if document[-1] != END]
    for document in found:
        source, destination, moves = follow(task.network, document)
        assert (source, destination) not in held_out
        assert moves <= 15
    assert bool(cut) == (kind == "stop-on-arrival")
    assert all(len(document) == 2 + 15 for document in cut)
    tested = packed_documents(pack(task._walks(), 64))
    ends = {follow(task.network, document)[:2] for document in tested}
    assert ends == set(
        list(zip(task.pairs.source.tolist(), task.pairs.destination.tolist(), strict=True))[:40]
    )
    assert task.published is None


@pytest.mark.parametrize("kind", ["random-walks", "stop-on-arrival"])
def test_few_rides_are_read_again_and_again(kind: str) -> None:
    settings = {"rows": 6, "columns": 6, "rides": kind, "min_moves": 1, "max_moves": 15}
    task = StreetsConfig(**settings, row_length=64, distinct=7).build()
    seen = Counter(tuple(x) for i in range(300) for x in documents(task.train_dataset(3)[i]))
    assert len(seen) == 7 and min(seen.values()) > max(seen.values()) / 2
    other = {tuple(x) for i in range(50) for x in documents(task.train_dataset(4)[i])}
    assert not other & seen.keys()
    again = task.train_dataset(3)
    assert torch.equal(again[200]["input_ids"], task.train_dataset(3)[200]["input_ids"])
    endless = StreetsConfig(**settings, row_length=64).build().train_dataset(3)
    assert len({tuple(x) for i in range(50) for x in documents(endless[i])}) > 50


def test_cut_rides_to_far_destinations_teach_ways_and_are_tested_over_all_of_them() -> None:
    task = StreetsConfig(
        rows=6, columns=6, rides="noisy-shortest-paths", noise=0.2, cut=True, min_moves=1,
        max_moves=4, row_length=32, held_out=200, tests=200, multiples=(1, 3),
    ).build()  # fmt: skip
    hops = task.network.hops[task.pairs.destination, task.pairs.source]
    assert 4 < hops.max() <= 12
    data = task.train_dataset(0)
    rides = [follow(task.network, document) for i in range(20) for document in documents(data[i])]
    held_out = set(zip(task.pairs.source.tolist(), task.pairs.destination.tolist(), strict=True))
    assert not held_out & {ride[:2] for ride in rides}
    assert max(moves for *_, moves in rides) == 4
    model = attach(tiny_lm("llama", vocab_size=len(task.tokenizer)), NextTokenConfig())
    scores = [
        next(iter(scores(model)))
        for multiple in (1, 3)
        for _, metrics, scores in task._stages("transformer", multiple)
        if metrics[0].name == "valid_trajectories"
    ]
    assert [len(score.per_item) for score in scores] == [(hops <= 4).sum(), (hops <= 12).sum()]


# --- settings and tokenizer -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 3}, "'rows' = 3"),
        ({"rows": 10**6, "columns": 10**6}, "'rows' = 1000000 .* less than or equal to 200"),
        ({"columns": 1}, "'columns' = 1"),
        ({"city_seed": -1}, "'city_seed' = -1"),
        ({"one_way": 1.5}, "'one_way' = 1.5"),
        ({"missing": -0.1}, "'missing' = -0.1"),
        ({"missing": float("nan")}, "'missing'"),
        (
            {"min_moves": 30, "max_moves": 20},
            "walks of 30 to 20 moves: give min_moves <= max_moves",
        ),
        ({"min_moves": 0}, "'min_moves' = 0"),
        ({"rides": "shortest-paths"}, "shortest-paths are as long as their way: set min_moves = 1"),
        ({"noise": 0.5}, "random-walks have no noise: leave it out"),
        ({"rides": "stop-on-arrival", "min_moves": 1, "cut": True}, "stop-on-arrival have no cut"),
        ({"held_out_share": 0.9}, "'held_out_share' = 0.9"),
        ({"row_length": 22, "max_moves": 20}, "too short for a walk of 20 moves: give at least 23"),
        ({"held_out": 10**12}, "'held_out'"),
        ({"tests": 1}, "'tests' = 1"),
        ({"tests": 10**12}, "'tests'"),
        ({"detour_probability": 75.0}, "'detour_probability' = 75"),
        ({"box": (40.0, -74.0, 41.0)}, "'box"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(NextLatError, match=message) as caught:
        StreetsConfig(**options)
    assert "\n" not in str(caught.value)


def test_one_token_per_word(tmp_path):
    words = tokenizer(CITY)
    assert len(words) == 11 + len(CITY)
    expected = ["<pad>", "<unk>", "end", *DIRECTIONS, "0", "1"]
    assert words.convert_ids_to_tokens(range(13)) == expected
    assert (words.pad_token_id, words.unk_token_id, words.eos_token_id) == (PAD, UNK, END)
    ids = words("12 30 N N E end")["input_ids"]
    assert ids == [23, 41, 3, 3, 5, 2]
    assert words.decode(ids) == "12 30 N N E end"
    assert words("12 nowhere NNE")["input_ids"] == [23, UNK, UNK]
    row = stream()[0]
    assert words(words.decode(row["input_ids"]))["input_ids"] == row["input_ids"].tolist()
    words.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("12 30 N end <pad>")["input_ids"] == [23, 41, 3, 2, 0]
    assert again.decode(ids) == "12 30 N N E end"
    assert again.eos_token_id == END
    batch = again(["1 2 N", "3 4 N E end"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].shape == (2, 5)


def test_names_of_intersections_are_never_cut(tmp_path):
    names = ("weekend", "dead-end", "N42", "end7", "O'Hare", "Ünter", "a.b")
    network = StreetNetwork(names, np.zeros(7), np.zeros(7), np.full((7, 8), -1))
    tokenizer(network).save_pretrained(tmp_path)
    for words in (tokenizer(network), AutoTokenizer.from_pretrained(tmp_path)):
        ids = words(" ".join(names) + " N end")["input_ids"]
        assert ids == [*range(FIRST_NODE, FIRST_NODE + 7), 3, END]
        assert words.decode(ids) == " ".join(names) + " N end"
