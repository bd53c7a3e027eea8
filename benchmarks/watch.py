"""Memory, file handles and processes of a running script, and whether they grow.

    python -m benchmarks.watch PID --out benchmarks/results/watch-fmer.csv      until it ends
    python -m benchmarks.watch --report benchmarks/results/watch-fmer.csv

Every minute a row: seconds, resident memory [MiB] of the process and of the processes that it has
started, numbers of open files and of processes. The report has the slopes of the second half, by
least squares. Linux; psutil is in requirements-dev.txt.
"""

import contextlib
import csv
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import tyro

from analysis.command_line import run_program
from analysis.runs import read_csv
from common.errors import UserError


@dataclass(frozen=True)
class Options:
    pid: Annotated[int, tyro.conf.Positional] = 0
    """PID of the process to watch."""
    out: str = "watch.csv"
    """File of the rows."""
    interval: float = 60
    """Seconds between rows."""
    report: str = ""
    """Print the slopes of the rows in this file instead."""


def measure(process: psutil.Process) -> dict[str, float]:
    """Returns a row; raises psutil.NoSuchProcess when the process has ended."""
    descendants = process.children(recursive=True)
    others = 0
    for one in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):  # It has just ended.
            others += one.memory_info().rss
    return dict(
        memory=process.memory_info().rss / 2**20,
        workers_memory=others / 2**20,
        files=process.num_fds(),
        processes=1 + len(descendants),
    )


def slopes(path: Path) -> dict[str, float]:
    """Returns the growth per hour in the second half of the rows."""
    columns = read_csv(path)
    if len(columns.get("seconds", ())) < 4:
        raise UserError(f"{path} does not have the rows of a watched process, at least four")
    hours = columns.pop("seconds") / 3600
    half = len(hours) // 2
    found = {}
    for name, values in columns.items():
        slope, _ = np.polyfit(hours[half:], values[half:], 1)
        found[name] = float(slope)
    return found


def main(options: Options) -> None:
    """Writes rows until the process ends, or prints a report."""
    if options.report:
        for name, slope in slopes(Path(options.report)).items():
            print(f"{name}: {slope:+.2f} per hour")
        return
    if Path(options.out).exists():
        raise UserError(f"{options.out} already exists; choose another --out")
    try:
        process = psutil.Process(options.pid)
    except psutil.NoSuchProcess:
        raise UserError(f"there is no process {options.pid}") from None
    start = time.time()
    with open(options.out, "x", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        while True:
            try:
                row = measure(process)
            except psutil.NoSuchProcess:
                return
            if not file.tell():
                writer.writerow(["seconds", *row])
            cells = [time.time() - start, *row.values()]
            writer.writerow([round(cell, 1) for cell in cells])
            file.flush()
            time.sleep(options.interval)


if __name__ == "__main__":
    run_program(main, Options, __doc__)
