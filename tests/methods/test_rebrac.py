"""ReBRAC, exactly: sizes, both losses and their gradients against the specification (float64), the
delayed targets, the noise, and what the normalised value and the penalty imply.

Shapes as in baselines/rebrac.py: B batch, S observation, A chunk of actions, K critics.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from baselines import rebrac
from tests.helpers import reference
from tests.helpers.reference import (
    S,
    check_loss,
    check_update,
    close,
    count_parameters,
    dense,
    gelu,
    gradient,
    make_batch,
    mlp,
    pessimistic,
    temporal_difference,
    values,
)

pytestmark = pytest.mark.usefixtures("quick_compile")
arguments = partial(reference.arguments, rebrac)
make_state = partial(reference.make_state, rebrac)
# a share of the noises is cut at 0.3, and the distance weighs about as much as the value
ARGS = arguments(rebrac_alpha=0.7, actor_noise=0.4, noise_clip=0.3, pessimism=0.8)


# --- the formulas again, straight from the specification -----------------------------------------


def policy(tree, s):
    """pi(s): all but the last layer with GELU, tanh at the end."""
    tree = tree["params"]
    return jnp.tanh(dense(tree["Dense_0"], gelu(mlp(tree["MLP_0"], s))))


def noisy(args, actions, key):
    xi = args.actor_noise * np.asarray(jax.random.normal(key, actions.shape))
    xi = np.minimum(np.maximum(xi, -args.noise_clip), args.noise_clip)
    return jnp.minimum(jnp.maximum(actions + xi, -1), 1)


def expected_critic(args, params, state, batch, key):
    s = batch.next_observations
    xi = args.actor_noise * jax.random.normal(key, batch.actions.shape)
    a = policy(state.targets["actor"], s) + jnp.minimum(jnp.maximum(xi, -0.3), 0.3)
    return temporal_difference(args, params, state, batch, jnp.minimum(jnp.maximum(a, -1), 1))


def expected_actor(args, params, state, batch, key):
    """Its divisor is the mean size of the value at the constant copy of the actor."""
    s, B = batch.observations, len(batch.actions)
    value = lambda tree: pessimistic(args, values(state.params["critic"], s, policy(tree, s)))
    size = sum(abs(q) for q in value(state.params["actor"])) / B
    squares = (policy(params["actor"], s) - batch.actions) ** 2
    distance = sum(v * sum(row) for v, row in zip(batch.valid, squares)) / B
    q, far = sum(value(params["actor"])) / B, abs(policy(params["actor"], s)) > 0.99
    metrics = dict(actor_q=q, bc=distance, saturated=far.mean())
    return -q / size + args.rebrac_alpha * distance, metrics


# --- sizes, losses, update -----------------------------------------------------------------------


def test_parameter_counts():
    """The published 8,927,762 on antmaze and 9,119,267 on cube-triple; both networks are averaged
    (18,238,534 with targets)."""
    assert count_parameters(rebrac, 29, 1, 8) == 8_927_762
    assert count_parameters(rebrac, 46, 5, 5) == 9_119_267
    state = jax.eval_shape(partial(rebrac.create, ARGS, S), jax.random.PRNGKey(0))
    assert jax.tree.map(jnp.shape, state.targets) == jax.tree.map(jnp.shape, state.params)


def test_first_actor():
    """The last kernel is uniform with a tenth of Glorot's deviation; hidden ones have all of it."""
    args = arguments(hidden_dims=(64, 200), action_size=50)
    state = jax.jit(partial(rebrac.create, args, S))(jax.random.PRNGKey(0))
    tree = state.params["actor"]["params"]
    for layer, scale in ((tree["Dense_0"], 0.01), (tree["MLP_0"]["Dense_1"], 1)):
        limit = np.sqrt(3 * scale / np.mean(layer["kernel"].shape))
        kernel = np.abs(layer["kernel"])
        assert 0.99 * limit < kernel.max() <= limit and not layer["bias"].any()
        np.testing.assert_allclose(kernel.mean(), limit / 2, rtol=0.03)


@pytest.mark.parametrize(
    "loss, expected, own",
    [
        (rebrac.critic_loss, expected_critic, {"critic"}),
        (rebrac.actor_loss, expected_actor, {"actor"}),
    ],
    ids=["critic", "actor"],
)
def test_losses_and_gradients(float64, loss, expected, own):
    check_loss(rebrac, ARGS, loss, expected, own)


def test_update(float64):
    """One Adam step on the sum of both losses, unclipped; with delay 1 the targets move, too."""
    args = dataclasses.replace(ARGS, target_delay=1)
    keys = jax.random.split(make_state(args).key, 3)[1:]
    check_update(rebrac, args, [expected_critic, expected_actor], keys, clipped=False)


def test_targets_wait_and_networks_do_not(float64, delay=3):
    """Critic and actor change at every update; the targets of both at every `delay`-th, and then
    towards the parameters from before that update."""
    args = dataclasses.replace(ARGS, target_delay=delay)
    state, update = make_state(args), jax.jit(partial(rebrac.update, args))
    differ = lambda x, y: any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (x, y))))
    for step in range(1, 7):
        new, _ = update(state, make_batch(args, step))
        for name in ("critic", "actor"):
            assert differ(new.params[name], state.params[name])
            assert differ(new.targets[name], state.targets[name]) == (step % delay == 0)
        if step % delay == 0:
            mean = lambda x, y: (1 - args.target_rate) * x + args.target_rate * y
            close(new.targets, jax.tree.map(mean, state.targets, state.params))
        state = new
    assert optax.tree_utils.tree_get(state.opt_state, "count") == 6


# --- what the losses imply -----------------------------------------------------------------------


