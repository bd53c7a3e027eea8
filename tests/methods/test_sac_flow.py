"""SAC-Flow, exactly: sizes, batch renormalisation in all its modes, the gated velocity, paths and
their density, every loss and its gradient against the specification (float64), updates, acting.

Shapes as in baselines/sac_flow.py: B batch, S observation, d action, T steps of the flow.
"""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from baselines import sac_flow
from common.networks import waves as network_waves
from tests.helpers import online_reference as reference
from tests.helpers.online_reference import (
    S,
    check_loss,
    close,
    count_parameters,
    gradient,
    relu,
    waves,
)
from tests.helpers.reference import dense, mlp

pytestmark = pytest.mark.usefixtures("quick_compile")
# No two numbers are alike, so that none can stand in for another. Renormalisation sets in at 100.
ARGS = reference.make_args(
    sac_flow, reward_scale=0.7, discount=0.9, target_entropy=-0.4, actor_lr=2e-3, critic_lr=5e-3,
    alpha_lr=3e-2, alpha_init=0.6, policy_width=8, renorm_after=100,
)  # fmt: skip
MANY = dataclasses.replace(ARGS, batch_size=40)  # rows: either critic is the lower one somewhere
KEY = jax.random.PRNGKey(7)


def make_batch(args=ARGS):
    return reference.make_batch(args)


@cache
def make_state(args, step=0):
    """Random weights and running moments: some so far from a batch's that r and b reach their
    limits, some near."""
    state = jax.jit(partial(sac_flow.create, args, S))(jax.random.PRNGKey(0))
    rng = np.random.default_rng(0)
    shake = lambda x: jnp.asarray(np.float64(x) + 0.3 * rng.normal(size=x.shape))

    def moments(path, x):
        far = rng.random(x.shape) < 0.4
        if path[-1].key == "var":
            return jnp.asarray(np.exp(np.where(far, 3.5, 0.5) * rng.normal(size=x.shape)))
        return jnp.asarray(np.where(far, 12, 0.5) * rng.normal(size=x.shape))

    widen = lambda x: jnp.asarray(np.float64(x)) if x.dtype == jnp.float32 else x
    return jax.tree.map(widen, state).replace(
        params=jax.tree.map(shake, state.params),
        statistics=jax.tree_util.tree_map_with_path(moments, state.statistics),
        step=jnp.int32(step),
    )


# --- the formulas again, straight from the specification -----------------------------------------

RUNNING, PLAIN, CORRECTED = "running moments", "own moments", "own moments, corrected"


def renorm(layer, moments, x, mode):
    """(n, features), which are normalised, and the moments after it."""
    mean, std = moments["mean"], jnp.sqrt(moments["var"] + 1e-3)
    if mode == RUNNING:
        return layer["scale"] * (x - mean) / std + layer["bias"], moments
    own = sum(x) / len(x)
    var = sum((x - own) ** 2) / len(x)
    y = (x - own) / jnp.sqrt(var + 1e-3)
    if mode == CORRECTED:  # its constants depend on earlier steps of a path, too
        r = jnp.clip(jax.lax.stop_gradient(jnp.sqrt(var + 1e-3) / std), 1 / 3, 3)
        y = y * r + jnp.clip(jax.lax.stop_gradient((own - mean) / std), -5, 5)
    after = dict(mean=0.99 * mean + 0.01 * own, var=0.99 * moments["var"] + 0.01 * var)
    return layer["scale"] * y + layer["bias"], after


def values(tree, moments, s, a, mode):
    """Q_1, Q_2 and the moments after it, one critic after the other."""
    results = []
    for k in (0, 1):
        member, own = (jax.tree.map(lambda x: x[k], x) for x in (tree, moments))
        x, after = jnp.concatenate([s, a], 1), {}
        x, after["Renorm_0"] = renorm(member["Renorm_0"], own["Renorm_0"], x, mode)
        for i in (0, 1):
            x = relu(dense(member[f"Dense_{i}"], x))
            name = f"Renorm_{i + 1}"
            x, after[name] = renorm(member[name], own[name], x, mode)
        results.append((dense(member["Dense_2"], x)[:, 0], after))
    return jax.tree.map(lambda *x: jnp.stack(x), *results)


