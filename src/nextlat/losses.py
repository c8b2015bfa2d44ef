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

CPU = torch.device("cpu")
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
    only: `rollout_kl` of one step."""
    every = torch.arange(len(h_ND), device=h_ND.device)
    return rollout_kl(frozen_head, [(h_hat_ND, every)], h_ND)[0]


def rollout_kl(
    frozen_head: Head, predicted: Sequence[tuple[Tensor, Tensor]], h_ND: Tensor
) -> Tensor:
    """(d,) sums over positions of KL( softmax(head(h)) || softmax(head(h_hat)) ) at the steps of a
    rollout, gradient to the `h_hat` only.

    L_KL of arXiv 2511.05963: teacher = the true state, student = the predicted state, both through
    the same frozen head. Because the head is frozen, all that the backward pass needs is the
    gradient with respect to h_hat, which for a linear head is m_q - m_p with m = W^T softmax(W h).
    It is formed chunk by chunk in the forward pass, and nothing else is kept. The teacher's
    distribution at a position is computed once for all steps that reach it.

    Args:
        frozen_head: differentiable in its input, its parameters detached.
        predicted: of each step, predicted states (K, D) and the positions (K,) of the true ones, in
            ascending order.
        h_ND: true states, used as constants.
    """
    positions = [position_K for _, position_K in predicted]
    return _SameHeadKL.apply(h_ND.detach(), frozen_head, positions, *(h for h, _ in predicted))


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


def row_chunks(rows: int, device: torch.device = CPU) -> int:
    """Rows of logits to hold at a time: a quarter of the batch, between 16 and 256 (1,024 on a
    GPU).

    Few enough to stay in cache, and never the whole batch: peak memory must not grow with N * V.
    """
    return max(16, min(256 if device.type == "cpu" else 1024, -(-rows // 4)))


def _by_chunks(loss: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Sum of `loss` over chunks of rows, each computed again in the backward pass."""
    total, rows = _zero_like(a), row_chunks(len(a), a.device)
    for chunk in zip(a.split(rows), b.split(rows), strict=True):
        total = total + checkpoint(loss, *chunk, use_reentrant=False)
    return total


def _fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _zero_like(x: Tensor) -> Tensor:
    return _fp32(x.new_zeros(()))


class _SameHeadKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_ND: Tensor, head: Head, positions: list[Tensor], *h_hats: Tensor
    ) -> Tensor:
        sums = _fp32(h_ND.new_zeros(len(h_hats)))
        # Zeros, not empty: a step without a state in a chunk leaves its rows as they are.
        grads = [torch.zeros_like(h_hat) for h_hat in h_hats]
        position_M = torch.cat(positions).unique()
        chunks = position_M.split(row_chunks(len(position_M), h_ND.device)) if len(h_ND) else ()
        firsts = position_M.new_tensor([0, *(len(chunk) for chunk in chunks)]).cumsum(0)
        index = [torch.searchsorted(position_M, position_K) for position_K in positions]
        bounds = [torch.searchsorted(index_K, firsts).tolist() for index_K in index]
        for c, chunk in enumerate(chunks):
            log_p_all = _fp32(head(h_ND.index_select(0, chunk))).log_softmax(-1)
            p_all = log_p_all.exp()
            for i, h_hat_KD in enumerate(h_hats):
                rows = slice(bounds[i][c], bounds[i][c + 1])
                if rows.start == rows.stop:
                    continue
                log_p, p = log_p_all, p_all
                if rows.stop - rows.start < len(chunk):
                    of_step = index[i][rows] - firsts[c]
                    log_p, p = log_p.index_select(0, of_step), p.index_select(0, of_step)
                learns = ctx.needs_input_grad[3 + i]
                with torch.set_grad_enabled(learns):
                    h_hat = h_hat_KD[rows].detach().requires_grad_(learns)
                    logits = head(h_hat)
                log_q = _fp32(logits.detach()).log_softmax(-1)
                sums[i] += (log_p - log_q).mul_(p).sum()
                if learns:
                    q_minus_p = log_q.exp_().sub_(p).to(logits.dtype)
                    (grads[i][rows],) = torch.autograd.grad(logits, h_hat, q_minus_p)
        ctx.save_for_backward(*grads)
        return sums

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        grads = (g * scale[i].to(g.dtype) for i, g in enumerate(ctx.saved_tensors))
        return None, None, None, *grads


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
