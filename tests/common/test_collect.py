"""Tests of the dataset maker: same seed, same files; OGBench's format; experts that work."""

import importlib
import inspect
import os
import pathlib
import signal
import subprocess
import sys
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import ogbench
import pytest
import scipy.stats

from common.collect import dataset as dataset_module
from common.collect import episodes as episodes_module
from common.collect import experts
from common.collect.__main__ import main
from common.collect.dataset import collect
from common.collect.episodes import collect_episode, make_collection_env
from common.collect.plan import OFFICIAL, CollectError

ROOT = pathlib.Path(dataset_module.__file__).parents[2]
MAZE = "pointmaze-medium-stitch"
SIZE = 20_000  # 100 + 10 episodes in two training blocks and a validation block


def read(path):
    with np.load(path) as file:
        return dict(file)


def equal(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)


def check_format(arrays, num_rows, ob_dim, act_dim, num_buttons=0):
    keys = {"observations", "actions", "terminals", "qpos", "qvel"}
    assert arrays.keys() == keys | ({"button_states"} if num_buttons else set())
    for key, array in arrays.items():
        assert len(array) == num_rows
        assert array.dtype == {"terminals": bool, "button_states": np.int64}.get(key, np.float32)
    assert arrays["observations"].shape[1] == ob_dim
    assert arrays["actions"].shape[1] == act_dim
    assert np.abs(arrays["actions"]).max() <= 1
    if num_buttons:
        assert arrays["button_states"].shape == (num_rows, num_buttons)
        assert set(np.unique(arrays["button_states"])) == {0, 1}


@pytest.fixture(scope="module")
def maze(tmp_path_factory):
    return collect(MAZE, SIZE, tmp_path_factory.mktemp("maze"), seed=3, workers=1)


@pytest.fixture(scope="module")
def cube(tmp_path_factory):
    return collect("cube-single-play", 1, tmp_path_factory.mktemp("cube"), workers=2)


def test_maze_format(maze):
    assert maze.name == f"{MAZE}-v0.npz" and len(list(maze.parent.iterdir())) == 3
    for path, episodes in ((maze, 100), (maze.with_name(f"{MAZE}-v0-val.npz"), 10)):
        arrays = read(path)
        check_format(arrays, episodes * 201, ob_dim=2, act_dim=2)
        assert np.array_equal(np.flatnonzero(arrays["terminals"]) % 201, np.full(episodes, 200))
        inside = ~arrays["terminals"][:-1]  # rows follow one another within an episode
        moved = np.abs(np.diff(arrays["observations"], axis=0)).max(axis=1)
        assert moved[inside].max() < 0.5 < moved[~inside].max()


