"""Looks at the message of a user's mistake."""

import pytest

from common.errors import UserError


def stops(*words, call, lines=1):
    """`call` raises UserError with a message of at most `lines` lines that says all of `words`."""
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert message.count("\n") < lines, message
    for word in words:
        assert str(word) in message, f"{word!r} is not in {message!r}"
    return message
