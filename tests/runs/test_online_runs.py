"""Real runs of every online script, of seconds each, as tests/runs/test_script_runs.py has them for
the offline ones. Most are on the plane `multigoal`, which is stepped in this process, and compared
with one uninterrupted run per script: 72 steps, of which 10 are random; evaluations and checkpoints
are at steps 24, 48 (the replay of 40 is overwritten by then) and 72. Others are on `hopper` in
worker processes: 32 steps, of which 20 are random, checkpoints at 8, 16, 24 (in an episode, after
the replay of 20 was overwritten) and 32.

What depends on a script's own state and acting is tested for all of them (`every_script`), what
only the shared blocks decide for one.
"""

import dataclasses
import importlib
import os
import shutil
import subprocess
import sys
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from common.checkpoints import CHECKPOINT
from common.environments import MULTIGOAL_STEPS, TRAINING, seed_of
from common.errors import UserError
from common.sampling import Replay
from common.workers import Slot
from tests.helpers.flags import ONLINE_LENGTHS, tiny_online
from tests.helpers.plane import plane
from tests.helpers.run_tests import (  # noqa: F401 (tests that run here, too)
    pytest_generate_tests,
    test_eval_only,
    test_eval_only_needs_a_checkpoint,
    test_finished_run_stays,
    test_help,
    test_killed_and_continued,
    test_pictures,
    test_repeats_bit_by_bit,
)
from tests.helpers.runs import (
    assert_same,
    assert_same_arrays,
    checkpoint,
    clean,
    command,
    contents,
    fake_episodes,
    flags_of,
    folder_of,
    poisoned,
    quick,
    rows,
    run_until_stop,
    stop_at,
)
from tools import shared_blocks
from tools.shared_blocks import ROOT

FULLY = ["fmer"]  # paths without .py
APART = ["baselines/ppo"]  # on-policy, with a loop of its own, tested in its own file
EVERY = FULLY + [name for name in shared_blocks.named("online") if name not in FULLY + APART]
FORKED = [name for name in EVERY if any(path == f"{name}.py" for path, _ in shared_blocks.FORKS)]
pytestmark = pytest.mark.usefixtures("quick_compile", "one_process")
every_script = pytest.mark.every_script


@pytest.fixture(scope="module")
def args(module):
    return tiny_online(module)


def programs(module):
    """Numbers of compiled programs: training, acting."""
    return module.train_chunk._cache_size(), module.act._cache_size()


def uninterrupted(script, module, args, path):
    """Folder of a run, and the numbers of programs that were compiled for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        module.train_chunk.clear_cache()
        module.act.clear_cache()
        module.main(args)
        return folder_of(script, args), programs(module)


@pytest.fixture(scope="module")
def reference(script, module, args, tmp_path_factory):
    return uninterrupted(script, module, args, tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def references(script, module, reference, tmp_path_factory):
    """env -> arguments, folder and programs of the uninterrupted run in it."""
    args = tiny_online(module, "hopper")
    hopper = uninterrupted(script, module, args, tmp_path_factory.mktemp("hopper"))
    return dict(multigoal=(tiny_online(module), *reference), hopper=(args, *hopper))


# --- what a run leaves ---------------------------------------------------------------------------


def check_run(script, folder, args):
    """Files, tables and checkpoint of a run that has ended, and the last evaluation's paths."""
    names = {"config.json", "script.py", "train.csv", "eval.csv"}
    names |= {"checkpoint.msgpack", "rollouts.npz"}
    assert names <= set(os.listdir(folder))
    flags = flags_of(folder)
    assert (flags["env"], flags["total_steps"]) == (args.env, args.total_steps)
    steps = range(1, args.total_steps + 1)
    halts = [n for n in steps if n % args.eval_interval == 0 or n == args.total_steps]
    logs = [
        n for n in steps if n > args.warmup_steps and (n in halts or n % args.log_interval == 0)
    ]
    seeds = [args.seed + i for i in range(args.num_seeds)]
    for table, expected in dict(train=logs, eval=halts).items():
        lines = rows(folder, table)
        assert [int(x["step"]) for x in lines] == np.repeat(expected, len(seeds)).tolist()
        assert [int(x["seed"]) for x in lines] == seeds * len(expected)
        assert {x["task"] for x in lines} == {"1"}
        assert np.isfinite([[float(x) for x in line.values()] for line in lines]).all()
    content, capacity = checkpoint(folder), min(args.replay_size, args.total_steps)
    assert content["step"] == content["replay"]["size"] == args.total_steps
    assert content["replay"]["rewards"].shape == (len(seeds), capacity)
    assert np.abs(content["replay"]["actions"]).max() <= 1
    with np.load(f"{folder}/rollouts.npz") as file:
        paths = [file[f"path{i}"] for i in range(len(seeds) * args.eval_episodes)]
        assert f"path{len(paths)}" not in file
    lengths = np.array([len(path) for path in paths]).reshape(len(seeds), -1)
    last = rows(folder, "eval")[-len(seeds) :]
    np.testing.assert_allclose([float(x["length"]) for x in last], lengths.mean(1))


