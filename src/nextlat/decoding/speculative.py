"""Lossless self-speculative decoding: the objective drafts, the transformer verifies, one forward pass per cycle.

    prefill     h_t = transformer(prompt)                      x_{t+1} ~ head(h_t)
    draft       h_hat_{t+1} = draft(h_t, x_{t+1})              d_1 ~ head(h_hat_{t+1})      ... up to d_k
    verify      h_{t+1} .. h_{t+1+k} = transformer(x_{t+1}, d_1 .. d_k)                     one KV-cached forward pass
    accept      the first n drafted tokens, then one token of the transformer's own         (sampling.py)
    roll back   the k - n rejected tokens leave the cache; h_{t+1+n} starts the next draft  (cache.py)

Teoh et al., arXiv 2511.05963, on self-speculative decoding; Leviathan et al., arXiv 2211.17192. Unlike the published NextLat
decoder everything is KV-cached, and the verification already yields the state that the next draft starts from, so that a
generation costs 1 + cycles forward passes of the transformer. Rows of a batch share every pass, accept different numbers of tokens
and end at different times. With a draft length of 0 a cycle is a step of plain decoding.

Shapes: B rows, T tokens, D width, V vocabulary, k drafted tokens, S width of the state that drafts start from (D for NextLat).
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nextlat.backbone import Backbone
from nextlat.decoding.cache import RaggedCache, SequenceCache, supports_ragged
from nextlat.decoding.draft_length import LONGEST, AdaptiveLength, Costs, FixedLength, measure
from nextlat.decoding.sampling import Draw, Greedy, Noise, Past, Sampling, race
from nextlat.decoding.stats import Cycle, Pass
from nextlat.decoding.stopping import Stopping
from nextlat.errors import NextLatError
from nextlat.objectives import Objective

logger = logging.getLogger(__name__)

Rule = Greedy | Sampling
COMPILED_LENGTHS = (0, 1, 2, 4, 8)  # each is a graph of its own, compiled when it is first used


class Decodable(Protocol):
    """What decoding needs of an `ObjectiveModel`."""

    lm: Any

    @property
    def backbone(self) -> Backbone: ...

    @property
    def objective(self) -> Objective: ...

    def next_token_logits(self, h: Tensor) -> Tensor: ...

    def modules(self) -> Iterator[nn.Module]: ...


@dataclass
class Known:
    """What decoding has found out about one model, so that it is measured or compiled once: whether ragged batches work (by
    attention kernel and device), the adaptive draft lengths (by setting), and caches that compiled graphs are bound to."""

    ragged: dict[Any, bool] = field(default_factory=dict)
    lengths: dict[Any, AdaptiveLength] = field(default_factory=dict)
    caches: dict[Any, RaggedCache] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)


_known: WeakKeyDictionary[Any, Known] = WeakKeyDictionary()


def known(model: Decodable) -> Known:
    """The record of this model; forgotten with it."""
    return _known.setdefault(model, Known())


def batches(model: Decodable) -> bool:
    """Whether the rows of a batch can share a pass; otherwise they are decoded one after another, with the same output."""
    lm = model.lm
    key = (lm.config._attn_implementation, str(lm.device), lm.dtype)
    found = known(model).ragged
    if key not in found:
        found[key] = supports_ragged(model.backbone)
    return found[key]


def tell_once(model: Decodable, sentence: str) -> None:
    """A warning that one model gives once."""
    told = known(model).told
    if sentence not in told:
        told.add(sentence)
        logger.warning(sentence)


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
    """The loop itself, one `Pass` per forward pass of the transformer as it happens; the first is the prefill, with one token a row.

    Args are those of `generate`, already checked; the caller holds `no_grad` and eval mode.
        prompts: (T,) each, without padding. More than one only where `batches(model)`.
        seen: the prompts as logits processors and stopping criteria shall see them, left padding included.
        keep_scores: leave scores and logits of every new token in the cycles.
    """
    seen = list(prompts if seen is None else seen)
    backbone, objective, device, rows = model.backbone, model.objective, model.lm.device, range(len(prompts))
    most_new = stopping.new_tokens
    cache: RaggedCache | SequenceCache
    if compile:
        cache = _kept_cache(model, len(prompts), max(map(len, prompts)) + most_new)
    elif batches(model):
        cache = RaggedCache(backbone, objective.cache_config, max(map(len, prompts)) + most_new)
    else:
        cache = SequenceCache(backbone, objective.cache_config, forgets=draft_length != 0)
    clock = _Clock(device)

    start = clock.mark()
    tokens_BT, h_BTD = cache.prefill(prompts)
    last_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    logits_BV = model.next_token_logits(_at(objective.output_states(h_BTD, tokens_BT), last_B))
    # The second is asked for before anything is forgotten, and only by those who draft (it may have work to do).
    state_BS = _at(objective.drafting_states(h_BTD, tokens_BT) if draft_length != 0 else h_BTD, last_B)
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
    ended = [stopping.cut([token], text[b][:-1], device)[1] or most_new == 1 for b, token in enumerate(values[0])]
    keep = [(scores_BV[b, None], logits_BV[b, None]) if keep_scores else (None, None) for b in rows]
    prefill = clock.seconds(start, clock.mark())
    yield Pass(tuple(Cycle((), 0, (token,), *keep[b]) for b, token in enumerate(values[0])), prefill=prefill)
    if all(ended):
        return
    if rule.scores.need_past:
        seen = [torch.cat([ids, token[None]]) for ids, token in zip(seen, token_B, strict=True)]

    cycle = (_Compiled if compile else _Cycle)(model, rule, cache, drafts=draft_length != 0)
    begun = time.perf_counter()
    length = _draft_length(model, cycle, draft_length, state_BS, token_B)
    measuring = time.perf_counter() - begun
    while not all(ended):
        rooms = [0 if done else most_new - n - 1 for done, n in zip(ended, produced, strict=True)]
        active = [b for b in rows if not ended[b]]
        planned = min(length.plan(active), cycle.longest(max(rooms)))
        most = [min(planned, room) for room in rooms]
        more = length.more if isinstance(length, AdaptiveLength) and length.stepwise else None
        start = clock.mark()
        out = cycle.run(state_BS, token_B, most, planned, [ids[:-1] for ids in seen], more, clock)
        values = out.packed.tolist()  # the one read-back of the cycle
        end = clock.mark()
        accepted, following, sound, drafter_sound, *drafted = values
        _check_finite([s or done for s, done in zip(sound, ended, strict=True)], drafter_sound)
        lengths = [min(n, len(drafted)) for n in most]
        length.observe([lengths[b] for b in active], [accepted[b] for b in active])

        cycles: list[Cycle | None] = [None] * len(prompts)
        counts = [0] * len(prompts)  # tokens read that stay in the cache: the one before the draft, and what was accepted
        for b in active:
            counts[b] = accepted[b] + 1
            row = tuple(drafted[j][b] for j in range(lengths[b]))
            tokens, ended[b] = stopping.cut((*row[: accepted[b]], following[b]), text[b], device)
            kept = (out.scores_BKV[b, : len(tokens)], out.logits_BKV[b, : len(tokens)]) if keep_scores else (None, None)
            cycles[b] = Cycle(row, min(accepted[b], len(tokens)), tuple(tokens), *kept)
            produced[b] += len(tokens)
            ended[b] = ended[b] or produced[b] >= most_new
            if stopping.criteria:
                text[b] += tokens
            if rule.scores.need_past:
                seen[b] = torch.cat([seen[b], torch.tensor(tokens, device=device)])
        cache.keep(counts)
        state_BS, token_B = out.state_BS, out.packed[1]
        seconds = {"draft": clock.seconds(start, out.drafted_at), "verify": clock.seconds(out.drafted_at, end)}
        yield Pass(tuple(cycles), measure=measuring, **seconds)
        measuring = 0.0


@dataclass
class _Outcome:
    """Of one cycle. `packed` (4 + k, B): accepted, following token, whether the logits were finite, and the drafter's, drafted tokens."""

    packed: Tensor
    state_BS: Tensor
    scores_BKV: Tensor
    logits_BKV: Tensor
    drafted_at: Any = None


