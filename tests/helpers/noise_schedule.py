"""The noise that DAC and QSM have in common, from the specification, and their prediction of it."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.helpers.reference import dense


def levels(args):
    """alpha_i and abar_i by step i, in loops; alpha_0 = abar_0 = 1."""
    T, alpha, abar = args.flow_steps, {0: 1.0}, {0: 1.0}
    for i in range(1, T + 1):
        alpha[i] = np.exp(-0.1 / T - 9.9 * (2 * i - 1) / (2 * T * T))
        abar[i] = abar[i - 1] * alpha[i]
    return alpha, abar


def noisy(args, batch, key):
    """Steps, noise, sqrt(1 - abar) and noisy actions of a batch."""
    step_key, noise_key = jax.random.split(key)
    i = jax.random.randint(step_key, batch.valid.shape, 1, args.flow_steps + 1)
    noise = jax.random.normal(noise_key, batch.actions.shape)
    abar = jnp.array([*levels(args)[1].values()])[i][:, None]
    return i, noise, jnp.sqrt(1 - abar), jnp.sqrt(abar) * batch.actions + jnp.sqrt(1 - abar) * noise


def predicted_noise(args, tree, s, x, i):
    """e_theta for steps i, (B,): layers 0..n-1 encode the step, n..2n are the main network."""
    tree, n = tree["params"], len(args.hidden_dims)
    angles = 2 * np.pi * i[:, None] * tree["frequencies"]
    code = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
    for layer in range(n - 1):
        code = mish(dense(tree[f"Dense_{layer}"], code))
    x = jnp.concatenate([x, s, dense(tree[f"Dense_{n - 1}"], code)], -1)
    for layer in range(n, 2 * n):
        x = mish(dense(tree[f"Dense_{layer}"], x))
    return dense(tree[f"Dense_{2 * n}"], x)


def mish(y):
    return y * jnp.tanh(jnp.log1p(jnp.exp(y)))
