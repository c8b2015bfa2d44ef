"""Damages the files of finished runs and of a checkpoint, one at a time: what becomes of it?

    python benchmarks/fuzz.py [--mutations 500] [--seed 0] [--out docs/fuzz.json] [--only N]

Tiny runs are trained first (in --folder): a city by NextLat, the checkpoint of one that was
stopped, a hidden Markov process whose weights lie in several files, a text by JTP. Every mutation
follows from (seed, number) alone. After it, each command that reads the file is run in a fork of
its own. It must refuse the file in one sentence with exit code 2, or give the result of the whole
file.

Half of the mutations leave the checksums of a saved model as they were: an accident. The other half
write them anew: a directory of somebody else's making. There, and in files without checksums, a
value that is only another than it was cannot be told from the right one, and is "believed". But a
tensor that is missing, left over or of another form is never believed, and no code is ever run.

Goes on where it stopped, as long as --out is of the same seed. Exits with 1 if anything was wrong.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch

import nextlat.decoding.stream
import nextlat.model
import nextlat.report
import nextlat.serving.serve
from mutations import MARK, mutate
from nextlat.cli import app
from nextlat.errors import NextLatError
from nextlat.evaluation import evaluate
from nextlat.training.recipe import Recipe, load_recipe
from nextlat.training.train import Interrupted, train
from nextlat.weights import SUMS, read_sums, write_sums

TINY = [
    "steps=6",
    "batch_size=2",
    "schedule.name=constant",
    "schedule.warmup_steps=0",
    "schedule.decay_steps=0",
    "run.save_every=2",
    "run.eval_every=3",
    "run.log_every=1",
    "run.keep_checkpoints=3",
    "run.threads=1",
    "backbone.layers=1",
    "backbone.width=16",
    "backbone.heads=2",
]
CITY = ["city-tiny", *TINY, "task.tests=4", "task.held_out=20"]
HMM = ["hmm-small", *TINY, "task.tests=20", "task.length=16"]
TEXT = [
    "text-small",
    "objective=jtp",
    "objectives.jtp.horizon=2",
    *TINY,
    "task.train=stories.txt",
    "task.validation=",
    "task.held_out=10",
    "task.vocab_size=300",
    "task.row_length=32",
    "task.prompt_length=8",
    "task.tests=4",
    "task.probes=2",
    "task.probe_steps=3",
]
SETTINGS = {"city": CITY, "stopped": CITY, "hmm": HMM, "text": TEXT}
PROMPTS = {"city": "0 5", "text": "The cat"}  # of the runs that `generate` can continue
STORIES = [f"The cat number {i} went home. It was {'very ' * (i % 7)}happy!" for i in range(60)]
TIME_LIMIT, MEMORY_LIMIT = 180, 8 * 2**30  # seconds and bytes of one command
GOOD, BAD = ("refused", "same", "believed"), ("traceback", "crash", "wrong", "executed")

Command = Callable[[Path], Any]


# ---- the runs, and what reads their files ----


def recipe_of(settings: list[str], seed: int = 0) -> Recipe:
    return load_recipe(settings[0], settings[1:], seed=seed)


def make_runs(folder: Path) -> None:
    """The bases, and others of the same kind whose files are foreign to them."""
    for name in ("city", "hmm", "text"):
        for seed in (0, 1):
            evaluate(train(recipe_of(SETTINGS[name], seed), folder / f"{name}-{seed}"))
    for seed in (0, 1):
        directory = folder / f"hmm-{seed}"
        model = nextlat.load(directory)
        (directory / "model.safetensors").unlink()
        model.lm.save_pretrained(directory, max_shard_size="10KB")
        write_sums(directory)

        def stop(state: str, step: int, total: int) -> None:
            if step == 4:
                os.kill(os.getpid(), signal.SIGINT)

        with suppress(Interrupted):
            train(recipe_of(CITY, seed), folder / f"stopped-{seed}", progress=stop)


def cli(*arguments: Any) -> None:
    app([str(argument) for argument in arguments])


def told(path: Path, unstable: Callable[[Any], Any] = lambda content: content) -> Any:
    return unstable(json.loads(path.read_text()))


def without_speed(content: Any) -> Any:
    [run] = content["runs"]
    run["metrics"] = [m for m in run["metrics"] if not m["name"].startswith("decoding_speed")]
    if run["decoding"]:
        del run["decoding"]["tokens_per_second"]
    return content


def evaluated(run: Path) -> Any:
    """Each command returns, or leaves to be compared, what must not change."""
    cli("evaluate", run, "--no-progress")


def reported(run: Path) -> Any:
    cli("report", run, "--out", run.parent / "report")


def generated(run: Path) -> Any:
    cli("generate", run, PROMPTS[run.name], "--max-new-tokens", 12, "--draft-length", 2)


def resumed(run: Path) -> Any:
    cli("train", *SETTINGS[run.name], "--out", run, "--no-progress", "--no-evaluate")


def served(run: Path) -> Any:
    try:
        length = nextlat.serving.serve.checked_draft_length(run, 4, [], print)
    except NextLatError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(length)


RESULT: dict[Command, Callable[[Path, str], Any]] = {
    evaluated: lambda run, output: told(run / "results.json", without_speed),
    reported: lambda run, output: told(run.parent / "report/comparison.json"),
    generated: lambda run, output: output,
    resumed: lambda run, output: [
        path.read_bytes()
        for path in [*sorted(run.glob("model*.safetensors")), run / "nextlat/objective.safetensors"]
    ],
    served: lambda run, output: output,
}


def commands(base: str, name: str) -> list[Command]:
    """Those that read a file of a run."""
    if base == "stopped":
        return [resumed]
    if name in ("results.json", "scores.npz", "map.json", "beliefs.json"):
        return [reported]
    if name == "metrics.jsonl":
        return [reported, resumed]
    if name == "run.json":
        return [evaluated, reported, resumed]
    if name == "nextlat/config.json":
        return [served]
    if "token" in name or name == "generation_config.json":
        return [generated, resumed] if base in PROMPTS else [evaluated]
    return [evaluated, generated, resumed] if base in PROMPTS else [evaluated, resumed]


def targets(folder: Path) -> list[tuple[str, str]]:
    """(base, name of a file in it); of checkpoints the newest of the run that was stopped."""
    found = []
    for base in SETTINGS:
        run = folder / f"{base}-0"
        names = [p.relative_to(run).as_posix() for p in sorted(run.rglob("*")) if p.is_file()]
        skipped = ("checkpoint-2", "checkpoint-4") if base == "stopped" else ("checkpoint-",)
        skipped = (*skipped, "nextlat/config.json") if base == "text" else skipped  # not served
        found += [(base, name) for name in names if not name.startswith(skipped)]
    return found


# ---- running ----


def run_forked(command: Command, run: Path) -> tuple[int | None, str, str]:
    """Exit status (negative: signal, None: too long), standard output and error of a command."""
    files = [run.parent / name for name in ("stdout", "stderr")]
    child = os.fork()
    if child == 0:
        code = 70
        try:
            for number, file in enumerate(files, start=1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            try:
                command(run)
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 0
            except BaseException:
                import traceback

                traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline, status = time.monotonic() + TIME_LIMIT, None
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        status = None
    out, err = (file.read_text(errors="replace") for file in files)
    return None if status is None else os.waitstatus_to_exitcode(status), out, err


def outcome(command: Command, run: Path, expected: Any, *, believable: bool) -> tuple[str, str]:
    """What became of a command, and what it said."""
    code, out, err = run_forked(command, run)
    lines = err.strip().splitlines() or [""]
    if (run.parent / MARK).exists():
        return "executed", err
    if "Traceback" in err or "panicked" in err:
        return "traceback", err
    if code == 2:
        one = lines[-1].startswith("error: ") and sum("error: " in line for line in lines) == 1
        return "refused" if one else "traceback", err
    if code != 0:
        return "crash", f"exit status {code}\n{err}"
    if RESULT[command](run, out) == expected:
        return "same", ""
    return ("believed" if believable else "wrong"), out + err


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mutations", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/fuzz.json"))
    parser.add_argument("--folder", type=Path, help="of the runs; default: a temporary one")
    parser.add_argument("--only", type=int, help="run this mutation alone, and show all of it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="nextlat-fuzz-"))
    folder.mkdir(exist_ok=True)
    os.environ |= {"NEXTLAT_DATA": str(folder.resolve()), "XDG_CACHE_HOME": str(folder / "cache")}
    (folder / "stories.txt").write_text("<|endoftext|>".join(STORIES))
    if not (folder / "stopped-1").exists():
        make_runs(folder)
    scratch = folder / "scratch"

    def fresh(base: str) -> Path:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.copytree(folder / f"{base}-0", scratch / base)
        return scratch / base

    known: dict[tuple[str, Command], Any] = {}

    def expected(base: str, command: Command) -> Any:
        if (base, command) not in known:
            run = fresh(base)
            code, out, err = run_forked(command, run)
            if code != 0:
                sys.exit(f"{command.__name__} fails on the whole run {base}:\n{err}")
            known[base, command] = RESULT[command](run, out)
        return known[base, command]

    files = targets(folder)
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    rows = before.get("mutations", []) if before.get("seed") == options.seed else []
    numbers = range(len(rows), options.mutations) if options.only is None else [options.only]
    for number in numbers:
        rng = random.Random(f"{options.seed}-{number}")
        base, name = rng.choice(files)
        todo = {command: expected(base, command) for command in commands(base, name)}
        anew, found = rng.random() < 0.5, {}
        state = rng.getstate()
        for command, result in todo.items():
            run = fresh(base)
            rng.setstate(state)
            top = run / name.split("/")[0] if name.startswith("checkpoint-") else run
            summed = name == f"{top.relative_to(run)}/{SUMS}".removeprefix("./") or (
                (run / name).relative_to(top).as_posix() in read_sums(top)
            )
            mutation = mutate(run / name, rng, folder / f"{base}-1" / name)
            if anew and summed and (run / name).is_file():
                write_sums(top)
            believable = not mutation.structural and (anew or not summed)
            found[command.__name__], said = outcome(command, run, result, believable=believable)
            if options.only is not None:
                print(f"--- {command.__name__}: {found[command.__name__]}\n{said[-6000:]}")
        row = [number, f"{base}/{name}", mutation.kind, "anew" if anew and summed else "", found]
        print(*row, flush=True)
        rows.append(row)
        if options.only is None and (number % 10 == 9 or number == options.mutations - 1):
            write(options.out, options.seed, rows)
    if options.only is None:
        write(options.out, options.seed, rows)
        sys.exit(any(kind in BAD for row in rows for kind in row[-1].values()))


def write(out: Path, seed: int, rows: list[Any]) -> None:
    """Counts, and one line for each mutation."""
    total: Counter[str] = Counter(kind for row in rows for kind in row[-1].values())
    by_file: dict[str, Counter[str]] = {}
    for _, name, _, _, found in rows:
        by_file.setdefault(name, Counter()).update(found.values())
    head = {
        "seed": seed,
        "total": {kind: total[kind] for kind in (*GOOD, *BAD)},
        "files": {name: dict(counts) for name, counts in sorted(by_file.items())},
        "columns": ["number", "file", "mutation", "checksums", "outcome of each command"],
    }
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "mutations": [\n{lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
