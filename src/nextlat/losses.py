"""Per-position losses, reduced once as sum / count, none of which keeps a (positions x vocabulary)
tensor.

Shapes: N positions, D width, V vocabulary. A *head* is any callable (M, D) -> (M, V), see
    `backbone.Head`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]

Counts = dict[str, Tensor]
"""Name of a loss part -> (steps,) number of valid positions in each of its means."""


def add_counts(counts: Sequence[Counts]) -> Counts:
    """The counts of several batches taken together."""
    return {name: torch.stack([each[name] for each in counts]).sum(0) for name in counts[0]}


@dataclass(frozen=True)
class Term:
    """One named part of an objective.

    Attributes:
        sums: (steps,) over the valid positions of this batch.
        counts: (steps,) what they are divided by.
        weight: of the mean in the total.
    """

    sums: Tensor
    counts: Tensor
    weight: float = 1.0

    def mean(self) -> Tensor:
        """Mean over steps, each averaged over its own count; a step without a valid position
        contributes 0, not NaN."""
        return (self.sums / self.counts.clamp(min=1)).mean()


@dataclass(frozen=True)
class Losses:
    """The named parts of one objective on one batch."""

    terms: dict[str, Term]

    @property
    def total(self) -> Tensor:
        """The one scalar to call `.backward()` on."""
        weighted = [term.weight * term.mean() for term in self.terms.values() if term.weight]
        return torch.stack(weighted).sum()

    def means(self) -> dict[str, Tensor]:
        """The parts before weighting, detached: what is logged."""
        return {name: term.mean().detach() for name, term in self.terms.items()}


# ---- between states ----


def smooth_l1(h_hat_ND: Tensor, h_ND: Tensor) -> Tensor:
    """Sum over positions of Smooth L1 (beta = 1), averaged over the width; in fp32 under mixed
    precision.

    L_next_h of arXiv 2511.05963, whose target sg[h] comes detached.
    """
    return F.smooth_l1_loss(_fp32(h_hat_ND), _fp32(h_ND), reduction="sum") / h_ND.shape[-1]


def mse(h_hat_ND: Tensor, h_ND: Tensor) -> Tensor:
    """The same with the squared difference (an ablation)."""
    return F.mse_loss(_fp32(h_hat_ND), _fp32(h_ND), reduction="sum") / h_ND.shape[-1]


# ---- between tokens ----


def cross_entropy(head: Head, h_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Sum over positions of the cross-entropy of `head(h)` against the targets.

    A plain linear head goes through torch's chunked `linear_cross_entropy` where this torch has it
    (2.13 and later). Otherwise (soft-capping, scaling, mixed precision) the backward pass
    recomputes the logits chunk by chunk.
    """
    library: Any = getattr(F, "linear_cross_entropy", None)
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    mixed = torch.is_autocast_enabled(h_ND.device.type)
    if library is not None and weight is not None and weight.dtype == h_ND.dtype and not mixed:
        options = torch.nn.LinearCrossEntropyOptions()
        return library(h_ND, weight, targets_N, linear_bias=bias, reduction="sum", options=options)
    return _by_chunks(
        lambda h, y: F.cross_entropy(_fp32(head(h)), y, reduction="sum"), h_ND, targets_N
    )


def same_head_kl(frozen_head: Head, h_hat_ND: Tensor, h_ND: Tensor) -> Tensor:
    """Sum over positions of KL( softmax(head(h)) || softmax(head(h_hat)) ), gradient to `h_hat`
    only.

    L_KL of arXiv 2511.05963: teacher = the true state, student = the predicted state, both through
    the same frozen head. Because the head is frozen, all that the backward pass needs is the
    gradient with respect to h_hat, which for a linear head is m_q - m_p with m = W^T softmax(W h).
    It is formed chunk by chunk in the forward pass, and nothing else is kept.

    Args:
        frozen_head: differentiable in its input, its parameters detached.
        h_hat_ND: predicted states.
        h_ND: true states, used as constants.
    """
    return _SameHeadKL.apply(h_hat_ND, h_ND.detach(), frozen_head)


def kl_divergence(teacher: Head, student: Head, h_ND: Tensor, h_hat_ND: Tensor) -> Tensor:
    """Sum over positions of KL( softmax(teacher(h)) || softmax(student(h_hat)) ), gradient to all
    four that are not detached.

    For the ablations of the stop-gradients, in which `same_head_kl` would be wrong: as little
    memory, more time.
    """

    def kl(h: Tensor, h_hat: Tensor) -> Tensor:
        log_p, log_q = _fp32(teacher(h)).log_softmax(-1), _fp32(student(h_hat)).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum()

    return _by_chunks(kl, h_ND, h_hat_ND)


