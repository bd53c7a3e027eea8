"""DAC, exactly: sizes, losses and gradients against the specification's formulas written down a
second time (float64), the noise schedule, the sampler, and what the policy converges to.

Shapes as in dac.py: B batch, S observation, A chunk of actions, T denoising steps, K critics.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

from baselines import dac
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
arguments = partial(reference.arguments, dac)
make_state = partial(reference.make_state, dac)
ARGS = arguments(bc_coef=0.7, flow_steps=2)
# beta_1..beta_10 and abar_1..abar_10 of the specification
BETA = [0.05776, 0.14658, 0.22702, 0.29988, 0.36587, 0.42564, 0.47978, 0.52881, 0.57323, 0.61345]
ABAR = [0.942236, 0.804126, 0.621574, 0.435178, 0.275960]
ABAR += [0.158500, 0.082455, 0.038852, 0.016581, 0.006409]


# --- the formulas again, straight from the specification -----------------------------------------


def actions_of(args, policy, s, key):
    """The denoising chain, step by step, with the script's noise."""
    alpha, abar = levels(args)
    start_key, noise_key = jax.random.split(key)
    x = jax.random.normal(start_key, (len(s), args.chunk_length * args.action_size))
    noise = jax.random.normal(noise_key, (args.flow_steps, *x.shape))
    for xi, i in zip(noise, range(args.flow_steps, 0, -1)):
        e = predicted_noise(args, policy, s, x, jnp.full(len(s), i))
        clean = jnp.clip((x - np.sqrt(1 - abar[i]) * e) / np.sqrt(abar[i]), -1, 1)
        x = np.sqrt(alpha[i]) * (1 - abar[i - 1]) * x
        x = (np.sqrt(abar[i - 1]) * (1 - alpha[i]) * clean + x) / (1 - abar[i])
        if i > 1:
            x = x + np.sqrt(1 - alpha[i]) * xi
    return x


def expected_critic(args, params, state, batch, key):
    actions = actions_of(args, state.params["policy"], batch.next_observations, key)
    return temporal_difference(args, params, state, batch, actions)


def expected_policy(args, params, state, batch, key):
    i, noise, deviation, x = noisy(args, batch, key)
    q = lambda b, a: values(state.targets["critic"], batch.observations[b], a).mean()
    gradient = jacobian(q, x)
    e = predicted_noise(args, params["policy"], batch.observations, x, i)
    parts = (e - noise) ** 2, deviation * gradient * e
    denoising, guidance = (jnp.dot(batch.valid, x).sum() / x.size for x in parts)
    length = sum(jnp.sqrt((g**2).sum()) for g in gradient) / len(gradient)
    metrics = dict(denoising_loss=denoising, guidance_loss=guidance, gradient_norm=length)
    return args.bc_coef * denoising + guidance, metrics


# --- sizes and losses ----------------------------------------------------------------------------


@pytest.mark.parametrize("sizes, count", [((29, 1, 8), 10_015_282), ((46, 5, 5), 10_215_491)])
def test_parameter_counts(sizes, count):
    assert count_parameters(dac, *sizes) == count


def test_critic_loss(float64):
    check_loss(dac, ARGS, dac.critic_loss, expected_critic, {"critic"})


def test_policy_loss(float64):
    check_loss(dac, ARGS, dac.policy_loss, expected_policy, {"policy"})


def test_update(float64):
    keys = jax.random.split(make_state(ARGS).key, 3)[1:]
    check_update(dac, ARGS, [expected_critic, expected_policy], keys, clipped=True)


def test_best_prediction(float64, monkeypatch):
    """For a free prediction the loss is least at eps - sqrt(1 - abar) grad Q / (2 eta)."""
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    _, noise, deviation, x = noisy(ARGS, batch, key)
    monkeypatch.setattr(dac, "predict_noise", lambda args, params, s, x, i: params)

    loss = lambda e: dac.policy_loss(ARGS, dict(policy=e), state, batch, key)[0]
    slope = jax.jit(jax.grad(loss))
    q = lambda x: values(state.targets["critic"], batch.observations, x).mean(0).sum()
    best = noise - deviation * jax.jit(jax.grad(q))(x) / (2 * ARGS.bc_coef)
    close(slope(best), jnp.zeros_like(best))
    assert jnp.abs(slope(noise))[0].min() > 1e-4 and not slope(noise)[2].any()  # 2 is invalid


