"""The measurements of `gpu.py`: a function of the bench for each, which returns its figures and, as
`summary`, what the table says of them."""

import json
import signal
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

import decoding
import nextlat
import training
from gpu_bench import Bench, Result
from nextlat.decoding.draft_length import Costs
from nextlat.decoding.prepared import measured_costs
from nextlat.decoding.speed import STATIC, TRANSFORMERS, Way, compare_decoding
from nextlat.objectives import BST, OBJECTIVES
from nextlat.training.run_directory import read_metrics

ROOT = Path(__file__).parents[1]
LAST = 30  # seconds in which a study saves what it has
SAME = 1e-3  # relative difference of losses and gradients between devices


def command(*words: str | Path) -> str:
    """Run Python with these arguments from the repository; its output.

    Raises:
        RuntimeError: it failed; with the last line that it wrote.
    """
    found = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    if found.returncode:
        lines = (found.stderr.strip() or found.stdout.strip() or "no output").splitlines()
        raise RuntimeError(f"{words[0]} {words[1]} exited with {found.returncode}: {lines[-1]}")
    return found.stdout


def spread(values: list[float]) -> str:
    """Median and range of sorted values."""
    return f"{statistics.median(values):.2f} ({values[0]:.2f}-{values[-1]:.2f})"


# ---- correctness ----


def tests(bench: Bench) -> Result:
    """tests/test_gpu.py, which compares losses, gradients, tokens and resumed runs with a CPU's."""
    report = bench.work / "tests.xml"
    several = ["-n", "4"] if find_spec("xdist") and bench.device.type == "cuda" else []
    options = ["-p", "no:cacheprovider", *several, f"--junitxml={report}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/test_gpu.py", *options], cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    if not report.exists():
        raise RuntimeError(f"pytest wrote no report: {(done.stderr or done.stdout)[-300:]}")
    cases = [*xml.parse(report).getroot().iter("testcase")]
    kinds = {"failed": ("failure", "error"), "skipped": ("skipped",)}
    counts = {
        kind: [str(case.get("name")) for case in cases if any(case.find(x) is not None for x in of)]
        for kind, of in kinds.items()
    }
    passed = len(cases) - sum(map(len, counts.values()))
    if counts["failed"]:
        raise RuntimeError(
            f"{len(counts['failed'])} of {len(cases)}: {', '.join(counts['failed'])}"
        )
    summary = f"{passed} passed, {len(counts['skipped'])} skipped"
    return {"summary": summary, "passed": passed, "skipped": len(counts["skipped"])}


def equality(bench: Bench) -> Result:
    """Losses and gradients beside a CPU's, and greedy tokens beside those of transformers."""
    worst = {}
    ids = bench.tokens(4, min(128, bench.sizes.length))
    for name, (config_type, objective_type) in OBJECTIVES.items():
        if objective_type is BST:
            continue  # draws its pairs anew, on each device others
        config = config_type(**({"horizon": 2} if "horizon" in config_type.model_fields else {}))
        found = []
        for device in ("cpu", bench.device):
            torch.manual_seed(0)
            lm = nextlat.llama(bench.sizes.vocabulary, layers=4, width=256, seed=0)
            model = nextlat.attach(lm, config).to(device)
            loss = model(ids.to(device), ids.to(device)).loss
            loss.backward()
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            found.append((loss.detach().cpu(), torch.cat(gradients).cpu()))
        (loss, gradient), (other, changed) = found
        worst[name] = [float((other - loss).abs() / loss.abs()),
                       float((changed - gradient).norm() / gradient.norm())]  # fmt: skip
    if off := [name for name, pair in worst.items() if max(pair) > SAME]:
        raise RuntimeError(f"loss or gradient of {off[0]} off by {max(worst[off[0]]):.1e}")
    equal = {}
    prompts = [*bench.tokens(8, 12).cpu()]
    for dtype in (torch.float32, torch.bfloat16):
        lm = bench.llama(initializer_range=0.1)  # its tokens are not nearly equally likely
        model = nextlat.attach(lm, nextlat.NextLatConfig()).to(bench.device, dtype).eval()
        timings = compare_decoding(
            model, prompts, draft_lengths=[0, 1, 4, "auto"], batch=8, repetitions=1,
            max_new_tokens=min(64, bench.sizes.length - 16),
        )  # fmt: skip
        equal[str(dtype).removeprefix("torch.")] = same_outputs(timings)
    shown = "; ".join(
        f"{dtype} greedy rows as transformers': "
        + ", ".join(f"{way} {rows}/8" for way, rows in ways.items())
        for dtype, ways in equal.items()
    )
    most = max(max(pair) for pair in worst.values())
    summary = f"losses and gradients within {most:.0e} of a CPU's; {shown}"
    return {"summary": summary, "relative_differences": worst, "equal_rows": equal}


