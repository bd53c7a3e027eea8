"""What the point maze's dataset covers: does it visit the starts and goals of all five tasks?

    python -m benchmarks.coverage data/pointmaze-medium-navigate-v0.npz

For every task: states of the dataset within half a cell of its start, states within the goal's
radius, and the least number of cells between them. Writes benchmarks/results/coverage.json.
"""

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from analysis.command_line import run_program
from common.data import read
from common.envs import make_env, resolve
from common.errors import UserError


@dataclass(frozen=True)
class Options:
    dataset: Annotated[Path, tyro.conf.Positional]  # a file pointmaze-medium-*.npz
    out: str = str(Path(__file__).resolve().parent / "results/coverage.json")


def steps_between(maze, start, goal):
    """Least number of moves between free neighbouring cells."""
    distance, queue = {start: 0}, deque([start])
    while queue:
        i, j = queue.popleft()
        for cell in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            if maze[cell] == 0 and cell not in distance:
                distance[cell] = distance[i, j] + 1
                queue.append(cell)
    return distance[goal]


def main(options: Options) -> None:
    path = options.dataset
    if not (path.name.startswith("pointmaze-medium-") and path.is_file()):
        raise UserError(f"{path} is no file pointmaze-medium-*.npz: that maze's tasks are counted")
    states = read(path, resolve("pointmaze-medium"), (1,), False).observations
    env = make_env("pointmaze-medium-singletask-task1-v0").unwrapped
    maze, rows = np.array(env.maze_map), []
    for task, info in enumerate(env.task_infos, 1):
        start, goal = tuple(info["init_ij"]), tuple(info["goal_ij"])
        away = lambda cell: np.linalg.norm(states - np.array(env.ij_to_xy(cell)), axis=1)
        rows.append(dict(
            task=task, start=list(map(int, start)), goal=list(map(int, goal)),
            at_start=int((away(start) <= env._maze_unit / 2).sum()),
            at_goal=int((away(goal) <= env._goal_tol).sum()),
            cells=steps_between(maze, start, goal),
        ))  # fmt: skip
        print(rows[-1])
    cells = {tuple(env.xy_to_ij(state)) for state in states}
    free = int((maze == 0).sum())
    print(f"{len(cells)} of {free} free cells are visited, {len(states):,} states")
    result = dict(dataset=path.name, states=len(states), visited=len(cells), free=free)
    Path(options.out).write_text(json.dumps(result | dict(tasks=rows), indent=1) + "\n")


if __name__ == "__main__":
    run_program(main, Options, __doc__)
