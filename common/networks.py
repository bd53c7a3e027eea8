"""Network bodies: Glorot-uniform kernels, zero biases, tanh approximation of GELU. Several inputs
are concatenated, so that a call reads like Q(s, a) or f(s, x, t)."""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp

Dense = partial(nn.Dense, kernel_init=nn.initializers.glorot_uniform())


class MLP(nn.Module):
    """Dense -> GELU (-> LayerNorm, *after* the activation as in the official QAM code) for every
    hidden width, then a linear layer of `out` units."""

    hidden: Sequence[int]
    out: int
    layer_norm: bool = False

    @nn.compact
    def __call__(self, x):
        for width in self.hidden:
            x = nn.gelu(Dense(width)(x))
            x = nn.LayerNorm()(x) if self.layer_norm else x
        return Dense(self.out)(x)


class Critic(nn.Module):
    """K independent scalar networks with LayerNorm: inputs (B, n_i) -> values (K, B)."""

    hidden: Sequence[int]
    members: int

    @nn.compact
    def __call__(self, *inputs):
        Members = nn.vmap(MLP, variable_axes={"params": 0}, split_rngs={"params": True},
                          in_axes=None, out_axes=0, axis_size=self.members)  # fmt: skip
        return Members(self.hidden, 1, layer_norm=True)(jnp.concatenate(inputs, -1))[..., 0]


class Field(nn.Module):
    """Velocity field f(s, x, t) without LayerNorm, linear output: (B, S), (..., B, A), and a raw
    scalar time per sample that broadcasts to (..., B), as the observations do -> (..., B, A)."""

    hidden: Sequence[int]

    @nn.compact
    def __call__(self, observations, x, t):
        lead = x.shape[:-1]
        observations = jnp.broadcast_to(observations, (*lead, observations.shape[-1]))
        inputs = observations, x, jnp.broadcast_to(t, lead)[..., None]
        return MLP(self.hidden, x.shape[-1])(jnp.concatenate(inputs, -1))


class TanhGaussian(nn.Module):
    """Mean and log-deviation, (B, out) each, of u in a policy tanh(u): inputs (B, n_i)."""

    hidden: Sequence[int]
    out: int

    @nn.compact
    def __call__(self, *inputs):
        x = nn.gelu(MLP(self.hidden[:-1], self.hidden[-1])(jnp.concatenate(inputs, -1)))
        return Dense(self.out)(x), jnp.clip(Dense(self.out)(x), -20, 2)
