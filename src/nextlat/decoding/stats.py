"""What decoding did: cycles, drafted and accepted tokens, acceptance by position, and where the
time went."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import zip_longest

from torch import Tensor


@dataclass(frozen=True)
class Cycle:
    """What one forward pass of the transformer brought to one row.

    Attributes:
        drafted: tokens.
        accepted: how many of them, from the first, are in the output.
        tokens: those and, unless the output ends before it, one of the transformer's own.
        scores, logits: (tokens, V), processed and as the model gave them, where asked for.
    """

    drafted: tuple[int, ...]
    accepted: int
    tokens: tuple[int, ...]
    scores: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class Pass:
    """One forward pass over the whole batch.

    Attributes:
        cycles: one for each row, None for rows that had ended before.
        prefill, draft, verify, measure: seconds, see `GenerationStats`.
    """

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
        cycles: the same counted for every row, as long as it has not ended.
        drafted: drafted tokens that were verified.
        accepted: drafted tokens that are in the output.
        drafted_by_position: cycles that drafted an i-th token (index i - 1); drafts get shorter
            near the end.
        accepted_by_position: cycles whose i-th drafted token is in the output, and so all before
            it.
        tried_by_position: cycles that drafted an i-th token and kept all before it.
        seconds: wall-clock time of everything.
        prefill_seconds: of reading the prompts.
        draft_seconds: of drafting; a compiled cycle is one piece, counted as verification.
        verify_seconds: of the passes with the acceptance tests.
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
        return _ratio(self.tokens - self.sequences, self.cycles)

    @property
    def accepted_per_cycle(self) -> float:
        """Accepted drafted tokens per cycle, the transformer's own token not counted."""
        return _ratio(self.accepted, self.cycles)

    @property
    def drafted_per_cycle(self) -> float:
        """Drafted tokens per cycle."""
        return _ratio(self.drafted, self.cycles)

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted (0 where nothing was drafted)."""
        return _ratio(self.accepted, self.drafted)

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of the i-th drafted tokens that were accepted; not conditional on those before,
        hence never rising by much where the length is fixed. With an adaptive length, later
        positions are only drafted where acceptance is likely."""
        return [*map(_ratio, self.accepted_by_position, self.drafted_by_position)]

    @property
    def conditional_acceptance(self) -> list[float]:
        """The same share among those whose predecessors were accepted."""
        return [*map(_ratio, self.accepted_by_position, self.tried_by_position)]

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second of everything."""
        return _ratio(self.tokens, self.seconds)

    @property
    def overhead_seconds(self) -> float:
        """Of everything that is not accounted for."""
        parts = self.prefill_seconds, self.draft_seconds, self.verify_seconds, self.measure_seconds
        return max(0.0, self.seconds - sum(parts))

    def count(self, done: Pass) -> None:
        """Add one pass after the prefill."""
        self.passes += 1
        self.draft_seconds += done.draft
        self.verify_seconds += done.verify
        self.measure_seconds += done.measure
        for cycle in filter(None, done.cycles):
            drafted, accepted = len(cycle.drafted), cycle.accepted
            self.cycles += 1
            self.tokens += len(cycle.tokens)
            self.drafted += drafted
            self.accepted += accepted
            for name, count in {
                "drafted_by_position": drafted,
                "accepted_by_position": accepted,
                "tried_by_position": min(drafted, accepted + 1),
            }.items():
                ones = [int(i < count) for i in range(drafted)]
                setattr(self, name, _add(getattr(self, name), ones))

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


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _add(a: Sequence[int], b: Sequence[int]) -> list[int]:
    return [x + y for x, y in zip_longest(a, b, fillvalue=0)]
