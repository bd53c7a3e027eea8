"""DIPO, exactly: moving actions uphill, the buffer of moved actions beside the replay, the losses
and a whole update against the specification written a second time in plain loops (float64). The
diffusion, which is DPMD's word by word, is tested in test_dpmd.py.

Shapes as in baselines/dipo.py: B batch, S observation, d action, C rows of the replay.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from baselines import dipo
from common.devices import zero_metrics
from common.sampling import Replay
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
from tools import shared_blocks

pytestmark = pytest.mark.usefixtures("quick_compile")
make_args = partial(online.make_args, dipo)
ARGS = make_args(replay_size=9, move_steps=4, batch_size=4, **MILD)


def make_replay(args, size, seed=0):
    """The last of `size` transitions, in rows of a ring; observation 0 is the number of arrival."""
    rng, C = np.random.default_rng(seed), args.replay_size
    rows = np.zeros((C, S + 3))
    for n in range(size):
        rows[n % C] = [n, *rng.normal(size=S - 1), *rng.uniform(-1, 1, 2), rng.normal()]
    states, actions, rewards = rows[:, :S], rows[:, S : S + 2], rows[:, -1]
    masks = 1.0 * (np.arange(C) % 3 != 1)
    columns = states, states + 1, actions, rewards, masks, 1 - masks
    return Replay(*map(jnp.asarray, columns), size=jnp.int32(size))


def scaled(replay):
    """The same with observations of the size of 1."""
    shrink = lambda x: x * jnp.array([0.1, 1, 1])
    names = "observations", "next_observations"
    return replay.replace(**{name: shrink(getattr(replay, name)) for name in names})


# --- the formulas again, straight from the specification -----------------------------------------


def expected_target(args, state, batch, next_actions):
    next_q = jnp.minimum(*values(state.targets["critic"], batch.next_observations, next_actions))
    return args.reward_scale * batch.rewards + args.discount * batch.masks * next_q


def expected_critic(args, state, batch, next_actions, params):
    y = expected_target(args, state, batch, next_actions)
    return sum(((q - y) ** 2).mean() for q in values(params, batch.observations, batch.actions))


def expected_move(args, gradient, actions):
    """M steps of a new Adam along gradient(actions), clipped by the norm of all of it."""
    a, m, v = actions, 0.0, 0.0
    for n in range(1, args.move_steps + 1):
        g = gradient(a)
        norm = jnp.sqrt((g**2).sum())
        g = g * jnp.where(norm > args.move_clip, args.move_clip / norm, 1)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = args.move_lr * (m / (1 - 0.9**n)) / (jnp.sqrt(v / (1 - 0.999**n)) + 1e-8)
        a = jnp.minimum(jnp.maximum(a + step, -1), 1)
    return a


@partial(jax.jit, static_argnums=0)
def expected_update(args, state, batch, s, actions):
    """Parameters, norms of the gradients and moved actions, for the pairs (s, actions) drawn."""
    _, next_key, _, loss_key = jax.random.split(state.key, 4)
    old, params, norms = state.params, {}, {}

    def descend(name, loss, rate):
        grads, norms[name] = clipped(jax.grad(loss)(old[name]), args.max_grad_norm)
        params[name] = adam(old[name], grads, rate)

    predict = predictor(dipo, state.targets["policy"])
    next_actions = chains(args, predict, batch.next_observations, next_key, 1)[0]
    loss = partial(expected_critic, args, state, batch, next_actions)
    descend("critic", loss, args.critic_lr)
    total = lambda a: jnp.minimum(*values(params["critic"], s, a)).sum()
    moved = expected_move(args, jax.grad(total), actions)
    loss = lambda p: expected_denoising(dipo, args, p, s, moved, jnp.ones(len(s)), loss_key)
    descend("policy", loss, args.actor_lr)
    return params, norms, moved


# --- moving actions: D-2 -------------------------------------------------------------------------


def test_moving_towards_a_maximum(monkeypatch):
    """Q = -|a - c|^2: steps of nearly 0.03 each, until actions are at c or, for a c outside, at
    the border."""
    args = make_args(action_size=3)
    goal = jnp.array([0.4, -0.5, 3.0])
    peak = lambda args, params, s, a: -((a - goal) ** 2).sum(-1) * jnp.array([[1.0], [1.1]])
    monkeypatch.setattr(dipo, "critic", peak)
    start = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (50, 3)))
    ways = [jnp.abs(start - goal).mean()]
    for steps in (1, 10, 30, 300):
        args = dataclasses.replace(args, move_steps=steps)
        moved = dipo.move(args, None, jnp.zeros((50, S)), start)
        assert np.abs(moved).max() <= 1
        ways.append(jnp.abs(moved - goal).mean())
        if steps == 1:  # Adam's first: the rate in every component
            size = jnp.abs(moved - start)[start[:, 2] < 0.97]
            np.testing.assert_allclose(size, 0.03, atol=1e-4)
    assert ways == sorted(ways, reverse=True)
    np.testing.assert_allclose(moved[:, :2], jnp.broadcast_to(goal[:2], (50, 2)), atol=0.02)
    np.testing.assert_array_equal(moved[:, 2], 1)


@pytest.mark.parametrize("limit", [0.16, 1e-7, 100.0])
def test_moving(float64, limit):
    """Random critics; the bound on the gradient of the whole batch matters through Adam's 1e-8 and
    through steps at which it is not reached."""
    args = dataclasses.replace(ARGS, move_clip=limit, move_steps=6, move_lr=0.2)
    params, batch = make_state(dipo, args).params["critic"], online.make_batch(args)
    total = lambda a: jnp.minimum(*values(params, batch.observations, a)).sum()
    expected = jax.jit(partial(expected_move, args, jax.grad(total)))(batch.actions)
    move = jax.jit(dipo.move, static_argnums=0)
    found = move(args, params, batch.observations, batch.actions)
    close(found, expected, 1e-6)
    other = dataclasses.replace(args, move_clip=1e-7 if limit > 1e-7 else 1.0)
    assert np.abs(found - move(other, params, batch.observations, batch.actions)).max() > 1e-3
    assert 0 < (np.abs(found) == 1).sum() < found.size
    none = dataclasses.replace(args, move_steps=0)
    close(move(none, params, batch.observations, batch.actions), batch.actions, 0)


# --- the second buffer ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 9, 10, 22])
def test_drawing(size):
    """Against a dictionary from transitions to moved actions: rows are uniform over what the replay
    holds, and a moved action is forgotten when its transition is overwritten."""
    args = dataclasses.replace(ARGS, batch_size=4000)
    state, replay = jax.jit(partial(dipo.create, args, S))(KEY), make_replay(args, size)
    moved = {n: np.float32([n, 0.5]) for n in range(size) if n % 2}
    for n in sorted(moved):
        row = n % 9
        state = state.replace(moved=state.moved.at[row].set(moved[n]),
                              stamp=state.stamp.at[row].set(n))  # fmt: skip
    rows, arrival, actions = map(np.asarray, dipo.draw(args, state, replay, KEY))
    kept = range(max(0, size - 9), size)
    assert set(arrival) == set(kept)
    assert np.bincount(arrival)[kept.start :].min() > 0.8 * 4000 / len(kept)
    np.testing.assert_array_equal(rows, arrival % 9)
    np.testing.assert_array_equal(replay.observations[rows, 0], arrival)
    for n in kept:
        expected = moved.get(n, np.asarray(replay.actions)[n % 9])
        found = actions[arrival == n]
        np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape))


def test_only_sampled_rows_change(float64):
    """And a later draw goes on from where they were moved to."""
    replay = scaled(make_replay(ARGS, 14))
    batch = jax.tree.map(lambda x: x[:4] if x.ndim else x, replay)
    state = make_state(dipo, ARGS).replace(moved=jnp.full((9, 2), 5.0), stamp=-jnp.ones(9, int))
    new, metrics = jax.jit(dipo.update, static_argnums=0)(ARGS, state, batch, replay)
    draw_key = jax.random.split(state.key, 4)[2]
    rows, arrival, old = dipo.draw(ARGS, state, replay, draw_key)
    untouched = np.setdiff1d(np.arange(9), rows)
    assert 0 < len(untouched) < 9
    np.testing.assert_array_equal(new.moved[untouched], 5)
    np.testing.assert_array_equal(new.stamp[untouched], -1)
    np.testing.assert_array_equal(new.stamp[rows], arrival)
    assert (np.abs(new.moved[rows]) <= 1).all()
    size = np.abs(new.moved[rows] - replay.actions[rows])
    assert size.max() > 0.05
    close(metrics["move"], size.mean())
    again = dipo.draw(ARGS, new, replay, draw_key)
    np.testing.assert_array_equal(again[2], new.moved[rows])
    # An action that comes back equal for equal pairs: the order of writing does not matter.
    pairs = jax.tree.map(lambda x: jnp.concatenate([x, x]), (replay.observations, replay.actions))
    twice = dipo.move(ARGS, state.params["critic"], *pairs)
    close(twice[:9], twice[9:], 1e-12)


def test_training_hands_over_its_own_replay(monkeypatch):
    """`train_chunk`, of two agents: each moves the actions of its own replay, and keeps them."""
    args = dataclasses.replace(ARGS, batch_size=2)
    keys = jax.random.split(KEY, 2)
    state = jax.jit(jax.vmap(partial(dipo.create, args, S)))(keys)
    replays = [scaled(make_replay(args, 12, seed)) for seed in (0, 1)]
    replay = jax.tree.map(lambda *x: jnp.float32(jnp.stack(x)), *replays)
    replay = replay.replace(size=jnp.full(2, 12, jnp.int32))
    monkeypatch.setattr(dipo, "move", lambda args, params, s, a: jnp.round(a) + 10 + 100 * a)
    metrics = zero_metrics(partial(dipo.train_step, args), state, replay)
    state, _ = dipo.train_chunk.__wrapped__(args, state, metrics, replay, 1)
    for agent in range(2):
        stamp, actions = np.asarray(state.stamp[agent]), np.asarray(replay.actions[agent])
        touched = stamp >= 0
        assert 1 <= touched.sum() <= 2
        np.testing.assert_array_equal(stamp[touched] % 9, np.flatnonzero(touched))
        expected = np.round(actions) + 10 + 100 * actions
        np.testing.assert_allclose(state.moved[agent][touched], expected[touched], rtol=1e-5)
    assert not np.allclose(state.moved[0], state.moved[1])


def test_the_fork_changes_one_call():
    """Of the block that scripts share, so that what is tested of theirs holds here."""
    block = lambda path: shared_blocks.blocks(path.read_text())["many agents"]["text"]
    call = "update(args, state.replace(key=key), batch)"
    other = block(shared_blocks.CANONICAL["online"])
    assert other.count(call) == 1
    mine = block(shared_blocks.ROOT / "baselines" / "dipo.py")
    code = lambda text: text[text.index("def create_agents") :]  # after the remark on copies
    assert code(mine) == code(other).replace(call, call[:-1] + ", replay)")


# --- acting, losses, update ----------------------------------------------------------------------


@pytest.mark.parametrize("mode, noise", [("explore", 1.0), ("greedy", 0.0), ("greedy", 0.4)])
def test_modes(float64, mode, noise):
    """One chain of the online policy; in evaluations with less noise. Starts are random."""
    args = dataclasses.replace(ARGS, eval_noise=0.4 if noise == 0.4 else 0.0)
    state, s = make_state(dipo, args), online.make_batch(args).observations
    act = jax.jit(dipo.sample_actions, static_argnums=(0, 4))
    found = act(args, state, s, KEY, mode)
    predict = predictor(dipo, state.params["policy"])
    close(found, jax.jit(lambda: chains(args, predict, s, KEY, 1, noise)[0])(), 1e-7)
    assert np.abs(found - act(args, state, s, jax.random.PRNGKey(1), mode)).max() > 0.1
    assert dipo.MODES == ("greedy",)


def test_critic_loss(float64):
    state, batch = make_state(dipo, ARGS), online.make_batch(ARGS)
    next_actions = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, batch.actions.shape))
    loss = lambda params: dipo.critic_loss(ARGS, params, state, batch, next_actions)
    expected = partial(expected_critic, ARGS, state, batch, next_actions)
    found, _ = check_loss(loss, expected, state.params["critic"])
    metrics = loss(state.params["critic"])[1]
    q = values(state.params["critic"], batch.observations, batch.actions)
    target = expected_target(ARGS, state, batch, next_actions).mean()
    close(metrics, dict(critic_loss=found, q=q.mean(), target=target))


@pytest.mark.parametrize("step", [0, 1])
def test_update(float64, step):
    """Critics, then moved actions, then the policy; the average of the critics always, that of the
    policy, which makes the TD target, at every second update."""
    args, limit = ARGS, ARGS.max_grad_norm
    replay, state = scaled(make_replay(args, 14)), make_state(dipo, args)
    batch = jax.tree.map(lambda x: x[2:6] if x.ndim else x, replay)
    stamps = jnp.asarray([-1, 10, 2, 12, -1, 5, 6, 7, 8])  # 2 is an overwritten one
    moved = jnp.asarray(np.random.default_rng(2).uniform(-1, 1, (9, 2)))
    state = state.replace(step=jnp.int32(step), stamp=stamps, moved=moved)
    new, metrics = jax.jit(dipo.update, static_argnums=0)(args, state, batch, replay)

    key, _, draw_key, _ = jax.random.split(state.key, 4)
    rows = np.asarray(jax.random.randint(draw_key, (4,), 0, 9))
    mine = np.isin(rows, [1, 3, 5, 6, 7, 8])
    assert 0 < mine.sum() < 4
    actions = jnp.where(mine[:, None], moved[rows], replay.actions[rows])
    s = replay.observations[rows]
    params, norms, after = expected_update(args, state, batch, s, actions)
    close(new.params, params, 1e-5)
    close(new.moved[rows], after, 1e-6)
    for name in params:
        close(metrics[f"{name}_grad_norm"], norms[name], 1e-5)
        mu = optax.tree_utils.tree_get(new.opt_state[name], "mu")
        close(optax.global_norm(mu), 0.1 * min(norms[name], limit), 1e-5)
    averages = {k: polyak(state.targets[k], params[k], 0.005) for k in params}
    close(new.targets["critic"], averages["critic"], 1e-7)
    close(new.targets["policy"], (averages if step else state.targets)["policy"], 1e-7)
    q = lambda a: jnp.minimum(*values(params["critic"], s, a)).mean()
    close(metrics["move_gain"], q(after) - q(actions), 1e-5)
    assert q(after) > q(actions)
    assert new.step == step + 1 and np.array_equal(new.key, key)


# --- the rest ------------------------------------------------------------------------------------


def test_create():
    """Parameters of the paper's size, without an MLP for the time; as many rows as the replay has;
    averages are copies; strong types."""
    h, s, d = 256, 17, 6
    body = lambda n, out: (n + 1) * h + 2 * (h + 1) * h + (h + 1) * out
    assert online.count_parameters(dipo, s, d) == 2 * body(s + d, 1) + body(s + d + 32, d)
    state = jax.jit(partial(dipo.create, ARGS, S))(KEY)
    assert state.moved.shape == (9, 2) and state.stamp.tolist() == [-1] * 9
    short = dataclasses.replace(ARGS, replay_size=1000, total_steps=30)
    assert jax.eval_shape(partial(dipo.create, short, S), KEY).moved.shape == (30, 2)
    close(state.targets, state.params, 0)
    replay = make_replay(ARGS, 12)
    batch = jax.tree.map(lambda x: x[:4] if x.ndim else x, replay)
    dtypes = jax.tree.map(lambda x: (x.dtype, x.weak_type), state)
    new, _ = jax.eval_shape(partial(dipo.update, ARGS), state, batch, replay)
    assert jax.tree.map(lambda x: (x.dtype, x.weak_type), new) == dtypes


def test_defaults():
    args = dipo.Args()
    assert (args.move_steps, args.move_lr, args.move_clip) == (30, 0.03, 0.16)
    assert (args.max_grad_norm, args.target_policy_delay, args.eval_noise) == (2, 2, 0)
