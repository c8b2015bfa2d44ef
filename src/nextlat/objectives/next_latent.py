"""NextLat: next-latent prediction (Teoh et al., arXiv 2511.05963; in our words: spec METHOD section
1).

Shapes: B rows, T tokens, N = B*T positions, D width, E embedding width, V vocabulary, d horizon.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nextlat.backbone import Backbone
from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.losses import Losses, Term, cross_entropy, kl_divergence, mse, same_head_kl, smooth_l1
from nextlat.objectives.flops import FORWARD, TRAINING, head_weights, weights
from nextlat.objectives.latent_dynamics import GRUDynamics, LatentDynamics
from nextlat.objectives.next_token import NextToken

NEXT_H_LOSSES = {"smooth_l1": smooth_l1, "mse": mse}
CHOICES = {
    "next_h_loss": (*NEXT_H_LOSSES,),
    "kl_loss": ("kl", "cross_entropy"),
    "dynamics": ("mlp", "gru"),
    **dict.fromkeys(
        [
            "stop_gradient_target",
            "stop_gradient_teacher",
            "stop_gradient_head",
            "separate_norms",
            "zero_init",
        ],
        (True, False),
    ),
}


@dataclass(frozen=True)
class NextLatConfig:
    """Settings of next-latent prediction, in the paper's terms. The defaults are the paper's
    method.

    Attributes:
        horizon: d, steps of the rollout (paper: 1, 2, 4 or 8; arm length - 2 on Path-Star). The
            theorem needs no more than 1.
        lambda_next_h: weight of the Smooth L1 between predicted and true state (paper: 1; 2 on
            Countdown).
        lambda_kl: weight of the KL between the token distributions at both (paper: 1; 0.1 on
            Manhattan, 0 on A5).
        hidden_size: hidden width of the latent dynamics model; None = the width of its input, E + D
            (A5 in the paper's table).
        num_layers: linear layers of the latent dynamics model (paper: 3).

    Ablations, each taking one choice of the paper back:
        next_h_loss: between the states; "mse" is the plain squared difference, without Smooth L1's
            factor of one half.
        kl_loss: between the tokens; "cross_entropy" asks of the predicted state the true next
            token, not the model's distribution.
        stop_gradient_target: sg[h_{t+i}], the true state that the predicted one is compared with.
        stop_gradient_teacher: sg[W h_{t+i}], the distribution at the true state in the KL, both its
            W and its h.
        stop_gradient_head: sg[W], the head through which the predicted state is read.
        dynamics: "gru" is one GRU cell of width D on E(x), see `latent_dynamics`.

    Variants of ours, off by default:
        warmup_steps: both lambdas grow linearly to their values over so many optimiser steps; 0 =
            from the start, as published. Recommended for language, over a third or more of the
            steps: it halves what NextLat costs the next token, and drafts are accepted as often.
            Not for planning: on Path-Star the shortcut is learned while the lambdas are small
            (docs/log.md).
        separate_norms, zero_init: of the latent dynamics model, see
            `latent_dynamics.LatentDynamics`.

    Raises:
        NextLatError: a value outside its range, or settings of which one leaves the other without
            meaning.
    """

    horizon: int = 1
    lambda_next_h: float = 1.0
    lambda_kl: float = 1.0
    hidden_size: int | None = None
    num_layers: int = 3
    next_h_loss: Literal["smooth_l1", "mse"] = "smooth_l1"
    kl_loss: Literal["kl", "cross_entropy"] = "kl"
    stop_gradient_target: bool = True
    stop_gradient_teacher: bool = True
    stop_gradient_head: bool = True
    dynamics: Literal["mlp", "gru"] = "mlp"
    warmup_steps: int = 0
    separate_norms: bool = False
    zero_init: bool = False

    def __post_init__(self) -> None:
        least = {
            "horizon": 1,
            "lambda_next_h": 0,
            "lambda_kl": 0,
            "hidden_size": 1,
            "num_layers": 1,
            "warmup_steps": 0,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise NextLatError(f"NextLatConfig.{name} is {value}: it must be at least {bound}.")
        for name, valid in CHOICES.items():
            value = getattr(self, name)
            if value not in valid:
                raise NextLatError(
                    f"NextLatConfig.{name} is {value!r}: it must be one of {', '.join(map(repr, valid))}."
                )
        if self.kl_loss != "kl" and not self.stop_gradient_teacher:
            raise NextLatError(
                f"NextLatConfig.stop_gradient_teacher is False, but kl_loss '{self.kl_loss}' has no teacher: leave it out."
            )
        of_mlp = {"hidden_size": None, "num_layers": 3, "separate_norms": False, "zero_init": False}
        idle = [name for name, default in of_mlp.items() if getattr(self, name) != default]
        if self.dynamics == "gru" and idle:
            raise NextLatError(
                f"NextLatConfig.{idle[0]} has no meaning with dynamics 'gru', one cell of width D: leave it out."
            )


class NextLat(NextToken):
    """L = L_next_token + lambda_next_h * L_next_h + lambda_KL * L_KL"""

    name: ClassVar[str] = "nextlat"
    max_draft_length = (
        None  # p_psi is recurrent: it drafts any number of tokens, whatever d it was trained with
    )

    def __init__(self, config: NextLatConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.config: NextLatConfig = config
        self.dynamics = (
            GRUDynamics(backbone.width, backbone.embedding_width)
            if config.dynamics == "gru"
            else LatentDynamics(
                backbone.width,
                backbone.embedding_width,
                config.hidden_size,
                config.num_layers,
                separate_norms=config.separate_norms,
                zero_init=config.zero_init,
            )
        )

    def counts(self, batch: Batch) -> Tensor:
        """(1 + 2 d,): scored positions; states reached at each step; of those, the ones with a
        next-token loss of their own."""
        steps = list(batch.rollout(self.horizon))
        sizes = [len(step.state) for step in steps] + [len(step.scored) for step in steps]
        rest = torch.tensor(sizes, dtype=torch.float32, device=batch.input_ids.device)
        return torch.cat([super().counts(batch), rest])

    def loss(self, batch: Batch, counts: Tensor | None = None) -> Losses:
        config, d = self.config, self.horizon
        counts = self.counts(batch) if counts is None else counts
        h_ND = self.backbone.hidden(batch).flatten(0, 1)
        e_NE = self.backbone.embed(batch.input_ids).flatten(0, 1)
        # sg[h]: the states are pulled towards nothing, only what predicts them moves
        target_ND = h_ND.detach() if config.stop_gradient_target else h_ND

        # The rollout: h_hat_t = h_t (not detached), then h_hat_{t+i} = p_psi(h_hat_{t+i-1},
        # x_{t+i}) on its own predictions. The running state is kept in fp32 under mixed precision:
        # rounding would be of the size of the error being learned.
        h_hat = h_ND.to(torch.promote_types(h_ND.dtype, torch.float32))
        next_h, kl = [], []
        for step in batch.rollout(d):
            h_hat = torch.index_select(h_hat, 0, step.kept)
            h_hat = self.dynamics(h_hat, torch.index_select(e_NE, 0, step.state))
            next_h.append(
                NEXT_H_LOSSES[config.next_h_loss](
                    h_hat, torch.index_select(target_ND, 0, step.state)
                )
            )
            if config.lambda_kl > 0:
                kl.append(
                    self.token_loss(
                        torch.index_select(h_hat, 0, step.scored),
                        h_ND,
                        step.state[step.scored],
                        batch,
                    )
                )

        ramp = self.ramp()
        terms = {
            "next_token": self.next_token_term(h_ND, batch, counts[:1]),
            "next_h": Term(torch.stack(next_h), counts[1 : 1 + d], ramp * config.lambda_next_h),
        }
        if kl:
            terms[config.kl_loss] = Term(torch.stack(kl), counts[1 + d :], ramp * config.lambda_kl)
        return Losses(terms)

    def token_loss(self, h_hat: Tensor, h_ND: Tensor, state: Tensor, batch: Batch) -> Tensor:
        """Sum over the predicted states h_hat (K, D) of positions `state` (K,) of what their next
        tokens miss: L_KL, or an ablation."""
        config, backbone = self.config, self.backbone
        student = backbone.frozen_head if config.stop_gradient_head else backbone.head
        if config.kl_loss == "cross_entropy":
            return cross_entropy(student, h_hat, batch.targets()[state])
        h = torch.index_select(h_ND, 0, state)
        if config.stop_gradient_teacher and config.stop_gradient_head:
            return same_head_kl(student, h_hat, h)
        if config.stop_gradient_teacher:
            return kl_divergence(backbone.frozen_head, student, h.detach(), h_hat)
        return kl_divergence(backbone.head, student, h, h_hat)

    def flops(self, batch: Batch) -> dict[str, float]:
        d, config, counts = self.horizon, self.config, self.counts(batch).tolist()
        # Products with W that the token-level loss of one predicted state needs: 3 in the paper's
        # form.
        student = (
            2 if config.stop_gradient_head else 3
        )  # forward, gradient to h_hat, and to W where W moves
        teacher = (
            0 if config.kl_loss == "cross_entropy" else 1 if config.stop_gradient_teacher else 3
        )
        products = student + teacher if config.lambda_kl else 0
        return super().flops(batch) | {
            "dynamics": TRAINING * weights(self.dynamics) * sum(counts[1 : 1 + d]),
            "kl": FORWARD * products * head_weights(self.backbone) * sum(counts[1 + d :]),
        }

    def ramp(self) -> float:
        """What both lambdas are multiplied by at the optimiser step under way: step n of the
        warm-up has n / warmup_steps of them."""
        if not (self.training and self.step and self.config.warmup_steps):
            return 1.0
        return min(1.0, self.step / self.config.warmup_steps)

    def draft(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        state = self.dynamics(state, self.backbone.embed(token))
        return state, self.backbone.head(state)
