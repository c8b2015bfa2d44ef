"""Path-Star: find the one arm of a star graph that ends at the goal (Bachmann & Nagarajan 2024;
arXiv 2511.05963).

G(d, l) is a centre with d disjoint arms of l nodes each, the centre counted. A row is

    a b | c d | ... / start goal = p_1 ... p_l end        written  a,b|c,d|.../start,goal=p_1,...,p_l

edges as (parent, child) in random order, then the path from the centre to the goal. E = d (l - 1)
edges give a prompt of 3 E + 3 tokens and an answer of l; with the end-of-sequence token, on which
there is a loss too, G(5, 5) has 69. Place 2 of the path is the
branch, the only hard one: all others follow from their predecessor.

Shapes: P problems, d arms, l nodes an arm, N names, E edges, K = E + 1 nodes.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nextlat.errors import NextLatError
from nextlat.scores import Score, mean_score
from nextlat.tasks.answers import (
    END,
    SAMPLED,
    SPECIAL_TOKENS,
    AnswerRows,
    forced_answers,
    generate_answers,
    symbol_tokenizer,
)
from nextlat.tasks.rows import row_keys
from nextlat.tasks.task import Metric, Task

if TYPE_CHECKING:
    from nextlat.model import ObjectiveModel

SYMBOLS = ("|", "/", "=")
BAR, SLASH, EQUALS = (len(SPECIAL_TOKENS) + i for i in range(3))
FIRST_NAME = len(SPECIAL_TOKENS) + len(SYMBOLS)
LOSS_ROWS = 2000  # test graphs of the evaluation loss, which is read one row at a time
ROUNDS = 1000  # of drawing again the graphs that are among those refused


@dataclass(frozen=True)
class PathStarConfig:
    """Settings of the task (defaults: the paper's G(5, 5)).

    Attributes:
        arms: d. length: l, nodes of an arm, the centre counted. names: N, how many node names there
            are.
        graphs: training graphs, drawn once and for all. tests: test graphs, none of them a training
            graph.
    """

    arms: int = 5
    length: int = 5
    names: int = 100
    graphs: int = 200_000
    tests: int = 20_000

    def build(self) -> "PathStar":
        return PathStar(self)


@dataclass(frozen=True, eq=False)
class Stars:
    """P graphs with a goal each.

    Attributes:
        nodes: (P, d, l) names; `nodes[:, :, 0]` is the centre. goal: (P,) the arm that ends at the
            goal.
        order: (P, E) which edge is written at each place; edge a (l - 1) + i is the i-th of arm a.
    """

    nodes: np.ndarray
    goal: np.ndarray
    order: np.ndarray

    @classmethod
    def draw(
        cls, arms: int, length: int, names: int, count: int, rng: np.random.Generator
    ) -> "Stars":
        """Names without replacement, the order of the edges and the goal's arm, all uniform."""
        edges = arms * (length - 1)
        drawn = rng.permuted(np.tile(np.arange(names, dtype=np.int32), (count, 1)), axis=1)[
            :, : edges + 1
        ]
        nodes = np.empty((count, arms, length), dtype=np.int32)
        nodes[:, :, 0] = drawn[:, :1]
        nodes[:, :, 1:] = drawn[:, 1:].reshape(count, arms, length - 1)
        order = rng.permuted(np.tile(np.arange(edges), (count, 1)), axis=1)
        return cls(nodes, rng.integers(arms, size=count), order)

    def keys(self) -> np.ndarray:
        """(P,) one value per problem, equal exactly for equal graphs with equal goals, in whatever
        order they are written."""
        first = self.nodes[:, :, 1].copy()
        np.put_along_axis(
            first, self.goal[:, None], -1, axis=1
        )  # the goal's arm, then the others by their first node
        arms = np.take_along_axis(self.nodes, first.argsort(axis=1)[:, :, None], axis=1)
        return row_keys(arms.reshape(len(arms), -1))

    def tokens(self) -> np.ndarray:
        """(P, 3 E + 3 + l + 1) rows, see the module."""
        count, edges = self.order.shape
        pairs = np.stack([self.nodes[:, :, :-1], self.nodes[:, :, 1:]], axis=-1).reshape(
            count, edges, 2
        )
        written = np.full((count, edges, 3), BAR, dtype=np.int32)
        written[:, :, :2] = np.take_along_axis(pairs, self.order[:, :, None], axis=1) + FIRST_NAME
        written[:, -1, 2] = SLASH
        path = self.nodes[np.arange(count), self.goal] + FIRST_NAME
        equals, end = (np.full((count, 1), token, dtype=np.int32) for token in (EQUALS, END))
        return np.concatenate(
            [written.reshape(count, -1), path[:, :1], path[:, -1:], equals, path, end], axis=1
        )


def draw_stars(
    config: PathStarConfig, count: int, rng: np.random.Generator, refused: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and keys of so many random problems, those whose key is among `refused` drawn again.

    Raises:
        NextLatError: hardly any graph is left that is not refused.
    """
    shape = (config.arms, config.length, config.names)
    stars = Stars.draw(*shape, count, rng)
    tokens, keys = stars.tokens(), stars.keys()
    for _ in range(ROUNDS):
        again = np.flatnonzero(np.isin(keys, keys[:0] if refused is None else refused))
        if len(again) == 0:
            return tokens, keys
        stars = Stars.draw(*shape, len(again), rng)
        tokens[again], keys[again] = stars.tokens(), stars.keys()
    raise NextLatError(
        f"nearly all graphs of {config.names} names are test graphs: set task.names higher or task.tests lower."
    )


class PathStar(Task):
    """See the module. Training and test graphs are a function of the configuration alone, the order
    of training of the seed."""

    name = "path-star"

    def __init__(self, config: PathStarConfig) -> None:
        d, length, nodes = config.arms, config.length, config.arms * (config.length - 1) + 1
        if d < 2 or length < 2 or config.graphs < 1 or config.tests < 2:
            raise NextLatError(
                "Path-Star needs arms >= 2, length >= 2, graphs >= 1 and tests >= 2."
            )
        if config.names < nodes:
            raise NextLatError(
                f"G({d}, {length}) has {nodes} nodes, but task.names is {config.names}: give at least {nodes}."
            )
        problems = math.perm(config.names, nodes) // math.factorial(
            d - 1
        )  # the arms without the goal have no order
        if problems < 2 * config.tests:
            raise NextLatError(
                f"there are only {problems} graphs G({d}, {length}) with goals: {config.tests} tests are too many."
            )
        self.config = config
        self.prompt_length = 3 * (nodes - 1) + 3
        self.max_length = self.prompt_length + length + 1
        self.tokenizer = symbol_tokenizer(SYMBOLS, config.names, spaces=r",\s")
        self.higher_is_better = {
            "exact_path_accuracy": True,
            f"exact_path_accuracy{SAMPLED}": True,
            **{f"accuracy_position_{i + 1}": True for i in range(length)},
        }
        self._tests, self._test_keys = draw_stars(config, config.tests, self._random(0))

    def _random(self, stream: int) -> np.random.Generator:
        return np.random.default_rng(
            (self.config.arms, self.config.length, self.config.names, stream)
        )

    @cached_property
    def _graphs(self) -> np.ndarray:
        """The training rows, made when training asks for them."""
        return draw_stars(
            self.config, self.config.graphs, self._random(1), refused=self._test_keys
        )[0]

    def train_dataset(self, seed: int) -> Dataset[dict[str, Tensor]]:
        return AnswerRows(self._graphs, self.prompt_length, seed)

    def eval_dataset(self) -> Dataset[dict[str, Tensor]]:
        return AnswerRows(self._tests[:LOSS_ROWS], self.prompt_length)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(self.config).encode())
        digest.update(self._tests.tobytes())
        return digest.hexdigest()[:16]

    def prompts(self, count: int) -> list[Tensor]:
        return list(torch.from_numpy(self._tests[:count, : self.prompt_length].astype(np.int64)))

    def metrics(self) -> Mapping[str, Metric]:
        return {
            "exact paths": lambda model: {"exact_path_accuracy": self.exact_paths(model)},
            "sampled paths": lambda model: {
                f"exact_path_accuracy{SAMPLED}": self.exact_paths(model, seed=0)
            },
            "accuracy by position": self.accuracy_by_position,
        }

    def exact_paths(self, model: "ObjectiveModel", seed: int | None = None) -> Score:
        """Share of test graphs whose whole path a model gives: greedily, or sampled at temperature
        1 (seed).

        What it says after the path is not asked.
        """
        prompts, length = self._tests[:, : self.prompt_length], self.config.length
        given = generate_answers(model, prompts, length, seed=seed)
        return mean_score((given == self._tests[:, self.prompt_length : -1]).all(axis=1))

    def accuracy_by_position(self, model: "ObjectiveModel") -> dict[str, Score | list[float]]:
        """Share of test graphs whose i-th node a model gives after the true ones before it; chance
        at place 2 is 1 / d."""
        given = forced_answers(model, self._tests[:, :-1], self.prompt_length)
        correct = given == self._tests[:, self.prompt_length : -1]
        found: dict[str, Score | list[float]] = {
            f"accuracy_position_{i + 1}": mean_score(correct[:, i])
            for i in range(self.config.length)
        }
        found["accuracy_by_position"] = correct.mean(axis=0).tolist()
        return found
