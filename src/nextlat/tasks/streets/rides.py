"""Rides: a model drives through a street network, one token at a time, and the true intersection is
known at every step.

The one generation loop of all street metrics. Rides of a batch advance in lockstep over a KV cache
without any padding: rides with longer prefixes are still fed those while the others already drive.

Shapes: P rides, B rides of the running batch, D width, V vocabulary, L the longest prefix or ride.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nextlat.backbone import evaluation_mode
from nextlat.errors import NextLatError
from nextlat.tasks.streets.map import Ride
from nextlat.tasks.streets.network import NOWHERE, Pairs, StreetNetwork
from nextlat.tasks.streets.packing import END, FIRST_DIRECTION, FIRST_NODE
from nextlat.tasks.task import PAD, SequenceModel

BATCH = 256  # rides in lockstep
COMPACT_BELOW = 0.85  # share of rides under way below which finished ones leave batch and cache
ROUNDS = 200  # of drawing before a network counts as too small for pairs of prefixes


@dataclass(frozen=True, eq=False)
class Prompts:
    """Where rides begin: `source destination` and the legal moves already made.

    Attributes:
        source: (P,) node indices.
        destination: (P,) node indices.
        moves: (P, L) direction indices 0..7 of the prefix; what lies beyond `lengths` is not read.
        lengths: (P,) moves of each prefix.
    """

    source: np.ndarray
    destination: np.ndarray
    moves: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of_pairs(cls, pairs: Pairs) -> "Prompts":
        """Rides that begin at their source."""
        none = np.zeros((len(pairs), 0), dtype=np.int64)
        return cls(pairs.source, pairs.destination, none, none.sum(axis=1))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, rows: np.ndarray) -> "Prompts":
        return Prompts(
            self.source[rows], self.destination[rows], self.moves[rows], self.lengths[rows]
        )

    def batches(self) -> list[np.ndarray]:
        """Row indices, BATCH at a time; prefixes of like length share a batch, so that more is read
        in one go."""
        order = np.argsort(self.lengths, kind="stable")
        return [order[first : first + BATCH] for first in range(0, len(order), BATCH)]

    def tokens(self) -> np.ndarray:
        """(P, 2 + L) token ids; those beyond `2 + lengths` are not part of the prompt."""
        ends = np.stack([self.source, self.destination], axis=1) + FIRST_NODE
        return np.concatenate([ends, np.maximum(self.moves, 0) + FIRST_DIRECTION], axis=1)

    def intersections(self, network: StreetNetwork) -> np.ndarray:
        """(P,) the node that each prefix has reached.

        Raises:
            ValueError: a prefix takes a street that does not exist.
        """
        node = self.source.copy()
        for i in range(self.moves.shape[1]):
            going = i < self.lengths
            node[going] = network.targets[node[going], self.moves[going, i]]
            if (node == NOWHERE).any():
                raise ValueError(f"the prefix of prompt {(node == NOWHERE).argmax()} is no walk")
        return node


@dataclass(frozen=True, eq=False)
class Step:
    """One moment at which some rides are to choose their next token.

    Attributes:
        rows: (B,) which of the P rides these are.
        nodes: (B,) true intersections; NOWHERE for a ride that left the map.
        made: moves made so far, the prefix included.
        logits_BV: the model's next-token logits.
    """

    rows: np.ndarray
    nodes: np.ndarray
    made: int
    logits_BV: Tensor


@dataclass(frozen=True, eq=False)
class Rides:
    """What was driven.

    Attributes:
        tokens: (P, L) token ids after the prompt, PAD beyond the end.
        lengths: (P,) tokens of each ride, a last `end` or illegal token included.
        arrived: (P,) every move legal, and `end` given exactly at the destination.
        legal: (P,) every move within the limit legal, and `end` given nowhere else.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    arrived: np.ndarray
    legal: np.ndarray

    def sequences(self, pairs: Pairs, *, cut: bool = False) -> list[Ride]:
        """The rides of these pairs, as `map.reconstruct` reads them.

        Args:
            pairs: of the rides.
            cut: whether rides that ran out of moves are followed, wherever they have come;
                otherwise, as rides with a token that is no move, they count as not closed.
        """
        found: list[Ride] = []
        for row, (source, destination) in enumerate(
            zip(pairs.source, pairs.destination, strict=True)
        ):
            *moves, last = (self.tokens[row, : self.lengths[row]] - FIRST_DIRECTION).tolist()
            ended = last == END - FIRST_DIRECTION
            out_of_moves = cut and len(moves) == self.tokens.shape[1] - 1
            found.append(
                (
                    int(source),
                    int(destination) if ended or not out_of_moves else None,
                    moves if ended or out_of_moves else None,
                )
            )
        return found


