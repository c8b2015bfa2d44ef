"""The page itself: one HTML file without scripts or links to other files, for light and dark, wide
and narrow screens."""

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape

from nextlat.report import tables
from nextlat.report.comparison import Comparison, TaskComparison, Verdict
from nextlat.report.facts import (
    BY_ITEMS,
    INTRODUCTION,
    NONE,
    OTHER_SCALE,
    commands,
    definitions,
    headline,
    of_another_scale,
    sayings,
    title,
)
from nextlat.report.models import first_run
from nextlat.report.pictures import MAPS_TEXT, MAPS_TITLE, Picture, Pictures
from nextlat.report.published import PUBLISHED
from nextlat.report.reproduction import reproduction, reproduction_notes, reproduction_summary
from nextlat.report.solving import definition
from nextlat.report.style import STYLE
from nextlat.report.tables import MARKS, Cell, Table
from nextlat.report.wording import claims, footnotes, summary

CLASSES: dict[Verdict, str] = {
    "better": "better",
    "worse": "worse",
    "within noise": "noise",
    "no claim": "noise",
}


def page(comparison: Comparison, pictures: Sequence[Pictures]) -> str:
    """The whole HTML document; `pictures` go with `comparison.tasks`."""
    name = escape(headline(comparison))
    sections = "".join(
        _task(task, shown, alone=len(comparison.tasks) == 1)
        for task, shown in zip(comparison.tasks, pictures, strict=True)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{name}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header><h1>{name}</h1><p>{escape(INTRODUCTION)}</p></header>\n"
        f"{sections}{_definitions(comparison)}</main>\n</body>\n</html>\n"
    )


def _task(task: TaskComparison, pictures: Pictures, *, alone: bool) -> str:
    return (
        f"<section>\n{'' if alone else f'<h2 class=task>{escape(title(task))}</h2>'}\n"
        f"{_findings(task)}{_maps(pictures)}{_measurements(task)}{_solving(task)}{''.join(map(_figure, pictures.figures))}"
        f"{_every_seed(task)}{_reproduced(task)}{_published(task)}{_making(task)}</section>\n"
    )


def _findings(task: TaskComparison) -> str:
    found = claims(task)
    if not found:
        return ""
    items = "".join(
        f"<li class={CLASSES[claim.verdict]}>{_mark(claim.verdict)}"
        f"<span><b>{escape(claim.lead)}</b>: {_numbers(claim.numbers)}.</span></li>\n"
        for claim in found
    )
    return f"<h2>Findings</h2>\n<p>{escape(summary(task))}</p>\n<ul class=findings>\n{items}</ul>\n"


def _measurements(task: TaskComparison) -> str:
    return f"<h2>Measurements</h2>\n{_table(tables.measurements(task))}{_list(footnotes(task), 'notes')}"


def _every_seed(task: TaskComparison) -> str:
    table = tables.every_seed(task)
    if table is None:
        return ""
    return _details("Every seed by itself", f"<p class=quiet>{BY_ITEMS}</p>\n{_table(table)}")


def _solving(task: TaskComparison) -> str:
    table = tables.seeds_that_solve(task)
    return (
        ""
        if table is None
        else f"<h2>Which seeds solve it</h2>\n{_table(table)}{_list([definition()], 'notes')}"
    )


def _reproduced(task: TaskComparison) -> str:
    table = tables.reproduced(task)
    if table is None:
        return ""
    found = reproduction(task)
    said = escape(reproduction_summary(found))
    return f"<h2>What reproduces</h2>\n<p>{said}</p>\n{_table(table, 'words')}{_list(reproduction_notes(found), 'notes')}"


def _published(task: TaskComparison) -> str:
    published = PUBLISHED.get(task.task)
    if published is None:
        return ""
    table = tables.published_figures(task)
    figures = "" if table is None else _table(table)
    return _details(
        OTHER_SCALE,
        f"<p>{escape(of_another_scale(published))}</p>\n{figures}{_list(sayings(published))}",
    )


# ---- elements ----


def _table(table: Table, kind: str = "") -> str:
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in table.head)
    rows = ""
    for (name, *more), cells in table.rows:
        below = "".join(f"<span class=change>{escape(text)}</span>" for text in more)
        rows += f"<tr><th scope=row>{escape(name)}{below}</th>{''.join(f'<td>{_cell(cell)}</td>' for cell in cells)}</tr>\n"
    return (
        f"<div class=scroll><table{f' class={kind}' if kind else ''}>\n<thead><tr><td></td>{head}</tr></thead>\n"
        f"<tbody>\n{rows}</tbody></table></div>\n"
    )


def _cell(cell: Cell) -> str:
    if cell.text == NONE:
        return f"<span class=quiet>{NONE}</span>"
    change = f"<span class=change>{_numbers(cell.change)}</span> " if cell.change else ""
    return f"<span class=value>{_numbers(cell.text)}</span>{change}{_mark(cell.verdict) if cell.verdict else ''}"


def _mark(verdict: Verdict) -> str:
    return f'<span class="mark {CLASSES[verdict]}">{MARKS[verdict]}</span>'


def _numbers(text: str) -> str:
    """Numbers stay together with their signs and units at the end of a line."""
    return escape(text).replace(" ±", "&nbsp;±").replace("± ", "±&nbsp;").replace(" %", "&nbsp;%")


def _list(items: Sequence[str], kind: str = "") -> str:
    if not items:
        return ""
    return f"<ul{f' class={kind}' if kind else ''}>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>\n"


def _details(name: str, content: str) -> str:
    return f"<details><summary>{escape(name)}</summary>\n{content}</details>\n"


# ---- pictures ----


def _maps(pictures: Pictures) -> str:
    if not pictures.maps:
        return ""
    (first, shown), *others = pictures.maps.items()
    text = f"<h2>{MAPS_TITLE}</h2>\n<p>{MAPS_TEXT}{f' Seed {first}.' if others else ''}</p>\n{_side_by_side(shown)}"
    return text + "".join(_details(f"Seed {seed}", _side_by_side(more)) for seed, more in others)


def _side_by_side(pictures: Iterable[Picture]) -> str:
    return f"<div class=maps>{''.join(map(_figure, pictures))}</div>\n"


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.path.read_bytes()).decode()
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    return f'<figure><img src="data:image/png;base64,{data}" alt="{escape(picture.alt)}">{caption}</figure>\n'


# ---- how it was made, what it means ----


def _making(task: TaskComparison) -> str:
    recipes = "".join(
        _details(
            f"Recipe of {label}",
            f"<pre>{escape(json.dumps({**first_run(runs).recipe, 'seed': list(runs)}, indent=2))}</pre>",
        )
        for label, runs in task.models.items()
    )
    return (
        f"<h2>How it was made</h2>\n{_table(tables.making(task), 'facts')}"
        f"{_details('Commands', f'<pre>{escape(commands(task))}</pre>')}{recipes}"
    )


def _definitions(comparison: Comparison) -> str:
    items = "".join(
        f"<dt>{escape(term.title)}</dt><dd>{escape(term.definition)} <span class=quiet>({escape(term.source)})</span></dd>\n"
        for term in definitions(comparison)
    )
    return f"<section>\n<h2>What was measured</h2>\n<dl>\n{items}</dl>\n</section>\n"
