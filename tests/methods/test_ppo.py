"""PPO, exactly (float64): losses, gradients, advantages and statistics against the specification
(catalogue entry O-1), what a rollout's end and a time-out do, and one whole step of learning.

Shapes as in baselines/ppo.py: B batch, d action, E environments, T steps of each.
"""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from baselines import ppo
from common.errors import UserError
from common.flags import parse
from tests.helpers import online_reference
from tests.helpers.online_reference import (
    S,
    adam,
    check_loss,
    close,
    count_parameters,
    gradient,
    moves,
    plain,
    relu,
)

pytestmark = pytest.mark.usefixtures("quick_compile")
E, T = 2, 12
SMALL = dict(num_envs=E, rollout_steps=E * T, batch_size=E * T, epochs=1, total_steps=480)
make_args = partial(online_reference.make_args, ppo, **SMALL)
ARGS = make_args(clip_range=0.15, entropy_weight=0.02)


def make_state(args, seed=0):
    return _make_state(args, seed, jax.config.jax_enable_x64)


@cache
def _make_state(args, seed, precision):
    """An agent with random weights, some statistics and running episodes."""
    state = jax.jit(partial(ppo.create, args, S))(jax.random.PRNGKey(seed))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: jnp.asarray(x + 0.3 * rng.normal(size=x.shape), float), state.params
    )
    seen = rng.normal(0.5, 2.0, (50, S)), rng.normal(3.0, 4.0, 50)
    names = "observations", "returns"
    statistics = {
        n: tuple(map(jnp.asarray, (50.0, x.mean(0), x.var(0)))) for n, x in zip(names, seen)
    }
    returns = jnp.asarray(rng.normal(size=E))
    widen = lambda x: jnp.asarray(x, float) if x.dtype == jnp.float32 else x
    opt_state = jax.tree.map(widen, state.opt_state)
    return state.replace(params=params, opt_state=opt_state, statistics=statistics, returns=returns)


def make_batch(args, seed=0, B=40):
    """Steps whose ratios and values are on both sides of the clip range, and within."""
    rng, state = np.random.default_rng(seed), make_state(args)
    s, a = rng.normal(size=(B, S)), rng.normal(size=(B, args.action_size))
    log_prob = density(state.params["policy"], s, a) + rng.normal(0, 0.2, B)
    V = plain(state.params["value"], s, activation=relu)[:, 0] + rng.normal(0, 0.3, B)
    A, R = rng.normal(1, 2, B), V + rng.normal(size=B)
    return ppo.Batch(*map(jnp.asarray, (s, a, log_prob, V, A, R)))


def make_rollout(args, seed=0):
    """Steps of E environments: ends by success, by the clock and none of both."""
    rng = np.random.default_rng(seed)
    terminals = np.zeros((E, T))
    terminals[0, [2, 7]] = terminals[1, [4, T - 1]] = 1
    masks = np.ones((E, T))
    masks[0, 7] = masks[1, 4] = 0  # the others: time-outs
    s, after = 2 * rng.normal(size=(2, E, T, S))
    after[:, :-1] = np.where(terminals[:, :-1, None], after[:, :-1], s[:, 1:])
    arrays = dict(
        observations=s,
        next_observations=after,
        actions=1.5 * rng.normal(size=(E, T, args.action_size)),
        rewards=5 * rng.normal(size=(E, T)),
        masks=masks,
        terminals=terminals,
    )
    return {name: jnp.asarray(x) for name, x in arrays.items()}


# --- the formulas again, straight from the specification -----------------------------------------


def density(policy, s, a):
    """log pi(a|s) from scipy's formula, one dimension after the other."""
    mean = plain(policy["mean"], jnp.asarray(s), activation=relu)
    logs = jax.scipy.stats.norm.logpdf(a, mean, jnp.exp(policy["log_std"]))
    return sum(logs[:, j] for j in range(logs.shape[-1]))


