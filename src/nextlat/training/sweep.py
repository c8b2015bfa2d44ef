"""Several training runs side by side, each the command `nextlat train RECIPE ...` in a process of
its own: comparisons of objectives and seeds, and the demo.

What is already there is not made again, and stopped anywhere, the same jobs go on where they were.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from nextlat.batch import IGNORE
from nextlat.errors import NextLatError
from nextlat.files import write_errors, write_json
from nextlat.objectives import OBJECTIVES
from nextlat.results import RESULTS, Results, read_results
from nextlat.tasks import Task
from nextlat.training.build import check_trains
from nextlat.training.recipe import Recipe, load_recipe, read_recipe_file
from nextlat.training.run_directory import is_finished, last_metrics, read_record
from nextlat.training.run_log import NOT_SHOWN
from nextlat.training.train import check_same_run
from nextlat.validation import nearest

WAY_OUT = "choose another --out"
POLL = 0.5  # seconds between two looks at the jobs
DEMO_RECIPES = ("city-small", "word-problem-small")
DEMO_OBJECTIVES = ("nextlat", "next-token")  # longer first: no core idles at the end
BY_OBJECTIVE_AND_SEED = {"objective": "--objectives", "seed": "--seeds"}


@dataclass(frozen=True)
class Job:
    """One model to train and measure."""

    recipe: str  # built-in name or path
    objective: str
    seed: int
    steps: int  # optimiser steps that it takes
    directory: Path  # where it goes
    settings: tuple[str, ...] = ()  # further arguments of `nextlat train`
    label: str = ""  # what it is called; by default by recipe, objective and seed

    @property
    def name(self) -> str:
        return self.label or f"{self.recipe} {self.objective} s{self.seed}"

    @property
    def command(self) -> list[str]:
        run = {"--objective": self.objective, "--seed": self.seed, "--out": self.directory}
        options = [str(word) for option in run.items() for word in option]
        train = [sys.executable, "-m", "nextlat", "train", self.recipe, *self.settings]
        return [*train, *options, "--no-progress"]

    @property
    def log(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}.log")

    @property
    def done(self) -> bool:
        """Whether the model is trained and measured."""
        return is_finished(self.directory) and (self.directory / RESULTS).exists()


@dataclass(frozen=True)
class Plan:
    """What a comparison consists of."""

    jobs: list[Job]  # seed by seed
    skipped: dict[str, str]  # objective -> the sentence that says why it is left out
    processes: int  # how many jobs the machine can take at a time


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse (NextLatError) a seed below zero, or the same seed twice."""
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        given = " ".join(map(str, seeds))
        raise NextLatError(f"seeds {given}: give different whole numbers from 0 on.")


def demo(out: Path, seeds: Sequence[int]) -> list[Job]:
    """What the demo trains: two objectives, every recipe, every seed; see `check_seeds`."""
    check_seeds(seeds)
    return [
        _job(out, name, load_recipe(name, objective=objective, seed=seed))
        for name, seed, objective in product(DEMO_RECIPES, seeds, DEMO_OBJECTIVES)
    ]


def _job(out: Path, name: str, recipe: Recipe, settings: tuple[str, ...] = ()) -> Job:
    directory = out / "runs" / recipe.run_name
    return Job(name, recipe.objective, recipe.seed, recipe.steps, directory, settings)


