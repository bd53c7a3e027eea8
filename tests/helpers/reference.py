"""The specification written a second time, for the exact tests of every script: small random agents
and batches, the networks' formulas on parameter trees, losses that several methods share, and the
comparison of a script's loss, gradient and update with them.

Shapes as in the scripts: B batch, S observation, A chunk of actions, T flow steps, K critics.
"""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from common.sampling import Batch

S = 3
SMALL = dict(
    chunk_length=4, action_size=1, hidden_dims=(8, 8), num_critics=2, batch_size=6, flow_steps=3
)


def arguments(script, **flags):
    """Flags of a small agent, as far as the script has them."""
    small = {name: x for name, x in SMALL.items() if hasattr(script.Args, name)}
    return dataclasses.replace(script.Args(), **small | flags)


def make_batch(args, seed=0):
    """Random chunks, of which every third ends too early."""
    rng, B = np.random.default_rng(seed), args.batch_size
    A = args.chunk_length * args.action_size
    actions = rng.uniform(-1, 1, (B, A))
    masks, valid = np.float64(np.arange(B) != 1), np.float64(np.arange(B) % 3 != 2)
    states = rng.normal(size=(2, B, S))
    arrays = states[0], actions, rng.normal(size=B), masks, states[1], valid
    return Batch(*(jnp.asarray(x) for x in arrays))


def make_state(script, args, seed=0):
    """Random weights (biases and layer norms, too) in float64, targets unlike the online copies."""
    return _make_state(script, args, seed, jax.config.jax_enable_x64)


@cache
def _make_state(script, args, seed, precision):
    state = jax.jit(partial(script.create, args, S))(jax.random.PRNGKey(seed))
    rng = np.random.default_rng(seed)

    def shake(x):
        return jnp.asarray(np.float64(x) + 0.3 * rng.normal(size=x.shape))

    params, targets = (jax.tree.map(shake, tree) for tree in (state.params, state.targets))
    return state.replace(params=params, targets=targets)


def count_parameters(script, observations, chunk_length, action_size, **flags):
    """Trainable parameters of an agent of the paper's size."""
    flags = dict(chunk_length=chunk_length, action_size=action_size) | flags
    args = dataclasses.replace(script.Args(), **flags)
    state = jax.eval_shape(partial(script.create, args, observations), jax.random.PRNGKey(0))
    return sum(x.size for x in jax.tree.leaves(state.params))


# --- networks ------------------------------------------------------------------------------------


def dense(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def gelu(x):
    return 0.5 * x * (1 + jnp.tanh(jnp.sqrt(2 / jnp.pi) * (x + 0.044715 * x**3)))


def mlp(tree, x, layer_norm=False, activation=gelu):
    depth = sum(name.startswith("Dense") for name in tree) - 1
    for i in range(depth):
        x = activation(dense(tree[f"Dense_{i}"], x))
        if layer_norm:
            norm = tree[f"LayerNorm_{i}"]
            x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
            x = x * norm["scale"] + norm["bias"]
    return dense(tree[f"Dense_{depth}"], x)


def velocity(tree, s, x, t):
    """A `Field`."""
    time = jnp.broadcast_to(t, x.shape[:-1])[..., None]
    return mlp(tree["params"]["MLP_0"], jnp.concatenate([s, x, time], -1))


def values(tree, *inputs):
    """A `Critic`, (K, B), one member after the other."""
    members, inputs = tree["params"]["VmapMLP_0"], jnp.concatenate(inputs, -1)
    pick = lambda k: jax.tree.map(lambda x: x[k], members)
    K = len(members["Dense_0"]["bias"])
    return jnp.stack([mlp(pick(k), inputs, layer_norm=True)[..., 0] for k in range(K)])


def gaussian(tree, *inputs):
    """Mean and log-deviation of a `TanhGaussian`."""
    tree = tree["params"]
    x = gelu(mlp(tree["MLP_0"], jnp.concatenate(inputs, -1)))
    return dense(tree["Dense_0"], x), jnp.clip(dense(tree["Dense_1"], x), -20, 2)


def log_density(u, mean, log_std):
    """log pi(tanh u) with u ~ N(mean, std), (B,)."""
    normal = jax.scipy.stats.norm.logpdf(u, mean, jnp.exp(log_std)).sum(-1)
    return normal + 2 * jnp.log(jnp.cosh(u)).sum(-1)  # log(1 - tanh^2) cancels for large u


def ode(args, tree, s, z):
    """Euler steps from the noise z to an action, clipped at the end."""
    x = z
    for i in range(args.flow_steps):
        x = x + velocity(tree, s, x, i / args.flow_steps) / args.flow_steps
    return jnp.clip(x, -1, 1)


# --- losses that several methods share -----------------------------------------------------------


def pessimistic(args, q):
    """mean - rho std over the critics, dividing by K: (K, B) -> (B,)."""
    mean = sum(q) / len(q)
    return mean - args.pessimism * jnp.sqrt(sum((x - mean) ** 2 for x in q) / len(q))


def temporal_difference(args, params, state, batch, next_actions):
    """Critic loss for given actions at the next observations."""
    y = pessimistic(args, values(state.targets["critic"], batch.next_observations, next_actions))
    y = batch.rewards + args.discount**args.chunk_length * batch.masks * y
    q = values(params["critic"], batch.observations, batch.actions)
    return sum((batch.valid * (member - y) ** 2).sum() for member in q) / q.size


def flow_matching(tree, batch, actions, key, weight=1.0):
    """Masked flow matching on `actions`; `key` is split into noise and time, in this order."""
    z_key, t_key = jax.random.split(key)
    z = jax.random.normal(z_key, actions.shape)
    t = jax.random.uniform(t_key, batch.valid.shape)[:, None]
    v = velocity(tree, batch.observations, (1 - t) * z + t * actions, t[:, 0])
    return ((weight * batch.valid)[:, None] * (v - (actions - z)) ** 2).sum() / actions.size


def jacobian(f, x):
    """(B, A) -> (B, A, A), of a function of the sample's index and value."""
    return jax.vmap(jax.jacfwd(f, argnums=1))(jnp.arange(len(x)), x)


def memoryless_path(args, policy, last, s, key):
    """QAM's SDE with fixed noises: x_0..x_{T-1} and x_T, whose last step goes along `last`."""
    T, h = args.flow_steps, 1 / args.flow_steps
    start_key, noise_key = jax.random.split(key)
    x = jax.random.normal(start_key, (len(s), args.chunk_length * args.action_size))
    noise = jax.random.normal(noise_key, (T - 1, *x.shape))
    path = [x]
    for i in range(T - 1):
        sigma = np.sqrt(2 * (1 - i * h + h) / (i * h + h))
        drift = 2 * policy(x, i * h) - x / (i * h + h)
        x = x + h * drift + np.sqrt(h) * sigma * noise[i]
        path.append(x)
    return path, x + h * last(x, (T - 1) * h)


# --- comparison ----------------------------------------------------------------------------------


def gradient(loss, args, state, batch, key):
    """Loss and its gradient with respect to everything that could move: all parameters."""

    value, grads = with_metrics(loss, args, state, batch, key)
    return value[0], grads


def with_metrics(loss, args, state, batch, key):
    """Loss and metrics, if it has any, and the gradient."""

    def value(params, state, batch, key):
        result = loss(args, params, state, batch, key)
        return result if isinstance(result, tuple) else (result, {})

    value = jax.jit(jax.value_and_grad(value, has_aux=True))
    return value(state.params, state, batch, key)


def close(found, expected, tolerance=1e-9):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, tolerance, tolerance),
                 found, expected)  # fmt: skip


