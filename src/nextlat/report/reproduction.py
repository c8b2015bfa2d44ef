"""What reproduces: does a method differ from next-token prediction in the direction that the paper
reports?

Directions only, since the scales differ. A published difference has one whenever its two figures
are not equal (the paper gives no errors); ours has one if the verdict of the comparison is better
or worse.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from nextlat.report.comparison import (
    BASELINE,
    Difference,
    Estimate,
    MetricComparison,
    TaskComparison,
)
from nextlat.report.models import TITLES, first_run
from nextlat.report.published import PUBLISHED, Published

Outcome = Literal[
    "same direction",
    "opposite",
    "within noise here",
    "no claim here",
    "no difference published",
    "in words only",
]
REFERENCE = "GPT"  # what the paper calls the baseline
RULE = (
    "Directions only: the published figures are of another scale and come without errors, so that any difference between them counts; "
    "one here counts if it is better or worse beyond the noise."
)


@dataclass(frozen=True)
class Reproduction:
    """One metric of one model beside what is published of its method.

    Attributes:
        metric, model: ours. published: (the method's figure, GPT's), or what the paper says in
            words.
        horizon: of the method's figure, if it is not ours.
        estimate: of this model. difference: to the baseline; None of the baseline itself.
        outcome: of the two directions.
    """

    metric: str
    model: str
    published: tuple[float, float] | str
    estimate: Estimate
    difference: Difference | None
    outcome: Outcome
    horizon: int | None = None


def reproduction(task: TaskComparison) -> list[Reproduction]:
    """All that can be set beside each other, metric by metric: figures, then words.

    A method whose figures are published by horizon is compared at the horizon nearest to ours.
    """
    published = PUBLISHED.get(task.task)
    return [] if published is None else [*_figures(task, published), *_words(task, published)]


def _figures(task: TaskComparison, published: Published) -> Iterator[Reproduction]:
    if task.baseline is None or first_run(task.models[task.baseline]).objective != BASELINE:
        return
    reference = published.rows.get(REFERENCE, {})
    theirs = {
        ours: name for name in reference for ours in (published.ours or {}).get(name, (name,))
    }
    for metric in task.metrics:
        if metric.name not in theirs:
            continue
        name = theirs[metric.name]
        for label, difference in metric.differences.items():
            row, horizon = _row(published, task, label)
            if name in row:
                figures = (row[name], reference[name])
                outcome = _outcome(figures, metric, difference)
                yield Reproduction(
                    metric.name,
                    label,
                    figures,
                    metric.estimates[label],
                    difference,
                    outcome,
                    horizon,
                )


def _row(
    published: Published, task: TaskComparison, label: str
) -> tuple[dict[str, float], int | None]:
    """What is published of a model's method, and the horizon of it where that is another than the
    model's."""
    run = first_run(task.models[label])
    method = TITLES.get(run.objective, run.objective)
    if method in published.rows:
        return published.rows[method], None
    by_horizon = {
        int(name.removeprefix(f"{method} d=")): row
        for name, row in published.rows.items()
        if name.startswith(f"{method} d=")
    }
    if not by_horizon:
        return {}, None
    nearest = min(by_horizon, key=lambda horizon: (abs(horizon - run.horizon), horizon))
    return by_horizon[nearest], nearest if nearest != run.horizon else None


def _outcome(
    published: tuple[float, float], metric: MetricComparison, difference: Difference
) -> Outcome:
    ours, theirs = published
    if ours == theirs:
        return "no difference published"
    if difference.verdict == "within noise":
        return "within noise here"
    if difference.verdict == "no claim":
        return "no claim here"
    better = (ours > theirs) == metric.higher_is_better
    return "same direction" if better == (difference.verdict == "better") else "opposite"


def _words(task: TaskComparison, published: Published) -> Iterator[Reproduction]:
    for saying in published.sayings:
        for metric in task.metrics:
            if not re.fullmatch(saying.metrics, metric.name):
                continue
            for label, estimate in metric.estimates.items():
                objective = first_run(task.models[label]).objective
                method = REFERENCE if objective == BASELINE else TITLES.get(objective, objective)
                if method in saying.methods:
                    difference = metric.differences.get(label)
                    yield Reproduction(
                        metric.name, label, saying.text, estimate, difference, "in words only"
                    )


def reproduction_summary(found: list[Reproduction]) -> str:
    """How many published differences came out which way; "" if nothing is published that was
    measured here."""
    if not found:
        return ""
    if all(one.outcome == "in words only" for one in found):
        return "The paper gives words here, and no figures."
    outcomes = [
        one.outcome
        for one in found
        if one.outcome not in ("no difference published", "in words only")
    ]
    if not outcomes:
        return f"No difference to {REFERENCE} is published."
    words: tuple[tuple[Outcome, str], ...] = (
        ("same direction", "in the same direction here"),
        ("opposite", "in the opposite one"),
        ("within noise here", "within the noise"),
        ("no claim here", "without an error here"),
    )
    counts = [
        f"{outcomes.count(name)} {text}"
        for name, text in words
        if name != "no claim here" or name in outcomes
    ]
    return f"Of {len(outcomes)} published difference{'s' * (len(outcomes) > 1)} to {REFERENCE}: {', '.join(counts)}."


def reproduction_notes(found: list[Reproduction]) -> list[str]:
    """What must be said below the table."""
    return [RULE] if any(one.outcome != "in words only" for one in found) else []