def plan(
    recipe: str,
    overrides: Sequence[str] = (),
    *,
    objectives: str = "all",
    seeds: Sequence[int] = (0,),
    horizon: int | None = None,
    out: Path,
) -> Plan:
    """What to train: every objective that can, with every seed.

    Args:
        recipe: built-in name or path.
        overrides: as of `load_recipe`; one of `objectives.NAME` holds for that objective alone.
        objectives: names with commas between, or "all".
        seeds: different ones.
        horizon: d, of every objective that has one (an override of it wins); None = as in the
            recipe, where an objective without a table of its own has the horizon of the recipe's
            objective, or of its NextLat.
        out: the runs go to `out`/runs.

    Raises:
        NextLatError: an unknown objective, an override of one that is not compared or of what is
            compared, bad seeds; whatever is wrong with the recipe; a run directory that holds
            another run; or no objective can train.
    """
    check_seeds(seeds)
    names = _names(objectives)
    _check_overrides(overrides, names)
    settings = {name: _settings(recipe, name, overrides, horizon) for name in names}
    recipes = [
        load_recipe(recipe, settings[name], objective=name, seed=seed)
        for seed, name in product(seeds, names)
    ]
    first = recipes[0]
    task = first.task.build()
    skipped = {r.objective: why for r in recipes[: len(names)] if (why := _obstacle(r, task))}
    if len(skipped) == len(names):
        raise NextLatError(" ".join(skipped.values()))
    jobs = []
    for loaded in recipes:
        if loaded.objective not in skipped:
            job = _job(out, recipe, loaded, settings[loaded.objective])
            check_same_run(read_record(job.directory), loaded, job.directory)
            jobs.append(job)
    cores = os.cpu_count() or 1
    return Plan(jobs, skipped, max(1, cores // (first.run.threads or cores)))


def _names(objectives: str) -> list[str]:
    known = [*OBJECTIVES]
    asked = known if objectives == "all" else [s for x in objectives.split(",") if (s := x.strip())]
    for name in asked:
        if name not in known:
            raise NextLatError(
                f"--objectives {objectives}: unknown objective '{name}': {nearest(name, known)}."
            )
    if not asked:
        raise NextLatError(f"--objectives '{objectives}' names none: {nearest('', known)}; or all.")
    # Next-token prediction, the shortest, last, so that no core idles at the end.
    return sorted(set(asked), key=known.index, reverse=True)


def _key(override: str) -> tuple[str, str | None]:
    """What an override sets, and the objective that this is about, None = all."""
    key = override.partition("=")[0].strip()
    table, *rest = key.split(".")
    return key, rest[0] if table == "objectives" and rest else None


def _check_overrides(overrides: Sequence[str], names: Sequence[str]) -> None:
    for item in overrides:
        key, name = _key(item)
        if key in BY_OBJECTIVE_AND_SEED:
            option = BY_OBJECTIVE_AND_SEED[key]
            raise NextLatError(f"'{item}': a comparison has several of them: use {option}.")
        if name in OBJECTIVES and name not in names:
            raise NextLatError(
                f"'{item}' is of an objective that is not compared: leave it out, or name it in "
                "--objectives."
            )


def _settings(
    recipe: str, objective: str, overrides: Sequence[str], horizon: int | None
) -> tuple[str, ...]:
    """The overrides of one objective, its horizon among them if the recipe says too little."""
    others = OBJECTIVES.keys() - {objective}
    own = tuple(item for item in overrides if _key(item)[1] not in others)
    key = f"objectives.{objective}.horizon"
    has_one = "horizon" in OBJECTIVES[objective][0].model_fields
    if not has_one or key in (_key(item)[0] for item in own):
        return own
    if horizon is None:
        content = read_recipe_file(recipe)[1]
        tables = content.get("objectives")
        if not isinstance(tables, dict) or objective in tables:
            return own
        found = [tables.get(name) for name in (content.get("objective"), "nextlat")]
        horizons = [table.get("horizon") for table in found if isinstance(table, dict)]
        horizon = next((d for d in horizons if isinstance(d, int)), None)
    return own if horizon is None else (*own, f"{key}={horizon}")


def _obstacle(recipe: Recipe, task: Task) -> str | None:
    """Why a recipe cannot be trained, in a sentence, or None."""
    row = task.eval_dataset()[0]
    read, asked = row["input_ids"], row["labels"]
    why = OBJECTIVES[recipe.objective][1].tokens_only
    if why and (read != asked)[asked != IGNORE].any():
        return (
            f"{recipe.objective} is skipped: the labels of {recipe.task_name} are not its tokens, "
            f"and {why}."
        )
    try:
        check_trains(recipe, task)
    except NextLatError as error:
        return f"{recipe.objective} is skipped: {error}"
    return None


def run(
    todo: Sequence[Job], processes: int | None = None, failures: dict[Job, str] | None = None
) -> Iterator[tuple[Job, int, str]]:
    """Run jobs side by side; yields (job, step, state) whenever one may have moved.

    Args:
        todo: the jobs.
        processes: at a time; None = as many as there are cores.
        failures: where to put why a job failed, for the others to go on; None = they are stopped,
            and keep what they have.

    Raises:
        NextLatError: a job failed, and `failures` is None.
    """
    processes = processes or os.cpu_count() or 1
    waiting, running = list(todo), dict[Job, subprocess.Popen[bytes]]()
    for job in waiting:
        with write_errors(job.log.parent, WAY_OUT):
            job.log.parent.mkdir(parents=True, exist_ok=True)
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                job = waiting.pop(0)
                with write_errors(job.log.parent, WAY_OUT), job.log.open("wb") as log:
                    running[job] = subprocess.Popen(
                        job.command, stdout=log, stderr=log, start_new_session=True
                    )
                yield job, 0, "starting"
            for job, process in list(running.items()):
                code = process.poll()
                if code is None:
                    yield job, *_state(job)
                    continue
                del running[job]
                if code == 0:
                    yield job, job.steps, "done"
                    continue
                said = job.log.read_text(errors="replace").strip().splitlines()
                last = said[-1].removeprefix("error: ") if said else "it said nothing"
                reason = f"'{job.name}' failed: {last} (all of it is in {job.log})"
                if failures is None:
                    raise NextLatError(reason)
                failures[job] = reason
                yield job, _state(job)[0], "failed"
            time.sleep(POLL)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGINT)  # it finishes its step, saves, and can go on
        for process in running.values():
            process.wait()


def _state(job: Job) -> tuple[int, str]:
    """How far a job is: its step, and what it logged last or does now."""
    line = last_metrics(job.directory)
    if line is None:
        return 0, "starting"
    if line["step"] >= job.steps:
        return job.steps, "measuring"
    hidden = (*NOT_SHOWN, "step", "tokens", "seconds")
    parts = (f"{k} {v:.3f}" for k, v in line.items() if k not in hidden and v is not None)
    return line["step"], "  ".join(parts)


def collect(done: Sequence[Job], out: Path) -> Path:
    """One results.json with the entries of all runs."""
    results = Results(runs=[entry for job in done for entry in read_results(job.directory)])
    write_json(out / RESULTS, results.model_dump(mode="json"))
    return out / RESULTS