def row_chunks(rows: int) -> int:
    """Rows of logits to hold at a time: a quarter of the batch, between 16 and 1,024.

    Few enough to stay in cache, and never the whole batch: peak memory must not grow with N * V.
    """
    return max(16, min(1024, -(-rows // 4)))


def _by_chunks(loss: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Sum of `loss` over chunks of rows, each computed again in the backward pass."""
    total, rows = _zero_like(a), row_chunks(len(a))
    for chunk in zip(a.split(rows), b.split(rows), strict=True):
        total = total + checkpoint(loss, *chunk, use_reentrant=False)
    return total


def _fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _zero_like(x: Tensor) -> Tensor:
    return _fp32(x.new_zeros(()))


class _SameHeadKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_hat_ND: Tensor, h_ND: Tensor, head: Head) -> Tensor:
        rows, total = row_chunks(len(h_hat_ND)), _zero_like(h_ND)
        grad_ND = torch.empty_like(h_hat_ND)
        for start in range(0, len(h_hat_ND), rows):
            chunk = slice(start, start + rows)
            log_p = _fp32(head(h_ND[chunk])).log_softmax(-1)
            with torch.enable_grad():
                h_hat = h_hat_ND[chunk].detach().requires_grad_()
                logits = head(h_hat)
            log_q = _fp32(logits.detach()).log_softmax(-1)
            p = log_p.exp()
            total += (p * log_p.sub_(log_q)).sum()
            q_minus_p = log_q.exp_().sub_(p).to(logits.dtype)
            (grad_ND[chunk],) = torch.autograd.grad(logits, h_hat, q_minus_p)
        ctx.save_for_backward(grad_ND)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grad_outputs[0].to(grad_ND.dtype), None, None


# ---- losses in pieces ----


def one_by_one(
    pieces: Iterable[Callable[..., Tensor]],
    states: Sequence[Tensor],
    parameters: Iterable[nn.Parameter],
) -> tuple[Tensor, Tensor]:
    """Sum of a loss made of many pieces, one of which is held in memory at a time, differentiated
    by one `.backward()`.

    In the forward pass every piece runs forward *and backward* on the detached states, and the
    gradients are added up; the backward pass only scales them. Peak memory is that of the largest
    piece plus one gradient per state and parameter.

    Args:
        pieces: functions of the detached `states` -> (S,) named parts of the loss.
        states: tensors that carry a graph.
        parameters: all others that the pieces use; those that require a gradient get one.

    Returns:
        The total over parts and pieces, and detached (S,) the parts summed over the pieces; zeros
        of shape (1,) without a piece.
    """
    learn = torch.is_grad_enabled()
    return _OneByOne.apply(
        list(pieces), len(states), learn, *states, *(p for p in parameters if p.requires_grad)
    )


class _OneByOne(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pieces: list[Callable[..., Tensor]], count: int, learn: bool, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        states = [x.detach().requires_grad_(learn and x.requires_grad) for x in inputs[:count]]
        wanted = {i: x for i, x in enumerate([*states, *inputs[count:]]) if x.requires_grad}
        sums = [_fp32(torch.zeros_like(x)) for x in wanted.values()] if learn else []
        parts = _zero_like(inputs[0]).view(1)
        for piece in pieces:
            with torch.set_grad_enabled(learn):
                values = piece(*states)
            parts = parts + values.detach()
            if learn and wanted and values.requires_grad:
                grads = torch.autograd.grad(
                    values, [*wanted.values()], torch.ones_like(values), allow_unused=True
                )
                for total, grad in zip(sums, grads, strict=True):
                    if grad is not None:
                        total += grad
        ctx.dtypes = {i: x.dtype for i, x in wanted.items()} if learn else {}
        ctx.save_for_backward(*sums)
        ctx.inputs = len(inputs)
        ctx.mark_non_differentiable(parts)
        return parts.sum(), parts

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * ctx.inputs
        for (i, dtype), total in zip(ctx.dtypes.items(), ctx.saved_tensors, strict=True):
            grads[i] = (total * grad_outputs[0]).to(dtype)
        return None, None, None, *grads
