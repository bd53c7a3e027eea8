"""RLPD, exactly: sizes, every loss and its gradient against the specification (float64), batches of
two halves against a slow sampler, the density, the temperature, and what is refused.

Shapes as in baselines/rlpd.py: B batch, S observation, A chunk of actions, K critics.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from baselines import rlpd
from common.errors import UserError
from common.flags import parse
from common.sampling import Dataset, Replay
from tests.helpers import reference
from tests.helpers.reference import (
    S,
    check_loss,
    check_update,
    close,
    count_parameters,
    gaussian,
    gradient,
    make_batch,
    pessimistic,
    temporal_difference,
    values,
)

pytestmark = pytest.mark.usefixtures("quick_compile")
arguments = partial(reference.arguments, rlpd)
make_state = partial(reference.make_state, rlpd)
ARGS = arguments(rlpd_alpha=0.3, pessimism=0.8)


# --- the formulas again, straight from the specification -----------------------------------------


def log_density(u, mean, log_std):
    """log pi(tanh u) with u ~ N(mean, std), (B,): 1 - tanh^2 is 1 / cosh^2."""
    log_cosh = jnp.abs(u) + jnp.log1p(jnp.exp(-2 * jnp.abs(u))) - jnp.log(2)
    return (jax.scipy.stats.norm.logpdf(u, mean, jnp.exp(log_std)) + 2 * log_cosh).sum(-1)


def expected_critic(args, params, state, batch, key):
    mean, log_std = gaussian(state.params["actor"], batch.next_observations)
    actions = jnp.tanh(mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape))
    return temporal_difference(args, params, state, batch, actions)


def expected_actor(args, params, state, batch, key):
    s, (B, A) = batch.observations, batch.actions.shape
    mean, log_std = gaussian(params["actor"], s)
    u = mean + jnp.exp(log_std) * jax.random.normal(key, (B, A))
    log_prob = log_density(u, mean, log_std)
    value = pessimistic(args, values(state.params["critic"], s, jnp.tanh(u)))
    soft = sum(jnp.exp(state.params["log_alpha"]) * log_prob - value) / B
    entropy = -sum(jax.lax.stop_gradient(log_prob)) / B
    alpha = jnp.exp(params["log_alpha"])
    metrics = dict(actor_q=sum(value) / B, entropy=entropy, alpha=alpha)
    return soft + alpha * (entropy + A / 2), metrics


def expected_cloning(args, params, state, batch, key):
    actions = jnp.minimum(jnp.maximum(batch.actions, -1 + 1e-5), 1 - 1e-5)
    u = 0.5 * jnp.log((1 + actions) / (1 - actions))
    log_prob = log_density(u, *gaussian(params["actor"], batch.observations))
    loss = -sum(batch.valid * log_prob) / len(actions)
    return args.rlpd_alpha * loss, dict(cloning_loss=loss)


LOSSES = {  # name -> (of the script, from the specification, the only networks it may move)
    "critic": (rlpd.critic_loss, expected_critic, {"critic"}),
    "actor": (rlpd.actor_loss, expected_actor, {"actor", "log_alpha"}),
    "cloning": (rlpd.cloning_loss, expected_cloning, {"actor"}),
}


# --- sizes, losses, update -----------------------------------------------------------------------


def test_parameter_counts():
    """The published 8,931,867 on antmaze and 9,132,093 on cube-triple; only the critic is averaged,
    and the temperature starts at 1."""
    assert count_parameters(rlpd, 29, 1, 8) == 8_931_867
    assert count_parameters(rlpd, 46, 5, 5) == 9_132_093
    state = jax.jit(partial(rlpd.create, ARGS, S))(jax.random.PRNGKey(0))
    assert set(state.targets) == {"critic"} and state.params["log_alpha"] == 0


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients(float64, name):
    check_loss(rlpd, ARGS, *LOSSES[name])


def test_update(float64):
    """One Adam step on the sum of the losses, without clipping."""
    keys = jax.random.split(make_state(ARGS).key, 4)[1:]
    check_update(rlpd, ARGS, [loss for _, loss, _ in LOSSES.values()], keys, clipped=False)


def test_valid_masks_critic_and_cloning_only(float64):
    """A chunk that ends too early is left out there; its state counts in the actor's loss."""
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    none = batch._replace(valid=0 * batch.valid)
    for name, (loss, *_) in LOSSES.items():
        masked, plain = (gradient(loss, ARGS, state, x, key) for x in (none, batch))
        if name == "actor":
            close(masked, plain, 0)
        else:
            assert masked[0] == 0 and plain[0] != 0


def test_actions_on_the_border_are_cloned(float64):
    """Actions of exactly -1 and 1 have a finite likelihood: that of 1 - 1e-5."""
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    border, inside = (batch._replace(actions=x * jnp.sign(batch.actions)) for x in (1, 1 - 1e-5))
    one, two = (gradient(rlpd.cloning_loss, ARGS, state, x, key) for x in (border, inside))
    assert np.isfinite(one[0])
    close(one, two)


