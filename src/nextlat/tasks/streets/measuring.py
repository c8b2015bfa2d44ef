"""The scores of the `metrics`: functions of a model and the true street network.

Random draws come from a stream of their own for every pair (seeded by the seed and the pair
itself), so that two models meet the same accidents, in whatever batches.

Shapes: P pairs or walks, B rides of the running batch, M scored positions, L tokens of a ride, D
width, V vocabulary.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nextlat.backbone import evaluation_mode
from nextlat.scores import Score, mean_score, ratio_score
from nextlat.tasks.streets.metrics import PAPER_PROBABILITY, DetourKind
from nextlat.tasks.streets.network import NOWHERE, Pairs, StreetNetwork
from nextlat.tasks.streets.packing import END, FIRST_DIRECTION, FIRST_NODE
from nextlat.tasks.streets.rides import PrefixPairs, Prompts, Rides, Step, greedy, ride
from nextlat.tasks.streets.walks import Walks
from nextlat.tasks.task import SequenceModel

LOGIT_ELEMENTS = 1 << 24  # logits held at once while sequences are scored (64 MiB in fp32)


def legal_positions(
    model: SequenceModel, network: StreetNetwork, walks: Walks, *, stop: bool = False
) -> np.ndarray:
    """(P, L + 1) for NEXT_TOKEN_TEST: 1 where the most likely token is legal, 0 where it is not,
    NaN beyond the end.

    A walk of n moves has n + 1 positions: before each move and after the last. Legal are the
    directions that the true intersection has, and `end` exactly at the destination.

    Args:
        model: what is measured.
        network: the true city.
        walks: P held-out walks.
        stop: whether `end` alone is legal at the destination; otherwise moves are too, for a random
            walk may pass through it and return.
    """
    prompts = Prompts(walks.source, walks.destination, walks.moves, walks.lengths)
    found = np.full(walks.nodes.shape, np.nan)
    with evaluation_mode(model):
        for rows, made, logits_MV in _forced_logits(model, prompts, prompts.lengths):
            token = logits_MV.argmax(-1).cpu().numpy()
            here = walks.nodes[rows, made]
            home = here == prompts.destination[rows]
            legal = (token == END) & home
            is_move = (token >= FIRST_DIRECTION) & (token < FIRST_NODE)
            target = network.targets[here[is_move], token[is_move] - FIRST_DIRECTION]
            legal[is_move] = (target != NOWHERE) & ~(stop & home[is_move])
            found[rows, made] = legal
    return found


def next_token_test(
    model: SequenceModel, network: StreetNetwork, walks: Walks, *, stop: bool = False
) -> Score:
    """NEXT_TOKEN_TEST, by `legal_positions`; its error is clustered by walk."""
    hits = np.nansum(legal_positions(model, network, walks, stop=stop), axis=1)
    return ratio_score(hits, walks.lengths + 1)


def valid_trajectories(
    model: SequenceModel, network: StreetNetwork, pairs: Pairs, max_moves: int
) -> Score:
    """VALID_TRAJECTORIES. Arriving is not enough: the model must say `end` there (it may pass the
    destination and return), within `max_moves`, the longest training walk."""
    return mean_score(ride(model, network, Prompts.of_pairs(pairs), max_moves).arrived)


def sequence_compression(
    model: SequenceModel,
    network: StreetNetwork,
    prefixes: PrefixPairs,
    max_moves: int,
    *,
    epsilon: float = 0.01,
    samples: int = 5,
    seed: int = 0,
) -> Score:
    """SEQUENCE_COMPRESSION, the precision of Vafa et al., approximated by sampling as there.

    Both prefixes lead to the same state of the world, so each continuation that the model accepts
    after the first it must accept after the second. It accepts one when each of its tokens has
    probability above `epsilon`: continuations are drawn from its distributions after the first, cut
    at `epsilon` and renormalised (the most likely token where none exceeds it). Legality does not
    enter.

    Args:
        model: what is measured.
        network: the true city.
        prefixes: see `prefix_pairs`.
        max_moves: a continuation stops with `end`, or when the longer prefix has this many moves in
            all.
        epsilon: 0.01 in the original.
        samples: continuations of a pair; a pair that fails one is not asked again.
        seed: of the draws.
    """
    first, second = prefixes.first, prefixes.second
    keys = (first.source, second.source, prefixes.destination, prefixes.intersection)
    draws = pair_draws(seed, (samples, max_moves + 1), *keys)
    limit = prefixes.room(max_moves)
    passed = np.ones(len(prefixes), dtype=bool)
    for sample in range(samples):
        alive = np.flatnonzero(passed)
        begun = first.lengths[alive]
        choose = partial(_sample, epsilon=epsilon, draws=draws[alive, sample], begun=begun)
        budget = begun + limit[alive]
        told = ride(model, network, first[alive], budget, choose=choose, leave_map=True)
        p = continuation_probabilities(model, second[alive], told)
        passed[alive] = (p > epsilon).all(axis=1)
    return mean_score(passed)


def identical_continuations(
    model: SequenceModel, network: StreetNetwork, prefixes: PrefixPairs, max_moves: int
) -> tuple[Score, Score]:
    """IDENTICAL_CONTINUATIONS, the wording of arXiv 2511.05963, and IDENTICAL_VALID_CONTINUATIONS:
    a model can be identically wrong, early in training above all.

    Continuations are compared up to `end` (or a token that is no move), until the longer prefix has
    `max_moves` moves in all.
    """
    limit = prefixes.room(max_moves)
    first, second = (
        ride(model, network, prompts, prompts.lengths + limit, leave_map=True)
        for prompts in (prefixes.first, prefixes.second)
    )
    identical = (first.tokens == second.tokens).all(axis=1)
    return mean_score(identical), mean_score(identical & first.arrived & second.arrived)


def detour_robustness(
    model: SequenceModel,
    network: StreetNetwork,
    pairs: Pairs,
    max_moves: int,
    *,
    probability: float = PAPER_PROBABILITY,
    kind: DetourKind = "random",
    draws: int = 1,
    seed: int = 0,
) -> Score:
    """The metric that `detours` declares; the error is clustered by pair.

    Where there is no other legal move from which the destination can be reached within the moves
    left, the model's own token stands. An illegal token, or `end` elsewhere than at the
    destination, fails at a step without a detour, and is overridden by one. `end` at the
    destination ends the ride with success always: a passenger who has arrived is not driven on.

    The two numbers of every step (whether, and which) are drawn in advance for every pair, from the
    seed and the pair alone; those of fewer draws are the first of more.
    """
    shape = (draws, max_moves + 1, 2)
    numbers = pair_draws(seed, shape, pairs.source, pairs.destination).reshape(-1, *shape[1:])
    pairs = pairs[np.repeat(np.arange(len(pairs)), draws)]
    destinations, row = np.unique(pairs.destination, return_inverse=True)
    hops = network.hops_to(destinations)

    def choose(step: Step) -> np.ndarray:
        token = greedy(step)
        there = network.targets[step.nodes]
        to_go = hops[row[step.rows][:, None], there]
        open_B8 = (there != NOWHERE) & (to_go >= 0) & (to_go < max_moves - step.made)
        open_B8 &= np.arange(8) != (token - FIRST_DIRECTION)[:, None]
        whether, which = numbers[step.rows, step.made].T
        home = (token == END) & (step.nodes == pairs.destination[step.rows])
        detour = (whether < probability) & open_B8.any(axis=1) & ~home
        if kind == "random":
            rank = np.minimum((which * open_B8.sum(axis=1)).astype(np.int64), 7)
            direction = (open_B8.cumsum(axis=1) > rank[:, None]).argmax(axis=1)
        else:
            sign = {"second_most_likely": 1.0, "least_likely": -1.0}[kind]
            logits_B8 = step.logits_BV[:, FIRST_DIRECTION:FIRST_NODE].double().cpu().numpy()
            direction = np.where(open_B8, sign * logits_B8, -np.inf).argmax(axis=1)
        return np.where(detour, direction + FIRST_DIRECTION, token)

    rides = ride(model, network, Prompts.of_pairs(pairs), max_moves, choose=choose)
    return mean_score(rides.arrived.reshape(-1, draws).mean(axis=1))


def sampled_rides(
    model: SequenceModel,
    network: StreetNetwork,
    pairs: Pairs,
    max_moves: int,
    *,
    epsilon: float = 0.01,
    seed: int = 0,
) -> Rides:
    """One ride per pair that the model holds possible: every token drawn among those of probability
    above `epsilon`, the cut of `sequence_compression`.

    Rides that leave the true map are driven on: the map in the model's head is rebuilt from these,
    mistakes that it would make now and then included.
    """
    keys = (np.arange(len(pairs)), pairs.source, pairs.destination)
    draws = pair_draws(seed, (max_moves + 1,), *keys)
    prompts = Prompts.of_pairs(pairs)
    choose = partial(_sample, epsilon=epsilon, draws=draws, begun=prompts.lengths)
    return ride(model, network, prompts, max_moves, choose=choose, leave_map=True)


def pair_draws(seed: int, shape: tuple[int, ...], *keys: np.ndarray) -> np.ndarray:
    """(P, *shape) uniform numbers in [0, 1): row i depends on the seed and on the i-th entries of
    the keys, on nothing else."""
    rows = zip(*(key.tolist() for key in keys), strict=True)
    return np.stack([np.random.default_rng([seed, *row]).random(shape) for row in rows])


def continuation_probabilities(model: SequenceModel, prompts: Prompts, told: Rides) -> np.ndarray:
    """(P, L) probability of every token of `told` after other prompts, given those before it; 1 on
    the padding."""
    width = int(prompts.lengths.max(initial=0) + told.lengths.max(initial=1)) - 1
    moves = np.zeros((len(prompts), width), dtype=np.int64)
    moves[:, : prompts.moves.shape[1]] = prompts.moves[:, :width]
    before_last = np.arange(told.tokens.shape[1]) < (told.lengths - 1)[:, None]
    row, index = np.nonzero(before_last)  # the last token is only scored
    moves[row, prompts.lengths[row] + index] = told.tokens[row, index] - FIRST_DIRECTION
    whole = Prompts(prompts.source, prompts.destination, moves, prompts.lengths + told.lengths - 1)
    p = np.ones(told.tokens.shape)
    with evaluation_mode(model):
        for rows, made, logits_MV in _forced_logits(model, whole, told.lengths - 1):
            index = made - prompts.lengths[rows]
            token = torch.from_numpy(told.tokens[rows, index]).to(logits_MV.device)
            log_p = logits_MV.float().log_softmax(-1).gather(1, token[:, None]).squeeze(1)
            p[rows, index] = log_p.exp().double().cpu().numpy()
    return p


def _forced_logits(
    model: SequenceModel, prompts: Prompts, before_end: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, Tensor]]:
    """Teacher-forced logits at the last `before_end + 1` positions of each prompt, in pieces.

    Rows of a batch are padded on the right, which a causal model cannot see; rows of like length
    share a batch.

    Yields:
        Rows (M,), moves made (M,), logits_MV.
    """
    ids = prompts.tokens()
    for rows in prompts.batches():
        lengths = prompts.lengths[rows][:, None]
        made = np.arange(int(lengths.max()) + 1)
        row, position = np.nonzero(
            (made <= lengths) & (made >= lengths - before_end[rows][:, None])
        )
        h_BTD, _ = model.step(torch.from_numpy(ids[rows, : 1 + len(made)]).to(model.device), None)
        vocabulary = model.next_token_logits(h_BTD[:1, -1]).shape[-1]
        piece = max(1, LOGIT_ELEMENTS // vocabulary)
        for done in range(0, len(row), piece):
            part = slice(done, done + piece)
            at_row, at = (torch.from_numpy(x[part]).to(model.device) for x in (row, position))
            yield rows[row[part]], position[part], model.next_token_logits(h_BTD[at_row, at + 1])


def _sample(step: Step, epsilon: float, draws: np.ndarray, begun: np.ndarray) -> np.ndarray:
    """(B,) tokens from the distributions cut at epsilon, by the uniform numbers draws[row, tokens
    since `begun`]; where no token exceeds epsilon, the most likely one."""
    p = step.logits_BV.float().softmax(-1)
    cumulative = torch.where(p > epsilon, p, 0.0).double().cumsum(-1)
    u = torch.from_numpy(draws[step.rows, step.made - begun[step.rows]]).to(cumulative.device)
    drawn = (cumulative > u[:, None] * cumulative[:, -1:]).long().argmax(-1)
    return torch.where(cumulative[:, -1] > 0, drawn, p.argmax(-1)).cpu().numpy()
