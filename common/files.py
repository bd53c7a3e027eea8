"""Files that are either old or new, never half; locks; and errors that name the file."""

import contextlib
import errno
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from common.errors import UserError

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


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
        flags = dict(config["flags"])
        if "env" not in flags:
            raise ValueError("its flags lack env")
        return config | dict(flags=flags)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged, so this run cannot be read: {error!r}") from None


def sync_folder(folder: Path) -> None:
    """Writes the names of a folder's files to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """Opens a temporary file that replaces `path` at the end, atomically.

    Afterwards the file and its directory entry are on the disk. The old file is moved to `keep`, if
    given; then there is no file at `path` for a moment.
    """
    new = path.with_name(f"{path.name}.tmp")
    new.unlink(missing_ok=True)  # a link there is not followed
    try:
        with open(new, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    if keep and path.exists():
        os.replace(path, keep)
    os.replace(new, path)
    sync_folder(path.parent)


def write_file(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Replaces a file by one with this content, as `replacing` does."""
    with file_errors(path), replacing(path, keep) as file:
        file.write(content)


def append_text(path: Path, text: str) -> None:
    """Appends to a file and waits until the text is on the disk."""
    with file_errors(path):
        new = not path.exists()
        with open(path, "a", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync_folder(path.parent)


def move_aside(folder: Path) -> Path:
    """Renames a folder to <folder>.old-1, or the next free number, and returns the new path."""
    number = 1
    new = folder
    while os.path.lexists(new):
        new = folder.with_name(f"{folder.name}.old-{number}")
        number += 1
    with file_errors(folder):
        folder.rename(new)
    return new


def open_lock(path: Path, wait: bool = False) -> BinaryIO:
    """Opens a file and locks it until it is closed. A link is not followed.

    If another process holds the lock, waits or raises BlockingIOError. A file system without locks
    gets a warning.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
    file = os.fdopen(descriptor, "rb")
    how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            file.close()
            raise
        warning = f"{path.parent} has no file locks: let only one process write there"
        print(warning, file=sys.stderr)
    return file


def is_at(file: BinaryIO, path: Path) -> bool:
    """Returns whether an open file is the one that a path names now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False


class FolderLock:
    """Makes a folder and keeps other processes out of it until `close`."""

    def __init__(self, folder: Path):
        self.folder = folder
        with file_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                self.file = open_lock(folder / ".lock")
            except BlockingIOError:
                raise UserError(f"{folder} is in use by another process") from None

    def check(self) -> None:
        """Raises UserError if another folder, or none, is at the place of the locked one."""
        if not is_at(self.file, self.folder / ".lock"):
            raise UserError(
                f"{self.folder} was moved or replaced during the run, which ends here. To continue "
                "it, move the folder back and repeat the command."
            )

    def close(self) -> None:
        """Lets other processes in."""
        self.file.close()
