"""FEdit, exactly: sizes, every loss and gradient by the specification's formulas
(tests/helpers/reference.py), the edit's density and reach, the temperature, and which copies
act."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from baselines import fedit
from tests.helpers import reference
from tests.helpers.reference import (
    S,
    check_loss,
    check_update,
    close,
    count_parameters,
    flow_matching,
    gaussian,
    log_density,
    make_batch,
    ode,
    temporal_difference,
    values,
)

pytestmark = pytest.mark.usefixtures("quick_compile")
arguments = partial(reference.arguments, fedit)
make_state = partial(reference.make_state, fedit)
ARGS = arguments(edit_scale=0.6, pessimism=0.7)


def edited(args, tree, s, flow_actions, key):
    """Action and log-density of an edit, from the specification."""
    mean, log_std = gaussian(tree, s, flow_actions)
    u = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
    actions = jnp.clip(flow_actions + args.edit_scale * jnp.tanh(u), -1, 1)
    return actions, log_density(u, mean, log_std)


def acting(args, state, s, key):
    z = jax.random.normal(key, (len(s), args.chunk_length * args.action_size))
    flow_actions = ode(args, state.params["behavior"], s, z)
    return edited(args, state.params["edit"], s, flow_actions, jax.random.fold_in(key, 1))[0]


def expected_critic(args, params, state, batch, key):
    actions = acting(args, state, batch.next_observations, key)
    return temporal_difference(args, params, state, batch, actions)


def expected_behavior(args, params, state, batch, key):
    return flow_matching(params["behavior"], batch, batch.actions, key)


def expected_edit(args, params, state, batch, key):
    z_key, edit_key = jax.random.split(key)
    s, z = batch.observations, jax.random.normal(z_key, batch.actions.shape)
    flow_actions = ode(args, state.params["behavior"], s, z)
    actions, log_prob = edited(args, params["edit"], s, flow_actions, edit_key)
    q = values(state.params["critic"], s, actions)
    actor = jnp.exp(state.params["log_alpha"]) * log_prob.mean() - q.mean()
    entropy, alpha = -jax.lax.stop_gradient(log_prob).mean(), jnp.exp(params["log_alpha"])
    size = abs(actions - flow_actions).sum() / z.size
    metrics = dict(edit_entropy=entropy, edit_alpha=alpha, edit_size=size)
    return actor + alpha * (entropy + z.shape[-1] / 2), metrics


LOSSES = {
    "critic": (fedit.critic_loss, expected_critic, {"critic"}),
    "behavior": (fedit.behavior_loss, expected_behavior, {"behavior"}),
    "edit": (fedit.edit_loss, expected_edit, {"edit", "log_alpha"}),
}


@pytest.mark.parametrize("sizes, count", [((29, 1, 8), 9_748_003), ((46, 5, 5), 9_983_062)])
def test_parameter_counts(sizes, count):
    assert count_parameters(fedit, *sizes) == count


def test_targets():
    """Only the critic has a moving average: 18,277,472 parameters with it on cube-triple."""
    args = dataclasses.replace(fedit.Args(), action_size=5)
    state = jax.eval_shape(partial(fedit.create, args, 46), jax.random.PRNGKey(0))
    assert set(state.targets) == {"critic"}
    assert sum(x.size for x in jax.tree.leaves((state.params, state.targets))) == 18_277_472


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients(float64, name):
    check_loss(fedit, ARGS, *LOSSES[name])


def test_edits_go_outside_of_the_box(float64):
    """In the comparison above the clip after the edit matters, and that of the flow's action."""
    state, batch = make_state(ARGS), make_batch(ARGS)
    z_key, edit_key = jax.random.split(jax.random.PRNGKey(7))
    z = jax.random.normal(z_key, batch.actions.shape)
    flow_actions = ode(ARGS, state.params["behavior"], batch.observations, z)
    actions, _ = edited(ARGS, state.params["edit"], batch.observations, flow_actions, edit_key)
    for x in (flow_actions, actions):
        assert 0 < (jnp.abs(x) == 1).mean() < 1


