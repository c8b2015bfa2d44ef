"""Linear probes: how much of the tokens to come can be read off a frozen hidden state (TinyStories
in arXiv 2511.05963).

Shapes: N positions, D width, V vocabulary, K offsets, B positions of a minibatch.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from nextlat.backbone import evaluation_mode
from nextlat.batch import IGNORE, Batch
from nextlat.model import ObjectiveModel
from nextlat.tasks.task import batches

ROWS_PER_BATCH = 16  # whose states are computed at a time
PROBE_BATCH = 256  # positions of a minibatch
CHUNK = 2**24  # probe logits held at a time where no gradient is needed


def future_tokens(batch: Batch, offsets: int) -> Tensor:
    """(N, K) int64: the token 1, 2, ... K steps after each position; -100 where the document ends
    before it."""
    ids, linked = batch.input_ids.flatten(), batch.linked
    reached = torch.ones_like(linked)
    columns = []
    for step in range(offsets):
        # n reaches n + step + 1 if it reached n + step and that position is linked to the next one.
        reached = reached & _ahead(linked, step, False)
        columns.append(torch.where(reached, _ahead(ids, step + 1, IGNORE), IGNORE))
    return torch.stack(columns, dim=1)


def states_and_futures(
    model: ObjectiveModel, rows: Dataset[dict[str, Tensor]], offsets: int
) -> tuple[Tensor, Tensor]:
    """h_ND and the tokens ahead, (N, K), of the positions of some rows that have any."""
    states, targets = [], []
    with evaluation_mode(model):
        for batch in batches(model, rows, ROWS_PER_BATCH):
            ahead_NK = future_tokens(batch, offsets)
            some_N = (ahead_NK >= 0).any(1)
            states.append(model.backbone.hidden(batch).flatten(0, 1)[some_N].float())
            targets.append(ahead_NK[some_N])
    return torch.cat(states), torch.cat(targets)


def _ahead(x: Tensor, steps: int, fill: int | bool) -> Tensor:
    return F.pad(x[steps:], (0, min(steps, len(x))), value=fill)


def probe_cross_entropy(
    h_ND: Tensor,
    targets_NK: Tensor,
    test_h_ND: Tensor,
    test_targets_NK: Tensor,
    *,
    vocab_size: int,
    steps: int = 1000,
    batch_size: int = PROBE_BATCH,
    learning_rate: float = 5e-3,
) -> list[float]:
    """Train one linear probe for each offset on frozen states, and measure it on held-out ones.

    The K probes share nothing but their input and are trained in one go, each over its own count of
    targets, by AdamW with a linear decay to 0, beginning with the frequency of the tokens. Every
    feature is first scaled to mean 0 and deviation 1 over the training states: that changes no
    linear probe, but makes the learning rate fit states of any size.

    Args:
        h_ND: states to learn from.
        targets_NK: the tokens ahead of each, -100 = none.
        test_h_ND: states to measure on.
        test_targets_NK: the tokens ahead of those.
        vocab_size: V.
        steps: minibatches.
        batch_size: positions of a minibatch.
        learning_rate: at the start.

    Returns:
        Mean cross-entropy over the held-out targets of each offset, in nats; NaN for an offset
        without any.
    """
    K, V, device = targets_NK.shape[1], vocab_size, h_ND.device
    std, mean = torch.std_mean(h_ND, dim=0, correction=0)
    scale = 1 / std.clamp(min=1e-6)
    weight = torch.zeros(h_ND.shape[1], K * V, device=device, requires_grad=True)
    counts_KV = torch.stack([torch.bincount(y[y >= 0], minlength=V) for y in targets_NK.T])
    bias = ((counts_KV + 1) / (counts_KV.sum(1, keepdim=True) + V)).log().flatten().requires_grad_()

    def losses(h_BD: Tensor, targets_BK: Tensor) -> Tensor:
        """(K, B): 0 where there is no target."""
        logits_BKV = torch.addmm(bias, (h_BD - mean) * scale, weight).view(-1, K, V)
        logits_KVB = logits_BKV.permute(1, 2, 0)
        return F.cross_entropy(logits_KVB, targets_BK.T, ignore_index=IGNORE, reduction="none")

    with torch.enable_grad():
        optimizer = torch.optim.AdamW(
            [weight, bias], lr=learning_rate, weight_decay=0.0, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        order = torch.randperm(len(h_ND), generator=torch.Generator().manual_seed(0))
        for step in range(steps):
            start = step * batch_size % len(h_ND)
            rows = order[start : start + batch_size].to(device)
            targets = targets_NK[rows]
            counts = (targets != IGNORE).sum(0).clamp(min=1)
            optimizer.zero_grad()
            (losses(h_ND[rows], targets).sum(1) / counts).sum().backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        sums = torch.zeros(K, dtype=torch.float64, device=device)
        part = max(1, CHUNK // (K * V))
        for h, targets in zip(test_h_ND.split(part), test_targets_NK.split(part), strict=True):
            sums += losses(h, targets).double().sum(1)
    return (sums / (test_targets_NK != IGNORE).sum(0)).tolist()
