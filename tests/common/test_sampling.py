"""Tests of sampling: chunks as the official sampler draws them, and the replay."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.checkpoints import join_parts
from common.sampling import Batch, Dataset, Replay, sample
from tools.shared_blocks import ROOT

FIELDS = "observations next_observations actions rewards masks terminals".split()


# --- chunks --------------------------------------------------------------------------------------


def dataset(lengths, states, actions, rewards, masks):
    """A Dataset of trajectories of `lengths` transitions; `states`: the last ones included."""
    rows = np.concatenate([np.arange(n) + sum(lengths[:i]) + i for i, n in enumerate(lengths)])
    terminals = np.isin(np.arange(sum(lengths)), np.cumsum(lengths) - 1)
    return Dataset(
        observations=jnp.array(states, jnp.float32),
        rows=jnp.array(rows, jnp.int32),
        actions=jnp.array(actions, jnp.float32),
        rewards=jnp.array(np.atleast_2d(rewards), jnp.float32),
        masks=jnp.array(np.atleast_2d(masks), jnp.float32),
        terminals=jnp.array(terminals, jnp.float32),
    )


def draw(seed, data, replay, task, size, H, discount):
    """A batch, and the arrays of the same batch on the host."""
    draw_one = jax.jit(sample, static_argnums=(4, 5, 6))
    return jax.device_get(draw_one(jax.random.key(seed), data, replay, task, size, H, discount))


def empty(data):
    """The replay of one agent, without a slot."""
    sizes = data.observations.shape[1], data.actions.shape[1]
    return jax.tree.map(lambda x: x[0], Replay.create(1, 0, *sizes))


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
    return Batch(arrays["observations"][start], actions, R, m, after, v)


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
    replay = Replay(**{k: jnp.array(x) for k, x in full.items()}, size=jnp.array(online))

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
    for name, values in zip(Batch._fields, zip(*slow)):
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
    one = jax.jit(lambda key, replay, task: sample(key, data, replay, task, 64, 5, 0.99))
    keys, tasks = jax.random.split(jax.random.key(3)), jnp.array([2, 0])
    many = jax.jit(jax.vmap(one))(keys, replay, tasks)
    for agent in range(2):
        alone = one(keys[agent], jax.tree.map(lambda x: x[agent], replay), tasks[agent])
        for name in Batch._fields:
            both = getattr(many, name)[agent], getattr(alone, name)
            np.testing.assert_allclose(*both, rtol=1e-6, atol=1e-7, err_msg=name)


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
    data = Dataset(observations, jnp.int32(rows), actions, *others)
    replay, keys = empty(data), jax.random.split(jax.random.key(0))
    one = lambda key, data: sample(key, data, replay, 0, 2000, 1, 0.9)
    batch = jax.device_get(jax.jit(jax.vmap(one, (0, None)))(keys, data))
    k = rows[batch.actions[..., 0].astype(int)]  # (2, 2000)
    assert (k * S > 2**31).any() and (k * S < 2**31).any()
    assert np.array_equal(batch.observations, states[k])
    assert np.array_equal(batch.next_observations, states[k + 1])


# --- replay --------------------------------------------------------------------------------------


def transitions(rng, agents, steps=1):
    """Transitions as `append` takes them, with a column too many."""
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


def test_a_replay_keeps_transitions_in_their_order():
    """One or several at a time."""
    rng, replay = np.random.default_rng(0), Replay.create(2, 6, 3, 2)
    assert replay.size.tolist() == [0, 0]
    steps = [transitions(rng, 2, n) for n in (1, 1, 2, 1)]
    for i, step in enumerate(steps):
        replay = replay.append(step)
        check_replay(replay, steps[: i + 1], 6)


@pytest.mark.parametrize("capacity", [1, 5, 6])
def test_a_full_replay_forgets_the_oldest(capacity):
    """A ring: transition k is in slot k modulo the capacity, whatever the number of rounds; the
    size counts on. What is appended is not changed, and one program serves all steps."""
    rng, replay, steps = np.random.default_rng(2), Replay.create(2, capacity, 3, 2), []
    programs = 0
    for k in range(3 * capacity + 2):
        steps.append(transitions(rng, 2))
        replay = replay.append(steps[-1])
        programs = programs or Replay.append._cache_size()
        assert replay.size.tolist() == [k + 1] * 2 and replay.rewards.shape == (2, capacity)
        for name in FIELDS:
            slots = np.asarray(getattr(replay, name))
            for i in range(max(0, k + 1 - capacity), k + 1):
                assert np.array_equal(slots[:, i % capacity], steps[i][name][:, 0]), name
    assert Replay.append._cache_size() == programs


def test_an_empty_replay():
    """Of the sizes that are asked for."""
    replay = Replay.create(2, 4, 7, 3)
    assert replay.observations.shape == replay.next_observations.shape == (2, 4, 7)
    assert replay.actions.shape == (2, 4, 3) and replay.rewards.shape == (2, 4)
    assert {x.dtype.name for x in jax.tree.leaves(replay)} == {"float32", "int32"}
    assert replay.since(0)["actions"].shape == (2, 0, 3)
    assert replay.refill({}) is replay


def test_the_program_of_append_is_the_same_in_every_process():
    """Else it is compiled again at every start: the order of the columns is not that of a set."""
    code = """
