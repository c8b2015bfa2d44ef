"""How much faster, measured against what one would otherwise run: plain KV-cached decoding, in the
same minutes on the same machine.

Timings are only ever compared as ratios of interleaved repetitions, so that whatever else the
machine is doing hits all alike.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nextlat.decoding.generate import Decodable, generate
from nextlat.decoding.stats import GenerationStats
from nextlat.errors import NextLatError

TRANSFORMERS = "transformers"  # its own `generate`, greedy or sampling, with its KV cache
STATIC = "transformers, static cache"  # the same with the static cache, which it compiles on a GPU

Way = int | str  # a draft length (0 = plain, "auto"), or one of the two above


@dataclass
class Timing:
    """One way to decode. Every list but `seconds` is of one repetition, the others being alike or
    as random.

    Attributes:
        seconds: by repetition, of every batch of prompts.
        tokens: new tokens of every batch.
        stats: what its drafts did, for every batch.
        outputs: new tokens of every prompt.
    """

    seconds: list[list[float]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    stats: list[GenerationStats] = field(default_factory=list)
    outputs: list[list[int]] = field(default_factory=list)

    @property
    def total(self) -> GenerationStats:
        """The stats of all batches together."""
        return sum(self.stats, GenerationStats())

    def rates(self, batches: Sequence[int] | None = None) -> list[float]:
        """Tokens per second of every repetition, over all or some of the batches."""
        chosen = range(len(self.tokens)) if batches is None else batches
        return [
            sum(self.tokens[i] for i in chosen) / sum(seconds[i] for i in chosen)
            for seconds in self.seconds
        ]

    @property
    def tokens_per_second(self) -> float:
        """Median over repetitions."""
        return statistics.median(self.rates())

    def against(self, other: "Timing", batches: Sequence[int] | None = None) -> list[float]:
        """How many times as fast as another way, sorted, one for each repetition."""
        return sorted(a / b for a, b in zip(self.rates(batches), other.rates(batches), strict=True))


def compare_decoding(
    model: Decodable,
    prompts: Sequence[Tensor],
    *,
    draft_lengths: Sequence[Way],
    max_new_tokens: int,
    batch: int = 1,
    repetitions: int = 3,
    temperature: float = 0.0,
    seed: int = 0,
    compile: bool = False,
    static_baseline: bool = False,
    progress: Callable[[], None] | None = None,
) -> dict[Way, Timing]:
    """Decode the same prompts in every way in turn, `repetitions` times over after one untimed
    round.

    Args:
        model: an `ObjectiveModel`.
        prompts: token ids (T,) each.
        draft_lengths: of our own decoding; 0 is plain.
        max_new_tokens: per prompt.
        batch: prompts decoded at a time, padded on the left.
        repetitions: timed rounds.
        temperature: 0 = greedy; else sampling from the whole distribution.
        seed: every way samples with a generator of its own from this seed.
        compile: our own ways as one graph per cycle.
        static_baseline: also `transformers` with its static cache.
        progress: called after every way of every round.

    Returns:
        A `Timing` for each draft length and baseline.

    Raises:
        NextLatError: no prompts.
    """
    if not prompts:
        raise NextLatError("there is nothing to decode: give at least one prompt")
    ways: list[Way] = [TRANSFORMERS, *([STATIC] if static_baseline else []), *draft_lengths]
    batches = [_padded(prompts[i : i + batch], model) for i in range(0, len(prompts), batch)]
    timings: dict[Way, Timing] = {way: Timing() for way in ways}
    for repetition in range(repetitions + 1):
        for way in ways:
            timing = timings[way]
            decode = _way(model, way, max_new_tokens, temperature, seed, compile)
            seconds, done = [], []
            for ids, mask in batches:
                start = time.perf_counter()
                out, stats = decode(ids, mask)
                new = out[:, ids.shape[1] :].tolist()  # waits for the device
                seconds.append(time.perf_counter() - start)
                done.append(([_cut(row, _ends(model)) for row in new], stats))
            if repetition:
                timing.seconds.append(seconds)
            timing.outputs = [row for rows, _ in done for row in rows]
            timing.tokens = [sum(map(len, rows)) for rows, _ in done]
            timing.stats = [stats for _, stats in done if stats]
            if progress:
                progress()
    return timings


def _padded(prompts: Sequence[Tensor], model: Decodable) -> tuple[Tensor, Tensor]:
    """(B, T) ids and mask of prompts padded on the left."""
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    ids, mask = pad([*prompts]), pad([torch.ones_like(prompt) for prompt in prompts])
    return ids.to(model.lm.device), mask.to(model.lm.device)


def _ends(model: Decodable) -> set[int]:
    eos = model.lm.generation_config.eos_token_id
    return set() if eos is None else set(eos) if isinstance(eos, list) else {eos}


def _cut(row: list[int], ends: set[int]) -> list[int]:
    """Up to its end: the rest is padding."""
    return next((row[: i + 1] for i, token in enumerate(row) if token in ends), row)


Decode = Callable[[Tensor, Tensor], tuple[Tensor, GenerationStats | None]]


def _way(
    model: Decodable, way: Way, max_new_tokens: int, temperature: float, seed: int, compile: bool
) -> Decode:
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature:
        # top_k=0: the whole distribution, not the 50 tokens that are transformers' default.
        options |= {"temperature": temperature, "top_k": 0}
    if model.lm.generation_config.pad_token_id is None:
        options["pad_token_id"] = min(_ends(model), default=0)
    if way in (TRANSFORMERS, STATIC):
        if way == STATIC:
            options["cache_implementation"] = "static"

        def theirs(ids: Tensor, mask: Tensor) -> tuple[Tensor, GenerationStats | None]:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                return model.lm.generate(ids, attention_mask=mask, **options), None

        return theirs

    generator = torch.Generator(model.lm.device).manual_seed(seed) if temperature else None

    def ours(ids: Tensor, mask: Tensor) -> tuple[Tensor, GenerationStats | None]:
        own: dict[str, Any] = {"draft_length": way, "generator": generator, "compile": compile}
        return generate(model, ids, mask, return_stats=True, **own, **options)

    return ours
