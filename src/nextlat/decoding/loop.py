"""Lossless self-speculative decoding: the objective drafts, the transformer verifies, one forward
pass per cycle.

    prefill     h_t = transformer(prompt)                      x_{t+1} ~ head(h_t)
    draft       h_hat_{t+1} = draft(h_t, x_{t+1})              d_1 ~ head(h_hat_{t+1})      ... up to d_k
    verify      h_{t+1} .. h_{t+1+k} = transformer(x_{t+1}, d_1 .. d_k)                     one KV-cached forward pass
    accept      the first n drafted tokens, then one token of the transformer's own         (sampling.py)
    roll back   the k - n rejected tokens leave the cache; h_{t+1+n} starts the next draft  (cache.py)

Teoh et al., arXiv 2511.05963, on self-speculative decoding; Leviathan et al., arXiv 2211.17192.
Unlike the published NextLat decoder everything is KV-cached, and the verification already yields
the state that the next draft starts from, so that a generation costs 1 + cycles forward passes of
the transformer. Rows of a batch share every pass, accept different numbers of tokens and end at
different times. With a draft length of 0 a cycle is a step of plain decoding.

Shapes: B rows, T tokens, D width, V vocabulary, k drafted tokens, S width of the state that drafts
    start from (D for NextLat).
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nextlat.decoding.cache import GrowingCache, RaggedCache
from nextlat.decoding.cycle import Clock, Compiled, Eager, Rule, at
from nextlat.decoding.draft_length import LONGEST, AdaptiveLength, Costs, FixedLength, measure
from nextlat.decoding.known import Decodable, batches, known
from nextlat.decoding.sampling import Past, Sampling
from nextlat.decoding.stats import Cycle, Pass
from nextlat.decoding.stopping import Stopping
from nextlat.errors import NextLatError

COMPILED_LENGTHS = (0, 1, 2, 4, 8)  # each is a graph of its own, compiled when it is first used


def decode(
    model: Decodable,
    prompts: Sequence[Tensor],
    rule: Rule,
    stopping: Stopping,
    draft_length: int | str,
    *,
    seen: Sequence[Tensor] | None = None,
    compile: bool = False,
    keep_scores: bool = False,
) -> Iterator[Pass]:
    """The loop itself, one `Pass` per forward pass of the transformer as it happens; the first is
    the prefill, with one token a row.

    Args are those of `generate`, already checked; the caller holds `no_grad` and eval mode.
        prompts: (T,) each, without padding. More than one only without drafts, or where
            `batches(model)`.
        seen: the prompts as logits processors and stopping criteria shall see them, left padding
            included.
        keep_scores: leave scores and logits of every new token in the cycles.
    """
    seen = list(prompts if seen is None else seen)
    backbone, objective, device, rows = (
        model.backbone,
        model.objective,
        model.lm.device,
        range(len(prompts)),
    )
    most_new = stopping.new_tokens
    cache: RaggedCache | GrowingCache
    if compile:
        cache = _kept_cache(model, len(prompts), max(map(len, prompts)) + most_new)
    elif draft_length != 0 and batches(model):  # without drafts nothing is ragged
        cache = RaggedCache(backbone, objective.cache_config, max(map(len, prompts)) + most_new)
    else:
        cache = GrowingCache(backbone, objective.cache_config, forgets=draft_length != 0)
    clock = Clock(device)

    start = clock.mark()
    tokens_BT, h_BTD, last_B = cache.prefill(prompts)
    logits_BV = model.next_token_logits(at(objective.output_states(h_BTD, tokens_BT), last_B))
    # The second is asked for before anything is forgotten, and only by those who draft (it may have
    # work to do).
    state_BS = at(
        objective.drafting_states(h_BTD, tokens_BT) if draft_length != 0 else h_BTD, last_B
    )
    cache.keep([len(prompt) for prompt in prompts])
    past = Past([ids[:-1] for ids in seen], torch.stack([ids[-1:] for ids in seen]))
    scores_BV = rule.scores(logits_BV[:, None], past)[:, 0]
    noise = rule.noise(len(prompts), 0, scores_BV.shape[-1], device)
    token_B = rule.draw(scores_BV, noise, 0).tokens
    values = torch.stack([token_B, logits_BV.amax(dim=-1).isfinite().long()]).tolist()
    _check_finite(values[1], [1] * len(prompts))
    text: list[list[int]] = [[token] for token in values[0]]
    if stopping.criteria:
        text = [[*ids.tolist(), token] for ids, token in zip(seen, values[0], strict=True)]
    produced = [1] * len(prompts)
    ended = [
        stopping.cut([token], text[b][:-1], device)[1] or most_new == 1
        for b, token in enumerate(values[0])
    ]
    keep = [(scores_BV[b, None], logits_BV[b, None]) if keep_scores else (None, None) for b in rows]
    prefill = clock.seconds(start, clock.mark())
    yield Pass(
        tuple(Cycle((), 0, (token,), *keep[b]) for b, token in enumerate(values[0])),
        prefill=prefill,
    )
    if all(ended):
        return
    if rule.scores.need_past:
        seen = [torch.cat([ids, token[None]]) for ids, token in zip(seen, token_B, strict=True)]

    cycle = (Compiled if compile else Eager)(model, rule, cache, drafts=draft_length != 0)
    begun = time.perf_counter()
    length = _draft_length(model, cycle, draft_length, state_BS, token_B)
    measuring = time.perf_counter() - begun
    while not all(ended):
        rooms = [0 if done else most_new - n - 1 for done, n in zip(ended, produced, strict=True)]
        active = [b for b in rows if not ended[b]]
        planned = min(length.plan(active), cycle.longest(max(rooms)))
        most = [min(planned, room) for room in rooms]
        more = length.more if isinstance(length, AdaptiveLength) and length.stepwise else None
        past_rows = [ids[:-1] for ids in seen] if rule.scores.need_past else ()
        start = clock.mark()
        out = cycle.run(state_BS, token_B, most, planned, past_rows, more, clock)
        values = out.packed.tolist()  # the one read-back of the cycle
        end = clock.mark()
        accepted, following, sound, drafter_sound, *drafted = values
        _check_finite([s or done for s, done in zip(sound, ended, strict=True)], drafter_sound)
        lengths = [min(n, len(drafted)) for n in most]
        length.observe([lengths[b] for b in active], [accepted[b] for b in active])

        cycles: list[Cycle | None] = [None] * len(prompts)
        counts = [0] * len(
            prompts
        )  # tokens read that stay in the cache: the one before the draft, and what was accepted
        for b in active:
            counts[b] = accepted[b] + 1
            row = tuple(drafted[j][b] for j in range(lengths[b]))
            tokens, ended[b] = stopping.cut((*row[: accepted[b]], following[b]), text[b], device)
            kept = (
                (out.scores_BKV[b, : len(tokens)].clone(), out.logits_BKV[b, : len(tokens)].clone())
                if keep_scores
                else (None, None)
            )
            cycles[b] = Cycle(row, min(accepted[b], len(tokens)), tuple(tokens), *kept)
            produced[b] += len(tokens)
            ended[b] = ended[b] or produced[b] >= most_new
            if stopping.criteria:
                text[b] += tokens
            if rule.scores.need_past:
                seen[b] = torch.cat([seen[b], torch.tensor(tokens, device=device)])
        cache.keep(counts)
        state_BS, token_B = out.state_BS, out.packed[1]
        seconds = {
            "draft": clock.seconds(start, out.drafted_at),
            "verify": clock.seconds(out.drafted_at, end),
        }
        yield Pass(tuple(cycles), measure=measuring, **seconds)
        measuring = 0.0


def _kept_cache(model: Decodable, rows: int, length: int) -> RaggedCache:
    """Compiled graphs write to fixed addresses, so their cache outlives the call."""
    slots = 1 << (length + 1).bit_length()
    key = (rows, slots, str(model.lm.device), model.lm.dtype)
    caches = known(model).caches
    if key not in caches:
        caches.clear()
        caches[key] = RaggedCache(model.backbone, model.objective.cache_config, slots - 1)
    return caches[key]


def _draft_length(
    model: Decodable, cycle: Eager, draft_length: int | str, state_BS: Tensor, token_B: Tensor
) -> FixedLength | AdaptiveLength:
    """Of a number, itself; of "auto", the adaptive one for this setting, whose costs are measured
    here when it is new."""
    if not isinstance(draft_length, str):
        return FixedLength(draft_length)
    limit = model.objective.max_draft_length
    longest = LONGEST if limit is None else min(LONGEST, limit)
    if longest == 0:
        return FixedLength(0)
    compiled, sampled = isinstance(cycle, Compiled), isinstance(cycle.rule, Sampling)
    machine = (str(model.lm.device), model.lm.dtype, torch.get_num_threads())
    setting = (len(token_B), sampled, compiled, cycle.rule.scores.need_past, longest, machine)
    lengths = known(model).lengths
    if setting not in lengths:
        lengths[setting] = _measured(model, cycle, state_BS, token_B, longest)
    return lengths[setting]


def _measured(
    model: Decodable, cycle: Eager, state_BS: Tensor, token_B: Tensor, longest: int
) -> AdaptiveLength:
    """Time a draft step and passes of several widths where the text stands now; nothing of it is
    kept."""
    device, B = model.lm.device, len(token_B)
    if isinstance(cycle.rule, Sampling):  # not with the caller's random numbers
        cycle = type(cycle)(
            model, replace(cycle.rule, generator=torch.Generator(device)), cycle.cache, drafts=True
        )

    def finish(out: Tensor) -> None:
        out.sum().item()  # wait for the device
        cycle.cache.keep([0] * B)

    if isinstance(cycle, Compiled):
        lengths = [k for k in COMPILED_LENGTHS if k <= longest]
        seconds = []
        for k in lengths:
            timed = []
            for _ in range(6):
                start = time.perf_counter()
                finish(cycle.run(state_BS, token_B, [k] * B, k, (), None, Clock(device)).packed)
                timed.append(time.perf_counter() - start)
            seconds.append(min(timed[1:]))  # the first compiles
        every = torch.tensor(seconds).cummax(0).values.tolist()
        costs = Costs(
            0.0,
            tuple(
                every[next(i for i, k in enumerate(lengths) if k >= j)]
                for j in range(lengths[-1] + 1)
            ),
        )
        return AdaptiveLength(costs, lengths[-1], stepwise=False, lengths=lengths)

    def passes(width: int) -> None:
        noise = cycle.rule.noise(B, 0, model.backbone.vocab_size, token_B.device)
        read_BK = token_B[:, None].expand(B, width)
        h_BKD = cycle.cache.read(read_BK)
        logits_BKV = model.next_token_logits(model.objective.output_states(h_BKD, read_BK))
        model.objective.drafting_states(h_BKD, read_BK)
        finish(cycle.rule.draw(logits_BKV[:, -1].float(), noise, 0).tokens)

    def draft() -> None:
        noise = cycle.rule.noise(B, 1, model.backbone.vocab_size, token_B.device)
        _, logits_BV = model.objective.draft(state_BS, token_B)
        cycle.rule.draw(logits_BV.float(), noise, 0).tokens.sum().item()

    return AdaptiveLength(measure(passes, draft, longest), longest, stepwise=device.type == "cpu")


def _check_finite(target: Sequence[Any], drafter: Sequence[Any]) -> None:
    for row, (good, drafter_good) in enumerate(zip(target, drafter, strict=True)):
        if not good:
            raise NextLatError(
                f"the model gives logits that are not finite in row {row}: check its weights, or use a wider dtype"
            )
        if not drafter_good:
            raise NextLatError(
                f"the drafter gives logits that are not finite in row {row}: check its weights, or use draft_length=0"
            )
