"""Tests of the environments: names and protocols; a pool whose episodes are fixed by seed and
actions, counted exactly, saved and restored, and that fails loudly."""

import copy
import functools
import subprocess
import sys
import time

import gymnasium
import numpy as np
import psutil
import pytest

from common.envs import TRAINING, make_env, resolve, seed_of
from tests.helpers.environments import TOY, Toy, noise, same
from tools.shared_blocks import ROOT

gymnasium.register("Toy-v0", Toy)


def test_actions_that_are_no_numbers_are_zeros(new_pool):
    """A lost agent's; the others play theirs."""
    pool = new_pool([TOY] * 2, 1)
    pool.start([0, 1], [5, 6])
    lost = lambda observations, seeds, ages: np.float32([[[np.nan, np.nan]], [[0.5, 0.25]]])
    assert pool.step(lost, [0, 1])["actions"].tolist() == [[0, 0], [0.5, 0.25]]


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
        ("cube-double-navigate", "cube-double-play"),
        ("scene-stitch", "scene"),
        ("cube-double-singletask-task6-v0", "cube-double"),
        ("visual-cube-double", "cube-double"),
        ("cube-double-v1", "cube-double"),
        ("Cube-Double", "cube-double"),
        ("", "cube-double"),
        ("qqqq", "cube-double"),
        ("HalfCheetah-v5", "halfcheetah"),
    ],
)
def test_unknown_names_end_in_a_line_with_near_ones(name, near):
    with pytest.raises(SystemExit) as error:
        resolve(name)
    line = str(error.value)
    assert f"'{name}'" in line and near in line.split("did you mean")[1] and "\n" not in line
    for offered in line.split("did you mean ")[1].rstrip("?").split(", "):
        resolve(offered)


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


# --- episodes ------------------------------------------------------------------------------------

SEEDS = np.array([[103, 7, 112, 1, 1005, 4], [101, 302, 9, 1108, 2, 105]], np.uint32)


@pytest.mark.parametrize("workers, slots", [(1, 1), (1, 6), (2, 2), (3, 3)])
def test_play_counts_exactly(new_pool, workers, slots):
    """One episode per seed, wherever and beside whatever it is played: its length, the sum of its
    rewards, the success of its last step and every state that it visits. Its random numbers are its
    own, those of the global generator, too."""
    pool = new_pool([TOY] * 2 * slots, workers)
    for H in (1, 4):
        out = pool.play(noise(H, 2), SEEDS)
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
            starts = [age for age in range(len(path)) if age % H == 0]
            chunks = [noise(H, 2)(None, [seed], [age])[0] for age in starts]
            assert np.array_equal(path[:, 2:4], np.concatenate(chunks)[: len(path)])


