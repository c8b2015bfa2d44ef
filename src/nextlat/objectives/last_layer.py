"""The last decoder layer of any causal LM and the norm after it, to be copied and run again: what
multi-token prediction is made of.

As in `backbone`, nothing goes by the names of modules: all is found out by watching a forward pass.

Shapes: B rows, T tokens, D width.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from nextlat.backbone import Backbone, evaluation_mode, probe_ids
from nextlat.errors import NextLatError


@dataclass(frozen=True)
class LastCall:
    """What the last decoder layer was given in one forward pass.

    Attributes:
        trunk: (B, T, D) states.
        arguments: the other positional ones.
        keywords: the masks, positions and cache.
    """

    trunk: Tensor
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def run(self, layer: nn.Module, norm: nn.Module, trunk_BTD: Tensor | None = None) -> Tensor:
        """(B, T, D) states of another layer and norm instead of the last ones, on the same trunk or
        the one given."""
        trunk_BTD = self.trunk if trunk_BTD is None else trunk_BTD
        return norm(_states(layer(trunk_BTD, *self.arguments, **self.keywords)))


class LastLayer:
    """The last decoder layer and the norm after it, found by watching one forward pass; and what
    the layer is called with.

    It goes on watching: the last layer's call of the newest forward pass is kept until the next
    one, or until it is taken. The trunk comes without its graph, unless the pass ran inside
    `with_graph`.

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
        base = backbone.lm.base_model
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
        if self._call is None or not backbone.close(self.take().run(layer, norm), h_BTD):
            return None
        return layer, norm

    def _watch(self, layer: nn.Module) -> Any:
        """Keep every call of this layer from now on; the handle ends that."""
        return layer.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(
        self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        keywords = dict(keywords)
        trunk, *rest = arguments if arguments else (keywords.pop("hidden_states"),)
        self._call = LastCall(trunk if self._keep_graph else trunk.detach(), tuple(rest), keywords)

    @contextmanager
    def with_graph(self) -> Iterator[None]:
        """Forward passes inside keep the graph of their trunk, so that gradients can go back
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
            if not all(backbone.close(call.run(*head), h_BTD) for head in made):
                raise NextLatError(
                    f"a copy of the last layer of {type(backbone.lm).__name__} gives other states "
                    "than the layer: multi-token prediction does not support this architecture."
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
                cache = DynamicCache(config=backbone.cache_config(len(heads)))
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
