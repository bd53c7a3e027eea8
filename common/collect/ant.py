"""OGBench's ant: the environment that its expert learns in, and the expert of AntMaze's datasets.

    python -m baselines.sac --env online-ant-xy                    trains the expert
    python -m benchmarks.ant --run runs/sac/online-ant-xy/default  writes common/collect/ant.npz

Workers of a training run import this module: no jax here.
"""

import functools
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from ogbench.online_locomotion.ant import AntEnv
from ogbench.online_locomotion.wrappers import GymXYWrapper

WEIGHTS = Path(__file__).with_name("ant.npz")


def make_online_ant(**options: Any) -> gymnasium.Env:
    """Makes the environment in which the expert learns.

    The ant also observes a direction, which changes every 100 steps; the reward is the distance
    that it moves in this direction.
    """
    return GymXYWrapper(AntEnv(**options))


gymnasium.register("OnlineAntXY-v0", make_online_ant, max_episode_steps=1000)


@functools.cache
def _read_layers(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    with np.load(path) as file:
        num_layers = len(file.files) // 2
        return [(file[f"kernel_{i}"], file[f"bias_{i}"]) for i in range(num_layers)]


def walk(observation: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Returns the expert's action (8,) in [-1, 1], which is the mode of SAC's policy.

    The result is the same bit for bit on any number of threads.

    Args:
        observation: (29,), an ant's in AntMaze
        direction: (2,), of norm 1, in which to walk
    """
    x = np.concatenate([observation[2:], direction], dtype=np.float32)
    for layer, (kernel, bias) in enumerate(_read_layers(WEIGHTS)):
        if layer > 0:
            x = np.maximum(x, 0)
        x = np.einsum("i,ij->j", x, kernel) + bias
    return np.tanh(x)