import jax, numpy as np
from common.sampling import Replay
replay = Replay.create(1, 5, 3, 2)
rows = {name: np.zeros((1, 1, *x.shape[2:]), np.float32) for name, x in vars(replay).items()}
print(Replay.append.lower(replay, rows).as_text())
"""
    texts = set()
    for seed in ("0", "1", "2"):
        variables = os.environ | dict(PYTHONHASHSEED=seed)
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, check=True)
        texts.add(done.stdout)
    assert len(texts) == 1 and b"dynamic_update_slice" in texts.pop()


@pytest.mark.parametrize("capacity", [1, 4, 7, 100])
def test_a_replay_in_parts_is_the_same(capacity):
    """What came since the part before, put together without parts of which nothing is left, across
    the ring's end or not. Slots, size and types agree, and the ring goes on in the same slots."""
    rng, replay = np.random.default_rng(3), Replay.create(2, capacity, 3, 2)
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
        again = Replay.create(2, capacity, 3, 2).refill(join_parts(parts))
        step, before = transitions(rng, 2), (again, jax.device_get(replay))
        more = (jax.tree.map(jnp.array, x).append(step) for x in before)
        for one, two in (before, more):
            for x, y in zip(*map(jax.tree.leaves, (one, two))):
                assert np.array_equal(x, y) and x.dtype == y.dtype
        if len(parts) > 2:  # one is missing, or two are exchanged
            for wrong in ([parts[0], *parts[2:]], [*parts[:-2], parts[-1], parts[-2]]):
                with pytest.raises(ValueError, match="gap"):
                    join_parts(wrong)
            gaps += 1
    assert replay.since(end)["rewards"].shape == (2, min(59 - end, capacity)) and end > 50
    assert gaps > 0 or capacity < 5


@pytest.mark.parametrize("capacity", [0, 3, 5, 8])
def test_a_replay_of_another_capacity(capacity):
    """Keeps the latest of the transitions, in the slots of their numbers."""
    rng, replay = np.random.default_rng(4), Replay.create(2, 5, 3, 2)
    for _ in range(12):
        replay = replay.append(transitions(rng, 2))
    rows = replay.since(0)
    again = Replay.create(2, capacity, 3, 2).refill(rows | dict(size=12))
    assert again.size.tolist() == [12, 12] and again.rewards.shape == (2, capacity)
    for i in range(min(capacity, 5)):
        number = 11 - i
        np.testing.assert_array_equal(
            again.actions[:, number % capacity], rows["actions"][:, 4 - i]
        )
