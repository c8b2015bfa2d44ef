"""Language modelling: any text, packed with explicit document boundaries (TinyStories and
FineWeb-Edu in arXiv 2511.05963).

Shapes: R rows, T tokens, N positions, D width, K probe offsets.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import takewhile
from typing import Annotated, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from nextlat.batch import IGNORE
from nextlat.errors import NextLatError
from nextlat.files import write_text
from nextlat.model import ObjectiveModel
from nextlat.results import (
    Chart,
    Line,
    Measurement,
    Metric,
)
from nextlat.scores import exp_score
from nextlat.tasks.latent_rank import EFFECTIVE_LATENT_RANK, latent_rank
from nextlat.tasks.task import (
    DataSize,
    Length,
    Measure,
    RowCount,
    Task,
    TaskConfig,
    TestCount,
    held_out_cross_entropy,
    vocabulary_size,
)
from nextlat.tasks.text.corpus import Corpus
from nextlat.tasks.text.documents import Documents, from_dataset, from_file
from nextlat.tasks.text.lm_eval import (
    METRICS,
    benchmark_metric,
    check_benchmarks,
    language_benchmark,
)
from nextlat.tasks.text.packed import PackedDocuments
from nextlat.tasks.text.paper import PUBLISHED
from nextlat.tasks.text.probes import PROBE_BATCH, probe_cross_entropy, states_and_futures
from nextlat.tasks.text.tokens import (
    END_OF_TEXT,
    Encoder,
    existing_tokenizer,
    trained_tokenizer,
)

logger = logging.getLogger(__name__)

LATENT_ROWS = 256  # of the effective latent rank, as in arXiv 2511.05963
ROWS_PER_BATCH = 16  # of what is measured
PREVIEW = 2**20  # tokens that a dry run makes do with
READ_ANEW = 2**27  # tokens; of a larger text the fingerprint is kept, not computed at every start
PROBE_BYTES = 2**28  # of hidden states in memory, to train the probes on

PERPLEXITY = Metric(
    name="perplexity",
    title="Perplexity",
    definition="Exponential of the held-out cross-entropy per token: among how many equally likely "
    "tokens the model chooses, so to speak. Comparable for the same vocabulary only.",
    source="the usual language-modelling measure",
    unit="number",
    higher_is_better=False,
    items="held-out rows",
    published="perplexity",
)


class TextConfig(TaskConfig):
    """Which text, how it is tokenised and packed, and how much is measured.

    The text is `train` or `dataset`, the tokenizer `tokenizer` or `vocab_size`: one of each must be
    given.

    Attributes:
        train: a .txt, .jsonl or .parquet file, relative to the working directory or to
            $NEXTLAT_DATA.
        validation: likewise.
        dataset: of the Hugging Face hub, or a directory of its files (needs the extra
            `nextlat[text]`).
        subset: of the dataset.
        split: of the dataset, to train on.
        validation_split: of the dataset.
        streaming: do not download the dataset whole first.
        column: of the records that holds the text, or conversations: lists of messages with role
            and content, which the tokenizer's chat template renders.
        assistant_only: of conversations, only what the assistant says has a loss.
        separator: between the documents of a .txt file (whose line ends all count as a line feed).
        held_out: how many documents, the first, are held out where there is no `validation` or
            `validation_split`.
        tokenizer: of a directory or the hub, as published.
        vocab_size: of a byte-level BPE learned from the training documents.
        max_tokens: training tokens that are taken, from the first document on; the rest of the text
            is not read. They are made once and kept on the disk, in $NEXTLAT_CACHE (2 bytes each, 4
            where the vocabulary is beyond 65,536).
        row_length: tokens in a packed row.
        max_length: positions of the model and of decoding; None = row_length.
        tests: held-out rows that the metrics use, at most.
        prompt_length: tokens of the prompts to decode from.
        probes: K, linear probes for 1..K tokens ahead (arXiv 2511.05963, TinyStories: 20); 0 =
            none.
        probe_steps: minibatches that the probes are trained on.
        lm_eval: benchmarks of the LM Evaluation Harness (needs the extra `nextlat[lm-eval]`), with
            commas between them; "" = none.
        lm_eval_limit: documents of each benchmark, 0 = all.
        lm_eval_files: a directory of further benchmarks, defined in the harness's YAML, which can
            run Python code.
    """

    train: str | None = None
    validation: str | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    validation_split: str | None = None
    streaming: bool = True
    column: str = "text"
    assistant_only: bool = False
    separator: Annotated[str, Field(min_length=1)] = END_OF_TEXT
    held_out: RowCount = 1000
    tokenizer: str | None = None
    vocab_size: Annotated[int, Field(ge=1, le=2**24)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**53)] = 100_000_000
    row_length: Annotated[Length, Field(ge=2)] = 256
    max_length: Length | None = None
    tests: TestCount = 256
    prompt_length: Length = 32
    probes: Annotated[int, Field(ge=0, le=10_000)] = 20
    probe_steps: Annotated[int, Field(ge=1, le=10**9)] = 1000
    lm_eval: str = ""
    lm_eval_limit: Annotated[int, Field(ge=0, le=10**9)] = 0
    lm_eval_files: str | None = None
    _first: int | None = None

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if problem := self._pair(given=2):
            raise ValueError(problem)
        if self.validation is not None and self.validation_split is not None:
            raise ValueError(
                "task.validation and task.validation_split both say what is held out: remove one"
            )
        for name in ("subset", "split", "validation_split", "streaming"):
            default = type(self).model_fields[name].default
            if self.dataset is None and getattr(self, name) != default:
                raise ValueError(f"task.{name} has no meaning without task.dataset: remove it")
        if self.max_length is not None and self.max_length < self.row_length:
            raise ValueError(
                f"task.max_length is {self.max_length}, less than row_length {self.row_length}: "
                "make it larger"
            )
        if self.prompt_length >= (self.max_length or self.row_length):
            raise ValueError(
                f"task.prompt_length {self.prompt_length} leaves no room to decode: make it smaller"
            )
        return self

    def _pair(self, *, given: int) -> str | None:
        """What is needed where none or both of two settings are given, of which one must be, in a
        recipe or on the command line."""
        for pair, names in (
            ((self.train, self.dataset), "task.train (a file) or task.dataset (of Hugging Face)"),
            (
                (self.tokenizer, self.vocab_size),
                "task.tokenizer (one that exists) or task.vocab_size",
            ),
        ):
            if sum(setting is not None for setting in pair) == given:
                return f"the task text needs {names}, one of the two"
        return None

    @property
    def code(self) -> str | None:
        """Definitions of benchmarks: they can name Python functions, which the harness calls."""
        return self.lm_eval_files

    def trusting(self, code: str | None) -> Self:
        if (code is None) != (self.lm_eval_files is None):
            raise NextLatError(
                "the run names no benchmarks of its own: leave --code out."
                if code is not None
                else "the run was trained with benchmarks of its own (task.lm_eval_files = "
                f"'{self.lm_eval_files}'), which can run Python code: if you trust them, give "
                "their directory as --code."
            )
        return self.model_copy(update={"lm_eval_files": code})

    def preview(self) -> Self:
        made = self.model_copy()
        made._first = min(self.max_tokens, PREVIEW)
        return made

    def build(self) -> "Text":
        if problem := self._pair(given=0):
            raise NextLatError(f"{problem}.")
        return Text(self)

    def sources(self) -> tuple[Documents, Documents]:
        """Training and held-out documents.

        Raises:
            NextLatError: a file that is not there.
        """
        train = self._documents("train", self.train, self.split)
        if self.validation is not None or self.validation_split is not None:
            split = self.validation_split or ""
            return train, self._documents("validation", self.validation, split)
        return train.split(self.held_out)

    def _documents(self, key: str, path: str | None, split: str) -> Documents:
        if path is not None:
            return from_file(path, f"task.{key}", column=self.column, separator=self.separator)
        assert self.dataset is not None
        return from_dataset(
            self.dataset, self.subset, split, column=self.column, streaming=self.streaming
        )

    @property
    def benchmarks(self) -> list[str]:
        """The names in `lm_eval`."""
        return [name.strip() for name in self.lm_eval.split(",") if name.strip()]


class Text(Task):
    """See the module.

    Attributes:
        train: the tokenised training documents.
        held_out: the others.
    """

    name = "text"
    title = "Text"
    published = PUBLISHED

    def __init__(self, config: TextConfig) -> None:
        if config.benchmarks:
            check_benchmarks(config.benchmarks, config.lm_eval_files)
        train, held_out = config.sources()
        self.config = config
        self.max_length = config.max_length or config.row_length
        self.tokenizer = (
            existing_tokenizer(config.tokenizer)
            if config.tokenizer is not None
            else trained_tokenizer(train, config.vocab_size or 0)
        )
        encoder = Encoder(self.tokenizer, assistant_only=config.assistant_only)
        self._corpus = Corpus(train, encoder)
        self.train = self._corpus.tokens(config._first or config.max_tokens)
        self.held_out = Corpus(held_out, encoder).tokens(config.tests * config.row_length)
        for documents, tokens in ((train, self.train), (held_out, self.held_out)):
            logger.info(
                "%s: %d documents of %d tokens, %d empty ones dropped.",
                documents.where, len(tokens), tokens.total, tokens.progress.dropped,
            )  # fmt: skip
            if tokens.progress.mended:
                logger.warning(
                    "%s: %d documents hold half a surrogate pair, which is read as U+FFFD.",
                    documents.where,
                    tokens.progress.mended,
                )

    def train_dataset(self, seed: int) -> PackedDocuments:
        return PackedDocuments(self.train, self.config.row_length, seed=seed)

    def eval_dataset(self) -> PackedDocuments:
        return PackedDocuments(
            self.held_out, self.config.row_length, seed=None, rows=self.config.tests
        )

    def data_size(self) -> DataSize:
        corpus, made = self._corpus, self.train
        tokens = corpus.expected(self.config.max_tokens)
        each = made.bytes_per_token + 4 * len(made) / made.total
        return DataSize(tokens, corpus.ended, int(tokens * each), corpus.directory)

    def fingerprint(self) -> str:
        """Of the tokens and what they stand for, however the text was stored."""
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        digest = hashlib.sha256(json.dumps(vocabulary).encode())
        parts = (self.train, self.held_out)
        which = f"{digest.hexdigest()} {[(tokens.directory.name, len(tokens)) for tokens in parts]}"
        name = hashlib.sha256(which.encode()).hexdigest()[:24]
        kept = self.train.directory / f"fingerprint-{name}.txt"
        large = self.train.total > READ_ANEW
        if large and kept.is_file():
            return kept.read_text(encoding="utf-8").strip()
        for tokens in parts:
            for part in tokens.parts():
                digest.update(part.data)
        found = digest.hexdigest()[:16]
        if large:
            with suppress(NextLatError):  # a cache that others filled and we may only read
                write_text(kept, f"{found}\n")
        return found

    def prompts(self, count: int) -> list[Tensor]:
        """The first tokens of the first held-out documents that are longer than a prompt; where
        the assistant alone is learned from, what comes before it speaks, if there is room to
        answer."""
        tokens, length = self.held_out, self.config.prompt_length
        if tokens.scored:
            says = [np.flatnonzero(tokens.labels(c) != IGNORE)[0] for c in range(len(tokens))]
            ends = {c: n for c, n in enumerate(says) if 0 < n <= self.max_length // 2}
        else:
            ends = {int(c): length for c in np.flatnonzero(tokens.sizes > length)}
        first = list(ends.items())[:count]
        return [torch.from_numpy(tokens.document(c)[:end].astype(np.int64)) for c, end in first]

    @property
    def metrics(self) -> Sequence[Metric]:
        """A group of benchmarks is measured by its members, whose names the harness knows."""
        benchmarks = [benchmark_metric(b, name) for b in self.config.benchmarks for name in METRICS]
        return [PERPLEXITY, EFFECTIVE_LATENT_RANK, *benchmarks]

    def measures(self) -> Mapping[str, Measure]:
        found: dict[str, Measure] = {
            "perplexity": self.perplexity,
            "effective latent rank": self.latent_rank,
        }
        if self.config.probes:
            found["probes"] = self.probe_chart
        return found | {name: partial(self.benchmark, name) for name in self.config.benchmarks}

    def perplexity(self, model: ObjectiveModel) -> list[Measurement]:
        """exp of the mean cross-entropy of the held-out rows, per token of this vocabulary."""
        loss = held_out_cross_entropy(model, self.eval_dataset(), batch_size=ROWS_PER_BATCH)
        return [Measurement(PERPLEXITY, exp_score(loss))]

    def benchmark(self, name: str, model: ObjectiveModel) -> list[Measurement]:
        """One benchmark of the LM Evaluation Harness."""
        files, limit = self.config.lm_eval_files, self.config.lm_eval_limit or None
        return language_benchmark(model, self.tokenizer, name, files=files, limit=limit)

    def latent_rank(self, model: ObjectiveModel) -> list[Measurement]:
        """Effective rank of the states of the first 256 held-out rows."""
        count = min(LATENT_ROWS, len(self.eval_dataset()))
        [rows] = DataLoader(Subset(self.eval_dataset(), range(count)), batch_size=count)
        score = latent_rank(model, rows["input_ids"], rows["position_ids"], rows["attention_mask"])
        return [Measurement(EFFECTIVE_LATENT_RANK, score)]

    def probe_chart(self, model: ObjectiveModel) -> list[Chart]:
        """Held-out cross-entropy of a linear probe of the frozen states for the token 1, 2, ... K
        ahead (see `probes`), as far as a document reaches.

        The probes learn from rows of the training text in another order, as many as their
        minibatches use or memory allows.
        """
        positions = min(
            PROBE_BYTES // (4 * model.backbone.width),
            self.config.probe_steps * PROBE_BATCH,
            self.train.total,
        )
        rows = range(-(-positions // self.config.row_length))
        training = Subset(PackedDocuments(self.train, self.config.row_length, seed=6), rows)
        losses = probe_cross_entropy(
            *states_and_futures(model, training, self.config.probes),
            *states_and_futures(model, self.eval_dataset(), self.config.probes),
            vocab_size=vocabulary_size(self.tokenizer),
            steps=self.config.probe_steps,
        )
        chart = Chart(
            name="probes",
            title="Linear probes of the state: cross-entropy",
            x="tokens ahead",
            unit="nats",
            lines=[Line(values=list(takewhile(math.isfinite, losses)), dots=True)],
            alt="Cross-entropy of linear probes of {models} by the number of tokens ahead.",
            caption="One line per seed, each minus the baseline of the same seed; below zero the "
            "state tells more about what is to come.",
            minus_baseline=True,
            # Near the baseline linear, beyond logarithmic: one token ahead some miss by twenty
            # times what sets them apart further on.
            linear_within=0.1,
        )
        return [chart]
