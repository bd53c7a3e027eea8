# ruff: noqa: F811 (fixtures are imported, and are names of parameters)
"""Real runs of RLPD, whose training loop is its own: online from the first step, random actions
before training starts, half of every batch from the dataset. What tests/runs/test_script_runs.py
says of any run is tested by its own tests, on this one: evaluations and checkpoints are at steps 8
(the first update is at 10), 16 (in an episode and in a plan of 5 actions) and 24."""

import dataclasses
import os
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from baselines import rlpd
from common.checkpoints import CHECKPOINT
from common.dataset_files import locate
from common.env_pool import EnvPool
from common.environments import resolve, seed_of
from common.errors import UserError
from tests.helpers.flags import ENV, tiny_args
from tests.helpers.run_tests import (  # noqa: F401 (tests that run here, too)
    loop,
    reference,
    test_agents_start_apart,
    test_environments_are_those_of_the_agents,
    test_episodes,
    test_eval_only,
    test_eval_only_needs_a_checkpoint,
    test_evaluations_have_their_seeds,
    test_every_update_has_its_data,
    test_files,
    test_finished_run_stays,
    test_help,
    test_killed_and_continued,
    test_other_flags_are_refused,
    test_pictures,
    test_repeats_bit_by_bit,
    test_rows_are_means_over_updates,
    test_workers_and_slots_change_nothing,
)
from tests.helpers.runs import (
    assert_same,
    checkpoint,
    command,
    copy_out,
    quick,
    rows,
    run_folder,
    run_until_stop,
    stop_at,
)

pytestmark = pytest.mark.usefixtures("quick_compile", "one_process")
FIRST = 10  # step with the first update


@pytest.fixture(scope="module")
def script():
    return "baselines/rlpd"


@pytest.fixture(scope="module")
def module():
    return rlpd


@pytest.fixture(scope="module")
def args(dataset_dir):
    return tiny_args(rlpd, dataset_dir, online_steps=24, start_training=FIRST)


def test_tables(reference):
    """A row per agent at every logged step, in order, all numbers finite. (Row 12 is the mean over
    updates 10 to 12, for the first steps are not followed by one.)"""
    steps = dict(train=[12, 15, 16, 18, 21, 24], eval=[8, 16, 24])
    for table, expected in steps.items():
        lines = rows(reference[0], table)
        assert [int(x["step"]) for x in lines] == [step for step in expected for _ in range(2)]
        assert [int(x["task"]) for x in lines] == [1, 2] * len(expected)
        assert np.isfinite([[float(x) for x in line.values()] for line in lines]).all()


def test_replay_is_saved_whole(reference):
    """The checkpoint holds every transition, and none of the empty slots; there were 15 updates."""
    content = checkpoint(reference[0])
    replay, count = content["replay"], content["state"]["opt_state"]["0"]["count"]
    assert replay["rewards"].shape == (2, 24) and replay["size"] == 24
    assert count.tolist() == [24 - FIRST + 1] * 2
    online = replay["observations"]
    assert not np.array_equal(online[0], online[1])
    np.testing.assert_array_equal(online[:, 1:], replay["next_observations"][:, :-1])


def test_number_of_programs(reference):
    """Training is compiled once; acting once for evaluations and once for the online environments,
    whatever the sizes of the replay."""
    assert reference[1] == (1, 2)


@pytest.mark.parametrize(
    "file, step, left",
    [
        (CHECKPOINT, 8, 8),
        ("eval.csv", 8, 8),
        ("train.csv", 12, 8),
        ("train.csv", 16, 8),
        ("eval.csv", 16, 16),
        ("train.csv", 18, 16),
    ],
    ids=["checkpoint", "before training", "training", "before a checkpoint", "in a plan", "later"],
)
def test_continues_bit_by_bit(script, module, args, reference, here, monkeypatch, file, step, left):
    """Stopped at a step, with the last checkpoint at step `left`, and continued."""
    with monkeypatch.context() as patch:
        stop_at(patch, file, step)
        run_until_stop(module, args)
    if left:
        assert checkpoint(run_folder(script))["step"] == left
    module.main(args)
    assert_same(run_folder(script), reference[0])


