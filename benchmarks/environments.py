"""What an environment costs on the host: memory, time to make one, time of a step.

    python -m benchmarks.environments        all, to benchmarks/results/environments.csv

Every environment is measured in a process of its own, as in a worker of `EnvPool`: what the second
and the third one add to its resident memory [MiB], seconds until they are made and reset, and
milliseconds of a step with random actions, median of 300. Times are of a core at work, so that
other jobs do not count. psutil is in requirements-dev.txt.
"""

import importlib.metadata
import multiprocessing
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from analysis.command_line import run_program
from analysis.runs import read_rows
from benchmarks import RESULTS, as_table, put_row
from common.environments import ONLINE, make_env, resolve

OFFLINE = """pointmaze-medium pointmaze-giant antmaze-large antmaze-giant humanoidmaze-medium
    humanoidmaze-large antsoccer-arena cube-single cube-double cube-triple cube-quadruple scene
    puzzle-3x3 puzzle-4x4""".split()


@dataclass(frozen=True)
class Options:
    envs: tuple[str, ...] = (*OFFLINE, *ONLINE)
    out: str = str(RESULTS / "environments.csv")


def measure(env: str) -> dict:
    """Returns a row."""
    name = env if env in ONLINE else f"{resolve(env).env}-singletask-task1-v0"
    process = psutil.Process()
    made = []
    memory = []
    for i in range(3):
        if i == 1:  # The first one loads what the others share.
            start = time.process_time()
        made.append(make_env(name))
        made[i].action_space.seed(0)
        made[i].reset(seed=0)
        memory.append(process.memory_info().rss / 2**20)
    seconds = (time.process_time() - start) / 2
    first = made[0]
    times = []
    for _ in range(300):
        action = first.action_space.sample()
        start = time.process_time()
        _, _, terminated, truncated, _ = first.step(action)
        times.append(time.process_time() - start)
        if terminated or truncated:
            first.reset()
    return dict(
        env=env,
        observation=first.observation_space.shape[0],
        action=first.action_space.shape[0],
        memory_mib=round((memory[2] - memory[0]) / 2, 1),
        make_s=round(seconds, 3),
        ms_step=round(1e3 * float(np.median(times)), 3),
    )


def main(options: Options) -> None:
    """Measures each environment, prints and writes the rows."""
    for env in options.envs:
        resolve(env)  # An unknown name must fail here: in a worker, the pool would wait for ever.
    packages = ("mujoco", "gymnasium", "ogbench", "gymnasium-robotics")
    made_with = [f"{x} {importlib.metadata.version(x)}" for x in packages]
    made_with = ", ".join([f"{os.cpu_count()} CPU cores, {platform.machine()}", *made_with])
    context = multiprocessing.get_context("spawn")
    for env in options.envs:
        with context.Pool(1) as pool:
            row = pool.apply(measure, [env]) | dict(made_with=made_with)
        put_row(Path(options.out), row, ["env"], list(row))
    print(as_table(read_rows(Path(options.out)), [*row][:-1]))


if __name__ == "__main__":
    run_program(main, Options, __doc__)
