"""FLAME, exactly (float64): losses, gradients and updates against the specification, the numbers of
catalogue entry L-1, what is delayed and by how much, and a bandit whose answer is known.

Shapes as in baselines/flame.py: B batch, d action, N candidates, K proposals, n jumps.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from baselines import flame
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
    make_batch,
    moves,
    plain,
    polyak,
    values,
)

timed = partial(online_reference.timed, factor=1 / 4)  # 16 sinusoids / sqrt(16)
pytestmark = pytest.mark.usefixtures("quick_compile")
make_args = partial(online_reference.make_args, flame)
make_state = partial(online_reference.make_state, flame)
ARGS = make_args(
    num_proposals=5, entropy_steps=3, noise_scale=0.3, alpha_init=0.6, policy_delay=2,
    q_gradient=0.0,
)  # fmt: skip
M, SIGMA = 0.3, 0.4  # of the Gaussian data whose average velocity is known


# --- the formulas again, straight from the specification -----------------------------------------


def expected_candidates(args, tree, s, key, count):
    noise = jax.random.normal(key, (count, len(s), args.action_size))
    a = noise - timed(tree, s, noise, 0.0, 1.0)
    return jnp.minimum(jnp.maximum(a, -1), 1)


def expected_choice(args, state, tree, s, key, count, deviation):
    """One state after the other."""
    keys = jax.random.split(key)
    actions = expected_candidates(args, tree, s, keys[0], count)
    q = values(state.params["critic"], s, actions)
    q = jnp.minimum(q[0], q[1])
    best = jnp.stack([actions[jnp.argmax(q[:, b]), b] for b in range(len(s))])
    return jnp.clip(best + deviation * jax.random.normal(keys[1], best.shape), -1, 1)


def expected_entropy(args, tree, s, key):
    n, d = args.entropy_steps, args.action_size
    keys = jax.random.split(key, n + 1)
    x, result = jax.random.normal(keys[0], (len(s), d)), d / 2 * np.log(2 * np.pi * np.e)
    for i in range(n):
        t, r = 1 - i / n, 1 - (i + 1) / n
        probe = jnp.where(jax.random.rademacher(keys[i + 1], x.shape) > 0, 1.0, -1.0)
        one = lambda s, x: timed(tree, s, x, r, t)
        jacobian = jax.vmap(jax.jacfwd(one, argnums=1))(s, x)
        trace = jnp.einsum("bi,bij,bj->b", probe, jacobian, probe)
        result -= jnp.clip(trace, -args.trace_clip * d, args.trace_clip * d) / n
        x = x - one(s, x) / n
    return result


def expected_target(args, state, batch, actions, entropies):
    q = values(state.targets["critic"], batch.next_observations, actions)
    value = jnp.minimum(q[0], q[1]) + jnp.exp(state.log_alpha) * entropies
    return args.reward_scale * batch.rewards + args.discount * batch.masks * value


def expected_critic(params, args, state, batch, *after):
    y = expected_target(args, state, batch, *after)
    found = values(params, batch.observations, batch.actions)
    return sum(((member - y) ** 2).mean() for member in found)


def expected_velocity(args, critics, log_alpha, s, x, t, key):
    """Velocity and effective number, one row after the other."""
    speeds, sizes, K = [], [], args.num_proposals
    low = (x - (1 - t[:, None])) / t[:, None]
    high = (x + (1 - t[:, None])) / t[:, None]
    noise = jax.random.truncated_normal(key, low, high, (K, *x.shape))
    for b in range(len(x)):
        actions = (x[b] - t[b] * noise[:, b]) / (1 - t[b])
        q = values(critics, s[b], actions)
        w = jnp.exp(jnp.minimum(q[0], q[1]) / jnp.exp(log_alpha))
        w = w / w.sum()
        speeds.append(sum(w[k] * (noise[k, b] - actions[k]) for k in range(K)))
        sizes.append(1 / (w**2).sum())
    return jnp.stack(speeds), jnp.mean(jnp.stack(sizes))


def expected_goal(tree, s, x, r, t, v):
    """v - (t - r) du/dt along (v, 0, 1), by full Jacobians, one row after the other."""
    result = []
    for b in range(len(x)):
        u = lambda x, t: timed(tree, s[b], x, r[b], t)
        by_x, by_t = jax.jacfwd(u, (0, 1))(x[b], t[b])
        result.append(v[b] - (t[b] - r[b]) * (by_x @ v[b] + by_t))
    return jnp.stack(result)


def expected_policy(params, args, state, s, x, r, t, goal, key):
    loss = ((timed(params, s, x, r, t) - goal) ** 2).sum() / len(s)
    q = values(state.targets["critic"], s, expected_candidates(args, params, s, key, 1)[0])
    return loss - args.q_gradient * jnp.minimum(q[0], q[1]).mean()


def expected_improvement(args, state, critics, batch, key):
    """Loss and gradient of the policy in an update, whose critics have moved already."""
    keys, B, s = jax.random.split(key, 4), args.batch_size, batch.observations
    limits = dict(minval=args.time_min, maxval=args.time_max)
    times = jax.random.uniform(keys[0], (2, B), **limits)
    r, t = jnp.minimum(*times), jnp.maximum(*times)
    noise = jax.random.normal(keys[1], batch.actions.shape)
    x = (1 - t)[:, None] * batch.actions + t[:, None] * noise
    v, ess = expected_velocity(args, critics, state.log_alpha, s, x, t, keys[2])
    tree = state.params["policy"]
    inputs = s, x, r, t, expected_goal(tree, s, x, r, t, v), keys[3]
    return gradient(lambda params: expected_policy(params, args, state, *inputs), tree), ess


# --- losses --------------------------------------------------------------------------------------


def make_points(args, seed=1):
    """Points x, times r <= t and goals for the batch's observations."""
    rng, B, d = np.random.default_rng(seed), args.batch_size, args.action_size
    r, t = np.sort(rng.uniform(0.1, 0.9, (2, B)), 0)
    arrays = rng.normal(size=(B, d)), r, t, rng.normal(size=(B, d))
    return tuple(map(jnp.asarray, arrays))


