"""Where a row ends: token by token as `transformers` would have asked, for several tokens that
arrive at once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria


@dataclass
class Stopping:
    """When to stop.

    Attributes:
        new_tokens: a row never gets more.
        ends: end-of-sequence tokens; the one that ends a row is its last.
        criteria: any others, asked about each new token's own prefix, (1, T) as `transformers`
            would have seen it.
    """

    new_tokens: int
    ends: frozenset[int] = frozenset()
    criteria: Sequence[Any] = field(default=())

    @classmethod
    def from_criteria(cls, criteria: Iterable[Any], prompt_length: int) -> "Stopping":
        """From the list that `generate` has prepared for prompts of so many tokens, padding
        included."""
        lengths, ends, others = [], frozenset[int](), []
        for criterion in criteria:
            if type(criterion) is MaxLengthCriteria:
                lengths.append(criterion.max_length - prompt_length)
            elif type(criterion) is EosTokenCriteria:
                ends |= frozenset(criterion.eos_token_id.tolist())
            else:
                others.append(criterion)
        return cls(min(lengths), ends, others)

    def cut(
        self, tokens: Sequence[int], prefix: Sequence[int], device: torch.device
    ) -> tuple[Sequence[int], bool]:
        """The part of some new tokens that belongs to the row, and whether it ends there.

        Args:
            prefix: what the row has before them, prompt included (read only where there are
                `criteria`).
        """
        for i, token in enumerate(tokens):
            if token in self.ends or (
                self.criteria and self._asked([*prefix, *tokens[: i + 1]], device)
            ):
                return tokens[: i + 1], True
        return tokens, False

    def _asked(self, prefix: list[int], device: torch.device) -> bool:
        ids: Tensor = torch.tensor([prefix], device=device)
        return any(bool(criterion(ids, None).all()) for criterion in self.criteria)
