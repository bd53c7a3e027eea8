"""Tests and fixtures of real runs that several files import, and so have for their own scripts.
Fixtures `script`, `module` and `args` are those of the importing file, or of tests/conftest.py."""

import dataclasses
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

from common.dataset_files import read
from common.environments import TRAINING, make_env, resolve, seed_of
from common.errors import UserError
from tests.helpers.flags import ENV, TINY
from tests.helpers.runs import (
    assert_same,
    checkpoint,
    clean,
    command,
    contents,
    copy_out,
    fake_episodes,
    flags_of,
    rows,
    run_folder,
    start,
)

every_script = pytest.mark.every_script


def pytest_generate_tests(metafunc):
    """Parametrizes by script, in every file that imports this hook."""
    if "script" in metafunc.fixturenames:
        marked = metafunc.definition.get_closest_marker("every_script")
        scripts = metafunc.module.EVERY if marked else metafunc.module.FULLY
        metafunc.parametrize("script", scripts, indirect=True, scope="module")


@pytest.fixture(scope="module")
def reference(script, module, args, tmp_path_factory):
    """The run folder of an uninterrupted run, and the numbers of compiled programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("reference"))
        module.train_chunk.clear_cache()
        module.act.clear_cache()
        module.main(args)
        return run_folder(script), (module.train_chunk._cache_size(), module.act._cache_size())


@every_script
def test_files(reference):
    """Configuration, both tables, checkpoint, and the paths of the last evaluation."""
    names = {"config.json", "script.py", "train.csv", "eval.csv"}
    names |= {"checkpoint.msgpack", "rollouts.npz"}
    assert names <= set(os.listdir(reference[0]))
    flags = flags_of(reference[0])
    assert flags["batch_size"] == TINY["batch_size"] and flags["env"] == ENV
    assert checkpoint(reference[0])["step"] == 24


def test_pictures(reference):
    """curve.png, and rollouts.png with a panel per task, are pictures that are not blank."""
    for name, least in (("curve", 1000), ("rollouts", 600)):
        picture = plt.imread(f"{reference[0]}/{name}.png")[..., :3]
        assert picture.shape[1] > least and len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


def test_episodes(reference):
    """Every agent played exactly `eval_episodes` episodes; success and length are their means."""
    with np.load(f"{reference[0]}/rollouts.npz") as file:
        lengths = np.array([len(file[f"path{i}"]) for i in range(4)]).reshape(2, 2)
        assert "path4" not in file and file["success"].shape == (2, TINY["eval_episodes"])
        success = file["success"].mean(1)
    last = rows(reference[0], "eval")[-2:]
    np.testing.assert_allclose([float(x["length"]) for x in last], lengths.mean(1))
    np.testing.assert_allclose([float(x["success"]) for x in last], success)


def test_repeats_bit_by_bit(script, module, args, reference, here):
    """The same command in another folder: the same tables and checkpoint."""
    module.main(args)
    assert_same(run_folder(script), reference[0])


def test_workers_and_slots_change_nothing(script, module, args, reference, here):
    """Two workers, and one evaluation environment per agent in place of two: the same scores."""
    module.main(dataclasses.replace(args, workers=2, eval_slots=1))
    assert rows(run_folder(script), "train") == rows(reference[0], "train")
    assert rows(run_folder(script), "eval") == rows(reference[0], "eval")


def test_killed_and_continued(script, args, reference, here):
    """SIGKILL at random moments, early and late, and the same command again."""
    generator, line = random.Random(script), command(script, args)
    for sign, longest in (("train.csv", 0.1), ("checkpoint.msgpack", 0.5)):
        path = Path(run_folder(script)) / sign
        written = lambda: path.stat().st_mtime_ns if path.exists() else None
        before = written()  # a checkpoint may be there from the first start
        with open("output.txt", "a") as output:
            process = subprocess.Popen(line, stdout=output, stderr=output)
        while written() == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(delay := generator.uniform(0, longest))
        process.kill()
        print(f"killed {delay:.3f} s after {sign} was written: {process.wait()}")
        complete = before and process.returncode == 0  # all but done at the first kill: a fast one
        assert process.returncode == -9 or complete, open("output.txt").read()
    subprocess.run(line, check=True, capture_output=True)
    assert_same(run_folder(script), reference[0])


def test_finished_run_stays(script, module, args, reference, here):
    """The command of a finished run does nothing, and `main` returns the rows of its eval.csv."""
    shutil.copytree(reference[0], run_folder(script))
    before = contents(run_folder(script))
    found = module.main(args)
    assert contents(run_folder(script)) == before == contents(reference[0])
    for row in found:
        assert float(row.pop("seconds")) >= 0
    assert found == rows(reference[0], "eval")


def test_eval_only(script, module, args, reference, here):
    """--eval-only plays the episodes of the last evaluation again, into a table of its own."""
    shutil.copytree(reference[0], run_folder(script))
    before = contents(reference[0])
    module.main(dataclasses.replace(args, eval_only=True))
    after = contents(run_folder(script))
    assert rows(run_folder(script), "eval_only") == rows(reference[0], "eval")[-2:]
    assert after.keys() - before.keys() == {"eval_only.csv"}
    with np.load(f"{run_folder(script)}/rollouts.npz") as file:
        again = {name: file[name] for name in file}
    with np.load(f"{reference[0]}/rollouts.npz") as file:
        assert again.keys() == set(file)
        for name, x in again.items():
            np.testing.assert_array_equal(x, file[name])
    for name in before.keys() - {"rollouts.npz"}:  # its zip directory has the time
        assert after[name] == before[name], name
    module.main(dataclasses.replace(args, eval_only=True, eval_episodes=3))
    with np.load(f"{run_folder(script)}/rollouts.npz") as file:
        assert len([name for name in file if name.startswith("path")]) == 2 * 3
        assert file["success"].shape == (2, 3)
    for name in before.keys() - {"rollouts.npz"}:
        assert contents(run_folder(script))[name] == before[name], name


def test_eval_only_needs_a_checkpoint(module, args, here):
    with pytest.raises(UserError, match="no checkpoint"):
        module.main(dataclasses.replace(args, eval_only=True))


def test_other_flags_are_refused(script, module, args, reference, here):
    """Another value in the same folder: a message that names the flag, and nothing changes."""
    shutil.copytree(reference[0], run_folder(script))
    with pytest.raises(UserError, match=f"lr: {args.lr} there, 0.5 now"):
        module.main(dataclasses.replace(args, lr=0.5))
    assert contents(run_folder(script)) == contents(reference[0])


@every_script
def test_help(script, module, tmp_path, tmp_path_factory):
    """--help lists every flag and touches nothing. The script and common/ are all that it needs."""
    root = tmp_path_factory.mktemp("copy")
    copy_out(script, root)
    line = [sys.executable, *start(script, root), "--help"]
    answer = subprocess.run(line, cwd=tmp_path, env=clean(tmp_path), capture_output=True, text=True)
    assert answer.returncode == 0 and not answer.stderr
    for field in dataclasses.fields(module.Args):
        flag = "--" + field.name.replace("_", "-")
        assert (flag in answer.stdout) == (field.name != "action_size")
    assert not list(tmp_path.rglob("*"))


# --- what the loop asks for ----------------------------------------------------------------------

AGENTS = [(3, 5), (3, 6), (1, 5), (1, 6)]  # (task, seed) of --tasks 3 1 --seed 5 --num-seeds 2


FOUR = dict(tasks=(3, 1), seed=5, num_seeds=2, eval_episodes=3, eval_slots=3)


SHARD = f"{ENV}-navigate-v0-00{{}}.npz"


def three_shards(folder):
    """Files with their number in all observations, and the goals of task 1 and 3 in other rows."""
    mazes = [make_env(f"{ENV}-singletask-task{task}-v0") for task in (1, 3)]
    goals = [(maze.reset(), maze.unwrapped.cur_goal_xy)[1] for maze in mazes]
    for i in range(3):
        qpos = np.zeros((40, 2), np.float32)
        qpos[2 + i :: 5], qpos[3 + i :: 7] = goals
        arrays = dict(qpos=qpos, observations=np.full((40, 2), i, np.float32))
        arrays |= dict(actions=np.zeros((40, 2), np.float32), terminals=np.arange(40) == 39)
        np.savez(folder / SHARD.format(i), **arrays)


class Pool:
    """In place of `EnvPool`: writes down what is asked of it, and answers with random numbers."""

    def __init__(self, names, slots, workers, normalization):
        assert normalization == {}
        self.shape = len(names), slots
        self.made.append((names, slots))
        n = np.arange(len(names) * slots).reshape(self.shape)
        self.observations = np.stack([n, n], -1).astype(np.float32)
        self.seeds, self.ages = np.uint32(10 * n), np.int32(100 * n)

    def need_actions(self):
        return True

    def random_actions(self, action_size):
        return "random"

    def set_actions(self, plans):
        """Every slot gets the actions of its agent, by its own state, seed and age."""
        if isinstance(plans, str):  # RLPD's random actions
            return
        agents, slots = self.shape
        numbers = 111 * np.arange(agents * slots).reshape(self.shape)
        numbers += 1000 * np.arange(agents)[:, None]
        np.testing.assert_array_equal(plans, numbers[..., None, None] * np.ones((5, 2)))

    def reset(self, seeds, where=None):
        where = np.ones(self.shape, bool) if where is None else where
        for agent, slot in np.argwhere(where):
            assert slot == 0
            self.started.append((len(self.taken), agent, seeds[agent, slot]))

    def step(self):
        rng = np.random.default_rng(len(self.taken))
        shapes = dict.fromkeys(("observations", "actions", "next_observations"), (*self.shape, 2))
        shapes |= dict(masks=self.shape, success=self.shape)
        row = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        row["rewards"] = -rng.integers(0, 4, self.shape)
        row["terminals"] = rng.uniform(size=self.shape) < 0.3
        self.taken.append({name: np.float32(x) for name, x in row.items()})
        return dict(self.taken[-1])

    def save(self):
        return dict(seeds=np.zeros(4))


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "sparse"])
def loop(request, script, module, args, tmp_path_factory):
    """A run of four agents, whose shards swap every four updates, with all but the loop replaced:
    the k-th update of agent i has the metric 1000 i + k, and does nothing but count. -> arguments,
    folder, the states before each call of `train_chunk` with updates, these calls, the class of the
    pools, and the evaluations."""
    states, calls, N = [], [], len(AGENTS)
    count = lambda: sum(call["updates"] for call in calls)

    def train_step(args, data, state, replay, task_row):
        return state, dict(number=jnp.zeros(()), updates=jnp.zeros(()))

    def train_chunk(args, state, metrics, data, replay, task_rows, updates):
        if updates == 0:
            return state, metrics
        numbers = 1000 * np.arange(N)[:, None] + count() + 1 + np.arange(updates)
        states.append(state)
        replay = jax.tree.map(np.array, replay)  # a copy, because the run overwrites it
        calls.append(dict(data=data, replay=replay, task_rows=task_rows, updates=updates))
        new = dict(number=numbers.sum(1), updates=np.full(N, updates))
        metrics = {name: metrics[name] + x for name, x in new.items()}
        return state.replace(key=state.key + np.uint32(updates)), metrics

    def act(args, state, observations, seeds, ages):
        if calls:  # with the latest state
            assert (state.key - states[0].key == count()).all()
        numbers = observations[..., 0] + seeds + ages + 1000 * np.arange(N)[:, None]
        return numbers[..., None, None] * np.ones((5, 2))

    folder = tmp_path_factory.mktemp("loop")
    three_shards(folder)
    args = dataclasses.replace(args, dataset_dir=str(folder), sparse=request.param, **FOUR)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pool = type("OwnPool", (Pool,), dict(made=[], started=[], taken=[]))
        episodes = fake_episodes()
        new = dict(train_step=train_step, train_chunk=train_chunk, act=act)
        new |= dict(EnvPool=pool, Episodes=episodes)
        for name, value in new.items():
            patch.setattr(module, name, value)
        patch.setattr("common.datasets.SWAP_INTERVAL", 4)
        patch.setattr("common.run.draw_pictures", lambda folder: None)
        module.main(args)
        return args, run_folder(script), states, calls, pool, episodes.played


def steps_of(args):
    """(step, environment step or 0) of every update, in order."""
    offline = getattr(args, "offline_steps", 0)
    online = range(args.start_training, args.online_steps + 1)
    return [(i, 0) for i in range(1, offline + 1)] + [(offline + i, i) for i in online]


def test_agents_start_apart(loop):
    """Networks and random numbers of any two agents differ, of another task or another seed."""
    first = loop[2][0]
    leaves = jax.tree_util.tree_leaves_with_path(first.params)
    kernels = [x for path, x in leaves if "kernel" in jax.tree_util.keystr(path)]
    assert len(kernels) > 5
    for x in [first.key, *kernels]:
        assert len(np.unique(np.reshape(x, (len(AGENTS), -1))[:, 0])) == len(AGENTS)


def test_every_update_has_its_data(loop):
    """The shard of its time, counted on from the offline phase, and the rewards of the agent's own
    task; the replay holds what was stepped so far, with rewards as --sparse asks for."""
    args, _, _, calls, pool, _ = loop
    files, source, updates = Path(args.dataset_dir), resolve(ENV), iter(steps_of(args))
    labelled = lambda i, task: read(files / SHARD.format(i), source, (task,), clip=False)
    own = [[labelled(i, task) for task, _ in AGENTS] for i in range(3)]
    swaps, now = getattr(args, "offline_steps", 0) // 4, 0
    for call in calls:
        steps = [next(updates) for _ in range(call["updates"])]
        now = steps[-1][1]
        times = [step // 4 if not online else swaps + online // 4 for step, online in steps]
        number = int(call["data"].observations[0, 0])
        assert {x % 3 for x in times} <= {number}
        for row, data in zip(call["task_rows"], own[number], strict=True):
            np.testing.assert_array_equal(call["data"].rewards[row], data.rewards[0])
            np.testing.assert_array_equal(call["data"].masks[row], data.masks[0])
        assert call["replay"].size.tolist() == [now] * len(AGENTS)
        for name in pool.taken[0].keys() - {"success"} if now else ():
            taken = np.concatenate([row[name] for row in pool.taken[:now]], 1)
            if name == "rewards" and args.sparse:
                taken = np.where(taken < 0, -1, 0)
            np.testing.assert_array_equal(getattr(call["replay"], name)[:, :now], taken)
    assert next(updates, None) is None and now == len(pool.taken) == args.online_steps
    assert not np.array_equal(own[0][0].rewards, own[0][2].rewards)


def test_evaluations_have_their_seeds(loop):
    """Those of (seed, task, step, episode), offline and online; scores are means over an agent's
    episodes."""
    args, folder, _, _, _, played = loop
    lines = rows(folder, "eval")
    steps = sorted({int(line["step"]) for line in lines})
    assert len(played) == len(steps) >= 3
    for i, (step, (seeds, out)) in enumerate(zip(steps, played)):
        assert seeds == [[seed_of(s, t, step, e) for e in range(3)] for t, s in AGENTS]
        for j, line in enumerate(lines[4 * i : 4 * i + 4]):
            assert (int(line["task"]), int(line["seed"]), int(line["step"])) == (*AGENTS[j], step)
            for name, x in out.items():
                assert float(line[name]) == pytest.approx(x[j].sum() / 3)


def test_environments_are_those_of_the_agents(loop):
    """By name, for evaluations and for training, where each episode has a seed of its own: of
    (seed, task, 0), then of the step at which the one before ended."""
    args, _, _, _, pool, _ = loop
    limit = f'{{"max_episode_steps": {args.max_episode_steps}}}'
    names = [f"{ENV}-singletask-task{task}-v0?{limit}" for task, _ in AGENTS]
    assert pool.made == [(names, 3), (names, 1)]
    expected = [(0, i, seed_of(seed, task, 0)) for i, (task, seed) in enumerate(AGENTS)]
    for step, row in enumerate(pool.taken, 1):
        over = [i for i in range(len(AGENTS)) if row["terminals"][i, 0]]
        expected += [(step, i, seed_of(*AGENTS[i][::-1], step, TRAINING)) for i in over]
    assert pool.started == expected and len(expected) > 20


def test_rows_are_means_over_updates(loop):
    """Over those since the last row, of each agent by itself."""
    args, folder, *_ = loop
    steps, last = np.array([step for step, _ in steps_of(args)]), 0
    for i, line in enumerate(rows(folder, "train")):
        step, agent = int(line["step"]), i % len(AGENTS)
        since = np.flatnonzero((steps > last) & (steps <= step)) + 1
        assert float(line["number"]) == pytest.approx(1000 * agent + since.mean())
        last = step if agent == 3 else last
    assert last == steps[-1]
