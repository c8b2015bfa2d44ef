"""Rows of tokens: those of an array in any order, streams made in chunks, and rows drawn again
until none is refused.

Shapes: R rows, T tokens of a row.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nextlat.batch import IGNORE
from nextlat.errors import NextLatError

STREAM = 2**40  # rows that a training stream announces: more than anyone trains on
CACHED_CHUNKS = 4
ROUNDS = 1000  # of drawing again before what is wanted counts as out of reach

Columns = Mapping[str, Tensor | np.ndarray]  # `input_ids`, `labels`, ... -> (R, T) integers


class Rows(Dataset[dict[str, Tensor]]):
    """Rows that are all at hand: an endless stream of epochs, each in an order of its own, or once
    in order.

    Args:
        columns: `input_ids` and what else a batch has.
        seed: the order of an epoch follows from (seed, epoch); None = once, in order.
        prompt_length: tokens at the start of a row that have no label, where `columns` has no
            `labels`.
    """

    def __init__(
        self, columns: Columns, *, seed: int | None = None, prompt_length: int = 0
    ) -> None:
        self.columns, self.seed, self.prompt_length = columns, seed, prompt_length
        self.count = len(columns["input_ids"])
        self._epoch, self._order = -1, np.arange(self.count)

    def __len__(self) -> int:
        return self.count if self.seed is None else STREAM

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        epoch, position = divmod(index, self.count)
        if self.seed is not None and epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self.count, self.seed, epoch)
        row = _row(self.columns, int(self._order[position]))
        if "labels" not in row:
            row["labels"] = row["input_ids"].clone()
            row["labels"][: self.prompt_length] = IGNORE
        return row


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch takes `count` items, in 4 bytes each (8 from 2^32 on)."""
    order = np.arange(count, dtype=np.uint32 if count < 2**32 else np.int64)
    np.random.default_rng((seed, epoch)).shuffle(order)
    return order


class Stream(Dataset[dict[str, Tensor]]):
    """An endless stream of rows, made in chunks when asked for: row i depends on (seed, i) alone.

    The last few chunks are kept: read rows in order (it is random as it is), since a shuffled order
    makes a chunk for nearly every row.

    Args:
        make: a generator of random numbers -> the columns of one chunk.
        rows_per_chunk: how many rows `make` makes.
        seed: of the stream.
        count: rows that the stream announces.
    """

    def __init__(
        self,
        make: Callable[[np.random.Generator], Columns],
        rows_per_chunk: int,
        seed: int,
        count: int = STREAM,
    ) -> None:
        self.make, self.rows_per_chunk, self.seed, self.count = make, rows_per_chunk, seed, count
        self._chunks: OrderedDict[int, Columns] = OrderedDict()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(f"row {index} of {self.count}")
        number, row = divmod(index, self.rows_per_chunk)
        if number not in self._chunks:
            made = self.make(np.random.default_rng((self.seed, number)))
            while len(self._chunks) >= CACHED_CHUNKS:
                self._chunks.popitem(last=False)
            self._chunks[number] = made
        self._chunks.move_to_end(number)
        return _row(self._chunks[number], row)


def _row(columns: Columns, row: int) -> dict[str, Tensor]:
    """A copy, so that whoever writes into an item does not change the next one's."""
    return {name: torch.as_tensor(x[row]).to(torch.int64, copy=True) for name, x in columns.items()}


def row_keys(rows: np.ndarray) -> np.ndarray:
    """(R, T) -> (R,) one opaque value per row, equal exactly where rows are."""
    rows = np.ascontiguousarray(rows)
    return rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1])))[:, 0]


def redraw(
    count: int,
    draw: Callable[[np.ndarray], tuple[Sequence[np.ndarray], np.ndarray]],
    failure: Callable[[int], str],
    *,
    tries: Callable[[int, int], int] = lambda pending, attempt: 1,
    fill: int = 0,
) -> list[np.ndarray]:
    """Random rows; one whose candidates are all refused is drawn again.

    Args:
        count: R.
        draw: numbers (C,) of the rows to draw a candidate for, ascending -> the candidates, as one
            or several arrays (C, ...), and which of them (C,) are good. After the first attempt
            candidates may be narrower.
        failure: the number of a row for which none was found -> a sentence that says so.
        tries: rows still to be drawn, number of the attempt (from 0) -> candidates for each of
            them. The first good one is taken.
        fill: what stands where a candidate is narrower than those of the first attempt.

    Returns:
        One array (R, ...) for each that `draw` gives.

    Raises:
        NextLatError: hardly any candidate is good.
    """
    drawn: list[np.ndarray] = []
    pending = np.arange(count)
    for attempt in range(ROUNDS):
        rows = np.repeat(pending, tries(len(pending), attempt))
        candidates, good = draw(rows)
        if attempt == 0 and len(rows) == count:  # no copy of what is good for the most part
            drawn, pending = list(candidates), np.flatnonzero(~good)
        else:
            if not drawn:
                drawn = [np.empty_like(x, shape=(count, *x.shape[1:])) for x in candidates]
            chosen = np.flatnonzero(good)
            found, first = np.unique(rows[chosen], return_index=True)
            for array, candidate in zip(drawn, candidates, strict=True):
                if candidate.shape[1:] != array.shape[1:]:
                    array[found] = fill
                within = array[(slice(None), *(slice(size) for size in candidate.shape[1:]))]
                within[found] = candidate[chosen[first]]  # a view
            pending = np.setdiff1d(pending, found, assume_unique=True)
        if len(pending) == 0:
            return drawn
    raise NextLatError(failure(int(pending[0])))
