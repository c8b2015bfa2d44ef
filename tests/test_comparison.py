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

from fabricated_runs import ITEMS, METRICS, TITLES, accuracy, write_run
from nextlat.errors import NextLatError
from nextlat.report import claims, compare, read_runs
from nextlat.report.comparison import Difference, TaskComparison, verdict
from nextlat.report.document import headline
from nextlat.report.output import content
from nextlat.results import Metric

SPEED = METRICS["decoding_speedup"]
Items = dict[str, list[float] | np.ndarray]


def compared(
    folder: Path, ours: dict[int, Items], theirs: dict[int, Items], **options: object
) -> TaskComparison:
    """Runs of NextLat and of the baseline with these items, by seed."""
    paths = [
        write_run(folder / f"{name}-{seed}", name, seed, items=items, **options)
        for name, runs in (("nextlat", ours), ("next-token", theirs))
        for seed, items in runs.items()
    ]
    [task] = compare(read_runs(paths))
    return task


def difference(task: TaskComparison, name: str, label: str = "NextLat d=2") -> Difference:
    return next(one for one in task.metrics if one.metric.key == name).differences[label]


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
        ("neither_is_better", 8, "no claim"),
    ],
)
def test_verdict_of_one_seed(tmp_path: Path, name: str, flips: int, expected: str) -> None:
    neither = Metric(name="neither_is_better", title="Neither", higher_is_better=None)
    task = compared(tmp_path, {0: {name: half(flips)}}, {0: {name: half()}}, declared=[neither])
    assert difference(task, name).verdict == expected
    [claim] = claims(task)
    assert claim.verdict == expected
    assert claim.lead.startswith(("Higher", "Lower")) == (expected in ("better", "worse"))
    assert ("worse" in claim.lead) == (expected == "worse")


def test_a_number_without_items_proves_nothing_from_one_seed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", numbers={"decoding_speedup": 2.5})
    [task] = compare(read_runs([run]))
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
    [task] = compare(read_runs(paths))
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
            declared=[SPEED.model_copy(update={"higher_is_better": None if seed == 0 else True})],
        )
        for seed in range(3)
    ]
    [task] = compare(read_runs(runs))
    [claim] = claims(task)
    assert claim.verdict == "no claim" and "neither direction counts" in claim.text


def test_a_counterpart_is_compared_with_what_it_names(tmp_path: Path) -> None:
    transformer, dynamics = accuracy("transformer", 24).key, accuracy("dynamics", 24).key
    ours: Items = {transformer: half(-20), dynamics: half(50)}
    task = compared(tmp_path, {0: ours}, {0: {transformer: half()}}, task="word-problem")
    found = difference(task, dynamics)
    assert (found.value, found.verdict) == (pytest.approx(50 / ITEMS), "better")
    assert found.against == "the transformer of next-token"
    assert difference(task, transformer).verdict == "worse"


def test_metrics_come_in_the_order_of_every_run(tmp_path: Path) -> None:
    def key(who: str, length: int) -> str:
        return accuracy(who, length).key

    ours = [key(who, length) for length in (8, 24) for who in ("transformer", "dynamics")]
    theirs = [key("transformer", length) for length in (8, 16, 24)]
    runs = {"nextlat": ours, "next-token": theirs}
    paths = [
        write_run(tmp_path / name, name, items={key: half() for key in keys})
        for name, keys in runs.items()
    ]
    for order in (paths, paths[::-1]):
        [task] = compare(read_runs(order))
        found = [one.metric.key for one in task.metrics]
        assert len(found) == 5
        for keys in runs.values():
            assert [key for key in found if key in keys] == keys


def test_a_value_that_is_not_finite_is_shown_and_proves_nothing(tmp_path: Path) -> None:
    paths = [
        write_run(
            tmp_path / f"{name}-{seed}",
            name,
            seed,
            numbers={"perplexity": None if name == "nextlat" else 9.0},
        )
        for name in ("nextlat", "next-token")
        for seed in (0, 1)
    ]
    [task] = compare(read_runs(paths))
    [claim] = claims(task)
    assert claim.verdict == "no claim" and "not a number against 9.00" in claim.text


