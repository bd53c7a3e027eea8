"""Tests of the online methods' environments: the numbers of the plane, the kitchen and MuJoCo's
four; ends and time-outs in the pool; episodes that forget earlier ones."""

import builtins
import copy
import subprocess
import sys

import numpy as np
import pytest

from common.environments import GOALS, KITCHEN, MULTIGOAL_STEPS, ONLINE, make_env, resolve
from tests.helpers.environments import noise, play, same, step
from tests.helpers.messages import stops
from tools.shared_blocks import ROOT

MUJOCO = {  # observation, action, box, whether it ends early
    "hopper": (11, 3, 1.0, True),
    "halfcheetah": (17, 6, 1.0, False),
    "walker2d": (17, 6, 1.0, True),
    "humanoid": (348, 17, 0.4, True),
}
KITCHENS = {"kitchen-1": 1, "kitchen-2": 2, "kitchen-4": 4, "kitchen-7": 7}
SIZES = {"multigoal": (2, 2, 30)} | {name: (59, 9, 280) for name in KITCHENS}
SIZES |= {name: (*MUJOCO[name][:2], 1000) for name in MUJOCO}  # observation, action, steps
SIZES |= {"online-ant-xy": (29, 8, 1000)}


@pytest.fixture(scope="module")
def kitchen():
    """kitchen-7, which each test resets."""
    return make_env("kitchen-7")


# --- names ---------------------------------------------------------------------------------------


def test_names():
    """Exactly these; kitchen-k is task k. None has a dataset or a protocol."""
    assert set(ONLINE) == set(SIZES)
    for name in ONLINE:
        assert resolve(name) == (name, "", KITCHENS.get(name, 1), {})


@pytest.mark.parametrize(
    "name, near",
    [
        ("hoper", "hopper"),
        ("Hopper-v9", "Hopper-v5"),
        ("Hopper-v9", "hopper"),
        ("hopper-play", "hopper"),
        ("hopper-v0", "hopper"),
        ("HalfCheeta-v5", "halfcheetah"),
        ("walker", "walker2d"),
        ("humanoid-navigate", "humanoidmaze-large-navigate"),
        ("multi-goal", "multigoal"),
        ("kitchen", "kitchen-7"),
        ("kitchen-3", "kitchen-4"),
        ("kitchen-play", "kitchen-7"),
        ("kitchen-1-singletask-task1-v0", "kitchen-1"),
        ("humanoidmaze", "humanoidmaze-large"),
    ],
)
def test_unknown_names_end_in_a_line_with_near_ones(name, near):
    """Of both families, where they are near; no dataset of an online environment is offered."""
    line = stops("did you mean ", call=lambda: resolve(name))
    offered = line.split("did you mean ")[1].removesuffix("?").split(", ")
    assert near in offered
    assert not any(x.startswith(f"{online}-") for x in offered for online in ONLINE)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_boxes_and_time_limits(name):
    """Flat observations that the space describes; actions in [-1, 1]^d; no reward is nan."""
    size, d, steps = SIZES[name]
    env = make_env(name)
    assert env.observation_space.shape == (size,) and env.action_space.shape == (d,)
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    assert env.spec.max_episode_steps == steps
    state, _ = env.reset(seed=0)
    after, reward, terminated, truncated, info = env.step(np.zeros(d, np.float32))
    assert state.shape == after.shape == (size,) and state.dtype.kind == "f"
    assert np.isfinite([*state, *after, reward]).all()
    assert terminated is False and truncated is False and info.get("success", 0) == 0


def test_no_jax_and_no_kitchen_where_none_is_made():
    """Workers import neither jax nor gymnasium_robotics, which only a kitchen needs; and that one
    says nothing of its other environments."""
    code = """
import sys
from common.environments import make_env
loaded = lambda: {m.split(".")[0] for m in sys.modules} & {"jax", "gymnasium_robotics"}
make_env("multigoal"), make_env("hopper")
assert not loaded(), loaded()
make_env("kitchen-1")
assert loaded() == {"gymnasium_robotics"}
"""
    line = [sys.executable, "-c", code]
    answer = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


