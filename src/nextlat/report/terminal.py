"""The comparison as a table for the terminal. Nothing is printed here: the caller prints what it
gets."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nextlat.report.comparison import Comparison, MetricComparison, TaskComparison, Verdict
from nextlat.report.glossary import describe
from nextlat.report.solving import sentences, solving
from nextlat.report.wording import ARROWS, difference_text, estimate_text, footnotes

STYLES: dict[Verdict, str] = {
    "better": "bold green",
    "worse": "bold red",
    "within noise": "dim",
    "no claim": "dim",
}
MOST_OTHERS = 3  # models beside the baseline in one table: what 80 columns hold


def terminal_table(comparison: Comparison) -> RenderableType:
    """One table per task: a row per metric, a column per model, under each value its difference to
    the baseline and the verdict.

    More models than fit beside one another go into several tables, each with the baseline.
    """
    parts: list[RenderableType] = []
    for task in comparison.tasks:
        parts += [*_tables(task), Text(_notes(task), style="dim")]
    return Group(*parts)


def _tables(task: TaskComparison) -> list[Table]:
    base = [label for label in task.models if label == task.baseline]
    others = [label for label in task.models if label != task.baseline]
    count = -(-len(others) // MOST_OTHERS) or 1
    size = -(-len(others) // count)
    return [
        _table(task, [*base, *others[first : first + size]])
        for first in range(0, max(len(others), 1), max(size, 1))
    ]


def _table(task: TaskComparison, labels: Sequence[str]) -> Table:
    table = Table(
        title=task.task,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        pad_edge=False,
        box=None,
    )
    table.add_column("", overflow="fold")
    for label in labels:
        table.add_column(label, justify="right", header_style="bold")
    for metric in task.metrics:
        title = f"{ARROWS[metric.higher_is_better]} {describe(metric.name).title}"
        table.add_row(title, *(_cell(metric, label, beside=len(labels) < 3) for label in labels))
    return table


def _cell(metric: MetricComparison, label: str, *, beside: bool) -> Text:
    estimate, difference = metric.estimates.get(label), metric.differences.get(label)
    if estimate is None:
        return Text("\N{EN DASH}", style="dim")
    text = Text(estimate_text(metric.name, estimate))
    if difference is not None and describe(metric.name).reference is None:
        text.append(f"\n{difference_text(metric.name, difference)}", style="dim")
    if difference is not None and difference.verdict != "no claim":
        beside = beside and "\n" in text.plain
        text.append(" " if beside else "\n").append(
            difference.verdict, style=STYLES[difference.verdict]
        )
    return text


def _notes(task: TaskComparison) -> str:
    found = solving(task.task, task.models)
    return "\n".join(["", *(sentences(found) if found else []), *footnotes(task), ""])
