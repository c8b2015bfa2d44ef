"""The last decoder layer of any causal LM and the norm after it, to be copied and run again: what
multi-token prediction is made of.

As in `backbone`, nothing goes by the names of modules: all is found out by watching a forward pass.

Shapes: B rows, T tokens, D width.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import Cache

from nextlat.backbone import Backbone, evaluation_mode, probe_ids
from nextlat.errors import NextLatError


class LastCall:
    """What the last decoder layer was given in one forward pass.

    Attributes:
        states: the tensors with a graph, which gradients go back through: the (B, T, D) trunk, and
            whatever else some models hand to every layer. Without any, the trunk.
    """

    def __init__(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if not arguments:
            keywords = dict(keywords)
            arguments = (keywords.pop("hidden_states"),)
        self._leaves, self._tree = tree_flatten(
            (arguments, keywords), is_leaf=lambda x: isinstance(x, Cache)
        )
        of_graph = [i for i, x in enumerate(self._leaves) if _has_graph(x)]
        self._at = of_graph or [
            next(i for i, x in enumerate(self._leaves) if isinstance(x, Tensor))
        ]
        self.states: list[Tensor] = [self._leaves[i] for i in self._at]

    def detached(self) -> "LastCall":
        """The same without its graph."""
        leaves = [x.detach() if _has_graph(x) else x for x in self._leaves]
        return LastCall(*tree_unflatten(leaves, self._tree))

    def run(
        self, layer: nn.Module, norm: nn.Module, states: Sequence[Tensor] | None = None
    ) -> Tensor:
        """(B, T, D) states of another layer and norm in the place of the last ones, on what those
        were given, or with other tensors in the place of `states`."""
        leaves = list(self._leaves)
        for i, x in zip(self._at, self.states if states is None else states, strict=True):
            leaves[i] = x
        arguments, keywords = tree_unflatten(leaves, self._tree)
        return norm(_states(layer(*arguments, **keywords)))


def _reaches(out: Tensor, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether gradients go from here to any of the parameters."""
    wanted = [p for p in parameters if p.requires_grad]
    if not wanted or not out.requires_grad:
        return False
    grads = torch.autograd.grad(out.sum(), wanted, allow_unused=True)
    return any(grad is not None for grad in grads)


