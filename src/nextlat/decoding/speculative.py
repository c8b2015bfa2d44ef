"""Lossless self-speculative decoding: the objective drafts, the transformer verifies, one forward pass per cycle.

    prefill     h_t = transformer(prompt)                      x_{t+1} ~ head(h_t)
    draft       h_hat_{t+1} = draft(h_t, x_{t+1})              d_1 ~ head(h_hat_{t+1})      ... up to d_k
    verify      h_{t+1} .. h_{t+1+k} = transformer(x_{t+1}, d_1 .. d_k)                     one KV-cached forward pass
    accept      the first n drafted tokens, then one token of the transformer's own         (sampling.py)
    roll back   the k - n rejected tokens leave the cache; h_{t+1+n} starts the next draft

Teoh et al., arXiv 2511.05963, on self-speculative decoding; Leviathan et al., arXiv 2211.17192. Unlike the published NextLat
decoder everything is KV-cached, and the verification already yields the state that the next draft starts from, so that a
generation costs 1 + cycles forward passes of the transformer. With `draft_length=0` a cycle is a step of plain decoding.

Shapes: B rows, T tokens, D width, V vocabulary, k drafted tokens. The loop decodes one sequence (B = 1) at a time.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nextlat.backbone import Backbone
from nextlat.decoding.cache import check_rollback, recording_cache, roll_back
from nextlat.decoding.sampling import Draw, Greedy, Sampling
from nextlat.decoding.stats import Cycle, GenerationStats
from nextlat.errors import NextLatError
from nextlat.objectives import Objective

__all__ = ["Cycle", "Decodable", "GenerationStats", "decode", "generate"]


class Decodable(Protocol):
    """What decoding needs of an `ObjectiveModel`."""

    lm: Any

    @property
    def backbone(self) -> Backbone: ...

    @property
    def objective(self) -> Objective: ...

    def next_token_logits(self, h: Tensor) -> Tensor: ...

    def modules(self) -> Iterator[nn.Module]: ...


@torch.no_grad()
def generate(
    model: Decodable,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 128,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    draft_length: int = 0,
    eos_token_id: int | Iterable[int] | None = None,
    generator: torch.Generator | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, GenerationStats]:
    """Continue each prompt; whatever the draft length, with the output (greedy) or output distribution (sampling) of the LM.

    Words and results are those of `transformers`' `generate`. Of the model's own generation_config only the ids of
    the end-of-sequence and padding tokens are read; everything else is an argument here.

    Args:
        model: an `ObjectiveModel`.
        input_ids: (B, T) prompts. Rows are decoded one after another.
        attention_mask: (B, T), 0 on the left padding of a shorter prompt. None: every token counts, a padding token too.
        max_new_tokens: at least 1; generation ends there or behind an end-of-sequence token.
        do_sample: draw tokens at `temperature`, truncated by `top_k` and `top_p`; otherwise take the most likely one.
        draft_length: tokens drafted per cycle by the objective; 0 decodes plainly. Drafts never reach past max_new_tokens.
        eos_token_id: one id or several; None reads the model's generation_config, an empty list never ends early.
        generator: source of all randomness, on the model's device; None is torch's global generator there.
        return_stats: also return the `GenerationStats`.

    Returns:
        ids (B, T + new), on the model's device: the prompts as given, then the new tokens; rows that ended early are filled up
        with the padding token (an end-of-sequence token where there is none).

    Raises:
        NextLatError: an argument outside its range, an empty prompt, ids outside the vocabulary, more tokens than the model has
            positions, an objective that cannot draft (so far), a cache that cannot forget, or logits that are not finite.
    """
    rule = _rule(do_sample, temperature, top_k, top_p, generator)
    input_ids = input_ids.to(model.lm.device)
    prompts = _prompts(input_ids, attention_mask)
    _check_request(model, input_ids, prompts, max_new_tokens, draft_length, generator)
    eos = _end_tokens(model, eos_token_id)
    stats = GenerationStats(sequences=len(prompts))
    rows: list[list[int]] = []
    start = time.perf_counter()
    with _evaluating(model):
        for prompt_1T in prompts:
            prefill, *cycles = decode(model, prompt_1T, rule, max_new_tokens, draft_length, eos)
            stats.tokens += len(prefill.tokens)
            for cycle in cycles:
                stats.count(cycle)
            rows.append([token for cycle in (prefill, *cycles) for token in cycle.tokens])
    stats.seconds = time.perf_counter() - start
    longest, pad = max(len(row) for row in rows), _padding_token(model, eos)
    padded = [row + [pad] * (longest - len(row)) for row in rows]
    ids = torch.cat([input_ids, torch.tensor(padded, dtype=input_ids.dtype, device=input_ids.device)], dim=1)
    return (ids, stats) if return_stats else ids


def decode(
    model: Decodable,
    prompt_1T: Tensor,
    rule: Greedy | Sampling,
    max_new_tokens: int,
    draft_length: int,
    eos: frozenset[int] = frozenset(),
) -> Iterator[Cycle]:
    """The loop itself, one `Cycle` per forward pass of the transformer as it happens; the first is the prefill, with one token.

    Args are those of `generate`, already checked. The caller holds `no_grad` and eval mode.
    """
    backbone, objective = model.backbone, model.objective
    rollback = draft_length > 0
    # Without drafts nothing is ever rolled back, and the model may choose its own cache.
    h_1TD, cache = backbone.step(prompt_1T, recording_cache(objective.cache_config) if rollback else None)
    state_1S = None
    if rollback:
        check_rollback(cache)
        state_1S = objective.drafting_states(h_1TD, prompt_1T)[:, -1]
        roll_back(cache, 0)
    first = rule.draw(model.next_token_logits(objective.output_states(h_1TD, prompt_1T)[:, -1]))
    token_1 = first.tokens
    token, finite = torch.stack([token_1[0], first.peak.isfinite().all().long()]).tolist()
    _check_finite(finite, True)
    yield Cycle((), 0, (token,))
    produced, ended = 1, token in eos

    while produced < max_new_tokens and not ended:
        length = min(draft_length, max_new_tokens - produced - 1)
        drafts = _draft(model, rule, state_1S, token_1, length) if state_1S is not None else []
        read_1K = torch.stack([token_1, *(draft.tokens for draft in drafts)], dim=1)
        h_1KD, cache = backbone.step(read_1K, cache)
        accepted_1, token_1, peak_1K = rule.verify(model.next_token_logits(objective.output_states(h_1KD, read_1K)), drafts)

        # The one read-back of the cycle.
        finite = torch.cat([peak_1K.amax(dim=-1), *(draft.peak for draft in drafts)]).isfinite().long()
        values = torch.cat([accepted_1, token_1, finite, read_1K[0, 1:]]).tolist()
        accepted, following, drafted = values[0], values[1], tuple(values[3 + len(drafts) :])
        _check_finite(values[2], all(values[3 : 3 + len(drafts)]))

        if rollback:
            state_1S = objective.drafting_states(h_1KD, read_1K)[:, accepted]  # where `following` was chosen
            roll_back(cache, len(drafted) - accepted)
        tokens = (*drafted[:accepted], following)
        end = next((i for i, token in enumerate(tokens) if token in eos), None)
        if end is not None:
            tokens, ended = tokens[: end + 1], True
        yield Cycle(drafted, min(accepted, len(tokens)), tokens)
        produced += len(tokens)


def _draft(model: Decodable, rule: Greedy | Sampling, state_BS: Tensor, token_B: Tensor, length: int) -> list[Draw]:
    """`length` tokens in a row, each drawn in the state that the objective predicts after reading the one before.

    Every drawn token is kept: whether to stop may depend on anything known before a draw, never on the probability of the
    token that was drawn, which would bias the output.
    """
    drafts: list[Draw] = []
    for _ in range(length):
        state_BS, logits_BV = model.objective.draft(state_BS, token_B)
        drafts.append(rule.draw(logits_BV))
        token_B = drafts[-1].tokens
    return drafts


def _check_finite(target: bool, drafter: bool) -> None:
    if not target:
        raise NextLatError("the model gives logits that are not finite: check its weights, or use a wider dtype")
    if not drafter:
        raise NextLatError("the drafter gives logits that are not finite: check its weights, or use draft_length=0")


@contextmanager
def _evaluating(model: Decodable) -> Iterator[None]:
    """Dropout off; every module's own training flag is put back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _rule(
    do_sample: bool, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Greedy | Sampling:
    if do_sample:
        return Sampling(temperature, top_k, top_p, generator)
    if temperature not in (0, 1) or top_k is not None or top_p is not None:
        raise NextLatError("temperature, top_k and top_p have no effect on greedy decoding: pass do_sample=True as well")
    return Greedy()


