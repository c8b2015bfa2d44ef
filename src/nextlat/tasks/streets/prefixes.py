"""Pairs of different beginnings that lead to the same state of the world: same intersection, same
destination.

Shapes: P pairs, L the longest prefix in moves, N intersections.
"""

from dataclasses import dataclass

import numpy as np

from nextlat.errors import NextLatError
from nextlat.tasks.streets.network import StreetNetwork
from nextlat.tasks.streets.rides import Prompts

ROUNDS = 200  # rounds of drawing before a network is declared too small for such pairs


@dataclass(frozen=True, eq=False)
class PrefixPairs:
    """P pairs of prompts.

    Attributes:
        first, second: prompts with different sources and one destination, whose prefixes reach one
            intersection.
        intersection: (P,) that intersection, never the destination.
    """

    first: Prompts
    second: Prompts
    intersection: np.ndarray

    def __len__(self) -> int:
        return len(self.intersection)

    @property
    def destination(self) -> np.ndarray:
        return self.first.destination

    def room(self, max_moves: int) -> np.ndarray:
        """(P,) moves that both prompts still have."""
        return max_moves - np.maximum(self.first.lengths, self.second.lengths)


def prefix_pairs(
    network: StreetNetwork,
    count: int,
    *,
    max_moves: int,
    min_prefix: int = 1,
    max_prefix: int | None = None,
    max_hops: int | None = None,
    equal_length: bool = False,
    seed: int = 0,
) -> PrefixPairs:
    """Draw pairs of prefixes that lead to the same state by different ways.

    Intersection and destination are uniform among the pairs with a route of at least one move. From
    the intersection two random walks go backwards, a uniformly random incoming street at each step,
    of independent lengths uniform in min_prefix..max_prefix; where they end are the two sources. A
    draw is made again when the sources are equal, when one is the destination (no ride leads from a
    place to itself), when a walk meets an intersection without incoming street, or when the
    destination is further than `max_hops` or than the longer prefix leaves moves for. Walks may
    pass through the destination, as training walks may.

    Args:
        max_moves: moves of a ride in all, the longest training walk.
        min_prefix, max_prefix: moves of a prefix; max_prefix defaults to half of max_moves.
        max_hops: shortest distance from intersection to destination; None = what max_moves leaves.
        equal_length: give both prefixes the same number of moves. The world's state is the same
            either way (the default, as in Vafa et al.), but the best prediction for walks of
            bounded length depends a little on the moves already made.
        seed: the same seed gives the same pairs.

    Raises:
        NextLatError: lengths that contradict each other, or a network without enough such pairs.
    """
    max_prefix = max(min_prefix, max_moves // 2) if max_prefix is None else max_prefix
    if not 1 <= min_prefix <= max_prefix < max_moves:
        raise NextLatError(
            f"prefixes of {min_prefix} to {max_prefix} moves do not fit into rides of {max_moves}: "
            "take 1 <= min_prefix <= max_prefix < max_moves."
        )
    rng = np.random.default_rng([seed, 0x9F1])
    hops = network.hops_to(np.arange(len(network)))  # (destination, node)
    incoming = _Incoming(network)
    parts: list[tuple[np.ndarray, ...]] = []
    found = 0
    for _ in range(ROUNDS):
        if found >= count:
            break
        n = 2 * count + 64
        here, there = rng.integers(len(network), size=(2, n))
        lengths = rng.integers(min_prefix, max_prefix + 1, size=(2, n))
        if equal_length:
            lengths[1] = lengths[0]
        walks = [incoming.walk_back(here, lengths[i], max_prefix, rng) for i in (0, 1)]
        far = np.where(hops[there, here] > 0, hops[there, here], np.iinfo(np.int16).max).astype(
            np.int64
        )
        sources = np.stack([source for source, _ in walks])
        good = (
            (sources >= 0).all(axis=0) & (sources[0] != sources[1]) & (sources != there).all(axis=0)
        )
        good &= far <= max_moves - lengths.max(axis=0)
        good &= far <= (max_moves if max_hops is None else max_hops)
        parts.append(
            tuple(x[good] for x in (here, there, *sources, *(m for _, m in walks), *lengths))
        )
        found += int(good.sum())
    if found < count:
        raise NextLatError(
            f"found {found} of {count} pairs of prefixes to one intersection: take a larger city, longer walks or fewer pairs."
        )
    here, there, source_a, source_b, moves_a, moves_b, length_a, length_b = (
        np.concatenate(column)[:count] for column in zip(*parts, strict=True)
    )
    return PrefixPairs(
        Prompts(source_a, there, moves_a, length_a),
        Prompts(source_b, there, moves_b, length_b),
        here,
    )


class _Incoming:
    """Streets by the intersection they lead to."""

    def __init__(self, network: StreetNetwork) -> None:
        source, direction = np.nonzero(network.targets >= 0)
        target = network.targets[source, direction]
        order = np.argsort(target, kind="stable")
        self.source, self.direction = source[order], direction[order]
        self.first = np.searchsorted(target[order], np.arange(len(network) + 1))

    def walk_back(
        self, end: np.ndarray, lengths: np.ndarray, longest: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """(sources (P,), -1 where a walk got stuck; moves (P, longest) in the order of driving, 0
        beyond the length)."""
        node = end.copy()
        moves = np.zeros((len(end), longest), dtype=np.int64)
        for i in range(longest):
            u = rng.random(len(end))
            going = np.flatnonzero((i < lengths) & (node >= 0))
            low, high = self.first[node[going]], self.first[node[going] + 1]
            stuck = going[low == high]
            going, low, high = (x[low < high] for x in (going, low, high))
            street = low + np.minimum((u[going] * (high - low)).astype(np.int64), high - low - 1)
            moves[going, lengths[going] - 1 - i] = self.direction[street]
            node[going] = self.source[street]
            node[stuck] = -1
        return node, moves
