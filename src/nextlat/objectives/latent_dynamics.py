"""Latent dynamics models p_psi: the state after reading one more token, from the state before it
and the token's embedding.

No attention, no cache: everything about the past is in the state.

Shapes: D width of the state, E width of the embedding.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INIT_STD = 0.02  # as in the backbone: weights ~ N(0, 0.02)


class LatentDynamics(nn.Module):
    """p_psi:  h_hat_{t+1} = h_t + f( LayerNorm( [ E(x_{t+1}) ; h_t ] ) )

    f is `num_layers` linear layers with GELU between; no biases, like the paper's backbone (its
    count of 2.62 M parameters on A5 is met without them). The residual adds the un-normalised
    state.

    Args:
        width: D.
        embedding_width: E.
        hidden_size: of f; None = E + D.
        num_layers: of f.
        separate_norms: [ LayerNorm(E(x_{t+1})) ; LayerNorm(h_t) ] instead, so that neither drowns
            the other.
        zero_init: the last layer of f starts at zero, so that p_psi starts as the identity on h_t.
    """

    def __init__(
        self,
        width: int,
        embedding_width: int,
        hidden_size: int | None = None,
        num_layers: int = 3,
        *,
        separate_norms: bool = False,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        hidden = hidden_size or embedding_width + width
        sizes = [embedding_width + width, *[hidden] * (num_layers - 1), width]
        self.separate_norms = separate_norms
        if separate_norms:
            self.norm_e, self.norm_h = nn.LayerNorm(embedding_width), nn.LayerNorm(width)
        else:
            self.norm = nn.LayerNorm(sizes[0])
        linear = [nn.Linear(fan_in, fan_out, bias=False) for fan_in, fan_out in pairwise(sizes)]
        for layer in linear:
            nn.init.normal_(layer.weight, std=INIT_STD)
        if zero_init:
            nn.init.zeros_(linear[-1].weight)
        self.f = nn.Sequential(*(x for layer in linear for x in (layer, nn.GELU())))[:-1]

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """(..., D) states and (..., E) embeddings of the tokens read in them -> (..., D) predicted
        next states."""
        if self.separate_norms:
            dtype = self.norm_h.weight.dtype
            x = torch.cat([self.norm_e(e.to(dtype)), self.norm_h(h.to(dtype))], dim=-1)
        else:
            x = torch.cat([e.to(h.dtype), h], dim=-1)
            x = self.norm(x.to(self.norm.weight.dtype))
        return h + self.f(x).to(h.dtype)


class GRUDynamics(nn.Module):
    """p_psi as one GRU cell of width D that reads E(x_{t+1}); its only residual is the update gate.

        r, z = sigmoid( W_r e + U_r h + b ),  sigmoid( W_z e + U_z h + b )
        n = tanh( W_n e + b + r * (U_n h + b') )          h_hat = (1 - z) * n + z * h

    The equations, names and order of the gates are those of `torch.nn.GRUCell`, whose weights fit.
    They are written out because that cell would round the running state to half precision under
    autocast.

    Args:
        width: D.
        embedding_width: E.
    """

    def __init__(self, width: int, embedding_width: int) -> None:
        super().__init__()
        self.weight_ih = nn.Parameter(torch.randn(3 * width, embedding_width) * INIT_STD)
        self.weight_hh = nn.Parameter(torch.randn(3 * width, width) * INIT_STD)
        self.bias_ih, self.bias_hh = (nn.Parameter(torch.zeros(3 * width)) for _ in range(2))

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """As that of `LatentDynamics`."""

        def gates(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
            return F.linear(x.to(weight.dtype), weight, bias).to(h.dtype).chunk(3, dim=-1)

        r_e, z_e, n_e = gates(e, self.weight_ih, self.bias_ih)
        r_h, z_h, n_h = gates(h, self.weight_hh, self.bias_hh)
        r, z = torch.sigmoid(r_e + r_h), torch.sigmoid(z_e + z_h)
        return torch.lerp(torch.tanh(n_e + r * n_h), h, z)
