"""Random walks from a given source to a given destination: the held-out sequences of the street
task.

Held-out pairs never occur in training, so their walks cannot be had by waiting for them.  They are drawn here from the law
that `random_walks` would give them, by conditioning the chain on where it ends (Doob's h-transform).
Shapes: K pairs, B pairs at a time, N intersections, M most moves, D largest out-degree.
"""

import numpy as np
from scipy.sparse import csr_array

from nextlat.errors import NextLatError
from nextlat.tasks.streets.network import StreetNetwork
from nextlat.tasks.streets.walks import Pairs

TABLE_BYTES = (
    2**27
)  # of the table of arrival probabilities, which limits the pairs worked on at a time


def conditioned_walks(
    network: StreetNetwork,
    pairs: Pairs,
    *,
    min_moves: int,
    max_moves: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One random walk per pair, as likely as uniformly random legal moves of a uniformly random
    length make it.

    With a_k(n) the probability that k random moves from n end at the destination, a length L is drawn in proportion to
    a_L(source), and with k moves left, the move from n to m in proportion to a_{k-1}(m).  (Training draws refused walks again
    with their length kept, which weighs the lengths a little differently; the moves of a given length follow the same law.)

    Returns:
        lengths (K,), nodes (K, M + 1), moves (K, M) int64, -1 beyond the length of a walk: as
        `random_walks` does.

    Raises:
        NextLatError: some pair has no walk of min_moves to max_moves moves.
    """
    if not 1 <= min_moves <= max_moves:
        raise NextLatError(
            f"walks of {min_moves} to {max_moves} moves: give 1 <= min_moves <= max_moves"
        )
    n, k = len(network), len(pairs)
    source, _, target = network.edges.T
    step = csr_array((1.0 / network.out_degree[source], (source, target)), shape=(n, n))
    lengths = np.zeros(k, dtype=np.int64)
    nodes = np.full((k, max_moves + 1), -1, dtype=np.int64)
    moves = np.full((k, max_moves), -1, dtype=np.int64)
    batch = max(1, TABLE_BYTES // (8 * n * (max_moves + 1)))
    for first in range(0, k, batch):
        part = slice(first, min(first + batch, k))
        width = part.stop - part.start
        arrival = np.zeros(
            (max_moves + 1, n, width)
        )  # arrival[k, m, b] = a_k(m) for the destination of pair b
        arrival[0, pairs.destination[part], np.arange(width)] = 1.0
        for left in range(1, max_moves + 1):
            arrival[left] = step @ arrival[left - 1]
        weights = arrival[min_moves:, pairs.source[part], np.arange(width)].T
        if not weights.any(axis=1).all():
            lost = first + int(np.flatnonzero(~weights.any(axis=1))[0])
            names = [network.node_ids[int(end[lost])] for end in (pairs.source, pairs.destination)]
            raise NextLatError(
                f"no walk of {min_moves} to {max_moves} moves leads from {names[0]} to {names[1]}: "
                "hold out pairs with a smaller max_hops, or raise max_moves"
            )
        lengths[part] = min_moves + _draw(weights, rng)
        _walk(network, arrival, pairs.source[part], lengths[part], nodes[part], moves[part], rng)
    return lengths, nodes, moves


def _walk(
    network: StreetNetwork,
    arrival: np.ndarray,
    source: np.ndarray,
    lengths: np.ndarray,
    nodes: np.ndarray,
    moves: np.ndarray,
    rng: np.random.Generator,
) -> None:
    """Fills in B walks: `arrival` (M + 1, N, B), `source`, `lengths` (B,), `nodes` (B, M + 1),
    `moves` (B, M)."""
    nodes[:, 0] = source
    for step in range(int(lengths.max())):
        walk = np.flatnonzero(lengths > step)
        at = nodes[walk, step]
        legal = network.legal_moves[at]
        reached = np.where(legal >= 0, network.targets[at[:, None], legal], -1)
        weights = np.where(
            legal >= 0, arrival[(lengths[walk] - step - 1)[:, None], reached, walk[:, None]], 0.0
        )
        choice = _draw(weights, rng)
        moves[walk, step] = legal[np.arange(len(walk)), choice]
        nodes[walk, step + 1] = reached[np.arange(len(walk)), choice]


def _draw(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One column index per row of `weights` (B, C), in proportion to the weights (not all zero)."""
    total = np.cumsum(weights, axis=1)
    threshold = rng.random(len(weights)) * total[:, -1]
    # The first column whose cumulative weight exceeds the threshold: never one of weight zero.
    return (total > threshold[:, None]).argmax(axis=1)
