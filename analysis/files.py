"""Open files to write."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from common.errors import UserError
from common.files import replacing


@contextlib.contextmanager
def open_to_write(path: Path, binary: bool = False) -> Iterator[IO]:
    """Opens a file that takes the place of `path` when it is complete, and makes its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            if binary:
                yield file
            else:
                text = io.TextIOWrapper(file, newline="")
                yield text
                text.detach()  # it is flushed, and `file` stays open
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another place") from None
