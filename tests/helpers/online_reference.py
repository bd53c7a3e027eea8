"""What tests/helpers/reference.py is for the offline scripts, for the online ones: small random
agents and batches, the networks' formulas a second time, one step of Adam and of a moving average,
and the comparison of a script's loss and gradient with an independent formula. Exact in float64:
use the `float64` fixture.

Shapes as in the scripts: B batch, S observation, d action, N candidates per state.
"""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from common.flags import configure
from common.sampling import Replay
from tests.helpers.reference import mlp

S = 3  # unlike the plane's 2, which is d there, too
SMALL = dict(
    action_size=2, hidden_dims=(8, 8), batch_size=6, num_candidates=3, act_candidates=0,
    flow_steps=3, diffusion_steps=3,
)  # fmt: skip


def make_args(module, **flags):
    """Flags of a small agent on the plane, as far as the script has them; `flags` win."""
    small = {name: x for name, x in SMALL.items() if name in module.Args.__dataclass_fields__}
    return configure(module.Args, module.ENV_DEFAULTS, "multigoal", **small | flags)


def make_batch(args, seed=0, observation_size=S):
    """B random transitions as `update` gets them; about every third ends by success, and of the
    others every fourth by the clock (its mask is 1)."""
    rng, B = np.random.default_rng(seed), args.batch_size
    masks = np.float64(np.arange(B) % 3 != 1)
    arrays = dict(
        observations=rng.normal(size=(B, observation_size)),
        next_observations=rng.normal(size=(B, observation_size)),
        actions=rng.uniform(-1, 1, (B, args.action_size)),
        rewards=3 * rng.normal(size=B),
        masks=masks,
        terminals=np.maximum(1 - masks, np.arange(B) % 4 == 0),
    )
    return Replay(**{k: jnp.asarray(x) for k, x in arrays.items()}, size=jnp.int32(B))


def make_state(module, args, seed=0, observation_size=S):
    """A new agent with random weights everywhere (biases and last layers, too), targets unlike the
    online copies; each of two critics is the lower one on half of all inputs. In float64, where
    that is on, but for counters and keys."""
    return _make_state(module, args, seed, observation_size, jax.config.jax_enable_x64)


@cache
def _make_state(module, args, seed, observation_size, precision):
    state = jax.jit(partial(module.create, args, observation_size))(jax.random.PRNGKey(seed))
    rng = np.random.default_rng(seed)
    shake = lambda x: jnp.asarray(np.float64(x) + 0.3 * rng.normal(size=x.shape))
    params, targets = (jax.tree.map(shake, tree) for tree in (state.params, state.targets))
    rng = np.random.default_rng(seed)
    s, a = rng.normal(size=(199, observation_size)), rng.uniform(-1, 1, (199, args.action_size))
    for trees in (params, targets):
        q = module.critic(args, trees["critic"], s, a)
        last = trees["critic"]["params"]["VmapMLP_0"][f"Dense_{len(args.hidden_dims)}"]
        last["bias"] = last["bias"].at[1].add(jnp.median(q[0] - q[1]))
    widen = lambda x: jnp.asarray(np.float64(x)) if x.dtype == jnp.float32 else x
    return jax.tree.map(widen, state).replace(params=params, targets=targets)


def count_parameters(module, observation_size, action_size, **flags):
    """Trainable parameters of an agent with the sizes of the class (the paper's), or `flags`."""
    args = dataclasses.replace(module.Args(), action_size=action_size, **flags)
    create = partial(module.create, args, observation_size)
    return sum(
        x.size for x in jax.tree.leaves(jax.eval_shape(create, jax.random.PRNGKey(0)).params)
    )


# --- networks ------------------------------------------------------------------------------------


def mish(x):
    return x * jnp.tanh(jnp.logaddexp(x, 0.0))


def relu(x):
    return jnp.maximum(x, 0.0)


