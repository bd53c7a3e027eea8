"""Tests of gymnasium's environments by their ids: spaces that are flattened and rescaled, and those
that end in a line; arguments, time limits, and success where it is reported."""

import json
import os

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Tuple

import fmer
import qam
from common.environments import Source, env_name, env_sizes, make_env, resolve, single_task
from common.flags import configure, parse
from common.workers import Slot
from tests.helpers.environments import TOY, noise, play
from tests.helpers.flags import tiny_online
from tests.helpers.messages import stops

FLAT = Box(-1, 1, (3,))
ACTIONS = Box(-1, 1, (2,))


def test_drawing_stays_possible(monkeypatch):
    """Making an environment leaves the way in which a notebook draws, if MuJoCo has it."""
    import dm_control.mujoco  # noqa: F401 (before MUJOCO_GL: this machine may lack the driver)

    monkeypatch.setenv("MUJOCO_GL", "egl")
    make_env("multigoal")
    assert os.environ["MUJOCO_GL"] == "egl"


class Made(gymnasium.Env):
    """Observes the middle of its space, and reports in `info` what it is told to."""

    def __init__(self, observations=FLAT, actions=ACTIONS, info=None):
        self.observation_space = observations
        self.action_space = actions
        self.info = info or {}

    def observe(self):
        return gymnasium.spaces.unflatten(
            self.observation_space,
            np.arange(gymnasium.spaces.flatdim(self.observation_space)),
        )

    def reset(self, *, seed=None, options=None):
        return self.observe(), {}

    def step(self, action):
        self.played = action
        return self.observe(), float(action.sum()), False, False, self.info


gymnasium.register("Made-v0", Made, max_episode_steps=4)
gymnasium.register("Endless-v0", Made)
MADE = f"{__name__}:Made-v0"


def make(observations=FLAT, actions=ACTIONS, id="Made-v0"):
    return make_env(id, observations=observations, actions=actions)


# --- spaces --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "space, size",
    [
        (FLAT, 3),
        (Box(-1, 1, ()), 1),
        (Box(-1, 1, (2, 3)), 6),
        (Box(-np.inf, np.inf, (4,), np.float64), 4),
        (Dict(b=FLAT, a=Box(0, 1, (2,))), 5),
        (Dict(b=Tuple([FLAT, Box(0, 1, ())]), a=Dict(c=FLAT)), 7),
    ],
)
def test_observations_are_flat(space, size):
    """In the order of the space: by the names of a Dict's parts."""
    env = make(space)
    observation, _ = env.reset()
    assert env.observation_space.shape == observation.shape == (size,)
    assert observation.tolist() == list(range(size))


@pytest.mark.parametrize(
    "space",
    [
        Discrete(4),
        Box(0, 255, (8, 8, 3), np.uint8),
        Box(0, 1, (8, 8, 3)),
        Box(0, 9, (3,), np.int64),
        Dict(a=FLAT, b=Discrete(2)),
        Tuple([FLAT, Box(0, 255, (8, 8, 3), np.uint8)]),
    ],
)
def test_observations_that_are_refused(space):
    stops("Made-v0 observes ", "Box of floats", call=lambda: make(space))


@pytest.mark.parametrize(
    "space",
    [
        Discrete(4),
        MultiDiscrete([2, 2]),
        Dict(a=ACTIONS),
        Box(-np.inf, np.inf, (2,)),
        Box(np.float32([-1, -1]), np.float32([1, np.inf])),
        Box(0, 10, (2,), np.int64),
        Box(-1, 1, (2, 2)),
        Box(-1, 1, ()),
        Box(np.float32([-1, 0]), np.float32([1, 0])),
    ],
)
def test_actions_that_are_refused(space):
    stops("Made-v0 has the actions ", "finite bounds", call=lambda: make(actions=space))


def test_uneven_ranges_of_actions_are_rescaled():
    low, high = np.float32([-2, 0, 3]), np.float32([2, 1, 7])
    env = make(actions=Box(low, high))
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    env.reset()
    for action, expected in ((-1, low), (0, [0, 0.5, 5]), (1, high)):
        env.step(np.full(3, action, np.float32))
        np.testing.assert_allclose(env.unwrapped.played, expected, rtol=1e-6)