# --- the diffusion -------------------------------------------------------------------------------


def test_schedule(float64):
    """The specification's table; and abar_T is that of a rate that rises evenly from 0.1 to 10."""
    abar, beta = dac.schedule(arguments(flow_steps=10))
    np.testing.assert_allclose(beta, [0, *BETA], atol=6e-6)
    np.testing.assert_allclose(abar, [1, *ABAR], atol=6e-7)
    for T in (1, 5, 10):
        abar, _ = dac.schedule(arguments(flow_steps=T))
        for i in range(T + 1):
            area, _ = scipy.integrate.quad(lambda u: 0.1 + 9.9 * u, 0, i / T)
            close(abar[i], np.exp(-area))


def test_sampler(float64):
    """Actions equal the chain in loops, by the online policy, in the box, unlike at every key."""
    state, s = make_state(ARGS), make_batch(ARGS).observations
    sample = jax.jit(partial(dac.sample_actions, ARGS))
    keys = jax.random.PRNGKey(1), jax.random.PRNGKey(2)
    found = sample(state, s, keys[0])
    close(found, actions_of(ARGS, state.params["policy"], s, keys[0]))
    assert jnp.abs(found).max() <= 1 and not np.array_equal(found, sample(state, s, keys[1]))
    assert 0.1 < (jnp.abs(found) < 1).mean() < 1  # both sides of the clip
    other = make_state(ARGS, seed=1)
    mixed = other.replace(params=other.params | dict(policy=state.params["policy"]))
    close(sample(mixed, s, keys[0]), found)
    assert not np.allclose(sample(other.replace(targets=state.targets), s, keys[0]), found)


@pytest.mark.parametrize("T", (1, 5, 10))
def test_point_mass(float64, monkeypatch, T):
    """The exact noise prediction of a single action brings every start to that action."""
    args = arguments(flow_steps=T)
    action = jnp.array([0.3, -0.9, 1.0, -1.0])
    abar = jnp.array([*levels(args)[1].values()])
    exact = lambda args, policy, s, x, i: (x - jnp.sqrt(abar[i]) * action) / jnp.sqrt(1 - abar[i])
    monkeypatch.setattr(dac, "predict_noise", exact)
    found = dac.sample_actions(args, make_state(args), jnp.zeros((50, S)), jax.random.PRNGKey(0))
    close(found, jnp.broadcast_to(action, (50, 4)), 1e-7)


def test_gaussian_tilted_by_a_line(float64, monkeypatch):
    """Data N(m, v) and Q = c a: with the exact guidance, the slope of the noisy value instead of c,
    many denoising steps sample pi_beta exp(Q / (2 eta)), that is N(m + v c / (2 eta), v)."""
    args, m, v, c = arguments(flow_steps=400, bc_coef=0.01), -0.2, 0.01, 0.8
    abar = jnp.array([*levels(args)[1].values()])

    def best(args, policy, s, x, i):
        spread = abar[i] * v + 1 - abar[i]
        imitation = (x - jnp.sqrt(abar[i]) * m) / spread
        slope = c * jnp.sqrt(abar[i]) * v / spread
        return jnp.sqrt(1 - abar[i]) * (imitation - slope / (2 * args.bc_coef))

    monkeypatch.setattr(dac, "predict_noise", best)
    sample = jax.jit(partial(dac.sample_actions, args))
    found = sample(make_state(args), jnp.zeros((2000, S)), jax.random.PRNGKey(0))
    close(found.mean(), m + v * c / (2 * args.bc_coef), 0.005)
    np.testing.assert_allclose(found.std(), np.sqrt(v), rtol=0.05)
