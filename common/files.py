"""Files that are either old or new, never half; locks; and errors that name the file."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path

from common.errors import UserError


@contextlib.contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turns errors with a file into a UserError that names it."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError) as error:
        problem = f"cannot use {path}: {error}"
        raise UserError(f"{problem}. Fix this, then rerun the same command.") from None


def read_config(folder: Path) -> dict:
    """Reads the config.json of a run: its id, flags, agents and script, and what made it."""
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{folder} is not a run folder: it has no config.json")
    try:
        config = json.loads(path.read_text())
        return config | dict(flags=dict(config["flags"]))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged, so this run cannot be read: {error!r}") from None


def sync_folder(folder: Path) -> None:
    """Writes the names of a folder's files to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Replaces a file: at any moment either the old or the new one is there, whole and on the disk.

    The old one is moved to `keep`, if given.
    """
    new = path.with_name(f"{path.name}.tmp")
    with file_errors(path):
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(new, path)
        sync_folder(path.parent)


def lock_folder(folder: Path) -> TextIOWrapper:
    """Makes a folder and locks it until the file that is returned is closed."""
    with file_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise UserError(f"{folder} is in use by another process") from None
    return lock
