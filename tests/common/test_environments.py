"""Tests of the environments' names and protocols, and of seeds."""

import numpy as np
import pytest

from common.environments import (
    ONLINE,
    TRAINING,
    env_sizes,
    make_env,
    resolve,
    seed_of,
    seeds_of,
    single_task,
)
from tests.helpers.messages import stops

# --- names ---------------------------------------------------------------------------------------

PROTOCOL = {  # H, gamma, rho, sparse, default task: the table of the paper's ten domains
    "antmaze-large-navigate": (1, 0.99, 0.5, False, 1),
    "antmaze-giant-navigate": (1, 0.995, 0.5, False, 1),
    "humanoidmaze-medium-navigate": (1, 0.995, 0.0, False, 1),
    "humanoidmaze-large-navigate": (1, 0.995, 0.0, False, 1),
    "scene-play": (5, 0.99, 0.5, True, 2),
    "puzzle-3x3-play": (5, 0.99, 0.5, True, 4),
    "puzzle-4x4-play": (5, 0.99, 0.5, True, 4),
    "cube-double-play": (5, 0.99, 0.5, False, 2),
    "cube-triple-play": (5, 0.99, 0.5, False, 2),
    "cube-quadruple-play": (5, 0.99, 0.5, False, 2),
    "pointmaze-medium-navigate": (5, 0.99, 0.5, False, 1),
    "pointmaze-large-navigate": (5, 0.99, 0.5, False, 1),
    "cube-single-play": (5, 0.99, 0.5, False, 2),
}


@pytest.mark.parametrize("dataset", PROTOCOL)
def test_the_protocol_of_a_domain(dataset):
    """By its short name already; the dataset is the one of the paper."""
    H, discount, pessimism, sparse, task = PROTOCOL[dataset]
    protocol = dict(chunk_length=H, discount=discount, pessimism=pessimism, sparse=sparse)
    short = dataset.rsplit("-", 1)[0]
    assert resolve(short) == (short, dataset, task, protocol)


@pytest.mark.parametrize(
    "name, env, dataset, task",
    [
        ("cube-triple", "cube-triple", "cube-triple-play", 2),
        ("cube-triple-v0", "cube-triple", "cube-triple-play", 2),
        ("cube-triple-noisy", "cube-triple", "cube-triple-noisy", 2),
        ("cube-triple-noisy-v0", "cube-triple", "cube-triple-noisy", 2),
        ("scene-play-singletask-v0", "scene", "scene-play", 2),
        ("scene-singletask-task5-v0", "scene", "scene-play", 5),
        ("antmaze-giant-stitch-singletask-task3-v0", "antmaze-giant", "antmaze-giant-stitch", 3),
        ("antmaze-medium-explore", "antmaze-medium", "antmaze-medium-explore", 1),
        ("antsoccer-arena", "antsoccer-arena", "antsoccer-arena-navigate", 4),
        ("puzzle-4x6-noisy-singletask-task1", "puzzle-4x6", "puzzle-4x6-noisy", 1),
    ],
)
def test_short_dataset_and_full_names(name, env, dataset, task):
    assert resolve(name)[:3] == (env, dataset, task)


@pytest.mark.parametrize(
    "env", "pointmaze-medium antsoccer-arena cube-single scene puzzle-3x3 puzzle-4x5".split()
)
def test_default_tasks_are_those_of_ogbench(env):
    made = make_env(f"{env}-singletask-v0")
    made.reset()
    assert made.unwrapped.cur_task_id == resolve(env).task


@pytest.mark.parametrize(
    "name, near",
    [
        ("cube-tripel", "cube-triple"),
        ("puzzle-3x4", "puzzle-3x3"),
        ("pointmase-medium", "pointmaze-medium"),
        ("pointmze-medium", "pointmaze-medium"),
        ("antmaze-large-play", "antmaze-large-navigate"),
        ("pointmaze-medium-explore", "pointmaze-medium"),
        ("cube-double-navigate", "cube-double-play"),
        ("scene-stitch", "scene"),
        ("cube-double-singletask-task6-v0", "cube-double"),
        ("visual-cube-double", "cube-double"),
        ("cube-double-v1", "cube-double"),
        ("Cube-Double", "cube-double"),
        ("HalfCheetah-v6", "halfcheetah"),
    ],
)
def test_unknown_names_end_in_a_line_with_near_ones(name, near):
    line = stops(f"'{name}'", "did you mean", call=lambda: resolve(name))
    offered = line.split("did you mean ")[1].removesuffix("?").split(", ")
    assert any(near in other for other in offered)
    for other in offered:
        resolve(other)


@pytest.mark.parametrize("name", ["", "qqqq"])
def test_names_without_any_near_one(name):
    """All that are known are listed."""
    line = stops(f"'{name}'", "known are ", call=lambda: resolve(name))
    known = line.split("known are ")[1].split(", ")
    assert {"cube-double", "antmaze-giant", *ONLINE} < set(known)
    for other in known:
        resolve(other)


def test_the_environment_of_a_task():
    """By OGBench's name, whatever the run's environment is called."""
    for name in ("cube-double", "cube-double-noisy", "cube-double-play-singletask-task4-v0"):
        assert single_task(name, 3) == "cube-double-singletask-task3-v0"
    assert make_env(single_task("pointmaze-medium", 5)).spec.max_episode_steps == 1000


@pytest.mark.parametrize(
    "name, sizes", [("multigoal", (2, 2)), ("cube-single-singletask-v0", (28, 5))]
)
def test_sizes_of_an_environment(name, sizes):
    assert env_sizes(name) == sizes


# --- seeds ---------------------------------------------------------------------------------------


def test_seeds_are_32_bits_and_differ():
    """seed_of is a function of all its parts and their order."""
    seeds = {seed_of(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000 and 0 <= min(seeds) and max(seeds) < 2**32
    assert seed_of(1, 2) == seed_of(1, 2) != seed_of(2, 1)


def test_no_seed_of_training_is_one_of_an_evaluation():
    """NumPy fills up with zeros: without a part of its own, a training episode that begins at an
    evaluation would repeat the evaluation's first."""
    assert seed_of(3, 1, 500) == seed_of(3, 1, 500, 0)
    steps = range(0, 3000, 10)
    training = {seed_of(3, 1, step, TRAINING) for step in steps}
    played = {seed_of(3, 1, step, e) for step in steps for e in range(50)}
    assert len(training) == len(steps) and not training & played


def test_seeds_of_agents():
    """Those of (seed, task, further parts), in a column."""
    agents = [(3, 5), (1, 5), (1, 6)]  # (task, seed)
    seeds = seeds_of(agents, 70, 2)
    assert seeds.dtype == np.uint32 and seeds.shape == (3, 1)
    assert seeds[:, 0].tolist() == [seed_of(seed, task, 70, 2) for task, seed in agents]
