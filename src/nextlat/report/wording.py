"""Numbers with their errors, and the sentences that the verdicts allow: nothing is said here that
`comparison` did not find."""

import math
from dataclasses import dataclass

from nextlat.report.comparison import (
    Difference,
    Estimate,
    MetricComparison,
    TaskComparison,
    Verdict,
)
from nextlat.report.glossary import Term, Unit, describe

_DECIMALS: dict[Unit, int] = {"share": 1, "nats": 3, "factor": 2, "number": 2}
MOST_DECIMALS = 2  # more than usual, where the error is that small
ROUNDING = 1e-12  # an error below it is none, but the rounding of equal numbers
MINUS = "\N{MINUS SIGN}"
ARROWS = {True: "\N{UPWARDS ARROW}", False: "\N{DOWNWARDS ARROW}", None: " "}


def with_error(
    value: float,
    error: float | None,
    unit: Unit,
    *,
    signed: bool = False,
    decimals: int | None = None,
) -> str:
    """`97.3 ± 0.5 %`, `−16.3 ± 0.4`, `2.31× ± 0.04`: the value and one standard error, as many
    decimals as the error deserves.

    Shares are given in per cent, differences of shares (signed) in points. `decimals` None = as
    `decimals_for` says.
    """
    if not math.isfinite(value):
        return "not a number"
    scale = 100 if unit == "share" else 1
    decimals = decimals_for(value, error, unit) if decimals is None else decimals
    text = f"{scale * value:{'+' if signed else ''}.{decimals}f}".replace("-", MINUS)
    if float(text.replace(MINUS, "-")) == 0:
        text = text.lstrip("+" + MINUS)
    text += "\N{MULTIPLICATION SIGN}" if unit == "factor" else ""
    if error is not None:
        text += f" ± {scale * error:.{decimals}f}"
    if unit == "share":
        text += " points" if signed else " %"
    return text


def decimals_for(value: float, error: float | None, unit: Unit) -> int:
    """Those usual for the unit, or more where the error would be written as zero."""
    usual = 1 if unit == "number" and abs(value) >= 10 else _DECIMALS[unit]
    if error is None or not error > ROUNDING:
        return usual
    scale = 100 if unit == "share" else 1
    return max(
        usual, min(_DECIMALS[unit] + MOST_DECIMALS, math.ceil(-math.log10(2 * scale * error)))
    )


def estimate_text(name: str, estimate: Estimate) -> str:
    """A model's cell of the table."""
    return with_error(estimate.value, estimate.stderr, describe(name).unit)


def seed_text(name: str, estimate: Estimate, seed: int) -> str:
    """One seed's cell: the same, and of a share of items its 95 % interval: `52.4 ± 1.6 % (49.3 to
    55.5)`."""
    text = with_error(*estimate.seeds[seed], describe(name).unit)
    if seed in estimate.intervals:
        text += " ({:.1f} to {:.1f})".format(*(100 * end for end in estimate.intervals[seed]))
    return text


def difference_text(name: str, difference: Difference) -> str:
    """The difference below it; of shares in points, which the footnotes say."""
    return with_error(
        difference.value, difference.stderr, describe(name).unit, signed=True
    ).removesuffix(" points")


@dataclass(frozen=True)
class Claim:
    """What may be said about one metric of one model: `lead` says it, `numbers` prove it, `verdict`
    is what both rest on."""

    task: str
    metric: str
    model: str
    verdict: Verdict
    lead: str
    numbers: str

    @property
    def text(self) -> str:
        """The whole sentence."""
        return f"{self.lead}: {self.numbers}."


def claims(task: TaskComparison) -> list[Claim]:
    """A sentence for every difference: what is better, what is worse, what cannot be told apart,
    what proves nothing.

    Within each, what is surest (most standard errors) comes first.
    """
    rank: dict[Verdict, int] = {"better": 0, "worse": 1, "within noise": 2, "no claim": 3}
    found = [
        (
            rank[difference.verdict],
            -abs(difference.value) / (difference.stderr or math.inf),
            metric,
            label,
            difference,
        )
        for metric in task.metrics
        for label, difference in metric.differences.items()
        if describe(metric.name).headline
    ]
    return [
        Claim(
            task.task, metric.name, label, difference.verdict, *_sentence(metric, label, difference)
        )
        for _, _, metric, label, difference in sorted(found, key=lambda item: item[:2])
    ]