def _prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """(1, T) rows without their left padding."""
    if input_ids.dim() != 2 or input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise NextLatError(
            f"input_ids must be integers of shape (rows, tokens), got {input_ids.dtype} of shape {tuple(input_ids.shape)}"
        )
    if 0 in input_ids.shape:
        raise NextLatError("the prompt is empty: give at least one token to continue")
    if attention_mask is None:
        return list(input_ids.split(1))
    if attention_mask.shape != input_ids.shape:
        raise NextLatError(
            f"attention_mask has shape {tuple(attention_mask.shape)} but input_ids {tuple(input_ids.shape)}: they must agree"
        )
    lengths = attention_mask.bool().sum(dim=1).tolist()
    for row, length in enumerate(lengths):
        if length == 0:
            raise NextLatError(f"the prompt in row {row} is empty, all of it is padding: give at least one token to continue")
        if not attention_mask[row, -length:].all():
            raise NextLatError(f"the padding of row {row} is not all on its left: use tokenizer.padding_side='left'")
    return [row[:, -length:] for row, length in zip(input_ids.split(1), lengths, strict=True)]


def _check_request(
    model: Decodable,
    input_ids: Tensor,
    prompts: list[Tensor],
    max_new_tokens: int,
    draft_length: int,
    generator: torch.Generator | None,
) -> None:
    if max_new_tokens < 1:
        raise NextLatError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if draft_length < 0:
        raise NextLatError(f"draft_length must not be below zero, got {draft_length}: use 0 to decode without drafts")
    most = model.objective.max_draft_length
    if most is not None and draft_length > most:
        name = model.objective.name
        cause = f"drafts at most {most} tokens" if most else "cannot draft"
        raise NextLatError(f"the objective '{name}' {cause}: use draft_length={most}{' or less' if most else ''}")
    vocabulary = len(model.lm.get_input_embeddings().weight)
    low, high = input_ids.aminmax()
    if low < 0 or high >= vocabulary:
        wrong = int(low) if low < 0 else int(high)
        raise NextLatError(
            f"token {wrong} is outside the model's {vocabulary} tokens: check that the tokenizer is the model's own"
        )
    longest = max(prompt.shape[1] for prompt in prompts)
    positions = getattr(model.lm.config.get_text_config(decoder=True), "max_position_embeddings", None)
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


def _end_tokens(model: Decodable, eos_token_id: int | Iterable[int] | None) -> frozenset[int]:
    if eos_token_id is None:
        eos_token_id = getattr(model.lm.generation_config, "eos_token_id", None)
    if eos_token_id is None:
        return frozenset()
    return frozenset(map(int, eos_token_id) if isinstance(eos_token_id, Iterable) else [int(eos_token_id)])


def _padding_token(model: Decodable, eos: frozenset[int]) -> int:
    pad = getattr(model.lm.generation_config, "pad_token_id", None)
    return pad if pad is not None else min(eos, default=0)
