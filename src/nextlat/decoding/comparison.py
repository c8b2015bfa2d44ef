"""How much faster, measured against what one would otherwise run: plain KV-cached decoding, in the same minutes on the same machine.

Timings are only ever compared as ratios of interleaved repetitions, so that whatever else the machine is doing hits all alike.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nextlat.decoding.generation import generate
from nextlat.decoding.speculative import Decodable
from nextlat.decoding.stats import GenerationStats

TRANSFORMERS = "transformers"  # its own `generate`, greedy or sampling, with its KV cache


@dataclass
class Timing:
    """One way to decode: seconds of every repetition over all prompts, the new tokens, and what its drafts did."""

    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    stats: GenerationStats = field(default_factory=GenerationStats)
    outputs: list[list[int]] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / statistics.median(self.seconds)


def compare_decoding(
    model: Decodable,
    prompts: Sequence[Tensor],
    *,
    draft_lengths: Sequence[int],
    max_new_tokens: int,
    repetitions: int = 3,
    temperature: float = 0.0,
    seed: int = 0,
) -> dict[int | str, Timing]:
    """Decode the same prompts, one at a time, in every way in turn, `repetitions` times over after one untimed round.

    Args:
        prompts: token ids (T,) each. draft_lengths: of our own decoding; 0 is plain. max_new_tokens: per prompt.
        temperature: 0 = greedy; else sampling, every way from its own generator with the same seed.

    Returns:
        A `Timing` for each draft length and for `TRANSFORMERS`.
    """
    ways: list[int | str] = [TRANSFORMERS, *draft_lengths]
    timings: dict[int | str, Timing] = {way: Timing() for way in ways}
    for repetition in range(repetitions + 1):
        for way in ways:
            timing = timings[way]
            run = _transformers(model, max_new_tokens, temperature, seed) if way == TRANSFORMERS else None
            decode = run or _ours(model, int(way), max_new_tokens, temperature, seed)
            start = time.perf_counter()
            results = [decode(prompt) for prompt in prompts]
            seconds = time.perf_counter() - start
            if repetition:
                timing.seconds.append(seconds)
                continue
            timing.outputs = [ids[len(prompt) :].tolist() for prompt, (ids, _) in zip(prompts, results, strict=True)]
            timing.tokens = sum(map(len, timing.outputs))
            timing.stats = sum((stats for _, stats in results if stats), GenerationStats())
    return timings


Decode = Callable[[Tensor], tuple[Tensor, GenerationStats | None]]


def _ours(model: Decodable, draft_length: int, max_new_tokens: int, temperature: float, seed: int) -> Decode:
    generator = torch.Generator(model.lm.device).manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "generator": generator} if temperature else {}

    def decode(prompt: Tensor) -> tuple[Tensor, GenerationStats | None]:
        out = generate(
            model, prompt[None], max_new_tokens=max_new_tokens, draft_length=draft_length, return_stats=True, **sampling
        )
        assert isinstance(out, tuple)
        return out[0][0], out[1]

    return decode


def _transformers(model: Decodable, max_new_tokens: int, temperature: float, seed: int) -> Decode:
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    )

    def decode(prompt: Tensor) -> tuple[Tensor, GenerationStats | None]:
        ids = prompt[None].to(model.lm.device)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            out = model.lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **sampling)
        return out[0], None

    return decode