def swish(x):
    return x / (1 + jnp.exp(-x))


def velocity(tree, moments, s, x, t, mode):
    y, after = renorm(tree["Renorm_0"], moments["Renorm_0"], jnp.concatenate([s, x], 1), mode)
    y = jnp.concatenate([y, time_input(tree, t, len(x))], 1)
    gate = 1 / (1 + jnp.exp(-5 - mlp(tree["MLP_1"], y, activation=swish)))
    return gate * (mlp(tree["MLP_2"], y, activation=swish) - x), dict(Renorm_0=after)


def time_input(tree, t, rows):
    """32 sinusoids of t itself, the last ones of frequency 1e-4, through layers of 64 and 32."""
    sines = jnp.broadcast_to(waves(t, 32, intervals=15), (rows, 32))
    return mlp(tree["MLP_0"], sines, activation=swish)


def deviation(tree, s):
    return jnp.exp(-5 + 7 / 2 * (jnp.tanh(mlp(tree, s, activation=relu)) + 1))


def path(args, tree, moments, s, key, mode, noisy=1.0):
    """Action, log-density of the path as its definition says, moments after its last step."""
    start_key, noise_key = jax.random.split(key)
    logpdf = jax.scipy.stats.norm.logpdf
    x = jax.random.normal(start_key, (len(s), args.action_size))
    noise = noisy * jax.random.normal(noise_key, (args.flow_steps, *x.shape))
    sigma, log_prob, T = deviation(tree["deviation"], s), logpdf(x), args.flow_steps
    for k in range(T):
        v, moments = velocity(tree["velocity"], moments, s, x, k / T, mode)
        mean = x + v / T
        x = mean + sigma * noise[k]
        log_prob = log_prob + logpdf(x, mean, sigma)
    log_prob = (log_prob + 2 * jnp.log(jnp.cosh(x))).sum(1)  # -log(1 - tanh^2 x), exactly
    return jnp.tanh(x), log_prob, moments


def expected_critic(mode, params, state, batch, key):
    """Loss, and with it the moments after it and the means that are logged."""
    policy = state.params["policy"], state.statistics["policy"]
    a, log_prob, _ = path(ARGS, *policy, batch.next_observations, key, RUNNING)
    s = jnp.concatenate([batch.observations, batch.next_observations])
    a = jnp.concatenate([batch.actions, a])
    q, moments = values(params, state.statistics["critic"], s, a, mode)
    B = len(batch.rewards)
    after = jax.lax.stop_gradient(jnp.minimum(q[0, B:], q[1, B:]))
    y = 0.7 * batch.rewards
    y = y + 0.9 * batch.masks * (after - jnp.exp(state.params["log_alpha"]) * log_prob)
    loss = jnp.mean((q[0, :B] - y) ** 2) + jnp.mean((q[1, :B] - y) ** 2)
    return loss, (moments, dict(critic_loss=loss, q=q[:, :B].mean(), target=y.mean()))


def expected_policy(mode, params, state, s, key):
    a, log_prob, moments = path(ARGS, params, state.statistics["policy"], s, key, mode)
    q, _ = values(state.params["critic"], state.statistics["critic"], s, a, RUNNING)
    alpha = jnp.exp(state.params["log_alpha"])
    return jnp.mean(alpha * log_prob - jnp.minimum(q[0], q[1])), (moments, log_prob.mean())


# --- sizes and networks --------------------------------------------------------------------------


