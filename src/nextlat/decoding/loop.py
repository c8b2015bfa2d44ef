"""Lossless self-speculative decoding: the objective drafts, the transformer verifies, one forward
pass per cycle.

    prefill    h_t = transformer(prompt)             x_{t+1} ~ head(h_t)
    draft      h_hat_{t+1} = draft(h_t, x_{t+1})     d_1 ~ head(h_hat_{t+1})     ... up to d_k
    verify     h_{t+1} .. h_{t+1+k} = transformer(x_{t+1}, d_1 .. d_k), one KV-cached forward pass
    accept     the first n drafted tokens, then one token of the transformer's own (sampling.py)
    roll back  the k - n rejected tokens leave the cache (cache.py); h_{t+1+n} starts the next draft

Teoh et al., arXiv 2511.05963, on self-speculative decoding; Leviathan et al., arXiv 2211.17192.
Unlike the published NextLat decoder everything is KV-cached, and the verification already yields
the state that the next draft starts from, so that a generation costs 1 + cycles forward passes of
the transformer. Rows of a batch share every pass, accept different numbers of tokens and end at
different times. With a draft length of 0 a cycle is a step of plain decoding.

Shapes: B rows, T tokens, D width, V vocabulary, k drafted tokens, S width of the state that drafts
    start from (D for NextLat).
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from nextlat.decoding.cache import GrowingCache, RaggedCache
from nextlat.decoding.cycle import Compiled, Eager, Outcome, Plan, Start, Verdict
from nextlat.decoding.draft_length import LONGEST, AdaptiveLength, FixedLength
from nextlat.decoding.prepared import prepared
from nextlat.decoding.sampling import Sampler, Sampling
from nextlat.decoding.stats import Cycle, Pass
from nextlat.errors import NextLatError
from nextlat.objectives import Objective


@dataclass(frozen=True)
class Stopping:
    """Where a row ends.

    Attributes:
        limit: new tokens that a row gets at most.
        ends: end-of-sequence tokens; the one that ends a row is its last.
        criteria: others, asked about each new token's own prefix, (1, T) as `transformers` would
            have shown it to them.
    """

    limit: int
    ends: frozenset[int] = frozenset()
    criteria: Sequence[Any] = ()

    @classmethod
    def from_criteria(cls, criteria: Iterable[Any], prompt_length: int) -> "Stopping":
        """From the list that `generate` has prepared for prompts of so many tokens, padding
        included."""
        lengths, ends, others = [], frozenset[int](), []
        for criterion in criteria:
            if type(criterion) is MaxLengthCriteria:
                lengths.append(criterion.max_length - prompt_length)
            elif type(criterion) is EosTokenCriteria:
                ends |= frozenset(criterion.eos_token_id.tolist())
            else:
                others.append(criterion)
        return cls(min(lengths), ends, others)


@dataclass(frozen=True)
class Request:
    """What is to be decoded, and how.

    Attributes:
        prompts: (T,) each, without padding.
        sampler: chooses the tokens.
        stopping: ends the rows.
        draft_length: tokens drafted per cycle; 0 = none, "auto" = as many as are worth their time.
        texts: the prompts with their padding, as logits processors and stopping criteria are to see
            them; None = without.
        together: whether rows of unequal length share passes, see `RaggedCache`; otherwise there is
            one row, or no draft.
        arguments: what `generate` has prepared for the model besides the tokens.
        direct: whether it is known to need no more than mask and positions, see `GrowingCache`.
        compile: one graph per cycle.
        keep_scores: leave scores and logits of every new token in the cycles.
    """

    prompts: Sequence[Tensor]
    sampler: Sampler
    stopping: Stopping
    draft_length: int | str
    texts: Sequence[Tensor] | None = None
    together: bool = False
    arguments: Mapping[str, Any] = field(default_factory=lambda: {"use_cache": True})
    direct: bool = False
    compile: bool = False
    keep_scores: bool = False

    @property
    def drafts(self) -> bool:
        return self.draft_length != 0

    @property
    def longest(self) -> int:
        """Tokens of the longest row when all is done."""
        return max(map(len, self.prompts)) + self.stopping.limit


@dataclass
class Row:
    """One sequence while it is decoded.

    Attributes:
        text: what logits processors and stopping criteria see: the prompt, and the new tokens where
            anybody looks at them.
        stopping: ends it.
        grows: whether anybody does.
        produced: new tokens so far.
        ended: whether there will be no more.
    """

    text: Tensor
    stopping: Stopping
    grows: bool
    produced: int = 0
    ended: bool = False

    @property
    def room(self) -> int:
        """Tokens that may still be drafted; the last one is always the transformer's own."""
        return 0 if self.ended else self.stopping.limit - self.produced - 1

    def add(self, tokens: Sequence[int]) -> Sequence[int]:
        """Take new tokens, up to the end of the row if it is among them; returns those taken."""
        stopping = self.stopping
        for i, token in enumerate(tokens, start=1):
            if token in stopping.ends or (stopping.criteria and self._is_end(tokens[:i])):
                tokens, self.ended = tokens[:i], True
                break
        self.produced += len(tokens)
        self.ended = self.ended or self.produced >= stopping.limit
        if self.grows:
            self.text = self._text_with(tokens)
        return tokens

    def settle(self, verdict: Verdict, limit: int, kept: Sequence[Tensor]) -> Cycle:
        """Take what a cycle gave.

        Args:
            verdict: on this row.
            limit: how much of the draft is this row's own.
            kept: (K, V) scores and logits, or none.
        """
        drafted = tuple(verdict.drafted[:limit])
        tokens = tuple(self.add((*drafted[: verdict.accepted], verdict.bonus)))
        accepted = min(verdict.accepted, len(tokens))
        return Cycle(drafted, accepted, tokens, *(x[: len(tokens)].clone() for x in kept))

    def _text_with(self, tokens: Sequence[int]) -> Tensor:
        return torch.cat([self.text, self.text.new_tensor(tokens)])

    def _is_end(self, tokens: Sequence[int]) -> bool:
        ids = self._text_with(tokens)[None]
        return any(bool(criterion(ids, None).all()) for criterion in self.stopping.criteria)


