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
from nextlat.decoding.draft_length import LONGEST
from nextlat.decoding.known import Decodable
from nextlat.decoding.sampling import Draw, Greedy, Noise, Past, Sampling, race

Rule = Greedy | Sampling


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


@dataclass
class Outcome:
    """Of one cycle. `packed` (4 + k, B): accepted, following token, whether the logits were finite,
    and the drafter's, drafted tokens."""

    packed: Tensor
    state_BS: Tensor
    scores_BKV: Tensor
    logits_BKV: Tensor
    drafted_at: Any = None


More = Callable[[int, list[float]], bool]


class Eager:
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
        clock: "Clock",
    ) -> Outcome:
        """One cycle that drafts `planned` tokens, or fewer when `more` says that it is enough;
        `most` is each row's own limit."""
        rule, device = self.rule, token_B.device
        noise = rule.noise(len(token_B), planned, self.model.backbone.vocab_size, device)
        most_B = torch.tensor(most, device=device)
        read, drafts, finite_B = draft(
            self.model, rule, state_BS, token_B, most_B, planned, noise, rows, more
        )
        drafted_at = clock.mark()
        h_BKD = self.cache.read(torch.stack(read, dim=1))
        out = accept(
            self.model, rule, h_BKD, read, drafts, finite_B, most_B, noise, rows, self.drafts
        )
        return replace(out, drafted_at=drafted_at)


def draft(
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
    """Up to `planned` tokens, each drawn in the state that the objective predicts after reading the
    one before.

    Every drawn token is kept: whether to stop may depend on anything known before a draw, never on
    the probability of the token that was drawn, which would bias the output.
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


def accept(
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
) -> Outcome:
    """What the transformer makes of a draft, given its states (B, k + 1, D) at the tokens read;
    `goes_on` if drafts follow."""
    objective, read_BK = model.objective, torch.stack(list(read), dim=1)
    logits_BKV = model.next_token_logits(objective.output_states(h_BKD, read_BK))
    past = Past(rows, read_BK) if rule.scores.need_past else None
    scores_BKV = rule.scores(logits_BKV, past)
    accepted_B, following_B = rule.verify(scores_BKV, drafts, noise, most_B)
    sound_BK = logits_BKV.amax(dim=-1).isfinite()
    if drafts:
        sound_BK = sound_BK | (torch.arange(len(read), device=h_BKD.device) > accepted_B[:, None])
    packed = torch.stack(
        [accepted_B, following_B, sound_BK.all(dim=-1).long(), finite_B.long(), *read[1:]]
    )
    # The state that `following` was chosen in starts the next draft.
    states_BKS = objective.drafting_states(h_BKD, read_BK) if goes_on else h_BKD
    state_BS = at(states_BKS, accepted_B) if drafts else states_BKS[:, 0]
    return Outcome(packed, state_BS, scores_BKV, logits_BKV)


def at(x_BK: Tensor, place_B: Tensor) -> Tensor:
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
    noise = (
        Noise(uniform, lambda i: times[:, i]) if uniform is not None and times is not None else None
    )
    read, drafts, finite_B = draft(model, rule, state_BS, token_B, most_B, planned, noise, ())
    h_BKD = cache.forward(torch.stack(read, dim=1), lengths_B, cache.slots)
    out = accept(model, rule, h_BKD, read, drafts, finite_B, most_B, noise, (), goes_on)
    return out.packed, out.state_BS, out.scores_BKV, out.logits_BKV


class Compiled(Eager):
    """The same as one graph for each draft length: a CUDA graph where there is a GPU. Randomness
    comes in from outside."""

    def __init__(self, model: Decodable, rule: Rule, cache: Any, *, drafts: bool) -> None:
        # The graph is bound to what the rule does, not to its generator.
        super().__init__(model, rule, cache, drafts=drafts)
        self._pure = replace(rule, generator=None) if isinstance(rule, Sampling) else rule
        graphs = "reduce-overhead" if model.lm.device.type == "cuda" else None
        self._call = torch.compile(_whole_cycle, fullgraph=True, dynamic=False, mode=graphs)

    def longest(self, room: int) -> int:
        """No shorter drafts near the end, which would be graphs of their own: what is too much is
        ignored, row by row."""
        return LONGEST

    def run(
        self,
        state_BS: Tensor,
        token_B: Tensor,
        most: list[int],
        planned: int,
        rows: Sequence[Tensor],
        more: More | None,
        clock: "Clock",
    ) -> Outcome:
        device, (B, V) = token_B.device, (len(token_B), self.model.backbone.vocab_size)
        uniform = times = None
        if isinstance(self.rule, Sampling):
            uniform = torch.rand(B, planned, generator=self.rule.generator, device=device)
            times = race((B, planned + 1, V), device, self.rule.generator)
        most_B = torch.tensor(most, device=device)
        drafted_at = clock.mark()
        if device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # what the last cycle returned has been read or is copied here
        tensors = (state_BS.clone(), token_B.clone(), self.cache.lengths_B, most_B, uniform, times)
        packed, state_BS, scores, logits = self._call(
            self.model, self._pure, self.cache, *tensors, planned, self.drafts
        )
        return Outcome(packed, state_BS, scores, logits, drafted_at)