def test_create():
    """Parameters of an agent for Hopper; alpha is alpha_init, and there is nothing but one copy of
    each network (G-1: no targets) and one set of running moments. All numbers are strong."""
    norm = lambda n: 2 * n
    critic = norm(14) + (14 * 1024 + 1024) + norm(1024) + (1024 * 1024 + 1024) + norm(1024) + 1025
    gate = ((14 + 32) * 512 + 512) + (512 * 3 + 3)
    sigma = (11 * 512 + 512) + (512 * 512 + 512) + (512 * 3 + 3)
    time = (32 * 64 + 64) + (64 * 32 + 32)
    expected = 2 * critic + norm(14) + time + 2 * gate + sigma + 1
    assert count_parameters(sac_flow, 11, 3) == expected
    names = [field.name for field in dataclasses.fields(sac_flow.State)]
    assert names == ["params", "statistics", "opt_state", "step", "key"]
    state = sac_flow.create(ARGS, S, KEY)
    assert set(state.params) == {"critic", "policy", "log_alpha"}
    assert abs(state.params["log_alpha"] - np.log(0.6)) < 1e-6
    numbers = [x.size for x in jax.tree.leaves(state.statistics)]
    assert sum(numbers) == 2 * (2 * (5 + 8 + 8) + 5)
    for x in jax.tree.leaves(state):
        assert not x.weak_type and x.dtype in (jnp.float32, jnp.int32, jnp.uint32)


def test_class_holds_the_values_of_the_code():
    args = sac_flow.Args()
    assert (args.flow_steps, args.policy_delay, args.batch_size) == (4, 3, 512)
    assert (args.actor_lr, args.critic_lr, args.alpha_lr) == (3e-4, 1e-3, 1e-3)
    assert (args.target_entropy, args.renorm_after, args.reward_scale) == (0, 100_000, 1)
    assert args.alpha_init == 0.2


def test_time_input(float64):
    """By hand: the first sinusoids of t = 0.75 are sin(0.75) and cos(0.75), the last ones have the
    frequency 1e-4; a layer of 64 with swish, then a linear one of 32, make the input of them."""
    found = np.asarray(network_waves(0.75, 32, inclusive=True))
    sines = {0: 0.6816387600, 1: 0.75 * 10 ** (-4 / 15), 15: 7.5e-5, 16: 0.7316888689, 31: 1.0}
    for index, value in sines.items():
        exact = np.sin(value) if index == 1 else value
        assert abs(found[index] - exact) < 1e-8, index
    tree = sac_flow.create(ARGS, S, KEY).params["policy"]["velocity"]
    shapes = [tree["MLP_0"][f"Dense_{i}"]["kernel"].shape for i in (0, 1)]
    assert shapes == [(32, 64), (64, 32)]


def test_steps_share_one_set_of_moments(float64):
    """In NumPy: with the gate closed x is noise with known increments, so four steps of momentum
    0.99 in one rollout say what the moments are after it."""
    args = dataclasses.replace(ARGS, flow_steps=4, batch_size=40)
    state, s = make_state(args), np.asarray(make_batch(args).observations)
    params = jax.tree.map(jnp.copy, state.params["policy"])
    last = params["velocity"]["MLP_1"]["Dense_1"]
    last["kernel"], last["bias"] = 0 * last["kernel"], jnp.full(2, -200.0)
    start, noise = jax.random.split(KEY)
    x = np.asarray(jax.random.normal(start, (40, 2)))
    xi = np.asarray(jax.random.normal(noise, (4, 40, 2)))
    sigma = np.asarray(deviation(params["deviation"], s))
    moments = jax.tree.map(np.asarray, state.statistics["policy"]["Renorm_0"])
    mean, var = moments["mean"], moments["var"]
    for k in range(4):
        inputs = np.concatenate([s, x], 1)
        mean = 0.99 * mean + 0.01 * inputs.mean(0)
        var = 0.99 * var + 0.01 * inputs.var(0)
        x = x + sigma * xi[k]
    rollout = partial(sac_flow.rollout, args, corrected=True)
    after = rollout(params, state.statistics["policy"], s, KEY)[2]["Renorm_0"]
    close(after, dict(mean=mean, var=var), 1e-8)


MODES = {RUNNING: None, PLAIN: False, CORRECTED: True}


