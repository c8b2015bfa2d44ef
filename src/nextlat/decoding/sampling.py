"""From logits to tokens: the scores that the processors make of them, draws, and the acceptance
test of speculative sampling.

Temperature, truncation, penalties and the like are `transformers`' own logits processors.
Everything here is vectorised over rows and reads nothing back to the host. A *rule* (`Greedy` or
`Sampling`) is how one call of `generate` chooses tokens; the drafter and the verification use the
same rule, so the q of the acceptance test is always what the draft was really drawn from.

Shapes: B rows, K drafted tokens, V vocabulary. p is the target's distribution, q the drafter's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process as library

# Processors that look at the scores alone; every other kind is shown each position's own prefix.
STATELESS = tuple(
    getattr(library, name)
    for name in (
        "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TopHLogitsWarper",
        "TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "SuppressTokensLogitsProcessor",
        "InfNanRemoveLogitsProcessor", "LogitNormalization",
    )
    if hasattr(library, name)
)  # fmt: skip


@dataclass(frozen=True)
class Past:
    """What the rows have read when they choose: `rows[b]` (T_b,), then `read_BK[b, : k + 1]` at
    position k."""

    rows: Sequence[Tensor]
    read_BK: Tensor

    def upto(self, row: int, position: int) -> Tensor:
        return torch.cat([self.rows[row], self.read_BK[row, : position + 1]])


class Scores:
    """Logits -> scores, as `transformers`' processors would have made them position by position.

    Args:
        processors: prepared by `generate`, warpers for sampling included.
        batch, first: rows that they were prepared for, and which of those the first row here is.

    Attributes:
        need_past: whether any of them looks at the tokens before; those are run row by row and
            position by position.
    """

    def __init__(self, processors: Sequence[Any] = (), batch: int = 1, first: int = 0) -> None:
        self._processors: Any = LogitsProcessorList(processors)
        self._batch, self._first = batch, first
        self.need_past = not all(type(processor) in STATELESS for processor in self._processors)

    def __call__(self, logits_BKV: Tensor, past: Past | None = None) -> Tensor:
        """(B, K, V) fp32; the K positions are the last ones of `past.read_BK`."""
        scores = logits_BKV.float()
        if not self._processors:
            return scores
        B, K, V = scores.shape
        if not self.need_past:
            return self._processors(
                scores.new_empty(B * K, 0, dtype=torch.long), scores.flatten(0, 1)
            ).view(B, K, V)
        assert past is not None
        first = past.read_BK.shape[1] - K
        out = torch.empty_like(scores)
        for b in range(B):
            for k in range(K):
                # Whole batches of the same prefix, of which one row counts: processors may go by
                # the row's number.
                ids = past.upto(b, first + k).expand(self._batch, -1)
                out[b, k] = self._processors(ids, scores[b, k].repeat(self._batch, 1))[
                    self._first + b
                ]
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

    Where p and q agree to rounding nothing is left of the difference; a rejection there is itself a
    rounding accident, and p is the right distribution to draw from.
    """
    rest = (p - q).clamp_min(0)
    mass = rest.sum(dim=-1, keepdim=True)
    return torch.where(mass > 0, rest / mass.clamp_min(torch.finfo(rest.dtype).tiny), p)


