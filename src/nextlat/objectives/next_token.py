"""GPT: next-token prediction, the baseline of everything (spec: METHOD section 2)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nextlat.batch import Batch
from nextlat.losses import Losses, Term, cross_entropy
from nextlat.objectives.flops import head_weights, per_weight
from nextlat.objectives.objective import Objective


@dataclass(frozen=True)
class NextTokenConfig:
    """Plain next-token prediction has no settings."""


class NextToken(Objective):
    """L = L_next_token = mean_t CE(W h_t, x_{t+1})."""

    name: ClassVar[str] = "next-token"

    def counts(self, batch: Batch) -> Tensor:
        return batch.scored().sum().float().view(1)

    def loss(self, batch: Batch, counts: Tensor | None = None) -> Losses:
        counts = self.counts(batch) if counts is None else counts
        h_ND = self.backbone.hidden(batch).flatten(0, 1)
        return Losses({"next_token": self.next_token_term(h_ND, batch, counts[:1])})

    def flops(self, batch: Batch) -> dict[str, float]:
        return {
            "head": per_weight(self.backbone)
            * head_weights(self.backbone)
            * int(batch.scored().sum())
        }

    def next_token_term(self, h_ND: Tensor, batch: Batch, counts: Tensor) -> Term:
        """The cross-entropy that every objective shares; `counts` has shape (1,)."""
        scored = batch.scored().nonzero().squeeze(1)
        if len(scored) == 0:
            return Term(h_ND.sum().view(1) * 0, counts)
        targets = batch.targets()[scored]
        return Term(
            cross_entropy(self.backbone.head, torch.index_select(h_ND, 0, scored), targets).view(1),
            counts,
        )