def expected_policy(params, args, batch):
    A = batch.advantages
    A = (A - sum(A) / len(A)) / (jnp.sqrt(sum((A - A.mean()) ** 2) / len(A)) + 1e-8)
    ratio = jnp.exp(density(params, batch.observations, batch.actions) - batch.log_prob)
    low, high = 1 - args.clip_range, 1 + args.clip_range
    moved = jnp.where(ratio > high, high, jnp.where(ratio < low, low, ratio))
    gain = jnp.where(ratio * A < moved * A, ratio * A, moved * A)
    entropy = sum(params["log_std"] + 0.5 * np.log(2 * np.pi * np.e))
    return -gain.mean() - args.entropy_weight * entropy


def expected_value(params, args, batch):
    V, R, c = (
        plain(params, batch.observations, activation=relu)[:, 0],
        batch.returns,
        args.clip_range,
    )
    low, high = batch.values - c, batch.values + c
    near = jnp.where(high < V, high, jnp.where(low > V, low, V))
    worse = jnp.where((V - R) ** 2 > (near - R) ** 2, (V - R) ** 2, (near - R) ** 2)
    return args.value_weight * 0.5 * worse.mean()


def expected_preparation(args, state, rollout):
    """Everything step by step, with plain loops over plain numbers, for a list of all states seen.
    The value of a time-out's last observation goes into its reward, as the specification has it."""
    x = {name: np.asarray(value) for name, value in rollout.items()}
    gamma, limit = args.discount, args.normal_clip
    totals, last = np.zeros((E, T)), np.zeros(E)
    for e in range(E):
        total = float(state.returns[e])
        for t in range(T):
            total = x["rewards"][e, t] + gamma * total
            totals[e, t] = total
            total = 0.0 if x["terminals"][e, t] else total
        last[e] = total
    statistics = {}
    for name, new in dict(
        observations=x["observations"].reshape(-1, S), returns=totals.ravel()
    ).items():
        n, mean, var = map(np.asarray, state.statistics[name])
        old = np.sqrt(var) * np.concatenate([np.ones(25), -np.ones(25)]).reshape(
            -1, *[1] * mean.ndim
        )
        both = np.concatenate([mean + old, new])  # 50 numbers with the old mean and variance
        statistics[name] = (n + len(new), both.mean(0), both.var(0))
    normal = lambda s, stats: np.clip((s - stats[1]) / np.sqrt(stats[2] + 1e-8), -limit, limit)
    value = lambda s: np.asarray(plain(state.params["value"], s, activation=relu)[..., 0])
    stats = statistics["observations"]
    V, after = value(normal(x["observations"], stats)), value(normal(x["next_observations"], stats))
    r = np.clip(x["rewards"] / np.sqrt(statistics["returns"][2] + 1e-8), -limit, limit)
    A = np.zeros((E, T))
    for e in range(E):
        for t in reversed(range(T)):
            over, terminated = x["terminals"][e, t], x["masks"][e, t] == 0
            if over and not terminated:
                r[e, t] += gamma * after[e, t]
            delta = r[e, t] + gamma * (1 - over) * after[e, t] - V[e, t]
            next_A = A[e, t + 1] if t + 1 < T else 0.0
            A[e, t] = delta + gamma * args.gae_lambda * (1 - over) * next_A
    s = normal(x["observations"], stats).reshape(-1, S)
    a = x["actions"].reshape(E * T, -1)
    played = normal(x["observations"], state.statistics["observations"]).reshape(-1, S)
    log_prob = np.asarray(density(state.params["policy"], played, a))
    batch = ppo.Batch(*map(jnp.asarray, (s, a, log_prob, V.ravel(), A.ravel(), (A + V).ravel())))
    return statistics, last, batch


# --- losses --------------------------------------------------------------------------------------


