"""The rides that models are trained and tested on: the three kinds of Vafa et al. (arXiv
2406.03689), and walks that stop where they arrive.

Random walks have a length drawn in advance, and their destination is where they end. The others
have a destination drawn in advance, and end when they reach it.

Shapes: N intersections, W walks, M largest number of moves.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from nextlat.errors import NextLatError
from nextlat.tasks.rows import redraw
from nextlat.tasks.streets.network import Pairs, StreetNetwork

TABLE_BYTES = 2**27  # of the table of arrival probabilities, which limits the pairs of a batch


class Walks(NamedTuple):
    """W walks; what lies beyond the end of one is -1.

    Attributes:
        lengths: (W,) int64, moves of each.
        nodes: (W, M + 1) int64, from source to destination.
        moves: (W, M) int64, indices in DIRECTIONS.
        destination: (W,) int64, node indices.
    """

    lengths: np.ndarray
    nodes: np.ndarray
    moves: np.ndarray
    destination: np.ndarray

    @property
    def source(self) -> np.ndarray:
        """(W,) node indices."""
        return self.nodes[:, 0]

    @property
    def arrived(self) -> np.ndarray:
        """(W,) whether each ends at its destination; others have been cut."""
        return self.nodes[np.arange(len(self.nodes)), self.lengths] == self.destination


def random_walks(
    network: StreetNetwork,
    count: int,
    *,
    min_moves: int,
    max_moves: int,
    rng: np.random.Generator,
    exclude: Pairs | None = None,
) -> Walks:
    """Walks of uniformly random legal moves from uniformly random intersections.

    The length of each walk is uniform in min_moves..max_moves. A walk that comes to a dead end too
    early, ends where it started, or leads from source to destination of an excluded pair is drawn
    again with the same length.

    Args:
        network: the city.
        count: W.
        min_moves: shortest length, at least 1.
        max_moves: longest length, M.
        rng: where all randomness comes from.
        exclude: pairs that no walk may lead from and to.

    Raises:
        NextLatError: walks of some length keep failing, as in a network without loops.
    """
    drawn = rng.integers(min_moves, max_moves + 1, size=count)
    # Longest first, so that the walkers still on their way are always the first ones.
    order = np.argsort(-drawn, kind="stable")
    lengths = drawn[order]

    def draw(walks: np.ndarray) -> tuple[Sequence[np.ndarray], np.ndarray]:
        length = lengths[walks]
        nodes_MC, moves_MC = _free_walks(network, length, max_moves, rng)
        source = nodes_MC[0].astype(np.int64)
        destination = nodes_MC[length, np.arange(len(length))]
        good = (destination >= 0) & (destination != source)
        good &= ~_among(exclude, source, destination)
        return (nodes_MC.T, moves_MC.T), good

    nodes, moves = redraw(
        count,
        draw,
        lambda walk: (
            f"no walk of {lengths[walk]} moves was found, often as it was tried: use a strongly "
            "connected network, shorter walks, or fewer held-out pairs."
        ),
        tries=_tries,
    )
    back = np.argsort(order)
    nodes, moves = (x[back].astype(np.int64) for x in (nodes, moves))
    return Walks(drawn, nodes, moves, nodes[np.arange(count), drawn])


def _free_walks(
    network: StreetNetwork, lengths: np.ndarray, max_moves: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One walk of each length ((W,), decreasing): nodes (M + 1, W), moves (M, W) int32, -1 beyond
    a dead end or the end."""
    width = network.legal_moves.shape[1]
    # An extra node, index -1, stands for "off the map" and leads to itself, so that the loop needs
    # no branch.
    move_table, next_table = (
        np.pad(table, ((0, 1), (0, 0)), constant_values=-1).astype(np.int32).reshape(-1)
        for table in (network.legal_moves, network.successors)
    )
    degree_table = np.concatenate([network.out_degree, [1]]).astype(np.float32)
    active = np.searchsorted(-lengths, -np.arange(1, max_moves + 1), side="right")
    nodes = np.full((max_moves + 1, len(lengths)), -1, dtype=np.int32)
    moves = np.full((max_moves, len(lengths)), -1, dtype=np.int32)
    nodes[0] = rng.integers(0, len(network), size=len(lengths))
    for step in range(int(lengths[0])):
        at = nodes[step, : active[step]]
        choice = (rng.random(len(at), dtype=np.float32) * degree_table[at]).astype(np.int32)
        choice += at * width
        moves[step, : len(at)] = move_table[choice]
        nodes[step + 1, : len(at)] = next_table[choice]
    return nodes, moves


