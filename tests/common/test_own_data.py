"""Tests of data of one's own: trajectories of D4RL's and Minari's layouts, ranges of actions, what
is not used, reference scores, and files that end in a line."""

import builtins
import dataclasses
from functools import partial

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qam
from common.datasets import OfflineDataset
from common.env_pool import EnvPool
from common.flags import configure, parse
from common.own_data import read_own, recorded_in, to_dataset
from common.sampling import Replay, sample
from tests.helpers.environments import noise, step
from tests.helpers.messages import stops

LENGTHS = (3, 1, 4, 2)  # transitions of each episode; the second and the last one terminate
T = sum(LENGTHS)


def transitions(final=True):
    """Transitions of four episodes: a state is (episode, age), a reward 10 * episode + age."""
    rows = []
    for episode, length in enumerate(LENGTHS):
        for age in range(length):
            over = age == length - 1
            terminated = over and episode in (1, 3)
            state, after = (episode, age), (episode, age + 1)
            rows.append((state, 10 * episode + age, terminated, over and not terminated, after))
    states, rewards, terminals, timeouts, following = map(np.array, zip(*rows))
    arrays = dict(
        observations=np.float32(states),
        actions=np.float32(np.stack([rewards, -rewards], 1) / 100),
        rewards=np.float32(rewards),
        terminals=terminals,
        timeouts=timeouts,
    )
    if final:
        arrays["next_observations"] = np.float32(following)
    return arrays


def args(dataset, **flags):
    flags = dict(eval_episodes=0, chunk_length=1) | flags
    env = flags.pop("env", "none")
    return configure(qam.Args, qam.ENV_DEFAULTS, env, dataset=str(dataset), **flags)


def save(folder, name="data.npz", **arrays):
    np.savez(folder / name, **arrays)
    return folder / name


def check_transitions(data, rewards):
    """Each transition goes on within its own episode, in order."""
    rows = data.rows
    for i, reward in enumerate(rewards):
        episode, age = reward // 10, reward % 10
        assert data.rewards[0, i] == reward
        assert data.observations[rows[i]].tolist() == [episode, age]
        if data.masks[0, i]:
            assert data.observations[rows[i] + 1].tolist() == [episode, age + 1]
        ends = i == len(rewards) - 1 or rewards[i + 1] // 10 != episode
        assert data.terminals[i] == ends


# --- trajectories --------------------------------------------------------------------------------


@pytest.mark.parametrize("timeouts", [True, False])
def test_next_observations_are_used(timeouts):
    """All transitions are kept, and the final states too; without `timeouts` the jumps from one
    episode to the next say where they end."""
    arrays = transitions()
    if not timeouts:
        del arrays["timeouts"]
    data = to_dataset(arrays)
    rewards = arrays["rewards"].astype(int)
    check_transitions(data, rewards)
    assert data.observations.shape == (T + len(LENGTHS), 2)
    assert np.array_equal(data.observations[data.rows + 1], arrays["next_observations"])
    assert np.array_equal(data.masks[0], ~arrays["terminals"])


def test_without_next_observations():
    """The last row before a time-out is the final state. Nothing is known behind the last row."""
    arrays = transitions(final=False)
    check_transitions(to_dataset(arrays), [0, 1, 10, 20, 21, 22, 30, 31])
    arrays["timeouts"] |= arrays["terminals"]
    arrays["terminals"] = np.zeros(T, bool)
    check_transitions(to_dataset(arrays), [0, 1, 20, 21, 22, 30])


def test_no_chunk_joins_two_episodes():
    """As the methods draw them: valid chunks have one episode's rewards, and its last state."""
    data = jax.tree.map(jnp.asarray, to_dataset(transitions()))
    replay = jax.tree.map(lambda x: x[0], Replay.create(1, 0, 2, 2))
    batch = sample(jax.random.PRNGKey(0), data, replay, 0, 200, 2, 1.0)
    valid = np.asarray(batch.valid) == 1
    start, end = batch.observations[valid], batch.next_observations[valid]
    assert 0 < valid.sum() < 200
    assert np.array_equal(end - start, np.tile([0, 2], (valid.sum(), 1)))
    assert np.array_equal(batch.rewards[valid], 20 * start[:, 0] + 2 * start[:, 1] + 1)


# --- files ---------------------------------------------------------------------------------------