def test_class_holds_the_values_of_the_comparison():
    args = ppo.Args()
    assert (args.rollout_steps, args.num_envs, args.epochs, args.batch_size) == (2048, 1, 10, 256)
    assert (args.gae_lambda, args.clip_range, args.value_weight) == (0.95, 0.2, 0.5)
    assert (args.lr, args.max_grad_norm, args.normal_clip, args.discount) == (3e-4, 0.5, 10, 0.99)
    assert args.entropy_weight == 0


def test_policy_loss(float64):
    params, batch = make_state(ARGS).params["policy"], make_batch(ARGS)
    loss = lambda params, batch: ppo.policy_loss(ARGS, params, batch)
    expected = lambda params, batch: expected_policy(params, ARGS, batch)
    check_loss(loss, expected, params, batch)
    _, metrics = loss(params, batch)
    ratio = np.exp(density(params, batch.observations, batch.actions) - batch.log_prob)
    close(metrics["clipped"], (np.abs(ratio - 1) > 0.15).mean(), 1e-6)  # a mean of float32
    close(metrics["kl"], (ratio - 1 - np.log(ratio)).mean())
    assert 0.2 < metrics["clipped"] < 0.9
    close(metrics["entropy"], scipy.stats.norm(0, np.exp(params["log_std"])).entropy().mean())


def test_value_loss(float64):
    params, batch = make_state(ARGS).params["value"], make_batch(ARGS)
    loss = lambda params, batch: ppo.value_loss(ARGS, params, batch)
    expected = lambda params, batch: expected_value(params, ARGS, batch)
    check_loss(loss, expected, params, batch)
    V, c = plain(params, batch.observations, activation=relu)[:, 0], ARGS.clip_range
    logged = dict(critic_loss=expected(params, batch) / ARGS.value_weight)
    logged |= dict(q=V.mean(), target=batch.returns.mean())
    close(loss(params, batch)[1], logged)
    near = jnp.clip(V, batch.values - c, batch.values + c)
    worse = np.abs(near - batch.returns) > np.abs(V - batch.returns)
    sides = np.sign(V - near)  # of the range: above, below, within
    assert {*zip(sides, worse)} == {(1, True), (1, False), (-1, True), (-1, False), (0, False)}
    near = batch.replace(values=plain(params, batch.observations, activation=relu)[:, 0])
    plain_loss = lambda params, batch: (
        0.25
        * ((plain(params, batch.observations, activation=relu)[:, 0] - batch.returns) ** 2).mean()
    )
    close(gradient(loss, params, near), gradient(plain_loss, params, near))


def test_ratio_one_is_the_policy_gradient(float64):
    """At the policy that has played: minus the advantage-weighted gradient of log pi."""
    args = dataclasses.replace(ARGS, entropy_weight=0.0)
    params, batch = make_state(args).params["policy"], make_batch(args)
    batch = batch.replace(log_prob=density(params, batch.observations, batch.actions))
    A = (batch.advantages - batch.advantages.mean()) / batch.advantages.std()
    score = lambda params: -(A * density(params, batch.observations, batch.actions)).mean()
    _, found = gradient(lambda params: ppo.policy_loss(args, params, batch), params)
    close(found, gradient(score, params)[1], 1e-7)


@pytest.mark.parametrize(
    "sign, ratio, still",
    [(1, 1.21, True), (1, 1.19, False), (1, 0.5, False),
     (-1, 0.79, True), (-1, 0.81, False), (-1, 1.5, False)],
)  # fmt: skip
def test_where_clipping_stops_the_gradient(float64, sign, ratio, still):
    """Only where the policy has moved far already, in the direction that pays."""
    args = make_args(entropy_weight=0.0)
    params, batch = make_state(args).params["policy"], make_batch(args)
    assert args.clip_range == 0.2
    log_prob = density(params, batch.observations, batch.actions)
    far = jnp.ones(40).at[0].set(ratio)
    A = jnp.zeros(40).at[0].set(sign)
    batch = batch.replace(log_prob=log_prob - jnp.log(far), advantages=A)
    # The gradient of a batch is the sum of its samples': without the others', that of the first.
    total = gradient(lambda p: ppo.policy_loss(args, p, batch), params)[1]
    normal = (A - A.mean()) / A.std()
    others = gradient(
        lambda p: -(normal * density(p, batch.observations, batch.actions))[1:].sum() / 40, params
    )[1]
    first = jax.tree.map(jnp.subtract, total, others)
    size = max(np.abs(x).max() for x in jax.tree.leaves(first))
    assert (size < 1e-6) == still and (still or size > 1e-3)


