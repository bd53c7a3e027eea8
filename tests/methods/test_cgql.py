"""CGQL in its three forms, exactly: sizes, losses and gradients against the specification's
formulas written down a second time (float64), the guided flow, the noisy critic's optimum.

Shapes as in cgql.py: B batch, S observation, A chunk of actions, T flow steps, K critics.
"""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baselines import cgql
from common.errors import UserError
from common.flags import parse
from tests.helpers import reference
from tests.helpers.reference import (
    check_loss,
    check_update,
    close,
    count_parameters,
    flow_matching,
    make_batch,
    ode,
    temporal_difference,
    values,
    velocity,
)

pytestmark = pytest.mark.usefixtures("quick_compile")
arguments = partial(reference.arguments, cgql)
make_state = partial(reference.make_state, cgql)
MODES = ("plain", "mse", "linex")
ARGS = {
    mode: arguments(guidance=mode, guidance_coef=(0.6, 0.7, 0.8), noisy_coef=(9.0, 0.4, 0.3))
    for mode in MODES
}
ARGS = {mode: dataclasses.replace(args, inv_temp=3.0) for mode, args in ARGS.items()}
VARTHETA, VARRHO = dict(plain=0.6, mse=0.7, linex=0.8), dict(mse=0.4, linex=0.3)
each_mode = pytest.mark.parametrize("mode", MODES)


# --- the formulas again, straight from the specification -----------------------------------------


def at(t, actions):
    """Actions with their time as one more input of the critic."""
    return jnp.concatenate([actions, jnp.broadcast_to(t, actions.shape[:-1])[..., None]], -1)


def actions_of(args, state, s, key):
    """The guided flow, step by step, with the script's noise."""
    T = args.flow_steps
    x = jax.random.normal(key, (len(s), args.chunk_length * args.action_size))
    for i in range(T):
        t = i / T
        v = velocity(state.targets["behavior"], s, x, t)
        if i > 0:
            time = 1.0 if args.guidance == "plain" else t
            q = lambda x: values(state.params["critic"], s, at(time, x)).mean(0).sum()
            score = args.inv_temp * jax.grad(q)(x)
            v = v + VARTHETA[args.guidance] * ((1 - t) * score + x) / t
        x = x + v / T
    return jnp.minimum(jnp.maximum(x, -1), 1)


def expected_critic(args, params, state, batch, key):
    actions = at(1.0, actions_of(args, state, batch.next_observations, key))
    batch = batch._replace(actions=at(1.0, batch.actions))
    return temporal_difference(args, params, state, batch, actions)


def expected_behavior(args, params, state, batch, key):
    return flow_matching(params["behavior"], batch, batch.actions, key)


def clean_and_noisy(args, params, state, batch, key):
    """Target values of the clean actions and online ones of noisy ones at their times, (K, B)."""
    z_key, t_key = jax.random.split(key)
    z = jax.random.normal(z_key, batch.actions.shape)
    t = jax.random.uniform(t_key, batch.valid.shape)[:, None]
    x = (1 - t) * z + t * batch.actions
    clean = values(state.targets["critic"], batch.observations, at(1.0, batch.actions))
    return clean, values(params["critic"], batch.observations, x, t)


def expected_noisy(args, params, state, batch, key):
    clean, noisy = clean_and_noisy(args, params, state, batch, key)
    if args.guidance == "mse":
        errors = (noisy - clean) ** 2
    else:
        delta = args.inv_temp * (clean - noisy)
        errors = jnp.exp(jnp.where(delta > 5, 0, delta)) + args.inv_temp * noisy
        errors = jnp.where(delta > 5, delta, errors)
    loss = sum((batch.valid * e).sum() for e in errors) / errors.size
    return VARRHO[args.guidance] * loss, dict(noisy_loss=loss)


# --- sizes and losses ----------------------------------------------------------------------------


