"""The study of one change at a time: every variant is a setting that its recipe takes and that
changes something."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from conftest import load_benchmark
from fabricated_runs import write_run
from nextlat.report.runs import read_runs
from nextlat.training.recipe import load_recipe
from nextlat.training.train import build_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_benchmark("variants")


@pytest.mark.parametrize("name", ["path-star-small", "path-star", "text-small"])
def test_every_variant_is_another_run(benchmark: ModuleType, name: str) -> None:
    plain = load_recipe(name)
    found = benchmark.variants(name)
    assert len(found) >= 10
    for variant, settings in found.items():
        recipe = load_recipe(name, settings)
        assert (recipe.to_dict() == plain.to_dict()) == (not settings), variant


def test_initial_scale_reaches_the_transformer() -> None:
    plain, wide = (
        load_recipe("path-star-small", ["task.graphs=50", "task.tests=10", *more])
        for more in ([], ["backbone.initializer_range=0.04"])
    )
    scales = [
        build_model(recipe, recipe.task.build()).lm.lm_head.weight.std().item()
        for recipe in (plain, wide)
    ]
    assert scales == pytest.approx([0.02, 0.04], rel=0.05)


def test_next_token_prediction_takes_no_settings_of_nextlat(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    settings = ("objectives.nextlat.warmup_steps=0", "steps=700")
    plain, nextlat = (
        benchmark.plan("text-small", name, settings, [3], tmp_path)[0]
        for name in ("next-token", "as in the recipe")
    )
    assert (plain.objective, plain.settings, plain.steps) == ("next-token", ("steps=700",), 700)
    assert (nextlat.objective, nextlat.settings) == ("nextlat", settings)


def test_table_has_every_seed_and_says_what_was_never_found(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = ("exact_path_accuracy", "found_at")
    runs = read_runs(
        [
            write_run(
                tmp_path / f"s{seed}",
                seed=seed,
                task="path-star",
                numbers={"exact_path_accuracy": exact},
            )
            for seed, exact in ((10, 0.5), (11, 1.0))
        ]
    )
    rising = [
        {"step": step, "eval_next_token": loss} for step, loss in ((1000, 0.2), (2000, 0.001))
    ]
    found = {run.result.seed: replace(run, log=rising[: run.result.seed - 9]) for run in runs}
    benchmark.print_table([benchmark.row("no KL", ["a=1"], found, metrics)], metrics)
    assert capsys.readouterr().out.splitlines()[-1] == "| no KL | 0.500, 1.000 | -, 2,000 |"


def test_from_the_command_to_the_table(
    benchmark: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ["steps=3", "schedule.warmup_steps=1", "schedule.decay_steps=1", "task.tests=5"]
    command = [
        "city-tiny",
        *settings,
        "--variants",
        "no KL",
        "--seeds",
        "4",
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr("sys.argv", ["variants.py", *command])
    benchmark.main()
    [line] = json.loads((tmp_path / "variants.json").read_text())
    assert line["settings"] == [*settings, "objectives.nextlat.lambda_kl=0"]
    assert line["seeds"]["4"].keys() == {"next_token_loss"}
    assert f"| no KL | {line['seeds']['4']['next_token_loss']:.3f} |" in capsys.readouterr().out
    assert read_runs([tmp_path / "no-KL" / "s4"])[0].result.seed == 4
