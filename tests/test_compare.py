"""Comparisons: which jobs are made, which objectives are left out, whose settings are whose, and
going on after a stop."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fabricated_runs import FIVE, write_run
from nextlat.cli import app
from nextlat.errors import NextLatError
from nextlat.training.recipe import BUILT_IN, load_recipe
from nextlat.training.sweep import Job, plan, run

pytestmark = pytest.mark.slow

SHORT = ["steps=2", "schedule.warmup_steps=0", "schedule.decay_steps=1", "task.tests=12"]
# What stands in for `nextlat train`: it notes that it was called, and puts a finished run in place
# or fails, as told.
TRAINER = """
import pathlib, shutil, sys
made, out = map(pathlib.Path, sys.argv[1:])
with (made / "calls").open("a") as calls:
    print(out.name, file=calls)
if (made / "fails" / out.name).exists():
    sys.exit("error: the disk is full")
shutil.copytree(made / out.name, out)
"""


def horizons(jobs: list[Job]) -> dict[str, int]:
    """Of every objective, as the run will have it: from the command that is really given."""
    recipes = {
        job.objective: load_recipe(job.recipe, job.settings, objective=job.objective)
        for job in jobs
    }
    return {
        name: recipe.objective_config.horizon
        for name, recipe in recipes.items()
        if hasattr(recipe.objective_config, "horizon")
    }


def test_every_objective_meets_every_seed(tmp_path: Path) -> None:
    made = plan("city-tiny", SHORT, seeds=[0, 3], out=tmp_path)
    assert sorted((job.objective, job.seed) for job in made.jobs) == sorted(
        (name, seed) for name in FIVE for seed in (0, 3)
    )
    assert [job.seed for job in made.jobs] == [0] * 5 + [3] * 5
    assert made.jobs[4].objective == "next-token"  # the shortest last
    assert {job.steps for job in made.jobs} == {2}
    assert len({job.directory for job in made.jobs}) == 10
    assert made.jobs[0].directory == tmp_path / "runs" / "city-tiny-bst-s0"
    assert made.skipped == {}


def test_an_objective_without_a_table_has_the_horizon_of_the_recipe(tmp_path: Path) -> None:
    assert horizons(plan("city-tiny", out=tmp_path).jobs) == {"nextlat": 2, "mtp": 2, "jtp": 2}
    assert horizons(plan("city-tiny", horizon=3, out=tmp_path).jobs) == {
        "nextlat": 3,
        "mtp": 3,
        "jtp": 3,
    }


def test_a_setting_of_one_objective_is_of_that_alone(tmp_path: Path) -> None:
    settings = ["objectives.nextlat.horizon=4", "objectives.bst.pair_share=0.5", "batch_size=4"]
    jobs = plan("city-tiny", settings, out=tmp_path).jobs
    assert horizons(jobs) == {"nextlat": 4, "mtp": 2, "jtp": 2}
    assert horizons(plan("city-tiny", settings, horizon=3, out=tmp_path).jobs) == {
        "nextlat": 4,
        "mtp": 3,
        "jtp": 3,
    }
    recipes = {
        job.objective: load_recipe(job.recipe, job.settings, objective=job.objective)
        for job in jobs
    }
    assert recipes["bst"].objective_config.pair_share == 0.5
    assert {recipe.batch_size for recipe in recipes.values()} == {4}


def test_an_objective_that_cannot_train_is_left_out_with_a_reason(tmp_path: Path) -> None:
    made = plan("city-tiny", ["objectives.mtp.horizon=63"], out=tmp_path)
    assert {job.objective for job in made.jobs} == {*FIVE} - {"mtp"}
    assert "horizon 63 is too long" in made.skipped["mtp"] and made.skipped["mtp"].count(". ") == 0
    words = plan("word-problem-small", out=tmp_path)
    assert {job.objective for job in words.jobs} == {"next-token", "nextlat", "jtp"}
    assert (
        set(words.skipped) == {"mtp", "bst"}
        and "labels of word-problem are not its tokens" in words.skipped["bst"]
    )
    stars = plan("path-star-small", ["task.graphs=100", "task.tests=20"], out=tmp_path)
    assert stars.skipped == {}  # prompts without a loss are no other labels


def test_a_comparison_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NextLatError, match="nextlat is skipped: the horizon 99 is too long"):
        plan("city-tiny", objectives="nextlat", horizon=99, out=tmp_path)


@pytest.mark.parametrize(
    ("overrides", "options", "words"),
    [
        ([], {"objectives": "nextlat,btp"}, "unknown objective 'btp': perhaps"),
        ([], {"objectives": ","}, "names none"),
        (["objective=mtp"], {}, "use --objectives"),
        (["seed=3"], {}, "use --seeds"),
        (["objectives.bst.pair_share=0.5"], {"objectives": "nextlat,next-token"}, "not compared"),
        (["objectives.bts.pair_share=0.5"], {}, r"\[objectives\] has no 'bts'"),
        (["objectives.mtp.lambda_mtp=0"], {}, "lambda_mtp"),
        ([], {"seeds": [1, 1]}, "seeds 1 1"),
        ([], {"horizon": 0}, "horizon"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    overrides: list[str], options: dict, words: str, tmp_path: Path
) -> None:
    with pytest.raises(NextLatError, match=words):
        plan("city-tiny", overrides, out=tmp_path, **options)


def test_the_runs_of_another_recipe_are_not_taken_for_these(tmp_path: Path) -> None:
    [job, _] = plan("city-tiny", SHORT, objectives="next-token,nextlat", out=tmp_path).jobs
    _finished(job)
    assert job.done
    with pytest.raises(NextLatError, match="differs in batch_size"):
        plan("city-tiny", [*SHORT, "batch_size=4"], objectives="next-token,nextlat", out=tmp_path)


def test_a_job_is_a_command_that_trains_just_this(tmp_path: Path) -> None:
    [job] = plan("city-tiny", SHORT, objectives="mtp", horizon=3, seeds=[5], out=tmp_path).jobs
    assert job.command[1:3] == ["-m", "nextlat"]
    assert not job.done
    result = CliRunner().invoke(app, [*job.command[3:], "--no-evaluate"])
    assert result.exit_code == 0, result.stderr
    record = json.loads((job.directory / "run.json").read_text())
    assert (record["status"], record["seed"]) == ("finished", 5)
    assert record["recipe"]["objectives"] == {"mtp": {"horizon": 3, "lambda_mtp": 1.0}}
    assert not job.done  # it is not measured yet
    again = plan("city-tiny", SHORT, objectives="mtp", horizon=3, seeds=[5], out=tmp_path).jobs
    assert again == [job]


# ---- from the command line, with runs that are made up ----


def _finished(job: Job, directory: Path | None = None) -> None:
    """What a finished job leaves."""
    recipe = load_recipe(job.recipe, job.settings, objective=job.objective, seed=job.seed)
    write_run(
        directory or job.directory,
        job.objective,
        job.seed,
        items={"valid_trajectories": np.arange(12) < 6 + (job.objective == "nextlat")},
        record={"recipe": recipe.to_dict(), "steps": recipe.steps},
    )


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Finished runs that the stand-in for the trainer puts in place."""
    folder = tmp_path / "made"
    (folder / "fails").mkdir(parents=True)
    for job in plan("city-tiny", SHORT, seeds=[0, 1], out=tmp_path / "out").jobs:
        _finished(job, folder / job.directory.name)
    (tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.setattr(
        Job,
        "command",
        property(
            lambda job: [
                sys.executable,
                str(tmp_path / "trainer.py"),
                str(folder),
                str(job.directory),
            ]
        ),
    )
    monkeypatch.setattr("nextlat.training.sweep.POLL", 0.02)
    return folder


def _compare(out: Path) -> tuple[int, str]:
    result = CliRunner().invoke(
        app, ["compare", "city-tiny", *SHORT, "--seeds", "0", "1", "--jobs", "3", "--out", str(out)]
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stderr


def test_a_comparison_goes_on_where_it_was_and_reports_all_of_it(
    made: Path, tmp_path: Path
) -> None:
    out, calls = tmp_path / "out", made / "calls"
    shutil.copytree(made / "city-tiny-nextlat-d2-s0", out / "runs" / "city-tiny-nextlat-d2-s0")
    measured = out / "runs" / "city-tiny-bst-s1" / "results.json"
    code, err = _compare(out)
    assert code == 0, err
    assert "1 of 10 models are trained and measured already" in err
    assert (
        len(calls.read_text().split()) == 9
        and "city-tiny-nextlat-d2-s0" not in calls.read_text().split()
    )
    entries = json.loads((out / "results.json").read_text())["runs"]
    assert sorted((entry["objective"]["name"], entry["seed"]) for entry in entries) == sorted(
        (name, s) for name in FIVE for s in (0, 1)
    )
    assert "NextLat" in (out / "report.html").read_text()
    shutil.rmtree(measured.parent)
    calls.unlink()
    code, err = _compare(out)
    assert code == 0 and "9 of 10" in err
    assert calls.read_text().split() == ["city-tiny-bst-s1"]


def test_a_failed_job_does_not_keep_the_others_from_their_report(
    made: Path, tmp_path: Path
) -> None:
    (made / "fails" / "city-tiny-jtp-d2-s1").touch()
    out = tmp_path / "out"
    code, err = _compare(out)
    assert code == 2
    assert "error: 'city-tiny jtp s1' failed: the disk is full" in err
    assert len(json.loads((out / "results.json").read_text())["runs"]) == 9
    assert (out / "report.html").exists()


def test_no_more_jobs_run_at_a_time_than_are_asked_for(made: Path, tmp_path: Path) -> None:
    jobs = plan("city-tiny", SHORT, objectives="mtp,jtp,bst", out=tmp_path / "out").jobs
    running: set[str] = set()
    most = 0
    for job, _, state in run(jobs, processes=1):
        running = running - {job.name} if state == "done" else running | {job.name}
        most = max(most, len(running))
    assert most == 1
    assert all(job.done for job in jobs)


def test_the_machine_takes_as_many_as_its_cores_have_threads_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    recipe = (BUILT_IN / "city-tiny.toml").read_text()
    for threads, processes in ((1, 8), (3, 2), (0, 1)):
        path = tmp_path / f"threads-{threads}.toml"
        path.write_text(recipe.replace("threads = 1", f"threads = {threads}"))
        assert plan(str(path), objectives="next-token", out=tmp_path).processes == processes
