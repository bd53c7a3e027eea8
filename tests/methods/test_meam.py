"""ME-AM, exactly: sizes, QAM as a special case, every loss and gradient against formulas that are
written down a second time (loops, explicit Jacobians, float64), and what each loss leaves alone.

Shapes as in meam.py: B batch, S observation, A chunk of actions, T flow steps, K critics.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from jax.tree_util import DictKey

import meam
import qam
from common.errors import UserError
from common.flags import configure
from tests.helpers import reference
from tests.helpers.reference import (
    S,
    check_loss,
    check_update,
    close,
    count_parameters,
    flow_matching,
    gaussian,
    gradient,
    jacobian,
    log_density,
    make_batch,
    memoryless_path,
    mlp,
    ode,
    temporal_difference,
    values,
    velocity,
)

pytestmark = pytest.mark.usefixtures("quick_compile")
OFF = dict(rho=0.0, entropy_scale=0.0)  # QAM
arguments = partial(reference.arguments, meam)
make_state = partial(reference.make_state, meam)

FULL = arguments(rho=0.4, entropy_scale=0.3, path_weight=0.6, inv_temp=2.0, sigma_min=0.2)
VARIANTS = {
    "gate": FULL,
    "no-gate": dataclasses.replace(FULL, score_gate=False),
    "noisy": dataclasses.replace(FULL, noisy_expansion=True, path_weight=1.0, num_critics=3),
}
CASES = [("critic", "gate"), ("score", "gate"), ("expansion", "gate")]
CASES += [("behavior", "gate"), ("behavior", "noisy")]
CASES += [("adjoint", variant) for variant in VARIANTS]


# --- the formulas again, straight from the specification -----------------------------------------


def noise_of(tree, s, a, sigma):
    """eps_psi; its 64 features are sines and cosines of log sigma / wavelength."""
    frequencies = 0.125 * 64 ** (jnp.arange(32) / 31)
    angles = jnp.log(sigma)[..., None] * frequencies
    features = [jnp.sin(angles), jnp.cos(angles)]
    return mlp(tree["params"], jnp.concatenate([s, a, *features], -1), layer_norm=True)


def expected_critic(args, params, state, batch, key):
    z = jax.random.normal(key, batch.actions.shape)
    actions = ode(args, state.params["policy"], batch.next_observations, z)
    return temporal_difference(args, params, state, batch, actions)


def expected_behavior(args, params, state, batch, key):
    actions = batch.actions
    if args.rho > 0:
        coin_key, noise_key = jax.random.split(jax.random.fold_in(key, 2))
        mean, log_std = gaussian(state.params["expansion"], batch.observations, actions)
        noise = jax.random.normal(noise_key, actions.shape) * args.noisy_expansion
        coin = jax.random.bernoulli(coin_key, args.rho, (len(actions), 1))
        actions = coin * jnp.tanh(mean + jnp.exp(log_std) * noise) + (1 - coin) * actions
    return flow_matching(params["behavior"], batch, actions, key)


def reference_field(args, state, s, x, t):
    v = args.path_weight * velocity(state.targets["behavior"], s, x, t)
    if args.path_weight < 1:
        v = v + (1 - args.path_weight) * velocity(state.targets["policy"], s, x, t)
    return v


def path_and_adjoint(args, state, batch, key):
    """x_0..x_{T-1}, x_T, g_0..g_{T-1}, g_T and its critics' part (less its sign), step after step
    with explicit Jacobians."""
    T, s, B = args.flow_steps, batch.observations, len(batch.actions)
    policy = partial(velocity, state.params["policy"], s)
    path, x = memoryless_path(args, policy, partial(reference_field, args, state, s), s, key)

    inside = (jnp.abs(x) <= 1) * 1.0
    q = lambda i, a: values(state.targets["critic"], s[i], a).mean()
    gradient = inside * jacobian(q, jnp.clip(x, -1, 1))
    if args.noisy_expansion:
        size = jnp.sqrt((gradient**2).sum(-1, keepdims=True))
        gradient = jnp.where(size > 1, gradient / size, gradient)
    tilt = args.inv_temp * gradient
    g = -tilt
    if args.entropy_scale > 0:
        floor = jnp.full(B, args.sigma_min)
        query = jnp.clip(x, -1, 1) if args.score_gate else x
        score = -noise_of(state.params["score"], s, query, floor) / args.sigma_min
        g = g + args.entropy_scale * score * (inside if args.score_gate else 1)
    end, adjoint = g, []
    for i in reversed(range(T)):
        t, h = i / T, 1 / T
        f = lambda b, y: 2 * reference_field(args, state, s[b], y, t + h) - y / (t + h)
        g = g + h * jnp.einsum("bi,bij->bj", g, jacobian(f, path[i]))
        adjoint.insert(0, g)
    return path, x, adjoint, end, tilt


def expected_adjoint(args, params, state, batch, key, field=reference_field):
    path, x, adjoint, end, tilt = path_and_adjoint(args, state, batch, key)
    length = lambda g: sum(jnp.sqrt((row**2).sum()) for row in g) / len(g)
    metrics = dict(tilt_norm=length(tilt), score_norm=length(end + tilt))
    metrics |= dict(adjoint_norm=length(adjoint[0]), outside=(abs(x) > 1).mean())
    metrics |= dict(score_ratio=metrics["score_norm"] / metrics["tilt_norm"])
    T, total = args.flow_steps, 0
    for i, (x, g) in enumerate(zip(path, adjoint)):
        sigma = np.sqrt(2 * (1 - i / T + 1 / T) / (i / T + 1 / T))
        v = velocity(params["policy"], batch.observations, x, i / T)
        anchor = field(args, state, batch.observations, x, i / T)
        total += ((2 * (v - anchor) / sigma + sigma * g) ** 2).sum()
    return total / len(batch.actions), metrics


def expected_expansion(args, params, state, batch, key):
    mean, log_std = gaussian(params["expansion"], batch.observations, batch.actions)
    u = mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
    log_prob = log_density(u, mean, log_std)
    q = values(state.params["critic"], batch.observations, jnp.tanh(u)).mean(0)
    actor = (jnp.exp(state.params["log_alpha"]) * log_prob - q).mean()
    entropy, alpha = -jax.lax.stop_gradient(log_prob).mean(), jnp.exp(params["log_alpha"])
    move = abs(jnp.tanh(mean) - batch.actions).sum() / mean.size
    metrics = dict(expansion_entropy=entropy, expansion_alpha=alpha, expansion_move=move)
    return actor + alpha * (entropy + mean.shape[-1] / 2), metrics


def expected_score(args, params, state, batch, key):
    z_key, sigma_key, noise_key = jax.random.split(key, 3)
    z = jax.random.normal(z_key, batch.actions.shape)
    actions = ode(args, state.targets["policy"], batch.observations, z)
    uniform = jax.random.uniform(sigma_key, batch.valid.shape)
    sigma = args.sigma_min * (args.sigma_max / args.sigma_min) ** uniform
    noise = jax.random.normal(noise_key, actions.shape)
    noisy = actions + sigma[:, None] * noise
    predicted = noise_of(params["score"], batch.observations, noisy, sigma)
    return ((predicted - noise) ** 2).sum() / noise.size


LOSSES = {  # name -> (of the script, from the specification, the only networks it may move)
    "critic": (meam.critic_loss, expected_critic, {"critic"}),
    "behavior": (meam.behavior_loss, expected_behavior, {"behavior"}),
    "adjoint": (meam.adjoint_matching_loss, expected_adjoint, {"policy"}),
    "expansion": (meam.expansion_loss, expected_expansion, {"expansion", "log_alpha"}),
    "score": (meam.score_loss, expected_score, {"score"}),
}


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, count",
    [
        (dict(), 11_408_435),
        (dict(entropy_scale=0.0), 10_560_043),
        (dict(rho=0.0), 10_592_802),
        (OFF, 9_744_410),
    ],
)
def test_parameter_counts(flags, count):
    """The paper's 11,408,435 parameters on antmaze, QAM's 9,744,410 without both parts."""
    assert count_parameters(meam, 29, 1, 8, **flags) == count


def test_parts_that_are_off_do_not_exist():
    """lambda = 0: no score network; rho = 0: no expansion; neither lambda nor w < 1: no anchor."""
    everything = {"critic", "behavior", "policy"}

    def parts(**flags):
        state = jax.eval_shape(partial(meam.create, arguments(**flags), S), jax.random.PRNGKey(0))
        adam = optax.tree_utils.tree_get(state.opt_state, "mu")
        assert set(adam) == set(state.params)
        return set(state.params), set(state.targets)

    assert parts(**OFF) == (everything, {"critic", "behavior"})
    assert parts(**OFF | dict(path_weight=0.5)) == (everything, everything)
    assert parts(rho=0.0) == (everything | {"score"}, everything)
    expansion = everything | {"expansion", "log_alpha"}
    assert parts(entropy_scale=0.0) == (expansion, {"critic", "behavior"})
    assert parts() == (expansion | {"score"}, everything)


# --- QAM is lambda = 0, w = 1, rho = 0 -----------------------------------------------------------


def both():
    """The same untrained agent twice, and a batch."""
    ours, theirs = arguments(**OFF), reference.arguments(qam)
    key, batch = jax.random.PRNGKey(3), jax.tree.map(jnp.float32, make_batch(ours))
    create = lambda script, args: jax.jit(partial(script.create, args, S))(key)
    return (meam, ours, create(meam, ours)), (qam, theirs, create(qam, theirs)), batch


def identical(x, y):
    x, y = (jax.tree.flatten(tree) for tree in (x, y))
    return x[1] == y[1] and all(np.array_equal(a, b) for a, b in zip(x[0], y[0]))


def test_qam_losses_bit_for_bit(optimised):
    """Without expansion, entropy and anchor every loss and gradient is QAM's, to the last bit."""
    *agents, batch = both()
    names = ("critic_loss", "behavior_loss", "adjoint_matching_loss")
    results = []
    for script, args, state in agents:

        def losses(params):
            key = jax.random.PRNGKey(5)
            values = [getattr(script, f)(args, params, state, batch, key)[0] for f in names]
            return sum(values), values  # every network gets its gradient from one of them

        results.append(jax.jit(jax.grad(losses, has_aux=True))(state.params))
    assert identical(*results)


