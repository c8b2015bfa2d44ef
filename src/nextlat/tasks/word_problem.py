"""The group word problem: track a state that every token changes (Merrill, Petty & Sabharwal 2024;
A5 in arXiv 2511.05963).

A row is `begin a_1 ... a_n end` with i.i.d. uniform group elements, and the label of a_t is the
product a_1 a_2 ... a_t, accumulator on the left. Inputs and labels differ: the "next token" of the
losses is the label, while the latent dynamics model reads the next input. Without the token
`begin`, rotary attention over a prefix of equal tokens could not tell a from aa.

Shapes: S sequences, n elements of a sequence, G order of the group.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from nextlat.backbone import evaluation_mode
from nextlat.batch import IGNORE
from nextlat.errors import NextLatError
from nextlat.model import ObjectiveModel
from nextlat.results import (
    Chart,
    Line,
    Mark,
    Measurement,
    Metric,
    Parameter,
    Published,
    Saying,
)
from nextlat.scores import mean_score
from nextlat.tasks.dynamics_alone import ALONE_NOTE, DRIVERS, Driver, driver
from nextlat.tasks.latent_rank import EFFECTIVE_LATENT_RANK, latent_rank
from nextlat.tasks.rows import Rows
from nextlat.tasks.task import (
    FIRST_WORD,
    NEXTLAT,
    Length,
    Measure,
    RowCount,
    Task,
    TaskConfig,
    TestCount,
    check_size,
    word_tokenizer,
    world_fingerprint,
)

BEGIN, END, FIRST_ELEMENT = FIRST_WORD, FIRST_WORD + 1, FIRST_WORD + 2
VALIDATION_SHARE = 0.2  # of the distinct sequences (paper: 80 % train, 20 % validation)
MAX_ORDER = 720


def accuracy(predictor: Driver, length: int) -> Metric:
    """Accuracy at the last of `length` elements."""
    parameters: Mapping[str, Parameter] = {"predictor": predictor, "length": length}
    declare = partial(
        Metric, name="accuracy", parameters=parameters, items="sequences", published=predictor
    )
    if predictor == "transformer":
        return declare(
            title=f"Transformer, {length} elements",
            noun=f"accuracy of the transformer at {length} elements",
            definition="Share of word problems whose last product the transformer predicts.",
            source=f"Merrill, Petty & Sabharwal 2024; {NEXTLAT}",
        )
    return declare(
        title=f"Dynamics alone, {length} elements",
        noun=f"accuracy at {length} elements of the latent dynamics model run alone",
        definition="The same for the latent dynamics model run alone, as an RNN, from the "
        "transformer's first state.",
        source=NEXTLAT,
        counterpart=accuracy("transformer", length).key,
        counterpart_name="the transformer of",
        note=ALONE_NOTE,
    )


@dataclass(frozen=True)
class Group:
    """A finite group as its Cayley table.

    Attributes:
        table: (G, G), `table[a, b]` is the index of the product a b.
        names: tokens of the elements.
    """

    table: np.ndarray
    names: tuple[str, ...]


def group(name: str) -> Group:
    """Z<n> (cyclic), S<n> (all permutations) or A<n> (the even ones); permutations compose as
    (p q)(i) = p(q(i)).

    Raises:
        NextLatError: another name, or an order beyond 720.
    """
    match = re.fullmatch(r"([ZSA])(\d{1,3})", name)
    kind, n = (match[1], int(match[2])) if match else ("", 0)
    if kind == "Z" and 2 <= n <= MAX_ORDER:
        i = np.arange(n)
        return Group((i[:, None] + i) % n, tuple(map(str, range(n))))
    if kind not in ("S", "A") or not 2 + (kind == "A") <= n <= 6:
        raise NextLatError(
            f"'{name}' is not a group known here: use Z2 to Z{MAX_ORDER} (cyclic), S2 to S6 or A3 "
            "to A6 (permutations)."
        )
    elements = [p for p in itertools.permutations(range(n)) if kind == "S" or _even(p)]
    index = {p: i for i, p in enumerate(elements)}
    table = np.array([[index[tuple(p[i] for i in q)] for q in elements] for p in elements])
    return Group(table, tuple("".join(map(str, p)) for p in elements))


def _even(p: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0


class WordProblemConfig(TaskConfig):
    """Settings of the task (defaults: the A5 experiment of arXiv 2511.05963).

    Attributes:
        group: see `group`.
        length: elements of a training sequence.
        sequences: distinct sequences in all, a fifth of them held out; fewer where the group does
            not have that many.
        multiples: test lengths as multiples of `length` (paper: 1 and 3).
        tests: sequences per test length.
    """

    group: str = "A5"
    length: Length = 12
    sequences: Annotated[RowCount, Field(ge=10)] = 1_000_000
    multiples: Annotated[tuple[Length, ...], Field(min_length=1)] = (1, 2, 3)
    tests: TestCount = 2000

    @model_validator(mode="after")
    def _fits(self) -> Self:
        check_size(self.sequences, self.length)
        check_size(self.tests, self.length * max(self.multiples))
        return self

    def build(self) -> "WordProblem":
        return WordProblem(self)


class WordProblem(Task):
    """See the module; the data are a function of the settings alone, the order of training of the
    seed."""

    name = "word-problem"
    title = "Word problem"
    published = Published(
        setting="A5, one million sequences of 12 elements, 2 layers of width 512, horizon 1",
        source=f"{NEXTLAT}v4",
        sayings=[
            Saying(
                methods=("NextLat",),
                text="the dynamics model alone stays above 95 % at 36 elements, three times the "
                "training length",
                of="dynamics",
            ),
            Saying(
                methods=("GPT", "NextLat"),
                text="the transformer fails beyond the training length (12)",
                of="transformer",
            ),
            Saying(methods=("GPT",), text="trained on 36 elements it fails too"),
        ],
    )

    def __init__(self, config: WordProblemConfig) -> None:
        self.config = config
        self.group = group(config.group)
        self.max_length = config.length * max(config.multiples) + 2
        self.tokenizer = word_tokenizer(
            ("begin", "end", *self.group.names), begin="begin", end="end"
        )
        self._lengths = [multiple * config.length for multiple in config.multiples]
        words = _distinct(len(self.group.names), config)
        held_out = round(VALIDATION_SHARE * len(words))
        self._train, self._held_out = words[held_out:], words[:held_out]

    def products(self, words: np.ndarray) -> np.ndarray:
        """(S, n) elements -> (S, n) running products, accumulator on the left."""
        out = words.astype(np.int64)
        for t in range(1, words.shape[1]):
            out[:, t] = self.group.table[out[:, t - 1], out[:, t]]
        return out

    def rows(self, words: np.ndarray) -> dict[str, np.ndarray]:
        """(S, n) elements -> `input_ids` and `labels` (S, n + 2); the label of a_t stands one
        position later, as always."""
        count, n = words.shape
        ids = np.full((count, n + 2), END, dtype=np.int16)
        ids[:, 0], ids[:, 1:-1] = BEGIN, words + FIRST_ELEMENT
        labels = np.full((count, n + 2), IGNORE, dtype=np.int16)
        labels[:, 2:] = self.products(words) + FIRST_ELEMENT
        return {"input_ids": ids, "labels": labels}

    def train_dataset(self, seed: int) -> Rows:
        return Rows(self.rows(self._train), seed=seed)

    def eval_dataset(self) -> Rows:
        return Rows(self.rows(self._held_out[: self.config.tests]))

    def fingerprint(self) -> str:
        return world_fingerprint(self.config, self.group.table)

    def prompts(self, count: int) -> list[Tensor]:
        return []  # the labels are products, not inputs: there is nothing to continue

    @property
    def metrics(self) -> Sequence[Metric]:
        accuracies = [accuracy(who, n) for n in self._lengths for who in DRIVERS]
        return [EFFECTIVE_LATENT_RANK, *accuracies]

    def measures(self) -> Mapping[str, Measure]:
        return {"word problem": self.accuracies, "effective latent rank": self.latent_rank}

    def latent_rank(self, model: ObjectiveModel) -> list[Measurement]:
        """Effective rank of the states of the held-out rows of the training length."""
        ids = self.rows(self._held_out[: self.config.tests])["input_ids"][:, :-1]
        score = latent_rank(model, torch.from_numpy(ids.astype(np.int64)))
        return [Measurement(EFFECTIVE_LATENT_RANK, score)]

    def accuracies(self, model: ObjectiveModel) -> list[Measurement | Chart]:
        """Accuracy at the last position of test sequences of each length, and a chart of it by
        position at the longest: of the transformer, and, where the objective has one, of the latent
        dynamics model run alone, as an RNN, from the state at `begin` (arXiv 2511.05963, A5)."""
        found: list[Measurement | Chart] = []
        lines: list[Line] = []
        for n in self._lengths:
            rng = np.random.default_rng((len(self.group.names), n))
            words = (
                self._held_out[: self.config.tests]
                if n == self.config.length
                else rng.integers(len(self.group.names), size=(self.config.tests, n))
            )
            rows = self.rows(words)
            for predictor, tokens in self._predictions(model, rows["input_ids"][:, :-1]).items():
                correct = (tokens == rows["labels"][:, 2:]).astype(np.float64)
                found.append(Measurement(accuracy(predictor, n), mean_score(correct[:, -1])))
                if n == max(self._lengths):
                    alone = "latent dynamics model run alone"
                    series = alone if predictor == "dynamics" else predictor
                    lines.append(Line(values=correct.mean(0).tolist(), series=series))
        chart = Chart(
            name="accuracy",
            title="Accuracy by position",
            x="elements read",
            lines=lines,
            alt="Accuracy of {models} by the number of elements read.",
            marks=[
                Mark(text="trained up to here", x=self.config.length),
                Mark(text="chance", y=1 / len(self.group.names)),
            ],
        )
        return [*found, chart]

    def _predictions(
        self, model: ObjectiveModel, input_ids: np.ndarray
    ) -> dict[Driver, np.ndarray]:
        """(S, n + 1) inputs -> the products (S, n) that each way to predict them gives."""
        ids = torch.from_numpy(input_ids.astype(np.int64)).to(model.device)
        with evaluation_mode(model):
            found: dict[Driver, np.ndarray] = {}
            for who in DRIVERS:
                if predictor := driver(model, who, begun=1):
                    h, _ = predictor.step(ids)
                    tokens = predictor.next_token_logits(h[:, 1:]).argmax(-1)
                    found[who] = tokens.cpu().numpy()
            return found


def _distinct(order: int, config: WordProblemConfig) -> np.ndarray:
    """(S, n) distinct uniform sequences in random order: all that exist, when those are fewer than
    asked for."""
    rng = np.random.default_rng((order, config.length, config.sequences))
    if order**config.length <= 4 * config.sequences:
        codes = rng.permutation(order**config.length)[: config.sequences]
        return (codes[:, None] // order ** np.arange(config.length) % order).astype(np.int16)
    words = np.zeros((0, config.length), dtype=np.int16)
    while len(words) < config.sequences:
        more = rng.integers(
            order, size=(config.sequences - len(words), config.length), dtype=np.int16
        )
        words = np.unique(np.concatenate([words, more]), axis=0)
    return rng.permutation(words)