def last_layers(tree, change):
    """A critic whose output layers are changed."""
    layers = tree["params"]["VmapMLP_0"]
    layers = layers | dict(Dense_2=jax.tree.map(change, layers["Dense_2"]))
    return dict(params=dict(VmapMLP_0=layers))


def test_scale_of_the_values_does_not_matter(float64):
    """1000 Q pulls the actor as hard as Q."""
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    critic = last_layers(state.params["critic"], lambda x: 1000 * x)
    scaled = state.replace(params=state.params | dict(critic=critic))
    one, two = (gradient(rebrac.actor_loss, ARGS, x, batch, key)[1] for x in (state, scaled))
    close(one["actor"], two["actor"])


def test_value_pulls_upwards(float64):
    """Without cloning, a small step against the gradient raises the pessimistic value."""
    args = dataclasses.replace(ARGS, rebrac_alpha=0.0)
    state, batch, key = make_state(args), make_batch(args), jax.random.PRNGKey(7)
    _, grads = gradient(rebrac.actor_loss, args, state, batch, key)

    def value(step):
        actor = jax.tree.map(lambda x, g: x - step * g, state.params["actor"], grads["actor"])
        s = batch.observations
        return pessimistic(args, values(state.params["critic"], s, policy(actor, s))).mean()

    assert value(1e-3) > value(0) + 1e-6


def test_penalty_pulls_to_the_mean_of_the_data(float64):
    """Data that go left and right equally often pull a policy in their middle nowhere: there the
    gradient is that of the value alone, however large alpha."""
    args = arguments(batch_size=4)
    state, batch = make_state(args), make_batch(args)
    tree = state.params["actor"]["params"]
    tree = tree | dict(Dense_0=jax.tree.map(jnp.zeros_like, tree["Dense_0"]))  # pi(s) = 0
    state = state.replace(params=state.params | dict(actor=dict(params=tree)))
    same = lambda x: jnp.broadcast_to(x[:1], x.shape)
    both_ways = jnp.array([1.0, -1, 1, -1])[:, None] * same(batch.actions)
    batch = batch._replace(
        observations=same(batch.observations), actions=both_ways, valid=jnp.ones(4)
    )

    def pull(alpha, batch):
        args_ = dataclasses.replace(args, rebrac_alpha=alpha)
        return gradient(rebrac.actor_loss, args_, state, batch, state.key)[1]["actor"]

    close(pull(0.0, batch), pull(1e6, batch))
    one_way = batch._replace(actions=jnp.abs(batch.actions))
    bias = lambda tree: tree["params"]["Dense_0"]["bias"]
    assert (bias(pull(1e6, one_way)) < -1e3).all()  # descent raises pi(s)


def test_valid_masks_critic_and_distance_only(float64):
    """A chunk that ends too early is left out of the critic's loss and of the cloning, and its
    state counts in the value."""
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    none = batch._replace(valid=0 * batch.valid)
    value = dataclasses.replace(ARGS, rebrac_alpha=0.0)
    actor = lambda args, batch: gradient(rebrac.actor_loss, args, state, batch, key)
    close(actor(ARGS, none), actor(value, none))
    close(actor(value, none), actor(value, batch))
    assert gradient(rebrac.critic_loss, ARGS, state, none, key)[0] == 0


def test_a_single_critic_has_a_gradient(float64):
    """The deviation over one critic is 0, where a root has no derivative."""
    args = dataclasses.replace(ARGS, num_critics=1)
    new, metrics = jax.jit(partial(rebrac.update, args))(make_state(args), make_batch(args))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((new.params, metrics)))


def test_critics_that_agree_have_a_gradient(float64):
    """Two equal critics: their deviation is 0, where a root has no derivative, and so is its part
    of the gradient, which is that of a single one."""
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    equal = jax.tree.map(lambda x: 0 * x + x[:1], state.params["critic"])
    state = state.replace(params=state.params | dict(critic=equal))
    loss, grads = gradient(rebrac.actor_loss, ARGS, state, batch, key)
    none = dataclasses.replace(ARGS, pessimism=0.0)
    close((loss, grads), gradient(rebrac.actor_loss, none, state, batch, key))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))


# --- acting --------------------------------------------------------------------------------------


def test_acting(float64):
    """clip(pi(s) + clipped noise) of the online actor; no other network matters."""
    args = dataclasses.replace(ARGS, batch_size=200)
    state, s, key = make_state(args), make_batch(args).observations, jax.random.PRNGKey(5)
    act = jax.jit(partial(rebrac.sample_actions, args))
    actions = act(state, s, key)
    mean = policy(state.params["actor"], s)
    close(actions, noisy(args, mean, key))
    moved = np.abs(actions - mean)
    assert moved.max() <= 0.3 + 1e-12 and (moved > 0.299).mean() > 0.2
    assert np.abs(actions).max() == 1 and (np.abs(mean) < 1).all()
    double = partial(jax.tree.map, lambda x: 2 * x)
    other = dict(actor=state.params["actor"], critic=double(state.params["critic"]))
    close(act(state.replace(params=other, targets=double(state.targets)), s, key), actions, 0)
    quiet = dataclasses.replace(args, actor_noise=0.0)
    close(rebrac.sample_actions(quiet, state, s, key), mean)


def test_target_action_is_of_the_target_actor(float64):
    """The critic's loss does not see the online actor."""
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    loss = jax.jit(lambda state: rebrac.critic_loss(ARGS, state.params, state, batch, key)[0])
    double = jax.tree.map(lambda x: 2 * x, state.params["actor"])
    assert loss(state.replace(params=state.params | dict(actor=double))) == loss(state)
    assert loss(state.replace(targets=state.targets | dict(actor=double))) != loss(state)
