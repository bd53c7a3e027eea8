"""Tests of the pool: episodes are fixed by seed and actions, counted exactly, saved and restored,
played by processes or in this one."""

import copy
import functools
import subprocess
import sys

import gymnasium
import numpy as np
import psutil
import pytest

from common.env_pool import Episodes
from common.environments import make_env, seed_of
from tests.helpers.environments import TOY, Toy, column, noise, play, same, step
from tests.helpers.messages import stops
from tools.shared_blocks import ROOT

gymnasium.register("Toy-v0", Toy, max_episode_steps=1000)


def chunk(H, seed, age):
    """The actions (H, 2) of `noise` at this age of an episode."""
    return noise(H, 2)(None, column(seed), np.array([[age]]))[0, 0]


# --- episodes ------------------------------------------------------------------------------------

SEEDS = np.array([[103, 7, 112, 1, 1005, 4], [101, 302, 9, 1108, 2, 105]], np.uint32)


@pytest.mark.parametrize("workers, slots", [(1, 1), (1, 6), (2, 2), (3, 3), (2, 9)])
def test_episodes_are_counted_exactly(new_pool, workers, slots):
    """One episode per seed, wherever and next to whatever it is played: its length, the sum of its
    rewards, the success of its last step and every state that it visits. Its random numbers are its
    own, those of the global generator, too."""
    pool = new_pool([TOY] * 2, slots, workers)
    for H in (1, 4):
        out = play(pool, noise(H, 2), SEEDS)
        length, success = SEEDS % 100, SEEDS // 100 % 2
        assert np.array_equal(out["length"], length)
        assert np.array_equal(out["success"], success)
        assert np.array_equal(out["return"], success - length.astype(int))
        for seed, path in zip(SEEDS.flat, out["path"].flat):
            path = np.array(path)
            assert (path[:, 0] == seed).all()
            assert path[:, 1].tolist() == list(range(1, seed % 100 + 1))
            drawn = np.random.RandomState(seed).uniform(size=len(path) + 1)[1:]  # after the reset's
            assert np.array_equal(path[:, 4], np.float32(drawn))
            chunks = [chunk(H, seed, age) for age in range(0, len(path), H)]
            assert np.array_equal(path[:, 2:4], np.concatenate(chunks)[: len(path)])


def test_slots_without_an_episode_rest(new_pool):
    """At the end of an evaluation, one after the other; they ask for no actions."""
    pool = new_pool([TOY], 3)
    episodes = Episodes(pool, np.array([[101, 103]], np.uint32))
    assert episodes.running and pool.active.tolist() == [[True, True, False]]
    for rest in ([[False, True, False]], [[False, True, False]], [[False] * 3]):
        pool.set_actions(np.zeros((1, 3, 1, 2)))
        episodes.step()
        assert pool.active.tolist() == rest
    assert not episodes.running and not pool.need_actions()
    assert episodes.results["length"].tolist() == [[1, 3]]


def test_no_more_environments_than_a_hundred(new_pool):
    """One for each agent at least. They are made when they are started."""
    for agents, slots, each in ((1, 10, 10), (40, 10, 2), (60, 2, 1), (200, 3, 1), (0, 5, 5)):
        names = [f"{TOY}{agent}" for agent in range(agents)]
        pool = new_pool(names, slots, 1)
        assert pool.shape == pool.seeds.shape == pool.ages.shape == (agents, each)
    assert new_pool([TOY] * 3, 50, 1, most=150).shape == (3, 50)  # PPO's, which learns from all


@pytest.mark.parametrize("name, H", [("pointmaze-medium", 5), ("cube-single", 1)])
def test_workers_and_slots_do_not_change_an_episode(new_pool, name, H):
    """Bit by bit; without success an episode lasts until the time limit."""
    name = f"{name}-singletask-task1-v0"
    env = make_env(name)
    seeds = np.array([[seed_of(i) for i in range(2)]], np.uint32)
    policy = noise(H, env.action_space.shape[0])
    first, second = (play(new_pool([name], n, n), policy, seeds) for n in (1, 2))
    same(first, second)
    limit = env.spec.max_episode_steps
    assert (first["length"] == limit).all() and (first["return"] == -limit).all()
    assert not first["success"].any() and not np.array_equal(*first["path"][0])


