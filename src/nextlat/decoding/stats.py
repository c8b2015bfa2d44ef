"""What decoding did: cycles, drafted and accepted tokens, acceptance by position."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cycle:
    """What one forward pass of the transformer brought: `tokens` = the `accepted` leading `drafted` ones and, unless the
    output ends before it, one of the transformer's own."""

    drafted: tuple[int, ...]
    accepted: int
    tokens: tuple[int, ...]


@dataclass
class GenerationStats:
    """What `generate` did, summed over its sequences; two of them add up with `+`.

    Attributes:
        sequences: rows decoded.
        tokens: new tokens returned; an end-of-sequence token counts, padding does not.
        cycles: draft-and-verify cycles; the transformer ran `sequences + cycles` times (a prefill for each sequence).
        drafted: drafted tokens.
        accepted: drafted tokens that are in the output.
        drafted_by_position: cycles that drafted an i-th token (index i - 1); drafts get shorter near max_new_tokens.
        accepted_by_position: cycles whose i-th drafted token is in the output, so all before it too.
        seconds: wall-clock time, prefill included.
    """

    sequences: int = 0
    tokens: int = 0
    cycles: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per cycle, the bonus or residual token included (1 for plain decoding; 0 without a cycle).

        The "accepted tokens" that the NextLat paper reports leave out the transformer's own: see `accepted_per_cycle`. They are
        this minus one, except that a cycle which a drafted end-of-sequence token closes has no token of the transformer's own.
        """
        return (self.tokens - self.sequences) / self.cycles if self.cycles else 0.0

    @property
    def accepted_per_cycle(self) -> float:
        """Accepted drafted tokens per cycle, the transformer's own token not counted (0 without a cycle)."""
        return self.accepted / self.cycles if self.cycles else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted (0 where nothing was drafted)."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of the i-th drafted tokens that were accepted; not conditional on those before, hence never rising by much."""
        return [kept / made for kept, made in zip(self.accepted_by_position, self.drafted_by_position, strict=True)]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def count(self, cycle: Cycle) -> None:
        """Add one cycle."""
        self.cycles += 1
        self.tokens += len(cycle.tokens)
        self.drafted += len(cycle.drafted)
        self.accepted += cycle.accepted
        made, kept = [1] * len(cycle.drafted), [1] * cycle.accepted + [0] * (len(cycle.drafted) - cycle.accepted)
        self.drafted_by_position = _add(self.drafted_by_position, made)
        self.accepted_by_position = _add(self.accepted_by_position, kept)

    def __add__(self, other: "GenerationStats") -> "GenerationStats":
        return GenerationStats(
            sequences=self.sequences + other.sequences,
            tokens=self.tokens + other.tokens,
            cycles=self.cycles + other.cycles,
            drafted=self.drafted + other.drafted,
            accepted=self.accepted + other.accepted,
            drafted_by_position=_add(self.drafted_by_position, other.drafted_by_position),
            accepted_by_position=_add(self.accepted_by_position, other.accepted_by_position),
            seconds=self.seconds + other.seconds,
        )


def _add(a: list[int], b: list[int]) -> list[int]:
    length = max(len(a), len(b))
    return [x + y for x, y in zip(a + [0] * (length - len(a)), b + [0] * (length - len(b)), strict=True)]
