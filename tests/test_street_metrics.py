"""The street metrics against an exact world model, against models broken in one known way, and
against slow references."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import tiny_lm
from nextlat import BSTConfig, JTPConfig, NextLatConfig, NextTokenConfig, attach
from nextlat.backbone import Backbone
from nextlat.errors import NextLatError
from nextlat.results import Chart, Measurement
from nextlat.scores import effective_rank, paired_difference
from nextlat.tasks.dynamics_alone import driver
from nextlat.tasks.latent_rank import latent_rank
from nextlat.tasks.streets import rides
from nextlat.tasks.streets.map import read_map_record, reconstruct
from nextlat.tasks.streets.measuring import (
    continuation_probabilities,
    detour_robustness,
    identical_continuations,
    legal_positions,
    next_token_test,
    pair_draws,
    sampled_rides,
    sequence_compression,
    valid_trajectories,
)
from nextlat.tasks.streets.network import Pairs, StreetNetwork
from nextlat.tasks.streets.packing import END, FIRST_DIRECTION, FIRST_NODE
from nextlat.tasks.streets.rides import PrefixPairs, Prompts, Rides, prefix_pairs, ride
from nextlat.tasks.streets.sources import generate_city
from nextlat.tasks.streets.streets import StreetsConfig
from nextlat.tasks.streets.walks import Walks
from nextlat.tasks.task import PAD

MAX_MOVES = 24

# --- an exact world model -----------------------------------------------------------------------


@dataclass
class State:
    """What the world model remembers, one row a ride: source, destination, true intersection, moves
    made."""

    rows: np.ndarray

    def batch_select_indices(self, indices: Tensor) -> None:
        self.rows = self.rows[indices.numpy()]


class Oracle:
    """Knows the network and where it is; drives the shortest way.

    The state is (source, destination, intersection, moves made); logits: the best token 6, other
    legal tokens 0, all others -20. `change(logits_V, source, destination, here, made)` breaks it.
    """

    def __init__(self, network: StreetNetwork, change: Callable[..., None] | None = None) -> None:
        self.network, self.change = network, change
        self.backbone, self.device = self, torch.device("cpu")
        self.hops = network.hops_to(np.arange(len(network)))
        self.rows_read = 0

    def step(self, input_ids: Tensor, past: Any = None, /) -> tuple[Tensor, State]:
        ids = input_ids.numpy()
        self.rows_read += ids.size
        past = past or State(np.full((len(ids), 4), -1))
        states = np.empty((*ids.shape, 4))
        for t in range(ids.shape[1]):
            for s, token in zip(past.rows, ids[:, t], strict=True):
                if s[0] < 0:
                    s[0] = s[2] = token - FIRST_NODE
                elif s[1] < 0:
                    s[1], s[3] = token - FIRST_NODE, 0
                elif FIRST_DIRECTION <= token < FIRST_NODE:
                    s[2], s[3] = (
                        self.network.targets[s[2], token - FIRST_DIRECTION] if s[2] >= 0 else -1,
                        s[3] + 1,
                    )
            states[:, t] = past.rows
        return torch.from_numpy(states), past

    def next_token_logits(self, h: Tensor, /) -> Tensor:
        return torch.stack([self.logits(*map(int, state)) for state in h.reshape(-1, 4)]).view(
            *h.shape[:-1], -1
        )

    def logits(self, source: int, destination: int, here: int, made: int) -> Tensor:
        logits_V = torch.full((FIRST_NODE + len(self.network),), -20.0)
        if here >= 0 and destination >= 0:
            there = self.network.targets[here]
            logits_V[FIRST_DIRECTION:FIRST_NODE][torch.from_numpy(there >= 0)] = 0.0
            to_go = np.where(
                (there >= 0) & (self.hops[destination, there] >= 0),
                self.hops[destination, there],
                999,
            )
            best = END if here == destination else FIRST_DIRECTION + int(to_go.argmin())
            logits_V[best] = 6.0
            if self.change:
                self.change(logits_V, source, destination, here, made)
        return logits_V


def illegal_move(network: StreetNetwork, here: int) -> int:
    return FIRST_DIRECTION + int((network.targets[here] < 0).argmax())


def chaotic(network: StreetNetwork, legal_only: bool = False) -> Callable[..., None]:
    """Every intersection and moment has its own erratic wishes, among them illegal ones and a
    premature `end`."""

    def change(logits_V: Tensor, source: int, destination: int, here: int, made: int) -> None:
        wishes = np.random.default_rng([destination, here, made]).normal(0, 4, FIRST_NODE)
        logits_V[END:FIRST_NODE] += torch.from_numpy(wishes[END:]).float()
        if not legal_only:
            logits_V[END:FIRST_NODE].clamp_(min=-8.0 + float(wishes[0]))

    return change


@pytest.fixture(scope="module")
def city() -> StreetNetwork:
    return generate_city(rows=5, columns=5, seed=3)


@pytest.fixture(scope="module")
def pairs(city: StreetNetwork) -> Pairs:
    hops = city.hops_to(np.arange(len(city)))
    destination, source = np.nonzero((hops > 0) & (hops <= 14))
    keep = np.random.default_rng(0).permutation(len(source))[:120]
    return Pairs(source[keep], destination[keep])


@pytest.fixture(scope="module")
def prefixes(city: StreetNetwork) -> PrefixPairs:
    return prefix_pairs(city, 80, max_moves=16, seed=1)


def hops_between(city: StreetNetwork, pairs: Pairs) -> np.ndarray:
    return city.hops_to(np.arange(len(city)))[pairs.destination, pairs.source]


def greedy_rides(model, city: StreetNetwork, pairs: Pairs, max_moves: int, **options) -> Rides:
    return ride(model, city, Prompts.of_pairs(pairs), max_moves, **options)


def random_walks(network: StreetNetwork, count: int, seed: int) -> Walks:
    """Slow random walks; what lies beyond a walk's end is -1, and must never be read."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 16, count)
    nodes, moves = np.full((count, 17), -1), np.full((count, 16), -1)
    for i in range(count):
        nodes[i, 0] = rng.integers(len(network))
        for t in range(lengths[i]):
            moves[i, t] = rng.choice(np.flatnonzero(network.targets[nodes[i, t]] >= 0))
            nodes[i, t + 1] = network.targets[nodes[i, t], moves[i, t]]
    return Walks(lengths, nodes, moves, nodes[np.arange(count), lengths])


