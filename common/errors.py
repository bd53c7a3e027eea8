"""The exception that stands for a mistake of the user."""


class UserError(Exception):
    """A mistake of the user; its message says what is wrong and what to do."""