def summary(task: TaskComparison) -> str:
    """How many differences of each model fell out which way."""
    words: dict[Verdict, str] = {
        "better": "better",
        "worse": "worse",
        "within noise": "within the noise",
        "no claim": "measured without an error",
    }
    found = claims(task)
    parts = []
    for label in dict.fromkeys(claim.model for claim in found):
        verdicts = [claim.verdict for claim in found if claim.model == label]
        counts = [
            f"{verdicts.count(verdict)} {word}"
            for verdict, word in words.items()
            if verdict != "no claim" or verdict in verdicts
        ]
        parts.append(f"{label}: {', '.join(counts)}.")
    seeds = {seed for runs in task.models.values() for seed in runs}
    if len(seeds) == 1:
        parts.append(f"From one seed ({seeds.pop()}), with errors over test items.")
    return " ".join(parts)


def _sentence(metric: MetricComparison, label: str, difference: Difference) -> tuple[str, str]:
    term = describe(metric.name)
    decimals = decimals_for(max(difference.ours, difference.theirs), difference.stderr, term.unit)
    ours, theirs = (
        with_error(value, None, term.unit, decimals=decimals)
        for value in (difference.ours, difference.theirs)
    )
    numbers = f"{ours} against {theirs} ({difference.against}), {_change(term, difference)}"
    if difference.verdict == "no claim":
        why = (
            "it is not known which way is better"
            if metric.higher_is_better is None
            else "without an error nothing is claimed"
        )
        return f"{term.noun[0].upper()}{term.noun[1:]} of {label}", f"{numbers}; {why}"
    direction = "Higher" if difference.value > 0 else "Lower"
    if difference.verdict == "within noise":
        alike = {found.verdict for found in difference.seeds.values()} in ({"better"}, {"worse"})
        if alike and len(difference.seeds) > 1:
            return (
                f"{direction} {term.noun} with {label} in each seed here, but too unevenly for a claim beyond them",
                numbers,
            )
        return f"No clear difference in {term.noun} with {label}", numbers
    worse = ", which is worse" if difference.verdict == "worse" else ""
    return f"{direction} {term.noun} with {label}{worse}", numbers


def _change(term: Term, difference: Difference) -> str:
    text = (
        f"a difference of {with_error(difference.value, difference.stderr, term.unit, signed=True)}"
    )
    seeds = difference.seeds
    if len(seeds) == 1:
        return text + (f" over {difference.items:,} {term.items}" if difference.items else "")
    text += f" over {len(seeds)} seeds"
    alone = [seed for seed, found in seeds.items() if found.verdict in ("better", "worse")]
    signs = {seeds[seed].verdict for seed in alone}
    if not alone or len(signs) > 1:
        return text
    which = "each seed" if len(alone) == len(seeds) else f"{len(alone)} of {len(seeds)} seeds"
    return f"{text}; {signs.pop()} beyond the error over {term.items} in {which} by itself"


def footnotes(task: TaskComparison) -> list[str]:
    """What must be said beside the table for its numbers to be understood."""
    seeds = {seed for runs in task.models.values() for seed in runs}
    several = any(len(runs) > 1 for runs in task.models.values())
    arrows = f"{ARROWS[True]} higher is better, {ARROWS[False]} lower is better."
    notes = [arrows, "± is one standard error over seeds."]
    if not several:
        one = f"One seed ({', '.join(map(str, sorted(seeds)))}): " if len(seeds) == 1 else ""
        notes[1] = (
            f"{one}± is one standard error over test items; it knows nothing of how another seed would have come out."
        )
    if task.baseline is not None and len(task.models) > 1:
        rule = (
            "outside the 95 % interval over seeds (Student's t, paired) and beyond twice the error over items"
            if several
            else "more than twice its standard error, paired item by item"
        )
        tested = sum(
            d.verdict != "no claim" for metric in task.metrics for d in metric.differences.values()
        )
        notes.append(
            f"With a value goes its difference to {task.baseline} (of shares in percentage points). A difference counts as better or "
            f"worse when it is {rule}; of {tested} such tests up to one in twenty would pass by chance if no difference were real."
        )
    names = {metric.name for metric in task.metrics}
    if "accepted_tokens_per_cycle" in names:
        notes.append(
            "Accepted tokens per cycle are the NextLat paper's \N{LEFT DOUBLE QUOTATION MARK}accepted tokens\N{RIGHT DOUBLE QUOTATION MARK}: "
            "the mean acceptance length minus the transformer's own token, which every cycle adds that no drafted end closes. "
            "Decoding is compared with plain KV-cached decoding of the same model."
        )
    if any(describe(name).counterpart for name in names):
        notes.append(
            "The dynamics model run alone is compared with the transformer of the baseline at the same length."
        )
    return notes + task.caveats