def test_rescaled_actions_stay_within_their_bounds():
    """Without the cut, rounding leaves 2,883 of these 6,000 actions outside."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        low = rng.uniform(-2, 1, 3).astype(np.float32)
        actions = Box(low, low + rng.uniform(0.1, 3, 3).astype(np.float32))
        env = make(actions=actions)
        env.reset()
        for action in (-1, 1):
            env.step(np.full(3, action, np.float32))
            assert actions.contains(env.unwrapped.played)


def test_a_reward_in_an_array():
    """As environments return it that compute with arrays."""
    slot = Slot(MADE)
    slot.start(0)
    slot.env.unwrapped.step = lambda action: (np.zeros(3), np.array([0.5]), False, False, {})
    assert slot.step(np.zeros(2, np.float32))[1] == 0.5


def test_a_missing_time_limit():
    stops("Endless-v0 has no time limit", "--max-episode-steps", call=lambda: make(id="Endless-v0"))
    assert make_env("Endless-v0", max_episode_steps=7).spec.max_episode_steps == 7


# --- names and arguments -------------------------------------------------------------------------


def test_names():
    """Ids of gymnasium, of a module, of a namespace."""
    for name in ("Ant-v5", "Made-v0", "my_package:MyEnv-v0", "shimmy:dm_control/cheetah-run-v0"):
        assert resolve(name) == Source(name, "", 1, {})
        assert single_task(name, 1) == name


@pytest.mark.parametrize(
    "name, words",
    [
        ("no_such_module:Env-v0", "No module named 'no_such_module'"),
        ("gymnasium:Nothing-v0", "Environment `Nothing` doesn't exist"),
        ("gymnasium_robotics:FetchReach-v3", "Please use `FetchReach-v4`"),
        ('Ant-v5?{"nothing": 1}', "unexpected keyword argument 'nothing'"),
        ('Hopper-v5?{"xml_file": "none.xml"}', "none.xml"),
    ],
)
def test_environments_that_cannot_be_made(name, words):
    stops("gymnasium cannot make ", words, call=lambda: make_env(name))


def args_of(script, env, argv):
    return parse(script.Args, script.ENV_DEFAULTS, ["--env", env, *argv])


def test_arguments_and_time_limits():
    """Of gymnasium's ids, of names with arguments of their own, and of OGBench's names."""
    argv = ["--env-kwargs", '{"exclude_current_positions_from_observation": false}']
    args = args_of(fmer, "Ant-v5", [*argv, "--max-episode-steps", "9"])
    assert args.name == (
        "env-kwargs=exclude-current-positions-from-observation:false,max-episode-steps=9"
    )
    env = make_env(env_name(args, 1))
    assert env.observation_space.shape == (107,) and env.spec.max_episode_steps == 9
    assert env_sizes("Ant-v5") == (105, 8)
    kitchen = env_name(args_of(fmer, "kitchen-2", ["--max-episode-steps", "9"]), 2)
    assert make_env(kitchen).spec.max_episode_steps == 9
    maze = env_name(args_of(qam, "pointmaze-medium", ["--max-episode-steps", "9"]), 3)
    assert maze == 'pointmaze-medium-singletask-task3-v0?{"max_episode_steps": 9}'
    assert make_env(maze).spec.max_episode_steps == 9
    assert env_name(configure(fmer.Args, {}, "Ant-v5"), 1) == "Ant-v5"


@pytest.mark.parametrize("text", ["{", "[1]", "3", "nothing", '"text"'])
def test_arguments_that_are_no_object(text):
    args = configure(fmer.Args, {}, "Ant-v5", env_kwargs=text)
    stops("--env-kwargs must be a JSON object", text, call=lambda: env_name(args, 1))


@pytest.mark.parametrize("env", ["CartPole-v1", "Endless-v0"])
def test_nothing_is_made_before_the_spaces_are_checked(env, tmp_path):
    args = tiny_online(fmer, run_dir=str(tmp_path / "runs"))
    args = configure(fmer.Args, {}, env, run_dir=args.run_dir)
    stops(env, call=lambda: fmer.main(args))
    assert not (tmp_path / "runs").exists()


# --- success -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key, value", [("success", True), ("is_success", 1.0), ("else", 1)])
def test_success_where_it_is_reported(new_pool, key, value):
    """In either of the two entries; NaN elsewhere."""
    name = f"{MADE}?{json.dumps(dict(info={key: value}))}"
    out = play(new_pool([name], 1, 1), noise(1, 2), [[1, 2]])
    assert out["length"].tolist() == [[4, 4]]
    expected = np.nan if key == "else" else 1
    assert np.array_equal(out["success"], [[expected] * 2], equal_nan=True)


def test_a_success_that_is_false_is_reported(new_pool):
    assert play(new_pool([TOY], 1, 1), noise(1, 2), [[3]])["success"].tolist() == [[0]]
