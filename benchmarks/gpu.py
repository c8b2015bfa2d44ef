"""Everything that was never run on a GPU: `python benchmarks/gpu.py [MODEL] [--minutes 25]`.

Stages in the order of their value, each in a process of its own: losses, gradients and greedy
tokens beside a CPU's; decoding speed of a model of 138 M weights, trained here in three minutes,
against the compiled static cache of transformers; what drafts cost; tests/test_gpu.py; the cost and
memory of training; torchrun; vLLM; a study. Nothing is downloaded: the model is trained on
TinyStories where recipe text-small finds them, otherwise on the sources of the installed packages.
With MODEL, the directory of a chat model, a drafter is trained beside it on its own answers, and
its decoding is measured instead.

Each result is written to --results (docs/gpu.json) as soon as it is there. A stage begins only if
it is likely to end within --minutes; the same command goes on with what is missing, then with what
failed. A short table is printed at every end. Exit code 1: a stage failed.

    PYTHONPATH=src python benchmarks/gpu.py --minutes 25      # in a bare checkout
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import gpu_stages as stages
import training
from gpu_bench import SMOKE, Bench, Result, Sizes, prepare
from nextlat.errors import NextLatError
from nextlat.files import write_json

PREPARE = "the model that decodes"


@dataclass(frozen=True)
class Stage:
    """One row of the table.

    Attributes:
        measure: what is done.
        seconds: that it may take on an H100, importing torch included.
        decodes: whether it is about the model that PREPARE trains, hence about MODEL.
        fills: whether it takes all the time that is left.
    """

    measure: Callable[[Bench], Result]
    seconds: int
    decodes: bool = False
    fills: bool = False


def speed(batch: int, compile: bool) -> Callable[[Bench], Result]:
    return partial(stages.speed, batch=batch, compile=compile)


STAGES = {
    "equality with a CPU": Stage(stages.equality, 60),
    PREPARE: Stage(prepare, 200, decodes=True),
    "compiled decoding, batch 1": Stage(speed(1, True), 240, decodes=True),
    "costs of drafts": Stage(stages.costs, 60),
    "tests/test_gpu.py": Stage(stages.tests, 200),
    "compiled decoding, batch 8": Stage(speed(8, True), 240, decodes=True),
    "training": Stage(partial(stages.training_cost, compile=False), 80),
    "eager decoding, batch 1": Stage(speed(1, False), 160, decodes=True),
    "eager decoding, batch 8": Stage(speed(8, False), 80, decodes=True),
    "training, layers compiled": Stage(partial(stages.training_cost, compile=True), 130),
    "memory of the losses": Stage(stages.memory, 40),
    "drafter of a frozen model": Stage(stages.frozen, 40),
    "torchrun": Stage(stages.processes, 70),
    "vLLM": Stage(stages.vllm, 20, decodes=True),
    "study": Stage(stages.study, 300, fills=True),
}


stopping = threading.Event()  # by Ctrl-C or SIGTERM


def main() -> int:
    """Run what is missing and fits, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", type=Path, help="directory of a chat model")
    parser.add_argument("--minutes", type=float, default=25, help="default 25")
    parser.add_argument(
        "--results", type=Path, help="default docs/gpu.json, or docs/gpu-MODEL.json"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="directory of runs")
    parser.add_argument("--stages", nargs="+", choices=STAGES, metavar="STAGE", help="only these")
    parser.add_argument("--smoke", action="store_true", help="all at toy sizes, on a CPU too")
    given = parser.parse_args()
    if not torch.cuda.is_available() and not given.smoke:
        raise NextLatError("torch finds no GPU: give --smoke to try the stages at toy sizes.")
    until = time.time() + 60 * given.minutes
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    model = given.model and given.model.resolve()
    bench = Bench(SMOKE if given.smoke else Sizes(), work, model, until)
    results = Results(
        given.results or Path("docs") / f"gpu{f'-{model.name}' if model else ''}.json"
    )
    results.open(bench)
    chosen = {name: stage for name, stage in STAGES.items() if stage.decodes or model is None}
    if given.stages:
        chosen = {name: stage for name, stage in chosen.items() if name in given.stages}
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopping.set())
    run(chosen, bench, results, 0 if given.smoke else 1)
    print(results.table(chosen))
    if stopping.is_set():
        print("stopped: the same command goes on from here.", file=sys.stderr)
        return 130
    return 1 if any("error" in results.of(name) for name in chosen) else 0


