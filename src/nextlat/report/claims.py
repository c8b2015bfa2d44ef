"""Numbers with their errors, and the sentences that the verdicts allow: nothing is said here that
`comparison` did not find."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from nextlat.report.comparison import Difference, Estimate, TaskComparison, Verdict
from nextlat.results import Metric, Unit

_DECIMALS: dict[Unit, int] = {"share": 1, "nats": 3, "factor": 2, "number": 2}
MORE_DECIMALS = 2  # than usual at the most, where the error is that small
ROUNDING = 1e-12  # an error below it is none, but the rounding of equal numbers
MINUS = "\N{MINUS SIGN}"
ARROWS = {True: "\N{UPWARDS ARROW}", False: "\N{DOWNWARDS ARROW}", None: ""}


def with_error(
    value: float,
    error: float | None,
    unit: Unit,
    *,
    signed: bool = False,
    decimals: int | None = None,
) -> str:
    """`97.3 ± 0.5 %`, `−16.3 ± 0.4`, `2.31× ± 0.04`: a value and one standard error.

    Args:
        value: the value.
        error: its standard error; None = it has none.
        unit: shares are given in per cent, differences of shares (signed) in points.
        signed: whether a plus sign is written.
        decimals: None = as many as the error deserves.
    """
    if not math.isfinite(value):
        return "not a number"
    scale = 100 if unit == "share" else 1
    decimals = _decimals(value, error, unit) if decimals is None else decimals
    text = f"{scale * value:{'+' if signed else ''}.{decimals}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    text = text.replace("-", MINUS) + "\N{MULTIPLICATION SIGN}" * (unit == "factor")
    if error is not None:
        text += f" ± {scale * error:.{decimals}f}"
    if unit == "share":
        text += " points" if signed else " %"
    return text


def _decimals(value: float, error: float | None, unit: Unit) -> int:
    """Those usual for the unit, or more where the error would be written as zero."""
    usual = 1 if unit == "number" and abs(value) >= 10 else _DECIMALS[unit]
    if error is None or not error > ROUNDING:
        return usual
    scale = 100 if unit == "share" else 1
    needed = math.ceil(-math.log10(2 * scale * error))
    return max(usual, min(_DECIMALS[unit] + MORE_DECIMALS, needed))


def titled(metric: Metric) -> str:
    """The title of a metric with the arrow of its better direction."""
    return f"{metric.title}\N{NO-BREAK SPACE}{ARROWS[metric.higher_is_better]}".rstrip()


def estimate_text(metric: Metric, estimate: Estimate) -> str:
    """A model's cell of the table."""
    return with_error(estimate.value, estimate.stderr, metric.unit)


def seed_text(metric: Metric, estimate: Estimate, seed: int) -> str:
    """One seed's cell: the same, and of a share of items its 95 % interval: `52.4 ± 1.6 % (49.3 to
    55.5)`."""
    text = with_error(*estimate.seeds[seed], metric.unit)
    if seed in estimate.intervals:
        text += " ({:.1f} to {:.1f})".format(*(100 * end for end in estimate.intervals[seed]))
    return text


def difference_text(metric: Metric, difference: Difference) -> str:
    """The difference below it; of shares in points, which the footnotes say."""
    text = with_error(difference.value, difference.stderr, metric.unit, signed=True)
    return text.removesuffix(" points")


@dataclass(frozen=True)
class Claim:
    """What may be said about one metric of one model."""

    task: str  # its name
    metric: str  # its key
    model: str  # its label
    verdict: Verdict  # what both of the following rest on
    lead: str  # says it
    numbers: str  # prove it

    @property
    def text(self) -> str:
        """The whole sentence."""
        return f"{self.lead}: {self.numbers}."


def claims(task: TaskComparison) -> list[Claim]:
    """A sentence for every difference: what is better, what is worse, what cannot be told apart,
    what proves nothing. Within each, what is surest (most standard errors) comes first."""

    def position(item: tuple[Metric, str, Difference]) -> tuple[int, float]:
        difference = item[2]
        errors = abs(difference.value) / (difference.stderr or math.inf)
        order = get_args(Verdict).index(difference.verdict)
        return order, -errors if math.isfinite(errors) else 0.0

    found = [
        (one.metric, label, difference)
        for one in task.metrics
        for label, difference in one.differences.items()
        if one.metric.headline
    ]
    return [
        Claim(task.task.name, metric.key, label, change.verdict, *_sentence(metric, label, change))
        for metric, label, change in sorted(found, key=position)
    ]


