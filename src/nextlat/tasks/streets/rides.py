"""Rides: a model drives through a street network, one token at a time, and the true intersection is
known at every step.

The one generation loop of all street metrics. Rides of a batch advance in lockstep over a KV cache
without any padding: rides whose prefix is longer than the others' are fed their prefix tokens while
the others already drive.

Shapes: P rides, B rides of the running batch, T tokens, D width, V vocabulary, L the longest prefix
    or ride.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nextlat.tasks.streets.network import StreetNetwork
from nextlat.tasks.streets.walks import END, FIRST_DIRECTION, FIRST_NODE, PAD, Pairs
from nextlat.tasks.task import SequenceModel, inference

NOWHERE = -1  # the true place of a ride that took a street that does not exist
COMPACT_BELOW = 0.85  # share of rides still under way below which the finished ones leave the batch and its cache


@dataclass(frozen=True, eq=False)
class Prompts:
    """Where rides begin: `source destination` and the legal moves already made.

    Attributes:
        source, destination: (P,) node indices.
        moves: (P, L) direction indices 0..7 of the prefix; what lies beyond `lengths` is not read.
        lengths: (P,) moves of each prefix.
    """

    source: np.ndarray
    destination: np.ndarray
    moves: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of_pairs(cls, source: np.ndarray, destination: np.ndarray) -> "Prompts":
        """Rides that begin at their source."""
        none = np.zeros(len(source), dtype=np.int64)
        return cls(np.asarray(source), np.asarray(destination), none[:, None][:, :0], none)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, rows: np.ndarray) -> "Prompts":
        return Prompts(
            self.source[rows], self.destination[rows], self.moves[rows], self.lengths[rows]
        )

    def tokens(self) -> np.ndarray:
        """(P, 2 + L) token ids; those beyond `2 + lengths` are not part of the prompt."""
        ends = np.stack([self.source, self.destination], axis=1) + FIRST_NODE
        return np.concatenate([ends, np.maximum(self.moves, 0) + FIRST_DIRECTION], axis=1).astype(
            np.int64
        )

    def intersections(self, network: StreetNetwork) -> np.ndarray:
        """(P,) the node that each prefix has reached.

        Raises:
            ValueError: a prefix takes a street that does not exist.
        """
        node = np.asarray(self.source, dtype=np.int64).copy()
        for i in range(self.moves.shape[1]):
            going = i < self.lengths
            node[going] = network.targets[node[going], self.moves[going, i]]
            if (node == NOWHERE).any():
                raise ValueError(
                    f"the prefix of prompt {int((node == NOWHERE).argmax())} is not a walk in this network"
                )
        return node


@dataclass(frozen=True, eq=False)
class Step:
    """One moment at which the rides `rows` are to choose their next token.

    Attributes:
        rows: (B,) which of the P rides these are.
        nodes: (B,) true intersections; -1 for a ride that left the map.
        made: (B,) moves made so far, the prefix included.
        logits_BV: the model's next-token logits.
    """

    rows: np.ndarray
    nodes: np.ndarray
    made: np.ndarray
    logits_BV: Tensor


@dataclass(frozen=True, eq=False)
class Rides:
    """What was driven.

    Attributes:
        tokens: (P, L) token ids after the prompt, PAD beyond the end.
        lengths: (P,) tokens of each ride, a last `end` or illegal token included.
        arrived: (P,) every move legal, and `end` given exactly at the destination.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    arrived: np.ndarray

    def moves(self, row: int) -> list[int] | None:
        """Direction indices of one ride, or None when it does not close with `end` (out of moves,
        or not a move)."""
        tokens = self.tokens[row, : self.lengths[row]]
        return (
            [int(t) - FIRST_DIRECTION for t in tokens[:-1]]
            if len(tokens) and tokens[-1] == END
            else None
        )

    def sequences(self, pairs: Pairs) -> list[tuple[int, int, list[int] | None]]:
        """(source, destination, moves) of each ride of these pairs, as `street_map.reconstruct`
        reads them."""
        ends = zip(pairs.source.tolist(), pairs.destination.tolist(), strict=True)
        return [
            (source, destination, self.moves(row)) for row, (source, destination) in enumerate(ends)
        ]


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
    batch_size: int = 256,
) -> Rides:
    """Drive every ride to its end.

    A ride ends with `end`, with a token that is no direction, with a direction that the true
    intersection does not have (unless `leave_map`), or when `max_moves` moves are made and the next
    token is not `end`.

    Args:
        prompts: P beginnings; their prefixes must be legal walks.
        max_moves: moves a ride may have in all, prefix included; one number, or (P,).
        choose: the token of each ride from its `Step`: greedy by default, sampling or a detour
            otherwise.
        leave_map: go on after a move that does not exist, as the tokens alone would (the ride can
            no longer arrive).
        batch_size: rides in lockstep.
    """
    budget = np.broadcast_to(np.asarray(max_moves, dtype=np.int64), (len(prompts),))
    longest = int((budget - prompts.lengths).max(initial=0)) + 1
    tokens = np.full((len(prompts), longest), PAD, dtype=np.int64)
    rides = Rides(
        tokens, np.zeros(len(prompts), dtype=np.int64), np.zeros(len(prompts), dtype=bool)
    )
    start = prompts.intersections(network)
    order = np.argsort(
        prompts.lengths, kind="stable"
    )  # prefixes of like length share a batch: more is read in one go
    with inference(model):
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            _ride_batch(
                model, network, prompts, rows, start[rows], budget[rows], choose, leave_map, rides
            )
    return rides


