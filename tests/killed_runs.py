"""Trains one recipe again and again in forked processes that die by SIGKILL at chosen moments; a
script for test_training.

Forked, so that torch is imported once. A moment is the n-th of the operations that could matter: a
training step, or a call that changes the disk. Prints JSON: the operations of an uninterrupted run,
and for every series of kills what was hit and whether the final files are those of the
uninterrupted run, byte for byte.
"""

import gc
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nextlat.training.recipe import Recipe, load_recipe
from nextlat.training.run_directory import read_metrics
from nextlat.training.train import train
from nextlat.training.trainer import NextLatTrainer

OVERRIDES = [
    "steps=6",
    "batch_size=2",
    "task.row_length=24",
    "run.save_every=2",
    "run.log_every=1",
    "run.eval_every=3",
    "task.tests=4",
    "schedule.warmup_steps=1",
    "schedule.decay_steps=2",
    "backbone.layers=1",
    "backbone.width=16",
]


def counted(on_operation: Callable[[str], None]) -> None:
    """Call `on_operation(name)` before everything that a kill could separate from what follows."""

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            on_operation(name)
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    for name in ("fsync", "replace", "mkdir", "unlink"):
        wrap(os, name)
    wrap(shutil, "rmtree")
    wrap(torch, "save")
    wrap(NextLatTrainer, "training_step")


def in_a_fork(recipe: Recipe, out: Path, die_at: int | None) -> list[str]:
    """Names of the operations begun until the end, or until the `die_at`-th (from 0), before which
    the process is killed."""
    log = out.with_suffix(".operations")
    log.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with log.open("w", buffering=1) as file:
                done = 0

                def on_operation(name: str) -> None:
                    nonlocal done
                    file.write(f"{name}\n")
                    if done == die_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    done += 1

                counted(on_operation)
                train(recipe, out, progress=False)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if not (killed if die_at is not None else status == 0):
        raise SystemExit(
            f"the run in {out} ended with status {status} when it should be killed at {die_at}"
        )
    return log.read_text().split()


def result(out: Path) -> tuple[list[bytes], list[dict[str, Any]]]:
    """What must not depend on interruptions: the model's files, and the metrics without times."""
    files = (
        "model.safetensors",
        "nextlat/objective.safetensors",
        "config.json",
        "checkpoint-6/optimizer.pt",
    )
    lines = [
        {key: value for key, value in line.items() if key != "seconds"}
        for line in read_metrics(out)
    ]
    return [(out / name).read_bytes() for name in files], lines


def main(folder: Path, series: int, seed: int) -> None:
    torch.set_num_threads(1)
    recipe = load_recipe("city-tiny", OVERRIDES)
    gc.freeze()  # the Trainer collects garbage when it starts: not the libraries' every time
    operations = in_a_fork(recipe, folder / "whole", None)
    expected = result(folder / "whole")
    rng = random.Random(seed)
    # One kill in every stretch of the run, so that steps, saves, rotation and export are all hit;
    # then another anywhere.
    report = []
    for number in range(series):
        out = folder / f"killed-{number}"
        low, high = number * len(operations) // series, (number + 1) * len(operations) // series
        hit = [in_a_fork(recipe, out, rng.randrange(low, high))[-1]]
        hit.append(
            in_a_fork(recipe, out, rng.randrange(0, max(1, (len(operations) - low) // 2)))[-1]
        )
        in_a_fork(recipe, out, None)
        leftovers = [path.name for path in out.glob(".nextlat-tmp-*")]
        report.append({"hit": hit, "identical": result(out) == expected, "leftovers": leftovers})
    print(json.dumps({"operations": operations, "series": report}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
