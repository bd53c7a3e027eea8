"""FMER, exactly: the derivations behind the method with their numbers, every loss, gradient and
whole update against the specification (float64), acting, temperatures, and what each ablation
changes. Learning on a bandit is in test_fmer_theory.py.

Shapes as in fmer.py: B batch, S observation, d action, N candidates, T integration steps.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import fmer
from common.checkpoints import read_checkpoint
from common.errors import UserError
from common.flags import parse
from common.networks import Critic, TimedMLP, mish
from tests.helpers import online_reference as ref
from tests.helpers.online_reference import (
    S,
    check_loss,
    close,
    gradient,
    make_batch,
    make_state,
    values,
)

pytestmark = pytest.mark.usefixtures("quick_compile")
make_args = partial(ref.make_args, fmer)
ARGS = make_args(total_steps=30, warmup_steps=2, actor_lr=2e-3, actor_lr_end=1e-4, critic_lr=5e-3)
KEY = jax.random.PRNGKey(7)
NODES, MASS = np.polynomial.hermite_e.hermegauss(80)
MASS = MASS / MASS.sum()  # of N(0, 1) at NODES


def some_state(args, step=9, eta=0.3, multiplier=0.2):
    """Random weights in the middle of a run."""
    logs = [jnp.asarray(np.log(x)) for x in (eta, multiplier)]
    return make_state(fmer, args).replace(log_eta=logs[0], log_lambda=logs[1], step=jnp.int32(step))


def random_weights(rng, shape):
    w = rng.random(shape)
    return jnp.asarray(w / w.sum(0))


# --- the formulas again, straight from the specification -----------------------------------------


def field(tree, s, z, t):
    return ref.timed(tree, s, z, 100 * jnp.asarray(t))


def act(args, z):
    return jnp.tanh(z) if args.squash == "tanh" else z


def flow(args, tree, s, z):
    """A plain loop of the solver, then the limits."""
    T, limit = args.flow_steps, 7.2543 if args.squash == "tanh" else 1
    for k in range(T):
        a = field(tree, s, z, k / T)
        if args.solver == "euler":
            slope = a
        else:
            b = field(tree, s, z + a / (2 * T), (k + 0.5) / T)
            slope = b
        if args.solver == "rk4":
            c = field(tree, s, z + b / (2 * T), (k + 0.5) / T)
            slope = (a + 2 * b + 2 * c + field(tree, s, z + c / T, (k + 1) / T)) / 6
        z = z + slope / T
    return jnp.minimum(jnp.maximum(z, -limit), limit)


def noise(args, key, s, count):
    return jax.random.normal(key, (count, len(s), args.action_size))


def expected_target(args, state, batch, actions):
    online, average = state.params["critic"], state.targets["critic"]
    q = values(online, batch.next_observations, actions)
    pick = jnp.minimum(q[0], q[1]).argmax(0)
    chosen = jnp.stack([actions[pick[b], b] for b in range(len(pick))])
    v1, v2 = values(average, batch.next_observations, chosen)
    return args.reward_scale * batch.rewards + args.discount * batch.masks * jnp.minimum(v1, v2)


def expected_critic(args, params, state, batch, actions):
    y = expected_target(args, state, batch, actions)
    q1, q2 = values(params, batch.observations, batch.actions)
    return jnp.mean((q1 - y) ** 2) + jnp.mean((q2 - y) ** 2)


def expected_divergence(args, tree, s, z, t, probe):
    """div of the action's velocity at one point: s (S,), z (d,), t () -> velocity (d,), ()."""
    v = lambda z: field(tree, s, z, t)
    J = jax.jacfwd(v)(z)
    trace = probe @ J @ probe if args.divergence == "hutchinson" else J.trace()
    return v(z), trace - (2 * jnp.tanh(z) @ v(z) if args.squash == "tanh" else 0)


def draws(z1, key):
    """t, z_0 and Hutchinson's probes of a loss, in the order in which the key is split."""
    one, two, three = jax.random.split(key, 3)
    probe = jax.random.rademacher(three, z1.shape, z1.dtype)
    return jax.random.uniform(one, z1.shape[:-1]), jax.random.normal(two, z1.shape), probe


def expected_policy(args, tree, state, s, z1, w, key):
    """Loss, its first part, and the mean divergence."""
    t, z0, probe = draws(z1, key)
    z = (1 - t)[..., None] * z0 + t[..., None] * z1
    point = partial(expected_divergence, args, tree)
    v, div = jax.vmap(jax.vmap(point), (None, 0, 0, 0))(s, z, t, probe)
    error = ((v - z1 + z0) ** 2).sum(-1)
    matching = sum(w[i] @ error[i] for i in range(len(w))) / len(s)
    multiplier = jnp.where(state.step < args.entropy_until, jnp.exp(state.log_lambda), 0)
    return matching - multiplier * div.mean(), matching, div.mean()


def expected_update(args, state, batch):
    """The whole step in the specification's order -> the parts of the new state, and metrics."""
    N, s, s2 = args.num_candidates, batch.observations, batch.next_observations
    key, next_key, now_key, loss_key = jax.random.split(state.key, 4)
    policy, online = state.params["policy"], state.params["critic"]
    averaged = state.targets["policy"] if args.policy_ema else policy
    z_next = flow(args, averaged, s2, noise(args, next_key, s2, N))
    critic_loss, critic_grads = jax.value_and_grad(partial(expected_critic, args))(
        online, state, batch, act(args, z_next)
    )
    new_critic = ref.adam(online, critic_grads, args.critic_lr)

    z1 = z_next
    if args.actor_states == "next":
        s = s2
    else:
        z1 = flow(args, policy, s, noise(args, now_key, s, N))
    q = values(new_critic, s, act(args, z1)).min(0)
    eta, multiplier = jnp.exp(state.log_eta), jnp.exp(state.log_lambda)
    w = {
        "soft": jnp.exp(q / eta) / jnp.exp(q / eta).sum(0),
        "uniform": jnp.full(q.shape, 1 / N),
        "top1": 1.0 * (q == q.max(0)),
    }[args.weights]
    ess = (1 / (w**2).sum(0)).mean()

    def loss(tree):
        value, *more = expected_policy(args, tree, state, s, z1, w, loss_key)
        return value, more

    policy_grads, (matching, div) = jax.grad(loss, has_aux=True)(policy)
    new_policy = ref.adam(policy, policy_grads, args.actor_lr)

    start = 0.669804 if args.squash == "tanh" else 0.5 * np.log(2 * np.pi * np.e)
    entropy = start + div / args.action_size
    planned = (args.total_steps - args.warmup_steps) // args.env_steps_per_update
    share = min(1, int(state.step) / (args.target_entropy_share * planned))
    goal = args.target_entropy_start + share * (args.target_entropy_end - args.target_entropy_start)
    log_lambda, log_eta = state.log_lambda, state.log_eta
    if int(state.step) < args.entropy_until:
        log_lambda += args.lambda_rate * (goal - entropy)
    if args.weights == "soft" and not args.eta_fixed:
        log_eta += args.eta_rate * (args.target_ess * N - ess)
    targets = dict(critic=ref.polyak(state.targets["critic"], new_critic, args.target_rate))
    if args.policy_ema:
        targets["policy"] = ref.polyak(state.targets["policy"], new_policy, args.policy_ema)
    norm = lambda tree: jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(tree)))
    metrics = dict(
        critic_loss=critic_loss, critic_grad_norm=norm(critic_grads), matching_loss=matching,
        policy_grad_norm=norm(policy_grads), entropy=entropy, target_entropy=goal,
        multiplier=multiplier, ess=ess, eta=eta, saturated=(jnp.abs(z1) > 3).mean(),
    )  # fmt: skip
    state = dict(params=dict(critic=new_critic, policy=new_policy), targets=targets,
                 log_eta=log_eta, log_lambda=log_lambda, step=state.step + 1, key=key)  # fmt: skip
    return state, metrics, dict(critic=critic_grads, policy=policy_grads)


