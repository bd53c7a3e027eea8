"""Files that survive kills and power cuts, the check of what is already there, and the lock."""

import contextlib
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from common.files import is_at, open_lock, replacing

KEYS = {"observations", "actions", "terminals", "qpos", "qvel"}  # arrays of every dataset


# --- Writing ---


def write_arrays(path: Path, sources: Sequence, compression: int) -> None:
    """Joins the arrays of the sources along their first axis and writes them as an npz file.

    Args:
        path: of the file
        sources: mappings of names to arrays, all with the same names
        compression: zipfile.ZIP_STORED or ZIP_DEFLATED
    """
    with replacing(path) as file, zipfile.ZipFile(file, "w", compression) as archive:
        for key in sources[0]:  # One at a time: np.savez would hold the whole dataset in memory.
            array = np.concatenate([source[key] for source in sources])
            with archive.open(f"{key}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array)


# --- Checking ---


def find_damage(path: Path, num_rows: int, read_all: bool = False) -> str:
    """Returns what is wrong with an npz file that `write_arrays` wrote, or "".

    Reads the zip's directory and the headers of the arrays, which have to agree in names, sizes and
    `num_rows`; with `read_all` also all bytes, to compare their checksums. An I/O error is no
    damage and is raised.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            missing = KEYS - {name.removesuffix(".npy") for name in archive.namelist()}
            if missing:
                raise ValueError(f"arrays are missing: {', '.join(sorted(missing))}")
            for entry in archive.infolist():
                _check_array(archive, entry, num_rows)
            damaged = archive.testzip() if read_all else None
    except OSError:
        raise
    except Exception as error:  # zipfile and numpy raise a dozen types for damaged files.
        return str(error) or type(error).__name__
    return f"the checksum of {damaged} is wrong" if damaged else ""


def _check_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, num_rows: int) -> None:
    with archive.open(entry) as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        size = file.tell() + int(np.prod(shape)) * dtype.itemsize
    if entry.file_size != size:
        raise ValueError(f"{entry.filename} has {entry.file_size} bytes instead of {size}")
    if shape[0] != num_rows:
        raise ValueError(f"{entry.filename} has {shape[0]} rows instead of {num_rows}")


# --- One process at a time ---


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds a lock file, which is removed at the end. Waits while another process holds it."""
    lock = open_lock(path, wait=True)
    while not is_at(lock, path):  # The process that held it has removed it.
        lock.close()
        lock = open_lock(path, wait=True)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.close()
