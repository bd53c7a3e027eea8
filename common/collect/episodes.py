"""Plays one episode of a dataset."""

import itertools
from collections import defaultdict

import gymnasium
import numpy as np
import ogbench  # noqa: F401 (registers the environments)

from common.collect.experts import Policy, manipulation_policy, maze_policy
from common.collect.plan import OFFICIAL

# Arrays of a dataset and where `info` has them; only puzzles and scenes have buttons.
STATES = {"qpos": "prev_qpos", "qvel": "prev_qvel", "button_states": "prev_button_states"}


def make_collection_env(dataset: str, rows: int | None = None) -> gymnasium.Env:
    """Makes the environment that a dataset is collected in.

    Its episodes do not end at a goal but after `rows` steps (default: the official number).
    """
    gymnasium.logger.min_level = gymnasium.logger.ERROR  # warnings about box dtypes are harmless
    domain = dataset.rsplit("-", 1)[0]
    options = {"terminate_at_goal": False}
    options["max_episode_steps"] = rows or OFFICIAL[dataset].rows
    if "maze" not in dataset:
        options["mode"] = "data_collection"
    return gymnasium.make(f"{domain}-v0", **options)


def collect_episode(
    env: gymnasium.Env, dataset: str, seed: int, episode: int
) -> dict[str, np.ndarray]:
    """Plays an episode and returns its arrays, with one row per step.

    They depend on the arguments alone. A scene whose block left the table is played again.
    """
    make_policy = maze_policy if "maze" in dataset else manipulation_policy
    for attempt in itertools.count():
        seeds = np.random.SeedSequence([seed, episode, attempt]).generate_state(2)
        np.random.seed(seeds[0])
        policy = make_policy(env, dataset, int(seeds[1]))
        arrays = _play(env, policy)
        if not dataset.startswith("scene") or not _block_left_table(arrays["qpos"]):
            return {key: _in_single_precision(array) for key, array in arrays.items()}


def _play(env: gymnasium.Env, policy: Policy) -> dict[str, np.ndarray]:
    columns = defaultdict(list)
    ob, action = next(policy)
    done = False
    while not done:
        next_ob, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        columns["observations"].append(ob)
        columns["actions"].append(action)
        columns["terminals"].append(done)
        for key, source in STATES.items():
            if source in info:
                columns[key].append(info[source])
        ob, action = policy.send((next_ob, info))
    return {key: np.array(column) for key, column in columns.items()}


def _block_left_table(qpos: np.ndarray) -> bool:
    """Tells whether a scene's block left to the right or, outside the drawer, to the left."""
    y = qpos[:, 15]
    z = qpos[:, 16]
    outside_drawer = (z < 0.06) | (z > 0.08)
    left = (y <= -0.3) & outside_drawer
    right = y >= 0.29
    return bool(np.any(left | right))


def _in_single_precision(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float64 else array
