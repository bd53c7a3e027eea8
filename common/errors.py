"""The error that a program reports to its user as one message, without a traceback."""


class UserError(Exception):
    """A mistake of the user; its message says what is wrong and what to do."""
