"""What one training batch means: its documents, its padding, and two masks.

`labels == -100` removes a token from the token-level losses only; padding and document boundaries
remove positions from everything. The two are never merged: both are turned here, once per batch,
into boolean vectors over the N positions, from which every loss of every objective is built.

Shapes: B rows, T tokens per row, N = B*T positions in row-major order, d horizon.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nextlat.errors import NextLatError

IGNORE = -100  # the label that transformers leaves out of the cross-entropy


@dataclass(frozen=True, eq=False)
class RolloutStep:
    """Step i of the rollouts that start at every position.

    Attributes:
        kept: (M,) the rows of step i - 1 whose rollout is still inside its document.
        state: (M,) the position s = t + i that each of them has reached.
        scored: (K,) those among the M whose state has a next-token loss of its own; only they
            enter the KL.
    """

    kept: Tensor
    state: Tensor
    scored: Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """The four arguments of a `transformers` causal LM in canonical form.

    Attributes:
        input_ids: (B, T) tokens.
        labels: (B, T), aligned with `input_ids` and shifted inside the loss as transformers does;
            -100 = no token-level loss.
        position_ids: (B, T), counting up by one inside a document, 0 on padding; None when every
            row is one unpadded document.
        valid: (B, T) bool, False on padding; None when there is none.
        packed: whether a row may hold several documents (the caller gave position_ids).
        states: (B, T, D) hidden states, where they are known (of a frozen transformer).
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None = None
    valid: Tensor | None = None
    packed: bool = False
    states: Tensor | None = None

    @classmethod
    def from_inputs(
        cls,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> "Batch":
        """The canonical batch of what a data collator gives.

        A document boundary is explicit, never guessed from tokens: it is where `position_ids` does
        not go up by one. Without `position_ids`, every row is one document, counted from its first
        real token. Every padded token (attention_mask 0), on the left as on the right, becomes a
        document of its own.

        Raises:
            NextLatError: an argument whose shape is not that of `input_ids`.
        """
        others = {"labels": labels, "position_ids": position_ids, "attention_mask": attention_mask}
        for name, x in others.items():
            if x is not None and x.shape != input_ids.shape:
                raise NextLatError(
                    f"{name} has shape {tuple(x.shape)} but input_ids has "
                    f"{tuple(input_ids.shape)}: give one value per token."
                )
        valid = None if attention_mask is None else attention_mask.bool()
        packed = position_ids is not None
        if valid is not None:
            position_ids = valid.cumsum(-1) - 1 if position_ids is None else position_ids
            position_ids = position_ids.masked_fill(~valid, 0)  # 0, 0, 0: nothing goes up by one
        return cls(input_ids, labels, position_ids, valid, packed)

    @cached_property
    def linked(self) -> Tensor:
        """(N,) bool: this position and the next are real tokens of one document (never true in the
        last column)."""
        link_BT = torch.ones_like(self.input_ids, dtype=torch.bool)
        link_BT[:, -1:] = False
        if self.position_ids is not None:
            link_BT[:, :-1] &= self.position_ids[:, 1:] == self.position_ids[:, :-1] + 1
        if self.valid is not None:
            link_BT[:, :-1] &= self.valid[:, 1:] & self.valid[:, :-1]
        return link_BT.flatten()

    @cached_property
    def targets(self) -> Tensor:
        """(N,) the label that the state at each position is to predict; -100 in the last column."""
        return torch.nn.functional.pad(self.labels[:, 1:], (0, 1), value=IGNORE).flatten()

    @cached_property
    def scored(self) -> Tensor:
        """(N,) bool: the state here has a next-token loss, i.e. the next token belongs to the same
        document and has a label."""
        return self.linked & (self.targets != IGNORE)

    @cached_property
    def scored_positions(self) -> Tensor:
        """(K,) the positions where `scored` is true."""
        return self.scored.nonzero().squeeze(1)

    def rollout(self, horizon: int) -> Sequence[RolloutStep]:
        """The d steps of the rollouts that start at *every* position of the batch.

        Validity is cumulative: a rollout that would need a token of another document is dropped,
        and with it every later step. Worked example: documents of 3 and 2 tokens in one row,
        positions 0 1 2 0 1. Step 1 reaches states 1, 2, 4 (from 0, 1, 3), step 2 reaches state 2
        (from 0), step 3 none.
        """
        steps = self._steps
        while len(steps) < horizon:
            before = steps[-1].state if steps else self._positions
            kept = self.linked[before].nonzero().squeeze(1)
            state = before[kept] + 1
            steps.append(RolloutStep(kept, state, self.scored[state].nonzero().squeeze(1)))
        return steps[:horizon]

    @cached_property
    def _positions(self) -> Tensor:
        return torch.arange(self.input_ids.numel(), device=self.input_ids.device)

    @cached_property
    def _steps(self) -> list[RolloutStep]:
        """What `rollout` has found so far."""
        return []

    def ahead(self, horizon: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For i = 1..d: the positions t (M,) that are to predict x_{t+1+i}, and its labels (M,).

        They are those for which t..t+1+i lie in one document and the last of them has a label.
        """
        for i, step in enumerate(self.rollout(horizon), start=1):
            state = step.state[step.scored]
            yield state - i, self.targets[state]

    def documents(self) -> tuple[Tensor, Tensor]:
        """(G,) first position and (G,) length of every document; padding belongs to none."""
        begins, ends = torch.ones_like(self.linked), ~self.linked
        begins[1:] = ends[:-1]
        if self.valid is not None:
            begins, ends = begins & self.valid.flatten(), ends & self.valid.flatten()
        start = begins.nonzero().squeeze(1)
        return start, ends.nonzero().squeeze(1) - start + 1

    def reversed(self) -> "Batch":
        """Every row read from its end; positions count from the last token of each document."""
        positions = None
        if self.position_ids is not None:
            n, N = self._positions, self.input_ids.numel()
            # The end of the document that n lies in: the nearest position that links to no next.
            ends = torch.where(self.linked, N, n).flip(0).cummin(0).values.flip(0)
            positions = (ends - n).view_as(self.input_ids).flip(1)
        valid = None if self.valid is None else self.valid.flip(1)
        return Batch(self.input_ids.flip(1), self.labels.flip(1), positions, valid, self.packed)
