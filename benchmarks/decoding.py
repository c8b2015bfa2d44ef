"""Decoding speed of a trained model: `python benchmarks/decoding.py RUN [--prompts FILE] [--out
DIR]`.

The same prompts are decoded by `generate` of transformers (KV-cached; on a GPU also with its
compiled static cache), by our own plain decoding (draft length 0), with fixed draft lengths and
with "auto", in turn and several times over in one process, for every batch size and temperature.
Speeds are compared as ratios within a repetition, of which median and range are shown, so that a
busy machine hits all alike. Beside what was reached stands the ceiling tau / (v + k c) that the
measured costs allow, and for greedy decoding the same without the texts that run in circles, which
flatter every drafter.

Writes decoding.json and decoding.png with --out.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import AutoTokenizer

from nextlat.decoding.draft_length import Costs
from nextlat.decoding.prepared import measured_costs
from nextlat.decoding.speed import STATIC, TRANSFORMERS, Timing, Way, compare_decoding
from nextlat.errors import NextLatError
from nextlat.evaluation import open_run
from nextlat.model import ObjectiveModel, load
from nextlat.training.train import threads

LOOPING = 0.5  # a text of which less than half of the 4-grams are different runs in circles


def main() -> None:
    """Measure, print tables, write JSON and the picture when asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run",
        help="run directory, or with --prompts any directory or hub id that nextlat.load opens",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        help="text file, one prompt a line; default: held-out prompts of the run's task",
    )
    parser.add_argument("--count", type=int, default=16, help="prompts (default 16)")
    parser.add_argument(
        "--new-tokens",
        type=int,
        default=None,
        help="per prompt; default: what the model has positions for",
    )
    parser.add_argument(
        "--draft-lengths",
        type=int,
        nargs="+",
        default=list(range(1, 11)),
        help="fixed ones (default 1 to 10)",
    )
    parser.add_argument(
        "--temperatures",
        type=float,
        nargs="+",
        default=[0.0, 1.0],
        help="0 = greedy (default 0 and 1)",
    )
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 4, 16], help="default 1, 4 and 16"
    )
    parser.add_argument(
        "--repetitions",
        type=int,
        default=3,
        help="timed rounds, after one that is not timed (default 3)",
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads; default: torch's choice"
    )
    parser.add_argument("--compile", action="store_true", help="our ways as one graph per cycle")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--out", type=Path, help="directory for decoding.json and decoding.png")
    options = parser.parse_args()
    with threads(options.threads):
        measure(options)


def measure(options: argparse.Namespace) -> None:
    model, prompts = open_model(options.run, options.prompts, options.count)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    lengths: list[Way] = [0, *(length for length in options.draft_lengths if length > 0), "auto"]
    on_gpu = model.device.type == "cuda"
    settings = [
        (temperature, batch) for temperature in options.temperatures for batch in options.batches
    ]
    steps = len(settings) * (options.repetitions + 1) * (len(lengths) + 1 + on_gpu)
    results = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("decoding", total=steps)
        for temperature, batch in settings:
            bar.update(task, description=f"temperature {temperature:g}, batch {batch}")
            timings = compare_decoding(
                model,
                prompts,
                draft_lengths=lengths,
                max_new_tokens=options.new_tokens
                or model.config.max_position_embeddings - max(map(len, prompts)),
                batch=batch,
                repetitions=options.repetitions,
                temperature=temperature,
                seed=options.seed,
                compile=options.compile,
                static_baseline=on_gpu,
                progress=lambda: bar.advance(task),
            )
            results.append(result(model, timings, temperature, batch))
            bar.console.print("")
            print_result(results[-1])
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        setting = {
            "run": options.run,
            "prompts": len(prompts),
            "seed": options.seed,
            "compile": options.compile,
        }
        text = json.dumps({"setting": setting | machine(model), "results": results}, indent=1)
        (options.out / "decoding.json").write_text(text + "\n")
        draw(results, options.out / "decoding.png")