def greedy(step: Step) -> np.ndarray:
    """(B,) the most likely token of each ride."""
    return step.logits_BV.argmax(-1).cpu().numpy()


def ride(
    model: SequenceModel,
    network: StreetNetwork,
    prompts: Prompts,
    max_moves: int | np.ndarray,
    *,
    choose: Callable[[Step], np.ndarray] = greedy,
    leave_map: bool = False,
) -> Rides:
    """Drive every ride to its end.

    A ride ends with `end`, with a token that is no direction, with a direction that the true
    intersection does not have (unless `leave_map`), or when `max_moves` moves are made and the next
    token is not `end`.

    Args:
        model: the driver.
        network: the true city.
        prompts: P beginnings; their prefixes must be legal walks.
        max_moves: moves a ride may have in all, prefix included; one number, or (P,).
        choose: the token of each ride from its `Step`.
        leave_map: go on after a move that does not exist, as the tokens alone would (the ride can
            no longer arrive).
    """
    count = len(prompts)
    budget = np.broadcast_to(max_moves, count)
    longest = int((budget - prompts.lengths).max(initial=0)) + 1
    tokens, lengths = np.full((count, longest), PAD), np.zeros(count, dtype=np.int64)
    rides = Rides(tokens, lengths, np.zeros(count, dtype=bool), np.ones(count, dtype=bool))
    start = prompts.intersections(network)
    with evaluation_mode(model):
        for rows in prompts.batches():
            nodes, limit = start[rows], budget[rows]
            prefix, prompt_ids = prompts.lengths[rows], prompts[rows].tokens()
            made = int(prefix.min())  # moves in the cache, the same for all rides of the batch
            input_ids = prompt_ids[:, : 2 + made]
            past, alive = None, np.ones(len(rows), dtype=bool)
            while alive.any():
                h_BTD, past = model.step(torch.from_numpy(input_ids).to(model.device), past)
                drives = alive & (prefix <= made)
                token = np.full(len(rows), END)
                waits = prefix > made
                token[waits] = prompt_ids[waits, min(2 + made, prompt_ids.shape[1] - 1)]
                if drives.any():
                    index = torch.from_numpy(np.flatnonzero(drives)).to(model.device)
                    logits_BV = model.next_token_logits(h_BTD[:, -1].index_select(0, index))
                    now, here = rows[drives], nodes[drives]
                    token[drives] = chosen = choose(Step(now, here, made, logits_BV))
                    rides.tokens[now, made - prefix[drives]] = chosen
                    rides.lengths[now] += 1
                    home = (chosen == END) & (here == prompts.destination[now])
                    rides.arrived[now] = home
                    is_move = (chosen >= FIRST_DIRECTION) & (chosen < FIRST_NODE)
                    legal = is_move & (here != NOWHERE)
                    there = np.full(len(now), NOWHERE)
                    there[legal] = network.targets[here[legal], chosen[legal] - FIRST_DIRECTION]
                    nodes[drives] = there
                    on_map, in_time = there != NOWHERE, made < limit[drives]
                    rides.legal[now] &= on_map | home | ~in_time
                    alive[drives] = is_move & (leave_map | on_map) & in_time
                made += 1
                if alive.any() and alive.mean() < COMPACT_BELOW:
                    past.batch_select_indices(
                        torch.from_numpy(np.flatnonzero(alive)).to(model.device)
                    )
                    rows, nodes, limit, prefix, prompt_ids, token = (
                        x[alive] for x in (rows, nodes, limit, prefix, prompt_ids, token)
                    )
                    alive = np.ones(len(rows), dtype=bool)
                input_ids = token[:, None]
    return rides