@pytest.mark.parametrize("mode", MODES)
def test_renormalisation(float64, mode):
    """In NumPy, with moments within and beyond the limits; r and b are constants of the gradient,
    and the running moments follow the batch in training alone."""
    rng = np.random.default_rng(1)
    x, layer = rng.normal(size=(7, 6)), dict(scale=rng.normal(size=6), bias=rng.normal(size=6))
    mean, var = np.array([0, 0.2, 9, -9, 0, 0.0]), np.array([1, 2, 1, 1, 40, 0.01])
    moments, weights = dict(mean=mean, var=var), rng.normal(size=(7, 6))

    def total(x, layer, statistics):
        variables = dict(params=layer, statistics=statistics)
        y, new = sac_flow.Renorm().apply(variables, x, MODES[mode], mutable="statistics")
        return (weights * y).sum(), (y, new["statistics"])

    def expected(x, layer, statistics):
        y, new = renorm(layer, statistics, x, mode)
        return (weights * y).sum(), (y, new)

    run = lambda f: jax.value_and_grad(f, (0, 1), has_aux=True)(x, layer, moments)
    found = run(total)
    close(found, run(expected))
    own, std = x.mean(0), np.sqrt(var + 1e-3)
    y = {
        RUNNING: (x - mean) / std,
        PLAIN: (x - own) / np.sqrt(x.var(0) + 1e-3),
    }
    r = np.clip(np.sqrt(x.var(0) + 1e-3) / std, 1 / 3, 3)
    b = np.clip((own - mean) / std, -5, 5)
    assert {1 / 3, 3} < set(r) and {-5, 5} < set(b)  # both limits are reached, and more
    y[CORRECTED] = y[PLAIN] * r + b
    close(found[0][1][0], layer["scale"] * y[mode] + layer["bias"])
    within = [0, 1]  # where no limit holds, the corrected batch is what running moments give
    close(y[CORRECTED][:, within], y[RUNNING][:, within])
    moved = dict(mean=mean + 0.01 * (own - mean), var=var + 0.01 * (x.var(0) - var))
    close(found[0][1][1], moments if mode == RUNNING else moved)


