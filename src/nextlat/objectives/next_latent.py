"""NextLat: next-latent prediction (Teoh et al., arXiv 2511.05963).

    h_hat_t  = h_t,    h_hat_{t+i} = p_psi( h_hat_{t+i-1}, x_{t+i} )            for i = 1..d
    L_next_h = mean_t 1/d sum_i SmoothL1( h_hat_{t+i}, sg[h_{t+i}] )
    L_KL     = mean_t 1/d sum_i KL( softmax(sg[W h_{t+i}]) || softmax(sg[W] h_hat_{t+i}) )
    L        = L_next_token + lambda_next_h * L_next_h + lambda_KL * L_KL

Shapes: B rows, T tokens, N = B*T positions, D width, E embedding width, V vocabulary, d horizon.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from nextlat.backbone import Backbone, evaluation_mode
from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.head import HeadRows, is_frozen
from nextlat.losses import (
    Counts,
    Losses,
    Term,
    cross_entropy,
    kl_divergence,
    mse,
    rollout_kl,
    row_chunks,
    smooth_l1,
)
from nextlat.objectives.flops import FORWARD, TRAINING, head_weights, weights
from nextlat.objectives.latent_dynamics import GRUDynamics, LatentDynamics
from nextlat.objectives.next_token import NextToken
from nextlat.validation import Count, CountOrZero, NotNegative, Settings

ASKED = 1024  # positions of a batch at which acceptance is measured
NEXT_H_LOSSES = {"smooth_l1": smooth_l1, "mse": mse}


DraftVocabulary = Count | Annotated[tuple[CountOrZero, ...], Field(min_length=1)]


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
        draft_vocabulary: variant of ours, off by default: drafts are drawn from so many tokens
            alone, or from these, and L_KL compares the distributions over them. A draft step then
            reads so many rows of the head; the output stays that of the LM. A number stands for the
            most frequent tokens of the training text in a recipe, for the first ones in `attach`.
            Any number of tokens or list of them that is not below the model's vocabulary is
            refused.
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
    draft_vocabulary: DraftVocabulary | None = None
    separate_norms: bool = False
    zero_init: bool = False

    @model_validator(mode="after")
    def _no_setting_is_without_meaning(self) -> Self:
        if self.kl_loss != "kl" and not self.stop_gradient_teacher:
            raise ValueError(
                f"stop_gradient_teacher is False, but kl_loss '{self.kl_loss}' has no teacher: "
                "leave it out"
            )
        whole = self.kl_loss == "kl" and self.stop_gradient_teacher and self.stop_gradient_head
        if self.draft_vocabulary is not None and not whole:
            raise ValueError(
                "draft_vocabulary has no meaning with an ablation of L_KL: leave it out"
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
    draft_ids: Tensor
    """(n,) tokens that drafts are drawn from, in ascending order; empty = all of the vocabulary."""

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
        self._draft_rows: HeadRows | None = None
        given = config.draft_vocabulary
        if given is None:
            self.register_buffer("draft_ids", torch.empty(0, dtype=torch.long), persistent=False)
            return
        number = given if isinstance(given, int) else len(given)
        self.config = config.model_copy(update={"draft_vocabulary": number})
        self.register_buffer("draft_ids", torch.arange(number))
        self.set_draft_vocabulary(range(number) if isinstance(given, int) else given)

    def set_draft_vocabulary(self, ids: Iterable[int]) -> None:
        """Draw drafts from these tokens, as many as `config.draft_vocabulary` says.

        Raises:
            NextLatError: another number of them, one twice, or one that the model does not know.
        """
        ids, number = sorted(ids), self.config.draft_vocabulary
        if len(ids) != number:
            raise NextLatError(
                f"{len(ids)} tokens are given, and draft_vocabulary is {number}: give as many."
            )
        self.draft_ids.copy_(torch.tensor(ids))
        self.check_vocabulary()

    def check_vocabulary(self) -> None:
        ids, known = self.draft_ids.tolist(), self.backbone.vocab_size
        unknown = [token for token in ids if not 0 <= token < known]
        if unknown or len({*ids}) < len(ids):
            told = (
                f"token {unknown[0]}, and the model knows {known}" if unknown else "a token twice"
            )
            raise NextLatError(
                f"the draft vocabulary holds {told}: it is a draft vocabulary of another tokenizer."
            )

    def draft_head(self, *, wide: bool = False) -> HeadRows | None:
        """The head's rows of the draft vocabulary as they are now; None without one."""
        if not len(self.draft_ids):
            return None
        return HeadRows(self.backbone.frozen_head, self.draft_ids, wide=wide)

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
        # A frozen LM is what it is in use: without dropout.
        with evaluation_mode(self.backbone.lm) if self.alone else nullcontext():
            h_ND = self.backbone.hidden(batch).flatten(0, 1)
        e_NE = self.backbone.embed(batch.input_ids).flatten(0, 1)
        target_ND = h_ND.detach() if config.stop_gradient_target else h_ND  # sg[h]

        # The start is not detached, and the running state stays in fp32 under mixed precision:
        # rounding would be as large as the error being learned.
        h_hat = h_ND.to(torch.promote_types(h_ND.dtype, torch.float32))
        next_h, predicted = [], []
        for step in batch.rollout(self.horizon):
            h_hat, e = h_hat.index_select(0, step.kept), e_NE.index_select(0, step.state)
            h_hat = self.dynamics(h_hat, e)
            h = target_ND.index_select(0, step.state)
            next_h.append(NEXT_H_LOSSES[config.next_h_loss](h_hat, h))
            if config.lambda_kl > 0:
                predicted.append((h_hat.index_select(0, step.scored), step.state[step.scored]))

        ramp, token_loss = self._ramp(), config.kl_loss
        terms = {} if self.alone else {"next_token": self.next_token_term(h_ND, batch, counts)}
        weight = ramp * config.lambda_next_h
        terms["next_h"] = Term(torch.stack(next_h), counts["next_h"], weight)
        if predicted:
            sums, weight = self._token_losses(predicted, h_ND, batch), ramp * config.lambda_kl
            terms[token_loss] = Term(sums, counts[token_loss], weight)
        return Losses(terms)

    @property
    def alone(self) -> bool:
        """Whether the dynamics learn beside a frozen LM, whose own loss teaches nothing then."""
        return is_frozen(self.backbone.lm) and not is_frozen(self)

    def _token_losses(
        self, predicted: Sequence[tuple[Tensor, Tensor]], h_ND: Tensor, batch: Batch
    ) -> Tensor:
        """(d,) sums over predicted states (K, D), which stand for those at positions (K,): L_KL, or
        an ablation of it."""
        config, backbone = self.config, self.backbone
        student = backbone.frozen_head if config.stop_gradient_head else backbone.head
        if config.kl_loss == "cross_entropy":
            losses = [cross_entropy(student, h_hat, batch.targets[at]) for h_hat, at in predicted]
        elif config.stop_gradient_teacher and config.stop_gradient_head:
            return rollout_kl(self.draft_head(wide=True) or student, predicted, h_ND)
        else:
            moves = not config.stop_gradient_teacher
            teacher, h_ND = (
                (backbone.head, h_ND) if moves else (backbone.frozen_head, h_ND.detach())
            )
            losses = [
                kl_divergence(teacher, student, h_ND.index_select(0, at), h_hat)
                for h_hat, at in predicted
            ]
        return torch.stack(losses)

    def _ramp(self) -> float:
        """What both lambdas are multiplied by at the optimiser step under way: step n of the
        warm-up has n / warmup_steps of them."""
        if not (self.training and self.step and self.config.warmup_steps):
            return 1.0
        return min(1.0, self.step / self.config.warmup_steps)

    def acceptance(self, batch: Batch) -> Tensor | None:
        """Of `ASKED` positions at most; asked where the dynamics learn alone."""
        if not self.alone:
            return None
        counts, W = self.draft_ids.new_zeros(2, self.horizon), self.backbone.head
        with evaluation_mode(self, self.backbone.lm):
            h_ND = self.backbone.hidden(batch).flatten(0, 1)
            choices, known = torch.full_like(batch.targets, -1), self.draft_head() or W
            first = batch.rollout(1)[0]
            asked = first.state[first.scored][:ASKED]
            for chunk in asked.split(row_chunks(len(asked), h_ND.device)):
                choices[chunk] = W(h_ND[chunk]).argmax(dim=-1)
            e_NE, h_hat = self.backbone.embed(batch.input_ids).flatten(0, 1), h_ND
            for i, step in enumerate(batch.rollout(self.horizon)):
                h_hat = self.dynamics(h_hat.index_select(0, step.kept), e_NE[step.state])
                at = step.scored[choices[step.state[step.scored]] >= 0]
                for chunk in at.split(row_chunks(len(at), h_ND.device)):
                    drafted = known(h_hat[chunk]).argmax(dim=-1)
                    if len(self.draft_ids):
                        drafted = self.draft_ids[drafted]
                    counts[0, i] += (drafted == choices[step.state[chunk]]).sum()
                    counts[1, i] += len(chunk)
        return counts

    def flops(self, batch: Batch) -> dict[str, float]:
        config, counts = self.config, self.counts(batch)
        states, scored = int(counts["next_h"].sum()), counts[config.kl_loss].tolist()
        # Products with W at one predicted state: forward, gradient to h_hat, and to W where W
        # moves. In the paper's form the teacher's comes once for all steps that reach a state, all
        # of which the first one reaches.
        student = 2 if config.stop_gradient_head else 3
        teacher, plain = 0 if config.kl_loss != "kl" else 1, config.stop_gradient_teacher
        teacher *= (
            scored[0] if plain and config.stop_gradient_head else sum(scored) * (1 if plain else 3)
        )
        products = student * sum(scored) + teacher if config.lambda_kl else 0
        rows = self.backbone.width * len(self.draft_ids) or head_weights(self.backbone)
        head = {} if self.alone else super().flops(batch)
        return head | {
            "dynamics": TRAINING * weights(self.dynamics) * states,
            "kl": FORWARD * products * rows,
        }

    def prepare_drafts(self) -> None:
        self._draft_rows = self.draft_head()

    def draft(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        state = self.dynamics(state, self.backbone.embed(token))
        if not len(self.draft_ids):
            return state, self.backbone.head(state)
        rows = self._draft_rows or self.draft_head()
        assert rows is not None
        some, shape = rows(state), (*state.shape[:-1], self.backbone.vocab_size)
        logits = some.new_full(shape, -torch.inf)  # never drawn
        return state, logits.index_copy(-1, self.draft_ids, some)
