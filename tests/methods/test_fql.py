"""FQL, exactly: sizes, every loss and gradient by the specification's formulas
(tests/helpers/reference.py), the limits of its weight, what is masked, and which network acts."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baselines import fql
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
    mlp,
    ode,
    temporal_difference,
    values,
)

pytestmark = pytest.mark.usefixtures("quick_compile")
arguments = partial(reference.arguments, fql)
make_state = partial(reference.make_state, fql)
ARGS = arguments(fql_alpha=3.0, pessimism=0.7)


def student(tree, s, z):
    return mlp(tree["params"], jnp.concatenate([s, z], -1))


def expected_critic(args, params, state, batch, key):
    z = jax.random.normal(key, batch.actions.shape)
    actions = jnp.clip(student(state.params["one_step"], batch.next_observations, z), -1, 1)
    return temporal_difference(args, params, state, batch, actions)


def expected_behavior(args, params, state, batch, key):
    return flow_matching(params["behavior"], batch, batch.actions, key)


def expected_one_step(args, params, state, batch, key):
    s, z = batch.observations, jax.random.normal(key, batch.actions.shape)
    actions, far, value = student(params["one_step"], s, z), 0, 0
    teacher = ode(args, state.params["behavior"], s, z)
    for b in range(len(z)):
        distance = sum((actions[b, j] - teacher[b, j]) ** 2 for j in range(z.shape[-1]))
        q = values(state.params["critic"], s[b], jnp.clip(actions[b], -1, 1))
        far += distance / z.size
        value += sum(q) / len(q) / len(z)
    return args.fql_alpha * far - value, dict(distillation_loss=far, one_step_q=value)


LOSSES = {
    "critic": (fql.critic_loss, expected_critic, {"critic"}),
    "behavior": (fql.behavior_loss, expected_behavior, {"behavior"}),
    "one_step": (fql.one_step_loss, expected_one_step, {"one_step"}),
}


@pytest.mark.parametrize("sizes, count", [((29, 1, 8), 9_743_898), ((46, 5, 5), 9_970_236)])
def test_parameter_counts(sizes, count):
    assert count_parameters(fql, *sizes) == count


def test_targets():
    """Only the critic has a moving average: 18,264,646 parameters with it on cube-triple."""
    args = dataclasses.replace(fql.Args(), action_size=5)
    state = jax.eval_shape(partial(fql.create, args, 46), jax.random.PRNGKey(0))
    assert set(state.targets) == {"critic"}
    assert sum(x.size for x in jax.tree.leaves((state.params, state.targets))) == 18_264_646


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients(float64, name):
    check_loss(fql, ARGS, *LOSSES[name])


def test_student_and_teacher_go_outside_of_the_box(float64):
    """The comparison above sees student and teacher on both sides of their clips."""
    state, batch = make_state(ARGS), make_batch(ARGS)
    z = jax.random.normal(jax.random.PRNGKey(7), batch.actions.shape)
    actions = student(state.params["one_step"], batch.observations, z)
    teacher = ode(ARGS, state.params["behavior"], batch.observations, z)
    for outside in (jnp.abs(actions) > 1, jnp.abs(teacher) == 1):
        assert 0 < outside.mean() < 1


def test_update(float64):
    """One Adam step on the sum of the three losses, without clipping."""
    keys = jax.random.split(make_state(ARGS).key, 4)[1:]
    losses = [expected for _, expected, _ in LOSSES.values()]
    check_update(fql, ARGS, losses, keys, clipped=False)


@pytest.mark.parametrize("name", LOSSES)
def test_valid_masks_critic_and_flow_only(float64, name):
    """A chunk that ends too early counts in the distillation, and in nothing else."""
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    loss = jax.jit(lambda batch: LOSSES[name][0](ARGS, state.params, state, batch, key)[0])
    none, every = (loss(batch._replace(valid=0 * batch.valid + x)) for x in (0, 1))
    assert none == every if name == "one_step" else none == 0 < every


def test_a_large_weight_is_cloning(float64):
    """alpha -> infinity: the gradient is that of the distillation alone, and a student that makes
    the flow's actions has none."""
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    heavy = dataclasses.replace(ARGS, fql_alpha=1e12)
    _, found = gradient(fql.one_step_loss, heavy, state, batch, key)
    z = jax.random.normal(key, batch.actions.shape)
    teacher = ode(ARGS, state.params["behavior"], batch.observations, z)
    distance = lambda tree: ((student(tree, batch.observations, z) - teacher) ** 2).mean()
    expected = jax.grad(distance)(state.params["one_step"])
    close(jax.tree.map(lambda x: x / 1e12, found["one_step"]), expected, 1e-8)


def test_no_weight_is_the_deterministic_policy_gradient(float64):
    """alpha = 0: every output moves along the online critics' mean gradient, those outside of the
    box not at all."""
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    loss = lambda bias: fql.one_step_loss(
        dataclasses.replace(ARGS, fql_alpha=0.0), shifted(state.params, bias), state, batch, key
    )[0]

    def shifted(params, bias):
        tree = params["one_step"]["params"]
        last = tree["Dense_2"] | dict(bias=tree["Dense_2"]["bias"] + bias)
        return params | dict(one_step=dict(params=tree | dict(Dense_2=last)))

    s, z = batch.observations, jax.random.normal(key, batch.actions.shape)
    actions = student(state.params["one_step"], s, z)
    q = lambda a: values(state.params["critic"], s, a).mean(0).sum()
    expected = -(jax.grad(q)(jnp.clip(actions, -1, 1)) * (jnp.abs(actions) < 1)).mean(0)
    close(jax.grad(loss)(jnp.zeros(4)), expected)


def test_actions(float64):
    """The clipped student acts, in a single step; no other network and no target enters."""
    state, key, s = make_state(ARGS), jax.random.PRNGKey(5), jnp.ones((200, S))
    actions = fql.sample_actions(ARGS, state, s, key)
    raw = student(state.params["one_step"], s, jax.random.normal(key, (200, 4)))
    assert (np.abs(raw) > 1).any() and np.abs(actions).max() <= 1
    np.testing.assert_allclose(actions, np.clip(raw, -1, 1), rtol=1e-9, atol=1e-12)
    other = make_state(ARGS, seed=1)
    changed = other.replace(params=other.params | dict(one_step=state.params["one_step"]))
    close(actions, fql.sample_actions(ARGS, changed, s, key), 0)
