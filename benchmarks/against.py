"""A benchmark here and in another checkout, in turns: is it as fast as before?

    git worktree add ../before d5a94e4
    python -m benchmarks.against ../before "online_throughput --script fmer --batch-size 64"
    python -m benchmarks.against ../before "throughput --scripts qam --sizes small --no-loop"
    python -m benchmarks.against --table                   prints the committed rows

Runs the command in a process of its own, three times in each checkout, and takes the medians. There
is a row for each row of the benchmark, with the milliseconds before and after, and what was after
divided by what was before; it replaces an older one in benchmarks/results/against.csv. The command
has to be understood by both checkouts.
"""

import dataclasses
import importlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from analysis.command_line import run_program
from analysis.runs import ROOT, read_rows
from benchmarks import RESULTS, as_table, put_row
from common.errors import UserError

TIMES = {"online_throughput": "ms_step", "throughput": "ms_update"}  # benchmark -> its column
COLUMNS = ("command", "row", "before", "after", "ms_before", "ms_after", "ratio", "device", "jax")
KEY = ("command", "row", "before", "device")


@dataclasses.dataclass(frozen=True)
class Options:
    checkout: Annotated[str, tyro.conf.Positional] = ""
    """Folder of the other checkout."""
    command: Annotated[str, tyro.conf.Positional] = ""
    """Benchmark, online_throughput or throughput, and its flags, in quotation marks."""
    turns: int = 3
    """Times that the command is run in each checkout."""
    table: bool = False
    """Measure nothing, and print what is committed."""
    out: str = str(RESULTS / "against.csv")
    """File of the results."""


def commit_of(checkout: Path | str) -> str:
    """Returns the commit that is checked out in a folder."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{checkout} is not a checkout: {done.stderr.strip()}")
    return done.stdout.strip()


def measure_in(checkout: Path | str, command: str) -> list[dict]:
    """Returns the rows that a benchmark writes in a checkout."""
    name, *flags = command.split()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "rows.csv")
        line = [sys.executable, "-m", f"benchmarks.{name}", *flags, "--out", str(out)]
        done = subprocess.run(line, cwd=checkout, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().rpartition("\n")[2]
            raise UserError(f"{checkout}: cannot measure this: {reason}")
        return read_rows(out)


def measure(options: Options) -> list[dict]:
    """Returns a row for each row of the benchmark, which takes turns with the other checkout."""
    name = options.command.partition(" ")[0]
    if name not in TIMES:
        raise UserError(f"there is no benchmark {name!r}; choose one of {', '.join(TIMES)}")
    if options.turns < 1:
        raise UserError("--turns must be at least 1")
    before = commit_of(options.checkout)
    after = commit_of(ROOT)
    column = TIMES[name]
    key = list(importlib.import_module(f"benchmarks.{name}").KEY)
    key.remove("device")
    rows = {}  # label -> what stays the same from turn to turn
    times = {}  # label -> milliseconds before, and after
    for _ in range(options.turns):
        for index, checkout in enumerate((options.checkout, ROOT)):
            for found in measure_in(checkout, options.command):
                label = " ".join(f"{part}={found[part]}" for part in key)
                rows[label] = dict(row=label, device=found["device"], jax=found["jax"])
                times.setdefault(label, ([], []))[index].append(float(found[column]))
    for label, row in rows.items():
        if not all(times[label]):
            raise UserError(f"only one of the two checkouts has the row {label}")
        ms_before, ms_after = np.median(times[label], axis=1).tolist()
        row |= dict(command=options.command, before=before, after=after)
        row |= dict(ms_before=round(ms_before, 3), ms_after=round(ms_after, 3))
        row |= dict(ratio=round(ms_after / ms_before, 3))
    return list(rows.values())


def main(options: Options) -> None:
    """Measures, and prints all rows."""
    path = Path(options.out)
    if not options.table:
        for row in measure(options):
            put_row(path, row, KEY, COLUMNS)
    print(as_table(read_rows(path), COLUMNS))


if __name__ == "__main__":
    run_program(main, Options, __doc__)