def _ride_batch(
    model: SequenceModel,
    network: StreetNetwork,
    prompts: Prompts,
    rows: np.ndarray,
    nodes: np.ndarray,
    budget: np.ndarray,
    choose: Callable[[Step], np.ndarray],
    leave_map: bool,
    rides: Rides,
) -> None:
    """Drive `rows` in lockstep and write what happens into `rides`."""
    prefix, prompt_ids = prompts.lengths[rows], prompts[rows].tokens()
    made = int(prefix.min())  # moves in the cache, the same for all rides of the batch
    input_ids = prompt_ids[:, : 2 + made]
    past, alive = None, np.ones(len(rows), dtype=bool)
    while True:
        h_BTD, past = model.step(torch.from_numpy(input_ids).to(model.device), past)
        drives = alive & (prefix <= made)
        token = np.full(len(rows), END, dtype=np.int64)
        token[prefix > made] = prompt_ids[prefix > made, min(2 + made, prompt_ids.shape[1] - 1)]
        if drives.any():
            index = torch.from_numpy(np.flatnonzero(drives)).to(model.device)
            logits_BV = model.next_token_logits(h_BTD[:, -1].index_select(0, index))
            now, here = rows[drives], nodes[drives]
            chosen = choose(Step(now, here, np.full(len(now), made), logits_BV))
            token[drives] = chosen
            rides.tokens[now, made - prefix[drives]] = chosen
            rides.lengths[now] += 1
            rides.arrived[now] = (chosen == END) & (here == prompts.destination[now])
            is_move = (chosen >= FIRST_DIRECTION) & (chosen < FIRST_NODE)
            legal = is_move & (here != NOWHERE)
            there = np.full(len(now), NOWHERE, dtype=np.int64)
            there[legal] = network.targets[here[legal], chosen[legal] - FIRST_DIRECTION]
            nodes[drives] = there
            alive[drives] = is_move & (leave_map | (there != NOWHERE)) & (made < budget[drives])
        if not alive.any():
            return
        made += 1
        if alive.mean() < COMPACT_BELOW:
            past.batch_select_indices(torch.from_numpy(np.flatnonzero(alive)).to(model.device))
            rows, nodes, budget, prefix, prompt_ids, token = (
                x[alive] for x in (rows, nodes, budget, prefix, prompt_ids, token)
            )
            alive = np.ones(len(rows), dtype=bool)
        input_ids = token[:, None]
