"""What a document consists of.

All text is plain text, of which a renderer escapes what it must: nothing here is markup.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Mark:
    """A verdict: a word, the symbol before it, and how it is coloured."""

    text: str
    symbol: str = ""
    tone: Literal["good", "bad", "quiet"] = "quiet"

    def __str__(self) -> str:
        return f"{self.symbol} {self.text}".strip()


@dataclass(frozen=True)
class Heading:
    """A heading of level 1 to 6."""

    text: str
    level: int


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; a quiet one is set in grey."""

    text: str
    quiet: bool = False


@dataclass(frozen=True)
class Bullet:
    """An item of a list, `mark: lead: text`, the lead in bold; a link leads to the heading of that
    text."""

    text: str
    lead: str = ""
    mark: Mark | None = None
    link: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list; "findings" are set apart from one another, "notes" small."""

    items: Sequence[Bullet]
    kind: Literal["list", "findings", "notes"] = "list"


@dataclass(frozen=True)
class Cell:
    """A value or words, what the value differs by from another, and the verdict on that."""

    text: str
    change: str = ""
    mark: Mark | None = None


@dataclass(frozen=True)
class Table:
    """A table."""

    names: Sequence[str]  # heads of the columns that name a row
    head: Sequence[str]  # of the other columns
    rows: Sequence[tuple[Sequence[str], Sequence[Cell]]]  # (the names of a row, its cells)
    pinned: int = 0  # how many cells of a row stand in every part of a table that is too wide
    words: bool = False  # cells are sentences, set from the left and broken into lines


@dataclass(frozen=True)
class Code:
    """Lines to be shown as they are."""

    text: str


@dataclass(frozen=True)
class Figure:
    """A PNG file, what it shows (for those who do not see it), and the line below it."""

    path: Path
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class SideBySide:
    """Figures beside one another, and `together` in one file."""

    figures: Sequence[Figure]
    together: Figure


@dataclass(frozen=True)
class Details:
    """What is folded away under a title."""

    title: str
    content: Sequence["Element"]


# A document is a list of them.
Element = Heading | Paragraph | Bullets | Table | Code | Figure | SideBySide | Details


def printable(text: str) -> str:
    """Text without control characters, which can upset a terminal; line breaks stay."""
    return "".join(x if x == "\n" or unicodedata.category(x)[0] != "C" else " " for x in text)


def plain(text: str) -> str:
    """Printable text in one line."""
    return re.sub(r"[^\S\N{NO-BREAK SPACE}]+", " ", printable(text)).strip()