def decode(objective: Objective, request: Request) -> Iterator[Pass]:
    """The loop itself: one `Pass` per forward pass of the transformer as it happens. The first is
    the prefill, with one token per row.

    The request has been checked, and the caller is in `evaluation_mode`.
    """
    sampler, stopping = request.sampler, request.stopping
    grows = sampler.scores.need_prefixes or bool(stopping.criteria)
    texts = request.texts or request.prompts
    rows = [Row(text, stopping, grows) for text in texts]
    present = [*range(len(rows))]  # in the batch; those that have ended leave it
    kind = Compiled if request.compile else Eager

    def settle(
        out: Outcome, verdicts: Sequence[Verdict], limits: Sequence[int]
    ) -> tuple[Cycle | None, ...]:
        cycles: list[Cycle | None] = [None] * len(rows)
        for i, (b, verdict, limit) in enumerate(zip(present, verdicts, limits, strict=True)):
            if not rows[b].ended:
                _check_finite(verdict, b)
                kept = (out.scores_BKV[i], out.logits_BKV[i]) if request.keep_scores else ()
                cycles[b] = rows[b].settle(verdict, limit, kept)
        return tuple(cycles)

    with _cache(objective, request) as cache:
        cycle = kind(objective, sampler, cache, drafts=request.drafts)
        clock = cycle.clock
        begun = clock.mark()
        prompts = request.prompts if request.together else texts
        out = cycle.prefill(prompts, [row.text for row in rows])
        verdicts = Verdict.of_rows(out.packed)
        prefill = clock.seconds(begun, clock.mark())
        yield Pass(settle(out, verdicts, [0] * len(rows)), prefill=prefill)
        if all(row.ended for row in rows):
            return

        started = time.perf_counter()
        with _draft_length(cycle, request, out.start) as length:
            measuring = time.perf_counter() - started
            start = out.start
            while active := [i for i, b in enumerate(present) if not rows[b].ended]:
                # Graphs have one shape, and processors may go by the number of a row.
                fixed = request.compile or sampler.scores.need_prefixes
                if len(active) < len(present) and isinstance(cache, RaggedCache) and not fixed:
                    cache.select(active)
                    start, present = start.of(active), [present[i] for i in active]
                    active = [*range(len(present))]
                batch = [rows[b] for b in present]
                longest = cycle.longest(max(row.room for row in batch))
                planned = min(length.plan(active), longest)
                limits = [min(planned, row.room) for row in batch]
                begun = clock.mark()
                plan = Plan(planned, limits, length.more)
                out = cycle.run(start, plan, [row.text for row in batch])
                start = out.start
                verdicts = Verdict.of_rows(out.packed)  # the one read-back of the cycle
                end = clock.mark()
                cycles = settle(out, verdicts, limits)
                accepted = {i: verdicts[i].accepted for i in active}
                drafted = [min(limits[i], len(verdicts[i].drafted)) for i in active]
                length.observe(drafted, [*accepted.values()])
                # The token before the draft stays in the cache, and what was accepted.
                cache.keep([accepted[i] + 1 if i in accepted else 0 for i in range(len(present))])
                yield Pass(
                    cycles,
                    draft=clock.seconds(begun, out.drafted_at),
                    verify=clock.seconds(out.drafted_at, end),
                    measure=measuring,
                )
                measuring = 0.0


