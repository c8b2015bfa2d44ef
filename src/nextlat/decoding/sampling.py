"""From logits to tokens: warped distributions, draws, and the acceptance test of speculative sampling.

Everything here is vectorised over rows and never reads a value back to the host. A *rule* (`Greedy` or `Sampling`) is how
one call of `generate` chooses tokens; the drafter and the verification use the same rule, so the q of the acceptance test is
always the distribution that the draft was really drawn from.

Shapes: B rows, K drafted tokens, V vocabulary. p is the target's distribution, q the drafter's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nextlat.errors import NextLatError


def probabilities(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Distribution that the settings draw from, fp32, of the shape of `logits` (..., V).

    Order and ties follow `transformers`: temperature, then top-k (tokens that tie with the k-th stay), then top-p (the
    smallest set of most likely tokens whose mass reaches `top_p`, at least one token).
    """
    scores = logits.float()
    if temperature != 1.0:
        scores = scores / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        kth = scores.topk(top_k, dim=-1).values[..., -1:]
        scores = scores.masked_fill(scores < kth, -torch.inf)
    if top_p is not None and top_p < 1.0:
        ascending, order = scores.sort(dim=-1)
        tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        tail[..., -1] = False
        scores = scores.masked_fill(torch.zeros_like(tail).scatter(-1, order, tail), -torch.inf)
    return scores.softmax(dim=-1)


def draw(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token per row from non-negative `weights` (..., V), which need not sum to one; int64 of shape (...).

    An exponential race: argmax of w_v / e_v with e_v ~ Exp(1) picks v with probability w_v / sum(w). Unlike `torch.multinomial`
    it takes any number of leading dimensions and never waits for the device.
    """
    race = torch.empty_like(weights).exponential_(generator=generator)
    # A race time of exactly zero would turn a token of weight zero into 0 / 0.
    return (weights / race.clamp_min_(torch.finfo(race.dtype).tiny)).argmax(dim=-1)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """Normalised positive part of p - q, over the last dimension.

    Where p and q agree to rounding nothing is left of the difference; a rejection there is itself a rounding accident, and p
    is the right distribution to draw from.
    """
    rest = (p - q).clamp_min(0)
    mass = rest.sum(dim=-1, keepdim=True)
    return torch.where(mass > 0, rest / mass.clamp_min(torch.finfo(rest.dtype).tiny), p)


def verify(p: Tensor, q: Tensor, drafted: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Speculative sampling (Leviathan et al., arXiv 2211.17192, algorithm 1): the output follows p exactly, whatever q is.

    Args:
        p: (B, K + 1, V) target distributions at the K drafted positions and at the one behind them.
        q: (B, K, V) distributions that the drafted tokens were drawn from.
        drafted: (B, K) drafted tokens.
        generator: source of the uniform numbers and of the draws.

    Returns:
        accepted (B,): how many leading drafted tokens are kept; each is kept with probability min(1, p / q).
        following (B,): the token behind them: from the residual distribution at the first rejected position, or from p at the
        last position when all were accepted.
    """
    index = drafted.unsqueeze(-1)
    p_drafted = p[:, :-1].gather(-1, index).squeeze(-1)
    q_drafted = q.gather(-1, index).squeeze(-1)
    uniform = torch.rand(drafted.shape, generator=generator, device=p.device, dtype=p.dtype)
    accepted = (uniform * q_drafted < p_drafted).long().cumprod(dim=-1).sum(dim=-1)
    # Behind an entirely accepted draft q is zero, and the residual of (p, 0) is p.
    q_BKV = torch.cat([q, torch.zeros_like(p[:, :1])], dim=1)
    row = torch.arange(len(p), device=p.device)
    return accepted, draw(residual(p[row, accepted], q_BKV[row, accepted]), generator)


def verify_greedy(choices: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
    """Greedy counterpart of `verify`: keep drafted tokens (B, K) while they equal the target's choices (B, K + 1)."""
    accepted = (choices[:, :-1] == drafted).long().cumprod(dim=-1).sum(dim=-1)
    return accepted, choices.gather(-1, accepted.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class Draw:
    """One token per row, as a rule drew it.

    `tokens` (B,); `q` (B, V), the distribution drawn from, or None when the choice is greedy; `peak` (B,), the largest logit,
    which is finite exactly when the logits can be decoded (a -inf for a forbidden token is fine, a NaN or +inf is not).
    """

    tokens: Tensor
    q: Tensor | None
    peak: Tensor


@dataclass(frozen=True)
class Greedy:
    """The most likely token, always; a draft is kept while it is the target's own choice."""

    def draw(self, logits_BV: Tensor) -> Draw:
        peak, tokens = logits_BV.float().max(dim=-1)
        return Draw(tokens, None, peak)

    def verify(self, logits_BKV: Tensor, drafts: list[Draw]) -> tuple[Tensor, Tensor, Tensor]:
        """Accepted counts (B,), following tokens (B,) and peaks (B, K + 1) from target logits (B, K + 1, V)."""
        peak, choices = logits_BKV.float().max(dim=-1)
        if not drafts:
            return torch.zeros_like(choices[:, 0]), choices[:, 0], peak
        accepted, following = verify_greedy(choices, torch.stack([draft.tokens for draft in drafts], dim=1))
        return accepted, following, peak


@dataclass(frozen=True)
class Sampling:
    """Draws at a temperature, truncated by top-k and top-p; with K drafts verified by `verify`.

    Args:
        temperature: above zero (greedy decoding is a rule of its own, not a limit of this one).
        top_k: keep the k most likely tokens; None keeps all.
        top_p: keep the most likely tokens up to this mass, in (0, 1]; None keeps all.
        generator: source of all randomness; None is torch's global generator.

    Raises:
        NextLatError: a setting outside its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise NextLatError(
                f"temperature must be above 0 to sample, got {self.temperature}: use do_sample=False for greedy decoding"
            )
        if self.top_k is not None and self.top_k < 1:
            raise NextLatError(f"top_k must be at least 1, got {self.top_k}: use None to keep every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise NextLatError(f"top_p must lie in (0, 1], got {self.top_p}: use None to keep every token")

    def probabilities(self, logits: Tensor) -> Tensor:
        return probabilities(logits, self.temperature, self.top_k, self.top_p)

    def draw(self, logits_BV: Tensor) -> Draw:
        q_BV = self.probabilities(logits_BV)
        return Draw(draw(q_BV, self.generator), q_BV, logits_BV.float().amax(dim=-1))

    def verify(self, logits_BKV: Tensor, drafts: list[Draw]) -> tuple[Tensor, Tensor, Tensor]:
        """Accepted counts (B,), following tokens (B,) and peaks (B, K + 1) from target logits (B, K + 1, V)."""
        peak = logits_BKV.float().amax(dim=-1)
        p_BKV = self.probabilities(logits_BKV)
        if not drafts:
            accepted = torch.zeros(len(p_BKV), dtype=torch.long, device=p_BKV.device)
            return accepted, draw(p_BKV[:, 0], self.generator), peak
        q_BKV = torch.stack([draft.q for draft in drafts if draft.q is not None], dim=1)
        drafted_BK = torch.stack([draft.tokens for draft in drafts], dim=1)
        accepted, following = verify(p_BKV, q_BKV, drafted_BK, self.generator)
        return accepted, following, peak
