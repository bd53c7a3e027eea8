# ruff: noqa: F811 (fixtures are imported, and are names of parameters)
"""Real runs of every offline script, of seconds each: what they leave, that they repeat bit by bit,
and that stops, kills and continuations change nothing. All are compared with one uninterrupted run
per script, whose evaluations and checkpoints are at steps 8 and 10 (offline), 16 (in an episode)
and 24.

What depends on a script's own state and acting is tested for all of them (`every_script`), what
only the shared blocks decide for one.
"""

import dataclasses
import os
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.checkpoints import CHECKPOINT
from common.errors import UserError
from tests.helpers.flags import ENV, tiny_args
from tests.helpers.run_tests import (  # noqa: F401 (tests that run here, too)
    every_script,
    loop,
    pytest_generate_tests,
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
    Stop,
    assert_same,
    assert_same_arrays,
    checkpoint,
    command,
    contents,
    copy_out,
    flags_of,
    poisoned,
    quick,
    rows,
    run_folder,
    run_until_stop,
    stop_at,
)
from tools.shared_blocks import named

FULLY = ["qam"]  # paths without .py
APART = ["baselines/rlpd"]  # with shared blocks of its own, tested in its own file
EVERY = FULLY + [name for name in named("offline") if name not in FULLY + APART]
pytestmark = pytest.mark.usefixtures("quick_compile", "one_process")


@pytest.fixture(scope="module")
def args(module, dataset_dir):
    return tiny_args(module, dataset_dir)


def interrupt(*arguments):
    raise KeyboardInterrupt


# --- what a run leaves ---------------------------------------------------------------------------


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


def test_replay_is_saved_whole(reference):
    """The checkpoint holds every online transition, and none of the empty slots."""
    replay = checkpoint(reference[0])["replay"]
    assert replay["rewards"].shape == (2, 14) and replay["size"] == 14
    online = replay["observations"]
    assert not np.array_equal(online[0], online[1])
    np.testing.assert_array_equal(online[:, 1:], replay["next_observations"][:, :-1])


@every_script
def test_number_of_programs(reference):
    """Training is compiled once per phase (without and with a replay), whatever the chunks; acting
    once for evaluations and once for the online environments."""
    assert reference[1] == (2, 2)


# --- repetition and continuation -----------------------------------------------------------------


@every_script
def test_continues_in_both_phases(script, module, args, reference, here, monkeypatch):
    """Stopped offline, then within an online episode, and continued: bit for bit the same."""
    for step in (9, 18):
        with monkeypatch.context() as patch:
            stop_at(patch, "train.csv", step)
            run_until_stop(module, args)
    module.main(args)
    assert_same(run_folder(script), reference[0])


