"""IFQL, exactly: sizes, every loss and gradient against formulas that are written down a second
time (tests/helpers/reference.py, float64), what expectiles and best-of-N become in their limits,
and which copy of a network acts.

Shapes as in baselines/ifql.py: B batch, S observation, A chunk of actions, T flow steps, K critics.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from baselines import ifql
from tests.helpers import reference
from tests.helpers.reference import (
    S,
    check_loss,
    check_update,
    close,
    count_parameters,
    flow_matching,
    gradient,
    make_batch,
    ode,
    pessimistic,
    values,
)

pytestmark = pytest.mark.usefixtures("quick_compile")
arguments = partial(reference.arguments, ifql)
make_state = partial(reference.make_state, ifql)
ARGS = arguments(expectile=0.8, num_candidates=5, pessimism=3.0, discount=0.9)


# --- the formulas again, straight from the specification -----------------------------------------


def acting(args, state, s, key):
    """One observation after the other, one candidate after the other."""
    z = jax.random.normal(key, (args.num_candidates, len(s), args.chunk_length * args.action_size))
    chosen = []
    for b in range(len(s)):
        row, best = s[b : b + 1], None
        for n in range(args.num_candidates):
            action = ode(args, state.params["behavior"], row, z[n, b : b + 1])
            worst_critic = min(q.item() for q in values(state.params["critic"], row, action))
            if best is None or worst_critic > best[0]:
                best = worst_critic, action
        chosen.append(best[1])
    return jnp.concatenate(chosen)


def expected_value(args, params, state, batch, key):
    q = values(state.targets["critic"], batch.observations, batch.actions)
    difference = pessimistic(args, q) - values(params["value"], batch.observations)[0]
    above = args.expectile * difference**2
    below = (1 - args.expectile) * difference**2
    loss = jnp.where(difference >= 0, above, below).sum() / len(difference)
    v = values(params["value"], batch.observations)[0].mean()
    return loss, dict(value_loss=loss, value=v, below=(difference < 0).mean())


def expected_critic(args, params, state, batch, key):
    v = values(state.params["value"], batch.next_observations)[0]
    y = batch.rewards + args.discount**args.chunk_length * batch.masks * v
    q = values(params["critic"], batch.observations, batch.actions)
    return sum((batch.valid * (member - y) ** 2).sum() for member in q) / q.size


def expected_behavior(args, params, state, batch, key):
    return flow_matching(params["behavior"], batch, batch.actions, key)


LOSSES = {  # name -> (of the script, from the specification, the only networks it may move)
    "value": (ifql.value_loss, expected_value, {"value"}),
    "critic": (ifql.critic_loss, expected_critic, {"critic"}),
    "behavior": (ifql.behavior_loss, expected_behavior, {"behavior"}),
}


@pytest.mark.parametrize("sizes, count", [((29, 1, 8), 9_740_307), ((46, 5, 5), 9_949_220)])
def test_parameter_counts(sizes, count):
    assert count_parameters(ifql, *sizes) == count


def test_only_the_critic_has_a_target():
    state = jax.eval_shape(partial(ifql.create, ARGS, S), jax.random.PRNGKey(0))
    assert set(state.targets) == {"critic"}
    assert set(state.params) == {"critic", "value", "behavior"}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients(float64, name):
    """Every loss and its gradient with respect to all networks equal the specification's, in
    float64 to 1e-9; the networks that are not the loss's own get exactly nothing."""
    check_loss(ifql, ARGS, *LOSSES[name])


def test_differences_have_both_signs(float64):
    """The comparison above sees values on both sides of V."""
    state, batch = make_state(ARGS), make_batch(ARGS)
    _, metrics = ifql.value_loss(ARGS, state.params, state, batch, state.key)
    assert 0 < metrics["below"] < 1


def test_update(float64):
    """One Adam step on the sum of all losses; no gradient is clipped."""
    keys = jax.random.split(make_state(ARGS).key, 4)[1:]
    check_update(ifql, ARGS, [loss for _, loss, _ in LOSSES.values()], keys, clipped=False)


