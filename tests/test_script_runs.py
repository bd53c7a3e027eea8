"""Real runs of every offline script, of seconds each: what they leave, that they repeat bit by bit,
and that stops, kills and continuations change nothing. All are compared with one uninterrupted run
per script, whose evaluations and checkpoints are at steps 8 and 10 (offline), 16 (in an episode)
and 24.

What depends on a script's own state and acting is tested for all of them (`every_script`), what
only the shared blocks decide for two.
"""

import csv
import dataclasses
import gc
import importlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

from common.data import Shards, read
from common.envs import TRAINING, make_env, resolve, seed_of
from common.run import Run, read_checkpoint
from tests import shared_blocks
from tests.conftest import ENV, ROOT, TINY, tiny_args

FULLY = ["meam", "qam"]  # paths without .py
APART = ["baselines/rlpd"]  # with shared blocks of its own, tested in its own file
OFFLINE = shared_blocks.named("offline")
EVERY = FULLY + [name for name in OFFLINE if name not in FULLY + APART]
pytestmark = pytest.mark.usefixtures("quick_compile")
every_script = pytest.mark.every_script


class Stop(Exception):
    """Ends a run from within."""


def pytest_generate_tests(metafunc):  # of a file that has or imports it
    if "script" in metafunc.fixturenames:
        marked = metafunc.definition.get_closest_marker("every_script")
        scripts = metafunc.module.EVERY if marked else metafunc.module.FULLY
        metafunc.parametrize("script", scripts, indirect=True, scope="module")


@pytest.fixture(scope="module")
def script(request):
    return request.param


@pytest.fixture(scope="module")
def module(script):
    return importlib.import_module(script.replace("/", "."))


@pytest.fixture(scope="module")
def args(module, dataset_dir):
    return tiny_args(module, dataset_dir)


