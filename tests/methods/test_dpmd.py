"""DPMD, exactly, and the diffusion that dpmd.py, qvpo.py and dipo.py have in common: schedules,
noising, the chain, the weighted loss; then choosing, the losses, weights, alpha and a whole update,
against the specification written a second time in plain loops (float64).

Shapes as in baselines/dpmd.py: B batch, S observation, d action, N candidates, T diffusion steps.
"""

import dataclasses
import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from baselines import dipo, dpmd, qvpo
from tests.helpers import online_reference as online
from tests.helpers.diffusion import (
    KEY,
    MILD,
    chains,
    expected_denoising,
    make_state,
    predictor,
    rates,
)
from tests.helpers.online_reference import S, adam, check_loss, close, moves, plain, polyak, values

pytestmark = pytest.mark.usefixtures("quick_compile")
SCRIPTS = [dpmd, qvpo, dipo]
make_args = partial(online.make_args, dpmd)
ARGS = make_args(num_candidates=4, q_clip=0.4, **MILD)

each = pytest.mark.parametrize("module", SCRIPTS, ids=lambda module: module.__name__[10:])


# --- the formulas again, straight from the specification -----------------------------------------


def candidates_best(args, state, tree, s, key, count):
    """Of `count` chains the one that the smaller online critic likes best."""
    actions = chains(args, predictor(dpmd, tree), s, key, count)
    q = jnp.minimum(*values(state.params["critic"], s, actions))
    return jnp.stack([actions[jnp.argmax(q[:, b]), b] for b in range(len(s))])


def expected_actions(args, state, tree, s, key, count, scale):
    chain_key, noise_key = jax.random.split(key)
    chosen = candidates_best(args, state, tree, s, chain_key, count)
    noise = jax.random.normal(noise_key, chosen.shape)
    return jnp.clip(chosen + scale * args.noise_scale * jnp.exp(state.log_alpha) * noise, -1, 1)


def expected_critic(args, state, batch, next_actions, params):
    next_q = jnp.minimum(*values(state.targets["critic"], batch.next_observations, next_actions))
    y = args.reward_scale * batch.rewards + args.discount * batch.masks * next_q
    return sum(((q - y) ** 2).mean() for q in values(params, batch.observations, batch.actions))


# --- diffusion: D-1 ------------------------------------------------------------------------------


def test_the_diffusion_is_written_alike():
    """Word by word, so that what differs between the three scripts is their method."""
    for name in ("noise_schedule", "denoise", "policy_loss"):
        texts = {inspect.getsource(getattr(module, name)) for module in SCRIPTS}
        assert len(texts) == 1, name
    assert inspect.getsource(dpmd.best) == inspect.getsource(qvpo.best)


@pytest.mark.parametrize(
    "schedule, scale, T, last",
    [("linear", 0.8, 20, 5.27e-6), ("linear", 0.3, 100, 5.2e-8), ("cosine", 0.0, 20, 6.06e-6)],
)
def test_schedules(schedule, scale, T, last):
    args = make_args(schedule=schedule, beta_scale=scale, diffusion_steps=T)
    beta, abar = dpmd.noise_schedule(args)
    assert beta.dtype == abar.dtype == np.float64 and beta.shape == abar.shape == (T,)
    np.testing.assert_allclose(abar[-1], last, rtol=5e-3)
    if schedule == "cosine":
        np.testing.assert_allclose(abar[0], 0.99201, atol=5e-6)
        assert beta[-1] == 0.999
    else:
        np.testing.assert_allclose(beta[[0, -1]], [scale * 1e-4, scale * 0.999])
    close((beta, abar), jax.tree.map(np.asarray, rates(args), is_leaf=lambda x: type(x) is list))


@each
def test_defaults_are_those_of_the_specification(module):
    table = {
        dpmd: (20, "linear", 0.8, 0.5, 0.2, 3e-4, 3e-4),
        qvpo: (20, "cosine", 0.8, 1.0, 1.0, 1e-4, 3e-4),
        dipo: (100, "linear", 0.3, 0.5, 0.2, 3e-4, 3e-4),
    }
    names = "diffusion_steps schedule beta_scale start_scale reward_scale actor_lr critic_lr"
    args = module.Args()
    assert tuple(getattr(args, name) for name in names.split()) == table[module]
    assert (args.hidden_dims, args.batch_size, args.discount) == ((256,) * 3, 256, 0.99)
    assert args.target_rate == 0.005
    if module is dpmd:
        assert (args.num_candidates, args.alpha_steps, args.actor_lr_end) == (32, 800, 3e-5)
        assert not args.as_published


