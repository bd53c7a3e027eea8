"""Open files to write."""

from pathlib import Path
from typing import IO

from common.errors import UserError


def open_to_write(path: Path, binary: bool = False) -> IO:
    """Opens a file, and makes its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if binary:
            return path.open("wb")
        return path.open("w", newline="")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another place") from None
