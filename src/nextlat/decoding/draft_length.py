"""How many tokens to draft: a fixed number, or as many as are worth their time on this machine at
this point of the text.

A cycle that drafts k tokens takes v_k + k c, in units of a plain pass over one token: c = a draft
step, v_k = a pass over k + 1 tokens, both timed on the machine. It gives 1 + sum_j s_j tokens per
row, where s_j = a_1 ... a_j is the probability that the j-th drafted token survives. By renewal
reward, one more draft is worth it while

    s_{j+1} > S (c + v_{j+1} - v_j),        S = tokens per unit of time so far, at least the 1 of
                                            plain decoding

which feeds on itself: a better S is a stricter threshold, and its fixed point is the best there is
(Huang et al., arXiv 2405.19715, have the threshold; here it is made of measured costs). The
acceptance a_j of a token that was drafted with probability m is sigmoid(w logit(m) + b_j), fitted
online to what was verified; that of the next, not yet drafted one is the mean at its position.
No token is ever dropped for its own probability, which would bias the output: all that is decided
is whether to draft another.

In a batch all rows share one pass, so one more step is drafted for all while their survivals add up
to enough.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

LONGEST = 16  # tokens drafted at a time when the length is automatic
WIDTHS = (1, 2, 3, 5, 9, 17)  # tokens per pass that are timed; costs in between are interpolated
MAX_ROUNDS, MIN_ROUNDS = 6, 2  # timings of each
ENOUGH = 1.0  # seconds after which the fewest timings do


@dataclass(frozen=True)
class Costs:
    """Times of this machine for one model and number of rows.

    Attributes:
        draft: seconds of one draft step.
        verify: seconds of a pass over 1, 2, ... tokens, choice of tokens included.
    """

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
        v = float(np.interp(drafted, range(len(self.verify)), self.verify)) / self.verify[0]
        return tokens_per_cycle / (v + drafted * self.c)


def measure(
    run_pass: Callable[[int], None], run_draft: Callable[[], None], longest: int = LONGEST
) -> Costs:
    """Time a pass over so many tokens, and a draft step: the fastest of a few rounds, after one
    that is not timed.

    The fastest, because what else the machine is doing can only add to it, and seldom to all widths
    alike.
    """
    widths = [*(width for width in WIDTHS if width <= longest), longest + 1]
    seconds: dict[int, list[float]] = {width: [] for width in (0, *widths)}  # 0: a draft step
    begun = time.perf_counter()
    for round_ in range(MAX_ROUNDS + 1):
        for width, timings in seconds.items():
            start = time.perf_counter()
            run_pass(width) if width else run_draft()
            if round_:
                timings.append(time.perf_counter() - start)
        if round_ >= MIN_ROUNDS and time.perf_counter() - begun > ENOUGH:
            break
    draft, *verify = (min(timings) for timings in seconds.values())
    # A longer pass is never cheaper: where it was timed so, that was the machine's noise.
    rising = np.maximum.accumulate(verify)
    return Costs(draft, tuple(np.interp(range(1, longest + 2), widths, rising).tolist()))


class FixedLength:
    """Always the same number."""

    more = None

    def __init__(self, length: int) -> None:
        self.length = length

    def plan(self, rows: Sequence[int]) -> int:
        return self.length

    def observe(self, lengths: Sequence[int], accepted: Sequence[int]) -> None:
        """Nothing to learn."""


class AdaptiveLength:
    """The decision described above, learning as it goes.

    Args:
        costs: measured on this machine, for this model and number of rows.
        longest: limit of what is drafted at a time.
        stepwise: decide after every drafted token by its confidence (a value is read back from the
            device each time), or once before the cycle by the acceptance rates alone.
        lengths: those to choose among when the choice is made before the cycle; None = all up to
            `longest`.
    """

    FORGET, PRIOR, PROBE, RAREST, REFIT, WINDOW = 0.98, 2.0, 32, 256, 16, 512

    def __init__(
        self,
        costs: Costs,
        longest: int = LONGEST,
        *,
        stepwise: bool = True,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.costs, self.longest, self.stepwise = costs, longest, stepwise
        self.lengths = list(range(longest + 1) if lengths is None else lengths)
        self._tried, self._kept = np.zeros(longest), np.zeros(longest)
        self._tokens = self._time = 0.0  # discounted sums; S is their quotient
        # (logit of confidence, position, accepted) of verified tokens
        self._seen: deque[tuple[float, int, bool]] = deque(maxlen=self.WINDOW)
        # w, b, and by how much each position differs from b
        self._theta = self._centre = np.array([0.7, 0.0, *[0.0] * longest])
        self._cycles = self._idle = 0
        # Idle cycles before the next probe; none where not even perfect drafts would pay.
        best = max((k + 1) / (costs.v(k) + k * costs.c) for k in self.lengths)
        self._rest, self._probes = float(self.PROBE) if best > 1 else np.inf, False

    @property
    def speed(self) -> float:
        """S, tokens per row and plain pass."""
        return max(1.0, self._tokens / self._time) if self._time else 1.0

    def acceptance(self) -> np.ndarray:
        """(longest,) mean probability that the token at each position is accepted, given that those
        before it were."""
        rates, prior = np.empty(self.longest), 0.7
        for j in range(self.longest):
            rates[j] = prior = (self._kept[j] + self.PRIOR * prior) / (self._tried[j] + self.PRIOR)
        return rates

    def plan(self, rows: Sequence[int]) -> int:
        """How much this cycle should draft at most, for the rows of these numbers; `more` may end
        it earlier."""
        self._rows, self._confidences = list(rows), list[np.ndarray]()
        length = self._best()
        self._idle = 0 if length else self._idle + 1
        self._probes = self._idle >= self._rest
        if self._probes:  # the text may have become easier to foretell
            self._idle, length = 0, min(k for k in self.lengths if k)
        return length

    def rests(self, tokens: int) -> bool:
        """Whether a row can have so many tokens without anybody asking for a plan: a probe was in
        vain, and none is due. The tokens count as idle cycles."""
        if self._rest <= self.PROBE or self._idle >= self._rest:
            return False
        self._idle += tokens
        return True

    def _best(self) -> int:
        """What to draft at most, by what is known before the first step."""
        self._survival, self._rates = np.ones(len(self._rows)), self.acceptance()
        if self.stepwise:
            return self.longest if self._is_worth(0) else 0
        costs, tokens = self.costs, 1 + np.cumsum([0.0, *self._rates.cumprod()])
        return max(self.lengths, key=lambda k: tokens[k] / (costs.v(k) + k * costs.c))

    @property
    def more(self) -> Callable[[int, Sequence[float]], bool] | None:
        """Whether to draft on after position j (from 0), given the probabilities with which all
        rows' tokens there were drafted; None where that is not asked."""
        return self._goes_on if self.stepwise else None

    def _goes_on(self, position: int, confidences: Sequence[float]) -> bool:
        self._confidences.append(_logit([confidences[row] for row in self._rows]))
        self._survival = self._survival * self._accepted(position, self._confidences[-1])
        return position + 1 < self.longest and self._is_worth(position + 1)

    def _is_worth(self, position: int) -> bool:
        costs, gain = self.costs, self._survival.mean() * self._rates[position]
        return bool(gain > self.speed * (costs.c + costs.v(position + 1) - costs.v(position)))

    def _accepted(self, position: int, logits: np.ndarray) -> np.ndarray:
        w, b, *offsets = self._theta
        return expit(w * logits + b + offsets[position])

    def observe(self, lengths: Sequence[int], accepted: Sequence[int]) -> None:
        """Learn from the cycle that was planned: numbers of drafted and of accepted tokens, by row
        of the plan.

        Only verified positions count: the accepted ones and the first rejected one.
        """
        for row, (length, kept) in enumerate(zip(lengths, accepted, strict=True)):
            verified = min(kept + 1, length)
            # What is seen makes the old fade, and nothing else does: a position that is not tried
            # any more stays as bad as it was.
            self._tried[:verified] = self.FORGET * self._tried[:verified] + 1
            self._kept[:verified] *= self.FORGET
            self._kept[: min(kept, verified)] += 1
            for position, logits in enumerate(self._confidences[:verified]):
                self._seen.append((float(logits[row]), position, position < kept))
        drafted = max(lengths, default=0)
        self._tokens = self.FORGET * self._tokens + float(np.mean(accepted)) + 1
        self._time = self.FORGET * self._time + self.costs.v(drafted) + drafted * self.costs.c
        if self._probes and drafted:
            if self._best():
                self._rest = self.PROBE
            elif 2 * np.count_nonzero(accepted) > len(accepted):
                self._idle = self.RAREST  # it goes on, to learn soon
            else:  # one in vain makes the next one rarer
                self._rest = min(2 * self._rest, self.RAREST)
        self._cycles += 1
        if self.stepwise and self._cycles % self.REFIT == 0 and self._seen:
            self._fit()

    def _fit(self) -> None:
        """Logistic regression by Newton steps from where it was, with a ridge that holds the
        positions together."""
        logits, positions, kept = (np.array(column) for column in zip(*self._seen, strict=True))
        design = np.zeros((len(logits), len(self._theta)))
        design[:, 0], design[:, 1] = logits, 1.0
        design[np.arange(len(logits)), 2 + positions] = 1.0
        ridge = np.array([1.0, 0.1, *[4.0] * self.longest])
        for _ in range(3):
            p = expit(design @ self._theta)
            gradient = design.T @ (p - kept) + ridge * (self._theta - self._centre)
            hessian = (design * (p * (1 - p))[:, None]).T @ design + np.diag(ridge)
            self._theta = self._theta - np.linalg.solve(hessian, gradient)


def _logit(probabilities: Sequence[float]) -> np.ndarray:
    m = np.clip(np.asarray(probabilities, dtype=float), 1e-4, 1 - 1e-4)
    return np.log(m) - np.log1p(-m)
