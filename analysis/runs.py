"""Find run folders, and read their flags, their CSV files and the paths of their episodes."""

import csv
import zipfile
from pathlib import Path

import numpy as np

from common.environments import MINARI, ONLINE, is_gymnasium_id, resolve
from common.errors import UserError
from common.files import read_config

ROOT = Path(__file__).resolve().parent.parent
RUN_TABLES = ("train.csv", "eval.csv")  # of a run folder


def read_rows(path: Path) -> list[dict[str, str]]:
    """Reads a CSV file as one dict per row; [] if there is no file.

    A row without all of its columns, or a run's last one without the end of its line, is still
    being written or was torn, and is left out.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            lines = file.readlines()
        if path.name in RUN_TABLES and lines and not lines[-1].endswith("\n"):
            lines = lines[:-1]
        rows = list(csv.DictReader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file that can be read: {error}") from None
    return [row for row in rows if None not in row and None not in row.values()]


def read_csv(path: Path) -> dict[str, np.ndarray]:
    """Reads the columns of a run's CSV file as float arrays (rows,); {} if it has no rows."""
    rows = read_rows(path)
    if not rows:
        return {}
    columns = {}
    for name in rows[0]:
        try:
            columns[name] = np.array([row[name] for row in rows], float)
        except ValueError as error:
            raise UserError(f"{path}: {name} is not made of numbers: {error}") from None
    return columns


def read_rollouts(folder: Path) -> dict[str, np.ndarray]:
    """Reads the paths of the last evaluation."""
    path = folder / "rollouts.npz"
    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}); --eval-only makes it again") from None


def read_flags(folder: Path) -> dict:
    """Reads the flags of a run from its config.json."""
    return read_config(folder)["flags"]


def check_run(path: Path) -> None:
    """Raises UserError if a path is neither a run folder nor a CSV file."""
    if not path.is_file() and not (path / "config.json").exists():
        raise UserError(
            f"{path} is not a run folder (no config.json) and not a CSV file: "
            "give runs/<script>/<env>/<name> or benchmarks/results/<suite>.csv"
        )


def script_name(folder: Path) -> str:
    """Returns the script's name from a run's config.json, or from runs/<script>/<env>/<name>."""
    return read_config(folder).get("script") or folder.resolve().parent.parent.name


def domain_of(env: str) -> str:
    """Returns the domain: cube-double, cube-double-play-singletask-task2-v0 -> cube-double-play."""
    return resolve(env).dataset or env


def domain_of_run(flags: dict) -> str:
    """Returns the domain of a run: own data are one, whatever environment they are played in."""
    own = flags.get("dataset", "") if "checksum" in flags else ""  # it was the checksum once
    if not own:
        return domain_of(flags["env"])
    return own if own.startswith(MINARI) else Path(own).name


def is_own_data(domain: str) -> bool:
    """Whether a domain is a file, or a dataset of Minari."""
    return domain.startswith(MINARI) or Path(domain).suffix in (".npz", ".hdf5", ".h5")


def is_online(domain: str) -> bool:
    """Whether a domain is an environment in which there are no data."""
    return domain in ONLINE or (is_gymnasium_id(domain) and not is_own_data(domain))


def has_tasks(domain: str) -> bool:
    """Whether a domain has several tasks, as OGBench's have."""
    return not is_online(domain) and not is_own_data(domain)