def test_qam_updates_bit_for_bit(optimised):
    """Initial state and three updates on the same keys and batches are QAM's, too, and the parts
    that are off cost nothing: equal flops and bytes of the compiled update."""
    *agents, batch = both()
    runs, costs = [], []
    for script, args, state in agents:
        update = jax.jit(lambda state, batch: script.update(args, state, batch)[0])
        update, states = update.lower(state, batch).compile(), [state]
        costs.append(update.cost_analysis())
        for seed in range(3):
            states.append(update(states[-1], jax.tree.map(jnp.float32, make_batch(args, seed))))
        runs.append([vars(state) for state in states])
    assert identical(*runs)
    assert not identical(runs[0][-1]["params"], runs[0][-2]["params"])
    assert costs[0]["flops"] == costs[1]["flops"] > 0
    assert costs[0]["bytes accessed"] == costs[1]["bytes accessed"]


# --- every loss against the specification --------------------------------------------------------


@pytest.mark.parametrize("name, variant", CASES)
def test_losses_and_gradients(float64, name, variant):
    """Every loss and its gradient with respect to all networks equal the specification's, in
    float64 to 1e-9; the networks that are not the loss's own get exactly nothing."""
    check_loss(meam, VARIANTS[variant], *LOSSES[name])


def test_adjoint_batch_is_inside_and_outside_of_the_box(float64):
    """The comparison above sees coordinates on both sides of the clip and, of the noisy variant,
    critic gradients on both sides of norm 1, so that gate, clipped query and clipping matter."""
    for args in VARIANTS.values():
        inputs = make_state(args), make_batch(args), jax.random.PRNGKey(7)  # the compared ones
        plain = dataclasses.replace(args, entropy_scale=0.0, noisy_expansion=False)
        _, x, _, end, _ = jax.jit(partial(path_and_adjoint, plain))(*inputs)
        assert 0.2 < (jnp.abs(x) > 1).mean() < 0.8
        norms = jnp.linalg.norm(end, axis=-1) / args.inv_temp
        assert not args.noisy_expansion or 2 <= (norms > 1).sum() < len(norms) - 1


