"""DSRL, exactly: sizes, every loss and gradient against formulas that are written down a second
time (tests/helpers/reference.py, float64), the latent actor's box and density, and which copies
act.

Shapes as in baselines/dsrl.py: B batch, S observation, A chunk of actions, T flow steps, K critics.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from baselines import dsrl
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
arguments = partial(reference.arguments, dsrl)
make_state = partial(reference.make_state, dsrl)
ARGS = arguments(noise_scale=1.4, pessimism=0.7, discount=0.9)


# --- the formulas again, straight from the specification -----------------------------------------


def drawn(state, s, key, params=None):
    """e = tanh u of the latent actor and its log-density."""
    mean, log_std = gaussian((params or state.params)["latent"], s)
    u = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
    return jnp.tanh(u), log_density(u, mean, log_std)


def acting(args, state, s, key):
    e, _ = drawn(state, s, key)
    return ode(args, state.targets["behavior"], s, args.noise_scale * e)


def expected_critic(args, params, state, batch, key):
    actions = acting(args, state, batch.next_observations, key)
    return temporal_difference(args, params, state, batch, actions)


def expected_behavior(args, params, state, batch, key):
    return flow_matching(params["behavior"], batch, batch.actions, key)


def expected_distillation(args, params, state, batch, key):
    s, z = batch.observations, jax.random.normal(key, batch.actions.shape)
    labels = values(state.params["critic"], s, ode(args, state.targets["behavior"], s, z))
    guesses = values(params["latent_critic"], s, z)
    return sum(((x - y) ** 2).sum() for x, y in zip(guesses, labels)) / labels.size


def expected_latent(args, params, state, batch, key):
    e, log_prob = drawn(state, batch.observations, key, params)
    q = values(state.params["latent_critic"], batch.observations, args.noise_scale * e)
    actor = jnp.exp(state.params["log_alpha"]) * log_prob.mean() - q.mean()
    entropy, alpha = -jax.lax.stop_gradient(log_prob).mean(), jnp.exp(params["log_alpha"])
    metrics = dict(latent_entropy=entropy, latent_alpha=alpha, latent_q=q.mean())
    metrics |= dict(latent_size=args.noise_scale * abs(e).sum() / e.size)
    return actor + alpha * (entropy + e.shape[-1] / 2), metrics


LOSSES = {  # name -> (of the script, from the specification, the only networks it may move)
    "critic": (dsrl.critic_loss, expected_critic, {"critic"}),
    "behavior": (dsrl.behavior_loss, expected_behavior, {"behavior"}),
    "distillation": (dsrl.distillation_loss, expected_distillation, {"latent_critic"}),
    "latent": (dsrl.latent_loss, expected_latent, {"latent", "log_alpha"}),
}


@pytest.mark.parametrize("sizes, count", [((29, 1, 8), 17_864_237), ((46, 5, 5), 18_264_672)])
def test_parameter_counts(sizes, count):
    assert count_parameters(dsrl, *sizes) == count


def test_only_critic_and_flow_have_targets():
    state = jax.eval_shape(partial(dsrl.create, ARGS, S), jax.random.PRNGKey(0))
    assert set(state.targets) == {"critic", "behavior"}
    assert set(state.params) == {"critic", "behavior", "latent_critic", "latent", "log_alpha"}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients(float64, name):
    """Every loss and its gradient with respect to all networks equal the specification's, in
    float64 to 1e-9; the networks that are not the loss's own get exactly nothing."""
    check_loss(dsrl, ARGS, *LOSSES[name])


def test_update(float64):
    """One Adam step on the sum of all losses; no gradient is clipped."""
    keys = jax.random.split(make_state(ARGS).key, 5)[1:]
    check_update(dsrl, ARGS, [loss for _, loss, _ in LOSSES.values()], keys, clipped=False)


@pytest.mark.parametrize("name", LOSSES)
def test_valid_masks_critic_and_flow_only(float64, name):
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    loss = jax.jit(lambda batch: LOSSES[name][0](ARGS, state.params, state, batch, key)[0])
    none, every = (loss(batch._replace(valid=0 * batch.valid + x)) for x in (0, 1))
    assert (none == 0 and every > 0) if name in ("critic", "behavior") else none == every


