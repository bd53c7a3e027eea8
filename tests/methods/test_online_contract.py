"""What the online methods have in common: how their networks start, schedules that count updates,
and the protocol of the FMER paper's evaluations."""

import importlib
import inspect

import jax
import numpy as np
import pytest

from tests.helpers.online_reference import make_args
from tools.shared_blocks import named

# Those of PPO and QVPO have other laws, which their own tests check.
LECUN = [name for name in named("online") if name.split("/")[-1] not in ("ppo", "qvpo")]
# Of the standard deviation times the root of the inputs, where it is not 1.
GAINS = {
    "fmer": {"['policy']['params']['MLP_1']['Dense_3']": 0.01},
    "flame": {"['policy']['params']['MLP_2']['Dense_3']": 0.01},
    "sac_flow": {"['policy']['velocity']['MLP_1']['Dense_1']": 0},
}
ONES = "scale", "var"  # as in Renorm's; other vectors are 0
SCHEDULED = ["fmer", "baselines.dpmd", "baselines.qvpo", "baselines.flame"]


def created(name):
    """A new agent's parameters and statistics: path -> array."""
    script = importlib.import_module(name.replace("/", "."))
    args = make_args(script, hidden_dims=(64, 64, 64), action_size=6)
    state = script.create(args, 40, jax.random.PRNGKey(0))
    params = {key: x for key, x in state.params.items() if key != "log_alpha"}
    found = {}
    for tree in (params, getattr(state, "statistics", {})):
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            found[jax.tree_util.keystr(path)] = np.asarray(x)
    return found


@pytest.mark.parametrize("name", LECUN)
def test_how_networks_start(name, quick_compile):
    """Kernels are LeCun's, those of the two critics independent of one another; biases and running
    means are 0, scales and running variances 1."""
    gains = GAINS.get(name.split("/")[-1], {})
    kernels = 0
    for path, x in created(name).items():
        layer, _, kind = path.rpartition("['")
        if not kind.startswith("kernel"):
            assert (x == kind.startswith(ONES)).all(), path
            continue
        kernels += 1
        gain = x.std() * x.shape[-2] ** 0.5
        assert gain == pytest.approx(gains.get(layer, 1), rel=4 / x.size**0.5), path
        if path.startswith("['critic']"):
            first, second = x
            correlation = np.corrcoef(first.ravel(), second.ravel())[0, 1]
            assert abs(correlation) < 5 / first.size**0.5, path
    assert kernels >= 8


def test_updates_of_a_run():
    """Schedules count updates, of which there may be fewer than environment steps; the function is
    the same, character for character, in all scripts that have one."""
    texts = set()
    for name in SCHEDULED:
        script = importlib.import_module(name)
        texts.add(inspect.getsource(script.planned_updates))
        args = make_args(script, total_steps=1_005, warmup_steps=5, env_steps_per_update=5)
        assert script.planned_updates(args) == 200
    assert len(texts) == 1


@pytest.mark.parametrize("name", named("online"))
def test_evaluations_of_the_papers_protocol(name):
    """11 evaluations of 10 episodes lie in the last tenth of a million steps."""
    args = importlib.import_module(name.replace("/", ".")).Args
    assert args.total_steps == 1_000_000
    assert (args.eval_interval, args.eval_episodes) == (10_000, 10)
