"""A document as Markdown, as one HTML page, and in a terminal. Nothing here knows what it is about.

The page is Markdown too, with HTML where Markdown has no word for it, turned into HTML by
markdown-it. Whatever text says, it stays text: all of it goes through `_escaped` or `_html`.
"""

import base64
import html
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from string import Template
from urllib.parse import quote

import numpy as np
from markdown_it import MarkdownIt
from rich.console import Group, RenderableType
from rich.table import Table as Grid
from rich.text import Text

from nextlat.report.elements import (
    Bullet,
    Bullets,
    Cell,
    Code,
    Details,
    Element,
    Figure,
    Heading,
    Mark,
    Paragraph,
    SideBySide,
    Table,
    plain,
    printable,
)

# What Markdown, with the tables, formulas and references of GitHub's, could take for its own.
_MARKUP = re.compile(r"[\\`*<\[\]~|$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)|#$")
_BLOCK = re.compile(r"^(?=[#>+=-])|^(\d+)(?=[.)](?:\s|$))")  # where a backslash keeps it a text
COLUMNS = 4  # of a table that 80 characters of a terminal hold, beside the names of its rows
NARROW = 2  # columns that leave room for a mark beside a value
TONES = {"good": "bold green", "bad": "bold red", "quiet": "dim"}


def markdown(elements: Iterable[Element], folder: str) -> str:
    """GitHub's Markdown, readable as plain text.

    Args:
        elements: of the document.
        folder: where its figures lie, a path from where the text is to lie.
    """
    return _Markdown(folder).render(elements) + "\n"


def page(elements: Iterable[Element], title: str) -> str:
    """One HTML file without scripts or links to other files, for light and dark, wide and narrow
    screens.

    Args:
        elements: of the document; their figures must exist.
        title: of the window.
    """
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = parser.parse(_Page().render(elements))
    for place, token in enumerate(tokens):
        if token.type == "heading_open":
            text = "".join(part.content for part in tokens[place + 1].children or [])
            token.attrSet("id", _anchor(text))
        elif token.type == "tr_open" and tokens[place + 1].type == "td_open":
            tokens[place + 1].tag = tokens[place + 3].tag = "th"  # it names its row
            tokens[place + 1].attrSet("scope", "row")
        elif token.type == "th_open":
            token.attrSet("scope", "col")
    body = parser.renderer.render(tokens, parser.options, {})
    template = files("nextlat.report").joinpath("page.html").read_text(encoding="utf-8")
    return Template(template).substitute(title=_html(title), body=body)


def terminal(elements: Iterable[Element]) -> RenderableType:
    """For rich to print. Figures, and what is folded away, are not for a terminal.

    A table with more columns than fit is taken apart, the pinned ones in each part.
    """
    parts: list[RenderableType] = []
    for element in elements:
        match element:
            case Heading(text):
                parts.append(Text(plain(text), style="bold"))
            case Paragraph(text):
                parts.append(Text(f"{plain(text)}\n"))
            case Bullets(items):
                lines = (plain(f"{item.lead}: {item.text}".removeprefix(": ")) for item in items)
                parts.append(Text("\n".join(["", *lines, ""]), style="dim"))
            case Table():
                parts += _grids(element)
            case Code(text):
                parts.append(Text(f"{printable(text)}\n"))
    return Group(*parts)


def _grids(table: Table) -> Iterator[Grid]:
    """Parts of about equal width."""
    pinned, others = range(table.pinned), range(table.pinned, len(table.head))
    count = math.ceil(len(others) / (COLUMNS - table.pinned)) or 1
    for part in np.array_split(others, count):
        columns = [*pinned, *part]
        grid = Grid(pad_edge=False, box=None)
        for name in table.names:
            grid.add_column(Text(plain(name)), overflow="fold")
        for column in columns:
            head = Text(plain(table.head[column]), style="bold")
            grid.add_column(head, justify="left" if table.words else "right")
        for names, cells in table.rows:
            shown = [_terminal_cell(cells[c], beside=len(columns) <= NARROW) for c in columns]
            grid.add_row(*(Text(plain(name)) for name in names), *shown)
        yield grid


def _terminal_cell(cell: Cell, *, beside: bool) -> Text:
    text = Text(plain(cell.text))
    if cell.change:
        text.append(f"\n{plain(cell.change)}", style="dim")
    if cell.mark is not None:
        text.append(" " if beside and cell.change else "\n")
        text.append(plain(cell.mark.text), style=TONES[cell.mark.tone])
    return text


