"""Tests of the data: chunks as the official sampler draws them, reading and refusing files, where
files are looked for, the schedule of the shards, the replay."""

import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import ogbench
import ogbench.utils
import pytest

import common.collect
from common import data as d
from common.envs import resolve

MAZE = resolve("pointmaze-medium-stitch")
PUZZLE = resolve("puzzle-3x3-play")
FIELDS = "observations next_observations actions rewards masks terminals".split()


# --- chunks --------------------------------------------------------------------------------------


def dataset(lengths, states, actions, rewards, masks):
    """A Dataset of trajectories of `lengths` transitions; `states`: the last ones included."""
    rows = np.concatenate([np.arange(n) + sum(lengths[:i]) + i for i, n in enumerate(lengths)])
    terminals = np.isin(np.arange(sum(lengths)), np.cumsum(lengths) - 1)
    arrays = states, rows, actions, np.atleast_2d(rewards), np.atleast_2d(masks), terminals
    return d.Dataset(*(jnp.array(x, int if x is rows else jnp.float32) for x in arrays))


def draw(seed, data, replay, task, size, H, discount):
    """A batch, and the arrays of the same batch on the host."""
    draw = jax.jit(d.sample, static_argnums=(4, 5, 6))
    return jax.device_get(draw(jax.random.key(seed), data, replay, task, size, H, discount))


def empty(data):
    """The replay of one agent, without a slot."""
    return jax.tree.map(lambda x: x[0], d.Replay.create(1, 0, data))


def test_the_check_values_of_the_specification():
    """Two trajectories of 4 and 5 transitions, H = 3, gamma = 0.9: every start, every number."""
    states = [[x] for x in (0, 1, 2, 3, 100, 4, 5, 6, 7, 8, 101)]  # the ends are 100 and 101
    rewards = [-1, -1, 0, -1, -1, -1, -1, -1, 0]
    masks = [1, 1, 0, 1, 1, 1, 1, 1, 0]
    data = dataset([4, 5], states, np.arange(9)[:, None], rewards, masks)
    batch = draw(0, data, empty(data), 0, 256, 3, 0.9)
    start = batch.observations[:, 0].astype(int)
    assert set(start) == set(range(7))
    table = dict(
        rewards=[-1.9, -1.81, -0.9, -1, -2.71, -2.71, -1.9],
        masks=[0, 0, 0, 1, 1, 1, 0],
        valid=[1, 1, 0, 0, 1, 1, 1],
        next_observations=[[3], [100], [100], [100], [7], [8], [101]],
        actions=[[i, i + 1, i + 2] for i in range(7)],  # run on into the following trajectory
    )
    for name, values in table.items():
        expected = np.float32(values)[start]
        np.testing.assert_allclose(getattr(batch, name), expected, atol=1e-6, err_msg=name)


def slow_sample(arrays, start, H, discount):
    """The recursion of the official sampler on its arrays with next observations, for a start."""
    chunk = range(start, start + H)
    for i, k in enumerate(chunk):
        reward, mask, end, state = (
            arrays[name][k] for name in ("rewards", "masks", "terminals", "next_observations")
        )
        if i == 0:
            v, R, m, e, after = 1, reward, mask, end, state
            continue
        v = 1 - e
        R = R + discount**i * reward * v
        m = v * min(m, mask) + (1 - v) * m
        e = max(e, end)
        after = v * state + (1 - v) * after
    actions = np.concatenate([arrays["actions"][k] for k in chunk])
    return d.Batch(arrays["observations"][start], actions, R, m, after, v)


@pytest.fixture(scope="module")
def mixed():
    """Random trajectories of unequal length, 3 tasks, 2 agents' replays that are partly filled ->
    Dataset, Replay, and arrays(task, agent) in the official layout."""
    rng, lengths, online, slots = np.random.default_rng(0), [1, 7, 2, 11, 4, 1, 6], (13, 21), 30
    N, tasks, agents = sum(lengths), 3, len(online)
    states = rng.normal(size=(N + len(lengths), 3))
    actions = rng.uniform(-1, 1, (N, 2))
    rewards, masks = -rng.integers(0, 4, (tasks, N)), rng.integers(0, 2, (tasks, N))
    data = dataset(lengths, states, actions, rewards, masks)
    full = dict(
        observations=rng.normal(size=(agents, slots, 3)),
        next_observations=rng.normal(size=(agents, slots, 3)),
        actions=rng.uniform(-1, 1, (agents, slots, 2)),
        rewards=-rng.integers(0, 4, (agents, slots)),
        masks=rng.integers(0, 2, (agents, slots)),
        terminals=rng.uniform(size=(agents, slots)) < 0.2,
    )
    full = {name: np.float32(x) for name, x in full.items()}  # beyond the size there is rubbish
    replay = d.Replay(**{k: jnp.array(x) for k, x in full.items()}, size=jnp.array(online))

    def arrays(task, agent, filled=True):
        ends = np.cumsum(lengths) + np.arange(len(lengths))  # rows of the last states,
        firsts = ends - lengths  # and of the first ones
        old = dict(
            observations=np.delete(states, ends, 0),
            next_observations=np.delete(states, firsts, 0),
            actions=actions,
            rewards=rewards[task],
            masks=masks[task],
            terminals=np.concatenate([np.arange(n) == n - 1 for n in lengths]),
        )
        size = online[agent] if filled else 0
        return {k: np.float32(np.concatenate([old[k], full[k][agent, :size]])) for k in FIELDS}

    return data, replay, arrays


