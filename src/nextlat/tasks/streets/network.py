"""A street network: intersections with coordinates, and at most one street per compass direction
out of each.

The world of the taxi rides of Vafa et al. (arXiv 2406.03689, section 4), for any city: `sources`
reads, downloads or generates one. Shapes: N intersections, E streets, K destinations, D largest
out-degree.
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, dijkstra

from nextlat.errors import NextLatError

DIRECTIONS = ("N", "NE", "E", "SE", "S", "SW", "W", "NW")
NOWHERE = -1  # the target of a street that does not exist
MAX_LISTED_PAIRS = 2**22  # 2,048 intersections: up to here all pairs are listed to hold some out
MAX_TABLE = 20_000  # intersections up to which the distances between all of them are kept
EARTH_RADIUS_MILES = 3958.7613  # mean radius of the WGS 84 ellipsoid, 6,371.0088 km


def compass_direction(
    lat_a: np.ndarray, lon_a: np.ndarray, lat_b: np.ndarray, lon_b: np.ndarray
) -> np.ndarray:
    """Index in DIRECTIONS of the initial great-circle bearing from a to b.

    A direction covers 45 degrees centred on its compass point, the lower bound included: N is
    within 22.5 degrees of north. A point's bearing to itself counts as N.

    Args:
        lat_a, lon_a: start, in degrees.
        lat_b, lon_b: end, in degrees, of any shape that broadcasts with the start.
    """
    phi_a, phi_b = np.radians(lat_a), np.radians(lat_b)
    delta = np.radians(np.subtract(lon_b, lon_a))
    east = np.sin(delta) * np.cos(phi_b)
    north = np.cos(phi_a) * np.sin(phi_b) - np.sin(phi_a) * np.cos(phi_b) * np.cos(delta)
    degrees = np.degrees(np.arctan2(east, north)) % 360.0
    return (np.floor((degrees + 22.5) / 45.0) % len(DIRECTIONS)).astype(np.int64)


@dataclass(frozen=True, eq=False)
class StreetNetwork:
    """N intersections and the directed streets between them. Its arrays are read-only.

    Attributes:
        node_ids: N distinct names without white space: the tokens of the intersections.
        latitude: (N,) float64, degrees.
        longitude: (N,) float64, degrees.
        targets: (N, 8) int64, the intersection that the street in each of DIRECTIONS leads to,
            NOWHERE where there is no street.

    Raises:
        ValueError: arrays that contradict each other.
    """

    node_ids: tuple[str, ...]
    latitude: np.ndarray
    longitude: np.ndarray
    targets: np.ndarray

    def __post_init__(self) -> None:
        n = len(self.node_ids)
        for name, dtype, shape in (
            ("latitude", np.float64, (n,)),
            ("longitude", np.float64, (n,)),
            ("targets", np.int64, (n, len(DIRECTIONS))),
        ):
            array = np.array(getattr(self, name), dtype=dtype)
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if n and not (self.targets.min() >= NOWHERE and self.targets.max() < n):
            raise ValueError("targets must lie in -1..N-1")
        if len(set(self.node_ids)) != n:
            raise ValueError("node_ids are not distinct")

    def __len__(self) -> int:
        return len(self.node_ids)

    def __repr__(self) -> str:
        return (
            f"StreetNetwork({len(self):,} intersections, {len(self.edges):,} streets, "
            f"{self.fingerprint()})"
        )

    @cached_property
    def out_degree(self) -> np.ndarray:
        """(N,) int64, the number of legal moves at each intersection; 0 at a dead end."""
        return (self.targets != NOWHERE).sum(axis=1)

    @cached_property
    def legal_moves(self) -> np.ndarray:
        """(N, D) int64, the legal directions of each intersection in increasing order, then -1."""
        width = max(1, int(self.out_degree.max(initial=0)))
        legal = self.targets != NOWHERE
        order = np.argsort(~legal, axis=1, kind="stable")[:, :width]
        return np.where(np.take_along_axis(legal, order, axis=1), order, -1)

    @cached_property
    def successors(self) -> np.ndarray:
        """(N, D) int64, the intersections that `legal_moves` lead to, then -1."""
        reached = np.take_along_axis(self.targets, self.legal_moves, axis=1)
        return np.where(self.legal_moves >= 0, reached, -1)

    @cached_property
    def edges(self) -> np.ndarray:
        """(E, 3) int64, rows (source, direction, target), sorted."""
        source, direction = np.nonzero(self.targets != NOWHERE)
        return np.stack([source, direction, self.targets[source, direction]], axis=1)

    @cached_property
    def adjacency(self) -> csr_array:
        """(N, N), how many streets lead from one intersection to another."""
        source, _, target = self.edges.T
        return csr_array((np.ones(len(source)), (source, target)), shape=(len(self), len(self)))

    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 of names, coordinates and streets."""
        digest = hashlib.sha256("\n".join(self.node_ids).encode())
        for array in (self.latitude, self.longitude, self.targets):
            digest.update(b"\0" + array.astype(array.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()[:16]

    def hops_to(self, destinations: np.ndarray) -> np.ndarray:
        """Fewest moves from every intersection to each destination.

        Args:
            destinations: (K,) node indices.

        Returns:
            (K, N) int16; 0 at the destination itself, -1 where it cannot be reached.
        """
        hops = dijkstra(self.adjacency.T, indices=destinations, unweighted=True)
        return np.where(np.isinf(hops), -1, hops).astype(np.int16)

    @cached_property
    def hops(self) -> np.ndarray:
        """(N, N) int16, fewest moves to each intersection (first index) from each.

        Raises:
            NextLatError: they are too many to be kept.
        """
        if len(self) > MAX_TABLE:
            raise NextLatError(
                f"the distances between all {len(self):,} intersections are too many to be kept: "
                f"take a part of the network (task.box) of at most {MAX_TABLE:,}."
            )
        return self.hops_to(np.arange(len(self)))

    def miles(self, a: np.ndarray | int, b: np.ndarray | int) -> np.ndarray:
        """Great-circle (haversine) distance in miles between node indices a and b, of shapes that
        broadcast."""
        phi_a, phi_b = np.radians(self.latitude[a]), np.radians(self.latitude[b])
        delta = np.radians(np.subtract(self.longitude[b], self.longitude[a]))
        chord = np.sin((phi_b - phi_a) / 2) ** 2
        chord = chord + np.cos(phi_a) * np.cos(phi_b) * np.sin(delta / 2) ** 2
        return 2 * EARTH_RADIUS_MILES * np.arcsin(np.sqrt(np.clip(chord, 0.0, 1.0)))

    def subset(self, nodes: np.ndarray) -> Self:
        """The network of some intersections; streets that leave it are dropped.

        Args:
            nodes: (M,) distinct node indices, in the order that they are to have.
        """
        renamed = np.full(len(self) + 1, NOWHERE)  # the last entry serves the index -1
        renamed[nodes] = np.arange(len(nodes))
        return replace(
            self,
            node_ids=tuple(self.node_ids[i] for i in nodes.tolist()),
            latitude=self.latitude[nodes],
            longitude=self.longitude[nodes],
            targets=renamed[self.targets[nodes]],
        )

    def strongly_connected(self) -> Self:
        """The largest part in which every intersection can be reached from every other, in the same
        order; without it a walk could end in a dead end.

        Of equally large parts, the one that holds the first intersection.
        """
        if len(self) == 0:
            return self
        _, part = connected_components(self.adjacency, connection="strong")
        return self.subset(np.flatnonzero(part == part[np.bincount(part)[part].argmax()]))

    def within(self, south: float, west: float, north: float, east: float) -> Self:
        """The largest strongly connected part of the streets inside a bounding box.

        Args:
            south, west, north, east: bounds in degrees, included.

        Raises:
            NextLatError: the bounds are out of order or no number, or the box holds no two
                connected intersections.
        """
        box = f"the box south={south}, west={west}, north={north}, east={east}"
        if not (south < north and west < east):  # also false for NaN
            raise NextLatError(
                f"{box} is empty: give it as south < north and west < east, in degrees."
            )
        inside = (self.latitude >= south) & (self.latitude <= north)
        inside &= (self.longitude >= west) & (self.longitude <= east)
        part = self.subset(np.flatnonzero(inside)).strongly_connected()
        if len(part) < 2:
            raise NextLatError(
                f"{box} holds {int(inside.sum())} intersections and no two of them that reach each "
                f"other: take a larger box (the network spans latitude {self.latitude.min():.4f} "
                f"to {self.latitude.max():.4f}, longitude {self.longitude.min():.4f} to "
                f"{self.longitude.max():.4f})."
            )
        return part


@dataclass(frozen=True, eq=False)
class Pairs:
    """K pairs of intersections.

    Attributes:
        source: (K,) int64.
        destination: (K,) int64.
    """

    source: np.ndarray
    destination: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: slice | np.ndarray) -> "Pairs":
        return Pairs(self.source[index], self.destination[index])


def held_out_pairs(
    network: StreetNetwork, count: int, *, max_hops: int = 50, seed: int = 0, max_share: float = 0.1
) -> Pairs:
    """Pairs to evaluate on, which training never sees: drawn uniformly and without repetition from
    all eligible ones.

    Args:
        network: the city.
        count: how many.
        max_hops: a pair is eligible if its destination is another intersection, at most this many
            moves away (50 in arXiv 2511.05963).
        seed: the same seed gives the same pairs.
        max_share: largest share of the eligible pairs that may be held out, so that a small city
            keeps enough to train on.

    Raises:
        NextLatError: no pair is eligible.
    """
    n = len(network)
    rng = np.random.default_rng(seed)
    if n * n <= MAX_LISTED_PAIRS:
        keys = np.flatnonzero((network.hops > 0) & (network.hops <= max_hops))
        limit = int(max_share * len(keys))
        destination, source = np.divmod(rng.permutation(keys)[: min(count, limit)], n)
    else:
        source, destination = _sampled_pairs(network, count, max_hops, max_share, rng)
    if len(source) == 0:
        raise NextLatError(
            f"no pair of intersections can be held out (at most {max_hops} moves apart, at most "
            f"{max_share:g} of all pairs): take a larger network or a larger max_hops."
        )
    return Pairs(source, destination)


def _sampled_pairs(
    network: StreetNetwork, count: int, max_hops: int, max_share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sources and destinations by rejection, for networks too large to list every pair."""
    n = len(network)
    keys: np.ndarray = np.zeros(0, dtype=np.int64)
    drawn = 0
    for _ in range(50):
        fresh = np.unique(rng.integers(0, n * n, size=max(1024, 2 * (count - len(keys)))))
        fresh = rng.permutation(np.setdiff1d(fresh, keys, assume_unique=True))
        destinations, row = np.unique(fresh % n, return_inverse=True)
        hops = network.hops_to(destinations)[row, fresh // n]
        drawn += len(fresh)
        keys = np.concatenate([keys, fresh[(hops > 0) & (hops <= max_hops)]])
        if len(keys) >= count:
            break
    return np.divmod(keys[: min(count, int(max_share * n * n * len(keys) / drawn))], n)