# --- losses, gradients, updates ------------------------------------------------------------------


def test_critic_loss(float64):
    """Value and gradient; the choice is the online critics', the value their averages': with either
    role given to the other the loss is another one."""
    args = dataclasses.replace(ARGS, batch_size=12, num_candidates=5)
    state, batch = some_state(args), make_batch(args)
    actions = jnp.tanh(noise(args, KEY, batch.observations, 5))
    loss = partial(fmer.critic_loss, args)
    inputs = state.params["critic"], state, batch, actions
    value, _ = check_loss(loss, partial(expected_critic, args), *inputs)
    q = values(inputs[0], batch.observations, batch.actions)
    target = expected_target(args, *inputs[1:]).mean()
    close(loss(*inputs)[1], dict(critic_loss=value, q=q.mean(), target=target))
    for name in ("params", "targets"):
        trees = state.targets if name == "params" else state.params
        other = state.replace(**{name: getattr(state, name) | dict(critic=trees["critic"])})
        assert abs(gradient(loss, inputs[0], other, *inputs[2:])[0] - value) > 1e-3


@pytest.mark.parametrize("squash", ["tanh", "clip"])
@pytest.mark.parametrize("divergence", ["hutchinson", "exact"])
def test_policy_loss(float64, squash, divergence):
    """Value and gradient of matching and entropy, with unequal weights."""
    args = dataclasses.replace(ARGS, squash=squash, divergence=divergence)
    state, batch = some_state(args, multiplier=0.7), make_batch(args)
    z1 = 2 * noise(args, KEY, batch.observations, 3)
    w = random_weights(np.random.default_rng(0), z1.shape[:2])
    inputs = state.params["policy"], state, batch.observations, z1, w, KEY
    expected = lambda *inputs: expected_policy(args, inputs[0], state, *inputs[2:])[0]
    check_loss(partial(fmer.policy_loss, args), expected, *inputs)


ABLATIONS = [
    {},
    dict(solver="rk2"),
    dict(solver="rk4"),
    dict(squash="clip"),
    dict(weights="uniform"),
    dict(weights="top1"),
    dict(eta_fixed=0.1),
    dict(entropy_until=9),
    dict(divergence="exact"),
    dict(actor_states="next"),
    dict(policy_ema=0.3),
    dict(env_steps_per_update=2, target_entropy_start=0.4, target_entropy_end=-0.3),
]


@pytest.mark.parametrize("flags", ABLATIONS, ids=lambda flags: str(flags))
def test_update(float64, flags):
    """The whole update, as it is and with every ablation, which therefore changes nothing else."""
    args = dataclasses.replace(ARGS, **flags)
    state, batch = some_state(args), make_batch(args)
    new, metrics = jax.jit(fmer.update, static_argnums=0)(args, state, batch)
    expected, values, grads = expected_update(args, state, batch)
    assert (new.key == expected.pop("key")).all() and new.step == expected.pop("step") == 10
    close({name: getattr(new, name) for name in expected}, expected, 2e-7)  # Adam's are float32
    assert {*metrics} == {*values, "q", "target"}
    close({name: metrics[name] for name in values}, values, 1e-6)
    moments = {name: new.opt_state[name][0].mu for name in grads}
    close(moments, jax.tree.map(lambda g: 0.1 * g, grads), 1e-7)


def test_weights_see_the_updated_critics(float64):
    """With a large critic's step the weights of the old critics would differ visibly: the exact
    test of the update has the power to tell."""
    args = dataclasses.replace(ARGS, critic_lr=0.0)
    state, batch = some_state(args), make_batch(args)
    update = jax.jit(fmer.update, static_argnums=0)
    ess = [update(x, state, batch)[1]["ess"] for x in (args, ARGS)]
    assert abs(ess[0] - ess[1]) > 1e-3


def test_nothing_else_gets_a_gradient(float64):
    """F-11: z_t, targets and weights are inputs, and the loss's gradient with respect to the policy
    is that for constants of the same value, although they were made by the same policy."""
    args, batch = dataclasses.replace(ARGS, weights="soft"), make_batch(ARGS)
    state, s = some_state(args), batch.observations

    def through(tree, stop):
        z1 = stop(flow(args, tree, s, noise(args, KEY, s, 3)))
        w = stop(jax.nn.softmax(values(state.params["critic"], s, jnp.tanh(z1)).min(0), 0))
        return fmer.policy_loss(args, tree, state, s, z1, w, KEY)[0]

    tree = state.params["policy"]
    stopped, leaking = (
        jax.jit(jax.grad(partial(through, stop=stop)))(tree)
        for stop in (jax.lax.stop_gradient, lambda x: x)
    )

    def inputs(tree):  # as `update` makes them
        z1 = fmer.candidates(args, tree, s, KEY, 3)
        q = fmer.critic(args, state.params["critic"], s, jnp.tanh(z1)).min(0)
        return z1, fmer.weigh(args, q, 1.0)[0]

    loss = partial(fmer.policy_loss, args)
    found = gradient(loss, tree, state, s, *jax.jit(inputs)(tree), KEY)[1]
    close(found, stopped)
    norm = lambda tree: np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(tree)))
    assert norm(jax.tree.map(jnp.subtract, leaking, stopped)) > 0.01 * norm(stopped)


