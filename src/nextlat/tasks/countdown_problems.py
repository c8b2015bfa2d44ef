"""Countdown problems and their solutions: combine all numbers with + - * / so that the last result
is the target.

Problems and the order of the search are those of Gandhi et al. 2024 ("Stream of Search"), for four
numbers and any other count.

Shapes: P problems, B problems of the running block, n numbers, Q paths of the search (24, then 288
    for four numbers).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from nextlat.tasks.rows import redraw, row_keys

OPERATIONS = "+*-/"  # in the order in which the search tries them
BLOCK = 512  # problems searched at a time: their paths stay in the processor's cache


def first_solutions(numbers: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(P,) the path of the first solution that depth-first search finds, -1 where there is none.

    The search takes every pair in index order and for it + * - /, larger operand first for - and /,
    difference 0 allowed, division exact; the result comes after the remaining numbers; all numbers
    must be used. Its tree is built level by level with the paths in the order of their visit, so
    that the first hit is the solution. A path that divides wrongly is NaN, which nothing equals.

    Args:
        numbers: (P, n), n >= 2, from 1.
        targets: (P,), from 1.
    """
    # In single precision all integers up to 2^24 are exact, and so is every comparison with a
    # target below it.
    largest = int(numbers.max(initial=2)) ** (numbers.shape[1] - 1)
    dtype = np.float32 if max(largest, int(targets.max(initial=1))) < 2**24 else np.float64
    found = np.empty(len(numbers), dtype=np.int64)
    block = max(1, BLOCK >> max(0, 5 * (numbers.shape[1] - 4)))
    with np.errstate(divide="ignore", invalid="ignore"):
        for first in range(0, len(numbers), block):
            rows = slice(first, first + block)
            found[rows] = _first_solutions(numbers[rows].astype(dtype), targets[rows].astype(dtype))
    return found


def _first_solutions(numbers: np.ndarray, targets: np.ndarray) -> np.ndarray:
    values = list(numbers.T[:, :, None])  # one (B, Q) array per number that is left
    while len(values) > 2:
        values = _next_level(values)
    (a, b), t = values, targets[:, None]
    hits = [a + b == t, a * b == t, np.abs(a - b) == t, ((a == t * b) | (b == t * a)) & (a > 0)]
    any_BQ = hits[0] | hits[1] | hits[2] | hits[3]
    row, path = np.arange(len(numbers)), any_BQ.argmax(axis=1)
    operation = np.stack([hit[row, path] for hit in hits]).argmax(axis=0)
    return np.where(any_BQ[row, path], path * 4 + operation, -1)


def _next_level(values: list[np.ndarray]) -> list[np.ndarray]:
    """All ways to combine two of m numbers: m arrays (B, Q) -> m - 1 arrays (B, Q * pairs * 4)."""
    pairs = _pairs(len(values))
    out = np.empty((len(values) - 1, *values[0].shape, len(pairs), 4), dtype=values[0].dtype)
    for p, (i, j) in enumerate(pairs):
        for k, rest in enumerate(values[:i] + values[i + 1 : j] + values[j + 1 :]):
            out[k, :, :, p] = rest[:, :, None]
        a, b = values[i], values[j]
        small, large = np.minimum(a, b), np.maximum(a, b)
        quotient = large / small
        quotient[(quotient != np.floor(quotient)) | (small == 0)] = np.nan
        for operation, result in enumerate((a + b, a * b, large - small, quotient)):
            out[-1, :, :, p, operation] = result
    return list(out.reshape(len(out), len(values[0]), -1))


def _pairs(count: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(count), 2))


