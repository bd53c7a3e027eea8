"""FAWAC, exactly: sizes, every loss and gradient against formulas that are written down a second
time (tests/helpers/reference.py, float64), what the weights become in their limits, and which copy
of a network acts.

Shapes as in baselines/fawac.py: B batch, S observation, A chunk of actions, K critics.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baselines import fawac
from tests.helpers import reference
from tests.helpers.reference import (
    S,
    check_loss,
    check_update,
    close,
    count_parameters,
    flow_matching,
    gradient,
    make_batch,
    ode,
    temporal_difference,
    values,
)

pytestmark = pytest.mark.usefixtures("quick_compile")
arguments = partial(reference.arguments, fawac)
make_state = partial(reference.make_state, fawac)
ARGS = arguments(inv_temp=4.0, pessimism=0.7, discount=0.9)


# --- the formulas again, straight from the specification -----------------------------------------


def acting(args, state, s, key):
    z = jax.random.normal(key, (len(s), args.chunk_length * args.action_size))
    return ode(args, state.params["policy"], s, z)


def expected_critic(args, params, state, batch, key):
    actions = acting(args, state, batch.next_observations, key)
    return temporal_difference(args, params, state, batch, actions)


def expected_value(args, params, state, batch, key):
    q = values(state.targets["critic"], batch.observations, batch.actions)
    v = values(params["value"], batch.observations)[0]
    loss = sum((batch.valid * (member - v) ** 2).sum() for member in q) / q.size
    return loss, dict(value_loss=loss, value=sum(v) / len(v))


def weights(args, state, batch):
    q = sum(values(state.params["critic"], batch.observations, batch.actions)) / args.num_critics
    w = jnp.exp(args.inv_temp * (q - values(state.params["value"], batch.observations)[0]))
    return jnp.where(w > 100, 100, w)


def expected_policy(args, params, state, batch, key):
    w, every = weights(args, state, batch), batch._replace(valid=jnp.ones_like(batch.valid))
    loss = flow_matching(params["policy"], batch, batch.actions, key, w)
    metrics = dict(policy_loss=loss, weight=sum(w) / len(w), capped=sum(w == 100) / len(w))
    q = values(state.params["critic"], batch.observations, batch.actions).mean(0)
    advantage = q - values(state.params["value"], batch.observations)[0]
    spread = jnp.sqrt((advantage**2).mean() - advantage.mean() ** 2)
    error = flow_matching(params["policy"], every, batch.actions, key)
    return loss, metrics | dict(advantage_std=spread, flow_error=error)


LOSSES = {  # name -> (of the script, from the specification, the only networks it may move)
    "critic": (fawac.critic_loss, expected_critic, {"critic"}),
    "value": (fawac.value_loss, expected_value, {"value"}),
    "policy": (fawac.policy_loss, expected_policy, {"policy"}),
}


@pytest.mark.parametrize("sizes, count", [((29, 1, 8), 9_740_307), ((46, 5, 5), 9_949_220)])
def test_parameter_counts(sizes, count):
    assert count_parameters(fawac, *sizes) == count


def test_only_the_critic_has_a_target():
    state = jax.eval_shape(partial(fawac.create, ARGS, S), jax.random.PRNGKey(0))
    assert set(state.targets) == {"critic"}
    assert set(state.params) == {"critic", "value", "policy"}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients(float64, name):
    """Every loss and its gradient with respect to all networks equal the specification's, in
    float64 to 1e-9; the networks that are not the loss's own get exactly nothing."""
    check_loss(fawac, ARGS, *LOSSES[name])


def test_weights_are_capped_and_not(float64):
    """The comparison above sees weights below, between and at the cap, of valid chunks."""
    state, batch = make_state(ARGS), make_batch(ARGS)
    w = weights(ARGS, state, batch)[batch.valid == 1]
    assert w.max() == 100 and w.min() < 1 and ((w > 1) & (w < 100)).any(), w


def test_update(float64):
    """One Adam step on the sum of all losses; no gradient is clipped."""
    keys = jax.random.split(make_state(ARGS).key, 4)[1:]
    check_update(fawac, ARGS, [loss for _, loss, _ in LOSSES.values()], keys, clipped=False)


@pytest.mark.parametrize("name", LOSSES)
def test_valid_masks_every_loss(float64, name):
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    loss = jax.jit(lambda batch: LOSSES[name][0](ARGS, state.params, state, batch, key)[0])
    none, every = (loss(batch._replace(valid=0 * batch.valid + x)) for x in (0, 1))
    assert none == 0 and every > 0