def test_workers_and_interruption_do_not_change_the_files(maze, tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        # the workers are other processes: only the merge
        patch.setattr(dataset_module, "write_arrays", interrupt)
        with pytest.raises(KeyboardInterrupt):
            collect(MAZE, SIZE, tmp_path, seed=3, workers=2)
    parts = sorted((tmp_path / f"{MAZE}-v0.parts").iterdir())
    assert len(parts) == 3
    parts[1].unlink()
    with pytest.raises(CollectError, match="seed: 3, now 4"):
        collect(MAZE, SIZE, tmp_path, seed=4)
    capsys.readouterr()
    collect(f"{MAZE}-v0", SIZE - 5, tmp_path, seed=3, workers=2)  # still 100 episodes
    assert "110 episodes of 200 steps, 60 done" in capsys.readouterr().out
    for path in maze.parent.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_two_processes_make_one_dataset(tmp_path):
    """The second waits, and finds it there."""
    command = [sys.executable, "-m", "common.collect", MAZE, "--transitions", "2000"]
    command += ["--workers", "1", "--dataset-dir", str(tmp_path)]
    start = partial(subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    both = [start(command, cwd=ROOT) for _ in range(2)]
    texts = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    assert sum("already there" in text for text in texts) == 1
    assert sum("Wrote" in text for text in texts) == 1


def test_finished_files_are_never_overwritten(maze, tmp_path, capsys):
    before = maze.stat().st_mtime_ns
    assert collect(MAZE, SIZE, maze.parent, seed=3) == maze
    assert "already there" in capsys.readouterr().out
    assert main([MAZE, "--transitions", str(SIZE), "--dataset-dir", str(maze.parent)]) == 2
    message = capsys.readouterr().err
    assert "seed: 3, now 0" in message and message.count("\n") == 1
    assert maze.stat().st_mtime_ns == before
    downloaded = tmp_path / f"{MAZE}-v0.npz"
    downloaded.write_bytes(b"")
    with pytest.raises(CollectError, match="other settings"):
        collect(MAZE, SIZE, tmp_path)
    assert downloaded.read_bytes() == b""


def test_maze_loads_and_reaches_the_goal(maze):
    env, train, val = ogbench.make_env_and_datasets(
        f"{MAZE}-singletask-task1-v0", dataset_dir=str(maze.parent)
    )
    assert (
        len(train["rewards"]) == len(train["masks"]) == SIZE and len(val["rewards"]) == SIZE // 10
    )
    assert train["observations"].shape[1:] == env.observation_space.shape
    assert 0 < np.mean(train["rewards"] == 0) < 0.2  # the goal of the task was reached
    assert set(np.unique(train["masks"])) == {0, 1}


@pytest.mark.parametrize(
    "dataset",
    ["pointmaze-teleport-navigate", "antmaze-medium-navigate", "cube-double-noisy", "scene-noisy"]
    + ["puzzle-3x3-play"],
)
def test_an_episode_depends_on_its_seed_alone(dataset):
    used = make_collection_env(dataset, 121)
    others = [collect_episode(used, dataset, 0, episode) for episode in (0, 1)]
    again = collect_episode(used, dataset, 0, 2)
    fresh = collect_episode(make_collection_env(dataset, 121), dataset, 0, 2)
    assert equal(again, fresh)
    others.append(collect_episode(used, dataset, 1, 2))
    assert all(not np.array_equal(again["actions"], other["actions"]) for other in others)


def test_the_scene_forgets_earlier_targets():
    # In this episode a Markov oracle acts once on a target set before the episode began.
    env = make_collection_env("scene-noisy", 121)
    runs = []
    for earlier in (0.0, 0.5):
        env.reset()
        env.unwrapped.model.site("drawer_handle_center_target").pos[1] = earlier
        env.unwrapped.model.site("window_handle_center_target").pos[0] = earlier
        runs.append(collect_episode(env, "scene-noisy", 0, 6))
    assert equal(*runs)


def test_navigate_visits_several_goals():
    dataset = "pointmaze-medium-navigate"
    arrays = collect_episode(make_collection_env(dataset), dataset, 0, 0)
    cells = {tuple(cell) for cell in np.round(arrays["observations"] / 4).astype(int)}
    assert len(arrays["terminals"]) == 1001 and len(cells) > 12


def test_the_ant_walks(tmp_path):
    """Its stitch episodes are four cells long; a file of another expert is not continued."""
    path = collect("antmaze-medium-stitch", 800, tmp_path, workers=2)
    arrays = read(path)
    check_format(arrays, 4 * 201, ob_dim=29, act_dim=8)
    assert np.array_equal(arrays["observations"][:, :15], arrays["qpos"])
    moved = np.linalg.norm(np.diff(arrays["qpos"][:, :2], axis=0), axis=1)
    inside = ~arrays["terminals"][:-1]
    speed = 10 * moved[inside].mean()  # [m/s], of a step of 0.1 s
    assert moved[inside].max() < 1 and speed > 1
    env, train, _ = ogbench.make_env_and_datasets(
        "antmaze-medium-stitch-singletask-task1-v0", dataset_dir=str(tmp_path)
    )
    assert train["observations"].shape == (800, *env.observation_space.shape)
    settings = path.with_name("antmaze-medium-stitch-v0.json")
    settings.write_text(settings.read_text().replace('"expert": ', '"expert": 1'))
    with pytest.raises(CollectError, match="expert"):
        collect("antmaze-medium-stitch", 800, tmp_path)


def test_cube_moves_and_loads(cube):
    arrays = read(cube)
    check_format(arrays, 1001, ob_dim=28, act_dim=5)
    block = arrays["qpos"][:, 14:17]
    assert block[:, 2].max() > 0.08  # lifted
    assert np.linalg.norm(block[:, :2] - block[0, :2], axis=1).max() > 0.1  # carried elsewhere
    _, train, val = ogbench.make_env_and_datasets(
        "cube-single-play-singletask-task1-v0", dataset_dir=str(cube.parent)
    )
    assert len(train["rewards"]) == len(val["masks"]) == 1000
    assert not np.array_equal(train["actions"], val["actions"])


def test_puzzle_has_button_states_and_loads(tmp_path):
    dataset = "puzzle-3x3-noisy"
    arrays = read(collect(dataset, 1, tmp_path, workers=2))
    check_format(arrays, 1001, ob_dim=55, act_dim=5, num_buttons=9)
    assert np.any(np.diff(arrays["button_states"], axis=0), axis=1).sum() > 3  # presses
    _, train, _ = ogbench.make_env_and_datasets(
        f"{dataset}-singletask-task1-v0", dataset_dir=str(tmp_path)
    )
    assert len(np.unique(train["rewards"])) > 1


def test_scene_whose_block_left_the_table_is_redone(monkeypatch):
    runs = []

    class Env:
        def step(self, action):
            y = 0.3 if len(runs) == 1 else 0.0
            info = {"prev_qpos": np.full(25, y), "prev_qvel": np.zeros(24)}
            return np.zeros(40), 0.0, False, True, info

    def policy(env, dataset, env_seed):
        runs.append(env_seed)
        while True:
            yield np.zeros(40), np.zeros(5)

    monkeypatch.setattr(episodes_module, "manipulation_policy", policy)
    arrays = collect_episode(Env(), "scene-play", 0, 0)
    assert len(set(runs)) == 2 and not arrays["qpos"].any()


# --- OGBench's settings --------------------------------------------------------------------------

SIZES = {  # episodes for training, rows of each
    "pointmaze-medium-navigate": (1000, 1001),
    "pointmaze-giant-navigate": (500, 2001),
    "pointmaze-teleport-stitch": (5000, 201),
    "antmaze-large-navigate": (1000, 1001),
    "antmaze-giant-navigate": (500, 2001),
    "antmaze-giant-stitch": (5000, 201),
    "cube-single-play": (1000, 1001),
    "cube-double-noisy": (1000, 1001),
    "cube-triple-play": (3000, 1001),
    "cube-quadruple-noisy": (5000, 1001),
    "scene-play": (1000, 1001),
    "puzzle-3x3-noisy": (1000, 1001),
    "puzzle-4x4-play": (1000, 1001),
    "puzzle-4x5-noisy": (3000, 1001),
    "puzzle-4x6-play": (5000, 1001),
}


def test_the_official_sizes(monkeypatch):
    """Episodes do not end at a goal; environments of manipulation are those for collecting."""
    monkeypatch.setattr(episodes_module.gymnasium, "make", lambda name, **flags: (name, flags))
    for name, (episodes, rows) in SIZES.items():
        assert OFFICIAL[name] == (episodes, rows), name
        flags = dict(terminate_at_goal=False, max_episode_steps=rows)
        flags |= {} if "maze" in name else dict(mode="data_collection")
        assert make_collection_env(name) == (f"{name.rsplit('-', 1)[0]}-v0", flags)
    assert len(OFFICIAL) == 2 * 9 + 2 * 8


@pytest.mark.parametrize("ant, noise", [(False, 0.5), (True, 0.2)])
def test_noise_in_mazes(monkeypatch, ant, noise):
    """Normal, on top of the direction or of what the ant's expert does, clipped to the box."""
    monkeypatch.setattr(experts, "heading", lambda *_: np.zeros(2))
    monkeypatch.setattr(experts, "walk", lambda *_: np.zeros(8))
    dataset = f"{'ant' if ant else 'point'}maze-medium-stitch"
    np.random.seed(0)
    policy = experts.maze_policy(make_collection_env(dataset), dataset, 0)
    ob, _ = next(policy)
    drawn = np.array([policy.send((ob, {"success": False}))[1] for _ in range(3000)])
    assert drawn.shape == (3000, 8 if ant else 2) and np.abs(drawn).max() <= 1
    inside = drawn[np.abs(drawn) < 1]
    limits = -1 / noise, 1 / noise
    assert scipy.stats.kstest(inside, "truncnorm", (*limits, 0, noise)).pvalue > 1e-3


def distances(maze, start):
    """Cell -> number of steps from `start` through free cells."""
    found, front = {start: 0}, [start]
    for i, j in front:  # grows
        for cell in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            if maze[cell] == 0 and cell not in found:
                found[cell] = found[i, j] + 1
                front.append(cell)
    return found


@pytest.mark.parametrize("kind", ["navigate", "stitch"])
def test_goals_in_mazes(kind):
    """navigate: another one at each success, a cell that is no straight hallway, all of them in
    turn. stitch: four cells away from the start, and it stays."""
    dataset = f"pointmaze-medium-{kind}"
    env, cells, starts = make_collection_env(dataset), set(), set()
    maze, walls = env.unwrapped, env.unwrapped.maze_map
    cell = lambda xy: tuple(int(x) for x in maze.xy_to_ij(xy))
    np.random.seed(0)
    for seed in range(2 if kind == "navigate" else 60):
        policy = experts.maze_policy(env, dataset, seed)
        ob, _ = next(policy)
        start, goal = cell(ob[:2]), cell(maze.cur_goal_xy)
        starts.add(start)
        assert kind == "navigate" or distances(walls, start)[goal] == 4
        for _ in range(150 if kind == "navigate" else 3):
            before = maze.cur_goal_xy
            policy.send((ob, {"success": False}))
            assert np.array_equal(maze.cur_goal_xy, before)
            policy.send((ob, {"success": True}))
            cells.add(cell(maze.cur_goal_xy))
            assert kind == "navigate" or np.array_equal(maze.cur_goal_xy, before)
    if kind == "stitch":
        assert len(starts) > 15
        return
    free = {(int(i), int(j)) for i, j in np.argwhere(walls == 0)}
    ways = lambda i, j: [x in free for x in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1))]
    straight = [True, True, False, False], [False, False, True, True]
    assert cells == {x for x in free if ways(*x) not in straight}