def test_uniform_weights_without_entropy_are_flow_matching(float64):
    """F-12: the mean over states and candidates of |v - (z_1 - z_0)|^2; F-15: with N = 1 that of
    the one sample, of weight and ESS 1."""
    for N in (3, 1):
        args = dataclasses.replace(ARGS, num_candidates=N, entropy_until=0, weights="uniform")
        state, s = some_state(args), make_batch(args).observations
        z1 = noise(args, KEY, s, N)
        q = jnp.asarray(np.random.default_rng(0).normal(size=(N, len(s))))
        w, ess = fmer.weigh(args, q, 0.5)
        assert ess == pytest.approx(N, rel=1e-12)

        def plain(tree, state, s, z1, w, key):
            t, z0, _ = draws(z1, key)
            v = field(tree, s, z0 + t[..., None] * (z1 - z0), t)
            return ((v - (z1 - z0)) ** 2).sum(-1).mean()

        inputs = state.params["policy"], state, s, z1, w, KEY
        check_loss(partial(fmer.policy_loss, args), plain, *inputs)
    soft = fmer.weigh(dataclasses.replace(args, weights="soft"), q, 0.5)
    assert (soft[0] == 1).all() and soft[1] == 1


# --- derivations, with the specification's numbers -----------------------------------------------


def test_divergence_is_that_of_the_actions(float64):
    """F-1: the trace of the Jacobian of a -> (1 - a^2) v(atanh a), by autodiff."""
    args = dataclasses.replace(ARGS, divergence="exact", action_size=4)
    state, s = some_state(args), make_batch(args).observations
    z = 1.5 * noise(args, KEY, s, 3)
    t = jax.random.uniform(KEY, z.shape[:2])
    tree = state.params["policy"]
    speed, found = jax.jit(partial(fmer.divergence, args))(tree, s, z, t, KEY)
    u = lambda a, s, t: (1 - a**2) * field(tree, s, jnp.arctanh(a), t)
    trace = lambda *x: jax.jacfwd(u)(*x).trace()
    expected = jax.jit(jax.vmap(jax.vmap(trace), (0, None, 0)))(jnp.tanh(z), s, t)
    close(found, expected, 1e-10)
    close(speed, field(tree, s, z, t), 1e-12)


def test_divergence_is_the_change_of_log_density(float64):
    """F-2: along an ODE that is solved finely, its integral is log |det d a_1 / d a_0|."""
    args = dataclasses.replace(ARGS, divergence="exact", solver="rk4", flow_steps=300)
    state, s = some_state(args), make_batch(args).observations[:2]
    tree, a0 = state.params["policy"], jnp.array([[0.3, -0.6], [-0.2, 0.8]])
    h, grid = 1 / 300, jnp.arange(300) / 300

    def action(a0, s):
        z = jnp.arctanh(a0)[None]
        return jnp.tanh(fmer.integrate(args, tree, s[None], z))[0]

    jacobian = jax.vmap(jax.jacfwd(action))(a0, s)

    def slope(carry, t):  # of (z, log-determinant)
        z, _ = carry
        speed, spread = fmer.divergence(args, tree, s, z[None], jnp.full((1, 2), t), KEY)
        return speed[0], spread[0]

    def step(x, t):  # Runge-Kutta of the pair
        move = lambda x, k, h: jax.tree.map(lambda a, b: a + h * b, x, k)
        k1 = slope(x, t)
        k2 = slope(move(x, k1, h / 2), t + h / 2)
        k3 = slope(move(x, k2, h / 2), t + h / 2)
        k4 = slope(move(x, k3, h), t + h)
        for k, part in ((k1, 1), (k2, 2), (k3, 2), (k4, 1)):
            x = move(x, k, part * h / 6)
        return x, None

    (_, total), _ = jax.lax.scan(step, (jnp.arctanh(a0), jnp.zeros(2)), grid)
    close(total, jnp.log(jnp.abs(jnp.linalg.det(jacobian))), 1e-6)
    assert (np.abs(total) > 0.1).all()


MEAN, SIGMA = np.array([0.3, -0.5, 1.0]), np.array([0.4, 0.9, 1.3])


def marginal(mean, sigma):
    """The exact field of the straight paths from N(0, I) to N(mean, diag sigma^2), in place of
    `fmer.velocity`."""

    def velocity(args, params, s, z, t):
        t = jnp.asarray(t)[..., None]
        spread = (1 - t) ** 2 + t**2 * sigma**2
        return mean + (t * sigma**2 - (1 - t)) / spread * (z - t * mean)

    return velocity


def entropy_of(args, z1, monkeypatch, velocity):
    """The estimate of fmer.py for samples z1 (N, B, d) and a given field, in all dimensions."""
    monkeypatch.setattr(fmer, "velocity", velocity)
    s, w = jnp.zeros((z1.shape[1], S)), jnp.ones(z1.shape[:2]) / len(z1)
    _, metrics = fmer.policy_loss(args, {}, some_state(ARGS), s, z1, w, KEY)
    return float(metrics["entropy"]) * z1.shape[-1]


@pytest.mark.parametrize("divergence", ["hutchinson", "exact"])
def test_entropy_of_the_exact_field(float64, monkeypatch, divergence):
    """F-3: the estimate is the entropy, of latents and of actions. Hutchinson's needs no more
    samples, for the Jacobian is diagonal."""
    logs = -2 * np.log(np.cosh(MEAN[:, None] + SIGMA[:, None] * NODES))
    normal = 0.5 * np.log(2 * np.pi * np.e)
    assert np.log(SIGMA).sum() == pytest.approx(-0.759287, abs=1e-6)
    latent, actions = 3 * normal - 0.759287, 0.856731
    assert latent + (MASS * logs).sum() == pytest.approx(actions, abs=1e-5)
    z1 = MEAN + SIGMA * jax.random.normal(jax.random.PRNGKey(1), (2, 100_000, 3))
    for squash, entropy in (("clip", latent), ("tanh", actions)):
        args = dataclasses.replace(ARGS, squash=squash, divergence=divergence, action_size=3)
        found = entropy_of(args, z1, monkeypatch, marginal(MEAN, SIGMA))
        assert found == pytest.approx(entropy, abs=0.01), squash