def check_loss(script, args, loss, expected, own):
    """A script's loss and its gradient are those of `expected(args, params, state, batch, key)`,
    and so are the metrics, of which `expected` may know some; every network in `own` gets a
    gradient, and all others get exactly nothing."""
    inputs = make_state(script, args), make_batch(args), jax.random.PRNGKey(7)
    (value, metrics), grads = with_metrics(loss, args, *inputs)
    (expected_value, known), expected_grads = with_metrics(expected, args, *inputs)
    close((value, grads), (expected_value, expected_grads))
    close({name: metrics[name] for name in known}, known, 1e-6)  # means of flags are float32
    for network, tree in grads.items():
        assert any(np.any(x) for x in jax.tree.leaves(tree)) == (network in own), network


def like(tree, other):
    """`other` in the precision of `tree`, for which a function is compiled already."""
    return jax.tree.map(lambda x, y: y.astype(x.dtype), tree, other)


def check_update(script, args, expected, keys, clipped):
    """An update is one Adam step on the sum of the losses `expected`, each with its key of `keys`
    (see the script's `update`), with the joint norm of the gradient clipped or left alone; the
    targets move towards the parameters from before the step. A second one goes on with its moments
    and with other random numbers."""
    state, batch = make_state(script, args), make_batch(args)

    def total(args, params, state, batch, keys):
        results = [loss(args, params, state, batch, key) for loss, key in zip(expected, keys)]
        return sum(x[0] if isinstance(x, tuple) else x for x in results)

    _, grads = gradient(total, args, state, batch, keys)
    norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(grads)))
    assert norm > 1
    if clipped:
        grads = jax.tree.map(lambda g: g * args.grad_clip / norm, grads)
    step = jax.jit(partial(script.update, args))
    new, metrics = step(state, batch)
    close(metrics["grad_norm"], norm)
    moment = optax.tree_utils.tree_get(new.opt_state, "mu")
    close(moment, jax.tree.map(lambda g: 0.1 * g, grads), 1e-6)  # its rates are float32
    adam = lambda x, g: x - args.lr * g / (np.abs(g) + 1e-8)  # first step, bias corrected
    close(new.params, jax.tree.map(adam, state.params, grads), 1e-6)
    online = {name: state.params[name] for name in state.targets}
    mean = lambda x, y: x + args.target_rate * (y - x)
    close(new.targets, jax.tree.map(mean, state.targets, online))
    assert len({tuple(np.asarray(key)) for key in (state.key, new.key, *keys)}) == len(keys) + 2
    # a second one, from the same parameters: other keys alone change the gradient
    after = state.replace(key=new.key, opt_state=like(state.opt_state, new.opt_state))
    third, others = step(after, batch)
    assert abs(others["grad_norm"] / norm - 1) > 1e-3
    assert optax.tree_utils.tree_get(third.opt_state, "count") == 2
    squares = [optax.tree_utils.tree_get(x.opt_state, "nu") for x in (new, third)]
    jax.tree.map(lambda x, y: np.testing.assert_array_less(0.99 * x, y + 1e-30), *squares)
