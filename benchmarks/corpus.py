"""A text larger than memory should be: `python benchmarks/corpus.py TOKENIZER TEXT [TEXT ...]
--folder DIRECTORY [--gigabytes 2] [--out docs/corpus.json]`.

A corpus is put together from pieces of real text and made into tokens as a recipe does it: once
unbroken, once by a process that is killed half-way and another that goes on; both must give the
same files. Then two ranks and their workers train on it. Of every process the peak of its resident
memory (VmHWM) is told. The rate is compared with `encode_batch` of the tokenizers library on the
same documents with all cores; both take turns.

Everything in the folder that this makes is deleted again. For Linux, whose /proc it reads.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers

ROUNDS = 7
SAMPLE = 30_000_000  # characters of a round
MAKE = (
    "import sys, json; from nextlat.tasks.text.text import TextConfig; "
    "task = TextConfig(**json.loads(sys.argv[1])).build(); "
    "print(json.dumps([len(task.train), task.train.total, task.fingerprint()]))"
)


def documents(texts: list[str], characters: int) -> Iterator[str]:
    """Pieces of 200 to 6,000 characters of real text, which together have so many."""
    rng = random.Random(0)
    while characters > 0:
        text = rng.choice(texts)
        size = min(len(text), int(rng.lognormvariate(7.2, 0.8)) + 200, 6000)
        start = rng.randrange(len(text) - size + 1)
        yield text[start : start + size]
        characters -= size


def write(path: Path, texts: list[str], characters: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(documents(texts, characters)):
            file.write(json.dumps({"id": number, "text": text}, ensure_ascii=False) + "\n")


def memory(process: int) -> dict[int, tuple[str, float]]:
    """Of a process and all that it started: a name, and the peak of its resident memory in MB."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        words = Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:  # it has just ended
        return {}
    peak = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    found = {process: (words, int(peak[0]) / 1e3)} if peak else {}  # none when it has ended
    for child in children:
        found |= memory(int(child))
    return found


