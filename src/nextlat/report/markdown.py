"""The report as Markdown: GitHub's, readable as plain text, with the pictures by relative links."""

import re
from collections.abc import Iterable, Sequence
from urllib.parse import quote

from nextlat.report import tables
from nextlat.report.comparison import Comparison, TaskComparison
from nextlat.report.facts import (
    BY_ITEMS,
    INTRODUCTION,
    OTHER_SCALE,
    commands,
    definitions,
    headline,
    of_another_scale,
    sayings,
    scale,
    title,
)
from nextlat.report.pictures import MAPS_TEXT, MAPS_TITLE, Picture, Pictures
from nextlat.report.published import PUBLISHED
from nextlat.report.reproduction import reproduction, reproduction_notes, reproduction_summary
from nextlat.report.solving import definition
from nextlat.report.tables import MARKS, Cell, Table
from nextlat.report.wording import claims, footnotes, summary

ORIGIN = (
    "Written by `nextlat report RUNS -o DIR --markdown FILE`, not by hand: what was measured here comes from the result files of runs, "
    "which the commands at the end of each section made."
)


def markdown(comparison: Comparison, pictures: Sequence[Pictures], folder: str) -> str:
    """The whole document; `pictures` go with `comparison.tasks` and lie in `folder`, a path from
    where the document is to lie."""
    parts = [f"# {_text(headline(comparison))}", _text(INTRODUCTION), ORIGIN, _contents(comparison)]
    for task, shown in zip(comparison.tasks, pictures, strict=True):
        parts += _task(task, shown, folder)
    parts.append("## What was measured")
    parts.append(
        _list(
            [
                f"**{_text(term.title)}**: {_text(f'{term.definition} ({term.source})')}"
                for term in definitions(comparison)
            ]
        )
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def _contents(comparison: Comparison) -> str:
    """What each section says, in a line."""
    return _list(
        [
            f"[{_text(title(task))}](#{title(task).lower().replace(' ', '-')}). "
            + _text(f"{summary(task)} {reproduction_summary(reproduction(task))}".strip())
            for task in comparison.tasks
        ]
    )


def _task(task: TaskComparison, pictures: Pictures, folder: str) -> list[str]:
    every_seed, solving = tables.every_seed(task), tables.seeds_that_solve(task)
    parts = [
        f"## {_text(title(task))}",
        f"Scale: {_text(scale(task))}.",
        _table(tables.measurements(task)),
    ]
    parts.append(_list(map(_text, footnotes(task))))
    if every_seed is not None:
        parts.append(_details("Every seed by itself", f"{BY_ITEMS}\n\n{_table(every_seed)}"))
    parts += _findings(task)
    if solving is not None:
        parts += ["### Which seeds solve it", _table(solving), _text(definition())]
    parts += _pictures(pictures, folder)
    parts += _paper(task)
    parts.append(
        _details("How it was made", f"{_table(tables.making(task))}\n\n```\n{commands(task)}\n```")
    )
    return parts


def _findings(task: TaskComparison) -> list[str]:
    """What is claimed; what is not, folded."""
    found = claims(task)
    said = [claim for claim in found if claim.verdict in ("better", "worse")]
    unclear = [claim for claim in found if claim not in said]
    lines, rest = (
        _list(
            [
                f"{MARKS[claim.verdict]}: **{_text(claim.lead)}**: {_numbers(_text(claim.numbers))}."
                for claim in some
            ]
        )
        for some in (said, unclear)
    )
    if not found:
        return []
    folded = (
        _details(f"{len(unclear)} differences from which nothing follows", rest) if unclear else ""
    )
    return ["### Findings", _text(summary(task)), lines, folded]


def _pictures(pictures: Pictures, folder: str) -> list[str]:
    parts = []
    if pictures.together:
        (first, shown), *others = pictures.together.items()
        parts += [
            f"### {MAPS_TITLE}",
            MAPS_TEXT + (f" Seed {first}." if others else ""),
            _picture(shown, folder),
        ]
        parts += [_details(f"Seed {seed}", _picture(picture, folder)) for seed, picture in others]
    if pictures.figures:
        parts += ["### Pictures", *(_picture(picture, folder) for picture in pictures.figures)]
    return parts


def _picture(picture: Picture, folder: str) -> str:
    text = f"![{_text(picture.alt)}]({quote(f'{folder}/{picture.path.name}')})"
    return f"{text}\n\n{_text(picture.caption)}" if picture.caption else text


def _paper(task: TaskComparison) -> list[str]:
    """What reproduces, and what was published."""
    published, reproduced = PUBLISHED.get(task.task), tables.reproduced(task)
    parts = []
    if reproduced is not None:
        found = reproduction(task)
        parts += [
            "### What reproduces",
            reproduction_summary(found),
            _table(reproduced),
            *reproduction_notes(found),
        ]
    if published is not None:
        figures = tables.published_figures(task)
        parts += [
            f"### {OTHER_SCALE}",
            _text(of_another_scale(published)),
            _table(figures) if figures is not None else "",
        ]
        parts.append(_list(map(_text, sayings(published))))
    return parts


# ---- elements ----


def _table(table: Table) -> str:
    """Columns are padded, for those who read the text itself."""
    rows = [[*table.names, *table.head]] + [
        [*names, *map(_cell, cells)] for names, cells in table.rows
    ]
    lines = [[_numbers(_text(text)).replace("|", r"\|") for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruler = ["-" * width for width in widths]
    return "\n".join(
        f"| {' | '.join(text.ljust(width) for text, width in zip(line, widths, strict=True))} |"
        for line in (lines[0], ruler, *lines[1:])
    )


def _cell(cell: Cell) -> str:
    beside = ", ".join(
        part for part in (cell.change, MARKS[cell.verdict] if cell.verdict else "") if part
    )
    return f"{cell.text} ({beside})" if beside else cell.text


def _numbers(text: str) -> str:
    """Numbers stay together with their signs and units at the end of a line."""
    return re.sub(r" (?=[±%])|(?<=±) ", "\N{NO-BREAK SPACE}", text)


def _text(text: str) -> str:
    """As it is, whatever Markdown would make of it."""
    return re.sub(r"([\\*<~\[\]])", r"\\\1", text)


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _details(name: str, content: str) -> str:
    return f"<details><summary>{name}</summary>\n\n{content}\n\n</details>"
