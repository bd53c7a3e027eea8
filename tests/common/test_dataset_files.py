"""Tests of dataset files: reading and refusing them, where they are looked for, what identifies
them."""

import os
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import ogbench
import ogbench.utils
import pytest

import common.collect.dataset
from common.dataset_files import identify, locate, read
from common.environments import resolve
from tests.helpers.dataset_files import MAZE, PUZZLE, write
from tests.helpers.messages import stops

# --- reading -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def maze(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maze")
    return common.collect.dataset.collect(MAZE.dataset, 2000, folder, seed=1, workers=1)


@pytest.fixture(scope="module")
def puzzle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("puzzle")
    return common.collect.dataset.collect(PUZZLE.dataset, 1, folder, seed=1, workers=2)


@pytest.mark.parametrize("source, tasks", [(MAZE, (1, 3)), (PUZZLE, (4, 2))])
def test_a_file_is_read_as_ogbench_reads_it(source, tasks, request):
    """Observations, next observations, actions, terminals, rewards and masks are the official
    loader's, its clipping of the actions included, in the order of the tasks asked for."""
    path = request.getfixturevalue("maze" if source is MAZE else "puzzle")
    data = read(path, source, tasks)
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


def test_rewards_count_unmet_goals(puzzle):
    """Negatively; masks are 0 where all are met."""
    data = read(puzzle, PUZZLE, (1, 2, 4))
    assert set(np.unique(data.rewards)) <= set(range(-9, 1))
    assert len(np.unique(data.rewards)) > 3
    assert np.array_equal(data.masks, data.rewards != 0)


def test_rewards_are_those_of_the_state_before_the_action(tmp_path):
    """A point that stands at the goal in state 1 only: transition 1 has the reward."""
    goal, away = (20.0, 20.0), (0.0, 0.0)
    path = write(tmp_path, qpos=np.float32([away, goal, away, away]))
    data = read(path, MAZE, (1,))
    assert data.rewards.tolist() == [[-1, 0, -1]] and data.masks.tolist() == [[1, 0, 1]]
    assert data.terminals.tolist() == [0, 0, 1] and data.rows.tolist() == [0, 1, 2]


def test_actions_are_clipped_but_for_shards(tmp_path):
    """To +-(1 - 1e-5) in an ordinary file; as they are in a shard of a 100M set."""
    actions = np.float32([[1, -1], [0.5, 1], [-1, 0], [0, 0]])
    path, limit = write(tmp_path, actions=actions), np.float32(1 - 1e-5)
    clipped, raw = (read(path, MAZE, (1,), clip).actions for clip in (True, False))
    assert clipped.tolist() == np.clip(actions[:3], -limit, limit).tolist()
    assert raw.tolist() == actions[:3].tolist()


def test_reading_needs_little_more_memory_than_the_file(tmp_path):
    """At its peak NumPy holds the file's arrays and less than a third of them besides."""
    rows, rng = 50_000, np.random.default_rng(0)
    arrays = {k: rng.uniform(-1, 1, (rows, n)) for k, n in (("observations", 55), ("actions", 5))}
    arrays |= dict(qpos=np.zeros((rows, 23)), button_states=np.zeros((rows, 9)))
    arrays = {key: np.float32(x) for key, x in arrays.items()}
    path = write(tmp_path, PUZZLE.dataset + ".npz", rows, **arrays)
    read(path, PUZZLE, (1, 2))  # modules and environments
    tracemalloc.start()
    read(path, PUZZLE, (1, 2))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    whole = sum(x.nbytes for x in arrays.values())
    assert whole < peak < 4 / 3 * whole


# --- files that are refused ----------------------------------------------------------------------


def refused(path, *words, source=MAZE):
    """Reading the file ends in one line that names the file and says all of `words`."""
    stops(path, *words, call=lambda: read(path, source, (1,)))


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


@pytest.mark.parametrize(
    "key", ["rewards", "timeouts", "truncations", "terminations", "next_observations"]
)
def test_rewards_and_ends_of_the_file_itself(key, tmp_path):
    """They would be overwritten, or not be seen: one line names them and the flag for them."""
    path = write(tmp_path, **{key: np.zeros(4)})
    refused(path, f"keys ['{key}'] are not OGBench's", "--dataset")


def test_numbers_too_large_for_float32(tmp_path):
    refused(write(tmp_path, observations=with_value(1e300, np.float64)), "'observations'")


# --- where files are looked for ------------------------------------------------------------------


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A cache and a working directory with data/, both empty; no network, and no collecting."""
    cache, here = tmp_path / "cache", tmp_path / "here"
    for folder in (cache, here / "data"):
        folder.mkdir(parents=True)
    monkeypatch.setattr("common.dataset_files.CACHE", cache)
    monkeypatch.chdir(here)
    calls = SimpleNamespace(cache=cache, here=here, downloads=[], collected=[])

    def download(names, folder=None):
        calls.downloads.append((list(names), folder))
        raise OSError("no network")

    def collect(dataset, transitions, folder):
        calls.collected.append((dataset, transitions, str(folder)))
        if transitions == 13:
            raise common.collect.dataset.CollectError("13 is unlucky")
        return Path(folder) / f"{dataset}-v0.npz"

    monkeypatch.setattr(ogbench.utils, "download_datasets", download)
    monkeypatch.setattr(common.collect.dataset, "collect", collect)
    return calls


CUBE = resolve("cube-double")
FILE = "cube-double-play-v0.npz"


def test_the_order_of_the_places(places):
    """--dataset-dir alone if it is given; else OGBench's cache before data/."""
    own = places.here / "own"
    own.mkdir()
    for folder in (own, places.here / "data", places.cache):
        (folder / FILE).touch()
    assert locate(CUBE, "own") == [own.relative_to(places.here) / FILE]
    assert locate(CUBE) == [places.cache / FILE]
    (places.cache / FILE).unlink()
    assert [path.resolve() for path in locate(CUBE)] == [places.here / "data" / FILE]
    assert not places.downloads and not places.collected


