"""FBRAC, exactly: sizes, every loss and gradient by the specification's formulas
(tests/helpers/reference.py), back-propagation through the flow by hand, the limit of its weight,
what is masked, and which network acts."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baselines import fbrac
from tests.helpers import reference
from tests.helpers.reference import (
    S,
    check_loss,
    check_update,
    close,
    count_parameters,
    flow_matching,
    gradient,
    jacobian,
    make_batch,
    ode,
    temporal_difference,
    values,
    velocity,
)

pytestmark = pytest.mark.usefixtures("quick_compile")
arguments = partial(reference.arguments, fbrac)
make_state = partial(reference.make_state, fbrac)
ARGS = arguments(fbrac_alpha=0.3, pessimism=0.7)


def expected_critic(args, params, state, batch, key):
    z = jax.random.normal(key, batch.actions.shape)
    actions = ode(args, state.params["policy"], batch.next_observations, z)
    return temporal_difference(args, params, state, batch, actions)


def expected_behavior(args, params, state, batch, key):
    return flow_matching(params["policy"], batch, batch.actions, key)


def expected_backprop(args, params, state, batch, key):
    s, z = batch.observations, jax.random.normal(key, batch.actions.shape)
    actions = ode(args, params["policy"], s, z)
    q = values(state.params["critic"], s, actions)
    value, outside = sum(member.sum() for member in q) / q.size, (abs(actions) >= 1).mean()
    return -value / args.fbrac_alpha, dict(policy_q=value, outside=outside)


LOSSES = {
    "critic": (fbrac.critic_loss, expected_critic, {"critic"}),
    "behavior": (fbrac.behavior_loss, expected_behavior, {"policy"}),
    "backprop": (fbrac.backprop_loss, expected_backprop, {"policy"}),
}


@pytest.mark.parametrize("sizes, count", [((29, 1, 8), 8_932_370), ((46, 5, 5), 9_132_579)])
def test_parameter_counts(sizes, count):
    assert count_parameters(fbrac, *sizes) == count


def test_targets():
    """Only the critic has a moving average: 17,426,989 parameters with it on cube-triple."""
    args = dataclasses.replace(fbrac.Args(), action_size=5)
    state = jax.eval_shape(partial(fbrac.create, args, 46), jax.random.PRNGKey(0))
    assert set(state.targets) == {"critic"}
    assert sum(x.size for x in jax.tree.leaves((state.params, state.targets))) == 17_426_989


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients(float64, name):
    check_loss(fbrac, ARGS, *LOSSES[name])


def test_back_propagation_by_hand(float64):
    """The critics' mean gradient at the end, carried back step by step with explicit Jacobians; a
    step's weights move by dt (carried gradient)^T df. Coordinates that end outside of the box start
    with nothing, and there are some on both sides."""
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    s, dt = batch.observations, 1 / ARGS.flow_steps

    @jax.jit
    def by_hand(tree):
        path = [jax.random.normal(key, batch.actions.shape)]
        for i in range(ARGS.flow_steps):
            path.append(path[-1] + dt * velocity(tree, s, path[-1], i * dt))
        end, inside = path[-1], jnp.abs(path[-1]) < 1
        q = lambda b, a: values(state.params["critic"], s[b], a).mean()
        g = -jacobian(q, jnp.clip(end, -1, 1)) * inside / len(end) / ARGS.fbrac_alpha
        total = jax.tree.map(jnp.zeros_like, tree)
        for i in reversed(range(ARGS.flow_steps)):
            push = jax.grad(lambda tree: (g * velocity(tree, s, path[i], i * dt)).sum())(tree)
            total = jax.tree.map(lambda x, y: x + dt * y, total, push)
            f = lambda b, x: velocity(tree, s[b], x, i * dt)
            g = g + dt * jnp.einsum("bi,bij->bj", g, jacobian(f, path[i]))
        return total, inside.mean()

    total, inside = by_hand(state.params["policy"])
    assert 0 < inside < 1
    _, found = gradient(fbrac.backprop_loss, ARGS, state, batch, key)
    close(found["policy"], total)


def test_no_gradient_outside_of_the_box(float64):
    """A flow whose actions all end outside of the box feels nothing of the critic."""
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    tree = state.params["policy"]["params"]["MLP_0"]
    last = tree["Dense_2"] | dict(bias=tree["Dense_2"]["bias"] + 100)
    moved = dict(params=dict(MLP_0=tree | dict(Dense_2=last)))
    state = state.replace(params=state.params | dict(policy=moved))
    _, grads = gradient(fbrac.backprop_loss, ARGS, state, batch, key)
    assert not any(np.any(x) for x in jax.tree.leaves(grads))
    _, metrics = fbrac.backprop_loss(ARGS, state.params, state, batch, key)
    assert metrics["outside"] == 1


def test_update(float64):
    """One Adam step on the sum of the three losses, without clipping."""
    keys = jax.random.split(make_state(ARGS).key, 4)[1:]
    losses = [expected for _, expected, _ in LOSSES.values()]
    check_update(fbrac, ARGS, losses, keys, clipped=False)


@pytest.mark.parametrize("name", LOSSES)
def test_valid_masks_critic_and_flow_matching_only(float64, name):
    """A chunk that ends too early counts in the critic's value, and in nothing else."""
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    loss = jax.jit(lambda batch: LOSSES[name][0](ARGS, state.params, state, batch, key)[0])
    none, every = (loss(batch._replace(valid=0 * batch.valid + x)) for x in (0, 1))
    assert none == every if name == "backprop" else none == 0 < every


def test_a_large_weight_is_cloning(float64):
    """alpha -> infinity: an update moves the flow by flow matching alone."""
    state, batch = make_state(ARGS), make_batch(ARGS)
    heavy = dataclasses.replace(ARGS, fbrac_alpha=1e12)
    new, _ = jax.jit(fbrac.update, static_argnums=0)(heavy, state, batch)
    key = jax.random.split(state.key, 4)[2]
    _, grads = gradient(fbrac.behavior_loss, ARGS, state, batch, key)
    adam = lambda x, g: x - ARGS.lr * g / (jnp.abs(g) + 1e-8)
    expected = jax.tree.map(adam, state.params["policy"], grads["policy"])
    close(new.params["policy"], expected, 1e-6)


def test_actions(float64):
    """The online flow's deterministic ODE acts; no other network and no target enters."""
    state, key, s = make_state(ARGS), jax.random.PRNGKey(5), jnp.ones((200, S))
    actions = fbrac.sample_actions(ARGS, state, s, key)
    expected = ode(ARGS, state.params["policy"], s, jax.random.normal(key, (200, 4)))
    np.testing.assert_allclose(actions, expected, rtol=1e-9, atol=1e-12)
    assert np.abs(actions).max() == 1
    other = make_state(ARGS, seed=1)
    changed = other.replace(params=other.params | dict(policy=state.params["policy"]))
    close(actions, fbrac.sample_actions(ARGS, changed, s, key), 0)
