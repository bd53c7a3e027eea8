"""QSM, exactly: sizes, losses and gradients against the specification's formulas written down a
second time (float64), both samplers, and the minimum of the loss.

Schedule and network are DAC's, see test_dac.py. Shapes as in qsm.py: B batch, S observation,
A chunk of actions, T denoising steps, K critics.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baselines import dac, qsm
from tests.helpers import reference
from tests.helpers.noise_schedule import levels, noisy, predicted_noise
from tests.helpers.reference import (
    S,
    check_loss,
    check_update,
    close,
    count_parameters,
    jacobian,
    make_batch,
    temporal_difference,
    values,
)

pytestmark = pytest.mark.usefixtures("quick_compile")
arguments = partial(reference.arguments, qsm)
make_state = partial(reference.make_state, qsm)
ARGS = arguments(inv_temp=1.7, bc_coef=0.7, flow_steps=2)
SAMPLERS = {"code": ARGS, "paper": dataclasses.replace(ARGS, ancestral=True)}
each_sampler = pytest.mark.parametrize("args", SAMPLERS.values(), ids=SAMPLERS)


# --- the formulas again, straight from the specification -----------------------------------------


def actions_of(args, policy, s, key):
    """The denoising chain, step by step, with the script's noise."""
    alpha, abar = levels(args)
    start_key, noise_key = jax.random.split(key)
    x = jax.random.normal(start_key, (len(s), args.chunk_length * args.action_size))
    noise = jax.random.normal(noise_key, (args.flow_steps, *x.shape))
    for xi, i in zip(noise, range(args.flow_steps, 0, -1)):
        e = predicted_noise(args, policy, s, x, jnp.full(len(s), i))
        beta = 1 - alpha[i]
        if args.ancestral:
            x = (x - beta * e / np.sqrt(1 - abar[i])) / np.sqrt(alpha[i])
        else:
            x = (x - np.sqrt(1 - abar[i]) * e) / np.sqrt(abar[i])
        if i > 1:
            x = x + np.sqrt(beta) * xi
        x = jnp.minimum(jnp.maximum(x, -1), 1)
    return x


def expected_critic(args, params, state, batch, key):
    actions = actions_of(args, state.params["policy"], batch.next_observations, key)
    return temporal_difference(args, params, state, batch, actions)


def expected_policy(args, params, state, batch, key):
    i, noise, _, x = noisy(args, batch, key)
    q = lambda b, a: values(state.targets["critic"], batch.observations[b], a).mean()
    gradient = jacobian(q, x)
    e = predicted_noise(args, params["policy"], batch.observations, x, i)
    parts = (e - noise) ** 2, (e + args.inv_temp * gradient) ** 2
    denoising, matching = (jnp.dot(batch.valid, x).sum() / x.size for x in parts)
    length = sum(jnp.sqrt((g**2).sum()) for g in gradient) / len(gradient)
    metrics = dict(denoising_loss=denoising, matching_loss=matching, gradient_norm=length)
    return args.bc_coef * denoising + matching, metrics


# --- sizes and losses ----------------------------------------------------------------------------


@pytest.mark.parametrize("sizes, count", [((29, 1, 8), 10_015_282), ((46, 5, 5), 10_215_491)])
def test_parameter_counts(sizes, count):
    assert count_parameters(qsm, *sizes) == count


@each_sampler
def test_critic_loss(float64, args):
    check_loss(qsm, args, qsm.critic_loss, expected_critic, {"critic"})


def test_policy_loss(float64):
    check_loss(qsm, ARGS, qsm.policy_loss, expected_policy, {"policy"})


def test_update(float64):
    keys = jax.random.split(make_state(ARGS).key, 3)[1:]
    check_update(qsm, ARGS, [expected_critic, expected_policy], keys, clipped=True)


def test_best_prediction(float64, monkeypatch):
    """For a free prediction the loss is least at (eta eps - tau grad Q) / (eta + 1)."""
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    _, noise, _, x = noisy(ARGS, batch, key)
    monkeypatch.setattr(qsm, "predict_noise", lambda args, params, s, x, i: params)
    loss = lambda e: qsm.policy_loss(ARGS, dict(policy=e), state, batch, key)[0]
    slope = jax.jit(jax.grad(loss))
    q = lambda x: values(state.targets["critic"], batch.observations, x).mean(0).sum()
    best = ARGS.bc_coef * noise - ARGS.inv_temp * jax.jit(jax.grad(q))(x)
    close(slope(best / (1 + ARGS.bc_coef)), jnp.zeros_like(x))
    assert jnp.abs(slope(noise))[0].min() > 1e-4 and not slope(noise)[2].any()  # 2 is invalid


# --- the diffusion -------------------------------------------------------------------------------


def test_schedule_is_that_of_dac():
    for T in (1, 10):
        for x, y in zip(*(script.schedule(arguments(flow_steps=T)) for script in (qsm, dac))):
            np.testing.assert_array_equal(x, y)


@each_sampler
def test_sampler(float64, args):
    """Actions equal the chain in loops, by the online policy, in the box, unlike at every key."""
    state, s = make_state(args), make_batch(args).observations
    sample = jax.jit(partial(qsm.sample_actions, args))
    keys = jax.random.PRNGKey(1), jax.random.PRNGKey(2)
    found = sample(state, s, keys[0])
    close(found, actions_of(args, state.params["policy"], s, keys[0]))
    assert jnp.abs(found).max() <= 1 and not np.array_equal(found, sample(state, s, keys[1]))
    assert 0.1 < (jnp.abs(found) < 1).mean() < 1  # both sides of the clip
    other = make_state(args, seed=1)
    mixed = other.replace(params=other.params | dict(policy=state.params["policy"]))
    close(sample(mixed, s, keys[0]), found)
    assert not np.allclose(sample(other.replace(targets=state.targets), s, keys[0]), found)


@each_sampler
@pytest.mark.parametrize("T", (1, 10))
def test_point_mass(float64, monkeypatch, args, T):
    """The exact noise prediction of a single action brings every start to that action."""
    args = dataclasses.replace(args, flow_steps=T)
    action = jnp.array([0.3, -0.9, 1.0, -1.0])
    abar = jnp.array([*levels(args)[1].values()])
    exact = lambda args, policy, s, x, i: (x - jnp.sqrt(abar[i]) * action) / jnp.sqrt(1 - abar[i])
    monkeypatch.setattr(qsm, "predict_noise", exact)
    found = qsm.sample_actions(args, make_state(args), jnp.zeros((50, S)), jax.random.PRNGKey(0))
    close(found, jnp.broadcast_to(action, (50, 4)), 1e-7)


def test_ancestral_step_is_that_of_dac_inside_of_the_box(float64, monkeypatch):
    """Where nothing is clipped, the paper's step is DAC's: the mean of q(x_{i-1} | x_i, a) at the
    estimate of a. The code's step agrees at i = 1 alone."""
    args = dataclasses.replace(SAMPLERS["paper"], flow_steps=10)
    rng = np.random.default_rng(0)
    x, e, xi = jnp.asarray(0.005 * rng.normal(size=(3, 20, 4)))
    for script in (qsm, dac):
        monkeypatch.setattr(script, "predict_noise", lambda *_: e)
    code = dataclasses.replace(args, ancestral=False)
    for i in range(1, 11):
        step = lambda script, args: script.denoise(args, None, None, x, i, xi)
        close(step(qsm, args), step(dac, args))
        assert np.allclose(step(qsm, code), step(dac, args)) == (i == 1)
