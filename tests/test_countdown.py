"""Countdown: the search against a recursive one, the scorer against answers right and wrong in
every way, metrics on oracles."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import by_key
from nextlat.errors import NextLatError
from nextlat.tasks import rows as row_tools
from nextlat.tasks.answers import END
from nextlat.tasks.countdown import (
    COMMA,
    SPLITS,
    ZERO,
    Countdown,
    CountdownConfig,
    Split,
    rows,
    solved,
    true_equation,
    verdict,
)
from nextlat.tasks.countdown_problems import (
    OPERATIONS,
    Problems,
    Verdict,
    draw_problems,
    equations,
    first_solutions,
)
from nextlat.tasks.task import PAD
from nextlat.training.recipe import load_recipe

SMALL = CountdownConfig(
    numbers=3,
    max_number=15,
    min_target=10,
    max_target=39,
    max_value=300,
    pause=2,
    problems=400,
    tests=40,
)


@pytest.fixture(scope="module")
def task() -> Countdown:
    return SMALL.build()


@pytest.fixture(scope="module")
def paper() -> Countdown:
    """The tokens of the paper's problems, with few of them."""
    return CountdownConfig(problems=50, tests=50).build()


def depth_first(numbers: list[int], target: int) -> list[tuple[int, str, int, int]] | None:
    """The rule of the stored solution, word for word."""
    if len(numbers) == 1:
        return [] if numbers[0] == target else None
    for i, j in itertools.combinations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        large, small = max(a, b), min(a, b)
        rest = [x for k, x in enumerate(numbers) if k not in (i, j)]
        options = [(a, "+", b, a + b), (a, "*", b, a * b), (large, "-", small, large - small)]
        if small != 0 and large % small == 0:
            options.append((large, "/", small, large // small))
        for option in options:
            found = depth_first([*rest, option[3]], target)
            if found is not None:
                return [option, *found]
    return None


def in_words(found: np.ndarray) -> list[tuple[int, str, int, int]]:
    return [(a, OPERATIONS[operation], b, result) for a, operation, b, result in found.tolist()]


# ---- the search ----


@pytest.mark.parametrize(
    ("n", "largest", "targets", "count"),
    [
        (2, 30, (1, 60), 300),
        (3, 20, (1, 60), 300),
        (4, 99, (10, 100), 300),
        (4, 6, (1, 40), 150),
        (4, 300, (1, 300), 200),
    ],
)
def test_the_search_finds_what_recursion_finds_first(
    n: int, largest: int, targets: tuple[int, int], count: int
) -> None:
    rng = np.random.default_rng(10 * n + largest)
    numbers, target = (
        rng.integers(1, largest + 1, size=(count, n)),
        rng.integers(targets[0], targets[1] + 1, size=count),
    )
    paths = first_solutions(numbers, target)
    written = equations(numbers, paths.clip(min=0))
    expected = [depth_first(numbers[i].tolist(), int(target[i])) for i in range(count)]
    assert [path < 0 for path in paths] == [solution is None for solution in expected]
    for i, solution in enumerate(expected):
        if solution is not None:
            assert in_words(written[i]) == solution, numbers[i]
    assert sum(solution is not None for solution in expected) > 0


def test_five_numbers_are_searched_in_the_same_order() -> None:
    numbers = np.array([[3, 50, 7, 9, 2], [1, 1, 1, 1, 1], [100, 99, 98, 97, 3], [1, 1, 1, 1, 90]])
    targets = np.array([77, 5, 100, 9999])
    paths = first_solutions(numbers, targets)
    for i in range(3):
        assert in_words(equations(numbers[i : i + 1], paths[i : i + 1])[0]) == depth_first(
            numbers[i].tolist(), int(targets[i])
        )
    assert paths[3] == -1


def test_the_published_example() -> None:
    numbers, target = np.array([[14, 83, 88, 91]]), np.array([23])
    written = in_words(equations(numbers, first_solutions(numbers, target))[0])
    assert written == [(83, "-", 14, 69), (91, "-", 88, 3), (69, "/", 3, 23)]


def test_a_division_by_zero_is_no_solution() -> None:
    """5 - 5 = 0 may be an intermediate result, but 0 / 0 and 7 / 0 reach nothing."""
    assert (
        first_solutions(np.array([[5, 5, 7]]), np.array([1]))[0]
        == -1
        == first_solutions(np.array([[5, 5, 6, 6]]), np.array([40]))[0]
    )
    assert depth_first([5, 5, 7], 1) is None and depth_first([5, 5, 6, 6], 40) is None


# ---- drawing ----


def test_drawn_problems_follow_the_rule_of_rejection() -> None:
    """Targets uniform whatever they are worth, numbers uniform among those that solve them:
    compared with counting them all."""
    targets, largest = np.array([2, 7, 12]), 6
    drawn = draw_problems(
        targets, 6000, np.random.default_rng(0), numbers=3, max_number=largest, max_value=1000
    )
    for target in targets:
        solvable = [
            x
            for x in itertools.product(range(1, largest + 1), repeat=3)
            if depth_first(list(x), target)
        ]
        mine = drawn.numbers[drawn.targets == target]
        assert abs(len(mine) - 2000) < 5 * np.sqrt(2000 * 2 / 3)
        counts = {x: 0 for x in solvable}
        for x in map(tuple, mine.tolist()):
            counts[x] += 1  # fails for one that cannot be solved
        expected = len(mine) / len(solvable)
        chi2 = sum((c - expected) ** 2 / expected for c in counts.values())
        assert abs(chi2 - len(solvable)) < 6 * np.sqrt(2 * len(solvable))


def test_no_stored_solution_exceeds_the_largest_token() -> None:
    arguments = {"numbers": 4, "max_number": 30, "max_value": 100}
    drawn = draw_problems(np.arange(10, 40), 400, np.random.default_rng(1), **arguments)
    assert drawn.equations[:, :, [0, 2, 3]].max() <= 100
    free = draw_problems(
        np.arange(10, 40), 400, np.random.default_rng(1), **{**arguments, "max_value": 10**6}
    )
    assert free.equations.max() > 100
    for numbers, target, written in zip(
        drawn.numbers[:50], drawn.targets, drawn.equations, strict=False
    ):
        assert in_words(written) == depth_first(numbers.tolist(), int(target))


def test_targets_out_of_reach_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_tools, "ROUNDS", 20)
    with pytest.raises(NextLatError, match="target 98"):
        draw_problems(
            np.array([98]), 3, np.random.default_rng(0), numbers=2, max_number=5, max_value=1000
        )


# ---- splits and rows ----


def test_splits_are_disjoint_by_content(task: Countdown) -> None:
    held_out, seen = (set(task.targets[split].tolist()) for split in ("held-out", "seen"))
    assert (
        len(held_out) == 3 and held_out.isdisjoint(seen) and held_out | seen == set(range(10, 40))
    )

    def content(problems: Problems) -> set[tuple[int, ...]]:
        return {
            (*sorted(n), t)
            for n, t in zip(problems.numbers.tolist(), problems.targets.tolist(), strict=True)
        }

    training, tests = task._problems, task._tests
    assert set(training.targets.tolist()) <= seen
    assert (
        set(tests["seen"].targets.tolist()) <= seen
        and set(tests["held-out"].targets.tolist()) <= held_out
    )
    assert content(training).isdisjoint(content(tests["seen"]))
    unfiltered = content(task._draw("seen", SMALL.problems, 3))
    assert not unfiltered.isdisjoint(content(tests["seen"]))  # so that it is no accident


def test_the_papers_targets_and_tokens(paper: Countdown) -> None:
    assert [len(paper.targets[split]) for split in SPLITS] == [82, 9]
    assert len(paper.tokenizer) == 3 + 7 + 10_001
    row = "14,83,88,91,23 |||||||| 83-14=69, 91-88=3, 69/3=23 end"
    ids = paper.tokenizer(row)["input_ids"]
    assert len(ids) == 35 == paper.max_length and paper.prompt_length == 17
    problem = Problems(
        np.array([[14, 83, 88, 91]]),
        np.array([23]),
        np.array([[[83, 2, 14, 69], [91, 2, 88, 3], [69, 3, 3, 23]]]),
    )
    assert rows(problem, pause=8).tolist() == [ids]
    assert paper.text(np.array(ids)) == row.replace(" ", "")


def test_rows_are_labelled_on_the_answer_alone_and_reshuffled_by_seed(task: Countdown) -> None:
    one, two, other = task.train_dataset(1), task.train_dataset(1), task.train_dataset(2)
    epoch = SMALL.problems
    assert torch.equal(one[epoch + 5]["input_ids"], two[epoch + 5]["input_ids"])
    assert torch.equal(one[3]["input_ids"], two[3]["input_ids"])  # back in the first epoch
    everything = sorted(tuple(row) for row in rows(task._problems, 2).tolist())
    for data, start in ((one, 0), (one, epoch), (other, 0)):
        assert (
            sorted(tuple(data[start + i]["input_ids"].tolist()) for i in range(epoch)) == everything
        )
    assert any(not torch.equal(one[i]["input_ids"], other[i]["input_ids"]) for i in range(5))
    item = one[0]
    assert (
        item["labels"].tolist() == [-100] * 9 + item["input_ids"][9:].tolist()
    )  # 3 numbers, target, 3 commas, 2 pauses
    assert item["input_ids"][-1] == END and len(item["input_ids"]) == task.max_length
    assert len(task.eval_dataset()) == SMALL.tests


def test_problems_depend_on_the_configuration_alone(task: Countdown) -> None:
    assert (
        SMALL.build().fingerprint()
        == task.fingerprint()
        != CountdownConfig(**{**vars(SMALL), "max_number": 16}).build().fingerprint()
    )
    assert torch.equal(
        SMALL.build().train_dataset(0)[7]["input_ids"], task.train_dataset(0)[7]["input_ids"]
    )


# ---- the scorer ----


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("83-14=69,91-88=3,69/3=23 end", Verdict.SOLVED),  # the stored one
        ("91-88=3,83-14=69,69/3=23 end", Verdict.SOLVED),  # in another order
        ("83-14=69,91-88=3,69/3=23 end 5 end", Verdict.SOLVED),  # nothing after the end counts
        ("83-14=69,91-88=3,69/3=23", Verdict.NO_END),
        ("83-14=69,91-88=3,69/3= end", Verdict.MALFORMED),
        ("83-14=69,91-88=3,69/3=23, end", Verdict.MALFORMED),  # a comma too many
        ("83-14=69,91-88=3|69/3=23 end", Verdict.MALFORMED),
        ("83-14-69,91-88=3,69/3=23 end", Verdict.MALFORMED),
        ("83=14-69,91-88=3,69/3=23 end", Verdict.MALFORMED),
        ("end", Verdict.WRONG_COUNT),
        ("91-88=3,83-14=69 end", Verdict.WRONG_COUNT),
        ("83-14=69,91-88=3,69/3=23,23+0=23 end", Verdict.WRONG_COUNT),
        ("83-14=69,91-88=3,69/69=1 end", Verdict.UNAVAILABLE),  # an intermediate result twice
        ("83-14=69,91-83=8,69-8=61 end", Verdict.UNAVAILABLE),  # a number twice
        ("83-14=69,91-87=4,69-4=65 end", Verdict.UNAVAILABLE),  # a number that was never there
        ("83-14=69,91-88=3,91-88=3 end", Verdict.UNAVAILABLE),
        ("14-83=69,91-88=3,69/3=23 end", Verdict.NEGATIVE),
        ("83-14=69,91/88=1,69/1=69 end", Verdict.INEXACT),
        ("83-14=68,91-88=3,68-3=65 end", Verdict.FALSE),
        ("83+14=97,91-88=3,97*3=300 end", Verdict.FALSE),
        ("83-14=69,91-88=3,69-3=66 end", Verdict.TARGET_MISSED),
    ],
)  # fmt: skip
def test_every_answer_comes_to_one_verdict(
    paper: Countdown, answer: str, expected: Verdict
) -> None:
    ids = paper.tokenizer(answer)["input_ids"]
    assert 1 not in ids  # nothing unknown
    assert verdict([14, 83, 88, 91], 23, ids) is expected


