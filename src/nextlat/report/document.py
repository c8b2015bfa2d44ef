"""The report as a document: what a comparison found, put together once for every rendering."""

import itertools
import json
import shlex
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nextlat.report.claims import (
    claims,
    difference_text,
    estimate_text,
    footnotes,
    seed_text,
    summary,
    titled,
    with_error,
)
from nextlat.report.comparison import (
    BASELINE,
    Difference,
    SeedDifference,
    SeedSolving,
    TaskComparison,
    Verdict,
)
from nextlat.report.elements import (
    Bullet,
    Bullets,
    Cell,
    Code,
    Details,
    Element,
    Heading,
    Mark,
    Paragraph,
    Table,
)
from nextlat.report.pictures import Drawer
from nextlat.report.published import RULE, reference, reproduction, reproduction_summary
from nextlat.report.runs import Run, first_run, look_up

NONE = "\N{EN DASH}"
INTRODUCTION = (
    "The same transformer trained with different objectives, measured on what it knows about its "
    "world. Each difference comes with its error; only what lies beyond the error is claimed."
)
ORIGIN = (
    "Written by “nextlat report”, not by hand: what was measured here comes from the result files "
    "of runs, and the commands that made them stand at the end of each section."
)
BY_ITEMS = (
    "Errors and verdicts over test items; in brackets the 95 % interval (Wilson) of what is a "
    "share of them."
)
MARKS: dict[Verdict, Mark] = {
    "better": Mark("better", "▲", "good"),
    "worse": Mark("worse", "▼", "bad"),
    "within noise": Mark("within noise", "≈"),
    "no claim": Mark("no claim"),
}
FACTS = {  # their keys in run.json
    "Recipe": "recipe_name",
    "Optimiser steps": "recipe.steps",
    "Rows per step": "recipe.batch_size",
    "Training tokens": "tokens",
    "Parameters, transformer": "parameters.lm",
    "Parameters, objective's own": "parameters.objective",
    "Seeds": "seed",
    "Device": "device",
    "Threads": "threads",
    "Seconds of training": "seconds",
    "Versions": "versions",
    "Git commit": "git",
    "World": "task.fingerprint",
}
SCALE = 9  # so many of them say how large a run was
LEFT_OUT = ("--out", "--progress", "--no-progress")  # of commands


def headline(tasks: Sequence[TaskComparison]) -> str:
    """Which objectives are compared with which."""
    objectives = dict.fromkeys(run.result.objective.title for task in tasks for run in task.runs)
    bases = {
        run.result.objective.title: None
        for task in tasks
        for run in task.models.get(task.baseline or "", {}).values()
    }
    others = [title for title in objectives if title not in bases]
    return " against ".join(", ".join(titles) for titles in (others, bases) if titles)


def document(tasks: Sequence[TaskComparison], folder: Path) -> list[Element]:
    """The whole report.

    Args:
        tasks: what was compared.
        folder: an existing directory, into which its figures are drawn.

    Raises:
        NextLatError: the file of a picture is missing or corrupt.
    """
    parts: list[Element] = [
        Heading(headline(tasks), 1),
        Paragraph(INTRODUCTION, quiet=True),
        Paragraph(ORIGIN, quiet=True),
    ]
    if len(tasks) > 1:
        overview = [
            Bullet(f"{summary(task)} {reproduction_summary(task)}", task.task.title, link=True)
            for task in tasks
        ]
        parts.append(Bullets(overview))
    with warnings.catch_warnings():  # letters that the font lacks, labels that leave no room
        warnings.filterwarnings("ignore", "Glyph .* missing|constrained_layout not", UserWarning)
        for task in tasks:
            parts += _task(task, Drawer(task, folder, task.task.name if len(tasks) > 1 else ""))
    defined = dict.fromkeys(
        Bullet(m.definition + (f" ({m.source})" if m.source else ""), lead=m.title)
        for task in tasks
        for m in (one.metric for one in task.metrics)
        if m.definition
    )
    return [*parts, Heading("What was measured", 2), Bullets([*defined])]


def digest(tasks: Sequence[TaskComparison]) -> list[Element]:
    """What a terminal shows of the report: the measurements of every task."""
    parts: list[Element] = []
    for task in tasks:
        table, notes = _measurements(task)
        parts += [Heading(task.task.title, 2), table, *_solving(task), notes]
    return parts


