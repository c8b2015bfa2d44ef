"""The latent dynamics model as a drafter of vLLM: a plugin that `vllm serve` finds by itself.

    vllm serve RUN --speculative-config \
        '{"method": "eagle", "model": "RUN/nextlat", "num_speculative_tokens": 4}'

vLLM's method "eagle" asks a draft model for exactly what p_psi is: from the target's state h_t,
after the final norm, and the next token x_{t+1} (its input ids come shifted) the state h_hat_{t+1},
which the target's head reads and from which the next step starts. Embeddings and head are the
target's: vLLM puts them in place. Imported by vLLM alone, in each of its processes.

Shapes: N tokens of all requests, D width, E width of the embeddings, V vocabulary.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from nextlat.errors import NextLatError
from nextlat.objectives.latent_dynamics import GRUDynamics, LatentDynamics
from nextlat.serving.cpu_sampling import mend_sampling
from nextlat.serving.draft_config import BLOCK, read_draft_model, served_settings


class EagleNextLat(nn.Module):
    """p_psi between the embeddings and the head of the model that is served.

    Args:
        vllm_config: vLLM's own; `speculative_config.draft_model_config.hf_config` is what
            `draft_config` wrote.
        prefix: of the names of layers.

    Raises:
        NextLatError: a sidecar of another objective or version, or one whose target does not embed
            and read as vLLM's layers can.
    """

    supports_eagle = True
    # Both belong to the target; vLLM puts them in place after loading.
    has_own_lm_head = False
    has_own_embed_tokens = False

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.speculative_config.draft_model_config.hf_config
        where = Path(vllm_config.speculative_config.draft_model_config.model)
        draft = read_draft_model(getattr(self.config, BLOCK, None), where)
        settings, embedding, head = served_settings(draft, where)
        mend_sampling()
        assert embedding.scale is not None
        self.embedding_scale = embedding.scale
        self.model: Any = nn.Module()
        self.model.embed_tokens = _Placeholder()
        self.model.dynamics = (
            GRUDynamics(self.config.hidden_size, embedding.width)
            if settings.dynamics == "gru"
            else LatentDynamics(
                self.config.hidden_size,
                embedding.width,
                settings.hidden_size,
                settings.num_layers,
                separate_norms=settings.separate_norms,
            )
        )
        if settings.draft_vocabulary is not None:
            number = settings.draft_vocabulary
            count = number if isinstance(number, int) else len(number)
            self.model.register_buffer("draft_ids", torch.zeros(count, dtype=torch.long))
        self._rows: tuple[Tensor, Tensor | None] | None = None
        self.cache_of_target = _no_cache_of_its_own(vllm_config, prefix)
        self.logits_processor = LogitsProcessor(
            self.config.vocab_size, scale=head.scale, soft_cap=head.soft_cap
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """(N,) -> (N, E)"""
        e_NE: Tensor = self.model.embed_tokens(input_ids)
        return e_NE if self.embedding_scale == 1 else e_NE * self.embedding_scale

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        hidden_states: Tensor,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One draft step: (N,) tokens read in (N, D) states -> the (N, D) next states, once to be
        read by the head and once to start from."""
        e_NE = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        h_ND = self.model.dynamics(hidden_states, e_NE)
        return h_ND, h_ND

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """(N, D) -> (N, V), by the target's head; None on ranks that vLLM gathers no logits on."""
        # A model of tied embeddings may have no module of its own for the head.
        head = getattr(self, "lm_head", self.model.embed_tokens)
        if not hasattr(self.model, "draft_ids"):
            logits: Tensor | None = self.logits_processor(
                head, hidden_states, getattr(head, "bias", None)
            )
            return logits
        return self._draft_logits(head, hidden_states)

    def _draft_logits(self, head: Any, h_ND: Tensor) -> Tensor | None:
        """Minus infinity outside of the draft vocabulary. A whole, plain head is read at those rows
        alone; of a quantised or a divided one all logits are computed."""
        ids, processor = self.model.draft_ids, self.logits_processor
        weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
        method = type(getattr(head, "quant_method", None)).__name__
        plain = method in ("NoneType", "UnquantizedEmbeddingMethod")
        if plain and weight is not None and len(weight) >= self.config.vocab_size:
            if self._rows is None:  # at the first call, before any graph is recorded
                self._rows = weight[ids].contiguous(), None if bias is None else bias[ids]
            some = F.linear(h_ND, *self._rows)
            if processor.soft_cap is not None:
                some = torch.tanh(some / processor.soft_cap) * processor.soft_cap
            some = some if processor.scale == 1 else some * processor.scale
        else:
            logits = processor(head, h_ND, bias)
            if logits is None:
                return None
            some = logits.index_select(-1, ids)
        logits = some.new_full((len(some), self.config.vocab_size), -torch.inf)
        return logits.index_copy(-1, ids, some)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Fill the dynamics model from `objective.safetensors`.

        Raises:
            NextLatError: a tensor is missing, left over or of another shape.
        """
        parameters = {f"dynamics.{n}": p for n, p in self.model.dynamics.named_parameters()}
        parameters |= dict(self.model.named_buffers(recurse=False))
        loaded = set()
        for name, value in weights:
            if name not in parameters or parameters[name].shape != value.shape:
                raise NextLatError(
                    f"the sidecar holds a tensor '{name}' {tuple(value.shape)} that its "
                    "config.json does not "
                    "describe: save the model again with this version of nextlat."
                )
            parameters[name].data.copy_(value)
            loaded.add(name)
        if missing := parameters.keys() - loaded:
            raise NextLatError(
                f"the sidecar lacks '{min(missing)}', which its config.json describes: restore "
                "objective.safetensors."
            )
        return {f"model.{name}" for name in loaded}


class _Placeholder(nn.Module):
    """Until vLLM puts the target's embedding here; it compares widths if there is a weight."""

    weight = None


def _no_cache_of_its_own(vllm_config: Any, prefix: str) -> Attention:
    """An attention layer that is never run. vLLM insists that a drafter belongs to one group of KV
    caches; sharing the cache of the target's last layer puts it in that one without allocating
    anything."""
    layers = vllm_config.compilation_config.static_forward_context
    attention = {name: layer for name, layer in layers.items() if isinstance(layer, Attention)}
    if not attention:
        raise NextLatError(
            "the model has no attention layer of vLLM's usual kind, in whose cache group a drafter "
            "could be: serve it without speculation."
        )
    name, last = list(attention.items())[-1]
    shared = last.kv_sharing_target_layer_name or name
    return Attention(
        last.num_heads,
        last.head_size,
        scale=1.0,
        num_kv_heads=last.num_kv_heads,
        cache_config=vllm_config.cache_config,
        per_layer_sliding_window=last.sliding_window,
        prefix=f"{prefix}{'.' if prefix else ''}nextlat.layers.{len(layers)}.attn",
        attn_type=last.attn_type,
        kv_sharing_target_layer_name=shared,
    )
