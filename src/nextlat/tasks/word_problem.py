"""The group word problem: follow a state that every token changes (Merrill, Petty & Sabharwal 2024;
A5 in arXiv 2511.05963).

A row is `begin a_1 ... a_n end` with i.i.d. uniform group elements, and the label of a_t is the
product a_1 a_2 ... a_t, accumulator on the left. Inputs and labels differ: the "next token" of the
losses is the label, while the latent dynamics model reads the next input. Without the token
`begin`, rotary attention over a prefix of equal tokens could not tell a from aa.

Shapes: S sequences, n elements a sequence, G order of the group.
"""

import hashlib
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from nextlat.batch import IGNORE
from nextlat.errors import NextLatError
from nextlat.scores import Score, mean_score
from nextlat.tasks.latent_rank import latent_rank
from nextlat.tasks.rows import Rows
from nextlat.tasks.task import Metric, Task

if TYPE_CHECKING:
    from nextlat.model import ObjectiveModel

PAD, UNK, BEGIN, END, FIRST_ELEMENT = 0, 1, 2, 3, 4
SPECIAL_TOKENS = ("<pad>", "<unk>", "begin", "end")
VALIDATION_SHARE = 0.2  # of the distinct sequences (paper: 80 % train, 20 % validation)


@dataclass(frozen=True)
class Group:
    """A finite group as its Cayley table: `table[a, b]` is the index of the product a b, `names`
    the elements' tokens."""

    table: np.ndarray
    names: tuple[str, ...]


def group(name: str) -> Group:
    """Z<n> (cyclic), S<n> (all permutations) or A<n> (the even ones); permutations compose as (p
    q)(i) = p(q(i)).

    Raises:
        NextLatError: another name, or an order beyond 720.
    """
    match = re.fullmatch(r"([ZSA])(\d{1,3})", name)
    kind, n = (match[1], int(match[2])) if match else ("", 0)
    if kind == "Z" and 2 <= n <= 720:
        i = np.arange(n)
        return Group((i[:, None] + i) % n, tuple(map(str, range(n))))
    if kind not in ("S", "A") or not 2 + (kind == "A") <= n <= 6:
        raise NextLatError(
            f"'{name}' is no group known here: use Z2 to Z720 (cyclic), S2 to S6 or A3 to A6 (permutations)."
        )
    elements = [p for p in itertools.permutations(range(n)) if kind == "S" or _even(p)]
    index = {p: i for i, p in enumerate(elements)}
    table = np.array([[index[tuple(p[i] for i in q)] for q in elements] for p in elements])
    return Group(table, tuple("".join(map(str, p)) for p in elements))


def _even(p: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(p, 2)) % 2 == 0


@dataclass(frozen=True)
class WordProblemConfig:
    """Settings of the task (defaults: the A5 experiment of arXiv 2511.05963).

    Attributes:
        group: see `group`. length: elements of a training sequence.
        sequences: distinct sequences in all, a fifth of them held out; fewer where the group has
            not that many.
        multiples: test lengths as multiples of `length` (paper: 1 and 3). tests: sequences per test
            length.
    """

    group: str = "A5"
    length: int = 12
    sequences: int = 1_000_000
    multiples: tuple[int, ...] = (1, 2, 3)
    tests: int = 2000

    def build(self) -> "WordProblem":
        return WordProblem(self)


