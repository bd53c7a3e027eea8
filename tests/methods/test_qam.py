"""QAM, exactly: sizes, every loss and gradient against loops with derivatives by hand (NumPy,
float64), the lean adjoint against autodiff, the optimiser's step, and the agents axis.

Shapes as in qam.py: B batch, S observation, A chunk of actions, T flow steps, K critics, N agents.
"""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qam
from common.devices import zero_metrics
from common.sampling import Batch, Dataset, Replay, sample

pytestmark = pytest.mark.usefixtures("quick_compile")
S, B = 3, 6


def arguments(**flags):
    small = dict(chunk_length=2, action_size=2, hidden_dims=(7, 5), num_critics=3, batch_size=B)
    return dataclasses.replace(qam.Args(), **small | dict(flow_steps=4, inv_temp=2.0) | flags)


CASES = {
    "plain": arguments(),
    "ten steps": arguments(flow_steps=10, num_critics=2, chunk_length=1, pessimism=0.0),
    "deep": arguments(flow_steps=3, hidden_dims=(6, 5, 4), action_size=3, pessimism=2.0),
    "one critic": arguments(num_critics=1, chunk_length=5, action_size=1, discount=0.9),
    "one step": arguments(flow_steps=1),
    "cloning": arguments(inv_temp=0.0),
}
each_case = pytest.mark.parametrize("args", CASES.values(), ids=CASES)
LOSSES = {
    "critic": qam.critic_loss,
    "behavior": qam.behavior_loss,
    "policy": qam.adjoint_matching_loss,
}


def size(args):
    return args.chunk_length * args.action_size


def make_batch(args, seed=0):
    """Random chunks: one that solved the task, two that end too early."""
    rng, index = np.random.default_rng(seed), np.arange(B)
    states, actions = rng.normal(size=(2, B, S)), rng.uniform(-1, 1, (B, size(args)))
    flags = 1.0 * (index != 1), 1.0 * (index % 3 != 2)
    arrays = states[0], actions, rng.normal(size=B), flags[0], states[1], flags[1]
    return Batch(*arrays)


def make_state(args, seed=0, key=7):
    """Random weights in float64 (biases and layer norms, too), targets unlike the online copies."""
    state = jax.eval_shape(partial(qam.create, args, S), jax.random.PRNGKey(0))
    rng = np.random.default_rng(seed)
    draw = lambda path, x: ("scale" in str(path)) + 0.4 * rng.normal(size=x.shape)
    params, targets = jax.tree_util.tree_map_with_path(draw, (state.params, state.targets))
    opt_state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state.opt_state)
    wide = lambda x: jnp.asarray(x, float if x.dtype.kind == "f" else x.dtype)
    state = qam.State(params, targets, opt_state, np.uint32([0, key]))
    return jax.tree.map(wide, state)


create = jax.jit(qam.create, static_argnums=(0, 1))


def acting(**params):
    """A state that holds no more than the parameters that acting needs."""
    return qam.State(params, None, None, None)


