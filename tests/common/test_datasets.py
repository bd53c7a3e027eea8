"""Tests of a run's dataset: the schedule of the shards, those that are kept, and labels."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import datasets
from common.dataset_files import identify, read
from common.datasets import OfflineDataset, has_room
from common.environments import resolve
from tests.helpers.dataset_files import MAZE, write
from tests.helpers.messages import stops

FOREVER = 10**6  # offline steps


def shard(folder, number, rows=4):
    states = np.full((rows, 2), number, np.float32)
    actions = np.ones((rows, 2), np.float32)
    name = f"{MAZE.dataset}-v0-00{number}.npz"
    return write(folder, name, rows, observations=states, actions=actions)


@pytest.fixture(autouse=True)
def interval(monkeypatch):
    """Shards take turns more often."""
    monkeypatch.setattr(datasets, "SWAP_INTERVAL", 4)


@pytest.fixture
def three(tmp_path):
    return [shard(tmp_path, i) for i in range(3)]


def dataset(paths, env=MAZE.dataset, tasks=(1,), sparse=False, chunk_length=1, **flags):
    """The dataset of a run on the folder of these files."""
    args = SimpleNamespace(
        env=env,
        dataset_dir=str(paths[0].parent),
        dataset="",
        collect=0,
        tasks=tasks,
        reward_scale=flags.pop("reward_scale", 1.0),
        reward_shift=flags.pop("reward_shift", 0.0),
        normalize_observations=flags.pop("normalize_observations", False),
        sparse=sparse,
        chunk_length=chunk_length,
        env_kwargs=flags.pop("env_kwargs", ""),
        max_episode_steps=0,
        eval_episodes=flags.pop("eval_episodes", 1),
        online_steps=0,
        offline_steps=flags.pop("offline_steps", FOREVER),
    )
    return OfflineDataset(args, 1)


def number(data):
    return int(data.observations[0, 0])


def test_arguments_that_the_environment_does_not_take(three):
    """They are refused at once, not by the first evaluation."""
    dataset(three, env_kwargs='{"render_mode": null}')
    words = "gymnasium cannot make", "frame_skp"
    stops(*words, call=lambda: dataset(three, env_kwargs='{"frame_skp": 2}'))
    dataset(three, env_kwargs='{"frame_skp": 2}', eval_episodes=0)  # nothing is played


# --- the schedule --------------------------------------------------------------------------------


def test_what_a_run_asks_for(three, capsys):
    """Sizes, and the identity of all files; a line says what it is."""
    data = dataset(three)
    assert (data.num_transitions, data.observation_size, data.action_size) == (3, 2, 2)
    assert data.identity == identify(three) | dict(observation_size=2)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"dataset      3 files like {three[0].name}, 3 transitions"
    assert said[1:] == [
        f"Note: nothing in {three[0].name} solves task 1: its rewards teach nothing."
    ]
    for path in three[1:]:
        path.unlink()
    one = dataset(three)
    assert one.identity["checksum"] == identify(three[:1])["checksum"]
    assert f"dataset      1 files like {three[0].name}" not in capsys.readouterr().out
    assert one.at(0) is one.at(10**6)


def test_the_next_shard_is_read_ahead(three, monkeypatch):
    """By the thread, before it is asked for."""
    seen = []
    monkeypatch.setattr(
        datasets, "read", lambda path, *x, **y: seen.append(path) or read(path, *x, **y)
    )
    data = dataset(three)
    data.at(0)
    data._thread.shutdown()
    assert seen == three[:2]


def test_the_official_schedule(three):
    """The next shard takes over before every 4th update is drawn, cyclically; the number of updates
    until then includes the next one."""
    data = dataset(three)
    seen = []
    for step in range(29):
        seen.append(number(data.at(step)))
        assert data.updates_until_swap(step) == 4 - (step + 1) % 4
    assert seen == [update // 4 % 3 for update in range(1, 30)]
    assert seen[:4] == [0, 0, 0, 1]


def test_the_interval_is_the_official_one(monkeypatch):
    monkeypatch.undo()
    assert datasets.SWAP_INTERVAL == 1000


def test_calls_of_several_updates_see_the_same_shards(three):
    """A loop that asks for as many updates as the data stay passes no swap."""
    data, step, seen = dataset(three, offline_steps=30), 0, []
    while step < 30:
        now = number(data.at(step))
        updates = min(data.updates_until_swap(step), 30 - step)
        seen += [now] * updates
        step += updates
    assert seen == [update // 4 % 3 for update in range(1, 31)]


def test_the_online_phase_starts_where_the_offline_phase_ended(three):
    """Its own steps count from 1; the swaps of the offline phase are added."""
    data = dataset(three, offline_steps=10)  # swaps at updates 4 and 8
    assert number(data.at(9)) == 2
    online = [number(data.at(10 + step)) for step in range(12)]
    assert online == [2, 2, 2, 0, 0, 0, 0, 1, 1, 1, 1, 2]


def test_an_online_phase_alone(three):
    data = dataset(three, offline_steps=0)
    assert [number(data.at(step)) for step in range(9)] == [0, 0, 0, 1, 1, 1, 1, 2, 2]


def test_a_jump_after_a_restart_gives_the_same_shard(three):
    """What was loaded ahead, what is loaded at once and what is read are the same."""
    directly = [read(path, MAZE, (1, 2), clip=False) for path in three]
    for step in (0, 5, 8, 2, 9, 1, 13):
        data = dataset(three, tasks=(1, 2))
        data.at(0)
        for at in (step, step + 4):  # a jump, then the shard that was loaded meanwhile
            direct = directly[(at + 1) // 4 % 3]
            for x, y in zip(jax.tree.leaves(data.at(at)), jax.tree.leaves(direct), strict=True):
                assert np.array_equal(x, y) and x.dtype == y.dtype


def test_many_threads_label_at_once(three):
    """They share the environments that label."""
    expected = read(three[0], MAZE, (1, 2))
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: read(three[0], MAZE, (1, 2)), range(100)):
            assert np.array_equal(found.rewards, expected.rewards)


def test_the_first_call_may_be_for_the_last_shard(three):
    """Without an earlier call, and then on to shard 0."""
    data = dataset(three)
    assert [number(data.at(step)) for step in (7, 11)] == [2, 0]


def test_a_single_file_stays_for_ever_and_is_clipped(three, tmp_path):
    """Shards keep their actions as they are."""
    many = dataset(three)
    (tmp_path / "alone").mkdir()
    single = dataset([shard(tmp_path / "alone", 0)], offline_steps=50)
    assert number(single.at(4)) == 0 and single.updates_until_swap(4) == 46
    assert single.at(4).actions.max() == np.float32(1 - 1e-5)
    assert many.at(0).actions.max() == many.at(3).actions.max() == 1


@pytest.mark.parametrize("files, name", [(1, "puzzle-4x4"), (2, "puzzle-4x4"), (1, "scene")])
def test_the_ordinary_file_of_a_100m_domain(monkeypatch, capsys, tmp_path, files, name):
    """A line says that published results are on more."""
    source = resolve(name)
    for i in range(files):
        write(tmp_path, f"{source.dataset}-v0-00{i}.npz")
    tiny = read(tmp_path / f"{source.dataset}-v0-000.npz", MAZE, (1,))
    monkeypatch.setattr(datasets, "read", lambda *_, **__: tiny)
    dataset([tmp_path / "x"], env=name)
    said = capsys.readouterr().out
    note = "Note: published results use the 100M dataset; this run uses puzzle-4x4-play-v0-000.npz."
    assert (note in said) == (files == 1 and name == "puzzle-4x4")


def test_shards_of_different_length_are_refused(three, tmp_path):
    """In one line, when the odd one's turn comes."""
    shard(tmp_path, 1, rows=5)
    data = dataset(three)
    data.at(2)
    stops("shards 0 and 1 have different shapes", call=lambda: data.at(3))


