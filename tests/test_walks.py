"""Random walks, held-out pairs, packing, the data set and the tokenizer of the street task."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nextlat.errors import NextLatError
from nextlat.tasks.streets import walks
from nextlat.tasks.streets.conditioned_walks import conditioned_walks
from nextlat.tasks.streets.network import DIRECTIONS, StreetNetwork
from nextlat.tasks.streets.walks import (
    END,
    FIRST_DIRECTION,
    FIRST_NODE,
    PAD,
    Pairs,
    WalkDataset,
    held_out_pairs,
    pack,
    random_walks,
    tokenizer,
)

CITY = StreetNetwork.embedded(6, 6, seed=1)


def line(targets: list[list[int]]) -> StreetNetwork:
    n = len(targets)
    full = np.array([row + [-1] * (8 - len(row)) for row in targets])
    return StreetNetwork(
        tuple(str(i) for i in range(n)), np.linspace(40.0, 40.1, n), np.full(n, -74.0), full
    )


def documents(row: dict[str, torch.Tensor]) -> list[list[int]]:
    """The documents of a packed row, cut where positions restart; checks what must hold of any row."""
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


def follow(network: StreetNetwork, document: list[int]) -> tuple[int, int, int]:
    """Checks that a document is a legal walk that ends at its destination; source, destination,
    moves."""
    source, destination, *moves, end = document
    assert end == END
    node = source - FIRST_NODE
    for move in moves:
        assert FIRST_DIRECTION <= move < FIRST_NODE
        node = int(network.targets[node, move - FIRST_DIRECTION])
        assert node >= 0
    assert node == destination - FIRST_NODE
    return source - FIRST_NODE, node, len(moves)


# --- walks ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    min_moves=st.integers(1, 12),
    extra=st.integers(0, 20),
    count=st.integers(0, 60),
)
def test_walks_are_legal(seed: int, min_moves: int, extra: int, count: int) -> None:
    lengths, nodes, moves = random_walks(
        CITY,
        count,
        min_moves=min_moves,
        max_moves=min_moves + extra,
        rng=np.random.default_rng(seed),
    )
    assert lengths.shape == (count,)
    assert nodes.shape == (count, min_moves + extra + 1)
    assert moves.shape == (count, min_moves + extra)
    for length, node, move in zip(lengths.tolist(), nodes.tolist(), moves.tolist(), strict=True):
        assert min_moves <= length <= min_moves + extra
        assert node[0] != node[length]
        assert all(node[i + 1] == CITY.targets[node[i], move[i]] >= 0 for i in range(length))
        assert set(node[length + 1 :]) | set(move[length:]) <= {-1}


def test_walks_depend_on_the_generator_alone() -> None:
    first, again, other = (
        random_walks(CITY, 50, min_moves=2, max_moves=9, rng=np.random.default_rng(seed))
        for seed in (3, 3, 4)
    )
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (first[1] != other[1]).any()


def test_starts_and_moves_are_uniform() -> None:
    count = 40_000
    _, nodes, moves = random_walks(
        CITY, count, min_moves=9, max_moves=9, rng=np.random.default_rng(0)
    )
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


def test_lengths_are_uniform_though_walks_are_drawn_again() -> None:
    # A ring of 5 with a dead end at each corner: half of all moves end a walk, and five moves lead
    # back to the start.
    ring = line([[(i + 1) % 5, 5 + i] for i in range(5)] + [[]] * 5)
    lengths, nodes, _ = random_walks(
        ring, 6000, min_moves=1, max_moves=6, rng=np.random.default_rng(0)
    )
    shares = np.bincount(lengths, minlength=7)[1:] / 6000
    assert abs(shares - 1 / 6).max() < 5 * np.sqrt(1 / 6 * 5 / 6 / 6000)
    inner = nodes[np.arange(6000), lengths - 1]
    assert (inner < 5).all()  # a dead end is at most the last intersection


def test_impossible_walks_are_told() -> None:
    back_and_forth = line([[1], [0]])
    odd, _, _ = random_walks(
        back_and_forth, 10, min_moves=3, max_moves=3, rng=np.random.default_rng(0)
    )
    assert (odd == 3).all()
    with pytest.raises(NextLatError, match=r"no walk of 2 moves.*strongly connected"):
        random_walks(back_and_forth, 10, min_moves=2, max_moves=2, rng=np.random.default_rng(0))
    with pytest.raises(NextLatError, match="1 <= min_moves <= max_moves"):
        random_walks(CITY, 1, min_moves=5, max_moves=4, rng=np.random.default_rng(0))
    with pytest.raises(NextLatError, match="1 <= min_moves <= max_moves"):
        random_walks(CITY, 1, min_moves=0, max_moves=4, rng=np.random.default_rng(0))


# --- held-out pairs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [True, False])
def test_held_out_pairs_are_distinct_near_and_few(
    monkeypatch: pytest.MonkeyPatch, listed: bool
) -> None:
    if not listed:
        monkeypatch.setattr(walks, "MAX_LISTED_PAIRS", 0)
    pairs = held_out_pairs(CITY, 90, max_hops=4, seed=3)
    hops = CITY.hops_to(np.arange(len(CITY)))
    eligible = int(((hops > 0) & (hops <= 4)).sum())
    assert (
        len(pairs) == min(90, eligible // 10) if listed else 0.5 * eligible / 10 < len(pairs) <= 90
    )
    assert len(set(zip(pairs.source.tolist(), pairs.destination.tolist(), strict=True))) == len(
        pairs
    )
    np.testing.assert_array_equal(pairs.hops, hops[pairs.destination, pairs.source])
    assert pairs.hops.min() >= 1
    assert pairs.hops.max() <= 4
    again, other = (
        held_out_pairs(CITY, 90, max_hops=4, seed=3),
        held_out_pairs(CITY, 90, max_hops=4, seed=4),
    )
    np.testing.assert_array_equal(pairs.source, again.source)
    assert pairs.source.tolist() != other.source.tolist()


@pytest.mark.parametrize("listed", [True, False])
def test_held_out_pairs_are_uniform(monkeypatch: pytest.MonkeyPatch, listed: bool) -> None:
    """Every eligible pair is held out equally often, so that no distance is favoured."""
    if not listed:
        monkeypatch.setattr(walks, "MAX_LISTED_PAIRS", 0)
    ring = line([[(i + 1) % 8] for i in range(8)])
    counts = Counter()
    for seed in range(400):
        counts.update(held_out_pairs(ring, 5, seed=seed, max_hops=6, max_share=0.5).hops.tolist())
    assert set(counts) == set(range(1, 7))
    assert max(abs(count - 2000 / 6) for count in counts.values()) < 5 * np.sqrt(2000 / 6)


@pytest.mark.parametrize("listed", [True, False])
def test_a_city_too_small_to_hold_out_pairs(monkeypatch: pytest.MonkeyPatch, listed: bool) -> None:
    if not listed:
        monkeypatch.setattr(walks, "MAX_LISTED_PAIRS", 0)
    with pytest.raises(NextLatError, match="no pair of intersections"):
        held_out_pairs(line([[1], [0]]), 10)


def test_training_never_sees_a_held_out_pair() -> None:
    pairs = held_out_pairs(CITY, 10_000, seed=0, max_share=0.3)
    held_out = set(zip(pairs.source.tolist(), pairs.destination.tolist(), strict=True))
    data = WalkDataset(
        CITY, rows=700, row_length=96, min_moves=1, max_moves=30, seed=0, exclude=pairs
    )
    seen = Counter(follow(CITY, document)[:2] for row in data for document in documents(row))
    assert sum(seen.values()) > 3000
    assert not held_out & set(seen)
    # Without the exclusion they would be there, and most other pairs still are.
    free = WalkDataset(CITY, rows=700, row_length=96, min_moves=1, max_moves=30, seed=0)
    assert held_out & {follow(CITY, document)[:2] for row in free for document in documents(row)}
    n = len(CITY)
    assert len(seen) > 0.75 * (n * (n - 1) - len(held_out))


# --- packing --------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(4, 40), max_size=60),
    capacity=st.integers(40, 64),
    rows=st.none() | st.integers(1, 12),
)
def test_documents_share_rows_without_overlap(
    sizes: list[int], capacity: int, rows: int | None
) -> None:
    row_of, start_of, used = walks._best_fit(sizes, capacity, rows)
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


def test_packed_rows_hold_the_walks_in_full() -> None:
    lengths, nodes, moves = random_walks(
        CITY, 200, min_moves=1, max_moves=20, rng=np.random.default_rng(0)
    )
    rows = pack(lengths, nodes, moves, 64)
    found = [
        document
        for i in range(len(rows["input_ids"]))
        for document in documents({k: v[i] for k, v in rows.items()})
    ]
    expected = [
        [node[0] + 11, node[length] + 11, *(move + 3 for move in moves[:length]), 2]
        for length, node, moves in zip(
            lengths.tolist(), nodes.tolist(), moves.tolist(), strict=True
        )
    ]
    assert sorted(found) == sorted(expected)
    assert all(tensor.dtype == torch.int64 for tensor in rows.values())
    with pytest.raises(NextLatError, match="does not fit in a row of 8"):
        pack(lengths, nodes, moves, 8)


# --- the data set ---------------------------------------------------------------------------------------------------


def dataset(seed: int = 0, **changes: object) -> WalkDataset:
    settings: dict = dict(rows=40, row_length=48, min_moves=3, max_moves=20, seed=seed)
    return WalkDataset(CITY, **{**settings, **changes})


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_row_depends_on_seed_and_index_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        walks, "TOKENS_PER_CHUNK", 48 * 4
    )  # many chunks, so that the small cache is emptied
    forward = list(dataset())
    assert len(forward) == len(dataset()) == 40
    data = dataset()
    for index in np.random.default_rng(0).permutation(40).tolist():
        assert same(data[index], forward[index])
    longer = dataset(rows=1000)
    assert same(longer[39], forward[39])
    assert len({tuple(row["input_ids"].tolist()) for row in [*forward, *dataset(seed=1)]}) == 80
    assert same(data[-1], forward[39])
    for index in (40, -41):
        with pytest.raises(IndexError):
            data[index]


def test_writing_into_a_row_leaves_the_data_set_alone() -> None:
    data = dataset()
    row = data[0]
    before = {name: tensor.clone() for name, tensor in row.items()}
    for tensor in row.values():
        tensor.fill_(7)
    assert same(data[0], before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_makes_batches(workers: int) -> None:
    data = dataset()
    batches = list(torch.utils.data.DataLoader(data, batch_size=8, num_workers=workers))
    assert [batch["input_ids"].shape for batch in batches] == [(8, 48)] * 5
    assert same({name: tensor[3] for name, tensor in batches[2].items()}, data[19])


def test_rows_are_nearly_full() -> None:
    data = dataset(rows=2000, row_length=128, max_moves=60)
    assert np.mean([data[i]["attention_mask"].float().mean() for i in range(0, 2000, 7)]) > 0.96
    # Packing must not change which lengths occur: the longest are the first to find no room.
    lengths = np.array([len(document) - 3 for i in range(1500) for document in documents(data[i])])
    assert lengths.mean() == pytest.approx((3 + 60) / 2, abs=5 * 16.7 / np.sqrt(len(lengths)))
    assert lengths.min() == 3
    assert lengths.max() == 60


def test_impossible_data_sets_are_refused_at_once() -> None:
    with pytest.raises(NextLatError, match="give at least 23"):
        dataset(row_length=22)
    with pytest.raises(NextLatError, match="min_moves"):
        dataset(min_moves=30)


def test_manhattan_walks(data_dir: Path) -> None:
    """The network as it is, with its dead ends and loops; sequences of at most 100 tokens."""
    manhattan = StreetNetwork.from_csv(data_dir / "manhattan")
    pairs = held_out_pairs(manhattan, 1000, seed=0)
    assert len(pairs) == 1000
    assert pairs.hops.max() <= 50
    assert pairs.hops.min() >= 1
    data = WalkDataset(
        manhattan, rows=20, row_length=256, min_moves=1, max_moves=97, seed=0, exclude=pairs
    )
    found = [document for row in data for document in documents(row)]
    assert all(follow(manhattan, document) and len(document) <= 100 for document in found)
    rows = pack(
        *conditioned_walks(
            manhattan, pairs[:20], min_moves=1, max_moves=97, rng=np.random.default_rng(0)
        ),
        2000,
    )
    held_out = [
        follow(manhattan, document)[:2]
        for document in documents({name: tensor[0] for name, tensor in rows.items()})
    ]
    assert held_out == list(
        zip(pairs.source[:20].tolist(), pairs.destination[:20].tolist(), strict=True)
    )


# --- held-out sequences ---------------------------------------------------------------------------------------------


def all_walks(
    network: StreetNetwork, source: int, destination: int, longest: int
) -> dict[tuple[int, ...], float]:
    """Every walk of 1..longest moves between two intersections, with its share of the probability
    (lengths uniform)."""
    found, frontier = {}, {(): (source, 1.0)}
    for _ in range(longest):
        step = {}
        for moves, (node, chance) in frontier.items():
            legal = np.flatnonzero(network.targets[node] >= 0).tolist()
            step.update(
                {
                    (*moves, move): (int(network.targets[node, move]), chance / len(legal))
                    for move in legal
                }
            )
        frontier = step
        found.update(
            {moves: chance for moves, (node, chance) in frontier.items() if node == destination}
        )
    total = sum(found.values())
    return {moves: chance / total for moves, chance in found.items()}


def test_conditioned_walks_follow_the_law_of_training() -> None:
    city = StreetNetwork.embedded(4, 4, seed=0)
    count = 20_000
    source, destination = 2, 9
    expected = all_walks(city, source, destination, 6)
    assert len(expected) > 20
    pairs = Pairs(np.full(count, source), np.full(count, destination), np.full(count, 0))
    lengths, nodes, moves = conditioned_walks(
        city, pairs, min_moves=1, max_moves=6, rng=np.random.default_rng(0)
    )
    drawn = Counter(
        tuple(row[:length]) for row, length in zip(moves.tolist(), lengths.tolist(), strict=True)
    )
    assert_drawn_from(drawn, expected)
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
    lengths, nodes, moves = random_walks(
        city, 300_000, min_moves=1, max_moves=6, rng=np.random.default_rng(0)
    )
    ours = (nodes[:, 0] == source) & (nodes[np.arange(len(nodes)), lengths] == destination)
    seen = Counter(
        tuple(row[:length])
        for row, length in zip(moves[ours].tolist(), lengths[ours].tolist(), strict=True)
    )
    assert_drawn_from(seen, {walk: weight / total for walk, weight in reweighted.items()})


def assert_drawn_from(drawn: Counter, expected: dict[tuple[int, ...], float]) -> None:
    """Pearson's statistic within five standard deviations, by its exact variance under the expected
    law."""
    assert set(drawn) <= set(expected)
    count, cells, chance = sum(drawn.values()), len(expected), np.array(list(expected.values()))
    statistic = sum((drawn[walk] - count * p) ** 2 / (count * p) for walk, p in expected.items())
    variance = 2 * (cells - 1) + ((1 / chance).sum() - cells**2 - 2 * cells + 2) / count
    assert statistic < cells - 1 + 5 * np.sqrt(variance)


def test_conditioned_walks_of_many_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    from nextlat.tasks.streets import conditioned_walks as module

    monkeypatch.setattr(module, "TABLE_BYTES", 8 * len(CITY) * 26 * 7)  # seven pairs at a time
    pairs = held_out_pairs(CITY, 60)
    lengths, nodes, moves = conditioned_walks(
        CITY, pairs, min_moves=5, max_moves=25, rng=np.random.default_rng(0)
    )
    for i in range(len(pairs)):
        document = [nodes[i, 0] + 11, nodes[i, lengths[i]] + 11, *(moves[i, : lengths[i]] + 3), 2]
        assert follow(CITY, document) == (pairs.source[i], pairs.destination[i], lengths[i])
        assert set(nodes[i, lengths[i] + 1 :]) | set(moves[i, lengths[i] :]) <= {-1}
        assert 5 <= lengths[i] <= 25
    far = Pairs(np.array([0]), np.array([len(CITY) - 1]), np.array([0]))
    with pytest.raises(
        NextLatError, match=f"no walk of 1 to 2 moves leads from 0 to {len(CITY) - 1}"
    ):
        conditioned_walks(CITY, far, min_moves=1, max_moves=2, rng=np.random.default_rng(0))


# --- the tokenizer --------------------------------------------------------------------------------------------------


def test_one_token_per_word(tmp_path: Path) -> None:
    words = tokenizer(CITY)
    assert len(words) == 11 + len(CITY)
    assert words.convert_ids_to_tokens(range(13)) == [
        "<pad>",
        "<unk>",
        "end",
        *DIRECTIONS,
        "0",
        "1",
    ]
    assert (words.pad_token_id, words.unk_token_id, words.eos_token_id) == (PAD, 1, END)
    ids = words("12 30 N N E end")["input_ids"]
    assert ids == [23, 41, 3, 3, 5, 2]
    assert words.decode(ids) == "12 30 N N E end"
    assert words("12 nowhere NNE")["input_ids"] == [23, 1, 1]
    row = dataset()[0]
    assert words(words.decode(row["input_ids"]))["input_ids"] == row["input_ids"].tolist()
    words.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("12 30 N end <pad>")["input_ids"] == [23, 41, 3, 2, 0]
    assert again.decode(ids) == "12 30 N N E end"
    assert again.eos_token_id == END
    batch = again(["1 2 N", "3 4 N E end"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].shape == (2, 5)


def test_names_of_intersections_are_never_cut(tmp_path: Path) -> None:
    names = ("weekend", "dead-end", "N42", "end7", "O'Hare", "Ünter", "a.b")
    network = StreetNetwork(names, np.zeros(7), np.zeros(7), np.full((7, 8), -1))
    tokenizer(network).save_pretrained(tmp_path)
    for words in (tokenizer(network), AutoTokenizer.from_pretrained(tmp_path)):
        ids = words(" ".join(names) + " N end")["input_ids"]
        assert ids == [*range(FIRST_NODE, FIRST_NODE + 7), 3, END]
        assert words.decode(ids) == " ".join(names) + " N end"