def test_other_names_of_keys_and_what_is_not_used(tmp_path, capsys):
    """Gymnasium's names; `infos` of any shape."""
    arrays = transitions()
    expected, _ = read_own(args(save(tmp_path, **arrays)))
    arrays["terminations"] = arrays.pop("terminals")
    arrays["truncations"] = arrays.pop("timeouts")
    path = save(tmp_path, "other.npz", **arrays, qpos=np.zeros((2, 3)), note=np.array("text"))
    capsys.readouterr()
    data, _ = read_own(args(path))
    said = capsys.readouterr().out.splitlines()[0]
    assert said == "not used     note, qpos"
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(data), strict=True):
        assert np.array_equal(x, y)


def test_hdf5(tmp_path, capsys):
    """D4RL's layout, whose groups are not used; reference scores by the name of the file."""
    h5py = pytest.importorskip("h5py")
    arrays = transitions()
    expected, same = read_own(args(save(tmp_path, **arrays)))
    for name, scores in (("hopper_medium_replay-v2", [-20.272305, 3234.3]), ("mine", None)):
        path = tmp_path / f"{name}.hdf5"
        with h5py.File(path, "w") as file:
            for key, x in arrays.items():
                file[key] = x
            file["infos/qpos"] = np.zeros((T, 3))
        capsys.readouterr()
        data, identity = read_own(args(path))
        first, second = capsys.readouterr().out.splitlines()
        assert first == "not used     infos" and "unknown environment 'none'" in second
        assert identity.pop("reference_scores", None) == scores
        assert identity == same
        for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(data), strict=True):
            assert np.array_equal(x, y)


def test_the_identity_is_that_of_the_content(tmp_path):
    found = set()
    for i, key in enumerate(("none", "observations", "actions", "rewards", "terminals")):
        arrays = transitions()
        if key in arrays:
            arrays[key][0] = 1 - arrays[key][0] / 2
        found.add(read_own(args(save(tmp_path, f"{i}.npz", **arrays)))[1]["checksum"])
    assert len(found) == 5


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(rewards=None), "['rewards'] are missing"),
        (dict(terminals=None), "['terminals'] are missing"),
        (dict(timeouts=None, next_observations=None), "where episodes are cut off"),
        (dict(timeouts=np.full(T, 2)), "'timeouts' is in [0, 2]"),
        (dict(terminals=np.full(T, 0.5)), "'terminals' is in [0, 0.5]"),
        (dict(rewards=np.zeros((T, 1))), f"expected {T} rows of numbers in 1 axes"),
        (dict(rewards=np.full(T, np.nan)), "'rewards' is in [nan, nan]"),
        (dict(observations=np.zeros((T, 2, 2))), "'observations' is float64"),
        (dict(observations=np.zeros((T - 1, 2))), "'observations' is float64"),
        (dict(next_observations=np.full((T, 2), "x")), "'next_observations' is <U1"),
        (dict(next_observations=np.zeros((T, 1))), "have different widths"),
        (dict(rewards=np.float32(1)), "(10, 2), expected 1 rows of numbers"),
        (dict(terminations=np.zeros(T)), "'terminations' and 'terminals' are the same thing"),
        (dict(actions=np.full((T, 2), 1.5)), "'actions' is in [0, 1.5]"),
        ({key: x[:0] for key, x in transitions().items()}, "no transitions"),
    ],
)
def test_files_that_are_refused(tmp_path, change, words):
    arrays = transitions() | change
    arrays = {key: x for key, x in arrays.items() if x is not None}
    path = save(tmp_path, **arrays)
    stops(f"bad dataset {path}: ", words, call=lambda: read_own(args(path)))


def test_episodes_of_a_single_step(tmp_path):
    """Without next observations nobody knows where their actions led."""
    cut = dict(terminals=np.zeros(T), timeouts=np.ones(T))
    path = save(tmp_path, **transitions(final=False) | cut)
    stops("nothing says where", "next_observations", call=lambda: read_own(args(path)))
    read_own(args(save(tmp_path, **transitions() | cut)))


@pytest.mark.parametrize("name", ["none.npz", "none.hdf5", "text.npz", "text.hdf5"])
def test_files_that_are_none(tmp_path, name):
    pytest.importorskip("h5py")
    (tmp_path / "text.npz").write_text("text")
    (tmp_path / "text.hdf5").write_text("text")
    stops(f"bad dataset {tmp_path / name}: ", call=lambda: read_own(args(tmp_path / name)))


