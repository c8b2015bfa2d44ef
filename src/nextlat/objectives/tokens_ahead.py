"""What MTP and JTP share: d tokens beyond the next are predicted from every position, with one
weight for their mean loss."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.objectives.flops import TRAINING, head_weights
from nextlat.objectives.next_token import NextToken


@dataclass(frozen=True)
class TokensAheadConfig:
    """Settings of an objective that predicts tokens beyond the next one.

    Attributes:
        horizon: d, tokens beyond the next. lambda_mtp: weight of their mean loss, above 0.

    Raises:
        NextLatError: a value outside its range.
    """

    horizon: int = 1
    lambda_mtp: float = 1.0

    def __post_init__(self) -> None:
        if not self.horizon >= 1:
            raise NextLatError(
                f"{type(self).__name__}.horizon is {self.horizon}: it must be at least 1."
            )
        if not self.lambda_mtp > 0:
            raise NextLatError(
                f"{type(self).__name__}.lambda_mtp is {self.lambda_mtp}: it must be above 0."
            )


class TokensAhead(NextToken):
    """L = L_0 + lambda_MTP * mean(L_1..L_d); how L_i predicts x_{t+1+i} is the objective's own."""

    def counts(self, batch: Batch) -> Tensor:
        """(1 + d,): scored positions; positions t with a target x_{t+1+i}."""
        sizes = [len(at) for at, _ in batch.ahead(self.horizon)]
        rest = torch.tensor(sizes, dtype=torch.float32, device=batch.input_ids.device)
        return torch.cat([super().counts(batch), rest])

    def flops(self, batch: Batch) -> dict[str, float]:
        return {"head": TRAINING * head_weights(self.backbone) * float(self.counts(batch).sum())}