def test_how_the_times_enter(float64):
    """In NumPy: 16 sinusoids of r and of t themselves, divided by 4, each through layers of its own
    (32 with Mish, 16)."""
    tree, batch = make_state(ARGS).params["policy"], make_batch(ARGS)
    s, x = np.asarray(batch.observations), np.asarray(batch.actions)
    inputs = [s, x]
    for k, t in enumerate((0.2, 0.7)):
        angles = t * 10_000.0 ** (-np.arange(8) / 8)
        encoded = np.r_[np.sin(angles), np.cos(angles)] / 4
        inputs.append(plain(tree["params"][f"MLP_{k}"], encoded))
    expected = plain(tree["params"]["MLP_2"], *inputs)
    close(flame.average_velocity(ARGS, tree, s, x, 0.2, 0.7), expected, 1e-7)


def test_critic_loss(float64):
    state, batch = make_state(ARGS), make_batch(ARGS)
    rng = np.random.default_rng(3)
    after = map(jnp.asarray, (rng.uniform(-1, 1, (6, 2)), rng.normal(size=6)))
    inputs = state, batch, *after
    loss = lambda params, *x: flame.critic_loss(ARGS, params, *x)
    expected = lambda params, *x: expected_critic(params, ARGS, *x)
    value, _ = check_loss(loss, expected, state.params["critic"], *inputs)
    _, metrics = loss(state.params["critic"], *inputs)
    q = values(state.params["critic"], batch.observations, batch.actions)
    target = expected_target(ARGS, *inputs).mean()
    close(metrics, dict(critic_loss=value, q=q.mean(), target=target))


def test_entropy_is_added_where_the_episode_goes_on(float64):
    """One unit of entropy more raises the target by gamma alpha, and by nothing after an end."""
    state, batch = make_state(ARGS), make_batch(ARGS)
    last = lambda h, masks: flame.critic_loss(
        ARGS, state.params["critic"], state, batch.replace(masks=masks), batch.actions, h
    )[1]["target"]
    zero, one = jnp.zeros(6), jnp.ones(6)
    alpha = np.exp(state.log_alpha)
    close(last(one, one) - last(zero, one), ARGS.discount * alpha)
    assert last(one, zero) == last(zero, zero)


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_policy_loss(float64, weight):
    """Without --q-gradient no critic is asked; with it, the gradient goes through the jump."""
    args = dataclasses.replace(ARGS, q_gradient=weight)
    state, s, key = make_state(args), make_batch(args).observations, jax.random.PRNGKey(5)
    loss = lambda params, *x: flame.policy_loss(args, params, *x)
    expected = lambda params, *x: expected_policy(params, args, *x)
    found = check_loss(loss, expected, state.params["policy"], state, s, *make_points(args), key)
    broken = jax.tree.map(lambda x: x * jnp.nan, state.targets["critic"])
    other = state.replace(targets=state.targets | dict(critic=broken))
    again = gradient(loss, state.params["policy"], other, s, *make_points(args), key)
    assert np.isfinite(again[0]) == (weight == 0)
    if not weight:
        close(again, found, 0)


