"""Effective latent rank: how many directions a model's hidden states really use (arXiv 2511.05963).

Shapes: R rows, T tokens, D width.
"""

import torch
from torch import Tensor

from nextlat.backbone import evaluation_mode
from nextlat.batch import Batch
from nextlat.model import ObjectiveModel
from nextlat.results import Metric
from nextlat.scores import Score, effective_rank, jackknife_score, triangular_factor
from nextlat.tasks.task import NEXTLAT

EFFECTIVE_LATENT_RANK = Metric(
    name="effective_latent_rank",
    title="Effective latent rank",
    definition="Exponential of the entropy of the normalised singular values of the hidden states "
    "of held-out rows: how many dimensions they fill.",
    source=f"Roy & Vetterli 2007; {NEXTLAT}",
    unit="number",
    higher_is_better=False,
    items="groups of rows (jackknife)",
    published="effective_latent_rank",
)


def latent_rank(
    model: ObjectiveModel,
    input_ids: Tensor,
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    batch_size: int = 32,
    groups: int = 16,
) -> Score:
    """Effective rank of the hidden states of whole rows (in the paper 256 rows of 256 tokens).

    The states are the transformer's own, before an objective changes them, of every position that
    is not padding, prompts included. See `scores.effective_rank` for the definition. The error
    is a jackknife over groups of rows.

    Args:
        input_ids: (R, T) rows as a dataset packs them, as the next two are.
        position_ids: (R, T).
        attention_mask: (R, T).
        batch_size: rows in a forward pass.
        groups: of the jackknife, at most one per row.

    Raises:
        ValueError: states that are not finite.
    """
    groups = min(groups, len(input_ids))
    factors = []
    with evaluation_mode(model):
        for group in torch.arange(len(input_ids)).tensor_split(groups):
            states = []
            for rows in group.split(batch_size):
                ids = input_ids[rows].to(model.device)
                positions, mask = (
                    None if x is None else x[rows].to(model.device)
                    for x in (position_ids, attention_mask)
                )
                h_BTD = model.backbone.hidden(Batch.from_inputs(ids, ids, positions, mask))
                states.append(h_BTD.flatten(0, 1) if mask is None else h_BTD[mask.bool()])
            factors.append(triangular_factor(torch.cat(states)))
        value = effective_rank(torch.cat(factors))
        without = [
            effective_rank(torch.cat(factors[:i] + factors[i + 1 :])) if groups > 1 else value
            for i in range(groups)
        ]
    return jackknife_score(value, without)
