"""How a test looks at the message that a program ends with."""

import pytest


def stops(*words, call, lines=1):
    """`call` ends in SystemExit with a message of one line that says all of `words`."""
    with pytest.raises(SystemExit) as error:
        call()
    message = str(error.value)
    assert message.count("\n") < lines, message
    for word in words:
        assert str(word) in message, f"{word!r} is not in {message!r}"
    return message
