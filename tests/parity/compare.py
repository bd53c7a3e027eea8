"""Repeats what the official code computed with our scripts, and measures how far they are apart.

    python -m tests.parity.compare [case ...]     prints a row per case, for docs/internals

All arithmetic is in float64. Shapes: B batch, S observation, H chunk length, d action.
"""

import importlib
import sys
from functools import partial, wraps
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from common.sampling import Batch
from tests.parity.cases import CASES, DISTRIBUTIONS, NOT_LOGGED
from tests.parity.noise import Noise

DATA = Path(__file__).parent / "data"
OBSERVATION_SIZE = 5
SIZES = dict(
    chunk_length=3,
    action_size=2,
    discount=0.99,
    pessimism=0.5,
    hidden_dims=(8, 8, 8, 8),
    num_critics=3,
    batch_size=12,
)
ACTIONS = 4


# --- the official numbers ------------------------------------------------------------------------


class Official:
    """The arrays of one case's file. Their names are paths, see README.md."""

    def __init__(self, name):
        with np.load(DATA / f"{name}.npz") as file:
            index = file["index"].astype(str)
            values = file["values"]
        self.arrays = {}
        begin = 0
        for line in index:
            path, shape = line.split(" ")
            shape = [int(x) for x in shape.split(",") if x]
            end = begin + int(np.prod(shape))
            self.arrays[path] = values[begin:end].reshape(shape)
            begin = end
        assert begin == len(values)

    def under(self, folder):
        """Arrays whose path begins with `folder`, by the rest of their path."""
        start = folder + "/"
        paths = [path for path in self.arrays if path.startswith(start)]
        return {path.removeprefix(start): self.arrays[path] for path in paths}

    def batch(self, number):
        """Batch of an update. The last entry of a chunk is the one that counts."""
        arrays = self.under(f"batch{number}")
        return Batch(
            observations=jnp.asarray(arrays["observations"]),
            actions=jnp.asarray(arrays["actions"].reshape(SIZES["batch_size"], -1)),
            rewards=jnp.asarray(arrays["rewards"][:, -1]),
            masks=jnp.asarray(arrays["masks"][:, -1]),
            next_observations=jnp.asarray(arrays["next_observations"][:, -1]),
            valid=jnp.asarray(arrays["valid"][:, -1]),
        )

    def noise(self, folder):
        """Named draws of an update or an action, as arrays of JAX."""
        arrays = self.under(folder)
        integers = [name for name in arrays if DISTRIBUTIONS.get(name) == "randint"]
        arrays |= {name: np.int32(arrays[name]) for name in integers}
        return {name: jnp.asarray(array) for name, array in arrays.items()}


def ours_from(official, networks, like, prefix=""):
    """The official arrays of `networks` as a tree of ours with the paths and shapes of `like`."""
    flat = {}
    for ours in like:
        theirs, layout = networks[ours]
        start = f"{prefix}{theirs}/"
        for path, array in official.items():
            if path.startswith(start):
                flat[ours + renamed(path.removeprefix(start), layout)] = array
    shapes = {path: x.shape for path, x in flatten_dict(like, sep="/").items()}
    assert flat.keys() == shapes.keys()
    for path, array in flat.items():
        # A value network has no axis of one member there, and frequencies have one of one input.
        squeezed = tuple(n for n in shapes[path] if n != 1)
        assert np.squeeze(array).shape == squeezed, path
        flat[path] = jnp.asarray(array.reshape(shapes[path]))
    return unflatten_dict(flat, sep="/")


def renamed(path, layout):
    """Our path of an official array."""
    for start, ours in layout.items():
        if path == start or path.startswith(start + "/"):
            return ours + path.removeprefix(start)
    raise AssertionError(f"{path} has no place in our tree")


# --- our numbers ---------------------------------------------------------------------------------


def load_script(case):
    """The case's script and its arguments. What a case does not set is the script's default."""
    script = importlib.import_module(case.script)
    return script, script.Args(**SIZES, **case.flags)


def start_state(case, script, args, official):
    """Our state with the official parameters and targets, before the first update."""
    key = jax.random.PRNGKey(0)
    like = jax.eval_shape(partial(script.create, args, OBSERVATION_SIZE), key)
    assert set(like.params) == set(case.networks)
    start = official.under("start")
    params = ours_from(start, case.networks, like.params)
    return like.replace(
        params=params,
        targets=ours_from(start, case.networks, like.targets, "target_"),
        opt_state=script.optimizer(args).init(params),
        key=key,
    )


def catching(optimizer, caught):
    """The script's `optimizer`, which also appends every gradient that it gets to `caught`."""

    def make(args):
        original = optimizer(args)

        def update(grads, state, params=None):
            caught.append(grads)
            return original.update(grads, state, params)

        return optax.GradientTransformation(original.init, update)

    return make


