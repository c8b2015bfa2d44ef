"""Speed of a saved model where it is served: `python benchmarks/serving.py RUN [--out DIR]`.

The same prompts are continued greedily by `generate` of transformers, by our own decoding and by
vLLM, without drafts and with them, at several batch sizes. vLLM has a process for each draft
length, and all else another. They take turns within a repetition, and speeds are compared as ratios
within it, of which median and range are shown, so that a busy machine hits all alike. Outputs are
compared token for token. To be run where `make serve-test` has installed vLLM:

    .venv-vllm/bin/python benchmarks/serving.py RUN --prompts FILE --out docs/serving

Writes serving.json with --out.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

TRANSFORMERS = "transformers"
VARIABLES = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
# Seconds, new token ids of each prompt, tokens a cycle.
Answer = tuple[float, list[list[int]], float]


def main() -> None:
    """Measure, print a table, write JSON when asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="directory of a saved model")
    parser.add_argument(
        "--prompts", type=Path, required=True, help="text file; prompts are cut out of it"
    )
    parser.add_argument("--prompt-tokens", type=int, default=32, help="longest prompt (default 32)")
    parser.add_argument("--new-tokens", type=int, default=64, help="a prompt (default 64)")
    parser.add_argument("--draft-lengths", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--repeat", type=int, default=7, help="repetitions (default 7)")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default 1)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true", help="do not compile vLLM's models")
    parser.add_argument("--name", default="serving", help="of the JSON file (default serving)")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()

    os.environ.update(VARIABLES, OMP_NUM_THREADS=str(arguments.threads))
    lengths = [0, *arguments.draft_lengths]
    ways = [TRANSFORMERS, *[f"{system} k={k}" for system in ("nextlat", "vllm") for k in lengths]]
    prompts = cut(arguments)
    context = multiprocessing.get_context("spawn")
    connections = {}
    for length in (None, *lengths):
        mine, theirs = context.Pipe()
        context.Process(target=work, args=(theirs, length, arguments), daemon=True).start()
        connections[TRANSFORMERS if length is None else f"vllm k={length}"] = mine
        mine.recv()  # one after another: they would all compile at once

    def ask(way: str, batch: list[list[int]]) -> Answer:
        connection = connections.get(way, connections[TRANSFORMERS])
        connection.send((way, batch))
        return connection.recv()

    results = [measure(ask, ways, prompts[:size], arguments.repeat) for size in arguments.batch]
    for connection in connections.values():
        connection.send(None)
    record = {
        "settings": {k: v.name if isinstance(v, Path) else v for k, v in vars(arguments).items()},
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {
            name: metadata.version(name)
            for name in ("torch", "transformers", "vllm-cpu", "nextlat")
        },
        "results": results,
    }
    show(results)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        path = arguments.out / f"{arguments.name}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")


