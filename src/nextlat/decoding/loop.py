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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from nextlat.decoding.sampling import OF_ROWS, Sampler, Sampling, keeping_state
from nextlat.decoding.stats import Cycle, Pass
from nextlat.errors import NextLatError
from nextlat.objectives import Objective


@dataclass(frozen=True)
class Stopping:
    """Where a row ends.

    Attributes:
        limit: new tokens that a row gets at most.
        ends: end-of-sequence tokens; the one that ends a row is its last.
        criteria: others, asked after every new token as `transformers` would have asked them.
        pads: whether a row that has ended is filled up with padding; otherwise it goes on until all
            rows have ended.
    """

    limit: int
    ends: frozenset[int] = frozenset()
    criteria: Sequence[Any] = ()
    pads: bool = True

    @classmethod
    def from_criteria(cls, criteria: Sequence[Any], prompt_length: int) -> "Stopping":
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
        pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        return cls(min(lengths), ends, others, pads)

    @property
    def needs_all_rows(self) -> str:
        """Why the rows of a batch have to advance together, as a clause; "" if they need not."""
        if self.criteria and not self.pads:
            return "without an end-of-sequence token, rows go on until all have ended"
        return STATE.format(names) if (names := keeping_state(self.criteria, OF_ROWS)) else ""


