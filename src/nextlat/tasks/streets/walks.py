"""Random walks through a street network, packed into rows of tokens (Vafa et al., arXiv 2406.03689,
"random walks").

A sequence is `source destination move move ... end`; its source and destination are the two ends
of the walk. Shapes: N intersections, W walks, M largest number of moves, R rows of T tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from nextlat.batch import IGNORE
from nextlat.errors import NextLatError
from nextlat.tasks.rows import STREAM, Stream, redraw
from nextlat.tasks.streets.network import DIRECTIONS, Pairs, StreetNetwork
from nextlat.tasks.task import FIRST_WORD, PAD, word_tokenizer

END = FIRST_WORD
FIRST_DIRECTION = END + 1
FIRST_NODE = FIRST_DIRECTION + len(DIRECTIONS)
TOKENS_PER_CHUNK = 2**16  # of training rows
TABLE_BYTES = 2**27  # of the table of arrival probabilities, which limits the pairs of a batch


def tokenizer(network: StreetNetwork) -> PreTrainedTokenizerFast:
    """One token per word: `<pad> <unk> end`, the eight directions, then the intersections by name,
    in node order. `end` is the end-of-sequence token."""
    return word_tokenizer(("end", *DIRECTIONS, *network.node_ids), end="end")


class Walks(NamedTuple):
    """W walks; what lies beyond the end of one is -1.

    Attributes:
        lengths: (W,) int64, moves of each.
        nodes: (W, M + 1) int64, from source to destination.
        moves: (W, M) int64, indices in DIRECTIONS.
    """

    lengths: np.ndarray
    nodes: np.ndarray
    moves: np.ndarray

    @property
    def source(self) -> np.ndarray:
        """(W,) node indices."""
        return self.nodes[:, 0]

    @property
    def destination(self) -> np.ndarray:
        """(W,) node indices."""
        return self.nodes[np.arange(len(self.nodes)), self.lengths]


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
    n = len(network)
    excluded = exclude.source * n + exclude.destination if exclude else np.zeros(0)
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
        good &= ~np.isin(source * n + destination, excluded)
        return (nodes_MC.T, moves_MC.T), good

    nodes, moves = redraw(
        count,
        draw,
        lambda walk: (
            f"no walk of {lengths[walk]} moves was found, often as it was tried: use a strongly "
            "connected network, shorter walks, or fewer held-out pairs."
        ),
        # One candidate for each walk at first; then several, since a round costs about the same
        # however small it is.
        tries=lambda pending, attempt: max(4, 512 // pending) if attempt else 1,
    )
    back = np.argsort(order)
    return Walks(drawn, nodes[back].astype(np.int64), moves[back].astype(np.int64))


def _free_walks(
    network: StreetNetwork, lengths: np.ndarray, max_moves: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """One walk of each length ((W,), decreasing): nodes (M + 1, W), moves (M, W) int32, -1 beyond
    a dead end or the end."""
    legal, width = network.legal_moves, network.legal_moves.shape[1]
    # An extra node, index -1, stands for "off the map" and leads to itself, so that the loop needs
    # no branch.
    next_node = np.where(legal >= 0, np.take_along_axis(network.targets, legal, axis=1), -1)
    move_table, next_table = (
        np.pad(table, ((0, 1), (0, 0)), constant_values=-1).astype(np.int32).reshape(-1)
        for table in (legal, next_node)
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
        lengths, nodes, moves = (x[part] for x in walks)  # views
        lengths[:] = min_moves + _draw(weights, rng)
        nodes[:, 0] = source
        for made in range(int(lengths.max())):
            walk = np.flatnonzero(lengths > made)
            at = nodes[walk, made]
            legal = network.legal_moves[at]
            reached = np.where(legal >= 0, network.targets[at[:, None], legal], -1)
            still = (lengths[walk] - made - 1)[:, None]
            weights = np.where(legal >= 0, arrival[still, reached, walk[:, None]], 0.0)
            choice = _draw(weights, rng)[:, None]
            moves[walk, made] = np.take_along_axis(legal, choice, axis=1)[:, 0]
            nodes[walk, made + 1] = np.take_along_axis(reached, choice, axis=1)[:, 0]
    return walks


def _draw(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One column index per row of `weights` (W, C), in proportion to the weights (not all zero)."""
    total = np.cumsum(weights, axis=1)
    threshold = rng.random(len(weights)) * total[:, -1]
    # The first column whose cumulative weight exceeds the threshold: never one of weight zero.
    return (total > threshold[:, None]).argmax(axis=1)