@pytest.mark.parametrize("entropy_scale", [0.0, 0.3])
def test_acting_without_a_critic(float64, entropy_scale):
    """tau = 0: v_beta acts, unless there is a prior to flatten."""
    args = dataclasses.replace(FULL, inv_temp=0.0, entropy_scale=entropy_scale)
    state, batch, key = make_state(args), make_batch(args), jax.random.PRNGKey(7)
    actions = meam.sample_actions(args, state, batch.observations, key)
    flow = state.params["policy" if entropy_scale else "behavior"]
    z = jax.random.normal(key, batch.actions.shape)
    close(actions, ode(args, flow, batch.observations, z))


def test_update(float64):
    """An update is one Adam step on the sum of all gradients, clipped by their joint norm."""
    first, *more = jax.random.split(make_state(FULL).key, 4)[1:]
    keys = [first, *more, jax.random.fold_in(first, 1), jax.random.fold_in(first, 2)]
    losses = [LOSSES[name][1] for name in ("critic", "behavior", "adjoint", "expansion", "score")]
    check_update(meam, FULL, losses, keys, clipped=True)


# --- single statements ---------------------------------------------------------------------------


def test_proposition_1_identity():
    """w |v - v_b|^2 + (1 - w) |v - v_k|^2 = |v - v_ref|^2 + w (1 - w) |v_b - v_k|^2."""
    rng = np.random.default_rng(0)
    v, base, anchor = rng.normal(size=(3, 100, 5))
    w = rng.uniform(size=(100, 1))
    squared = lambda x: (x**2).sum(-1)
    left = w[:, 0] * squared(v - base) + (1 - w[:, 0]) * squared(v - anchor)
    constant = w[:, 0] * (1 - w[:, 0]) * squared(base - anchor)
    np.testing.assert_allclose(left, squared(v - w * base - (1 - w) * anchor) + constant)