@contextmanager
def _cache(objective: Objective, request: Request) -> Iterator[RaggedCache | GrowingCache]:
    backbone, extra = objective.backbone, objective.cached_layers
    if not request.together:
        own = backbone.new_cache(extra) if request.drafts else None
        yield GrowingCache(backbone, request.arguments, own, direct=request.direct and own is None)
        return
    if not request.compile:
        yield RaggedCache(backbone, request.longest, extra)
        return
    # Compiled graphs write to fixed addresses, so their cache outlives the call.
    slots = 1 << (request.longest + 1).bit_length()
    caches, size = prepared(objective).caches, (len(request.prompts), slots)
    cache = caches.pop(size, None)
    if cache is None:
        caches.clear()
        cache = RaggedCache(backbone, slots - 1)
    try:
        yield cache
    finally:
        caches[size] = cache


@contextmanager
def _draft_length(
    cycle: Eager, request: Request, start: Start
) -> Iterator[FixedLength | AdaptiveLength]:
    """Of a number, itself; of "auto", the adaptive one for this setting, whose costs are measured
    here when it is new."""
    objective, sampler, number = cycle.objective, cycle.sampler, request.draft_length
    limit = objective.max_draft_length
    longest = LONGEST if limit is None else min(LONGEST, limit)
    if longest == 0 or isinstance(number, int):
        yield FixedLength(number if isinstance(number, int) else 0)
        return
    setting = (
        len(request.prompts),
        isinstance(sampler, Sampling),
        request.compile,
        sampler.scores.need_prefixes,
        longest,
        torch.get_num_threads(),
    )
    lengths = prepared(objective).lengths
    length = lengths.pop(setting, None) or cycle.adaptive_length(start, longest)
    try:
        yield length
    finally:
        lengths[setting] = length


def _check_finite(verdict: Verdict, row: int) -> None:
    if not verdict.finite:
        raise NextLatError(
            f"the model gives logits that are not finite in row {row}: check its weights, or use a "
            "wider dtype"
        )
    if not verdict.drafter_finite:
        raise NextLatError(
            f"the drafter gives logits that are not finite in row {row}: check its weights, or use "
            "draft_length=0"
        )
