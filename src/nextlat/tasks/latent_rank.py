"""Effective latent rank of a model: how many directions its hidden states really use (arXiv
2511.05963).

Shapes: R rows, T tokens, D width.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nextlat.backbone import Backbone
from nextlat.batch import Batch
from nextlat.scores import Score, jackknife_score, rank_of_factor, triangular_factor
from nextlat.tasks.task import inference


class LatentModel(Protocol):
    """What the latent rank needs of a model: `backbone.hidden(batch) -> h_BTD`, the transformer's
    states of whole rows."""

    @property
    def backbone(self) -> Backbone: ...

    @property
    def device(self) -> torch.device: ...


def latent_rank(
    model: LatentModel,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    batch_size: int = 32,
    groups: int = 16,
) -> Score:
    """Effective rank of the hidden states of whole rows; 256 rows of 256 tokens in arXiv
    2511.05963. Lower is more compact.

    The states are the transformer's own, whatever an objective makes of them, of every position
    that is no padding, prompts included; see `metrics.effective_rank` for the definition. The error
    is a jackknife over `groups` groups of rows.

    Args:
        input_ids, position_ids, attention_mask: (R, T) rows as the dataset packs them.

    Raises:
        ValueError: states that are not finite.
    """
    groups = min(groups, len(input_ids))
    factors = []
    with inference(model):
        for group in np.array_split(np.arange(len(input_ids)), groups):
            states = []
            for first in range(0, len(group), batch_size):
                rows = torch.from_numpy(group[first : first + batch_size])
                ids, positions, mask = (
                    None if x is None else x[rows].to(model.device)
                    for x in (input_ids, position_ids, attention_mask)
                )
                assert ids is not None
                h_BTD = model.backbone.hidden(Batch.from_inputs(ids, ids, positions, mask))
                states.append(h_BTD.flatten(0, 1) if mask is None else h_BTD[mask.bool()])
            factors.append(triangular_factor(torch.cat(states)))
        value = rank_of_factor(torch.cat(factors))
        without = (
            [rank_of_factor(torch.cat(factors[:i] + factors[i + 1 :])) for i in range(groups)]
            if groups > 1
            else [value]
        )
    return jackknife_score(value, without)
