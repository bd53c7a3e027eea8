"""SAC, exactly: sizes, density, every loss and its gradient against the specification (float64),
whole updates with and without steps of the policy, the temperature, and acting.

Shapes as in baselines/sac.py: B batch, S observation, d action.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from baselines import sac
from tests.helpers import online_reference as reference
from tests.helpers.online_reference import S, check_loss, close, count_parameters, gradient, relu

pytestmark = pytest.mark.usefixtures("quick_compile")
make_state = partial(reference.make_state, sac)
values = partial(reference.values, activation=relu)
# No two numbers are alike, so that none can stand in for another.
ARGS = reference.make_args(
    sac, reward_scale=0.7, discount=0.9, target_entropy=-0.4, actor_lr=2e-3, critic_lr=5e-3,
    alpha_lr=3e-2, target_rate=0.2,
)  # fmt: skip
KEY = jax.random.PRNGKey(7)


def make_batch(args=ARGS):
    return reference.make_batch(args)


# --- the formulas again, straight from the specification -----------------------------------------


def gaussian(tree, s):
    """Mean and deviation, whose logarithm is squashed to [-5, 2]."""
    out = reference.plain(tree, s, activation=relu)
    half = out.shape[-1] // 2
    return out[:, :half], jnp.exp(-5 + 7 / 2 * (jnp.tanh(out[:, half:]) + 1))


def draw(tree, s, key):
    """Actions and log-densities: the change of variables by 1 - tanh^2, as it is."""
    mean, std = gaussian(tree, s)
    u = mean + std * jax.random.normal(key, mean.shape)
    normal = -0.5 * ((u - mean) / std) ** 2 - jnp.log(std) - 0.5 * np.log(2 * np.pi)
    return jnp.tanh(u), (normal - jnp.log(1 - jnp.tanh(u) ** 2)).sum(1)


def expected_target(state, batch, key):
    a, log_prob = draw(state.params["policy"], batch.next_observations, key)
    q = values(state.targets["critic"], batch.next_observations, a)
    soft = jnp.minimum(q[0], q[1]) - jnp.exp(state.params["log_alpha"]) * log_prob
    return 0.7 * batch.rewards + 0.9 * batch.masks * soft


def expected_critic(params, state, batch, key):
    y = expected_target(state, batch, key)
    q = values(params, batch.observations, batch.actions)
    return jnp.mean((q[0] - y) ** 2) + jnp.mean((q[1] - y) ** 2)


def expected_policy(params, state, s, key):
    a, log_prob = draw(params, s, key)
    q = values(state.params["critic"], s, a)
    return jnp.mean(jnp.exp(state.params["log_alpha"]) * log_prob - jnp.minimum(q[0], q[1]))


def adam(x, moments, grads, rate, count):
    """Step number `count` of Adam, moments (m, v) included."""
    m, v = moments
    m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
    v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, grads)
    move = lambda m, v: (m / (1 - 0.9**count)) / (jnp.sqrt(v / (1 - 0.999**count)) + 1e-8)
    return jax.tree.map(lambda x, m, v: x - rate * move(m, v), x, m, v), (m, v)


# --- sizes and losses ----------------------------------------------------------------------------


def test_create():
    """Two critics and one policy with two heads, of two layers of 256; alpha is 1 and the averages
    start equal; only the critics have one. All numbers are strong float32 or integers."""
    critic = (14 * 256 + 256) + (256 * 256 + 256) + (256 + 1)
    policy = (11 * 256 + 256) + (256 * 256 + 256) + (256 * 6 + 6)
    assert count_parameters(sac, 11, 3) == 2 * critic + policy + 1 == 210_185
    state = sac.create(ARGS, S, KEY)
    assert state.params["log_alpha"] == 0 and set(state.targets) == {"critic"}
    close(state.targets["critic"], state.params["critic"], 0)
    for x in jax.tree.leaves(state):
        assert not x.weak_type and x.dtype in (jnp.float32, jnp.int32, jnp.uint32)


def test_class_holds_the_values_of_the_comparison():
    args = sac.Args()
    assert (args.target_entropy, args.policy_delay, args.reward_scale) == (-1, 2, 1)
    assert (args.actor_lr, args.critic_lr, args.alpha_lr) == (3e-4, 1e-3, 1e-3)
    assert (args.batch_size, args.target_rate) == (256, 0.005)


def fixed_policy(mean, log_std):
    """A policy of one dimension that does not look at its state."""
    args = dataclasses.replace(ARGS, action_size=1)
    params = jax.tree.map(jnp.zeros_like, make_state(args).params["policy"])
    raw = np.arctanh((log_std + 5) / 3.5 - 1)
    params["params"]["Dense_2"]["bias"] = jnp.array([mean, raw])
    return args, params


def test_density(float64, monkeypatch):
    """S-1: mean 0, deviation 1, u = 0.5 has log-density -0.803710; the density is the normal one
    by the slope of tanh, and integrates to 1 over (-1, 1)."""
    grid = np.append(np.linspace(-7, 7, 50_001), 0.5)[:, None]
    monkeypatch.setattr(jax.random, "normal", lambda *_: jnp.asarray(grid))
    states = np.zeros((len(grid), S))
    for mean, log_std in ((0.0, 0.0), (0.4, -0.3)):
        actions, log_prob = sac.sample(*fixed_policy(mean, log_std), states, KEY)
        u = mean + np.exp(log_std) * grid[:, 0]
        close(actions[:, 0], np.tanh(u))
        density = scipy.stats.norm.pdf(u, mean, np.exp(log_std)) / (1 - np.tanh(u) ** 2)
        np.testing.assert_allclose(np.exp(log_prob), density, 1e-8)
        assert abs(np.trapezoid(np.exp(log_prob[:-1]), actions[:-1, 0]) - 1) < 1e-6
        if mean == 0:
            assert abs(log_prob[-1] - -0.803710) < 1e-6


def test_deviation_stays_in_its_range():
    """exp(-5) to exp(2), for any output of the network."""
    args, params = fixed_policy(0.0, 0.0)
    for raw, log_std in ((-50.0, -5.0), (0.0, -1.5), (50.0, 2.0)):
        params["params"]["Dense_2"]["bias"] = jnp.array([0.0, raw])
        close(sac.policy(args, params, np.zeros((1, S)))[1], [[log_std]], 1e-6)


def test_critic_loss(float64):
    state, batch = make_state(ARGS), make_batch()
    inputs = state.params["critic"], state, batch, KEY
    loss, _ = check_loss(partial(sac.critic_loss, ARGS), expected_critic, *inputs)
    _, metrics = sac.critic_loss(ARGS, *inputs)
    q = values(inputs[0], batch.observations, batch.actions)
    logged = dict(critic_loss=loss, q=q.mean(), target=expected_target(state, batch, KEY).mean())
    close(metrics, logged)


def test_target_by_hand(float64):
    """S-2: y = c r + gamma m (min Q - alpha log pi), with constant values of 2 and 3 and a policy
    of standard normal u: by the number that is logged."""
    args, params = fixed_policy(0.0, 0.0)
    state, batch = make_state(args), make_batch(args)
    constant = jax.tree.map(jnp.zeros_like, state.targets["critic"])
    constant["params"]["VmapMLP_0"]["Dense_2"]["bias"] = jnp.array([[2.0], [3.0]])
    trained = state.params | dict(policy=params, log_alpha=jnp.log(0.5))
    state = state.replace(params=trained, targets=dict(critic=constant))
    u = np.asarray(jax.random.normal(KEY, (args.batch_size, 1)))[:, 0]
    log_prob = scipy.stats.norm.logpdf(u) + 2 * np.log(np.cosh(u))
    y = 0.7 * batch.rewards + 0.9 * batch.masks * (2 - 0.5 * log_prob)
    metrics = sac.critic_loss(args, trained["critic"], state, batch, KEY)[1]
    close(metrics["target"], y.mean())


def test_policy_loss(float64):
    state, s = make_state(ARGS), make_batch().observations
    value, _ = check_loss(
        partial(sac.policy_loss, ARGS), expected_policy, state.params["policy"], state, s, KEY
    )
    _, metrics = sac.policy_loss(ARGS, state.params["policy"], state, s, KEY)
    log_prob = draw(state.params["policy"], s, KEY)[1]
    close(metrics["entropy"], -log_prob.mean() / ARGS.action_size)
    close((metrics["policy_loss"], metrics["alpha"]), (value, jnp.exp(state.params["log_alpha"])))


@pytest.mark.parametrize("entropy", [-0.9, -0.4, 0.1])
def test_temperature(float64, entropy):
    """S-2: L = alpha (H - H*), summed over dimensions: a step raises alpha while H < H*, and lowers
    it while H > H*."""
    log_alpha = jnp.log(0.7)
    value, slope = gradient(partial(sac.alpha_loss, ARGS), log_alpha, None, entropy)
    close((value, slope), (0.7 * 2 * (entropy + 0.4),) * 2)
    assert np.sign(slope) == np.sign(round(entropy + 0.4, 6))


def test_saturated_actions():
    """u = 20 and -20 give finite losses and gradients in float32."""
    args = dataclasses.replace(ARGS, action_size=1)
    state, s = jax.tree.map(jnp.float32, make_state(args).replace(key=KEY)), jnp.zeros((6, S))
    for mean in (-20.0, 20.0):
        params = jax.tree.map(jnp.float32, fixed_policy(mean, 0.0)[1])
        for x in jax.tree.leaves(gradient(partial(sac.policy_loss, args), params, state, s, KEY)):
            assert np.isfinite(x).all()


# --- update and acting ---------------------------------------------------------------------------

update = jax.jit(sac.update, static_argnums=0)


def expected_update(state, batch, steps):
    """The critics, `steps` times policy and alpha, then the average."""
    _, next_key, now_key = jax.random.split(state.key, 3)
    _, grads = gradient(expected_critic, state.params["critic"], state, batch, next_key)
    critic = reference.adam(state.params["critic"], grads, 5e-3)
    params, losses = state.params | dict(critic=critic), []
    zero = lambda name: (jax.tree.map(jnp.zeros_like, params[name]),) * 2
    policy_moments, alpha_moments = zero("policy"), zero("log_alpha")
    for i in range(steps):
        now = state.replace(params=params)
        key = jax.random.fold_in(now_key, i)
        log_prob = draw(params["policy"], batch.observations, key)[1]
        loss, grads = gradient(expected_policy, params["policy"], now, batch.observations, key)
        policy, policy_moments = adam(params["policy"], policy_moments, grads, 2e-3, i + 1)
        slope = -jnp.exp(params["log_alpha"]) * (log_prob.mean() - 0.4 * 2)
        alpha, alpha_moments = adam(params["log_alpha"], alpha_moments, slope, 3e-2, i + 1)
        params, losses = params | dict(policy=policy, log_alpha=alpha), [*losses, loss]
    return params, reference.polyak(state.targets["critic"], critic, 0.2), losses


@pytest.mark.parametrize("step, steps", [(0, 0), (1, 2), (2, 0), (3, 2)])
def test_update(float64, step, steps):
    """Every second update makes two steps of policy and of alpha with the critics' new values; the
    critics' average moves at every one, towards the new critics. Either critic and either average
    is the lower one somewhere in the batch."""
    args = dataclasses.replace(ARGS, batch_size=10)
    state, batch = make_state(args).replace(step=jnp.int32(step)), make_batch(args)
    new, metrics = update(args, state, batch)
    params, average, losses = expected_update(state, batch, steps)
    close(new.params, params, 1e-6)  # Adam's rates are float32
    close(new.targets, dict(critic=average), 1e-6)
    assert new.step == step + 1 and not np.array_equal(new.key, state.key)
    close(metrics["policy_loss"], sum(losses), 1e-6)
    if not steps:
        close((new.params["policy"], new.opt_state["policy"]),
              (state.params["policy"], state.opt_state["policy"]), 0)  # fmt: skip


def test_means_of_metrics(float64):
    """A constant among the policy's metrics has the same mean over updates: alpha, at rate 0."""
    args = dataclasses.replace(ARGS, alpha_lr=0.0, policy_delay=3)
    state, total = make_state(args), 0.0
    for _ in range(6):
        state, metrics = update(args, state, make_batch())
        total += metrics["alpha"]
    close(total / 6, jnp.exp(state.params["log_alpha"]))


def test_acting(float64):
    """In training a sample, in evaluations tanh of the mean, without noise; no other network
    matters."""
    args = dataclasses.replace(ARGS, batch_size=200)
    state, s = make_state(args), make_batch(args).observations
    act = jax.jit(partial(sac.sample_actions, args), static_argnames="mode")
    mean, std = gaussian(state.params["policy"], s)
    noise = jax.random.normal(KEY, mean.shape)
    close(act(state, s, KEY, mode="explore"), jnp.tanh(mean + std * noise))
    assert sac.MODES == ("greedy",)
    close(act(state, s, KEY, mode="greedy"), jnp.tanh(mean))
    double = partial(jax.tree.map, lambda x: 2 * x)
    other = state.replace(
        params=double(state.params) | dict(policy=state.params["policy"]),
        targets=double(state.targets),
    )
    for mode in ("explore", "greedy"):
        close(act(other, s, KEY, mode=mode), act(state, s, KEY, mode=mode), 0)
