"""Measurements and learning runs; what several of them write."""

import csv
from pathlib import Path


def write_rows(path: Path | str, rows: list[dict], columns: tuple = ()) -> None:
    """A CSV file of `columns`, or of all that the rows have; plot.read_rows reads it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        names = columns or dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader(), writer.writerows(rows)
