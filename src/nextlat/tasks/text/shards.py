"""Tokens on the disk, in shards (see `corpus`), read by index.

Reading is by position, not through a memory map: every page of a map that was ever touched counts
as memory of each process, and a file that is cut short under it kills them.

Shapes: C documents, N tokens of all of them.
"""

import json
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from nextlat.batch import IGNORE
from nextlat.errors import NextLatError
from nextlat.tasks.text.documents import Progress

OPEN = 256  # files at a time
STEP = 256  # documents between two sums that are kept
PART = 2**22  # numbers read at a time where all are
AGAIN = "start again, and the tokens are made anew, or go on where they are whole"


@dataclass(frozen=True)
class Shard:
    """One file.

    Attributes:
        path: of the file.
        documents: how many it holds.
        tokens: how many it holds.
        dtype: of the tokens.
        offsets: byte at which each array begins.
        progress: of the source at its end.
    """

    path: Path
    documents: int
    tokens: int
    dtype: np.dtype[Any]
    offsets: dict[str, int]
    progress: Progress

    def sizes(self) -> np.ndarray:
        """(C,) uint32."""
        return np.fromfile(self.path, np.uint32, self.documents, offset=self.offsets["sizes"])


def read_shard(path: Path) -> tuple[str, Shard]:
    """The hash of the corpus that a shard belongs to, and the shard; its tokens stay on the disk.

    Raises:
        OSError, SafetensorError, ValueError, LookupError, TypeError: it is not a whole shard.
    """
    with safe_open(path, "np") as file:  # refuses one whose size is not what it should be
        about, [documents] = (
            json.loads(file.metadata()["nextlat"]),
            file.get_slice("sizes").get_shape(),
        )
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
    header.pop("__metadata__", None)
    [tokens] = header["ids"]["shape"]
    dtype = np.dtype({"U16": np.uint16, "U32": np.uint32}[header["ids"]["dtype"]])
    offsets = {name: 8 + length + array["data_offsets"][0] for name, array in header.items()}
    progress = Progress(*about["progress"])
    return about["corpus"], Shard(path, documents, tokens, dtype, offsets, progress)


