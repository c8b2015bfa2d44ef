"""Countdown: combine all numbers into the target, one equation after another (Gandhi et al. 2024;
arXiv 2511.05963).

A row, one token per integer and per sign, commas included; the answer is the first solution of a
depth-first search:

    14,83,88,91,23||||||||83-14=69,91-88=3,69/3=23 end

The pause tokens `|` give a model room to think before it commits itself to the first equation. Four
numbers make a prompt of 17 tokens and an answer of 18, `end` included, on which alone there is a
loss.

Shapes: P problems, n numbers, A tokens of an answer.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from nextlat.model import ObjectiveModel
from nextlat.results import (
    Chart,
    Line,
    Measurement,
    Metric,
    Picture,
    Published,
    PublishedFigures,
    Saying,
)
from nextlat.scores import Score, mean_score
from nextlat.tasks.answers import END, FIRST_SYMBOL, SAMPLED, generate_answers, symbol_tokenizer
from nextlat.tasks.countdown_problems import (
    OPERATIONS,
    Equation,
    Problems,
    Verdict,
    arithmetic,
    draw_problems,
    judge,
)
from nextlat.tasks.rows import Rows
from nextlat.tasks.task import (
    NEXTLAT,
    PAD,
    Measure,
    RowCount,
    Task,
    TaskConfig,
    TestCount,
    check_size,
    world_fingerprint,
)

SYMBOLS = (*OPERATIONS, "=", ",", "|")
FIRST_OPERATION, EQUALS, COMMA, PAUSE = (FIRST_SYMBOL + i for i in (0, 4, 5, 6))
ZERO = FIRST_SYMBOL + len(SYMBOLS)  # the token of integer i is ZERO + i
SLOT = 6  # tokens of an equation and of the comma or end after it
HELD_OUT_SHARE = 0.1  # of the targets
LOSS_ROWS = 2000  # test problems of the evaluation loss, which is read one row at a time
EXAMPLES = 3  # answers shown of every verdict

Split = Literal["seen", "held-out"]
SPLITS: tuple[Split, ...] = ("seen", "held-out")
TARGETS = {"seen": "targets seen in training", "held-out": "held-out targets"}
_declare = partial(Metric, source=f"Gandhi et al. 2024; {NEXTLAT}", items="problems")


def solved(split: Split, *, sampled: bool = False) -> Metric:
    """Share of problems solved, greedily or by one sampled answer."""
    how = "by one answer for each, sampled at temperature 1," if sampled else "greedily"
    return _declare(
        name="solved",
        title=f"Solved, {TARGETS[split]}{' (sampled)' if sampled else ''}",
        noun=f"share of problems solved{' by one sampled answer' if sampled else ''} with "
        f"{TARGETS[split]}",
        definition=f"Share of unseen problems ({TARGETS[split]}) that the model solves {how} by "
        "any valid derivation: each number used once, every equation true, the last one yielding "
        "the target.",
        parameters={"targets": split, **(SAMPLED if sampled else {})},
        published=None if sampled else "solved",
    )


def true_equation(equation: int, split: Split) -> Metric:
    """Share of answers whose equation at one position, from 1, is true."""
    return _declare(
        name="true_equation",
        title=f"Equation {equation} true, {TARGETS[split]}",
        noun=f"share of true equations at position {equation} with {TARGETS[split]}",
        definition=f"Share of unseen problems ({TARGETS[split]}) whose equation {equation}, given "
        "greedily, is well-formed and true, whether or not its numbers are available.",
        parameters={"equation": equation, "targets": split},
        headline=False,  # in the chart; whether the problem is solved is what counts
    )


class CountdownConfig(TaskConfig):
    """Settings of the task (defaults: the paper's).

    Attributes:
        numbers: to combine.
        max_number: they are drawn from 1 to here.
        min_target: the smallest target.
        max_target: the largest. The first tenth of all targets in random order is held out.
        max_value: largest integer that has a token; problems whose stored solution exceeds it are
            drawn again.
        pause: tokens between problem and answer.
        problems: for training, drawn once and for all.
        tests: problems on seen and as many on held-out targets, none of them among the training
            problems in any order of its numbers.
    """

    numbers: Annotated[int, Field(ge=2, le=5)] = 4
    max_number: Annotated[int, Field(ge=1, le=999)] = 99
    min_target: Annotated[int, Field(ge=1, le=10**6)] = 10
    max_target: Annotated[int, Field(ge=1, le=10**6)] = 100
    max_value: Annotated[int, Field(ge=1, le=10**6)] = 10_000
    pause: Annotated[int, Field(ge=0, le=2**16)] = 8
    problems: RowCount = 500_000
    tests: TestCount = 10_000

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if HELD_OUT_SHARE * (self.max_target - self.min_target + 1) < 1:
            raise ValueError(
                "Countdown needs at least ten targets, a tenth of which is held out: set "
                "max_target higher"
            )
        if self.max_value < max(self.max_number, self.max_target):
            raise ValueError(
                "Countdown needs a max_value at least as large as max_number and max_target: they "
                "are tokens too"
            )
        check_size(self.problems + 2 * self.tests, 8 * self.numbers + self.pause)
        return self

    def build(self) -> "Countdown":
        return Countdown(self)


def rows(problems: Problems, pause: int) -> np.ndarray:
    """(P, 2 n + 1 + pause + 6 (n - 1)) tokens, see the module."""
    count, n = problems.numbers.shape
    prompt = np.full((count, n + 1, 2), COMMA, dtype=np.int32)
    prompt[:, :, 0] = np.concatenate([problems.numbers, problems.targets[:, None]], axis=1) + ZERO
    answer = np.full((count, n - 1, SLOT), COMMA, dtype=np.int32)
    answer[:, :, :5:2] = problems.equations[:, :, [0, 2, 3]] + ZERO
    answer[:, :, 1] = problems.equations[:, :, 1] + FIRST_OPERATION
    answer[:, :, 3], answer[:, -1, 5] = EQUALS, END
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
    """The verdict on an answer, as token ids: see `judge`. Nothing after the first `end` counts."""
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
    """See the module. All problems are a function of the settings alone, the order of training of
    the seed."""

    name = "countdown"
    title = "Countdown"
    published = Published(
        setting="four numbers, three equations, 500,000 problems, 12 layers of width 768, three "
        "seeds",
        source=f"{NEXTLAT}v4",
        figures={
            "solved": PublishedFigures(
                title="Problems solved",
                by_method={
                    "GPT": 0.331, "BST": 0.423,
                    "MTP d=1": 0.392, "MTP d=4": 0.497, "MTP d=8": 0.573,
                    "JTP d=1": 0.390, "JTP d=4": 0.494, "JTP d=8": 0.550,
                    "NextLat d=1": 0.548, "NextLat d=4": 0.576, "NextLat d=8": 0.587,
                },
            ),
        },
        sayings=[
            Saying(
                methods=("NextLat",),
                text="54.8 % of the last equations are valid at d=1, of the next best method "
                "42.3 %",
            )
        ],
    )  # fmt: skip

    def __init__(self, config: CountdownConfig) -> None:
        self.config = config
        self.prompt_length = 2 * config.numbers + 1 + config.pause
        self.answer_length = SLOT * (config.numbers - 1)
        self.max_length = self.prompt_length + self.answer_length
        self.tokenizer = symbol_tokenizer(SYMBOLS, config.max_value + 1)
        every_target = np.arange(config.min_target, config.max_target + 1)
        targets = np.random.default_rng(0).permutation(every_target)
        held_out = int(HELD_OUT_SHARE * len(targets))
        self.targets: dict[Split, np.ndarray] = {
            "seen": targets[held_out:],
            "held-out": targets[:held_out],
        }
        self._tests = {
            split: self._draw(split, config.tests, stream)
            for stream, split in enumerate(SPLITS, start=1)
        }

    def _draw(
        self, split: Split, count: int, stream: int, refused: np.ndarray | None = None
    ) -> Problems:
        return draw_problems(
            self.targets[split],
            count,
            np.random.default_rng(stream),
            numbers=self.config.numbers,
            max_number=self.config.max_number,
            max_value=self.config.max_value,
            refused=refused,
        )

    @cached_property
    def _problems(self) -> Problems:
        """The training problems, made when training asks for them: some ten seconds for the paper's
        500,000."""
        return self._draw("seen", self.config.problems, 3, refused=self._tests["seen"].keys())

    def _rows(self, problems: Problems) -> np.ndarray:
        return rows(problems, self.config.pause)

    def train_dataset(self, seed: int) -> Rows:
        columns = {"input_ids": self._rows(self._problems)}
        return Rows(columns, seed=seed, prompt_length=self.prompt_length)

    def eval_dataset(self) -> Rows:
        columns = {"input_ids": self._rows(self._tests["seen"])[:LOSS_ROWS]}
        return Rows(columns, prompt_length=self.prompt_length)

    def fingerprint(self) -> str:
        return world_fingerprint(self.config, *(self._rows(self._tests[s]) for s in SPLITS))

    def prompts(self, count: int) -> list[Tensor]:
        return list(torch.from_numpy(self._prompts("seen")[:count].astype(np.int64)))

    def _prompts(self, split: Split) -> np.ndarray:
        return self._rows(self._tests[split])[:, : self.prompt_length]

    @property
    def metrics(self) -> Sequence[Metric]:
        equations = range(1, self.config.numbers)
        return [
            *(solved(split) for split in SPLITS),
            *(solved(split, sampled=True) for split in SPLITS),
            *(true_equation(i, split) for i in equations for split in SPLITS),
        ]

    def measures(self) -> Mapping[str, Measure]:
        return {"problems solved": self.greedy_answers, "sampled answers": self.sampled_answers}

    def greedy_answers(self, model: ObjectiveModel) -> list[Measurement | Chart]:
        """The share of test problems solved by any valid derivation, and the share whose i-th
        equation is true, whether or not its operands are available."""
        found: list[Measurement | Chart] = []
        lines = []
        for split in SPLITS:
            answers = self._answers(model, split)
            found.append(Measurement(solved(split), self._share_solved(answers, split)))
            shares = []
            for i in range(1, self.config.numbers):
                tokens = answers[:, SLOT * (i - 1) : SLOT * i - 1].tolist()
                given = map(read_equation, tokens)
                true = [e is not None and arithmetic(e) is Verdict.SOLVED for e in given]
                found.append(Measurement(true_equation(i, split), mean_score(true)))
                shares.append(float(np.mean(true)))
            lines.append(Line(values=shares, series=TARGETS[split], dots=True))
        chart = Chart(
            name="equations",
            title="True equations by their position in the derivation",
            x="equation",
            lines=lines,
            alt="Share of true equations of {models} by their position.",
            caption="One line per seed.",
        )
        return [*found, chart]

    def sampled_answers(self, model: ObjectiveModel, seed: int = 0) -> list[Measurement]:
        """Share of test problems that one answer sampled at temperature 1 solves."""
        return [
            Measurement(
                solved(split, sampled=True),
                self._share_solved(self._answers(model, split, seed), split),
            )
            for split in SPLITS
        ]

    def _share_solved(self, answers: np.ndarray, split: Split) -> Score:
        return mean_score([v is Verdict.SOLVED for v in self.verdicts(answers, split)])

    def _answers(self, model: ObjectiveModel, split: Split, seed: int | None = None) -> np.ndarray:
        """(P, A) answers, greedy or sampled (seed), padded after their first `end`."""
        answers = generate_answers(model, self._prompts(split), self.answer_length, seed=seed)
        ends = answers == END
        answers[ends.cumsum(axis=1) > ends] = PAD
        return answers

    def verdicts(self, answers: np.ndarray, split: Split) -> list[Verdict]:
        """One verdict per test problem on the answers (P, A) to all of them."""
        tests = self._tests[split]
        columns = (tests.numbers.tolist(), tests.targets.tolist(), answers.tolist())
        return [verdict(*problem) for problem in zip(*columns, strict=True)]

    def artifacts(self, model: ObjectiveModel) -> Iterable[tuple[Picture, Any]]:
        """rejections.json: for seen and held-out targets how many answers come to which verdict,
        and a few of each to look at."""
        record: dict[str, Any] = {}
        for split in SPLITS:
            answers = self._answers(model, split)
            verdicts = self.verdicts(answers, split)
            examples = {}
            for kind in Verdict:
                chosen = [i for i, v in enumerate(verdicts) if v is kind][:EXAMPLES]
                lines = np.concatenate([self._prompts(split)[chosen], answers[chosen]], axis=1)
                examples[str(kind)] = [self.text(line) for line in lines]
            counts = {str(kind): verdicts.count(kind) for kind in Verdict}
            record[split] = {"counts": counts, "examples": examples}
        return [(Picture(file="rejections.json"), record)]

    def text(self, tokens: np.ndarray) -> str:
        """A row without padding and without spaces between tokens."""
        return str(self.tokenizer.decode(tokens[tokens != PAD])).replace(" ", "")
