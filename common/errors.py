"""The exception that stands for a mistake of the user, and texts for its message."""


class UserError(Exception):
    """A mistake of the user; its message says what is wrong and what to do."""


def in_a_line(text: object, most: int | None = 300) -> str:
    """Returns a text, or what describes an object, in one line of at most so many characters."""
    words = str(text).split()
    line = " ".join(words)
    return line[:most]