STATE = (
    "{} may keep a state between calls (if it depends on the tokens and scores of a row alone, say "
    "so: give it an attribute stateless = True)"
)


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
        tell_scores: show stopping criteria the scores so far.
        pad: what rows that have ended are filled up with.
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
    tell_scores: bool = False
    pad: int = 0

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
        limit: new tokens that it gets at most.
        ends: end-of-sequence tokens.
        is_end: whether it ends after so many of some new tokens, for another reason.
        grows: whether anybody looks.
        produced: new tokens so far.
        ended: whether there will be no more.
    """

    text: Tensor
    limit: int
    ends: Collection[int]
    is_end: Callable[["Row", Sequence[int]], bool] | None
    grows: bool
    produced: int = 0
    ended: bool = False

    @property
    def room(self) -> int:
        """Tokens that may still be drafted, the last one is always the transformer's own; -1 where
        there will be none."""
        return -1 if self.ended else self.limit - self.produced - 1

    def add(self, tokens: Sequence[int]) -> Sequence[int]:
        """Take new tokens, up to the end of the row if it is among them; returns those taken."""
        for i, token in enumerate(tokens, start=1):
            # All are asked about every token, as they may count.
            others = self.is_end is not None and self.is_end(self, tokens[:i])
            if token in self.ends or others:
                tokens, self.ended = tokens[:i], True
                break
        self.produced += len(tokens)
        self.ended = self.ended or self.produced >= self.limit
        self.extend(tokens)
        return tokens

    def extend(self, tokens: Sequence[int]) -> None:
        """Lengthen the text."""
        if self.grows:
            self.text = self.text_with(tokens)

    def text_with(self, tokens: Sequence[int]) -> Tensor:
        return torch.cat([self.text, self.text.new_tensor(tokens)])

    def settle(self, verdict: Verdict, limit: int, kept: Sequence[Tensor]) -> Cycle:
        """Take what a cycle gave.

        Args:
            verdict: on this row.
            limit: how much of the draft is this row's own.
            kept: (K, V) scores and logits, or none.
        """
        drafted = tuple(verdict.drafted[: max(limit, 0)])
        tokens = tuple(self.add((*drafted[: verdict.accepted], verdict.bonus)))
        accepted = min(verdict.accepted, len(tokens))
        return Cycle(drafted, accepted, tokens, *(x[: len(tokens)].clone() for x in kept))


class Rows:
    """The rows of a request, and what ends them.

    Args:
        request: what is decoded.
        grows: whether anybody looks at the texts.
    """

    def __init__(self, request: Request, grows: bool) -> None:
        self._request, self._stopping = request, request.stopping
        texts, criteria = request.texts or request.prompts, request.stopping.criteria
        # Rows that advance together are asked about together, as `transformers` does.
        self._even = not request.drafts and len(texts) > 1
        is_end = self._is_end if criteria and not self._even else None
        stopping = (request.stopping.limit, request.stopping.ends, is_end, grows)
        self.rows = [Row(text, *stopping) for text in texts]
        self._over = [False] * len(texts)
        self._scores: list[Tensor] = []
        self._new: tuple[Tensor, ...] = ()  # (K, V) scores of the row in question, if to be told

    def settle(
        self,
        out: Outcome,
        verdicts: Sequence[Verdict],
        limits: Sequence[int],
        present: Sequence[int],
    ) -> tuple[Cycle | None, ...]:
        """Take what a pass gave the rows that are present in it: the cycle of each that has not
        ended."""
        request, cycles = self._request, list[Cycle | None]([None] * len(self.rows))
        for i, (b, verdict, limit) in enumerate(zip(present, verdicts, limits, strict=True)):
            row = self.rows[b]
            if row.ended:
                row.extend([request.pad] if self._even else [])
                continue
            _check_finite(verdict, b)
            kept = (out.scores_BKV[i], out.logits_BKV[i]) if request.keep_scores else ()
            self._new = kept[:1]
            cycles[b] = row.settle(verdict, limit, kept)
        if self._even and self._stopping.criteria:
            self._end_together(out.scores_BKV[:, 0])
        return tuple(cycles)

    def _end_together(self, scores_BV: Tensor) -> None:
        self._scores.append(scores_BV)
        ids_BT = torch.stack([row.text for row in self.rows])
        over_B = torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)
        for criterion in self._stopping.criteria:
            over_B = over_B | criterion(ids_BT, self._told())
        self._over = [a or b for a, b in zip(self._over, over_B.tolist(), strict=True)]
        for row, over in zip(self.rows, self._over, strict=True):
            row.ended = row.ended or (over and (self._stopping.pads or all(self._over)))

    def _is_end(self, row: Row, tokens: Sequence[int]) -> bool:
        if self._request.tell_scores:
            self._scores.append(self._new[0][len(tokens) - 1][None])
        ids, over = row.text_with(tokens)[None], torch.zeros(1, dtype=torch.bool)
        for criterion in self._stopping.criteria:
            over = over.to(ids.device) | criterion(ids, self._told())
        return bool(over.all())

    def _told(self) -> tuple[Tensor, ...] | None:
        return tuple(self._scores) if self._request.tell_scores else None


def decode(objective: Objective, request: Request) -> Iterator[Pass]:
    """The loop itself: one `Pass` per forward pass of the transformer as it happens. The first is
    the prefill, with one token per row.

    The request has been checked, and the caller is in `evaluation_mode`.
    """
    sampler = request.sampler
    batch = Rows(request, sampler.scores.need_prefixes or bool(request.stopping.criteria))
    rows, kind = batch.rows, Compiled if request.compile else Eager
    present = [*range(len(rows))]  # in the batch; those that have ended leave it
    with _cache(objective, request) as cache:
        cycle = kind(objective, sampler, cache, drafts=request.drafts)
        clock = cycle.clock
        begun = clock.mark()
        texts = [row.text for row in rows]
        out = cycle.prefill(request.prompts if request.together else texts, texts)
        verdicts = Verdict.of_rows(out.packed)
        prefill = clock.seconds(begun, clock.mark())
        yield Pass(batch.settle(out, verdicts, [0] * len(rows), present), prefill=prefill)
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
                rooms = [rows[b].room for b in present]
                planned = min(length.plan(active), cycle.longest(max(rooms)))
                limits = [min(planned, room) for room in rooms]
                begun = clock.mark()
                plan = Plan(planned, limits, [rows[b].text for b in present], length.more)
                out = cycle.run(start, plan)
                start = out.start
                verdicts = Verdict.of_rows(out.packed)  # the one read-back of the cycle
                end = clock.mark()
                cycles = batch.settle(out, verdicts, limits, present)
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
    longest = _longest(objective)
    if longest == 0 or isinstance(number, int):
        yield FixedLength(number if isinstance(number, int) else 0)
        return
    setting = _setting(objective, len(request.prompts), sampler, request.compile)
    lengths = prepared(objective).lengths
    length = lengths.pop(setting, None) or cycle.adaptive_length(start, longest)
    try:
        yield length
    finally:
        lengths[setting] = length


def _longest(objective: Objective) -> int:
    limit = objective.max_draft_length
    return LONGEST if limit is None else min(LONGEST, limit)


def _setting(objective: Objective, rows: int, sampler: Sampler, compile: bool) -> Any:
    """What an adaptive length depends on."""
    threads, prefixes = torch.get_num_threads(), sampler.scores.need_prefixes
    return rows, isinstance(sampler, Sampling), compile, prefixes, _longest(objective), threads


def rests(
    objective: Objective, rows: int, sampler: Sampler, compile: bool, new_tokens: int
) -> bool:
    """Whether drafts are known not to pay in this setting, for so many tokens: they can then be
    decoded as plainly as `transformers` does, in its own cache."""
    length = prepared(objective).lengths.get(_setting(objective, rows, sampler, compile))
    return length is not None and length.rests(new_tokens)


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
