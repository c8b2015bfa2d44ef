"""What decoding did: cycles, drafted and accepted tokens, acceptance by position, and where the
time went."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from torch import Tensor


@dataclass(frozen=True)
class Cycle:
    """What one forward pass of the transformer brought to one row: `tokens` = the `accepted`
    leading `drafted` ones and, unless the output ends before it, one of the transformer's own.

    `scores` and `logits`, (tokens, V), are there when they were asked for: processed, and as the
    model gave them.
    """

    drafted: tuple[int, ...]
    accepted: int
    tokens: tuple[int, ...]
    scores: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class Pass:
    """One forward pass over the whole batch: a `Cycle` for each row, None for rows that had ended
    before; and its seconds."""

    cycles: tuple[Cycle | None, ...]
    prefill: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    measure: float = 0.0


@dataclass
class GenerationStats:
    """What `generate` did, summed over its rows; two of them add up with `+`.

    Attributes:
        sequences: rows decoded.
        tokens: new tokens returned; an end-of-sequence token counts, padding does not.
        passes: forward passes of the transformer after the prefill, each over all rows that were
            decoded together.
        cycles: the same counted for every row: one that has ended takes part in a pass no more.
        drafted: drafted tokens that were verified.
        accepted: drafted tokens that are in the output.
        drafted_by_position: cycles that drafted an i-th token (index i - 1); drafts get shorter
            near the end.
        accepted_by_position: cycles whose i-th drafted token is in the output, so all before it
            too.
        tried_by_position: cycles that drafted an i-th token and kept all before it.
        seconds: wall-clock time of everything.
        prefill_seconds, draft_seconds, verify_seconds: of reading the prompts, drafting, and the
            passes with the acceptance tests; a compiled cycle is one piece, counted as
            verification.
        measure_seconds: of timing the machine for draft_length="auto", once for a setting. The rest
            is `overhead_seconds`.
    """

    sequences: int = 0
    tokens: int = 0
    passes: int = 0
    cycles: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    tried_by_position: list[int] = field(default_factory=list)
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    measure_seconds: float = 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per cycle, the bonus or residual token included (1 for plain decoding; 0 without a
        cycle).

        The "accepted tokens" that the NextLat paper reports leave out the transformer's own: see
        `accepted_per_cycle`. They are this minus one, except that a cycle which a drafted
        end-of-sequence token closes has no token of the transformer's own.
        """
        return (self.tokens - self.sequences) / self.cycles if self.cycles else 0.0

    @property
    def accepted_per_cycle(self) -> float:
        """Accepted drafted tokens per cycle, the transformer's own token not counted (0 without a
        cycle)."""
        return self.accepted / self.cycles if self.cycles else 0.0

    @property
    def drafted_per_cycle(self) -> float:
        return self.drafted / self.cycles if self.cycles else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted (0 where nothing was drafted)."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of the i-th drafted tokens that were accepted; not conditional on those before,
        hence never rising by much where the length is fixed. With an adaptive length, later places
        are only drafted where they are likely."""
        return [
            kept / made
            for kept, made in zip(self.accepted_by_position, self.drafted_by_position, strict=True)
        ]

    @property
    def conditional_acceptance(self) -> list[float]:
        """Share of the i-th drafted tokens that were accepted, among those whose predecessors were."""
        return [
            kept / max(n, 1)
            for kept, n in zip(self.accepted_by_position, self.tried_by_position, strict=True)
        ]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def overhead_seconds(self) -> float:
        known = (
            self.prefill_seconds + self.draft_seconds + self.verify_seconds + self.measure_seconds
        )
        return max(0.0, self.seconds - known)

    def count(self, done: Pass) -> None:
        """Add one pass after the prefill."""
        self.passes += 1
        self.draft_seconds += done.draft
        self.verify_seconds += done.verify
        self.measure_seconds += done.measure
        for cycle in filter(None, done.cycles):
            self.cycles += 1
            self.tokens += len(cycle.tokens)
            self.drafted += len(cycle.drafted)
            self.accepted += cycle.accepted
            self.drafted_by_position = _add(self.drafted_by_position, [1] * len(cycle.drafted))
            self.accepted_by_position = _add(self.accepted_by_position, [1] * cycle.accepted)
            tried = min(len(cycle.drafted), cycle.accepted + 1)
            self.tried_by_position = _add(
                self.tried_by_position, [1] * tried + [0] * (len(cycle.drafted) - tried)
            )
        self.accepted_by_position += [0] * (
            len(self.drafted_by_position) - len(self.accepted_by_position)
        )

    def count_prefill(self, done: Pass) -> None:
        """Add the pass that read the prompts, which gives every row its first token."""
        self.sequences += len(done.cycles)
        self.tokens += sum(len(cycle.tokens) for cycle in done.cycles if cycle)
        self.prefill_seconds += done.prefill

    def __add__(self, other: "GenerationStats") -> "GenerationStats":
        total = GenerationStats()
        for name in (entry.name for entry in fields(self)):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(total, name, _add(mine, theirs) if isinstance(mine, list) else mine + theirs)
        return total


def _add(a: Sequence[int], b: Sequence[int]) -> list[int]:
    length = max(len(a), len(b))
    return [
        x + y
        for x, y in zip([*a, *[0] * (length - len(a))], [*b, *[0] * (length - len(b))], strict=True)
    ]
