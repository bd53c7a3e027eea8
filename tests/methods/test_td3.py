"""TD3, exactly: sizes, both losses and their gradients against the specification (float64), the
smoothed actions, whole updates with and without the delayed half, and acting.

Shapes as in baselines/td3.py: B batch, S observation, d action.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baselines import td3
from tests.helpers import online_reference as reference
from tests.helpers.online_reference import S, check_loss, close, count_parameters, gradient, relu

pytestmark = pytest.mark.usefixtures("quick_compile")
make_state = partial(reference.make_state, td3)
values = partial(reference.values, activation=relu)
# No two numbers are alike, and the noise is large enough for both clips to matter.
ARGS = reference.make_args(
    td3, reward_scale=0.7, discount=0.9, actor_lr=2e-3, critic_lr=5e-3, target_rate=0.2,
    target_noise=0.6, target_noise_clip=0.55, explore_noise=0.8,
)  # fmt: skip
KEY = jax.random.PRNGKey(7)


def make_batch(args=ARGS):
    return reference.make_batch(args)


# --- the formulas again, straight from the specification -----------------------------------------


def mu(tree, s):
    return jnp.tanh(reference.plain(tree, s, activation=relu))


def box(x, limit):
    return jnp.where(x > limit, limit, jnp.where(x < -limit, -limit, x))


def expected_target(state, batch, key):
    mean = mu(state.targets["policy"], batch.next_observations)
    a = box(mean + box(0.6 * jax.random.normal(key, mean.shape), 0.55), 1.0)
    q = values(state.targets["critic"], batch.next_observations, a)
    return 0.7 * batch.rewards + 0.9 * batch.masks * jnp.minimum(q[0], q[1])


def expected_critic(params, state, batch, key):
    y = expected_target(state, batch, key)
    q = values(params, batch.observations, batch.actions)
    return jnp.mean((q[0] - y) ** 2) + jnp.mean((q[1] - y) ** 2)


def expected_policy(params, state, s):
    return -jnp.mean(values(state.params["critic"], s, mu(params, s))[0])


# --- sizes and losses ----------------------------------------------------------------------------


def test_create():
    """Two critics and one policy of two layers of 256; the averages of both start equal. All
    numbers are strong float32 or integers."""
    critic = (14 * 256 + 256) + (256 * 256 + 256) + (256 + 1)
    policy = (11 * 256 + 256) + (256 * 256 + 256) + (256 * 3 + 3)
    assert count_parameters(td3, 11, 3) == 2 * critic + policy == 209_413
    state = td3.create(ARGS, S, KEY)
    assert set(state.params) == {"critic", "policy"}
    close(state.targets, state.params, 0)
    for x in jax.tree.leaves(state):
        assert not x.weak_type and x.dtype in (jnp.float32, jnp.int32, jnp.uint32)


def test_class_holds_the_values_of_the_comparison():
    args = td3.Args()
    assert (args.explore_noise, args.target_noise, args.target_noise_clip) == (0.1, 0.2, 0.5)
    assert args.actor_lr == args.critic_lr == 3e-4
    assert (args.policy_delay, args.reward_scale) == (2, 1)
    assert (args.batch_size, args.target_rate) == (256, 0.005)


def test_critic_loss(float64):
    """In a batch so large that either average is the lower one somewhere."""
    args = dataclasses.replace(ARGS, batch_size=40)
    state, batch = make_state(args), make_batch(args)
    inputs = state.params["critic"], state, batch, KEY
    loss, _ = check_loss(partial(td3.critic_loss, args), expected_critic, *inputs)
    _, metrics = td3.critic_loss(args, *inputs)
    q = values(inputs[0], batch.observations, batch.actions)
    logged = dict(critic_loss=loss, q=q.mean(), target=expected_target(state, batch, KEY).mean())
    close(metrics, logged)


def test_smoothing(float64, monkeypatch):
    """T-1: noise within its clip, actions within [-1, 1]; both limits are reached, and the noise
    below its clip has its deviation."""
    args = dataclasses.replace(ARGS, batch_size=4000, target_noise=0.2, target_noise_clip=0.5)
    state, batch, seen = make_state(args), make_batch(args), []
    critic = td3.critic

    def spy(args, params, observations, actions):
        seen.append(actions)
        return critic(args, params, observations, actions)

    monkeypatch.setattr(td3, "critic", spy)
    td3.critic_loss(args, state.params["critic"], state, batch, KEY)
    actions, mean = seen[0], mu(state.targets["policy"], batch.next_observations)
    assert np.abs(actions).max() == 1
    noise = np.asarray(actions - mean)[np.abs(mean) < 0.5]  # which the box does not touch
    assert len(noise) > 500 and abs(np.abs(noise).max() - 0.5) < 1e-9
    inner = noise[np.abs(noise) < 0.4]  # a normal law cut off at two deviations: 0.8796 of its own
    assert abs(inner.std() / (0.2 * 0.8796) - 1) < 0.08


def test_policy_loss(float64):
    """The first critic alone; the second one may be anything."""
    state, s = make_state(ARGS), make_batch().observations
    loss = partial(td3.policy_loss, ARGS)
    found = check_loss(loss, expected_policy, state.params["policy"], state, s)
    second = jax.tree.map(lambda x: x.at[1].set(9.0), state.params["critic"])
    other = state.replace(params=state.params | dict(critic=second), targets={})
    close(gradient(loss, state.params["policy"], other, s), found, 0)


def test_size_of_actions(float64):
    """The logged mean of |a|, which is 1 for a policy stuck at the border."""
    state, s = make_state(ARGS), make_batch().observations
    policy = jax.tree.map(jnp.zeros_like, state.params["policy"])
    for bias, size in (((0.0, 0.0), 0), ((-30.0, 0.0), 0.5), ((30.0, -30.0), 1)):
        policy["params"]["Dense_2"]["bias"] = jnp.array(bias)
        close(td3.policy_loss(ARGS, policy, state, s)[1]["abs_action"], size)


# --- update and acting ---------------------------------------------------------------------------

update = jax.jit(td3.update, static_argnums=0)


def expected_update(state, batch, due):
    _, grads = gradient(expected_critic, state.params["critic"], state, batch,
                        jax.random.split(state.key)[1])  # fmt: skip
    params = state.params | dict(critic=reference.adam(state.params["critic"], grads, 5e-3))
    if not due:
        return params, state.targets, 0.0
    now = state.replace(params=params)
    loss, grads = gradient(expected_policy, params["policy"], now, batch.observations)
    params = params | dict(policy=reference.adam(params["policy"], grads, 2e-3))
    return params, reference.polyak(state.targets, params, 0.2), loss


@pytest.mark.parametrize(
    "delay, step, due", [(2, 0, 0), (2, 1, 1), (2, 2, 0), (2, 3, 1), (1, 0, 1)]
)
def test_update(float64, delay, step, due):
    """T-1: the policy and all averages move on every second update only, with the critics' new
    values and towards the new networks. Policy metrics stand for all updates of a period."""
    args = dataclasses.replace(ARGS, policy_delay=delay)
    state, batch = make_state(args).replace(step=jnp.int32(step)), make_batch(args)
    new, metrics = update(args, state, batch)
    params, targets, loss = expected_update(state, batch, due)
    close((new.params, new.targets), (params, targets), 1e-6)  # Adam's rates are float32
    assert new.step == step + 1 and not np.array_equal(new.key, state.key)
    close(metrics["policy_loss"], delay * loss)
    if not due:
        still = lambda x: (x.params["policy"], x.opt_state["policy"], x.targets)
        close(still(new), still(state), 0)


def test_acting(float64):
    """In training mu with noise, clipped; in evaluations mu. No other network matters."""
    args = dataclasses.replace(ARGS, batch_size=200)
    state, s = make_state(args), make_batch(args).observations
    act = jax.jit(partial(td3.sample_actions, args), static_argnames="mode")
    mean = mu(state.params["policy"], s)
    noisy = box(mean + 0.8 * jax.random.normal(KEY, mean.shape), 1.0)
    assert np.abs(noisy).max() == 1
    close(act(state, s, KEY, mode="explore"), noisy)
    assert td3.MODES == ("greedy",)
    close(act(state, s, KEY, mode="greedy"), mean)
    double = partial(jax.tree.map, lambda x: 2 * x)
    other = state.replace(
        params=double(state.params) | dict(policy=state.params["policy"]),
        targets=double(state.targets),
    )
    for mode in ("explore", "greedy"):
        close(act(other, s, KEY, mode=mode), act(state, s, KEY, mode=mode), 0)
