"""What became of the drafts, drawn into the text that they led to, and how that text is printed as
it comes.

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
    """The text that tokens add to those before them, so that all that `add` and `rest` gave is
    `decode` of all tokens.

    A token that ends within a character adds nothing; the one that completes the character adds all
    of it.

    Args:
        decode: tokens -> text, as `tokenizer.decode`; the text of more tokens begins with that of
            fewer.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        # Decoding all of them anew for each would take ever longer: the latest with any text are
        # enough, as all that the text of a token depends on is whether one stands before it, and
        # whether that left a character open.
        self._known: list[int] = []
        self._open: list[int] = []

    def add(self, tokens: Sequence[int]) -> str:
        """What these tokens add, up to the last complete character."""
        self._open = [*self._open, *tokens]
        text = self._new()
        if not text or text.endswith(INCOMPLETE):
            return ""
        self._known, self._open = self._open, []
        return text

    def rest(self) -> str:
        """What is still open at the end of the text."""
        text = self._new()
        self._known, self._open = [*self._known, *self._open], []
        return text

    def _new(self) -> str:
        return (
            self._decode(self._known + self._open)[len(self._decode(self._known)) :]
            if self._open
            else ""
        )


def draw(cycle: Cycle, text: TokenText) -> list[Piece]:
    """The pieces of one cycle, at most one of each kind. But for the rejected ones, they are the
    text of its tokens.

    Args:
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
    return "".join(
        STYLES[kind].render(text, color_system=ColorSystem.STANDARD) for text, kind in pieces
    )


def marked(pieces: Sequence[Piece]) -> str:
    """Without colours: [+accepted] and [-rejected], and the transformer's own tokens as they are."""
    return "".join(
        {"accepted": f"[+{text}]", "rejected": f"[-{text}]"}.get(kind, text)
        for text, kind in pieces
    )


def legend(*, colours: bool, styled: bool = False) -> str:
    """One line that says what is what: of the colours, drawn in them if `styled`, or of the marks."""
    if not colours:
        return f"{marked([('drafted and accepted', 'accepted'), ('drafted and rejected', 'rejected')])} the transformer's own"
    named: list[Piece] = [
        ("drafted and accepted (green)", "accepted"),
        ("drafted and rejected (red)", "rejected"),
        ("the transformer's own (bold)", "own"),
        ("its corrections (yellow)", "corrected"),
    ]
    return ", ".join(coloured([piece]) if styled else piece[0] for piece in named)
