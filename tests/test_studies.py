"""Studies: every variant is a setting that its recipe takes, and what was measured arrives in the
table, in the file and in the picture."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from conftest import load_benchmark
from fabricated_runs import write_run
from nextlat import evaluation
from nextlat.report.runs import read_runs
from nextlat.results import Metric
from nextlat.training.recipe import load_recipe
from nextlat.training.train import build_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("studies")


@pytest.mark.parametrize("name", ["path-star-small", "path-star", "text-small"])
def test_every_variant_is_another_run(benchmark: ModuleType, name: str) -> None:
    plain = load_recipe(name)
    found = benchmark.one_change(name).variants
    assert len(found) >= 10
    for variant, one in found.items():
        recipe = load_recipe(name, one.settings)
        assert (recipe.to_dict() == plain.to_dict()) == (not one.settings), variant


def test_initial_scale_reaches_the_transformer() -> None:
    plain, wide = (
        load_recipe("path-star-small", ["task.graphs=50", "task.tests=10", *more])
        for more in ([], ["backbone.initializer_range=0.04"])
    )
    scales = [
        build_model(recipe, recipe.task.build()).lm.lm_head.weight.std().item()
        for recipe in (plain, wide)
    ]
    assert scales == pytest.approx([0.01, 0.04], rel=0.05)


@pytest.mark.parametrize("name", load_benchmark("studies").STUDIES)
def test_every_declared_variant_can_be_trained_and_its_metrics_are_measured(
    benchmark: ModuleType, name: str
) -> None:
    study = benchmark.STUDIES[name]
    assert study.question.endswith("?") and study.expected
    assert min(study.seeds) >= 10  # those below are for reporting
    everywhere = {x.key for x in vars(evaluation).values() if isinstance(x, Metric)}
    keys = {benchmark.FOUND_AT, benchmark.SECONDS, *everywhere}
    distinct = set()
    for one in study.variants.values():
        recipe = load_recipe(one.recipe, one.settings, objective=one.objective)
        distinct.add(json.dumps(recipe.to_dict(), sort_keys=True, default=str))
        keys |= {metric.key for metric in recipe.task.build().metrics}
    assert len(distinct) == len(study.variants)
    assert set(study.metrics) <= keys


def test_next_token_prediction_takes_no_settings_of_nextlat(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    settings = ("objectives.nextlat.warmup_steps=0", "steps=700")
    study = benchmark.one_change("text-small").with_settings(settings)
    planned = benchmark.jobs(study, [3], tmp_path)
    plain, nextlat = planned["next-token"][3], planned["as in the recipe"][3]
    assert (plain.objective, plain.settings, plain.steps) == ("next-token", ("steps=700",), 700)
    assert (nextlat.objective, nextlat.settings) == ("nextlat", settings)


def test_table_says_what_was_never_found(benchmark: ModuleType) -> None:
    seeds = {
        10: {"exact_path_accuracy": 0.5, "found_at": None},
        11: {"exact_path_accuracy": 1.0, "found_at": 2000},
    }
    shown = benchmark.table(
        [{"variant": "no KL", "seeds": seeds}], ("exact_path_accuracy", "found_at")
    )
    assert shown.splitlines()[-1] == "| no KL | 0.500, 1.000 | -, 2,000 |"


def test_the_step_from_which_on_a_task_is_solved(benchmark: ModuleType, tmp_path: Path) -> None:
    rising = [(1000, 0.2), (1500, 0.001), (1700, 0.3), (2000, 0.001)]
    log = [{"step": step, "eval_next_token": loss} for step, loss in rising]
    [run] = read_runs([write_run(tmp_path / "s", seed=1, task="path-star")])
    assert benchmark.value(replace(run, log=log), "found_at") == 2000
    assert benchmark.value(replace(run, log=log[:3]), "found_at") is None


def test_from_the_command_to_table_file_and_picture(
    benchmark: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ["steps=3", "schedule.warmup_steps=1", "schedule.decay_steps=1", "task.tests=5"]
    more = ["--variants", "no KL", "--seeds", "4", "--out", str(tmp_path)]
    for collect in ([], ["--collect"]):
        monkeypatch.setattr("sys.argv", ["studies.py", "city-tiny", *settings, *more, *collect])
        benchmark.main()
        [row] = json.loads((tmp_path / "city-tiny.json").read_text())["variants"]
        assert row["settings"] == [*settings, "objectives.nextlat.lambda_kl=0"]
        found = row["seeds"]["4"]
        assert found.keys() == {"next_token_loss", "curves"}
        assert found["curves"]["eval_next_token"][0][-1] == 3
        assert f"| no KL | {found['next_token_loss']:.3f} |" in capsys.readouterr().out
        (tmp_path / "city-tiny.png").unlink()
    assert read_runs([tmp_path / "city-tiny" / "no-KL" / "s4"])[0].result.seed == 4


def test_what_the_file_has_is_not_trained_again_and_never_lost(
    benchmark: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From another machine came two variants; one of them has other settings by now."""
    [*_, none], path = (
        benchmark.one_change("city-tiny").variants.items(),
        tmp_path / "city-tiny.json",
    )
    curves = {"eval_next_token": [[1, 3], [2.0, 1.0]]}
    row = {**benchmark.about(*none), "seeds": {"5": {"next_token_loss": 9.5, "curves": curves}}}
    stale = {**row, "variant": "no KL", "settings": ["steps=7"]}
    path.write_text(json.dumps({"variants": [row, stale]}))
    trained = []
    monkeypatch.setattr(benchmark, "watch", lambda todo, _: trained.extend(j.name for j in todo))
    words = ["studies.py", "city-tiny", "--variants", none[0], "no KL", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", [*words, "--seeds", "5", "6"])
    benchmark.main()
    assert trained == ["no KL s5", f"{none[0]} s6", "no KL s6"]
    assert f"| {none[0]} | 9.500 |" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*words, "--metrics", "effective_latent_rank", "--seeds", "5"])
    benchmark.main()
    assert trained[3:] == [f"{none[0]} s5", "no KL s5"]  # the file does not have that metric
    assert json.loads(path.read_text())["variants"] == [row, stale]  # nothing new was trained
    row["seeds"]["6"] = {"effective_latent_rank": 2.0, "curves": curves}
    monkeypatch.setattr(benchmark, "measured", lambda *_: row["seeds"]["6"])
    monkeypatch.setattr(benchmark, "read_runs", lambda _: [None])
    monkeypatch.setattr(benchmark.Job, "done", True)
    benchmark.main()
    kept = json.loads(path.read_text())["variants"][0]["seeds"]["5"]
    assert kept == {"next_token_loss": 9.5, **row["seeds"]["6"]}


