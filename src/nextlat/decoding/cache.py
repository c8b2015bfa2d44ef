"""Key-value caches: one for ragged batches, and the library's own for what any model can do.

The only part of decoding that knows the caches of `transformers`. Both classes do three things:
`prefill` reads the prompts, `read` reads some more tokens of every row in one forward pass, `keep`
says how many of those stay.

`RaggedCache`: the key and value of position i of a row always lie in slot i, and a query at
position p sees the slots up to p. So rows are of any length, taking back a token is forgetting that
it is there (the slot is written again before a query can see it), shapes are static, and there is
no padding inside.

`GrowingCache`: the library's own, for one row that drafts, or for a batch that does not: its rows
then advance together, padded on the left as `transformers` does it. Measured on 5.17 and 5.23:
`crop` takes the number of tokens to remove as a NEGATIVE number. Layers with a sliding window or a
convolution throw their past away unless they were told beforehand to record it; those have to be
cropped after every forward pass, by zero tokens too, because only `crop` brings them back to size.

Shapes: B rows, T prompt tokens, K tokens read at a time, S slots, D width, H heads, E width of a
    head.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from nextlat.backbone import Backbone, evaluation_mode

SPAN = 64  # attention runs over the slots in use, rounded up to a multiple of this


GROWING = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")
"""Arguments of `generate` that transformers lengthens with the text."""


class GrowingCache:
    """The library's cache, read the library's way: `prepare_inputs_for_generation` says what the
    model is given at every step, as in `transformers`' own loop. So it decodes whatever that does,
    with positions, windows, recurrent states and caches that begin anew as they are there.

    Args:
        backbone: of the model.
        arguments: what `generate` has prepared for the model besides the tokens.
        cache: in which tokens can be taken back, of one row; None = the one in `arguments`, or
            whatever the model makes.
    """

    def __init__(
        self, backbone: Backbone, arguments: Mapping[str, Any], cache: DynamicCache | None = None
    ) -> None:
        self._backbone, self._arguments, self._cache = backbone, dict(arguments), cache
        self._arguments.pop("logits_to_keep", None)  # some transformers leave out states by it
        self._output: Any = None  # of the last step
        self._ids_BT: Tensor
        self._last = 0
        if cache is not None:
            cache.activate_past_recording()
            self._arguments |= {"past_key_values": cache, "use_cache": True}

    def prefill(self, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The prompts (T,), of one length with their padding, as (B, T); their states (B, T, D);
        and where each ends, (B,)."""
        self._ids_BT = torch.stack(list(prompts))
        h_BTD = self._step(self._ids_BT.shape[1], is_first_iteration=True)
        return self._ids_BT, h_BTD, torch.full_like(self._ids_BT[:, 0], h_BTD.shape[1] - 1)

    def read(self, tokens_BK: Tensor) -> Tensor:
        """(B, K, D): one forward pass over the next tokens of every row."""
        K, lm = tokens_BK.shape[1], self._backbone.lm
        self._ids_BT = torch.cat([self._ids_BT, tokens_BK], dim=1)
        self._arguments = lm._update_model_kwargs_for_generation(
            self._output, self._arguments, num_new_tokens=K
        )
        return self._step(K, next_sequence_length=K if self._arguments.get("use_cache") else None)

    def _step(self, tokens: int, **how: Any) -> Tensor:
        inputs = self._backbone.lm.prepare_inputs_for_generation(
            self._ids_BT, **how, **self._arguments
        )
        self._output, self._last = self._backbone.read(inputs), tokens
        return self._output[0][:, -tokens:]

    def keep(self, counts: Sequence[int]) -> None:
        """Forget all but the first so many of the tokens read last; to be called once after every
        `read`."""
        if self._cache is None:
            return
        rejected = self._last - counts[0]
        self._cache.crop(-rejected)
        length = self._ids_BT.shape[1] - rejected
        self._ids_BT = self._ids_BT[:, :length]
        for name in GROWING:
            if (values := self._arguments.get(name)) is not None:
                self._arguments[name] = values[..., :length]


