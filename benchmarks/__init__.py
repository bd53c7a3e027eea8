"""Measurements and learning runs, and what several of them write."""

import csv
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from analysis.runs import ROOT, read_rows
from analysis.tables import markdown
from common.errors import UserError

RESULTS = ROOT / "benchmarks/results"


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


def put_row(path: Path, new: dict, key: Iterable[str], columns: Iterable[str]) -> None:
    """Writes a row in place of the one with the same key, or at the end, and prints it."""
    new = {name: str(new.get(name, "")) for name in columns}
    others = []
    for row in read_rows(path):
        if any(row[name] != new[name] for name in key):
            others.append(row)
    write_rows(path, [*others, new], columns)
    print(" ".join(f"{name} {x}" for name, x in new.items() if x), flush=True)


def run_python(words: list[str], **more) -> None:
    """Runs Python with these arguments, and options `more` of subprocess.Popen, and waits for it.

    Ctrl-C reaches that process, too; this still waits, because saving may take seconds. Raises
    UserError if the process fails, after it has printed its own error message.
    """
    process = subprocess.Popen([sys.executable, *words], **more)
    interrupted = False
    while process.poll() is None:
        try:
            process.wait()
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        raise KeyboardInterrupt
    if process.returncode:
        command = " ".join(words)
        raise UserError(f"command ended with code {process.returncode} (see above): {command}")


def refuse_committed(out: str, flag: str) -> None:
    """Raises UserError if the results of a trial would overwrite the committed ones."""
    if Path(out).resolve() == RESULTS:
        raise UserError(f"{flag} changes what is measured: choose another folder with --out")


def as_table(rows: list[dict], columns: Iterable[str] = ()) -> str:
    """Returns rows as a Markdown table."""
    names = list(columns or names_of(rows))
    lines = [names]
    for row in rows:
        cells = [str(row.get(name, "")) for name in names]
        lines.append(cells)
    return markdown(lines)
