"""JTP: joint multi-token prediction (Ahn, Lamb & Langford, arXiv 2503.21801; in our words: spec
METHOD section 4).

Shapes: B rows, T tokens, N = B*T positions, D width, V vocabulary, d horizon, H heads, W <= d + 1
    vectors of a window.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nextlat.backbone import Backbone
from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.losses import Losses, Term, cross_entropy
from nextlat.objectives.flops import TRAINING
from nextlat.objectives.tokens_ahead import TokensAhead, TokensAheadConfig


@dataclass(frozen=True)
class JTPConfig(TokensAheadConfig):
    """Settings of joint multi-token prediction.

    Attributes:
        horizon: d, tokens beyond the next that Fetch predicts, each given the true ones before it
            (compared in arXiv 2511.05963: 1, 2, 4 and 8).
        lambda_mtp: weight of their mean loss, above 0 (there swept over 0.1..1.0 on small tasks, 1
            on FineWeb-Edu).

    Raises:
        NextLatError: a value outside its range.
    """


class Fetch(nn.Module):
    """One causal self-attention layer over the window combine(h_t, E(x_t)), combine(h_t,
    E(x_{t+1})), ...

    min(4, heads of the LM) heads, a learned bias per head and distance (0..d), no biases in the
    projections and no residual but the skip from h_t, which `states` adds.
    """

    def __init__(self, width: int, heads: int, horizon: int) -> None:
        super().__init__()
        self.heads = heads
        self.gamma = nn.Parameter(torch.tensor(0.1))
        self.combine_norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.output = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.bias_HW = nn.Parameter(torch.zeros(heads, horizon + 1))
        self.norm = nn.LayerNorm(width)
        for linear in (self.query, self.key, self.value, self.output):
            nn.init.normal_(linear.weight, std=0.02)  # as the backbone: weights ~ N(0, 0.02)

    def combine(self, h: Tensor, e: Tensor) -> Tensor:
        """LayerNorm(e + gamma * h): (..., D), (..., D) -> (..., D)"""
        dtype = self.gamma.dtype
        return self.combine_norm(e.to(dtype) + self.gamma * h.to(dtype))

    def attend(self, window_NWD: Tensor, filled_N: Tensor | None = None) -> Tensor:
        """(N, W, D) -> (N, W, D); with `filled_N`, only so many vectors at the end of each window
        are there."""
        N, W, D = window_NWD.shape
        place = torch.arange(W, device=window_NWD.device)
        distance_WW = place[:, None] - place
        mask_HWW = self.bias_HW[:, distance_WW.clamp(min=0)]
        hidden = distance_WW < 0
        if filled_N is not None:
            hidden = hidden | (place < W - filled_N[:, None, None, None])
        q, k, v = (
            f(window_NWD).view(N, W, self.heads, -1).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        # Written out: windows are tiny and many, which fused kernels are not made for.
        scores = (q @ k.transpose(-1, -2)) / (D // self.heads) ** 0.5 + mask_HWW
        share = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1).to(v.dtype)
        return self.output((share @ v).transpose(1, 2).reshape(N, W, D))

    def states(self, h_ND: Tensor, e_NWD: Tensor) -> Tensor:
        """(N, D) states h_t and (N, W, D) embeddings of x_t, x_{t+1}, ... -> (N, W, D), of which
        the head makes the predictions."""
        out_NWD = self.attend(self.combine(h_ND[:, None], e_NWD))
        skip_NWD = h_ND[:, None].expand_as(out_NWD).clone()
        skip_NWD[:, 0] = 0  # the next token itself is predicted without the skip
        return self.norm(out_NWD + skip_NWD)


class JTP(TokensAhead):
    """L = CE_0 + lambda_MTP * mean(CE_1..CE_d),   CE_i = mean_t CE(W Fetch_i(h_t, x_t..x_{t+i}),
    x_{t+1+i})"""

    name: ClassVar[str] = "jtp"
    needed_at_inference: ClassVar[bool] = True  # the next token, too, is predicted through Fetch

    def __init__(self, config: JTPConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.config: JTPConfig = config
        heads = min(4, backbone.attention_heads)
        if backbone.width != backbone.embedding_width or backbone.width % heads:
            raise NextLatError(
                f"joint multi-token prediction adds states of width {backbone.width} to embeddings of width "
                f"{backbone.embedding_width} and splits them over {heads} heads: not possible with this model."
            )
        self.fetch = Fetch(backbone.width, heads, config.horizon)
        self.max_draft_length = config.horizon

    def loss(self, batch: Batch, counts: Tensor | None = None) -> Losses:
        d = self.horizon
        counts = self.counts(batch) if counts is None else counts
        h_ND = self.backbone.hidden(batch).flatten(0, 1)
        e_ND = self.backbone.embed(batch.input_ids).flatten(0, 1)
        # Windows run on into the next document or row; the outputs that would see it have no target
        # there, and are causal.
        e_NWD = F.pad(e_ND, (0, 0, 0, d)).unfold(0, d + 1, 1).transpose(1, 2)
        states_NWD = self.fetch.states(h_ND, e_NWD)
        sums = []
        for i, (at, targets) in enumerate(batch.ahead(d), start=1):
            states = torch.index_select(states_NWD[:, i], 0, at)
            sums.append(
                cross_entropy(self.backbone.head, states, targets) if len(at) else states.sum() * 0
            )
        return Losses(
            {
                "next_token": self.next_token_term(states_NWD[:, 0], batch, counts[:1]),
                "multi_token": Term(torch.stack(sums), counts[1:], self.config.lambda_mtp),
            }
        )

    def flops(self, batch: Batch) -> dict[str, float]:
        N, W, D = batch.input_ids.numel(), self.horizon + 1, self.backbone.width
        projections, attention = 4 * D * D * N * W, 2 * W * W * D * N
        return super().flops(batch) | {"fetch": TRAINING * (projections + attention)}

    def output_states(self, h: Tensor, input_ids: Tensor) -> Tensor:
        """Fetch's output 0 at every position, from h_t and E(x_t)."""
        e = self.backbone.embed(input_ids)
        return self.fetch.states(h.flatten(0, 1), e.flatten(0, 1)[:, None]).view(h.shape)

    # ---- drafting: token by token through Fetch; the window so far is the state, in a tensor of fixed width ----

    def drafting_states(self, h: Tensor, input_ids: Tensor) -> Tensor:
        """(B, T, S) with S = D + 1 + (d + 1) D: h_t; how many vectors the window has; and the
        vectors, the newest one last."""
        window = h.new_zeros(*h.shape[:2], self.horizon * h.shape[-1])
        newest = self.fetch.combine(h, self.backbone.embed(input_ids)).to(h.dtype)
        return torch.cat([h, torch.ones_like(h[..., :1]), window, newest], dim=-1)

    def draft(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        D = self.backbone.width
        h_BD, filled_B, window_BS = state[:, :D], state[:, D] + 1, state[:, D + 1 :]
        newest = self.fetch.combine(h_BD, self.backbone.embed(token)).to(state.dtype)
        window_BS = torch.cat([window_BS[:, D:], newest], dim=-1)
        out_BWD = self.fetch.attend(
            window_BS.view(len(state), -1, D).to(self.fetch.gamma.dtype), filled_B
        )
        logits = self.backbone.head(self.fetch.norm(out_BWD[:, -1] + h_BD))
        return torch.cat([h_BD, filled_B[:, None], window_BS], dim=-1), logits
