"""Measurements and learning runs; what several of them write."""

import csv
import importlib
from pathlib import Path

from plot import ROOT, markdown


def script_of(name: str):
    """The module of a method: `fql` and `baselines.fql` are the same one."""
    for module in (name, f"baselines.{name}"):
        if (ROOT / f"{module.replace('.', '/')}.py").is_file():
            script = importlib.import_module(module)
            if hasattr(script, "train_chunk"):
                return script
    raise SystemExit(f"there is no script {name!r}: name one, such as qam or fql")


def names_of(rows: list[dict]) -> list[str]:
    """All that any of the rows has, in the order of their first mention."""
    return [*dict.fromkeys(name for row in rows for name in row)]


def write_rows(path: Path | str, rows: list[dict], columns: tuple = ()) -> None:
    """A CSV file of `columns`, or of all that the rows have; plot.read_rows reads it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns or names_of(rows), lineterminator="\n")
        writer.writeheader(), writer.writerows(rows)


def as_table(rows: list[dict], columns: tuple = ()) -> str:
    """The same in Markdown."""
    names = columns or names_of(rows)
    return markdown([[*names], *([str(row.get(name, "")) for name in names] for row in rows)])