def equations(numbers: np.ndarray, paths: np.ndarray) -> np.ndarray:
    """(P, n - 1, 4) equations of solution paths, as (left, index in OPERATIONS, right, result)."""
    count, n = numbers.shape
    steps = []
    for m in range(2, n + 1):  # the last step is the lowest digit
        steps.append((paths // 4 % len(_pairs(m)), paths % 4))
        paths = paths // (4 * len(_pairs(m)))
    values, row = numbers.astype(np.int64), np.arange(count)
    found = np.empty((count, n - 1, 4), dtype=np.int64)
    for m, (pair, operation) in zip(range(n, 1, -1), reversed(steps), strict=True):
        pairs = np.array(_pairs(m))
        rest = np.array([np.delete(np.arange(m), both) for both in pairs])[pair]
        a, b = values[row, pairs[pair].T]
        swapped = (operation >= 2) & (a < b)
        a, b = np.where(swapped, b, a), np.where(swapped, a, b)
        result = np.choose(operation, [a + b, a * b, a - b, a // np.maximum(b, 1)])
        found[:, n - m] = np.stack([a, operation, b, result], axis=1)
        values = np.concatenate([np.take_along_axis(values, rest, axis=1), result[:, None]], axis=1)
    return found


@dataclass(frozen=True, eq=False)
class Problems:
    """P solvable problems."""

    numbers: np.ndarray  # (P, n)
    targets: np.ndarray  # (P,)
    equations: np.ndarray  # (P, n - 1, 4) of their stored solutions, see `equations`

    def keys(self) -> np.ndarray:
        """(P,) one value per problem, the same for every order of its numbers."""
        return _keys(self.numbers, self.targets)


def _keys(numbers: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return row_keys(np.column_stack([np.sort(numbers, axis=1), targets]).astype(np.int32))


def draw_problems(
    targets: np.ndarray,
    count: int,
    rng: np.random.Generator,
    *,
    numbers: int,
    max_number: int,
    max_value: int,
    refused: np.ndarray | None = None,
) -> Problems:
    """Random problems: a target, then numbers, which are drawn again until there is a solution
    without a number above `max_value`, and the problem is not refused.

    Args:
        targets: to draw from.
        count: P.
        rng: draws them.
        numbers: n.
        max_number: of the numbers drawn.
        max_value: see above.
        refused: keys of problems that are drawn again.

    Raises:
        NextLatError: a target that cannot be reached, or hardly ever.
    """
    chosen = rng.choice(targets, size=count)

    def draw(rows: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        tried = rng.integers(1, max_number + 1, size=(len(rows), numbers))
        written = np.zeros((len(rows), numbers - 1, 4), dtype=np.int64)
        paths = first_solutions(tried, chosen[rows])
        good = paths >= 0
        written[good] = equations(tried[good], paths[good])
        good &= written.max(axis=(1, 2)) <= max_value
        if refused is not None:
            good[good] = ~np.isin(_keys(tried[good], chosen[rows][good]), refused)
        return [tried, written], good

    drawn, written = redraw(
        count,
        draw,
        lambda row: (
            f"no problem with target {chosen[row]} was found among {numbers} numbers up to "
            f"{max_number} in many attempts: choose other targets, more or larger numbers, or "
            "fewer tests."
        ),
        tries=lambda pending, attempt: max(1, BLOCK // pending),
    )
    return Problems(drawn, chosen, written)


class Verdict(StrEnum):
    """Of an answer: solved, or the first thing that is wrong with it in reading order."""

    SOLVED = "solved"
    NO_END = "no end"
    MALFORMED = "malformed"
    WRONG_COUNT = "wrong number of equations"
    UNAVAILABLE = "number not available"
    NEGATIVE = "negative difference"
    INEXACT = "inexact division"
    FALSE = "false equation"
    TARGET_MISSED = "target missed"


Equation = tuple[int, str, int, int]  # left, operation, right, result


def arithmetic(equation: Equation) -> Verdict:
    """SOLVED when the equation is true; a difference below 0 and a division with a remainder or by
    0 never are."""
    a, operation, b, result = equation
    if operation == "-" and a < b:
        return Verdict.NEGATIVE
    if operation == "/" and (b == 0 or a % b):
        return Verdict.INEXACT
    value = {"+": a + b, "*": a * b, "-": a - b, "/": a // max(b, 1)}[operation]
    return Verdict.SOLVED if value == result else Verdict.FALSE


def judge(numbers: Sequence[int], target: int, given: Sequence[Equation]) -> Verdict:
    """The verdict on a derivation: any counts that uses each number and each intermediate result
    once, in true equations, the target last.

    With n - 1 equations and nothing used twice, nothing can be left over.
    """
    if len(given) != len(numbers) - 1:
        return Verdict.WRONG_COUNT
    available = list(numbers)
    for equation in given:
        for operand in (equation[0], equation[2]):
            if operand not in available:
                return Verdict.UNAVAILABLE
            available.remove(operand)
        verdict = arithmetic(equation)
        if verdict is not Verdict.SOLVED:
            return verdict
        available.append(equation[3])
    return Verdict.SOLVED if available == [target] else Verdict.TARGET_MISSED