# --- the latent actor ----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", (0.0, 0.4, 1.4))
def test_latents_stay_in_their_box(float64, scale):
    """Also for an actor with huge outputs, that box is [-sigma_z, sigma_z]^A, and is reached."""
    args, state = dataclasses.replace(ARGS, noise_scale=scale), make_state(ARGS)
    wild = jax.tree.map(lambda x: 20 * x, state.params["latent"])
    z, log_prob = dsrl.latent(args, wild, 5 * jnp.ones((500, S)), jax.random.PRNGKey(0))
    assert np.isfinite(log_prob).all()
    np.testing.assert_allclose(np.abs(z).max(), scale, rtol=1e-6)


def test_density_is_that_of_the_unscaled_latent(float64):
    """log pi(e) = log N(u) - log(1 - e^2), by scipy, whatever the scale."""
    state, s = make_state(ARGS), make_batch(ARGS).observations
    mean, log_std = (np.asarray(x) for x in gaussian(state.params["latent"], s))
    for scale in (0.1, 1.4):
        args = dataclasses.replace(ARGS, noise_scale=scale)
        z, log_prob = dsrl.latent(args, state.params["latent"], s, jax.random.PRNGKey(0))
        e = np.asarray(z) / scale
        density = scipy.stats.norm.pdf(np.arctanh(e), mean, np.exp(log_std)) / (1 - e**2)
        np.testing.assert_allclose(log_prob, np.log(density).sum(-1), rtol=1e-6)


def test_temperature_seeks_half_an_entropy_per_dimension(float64):
    """d L / d log alpha = alpha (H + A / 2): alpha falls while the entropy is above -A / 2."""
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    loss = lambda log_alpha: dsrl.latent_loss(
        ARGS, state.params | dict(log_alpha=log_alpha), state, batch, key
    )
    grad, metrics = jax.jit(jax.grad(loss, has_aux=True))(jnp.log(0.7))
    close(grad, 0.7 * (metrics["latent_entropy"] + ARGS.chunk_length * ARGS.action_size / 2))


def test_actor_climbs_the_latent_critic():
    """Without entropy, on a latent critic that wants z near (0.5, ..., 0.5), gradient steps lead
    the actor there: sign and scale of the actor's loss."""
    args = arguments(noise_scale=0.8, batch_size=64)
    state, batch = make_state(args), jax.tree.map(jnp.float32, make_batch(args))
    params = jax.tree.map(jnp.float32, state.params) | dict(log_alpha=jnp.float32(-20))
    state = state.replace(params=params)
    with pytest.MonkeyPatch.context() as patch:
        wish = lambda args, params, s, z: -((z - 0.5) ** 2).sum(-1)[None]
        patch.setattr(dsrl, "critic", wish)

        @jax.jit
        def step(params, key):
            grads = jax.grad(lambda p: dsrl.latent_loss(args, p, state, batch, key)[0])(params)
            return jax.tree.map(lambda x, g: x - 0.03 * g, params, grads)

        for seed in range(300):
            params = step(params, jax.random.PRNGKey(seed))
    z, _ = dsrl.latent(args, params["latent"], batch.observations, jax.random.PRNGKey(1))
    assert abs(z.mean() - 0.5) < 0.05 and np.abs(z - 0.5).mean() < 0.15


# --- acting --------------------------------------------------------------------------------------


def test_actions(float64):
    """The decoded latent, within the box of actions; another one in every row."""
    state, s, key = make_state(ARGS), jnp.ones((200, S)), jax.random.PRNGKey(5)
    actions = dsrl.sample_actions(ARGS, state, s, key)
    np.testing.assert_allclose(actions, acting(ARGS, state, s, key), rtol=1e-9, atol=1e-9)
    assert np.abs(actions).max() <= 1 and np.abs(actions).min() < 1
    assert len(np.unique(np.asarray(actions), axis=0)) > 100  # corners of the box are shared


def test_target_flow_and_online_actor_act(float64):
    """Neither the online flow nor any critic enters the actions; the target flow does."""
    state, other, s = make_state(ARGS), make_state(ARGS, seed=1), jnp.ones((5, S))
    draw = lambda state: dsrl.sample_actions(ARGS, state, s, jax.random.PRNGKey(5))
    params = other.params | dict(latent=state.params["latent"])
    targets = state.targets | dict(critic=other.targets["critic"])
    close(draw(state), draw(state.replace(params=params, targets=targets)), 0)
    targets = state.targets | dict(behavior=other.targets["behavior"])
    assert not np.allclose(draw(state), draw(state.replace(targets=targets)))
    params = state.params | dict(latent=other.params["latent"])
    assert not np.allclose(draw(state), draw(state.replace(params=params)))