class _Markdown:
    """Renders elements as Markdown that GitHub shows, with columns that line up in the text."""

    def __init__(self, folder: str = "") -> None:
        self.folder = folder

    def render(self, elements: Iterable[Element]) -> str:
        return "\n\n".join(filter(None, map(self.element, elements)))

    def element(self, element: Element) -> str:
        match element:
            case Table(rows=[]) | Bullets(items=[]):
                return ""
            case Heading(text, level):
                return f"{'#' * level} {_escaped(text)}"
            case Paragraph(text, quiet):
                return self.boxed(_escaped(text), "quiet" if quiet else "")
            case Bullets(items, kind):
                return self.boxed("\n".join(f"- {self.bullet(item)}" for item in items), kind)
            case Table(words=words):
                return self.boxed(self.table(element), "scroll words" if words else "scroll")
            case Code(text):
                fence = "`" * max(len(run) + 1 for run in ["``", *re.findall("`+", text)])
                return f"{fence}\n{printable(text)}\n{fence}"
            case Figure():
                return self.figure(element)
            case SideBySide():
                return self.side_by_side(element)
            case Details(title, content):
                head = f"<details><summary>{_html(title)}</summary>"
                return f"{head}\n\n{self.render(content)}\n\n</details>"

    def boxed(self, text: str, kind: str) -> str:
        """Text in what a page may set in its own way."""
        return text

    def bullet(self, item: Bullet) -> str:
        mark = f"{_escaped(str(item.mark))}: " if item.mark else ""
        return f"{mark}{self.lead(item)}{_escaped(item.text)}"

    def lead(self, item: Bullet) -> str:
        if item.link:
            return f"[{_escaped(item.lead)}](#{_anchor(item.lead)}). "
        return f"**{_escaped(item.lead)}**: " if item.lead else ""

    def table(self, table: Table) -> str:
        head = [*self.names(table.names), *map(_escaped, table.head)]
        body = [[*self.names(names), *map(self.cell, cells)] for names, cells in table.rows]
        columns = [*zip(head, *body, strict=True)]
        ruler = ["-" * max(3, *map(len, column)) for column in columns]
        rows = [
            " | ".join(text.ljust(len(dashes)) for text, dashes in zip(row, ruler, strict=True))
            for row in (head, ruler, *body)
        ]
        return "\n".join(f"| {row} |" for row in rows)

    def names(self, names: Sequence[str]) -> list[str]:
        """The cells that name a row, or in the head those columns."""
        return [*map(_escaped, names)]

    def cell(self, cell: Cell) -> str:
        beside = ", ".join(filter(None, (cell.change, str(cell.mark or ""))))
        return _escaped(f"{cell.text} ({beside})" if beside else cell.text)

    def figure(self, figure: Figure) -> str:
        text = f"![{_escaped(figure.alt)}]({quote(f'{self.folder}/{figure.path.name}')})"
        return f"{text}\n\n{_escaped(figure.caption)}" if figure.caption else text

    def side_by_side(self, figures: SideBySide) -> str:
        return self.figure(figures.together)


class _Page(_Markdown):
    """The same with HTML for what the style sheet sets apart, and the figures inside."""

    def boxed(self, text: str, kind: str) -> str:
        return f'<div class="{kind}">\n\n{text}\n\n</div>' if kind else text

    def bullet(self, item: Bullet) -> str:
        return f"{self.mark(item.mark)}<span>{self.lead(item)}{_escaped(item.text)}</span>"

    def mark(self, mark: Mark | None) -> str:
        return _span(f"mark {mark.tone}", str(mark)) if mark else ""

    def names(self, names: Sequence[str]) -> list[str]:
        first, *more = names
        return [_escaped(first) + "".join(_span("change", name) for name in more)]

    def cell(self, cell: Cell) -> str:
        change = f" {_span('change', cell.change)}" if cell.change else ""
        return f"{_span('value', cell.text)}{change} {self.mark(cell.mark)}"

    def figure(self, figure: Figure) -> str:
        data = base64.b64encode(figure.path.read_bytes()).decode()
        caption = f"<figcaption>{_html(figure.caption)}</figcaption>" if figure.caption else ""
        image = f'<img src="data:image/png;base64,{data}" alt="{_html(figure.alt)}">'
        return f"<figure>{image}{caption}</figure>"

    def side_by_side(self, figures: SideBySide) -> str:
        return f'<div class="beside">{"".join(map(self.figure, figures.figures))}</div>'


def _escaped(text: str) -> str:
    """Text that Markdown leaves as it is; numbers stay together with their signs and units."""
    text = _MARKUP.sub(r"\\\g<0>", plain(text))
    text = re.sub(r" (?=[±%])|(?<=±) ", "\N{NO-BREAK SPACE}", text)
    return _BLOCK.sub(r"\1\\", text)


def _html(text: str) -> str:
    return html.escape(plain(text))


def _span(kind: str, text: str) -> str:
    return f'<span class="{kind}">{_escaped(text)}</span>'


def _anchor(heading: str) -> str:
    """The address of a heading within its document, as GitHub gives it."""
    return re.sub(r"[^\w\- ]", "", plain(heading).lower()).replace(" ", "-")