STACK = {  # of cubes, at new targets: drawn for each episode in this interval
    "cube-single": (0, 0), "cube-double": (0, 0.25), "cube-triple": (0.05, 0.35),
    "cube-quadruple": (0.1, 0.5), "scene": (0.5, 0.5), "puzzle-3x3": (0.5, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["play", "noisy"])
@pytest.mark.parametrize("domain", STACK)
def test_noise_and_targets_of_the_arm(monkeypatch, domain, kind):
    """Plans without noise of ours, or Markov oracles with uniform actions among theirs and noise
    whose scale is the episode's; oracles with OGBench's defaults, a gripper that stays closed in
    puzzles; the probability of stacking."""
    made, style = [], "plan" if kind == "play" else "markov"

    def oracle(name):
        def make(**flags):
            acts = dict(select_action=lambda ob, info: np.zeros(5), reset=lambda ob, info: None)
            made.append(SimpleNamespace(name=name, flags=flags, done=True, **acts))
            return made[-1]

        return make

    for task in ("cube", "button", "drawer", "window"):
        name = f"{task.title()}{style.title()}Oracle"
        module = importlib.import_module(f"ogbench.manipspace.oracles.{style}.{task}_{style}")
        base = inspect.signature(getattr(module, name).__mro__[1].__init__).parameters
        defaults = dict(noise=0.1, noise_smoothing=0.5) if kind == "play" else dict(min_norm=0.4)
        assert {key: base[key].default for key in defaults} == defaults
        monkeypatch.setattr(module, name, oracle(name))
    env, info = mock.MagicMock(), {"privileged/target_task": "cube"}
    env.reset.return_value = env.unwrapped.set_new_target.return_value = None, info
    drawn, stack = [], []
    np.random.seed(0)
    for seed in range(100):
        policy = experts.manipulation_policy(env, f"{domain}-{kind}", seed)
        own = [next(policy)[1], *(policy.send((None, info))[1] for _ in range(2))]
        assert env.reset.call_args.kwargs == dict(seed=seed)
        stack.append([call[1]["p_stack"] for call in env.unwrapped.set_new_target.call_args_list])
        env.unwrapped.set_new_target.reset_mock()
        for agent in made:
            agent.done = False
        drawn.append([*own, *(policy.send((None, info))[1] for _ in range(97))])
    for agent in made:
        grip = dict(gripper_always_closed=domain == "puzzle-3x3") if "Button" in agent.name else {}
        assert agent.flags == dict(env=env) | grip
    stack, drawn, (low, high) = np.array(stack), np.array(drawn), STACK[domain]
    assert stack.shape == (100, 2) and (stack == stack[:, :1]).all()
    assert low <= stack.min() and stack.max() <= high
    assert low == high or scipy.stats.kstest(stack[:, 0], "uniform", (low, high - low))[1] > 1e-3
    if kind == "play":
        assert not drawn.any()
        return
    random = np.abs(drawn[..., :3]).max(-1) > 0.5  # of which 7 in 8 uniform ones are
    rate = 0.2 if domain == "puzzle-3x3" else 0.1
    assert np.abs(drawn).max() <= 1 and random.mean() == pytest.approx(7 / 8 * rate, rel=0.1)
    assert scipy.stats.kstest(drawn[random][:, 4], "uniform", (-1, 2))[1] > 1e-3
    drawn[random] = np.nan
    half = np.nanmedian(np.abs(drawn), 1) / 0.6745  # deviations of an episode's normal numbers
    assert scipy.stats.kstest(half[:, :3].mean(1), "uniform", (0, 0.1))[1] > 1e-3
    ratios = np.median(half[half[:, 4] < 0.8] / half[half[:, 4] < 0.8, :3].mean(1)[:, None], 0)
    np.testing.assert_allclose(ratios, [1, 1, 1, 3, 10], rtol=0.1)


@pytest.mark.parametrize(
    "args, message",
    [
        (["pointmase-medium-navigate"], "nearest names: pointmaze-medium-navigate"),
        (["antmaze-medium-explore-v0"], "must be downloaded"),
        (["antmaze-medium"], "nearest names: antmaze-medium-"),
        (["humanoidmaze-large-stitch"], "must be downloaded"),
        ([MAZE, "--transitions", "0"], "--transitions must be at least 1"),
        ([MAZE, "--workers", "0"], "--workers must be at least 1"),
        ([MAZE, "--seed", "-1"], "--seed must be at least 0"),
    ],
)
def test_bad_requests_give_one_line(args, message, tmp_path, capsys):
    assert main([*args, "--dataset-dir", str(tmp_path / "data")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_ctrl_c_stops_quietly(tmp_path):
    command = [sys.executable, "-m", "common.collect", "cube-single-play", "--workers", "2"]
    process = subprocess.Popen(
        [*command, "--transitions", "20000", "--dataset-dir", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell that runs the tests in the background has its children ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert "Collecting" in process.stdout.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(3)  # let the workers start
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=20)  # returns once the workers have gone, too
    assert process.returncode == 130
    assert error == "Stopped; run the same command again to continue.\n"
