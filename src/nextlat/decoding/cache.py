"""Key-value caches: one for ragged batches, and the library's own for what any model can do.

The only part of decoding that knows the caches of `transformers`. Both classes do three things:
`prefill` reads the prompts, `read` reads some more tokens of every row in one forward pass, `keep`
says how many of those stay.

`RaggedCache`: the key and value of position i of a row always lie in slot i, and a query at
position p sees the slots up to p. So rows are of any length, taking back a token is forgetting that
it is there (the slot is written again before a query can see it), shapes are static, and there is
no padding inside.

`GrowingCache`: the library's own, for one row that drafts, or for a batch that does not: its rows
then advance together, padded on the left, and read as `transformers` reads them. Measured on 5.17
to 5.24: `crop` takes the number of tokens to remove as a NEGATIVE number. Layers with a sliding
window or a convolution throw their past away unless they were told beforehand to record it; those
have to be cropped after every forward pass, by zero tokens too, because only `crop` brings them
back to size.

Shapes: B rows, T prompt tokens, K tokens read at a time, S slots, D width, H heads, E width of a
    head.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from nextlat.backbone import CACHE, Backbone, evaluation_mode, probe_ids
from nextlat.errors import raise_if_out_of_memory

T = TypeVar("T")

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
        direct: whether positions and a mask are known to be all that the model needs after the
            prompts, which saves the library's preparations; not with `cache`.
    """

    def __init__(
        self,
        backbone: Backbone,
        arguments: Mapping[str, Any],
        cache: DynamicCache | None = None,
        *,
        direct: bool = False,
    ) -> None:
        self._backbone, self._arguments, self._cache = backbone, dict(arguments), cache
        self._direct = direct and self._arguments.get("position_ids") is not None
        self._arguments.pop("logits_to_keep", None)  # some transformers leave out states by it
        self._lm: Any = backbone.lm
        self._output: Any = None  # of the last step
        self._ids_BT: Tensor
        self._last = 0
        if cache is not None:
            cache.activate_past_recording()
            self._arguments |= {CACHE: cache, "use_cache": True}

    def prefill(self, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The prompts (T,), of one length with their padding, as (B, T); their states (B, T, D);
        and where each ends, (B,)."""
        self._ids_BT = torch.stack(list(prompts))
        h_BTD = self._step(self._ids_BT.shape[1], is_first_iteration=True)
        mask = self._arguments.get("attention_mask")
        if self._direct and mask is not None and bool(mask.all()):
            self._arguments["attention_mask"] = None
        return self._ids_BT, h_BTD, torch.full_like(self._ids_BT[:, 0], h_BTD.shape[1] - 1)

    def read(self, tokens_BK: Tensor) -> Tensor:
        """(B, K, D): one forward pass over the next tokens of every row."""
        if self._direct:
            return self._read_directly(tokens_BK)
        K = tokens_BK.shape[1]
        self._ids_BT = torch.cat([self._ids_BT, tokens_BK], dim=1)
        self._arguments = self._lm._update_model_kwargs_for_generation(
            self._output, self._arguments, num_new_tokens=K
        )
        return self._step(K, next_sequence_length=K if self._arguments.get("use_cache") else None)

    def _step(self, tokens: int, **how: Any) -> Tensor:
        inputs = self._lm.prepare_inputs_for_generation(self._ids_BT, **how, **self._arguments)
        self._output, self._last = self._backbone.read(inputs), tokens
        if self._cache is not None:
            self._backbone.cache_of(self._output, self._cache)
        return self._output[0][:, -tokens:]

    def _read_directly(self, tokens_BK: Tensor) -> Tensor:
        K, mask = tokens_BK.shape[1], self._arguments.get("attention_mask")
        mask = None if mask is None else F.pad(mask, (0, K), value=1)
        steps = torch.arange(1, K + 1, device=tokens_BK.device)
        positions = self._arguments["position_ids"][:, -1:] + steps
        self._arguments |= {"attention_mask": mask, "position_ids": positions}
        h_BKD, _ = self._backbone.step(
            tokens_BK,
            self._backbone.cache_of(self._output),
            attention_mask=mask,
            position_ids=positions,
        )
        return h_BKD

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

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows of the batch alone."""
        index = torch.tensor(rows, device=self.lengths_B.device)
        self._cache.batch_select_indices(index)
        self._lengths, self.lengths_B = [self._lengths[b] for b in rows], self.lengths_B[index]


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

    def batch_select_indices(self, indices: Tensor) -> None:
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self.keys[indices], self.values[indices]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._write.span, 0

    def get_seq_length(self) -> int:
        return 0  # unknown by design: every call brings its own positions and its own mask

    def get_max_length(self) -> int:
        return self._slots

    get_max_cache_shape = get_max_length  # its name in transformers 5.17


SHORT_ONLY = {
    "doge": "it attends to a selection of its keys that depends on how many are read at a time",
    "moshi": "it looks at more keys than it keeps where several tokens are read at a time",
}
"""Type of configuration -> what goes wrong with drafts on texts longer than those tried here."""


def drafting_obstacle(backbone: Backbone, extra_layers: int) -> str:
    """Why a row cannot take back what was read of a draft, as a clause; "" if it can, tried out on
    one with padding against transformers' way of one token at a time."""
    lm = backbone.lm
    if reason := SHORT_ONLY.get(lm.config.model_type):
        return reason
    if foreign := backbone.foreign_layers:
        return f"it keeps its past in a way of its own ({', '.join(foreign)})"
    ids, mask = _ids(backbone)[None], torch.tensor([[0, 1, 1, 1]], device=lm.device)

    def tried() -> str:
        cache = backbone.new_cache(extra_layers)
        drafting = GrowingCache(backbone, _arguments(backbone, mask), cache)
        drafting.prefill([*ids[:, :4]])
        if not cache.is_croppable:  # a layer knows what it keeps after the first pass
            return "it has recurrent layers, whose state cannot forget a rejected draft"
        drafting.keep([4])
        drafting.read(ids[:, [4, 7, 0]])
        drafting.keep([1])
        want = _one_by_one(backbone, ids[:, :4], mask, ids[:, 4:7])[:, -2:]
        h = drafting.read(ids[:, 5:7])
        if backbone.close(h, want):
            return ""
        # How far the same rounds otherwise among more rows: some models magnify that.
        twice = [x.repeat(2, 1) for x in (ids[:, :4], mask, ids[:, 4:7])]
        rounding = (_one_by_one(backbone, *twice)[:1, -2:] - want).abs().max()
        return "" if (h - want).abs().max() <= 8 * rounding else NOT_TAKEN_BACK

    return _try(lm, tried, NOT_TAKEN_BACK)


NOT_TAKEN_BACK = "its cache cannot take back what was read"


def supports_ragged(backbone: Backbone) -> bool:
    """Whether a `RaggedCache` gives the states that transformers gives to a batch padded on the
    left: full attention in every layer, tried out on two rows."""
    lm = backbone.lm
    kernel = lm.config.get_text_config(decoder=True)._attn_implementation
    if lm.config.model_type in SHORT_ONLY or kernel not in ("sdpa", "eager"):
        return False
    ids = _ids(backbone)

    def tried() -> bool:
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
        rest = torch.stack([ids[[4, 5, 6, 0]], ids[[5, 2, 7, 0]]])
        want_BKD = _one_by_one(backbone, prompts, mask, rest)
        return backbone.close(h_BKD, torch.stack([want_BKD[0, 1:3], want_BKD[1, 2:4]]))

    return "position_ids" in backbone.step_arguments and _try(lm, tried, False)


def _ids(backbone: Backbone) -> Tensor:
    return probe_ids(backbone.lm).view(-1)[:8]


def _arguments(backbone: Backbone, mask: Tensor) -> dict[str, Any]:
    """What `generate` prepares for prompts with this padding."""
    arguments: dict[str, Any] = {"attention_mask": mask, "use_cache": True}
    if "position_ids" in inspect.signature(backbone.lm.forward).parameters:
        arguments["position_ids"] = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    return arguments


def _one_by_one(backbone: Backbone, prompts: Tensor, mask: Tensor, rest_BK: Tensor) -> Tensor:
    """(B, K, D): the states of tokens after the prompts as transformers reads them."""
    cache = GrowingCache(backbone, _arguments(backbone, mask))
    cache.prefill([*prompts])
    return torch.cat([cache.read(token_B1) for token_B1 in rest_BK.split(1, dim=1)], dim=1)


def _try(lm: PreTrainedModel, tried: Callable[[], T], otherwise: T) -> T:
    """What it gives; whatever a foreign model raises on a cache that it does not know is an answer
    too."""
    try:
        with evaluation_mode(lm), torch.autocast(lm.device.type, enabled=False):
            return tried()
    except Exception as error:
        raise_if_out_of_memory(error)
        return otherwise