@pytest.mark.parametrize("why", ["it is not installed", "mujoco is too new"])
def test_a_kitchen_that_cannot_be_made(monkeypatch, why):
    """Ends in one line that names what it needs; others are made all the same."""
    if why == "it is not installed":
        load = builtins.__import__

        def missing(name, *args, **kwargs):
            if name.split(".")[0] == "gymnasium_robotics":
                raise ModuleNotFoundError(f"No module named '{name}'")
            return load(name, *args, **kwargs)

        for name in [name for name in sys.modules if name.split(".")[0] == "gymnasium_robotics"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(builtins, "__import__", missing)
        monkeypatch.setattr("importlib.import_module", missing)
    else:
        from gymnasium_robotics.envs.franka_kitchen import KitchenEnv

        def broken(*args, **kwargs):
            raise AssertionError

        monkeypatch.setattr(KitchenEnv, "__init__", broken)
    words = "kitchen-2 needs gymnasium-robotics>=1.4,<1.5", "mujoco<3.12"
    stops(*words, call=lambda: make_env("kitchen-2"))
    make_env("multigoal").reset()


# --- the plane -----------------------------------------------------------------------------------

UNITS = [  # position, action -> next position, reward, terminated
    ((0, 0), (1, 0), (1, 0), -46, False),
    ((0, 0), (0, 0), (0, 0), -25, False),
    ((3.5, 0), (0.6, 0), (4.1, 0), -1.61, True),
    ((6.8, 6.8), (1, 1), (7, 7), -113, False),
    ((4, 0), (0, 0), (4, 0), -1, False),  # at distance 1 exactly
    ((0, 0), (3, -9), (1, -1), -77, False),  # clipped to (1, -1) before use
    ((-4.5, 0), (0, 0), (-4.5, 0), 9.75, True),
    ((0, 5), (0, 0), (0, 5), 10, True),
    ((0, -7), (0, -1), (0, -7), -34, False),
]


@pytest.fixture(scope="module")
def plane():
    """A function that makes a step on the plane: (position, action) -> the result of `step`."""
    env = make_env("multigoal")

    def move(position, action):
        env.reset(seed=0)
        env.unwrapped.position = np.float32(position)
        return env.step(np.float32(action))

    return move


@pytest.mark.parametrize("position, action, after, reward, terminated", UNITS)
def test_the_plane_by_hand(plane, position, action, after, reward, terminated):
    """Equals the numbers of the definition."""
    state, found, ended, truncated, info = plane(position, action)
    np.testing.assert_allclose(state, after, atol=1e-6)
    np.testing.assert_allclose(found, reward, atol=1e-5)
    assert ended is terminated and not truncated and info == {"success": terminated}
    assert state.dtype == np.float32 and type(found) is float
    assert np.float32(found) == found  # which is what it was computed in


@pytest.mark.parametrize("goal", GOALS.tolist())
def test_the_plane_ends_within_one_of_a_goal(plane, goal):
    """Strictly: not at distance 1, but at the next smaller float of the coordinate."""
    far = np.float32(goal) * np.float32(0.8)
    near = np.where(far == 0, far, np.nextafter(far, np.float32(goal)))
    assert not plane(far, (0, 0))[2] and plane(near, (0, 0))[2]


def test_the_plane_at_random(plane):
    """The definition in double precision; nothing that is given is changed."""
    rng = np.random.default_rng(0)
    p = np.float32(rng.uniform(-7, 7, (1500, 2)))
    a = np.float32(rng.uniform(-1.5, 1.5, (1500, 2)))
    given = p.copy(), a.copy()
    states, rewards, ends, *_ = zip(*(plane(x, y) for x, y in zip(p, a)), strict=True)
    assert np.array_equal(p, given[0]) and np.array_equal(a, given[1])
    c = np.clip(a, -1, 1).astype(float)
    q = np.clip(p + c, -7, 7)
    nearest = np.min([((q - goal) ** 2).sum(-1) for goal in GOALS.astype(float)], 0)
    expected = -30 * (c**2).sum(-1) - nearest + 10 * (nearest < 1)
    np.testing.assert_allclose(states, q, atol=1e-6)
    np.testing.assert_allclose(rewards, expected, rtol=1e-5, atol=1e-4)
    assert np.array_equal(ends, nearest < 1) and 10 < np.sum(ends) < 300


def test_how_long_the_plane_should_be_walked(plane):
    """Discounted returns of k equal steps from the origin to where a goal ends the episode: about
    eight are best."""
    for k, expected in {5: -124.3, 8: -118.3, 10: -126.1, 15: -158.8}.items():
        p, value = np.zeros(2), 0.0
        for i in range(k):
            p, reward, terminated, *_ = plane(p, ((4 + 1e-5) / k, 0))
            value += 0.99**i * reward
            assert terminated == (i == k - 1)
        assert round(value, 1) == expected


def test_the_constants_of_the_plane():
    assert MULTIGOAL_STEPS == 30 and GOALS.tolist() == [[5, 0], [-5, 0], [0, 5], [0, -5]]


def test_the_plane_starts_near_the_origin():
    """0.1 xi, by the seed."""
    env = make_env("multigoal")
    starts = np.array([env.reset(seed=i)[0] for i in range(2000)])
    assert starts.dtype == np.float32
    np.testing.assert_allclose(starts.mean(0), 0, atol=0.01)
    np.testing.assert_allclose(starts.std(0), 0.1, atol=0.005)
    assert np.array_equal(starts[7], env.reset(seed=7)[0])


def test_the_plane_hands_out_no_live_objects():
    """What a step has returned is not changed by later ones."""
    env = make_env("multigoal")
    first, _ = env.reset(seed=0)
    second = env.step(np.ones(2, np.float32))[0]
    kept = first.copy(), second.copy()
    env.step(-np.ones(2, np.float32))
    env.reset(seed=1)
    assert np.array_equal(first, kept[0]) and np.array_equal(second, kept[1])


# --- MuJoCo --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MUJOCO)
def test_actions_fill_the_box(name):
    """A 1 is the upper end of what the simulator is told, -1 the lower (Humanoid: 0.4, -0.4)."""
    _, d, box, _ = MUJOCO[name]
    env = make_env(name)
    env.reset(seed=0)
    for x in (1, 0.5, -1):
        env.step(np.full(d, x, np.float32))
        np.testing.assert_allclose(env.unwrapped.data.ctrl, x * box, rtol=1e-6)


@pytest.mark.parametrize("name", MUJOCO)
def test_who_falls(name):
    """Random play ends all but the cheetah's episode before 300 steps."""
    env = make_env(name)
    env.reset(seed=0)
    rng, steps, terminated = np.random.default_rng(0), 0, False
    while not terminated and steps < 300:
        _, _, terminated, truncated, _ = env.step(rng.uniform(-1, 1, MUJOCO[name][1]))
        steps += 1
        assert not truncated
    assert terminated == MUJOCO[name][3]


# --- the kitchen ---------------------------------------------------------------------------------

DISTANCES = {  # to the goals, at reset
    "light switch": 0.692,
    "slide cabinet": 0.370,
    "bottom burner": 0.880,
    "microwave": 0.751,
    "kettle": 0.406,
    "top burner": 0.920,
    "hinge cabinet": 1.452,
}


def put(env, task):
    """Moves a task's object to where it should be."""
    from gymnasium_robotics.envs.franka_kitchen.kitchen_env import (
        OBS_ELEMENT_GOALS,
        OBS_ELEMENT_INDICES,
    )

    env.unwrapped.data.qpos[OBS_ELEMENT_INDICES[task]] = OBS_ELEMENT_GOALS[task]


@pytest.mark.parametrize("name", KITCHENS)
def test_the_kitchens_tasks(name):
    """The first k of seven, in the order of the sets' definition."""
    assert list(DISTANCES) == list(KITCHEN)
    assert set(make_env(name).unwrapped.goal) == set(list(DISTANCES)[: KITCHENS[name]])


def test_distances_in_the_kitchen(kitchen):
    """At reset, without noise, and whatever happened before."""
    for seed in (0, 1):
        kitchen.reset(seed=seed)
        inner = kitchen.unwrapped
        for task, distance in DISTANCES.items():
            achieved = inner._get_obs(np.zeros(18))["achieved_goal"][task]
            assert round(float(np.linalg.norm(achieved - inner.goal[task])), 3) == distance
        put(kitchen, "kettle")
        kitchen.step(np.ones(9))


@pytest.mark.parametrize("name", ["kitchen-1", "kitchen-4"])
def test_the_kitchens_return_counts_completions(name):
    """Each task once per episode, and again in the next; all of them end it with success."""
    env, tasks = make_env(name), list(DISTANCES)[: KITCHENS[name]]
    for seed in range(2):
        env.reset(seed=seed)
        total = 0
        for i, task in enumerate(tasks):
            _, reward, terminated, *_ = env.step(np.zeros(9))
            assert reward == 0 and not terminated
            put(env, task)
            _, reward, terminated, truncated, info = env.step(np.zeros(9))
            total += reward
            assert reward == 1 and not truncated
            assert terminated == info["success"] == (i == len(tasks) - 1)
        assert total == len(tasks)


def test_a_task_of_another_set_gives_no_reward():
    env = make_env("kitchen-1")
    env.reset(seed=0)
    put(env, "slide cabinet")
    assert env.step(np.zeros(9))[1:3] == (0, False)


def test_the_kitchen_hands_out_no_live_objects(kitchen):
    """What a step has returned is not changed by later steps and resets, and tells no tasks."""
    first = kitchen.reset(seed=0)
    put(kitchen, "kettle")
    second = kitchen.step(np.ones(9))
    assert first[1] == {} and second[4] == {"success": False} and second[1] == 1
    kept = copy.deepcopy((first, second))
    put(kitchen, "microwave")
    kitchen.step(-np.ones(9))
    kitchen.reset(seed=1)
    assert np.array_equal(first[0], kept[0][0]) and np.array_equal(second[0], kept[1][0])
    assert second[1:] == kept[1][1:]


def test_what_the_kitchen_observes(kitchen):
    """9 + 9 of the robot, 21 + 20 of the objects, with small noise."""
    state, _ = kitchen.reset(seed=0)
    qpos, qvel = kitchen.unwrapped.data.qpos, kitchen.unwrapped.data.qvel
    truth = np.concatenate([qpos[:9], qvel[:9], qpos[9:], qvel[9:]])
    assert state.shape == truth.shape == (59,)
    assert 0 < np.abs(state - truth).max() < 0.02


# --- the pool ------------------------------------------------------------------------------------


def column(*seeds):
    """Seeds of agents with a slot each."""
    return np.array(seeds, np.uint32)[:, None]


def run(pool, policy, most=10**6):
    """Steps until every slot has ended once, at most `most`. Returns the list of steps."""
    steps, ended = [], np.zeros(pool.shape, bool)
    while not ended.all() and len(steps) < most:
        steps.append(step(pool, policy))
        ended |= steps[-1]["terminals"] > 0
    return steps


def still(d):
    return lambda observations, seeds, ages: np.zeros((*seeds.shape, 1, d), np.float32)


@pytest.mark.parametrize("name, d, limit", [("multigoal", 2, 30), ("kitchen-1", 9, 280)])
def test_time_outs_bootstrap(new_pool, name, d, limit):
    """A clock that runs out: terminal 1, mask 1, no success, exactly at the limit."""
    pool = new_pool([name])
    pool.reset(column(3))
    steps = run(pool, still(d), limit + 5)
    assert len(steps) == limit
    for i, row in enumerate(steps):
        assert row["terminals"].item() == (i == limit - 1)
        assert (row["masks"].item(), row["success"].item()) == (1, 0)


def walk(observations, seeds, ages):
    """Half a step towards the goal that the seed names."""
    return GOALS[seeds % 4][:, :, None] / 10


def test_goals_end_an_episode(new_pool):
    """Terminal 1, mask 0, success; an evaluation counts them."""
    pool = new_pool(["multigoal"] * 2)
    pool.reset(column(4, 5))
    last = run(pool, walk, 12)[-1]
    assert last["terminals"].all() and not last["masks"].any() and last["success"].all()
    after = last["observations"] + last["actions"]
    distance = ((after - GOALS[:2, None]) ** 2).sum(-1)
    reward = 10 - 30 * (last["actions"] ** 2).sum(-1) - distance
    np.testing.assert_allclose(last["rewards"], reward, atol=1e-5)
    out = play(new_pool(["multigoal"], 2), walk, np.arange(6)[None])
    assert (out["success"] == 1).all() and set(out["length"].flat) <= {8, 9}
    ends = np.array([path[-1] for path in out["path"][0]])
    assert (np.linalg.norm(ends - GOALS[[0, 1, 2, 3, 0, 1]], axis=1) < 1).all()


@pytest.mark.parametrize("name, d, low, most", [("multigoal", 2, 8, 10), ("hopper", 3, 5, 100)])
def test_a_fall_masks_the_future(new_pool, name, d, low, most):
    """The task's end, a goal or a fall, has mask 0; a fall is no success."""
    policy = walk if name == "multigoal" else noise(1, d)
    pool = new_pool([name])
    pool.reset(column(8))
    steps = run(pool, policy)
    assert low <= len(steps) <= most
    ends = [(x["terminals"].item(), x["masks"].item()) for x in steps]
    assert ends == [(0, 1)] * (len(steps) - 1) + [(1, 0)]
    assert (steps[-1]["success"].item() == 1) == (name == "multigoal")


@pytest.mark.parametrize("name, d", [("multigoal", 2), ("hopper", 3)])
def test_no_transition_joins_two_episodes(new_pool, name, d):
    """The last step's next state is the final one, which its observation and action lead to, and
    not the first of the next episode, with which the next transition begins."""
    pool = new_pool([name] * 2, 1, 2)
    policy = noise(1, d)
    pool.reset(column(13, 14))
    starts, ends = pool.observations.copy(), 0
    pool.reset(column(11, 12))
    before = pool.observations.copy()
    for _ in range(200):
        row = step(pool, policy)
        assert np.array_equal(row["observations"], before)
        if name == "multigoal":
            after = np.clip(row["observations"] + row["actions"], -7, 7)
            np.testing.assert_array_equal(row["next_observations"], after)
        else:  # positions move by a velocity times the time step, 0.008 s
            moved = row["next_observations"] - row["observations"]
            assert np.abs(moved[..., :5]).max() < 0.1
        before = row["next_observations"].copy()
        over = row["terminals"] > 0
        if over.any():
            assert (row["next_observations"] != starts)[over].any(-1).all()
            pool.reset(column(13, 14), over)
            assert np.array_equal(pool.observations[over], starts[over])
            before[over] = starts[over]
            ends += over.sum()
    assert ends >= 4


@pytest.mark.parametrize("name", ["multigoal", "kitchen-1", "hopper", "humanoid"])
def test_pool_of_workers(new_pool, name):
    """float32 transitions, the same bit by bit however many workers there are; they hold actions in
    [-1, 1] as the policy chose them, not those of the simulator."""
    size, d, _ = SIZES[name]
    steps = []
    for workers in (1, 2):
        pool = new_pool([name] * 2, 1, workers)
        pool.reset(column(21, 22))
        steps.append([step(pool, noise(3, d)) for _ in range(5)])
    for first, second in zip(*steps, strict=True):
        same(first, second)
        assert {x.dtype.name for x in first.values()} == {"float32"}
        assert first["observations"].shape == first["next_observations"].shape == (2, 1, size)
        assert first["actions"].shape == (2, 1, d) and not np.nansum(first["success"])
    plan = noise(3, d)(None, column(21, 22), np.zeros((2, 1), int))
    assert np.array_equal(np.stack([row["actions"] for row in steps[0][:3]], 2), plan)


@pytest.mark.parametrize("name", ["multigoal", "kitchen-7", *MUJOCO])
def test_an_environment_forgets_earlier_episodes(new_pool, name):
    """After another episode, ended or not, the same seed and actions give the bits of a process
    that has played nothing, with the rewards and flags."""
    d = SIZES[name][1]
    used, fresh = new_pool([name], 1, 1), new_pool([name], 1, 1)
    for seed, steps in ((5, 40), (6, 7)):
        used.reset(column(seed))
        run(used, noise(1, d), steps)
    for pool in (used, fresh):
        pool.reset(column(9))
    start = fresh.observations.copy()
    assert np.array_equal(used.observations, start)
    for _ in range(25):
        first, second = (step(pool, noise(1, d)) for pool in (used, fresh))
        same(first, second)
        if first["terminals"].any():
            break
    fresh.reset(column(10))  # another seed, another start
    assert not np.array_equal(fresh.observations, start)


@pytest.mark.parametrize("name", ["multigoal", "kitchen-2", "hopper", "humanoid"])
def test_saved_environments_come_back(new_pool, name):
    """In the middle of an episode and of a plan, at different ages, with other workers."""
    policy, pool, actions = noise(5, SIZES[name][1]), new_pool([name] * 2, 1, 1), []
    pool.reset(column(99, 98))
    for i in range(13):
        if i == 6:
            pool.reset(column(0, 97), np.array([[False], [True]]))
        actions.append(step(pool, policy)["actions"])
    saved = copy.deepcopy(pool.save())
    assert saved["ages"].tolist() == [[13], [7]]
    other = new_pool([name] * 2, 1, 2)
    other.load(saved, np.stack(actions, 2))
    for _ in range(4):
        same(step(pool, policy), step(other, policy))
