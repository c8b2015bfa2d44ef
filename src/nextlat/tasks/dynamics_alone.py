"""The latent dynamics model run alone, as a recurrent network: the transformer reads the first
tokens, and from its state there the dynamics go on, h' = p_psi(h, x) (arXiv 2511.05963).

Shapes: B rows, T tokens, D width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nextlat.model import ObjectiveModel
from nextlat.tasks.task import SequenceModel

Driver = Literal["transformer", "dynamics"]
DRIVERS: tuple[Driver, ...] = ("transformer", "dynamics")
DYNAMICS = "latent dynamics model alone"
ALONE_NOTE = (
    "The dynamics model run alone is compared with the transformer of the baseline at the same "
    "length."
)


def driver(model: ObjectiveModel, who: Driver, begun: int) -> SequenceModel | None:
    """Who reads a sequence: the transformer, or the latent dynamics alone; None if the model has
    none.

    Args:
        model: what is measured.
        who: reads it.
        begun: tokens that the transformer reads before the dynamics go on alone.
    """
    if who == "transformer":
        return model
    return DynamicsAlone(model, begun) if model.objective.max_draft_length is None else None


@dataclass
class LatentState:
    """What the latent dynamics remember: one state (B, D)."""

    h_BD: Tensor

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, as `transformers.Cache` does."""
        self.h_BD = self.h_BD[indices]


class DynamicsAlone(nn.Module):
    """See the module; a `SequenceModel`."""

    def __init__(self, model: ObjectiveModel, begun: int) -> None:
        super().__init__()
        self.model, self.begun = model, begun
        self.training = model.training

    @property
    def device(self) -> torch.device:
        """That of the model."""
        return self.model.device

    def step(
        self, input_ids: Tensor, past: LatentState | None = None
    ) -> tuple[Tensor, LatentState]:
        """See `SequenceModel`; the first call reads at least the tokens that the transformer is to
        read."""
        states: list[Tensor] = []
        if past is None:
            h_BTD, _ = self.model.step(input_ids[:, : self.begun])
            states, input_ids = list(h_BTD.unbind(1)), input_ids[:, self.begun :]
        h_BD = states[-1] if past is None else past.h_BD
        for token in input_ids.unbind(1):
            h_BD, _ = self.model.objective.draft(h_BD, token)
            states.append(h_BD)
        return torch.stack(states, dim=1), LatentState(h_BD)

    def next_token_logits(self, h: Tensor) -> Tensor:
        """See `SequenceModel`."""
        return self.model.next_token_logits(h)
