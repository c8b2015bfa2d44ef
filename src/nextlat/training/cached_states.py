"""Hidden states of a frozen transformer on the disk: computed when a row is first seen, and read
back whenever it comes again, in later epochs and after a resume.

A file holds the states of so many rows and no more. Its name is a hash of all that they depend on:
weights, data, seed, number format, kernel. Beside it lies a checksum of every row, so that a row
that was only half written when a process or machine died is computed anew.

Shapes: B rows of a batch, T tokens of a row, D width.
"""

import hashlib
import json
import math
import os
import shutil
import zlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nextlat.backbone import evaluation_mode
from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.files import remove, write_errors
from nextlat.model import ObjectiveModel
from nextlat.tasks.rows import epoch_order

Item = dict[str, Tensor]
ROW = "row"  # the number of a row, beside its tokens
THERE = np.uint64(1 << 32)  # added to the CRC-32 of a row: zero is one that is not there


class NumberedRows(Dataset[Item]):
    """The first `rows` rows of a dataset with their numbers: once in order, and from then on in
    another order every time.

    Args:
        dataset: row i depends on i alone.
        rows: how many.
        count: rows announced in all; None = every row once.
        seed: of the orders.
    """

    def __init__(
        self, dataset: Dataset[Item], rows: int, count: int | None = None, seed: int = 0
    ) -> None:
        self._dataset, self.rows, self._seed = dataset, rows, seed
        self._count = rows if count is None else count
        self._epoch, self._order = 0, np.arange(rows)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Item:
        epoch, position = divmod(index, self.rows)
        if epoch != self._epoch:
            self._epoch = epoch
            order = epoch_order(self.rows, self._seed, epoch) if epoch else np.arange(self.rows)
            self._order = order
        row = int(self._order[position])
        return {**self._dataset[row], ROW: torch.tensor(row)}


class CachedStates:
    """The states of the rows of one `NumberedRows`.

    Args:
        directory: of the files, made if need be; runs of one model on the same rows can share it.
        rows: how many there are.
        depends_on: what tells these rows from others, JSON-ready.
        sole: whether files of other states may be deleted there.
    """

    def __init__(self, directory: Path, rows: int, depends_on: Any, *, sole: bool = False) -> None:
        self._directory, self._rows, self._depends_on = directory, rows, depends_on
        self._sole, self._files = sole, None

    _files: tuple[np.ndarray, np.ndarray, int, int] | None
    _dtype: torch.dtype
    _shape: tuple[int, ...]

    def states(
        self,
        model: ObjectiveModel,
        batch: Item,
        row_B: Tensor,
        context: AbstractContextManager[Any],
    ) -> Tensor:
        """(B, T, D) of a batch, computed where one of its rows is not on the disk.

        Args:
            model: whose transformer is frozen.
            batch: as `ObjectiveModel.forward` takes it.
            row_B: numbers of its rows.
            context: in which the transformer runs.

        Raises:
            NextLatError: there is not enough space on the disk.
        """
        rows = row_B.tolist()
        if self._files is not None and (found := self._read(rows)) is not None:
            return found.to(model.device)
        labels = batch.get("labels", batch["input_ids"])
        given = {k: batch.get(k) for k in ("position_ids", "attention_mask")}
        with evaluation_mode(model), context:
            inputs = Batch.from_inputs(batch["input_ids"], labels, **given)
            h_BTD = model.backbone.hidden(inputs)
        if self._files is None:
            self._open(model, h_BTD, len(rows))
            if (found := self._read(rows)) is not None:
                return found.to(model.device)
        self._write(rows, h_BTD)
        return h_BTD

    def _open(self, model: ObjectiveModel, h_BTD: Tensor, batch_rows: int) -> None:
        """Once it is known what is to be stored, and the model is what it is trained as."""
        self._dtype, self._shape = h_BTD.dtype, tuple(h_BTD.shape[1:])
        lm = model.lm
        # Rounding may differ between devices, kernels, versions and numbers of rows.
        found = [model.device.type, lm.config._attn_implementation, torch.__version__, batch_rows]
        kind = [str(self._dtype), *self._shape, self._rows]
        content = json.dumps([self._depends_on, fingerprint(lm), *found, *kind])
        name = hashlib.sha256(content.encode()).hexdigest()[:24]
        size = math.prod(self._shape) * h_BTD.element_size()
        data, sums = (self._directory / f"{name}.{kind}" for kind in ("states", "crc"))
        with write_errors(self._directory, "choose another run.states"):
            self._directory.mkdir(parents=True, exist_ok=True)
            for other in self._directory.iterdir() if self._sole else ():
                if other.suffix in (".states", ".crc") and other.stem != name:
                    remove(other)
            taken = data.stat().st_blocks * 512 if data.exists() else 0
            free = shutil.disk_usage(self._directory).free
            if self._rows * size - taken > free:
                raise NextLatError(
                    f"the states of {self._rows:,} rows take {self._rows * size / 1e9:.1f} GB, and "
                    f"{self._directory} has {free / 1e9:.1f} left: lower backbone.cached_rows or "
                    "choose another run.states."
                )
            descriptors = _sized(data, self._rows * size), _sized(sums, self._rows * 8)
        states = np.memmap(data, np.uint8, "r", shape=(self._rows, size))
        self._files = (states, np.memmap(sums, np.uint64, "r"), *descriptors)

    def _read(self, rows: list[int]) -> Tensor | None:
        assert self._files is not None
        states, sums, *_ = self._files
        read = states[rows]  # a copy
        if any(sums[row] != _sum(values) for row, values in zip(rows, read, strict=True)):
            return None
        return torch.from_numpy(read).view(self._dtype).view(len(rows), *self._shape)

    def _write(self, rows: list[int], h_BTD: Tensor) -> None:
        assert self._files is not None
        *_, data, sums = self._files
        values = h_BTD.detach().cpu().contiguous().flatten(1).view(torch.uint8).numpy()
        # Not through the map, where a full disk would end the process.
        with write_errors(self._directory, "choose another run.states"):
            for row, value in zip(rows, values, strict=True):
                _write_at(data, value.data, row * len(value))
                _write_at(sums, np.array(_sum(value)).tobytes(), row * 8)

    def close(self) -> None:
        """Give the files back to the system."""
        for descriptor in self._files[2:] if self._files else ():
            os.close(descriptor)
        self._files = None


def _sized(path: Path, size: int) -> int:
    """A file of that size, whose missing part takes no space yet, open for writing."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    os.truncate(descriptor, size)
    return descriptor


def _write_at(descriptor: int, content: Any, position: int) -> None:
    view = memoryview(content).cast("B")
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written


def _sum(values: np.ndarray) -> np.uint64:
    return THERE + np.uint64(zlib.crc32(values.data))


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of all weights."""
    digest = hashlib.sha256()
    for name, x in module.state_dict().items():
        digest.update(f"{name} {tuple(x.shape)} {x.dtype}\n".encode())
        values = x.detach().cpu().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy().data if len(values) else b"")
    return digest.hexdigest()
