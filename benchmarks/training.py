"""Cost of training with every objective: `python benchmarks/training.py [--width 512 ...]
[--horizons 1 8] [--out training.json]`.

Every objective takes optimiser steps (forward, backward, AdamW) on the same random tokens with the
same transformer; they take turns many times over in one process, and speeds are compared within a
turn, so that a busy machine hits all alike. Beside each: the speed that its FLOPs alone would let
one expect (nextlat.objectives.flops), and the peak memory of a step above weights and optimiser
state.

On CUDA the peak is torch.cuda.max_memory_allocated. On the CPU it is the highest sum of what the
profiler recorded of torch's
allocator in one step: to the byte, and it sees the inside of fused operations, which a count of
live tensors would not.

If the package x-transformers is installed, its NextLatentWrapper takes turns too, at equal shapes
and equal weights of the losses.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import nextlat
from nextlat.errors import NextLatError
from nextlat.objectives import OBJECTIVES, NextLat, NextToken
from nextlat.objectives.flops import training_flops

OTHER = "x-transformers"
MIB = 2**20


@dataclass
class Way:
    """One objective at one horizon.

    Attributes:
        name, horizon: what it is; 0 where there is no horizon. base: name of the next-token
            training of the same package.
        model, loss: what is trained, and its loss on tokens (B, T).
        flops: of a step per token, by formula; None without one.
        seconds: of a step, one for every turn. memory: peak bytes of a step.
    """

    name: str
    horizon: int
    base: str
    model: nn.Module
    loss: Callable[[Tensor], Tensor]
    flops: float | None
    seconds: list[float] = field(default_factory=list)
    memory: int = 0

    def __post_init__(self) -> None:
        device = next(self.model.parameters()).device
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-4, fused=device.type in ("cpu", "cuda")
        )

    def step(self, ids: Tensor, autocast: bool) -> None:
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
            loss = self.loss(ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> None:
    """Measure, print a table, write JSON when asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, text in [
        ("layers", 4, "of the transformer"),
        ("width", 128, "of the transformer"),
        ("heads", 4, "of its attention"),
        ("vocabulary", 4096, "tokens"),
        ("length", 128, "tokens a row"),
        ("batch", 8, "rows a step"),
        ("turns", 7, "timed turns, after one that is not timed"),
        ("steps", 2, "steps a turn"),
        ("threads", 0, "on the CPU"),
    ]:
        parser.add_argument(
            f"--{name}",
            type=int,
            default=default,
            help=f"{text} (default {default or 'as torch chooses'})",
        )
    parser.add_argument(
        "--horizons",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8],
        help="d, where there is one (default 1 2 4 8)",
    )
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        default="fp32",
        help="bf16 = autocast (default fp32)",
    )
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ways = our_ways(arguments, device)
    if find_spec("x_transformers") is None:
        print(
            f"{OTHER} is not installed, so it is left out: pip install {OTHER} to compare with it.",
            file=sys.stderr,
        )
    else:
        ways += their_ways(arguments, device, ways)
    measure(ways, arguments, device)
    rows = [figures(way, ways) for way in ways]
    print_table(rows)
    if arguments.out:
        setting = {key: value for key, value in vars(arguments).items() if key != "out"}
        content = {"setting": setting | machine(device), "ways": rows}
        arguments.out.write_text(json.dumps(content, indent=2) + "\n")


def our_ways(arguments: argparse.Namespace, device: torch.device) -> list[Way]:
    """Every objective that there is, at every horizon if it has one, around the same initial
    transformer."""
    ways = []
    for name, (config_type, _) in OBJECTIVES.items():
        has_horizon = "horizon" in config_type.model_fields
        for horizon in arguments.horizons if has_horizon else [0]:
            lm = nextlat.llama(
                arguments.vocabulary,
                layers=arguments.layers,
                width=arguments.width,
                heads=arguments.heads,
                max_length=arguments.length,
                seed=0,
            )
            config = config_type(**{"horizon": horizon} if has_horizon else {})
            model = nextlat.attach(lm, config).to(device).train()
            flops = training_flops(model.objective, arguments.length)
            ways.append(
                Way(
                    name,
                    horizon,
                    NextToken.name,
                    model,
                    our_loss(model),
                    sum(flops.values()) if flops else None,
                )
            )
    return ways


def our_loss(model: nextlat.ObjectiveModel) -> Callable[[Tensor], Tensor]:
    return lambda ids: model(ids, ids).loss