def same_outputs(timings: dict[Way, Any]) -> dict[str, int]:
    """Way -> how many prompts were continued as transformers' own `generate` did."""
    theirs = timings[TRANSFORMERS].outputs
    return {
        str(way): sum(a == b for a, b in zip(timing.outputs, theirs, strict=True))
        for way, timing in timings.items()
        if way != TRANSFORMERS
    }


# ---- decoding ----


def speed(bench: Bench, batch: int, compile: bool) -> Result:
    """Tokens per second of the trained model in bf16, against `generate` of transformers with its
    growing and its compiled static cache: interleaved, on the same prompts."""
    s = bench.sizes
    model = nextlat.load(bench.run).to(bench.device, bench.dtype).eval()
    prompts = [torch.tensor(ids) for ids in json.loads(bench.prompts.read_text())]
    prompts = prompts[: max(s.prompts, batch)]
    lengths: list[Way] = [0, *s.draft_lengths, "auto"]
    room = model.config.max_position_embeddings - max(map(len, prompts))
    timings = compare_decoding(
        model, prompts, draft_lengths=lengths, max_new_tokens=min(s.new_tokens, room), batch=batch,
        repetitions=s.repetitions, compile=compile, static_baseline=True,
    )  # fmt: skip
    found = decoding.result(model, timings, 0.0, batch)
    best = max(
        lengths[1:], key=lambda way: statistics.median(timings[way].against(timings[STATIC]))
    )
    ways = {
        str(way): f"{way} {spread(timings[way].against(timings[STATIC]))}"
        for way in dict.fromkeys((0, best, "auto"))
    }
    summary = (
        f"times the static cache: {', '.join(ways.values())}; "
        f"{timings[best].total.mean_acceptance_length or 1:.2f} tokens a cycle at {best}, "
        f"{spread(timings[best].against(timings[TRANSFORMERS]))} times the growing cache"
    )
    equal = same_outputs(timings)
    return {"summary": summary, "equal_outputs": equal, "prompts": len(prompts), **found}


