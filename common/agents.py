"""Scripts from Python: train, load a trained agent, choose actions, play an episode.

    folder = train(meam, env="pointmaze-medium", offline_steps=5_000)
    agent = load_agent(folder)
    env = make_env(agent.env)  # of common.environments
    policy = agent.policy(seed=0)
    observation, _ = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(policy(observation))

The folder may have been moved, and its script renamed, edited or removed: a run keeps its script's
source. Loading runs this source with the rights of your program, so load only folders that you
trust, or pass your own copy of the script as `script`.
"""

import dataclasses
import hashlib
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import flax.serialization
import jax
import numpy as np
from numpy.typing import ArrayLike

from common.checkpoints import CHECKPOINT, PREVIOUS, check_same_arrays, read_checkpoint
from common.devices import matmul_precision
from common.env_pool import Normalization, normalize
from common.environments import env_name
from common.errors import UserError
from common.files import file_errors, read_config
from common.flags import as_command_line, parse
from common.run import SCRIPT, run_folder


def train(script: ModuleType, **flags: Any) -> Path:
    """Trains as a script's command line does with these flags, and returns the run's folder.

    The same call continues a run that was stopped. Raises UserError for what cannot be run.
    """
    try:
        args = parse(script.Args, script.ENV_DEFAULTS, as_command_line(flags))
    except SystemExit:
        raise UserError(f"{script.__name__} cannot take these flags, see above: {flags}") from None
    script.main(args)
    return run_folder(script.__file__, args)


class TrainedAgents(NamedTuple):
    """All agents of a run at its last checkpoint."""

    script: ModuleType  # with the source that the run had last
    args: Any  # the flags of the run
    agents: list[tuple[int, int]]  # (task, seed) of each
    state: Any  # their State, with a leading axis of agents
    step: int
    seconds: float  # of training until then
    observation_size: int
    normalization: Normalization  # of observations
    name: str  # of the script


class Agent:
    """One agent of a run, which acts as it does in evaluations.

    `args` are the run's flags, `env` is the name that `make_env` takes, `step` is that of the
    checkpoint, and `state` is as the script's functions take it, without an axis of agents.
    """

    def __init__(self, trained: TrainedAgents, index: int):
        """Takes an agent by its index in `trained.agents`."""
        self.script = trained.script
        self.name = trained.name
        self.args = trained.args
        self.step = trained.step
        self.task, self.seed = trained.agents[index]
        played = dataclasses.replace(self.args, eval_episodes=1)  # 0 would mean: no environment
        try:
            self.env = env_name(played, self.task)
        except UserError:
            self.env = self.args.env  # of own data, without a simulator
        self.normalization = trained.normalization
        self.observation_size = trained.observation_size
        self.action_size = self.args.action_size
        self.state = jax.tree.map(lambda x: x[index], trained.state)
        self._states = jax.tree.map(lambda x: x[None], self.state)

    def act(self, observations: ArrayLike, seed: int = 0) -> np.ndarray:
        """Chooses chunks of actions in [-1, 1]: (S,) -> (H, d) or (n, S) -> (n, H, d).

        Online methods have H = 1. Each row has its own noise, determined by `seed` and its index.
        """
        rows = np.atleast_2d(np.asarray(observations, np.float32))
        plans = self.plan(rows, seed, np.arange(len(rows)))
        return plans.reshape(*np.shape(observations)[:-1], *plans.shape[1:])

    def plan(self, observations: np.ndarray, seed: int, ages: ArrayLike) -> np.ndarray:
        """Chooses chunks at steps `ages` (n,) of an episode with this seed: (n, S) -> (n, H, d)."""
        size = self.observation_size
        shape = observations.shape[1:]
        if shape != (size,):
            raise UserError(f"an observation of {self.env} has shape ({size},), not {shape}")
        if not 0 <= seed < 2**32:
            raise UserError(f"a seed is at least 0 and below 2^32, not {seed}")
        observations = normalize(observations, **self.normalization)
        seeds = np.full((1, len(observations)), seed, np.uint32)
        ages = np.asarray(ages, np.int32)[None]
        mode = getattr(self.script, "MODES", ())[:1]  # online methods have several
        with matmul_precision(self.args.precision):
            plans = self.script.act(self.args, self._states, observations[None], seeds, ages, *mode)
        return np.asarray(plans)[0]

    def policy(self, seed: int = 0) -> "Policy":
        """Returns a function for the steps of one episode: observation (S,) -> action (d,)."""
        return Policy(self, seed)