def test_reweighted_velocity(float64):
    state, s = make_state(ARGS), make_batch(ARGS).observations
    x, _, t, _ = make_points(ARGS)
    inputs = state.params["critic"], jnp.log(0.4), s, x, t, jax.random.PRNGKey(2)
    found = jax.jit(partial(flame.reweighted_velocity, ARGS))(*inputs)
    close(found, jax.jit(partial(expected_velocity, ARGS))(*inputs))
    assert 1.01 < found[1] < 4.99


def test_meanflow_target(float64):
    state, s = make_state(ARGS), make_batch(ARGS).observations
    inputs = state.params["policy"], s, *make_points(ARGS)
    found = jax.jit(partial(flame.meanflow_target, ARGS))(*inputs)
    close(found, jax.jit(expected_goal)(*inputs))
    assert not np.allclose(found, inputs[-1], atol=0.01)


def test_entropy(float64):
    """The trace by the Jacobian; where it is clipped, the limit is per action dimension."""
    for limit in (10.0, 0.05):
        args = dataclasses.replace(ARGS, trace_clip=limit)
        state, s, key = make_state(args), make_batch(args).observations, jax.random.PRNGKey(4)
        inputs = state.params["policy"], s, key
        found = jax.jit(partial(flame.entropy, args))(*inputs)
        close(found, jax.jit(partial(expected_entropy, args))(*inputs))
    start = np.log(2 * np.pi * np.e)
    change = np.abs(found - start)
    assert (change <= 0.1 + 1e-12).all() and np.isclose(change, 0.1).any()


# --- numbers of the specification (L-1) ----------------------------------------------------------


def spread(t):
    """S_t: deviation of the marginal at t."""
    return jnp.sqrt((1 - t) ** 2 * SIGMA**2 + t**2)


def exact(args, params, observations, x, r, t):
    """The average velocity of Gaussian data."""
    r, t = (jnp.asarray(y)[..., None] for y in (r, t))
    after = (1 - r) * M + spread(r) / spread(t) * (x - (1 - t) * M)
    return (x - after) / (t - r)


def test_meanflow_identity(float64, monkeypatch):
    """The exact average velocity is its own target, given the exact velocity: 0.266018 at 0.7."""
    monkeypatch.setattr(flame, "average_velocity", exact)
    x, r, t = jnp.array([[0.7], [-0.4]]), jnp.array([0.2, 0.1]), jnp.array([0.8, 0.9])
    slope = (t - (1 - t) * SIGMA**2) / spread(t) ** 2
    v = -M + slope[:, None] * (x - (1 - t[:, None]) * M)
    found = flame.meanflow_target(ARGS, None, None, x, r, t, v)
    close(found, exact(ARGS, None, None, x, r, t))
    assert abs(found[0, 0] - 0.266018) < 1e-6


def test_one_step(float64, monkeypatch):
    """One jump makes m + sigma e of the noise e: 0.82 of 1.3; beyond the box it is clipped."""
    monkeypatch.setattr(flame, "average_velocity", exact)
    args = dataclasses.replace(ARGS, action_size=1)
    for noise, expected in ((1.3, 0.82), (2.0, 1.0), (-4.0, -1.0)):
        monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.full(shape, noise))
        found = flame.candidates(args, None, jnp.zeros((2, S)), jax.random.PRNGKey(0), 3)
        close(found, jnp.full((3, 2, 1), expected))