def test_any_objective_can_be_the_baseline(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / name, name, items={"valid_trajectories": half(flips)})
        for name, flips in (("next-token", 0), ("nextlat", 50), ("mtp", 60))
    ]
    [task] = compare(read_runs(paths), baseline="nextlat")
    assert task.baseline == "NextLat d=2" and next(iter(task.models)) == "NextLat d=2"
    assert difference(task, "valid_trajectories", "next-token").value == pytest.approx(-50 / ITEMS)
    assert difference(task, "valid_trajectories", "MTP d=2").verdict == "better"
    assert headline([task]) == "next-token, MTP against NextLat"
    assert headline(compare(read_runs(paths[:1]))) == "next-token"
    assert headline(compare(read_runs(paths[1:]))) == "NextLat, MTP"


def test_an_objective_that_nobody_knows_comes_last_under_its_own_title(tmp_path: Path) -> None:
    items = {"valid_trajectories": half()}
    titles = {"aardvark": "Aardvark", **TITLES}
    paths = [
        write_run(tmp_path / name, name, items=items, facts={"title": title})
        for name, title in titles.items()
    ]
    [task] = compare(read_runs(paths))
    assert list(task.models) == ["next-token", "NextLat d=2", "Aardvark d=2"]


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
            changes={"objectives.nextlat.horizon": 8, "steps": 999},
        )
    )
    [task] = compare(read_runs([*paths, paths[0]]))
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
    [task] = compare(read_runs([write_run(tmp_path / "run", items={"valid_trajectories": half()})]))
    assert task.baseline is None
    assert claims(task) == []
    assert "nothing is compared" in task.caveats[0]


def _edit(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        content = json.loads((run / name).read_text())
        change(content["runs"][0] if name == "results.json" else content)
        (run / name).write_text(json.dumps(content))

    return edit


def _write(name: str, text: str) -> Callable[[Path], object]:
    return lambda run: (run / name).write_text(text)


def _truncate(name: str) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[:-20])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "run.json").unlink(), "is not a run directory"),
        (_edit("run.json", lambda record: record.update(status="running")), "is not finished"),
        (lambda run: (run / "results.json").unlink(), "run 'nextlat evaluate"),
        (_truncate("results.json"), "corrupt"),
        (_truncate("scores.npz"), "corrupt"),
        (_write("results.json", '{"format": 2, "runs": []}'), "is of 0 runs"),
        (_write("results.json", "[]"), "older version of nextlat (format 1)"),
        (_edit("results.json", lambda entry: entry.pop("metrics")), "'runs.0.metrics' is missing"),
        (
            _edit("results.json", lambda entry: entry["metrics"][0].update(value=0.1)),
            "do not belong together (valid_trajectories differs)",
        ),
        (
            _edit("results.json", lambda entry: entry["metrics"].clear()),
            "do not belong together (valid_trajectories differs)",
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


def test_the_baseline_of_two_is_the_one_that_is_most_like_the_others(tmp_path: Path) -> None:
    items = {"valid_trajectories": half()}
    paths = [
        write_run(tmp_path / "longer", "next-token", items=items, changes={"steps": 999}),
        write_run(tmp_path / "base", "next-token", items=items),
        write_run(tmp_path / "nextlat", "nextlat", items=items),
    ]
    for order in (paths, paths[::-1]):
        [task] = compare(read_runs(order))
        assert task.baseline is not None
        assert task.models[task.baseline][0].directory.name == "base"
        [metric] = task.metrics
        assert len(metric.differences) == 2  # the other one is compared as any model
        assert len(task.caveats) == 1 and "steps is 999" in task.caveats[0]


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
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "run.log").write_text("loss 1.0")
    assert read_runs([tmp_path / "logs" / "run.log", base, base])[0].directory == base
    with pytest.raises(NextLatError, match="no runs"):
        read_runs((tmp_path / "logs").iterdir())


def test_comparison_is_json_without_nan(tmp_path: Path) -> None:
    paths = [
        write_run(tmp_path / name, name, numbers={"perplexity": None})
        for name in ("nextlat", "next-token")
    ]
    [task] = json.loads(json.dumps(content(compare(read_runs(paths))), allow_nan=False))["tasks"]
    assert task["metrics"][0]["metric"] == "perplexity"
    assert task["metrics"][0]["differences"]["NextLat d=2"]["value"] is None
