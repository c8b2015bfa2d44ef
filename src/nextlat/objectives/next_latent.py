"""NextLat: next-latent prediction (Teoh et al., arXiv 2511.05963; in our words: spec METHOD section 1).

Shapes: B rows, T tokens, N = B*T positions, D width, E embedding width, d horizon.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from nextlat.backbone import Backbone
from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.losses import Losses, Term, same_head_kl, smooth_l1
from nextlat.objectives.next_token import NextToken


@dataclass(frozen=True)
class NextLatConfig:
    """Settings of next-latent prediction, in the paper's terms.

    Attributes:
        horizon: d, steps of the rollout (paper: 1, 2, 4 or 8; arm length - 2 on Path-Star). The theorem needs no more than 1.
        lambda_next_h: weight of the Smooth L1 between predicted and true state (paper: 1; 2 on Countdown).
        lambda_kl: weight of the KL between the token distributions at both (paper: 1; 0.1 on Manhattan, 0 on A5).
        hidden_size: hidden width of the latent dynamics model; None = the width of its input, E + D (A5 in the paper's table).
        num_layers: linear layers of the latent dynamics model (paper: 3).

    Raises:
        NextLatError: a value outside its range.
    """

    horizon: int = 1
    lambda_next_h: float = 1.0
    lambda_kl: float = 1.0
    hidden_size: int | None = None
    num_layers: int = 3

    def __post_init__(self) -> None:
        for name, least in {"horizon": 1, "lambda_next_h": 0, "lambda_kl": 0, "hidden_size": 1, "num_layers": 1}.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise NextLatError(f"NextLatConfig.{name} is {value}: it must be at least {least}.")


class LatentDynamics(nn.Module):
    """p_psi:  h_hat_{t+1} = h_t + f( LayerNorm( [ E(x_{t+1}) ; h_t ] ) )

    f is `num_layers` linear layers with GELU between; no biases, like the paper's backbone (its count of 2.62 M
    parameters on A5 is met without them). The residual adds the un-normalised state. No attention, no cache.
    """

    def __init__(self, width: int, embedding_width: int, hidden_size: int | None = None, num_layers: int = 3) -> None:
        super().__init__()
        hidden = hidden_size or embedding_width + width
        sizes = [embedding_width + width, *[hidden] * (num_layers - 1), width]
        self.norm = nn.LayerNorm(sizes[0])
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out, bias=False), nn.GELU()]
        self.f = nn.Sequential(*layers[:-1])
        for layer in self.f:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)  # as the backbone: weights ~ N(0, 0.02)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """(..., D) states and (..., E) embeddings of the tokens read in them -> (..., D) predicted next states."""
        x = torch.cat([e.to(h.dtype), h], dim=-1)
        return h + self.f(self.norm(x.to(self.norm.weight.dtype))).to(h.dtype)


class NextLat(NextToken):
    """L = L_next_token + lambda_next_h * L_next_h + lambda_KL * L_KL"""

    name: ClassVar[str] = "nextlat"
    max_draft_length = None  # p_psi is recurrent: it drafts any number of tokens, whatever d it was trained with

    def __init__(self, config: NextLatConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.config: NextLatConfig = config
        self.dynamics = LatentDynamics(backbone.width, backbone.embedding_width, config.hidden_size, config.num_layers)

    def counts(self, batch: Batch) -> Tensor:
        """(1 + 2 d,): scored positions; states reached at each step; of those, the ones with a next-token loss of their own."""
        steps = list(batch.rollout(self.horizon))
        sizes = [len(step.state) for step in steps] + [len(step.scored) for step in steps]
        rest = torch.tensor(sizes, dtype=torch.float32, device=batch.input_ids.device)
        return torch.cat([super().counts(batch), rest])

    def loss(self, batch: Batch, counts: Tensor | None = None) -> Losses:
        d = self.horizon
        counts = self.counts(batch) if counts is None else counts
        h_ND = self.backbone.hidden(batch).flatten(0, 1)
        e_NE = self.backbone.embed(batch.input_ids).flatten(0, 1)
        target_ND = h_ND.detach()  # sg[h]: the states are pulled towards nothing, only what predicts them moves

        # The rollout: h_hat_t = h_t (not detached), then h_hat_{t+i} = p_psi(h_hat_{t+i-1}, x_{t+i}) on its own predictions.
        # The running state is kept in fp32 under mixed precision: rounding would be of the size of the error being learned.
        h_hat = h_ND.to(torch.promote_types(h_ND.dtype, torch.float32))
        next_h, kl = [], []
        for step in batch.rollout(d):
            h_hat = torch.index_select(h_hat, 0, step.kept)
            h_hat = self.dynamics(h_hat, torch.index_select(e_NE, 0, step.state))
            next_h.append(smooth_l1(h_hat, target_ND[step.state]))
            if self.config.lambda_kl > 0:
                predicted, true = torch.index_select(h_hat, 0, step.scored), target_ND[step.state[step.scored]]
                kl.append(same_head_kl(self.backbone.frozen_head, predicted, true))

        terms = {
            "next_token": self.next_token_term(h_ND, batch, counts[:1]),
            "next_h": Term(torch.stack(next_h), counts[1 : 1 + d], self.config.lambda_next_h),
        }
        if kl:
            terms["kl"] = Term(torch.stack(kl), counts[1 + d :], self.config.lambda_kl)
        return Losses(terms)

    def draft(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        state = self.dynamics(state, self.backbone.embed(token))
        return state, self.backbone.head(state)
