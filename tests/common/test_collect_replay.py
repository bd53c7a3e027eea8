"""A run's replay as a dataset of Minari: the same transitions, in the environment's own range."""

import numpy as np
import pytest

from baselines import sac
from common.collect import replay
from common.collect.replay import convert, episodes_of, main
from common.flags import configure
from tests.helpers.messages import stops


@pytest.fixture(scope="module")
def folder(tmp_path_factory, quick_compile):
    """A run of two agents in Pendulum-v1, whose episodes are cut off after 7 steps."""
    root = tmp_path_factory.mktemp("runs")
    flags = dict(total_steps=24, warmup_steps=22, eval_interval=12, eval_episodes=0, workers=1)
    flags |= dict(hidden_dims=(8,), batch_size=4, num_seeds=2, name="x", run_dir=str(root))
    sac.main(configure(sac.Args, {}, "Pendulum-v1", max_episode_steps=7, **flags))
    return root / "sac/Pendulum-v1/x"


@pytest.fixture
def minari(tmp_path, monkeypatch):
    """Minari, with a folder of its own."""
    pytest.importorskip("h5py")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return pytest.importorskip("minari")


def test_the_dataset_is_the_replay(folder, minari):
    """Episode by episode and agent by agent, with rewards of the actions as they were played."""
    returns = convert(str(folder), "pendulum/sac-v0", scores=(-9.0, 1.0))
    data = minari.load_dataset("pendulum/sac-v0")
    assert [len(episode) for episode in data] == [7, 7, 7, 3] * 2
    assert data.storage.metadata["ref_min_score"] == -9
    assert data.env_spec.id == "Pendulum-v1" and data.env_spec.max_episode_steps == 7
    env = data.recover_environment()
    for total, episode in zip(returns, data, strict=True):
        assert total == pytest.approx(episode.rewards.sum(), rel=1e-6)
        assert abs(episode.actions).max() <= 2
        assert episode.truncations.tolist() == [False] * (len(episode) - 1) + [True]
        assert not episode.terminations.any()
        env.reset(seed=0)
        x, y, speed = episode.observations[0]
        env.unwrapped.state = np.array([np.arctan2(y, x), speed])
        for action, reward, after in zip(
            episode.actions, episode.rewards, episode.observations[1:], strict=True
        ):
            expected, real, *_ = env.step(action)
            np.testing.assert_allclose(after, expected, atol=1e-4)
            assert real == pytest.approx(reward, abs=1e-3)


def test_only_the_first_transitions(folder, minari):
    convert(str(folder), "pendulum/first-v0", first=9)
    assert [len(x) for x in minari.load_dataset("pendulum/first-v0")] == [7, 2] * 2


def test_episodes():
    """One that terminates, one that is cut off by the clock, one that still runs."""
    rows = dict(terminals=np.array([0, 1, 1, 0, 0]), rewards=np.arange(5))
    assert [x["rewards"].tolist() for x in episodes_of(rows)] == [[0, 1], [2], [3, 4]]
    rows = dict(terminals=np.array([0, 1]), rewards=np.arange(2))
    assert [x["rewards"].tolist() for x in episodes_of(rows)] == [[0, 1]]


def test_runs_without_a_replay(tmp_path, minari):
    stops(f"{tmp_path} is not a run", call=lambda: convert(str(tmp_path), "a/b-v0"))
    with pytest.raises(SystemExit, match=r"error: .* is not a run"):
        main([str(tmp_path), "a/b-v0"])


def test_ctrl_c_ends_it_in_one_line(minari, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(replay, "read_replay", interrupted)
    with pytest.raises(SystemExit, match="^\ninterrupted$"):
        main(["runs/sac/Pendulum-v1/x", "a/b-v0"])