def test_gate_is_open_at_first(float64):
    """G-1: v = 0.9933 (C - x) for any input of a new agent."""
    state, batch = sac_flow.create(ARGS, S, KEY), make_batch()
    tree = state.params["policy"]["velocity"]
    moments = state.statistics["policy"]
    s, x = batch.observations, 3 * batch.actions
    v, _ = sac_flow.velocity(ARGS, tree, moments, s, x, 0.5)
    y, _ = renorm(tree["Renorm_0"], moments["Renorm_0"], jnp.concatenate([s, x], 1), RUNNING)
    y = jnp.concatenate([y, time_input(tree, 0.5, len(x))], 1)
    candidate = mlp(tree["MLP_2"], y, activation=swish)
    close(v / (candidate - x), np.full(x.shape, 0.9933071), 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_networks(float64, mode):
    """Velocity and critics with random weights, and their moments."""
    state, batch = make_state(ARGS), make_batch()
    s, x, tree = batch.observations, 2 * batch.actions, state.params["policy"]["velocity"]
    moments = state.statistics["policy"]
    found = sac_flow.velocity(ARGS, tree, moments, s, x, 0.25, MODES[mode])
    close(found, velocity(tree, moments, s, x, 0.25, mode))
    critic = state.params["critic"], state.statistics["critic"]
    close(sac_flow.critic(ARGS, *critic, s, x, MODES[mode]), values(*critic, s, x, mode))
    close(
        sac_flow.deviation(ARGS, state.params["policy"]["deviation"], s),
        jnp.log(deviation(state.params["policy"]["deviation"], s)),
    )


# --- paths and losses ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_rollout(float64, mode):
    """Actions, densities of paths and the moments after them."""
    state, s = make_state(ARGS), make_batch().observations
    policy = state.params["policy"], state.statistics["policy"]
    run = jax.jit(partial(sac_flow.rollout, ARGS, corrected=MODES[mode]))
    close(run(*policy, s, KEY), path(ARGS, *policy, s, KEY, mode))


def test_noise_alone(float64):
    """G-1: v = 0, sigma = 0.3, d = 1, T = 4: Var x_T = 1.36, and the path's entropy exceeds that of
    x_T by 0.7061."""
    args = dataclasses.replace(ARGS, action_size=1, flow_steps=4, batch_size=40_000)
    state = make_state(args)
    params = jax.tree.map(jnp.zeros_like, state.params["policy"])
    params["velocity"]["MLP_1"]["Dense_1"]["bias"] = jnp.array([-200.0])  # the gate is closed
    raw = np.arctanh((np.log(0.3) + 5) / 3.5 - 1)
    params["deviation"]["Dense_2"]["bias"] = jnp.array([raw])
    s = np.zeros((args.batch_size, S))
    policy = params, state.statistics["policy"]
    actions, log_prob, _ = jax.jit(partial(sac_flow.rollout, args))(*policy, s, KEY)
    x = np.arctanh(actions[:, 0])
    assert abs(x.var() - 1.36) < 0.03
    path_entropy = -(log_prob + np.log(1 - actions[:, 0] ** 2)).mean()
    exact = 5 * 0.5 * np.log(2 * np.pi * np.e) + 4 * np.log(0.3)
    assert abs(path_entropy - exact) < 0.03
    assert abs(path_entropy - scipy.stats.norm(0, 1.36**0.5).entropy() - 0.7061) < 0.03
    assert abs(exact - scipy.stats.norm(0, 1.36**0.5).entropy() - 0.7061) < 1e-4


@pytest.mark.parametrize("step, mode", [(99, PLAIN), (100, CORRECTED)])
def test_critic_loss(float64, step, mode):
    """G-1: both halves of the joint batch share one set of moments, through which the gradient
    passes; the target itself has none."""
    state, batch = make_state(ARGS, step), make_batch(MANY)
    inputs, expected = (state.params["critic"], state, batch, KEY), partial(expected_critic, mode)
    check_loss(partial(sac_flow.critic_loss, ARGS), expected, *inputs)
    _, (metrics, moments) = jax.jit(partial(sac_flow.critic_loss, ARGS))(*inputs)
    _, (after, logged) = jax.jit(expected)(*inputs)
    close((metrics, moments), (logged, dict(critic=after)))


@pytest.mark.parametrize("step, mode", [(99, PLAIN), (100, CORRECTED)])
def test_policy_loss(float64, step, mode):
    """Through the whole path; the critics, of which either is the lower one somewhere, use their
    running moments and do not move them."""
    state, batch = make_state(ARGS, step), make_batch(MANY)
    s, critic = batch.observations, jax.tree.map(jnp.copy, state.params["critic"])
    q, _ = values(critic, state.statistics["critic"], s, batch.actions, RUNNING)
    critic["Dense_2"]["bias"] = critic["Dense_2"]["bias"].at[1].add(np.median(q[0] - q[1]))
    state = state.replace(params=state.params | dict(critic=critic))
    inputs, expected = (state.params["policy"], state, s, KEY), partial(expected_policy, mode)
    check_loss(partial(sac_flow.policy_loss, ARGS), expected, *inputs)
    _, (metrics, moments) = jax.jit(partial(sac_flow.policy_loss, ARGS))(*inputs)
    loss, (after, log_prob) = jax.jit(expected)(*inputs)
    close(moments, dict(policy=after))
    close((metrics["policy_loss"], metrics["entropy"]), (loss, -log_prob / 2))
    close(metrics["alpha"], jnp.exp(state.params["log_alpha"]))


@pytest.mark.parametrize("entropy", [-0.9, 0.1])
def test_temperature(float64, entropy):
    """A step raises alpha while H < H*, and lowers it while H > H*."""
    log_alpha = jnp.log(0.7)
    found = gradient(partial(sac_flow.alpha_loss, ARGS), log_alpha, None, entropy)
    close(found, (0.7 * 2 * (entropy + 0.4),) * 2)


def test_saturated_actions():
    """Latents far out give finite losses and gradients in float32."""
    narrow = lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x
    with jax.enable_x64(True):
        state = jax.tree.map(narrow, make_state(ARGS))
    s, policy = jnp.zeros((6, S)), jax.tree.map(jnp.copy, state.params["policy"])
    policy["velocity"]["MLP_2"]["Dense_1"]["bias"] = jnp.array([90.0, -90.0])
    actions = sac_flow.rollout(ARGS, policy, state.statistics["policy"], s, KEY)[0]
    assert (jnp.abs(actions) == 1).all()
    loss = partial(sac_flow.policy_loss, ARGS)
    for x in jax.tree.leaves(gradient(loss, policy, state, s, KEY)):
        assert np.isfinite(x).all()


# --- update and acting ---------------------------------------------------------------------------

update = jax.jit(sac_flow.update, static_argnums=0)


@pytest.mark.parametrize("step, due", [(1, 0), (2, 1), (101, 1)])
def test_update(float64, step, due):
    """Every third update also makes one step of the policy, by the critics' new values and moments,
    and one of alpha; all moments follow their own network's batches. Adam's b1 is 0.5."""
    state, batch = make_state(ARGS, step), make_batch()
    new, metrics = update(ARGS, state, batch)
    _, next_key, now_key = jax.random.split(state.key, 3)
    inputs = state.params["critic"], state, batch, next_key
    mode = CORRECTED if step >= 100 else PLAIN
    critic_loss, policy_loss = partial(expected_critic, mode), partial(expected_policy, mode)
    _, grads = gradient(critic_loss, *inputs)
    critic = reference.adam(state.params["critic"], grads, 5e-3)
    moments, _ = jax.jit(critic_loss)(*inputs)[1]
    params = state.params | dict(critic=critic)
    statistics, loss = state.statistics | dict(critic=moments), 0.0
    if due:
        now = state.replace(params=params, statistics=statistics)
        inputs = params["policy"], now, batch.observations, now_key
        loss, slope = gradient(policy_loss, *inputs)
        after, log_prob = jax.jit(policy_loss)(*inputs)[1]
        policy = reference.adam(params["policy"], slope, 2e-3)
        log_alpha = params["log_alpha"] + 3e-2 * np.sign(log_prob - 0.4 * 2)
        params = params | dict(policy=policy, log_alpha=log_alpha)
        statistics = statistics | dict(policy=after)
    close(new.params, params, 1e-6)  # Adam's rates are float32
    close(new.statistics, statistics)
    close(new.opt_state["critic"][0].mu, jax.tree.map(lambda g: 0.5 * g, grads))
    close(metrics["policy_loss"], 3 * loss, 1e-6)
    assert new.step == step + 1 and not np.array_equal(new.key, state.key)
    if not due:
        still = lambda x: (x.params["policy"], x.opt_state["policy"], x.statistics["policy"])
        close(still(new), still(state), 0)


def test_acting(float64):
    """In training a path, in evaluations one without noise on its way, from a random start; both
    with running moments, so that a state's action does not depend on the others in its batch, and
    with no other network."""
    args = dataclasses.replace(ARGS, batch_size=20)
    state, s = make_state(args), make_batch(args).observations
    act = jax.jit(partial(sac_flow.sample_actions, args), static_argnames="mode")
    policy = state.params["policy"], state.statistics["policy"]
    assert sac_flow.MODES == ("greedy",)
    for mode, noisy in (("explore", 1.0), ("greedy", 0.0)):
        found = act(state, s, KEY, mode=mode)
        close(found, path(args, *policy, s, KEY, RUNNING, noisy)[0])
        double = partial(jax.tree.map, lambda x: 2 * x)
        other = state.replace(
            params=double(state.params) | dict(policy=policy[0]),
            statistics=double(state.statistics) | dict(policy=policy[1]),
        )
        close(act(other, s, KEY, mode=mode), found, 0)
        close(act(state, s.at[1:].set(9.0), KEY, mode=mode)[0], found[0])
        assert np.abs(found - act(state, s, jax.random.PRNGKey(8), mode=mode)).max() > 0.01