def assert_close(actual, expected, rtol=1e-8, atol=1e-10):
    """Trees of the same structure, with the same numbers."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), actual, expected)


# --- the second writing --------------------------------------------------------------------------


class Net:
    """One network of the specification, for one input vector: Dense, tanh-GELU, in critics a
    LayerNorm after it, ..., Dense; with its derivative written by hand."""

    def __init__(self, params, member=None):
        pick = lambda x: np.float64(x) if member is None else np.float64(x[member])
        (tree,) = params["params"].values()
        self.tree = jax.tree.map(pick, tree)
        self.depth = sum(name.startswith("Dense") for name in tree)

    def __call__(self, *inputs):
        return self.forward(*inputs)[0]

    def forward(self, *inputs):
        x, tape = np.concatenate([np.atleast_1d(x) for x in inputs]), []
        for layer in range(self.depth):
            dense = self.tree[f"Dense_{layer}"]
            u = x @ dense["kernel"] + dense["bias"]
            tape.append(SimpleNamespace(x=x, u=u))
            if layer == self.depth - 1:
                return u, tape
            x = u / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
            if norm := self.tree.get(f"LayerNorm_{layer}"):
                tape[-1].deviation = np.sqrt(((x - x.mean()) ** 2).mean() + 1e-6)
                tape[-1].normal = (x - x.mean()) / tape[-1].deviation
                x = tape[-1].normal * norm["scale"] + norm["bias"]

    def backward(self, tape, g):
        """Gradient g of the output -> that of the input, and of the parameters."""
        grads = {}
        for layer in reversed(range(self.depth)):
            at = tape[layer]
            if layer < self.depth - 1:
                if norm := self.tree.get(name := f"LayerNorm_{layer}"):
                    grads[name] = dict(scale=g * at.normal, bias=g)
                    g = g * norm["scale"]
                    g = (g - g.mean() - at.normal * (g * at.normal).mean()) / at.deviation
                c = np.sqrt(2 / np.pi)
                tanh = np.tanh(c * (at.u + 0.044715 * at.u**3))
                inner = c * (1 + 3 * 0.044715 * at.u**2)
                g = g * ((1 + tanh) / 2 + at.u / 2 * (1 - tanh**2) * inner)
            grads[f"Dense_{layer}"] = dict(kernel=np.outer(at.x, g), bias=g)
            g = self.tree[f"Dense_{layer}"]["kernel"] @ g
        return g, grads


def add(total, grads, params):
    """Adds the parameter gradients of one call of a Net to a tree like `params`."""
    ((name, tree),) = total["params"].items()
    return dict(params={name: jax.tree.map(np.add, tree, grads)})


def zeros(tree):
    return jax.tree.map(lambda x: np.zeros(x.shape), tree)


def ode(args, net, s, z):
    x = z
    for i in range(args.flow_steps):
        x = x + net(s, x, i / args.flow_steps) / args.flow_steps
    return np.clip(x, -1, 1)


def critic_reference(args, state, batch, key):
    K = args.num_critics
    members = [Net(state.params["critic"], k) for k in range(K)]
    targets = [Net(state.targets["critic"], k) for k in range(K)]
    flow = Net(state.params["policy" if args.inv_temp > 0 else "behavior"])
    z = np.array(jax.random.normal(key, (B, size(args))))
    loss, grads, values, ys = 0, [zeros(net.tree) for net in members], np.zeros((K, B)), []
    for b in range(B):
        after = batch.next_observations[b]
        action = ode(args, flow, after, z[b])
        q = [net(after, action)[0] for net in targets]
        mean = sum(q) / K
        std = np.sqrt(sum((x - mean) ** 2 for x in q) / K)
        gamma = args.discount**args.chunk_length
        y = batch.rewards[b] + gamma * batch.masks[b] * (mean - args.pessimism * std)
        ys.append(y)
        for k, net in enumerate(members):
            (values[k, b],), tape = net.forward(batch.observations[b], batch.actions[b])
            error = values[k, b] - y
            loss += batch.valid[b] * error**2 / (K * B)
            slope = np.array([2 * batch.valid[b] * error / (K * B)])
            grads[k] = jax.tree.map(np.add, grads[k], net.backward(tape, slope)[1])
    (name,) = state.params["critic"]["params"]
    grads = dict(params={name: jax.tree.map(lambda *x: np.stack(x), *grads)})
    metrics = dict(q=values.mean(), q_std=values.std(0).mean(), target=np.mean(ys))
    return loss, dict(critic_loss=loss, **metrics), grads


def behavior_reference(args, state, batch, key):
    z_key, t_key = jax.random.split(key)
    draws = jax.random.normal(z_key, (B, size(args))), jax.random.uniform(t_key, (B,))
    z, t = map(np.array, draws)
    net, loss, grads = Net(state.params["behavior"]), 0, zeros(state.params["behavior"])
    for b in range(B):
        a = batch.actions[b]
        velocity, tape = net.forward(batch.observations[b], (1 - t[b]) * z[b] + t[b] * a, t[b])
        error = velocity - (a - z[b])
        loss += batch.valid[b] * sum(error**2) / size(args) / B
        slope = batch.valid[b] * 2 * error / size(args) / B
        grads = add(grads, net.backward(tape, slope)[1], grads)
    return loss, dict(behavior_loss=loss), grads


def sde_noise(args, key):
    """x_0 (B, A) and the increments (T - 1, B, A) that adjoint_matching_loss draws from `key`."""
    start_key, noise_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (args.flow_steps - 1, B, size(args)))
    return np.array(jax.random.normal(start_key, (B, size(args)))), np.array(noise)


def policy_reference(args, state, batch, key):
    T, dt, A = args.flow_steps, 1 / args.flow_steps, size(args)
    policy, anchor = Net(state.params["policy"]), Net(state.targets["behavior"])
    critics = [Net(state.targets["critic"], k) for k in range(args.num_critics)]
    start, noise = sde_noise(args, key)
    loss, grads, outside, tilts, adjoints = 0, zeros(state.params["policy"]), 0, [], []
    for b in range(B):
        s, x = batch.observations[b], start[b]
        path = [x]
        for i in range(T - 1):
            c, variance = (i + 1) * dt, 2 * (1 - i * dt + dt) / (i * dt + dt)
            drift = 2 * policy(s, x, i * dt) - x / c
            x = x + dt * drift + np.sqrt(dt * variance) * noise[i, b]
            path.append(x)
        x = x + dt * anchor(s, x, (T - 1) * dt)
        outside += np.mean(np.abs(x) > 1) / B
        slopes = []
        for net in critics:
            _, tape = net.forward(s, np.clip(x, -1, 1))
            slopes.append(net.backward(tape, np.ones(1))[0][S:])
        tilt = args.inv_temp * np.mean(slopes, 0) * (np.abs(x) <= 1)
        g = -tilt
        for i in reversed(range(T)):
            _, tape = anchor.forward(s, path[i], i * dt + dt)
            g = g + dt * (2 * anchor.backward(tape, g)[0][S : S + A] - g / (i * dt + dt))
            sigma = np.sqrt(2 * (1 - i * dt + dt) / (i * dt + dt))
            velocity, tape = policy.forward(s, path[i], i * dt)
            error = 2 / sigma * (velocity - anchor(s, path[i], i * dt)) + sigma * g
            loss += sum(error**2) / B
            grads = add(grads, policy.backward(tape, 2 * error * 2 / sigma / B)[1], grads)
        tilts.append(np.linalg.norm(tilt))
        adjoints.append(np.linalg.norm(g))
    norms = dict(tilt_norm=np.mean(tilts), adjoint_norm=np.mean(adjoints), outside=outside)
    return loss, dict(adjoint_loss=loss, **norms), grads


REFERENCES = {
    "critic": critic_reference,
    "behavior": behavior_reference,
    "policy": policy_reference,
}


def probe(monkeypatch, args, state, batch, key):
    """The path x_0 .. x_{T-1} and the adjoint g_0 .. g_{T-1}, (T, B, A) each, seen from outside:
    the loss is differentiated by a shift added to f_theta in the regression alone. Its gradient is
    4 / (sigma B) times the error 2 (f_theta - f_beta) / sigma + sigma g."""
    original = qam.field

    def shifted(args, params, s, x, t):
        if "shift" not in params:
            return original(args, params, s, x, t)
        step = jnp.round(jnp.asarray(t) * args.flow_steps).astype(int)
        velocity = original(args, params["net"], s, x, t) + params["gain"] * x
        return velocity + params["shift"][step].reshape(x.shape)

    def error(gain):
        shift = jnp.zeros((args.flow_steps, B, size(args)))

        def loss(shift):
            policy = dict(net=state.targets["behavior"], gain=gain, shift=shift)
            return qam.adjoint_matching_loss(args, dict(policy=policy), state, batch, key)[0]

        return jax.jit(jax.grad(loss))(shift) * B * sigma / 4

    t = np.arange(args.flow_steps)[:, None, None] / args.flow_steps
    dt = 1 / args.flow_steps
    sigma = np.sqrt(2 * (1 - t + dt) / (t + dt))
    with monkeypatch.context() as patch:
        patch.setattr(qam, "field", shifted)
        plain, moved = error(0.0), error(1.0)
    return (moved - plain) * sigma / 2, plain / sigma


def terminal(args, state, batch, path):
    """g_T = -tau grad mean_k Q(s, clip(x_T))."""
    s, last = batch.observations, 1 - 1 / args.flow_steps
    x = path[-1] + qam.field(args, state.targets["behavior"], s, path[-1], last) / args.flow_steps
    value = lambda x: qam.critic(args, state.targets["critic"], s, jnp.clip(x, -1, 1)).mean(0).sum()
    return -args.inv_temp * jax.grad(value)(x)


# --- sizes and samples ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "observation, chunk, action, expected, with_targets",
    [(29, 1, 8, 9_744_410, None), (46, 5, 5, 9_970_748, 19_941_496 - 838_169)],
)
def test_number_of_parameters(observation, chunk, action, expected, with_targets):
    """The published tables; the second total less its dead field (72 -> 4 x 512 -> 25)."""
    args = dataclasses.replace(qam.Args(), chunk_length=chunk, action_size=action)
    state = jax.eval_shape(partial(qam.create, args, observation), jax.random.PRNGKey(0))
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert count(state.params) == expected
    if with_targets:
        assert count((state.params, state.targets)) == with_targets
    assert "policy" not in state.targets


def test_new_agent():
    """Targets start as copies; f_theta starts from weights of its own; Adam starts at zero."""
    state = create(arguments(), S, jax.random.PRNGKey(0))
    assert_close(state.targets, {name: state.params[name] for name in state.targets}, 0, 0)
    flows = [state.params[name]["params"]["MLP_0"] for name in ("behavior", "policy")]
    assert not np.allclose(*(flow["Dense_0"]["kernel"] for flow in flows))
    _, (adam, _) = state.opt_state
    assert adam.count == 0
    assert_close((adam.mu, adam.nu), (zeros(state.params),) * 2, 0, 0)


def test_actions_are_clipped_only_at_the_end(monkeypatch):
    """Out of the box and back again: the noise arrives, clipped."""
    push = lambda args, params, s, x, t: jnp.where(t < 0.5, 8.0, -8.0) + 0 * x
    monkeypatch.setattr(qam, "field", push)
    key = jax.random.PRNGKey(0)
    actions = qam.sample_actions(arguments(), acting(policy=None), jnp.zeros((50, S)), key)
    z = jax.random.normal(key, (50, 4))
    assert np.abs(z).max() > 1
    np.testing.assert_allclose(actions, np.clip(z, -1, 1), atol=1e-5)


@pytest.mark.parametrize("inv_temp, shift", [(0.0, -0.25), (1e-3, 0.5)])
def test_temperature_zero_acts_with_the_behavior(monkeypatch, inv_temp, shift):
    """tau = 0: f_beta; any other: f_theta."""
    monkeypatch.setattr(qam, "field", lambda args, params, s, x, t: params + 0 * x)
    args, key = arguments(inv_temp=inv_temp), jax.random.PRNGKey(0)
    flows = dict(policy=0.5, behavior=-0.25)
    actions = qam.sample_actions(args, acting(**flows), jnp.zeros((9, S)), key)
    z = jax.random.normal(key, (9, 4))
    np.testing.assert_allclose(actions, np.clip(z + shift, -1, 1), atol=1e-6)


# --- losses and gradients ------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients(float64, args, name):
    """Value, metrics and gradient of a loss are those of the specification; networks that the loss
    does not train get a gradient of exactly zero."""
    state, batch, key = make_state(args), make_batch(args), jax.random.PRNGKey(3)
    assert 0 < batch.valid.mean() < 1
    value_and_grad = jax.value_and_grad(partial(LOSSES[name], args), has_aux=True)
    (loss, metrics), grads = jax.jit(value_and_grad)(state.params, state, batch, key)
    expected, numbers, own = REFERENCES[name](args, state, batch, key)
    np.testing.assert_allclose(loss, expected, rtol=1e-9)
    assert_close(metrics, numbers, rtol=1e-7)  # `outside` is a float32 mean of flags
    assert_close(grads.pop(name), own)
    assert all(not np.any(x) for x in jax.tree.leaves(grads)) and len(grads) == 2


def test_adjoint_loss_sees_frozen_copies_only(float64):
    """The regression's base, the tilt and the adjoint come from the targets: the online critic and
    f_beta do not enter."""
    args = arguments()
    state, batch, key = make_state(args), make_batch(args), jax.random.PRNGKey(3)
    other = make_state(args, seed=1).params | dict(policy=state.params["policy"])
    loss = jax.jit(partial(qam.adjoint_matching_loss, args))
    first, _ = loss(state.params, state, batch, key)
    second, _ = loss(other, state.replace(params=other), batch, key)
    assert first == second


def test_cloned_flow_without_tilt_has_no_loss():
    """tau = 0 and f_theta = target f_beta: exactly zero."""
    args = arguments(inv_temp=0.0)
    state, batch = create(args, S, jax.random.PRNGKey(0)), make_batch(args)
    params = state.params | dict(policy=state.targets["behavior"])
    state = state.replace(params=params)
    loss = jax.jit(partial(qam.adjoint_matching_loss, args))
    assert loss(params, state, batch, jax.random.PRNGKey(1))[0] == 0


# --- path and adjoint ----------------------------------------------------------------------------


def test_first_step_forgets_the_noise(float64, monkeypatch):
    """T = 10: x_1 = 2 dt f_theta(s, x_0, 0) + sqrt(2.2) eps_0."""
    args = arguments(flow_steps=10)
    state, batch, key = make_state(args), make_batch(args), jax.random.PRNGKey(5)
    path, _ = probe(monkeypatch, args, state, batch, key)
    start, noise = sde_noise(args, key)
    np.testing.assert_allclose(path[0], start, atol=1e-9)
    velocity = qam.field(args, state.params["policy"], batch.observations, start, 0.0)
    np.testing.assert_allclose(path[1], 0.2 * velocity + np.sqrt(2.2) * noise[0], atol=1e-9)


def test_constants_of_ten_steps(float64, monkeypatch):
    """The specification's table of sigma_i^2 and c_i, read off a path with f_theta = 0 and off the
    loss of a regression onto 0."""
    variance = np.array([22, 10, 6, 4, 2.8, 2, 10 / 7, 1, 2 / 3, 0.4])
    c = np.arange(1, 11) / 10
    args = arguments(flow_steps=10, inv_temp=0.0)
    state, batch, key = make_state(args), make_batch(args), jax.random.PRNGKey(5)
    none = jax.tree.map(jnp.zeros_like, state.params["policy"])
    state = state.replace(
        params=state.params | dict(policy=none), targets=state.targets | dict(behavior=none)
    )
    path, _ = probe(monkeypatch, args, state, batch, key)
    _, noise = sde_noise(args, key)
    for i in range(9):
        expected = path[i] * (1 - 0.1 / c[i]) + np.sqrt(0.1 * variance[i]) * noise[i]
        np.testing.assert_allclose(path[i + 1], expected, atol=1e-9)
    for i in range(10):
        only = lambda args, params, s, x, t: params * (abs(t - i / 10) < 1e-6)[..., None] + 0 * x
        with monkeypatch.context() as patch:
            patch.setattr(qam, "field", only)
            frozen = qam.State(dict(policy=0.0), dict(state.targets, behavior=0.0), None, None)
            loss, _ = qam.adjoint_matching_loss(args, dict(policy=1.0), frozen, batch, key)
        np.testing.assert_allclose(loss, 4 / variance[i] * size(args), rtol=1e-9)


def test_adjoint_without_behavior_shrinks_linearly(float64, monkeypatch):
    """f_beta = 0: g_i = i / T g_T, with a gradient of zero outside of the box."""
    args = arguments(flow_steps=5)
    state, batch, key = make_state(args), make_batch(args), jax.random.PRNGKey(5)
    none = jax.tree.map(jnp.zeros_like, state.targets["behavior"])
    state = state.replace(targets=state.targets | dict(behavior=none))
    path, adjoint = probe(monkeypatch, args, state, batch, key)
    end = terminal(args, state, batch, path)
    outside = np.abs(path[-1]) > 1
    assert outside.any() and (~outside).any() and not np.any(end[outside])
    for i in range(5):
        np.testing.assert_allclose(adjoint[i], i / 5 * end, atol=1e-9)


@pytest.mark.parametrize("T", [3, 10])
def test_lean_adjoint_is_a_vector_jacobian_product(float64, monkeypatch, T):
    """g_i = (d y_T / d y_i)^T g_T of the unrolled map y_{k+1} = y_k + dt (b_k(y_k) - b_k(x_k)) +
    x_{k+1} - x_k along the path, b_k(y) = 2 f_beta(s, y, t_{k+1}) - y / t_{k+1}."""
    args = arguments(flow_steps=T)
    state, batch, key = make_state(args), make_batch(args), jax.random.PRNGKey(5)
    path, adjoint = probe(monkeypatch, args, state, batch, key)
    end = terminal(args, state, batch, path)

    def drift(k, y):
        t = (k + 1) / T
        return 2 * qam.field(args, state.targets["behavior"], batch.observations, y, t) - y / t

    def unroll(first, y):
        for k in range(first, T):
            step = path[k + 1] - path[k] if k + 1 < T else 0.0
            y = y + (drift(k, y) - drift(k, path[k])) / T + step
        return y

    for i in range(T):
        _, vjp = jax.vjp(partial(unroll, i), path[i])
        np.testing.assert_allclose(adjoint[i], vjp(end)[0], rtol=1e-8, atol=1e-9)


# --- the update ----------------------------------------------------------------------------------


@pytest.mark.parametrize("grad_clip", [1.0, 1e9])
def test_update(float64, grad_clip):
    """Two updates, by hand: joint gradient, scaled to the norm, Adam; targets follow the parameters
    from before the step; the random numbers are fresh every time."""
    args = arguments(grad_clip=grad_clip, lr=0.01, target_rate=0.1)
    state = make_state(args)
    m, v = zeros(state.params), zeros(state.params)
    for step in (1, 2):
        batch = make_batch(args, step)
        key, *keys = jax.random.split(state.key, 4)
        results = [f(args, state, batch, k) for f, k in zip(REFERENCES.values(), keys)]
        grads = {name: result[2] for name, result in zip(REFERENCES, results)}
        norm = np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(grads)))
        assert (norm > grad_clip) == (grad_clip == 1)
        grads = jax.tree.map(lambda g: g * min(1, grad_clip / norm), grads)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, grads)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, v, grads)
        unit = lambda m, v: m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        params = jax.tree.map(lambda p, m, v: p - 0.01 * unit(m, v), state.params, m, v)
        online = {name: state.params[name] for name in ("critic", "behavior")}
        targets = jax.tree.map(lambda p, q: 0.1 * p + 0.9 * q, online, state.targets)
        state, metrics = jax.jit(partial(qam.update, args))(state, batch)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-9)
        numbers = {name: x for result in results for name, x in result[1].items()}
        assert_close(metrics, numbers | dict(grad_norm=norm), rtol=1e-7)
        assert_close(state.params, params)
        assert_close(state.targets, targets)
        assert np.array_equal(state.key, key)
        _, (adam, _) = state.opt_state
        assert adam.count == step
        assert_close((adam.mu, adam.nu), (m, v))


def test_every_update_draws_new_numbers():
    """With a learning rate of 0 the same batch gives other losses the second time."""
    args = arguments(lr=0.0, target_rate=0.0)
    state, batch = create(args, S, jax.random.PRNGKey(0)), make_batch(args)
    update = jax.jit(partial(qam.update, args))
    state, first = update(state, batch)
    _, second = update(state, batch)
    for name in ("critic_loss", "behavior_loss", "adjoint_loss"):
        assert first[name] != second[name]


# --- many agents ---------------------------------------------------------------------------------


def make_data(tasks=2, n=60):
    """A dataset of `tasks` reward rows, and its trajectories of 20 transitions."""
    rng = np.random.default_rng(0)
    rows = np.delete(np.arange(n + n // 20), np.s_[20::21])
    states, actions = rng.normal(size=(n + n // 20, S)), rng.uniform(-1, 1, (n, 2))
    rewards, masks = -rng.integers(0, 2, (tasks, n)), rng.integers(0, 2, (tasks, n))
    arrays = states, actions, rewards, masks, np.arange(n) % 20 == 19
    states, *others = (jnp.asarray(x, float) for x in arrays)
    return Dataset(states, jnp.asarray(rows, jnp.int32), *others)


def no_metrics(args, state, data, replay, task):
    """Sums of metrics that start at zero."""
    return zero_metrics(partial(qam.train_step, args, data), state, replay, task)


def make_agents(args, seeds):
    agents = [make_state(args, seed, key=seed) for seed in seeds]
    return jax.tree.map(lambda *x: jnp.stack(x), *agents)


@pytest.mark.parametrize("capacity", [0, 8])
def test_agents_do_not_touch_each_other(float64, capacity):
    """Three agents on two tasks, trained at once, are those trained alone."""
    args, data, seeds = arguments(), make_data(), (5, 6, 5)
    task, replay = jnp.array([0, 0, 1]), Replay.create(3, capacity, S, 2)
    if capacity:
        rng = np.random.default_rng(1)
        slots = {name: x for name, x in vars(replay).items() if name != "size"}
        rows = {name: rng.normal(size=(3, 4, *x.shape[2:])) for name, x in slots.items()}
        replay = replay.append(rows | dict(terminals=np.zeros((3, 4))))
    zeros = no_metrics(args, make_agents(args, seeds), data, replay, task)
    together, sums = qam.train_chunk(args, make_agents(args, seeds), zeros, data, replay, task, 5)
    for i, seed in enumerate(seeds):
        row = lambda tree: jax.tree.map(lambda x: x[i : i + 1], tree)
        one = make_agents(args, [seed])
        zeros = no_metrics(args, one, data, row(replay), row(task))
        alone = qam.train_chunk(args, one, zeros, data, row(replay), row(task), 5)
        assert_close((row(together), row(sums)), alone)
    weights = together.params["critic"]["params"]["VmapMLP_0"]["Dense_0"]["kernel"]
    assert not np.allclose(weights[0], weights[1]) and not np.allclose(weights[0], weights[2])


def test_chunks_are_a_loop(float64):
    """Chunks of two and three are five times: split the key, sample, update. Metrics are sums that
    go on from call to call, so that one call of five gives the same bits."""
    args, data, task = arguments(), make_data(), jnp.ones(1, int)
    replay, state, sums = Replay.create(1, 0, S, 2), make_state(args, key=3), []
    row = lambda tree: jax.tree.map(lambda x: x[0], tree)

    @jax.jit
    def step(state):
        key, batch_key = jax.random.split(state.key)
        batch = sample(batch_key, data, row(replay), 1, B, args.chunk_length, args.discount)
        return qam.update(args, state.replace(key=key), batch)

    for _ in range(5):
        state, metrics = step(state)
        sums.append(metrics)
    found = []
    for calls in ((2, 3), (5,)):
        chunks = jax.tree.map(lambda x: x[None], make_state(args, key=3))
        metrics = no_metrics(args, chunks, data, replay, task)
        for updates in calls:
            chunks, metrics = qam.train_chunk(args, chunks, metrics, data, replay, task, updates)
        found.append((chunks, metrics))
    assert_close(row(chunks), state)
    expected = jax.tree.map(lambda *x: sum(x), *sums) | dict(updates=5.0)
    assert_close(row(metrics), expected, rtol=1e-7)
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_nothing_is_compiled_twice():
    """Chunks of any length share a program, and so do all evaluations."""
    args, data, task = arguments(hidden_dims=(9,)), make_data(), jnp.zeros(1, int)
    replay = Replay.create(1, 0, S, 2)
    state = jax.tree.map(lambda x: x[None], create(args, S, jax.random.PRNGKey(0)))
    metrics = no_metrics(args, state, data, replay, task)
    qam.train_chunk.clear_cache()
    qam.act.clear_cache()
    for updates in (3, 7, 1, 0):
        state, metrics = qam.train_chunk(args, state, metrics, data, replay, task, updates)
        seeds, ages = np.full((1, 4), updates, np.uint32), np.full((1, 4), updates, np.int32)
        qam.act(args, state, np.ones((1, 4, S), np.float32), seeds, ages)
        assert qam.train_chunk._cache_size() == qam.act._cache_size() == 1


def test_a_chunk_stays_on_the_device():
    """No transfer between host and device happens inside of a chunk."""
    args, data, task = arguments(), make_data(), jnp.zeros(1, int)
    replay, updates = Replay.create(1, 0, S, 2), jax.device_put(np.int32(4))
    state = jax.tree.map(lambda x: x[None], create(args, S, jax.random.PRNGKey(0)))
    metrics = no_metrics(args, state, data, replay, task)
    state, metrics = qam.train_chunk(args, state, metrics, data, replay, task, updates)  # compiles
    with jax.transfer_guard("disallow"):
        state, metrics = qam.train_chunk(args, state, metrics, data, replay, task, updates)
        jax.block_until_ready(state)
        with pytest.raises(Exception, match="[Dd]isallowed"):
            on_host = np.zeros(1, np.int32)
            qam.train_chunk(args, state, metrics, data, replay, on_host, updates)


def test_actions_depend_on_seed_and_age_alone():
    """The same episode gets the same actions whatever it is batched with: (3, 4) at once or each
    alone; another seed or age gets others."""
    args, rng = arguments(), np.random.default_rng(0)
    keys = jax.random.split(jax.random.PRNGKey(0), 3)
    state = jax.jit(jax.vmap(partial(qam.create, args, S)))(keys)
    states = np.repeat(np.float32(rng.normal(size=(3, 1, S))), 4, 1)
    seeds = np.tile(np.array([1, 1, 2**32 - 1, 1], np.uint32), (3, 1))
    ages = np.tile(np.array([0, 5, 0, 0], np.int32), (3, 1))
    together = qam.act(args, state, states, seeds, ages)
    assert together.shape == (3, 4, args.chunk_length, args.action_size)
    for n in range(3):
        for e in range(4):
            one, own = np.s_[n : n + 1, e : e + 1], jax.tree.map(lambda x: x[n : n + 1], state)
            alone = qam.act(args, own, states[one], seeds[one], ages[one])
            np.testing.assert_allclose(together[one], alone, rtol=1e-5, atol=1e-6)
        assert not np.allclose(together[n, 0], together[n, 1])
        assert not np.allclose(together[n, 0], together[n, 2])
        np.testing.assert_allclose(together[n, 0], together[n, 3], rtol=1e-5, atol=1e-6)