def conditioned_walks(
    network: StreetNetwork,
    pairs: Pairs,
    *,
    min_moves: int,
    max_moves: int,
    rng: np.random.Generator,
) -> Walks:
    """One random walk per pair, as likely as uniformly random legal moves of a uniformly random
    length make it: the held-out sequences, for training never sees their pairs.

    The chain is conditioned on where it ends (Doob's h-transform). With a_k(n) the probability that
    k random moves from n end at the destination, a length L is drawn in proportion to a_L(source),
    and with k moves left, the move from n to m in proportion to a_{k-1}(m). (`random_walks` draws
    refused walks again with their length kept, which weighs the lengths a little differently; the
    moves of a given length follow the same law.)

    Args:
        network: the city.
        pairs: where the walks lead from and to.
        min_moves: shortest length, at least 1.
        max_moves: longest length, M.
        rng: where all randomness comes from.

    Raises:
        NextLatError: some pair has no walk of min_moves to max_moves moves.
    """
    n, count = len(network), len(pairs)
    step = network.adjacency.multiply(1 / np.maximum(network.out_degree, 1)[:, None]).tocsr()
    walks = Walks(
        np.zeros(count, dtype=np.int64),
        np.full((count, max_moves + 1), -1, dtype=np.int64),
        np.full((count, max_moves), -1, dtype=np.int64),
        pairs.destination,
    )
    batch = max(1, TABLE_BYTES // (8 * n * (max_moves + 1)))
    for first in range(0, count, batch):
        part = slice(first, first + batch)
        source, destination = pairs.source[part], pairs.destination[part]
        walk = np.arange(len(source))
        arrival = np.zeros((max_moves + 1, n, len(walk)))  # [k, m] = a_k(m) for each destination
        arrival[0, destination, walk] = 1.0
        for left in range(1, max_moves + 1):
            arrival[left] = step @ arrival[left - 1]
        weights = arrival[min_moves:, source, walk].T
        lost = np.flatnonzero(~weights.any(axis=1))
        if len(lost):
            names = [network.node_ids[end[lost[0]]] for end in (source, destination)]
            raise NextLatError(
                f"no walk of {min_moves} to {max_moves} moves leads from {names[0]} to {names[1]}: "
                "hold out pairs with a smaller max_hops, or raise max_moves."
            )
        lengths, nodes, moves, _ = (x[part] for x in walks)  # views
        lengths[:] = min_moves + _draw(weights, rng)
        nodes[:, 0] = source
        for made in range(int(lengths.max())):
            walk = np.flatnonzero(lengths > made)
            at, still = nodes[walk, made], (lengths[walk] - made - 1)[:, None]
            reached = network.successors[at]
            weights = np.where(reached >= 0, arrival[still, reached, walk[:, None]], 0.0)
            choice = _draw(weights, rng)
            moves[walk, made] = network.legal_moves[at, choice]
            nodes[walk, made + 1] = network.successors[at, choice]
    return walks


def stopping_rides(
    network: StreetNetwork,
    count: int,
    *,
    max_moves: int,
    noise: float,
    arrive: bool,
    rng: np.random.Generator,
    exclude: Pairs | None = None,
    pairs: Pairs | None = None,
) -> Walks:
    """Rides from a source to a destination, where they stop.

    Each move is, with a probability, any legal one, and otherwise one that leads nearer to the
    destination; uniformly among them. So noise 0 gives shortest paths (by the number of moves), and
    noise 1 random walks. (The shortest paths of Vafa et al. are those by length, and the noise of
    theirs varies the lengths of streets, as traffic does.)

    Args:
        network: the city, strongly connected.
        count: W.
        max_moves: limit of the length, M.
        noise: the probability.
        arrive: draw a ride again that has not arrived within max_moves; otherwise it is cut there.
        rng: where all randomness comes from.
        exclude: pairs that no ride may lead from and to.
        pairs: where the rides lead from and to, W; default: uniformly random ones.

    Raises:
        NextLatError: hardly any ride arrives.
    """

    def draw(rows: np.ndarray) -> tuple[Sequence[np.ndarray], np.ndarray]:
        source, destination = (
            rng.integers(len(network), size=(2, len(rows)))
            if pairs is None
            else (pairs.source[rows], pairs.destination[rows])
        )
        lengths = np.zeros(len(rows), dtype=np.int64)
        nodes = np.full((len(rows), max_moves + 1), -1)
        moves = np.full((len(rows), max_moves), -1)
        nodes[:, 0] = source
        on_way = np.flatnonzero(source != destination)
        for made in range(max_moves):
            at, to = nodes[on_way, made], destination[on_way]
            reached = network.successors[at]
            nearer = network.hops[to[:, None], reached] < network.hops[to, at][:, None]
            free = rng.random((len(on_way), 1)) < noise
            choice = _draw((reached >= 0) & (nearer | free), rng)
            moves[on_way, made] = network.legal_moves[at, choice]
            nodes[on_way, made + 1] = network.successors[at, choice]
            lengths[on_way] += 1
            on_way = on_way[nodes[on_way, made + 1] != to]
        good = (source != destination) & ~_among(exclude, source, destination)
        if arrive:
            good[on_way] = False
        return (lengths, nodes, moves, destination), good

    rides = redraw(
        count,
        draw,
        lambda ride: (
            f"no ride of at most {max_moves} moves arrived, often as it was tried: raise "
            "max_moves, or hold out pairs with a smaller max_hops."
        ),
        tries=_tries,
    )
    return Walks(*rides)


def again(draw: Callable[..., Walks], distinct: int | None, seed: int) -> Callable[..., Walks]:
    """What draws among so many rides, which it draws with the seed; or `draw` itself."""
    if distinct is None:
        return draw
    return partial(_some, draw(distinct, rng=np.random.default_rng([seed, 0xA6A])))


def _some(pool: Walks, count: int, *, rng: np.random.Generator) -> Walks:
    chosen = rng.integers(len(pool.lengths), size=count)
    return Walks(*(x[chosen] for x in pool))


def _tries(pending: int, attempt: int) -> int:
    """One candidate for each ride at first; then several, since a round costs about the same
    however small it is."""
    return max(4, 512 // pending) if attempt else 1


def _among(pairs: Pairs | None, source: np.ndarray, destination: np.ndarray) -> np.ndarray:
    """(C,) which (source, destination) are among the pairs."""
    if not pairs:
        return np.zeros(len(source), dtype=bool)
    n = max(pairs.destination.max(), destination.max()) + 1
    return np.isin(source * n + destination, pairs.source * n + pairs.destination)


def _draw(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One column index per row of `weights` (W, C), in proportion to the weights (not all zero)."""
    total = np.cumsum(weights, axis=1)
    threshold = rng.random(len(weights)) * total[:, -1]
    # The first column whose cumulative weight exceeds the threshold: never one of weight zero.
    return (total > threshold[:, None]).argmax(axis=1)