@pytest.mark.parametrize("n, total", [(1, -0.600), (2, -0.719), (3, -0.755), (10, -0.856)])
def test_entropy_sums(float64, monkeypatch, n, total):
    """First order in every jump: above the true log 0.4 = -0.916, which it goes to."""
    monkeypatch.setattr(flame, "average_velocity", exact)
    args = dataclasses.replace(ARGS, action_size=1, entropy_steps=n)
    found = flame.entropy(args, None, jnp.zeros((3, S)), jax.random.PRNGKey(0))
    assert np.abs(found - 0.5 * np.log(2 * np.pi * np.e) - total).max() < 6e-4


def quadratic(args, params, observations, actions):
    """Both critics are -(a - 0.2)^2 / (2 / 16), for any number of dimensions."""
    q = -((actions - 0.2) ** 2).sum(-1) / (2 * 0.0625)
    return jnp.stack([q, q + 1])


@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_reweighted_velocity_is_the_posterior_mean(float64, monkeypatch, alpha):
    """E[e - a | x_t] under exp(Q / alpha) on the box, by quadrature: 0.06518 where alpha = 1."""
    monkeypatch.setattr(flame, "critic", quadratic)
    t, x = 0.6, 0.25
    density = lambda a: (
        np.exp(-((a - 0.2) ** 2) / 0.125 / alpha) * scipy.stats.norm.pdf(x, (1 - t) * a, t)
    )
    mean = lambda f: scipy.integrate.quad(lambda a: f(a) * density(a), -1, 1)[0]
    expected = mean(lambda a: (x - (1 - t) * a) / t - a) / mean(lambda a: 1)
    assert alpha != 1 or abs(expected - 0.06518) < 1e-5
    args, B = dataclasses.replace(ARGS, num_proposals=4000, action_size=1), 50
    points = jnp.zeros((B, S)), jnp.full((B, 1), x), jnp.full(B, t), jax.random.PRNGKey(0)
    found, _ = flame.reweighted_velocity(args, None, jnp.log(alpha), *points)
    assert abs(found.mean() - expected) < 5 * found.std() / B**0.5 < 0.02


