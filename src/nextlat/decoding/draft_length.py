"""How many tokens to draft: a fixed number, or as many as are worth their time on this machine at
this place in the text.

A cycle that drafts k tokens takes v_k + k c, in units of a plain pass over one token: c = a draft
step, v_k = a pass over k + 1 tokens, both timed on the machine. It gives 1 + sum_j s_j tokens a
row, s_j = a_1 ... a_j the probability that the j-th drafted token survives. By renewal reward, one
more draft is worth it while

    s_{j+1} > S (c + v_{j+1} - v_j),          S = tokens per unit of time so far, at least the 1 of plain decoding

which feeds on itself: a better S is a stricter threshold, and its fixed point is the best there is
(Huang et al., arXiv 2405.19715, have the threshold; here it is made of measured costs). The
acceptance a_j of a token that was drafted with probability m is sigmoid(w logit(m) + b_j), fitted
online to what was verified; that of the next, not yet drafted one is the mean at its place.
No token is ever dropped for its own probability, which would bias the output: the rule only says
whether to draft another.

In a batch all rows share one pass, so that one more step is drafted for all while the rows'
survivals add up to enough.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

LONGEST = 16  # most that is drafted at a time when the length is automatic
WIDTHS = (1, 2, 3, 5, 9, 17)  # tokens a pass that are timed; between them costs are interpolated
ROUNDS, LEAST, BUDGET = (
    6,
    2,
    1.0,
)  # timings of each, at most and at least; seconds after which the least are enough


@dataclass(frozen=True)
class Costs:
    """Seconds of one draft step, and of one pass over 1, 2, ... tokens (choice of tokens included)."""

    draft: float
    verify: tuple[float, ...]

    @property
    def c(self) -> float:
        """A draft step in units of a plain pass."""
        return self.draft / self.verify[0]

    def v(self, k: int) -> float:
        """A pass that verifies k drafted tokens, in the same units."""
        return self.verify[k] / self.verify[0]

    def ceiling(self, tokens_per_cycle: float, drafted: float) -> float:
        """tau / (v + k c): the speed-up over plain decoding that these costs allow, for a mean
        number of drafted tokens."""
        low = min(int(drafted), len(self.verify) - 2)
        v = self.v(low) + (drafted - low) * (self.v(low + 1) - self.v(low))
        return tokens_per_cycle / (v + drafted * self.c)


def measure(
    passes: Callable[[int], None], draft: Callable[[], None], longest: int = LONGEST
) -> Costs:
    """Time a pass over so many tokens, and a draft step: the fastest of a few rounds, after one
    that is not timed.

    The fastest, since what else the machine is doing can only add to it, and seldom to all widths
    alike.
    """
    widths = [*(width for width in WIDTHS if width <= longest), longest + 1]
    runs: dict[int, Callable[[], None]] = {0: draft} | {
        width: (lambda w=width: passes(w)) for width in widths
    }
    seconds: dict[int, list[float]] = {name: [] for name in runs}
    begun = time.perf_counter()
    for round_ in range(ROUNDS + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_:
                seconds[name].append(time.perf_counter() - start)
        if round_ >= LEAST and time.perf_counter() - begun > BUDGET:
            break
    fastest = {name: min(times) for name, times in seconds.items()}
    # A longer pass is never cheaper: where it was timed so, that was the machine's noise.
    rising = np.maximum.accumulate([fastest[width] for width in widths])
    return Costs(fastest[0], tuple(np.interp(range(1, longest + 2), widths, rising).tolist()))


class FixedLength:
    """Always the same number."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.stepwise = False

    def plan(self, rows: Sequence[int]) -> int:
        return self.length

    def observe(self, lengths: Sequence[int], accepted: Sequence[int]) -> None:
        """Nothing to learn."""


