"""Real runs of PPO, whose training loop is its own: whole rollouts, evaluated and saved at their
ends. What tests/runs/test_script_runs.py says of any run is tested by its own tests, on this one:
two agents with two environments each on the plane, four rollouts of 24 steps, of which the run's
100 have four; a row at 48, 72 and 96, evaluations and checkpoints at 48 and 96, all of them in the
middle of episodes. On `hopper` an agent has one environment and rollouts of 16 steps."""

import dataclasses
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baselines import ppo
from common.checkpoints import CHECKPOINT
from common.env_pool import EnvPool, Episodes
from common.environments import MULTIGOAL_STEPS, TRAINING, seed_of
from common.errors import UserError
from tests.helpers.flags import PPO_LENGTHS, tiny_ppo
from tests.helpers.plane import plane
from tests.helpers.run_tests import (  # noqa: F401 (tests that run here, too)
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
    command,
    contents,
    copy_out,
    flags_of,
    folder_of,
    quick,
    rows,
    run_until_stop,
    start,
    stop_at,
)

pytestmark = pytest.mark.usefixtures("quick_compile", "one_process")


@pytest.fixture(scope="module")
def script():
    return "baselines/ppo"


@pytest.fixture(scope="module")
def module():
    return ppo


@pytest.fixture(scope="module")
def args():
    return tiny_ppo()