def test_proposals_stay_in_the_box(float64, monkeypatch):
    """By the bounds of the noise, not by clipping: x_k = x_t - t v exactly where K = 1. They are
    spread over the whole box where t is small."""
    seen = []

    def spy(args, params, observations, actions):
        seen.append(np.asarray(actions))
        return jnp.zeros((2, *actions.shape[:-1]))

    monkeypatch.setattr(flame, "critic", spy)
    args, rng, B = dataclasses.replace(ARGS, num_proposals=1), np.random.default_rng(0), 3000
    t = np.repeat([0.0054, 0.3, 0.9, 0.999], B // 4)
    a, noise = rng.choice([-1, -0.5, 1], (B, 2)), rng.normal(size=(B, 2))
    x = (1 - t[:, None]) * a + t[:, None] * noise
    inputs = jnp.zeros((B, S)), jnp.asarray(x), jnp.asarray(t), jax.random.PRNGKey(1)
    v, ess = flame.reweighted_velocity(args, None, jnp.zeros(()), *inputs)
    actions = seen[0][0]
    assert np.abs(actions).max() <= 1 and ess == 1
    np.testing.assert_allclose(x - t[:, None] * v, actions, atol=1e-9)
    late = actions[t == 0.999]
    assert abs(late.mean()) < 0.1 and abs(late.std() - 3**-0.5) < 0.03  # uniform, whatever a was
    assert np.abs(actions - a)[t == 0.0054].max() < 0.05


def test_proposals_in_float32(monkeypatch):
    """Finite and in the box at both ends of time, also from far in the tail of the noise."""
    monkeypatch.setattr(flame, "critic", quadratic)
    t = jnp.repeat(jnp.array([ARGS.time_min, 0.5, ARGS.time_max]), 3)
    noise = jnp.tile(jnp.array([-5.5, 0.0, 5.5]), 3)[:, None]
    for a in (-1.0, 1.0):
        x = (1 - t[:, None]) * a + t[:, None] * noise
        found, ess = flame.reweighted_velocity(
            dataclasses.replace(ARGS, num_proposals=100), None, jnp.zeros(()), jnp.zeros((9, S)),
            x, t, jax.random.PRNGKey(1),
        )  # fmt: skip
        back = x - t[:, None] * found  # the weighted mean of the proposals
        assert np.isfinite(found).all() and 1 <= ess <= 100 and np.abs(back).max() < 1 + 1e-5


def test_one_pass_does_what_many_do(float64):
    """The gradient with the target of the mean velocity is that of K targets, weighted."""
    state, s = make_state(ARGS), make_batch(ARGS).observations
    x, r, t, _ = make_points(ARGS)
    rng, K = np.random.default_rng(8), 4
    speeds, w = jnp.asarray(rng.normal(size=(K, *x.shape))), rng.dirichlet(np.ones(K), len(s)).T
    tree, key = state.params["policy"], jax.random.PRNGKey(0)
    goal = jax.jit(partial(flame.meanflow_target, ARGS))
    one = goal(tree, s, x, r, t, jnp.einsum("kb,kbd->bd", w, speeds))
    many = [goal(tree, s, x, r, t, v) for v in speeds]
    loss = lambda params: flame.policy_loss(ARGS, params, state, s, x, r, t, one, key)

    def weighted(params):
        u = timed(params, s, x, r, t)
        return sum((w[k] * ((u - many[k]) ** 2).sum(-1)).mean() for k in range(K))

    (low, found), (high, expected) = gradient(loss, tree), gradient(weighted, tree)
    close(found, expected)
    assert low < high - 0.1  # by the variance of the targets


def test_bandit(optimised, monkeypatch):
    """From uniform data the policy comes to be exp(Q / alpha): N(0.2, 0.25^2) for alpha = 1. Its
    entropy, first order in five jumps, errs upwards."""
    monkeypatch.setattr(flame, "critic", quadratic)
    B, rounds = 256, 1500
    args = make_args(
        action_size=1, hidden_dims=(32, 32), batch_size=B, num_proposals=16, policy_delay=1,
        actor_lr=5e-3, actor_lr_end=5e-4, total_steps=rounds, warmup_steps=0, target_rate=0.01,
        q_gradient=0.0,
    )  # fmt: skip
    state = flame.create(args, 1, jax.random.PRNGKey(0))
    blank = online_reference.make_batch(args, observation_size=1)
    blank = jax.tree.map(jnp.float32, blank.replace(observations=jnp.zeros((B, 1))))

    def step(state, key):
        keys = jax.random.split(key)
        batch = blank.replace(actions=jax.random.uniform(keys[0], (B, 1), minval=-1))
        return flame.improve(args, state, batch, keys[1])

    keys = jax.random.split(jax.random.PRNGKey(1), rounds)
    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, keys))(state)
    policy, s = state.targets["policy"], jnp.zeros((4000, 1))
    actions = flame.candidates(args, policy, s, jax.random.PRNGKey(2), 1)
    assert abs(actions.mean() - 0.2) < 0.03 and abs(actions.std() - 0.25) < 0.04
    entropy = flame.entropy(args, policy, s, jax.random.PRNGKey(3)).mean()
    truth = 0.5 * np.log(2 * np.pi * np.e) + np.log(0.25)
    assert truth < entropy < truth + 0.4


# --- updates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", (0.0, 0.7))
def test_updates(float64, weight):
    """The first moves the critics alone; the second also the policy, given the new critics, and
    then both averages. The logged numbers are means over both."""
    args = dataclasses.replace(ARGS, q_gradient=weight)
    state, batch, close_ = make_state(args), make_batch(args), partial(close, tolerance=1e-6)
    update, alpha = jax.jit(partial(flame.update, args)), np.exp(state.log_alpha)
    seen = []
    for number in (1, 2):
        key, *keys = jax.random.split(state.key, 4)
        s, tree = batch.next_observations, state.params["policy"]
        actions = expected_choice(args, state, tree, s, keys[0], 3, args.noise_scale * alpha)
        h = expected_entropy(args, tree, s, keys[1])
        expected = lambda params, *inputs: expected_critic(params, args, *inputs)
        loss, grads = gradient(expected, state.params["critic"], state, batch, actions, h)
        new, metrics = update(state, batch)
        seen.append(metrics)
        close(metrics["critic_loss"], loss)
        close(metrics["entropy"], h.mean() / 2)
        close((metrics["alpha"], new.log_alpha), (alpha, state.log_alpha))
        assert new.step == number
        np.testing.assert_array_equal(new.key, key)
        if number == 1:
            critics = adam(state.params["critic"], grads, args.critic_lr)
            close_(new.params["critic"], critics)
            close(new.params["policy"], tree, 0)
            close(new.targets, state.targets, 0)
        else:
            critics, turn = new.params["critic"], jax.random.fold_in(keys[2], 0)
            assert moves(jax.tree.map(jnp.subtract, critics, state.params["critic"]))
            (loss, grads), ess = expected_improvement(args, state, critics, batch, turn)
            close_(new.params["policy"], adam(tree, grads, args.actor_lr))
            close_(new.targets, polyak(state.targets, new.params, args.target_rate))
            mean = lambda name: (seen[0][name] + seen[1][name]) / 2
            norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
            close((mean("ess"), mean("policy_grad_norm")), (ess, norm), 1e-8)
            if not weight:  # then it is the whole loss
                close(mean("meanflow_loss"), loss, 1e-8)
        state = new


