"""The text of a generation as it comes, with what became of the drafts drawn into it.

A cycle is drawn in the order in which it happened: the drafted tokens that were accepted, those
that were not, and the token of the transformer's own.
"""

from collections.abc import Callable, Sequence
from copy import copy
from itertools import groupby
from typing import Literal

from rich.color import ColorSystem
from rich.style import Style

from nextlat.decoding import Cycle

Kind = Literal["accepted", "rejected", "own", "corrected"]
Piece = tuple[str, Kind]

STYLES: dict[Kind, Style] = {
    "accepted": Style(color="green"),
    "rejected": Style(color="red", strike=True),
    "own": Style(bold=True),
    "corrected": Style(color="yellow", bold=True),
}
RESET = "\x1b[0m"
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what a decoder makes of the first bytes of a character


class TokenText:
    """The text that tokens add to those before them: all that `add` and `rest` gave, put together,
    is `decode` of all tokens.

    A token that ends within a character adds nothing; the one that completes the character adds all
    of it.

    Args:
        decode: tokens -> text, as `tokenizer.decode`; the text of more tokens begins with that of
            fewer.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        # Decoding all tokens anew for each would take ever longer. The latest with any text are
        # enough: what a token adds depends only on whether one stands before it, and whether that
        # left a character open.
        self._latest: list[int] = []
        self._open: list[int] = []

    def add(self, tokens: Sequence[int]) -> str:
        """What these tokens add, up to the last complete character."""
        self._open = [*self._open, *tokens]
        text = self._new()
        if not text or text.endswith(INCOMPLETE):
            return ""
        self._latest, self._open = self._open, []
        return text

    def rest(self) -> str:
        """What is still open at the end of the text."""
        text = self._new()
        self._latest, self._open = [*self._latest, *self._open], []
        return text

    def _new(self) -> str:
        if not self._open:
            return ""
        return self._decode(self._latest + self._open)[len(self._decode(self._latest)) :]


def draw(cycle: Cycle, text: TokenText) -> list[Piece]:
    """The pieces of one cycle, at most one of each kind. Without the rejected ones, they are the
    text of its tokens.

    Args:
        cycle: what to draw.
        text: of everything before the cycle; the tokens of the cycle are added to it.
    """
    accepted, own = cycle.tokens[: cycle.accepted], cycle.tokens[cycle.accepted :]
    pieces: list[Piece] = [(text.add([token]), "accepted") for token in accepted]
    if own:  # otherwise the text ended within the draft, and nothing was rejected
        rejected = cycle.drafted[cycle.accepted :]
        if rejected:
            other = copy(text)
            # A line break that did not come about should not break the line.
            pieces.append(((other.add(rejected) + other.rest()).replace("\n", r"\n"), "rejected"))
        pieces.append((text.add(own), "corrected" if rejected else "own"))
    return [
        (joined, kind)
        for kind, group in groupby(pieces, key=lambda piece: piece[1])
        if (joined := "".join(piece for piece, _ in group))
    ]


def coloured(pieces: Sequence[Piece]) -> str:
    """For a terminal; every piece resets its colour itself."""
    system = ColorSystem.STANDARD
    return "".join(STYLES[kind].render(text, color_system=system) for text, kind in pieces)


def marked(pieces: Sequence[Piece]) -> str:
    """Without colours: [+accepted], [-rejected], and the transformer's own tokens as they are."""
    marks = {"accepted": "[+{}]", "rejected": "[-{}]"}
    return "".join(marks.get(kind, "{}").format(text) for text, kind in pieces)


def legend(*, colours: bool, styled: bool = False) -> str:
    """One line that explains the colours, drawn in them if `styled`, or the marks."""
    if not colours:
        drafted: list[Piece] = [
            ("drafted and accepted", "accepted"),
            ("drafted and rejected", "rejected"),
        ]
        return f"{marked(drafted)} the transformer's own"
    named: list[Piece] = [
        ("drafted and accepted (green)", "accepted"),
        ("drafted and rejected (red)", "rejected"),
        ("the transformer's own (bold)", "own"),
        ("its corrections (yellow)", "corrected"),
    ]
    return ", ".join(coloured([piece]) if styled else piece[0] for piece in named)