@dataclass(frozen=True, eq=False)
class PrefixPairs:
    """P pairs of different beginnings that lead to the same state of the world.

    Attributes:
        first: prompts whose prefixes reach an intersection.
        second: prompts with other sources and the same destinations that reach the same one.
        intersection: (P,) that intersection, never the destination.
    """

    first: Prompts
    second: Prompts
    intersection: np.ndarray

    def __len__(self) -> int:
        return len(self.intersection)

    @property
    def destination(self) -> np.ndarray:
        """(P,) node indices."""
        return self.first.destination

    def room(self, max_moves: int) -> np.ndarray:
        """(P,) moves that both prompts still have."""
        return max_moves - np.maximum(self.first.lengths, self.second.lengths)


def prefix_pairs(
    network: StreetNetwork, count: int, *, max_moves: int, stop: bool = False, seed: int = 0
) -> PrefixPairs:
    """Draw pairs of prefixes that lead to the same state by different ways.

    Intersection and destination are uniform among the pairs with a route of at least one move. From
    the intersection two random walks go backwards, a uniformly random incoming street at each step,
    of independent lengths uniform in 1..max_moves/2; where they end are the two sources. A draw is
    made again when the sources are equal, when one is the destination (no ride leads from a node to
    itself), when a walk meets an intersection without incoming street, or when the destination is
    further than the longer prefix leaves moves for.

    Args:
        network: the city.
        count: P.
        max_moves: moves of a ride in all, the longest training walk.
        stop: no prefix passes through the destination: for rides that stop there.
        seed: the same seed gives the same pairs.

    Raises:
        NextLatError: a network without enough such pairs.
    """
    rng = np.random.default_rng([seed, 0x9F1])
    longest = max(1, max_moves // 2)
    incoming = network.edges[np.argsort(network.edges[:, 2], kind="stable")]
    first_in = np.searchsorted(incoming[:, 2], np.arange(len(network) + 1))

    def walk_back(
        end: np.ndarray, lengths: np.ndarray, destination: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Sources (C,), NOWHERE where a walk got stuck or must not go on; moves (C, longest) in the
        order of driving, 0 beyond the length."""
        node, moves = end.copy(), np.zeros((len(end), longest), dtype=np.int64)
        for i in range(longest):
            u = rng.random(len(end))
            going = np.flatnonzero((i < lengths) & (node != NOWHERE))
            low, high = first_in[node[going]], first_in[node[going] + 1]
            node[going[low == high]] = NOWHERE
            going, low, high = (x[low < high] for x in (going, low, high))
            street = low + np.minimum((u[going] * (high - low)).astype(np.int64), high - low - 1)
            node[going], moves[going, lengths[going] - 1 - i] = incoming[street, :2].T
            if stop:
                node[node == destination] = NOWHERE
        return node, moves

    parts: list[tuple[np.ndarray, ...]] = []
    for _ in range(ROUNDS):
        if sum(len(part[0]) for part in parts) >= count:
            break
        here, there = rng.integers(len(network), size=(2, 2 * count + 64))
        lengths = rng.integers(1, longest + 1, size=(2, 2 * count + 64))
        (source_a, moves_a), (source_b, moves_b) = (walk_back(here, x, there) for x in lengths)
        destinations, row = np.unique(there, return_inverse=True)
        hops = network.hops_to(destinations)[row, here]
        good = (hops > 0) & (hops <= max_moves - lengths.max(axis=0)) & (source_a != source_b)
        for source in (source_a, source_b):
            good &= (source != NOWHERE) & (source != there)
        parts.append(
            tuple(x[good] for x in (here, there, source_a, moves_a, source_b, moves_b, *lengths))
        )
    columns = [np.concatenate(column)[:count] for column in zip(*parts, strict=True)]
    here, there, source_a, moves_a, source_b, moves_b, length_a, length_b = columns
    if len(here) < count:
        raise NextLatError(
            f"found {len(here)} of {count} pairs of prefixes to one intersection: take a larger "
            "city, longer walks or fewer pairs."
        )
    return PrefixPairs(
        Prompts(source_a, there, moves_a, length_a),
        Prompts(source_b, there, moves_b, length_b),
        here,
    )