@each
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_perfect_prediction_ends_at_the_point(module, schedule, monkeypatch):
    """Data in one point: every chain ends there, wherever it starts, to float32's last bits (the
    coefficients of the last step are 1 and 0)."""
    args = online.make_args(module, schedule=schedule, diffusion_steps=20, action_size=3)
    point, abar = jnp.array([0.3, -0.9, 1.0]), jnp.asarray(np.float32(rates(args)[1]))
    spread = jnp.asarray(np.float32(np.sqrt(1 - np.array(rates(args)[1]))))
    oracle = lambda args, params, s, x, i: (x - jnp.sqrt(abar[i]) * point) / spread[i]
    monkeypatch.setattr(module, "predict_noise", oracle)
    actions = module.denoise(args, None, jnp.zeros((5, S)), KEY, 50)
    assert actions.shape == (50, 5, 3) and actions.dtype == jnp.float32
    np.testing.assert_allclose(actions, jnp.broadcast_to(point, actions.shape), atol=2e-6)


def test_chains_spread_as_they_should(monkeypatch):
    """Exact predictions for N(0.2, 0.3^2): samples have its mean, and nearly its deviation."""
    args = make_args(schedule="cosine", diffusion_steps=200, start_scale=1.0)
    abar = jnp.asarray(rates(args)[1])

    def oracle(args, params, s, x, i):
        signal, variance = jnp.sqrt(abar[i]), abar[i] * 0.3**2 + 1 - abar[i]
        return jnp.sqrt(1 - abar[i]) * (x - 0.2 * signal) / variance

    monkeypatch.setattr(dpmd, "predict_noise", oracle)
    actions = np.asarray(dpmd.denoise(args, None, jnp.zeros((40, S)), KEY, 200))
    assert abs(actions.mean() - 0.2) < 0.01
    assert 0.28 < actions.std() < 0.31


@each
@pytest.mark.parametrize("flags", [MILD, dict(schedule="cosine", start_scale=0.8)])
def test_chains(float64, module, flags):
    """Random networks, full noise and reduced noise."""
    args = online.make_args(module, **flags)
    tree, s = make_state(module, args).params["policy"], online.make_batch(args).observations
    denoise = jax.jit(module.denoise, static_argnums=(0, 4))
    again = jax.jit(lambda tree, noise: chains(args, predictor(module, tree), s, KEY, 5, noise))
    for noise in (1.0, 0.5, 0.0):
        found = np.asarray(denoise(args, tree, s, KEY, 5, noise))
        close(found, again(tree, noise), 1e-7)
        inside = (np.abs(found) < 1).mean()
        assert inside > 0.7 if flags is MILD else inside < 1
    assert np.ptp(found, axis=0).max() > 0.3  # without noise, the starts still differ


@each
def test_noisy_actions(module, monkeypatch):
    """Steps are uniform in 0 ... T - 1; x_i has mean sqrt(abar_i) a and variance 1 - abar_i; the
    loss compares the prediction with the noise in x_i."""
    args, seen = online.make_args(module, diffusion_steps=4), {}
    action = jnp.array([0.7, -0.4])

    def spy(args, params, s, x, i):
        seen.update(x=x, i=i)
        return x

    monkeypatch.setattr(module, "predict_noise", spy)
    actions = jnp.broadcast_to(action, (40_000, 2))
    inputs = jnp.zeros((40_000, S)), actions, jnp.full(40_000, 2.0), KEY
    loss, metrics = module.policy_loss(args, None, None, *inputs)
    x, i, abar = np.asarray(seen["x"]), np.asarray(seen["i"]), np.array(rates(args)[1])
    np.testing.assert_allclose(np.bincount(i) / len(i), 0.25, atol=0.01)
    for step in range(4):
        rows = x[i == step]
        mean, variance = np.sqrt(abar[step]) * action, 1 - abar[step]
        np.testing.assert_allclose(rows.mean(0), mean, atol=0.04 * np.sqrt(variance))
        np.testing.assert_allclose(rows.var(0), variance, rtol=0.06)
    noise = (x - np.sqrt(abar[i])[:, None] * np.asarray(action)) / np.sqrt(1 - abar[i])[:, None]
    np.testing.assert_allclose(loss, 2 * ((x - noise) ** 2).mean(), rtol=1e-3)
    assert metrics == dict(policy_loss=loss)


