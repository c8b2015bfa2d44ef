"""The demo: the same transformer trained by next-token and by next-latent prediction, side by side, one process per core.

Every job is the command `nextlat train RECIPE --objective ... --seed ...` in a process of its own; this module only starts them, reads
how far they are from their metrics.jsonl, and gathers the results. Stopped anywhere, the same demo goes on where it was.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nextlat.errors import NextLatError
from nextlat.evaluation import RESULTS, read_results
from nextlat.files import write_errors, write_json
from nextlat.recipe import load_recipe
from nextlat.run_directory import read_metrics

OBJECTIVES = ("nextlat", "next-token")  # the longer job first, so that no core idles at the end
RECIPES = ("city-small", "word-problem-small")
POLL = 0.5  # seconds between two looks at the jobs


@dataclass(frozen=True)
class Job:
    """One model to train and measure."""

    recipe: str
    objective: str
    seed: int
    steps: int
    directory: Path

    @property
    def name(self) -> str:
        return f"{self.recipe} {self.objective} s{self.seed}"

    @property
    def command(self) -> list[str]:
        settings = ["--objective", self.objective, "--seed", str(self.seed), "--out", str(self.directory), "--no-progress"]
        return [sys.executable, "-m", "nextlat", "train", self.recipe, *settings]

    @property
    def log(self) -> Path:
        return self.directory.with_suffix(".log")


def jobs(out: Path, seeds: Sequence[int]) -> list[Job]:
    """What the demo trains: both objectives, every recipe, every seed.

    Raises:
        NextLatError: a seed below zero, or the same seed twice.
    """
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise NextLatError(f"seeds {' '.join(map(str, seeds))}: give different whole numbers from 0 on.")
    made = []
    for recipe in RECIPES:
        for seed in seeds:
            for objective in OBJECTIVES:
                loaded = load_recipe(recipe, objective=objective, seed=seed)
                made.append(Job(recipe, objective, seed, loaded.steps, out / "runs" / loaded.run_name))
    return made


def run(todo: Sequence[Job]) -> Iterator[tuple[Job, int, str]]:
    """Run jobs, as many at a time as there are cores; yields (job, step, state) whenever one has moved.

    Raises:
        NextLatError: a job failed; the others are stopped and keep what they have.
    """
    waiting, running = list(todo), dict[Job, subprocess.Popen[bytes]]()
    try:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                job = waiting.pop(0)
                with write_errors(job.log.parent, "choose another --out"):
                    job.log.parent.mkdir(parents=True, exist_ok=True)
                    with job.log.open("wb") as log:
                        running[job] = subprocess.Popen(job.command, stdout=log, stderr=log, start_new_session=True)
                yield job, 0, "starting"
            for job, process in list(running.items()):
                code = process.poll()
                if code is None:
                    yield job, *_state(job)
                    continue
                del running[job]
                if code:
                    raise NextLatError(f"'{job.name}' failed: {_last_line(job.log)} (all of it is in {job.log})")
                yield job, job.steps, "done"
            time.sleep(POLL)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGINT)  # finishes its step, saves, and can go on another time
        for process in running.values():
            process.wait()


def _state(job: Job) -> tuple[int, str]:
    lines = [line for line in read_metrics(job.directory) if "loss" in line]
    if not lines:
        return 0, "starting"
    last = lines[-1]
    if last["step"] >= job.steps:
        return job.steps, "measuring"
    parts = (f"{name} {last[name]:.3f}" for name in ("next_token", "next_h", "kl") if name in last)
    return last["step"], "  ".join(parts)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("error: ") if lines else "it said nothing"


def collect(done: Sequence[Job], out: Path) -> Path:
    """One results.json with the entries of all runs."""
    entries = [entry for job in done for entry in read_results(job.directory)]
    with write_errors(out):
        write_json(out / RESULTS, entries)
    return out / RESULTS