@every_script
def test_files(script, module, args, reference):
    """Configuration, both tables with a row per agent at every logged step and finite numbers,
    checkpoint, paths of as many episodes as were asked for. Every way of choosing actions has
    columns of its own in eval.csv."""
    check_run(script, reference[0], args)
    names = ["task", "seed", "step", "return", "length"]
    others = [f"{mode}_{name}" for mode in module.MODES[1:] for name in names[3:]]
    assert [*rows(reference[0], "eval")[0]] == names + others
    assert {"critic_loss", "q", "target"} <= rows(reference[0], "train")[0].keys()


@every_script
def test_number_of_programs(module, reference):
    """One of training, one of acting in it, and one per mode of evaluations."""
    assert reference[1] == (1, 1 + len(module.MODES))


def test_number_of_programs_with_workers(module, references):
    assert references["hopper"][2] == (1, 1 + len(module.MODES))


def test_files_with_workers(script, references):
    check_run(script, references["hopper"][1], references["hopper"][0])


@pytest.mark.parametrize("env, steps", [("multigoal", 72), ("hopper", 32)])
def test_transitions(script, module, here, monkeypatch, env, steps):
    """The replay holds the actions that were executed, in [-1, 1], and what they led to: playing
    each episode from its seed gives the same observations, rewards, masks and ends, bit by bit. No
    transition joins two episodes, not at a time-out either, and a time-out's mask is 1."""
    monkeypatch.setattr(module, "update", lambda *inputs: (inputs[1], dict(none=jnp.zeros(()))))
    args = tiny_online(module, env, replay_size=1000, eval_interval=1000, name="whole")
    module.main(args)
    replay = checkpoint(folder_of(script, args))["replay"]
    over = replay["terminals"] > 0
    assert replay["rewards"].shape == (2, steps) and np.abs(replay["actions"]).max() <= 1
    assert (over.sum(1) >= 1).all() and not np.array_equal(over[0], over[1])
    assert (replay["masks"][~over] == 1).all()
    follow, after = replay["observations"][:, 1:], replay["next_observations"][:, :-1]
    same = (follow == after).all(-1)
    np.testing.assert_array_equal(same, ~over[:, :-1])
    slot = Slot(env)
    for i, seed in enumerate((args.seed, args.seed + 1)):
        (state,) = slot.start(seed_of(seed, 1, 0))
        for k in range(steps):
            np.testing.assert_array_equal(replay["observations"][i, k], state)
            state, *flags, _ = slot.step(replay["actions"][i, k])
            np.testing.assert_array_equal(replay["next_observations"][i, k], state)
            stored = [replay[name][i, k] for name in ("rewards", "masks", "terminals")]
            np.testing.assert_array_equal(stored, np.float32(flags))
            if over[i, k]:
                (state,) = slot.start(seed_of(seed, 1, k + 1, TRAINING))
    if env == "multigoal":
        position, reward, reached = plane(replay["observations"], replay["actions"])
        np.testing.assert_array_equal(replay["next_observations"], position)
        np.testing.assert_allclose(replay["rewards"], reward, rtol=1e-5, atol=1e-4)
        np.testing.assert_array_equal(replay["masks"], 1 - reached)
        starts = replay["observations"][:, 1:][over[:, :-1]]
        assert np.abs(starts).max() < 0.5 and len(np.unique(starts)) == starts.size
        for ends, masks in zip(over, replay["masks"]):  # the clock, or a goal before
            lengths = np.diff(np.flatnonzero(ends), prepend=-1)
            assert (lengths[masks[ends] == 1] == MULTIGOAL_STEPS).all()
            assert (lengths <= MULTIGOAL_STEPS).all()


