"""Training runs side by side, each a process of its own: what the demo and a comparison are made
of.

Every job is the command `nextlat train RECIPE --objective ... --seed ...`; this module only starts
them, reads and shows how far they are from their metrics.jsonl, and gathers the results. Stopped
anywhere, the same jobs go on where they were.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nextlat.errors import NextLatError
from nextlat.evaluation import RESULTS, read_results
from nextlat.files import write_errors, write_json
from nextlat.training.run_directory import is_finished, read_metrics

WAY_OUT = "choose another --out"
POLL = 0.5  # seconds between two looks at the jobs
SHOWN = ("next_token", "next_h", "kl", "multi_token", "pairs")  # parts of the loss


@dataclass(frozen=True)
class Job:
    """One model to train and measure.

    Attributes:
        recipe: built-in name or path. objective, seed: of the run. steps: that it takes. directory:
            where it goes.
        settings: further arguments of `nextlat train`, overrides of the recipe and options.
        label: what it is called; by default by recipe, objective and seed.
    """

    recipe: str
    objective: str
    seed: int
    steps: int
    directory: Path
    settings: tuple[str, ...] = ()
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or f"{self.recipe} {self.objective} s{self.seed}"

    @property
    def command(self) -> list[str]:
        options = [
            "--objective",
            self.objective,
            "--seed",
            str(self.seed),
            "--out",
            str(self.directory),
            "--no-progress",
        ]
        return [sys.executable, "-m", "nextlat", "train", self.recipe, *self.settings, *options]

    @property
    def log(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}.log")

    @property
    def done(self) -> bool:
        """Whether the model is trained and measured."""
        return is_finished(self.directory) and (self.directory / RESULTS).exists()


def check_seeds(seeds: Sequence[int]) -> None:
    """Seeds that can be those of one comparison.

    Raises:
        NextLatError: a seed below zero, or the same seed twice.
    """
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise NextLatError(
            f"seeds {' '.join(map(str, seeds))}: give different whole numbers from 0 on."
        )


def run(
    todo: Sequence[Job], processes: int | None = None, failures: dict[Job, str] | None = None
) -> Iterator[tuple[Job, int, str]]:
    """Run jobs side by side; yields (job, step, state) whenever one has moved.

    Args:
        processes: at a time; None = as many as there are cores.
        failures: where to put why a job failed, for the others to go on; None = one that fails ends
            all.

    Raises:
        NextLatError: a job failed, and `failures` is None; the others are stopped and keep what
            they have.
    """
    processes = processes or os.cpu_count() or 1
    _make_room(todo)
    waiting, running = list(todo), dict[Job, subprocess.Popen[bytes]]()
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
                reason = f"'{job.name}' failed: {_last_line(job.log)} (all of it is in {job.log})"
                if failures is None:
                    raise NextLatError(reason)
                failures[job] = reason
                yield job, _state(job)[0], "failed"
            time.sleep(POLL)
    finally:
        for process in running.values():
            process.send_signal(
                signal.SIGINT
            )  # finishes its step, saves, and can go on another time
        for process in running.values():
            process.wait()


def watch(
    todo: Sequence[Job], processes: int | None = None, failures: dict[Job, str] | None = None
) -> None:
    """`run`, with how far each job is on standard error.

    Where that is no terminal, only the end shows.
    """
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    _make_room(todo)  # what is wrong there is said without bars around it
    with Progress(*columns, console=Console(stderr=True)) as bars:
        rows = {job: bars.add_task(job.name, total=job.steps, state="waiting") for job in todo}
        for job, step, state in run(todo, processes, failures):
            bars.update(rows[job], completed=step, state=state)


def _make_room(todo: Sequence[Job]) -> None:
    for job in todo:
        with write_errors(job.log.parent, WAY_OUT):
            job.log.parent.mkdir(parents=True, exist_ok=True)


def _state(job: Job) -> tuple[int, str]:
    lines = [line for line in read_metrics(job.directory) if "loss" in line]
    if not lines:
        return 0, "starting"
    last = lines[-1]
    if last["step"] >= job.steps:
        return job.steps, "measuring"
    parts = (f"{name} {last[name]:.3f}" for name in SHOWN if name in last)
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
