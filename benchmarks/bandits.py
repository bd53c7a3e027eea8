"""One-state problems with a known answer: what do QAM and ME-AM converge to?

    taskset -c 0 python -m benchmarks.bandits

One constant state, one action in [-1, 1], a critic and a data density that are given. The scripts'
own `create` and `update` train everything else; only the script's `critic` is replaced. Closed
forms: QAM's pi_beta exp(tau Q), ME-AM's Eq. (16). Writes docs/images/bandits.png and
benchmarks/results/bandits.json; tests/test_meam_theory.py trains the same problems.

Shapes: N seeds, C late checkpoints, n samples, G points of the grid.
"""

import dataclasses
import importlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from common.data import Batch

GRID = np.linspace(-3, 3, 6001)  # of the closed forms, far beyond the box
STEP = GRID[1] - GRID[0]


@dataclasses.dataclass(frozen=True)
class Bandit:
    """Data: a mixture of Gaussians, all modes of one deviation, *not* cut at the box. A mode is
    resolved by T flow steps if std * T >= 4."""

    title: str
    value: Callable  # Q(a), elementwise
    weights: tuple[float, ...]
    means: tuple[float, ...]
    std: float
    inv_temp: float
    flow_steps: int
    threshold: float  # a better action is one above it

    def sample(self, key, batch_size):
        """Actions of the data, (B, 1)."""
        mode_key, noise_key = jax.random.split(key)
        logits = jnp.log(jnp.array(self.weights))
        mode = jax.random.categorical(mode_key, logits, shape=(batch_size, 1))
        return jnp.array(self.means)[mode] + self.std * jax.random.normal(noise_key, mode.shape)

    def data(self):
        """The data's density on the grid, (G,)."""
        z = (GRID[:, None] - np.array(self.means)) / self.std
        return (np.exp(-0.5 * z**2) @ self.weights) / (self.std * np.sqrt(2 * np.pi))

    def law(self, entropy_scale=0.0, path_weight=1.0, box=True):
        """Eq. (16) without expansion on the grid, (G,). Outside of the box neither critic nor score
        have a gradient: there the law continues with the prior's shape."""
        log_prior = np.log(self.data() + 1e-300)
        total = path_weight + entropy_scale
        inside = np.clip(GRID, -1, 1) if box else GRID
        log_law = path_weight * np.interp(inside, GRID, log_prior)
        log_law = (log_law + self.inv_temp * np.asarray(self.value(inside))) / total
        log_law += log_prior - np.interp(inside, GRID, log_prior)
        law = np.exp(log_law - log_law.max())
        return law / (law.sum() * STEP)

    def share(self, density):
        """Mass of a density on the grid above the threshold."""
        return float(density[GRID > self.threshold].sum() * STEP)


GAUSSIAN = Bandit(  # the specification's problem, .7 of its size: the box cuts almost nothing
    title="one mode",
    value=lambda a: -2 * (a / 0.7 - 0.5) ** 2,
    weights=(1.0,),
    means=(0.0,),
    std=0.35,
    inv_temp=1.0,
    flow_steps=12,
    threshold=0.35,
)
RARE = Bandit(
    title="rare but better action",
    value=lambda a: 1 / (1 + jnp.exp(-8 * a)),
    weights=(0.95, 0.05),
    means=(-0.5, 0.5),
    std=0.25,
    inv_temp=1.0,
    flow_steps=20,
    threshold=0.0,
)
OUTSIDE = Bandit(
    title="best action outside the data",
    value=lambda a: -2 * (a - 0.6) ** 2,
    weights=(1.0,),
    means=(-0.5,),
    std=0.2,
    inv_temp=2.0,
    flow_steps=20,
    threshold=0.3,
)


def settings(script, bandit, **flags):
    """Arguments of the script for this bandit: small networks, no critic to learn, slow averages,
    because the anchor and its score oscillate at rates above .005."""
    small = dict(hidden_dims=(64, 64), num_critics=1, batch_size=128, lr=1e-3, target_rate=0.003)
    shape = dict(chunk_length=1, action_size=1, flow_steps=bandit.flow_steps)
    off = dict(rho=0.0, entropy_scale=0.0) if hasattr(script.Args, "rho") else {}
    flags = small | shape | off | dict(inv_temp=bandit.inv_temp) | flags
    return dataclasses.replace(script.Args(), **flags)


def train(script, bandit, seeds=(0,), updates=4000, late=10, samples=4096, **flags):
    """Trains an agent per seed -> actions (C, N, n), not clipped, at `late` checkpoints in the last
    40 % of the updates. The learning rate falls to .3 and .1 of it in the last two fifths. Samples
    are the moving average's, where there is one, else the policy's."""
    args = settings(script, bandit, **flags)
    every = max(1, int(0.4 * updates) // late)
    early = updates - every * late

    def step(state, i):
        key, batch_key = jax.random.split(state.key)
        actions, ones = bandit.sample(batch_key, args.batch_size), jnp.ones(args.batch_size)
        s = jnp.zeros((args.batch_size, 1))
        batch = Batch(s, actions, 0 * ones, ones, s, ones)
        decay = jnp.where(i < 0.6 * updates, 1, jnp.where(i < 0.8 * updates, 0.3, 0.1))
        decayed = dataclasses.replace(args, lr=args.lr * decay)  # traced, never a static argument
        return script.update(decayed, state.replace(key=key), batch)[0], None

    def draw(state, key):
        flow = state.targets.get("policy", state.params["policy"])
        s, x = jnp.zeros((samples, 1)), jax.random.normal(key, (samples, 1))
        for i in range(args.flow_steps):
            t = i / args.flow_steps
            x = x + script.field(args, flow, s, x, t) / args.flow_steps
        return x[:, 0]

    def one(key):
        def checkpoint(state, c):
            state, _ = jax.lax.scan(step, state, early + c * every + jnp.arange(every))
            return state, draw(state, jax.random.fold_in(key, c))

        state, _ = jax.lax.scan(step, script.create(args, 1, key), jnp.arange(early))
        return jax.lax.scan(checkpoint, state, jnp.arange(late))

    def critic(args, params, observations, actions):
        return bandit.value(actions).T

    with mock.patch.object(script, "critic", critic):
        keys = jnp.stack([jax.random.PRNGKey(seed) for seed in seeds])
        _, actions = jax.jit(jax.vmap(one, out_axes=(0, 1)))(keys)
    return np.asarray(actions)