@pytest.mark.parametrize("package, name", [("h5py", "x.hdf5"), ("minari", "minari:x/y-v0")])
def test_a_missing_package(monkeypatch, package, name):
    load = builtins.__import__

    def missing(wanted, *rest, **more):
        if wanted.split(".")[0] == package:
            raise ImportError(wanted)
        return load(wanted, *rest, **more)

    monkeypatch.setattr("importlib.import_module", missing)
    words = f"{package} is missing", 'pip install "minari[hdf5]"'
    stops(*words, call=lambda: read_own(args(name)))


# --- environments --------------------------------------------------------------------------------


def pendulum(**change):
    """Two rows of data of Pendulum-v1, whose actions are in [-2, 2]."""
    arrays = dict(
        observations=np.zeros((2, 3)),
        actions=np.array([[-2.0], [1.0]]),
        rewards=np.zeros(2),
        terminals=np.zeros(2),
        timeouts=np.zeros(2),
        next_observations=np.zeros((2, 3)),
    )
    return arrays | change


def test_actions_are_rescaled_as_those_of_the_environment(tmp_path):
    """And are kept off the ends, as those of OGBench's files."""
    path = save(tmp_path, **pendulum())
    data, _ = read_own(args(path, env="Pendulum-v1", eval_episodes=1))
    np.testing.assert_allclose(data.actions, [[-1 + 1e-5], [0.5]])
    stops("'actions' is in [-2, 1]", call=lambda: read_own(args(path)))


def test_an_environment_of_other_sizes(tmp_path):
    path = save(tmp_path, **pendulum())
    hopper = args(path, env="Hopper-v5", eval_episodes=1)
    stops("widths [3, 1]", "expected [11, 3] for Hopper-v5", call=lambda: read_own(hopper))


def test_an_environment_is_needed_only_for_episodes(tmp_path):
    """Its name is the file's unless another one is given."""
    path = save(tmp_path, "robot.npz", **transitions())
    flags = parse(qam.Args, qam.ENV_DEFAULTS, ["--dataset", str(path), "--eval-episodes", "0"])
    assert flags.env == "robot" and "dataset=" in flags.name
    read_own(flags)
    for more in (dict(eval_episodes=1), dict(online_steps=1)):
        change = dataclasses.replace(flags, **more)
        stops("unknown environment 'robot'", call=lambda change=change: read_own(change))


def test_an_ogbench_environment_with_other_rewards(tmp_path):
    """Its tuned values hold, its protocol's rewards do not."""
    flags = args("x.npz", env="scene", tasks=(3,))
    assert flags.inv_temp == qam.ENV_DEFAULTS["scene"]["inv_temp"] and not flags.sparse


def test_a_task_in_the_name_of_an_ogbench_environment(tmp_path, capsys):
    """It is the one that is played, with the tuned values of its domain."""
    line = ["--dataset", str(save(tmp_path, **transitions())), "--env"]
    flags = parse(qam.Args, qam.ENV_DEFAULTS, [*line, "scene-play-singletask-task3-v0"])
    assert flags.tasks == (3,) and flags.inv_temp == qam.ENV_DEFAULTS["scene"]["inv_temp"]
    assert "No tuned" not in capsys.readouterr().out


def test_the_same_data_whether_or_not_episodes_are_played(tmp_path, capsys):
    """Rescaled and recognised alike, so an evaluation or an online phase may follow."""
    path = save(tmp_path, **pendulum())
    played, not_played = (
        read_own(args(path, env="Pendulum-v1", eval_episodes=episodes)) for episodes in (1, 0)
    )
    assert np.array_equal(played[0].actions, not_played[0].actions)
    assert played[1] == not_played[1]
    other = pendulum(rewards=np.ones(2))
    changed = read_own(args(save(tmp_path, "other.npz", **other), env="Pendulum-v1"))
    assert changed[1] != played[1]
    small = save(tmp_path, "small.npz", **pendulum(actions=np.zeros((2, 1))))
    unknown = read_own(args(small, env="none"))  # as they are
    assert "as they are, in [-1, 1], because" in capsys.readouterr().out
    assert read_own(args(small, env="Pendulum-v1"))[1] != unknown[1]  # of another range
    wide = save(tmp_path, "hopper.npz", **pendulum(actions=np.zeros((2, 1))))
    read_own(args(wide, env="hopper"))  # a file's name alone; nothing is played there