def _task(task: TaskComparison, drawer: Drawer) -> list[Element]:
    return [
        Heading(task.task.title, 2),
        Paragraph(f"Scale: {_scale(task)}.", quiet=True),
        *_findings(task),
        *drawer.of_models(),
        Heading("Measurements", 3),
        *_measurements(task),
        *_every_seed(task),
        *_solving(task),
        *drawer.of_comparison(),
        *_reproduced(task),
        *_published(task),
        *_making(task),
    ]


def _notes(texts: Iterable[str]) -> Bullets:
    return Bullets([Bullet(text) for text in texts], "notes")


def _findings(task: TaskComparison) -> list[Element]:
    """What is claimed; what is not, folded."""
    said: list[Bullet] = []
    unclear: list[Bullet] = []
    for claim in claims(task):
        bullet = Bullet(f"{claim.numbers}.", claim.lead, MARKS[claim.verdict])
        (said if claim.verdict in ("better", "worse") else unclear).append(bullet)
    if not said and not unclear:
        return []
    parts: list[Element] = [Heading("Findings", 3), Paragraph(summary(task))]
    parts.append(Bullets(said, "findings"))
    if unclear:
        count = f"{len(unclear)} difference{'s' * (len(unclear) > 1)}"
        folded = Bullets(unclear, "findings")
        parts.append(Details(f"{count} from which nothing follows", [folded]))
    return parts


def _measurements(task: TaskComparison) -> tuple[Table, Bullets]:
    """Every metric of every model, and what must be said below."""
    rows = []
    for one in task.metrics:
        cells = []
        for label in task.models:
            estimate, difference = one.estimates.get(label), one.differences.get(label)
            text = estimate_text(one.metric, estimate) if estimate else NONE
            compared = difference if one.metric.reference is None else None
            change = difference_text(one.metric, compared) if compared else ""
            cells.append(Cell(text, change, _claimed(difference)))
        rows.append(([titled(one.metric)], cells))
    pinned = int(task.baseline is not None)
    return Table(["metric"], list(task.models), rows, pinned), _notes(footnotes(task))


def _every_seed(task: TaskComparison) -> list[Element]:
    """Every metric of every run, if there is more than one seed."""
    if len(task.seeds) < 2:
        return []
    rows = []
    for one in task.metrics:
        for label, estimate in one.estimates.items():
            difference, cells = one.differences.get(label), []
            for seed in task.seeds:
                there = seed in estimate.seeds
                mark = _claimed(difference.seeds.get(seed)) if difference else None
                text = seed_text(one.metric, estimate, seed) if there else NONE
                cells.append(Cell(text, mark=mark))
            rows.append(([one.metric.title, label], cells))
    table = Table(["metric", "model"], [f"seed {seed}" for seed in task.seeds], rows)
    return [Details("Every seed by itself", [Paragraph(BY_ITEMS, quiet=True), table])]


def _claimed(difference: Difference | SeedDifference | None) -> Mark | None:
    """In a table nothing is said where nothing is claimed."""
    if difference is None or difference.verdict == "no claim":
        return None
    return MARKS[difference.verdict]


def _solving(task: TaskComparison) -> list[Element]:
    """Which seeds solve the task, and from which step on."""
    if task.task.solved is None or not task.solving:
        return []
    seeds = sorted({seed for found in task.solving.values() for seed in found})
    rows = []
    for label, found in task.solving.items():
        solved = f"{sum(one.solved for one in found.values())} of {len(found)}"
        texts = [solved, *(_state(found.get(seed)) for seed in seeds)]
        rows.append(([label], [Cell(text) for text in texts]))
    head = ["solved", *(f"seed {seed}" for seed in seeds)]
    return [
        Heading("Which seeds solve it", 3),
        Table(["model"], head, rows, pinned=1),
        _notes([task.task.solved.definition]),
    ]


def _state(one: SeedSolving | None) -> str:
    if one is None or not one.solved:
        return NONE if one is None else "not solved"
    return "solved" if one.step is None else f"from step {one.step:,}"


