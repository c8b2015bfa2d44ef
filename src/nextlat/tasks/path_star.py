"""Path-Star: find the one arm of a star graph that ends at the goal (Bachmann & Nagarajan 2024;
arXiv 2511.05963).

G(d, l) is a centre with d disjoint arms of l nodes each, the centre counted. A row is

    a b | c d | ... / start goal = p_1 ... p_l end       written  a,b|c,d|.../start,goal=p_1,...,p_l

edges as (parent, child) in random order, then the path from the centre to the goal. E = d (l - 1)
edges give a prompt of 3 E + 3 tokens and an answer of l; with the end-of-sequence token, on which
there is a loss too, a row of G(5, 5) has 69. Node 2 of the path is the branch, the only hard one:
every other node follows from the one before it.

Shapes: P problems, d arms, l nodes of an arm, N names, E edges, K = E + 1 nodes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from nextlat.model import ObjectiveModel
from nextlat.results import Chart, Line, Mark, Measurement, Metric, Published, Saying, Solved
from nextlat.scores import mean_score
from nextlat.tasks.answers import (
    END,
    FIRST_SYMBOL,
    SAMPLED,
    forced_answers,
    generate_answers,
    symbol_tokenizer,
)
from nextlat.tasks.rows import Rows, redraw, row_keys
from nextlat.tasks.task import (
    NEXTLAT,
    Measure,
    RowCount,
    Task,
    TaskConfig,
    TestCount,
    check_size,
    world_fingerprint,
)

SYMBOLS = ("|", "/", "=")
BAR, SLASH, EQUALS = (FIRST_SYMBOL + i for i in range(3))
FIRST_NAME = FIRST_SYMBOL + len(SYMBOLS)
LOSS_ROWS = 2000  # test graphs of the evaluation loss, which is read one row at a time
BRANCH = 2  # the only node of a path that does not follow from the one before it
SOLVED = 0.99  # share of exact paths
OF_GUESSING = 0.1  # share of the loss of guessing

_declare = partial(Metric, source=f"Bachmann & Nagarajan 2024; {NEXTLAT}", items="graphs")
EXACT_PATHS = _declare(
    name="exact_path_accuracy",
    title="Exact paths",
    noun="share of exact paths",
    definition="Share of unseen graphs whose whole path from the centre to the goal the model "
    "gives greedily, node by node.",
    published="exact_path_accuracy",
)
SAMPLED_PATHS = _declare(
    name="exact_path_accuracy",
    title="Exact paths (sampled)",
    noun="share of exact paths when sampling",
    definition="The same with every node sampled at temperature 1.",
    parameters=SAMPLED,
)


def node_accuracy(node: int) -> Metric:
    """Accuracy at one node of the path, from 1, given the true ones before it."""
    branch = node == BRANCH
    hard = "; the only hard one, chance is one over the number of arms" if branch else ""
    return _declare(
        name="node_accuracy",
        title=f"Node {node} of the path{', the branch' if branch else ''}",
        noun=f"accuracy at {'the branch' if branch else f'node {node} of the path'}",
        definition=f"Share of unseen graphs for which the model predicts node {node} of the path, "
        f"given the true ones before it{hard}.",
        parameters={"node": node},
        headline=branch,  # the others are in the chart, and of no interest
    )


class PathStarConfig(TaskConfig):
    """Settings of the task (defaults: the paper's G(5, 5)).

    Attributes:
        arms: d.
        length: l, nodes of an arm, the centre counted.
        names: N, how many node names there are.
        graphs: training graphs, drawn once and for all.
        tests: test graphs, none of them a training graph.
    """

    arms: Annotated[int, Field(ge=2, le=1000)] = 5
    length: Annotated[int, Field(ge=2, le=1000)] = 5
    names: Annotated[int, Field(ge=1, le=100_000)] = 100
    graphs: RowCount = 200_000
    tests: TestCount = 20_000

    @property
    def nodes(self) -> int:
        """Of a graph."""
        return self.arms * (self.length - 1) + 1

    @model_validator(mode="after")
    def _fits(self) -> Self:
        star = f"G({self.arms}, {self.length})"
        if self.names < self.nodes:
            raise ValueError(
                f"{star} has {self.nodes} nodes, but task.names is {self.names}: give at least "
                f"{self.nodes}"
            )
        check_size(self.graphs + self.tests, 3 * self.nodes + self.length + 1)
        check_size(self.graphs + self.tests, self.names)
        # The arms without the goal have no order.
        problems = math.perm(self.names, self.nodes) // math.factorial(self.arms - 1)
        if problems < 2 * self.tests:
            raise ValueError(
                f"there are only {problems} graphs {star} with goals: {self.tests} tests are too "
                "many"
            )
        return self

    def build(self) -> "PathStar":
        return PathStar(self)


@dataclass(frozen=True, eq=False)
class Stars:
    """P graphs with a goal each.

    Attributes:
        nodes: (P, d, l) names; `nodes[:, :, 0]` is the centre.
        goal: (P,) the arm that ends at the goal.
        order: (P, E) which edge is written at each position; edge a (l - 1) + i is the i-th of arm
            a.
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
        every_name = np.tile(np.arange(names, dtype=np.int32), (count, 1))
        drawn = rng.permuted(every_name, axis=1)[:, : edges + 1]
        nodes = np.empty((count, arms, length), dtype=np.int32)
        nodes[:, :, 0] = drawn[:, :1]
        nodes[:, :, 1:] = drawn[:, 1:].reshape(count, arms, length - 1)
        order = rng.permuted(np.tile(np.arange(edges), (count, 1)), axis=1)
        return cls(nodes, rng.integers(arms, size=count), order)

    def keys(self) -> np.ndarray:
        """(P,) one value per problem, the same exactly for equal graphs with equal goals, in any
        order of writing."""
        # The goal's arm, then the others by their first node.
        first = self.nodes[:, :, 1].copy()
        np.put_along_axis(first, self.goal[:, None], -1, axis=1)
        arms = np.take_along_axis(self.nodes, first.argsort(axis=1)[:, :, None], axis=1)
        return row_keys(arms.reshape(len(arms), -1))

    def tokens(self) -> np.ndarray:
        """(P, 3 E + 3 + l + 1) rows, see the module."""
        count, edges = self.order.shape
        pairs = np.stack([self.nodes[:, :, :-1], self.nodes[:, :, 1:]], axis=-1)
        pairs = pairs.reshape(count, edges, 2)
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
    """Rows (P, T) and keys (P,) of random problems.

    Args:
        config: which graphs.
        count: P.
        rng: draws them.
        refused: keys of problems that are drawn again.

    Raises:
        NextLatError: hardly any graph is left that is not refused.
    """

    def draw(rows: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        stars = Stars.draw(config.arms, config.length, config.names, len(rows), rng)
        keys = stars.keys()
        good = ~np.isin(keys, keys[:0] if refused is None else refused)
        return [stars.tokens(), keys], good

    tokens, keys = redraw(
        count,
        draw,
        lambda _: (
            f"nearly all graphs of {config.names} names are test graphs: set task.names "
            "higher or task.tests lower."
        ),
    )
    return tokens, keys


class PathStar(Task):
    """See the module. Training and test graphs are a function of the settings alone, the order of
    training of the seed."""

    name = "path-star"
    title = "Path-Star"
    published = Published(
        setting="200,000 training graphs of 100 names, 12 layers of width 384, horizon of the arm "
        "length minus 2, five seeds",
        source=f"{NEXTLAT}v4",
        sayings=[
            Saying(methods=methods, text=text, of="exact_path_accuracy")
            for methods, text in (
                (("NextLat",), "near 100 % on G(2, 10), G(5, 5) and G(7, 7)"),
                (("BST",), "solves the first two and starts to fail on G(7, 7)"),
                (("GPT", "MTP", "JTP"), "failed"),
            )
        ],
    )

    def __init__(self, config: PathStarConfig) -> None:
        self.config = config
        self.prompt_length = 3 * config.nodes
        self.max_length = self.prompt_length + config.length + 1
        self.tokenizer = symbol_tokenizer(SYMBOLS, config.names, spaces=r",\s")
        # Runs fall into one of two basins, so that their mean says little. Guessing one of d arms
        # costs ln d nats at one of the l + 1 tokens of an answer (the path and the end), all others
        # being forced. A calibrated model below a tenth of that is right at the branch in about
        # 99 % of the graphs for two arms, in 97 % for five.
        self.solved = Solved(
            metric=EXACT_PATHS.key,
            at_least=SOLVED,
            loss_below=OF_GUESSING * math.log(config.arms) / (config.length + 1),
            definition=f"A seed solves it with at least {SOLVED:.0%} of the paths exact. The step "
            "is that of the first evaluation from which on the held-out loss stays below "
            f"{OF_GUESSING:.0%} of what guessing the branch costs.",
        )
        self._tests, self._test_keys = draw_stars(config, config.tests, self._random(0))

    def _random(self, stream: int) -> np.random.Generator:
        return np.random.default_rng(
            (self.config.arms, self.config.length, self.config.names, stream)
        )

    @cached_property
    def _graphs(self) -> np.ndarray:
        """The training rows, made when training asks for them."""
        config = self.config
        return draw_stars(config, config.graphs, self._random(1), refused=self._test_keys)[0]

    def train_dataset(self, seed: int) -> Rows:
        return Rows({"input_ids": self._graphs}, seed=seed, prompt_length=self.prompt_length)

    def eval_dataset(self) -> Rows:
        return Rows({"input_ids": self._tests[:LOSS_ROWS]}, prompt_length=self.prompt_length)

    def fingerprint(self) -> str:
        return world_fingerprint(self.config, self._tests)

    def prompts(self, count: int) -> list[Tensor]:
        return list(torch.from_numpy(self._tests[:count, : self.prompt_length].astype(np.int64)))

    @property
    def metrics(self) -> Sequence[Metric]:
        nodes = [node_accuracy(i + 1) for i in range(self.config.length)]
        return [EXACT_PATHS, SAMPLED_PATHS, *nodes]

    def measures(self) -> Mapping[str, Measure]:
        return {
            "exact paths": lambda model: [self.exact_paths(model)],
            "sampled paths": lambda model: [self.exact_paths(model, seed=0)],
            "accuracy by node": self.accuracy_by_node,
        }

    def exact_paths(self, model: ObjectiveModel, seed: int | None = None) -> Measurement:
        """Share of test graphs whose whole path a model gives: greedily, or sampled at temperature
        1 (seed). What it says after the path does not count."""
        prompts, length = self._tests[:, : self.prompt_length], self.config.length
        given = generate_answers(model, prompts, length, seed=seed)
        exact = (given == self._tests[:, self.prompt_length : -1]).all(axis=1)
        return Measurement(EXACT_PATHS if seed is None else SAMPLED_PATHS, mean_score(exact))

    def accuracy_by_node(self, model: ObjectiveModel) -> list[Measurement | Chart]:
        """Share of test graphs whose i-th node a model gives after the true ones before it; chance
        at the branch is 1 / d."""
        given = forced_answers(model, self._tests[:, :-1], self.prompt_length)
        correct = given == self._tests[:, self.prompt_length : -1]
        chance = Mark(text="chance", y=1 / self.config.arms, start=BRANCH - 0.25, end=BRANCH + 0.25)
        chart = Chart(
            name="accuracy",
            title=f"Accuracy by node of the path ({BRANCH}: the branch)",
            x="node of the path",
            lines=[Line(values=correct.mean(axis=0).tolist(), dots=True)],
            alt="Accuracy of {models} by node of the path.",
            caption="One line per seed; each node is predicted after the true ones before it.",
            marks=[chance],
        )
        nodes = [
            Measurement(node_accuracy(i + 1), mean_score(correct[:, i]))
            for i in range(self.config.length)
        ]
        return [*nodes, chart]
