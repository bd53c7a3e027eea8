"""What the tables of the online methods are made of: the paper's statistic, and the measures on the
plane, with policies whose answers are known."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np

from benchmarks.learning import online_table, reported
from benchmarks.multigoal import grid, measure
from common.envs import GOALS

AGENTS = 2


def test_reported_statistic():
    """P-1: per seed the best evaluation from 900,000 steps on; deviation with n - 1."""
    steps = np.arange(1, 101) * 10_000
    returns = np.full((5, 100), -1.0)
    returns[:, 88] = 9  # 890,000: too early
    returns[:4, 89] = 1  # 900,000 counts
    returns[4, 99] = 0
    mean, deviation = reported(steps, returns)
    np.testing.assert_allclose([mean, deviation], [0.8, 0.4472], atol=5e-5)


def test_table_of_returns():
    """A row per label, whatever its steps: returns after each third, and the statistic."""
    rows = [
        dict(label=label, seed=seed, step=str(step), **{"return": str(step / 10 + int(seed))})
        for label, end in (("one", 90), ("two", 30)) for seed in "01"
        for step in range(10, end + 1, 10)
    ]  # fmt: skip
    head, _, first, second = online_table(rows).splitlines()
    assert head == "| | steps | return at 1/3 | at 2/3 | at the end | reported |"
    assert first == "| one | 90 | 3.5 [3.0, 4.0] | 6.5 [6.0, 7.0] | 9.5 [9.0, 10.0] | 9.5 (0.7) |"
    assert second == "| two | 30 | 1.5 [1.0, 2.0] | 2.5 [2.0, 3.0] | 3.5 [3.0, 4.0] | 3.5 (0.7) |"


def fake(choose):
    """A script whose policy is `choose`: positions (..., 2), ages -> actions."""

    def act(args, state, observations, seeds, ages, mode):
        return jnp.asarray(choose(np.asarray(observations), mode))[:, :, None]

    state = SimpleNamespace(key=np.zeros((AGENTS, 2)))
    return SimpleNamespace(act=act, MODES=("best", "single")), None, state


def to_goal(positions, goals):
    """Steps of at most 0.5 towards goals."""
    way = goals - positions
    norm = np.maximum(np.linalg.norm(way, axis=-1, keepdims=True), 1e-6)
    return np.float32(way / norm * np.minimum(0.5, norm))


def test_measures_of_the_nearest_goal():
    """Goes to the nearest goal from everywhere, and in all four directions at random at the origin
    (samples alternate): full agreement, coverage near 1, a quarter in each direction."""

    def choose(positions, mode):
        if mode == "single":
            return np.tile(0.5 * GOALS / 5, (AGENTS, positions.shape[1] // 4, 1))
        nearest = np.linalg.norm(positions[..., None, :] - GOALS, axis=-1).argmin(-1)
        return to_goal(positions, GOALS[nearest])

    numbers, shown = measure(*fake(choose), 400)
    np.testing.assert_array_equal(numbers["agreement"], 1)
    np.testing.assert_array_equal(numbers["directions"], np.full((AGENTS, 4), 0.25))
    np.testing.assert_array_equal(numbers["largest_direction"], 0.25)
    np.testing.assert_array_equal(numbers["reached"], 1)
    assert (numbers["coverage"] > 0.98).all() and (numbers["goals"] == 4).all()
    assert numbers["counts"].sum(1).tolist() == [400] * AGENTS
    path, goal = shown[4], shown[5]
    ends = [one[np.isfinite(one[:, 0])][-1] for one in path]
    assert (np.linalg.norm(np.array(ends) - GOALS[goal], axis=-1) < 1).all()


def test_measures_of_one_goal():
    """Goes to (5, 0) from everywhere: no coverage, one direction, a quarter of the grid agrees (and
    a little more: goals that lie behind the nearest one). Standing still reaches nothing."""
    always = lambda positions, mode: to_goal(positions, GOALS[0])
    numbers, _ = measure(*fake(always), 40)
    np.testing.assert_allclose(numbers["coverage"], 0, atol=1e-9)
    np.testing.assert_array_equal(numbers["goals"], 1)
    np.testing.assert_array_equal(numbers["directions"], [[1, 0, 0, 0]] * AGENTS)
    positions, nearest = grid()
    assert (nearest == 0).mean() == 0.25
    assert (numbers["agreement"] >= 0.25).all() and (numbers["agreement"] < 0.5).all()
    numbers, _ = measure(*fake(lambda positions, mode: 0 * positions), 40)
    np.testing.assert_array_equal(numbers["reached"], 0)
    np.testing.assert_array_equal(numbers["agreement"], 0)


def test_grid():
    """Positions of the grid, without those near a goal and near the diagonals."""
    positions, nearest = grid()
    assert np.abs(positions).max() == 6 and len(positions) == len(nearest)
    assert (np.linalg.norm(positions - GOALS[nearest], axis=1) >= 1).all()
    assert (np.abs(np.abs(positions[:, 0]) - np.abs(positions[:, 1])) >= 0.5).all()
    assert len(positions) == 21**2 - (2 * 21 - 1) - 4 * 7  # diagonals; around each goal