def test_without_cloning(float64):
    """alpha = 0 is soft actor-critic: its likelihood is logged, and moves nothing."""
    args = dataclasses.replace(ARGS, rlpd_alpha=0.0)
    inputs = make_state(args), make_batch(args), jax.random.PRNGKey(7)
    loss, grads = gradient(rlpd.cloning_loss, args, *inputs)
    assert loss == 0 and not any(np.any(x) for x in jax.tree.leaves(grads))
    _, metrics = rlpd.cloning_loss(args, inputs[0].params, *inputs)
    close(0.3 * metrics["cloning_loss"], expected_cloning(ARGS, inputs[0].params, *inputs)[0])


def test_temperature_seeks_half_an_entropy_per_dimension(float64):
    """d L / d log alpha = alpha (H + A / 2): alpha falls while the entropy is above -A / 2."""
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    loss = lambda log_alpha: rlpd.actor_loss(
        ARGS, state.params | dict(log_alpha=log_alpha), state, batch, key
    )
    grad, metrics = jax.jit(jax.grad(loss, has_aux=True))(jnp.log(0.7))
    close(grad, 0.7 * (metrics["entropy"] + ARGS.chunk_length * ARGS.action_size / 2))


def test_density(float64):
    """scipy's log N(u) - log |d tanh u / du|, and its mass on (-1, 1) is 1."""
    mean, log_std = 0.4, -0.3
    noise = np.linspace(-7, 7, 100_001)
    u = mean + np.exp(log_std) * noise
    density = np.exp(rlpd.log_density(u[:, None], noise[:, None], np.float64(log_std)))
    normal = scipy.stats.norm.pdf(u, mean, np.exp(log_std))
    np.testing.assert_allclose(density, normal / (1 - np.tanh(u) ** 2), 1e-8)
    assert abs(np.trapezoid(density, np.tanh(u)) - 1) < 1e-6


def test_a_single_critic_has_a_gradient(float64):
    """The deviation over one critic is 0, where a root has no derivative."""
    args = dataclasses.replace(ARGS, num_critics=1)
    inputs = make_state(args), make_batch(args), jax.random.PRNGKey(7)
    loss, grads = gradient(rlpd.actor_loss, args, *inputs)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((loss, grads)))


def test_critics_that_agree_have_a_gradient(float64):
    """Two equal critics: their deviation is 0, where a root has no derivative, and so is its part
    of the gradient, which is that of a single one."""
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    equal = jax.tree.map(lambda x: 0 * x + x[:1], state.params["critic"])
    state = state.replace(params=state.params | dict(critic=equal))
    loss, grads = gradient(rlpd.actor_loss, ARGS, state, batch, key)
    none = dataclasses.replace(ARGS, pessimism=0.0)
    close((loss, grads), gradient(rlpd.actor_loss, none, state, batch, key))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


def test_acting(float64):
    """tanh(mean + std noise) of the actor; no other network matters."""
    args = dataclasses.replace(ARGS, batch_size=200)
    state, s, key = make_state(args), make_batch(args).observations, jax.random.PRNGKey(5)
    act = jax.jit(partial(rlpd.sample_actions, args))
    mean, log_std = gaussian(state.params["actor"], s)
    actions = act(state, s, key)
    close(actions, jnp.tanh(mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)))
    assert (np.abs(actions) <= 1).all() and not np.allclose(actions, jnp.tanh(mean), atol=0.1)
    double = partial(jax.tree.map, lambda x: 2 * x)
    other = double(state.params) | dict(actor=state.params["actor"])
    close(act(state.replace(params=other, targets=double(state.targets)), s, key), actions, 0)


# --- batches -------------------------------------------------------------------------------------

CAPACITY, TASK = 12, 1


def make_data(replay_size, rows=20):
    """A dataset of two trajectories with states 0, 1, ..., two tasks; a replay with states 100,
    101, ... whose next states are 200, 201, ..., an end at slot 4, and rubbish in empty slots."""
    rng, ends = np.random.default_rng(0), np.arange(rows) % 10 == 9
    column = lambda n, start: np.float32(start + np.arange(n))[:, None]
    numbers = lambda *shape: np.float32(rng.normal(size=shape))
    data = Dataset(
        observations=column(rows + 2, 0),
        rows=np.int32(np.arange(rows) + (np.arange(rows) >= 10)),
        actions=numbers(rows, 2),
        rewards=numbers(2, rows),
        masks=np.float32(rng.random((2, rows)) < 0.8),
        terminals=np.float32(ends),
    )
    there = np.arange(CAPACITY) < replay_size
    fill = lambda x: np.where(there.reshape(-1, *[1] * (x.ndim - 1)), x, np.nan).astype("f4")
    replay = Replay(
        observations=fill(column(CAPACITY, 100)),
        next_observations=fill(column(CAPACITY, 200)),
        actions=fill(numbers(CAPACITY, 2)),
        rewards=fill(numbers(CAPACITY)),
        masks=fill(np.float32(rng.random(CAPACITY) < 0.8)),
        terminals=fill(np.float32(np.arange(CAPACITY) == 4)),
        size=np.int32(replay_size),
    )
    return jax.tree.map(jnp.asarray, (data, replay))