class Policy:
    """Plays an episode: chooses a chunk of actions, returns them one by one, chooses the next."""

    def __init__(self, agent: Agent, seed: int):
        self.agent = agent
        self.seed = seed
        self.age = 0  # steps of the episode so far
        self.plan = []  # actions that are chosen and not yet played

    def __call__(self, observation: ArrayLike) -> np.ndarray:
        """Returns the next action in [-1, 1]: (S,) -> (d,)."""
        if not self.plan:
            row = np.asarray(observation, np.float32)[None]
            self.plan = list(self.agent.plan(row, self.seed, [self.age])[0])
        self.age += 1
        return self.plan.pop(0)


def stored_script(folder: Path, name: str) -> ModuleType:
    """Executes the script that a run keeps in its folder, the same source once per process."""
    path = folder / SCRIPT
    with file_errors(path):
        source = path.read_bytes()
    digest = hashlib.sha256(source).hexdigest()
    module = ModuleType(f"{name}_{digest[:16]}")
    if module.__name__ not in sys.modules:
        module.__file__ = str(path)
        sys.modules[module.__name__] = module  # its dataclasses look for it
        try:
            exec(compile(source, path, "exec"), vars(module))
        except BaseException:
            del sys.modules[module.__name__]
            raise
    return sys.modules[module.__name__]


def last_checkpoint(folder: Path) -> tuple[Path, dict]:
    """Reads the latest checkpoint of a run, or the one before it if that cannot be read."""
    problems = []
    for path in (folder / CHECKPOINT, folder / PREVIOUS):
        try:
            saved = read_checkpoint(path)
        except (OSError, ValueError) as error:
            problems.append(str(error))
            continue
        if problems:
            print(f"Note: {problems[0]}; {path.name} is used instead.")
        return path, saved
    raise UserError(f"{folder} has no checkpoint that can be read: {problems[0]}")


def load_agents(folder: str | Path, script: ModuleType | None = None) -> TrainedAgents:
    """Loads all agents of a run; `script` is used instead of the run's own source, if given."""
    folder = Path(folder).expanduser()
    config = read_config(folder)
    flags = config["flags"]
    if not {"script", "agents"} <= config.keys():
        advice = "repeat its command once, which adds what is missing"
        raise UserError(f"{folder} was made by an earlier version: {advice}")
    path, saved = last_checkpoint(folder)
    source = script.__file__ if script else folder / SCRIPT
    script = script or stored_script(folder, config["script"])
    agents = [tuple(agent) for agent in config["agents"]]
    args = arguments(script, flags)
    create = partial(script.create, args, flags["observation_size"])
    keys = jax.random.split(jax.random.PRNGKey(0), len(agents))
    shapes = jax.eval_shape(jax.vmap(create), keys)
    try:
        check_same_arrays(flax.serialization.to_state_dict(shapes), saved["state"])
    except ValueError as error:
        raise UserError(f"{path} does not fit {source} and common/: {error}") from None
    statistics = {name: x for name, x in saved["envs"].items() if name in ("mean", "std")}
    return TrainedAgents(
        script=script,
        args=args,
        agents=agents,
        state=flax.serialization.from_state_dict(shapes, saved["state"]),
        step=int(saved["step"]),
        seconds=float(saved["seconds"]),
        observation_size=flags["observation_size"],
        normalization=statistics,
        name=config["script"],
    )


def arguments(script: ModuleType, flags: dict) -> Any:
    """Returns a run's `Args`; flags that the script does not have are left out."""
    known = {}
    for name in script.Args.__dataclass_fields__:
        if name in flags:
            value = flags[name]
            known[name] = tuple(value) if isinstance(value, list) else value
    return script.Args(**known)


def load_agent(
    folder: str | Path,
    task: int | None = None,
    seed: int | None = None,
    script: ModuleType | None = None,
) -> Agent:
    """Loads an agent at the run's last checkpoint: that of `task` and `seed`, or the first one.

    `script` is a module whose code is used instead of the source that the run keeps. Raises
    UserError if there is no such agent, or if the folder is not that of a run or is damaged.
    """
    trained = load_agents(folder, script)
    first_task, first_seed = trained.agents[0]
    task = first_task if task is None else task
    seed = first_seed if seed is None else seed
    if (task, seed) not in trained.agents:
        known = f"it has {trained.agents}"
        raise UserError(f"no agent of task {task}, seed {seed} in {folder}: {known}")
    return Agent(trained, trained.agents.index((task, seed)))
