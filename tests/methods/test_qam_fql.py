"""QAM-FQL, exactly: sizes, QAM as a special case, the one-step policy's loss and gradient by the
specification's formulas (tests/helpers/reference.py), and which networks act."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qam
import qam_fql
from tests.helpers import reference
from tests.helpers.reference import (
    S,
    check_loss,
    check_update,
    close,
    count_parameters,
    gradient,
    make_batch,
    mlp,
    ode,
    temporal_difference,
    values,
)

pytestmark = pytest.mark.usefixtures("quick_compile")
arguments = partial(reference.arguments, qam_fql)
make_state = partial(reference.make_state, qam_fql)
ARGS = arguments(inv_temp=2.0, fql_alpha=3.0, pessimism=0.7)


def student(tree, s, z):
    return mlp(tree["params"], jnp.concatenate([s, z], -1))


def expected_critic(args, params, state, batch, key):
    z = jax.random.normal(key, batch.actions.shape)
    actions = jnp.clip(student(state.params["one_step"], batch.next_observations, z), -1, 1)
    return temporal_difference(args, params, state, batch, actions)


def expected_one_step(args, params, state, batch, key):
    s, z = batch.observations, jax.random.normal(key, batch.actions.shape)
    actions, far, value = student(params["one_step"], s, z), 0, 0
    teacher = ode(args, state.params["policy"], s, z)
    for b in range(len(z)):
        distance = sum((actions[b, j] - teacher[b, j]) ** 2 for j in range(z.shape[-1]))
        q = values(state.params["critic"], s[b], jnp.clip(actions[b], -1, 1))
        far += distance / z.size
        value += sum(q) / len(q) / len(z)
    return args.fql_alpha * far - value, dict(distillation_loss=far, one_step_q=value)


LOSSES = {
    "critic": (qam_fql.critic_loss, expected_critic, {"critic"}),
    "one_step": (qam_fql.one_step_loss, expected_one_step, {"one_step"}),
}


@pytest.mark.parametrize("sizes, count", [((29, 1, 8), 10_555_938), ((46, 5, 5), 10_808_405)])
def test_parameter_counts(sizes, count):
    assert count_parameters(qam_fql, *sizes) == count


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients(float64, name):
    """The two losses that differ from QAM's, in value and gradient; nothing else is trained."""
    check_loss(qam_fql, ARGS, *LOSSES[name])


def test_student_goes_outside_of_the_box(float64):
    """In the comparison above some of its outputs are clipped for the critic, and some are not."""
    state, batch = make_state(ARGS), make_batch(ARGS)
    z = jax.random.normal(jax.random.PRNGKey(7), batch.actions.shape)
    outside = jnp.abs(student(state.params["one_step"], batch.observations, z)) > 1
    assert 0 < outside.mean() < 1


def test_the_rest_is_qam(float64):
    """Behaviour and adjoint matching loss are qam.py's on the same networks and keys."""
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    flags = {f.name: getattr(ARGS, f.name) for f in dataclasses.fields(qam.Args)}
    for name in ("behavior_loss", "adjoint_matching_loss"):
        ours = getattr(qam_fql, name)(ARGS, state.params, state, batch, key)
        theirs = getattr(qam, name)(qam.Args(**flags), state.params, state, batch, key)
        close(ours, theirs)


def test_update(float64):
    """One joint step, the one-step policy's norm included in the clipping."""
    keys = jax.random.split(make_state(ARGS).key, 4)[1:]
    losses = [
        expected_critic,
        lambda *rest: qam_fql.behavior_loss(*rest)[0],
        lambda *rest: qam_fql.adjoint_matching_loss(*rest)[0],
        expected_one_step,
    ]
    check_update(qam_fql, ARGS, losses, [*keys, jax.random.fold_in(keys[0], 1)], clipped=True)


def test_without_distillation_it_is_qam_bit_for_bit():
    """alpha = infinity, written as 0: the same networks, state and actions as QAM."""
    ours, theirs = arguments(fql_alpha=0.0), reference.arguments(qam)
    ends = []
    for script, args in ((qam_fql, ours), (qam, theirs)):
        state = jax.jit(partial(script.create, args, S))(jax.random.PRNGKey(3))
        update = jax.jit(lambda state, batch: script.update(args, state, batch)[0])
        for seed in range(3):
            state = update(state, jax.tree.map(jnp.float32, make_batch(args, seed)))
        actions = script.sample_actions(args, state, jnp.ones((4, S)), jax.random.PRNGKey(1))
        ends.append(jax.tree.flatten((vars(state), actions)))
    assert ends[0][1] == ends[1][1]
    assert all(np.array_equal(x, y) for x, y in zip(ends[0][0], ends[1][0]))


def test_a_large_weight_asks_for_the_flow(float64):
    """alpha -> infinity: the gradient is that of the distillation alone."""
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    heavy = dataclasses.replace(ARGS, fql_alpha=1e12)
    _, found = gradient(qam_fql.one_step_loss, heavy, state, batch, key)
    z = jax.random.normal(key, batch.actions.shape)
    teacher = ode(ARGS, state.params["policy"], batch.observations, z)
    distance = lambda tree: ((student(tree, batch.observations, z) - teacher) ** 2).mean()
    expected = jax.grad(distance)(state.params["one_step"])
    close(jax.tree.map(lambda x: x / 1e12, found["one_step"]), expected, 1e-8)


def test_actions(float64):
    """The clipped student acts, in a single step; no other network enters."""
    state, key, s = make_state(ARGS), jax.random.PRNGKey(5), jnp.ones((200, S))
    actions = qam_fql.sample_actions(ARGS, state, s, key)
    raw = student(state.params["one_step"], s, jax.random.normal(key, (200, 4)))
    assert (np.abs(raw) > 1).any()
    np.testing.assert_allclose(actions, np.clip(raw, -1, 1), rtol=1e-9, atol=1e-12)
    other = make_state(ARGS, seed=1)
    changed = other.replace(params=other.params | dict(one_step=state.params["one_step"]))
    close(actions, qam_fql.sample_actions(ARGS, changed, s, key), 0)