def _reproduced(task: TaskComparison) -> list[Element]:
    """What is published beside what was measured here."""
    rows = []
    found = reproduction(task)
    for one in found:
        published = one.published
        if not isinstance(published, str):
            published = " against ".join(with_error(x, None, one.metric.unit) for x in published)
        published += f" (d={one.horizon})" if one.horizon is not None else ""
        change = "" if one.difference is None else difference_text(one.metric, one.difference)
        here = Cell(estimate_text(one.metric, one.estimate), change)
        rows.append(([one.metric.title, one.model], [Cell(published), here, Cell(one.outcome)]))
    if not rows:
        return []
    head = [
        f"published, against {reference(task)}" if reference(task) else "published",
        f"here, and its difference to {task.baseline or BASELINE}",
        "direction",
    ]
    return [
        Heading("What reproduces", 3),
        Paragraph(reproduction_summary(task)),
        Table(["metric", "model"], head, rows, words=True),
        _notes([RULE] if any(one.outcome != "in words only" for one in found) else []),
    ]


def _published(task: TaskComparison) -> list[Element]:
    """What the paper reports: in figures, the metrics measured here first; and in words."""
    published = task.task.published
    if published is None:
        return []
    here = [one.metric.published for one in task.metrics]
    keys = sorted(published.figures, key=lambda key: here.index(key) if key in here else len(here))
    shown = [published.figures[key] for key in keys]
    rows: dict[str, list[Cell]] = {method: [] for figures in shown for method in figures.by_method}
    for figures in shown:
        for method, cells in rows.items():
            figure = figures.by_method.get(method)
            cells.append(Cell(NONE if figure is None else with_error(figure, None, figures.unit)))
    scale = (
        f"Not comparable number by number, these are of {published.setting} ({published.source}). "
        "What can be compared is which method is ahead."
    )
    content: list[Element] = [
        Paragraph(scale),
        Table(["method"], [figures.title for figures in shown], [([m], rows[m]) for m in rows]),
        Bullets([Bullet(f"{one.text}.", ", ".join(one.methods)) for one in published.sayings]),
    ]
    return [Details("Published figures, on another scale", content)]


def _making(task: TaskComparison) -> list[Element]:
    """How the runs of every model were made."""
    known = [_facts(runs.values()) for runs in task.models.values()]
    rows = [([name], [Cell(facts[name]) for facts in known]) for name in FACTS]
    commands = dict.fromkeys(map(_command, task.runs))
    recipes = []
    for label, runs in task.models.items():
        recipe = {**first_run(runs).recipe, "seed": [*runs]}
        text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in recipe.items())
        recipes.append(Details(f"Recipe of {label}", [Code(text)]))
    return [
        Heading("How it was made", 3),
        Table([""], list(task.models), rows, words=True),
        Details("Commands", [Code("\n".join(commands))]),
        *recipes,
    ]


def _facts(runs: Iterable[Run]) -> dict[str, str]:
    """What to know of one model's runs; facts that differ between its seeds are all given."""
    return {
        name: ", ".join(dict.fromkeys(_fact(key, look_up(run.record, key)) for run in runs))
        for name, key in FACTS.items()
    }


def _fact(key: str, value: Any) -> str:
    if key == "git" and value:  # shortened; the plus sign of changed files stays
        return value[:12] + "+" * value.endswith("+")
    if isinstance(value, Mapping):
        return ", ".join(map(" ".join, value.items()))
    if isinstance(value, int | float) and key != "seed":
        return f"{value:,.0f}"
    return NONE if value in (None, "") else str(value)


def _scale(task: TaskComparison) -> str:
    """How large the runs were, in one line; what differs between models is given for each."""
    known = {label: _facts(runs.values()) for label, runs in task.models.items()}
    parts = []
    for name in [*FACTS][:SCALE]:
        shown = [*dict.fromkeys(facts[name] for facts in known.values())]
        if len(shown) > 1:
            shown = [f"{facts[name]} ({label})" for label, facts in known.items()]
        parts.append(f"{name[0].lower()}{name[1:]}: {'; '.join(shown)}")
    return " \N{MIDDLE DOT} ".join(parts)


def _command(run: Run) -> str:
    """The command that trained a run, without where the run went and how it was watched, which
    changes nothing and says where somebody keeps files."""
    words = run.record["command"][1:]
    kept = [
        word
        for before, word in itertools.pairwise(["nextlat", *words])
        if before != "--out" and word.partition("=")[0] not in LEFT_OUT
    ]
    return shlex.join(["nextlat", *kept]) if words else NONE
