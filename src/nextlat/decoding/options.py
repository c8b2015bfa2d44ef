"""What a request for decoding may be: everything that our loop cannot do as `transformers` does is
refused by name, in one sentence."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from nextlat.errors import NextLatError
from nextlat.head import size
from nextlat.objectives import Objective

AUTO = "auto"
GENERATE = inspect.unwrap(GenerationMixin.generate).__code__
# Fields of `GenerationConfig` that our loop does not do, and the values at which that makes no
# difference.
REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "use_mtp": (None, False),
    "is_assistant": (None, False),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "token_healing": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "cache_implementation": (None, "dynamic"),
    "low_memory": (None, False),
}
# The same of the arguments of `generate` beside it, and of the model's.
REFUSED_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "assistant_model": (None,),
    "assistant_tokenizer": (None,),
    "inputs_embeds": (None,),
    "cache": (None,),
    "past_key_values": (None,),  # its names up to transformers 5.23
    "cache_params": (None,),
    "synced_gpus": (None, False),
}
# What `generate` prepares for every model. Others are handed on with the library's own cache.
MODEL_ARGUMENTS = {
    "attention_mask", "position_ids", "cache", "past_key_values", "cache_params", "use_cache",
    "logits_to_keep",
}  # fmt: skip


def refuse(given: Mapping[str, Any], refused: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse by name what is not supported."""
    for name, harmless in refused.items():
        value = given.get(name)
        if not any(
            value is x or (isinstance(value, int | float | str) and value == x) for x in harmless
        ):
            shown = f"={value!r}" if isinstance(value, int | float | str) else ""
            raise NextLatError(
                f"{name}{shown} is not supported by self-speculative decoding: leave it out, or "
                "use model.lm.generate"
            )


def arguments_of_generate() -> dict[str, Any]:
    """What the call of `transformers`' `generate` that we are in was given: it does not hand all of
    that on to a `custom_generate`, a streamer or another model's help for example (up to 5.23 at
    least)."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not GENERATE:
        frame = frame.f_back
    if frame is None:
        return {}
    given = frame.f_locals
    return {
        name: given.get(name) for name in inspect.signature(GenerationMixin.generate).parameters
    } | given["kwargs"]


def other_arguments(arguments: Mapping[str, Any]) -> set[str]:
    """Names of those that `generate` does not give to every model, or not with these values."""
    empty = {name for name, x in arguments.items() if x is None or (type(x) is dict and not x)}
    others = arguments.keys() - MODEL_ARGUMENTS - empty
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if positions is not None:
        mask = torch.ones_like(positions) if mask is None else mask
        usual = mask.long().cumsum(dim=-1) - 1
        if positions.shape != usual.shape or bool(((positions != usual) & (mask != 0)).any()):
            others.add("position_ids")
    return others


def rotary_change(lm: PreTrainedModel) -> int | None:
    """Length of text from which on the rotary factors are others, so that what was cached before
    does not go with what comes after; None = they never change."""
    config: Any = lm.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    changing = [kind for kind in kinds if kind.get("rope_type") in ("dynamic", "longrope")]
    name = "original_max_position_embeddings"
    return min(
        (kind.get(name) or config.max_position_embeddings for kind in changing), default=None
    )


def of_rows(arguments: Mapping[str, Any], group: range, rows: int) -> dict[str, Any]:
    """What `generate` has prepared for the model, of these rows."""
    if len(group) == rows:
        return dict(arguments)
    chosen = slice(group.start, group.stop)
    return {
        name: value[chosen] if isinstance(value, Tensor) else value
        for name, value in arguments.items()
        if name in MODEL_ARGUMENTS
    }


def check_prompts(input_ids: Tensor, attention_mask: Tensor | None) -> None:
    """What must hold before `transformers` looks at it."""
    fractional = input_ids.is_floating_point() or input_ids.is_complex()
    if input_ids.dim() != 2 or fractional or input_ids.dtype == torch.bool:
        raise NextLatError(
            f"input_ids must be integers of shape (rows, tokens), got {input_ids.dtype} of shape "
            f"{tuple(input_ids.shape)}"
        )
    if 0 in input_ids.shape:
        raise NextLatError("the prompt is empty: give at least one token to continue")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise NextLatError(
            f"attention_mask has shape {tuple(attention_mask.shape)} but input_ids "
            f"{tuple(input_ids.shape)}: they must agree"
        )


def unpadded(input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """(T,) rows without their left padding."""
    if attention_mask is None:
        return list(input_ids)
    lengths = attention_mask.bool().sum(dim=1).tolist()
    for row, length in enumerate(lengths):
        if length == 0:
            raise NextLatError(
                f"the prompt in row {row} is empty, all of it is padding: give at least one token "
                "to continue"
            )
        if not attention_mask[row, -length:].all():
            raise NextLatError(
                f"the padding of row {row} is not all on its left: use "
                "tokenizer.padding_side='left'"
            )
    return [row[-length:] for row, length in zip(input_ids, lengths, strict=True)]


def check_draft_length(objective: Objective, draft_length: int | str) -> None:
    if draft_length == AUTO:
        return
    if not isinstance(draft_length, int):
        raise NextLatError(f"draft_length must be a whole number or 'auto', got {draft_length!r}")
    if draft_length < 0:
        raise NextLatError(
            f"draft_length must not be below zero, got {draft_length}: use 0 to decode without "
            "drafts"
        )
    limit = objective.max_draft_length
    if limit is not None and draft_length > limit:
        cause = f"drafts at most {limit} tokens" if limit else "cannot draft"
        raise NextLatError(
            f"the objective '{objective.name}' {cause}: use draft_length={limit}"
            f"{' or less' if limit else ''}"
        )


def check_request(
    objective: Objective,
    input_ids: Tensor,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    generator: torch.Generator | None,
) -> None:
    if max_new_tokens < 1:
        raise NextLatError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    lm, device = objective.backbone.lm, input_ids.device.type
    vocabulary, (low, high) = size(lm.get_input_embeddings()), input_ids.aminmax()
    if low < 0 or high >= vocabulary:
        raise NextLatError(
            f"token {int(low if low < 0 else high)} is outside the model's {vocabulary} tokens: "
            "check that the tokenizer is the model's own"
        )
    longest, text_config = max(map(len, prompts)), lm.config.get_text_config(decoder=True)
    positions = getattr(text_config, "max_position_embeddings", None)
    if rotary_change(lm) == positions:
        positions = None  # rotary factors that grow with the text are made to go beyond
    if positions is not None and longest + max_new_tokens > positions:
        raise NextLatError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's "
            f"{positions} positions: shorten the prompt or lower max_new_tokens"
        )
    if generator is not None and generator.device.type != device:
        raise NextLatError(
            f"the generator is on {generator.device.type} but the model on {device}: make it with "
            f"torch.Generator('{device}')"
        )
