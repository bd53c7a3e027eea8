"""QVPO, exactly: choosing, the TD target, weights of the best and of uniform actions, and a whole
update against the specification written a second time in plain loops (float64). The diffusion,
which is DPMD's word by word, is tested in test_dpmd.py.

Shapes as in baselines/qvpo.py: B batch, S observation, d action, N candidates, T diffusion steps.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from baselines import qvpo
from tests.helpers import online_reference as online
from tests.helpers.diffusion import (
    KEY,
    MILD,
    chains,
    clipped,
    expected_denoising,
    make_state,
    predictor,
)
from tests.helpers.online_reference import S, adam, check_loss, close, polyak, values

pytestmark = pytest.mark.usefixtures("quick_compile")
COUNTS = dict(num_candidates=5, act_candidates=2, target_candidates=8, eval_candidates=4)
make_args = partial(online.make_args, qvpo)
ARGS = make_args(entropy_actions=3, **COUNTS, **MILD)


# --- the formulas again, straight from the specification -----------------------------------------


def offers(args, tree, critics, s, key, count):
    """Actions (N, B, d) of the policy `tree` and their smaller values, by `critics`."""
    actions = chains(args, predictor(qvpo, tree), s, key, count)
    return actions, jnp.minimum(*values(critics, s, actions))


def pick(actions, q):
    return jnp.stack([actions[jnp.argmax(q[:, b]), b] for b in range(q.shape[1])])


def expected_target(args, state, batch, next_actions):
    """Targets choose among the actions, and value their choice."""
    q = jnp.minimum(*values(state.targets["critic"], batch.next_observations, next_actions))
    chosen = pick(next_actions, q)
    next_q = jnp.minimum(*values(state.targets["critic"], batch.next_observations, chosen))
    return args.reward_scale * batch.rewards + args.discount * batch.masks * next_q


def expected_critic(args, state, batch, next_actions, params):
    y = expected_target(args, state, batch, next_actions)
    return sum(((q - y) ** 2).mean() for q in values(params, batch.observations, batch.actions))


@partial(jax.jit, static_argnums=0)
def expected_update(args, state, batch):
    """Parameters, norms of the gradients, weights of the best actions and their values."""
    _, next_key, now_key, uniform_key, loss_key = jax.random.split(state.key, 5)
    old, s, params, norms = state.params, batch.observations, {}, {}

    def descend(name, loss, rate):
        grads, norms[name] = clipped(jax.grad(loss)(old[name]), args.max_grad_norm)
        params[name] = adam(old[name], grads, rate, 1e-5)

    policy, critics = state.targets["policy"], state.targets["critic"]
    inputs = batch.next_observations, next_key, args.target_candidates
    next_actions, next_q = offers(args, policy, critics, *inputs)
    loss = partial(expected_critic, args, state, batch, next_actions)
    descend("critic", loss, args.critic_lr)
    actions, q = offers(args, old["policy"], params["critic"], s, now_key, args.num_candidates)
    advantage = q.max(0) - sum(q) / len(q)
    shape = args.entropy_actions, *batch.actions.shape
    uniform = jax.random.uniform(uniform_key, shape, minval=-1, maxval=1)
    done = state.step / ((args.total_steps - args.warmup_steps) // args.env_steps_per_update)
    e = jnp.minimum(0.02, jnp.maximum(0.002, 0.02 * (1 - done)))
    rows = jnp.stack([pick(actions, q), *uniform])
    weights = jnp.stack([advantage] + [e * advantage] * args.entropy_actions)
    loss = lambda p: expected_denoising(qvpo, args, p, s, rows, weights, loss_key)
    descend("policy", loss, args.actor_lr)
    return params, norms, advantage, e, next_q, q.max(0)


# --- choosing actions ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode, count", [("explore", 2), ("best", 4), ("single", 1)])
def test_modes(float64, mode, count):
    """Online policy and online critics; the modes differ in the number of candidates."""
    args = dataclasses.replace(ARGS, batch_size=40)
    state, s = make_state(qvpo, args), online.make_batch(args).observations
    found = jax.jit(qvpo.sample_actions, static_argnums=(0, 4))(args, state, s, KEY, mode)
    trees = state.params["policy"], state.params["critic"]
    expected = jax.jit(lambda: pick(*offers(args, *trees, s, KEY, count)))()
    close(found, expected, 1e-7)
    assert qvpo.MODES == ("best", "single")


def test_as_many_as_in_training():
    """--act-candidates 0: as many as N."""
    state, s = make_state(qvpo, ARGS), online.make_batch(ARGS).observations
    all_five = dataclasses.replace(ARGS, act_candidates=0)
    same = dataclasses.replace(ARGS, eval_candidates=5)
    act = jax.jit(qvpo.sample_actions, static_argnums=(0, 4))
    close(act(all_five, state, s, KEY, "explore"), act(same, state, s, KEY, "best"), 0)


def test_defaults():
    args = qvpo.Args()
    counts = args.num_candidates, args.act_candidates, args.target_candidates, args.eval_candidates
    assert (*counts, args.entropy_actions, args.max_grad_norm) == (64, 4, 4, 32, 10, 2)


# --- losses and weights: D-4 ---------------------------------------------------------------------


def test_critic_loss(float64):
    state, batch = make_state(qvpo, ARGS), online.make_batch(ARGS)
    next_actions = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (3, 6, 2)))
    loss = lambda params: qvpo.critic_loss(ARGS, params, state, batch, next_actions)
    expected = partial(expected_critic, ARGS, state, batch, next_actions)
    found, _ = check_loss(loss, expected, state.params["critic"])
    metrics = loss(state.params["critic"])[1]
    q = values(state.params["critic"], batch.observations, batch.actions)
    target = expected_target(ARGS, state, batch, next_actions).mean()
    close(metrics, dict(critic_loss=found, q=q.mean(), target=target))


def test_weights(float64):
    """The best value's advantage over the mean; never negative, zero where all candidates tie."""
    q = jnp.asarray(np.random.default_rng(0).normal(size=(64, 500)))
    w = qvpo.weigh(ARGS, q)
    close(w, np.max(q, 0) - np.mean(q, 0))
    assert (w > 0).all()
    for value in (0.1, -37.3):  # whose mean is not exactly itself
        tied = jnp.full((7, 4), jnp.float32(value))
        np.testing.assert_allclose(qvpo.weigh(ARGS, tied), 0, atol=1e-5)
        assert (qvpo.weigh(ARGS, tied) >= 0).all()
    cut = dataclasses.replace(ARGS, policy_weight="cut")
    close(qvpo.weigh(cut, jnp.array([[0.5, 3.0, -9.0], [-2.0, 4.0, -8.0]])), [1.0, 4.0, 1.0])