def open_model(
    run: str, prompt_file: Path | None, count: int
) -> tuple[ObjectiveModel, list[Tensor]]:
    """The model and its prompts (T,) each."""
    if prompt_file is None:
        _, task, model = open_run(run)
        return model, list(task.prompts(count))
    tokenizer = AutoTokenizer.from_pretrained(run)
    lines = [line for line in prompt_file.read_text().splitlines() if line.strip()][:count]
    return load(run), [tokenizer(line, return_tensors="pt").input_ids[0] for line in lines]


def distinct(tokens: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams of a text that are different ones; 1 for one too short to have any."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def result(
    model: ObjectiveModel, timings: dict[Way, Timing], temperature: float, batch: int
) -> dict[str, Any]:
    """Everything about one temperature and batch size."""
    costs = measured_costs(model.objective, batch, sampled=temperature > 0)
    outputs = timings[TRANSFORMERS].outputs
    varied = [i for i, text in enumerate(outputs) if distinct(text) >= LOOPING]
    found: dict[str, Any] = {
        "temperature": temperature,
        "batch": batch,
        "distinct_4": statistics.mean(map(distinct, outputs)),
        "looping": 1 - len(varied) / len(outputs),
        "identical": None
        if temperature
        else all(timing.outputs == outputs for timing in timings.values()),
        "costs": None,
        "ways": {
            str(way): figures(timing, timings, costs, varied if batch == 1 else [])
            for way, timing in timings.items()
        },
    }
    if costs is not None:
        passes = [costs.v(k) for k in range(len(costs.verify))]
        found["costs"] = {"plain_pass_ms": 1e3 * costs.verify[0], "c": costs.c, "v": passes}
    return found


def figures(
    timing: Timing, timings: dict[Way, Timing], costs: Costs | None, varied: list[int]
) -> dict[str, Any]:
    """What is shown and saved of one way to decode."""
    stats = timing.total
    seconds = stats.seconds or 1.0
    row = {
        "tokens": sum(timing.tokens),
        "seconds": [sum(each) for each in timing.seconds],
        "tokens_per_second": timing.tokens_per_second,
        "against": {
            str(other): timing.against(timings[other])
            for other in (TRANSFORMERS, STATIC, 0)
            if other in timings
        },
        "tokens_per_cycle": stats.mean_acceptance_length or 1.0,
        "drafted_per_cycle": stats.drafted_per_cycle,
        "acceptance_by_position": stats.acceptance_by_position,
        "conditional_acceptance": stats.conditional_acceptance,
        "time": {
            name: getattr(stats, f"{name}_seconds") / seconds
            for name in ("prefill", "draft", "verify", "overhead")
        },
        "ceiling": costs.ceiling(stats.mean_acceptance_length, stats.drafted_per_cycle)
        if costs and stats.drafted
        else None,
    }
    if varied and timing.stats:
        alone = sum((timing.stats[i] for i in varied), type(stats)())
        row["without_loops"] = {
            "against": timing.against(timings[0], varied),
            "tokens_per_cycle": alone.mean_acceptance_length or 1.0,
        }
    return row


