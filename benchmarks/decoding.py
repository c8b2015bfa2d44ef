"""Decoding speed of a trained model: `python benchmarks/decoding.py RUN [--prompts FILE] [--temperature 1] [--out decoding.json]`.

The same prompts are decoded by `generate` of transformers (KV-cached), by our own plain decoding (draft length 0) and by
self-speculation with every draft length, in turn and several times over in one process. Speeds are compared as ratios within a
repetition, of which median and range are shown, so that a busy machine hits all alike.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer

from nextlat.decoding.comparison import TRANSFORMERS, Timing, compare_decoding
from nextlat.errors import NextLatError
from nextlat.evaluation import open_run
from nextlat.model import ObjectiveModel, load


def main() -> None:
    """Measure, print a table, write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run directory, or with --prompts any directory or hub id that nextlat.load opens")
    parser.add_argument(
        "--prompts", type=Path, help="text file, one prompt a line; default: held-out prompts of the run's task"
    )
    parser.add_argument("--count", type=int, default=12, help="prompts (default 12)")
    parser.add_argument("--new-tokens", type=int, default=None, help="per prompt; default: what the model has positions for")
    parser.add_argument("--draft-lengths", type=int, nargs="+", default=list(range(1, 9)), help="default 1 to 8")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy (default)")
    parser.add_argument("--repetitions", type=int, default=5, help="timed rounds, after one that is not timed (default 5)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's choice")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model, prompts = open_model(arguments.run, arguments.prompts, arguments.count)
    if not prompts:
        raise NextLatError(f"there is nothing to decode from in {arguments.prompts or arguments.run}: give --prompts with text")
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    timings = compare_decoding(
        model,
        prompts,
        draft_lengths=[0, *(length for length in arguments.draft_lengths if length > 0)],
        max_new_tokens=arguments.new_tokens or model.config.max_position_embeddings - max(map(len, prompts)),
        repetitions=arguments.repetitions,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    ways = {str(way): figures(timing, timings) for way, timing in timings.items()}
    print_table(ways)
    if not arguments.temperature:
        same = all(timing.outputs == timings[TRANSFORMERS].outputs for timing in timings.values())
        print(f"greedy output of every way: {'identical' if same else 'NOT identical'}")
    if arguments.out:
        setting = {"run": arguments.run, "temperature": arguments.temperature, "prompts": len(prompts), "seed": arguments.seed}
        text = json.dumps({"setting": setting | machine(model), "ways": ways}, indent=2)
        arguments.out.write_text(text + "\n")


def open_model(run: str, prompt_file: Path | None, count: int) -> tuple[ObjectiveModel, list[Tensor]]:
    """The model and its prompts (T,) each."""
    if prompt_file is None:
        _, task, model = open_run(run)
        return model, list(task.prompts(count))
    tokenizer = AutoTokenizer.from_pretrained(run)
    lines = [line for line in prompt_file.read_text().splitlines() if line.strip()][:count]
    return load(run), [tokenizer(line, return_tensors="pt").input_ids[0] for line in lines]


def figures(timing: Timing, timings: dict[int | str, Timing]) -> dict[str, Any]:
    """What is shown and saved of one way to decode."""

    def against(way: int | str) -> list[float]:
        # Sampled outputs differ in length, so tokens per second are compared, not seconds.
        other = timings[way]
        pairs = zip(timing.seconds, other.seconds, strict=True)
        return sorted((timing.tokens / mine) / (other.tokens / theirs) for mine, theirs in pairs)

    stats = timing.stats
    return {
        "tokens": timing.tokens,
        "seconds": timing.seconds,
        "tokens_per_second": timing.tokens_per_second,
        "against_transformers": against(TRANSFORMERS),
        "against_draft_length_0": against(0),
        "tokens_per_cycle": stats.mean_acceptance_length or 1.0,
        "acceptance_rate": stats.acceptance_rate,
        "acceptance_by_position": stats.acceptance_by_position,
    }


def print_table(ways: dict[str, dict[str, Any]]) -> None:
    """One line for every way; `x a (b-c)` is the median ratio and its range over the repetitions."""

    def ratio(values: list[float]) -> str:
        return f"x {statistics.median(values):.2f} ({values[0]:.2f}-{values[-1]:.2f})"

    print(
        f"{'draft length':<13}{'tokens/s':>9}  {'vs transformers':<20}{'vs length 0':<20}{'tokens/cycle':>12}  accepted by position"
    )
    for way, row in ways.items():
        by_position = " ".join(f"{rate:.2f}" for rate in row["acceptance_by_position"])
        print(
            f"{way:<13}{row['tokens_per_second']:>9.0f}  {ratio(row['against_transformers']):<20}"
            f"{ratio(row['against_draft_length_0']):<20}{row['tokens_per_cycle']:>12.2f}  {by_position}"
        )
    print("tokens/cycle counts the transformer's own token; the paper's 'accepted tokens' do not")


def machine(model: ObjectiveModel) -> dict[str, Any]:
    """Where and with what it was measured."""
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}
    cores = {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
    return {"device": device, "dtype": str(model.dtype), "parameters": model.lm.num_parameters(), **cores, **versions}


if __name__ == "__main__":
    try:
        main()
    except NextLatError as error:
        sys.exit(str(error))