class Results:
    """The JSON file: {"settings": ..., "stages": {name: outcome}}. An outcome has the seconds that
    it took and the device, and a result or an error."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {}

    def open(self, bench: Bench) -> None:
        """Read what there is.

        Raises:
            NextLatError: results of other settings.
        """
        model = bench.model and bench.model.name
        settings = json.loads(json.dumps({"model": model, **asdict(bench.sizes)}))
        self.content = {"settings": settings, "stages": {}}
        if self.path.exists():
            self.content = json.loads(self.path.read_text())
            if self.content["settings"] != settings:
                raise NextLatError(
                    f"{self.path} holds results of another model or of other sizes: give another "
                    "file as --results."
                )

    def of(self, name: str) -> dict[str, Any]:
        return self.content["stages"].get(name, {})

    def add(self, name: str, outcome: dict[str, Any]) -> None:
        self.content["stages"][name] = outcome
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)

    def is_done(self, name: str) -> bool:
        return self.of(name).get("result", {}).get("finished", "result" in self.of(name))

    def table(self, names: Any) -> str:
        """Markdown; a line for each stage."""
        lines = ["| stage | result | s | on |", "|---|---|---|---|"]
        for name in names:
            one = self.of(name)
            said = one["result"]["summary"] if "result" in one else one.get("error", "not run yet")
            seconds = f"{one['seconds']:.0f}" if one else ""
            said = f"FAILED: {said}" if "error" in one else said
            lines.append(f"| {name} | {said.replace('|', '/')} | {seconds} | {one.get('on', '')} |")
        return "\n".join(lines)


def run(chosen: dict[str, Stage], bench: Bench, results: Results, scale: float) -> None:
    """Every stage that is missing, then those that failed before, as far as the time goes.

    Args:
        scale: of the estimates.
    """
    todo = [name for name in chosen if not results.is_done(name)]
    if any(chosen[name].decodes for name in todo) and not bench.is_trained and PREPARE not in todo:
        todo.insert(0, PREPARE)  # its directory has gone, or it was not asked for
    for name in sorted(todo, key=lambda name: "error" in results.of(name)):
        stage = STAGES[name]
        if stage.decodes and name != PREPARE and not bench.is_trained:
            continue
        left, expected = bench.until - time.time(), scale * stage.seconds
        if left <= 0 or expected > left or stopping.is_set():
            continue
        print(f"{name}: {expected:.0f} s expected, {left:.0f} s left", file=sys.stderr, flush=True)
        limit = left if stage.fills else min(left, 3 * stage.seconds)
        outcome = outcome_of(name, bench, limit)
        if outcome:
            results.add(name, outcome)


def outcome_of(name: str, bench: Bench, limit: float) -> dict[str, Any]:
    """Of a stage in a process of its own, which is ended after `limit` seconds; {} where that is
    the end of the call, so that it says nothing of the stage."""
    # A GPU survives no fork; without one it saves the imports.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "fork")
    path = bench.work / f"outcome-{os.getpid()}.json"
    path.unlink(missing_ok=True)
    process = context.Process(target=in_process, args=(name, bench, path))
    started = time.time()
    process.start()
    while process.is_alive() and time.time() < started + limit and not stopping.is_set():
        process.join(0.2)
    if process.is_alive():
        end(process)
    if path.exists():
        outcome = json.loads(path.read_text())
        path.unlink()
    elif time.time() >= bench.until or stopping.is_set():
        return {}
    else:
        over = time.time() - started >= limit
        how = f"not over after {limit:.0f} s" if over else f"ended by code {process.exitcode}"
        outcome = {"error": how}
    return {"seconds": time.time() - started, **outcome}


def end(process: Any) -> None:
    """With all that it started: by Ctrl-C first, which saves a training run."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            os.killpg(process.pid, number)
            for _ in range(100):
                process.join(0.2)
                os.killpg(process.pid, 0)
    except ProcessLookupError:  # none is left of its group, or it has not made one yet
        process.kill()
        process.join()


def die_with_parent() -> None:
    """A parent that was killed has ended nothing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def in_process(name: str, bench: Bench, path: Path) -> None:
    """The child's part: leaves the outcome in a file."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=die_with_parent, daemon=True).start()
    if bench.sizes == SMOKE:
        torch.set_num_threads(1)
        torch.compiler.set_stance("force_eager")  # graphs take longer than all else together
    try:
        outcome: dict[str, Any] = {"result": STAGES[name].measure(bench)}
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        outcome = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    machine = training.machine(bench.device)
    write_json(path, {"on": machine["device"], "machine": machine, **outcome})


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NextLatError as error:
        sys.exit(str(error))