@pytest.mark.parametrize("name", ["multigoal", TOY])
def test_environments_in_this_process_are_those_in_workers(new_pool, monkeypatch, name):
    """Bit by bit, with slots that end at different times; numbers of the global generator too."""
    outcomes = []
    seeds = np.array([[103, 7, 112, 5, 1105], [101, 302, 9, 1108, 105]], np.uint32)
    for in_process in ((name,), ()):
        monkeypatch.setattr("common.env_pool.IN_PROCESS", in_process)
        before = set(psutil.Process().children())
        pool = new_pool([name] * 2, 2, 2)
        outcomes.append(play(pool, noise(3, 2), seeds))
        workers = set(psutil.Process().children()) - before
        assert len(workers) == (0 if in_process else 2)
        pool.active[:] = True
        pool.reset(seeds[:, :2])
        steps = [step(pool, noise(3, 2)) for _ in range(7)]
        outcomes[-1] |= {f"{i} {key}": x for i, row in enumerate(steps) for key, x in row.items()}
        del pool
    same(*outcomes)


@pytest.mark.parametrize("name", ["hopper", "Pendulum-v1"])
def test_few_cheap_environments_stay_in_this_process(new_pool, name):
    """Gymnasium's own, up to eight, unless --workers asks for processes; episodes do not differ."""
    env = make_env(name)
    seeds = np.array([[seed_of(i) for i in range(3)]], np.uint32)
    outcomes = []
    for workers in (0, 2):
        before = set(psutil.Process().children())
        pool = new_pool([name], 2, workers)
        outcomes.append(play(pool, noise(1, env.action_space.shape[0]), seeds))
        assert len(set(psutil.Process().children()) - before) == workers
    same(*outcomes)
    assert not new_pool([name], 9)._in_process
    assert new_pool([f'{name}?{{"max_episode_steps": 5}}'])._in_process
    assert not new_pool(["kitchen-1"])._in_process


@functools.cache
def guide(task):
    """A policy that walks to the goal of the point maze, from cell to cell."""
    maze = make_env(f"pointmaze-medium-singletask-task{task}-v0").unwrapped
    maze.reset()
    goal = np.array(maze.cur_goal_xy)

    @functools.cache
    def search(cell):
        return maze.get_oracle_subgoal(maze.ij_to_xy(cell), goal)[0]

    def policy(observations, seeds, ages):
        plans = np.zeros((*seeds.shape, 1, 2), np.float32)
        for slot in np.ndindex(seeds.shape):
            way = search(maze.xy_to_ij(observations[slot])) - observations[slot]
            plans[slot] = way / (np.linalg.norm(way) + 1e-6)
        return plans

    return policy, goal


def test_point_mazes_that_are_solved(new_pool):
    """Episodes end early, at different times: -1 per step except the last, whose success is that
    of the state before it; the next episode of the slot begins again."""
    (policy, goal), seeds = guide(1), np.array([[seed_of(i) for i in range(3)]], np.uint32)
    name = "pointmaze-medium-singletask-task1-v0"
    pool = new_pool([name], 2, 2)
    out = play(pool, policy, seeds)
    assert (out["success"] == 1).all() and (out["length"] < 1000).all()
    assert np.array_equal(out["return"], 1 - out["length"])
    assert len(set(out["length"].flat)) > 1
    for length, path in zip(out["length"].flat, out["path"].flat):
        distance = np.linalg.norm(np.array(path) - goal, axis=1)
        assert len(path) == length and distance[-2] <= 1 < distance[:-2].min()
    pool = new_pool([name])
    pool.reset(seeds[:, 2:])
    for _ in range(int(out["length"][0, 2])):
        steps = step(pool, policy)
        ended = steps["terminals"].item(), steps["masks"].item(), steps["success"].item()
        assert ended in ((0, 1, 0), (1, 0, 1))
    assert ended == (1, 0, 1) and steps["rewards"].item() == 0