def test_proposition_1_gradient(float64):
    """The loss with v_ref has the gradient of the weighted sum of the losses with either field."""
    args, w = FULL, FULL.path_weight
    state, batch, key = make_state(args), make_batch(args), jax.random.PRNGKey(7)

    def weighted(args, params, *rest):
        single = lambda name: expected_adjoint(
            args, params, *rest, field=lambda args, state, *at: velocity(state.targets[name], *at)
        )[0]
        return w * single("behavior") + (1 - w) * single("policy")

    _, grads = gradient(meam.adjoint_matching_loss, args, state, batch, key)
    close(grads, gradient(weighted, args, state, batch, key)[1])


@pytest.mark.parametrize("name", LOSSES)
def test_valid_masks_critic_and_base_flow_only(float64, name):
    """A chunk that ends too early is left out of the critic's and the base flow's loss, and counts
    in all others."""
    state, batch, key = make_state(FULL), make_batch(FULL), jax.random.PRNGKey(7)
    loss = jax.jit(lambda batch: LOSSES[name][0](FULL, state.params, state, batch, key)[0])
    none, every = (loss(batch._replace(valid=0 * batch.valid + x)) for x in (0, 1))
    assert (none == 0 and every > 0) if name in ("critic", "behavior") else none == every


@pytest.mark.parametrize("rho", (0.0, 0.3, 1.0))
def test_mixture(rho):
    """A fraction rho of whole chunks is replaced with the mode of pi_xi, the rest is the data's."""
    args = arguments(rho=rho, batch_size=20_000)
    state = meam.create(args, S, jax.random.PRNGKey(0))
    batch = jax.tree.map(jnp.float32, make_batch(args))
    mixed = np.asarray(meam.mixture(args, state, batch, jax.random.PRNGKey(1)))
    kept = (mixed == np.asarray(batch.actions)).all(-1)
    assert abs(1 - kept.mean() - rho) < 4 * np.sqrt(0.25 / len(kept))
    if rho:
        mean, _ = gaussian(state.params["expansion"], batch.observations, batch.actions)
        np.testing.assert_allclose(mixed[~kept], jnp.tanh(mean)[~kept], rtol=1e-4, atol=1e-5)


