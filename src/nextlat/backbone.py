"""Together with `last_layer` the only file that knows the insides of `transformers` models: hidden
states, embeddings, output head, packing.

What a model does is found out on a 2 x 5 batch when it is attached, not by the names of its modules
or config fields, and a model that does something we cannot reproduce is refused there, in one
sentence, instead of training something subtly different. What shows on long texts alone is told
apart by what the model is made of: the kinds of its layers, and rotary factors that change.

Shapes: B rows, T tokens, D width, V vocabulary, E width of the embeddings (= D almost everywhere).
"""

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from nextlat.batch import Batch
from nextlat.errors import NextLatError
from nextlat.head import Around, Head, Read

LIBRARY = DynamicCache.__module__  # defines the kinds of layers that many models share

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
        pads_left: whether padding on the left of a row leaves its states as they are.

    Raises:
        NextLatError: not a causal LM of transformers, an encoder-decoder, states that depend on
            later tokens, or a head that cannot be reproduced.
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
        if lm.get_output_embeddings() is None:
            raise NextLatError(
                f"{name} has no output head of its own: load it with AutoModelForCausalLM, not "
                "AutoModel."
            )
        if lm.config.model_type == "reformer":  # shows only where the text is longer than a chunk
            raise NextLatError(
                f"{name} sorts all positions of a text into buckets, so that its states depend on "
                "later tokens: next-latent prediction needs a causal LM."
            )
        with evaluation_mode(lm):
            ids = probe_ids(lm)
            logits, h = lm(input_ids=ids, use_cache=False).logits, self.states(ids)
            other = torch.cat([ids[:, :3], (ids[:, 3:] + 1) % (ids.max() + 1)], dim=1)
            if not self.close(self.states(other)[:, :3], h[:, :3]):
                raise NextLatError(
                    f"the states of {name} depend on later tokens: next-latent prediction needs a "
                    "causal LM (one of the BERT family needs is_decoder=True in its "
                    "configuration)."
                )
            self.width, self.vocab_size = h.shape[-1], logits.shape[-1]
            self.embedding_width = self.embed(ids).shape[-1]
            linear = self._head_is_linear(h, logits)
            self.head = Head(lm, self.transformer, linear=linear, frozen=False)
            self.frozen_head = Head(lm, self.transformer, linear=linear, frozen=True)
            with torch.enable_grad():
                if self.frozen_head(h.detach()).requires_grad:
                    raise NextLatError(
                        f"the output head of {name} cannot be frozen, as the KL needs it: this "
                        "architecture is not supported."
                    )
            positions = torch.tensor([[0, 1, 0, 1, 2]], device=ids.device).expand(2, 5)
            mask = torch.tensor([[0, 0, 1, 1, 1]], device=ids.device).expand(2, 5)
            known, first, rest = not self.foreign_layers, slice(0, 2), slice(2, 5)
            self.pads_left = known and self._reads(ids, [rest], attention_mask=mask)
            self.packs = known and "position_ids" in self.step_arguments
            self.packs = self.packs and self._reads(ids, [first, rest], position_ids=positions)

    @property
    def transformer(self) -> Any:
        """The LM without its head: what gives h."""
        base, lm = self.lm.base_model, self.lm
        if base is not lm:
            return base
        # Some name it otherwise than `base_model_prefix` says.
        inner = [child for child in lm.children() if isinstance(child, PreTrainedModel)]
        if len(inner) != 1:
            raise NextLatError(
                f"{type(lm).__name__} is not one transformer and a head: this architecture is not "
                "supported."
            )
        return inner[0]

    def _head_is_linear(self, h: Tensor, logits: Tensor) -> bool:
        """The model's own forward on given states is the truth; a plain linear map replaces it only
        where both agree at any scale.

        (Freshly initialised models have tiny logits, on which soft-capping is invisible: hence the
        magnified states.)
        """
        try:
            own = Head(self.lm, self.transformer, linear=False, frozen=False)
            own_agrees = self.close(own(h), logits)
        except Exception:  # whatever a foreign forward raises, the linear head is still open
            own_agrees = False
        try:
            plain = Head(self.lm, self.transformer, linear=True, frozen=False)
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

    def _reads(self, ids: Tensor, pieces: Sequence[slice], **arguments: Any) -> bool:
        """Whether pieces of the rows have the states with these arguments that they have alone."""
        try:
            h = self.states(ids, **arguments)
            return all(self.close(h[:, piece], self.states(ids[:, piece])) for piece in pieces)
        except Exception:  # it cannot even take the arguments
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
        return (encoder or self.transformer)(input_ids=input_ids, use_cache=False, **arguments)[0]

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
        if batch.states is not None and encoder is None:
            return batch.states
        if batch.position_ids is None:
            return self.states(batch.input_ids, encoder)
        flash = "flash" in str(self.lm.config._attn_implementation)
        if self.packs and not flash:
            # Positions alone: transformers infers documents only where no attention mask is given.
            return self.states(batch.input_ids, encoder, position_ids=batch.position_ids)
        if not batch.packed:
            assert batch.valid is not None
            if not self.pads_left and bool((batch.valid[:, 1:] & ~batch.valid[:, :-1]).any()):
                raise NextLatError(
                    f"{type(self.lm).__name__} reads padding on the left of a row as text: pad on "
                    "the right (padding_side='right'; belief-state rows, which are read in both "
                    "directions, not at all)."
                )
            return self.states(batch.input_ids, encoder, attention_mask=batch.valid.long())
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
            arguments: what rows of unequal length need, see `decoding.cache`. Positions that are
                not among them go on where the cache ends.

        Returns:
            h_BTD and the cache.

        Raises:
            NextLatError: the model keeps no such cache (a purely recurrent one).
        """
        if "position_ids" not in arguments and "position_ids" in self.step_arguments:
            # Some models count every call from 0 unless they are told.
            start, steps = 0 if cache is None else cache.get_seq_length(), input_ids.shape[1]
            positions = torch.arange(start, start + steps, device=input_ids.device)
            arguments["position_ids"] = positions.expand_as(input_ids)
        out = self.transformer(
            input_ids=input_ids, past_key_values=cache, use_cache=True, **arguments
        )
        kept = getattr(out, "past_key_values", None)
        if kept is None:
            raise NextLatError(
                f"{type(self.lm).__name__} keeps no key-value cache, and cannot read step by step."
            )
        return out[0], kept

    def read(self, inputs: Mapping[str, Any]) -> Any:
        """What the transformer returns, h_BTD first, for arguments of the LM's own forward pass, as
        `prepare_inputs_for_generation` makes them."""

        def call(transformer: Any, *arguments: Any, **keywords: Any) -> None:
            raise Read(transformer(*arguments, **keywords))

        around: Any = Around(self.lm, self.transformer, call)
        try:
            type(self.lm).forward(around, **inputs, return_dict=True)
        except Read as read:
            return read.output
        raise NextLatError(f"{type(self.lm).__name__} does not call its transformer.")

    @property
    def step_arguments(self) -> Set[str]:
        """Names of the arguments that `step` takes."""
        return inspect.signature(self.transformer.forward).parameters.keys()

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

    def new_cache(self, extra_layers: int = 0) -> DynamicCache:
        """The cache that transformers makes for this model, with room for `extra_layers` more
        layers, each like the last one."""
        cache = DynamicCache(config=self.lm.config)
        cache.layers += [copy.deepcopy(cache.layers[-1]) for _ in range(extra_layers)]
        return cache

    @property
    def foreign_layers(self) -> list[str]:
        """Kinds of layers that this architecture alone has, by how they keep the past: what they do
        with many tokens cannot be found out on few."""
        try:
            layers = self.new_cache().layers
        except Exception:  # it has no such cache
            return []
        return sorted({type(x).__name__ for x in layers if type(x).__module__ != LIBRARY})

    @property
    def rotary_change(self) -> int | None:
        """Length of text from which on the rotary factors are others, so that what was cached
        before does not go with what comes after; None = they never change."""
        config: Any = self.lm.config.get_text_config(decoder=True)
        parameters = getattr(config, "rope_parameters", None) or {}
        kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
        changing = [kind for kind in kinds if kind.get("rope_type") in ("dynamic", "longrope")]
        name = "original_max_position_embeddings"
        lengths = [kind.get(name) or config.max_position_embeddings for kind in changing]
        return min(lengths, default=None)


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