# --- repetition and continuation -----------------------------------------------------------------


@every_script
def test_repeats_and_continues(script, module, args, reference, here, monkeypatch):
    """Stopped between two checkpoints and continued: the same tables and checkpoint, bit by bit, in
    the same program. (A script whose run did not repeat would not continue so, either.)"""
    with monkeypatch.context() as patch:
        stop_at(patch, "train.csv", 60)
        run_until_stop(module, args)
    before = programs(module)
    assert checkpoint(folder_of(script, args))["step"] == 48
    module.main(args)
    assert_same(folder_of(script, args), reference[0])
    assert programs(module) == before


STOPS = dict(  # file and step of the stop; step of the checkpoint then
    multigoal=[
        ("train.csv", 18, None),
        ("train.csv", 24, None),
        (CHECKPOINT, 24, 24),
        ("eval.csv", 24, 24),
        (CHECKPOINT, 48, 48),
        ("train.csv", 54, 48),
    ],
    hopper=[
        (CHECKPOINT, 8, 8),  # in the random phase
        ("train.csv", 24, 16),
        (CHECKPOINT, 24, 24),  # in an episode, after the replay was overwritten
        ("train.csv", 28, 24),
    ],
)


@pytest.mark.parametrize("env", STOPS)
def test_continues_bit_by_bit(script, module, references, here, monkeypatch, env):
    """Stopped again and again, with rows after the last checkpoint or exactly at one, before there
    is any or after the replay was overwritten, at a log, an evaluation, in the random phase, in an
    episode: the end is the same."""
    args, folder, _ = references[env]
    for file, step, left in STOPS[env]:
        with monkeypatch.context() as patch:
            stop_at(patch, file, step)
            run_until_stop(module, args)
        assert os.path.exists(f"{folder_of(script, args)}/{CHECKPOINT}") == bool(left)
        if left:
            content = checkpoint(folder_of(script, args))
            ages = content["envs"]["ages"]
            assert content["step"] == left and (0 < ages).all()
            assert (ages < args.replay_size).all()
    module.main(args)
    assert_same(folder_of(script, args), folder)


@pytest.mark.parametrize("name", FORKED)
def test_forked_scripts_with_workers(name, tmp_path, monkeypatch):
    """A script whose shared blocks are its own also runs in worker processes, and continues there,
    in an episode and after its replay was overwritten."""
    module = importlib.import_module(name.replace("/", "."))
    args = tiny_online(module, "hopper")
    folder, count = uninterrupted(name, module, args, tmp_path)
    check_run(name, folder, args)
    assert count == (1, 1 + len(module.MODES))
    (tmp_path / "again").mkdir()
    monkeypatch.chdir(tmp_path / "again")
    with monkeypatch.context() as patch:
        stop_at(patch, "train.csv", 28)
        run_until_stop(module, args)
    assert checkpoint(folder_of(name, args))["step"] == 24
    module.main(args)
    assert_same(folder_of(name, args), folder)


def test_an_episode_longer_than_the_replay(script, module, here, monkeypatch):
    """Cannot be played again: one line says so, and the checkpoint stays."""
    watched(monkeypatch, module)
    args = tiny_online(module, "hopper", replay_size=5, name="short")
    with monkeypatch.context() as patch:
        stop_at(patch, "eval.csv", 8)
        run_until_stop(module, args)
    before = contents(folder_of(script, args))
    with pytest.raises(UserError, match="^[^\n]*longer than the replay[^\n]*$"):
        module.main(args)
    assert contents(folder_of(script, args)) == before


def test_workers_change_nothing(script, module, references, here):
    """Two processes that step the environments of training and evaluations."""
    args, folder, _ = references["hopper"]
    module.main(dataclasses.replace(args, workers=2))
    assert_same(folder_of(script, args), folder)


def test_slots_change_nothing(script, module, args, reference, here):
    """One evaluation environment per agent in place of two: training stays the same bit by bit;
    scores do but for the rounding of matrices of another size."""
    module.main(dataclasses.replace(args, eval_slots=1))
    assert rows(folder_of(script, args), "train") == rows(reference[0], "train")
    ours, theirs = (rows(path, "eval") for path in (folder_of(script, args), reference[0]))
    for one, two in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(*(np.float64([*x.values()]) for x in (one, two)), rtol=1e-4)