@each
def test_denoising_loss(float64, module):
    """Value and gradient with random weights, for one action and for several per state."""
    args, rng = online.make_args(module), np.random.default_rng(0)
    state, s = make_state(module, args), online.make_batch(args).observations
    for lead in ((6,), (4, 6)):
        actions = jnp.asarray(rng.uniform(-1, 1, (*lead, 2)))
        weights = jnp.asarray(rng.uniform(0, 2, lead))
        loss = lambda params, *inputs: module.policy_loss(args, params, state, *inputs)
        expected = partial(expected_denoising, module, args)
        inputs = state.params["policy"], s, actions
        found, _ = check_loss(loss, expected, *inputs, weights, KEY)
        even, _ = loss(*inputs, jnp.ones(lead), KEY)  # weights of 1: no weights
        assert abs(found - even) > 1e-2
        close(even, expected(*inputs, jnp.ones(lead), KEY))


@each
def test_how_the_step_enters(float64, module):
    """In NumPy, at step 3: DPMD's and DIPO's sinusoids are divided by the root of their number,
    QVPO's frequencies end at 1e-4."""
    angles, factor, first = {
        dpmd: (3 * 10_000.0 ** (-np.arange(8) / 8), 0.25, (0.0352800, -0.2474981)),
        dipo: (3 * 10_000.0 ** (-np.arange(16) / 16), 32**-0.5, (0.0249468, -0.1750076)),
        qvpo: (3 * np.geomspace(1, 1e-4, 16), 1.0, (0.1411200, -0.9899925)),
    }[module]
    encoded = factor * np.concatenate([np.sin(angles), np.cos(angles)])
    np.testing.assert_allclose(encoded[[0, len(angles)]], first, atol=5e-7)
    args = online.make_args(module)
    tree, batch = make_state(module, args).params["policy"], online.make_batch(args)
    s, x = np.asarray(batch.observations), np.asarray(batch.actions)
    *embedding, body = [tree["params"][name] for name in sorted(tree["params"])]
    for layers in embedding:
        encoded = plain(layers, encoded)
    close(module.predict_noise(args, tree, s, x, 3), plain(body, s, x, encoded), 1e-7)


# --- choosing actions ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, count, scale", [("explore", 4, 1), ("best", 4, 0), ("single", 1, 0)]
)
def test_modes(float64, mode, count, scale):
    """The averaged policy's chains, ranked by the online critics; with noise in training."""
    state, s = make_state(dpmd, ARGS), online.make_batch(ARGS).observations
    state = state.replace(log_alpha=jnp.log(3.0))
    found = jax.jit(dpmd.sample_actions, static_argnums=(0, 4))(ARGS, state, s, KEY, mode)
    again = jax.jit(expected_actions, static_argnums=(0, 5))
    close(found, again(ARGS, state, state.targets["policy"], s, KEY, count, scale), 1e-7)
    assert dpmd.MODES == ("best", "single")


def test_noise_in_training():
    """Around the best candidate, with deviation 0.1 alpha, cut at the border."""
    state = make_state(dpmd, ARGS)
    s = jnp.broadcast_to(online.make_batch(ARGS).observations[0], (4000, S))
    state = state.replace(log_alpha=jnp.log(2.0))
    act = jax.jit(dpmd.sample_actions, static_argnums=(0, 4))
    noisy, quiet = (np.asarray(act(ARGS, state, s, KEY, mode)) for mode in ("explore", "best"))
    inside = np.abs(quiet) < 0.3
    assert inside.sum() > 500 and np.abs(noisy).max() == 1
    close((noisy - quiet)[inside].std(), 0.2, 0.05)