@each_mode
@pytest.mark.parametrize("sizes, count", [((29, 1, 8), 8_937_490), ((46, 5, 5), 9_137_699)])
def test_parameter_counts(sizes, count, mode):
    assert count_parameters(cgql, *sizes, guidance=mode) == count


@pytest.mark.parametrize("mode", ("plain", "mse"))  # linex is in test_sampler
def test_critic_loss(float64, mode):
    check_loss(cgql, ARGS[mode], cgql.critic_loss, expected_critic, {"critic"})


def test_behavior_loss(float64):
    check_loss(cgql, ARGS["plain"], cgql.behavior_loss, expected_behavior, {"behavior"})


@pytest.mark.parametrize("mode", ("mse", "linex"))
def test_noisy_critic_loss(float64, mode):
    check_loss(cgql, ARGS[mode], cgql.noisy_critic_loss, expected_noisy, {"critic"})


def test_linex_batch_is_on_both_sides_of_the_threshold(float64):
    args = ARGS["linex"]
    state, batch = make_state(args), make_batch(args)
    clean, noisy = clean_and_noisy(args, state.params, state, batch, jax.random.PRNGKey(7))
    above = args.inv_temp * (clean - noisy) > 5
    assert 0 < above[:, batch.valid > 0].mean() < 1


def test_update(float64):
    """An update takes all three losses, without clipping."""
    args = dataclasses.replace(ARGS["linex"], flow_steps=2)
    keys = jax.random.split(make_state(args).key, 4)[1:]
    losses = [expected_critic, expected_behavior, expected_noisy]
    check_update(cgql, args, losses, keys, clipped=False)


@each_mode
def test_plain_has_no_noisy_critic(float64, mode):
    args, batch = ARGS[mode], make_batch(ARGS[mode])
    _, metrics = jax.eval_shape(partial(cgql.update, args), make_state(args), batch)
    assert ("noisy_loss" in metrics) == (mode != "plain")


# --- the guided flow -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ("plain", "linex"))
def test_sampler(float64, mode):
    """Actions equal the loop, by the online critic and the flow's target copy, in the box."""
    args = ARGS[mode]
    state, s, key = make_state(args), make_batch(args).observations, jax.random.PRNGKey(1)
    sample = jax.jit(partial(cgql.sample_actions, args))
    found = sample(state, s, key)
    close(found, jax.jit(partial(actions_of, args))(state, s, key))
    assert jnp.abs(found).max() <= 1 and 0.1 < (jnp.abs(found) < 1).mean() < 1
    other = make_state(args, seed=1)
    mixed = state.replace(
        params=dict(critic=state.params["critic"], behavior=other.params["behavior"]),
        targets=dict(critic=other.targets["critic"], behavior=state.targets["behavior"]),
    )
    close(sample(mixed, s, key), found)
    for name in ("params", "targets"):
        changed = state.replace(**{name: getattr(other, name)})
        assert not np.allclose(sample(changed, s, key), found)


def test_a_single_step_is_refused():
    """It is at t = 0, where nothing is guided."""
    with pytest.raises(UserError, match="--flow-steps"):
        dataclasses.replace(ARGS["mse"], flow_steps=1)


@each_mode
def test_no_guidance_is_flow_matching(float64, mode):
    """vartheta = 0 samples from the behaviour flow."""
    args = dataclasses.replace(ARGS[mode], guidance_coef=(0.0,))
    state, s, key = make_state(args), make_batch(args).observations, jax.random.PRNGKey(1)
    z = jax.random.normal(key, (len(s), args.chunk_length * args.action_size))
    found = jax.jit(partial(cgql.sample_actions, args))(state, s, key)
    close(found, ode(args, state.targets["behavior"], s, z))