def their_ways(arguments: argparse.Namespace, device: torch.device, ours: list[Way]) -> list[Way]:
    """The same transformer and the same loss (hidden width E + D, no weighting of steps by their
    losses) in x-transformers."""
    from x_transformers import AutoregressiveWrapper, Decoder, NextLatentWrapper, TransformerWrapper

    D = arguments.width
    reference = nextlat.llama(
        arguments.vocabulary,
        layers=arguments.layers,
        width=D,
        heads=arguments.heads,
        max_length=arguments.length,
    )

    def transformer() -> nn.Module:
        decoder = Decoder(
            dim=D,
            depth=arguments.layers,
            heads=arguments.heads,
            attn_dim_head=D // arguments.heads,
            attn_flash=True,
            verbose=False,
            rotary_pos_emb=True,
            rotary_emb_dim=D // arguments.heads,
            use_rmsnorm=True,
            ff_glu=True,
            ff_swish=True,
            ff_no_bias=True,
            ff_mult=reference.config.intermediate_size / D,
        )
        return TransformerWrapper(
            num_tokens=arguments.vocabulary,
            max_seq_len=arguments.length,
            use_abs_pos_emb=False,
            attn_layers=decoder,
        )

    size, our_size = (
        sum(p.numel() for p in model.parameters() if p.ndim > 1)
        for model in (transformer(), reference)
    )
    if size != our_size:
        print(
            f"{OTHER} makes {size} weights of the shape for which we make {our_size}: left out.",
            file=sys.stderr,
        )
        return []
    plain = f"{OTHER} {NextToken.name}"
    wrapper: nn.Module = AutoregressiveWrapper(transformer()).to(device).train()
    flops = {way.horizon: way.flops for way in ours if way.name in (NextToken.name, NextLat.name)}
    ways = [Way(plain, 0, plain, wrapper, wrapper, flops[0])]
    for horizon in arguments.horizons:
        wrapper = NextLatentWrapper(
            transformer(),
            dim=D,
            num_rollouts=horizon,
            dynamics_hidden_dim=2 * D,
            dynamic_rollout_loss_weight=False,
        )
        wrapper = wrapper.to(device).train()
        ways.append(
            Way(f"{OTHER} {NextLat.name}", horizon, plain, wrapper, wrapper, flops[horizon])
        )
    return ways


def measure(ways: list[Way], arguments: argparse.Namespace, device: torch.device) -> None:
    """Fill in seconds and memory: A B C, A B C, ..., the first round being for memory and to warm
    up."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        arguments.vocabulary, (arguments.batch, arguments.length), generator=generator
    ).to(device)
    autocast = arguments.precision == "bf16"
    for way in ways:
        way.step(ids, autocast)  # AdamW's state is made in the first step, and stays
        way.memory = peak_memory(lambda way=way: way.step(ids, autocast), device)
    for _ in range(arguments.turns):
        for way in ways:
            synchronize(device)
            start = time.perf_counter()
            for _ in range(arguments.steps):
                way.step(ids, autocast)
            synchronize(device)
            way.seconds.append((time.perf_counter() - start) / arguments.steps)


def peak_memory(action: Callable[[], None], device: torch.device) -> int:
    """Bytes that an action holds at its peak above what was held before."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # or the profiler reports its own start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        action()
    with tempfile.TemporaryDirectory() as folder:
        record.export_chrome_trace(f"{folder}/trace.json")
        trace = json.loads(Path(f"{folder}/trace.json").read_text())
    events = [event for event in trace["traceEvents"] if event["name"] == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["args"]["Ev Idx"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def figures(way: Way, ways: list[Way]) -> dict[str, Any]:
    """What is shown and saved of one way; `speed_...` are ratios of steps per second, one for every
    turn, sorted."""
    base = {other.name: other for other in ways if not other.horizon}

    def against(other: Way) -> list[float]:
        return sorted(
            theirs / mine for mine, theirs in zip(way.seconds, other.seconds, strict=True)
        )

    plain = base[NextToken.name]
    return {
        "name": way.name,
        "horizon": way.horizon,
        "parameters": sum(p.numel() for p in way.model.parameters()),
        "steps_per_second": 1 / statistics.median(way.seconds),
        "speed_against_next_token": against(plain),
        "speed_against_own_next_token": against(base[way.base]),
        "flops_per_token": way.flops,
        "speed_by_flops": plain.flops / way.flops if way.flops and plain.flops else None,
        "peak_bytes": way.memory,
        "peak_against_next_token": way.memory / plain.memory,
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line for every way; `a (b-c)` is the median ratio and its range over the turns."""

    def ratio(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} ({values[0]:.2f}-{values[-1]:.2f})"

    print(
        f"{'objective':<28}{'d':>2}{'params':>10}  {'steps/s vs next-token':<22}"
        f"{'vs its own':<18}{'by FLOPs':>8}"
        f"{'peak MiB':>10}{'vs next-token':>15}"
    )
    for row in rows:
        expected = "-" if row["speed_by_flops"] is None else f"{row['speed_by_flops']:.2f}"
        print(
            f"{row['name']:<28}{row['horizon'] or '-':>2}{row['parameters'] / 1e6:>9.2f}M  "
            f"{ratio(row['speed_against_next_token']):<22}"
            f"{ratio(row['speed_against_own_next_token']):<18}{expected:>8}"
            f"{row['peak_bytes'] / MIB:>10.1f}{row['peak_against_next_token']:>15.2f}"
        )


def machine(device: torch.device) -> dict[str, Any]:
    """Where and with what it was measured."""
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    return {"device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count(), **versions}


if __name__ == "__main__":
    try:
        main()
    except NextLatError as error:
        sys.exit(str(error))
