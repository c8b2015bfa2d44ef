"""The options of `transformers`' `generate`, for self-speculative decoding.

`transformers` itself merges the generation config, makes the logits processors and stopping
criteria, and calls our loop in place of its own (`custom_generate`): so every option has the
meaning that it has there, or is refused by name.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from nextlat.backbone import evaluation_mode
from nextlat.decoding.draft_length import LONGEST
from nextlat.decoding.loop import STATE, Request, Stopping, decode, rests
from nextlat.decoding.options import (
    AUTO,
    REFUSED,
    REFUSED_ARGUMENTS,
    arguments_of_generate,
    check_draft_length,
    check_prompts,
    check_request,
    of_rows,
    other_arguments,
    refuse,
    rotary_change,
    unpadded,
)
from nextlat.decoding.prepared import obstacle, prepared, shares_passes, warn_once
from nextlat.decoding.sampling import Greedy, Sampler, Sampling, Scores
from nextlat.decoding.stats import Cycle, GenerationStats, Pass
from nextlat.errors import NextLatError, out_of_memory
from nextlat.objectives import Objective


class Decodable(Protocol):
    """What decoding needs of an `ObjectiveModel`."""

    lm: Any
    objective: Objective


def speculative(
    model: Decodable, *, streamer: Any = None, on_pass: Callable[[Pass], None] | None = None
) -> Callable[..., Any]:
    """Self-speculative decoding as a `custom_generate` of `transformers`:

        lm.generate(**inputs, custom_generate=nextlat.speculative(model), draft_length=6)

    Args:
        model: the `ObjectiveModel` around that very `lm`.
        streamer: as of `generate`; what that was given itself is heard too.
        on_pass: as of `generate` below.

    Returns:
        A function that takes, besides what `generate` prepares, `draft_length`, `generator`,
        `compile` and `return_stats`, with the meanings they have in `generate` below.
    """

    def decode_speculatively(
        lm: Any,
        input_ids: Tensor,
        logits_processor: Any = (),
        stopping_criteria: Any = (),
        generation_config: Any = None,
        draft_length: int | str = AUTO,
        generator: torch.Generator | None = None,
        compile: bool = False,
        return_stats: bool = False,
        **model_arguments: Any,
    ) -> Any:
        if lm is not model.lm:
            raise NextLatError(
                "nextlat.speculative(model) decodes model.lm only: call model.lm.generate with it"
            )
        config, objective, input_ids = generation_config, model.objective, input_ids.to(lm.device)
        given = arguments_of_generate()
        refuse(vars(config), REFUSED)
        refuse(given, REFUSED_ARGUMENTS)
        streamers = [x for x in (streamer, given.get("streamer")) if x is not None]
        B, T = input_ids.shape
        stopping = Stopping.from_criteria(stopping_criteria, T)
        prompts = unpadded(input_ids, model_arguments.get("attention_mask"))
        check_draft_length(objective, draft_length)
        check_request(objective, input_ids, prompts, stopping.limit, generator)
        if streamers and B > 1:
            raise NextLatError(
                f"a streamer shows one sequence, not {B}: give one prompt, or leave streamer out"
            )
        if objective.max_draft_length == 0:
            draft_length = 0
        others = other_arguments(model_arguments)
        longest = max(map(len, prompts)) + stopping.limit
        reaches = longest + (LONGEST if draft_length == AUTO else int(draft_length))
        change = rotary_change(lm)
        stays = change is None or reaches <= change
        usual = stays and not others
        together = usual and (draft_length != 0 or compile) and shares_passes(objective)
        direct = usual and bool(prepared(objective).shares_passes)  # if that has been tried
        scores = Scores(logits_processor)
        why = STATE.format(names) if (names := scores.keeping_state) else ""
        why = why or (stopping.needs_all_rows if B > 1 else "")
        if not stays:
            why = f"its rotary factors change at a length of {change} tokens"
        if B > 1 and others:
            why = f"{', '.join(sorted(others))} cannot be divided into rows"
        reason = "" if why or together or draft_length == 0 else obstacle(objective)
        if reason and draft_length != AUTO:
            raise NextLatError(f"{type(lm).__name__} cannot draft, {reason}: use draft_length=0")
        why = why or reason
        if draft_length != 0 and why:
            warn_once(objective, f"{type(lm).__name__} is decoded without drafts: {why}")
            draft_length = 0
            together = together and compile
        if B > 1 and draft_length != 0 and not together:
            warn_once(
                objective,
                f"{type(lm).__name__} with attention '{lm.config._attn_implementation}' keeps a "
                "cache whose rows cannot have lengths of their own (sliding windows, or another "
                "kind): rows are decoded one after another, with the same output",
            )
        compile = compile and _can_compile(objective, scores, together)
        sampler: Sampler = Sampling(scores, generator) if config.do_sample else Greedy(scores)
        sharing, limit = (B if together else 1), stopping.limit
        if draft_length == AUTO and rests(objective, sharing, sampler, compile, limit):
            draft_length, together = 0, compile
        pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
        listed = config.return_dict_in_generate and (config.output_scores or config.output_logits)

        def request(group: range) -> Request:
            scores = Scores(logits_processor, B, group[0], stopping.ends)
            return Request(
                [prompts[b] for b in group],
                Sampling(scores, generator) if config.do_sample else Greedy(scores),
                stopping,
                draft_length,
                [input_ids[b] for b in group],
                together,
                of_rows(model_arguments, group, B),
                direct,
                compile,
                bool(listed),
                bool(listed and config.output_scores),
                pad,
            )

        def tell(done: Pass, group: range) -> None:
            for listener in streamers:
                for token in done.cycles[0].tokens if done.cycles[0] is not None else ():
                    listener.put(torch.tensor([token]))
            if on_pass is not None:
                before, after = [None] * group[0], [None] * (B - len(group) - group[0])
                on_pass(replace(done, cycles=(*before, *done.cycles, *after)))

        if streamer is not None:  # `generate` itself tells its own
            streamer.put(input_ids.cpu())
        stats, rows = GenerationStats(), list[list[Cycle]]()
        begun = time.perf_counter()
        with evaluation_mode(lm, objective), _memory(B, T + stopping.limit):
            whole = together or draft_length == 0
            for group in [range(B)] if whole else [range(b, b + 1) for b in range(B)]:
                rows += _gather(decode(objective, request(group)), group, stats, tell)
        stats.seconds = time.perf_counter() - begun
        for listener in streamers:
            listener.end()
        out = _output(input_ids, rows, config, pad)
        return (out, stats) if return_stats else out

    return decode_speculatively


def generate(
    model: Decodable,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    draft_length: int | str = AUTO,
    generator: torch.Generator | None = None,
    compile: bool = False,
    return_stats: bool = False,
    streamer: Any = None,
    on_pass: Callable[[Pass], None] | None = None,
    tokenizer: Any = None,
    **generation: Any,
) -> Any:
    """Continue each prompt; whatever the draft length, with the output (greedy) or output
    distribution (sampling) of the LM.

    Args:
        model: an `ObjectiveModel`.
        input_ids: (B, T) prompts, shorter ones padded on the left.
        attention_mask: (B, T), 0 on padding; None: as `transformers` infers it.
        draft_length: tokens drafted per cycle by the objective; 0 decodes plainly; "auto" (default)
            drafts as long as it pays, by costs measured on this machine at the first call for a
            batch size and by the acceptance so far. Lengths then depend on timing, so that a sample
            drawn with a seed is only repeatable with a fixed length.
        generator: source of all randomness, on the model's device; None is torch's global generator
            there.
        compile: one graph for a whole cycle (a CUDA graph on a GPU), compiled at the first call for
            a batch size and length.
        return_stats: also return the `GenerationStats`.
        streamer: is given the tokens of the one prompt as they come.
        on_pass: is called with every `Pass` when it is done, the prefill first: what was drafted,
            and what became of it. Its cycles are those of all B rows, None for rows that took no
            part in it. Its time counts as overhead.
        tokenizer: needed for `stop_strings`.
        generation: `generation_config` or its fields, `logits_processor`, `stopping_criteria`, ...
            as of `transformers`' `generate`, with the same defaults (those of the model's own
            generation_config first). Processors of one's own may keep a state between calls, and so
            may stopping criteria of a batch: they are asked once a step with all rows, without
            drafts, unless they have an attribute `stateless = True`, which says that they depend on
            nothing but the number, the tokens and the scores of a row.

    Returns:
        What `transformers` would: ids (B, T + new), the prompts as given and then the new tokens,
        rows that ended early filled up with the padding token; or a `GenerateDecoderOnlyOutput`
        with `return_dict_in_generate`, whose scores and logits are zero after the end of a row.
        With `return_stats` a pair of that and the stats. It holds no cache.

    Raises:
        NextLatError: an option that is not supported (by name), a value outside its range, an empty
            prompt, ids outside the vocabulary, more tokens than the model has positions, an
            objective that cannot draft (so far), a cache that cannot forget, logits that are not
            finite, or too large a batch for the memory.
    """
    check_prompts(input_ids, attention_mask)
    lm, config = model.lm, generation.get("generation_config")
    stored = [x for x in (config, lm.generation_config) if x is not None]

    def setting(name: str) -> Any:
        values = (value for x in stored if (value := getattr(x, name, None)) is not None)
        return generation[name] if name in generation else next(values, None)

    # What `transformers` does with a tokenizer that it does not hand on.
    refuse({"token_healing": setting("token_healing")}, REFUSED)
    if strings := setting("stop_strings"):
        if tokenizer is None:
            raise NextLatError("stop_strings needs the tokenizer: pass tokenizer=...")
        criteria = StopStringCriteria(tokenizer, strings)
        generation["stopping_criteria"] = [criteria, *(generation.get("stopping_criteria") or ())]
        generation["stop_strings"] = None
    try:
        return lm.generate(
            input_ids.to(lm.device),
            attention_mask=None if attention_mask is None else attention_mask.to(lm.device),
            custom_generate=speculative(model, streamer=streamer, on_pass=on_pass),
            generator=generator,
            draft_length=draft_length,
            compile=compile,
            return_stats=return_stats,
            **generation,
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        raise NextLatError(" ".join(str(error).split())) from error


def _gather(
    passes: Iterator[Pass],
    group: range,
    stats: GenerationStats,
    tell: Callable[[Pass, range], None],
) -> list[list[Cycle]]:
    """The cycles of each row of the group."""
    cycles: list[list[Cycle]] = [[] for _ in group]
    for i, done in enumerate(passes):
        stats.count(done) if i else stats.count_prefill(done)
        for row, cycle in zip(cycles, done.cycles, strict=True):
            if cycle is not None:
                row.append(cycle)
        tell(done, group)
    return cycles


def _output(input_ids: Tensor, rows: Sequence[Sequence[Cycle]], config: Any, pad: int) -> Any:
    """In the shape in which `transformers` returns it."""
    tokens = [input_ids.new_tensor([x for cycle in row for x in cycle.tokens]) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=pad)
    ids = torch.cat([input_ids, padded], dim=1)
    if not config.return_dict_in_generate:
        return ids

    def steps(name: str) -> Any:
        each = [torch.cat([getattr(cycle, name) for cycle in row]) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(each, batch_first=True).float().unbind(dim=1)

    return GenerateDecoderOnlyOutput(
        sequences=ids,  # type: ignore[arg-type]
        scores=steps("scores") if config.output_scores else None,
        logits=steps("logits") if config.output_logits else None,
    )


@contextmanager
def _memory(rows: int, tokens: int) -> Iterator[None]:
    """Running out of memory as one sentence with the way out."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise NextLatError(
            f"out of memory with a batch of {rows} rows of up to {tokens} tokens: give fewer rows "
            "at a time or a lower max_new_tokens"
        ) from error


def _can_compile(objective: Objective, scores: Scores, together: bool) -> bool:
    """Whether one static graph can do it; where it cannot, that is said once."""
    reason = ""
    if not together:
        reason = "the model keeps a cache of changing shape"
    elif objective.cached_layers:
        reason = f"the objective '{objective.name}' drafts with layers of its own"
    elif scores.need_prefixes:
        reason = "a logits processor looks at the tokens before"
    if reason:
        warn_once(objective, f"compile=True has no effect: {reason}")
    return not reason
