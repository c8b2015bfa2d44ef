"""The street map that a model seems to have in mind: reconstruction from its rides, after Vafa et
al. (arXiv 2406.03689), and its record, map.json.

A model that knows the city needs no street that is not there. Every invented street is a move that
the model made and no true street explains.

Shapes: N intersections, E streets.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nextlat.errors import NextLatError
from nextlat.tasks.streets.network import NOWHERE, StreetNetwork
from nextlat.validation import CountOrZero, Settings

# Source, destination (None: the ride was cut and may be anywhere), directions 0..7 (None: the model
# did not close the ride).
Ride = tuple[int, int | None, Sequence[int] | None]
Street = tuple[int, int, int]  # source, direction, target


@dataclass(frozen=True, eq=False)
class ReconstructedMap:
    """What was needed to explain the rides.

    Attributes:
        used: (E, 3) int64 true streets (source, direction, target) on which a followed ride went,
            sorted.
        invented: streets in the order of their invention.
        true_unused: true streets that no followed ride used.
        explained: rides that lead from source to destination (of one that was cut: to its last
            move) over true and invented streets.
        astray: rides that can be followed to their last move too, but end elsewhere than at their
            destination.
        failed: rides that could not be repaired.
        unclosed: rides that the model did not close with `end`, or that contain a token that is no
            move: not followed.
    """

    used: np.ndarray
    invented: list[Street]
    true_unused: int
    explained: int
    astray: int
    failed: int
    unclosed: int

    @property
    def rides(self) -> int:
        """All rides, whatever became of them."""
        return self.explained + self.astray + self.failed + self.unclosed

    def counts(self) -> dict[str, int]:
        """The figures of the picture's caption, by name."""
        return {
            "invented": len(self.invented),
            "true_used": len(self.used),
            "true_unused": self.true_unused,
            "explained": self.explained,
            "astray": self.astray,
            "failed": self.failed,
            "unclosed": self.unclosed,
        }


def reconstruct(
    network: StreetNetwork, rides: Iterable[Ride], *, max_miles: float = 0.5, max_degree: int = 4
) -> ReconstructedMap:
    """Rebuild the map that explains rides, starting from the intersections and true streets of the
    city.

    Rides are taken one after another, and each is followed move by move:
    1. over the true street of that direction, if the intersection has one;
    2. else over the street of that direction invented for an earlier ride (or earlier in this one);
    3. else a new street of that direction is invented, if the intersection has fewer than
       `max_degree` streets, true and invented. It leads to the intersection within `max_miles` from
       which the most of the remaining moves can be followed over known streets. Among equals: one
       from which the whole rest is followed and ends at the destination, then the nearest, then the
       one listed first. The bearing of an invented street need not agree with its direction (nor
       does it in the original).
    A ride for which step 3 finds no intersection, or no free degree, has failed: the streets
    invented for it are taken back, and the true streets it used do not count as used. A ride that
    is followed to its end counts as explained if it ends at its destination and as astray if not;
    its streets are kept in both cases, for its moves are what the model takes for streets.

    The result depends on the order of the rides (greedy, as in the original) and on nothing else.

    Args:
        network: the true city.
        rides: what the model drove.
        max_miles: limit of the great-circle length of an invented street; 0.5 in the original.
        max_degree: limit of the streets out of an intersection with an invented one; 4 in the
            original.
    """
    known = network.targets.copy()
    used = np.zeros(known.shape, dtype=bool)
    invented: list[Street] = []
    outcome = {"explained": 0, "astray": 0, "failed": 0, "unclosed": 0}
    for source, destination, moves in rides:
        if moves is None:
            outcome["unclosed"] += 1
            continue
        here = source
        path: list[tuple[int, int]] = []
        added: list[Street] = []
        for i, direction in enumerate(moves):
            if known[here, direction] == NOWHERE:
                rest = moves[i + 1 :]
                there = _invent(network, known, here, destination, rest, max_miles, max_degree)
                if there == NOWHERE:
                    break
                known[here, direction] = there
                added.append((here, direction, there))
            path.append((here, direction))
            here = int(known[here, direction])
        if len(path) < len(moves):
            outcome["failed"] += 1
            for a, direction, _ in added:
                known[a, direction] = NOWHERE
            continue
        outcome["explained" if destination in (here, None) else "astray"] += 1
        invented += added
        for street in path:
            used[street] = True
    streets = network.edges[used[network.edges[:, 0], network.edges[:, 1]]]
    return ReconstructedMap(streets, invented, len(network.edges) - len(streets), **outcome)


