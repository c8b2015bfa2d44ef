"""Together with `last_layer` the only file that knows the insides of `transformers` models: hidden
states, embeddings, output head, packing.

Nothing here goes by the names of modules or config fields. What a model does is found out on a
2 x 5 batch when it is attached, and a model that does something we cannot reproduce is refused
there, in one sentence, instead of training something subtly different.

Shapes: B rows, T tokens, D width, V vocabulary, E width of the embeddings (= D almost everywhere).
"""

import copy
import inspect
from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from nextlat.batch import Batch
from nextlat.errors import NextLatError

# Relative to the largest logit. A wrong head (a cap, a scale, a missing norm) is off by far more
# than rounding.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@contextmanager
def evaluation_mode(*models: object) -> Iterator[None]:
    """No dropout and no gradients inside; afterwards every module has its own training flag again.

    Args:
        models: modules. Anything else, such as an exact model of a world, has nothing to switch.
    """
    modules = [m for model in models if isinstance(model, nn.Module) for m in model.modules()]
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class Head:
    """The output head as a function of the hidden state: (..., D) -> (..., V), trainable or frozen.

    A plain linear head has `weight` (V, D) and `bias`. Any other (soft-capping, scaling by a
    constant) has None there, and is reproduced by running the model's own `forward` with its
    backbone replaced by the given states.
    """

    def __init__(self, lm: PreTrainedModel, *, linear: bool, frozen: bool) -> None:
        self._lm, self._linear, self._frozen = lm, linear, frozen

    @property
    def weight(self) -> Tensor | None:
        return self._parameters()[0] if self._linear else None

    @property
    def bias(self) -> Tensor | None:
        return self._parameters()[1] if self._linear else None

    def _parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the output embeddings, looked up anew: they can be resized, tied or
        replaced at any time."""
        table: Any = self._lm.get_output_embeddings()
        weight, bias = table.weight, getattr(table, "bias", None)
        if self._frozen:
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        return weight, bias

    def _project(self, h: Tensor) -> Tensor:
        weight, bias = self._parameters()
        return F.linear(h.to(weight.dtype), weight, bias)

    def __call__(self, h: Tensor) -> Tensor:
        if self._linear:
            return self._project(h)
        states = h.reshape(1, -1, h.shape[-1]).to(next(self._lm.parameters()).dtype)
        stub: Any = _BackboneGiven(self._lm, states, self._project if self._frozen else None)
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=h.device)
        logits = type(self._lm).forward(stub, input_ids=ids, use_cache=False).logits
        return logits.reshape(*h.shape[:-1], logits.shape[-1])


class _BackboneGiven:
    """Stands in for a causal LM inside its own `forward`: the backbone returns the given states,
    everything else is the real model's."""

    def __init__(self, lm: PreTrainedModel, states: Tensor, frozen_project: Any) -> None:
        self._lm, self._states, self._frozen_project = lm, states, frozen_project

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._lm, name)
        if value is self._lm.base_model:
            return lambda *args, **kwargs: _BackboneOutput(self._states)
        if self._frozen_project is not None and value is self._lm.get_output_embeddings():
            return self._frozen_project
        return value