class AdaptiveLength:
    """The rule of this file, learning as it goes.

    Args:
        costs: measured on this machine, for this model and number of rows.
        longest: most to draft at a time. stepwise: decide after every drafted token by its
            confidence (a value is read back from the device each time), or once before the cycle by
            the acceptance rates alone.
        lengths: those to choose among when the choice is made before the cycle; None = all up to
            `longest`.
    """

    FORGET, PRIOR, PROBE, REFIT, WINDOW = 0.98, 2.0, 32, 16, 512

    def __init__(
        self,
        costs: Costs,
        longest: int = LONGEST,
        *,
        stepwise: bool = True,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.costs, self.longest, self.stepwise = costs, longest, stepwise
        self.lengths = list(lengths) if lengths is not None else list(range(longest + 1))
        self._tried, self._kept = np.zeros(longest), np.zeros(longest)
        self._tokens = self._time = 0.0  # discounted sums; S is their quotient
        self._seen: deque[tuple[float, int, bool]] = deque(
            maxlen=self.WINDOW
        )  # logit of confidence, place, accepted
        self._theta = self._centre = np.array(
            [0.7, 0.0, *[0.0] * longest]
        )  # w, b, and what each place differs from b
        self._cycles = self._idle = 0

    @property
    def speed(self) -> float:
        """S, tokens a row per plain pass."""
        return max(1.0, self._tokens / self._time) if self._time else 1.0

    def acceptance(self) -> np.ndarray:
        """(longest,) mean probability that the token at each place is accepted, given that those
        before it were."""
        rates, prior = np.empty(self.longest), 0.7
        for j in range(self.longest):
            rates[j] = prior = (self._kept[j] + self.PRIOR * prior) / (self._tried[j] + self.PRIOR)
        return rates

    def plan(self, rows: Sequence[int]) -> int:
        """The most that this cycle should draft for the rows of these numbers; stepwise, `more` may
        end it earlier."""
        self._rows, self._confidences = list(rows), list[np.ndarray]()
        self._survival = np.ones(len(rows))
        self._rates = self.acceptance()
        if self.stepwise:
            length = self.longest if self._worth(0) else 0
        else:
            tokens = 1 + np.concatenate([[0.0], self._rates.cumprod().cumsum()])
            length = max(
                self.lengths, key=lambda k: float(tokens[k]) / (self.costs.v(k) + k * self.costs.c)
            )
        self._idle = 0 if length else self._idle + 1
        if self._idle == self.PROBE:  # the text may have become easier to foretell
            self._idle, length = 0, min(k for k in self.lengths if k)
        return length

    def more(self, place: int, confidences: Sequence[float]) -> bool:
        """Whether to draft on behind `place` (from 0), where the tokens of all rows were drafted
        with these probabilities."""
        self._confidences.append(_logit([confidences[row] for row in self._rows]))
        self._survival = self._survival * self._accepted(place, self._confidences[-1])
        return place + 1 < self.longest and self._worth(place + 1)

    def _worth(self, place: int) -> bool:
        gain = self._survival.mean() * self._rates[place]
        return bool(
            gain > self.speed * (self.costs.c + self.costs.v(place + 1) - self.costs.v(place))
        )

    def _accepted(self, place: int, logits: np.ndarray) -> np.ndarray:
        w, b, *places = self._theta
        return expit(w * logits + b + places[place])

    def observe(self, lengths: Sequence[int], accepted: Sequence[int]) -> None:
        """Learn from the cycle that was planned: drafted tokens that were verified and accepted
        ones, by row of the plan.

        Only verified places count: the accepted ones and the first rejected one.
        """
        for row, (length, kept) in enumerate(zip(lengths, accepted, strict=True)):
            looked_at = min(kept + 1, length)
            # Only what is seen anew makes the old fade: a place that is not tried any more stays as
            # bad as it was.
            self._tried[:looked_at] = self.FORGET * self._tried[:looked_at] + 1
            self._kept[:looked_at] = self.FORGET * self._kept[:looked_at] + (
                np.arange(looked_at) < kept
            )
            for place, logits in enumerate(self._confidences[:looked_at]):
                self._seen.append((float(logits[row]), place, place < kept))
        drafted = max(lengths, default=0)
        self._tokens = self.FORGET * self._tokens + float(np.mean([kept + 1 for kept in accepted]))
        self._time = self.FORGET * self._time + self.costs.v(drafted) + drafted * self.costs.c
        self._cycles += 1
        if self.stepwise and self._cycles % self.REFIT == 0 and self._seen:
            self._fit()

    def _fit(self) -> None:
        """Logistic regression by Newton steps from where it was, with a ridge that holds the places
        together."""
        logits, places, kept = (np.array(column) for column in zip(*self._seen, strict=True))
        design = np.zeros((len(logits), len(self._theta)))
        design[:, 0], design[:, 1] = logits, 1.0
        design[np.arange(len(logits)), 2 + places] = 1.0
        ridge = np.array([1.0, 0.1, *[4.0] * self.longest])
        for _ in range(3):
            p = expit(design @ self._theta)
            gradient = design.T @ (p - kept) + ridge * (self._theta - self._centre)
            hessian = (design * (p * (1 - p))[:, None]).T @ design + np.diag(ridge)
            self._theta = self._theta - np.linalg.solve(hessian, gradient)


def _logit(probabilities: Sequence[float]) -> np.ndarray:
    m = np.clip(np.asarray(probabilities, dtype=float), 1e-4, 1 - 1e-4)
    return np.log(m) - np.log1p(-m)
