"""The demo on its smallest recipe: jobs side by side, results gathered, failures told."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from nextlat import terminal
from nextlat.errors import NextLatError
from nextlat.report import read_runs, write_report
from nextlat.results import read_results
from nextlat.training import sweep
from nextlat.training.recipe import BUILT_IN
from nextlat.training.sweep import collect, demo, run

pytestmark = pytest.mark.slow


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    recipe = (BUILT_IN / "city-tiny.toml").read_text()
    recipe = (
        recipe.replace("steps = 60", "steps = 4")
        .replace("tests = 50", "tests = 12")
        .replace("decay_steps = 20", "decay_steps = 2")
    )
    recipe = recipe.replace("warmup_steps = 10", "warmup_steps = 1").replace(
        "log_every = 5", "log_every = 1"
    )
    path = tmp_path / "tiny.toml"
    path.write_text(recipe)
    jobs = [("nextlat", ()), ("next-token", ()), ("next-token", (sweep.NO_POSITIONS,))]
    monkeypatch.setattr(sweep, "DEMO", tuple((str(path), *job, 1) for job in jobs))
    return tmp_path / "out"


def test_the_demo_trains_all_models_and_gathers_the_results(tiny: Path) -> None:
    jobs, skipped = demo(tiny, [3])
    assert [(job.objective, job.seed) for job in jobs] == [
        ("nextlat", 3), ("next-token", 3), ("next-token", 3),
    ]  # fmt: skip
    assert len({job.directory for job in jobs}) == len({job.name for job in jobs}) == 3
    assert jobs[2].name.endswith("positions none s3") and skipped == []
    states = list(run(jobs))
    assert [state for job, _, state in states if job == jobs[0]][-1] == "done"
    collect(jobs, tiny)
    results = read_results(tiny)
    assert [result.objective.name for result in results] == ["nextlat", "next-token", "next-token"]
    assert results == [result for job in jobs for result in read_results(job.directory)]
    # Both are told apart, and the one that is trained as NextLat is the baseline.
    write_report(read_runs([job.directory for job in jobs]), tiny)
    page = (tiny / "report.html").read_text()
    assert "backbone.positions is none" in page and "Not trained alike" in page


def test_the_full_demo_leaves_out_a_world_whose_data_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXTLAT_DATA", str(tmp_path / "nowhere"))
    monkeypatch.chdir(tmp_path)
    jobs, skipped = demo(tmp_path, [0], full=True)
    assert [sentence.split()[0] for sentence in skipped] == ["district-arrival", "text-small"]
    assert {job.recipe for job in jobs} == {
        "city-arrival", "path-star-small", "rrxor", "city-small", "word-problem-small",
    }  # fmt: skip


def test_the_progress_of_all_models_is_told_in_their_seconds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long, short = (
        sweep.Job("city-tiny", "nextlat", s, 10, tmp_path, seconds=100 - 80 * s) for s in (0, 1)
    )
    states = [(long, 5, ""), (short, 10, "done"), (long, 10, "measuring"), (long, 10, "failed")]
    monkeypatch.setattr(sweep, "run", lambda *_: iter(states))
    told: list[tuple[str, str, int, int]] = []
    monkeypatch.setattr(terminal, "bars", lambda: nullcontext(lambda *state: told.append(state)))
    terminal.watch([long, short], 2)
    everything = [state[1:] for state in told if state[0] == "all"]
    assert everything == [
        ("0 of 2 models", 0, 120),
        (f"0 of 2 models, {long.name}", 45, 120),
        (f"1 of 2 models, {long.name}", 65, 120),
        (f"1 of 2 models, {long.name}", 110, 120),  # the last tenth is measuring
        ("2 of 2 models", 120, 120),
    ]
    assert told[0][0] == "all"  # above the others


def test_a_job_that_fails_says_why(tiny: Path) -> None:
    jobs, _ = demo(tiny, [0])
    jobs[1].directory.parent.mkdir(parents=True)
    jobs[1].directory.write_text("in the way")
    with pytest.raises(NextLatError, match="next-token s0' failed"):
        list(run(jobs))


@pytest.mark.parametrize("seeds", [[-1], [1, 1]])
def test_bad_seeds_are_refused(seeds: list[int], tmp_path: Path) -> None:
    with pytest.raises(NextLatError, match="seeds"):
        demo(tmp_path, seeds)