def test_the_best_candidate(monkeypatch):
    """Q(s, a) = -|a - c|^2: the nearest candidate is chosen, whose smaller value counts."""
    state, s = make_state(dpmd, ARGS), jnp.zeros((6, S))
    peaks = jnp.array([[0.5, 0.2], [-0.5, 0.1]])
    distance = lambda a: -((a - peaks[:, None, None]) ** 2).sum(-1)
    monkeypatch.setattr(dpmd, "critic", lambda args, params, s, a: distance(a))
    found = dpmd.choose(ARGS, state, state.params["policy"], s, KEY, 30, 0.0)
    chain_key = jax.random.split(KEY)[0]
    offers = np.asarray(dpmd.denoise(ARGS, state.params["policy"], s, chain_key, 30))
    worst = ((offers - np.asarray(peaks)[:, None, None]) ** 2).sum(-1).max(0)
    close(found, offers[worst.argmin(0), np.arange(6)])


# --- losses, weights, alpha: D-3 -----------------------------------------------------------------


def test_critic_loss(float64):
    state, batch = make_state(dpmd, ARGS), online.make_batch(ARGS)
    next_actions = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (6, 2)))
    loss = lambda params: dpmd.critic_loss(ARGS, params, state, batch, next_actions)
    expected = partial(expected_critic, ARGS, state, batch, next_actions)
    found, _ = check_loss(loss, expected, state.params["critic"])
    metrics = loss(state.params["critic"])[1]
    q = values(state.params["critic"], batch.observations, batch.actions)
    close((metrics["critic_loss"], metrics["q"]), (found, q.mean()))


def test_a_terminal_does_not_bootstrap(float64):
    """Where the mask is 0, y = c r."""
    state, batch = make_state(dpmd, ARGS), online.make_batch(ARGS)
    batch = batch.replace(masks=jnp.zeros(6))
    _, metrics = dpmd.critic_loss(ARGS, state.params["critic"], state, batch, batch.actions)
    close(metrics["target"], 0.1 * batch.rewards.mean())


def test_weights(float64):
    """exp((q - m) / sigma / alpha), within exp(+-3 / alpha)."""
    args = make_args()
    state = make_state(dpmd, args).replace(
        q_mean=jnp.float64(10.0), q_std=jnp.float64(2.0), log_alpha=jnp.log(1.5)
    )
    q = jnp.array([10.0, 12.0, 7.0, 100.0, -100.0, 16.0])
    exact = np.exp(np.array([0.0, 1.0, -1.5, 3.0, -3.0, 3.0]) / 1.5)
    close(dpmd.weigh(args, state, q), exact)
    start = jax.jit(partial(dpmd.create, args, S))(KEY)
    close(dpmd.weigh(args, start, q)[3:5], np.exp([3 / 5, -3 / 5]), 1e-6)


def test_weights_as_published(float64):
    """exp(clip(q - m / sigma) / alpha), by hand for m / sigma = 5."""
    args = make_args(as_published=True)
    state = make_state(dpmd, args).replace(
        q_mean=jnp.float64(10.0), q_std=jnp.float64(2.0), log_alpha=jnp.log(1.5)
    )
    q = jnp.array([5.0, 6.0, 2.0, 10.0, 1.0])
    exact = np.exp(np.array([0.0, 1.0, -3.0, 3.0, -3.0]) / 1.5)
    close(dpmd.weigh(args, state, q), exact)


@pytest.mark.parametrize("updates, period", [(200_000, 250), (990_000, 1237), (14_000, 17)])
def test_alpha_moves_by_the_share_of_the_run(updates, period):
    """800 steps in a run of any length: every 250 of 200,000 updates, as in the public code."""
    args = make_args(diffusion_steps=1, num_candidates=1, total_steps=updates + 1_000)
    args = dataclasses.replace(args, hidden_dims=(2,), batch_size=2)
    state, batch = make_state(dpmd, args), online.make_batch(args)
    update = jax.jit(partial(dpmd.update, args))
    for step, moves_now in ((period - 2, False), (period - 1, True), (period, False)):
        new, _ = update(state.replace(step=jnp.int32(step)), batch)
        assert (new.log_alpha != state.log_alpha) == moves_now


