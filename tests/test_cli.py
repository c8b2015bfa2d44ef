"""The command line: what it prints, and that what the user can mend is one sentence with exit code
2."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import nextlat
from conftest import tiny_lm
from nextlat.cli import app
from nextlat.objectives import OBJECTIVES
from nextlat.results import read_results, read_scores

pytestmark = pytest.mark.slow

TINY = [
    "steps=4",
    "schedule.name=constant",
    "schedule.warmup_steps=0",
    "schedule.decay_steps=0",
    "run.save_every=2",
    "task.tests=12",
]


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def fails(*arguments: str | Path) -> str:
    """The one sentence on standard error of a command that exits with 2."""
    code, _, err = run(*arguments)
    assert code == 2, err
    assert err.startswith("error: ") and err.endswith(".\n") and err.count("\n") == 1, err
    return err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The smallest city trained for four steps by each objective."""
    folder = tmp_path_factory.mktemp("runs")
    for objective in ("next-token", "nextlat"):
        code, _, err = run(
            "train",
            "city-tiny",
            *TINY,
            "--objective",
            objective,
            "--out",
            folder / objective,
            "--no-progress",
        )
        assert code == 0, err
    return {path.name: path for path in folder.iterdir()}


def test_help_names_every_command_and_objective() -> None:
    code, out, _ = run("--help")
    commands = ("train", "evaluate", "generate", "serve", "compare", "report", "demo")
    assert code == 0 and all(f"\n  {name} " in out for name in commands)
    for command in ("train", "compare"):
        assert all(name in run(command, "--help")[1] for name in OBJECTIVES)


def test_training_leaves_a_plain_model_with_results(trained: dict[str, Path]) -> None:
    path = trained["nextlat"]
    AutoModelForCausalLM.from_pretrained(path)
    [result] = read_results(path)
    assert (result.task.name, result.objective.name, result.objective.horizon) == (
        "streets",
        "nextlat",
        2,
    )
    assert (result.seed, result.steps) == (0, 4)
    metrics = {metric.key: metric for metric in result.metrics}
    assert {"next_token_loss", "valid_trajectories", "mean_acceptance_length"} <= metrics.keys()
    assert result.decoding is not None and result.decoding.identical
    score = read_scores(path)["valid_trajectories"]
    assert score.value == pytest.approx(metrics["valid_trajectories"].value)
    [plain] = read_results(trained["next-token"])
    assert "mean_acceptance_length" not in {metric.key for metric in plain.metrics}


def test_a_finished_run_is_not_trained_further(trained: dict[str, Path]) -> None:
    path = trained["nextlat"]
    before = (path / "model.safetensors").stat().st_mtime_ns
    code, _, err = run(
        "train", "city-tiny", *TINY, "--objective", "nextlat", "--out", path, "--no-progress"
    )
    assert code == 0 and "is finished: it is not trained any further" in err
    assert (path / "model.safetensors").stat().st_mtime_ns == before


def test_evaluate_and_report_write_what_they_say(trained: dict[str, Path], tmp_path: Path) -> None:
    code, out, _ = run("evaluate", trained["next-token"], "--no-progress")
    assert code == 0 and "Valid trajectories" in out
    code, out, err = run(
        "report", trained["next-token"], trained["nextlat"], "--out", tmp_path / "report"
    )
    assert code == 0 and "report.html" in err
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 2 and "http://" not in page


def test_generate_gives_the_same_text_with_and_without_drafts(trained: dict[str, Path]) -> None:
    code, plain, _ = run("generate", trained["nextlat"], "0 5", "--max-new-tokens", "12")
    assert code == 0 and plain.startswith("0 5 ")
    code, drafted, err = run(
        "generate", trained["nextlat"], "0 5", "--max-new-tokens", "12", "--draft-length", "8"
    )
    assert code == 0 and drafted == plain
    assert "tokens a cycle" in err
    code, sampled, _ = run(
        "generate",
        trained["nextlat"],
        "0 5",
        "--temperature",
        "1.5",
        "--draft-length",
        "3",
        "--seed",
        "4",
    )
    assert code == 0 and sampled.startswith("0 5 ")


