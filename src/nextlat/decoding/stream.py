"""The text of a generation as it comes, with what became of the drafts drawn into it.

A cycle is drawn in the order in which it happened: the drafted tokens that were accepted, those
that were not, and the token of the transformer's own.
"""

import signal
import sys
from collections.abc import Callable, Sequence
from copy import copy
from itertools import groupby
from typing import Any, Literal

from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style

from nextlat.decoding import Cycle, Pass

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
    """Without colours: [+accepted] and [-rejected], and the transformer's own tokens as they are."""
    marks = {"accepted": "[+{}]", "rejected": "[-{}]"}
    return "".join(marks.get(kind, "{}").format(text) for text, kind in pieces)


def legend(*, colours: bool, styled: bool = False) -> str:
    """One line that says what is what: of the colours, drawn in them if `styled`, or of the marks."""
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


class Stream:
    """Standard output while a text is decoded: the prompt, then every cycle as it happens. The
    terminal is left clean however that ends.

    Where standard output is no terminal, or the user wants no colours (NO_COLOR), drafts are shown
    by marks.

    Args:
        tokenizer: of the model.
        ids: the prompt.
        drafts: whether to show what became of them.
    """

    def __init__(self, tokenizer: Any, ids: list[int], drafts: bool) -> None:
        self._text, self._ids, self._drafts = TokenText(tokenizer.decode), ids, drafts
        out, err = Console(), Console(stderr=True)
        self._colours, self._coloured_legend = (
            drafts
            and console.is_terminal
            and console.color_system is not None
            and not console.no_color
            for console in (out, err)
        )
        self._begun = self._stopped = False

    def show(self, done: Pass) -> None:
        """One pass of the one prompt."""
        if not self._begun:  # whatever is wrong with a request has been said by now
            if self._drafts:
                print(legend(colours=self._colours, styled=self._coloured_legend), file=sys.stderr)
            self._write(self._text.add(self._ids))
        if self._stopped:
            raise KeyboardInterrupt
        [cycle] = done.cycles
        if cycle is None:
            return
        if not self._drafts:
            self._write(self._text.add(cycle.tokens))
        else:
            picture = coloured if self._colours else marked
            self._write(picture(draw(cycle, self._text)))

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: Any) -> None:
        """The pass under way is finished first: an exception at any moment can be lost in a
        destructor. A second one takes effect at once."""
        self._stopped = True
        signal.signal(signal.SIGINT, self._before)

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self._before)
        if self._begun:
            self._write(self._text.rest() + (RESET if self._colours else "") + "\n")

    def _write(self, text: str) -> None:
        self._begun = True
        sys.stdout.write(text)
        sys.stdout.flush()