# --- the exact world model scores full marks ----------------------------------------------------


def test_the_exact_world_model_has_full_marks(city, pairs, prefixes):
    oracle = Oracle(city)
    assert next_token_test(oracle, city, random_walks(city, 60, 0)).value == 1
    assert valid_trajectories(oracle, city, pairs, MAX_MOVES).value == 1
    assert sequence_compression(oracle, city, prefixes, MAX_MOVES, samples=2).value == 1
    same = identical_continuations(oracle, city, prefixes, MAX_MOVES)
    assert [score.value for score in same] == [1, 1]
    for kind in ("random", "least_likely", "second_most_likely"):
        score = detour_robustness(oracle, city, pairs, MAX_MOVES, probability=0.75, kind=kind)
        assert (score.value, score.stderr) == (1, 0)
        assert score.per_item.shape == (len(pairs),)


# --- each metric loses exactly what a known fault costs -----------------------------------------


def test_next_token_test_counts_each_position_in_the_true_state(city, monkeypatch):
    """Illegal at one intersection, `end` at another: lost are exactly the positions there, but not
    `end` at a destination."""
    walks = random_walks(city, 80, 1)
    bad, premature = 7, 12

    def change(logits_V, source, destination, here, made):
        if here == bad:
            logits_V[illegal_move(city, bad)] = 50
        if here == premature:
            logits_V[END] = 50

    monkeypatch.setattr(rides, "BATCH", 7)
    score = next_token_test(Oracle(city, change), city, walks)
    lost = 0
    for n, walk in zip(walks.lengths, walks.nodes, strict=True):
        lost += sum(here == bad or (here == premature != walk[n]) for here in walk[: n + 1])
    assert lost > 20
    assert score.value == pytest.approx(1 - lost / (walks.lengths + 1).sum(), abs=1e-12)
    assert 0 < score.stderr < 0.1


def test_next_token_test_takes_a_move_or_end_at_a_destination_passed_on_the_way(city):
    """The walk source, d, e, d: `end` is legal at both visits of d, and so is going on; a node or
    padding token never is."""
    d, out = next((d, k) for d, k, e in city.edges.tolist() if d in city.targets[e])
    e = int(city.targets[d, out])
    back = int(np.flatnonzero(city.targets[e] == d)[0])
    source, into = next((s, k) for s, k, t in city.edges.tolist() if t == d and s != e)
    nodes, moves = np.array([[source, d, e, d]]), np.array([[into, out, back]])
    walk = Walks(np.array([3]), nodes, moves, np.array([d]))

    def share(token: int, **options) -> float:
        def change(logits_V, source, destination, here, made):
            logits_V[token] = 50

        return next_token_test(Oracle(city, change), city, walk, **options).value

    assert share(END) == 2 / 4
    assert share(FIRST_DIRECTION + out) == np.mean(
        [city.targets[x, out] >= 0 for x in (source, d, e, d)]
    )
    assert share(FIRST_NODE + d) == share(PAD) == 0
    # Where rides stop on arrival, `end` alone is legal there.
    legal = np.mean([city.targets[x, out] >= 0 and x != d for x in (source, d, e, d)])
    assert share(FIRST_DIRECTION + out, stop=True) == legal
    assert share(END, stop=True) == 2 / 4