class RaggedCache:
    """A batch whose rows have lengths of their own, in static tensors.

    Args:
        backbone: of the model, for which `supports_ragged` must hold.
        length: tokens of the longest row when all is done.
        extra_layers: `Objective.cached_layers`.

    Attributes:
        slots: S, at least one more than `length`: rows that have nothing left to read write into
            the last one, which is never looked at.
        lengths_B: tokens that each row has read, on the device; known after `prefill`.
    """

    lengths_B: Tensor

    def __init__(self, backbone: Backbone, length: int, extra_layers: int = 0) -> None:
        self._backbone = backbone
        self.slots = -(-(length + 1) // SPAN) * SPAN
        config = backbone.lm.config.get_text_config(decoder=True)
        self._last_position = (getattr(config, "max_position_embeddings", None) or self.slots) - 1
        self._additive = config._attn_implementation == "eager"
        self._write = _Write()
        layers = backbone.new_cache(extra_layers).layers
        self._cache = Cache(layers=[_RaggedLayer(self.slots, self._write) for _ in layers])
        self._lengths: list[int] = []

    def prefill(self, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The prompts (T,) as (B, T), filled up on the right; their states (B, T, D); and where
        each ends, (B,). To be followed by `keep`."""
        tokens_BT = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        self._lengths = [0] * len(prompts)
        self.lengths_B = torch.zeros(len(prompts), dtype=torch.long, device=tokens_BT.device)
        ends_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=tokens_BT.device)
        return tokens_BT, self.read(tokens_BT), ends_B

    def read(self, tokens_BK: Tensor) -> Tensor:
        """(B, K, D): one forward pass over the next tokens of every row."""
        longest, K = max(self._lengths), tokens_BK.shape[1]
        span = min(-(-(longest + K) // SPAN) * SPAN, self.slots)
        level = min(self._lengths) == longest and longest + K < self.slots
        return self.forward(tokens_BK, self.lengths_B, span, longest if level else None)

    def forward(
        self, tokens_BK: Tensor, lengths_B: Tensor, span: int, start: int | None = None
    ) -> Tensor:
        """`read` as a function of tensors, which is what is compiled.

        Args:
            tokens_BK: the next tokens of every row.
            lengths_B: tokens that each row has read.
            span: number of slots that attention looks at.
            start: length of all rows, where that is one number: they are then written as one slice.
        """
        steps = torch.arange(tokens_BK.shape[1], device=tokens_BK.device)
        positions_BK = lengths_B[:, None] + steps
        self._write.slots_BK = positions_BK.clamp(max=self.slots - 1)
        self._write.span, self._write.start = span, start
        mask = torch.arange(span, device=tokens_BK.device) <= positions_BK[:, None, :, None]
        if self._additive:
            dtype = self._backbone.lm.dtype
            nothing = torch.zeros_like(mask, dtype=dtype)
            mask = nothing.masked_fill(~mask, torch.finfo(dtype).min)
        h_BKD, _ = self._backbone.step(
            tokens_BK,
            self._cache,
            attention_mask=mask,
            position_ids=positions_BK.clamp(max=self._last_position),
        )
        return h_BKD

    def keep(self, counts: Sequence[int]) -> None:
        """Each row keeps the first so many of the tokens read last."""
        self._lengths = [n + count for n, count in zip(self._lengths, counts, strict=True)]
        self.lengths_B = torch.tensor(self._lengths, device=self.lengths_B.device)


class _Write:
    """Where the layers put what is read now: slots (B, K), the first one where it is the same for
    all rows; and how many slots attention looks at."""

    slots_BK: Tensor
    start: int | None
    span: int


class _RaggedLayer(CacheLayerMixin):
    """Keys and values (B, H, S, E) of one layer, written in place at each row's own slots."""

    is_compileable = True
    is_sliding = False

    def __init__(self, slots: int, write: _Write) -> None:
        super().__init__()
        self._slots, self._write = slots, write

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        for name, states in {"keys": key_states, "values": value_states}.items():
            tensor = states.new_zeros(*states.shape[:2], self._slots, states.shape[-1])
            # Otherwise CUDA graphs would refuse to write into it.
            torch._dynamo.mark_static_address(tensor)
            setattr(self, name, tensor)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, span = self._write.start, self._write.span
        written: list[Tensor] = []
        for states, tensor in ((key_states, self.keys), (value_states, self.values)):
            assert tensor is not None
            if start is not None:
                tensor[:, :, start : start + states.shape[2]] = states
            else:
                index_B1K1 = self._write.slots_BK[:, None, :, None]
                tensor.scatter_(2, index_B1K1.expand_as(states), states)
            written.append(tensor[:, :, :span])
        return written[0], written[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._write.span, 0

    def get_seq_length(self) -> int:
        return 0  # unknown by design: every call brings its own positions and its own mask

    def get_max_length(self) -> int:
        return self._slots

    get_max_cache_shape = get_max_length  # its name in transformers 5.17


PLAIN = {
    "doge": "attends to a selection of its keys, which depends on how many are read at a time",
    "moshi": "forgets keys that its attention would still look at",
}
"""Models that draft rightly as long as the text is short, by the type of their configuration."""


def drafting_obstacle(backbone: Backbone, extra_layers: int) -> str:
    """Why the model cannot take back what it has read of a draft; "" if it can, tried out on one
    padded row against transformers' way, one token at a time."""
    lm = backbone.lm
    if reason := PLAIN.get(lm.config.model_type):
        return f"it {reason}"
    ids = torch.arange(1, 9, device=lm.device) % backbone.vocab_size
    with _probing(lm) as tried:
        if foreign := backbone.foreign_layers:
            return f"it keeps its past in a way of its own ({', '.join(foreign)})"
        cache = backbone.new_cache(extra_layers)
        mask = torch.tensor([[0, 1, 1, 1]], device=lm.device)
        arguments = {"attention_mask": mask, "use_cache": True}
        if "position_ids" in inspect.signature(lm.forward).parameters:
            arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        drafting = GrowingCache(backbone, arguments, cache)
        drafting.prefill([ids[:4]])
        if not cache.is_croppable:
            return "it has recurrent layers, whose state cannot forget a rejected draft"
        drafting.keep([4])
        drafting.read(ids[None, [4, 7, 0]])
        drafting.keep([1])
        h_1KD = drafting.read(ids[None, [5, 6]])
        tried.same = backbone.close(
            h_1KD, _plainly(backbone, ids[None, :4], mask, ids[None, 4:7])[:, -2:]
        )
    return "" if tried.same else "its cache does not take back what was read"


def supports_ragged(backbone: Backbone) -> bool:
    """Whether a `RaggedCache` gives the states that transformers gives, batch padded on the left:
    full attention in every layer, tried out on two rows."""
    lm = backbone.lm
    kernel = lm.config.get_text_config(decoder=True)._attn_implementation
    if lm.config.model_type in PLAIN:
        return False
    if kernel not in ("sdpa", "eager") or "position_ids" not in backbone.step_arguments:
        return False
    ids = torch.arange(1, 9, device=lm.device) % backbone.vocab_size
    with _probing(lm) as tried:
        if not all(type(layer) is DynamicLayer for layer in backbone.new_cache().layers):
            return False
        ragged = RaggedCache(backbone, 8)
        ragged.prefill([ids[:4], ids[3:5]])
        ragged.keep([4, 2])
        ragged.read(torch.stack([ids[[4, 7, 0]], ids[[5, 2, 1]]]))
        ragged.keep([1, 2])
        h_BKD = ragged.read(torch.stack([ids[[5, 6]], ids[[7, 0]]]))
        prompts = torch.stack([ids[:4], ids[[0, 0, 3, 4]]])
        mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]], device=lm.device)
        rest = torch.stack([ids[[4, 5, 6, 6]], ids[[5, 2, 7, 0]]])
        want = _plainly(backbone, prompts, mask, rest)
        tried.same = backbone.close(h_BKD, torch.stack([want[0, 1:3], want[1, 2:4]]))
    return tried.same


def _plainly(backbone: Backbone, prompts: Tensor, mask: Tensor, rest: Tensor) -> Tensor:
    """(B, K, D) states of the tokens after the prompts, read one by one in transformers' way."""
    arguments = {"attention_mask": mask, "use_cache": True}
    if "position_ids" in inspect.signature(backbone.lm.forward).parameters:
        arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = GrowingCache(backbone, arguments)
    cache.prefill(list(prompts))
    return torch.cat([cache.read(token) for token in rest.split(1, dim=1)], dim=1)


@dataclass
class _Tried:
    same: bool = False


@contextmanager
def _probing(lm: nn.Module) -> Iterator[_Tried]:
    """Whatever a foreign model raises on a cache it does not know is an answer too."""
    tried = _Tried()
    try:
        with evaluation_mode(lm), torch.autocast(lm.device.type, enabled=False):
            yield tried
    except Exception as error:
        if out_of_memory(error):  # says nothing about the model
            raise


def out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU or in main memory."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
