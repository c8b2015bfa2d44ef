"""The contract of a benchmark task: a world made or loaded from a seed, its tokenizer, its metrics.

Beside it what several tasks need: the word-level tokenizer, data directories, and the guard for
measuring. Rows are in `tasks.rows`.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np
import torch
from pydantic import Field
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import PreTokenizer, WhitespaceSplit
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.model import ObjectiveModel
from nextlat.results import Chart, Measurement, Metric, Picture, Published, Solved
from nextlat.scores import Score, ratio_score
from nextlat.validation import Settings

PAD, UNK, FIRST_WORD = 0, 1, 2  # token ids of every word-level tokenizer

NEXTLAT = "Teoh et al., arXiv 2511.05963"  # sources of metrics and published figures
OURS = "ours"

RowCount = Annotated[int, Field(ge=1, le=10**9)]
TestCount = Annotated[int, Field(ge=2, le=10**7)]  # fewer than two items have no error
Length = Annotated[int, Field(ge=1, le=2**20)]
Seed = Annotated[int, Field(ge=0, le=2**53)]
MAX_TOKENS = 2**33  # of all rows of a task

Measure = Callable[[ObjectiveModel], Iterable[Measurement | Chart]]


class DataSize(NamedTuple):
    """Of training data that are kept on the disk.

    Attributes:
        tokens: how many there are in an epoch.
        exact: whether there are so many, or that is all that they can be.
        bytes: on the disk.
        directory: where.
    """

    tokens: int
    exact: bool
    bytes: int
    directory: Path


class TaskConfig(Settings, ABC):
    """Base class of the settings of a task."""

    @abstractmethod
    def build(self) -> "Task":
        """The task with these settings.

        Raises:
            NextLatError: settings that no world has, or data that are not there.
        """

    def preview(self) -> Self:
        """These settings for a dry run, which does not wait until all data are there."""
        return self

    @property
    def code(self) -> str | None:
        """The path in these settings from which Python code may be run, if there is any."""
        return None

    def trusting(self, code: str | None) -> Self:
        """These settings, which came with a run, with `code` from the user in the place of what the
        run names, which may be a stranger's.

        Raises:
            NextLatError: there is code in only one of the two.
        """
        if code is not None:
            raise NextLatError(f"--code {code}: this task runs no code: leave it out.")
        return self


class Task(ABC):
    """One benchmark with its world, built from a `TaskConfig`.

    Attributes:
        name: as in recipes and results.
        title: in reports.
        published: what the paper reports on it.
        solved: when a seed counts as having solved it; None where that is not asked.
        tokenizer: of the task's language; see `vocabulary_size`.
        max_length: tokens of the longest sequence that training or evaluation uses.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    published: Published | None = None
    solved: Solved | None = None
    tokenizer: PreTrainedTokenizerFast
    max_length: int

    @abstractmethod
    def train_dataset(self, seed: int) -> Dataset[dict[str, Tensor]]:
        """A stream of training rows that never ends: item i depends on (seed, i) alone."""

    @abstractmethod
    def eval_dataset(self) -> Dataset[dict[str, Tensor]]:
        """Held-out rows for the evaluation loss."""

    @abstractmethod
    def prompts(self, count: int) -> list[Tensor]:
        """Held-out prompts (T,) to decode from; none where the model's next token is not the next
        input."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of the world (not of the model): a run is only ever evaluated in the world it was
        trained in."""

    def data_size(self) -> DataSize | None:
        """What the training data take; None where they are made as they are needed."""
        return None

    @property
    @abstractmethod
    def metrics(self) -> Sequence[Metric]:
        """All that this task may measure, in the order of the report."""

    @abstractmethod
    def measures(self) -> Mapping[str, Measure]:
        """What is shown while it is measured -> the measurement of a trained model, which gives
        measurements of `metrics` and charts. One that a model does not allow is left out."""

    def artifacts(self, model: ObjectiveModel) -> Iterable[tuple[Picture, Any]]:
        """Files beside results.json, with their JSON content, that a report draws from."""
        return ()


class SequenceModel(Protocol):
    """What most metrics need of a model: `nextlat.model.ObjectiveModel` has it, and so have the
    exact world models of the tests.

    `step(input_ids_BT, past) -> (h_BTD, past)` reads a few more tokens. The cache is opaque but for
    `batch_select_indices(indices)`, in place, as in `transformers.Cache`.
    """

    def step(self, input_ids: Tensor, past_key_values: Any = None, /) -> tuple[Tensor, Any]: ...

    @property
    def device(self) -> torch.device: ...

    def next_token_logits(self, h: Tensor, /) -> Tensor: ...


def held_out_cross_entropy(
    model: ObjectiveModel, dataset: Dataset[dict[str, Tensor]], *, batch_size: int = 1
) -> Score:
    """Cross-entropy in nats per scored token; the items are the rows.

    Args:
        dataset: held-out rows.
        batch_size: rows in a forward pass, of equal length if more than one.
    """
    losses = [model.next_token_loss(batch) for batch in batches(model, dataset, batch_size)]
    sums, counts = (torch.cat(parts).cpu() for parts in zip(*losses, strict=True))
    return ratio_score(sums, counts)


def batches(
    model: ObjectiveModel, dataset: Dataset[dict[str, Tensor]], size: int
) -> Iterator[Batch]:
    """The rows of a dataset, so many at a time, where the model is."""
    for rows in DataLoader(dataset, batch_size=size):
        yield Batch.from_inputs(**{name: x.to(model.device) for name, x in rows.items()})


def word_tokenizer(
    words: Sequence[str],
    *,
    begin: str | None = None,
    end: str | None = None,
    pre_tokenizer: PreTokenizer | None = None,
) -> PreTrainedTokenizerFast:
    """One token per word, after `<pad>` and `<unk>`; decoding joins with single spaces.

    Args:
        words: distinct; the token of words[i] is `FIRST_WORD` + i.
        begin: the beginning-of-sequence word.
        end: the end-of-sequence word.
        pre_tokenizer: splits a text into words; default: at white space.
    """
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<unk>", *words))}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizer or WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token=begin,
        eos_token=end,
        # Where white space sets words apart, "end" must not be cut out of names that contain it.
        split_special_tokens=pre_tokenizer is None,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that a table of its tokens needs: the largest id + 1, more than `len(tokenizer)` where
    there are gaps between the ids."""
    return max(tokenizer.get_vocab().values()) + 1


def check_size(rows: int, length: int) -> None:
    """Refuse (ValueError) a number of rows of some length that no memory holds."""
    if rows * length > MAX_TOKENS:
        raise ValueError(
            f"{rows:,} rows of {length:,} tokens are too many to be held in memory: take fewer"
        )


def world_fingerprint(config: TaskConfig, *data: np.ndarray) -> str:
    """Hash of the settings that are not the defaults (so that a new setting changes nothing) and of
    the data that they gave."""
    settings = config.model_dump(mode="json", exclude_defaults=True)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for array in data:
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def find_data(path: str, *, file: bool = False) -> Path | None:
    """A data directory (or file): as given, or below $NEXTLAT_DATA (default: shared/data beside the
    working directory)."""
    candidates = [Path(path), Path(os.environ.get("NEXTLAT_DATA", "../shared/data")) / path]
    return next((p for p in candidates if (p.is_file() if file else p.is_dir())), None)
