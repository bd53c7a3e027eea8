"""What the point maze's dataset covers: does it visit the starts and goals of all five tasks?

    python -m benchmarks.coverage data/pointmaze-medium-navigate-v0.npz

For every task: states of the dataset within half a cell of its start, states within the goal's
radius, and the length of the shortest path between them in cells. Writes
benchmarks/results/coverage.json.
"""

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from analysis.command_line import run_program
from benchmarks import RESULTS
from common.dataset_files import read
from common.environments import make_env, resolve
from common.errors import UserError


@dataclass(frozen=True)
class Options:
    dataset: Annotated[Path, tyro.conf.Positional]
    """A file pointmaze-medium-*.npz."""
    out: str = str(RESULTS / "coverage.json")
    """File of the results."""


MOVES = ((1, 0), (-1, 0), (0, 1), (0, -1))


def steps_between(maze, start, goal):
    """Returns the least number of moves between free neighbouring cells."""
    distance = {start: 0}
    queue = deque([start])
    while queue:
        i, j = queue.popleft()
        for down, right in MOVES:
            cell = (i + down, j + right)
            if maze[cell] == 0 and cell not in distance:
                distance[cell] = distance[i, j] + 1
                queue.append(cell)
    return distance[goal]


def main(options: Options) -> None:
    """Prints and writes a row per task."""
    path = options.dataset
    if not (path.name.startswith("pointmaze-medium-") and path.is_file()):
        raise UserError(f"expected an existing file pointmaze-medium-*.npz, not {path}")
    states = read(path, resolve("pointmaze-medium"), (1,)).observations
    env = make_env("pointmaze-medium-singletask-task1-v0").unwrapped
    maze = np.array(env.maze_map)
    rows = []
    for task, info in enumerate(env.task_infos, 1):
        start = tuple(info["init_ij"])
        goal = tuple(info["goal_ij"])
        from_start = np.linalg.norm(states - np.array(env.ij_to_xy(start)), axis=1)
        from_goal = np.linalg.norm(states - np.array(env.ij_to_xy(goal)), axis=1)
        row = dict(
            task=task,
            start=list(map(int, start)),
            goal=list(map(int, goal)),
            at_start=int((from_start <= env._maze_unit / 2).sum()),
            at_goal=int((from_goal <= env._goal_tol).sum()),
            cells=steps_between(maze, start, goal),
        )
        print(row)
        rows.append(row)
    cells = {tuple(env.xy_to_ij(state)) for state in states}
    free = int((maze == 0).sum())
    print(f"{len(cells)} of {free} free cells are visited, {len(states):,} states")
    result = dict(dataset=path.name, states=len(states), visited=len(cells), free=free)
    Path(options.out).write_text(json.dumps(result | dict(tasks=rows), indent=1) + "\n")


if __name__ == "__main__":
    run_program(main, Options, __doc__)
