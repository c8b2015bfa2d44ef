"""The output head of a causal LM as a function, whatever the model does in it: found by running the
model's own `forward` with something else in the place of its transformer.

Shapes: B rows, T tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import PreTrainedModel


def size(table: Any) -> int:
    """Tokens in an embedding table or linear map to logits, whatever is put around it."""
    for name in ("num_embeddings", "out_features"):
        if isinstance(number := getattr(table, name, None), int):
            return number
    return len(table.weight)


def is_frozen(module: nn.Module) -> bool:
    """Whether no weight of it can move."""
    return not any(parameter.requires_grad for parameter in module.parameters())


class Head:
    """The output head as a function of the hidden state: (..., D) -> (..., V), trainable or frozen.

    A plain linear head has `weight` (V, D) and `bias`. A head that is linear, but not plain (with
    an adapter, a hook, or quantised) has None there and is called. Any other (soft-capping, scaling
    by a constant, layers of its own) too, and is reproduced by running the model's own `forward`
    with its transformer replaced by the given states.
    """

    def __init__(
        self, lm: PreTrainedModel, transformer: nn.Module, *, linear: bool, frozen: bool
    ) -> None:
        self._lm, self._transformer = lm, transformer
        self._linear, self._frozen = linear, frozen

    @property
    def weight(self) -> Tensor | None:
        plain = self._plain()
        return None if plain is None else plain[0]

    @property
    def bias(self) -> Tensor | None:
        plain = self._plain()
        return None if plain is None else plain[1]

    @property
    def _module(self) -> Any:
        """The output embeddings, looked up anew: they can be resized, tied, wrapped or replaced at
        any time."""
        return self._lm.get_output_embeddings()

    def _plain(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias, where they are all there is."""
        module = self._module
        if not (self._linear and _is_plain(module)):
            return None
        table = _Frozen(module) if self._frozen else module
        return table.weight, getattr(table, "bias", None)

    def parameters(self) -> list[nn.Parameter]:
        """All that belong to the head: its own, and those that it shares with the embeddings."""
        inside = {id(p) for p in self._transformer.parameters()}
        own = [p for p in self._lm.parameters() if id(p) not in inside]
        return list({id(p): p for p in [*own, *self._module.parameters()]}.values())

    def __call__(self, h: Tensor) -> Tensor:
        if (plain := self._plain()) is not None:
            weight, bias = plain
            return F.linear(h.to(weight.dtype), weight, bias)
        if self._linear:
            table = _Frozen(self._module) if self._frozen else self._module
            dtypes = [p.dtype for p in self._module.parameters() if p.is_floating_point()]
            logits: Tensor = table(h.to(next(iter(dtypes), self._lm.dtype)))
            return logits
        states = h.reshape(1, -1, h.shape[-1]).to(next(self._lm.parameters()).dtype)
        given: Any = Around(
            self._lm, self._transformer, lambda *_, **__: _States(states), frozen=self._frozen
        )
        ids = torch.zeros(states.shape[:2], dtype=torch.long, device=h.device)
        logits = type(self._lm).forward(given, input_ids=ids, use_cache=False).logits
        return logits.reshape(*h.shape[:-1], logits.shape[-1])


def _is_plain(module: nn.Module) -> bool:
    """Whether its parameters say all that it does."""
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) in (nn.Linear, nn.Embedding) and not hooked


class HeadRows:
    """Some rows of a frozen head, as they are now: (..., D) -> (..., n) logits of n tokens alone.

    Only those are computed where the head is linear; of any other, all are, and n are taken.

    Args:
        head: the whole one, frozen.
        ids: (n,) tokens.
        wide: at least in fp32, for training.
    """

    def __init__(self, head: Head, ids: Tensor, *, wide: bool = False) -> None:
        self.head, self.ids, weight, bias = head, ids, head.weight, head.bias
        dtype = None
        if weight is not None:
            dtype = torch.promote_types(weight.dtype, torch.float32) if wide else weight.dtype
        self.weight = None if weight is None else weight.index_select(0, ids).to(dtype)
        self.bias = None if bias is None else bias.index_select(0, ids).to(dtype)

    def __call__(self, h: Tensor) -> Tensor:
        if self.weight is None:
            return self.head(h).index_select(-1, self.ids)
        return F.linear(h.to(self.weight.dtype), self.weight, self.bias)


class Around:
    """Stands in for a causal LM inside its own `forward`: where that calls its transformer (or, as
    some do, the decoder inside it), `call` is called with it and its arguments; everything else is
    the real model's, frozen or not."""

    def __init__(
        self,
        model: nn.Module,
        transformer: nn.Module,
        call: Callable[..., Any],
        *,
        frozen: bool = False,
    ) -> None:
        self._model, self._transformer = model, transformer
        self._call, self._frozen = call, frozen

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._call(self._model, *arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._model, name)
        inside = self._model is self._transformer and isinstance(value, PreTrainedModel)
        if value is self._transformer or inside:
            return Around(value, value, self._call, frozen=self._frozen)
        return _Frozen(value) if self._frozen and isinstance(value, nn.Module) else value


class _Frozen:
    """A module with its parameters detached, never copied."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        module: Any = self._module
        if type(module) is nn.Linear and _is_plain(module):
            return F.linear(arguments[0], self.weight, self.bias)
        detached = {name: parameter.detach() for name, parameter in module.named_parameters()}
        return functional_call(module, detached, arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if isinstance(value, nn.Module):
            return _Frozen(value)
        return value.detach() if isinstance(value, nn.Parameter) else value


class _States:
    """What a transformer returns, with nothing in it but the states (mixture-of-experts forwards
    also read router logits)."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


class Read(Exception):
    """Leaves the `forward` of a causal LM once its transformer has run; no head is needed."""

    def __init__(self, output: Any) -> None:
        self.output = output
