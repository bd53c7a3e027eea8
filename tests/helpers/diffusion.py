"""The diffusion that DPMD, QVPO and DIPO have in common, from the specification, in plain loops."""

import jax
import jax.numpy as jnp
import numpy as np

from baselines import dipo, dpmd, qvpo
from tests.helpers import online_reference as online
from tests.helpers.online_reference import timed

WAVES = {  # of the public programs: how the step enters
    dpmd: dict(count=16, factor=1 / 4),
    qvpo: dict(count=32, intervals=15),
    dipo: dict(count=32, factor=32**-0.5),
}


MILD = dict(schedule="linear", beta_scale=0.4, start_scale=0.5)  # few actions on the border


KEY = jax.random.PRNGKey(7)


def make_state(module, args):
    """Random weights whose predictions are small enough to keep most actions off the border."""
    state = online.make_state(module, args)
    calm = lambda trees: trees | dict(policy=jax.tree.map(lambda x: 0.4 * x, trees["policy"]))
    return state.replace(params=calm(state.params), targets=calm(state.targets))


def rates(args):
    """beta_i and abar_i, one step after the other."""
    T, beta, abar, product = args.diffusion_steps, [], [], 1.0
    f = [np.cos((i / T + 0.008) / 1.008 * np.pi / 2) ** 2 for i in range(T + 1)]
    for i in range(T):
        linear = args.beta_scale * (1e-4 + (0.999 - 1e-4) * i / max(1, T - 1))
        beta.append(linear if args.schedule == "linear" else min(1 - f[i + 1] / f[i], 0.999))
        product *= 1 - beta[-1]
        abar.append(product)
    return beta, abar


def chains(args, noise_of, s, key, count, noise=1.0):
    """Actions (N, B, d) by the chain of section 5, where noise_of(s, x, i) is the prediction."""
    beta, abar = rates(args)
    T, shape = args.diffusion_steps, (count, len(s), args.action_size)
    keys = jax.random.split(key, T + 1)
    x = args.start_scale * jax.random.normal(keys[T], shape)
    for i in reversed(range(T)):
        before = abar[i - 1] if i else 1.0
        clean = (x - np.sqrt(1 - abar[i]) * noise_of(s, x, i)) / np.sqrt(abar[i])
        mean = beta[i] * np.sqrt(before) * jnp.clip(clean, -1, 1)
        mean = (mean + (1 - before) * np.sqrt(1 - beta[i]) * x) / (1 - abar[i])
        x = mean
        if i:
            deviation = np.sqrt(beta[i] * (1 - before) / (1 - abar[i]))
            x = mean + noise * deviation * jax.random.normal(keys[i], shape)
    return jnp.clip(x, -1, 1)


def predictor(module, tree):
    return lambda s, x, i: timed(tree, s, x, i, **WAVES[module])


def expected_denoising(module, args, params, s, actions, weights, key):
    """Mean over rows and components of w (e(x_i, i, s) - eps)^2; the key: steps, then noise."""
    step_key, noise_key = jax.random.split(key)
    i = jax.random.randint(step_key, weights.shape, 0, args.diffusion_steps)
    noise = jax.random.normal(noise_key, actions.shape)
    abar = jnp.asarray(rates(args)[1])[i][..., None]
    x = jnp.sqrt(abar) * actions + jnp.sqrt(1 - abar) * noise
    error = timed(params, s, x, i, **WAVES[module]) - noise
    return (weights[..., None] * error**2).sum() / actions.size


def clipped(grads, limit):
    norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    return jax.tree.map(lambda g: g * jnp.where(norm > limit, limit / norm, 1.0), grads), norm
