"""The tables of a run: CSV files with a row per agent and step."""

import csv
import sys
import time
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import file_errors, write_file
from common.tracking import Tracker

TABLES = ("train.csv", "eval.csv", "eval_only.csv")


class Tables:
    """The tables in a run folder."""

    def __init__(self, folder: Path, agents: list[tuple[int, int]], tracker: Tracker):
        self.folder = folder
        self.agents = agents
        self.tracker = tracker
        self.start = time.time()  # of the run, without the time between its parts
        self.last_row = dict.fromkeys(TABLES, 0)  # step of each table's last row
        self.lost = set()  # agents with metrics that are not finite

    def cut(self, step: int) -> None:
        """Drops the rows after a step, and steps without a row for every agent."""
        for table in TABLES:
            path = self.folder / table
            if path.exists():
                with file_errors(path):
                    self._cut(path, step)

    def _cut(self, path: Path, step: int) -> None:
        header, *lines = path.read_text().splitlines(keepends=True) or [""]
        steps = []
        for line in lines:
            whole = line.endswith("\n")
            steps.append(int(line.split(",")[2]) if whole else step + 1)
        if lines and not step and path.name != "train.csv":  # they would be dropped
            raise UserError(
                f"{self.folder} has results but no checkpoint to continue from: move it away, or "
                "start another run with a --name"
            )
        num_rows = len(lines) // len(self.agents) * len(self.agents)
        kept = [i for i in range(num_rows) if steps[i] <= step]
        if kept:
            text = "".join([header, *(lines[i] for i in kept)])
            write_file(path, text.encode())
            self.last_row[path.name] = max(steps[i] for i in kept)
        else:
            path.unlink()

    def log(self, table: str, step: int, metrics: dict[str, np.ndarray]) -> None:
        """Appends a row per agent to a table; `metrics` are arrays (agents,) by name.

        Reports agents with metrics that are not finite, and stops when no other agent is left.
        """
        path = self.folder / table
        names = list(metrics)
        values = np.array(list(metrics.values()), float)
        self._check_finite(step, names, values)
        rows = []
        if not path.exists():
            rows.append(["task", "seed", "step", "seconds", *names])
        seconds = round(time.time() - self.start, 1)
        for (task, seed), numbers in zip(self.agents, values.T, strict=True):
            rows.append([task, seed, step, seconds, *numbers])
        with file_errors(path), open(path, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        self.last_row[table] = step
        self.tracker.log(path.stem, step, metrics)

    def _check_finite(self, step: int, names: list[str], values: np.ndarray) -> None:
        for metric, agent in np.argwhere(~np.isfinite(values)):
            task, seed = self.agents[agent]
            problem = f"{names[metric]} of task {task}, seed {seed} is not finite at step {step}"
            new = agent not in self.lost
            self.lost.add(agent)
            if len(self.lost) == len(self.agents):
                raise UserError(f"{problem}: {self.folder} stays as it was")
            if new:
                print(f"\n{problem}: this agent is lost, the others go on", file=sys.stderr)

    def read(self, table: str) -> list[dict[str, str]]:
        """Returns the rows of a table, none if it does not exist."""
        path = self.folder / table
        if not path.exists():
            return []
        with file_errors(path), open(path, newline="") as file:
            return list(csv.DictReader(file))