def watched(
    command: list[str], environment: dict[str, str], stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Run a command to its end, or kill it when `stop` says so."""
    start, peaks = time.perf_counter(), dict[int, tuple[str, float]]()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (killed := stop()):
            peaks |= memory(process.pid)
            time.sleep(0.1)
        killed = process.poll() is None
        if killed:
            process.kill()
        output = process.stdout.read() if process.stdout and not killed else ""
    if process.returncode and not killed:
        raise SystemExit(f"{command} ended with {process.returncode}")
    mine = [round(peak) for words, peak in peaks.values() if "nextlat" in words]
    seconds = round(time.perf_counter() - start, 1)
    return {"seconds": seconds, "peak_mb": sorted(mine, reverse=True), "output": output}


def rates(tokenizer: str, folder: Path, texts: list[str]) -> dict[str, Any]:
    """Characters a second of the bare library and of the making of a corpus, which also reads and
    stores."""
    sample = [*documents(texts, SAMPLE)]
    write(folder / "sample.jsonl", texts, SAMPLE)
    core = tokenizers.Tokenizer.from_file(str(Path(tokenizer, "tokenizer.json")))
    core.no_truncation()
    core.no_padding()
    from nextlat.tasks.text.corpus import Corpus
    from nextlat.tasks.text.documents import from_file
    from nextlat.tasks.text.tokens import Encoder, existing_tokenizer

    encoder = Encoder(existing_tokenizer(tokenizer))

    def bare() -> None:
        for start in range(0, len(sample), 1000):
            core.encode_batch(sample[start : start + 1000], add_special_tokens=False)

    def corpus() -> None:
        shutil.rmtree(os.environ["NEXTLAT_CACHE"], ignore_errors=True)
        source = from_file(str(folder / "sample.jsonl"), "train", column="text", separator="\n")
        Corpus(source, encoder).tokens(10**12)

    seconds: dict[str, list[float]] = {"encode_batch": [], "corpus": []}
    cpu: dict[str, list[float]] = {"encode_batch": [], "corpus": []}  # busy machines change it less
    for turn in range(ROUNDS + 1):
        for name, action in (("encode_batch", bare), ("corpus", corpus)):
            start, cpu_start = time.perf_counter(), time.process_time()
            action()
            if turn:  # the first one fills the library's own cache of words
                seconds[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - cpu_start)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    return {
        "characters": SAMPLE,
        "megabytes_a_second": {
            name: [round(SAMPLE / 1e6 / x, 2) for x in values] for name, values in seconds.items()
        },
        "corpus_to_encode_batch": round(statistics.median(ratios), 3),
        "ratios": [round(x, 3) for x in ratios],
        "cpu_seconds": {name: [round(x, 2) for x in values] for name, values in cpu.items()},
    }


def digests(cache: Path) -> dict[str, str]:
    """Of all files of tokens, by name."""
    found = {}
    for path in sorted(cache.rglob("*.safetensors")):
        with path.open("rb") as file:
            found[f"{path.parent.name}/{path.name}"] = hashlib.file_digest(
                file, "sha256"
            ).hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", help="a directory with tokenizer.json")
    parser.add_argument("texts", nargs="+", type=Path, help="files of which the corpus is made")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    folder = args.folder / "corpus-benchmark"
    folder.mkdir(parents=True)
    try:
        found = measure(args, folder)
    finally:
        shutil.rmtree(folder)
    text = json.dumps(found, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    texts = [path.read_text(encoding="utf-8") for path in args.texts]
    os.environ["NEXTLAT_CACHE"] = str(folder / "rate")
    found: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": {"tokenizers": tokenizers.__version__, "python": platform.python_version()},
        "rate": rates(args.tokenizer, folder, texts),
    }
    print(found["rate"], file=sys.stderr)
    data = folder / "corpus.jsonl"
    write(data, texts, int(args.gigabytes * 1e9))
    settings = {"train": str(data), "held_out": 100, "max_tokens": 10**12}
    settings |= {"tokenizer": args.tokenizer}

    def make(cache: str, stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        environment = {**os.environ, "NEXTLAT_CACHE": str(folder / cache)}
        made = watched([sys.executable, "-c", MAKE, json.dumps(settings)], environment, stop)
        print(cache, made, file=sys.stderr)
        return made

    whole = make("whole")
    count, total, fingerprint = json.loads(whole.pop("output"))
    shards = digests(folder / "whole")
    found["corpus"] = {
        "bytes": data.stat().st_size,
        "documents": count,
        "tokens": total,
        "shards": len(shards),
        "bytes_of_shards": sum(x.stat().st_size for x in folder.glob("whole/**/*.safetensors")),
    }
    found["unbroken"] = whole
    largest = max(folder.glob("whole/corpora/*/*.safetensors"), key=lambda x: x.stat().st_size)
    half = f"{max(0, len(shards) // 2 - 1):06}.safetensors"  # one of them is of held-out documents
    reached = folder / "killed/corpora" / largest.parent.name / half
    killed = make("killed", reached.exists)
    kept = {path: path.stat().st_mtime_ns for path in reached.parent.glob("0*.safetensors")}
    resumed = make("killed")
    found["killed"] = {
        "shards_when_killed": len(kept),
        "killed": {key: killed[key] for key in ("seconds", "peak_mb")},
        "resumed": {key: resumed[key] for key in ("seconds", "peak_mb")},
        "kept_as_they_were": all(path.stat().st_mtime_ns == x for path, x in kept.items()),
        "same_files": digests(folder / "killed") == shards,
        "same_fingerprint": json.loads(resumed["output"])[2] == fingerprint,
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [
        "-m",
        "nextlat",
        "train",
        "text-small",
        "--out",
        str(folder / "run"),
        "--no-evaluate",
    ]
    command += ["steps=6", "batch_size=16", "schedule.warmup_steps=1", "schedule.decay_steps=2"]
    command += ["backbone.layers=2", "backbone.width=64", "run.threads=1", "run.workers=1"]
    command += ["objectives.nextlat.draft_vocabulary=1000", "run.eval_every=0", "--no-progress"]
    command += ["task.validation=", "task.vocab_size=", "run.save_every=0"]
    command += [f"task.{key}={value}" for key, value in settings.items()]
    trained = watched(command, {**os.environ, "NEXTLAT_CACHE": str(folder / "killed")})
    del trained["output"]
    found["training"] = {"ranks": 2, "steps": 6, **trained}
    return found


if __name__ == "__main__":
    main()