@pytest.mark.parametrize("env", ONLINE_LENGTHS)
def test_evaluating_more_often_changes_no_training(script, module, references, here, env):
    """Twice as often: the same updates and the same transitions, bit by bit; evaluations of the
    same step are the same."""
    args, folder, _ = references[env]
    other = dataclasses.replace(args, eval_interval=args.eval_interval // 2)
    module.main(other)
    assert rows(folder_of(script, other), "train") == rows(folder, "train")
    often, seldom = rows(folder_of(script, other), "eval"), rows(folder, "eval")
    assert len(often) == 2 * len(seldom) and [x for x in often if x in seldom] == seldom
    assert_same_arrays(*(checkpoint(path) for path in (folder_of(script, other), folder)))


def test_agents_alone_and_together(script, module, args, reference, here):
    """The second agent is the same without the first one beside it."""
    alone = dataclasses.replace(args, num_seeds=1, seed=args.seed + 1, name="alone")
    module.main(alone)
    one, both = (checkpoint(path) for path in (folder_of(script, alone), reference[0]))
    assert one["replay"].pop("size") == both["replay"].pop("size")
    trees = [jax.tree.leaves((x["state"]["params"], x["replay"])) for x in (one, both)]
    for x, y in zip(*trees, strict=True):
        np.testing.assert_allclose(x[0], y[1], rtol=1e-3, atol=1e-3)
    agents = both["replay"]["actions"]
    assert not np.array_equal(agents[0], agents[1])


def test_other_flags_are_refused(script, module, args, reference, here):
    """Another value in the same folder: one message that names the flag, and nothing changes."""
    shutil.copytree(reference[0], folder_of(script, args))
    with pytest.raises(UserError, match=f"critic_lr: {args.critic_lr} there, 0.5 now"):
        module.main(dataclasses.replace(args, critic_lr=0.5))
    with pytest.raises(UserError, match="total_steps: 72 there, 96 now"):
        module.main(dataclasses.replace(args, total_steps=96))
    assert contents(folder_of(script, args)) == contents(reference[0])


# --- steps and updates ---------------------------------------------------------------------------


def watched(monkeypatch, module):
    """Replaces the method by one that learns nothing: an update logs how many transitions it could
    have seen; actions are 0.5 in training, -0.5 else. (Arguments of such runs have a name of their
    own, so that no program of another test runs.)"""

    def update(args, state, batch):
        return state, dict(seen=batch.size)

    def sample_actions(args, state, observations, key, mode):
        return jnp.full((len(observations), args.action_size), 0.5 if mode == "explore" else -0.5)

    monkeypatch.setattr(module, "update", update)
    monkeypatch.setattr(module, "sample_actions", sample_actions)


@pytest.mark.parametrize("every, log", [(1, 1), (3, 4)])
@pytest.mark.parametrize("env", ONLINE_LENGTHS)
def test_when_updates_come(script, module, here, monkeypatch, env, every, log):
    """The first one at the first step that is not random, or `every` - 1 later, then one per
    `every` steps. An update does not see the transition of its own step, but all before: it is
    dispatched before the environments' step returns. Rows are means over the updates since the
    last one, whatever the number of steps."""
    flags = dict(total_steps=20, warmup_steps=8, replay_size=100, log_interval=log)
    flags |= dict(eval_interval=10, env_steps_per_update=every, name=f"watched-{every}-{log}")
    watched(monkeypatch, module)
    args = tiny_online(module, env, **flags)
    module.main(args)
    lines = rows(folder_of(script, args), "train")
    steps = np.array([step for step in range(9, 21) if (step - 8) % every == 0])
    ends = [step for step in range(1, 21) if step % log == 0 or step % 10 == 0]
    parts = [steps[(steps > last) & (steps <= end)] for last, end in zip([0, *ends], ends)]
    means = {end: part.mean() - 1 for end, part in zip(ends, parts) if len(part)}
    assert [int(x["step"]) for x in lines] == np.repeat([*means], 2).tolist()
    seen = [float(x["seen"]) for x in lines]
    np.testing.assert_allclose(seen, np.repeat([*means.values()], 2), rtol=1e-6)


def test_number_of_updates(module, args, reference):
    """Counted by the optimisers, and equal to what schedules plan with."""
    state, updates = checkpoint(reference[0])["state"], 72 - 10
    assert module.planned_updates(args) == updates and state["step"].tolist() == [updates] * 2
    for name, optimizer in state["opt_state"].items():
        if name in ("log_lambda", "log_eta"):
            continue  # FMER's plain steps, which count nothing
        assert optimizer["0"]["count"].tolist() == [updates] * 2, name
    third = dataclasses.replace(args, env_steps_per_update=3)
    assert module.planned_updates(third) == updates // 3


@pytest.mark.parametrize("env", ONLINE_LENGTHS)
def test_random_phase(script, module, here, monkeypatch, env):
    """The first actions are uniform in the box, independent of one another, of other agents and of
    the episode's start; afterwards they are those of the policy as it explores, and only those."""
    flags = dict(total_steps=303, warmup_steps=300, replay_size=303, log_interval=303)
    flags |= dict(eval_interval=303, eval_episodes=1, eval_slots=1, name="random")
    watched(monkeypatch, module)
    args = tiny_online(module, env, **flags)
    module.main(args)
    replay = checkpoint(folder_of(script, args))["replay"]
    first, rest = np.split(replay["actions"], [300], 1)
    assert (rest == 0.5).all() and len(np.unique(first)) == first.size
    assert np.abs(first).max() <= 1
    assert scipy.stats.kstest(first.ravel(), "uniform", (-1, 2)).pvalue > 1e-3
    lagged = [np.corrcoef(first[:, lag:].ravel(), first[:, :-lag].ravel())[0, 1] for lag in (1, 5)]
    assert np.abs(lagged).max() < 0.15
    assert abs(np.corrcoef(first[0].ravel(), first[1].ravel())[0, 1]) < 0.15
    begins = np.pad(replay["terminals"], ((0, 0), (1, 0)), constant_values=1)[:, :300] > 0
    actions, states = first[begins], replay["observations"][:, :300][begins]
    assert len(actions) > 15
    together = np.corrcoef(actions.T, states.T)[: actions.shape[1], actions.shape[1] :]
    assert np.abs(together[np.isfinite(together)]).max() < 0.9


@pytest.mark.parametrize("env", ONLINE_LENGTHS)
def test_noise_is_fresh(script, module, here, monkeypatch, env):
    """Every action of every agent has random numbers of its own, in training and in evaluations,
    and those of the latter are not those of the former."""

    def sample_actions(args, state, observations, key, mode):
        drawn = jax.random.uniform(key, (len(observations), args.action_size), minval=-1)
        jax.debug.callback(lambda x: seen.setdefault(mode, []).append(x[0, 0]), drawn)
        return drawn

    seen, flags = {}, dict(total_steps=60, warmup_steps=1, replay_size=60, eval_interval=20)
    watched(monkeypatch, module)
    monkeypatch.setattr(module, "sample_actions", sample_actions)
    args = tiny_online(module, env, **flags, name="fresh")
    module.main(args)
    actions = checkpoint(folder_of(script, args))["replay"]["actions"][:, 1:]
    assert len(np.unique(actions)) == actions.size
    assert scipy.stats.kstest(actions.ravel(), "uniform", (-1, 2)).pvalue > 1e-3
    jax.effects_barrier()
    first = np.unique(np.array(seen["best"]))
    assert len(first) > 20 and not np.isin(first, actions).any()


@pytest.mark.parametrize("steps", [3, 7, 60])
def test_batches(module, monkeypatch, steps):
    """Rows of the agent's own filled slots, whole and uniform, new ones at every update."""

    @flax.struct.dataclass
    class State:
        key: jax.Array

    capacity, names = 7, "observations next_observations actions rewards masks terminals".split()
    slots = np.arange(2 * capacity, dtype=np.float32).reshape(2, -1)
    fields = {name: 100 * i + slots for i, name in enumerate(names)}
    replay = Replay(**jax.tree.map(jnp.array, fields), size=jnp.full(2, steps))
    args, filled = tiny_online(module, batch_size=1000), min(steps, capacity)
    monkeypatch.setattr(module, "update", lambda args, state, batch: (state, vars(batch)))
    learn = jax.vmap(partial(module.train_step, args))
    state, batches = State(jax.vmap(jax.random.PRNGKey)(jnp.arange(2))), []
    for _ in range(2):
        state, batch = learn(state, replay)
        assert batch["updates"].tolist() == [1, 1]
        for i, name in enumerate(names):
            np.testing.assert_array_equal(batch[name], 100 * i + batch["observations"])
        rows = np.asarray(batch["observations"], int) - capacity * np.arange(2)[:, None]
        counts = np.array([np.bincount(x, minlength=capacity) for x in rows])
        assert counts.shape == (2, capacity) and not counts[:, filled:].any()
        assert scipy.stats.chisquare(counts[:, :filled], axis=1).pvalue.min() > 1e-3
        batches += [*rows]
    assert len(np.unique(batches, axis=0)) == 4


@pytest.mark.parametrize("env", ONLINE_LENGTHS)
def test_evaluations_use_their_modes(script, module, here, monkeypatch, env):
    """The first mode's numbers are return and length, the others have their names; none explores,
    and training does nothing else."""
    asked = []

    def sample_actions(args, state, observations, key, mode):
        asked.append(mode)
        value = dict(explore=0.0, slow=0.5, fast=1.0)[mode]
        return jnp.full((len(observations), args.action_size), value).at[:, 1:].set(0.0)

    flags = dict(total_steps=12, warmup_steps=6, replay_size=100, eval_interval=12, name="modes")
    watched(monkeypatch, module)
    monkeypatch.setattr(module, "sample_actions", sample_actions)
    monkeypatch.setattr(module, "MODES", ("slow", "fast"))
    args = tiny_online(module, env, **flags)
    module.main(args)
    assert set(asked) == {"explore", "slow", "fast"}
    assert (checkpoint(folder_of(script, args))["replay"]["actions"][:, 6:] == 0).all()
    last = rows(folder_of(script, args), "eval")[-2:]
    assert list(last[0])[3:] == ["return", "length", "fast_return", "fast_length"]
    if env == "multigoal":  # from about (0.1, 0) to the goal at (5, 0)
        for row in last:
            assert 7 <= float(row["length"]) <= 9 and 4 <= float(row["fast_length"]) <= 5
            assert -140 < float(row["return"]) < -80 and float(row["fast_return"]) < -120


def test_agents_start_apart(script, module, here, monkeypatch):
    """Networks and random numbers of two agents differ from the first; their evaluations, in every
    mode, have the seeds of (seed, task, step, episode), and scores are means over an agent's."""
    watched(monkeypatch, module)
    episodes = fake_episodes()
    monkeypatch.setattr(module, "Episodes", episodes)
    args = tiny_online(
        module, "hopper", total_steps=5, eval_interval=3, eval_episodes=3, name="apart"
    )
    module.main(dataclasses.replace(args, warmup_steps=4))
    state = checkpoint(folder_of(script, args))["state"]
    leaves = jax.tree_util.tree_leaves_with_path(state["params"])
    kernels = [x for path, x in leaves if "kernel" in jax.tree_util.keystr(path)]
    assert len(kernels) > 5 and all(x.any() for x in kernels)
    for x in [state["key"], *kernels]:
        assert (x[0] != x[1]).any()
    lines = rows(folder_of(script, args), "eval")
    assert [int(x["step"]) for x in lines] == [3, 3, 5, 5]
    for i, (seeds, out) in enumerate(episodes.played):
        at, mode = divmod(i, len(module.MODES))
        prefix = f"{module.MODES[mode]}_" if mode else ""
        for j, line in enumerate(lines[2 * at : 2 * at + 2]):
            who = int(line["seed"]), int(line["task"]), int(line["step"])
            assert who[0] == args.seed + j and seeds[j] == [seed_of(*who, e) for e in range(3)]
            for name in ("return", "length"):
                assert float(line[prefix + name]) == pytest.approx(out[name][j].sum() / 3)
    assert len(episodes.played) == 2 * len(module.MODES)


# --- failures ------------------------------------------------------------------------------------


def test_nan_stops_the_run(script, module, args, reference, here, monkeypatch, capsys):
    """NaN of one agent after the other: step, agent and metric are named; with the last agent the
    run ends, and the last checkpoint stays."""
    with monkeypatch.context() as patch:
        stop_at(patch, "eval.csv", 24)
        run_until_stop(module, args)
    path, original = folder_of(script, args), module.train_chunk
    before = contents(path)

    def broken(*arguments):
        state, sums = original(*arguments)
        return state, sums | dict(critic_loss=jnp.array([jnp.nan, jnp.nan]))

    monkeypatch.setattr(module, "train_chunk", broken)
    with pytest.raises(UserError, match="critic_loss of task 1, seed 2 is not finite at step 30"):
        module.main(args)
    assert "critic_loss of task 1, seed 1 is not finite at step 30" in capsys.readouterr().err
    assert contents(path) == before


@pytest.mark.parametrize("env", ONLINE_LENGTHS)
def test_one_agent_diverges(script, module, references, here, monkeypatch, capsys, env):
    """The other one is the same, bit by bit, and the run says who is lost."""
    args, folder, _ = references[env]
    monkeypatch.setattr(module, "train_chunk", poisoned(module.train_chunk, 1, 5))
    module.main(args)
    said = [line for line in capsys.readouterr().err.splitlines() if "not finite" in line]
    assert len(said) == 1 and f"task 1, seed {args.seed + 1} is" in said[0]
    mine, others = checkpoint(folder_of(script, args)), checkpoint(folder)
    assert mine["replay"].pop("size") == others["replay"].pop("size")
    for name in ("state", "replay"):
        for x, y in zip(jax.tree.leaves(mine[name]), jax.tree.leaves(others[name]), strict=True):
            np.testing.assert_array_equal(x[0], y[0])
    mine, others = (rows(path, "eval") for path in (folder_of(script, args), folder))
    assert mine[0::2] == others[0::2] and len(mine) == len(others)


# --- in a fresh interpreter ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, words",
    [
        ("fmer.py --env cube-double", ("--env cube-double is an offline environment", "meam.py")),
        ("meam.py --env multigoal", ("--env multigoal is an online environment", "fmer.py")),
        ("fmer.py --env no-such-env", ("unknown environment 'no-such-env'",)),
        ("baselines/td3.py --name a/b", ("--name 'a/b' must be the name of a folder",)),
        ("baselines/ppo.py --eval-only", ("holds no checkpoint",)),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, line, words):
    """One line that begins with `error:`, exit code 1, and no run. (tests/common/test_flags.py has
    all other flags that are refused.)"""
    script, *flags = line.split()
    line = [sys.executable, f"{ROOT}/{script}", *flags]
    answer = subprocess.run(line, cwd=tmp_path, env=clean(tmp_path), capture_output=True, text=True)
    assert answer.returncode == 1 and not answer.stdout
    assert answer.stderr.startswith("error: ") and answer.stderr.count("\n") == 1
    for word in words:
        assert word in answer.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    left = [path.name for path in files if ".compiled" not in path.parts]
    assert left == []


def test_both_ways_to_start_a_baseline(tmp_path):
    """`python baselines/td3.py` in any folder equals `python -m baselines.td3` next to it; without
    --name the run's name is made of the flags that were changed, and main's rows are as before."""
    module = importlib.import_module("baselines.td3")
    args = tiny_online(module, total_steps=14, eval_interval=14, name="")
    lines = dict(
        path=command("baselines/td3", args),
        module=[sys.executable, "-m", "baselines.td3", *command("baselines/td3", args)[2:]],
    )
    folders = []
    for way, line in lines.items():
        (tmp_path / way).mkdir()
        variables = quick(tmp_path) | (dict(PYTHONPATH=str(ROOT)) if way == "module" else {})
        subprocess.run(line, cwd=tmp_path / way, env=variables, check=True, capture_output=True)
        (folder,) = (tmp_path / way / "runs/td3/multigoal").iterdir()
        folders.append(folder)
    assert_same(*folders)
    assert folders[0].name == folders[1].name
    assert {"hidden-dims=16-16", "total-steps=14", "num-seeds=2"} <= {*folders[0].name.split(",")}


@pytest.mark.parametrize("name", FULLY + [name for name in EVERY if "/" in name][-1:])
def test_copied_out(name, tmp_path):
    """The script and common/ are all that a run needs; a baseline may then be next to common/."""
    flat = tmp_path / f"{os.path.basename(name)}.py"
    shutil.copy(ROOT / f"{name}.py", flat)
    shutil.copytree(ROOT / "common", tmp_path / "common")
    module = importlib.import_module(name.replace("/", "."))
    short = tiny_online(module, total_steps=4, warmup_steps=2, eval_episodes=1)
    line = command(flat.stem, short, root=tmp_path)
    subprocess.run(line, cwd=tmp_path, env=quick(tmp_path), check=True, capture_output=True)
    folder = tmp_path / "runs" / os.path.basename(name) / "multigoal" / "default"
    assert checkpoint(folder)["step"] == 4