class _BackboneOutput:
    """What a backbone returns, with nothing in it but the states (mixture-of-experts forwards also
    read router logits)."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


class Backbone:
    """Hidden states, embeddings and head of a causal LM, verified at construction.

    A plain object, not an `nn.Module`: registered, it would list every parameter of the LM twice.

    Attributes:
        lm: the causal LM, never modified.
        head: h -> logits.
        frozen_head: the same with its parameters detached (never copied).
        width, embedding_width, vocab_size: D, E, V as measured.
        packs: whether documents packed into one row by `position_ids` give the states of separate
            documents.

    Raises:
        NextLatError: not a causal LM of transformers, an encoder-decoder, a nested head, or a head
            that cannot be reproduced.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        self.lm, name = lm, type(lm).__name__
        if not isinstance(lm, PreTrainedModel):
            raise NextLatError(
                f"{name} is not a transformers model: load it with "
                "AutoModelForCausalLM.from_pretrained."
            )
        if lm.config.is_encoder_decoder:
            raise NextLatError(
                f"{name} is an encoder-decoder: next-latent prediction needs a decoder-only causal "
                "LM."
            )
        if lm.get_output_embeddings() is None or lm.base_model is lm:
            raise NextLatError(
                f"{name} has no output head of its own: load it with AutoModelForCausalLM, not "
                "AutoModel."
            )
        with evaluation_mode(lm):
            ids = probe_ids(lm)
            logits, h = lm(input_ids=ids, use_cache=False).logits, self.states(ids)
            self.width, self.vocab_size = h.shape[-1], logits.shape[-1]
            self.embedding_width = self.embed(ids).shape[-1]
            linear = self._head_is_linear(h, logits)
            self.head = Head(lm, linear=linear, frozen=False)
            self.frozen_head = Head(lm, linear=linear, frozen=True)
            with torch.enable_grad():
                if self.frozen_head(h.detach()).requires_grad:
                    raise NextLatError(
                        f"{name} nests layers inside its output head, which cannot be frozen for "
                        "the KL: not supported."
                    )
            self.packs = self._packs(ids)

    def _head_is_linear(self, h: Tensor, logits: Tensor) -> bool:
        """The model's own forward on given states is the truth; a plain linear map replaces it only
        where both agree at any scale.

        (Freshly initialised models have tiny logits, on which soft-capping is invisible: hence the
        magnified states.)
        """
        try:
            own = Head(self.lm, linear=False, frozen=False)
            own_agrees = self.close(own(h), logits)
        except Exception:  # whatever a foreign forward raises, the linear head is still open
            own_agrees = False
        try:
            plain = Head(self.lm, linear=True, frozen=False)
            plain_agrees = self.close(plain(h), logits)
            for scale in (30.0, 1000.0) if own_agrees else ():
                plain_agrees = plain_agrees and self.close(plain(h * scale), own(h * scale))
        except (AssertionError, RuntimeError, AttributeError):
            plain_agrees = False
        if not (own_agrees or plain_agrees):
            raise NextLatError(
                f"the logits of {type(self.lm).__name__} are not a function of its final hidden "
                "state that can be reproduced: this architecture is not supported."
            )
        return plain_agrees

    def _packs(self, ids: Tensor) -> bool:
        if "position_ids" not in self.step_arguments:
            return False
        try:
            positions = torch.tensor([[0, 1, 0, 1, 2]], device=ids.device).expand(2, 5)
            packed = self.states(ids, position_ids=positions)
            separate = torch.cat([self.states(ids[:, :2]), self.states(ids[:, 2:])], dim=1)
            return self.close(packed, separate)
        except Exception:  # a model that cannot even take the arguments does not pack
            return False

    @staticmethod
    def close(a: Tensor, b: Tensor) -> bool:
        """Whether two computations of the same thing agree up to the rounding of their dtype."""
        if a.shape != b.shape:
            return False
        allowed = TOLERANCE.get(b.dtype, 1e-4) * b.abs().max().clamp(min=1e-6)
        return bool((a - b).abs().max() <= allowed)

    def states(
        self, input_ids: Tensor, encoder: nn.Module | None = None, **arguments: Any
    ) -> Tensor:
        """h_BTD of a forward pass without a cache.

        Args:
            input_ids: (B, T).
            encoder: as in `hidden`.
            arguments: others that the model takes.
        """
        # use_cache=False is part of the meaning: with a cache, transformers silently attends across
        # packed documents.
        return (encoder or self.lm.base_model)(input_ids=input_ids, use_cache=False, **arguments)[0]

    def hidden(self, batch: Batch, encoder: nn.Module | None = None) -> Tensor:
        """h_BTD, the input of the output head: after the final norm, so that
        `head(h) == lm(...).logits`.

        Args:
            batch: rows of documents.
            encoder: another transformer of the same architecture to read the batch with, see
                `twin`; None = that of the LM.

        Raises:
            NextLatError: packed rows given to a model, or an attention kernel, that would attend
                across documents.
        """
        if batch.position_ids is None:
            return self.states(batch.input_ids, encoder)
        flash = "flash" in str(self.lm.config._attn_implementation)
        if self.packs and not flash:
            # Positions alone: transformers infers documents only where no attention mask is given.
            return self.states(batch.input_ids, encoder, position_ids=batch.position_ids)
        if not batch.packed:
            return self.states(batch.input_ids, encoder, attention_mask=batch.valid)
        if flash:
            raise NextLatError(
                "flash attention ignores document boundaries in batches of several rows: load the "
                "model with attn_implementation='sdpa' or 'flex_attention' to train on packed rows."
            )
        raise NextLatError(
            f"{type(self.lm).__name__} attends across packed documents: give one document per row, "
            "without position_ids."
        )

    def step(self, input_ids: Tensor, cache: Any = None, **arguments: Any) -> tuple[Tensor, Any]:
        """KV-cached forward pass over more tokens of every row.

        Args:
            input_ids: (B, T) the next tokens.
            cache: of what was read before, updated in place; None = a new one is made.
            arguments: what rows of unequal length need, see `decoding.cache`.

        Returns:
            h_BTD and the cache.

        Raises:
            NextLatError: the model keeps no such cache (a purely recurrent one).
        """
        out = self.lm.base_model(
            input_ids=input_ids, past_key_values=cache, use_cache=True, **arguments
        )
        kept = getattr(out, "past_key_values", None)
        if kept is None:
            raise NextLatError(
                f"{type(self.lm).__name__} keeps no key-value cache: it can be trained here, but "
                "not decoded."
            )
        return out[0], kept

    @property
    def step_arguments(self) -> Set[str]:
        """Names of the arguments that `step` takes."""
        return inspect.signature(self.lm.base_model.forward).parameters.keys()

    def embed(self, input_ids: Tensor) -> Tensor:
        """E(x): (...,) -> (..., E), by the model's own input embedding module (with its scaling,
        where it has one)."""
        return self.lm.get_input_embeddings()(input_ids)

    @property
    def attention_heads(self) -> int:
        """Attention heads of a layer."""
        return self.lm.config.get_text_config(decoder=True).num_attention_heads

    def twin(self) -> nn.Module:
        """A second transformer of the same architecture, without a head, with weights of its own
        drawn as those of a new LM."""
        lm, config = self.lm, copy.deepcopy(self.lm.config)
        kernel = lm.config._attn_implementation
        new = AutoModel.from_config(config, attn_implementation=kernel, dtype=lm.dtype)
        return new.to(lm.device)

    def cache_config(self, extra_layers: int = 0) -> PreTrainedConfig:
        """What to build a KV cache from so that it has room for `extra_layers` more layers, each
        like the last one."""
        if not extra_layers:
            return self.lm.config
        config = copy.deepcopy(self.lm.config.get_text_config(decoder=True))
        config.num_hidden_layers += extra_layers
        if getattr(config, "layer_types", None):
            config.layer_types = [*config.layer_types, *[config.layer_types[-1]] * extra_layers]
        return config