def uninterrupted(args, path):
    """Folder of a run, and the numbers of programs that were compiled for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        ppo.train_chunk.clear_cache()
        ppo.act.clear_cache()
        ppo.main(args)
        return folder_of("ppo", args), (ppo.train_chunk._cache_size(), ppo.act._cache_size())


@pytest.fixture(scope="module")
def reference(args, tmp_path_factory):
    return uninterrupted(args, tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def references(args, reference, tmp_path_factory):
    """env -> arguments, folder and programs of the uninterrupted run in it."""
    other = tiny_ppo("hopper")
    hopper = uninterrupted(other, tmp_path_factory.mktemp("hopper"))
    return dict(multigoal=(args, *reference), hopper=(other, *hopper))


def spied(monkeypatch):
    """Every rollout that is learnt from, as a list that fills."""
    seen, train = [], ppo.train_chunk

    def spy(args, state, metrics, rollout):
        seen.append({name: np.array(x) for name, x in rollout.items()})
        return train(args, state, metrics, rollout)

    monkeypatch.setattr(ppo, "train_chunk", spy)
    return seen


def test_more_environments_than_evaluations_may_have(here):
    """A rollout is as wide as --num-envs says, for every agent."""
    flags = dict(num_envs=60, rollout_steps=120, total_steps=120, batch_size=60)
    rollouts = ppo.main(tiny_ppo(**flags, log_interval=120, eval_interval=120))
    assert [row["step"] for row in rollouts] == ["120", "120"]


# --- what a run leaves ---------------------------------------------------------------------------

HALTS = dict(multigoal=([48, 72, 96], [48, 96]), hopper=([16, 32, 48, 64], [32, 64]))


@pytest.mark.parametrize("env", PPO_LENGTHS)
def test_files(references, env):
    """Configuration, checkpoint, the last evaluation's paths, and both tables: a row per agent at
    the end of the first rollout that reaches a multiple of the interval. Only whole rollouts."""
    args, folder, _ = references[env]
    names = {"config.json", "script.py", "train.csv", "eval.csv"}
    names |= {"checkpoint.msgpack", "rollouts.npz"}
    assert names <= set(os.listdir(folder))
    flags = flags_of(folder)
    assert (flags["env"], flags["rollout_steps"]) == (env, args.rollout_steps)
    for table, expected in zip(("train", "eval"), HALTS[env]):
        lines = rows(folder, table)
        assert [int(x["step"]) for x in lines] == [step for step in expected for _ in range(2)]
        assert [int(x["seed"]) for x in lines] == [0, 1] * len(expected)
        assert np.isfinite([[float(x) for x in line.values()] for line in lines]).all()
    assert {"critic_loss", "q", "target", "kl"} <= rows(folder, "train")[0].keys()
    assert [*rows(folder, "eval")[0]] == ["task", "seed", "step", "return", "length"]
    content = checkpoint(folder)
    assert content["step"] == HALTS[env][1][-1]
    ages, played = content["envs"]["ages"], content["played"]
    assert (ages > 0).all() and played.shape[:3] == (*ages.shape, ages.max())
    assert np.abs(played).max() <= 1


def test_number_of_programs(references):
    """One of training, one of acting in it, one of acting in evaluations."""
    assert references["multigoal"][2] == references["hopper"][2] == (1, 2)


def test_number_of_updates(args, reference):
    """As planned: 4 rollouts, 2 epochs of 3 minibatches; statistics of all 96 steps."""
    state = checkpoint(reference[0])["state"]
    assert ppo.planned_updates(args) == 24
    counts = [x for x in jax.tree.leaves(state["opt_state"]) if x.dtype == np.int32]
    assert len(counts) == 2 and all(x.tolist() == [24, 24] for x in counts)  # of Adam and its rate
    for name in ("observations", "returns"):
        assert state["statistics"][name]["0"].tolist() == [96.0, 96.0]


def test_rows_are_means(here, monkeypatch):
    """Of the updates' metrics, over all rollouts since the last row; of returns and lengths, over
    an agent's episodes, which have the seeds of (seed, task, step, episode). Agents start apart."""
    args, count, train = tiny_ppo(name="means"), iter(range(100)), ppo.train_chunk
    started, played, begin = [], [], Episodes.__init__

    def numbered(args, state, metrics, rollout):
        if not started:
            started.append(jax.tree.map(np.array, state))
        before = jnp.array(metrics["kl"])
        state, metrics = train(args, state, metrics, rollout)
        return state, metrics | dict(kl=before + next(count) * jnp.array([1.0, 10.0]))

    def watch(episodes, pool, seeds):
        begin(episodes, pool, seeds)
        played.append((seeds.tolist(), episodes.results))

    monkeypatch.setattr(ppo, "train_chunk", numbered)
    monkeypatch.setattr(Episodes, "__init__", watch)
    ppo.main(args)
    found = [float(x["kl"]) for x in rows(folder_of("ppo", args), "train")]
    assert found == [0.5, 5, 2, 20, 3, 30]
    lines = rows(folder_of("ppo", args), "eval")
    for (seeds, out), step, pair in zip(played, (48, 96), (lines[:2], lines[2:]), strict=True):
        assert seeds == [[seed_of(seed, 1, step, e) for e in range(2)] for seed in (0, 1)]
        for i, line in enumerate(pair):
            for name in ("return", "length"):
                assert float(line[name]) == pytest.approx(out[name][i].sum() / 2)
    leaves = jax.tree_util.tree_leaves_with_path(started[0].params)
    kernels = [x for path, x in leaves if "kernel" in jax.tree_util.keystr(path)]
    assert len(kernels) > 3 and all((x[0] != x[1]).any() for x in [started[0].key, *kernels])


# --- rollouts ------------------------------------------------------------------------------------