def test_what_is_missing_is_downloaded_into_the_cache(places, monkeypatch):
    """By OGBench; the dataset is named without the task."""
    download = lambda *arguments: places.downloads.append(arguments)
    monkeypatch.setattr(ogbench.utils, "download_datasets", download)
    assert locate(resolve("cube-double-singletask-task3-v0")) == [places.cache / FILE]
    assert places.downloads == [(["cube-double-play-v0"], places.cache)]


@pytest.mark.parametrize("folder", ["", "own"])
def test_a_dataset_that_is_nowhere(places, folder):
    """A line with the reason, then all four ways to provide it, one per line; the network is tried
    only without a folder."""
    message = stops(CUBE.dataset, lines=5, call=lambda: locate(CUBE, folder))
    first, *ways = message.splitlines()
    assert first.startswith(f"no {FILE} in {folder or 'data'} (")
    assert ("no network" in first) == (not folder) == bool(places.downloads)
    for words, way in zip(
        ("--dataset-dir", places.cache, "download", "collect"), ways, strict=True
    ):
        assert str(words) in way


def test_shards_are_sorted_and_without_validation_files(places):
    """All files of the dataset under --dataset-dir, in folders too."""
    folder = places.here / "own" / "sub"
    folder.mkdir(parents=True)
    names = ["play-v0-010", "play-v0-002", "play-v0-002-val", "play-v0-100", "noisy-v0-000"]
    for name in names:
        (folder / f"cube-double-{name}.npz").touch()
    (folder / "cube-double-play-v0.json").touch()
    found = [path.stem.rsplit("-", 1)[1] for path in locate(CUBE, "own")]
    assert found == ["002", "010", "100"]


def test_shards_come_before_the_ordinary_file(places):
    """Of the folder that is named; that comes before files of other names."""
    folder = places.here / "own"
    folder.mkdir()
    for name in ("v0", "v0-val", "v0-old", "v0-000", "v0-001"):
        (folder / f"cube-double-play-{name}.npz").touch()
    assert [path.stem[-3:] for path in locate(CUBE, "own")] == ["000", "001"]
    for name in ("v0-000", "v0-001"):
        (folder / f"cube-double-play-{name}.npz").unlink()
    assert [path.name for path in locate(CUBE, "own")] == [FILE]
    (folder / FILE).unlink()
    assert [path.stem[-3:] for path in locate(CUBE, "own")] == ["old"]
    (folder / "cube-double-play-v0-new.npz").touch()  # not trained on in turns, as shards are
    words = "several other files", "play-v0-new.npz", "play-v0-old.npz"
    stops(*words, lines=3, call=lambda: locate(CUBE, "own"))


def test_point_mazes_collect_themselves_and_others_on_request(places):
    """Into data/ or --dataset-dir, without a try of the network."""
    assert locate(MAZE)[0].resolve() == places.here / "data" / "pointmaze-medium-stitch-v0.npz"
    assert locate(CUBE, "own", 1234)[0].resolve() == places.here / "own" / FILE
    first, second = places.collected
    assert first == (MAZE.dataset, 200_000, "data") and second == ("cube-double-play", 1234, "own")
    stops("(13 is unlucky)", lines=5, call=lambda: locate(CUBE, "", 13))
    assert not places.downloads


def test_a_folder_in_the_home_directory(places, monkeypatch):
    """--dataset-dir=~/own, which a shell does not expand, is the folder collect writes to."""
    monkeypatch.setenv("HOME", str(places.here))
    (places.here / "own").mkdir()
    (places.here / "own" / FILE).touch()
    assert locate(CUBE, "~/own")[0].resolve() == places.here / "own" / FILE


# --- what identifies a dataset -------------------------------------------------------------------


def test_the_identity_of_a_dataset(tmp_path):
    """That of its numbers: not of the place or the name, nor of how they are packed; another one of
    the same size and name has another, and so have shards in another order."""
    folders = [tmp_path / name for name in ("one", "two", "three", "four")]
    for folder in folders:
        folder.mkdir()
    rng = np.random.default_rng(0)
    numbers = np.float32(rng.normal(size=(4, 2)))
    first = write(folders[0], observations=numbers)
    same = write(folders[1], "renamed.npz", observations=numbers)
    other = write(folders[2], observations=numbers[::-1])
    with np.load(first) as file:
        np.savez_compressed(folders[3] / "packed.npz", **file)
    assert first.stat().st_size == other.stat().st_size and first.name == other.name
    found = identify([first])
    assert set(found) == {"checksum"} and len(found["checksum"]) == 8
    assert found == identify([same]) == identify([folders[3] / "packed.npz"])
    assert found != identify([other]) and found != identify([first, other])
    assert identify([first, other]) != identify([other, first])


def test_the_identity_of_a_damaged_file(tmp_path):
    """One line that names it."""
    (tmp_path / "empty.npz").touch()
    (tmp_path / "text.npz").write_text("text")
    for path in (tmp_path / "empty.npz", tmp_path / "text.npz", tmp_path / "absent.npz"):
        stops(f"bad dataset {path}", call=lambda path=path: identify([path]))