def test_continues_before_any_checkpoint(script, module, args, reference, here, monkeypatch):
    """An interrupted `main` can be called again, in the same process."""
    step, calls = EnvPool.step, []

    def interrupted(pool):
        calls.append(pool)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(pool)

    with monkeypatch.context() as patch:
        patch.setattr(EnvPool, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            module.main(args)
    assert set(os.listdir(run_folder(script))) == {".lock", "config.json", "script.py"}
    module.main(args)
    assert_same(run_folder(script), reference[0])


def test_first_actions_are_uniform(script, module, args, here, monkeypatch):
    """Every action before training starts is uniform in the box and its own (per step, not per
    plan), also after a stop; those after it, and all of the evaluations, are the policy's."""
    long = dict(online_steps=303, start_training=301, eval_interval=150, log_interval=303)
    args = dataclasses.replace(args, **long | dict(eval_episodes=1, eval_slots=1))
    asked, act = [], module.act

    def spy(*inputs):
        asked.append(len(asked))
        return 0 * act(*inputs) + 0.5

    monkeypatch.setattr(module, "act", spy)
    with monkeypatch.context() as patch:
        stop_at(patch, "eval.csv", 150)
        run_until_stop(module, args)
    assert len(asked) == 20  # the evaluation's: 100 steps in plans of 5
    module.main(args)
    actions = checkpoint(run_folder(script))["replay"]["actions"]
    assert (actions[:, 300:] == 0.5).all() and len(asked) == 61
    first = actions[:, :300]
    assert len(np.unique(first)) == first.size and np.abs(first).max() <= 1
    assert scipy.stats.kstest(first.ravel(), "uniform", (-1, 2)).pvalue > 1e-3
    lagged = [np.corrcoef(first[:, lag:].ravel(), first[:, :-lag].ravel())[0, 1] for lag in (1, 5)]
    assert np.abs(lagged).max() < 0.15
    assert abs(np.corrcoef(first[0].ravel(), first[1].ravel())[0, 1]) < 0.15
    # nor do they repeat what the environment's reset draws with the episode's seed
    for i, seed in enumerate(range(args.seed, args.seed + len(first))):
        reset = np.random.default_rng(seed_of(seed, args.tasks[0], 0)).uniform(-1, 1, 2)
        assert np.abs(first[i, 0] - reset).min() > 1e-3


def test_agents_alone_and_together(script, module, args, reference, here):
    """The agent of task 2 is the same without task 1 beside it."""
    module.main(dataclasses.replace(args, tasks=(2,), name="alone"))
    alone = checkpoint(os.path.abspath(f"runs/rlpd/{ENV}/alone"))
    both = checkpoint(reference[0])
    assert alone["replay"].pop("size") == both["replay"].pop("size")
    np.testing.assert_array_equal(
        alone["replay"]["actions"][0, : FIRST - 1], both["replay"]["actions"][1, : FIRST - 1]
    )
    trees = [jax.tree.leaves((x["state"]["params"], x["replay"])) for x in (alone, both)]
    for x, y in zip(*trees, strict=True):
        np.testing.assert_allclose(x[0], y[1], rtol=1e-3, atol=1e-3)


def test_shards_swap_the_offline_half(script, module, args, here, dataset_dir, monkeypatch):
    """With shards that change every 8 steps, updates see the dataset of their step and the whole
    replay; stopped and continued, the run is the same."""
    with np.load(f"{dataset_dir}/pointmaze-medium-navigate-v0.npz") as file:
        arrays = dict(file)
    actions = [np.roll(arrays["actions"], i, axis=0) for i in range(3)]
    for i in range(3):
        np.savez(f"pointmaze-medium-navigate-{i}.npz", **arrays | dict(actions=actions[i]))
    assert len(locate(resolve(ENV), str(here))) == 3
    args = dataclasses.replace(args, dataset_dir=str(here))
    monkeypatch.setattr("common.datasets.SWAP_INTERVAL", 8)
    seen, train = [], module.train_chunk

    def spy(args, state, metrics, data, replay, task_rows, updates):
        seen.append((np.array(data.actions[0]), replay.size.tolist(), updates))
        return train(args, state, metrics, data, replay, task_rows, updates)

    monkeypatch.setattr(module, "train_chunk", spy)
    module.main(args)
    assert len(seen) == 24
    for step, (first, size, updates) in enumerate(seen, 1):
        assert size == [step, step] and updates == (1 if step >= FIRST else 0)
        np.testing.assert_array_equal(first, np.float32(actions[step // 8 % 3][0]))
    shutil.move(run_folder(script), "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, CHECKPOINT, 16)
        run_until_stop(module, args)
    module.main(args)
    assert_same(run_folder(script), "whole")


def test_nan_stops_the_run(script, module, args, here, monkeypatch):
    """NaN of all agents: step, agent and metric are named, and the last checkpoint stays."""
    original = module.train_chunk

    def broken(*arguments):
        state, metrics = original(*arguments)
        return state, metrics | dict(critic_loss=jnp.array([jnp.nan, jnp.nan]))

    monkeypatch.setattr(module, "train_chunk", broken)
    with pytest.raises(UserError, match="critic_loss of task 2, seed 0 is not finite at step 12"):
        module.main(args)
    assert checkpoint(run_folder(script))["step"] == 8


def test_copied_out(script, args, tmp_path):
    """The script and common/ are all that a run needs."""
    copy_out(script, tmp_path)
    short = dataclasses.replace(args, online_steps=6, start_training=5, eval_episodes=1)
    line = command(script, short, root=tmp_path)
    subprocess.run(line, cwd=tmp_path, env=quick(tmp_path), check=True, capture_output=True)
    assert checkpoint(tmp_path / "runs/rlpd" / ENV / "default")["step"] == 6
