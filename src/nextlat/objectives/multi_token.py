"""MTP: multi-token prediction with one head per offset (Gloeckle et al., arXiv 2404.19737; in our
words: spec METHOD section 3).

Shapes: B rows, T tokens, N = B*T positions, D width, V vocabulary, d horizon.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from nextlat.backbone import Backbone
from nextlat.batch import Batch
from nextlat.losses import Losses, Term, cross_entropy, one_by_one
from nextlat.objectives.flops import TRAINING, attention_flops, weights
from nextlat.objectives.last_layer import LastCall, LastLayer
from nextlat.objectives.tokens_ahead import TokensAhead, TokensAheadConfig


@dataclass(frozen=True)
class MTPConfig(TokensAheadConfig):
    """Settings of multi-token prediction.

    Attributes:
        horizon: d, extra heads; head i predicts x_{t+1+i} (compared in arXiv 2511.05963: 1, 2, 4
            and 8).
        lambda_mtp: weight of the extra heads' mean loss, above 0 (there swept over 0.1..1.0 on
            small tasks, 1 on FineWeb-Edu).

    Raises:
        NextLatError: a value outside its range.
    """


class ExtraHead(nn.Module):
    """Head i = one decoder layer + final norm; the output head W is shared by all of them and
    belongs to the LM."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, call: LastCall, trunk_BTD: Tensor | None = None) -> Tensor:
        """(B, T, D) states from the trunk of a forward pass, with its masks, positions and cache."""
        return call.run(self.layer, self.norm, trunk_BTD)


class MTP(TokensAhead):
    """L = L_0 + lambda_MTP * mean(L_1..L_d),   L_i = mean_t CE(W head_i(trunk_t), x_{t+1+i})

    The trunk is the LM without its last layer; head 0 is that layer and the final norm, so that the
    LM stays an ordinary model and the extra heads can be thrown away. They begin as copies of head
    0, trained (a pretrained LM) or drawn (one from scratch).
    """

    name: ClassVar[str] = "mtp"

    def __init__(self, config: MTPConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.config: MTPConfig = config
        self.last_layer = LastLayer(backbone)
        copies = self.last_layer.copies(backbone, config.horizon)
        self.heads = nn.ModuleList(ExtraHead(layer, norm) for layer, norm in copies)
        self.max_draft_length = config.horizon if self.last_layer.caches(backbone, copies) else 0

    def loss(self, batch: Batch, counts: Tensor | None = None) -> Losses:
        counts = self.counts(batch) if counts is None else counts
        with self.last_layer.with_graph():
            h_ND = self.backbone.hidden(batch).flatten(0, 1)
        call = self._last_call()

        # One head at a time, forward and backward, on the detached trunk; then one backward through
        # the trunk for all of them.
        pieces = [
            self._piece(head, call, at, targets, counts[i].clamp(min=1) * self.horizon)
            for i, (head, (at, targets)) in enumerate(
                zip(self.heads, batch.ahead(self.horizon), strict=True), start=1
            )
            if len(at)
        ]
        output_head = self.backbone.lm.get_output_embeddings()
        extra, _ = one_by_one(
            pieces, [call.trunk], [*self.heads.parameters(), *output_head.parameters()]
        )
        return Losses(
            {
                "next_token": self.next_token_term(h_ND, batch, counts[:1]),
                "multi_token": Term(
                    extra.view(1), torch.ones_like(counts[:1]), self.config.lambda_mtp
                ),
            }
        )

    def flops(self, batch: Batch) -> dict[str, float]:
        run = int(
            (self.counts(batch)[1:] > 0).sum()
        )  # a head whose token lies beyond every document is not
        products = TRAINING * run * weights(self.heads[0]) * batch.input_ids.numel()
        return super().flops(batch) | {
            "extra heads": products + attention_flops(self.backbone, run, batch)
        }

    def _piece(
        self, head: nn.Module, call: LastCall, at: Tensor, targets: Tensor, divisor: Tensor
    ) -> Callable[[Tensor], Tensor]:
        """Head i's share of the mean: L_i / d, as a function of the trunk."""

        def piece(trunk_BTD: Tensor) -> Tensor:
            states_ND = head(call, trunk_BTD).flatten(0, 1)
            return (
                cross_entropy(
                    self.backbone.head, torch.index_select(states_ND, 0, at), targets
                ).view(1)
                / divisor
            )

        return piece

    def _last_call(self) -> LastCall:
        call = self.last_layer.take()
        assert call is not None, "no forward pass of the transformer came before"
        return call

    # ---- drafting: all d tokens from the trunk state of t, independently of each other ----

    @property
    def cache_config(self) -> PreTrainedConfig:
        """The heads attend over the whole prefix: their keys and values lie behind those of the
        LM's layers, in the same cache."""
        return self.backbone.cache_config(extra_layers=self.horizon)

    def drafting_states(self, h: Tensor, input_ids: Tensor) -> Tensor:
        """(B, T, d * D): what heads 1..d give side by side on the trunk of the forward pass that
        gave h."""
        call = self._last_call()
        return torch.cat([head(call) for head in self.heads], dim=-1)

    def draft(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """The next head's logits; which token was drafted before it does not matter."""
        return state.roll(-self.backbone.width, dims=-1), self.backbone.head(
            state[..., : self.backbone.width]
        )
