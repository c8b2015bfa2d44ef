"""Comparisons: pairing, errors, verdicts, and everything that must not be compared."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fabricated_runs import ITEMS, write_run
from nextlat.errors import NextLatError
from nextlat.evaluation import HIGHER_IS_BETTER
from nextlat.report import claims, compare, read_runs
from nextlat.report.comparison import Difference, TaskComparison, verdict
from nextlat.report.glossary import describe, higher_is_better, order
from nextlat.report.published import PUBLISHED
from nextlat.tasks.countdown import CountdownConfig
from nextlat.tasks.hmm import HMM
from nextlat.tasks.path_star import PathStarConfig
from nextlat.tasks.streets.streets import Streets
from nextlat.tasks.text.text import Text
from nextlat.tasks.word_problem import WordProblemConfig

Items = dict[str, list[float] | np.ndarray]


def compared(
    folder: Path, ours: dict[int, Items], theirs: dict[int, Items], **options: object
) -> TaskComparison:
    """Runs of NextLat and of the baseline with these items, by seed."""
    paths = [write_run(folder / f"{name}-{seed}", name, seed, items=items, **options)  # type: ignore[arg-type]
             for name, runs in (("nextlat", ours), ("next-token", theirs)) for seed, items in runs.items()]  # fmt: skip
    [task] = compare(read_runs(paths)).tasks
    return task


def difference(task: TaskComparison, name: str, label: str = "NextLat d=2") -> Difference:
    return next(metric for metric in task.metrics if metric.name == name).differences[label]


def half(flips: int = 0) -> np.ndarray:
    """Half of the items succeed, and `flips` more."""
    return (np.arange(ITEMS) < ITEMS // 2 + flips).astype(float)


# ---- one seed ----


def test_items_are_paired(tmp_path: Path) -> None:
    task = compared(
        tmp_path, {0: {"valid_trajectories": half(8)}}, {0: {"valid_trajectories": half()}}
    )
    found = difference(task, "valid_trajectories")
    share = 8 / ITEMS
    assert found.value == pytest.approx(share)
    assert found.stderr == pytest.approx(math.sqrt(share * (1 - share) / (ITEMS - 1)))
    unpaired = math.sqrt(2 * 0.25 / ITEMS)
    assert found.verdict == "better"
    assert share < 2 * unpaired  # and would have been noise without pairing


@pytest.mark.parametrize(
    ("name", "flips", "expected"),
    [
        ("valid_trajectories", 8, "better"),
        ("valid_trajectories", 3, "within noise"),
        ("valid_trajectories", -8, "worse"),
        ("valid_trajectories", 0, "within noise"),
        ("next_token_loss", -8, "better"),
        ("effective_latent_rank", 8, "worse"),
        ("never_heard_of", 8, "no claim"),
    ],
)
def test_verdict_of_one_seed(tmp_path: Path, name: str, flips: int, expected: str) -> None:
    task = compared(tmp_path, {0: {name: half(flips)}}, {0: {name: half()}})
    assert difference(task, name).verdict == expected
    [claim] = claims(task)
    assert claim.verdict == expected
    assert claim.lead.startswith(("Higher", "Lower")) == (expected in ("better", "worse"))
    assert ("worse" in claim.lead) == (expected == "worse")


def test_a_number_without_items_proves_nothing_from_one_seed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", numbers={"decoding_speedup": 2.5})
    [task] = compare(read_runs([run])).tasks
    assert difference(task, "decoding_speedup").verdict == "no claim"
    assert "nothing is claimed" in claims(task)[0].text


def test_one_item_has_no_error(tmp_path: Path) -> None:
    task = compared(
        tmp_path, {0: {"valid_trajectories": [1.0]}}, {0: {"valid_trajectories": [0.0]}}
    )
    assert difference(task, "valid_trajectories").verdict == "no claim"


# ---- several seeds ----


def test_error_over_seeds_is_students_t(tmp_path: Path) -> None:
    flips = {0: 40, 1: 44, 2: 48}
    task = compared(
        tmp_path,
        {seed: {"detour_robustness": half(n)} for seed, n in flips.items()},
        {seed: {"detour_robustness": half()} for seed in flips},
    )
    found = difference(task, "detour_robustness")
    values = np.array(list(flips.values())) / ITEMS
    assert found.value == pytest.approx(values.mean())
    assert found.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(3))
    assert (
        found.verdict
        == ("better" if abs(stats.ttest_1samp(values, 0).pvalue) < 0.05 else "within noise")
        == "better"
    )
    assert all(seed.verdict == "better" for seed in found.seeds.values())
    assert "in each seed by itself" in claims(task)[0].text


@pytest.mark.parametrize(
    "flips", [(60, 10, 35), (20, 40)], ids=["seeds disagree", "two seeds say little"]
)
def test_seeds_that_vary_prove_nothing_though_each_is_clear(
    tmp_path: Path, flips: tuple[int, ...]
) -> None:
    task = compared(
        tmp_path,
        {seed: {"detour_robustness": half(n)} for seed, n in enumerate(flips)},
        {seed: {"detour_robustness": half()} for seed in range(len(flips))},
    )
    found = difference(task, "detour_robustness")
    assert all(seed.verdict == "better" for seed in found.seeds.values())
    assert found.verdict == "within noise"
    assert "in each seed here, but too unevenly" in claims(task)[0].lead


def test_seeds_that_agree_on_one_item_prove_nothing(tmp_path: Path) -> None:
    seeds = range(3)
    task = compared(
        tmp_path,
        {s: {"valid_trajectories": half(1)} for s in seeds},
        {s: {"valid_trajectories": half()} for s in seeds},
    )
    found = difference(task, "valid_trajectories")
    assert found.stderr == 0
    assert found.verdict == "within noise"


def test_seeds_are_paired_and_lonely_ones_left_out(tmp_path: Path) -> None:
    spread = {0: -60, 1: 0, 2: 60}
    ours = {seed: {"valid_trajectories": half(n + 10 + seed)} for seed, n in spread.items()}
    theirs = {seed: {"valid_trajectories": half(n)} for seed, n in spread.items()}
    task = compared(tmp_path, {**ours, 7: {"valid_trajectories": np.zeros(ITEMS)}}, theirs)
    found = difference(task, "valid_trajectories")
    assert list(found.seeds) == [0, 1, 2]
    assert found.value == pytest.approx(11 / ITEMS)
    assert found.verdict == "better"
    assert any("Seed 7" in caveat for caveat in task.caveats)


def test_decoding_is_compared_with_plain_decoding(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / f"n{seed}", seed=seed, numbers={"decoding_speedup": 1.5 + seed / 50})
        for seed in range(3)
    ]
    paths += [write_run(tmp_path / f"b{seed}", "next-token", seed, numbers={}) for seed in range(3)]
    [task] = compare(read_runs(paths)).tasks
    found = difference(task, "decoding_speedup")
    assert (found.theirs, found.verdict, found.against) == (
        1.0,
        "better",
        "plain KV-cached decoding",
    )


def test_changed_output_is_never_called_a_speedup(tmp_path: Path) -> None:
    runs = [
        write_run(
            tmp_path / str(seed),
            seed=seed,
            numbers={"decoding_speedup": 3.0 + seed},
            decoding={"identical": seed > 0},
        )
        for seed in range(3)
    ]
    [task] = compare(read_runs(runs)).tasks
    assert [claim.verdict for claim in claims(task)] == ["no claim"]


def test_dynamics_alone_is_compared_with_the_baselines_transformer(tmp_path: Path) -> None:
    ours: Items = {"transformer_accuracy_24": half(-20), "dynamics_accuracy_24": half(50)}
    task = compared(
        tmp_path, {0: ours}, {0: {"transformer_accuracy_24": half()}}, task="word-problem"
    )
    found = difference(task, "dynamics_accuracy_24")
    assert (found.value, found.verdict) == (pytest.approx(50 / ITEMS), "better")
    assert "transformer of next-token" in found.against
    assert difference(task, "transformer_accuracy_24").verdict == "worse"


finite = st.floats(-1e6, 1e6)
errors = st.lists(st.tuples(st.floats(0, 1e3), st.floats(1, 20)), min_size=1, max_size=3)


@settings(deadline=None)
@given(value=finite, tests=errors, higher=st.booleans())
def test_verdicts_mirror_and_never_claim_within_the_error(
    value: float, tests: list[tuple[float, float]], higher: bool
) -> None:
    mirrored = {"better": "worse", "worse": "better", "within noise": "within noise"}
    found = verdict(value, tests, higher)
    assert verdict(-value, tests, higher) == verdict(value, tests, not higher) == mirrored[found]
    assert (found == "within noise") == (
        value == 0 or any(abs(value) <= error * factor for error, factor in tests)
    )
    assert verdict(value, [*tests, (None, 2.0)], higher) == "no claim"


# ---- which runs are one model, and which must not be compared ----


def test_models_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    items = {"valid_trajectories": half()}
    paths = [write_run(tmp_path / "b", "next-token", items=items, changes={"run.log_every": 99})]
    for value in (0.1, 1.0):
        paths.append(
            write_run(
                tmp_path / str(value), items=items, changes={"objectives.nextlat.lambda_kl": value}
            )
        )
    paths.append(
        write_run(
            tmp_path / "d8",
            items=items,
            horizon=8,
            changes={"objectives.nextlat.horizon": 8, "steps": 999},
        )
    )
    [task] = compare(read_runs([*paths, paths[0]])).tasks
    assert list(task.models) == [
        "next-token",
        "NextLat d=2, lambda_kl=0.1",
        "NextLat d=2, lambda_kl=1.0",
        "NextLat d=8",
    ]
    assert task.caveats == [
        "Not trained alike: steps is 999 for NextLat d=8 and 400 for next-token."
    ]


def test_comparison_without_a_baseline_claims_nothing(tmp_path: Path) -> None:
    [task] = compare(
        read_runs([write_run(tmp_path / "run", items={"valid_trajectories": half()})])
    ).tasks
    assert task.baseline is None
    assert claims(task) == []
    assert "nothing is compared" in task.caveats[0]


def _edit(name: str, change: Callable[[dict], None]) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        content = json.loads((run / name).read_text())
        change(content[0] if isinstance(content, list) else content)
        (run / name).write_text(json.dumps(content))

    return edit


def _truncate(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:-20]) and None


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "run.json").unlink(), "is not a run directory"),
        (_edit("run.json", lambda record: record.update(status="running")), "is not finished"),
        (lambda run: (run / "results.json").unlink(), "run 'nextlat evaluate"),
        (_truncate("results.json"), "corrupt"),
        (_truncate("scores.safetensors"), "corrupt"),
        (lambda run: (run / "results.json").write_text("[]"), "corrupt"),
        (_edit("results.json", lambda entry: entry.pop("metrics")), "corrupt"),
        (
            _edit("results.json", lambda entry: entry["metrics"].update(valid_trajectories=None)),
            "corrupt",
        ),
        (lambda run: (run / "map.json").write_text("[1, 2"), "corrupt"),
        (lambda run: (run / "beliefs.json").write_text("[1, 2"), "beliefs.json"),
        (
            lambda run: (run / "beliefs.json").write_text(
                '{"true": [[1, 0, 0]], "decoded": [[1, 0, 0]]}'
            ),
            "beliefs.json: KeyError",
        ),
        (
            lambda run: (run / "beliefs.json").write_text(
                '{"true": [[1, 0, 0]], "decoded": [[1, 0]], "r2": 1}'
            ),
            "beliefs.json: true",
        ),
        (
            lambda run: (run / "beliefs.json").write_text(
                '{"true": [[1]], "decoded": [[NaN]], "r2": 1}'
            ),
            "beliefs.json: true",
        ),
        (
            _edit("results.json", lambda entry: entry["metrics"].update(valid_trajectories=0.1)),
            "do not belong together",
        ),
        (_edit("results.json", lambda entry: entry.update(seed=5)), "of another run"),
        (
            _edit("run.json", lambda record: record["task"].update(fingerprint="fedcba")),
            "different worlds",
        ),
        (
            _edit("run.json", lambda record: record["recipe"]["task"].update(tests=7)),
            "measured differently (task.tests)",
        ),
    ],
)
def test_faulty_runs_are_refused_in_one_sentence(
    tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    good = write_run(tmp_path / "good", "next-token", items={"valid_trajectories": half()})
    faulty = write_run(tmp_path / "faulty", items={"valid_trajectories": half()})
    damage(faulty)
    with pytest.raises(NextLatError) as error:
        read_runs([good, faulty])
    assert words in str(error.value)
    assert str(faulty) in str(error.value)
    assert "\n" not in str(error.value)


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    items = {"valid_trajectories": half()}
    base = write_run(tmp_path / "base", "next-token", items=items)
    with pytest.raises(NextLatError, match="one recipe and seed"):
        compare(read_runs([base, write_run(tmp_path / "twin", "next-token", items=items)]))
    with pytest.raises(NextLatError, match="differ in steps"):
        compare(
            read_runs(
                [
                    base,
                    write_run(
                        tmp_path / "longer", "next-token", items=items, changes={"steps": 999}
                    ),
                ]
            )
        )
    with pytest.raises(NextLatError, match="different items"):
        compare(
            read_runs(
                [base, write_run(tmp_path / "fewer", items={"valid_trajectories": half()[:-1]})]
            )
        )
    with pytest.raises(NextLatError, match="no runs"):
        read_runs([])


def test_comparison_is_json_without_nan(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / name, name, items={"valid_trajectories": [0.5]})
        for name in ("nextlat", "next-token")
    ]
    content = json.loads(json.dumps(compare(read_runs(paths)).to_dict(), allow_nan=False))
    assert (
        content["tasks"][0]["metrics"][0]["differences"]["NextLat d=2"]["seeds"]["0"]["stderr"]
        is None
    )


# ---- the glossary ----


def test_every_metric_is_explained_with_the_direction_its_task_gives() -> None:
    words = WordProblemConfig(group="Z3", length=4, sequences=50, tests=5).build().higher_is_better
    path = PathStarConfig(arms=2, length=4, names=10, graphs=10, tests=5).build().higher_is_better
    equations = (
        CountdownConfig(numbers=3, max_number=9, min_target=1, max_target=20, tests=4)
        .build()
        .higher_is_better
    )
    of_classes = {**Streets.higher_is_better, **Text.higher_is_better, **HMM.higher_is_better}
    directions = {
        **HIGHER_IS_BETTER,
        **of_classes,
        **words,
        **path,
        **equations,
        "entropy_floor": None,
    }
    for name, direction in directions.items():
        assert higher_is_better(name) == direction
        assert describe(name).definition, name
        assert describe(name).source, name
    assert {name for row in PUBLISHED["streets"].rows.values() for name in row} <= set(
        Streets.higher_is_better
    )
    for published in PUBLISHED.values():
        assert published.rows or published.sayings
        assert all(describe(name).definition for row in published.rows.values() for name in row)


def test_metrics_by_place_are_told_apart_and_ordered() -> None:
    names = [
        "accuracy_position_10",
        "true_equation_2_held_out",
        "true_equation_2_seen",
        "true_equation_1_held_out",
        "solved_seen",
    ]
    assert sorted(names[1:], key=order) == [names[4], names[3], names[2], names[1]]
    assert (
        sorted(["accuracy_position_10", "accuracy_position_9"], key=order)[0]
        == "accuracy_position_9"
    )
    assert [describe(f"accuracy_position_{place}").headline for place in (1, 2, 3)] == [
        False,
        True,
        False,
    ]
    titles = {describe(name).title for name in names}
    assert len(titles) == len(names)
