"""Tokens become packed rows with explicit document boundaries.

Shapes: C documents, N tokens of all of them, T tokens of a row.
"""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nextlat.batch import IGNORE
from nextlat.tasks.rows import STREAM, epoch_order
from nextlat.tasks.text.shards import Sums, Tokens


class PackedDocuments(Dataset[dict[str, Tensor]]):
    """Rows of T tokens cut from the documents laid end to end; nothing is left out and only the
    last row is padded.

    A document that reaches the end of its row goes on at the start of the next one as a segment of
    its own: positions restart there as they do at every document, so that nothing ever looks
    across.

    Args:
        tokens: the documents.
        row_length: T.
        seed: a stream without end, in which the documents are shuffled anew for every epoch by
            (seed, epoch): row i depends on (seed, i) alone. None: once, in order.
        rows: without a seed, how many at most.

    The items have `input_ids`, `labels`, `position_ids`, each (T,) int64; without a seed also
    `attention_mask`, 0 on the padded end.
    """

    def __init__(
        self, tokens: Tokens, row_length: int, *, seed: int | None, rows: int | None = None
    ) -> None:
        self.tokens, self.row_length, self.seed = tokens, row_length, seed
        whole = -(-tokens.total // row_length)
        self.rows = whole if rows is None else min(rows, whole)
        self._epoch = -1

    def __len__(self) -> int:
        return self.rows if self.seed is None else STREAM

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        T, total = self.row_length, self.tokens.total
        input_ids, position_ids = np.zeros(T, dtype=np.int64), np.zeros(T, dtype=np.int64)
        labels = np.full(T, IGNORE, dtype=np.int64)
        filled = 0
        while filled < T:
            epoch, position = divmod(index * T + filled, total)
            if epoch and self.seed is None:
                break
            self._shuffle(epoch)
            place, start = self._starts.find(position)
            part = (int(self._order[place]), start, start + T - filled)
            piece = self.tokens.document(*part)
            end = filled + len(piece)
            input_ids[filled:end] = piece
            labels[filled:end] = self.tokens.labels(*part) if self.tokens.scored else piece
            position_ids[filled:end] = np.arange(len(piece))
            filled = end
        row = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
        if self.seed is None:
            row["attention_mask"] = (np.arange(T) < filled).astype(np.int64)
        return {name: torch.from_numpy(x) for name, x in row.items()}

    def _shuffle(self, epoch: int) -> None:
        """`order[c]` is the document that comes c-th in this epoch: 4 bytes of each."""
        if epoch != self._epoch:
            count, self._epoch = len(self.tokens), epoch
            self._order = (
                np.arange(count, dtype=np.uint32)
                if self.seed is None
                else epoch_order(count, self.seed, epoch)
            )
            self._starts = Sums(self.tokens.sizes, self._order)
