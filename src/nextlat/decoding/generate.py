"""The words of `transformers`' `generate`, for self-speculative decoding.

`transformers` itself merges the generation config, makes the logits processors and stopping
criteria, and calls our loop in place of its own (`custom_generate`): so every word has the meaning
that it has there, or is refused by name.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from nextlat.decoding.cache import CannotForgetError
from nextlat.decoding.cycle import Rule
from nextlat.decoding.known import Decodable, batches, tell_once
from nextlat.decoding.loop import decode
from nextlat.decoding.sampling import Greedy, Sampling, Scores
from nextlat.decoding.stats import Cycle, GenerationStats, Pass
from nextlat.decoding.stopping import Stopping
from nextlat.errors import NextLatError

AUTO = "auto"
# What our loop does not do, and the value at which that makes no difference.
REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "guidance_scale": (None, 1, 1.0),
    "watermarking_config": (None,),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "use_cache": (None, True),
    "cache_implementation": (None, "dynamic"),
    "low_memory": (None, False),
}
LOAD_BEARING = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
}


def speculative(
    model: Decodable, *, streamer: Any = None, on_pass: Callable[[Pass], None] | None = None
) -> Callable[..., Any]:
    """Self-speculative decoding as a `custom_generate` of `transformers`:

        lm.generate(**inputs, custom_generate=nextlat.speculative(model), draft_length=6)

    Args:
        model: the `ObjectiveModel` around that very `lm`. streamer: as of `generate`, which (up to
            5.23 at least) does not hand its own on. on_pass: as of `generate` below.

    Returns:
        A function that takes, besides what `generate` prepares, `draft_length`, `generator`,
        `compile` and `return_stats`, with the meanings they have in `generate` below.
    """

    def decode_speculatively(
        lm: Any,
        input_ids: Tensor,
        logits_processor: Any = (),
        stopping_criteria: Any = (),
        generation_config: GenerationConfig | None = None,
        draft_length: int | str = AUTO,
        generator: torch.Generator | None = None,
        compile: bool = False,
        return_stats: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        if lm is not model.lm:
            raise NextLatError(
                "nextlat.speculative(model) decodes model.lm only: call model.lm.generate with it"
            )
        assert generation_config is not None
        _refuse(generation_config, model_kwargs)
        return _generate(
            model,
            input_ids.to(lm.device),
            model_kwargs.get("attention_mask"),
            logits_processor,
            stopping_criteria,
            generation_config,
            draft_length,
            generator,
            compile,
            return_stats,
            streamer,
            on_pass,
        )

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
        streamer: is given the tokens of the one prompt as they come. tokenizer: needed for
            `stop_strings`.
        on_pass: is called with every `Pass` when it is done, the prefill first: what was drafted,
            and what became of it. Its cycles are those of all B rows, None for rows that took no
            part in it. Its time counts as overhead.
        generation: `generation_config` or its fields, `logits_processor`, `stopping_criteria`, ...
            as of `transformers`' `generate`, with the same defaults (those of the model's own
            generation_config first).

    Returns:
        What `transformers` would: ids (B, T + new), the prompts as given and then the new tokens,
        rows that ended early filled up with the padding token; or a `GenerateDecoderOnlyOutput`
        with `return_dict_in_generate`, whose scores and logits are zero behind the end of a row.
        With `return_stats` a pair of that and the stats. One difference: in a batch of a model
        without end-of-sequence token, `transformers` lets rows that a stopping criterion has ended
        run on with the others; here they end.

    Raises:
        NextLatError: an option that is not supported (by name), a value outside its range, an empty
            prompt, ids outside the vocabulary, more tokens than the model has positions, an
            objective that cannot draft (so far), a cache that cannot forget, logits that are not
            finite, or too large a batch for the memory.
    """
    _check_prompts(model, input_ids, attention_mask)
    lm = model.lm
    generation = dict(generation)
    strings = generation.pop("stop_strings", None) or getattr(
        generation.get("generation_config"), "stop_strings", None
    )
    if strings:
        if tokenizer is None:
            raise NextLatError("stop_strings needs the tokenizer: pass tokenizer=...")
        criteria = [
            *(generation.get("stopping_criteria") or ()),
            StopStringCriteria(tokenizer, strings),
        ]
        generation["stopping_criteria"] = StoppingCriteriaList(criteria)
        if generation.get("generation_config") is not None:
            generation["generation_config"] = GenerationConfig.from_dict(
                {**generation["generation_config"].to_dict(), "stop_strings": None}
            )
    for name in (
        "assistant_model",
        "negative_prompt_ids",
        "inputs_embeds",
        "past_key_values",
        "synced_gpus",
    ):
        if generation.get(name) is not None:
            raise NextLatError(
                f"{name} is not supported by self-speculative decoding: leave it out, or use model.lm.generate"
            )
    call = speculative(model, streamer=streamer, on_pass=on_pass)
    extra: dict[str, Any] = {
        "draft_length": draft_length,
        "compile": compile,
        "return_stats": return_stats,
    }
    try:
        return lm.generate(
            input_ids.to(lm.device),
            attention_mask=None if attention_mask is None else attention_mask.to(lm.device),
            custom_generate=call,
            generator=generator,
            **extra,
            **generation,
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        raise NextLatError(" ".join(str(error).split())) from error


def _generate(
    model: Decodable,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    processors: Any,
    criteria: Any,
    config: Any,
    draft_length: int | str,
    generator: torch.Generator | None,
    compile: bool,
    return_stats: bool,
    streamer: Any,
    on_pass: Callable[[Pass], None] | None,
) -> Any:
    """The loop, with what `transformers` has prepared."""
    B, T = input_ids.shape
    prompts = _prompts(input_ids, attention_mask)
    stopping = Stopping.from_criteria(criteria, T)
    _check_request(model, input_ids, prompts, stopping.new_tokens, draft_length, generator)
    if streamer is not None and B > 1:
        raise NextLatError(
            f"a streamer shows one sequence, not {B}: give one prompt, or leave streamer out"
        )
    compile = compile and _can_compile(model, Scores(processors))
    if model.objective.max_draft_length == 0 and draft_length == AUTO:
        draft_length = 0
    together = draft_length == 0 or batches(model)
    if B > 1 and not together:
        tell_once(
            model,
            f"{type(model.lm).__name__} with attention '{model.lm.config._attn_implementation}' keeps a cache whose rows cannot "
            "have lengths of their own (sliding windows, or another kind): rows are decoded one after another, with the same output",
        )
    keep = bool(config.return_dict_in_generate and (config.output_scores or config.output_logits))
    if streamer is not None:
        streamer.put(input_ids.cpu())

    def passes(group: range, length: int | str) -> Iterator[Pass]:
        scores = Scores(processors, B, group[0])
        rule: Rule = Sampling(scores, generator) if config.do_sample else Greedy(scores)
        some, seen = [prompts[b] for b in group], [input_ids[b] for b in group]
        return decode(
            model, some, rule, stopping, length, seen=seen, compile=compile, keep_scores=keep
        )

    def tell(done: Pass, group: range) -> None:
        if streamer is not None:
            for token in done.cycles[0].tokens if done.cycles[0] is not None else ():
                streamer.put(torch.tensor([token]))
        if on_pass is not None:
            after = B - len(group) - group[0]
            on_pass(replace(done, cycles=(*[None] * group[0], *done.cycles, *[None] * after)))

    stats, rows = GenerationStats(), list[list[Cycle]]()
    begun = time.perf_counter()
    with _evaluating(model), _memory(B, T + stopping.new_tokens):
        for group in [range(B)] if together else [range(b, b + 1) for b in range(B)]:
            try:
                rows += _gather(passes(group, draft_length), group, stats, tell)
            except CannotForgetError:  # found out before any token came
                if draft_length != AUTO:
                    raise
                tell_once(
                    model,
                    f"{type(model.lm).__name__} has recurrent layers, which cannot forget a draft: decoding plainly",
                )
                draft_length = 0
                rows += _gather(passes(group, draft_length), group, stats, tell)
    stats.seconds = time.perf_counter() - begun
    if streamer is not None:
        streamer.end()
    out = _output(model, input_ids, rows, config)
    return (out, stats) if return_stats else out


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


def _output(model: Decodable, input_ids: Tensor, rows: list[list[Cycle]], config: Any) -> Any:
    """In the shape in which `transformers` returns it."""
    tokens = [[token for cycle in row for token in cycle.tokens] for row in rows]
    longest, pad = max(map(len, tokens)), _padding_token(config)
    padded = [row + [pad] * (longest - len(row)) for row in tokens]
    ids = torch.cat(
        [input_ids, torch.tensor(padded, dtype=input_ids.dtype, device=input_ids.device)], dim=1
    )
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
def _evaluating(model: Decodable) -> Iterator[None]:
    """Dropout off; every module's own training flag is put back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _memory(rows: int, tokens: int) -> Iterator[None]:
    """Running out of memory as one sentence with the way out."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(error):
            raise
        raise NextLatError(
            f"out of memory with a batch of {rows} rows of up to {tokens} tokens: give fewer rows at a time or a lower max_new_tokens"
        ) from error


def _can_compile(model: Decodable, scores: Scores) -> bool:
    """Whether one static graph can do it; where it cannot, that is said once."""
    reason = ""
    if not batches(model):
        reason = "the model keeps a cache of changing shape"
    elif model.objective.cache_config is not model.lm.config:
        reason = f"the objective '{model.objective.name}' drafts with layers that keep caches of their own"
    elif scores.need_past:
        reason = "a logits processor looks at the tokens before"
    if reason:
        tell_once(model, f"compile=True has no effect: {reason}")
    return not reason


def _refuse(config: Any, model_kwargs: dict[str, Any]) -> None:
    for name, harmless in REFUSED.items():
        value = getattr(config, name, None)
        if value not in harmless:
            raise NextLatError(
                f"{name}={value!r} is not supported by self-speculative decoding: leave it out, or use model.lm.generate"
            )
    if unknown := sorted(
        name for name in model_kwargs.keys() - LOAD_BEARING if model_kwargs[name] is not None
    ):
        raise NextLatError(
            f"{', '.join(unknown)}: not supported by self-speculative decoding, leave it out"
        )


def _check_prompts(model: Decodable, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """What must hold before `transformers` looks at it."""
    if (
        input_ids.dim() != 2
        or input_ids.is_floating_point()
        or input_ids.is_complex()
        or input_ids.dtype == torch.bool
    ):
        raise NextLatError(
            f"input_ids must be integers of shape (rows, tokens), got {input_ids.dtype} of shape {tuple(input_ids.shape)}"
        )
    if 0 in input_ids.shape:
        raise NextLatError("the prompt is empty: give at least one token to continue")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise NextLatError(
            f"attention_mask has shape {tuple(attention_mask.shape)} but input_ids {tuple(input_ids.shape)}: they must agree"
        )


def _prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """(T,) rows without their left padding."""
    if attention_mask is None:
        return list(input_ids)
    lengths = attention_mask.bool().sum(dim=1).tolist()
    for row, length in enumerate(lengths):
        if length == 0:
            raise NextLatError(
                f"the prompt in row {row} is empty, all of it is padding: give at least one token to continue"
            )
        if not attention_mask[row, -length:].all():
            raise NextLatError(
                f"the padding of row {row} is not all on its left: use tokenizer.padding_side='left'"
            )
    return [row[-length:] for row, length in zip(input_ids, lengths, strict=True)]


def _check_request(
    model: Decodable,
    input_ids: Tensor,
    prompts: list[Tensor],
    max_new_tokens: int,
    draft_length: int | str,
    generator: torch.Generator | None,
) -> None:
    if max_new_tokens < 1:
        raise NextLatError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if draft_length != AUTO:
        if not isinstance(draft_length, int):
            raise NextLatError(
                f"draft_length must be a whole number or 'auto', got {draft_length!r}"
            )
        if draft_length < 0:
            raise NextLatError(
                f"draft_length must not be below zero, got {draft_length}: use 0 to decode without drafts"
            )
        most = model.objective.max_draft_length
        if most is not None and draft_length > most:
            name = model.objective.name
            cause = f"drafts at most {most} tokens" if most else "cannot draft"
            raise NextLatError(
                f"the objective '{name}' {cause}: use draft_length={most}{' or less' if most else ''}"
            )
    vocabulary = len(model.lm.get_input_embeddings().weight)
    low, high = input_ids.aminmax()
    if low < 0 or high >= vocabulary:
        wrong = int(low) if low < 0 else int(high)
        raise NextLatError(
            f"token {wrong} is outside the model's {vocabulary} tokens: check that the tokenizer is the model's own"
        )
    longest = max(map(len, prompts))
    positions = getattr(
        model.lm.config.get_text_config(decoder=True), "max_position_embeddings", None
    )
    if positions is not None and longest + max_new_tokens > positions:
        raise NextLatError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's {positions} positions: "
            "shorten the prompt or lower max_new_tokens"
        )
    if generator is not None and generator.device.type != input_ids.device.type:
        raise NextLatError(
            f"the generator is on {generator.device.type} but the model on {input_ids.device.type}: "
            f"make it with torch.Generator('{input_ids.device.type}')"
        )


def _padding_token(config: Any) -> int:
    if config._pad_token_tensor is not None:
        return int(config._pad_token_tensor)
    return 0