def _has_graph(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


class LastLayer:
    """The last decoder layer and the norm after it, found by watching one forward pass; and what
    the layer is called with.

    It goes on watching: the last layer's call of the newest forward pass is kept until the next
    one, or until it is taken. It comes without its graph, unless the pass ran inside `with_graph`.

    Attributes:
        layer, norm: the two modules of the LM.

    Raises:
        NextLatError: a model that does not end in a list of layers and one norm.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._call: LastCall | None = None
        self._keep_graph = False
        with evaluation_mode(backbone.lm):
            found = self._find(backbone)
        if found is None:
            raise NextLatError(
                f"{type(backbone.lm).__name__} does not end in one decoder layer and one norm that "
                "could be repeated: multi-token prediction does not support this architecture."
            )
        self.layer, self.norm = found
        self._handle = self._watch(self.layer)

    def _find(self, backbone: Backbone) -> tuple[nn.Module, nn.Module] | None:
        base = backbone.transformer
        named = {n: m for n, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
        outer = [m for n, m in named.items() if not any(n.startswith(f"{o}.") for o in named)]
        if not outer:
            return None
        layer = max(outer, key=len)[-1]
        outputs: list[Tensor] = []
        readers: list[nn.Module] = []  # of what the last layer gives: its norm, if there is one

        def after(module: nn.Module, arguments: Any, output: Any) -> None:
            if module is layer:
                outputs.append(_states(output))
            elif outputs and arguments and arguments[0] is outputs[-1]:
                readers.append(module)

        inside = set(layer.modules()) - {layer}
        handles = [m.register_forward_hook(after) for m in base.modules() if m not in inside]
        handles.append(self._watch(layer))
        try:
            h_BTD = backbone.states(probe_ids(backbone.lm))
        finally:
            for handle in handles:
                handle.remove()
        norm = readers[0] if len(readers) == 1 else nn.Identity()
        ends_so = self._call is not None and self._repeats(
            backbone, self.take(), layer, norm, h_BTD
        )
        return (layer, norm) if ends_so else None

    @staticmethod
    def _repeats(
        backbone: Backbone, call: LastCall, layer: nn.Module, norm: nn.Module, h_BTD: Tensor
    ) -> bool:
        try:
            return backbone.close(call.run(layer, norm), h_BTD)
        except Exception:  # whatever a foreign layer raises when it is run once more
            return False

    def _watch(self, layer: nn.Module) -> Any:
        """Keep every call of this layer from now on; the handle ends that."""
        return layer.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        call = LastCall(arguments, keywords)
        self._call = call if self._keep_graph else call.detached()

    @contextmanager
    def with_graph(self) -> Iterator[None]:
        """Forward passes inside keep the graph behind the call, so that gradients can go back
        through it."""
        self._keep_graph = True
        try:
            yield
        finally:
            self._keep_graph = False

    def take(self) -> LastCall:
        """The newest call, which is then forgotten."""
        call, self._call = self._call, None
        assert call is not None, "no forward pass of the transformer came before"
        return call

    def copies(self, backbone: Backbone, count: int) -> list[tuple[nn.Module, nn.Module]]:
        """Trainable copies of layer and norm; copy i (from 1) keeps its keys and values i layers
        after the last one's.

        Raises:
            NextLatError: a copy does not do what the last layer does.
        """
        self._handle.remove()  # the hook is not to be copied
        made = [(copy.deepcopy(self.layer), copy.deepcopy(self.norm)) for _ in range(count)]
        self._handle = self._watch(self.layer)
        for i, (layer, norm) in enumerate(made, start=1):
            for module in layer.modules():
                index: Any = getattr(module, "layer_idx", None)  # in a cache; checked in `caches`
                if isinstance(index, int):
                    module.layer_idx = index + i  # type: ignore[assignment]
            for parameter in (*layer.parameters(), *norm.parameters()):
                parameter.requires_grad_(True)  # also where the LM is frozen
        with evaluation_mode(backbone.lm, *(layer for layer, _ in made)):
            h_BTD = backbone.states(probe_ids(backbone.lm))
            call = self.take()
            if not all(self._repeats(backbone, call, *head, h_BTD) for head in made):
                raise NextLatError(
                    f"a copy of the last layer of {type(backbone.lm).__name__} gives other states "
                    "than the layer: multi-token prediction does not support this architecture."
                )
            with torch.enable_grad(), self.with_graph():
                backbone.states(probe_ids(backbone.lm))
                call = self.take()
                out = call.run(*made[0], [x.detach() for x in call.states])
                beyond = _reaches(out, backbone.transformer.parameters())
            if beyond:
                raise NextLatError(
                    f"the last layer of {type(backbone.lm).__name__} reads keys and values of "
                    "others: multi-token prediction does not support this architecture."
                )
        return made

    def caches(self, backbone: Backbone, heads: Sequence[tuple[nn.Module, nn.Module]]) -> bool:
        """Whether copies read a sequence in two cached pieces as in one."""
        ids = probe_ids(backbone.lm)

        def states() -> Tensor:
            call = self.take()
            return torch.cat([call.run(*head) for head in heads], dim=-1)

        with evaluation_mode(backbone.lm, *(module for head in heads for module in head)):
            try:
                backbone.states(ids)
                whole = states()
                cache = backbone.new_cache(len(heads))
                pieces = []
                for piece in (ids[:, :3], ids[:, 3:]):
                    backbone.step(piece, cache)
                    pieces.append(states())
                return backbone.close(torch.cat(pieces, dim=1), whole)
            except Exception:  # whatever a foreign layer or cache raises: it trains only
                return False


def _states(output: Any) -> Tensor:
    """The states in what a decoder layer returns (older versions of some return a tuple)."""
    return output if isinstance(output, Tensor) else output[0]