class WordProblem(Task):
    """See the module; the data are a function of the configuration alone, the order of training of
    the seed."""

    name = "word-problem"

    def __init__(self, config: WordProblemConfig) -> None:
        if (
            config.length < 1
            or config.sequences < 10
            or config.tests < 2
            or min(config.multiples, default=0) < 1
        ):
            raise NextLatError(
                "the word problem needs length >= 1, sequences >= 10, tests >= 2 and multiples >= 1."
            )
        self.config = config
        self.group = group(config.group)
        self.max_length = config.length * max(config.multiples) + 2
        words = (*SPECIAL_TOKENS, *self.group.names)
        core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        core.pre_tokenizer = WhitespaceSplit()
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", bos_token="begin", eos_token="end",
            model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=False,
        )  # fmt: skip
        self.higher_is_better = {
            f"{who}_accuracy_{n}": True
            for who in ("transformer", "dynamics")
            for n in self._test_lengths()
        }
        self.higher_is_better["effective_latent_rank"] = False
        self._train, self._held_out = _split(_distinct(len(self.group.names), config))

    def _test_lengths(self) -> list[int]:
        return [multiple * self.config.length for multiple in self.config.multiples]

    def products(self, words: np.ndarray) -> np.ndarray:
        """(S, n) elements -> (S, n) running products, accumulator on the left."""
        out = words.astype(np.int64)
        for t in range(1, words.shape[1]):
            out[:, t] = self.group.table[out[:, t - 1], out[:, t]]
        return out

    def rows(self, words: np.ndarray) -> dict[str, Tensor]:
        """(S, n) elements -> `input_ids` and `labels` (S, n + 2); the label of a_t stands one place
        later, as always."""
        count, n = words.shape
        ids = np.full((count, n + 2), END, dtype=np.int64)
        ids[:, 0], ids[:, 1:-1] = BEGIN, words.astype(np.int64) + FIRST_ELEMENT
        labels = np.full((count, n + 2), IGNORE, dtype=np.int64)
        labels[:, 2:] = self.products(words) + FIRST_ELEMENT
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}

    def train_dataset(self, seed: int) -> Dataset[dict[str, Tensor]]:
        return Rows(self.rows(self._train), seed=seed)

    def eval_dataset(self) -> Dataset[dict[str, Tensor]]:
        return Rows(self.rows(self._held_out[: self.config.tests]))

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.config).encode())
        digest.update(self.group.table.tobytes())
        return digest.hexdigest()[:16]

    def prompts(self, count: int) -> list[Tensor]:
        return []  # the labels are products, not inputs: there is nothing to continue

    def metrics(self) -> Mapping[str, Metric]:
        return {
            "word problem": self.accuracies,
            "effective latent rank": lambda model: {
                "effective_latent_rank": self.latent_rank(model)
            },
        }

    def latent_rank(self, model: "ObjectiveModel") -> Score:
        """Effective rank of the states of the held-out rows of the training length."""
        return latent_rank(
            model, self.rows(self._held_out[: self.config.tests])["input_ids"][:, :-1]
        )

    @torch.inference_mode()
    def accuracies(self, model: "ObjectiveModel") -> dict[str, Score | list[float]]:
        """Accuracy at the last position of test sequences of each length, and per position at the
        longest.

        `transformer_accuracy_n`: of the transformer. `dynamics_accuracy_n`: of the latent dynamics
        model run alone, as an RNN, from the transformer's state at `begin` (arXiv 2511.05963, A5),
        where the objective has one.
        """
        was_training = model.training
        model.eval()
        found: dict[str, Score | list[float]] = {}
        for n in self._test_lengths():
            rng = np.random.default_rng((len(self.group.names), n))
            words = (
                self._held_out[: self.config.tests]
                if n == self.config.length
                else rng.integers(len(self.group.names), size=(self.config.tests, n))
            )
            rows = {name: x.to(model.device) for name, x in self.rows(words).items()}
            for who, logits in self._logits(model, rows["input_ids"][:, :-1]).items():
                correct = (logits.argmax(-1) == rows["labels"][:, 2:]).double().cpu().numpy()
                found[f"{who}_accuracy_{n}"] = mean_score(correct[:, -1])
                found[f"{who}_accuracy_by_position"] = correct.mean(0).tolist()
        model.train(was_training)
        return found

    def _logits(self, model: "ObjectiveModel", input_ids: Tensor) -> dict[str, Tensor]:
        """(S, n + 1) inputs -> logits (S, n, V) of each way to predict the products."""
        h, _ = model.step(input_ids)
        found = {"transformer": model.next_token_logits(h[:, 1:])}
        if model.objective.max_draft_length is None:
            state, logits = h[:, 0], []
            for t in range(1, input_ids.shape[1]):
                state, following = model.objective.draft(state, input_ids[:, t])
                logits.append(following)
            found["dynamics"] = torch.stack(logits, dim=1)
        return found


def _distinct(order: int, config: WordProblemConfig) -> np.ndarray:
    """(S, n) distinct uniform sequences in random order: all that exist when fewer are there than
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


def _split(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    held_out = round(VALIDATION_SHARE * len(words))
    return words[held_out:], words[:held_out]
