"""The exception for mistakes of the user."""

import difflib
from collections.abc import Iterable


class GladError(Exception):
    """A mistake in the user's input. Its message is the only line shown: what is wrong, where, and how to mend it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error line about an unknown name: the nearest known name, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known) or 'none'}"