def pack(walks: Walks, row_length: int, rows: int | None = None) -> dict[str, Tensor]:
    """Pack walks into rows of tokens, several documents to a row, none split: each goes to the
    fullest row it fits in.

    Args:
        walks: what to pack, in this order.
        row_length: T.
        rows: R; packing stops at the first walk for which there is no room. Default: as many as all
            walks take.

    Returns:
        `input_ids`, `labels` (-100 on source, destination and padding), `position_ids` (from 0 in
        every document), `attention_mask` (0 on the padded tail), each (R, T) int64.

    Raises:
        NextLatError: a walk is longer than a row.
    """
    row_of, start_of, used = _best_fit((walks.lengths + 3).tolist(), row_length, rows)
    walks = Walks(*(x[: len(row_of)] for x in walks))
    lengths, moves = walks.lengths, walks.moves
    row_count = len(used) if rows is None else rows
    input_ids = np.full(row_count * row_length, PAD)
    labels = np.full(row_count * row_length, IGNORE)
    position_ids = np.zeros(row_count * row_length, dtype=np.int64)
    start = np.array(row_of, dtype=np.int64) * row_length + np.array(start_of, dtype=np.int64)
    input_ids[start] = walks.source + FIRST_NODE
    input_ids[start + 1] = walks.destination + FIRST_NODE
    on_way = np.arange(moves.shape[1]) < lengths[:, None]
    spot = (start[:, None] + np.arange(2, 2 + moves.shape[1]))[on_way]
    input_ids[spot] = labels[spot] = moves[on_way] + FIRST_DIRECTION
    input_ids[start + 2 + lengths] = labels[start + 2 + lengths] = END
    size = lengths + 3
    within = np.arange(int(size.sum())) - np.repeat(np.cumsum(size) - size, size)
    position_ids[np.repeat(start, size) + within] = within
    columns = {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "attention_mask": (input_ids != PAD).astype(np.int64),
    }
    return {name: torch.from_numpy(x.reshape(-1, row_length)) for name, x in columns.items()}


def _best_fit(
    sizes: Sequence[int], capacity: int, rows: int | None
) -> tuple[list[int], list[int], list[int]]:
    """Row and offset of each document, in turn, until one does not fit; and the tokens used in each
    row."""
    row_of: list[int] = []
    start_of: list[int] = []
    used: list[int] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by free space
    nonempty = 0  # bit s is set if some row has s tokens free
    for size in sizes:
        fitting = nonempty >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[free].pop()
            if not open_rows[free]:
                nonempty &= ~(1 << free)
        else:
            if size > capacity:
                raise NextLatError(
                    f"a walk of {size} tokens does not fit in a row of {capacity}: make row_length "
                    "larger."
                )
            if len(used) == rows:
                break
            row, free = len(used), capacity
            used.append(0)
        row_of.append(row)
        start_of.append(capacity - free)
        used[row] += size
        free -= size
        open_rows[free].append(row)
        nonempty |= 1 << free
    return row_of, start_of, used


def walk_stream(
    network: StreetNetwork,
    *,
    row_length: int,
    min_moves: int,
    max_moves: int,
    seed: int,
    exclude: Pairs | None = None,
    count: int = STREAM,
) -> Stream:
    """Packed rows of training walks: see `random_walks`, `pack` and `Stream`.

    Args:
        row_length: tokens of a row, at least max_moves + 3.
        seed: a stream with another seed has other walks.
        count: rows that the stream announces.
    """
    rows = max(1, TOKENS_PER_CHUNK // row_length)
    mean_size = (min_moves + max_moves) / 2 + 3
    # A tenth more than fit on average, for none may be missing.
    walks = int(1.1 * rows * row_length / mean_size) + 8
    draw = partial(
        random_walks, network, walks, min_moves=min_moves, max_moves=max_moves, exclude=exclude
    )
    return Stream(partial(_packed, draw, row_length, rows), rows, seed, count)


def _packed(
    draw: Callable[..., Walks], row_length: int, rows: int, rng: np.random.Generator
) -> dict[str, Tensor]:
    return pack(draw(rng=rng), row_length, rows)
