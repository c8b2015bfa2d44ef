"""NextLat: next-latent prediction (Teoh et al., arXiv 2511.05963).

    h_hat_t  = h_t,    h_hat_{t+i} = p_psi( h_hat_{t+i-1}, x_{t+i} )            for i = 1..d
    L_next_h = mean_t 1/d sum_i SmoothL1( h_hat_{t+i}, sg[h_{t+i}] )
    L_KL     = mean_t 1/d sum_i KL( softmax(sg[W h_{t+i}]) || softmax(sg[W] h_hat_{t+i}) )
    L        = L_next_token + lambda_next_h * L_next_h + lambda_KL * L_KL

Shapes: B rows, T tokens, N = B*T positions, D width, E embedding width, V vocabulary, d horizon.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from nextlat.backbone import Backbone
from nextlat.batch import Batch
from nextlat.losses import (
    Counts,
    Losses,
    Term,
    cross_entropy,
    kl_divergence,
    mse,
    same_head_kl,
    smooth_l1,
)
from nextlat.objectives.flops import FORWARD, TRAINING, head_weights, weights
from nextlat.objectives.latent_dynamics import GRUDynamics, LatentDynamics
from nextlat.objectives.next_token import NextToken
from nextlat.validation import Count, CountOrZero, NotNegative, Settings

NEXT_H_LOSSES = {"smooth_l1": smooth_l1, "mse": mse}


class NextLatConfig(Settings):
    """Settings of next-latent prediction, in the paper's terms. The defaults are the paper's
    method.

    Attributes:
        horizon: d, steps of the rollout (paper: 1, 2, 4 or 8; arm length - 2 on Path-Star). The
            theorem needs no more than 1.
        lambda_next_h: weight of L_next_h (paper: 1; 2 on Countdown).
        lambda_kl: weight of L_KL (paper: 1; 0.1 on Manhattan, 0 on A5).
        hidden_size: hidden width of the latent dynamics model; None = the width of its input, E + D
            (A5 in the paper's table).
        num_layers: linear layers of the latent dynamics model (paper: 3).
        next_h_loss: ablation, the loss between the states; "mse" is the plain squared difference,
            without Smooth L1's factor of one half.
        kl_loss: ablation, the loss between the tokens; "cross_entropy" asks of the predicted state
            the true next token, not the model's distribution.
        stop_gradient_target: ablation, sg[h_{t+i}], the state that the predicted one is compared
            with.
        stop_gradient_teacher: ablation, sg[W h_{t+i}], the distribution at the true state in L_KL,
            both its W and its h.
        stop_gradient_head: ablation, sg[W], the head through which the predicted state is read.
        dynamics: ablation; "gru" is one GRU cell of width D on E(x), see `latent_dynamics`.
        warmup_steps: variant of ours, off by default. Both lambdas grow linearly to their values
            over so many optimiser steps; 0 = from the start, as published. Recommended for
            language, over a third or more of the steps: it halves what NextLat costs the next
            token, and drafts are accepted as often. Not for planning: on Path-Star the shortcut is
            learned while the lambdas are small (docs/log.md).
        separate_norms: variant of ours, see `latent_dynamics.LatentDynamics`.
        zero_init: variant of ours, see there.

    Raises:
        NextLatError: a value outside its range, or a setting that another leaves without meaning.
    """

    horizon: Count = 1
    lambda_next_h: NotNegative = 1.0
    lambda_kl: NotNegative = 1.0
    hidden_size: Count | None = None
    num_layers: Annotated[int, Field(ge=1, le=2**10)] = 3
    next_h_loss: Literal["smooth_l1", "mse"] = "smooth_l1"
    kl_loss: Literal["kl", "cross_entropy"] = "kl"
    stop_gradient_target: bool = True
    stop_gradient_teacher: bool = True
    stop_gradient_head: bool = True
    dynamics: Literal["mlp", "gru"] = "mlp"
    warmup_steps: CountOrZero = 0
    separate_norms: bool = False
    zero_init: bool = False

    @model_validator(mode="after")
    def _no_setting_is_without_meaning(self) -> Self:
        if self.kl_loss != "kl" and not self.stop_gradient_teacher:
            raise ValueError(
                f"stop_gradient_teacher is False, but kl_loss '{self.kl_loss}' has no teacher: "
                "leave it out"
            )
        of_mlp = ("hidden_size", "num_layers", "separate_norms", "zero_init")
        for name in of_mlp if self.dynamics == "gru" else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} has no meaning with dynamics 'gru', one cell of width D: leave it out"
                )
        return self


class NextLat(NextToken):
    """L = L_next_token + lambda_next_h * L_next_h + lambda_KL * L_KL"""

    name = "nextlat"
    title = published_as = "NextLat"
    parts: ClassVar[Mapping[str, str]] = {
        "next_h": "Next latent state (Smooth L1)",
        "kl": "KL of predicted and true next token",
        "cross_entropy": "Next token at the predicted state, nats",
    }
    # p_psi is recurrent: it drafts any number of tokens, whatever d it was trained with.
    max_draft_length = None

    def __init__(self, config: NextLatConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        D, E = backbone.width, backbone.embedding_width
        if config.dynamics == "gru":
            self.dynamics: GRUDynamics | LatentDynamics = GRUDynamics(D, E)
        else:
            self.dynamics = LatentDynamics(
                D,
                E,
                config.hidden_size,
                config.num_layers,
                separate_norms=config.separate_norms,
                zero_init=config.zero_init,
            )

    def counts(self, batch: Batch) -> Counts:
        """Besides `next_token`: (d,) states reached at each step, and (d,) those of them with a
        next-token loss of their own."""
        steps, tensor = batch.rollout(self.horizon), batch.input_ids.new_tensor
        return super().counts(batch) | {
            "next_h": tensor([len(step.state) for step in steps]),
            self.config.kl_loss: tensor([len(step.scored) for step in steps]),
        }

    def loss(self, batch: Batch, counts: Counts | None = None) -> Losses:
        config, counts = self.config, counts or self.counts(batch)
        h_ND = self.backbone.hidden(batch).flatten(0, 1)
        e_NE = self.backbone.embed(batch.input_ids).flatten(0, 1)
        target_ND = h_ND.detach() if config.stop_gradient_target else h_ND  # sg[h]

        # The start is not detached, and the running state stays in fp32 under mixed precision:
        # rounding would be as large as the error being learned.
        h_hat = h_ND.to(torch.promote_types(h_ND.dtype, torch.float32))
        next_h, kl = [], []
        for step in batch.rollout(self.horizon):
            h_hat, e = h_hat.index_select(0, step.kept), e_NE.index_select(0, step.state)
            h_hat = self.dynamics(h_hat, e)
            h = target_ND.index_select(0, step.state)
            next_h.append(NEXT_H_LOSSES[config.next_h_loss](h_hat, h))
            if config.lambda_kl > 0:
                predicted, state = h_hat.index_select(0, step.scored), step.state[step.scored]
                kl.append(self._token_loss(predicted, h_ND, state, batch))

        ramp, token_loss = self._ramp(), config.kl_loss
        terms = {
            "next_token": self.next_token_term(h_ND, batch, counts),
            "next_h": Term(torch.stack(next_h), counts["next_h"], ramp * config.lambda_next_h),
        }
        if kl:
            weight = ramp * config.lambda_kl
            terms[token_loss] = Term(torch.stack(kl), counts[token_loss], weight)
        return Losses(terms)

    def _token_loss(self, h_hat_KD: Tensor, h_ND: Tensor, state_K: Tensor, batch: Batch) -> Tensor:
        """Sum over K predicted states, which stand for those at positions `state_K`: L_KL, or an
        ablation of it."""
        config, backbone = self.config, self.backbone
        student = backbone.frozen_head if config.stop_gradient_head else backbone.head
        if config.kl_loss == "cross_entropy":
            return cross_entropy(student, h_hat_KD, batch.targets[state_K])
        h_KD = h_ND.index_select(0, state_K)
        if not config.stop_gradient_teacher:
            return kl_divergence(backbone.head, student, h_KD, h_hat_KD)
        if not config.stop_gradient_head:
            return kl_divergence(backbone.frozen_head, student, h_KD.detach(), h_hat_KD)
        return same_head_kl(student, h_hat_KD, h_KD)

    def _ramp(self) -> float:
        """What both lambdas are multiplied by at the optimiser step under way: step n of the
        warm-up has n / warmup_steps of them."""
        if not (self.training and self.step and self.config.warmup_steps):
            return 1.0
        return min(1.0, self.step / self.config.warmup_steps)

    def flops(self, batch: Batch) -> dict[str, float]:
        config, counts = self.config, self.counts(batch)
        # Products with W at one predicted state: forward, gradient to h_hat, and to W where W
        # moves. In the paper's form they are 3.
        student = 2 if config.stop_gradient_head else 3
        teacher = 1 if config.stop_gradient_teacher else 3
        products = student + (teacher if config.kl_loss == "kl" else 0) if config.lambda_kl else 0
        states, scored = int(counts["next_h"].sum()), int(counts[config.kl_loss].sum())
        return super().flops(batch) | {
            "dynamics": TRAINING * weights(self.dynamics) * states,
            "kl": FORWARD * products * head_weights(self.backbone) * scored,
        }

    def draft(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        state = self.dynamics(state, self.backbone.embed(token))
        return state, self.backbone.head(state)
