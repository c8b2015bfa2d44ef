"""Per-position losses, reduced once as sum / count, none of which keeps a (positions x vocabulary)
tensor.

Shapes: N positions, D width, V vocabulary. A *head* is any callable (M, D) -> (M, V); see
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

# Chunks small enough that their logits stay in cache, and never the whole batch: peak memory must
# not scale with N * V.
MAX_ROWS, MIN_ROWS, SHARE = 1024, 16, 4


def row_chunks(rows: int) -> int:
    """Rows of logits to hold at a time: a quarter of the batch, between 16 and 1,024."""
    return max(MIN_ROWS, min(MAX_ROWS, -(-rows // SHARE)))


@dataclass(frozen=True)
class Term:
    """One named part of an objective: `weight * mean over steps of sums / counts`, both of shape
    (steps,)."""

    sums: Tensor
    counts: Tensor
    weight: float = 1.0

    def mean(self) -> Tensor:
        """Each step is averaged over its own count; a step without a valid position contributes 0,
        not NaN."""
        return (self.sums / self.counts.clamp(min=1)).mean()


@dataclass(frozen=True)
class Losses:
    """The named parts of one objective on one batch."""

    terms: dict[str, Term]

    @property
    def total(self) -> Tensor:
        """The one scalar to call `.backward()` on."""
        return torch.stack(
            [term.weight * term.mean() for term in self.terms.values() if term.weight]
        ).sum()

    def means(self) -> dict[str, Tensor]:
        """The parts before weighting, detached: what is logged."""
        return {name: term.mean().detach() for name, term in self.terms.items()}


def _fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def smooth_l1(h_hat_ND: Tensor, h_ND: Tensor) -> Tensor:
    """Sum over positions of Smooth L1 (beta = 1), averaged over the width; fp32 under mixed
    precision.

    L_next_h of arXiv 2511.05963; `h_ND` must come detached, it is the target sg[h].
    """
    return (
        F.smooth_l1_loss(_fp32(h_hat_ND), _fp32(h_ND), reduction="sum", beta=1.0) / h_ND.shape[-1]
    )


def mse(h_hat_ND: Tensor, h_ND: Tensor) -> Tensor:
    """Sum over positions of the squared difference, averaged over the width; fp32 under mixed
    precision (an ablation)."""
    return F.mse_loss(_fp32(h_hat_ND), _fp32(h_ND), reduction="sum") / h_ND.shape[-1]


def cross_entropy(head: Head, h_ND: Tensor, targets_N: Tensor) -> Tensor:
    """Sum over positions of the cross-entropy of `head(h)` against the targets, without an (N, V)
    tensor kept.

    A plain linear head goes through torch's chunked `linear_cross_entropy` where this torch has it
    (2.13 and later); other heads (soft-capping, scaling), mixed precision and older versions
    recompute the logits chunk by chunk in the backward pass.
    """
    library: Any = getattr(F, "linear_cross_entropy", None)
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if (
        library is not None
        and weight is not None
        and weight.dtype == h_ND.dtype
        and not _autocast(h_ND)
    ):
        options = torch.nn.LinearCrossEntropyOptions()
        return library(h_ND, weight, targets_N, linear_bias=bias, reduction="sum", options=options)
    total = h_ND.new_zeros((), dtype=torch.promote_types(h_ND.dtype, torch.float32))
    rows = row_chunks(len(h_ND))
    for h, y in zip(h_ND.split(rows), targets_N.split(rows), strict=True):
        total = total + checkpoint(_cross_entropy_chunk, head, h, y, use_reentrant=False)
    return total


def _cross_entropy_chunk(head: Head, h: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(_fp32(head(h)), y, reduction="sum")


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def same_head_kl(frozen_head: Head, h_hat_ND: Tensor, h_ND: Tensor) -> Tensor:
    """Sum over positions of KL( softmax(head(h)) || softmax(head(h_hat)) ), gradient to `h_hat`
    only.

    L_KL of arXiv 2511.05963: teacher = the true state, student = the predicted state, both through
    the same frozen head. Because the head is frozen, all that the backward pass needs is the
    gradient with respect to h_hat, which for a linear head is m_q - m_p with m = W^T softmax(W h).
    It is formed chunk by chunk in the forward pass and is all that is kept.

    Args:
        frozen_head: (M, D) -> (M, V), differentiable in its input, its parameters detached.
        h_hat_ND: predicted states. h_ND: true states (used as constants).
    """
    return _SameHeadKL.apply(h_hat_ND, h_ND.detach(), frozen_head)


def kl_divergence(teacher: Head, student: Head, h_ND: Tensor, h_hat_ND: Tensor) -> Tensor:
    """Sum over positions of KL( softmax(teacher(h)) || softmax(student(h_hat)) ), gradient to all
    four that are not detached.

    For the ablations of the stop-gradients, in which `same_head_kl` would be wrong. The logits of a
    chunk are recomputed in the
    backward pass, none are kept: as little memory, more time.
    """
    total = h_ND.new_zeros((), dtype=torch.promote_types(h_ND.dtype, torch.float32))
    rows = row_chunks(len(h_ND))
    for h, h_hat in zip(h_ND.split(rows), h_hat_ND.split(rows), strict=True):
        total = total + checkpoint(_kl_chunk, teacher, student, h, h_hat, use_reentrant=False)
    return total


def _kl_chunk(teacher: Head, student: Head, h: Tensor, h_hat: Tensor) -> Tensor:
    log_p, log_q = (_fp32(head(x)).log_softmax(-1) for head, x in ((teacher, h), (student, h_hat)))
    return (log_p.exp() * (log_p - log_q)).sum()


class _SameHeadKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_hat_ND: Tensor, h_ND: Tensor, head: Head) -> Tensor:
        rows = row_chunks(len(h_hat_ND))
        total = h_ND.new_zeros((), dtype=torch.promote_types(h_ND.dtype, torch.float32))
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


def one_by_one(
    pieces: Iterable[Callable[..., Tensor]],
    states: Sequence[Tensor],
    parameters: Iterable[nn.Parameter],
) -> tuple[Tensor, Tensor]:
    """Sum of a loss in many pieces, of which only one is held in memory at a time, behind one
    `.backward()`.

    In the forward pass every piece runs forward *and backward* on the detached states, and what it
    gives is added up; the backward pass only scales that sum. Peak memory is that of the largest
    piece plus one gradient per state and parameter.

    Args:
        pieces: functions of the detached `states` -> (S,) named parts of the loss; all parts of all
            pieces are added up.
        states: tensors with a graph behind them. parameters: all others that pieces use and that
            are to learn.

    Returns:
        The total, and detached (S,) the parts over all pieces; zeros of shape (1,) without a piece.
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
        wanted = [(i, x) for i, x in enumerate([*states, *inputs[count:]]) if x.requires_grad]
        grads = [_fp32(torch.zeros_like(x)) for _, x in wanted] if learn else []
        parts = torch.zeros(
            1, dtype=torch.promote_types(inputs[0].dtype, torch.float32), device=inputs[0].device
        )
        for piece in pieces:
            with torch.set_grad_enabled(learn):
                values = piece(*states)
            parts = parts + values.detach()
            if learn and wanted and values.requires_grad:
                found = torch.autograd.grad(
                    values, [x for _, x in wanted], torch.ones_like(values), allow_unused=True
                )
                for total, grad in zip(grads, found, strict=True):
                    if grad is not None:
                        total += grad
        ctx.places, ctx.dtypes = [i for i, _ in wanted], [x.dtype for _, x in wanted]
        ctx.save_for_backward(*grads)
        ctx.inputs = len(inputs)
        total = parts.sum()
        ctx.mark_non_differentiable(parts)
        return total, parts

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        out: list[Tensor | None] = [None] * ctx.inputs
        for i, grad, dtype in zip(ctx.places, ctx.saved_tensors, ctx.dtypes, strict=True):
            out[i] = (grad * grad_outputs[0]).to(dtype)
        return None, None, None, *out
