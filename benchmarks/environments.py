"""What an environment costs on the host: memory, time to make one, time of a step.

    python -m benchmarks.environments        all, to benchmarks/results/environments.csv

Every environment is measured in a process of its own, as in a worker of `EnvPool`: what the second
and the third one add to its resident memory [MiB], seconds until they are made and reset, and
milliseconds of a step with random actions, median of 300. psutil is in requirements-dev.txt.
"""

import csv
import importlib.metadata
import multiprocessing
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import tyro

from common.envs import ONLINE, make_env
from plot import markdown

OFFLINE = """pointmaze-medium pointmaze-giant antmaze-large antmaze-giant humanoidmaze-medium
    humanoidmaze-large antsoccer-arena cube-single cube-double cube-triple cube-quadruple scene
    puzzle-3x3 puzzle-4x4""".split()


@dataclass(frozen=True)
class Options:
    envs: tuple[str, ...] = (*OFFLINE, *ONLINE)
    out: str = str(Path(__file__).resolve().parent / "results/environments.csv")


def measure(env: str) -> dict:
    """A row."""
    name, process = env if env in ONLINE else f"{env}-singletask-task1-v0", psutil.Process()
    made, memory, start = [], [], 0.0
    for i in range(3):
        start = time.process_time() if i == 1 else start
        made.append(make_env(name))
        made[i].action_space.seed(0)
        made[i].reset(seed=0)
        memory.append(process.memory_info().rss / 2**20)
    seconds, times = (time.process_time() - start) / 2, []
    for _ in range(300):
        action, start = made[0].action_space.sample(), time.process_time()
        over = made[0].step(action)[2:4]
        times.append(time.process_time() - start)
        if any(over):
            made[0].reset()
    spaces = made[0].observation_space, made[0].action_space
    row = dict(zip(("observation", "action"), (space.shape[0] for space in spaces)), env=env)
    row |= dict(memory_mib=round((memory[2] - memory[0]) / 2, 1), make_s=round(seconds, 3))
    return row | dict(ms_step=round(1e3 * float(np.median(times)), 3))


def main(options: Options) -> None:
    packages = ("mujoco", "gymnasium", "ogbench", "gymnasium-robotics")
    made_with = [f"{x} {importlib.metadata.version(x)}" for x in packages]
    made_with = ", ".join([f"{os.cpu_count()} CPU cores, {platform.machine()}", *made_with])
    columns = "env observation action memory_mib make_s ms_step made_with".split()
    rows, context = [], multiprocessing.get_context("spawn")
    for env in options.envs:
        with context.Pool(1) as pool:
            rows.append(pool.apply(measure, [env]) | dict(made_with=made_with))
        print(rows[-1], flush=True)
    with open(options.out, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader(), writer.writerows(rows)
    print(markdown([columns[:-1], *([str(row[x]) for x in columns[:-1]] for row in rows)]))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