def test_basins_are_told_by_the_kl_where_the_branch_is_guessed(tmp_path: Path) -> None:
    basins = load_benchmark("basins")
    steps = list(range(20, 1020, 20))

    def run(kl: float, escape: int, found: int | None) -> dict[str, object]:
        """Comes down to the loss of guessing, 0.231, by step 200, and leaves it at `escape`."""
        loss = [max(0.24, 3 - 0.0138 * s) if s < escape else 0.01 for s in steps]
        curves = {"next_token": [steps, loss], "kl": [steps, [kl] * len(steps)]}
        return {"curves": curves, "found_at": found, "exact_path_accuracy": float(bool(found))}

    seeds = {
        "10": run(0.10, 220, 400), "11": run(0.09, 240, 400), "12": run(0.05, 800, 900),
        "13": run(0.04, 5000, None), "0": run(0.08, 220, 400), "1": run(0.03, 5000, None),
        "2": run(0.08, 5000, None),
    }  # fmt: skip
    row = {"variant": "v", "recipe": "path-star-small", "objective": "nextlat", "settings": []}
    study = tmp_path / "study.json"
    study.write_text(json.dumps({"variants": [{**row, "seeds": seeds}]}))
    basins.main([str(study), "--out", str(tmp_path / "basins.json")])
    told = json.loads((tmp_path / "basins.json").read_text())
    assert 0.05 < told["limit"] < 0.09
    assert told["chosen_on"] == {"runs": 4, "wrong": 0}
    assert told["judged_on"] == {"runs": 3, "wrong": 1}  # seed 2 stays, though its KL is high
    assert told["shares"]["chosen"]["v"]["found"] == 3 and told["shares"]["chosen"]["v"]["of"] == 4
    low, high = told["shares"]["chosen"]["v"]["interval"]
    assert 0.25 < low < 0.35 and 0.9 < high < 1
    assert (tmp_path / "basins.png").stat().st_size > 10_000
