"""GPT: next-token prediction, the baseline of everything."""

from nextlat.batch import Batch
from nextlat.losses import Counts, Losses
from nextlat.objectives.flops import head_weights, per_weight
from nextlat.objectives.objective import Objective
from nextlat.validation import Settings


class NextTokenConfig(Settings):
    """Plain next-token prediction has no settings."""


class NextToken(Objective):
    """L = L_next_token = mean_t CE(W h_t, x_{t+1})"""

    name = title = "next-token"
    published_as = "GPT"

    def loss(self, batch: Batch, counts: Counts | None = None) -> Losses:
        counts = counts or self.counts(batch)
        h_ND = self.backbone.hidden(batch).flatten(0, 1)
        return Losses({"next_token": self.next_token_term(h_ND, batch, counts)})

    def flops(self, batch: Batch) -> dict[str, float]:
        head = per_weight(self.backbone) * head_weights(self.backbone)
        return {"head": head * len(batch.scored_positions)}
