"""What decoding needs of a model, and what it has found out about one: tried, measured or compiled
once, forgotten with it."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from nextlat.backbone import Backbone
from nextlat.decoding.cache import RaggedCache, supports_ragged
from nextlat.decoding.draft_length import AdaptiveLength, Costs
from nextlat.objectives import Objective

logger = logging.getLogger(__name__)


class Decodable(Protocol):
    """What decoding needs of an `ObjectiveModel`."""

    lm: Any

    @property
    def backbone(self) -> Backbone: ...

    @property
    def objective(self) -> Objective: ...

    def next_token_logits(self, h: Tensor) -> Tensor: ...

    def modules(self) -> Iterator[nn.Module]: ...


@dataclass
class Known:
    """What decoding has found out about one model, so that it is measured or compiled once: whether
    ragged batches work (by attention kernel and device), the adaptive draft lengths (by setting),
    and caches that compiled graphs are bound to."""

    ragged: dict[Any, bool] = field(default_factory=dict)
    lengths: dict[Any, AdaptiveLength] = field(default_factory=dict)
    caches: dict[Any, RaggedCache] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)


_known: WeakKeyDictionary[Any, Known] = WeakKeyDictionary()


def known(model: Decodable) -> Known:
    """The record of this model; forgotten with it."""
    return _known.setdefault(model, Known())


def costs_of(model: Decodable, rows: int, *, sampled: bool) -> Costs | None:
    """What "auto" has measured for batches of so many rows; None where it has not been used."""
    for setting, length in known(model).lengths.items():
        if setting[:2] == (rows, sampled):
            return length.costs
    return None


def batches(model: Decodable) -> bool:
    """Whether the rows of a batch can share a pass; otherwise they are decoded one after another,
    with the same output."""
    lm = model.lm
    key = (lm.config._attn_implementation, str(lm.device), lm.dtype)
    found = known(model).ragged
    if key not in found:
        found[key] = supports_ragged(model.backbone)
    return found[key]


def tell_once(model: Decodable, sentence: str) -> None:
    """A warning that one model gives once."""
    told = known(model).told
    if sentence not in told:
        told.add(sentence)
        logger.warning(sentence)