def test_valid_trajectories_lose_a_missed_end_an_early_end_and_an_illegal_move(city, pairs):
    never_ends, too_early, lost_at = set(range(0, 6)), set(range(6, 12)), 13

    def change(logits_V, source, destination, here, made):
        if destination in never_ends:
            logits_V[END] = -50
        if destination in too_early and made == 1:
            logits_V[END] = 50
        if here == lost_at:
            logits_V[illegal_move(city, here)] = 50

    good = []
    oracle = Oracle(city)
    for source, destination in zip(pairs.source, pairs.destination, strict=True):
        way = [source]
        while way[-1] != destination:
            way.append(
                city.targets[
                    way[-1],
                    int(oracle.logits(0, destination, way[-1], 0).argmax()) - FIRST_DIRECTION,
                ]
            )
        legal = lost_at not in way
        good.append(
            legal
            and destination not in never_ends
            and not (destination in too_early and len(way) > 2)
        )
    score = valid_trajectories(Oracle(city, change), city, pairs, MAX_MOVES)
    np.testing.assert_array_equal(score.per_item, good)
    assert 0.2 < score.value < 0.8


def test_the_budget_of_moves_is_exact(city, pairs):
    """A shortest ride of n moves needs max_moves >= n; the `end` after them is no move."""
    for budget in (3, 6):
        score = valid_trajectories(Oracle(city), city, pairs, budget)
        np.testing.assert_array_equal(score.per_item, hops_between(city, pairs) <= budget)


def test_compression_loses_the_pairs_whose_model_remembers_the_source(city, prefixes):
    """A model that never ends rides from even sources: told apart are exactly the pairs with one
    such source."""

    def change(logits_V, source, destination, here, made):
        if source % 2 == 0:
            logits_V[END] = -50

    model = Oracle(city, change)
    even_first, even_second = prefixes.first.source % 2 == 0, prefixes.second.source % 2 == 0
    expected = even_first == even_second
    assert 0.2 < expected.mean() < 0.8
    same, valid = identical_continuations(model, city, prefixes, MAX_MOVES)
    np.testing.assert_array_equal(same.per_item, expected)
    np.testing.assert_array_equal(valid.per_item, ~even_first & ~even_second)
    # With epsilon 0.1 only the shortest way is accepted. An even second source cannot follow `end`;
    # an even first source goes on with some legal move where the second accepts only `end`.
    np.testing.assert_array_equal(
        sequence_compression(model, city, prefixes, MAX_MOVES, epsilon=0.1, samples=1).per_item,
        expected,
    )


def test_identical_nonsense_is_identical_but_not_valid(city, prefixes):
    def change(logits_V, source, destination, here, made):
        logits_V[illegal_move(city, here)] = 50

    same, valid = identical_continuations(Oracle(city, change), city, prefixes, MAX_MOVES)
    assert valid.value == 0
    # After the first illegal move the oracle has no opinion: both repeat one token.
    assert same.value > 0.9


def test_compression_asks_whether_the_second_accepts_what_the_first_says(city, prefixes):
    """Odd sources accept every legal token, even ones only the best: accepting more is fine,
    proposing more is not."""

    def change(logits_V, source, destination, here, made):
        if source % 2:
            logits_V[logits_V > -10] = 0.0

    model = Oracle(city, change)
    odd_first, odd_second = prefixes.first.source % 2 == 1, prefixes.second.source % 2 == 1
    score = sequence_compression(model, city, prefixes, MAX_MOVES, epsilon=0.1, samples=12)
    assert (
        score.per_item[~odd_first & odd_second].mean() > 0.9
    )  # a destination without `end` below epsilon apart
    assert score.per_item[odd_first & ~odd_second].mean() == 0
    assert score.per_item[odd_first == odd_second].mean() == 1


@pytest.mark.parametrize(("epsilon", "expected"), [(0.01, 1.0), (0.05, 0.0)])
def test_compression_threshold(city, prefixes, epsilon, expected):
    """The second gives every legal token of the first a probability of a few per cent: epsilon
    decides."""
    firsts = set(zip(prefixes.first.source.tolist(), prefixes.destination.tolist(), strict=True))
    seconds = set(zip(prefixes.second.source.tolist(), prefixes.destination.tolist(), strict=True))
    clean = np.array(
        [
            (a, d) not in seconds and (b, d) not in firsts
            for a, b, d in zip(
                prefixes.first.source, prefixes.second.source, prefixes.destination, strict=True
            )
        ]
    )

    def change(logits_V, source, destination, here, made):
        best = int(logits_V.argmax())
        if (source, destination) in seconds:
            logits_V[:] = -20.0
            logits_V[best] = 0.0
            logits_V[PAD] = float(np.log(0.97 / 0.03))  # 3 % for the best token

    score = sequence_compression(
        Oracle(city, change), city, prefixes, MAX_MOVES, epsilon=epsilon, samples=1
    )
    assert clean.sum() > 20
    assert score.per_item[clean].mean() == expected


def test_detours_lose_the_pairs_that_meet_a_blind_intersection(city, pairs):
    """Without detours the metric is valid trajectories; certain detours override every illegal wish
    that has an alternative."""

    def change(logits_V, source, destination, here, made):
        if here != destination:
            logits_V[illegal_move(city, here)] = 50

    model = Oracle(city, change)
    assert detour_robustness(model, city, pairs, MAX_MOVES, probability=0).value == 0
    rides = detour_robustness(
        model, city, pairs, MAX_MOVES, probability=1, kind="second_most_likely"
    )
    np.testing.assert_array_equal(
        rides.per_item, np.ones(len(pairs))
    )  # the runner-up is the shortest way


