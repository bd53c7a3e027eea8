"""Where a critic's values come from: through the maze, or through its walls?

    python qam.py --tasks 2 4 --name leak && python -m benchmarks.values --task 4

For every free cell of a point maze, over the dataset's states in it: the trained critic's value of
the policy's chunks (mean over critics), its mean TD error on the data's chunks that do not touch
the goal (no pessimism), and what a table of the data says: each square of 1 x 1 leads in H steps to
the squares that 3 % or more of its chunks lead to, and goes to the best of them. Walls are walls in
the table. Both count -1 per step, with the run's discount. Prints all and writes
benchmarks/results/pointmaze-values.csv.
"""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import numpy as np

from analysis.command_line import run_program
from analysis.runs import read_flags
from benchmarks import RESULTS, as_table, write_rows
from common.agents import load_agent
from common.dataset_files import locate
from common.environments import make_env, resolve
from common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Options:
    folder: str = "runs/qam/pointmaze-medium/leak"
    """Folder of a run of qam.py or a variant, or of meam.py."""
    task: int = 4
    """One of the run's tasks. The agent is that of its first seed."""
    dataset_dir: str = ""
    """Folder of the run's data. The default is where the run found them."""
    out: str = str(RESULTS / "pointmaze-values.csv")
    """File of the results."""


def chunk_starts(ends: np.ndarray, H: int) -> np.ndarray:
    """Returns the rows from which a trajectory has H more; `ends` is 1 on the last of each."""
    trajectory = np.cumsum(ends) - ends
    return np.flatnonzero(trajectory[:-H] == trajectory[H:])


def by_table(states, ends, goal, radius, H, discount) -> np.ndarray:
    """Returns the value of each state: states (M, 2), ends (M,) 1 on the last of each -> (M,)."""
    squares, index = np.unique(np.floor(states).astype(int), axis=0, return_inverse=True)
    index = index.ravel()  # NumPy 2.0.0 alone gives it two axes.
    start = chunk_starts(ends, H)
    moves = np.zeros((len(squares), len(squares)))
    np.add.at(moves, (index[start], index[start + H]), 1)
    total = moves.sum(1, keepdims=True)
    often = moves >= 0.03 * np.maximum(total, 1)
    at_goal = np.linalg.norm(states - goal, axis=1) <= radius
    solved = np.zeros(len(squares), bool)
    solved[index[at_goal]] = True
    cost = chunk_cost(H, discount)
    worst = -1 / (1 - discount)
    value = np.where(solved, 0, worst)
    for _ in range(400):
        best = np.where(often, value, worst).max(1)
        next_value = cost + discount**H * best
        value = np.where(solved, 0, np.maximum(next_value, worst))
    return value[index]


def chunk_cost(H: int, discount: float) -> float:
    """Returns the discounted reward of H steps, each of -1."""
    return -sum(discount**i for i in range(H))


def check(options: Options) -> None:
    """Raises UserError if the run is not one of a point maze with this task."""
    flags = read_flags(Path(options.folder))
    if not flags["env"].startswith("pointmaze"):
        raise UserError(f"{options.folder} is a run on {flags['env']}, which is not a point maze")
    if flags.get("dataset"):
        raise UserError(f"{options.folder} is a run on own data, {flags['dataset']}")
    if options.task not in flags["tasks"]:
        raise UserError(f"{options.folder} has no task {options.task}: it has {flags['tasks']}")


def measure(options: Options) -> list[dict]:
    """Returns a row per free cell."""
    check(options)
    agent = load_agent(options.folder, options.task)
    script = agent.script
    args = agent.args
    state = agent.state
    source = resolve(args.env)
    path = locate(source, options.dataset_dir or args.dataset_dir)[0]
    with np.load(path) as file:
        states = np.float32(file["observations"])
        ends = np.int64(file["terminals"])
        actions = np.clip(np.float32(file["actions"]), -1, 1)
    H = args.chunk_length
    key = jax.random.PRNGKey(0)
    critic = partial(script.critic, args, state.params["critic"])

    @jax.jit
    def value(observations):
        chunks = script.sample_actions(args, state, observations, key)
        return critic(observations, chunks).mean(0)

    k = chunk_starts(ends, H)
    k = np.random.default_rng(0).choice(k, min(len(k), 20_000), replace=False)
    chunks = actions[k[:, None] + np.arange(H)].reshape(len(k), -1)
    q = np.asarray(critic(states[k], chunks).mean(0))
    next_values = np.asarray(value(states[k + H]))
    td = chunk_cost(H, args.discount) + args.discount**H * next_values - q
    values = np.asarray(value(states[k]))

    env = make_env(f"{source.env}-singletask-task{options.task}-v0").unwrapped
    info = env.task_infos[options.task - 1]
    maze = np.array(env.maze_map)
    goal = np.array(env.ij_to_xy(info["goal_ij"]))
    visited = states[k[:, None] + np.arange(H + 1)]  # (chunks, H + 1, 2)
    near_goal = np.linalg.norm(visited - goal, axis=-1).min(1) <= env._goal_tol
    table = by_table(states, ends, goal, env._goal_tol, H, args.discount)
    places = {tuple(info["init_ij"]): "start", tuple(info["goal_ij"]): "goal"}
    rows = []
    for cell in map(tuple, np.argwhere(maze == 0).tolist()):
        from_centre = np.abs(states - np.array(env.ij_to_xy(cell)))
        inside = (from_centre <= env._maze_unit / 2).all(1)
        drawn = inside[k]
        away = drawn & ~near_goal
        row = dict(
            task=options.task,
            cell=f"{cell[0]} {cell[1]}",
            place=places.get(cell, ""),
            states=int(inside.sum()),
            value=f"{values[drawn].mean():.1f}",
            td_error=f"{td[away].mean():.2f}" if away.any() else "",
            table=f"{table[inside].mean():.1f}",
        )
        rows.append(row)
    return rows


def main(options: Options) -> None:
    """Prints and writes the rows."""
    rows = measure(options)
    print(as_table(rows))
    write_rows(options.out, rows)


if __name__ == "__main__":
    run_program(main, Options, __doc__)