def test_damaged_shards_are_refused(three):
    """By their name: at once, if it is no archive, else at their turn."""
    content = three[1].read_bytes()
    three[1].write_bytes(b"")
    stops(f"bad dataset {three[1]}", call=lambda: dataset(three))
    damaged = bytearray(content)
    damaged[content.index(b"observations.npy") + 170] ^= 255  # in the numbers
    three[1].write_bytes(damaged)
    data = dataset(three)
    data.at(0)
    stops(f"bad dataset {three[1]}", "observations", call=lambda: data.at(3))


@pytest.mark.parametrize("length", [3, 4, 2**31 - 1])
def test_chunks_longer_than_every_trajectory(three, length):
    """Are refused, because nothing would be learned."""
    if length > 3:
        words = f"--chunk-length {length} must be at most 3", three[0].name
        stops(*words, call=lambda: dataset(three, chunk_length=length))
    else:
        dataset(three, chunk_length=length)


def test_a_swap_waits_for_the_training_on_the_shard_before(three):
    """The loop that calls is ahead of its device. Else as many shards as it is ahead are held."""
    shards = dataset(three)
    data = shards.at(2)
    step = lambda i, x: x @ x / 2 + data.observations[0, 0]  # noqa: E731
    train = jax.jit(lambda n: jax.lax.fori_loop(0, n, step, jnp.zeros((200, 200))))
    train(1)  # compiles
    result = train(1000)
    assert not result.is_ready()
    shards.at(3)
    assert result.is_ready()


