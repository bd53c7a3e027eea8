"""A small script's flags, and runs of it that only log and save."""

import csv
import dataclasses
import gc

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from common.flags import Precision, Tracking
from common.run import Run


@dataclasses.dataclass(frozen=True)
class Args:
    # --- method ---
    lr: float = 0.25  # Learning rate.
    # Hidden-layer widths
    # of all networks.
    hidden_dims: tuple[int, ...] = (8,)
    # --- run ---
    env: str = "pointmaze-medium"  # Environment.
    tasks: tuple[int, ...] = (1,)
    name: str = ""
    run_dir: str = "runs"
    workers: int = 0
    track: Tracking = ""
    wandb_project: str = ""
    wandb_entity: str = ""
    wandb_group: str = ""
    eval_only: bool = False
    overwrite: bool = False
    eval_episodes: int = 2
    compile_cache: str = ""
    precision: Precision = "default"
    log_interval: int = 10
    eval_interval: int = 20
    start_training: int = 50
    chunk_length: int = 3
    discount: float = 0.5


ENV_DEFAULTS = {"cube-triple": dict(lr=0.125, discount=0.75), "pointmaze-medium": dict(lr=0.0625)}
AGENTS = [(1, 0), (1, 1), (4, 0)]  # (task, seed)
# Results of two episodes of each agent, as `Episodes` returns them.
EVALUATION = dict(
    success=np.float64([[1, 0], [0, 0], [1, 1]]),
    length=np.float64([[3, 5], [4, 4], [1, 2]]),
    path=np.empty((3, 2), object),
)
EVALUATION["return"] = -EVALUATION["length"]
for index in np.ndindex(3, 2):
    EVALUATION["path"][index] = [np.float32(index)] * 2
DATA = dict(checksum="1234abcd")


def begin(folder, data=DATA, ends=(100,), **flags):
    """Begins or continues a run in `folder`."""
    gc.collect()  # gives up the lock of a run that is no more
    args = Args(**dict(name="default", run_dir=str(folder)) | flags)
    return Run(__file__, args, AGENTS, data, ends)


def metrics(offset=0.0):
    """A row's numbers of each agent."""
    return dict(loss=offset + np.arange(3) / 3, q=jnp.arange(3) + jnp.float32(offset))


def sums(offset=0.0, updates=1):
    """Sums of `metrics` over so many updates."""
    numbers = metrics(offset) | dict(updates=np.full(3, updates))
    return {name: np.float32(x) for name, x in numbers.items()}


@flax.struct.dataclass
class State:
    params: dict


def content(value=0.0):
    """What a script saves, in a small state."""
    return dict(state=State(dict(x=np.full((3, 2), np.float32(value)))))


def restore(run):
    """Restores a run and returns its step and its state's number."""
    step, found = run.restore(content() | dict(metrics=sums()))
    return step, found["state"].params["x"][0, 0]


def go(run, steps):
    """Logs and saves after each of these steps, where it is due; the state is the step."""
    for step in steps:
        run.log_and_save(step, sums(step), content(step))


def table(path):
    """The lines of a table, split."""
    with open(path, newline="") as file:
        return list(csv.reader(file))


def same_bits(first, second):
    """Equal in structure, types, shapes and bits."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save(run, step):
    """Saves a checkpoint of this step in which no evaluation is due."""
    more = dict(step=step, seconds=0.0, evaluation_due=False, metrics=sums())
    run.checkpoints.save(content(step) | more)


def logged(run, table_name="train.csv"):
    """Logs rows of steps 10, 20 and 30, with a checkpoint of step 20.

    Returns the folder and the table's bytes after each step.
    """
    first, contents = run(), []
    for step in (10, 20, 30):
        first.tables.log(table_name, step, metrics(step))
        contents.append((first.folder / table_name).read_bytes())
        if step == 20:
            save(first, step)
    return first.folder, contents


def left_at_20(run):
    """The folder of a run that is no more, with a checkpoint of step 20."""
    first = run()
    restore(first)
    go(first, [20])
    return first.folder
