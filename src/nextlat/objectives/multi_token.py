"""MTP: multi-token prediction with one head per offset (Gloeckle et al., arXiv 2404.19737).

Shapes: B rows, T tokens, N = B*T positions, D width, V vocabulary, d horizon.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from nextlat.backbone import Backbone
from nextlat.batch import Batch
from nextlat.losses import Counts, Losses, Term, cross_entropy, one_by_one
from nextlat.objectives.flops import TRAINING, attention_flops, head_weights, weights
from nextlat.objectives.last_layer import LastCall, LastLayer
from nextlat.objectives.objective import Objective
from nextlat.validation import Positive, Settings


class MTPConfig(Settings):
    """Settings of multi-token prediction.

    Attributes:
        horizon: d, tokens beyond the next one (compared in arXiv 2511.05963: 1, 2, 4 and 8).
        lambda_mtp: weight of their mean loss (there swept over 0.1..1.0 on small tasks, 1 on
            FineWeb-Edu).

    Raises:
        NextLatError: a value outside its range.
    """

    horizon: Annotated[int, Field(ge=1, le=2**12)] = 1
    lambda_mtp: Positive = 1.0


class TokensAhead(Objective):
    """L = L_0 + lambda_MTP * mean(L_1..L_d)

    d tokens beyond the next are predicted at every position; how L_i predicts x_{t+1+i} is what
    sets MTP and JTP apart.
    """

    parts: ClassVar[Mapping[str, str]] = {"multi_token": "Tokens beyond the next, nats"}

    def counts(self, batch: Batch) -> Counts:
        """Besides `next_token`, positions t with a target x_{t+1+i}, i = 1..d."""
        sizes = [len(at) for at, _ in batch.ahead(self.horizon)]
        return super().counts(batch) | {"multi_token": batch.input_ids.new_tensor(sizes)}

    def flops(self, batch: Batch) -> dict[str, float]:
        targets = sum(int(count.sum()) for count in self.counts(batch).values())
        return {"head": TRAINING * head_weights(self.backbone) * targets}


class ExtraHead(nn.Module):
    """Head i = one decoder layer + final norm; all heads share the output head W of the LM."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, call: LastCall, states: Sequence[Tensor] | None = None) -> Tensor:
        """(B, T, D) states from the trunk of a forward pass, with its masks and its cache."""
        return call.run(self.layer, self.norm, states)


class MTP(TokensAhead):
    """L_i = mean_t CE(W head_i(trunk_t), x_{t+1+i})

    The trunk is the LM without its last layer; head 0 is that layer and the final norm, so that the
    LM stays an ordinary model and the extra heads can be thrown away. They begin as copies of head
    0, trained (in a pretrained LM) or drawn (in one from scratch).
    """

    name = "mtp"
    title = published_as = "MTP"
    tokens_only = "it predicts labels whose inputs it has not read"

    def __init__(self, config: MTPConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.last_layer = LastLayer(backbone)
        copies = self.last_layer.copies(backbone, config.horizon)
        self.heads = nn.ModuleList(ExtraHead(layer, norm) for layer, norm in copies)
        # The heads attend over the whole prefix.
        self.cached_layers = config.horizon
        self.max_draft_length = config.horizon if self.last_layer.caches(backbone, copies) else 0

    def loss(self, batch: Batch, counts: Counts | None = None) -> Losses:
        counts = counts or self.counts(batch)
        with self.last_layer.with_graph():
            h_ND = self.backbone.hidden(batch).flatten(0, 1)
        call = self.last_layer.take()

        # One head at a time, forward and backward, on the detached trunk; then one backward pass
        # through the trunk for all of them.
        divisors = counts["multi_token"].clamp(min=1) * self.horizon
        rows = zip(self.heads, batch.ahead(self.horizon), divisors, strict=True)
        pieces = [
            self._piece(head, call, at, targets, divisor)
            for head, (at, targets), divisor in rows
            if len(at)
        ]
        learning = [*self.heads.parameters(), *self.backbone.head.parameters()]
        extra, _ = one_by_one(pieces, call.states, learning)
        once = torch.ones_like(counts["next_token"])
        return Losses(
            {
                "next_token": self.next_token_term(h_ND, batch, counts),
                "multi_token": Term(extra.view(1), once, self.config.lambda_mtp),
            }
        )

    def _piece(
        self, head: nn.Module, call: LastCall, at: Tensor, targets: Tensor, divisor: Tensor
    ) -> Callable[[Tensor], Tensor]:
        """Head i's share of the mean: L_i / d, as a function of `call.states`."""

        def piece(*states: Tensor) -> Tensor:
            states_MD = head(call, states).flatten(0, 1).index_select(0, at)
            return cross_entropy(self.backbone.head, states_MD, targets).view(1) / divisor

        return piece

    def flops(self, batch: Batch) -> dict[str, float]:
        # A head whose token lies beyond every document is not run.
        heads = int(self.counts(batch)["multi_token"].count_nonzero())
        products = TRAINING * heads * weights(self.heads[0]) * batch.input_ids.numel()
        attention = attention_flops(self.backbone, heads, batch)
        return super().flops(batch) | {"extra heads": products + attention}

    # ---- drafting: all d tokens from the trunk state of t, independently of each other ----

    def drafting_states(self, h: Tensor, input_ids: Tensor) -> Tensor:
        """(B, T, d * D): what heads 1..d give side by side on the trunk of the forward pass that
        gave h."""
        call = self.last_layer.take()
        return torch.cat([head(call) for head in self.heads], dim=-1)

    def draft(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """The next head's logits; which token was drafted before it does not matter."""
        D = self.backbone.width
        return state.roll(-D, dims=-1), self.backbone.head(state[..., :D])
