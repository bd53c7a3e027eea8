"""Network bodies, of the offline methods (Glorot-uniform kernels, tanh approximation of GELU) and
of the online ones (LeCun-normal, Mish or ReLU); all biases start at 0. Several inputs are
concatenated, so that a call reads like Q(s, a) or f(s, x, t)."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

GLOROT, LECUN = nn.initializers.glorot_uniform(), nn.initializers.lecun_normal()
Dense = partial(nn.Dense, kernel_init=GLOROT)


class MLP(nn.Module):
    """Dense -> activation (-> LayerNorm, *after* the activation as in the official QAM code) for
    every hidden width, then a linear layer of `out` units."""

    hidden: Sequence[int]
    out: int
    layer_norm: bool = False
    activation: Callable = nn.gelu
    kernel_init: Callable = GLOROT
    last_init: Callable | None = None  # of the linear layer, where it is another

    @nn.compact
    def __call__(self, x):
        for width in self.hidden:
            x = self.activation(nn.Dense(width, kernel_init=self.kernel_init)(x))
            x = nn.LayerNorm()(x) if self.layer_norm else x
        return nn.Dense(self.out, kernel_init=self.last_init or self.kernel_init)(x)


class Critic(nn.Module):
    """K independent scalar networks: inputs (..., n_i) that broadcast -> values (K, ...)."""

    hidden: Sequence[int]
    members: int
    layer_norm: bool = True
    activation: Callable = nn.gelu
    kernel_init: Callable = GLOROT

    @nn.compact
    def __call__(self, *inputs):
        Members = nn.vmap(MLP, variable_axes={"params": 0}, split_rngs={"params": True},
                          in_axes=None, out_axes=0, axis_size=self.members)  # fmt: skip
        body = Members(self.hidden, 1, self.layer_norm, self.activation, self.kernel_init)
        lead = jnp.broadcast_shapes(*(x.shape[:-1] for x in inputs))
        inputs = [jnp.broadcast_to(x, (*lead, x.shape[-1])) for x in inputs]
        return body(jnp.concatenate(inputs, -1))[..., 0]


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


@jax.custom_jvp
def mish(x):
    """x tanh(softplus(x)) with one exponential, and derivatives by hand (as are those of its
    derivative, for divergences): a 3 x 256 network takes 10 to 40 % less time than with nn.mish."""
    e = jnp.exp(jnp.minimum(x, 20.0))  # from there on mish(x) = x in float32
    return x * (e * (e + 2) / (e * (e + 2) + 2))


@jax.custom_jvp
def mish_slope(x):
    """d mish / dx."""
    e = jnp.exp(jnp.minimum(x, 20.0))
    t = e * (e + 2) / (e * (e + 2) + 2)
    return t + x * (e / (1 + e)) * (1 - t * t)


@mish_slope.defjvp
def _mish_curve(x, dx):
    (x,), (dx,), e = x, dx, jnp.exp(jnp.minimum(x[0], 20.0))
    t, s = e * (e + 2) / (e * (e + 2) + 2), e / (1 + e)
    return mish_slope(x), s * (1 - t * t) * (2 + x * (1 - s) - 2 * x * t * s) * dx


mish.defjvp(lambda x, dx: (mish(*x), mish_slope(*x) * dx[0]))


class TimedMLP(nn.Module):
    """Noise or velocity f(s, x, t, ...) of the online methods: an MLP with Mish on s, x and, for
    every time, `sinusoids` waves of it (angular frequencies from 1 to 2e-4, so for steps that count
    to 100 or so), through a small MLP of widths `embed` where there is one. (B, S), (..., B, A),
    times that broadcast to (..., B) -> (..., B, A). The last layer's start is scaled by `scale`."""

    hidden: Sequence[int]
    sinusoids: int = 16
    embed: Sequence[int] = (32, 16)
    scale: float = 1.0
    kernel_init: Callable = LECUN

    @nn.compact
    def __call__(self, observations, x, *times):
        lead, half = x.shape[:-1], self.sinusoids // 2
        inputs = [jnp.broadcast_to(observations, (*lead, observations.shape[-1])), x]
        for t in times:
            angle = jnp.asarray(t)[..., None] * 10_000.0 ** (-jnp.arange(half) / half)
            waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)
            if self.embed:
                waves = MLP(self.embed[:-1], self.embed[-1], False, mish, self.kernel_init)(waves)
            inputs.append(jnp.broadcast_to(waves, (*lead, waves.shape[-1])))
        last = lambda *args: self.scale * self.kernel_init(*args)
        body = MLP(self.hidden, x.shape[-1], False, mish, self.kernel_init, last)
        return body(jnp.concatenate(inputs, -1))
