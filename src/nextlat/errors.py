"""The one exception that is meant for the person at the keyboard."""


class NextLatError(Exception):
    """A fault the user can mend, told in one sentence: the cause, and the way out.

    The command line prints the sentence and exits with code 2; library callers may catch it like any other exception.
    """