# --- steps ---------------------------------------------------------------------------------------


def test_steps_are_transitions(new_pool):
    """Of all slots, as float32: states follow one another; the task ends an episode with mask 0,
    the clock with mask 1."""
    pool = new_pool([TOY] * 3, 1, 2)
    pool.reset(column(103, 3, 99))
    states = pool.observations.copy()
    assert states[:, 0, :2].tolist() == [[103, 0], [3, 0], [99, 0]]
    for age in range(1, 4):
        steps = step(pool, noise(1, 2))
        assert {x.dtype.name for x in steps.values()} == {"float32"}
        assert {x.shape[:2] for x in steps.values()} == {(3, 1)}
        assert np.array_equal(steps["observations"], states)
        states = steps["next_observations"]
        assert np.array_equal(pool.observations, states)
        assert np.array_equal(steps["actions"], states[..., 2:4])
        over = age == 3
        assert steps["rewards"][:, 0].tolist() == [over - 1, -1, -1]
        assert steps["masks"][:, 0].tolist() == [not over, 1, 1]
        assert steps["terminals"][:, 0].tolist() == [over, over, 0]
        assert steps["success"][:, 0].tolist() == [over, 0, 0]
        assert pool.ages[:, 0].tolist() == [age] * 3
        assert pool.seeds[:, 0].tolist() == [103, 3, 99]


def test_slots_that_do_not_play(new_pool):
    """Stay as they are; their results are zeros."""
    pool = new_pool([TOY] * 2, 2)
    pool.reset(np.array([[50, 51], [52, 53]], np.uint32))
    before = pool.observations.copy()
    pool.active = np.array([[True, False], [False, True]])
    steps = step(pool, noise(2, 2))
    for name in ("next_observations", "rewards", "masks"):
        assert steps[name][0, 0].any() and not steps[name][0, 1].any()
        assert steps[name][1, 1].any() and not steps[name][1, 0].any()
    assert pool.ages.tolist() == [[1, 0], [0, 1]]
    assert np.array_equal(pool.observations[0, 1], before[0, 1])
    assert not np.array_equal(pool.observations[0, 0], before[0, 0])
    pool.active[:] = True
    after = step(pool, noise(2, 2))
    assert np.array_equal(after["actions"][0, 0], chunk(2, 50, 0)[1])
    assert np.array_equal(after["actions"][0, 1], chunk(2, 51, 0)[0])


def test_resetting_nothing_changes_nothing(new_pool):
    """Also before the first episode."""
    pool = new_pool([TOY] * 2)
    pool.reset(column(5, 6), np.zeros((2, 1), bool))
    assert pool.observations.shape == (2, 1, 0)
    pool.reset(column(5, 6))
    before = pool.observations.copy()
    pool.reset(column(7, 8), np.zeros((2, 1), bool))
    assert np.array_equal(pool.observations, before) and pool.seeds[:, 0].tolist() == [5, 6]


def test_actions_that_are_no_numbers_are_zeros(new_pool):
    """A lost agent's; the others play theirs."""
    pool = new_pool([TOY] * 2)
    pool.reset(column(5, 6))
    pool.set_actions([[[[np.nan, np.nan]]], [[[0.5, 0.25]]]])
    assert pool.step()["actions"][:, 0].tolist() == [[0, 0], [0.5, 0.25]]


@pytest.mark.parametrize("H", [1, 5])
def test_chunks_are_played_open_loop(new_pool, H):
    """Actions are needed when a plan is used up; a new episode discards the rest."""
    pool, asked = new_pool([TOY]), []

    def policy(observations, seeds, ages):
        asked.append((int(seeds[0, 0]), int(ages[0, 0])))
        assert observations[0, 0, :2].tolist() == [seeds[0, 0], ages[0, 0]]
        return np.float32([[[[len(asked), h] for h in range(H)]]])

    played = []
    for seed, steps in ((50, 12), (60, 7)):
        pool.reset(column(seed))
        played += [step(pool, policy)["actions"][0, 0].tolist() for _ in range(steps)]
    expected = [(50, age) for age in range(0, 12, H)] + [(60, age) for age in range(0, 7, H)]
    assert asked == expected
    chunks = [len(range(s, min(s + H, n))) for n in (12, 7) for s in range(0, n, H)]
    assert played == [[i + 1, h] for i, n in enumerate(chunks) for h in range(n)]


