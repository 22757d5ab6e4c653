"""The one exception a user's mistake raises."""


class GladError(Exception):
    """A mistake in what the user gave. The message is the single line shown: what is wrong, where, and the way out."""
