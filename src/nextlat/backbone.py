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
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, GenerationMixin, PreTrainedModel

from nextlat.batch import Batch
from nextlat.errors import NextLatError, raise_if_out_of_memory
from nextlat.head import Around, Head, Read, size

LIBRARY = DynamicCache.__module__  # defines the kinds of layers that many models share

_PREPARED = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _PREPARED else "past_key_values"
"""What models call their cache, as an argument and in their output: the latter up to transformers
5.23."""

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
    with _evaluating_lock:  # other threads may be inside with the same modules
        held = [m for m in modules if m.training or _evaluating[m]]
        _evaluating.update(held)
        for module in held:
            module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        with _evaluating_lock:
            _evaluating.subtract(held)
            for module in held:
                if not _evaluating[module]:
                    del _evaluating[module]
                    module.training = True


_evaluating_lock, _evaluating = threading.Lock(), Counter[nn.Module]()


class Backbone:
    """Hidden states, embeddings and head of a causal LM, verified at construction.

    A plain object, not an `nn.Module`: registered, it would list every parameter of the LM twice.

    Attributes:
        lm: the causal LM, never modified.
        head: h -> logits.
        frozen_head: the same with its parameters detached (never copied).
        width, embedding_width: D, E as measured.
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
                    "configuration; layers quantised over all tokens at once do so too)."
                )
            self.width = h.shape[-1]
            self._beyond_table = logits.shape[-1] - size(lm.get_output_embeddings())
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
        except Exception as error:  # whatever a foreign forward raises, the linear head is open
            raise_if_out_of_memory(error)
            own_agrees = False
        try:
            plain = Head(self.lm, self.transformer, linear=True, frozen=False)
            plain_agrees = self.close(plain(h), logits)
            for scale in (30.0, 1000.0) if own_agrees else ():
                plain_agrees = plain_agrees and self.close(plain(h * scale), own(h * scale))
        except Exception as error:
            raise_if_out_of_memory(error)
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
        except Exception as error:  # it cannot even take the arguments
            raise_if_out_of_memory(error)
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
            NextLatError: the model keeps no such cache (a purely recurrent one), or another one
                than it was given.
        """
        if "position_ids" not in arguments and "position_ids" in self.step_arguments:
            # Some models count every call from 0 unless they are told.
            start, steps = 0 if cache is None else cache.get_seq_length(), input_ids.shape[1]
            positions = torch.arange(start, start + steps, device=input_ids.device)
            arguments["position_ids"] = positions.expand_as(input_ids)
        arguments |= {CACHE: cache, "use_cache": True}
        out = self.transformer(input_ids=input_ids, **arguments)
        return out[0], self.cache_of(out, cache)

    def cache_of(self, output: Any, given: Any = None) -> Any:
        """The cache in what the transformer returns, which must be the one that it was given: a
        draft taken back in another one would still be read.

        Raises:
            NextLatError: see `step`.
        """
        kept = getattr(output, CACHE, None)
        if kept is None:
            raise NextLatError(
                f"{type(self.lm).__name__} keeps no key-value cache, and cannot read step by step."
            )
        if given is not None and kept is not given:
            raise NextLatError(
                f"{type(self.lm).__name__} does not keep the cache that it is given as '{CACHE}', "
                "and cannot read step by step."
            )
        return kept

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
    def vocab_size(self) -> int:
        """V as it is now: tokens can be added at any time."""
        return size(self.lm.get_output_embeddings()) + self._beyond_table

    @property
    def attention_heads(self) -> int:
        """Attention heads of a layer."""
        return self.lm.config.get_text_config(decoder=True).num_attention_heads

    def twin(self) -> nn.Module:
        """A second transformer of the same architecture, without a head, with weights of its own
        drawn as those of a new LM."""
        lm = self.lm
        how: Any = {"attn_implementation": lm.config._attn_implementation, "dtype": lm.dtype}
        config = copy.deepcopy(lm.config)
        return AutoModel.from_config(config, trust_remote_code=False, **how).to(lm.device)

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


def probe_ids(lm: PreTrainedModel) -> Tensor:
    """(2, 5) token ids, spread over the vocabulary: the first ones are often special tokens, which
    no training has shaped, and on which a model may magnify rounding a thousandfold."""
    tokens = size(lm.get_input_embeddings())
    ids = torch.arange(1, 11, device=lm.device).view(2, 5)
    return ids * max(tokens // 11, 1) % tokens
