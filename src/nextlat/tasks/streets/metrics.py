"""The world-model metrics of taxi rides: does a model that predicts legal moves also know where it
is?

Each is a function of a model and a true street network that returns a `Score` over pairs or
sequences. Random draws come from a stream of their own for every pair (seeded by the seed and the
pair itself), so two models meet the same accidents, in whatever batches. Sources: Vafa et al.,
"Evaluating the World Model Implicit in a Generative Model", arXiv 2406.03689; Teoh et al.,
"Next-Latent Prediction Transformers Learn Compact World Models", arXiv 2511.05963.

Shapes: P pairs, B rides of the running batch, T tokens, D width, V vocabulary, L moves, N
    intersections.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from nextlat.errors import NextLatError
from nextlat.scores import Score, mean_score, ratio_score
from nextlat.tasks.streets.network import StreetNetwork
from nextlat.tasks.streets.prefixes import PrefixPairs
from nextlat.tasks.streets.rides import (
    NOWHERE,
    Prompts,
    Rides,
    SequenceModel,
    Step,
    greedy,
    inference,
    ride,
)
from nextlat.tasks.streets.walks import END, FIRST_DIRECTION, FIRST_NODE, Pairs

DetourKind = Literal["random", "least_likely", "second_most_likely"]
LOGIT_ELEMENTS = 1 << 24  # logits held at once while sequences are scored (64 MiB in fp32)


def next_token_test(
    model: SequenceModel,
    network: StreetNetwork,
    lengths: np.ndarray,
    nodes: np.ndarray,
    moves: np.ndarray,
    *,
    batch_size: int = 256,
) -> Score:
    """Share of teacher-forced positions of held-out walks whose most likely token is legal in the
    true state.

    The next-token test of Vafa et al. A walk of n moves has n + 1 positions: before each move and
    before `end`. Legal are the directions that the true intersection has, and `end` exactly at the
    destination; at the destination both are, for a random walk may pass through it and return. The
    error is clustered by walk.

    Args:
        lengths, nodes, moves: walks as `random_walks` gives them: (P,), (P, L + 1), (P, L).
    """
    rows = np.arange(len(lengths))
    prompts = Prompts(nodes[:, 0], nodes[rows, lengths], moves, lengths)
    hits = np.zeros(len(lengths))
    with inference(model):
        for chunk, position, logits_MV in _forced_logits(
            model, prompts, prompts.lengths, batch_size
        ):
            token = logits_MV.argmax(-1).cpu().numpy()
            here = nodes[chunk, position]
            legal = (token == END) & (here == prompts.destination[chunk])
            is_move = (token >= FIRST_DIRECTION) & (token < FIRST_NODE)
            legal[is_move] = (
                network.targets[here[is_move], token[is_move] - FIRST_DIRECTION] != NOWHERE
            )
            np.add.at(hits, chunk, legal)
    return ratio_score(hits, lengths + 1)


def greedy_rides(
    model: SequenceModel,
    network: StreetNetwork,
    pairs: Pairs,
    max_moves: int,
    *,
    batch_size: int = 256,
    leave_map: bool = False,
) -> Rides:
    """Greedy rides from source to destination.

    `leave_map` drives on after an illegal move, as the tokens say: what the reconstruction of the
    map is made from.
    """
    prompts = Prompts.of_pairs(pairs.source, pairs.destination)
    return ride(model, network, prompts, max_moves, leave_map=leave_map, batch_size=batch_size)


def sampled_rides(
    model: SequenceModel,
    network: StreetNetwork,
    pairs: Pairs,
    max_moves: int,
    *,
    epsilon: float = 0.01,
    seed: int = 0,
    batch_size: int = 256,
) -> Rides:
    """One ride a pair that the model holds possible: every token drawn among those of probability
    above `epsilon`.

    The cut is that of the compression test (`sequence_compression`). Rides that leave the true map
    are driven on: these are what the map in the model's head is rebuilt from, mistakes that it
    would make now and then included.
    """
    draws = pair_draws(
        seed, (max_moves + 1,), np.arange(len(pairs)), pairs.source, pairs.destination
    )
    prompts = Prompts.of_pairs(pairs.source, pairs.destination)
    choose = partial(_sample, epsilon=epsilon, draws=draws, begun=prompts.lengths)
    return ride(
        model, network, prompts, max_moves, choose=choose, leave_map=True, batch_size=batch_size
    )


def valid_trajectories(
    model: SequenceModel,
    network: StreetNetwork,
    pairs: Pairs,
    max_moves: int,
    *,
    batch_size: int = 256,
) -> Score:
    """Share of pairs for which greedy generation is legal move by move and ends, with `end`, at the
    destination.

    Arriving is not enough: the model must say `end` there (it may pass the destination and return),
    within `max_moves`, the longest training walk. Source: arXiv 2511.05963, Manhattan, "valid
    trajectories"; after Vafa et al.
    """
    return mean_score(greedy_rides(model, network, pairs, max_moves, batch_size=batch_size).arrived)


def detour_robustness(
    model: SequenceModel,
    network: StreetNetwork,
    pairs: Pairs,
    max_moves: int,
    *,
    probability: float = 0.75,
    kind: DetourKind = "random",
    seed: int = 0,
    batch_size: int = 256,
) -> Score:
    """Share of pairs that still arrive legally when each step is replaced, with a probability, by
    another legal move.

    The detours of Vafa et al.; probability 0.75 in arXiv 2511.05963. At every step of greedy
    generation, with `probability`, the model's token gives way to a legal direction other than its
    own from which the destination can still
    be reached within the moves left: a uniformly random one (`random`), the least likely one under
    the model (`least_likely`), or the most likely one (`second_most_likely`). Where there is none,
    the model's own token stands. An illegal token, or `end` elsewhere than at the destination,
    fails at a step without a detour, and is overridden by one. `end` at the destination ends the
    ride with success always: a passenger who has arrived is not driven on.

    The two draws of every step (whether, and which) are made in advance for every pair, from the
    seed and the pair alone.

    Raises:
        NextLatError: an unknown kind, or a probability outside [0, 1].
    """
    if kind not in get_args(DetourKind):
        raise NextLatError(
            f"unknown kind of detour {kind!r}: choose among {', '.join(get_args(DetourKind))}."
        )
    if not 0 <= probability <= 1:
        raise NextLatError(
            f"a detour probability of {probability} is none: give a number from 0 to 1."
        )
    draws = pair_draws(seed, (max_moves + 1, 2), pairs.source, pairs.destination)
    places, place_of = np.unique(pairs.destination, return_inverse=True)
    hops = network.hops_to(places)

    def choose(step: Step) -> np.ndarray:
        token = greedy(step)
        there = network.targets[step.nodes]
        to_go = hops[place_of[step.rows][:, None], there]
        open_B8 = (there != NOWHERE) & (to_go >= 0) & (to_go < (max_moves - step.made)[:, None])
        open_B8 &= np.arange(8) != (token - FIRST_DIRECTION)[:, None]
        whether, which = draws[step.rows, step.made].T
        home = (token == END) & (step.nodes == pairs.destination[step.rows])
        detour = (whether < probability) & open_B8.any(axis=1) & ~home
        if kind == "random":
            rank = np.minimum((which * open_B8.sum(axis=1)).astype(np.int64), 7)
            direction = (open_B8.cumsum(axis=1) > rank[:, None]).argmax(axis=1)
        else:
            sign = 1.0 if kind == "second_most_likely" else -1.0
            logits_B8 = sign * step.logits_BV[:, FIRST_DIRECTION:FIRST_NODE].double().cpu().numpy()
            direction = np.where(open_B8, logits_B8, -np.inf).argmax(axis=1)
        return np.where(detour, direction + FIRST_DIRECTION, token)

    prompts = Prompts.of_pairs(pairs.source, pairs.destination)
    return mean_score(
        ride(model, network, prompts, max_moves, choose=choose, batch_size=batch_size).arrived
    )


def sequence_compression(
    model: SequenceModel,
    network: StreetNetwork,
    prefixes: PrefixPairs,
    max_moves: int,
    *,
    epsilon: float = 0.01,
    samples: int = 5,
    length: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> Score:
    """Share of prefix pairs whose sampled continuations the model cannot tell apart: the original
    test.

    Sequence compression precision of Vafa et al., approximated by sampling as there: both prefixes
    lead to the same state of the world, so each continuation that the model accepts after the first
    it must accept after the second. A continuation is accepted when each of its tokens has
    probability above `epsilon`. Continuations of the first are therefore drawn from its next-token
    distributions cut at `epsilon` and renormalised (the most likely token where none exceeds it); a
    pair passes when every token of every sample has probability above `epsilon` after the second.
    Legality does not enter.

    Args:
        prefixes: pairs of prefixes that reach one intersection with one destination
            (`prefix_pairs`).
        max_moves: a continuation stops with `end`, or when the longer prefix has this many moves in
            all.
        epsilon: 0.01 in the original.
        samples: continuations a pair; a pair that fails one is not asked again, so poor models are
            scored faster.
        length: tokens of a continuation at most; None = as long as `max_moves` lets it be.
    """
    limit = (
        prefixes.room(max_moves) + 1
        if length is None
        else np.minimum(prefixes.room(max_moves) + 1, length)
    )
    keys = (
        prefixes.first.source,
        prefixes.second.source,
        prefixes.destination,
        prefixes.intersection,
    )
    draws = pair_draws(seed, (samples, max_moves + 1), *keys)
    passed = np.ones(len(prefixes), dtype=bool)
    for sample in range(samples):
        alive = np.flatnonzero(passed)
        first, second = prefixes.first[alive], prefixes.second[alive]
        choose = partial(_sample, epsilon=epsilon, draws=draws[alive, sample], begun=first.lengths)
        budget = first.lengths + limit[alive] - 1
        told = ride(
            model, network, first, budget, choose=choose, leave_map=True, batch_size=batch_size
        )
        p = continuation_probabilities(model, second, told, batch_size=batch_size)
        passed[alive] = (p > epsilon).all(axis=1)
    return mean_score(passed)


@dataclass(frozen=True)
class Continuations:
    """`identical`: greedy continuations equal. `identical_valid`: equal, legal, and closed with
    `end` at the destination."""

    identical: Score
    identical_valid: Score


def identical_continuations(
    model: SequenceModel,
    network: StreetNetwork,
    prefixes: PrefixPairs,
    max_moves: int,
    *,
    batch_size: int = 256,
) -> Continuations:
    """Share of prefix pairs with the same greedy continuation, token for token: the wording of
    arXiv 2511.05963.

    Continuations are compared up to `end` (or a token that is no move), at most until the longer
    prefix has `max_moves` moves in all. A model can be identically wrong, early in training above
    all; `identical_valid` counts a pair only if the common continuation is legal and ends, with
    `end`, at the destination.
    """
    limit = prefixes.room(max_moves)
    told = [
        ride(
            model, network, prompts, prompts.lengths + limit, leave_map=True, batch_size=batch_size
        )
        for prompts in (prefixes.first, prefixes.second)
    ]
    identical = (told[0].tokens == told[1].tokens).all(axis=1)
    return Continuations(
        mean_score(identical), mean_score(identical & told[0].arrived & told[1].arrived)
    )


def pair_draws(seed: int, shape: tuple[int, ...], *keys: np.ndarray) -> np.ndarray:
    """(P, *shape) uniform numbers in [0, 1): row i depends on the seed and on the i-th entries of
    the keys, on nothing else."""
    return np.stack(
        [
            np.random.default_rng([seed, *map(int, key)]).random(shape)
            for key in zip(*keys, strict=True)
        ]
    )


def continuation_probabilities(
    model: SequenceModel, prompts: Prompts, told: Rides, *, batch_size: int = 256
) -> np.ndarray:
    """(P, L) probability of every token of `told.tokens` after other prompts, given those before
    it; 1 on the padding."""
    width = int(prompts.lengths.max(initial=0) + told.lengths.max(initial=1)) - 1
    moves = np.zeros((len(prompts), width), dtype=np.int64)
    moves[:, : prompts.moves.shape[1]] = prompts.moves[:, :width]
    row, index = np.nonzero(
        np.arange(told.tokens.shape[1]) < (told.lengths - 1)[:, None]
    )  # the last token is only scored
    moves[row, prompts.lengths[row] + index] = told.tokens[row, index] - FIRST_DIRECTION
    whole = Prompts(prompts.source, prompts.destination, moves, prompts.lengths + told.lengths - 1)
    p = np.ones(told.tokens.shape)
    with inference(model):
        for chunk, position, logits_MV in _forced_logits(
            model, whole, told.lengths - 1, batch_size
        ):
            index = position - prompts.lengths[chunk]
            token = torch.from_numpy(told.tokens[chunk, index]).to(logits_MV.device)
            log_p = logits_MV.float().log_softmax(-1).gather(1, token[:, None]).squeeze(1)
            p[chunk, index] = log_p.exp().double().cpu().numpy()
    return p


def _forced_logits(
    model: SequenceModel, prompts: Prompts, before_end: np.ndarray, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray, Tensor]]:
    """Teacher-forced logits at the last `before_end + 1` positions of each prompt, in pieces of M
    of them.

    Yields (rows (M,), moves made (M,), logits_MV). Rows of a batch are padded on the right, which a
    causal model cannot see; rows of like length share a batch.
    """
    order, ids = np.argsort(prompts.lengths, kind="stable"), prompts.tokens()
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        lengths = prompts.lengths[rows][:, None]
        h_BTD, _ = model.step(
            torch.from_numpy(ids[rows, : 2 + int(lengths.max())]).to(model.device), None
        )
        made = np.arange(int(lengths.max()) + 1)
        row, position = np.nonzero(
            (made <= lengths) & (made >= lengths - before_end[rows][:, None])
        )
        vocabulary = model.next_token_logits(h_BTD[:1, -1]).shape[-1]
        piece = max(1, LOGIT_ELEMENTS // vocabulary)
        for done in range(0, len(row), piece):
            part = slice(done, done + piece)
            at_row, at = (torch.from_numpy(x[part]).to(model.device) for x in (row, position))
            yield rows[row[part]], position[part], model.next_token_logits(h_BTD[at_row, at + 1])


def _sample(step: Step, epsilon: float, draws: np.ndarray, begun: np.ndarray) -> np.ndarray:
    """(B,) tokens from the distributions cut at epsilon, by the uniform numbers draws[row, tokens
    since `begun`].

    Where no token exceeds epsilon, the most likely one.
    """
    p = step.logits_BV.float().softmax(-1)
    cumulative = torch.where(p > epsilon, p, 0.0).double().cumsum(-1)
    u = torch.from_numpy(draws[step.rows, step.made - begun[step.rows]]).to(cumulative.device)
    drawn = (cumulative > u[:, None] * cumulative[:, -1:]).long().argmax(-1)
    return torch.where(cumulative[:, -1] > 0, drawn, p.argmax(-1)).cpu().numpy()
