"""The exception for mistakes of the user."""

import difflib
from collections.abc import Iterable


class GladError(Exception):
    """A mistake in the user's input. Its message is the only line shown: what is wrong, where, and how to mend it."""


def one_line(error: object) -> str:
    """The start of a foreign error's text, without anything that a terminal would act on."""
    text = " ".join(str(error).split())
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:200]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error line about an unknown name: the nearest known name, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known) or 'none'}"