def test_a_folder_is_no_dataset(tmp_path):
    for folder in (tmp_path, "."):
        flags = ["--dataset", str(folder)]
        stops("is a folder", call=lambda x=flags: parse(qam.Args, qam.ENV_DEFAULTS, x))


def test_sparse_rewards_are_ogbenchs(tmp_path):
    path = save(tmp_path, **transitions())
    stops("--sparse is about OGBench", call=lambda: read_own(args(path, sparse=True)))


# --- Minari --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Datasets of Minari: of a Dict environment with arguments, and of pendulums."""
    minari = pytest.importorskip("minari")
    pytest.importorskip("h5py")
    patch = pytest.MonkeyPatch()
    patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
    scores = dict(ref_min_score=-10.0, ref_max_score=30.0, num_episodes_average_score=1)
    reach = gymnasium.make("gymnasium_robotics:FetchReach-v4", max_episode_steps=6)
    pendulum = partial(gymnasium.make, "Pendulum-v1", max_episode_steps=5)
    for name, env, more in (
        ("fetch/tiny-v0", reach, {}),
        ("pendulum/tiny-v0", pendulum(), scores),
        ("pendulum/wrapped-v0", gymnasium.wrappers.RescaleAction(pendulum(), -1, 1), {}),
        ("pendulum/eval-v0", pendulum(), dict(eval_env="Pendulum-v1")),
        ("pendulum/cut-v0", pendulum(), {}),
        ("cartpole/tiny-v0", gymnasium.make("CartPole-v1", max_episode_steps=5), {}),
    ):
        collector = minari.DataCollector(env)
        for seed in range(3):
            collector.reset(seed=seed)
            collector.action_space.seed(seed)
            over = False
            while not over:
                *_, over, _ = collector.step(collector.action_space.sample())
        collector.create_dataset(name, **more)
    yield minari
    patch.undo()


def test_minari_of_a_dict(recorded):
    """Observations are those that the environment's wrapper shows; the environment is known."""
    name = "minari:fetch/tiny-v0"
    flags = recorded_in(name)
    assert flags == dict(
        env="gymnasium_robotics:FetchReach-v4",
        env_kwargs='{"reward_type": "sparse"}',
        max_episode_steps=6,
    )
    data, identity = read_own(args(name, **flags, eval_episodes=1))
    assert data.rewards.shape == (1, 18) and set(identity) == {"checksum"}
    assert data.terminals.tolist() == ([0] * 5 + [1]) * 3 and data.masks.all()
    episode = recorded.load_dataset("fetch/tiny-v0")[1]
    space = recorded.load_dataset("fetch/tiny-v0").observation_space
    for age in range(7):
        state = {key: x[age] for key, x in episode.observations.items()}
        flat = gymnasium.spaces.flatten(space, state)
        assert np.array_equal(data.observations[7 + age], np.float32(flat))


def test_minari_rescales_actions_and_knows_scores(recorded):
    """Also where no environment is made."""
    name = "minari:pendulum/tiny-v0"
    data, identity = read_own(args(name, env=""))
    assert identity["reference_scores"] == [-10, 30]
    actions = np.concatenate([x.actions for x in recorded.load_dataset("pendulum/tiny-v0")])
    np.testing.assert_allclose(data.actions, actions / 2, atol=2e-5)
    flags = parse(qam.Args, qam.ENV_DEFAULTS, ["--dataset", name])
    assert (flags.env, flags.max_episode_steps) == ("Pendulum-v1", 5)
    assert flags.name == "dataset=minari:pendulum-tiny-v0"


def test_minari_names_wrappers_that_are_not_used(recorded, capsys):
    """Those that gymnasium.make adds are not among them."""
    for name, words in (("wrapped-v0", "wrappers of the recorded environment: RescaleAction\n"),
                        ("tiny-v0", "")):  # fmt: skip
        read_own(args(f"minari:pendulum/{name}", env=""))
        (first, *_) = capsys.readouterr().out.splitlines(keepends=True)
        assert first.endswith(words or "nothing\n")


def test_minari_knows_an_environment_for_evaluations(recorded):
    """It is the one that is played: that of the recording may never end."""
    flags = recorded_in("minari:pendulum/eval-v0")
    assert (flags["env"], flags["max_episode_steps"]) == ("Pendulum-v1", 200)