def verify(
    p: Tensor,
    q: Tensor,
    drafted: Tensor,
    uniform: Tensor,
    times: Tensor,
    most: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1): the output follows p
    exactly, whatever q is.

    Args:
        p: (B, K + 1, V) target distributions at the K drafted positions and at the one behind them.
        q: (B, K, V) distributions that the drafted tokens were drawn from.
        drafted: (B, K) drafted tokens.
        uniform: (B, K) numbers in [0, 1). times: (B, V), see `race`.
        most: (B,) how many of a row's drafted tokens are looked at, decided before they were drawn;
            None = all.

    Returns:
        accepted (B,): how many leading drafted tokens are kept; each is kept with probability
        min(1, p / q). following (B,): the token behind them: from the residual distribution at the
        first rejected position, or from p at the last position when all were accepted.
    """
    B, K = drafted.shape
    index = drafted.unsqueeze(-1)
    p_drafted = p[:, :-1].gather(-1, index).squeeze(-1)
    q_drafted = q.gather(-1, index).squeeze(-1)
    kept = uniform * q_drafted < p_drafted
    # Behind an entirely accepted draft q is zero, and the residual of (p, 0) is p.
    q_BKV = torch.cat([q, torch.zeros_like(p[:, :1])], dim=1)
    if most is not None:
        looked_at = torch.arange(K + 1, device=p.device) < most[:, None]
        kept, q_BKV = kept & looked_at[:, :-1], q_BKV * looked_at.unsqueeze(-1)
    accepted = kept.long().cumprod(dim=-1).sum(dim=-1)
    row = torch.arange(B, device=p.device)
    return accepted, draw(residual(p[row, accepted], q_BKV[row, accepted]), times)


def verify_greedy(
    choices: Tensor, drafted: Tensor, most: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Greedy counterpart of `verify`: keep drafted tokens (B, K) while they equal the target's
    choices (B, K + 1)."""
    kept = choices[:, :-1] == drafted
    if most is not None:
        kept = kept & (torch.arange(drafted.shape[1], device=drafted.device) < most[:, None])
    accepted = kept.long().cumprod(dim=-1).sum(dim=-1)
    return accepted, choices.gather(-1, accepted.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class Noise:
    """The randomness of one cycle: `uniform` (B, K) for the acceptance test, `times(i)` (B, V) for
    the i-th draw."""

    uniform: Tensor
    times: Callable[[int], Tensor]


@dataclass(frozen=True)
class Draw:
    """One token per row, as a rule drew it: `tokens` (B,), and `q` (B, V), what it was drawn from,
    None when greedy."""

    tokens: Tensor
    q: Tensor | None


@dataclass(frozen=True)
class Greedy:
    """The most likely token, always; a draft is kept while it is the target's own choice."""

    scores: Scores = field(default_factory=Scores)

    def noise(self, rows: int, drafts: int, vocabulary: int, device: torch.device) -> None:
        """Nothing is left to chance."""

    def draw(self, scores_BV: Tensor, noise: Noise | None, place: int) -> Draw:
        """The token at the `place`-th draw of the cycle."""
        return Draw(scores_BV.argmax(dim=-1), None)

    def verify(
        self, scores_BKV: Tensor, drafts: Sequence[Draw], noise: Noise | None, most: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Accepted counts (B,) and following tokens (B,) from target scores (B, K + 1, V); `most`
        as in `verify`."""
        choices = scores_BKV.argmax(dim=-1)
        if not drafts:
            return torch.zeros_like(choices[:, 0]), choices[:, 0]
        return verify_greedy(choices, torch.stack([draft.tokens for draft in drafts], dim=1), most)


@dataclass(frozen=True)
class Sampling:
    """Draws from the softmax of the scores; with K drafts verified by `verify`.

    Args:
        scores: with temperature and truncation among its processors.
        generator: source of all randomness; None is torch's global generator.
    """

    scores: Scores = field(default_factory=Scores)
    generator: torch.Generator | None = None

    def noise(self, rows: int, drafts: int, vocabulary: int, device: torch.device) -> Noise:
        uniform = torch.rand(rows, drafts, generator=self.generator, device=device)
        return Noise(uniform, lambda i: race((rows, vocabulary), device, self.generator))

    def draw(self, scores_BV: Tensor, noise: Noise | None, place: int) -> Draw:
        """The token at the `place`-th draw of the cycle."""
        assert noise is not None
        q_BV = scores_BV.softmax(dim=-1)
        return Draw(draw(q_BV, noise.times(place)), q_BV)

    def verify(
        self, scores_BKV: Tensor, drafts: Sequence[Draw], noise: Noise | None, most: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Accepted counts (B,) and following tokens (B,) from target scores (B, K + 1, V); `most`
        as in `verify`."""
        assert noise is not None
        p_BKV, times_BV = scores_BKV.softmax(dim=-1), noise.times(len(drafts))
        if not drafts:
            return torch.zeros(len(p_BKV), dtype=torch.long, device=p_BKV.device), draw(
                p_BKV[:, 0], times_BV
            )
        q_BKV = torch.stack([draft.q for draft in drafts if draft.q is not None], dim=1)
        drafted_BK = torch.stack([draft.tokens for draft in drafts], dim=1)
        return verify(p_BKV, q_BKV, drafted_BK, noise.uniform[:, : len(drafts)], times_BV, most)
