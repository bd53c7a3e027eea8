"""Load trained agents from a run folder."""

import importlib
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import flax.serialization
import jax

from analysis.runs import ROOT, read_flags, script_name
from common.checkpoints import CHECKPOINT, read_checkpoint
from common.errors import UserError


class TrainedAgents(NamedTuple):
    """The agents of a run at its last checkpoint."""

    script: ModuleType  # for example qam or baselines.fql
    args: Any  # of the run
    state: Any  # (agents, ...)
    step: int
    seconds: float  # of training until then


def script_of(name: str) -> ModuleType:
    """Imports the script of a method: `fql` and `baselines.fql` are the same one."""
    for module in (name, f"baselines.{name}"):
        path = ROOT / f"{module.replace('.', '/')}.py"
        if path.is_file():
            script = importlib.import_module(module)
            if hasattr(script, "train_chunk"):
                return script
    raise UserError(f"there is no script {name!r}: name one, such as qam or fql")


def load_agents(folder: Path, observation_size: int) -> TrainedAgents:
    """Loads the agents of a run, given the size of its environment's observations."""
    try:
        script = script_of(script_name(folder))
    except UserError as error:
        raise UserError(f"{folder} is not runs/<script>/<env>/<name>: {error}") from None
    args = _arguments(script, read_flags(folder))
    try:
        saved = read_checkpoint(folder / CHECKPOINT)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no checkpoint that can be read: {error}") from None
    tree = saved["state"]
    keys = jax.random.split(jax.random.PRNGKey(0), len(tree["key"]))
    create = partial(script.create, args, observation_size)
    shapes = jax.eval_shape(jax.vmap(create), keys)
    state = flax.serialization.from_state_dict(shapes, tree)
    return TrainedAgents(script, args, state, saved["step"], saved["seconds"])


def agents_of(flags: dict, default_task: int) -> list[tuple[int, int]]:
    """Returns (task, seed) of each agent of a run."""
    tasks = flags.get("tasks", [default_task])
    seeds = range(flags["seed"], flags["seed"] + flags["num_seeds"])
    return [(task, seed) for task in tasks for seed in seeds]


def _arguments(script: ModuleType, flags: dict) -> Any:
    """Returns a run's `Args`; flags that the script no longer has are left out."""
    known = {}
    for name in script.Args.__dataclass_fields__:
        if name in flags:
            value = flags[name]
            known[name] = tuple(value) if isinstance(value, list) else value
    return script.Args(**known)
