"""BAM, exactly: sizes, the control loss and its gradient by the specification's formulas
(tests/helpers/reference.py), by back-propagation with explicit Jacobians, and as a path's relative
entropy; its limits, and that the rest is QAM."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qam
from baselines import bam
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
    memoryless_path,
    ode,
    pessimistic,
    temporal_difference,
    values,
    velocity,
)

pytestmark = pytest.mark.usefixtures("quick_compile")
arguments = partial(reference.arguments, bam)
make_state = partial(reference.make_state, bam)
ARGS = arguments(inv_temp=2.0, pessimism=0.7)
KEY = jax.random.PRNGKey(7)


def fields(params, state, s):
    """f_theta and the average of f_beta, functions of x and t."""
    return partial(velocity, params["policy"], s), partial(velocity, state.targets["behavior"], s)


def variance(args, i):
    t, h = i / args.flow_steps, 1 / args.flow_steps
    return 2 * (1 - t + h) / (t + h)


def expected_critic(args, params, state, batch, key):
    z = jax.random.normal(key, batch.actions.shape)
    actions = ode(args, state.params["policy"], batch.next_observations, z)
    return temporal_difference(args, params, state, batch, actions)


def expected_behavior(args, params, state, batch, key):
    return flow_matching(params["behavior"], batch, batch.actions, key)


def expected_control(args, params, state, batch, key):
    s, total = batch.observations, 0
    policy, behavior = fields(params, state, s)
    path, end = memoryless_path(args, policy, behavior, s, key)
    for i, x in enumerate(path[:-1]):
        change = policy(x, i / args.flow_steps) - behavior(x, i / args.flow_steps)
        total += 2 / variance(args, i) * (change**2).sum()
    value = pessimistic(args, values(state.params["critic"], s, end))
    cost, value = total / len(s), value.sum() / len(s)
    metrics = dict(control_cost=cost, end_value=value, outside=(abs(end) > 1).mean())
    return cost - args.inv_temp * value, metrics


LOSSES = {
    "critic": (bam.critic_loss, expected_critic, {"critic"}),
    "behavior": (bam.behavior_loss, expected_behavior, {"behavior"}),
    "control": (bam.control_loss, expected_control, {"policy"}),
}


@pytest.mark.parametrize("sizes, count", [((29, 1, 8), 9_744_410), ((46, 5, 5), 9_970_748)])
def test_parameter_counts(sizes, count):
    assert count_parameters(bam, *sizes) == count


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients(float64, name):
    check_loss(bam, ARGS, *LOSSES[name])


def test_back_propagation_by_hand(float64):
    """The basic adjoint: the gradient at the end, carried back along the path through *both* fields
    and every step's cost, with explicit Jacobians, gives the gradient of f_theta's weights. Some
    coordinates end outside of the box, where the gradient goes on."""
    state, batch, T, h = make_state(ARGS), make_batch(ARGS), ARGS.flow_steps, 1 / ARGS.flow_steps
    s, tree = batch.observations, state.params["policy"]

    @jax.jit
    def by_hand(tree):
        policy, behavior = fields(dict(policy=tree), state, s)
        path, end = memoryless_path(ARGS, policy, behavior, s, KEY)
        at = lambda field, i: lambda b, x: velocity(field, s[b], x, i * h)
        base = state.targets["behavior"]
        value = lambda b, x: pessimistic(ARGS, values(state.params["critic"], s[b], x))
        g = -ARGS.inv_temp * jacobian(value, end)
        g = g + h * jnp.einsum("bi,bij->bj", g, jacobian(at(base, T - 1), path[-1]))
        total = jax.tree.map(jnp.zeros_like, tree)
        for i in reversed(range(T - 1)):
            x, change = path[i], policy(path[i], i * h) - behavior(path[i], i * h)
            pull = 4 / variance(ARGS, i) * change + 2 * h * g  # d loss / d velocity of step i
            push = jax.grad(lambda tree: (pull * velocity(tree, s, x, i * h)).sum())(tree)
            total = jax.tree.map(jnp.add, total, push)
            own, other = jacobian(at(tree, i), x), jacobian(at(base, i), x)
            g = g * (1 - h / (i * h + h)) + jnp.einsum("bi,bij->bj", pull, own)
            g = g - 4 / variance(ARGS, i) * jnp.einsum("bi,bij->bj", change, other)
        return jax.tree.map(lambda x: x / len(s), total), (jnp.abs(end) > 1).mean()

    total, outside = by_hand(tree)
    assert 0.2 < outside < 0.8
    close(gradient(bam.control_loss, ARGS, state, batch, KEY)[1]["policy"], total)


def test_cost_is_the_relative_entropy_of_the_paths(float64):
    """dt times the cost is KL(path of f_theta, path of f_beta) = sum |difference of the steps'
    means|^2 / (2 variance of a step), whence the effective inverse temperature tau / T."""
    state, batch, h = make_state(ARGS), make_batch(ARGS), 1 / ARGS.flow_steps

    @jax.jit
    def relative_entropy(state):
        policy, behavior = fields(state.params, state, batch.observations)
        path, _ = memoryless_path(ARGS, policy, behavior, batch.observations, KEY)
        total = 0
        for i, x in enumerate(path[:-1]):
            means = [x + h * (2 * f(x, i * h) - x / (i * h + h)) for f in (policy, behavior)]
            total += ((means[0] - means[1]) ** 2 / (2 * h * variance(ARGS, i))).sum(-1).mean()
        return total

    _, metrics = bam.control_loss(ARGS, state.params, state, batch, KEY)
    close(metrics["control_cost"] * h, relative_entropy(state))


def test_nothing_to_gain_nothing_to_pay(float64):
    """tau = 0 and f_theta = f_beta: no loss and no gradient. With tau > 0 there is one."""
    state, batch = make_state(ARGS), make_batch(ARGS)
    state = state.replace(params=state.params | dict(policy=state.targets["behavior"]))
    for inv_temp in (0.0, 2.0):
        args = dataclasses.replace(ARGS, inv_temp=inv_temp)
        loss, grads = gradient(bam.control_loss, args, state, batch, KEY)
        moved = any(np.any(x) for x in jax.tree.leaves(grads["policy"]))
        assert (loss != 0) == moved == (inv_temp > 0)


def test_one_critic_has_a_finite_gradient(float64):
    """Its deviation is zero, and so is the pessimism."""
    args = dataclasses.replace(ARGS, num_critics=1)
    state, batch = make_state(args), make_batch(args)
    loss, grads = gradient(bam.control_loss, args, state, batch, KEY)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((loss, grads)))
    assert any(np.any(x) for x in jax.tree.leaves(grads["policy"]))


def test_critics_that_agree_have_a_gradient(float64):
    """Two equal critics: their deviation is 0, where a root has no derivative, and so is its part
    of the gradient, which is that of a single one."""
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    equal = jax.tree.map(lambda x: 0 * x + x[:1], state.params["critic"])
    state = state.replace(params=state.params | dict(critic=equal))
    loss, grads = gradient(bam.control_loss, ARGS, state, batch, key)
    none = dataclasses.replace(ARGS, pessimism=0.0)
    close((loss, grads), gradient(bam.control_loss, none, state, batch, key))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", LOSSES)
def test_valid_masks_critic_and_flow_only(float64, name):
    """A chunk that ends too early counts in the control loss, and in nothing else."""
    state, batch = make_state(ARGS), make_batch(ARGS)
    loss = jax.jit(lambda batch: LOSSES[name][0](ARGS, state.params, state, batch, KEY)[0])
    none, every = (loss(batch._replace(valid=0 * batch.valid + x)) for x in (0, 1))
    assert none == every if name == "control" else none == 0 < every


def test_update(float64):
    """One joint Adam step on the sum of the three losses, clipped by its norm."""
    keys = jax.random.split(make_state(ARGS).key, 4)[1:]
    losses = [expected for _, expected, _ in LOSSES.values()]
    check_update(bam, ARGS, losses, keys, clipped=True)


def test_it_starts_and_acts_as_qam(float64):
    """The same initial networks as qam.py and the same actions: the online f_theta's or, with
    tau = 0, f_beta's; no other network and no target enters."""
    state, other, s = make_state(ARGS), make_state(ARGS, seed=1), jnp.ones((20, S))
    z = jax.random.normal(KEY, (20, 4))
    for inv_temp, flow in ((2.0, "policy"), (0.0, "behavior")):
        args = dataclasses.replace(ARGS, inv_temp=inv_temp)
        theirs = qam.Args(**{f.name: getattr(args, f.name) for f in dataclasses.fields(qam.Args)})
        actions = bam.sample_actions(args, state, s, KEY)
        close(actions, qam.sample_actions(theirs, state, s, KEY), 0)
        close(actions, ode(args, state.params[flow], s, z))
        changed = other.replace(params=other.params | {flow: state.params[flow]})
        close(actions, bam.sample_actions(args, changed, s, KEY), 0)
    create = lambda script, args: jax.jit(partial(script.create, args, S))(KEY)
    ours, theirs = create(bam, args), create(qam, theirs)
    close((ours.params, ours.targets), (theirs.params, theirs.targets), 0)