def test_workers_keep_the_path(new_pool, monkeypatch, tmp_path):
    """An environment from a folder that PYTHONPATH names."""
    text = f"import gymnasium\ngymnasium.register('Elsewhere-v0', '{Toy.__module__}:Toy')\n"
    (tmp_path / "elsewhere.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pool = new_pool(["elsewhere:Elsewhere-v0"], 1)
    assert pool.play(noise(1, 2), np.array([[103]], np.uint32))["success"].tolist() == [[True]]


def test_no_more_environments_than_a_hundred(new_pool):
    """One of each name at least. They are made when they are started."""
    for agents, each, n in ((1, 10, 10), (40, 10, 80), (60, 2, 60), (200, 3, 200), (0, 5, 0)):
        names = [f"{TOY}{agent}" for agent in range(agents)]
        pool = new_pool(names, 1, each)
        assert len(pool.names) == len(pool.states) == len(pool.ages) == n
        assert pool.names == [name for name in names for _ in range(n // agents)]


@pytest.mark.parametrize("name, H", [("pointmaze-medium", 5), ("cube-single", 1)])
def test_workers_and_slots_do_not_change_an_episode(new_pool, name, H):
    """Bit by bit; without success an episode lasts until the time limit."""
    name = f"{name}-singletask-task1-v0"
    env = make_env(name)
    seeds = np.array([[seed_of(i) for i in range(2)]], np.uint32)
    policy = noise(H, env.action_space.shape[0])
    first, second = (new_pool([name] * n, n).play(policy, seeds) for n in (1, 2))
    same(first, second)
    limit = env.spec.max_episode_steps
    assert (first["length"] == limit).all() and (first["return"] == -limit).all()
    assert not first["success"].any() and not np.array_equal(*first["path"][0])


@functools.cache
def guide(task):
    """A policy that walks to the goal of the point maze, from cell to cell."""
    maze = make_env(f"pointmaze-medium-singletask-task{task}-v0").unwrapped
    maze.reset()
    search = functools.cache(lambda cell: maze.get_oracle_subgoal(cell_xy(cell), maze.cur_goal_xy))
    cell_xy = maze.ij_to_xy

    def policy(observations, seeds, ages):
        steps = [search(maze.xy_to_ij(xy))[0] - xy for xy in observations]
        return np.float32([[x / (np.linalg.norm(x) + 1e-6)] for x in steps])

    return policy, np.array(maze.cur_goal_xy)


def test_point_mazes_that_are_solved(new_pool):
    """Episodes end early, at different times: -1 per step but for the last, whose success is that
    of the state before it; the next episode of the slot begins anew."""
    (policy, goal), seeds = guide(1), np.array([[seed_of(i) for i in range(3)]], np.uint32)
    pool = new_pool(["pointmaze-medium-singletask-task1-v0"] * 2, 2)
    out = pool.play(policy, seeds)
    assert (out["success"] == 1).all() and (out["length"] < 1000).all()
    assert np.array_equal(out["return"], 1 - out["length"])
    assert len(set(out["length"].flat)) > 1
    for length, path in zip(out["length"].flat, out["path"].flat):
        distance = np.linalg.norm(np.array(path) - goal, axis=1)
        assert len(path) == length and distance[-2] <= 1 < distance[:-2].min()
    pool.start([1], [seeds[0, 2]])
    for _ in range(int(out["length"][0, 2])):
        steps = pool.step(policy, [1])
        ended = steps["terminals"].item(), steps["masks"].item(), steps["success"].item()
        assert ended in ((0, 1, 0), (1, 0, 1))
    assert ended == (1, 0, 1) and steps["rewards"].item() == 0


def test_steps_are_transitions(new_pool):
    """Of the slots asked for, in their order, as float32: states follow one another; the task ends
    an episode with mask 0, the clock with mask 1."""
    pool = new_pool([TOY] * 3, 2)
    pool.start([0, 1, 2], [103, 3, 99])
    states = np.stack(pool.states)
    for age in range(1, 4):
        steps = pool.step(noise(1, 2), [2, 0, 1])
        assert {x.dtype.name for x in steps.values()} == {"float32"}
        assert np.array_equal(steps["observations"], states[[2, 0, 1]])
        states[[2, 0, 1]] = steps["next_observations"]
        assert np.array_equal(steps["actions"], states[[2, 0, 1], 2:4])
        over = age == 3
        assert steps["rewards"].tolist() == [-1, over - 1, -1]
        assert steps["masks"].tolist() == [1, not over, 1]
        assert steps["terminals"].tolist() == [0, over, over]
        assert steps["success"].tolist() == [0, over, 0]
        assert pool.ages.tolist() == [age] * 3 and pool.seeds.tolist() == [103, 3, 99]


@pytest.mark.parametrize("H", [1, 5])
def test_chunks_are_played_open_loop(new_pool, H):
    """The policy is asked when a plan is used up; a new episode discards the rest."""
    pool, asked = new_pool([TOY], 1), []

    def policy(observations, seeds, ages):
        asked.append((int(seeds[0]), int(ages[0])))
        assert observations[0, :2].tolist() == [seeds[0], ages[0]]
        return np.float32([[[len(asked), h] for h in range(H)]])

    played = []
    for seed, steps in ((50, 12), (60, 7)):
        pool.start([0], [seed])
        played += [pool.step(policy, [0])["actions"][0].tolist() for _ in range(steps)]
    calls = [(50, age) for age in range(0, 12, H)] + [(60, age) for age in range(0, 7, H)]
    assert asked == calls
    chunks = [len(range(s, min(s + H, n))) for n in (12, 7) for s in range(0, n, H)]
    assert played == [[i + 1, h] for i, n in enumerate(chunks) for h in range(n)]


def test_slots_ask_at_their_own_times(new_pool):
    """A slot whose plan is not used up keeps it when another one asks."""
    pool = new_pool([TOY] * 2, 1)
    pool.start([0, 1], [50, 60])
    actions = []
    for step in range(9):
        if step == 3:
            pool.start([1], [70])
        actions.append(pool.step(noise(5, 2), [0, 1])["actions"])
    chunk = lambda seed, age: noise(5, 2)(None, [seed], [age])[0]
    first = np.concatenate([chunk(50, 0), chunk(50, 5)[:4]])
    second = np.concatenate([chunk(60, 0)[:3], chunk(70, 0), chunk(70, 5)[:1]])
    assert np.array_equal(np.stack(actions, 1), [first, second])


NAMES = ["pointmaze-medium", "scene", "puzzle-3x3", "cube-double", "pointmaze-teleport"]


def test_an_environment_forgets_earlier_episodes(new_pool):
    """One that has played others gives, bit by bit, the episode of a fresh one."""
    names = [f"{name}-singletask-task2-v0" for name in NAMES for _ in range(2)]
    pool, slots = new_pool(names, 2), list(range(len(names)))
    sizes = [2 if "maze" in name else 5 for name in names]

    def episode(slots, seed, steps):
        rng = np.random.default_rng(seed)
        states = [pool.call("start", {i: (seed,) for i in slots})]
        for _ in range(steps):
            action = np.sign(rng.normal(size=5))
            states.append(pool.call("step", {i: (action[: sizes[i]],) for i in slots}))
        return states

    for seed in (1, 2):
        episode(slots[::2], seed, 70)
    for states in episode(slots, 3, 70):
        for i in slots[::2]:
            used, fresh = states[i], states[i + 1]
            assert all(np.array_equal(x, y) for x, y in zip(used, fresh)), names[i]


@pytest.mark.parametrize(
    "name, d", [(TOY, 2), ("pointmaze-teleport-singletask-task1-v0", 2),
                ("cube-single-singletask-task1-v0", 5)]
)  # fmt: skip
def test_saved_environments_come_back(new_pool, name, d):
    """In the middle of an episode and of a chunk, at different ages, with other workers: what
    follows is the same bit by bit."""
    policy, pool, actions = noise(5, d), new_pool([name] * 2, 1), []
    pool.start([0, 1], [99, 98])
    for step in range(13):
        if step == 6:
            pool.start([1], [97])
        actions.append(pool.step(policy, [0, 1])["actions"])
    saved = copy.deepcopy(pool.save())
    assert saved["ages"].tolist() == [13, 7]
    other = new_pool([name] * 2, 2)
    other.load(saved, np.stack(actions, 1))
    for _ in range(8):
        same(pool.step(policy, [0, 1]), other.step(policy, [0, 1]))


def test_saved_before_the_first_step(new_pool):
    """A pool that has not begun, and an empty one, are saved and restored too."""
    pool = new_pool([TOY] * 2, 1)
    pool.load(copy.deepcopy(new_pool([TOY] * 2, 1).save()), np.zeros((2, 0, 2), np.float32))
    pool.start([0, 1], [5, 6])
    assert pool.step(noise(1, 2), [0, 1])["next_observations"][:, 1].tolist() == [1, 1]
    nothing = new_pool([])
    nothing.load(nothing.save(), np.zeros((2, 0, 2), np.float32))


# --- processes -----------------------------------------------------------------------------------


def ended(processes, seconds=10):
    """Whether all of them end within some seconds (a zombie has ended)."""

    def runs(process):
        try:
            return process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    until = time.time() + seconds
    while any(map(runs, processes)) and time.time() < until:
        time.sleep(0.05)
    return not any(map(runs, processes))


def test_an_environment_that_raises(new_pool):
    """RuntimeError with the environment's name and the traceback; others' workers are not named."""
    pool = new_pool([TOY, "pointmaze-medium-singletask-task1-v0"], 2)
    pool.start([0], [5])
    with pytest.raises(RuntimeError, match="(?s)Toy-v0.*ValueError: the toy is broken") as error:
        pool.call("step", {0: ([-1, 0],)})
    assert "pointmaze" not in str(error.value)
    with pytest.raises(RuntimeError, match="no-such-env-v0"):
        new_pool(["no-such-env-v0"], 1).start([0], [0])


def test_a_worker_that_dies_at_work(new_pool):
    """RuntimeError with the environment's name and the exit code, at once."""
    pool = new_pool([TOY], 1)
    pool.start([0], [5])
    with pytest.raises(RuntimeError, match="Toy-v0.*died.*-9"):
        pool.call("step", {0: ([-2, 0],)})


def test_a_worker_that_is_killed_between_two_steps(new_pool):
    """The same when it dies while nothing is asked of it, as by the out-of-memory killer."""
    before = psutil.Process().children()
    pool = new_pool([TOY], 1)
    pool.start([0], [5])
    (worker,) = set(psutil.Process().children()) - set(before)
    worker.kill()
    assert ended([worker])
    with pytest.raises(RuntimeError, match="Toy-v0"):
        pool.step(noise(1, 2), [0])


def test_close_ends_the_workers(new_pool):
    before = set(psutil.Process().children())
    pool = new_pool([TOY] * 3, 2)
    workers = set(psutil.Process().children()) - before
    assert len(workers) == 2
    pool.start([0, 1, 2], [5, 6, 7])
    pool.close()
    assert ended(workers)


def test_workers_do_not_import_jax():
    code = "import sys, common.envs; sys.exit(any(m.split('.')[0] == 'jax' for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_workers_do_not_outlive_their_parent():
    """Also when it is killed without a chance to close them."""
    code = f"""
import psutil, time
from common.envs import EnvPool
pool = EnvPool(["{TOY}"] * 2, 2)
pool.start([0, 1], [5, 6])
print(*(child.pid for child in psutil.Process().children()), flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2 and all(worker.is_running() for worker in workers)
    parent.kill()
    parent.communicate()
    assert ended(workers)
