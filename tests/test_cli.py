"""The command line: what it prints, and that what the user can mend is one sentence with exit code
2."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import nextlat
from conftest import tiny_lm
from nextlat.cli import app

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


def test_help_names_the_commands() -> None:
    code, out, _ = run("--help")
    assert code == 0 and all(
        name in out for name in ("train", "evaluate", "generate", "compare", "report", "demo")
    )


def test_training_leaves_a_plain_model_with_results(trained: dict[str, Path]) -> None:
    run_directory = trained["nextlat"]
    AutoModelForCausalLM.from_pretrained(run_directory)
    [entry] = json.loads((run_directory / "results.json").read_text())
    assert (entry["task"], entry["objective"], entry["horizon"], entry["seed"]) == (
        "streets",
        "nextlat",
        2,
        0,
    )
    expected = {
        "next_token_test", "valid_trajectories", "sequence_compression", "identical_continuations", "effective_latent_rank",
        "detour_robustness", "next_token_loss", "mean_acceptance_length", "decoding_speedup",
    }  # fmt: skip
    assert expected <= entry["metrics"].keys()
    assert entry["decoding"]["identical"]
    scores = load_file(run_directory / "scores.safetensors")
    assert scores["valid_trajectories"].mean() == pytest.approx(
        entry["metrics"]["valid_trajectories"]
    )
    assert (
        "mean_acceptance_length"
        not in json.loads((trained["next-token"] / "results.json").read_text())[0]["metrics"]
    )


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


def test_errors_reach_the_shell_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nextlat", "train", "no-such-recipe"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (
        result.returncode == 2
        and result.stderr.startswith("error: ")
        and "Traceback" not in result.stderr
    )