def probe_ids(lm: PreTrainedModel) -> Tensor:
    """(2, 5) token ids that every vocabulary has."""
    weight: Any = lm.get_input_embeddings().weight
    return torch.arange(1, 11, device=weight.device).view(2, 5) % len(weight)


def llama(
    vocab_size: int,
    *,
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    max_length: int = 1024,
    intermediate_size: int | None = None,
    initializer_range: float | None = None,
    tie_embeddings: bool = False,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
) -> LlamaForCausalLM:
    """The paper's backbone from scratch: rotary positions, RMSNorm, SwiGLU, no biases, untied head,
    weights ~ N(0, initializer_range).

    Args:
        vocab_size: V.
        layers: of the transformer.
        width: D.
        heads: of each layer.
        max_length: positions.
        intermediate_size: of the SwiGLU; None = 8/3 of the width, rounded up to a multiple of 32
            (Llama's rule).
        initializer_range: standard deviation of the weights; None = 0.02, the paper's.
        tie_embeddings: one table for embeddings and head.
        bos_token_id: of the tokenizer.
        eos_token_id: of the tokenizer.
        pad_token_id: of the tokenizer.
        seed: of the initial weights, without touching torch's global random state; None = drawn
            from that state.

    Raises:
        NextLatError: a width that the heads do not divide.
    """
    if width % heads or (width // heads) % 2:
        raise NextLatError(
            f"width {width} over {heads} heads does not give an even head size: change width or "
            "heads."
        )
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=intermediate_size or -(-width * 8 // 3 // 32) * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=tie_embeddings,
        initializer_range=initializer_range or 0.02,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    )
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return LlamaForCausalLM(config)