def test_constants_of_the_entropy(float64, monkeypatch):
    """F-4: without a velocity, 0.669804 per dimension, less than the uniform's log 2; F-20: with
    --squash clip that of a normal distribution, and no correction for any velocity."""
    z1 = noise(ARGS, KEY, np.zeros(6), 3)
    clip = dataclasses.replace(ARGS, squash="clip")
    normal = 0.5 * np.log(2 * np.pi * np.e)
    squashed = normal + MASS @ (-2 * np.log(np.cosh(NODES)))
    none = lambda args, params, s, z, t: jnp.zeros_like(z)
    constant = lambda args, params, s, z, t: 5.0 + 0 * z
    assert squashed == pytest.approx(0.669804, abs=1e-6) and squashed < np.log(2)
    assert entropy_of(ARGS, z1, monkeypatch, none) == pytest.approx(2 * squashed, abs=2e-6)
    for velocity in (none, constant):
        assert entropy_of(clip, z1, monkeypatch, velocity) == pytest.approx(2 * normal, abs=2e-6)


def fit(args, state, z1, w, t, features, monkeypatch):
    """Least squares by `policy_loss` at the time t over fields that are linear in features of z, by
    one Newton step; z1, w: functions of points (m,) that fill N(0, 1) evenly, as the noise does."""
    points = scipy.stats.norm.ppf(scipy.stats.qmc.Sobol(2, seed=0).random(2**15))
    z0, x = jnp.asarray(points.T)
    monkeypatch.setattr(fmer, "velocity", lambda _, c, s, z, t: features(z) @ c[:, None])
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, t))
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: z0.reshape(shape))
    z1, w = z1(x), w(x)
    s = jnp.zeros((z1.shape[1], S))
    loss = jax.jit(lambda c: fmer.policy_loss(args, c, state, s, z1, w, KEY)[0])
    c = jnp.zeros(features(z1).shape[-1])
    return -jnp.linalg.solve(jax.hessian(loss)(c), jax.grad(loss)(c))


def test_entropy_term_flattens_the_density_of_actions(float64, monkeypatch):
    """F-5: with the multiplier lambda the minimiser is the flow's field minus lambda / 2 times the
    score of the *actions'* density; the sign of the correction decides that. 1-D Gaussian."""
    m, sigma, t, multiplier = 0.4, 0.6, 0.7, 0.3
    args, state = dataclasses.replace(ARGS, action_size=1), some_state(ARGS, multiplier=multiplier)
    features = lambda z: jnp.concatenate([jnp.ones_like(z), z, jnp.tanh(z)], -1)
    z1, w = lambda x: (m + sigma * x)[None, :, None], lambda x: jnp.ones((1, len(x)))
    found = fit(args, state, z1, w, t, features, monkeypatch)
    spread = (1 - t) ** 2 + (t * sigma) ** 2
    slope = (t * sigma**2 - (1 - t)) / spread + multiplier / 2 / spread
    expected = [m - slope * t * m, slope, -multiplier]
    np.testing.assert_allclose(expected, [0.2928, 0.3829, -0.3000], atol=1e-4)
    np.testing.assert_allclose(found, expected, atol=0.005)


def test_one_mirror_step(float64, monkeypatch):
    """F-8: candidates N(0, 1), Q = -2 (z - 1)^2, eta = 1: the weighted law is N(0.8, 0.2), whose
    field at t = 1/2 is 4/3 - 4/3 z."""
    args, moments = dataclasses.replace(ARGS, action_size=1, entropy_until=0), []

    def weights(x):
        w, _ = fmer.weigh(args, -2 * (x[:, None] - 1) ** 2, 1.0)
        mean = w[:, 0] @ x
        moments.extend([mean, w[:, 0] @ (x - mean) ** 2])
        return w

    features = lambda z: jnp.concatenate([jnp.ones_like(z), z], -1)
    z1 = lambda x: x[:, None, None]
    found = fit(args, some_state(ARGS), z1, weights, 0.5, features, monkeypatch)
    np.testing.assert_allclose(moments, [0.8, 0.2], atol=0.002)
    np.testing.assert_allclose(found, [4 / 3, -4 / 3], atol=0.005)


def test_hutchinson(float64, monkeypatch):
    """F-6: the mean over all probes is the exact divergence, their variance 2 sum_{i != j} S_ij^2
    of the symmetric part; for d = 1 every probe is exact. Every candidate has a probe of its own.
    """
    exact = dataclasses.replace(ARGS, divergence="exact")
    for d in (1, 3):
        args = dataclasses.replace(ARGS, action_size=d)
        state, s = some_state(args), make_batch(args).observations
        z = noise(args, KEY, s, 2)
        t, tree = jax.random.uniform(KEY, z.shape[:2]), state.params["policy"]
        probes = jnp.array(np.meshgrid(*[[-1.0, 1.0]] * d)).reshape(d, -1).T

        def estimate(probe, args=args, tree=tree, s=s, z=z, t=t):
            with pytest.MonkeyPatch.context() as patch:
                fixed = lambda key, shape, kind: jnp.broadcast_to(probe, shape)
                patch.setattr(jax.random, "rademacher", fixed)
                return fmer.divergence(args, tree, s, z, t, KEY)[1]

        v = lambda z, s, t, tree=tree: field(tree, s, z, t)
        J = jax.jit(jax.vmap(jax.vmap(jax.jacfwd(v)), (0, None, 0)))(z, s, t)
        found = jax.jit(jax.vmap(estimate))(probes)
        expected = jax.jit(lambda: fmer.divergence(exact, tree, s, z, t, KEY)[1])()
        symmetric = (J + jnp.swapaxes(J, -1, -2)) / 2 * (1 - jnp.eye(d))
        close(np.mean(found, 0), expected)
        close(np.var(found, 0), 2 * (symmetric**2).sum((-1, -2)))
        assert d == 1 or np.var(found, 0).min() > 0
    swap = lambda args, params, s, z, t: z[..., ::-1]  # the estimate is 2 e_1 e_2
    monkeypatch.setattr(fmer, "velocity", swap)
    args, z = dataclasses.replace(ARGS, squash="clip"), jnp.zeros((4, 500, 2))
    signs = np.asarray(
        fmer.divergence(args, {}, jnp.zeros((500, S)), z, jnp.zeros((4, 500)), KEY)[1]
    )
    assert {*signs.ravel()} == {-2.0, 2.0}
    assert (np.abs(np.corrcoef(signs)[np.triu_indices(4, 1)]) < 0.2).all()