def print_result(found: dict[str, Any]) -> None:
    """One line for every way; `a (b-c)` is the median ratio and its range over the repetitions."""

    def ratio(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} ({values[0]:.2f}-{values[-1]:.2f})"

    print(f"temperature {found['temperature']:g}, batch {found['batch']}")
    print(
        f"{'draft length':<27}{'tokens/s':>9}  {'x transformers':<19}{'x length 0':<19}"
        f"{'ceiling':>8}{'tokens/cycle':>13}  accepted"
    )
    for way, row in found["ways"].items():
        by_position = " ".join(f"{rate:.2f}" for rate in row["acceptance_by_position"])
        ceiling = f"{row['ceiling']:.2f}" if row["ceiling"] else ""
        print(
            f"{way:<27}{row['tokens_per_second']:>9.0f}  {ratio(row['against'][TRANSFORMERS]):<19}"
            f"{ratio(row['against']['0']):<19}{ceiling:>8}{row['tokens_per_cycle']:>13.2f}  "
            f"{by_position}"
        )
    auto = found["ways"]["auto"]
    print(
        "auto spends its time on "
        + ", ".join(f"{name} {share:.0%}" for name, share in auto["time"].items())
    )
    if found["costs"]:
        c, v = found["costs"]["c"], found["costs"]["v"]
        some = ", ".join(f"v_{k} {v[k]:.2f}" for k in (1, 2, 4, 8, 16) if k < len(v))
        print(
            f"costs in plain passes of {found['costs']['plain_pass_ms']:.2f} ms: "
            f"draft step c {c:.3f}; {some}"
        )
    if found["identical"] is not None:
        print(
            f"greedy output of every way: {'identical' if found['identical'] else 'NOT identical'}",
            end="; ",
        )
        print(
            f"different 4-grams {found['distinct_4']:.0%}, "
            f"texts that run in circles {found['looping']:.0%}"
        )
        if "without_loops" in auto:
            alone = auto["without_loops"]
            print(
                f"auto without those: x length 0 {ratio(alone['against'])}, "
                f"{alone['tokens_per_cycle']:.2f} tokens/cycle"
            )
    print("tokens/cycle counts the transformer's own token; the paper's 'accepted tokens' do not\n")


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Speed-up, and cumulative acceptance by position, against the draft length (as figure 9 of
    arXiv 2511.05963)."""
    from matplotlib.figure import Figure

    single = [
        found for found in results if found["batch"] == min(other["batch"] for other in results)
    ]
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    speed, acceptance = figure.subplots(1, 2)
    for i, found in enumerate(single):
        label = "greedy" if not found["temperature"] else f"temperature {found['temperature']:g}"
        lengths = [int(way) for way in found["ways"] if way.isdigit()]
        rows = [found["ways"][str(k)] for k in lengths]
        medians = [statistics.median(row["against"]["0"]) for row in rows]
        speed.plot(lengths, medians, "o-", color=f"C{i}", label=label)
        speed.fill_between(
            lengths,
            [row["against"]["0"][0] for row in rows],
            [row["against"]["0"][-1] for row in rows],
            color=f"C{i}",
            alpha=0.15,
        )
        speed.plot(
            lengths,
            [row["ceiling"] or 1.0 for row in rows],
            ":",
            color=f"C{i}",
            label=f"{label}: ceiling of the costs",
        )
        auto = statistics.median(found["ways"]["auto"]["against"]["0"])
        speed.axhline(auto, ls="--", lw=1, color=f"C{i}", label=f"{label}: auto, {auto:.2f}")
        longest = found["ways"][str(max(lengths))]["acceptance_by_position"]
        acceptance.plot(range(1, len(longest) + 1), longest, "o-", color=f"C{i}", label=label)
    speed.axhline(1, color="0.6", lw=1)
    speed.set(
        xlabel="draft length",
        ylabel="times as fast as draft length 0",
        title=f"Speed, batch {single[0]['batch']}",
    )
    acceptance.set(
        xlabel="position in the draft",
        ylabel="share of cycles that accept up to here",
        title="Cumulative acceptance",
    )
    acceptance.set_ylim(0, 1)
    for axes in (speed, acceptance):
        axes.legend(
            frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2
        )
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def machine(model: ObjectiveModel) -> dict[str, Any]:
    """Where and with what it was measured."""
    device = (
        torch.cuda.get_device_name()
        if model.device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    cores = {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
    return {
        "device": device,
        "dtype": str(model.dtype),
        "parameters": model.lm.num_parameters(),
        **cores,
        **versions,
    }


if __name__ == "__main__":
    try:
        main()
    except NextLatError as error:
        sys.exit(str(error))