# --- limits --------------------------------------------------------------------------------------


def test_without_temperature_it_is_flow_matching(float64):
    """tau = 0: all weights are 1, the policy's loss and gradient are plain flow matching."""
    args = dataclasses.replace(ARGS, inv_temp=0.0)
    inputs = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    plain = lambda args, params, state, batch, key: flow_matching(
        params["policy"], batch, batch.actions, key
    )
    close(gradient(fawac.policy_loss, args, *inputs), gradient(plain, args, *inputs))


def test_huge_advantages_stay_finite():
    """Without overflow where exp(tau A) is infinite in float32: the cap's weight."""
    args = arguments(inv_temp=1e6)
    state = jax.jit(partial(fawac.create, args, S))(jax.random.PRNGKey(0))
    batch = jax.tree.map(jnp.float32, make_batch(args))
    loss = jax.value_and_grad(partial(fawac.policy_loss, args), has_aux=True)
    (value, metrics), grads = jax.jit(loss)(state.params, state, batch, state.key)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, metrics, grads)))
    assert 0 < metrics["capped"] < 1 and metrics["weight"] == 100 * metrics["capped"]


def test_value_is_the_mean_over_actions_and_critics(float64):
    """The constant V with zero gradient is the mean of all target critics over valid chunks."""
    state, batch = make_state(ARGS), make_batch(ARGS)
    q = values(state.targets["critic"], batch.observations, batch.actions)
    mean = q[:, batch.valid == 1].mean()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fawac, "value", lambda args, params, s: params + jnp.zeros(len(s)))
        loss = lambda v: fawac.value_loss(ARGS, dict(value=v), state, batch, state.key)[0]
        slopes = jax.vmap(jax.grad(loss))(mean + jnp.array([-0.1, 0, 0.1]))
    assert slopes[0] < -1e-3 and abs(slopes[1]) < 1e-9 and slopes[2] > 1e-3


def test_weighting_tilts_a_bandit(float64):
    """Two actions, equally frequent in the data, whose values differ by 1: the weights' ratio is
    e^tau, so that the weighted data, which the flow imitates, are pi_beta exp(tau Q) / Z."""
    args = arguments(inv_temp=2.0, batch_size=4)
    state, batch = make_state(args), make_batch(args)
    batch = batch._replace(valid=jnp.ones(4))
    with pytest.MonkeyPatch.context() as patch:
        q = jnp.array([0.0, 1.0, 0.0, 1.0])
        patch.setattr(fawac, "critic", lambda *inputs: jnp.stack([q, q]))
        patch.setattr(fawac, "value", lambda args, params, s: jnp.full(len(s), 0.5))
        patch.setattr(fawac, "field", lambda args, params, s, x, t: params)

        def loss(velocity):
            params = dict(policy=velocity)
            return fawac.policy_loss(args, params, state, batch, jax.random.PRNGKey(0))[0]

        curvature = jax.hessian(lambda w: loss(w[:, None] + jnp.zeros((4, 4))))(jnp.zeros(4))
    pull = jnp.diag(curvature) / 2 * 4  # the weight of every sample
    np.testing.assert_allclose(pull, np.exp([-1, 1, -1, 1]), rtol=1e-9)


# --- acting --------------------------------------------------------------------------------------


def test_actions(float64):
    """The flow's action, within the box of actions; another one in every row."""
    state, s, key = make_state(ARGS), jnp.ones((200, S)), jax.random.PRNGKey(5)
    actions = fawac.sample_actions(ARGS, state, s, key)
    np.testing.assert_allclose(actions, acting(ARGS, state, s, key), rtol=1e-9, atol=1e-9)
    assert np.abs(actions).max() <= 1 and len(np.unique(np.asarray(actions), axis=0)) > 100


def test_online_policy_acts(float64):
    """Neither value nor critics enter the actions; the online flow does."""
    state, other, s = make_state(ARGS), make_state(ARGS, seed=1), jnp.ones((5, S))
    draw = lambda state: fawac.sample_actions(ARGS, state, s, jax.random.PRNGKey(5))
    params = other.params | dict(policy=state.params["policy"])
    close(draw(state), draw(state.replace(params=params, targets=other.targets)), 0)
    assert not np.allclose(draw(state), draw(state.replace(params=other.params)))