def test_bad_input_is_one_sentence(trained: dict[str, Path], tmp_path: Path) -> None:
    path = trained["nextlat"]
    assert "'city-smal'" in fails("train", "city-smal")
    assert "learning_rate" in fails(
        "train", "city-tiny", "optimizer.learning_rat=1e-3", "--out", tmp_path / "a"
    )
    assert "other" in fails(
        "train", "city-tiny", *TINY, "--objective", "next-token", "--out", path, "--no-progress"
    )
    assert "below zero" in fails("generate", path, "0 5", "--draft-length", "-1")
    assert "'Broadway'" in fails("generate", path, "0 Broadway")
    assert "cannot draft" in fails("generate", trained["next-token"], "0 5", "--draft-length", "2")
    assert "cannot open" in fails("generate", tmp_path / "nowhere", "0 5")
    assert "not a run directory" in fails("evaluate", tmp_path)
    assert "not a run directory" in fails("report", tmp_path)
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in fails(
        "train", "city-tiny", *TINY, "--out", tmp_path / "file" / "run", "--no-progress"
    )
    assert str(tmp_path / "file") in fails(
        "compare", "city-tiny", "--objectives", "nextlat", "--out", tmp_path / "file"
    )
    assert "unknown objective 'btp'" in fails(
        "compare", "city-tiny", "--objectives", "btp", "--out", tmp_path / "compare"
    )
    assert "'3' is not an override" in fails(
        "compare", "city-tiny", "3", "--out", tmp_path / "compare"
    )
    assert "Invalid value for '--seeds'" in fails(
        "compare", "city-tiny", "--seeds", "x", "--out", tmp_path / "compare"
    )
    assert "No such option: --horizn" in fails("train", "city-tiny", "--horizn", "2")
    assert "Missing argument 'recipe'" in fails("train")
    assert "4294967295" in fails(
        "train", "city-tiny", "--seed", "9" * 20, "--out", tmp_path / "seed"
    )
    assert not (tmp_path / "seed").exists()
    assert "seeds 1 1" in fails("demo", "--seeds", "1", "1", "--out", tmp_path / "demo")


def test_truncated_weights_are_one_sentence(trained: dict[str, Path], tmp_path: Path) -> None:
    nextlat.attach(tiny_lm("llama"), nextlat.NextLatConfig()).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is not the file that was saved there" in fails("generate", tmp_path, "0 5")


def test_damaged_parts_of_a_run_are_one_sentence(trained: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(trained["nextlat"], path)
    for name, command in (
        ("tokenizer.json", ("generate", path, "0 5")),
        ("nextlat/objective.json", ("generate", path, "0 5")),
        ("run.json", ("evaluate", path)),
    ):
        whole = (path / name).read_text()
        for damaged in ("{", "[1]", whole[:-20], "[" * 10**5):
            (path / name).write_text(damaged)
            assert str(path) in fails(*command)
        (path / name).write_text(whole)


def test_only_a_finished_run_of_this_version_is_evaluated(
    trained: dict[str, Path], tmp_path: Path
) -> None:
    record = json.loads((trained["nextlat"] / "run.json").read_text())
    for change, told in (
        ({"status": "running"}, "is not finished"),
        ({"format": 9}, "is of a newer version of nextlat (format 9): update nextlat to read it"),
        ({"status": "done"}, "'status' = \"done\" is not valid"),
        ({"seed": "0"}, "'seed' = \"0\" is not valid"),
        ({"more": 1}, "has no 'more'"),
        ({"task": {}}, "'task.fingerprint' is missing"),
        ({"recipe": {**record["recipe"], "task": {"name": "strets"}}}, "unknown task 'strets'"),
        ({"recipe": {**record["recipe"], "steps": 0}}, "'recipe.steps' = 0 is not valid"),
        ({"seed": 1}, "it contradicts its own recipe"),
        ({"steps": 5}, "it contradicts its own recipe"),
    ):
        (tmp_path / "run.json").write_text(json.dumps({**record, **change}))
        assert told in fails("evaluate", tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place", ["training.train.build_model", "evaluation.evaluate"])
def test_a_signal_while_starting_or_measuring_ends_in_one_word(
    number: int, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(number)

    def interrupted(*arguments: object, **options: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(f"nextlat.{place}", interrupted)
    out = tmp_path / "run"
    code, _, err = run("train", "city-tiny", *TINY, "--out", out, "--no-progress")
    assert (code, err) == (130, "stopped.\n")
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    assert run("train", "city-tiny", *TINY, "--out", out, "--no-progress", "--no-evaluate")[0] == 0


@pytest.mark.parametrize("name", ["", "x" * 300])
def test_a_name_that_no_directory_has_is_refused(
    name: str, trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["train", "city-tiny", *TINY], ["compare", "city-tiny"], ["demo"]):
        assert "directory" in fails(*command, "--out", name)
    assert "directory" in fails("report", trained["nextlat"], "--out", name)
    assert "directory" in fails("evaluate", name)
    assert list(tmp_path.iterdir()) == []


def test_a_bar_shows_rate_and_loss_parts(tmp_path: Path) -> None:
    code, out, err = run("train", "city-tiny", *TINY, "--out", tmp_path / "run", "--no-evaluate")
    assert (code, out) == (0, "")
    assert "4/4" in err and "/s" in err and "next_token" in err and "Writing" not in err


def test_errors_reach_the_shell_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nextlat", "train", "no-such-recipe"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (
        result.returncode == 2
        and result.stderr.startswith("error: ")
        and "Traceback" not in result.stderr
    )
