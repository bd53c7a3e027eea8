"""Whole runs on data and in environments that are not OGBench's: what is evaluated, a continued run
with normalised observations, and a run without a simulator."""

import csv
import dataclasses
import json

import gymnasium
import numpy as np
import pytest

import fmer
import qam
from common.agents import load_agent
from common.checkpoints import read_checkpoint
from common.environments import seed_of
from common.flags import configure
from common.workers import Slot
from tests.helpers.environments import TOY
from tests.helpers.flags import ONLINE_LENGTHS, ONLINE_SIZES, TINY

LIMIT = json.dumps(dict(max_episode_steps=9))
LOW, HIGH = -20.272305, 3234.3  # D4RL's reference scores of the hopper


@pytest.fixture(scope="module")
def hopper(tmp_path_factory):
    """Random episodes of Hopper-v5 with D4RL's keys and name."""
    env = gymnasium.make("Hopper-v5")
    env.action_space.seed(0)
    columns = {key: [] for key in ("observations", "actions", "rewards", "terminals", "timeouts")}
    columns["next_observations"] = []
    for seed in range(8):
        state, _ = env.reset(seed=seed)
        over = False
        while not over:
            action = env.action_space.sample()
            after, reward, over, _, _ = env.step(action)
            row = state, action, reward, over, False, after
            for column, x in zip(columns.values(), row, strict=True):
                column.append(x)
            state = after
    path = tmp_path_factory.mktemp("data") / "hopper_medium-v2.npz"
    np.savez(path, **columns)
    return path


def own_args(dataset, folder, **flags):
    known = qam.Args.__dataclass_fields__
    sizes = {key: x for key, x in TINY.items() if key in known and key != "tasks"}
    flags = sizes | dict(num_seeds=2, run_dir=str(folder), name="default") | flags
    env = flags.pop("env", "Hopper-v5")
    return configure(qam.Args, qam.ENV_DEFAULTS, env, dataset=str(dataset), **flags)


def evaluations(folder, script, env):
    with open(folder / script / env / "default/eval.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_returns_and_normalised_scores(hopper, tmp_path, capsys, quick_compile):
    """Hopper reports no success. Offline and online, in eval.csv and on the screen."""
    qam.main(own_args(hopper, tmp_path))
    rows = evaluations(tmp_path, "qam", "Hopper-v5")
    assert [row["step"] for row in rows[::2]] == ["8", "10", "16", "24"]
    assert list(rows[0])[4:] == ["return", "length", "normalized_score"]
    for row in rows:
        expected = 100 * (float(row["return"]) - LOW) / (HIGH - LOW)
        assert np.isclose(float(row["normalized_score"]), expected)
    assert ", normalized_score " in capsys.readouterr().out


def test_a_continued_run_with_normalised_observations(hopper, tmp_path, quick_compile):
    """Stopped in its online phase, it ends with the same bits. The statistics are in its
    checkpoint."""
    flags = dict(normalize_observations=True, reward_scale=0.5)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    qam.main(own_args(hopper, whole, **flags))
    for steps in (9, 14):
        qam.main(own_args(hopper, parts, online_steps=steps, **flags))
    end = "qam/Hopper-v5/default/checkpoint.msgpack"
    first, second = read_checkpoint(whole / end), read_checkpoint(parts / end)
    assert str(first["state"]) == str(second["state"])
    observations = np.load(hopper)["observations"]
    assert first["envs"]["mean"].shape == (11,)
    np.testing.assert_allclose(first["envs"]["mean"], observations.mean(0), rtol=0.2, atol=0.2)


def test_a_loaded_agent_normalises_its_observations(hopper, tmp_path, quick_compile):
    """It plays the first episode of its run's last evaluation. (There, four environments were
    stepped at once, which changes the last digits.)"""
    flags = dict(normalize_observations=True, env_kwargs=LIMIT, max_episode_steps=0)
    qam.main(own_args(hopper, tmp_path, **flags))
    folder = tmp_path / "qam/Hopper-v5/default"
    agent = load_agent(folder)
    slot, policy = Slot(agent.env), agent.policy(seed_of(0, 1, agent.step, 0))
    (state,) = slot.start(policy.seed)
    path, over = [], False
    while not over:
        state, _, _, over, _ = slot.step(policy(state))
        path.append(state)
    assert len(path) <= 9
    with np.load(folder / "rollouts.npz") as file:
        np.testing.assert_allclose(path, file["path0"], rtol=1e-4, atol=1e-5)


def test_without_a_simulator(hopper, tmp_path, quick_compile):
    """It trains and saves, and plays nothing."""
    args = own_args(hopper, tmp_path, env="robot", eval_episodes=0, online_steps=0)
    assert qam.main(args) == []
    folder = tmp_path / "qam/robot/default"
    assert read_checkpoint(folder / "checkpoint.msgpack")["step"] == 10
    assert not (folder / "eval.csv").exists() and (folder / "train.csv").exists()
    agent = load_agent(folder)
    assert agent.env == "robot" and agent.act(np.zeros(11)).shape[-1] == 3


def test_success_and_return_online(tmp_path, quick_compile):
    """Of an environment that reports success, by its id."""
    flags = ONLINE_SIZES | ONLINE_LENGTHS["multigoal"]
    flags = {key: x for key, x in flags.items() if key in fmer.Args.__dataclass_fields__}
    flags |= dict(run_dir=str(tmp_path), name="default")
    args = configure(fmer.Args, fmer.ENV_DEFAULTS, TOY, **flags)
    fmer.main(dataclasses.replace(args, total_steps=30, replay_size=30))
    rows = evaluations(tmp_path, "fmer", TOY)
    assert list(rows[0])[4:7] == ["success", "return", "length"]
    assert {row["success"] for row in rows} <= {"0.0", "0.5", "1.0"}
    config = json.loads((tmp_path / "fmer" / TOY / "default/config.json").read_text())
    assert config["flags"]["env"] == TOY