def test_weights():
    """F-7: invariant under Q + c(s) and a common scale of Q and eta; the limits of eta, with ties;
    sums of 1; the effective number is a mean over states, not over all pairs."""
    rng = np.random.default_rng(0)
    q = jnp.float32(rng.normal(size=(8, 5)))
    weigh = partial(fmer.weigh, ARGS)
    w, ess = weigh(q, 0.7)
    close(w.sum(0), np.ones(5), 1e-6)
    close(w, np.exp(q / 0.7) / np.exp(q / 0.7).sum(0), 1e-5)
    close(ess, np.mean([1 / (w[:, b] ** 2).sum() for b in range(5)]), 1e-5)
    close(weigh(q + 10 * jnp.arange(5), 0.7), (w, ess), 1e-4)
    close(weigh(100 * q, 70.0), (w, ess), 1e-4)
    close(weigh(q, 1e6), (np.full((8, 5), 1 / 8), 8.0), 1e-5)
    tied = jnp.where(jnp.arange(8)[:, None] < 3, 4.0, q - 5)
    close(weigh(tied, 1e-3)[1], 3.0, 1e-6)
    compiled = jax.jit(lambda q, eta: weigh(q, eta)[1])  # rounds q / eta as it likes
    close([compiled(scale * q, 1e-3) for scale in (1e6, 1e9)], [1.0, 1.0], 1e-6)  # no overflow


@pytest.mark.parametrize("N", [1, 2, 4, 8, 16, 32])
def test_ties_have_equal_weights(N):
    """F-14: candidates of the same value, in float32, exactly."""
    for q in (0.0, -123.456, 3e5):
        w, ess = fmer.weigh(ARGS, jnp.full((N, 5), q), 0.01)
        assert (w == 1 / N).all() and ess == N


def test_weights_of_the_ablations(float64):
    """Uniform and top-1 weights do not depend on eta."""
    q = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5)))
    for eta in (0.01, 10.0):
        w, ess = fmer.weigh(dataclasses.replace(ARGS, weights="uniform"), q, eta)
        assert (w == 1 / 8).all() and ess == 8
        w, ess = fmer.weigh(dataclasses.replace(ARGS, weights="top1"), q, eta)
        assert ess == 1 and (w == (q == q.max(0))).all() and (w.sum(0) == 1).all()


# --- the solver ----------------------------------------------------------------------------------

SHRINKAGE = {  # sigma: deviation after T = 5, 10, 20, 50, 200 Euler steps of the exact field
    1.0: [0.771, 0.879, 0.938, 0.975, 0.994],
    0.3: [0.200, 0.247, 0.272, 0.289, 0.297],
    0.1: [0.036, 0.062, 0.080, 0.091, 0.098],
}


def test_euler_shrinks(float64, monkeypatch):
    """F-18: T steps of the exact field of N(0, sigma^2) scale the noise by less than sigma."""
    sigma = jnp.array([*SHRINKAGE])[:, None]
    monkeypatch.setattr(fmer, "velocity", marginal(0.0, sigma))
    found = []
    for T in (5, 10, 20, 50, 200):
        args = dataclasses.replace(ARGS, flow_steps=T)
        found.append(fmer.integrate(args, {}, jnp.zeros((3, S)), jnp.ones((3, 1)))[:, 0])
    np.testing.assert_allclose(np.transpose(found), [*SHRINKAGE.values()], atol=6e-4)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("rk2", 2), ("rk4", 4)])
def test_orders_of_the_solvers(float64, monkeypatch, solver, order):
    """dz/dt = -z^2 cos t has the solution 1 / (1 + sin t): halving the step divides the error by
    2^order."""
    monkeypatch.setattr(fmer, "velocity", lambda args, params, s, z, t: -(z**2) * jnp.cos(t))
    errors = []
    for T in (20, 40):
        args = dataclasses.replace(ARGS, flow_steps=T, solver=solver)
        z = fmer.integrate(args, {}, jnp.zeros((1, S)), jnp.ones((1, 2)))
        errors.append(np.abs(z - 1 / (1 + np.sin(1))).max())
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def test_latents_are_limited(monkeypatch):
    """At atanh(1 - 1e-6), where tanh is still below 1 in float32; with --squash clip at 1."""
    s, away = jnp.zeros((2, S)), jnp.array([[1e3, -1e3], [0.1, -0.2]])
    monkeypatch.setattr(fmer, "velocity", lambda args, params, s, z, t: away)
    for squash, limit in (("tanh", np.arctanh(1 - 1e-6)), ("clip", 1.0)):
        args = dataclasses.replace(ARGS, squash=squash)
        z = fmer.integrate(args, {}, s, jnp.zeros((2, 2)))
        np.testing.assert_allclose(z, [[limit, -limit], [0.1, -0.2]], rtol=1e-5)
        actions = fmer.squash(args, z)
        assert (np.abs(actions) < 1).all() if squash == "tanh" else (actions == z).all()
    small = dataclasses.replace(ARGS, latent_clip=2.0)
    assert np.abs(fmer.integrate(small, {}, s, jnp.zeros((2, 2)))).max() == 2


def test_saturated_actions_are_harmless():
    """F-16: latents of +-20 give the float64 value and gradient in float32."""
    z1 = np.full((3, 6, 2), 20.0) * np.sign(np.random.default_rng(0).normal(size=(3, 6, 2)))
    w, s = random_weights(np.random.default_rng(1), (3, 6)), make_batch(ARGS).observations
    state = some_state(ARGS)
    inputs = state, s, jnp.float32(z1), w, KEY
    step = jax.jit(jax.value_and_grad(partial(fmer.policy_loss, ARGS), has_aux=True))
    (value, metrics), grads = step(state.params["policy"], *inputs)
    assert value.dtype == np.float32
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, metrics, grads)))
    draw = [np.float64(x) for x in draws(jnp.float32(z1), KEY)]
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "draws", lambda *_: [jnp.asarray(x) for x in draw])
        wide = jax.tree.map(lambda x: jnp.asarray(np.float64(x)), (s, z1, w, state.params))
        expected = lambda tree: expected_policy(ARGS, tree, state, *wide[:3], KEY)[0]
        other = jax.jit(jax.value_and_grad(expected))(wide[3]["policy"])
        norm = lambda tree: np.sqrt(sum((np.float64(x) ** 2).sum() for x in jax.tree.leaves(tree)))
        error = jax.tree.map(lambda x, y: np.float64(x) - y, grads, other[1])
        assert value == pytest.approx(float(other[0]), rel=1e-4)
        assert norm(error) < 1e-4 * norm(other[1])


