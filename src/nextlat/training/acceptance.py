"""How often a drafted token would be accepted, measured while the drafter trains beside a frozen
model: an over-fitted one does not show in the loss."""

from dataclasses import replace

from torch import Tensor

from nextlat.batch import Batch
from nextlat.model import ObjectiveModel


def acceptance(model: ObjectiveModel, batch: dict[str, Tensor]) -> Tensor | None:
    """`Objective.acceptance` of a batch as `ObjectiveModel.forward` takes it."""
    given = {name: value for name, value in batch.items() if name != "states"}
    inputs = replace(Batch.from_inputs(**given), states=batch.get("states"))
    return model.objective.acceptance(inputs)


def by_position(accepted: Tensor | int) -> dict[str, float]:
    """For the log: shares of the i-th drafted tokens, from the sum of what `acceptance` gave; none
    from 0."""
    if isinstance(accepted, int):
        return {}
    kept, asked = accepted.tolist()
    shares = (a / b if b else 0.0 for a, b in zip(kept, asked, strict=True))
    return {f"acceptance_{i}": share for i, share in enumerate(shares, start=1)}