@pytest.mark.parametrize(
    "file, step",
    [
        ("train.csv", 9),
        ("train.csv", 16),
        (CHECKPOINT, 16),
        ("eval.csv", 16),
        ("train.csv", 18),
        (CHECKPOINT, 24),
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
def test_continues_bit_by_bit(script, module, args, reference, here, monkeypatch, file, step):
    """Stopped at a step, with rows after the last checkpoint or exactly at one, and continued: an
    evaluation that is missing at a checkpoint is made up for."""
    with monkeypatch.context() as patch:
        stop_at(patch, file, step)
        run_until_stop(module, args)
    left = {9: 8, 16: 10, 18: 16}[step] if file == "train.csv" else step
    assert checkpoint(run_folder(script))["step"] == left
    evaluated = max(int(row["step"]) for row in rows(run_folder(script), "eval"))
    assert (evaluated < left) == (file == CHECKPOINT)
    module.main(args)
    assert_same(run_folder(script), reference[0])


def test_a_missing_evaluation_stays_due(script, module, args, reference, here, monkeypatch):
    """Also where the run is stopped a second time before it, and --eval-only does not count."""
    for _ in range(2):
        with monkeypatch.context() as patch:
            stop_at(patch, CHECKPOINT, 8)
            patch.setattr(module, "evaluate", interrupt)
            with pytest.raises((Stop, KeyboardInterrupt)):
                module.main(args)
        assert not os.path.exists(f"{run_folder(script)}/eval.csv")
    module.main(dataclasses.replace(args, eval_only=True))
    assert not os.path.exists(f"{run_folder(script)}/eval.csv")
    module.main(args)
    assert_same(run_folder(script), reference[0])


@pytest.mark.parametrize("seconds, expected", [(0.0, [1] * 30), (1e9, [1, 2, 4, 8, 5, 10])])
def test_length_of_calls_changes_nothing(
    script, module, args, reference, here, monkeypatch, seconds, expected
):
    """A call has one update where a single one takes long; where it takes no time, twice as many
    as the call before, up to the next step at which something is due: the same bits."""
    original, calls = module.train_chunk, []

    def spy(args, state, metrics, data, replay, task_rows, updates):
        calls.append(updates)
        return original(args, state, metrics, data, replay, task_rows, updates)

    monkeypatch.setattr(module, "train_chunk", spy)
    monkeypatch.setattr("common.run.SECONDS_PER_CALL", seconds)
    module.main(args)
    assert_same(run_folder(script), reference[0])
    calls.clear()
    longer = dataclasses.replace(args, name="longer", online_steps=0, eval_interval=100)
    longer = dataclasses.replace(longer, offline_steps=30, log_interval=20)
    module.main(longer)
    assert calls == expected


def test_more_updates(script, module, args, reference, here):
    """A larger --offline-steps continues a finished run: bit for bit as in one long run, whose rows
    it also has where the shorter run's end is no step that is logged in any case. So does
    --online-steps after the offline phase."""
    for length in (3, 8, 10):
        module.main(dataclasses.replace(args, offline_steps=length, online_steps=0))
        assert checkpoint(run_folder(script))["step"] == length
    assert flags_of(run_folder(script))["offline_steps"] == 10
    module.main(args)
    assert rows(run_folder(script), "eval")[2:] == rows(reference[0], "eval")
    assert rows(run_folder(script), "train") == rows(reference[0], "train")
    assert_same_arrays(checkpoint(run_folder(script)), checkpoint(reference[0]))


def test_more_environment_steps(script, module, args, reference, here):
    """A larger --online-steps continues a finished run, too."""
    module.main(dataclasses.replace(args, online_steps=6))
    module.main(args)
    assert_same(run_folder(script), reference[0])


def test_other_phases_are_refused(script, module, args, reference, here, monkeypatch):
    """Once the online phase has begun, --offline-steps stays, however often somebody tries; before,
    it is at least the number of updates made. Nothing changes in the folder but the flags."""
    with monkeypatch.context() as patch:
        stop_at(patch, CHECKPOINT, 10)
        run_until_stop(module, args)
    for _ in range(2):
        with pytest.raises(UserError, match="--offline-steps must be at least 10"):
            module.main(dataclasses.replace(args, offline_steps=9))
    with monkeypatch.context() as patch:
        stop_at(patch, CHECKPOINT, 16)
        run_until_stop(module, args)
    before = contents(run_folder(script))
    del before["config.json"]
    for steps in (9, 9, 12, 12, 0):
        with pytest.raises(UserError, match="--offline-steps must stay 10"):
            module.main(dataclasses.replace(args, offline_steps=steps))
        assert before.items() <= contents(run_folder(script)).items()
    module.main(args)
    assert_same(run_folder(script), reference[0])


def test_intervals_are_free(script, module, args, reference, here, monkeypatch):
    """Other intervals continue a run, with the same updates."""
    with monkeypatch.context() as patch:
        stop_at(patch, "train.csv", 9)
        run_until_stop(module, args)
    module.main(dataclasses.replace(args, log_interval=2, eval_interval=12, eval_episodes=1))
    assert [int(row["step"]) for row in rows(run_folder(script), "eval")][::2] == [8, 10, 12, 24]
    mine, others = checkpoint(run_folder(script)), checkpoint(reference[0])
    for name in ("state", "replay", "envs"):
        assert_same_arrays(mine[name], others[name])


# --- failures ------------------------------------------------------------------------------------


def test_divergence_stops_the_run(script, module, args, here):
    """A learning rate of 1e30: the run ends with a message, without a checkpoint of infinities."""
    with pytest.raises(UserError, match=r"\w+ of task 2, seed 0 is not finite at step \d+"):
        module.main(dataclasses.replace(args, lr=1e30))
    assert not os.path.exists(f"{run_folder(script)}/checkpoint.msgpack")


def test_nan_stops_the_run(script, module, args, here, monkeypatch, capsys):
    """NaN of one agent after the other: step, agent and metric are named; with the last agent the
    run ends, and the last checkpoint stays."""
    with monkeypatch.context() as patch:
        stop_at(patch, CHECKPOINT, 8)
        run_until_stop(module, args)
    before, original = contents(run_folder(script))["checkpoint.msgpack"], module.train_chunk

    def broken(*arguments):
        state, metrics = original(*arguments)
        return state, metrics | dict(critic_loss=jnp.array([jnp.nan, jnp.nan]))

    monkeypatch.setattr(module, "train_chunk", broken)
    with pytest.raises(UserError, match="critic_loss of task 2, seed 0 is not finite at step 9"):
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
    mine, others = (checkpoint(folder) for folder in (run_folder(script), reference[0]))
    assert all(np.isnan(x[1]).all() for x in jax.tree.leaves(mine["state"]["params"]))
    assert mine["replay"].pop("size") == others["replay"].pop("size")
    for name in ("state", "replay"):
        for x, y in zip(jax.tree.leaves(mine[name]), jax.tree.leaves(others[name]), strict=True):
            np.testing.assert_array_equal(x[0], y[0])


def test_the_offline_phase_ends_with_an_evaluation(script, module, args, here):
    """Wherever it ends, and with a checkpoint."""
    module.main(dataclasses.replace(args, offline_steps=3, online_steps=4, eval_interval=100))
    steps = {row["step"] for row in rows(run_folder(script), "eval")}
    assert steps == {"3", "7"} and checkpoint(run_folder(script))["step"] == 7


# --- in a fresh interpreter ----------------------------------------------------------------------


def test_copied_out(script, args, tmp_path):
    """The script and common/ are all that a run needs."""
    copy_out(script, tmp_path)
    short = dataclasses.replace(args, offline_steps=2, online_steps=0, eval_episodes=1)
    line = command(script, short, root=tmp_path)
    subprocess.run(line, cwd=tmp_path, env=quick(tmp_path), check=True, capture_output=True)
    folder = tmp_path / "runs" / os.path.basename(script) / ENV / "default"
    assert checkpoint(folder)["step"] == 2