def test_noisy_mixture_is_sampled():
    """The ablation replaces with samples of pi_xi: their spread is that of tanh(u)."""
    args = arguments(rho=1.0, noisy_expansion=True, batch_size=20_000)
    state = meam.create(args, S, jax.random.PRNGKey(0))
    batch = jax.tree.map(lambda x: jnp.float32(0 * x), make_batch(args))
    mixed = meam.mixture(args, state, batch, jax.random.PRNGKey(1))
    u = np.arctanh(np.asarray(mixed, np.float64))  # zero inputs and biases: u ~ N(0, 1)
    assert scipy.stats.kstest(u.ravel(), "norm").pvalue > 1e-3


def test_expansion_log_probability(float64):
    """-entropy of a single sample is scipy's log N(u) - log |d tanh u / du|, and this density has
    mass 1 on (-1, 1)."""
    args = arguments(batch_size=1, chunk_length=1, action_size=1)
    state, batch = make_state(args), make_batch(args)
    head = gaussian(state.params["expansion"], batch.observations, batch.actions)
    mean, log_std = (x.item() for x in head)

    def density(a):
        return scipy.stats.norm.pdf(np.arctanh(a), mean, np.exp(log_std)) / (1 - a**2)

    loss = jax.jit(lambda key: meam.expansion_loss(args, state.params, state, batch, key))
    for seed in range(5):
        key = jax.random.PRNGKey(seed)
        u = mean + np.exp(log_std) * jax.random.normal(key, (1, 1)).item()
        _, metrics = loss(key)
        np.testing.assert_allclose(-metrics["expansion_entropy"], np.log(density(np.tanh(u))), 1e-9)
    u = np.linspace(mean - 9, mean + 9, 100_001) * np.exp(log_std)
    a = np.tanh(u)
    assert abs(np.trapezoid(density(a[np.abs(a) < 1]), a[np.abs(a) < 1]) - 1) < 1e-6


def test_temperature_seeks_half_an_entropy_per_dimension(float64):
    """d L / d log alpha = alpha (H + A / 2): alpha falls while the entropy is above -A / 2. The
    actor's own alpha is a constant."""
    state, batch, key = make_state(FULL), make_batch(FULL), jax.random.PRNGKey(7)
    loss = lambda log_alpha: meam.expansion_loss(
        FULL, state.params | dict(log_alpha=log_alpha), state, batch, key
    )
    grad, metrics = jax.jit(jax.grad(loss, has_aux=True))(jnp.log(0.7))
    close(grad, 0.7 * (metrics["expansion_entropy"] + FULL.chunk_length * FULL.action_size / 2))


@pytest.mark.parametrize("gate", (True, False))
def test_score_gate(float64, gate):
    """Where all of a(1) is outside of the box there is no gradient of the critic and, behind the
    gate, no score either; what is logged is finite all the same."""
    args = dataclasses.replace(FULL, score_gate=gate)
    state, batch = make_state(args), make_batch(args)
    push = lambda path, x: x + 50 * (path[-2:] == (DictKey("Dense_2"), DictKey("bias")))
    moved = {name: state.targets[name] for name in ("behavior", "policy")}
    moved = jax.tree_util.tree_map_with_path(push, moved)
    state = state.replace(targets=state.targets | moved)
    loss = jax.jit(partial(meam.adjoint_matching_loss, args))
    _, metrics = loss(state.params, state, batch, state.key)
    assert metrics["outside"] == 1 and metrics["tilt_norm"] == 0
    assert (metrics["score_norm"] == 0) == gate
    assert np.isfinite(metrics["score_ratio"])


def test_values_on_the_default_environment():
    """Those that the README's first table is of (the ten domains of the papers:
    tests/methods/test_offline_contract.py)."""
    common = dict(inv_temp=0.3, target_rate=0.05, offline_steps=15_000)
    for script, own in ((qam, {}), (meam, dict(rho=0.02, entropy_scale=0.01))):
        args = vars(configure(script.Args, script.ENV_DEFAULTS, script.Args().env))
        assert "pointmaze-medium" in args["env"]
        assert {name: args[name] for name in common | own} == common | own


def test_sigma_limits():
    """A noise floor above the largest noise is refused."""
    arguments(sigma_min=0.5, sigma_max=0.5)
    with pytest.raises(UserError, match="sigma-min"):
        arguments(sigma_min=0.6, sigma_max=0.5)