def cut(arguments: argparse.Namespace) -> list[list[int]]:
    """Prompts of unequal length, from the end of the text on."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.run)
    text = arguments.prompts.read_text()
    ids = tokenizer(text[-40_000:], verbose=False).input_ids
    count, longest = max(arguments.batch), arguments.prompt_tokens
    lengths = [longest - (longest - 8) * (i % 4) // 4 for i in range(count)]
    step = len(ids) // count
    return [ids[i * step : i * step + length] for i, length in enumerate(lengths)]


def measure(
    ask: Callable[[str, list[list[int]]], Answer],
    ways: list[str],
    prompts: list[list[int]],
    repeat: int,
) -> dict[str, Any]:
    """All ways at one batch size.

    Returns:
        Seconds of every repetition, speed relative to transformers in the same one, tokens a cycle
        and whether the output is that of transformers, by way.
    """
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    expected = ask(TRANSFORMERS, prompts)[1]
    per_cycle, equal = {}, {}
    for way in ways:
        _, tokens, per_cycle[way] = ask(way, prompts)  # not counted: it warms up
        equal[way] = sum(a == b for a, b in zip(tokens, expected, strict=True))
    for i in range(repeat):
        for way in ways if i % 2 else reversed(ways):
            seconds[way].append(ask(way, prompts)[0])
    return {
        "batch": len(prompts),
        "new_tokens": sum(map(len, expected)),
        "ways": {
            way: {
                "seconds": times,
                "speedups": [
                    a / b for a, b in zip(seconds[TRANSFORMERS], times, strict=True)
                ],
                "tokens_per_cycle": per_cycle[way],
                "equal_rows": equal[way],
            }
            for way, times in seconds.items()
        },
    }  # fmt: skip


def show(results: list[dict[str, Any]]) -> None:
    """The table as Markdown."""
    print("| batch | way | tokens/s | times transformers (range) | tokens a cycle | equal rows |")
    print("|---|---|---|---|---|---|")
    for result in results:
        for way, row in result["ways"].items():
            rate = result["new_tokens"] / statistics.median(row["seconds"])
            times = row["speedups"]
            print(
                f"| {result['batch']} | {way} | {rate:.0f} | {statistics.median(times):.2f} "
                f"({min(times):.2f}-{max(times):.2f}) | {row['tokens_per_cycle']:.2f} | "
                f"{row['equal_rows']} of {result['batch']} |"
            )


def work(connection: Any, draft_length: int | None, arguments: argparse.Namespace) -> None:
    """A process of its own: vLLM with a draft length, or what is not vLLM. It gets the name of a
    way with prompts, gives answers, and ends at None."""
    import torch

    torch.set_num_threads(arguments.threads)
    decode = not_vllm(arguments) if draft_length is None else in_vllm(arguments, draft_length)
    connection.send("ready")
    while (asked := connection.recv()) is not None:
        started = time.perf_counter()
        tokens, per_cycle = decode(*asked)
        connection.send((time.perf_counter() - started, tokens, per_cycle))


Decode = Callable[[str, list[list[int]]], tuple[list[list[int]], float]]


def not_vllm(arguments: argparse.Namespace) -> Decode:
    """transformers' own decoding and ours."""
    import torch

    import nextlat

    model = nextlat.load(arguments.run, dtype=getattr(torch, arguments.dtype))
    options = {
        "max_new_tokens": arguments.new_tokens, "do_sample": False, "eos_token_id": None,
        "pad_token_id": 0,
    }  # fmt: skip

    def decode(way: str, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        if way == TRANSFORMERS:
            out, per_cycle = model.lm.generate(ids, attention_mask=mask, **options), 1.0
        else:
            draft_length = int(way.partition("=")[2])
            out, stats = model.generate(
                ids, mask, draft_length=draft_length, return_stats=True, **options
            )
            per_cycle = stats.mean_acceptance_length
        return out[:, width:].tolist(), per_cycle

    return decode


def in_vllm(arguments: argparse.Namespace, draft_length: int) -> Decode:
    """vLLM in this process, drafting as `nextlat serve` has it draft."""
    from vllm import LLM, SamplingParams

    speculation = {
        "method": "eagle",
        "model": str(arguments.run / "nextlat"),
        "num_speculative_tokens": draft_length,
        "draft_sample_method": "probabilistic",
        "disable_eagle_block_drop": True,
    }
    engine = LLM(
        model=str(arguments.run),
        dtype=arguments.dtype,
        enforce_eager=arguments.eager,
        max_model_len=arguments.prompt_tokens + arguments.new_tokens + 8,
        max_num_seqs=max(arguments.batch),
        enable_prefix_caching=False,  # the same prompts come again and again
        disable_log_stats=False,
        speculative_config=speculation if draft_length else None,
    )
    sampling = SamplingParams(temperature=0, max_tokens=arguments.new_tokens, ignore_eos=True)

    def accepted_and_cycles() -> list[float]:
        values = {m.name: getattr(m, "value", 0) for m in engine.get_metrics()}
        names = ("num_accepted_tokens", "num_drafts")
        return [values.get(f"vllm:spec_decode_{name}", 0) for name in names]

    def decode(way: str, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
        before = accepted_and_cycles()
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False
        )
        accepted, cycles = (b - a for a, b in zip(before, accepted_and_cycles(), strict=True))
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        return tokens, 1 + accepted / cycles if cycles else 1.0

    return decode


def processor() -> str:
    """Its name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":")[1].strip() for line in lines if "model name" in line), "unknown"
    )  # fmt: skip


if __name__ == "__main__":
    main()