def test_weight_of_uniform_actions():
    """0.02, 0.015, 0.01, 0.002 at 0, 25, 50 and from 90 % of the updates on."""
    args = make_args(total_steps=12_000, warmup_steps=2_000, env_steps_per_update=5)
    e = [qvpo.entropy_weight(args, jnp.int32(2000 * share)) for share in (0, 0.25, 0.5, 0.9, 1)]
    np.testing.assert_allclose(e, [0.02, 0.015, 0.01, 0.002, 0.002], rtol=1e-5)


def test_rows_of_the_policy_loss(monkeypatch):
    """11 B rows: the best of N own actions, and ten uniform ones with e times its weight."""
    args = make_args(batch_size=400, num_candidates=5, **MILD)
    state, batch, seen = make_state(qvpo, args), online.make_batch(args), {}
    original = qvpo.policy_loss

    def spy(args, params, state, observations, actions, weights, key):
        seen.update(actions=actions, weights=weights)
        return original(args, params, state, observations, actions, weights, key)

    monkeypatch.setattr(qvpo, "policy_loss", spy)
    run = jax.jit(lambda: (qvpo.update(args, state, batch)[1], seen["actions"], seen["weights"]))
    metrics, actions, weights = jax.tree.map(np.asarray, run())
    assert actions.shape == (11, 400, 2) and weights.shape == (11, 400)
    uniform = np.sort(actions[1:].ravel())
    np.testing.assert_allclose(uniform, np.linspace(-1, 1, 8000), atol=0.04)
    assert (weights[0] > 0).all()
    np.testing.assert_allclose(weights[1:], 0.02 * np.tile(weights[0], (10, 1)), rtol=1e-5)
    close(metrics["weight"], weights[0].mean(), 1e-5)
    close(metrics["entropy_weight"], 0.02, 1e-5)


# --- update --------------------------------------------------------------------------------------


def test_update(float64):
    """Critics, then the policy with their new values; each gradient clipped by its own norm; both
    averages at every update."""
    args, limit = ARGS, ARGS.max_grad_norm
    batch, state = online.make_batch(args), make_state(qvpo, args).replace(step=jnp.int32(5000))
    new, metrics = jax.jit(qvpo.update, static_argnums=0)(args, state, batch)
    params, norms, advantage, e, next_q, best = expected_update(args, state, batch)
    assert next_q.argmax(0).max() > 5  # more candidates than others have do matter
    assert norms["critic"] > limit > norms["policy"]
    close(new.params, params, 1e-5)
    for name in params:
        close(metrics[f"{name}_grad_norm"], norms[name], 1e-5)
        factor = min(1, limit / norms[name])
        mu = optax.tree_utils.tree_get(new.opt_state[name], "mu")
        close(optax.global_norm(mu), 0.1 * norms[name] * factor, 1e-5)
    close(new.targets, {k: polyak(state.targets[k], params[k], 0.005) for k in params}, 1e-7)
    close((metrics["weight"], metrics["entropy_weight"]), (advantage.mean(), e), 1e-5)
    close(metrics["q_best"], best.mean(), 1e-5)
    close(e, 0.02 * (1 - 5000 / 14000))
    assert new.step == 5001 and np.array_equal(new.key, jax.random.split(state.key, 5)[0])


# --- the rest ------------------------------------------------------------------------------------


def test_create():
    """Parameters of the paper's size; kernels of deviation 1 / (2 sqrt(inputs)), cut at about two
    deviations, biases of 0; averages are copies; strong types."""
    h, s, d = 256, 17, 6
    body = lambda n, out: (n + 1) * h + 2 * (h + 1) * h + (h + 1) * out
    expected = 2 * body(s + d, 1) + body(s + d + 32, d) + 33 * 256 + 257 * 32
    assert online.count_parameters(qvpo, s, d) == expected
    args = dataclasses.replace(ARGS, hidden_dims=(128, 128))
    state = jax.jit(partial(qvpo.create, args, S))(KEY)
    close(state.targets, state.params, 0)
    for path, x in jax.tree_util.tree_leaves_with_path(state.params):
        if "bias" in str(path):
            assert not x.any()
            continue
        sigma = 0.5 / np.sqrt(x.shape[-2])
        assert np.abs(x).max() < 2.3 * sigma
        if x.size > 1000:
            np.testing.assert_allclose(x.std(), sigma, rtol=0.06)
    dtypes = jax.tree.map(lambda x: (x.dtype, x.weak_type), state)
    new, _ = jax.eval_shape(partial(qvpo.update, args), state, online.make_batch(args))
    assert jax.tree.map(lambda x: (x.dtype, x.weak_type), new) == dtypes