def test_slots_need_actions_at_their_own_times(new_pool):
    """A slot whose plan is not used up keeps it when another one gets a new one."""
    pool = new_pool([TOY] * 2)
    pool.reset(column(50, 60))
    actions = []
    for i in range(9):
        if i == 3:
            pool.reset(column(0, 70), np.array([[False], [True]]))
        actions.append(step(pool, noise(5, 2))["actions"])
    first = np.concatenate([chunk(5, 50, 0), chunk(5, 50, 5)[:4]])
    second = np.concatenate([chunk(5, 60, 0)[:3], chunk(5, 70, 0), chunk(5, 70, 5)[:1]])
    assert np.array_equal(np.stack(actions, 2)[:, 0], [first, second])


def test_plans_that_are_used_up_in_some_slots(new_pool):
    """Only these take the new ones, each from its first action."""
    pool = new_pool([TOY], 3)
    pool.reset(np.array([[50, 60, 70]], np.uint32))
    assert pool.need_actions()
    old, new = (np.full((1, 3, 3, 2), x) + np.arange(3)[:, None] / 8 for x in (0.25, 0.5))
    pool.set_actions(old)
    assert not pool.need_actions()
    pool.active = np.array([[True, True, False]])
    pool.step()
    pool.active = np.array([[True, False, False]])
    pool.step()
    pool.step()
    assert pool.need_actions()
    pool.active[:] = True
    pool.set_actions(new)
    assert not pool.need_actions()
    played = [pool.step()["actions"][0, :, 0].tolist() for _ in range(2)]
    assert played == [[0.5, 0.375, 0.25], [0.625, 0.5, 0.375]]
    assert pool.need_actions()  # of the second slot
    pool.active[0, 1] = False
    assert not pool.need_actions()  # it does not play


def test_random_actions(new_pool):
    """Uniform, of a single step, by the episode's seed and age alone."""
    pool = new_pool([TOY] * 2, 2)
    pool.seeds = np.array([[1, 2], [1, 3]], np.uint32)
    pool.ages = np.array([[0, 0], [0, 0]], np.int32)
    first = pool.random_actions(3)
    assert first.shape == (2, 2, 1, 3) and first.dtype == np.float32
    assert np.array_equal(first[0, 0], first[1, 0]) and not np.array_equal(first[0, 1], first[1, 1])
    noise_of_reset = np.random.default_rng(1).uniform(-1, 1, 3)
    assert not np.isclose(first[0, 0, 0], noise_of_reset).any()
    drawn = []
    for age in range(1, 500):
        pool.ages[:] = age
        drawn.append(pool.random_actions(3))
    drawn = np.array(drawn)
    assert np.abs(drawn).max() <= 1 and abs(drawn.mean()) < 0.03
    assert abs(drawn.std() - 3**-0.5) < 0.02
    assert len(np.unique(drawn[:, 0, 0])) == drawn[:, 0, 0].size


NAMES = ["pointmaze-medium", "scene", "puzzle-3x3", "cube-double", "pointmaze-teleport"]


@pytest.mark.parametrize("name", NAMES)
def test_an_environment_forgets_earlier_episodes(new_pool, name):
    """One that has played others gives, bit by bit, the episode of a fresh one."""
    pool = new_pool([f"{name}-singletask-task2-v0"] * 2, 1, 1)
    size = 2 if "maze" in name else 5

    def policy(observations, seeds, ages):
        return np.sign(noise(1, size)(observations, seeds, ages))

    used = np.array([[True], [False]])
    for seed in (1, 2):
        pool.active = used
        pool.reset(column(seed, 0), used)
        for _ in range(70):
            step(pool, policy)
    pool.active = used | True
    pool.reset(column(3, 3))
    assert np.array_equal(*pool.observations)
    for _ in range(70):
        for values in step(pool, policy).values():
            assert np.array_equal(*values)


