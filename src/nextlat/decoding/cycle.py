"""One cycle: draft, verification and acceptance for a whole batch, step by step or as one compiled
graph.

Shapes: B rows, K tokens read, V vocabulary, S width of the state that drafts start from, D width.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nextlat.decoding.cache import RaggedCache
from nextlat.decoding.draft_length import LONGEST, AdaptiveLength, Costs, measure
from nextlat.decoding.sampling import Draw, Noise, Prefixes, Sampler, Sampling, race
from nextlat.objectives import Objective

COMPILED_LENGTHS = (0, 1, 2, 4, 8)  # each is a graph of its own, compiled when it is first used
GRAPHS = 256  # of all models, batch sizes and lengths together; torch by itself stops at 8


class Clock:
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


@dataclass(frozen=True)
class Start:
    """Where a cycle starts.

    Attributes:
        token_B: the last token of each row, not yet read.
        state_BS: the state that it was chosen in, from which drafts start.
    """

    token_B: Tensor
    state_BS: Tensor

    def of(self, rows: Sequence[int]) -> "Start":
        """That of some rows."""
        index = torch.tensor(rows, device=self.token_B.device)
        return Start(self.token_B[index], self.state_BS[index])


@dataclass(frozen=True)
class Plan:
    """What a cycle drafts.

    Attributes:
        length: limit for all rows.
        limits: of each row; whatever is drafted beyond it does not count. -1 = it has ended.
        texts: what logits processors are to see of each row, up to the token at its start.
        more: see `AdaptiveLength.more`.
    """

    length: int
    limits: Sequence[int]
    texts: Sequence[Tensor] = ()
    more: Callable[[int, Sequence[float]], bool] | None = None


@dataclass(frozen=True)
class Draft:
    """The tokens of one pass.

    Attributes:
        read: (B,) each: the last token of each row, then the drafted ones.
        draws: how the drafted ones were drawn.
        finite_B: whether the logits that count were finite.
    """

    read: list[Tensor]
    draws: list[Draw]
    finite_B: Tensor


@dataclass(frozen=True)
class Verdict:
    """What became of one row's draft.

    Attributes:
        accepted: how many leading drafted tokens are kept.
        bonus: the token after them, the transformer's own.
        finite: whether the logits that this rests on are.
        drafter_finite: whether those of the drafter are.
        drafted: the drafted tokens, beyond the row's own limit too.
    """

    accepted: int
    bonus: int
    finite: bool
    drafter_finite: bool
    drafted: Sequence[int]

    @classmethod
    def of_rows(cls, packed: Tensor) -> "list[Verdict]":
        """Read back (4 + k, B) values in the order of the attributes, from the device in one go."""
        accepted, bonus, finite, drafter_finite, *drafted = packed.tolist()
        columns = zip(accepted, bonus, finite, drafter_finite, strict=True)
        return [cls(*row, [tokens[b] for tokens in drafted]) for b, row in enumerate(columns)]


@dataclass(frozen=True)
class Outcome:
    """What a cycle leaves on the device.

    Attributes:
        packed: see `Verdict.of_rows`.
        start: of the next cycle.
        scores_BKV, logits_BKV: of the transformer, processed and as they were.
        drafted_at: mark of the clock between drafting and verification.
    """

    packed: Tensor
    start: Start
    scores_BKV: Tensor
    logits_BKV: Tensor
    drafted_at: Any = None


def draw_draft(
    objective: Objective,
    sampler: Sampler,
    start: Start,
    plan: Plan,
    limits_B: Tensor,
    noise: Noise | None,
) -> Draft:
    """The tokens of a plan, each drawn in the state that the objective predicts after reading the
    one before.

    Every drawn token is kept: whether to stop may depend on anything known before a draw, never on
    the probability of the token that was drawn, which would bias the output.
    """
    state_BS, read = start.state_BS, [start.token_B]
    draws: list[Draw] = []
    finite_B = torch.ones_like(start.token_B, dtype=torch.bool)
    for j in range(plan.length):
        state_BS, logits_BV = objective.draft(state_BS, read[-1])
        prefixes = Prefixes(plan.texts, read, plan.limits)
        scores_BV = sampler.scores(logits_BV[:, None], prefixes)[:, 0]
        draws.append(sampler.draw(scores_BV, noise, j))
        finite_B = finite_B & (logits_BV.amax(dim=-1).isfinite() | (j >= limits_B))
        read.append(draws[-1].tokens)
        if plan.more is not None and j + 1 < plan.length:
            q_BV = draws[-1].q
            q_BV = scores_BV.softmax(dim=-1) if q_BV is None else q_BV
            # NaN where a processor leaves no token of a draft vocabulary: nothing there is kept.
            if not plan.more(j, q_BV.amax(dim=-1).nan_to_num().tolist()):
                break
    return Draft(read, draws, finite_B)


def accept(
    objective: Objective,
    sampler: Sampler,
    h_BKD: Tensor,
    states_BKS: Tensor,
    draft: Draft,
    plan: Plan,
    limits_B: Tensor,
    noise: Noise | None,
) -> Outcome:
    """What the transformer makes of a draft, given its states at the tokens read and those that the
    next draft could start from."""
    read_BK = torch.stack(draft.read, dim=1)
    logits_BKV = objective.next_token_logits(objective.output_states(h_BKD, read_BK))
    scores_BKV = sampler.scores(logits_BKV, Prefixes(plan.texts, draft.read, plan.limits))
    accepted_B, bonus_B = sampler.verify(scores_BKV, draft.draws, noise, limits_B)
    finite_BK, state_BS = logits_BKV.amax(dim=-1).isfinite(), states_BKS[:, 0]
    if draft.draws:
        finite_BK |= torch.arange(len(draft.read), device=h_BKD.device) > accepted_B[:, None]
        state_BS = at(states_BKS, accepted_B)  # in which the bonus token was chosen
    finite_B = finite_BK.all(dim=-1)
    packed = [accepted_B, bonus_B, finite_B.long(), draft.finite_B.long(), *draft.read[1:]]
    return Outcome(torch.stack(packed), Start(bonus_B, state_BS), scores_BKV, logits_BKV)


def at(x_BK: Tensor, position_B: Tensor) -> Tensor:
    """(B, K, ...) -> (B, ...): of each row what stands at its position."""
    return x_BK[torch.arange(len(x_BK), device=x_BK.device), position_B]


class Eager:
    """Draft, verification and acceptance for one batch.

    Args:
        objective: drafts, and knows the transformer.
        sampler: chooses tokens.
        cache: of the transformer.
        drafts: whether any cycle is to draft.
    """

    def __init__(self, objective: Objective, sampler: Sampler, cache: Any, *, drafts: bool) -> None:
        self.objective, self.sampler, self.cache, self.drafts = objective, sampler, cache, drafts
        self.clock = Clock(objective.backbone.lm.device)
        if drafts:
            objective.prepare_drafts()

    def longest(self, room: int) -> int:
        """The longest draft that may be asked for where rows have room for so many tokens."""
        return room

    def prefill(self, prompts: Sequence[Tensor], texts: Sequence[Tensor]) -> Outcome:
        """Read the prompts and choose the first token of each row.

        Args:
            prompts: (T,) each, as the cache takes them.
            texts: what logits processors are to see of each row.
        """
        objective, sampler = self.objective, self.sampler
        tokens_BT, h_BTD, last_B = self.cache.prefill(prompts)
        # Asked for before anything is forgotten, and only by those who draft: it may take work.
        states_BTS = objective.drafting_states(h_BTD, tokens_BT) if self.drafts else h_BTD
        self.cache.keep([len(prompt) for prompt in prompts])
        token_B, h_BD, state_BS = (at(x, last_B) for x in (tokens_BT, h_BTD, states_BTS))
        draft = Draft([token_B], [], torch.ones_like(token_B, dtype=torch.bool))
        noise, none_B = sampler.noise(len(prompts), 0, h_BTD.device), torch.zeros_like(token_B)
        h_B1D, state_B1S, plan = h_BD[:, None], state_BS[:, None], Plan(0, [0] * len(texts), texts)
        return accept(objective, sampler, h_B1D, state_B1S, draft, plan, none_B, noise)

    def run(self, start: Start, plan: Plan) -> Outcome:
        """One cycle: where it starts, and what it drafts."""
        objective, sampler, device = self.objective, self.sampler, start.token_B.device
        noise = sampler.noise(len(start.token_B), plan.length, device)
        limits_B = torch.tensor(plan.limits, device=device)
        draft = draw_draft(objective, sampler, start, plan, limits_B, noise)
        drafted_at, read_BK = self.clock.mark(), torch.stack(draft.read, dim=1)
        h_BKD = self.cache.read(read_BK)
        states_BKS = objective.drafting_states(h_BKD, read_BK) if self.drafts else h_BKD
        out = accept(objective, sampler, h_BKD, states_BKS, draft, plan, limits_B, noise)
        return replace(out, drafted_at=drafted_at)

    def adaptive_length(self, start: Start, longest: int) -> AdaptiveLength:
        """An adaptive length by the costs of a draft step and of passes of several widths, timed
        where the text stands now; nothing of it is kept."""
        objective, token_B, device = self.objective, start.token_B, start.token_B.device
        sampler = _with(self.sampler, torch.Generator(device))  # not the caller's random numbers

        def run_pass(width: int) -> None:
            read_BK = token_B[:, None].expand(-1, width)
            h_BKD = self.cache.read(read_BK)
            logits_BKV = objective.next_token_logits(objective.output_states(h_BKD, read_BK))
            objective.drafting_states(h_BKD, read_BK)
            choose(logits_BKV[:, -1])
            self.cache.keep([0] * len(token_B))

        def run_draft() -> None:
            choose(objective.draft(start.state_BS, token_B)[1])

        def choose(logits_BV: Tensor) -> None:
            noise = sampler.noise(len(token_B), 1, device)
            sampler.draw(logits_BV.float(), noise, 0).tokens.sum().item()  # waits for the device

        costs = measure(run_pass, run_draft, longest)
        return AdaptiveLength(costs, longest, stepwise=device.type == "cpu")


def _with(sampler: Sampler, generator: torch.Generator | None) -> Sampler:
    """The sampler with another source of randomness, if it has one."""
    return replace(sampler, generator=generator) if isinstance(sampler, Sampling) else sampler


def _whole_cycle(
    objective: Objective,
    sampler: Sampler,
    cache: RaggedCache,
    start: Start,
    length: int,
    drafts: bool,
    lengths_B: Tensor,
    limits_B: Tensor,
    uniform_BK: Tensor | None,
    times_BKV: Tensor | None,
) -> Outcome:
    """A cycle of static shapes as one function of tensors."""
    noise = None
    if uniform_BK is not None and times_BKV is not None:
        noise = Noise(uniform_BK, lambda i, _: times_BKV[:, i])
    plan = Plan(length, ())
    draft = draw_draft(objective, sampler, start, plan, limits_B, noise)
    read_BK = torch.stack(draft.read, dim=1)
    h_BKD = cache.forward(read_BK, lengths_B, cache.slots)
    states_BKS = objective.drafting_states(h_BKD, read_BK) if drafts else h_BKD
    return accept(objective, sampler, h_BKD, states_BKS, draft, plan, limits_B, noise)


class Compiled(Eager):
    """The same as one graph for each draft length: a CUDA graph where there is a GPU. Randomness
    comes in from outside."""

    def __init__(self, objective: Objective, sampler: Sampler, cache: Any, *, drafts: bool) -> None:
        super().__init__(objective, sampler, cache, drafts=drafts)
        # The graph is bound to what the sampler does, not to its generator.
        self._pure = _with(sampler, None)
        mode = "reduce-overhead" if objective.backbone.lm.device.type == "cuda" else None
        self._call = torch.compile(_whole_cycle, fullgraph=True, dynamic=False, mode=mode)
        self._many_graphs = torch._dynamo.config.patch(recompile_limit=GRAPHS)

    def longest(self, room: int) -> int:
        """No shorter drafts near the end, which would be graphs of their own: what is too much is
        ignored, row by row."""
        return LONGEST

    def run(self, start: Start, plan: Plan) -> Outcome:
        device, (B,), k = start.token_B.device, start.token_B.shape, plan.length
        uniform_BK = times_BKV = None
        if isinstance(self.sampler, Sampling):
            generator, V = self.sampler.generator, self.objective.backbone.vocab_size
            uniform_BK = torch.rand(B, k, generator=generator, device=device)
            times_BKV = race((B, k + 1, V), device, generator)
        limits_B, drafted_at = torch.tensor(plan.limits, device=device), self.clock.mark()
        if device.type == "cuda":
            # What the last cycle returned has been read by now, or is copied here.
            torch.compiler.cudagraph_mark_step_begin()
        start = Start(start.token_B.clone(), start.state_BS.clone())
        settings = (self.objective, self._pure, self.cache, start, k, self.drafts)
        with self._many_graphs:
            out = self._call(*settings, self.cache.lengths_B, limits_B, uniform_BK, times_BKV)
        return replace(out, drafted_at=drafted_at)

    def adaptive_length(self, start: Start, longest: int) -> AdaptiveLength:
        lengths = [k for k in COMPILED_LENGTHS if k <= longest]
        sampler = _with(self.sampler, torch.Generator(start.token_B.device))
        cycle = Compiled(self.objective, sampler, self.cache, drafts=True)
        B, seconds = len(start.token_B), []
        for k in lengths:
            timed = []
            for _ in range(6):
                begun = time.perf_counter()
                cycle.run(start, Plan(k, [k] * B)).packed.sum().item()  # waits for the device
                self.cache.keep([0] * B)
                timed.append(time.perf_counter() - begun)
            seconds.append(min(timed[1:]))  # the first compiles
        rising = torch.tensor(seconds).cummax(0).values.tolist()
        # A length without a graph costs what the next longer one does.
        graph = [next(i for i, k in enumerate(lengths) if k >= j) for j in range(lengths[-1] + 1)]
        costs = Costs(0.0, tuple(rising[i] for i in graph))
        return AdaptiveLength(costs, lengths[-1], stepwise=False, lengths=lengths)