def test_zero_differences_count_and_divisions_by_zero_do_not(paper: Countdown) -> None:
    def judged(numbers: list[int], target: int, text: str) -> Verdict:
        return verdict(numbers, target, paper.tokenizer(text)["input_ids"])

    assert judged([7, 7, 12], 12, "7-7=0,12+0=12 end") is Verdict.SOLVED
    assert judged([7, 7, 12], 12, "7-7=0,12/0=12 end") is Verdict.INEXACT
    assert judged([7, 7, 12], 12, "7+7=14,12-12=0 end") is Verdict.UNAVAILABLE


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 49), st.integers(0, 17), st.integers(0, 40), st.booleans())
def test_no_single_wrong_token_is_accepted_unless_it_is_right(
    paper: Countdown, i: int, place: int, token: int, near: bool
) -> None:
    """Whatever replaces a token of a stored solution: SOLVED only if the text is a derivation by an
    evaluation of its own."""
    tests = paper._tests["seen"]
    answer = rows(Problems(tests.numbers[[i]], tests.targets[[i]], tests.equations[[i]]), 8)[
        0, 17:
    ].tolist()
    answer[place] = int(np.clip(answer[place] + token - 20, 0, ZERO + 10_000)) if near else token
    judged = verdict(tests.numbers[i].tolist(), int(tests.targets[i]), answer)
    assert (judged is Verdict.SOLVED) == _derives(
        tests.numbers[i].tolist(), int(tests.targets[i]), paper, answer
    )