def test_guidance_generates_the_tilted_density(float64, monkeypatch):
    """With the exact values of noisy actions, tau Q(s, x, t) = log density of x = (1 - t) z + t a,
    the guidance is the velocity E[a - z | x] that flow matching on a ~ N(m, r^2) would learn."""
    args, m, r = ARGS["mse"], jnp.array([0.5, -1.0, 0.0, 2.0]), 0.4

    def exact(args, params, s, x, t):
        variance = t**2 * r**2 + (1 - t) ** 2
        return -((x - t * m) ** 2).sum(-1)[None] / (2 * variance) / args.inv_temp

    monkeypatch.setattr(cgql, "critic", exact)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(20, 4)))
    for t in (0.1, 0.5, 0.9, 1.0):
        covariance = t * r**2 - (1 - t)  # of a - z with x
        expected = m + covariance / (t**2 * r**2 + (1 - t) ** 2) * (x - t * m)
        close(cgql.guide(args, make_state(args), None, x, t), expected)


@pytest.mark.parametrize("mode", ("mse", "linex"))
def test_noisy_critic_converges(float64, monkeypatch, mode):
    """If noise hides the action altogether, the loss of each critic is least at the mean of its
    values (mse), or at (1 / tau) log of the mean of exp(tau value) (linex)."""
    args = dataclasses.replace(ARGS[mode], noisy_coef=(1.0,))
    batch = make_batch(args)
    batch = batch._replace(valid=jnp.ones_like(batch.valid))
    monkeypatch.setattr(cgql, "critic", lambda args, params, *inputs: params)
    clean = jnp.asarray(np.random.default_rng(0).normal(size=(args.num_critics, len(batch.valid))))
    state = make_state(args).replace(targets=dict(critic=0.5 * clean))

    def slope(y):  # of constants y, one per critic
        noisy = lambda y: y[:, None] + 0 * clean
        own = lambda y: dict(critic=noisy(y))
        loss = lambda y: cgql.noisy_critic_loss(args, own(y), state, batch, state.key)[0]
        return jax.grad(loss)(y)

    best = dict(mse=(0.5 * clean).mean(-1))
    best["linex"] = jnp.log(jnp.exp(args.inv_temp * 0.5 * clean).mean(-1)) / args.inv_temp
    close(slope(best[mode]), jnp.zeros(args.num_critics))
    assert (slope(best[mode] - 0.1) < -0.01).all() and (slope(best[mode] + 0.1) > 0.01).all()


def test_linex_is_finite_far_from_its_target(monkeypatch):
    """Where a value is so far below its target that float32 has no exp of it, the slope is -tau."""
    args = ARGS["linex"]
    batch = jax.tree.map(jnp.float32, make_batch(args))
    monkeypatch.setattr(cgql, "critic", lambda args, params, *inputs: params)
    clean = jnp.full((args.num_critics, args.batch_size), 40.0)  # exp(3 * 40) is inf
    state = SimpleNamespace(targets=dict(critic=clean))

    def loss(q):
        return cgql.noisy_critic_loss(args, dict(critic=q), state, batch, jax.random.PRNGKey(0))[0]

    expected = -VARRHO["linex"] * args.inv_temp * jnp.broadcast_to(batch.valid, clean.shape)
    np.testing.assert_allclose(jax.grad(loss)(0 * clean), expected / clean.size, rtol=1e-5)


# --- flags ---------------------------------------------------------------------------------------


def test_coefficients_of_the_domains():
    """--guidance picks the domain's tuned value; a value of the user wins in every form."""

    def pair(*flags):
        args = parse(cgql.Args, cgql.ENV_DEFAULTS, ["--env", "puzzle-4x4", *flags])
        values = args.guidance_coef, args.noisy_coef
        return tuple(cgql.coefficient(args, x) for x in values)

    assert pair()[0] == 0.1 and pair("--guidance", "mse") == (1.0, 0.001)
    assert pair("--guidance", "linex") == (1.0, 0.001)
    for mode in MODES:
        flags = ["--guidance", mode, "--guidance-coef", "0", "--noisy-coef", "0.7"]
        assert pair(*flags) == (0.0, 0.7)
    with pytest.raises(UserError, match="one value or three"):
        pair("--guidance-coef", "1", "2")
