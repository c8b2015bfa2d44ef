"""Kill -9 a training run again and again at random moments, resume it, and compare its weights with
an uninterrupted run's.

    python benchmarks/kill_and_resume.py [--kills 20] [--seed 0] [--recipe city-tiny] [--out DIR]

Every attempt is the same command, `python -m nextlat train ...`, in a process of its own. Prints a
table of where the kills hit, and exits with 1 when a byte of the final model differs.
"""

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nextlat.training.checkpoints import checkpoint_step, checkpoints
from nextlat.training.run_directory import read_metrics

FILES = (
    "config.json",
    "model.safetensors",
    "nextlat/objective.json",
    "nextlat/objective.safetensors",
)
SAVE_EVERY = 10


def command(recipe: str, steps: int, run: Path) -> list[str]:
    settings = [f"steps={steps}", f"run.save_every={SAVE_EVERY}", "run.log_every=1"]
    return [
        sys.executable,
        "-m",
        "nextlat",
        "train",
        recipe,
        *settings,
        "--out",
        str(run),
        "--no-evaluate",
        "--no-progress",
    ]


def starts(run: Path) -> int:
    """How often training has begun in a run directory, by its record."""
    try:
        return 1 + len(json.loads((run / "run.json").read_text())["resumed_at"])
    except FileNotFoundError:
        return 0


def last_step(run: Path) -> int:
    return max((line["step"] for line in read_metrics(run)), default=0)


def attempt(arguments: list[str], run: Path, wait: float | None) -> str | None:
    """Run the command; killed `wait` seconds after training began there. Returns what it was doing
    then, or None if it ended."""
    before = starts(run)
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if wait is not None:
        while process.poll() is None and starts(run) == before:
            time.sleep(0.005)
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            half = sorted(
                path.name.removeprefix(".nextlat-tmp-") for path in run.glob(".nextlat-tmp-*")
            )
            return f"writing {', '.join(half)}" if half else "training"
    told, _ = process.communicate()
    if process.returncode:
        sys.exit(f"{' '.join(arguments)} ended with {process.returncode}:\n{told}")
    return None


def digests(run: Path) -> dict[str, str]:
    return {name: hashlib.sha256((run / name).read_bytes()).hexdigest()[:16] for name in FILES}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--recipe", default="city-tiny")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=None, help="default: a temporary directory")
    options = parser.parse_args()
    folder = options.out or Path(tempfile.mkdtemp(prefix="nextlat-kill-"))
    rng = random.Random(options.seed)

    whole = folder / "whole"
    attempt(command(options.recipe, options.steps, whole), whole, None)
    seconds = json.loads((whole / "run.json").read_text())["seconds"]
    print(f"uninterrupted: {options.steps} steps in {seconds:.1f} s of training\n")
    print(f"{'kill':>4}  {'after':>7}  {'step':>4}  {'last checkpoint':>15}  while")
    killed, kills, round_ = folder / "killed-1", 0, 1
    arguments = command(options.recipe, options.steps, killed)
    same = True
    while True:
        # Short enough that the kills fall into one run, long enough that it gets on between them.
        wait = rng.uniform(0, 2.5 * seconds / options.kills) if kills < options.kills else None
        doing = attempt(arguments, killed, wait)
        if doing is not None:
            kills += 1
            done = checkpoints(killed)
            newest = str(checkpoint_step(done[-1])) if done else "-"
            print(
                f"{kills:>4}  {wait:>5.2f} s  {last_step(killed):>4}  {newest:>15}  {doing}",
                flush=True,
            )
            continue
        same = same and digests(killed) == digests(whole)
        print(
            f"      finished, {starts(killed)} starts: {'identical' if same else 'DIFFERENT'}",
            flush=True,
        )
        if kills >= options.kills:
            break
        round_ += 1  # the run ended before all kills were spent: another one takes the rest
        killed = folder / f"killed-{round_}"
        arguments = command(options.recipe, options.steps, killed)
    print()
    for name in FILES:
        print(f"{name:<32} whole {digests(whole)[name]}  killed {digests(killed)[name]}")
    print(
        f"\n{kills} kills: the final weights are "
        f"{'identical, byte for byte' if same else 'DIFFERENT'}."
    )
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
