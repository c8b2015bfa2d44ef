"""What decoding tries out, times or compiles once for a model, and uses again in later calls."""

import logging
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch

from nextlat.decoding.cache import RaggedCache, drafting_obstacle, supports_ragged
from nextlat.decoding.draft_length import AdaptiveLength, Costs
from nextlat.objectives import Objective

logger = logging.getLogger(__name__)


@dataclass
class Prepared:
    """For one model in one state, see `_state`.

    Attributes:
        shares_passes: whether rows of unequal length can share a forward pass; None = not tried.
        obstacle: why a single row cannot draft, "" if it can; None = not tried.
        lengths: draft lengths that adapt, with their measured costs, by setting of the call.
        caches: which compiled graphs are bound to, by size; taken out while in use.
        warnings: sentences that have been logged.
    """

    shares_passes: bool | None = None
    obstacle: str | None = None
    lengths: dict[Any, AdaptiveLength] = field(default_factory=dict)
    caches: dict[Any, RaggedCache] = field(default_factory=dict)
    warnings: set[str] = field(default_factory=set)


_prepared: WeakKeyDictionary[Objective, dict[Any, Prepared]] = WeakKeyDictionary()


def prepared(objective: Objective) -> Prepared:
    """The record of this objective and its model as they are now; forgotten with them."""
    states, state = _prepared.setdefault(objective, {}), _state(objective)
    if state not in states:
        for other in states.values():
            other.caches.clear()  # the memory of a state that the model may have left for good
        states[state] = Prepared()
    return states[state]


def _state(objective: Objective) -> Any:
    """What the findings depend on and a user may change between two calls: kernel, device, number
    format, and the kinds of modules, since adapters come and go."""
    lm = objective.backbone.lm
    mixed = torch.is_autocast_enabled(lm.device.type) and torch.get_autocast_dtype(lm.device.type)
    modules = hash(tuple(type(module) for module in lm.modules()))
    kernel = lm.config._attn_implementation
    return kernel, str(lm.device), lm.dtype, mixed, torch.is_inference_mode_enabled(), modules


def shares_passes(objective: Objective) -> bool:
    """Whether the rows of a batch can share a pass while they draft; otherwise they are decoded one
    after another, with the same output."""
    record = prepared(objective)
    if record.shares_passes is None:
        record.shares_passes = supports_ragged(objective.backbone)
    return record.shares_passes


def obstacle(objective: Objective) -> str:
    """Why the model cannot take back a draft that it has read, as a clause; "" if it can."""
    record = prepared(objective)
    if record.obstacle is None:
        record.obstacle = drafting_obstacle(objective.backbone, objective.cached_layers)
    return record.obstacle


def measured_costs(objective: Objective, rows: int, *, sampled: bool) -> Costs | None:
    """What "auto" has measured for batches of so many rows; None where it has not been used."""
    for setting, length in prepared(objective).lengths.items():
        if setting[:2] == (rows, sampled):
            return length.costs
    return None


def warn_once(objective: Objective, sentence: str) -> None:
    """Log a warning, the first time that it concerns this model."""
    warnings = prepared(objective).warnings
    if sentence not in warnings:
        warnings.add(sentence)
        logger.warning(sentence)
