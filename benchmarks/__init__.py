"""Measurements and learning runs; what several of them write."""

import csv
from pathlib import Path

from plot import markdown


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
