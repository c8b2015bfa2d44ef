"""JTP: joint multi-token prediction (Ahn, Lamb & Langford, arXiv 2503.21801).

Shapes: B rows, T tokens, N = B*T positions, D width, V vocabulary, d horizon, H heads, W <= d + 1
    vectors of a window.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nextlat.backbone import Backbone
from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.losses import Counts, Losses, Term, cross_entropy
from nextlat.objectives.flops import TRAINING
from nextlat.objectives.latent_dynamics import INIT_STD
from nextlat.objectives.multi_token import MTPConfig, TokensAhead


class JTPConfig(MTPConfig):
    """Settings of joint multi-token prediction, with the meanings that they have for MTP."""


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
            nn.init.normal_(linear.weight, std=INIT_STD)

    def combine(self, h: Tensor, e: Tensor) -> Tensor:
        """LayerNorm(e + gamma * h): (..., D), (..., D) -> (..., D)"""
        dtype = self.gamma.dtype
        return self.combine_norm(e.to(dtype) + self.gamma * h.to(dtype))

    def attend(self, window_NWD: Tensor, filled_N: Tensor | None = None) -> Tensor:
        """(N, W, D) -> (N, W, D); with `filled_N`, a window has only so many vectors, its last."""
        N, W, D = window_NWD.shape
        index = torch.arange(W, device=window_NWD.device)
        distance_WW = index[:, None] - index
        bias_HWW = self.bias_HW[:, distance_WW.clamp(min=0)]
        masked = distance_WW < 0
        if filled_N is not None:
            masked = masked | (index < W - filled_N[:, None, None, None])
        q, k, v = (
            f(window_NWD).view(N, W, self.heads, -1).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        # Written out: windows are tiny and many, which fused kernels are not made for.
        scores = (q @ k.transpose(-1, -2)) / (D // self.heads) ** 0.5 + bias_HWW
        scores = scores.masked_fill(masked, torch.finfo(scores.dtype).min)
        values = scores.softmax(-1).to(v.dtype) @ v
        return self.output(values.transpose(1, 2).reshape(N, W, D))

    def states(self, h_ND: Tensor, e_NWD: Tensor) -> Tensor:
        """(N, D) states h_t and (N, W, D) embeddings of x_t, x_{t+1}, ... -> (N, W, D), which the
        head reads."""
        out_NWD = self.attend(self.combine(h_ND[:, None], e_NWD))
        skip_NWD = h_ND[:, None].expand_as(out_NWD).clone()
        skip_NWD[:, 0] = 0  # the next token itself is predicted without the skip
        return self.norm(out_NWD + skip_NWD)


class JTP(TokensAhead):
    """L_i = mean_t CE(W Fetch_i(h_t, x_t..x_{t+i}), x_{t+1+i})"""

    name = "jtp"
    title = published_as = "JTP"
    needed_at_inference = True  # the next token, too, is predicted through Fetch

    def __init__(self, config: JTPConfig, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        D, E, heads = backbone.width, backbone.embedding_width, min(4, backbone.attention_heads)
        if D != E or D % heads:
            raise NextLatError(
                f"joint multi-token prediction adds states of width {D} to embeddings of width {E} "
                f"and splits them over {heads} heads: not possible with this model."
            )
        self.fetch = Fetch(D, heads, config.horizon)
        self.max_draft_length = config.horizon

    def loss(self, batch: Batch, counts: Counts | None = None) -> Losses:
        counts, d = counts or self.counts(batch), self.horizon
        h_ND = self.backbone.hidden(batch).flatten(0, 1)
        e_ND = self.backbone.embed(batch.input_ids).flatten(0, 1)
        # Windows run on into the next document or row; the outputs that would see it have no target
        # there, and are causal.
        e_NWD = F.pad(e_ND, (0, 0, 0, d)).unfold(0, d + 1, 1).transpose(1, 2)
        states_NWD = self.fetch.states(h_ND, e_NWD)
        sums = []
        for i, (at, targets) in enumerate(batch.ahead(d), start=1):
            states = states_NWD[:, i].index_select(0, at)
            some = len(at) > 0
            sums.append(
                cross_entropy(self.backbone.head, states, targets) if some else states.sum() * 0
            )
        weight = self.config.lambda_mtp
        return Losses(
            {
                "next_token": self.next_token_term(states_NWD[:, 0], batch, counts),
                "multi_token": Term(torch.stack(sums), counts["multi_token"], weight),
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

    # ---- drafting: token by token through Fetch; its window so far is part of the state ----

    def drafting_states(self, h: Tensor, input_ids: Tensor) -> Tensor:
        """(B, T, S) with S = D + 1 + (d + 1) D: h_t; the number of vectors in the window; the
        vectors, the newest one last, after room for the others."""
        room = h.new_zeros(*h.shape[:2], self.horizon * h.shape[-1])
        newest = self.fetch.combine(h, self.backbone.embed(input_ids)).to(h.dtype)
        return torch.cat([h, torch.ones_like(h[..., :1]), room, newest], dim=-1)

    def draft(self, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        D = self.backbone.width
        h_BD, filled_B, window_BS = state[:, :D], state[:, D] + 1, state[:, D + 1 :]
        newest = self.fetch.combine(h_BD, self.backbone.embed(token)).to(state.dtype)
        window_BS = torch.cat([window_BS[:, D:], newest], dim=-1)
        window_BWD = window_BS.unflatten(-1, (-1, D)).to(self.fetch.gamma.dtype)
        out_BD = self.fetch.attend(window_BWD, filled_B)[:, -1]
        logits = self.backbone.head(self.fetch.norm(out_BD + h_BD))
        return torch.cat([h_BD, filled_B[:, None], window_BS], dim=-1), logits