More = Callable[[int, list[float]], bool]


class _Cycle:
    """Draft, verification and acceptance for one batch."""

    def __init__(self, model: Decodable, rule: Rule, cache: Any, *, drafts: bool) -> None:
        self.model, self.rule, self.cache, self.drafts = model, rule, cache, drafts

    def longest(self, room: int) -> int:
        """The longest draft that may be asked for where rows have room for so many tokens."""
        return room

    def run(
        self,
        state_BS: Tensor,
        token_B: Tensor,
        most: list[int],
        planned: int,
        rows: Sequence[Tensor],
        more: More | None,
        clock: "_Clock",
    ) -> _Outcome:
        """One cycle that drafts `planned` tokens, or fewer when `more` says that it is enough; `most` is each row's own limit."""
        rule, device = self.rule, token_B.device
        noise = rule.noise(len(token_B), planned, self.model.backbone.vocab_size, device)
        most_B = torch.tensor(most, device=device)
        read, drafts, finite_B = _draft(self.model, rule, state_BS, token_B, most_B, planned, noise, rows, more)
        drafted_at = clock.mark()
        h_BKD = self.cache.read(torch.stack(read, dim=1))
        out = _accept(self.model, rule, h_BKD, read, drafts, finite_B, most_B, noise, rows, self.drafts)
        return replace(out, drafted_at=drafted_at)


