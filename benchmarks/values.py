"""Where a critic's values come from: through the maze, or through its walls?

    python qam.py --tasks 2 4 --name leak && python -m benchmarks.values --task 4

For every free cell of a point maze, over the dataset's states in it: the trained critic's value of
the policy's chunks (mean over critics), its mean TD error on the data's chunks (no pessimism), and
what a table of the data says: each square of 1 x 1 leads in H steps to the squares that 3 % or more
of its chunks lead to, and goes to the best of them. Walls are walls in the table. Both count -1 per
step, with the run's discount. Prints all and writes benchmarks/results/pointmaze-values.csv.
"""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import numpy as np

from analysis.agents import load_agents
from analysis.command_line import run_program
from analysis.runs import ROOT, read_flags
from benchmarks import as_table, write_rows
from common.data import locate
from common.envs import make_env, resolve
from common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Options:
    folder: str = "runs/qam/pointmaze-medium/leak"  # of a run of qam.py or a variant, or of meam.py
    task: int = 4  # one of the run's; of its first seed
    dataset_dir: str = ""  # where the run found its data
    out: str = str(ROOT / "benchmarks/results/pointmaze-values.csv")


def by_table(states, ends, goal, radius, H, discount):
    """Value of each state: states (M, 2), ends (M,) 1 on the last of a trajectory -> (M,)."""
    squares, index = np.unique(np.floor(states).astype(int), axis=0, return_inverse=True)
    index = index.ravel()  # numpy 2.0.0 alone gives it two axes
    trajectory = np.cumsum(ends) - ends
    start = np.flatnonzero(trajectory[:-H] == trajectory[H:])
    moves = np.zeros((len(squares), len(squares)))
    np.add.at(moves, (index[start], index[start + H]), 1)
    often = moves >= 0.03 * np.maximum(moves.sum(1, keepdims=True), 1)
    solved = np.zeros(len(squares), bool)
    solved[index[np.linalg.norm(states - goal, axis=1) <= radius]] = True
    cost, worst = -sum(discount**i for i in range(H)), -1 / (1 - discount)
    value = np.where(solved, 0, worst)
    for _ in range(400):
        best = np.where(often, value, worst).max(1)
        value = np.where(solved, 0, np.maximum(cost + discount**H * best, worst))
    return value[index]


def measure(options: Options) -> list[dict]:
    """A row per free cell."""
    flags = read_flags(Path(options.folder))
    if not flags["env"].startswith("pointmaze"):
        raise UserError(f"{options.folder} is a run on {flags['env']}, which is no point maze")
    if options.task not in flags["tasks"]:
        raise UserError(f"{options.folder} has no task {options.task}: it has {flags['tasks']}")
    script, args, state, *_ = load_agents(Path(options.folder), 2)
    state = jax.tree.map(lambda x: x[args.tasks.index(options.task) * args.num_seeds], state)
    source = resolve(args.env)
    with np.load(locate(source, options.dataset_dir)[0]) as file:
        states, ends = np.float32(file["observations"]), np.int64(file["terminals"])
        actions = np.clip(np.float32(file["actions"]), -1, 1)
    H, key = args.chunk_length, jax.random.PRNGKey(0)
    critic = partial(script.critic, args)

    @jax.jit
    def value(observations):
        chunks = script.sample_actions(args, state, observations, key)
        return critic(state.params["critic"], observations, chunks).mean(0)

    trajectory = np.cumsum(ends) - ends
    k = np.flatnonzero(trajectory[:-H] == trajectory[H:])
    k = np.random.default_rng(0).choice(k, min(len(k), 20_000), replace=False)
    chunks = actions[k[:, None] + np.arange(H)].reshape(len(k), -1)
    cost = -sum(args.discount**i for i in range(H))
    q = np.asarray(critic(state.params["critic"], states[k], chunks).mean(0))
    td = cost + args.discount**H * np.asarray(value(states[k + H])) - q
    values = np.asarray(value(states[k]))

    env = make_env(f"{source.env}-singletask-task{options.task}-v0").unwrapped
    info, maze, half = env.task_infos[options.task - 1], np.array(env.maze_map), env._maze_unit / 2
    goal = np.array(env.ij_to_xy(info["goal_ij"]))
    table = by_table(states, ends, goal, env._goal_tol, H, args.discount)
    places = {tuple(info["init_ij"]): "start", tuple(info["goal_ij"]): "goal"}
    rows = []
    for cell in map(tuple, np.argwhere(maze == 0).tolist()):
        inside = (np.abs(states - np.array(env.ij_to_xy(cell))) <= half).all(1)
        drawn = inside[k]
        row = dict(task=options.task, cell=f"{cell[0]} {cell[1]}", place=places.get(cell, ""))
        row |= dict(states=int(inside.sum()), value=f"{values[drawn].mean():.1f}")
        row |= dict(td_error=f"{td[drawn].mean():.2f}", table=f"{table[inside].mean():.1f}")
        rows.append(row)
    return rows


def main(options: Options) -> None:
    rows = measure(options)
    print(as_table(rows))
    write_rows(options.out, rows)


if __name__ == "__main__":
    run_program(main, Options, __doc__)