# --- saving --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, d",
    [
        (TOY, 2),
        ("pointmaze-teleport-singletask-task1-v0", 2),
        ("cube-single-singletask-task1-v0", 5),
    ],
)
def test_saved_environments_come_back(new_pool, name, d):
    """In the middle of an episode and of a chunk, at different ages, with other workers: what
    follows is the same bit by bit."""
    policy, pool, actions = noise(5, d), new_pool([name] * 2, 1, 1), []
    pool.reset(column(99, 98))
    for i in range(13):
        if i == 6:
            pool.reset(column(0, 97), np.array([[False], [True]]))
        actions.append(step(pool, policy)["actions"])
    saved = copy.deepcopy(pool.save())
    assert saved["ages"].tolist() == [[13], [7]]
    other = new_pool([name] * 2, 1, 2)
    other.load(saved, np.stack(actions, 2))
    assert np.array_equal(other.observations, pool.observations)
    for _ in range(8):
        same(step(pool, policy), step(other, policy))


def test_what_is_saved_stays(new_pool):
    """What is loaded is a copy: later steps do not change it."""
    pool = new_pool([TOY] * 2)
    pool.reset(column(50, 60))
    actions = step(pool, noise(3, 2))["actions"]
    saved = copy.deepcopy(pool.save())
    kept = copy.deepcopy(saved)
    other = new_pool([TOY] * 2)
    other.load(saved, actions[:, :, None])
    for _ in range(5):
        step(other, noise(3, 2))
    same(saved, kept)


def test_saved_before_the_first_step(new_pool):
    """A pool that has not begun, and an empty one, are saved and restored too."""
    pool = new_pool([TOY] * 2)
    pool.load(copy.deepcopy(new_pool([TOY] * 2).save()), np.zeros((2, 1, 0, 2), np.float32))
    pool.reset(column(5, 6))
    assert step(pool, noise(1, 2))["next_observations"][:, 0, 1].tolist() == [1, 1]
    nothing = new_pool([])
    nothing.load(nothing.save(), np.zeros((0, 1, 0, 2), np.float32))


def test_an_episode_longer_than_the_replay(new_pool):
    """Its first actions are gone: a line says so."""
    pool = new_pool([TOY])
    pool.reset(column(50))
    for _ in range(4):
        step(pool, noise(1, 2))
    saved = pool.save()
    actions = np.zeros((1, 1, 3, 2), np.float32)
    stops("an episode is longer than the replay", call=lambda: new_pool([TOY]).load(saved, actions))


# --- processes -----------------------------------------------------------------------------------


def test_workers_keep_the_path(new_pool, monkeypatch, tmp_path):
    """An environment from a folder that PYTHONPATH names."""
    entry = f"'Elsewhere-v0', '{Toy.__module__}:Toy', max_episode_steps=9"
    text = f"import gymnasium\ngymnasium.register({entry})\n"
    (tmp_path / "elsewhere.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pool = new_pool(["elsewhere:Elsewhere-v0"], 1, 1)
    assert play(pool, noise(1, 2), [[103]])["success"].tolist() == [[True]]


def test_workers_find_what_the_parent_process_finds(new_pool, monkeypatch, tmp_path):
    """An environment next to a script or a notebook, which nothing but sys.path names."""
    entry = f"'Beside-v0', '{Toy.__module__}:Toy', max_episode_steps=9"
    (tmp_path / "beside.py").write_text(f"import gymnasium\ngymnasium.register({entry})\n")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.chdir(tmp_path)
    pool = new_pool(["beside:Beside-v0"], 1, 1)
    assert play(pool, noise(1, 2), [[103]])["success"].tolist() == [[True]]


@pytest.mark.parametrize("module", ["workers", "env_pool", "environments", "collect.ant"])
def test_workers_do_not_import_jax(module):
    code = f"""
import sys
import common.{module}
sys.exit("jax" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