class Sums:
    """Where each of many things of different sizes begins when they lie end to end. Only every
    256th sum is kept.

    Args:
        sizes: (C,) integers.
        order: (C,) in which they lie; None = as they are.
    """

    def __init__(self, sizes: np.ndarray, order: np.ndarray | None = None) -> None:
        self._sizes, self._order = sizes, order
        self._kept = np.zeros(-(-len(sizes) // STEP) + 1, np.int64)
        for start in range(0, len(sizes), STEP * STEP):
            part = self._part(start, start + STEP * STEP)
            sums = np.add.reduceat(part, np.arange(0, len(part), STEP), dtype=np.int64)
            self._kept[start // STEP + 1 :][: len(sums)] = sums
        np.cumsum(self._kept, out=self._kept)
        self._step, self._first, self._ends = 0, 0, list[int]()  # where it was looked for last

    def _part(self, start: int, stop: int) -> np.ndarray:
        if self._order is None:
            return self._sizes[start:stop]
        return self._sizes[self._order[start:stop]]

    @property
    def total(self) -> int:
        return int(self._kept[-1])

    def __getitem__(self, index: int) -> int:
        step, rest = divmod(index, STEP)
        before = self._part(index - rest, index).sum(dtype=np.int64)
        return int(self._kept[step] + before)

    def find(self, position: int) -> tuple[int, int]:
        """The place in the order of what lies at a position, and how far into it that is."""
        if not self._ends or not self._first <= position < self._ends[-1]:
            self._step = int(np.searchsorted(self._kept, position, side="right")) - 1
            self._first = int(self._kept[self._step])
            part = self._part(self._step * STEP, (self._step + 1) * STEP)
            self._ends = (self._first + part.cumsum(dtype=np.int64)).tolist()
        place = bisect_right(self._ends, position)
        start = self._ends[place - 1] if place else self._first
        return self._step * STEP + place, position - start


class Tokens:
    """Tokenised documents, one after the other, in shards; 4 bytes of each are held in memory.

    Args:
        shards: of one corpus, from the first on.
        limit: of tokens; documents after the one that reaches it are left out. None = there is no
            limit.

    Attributes:
        sizes: (C,) uint32, tokens of each document.
        total: N.
        scored: whether some of the tokens have no label.
    """

    def __init__(self, shards: Sequence[Shard], limit: int | None = None) -> None:
        firsts = [*accumulate((shard.tokens for shard in shards), initial=0)]
        if limit is not None:
            shards = shards[: bisect_left(firsts, limit)]
        self._shards, self._firsts = shards, firsts
        sizes = np.empty(sum(shard.documents for shard in shards), np.uint32)
        filled = 0
        for shard in shards:
            sizes[filled : filled + shard.documents] = shard.sizes()
            filled += shard.documents
        if limit is not None and shards and firsts[len(shards)] > limit:
            first = filled - shards[-1].documents
            ends = firsts[len(shards) - 1] + np.cumsum(sizes[first:], dtype=np.int64)
            sizes = sizes[: first + int(np.searchsorted(ends, limit)) + 1]
        self.sizes, self._starts = sizes, Sums(sizes)
        self.total = self._starts.total
        self.scored = bool(shards) and "scored" in shards[0].offsets
        self._open: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def directory(self) -> Path:
        return self._shards[0].path.parent

    @property
    def bytes_per_token(self) -> int:
        """On the disk, its share of the sizes left out."""
        return self._shards[0].dtype.itemsize + self.scored

    @property
    def progress(self) -> Progress:
        """Of the source, at the end of the last shard."""
        return self._shards[-1].progress

    def document(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The tokens of a document, or of a part of it."""
        return self._read("ids", *self._span(index, start, stop))

    def labels(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Of the tokens of a document, or of a part of it, -100 where they have none."""
        ids = self.document(index, start, stop).astype(np.int64)
        if not self.scored:
            return ids
        return np.where(self._read("scored", *self._span(index, start, stop)), ids, IGNORE)

    def parts(self) -> Iterator[np.ndarray]:
        """All numbers, a few at a time: where documents begin (from 0 to N, C + 1 of int64), their
        tokens, and whether each has a label where some have none."""
        last = np.zeros(1, np.int64)
        yield last
        for start in range(0, len(self), PART):
            ends = last[-1] + np.cumsum(self.sizes[start : start + PART], dtype=np.int64)
            yield ends
            last = ends
        for name in ("ids", "scored") if self.scored else ("ids",):
            for first, end in zip(self._firsts, self._firsts[1:], strict=False):
                for start in range(first, min(end, self.total), PART):
                    yield self._read(name, start, min(start + PART, end, self.total))

    def _span(self, index: int, start: int, stop: int | None) -> tuple[int, int]:
        size, first = int(self.sizes[index]), self._starts[index]
        return first + start, first + min(size, size if stop is None else stop)

    def _read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Of one shard."""
        number = bisect_right(self._firsts, start, hi=len(self._shards)) - 1
        shard, first = self._shards[number], self._firsts[number]
        dtype = shard.dtype if name == "ids" else np.dtype(bool)
        wanted = (stop - start) * dtype.itemsize
        position = shard.offsets[name] + (start - first) * dtype.itemsize
        try:
            if number not in self._open:
                while len(self._open) >= OPEN:
                    os.close(self._open.pop(next(iter(self._open))))
                self._open[number] = os.open(shard.path, os.O_RDONLY)
            read = os.pread(self._open[number], wanted, position)
        except OSError as error:
            raise NextLatError(f"cannot read {shard.path}: {error.strerror}; {AGAIN}.") from error
        if len(read) < wanted:
            raise NextLatError(f"{shard.path} has been cut short; {AGAIN}.")
        return np.frombuffer(read, dtype)

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # for a process that is not forked