def starts(batch, arrays):
    """The index at which each chunk begins: every observation is there once."""
    same = (batch.observations[:, None] == arrays["observations"]).all(-1)
    assert (same.sum(1) == 1).all()
    return same.argmax(1)


@pytest.mark.parametrize("H", [1, 5])
@pytest.mark.parametrize("task, agent, filled", [(0, 0, True), (2, 1, True), (1, 0, False)])
def test_chunks_equal_those_of_a_slow_sampler(mixed, H, task, agent, filled):
    """Dataset and replay are one array: chunks cross the border between them, never the end."""
    data, replay, arrays = mixed[0], jax.tree.map(lambda x: x[agent], mixed[1]), mixed[2]
    if not filled:
        replay = replay.replace(size=jnp.int32(0))
    arrays = arrays(task, agent, filled)
    batch = draw(1, data, replay, task, 2000, H, 0.97)
    drawn = starts(batch, arrays)
    assert set(drawn) == set(range(len(arrays["rewards"]) - H + 1))  # the border's among them
    slow = [slow_sample(arrays, start, H, 0.97) for start in drawn]
    for name, values in zip(d.Batch._fields, zip(*slow)):
        np.testing.assert_allclose(getattr(batch, name), np.array(values), rtol=1e-5, err_msg=name)
    assert H > 1 or (batch.valid == 1).all()


def test_starts_are_uniform(mixed):
    """Every start 0..N + size - H equally often (chi-square), none beyond."""
    data, replay, arrays = mixed[0], jax.tree.map(lambda x: x[0], mixed[1]), mixed[2](0, 0)
    kinds = len(arrays["rewards"]) - 5 + 1
    counts = np.zeros(len(arrays["rewards"]))
    for seed in range(20):
        drawn = starts(draw(seed, data, replay, 0, kinds * 100, 5, 0.9), arrays)
        counts += np.bincount(drawn, minlength=len(counts))
    assert not counts[kinds:].any()
    chi2, freedom = ((counts[:kinds] - 2000) ** 2 / 2000).sum(), kinds - 1
    assert abs(chi2 - freedom) < 4 * np.sqrt(2 * freedom)


