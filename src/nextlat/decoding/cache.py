"""Key-value caches: one for ragged batches, and the library's own for what any model can do.

The only part of decoding that knows the caches of `transformers`. Both classes do three things:
`prefill` reads the prompts, `read` reads some more tokens of every row in one forward pass, `keep`
says how many of those last tokens stay.

`RaggedCache`: the key and value of position i of a row always lie in slot i, and a query at
position p sees the slots up to p. So rows are of any length, taking back a token is forgetting that
it is there (the slot is written again before a query can see it), shapes are static, and there is
no padding inside.

`GrowingCache`: the library's own, for one row that drafts, or for a batch that does not: its rows
then advance together, padded on the left as `transformers` does it. Measured on 5.17 and 5.23:
`crop` takes the number of tokens to remove as a NEGATIVE number, and layers with a sliding window
or a convolution throw their past away unless they were told beforehand to record it; those have to
be cropped after every forward pass, by zero tokens too, because only `crop` brings them back to
size.

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

from nextlat.backbone import Backbone
from nextlat.errors import NextLatError

SPAN = 64  # attention runs over the slots in use, rounded up to a multiple of this


class CannotForgetError(NextLatError):
    """The model's layers sum up all of their past: what was read cannot be taken back."""


class GrowingCache:
    """The library's cache, which every model knows.

    Args:
        backbone: of the model. config: `Objective.cache_config`, what the cache is built from.
        forgets: whether tokens will be taken back, possible for one row only; without, the model
            chooses a cache of its own.
    """

    def __init__(self, backbone: Backbone, config: PreTrainedConfig, *, forgets: bool) -> None:
        self._backbone, self._forgets, self._last = backbone, forgets, 0
        self._cache: Cache | None = None
        self._mask_BT: Tensor | None = None  # 0 on the padding of a batch that has any
        if forgets:
            self._cache = DynamicCache(config=config)
            self._cache.activate_past_recording()

    def prefill(self, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The prompts (T,) as (B, T), filled up on the left; their states (B, T, D); and where each
        ends, (B,).

        Raises:
            CannotForgetError: the model has recurrent layers, but `forgets`.
        """
        lengths = [len(prompt) for prompt in prompts]
        tokens_BT = torch.stack(
            [F.pad(prompt, (max(lengths) - len(prompt), 0)) for prompt in prompts]
        )
        if min(lengths) < max(lengths):
            before_B1 = torch.tensor(
                [max(lengths) - length for length in lengths], device=tokens_BT.device
            )[:, None]
            self._mask_BT = (
                torch.arange(max(lengths), device=tokens_BT.device) >= before_B1
            ).long()
        h_BTD = self._step(tokens_BT)
        # Only now: a recurrent layer does not know what it stores before the first pass.
        if self._forgets and self._cache is not None and not self._cache.is_croppable:
            raise CannotForgetError(
                "this model has recurrent layers, whose state cannot forget a rejected draft: use draft_length=0"
            )
        return tokens_BT, h_BTD, torch.full_like(tokens_BT[:, 0], max(lengths) - 1)

    def read(self, tokens_BK: Tensor) -> Tensor:
        """(B, K, D): one forward pass over the next tokens of every row."""
        if self._mask_BT is not None:
            self._mask_BT = F.pad(self._mask_BT, (0, tokens_BK.shape[1]), value=1)
        return self._step(tokens_BK)

    def _step(self, tokens_BK: Tensor) -> Tensor:
        arguments = {}
        if self._mask_BT is not None:
            arguments["attention_mask"] = self._mask_BT
            if "position_ids" in self._backbone.step_arguments:
                places_BT = (self._mask_BT.cumsum(dim=1) - 1).clamp(min=0)
                arguments["position_ids"] = places_BT[:, -tokens_BK.shape[1] :]
        h_BKD, self._cache = self._backbone.step(tokens_BK, self._cache, **arguments)
        self._last = tokens_BK.shape[1]
        return h_BKD

    def keep(self, counts: Sequence[int]) -> None:
        """Forget all but the first so many of the tokens read last; to be called once after every
        `read`."""
        if self._forgets and self._cache is not None:
            self._cache.crop(counts[0] - self._last)


class RaggedCache:
    """A batch whose rows have lengths of their own, in static tensors.

    Args:
        backbone: of the model, which must pass `supports_ragged`. config: `Objective.cache_config`,
            for the number of layers.
        length: tokens of the longest row when all is done.

    Attributes:
        slots: S; one more than `length` at least, in which rows that have nothing left to read
            leave what nobody ever sees.
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
        """The prompts (T,) as (B, T), filled up on the right; their states (B, T, D); where each
        ends, (B,). `keep` has to follow."""
        tokens_BT = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
        self._lengths = [0] * len(prompts)
        self.lengths_B = torch.zeros(len(prompts), dtype=torch.long, device=tokens_BT.device)
        ends_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=tokens_BT.device)
        return tokens_BT, self.read(tokens_BT), ends_B

    def read(self, tokens_BK: Tensor) -> Tensor:
        """(B, K, D): one forward pass over the next tokens of every row."""
        longest = max(self._lengths)
        span = -(-(longest + tokens_BK.shape[1]) // SPAN) * SPAN
        fits = min(self._lengths) == longest and longest + tokens_BK.shape[1] < self.slots
        return self.forward(
            tokens_BK, self.lengths_B, min(span, self.slots), longest if fits else None
        )

    def forward(
        self, tokens_BK: Tensor, lengths_B: Tensor, span: int, common: int | None = None
    ) -> Tensor:
        """`read` as a function of tensors, attending over the first `span` slots: what is compiled,
        with all of them.

        `common` is the length of all rows where that is one number: they are then written as one
        slice.
        """
        positions_BK = lengths_B[:, None] + torch.arange(
            tokens_BK.shape[1], device=tokens_BK.device
        )
        self._write.slots_BK, self._write.span = positions_BK.clamp(max=self.slots - 1), span
        self._write.start = common
        visible_B1KS = torch.arange(span, device=tokens_BK.device) <= positions_BK[:, None, :, None]
        mask = _additive(visible_B1KS, self._backbone.lm.dtype) if self._additive else visible_B1KS
        h_BKD, _ = self._backbone.step(
            tokens_BK,
            self._cache,
            attention_mask=mask,
            position_ids=positions_BK.clamp(max=self._last_position),
        )
        return h_BKD

    def keep(self, counts: Sequence[int]) -> None:
        """Each row keeps the first so many of the tokens read last."""
        self._lengths = [
            length + count for length, count in zip(self._lengths, counts, strict=True)
        ]
        self.lengths_B = torch.tensor(self._lengths, device=self.lengths_B.device)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


class _Write:
    """Where the layers put what is read now: slots (B, K), their start where it is the same for all
    rows; and how many slots attention sees."""

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
            shape = (*states.shape[:2], self._slots, states.shape[-1])
            tensor = torch.zeros(shape, dtype=states.dtype, device=states.device)
            torch._dynamo.mark_static_address(
                tensor
            )  # or CUDA graphs would refuse to write into it
            setattr(self, name, tensor)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        if self._write.start is not None:
            end = self._write.start + key_states.shape[2]
            keys[:, :, self._write.start : end] = key_states
            values[:, :, self._write.start : end] = value_states
        else:
            index_B1K1 = self._write.slots_BK[:, None, :, None]
            keys.scatter_(2, index_B1K1.expand_as(key_states), key_states)
            values.scatter_(2, index_B1K1.expand_as(value_states), value_states)
        return keys[:, :, : self._write.span], values[:, :, : self._write.span]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._write.span, 0

    def get_seq_length(self) -> int:
        return 0  # unknown by design: every call brings its own positions and its own mask

    def get_max_length(self) -> int:
        return self._slots

    get_max_cache_shape = get_max_length  # its name in transformers 5.17


@torch.no_grad()
def supports_ragged(backbone: Backbone) -> bool:
    """Whether a `RaggedCache` gives the states of this model: full attention in every layer, tried
    out on two rows."""
    lm = backbone.lm
    config = lm.config.get_text_config(decoder=True)
    if (
        config._attn_implementation not in ("sdpa", "eager")
        or "position_ids" not in backbone.step_arguments
    ):
        return False
    if not all(type(layer) is DynamicLayer for layer in DynamicCache(config=lm.config).layers):
        return False
    ids = torch.arange(1, 9, device=lm.device) % backbone.vocab_size
    try:
        cache = RaggedCache(backbone, lm.config, 8)
        cache.prefill([ids[:4], ids[3:5]])
        cache.keep([4, 2])
        cache.read(torch.stack([ids[[4, 7, 0]], ids[[5, 2, 1]]]))
        cache.keep([1, 2])
        h_BKD = cache.read(torch.stack([ids[[5, 6]], ids[[7, 0]]]))
        rows = [ids[[0, 1, 2, 3, 4, 5, 6]], ids[[3, 4, 5, 2, 7, 0]]]
        return all(
            backbone.close(h_BKD[b], backbone.states(row[None])[0, -2:])
            for b, row in enumerate(rows)
        )
    except (
        Exception
    ):  # whatever a foreign model raises on a cache it does not know, the other path is still open
        return False
