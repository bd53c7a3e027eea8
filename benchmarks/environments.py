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
from benchmarks import as_table, write_rows
from common.envs import ONLINE, make_env, resolve

OFFLINE = """pointmaze-medium pointmaze-giant antmaze-large antmaze-giant humanoidmaze-medium
    humanoidmaze-large antsoccer-arena cube-single cube-double cube-triple cube-quadruple scene
    puzzle-3x3 puzzle-4x4""".split()


@dataclass(frozen=True)
class Options:
    envs: tuple[str, ...] = (*OFFLINE, *ONLINE)
    out: str = str(Path(__file__).resolve().parent / "results/environments.csv")


def measure(env: str) -> dict:
    """A row."""
    name = env if env in ONLINE else f"{resolve(env).env}-singletask-task1-v0"
    process = psutil.Process()
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
    row = dict(env=env, observation=spaces[0].shape[0], action=spaces[1].shape[0])
    row |= dict(memory_mib=round((memory[2] - memory[0]) / 2, 1), make_s=round(seconds, 3))
    return row | dict(ms_step=round(1e3 * float(np.median(times)), 3))


def main(options: Options) -> None:
    for env in options.envs:
        resolve(env)  # exits here where it is unknown: in a process of a pool that would wait
    packages = ("mujoco", "gymnasium", "ogbench", "gymnasium-robotics")
    made_with = [f"{x} {importlib.metadata.version(x)}" for x in packages]
    made_with = ", ".join([f"{os.cpu_count()} CPU cores, {platform.machine()}", *made_with])
    rows, context = [], multiprocessing.get_context("spawn")
    for env in options.envs:
        with context.Pool(1) as pool:
            rows.append(pool.apply(measure, [env]) | dict(made_with=made_with))
        print(rows[-1], flush=True)
    write_rows(options.out, rows)
    print(as_table(rows, [*rows[0]][:-1]))


if __name__ == "__main__":
    run_program(main, Options, __doc__)