# --- acting --------------------------------------------------------------------------------------


def test_best_of_candidates(float64, monkeypatch):
    """F-17: with Q(s, a) = -|a - c|^2 the nearest of the candidates is executed, and is the one
    that the target values."""
    c = jnp.array([0.3, -0.4])
    nearest = lambda args, params, s, a: -jnp.stack([((a - c) ** 2).sum(-1)] * 2)
    monkeypatch.setattr(fmer, "critic", nearest)
    state, batch = some_state(ARGS), make_batch(ARGS)
    s = batch.observations
    actions = np.asarray(jnp.tanh(flow(ARGS, state.params["policy"], s, noise(ARGS, KEY, s, 3))))
    index = np.linalg.norm(actions - c, axis=-1).argmin(0)
    chosen = actions[index, np.arange(len(s))]
    assert len({*index}) > 1
    close(fmer.sample_actions(ARGS, state, s, KEY, "best"), chosen)
    _, metrics = fmer.critic_loss(ARGS, {}, state, batch, actions)
    value = -((chosen - c) ** 2).sum(-1)
    y = ARGS.reward_scale * batch.rewards + ARGS.discount * batch.masks * value
    close(metrics["target"], y.mean())


@pytest.mark.parametrize(
    "mode, flags, count",
    [
        ("best", {}, 3),
        ("best", dict(act_candidates=1), 3),
        ("single", {}, 1),
        ("explore", {}, 3),
        ("explore", dict(act_candidates=1), 1),
        ("explore", dict(act_candidates=5), 5),
        ("best", dict(policy_ema=0.3), 3),
        ("explore", dict(squash="clip"), 3),
    ],
)
def test_modes(float64, mode, flags, count):
    """How many candidates count in each mode; the smaller online critic ranks them. The averaged
    policy acts where there is one."""
    args = dataclasses.replace(ARGS, **flags)
    state, s = some_state(args), make_batch(args).observations
    tree = state.targets["policy"] if "policy_ema" in flags else state.params["policy"]
    actions = act(args, flow(args, tree, s, noise(args, KEY, s, count)))
    pick = values(state.params["critic"], s, actions).min(0).argmax(0)
    expected = np.stack([actions[n, b] for b, n in enumerate(pick)])
    found = jax.jit(fmer.sample_actions, static_argnums=(0, 4))(args, state, s, KEY, mode)
    close(found, expected)
    assert (np.abs(found) <= 1).all() and fmer.MODES == ("best", "single")


# --- temperatures and schedules ------------------------------------------------------------------


@pytest.mark.parametrize("entropy, multiplier", [(-0.6, +1), (-0.4, -1)])
@pytest.mark.parametrize("spread, temperature", [(0.0, -1), (1e6, +1)])
def test_directions(monkeypatch, entropy, multiplier, spread, temperature):
    """F-13: an ESS above its target lowers eta, one below raises it; a missing entropy raises
    lambda. Steps in the logarithm, per dimension and per effective candidate."""
    args = dataclasses.replace(ARGS, num_candidates=8, action_size=2)
    args = dataclasses.replace(args, target_entropy_start=-0.5, target_entropy_end=-0.5)
    state, after = dual_step(monkeypatch, args, lambda i: entropy, lambda i: spread)
    ess = 8 if spread == 0 else 1
    close(after.log_lambda - state.log_lambda, 1e-2 * (-0.5 - entropy), 1e-6)
    close(after.log_eta - state.log_eta, -1e-3 * (ess - 4), 1e-6)
    assert np.sign(after.log_lambda - state.log_lambda) == multiplier
    assert np.sign(after.log_eta - state.log_eta) == temperature


def test_duals_by_adam(monkeypatch):
    """The other reading: steps of Adam with the policy's rate on both logarithms, twice."""
    args = dataclasses.replace(ARGS, num_candidates=8, dual_optimizer="adam", actor_lr=2e-3)
    args = dataclasses.replace(args, target_entropy_start=-0.5, target_entropy_end=-0.5)
    state, batch = some_state(args), make_batch(args)
    stub(monkeypatch, lambda i: jnp.where(i % 2 == 0, 0.3, -0.4), lambda i: 0.0)
    update = jax.jit(partial(fmer.update, args))
    after, _ = update(*(update(state, batch)[0], batch))
    first = 0.3 if state.step % 2 == 0 else -0.4
    slopes = iter([first + 0.5, -0.1 - first + 0.5])  # the entropy less its target
    moved = ref.adam_steps(state.log_lambda, lambda _: next(slopes), [2e-3] * 2)
    close(after.log_lambda, moved, 1e-6)
    close(after.log_eta, state.log_eta - 2 * 2e-3, 1e-6)  # ESS 8, target 4: the same slope twice


def stub(monkeypatch, entropy, spread):
    """Losses that cost nothing: the entropy and the differences between candidates' values are
    functions of the update, which the observations tell to the critic."""
    idle = lambda params: 0.0 * sum(x.sum() for x in jax.tree.leaves(params))

    def policy_loss(args, params, state, *_):
        return idle(params), dict(entropy=jnp.float32(entropy(state.step)))

    def critic(args, params, observations, actions):
        rank = jnp.arange(len(actions), dtype=jnp.float32)[:, None]
        return jnp.stack([spread(observations[..., 0].astype(int)) * rank] * 2)

    monkeypatch.setattr(fmer, "policy_loss", policy_loss)
    monkeypatch.setattr(fmer, "critic_loss", lambda args, params, *_: (idle(params), {}))
    monkeypatch.setattr(fmer, "critic", critic)
    latents = lambda args, flow, s, key, count: jnp.zeros((count, len(s), args.action_size))
    monkeypatch.setattr(fmer, "candidates", latents)


def dual_step(monkeypatch, args, entropy, spread):
    state, batch = some_state(args), make_batch(args)
    stub(monkeypatch, entropy, spread)
    return state, jax.jit(partial(fmer.update, args))(state, batch)[0]


