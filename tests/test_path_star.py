"""Path-Star: graphs by their rule, rows read back by a slow parser, splits, generation over a
cache, oracles and cheats."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import by_key, tiny_lm
from nextlat.errors import NextLatError
from nextlat.model import attach
from nextlat.tasks import rows
from nextlat.tasks.answers import END, forced_answers, generate_answers
from nextlat.tasks.path_star import (
    EXACT_PATHS,
    FIRST_NAME,
    PathStar,
    PathStarConfig,
    Stars,
    draw_stars,
    node_accuracy,
)
from nextlat.training.recipe import load_recipe

SMALL = PathStarConfig(arms=3, length=4, names=15, graphs=300, tests=200)


@pytest.fixture(scope="module")
def task() -> PathStar:
    return SMALL.build()


def read(task: PathStar, row: list[int]) -> tuple[list[tuple[int, int]], int, int, list[int]]:
    """Edges, start, goal and path of a row, from its text."""
    text = task.tokenizer.decode(row)
    graph, question = text.split(" / ")
    ends, answer = question.split(" = ")
    edges = [tuple(map(int, edge.split())) for edge in graph.split(" | ")]
    start, goal = map(int, ends.split())
    *path, end = answer.split()
    assert end == "end"
    return edges, start, goal, list(map(int, path))


def solve(edges: list[tuple[int, int]], goal: int) -> list[int]:
    """The path to the goal, backwards from it."""
    parent, path = {child: parent for parent, child in edges}, [goal]
    while path[0] in parent:
        path.insert(0, parent[path[0]])
    return path


# ---- graphs and rows ----


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        PathStarConfig(graphs=50, tests=50),
        PathStarConfig(arms=2, length=10, graphs=50, tests=50),
    ],
)
def test_rows_are_star_graphs_with_the_path_to_their_goal(config: PathStarConfig) -> None:
    task, d, length = config.build(), config.arms, config.length
    for row in [*task._graphs[:50], *task._tests[:50]]:
        edges, start, goal, path = read(task, row)
        assert len(edges) == d * (length - 1) and len({child for _, child in edges}) == len(edges)
        degree = Counter(parent for parent, _ in edges)
        assert degree[start] == d and all(n == 1 for node, n in degree.items() if node != start)
        leaves = {child for _, child in edges} - set(degree)
        assert len(leaves) == d and all(len(solve(edges, leaf)) == length for leaf in leaves)
        assert goal in leaves and path == solve(edges, goal) and path[0] == start
        assert max(max(edge) for edge in edges) < config.names


def test_the_papers_row_has_69_tokens_the_last_of_which_is_the_end() -> None:
    task = PathStarConfig(graphs=2, tests=2).build()
    item = task.train_dataset(0)[0]
    assert (
        len(item["input_ids"]) == 69 == task.max_length and task.prompt_length == 63 == 3 * 20 + 3
    )
    assert item["input_ids"][-1] == END and (item["input_ids"] == END).sum() == 1
    assert item["labels"].tolist() == [-100] * 63 + item["input_ids"][63:].tolist()
    assert len(task.tokenizer) == 3 + 3 + 100


def test_commas_are_no_tokens() -> None:
    task = SMALL.build()
    ids = task.tokenizer("3,14|14,9/3,9=3,14,9end")["input_ids"]
    assert task.tokenizer.convert_ids_to_tokens(ids) == [
        "3",
        "14",
        "|",
        "14",
        "9",
        "/",
        "3",
        "9",
        "=",
        "3",
        "14",
        "9",
        "end",
    ]


def test_names_order_and_goal_are_uniform() -> None:
    stars = Stars.draw(2, 3, 6, 24_000, np.random.default_rng(0))
    assert all(
        (np.sort(row)[1:] != np.sort(row)[:-1]).all()
        for row in stars.nodes[:, :, 1:].reshape(24_000, -1)[:200]
    )
    for values, size in ((stars.goal, 2), (stars.nodes[:, 0, 0], 6), (stars.nodes[:, 1, 2], 6)):
        assert np.abs(np.bincount(values, minlength=size) - 24_000 / size).max() < 5 * np.sqrt(
            24_000 / size
        )
    orders = Counter(map(tuple, stars.order.tolist()))
    assert len(orders) == 24 and max(abs(n - 1000) for n in orders.values()) < 5 * np.sqrt(1000)
    centre_and_child = Counter(
        zip(stars.nodes[:, 0, 0].tolist(), stars.nodes[:, 0, 1].tolist(), strict=True)
    )
    assert len(centre_and_child) == 30 and max(
        abs(n - 800) for n in centre_and_child.values()
    ) < 5 * np.sqrt(800)
    goal_place = (stars.order == (stars.goal * 2 + 1)[:, None]).argmax(
        axis=1
    )  # where the goal's edge is written
    assert np.abs(np.bincount(goal_place) - 6000).max() < 5 * np.sqrt(6000)


# ---- splits ----


def content(task: PathStar, row: list[int]) -> tuple[frozenset[tuple[int, int]], int]:
    edges, _, goal, _ = read(task, row)
    return frozenset(edges), goal


def test_splits_are_disjoint_whatever_order_graphs_are_written_in() -> None:
    config = PathStarConfig(arms=2, length=3, names=6, graphs=600, tests=100)  # 720 problems in all
    task = config.build()
    tests = {content(task, row) for row in task._tests}
    assert tests.isdisjoint(content(task, row) for row in task._graphs)
    unfiltered = draw_stars(config, config.graphs, task._random(1))[0]
    assert not tests.isdisjoint(
        content(task, row) for row in unfiltered
    )  # so that it is no accident


def test_keys_are_equal_exactly_for_equal_problems() -> None:
    task = PathStarConfig(arms=3, length=2, names=4, graphs=2, tests=2).build()  # 12 problems
    stars = Stars.draw(3, 2, 4, 300, np.random.default_rng(0))
    keys, contents = stars.keys().tolist(), [content(task, row) for row in stars.tokens()]
    assert len(set(keys)) == len(set(contents)) == len(set(zip(keys, contents, strict=True))) == 12


def test_training_is_a_finite_set_reshuffled_by_seed(task: PathStar) -> None:
    one, two, other = task.train_dataset(1), task.train_dataset(1), task.train_dataset(2)
    epoch = SMALL.graphs
    assert torch.equal(one[2 * epoch + 7]["input_ids"], two[2 * epoch + 7]["input_ids"])
    assert torch.equal(one[3]["input_ids"], two[3]["input_ids"])  # back in the first epoch
    everything = sorted(map(tuple, task._graphs.tolist()))
    for data, start in ((one, 0), (one, epoch), (other, 0)):
        assert (
            sorted(tuple(data[start + i]["input_ids"].tolist()) for i in range(epoch)) == everything
        )
    assert any(not torch.equal(one[i]["input_ids"], other[i]["input_ids"]) for i in range(5))
    assert any(not torch.equal(one[i]["input_ids"], one[epoch + i]["input_ids"]) for i in range(5))
    assert [len(task.eval_dataset()), len(task.prompts(7)), len(task.prompts(7)[0])] == [
        SMALL.tests,
        7,
        30,
    ]


def test_the_world_is_a_function_of_the_configuration_alone(task: PathStar) -> None:
    again = SMALL.build()
    assert again.fingerprint() == task.fingerprint()
    assert (again._graphs == task._graphs).all()
    assert (
        PathStarConfig(**{**vars(SMALL), "names": 16}).build().fingerprint() != task.fingerprint()
    )


# ---- answers ----


def test_generation_over_a_cache_equals_reading_everything_again() -> None:
    model = attach(tiny_lm("llama", vocab_size=21))
    prompts = np.random.default_rng(0).integers(3, 21, size=(7, 6))
    given = generate_answers(model, prompts, 4, batch_size=3)
    ids = torch.from_numpy(prompts)
    for _ in range(4):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert given.tolist() == ids[:, 6:].tolist()
    assert forced_answers(model, ids.numpy(), 6, batch_size=2).tolist() == given.tolist()
    other = ids.clone()
    other[:, 6] = 5  # after another first token the rest is predicted from that
    expected = model(other[:, :-1]).logits[:, 5:].argmax(-1)
    assert forced_answers(model, other.numpy(), 6).tolist() == expected.tolist()


def test_sampled_answers_follow_the_models_distribution_and_no_batch() -> None:
    model = attach(tiny_lm("llama", vocab_size=7))
    prompts = np.tile([[3, 4, 5]], (6000, 1))
    drawn = generate_answers(model, prompts, 2, seed=1, batch_size=1000)
    assert (drawn[:50] == generate_answers(model, prompts, 2, seed=1, batch_size=999)[:50]).all()
    assert (drawn != generate_answers(model, prompts, 2, seed=2)).any()
    with torch.no_grad():
        first = model(torch.tensor([[3, 4, 5]])).logits[0, -1].softmax(-1)
        pairs = torch.tensor([[3, 4, 5, a] for a in range(7)])
        joint = first[:, None] * model(pairs).logits[:, -1].softmax(-1)
    counts = np.bincount(drawn[:, 0] * 7 + drawn[:, 1], minlength=49)
    expected = 6000 * joint.flatten().double().numpy()
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected) + 1).all()


class Solver:
    """Reads the graph and says the next node of the path. `guesses`: at the branch it takes the arm
    with the lowest first node.

    Its state is the token that follows, its cache all tokens so far; it is as sure as one can be,
    or (`sure` below 1) says that node with that probability only and `end` otherwise.
    """

    def __init__(self, task: PathStar, guesses: bool = False, sure: float = 1.0) -> None:
        self.task, self.guesses, self.sure, self.device = task, guesses, sure, torch.device("cpu")
        self.backbone = SimpleNamespace(step=self.step)

    def step(self, input_ids: torch.Tensor, past: Any = None) -> tuple[torch.Tensor, Any]:
        past = input_ids if past is None else torch.cat([past, input_ids], dim=1)
        reach = range(past.shape[1] - input_ids.shape[1], past.shape[1])
        return torch.tensor(
            [[[self.following(row[: i + 1])] for i in reach] for row in past.tolist()]
        ), past

    def following(self, row: list[int]) -> int:
        n = self.task.prompt_length
        if len(row) < n or len(row) >= n + self.task.config.length:
            return END
        edges, start, goal, _ = read(self.task, [*row[:n], END])
        said = [token - FIRST_NAME for token in row[n:]]
        if not said:
            return start + FIRST_NAME
        children = sorted(child for parent, child in edges if parent == said[-1])
        right = next(
            (child for child in children if child in solve(edges, goal)),
            children[0] if children else start,
        )
        return (children[0] if self.guesses and len(said) == 1 else right) + FIRST_NAME

    def next_token_logits(self, h: torch.Tensor) -> torch.Tensor:
        p = self.sure * torch.nn.functional.one_hot(h[..., 0], len(self.task.tokenizer)).float()
        p[..., END] += 1 - self.sure
        return p.log()


def test_an_oracle_scores_one_and_a_guesser_loses_at_the_branch_alone(task: PathStar) -> None:
    perfect = [found for measure in task.measures().values() for found in measure(Solver(task))]
    assert [score.value for score in by_key(perfect).values()] == [1] * len(task.metrics)
    guesser = Solver(task, guesses=True)
    *measured, chart = task.accuracy_by_node(guesser)
    nodes = [by_key(measured)[node_accuracy(i).key] for i in (1, 2, 3, 4)]
    branch = nodes[1]
    assert branch.value == pytest.approx(1 / 3, abs=5 * branch.stderr)
    assert branch.per_item.shape == (SMALL.tests,)
    assert [score.value for score in nodes] == [1, branch.value, 1, 1] == chart.lines[0].values
    exact = task.exact_paths(guesser).score
    assert (exact.per_item == branch.per_item).all()  # a wrong arm cannot be left again


def test_sampled_accuracy_is_the_probability_of_the_path(task: PathStar) -> None:
    score = task.exact_paths(Solver(task, sure=0.8), seed=0).score
    assert score.value == pytest.approx(0.8**4, abs=5 * score.stderr)
    assert task.exact_paths(Solver(task, sure=0.8)).score.value == 1


def test_a_seed_that_guesses_the_branch_has_not_solved_it(task: PathStar) -> None:
    """The loss of guessing, by the definition of the cross-entropy, is ten times the limit."""
    guessing = np.log(SMALL.arms) / (SMALL.length + 1)
    assert task.solved is not None and task.solved.metric == EXACT_PATHS.key
    assert task.solved.loss_below == pytest.approx(guessing / 10)


# ---- settings and training ----


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"names": 20}, "21 nodes"),
        ({"arms": 1}, "'arms' = 1 .* 2"),
        ({"length": 1}, "'length' = 1 .* 2"),
        ({"tests": 1}, "'tests' = 1 .* 2"),
        ({"arms": 2, "length": 2, "names": 3, "tests": 4}, "only 6 graphs"),
    ],
)
def test_bad_settings_are_one_sentence(settings: dict[str, int], word: str) -> None:
    with pytest.raises(NextLatError, match=word):
        PathStarConfig(**settings).build()


def test_a_world_of_test_graphs_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "ROUNDS", 20)
    config = PathStarConfig(arms=2, length=2, names=3, graphs=10, tests=3)
    everything = Stars.draw(2, 2, 3, 200, np.random.default_rng(0)).keys()
    with pytest.raises(NextLatError, match=r"task\.names"):
        draw_stars(config, 10, np.random.default_rng(0), refused=everything)


def test_the_papers_recipe() -> None:
    recipe = load_recipe("path-star")
    backbone, objective, optimizer = recipe.backbone, recipe.objective_config, recipe.optimizer
    assert (recipe.steps, recipe.batch_size, backbone.layers, backbone.heads, backbone.width) == (
        20_000,
        512,
        12,
        6,
        384,
    )
    assert (
        objective.horizon,
        objective.lambda_next_h,
        objective.lambda_kl,
        objective.hidden_size,
    ) == (3, 1, 1, 384)
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.gradient_clip) == (
        5e-4,
        0.1,
        100,
    )
    assert recipe.task == PathStarConfig() and objective.horizon == recipe.task.length - 2
