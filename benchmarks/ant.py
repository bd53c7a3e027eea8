"""Keeps a run's policy as the expert of AntMaze's datasets (common/collect/ant.npz); measures it.

    python -m baselines.sac --env online-ant-xy
    python -m benchmarks.ant --run runs/sac/online-ant-xy/default
    python -m benchmarks.ant                                 measures common/collect/ant.npz

Measured are the speed along the wanted direction [m/s] and the falls in episodes of its training
environment, and the share of OGBench's five tasks of each maze that it solves when it is sent to
the next cell of the shortest way, with the noise of the datasets (0.2) and without, and in how many
steps (mean over the solved episodes). Writes benchmarks/results/ant-expert.csv, then the
policy.
"""

import dataclasses
import shutil
import tempfile
from pathlib import Path

import numpy as np

from analysis.command_line import run_program
from analysis.runs import read_flags
from benchmarks import RESULTS, as_table, write_rows
from common.agents import load_agent
from common.collect import ant
from common.collect.experts import heading, subgoal_search
from common.environments import make_env, seed_of
from common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Options:
    run: str = ""
    """Folder of the run whose policy is kept. Without it ant.npz stays as it is."""
    episodes: int = 10
    """Episodes on the plane, and of each task with each noise."""
    mazes: tuple[str, ...] = ("medium", "large", "giant")
    """Mazes of OGBench in which the policy walks."""
    out: str = str(RESULTS / "ant-expert.csv")


def keep(folder: Path, path: Path) -> None:
    """Writes the policy's layers, the last one without its half for the deviation."""
    env = read_flags(folder)["env"]
    if env != "online-ant-xy":
        raise UserError(f"{folder} is a run on {env}; the expert must be trained on online-ant-xy")
    agent = load_agent(folder)
    if agent.name != "sac":
        raise UserError(f"{folder} is a run of {agent.name}.py; the expert must be a SAC policy")
    layers = agent.state.params["policy"]["params"]
    arrays = {}
    for i in range(len(layers)):
        for name, x in layers[f"Dense_{i}"].items():
            if i == len(layers) - 1:
                x = x[..., : agent.action_size]
            arrays[f"{name}_{i}"] = np.asarray(x, np.float32)
    np.savez_compressed(path, **arrays)


def on_the_plane(episodes: int) -> dict:
    """Measures speed and falls in the training environment."""
    env = make_env("online-ant-xy")
    rewards = []
    falls = 0
    for episode in range(episodes):
        seed = seed_of(0, episode)
        np.random.seed(seed)  # of the directions
        observation, _ = env.reset(seed=seed)
        over = False
        while not over:
            state = np.concatenate([[0, 0], observation[:-2]])
            direction = observation[-2:]
            observation, reward, fell, late, _ = env.step(ant.walk(state, direction))
            rewards.append(reward)
            over = fell or late
            falls += fell
    speed = np.mean(rewards) / env.unwrapped.dt
    return dict(place="plane", speed=round(float(speed), 2), falls=int(falls))


def in_a_maze(maze: str, noise: float, episodes: int) -> dict:
    """Measures success and steps on the way that OGBench's search finds."""
    steps = []
    for task in range(1, 6):
        env = make_env(f"antmaze-{maze}-singletask-task{task}-v0")
        search = subgoal_search(env.unwrapped)
        for episode in range(episodes):
            seed = seed_of(task, episode)
            np.random.seed(seed)
            observation, info = env.reset(seed=seed)
            over = False
            step = 0
            while not over:
                action = ant.walk(observation, heading(env.unwrapped, search))
                action = np.clip(action + np.random.normal(0, noise, 8), -1, 1)
                observation, _, terminated, truncated, info = env.step(action)
                over = terminated or truncated
                step += 1
            steps.append(step if info["success"] else np.nan)
    solved = np.isfinite(steps)
    success = round(float(solved.mean()), 3)
    row = dict(place=f"antmaze-{maze}", noise=noise, success=success, steps="")
    if solved.any():
        row["steps"] = round(float(np.nanmean(steps)))
    return row


def measure(options: Options) -> None:
    """Measures the policy in ant.WEIGHTS."""
    rows = [on_the_plane(options.episodes)]
    for maze in options.mazes:
        rows += [in_a_maze(maze, noise, options.episodes) for noise in (0.0, 0.2)]
    names = "place noise speed falls success steps".split()
    write_rows(options.out, rows, names)
    print(as_table(rows, names))


def main(options: Options) -> None:
    """Measures the policy, and keeps the one of a run if that is given."""
    if not options.run:
        measure(options)
        return
    kept = ant.WEIGHTS
    with tempfile.TemporaryDirectory() as folder:  # until all has been measured
        ant.WEIGHTS = Path(folder, kept.name)
        try:
            keep(Path(options.run), ant.WEIGHTS)
            measure(options)
            shutil.copyfile(ant.WEIGHTS, kept)
        finally:
            ant.WEIGHTS = kept


if __name__ == "__main__":
    run_program(main, Options, __doc__)