def test_temperatures_stay_in_range(monkeypatch):
    """F-13: 1e5 updates in which the entropy and the values do their worst, for long and in turns;
    both temperatures reach both ends and leave them again."""
    args = make_args(hidden_dims=(1,), batch_size=1, num_candidates=8)
    state = make_state(fmer, args)
    phase = lambda i: (i // 5000) % 2
    entropy = lambda i: jnp.where(i < 50_000, 1e3 * (1 - 2 * phase(i)), 3.0 * (-1) ** (i % 2))
    spread = lambda i: jnp.where(i < 50_000, 1e6 * phase(i), 1e6 * (i % 2))
    stub(monkeypatch, entropy, spread)

    def step(state, i):
        batch = make_batch(args)
        batch = batch.replace(observations=jnp.full((1, S), i, jnp.float32))
        state, metrics = fmer.update(args, state, batch)
        return state, (metrics["eta"], metrics["multiplier"], metrics["ess"])

    run = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(100_000)))
    _, (eta, multiplier, ess) = jax.tree.map(np.asarray, run(state))
    assert {*ess} == {1.0, 8.0}
    for x, low, high in ((eta, 1e-3, 100), (multiplier, 1e-3, 10)):
        np.testing.assert_allclose([x.min(), x.max()], [low, high], rtol=1e-4)
        assert x[0] == pytest.approx(0.5) and (np.abs(np.diff(np.sign(x - 1))) > 0).sum() >= 8