# --- advantages ----------------------------------------------------------------------------------


def test_gae_limits(float64):
    """Factor 1: the discounted sum of rewards minus V, if the episode ends by itself; 0: one step
    of temporal difference."""
    rng = np.random.default_rng(0)
    r, V, after = rng.normal(size=(3, E, T))
    after[:, :-1] = V[:, 1:]
    over = np.zeros((E, T))
    over[:, -1] = 1
    found = ppo.advantages(dataclasses.replace(ARGS, gae_lambda=1.0), r, 1 - over, over, V, after)
    powers = ARGS.discount ** np.arange(T)
    monte_carlo = np.array(
        [[(powers[: T - t] * r[e, t:]).sum() for t in range(T)] for e in range(E)]
    )
    close(found, monte_carlo - V)
    found = ppo.advantages(dataclasses.replace(ARGS, gae_lambda=0.0), r, 1 - over, over, V, after)
    close(found, r + ARGS.discount * (1 - over) * after - V)


@pytest.mark.parametrize("terminated", [True, False])
def test_episodes_do_not_leak(float64, terminated):
    """Nothing after an end changes an advantage before it. A success has no future; a time-out
    has that of the observation it ended with, not of the next episode's first one."""
    rollout = make_rollout(ARGS)
    masks = jnp.ones((E, T)).at[0, 5].set(0.0 if terminated else 1.0)
    terminals = jnp.zeros((E, T)).at[0, 5].set(1.0)
    V, after = np.random.default_rng(1).normal(size=(2, E, T))
    inputs = [np.asarray(x) for x in (rollout["rewards"], masks, terminals, V, after)]
    found = ppo.advantages(ARGS, *inputs)
    other = [x.copy() for x in inputs]
    for i in (0, 3, 4):
        other[i][0, 6:] += 10
    again = ppo.advantages(ARGS, *other)
    np.testing.assert_array_equal(found[0, :6], again[0, :6])
    assert not np.isclose(found[0, 6:], again[0, 6:]).any()
    np.testing.assert_array_equal(found[1], again[1])
    rest = 0 if terminated else ARGS.discount * after[0, 5]
    close(found[0, 5], inputs[0][0, 5] + rest - V[0, 5])


def test_prepare(float64):
    """Statistics, rewards, values, advantages, densities and returns; in one batch, environment
    after environment."""
    state, rollout = make_state(ARGS), make_rollout(ARGS)
    new, batch = jax.jit(partial(ppo.prepare, ARGS))(state, rollout)
    statistics, returns, expected = expected_preparation(ARGS, state, rollout)
    close(new.statistics, jax.tree.map(jnp.asarray, statistics))
    close(new.returns, returns)
    close(batch, expected)
    close((new.params, new.key), (state.params, state.key), 0)
    small = dataclasses.replace(ARGS, normal_clip=0.4)  # of observations and rewards
    _, batch = jax.jit(partial(ppo.prepare, small))(state, rollout)
    close(batch, expected_preparation(small, state, rollout)[2])
    assert np.abs(batch.observations).max() == 0.4


def test_statistics(float64):
    """Parts of any sizes give the count, mean and variance of all, from the very first on."""
    rng = np.random.default_rng(0)
    parts = [rng.normal(i, 1 + i, (n, S)) for i, n in enumerate((7, 1, 30, 3))]
    statistics = jnp.zeros(()), jnp.zeros(S), jnp.ones(S)
    for i, part in enumerate(parts, 1):
        statistics = ppo.merge(statistics, jnp.asarray(part))
        whole = np.concatenate(parts[:i])
        close(statistics, (float(len(whole)), whole.mean(0), whole.var(0)))


