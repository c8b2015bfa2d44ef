"""A dry run says what is true of the run that would follow, and leaves nothing behind."""

import re
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from nextlat.cli import app
from nextlat.objectives import OBJECTIVES
from nextlat.terminal import duration
from nextlat.training import cost as module
from nextlat.training.build import build_model
from nextlat.training.cost import dry_run
from nextlat.training.recipe import load_recipe
from nextlat.training.run_directory import read_record
from nextlat.training.train import train

SMALL = [
    "steps=3",
    "schedule.name=constant",
    "schedule.warmup_steps=0",
    "schedule.decay_steps=0",
    "run.save_every=0",
]


def test_parameters_and_tokens_are_those_of_the_run(tmp_path: Path) -> None:
    recipe = load_recipe("city-tiny", SMALL)
    cost = dry_run(recipe)
    record = read_record(train(recipe, tmp_path / "run", progress=False))
    assert record is not None
    assert {"lm": cost.lm_parameters, "objective": cost.objective_parameters} == record[
        "parameters"
    ]
    assert cost.tokens == pytest.approx(record["tokens"], rel=0.02)
    assert cost.timed and cost.step_seconds > 0 and cost.seconds == 3 * cost.step_seconds


def test_operations_are_those_of_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "torch.nn.functional.linear_cross_entropy", None, raising=False
    )  # the counter cannot see into it
    recipe = load_recipe("city-tiny", SMALL)
    cost, task = dry_run(recipe), recipe.task.build()
    model, batch = build_model(recipe, task), module._first_batch(recipe, task)
    model.lm.set_attn_implementation("eager")  # as little
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    again = (
        2
        * model.backbone.width
        * model.backbone.vocab_size
        * int(model.counts(**batch)["next_token"])
    )  # recomputed logits
    assert cost.flops is not None
    assert sum(cost.flops.values()) == pytest.approx(
        3 * (counter.get_total_flops() - again), rel=1e-6
    )


def test_what_is_too_large_to_try_is_estimated_and_not_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "BUDGET", 0.0)
    monkeypatch.setattr(module, "_seconds_per_step", None)  # calling it would fail
    monkeypatch.setattr(module, "_matmul_flops_per_second", lambda recipe, model: 1e6)
    cost = dry_run(load_recipe("city-tiny", SMALL))
    assert cost.flops is not None
    assert not cost.timed and cost.seconds == pytest.approx(sum(cost.flops.values()) / 1e6)
    # An objective without a formula: rows are timed.
    monkeypatch.setattr(module, "step_flops", lambda *arguments, **batch: None)
    monkeypatch.setattr(module, "_seconds", lambda action, device: action() or 0.5)
    cost = dry_run(load_recipe("city-tiny", SMALL))
    assert (cost.flops, cost.timed, cost.step_seconds) == (None, False, 0.5 * 8)


def test_command_prints_the_cost_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(
        app, ["train", "city-tiny", *SMALL, "--dry-run", "--out", str(tmp_path / "run")]
    )
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert {"parameters", "tokens", "FLOPs", "time"} <= lines.keys()
    assert (
        "nothing is trained" in result.stdout
        and "3 steps of 8 rows" in lines["tokens"]
        and "kl" in lines["FLOPs"]
    )
    assert list(tmp_path.iterdir()) == []
    result = CliRunner().invoke(app, ["train", "city-tiny", "stepps=3", "--dry-run"])
    assert result.exit_code == 2 and "stepps" in result.stderr


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_command_shows_the_operations_of_every_objective(objective: str, tmp_path: Path) -> None:
    arguments = [
        "train",
        "city-tiny",
        *SMALL,
        "--objective",
        objective,
        "--dry-run",
        "--out",
        str(tmp_path / "run"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("FLOPs")]
    parts = dict(re.findall(r"([a-z][a-z ]*) (\d+)%", line))
    assert parts.keys() >= {"backbone", "head"} and sum(map(int, parts.values())) == pytest.approx(
        100, abs=len(parts)
    )
    assert (len(parts) == 2) == (objective == "next-token"), line


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0123, "0.0123 s"),
        (119, "119 s"),
        (150, "2.5 min"),
        (9000, "2.5 h"),
        (864_000, "10.0 days"),
    ],
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text