@pytest.fixture(scope="module")
def reference(script, module, args, tmp_path_factory):
    """Folder that an uninterrupted run was started in, and the numbers of compiled programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("reference"))
        module.train_chunk.clear_cache(), module.act.clear_cache()
        module.main(args)
        return run_folder(script), (module.train_chunk._cache_size(), module.act._cache_size())


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder, which relative run folders are in, and no pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Run, "finish", lambda *_: None)
    return tmp_path


def run_folder(script):
    env = ENV if script in OFFLINE else "multigoal"
    return os.path.abspath(f"runs/{os.path.basename(script)}/{env}/default")


def rows(folder, table):
    """Rows of <table>.csv as written, without the column `seconds`."""
    with open(f"{folder}/{table}.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    return [{name: x for name, x in line.items() if name != "seconds"} for line in lines]


def checkpoint(folder):
    """With the replay put together from its parts, slot by slot: {} where it is empty."""
    content = read_checkpoint(Path(folder) / "checkpoint.msgpack")
    if "replay" in content["tree"]:
        slots, *ends = content["tree"]["replay"].tolist()
        parts = [read_checkpoint(Path(folder) / f"replay-{end}.msgpack") for end in ends]
        content["tree"]["replay"] = replay = {}
        for end, part in zip(ends, parts):
            for name, x in part.items():
                shape = x.shape[0], min(slots, ends[-1]), *x.shape[2:]
                whole = replay.setdefault(name, np.full(shape, np.nan, x.dtype))
                for i in range(x.shape[1]):
                    whole[:, (end - x.shape[1] + i) % slots] = x[:, i]
            replay["size"] = np.full(len(x), end)
    return {name: x for name, x in content.items() if name != "seconds"}


def contents(folder):
    """Name -> bytes of all files in a run folder."""
    names = sorted(name for name in os.listdir(folder) if name != ".lock")
    return {name: open(f"{folder}/{name}", "rb").read() for name in names}


def assert_same(folder, other):
    """Two runs left the same, bit by bit."""
    for table in ("train", "eval"):
        assert rows(folder, table) == rows(other, table)
    one, two = checkpoint(folder), checkpoint(other)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
        assert np.asarray(x).dtype == np.asarray(y).dtype
        np.testing.assert_array_equal(x, y)


def start(script, root):
    """How a script is started: `python qam.py`, but `python -m baselines.fql` (in `root`)."""
    return ["-m", script.replace("/", ".")] if "/" in script else [f"{root}/{script}.py"]


def command(script, args, *more, root=ROOT):
    """The command line of a run with these arguments."""
    line = [sys.executable, *start(script, root)]
    for field in dataclasses.fields(args):
        value, flag = getattr(args, field.name), "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            line.append(flag if value else flag.replace("--", "--no-", 1))
        elif field.name != "action_size":
            line += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return [*line, *more]


def stop_at(monkeypatch, method, table, step):
    """Lets `Run.log` or `Run.save` raise after its work at this step."""
    original = getattr(Run, method)

    def stopping(run, *arguments):
        original(run, *arguments)
        if arguments[: len(table)] == table and arguments[len(table)] >= step:
            raise Stop

    monkeypatch.setattr(Run, method, stopping)


def run_until_stop(module, args):
    """Runs; a Stop from within leaves nothing behind but the run folder."""
    try:
        module.main(args)
        raise AssertionError("the run was not stopped")
    except Stop:
        pass
    gc.collect()  # the folder's lock and the workers


# --- what a run leaves ---------------------------------------------------------------------------


@every_script
def test_files(reference):
    """Configuration, both tables, checkpoint, and the paths of the last evaluation."""
    names = {"config.json", "train.csv", "eval.csv", "checkpoint.msgpack", "rollouts.npz"}
    assert names <= set(os.listdir(reference[0]))
    with open(f"{reference[0]}/config.json") as file:
        flags = json.load(file)["flags"]
    assert flags["batch_size"] == TINY["batch_size"] and flags["env"] == ENV
    assert checkpoint(reference[0])["step"] == 24


def test_pictures(reference):
    """curve.png, and rollouts.png with a panel per task, are pictures that are not blank."""
    for name, least in (("curve", 1000), ("rollouts", 600)):
        picture = plt.imread(f"{reference[0]}/{name}.png")[..., :3]
        assert picture.shape[1] > least and len(np.unique(picture.reshape(-1, 3), axis=0)) > 20


@every_script
def test_tables(reference):
    """A row per agent at every logged step, in order, all numbers finite. (Row 10 is the offline
    phase's last; there is no row 12, for the first online steps are not followed by an update.)"""
    steps = dict(train=[3, 6, 8, 9, 10, 15, 16, 18, 21, 24], eval=[8, 10, 16, 24])
    for table, expected in steps.items():
        lines = rows(reference[0], table)
        assert [int(x["step"]) for x in lines] == [step for step in expected for _ in range(2)]
        assert [int(x["task"]) for x in lines] == [1, 2] * len(expected)
        assert np.isfinite([[float(x) for x in line.values()] for line in lines]).all()


def test_episodes(reference):
    """Every agent played exactly `eval_episodes` episodes; success and length are their means."""
    with np.load(f"{reference[0]}/rollouts.npz") as file:
        lengths = np.array([len(file[f"path{i}"]) for i in range(4)]).reshape(2, 2)
        assert "path4" not in file and file["success"].shape == (2, TINY["eval_episodes"])
        success = file["success"].mean(1)
    last = rows(reference[0], "eval")[-2:]
    np.testing.assert_allclose([float(x["length"]) for x in last], lengths.mean(1))
    np.testing.assert_allclose([float(x["success"]) for x in last], success)


def test_replay_is_saved_whole(reference):
    """The checkpoint holds every online transition, and none of the empty slots."""
    replay = checkpoint(reference[0])["tree"]["replay"]
    assert replay["rewards"].shape == (2, 14) and replay["size"].tolist() == [14, 14]
    online = replay["observations"]
    assert not np.array_equal(online[0], online[1])
    np.testing.assert_array_equal(online[:, 1:], replay["next_observations"][:, :-1])


@every_script
def test_number_of_programs(reference):
    """Training is compiled once per phase (without and with a replay), whatever the chunks; acting
    once for evaluations and once for the online environments."""
    assert reference[1] == (2, 2)


# --- repetition and continuation -----------------------------------------------------------------


def test_repeats_bit_by_bit(script, module, args, reference, here):
    """The same command in another folder: the same tables and checkpoint."""
    module.main(args)
    assert_same(run_folder(script), reference[0])


def test_workers_and_slots_change_nothing(script, module, args, reference, here):
    """Two workers, and one evaluation environment per agent in place of two: the same scores."""
    module.main(dataclasses.replace(args, workers=2, eval_slots=1))
    assert rows(run_folder(script), "train") == rows(reference[0], "train")
    assert rows(run_folder(script), "eval") == rows(reference[0], "eval")


@every_script
def test_continues_in_both_phases(script, module, args, reference, here, monkeypatch):
    """Stopped offline, then within an online episode, and continued: bit for bit the same."""
    for step in (9, 18):
        with monkeypatch.context() as patch:
            stop_at(patch, "log", ("train",), step)
            run_until_stop(module, args)
    module.main(args)
    assert_same(run_folder(script), reference[0])


@pytest.mark.parametrize(
    "method, table, step",
    [
        ("log", ("train",), 9),
        ("log", ("train",), 16),
        ("save", (), 16),
        ("log", ("eval",), 16),
        ("log", ("train",), 18),
        ("save", (), 24),
    ],
    ids=[
        "offline",
        "before a checkpoint",
        "before an evaluation",
        "in an episode",
        "online",
        "end",
    ],
)
def test_continues_bit_by_bit(
    script, module, args, reference, here, monkeypatch, method, table, step
):
    """Stopped at a step, with rows after the last checkpoint or exactly at one, and continued."""
    with monkeypatch.context() as patch:
        stop_at(patch, method, table, step)
        run_until_stop(module, args)
    left = {9: 8, 16: 10, 18: 16}[step] if (method, table) == ("log", ("train",)) else step
    assert checkpoint(run_folder(script))["step"] == left
    module.main(args)
    assert_same(run_folder(script), reference[0])


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
    """The command of a finished run does nothing."""
    shutil.copytree(reference[0], run_folder(script))
    before = contents(run_folder(script))
    module.main(args)
    assert contents(run_folder(script)) == before == contents(reference[0])


def test_eval_only(script, module, args, reference, here):
    """--eval-only plays the episodes of the last evaluation again, into a table of its own."""
    shutil.copytree(reference[0], run_folder(script))
    module.main(dataclasses.replace(args, eval_only=True))
    after = contents(run_folder(script))
    assert rows(run_folder(script), "eval_only") == rows(reference[0], "eval")[-2:]
    assert after.keys() - contents(reference[0]).keys() == {"eval_only.csv"}
    assert contents(reference[0]).items() <= after.items()
    result = module.main(dataclasses.replace(args, eval_only=True, eval_episodes=3))
    assert result["success"].shape == (2, 3)


def test_eval_only_needs_a_checkpoint(module, args, here):
    with pytest.raises(SystemExit, match="no checkpoint"):
        module.main(dataclasses.replace(args, eval_only=True))


def test_other_flags_are_refused(script, module, args, reference, here):
    """Another value in the same folder: one message that names the flag, and nothing changes."""
    shutil.copytree(reference[0], run_folder(script))
    with pytest.raises(SystemExit, match=f"lr: {args.lr} there, 0.5 now"):
        module.main(dataclasses.replace(args, lr=0.5))
    assert contents(run_folder(script)) == contents(reference[0])


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

    def __init__(self, names, workers, each=1):
        self.names = [name for name in names for _ in range(each)]
        self.pools.append(self.names)

    def ask(self, policy):
        """Every slot gets the actions of its agent, by its own state, seed and age."""
        n = np.arange(len(self.names))
        plans = policy(np.float32([n, n]).T, np.uint32(10 * n), np.int32(100 * n))
        numbers = 111 * n + 1000 * (n * len(AGENTS) // len(n))
        np.testing.assert_array_equal(plans, numbers[:, None, None] * np.ones((5, 2)))

    def start(self, slots, seeds):
        self.started.extend((len(self.taken), i, seed) for i, seed in zip(slots, seeds))

    def step(self, policy, slots):
        if policy.__name__ == "policy":  # and not RLPD's random actions
            self.ask(policy)
        rng, n = np.random.default_rng(len(self.taken)), len(slots)
        shapes = dict.fromkeys(("observations", "actions", "next_observations"), (n, 2))
        row = {k: rng.normal(size=x) for k, x in (shapes | dict(masks=n, success=n)).items()}
        row |= dict(rewards=-rng.integers(0, 4, n), terminals=rng.uniform(size=n) < 0.3)
        self.taken.append({k: np.float32(x) for k, x in row.items()})
        return dict(self.taken[-1])

    def play(self, policy, seeds):
        self.ask(policy)
        rng = np.random.default_rng(len(self.played))
        out = {k: rng.uniform(size=seeds.shape) for k in ("success", "return", "length")}
        self.played.append((seeds.tolist(), out))
        return out | dict(path=np.frompyfunc(lambda _: [], 1, 1)(seeds))

    save = lambda self: dict(seeds=np.zeros(4), ages=np.zeros(4), plans={})
    load = lambda *_: None


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "sparse"])
def loop(request, script, module, args, tmp_path_factory):
    """A run of four agents, whose shards swap every four updates, with all but the loop replaced:
    the k-th update of agent i has the metric 1000 i + k, and does nothing but count. -> arguments,
    folder, the states before each call of `train_chunk`, the calls, and the class of the pools."""
    states, calls, N = [], [], len(AGENTS)
    count = lambda: sum(call["updates"] for call in calls)

    def train_chunk(args, state, data, replay, task, updates):
        if traced(state):
            return state, dict(number=jnp.zeros(N))
        numbers = 1000 * np.arange(N)[:, None] + count() + 1 + np.arange(updates)
        states.append(state)
        calls.append(dict(data=data, replay=jax.device_get(replay), task=task, updates=updates))
        return state.replace(key=state.key + np.uint32(updates)), dict(number=numbers.sum(1))

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
        pool = type("Own", (Pool,), {name: [] for name in ("pools", "started", "taken", "played")})
        new = dict(train_chunk=train_chunk, act=act, EnvPool=pool)
        for name, value in (new | dict(Shards=partial(Shards, interval=4))).items():
            patch.setattr(module, name, value)
        patch.setattr(Run, "finish", lambda *_: None)
        module.main(args)
        return args, run_folder(script), states, calls, pool


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
    args, _, _, calls, pool = loop
    files, source, updates = Path(args.dataset_dir), resolve(ENV), iter(steps_of(args))
    labelled = lambda i, task: read(files / SHARD.format(i), source, (task,), args.sparse, False)
    own = [[labelled(i, task) for task, _ in AGENTS] for i in range(3)]
    swaps, now = getattr(args, "offline_steps", 0) // 4, 0
    for call in calls:
        steps = [next(updates) for _ in range(call["updates"])]
        now = steps[-1][1] if steps else now + 1
        times = [step // 4 if not online else swaps + online // 4 for step, online in steps]
        number = int(call["data"].observations[0, 0])
        assert {x % 3 for x in times} <= {number}
        for task, data in zip(call["task"], own[number], strict=True):
            np.testing.assert_array_equal(call["data"].rewards[task], data.rewards[0])
            np.testing.assert_array_equal(call["data"].masks[task], data.masks[0])
        assert call["replay"].size.tolist() == [now] * len(AGENTS)
        for name in pool.taken[0].keys() - {"success"} if now else ():
            taken = np.stack([row[name] for row in pool.taken[:now]], 1)
            if name == "rewards" and args.sparse:
                taken = np.where(taken < 0, -1, 0)
            np.testing.assert_array_equal(getattr(call["replay"], name)[:, :now], taken)
    assert next(updates, None) is None and now == len(pool.taken) == args.online_steps
    assert not np.array_equal(own[0][0].rewards, own[0][2].rewards)


def test_evaluations_have_their_seeds(loop):
    """Those of (seed, task, step, episode), offline and online; scores are means over an agent's
    episodes."""
    args, folder, _, _, pool = loop
    steps, lines = sorted({int(row["step"]) for row in rows(folder, "eval")}), rows(folder, "eval")
    assert len(pool.played) == len(steps) >= 3
    for i, (step, (seeds, out)) in enumerate(zip(steps, pool.played)):
        assert seeds == [[seed_of(s, t, step, e) for e in range(3)] for t, s in AGENTS]
        for j, line in enumerate(lines[4 * i : 4 * i + 4]):
            assert (int(line["task"]), int(line["seed"]), int(line["step"])) == (*AGENTS[j], step)
            for name, x in out.items():
                assert float(line[name]) == pytest.approx(x[j].sum() / 3)


def test_environments_are_those_of_the_agents(loop):
    """By name, for evaluations and for training, where each episode has a seed of its own: of
    (seed, task, 0), then of the step at which the one before ended."""
    args, _, _, _, pool = loop
    names = [f"{ENV}-singletask-task{task}-v0" for task, _ in AGENTS]
    assert pool.pools == [[name for name in names for _ in range(3)], names]
    expected = [(0, i, seed_of(seed, task, 0)) for i, (task, seed) in enumerate(AGENTS)]
    for step, row in enumerate(pool.taken, 1):
        over = [i for i in range(len(AGENTS)) if row["terminals"][i]]
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


# --- failures ------------------------------------------------------------------------------------


def test_divergence_stops_the_run(script, module, args, here):
    """A learning rate of 1e30: the run ends with a message, without a checkpoint of infinities."""
    with pytest.raises(SystemExit, match=r"\w+ of task 2, seed 0 is not finite at step \d+"):
        module.main(dataclasses.replace(args, lr=1e30))
    assert not os.path.exists(f"{run_folder(script)}/checkpoint.msgpack")


def traced(tree):
    """Whether a call is one for the shapes of its results only."""
    return isinstance(jax.tree.leaves(tree)[0], jax.core.Tracer)


def poisoned(train, agent, calls):
    """`train_chunk` after whose `calls`-th call an agent's numbers are NaN."""
    count = []

    def train_chunk(*arguments):
        state, *rest = train(*arguments)
        count.extend([0] * (not traced(state)))
        spoil = lambda x: x.at[agent].set(jnp.nan) if x.dtype == jnp.float32 else x
        return (jax.tree.map(spoil, state) if len(count) == calls else state), *rest

    return train_chunk


def test_nan_stops_the_run(script, module, args, here, monkeypatch, capsys):
    """NaN of one agent after the other: step, agent and metric are named; with the last agent the
    run ends, and the last checkpoint stays."""
    with monkeypatch.context() as patch:
        stop_at(patch, "save", (), 8)
        run_until_stop(module, args)
    before, original = contents(run_folder(script))["checkpoint.msgpack"], module.train_chunk

    def broken(*arguments):
        state, metrics = original(*arguments)
        return state, metrics | dict(critic_loss=jnp.array([jnp.nan, jnp.nan]))

    monkeypatch.setattr(module, "train_chunk", broken)
    with pytest.raises(SystemExit, match="critic_loss of task 2, seed 0 is not finite at step 9"):
        module.main(args)
    assert "critic_loss of task 1, seed 0 is not finite at step 9" in capsys.readouterr().err
    assert contents(run_folder(script))["checkpoint.msgpack"] == before
    assert rows(run_folder(script), "train")[-1]["step"] == "8"


def test_one_agent_diverges(script, module, args, reference, here, monkeypatch, capsys):
    """The other one is the same, bit by bit, offline and online, and the run says who is lost."""
    monkeypatch.setattr(module, "train_chunk", poisoned(module.train_chunk, 1, 3))
    module.main(args)
    said = [line for line in capsys.readouterr().err.splitlines() if "not finite" in line]
    assert len(said) == 1 and "of task 2, seed 0" in said[0] and "this agent is lost" in said[0]
    for table in ("train", "eval"):
        mine, others = (rows(folder, table) for folder in (run_folder(script), reference[0]))
        assert mine[0::2] == others[0::2] and len(mine) == len(others)
    mine, others = (checkpoint(folder)["tree"] for folder in (run_folder(script), reference[0]))
    assert all(np.isnan(x[1]).all() for x in jax.tree.leaves(mine["state"]["params"]))
    for name in ("state", "replay"):
        for x, y in zip(jax.tree.leaves(mine[name]), jax.tree.leaves(others[name])):
            np.testing.assert_array_equal(x[0], y[0])


def test_the_offline_phase_ends_with_an_evaluation(script, module, args, here):
    """Wherever it ends, and with a checkpoint."""
    module.main(dataclasses.replace(args, offline_steps=3, online_steps=4, eval_interval=100))
    steps = {row["step"] for row in rows(run_folder(script), "eval")}
    assert steps == {"3", "7"} and checkpoint(run_folder(script))["step"] == 7


# --- in a fresh interpreter ----------------------------------------------------------------------


def clean(folder):
    """Environment variables without PYTHONPATH, and with a home in which nothing is yet."""
    drop = ("PYTHONPATH", "JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "MPLCONFIGDIR")
    kept = {name: x for name, x in os.environ.items() if name not in drop}
    return kept | dict(HOME=str(folder), PYTHONDONTWRITEBYTECODE="1")


@every_script
def test_copied_out(script, args, tmp_path):
    """The script and common/ are all that a run needs."""
    (tmp_path / script).parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / f"{script}.py", tmp_path / f"{script}.py")
    shutil.copytree(ROOT / "common", tmp_path / "common")
    short = dataclasses.replace(args, offline_steps=2, online_steps=0, eval_episodes=1)
    line = command(script, short, root=tmp_path)
    variables = clean(tmp_path) | {k: v for k, v in os.environ.items() if k.startswith("JAX_")}
    subprocess.run(line, cwd=tmp_path, env=variables, check=True, capture_output=True)
    folder = tmp_path / "runs" / os.path.basename(script) / ENV / "default"
    assert checkpoint(folder)["step"] == 2


@every_script
def test_help(script, module, tmp_path):
    """--help lists every flag and touches nothing."""
    line = [sys.executable, *start(script, ROOT), "--help"]
    variables = clean(tmp_path) | ({"PYTHONPATH": str(ROOT)} if "/" in script else {})
    answer = subprocess.run(line, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert answer.returncode == 0 and not answer.stderr
    for field in dataclasses.fields(module.Args):
        flag = "--" + field.name.replace("_", "-")
        assert (flag in answer.stdout) == (field.name != "action_size")
    assert not list(tmp_path.rglob("*"))


@every_script
def test_import_does_nothing(script, tmp_path):
    """Importing prints nothing, writes nothing, starts no device and no process."""
    check = f"""
import importlib, os, sys
sys.path.insert(0, {str(ROOT)!r})
importlib.import_module({script.replace("/", ".")!r})
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
assert not {{"wandb", "matplotlib"}} & set(sys.modules)
assert not open(f"/proc/self/task/{{os.getpid()}}/children").read()
"""
    line = [sys.executable, "-c", check]
    answer = subprocess.run(line, cwd=tmp_path, env=clean(tmp_path), capture_output=True, text=True)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
    assert not list(tmp_path.rglob("*"))