def test_transitions(here, monkeypatch):
    """Environment after environment, in time: what an action, clipped, led to; the drawn actions
    leave the box. No step joins two episodes, also not from rollout to rollout, and a time-out's
    mask is 1. Each episode starts from a seed of its own."""
    args, seen, started = tiny_ppo(name="seen"), spied(monkeypatch), []
    reset = EnvPool.reset

    def watch(pool, seeds, where=None):
        if pool.shape == (2, 2):
            started.extend(seeds.ravel() if where is None else seeds[where])
        return reset(pool, seeds, where)

    monkeypatch.setattr(EnvPool, "reset", watch)
    args = dataclasses.replace(args, eval_interval=1000, eval_slots=1)
    ppo.main(args)
    assert len(seen) == 4 and seen[0]["actions"].shape == (2, 2, 12, 2)
    whole = {name: np.concatenate([x[name] for x in seen], 2) for name in seen[0]}
    s, after, over = whole["observations"], whole["next_observations"], whole["terminals"] > 0
    position, reward, reached = plane(s, whole["actions"])
    np.testing.assert_allclose(after, position, atol=1e-6)
    np.testing.assert_allclose(whole["rewards"], reward, rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(whole["masks"], 1 - reached)
    assert (np.abs(whole["actions"]) > 1).mean() > 0.1
    assert len(np.unique(whole["actions"])) == whole["actions"].size
    follows = (s[:, :, 1:] == after[:, :, :-1]).all(-1)
    np.testing.assert_array_equal(follows, ~over[:, :, :-1])
    timed_out = over & (whole["masks"] == 1)
    assert timed_out.any()
    for ends, clock in zip(over.reshape(4, -1), timed_out.reshape(4, -1)):
        lengths = np.diff(np.flatnonzero(ends), prepend=-1)
        assert (lengths[clock[ends]] == MULTIGOAL_STEPS).all()
        assert (lengths <= MULTIGOAL_STEPS).all()
    first = [seed_of(seed, 1, e, TRAINING) for seed in (0, 1) for e in range(2)]
    later = []
    for step, agent, e in np.argwhere(over.transpose(2, 0, 1)):
        later.append(seed_of(agent, 1, 2 * (step + 1) + e, TRAINING))
    assert started == first + later and len(set(started)) == 4 + len(later)


def test_statistics_are_frozen_while_playing(here, monkeypatch):
    """Acting sees those of the rollouts before, evaluations those of all; neither changes them."""
    args, seen, act = tiny_ppo(name="frozen"), [], ppo.act

    def spy(args, state, observations, seeds, ages, mode):
        seen.append((mode, float(state.statistics["observations"][0][0])))
        return act(args, state, observations, seeds, ages, mode)

    monkeypatch.setattr(ppo, "act", spy)
    ppo.main(args)
    expected = [("explore", 0.0)] * 12 + [("explore", 24.0)] * 12
    assert seen[:24] == expected and seen[24] == ("mean", 48.0)
    assert set(seen) == {("explore", 24.0 * i) for i in range(4)} | {("mean", 48.0), ("mean", 96.0)}


# --- repetition and continuation -----------------------------------------------------------------

STOPS = dict(  # file and step of the stop; step of the checkpoint then
    multigoal=[
        ("train.csv", 48, None),
        (CHECKPOINT, 48, 48),
        ("train.csv", 72, 48),
        ("train.csv", 96, 48),
        (CHECKPOINT, 96, 96),
    ],
    hopper=[
        ("train.csv", 16, None),
        ("train.csv", 48, 32),
        ("train.csv", 64, 32),
        ("eval.csv", 64, 64),
    ],
)


@pytest.mark.parametrize("env", STOPS)
def test_continues_bit_by_bit(references, here, monkeypatch, env):
    """Stopped again and again, with rows after the last checkpoint or exactly at one, and continued
    in the middle of episodes that began in other rollouts: the end is the same."""
    args, folder, _ = references[env]
    for file, step, left in STOPS[env]:
        with monkeypatch.context() as patch:
            stop_at(patch, file, step)
            run_until_stop(ppo, args)
        path = folder_of("ppo", args)
        assert os.path.exists(f"{path}/{CHECKPOINT}") == bool(left)
        assert not left or checkpoint(path)["step"] == left
    ppo.main(args)
    assert_same(folder_of("ppo", args), folder)


def test_stopped_in_a_rollout(args, reference, here, monkeypatch):
    """Its steps are lost, and played again."""
    step, calls = EnvPool.step, []

    def stopping(pool):
        calls.append(pool.shape == (2, 2))
        if sum(calls) == 29:
            raise KeyboardInterrupt
        return step(pool)

    with monkeypatch.context() as patch:
        patch.setattr(EnvPool, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            ppo.main(dataclasses.replace(args, eval_slots=1))
    assert checkpoint(folder_of("ppo", args))["step"] == 48
    ppo.main(args)
    assert rows(folder_of("ppo", args), "train") == rows(reference[0], "train")


def test_workers_change_nothing(references, here):
    """Two processes that step the environments of training and evaluations."""
    args, folder, _ = references["hopper"]
    ppo.main(dataclasses.replace(args, workers=2))
    assert_same(folder_of("ppo", args), folder)


def test_evaluating_more_often_changes_no_training(args, reference, here):
    """At every rollout's end: the same updates; evaluations of the same step are the same."""
    other = dataclasses.replace(args, eval_interval=20)
    ppo.main(other)
    often, seldom = rows(folder_of("ppo", other), "eval"), rows(reference[0], "eval")
    assert len(often) == 8 and [x for x in often if x in seldom] == seldom
    last = rows(folder_of("ppo", other), "train")[-4:]
    assert last == rows(reference[0], "train")[-4:]
    assert_same_arrays(checkpoint(folder_of("ppo", other)), checkpoint(reference[0]))


def test_agents_alone_and_together(args, reference, here):
    """The second agent is the same without the first one beside it."""
    alone = dataclasses.replace(args, num_seeds=1, seed=1, name="alone")
    ppo.main(alone)
    one, both = (checkpoint(path) for path in (folder_of("ppo", alone), reference[0]))
    parts = [
        [t["state"][name] for name in ("params", "statistics", "returns")] for t in (one, both)
    ]
    for x, y in zip(*map(jax.tree.leaves, parts), strict=True):
        np.testing.assert_allclose(x[0], y[1], rtol=1e-3, atol=1e-3)
    played = both["played"]  # (agents, environments, steps, 2)
    assert not np.allclose(played[0], played[1])
    assert not np.allclose(played[0, 0], played[0, 1])


def test_other_flags_are_refused(args, reference, here):
    """Another value in the same folder: one message that names the flag, and nothing changes."""
    shutil.copytree(reference[0], folder_of("ppo", args))
    with pytest.raises(UserError, match=f"lr: {args.lr} there, 0.5 now"):
        ppo.main(dataclasses.replace(args, lr=0.5))
    with pytest.raises(UserError, match="num_envs: 2 there, 4 now"):
        ppo.main(dataclasses.replace(args, num_envs=4))
    assert contents(folder_of("ppo", args)) == contents(reference[0])


def test_nan_stops_the_run(args, reference, here, monkeypatch):
    """NaN of all agents: step, agent and metric are named, and the last checkpoint stays."""
    with monkeypatch.context() as patch:
        stop_at(patch, "eval.csv", 48)
        run_until_stop(ppo, args)
    before, original = contents(folder_of("ppo", args)), ppo.train_chunk

    def broken(*arguments):
        state, metrics = original(*arguments)
        return state, metrics | dict(critic_loss=jnp.array([jnp.nan, jnp.nan]))

    monkeypatch.setattr(ppo, "train_chunk", broken)
    with pytest.raises(UserError, match="critic_loss of task 1, seed 1 is not finite at step 72"):
        ppo.main(args)
    assert contents(folder_of("ppo", args)) == before


def test_copied_out(script, tmp_path):
    """The script and common/ are all that a run needs."""
    copy_out(script, tmp_path)
    short = tiny_ppo(total_steps=24, eval_episodes=1)
    line = command(script, short, root=tmp_path)
    subprocess.run(line, cwd=tmp_path, env=quick(tmp_path), check=True, capture_output=True)
    assert checkpoint(tmp_path / "runs/ppo/multigoal/default")["step"] == 24


def test_several_agents_with_wide_networks(tmp_path):
    """Several orthogonal matrices of several agents: with `vmap` in place of `lax.map` this program
    never ends on two cores."""
    flags = "--num-seeds 2 --hidden-dims 64 64 64 --rollout-steps 64 --batch-size 32 --epochs 1"
    flags += " --total-steps 64 --log-interval 64 --eval-interval 64 --eval-episodes 1"
    flags += f" --eval-slots 1 --workers 1 --run-dir {tmp_path}"
    line = [sys.executable, *start("baselines/ppo"), *flags.split()]
    subprocess.run(line, cwd=tmp_path, check=True, timeout=200)