@pytest.mark.parametrize("name", LOSSES)
def test_valid_masks_all_but_the_value(float64, name):
    state, batch, key = make_state(ARGS), make_batch(ARGS), jax.random.PRNGKey(7)
    loss = jax.jit(lambda batch: LOSSES[name][0](ARGS, state.params, state, batch, key)[0])
    none, every = (loss(batch._replace(valid=0 * batch.valid + x)) for x in (0, 1))
    assert none == every if name == "value" else (none == 0 and every > 0)


# --- expectiles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", (0.5, 0.9))
def test_value_is_an_expectile(float64, kappa):
    """V(s) that minimises the loss over many actions at one state is scipy's expectile of their
    pessimistic values: for kappa = 0.5 the mean, for larger ones something above it."""
    args = arguments(expectile=kappa, pessimism=0.7, batch_size=400)
    state, batch = make_state(args), make_batch(args)
    batch = batch._replace(observations=0 * batch.observations + 0.3)
    q = values(state.targets["critic"], batch.observations, batch.actions)
    samples = np.asarray(pessimistic(args, q))
    expectile = scipy.stats.expectile(samples, kappa)
    mean = samples.mean()
    assert np.isclose(expectile, mean) if kappa == 0.5 else expectile > mean + 0.1 * samples.std()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ifql, "value", lambda args, params, s: params + jnp.zeros(len(s)))
        loss = lambda v: ifql.value_loss(args, dict(value=v), state, batch, state.key)[0]
        slopes = jax.vmap(jax.grad(loss))(expectile + jnp.array([-0.1, 0, 0.1]))
    assert slopes[0] < -1e-3 and abs(slopes[1]) < 1e-9 and slopes[2] > 1e-3


def test_half_is_least_squares(float64):
    """kappa = 0.5: half of the mean squared error to the pessimistic value, gradient and all."""
    args = dataclasses.replace(ARGS, expectile=0.5)
    inputs = make_state(args), make_batch(args), jax.random.PRNGKey(7)

    def squares(args, params, state, batch, key):
        q = pessimistic(args, values(state.targets["critic"], batch.observations, batch.actions))
        return 0.5 * ((q - values(params["value"], batch.observations)[0]) ** 2).mean()

    close(gradient(ifql.value_loss, args, *inputs), gradient(squares, args, *inputs))


# --- acting --------------------------------------------------------------------------------------


def test_actions(float64):
    """The candidate whose lowest critic is highest, for each observation on its own."""
    state, s, key = make_state(ARGS), make_batch(ARGS).observations, jax.random.PRNGKey(5)
    actions = jax.jit(partial(ifql.sample_actions, ARGS))(state, s, key)
    np.testing.assert_allclose(actions, acting(ARGS, state, s, key), rtol=1e-9, atol=1e-9)
    assert actions.shape == (6, 4) and np.abs(actions).max() <= 1


def test_one_candidate_is_behaviour_cloning(float64):
    """N = 1: the flow's action, whatever the critics say."""
    args = dataclasses.replace(ARGS, num_candidates=1)
    state, s, key = make_state(ARGS), jnp.ones((50, S)), jax.random.PRNGKey(5)
    actions = ifql.sample_actions(args, state, s, key)
    z = jax.random.normal(key, (50, 4))
    close(actions, ode(args, state.params["behavior"], s, z))


def test_more_candidates_are_better(float64):
    """The lowest critic's value at the chosen action grows with N."""
    state, s = make_state(ARGS), jnp.asarray(np.random.default_rng(0).normal(size=(300, S)))
    found = []
    for n in (1, 8):
        args = dataclasses.replace(ARGS, num_candidates=n)
        actions = ifql.sample_actions(args, state, s, jax.random.PRNGKey(n))
        found.append(values(state.params["critic"], s, actions).min(0).mean())
    assert found[0] + 0.1 < found[1]


def test_online_flow_and_critic_act(float64):
    """Neither V nor the target critic enters the actions; online flow and critic do."""
    state, other, s = make_state(ARGS), make_state(ARGS, seed=1), jnp.ones((20, S))
    draw = lambda state: ifql.sample_actions(ARGS, state, s, jax.random.PRNGKey(5))
    params = state.params | dict(value=other.params["value"])
    close(draw(state), draw(state.replace(params=params, targets=other.targets)), 0)
    for name in ("critic", "behavior"):
        params = state.params | {name: other.params[name]}
        assert not np.allclose(draw(state), draw(state.replace(params=params)))