def test_an_open_loop_driver_is_lost_under_detours(city, pairs):
    """A model that recites the shortest way of its source, wherever it is, has perfect trajectories
    and no robustness."""
    oracle = Oracle(city)

    def recite(logits_V, source, destination, here, made):
        at = source
        for _ in range(made):
            step = int(oracle.logits(0, destination, at, 0).argmax())
            at = at if step == END else int(city.targets[at, step - FIRST_DIRECTION])
        logits_V[:] = -20.0
        logits_V[int(oracle.logits(0, destination, at, 0).argmax())] = 0.0

    model = Oracle(city, recite)
    assert valid_trajectories(model, city, pairs, MAX_MOVES).value == 1
    assert detour_robustness(model, city, pairs, MAX_MOVES, probability=0.75).value < 0.1


@pytest.mark.parametrize("kind", ["random", "least_likely", "second_most_likely"])
@pytest.mark.parametrize("legal_only", [True, False])
def test_detours_equal_a_slow_reference(city, pairs, kind, legal_only):
    model = Oracle(city, chaotic(city, legal_only))
    hops, probability, seed = city.hops_to(np.arange(len(city))), 0.4, 5
    expected = []
    for source, destination in zip(pairs.source.tolist(), pairs.destination.tolist(), strict=True):
        draws = np.random.default_rng([seed, source, destination]).random((MAX_MOVES + 1, 2))
        here, arrived = source, False
        for made in range(MAX_MOVES + 1):
            logits = model.logits(source, destination, here, made)
            token = int(logits.argmax())
            if token == END and here == destination:
                arrived = True
                break
            others = [
                d
                for d in range(8)
                if city.targets[here, d] >= 0
                and FIRST_DIRECTION + d != token
                and 0 <= hops[destination, city.targets[here, d]] <= MAX_MOVES - made - 1
            ]
            if draws[made, 0] < probability and others:
                if kind == "random":
                    token = FIRST_DIRECTION + others[int(draws[made, 1] * len(others))]
                else:
                    others.sort(
                        key=lambda d: float(logits[FIRST_DIRECTION + d]),
                        reverse=kind == "second_most_likely",
                    )
                    token = FIRST_DIRECTION + others[0]
            direction = token - FIRST_DIRECTION
            if not 0 <= direction < 8 or city.targets[here, direction] < 0 or made == MAX_MOVES:
                break
            here = int(city.targets[here, direction])
        expected.append(arrived)
    score = detour_robustness(
        model, city, pairs, MAX_MOVES, probability=probability, kind=kind, seed=seed
    )
    np.testing.assert_array_equal(score.per_item, expected)
    assert 0 < score.value < 1


def test_several_draws_of_detours_are_averaged_by_pair(city, pairs):
    """The first draw is that of a single one, and every other is an accident of its own."""
    model = Oracle(city, chaotic(city, legal_only=True))
    one, three = (
        detour_robustness(model, city, pairs, MAX_MOVES, probability=0.4, draws=draws)
        for draws in (1, 3)
    )
    assert three.per_item.shape == one.per_item.shape
    assert set(np.round(3 * three.per_item, 9)) == {0, 1, 2, 3}
    others = 3 * three.per_item - one.per_item
    assert set(np.round(others, 9)) <= {0, 1, 2}
    assert three.stderr < one.stderr


# --- batches, draws, pairs ------------------------------------------------------------------------


@pytest.mark.slow
def test_scores_do_not_depend_on_the_batch_or_on_the_other_pairs(
    city, pairs, prefixes, monkeypatch
):
    model = Oracle(city, chaotic(city))

    def measured(pairs: Pairs) -> list[np.ndarray]:
        return [
            m(model, city, pairs, MAX_MOVES).per_item
            for m in (valid_trajectories, detour_robustness)
        ]

    def compared() -> list[np.ndarray]:
        compressed = sequence_compression(model, city, prefixes, MAX_MOVES, epsilon=0.002)
        return [
            compressed.per_item,
            identical_continuations(model, city, prefixes, MAX_MOVES)[0].per_item,
        ]

    whole, together = measured(pairs), compared()
    np.testing.assert_array_equal(measured(pairs[40:80]), [x[40:80] for x in whole])
    monkeypatch.setattr(rides, "BATCH", 9)
    np.testing.assert_array_equal(measured(pairs), whole)
    np.testing.assert_array_equal(compared(), together)


def test_draws_belong_to_the_pair():
    a = pair_draws(3, (5, 2), np.array([1, 2, 1]), np.array([4, 4, 4]))
    assert a.shape == (3, 5, 2)
    np.testing.assert_array_equal(a[0], a[2])
    assert not np.array_equal(a[0], a[1])
    assert not np.array_equal(a[0], pair_draws(4, (5, 2), np.array([1]), np.array([4]))[0])


def test_finished_rides_leave_the_batch(city, pairs):
    """Work is proportional to the moves driven, not to the longest ride."""
    oracle = Oracle(city)
    assert valid_trajectories(oracle, city, pairs, MAX_MOVES).value == 1
    tokens_needed = int((hops_between(city, pairs) + 2).sum())
    assert tokens_needed <= oracle.rows_read < 1.2 * tokens_needed


