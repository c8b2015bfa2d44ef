"""Hidden Markov models: beliefs against enumeration, samples against exact probabilities, metrics
on models made by hand."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import by_key, tiny_lm
from nextlat.errors import NextLatError
from nextlat.model import attach
from nextlat.objectives import NextLatConfig
from nextlat.results import Chart, Measurement
from nextlat.tasks import rows
from nextlat.tasks.dynamics_alone import DYNAMICS
from nextlat.tasks.hmm import (
    BEGIN,
    BELIEF_R2,
    ENTROPY_FLOOR,
    FIRST_SYMBOL,
    HMM,
    NEXT_TOKEN_KL,
    ROWS_PER_CHUNK,
    TRANSITION_ERROR,
    HMMConfig,
    next_token_kl,
)
from nextlat.tasks.hmm_process import HiddenMarkov
from nextlat.tasks.task import held_out_cross_entropy

SMALL = HMMConfig(length=12, tests=60)
ODD = HiddenMarkov.of(
    [[0.7, 0.3, 0.0], [0.1, 0.2, 0.7], [0.5, 0.25, 0.25]], [[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]]
)


@pytest.fixture(scope="module")
def task() -> HMM:
    return SMALL.build()


def joint(process: HiddenMarkov, symbols: tuple[int, ...], states: tuple[int, ...]) -> float:
    """P(symbols, states), states one longer than symbols: the definition of the process."""
    p = process.stationary[states[0]]
    for before, state, symbol in zip(states, states[1:], symbols, strict=False):
        p *= process.transition[before, state] * process.emission[state, symbol]
    return float(p)


# ---- the process ----


@pytest.mark.parametrize(
    "process", [ODD, HiddenMarkov.mess3(0.85, 0.05), HiddenMarkov.random(3, 2, 0.5, 1)]
)
def test_beliefs_are_posteriors_by_enumeration(process: HiddenMarkov) -> None:
    symbols = process.sample(8, 4, np.random.default_rng(0))
    beliefs = process.beliefs(symbols)
    following = process.next_symbol(beliefs)
    for row, x in enumerate(map(tuple, symbols.tolist())):
        for t in range(5):
            paths = itertools.product(range(3), repeat=t + 1)
            posterior = np.zeros(3)
            for path in paths:
                posterior[path[-1]] += joint(process, x[:t], path)
            evidence = posterior.sum()
            np.testing.assert_allclose(beliefs[row, t], posterior / evidence, atol=1e-12)
            longer = [
                sum(
                    joint(process, (*x[:t], s), path)
                    for path in itertools.product(range(3), repeat=t + 2)
                )
                for s in range(following.shape[2])
            ]
            np.testing.assert_allclose(following[row, t], np.array(longer) / evidence, atol=1e-12)


def test_samples_follow_the_exact_probabilities() -> None:
    count = 40_000
    drawn = ODD.sample(count, 3, np.random.default_rng(0))
    for x in itertools.product(range(2), repeat=3):
        p = sum(joint(ODD, x, path) for path in itertools.product(range(3), repeat=4))
        assert abs((drawn == x).all(axis=1).sum() - count * p) < 5 * np.sqrt(count * p)


def test_mess3_is_the_published_process() -> None:
    """Matrices P(symbol, next state | state) for alpha = 0.85, x = 0.05, as printed in arXiv
    2405.15943."""
    process = HiddenMarkov.mess3(0.85, 0.05)
    labelled = process.transition[:, :, None] * process.emission
    expected = [[0.765, 0.00375, 0.00375], [0.0425, 0.0675, 0.00375], [0.0425, 0.00375, 0.0675]]
    np.testing.assert_allclose(labelled[:, :, 0], expected, atol=1e-12)
    np.testing.assert_allclose(process.stationary, np.full(3, 1 / 3), atol=1e-12)


def test_the_stationary_distribution_stays() -> None:
    for process in (
        ODD,
        HiddenMarkov.random(5, 3, 0.3, 2),
        HiddenMarkov.of([[0, 1], [1, 0]], [[1, 0], [0, 1]]),
    ):
        np.testing.assert_allclose(
            process.stationary @ process.transition, process.stationary, atol=1e-12
        )


def test_random_processes_follow_their_seed() -> None:
    one, two, other = (HiddenMarkov.random(4, 3, 0.5, seed) for seed in (0, 0, 1))
    assert (one.transition == two.transition).all() and (one.emission == two.emission).all()
    assert one.emission.shape == (4, 3) and not np.allclose(one.transition, other.transition)


# ---- rows and splits ----


def test_rows_begin_with_begin_and_depend_on_seed_and_index(task: HMM) -> None:
    one, two, other = task.train_dataset(1), task.train_dataset(1), task.train_dataset(2)
    far = 5 * ROWS_PER_CHUNK + 3
    assert torch.equal(one[far]["input_ids"], two[far]["input_ids"])
    for chunk in range(6):
        one[chunk * ROWS_PER_CHUNK]
    assert (
        torch.equal(one[0]["input_ids"], two[0]["input_ids"])
        and len(one._chunks) == rows.CACHED_CHUNKS
    )
    assert not torch.equal(one[0]["input_ids"], other[0]["input_ids"])
    assert not torch.equal(one[0]["input_ids"], one[ROWS_PER_CHUNK]["input_ids"])
    item = one[7]
    assert item["input_ids"][0] == BEGIN and len(item["input_ids"]) == 13 == task.max_length
    assert (
        torch.equal(item["input_ids"][1:], item["labels"][1:])
        and item["input_ids"][1:].min() >= FIRST_SYMBOL
    )
    item["input_ids"].zero_()
    assert one[7]["input_ids"][0] == BEGIN  # a caller's writing changes nothing
    assert [len(p) for p in task.prompts(3)] == [7, 7, 7]
    assert torch.equal(task.prompts(3)[2], task.eval_dataset()[2]["input_ids"][:7])
    assert task.tokenizer.decode(task.prompts(1)[0]).startswith("begin ")


def test_held_out_sequences_never_occur_in_training() -> None:
    task = HMMConfig(length=6, tests=40).build()  # 729 sequences
    held_out = {tuple(row) for row in task.rows(task._held_out).tolist()}
    data = task.train_dataset(0)
    assert held_out.isdisjoint(tuple(data[i]["input_ids"].tolist()) for i in range(1500))
    unfiltered = task.rows(task.process.sample(1500, 6, np.random.default_rng(0)))
    assert not held_out.isdisjoint(map(tuple, unfiltered.tolist()))  # so that it is no accident


def test_a_world_held_out_whole_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "ROUNDS", 20)
    with pytest.raises(NextLatError, match=r"task\.length"):
        HMMConfig(length=2, tests=2000).build().train_dataset(0)


# ---- metrics ----


class Filter:
    """A model whose state is an affine map of the belief after the prefix, and which predicts from
    it; all by exact filtering."""

    training = False

    def __init__(
        self, task: HMM, noise: float = 0.0, slips: float = 0.0, forgets: bool = False
    ) -> None:
        self.task, self.noise, self.forgets, self.device = task, noise, forgets, torch.device("cpu")
        size = len(task.process.transition)
        self.mix = np.random.default_rng(3).normal(
            size=(size, size + 120)
        )  # wide enough for a probe to fit noise
        self.backbone = SimpleNamespace(step=self.step, embed=lambda ids: ids[..., None].float())
        self.slips = slips
        self.objective = SimpleNamespace(
            dynamics=self.dynamics, draft=self.draft, max_draft_length=None
        )

    def step(self, input_ids: torch.Tensor, past: Any = None) -> tuple[torch.Tensor, None]:
        beliefs = self.task.process.beliefs(input_ids[:, 1:].numpy() - FIRST_SYMBOL)
        h = (beliefs - self.task.process.stationary) @ self.mix  # only an affine map leads back
        noise = np.random.default_rng(4).normal(size=h.shape) * self.noise
        return torch.from_numpy(np.full_like(h, 1.0) * noise + h * (not self.forgets)).float(), None

    def beliefs(self, h: torch.Tensor) -> np.ndarray:
        return h.double().numpy() @ np.linalg.pinv(self.mix) + self.task.process.stationary

    def next_token_logits(self, h: torch.Tensor) -> torch.Tensor:
        p = self.task.process.next_symbol(self.beliefs(h)).clip(min=1e-9)
        logits = torch.full((*h.shape[:-1], len(self.task.tokenizer)), -1e9, dtype=torch.float64)
        logits[..., FIRST_SYMBOL:] = torch.from_numpy(np.log(p))
        return logits

    def draft(self, h: torch.Tensor, token: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.dynamics(h, token[:, None].float())
        return h, self.next_token_logits(h)

    def dynamics(self, h: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        process, symbol = self.task.process, e[..., 0].long().numpy() - FIRST_SYMBOL
        joint = (
            self.beliefs(h) @ process.transition * np.moveaxis(process.emission[:, symbol], 0, -1)
        )
        exact = (joint / joint.sum(-1, keepdims=True) - process.stationary) @ self.mix
        return torch.from_numpy((1 - self.slips) * exact + self.slips * h.double().numpy()).float()


@pytest.fixture(scope="module")
def rrxor() -> HMM:
    return HMMConfig(process="rrxor", length=8, tests=60, multiples=(1, 3)).build()


def test_every_third_symbol_of_rrxor_is_the_xor_of_the_two_before(rrxor: HMM) -> None:
    for symbols in rrxor._held_out:
        holds = [symbols[i] ^ symbols[i + 1] == symbols[i + 2] for i in range(len(symbols) - 2)]
        assert any(all(holds[phase::3]) for phase in range(3))
    assert np.unique(rrxor._held_out, axis=0).shape[0] > 30
    np.testing.assert_allclose(rrxor.process.stationary, [1 / 6] * 4 + [1 / 12] * 4)
    # Once the phase is known a third of the symbols is determined, and the others are coins.
    p = rrxor.process.next_symbol(rrxor.process.beliefs(rrxor._symbols(3)))[:, 20:]
    assert ((p.max(-1) > 0.999).mean(), (abs(p.max(-1) - 0.5) < 1e-3).mean()) == pytest.approx(
        (1 / 3, 2 / 3), abs=0.03
    )


def test_the_filter_is_measured_inside_and_beyond_the_training_length(rrxor: HMM) -> None:
    """A filter that forgets a quarter of every move is wrong at once, and the transformer not."""
    assert rrxor.max_length == 25
    found = rrxor.distributions(Filter(rrxor, slips=0.25))
    [chart] = [one for one in found if isinstance(one, Chart)]
    assert [len(line.values) for line in chart.lines] == [24, 24]
    values = {m.metric.key: m.score.value for m in found if isinstance(m, Measurement)}
    exact, slow = (next_token_kl(who, 24).key for who in ("transformer", "dynamics"))
    assert values[exact] < 1e-4 < 0.05 < values[slow]
    # Over the last eight positions of the 24.
    line = chart.lines[1]
    assert values[slow] == pytest.approx(np.mean(line.values[16:]))
    assert line.values[0] == pytest.approx(0, abs=1e-6)  # the transformer's own first state


def test_an_exact_filter_has_the_belief_the_distribution_and_the_dynamics(task: HMM) -> None:
    measured = [found for measure in task.measures().values() for found in measure(Filter(task))]
    charts = [found for found in measured if isinstance(found, Chart)]
    measured = [found for found in measured if isinstance(found, Measurement)]
    assert {m.metric.key for m in measured} == {metric.key for metric in task.metrics}
    assert [line.series for line in charts[0].lines] == ["transformer", DYNAMICS]
    found = by_key(measured)
    for metric in task.metrics:
        if metric.name == NEXT_TOKEN_KL.name:
            assert found[metric.key].value == pytest.approx(0, abs=1e-5)
    assert found[BELIEF_R2.key].value == pytest.approx(1, abs=1e-6)
    assert found[NEXT_TOKEN_KL.key].value == pytest.approx(0, abs=1e-6)
    assert found[TRANSITION_ERROR.key].value == pytest.approx(0, abs=1e-4)
    assert found[NEXT_TOKEN_KL.key].per_item.shape == (60,)
    assert found[BELIEF_R2.key].per_item.shape == (30,)


def test_what_is_broken_shows_where_it_is_broken(task: HMM) -> None:
    assert task.belief_probe(Filter(task, forgets=True, noise=1.0))[0].value < 0.05
    some = task.belief_probe(Filter(task, noise=4.0))[0].value
    assert 0.2 < some < 0.98
    # A dynamics model that goes only three quarters of the way misses a quarter of every move.
    [slow] = task.transition_consistency(Filter(task, slips=0.25))
    assert slow.score.value == pytest.approx(0.25, abs=1e-4)
    assert task.transition_consistency(SimpleNamespace(objective=SimpleNamespace())) == []


def measurements(task: HMM, model: Any) -> list[Measurement]:
    return [found for found in task.distributions(model) if isinstance(found, Measurement)]


def test_the_kl_of_a_uniform_model_is_the_missing_entropy(task: HMM) -> None:
    model = Filter(task)
    model.next_token_logits = lambda h: torch.zeros(
        *h.shape[:-1], len(task.tokenizer)
    )  # six tokens, three of them symbols
    found = by_key(measurements(task, model))
    missing = np.log(6) - found[ENTROPY_FLOOR.key].value
    assert found[NEXT_TOKEN_KL.key].value == pytest.approx(missing)


def test_the_entropy_floor_is_what_an_exact_model_pays(task: HMM) -> None:
    """On average over sequences: -log p of the true tokens under the exact distribution."""
    task = HMMConfig(length=12, tests=4000).build()
    p = task.process.next_symbol(task.process.beliefs(task._held_out)[:, :-1])
    paid = -np.log(np.take_along_axis(p, task._held_out[:, :, None], axis=2))[..., 0].mean(axis=1)
    floor = by_key(measurements(task, Filter(task)))[ENTROPY_FLOOR.key].value
    assert paid.mean() == pytest.approx(floor, abs=5 * paid.std() / np.sqrt(4000))


def test_beliefs_are_written_for_the_picture(task: HMM) -> None:
    [(picture, record)] = task.artifacts(Filter(task))
    assert (picture.kind, picture.file) == ("simplex", "beliefs.json")
    assert len(record["true"]) == len(record["decoded"]) == len(record["symbol"]) == 30 * 12
    np.testing.assert_allclose(record["true"], record["decoded"], atol=2e-5)
    np.testing.assert_allclose(np.sum(record["true"], axis=1), 1, atol=2e-5)
    assert np.array(record["true"]).argmax(1).tolist() != [0] * 360
    # The symbol is the one read last: the belief of Mess3 leans to it more often than not.
    assert (np.array(record["true"]).argmax(axis=1) == record["symbol"]).mean() > 0.7
    more = HMMConfig(length=30, tests=200).build()
    [(_, record)] = more.artifacts(Filter(more))
    assert len(record["true"]) == 2000


# ---- settings and training ----


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (
            {
                "process": "given",
                "transition": ((0.5, 0.4), (0.5, 0.5)),
                "emission": ((1, 0), (0, 1)),
            },
            "row 1 of the transition",
        ),
        (
            {
                "process": "given",
                "transition": ((0.5, 0.5), (0.5, 0.5)),
                "emission": ((1, 0), (-0.5, 1.5)),
            },
            "row 2 of the emission",
        ),
        (
            {"process": "given", "transition": ((0.5, 0.5), (1.0,)), "emission": ((1, 0), (0, 1))},
            "rows of one length",
        ),
        (
            {"process": "given", "transition": ((1.0,),), "emission": ((1, 0), (0, 1))},
            "must be 2 x 2",
        ),
        (
            {"process": "given", "transition": ((1, 0), (0, 1)), "emission": ((1, 0), (0, 1))},
            "never meet",
        ),
        (
            {
                "process": "given",
                "transition": ((0.5, 0.5), (0.5, 0.5)),
                "emission": ((0.5, 0.5), (0.5, 0.5)),
            },
            "tell nothing",
        ),
        ({"process": "given"}, "needs both"),
        ({"transition": ((1.0,),)}, "has its own matrices"),
        ({"process": "given", "transition": ((1.0,),)}, "needs both"),
        ({"x": 0.0}, "'x' = 0.0 .* greater than 0"),
        ({"x": 0.1, "process": "random"}, 'task.x has no meaning with task.process = "random"'),
        ({"process": "random", "states": 1}, "'states' = 1 .* 2"),
        ({"process": "random", "process_seed": -1}, "'process_seed' = -1 .* 0"),
        ({"length": 1}, "'length' = 1 .* 2"),
    ],
)
def test_bad_settings_are_one_sentence(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(NextLatError, match=word):
        HMMConfig(**settings).build()


def test_worlds_have_fingerprints() -> None:
    configs = [
        SMALL,
        HMMConfig(length=12, tests=60, x=0.1),
        HMMConfig(process="random", length=12, tests=60),
    ]
    assert len({config.build().fingerprint() for config in configs}) == 3
    assert SMALL.build().fingerprint() == HMMConfig(length=12, tests=60).build().fingerprint()


def test_the_cross_entropy_is_the_floor_and_what_the_model_adds_to_it() -> None:
    task = HMMConfig(length=12, tests=2000).build()
    model = attach(tiny_lm("llama", vocab_size=len(task.tokenizer)), NextLatConfig(horizon=1))
    found = by_key(measurements(task, model))
    paid, floor = (
        held_out_cross_entropy(model, task.eval_dataset(), batch_size=100),
        found[ENTROPY_FLOOR.key],
    )
    expected = found[NEXT_TOKEN_KL.key].value + floor.value
    assert paid.value == pytest.approx(expected, abs=5 * paid.stderr)
    assert found[NEXT_TOKEN_KL.key].value > 0.05  # else the comparison says little