def join(*inputs):
    """Concatenates inputs (..., n_i) whose leading axes broadcast."""
    lead = np.broadcast_shapes(*(x.shape[:-1] for x in inputs))
    return jnp.concatenate([jnp.broadcast_to(x, (*lead, x.shape[-1])) for x in inputs], -1)


def plain(tree, *inputs, activation=mish):
    """An `MLP` on concatenated inputs; `tree` as `init` returns it, or without its "params"."""
    return mlp(tree.get("params", tree), join(*inputs), activation=activation)


def values(tree, *inputs, activation=mish, layer_norm=False):
    """A `Critic`, (K, ...), one member after the other."""
    members = tree["params"]["VmapMLP_0"]
    pick = lambda k: jax.tree.map(lambda x: x[k], members)
    K = len(members["Dense_0"]["bias"])
    member = lambda k: mlp(pick(k), join(*inputs), layer_norm, activation)[..., 0]
    return jnp.stack([member(k) for k in range(K)])


def waves(t, count, intervals=None):
    """sin(t w_j), then cos(t w_j), with w_j = 10000^(-j / intervals): (...) -> (..., count)."""
    half = count // 2
    angles = [t * 10_000.0 ** (-j / (intervals or half)) for j in range(half)]
    return jnp.stack([*map(jnp.sin, angles), *map(jnp.cos, angles)], -1)


def timed(tree, s, x, *times, count=16, factor=1.0, intervals=None):
    """A `TimedMLP` with `count` sinusoids per time, times a factor. Every time has an embedding of
    its own."""
    tree, inputs = tree["params"], [s, x]
    for k, t in enumerate(times):
        embedded = factor * waves(jnp.broadcast_to(t, x.shape[:-1]), count, intervals)
        if len(tree) > 1:
            embedded = mlp(tree[f"MLP_{k}"], embedded, activation=mish)
        inputs.append(embedded)
    return mlp(tree[f"MLP_{len(tree) - 1}"], join(*inputs), activation=mish)


# --- steps ---------------------------------------------------------------------------------------


def adam(params, grads, rate, eps=1e-8):
    """Parameters after the *first* step of Adam: moments 0.1 g, 0.001 g^2, bias-corrected."""
    return jax.tree.map(lambda x, g: x - rate * g / (jnp.abs(g) + eps), params, grads)


def adam_steps(x, gradient, rates, b1=0.9, b2=0.999, eps=1e-8):
    """Adam from the array x for gradients `gradient(x)`, one step per rate of `rates`."""
    m = v = 0 * x
    for i, rate in enumerate(rates, 1):
        g = gradient(x)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        x = x - rate * (m / (1 - b1**i)) / (jnp.sqrt(v / (1 - b2**i)) + eps)
    return x


def polyak(old, new, rate):
    """A moving average after its step towards `new`."""
    return jax.tree.map(lambda x, y: (1 - rate) * x + rate * y, old, new)


# --- comparison ----------------------------------------------------------------------------------


def close(found, expected, tolerance=1e-9):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, tolerance, tolerance),
                 found, expected)  # fmt: skip


def gradient(loss, params, *inputs):
    """Value and gradient of `loss(params, *inputs)`, which may return metrics, too."""

    def value(params, *inputs):
        result = loss(params, *inputs)
        return result[0] if isinstance(result, tuple) else result

    return jax.jit(jax.value_and_grad(value))(params, *inputs)


def moves(tree):
    """Whether a gradient is other than exactly 0 anywhere."""
    return any(np.any(np.asarray(x)) for x in jax.tree.leaves(tree))


def check_loss(loss, expected, params, *inputs, tolerance=1e-9):
    """A loss and its gradient with respect to its first argument are those of `expected`, called
    with the same arguments; every layer of `params` gets some gradient. Returns both."""
    found = gradient(loss, params, *inputs)
    close(found, gradient(expected, params, *inputs), tolerance)
    still = [path for path, g in jax.tree_util.tree_leaves_with_path(found[1]) if not moves(g)]
    assert not still, f"no gradient: {still}"
    return found