def test_prefix_pairs_are_what_they_claim(city):
    count, max_moves = 300, 12
    p = prefix_pairs(city, count, max_moves=max_moves, seed=4)
    hops = city.hops_to(np.arange(len(city)))
    for prompts in (p.first, p.second):
        np.testing.assert_array_equal(prompts.intersections(city), p.intersection)
        np.testing.assert_array_equal(prompts.destination, p.destination)
        assert (prompts.source != prompts.destination).all()
        assert set(prompts.lengths) == set(range(1, 7))
    assert len(p) == count
    assert (p.first.source != p.second.source).all()
    to_go = hops[p.destination, p.intersection]
    assert to_go.min() == 1
    assert to_go.max() > 6
    assert (to_go <= p.room(max_moves)).all()
    stopping = prefix_pairs(city, count, max_moves=max_moves, seed=4, stop=True)
    for pairs, passes in ((p, True), (stopping, False)):
        through = []
        for prompts in (pairs.first, pairs.second):
            node = prompts.source.copy()
            for i in range(prompts.moves.shape[1]):
                going = i < prompts.lengths
                node[going] = city.targets[node[going], prompts.moves[going, i]]
                through.append((node == prompts.destination).any())
        assert any(through) == passes
    again, other = (prefix_pairs(city, count, max_moves=max_moves, seed=seed) for seed in (4, 5))
    np.testing.assert_array_equal(p.first.moves, again.first.moves)
    assert not np.array_equal(p.intersection, other.intersection)


def test_prefix_pairs_survive_places_that_no_street_leads_to():
    """A one-way street into a pair of squares: nothing leads back to node 0, and node 3 is a dead
    end."""
    targets = np.full((4, 8), -1)
    targets[0, 2], targets[1, 2], targets[2, 6], targets[2, 2] = 1, 2, 1, 3
    line = StreetNetwork(("a", "b", "c", "d"), np.zeros(4), np.arange(4) / 1000, targets)
    p = prefix_pairs(line, 20, max_moves=8)
    for prompts in (p.first, p.second):
        np.testing.assert_array_equal(prompts.intersections(line), p.intersection)


def test_prefix_pairs_refuse_a_network_that_has_none():
    targets = np.full((2, 8), -1)
    targets[0, 2], targets[1, 6] = 1, 0
    two = StreetNetwork(("a", "b"), np.zeros(2), np.arange(2) / 1000, targets)
    with pytest.raises(NextLatError, match="found 0 of 5"):
        prefix_pairs(two, 5, max_moves=10)


# --- a real transformer -------------------------------------------------------------------------


class Plain:
    """A bare transformer as a street model."""

    def __init__(self, city: StreetNetwork, family: str = "llama") -> None:
        self.lm = tiny_lm(family, vocab_size=FIRST_NODE + len(city), seed=2)
        self.backbone, self.device = Backbone(self.lm), torch.device("cpu")

    def step(self, input_ids: Tensor, past: Any = None, /) -> tuple[Tensor, Any]:
        return self.backbone.step(input_ids, past)

    def next_token_logits(self, h: Tensor, /) -> Tensor:
        return self.backbone.head(h)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rides_with_a_cache_equal_full_forwards(city, prefixes, family, monkeypatch):
    """Prefixes of many lengths in one batch, rides that finish and leave it: tokens as if each ride
    were alone."""
    model, rows = Plain(city, family), np.arange(24)
    prompts = prefixes.first[rows]
    budget = np.random.default_rng(0).integers(8, MAX_MOVES, len(rows))
    monkeypatch.setattr(rides, "BATCH", 16)
    told = ride(model, city, prompts, budget, leave_map=True)
    assert len(set(told.lengths.tolist())) > 3
    for i in rows:
        ids = prompts.tokens()[i, : 2 + prompts.lengths[i]].tolist()
        expected: list[int] = []
        while len(expected) <= budget[i] - prompts.lengths[i]:
            with torch.no_grad():
                expected.append(int(model.lm(torch.tensor([ids])).logits[0, -1].argmax()))
            ids.append(expected[-1])
            if not FIRST_DIRECTION <= expected[-1] < FIRST_NODE:
                break
        assert told.tokens[i, : told.lengths[i]].tolist() == expected
        assert (told.tokens[i, told.lengths[i] :] == PAD).all()


def test_continuation_probabilities_equal_full_forwards(city, prefixes, monkeypatch):
    model, rows = Plain(city), np.arange(10)
    first, second = prefixes.first[rows], prefixes.second[rows]
    told = ride(Oracle(city), city, first, MAX_MOVES)
    monkeypatch.setattr(rides, "BATCH", 4)
    p = continuation_probabilities(model, second, told)
    for i in rows:
        prefix = second.tokens()[i, : 2 + second.lengths[i]].tolist()
        said = told.tokens[i, : told.lengths[i]]
        with torch.no_grad():
            logits = model.lm(torch.tensor([prefix + said.tolist()])).logits[
                0, len(prefix) - 1 : -1
            ]
        np.testing.assert_allclose(
            p[i, : len(said)], logits.softmax(-1)[np.arange(len(said)), said], rtol=1e-4
        )
        assert (p[i, len(said) :] == 1).all()


