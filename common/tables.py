"""The tables of a run: CSV files with a row per agent and step."""

import csv
import io
import sys
import time
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import append_text, file_errors, write_file
from common.tracking import Tracker

TABLES = ("train.csv", "eval.csv", "eval_only.csv")


class Tables:
    """The tables in a run folder."""

    def __init__(self, folder: Path, agents: list[tuple[int, int]], tracker: Tracker):
        self.folder = folder
        self.agents = agents
        self.tracker = tracker
        self.start = time.time()  # when the run would have begun without interruptions
        self.last_row = dict.fromkeys(TABLES, 0)  # step of each table's last row that is kept
        self.remaining = {}  # table -> its content without the rows that will be written again
        self.lost = set()  # agents with metrics that are not finite

    def continue_from(self, step: int) -> None:
        """Plans to drop the rows after a step, once others take their place.

        Raises UserError if rows are damaged, or belong to a checkpoint that is gone.
        """
        self.plan_cut("train.csv", step)
        self.plan_cut("eval.csv", step)
        if self.remaining.get("eval.csv") == b"" and not step:
            raise UserError(
                f"{self.folder} has results but no checkpoint to continue from: move it away, "
                "start over with --overwrite, or start another run with a --name"
            )

    def plan_cut(self, table: str, step: int) -> None:
        """Notes what will remain of a table: whole rows of all agents until a step."""
        path = self.folder / table
        if not path.exists():
            return
        with file_errors(path):
            content = path.read_text(errors="replace")
            header, *lines = content.splitlines(keepends=True) or [""]
            steps = [row for row in self._steps_of(header, lines) if row <= step]
        self.last_row[table] = max(steps, default=0)
        kept = lines[: len(steps) * len(self.agents)]
        text = "".join([header, *kept]) if kept else ""
        if text != content or not kept:
            self.remaining[table] = text.encode()

    def _steps_of(self, header: str, lines: list[str]) -> list[int]:
        """Returns the steps that have a whole row for every agent; a torn end is left out.

        Raises ValueError with the number of a damaged line.
        """
        count = len(self.agents)
        if lines and not lines[-1].endswith("\n"):
            lines = lines[:-1]
        width = len(header.split(","))
        steps = []
        last = 0
        for i, line in enumerate(lines):
            words = line.split(",")
            try:
                task, seed, step = map(int, words[:3])
                list(map(float, words[3:]))
                damaged = len(words) != width or (task, seed) != self.agents[i % count]
            except ValueError:
                damaged = True
            if damaged or step < last:
                raise ValueError(f"line {i + 2} is damaged: {line.strip()[:80]!r}")
            if i % count == 0:
                steps.append(step)
            elif step != last:
                raise ValueError(f"line {i + 2} lacks the rows of other agents before it")
            last = step
        return steps[: len(lines) // count]

    def columns(self, table: str) -> list[str]:
        """Returns the names of a table's columns, none if it has no rows yet."""
        path = self.folder / table
        if not path.exists() or self.remaining.get(table) == b"":
            return []
        with file_errors(path), open(path) as file:
            return file.readline(2**16).strip().split(",")

    def log(self, table: str, step: int, metrics: dict[str, np.ndarray]) -> None:
        """Appends a row per agent to a table; `metrics` are arrays (agents,) by name.

        Reports agents with metrics that are not finite, and stops when no other agent is left.
        Raises UserError if the table has other columns.
        """
        path = self.folder / table
        self._cut(table)
        names = list(metrics)
        known = self.columns(table)[4:]
        if known and known != names:
            advice = "give the changed script another --name"
            raise UserError(f"{path} has the columns {known}, not {names}: {advice}")
        values = np.array(list(metrics.values()), float)
        self._check_finite(step, names, values)
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        if not path.exists():
            rows.writerow(["task", "seed", "step", "seconds", *names])
        seconds = round(time.time() - self.start, 1)
        for (task, seed), numbers in zip(self.agents, values.T, strict=True):
            rows.writerow([task, seed, step, seconds, *numbers])
        append_text(path, text.getvalue())
        self.tracker.log(path.stem, step, metrics)

    def _cut(self, table: str) -> None:
        """Drops what the next rows replace."""
        content = self.remaining.pop(table, None)
        path = self.folder / table
        if content:
            write_file(path, content)
        elif content is not None:
            path.unlink()

    def _check_finite(self, step: int, names: list[str], values: np.ndarray) -> None:
        for metric, agent in np.argwhere(~np.isfinite(values)):
            task, seed = self.agents[agent]
            problem = f"{names[metric]} of task {task}, seed {seed} is not finite at step {step}"
            new = agent not in self.lost
            self.lost.add(agent)
            if len(self.lost) == len(self.agents):
                advice = "start another run with a smaller learning rate"
                raise UserError(f"{problem}: {self.folder} stays as it was; {advice}")
            if new:
                print(f"\n{problem}: this agent is lost, the others go on", file=sys.stderr)

    def read(self, table: str) -> list[dict[str, str]]:
        """Returns the rows of a table, none if it does not exist."""
        path = self.folder / table
        if not path.exists():
            return []
        with file_errors(path), open(path, newline="") as file:
            return list(csv.DictReader(file))
