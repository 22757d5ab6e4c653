"""The one exception a user's mistake raises."""

import difflib
from collections.abc import Iterable


class GladError(Exception):
    """A mistake in what the user gave. The message is the single line shown: what is wrong, where, and the way out."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of an error line about an unknown name: the nearest known one, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known) or 'none'}"