def test_latent_rank_is_the_rank_of_all_states_but_the_padding(city):
    model = Plain(city)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, FIRST_NODE + len(city), (12, 20), generator=generator)
    positions = torch.arange(20).remainder(7).repeat(12, 1)
    mask = torch.ones_like(ids)
    mask[::2, 15:] = 0
    score = latent_rank(model, ids, positions, mask, batch_size=5, groups=4)
    states = []
    for row in range(12):
        for start in range(0, 20, 7):
            stop = min(start + 7, 20, int(mask[row].sum()))
            if start < stop:
                with torch.no_grad():
                    states.append(
                        model.lm.base_model(ids[row : row + 1, start:stop], use_cache=False)[0][0]
                    )
    assert score.value == pytest.approx(effective_rank(torch.cat(states)), rel=1e-4)
    assert score.per_item.shape == (4,)
    assert 0 < score.stderr < score.value
    garbage = ids.clone()
    garbage[mask == 0] = 5
    assert latent_rank(model, garbage, positions, mask, groups=4).value == pytest.approx(
        score.value, rel=1e-6
    )


def test_latent_rank_is_of_the_transformer_whatever_the_objective_makes_of_its_states(city):
    lm, ids = (
        Plain(city).lm,
        torch.randint(
            3, FIRST_NODE + len(city), (8, 12), generator=torch.Generator().manual_seed(0)
        ),
    )
    values = [
        latent_rank(attach(lm, config), ids, groups=2).value
        for config in (NextTokenConfig(), JTPConfig(), BSTConfig())
    ]
    assert values == [values[0]] * 3


def test_two_models_are_compared_on_the_same_accidents(city, pairs):
    """The same model twice differs by nothing at all, detours included; an oracle against a chaotic
    one by what is lost."""
    good, bad = Oracle(city), Oracle(city, chaotic(city))
    same = paired_difference(
        *(detour_robustness(good, city, pairs, MAX_MOVES, seed=1) for _ in range(2))
    )
    assert same.value == same.stderr == 0
    score = detour_robustness(bad, city, pairs, MAX_MOVES, seed=1)
    assert paired_difference(
        detour_robustness(good, city, pairs, MAX_MOVES, seed=1), score
    ).value == pytest.approx(1 - score.value)


def test_rides_are_given_as_sequences(city, pairs):
    told, hops = greedy_rides(Oracle(city), city, pairs, MAX_MOVES), hops_between(city, pairs)
    for (source, destination, moves), fewest in zip(told.sequences(pairs)[:10], hops, strict=False):
        assert len(moves) == fewest
        row = [np.array([x]) for x in (source, destination, moves, len(moves))]
        assert Prompts(*row).intersections(city) == [destination]
    # Out of moves: not closed, or cut, wherever it has come; the token too much is no move.
    short = greedy_rides(Oracle(city), city, pairs, 3)
    far = int(hops.argmax())
    source, destination, whole = told.sequences(pairs)[far]
    assert short.sequences(pairs)[far] == (source, destination, None)
    assert short.sequences(pairs, cut=True)[far] == (source, None, whole[:3])
    near = int(hops.argmin())
    assert short.sequences(pairs, cut=True)[near] == told.sequences(pairs)[near]


def test_a_ride_is_legal_up_to_its_last_move(city, pairs):
    """An illegal move or an early `end` is a fault, an illegal token after the last move is none,
    and neither is a missing `end`."""

    def change(logits_V, source, destination, here, made):
        if destination % 3 == 0 and made == 1:
            logits_V[illegal_move(city, here)] = 50
        if destination % 3 == 1 and made == 1:
            logits_V[END] = 50
        if destination % 3 == 2 and made == 2:
            logits_V[illegal_move(city, here)] = 50

    hops, kind = hops_between(city, pairs), pairs.destination % 3
    for leave_map in (True, False):
        rides = greedy_rides(Oracle(city, change), city, pairs, 2, leave_map=leave_map)
        home = (kind == 1) & (hops == 1)
        np.testing.assert_array_equal(rides.legal, home | (kind == 2))
        np.testing.assert_array_equal(rides.real, kind != 0)  # wherever it ends
        longer = greedy_rides(Oracle(city, change), city, pairs, 3, leave_map=leave_map)
        np.testing.assert_array_equal(longer.legal, home | ((kind == 2) & (hops < 2)))


def test_the_map_of_the_exact_world_model_is_the_city(city, pairs):
    found = reconstruct(
        city, greedy_rides(Oracle(city), city, pairs, MAX_MOVES, leave_map=True).sequences(pairs)
    )
    assert found.invented == []
    assert found.explained == len(pairs)
    assert len(found.used) > 0.5 * len(city.edges)