def costs(bench: Bench) -> Result:
    """A draft step (c) and verification (v) in plain passes, uncompiled, for the whole head and for
    a draft vocabulary; and the speeds that they allow at several rates of acceptance."""
    found: dict[str, Any] = {}
    shown = []
    for name, number in (("whole head", None), ("draft vocabulary", bench.sizes.draft_vocabulary)):
        config = nextlat.NextLatConfig(draft_vocabulary=number)
        model = nextlat.attach(bench.llama(), config).to(bench.device, bench.dtype).eval()
        found[name] = {}
        for batch in bench.sizes.batches:
            model.generate(
                bench.tokens(batch, min(32, bench.sizes.length // 2)), max_new_tokens=4,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
            measured = measured_costs(model.objective, batch, sampled=False)
            if measured is None:
                raise RuntimeError(f"nothing was measured for batch {batch}")
            found[name][batch] = {
                "plain_pass_ms": 1e3 * measured.verify[0], "c": measured.c,
                "v": [measured.v(k) for k in range(len(measured.verify))],
                "ceilings": {str(a): ceiling(measured, a) for a in (0.6, 0.7, 0.8, 0.9)},
            }  # fmt: skip
        c, v = (found[name][bench.sizes.batches[0]][key] for key in ("c", "v"))
        shown.append(f"{name} c {c:.2f}, v_4 {v[4]:.2f}")
    return {"summary": "batch 1: " + "; ".join(shown), **found}


def ceiling(measured: Costs, acceptance: float) -> list[float]:
    """The best speed-up, and its k, where each drafted token survives with this probability."""
    speeds = [
        (measured.ceiling(sum(acceptance**i for i in range(k + 1)), k), k)
        for k in range(len(measured.verify))
    ]
    return [float(x) for x in max(speeds)]


# ---- training ----


def shape(bench: Bench, **changes: Any) -> Namespace:
    """As `training.py` takes it."""
    names = ("layers", "width", "heads", "vocabulary", "length", "batch", "turns")
    given = {name: getattr(bench.sizes, name) for name in names}
    return Namespace(**given | {"steps": 2, "horizons": [1, 4], "precision": "bf16"} | changes)


def training_cost(bench: Bench, compile: bool) -> Result:
    """Steps per second of every objective against next-token prediction, bf16."""
    arguments = shape(bench, **({"horizons": [1]} if compile else {}))
    ways = training.our_ways(arguments, bench.device)
    if compile:  # the others differ in their losses, which are not compiled
        ways = [way for way in ways if way.name in ("next-token", "nextlat")]
        for way in ways:
            way.model.backbone.transformer.compile()
    training.measure(ways, arguments, bench.device)
    rows = [training.figures(way, ways) for way in ways]
    tokens = arguments.batch * arguments.length * rows[0]["steps_per_second"]
    shown = ", ".join(
        f"{row['name']} d={row['horizon']} {spread(row['speed_against_next_token'])}"
        for row in rows[1:]
    )
    return {"summary": f"next-token {tokens:,.0f} tokens/s; times that: {shown}", "ways": rows}


def memory(bench: Bench) -> Result:
    """Peak of a step with a large vocabulary: losses in chunks never hold all logits."""
    arguments = shape(
        bench, layers=min(2, bench.sizes.layers), vocabulary=bench.sizes.wide, turns=0
    )
    ways = training.our_ways(arguments, bench.device)
    training.measure(ways, arguments, bench.device)
    logits = 4 * arguments.batch * arguments.length * arguments.vocabulary
    peaks = {f"{way.name} d={way.horizon}": way.memory for way in ways}
    shown = ", ".join(f"{name} {peak / logits:.2f}" for name, peak in peaks.items())
    summary = f"peak of a step / fp32 logits of all positions ({logits / 2**30:.1f} GiB): {shown}"
    return {"summary": summary, "logits_bytes": logits, "peak_bytes": peaks}


def frozen(bench: Bench) -> Result:
    """A step of the drafter beside a frozen transformer: states computed, given, and with a draft
    vocabulary."""
    arguments = shape(bench, length=min(256, bench.sizes.length))
    known: dict[str, Tensor] = {}
    ways = []
    for name, number, given in (
        ("states computed", None, False),
        ("states given", None, True),
        ("draft vocabulary", bench.sizes.draft_vocabulary, True),
    ):
        lm = bench.llama().to(torch.bfloat16).requires_grad_(False)
        config = nextlat.NextLatConfig(horizon=4, draft_vocabulary=number)
        model = nextlat.attach(lm, config).to(bench.device).train()
        model.objective.float()

        def loss(ids: Tensor, model: Any = model, given: bool = given) -> Tensor:
            if given and not known:  # the same for both, and made before a step is timed
                with torch.no_grad():
                    known["states"] = model.backbone.states(ids)
            return model(ids, ids, states=known["states"] if given else None).loss

        ways.append(training.Way(name, 4, ways[0].name if ways else name, model, loss, None))
    training.measure(ways, arguments, bench.device)
    seconds = {way.name: statistics.median(way.seconds) for way in ways}
    shown = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in seconds.items())
    peaks = {way.name: way.memory for way in ways}
    summary = f"{arguments.batch} x {arguments.length} tokens, d=4: {shown}"
    return {"summary": summary, "seconds": seconds, "peak_bytes": peaks}


def processes(bench: Bench) -> Result:
    """One process, torchrun with one (through NCCL on a GPU), and FSDP2 with two (not where there
    is one GPU): the same losses."""
    ways: dict[str, list[str]] = {"alone": [], "DDP": []}
    if torch.cuda.device_count() != 1:
        ways["FSDP"] = ["run.parallel=fsdp"]
    short = ["steps=4", "run.log_every=1", "schedule.warmup_steps=1", "schedule.decay_steps=1"]
    losses = {}
    for name, settings in ways.items():
        run = bench.work / f"processes-{name}"
        count = 2 if name == "FSDP" else 1
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m"]
        words = ["-m", *([] if name == "alone" else launcher), "nextlat", "train", "city-tiny"]
        command(*words, *short, *settings, "--out", run, "--no-evaluate", "--no-progress")
        losses[name] = [line["loss"] for line in read_metrics(run) if "loss" in line]
    off = {
        name: max(abs(a - b) / b for a, b in zip(mine, losses["alone"], strict=True))
        for name, mine in losses.items()
        if name != "alone"
    }
    shown = ", ".join(f"{name} {difference:.0e}" for name, difference in off.items())
    missing = "" if "FSDP" in ways else "; FSDP needs two GPUs"
    return {"summary": f"largest relative difference of a loss: {shown}{missing}", "losses": losses}


# ---- what needs more than this ----


def vllm(bench: Bench) -> Result:
    """benchmarks/serving.py, where vLLM is installed."""
    if find_spec("vllm") is None:
        return {"summary": "vLLM is not installed here", "there": False}
    tokenizer = AutoTokenizer.from_pretrained(bench.run)
    texts = [" ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
             for ids in json.loads(bench.prompts.read_text())]  # fmt: skip
    (bench.work / "prompts.txt").write_text("\n".join(texts))
    words = ["--prompts", bench.work / "prompts.txt", "--batch", "1", "8", "--repeat", "3"]
    words += ["--dtype", "bfloat16", "--out", bench.work / "vllm"]
    command("benchmarks/serving.py", bench.run, *words)
    found = json.loads((bench.work / "vllm" / "serving.json").read_text())
    return {"summary": "measured, see the JSON", "there": True, "serving": found}


def study(bench: Bench) -> Result:
    """Path-Star at the paper's size, for the time that is left; the runs go on in the next call."""
    s, out, log = bench.sizes, bench.work / "studies", bench.work / "study.log"
    words = ["benchmarks/studies.py", *s.study, "--variants", *s.variants, "--seeds", "10"]
    words += ["--jobs", "1", "--out", str(out)]
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=file, stderr=file)
        try:
            code = process.wait(max(1.0, bench.until - time.time() - LAST))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # a checkpoint after the step in hand
            process.wait(LAST)
            code = None
    if code:
        raise RuntimeError(f"studies.py: {log.read_text().strip().splitlines()[-1]}")
    stored = out / f"{s.study[0]}.json"
    rows = json.loads(stored.read_text())["variants"] if stored.exists() else []
    for seed in (seed for row in rows for seed in row["seeds"].values()):
        seed.pop("curves")
    shown = [f"{row['variant']} {row['seeds']}" for row in rows if row["seeds"]]
    summary = "; ".join(shown) or "no run has ended"
    return {"summary": summary, "finished": code == 0, "variants": rows}