# --- shards that are kept ------------------------------------------------------------------------


@pytest.fixture
def reads(tmp_path, monkeypatch):
    """Numbers of this test's shards that were read, in turn."""
    seen = []

    def counted(path, *rest, **flags):
        if path.parent == tmp_path:  # the thread of another test may be at work still
            seen.append(int(path.stem[-1]))
        return read(path, *rest, **flags)

    monkeypatch.setattr(datasets, "read", counted)
    return seen


@pytest.mark.parametrize("room", range(5))
def test_a_device_keeps_the_shards_that_it_has_room_for(tmp_path, monkeypatch, reads, room):
    """The schedule is the same. With room for all each is read once, else what has no room again in
    every round; what was kept stays when the room is used up."""
    data = dataset([shard(tmp_path, i) for i in range(4)])
    monkeypatch.setattr(datasets, "has_room", lambda _: len(data._kept) < room)
    seen = [number(data.at(step)) for step in range(48)]
    data._thread.shutdown()
    assert seen == [update // 4 % 4 for update in range(1, 49)]
    assert sorted(data._kept) == list(range(room))
    assert reads[:4] == [0, 1, 2, 3]
    again = [i for i in range(4) if i >= room] if room < 3 else []  # the last stays as the next
    assert reads[4 : 4 + 2 * len(again)] == 2 * again


def test_the_online_phase_keeps_no_shards(three, monkeypatch, reads):
    """From its first step on, in the middle of a shard's turn: its replay needs the room."""
    monkeypatch.setattr(datasets, "has_room", lambda _: True)
    data = dataset(three, offline_steps=14)
    for step in range(14):
        data.at(step)
    assert len(data._kept) == 3 and reads == [0, 1, 2]
    online = [(step, number(data.at(14 + step)), len(data._kept)) for step in (0, 3, 7)]
    assert online == [(0, 0, 0), (3, 1, 0), (7, 2, 0)]
    data._thread.shutdown()
    assert reads == [0, 1, 2, 1, 2, 0]


def test_room_on_a_device(three, monkeypatch):
    """For two more datasets than the peak and a fifth of all. A CPU tells nothing: no room."""
    data = read(three[0], MAZE, (1,))
    assert not has_room(data)
    two, stats = 2 * sum(x.nbytes for x in jax.tree.leaves(data)), dict(bytes_limit=10_000)
    device = SimpleNamespace(memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    for peak, room in ((7999 - two, True), (8000 - two, False), (9000, False)):
        stats["peak_bytes_in_use"] = peak
        assert has_room(data) == room
    stats.clear()
    assert not has_room(data)


# --- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse, expected", [(False, [-3, -1, 0]), (True, [-1, -1, 0])])
def test_data_and_transitions_are_labelled_alike(three, sparse, expected, monkeypatch):
    """With `sparse` -1 until all is solved."""
    rewards = np.float32([[-3], [-1], [0]])
    read_three = read(three[0], MAZE, (1,)).replace(rewards=rewards.T)
    monkeypatch.setattr(datasets, "read", lambda *_, **__: read_three)
    data = dataset(three, sparse=sparse)
    found = data.relabel(dict(rewards=rewards, masks=rewards))
    assert found["rewards"][:, 0].tolist() == data.at(0).rewards[0].tolist() == expected
    assert found["rewards"].dtype == data.at(0).rewards.dtype == np.float32
    assert found["masks"] is rewards