def test_target_entropy():
    """Linear over a share of the planned updates, then constant."""
    args = make_args(total_steps=2100, warmup_steps=100, env_steps_per_update=2)
    args = dataclasses.replace(args, target_entropy_share=0.5)
    assert fmer.planned_updates(args) == 1000
    found = [fmer.target_entropy(args, jnp.int32(step)) for step in (0, 100, 250, 500, 501, 5000)]
    np.testing.assert_allclose(found, [0, -0.2, -0.5, -1, -1, -1], atol=1e-6)
    defaults = fmer.Args()
    end = int(0.7 * (defaults.total_steps - defaults.warmup_steps))
    assert fmer.target_entropy(defaults, end // 2) == pytest.approx(-0.5)


def test_class_holds_the_values_of_the_paper_or_of_the_page():
    """What no other test would miss (docs/methods/fmer.md names the sources)."""
    args = fmer.Args()
    assert (args.flow_steps, args.num_candidates, args.batch_size) == (10, 8, 256)
    assert (args.solver, args.weights, args.squash) == ("euler", "soft", "tanh")
    assert (args.divergence, args.actor_states) == ("hutchinson", "current")
    assert not (args.act_candidates or args.eta_fixed or args.policy_ema)
    assert args.entropy_until > args.total_steps
    assert (args.reward_scale, args.discount, args.target_rate) == (0.2, 0.99, 0.005)
    assert (args.actor_lr, args.actor_lr_end, args.critic_lr) == (3e-4, 3e-5, 3e-4)
    assert args.latent_clip == pytest.approx(np.arctanh(1 - 1e-6), abs=1e-4)
    assert (args.total_steps, args.warmup_steps, args.replay_size) == (10**6, 10**4, 10**6)


def test_learning_rates():
    """Adam's step for gradients of one sign is the rate: constant to 25 %, linear to 75 % of
    the planned updates, constant to the end; the critics' does not change."""
    args = make_args(total_steps=900, warmup_steps=100, env_steps_per_update=5)
    args = dataclasses.replace(args, actor_lr=3e-4, actor_lr_end=3e-5)
    optimizers = fmer.optimizers(args)
    rates = {}
    for name, optimizer in optimizers.items():

        def step(state, _, optimizer=optimizer):
            change, state = optimizer.update(jnp.float32(1.0), state)
            return state, -change

        start = optimizer.init(jnp.float32(0.0))
        rates[name] = np.asarray(jax.lax.scan(step, start, None, 160)[1])
    expected = np.interp(np.arange(160), [40, 120], [3e-4, 3e-5])
    np.testing.assert_allclose(rates["policy"], expected, rtol=1e-3)
    np.testing.assert_allclose(rates["critic"], args.critic_lr, rtol=1e-3)


# --- a new agent, and its networks ---------------------------------------------------------------


def test_new_agent():
    """Kernels LeCun-normal, biases 0, the policy's last layer a hundredth of that; targets equal
    the critics; temperatures as asked for."""
    args = make_args(hidden_dims=(256, 256, 256), action_size=6)
    state = jax.jit(partial(fmer.create, args, 17))(KEY)
    trees = dict(critic=state.params["critic"], policy=state.params["policy"])
    for path, x in jax.tree_util.tree_leaves_with_path(trees):
        name = jax.tree_util.keystr(path)
        if "bias" in name:
            assert not x.any(), name
            continue
        last = "'policy'" in name and "MLP_1" in name and "Dense_3" in name
        ratio = x.std() * x.shape[-2] ** 0.5 / (0.01 if last else 1)
        assert abs(ratio - 1) < 5 / np.sqrt(2 * x.size), name
    q1, q2 = np.asarray(trees["critic"]["params"]["VmapMLP_0"]["Dense_0"]["kernel"])
    assert not np.allclose(q1, q2)  # independent
    close(state.targets, dict(critic=trees["critic"]), 0)
    close([state.log_eta, state.log_lambda], [np.log(0.5)] * 2, 1e-6)
    fixed = dataclasses.replace(args, eta_fixed=0.1, policy_ema=0.005)
    other = jax.jit(partial(fmer.create, fixed, 17))(KEY)
    close(other.log_eta, np.log(0.1), 1e-6)
    close(other.targets, state.params, 0)
    S, d, h = 17, 6, 256
    head, body = 16 * 32 + 32 + 32 * 16 + 16, 2 * (h * h + h)
    policy = head + (S + d + 16) * h + h + body + h * d + d
    critics = 2 * ((S + d) * h + h + body + h + 1)
    assert ref.count_parameters(fmer, S, d) == policy + critics


def test_updates_keep_types():
    """A state goes through an update with the same types, none of them weak: one program serves all
    updates."""
    args = dataclasses.replace(ARGS, policy_ema=0.1)
    state = jax.eval_shape(partial(fmer.create, args, S), KEY)
    batch = jax.tree.map(lambda x: x.astype(np.float32), make_batch(args))
    after, _ = jax.eval_shape(partial(fmer.update, args), state, batch)
    kind = lambda x: (x.shape, x.dtype, x.weak_type)
    assert jax.tree.map(kind, state) == jax.tree.map(kind, after)
    assert not any(x.weak_type for x in jax.tree.leaves(state))


@pytest.mark.parametrize("observation_size, d", [(17, 6), (348, 17)])
def test_first_entropy(observation_size, d):
    """F-10: that of tanh(N(0, I)), for 2048 candidates of a new agent."""
    args = make_args(action_size=d, hidden_dims=(64, 64), batch_size=256, num_candidates=8)
    state = jax.jit(partial(fmer.create, args, observation_size))(KEY)
    batch = make_batch(args, observation_size=observation_size)
    _, metrics = jax.jit(partial(fmer.update, args))(state, batch)
    assert metrics["entropy"] == pytest.approx(0.6698, abs=0.02)
    assert metrics["saturated"] < 0.01
    sample = jax.jit(partial(fmer.sample_actions, args, mode="single"))
    latents = np.arctanh(sample(state, batch.observations, KEY))
    assert abs(latents.mean()) < 0.1 and abs(latents.std() - 1) < 0.1


def test_mish(float64):
    """jax.nn.mish and its first and second derivative, in both modes of autodiff; finite far out,
    in float32, too."""
    x = jnp.concatenate([jnp.linspace(-40, 40, 4001), jnp.array([-1e4, 1e4, 0.0])])
    each = lambda f: jax.vmap(f)(x)
    close(each(mish), each(jax.nn.mish), 1e-12)
    once, twice = jax.grad(jax.nn.mish), jax.grad(jax.grad(jax.nn.mish))
    close(each(jax.grad(mish)), each(once), 1e-10)
    close(each(jax.jacfwd(mish)), each(once), 1e-10)
    close(each(jax.grad(jax.grad(mish))), each(twice), 1e-8)
    close(each(jax.grad(jax.jacfwd(mish))), each(twice), 1e-8)
    close(each(jax.jacfwd(jax.grad(mish))), each(twice), 1e-8)
    far = jnp.float32([-1e30, -200, -88, 0, 30, 89, 200, 1e30])
    for f in (mish, jax.grad(mish), jax.grad(jax.grad(mish))):
        assert np.isfinite(jax.vmap(f)(far)).all()
    close(jax.vmap(mish)(far), jax.vmap(jax.nn.mish)(far), 1e-6)


@pytest.mark.parametrize("count, embed, times", [(16, (32, 16), 1), (8, (), 1), (6, (5,), 2)])
def test_timed_network(float64, count, embed, times):
    """The formula of the body and of its sinusoids, with and without an embedding, for one and two
    times; a larger `scale` of the last kernel is a larger output."""
    net = TimedMLP((8, 7), sinusoids=count, embed=embed)
    s, x = jnp.ones((6, S)), noise(ARGS, KEY, np.zeros(6), 3)
    ts = [jax.random.uniform(k, (3, 6)) for k in jax.random.split(KEY, times)]
    tree = net.init(KEY, s, x, *ts)
    out = net.apply(tree, s, x, *ts)
    close(out, ref.timed(tree, s, x, *ts, count=count), 1e-6)
    close(net.apply(tree, s, x, *[0.3] * times), net.apply(tree, s, x, *[0 * t + 0.3 for t in ts]))
    scaled = TimedMLP((8, 7), sinusoids=count, embed=embed, scale=0.01)
    close(scaled.apply(scaled.init(KEY, s, x, *ts), s, x, *ts), 0.01 * out, 1e-6)


@pytest.mark.parametrize("size, tolerance", [(2, 0), (40, 1e-12)])
def test_candidates_share_the_part_of_their_state(float64, size, tolerance):
    """Many actions at one state, given once: what the state repeated for each of them gives, with
    values and gradients; to the last bit where the state is too small to be taken apart."""
    rng = np.random.default_rng(0)
    s, a = jnp.asarray(rng.normal(size=(6, size))), jnp.asarray(rng.normal(size=(5, 6, 2)))
    repeated = jnp.broadcast_to(s, (5, 6, size))
    t = jnp.asarray(rng.random((5, 6)))
    nets = (Critic((8, 7), 2, False, mish), (a,)), (TimedMLP((8, 7), sinusoids=6), (a, t))
    for net, inputs in nets:
        tree = net.init(KEY, s, *inputs)
        assert jax.tree.map(jnp.shape, tree) == jax.tree.map(
            jnp.shape, net.init(KEY, repeated, *inputs)
        )
        total = lambda tree, s, net=net, inputs=inputs: (net.apply(tree, s, *inputs) ** 2).sum()
        run = jax.jit(jax.value_and_grad(total))
        close(run(tree, s), run(tree, repeated), tolerance)


# --- refusals ------------------------------------------------------------------------------------


def test_refusals():
    """The averaged policy's candidates are not the current policy's, which mirror descent needs."""
    flags = ["--actor-states", "next"]
    with pytest.raises(UserError, match="leave out --policy-ema"):
        parse(fmer.Args, fmer.ENV_DEFAULTS, [*flags, "--policy-ema", "0.005"])
    assert parse(fmer.Args, fmer.ENV_DEFAULTS, flags).actor_states == "next"
    for flag, value in (("--flow-steps", "0"), ("--num-candidates", "0"), ("--eta-init", "0")):
        with pytest.raises(UserError, match=f"{flag} must be greater than 0"):
            parse(fmer.Args, fmer.ENV_DEFAULTS, [flag, value])


def test_nan_stops_the_run(monkeypatch, tmp_path):
    """F-14: one NaN in the critics' values is an error at the next row of the log, which names it;
    no later checkpoint is written."""
    args = make_args(
        run_dir=str(tmp_path), total_steps=40, warmup_steps=5, log_interval=5, eval_interval=20,
        eval_episodes=1, eval_slots=1, workers=1, name="default",
    )  # fmt: skip
    update = fmer.update

    def spoilt(args, state, batch):
        new, metrics = update(args, state, batch)
        poison = lambda x: x.at[(0,) * x.ndim].set(
            jnp.where(state.step == 22, jnp.nan, x.ravel()[0])
        )
        critic = jax.tree.map(poison, new.params["critic"])
        return new.replace(params=new.params | dict(critic=critic)), metrics

    monkeypatch.setattr(fmer, "update", spoilt)
    with pytest.raises(UserError, match="not finite at step 30"):
        fmer.main(args)
    folder = tmp_path / "fmer" / "multigoal" / "default"
    rows = (folder / "train.csv").read_text().splitlines()
    assert [row.split(",")[2] for row in rows[1:]] == ["10", "15", "20", "25"]
    assert read_checkpoint(folder / "checkpoint.msgpack")["step"] == 20
