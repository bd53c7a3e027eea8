"""Every online method finds the best action of a bandit of one dimension: critic, policy, averages
and acting together, on what a fixed replay (PPO: its own rollouts) says about its rewards; and its
optimisers are those of the specification."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baselines import ppo
from common.devices import zero_metrics
from common.sampling import Replay
from tests.helpers.online_reference import adam_steps, close, make_args
from tools.shared_blocks import named

OFF_POLICY = [name.replace("/", ".") for name in named("online") if "ppo" not in name]
RATES = dict.fromkeys("actor_lr actor_lr_end critic_lr alpha_lr lr".split(), 3e-3)
SLOW = dict.fromkeys(RATES, 1e-3)  # of QVPO: faster, its samples all meet, where its weights are 0
FEW = dict(num_candidates=8, target_candidates=4, eval_candidates=8, num_proposals=8)


def small(script, **flags):
    """Small and fast, in one dimension; an update is the greater part of a run."""
    flags = RATES | FEW | dict(hidden_dims=(32, 32), warmup_steps=1, batch_size=64) | flags
    known = script.Args.__dataclass_fields__
    return make_args(script, action_size=1, **{k: x for k, x in flags.items() if k in known})


def reward(actions):
    return -4 * (actions[..., 0] - 0.5) ** 2


def played(script, args, state, mode, draws, first=0):
    """Actions, at state 0: one agent's, (draws, 1)."""
    ages = jnp.zeros((1, draws), jnp.int32)
    seeds = first + jnp.arange(draws, dtype=jnp.uint32)[None]
    return np.asarray(script.act(args, state, jnp.zeros((1, draws, 1)), seeds, ages, mode))[0, :, 0]


@pytest.mark.parametrize("name", OFF_POLICY)
def test_off_policy(name):
    script, steps, rows = importlib.import_module(name), 800, 512
    rates = SLOW if "qvpo" in name else {}
    args = small(script, total_steps=steps, replay_size=rows, **rates)
    actions = jax.random.uniform(jax.random.PRNGKey(1), (1, rows, 1), minval=-1)
    blank = dict(observations=jnp.zeros((1, rows, 1)), next_observations=jnp.zeros((1, rows, 1)))
    blank |= dict(masks=jnp.zeros((1, rows)), terminals=jnp.ones((1, rows)))
    size = jnp.full(1, rows, jnp.int32)
    replay = Replay(actions=actions, rewards=reward(actions), size=size, **blank)
    state = jax.vmap(lambda key: script.create(args, 1, key))(jax.random.PRNGKey(0)[None])
    error = lambda state: abs(played(script, args, state, script.MODES[0], 200) - 0.5).mean()
    before = error(state)
    metrics = zero_metrics(partial(script.train_step, args), state, replay)
    state, _ = script.train_chunk(args, state, metrics, replay, steps)
    assert error(state) < min(0.15, before / 2)


def test_ppo():
    args = small(ppo, rollout_steps=64, num_envs=2, total_steps=64 * 40, epochs=10)
    state = jax.vmap(lambda key: ppo.create(args, 1, key))(jax.random.PRNGKey(0)[None])
    before = played(ppo, args, state, "mean", 1)
    empty = ppo.empty_rollout(args, 1, 1)
    metrics = zero_metrics(partial(ppo.train_step, args), state, empty)
    for i in range(40):
        actions = played(ppo, args, state, "explore", 64, first=64 * i).reshape(1, 2, 32, 1)
        ones, s = jnp.ones((1, 2, 32)), jnp.zeros((1, 2, 32, 1))
        rollout = dict(observations=s, next_observations=s, actions=jnp.asarray(actions))
        rollout |= dict(rewards=reward(np.clip(actions, -1, 1)), masks=0 * ones, terminals=ones)
        state, metrics = ppo.train_chunk(args, state, metrics, rollout)
    after = played(ppo, args, state, "mean", 1)
    assert abs(before - 0.5) > 0.3 and abs(after - 0.5) < 0.15


# Rates of Adam by network (or temperature), its b1 and eps, and the largest norm of a gradient.
OPTIMISERS = {
    "fmer": (dict(critic=3e-4, policy=3e-4), 0.9, 1e-8, np.inf),
    "ppo": (dict(both=3e-4), 0.9, 1e-5, 0.5),
    "sac": (dict(critic=1e-3, policy=3e-4, log_alpha=1e-3), 0.9, 1e-8, np.inf),
    "td3": (dict(critic=3e-4, policy=3e-4), 0.9, 1e-8, np.inf),
    "dipo": (dict(critic=3e-4, policy=3e-4), 0.9, 1e-8, 2),
    "dpmd": (dict(critic=3e-4, policy=3e-4, alpha=7e-3), 0.9, 1e-8, np.inf),
    "qvpo": (dict(critic=3e-4, policy=1e-4), 0.9, 1e-5, 2),
    "sac_flow": (dict(critic=1e-3, policy=3e-4, log_alpha=1e-3), 0.5, 1e-8, np.inf),
    "flame": (dict(critic=3e-4, policy=3e-4, alpha=5e-3), 0.9, 1e-8, np.inf),
}


@pytest.mark.parametrize("name", named("online"))
def test_optimisers(float64, name):
    """Three steps, of which the second has a large gradient: a first one alone, from moments of 0,
    says nothing of b1 and b2. The small components show eps."""
    script = importlib.import_module(name.replace("/", "."))
    rates, b1, eps, limit = OPTIMISERS[name.split("/")[-1]]
    both = lambda args: dict(both=script.optimizer(args))
    found = getattr(script, "optimizers", both)(script.Args())
    assert found.keys() == rates.keys()
    grads = jnp.array([[0.3, 1e-5, -1e-8], [-20.0, 3e-5, 2e-8], [0.1, -2e-5, 3e-8]])
    cut = grads * np.minimum(1, limit / np.linalg.norm(grads, axis=1))[:, None]
    for part, rate in rates.items():
        x = jnp.zeros(3)
        state = found[part].init(x)
        for g in grads:
            step, state = found[part].update(g, state)
            x = x + step
        given = iter(cut)
        expected = adam_steps(jnp.zeros(3), lambda _: next(given), [rate] * 3, b1, 0.999, eps)
        close(x / expected, np.ones(3), 1e-4)  # PPO's rate has begun to fall
