"""What one training batch means: documents, padding and the two masks of next-latent prediction.

Shapes: B rows, T tokens a row, N = B*T positions in row-major order, d horizon.

Two masks, never one (spec: "Masks" of the method). `labels == -100` removes a token from the
token-level losses only; padding and document boundaries remove positions from everything. Both are
turned here into two boolean vectors over the N positions, and every loss of every objective is
built from those.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nextlat.errors import NextLatError

IGNORE = -100  # the label that transformers leaves out of the cross-entropy


@dataclass(frozen=True)
class RolloutStep:
    """Step i of the rollouts that start at every position: which are still inside their document,
    and where they stand.

    `kept` indexes the rows of step i - 1 that survive (M,), `state` is the position s = t + i that
    each survivor has reached (M,), `scored` indexes the survivors whose state s has a next-token
    loss of its own (K <= M,): only those enter the KL.
    """

    kept: Tensor
    state: Tensor
    scored: Tensor


@dataclass(frozen=True)
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
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor | None = None
    valid: Tensor | None = None
    packed: bool = False

    @classmethod
    def from_inputs(
        cls,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> "Batch":
        """Canonical batch from what a data collator gives.

        A document boundary is explicit, never guessed from tokens: it is a place where
        `position_ids` does not go up by one. Without `position_ids`, every row is one document,
        counted from its first real token. Every padded token (attention_mask 0) becomes a document
        of its own, on the left as on the right.

        Raises:
            NextLatError: a shape other than (B, T), or a mask that is not 2-D.
        """
        for name, x in {
            "labels": labels,
            "position_ids": position_ids,
            "attention_mask": attention_mask,
        }.items():
            if x is not None and x.shape != input_ids.shape:
                raise NextLatError(
                    f"{name} has shape {tuple(x.shape)} but input_ids has {tuple(input_ids.shape)}: give one value per token."
                )
        valid = None if attention_mask is None else attention_mask.bool()
        packed = position_ids is not None
        if valid is not None:
            position_ids = valid.cumsum(-1) - 1 if position_ids is None else position_ids
            position_ids = position_ids.masked_fill(~valid, 0)  # 0, 0, 0: nothing goes up by one
        return cls(input_ids, labels, position_ids, valid, packed)

    def linked(self) -> Tensor:
        """(N,) bool: position n and the next one are real tokens of one document (never true in the
        last column)."""
        B, T = self.input_ids.shape
        link_BT = torch.zeros(B, T, dtype=torch.bool, device=self.input_ids.device)
        link_BT[:, :-1] = True
        if self.position_ids is not None:
            link_BT[:, :-1] &= self.position_ids[:, 1:] == self.position_ids[:, :-1] + 1
        if self.valid is not None:
            link_BT[:, :-1] &= self.valid[:, 1:] & self.valid[:, :-1]
        return link_BT.flatten()

    def scored(self) -> Tensor:
        """(N,) bool: the state at n has a next-token loss, i.e. token n + 1 belongs to its document
        and is labelled."""
        return self.linked() & (self.targets() != IGNORE)

    def targets(self) -> Tensor:
        """(N,) the label that the state at each position is to predict; -100 in the last column."""
        return torch.nn.functional.pad(self.labels[:, 1:], (0, 1), value=IGNORE).flatten()

    def rollout(self, horizon: int) -> Iterator[RolloutStep]:
        """The d steps of the rollouts that start at *every* position of the batch.

        Validity is cumulative by construction: a rollout that would need a token of another
        document is dropped, and with it every later step. Worked example: documents of 3 and 2
        tokens in one row, positions 0 1 2 0 1. Step 1 reaches states 1, 2, 4 (from 0, 1, 3), step 2
        reaches state 2 (from 0), step 3 none.
        """
        linked, scored = self.linked(), self.scored()
        state = torch.arange(linked.numel(), device=linked.device)
        for _ in range(horizon):
            kept = linked[state].nonzero().squeeze(1)
            state = state[kept] + 1
            yield RolloutStep(kept, state, scored[state].nonzero().squeeze(1))

    def ahead(self, horizon: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For i = 1..d: the positions t (M,) from which x_{t+1+i} is to be predicted, and its
        labels (M,).

        It is where t..t+1+i lie in one document and the last of them is labelled.
        """
        targets = self.targets()
        for i, step in enumerate(self.rollout(horizon), start=1):
            state = step.state[step.scored]
            yield state - i, targets[state]

    def documents(self) -> tuple[Tensor, Tensor]:
        """(G,) first position and (G,) length of every document; padding belongs to none."""
        linked = self.linked()
        begins, ends = torch.ones_like(linked), ~linked
        begins[1:] = ~linked[:-1]
        if self.valid is not None:
            begins, ends = begins & self.valid.flatten(), ends & self.valid.flatten()
        start = begins.nonzero().squeeze(1)
        return start, ends.nonzero().squeeze(1) - start + 1

    def reversed(self) -> "Batch":
        """Every row read from its end, every document with positions of its own from its last token
        on."""
        B, T = self.input_ids.shape
        positions = None
        if self.position_ids is not None:
            n = torch.arange(B * T, device=self.input_ids.device)
            end = (
                torch.where(self.linked(), B * T, n).flip(0).cummin(0).values.flip(0)
            )  # of the document that n lies in
            positions = (end - n).view(B, T).flip(1)
        valid = None if self.valid is None else self.valid.flip(1)
        return Batch(self.input_ids.flip(1), self.labels.flip(1), positions, valid, self.packed)
