"""A street network: intersections with coordinates, and at most one street per compass direction
out of each.

The world of the taxi-ride benchmark (Vafa et al., arXiv 2406.03689, section 4), for any city: read from CSV files,
downloaded from OpenStreetMap, or generated (`embedded_city`).  Shapes: N intersections, K destinations, D largest out-degree.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import networkx as nx
import numpy as np

from nextlat.errors import NextLatError
from nextlat.tasks.streets.compass import DIRECTIONS, compass_direction, great_circle_miles
from nextlat.tasks.streets.embedded_city import embedded_city
from nextlat.tasks.streets.sources import read_csv, read_place, write_csv

__all__ = ["DIRECTIONS", "StreetNetwork"]


@dataclass(frozen=True, eq=False)
class StreetNetwork:
    """N intersections and the directed streets between them.

    Args:
        node_ids: N distinct names; they become the tokens of the intersections, so they hold no
            white space.
        latitude, longitude: (N,) float64, degrees.
        targets: (N, 8) int64, the intersection reached by each of DIRECTIONS, -1 where there is no
            street.

    The arrays are made read-only.  Two networks with the same content have the same `fingerprint()`.
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
        if n and not (self.targets.min() >= -1 and self.targets.max() < n):
            raise ValueError("targets must lie in -1..N-1")
        if len(set(self.node_ids)) != n:
            raise ValueError("node_ids are not distinct")

    def __len__(self) -> int:
        return len(self.node_ids)

    def __repr__(self) -> str:
        return f"StreetNetwork({len(self):,} intersections, {self.num_edges:,} streets, {self.fingerprint()})"

    @cached_property
    def out_degree(self) -> np.ndarray:
        """(N,) int64, the number of legal moves at each intersection; 0 at a dead end."""
        return (self.targets >= 0).sum(axis=1)

    @property
    def num_edges(self) -> int:
        """Directed streets: one per legal (intersection, direction)."""
        return int(self.out_degree.sum())

    @cached_property
    def legal_moves(self) -> np.ndarray:
        """(N, D) int64, the legal directions of each intersection in increasing order, then -1."""
        width = max(1, int(self.out_degree.max(initial=0)))
        legal = self.targets >= 0
        order = np.argsort(~legal, axis=1, kind="stable")[:, :width]
        return np.where(np.take_along_axis(legal, order, axis=1), order, -1)

    @cached_property
    def edges(self) -> np.ndarray:
        """(num_edges, 3) int64, rows (source, direction, target), sorted."""
        source, direction = np.nonzero(self.targets >= 0)
        return np.stack([source, direction, self.targets[source, direction]], axis=1)

    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 of names, coordinates and streets."""
        digest = hashlib.sha256("\n".join(self.node_ids).encode())
        for array in (self.latitude, self.longitude, self.targets):
            digest.update(b"\0" + array.astype(array.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()[:16]

    def graph(self) -> nx.MultiDiGraph:
        """A networkx graph on node indices: `name`, `y`, `x` on the nodes; `direction` (also the
        key) on the edges."""
        graph = nx.MultiDiGraph()
        for index, name in enumerate(self.node_ids):
            graph.add_node(
                index, name=name, y=float(self.latitude[index]), x=float(self.longitude[index])
            )
        for source, direction, target in self.edges.tolist():
            graph.add_edge(
                source, target, key=DIRECTIONS[direction], direction=DIRECTIONS[direction]
            )
        return graph

    def hops_to(self, destinations: np.ndarray) -> np.ndarray:
        """Fewest moves from every intersection to each destination.

        Args:
            destinations: (K,) node indices.

        Returns:
            (K, N) int16; 0 at the destination itself, -1 where it cannot be reached.

        Breadth-first search from all destinations at once, one bit per destination.
        """
        destinations = np.asarray(destinations, dtype=np.int64).reshape(-1)
        k, n = len(destinations), len(self)
        # The last row stands for "no street": it is never reached.
        reached_bytes = np.zeros((n + 1, 8 * math.ceil(k / 64)), dtype=np.uint8)
        column = np.arange(k)
        np.bitwise_or.at(
            reached_bytes, (destinations, column // 8), (128 >> (column % 8)).astype(np.uint8)
        )
        reached = reached_bytes.view(np.uint64)
        legal = self.legal_moves
        successors = np.where(legal >= 0, np.take_along_axis(self.targets, legal, axis=1), n)
        # Bit plane j holds bit j of every distance, so that a level costs a few operations on words
        # of 64 destinations.
        planes: list[np.ndarray] = []
        for level in range(1, n + 1):
            fresh = reached[successors[:, 0]]
            for rank in range(1, successors.shape[1]):
                fresh |= reached[successors[:, rank]]
            fresh &= ~reached[:n]
            if not fresh.any():
                break
            reached[:n] |= fresh
            if level.bit_length() > len(planes):
                planes.append(np.zeros_like(fresh))
            for j, plane in enumerate(planes):
                if level >> j & 1:
                    plane |= fresh
        hops = np.unpackbits(reached_bytes[:n], axis=1, count=k).astype(np.int16) - 1
        for j, plane in enumerate(planes):
            hops += np.unpackbits(plane.view(np.uint8), axis=1, count=k).astype(np.int16) << j
        return np.ascontiguousarray(hops.T)

    def miles(self, a: np.ndarray | int, b: np.ndarray | int) -> np.ndarray:
        """Great-circle (haversine) distance in miles between node indices a and b, of any
        broadcastable shapes."""
        return great_circle_miles(
            self.latitude[a], self.longitude[a], self.latitude[b], self.longitude[b]
        )

    # --- parts of a network -----------------------------------------------------------------------------------------

    def subset(self, nodes: np.ndarray) -> Self:
        """The network induced by these node indices ((M,) distinct, in their order); streets that
        leave it are dropped."""
        nodes = np.asarray(nodes, dtype=np.int64)
        renamed = np.full(len(self) + 1, -1, dtype=np.int64)  # the last entry serves the index -1
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
        order.

        Of equally large parts, the one that holds the first intersection.  Without it a walk could end in a dead end.
        """
        parts = (sorted(part) for part in nx.strongly_connected_components(self.graph()))
        best = min(parts, key=lambda part: (-len(part), part[0]), default=[])
        return self.subset(np.array(best, dtype=np.int64))

    def within(self, south: float, west: float, north: float, east: float) -> Self:
        """The largest strongly connected part of the streets inside a bounding box (degrees, bounds
        included).

        Raises:
            NextLatError: the bounds are out of order or no number, or the box holds no two
                connected intersections.
        """
        box = f"the box south={south}, west={west}, north={north}, east={east}"
        if not (south < north and west < east):  # also false for NaN
            raise NextLatError(
                f"{box} is no box: give it as south < north and west < east, in degrees"
            )
        inside = (self.latitude >= south) & (self.latitude <= north)
        inside &= (self.longitude >= west) & (self.longitude <= east)
        part = self.subset(np.flatnonzero(inside)).strongly_connected()
        if len(part) < 2:
            extent = (
                f"latitude {self.latitude.min():.4f} to {self.latitude.max():.4f}, "
                f"longitude {self.longitude.min():.4f} to {self.longitude.max():.4f}"
                if len(self)
                else "empty"
            )
            raise NextLatError(
                f"{box} holds {int(inside.sum())} intersections and no two of them that reach each other: "
                f"take a larger box (the network is {extent})"
            )
        return part

    # --- where networks come from -----------------------------------------------------------------------------------

    @classmethod
    def embedded(
        cls,
        rows: int = 10,
        columns: int = 10,
        seed: int = 0,
        one_way: float = 0.5,
        missing: float = 0.1,
        diagonal: bool = True,
        park: bool = True,
    ) -> Self:
        """A generated city, strongly connected; see
        `nextlat.tasks.streets.embedded_city.embedded_city` for what it looks like."""
        return cls.from_links(*embedded_city(rows, columns, seed, one_way, missing, diagonal, park))

    @classmethod
    def from_csv(cls, directory_or_nodes: str | Path, edges: str | Path | None = None) -> Self:
        """Reads `nodes.csv` (id, lat, lon) and `edges.csv` (source, direction, target); see
        `street_files.read_csv`."""
        return cls(*read_csv(directory_or_nodes, edges))

    @classmethod
    def from_place(cls, place: str, cache: str | Path | None = None) -> Self:
        """Downloads a place's drivable streets from OpenStreetMap, strongly connected; see
        `street_files.read_place`."""
        network = cls.from_links(*read_place(place, cache)).strongly_connected()
        if len(network) < 2:
            raise NextLatError(
                f"the streets of {place!r} do not connect two intersections both ways: take a larger place"
            )
        return network

    @classmethod
    def from_links(
        cls,
        node_ids: Iterable[str],
        latitude: np.ndarray,
        longitude: np.ndarray,
        links: np.ndarray,
        lengths: np.ndarray | None = None,
    ) -> Self:
        """Labels each link (a, b) of `links` (E, 2) with its compass direction and keeps one per
        (a, direction).

        Of several links with one (a, direction), the shortest is kept (`lengths`, (E,), any unit; great-circle distance
        when omitted; of equally short ones the smaller b).  Links of a node to itself have no direction and are dropped.
        """
        ids = tuple(node_ids)
        bare = cls(ids, latitude, longitude, np.full((len(ids), len(DIRECTIONS)), -1))
        links = np.asarray(links, dtype=np.int64).reshape(-1, 2)
        a, b = links[:, 0], links[:, 1]
        length = bare.miles(a, b) if lengths is None else np.asarray(lengths, dtype=np.float64)
        direction = compass_direction(
            bare.latitude[a], bare.longitude[a], bare.latitude[b], bare.longitude[b]
        )
        targets = bare.targets.copy()
        order = np.lexsort((b, length))[
            ::-1
        ]  # longest first: the shortest is written last and stays
        order = order[a[order] != b[order]]
        for link in order.tolist():
            targets[a[link], direction[link]] = b[link]
        return replace(bare, targets=targets)

    def to_csv(self, directory: str | Path) -> None:
        """Writes `nodes.csv` and `edges.csv`, which `from_csv` reads back to an equal network."""
        write_csv(directory, self.node_ids, self.latitude, self.longitude, self.edges)
