"""Measurements and learning runs, and what several of them write."""

import csv
from collections.abc import Iterable
from pathlib import Path

from analysis.tables import markdown


def names_of(rows: list[dict]) -> list[str]:
    """Returns all columns that any of the rows has, in the order of their first mention."""
    return list(dict.fromkeys(name for row in rows for name in row))


def write_rows(path: Path | str, rows: list[dict], columns: Iterable[str] = ()) -> None:
    """Writes a CSV file of `columns`, or of all that the rows have, for `runs.read_rows`."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    columns = columns or names_of(rows)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def as_table(rows: list[dict], columns: Iterable[str] = ()) -> str:
    """Returns the same in Markdown."""
    names = list(columns or names_of(rows))
    lines = [names]
    for row in rows:
        cells = [str(row.get(name, "")) for name in names]
        lines.append(cells)
    return markdown(lines)