def alpha_path(args, steps):
    """log alpha after 0, 1, ... steps: Adam on d (log(0.1 alpha) + log(2 pi e) / 2 + 0.9)."""
    x, m, v, path = np.log(args.alpha_init), 0.0, 0.0, []
    for n in range(1, steps + 1):
        path.append(x)
        g = args.action_size * (0.5 * np.log(2 * np.pi * np.e * (0.1 * np.exp(x)) ** 2) + 0.9)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        x -= args.alpha_lr * (m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8)
    return np.array([*path, x])


@pytest.mark.parametrize("d", [1, 4])
def test_alpha(d):
    """A step every few updates, from 5 to the fixed point 0.98378, the same for every d; it is
    within 0.02 of it after 530 steps (Adam's memory of the first gradients slows it down)."""
    args = make_args(action_size=d, diffusion_steps=1, num_candidates=1, alpha_steps=1000)
    args = dataclasses.replace(args, hidden_dims=(2,), batch_size=2, total_steps=4_500)
    state, batch = make_state(dpmd, args), online.make_batch(args)

    def step(state, _):
        new, _ = dpmd.update(args, state, batch)
        return new, new.log_alpha

    _, path = jax.jit(lambda state: jax.lax.scan(step, state, None, 3 * 900))(state)
    expected = alpha_path(args, 900)
    np.testing.assert_allclose(path[2::3], expected[1:], atol=2e-4)
    np.testing.assert_allclose(path[:2], np.log(5), rtol=1e-6)  # not before the third update
    np.testing.assert_array_equal(path[3:5], path[2])
    assert abs(np.exp(path[-1]) - 0.98378) < 2e-3
    fixed = np.exp(-0.9 - 1.418939) / 0.1
    assert abs(fixed - 0.98378) < 1e-5 and (np.abs(np.exp(path[3 * 530 :]) - fixed) < 0.02).all()


# --- update --------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def expected_update(args, state, batch, loss_key, next_key):
    """New critics and policy (if it is due), Q and weights of the actions, policy's gradient."""
    old, s = state.params, batch.next_observations
    actions = expected_actions(args, state, old["policy"], s, next_key, args.num_candidates, 1)
    loss = partial(expected_critic, args, state, batch, actions)
    critic = adam(old["critic"], jax.grad(loss)(old["critic"]), args.critic_lr)
    q = jnp.minimum(*values(critic, s, actions))
    normal = (q - state.q_mean) / state.q_std
    bound = jnp.minimum(jnp.maximum(normal, -args.q_clip), args.q_clip)
    weights = jnp.exp(bound / jnp.exp(state.log_alpha))
    loss = lambda p: expected_denoising(dpmd, args, p, s, actions, weights, loss_key)
    grads = jax.grad(loss)(old["policy"])
    return critic, adam(old["policy"], grads, args.actor_lr), q, weights, grads


@pytest.mark.parametrize("step", [0, 1, 2, 7])
def test_update(float64, step):
    """Critics always; policy and averages at every second update; alpha at every fourth, here."""
    args = dataclasses.replace(ARGS, alpha_steps=3_500)  # of 14,000 updates
    batch, state = online.make_batch(args), make_state(dpmd, args)
    scalars = dict(q_mean=jnp.float64(0.5), q_std=jnp.float64(0.7), log_alpha=jnp.log(1.5))
    state = state.replace(step=jnp.int32(step), **scalars)
    new, metrics = jax.jit(dpmd.update, static_argnums=0)(args, state, batch)
    key, next_key, loss_key = jax.random.split(state.key, 3)
    expected = expected_update(args, state, batch, loss_key, next_key)
    critic, policy, q, weights, grads = expected
    clipped, due = np.isclose(np.abs(np.log(weights)), 0.4 / 1.5), step % 2 == 1
    assert 0 < clipped.sum() < 6

    params = dict(critic=critic, policy=policy if due else state.params["policy"])
    close(new.params, params, 1e-5)
    close(metrics["policy_grad_norm"], optax.global_norm(grads), 1e-5)
    averages = {name: polyak(state.targets[name], params[name], 0.005) for name in params}
    close(new.targets, averages if due else state.targets, 1e-7)
    count = lambda name: new.opt_state[name][0].count
    assert (count("critic"), count("policy"), count("alpha")) == (1, due, step == 7)
    assert moves(new.opt_state["policy"][0].mu) == due
    close(new.q_mean, 0.5 + 0.001 * (q.mean() - 0.5), 1e-7)
    close(new.q_std, 0.7 + 0.001 * (q.std() - 0.7), 1e-7)
    # Adam's first step has the size of its rate; alpha is above its fixed point, so it falls.
    close(new.log_alpha, np.log(1.5) - 7e-3 * (step == 7), 1e-7)
    assert new.step == step + 1 and np.array_equal(new.key, key)
    close(metrics["weight"], weights.mean(), 1e-5)
    close(metrics["ess_share"], weights.sum() ** 2 / (weights**2).sum() / 6, 1e-5)
    close(metrics["alpha"], 1.5, 1e-7)


