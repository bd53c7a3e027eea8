"""Memory, file handles and processes of a running script, and whether they grow.

    python -m benchmarks.watch PID --out benchmarks/results/watch-fmer.csv      until it ends
    python -m benchmarks.watch --report benchmarks/results/watch-fmer.csv

Every minute a row: seconds, resident memory [MiB] of the process and of the processes that it has
started, numbers of open files and of processes. The report has the slopes of the second half, by
least squares. Linux only.
"""

import csv
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro


@dataclass(frozen=True)
class Options:
    pid: Annotated[int, tyro.conf.Positional] = 0  # of the process to watch
    out: str = "watch.csv"  # where the rows go
    interval: float = 60  # seconds between rows
    report: str = ""  # print the slopes of these rows instead


def family(pid: int) -> list[int]:
    """The process and all that descend from it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # has just ended
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += parents.get(one, [])
    return found


def measure(pid: int) -> dict[str, float]:
    """A row; raises OSError when the process has ended."""
    size = lambda one: int(Path(f"/proc/{one}/statm").read_text().split()[1]) * 4096 / 2**20
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    own, others = size(pid), 0.0
    for one in (descendants := family(pid)[1:]):
        try:
            others += size(one)
        except OSError:
            pass
    return dict(memory=own, workers_memory=others, files=files, processes=1 + len(descendants))


def slopes(path: Path) -> dict[str, float]:
    """Growth per hour in the second half of the rows."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    rows = rows[len(rows) // 2 :]
    hours = np.array([float(row["seconds"]) for row in rows]) / 3600
    values = lambda name: np.array([float(row[name]) for row in rows])
    return {name: float(np.polyfit(hours, values(name), 1)[0]) for name in list(rows[0])[1:]}


def main(options: Options) -> None:
    if options.report:
        for name, slope in slopes(Path(options.report)).items():
            print(f"{name}: {slope:+.2f} per hour")
        return
    if Path(options.out).exists():
        raise SystemExit(f"{options.out} is there already: choose another --out")
    start = time.time()
    with open(options.out, "x", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        while True:
            try:
                row = measure(options.pid)
            except OSError:
                return
            if not file.tell():
                writer.writerow(["seconds", *row])
            writer.writerow([round(time.time() - start, 1), *(round(x, 1) for x in row.values())])
            file.flush()
            time.sleep(options.interval)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