def test_update(float64):
    """One Adam step on the sum of the three losses, without clipping."""
    keys = jax.random.split(make_state(ARGS).key, 4)[1:]
    losses = [expected for _, expected, _ in LOSSES.values()]
    check_update(fedit, ARGS, losses, keys, clipped=False)


@pytest.mark.parametrize("name", LOSSES)
def test_valid_masks_critic_and_flow_only(float64, name):
    """A chunk that ends too early counts in the edit's loss, and in nothing else."""
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    loss = jax.jit(lambda batch: LOSSES[name][0](ARGS, state.params, state, batch, key)[0])
    none, every = (loss(batch._replace(valid=0 * batch.valid + x)) for x in (0, 1))
    assert none == every if name == "edit" else none == 0 < every


def test_density_is_that_of_the_unscaled_edit(float64):
    """log pi(e) = log N(u) - log(1 - e^2), by scipy, whatever the scale."""
    state, s = make_state(ARGS), make_batch(ARGS).observations
    for scale in (0.1, 0.9):
        args = dataclasses.replace(ARGS, edit_scale=scale)
        zero, key = jnp.zeros((len(s), 4)), jax.random.PRNGKey(0)
        actions, log_prob = fedit.edit(args, state.params["edit"], s, zero, key)
        e = np.asarray(actions) / scale  # the flow's action is 0: nothing is clipped
        mean, log_std = (np.asarray(x) for x in gaussian(state.params["edit"], s, zero))
        density = scipy.stats.norm.pdf(np.arctanh(e), mean, np.exp(log_std)) / (1 - e**2)
        np.testing.assert_allclose(log_prob, np.log(density).sum(-1), rtol=1e-6)


def test_temperature_seeks_half_an_entropy_per_dimension(float64):
    """d L / d log alpha = alpha (H + A / 2): alpha falls while the entropy is above -A / 2."""
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    loss = lambda log_alpha: fedit.edit_loss(
        ARGS, state.params | dict(log_alpha=log_alpha), state, batch, key
    )
    grad, metrics = jax.jit(jax.grad(loss, has_aux=True))(jnp.log(0.7))
    close(grad, 0.7 * (metrics["edit_entropy"] + 4 / 2))


def test_actions(float64):
    """The flow's action and a fresh edit of at most sigma_a per coordinate, within the box;
    sigma_a = 0 is behaviour cloning."""
    state, s, key = make_state(ARGS), jnp.ones((2000, S)), jax.random.PRNGKey(5)
    actions = fedit.sample_actions(ARGS, state, s, key)
    np.testing.assert_allclose(actions, acting(ARGS, state, s, key), rtol=1e-9, atol=1e-9)
    plain = fedit.sample_actions(dataclasses.replace(ARGS, edit_scale=0.0), state, s, key)
    flow_actions = ode(ARGS, state.params["behavior"], s, jax.random.normal(key, (2000, 4)))
    np.testing.assert_allclose(plain, flow_actions, rtol=1e-9, atol=1e-9)
    moved = np.abs(actions - plain)
    assert np.abs(actions).max() <= 1 and 0.5 < moved.max() <= ARGS.edit_scale + 1e-12


def test_online_copies_act(float64):
    """Targets and critics do not enter the actions; flow and edit policy do."""
    state, key, s = make_state(ARGS), jax.random.PRNGKey(5), jnp.ones((5, S))
    other, draw = make_state(ARGS, seed=1), partial(fedit.sample_actions, ARGS)
    own = {name: state.params[name] for name in ("behavior", "edit")}
    close(draw(state, s, key), draw(other.replace(params=other.params | own), s, key), 0)
    for name in own:
        changed = state.replace(params=state.params | {name: other.params[name]})
        assert np.abs(draw(state, s, key) - draw(changed, s, key)).max() > 0.1
