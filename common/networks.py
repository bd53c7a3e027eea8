"""Network bodies of the offline methods (Glorot-uniform kernels, tanh approximation of GELU) and of
the online methods (LeCun-normal kernels, Mish or ReLU).

All biases start at 0. Several inputs are concatenated, so that a call reads like Q(s, a) or
f(s, x, t).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common.devices import hidden_dtype

GLOROT = nn.initializers.glorot_uniform()
LECUN = nn.initializers.lecun_normal()
Dense = partial(nn.Dense, kernel_init=GLOROT)
SPLIT_FROM = 32  # with at least so many repeated features, computing their part once is faster


class JoinedDense(nn.Module):
    """A dense layer on inputs (..., n_i) that broadcast, as if they were concatenated.

    Each input is multiplied by its own rows of the kernel and broadcast afterwards, so that of many
    actions at one state the state's part is computed once.
    """

    width: int
    kernel_init: Callable
    dtype: Any = None  # of the computation and the output (None: that of the inputs)

    @nn.compact
    def __call__(self, *inputs: Array) -> Array:
        sizes = [x.shape[-1] for x in inputs]
        kernel = self.param("kernel", self.kernel_init, (sum(sizes), self.width), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32)
        if self.dtype:
            *inputs, kernel, bias = (x.astype(self.dtype) for x in (*inputs, kernel, bias))
        lead = jnp.broadcast_shapes(*(x.shape[:-1] for x in inputs))
        repeated = sum(x.shape[-1] for x in inputs if x.shape[:-1] != lead)
        if repeated < SPLIT_FROM:
            inputs = [jnp.broadcast_to(x, (*lead, x.shape[-1])) for x in inputs]
            return jnp.concatenate(inputs, -1) @ kernel + bias
        parts = jnp.split(kernel, np.cumsum(sizes)[:-1])
        products = map(jnp.matmul, inputs, parts)
        return sum(products, bias)


class MLP(nn.Module):
    """Dense -> activation (-> LayerNorm, *after* the activation as in the official QAM code) for
    every hidden width, then a linear layer of `out` units. Several inputs (..., n_i) broadcast.

    With --precision bfloat16, hidden layers compute in and return bfloat16. Parameters, LayerNorm's
    statistics and the output are float32.
    """

    hidden: Sequence[int]
    out: int
    layer_norm: bool = False
    activation: Callable = nn.gelu
    kernel_init: Callable = GLOROT
    last_init: Callable | None = None  # of the last layer (None: kernel_init)

    @nn.compact
    def __call__(self, *inputs: Array) -> Array:
        dtype = hidden_dtype()
        for i, width in enumerate(self.hidden):
            x = JoinedDense(width, self.kernel_init, dtype, name=f"Dense_{i}")(*inputs)
            x = self.activation(x)
            if self.layer_norm:
                x = nn.LayerNorm(dtype=dtype)(x)
            inputs = (x,)
        if dtype:
            inputs = [x.astype(jnp.float32) for x in inputs]
        last_init = self.last_init or self.kernel_init
        return JoinedDense(self.out, last_init, name=f"Dense_{len(self.hidden)}")(*inputs)


class Critic(nn.Module):
    """K independent scalar networks: inputs (..., n_i) that broadcast -> values (K, ...)."""

    hidden: Sequence[int]
    members: int
    layer_norm: bool = True
    activation: Callable = nn.gelu
    kernel_init: Callable = GLOROT

    @nn.compact
    def __call__(self, *inputs: Array) -> Array:
        Members = nn.vmap(
            MLP,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=0,
            axis_size=self.members,
        )
        body = Members(self.hidden, 1, self.layer_norm, self.activation, self.kernel_init)
        return body(*inputs)[..., 0]


class Field(nn.Module):
    """Velocity field f(s, x, t), without LayerNorm: (B, S), (..., B, A), times -> (..., B, A).

    Observations and times broadcast to (..., B). Times are inputs as they are, not embedded.
    """

    hidden: Sequence[int]

    @nn.compact
    def __call__(self, observations: Array, x: Array, t: Array) -> Array:
        lead = x.shape[:-1]
        observations = jnp.broadcast_to(observations, (*lead, observations.shape[-1]))
        t = jnp.broadcast_to(t, lead)
        inputs = jnp.concatenate([observations, x, t[..., None]], -1)
        return MLP(self.hidden, x.shape[-1])(inputs)


class TanhGaussian(nn.Module):
    """Mean and log std, (B, out) each, of u in a policy tanh(u): inputs (B, n_i)."""

    hidden: Sequence[int]
    out: int

    @nn.compact
    def __call__(self, *inputs: Array) -> tuple[Array, Array]:
        body = MLP(self.hidden[:-1], self.hidden[-1])
        x = nn.gelu(body(jnp.concatenate(inputs, -1)))
        mean = Dense(self.out)(x)
        log_std = Dense(self.out)(x)
        return mean, jnp.clip(log_std, -20, 2)


def tanh_softplus(e: Array) -> Array:
    """Computes tanh(softplus(x)) from e = exp(x)."""
    return e * (e + 2) / (e * (e + 2) + 2)


@jax.custom_jvp
def mish(x: Array) -> Array:
    """Computes x tanh(softplus(x)) with one exponential.

    Its derivatives are written by hand, and those of its derivative as well, because divergences
    need them: a 3 x 256 network takes 10 to 40 % less time than with jax.nn.mish.
    """
    e = jnp.exp(jnp.minimum(x, 20.0))  # from there on mish(x) = x in float32
    return x * tanh_softplus(e)


@jax.custom_jvp
def mish_slope(x: Array) -> Array:
    """Computes d mish / dx."""
    e = jnp.exp(jnp.minimum(x, 20.0))
    t = tanh_softplus(e)
    return t + x * (e / (1 + e)) * (1 - t * t)


@mish_slope.defjvp
def _mish_slope_jvp(primals, tangents):
    (x,) = primals
    (dx,) = tangents
    e = jnp.exp(jnp.minimum(x, 20.0))
    t = tanh_softplus(e)
    sigmoid = e / (1 + e)
    factor = 2 + x * (1 - sigmoid) - 2 * x * t * sigmoid
    curvature = sigmoid * (1 - t * t) * factor  # d2 mish / dx2
    return mish_slope(x), curvature * dx


@mish.defjvp
def _mish_jvp(primals, tangents):
    (x,) = primals
    (dx,) = tangents
    return mish(x), mish_slope(x) * dx


def waves(t: Array, count: int, inclusive: bool = False) -> Array:
    """Computes sines of t, then cosines, `count` in all: (...) -> (..., count).

    Their angular frequencies are a geometric sequence from 1. It ends at 1e-4 if it is `inclusive`,
    and one term before it otherwise.
    """
    half = count // 2
    intervals = half - 1 if inclusive else half
    frequencies = 10_000.0 ** (-jnp.arange(half) / intervals)
    angle = jnp.asarray(t)[..., None] * frequencies
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)


class TimedMLP(nn.Module):
    """Noise or velocity f(s, x, t, ...) of the online methods, an MLP with Mish.

    (B, S), (..., B, A), times that broadcast to (..., B) -> (..., B, A). Each time is encoded by
    `sinusoids` waves, which suit times up to about 100, and then by a small MLP of widths `embed`
    (none if empty). The last layer's initial weights are scaled by `scale`.
    """

    hidden: Sequence[int]
    sinusoids: int = 16
    embed: Sequence[int] = (32, 16)
    scale: float = 1.0
    kernel_init: Callable = LECUN
    scale_waves: bool = False  # by 1 / sqrt(sinusoids)
    inclusive: bool = False  # see `waves`

    @nn.compact
    def __call__(self, observations: Array, x: Array, *times: Array) -> Array:
        inputs = [observations, x]
        for t in times:
            encoded = waves(t, self.sinusoids, self.inclusive)
            if self.scale_waves:
                encoded /= self.sinusoids**0.5
            if self.embed:
                embed = MLP(self.embed[:-1], self.embed[-1], False, mish, self.kernel_init)
                encoded = embed(encoded)
            inputs.append(encoded)

        def last_init(*arguments):
            return self.scale * self.kernel_init(*arguments)

        body = MLP(self.hidden, x.shape[-1], False, mish, self.kernel_init, last_init)
        return body(*inputs)