def _invent(
    network: StreetNetwork,
    known: np.ndarray,
    here: int,
    destination: int | None,
    rest: Sequence[int],
    max_miles: float,
    max_degree: int,
) -> int:
    """The intersection that a new street from `here` should lead to, NOWHERE if there can be none
    (rule 3 of `reconstruct`)."""
    if (known[here] != NOWHERE).sum() >= max_degree:
        return NOWHERE
    miles = network.miles(here, np.arange(len(network)))
    near = np.flatnonzero((miles <= max_miles) & (np.arange(len(network)) != here))
    if len(near) == 0:
        return NOWHERE
    at, followed = near.copy(), np.zeros(len(near), dtype=np.int64)
    going = np.arange(len(near))
    for direction in rest:
        at[going] = known[at[going], direction]
        going = going[at[going] != NOWHERE]
        followed[going] += 1
    arrives = (followed == len(rest)) & ((destination is None) | (at == destination))
    return int(near[np.lexsort((near, miles[near], ~arrives, -followed))[0]])


class _City(Settings):
    node_ids: list[str]
    latitude: list[float]
    longitude: list[float]
    targets: list[list[int]]


class _Record(Settings):
    network: _City
    used: list[tuple[CountOrZero, CountOrZero, CountOrZero]]
    invented: list[tuple[CountOrZero, CountOrZero, CountOrZero]]
    counts: dict[str, CountOrZero]


def map_record(network: StreetNetwork, reconstructed: ReconstructedMap) -> dict[str, Any]:
    """The city and the map as JSON that needs no other file to be drawn; `read_map_record` reads
    it."""
    return {
        "network": {
            "node_ids": list(network.node_ids),
            "latitude": network.latitude.tolist(),
            "longitude": network.longitude.tolist(),
            "targets": network.targets.tolist(),
        },
        "used": reconstructed.used.tolist(),
        "invented": [list(street) for street in reconstructed.invented],
        "counts": reconstructed.counts(),
    }


def read_map_record(
    content: Any, source: str = "map.json is corrupt"
) -> tuple[StreetNetwork, ReconstructedMap]:
    """The network and the map of a record.

    Args:
        content: of map.json.
        source: how the sentence of an error begins.

    Raises:
        NextLatError: it is not such a record, or contradicts itself.
    """
    record = _Record.from_json(content, source)
    city = record.network
    try:
        network = StreetNetwork(
            tuple(city.node_ids),
            np.array(city.latitude),
            np.array(city.longitude),
            np.array(city.targets, dtype=np.int64),
        )
        used, invented = (
            np.array(streets, dtype=np.int64).reshape(-1, 3)
            for streets in (record.used, record.invented)
        )
        _ = network.targets[invented[:, 0], invented[:, 1]], network.latitude[invented[:, 2]]
        if (network.targets[used[:, 0], used[:, 1]] != used[:, 2]).any():
            raise ValueError("not every street in 'used' is one of the city")
        outcome = {k: n for k, n in record.counts.items() if k not in ("invented", "true_used")}
        reconstructed = ReconstructedMap(used, record.invented, **outcome)
        if reconstructed.counts() != record.counts:
            raise ValueError("'counts' contradicts the streets")
    except (ValueError, IndexError, TypeError) as error:
        raise NextLatError(f"{source}: {error}.") from error
    return network, reconstructed
