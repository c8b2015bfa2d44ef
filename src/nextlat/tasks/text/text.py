"""Language modelling: any text, packed with explicit document boundaries (TinyStories and
FineWeb-Edu in arXiv 2511.05963).

Shapes: R rows, T tokens, N positions, D width, K probe offsets.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property, partial
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.scores import Score, exp_score, ratio_score
from nextlat.tasks.latent_rank import latent_rank
from nextlat.tasks.streets.rides import inference
from nextlat.tasks.task import Metric, Task, find_data
from nextlat.tasks.text.documents import Documents, from_dataset, from_file
from nextlat.tasks.text.lm_eval import check_benchmarks, language_benchmark
from nextlat.tasks.text.probes import PROBE_BATCH, future_tokens, probe_cross_entropy
from nextlat.tasks.text.tokens import (
    END_OF_TEXT,
    PackedDocuments,
    Tokens,
    existing_tokenizer,
    tokenize,
    trained_tokenizer,
)

if TYPE_CHECKING:
    from nextlat.model import ObjectiveModel

logger = logging.getLogger(__name__)

LATENT_ROWS = 256  # of the effective latent rank, as in arXiv 2511.05963
ROWS_PER_BATCH = 16  # of what is measured
PROBE_BYTES = 2**28  # of hidden states in memory, to train the probes on


@dataclass(frozen=True)
class TextConfig:
    """Which text, how it is tokenised and packed, and how much is measured.

    The text is `train` or `dataset`, the tokenizer `tokenizer` or `vocab_size`: one of each must be
    given.

    Attributes:
        train, validation: .txt, .jsonl or .parquet files, relative to the working directory or to
            $NEXTLAT_DATA.
        dataset: of the Hugging Face hub, or a directory of its files (needs the extra
            `nextlat[text]`).
        subset, split, validation_split: of the dataset. streaming: do not download it whole first.
        column: of the records that holds the text. separator: between the documents of a .txt file.
        held_out: without `validation` and `validation_split`, the first so many documents are held
            out.
        tokenizer: of a directory or the hub, as published. vocab_size: of a byte-level BPE learned
            from the training documents.
        max_tokens: training tokens that are taken, from the first document on, and held in memory
            (2 bytes each, 4 where the vocabulary is beyond 65,536); the rest of the text is not
            read. They are read again at every start.
        row_length: tokens in a packed row. max_length: positions of the model and of decoding; None
            = row_length.
        tests: held-out rows that the metrics use, at most. prompt_length: tokens of the prompts to
            decode from.
        probes: K, linear probes for 1..K tokens ahead (arXiv 2511.05963, TinyStories: 20); 0 =
            none. probe_steps: their training.
        lm_eval: benchmarks of the LM Evaluation Harness (needs the extra `nextlat[lm-eval]`), with
            commas between them; "" = none.
        lm_eval_limit: documents of each, 0 = all. lm_eval_files: a directory of further benchmarks,
            defined in the harness's YAML.
    """

    train: str | None = None
    validation: str | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    validation_split: str | None = None
    streaming: bool = True
    column: str = "text"
    separator: str = END_OF_TEXT
    held_out: int = 1000
    tokenizer: str | None = None
    vocab_size: int | None = None
    max_tokens: int = 100_000_000
    row_length: int = 256
    max_length: int | None = None
    tests: int = 256
    prompt_length: int = 32
    probes: int = 20
    probe_steps: int = 1000
    lm_eval: str = ""
    lm_eval_limit: int = 0
    lm_eval_files: str | None = None

    def build(self) -> "Text":
        return Text(self)

    def sources(self) -> tuple[Documents, Documents]:
        """Training and held-out documents.

        Raises:
            NextLatError: settings that contradict one another, or a file that is not there.
        """
        self._check()
        train = (
            self._file("train", self.train)
            if self.train is not None
            else self._split(self.dataset or "", self.split)
        )
        if self.validation is not None:
            return train, self._file("validation", self.validation)
        if self.dataset is not None and self.validation_split is not None:
            return train, self._split(self.dataset, self.validation_split)
        return (
            Documents(lambda: _after(train, self.held_out), train.where),
            Documents(lambda: islice(train, self.held_out), train.where),
        )

    @property
    def benchmarks(self) -> list[str]:
        """The names in `lm_eval`."""
        return [name.strip() for name in self.lm_eval.split(",") if name.strip()]

    def benchmark_files(self) -> str | None:
        """Where `lm_eval_files` is.

        Raises:
            NextLatError: nowhere.
        """
        if self.lm_eval_files is None:
            return None
        found = find_data(self.lm_eval_files)
        if found is None:
            raise NextLatError(
                f"there is no directory {self.lm_eval_files} (nor in $NEXTLAT_DATA): correct task.lm_eval_files."
            )
        return str(found)

    def _file(self, key: str, path: str) -> Documents:
        return from_file(path, f"task.{key}", column=self.column, separator=self.separator)

    def _split(self, dataset: str, split: str) -> Documents:
        return from_dataset(
            dataset, self.subset, split, column=self.column, streaming=self.streaming
        )

    def _check(self) -> None:
        if (self.train is None) == (self.dataset is None):
            raise NextLatError(
                "the task text needs task.train (a file) or task.dataset (of Hugging Face), one of the two."
            )
        if (self.tokenizer is None) == (self.vocab_size is None):
            raise NextLatError(
                "the task text needs task.tokenizer (one that exists) or task.vocab_size, one of the two."
            )
        if self.validation is not None and self.validation_split is not None:
            raise NextLatError(
                "task.validation and task.validation_split both say what is held out: remove one."
            )
        defaults = {field.name: field.default for field in fields(self)}
        for name in ("subset", "split", "validation_split", "streaming"):
            if self.dataset is None and getattr(self, name) != defaults[name]:
                raise NextLatError(f"task.{name} has no meaning without task.dataset: remove it.")
        least = {
            "held_out": 1, "max_tokens": 1, "row_length": 2, "tests": 2, "prompt_length": 1, "probes": 0, "probe_steps": 1,
            "lm_eval_limit": 0,
        }  # fmt: skip
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise NextLatError(
                    f"task.{name} is {getattr(self, name)}: give at least {smallest}."
                )
        if self.max_length is not None and self.max_length < self.row_length:
            raise NextLatError(
                f"task.max_length is {self.max_length}, less than row_length {self.row_length}: make it larger."
            )
        if self.prompt_length >= (self.max_length or self.row_length):
            raise NextLatError(
                f"task.prompt_length {self.prompt_length} leaves no room to decode: make it smaller."
            )
        if self.separator == "":
            raise NextLatError("task.separator is empty: give what stands between two documents.")
        if self.benchmarks:
            check_benchmarks(self.benchmarks, self.benchmark_files())


def _after(documents: Documents, count: int) -> Iterator[str]:
    rest = islice(documents, count, None)
    first = next(rest, None)
    if first is None:
        raise NextLatError(
            f"{documents.where} has no more documents than the {count} to be held out: "
            "set task.validation, or a smaller task.held_out."
        )
    yield first
    yield from rest


class Text(Task):
    """See the module.

    Attributes:
        train, held_out: the tokenised documents.
    """

    name = "text"
    higher_is_better: Mapping[str, bool] = {"perplexity": False, "effective_latent_rank": False}

    def __init__(self, config: TextConfig) -> None:
        train, held_out = config.sources()
        self.config = config
        self.max_length = config.max_length or config.row_length
        self.tokenizer = (
            existing_tokenizer(config.tokenizer)
            if config.tokenizer is not None
            else trained_tokenizer(train, config.vocab_size or 0)
        )
        self.train: Tokens = tokenize(train, self.tokenizer, config.max_tokens)
        self.held_out: Tokens = tokenize(held_out, self.tokenizer, config.tests * config.row_length)
        for documents, tokens in ((train, self.train), (held_out, self.held_out)):
            logger.info(
                "%s: %d documents of %d tokens, %d empty ones dropped.",
                documents.where, len(tokens), len(tokens.ids), documents.dropped,
            )  # fmt: skip

    def train_dataset(self, seed: int) -> Dataset[dict[str, Tensor]]:
        return PackedDocuments(self.train, self.config.row_length, seed=seed)

    def eval_dataset(self) -> Dataset[dict[str, Tensor]]:
        return PackedDocuments(
            self.held_out, self.config.row_length, seed=None, rows=self.config.tests
        )

    def fingerprint(self) -> str:
        """Of the tokens and what they stand for, however the text was stored."""
        digest = hashlib.sha256(
            json.dumps(
                sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
            ).encode()
        )
        for tokens in (self.train, self.held_out):
            digest.update(tokens.starts.data)
            digest.update(tokens.ids.data)
        return digest.hexdigest()[:16]

    def prompts(self, count: int) -> list[Tensor]:
        """The first tokens of the first held-out documents that are longer than a prompt."""
        length = self.config.prompt_length
        long = np.flatnonzero(self.held_out.sizes > length)[:count]
        return [torch.from_numpy(self.held_out.document(c)[:length].astype(np.int64)) for c in long]

    def metrics(self) -> Mapping[str, Metric]:
        found: dict[str, Metric] = {
            "perplexity": lambda model: {"perplexity": self.perplexity(model)},
            "effective latent rank": lambda model: {
                "effective_latent_rank": self.latent_rank(model)
            },
        }
        if self.config.probes:
            found["probes"] = lambda model: {"probe_cross_entropy": self.probe_curve(model)}
        return found | {name: partial(self.benchmark, name) for name in self.config.benchmarks}

    @cached_property
    def _test_rows(self) -> dict[str, Tensor]:
        return _stacked(self.eval_dataset(), range(len(self.eval_dataset())))  # type: ignore[arg-type]

    def perplexity(self, model: "ObjectiveModel") -> Score:
        """exp of the mean cross-entropy of the held-out rows, per token of this vocabulary; the
        items are the rows."""
        sums, counts = [], []
        for rows in _batches(self._test_rows):
            row_sums, row_counts = model.next_token_loss(_on(model.device, rows))
            sums += row_sums.tolist()
            counts += row_counts.tolist()
        return exp_score(ratio_score(sums, counts))

    def benchmark(self, name: str, model: "ObjectiveModel") -> dict[str, Score]:
        """One benchmark of the LM Evaluation Harness."""
        config = self.config
        return language_benchmark(
            model,
            self.tokenizer,
            name,
            files=config.benchmark_files(),
            limit=config.lm_eval_limit or None,
        )

    def latent_rank(self, model: "ObjectiveModel") -> Score:
        """Effective rank of the states of the first 256 held-out rows."""
        rows = {name: x[:LATENT_ROWS] for name, x in self._test_rows.items()}
        return latent_rank(model, rows["input_ids"], rows["position_ids"], rows["attention_mask"])

    def probe_curve(self, model: "ObjectiveModel") -> list[float]:
        """Held-out cross-entropy of a linear probe of the frozen states for the token 1, 2, ... K
        ahead (see `probes`).

        The probes learn from rows of the training text in another order, as many as their
        minibatches use or memory allows.
        """
        T = self.config.row_length
        most = min(
            PROBE_BYTES // (4 * model.backbone.width),
            self.config.probe_steps * PROBE_BATCH,
            len(self.train.ids),
        )
        rows = _stacked(PackedDocuments(self.train, T, seed=6), range(-(-most // T)))
        h_ND, targets_NK = self._states(model, rows)
        test_h_ND, test_targets_NK = self._states(model, self._test_rows)
        return probe_cross_entropy(
            h_ND,
            targets_NK,
            test_h_ND,
            test_targets_NK,
            vocab_size=len(self.tokenizer),
            steps=self.config.probe_steps,
        )

    def _states(self, model: "ObjectiveModel", rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(R, T) rows -> h_ND and the tokens ahead, targets_NK, of the positions that have any."""
        states, targets = [], []
        with inference(model):
            for part in _batches(rows):
                batch = _on(model.device, part)
                ahead_NK = future_tokens(batch, self.config.probes)
                some_N = (ahead_NK >= 0).any(1)
                states.append(model.backbone.hidden(batch).flatten(0, 1)[some_N].float())
                targets.append(ahead_NK[some_N])
        return torch.cat(states), torch.cat(targets)


def _stacked(dataset: Dataset[dict[str, Tensor]], indices: range) -> dict[str, Tensor]:
    rows = [dataset[i] for i in indices]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _batches(rows: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    for first in range(0, len(rows["input_ids"]), ROWS_PER_BATCH):
        yield {name: x[first : first + ROWS_PER_BATCH] for name, x in rows.items()}


def _on(device: torch.device, rows: dict[str, Tensor]) -> Batch:
    return Batch.from_inputs(**{name: x.to(device) for name, x in rows.items()})
