"""From logits to tokens: the scores that the processors make of them, draws, and the acceptance
test of speculative sampling.

Temperature, truncation, penalties and the like are `transformers`' own logits processors.
Everything else here is vectorised over rows and reads nothing back to the host. A *sampler*
(`Greedy` or `Sampling`) is how one call of `generate` chooses tokens. Drafter and verification use
the same one, so that the q of the acceptance test is always what the draft was really drawn from.

Shapes: B rows, K drafted tokens, V vocabulary. p is the target's distribution, q the drafter's.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

# Processors that look at the scores alone; every other kind is shown each position's own prefix.
STATELESS = re.compile(
    r"transformers\.generation\.logits_process\."
    r"((Temperature|TopK|TopP|MinP|TopH|Typical|Epsilon|Eta)LogitsWarper"
    r"|SuppressTokensLogitsProcessor|InfNanRemoveLogitsProcessor|LogitNormalization)"
)


@dataclass(frozen=True)
class Prefixes:
    """What the rows have read when they choose a token.

    Attributes:
        texts: (T_b,) of each row, up to its first token in `read`.
        read: (B,) each, the tokens read since; at position k a row has read the first k + 1.
    """

    texts: Sequence[Tensor]
    read: Sequence[Tensor]

    @cached_property
    def _read_BK(self) -> Tensor:
        return torch.stack(list(self.read), dim=1)

    def at(self, row: int, position: int) -> Tensor:
        """(T,) tokens that a row has read at a position."""
        return torch.cat([self.texts[row], self._read_BK[row, 1 : position + 1]])


class Scores:
    """Logits -> scores, as `transformers`' processors would have made them position by position.

    Args:
        processors: prepared by `generate`, warpers for sampling included.
        batch: number of rows that they were prepared for.
        first: which of those the first row here is.

    Attributes:
        need_prefixes: whether any of them looks at the tokens before; those are run row by row and
            position by position.
    """

    def __init__(self, processors: Sequence[Any] = (), batch: int = 1, first: int = 0) -> None:
        self._processors: Any = LogitsProcessorList(processors)
        self._batch, self._first = batch, first
        kinds = {f"{type(each).__module__}.{type(each).__name__}" for each in processors}
        self.need_prefixes = not all(map(STATELESS.fullmatch, kinds))

    def __call__(self, logits_BKV: Tensor, prefixes: Prefixes) -> Tensor:
        """(B, K, V) fp32, for the last K positions of `prefixes`."""
        scores = logits_BKV.float()
        if not self._processors:
            return scores
        B, K, V = scores.shape
        if not self.need_prefixes:
            nothing = torch.empty(B * K, 0, dtype=torch.long, device=scores.device)
            return self._processors(nothing, scores.flatten(0, 1)).view(B, K, V)
        first, out = len(prefixes.read) - K, torch.empty_like(scores)
        for b in range(B):
            for k in range(K):
                # Whole batches of one prefix, of which one row counts: processors may go by the
                # number of the row.
                ids = prefixes.at(b, first + k).expand(self._batch, -1)
                batch = self._processors(ids, scores[b, k].repeat(self._batch, 1))
                out[b, k] = batch[self._first + b]
        return out


def race(
    shape: Sequence[int], device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Exponential random numbers of that shape, fp32, for `draw`."""
    # Exactly zero would turn a token of weight zero into 0 / 0.
    times = torch.empty(*shape, device=device).exponential_(generator=generator)
    return times.clamp_min_(torch.finfo(times.dtype).tiny)


def draw(weights: Tensor, times: Tensor) -> Tensor:
    """One token per row from non-negative `weights` (..., V), which need not sum to one; int64 of
    shape (...).

    A race: argmax of w_v / e_v with e_v ~ Exp(1) (`race`) picks v with probability w_v / sum(w).
    Unlike `torch.multinomial` it takes any number of leading dimensions, never waits for the
    device, and can be part of a CUDA graph.
    """
    return (weights / times).argmax(dim=-1)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """Normalised positive part of p - q, over the last dimension.

    Where p and q agree to rounding, nothing is left of the difference; a rejection there is itself
    an accident of rounding, and p is the right distribution to draw from.
    """
    rest = (p - q).clamp_min(0)
    mass = rest.sum(dim=-1, keepdim=True)
    return torch.where(mass > 0, rest / mass.clamp_min(torch.finfo(rest.dtype).tiny), p)