def chunk(source, start, H, discount):
    """The specification's recursion, for arrays states, next states, actions, rewards, masks and
    terminals of one source."""
    states, following, actions, rewards, masks, terminals = source
    R, m, e, after = rewards[start], masks[start], terminals[start], following[start]
    for i in range(1, H):
        k, v = start + i, 1 - e
        R = R + discount**i * rewards[k] * v
        m = v * min(m, masks[k]) + (1 - v) * m
        after = v * following[k] + (1 - v) * after
        e = max(e, terminals[k])
    v = 1 - max(terminals[start : start + H - 1], default=0)
    return states[start], actions[start : start + H].ravel(), R, m, after, v


@pytest.mark.parametrize("replay_size, H", [(12, 3), (7, 3), (3, 3), (2, 1), (1, 1)])
def test_batches_are_half_and_half(replay_size, H):
    """Every chunk of the first half is one of the dataset, with the task's rewards, every chunk of
    the second half one of the replay alone; all of them come equally often, each with each of the
    other half, and no empty slot."""
    args = arguments(chunk_length=H, batch_size=4000, discount=0.9)
    data, replay = make_data(replay_size)
    draw = jax.jit(lambda key: rlpd.sample_halves(key, args, data, replay, TASK))
    batch = jax.tree.map(np.asarray, draw(jax.random.PRNGKey(0)))
    rows, states = np.asarray(data.rows), np.asarray(data.observations)
    old = states[rows], states[rows + 1], data.actions, data.rewards[TASK], data.masks[TASK]
    new = replay.observations, replay.next_observations, replay.actions, replay.rewards
    new = *(x[:replay_size] for x in new), replay.masks[:replay_size]
    sources, drawn = ((*old, data.terminals), (*new, replay.terminals[:replay_size])), []
    for source, half in zip(sources, (slice(None, 2000), slice(2000, None))):
        source, part = [*map(np.asarray, source)], [x[half] for x in batch]
        first = source[0][0, 0]
        starts = np.searchsorted(source[0][:, 0], part[0][:, 0])
        assert part[0].min() >= first and part[0].max() <= source[0][-1, 0]
        drawn.append(starts)
        counts = np.bincount(starts)
        assert len(counts) == len(source[0]) - H + 1
        assert len(counts) == 1 or scipy.stats.chisquare(counts).pvalue > 1e-4
        for start in range(len(counts)):
            expected = chunk(source, start, H, 0.9)
            for found, x in zip(part, expected):
                x = np.broadcast_to(x, found[starts == start].shape)
                np.testing.assert_allclose(found[starts == start], x, rtol=1e-5, atol=1e-6)
    pairs = np.prod([len(np.unique(starts)) for starts in drawn])
    assert len({*zip(*drawn)}) == pairs  # the halves are drawn independently


def test_training_sees_both_halves(monkeypatch):
    """`train_chunk` hands batches of B chunks, half and half, to the update; each agent those of
    its own replay and task."""
    args = arguments(chunk_length=1, batch_size=6, action_size=2)
    data, replay = make_data(5)
    replay = jax.tree.map(lambda x: jnp.stack([x, x + 1000 * (x.ndim == 2)]), replay)
    seen = []
    state = rlpd.State(dict(x=jnp.zeros(2)), {}, (), jax.random.split(jax.random.PRNGKey(0)))

    def spy(args, state, batch):
        jax.debug.callback(lambda s, x: seen.append(np.asarray(s[:, 0])), batch.observations, 0)
        return state, dict(zero=0.0 * batch.rewards.sum())

    monkeypatch.setattr(rlpd, "update", spy)
    train = rlpd.train_chunk.__wrapped__
    zeros = dict(zero=jnp.zeros(2), updates=jnp.zeros(2))
    train(args, state, zeros, data, replay, jnp.array([0, 1]), 3)
    jax.effects_barrier()
    assert len(seen) == 6 and all(x.shape == (6,) for x in seen)
    assert all((x[:3] < 22).all() for x in seen)
    ranges = sorted({(x[3:].min() // 1000, x[3:].max() // 1000) for x in seen})
    assert ranges == [(0, 0), (1, 1)]


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--start-training", "4"], "--start-training must be at least --chunk-length"),
        (["--batch-size", "7"], "--batch-size must be even"),
    ],
)
def test_refusals(flags, message):
    """A replay without a whole chunk must not be sampled; half a chunk does not exist."""
    with pytest.raises(UserError, match=message):
        parse(rlpd.Args, rlpd.ENV_DEFAULTS, flags)
    parse(rlpd.Args, rlpd.ENV_DEFAULTS, ["--start-training", "5", "--batch-size", "2"])
