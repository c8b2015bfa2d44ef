"""The one exception that is meant for the person at the keyboard."""

import re


class NextLatError(Exception):
    """A fault the user can mend, told in one sentence: the cause, and the way out.

    The command line prints the sentence and exits with code 2; library callers may catch it like
    any other exception.
    """


def first_line(error: BaseException) -> str:
    """What somebody else's exception says, short enough to go into a sentence: the first of its
    own, or its name."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.split(r"\. (?=[A-Z])", line)[0].rstrip(".:")