def _draft(
    model: Decodable,
    rule: Rule,
    state_BS: Tensor,
    token_B: Tensor,
    most_B: Tensor,
    planned: int,
    noise: Noise | None,
    rows: Sequence[Tensor],
    more: More | None = None,
) -> tuple[list[Tensor], list[Draw], Tensor]:
    """Up to `planned` tokens, each drawn in the state that the objective predicts after reading the one before.

    Every drawn token is kept: whether to stop may depend on anything known before a draw, never on the probability of the
    token that was drawn, which would bias the output.
    """
    read: list[Tensor] = [token_B]
    drafts: list[Draw] = []
    finite_B = torch.ones_like(token_B, dtype=torch.bool)
    for place in range(planned):
        state_BS, logits_BV = model.objective.draft(state_BS, read[-1])
        past = Past(rows, torch.stack(read, dim=1)) if rule.scores.need_past else None
        scores_BV = rule.scores(logits_BV[:, None], past)[:, 0]
        drafts.append(rule.draw(scores_BV, noise, place))
        read.append(drafts[-1].tokens)
        finite_B = finite_B & (logits_BV.amax(dim=-1).isfinite() | (place >= most_B))
        if more is not None and place + 1 < planned:
            q_BV = drafts[-1].q
            confidence_B = (scores_BV.softmax(dim=-1) if q_BV is None else q_BV).amax(dim=-1)
            if not more(place, confidence_B.tolist()):
                break
    return read, drafts, finite_B


def _accept(
    model: Decodable,
    rule: Rule,
    h_BKD: Tensor,
    read: Sequence[Tensor],
    drafts: Sequence[Draw],
    finite_B: Tensor,
    most_B: Tensor,
    noise: Noise | None,
    rows: Sequence[Tensor],
    goes_on: bool,
) -> _Outcome:
    """What the transformer makes of a draft, given its states (B, k + 1, D) at the tokens read; `goes_on` if drafts follow."""
    objective, read_BK = model.objective, torch.stack(list(read), dim=1)
    logits_BKV = model.next_token_logits(objective.output_states(h_BKD, read_BK))
    past = Past(rows, read_BK) if rule.scores.need_past else None
    scores_BKV = rule.scores(logits_BKV, past)
    accepted_B, following_B = rule.verify(scores_BKV, drafts, noise, most_B)
    used_BK = torch.arange(len(read), device=h_BKD.device) <= accepted_B[:, None]
    sound_B = (logits_BKV.amax(dim=-1).isfinite() | ~used_BK).all(dim=-1)
    packed = torch.stack([accepted_B, following_B, sound_B.long(), finite_B.long(), *read[1:]])
    # The state that `following` was chosen in starts the next draft.
    state_BS = _at(objective.drafting_states(h_BKD, read_BK) if goes_on else h_BKD, accepted_B)
    return _Outcome(packed, state_BS, scores_BKV, logits_BKV)


def _at(x_BK: Tensor, place_B: Tensor) -> Tensor:
    """(B, K, ...) -> (B, ...): of each row what stands at its place."""
    return x_BK[torch.arange(len(x_BK), device=x_BK.device), place_B]