def test_a_ride_ends_where_it_leaves_the_map_unless_told_to_go_on(city, pairs):
    def change(logits_V, source, destination, here, made):
        if made == 0:
            logits_V[illegal_move(city, here)] = 50

    model = Oracle(city, change)
    ended = greedy_rides(model, city, pairs[:5], MAX_MOVES)
    assert (ended.lengths == 1).all()
    assert not ended.arrived.any()
    gone_on = greedy_rides(model, city, pairs[:5], MAX_MOVES, leave_map=True)
    assert (gone_on.lengths == 2).all()  # the lost oracle then says PAD, which is no move
    np.testing.assert_array_equal(gone_on.tokens[:, 0], ended.tokens[:, 0])


def test_a_ride_that_left_the_map_never_returns(city):
    """After an illegal move the place is nowhere, not the last intersection (index -1)."""
    last = len(city) - 1
    direction = int((city.targets[last] >= 0).argmax())
    destination, source = int(city.targets[last, direction]), 0
    script = np.array([illegal_move(city, source), FIRST_DIRECTION + direction, END])
    prompts = Prompts.of_pairs(Pairs(np.array([source]), np.array([destination])))
    told = ride(
        Oracle(city),
        city,
        prompts,
        MAX_MOVES,
        choose=lambda step: script[[step.made]],
        leave_map=True,
    )
    np.testing.assert_array_equal(told.tokens[0, :3], script)
    assert not told.arrived[0]


def test_sampled_rides_stay_among_the_tokens_above_the_cut(city, pairs, monkeypatch):
    """The oracle gives every illegal token next to nothing: what is drawn from it is legal, varied,
    and the same every time."""

    def sampled(epsilon: float = 1e-3, seed: int = 1) -> Rides:
        return sampled_rides(Oracle(city), city, pairs, MAX_MOVES, epsilon=epsilon, seed=seed)

    told = sampled()
    for (source, destination, moves), arrived in zip(
        told.sequences(pairs), told.arrived, strict=True
    ):
        here = source
        for move in moves or []:
            here = city.targets[here, move]
            assert here >= 0
        assert not arrived or here == destination
    assert (sampled(seed=2).tokens != told.tokens).any()
    # Only the best token is above a cut of 0.9.
    greedy = greedy_rides(Oracle(city), city, pairs, MAX_MOVES)
    assert (sampled(epsilon=0.9).tokens == greedy.tokens).all()
    monkeypatch.setattr(rides, "BATCH", 7)
    assert (sampled().tokens == told.tokens).all()


# --- dynamics alone -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nextlat(city):
    return attach(Plain(city).lm, NextLatConfig(horizon=2))


def test_the_dynamics_alone_drive_from_the_state_after_source_and_destination(
    city, pairs, prefixes, nextlat, monkeypatch
):
    """In batches that shrink, with prefixes of many lengths: as the rollout p_psi(h, x) of each
    ride alone."""
    alone, embed = driver(nextlat, "dynamics", 2), nextlat.lm.get_input_embeddings()
    monkeypatch.setattr(rides, "BATCH", 8)
    for prompts in (Prompts.of_pairs(pairs[:20]), prefixes.first[np.arange(20)]):
        told = ride(alone, city, prompts, 12, leave_map=True)
        assert len(set(told.lengths.tolist())) > 1
        for i in range(20):
            ids = torch.from_numpy(prompts.tokens()[i : i + 1, : 2 + prompts.lengths[i]])
            expected: list[int] = []
            with torch.no_grad():
                h_BD = nextlat.lm.base_model(ids[:, :2]).last_hidden_state[:, -1]
                for token in ids[0, 2:]:
                    h_BD = nextlat.objective.dynamics(h_BD, embed(token[None]))
                while len(expected) <= 12 - prompts.lengths[i]:
                    expected.append(int(nextlat.lm.lm_head(h_BD).argmax()))
                    if not FIRST_DIRECTION <= expected[-1] < FIRST_NODE:
                        break
                    h_BD = nextlat.objective.dynamics(h_BD, embed(torch.tensor(expected[-1:])))
            assert told.tokens[i, : told.lengths[i]].tolist() == expected


def test_only_recurrent_drafters_drive_alone(city, nextlat):
    assert driver(nextlat, "transformer", 2) is nextlat
    for config in (NextTokenConfig(), JTPConfig()):
        assert driver(attach(Plain(city).lm, config), "dynamics", 2) is None
    nextlat.train()
    greedy_rides(driver(nextlat, "dynamics", 2), city, Pairs(np.array([0]), np.array([1])), 3)
    assert nextlat.training and nextlat.objective.dynamics.training


def test_positions_of_the_next_token_test(city):
    walks = random_walks(city, 40, seed=3)
    legal = legal_positions(Plain(city), city, walks)
    np.testing.assert_array_equal(
        np.isnan(legal), np.arange(legal.shape[1]) > walks.lengths[:, None]
    )
    score = next_token_test(Plain(city), city, walks)
    assert score.value == pytest.approx(np.nansum(legal) / (walks.lengths + 1).sum())