def test_statistics_in_float32():
    """A million steps of an observation far from 0: its deviation keeps three digits."""
    rng = np.random.default_rng(0)
    statistics = jnp.zeros(()), jnp.zeros(()), jnp.ones(())
    merge = jax.jit(ppo.merge)
    for _ in range(488):
        statistics = merge(statistics, jnp.float32(rng.normal(50, 0.5, 2048)))
    count, mean, variance = statistics
    assert count == 488 * 2048 and abs(mean - 50) < 1e-3 and abs(variance**0.5 - 0.5) < 1e-3


def test_rewards_of_zero_are_fine(float64):
    """Before the first reward their deviation is 0: nothing but values is learnt from."""
    state, rollout = make_state(ARGS), make_rollout(ARGS)
    none = (jnp.zeros(()), jnp.zeros(()), jnp.ones(()))
    state = state.replace(statistics=state.statistics | dict(returns=none), returns=jnp.zeros(E))
    rollout = rollout | dict(rewards=jnp.zeros((E, T)))
    state, metrics = ppo.train_step(ARGS, state, rollout)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state, metrics)))
    assert state.statistics["returns"][2] == 0


# --- learning ------------------------------------------------------------------------------------


def test_learn(float64):
    """One epoch of one minibatch: one step of Adam on both losses, whose joint gradient is cut to
    a norm of 0.5."""
    state, rollout = make_state(ARGS), make_rollout(ARGS)
    _, _, batch = expected_preparation(ARGS, state, rollout)
    total = lambda params: (
        expected_policy(params["policy"], ARGS, batch)
        + expected_value(params["value"], ARGS, batch)
    )
    _, grads = gradient(total, state.params)
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    assert norm > 1
    new, metrics = ppo.train_step(ARGS, state, rollout)
    close(metrics["grad_norm"], norm)
    clipped = jax.tree.map(lambda g: 0.5 * g / norm, grads)
    close(new.params, adam(state.params, clipped, ARGS.lr, eps=1e-5), 1e-6)
    close(metrics["explained"], 1 - batch.advantages.var() / batch.returns.var(), 1e-6)
    assert not np.array_equal(new.key, state.key)
    loose = dataclasses.replace(ARGS, max_grad_norm=1e6)
    free, _ = ppo.train_step(loose, state, rollout)
    close(free.params, adam(state.params, grads, ARGS.lr, eps=1e-5), 1e-6)


def test_epochs_and_minibatches(monkeypatch):
    """Every epoch sees each step once, in an order of its own; metrics are means over updates."""
    args = make_args(batch_size=8, epochs=3, rollout_steps=E * T)
    seen = []

    def update(args, state, batch):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), batch.actions[:, 0], ordered=True)
        return state, dict(zero=batch.actions[:, 0].mean())

    monkeypatch.setattr(ppo, "update", update)
    rollout = make_rollout(args)
    numbered = jnp.arange(E * T, dtype=jnp.float32).reshape(E, T, 1) * jnp.ones(2)
    new, metrics = ppo.train_step(args, make_state(args), rollout | dict(actions=numbered))
    jax.effects_barrier()
    assert len(seen) == 9 and all(x.shape == (8,) for x in seen)
    orders = np.array(seen).reshape(3, E * T)
    assert (np.sort(orders, 1) == np.arange(E * T)).all()
    assert len(np.unique(orders, axis=0)) == 3 and not (orders == np.arange(E * T)).all(1).any()
    assert abs(metrics["zero"] - (E * T - 1) / 2) < 1e-5