@pytest.fixture
def cheap(monkeypatch):
    """Updates with a given entropy for all states, in which the policy and its averages count."""

    def improve(args, state, batch, key):
        params = state.params | dict(policy=state.params["policy"] + 1)
        targets = jax.tree.map(lambda x: x + 1, state.targets)
        metrics = dict(meanflow_loss=5.0 + 0 * state.log_alpha)
        return state.replace(params=params, targets=targets), metrics

    def prepare(args, entropy, **changes):
        state = make_state(args)
        params = dict(critic=state.params["critic"], policy=jnp.zeros(()))
        state = state.replace(params=params, **changes)
        monkeypatch.setattr(flame, "choose", lambda args, state, flow, s, *_: jnp.zeros((6, 2)))
        monkeypatch.setattr(flame, "entropy", lambda *_: jnp.full(6, float(entropy)))
        monkeypatch.setattr(flame, "improve", improve)
        return state, jax.jit(partial(flame.update, args)), make_batch(args)

    return prepare


def test_delays(float64, cheap):
    """Policy and averages move at every third update here, alpha at every fourth, critics always;
    a number of the policy's is logged so that its mean is right."""
    args = dataclasses.replace(ARGS, policy_delay=3, alpha_steps=3_500)  # of 14,000 updates
    state, update, batch = cheap(args, 0.0, log_alpha=jnp.log(0.6))
    first, logged, alphas = state, [], []
    for number in range(1, 9):
        new, metrics = update(state, batch)
        assert moves(jax.tree.map(jnp.subtract, new.params["critic"], state.params["critic"]))
        assert new.params["policy"] == number // 3 and new.step == number
        close(new.targets, jax.tree.map(lambda x: x + number // 3, first.targets))
        logged.append(metrics["meanflow_loss"])
        alphas.append(new.log_alpha)
        state = new
    assert logged == [0, 0, 15, 0, 0, 15, 0, 0]
    expected = np.log(0.6) - 0.005 * np.array([0, 0, 0, 1, 1, 1, 1, 2])  # Adam, the same sign
    np.testing.assert_allclose(alphas, expected, atol=1e-5)


@pytest.mark.parametrize("entropy, sign", [(-1.39, -1), (-1.41, 1)])
def test_alpha_goes_where_the_entropy_is_missing(float64, cheap, entropy, sign):
    """Down while the entropy is above its target, here of -0.7 for each of two dimensions, by the
    logarithm's Adam, and not below 0.001."""
    args = dataclasses.replace(ARGS, target_entropy=-0.7, alpha_steps=14_000, alpha_lr=0.01)
    state, update, batch = cheap(args, entropy)
    new, metrics = update(state, batch)
    close(new.log_alpha - state.log_alpha, sign * 0.01, 1e-5)
    close(metrics["entropy"], entropy / 2)
    new, _ = update(state.replace(log_alpha=jnp.log(0.001)), batch)
    close(new.log_alpha, np.log(0.001) + max(sign, 0) * 0.01, 1e-6)


def test_policy_rate(float64):
    """Constant until 25 % of the policy's own steps, linear until 75 %, then constant."""
    args = make_args(
        total_steps=1700, warmup_steps=100, env_steps_per_update=2, policy_delay=2, actor_lr=1e-3,
        actor_lr_end=1e-4,
    )  # fmt: skip
    opt = flame.optimizers(args)["policy"]  # 800 updates, 400 of the policy
    x = jnp.zeros(())
    _, steps = jax.lax.scan(lambda s, _: opt.update(jnp.ones(()), s)[::-1], opt.init(x), None, 400)
    at = [0, 100, 200, 300, 399]  # a constant gradient: Adam's step is the rate
    np.testing.assert_allclose(-steps[np.array(at)], [1e-3, 1e-3, 5.5e-4, 1e-4, 1e-4], rtol=1e-4)


# --- acting --------------------------------------------------------------------------------------


def test_acting(float64):
    """Best of N by the online critics, of the averaged policy; noise in training only."""
    args = dataclasses.replace(ARGS, batch_size=300, num_candidates=4)
    state, s, key = make_state(args), make_batch(args).observations, jax.random.PRNGKey(5)
    act = jax.jit(partial(flame.sample_actions, args), static_argnames="mode")
    tree, deviation = state.targets["policy"], args.noise_scale * np.exp(state.log_alpha)
    for mode, count, noise in (("explore", 4, deviation), ("best", 4, 0), ("single", 1, 0)):
        found = act(state, s, key, mode=mode)
        close(found, expected_choice(args, state, tree, s, key, count, noise))
        assert (np.abs(found) <= 1).all()
    best, single = (act(state, s, key, mode=mode) for mode in ("best", "single"))
    q = [jnp.minimum(*values(state.params["critic"], s, a)).mean() for a in (best, single)]
    assert q[0] > q[1] + 0.05
    other = state.replace(
        params=state.params | dict(policy=jax.tree.map(lambda x: 0 * x, state.params["policy"])),
        targets=state.targets | dict(critic=state.params["critic"]),
    )
    close(act(other, s, key, mode="explore"), act(state, s, key, mode="explore"), 0)
    assert flame.MODES == ("best", "single")


def test_class_holds_the_values_of_the_specification():
    args = flame.Args()
    assert (args.num_candidates, args.num_proposals, args.entropy_steps) == (32, 100, 2)
    assert (args.time_min, args.time_max, args.trace_clip) == (0.0054, 0.999, 10)
    assert (args.alpha_init, args.alpha_lr, args.alpha_steps) == (1, 5e-3, 2_000)
    assert (args.target_entropy, args.noise_scale, args.q_gradient) == (-3, 1, 1)
    plane = flame.ENV_DEFAULTS["multigoal"]
    assert (plane["target_entropy"], plane["noise_scale"], plane["entropy_steps"]) == (-1, 0.01, 5)
    assert (args.policy_delay, args.target_rate, args.reward_scale) == (2, 0.005, 0.2)
    assert (args.actor_lr, args.actor_lr_end, args.critic_lr) == (3e-4, 3e-5, 3e-4)
    assert (args.batch_size, args.discount) == (256, 0.99)


def test_new_agents():
    """Actions are almost the clipped noise, the averages are copies, the temperature is alpha_init;
    sizes of networks by hand."""
    args = make_args(alpha_init=0.7)
    state = jax.jit(partial(flame.create, args, S))(jax.random.PRNGKey(0))
    s, key = jnp.ones((500, S)), jax.random.PRNGKey(1)
    found = flame.candidates(args, state.params["policy"], s, key, 1)
    noise = jax.random.normal(key, (1, 500, 2))
    assert 0 < np.abs(found - np.clip(noise, -1, 1)).max() < 0.1
    close(state.targets, state.params, 0)
    assert abs(state.log_alpha - np.log(0.7)) < 1e-6
    assert all(not x.weak_type for x in jax.tree.leaves(state))
    layers = lambda *n: sum((a + 1) * b for a, b in zip(n, n[1:]))
    embeddings = 2 * layers(16, 32, 16)
    policy = layers(11 + 3 + 2 * 16, 256, 256, 256, 3) + embeddings
    assert count_parameters(flame, 11, 3) == policy + 2 * layers(14, 256, 256, 256, 1)


@pytest.mark.parametrize("flags", [["--time-min", "0.9", "--time-max", "0.8"], ["--time-max", "1"]])
def test_refusals(flags):
    """At t = 1 a point says nothing of the action: 1 / (1 - t)."""
    with pytest.raises(UserError, match="--time-min and --time-max must be in order"):
        parse(flame.Args, flame.ENV_DEFAULTS, flags)