# --- the task -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random-walks", "stop-on-arrival"])
def test_drivers_and_lengths_are_variants_of_every_metric(kind):
    config = StreetsConfig(
        rows=4, columns=4, rides=kind, min_moves=1, max_moves=8, row_length=32, held_out=20,
        tests=10, multiples=(2, 4), dynamics_alone=True,
    )  # fmt: skip
    task = config.build()
    assert task.max_length == 4 * 8 + 3
    keys = [metric.key for metric in task.metrics]
    assert len(set(keys)) == len(keys) == 9 * 6 + 1
    assert keys[:9] == [metric.key for metric in StreetsConfig(rows=4).build().metrics[:9]]
    assert {"legal_rides", "legal_rides[length=32]", "legal_rides[driver=dynamics]"} <= set(keys)
    for metric in task.metrics:
        if metric.parameters.get("driver") == "dynamics":
            other = {k: v for k, v in metric.parameters.items() if k != "driver"}
            assert metric.counterpart == metric.model_copy(update={"parameters": other}).key
            assert metric.counterpart in keys
    lm = tiny_lm("llama", vocab_size=len(task.tokenizer), seed=2)
    nextlat, baseline = attach(lm, NextLatConfig(horizon=1)), attach(lm, NextTokenConfig())
    measured = {
        name: [x for measure in task.measures().values() for x in measure(model)]
        for name, model in (("nextlat", nextlat), ("baseline", baseline))
    }
    metrics = {
        name: [x.metric.key for x in found if isinstance(x, Measurement)]
        for name, found in measured.items()
    }
    assert sorted(metrics["nextlat"]) == sorted(keys)
    assert metrics["baseline"] == [key for key in metrics["nextlat"] if "dynamics" not in key]
    for name, lines in (("nextlat", 2), ("baseline", 1)):
        [chart] = [x for x in measured[name] if isinstance(x, Chart)]
        assert len(chart.lines) == lines
        assert 8 < len(chart.lines[0].values) <= 4 * 8 + 1
        assert all(0 <= value <= 1 for line in chart.lines for value in line.values)
    pictures = {picture.file: content for picture, content in task.artifacts(nextlat)}
    assert set(pictures) == {
        "map.json", "map-transformer-16.json", "map-transformer-32.json",
        "map-dynamics-8.json", "map-dynamics-16.json", "map-dynamics-32.json",
    }  # fmt: skip
    assert [p.file for p, _ in task.artifacts(baseline)] == [f for f in pictures if "dyn" not in f]


@pytest.mark.parametrize("kind", ["random-walks", "stop-on-arrival"])
def test_maps_follow_rides_without_an_end_where_those_of_training_are_cut(kind):
    config = StreetsConfig(
        rows=4, columns=4, rides=kind, min_moves=1, max_moves=8, row_length=32, held_out=20,
    )  # fmt: skip
    task = config.build()

    def change(logits_V, source, destination, here, made):
        logits_V[END] = -50

    [(_, record)] = task.artifacts(Oracle(task.network, change))
    counts = record["counts"]
    assert counts["invented"] == counts["failed"] == counts["astray"] == 0
    rides = counts["explained"] + counts["unclosed"]
    assert (counts["explained"], counts["unclosed"]) == (
        (rides, 0) if kind == "stop-on-arrival" else (0, rides)
    )


def test_detours_of_several_probabilities_and_kinds():
    config = StreetsConfig(
        rows=4, columns=4, max_moves=8, row_length=32, held_out=20, tests=10,
        detour_probability=(0.01, 0.75), detour_kinds=("random", "second_most_likely"),
        detour_draws=3,
    )  # fmt: skip
    task = config.build()
    metrics = [metric for metric in task.metrics if metric.name == "detour_robustness"]
    assert [metric.title for metric in metrics] == [
        "Random detours, probability 0.01",
        "Second most likely detours, probability 0.01",
        "Random detours",
        "Second most likely detours",
    ]
    assert [metric.published for metric in metrics] == [None, None, "detour_robustness", None]
    assert "Mean over 3 draws for each pair" in metrics[0].definition
    found = list(task.measures()["detours"](Oracle(task.network)))
    assert [m.metric for m in found] == metrics
    assert [m.score.value for m in found] == [1, 1, 1, 1]


def test_the_task_declares_what_the_paper_reports():
    config = StreetsConfig(rows=4, columns=4, max_moves=12, row_length=32, held_out=20, tests=10)
    task = config.build()
    keys = [metric.key for metric in task.metrics]
    assert "detour_robustness[kind=least_likely, probability=0.75]" in keys
    assert len(set(keys)) == len(keys)
    figures = task.published.figures
    assert {metric.published for metric in task.metrics} - {None} == set(figures)
    assert figures["effective_latent_rank"].by_method == {
        "GPT": 160.1,
        "MTP": 57.7,
        "JTP": 215.8,
        "NextLat": 52.7,
    }
    [(picture, content)] = task.artifacts(Plain(task.network))
    assert (picture.kind, picture.file) == ("map", "map.json")
    network, _ = read_map_record(json.loads(json.dumps(content)))
    assert network.fingerprint() == task.fingerprint()
    np.testing.assert_array_equal(
        torch.stack(task.prompts(3)) - FIRST_NODE,
        np.stack([task.pairs.source, task.pairs.destination], axis=1)[:3],
    )