def test_minari_of_other_actions(recorded):
    """And a damaged file."""
    stops("its actions are Discrete(2)", call=lambda: read_own(args("minari:cartpole/tiny-v0")))
    (file,) = recorded.load_dataset("pendulum/cut-v0").storage.data_path.glob("*.hdf5")
    file.write_bytes(file.read_bytes()[:-1000])
    stops(
        "bad dataset minari:pendulum/cut-v0", call=lambda: read_own(args("minari:pendulum/cut-v0"))
    )


def test_minari_without_the_dataset(recorded):
    words = "Dataset none/x-v0 not found locally", "minari download none/x-v0"
    stops(*words, call=lambda: read_own(args("minari:none/x-v0")))


# --- what the agents see -------------------------------------------------------------------------


def test_rewards_are_scaled_then_shifted(tmp_path):
    """Of the data and of the environments."""
    path = save(tmp_path, **transitions())
    dataset = OfflineDataset(args(path, reward_scale=0.5, reward_shift=-3.0), 1)
    expected = np.float32(transitions()["rewards"]) * 0.5 - 3
    assert np.array_equal(dataset.at(0).rewards[0], expected)
    label = dataset.relabel(dict(rewards=np.float32([[2]]), masks=1))
    assert label == dict(rewards=np.float32([[-2]]), masks=1)


def test_observations_are_normalised(tmp_path, new_pool):
    """By the data's statistics: those of the data, those that the policy sees, and those of the
    replay. What the pool saves says how."""
    states = np.array([[0, 1, 2], [2, 5, 2.0]])
    path = save(tmp_path, **pendulum(observations=states, actions=np.zeros((2, 1))))
    dataset = OfflineDataset(args(path, normalize_observations=True), 1)
    states = np.float32(dataset.at(0).observations)
    np.testing.assert_allclose(states.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(states.std(0)[:2], 1, atol=2e-3)
    plain = new_pool(["Pendulum-v1"], 1, 1)
    pool = EnvPool(["Pendulum-v1"], 1, 1, dataset.normalization)
    assert plain.save().keys() == pool.save().keys() - {"mean", "std"}
    mean, std = (pool.save()[key] for key in ("mean", "std"))
    for both in (plain, pool):
        both.reset(np.array([[7]], np.uint32))
    for _ in range(3):
        np.testing.assert_allclose(pool.observations, (plain.observations - mean) / std, rtol=1e-4)
        raw, normal = step(plain, noise(1, 1)), step(pool, noise(1, 1))
        expected = (raw["next_observations"] - mean) / std
        np.testing.assert_allclose(normal["next_observations"], expected, rtol=1e-4, atol=1e-5)


def test_data_without_a_lesson(tmp_path, capsys):
    """One reward everywhere and no end; an end alone is a lesson."""
    same = dict(rewards=np.full(T, -1.0))
    endless = same | dict(terminals=np.zeros(T))
    for change, lesson in (({}, True), (same, True), (endless, False)):
        OfflineDataset(args(save(tmp_path, **transitions() | change)), 1)
        note = "Note: nothing in data.npz solves task 1" in capsys.readouterr().out
        assert note != lesson


def test_statistics_of_many_large_observations(tmp_path):
    """Sums of float32 would make the mean 1009 and the deviation 9."""
    rows = 300_000
    states = 1000 + np.random.default_rng(0).standard_normal((rows, 1))
    zeros = np.zeros(rows)
    arrays = dict(rewards=zeros, terminals=zeros, timeouts=zeros, actions=np.zeros((rows, 1)))
    path = save(tmp_path, **arrays, observations=np.float32(states))
    normalization = OfflineDataset(args(path, normalize_observations=True), 1).normalization
    np.testing.assert_allclose(normalization["mean"], states.mean(), rtol=1e-5)
    np.testing.assert_allclose(normalization["std"], 1, atol=0.01)


def test_several_tasks_are_refused(tmp_path):
    path = save(tmp_path, **transitions())
    stops("--tasks", call=lambda: read_own(args(path, tasks=(1, 2))))
    pendulum_path = save(tmp_path, "p.npz", **pendulum())
    flags = args(pendulum_path, env="Pendulum-v1", tasks=(2,), eval_episodes=1)
    stops("--tasks", call=lambda: read_own(flags))
