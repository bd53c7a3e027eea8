"""Where the failed episodes of point-maze runs go.

    python -m benchmarks.failures runs/learning/*/pointmaze-medium/*

Per run and task, of the evaluation that the run's rollouts.npz holds: success, number of failed
episodes, share of them that never leave the start's cell, mean number of cells that they visit; and
tilt_norm of the task's agents in the last row of train.csv, what tau times the critic's gradient
amounts to. Prints all and writes benchmarks/results/pointmaze-failures.csv.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from analysis.command_line import run_program
from analysis.runs import read_csv, read_flags, read_rollouts
from benchmarks import RESULTS, write_rows
from common.environments import make_env, resolve
from common.errors import UserError


@dataclass(frozen=True)
class Options:
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of complete runs."""
    out: str = str(RESULTS / "pointmaze-failures.csv")
    """File of the results."""


def cells(path: np.ndarray, cell_of) -> int:
    """Returns the number of the maze's cells on a path (steps, 2)."""
    return len({tuple(cell_of(state)) for state in path})


def rows_of(folder: Path, cell_of) -> list[dict]:
    """Returns a row per task."""
    train = read_csv(folder / "train.csv")
    rollouts = read_rollouts(folder)
    task = rollouts["task"]  # (agents,)
    success = rollouts["success"]  # (agents, episodes)
    visited = [cells(rollouts[f"path{i}"], cell_of) for i in range(success.size)]
    visited = np.reshape(visited, success.shape)
    last = train["step"] == train["step"].max()
    rows = []
    for one in np.unique(task):
        own = task == one
        failed = visited[own][success[own] == 0]
        row = dict(
            run=folder.name,
            task=one,
            success=f"{success[own].mean():.3f}",
            failed=len(failed),
            never_left="",
            cells="",
            tilt_norm="",
        )
        if len(failed):
            row["never_left"] = f"{(failed == 1).mean():.3f}"
            row["cells"] = f"{failed.mean():.2f}"
        if "tilt_norm" in train:  # Not every method has it.
            tilt = train["tilt_norm"][last & (train["task"] == one)]
            row["tilt_norm"] = f"{tilt.mean():.3f}"
        rows.append(row)
    return rows


def main(options: Options) -> None:
    """Prints and writes the rows of all runs."""
    if not options.folders:
        raise UserError("name the folders of complete runs")
    rows = []
    for folder in options.folders:
        env = resolve(read_flags(folder)["env"]).env
        if not env.startswith("pointmaze") or not (folder / "rollouts.npz").exists():
            raise UserError(f"{folder} is not a complete point-maze run")
        env = make_env(f"{env}-singletask-task1-v0").unwrapped
        rows += rows_of(folder, env.xy_to_ij)
    write_rows(options.out, rows)
    print(Path(options.out).read_text(), end="")


if __name__ == "__main__":
    run_program(main, Options, __doc__)