def summary(task: TaskComparison) -> str:
    """How many differences of each model fell out which way."""
    words = {
        "better": "better",
        "worse": "worse",
        "within noise": "within the noise",
        "no claim": "measured without an error",
    }
    verdicts: dict[str, list[str]] = {}
    for claim in claims(task):
        verdicts.setdefault(claim.model, []).append(claim.verdict)
    parts = [f"{label}: {tally(found, words)}." for label, found in verdicts.items()]
    if len(task.seeds) == 1:
        parts.append(f"From one seed ({task.seeds[0]}), with errors over test items.")
    return " ".join(parts)


def tally(found: Sequence[str], words: Mapping[str, str]) -> str:
    """How many of each kind there are; the last, for which nothing is claimed, only if any."""
    *others, last = words
    shown = words if last in found else others
    return ", ".join(f"{found.count(kind)} {words[kind]}" for kind in shown)


def _sentence(metric: Metric, label: str, difference: Difference) -> tuple[str, str]:
    noun = metric.noun or metric.title.lower()
    values = difference.ours, difference.theirs
    decimals = _decimals(max(values), difference.stderr, metric.unit)
    ours, theirs = (with_error(x, None, metric.unit, decimals=decimals) for x in values)
    numbers = f"{ours} against {theirs} ({difference.against}), {_change(metric, difference)}"
    if difference.verdict == "no claim":
        why = (
            "without an error nothing is claimed"
            if difference.stderr is None and metric.higher_is_better is not None
            else "neither direction counts as better here"
        )
        return f"{noun[:1].upper()}{noun[1:]} of {label}", f"{numbers}; {why}"
    direction = "Higher" if difference.value > 0 else "Lower"
    if difference.verdict == "within noise":
        alike = {found.verdict for found in difference.seeds.values()} in ({"better"}, {"worse"})
        if alike and len(difference.seeds) > 1:
            uneven = "in each seed here, but too unevenly for a claim beyond them"
            return f"{direction} {noun} with {label} {uneven}", numbers
        return f"No clear difference in {noun} with {label}", numbers
    worse = ", which is worse" if difference.verdict == "worse" else ""
    return f"{direction} {noun} with {label}{worse}", numbers


def _change(metric: Metric, difference: Difference) -> str:
    change = with_error(difference.value, difference.stderr, metric.unit, signed=True)
    text, seeds = f"a difference of {change}", difference.seeds
    if len(seeds) == 1:
        return text + (f" over {difference.items:,} {metric.items}" if difference.items else "")
    text += f" over {len(seeds)} seeds"
    alone = [seed for seed, found in seeds.items() if found.verdict in ("better", "worse")]
    signs = {seeds[seed].verdict for seed in alone}
    if not alone or len(signs) > 1:
        return text
    which = "each seed" if len(alone) == len(seeds) else f"{len(alone)} of {len(seeds)} seeds"
    return f"{text}; {signs.pop()} beyond the error over {metric.items} in {which} by itself"


def footnotes(task: TaskComparison) -> list[str]:
    """What must be said beside the table for its numbers to be understood."""
    several = any(len(runs) > 1 for runs in task.models.values())
    notes = [f"{ARROWS[True]} higher is better, {ARROWS[False]} lower is better."]
    if several:
        notes.append("± is one standard error over seeds.")
    else:
        one = f"One seed ({task.seeds[0]}): " if len(task.seeds) == 1 else ""
        notes.append(
            f"{one}± is one standard error over test items; it knows nothing of how another seed "
            "would have come out."
        )
    if task.baseline is not None and len(task.models) > 1:
        rule = (
            "outside the 95 % interval over seeds (Student's t, paired) and beyond twice the error "
            "over items"
            if several
            else "more than twice its standard error, paired item by item"
        )
        tested = sum(
            difference.verdict != "no claim"
            for one in task.metrics
            for difference in one.differences.values()
        )
        notes.append(
            f"With a value goes its difference to {task.baseline} (of shares in percentage "
            f"points). A difference counts as better or worse when it is {rule}; of {tested} such "
            "tests up to one in twenty would pass by chance if no difference were real."
        )
    said = dict.fromkeys(one.metric.note for one in task.metrics if one.metric.note)
    return [*notes, *said, *task.caveats]