def test_agents_sampled_at_once_are_sampled_as_if_alone(mixed):
    """vmap over keys, replays of different sizes and tasks changes nothing."""
    data, replay, _ = mixed
    one = jax.jit(lambda key, replay, task: d.sample(key, data, replay, task, 64, 5, 0.99))
    keys, tasks = jax.random.split(jax.random.key(3)), jnp.array([2, 0])
    many = jax.jit(jax.vmap(one))(keys, replay, tasks)
    for agent in range(2):
        alone = one(keys[agent], jax.tree.map(lambda x: x[agent], replay), tasks[agent])
        for name in d.Batch._fields:
            both = getattr(many, name)[agent], getattr(alone, name)
            np.testing.assert_allclose(*both, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("agents", [1, 2])
@pytest.mark.parametrize("chunk", [False, True])
def test_one_agent_has_no_axis(agents, chunk):
    """The numbers of a function of each agent, which is vmapped only if there are several."""
    x, y, seen = jnp.arange(3.0 * agents).reshape(agents, 3), jnp.arange(agents), []

    def one(tree, y):
        seen.append(isinstance(tree["x"], jax.core.Tracer))  # else an array, without the axis
        return dict(dot=tree["x"] @ tree["x"], y=y)

    found = d.over_agents(one, chunk)(dict(x=x), y)
    np.testing.assert_array_equal(found["dot"], (np.array(x) ** 2).sum(1))
    np.testing.assert_array_equal(found["y"], y)
    assert seen == [agents > 1]


@pytest.mark.parametrize(
    ("chunk", "backend", "devices", "sequential"),
    [
        (True, "cpu", 1, True),
        (False, "cpu", 1, False),
        (True, "gpu", 1, False),
        (True, "cpu", 8, False),
    ],
)
def test_chunks_on_a_cpu(monkeypatch, chunk, backend, devices, sequential):
    """There, on a single device, many updates of one agent come after those of the other: a loop
    whose product is one agent's."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_device_count", lambda: devices)
    x = jnp.ones((3, 4, 4))
    text = str(jax.make_jaxpr(d.over_agents(lambda x: x @ x, chunk))(x))
    assert ("scan" in text, "f32[4,4] = dot_general" in text) == (sequential, sequential)


def test_the_key_decides():
    """The same key, the same chunks; another key, others."""
    data = dataset([50], np.arange(51)[:, None], np.zeros((50, 1)), np.zeros(50), np.ones(50))
    first, same, other = (draw(s, data, empty(data), 0, 64, 5, 0.9).observations for s in (0, 0, 1))
    assert (first == same).all() and (first != other).any()


def test_more_than_2_to_the_31_numbers(tmp_path):
    """Rows are int32, and there may be 2^31 of them: that their numbers lie beyond 2^31, as in a
    100M set in one array, is no matter, in one program for several agents too. The states are a
    file of 8 GB that has content in a few rows only and is used in place."""
    S = 83
    border = 2**31 // S  # the row that number 2^31 is in
    rng, M = np.random.default_rng(0), border + 10_000
    states = np.memmap(tmp_path / "states", np.float32, "w+", shape=(M, S))
    drawn = np.arange(-100, 100) + border, np.arange(M - 200, M - 1), rng.integers(0, M - 1, 600)
    rows = np.unique(np.concatenate(drawn))
    for k in (rows, rows + 1):
        states[k] = np.float32(1 + k[:, None] % 9973 + np.arange(S) / S)
    N = len(rows)
    numbers = np.arange(N)[:, None], np.zeros((1, N)), np.ones((1, N)), np.zeros(N)
    observations = jax.dlpack.from_dlpack(states, copy=False)
    assert observations.size > 2**31 and observations.dtype == jnp.float32
    actions, *others = map(jnp.float32, numbers)
    data = d.Dataset(observations, jnp.int32(rows), actions, *others)
    replay, keys = empty(data), jax.random.split(jax.random.key(0))
    one = lambda key, data: d.sample(key, data, replay, 0, 2000, 1, 0.9)
    batch = jax.device_get(jax.jit(jax.vmap(one, (0, None)))(keys, data))
    k = rows[batch.actions[..., 0].astype(int)]  # (2, 2000)
    assert (k * S > 2**31).any() and (k * S < 2**31).any()
    assert np.array_equal(batch.observations, states[k])
    assert np.array_equal(batch.next_observations, states[k + 1])


# --- reading -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def maze(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maze")
    return common.collect.collect(MAZE.dataset, 2000, folder, seed=1, workers=1)


@pytest.fixture(scope="module")
def puzzle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("puzzle")
    return common.collect.collect(PUZZLE.dataset, 1, folder, seed=1, workers=2)


@pytest.mark.parametrize("source, tasks", [(MAZE, (1, 3)), (PUZZLE, (4, 2))])
def test_a_file_is_read_as_ogbench_reads_it(source, tasks, request):
    """Observations, next observations, actions, terminals, rewards and masks are the official
    loader's, its clipping of the actions included, in the order of the tasks asked for."""
    path = request.getfixturevalue("maze" if source is MAZE else "puzzle")
    data = d.read(path, source, tasks, sparse=False)
    for i, task in enumerate(tasks):
        name = f"{source.dataset}-singletask-task{task}-v0"
        _, train, _ = ogbench.make_env_and_datasets(name, dataset_path=str(path))
        assert np.array_equal(data.observations[data.rows], train["observations"])
        assert np.array_equal(data.observations[data.rows + 1], train["next_observations"])
        assert np.array_equal(data.actions, np.clip(train["actions"], -1 + 1e-5, 1 - 1e-5))
        assert np.array_equal(data.terminals, train["terminals"])
        assert np.array_equal(data.rewards[i], train["rewards"])
        assert np.array_equal(data.masks[i], train["masks"])
    assert {x.dtype.name for x in jax.tree.leaves(data)} == {"float32", "int32"}
    assert data.rows.dtype == np.int32


def test_rewards_count_unmet_goals_or_are_sparse(puzzle):
    """Dense: minus the number of unmet sub-goals. Sparse: -1 unless all is done. Masks stay."""
    dense, sparse = (d.read(puzzle, PUZZLE, (1, 2, 4), flag) for flag in (False, True))
    assert set(np.unique(dense.rewards)) <= set(range(-9, 1))
    assert len(np.unique(dense.rewards)) > 3
    assert np.array_equal(sparse.rewards, np.where(dense.rewards == 0, 0, -1))
    for data in (dense, sparse):
        assert np.array_equal(data.masks, dense.rewards != 0)


def test_rewards_are_those_of_the_state_before_the_action(tmp_path):
    """A point that stands at the goal in state 1 only: transition 1 has the reward."""
    goal, away = (20.0, 20.0), (0.0, 0.0)
    path = write(tmp_path, qpos=np.float32([away, goal, away, away]))
    data = d.read(path, MAZE, (1,), sparse=False)
    assert data.rewards.tolist() == [[-1, 0, -1]] and data.masks.tolist() == [[1, 0, 1]]
    assert data.terminals.tolist() == [0, 0, 1] and data.rows.tolist() == [0, 1, 2]


def test_actions_are_clipped_but_for_shards(tmp_path):
    """To +-(1 - 1e-5) in an ordinary file; as they are in a shard of a 100M set."""
    actions = np.float32([[1, -1], [0.5, 1], [-1, 0], [0, 0]])
    path, limit = write(tmp_path, actions=actions), np.float32(1 - 1e-5)
    clipped, raw = (d.read(path, MAZE, (1,), False, clip).actions for clip in (True, False))
    assert clipped.tolist() == np.clip(actions[:3], -limit, limit).tolist()
    assert raw.tolist() == actions[:3].tolist()


def test_reading_needs_little_more_memory_than_the_file(tmp_path):
    """At its peak NumPy holds the file's arrays and less than a third of them besides."""
    rows, rng = 50_000, np.random.default_rng(0)
    arrays = {k: rng.uniform(-1, 1, (rows, n)) for k, n in (("observations", 55), ("actions", 5))}
    arrays |= dict(qpos=np.zeros((rows, 23)), button_states=np.zeros((rows, 9)))
    arrays = {key: np.float32(x) for key, x in arrays.items()}
    path = write(tmp_path, PUZZLE.dataset + ".npz", rows, **arrays)
    d.read(path, PUZZLE, (1, 2), True)  # modules and environments
    tracemalloc.start()
    d.read(path, PUZZLE, (1, 2), True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    whole = sum(x.nbytes for x in arrays.values())
    assert whole < peak < 4 / 3 * whole


# --- files that are refused ----------------------------------------------------------------------


def write(folder, name="pointmaze-medium-stitch-v0.npz", rows=4, **changes):
    """A file for the point maze with a single trajectory; None leaves a key out."""
    arrays = {key: np.zeros((rows, 2), np.float32) for key in ("observations", "actions", "qpos")}
    arrays |= dict(terminals=np.arange(rows) == rows - 1) | changes
    np.savez(folder / name, **{k: np.array(x) for k, x in arrays.items() if x is not None})
    return folder / name


def refused(path, *words, source=MAZE):
    """Reading the file ends in one line that names the file and says all of `words`."""
    with pytest.raises(SystemExit) as error:
        d.read(path, source, (1,), False)
    line = str(error.value)
    assert str(path) in line and "\n" not in line
    for word in words:
        assert word in line, f"{word!r} is not in {line!r}"


def with_value(value, dtype=np.float32):
    array = np.zeros((4, 2), dtype)
    array[1, 1] = value
    return array


@pytest.mark.parametrize("key", ["observations", "actions", "terminals", "qpos"])
def test_a_missing_key(key, tmp_path):
    refused(write(tmp_path, **{key: None}), f"'{key}'", "missing")


BAD_VALUES = {
    "flat": (np.zeros(4), "2 axes"),
    "cube": (np.zeros((4, 2, 1)), "2 axes"),
    "short": (np.zeros((3, 2)), "4 rows"),
    "long": (np.zeros((5, 2)), "4 rows"),
    "scalar": (np.zeros(()), "2 axes"),
    "NaN": (with_value(np.nan), "finite"),
    "infinite": (with_value(-np.inf), "finite"),
    "strings": (np.full((4, 2), "x"), "numbers"),
    "complex": (np.zeros((4, 2), complex), "numbers"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
@pytest.mark.parametrize("key", ["observations", "actions", "qpos"])
def test_bad_arrays(key, case, tmp_path):
    """Shape, rows, dtype and values are checked; the message says what was expected."""
    array, expected = BAD_VALUES[case]
    refused(write(tmp_path, **{key: array}), f"'{key}'", expected)


@pytest.mark.parametrize(
    "terminals, expected",
    [
        (np.zeros((4, 1)), "1 axes"),
        (np.full(4, "yes"), "numbers"),
        (np.array([0, 0, np.nan, 1]), "finite"),
        (np.zeros(4), "1 in the last row"),
        (np.ones(4), "1 in the last row"),
        (np.array([0, 1, 0, 0]), "1 in the last row"),
    ],
)
def test_bad_terminals(terminals, expected, tmp_path):
    refused(write(tmp_path, terminals=terminals), "'terminals'", expected)


def test_actions_outside_of_the_box(tmp_path):
    refused(write(tmp_path, actions=with_value(-1.01)), "'actions'", "1.01", "[-1, 1]")


def test_an_empty_file_of_arrays(tmp_path):
    refused(write(tmp_path, rows=0), "'terminals'")


def test_another_environments_file(puzzle, tmp_path):
    """Wrong sizes: the message has both."""
    refused(puzzle, "[55, 5, 23, 9]", "[2, 2, 2, 0]", "pointmaze-medium")
    refused(write(tmp_path), "[2, 2, 2, 0]", "[55, 5, 23, 9]", "puzzle-3x3", source=PUZZLE)


def test_no_npz_file(tmp_path, maze):
    """Cut off, not a zip, an .npy, empty, a folder, not there."""
    for name, content in dict(cut=maze.read_bytes()[:-1000], text=b"hello", empty=b"").items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    for path in (tmp_path / "array.npy", tmp_path, tmp_path / "absent"):
        refused(path, "npz")


def test_damaged_contents(tmp_path, maze):
    """A flipped byte in the middle of a compressed array is found."""
    content = bytearray(maze.read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "damaged").write_bytes(content)
    refused(tmp_path / "damaged", "npz")


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_pickles_are_not_executed(tmp_path):
    """An object array, in a key that is needed or in one that is not, is refused unread."""
    objects = np.array([Payload(tmp_path / "executed")] * 4, object)
    for key in ("observations", "extra"):
        refused(write(tmp_path, **{key: objects}), "pickle")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "states, word",
    [
        (None, "[55, 5, 23, 0]"),
        (np.zeros((4, 4), int), "[55, 5, 23, 9]"),
        (np.zeros((3, 9), int), "rows"),
        (np.zeros((5, 9), int), "rows"),
        (np.full((4, 9), "x"), "numbers"),
    ],
)
def test_bad_button_states(states, word, tmp_path):
    """Puzzles and scenes are labelled by their buttons."""
    arrays = dict(observations=np.zeros((4, 55)), actions=np.zeros((4, 5)), qpos=np.zeros((4, 23)))
    path = write(tmp_path, "puzzle-3x3-play-v0.npz", **arrays, button_states=states)
    refused(path, "'button_states'", word, source=PUZZLE)


@pytest.mark.parametrize(
    "env, sizes, width", [("pointmaze-medium", (2, 2), 1), ("cube-single", (28, 5), 3)]
)
def test_positions_of_another_environment(env, sizes, width, tmp_path):
    """qpos that is too narrow for the labels is refused."""
    arrays = dict(observations=np.zeros((4, sizes[0])), actions=np.zeros((4, sizes[1])))
    refused(write(tmp_path, **arrays, qpos=np.zeros((4, width))), "'qpos'", source=resolve(env))


def test_numbers_too_large_for_float32(tmp_path):
    refused(write(tmp_path, observations=with_value(1e300, np.float64)), "'observations'")


# --- where files are looked for ------------------------------------------------------------------


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A cache and a working directory with data/, both empty; no network, and no collecting."""
    cache, here = tmp_path / "cache", tmp_path / "here"
    for folder in (cache, here / "data"):
        folder.mkdir(parents=True)
    monkeypatch.setattr(d, "CACHE", cache)
    monkeypatch.chdir(here)
    calls = SimpleNamespace(cache=cache, here=here, downloads=[], collected=[])

    def download(names, folder=None):
        calls.downloads.append((list(names), folder))
        raise OSError("no network")

    def collect(dataset, transitions, folder):
        calls.collected.append((dataset, transitions, str(folder)))
        if transitions == 13:
            raise common.collect.CollectError("13 is unlucky")
        return d.Path(folder) / f"{dataset}-v0.npz"

    monkeypatch.setattr(ogbench.utils, "download_datasets", download)
    monkeypatch.setattr(common.collect, "collect", collect)
    return calls


CUBE = resolve("cube-double")
FILE = "cube-double-play-v0.npz"


def test_the_order_of_the_places(places):
    """--dataset-dir alone if it is given; else OGBench's cache before data/."""
    own = places.here / "own"
    own.mkdir()
    for folder in (own, places.here / "data", places.cache):
        (folder / FILE).touch()
    assert d.locate(CUBE, "own") == [own.relative_to(places.here) / FILE]
    assert d.locate(CUBE) == [places.cache / FILE]
    (places.cache / FILE).unlink()
    assert [path.resolve() for path in d.locate(CUBE)] == [places.here / "data" / FILE]
    assert not places.downloads and not places.collected


def test_what_is_missing_is_downloaded_into_the_cache(places, monkeypatch):
    """By OGBench; the dataset is named without the task."""
    download = lambda *arguments: places.downloads.append(arguments)
    monkeypatch.setattr(ogbench.utils, "download_datasets", download)
    assert d.locate(resolve("cube-double-singletask-task3-v0")) == [places.cache / FILE]
    assert places.downloads == [(["cube-double-play-v0"], places.cache)]


@pytest.mark.parametrize("folder", ["", "own"])
def test_a_dataset_that_is_nowhere(places, folder):
    """One line with all four ways to provide it; the network is tried only without a folder."""
    with pytest.raises(SystemExit) as error:
        d.locate(CUBE, folder)
    line = str(error.value)
    for words in (FILE, "--dataset-dir", str(places.cache), "download", "common.collect"):
        assert words in line
    for way in "(1) (2) (3) (4)".split():
        assert way in line
    assert "\n" not in line and ("no network" in line) == (not folder) == bool(places.downloads)


def test_shards_are_sorted_and_without_validation_files(places):
    """All files of the dataset under --dataset-dir, in folders too."""
    folder = places.here / "own" / "sub"
    folder.mkdir(parents=True)
    names = ["play-v0-010", "play-v0-002", "play-v0-002-val", "play-v0-100", "noisy-v0-000"]
    for name in names:
        (folder / f"cube-double-{name}.npz").touch()
    (folder / "cube-double-play-v0.json").touch()
    found = [path.stem.rsplit("-", 1)[1] for path in d.locate(CUBE, "own")]
    assert found == ["002", "010", "100"]


def test_shards_come_before_the_ordinary_file(places):
    """Of the folder that is named; that comes before files of other names."""
    folder = places.here / "own"
    folder.mkdir()
    for name in ("v0", "v0-val", "v0-old", "v0-000", "v0-001"):
        (folder / f"cube-double-play-{name}.npz").touch()
    assert [path.stem[-3:] for path in d.locate(CUBE, "own")] == ["000", "001"]
    for name in ("v0-000", "v0-001"):
        (folder / f"cube-double-play-{name}.npz").unlink()
    assert [path.name for path in d.locate(CUBE, "own")] == [FILE]
    (folder / FILE).unlink()
    assert [path.stem[-3:] for path in d.locate(CUBE, "own")] == ["old"]
    (folder / "cube-double-play-v0-new.npz").touch()  # not trained on in turns, as shards are
    with pytest.raises(SystemExit, match="but .*new.npz, .*old.npz"):
        d.locate(CUBE, "own")


def test_point_mazes_collect_themselves_and_others_on_request(places):
    """Into data/ or --dataset-dir, without a try of the network."""
    assert d.locate(MAZE)[0].resolve() == places.here / "data" / "pointmaze-medium-stitch-v0.npz"
    assert d.locate(CUBE, "own", 1234)[0].resolve() == places.here / "own" / FILE
    first, second = places.collected
    assert first == (MAZE.dataset, 200_000, "data") and second == ("cube-double-play", 1234, "own")
    with pytest.raises(SystemExit, match="^[^\n]*13 is unlucky[^\n]*$"):
        d.locate(CUBE, "", 13)
    assert not places.downloads


def test_a_folder_in_the_home_directory(places, monkeypatch):
    """--dataset-dir=~/own, which a shell does not expand, is the folder collect writes to."""
    monkeypatch.setenv("HOME", str(places.here))
    (places.here / "own").mkdir()
    (places.here / "own" / FILE).touch()
    assert d.locate(CUBE, "~/own")[0].resolve() == places.here / "own" / FILE


# --- shards --------------------------------------------------------------------------------------


def shard(folder, number, rows=4):
    states = np.full((rows, 2), number, np.float32)
    actions = np.ones((rows, 2), np.float32)
    return write(folder, f"shard-{number}.npz", rows, observations=states, actions=actions)


@pytest.fixture
def three(tmp_path):
    return [shard(tmp_path, i) for i in range(3)]


def number(data):
    return int(data.observations[0, 0])


def test_the_next_shard_is_read_ahead(three, monkeypatch):
    """By the thread, before it is asked for."""
    seen, read = [], d.read
    monkeypatch.setattr(d, "read", lambda path, *rest: seen.append(path) or read(path, *rest))
    shards = d.Shards(three, MAZE, (1,), False, 1, interval=4)
    shards.at(1)
    shards._thread.shutdown()
    assert seen == three[:2]


def test_the_official_schedule(three):
    """The next shard takes over before each `interval`-th update, cyclically; `stays` counts the
    updates until then, this one included."""
    shards = d.Shards(three, MAZE, (1,), False, 1, interval=4)
    seen = []
    for step in range(1, 30):
        data, stays = shards.at(step)
        seen.append(number(data))
        assert stays == 4 - step % 4
    assert seen == [step // 4 % 3 for step in range(1, 30)]
    assert seen[:4] == [0, 0, 0, 1]


def test_the_online_phase_starts_where_the_offline_phase_ended(three):
    """Its own steps count from 1; the swaps of the offline phase are added."""
    shards = d.Shards(three, MAZE, (1,), False, 1, interval=4)
    shards.at(0)
    offline = 10  # swaps at updates 4 and 8
    assert number(shards.at(offline)[0]) == 2
    online = [number(shards.at(step, offline // 4)[0]) for step in range(1, 13)]
    assert online == [2, 2, 2, 0, 0, 0, 0, 1, 1, 1, 1, 2]


def test_a_jump_after_a_restart_gives_the_same_shard(three):
    """What was loaded ahead, what is loaded at once and what read() gives are the same."""
    directly = [d.read(path, MAZE, (1, 2), True, False) for path in three]
    for step in (0, 5, 8, 2, 9, 1, 13):
        shards = d.Shards(three, MAZE, (1, 2), True, 1, interval=4)
        shards.at(1)
        for at in (step, step + 4):  # a jump, then the shard that was loaded meanwhile
            data, direct = shards.at(at)[0], directly[at // 4 % 3]
            for x, y in zip(jax.tree.leaves(data), jax.tree.leaves(direct)):
                assert np.array_equal(x, y) and x.dtype == y.dtype


def test_many_threads_label_at_once(three):
    """They share the environments that label."""
    expected = d.read(three[0], MAZE, (1, 2), True)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: d.read(three[0], MAZE, (1, 2), True), range(100)):
            assert np.array_equal(found.rewards, expected.rewards)


def test_the_first_call_may_be_for_the_last_shard(three):
    """Without an earlier call, and then on to shard 0."""
    shards = d.Shards(three, MAZE, (1,), False, 1, interval=4)
    assert [number(shards.at(step)[0]) for step in (8, 12)] == [2, 0]


def test_a_single_file_stays_for_ever_and_is_clipped(three):
    """Shards keep their actions as they are."""
    single, many = (d.Shards(paths, MAZE, (1,), False, 1, 4) for paths in (three[:1], three))
    data, stays = single.at(4)
    assert number(data) == 0 and stays > 10**9
    assert data.actions.max() == np.float32(1 - 1e-5)
    assert many.at(1)[0].actions.max() == many.at(4)[0].actions.max() == 1


@pytest.mark.parametrize("files, name", [(1, "puzzle-4x4"), (2, "puzzle-4x4"), (1, "scene")])
def test_the_ordinary_file_of_a_100m_domain(monkeypatch, capsys, files, name):
    """A line says that published numbers are on more."""
    monkeypatch.setattr(d, "read", lambda *_: d.Dataset(*[jnp.ones(3)] * 6))
    d.Shards([Path(f"{i}.npz") for i in range(files)], resolve(name), (1,), False, 1)
    said = capsys.readouterr().out
    assert ("100M" in said and "0.npz" in said) == (files == 1 and name == "puzzle-4x4")


def test_shards_of_different_length_are_refused(three, tmp_path):
    """In one line, when the odd one's turn comes, and a damaged one by its name."""
    shards = d.Shards([three[0], shard(tmp_path, 1, rows=5)], MAZE, (1,), False, 1, interval=4)
    shards.at(3)
    with pytest.raises(SystemExit, match="^[^\n]*shards 0 and 1[^\n]*$"):
        shards.at(4)
    three[2].write_bytes(b"")
    shards = d.Shards([three[0], three[2]], MAZE, (1,), False, 1, interval=4)
    shards.at(1)
    with pytest.raises(SystemExit, match="shard-2.npz"):
        shards.at(4)


def test_a_swap_waits_for_the_training_on_the_shard_before(three):
    """The loop that calls is ahead of its device. Else as many shards as it is ahead are held."""
    shards = d.Shards(three, MAZE, (1,), False, 1, interval=4)
    data, _ = shards.at(3)
    step = lambda i, x: x @ x / 2 + data.observations[0, 0]
    train = jax.jit(lambda n: jax.lax.fori_loop(0, n, step, jnp.zeros((200, 200))))
    train(1)  # compiles
    result = train(1000)
    assert not result.is_ready()
    shards.at(4)
    assert result.is_ready()


@pytest.fixture
def reads(tmp_path, monkeypatch):
    """Numbers of this test's shards that were read, in turn."""
    seen, read = [], d.read

    def counted(path, *rest):
        if path.parent == tmp_path:  # the thread of another test may be at work still
            seen.append(int(path.stem[-1]))
        return read(path, *rest)

    monkeypatch.setattr(d, "read", counted)
    return seen


@pytest.mark.parametrize("room", range(5))
def test_a_device_keeps_the_shards_that_it_has_room_for(tmp_path, monkeypatch, reads, room):
    """The schedule is the same. With room for all each is read once, else what has no room again in
    every round; what was kept stays when the room is used up."""
    paths = [shard(tmp_path, i) for i in range(4)]
    shards = d.Shards(paths, MAZE, (1,), False, 1, interval=4)
    monkeypatch.setattr(d, "roomy", lambda data: len(shards._kept) < room)
    seen = [number(shards.at(step)[0]) for step in range(1, 49)]
    shards._thread.shutdown()
    assert seen == [step // 4 % 4 for step in range(1, 49)]
    assert sorted(shards._kept) == list(range(room))
    assert reads[:4] == [0, 1, 2, 3]
    again = [i for i in range(4) if i >= room] * (room < 3)  # the last one stays as the next
    assert reads[4 : 4 + 2 * len(again)] == 2 * again


def test_the_online_phase_keeps_no_shards(three, monkeypatch, reads):
    """From its first step on, in the middle of a shard's turn: its replay needs the room."""
    monkeypatch.setattr(d, "roomy", lambda data: True)
    shards = d.Shards(three, MAZE, (1,), False, 1, interval=4)
    for step in range(1, 15):
        shards.at(step)
    assert len(shards._kept) == 3 and reads == [0, 1, 2]
    online = [(step, number(shards.at(step, 14 // 4)[0]), len(shards._kept)) for step in (1, 4, 8)]
    assert online == [(1, 0, 0), (4, 1, 0), (8, 2, 0)]
    shards._thread.shutdown()
    assert reads == [0, 1, 2, 1, 2, 0]


def test_room_on_a_device(three, monkeypatch):
    """For two more datasets beside the peak and a fifth of all. A CPU tells nothing: no room."""
    data = d.read(three[0], MAZE, (1,), False)
    assert not d.roomy(data)
    two, stats = 2 * sum(x.nbytes for x in jax.tree.leaves(data)), dict(bytes_limit=10_000)
    device = SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    for peak, room in ((7999 - two, True), (8000 - two, False), (9000, False)):
        stats["peak_bytes_in_use"] = peak
        assert d.roomy(data) == room
    stats.clear()
    assert not d.roomy(data)


# --- replay --------------------------------------------------------------------------------------


def transitions(rng, agents, steps=1):
    """Rows as `append` takes them, with a column too many."""
    shapes = dict.fromkeys(FIELDS, ()) | dict.fromkeys(FIELDS[:2], (3,)) | dict(actions=(2,))
    rows = {k: np.float32(rng.normal(size=(agents, steps, *s))) for k, s in shapes.items()}
    return rows | dict(success=np.zeros((agents, steps)))


def check_replay(replay, steps, capacity):
    """It has these transitions of all agents in their order, then empty slots."""
    size = sum(step["rewards"].shape[1] for step in steps)
    assert replay.size.tolist() == [size] * 2 and replay.rewards.shape == (2, capacity)
    for name in FIELDS:
        slots = np.asarray(getattr(replay, name))
        assert np.array_equal(slots[:, :size], np.concatenate([s[name] for s in steps], 1)), name
        assert not slots[:, size:].any()


def test_a_replay_keeps_transitions_in_their_order(mixed):
    """One or several at a time."""
    rng, replay = np.random.default_rng(0), d.Replay.create(2, 6, mixed[0])
    assert replay.size.tolist() == [0, 0]
    steps = [transitions(rng, 2, n) for n in (1, 1, 2, 1)]
    for i, step in enumerate(steps):
        replay = replay.append(step)
        check_replay(replay, steps[: i + 1], 6)


@pytest.mark.parametrize("capacity", [1, 5, 6])
def test_a_full_replay_forgets_the_oldest(mixed, capacity):
    """A ring: transition k is in slot k modulo the capacity, whatever the number of rounds; the
    size counts on. What is appended is not changed, and one program serves all steps."""
    rng, replay, steps = np.random.default_rng(2), d.Replay.create(2, capacity, mixed[0]), []
    programs = 0
    for k in range(3 * capacity + 2):
        steps.append(transitions(rng, 2))
        replay = replay.append(steps[-1])
        programs = programs or d.Replay.append._cache_size()
        assert replay.size.tolist() == [k + 1] * 2 and replay.rewards.shape == (2, capacity)
        for name in FIELDS:
            slots = np.asarray(getattr(replay, name))
            for i in range(max(0, k + 1 - capacity), k + 1):
                assert np.array_equal(slots[:, i % capacity], steps[i][name][:, 0]), name
    assert d.Replay.append._cache_size() == programs


def test_a_replay_of_spaces():
    """Sizes may come from an environment's spaces."""
    boxes = [gymnasium.spaces.Box(-1, 1, (n,)) for n in (7, 3)]
    replay = d.Replay.create(2, 4, SimpleNamespace(observations=boxes[0], actions=boxes[1]))
    assert replay.observations.shape == replay.next_observations.shape == (2, 4, 7)
    assert replay.actions.shape == (2, 4, 3) and replay.rewards.shape == (2, 4)
    assert {x.dtype.name for x in jax.tree.leaves(replay)} == {"float32", "int32"}


@pytest.mark.parametrize("capacity", [1, 4, 7, 100])
def test_a_replay_in_parts_is_the_same(mixed, capacity):
    """What came since the part before, put together without parts of which nothing is left, across
    the ring's end or not. Slots, size and types agree, and the ring goes on in the same slots."""
    rng, replay = np.random.default_rng(3), d.Replay.create(2, capacity, mixed[0])
    steps, parts, end, gaps = [], [], 0, 0
    for k in range(1, 60):
        steps.append(transitions(rng, 2))
        replay = replay.append(steps[-1])
        if rng.random() < 0.6:
            continue
        rows, first = replay.since(end), max(end, k - capacity)
        for name in FIELDS:
            expected = np.concatenate([step[name] for step in steps[first:k]], 1)
            assert isinstance(rows[name], np.ndarray)
            np.testing.assert_array_equal(rows[name], expected)
        parts, end = [*[part for part in parts if part[0] > k - capacity], (k, rows)], k
        again = d.Replay.create(2, 3, mixed[0]).refilled(capacity, parts)
        assert {type(x) for x in jax.tree.leaves(again)} == {np.ndarray}
        step, before = transitions(rng, 2), (again, jax.device_get(replay))
        more = (jax.tree.map(jnp.array, x).append(step) for x in before)
        for one, two in (before, more):
            for x, y in zip(*map(jax.tree.leaves, (one, two))):
                assert np.array_equal(x, y) and x.dtype == y.dtype
        if len(parts) > 2:  # one is missing, or two are exchanged
            for wrong in ([parts[0], *parts[2:]], [*parts[:-2], parts[-1], parts[-2]]):
                with pytest.raises(ValueError, match="gap"):
                    replay.refilled(capacity, wrong)
            gaps += 1
    assert replay.since(end)["rewards"].shape == (2, min(59 - end, capacity)) and end > 50
    assert gaps > 0 or capacity < 5
