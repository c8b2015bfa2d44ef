"""Tokens of the street task: its tokenizer, and rides packed into rows.

A sequence is `source destination move move ... end`. Shapes: W walks, R rows of T tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from nextlat.batch import IGNORE
from nextlat.errors import NextLatError
from nextlat.tasks.rows import STREAM, Stream
from nextlat.tasks.streets.network import DIRECTIONS, StreetNetwork
from nextlat.tasks.streets.walks import Walks
from nextlat.tasks.task import FIRST_WORD, PAD, word_tokenizer

END = FIRST_WORD
FIRST_DIRECTION = END + 1
FIRST_NODE = FIRST_DIRECTION + len(DIRECTIONS)
TOKENS_PER_CHUNK = 2**16  # of training rows
SAMPLE = 2000  # rides drawn to know how long they are on average


def tokenizer(network: StreetNetwork) -> PreTrainedTokenizerFast:
    """One token per word: `<pad> <unk> end`, the eight directions, then the intersections by name,
    in node order. `end` is the end-of-sequence token."""
    return word_tokenizer(("end", *DIRECTIONS, *network.node_ids), end="end")


def pack(walks: Walks, row_length: int, rows: int | None = None) -> dict[str, Tensor]:
    """Pack rides into rows of tokens, several documents to a row, none split: each goes to the
    fullest row it fits in. A ride that was cut has no `end`.

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
    sizes = walks.lengths + 2 + walks.arrived
    row_of, start_of, used = _best_fit(sizes.tolist(), row_length, rows)
    walks = Walks(*(x[: len(row_of)] for x in walks))
    size, moves = sizes[: len(row_of)], walks.moves
    row_count = len(used) if rows is None else rows
    input_ids = np.full(row_count * row_length, PAD)
    labels = np.full(row_count * row_length, IGNORE)
    position_ids = np.zeros(row_count * row_length, dtype=np.int64)
    start = np.array(row_of, dtype=np.int64) * row_length + np.array(start_of, dtype=np.int64)
    input_ids[start] = walks.source + FIRST_NODE
    input_ids[start + 1] = walks.destination + FIRST_NODE
    on_way = np.arange(moves.shape[1]) < walks.lengths[:, None]
    spot = (start[:, None] + np.arange(2, 2 + moves.shape[1]))[on_way]
    input_ids[spot] = labels[spot] = moves[on_way] + FIRST_DIRECTION
    end = (start + size - 1)[walks.arrived]
    input_ids[end] = labels[end] = END
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


def ride_stream(
    draw: Callable[..., Walks],
    *,
    row_length: int,
    seed: int,
    mean_moves: float | None = None,
    count: int = STREAM,
) -> Stream:
    """Packed rows of training rides: see `pack` and `Stream`.

    Args:
        draw: called with the number of rides and `rng`, e.g. `partial(random_walks, network, ...)`.
        row_length: tokens of a row.
        seed: a stream with another seed has other rides.
        mean_moves: of a ride; default: that of a sample.
        count: rows that the stream announces.
    """
    rows = max(1, TOKENS_PER_CHUNK // row_length)
    if mean_moves is None:
        mean_moves = float(draw(SAMPLE, rng=np.random.default_rng(0)).lengths.mean())
    # A tenth more than fit on average, for none may be missing.
    rides = int(1.1 * rows * row_length / (mean_moves + 3)) + 8
    return Stream(partial(_packed, draw, rides, row_length, rows), rows, seed, count)


def _packed(
    draw: Callable[..., Walks], rides: int, row_length: int, rows: int, rng: np.random.Generator
) -> dict[str, Tensor]:
    return pack(draw(rides, rng=rng), row_length, rows)
