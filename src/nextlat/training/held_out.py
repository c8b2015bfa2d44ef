"""What is logged of held-out rows: the objective's parts, and how often a drafted token would be
accepted (an over-fitted drafter does not show in the loss)."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset

from nextlat.backbone import evaluation_mode
from nextlat.losses import add_counts
from nextlat.model import ObjectiveModel
from nextlat.training import ranks
from nextlat.training.cached_states import ROW, Item

# In batches of TRL that are packed: document boundaries once more, for kernels that we do not use.
_BOUNDARIES = {"seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
ACCEPTANCE_BATCHES = 8  # held-out ones at which it is measured


def collate(items: list[Item]) -> Item:
    """Rows of equal length to a batch; nothing is guessed or converted."""
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


def model_inputs(batch: Item, *, numbered: bool = False) -> Item:
    """A batch as an objective model takes it: boundaries are in `position_ids` alone, and rows
    have no numbers (unless asked for)."""
    repeated = _BOUNDARIES if "position_ids" in batch else set()
    dropped = repeated | (set() if numbered else {ROW})
    return {name: x for name, x in batch.items() if name not in dropped}


def evaluation_loss(
    model: ObjectiveModel,
    dataset: Dataset[Item],
    batch_size: int,
    collate_fn: Callable[[list[Any]], Item] = collate,
    states: Callable[[Item], Item] = lambda batch: batch,
) -> dict[str, float]:
    """Means of the objective and its named parts over a whole dataset, each over its own count
    (next_token: nats per token).

    The counts are taken over the dataset in a first pass, so that uneven batches weigh no more than
    their tokens. Where several processes have met, the batches are dealt out among them.

    Args:
        model: evaluated as it is.
        dataset: all of it, on every process.
        batch_size: rows of a batch.
        collate_fn: rows to a batch.
        states: adds the hidden states to a batch, where they are known.
    """
    several = ranks.several()
    rank, processes = (distributed.get_rank(), distributed.get_world_size()) if several else (0, 1)
    batches = DataLoader(dataset, batch_size, collate_fn=collate_fn)
    counts = add_counts([model.counts(**model_inputs(batch)) for batch in batches])
    counts = {name: count.to(model.device) for name, count in counts.items()}
    sums: dict[str, Tensor] = {}
    accepted: Tensor | int = 0
    dealt, number = iter(batches), rank
    with evaluation_mode(model):
        while hand := list(islice(dealt, processes)):
            # One that has none of its own repeats another: weights in shards need all processes.
            ours = rank < len(hand)
            batch = model_inputs(hand[rank if ours else -1], numbered=True)
            batch = states({k: x.to(model.device) for k, x in batch.items()})
            out = model(**model_inputs(batch), counts=counts)
            for name, value in {"loss": out.loss, **out.losses}.items():
                sums[name] = sums.get(name, 0) + ours * value.detach().double()
            asked = model.acceptance(**batch) if number - rank < ACCEPTANCE_BATCHES else None
            if asked is not None:
                accepted = accepted + asked * (ours and number < ACCEPTANCE_BATCHES)
            number += processes
    for value in (*sums.values(), accepted) if several else ():
        if isinstance(value, Tensor):
            distributed.all_reduce(value)
    return {name: value.item() for name, value in sums.items()} | by_position(accepted)


def by_position(accepted: Tensor | int) -> dict[str, float]:
    """For the log: shares of the i-th drafted tokens, from the sum of what `Objective.acceptance`
    gave; none from 0."""
    if isinstance(accepted, int):
        return {}
    kept, asked = accepted.tolist()
    shares = (a / b if b else 0.0 for a, b in zip(kept, asked, strict=True))
    return {f"acceptance_{i}": share for i, share in enumerate(shares, start=1)}
