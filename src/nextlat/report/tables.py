"""The tables of a report, for any page to show: what stands in every cell, and not how it looks."""

from collections.abc import Sequence
from dataclasses import dataclass

from nextlat.report.comparison import BASELINE, Difference, SeedDifference, TaskComparison, Verdict
from nextlat.report.facts import NONE, facts
from nextlat.report.glossary import describe
from nextlat.report.published import PUBLISHED
from nextlat.report.reproduction import REFERENCE, reproduction
from nextlat.report.solving import solving
from nextlat.report.wording import ARROWS, difference_text, estimate_text, seed_text, with_error

MARKS: dict[Verdict, str] = {
    "better": "▲ better",
    "worse": "▼ worse",
    "within noise": "≈ within noise",
    "no claim": "no claim",
}


@dataclass(frozen=True)
class Cell:
    """A value or words, what the value differs by from the baseline's, and the verdict on that,
    where there is one."""

    text: str
    change: str = ""
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Table:
    """`names`: of the columns that name a row. `head`: of the others. `rows`: (the names of a row,
    its cells)."""

    names: Sequence[str]
    head: Sequence[str]
    rows: Sequence[tuple[Sequence[str], Sequence[Cell]]]


def measurements(task: TaskComparison) -> Table:
    """Every metric of every model."""
    rows = []
    for metric in task.metrics:
        term = describe(metric.name)
        cells = []
        for label in task.models:
            estimate, difference = metric.estimates.get(label), metric.differences.get(label)
            if estimate is None:
                cells.append(Cell(NONE))
                continue
            change = (
                difference_text(metric.name, difference)
                if difference is not None and term.reference is None
                else ""
            )
            cells.append(Cell(estimate_text(metric.name, estimate), change, _claimed(difference)))
        rows.append(
            ([f"{term.title}\N{NO-BREAK SPACE}{ARROWS[metric.higher_is_better]}".strip()], cells)
        )
    return Table(["metric"], list(task.models), rows)


def every_seed(task: TaskComparison) -> Table | None:
    """Every metric of every run; None where there is but one seed."""
    seeds = sorted({seed for runs in task.models.values() for seed in runs})
    if len(seeds) < 2:
        return None
    rows = []
    for metric in task.metrics:
        for label, estimate in metric.estimates.items():
            difference = metric.differences.get(label)
            cells = []
            for seed in seeds:
                text = seed_text(metric.name, estimate, seed) if seed in estimate.seeds else NONE
                cells.append(
                    Cell(
                        text,
                        verdict=_claimed(
                            difference.seeds.get(seed) if difference is not None else None
                        ),
                    )
                )
            rows.append(([describe(metric.name).title, label], cells))
    return Table(["metric", "model"], [f"seed {seed}" for seed in seeds], rows)


def _claimed(difference: Difference | SeedDifference | None) -> Verdict | None:
    """In a table nothing is said where nothing is claimed."""
    return None if difference is None or difference.verdict == "no claim" else difference.verdict


def seeds_that_solve(task: TaskComparison) -> Table | None:
    """Path-Star: which seeds solve it, and from which step on."""
    found = solving(task.task, task.models)
    if found is None:
        return None
    seeds = sorted({seed for one in found.values() for seed in one})
    rows = []
    for label, ours in found.items():
        cells = [Cell(f"{sum(one.solved for one in ours.values())} of {len(ours)}")]
        for seed in seeds:
            one = ours.get(seed)
            step = (
                f"from step {one.step:,}" if one is not None and one.step is not None else "solved"
            )
            cells.append(Cell(NONE if one is None else step if one.solved else "not solved"))
        rows.append(([label], cells))
    return Table(["model"], ["solved", *(f"seed {seed}" for seed in seeds)], rows)


def reproduced(task: TaskComparison) -> Table | None:
    """What is published beside what was measured here; None where nothing of it was."""
    rows = []
    for found in reproduction(task):
        unit = describe(found.metric).unit
        figures = () if isinstance(found.published, str) else found.published
        published = " against ".join(with_error(value, None, unit) for value in figures) or str(
            found.published
        )
        published += f" (d={found.horizon})" if found.horizon is not None else ""
        change = "" if found.difference is None else difference_text(found.metric, found.difference)
        here = Cell(estimate_text(found.metric, found.estimate), change)
        rows.append(
            (
                [describe(found.metric).title, found.model],
                [Cell(published), here, Cell(found.outcome)],
            )
        )
    head = [
        f"published, against {REFERENCE}",
        f"here, and its difference to {task.baseline or BASELINE}",
        "direction",
    ]
    return Table(["metric", "model"], head, rows) if rows else None


def published_figures(task: TaskComparison) -> Table | None:
    """What the paper gives in figures: the metrics measured here first."""
    published = PUBLISHED.get(task.task)
    if published is None or not published.rows:
        return None
    here = [metric.name for metric in task.metrics]
    given = list(dict.fromkeys(name for row in published.rows.values() for name in row))
    names = [
        *(name for name in here if name in given),
        *(name for name in given if name not in here),
    ]
    rows = [
        (
            [method],
            [
                Cell(with_error(row[name], None, describe(name).unit) if name in row else NONE)
                for name in names
            ],
        )
        for method, row in published.rows.items()
    ]
    return Table(["method"], [describe(name).title for name in names], rows)


def making(task: TaskComparison) -> Table:
    """How the runs of every model were made."""
    found = [facts(runs.values()) for runs in task.models.values()]
    return Table(
        [""],
        list(task.models),
        [([name], [Cell(known[name]) for known in found]) for name in found[0]],
    )