def verify(
    p_BKV: Tensor,
    q_BKV: Tensor,
    drafted_BK: Tensor,
    uniform_BK: Tensor,
    times_BV: Tensor,
    limits_B: Tensor,
) -> tuple[Tensor, Tensor]:
    """Speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1): the output follows p
    exactly, whatever q is.

    Args:
        p_BKV: (B, K + 1, V) target distributions at the K drafted positions and the one after them.
        q_BKV: (B, K, V) distributions that the drafted tokens were drawn from.
        drafted_BK: the drafted tokens.
        uniform_BK: numbers in [0, 1).
        times_BV: see `race`.
        limits_B: how many of a row's drafted tokens are looked at, decided before they were drawn.

    Returns:
        accepted (B,): how many leading drafted tokens are kept; each is kept with probability
        min(1, p / q). bonus (B,): the token after them, from the residual distribution at the first
        rejected position, or from p if none was rejected.
    """
    index = drafted_BK.unsqueeze(-1)
    p_drafted, q_drafted = (x.gather(-1, index).squeeze(-1) for x in (p_BKV[:, :-1], q_BKV))
    accepted_B, looked_at = _leading(uniform_BK * q_drafted < p_drafted, limits_B)
    # After the last drafted token q is zero, and the residual of (p, 0) is p.
    q_BKV = torch.cat([q_BKV * looked_at.unsqueeze(-1), torch.zeros_like(p_BKV[:, :1])], dim=1)
    rows = torch.arange(len(p_BKV), device=p_BKV.device)
    return accepted_B, draw(residual(p_BKV[rows, accepted_B], q_BKV[rows, accepted_B]), times_BV)


def _leading(kept_BK: Tensor, limits_B: Tensor) -> tuple[Tensor, Tensor]:
    """How many leading tokens within the row's limit are kept, and which are within it."""
    looked_at = torch.arange(kept_BK.shape[1], device=kept_BK.device) < limits_B[:, None]
    return (kept_BK & looked_at).long().cumprod(dim=-1).sum(dim=-1), looked_at


@dataclass(frozen=True)
class Noise:
    """The randomness of one cycle.

    Attributes:
        uniform_BK: for the acceptance test.
        times: i, V -> (B, V), for the i-th draw.
    """

    uniform_BK: Tensor
    times: Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Draw:
    """One token per row: `tokens` (B,), and `q` (B, V), what it was drawn from; None if greedy."""

    tokens: Tensor
    q: Tensor | None


@dataclass(frozen=True)
class Greedy:
    """The most likely token, always; a draft is kept while it is the target's own choice."""

    scores: Scores = field(default_factory=Scores)

    def noise(self, rows: int, drafts: int, device: torch.device) -> None:
        """Nothing is left to chance."""

    def draw(self, scores_BV: Tensor, noise: Noise | None, index: int) -> Draw:
        """The token of the cycle's draw number `index`."""
        return Draw(scores_BV.argmax(dim=-1), None)

    def verify(
        self, scores_BKV: Tensor, drafts: Sequence[Draw], noise: Noise | None, limits_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As the function `verify`, from the target's scores (B, K + 1, V)."""
        choices_BK = scores_BKV.argmax(dim=-1)
        if not drafts:
            return torch.zeros_like(choices_BK[:, 0]), choices_BK[:, 0]
        drafted_BK = torch.stack([draft.tokens for draft in drafts], dim=1)
        accepted_B, _ = _leading(choices_BK[:, :-1] == drafted_BK, limits_B)
        return accepted_B, choices_BK.gather(-1, accepted_B.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class Sampling:
    """Draws from the softmax of the scores; drafts are verified by `verify`.

    Args:
        scores: with temperature and truncation among its processors.
        generator: source of all randomness; None is torch's global generator.
    """

    scores: Scores = field(default_factory=Scores)
    generator: torch.Generator | None = None

    def noise(self, rows: int, drafts: int, device: torch.device) -> Noise:
        """Randomness for a cycle with so many drafts."""
        uniform_BK = torch.rand(rows, drafts, generator=self.generator, device=device)
        return Noise(uniform_BK, lambda _, size: race((rows, size), device, self.generator))

    def draw(self, scores_BV: Tensor, noise: Noise | None, index: int) -> Draw:
        """The token of the cycle's draw number `index`."""
        assert noise is not None
        q_BV = scores_BV.softmax(dim=-1)
        return Draw(draw(q_BV, noise.times(index, q_BV.shape[-1])), q_BV)

    def verify(
        self, scores_BKV: Tensor, drafts: Sequence[Draw], noise: Noise | None, limits_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As the function `verify`, from the target's scores (B, K + 1, V)."""
        if not drafts:
            bonus_B = self.draw(scores_BKV[:, 0], noise, 0).tokens
            return torch.zeros_like(bonus_B), bonus_B
        assert noise is not None
        p_BKV, k = scores_BKV.softmax(dim=-1), len(drafts)
        q_BKV = torch.stack([draft.q for draft in drafts if draft.q is not None], dim=1)
        drafted_BK = torch.stack([draft.tokens for draft in drafts], dim=1)
        times_BV = noise.times(k, p_BKV.shape[-1])
        return verify(p_BKV, q_BKV, drafted_BK, noise.uniform_BK[:, :k], times_BV, limits_B)


Sampler = Greedy | Sampling