def reporting(loss, name):
    """A loss whose value is one of its metrics, `name()`, so that `update` returns it."""

    @wraps(loss)
    def call(*args, **kwargs):
        value, metrics = loss(*args, **kwargs)
        return value, metrics | {f"{name}()": value}

    return call


def make_update(case, script, args):
    """Function (state, batch, noise) -> gradient, new state, metrics with the losses' values."""

    @jax.jit
    def update(state, batch, noise):
        gradients = []
        with Noise(case.noise, noise).replacing(script), pytest.MonkeyPatch.context() as patch:
            for name in case.noise:
                patch.setattr(script, name, reporting(getattr(script, name), name))
            patch.setattr(script, "optimizer", catching(script.optimizer, gradients))
            state, metrics = script.update(args, state, batch)
        (gradient,) = gradients
        return gradient, state, metrics

    return update


def make_act(case, script, args):
    """Function (state, observation, noise) -> action, (H d,)."""

    @jax.jit
    def act(state, observation, noise):
        with Noise({"sample_actions": case.acting}, noise).replacing(script):
            return script.sample_actions(args, state, observation[None], state.key)[0]

    return act


# --- how far they are apart ----------------------------------------------------------------------


def distance(ours, theirs):
    """Largest difference of two arrays in units of the largest entry of the second."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == np.float64
    difference = np.abs(ours - theirs).max()
    if difference == 0:
        return 0.0
    return float(difference / np.abs(theirs).max())


def distances(prefix, ours, theirs):
    """Distance of every array of two trees, by its path."""
    ours = flatten_dict(ours, sep="/")
    theirs = flatten_dict(theirs, sep="/")
    assert ours.keys() == theirs.keys()
    return {f"{prefix}/{path}": distance(array, theirs[path]) for path, array in ours.items()}


def logged_distances(case, official, metrics):
    """Distance of every part that the official code logs and our scripts log, too."""
    values = metrics | {"invalid": share_of_invalid(official)}
    found = {}
    for part, theirs in official.under("logged").items():
        if part not in case.logged:
            assert part in NOT_LOGGED, part
            continue
        ours = 0.0
        for name in case.logged[part]:
            value = values[name.removeprefix("-")]
            ours += -value if name.startswith("-") else value
        found[part] = distance(np.float64(ours), theirs)
    assert found.keys() == case.logged.keys()
    return found


def total_distance(case, official, metrics):
    """Distance of the sums of all losses, the known constant of the official code taken off."""
    ours = sum(metrics[f"{name}()"] for name in case.noise)
    theirs = official.arrays["loss"] - case.invalid_terms * share_of_invalid(official)
    return distance(np.float64(ours), theirs)


def share_of_invalid(official):
    """Share of the first batch's chunks that run over the end of a trajectory."""
    return 1 - official.arrays["batch1/valid"][:, -1].mean()


def errors(case):
    """Distances of everything that a case compares: quantity -> name -> relative distance."""
    with jax.enable_x64(True):
        return _errors(case)


def _errors(case):
    official = Official(case.name)
    script, args = load_script(case)
    state = start_state(case, script, args, official)
    update = make_update(case, script, args)
    act = make_act(case, script, args)

    found = dict(loss={}, logged={}, gradient={}, parameters={}, targets={}, actions={})
    for number in range(1, case.updates + 1):
        batch, noise = official.batch(number), official.noise(f"noise{number}")
        gradient, state, metrics = update(state, batch, noise)
        if number == 1:
            found["loss"] = {"total": total_distance(case, official, metrics)}
            found["logged"] = logged_distances(case, official, metrics)
            theirs = ours_from(official.under("gradient"), case.networks, state.params)
            found["gradient"] = distances("gradient", gradient, theirs)
        after = official.under(f"after{number}")
        theirs = ours_from(after, case.networks, state.params)
        found["parameters"] |= distances(f"after{number}", state.params, theirs)
        theirs = ours_from(after, case.networks, state.targets, "target_")
        found["targets"] |= distances(f"after{number}", state.targets, theirs)
    for number in range(1, ACTIONS + 1):
        arrays = official.noise(f"action{number}")
        noise = {name: arrays[name] for name in case.acting}
        action = act(state, arrays["observation"], noise)
        found["actions"][f"action{number}"] = distance(action, arrays["action"])
    return found


def main(names):
    """Prints the largest distance of every quantity, a row of a Markdown table per case."""
    for name in names or CASES:
        case = CASES[name]
        largest = [max(found.values()) for found in errors(case).values()]
        numbers = [f"{x:.0e}" if x else "0" for x in largest]
        script = case.script.replace(".", "/")
        print("|", " | ".join([f"`{name}`", f"`{script}`", *numbers]), "|")


if __name__ == "__main__":
    main(sys.argv[1:])
