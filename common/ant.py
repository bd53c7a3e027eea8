"""OGBench's ant: the environment its expert learns in, and the expert of `common.collect`.

    python -m baselines.sac --env online-ant-xy                    trains it
    python -m benchmarks.ant --run runs/sac/online-ant-xy/default  writes common/ant.npz
"""

import functools
from pathlib import Path

import gymnasium
import numpy as np
from ogbench.online_locomotion.ant import AntEnv
from ogbench.online_locomotion.wrappers import GymXYWrapper

# The ant also observes a unit direction, another after 100 steps; rewards are the way along it.
gymnasium.register("OnlineAntXY-v0", lambda **x: GymXYWrapper(AntEnv(**x)), max_episode_steps=1000)
WEIGHTS = Path(__file__).with_name("ant.npz")


@functools.cache
def _weights(path):
    with np.load(path) as file:
        return [(file[f"kernel_{i}"], file[f"bias_{i}"]) for i in range(len(file.files) // 2)]


def walk(observation: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """The expert's action (8,) in [-1, 1] that takes an ant of AntMaze, observation (29,), into a
    direction (2,) of norm 1: the mode of SAC's policy. The same bits on any number of threads."""
    x = np.concatenate([observation[2:], direction], dtype=np.float32)
    for i, (kernel, bias) in enumerate(_weights(WEIGHTS)):
        x = np.einsum("i,ij->j", np.maximum(x, 0) if i else x, kernel) + bias
    return np.tanh(x)
