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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from nextlat.backbone import Backbone, evaluation_mode
from nextlat.errors import NextLatError

SPAN = 64  # attention runs over the slots in use, rounded up to a multiple of this


class CannotForgetError(NextLatError):
    """The model's layers sum up all of their past: what was read cannot be taken back."""


class GrowingCache:
    """The library's cache, which every model knows.

    Args:
        backbone: of the model.
        config: `Objective.cache_config`, what the cache is built from.
        forgets: whether tokens will be taken back, possible for one row only; otherwise the model
            chooses a cache of its own.
    """

    def __init__(self, backbone: Backbone, config: PreTrainedConfig, *, forgets: bool) -> None:
        self._backbone, self._forgets, self._last = backbone, forgets, 0
        self._counts_positions = "position_ids" in backbone.step_arguments
        self._cache: Cache | None = None
        self._mask_BT: Tensor | None = None  # 0 on the padding of a batch that has any
        self._next_B1: Tensor  # position of each row's next token
        if forgets:
            self._cache = DynamicCache(config=config)
            self._cache.activate_past_recording()

    def prefill(self, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The prompts (T,) as (B, T), filled up on the left; their states (B, T, D); and where each
        ends, (B,).

        Raises:
            CannotForgetError: the model has recurrent layers, but `forgets`.
        """
        lengths, device = [len(prompt) for prompt in prompts], prompts[0].device
        longest = max(lengths)
        tokens_BT = torch.stack([F.pad(x, (longest - len(x), 0)) for x in prompts])
        self._next_B1 = torch.tensor(lengths, device=device)[:, None] - longest
        if min(lengths) < longest:
            self._mask_BT = (torch.arange(longest, device=device) >= -self._next_B1).long()
        h_BTD = self._step(tokens_BT)
        # Only now: a recurrent layer does not know what it stores before the first pass.
        if self._forgets and self._cache is not None and not self._cache.is_croppable:
            raise CannotForgetError(
                "this model has recurrent layers, whose state cannot forget a rejected draft: use "
                "draft_length=0"
            )
        return tokens_BT, h_BTD, torch.full((len(prompts),), longest - 1, device=device)

    def read(self, tokens_BK: Tensor) -> Tensor:
        """(B, K, D): one forward pass over the next tokens of every row."""
        if self._mask_BT is not None:
            self._mask_BT = F.pad(self._mask_BT, (0, tokens_BK.shape[1]), value=1)
        return self._step(tokens_BK)

    def _step(self, tokens_BK: Tensor) -> Tensor:
        arguments, self._last = {}, tokens_BK.shape[1]
        if self._mask_BT is not None:
            arguments["attention_mask"] = self._mask_BT
        if self._counts_positions:
            positions_BK = self._next_B1 + torch.arange(self._last, device=tokens_BK.device)
            arguments["position_ids"] = positions_BK.clamp(min=0)
        self._next_B1 = self._next_B1 + self._last
        h_BKD, self._cache = self._backbone.step(tokens_BK, self._cache, **arguments)
        return h_BKD

    def keep(self, counts: Sequence[int]) -> None:
        """Forget all but the first so many of the tokens read last; to be called once after every
        `read`."""
        if self._forgets and self._cache is not None:
            rejected = self._last - counts[0]
            self._cache.crop(-rejected)
            self._next_B1 = self._next_B1 - rejected


class RaggedCache:
    """A batch whose rows have lengths of their own, in static tensors.

    Args:
        backbone: of the model, for which `supports_ragged` must hold.
        config: `Objective.cache_config`, for the number of layers.
        length: tokens of the longest row when all is done.

    Attributes:
        slots: S, at least one more than `length`: rows that have nothing left to read write into
            the last one, which is never looked at.
        lengths_B: tokens that each row has read, on the device; known after `prefill`.
    """

    lengths_B: Tensor

    def __init__(self, backbone: Backbone, config: PreTrainedConfig, length: int) -> None:
        self._backbone = backbone
        self.slots = -(-(length + 1) // SPAN) * SPAN
        config = config.get_text_config(decoder=True)
        self._last_position = (getattr(config, "max_position_embeddings", None) or self.slots) - 1
        self._additive = config._attn_implementation == "eager"
        self._write = _Write()
        layers: list[Any] = [
            _RaggedLayer(self.slots, self._write) for _ in range(config.num_hidden_layers)
        ]
        self._cache = Cache(layers=layers)
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


def supports_ragged(backbone: Backbone) -> bool:
    """Whether a `RaggedCache` gives the states of this model: full attention in every layer, tried
    out on two rows."""
    lm = backbone.lm
    kernel = lm.config.get_text_config(decoder=True)._attn_implementation
    if kernel not in ("sdpa", "eager") or "position_ids" not in backbone.step_arguments:
        return False
    if not all(type(layer) is DynamicLayer for layer in DynamicCache(config=lm.config).layers):
        return False
    ids = torch.arange(1, 9, device=lm.device) % backbone.vocab_size
    try:
        with evaluation_mode(lm), torch.autocast(lm.device.type, enabled=False):
            cache = RaggedCache(backbone, lm.config, 8)
            cache.prefill([ids[:4], ids[3:5]])
            cache.keep([4, 2])
            cache.read(torch.stack([ids[[4, 7, 0]], ids[[5, 2, 1]]]))
            cache.keep([1, 2])
            h_BKD = cache.read(torch.stack([ids[[5, 6]], ids[[7, 0]]]))
            rows = [ids[[0, 1, 2, 3, 4, 5, 6]], ids[[3, 4, 5, 2, 7, 0]]]
            return all(
                backbone.close(h_KD, backbone.states(row[None])[0, -2:])
                for h_KD, row in zip(h_BKD, rows, strict=True)
            )
    except Exception as error:
        if out_of_memory(error):  # says nothing about the model
            raise
        return False  # whatever a foreign model raises on a cache it does not know


def out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU or in main memory."""
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)
