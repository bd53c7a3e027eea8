"""The exception that stands for a mistake of the user, and texts for its message."""


class UserError(Exception):
    """A mistake of the user; its message says what is wrong and what to do."""


def in_a_line(text: object, most: int | None = 300) -> str:
    """Returns the text of an object on one line, cut to `most` characters (None: not cut)."""
    words = str(text).split()
    line = " ".join(words)
    return line[:most]
