"""The word problem: groups, products, splits, and a perfect tracker that must score 1."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import by_key
from nextlat.errors import NextLatError
from nextlat.tasks.dynamics_alone import Driver
from nextlat.tasks.word_problem import (
    BEGIN,
    END,
    FIRST_ELEMENT,
    WordProblem,
    WordProblemConfig,
    accuracy,
    group,
)
from nextlat.training.recipe import load_recipe
from nextlat.training.train import build_model

SMALL = WordProblemConfig(group="S3", length=4, sequences=500, tests=60)


@pytest.mark.parametrize(
    ("name", "order"), [("Z5", 5), ("S3", 6), ("A4", 12), ("A5", 60), ("S5", 120)]
)
def test_tables_are_groups_of_the_right_order(name: str, order: int) -> None:
    table = group(name).table
    assert table.shape == (order, order) and len(set(group(name).names)) == order
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(order, size=(3, 500))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()  # associative
    identity = next(e for e in range(order) if (table[e] == np.arange(order)).all())
    assert (table == identity).sum(axis=1).tolist() == [1] * order  # every element has one inverse
    commutes = (table == table.T).all()
    assert commutes == name.startswith("Z")


@settings(max_examples=20, deadline=None)
@given(word=st.lists(st.integers(0, 5), min_size=4, max_size=4))
def test_labels_are_running_products_with_the_accumulator_on_the_left(word: list[int]) -> None:
    task = WordProblem(SMALL)
    permutations = [tuple(map(int, name)) for name in task.group.names]
    accumulator, expected = (0, 1, 2), []
    for x in word:
        accumulator = tuple(accumulator[i] for i in permutations[x])
        expected.append(permutations.index(accumulator) + FIRST_ELEMENT)
    rows = task.rows(np.array([word]))
    assert rows["input_ids"][0].tolist() == [BEGIN, *(x + FIRST_ELEMENT for x in word), END]
    assert rows["labels"][0].tolist() == [
        -100,
        -100,
        *expected,
    ]  # the label of a_t is what its state is to predict


def test_sequences_are_distinct_and_the_splits_disjoint() -> None:
    for config in (
        SMALL,
        WordProblemConfig(group="Z3", length=3, sequences=1000),
        WordProblemConfig(length=12, sequences=3000),
    ):
        task = WordProblem(config)
        both = np.concatenate([task._train, task._held_out])
        assert (
            len(np.unique(both, axis=0))
            == len(both)
            == min(config.sequences, len(task.group.names) ** config.length)
        )
        assert len(task._held_out) == round(0.2 * len(both))


def test_training_rows_are_a_function_of_seed_and_index() -> None:
    task = WordProblem(SMALL)
    one, two, other = task.train_dataset(1), task.train_dataset(1), task.train_dataset(2)
    epoch = len(task._train)
    assert torch.equal(one[epoch + 7]["input_ids"], two[epoch + 7]["input_ids"])
    assert torch.equal(one[3]["input_ids"], two[3]["input_ids"])  # back in the first epoch
    seen = {tuple(one[i]["input_ids"].tolist()) for i in range(epoch)}
    assert len(seen) == epoch  # an epoch holds every sequence once
    assert any(not torch.equal(one[i]["input_ids"], other[i]["input_ids"]) for i in range(5))
    assert any(
        not torch.equal(one[i]["input_ids"], one[i + epoch]["input_ids"]) for i in range(5)
    )  # and is reshuffled


class Tracker:
    """A perfect model: its state is the accumulator. `forgets_after` breaks its transformer,
    `slips` its dynamics."""

    training = False

    def __init__(self, task: WordProblem, forgets_after: int = 10**6, slips: bool = False) -> None:
        self.task, self.forgets_after, self.slips = task, forgets_after, slips
        self.device = torch.device("cpu")
        self.backbone = SimpleNamespace(step=self.step)
        self.objective = SimpleNamespace(max_draft_length=None, draft=self.draft)

    def step(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, None]:
        words = input_ids[:, 1:].numpy() - FIRST_ELEMENT
        products = self.task.products(words)
        products[:, self.forgets_after :] = (products[:, self.forgets_after :] + 1) % len(
            self.task.group.names
        )
        identity = np.full((len(words), 1), self.task.group.names.index("012"))
        return torch.from_numpy(np.concatenate([identity, products], axis=1))[
            ..., None
        ].float(), None

    def next_token_logits(self, h: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(
            h[..., 0].long() + FIRST_ELEMENT, len(self.task.tokenizer)
        ).float()

    def draft(self, state: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        table = torch.from_numpy(self.task.group.table)
        state = table[state[..., 0].long(), token - FIRST_ELEMENT + 0]
        if self.slips:
            state = torch.zeros_like(state)
        return state[..., None].float(), self.next_token_logits(state[..., None].float())


def test_a_perfect_tracker_scores_one_and_broken_ones_lose_where_they_are_broken() -> None:
    task = WordProblem(SMALL)
    perfect = Tracker(task)
    lengths = (4, 8, 12)

    def keys(predictor: Driver) -> list[str]:
        return [accuracy(predictor, n).key for n in lengths]

    found = by_key(task.accuracies(perfect))
    assert [found[key].value for key in keys("transformer") + keys("dynamics")] == [1] * 6
    *forgetful, chart = task.accuracies(Tracker(task, forgets_after=5))
    assert [by_key(forgetful)[key].value for key in keys("transformer")] == [1, 0, 0]
    assert chart.lines[0].values == [1] * 5 + [0] * 7
    slipping = by_key(task.accuracies(Tracker(task, slips=True)))
    assert slipping[keys("transformer")[-1]].value == 1
    assert slipping[keys("dynamics")[-1]].value == pytest.approx(1 / 6, abs=0.15)


@pytest.mark.parametrize("name", ["Z1", "S9", "A2", "Q8", "z5", "S3x"])
def test_an_unknown_group_is_named(name: str) -> None:
    with pytest.raises(NextLatError, match=name):
        group(name)


def test_bad_sizes_are_one_sentence() -> None:
    with pytest.raises(NextLatError, match="length"):
        WordProblemConfig(length=0).build()


def test_the_papers_recipe() -> None:
    """Hyperparameters of arXiv 2511.05963, and the dynamics model of 2.62 M parameters that it
    counts."""
    recipe = load_recipe("a5")
    backbone, objective, optimizer = recipe.backbone, recipe.objective_config, recipe.optimizer
    assert (recipe.steps, recipe.batch_size, backbone.layers, backbone.heads, backbone.width) == (
        400_000,
        1024,
        2,
        8,
        512,
    )
    assert (objective.horizon, objective.lambda_next_h, objective.lambda_kl) == (1, 1, 0)
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.gradient_clip) == (
        1e-4,
        0.01,
        1,
    )
    assert (recipe.task.group, recipe.task.length, recipe.task.sequences) == ("A5", 12, 1_000_000)
    model = build_model(recipe, WordProblem(recipe.task.model_copy(update={"sequences": 1000})))
    assert round(sum(p.numel() for p in model.objective.parameters()) / 1e6, 2) == 2.62