def test_learning_rate(float64):
    """From lr to 0, linear in the updates that fit into the run: whole rollouts only."""
    args = make_args(total_steps=500, epochs=3, batch_size=8, lr=1e-3, max_grad_norm=1e6)
    count = 20 * 3 * 3
    assert ppo.planned_updates(args) == count
    opt, x = ppo.optimizer(args), jnp.zeros(())
    _, steps = jax.lax.scan(
        lambda s, _: opt.update(jnp.ones(()), s)[::-1], opt.init(x), None, count
    )
    np.testing.assert_allclose(-steps, 1e-3 * (1 - np.arange(count) / count), rtol=1e-4)


def test_update_moves_everything(float64):
    """Also the deviation, which no observation changes."""
    state = make_state(ARGS)
    new, metrics = jax.jit(partial(ppo.update, ARGS))(state, make_batch(ARGS))
    for path, x in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(jnp.subtract, new.params, state.params)
    ):
        assert moves(x), path
    assert {"critic_loss", "policy_loss", "q", "target", "kl", "clipped"} <= metrics.keys()


# --- acting --------------------------------------------------------------------------------------


def test_acting(float64):
    """In training a sample that is not clipped, whose density is the one that learning computes;
    in evaluations the mean, in the box. Observations are normalised and clipped."""
    args = dataclasses.replace(ARGS, normal_clip=1.0)
    state, key = make_state(args), jax.random.PRNGKey(3)
    s = jnp.asarray(np.random.default_rng(0).normal(0, 3, (400, S)))
    _, mean, variance = state.statistics["observations"]
    normal = jnp.clip((s - mean) / jnp.sqrt(variance), -1, 1)
    mu = plain(state.params["policy"]["mean"], normal, activation=relu)
    std = jnp.exp(state.params["policy"]["log_std"])
    explore = ppo.sample_actions(args, state, s, key, "explore")
    close(explore, mu + std * jax.random.normal(key, mu.shape), 1e-7)
    assert np.abs(explore).max() > 1.5 and ppo.MODES == ("mean",)
    close(ppo.sample_actions(args, state, s, key, "mean"), jnp.clip(mu, -1, 1), 1e-7)
    assert np.abs(mu).max() > 1


def test_new_agents():
    """Orthogonal kernels of gain sqrt(2), 0.01 and 1, biases of 0, deviations of 1; the statistics
    let the first observations pass. Sizes by hand."""
    args = make_args(hidden_dims=(16, 12))
    state = jax.jit(partial(ppo.create, args, S))(jax.random.PRNGKey(0))
    assert not np.any(state.params["policy"]["log_std"])
    for tree, gain in ((state.params["policy"]["mean"], 0.01), (state.params["value"], 1)):
        for i, g in enumerate((2**0.5, 2**0.5, gain)):
            layer = tree["params"][f"Dense_{i}"]
            kernel = np.asarray(layer["kernel"])
            small = kernel.T @ kernel if kernel.shape[0] > kernel.shape[1] else kernel @ kernel.T
            np.testing.assert_allclose(small, g**2 * np.eye(len(small)), atol=1e-5 * g)
            assert not np.any(layer["bias"])
    s = jax.random.normal(jax.random.PRNGKey(1), (5, S))
    np.testing.assert_allclose(ppo.normalise(args, state.statistics, s), s, 1e-6)
    assert all(not x.weak_type and x.dtype != jnp.float64 for x in jax.tree.leaves(state))
    layers = lambda *n: sum((a + 1) * b for a, b in zip(n, n[1:]))
    expected = layers(11, 256, 256, 3) + 3 + layers(11, 256, 256, 1)
    assert count_parameters(ppo, 11, 3) == expected


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rollout-steps", "100", "--batch-size", "64"], "must be a multiple of --batch-size"),
        (["--rollout-steps", "128", "--num-envs", "3"], "must be a multiple of --batch-size and"),
        (["--total-steps", "500"], "--total-steps must be at least --rollout-steps"),
        (["--gae-lambda", "1.5"], "--gae-lambda must be at least 0 and at most 1"),
    ],
)
def test_refusals(flags, message):
    with pytest.raises(UserError, match=message):
        parse(ppo.Args, ppo.ENV_DEFAULTS, flags)
