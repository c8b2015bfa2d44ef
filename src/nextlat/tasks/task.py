"""The contract of a benchmark task: data made or loaded from a seed, a tokenizer, and metrics."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from nextlat.scores import Score

if TYPE_CHECKING:  # the tasks know a model by what it does, and import none
    from nextlat.model import ObjectiveModel

STREAM = 2**40  # rows that a training stream announces: more than anyone trains on
Metric = Callable[["ObjectiveModel"], Mapping[str, Score | list[float]]]


def find_data(path: str, *, file: bool = False) -> Path | None:
    """A data directory (or file): as given, or below $NEXTLAT_DATA (default: shared/data beside the
    working directory)."""
    places = [Path(path), Path(os.environ.get("NEXTLAT_DATA", "../shared/data")) / path]
    return next((place for place in places if (place.is_file() if file else place.is_dir())), None)


class Rows(Dataset[dict[str, Tensor]], ABC):
    """`count` rows: a stream of epochs, each in an order of its own by (seed, epoch), or once in
    order (seed None)."""

    def __init__(self, count: int, seed: int | None) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._order = -1, np.arange(count)

    @abstractmethod
    def row(self, place: int) -> dict[str, Tensor]:
        """The row that stands at a place before any shuffling."""

    def __len__(self) -> int:
        return self.count if self.seed is None else STREAM

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        epoch, place = divmod(index, self.count)
        if self.seed is not None and epoch != self._epoch:
            self._epoch, self._order = (
                epoch,
                np.random.default_rng((self.seed, epoch)).permutation(self.count),
            )
        return self.row(int(self._order[place]))


class Task(ABC):
    """One benchmark with its world, built from a task configuration.

    Attributes:
        name: as in recipes and results.
        tokenizer: of the task's language; its length is the vocabulary size of the model.
        max_length: tokens of the longest sequence that training or evaluation uses.
        higher_is_better: for every metric that is compared, whether more of it is better.
    """

    name: str
    tokenizer: PreTrainedTokenizerFast
    max_length: int
    higher_is_better: Mapping[str, bool]

    @abstractmethod
    def train_dataset(self, seed: int) -> Dataset[dict[str, Tensor]]:
        """A stream of training rows, long enough never to end: item i depends on (seed, i) and on
        nothing else."""

    @abstractmethod
    def eval_dataset(self) -> Dataset[dict[str, Tensor]]:
        """Held-out rows for the evaluation loss."""

    @abstractmethod
    def metrics(self) -> Mapping[str, Metric]:
        """What is measured on a trained model: each entry returns one or several named scores (or a
        curve, as a list)."""

    @abstractmethod
    def prompts(self, count: int) -> list[Tensor]:
        """Held-out prompts (T,) to decode from; none where the model's next token is not the next
        input."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of the world (not of the model): a run is only ever evaluated in the world it was
        trained in."""

    def artifacts(self, model: "ObjectiveModel") -> Mapping[str, Any]:
        """Files beside results.json that the report draws from: name -> JSON-ready content."""
        return {}
