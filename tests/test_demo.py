"""The demo on its smallest recipe: jobs side by side, results gathered, failures told."""

from pathlib import Path

import pytest

from nextlat.errors import NextLatError
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
    monkeypatch.setattr(sweep, "DEMO_RECIPES", (str(path),))
    return tmp_path / "out"


def test_the_demo_trains_both_objectives_and_gathers_the_results(tiny: Path) -> None:
    jobs = demo(tiny, [3])
    assert [(job.objective, job.seed) for job in jobs] == [("nextlat", 3), ("next-token", 3)]
    states = list(run(jobs))
    assert [state for job, _, state in states if job == jobs[0]][-1] == "done"
    collect(jobs, tiny)
    results = read_results(tiny)
    assert [result.objective.name for result in results] == ["nextlat", "next-token"]
    assert results == [result for job in jobs for result in read_results(job.directory)]


def test_a_job_that_fails_says_why(tiny: Path) -> None:
    jobs = demo(tiny, [0])
    jobs[1].directory.parent.mkdir(parents=True)
    jobs[1].directory.write_text("in the way")
    with pytest.raises(NextLatError, match="next-token s0' failed"):
        list(run(jobs))


@pytest.mark.parametrize("seeds", [[-1], [1, 1]])
def test_bad_seeds_are_refused(seeds: list[int], tmp_path: Path) -> None:
    with pytest.raises(NextLatError, match="seeds"):
        demo(tmp_path, seeds)