def _derives(numbers: list[int], target: int, paper: Countdown, answer: list[int]) -> bool:
    """Through Python's own arithmetic on the text."""
    text, _, _ = paper.text(np.array(answer)).partition("end")
    pool, lines = sorted(numbers), text.split(",")
    if END not in answer or PAD in answer or len(lines) != 3:
        return False
    value = None
    for line in lines:
        left, equals, result = line.partition("=")
        operation = next((o for o in OPERATIONS if o in left), None)
        if not equals or operation is None or not result.isdigit():
            return False
        a, _, b = left.partition(operation)
        if not (a.isdigit() and b.isdigit()) or eval(
            left if int(b) or operation != "/" else "-1"
        ) != int(result):
            return False
        for x in (a, b):
            if int(x) not in pool:
                return False
            pool.remove(int(x))
        value = int(result)
        pool.append(value)
    return value == target


# ---- metrics ----


class Scribe:
    """A model that knows the answer to every test prompt by heart: `answers` maps prompts to what
    it says; `sure` are the logits."""

    def __init__(
        self, task: Countdown, answers: dict[tuple[int, ...], list[int]], sure: float = 1.0
    ) -> None:
        self.task, self.answers, self.sure, self.device = task, answers, sure, torch.device("cpu")
        self.backbone = SimpleNamespace(step=self.step)

    def step(
        self, input_ids: torch.Tensor, past: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The "state" is the next token, the "cache" all tokens so far."""
        past = input_ids if past is None else torch.cat([past, input_ids], dim=1)
        n = self.task.prompt_length
        following = [self.answers[tuple(row[:n])][len(row) - n] for row in past.tolist()]
        return torch.tensor(following)[:, None, None].expand(-1, input_ids.shape[1], 1), past

    def next_token_logits(self, h: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(h[..., 0], len(self.task.tokenizer)).float() * self.sure


def by_heart(task: Countdown, split: Split) -> dict[tuple[int, ...], list[int]]:
    lines = rows(task._tests[split], task.config.pause).tolist()
    return {tuple(row[: task.prompt_length]): row[task.prompt_length :] for row in lines}


def test_an_oracle_solves_everything_and_a_scribe_with_slips_loses_what_it_slips_on(
    task: Countdown,
) -> None:
    answers = {split: by_heart(task, split) for split in SPLITS}
    known = answers["seen"] | answers["held-out"]
    *measured, chart = task.greedy_answers(Scribe(task, known))
    found = by_key(measured)
    assert found.keys() == {m.key for m in task.metrics if "sampled" not in m.parameters}
    assert all(score.value == 1 for score in found.values())
    assert [line.values for line in chart.lines] == [[1, 1], [1, 1]]
    for split in SPLITS:
        assert found[solved(split).key].per_item.shape == (SMALL.tests,)
    sure, unsure = (task.sampled_answers(Scribe(task, known, sure=x)) for x in (100.0, 1.0))
    assert [m.metric for m in sure] == [solved(split, sampled=True) for split in SPLITS]
    assert [m.score.value for m in sure] == [1, 1]
    assert all(m.score.value < 0.1 for m in unsure)  # any token is about as likely here
    slips = {prompt: list(answer) for prompt, answer in answers["seen"].items()}
    prompts = [tuple(row) for row in task._prompts("seen").tolist()]
    slips[prompts[0]][4] += 1  # the first result
    slips[prompts[1]][-2] += 1  # the last result
    slips[prompts[2]][5] = END  # stops after one equation, then tells on
    # A test may have been drawn twice.
    wrong = [sum(prompt == prompts[i] for prompt in prompts) for i in range(3)]
    *measured, chart = task.greedy_answers(Scribe(task, slips | answers["held-out"]))
    found = by_key(measured)
    shares = [1 - wrong[0] / SMALL.tests, 1 - (wrong[1] + wrong[2]) / SMALL.tests]
    assert found[solved("seen").key].value == pytest.approx(1 - sum(wrong) / SMALL.tests)
    assert [found[true_equation(i, "seen").key].value for i in (1, 2)] == pytest.approx(shares)
    assert chart.lines[0].values == pytest.approx(shares) and chart.lines[1].values == [1, 1]
    assert found[solved("held-out").key].value == 1
    [(_, record)] = task.artifacts(Scribe(task, slips | answers["held-out"]))
    counts = record["seen"]["counts"]
    assert (counts["false equation"], counts["wrong number of equations"]) == (
        wrong[0] + wrong[1],
        wrong[2],
    )
    assert counts["solved"] == SMALL.tests - sum(wrong) and sum(counts.values()) == SMALL.tests
    assert record["held-out"]["counts"]["solved"] == SMALL.tests
    assert record["seen"]["examples"]["wrong number of equations"][0].endswith("end")
    assert len(record["seen"]["examples"]["solved"]) == 3


def test_a_comma_for_every_token_is_malformed(task: Countdown) -> None:
    dull = dict.fromkeys(by_heart(task, "seen"), [COMMA] * (task.answer_length - 1) + [END])
    [(_, record)] = task.artifacts(Scribe(task, dull | by_heart(task, "held-out")))
    assert record["seen"]["counts"]["malformed"] == SMALL.tests


# ---- settings and training ----


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"numbers": 1}, "'numbers' = 1 .* 2"),
        ({"numbers": 6}, "'numbers' = 6 .* 5"),
        ({"max_target": 18}, "ten targets"),
        ({"min_target": 0}, "'min_target' = 0 .* 1"),
        ({"max_value": 50}, "max_value at least as large"),
        ({"tests": 1}, "'tests' = 1 .* 2"),
    ],
)
def test_bad_settings_are_one_sentence(settings: dict[str, int], word: str) -> None:
    with pytest.raises(NextLatError, match=word):
        CountdownConfig(**settings).build()


def test_the_papers_recipe() -> None:
    recipe = load_recipe("countdown")
    backbone, objective, optimizer = recipe.backbone, recipe.objective_config, recipe.optimizer
    assert (recipe.steps, recipe.batch_size, backbone.layers, backbone.heads, backbone.width) == (
        100_000,
        1024,
        12,
        12,
        768,
    )
    assert (
        objective.lambda_next_h,
        objective.lambda_kl,
        objective.hidden_size,
        objective.num_layers,
    ) == (2, 1, 768, 3)
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.gradient_clip) == (
        3e-4,
        0.1,
        1,
    )
    assert recipe.task == CountdownConfig()
