"""QAM-EDIT, exactly: sizes, QAM as a special case, the edit's density, loss and gradient by the
specification's formulas (tests/helpers/reference.py), what the edit can reach, and which copies
act."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import qam
import qam_edit
from tests.helpers import reference
from tests.helpers.reference import (
    S,
    check_loss,
    check_update,
    close,
    count_parameters,
    gaussian,
    log_density,
    make_batch,
    ode,
    temporal_difference,
    values,
)

pytestmark = pytest.mark.usefixtures("quick_compile")
arguments = partial(reference.arguments, qam_edit)
make_state = partial(reference.make_state, qam_edit)
ARGS = arguments(inv_temp=2.0, edit_scale=0.6, pessimism=0.7)


def edited(args, tree, s, flow_actions, key):
    """Action and log-density of an edit, from the specification."""
    mean, log_std = gaussian(tree, s, flow_actions)
    u = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
    return jnp.clip(flow_actions + args.edit_scale * jnp.tanh(u), -1, 1), log_density(
        u, mean, log_std
    )


def acting(args, state, s, key):
    z = jax.random.normal(key, (len(s), args.chunk_length * args.action_size))
    flow_actions = ode(args, state.params["policy"], s, z)
    return edited(args, state.params["edit"], s, flow_actions, jax.random.fold_in(key, 1))[0]


def expected_critic(args, params, state, batch, key):
    actions = acting(args, state, batch.next_observations, key)
    return temporal_difference(args, params, state, batch, actions)


def expected_edit(args, params, state, batch, key):
    z_key, edit_key = jax.random.split(key)
    s, z = batch.observations, jax.random.normal(z_key, batch.actions.shape)
    flow_actions = ode(args, state.params["policy"], s, z)
    actions, log_prob = edited(args, params["edit"], s, flow_actions, edit_key)
    q = values(state.params["critic"], s, actions)
    actor = jnp.exp(state.params["log_alpha"]) * log_prob.mean() - q.mean()
    entropy, alpha = -jax.lax.stop_gradient(log_prob).mean(), jnp.exp(params["log_alpha"])
    size = abs(actions - flow_actions).sum() / z.size
    metrics = dict(edit_entropy=entropy, edit_alpha=alpha, edit_size=size)
    return actor + alpha * (entropy + z.shape[-1] / 2), metrics


LOSSES = {
    "critic": (qam_edit.critic_loss, expected_critic, {"critic"}),
    "edit": (qam_edit.edit_loss, expected_edit, {"edit", "log_alpha"}),
}


@pytest.mark.parametrize("sizes, count", [((29, 1, 8), 10_560_043), ((46, 5, 5), 10_821_231)])
def test_parameter_counts(sizes, count):
    assert count_parameters(qam_edit, *sizes) == count


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients(float64, name):
    """The two losses that differ from QAM's, in value and gradient; nothing else is trained."""
    check_loss(qam_edit, ARGS, *LOSSES[name])


def test_the_rest_is_qam(float64):
    """Behaviour and adjoint matching loss are qam.py's on the same networks and keys."""
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    flags = {f.name: getattr(ARGS, f.name) for f in dataclasses.fields(qam.Args)}
    for name in ("behavior_loss", "adjoint_matching_loss"):
        ours = getattr(qam_edit, name)(ARGS, state.params, state, batch, key)
        theirs = getattr(qam, name)(qam.Args(**flags), state.params, state, batch, key)
        close(ours, theirs)


def test_update(float64):
    """One joint step, the norm of edit policy and temperature included in the clipping."""
    keys = jax.random.split(make_state(ARGS).key, 4)[1:]
    losses = [
        expected_critic,
        lambda *rest: qam_edit.behavior_loss(*rest)[0],
        lambda *rest: qam_edit.adjoint_matching_loss(*rest)[0],
        expected_edit,
    ]
    check_update(qam_edit, ARGS, losses, [*keys, jax.random.fold_in(keys[0], 2)], clipped=True)


def test_without_edits_it_is_qam_bit_for_bit():
    """sigma_a = 0: the same networks, state and actions after three updates as QAM."""
    ours, theirs = arguments(edit_scale=0.0), reference.arguments(qam)
    ends = []
    for script, args in ((qam_edit, ours), (qam, theirs)):
        state = jax.jit(partial(script.create, args, S))(jax.random.PRNGKey(3))
        update = jax.jit(lambda state, batch: script.update(args, state, batch)[0])
        for seed in range(3):
            state = update(state, jax.tree.map(jnp.float32, make_batch(args, seed)))
        actions = script.sample_actions(args, state, jnp.ones((4, S)), jax.random.PRNGKey(1))
        ends.append(jax.tree.flatten((vars(state), actions)))
    assert ends[0][1] == ends[1][1]
    assert all(np.array_equal(x, y) for x, y in zip(ends[0][0], ends[1][0]))


def test_density_is_that_of_the_unscaled_edit(float64):
    """log pi(e) = log N(u) - log(1 - e^2), by scipy, whatever the scale."""
    state, s = make_state(ARGS), make_batch(ARGS).observations
    for scale in (0.1, 0.9):
        args = dataclasses.replace(ARGS, edit_scale=scale)
        zero, key = jnp.zeros((len(s), 4)), jax.random.PRNGKey(0)
        actions, log_prob = qam_edit.edit(args, state.params["edit"], s, zero, key)
        e = np.asarray(actions) / scale  # the flow's action is 0: nothing is clipped
        mean, log_std = (np.asarray(x) for x in gaussian(state.params["edit"], s, zero))
        density = scipy.stats.norm.pdf(np.arctanh(e), mean, np.exp(log_std)) / (1 - e**2)
        np.testing.assert_allclose(log_prob, np.log(density).sum(-1), rtol=1e-6)


def test_actions(float64):
    """The flow's action and an edit of at most sigma_a per coordinate, sampled, within the box."""
    state, s, key = make_state(ARGS), jnp.ones((2000, S)), jax.random.PRNGKey(5)
    actions = qam_edit.sample_actions(ARGS, state, s, key)
    np.testing.assert_allclose(actions, acting(ARGS, state, s, key), rtol=1e-9, atol=1e-9)
    plain = dataclasses.replace(ARGS, edit_scale=0.0)
    moved = np.abs(actions - qam_edit.sample_actions(plain, state, s, key))
    assert np.abs(actions).max() <= 1 and 0.5 < moved.max() <= ARGS.edit_scale
    again = qam_edit.sample_actions(ARGS, state, s, jax.random.PRNGKey(6))
    assert not np.allclose(actions, again)


def test_online_copies_act(float64):
    """Targets and critics do not enter the actions."""
    state, key = make_state(ARGS), jax.random.PRNGKey(5)
    other = make_state(ARGS, seed=1)
    params = state.params | dict(critic=other.params["critic"], behavior=other.params["behavior"])
    changed = state.replace(params=params, targets=other.targets)
    draw = partial(qam_edit.sample_actions, ARGS)
    close(draw(state, jnp.ones((5, S)), key), draw(changed, jnp.ones((5, S)), key), 0)