def test_update_as_published(float64):
    """The critics make two steps of Adam with one gradient; weights are those after the first, the
    averages follow the second."""
    args = dataclasses.replace(ARGS, as_published=True, q_clip=3.0)
    batch, state = online.make_batch(args), make_state(dpmd, args)
    state = state.replace(step=jnp.int32(1), log_alpha=jnp.log(1.5))
    new, metrics = jax.jit(dpmd.update, static_argnums=0)(args, state, batch)
    _, next_key, loss_key = jax.random.split(state.key, 3)
    old, s = state.params, batch.next_observations
    actions = expected_actions(args, state, old["policy"], s, next_key, args.num_candidates, 1)
    loss = partial(expected_critic, args, state, batch, actions)
    grads = jax.grad(loss)(old["critic"])
    once = adam(old["critic"], grads, args.critic_lr)
    twice = jax.tree.map(
        lambda x, g: online.adam_steps(x, lambda _: g, [args.critic_lr] * 2), old["critic"], grads
    )
    close(new.params["critic"], twice, 1e-6)
    close(new.targets["critic"], polyak(state.targets["critic"], twice, 0.005), 1e-7)
    q = jnp.minimum(*values(once, s, actions))
    weights = jnp.exp(jnp.clip(q - state.q_mean / state.q_std, -3, 3) / 1.5)
    close(metrics["weight"], weights.mean(), 1e-5)
    assert new.opt_state["critic"][0].count == 2


# --- the rest ------------------------------------------------------------------------------------


def test_create():
    """Parameters of the paper's size; averages are copies; strong types, so that training compiles
    once."""
    h, s, d = 256, 17, 6
    body = lambda n, out: (n + 1) * h + 2 * (h + 1) * h + (h + 1) * out
    expected = 2 * body(s + d, 1) + body(s + d + 16, d) + 17 * 32 + 33 * 16
    assert online.count_parameters(dpmd, s, d) == expected
    state = jax.jit(partial(dpmd.create, ARGS, S))(KEY)
    close(state.targets, state.params, 0)
    close((np.exp(state.log_alpha), state.q_mean, state.q_std), (5.0, 0.0, 1.0), 1e-6)
    dtypes = jax.tree.map(lambda x: (x.dtype, x.weak_type), state)
    new, _ = jax.eval_shape(partial(dpmd.update, ARGS), state, online.make_batch(ARGS))
    assert jax.tree.map(lambda x: (x.dtype, x.weak_type), new) == dtypes


def test_learning_rate_of_the_policy():
    """3e-4 until 25 % of the updates, 3e-5 from 75 % on; it makes every second update. The public
    code: 25,000 and 75,000 of its 100,000 policy steps, which are 200,000 updates."""
    args = dataclasses.replace(dpmd.Args(), total_steps=9_000, warmup_steps=1_000, action_size=1)
    opt, x = dpmd.optimizers(args)["policy"], jnp.zeros(())
    state = opt.init(x)

    def step(state, _):
        move, state = opt.update(jnp.ones(()), state)
        return state, -move

    _, rate = jax.lax.scan(step, state, None, 4_000)
    share = [0, 999, 1000, 2000, 3000, 3999]
    np.testing.assert_allclose(
        rate[np.array(share)], [3e-4, 3e-4, 3e-4, 1.65e-4, 3e-5, 3e-5], rtol=1e-3
    )
