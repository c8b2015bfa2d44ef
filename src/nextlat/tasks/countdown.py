"""Countdown: combine all numbers into the target, one equation after another (Gandhi et al. 2024;
arXiv 2511.05963).

A row, one token per integer and per sign, commas included; the answer is the first solution of a
depth-first search:

    14,83,88,91,23||||||||83-14=69,91-88=3,69/3=23 end

The pause tokens `|` give a model room to think before it commits itself to the first equation. Four
numbers make a prompt of 17 tokens and an answer of 18, `end` included, on which alone there is a
loss.

Shapes: P problems, n numbers.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nextlat.errors import NextLatError
from nextlat.scores import Score, mean_score
from nextlat.tasks.answers import (
    END,
    PAD,
    SAMPLED,
    SPECIAL_TOKENS,
    AnswerRows,
    generate_answers,
    symbol_tokenizer,
)
from nextlat.tasks.countdown_problems import (
    OPERATIONS,
    Equation,
    Problems,
    Verdict,
    arithmetic,
    draw_problems,
    judge,
)
from nextlat.tasks.task import Metric, Task

if TYPE_CHECKING:
    from nextlat.model import ObjectiveModel

SYMBOLS = (*OPERATIONS, "=", ",", "|")
FIRST_OPERATION, EQUALS, COMMA, PAUSE = (len(SPECIAL_TOKENS) + i for i in (0, 4, 5, 6))
ZERO = len(SPECIAL_TOKENS) + len(SYMBOLS)  # the token of integer i is ZERO + i
SLOT = 6  # tokens of an equation and what follows it
HELD_OUT_SHARE = 0.1  # of the targets
LOSS_ROWS = 2000  # test problems of the evaluation loss, which is read one row at a time
SPLITS = ("seen", "held_out")
REJECTIONS, EXAMPLES = "rejections.json", 3


@dataclass(frozen=True)
class CountdownConfig:
    """Settings of the task (defaults: the paper's).

    Attributes:
        numbers: to combine, 2 to 5. max_number: they are drawn from 1 to here.
        min_target, max_target: range of the targets, of which the first tenth in random order is
            held out.
        max_value: largest integer that has a token; problems whose stored solution exceeds it are
            drawn again.
        pause: tokens between problem and answer.
        problems: for training, drawn once and for all. tests: problems on seen and as many on
            held-out targets, none of them, in whatever order of its numbers, among the training
            problems.
    """

    numbers: int = 4
    max_number: int = 99
    min_target: int = 10
    max_target: int = 100
    max_value: int = 10_000
    pause: int = 8
    problems: int = 500_000
    tests: int = 10_000

    def build(self) -> "Countdown":
        return Countdown(self)


def rows(problems: Problems, pause: int) -> np.ndarray:
    """(P, 2 n + 1 + pause + 6 (n - 1)) tokens, see the module."""
    count, n = problems.numbers.shape
    prompt = np.full((count, n + 1, 2), COMMA, dtype=np.int32)
    prompt[:, :, 0] = np.concatenate([problems.numbers, problems.targets[:, None]], axis=1) + ZERO
    answer = np.full((count, n - 1, SLOT), COMMA, dtype=np.int32)
    answer[:, :, :5:2] = problems.equations[:, :, [0, 2, 3]] + ZERO
    answer[:, :, 1], answer[:, :, 3], answer[:, -1, 5] = (
        problems.equations[:, :, 1] + FIRST_OPERATION,
        EQUALS,
        END,
    )
    pauses = np.full((count, pause), PAUSE, dtype=np.int32)
    return np.concatenate(
        [prompt.reshape(count, -1)[:, :-1], pauses, answer.reshape(count, -1)], axis=1
    )


def read_equation(tokens: Sequence[int]) -> Equation | None:
    """The equation that five tokens are, or None."""
    if len(tokens) != 5 or min(tokens[0], tokens[2], tokens[4]) < ZERO or tokens[3] != EQUALS:
        return None
    operation = tokens[1] - FIRST_OPERATION
    if not 0 <= operation < len(OPERATIONS):
        return None
    return tokens[0] - ZERO, OPERATIONS[operation], tokens[2] - ZERO, tokens[4] - ZERO


def verdict(numbers: Sequence[int], target: int, answer: Sequence[int]) -> Verdict:
    """What an answer, as token ids, comes to: see `judge`. Nothing behind the first `end` counts."""
    if END not in answer:
        return Verdict.NO_END
    body = list(answer[: list(answer).index(END)])
    equations = [read_equation(body[at : at + SLOT - 1]) for at in range(0, len(body), SLOT)]
    commas = body[SLOT - 1 :: SLOT]  # one fewer than equations, if all is well
    if (
        None in equations
        or any(token != COMMA for token in commas)
        or (body and len(commas) == len(equations))
    ):
        return Verdict.MALFORMED
    return judge(numbers, target, [equation for equation in equations if equation is not None])


class Countdown(Task):
    """See the module. All problems are a function of the configuration alone, the order of training
    of the seed."""

    name = "countdown"

    def __init__(self, config: CountdownConfig) -> None:
        _check(config)
        self.config = config
        self.prompt_length = 2 * config.numbers + 1 + config.pause
        self.answer_length = SLOT * (config.numbers - 1)
        self.max_length = self.prompt_length + self.answer_length
        self.tokenizer = symbol_tokenizer(SYMBOLS, config.max_value + 1)
        self.higher_is_better = {
            **{f"solved_{split}{way}": True for split in SPLITS for way in ("", SAMPLED)},
            **{
                f"true_equation_{i}_{split}": True
                for i in range(1, config.numbers)
                for split in SPLITS
            },
        }
        targets = np.random.default_rng(0).permutation(
            np.arange(config.min_target, config.max_target + 1)
        )
        held_out = int(HELD_OUT_SHARE * len(targets))
        self.targets = {"seen": targets[held_out:], "held_out": targets[:held_out]}
        self._tests = {
            split: self._draw(split, config.tests, stream)
            for stream, split in enumerate(SPLITS, start=1)
        }

    def _draw(
        self, split: str, count: int, stream: int, refused: np.ndarray | None = None
    ) -> Problems:
        config, rng = self.config, np.random.default_rng(stream)
        return draw_problems(
            self.targets[split], count, rng, numbers=config.numbers, max_number=config.max_number,
            max_value=config.max_value, refused=refused,
        )  # fmt: skip

    @cached_property
    def _problems(self) -> Problems:
        """The training problems, made when training asks for them: some ten seconds for the paper's
        500,000."""
        return self._draw("seen", self.config.problems, 3, refused=self._tests["seen"].keys())

    def train_dataset(self, seed: int) -> Dataset[dict[str, Tensor]]:
        return AnswerRows(rows(self._problems, self.config.pause), self.prompt_length, seed)

    def eval_dataset(self) -> Dataset[dict[str, Tensor]]:
        return AnswerRows(
            rows(self._tests["seen"], self.config.pause)[:LOSS_ROWS], self.prompt_length
        )

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.config).encode())
        for split in SPLITS:
            digest.update(rows(self._tests[split], self.config.pause).tobytes())
        return digest.hexdigest()[:16]

    def prompts(self, count: int) -> list[Tensor]:
        return list(torch.from_numpy(self._prompts("seen")[:count]))

    def _prompts(self, split: str) -> np.ndarray:
        return rows(self._tests[split], self.config.pause)[:, : self.prompt_length].astype(np.int64)

    def metrics(self) -> Mapping[str, Metric]:
        return {
            "problems, seen targets": lambda model: self.accuracies(model, "seen"),
            "problems, held-out targets": lambda model: self.accuracies(model, "held_out"),
            "sampled answers": lambda model: {
                f"solved_{split}{SAMPLED}": self.solved_by_sampling(model, split)
                for split in SPLITS
            },
        }

    def accuracies(self, model: "ObjectiveModel", split: str) -> dict[str, Score]:
        """Share of test problems that a model solves, greedily, by any valid derivation
        (`solved_...`).

        `true_equation_i_...`: share whose i-th equation is one, and true, be its operands available
        or not.
        """
        answers = self._answers(model, split)
        found = {
            f"solved_{split}": mean_score(
                [v is Verdict.SOLVED for v in self.verdicts(answers, split)]
            )
        }
        for i in range(self.config.numbers - 1):
            given = [
                read_equation(tokens)
                for tokens in answers[:, SLOT * i : SLOT * i + SLOT - 1].tolist()
            ]
            true = [
                equation is not None and arithmetic(equation) is Verdict.SOLVED
                for equation in given
            ]
            found[f"true_equation_{i + 1}_{split}"] = mean_score(true)
        return found

    def solved_by_sampling(self, model: "ObjectiveModel", split: str, seed: int = 0) -> Score:
        """Share of test problems that one answer sampled at temperature 1 solves."""
        return mean_score(
            [v is Verdict.SOLVED for v in self.verdicts(self._answers(model, split, seed), split)]
        )

    def _answers(self, model: "ObjectiveModel", split: str, seed: int | None = None) -> np.ndarray:
        """(P, A) answers, greedy or sampled (seed), padded behind their first `end`."""
        answers = generate_answers(model, self._prompts(split), self.answer_length, seed=seed)
        ends = answers == END
        answers[ends.cumsum(axis=1) > ends] = PAD
        return answers

    def verdicts(self, answers: np.ndarray, split: str) -> list[Verdict]:
        """One verdict per test problem on the answers (P, A) to all of them."""
        tests = self._tests[split]
        problems = zip(
            tests.numbers.tolist(), tests.targets.tolist(), answers.tolist(), strict=True
        )
        return [verdict(*problem) for problem in problems]

    def artifacts(self, model: "ObjectiveModel") -> Mapping[str, Any]:
        """rejections.json: per split, how many answers come to which verdict, and a few of each to
        look at."""
        record: dict[str, Any] = {}
        for split in SPLITS:
            answers = self._answers(model, split)
            verdicts = self.verdicts(answers, split)
            record[split] = {"counts": {str(v): verdicts.count(v) for v in Verdict}, "examples": {}}
            for kind in Verdict:
                chosen = [i for i, v in enumerate(verdicts) if v is kind][:EXAMPLES]
                lines = np.concatenate([self._prompts(split)[chosen], answers[chosen]], axis=1)
                record[split]["examples"][str(kind)] = [self.text(line) for line in lines]
        return {REJECTIONS: record}

    def text(self, tokens: np.ndarray) -> str:
        """A row without padding and without spaces between tokens."""
        return str(self.tokenizer.decode(tokens[tokens != PAD])).replace(" ", "")


def _check(config: CountdownConfig) -> None:
    targets = config.max_target - config.min_target + 1
    if not 2 <= config.numbers <= 5 or not 1 <= config.max_number <= 999:
        raise NextLatError("Countdown needs 2 to 5 numbers and a max_number from 1 to 999.")
    if config.min_target < 1 or HELD_OUT_SHARE * targets < 1:
        raise NextLatError(
            "Countdown needs at least ten targets from 1 on, a tenth of which is held out: set max_target higher."
        )
    if config.max_value < max(config.max_number, config.max_target):
        raise NextLatError(
            "Countdown needs a max_value at least as large as max_number and max_target: they are tokens too."
        )
    if config.problems < 1 or config.tests < 2 or config.pause < 0:
        raise NextLatError("Countdown needs problems >= 1, tests >= 2 and pause >= 0.")