def _whole_cycle(
    model: Decodable,
    rule: Rule,
    cache: RaggedCache,
    state_BS: Tensor,
    token_B: Tensor,
    lengths_B: Tensor,
    most_B: Tensor,
    uniform: Tensor | None,
    times: Tensor | None,
    planned: int,
    goes_on: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A cycle of static shapes as one function of tensors."""
    noise = Noise(uniform, lambda i: times[:, i]) if uniform is not None and times is not None else None
    read, drafts, finite_B = _draft(model, rule, state_BS, token_B, most_B, planned, noise, ())
    h_BKD = cache.forward(torch.stack(read, dim=1), lengths_B, cache.slots)
    out = _accept(model, rule, h_BKD, read, drafts, finite_B, most_B, noise, (), goes_on)
    return out.packed, out.state_BS, out.scores_BKV, out.logits_BKV


class _Compiled(_Cycle):
    """The same as one graph for each draft length: a CUDA graph where there is a GPU. Randomness comes in from outside."""

    def __init__(self, model: Decodable, rule: Rule, cache: Any, *, drafts: bool) -> None:
        # The graph is bound to what the rule does, not to its generator.
        super().__init__(model, rule, cache, drafts=drafts)
        self._pure = replace(rule, generator=None) if isinstance(rule, Sampling) else rule
        graphs = "reduce-overhead" if model.lm.device.type == "cuda" else None
        self._call = torch.compile(_whole_cycle, fullgraph=True, dynamic=False, mode=graphs)

    def longest(self, room: int) -> int:
        """No shorter drafts near the end, which would be graphs of their own: what is too much is ignored, row by row."""
        return LONGEST

    def run(
        self,
        state_BS: Tensor,
        token_B: Tensor,
        most: list[int],
        planned: int,
        rows: Sequence[Tensor],
        more: More | None,
        clock: "_Clock",
    ) -> _Outcome:
        device, (B, V) = token_B.device, (len(token_B), self.model.backbone.vocab_size)
        uniform = times = None
        if isinstance(self.rule, Sampling):
            uniform = torch.rand(B, planned, generator=self.rule.generator, device=device)
            times = race((B, planned + 1, V), device, self.rule.generator)
        most_B = torch.tensor(most, device=device)
        drafted_at = clock.mark()
        tensors = (state_BS.clone(), token_B.clone(), self.cache.lengths_B, most_B, uniform, times)
        packed, state_BS, scores, logits = self._call(self.model, self._pure, self.cache, *tensors, planned, self.drafts)
        return _Outcome(packed, state_BS, scores, logits, drafted_at)


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
    model: Decodable, cycle: _Cycle, draft_length: int | str, state_BS: Tensor, token_B: Tensor
) -> FixedLength | AdaptiveLength:
    """Of a number, itself; of "auto", the adaptive one for this setting, whose costs are measured here when it is new."""
    if not isinstance(draft_length, str):
        return FixedLength(draft_length)
    limit = model.objective.max_draft_length
    longest = LONGEST if limit is None else min(LONGEST, limit)
    if longest == 0:
        return FixedLength(0)
    compiled, sampled = isinstance(cycle, _Compiled), isinstance(cycle.rule, Sampling)
    machine = (str(model.lm.device), model.lm.dtype, torch.get_num_threads())
    setting = (len(token_B), sampled, compiled, cycle.rule.scores.need_past, longest, machine)
    lengths = known(model).lengths
    if setting not in lengths:
        lengths[setting] = _measured(model, cycle, state_BS, token_B, longest)
    return lengths[setting]


def _measured(model: Decodable, cycle: _Cycle, state_BS: Tensor, token_B: Tensor, longest: int) -> AdaptiveLength:
    """Time a draft step and passes of several widths where the text stands now; nothing of it is kept."""
    device, B = model.lm.device, len(token_B)
    if isinstance(cycle.rule, Sampling):  # not with the caller's random numbers
        cycle = type(cycle)(model, replace(cycle.rule, generator=torch.Generator(device)), cycle.cache, drafts=True)

    def finish(out: Tensor) -> None:
        out.sum().item()  # wait for the device
        cycle.cache.keep([0] * B)

    if isinstance(cycle, _Compiled):
        lengths = [k for k in COMPILED_LENGTHS if k <= longest]
        seconds = []
        for k in lengths:
            timed = []
            for _ in range(6):
                start = time.perf_counter()
                finish(cycle.run(state_BS, token_B, [k] * B, k, (), None, _Clock(device)).packed)
                timed.append(time.perf_counter() - start)
            seconds.append(sorted(timed[1:])[2])
        every = torch.tensor(seconds).cummax(0).values.tolist()
        costs = Costs(0.0, tuple(every[next(i for i, k in enumerate(lengths) if k >= j)] for j in range(lengths[-1] + 1)))
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


class _Clock:
    """Seconds between marks; on a GPU by events, which do not wait for it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        if not self._cuda:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end) / 1000)


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
