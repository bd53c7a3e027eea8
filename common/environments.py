"""Environments by name, with the papers' protocol, and their wrappers.

Worker processes import this module, so it must not import jax.
"""

import contextlib
import difflib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import ogbench  # noqa: F401 (registers the environments)

from common.errors import UserError
from common.gym_environments import adapt, create

GOALS = np.float32([(5, 0), (-5, 0), (0, 5), (0, -5)])  # on the plane `multigoal`
MULTIGOAL_STEPS = 30  # time limit of an episode there
MINARI = "minari:"  # begins the name of a dataset that Minari has
TRAINING = 2**31  # takes the episode number's place in the seeds of training episodes
KITCHEN = (
    *("light switch", "slide cabinet", "bottom burner", "microwave"),
    *("kettle", "top burner", "hinge cabinet"),
)  # kitchen-<k> has the first k of these tasks


class OnlineEnv(NamedTuple):
    """An environment of the online methods."""

    id: str  # gymnasium's
    arguments: dict = {}  # of gymnasium.make


def _kitchen(num_tasks: int) -> OnlineEnv:
    arguments = dict(tasks_to_complete=KITCHEN[:num_tasks])
    return OnlineEnv("gymnasium_robotics:FrankaKitchen-v1", arguments)


ONLINE = {
    "multigoal": OnlineEnv("MultiGoal-v0"),
    "kitchen-1": _kitchen(1),
    "kitchen-2": _kitchen(2),
    "kitchen-4": _kitchen(4),
    "kitchen-7": _kitchen(7),
    "hopper": OnlineEnv("Hopper-v5"),
    "halfcheetah": OnlineEnv("HalfCheetah-v5"),
    "walker2d": OnlineEnv("Walker2d-v5"),
    "humanoid": OnlineEnv("Humanoid-v5"),
    "online-ant-xy": OnlineEnv("common.collect.ant:OnlineAntXY-v0"),  # for OGBench's expert
}


class Domain(NamedTuple):
    """What OGBench and the QAM paper fix for a family of environments."""

    kinds: tuple[str, ...]  # of datasets, the default one first
    task: int  # OGBench's default task
    chunk_length: int = 5
    discount: float = 0.99
    pessimism: float = 0.5
    sparse: bool = False


NAVIGATION = ("navigate", "stitch")
MANIPULATION = ("play", "noisy")
DOMAINS = {
    "pointmaze": Domain(NAVIGATION, task=1),
    "antmaze": Domain((*NAVIGATION, "explore"), task=1, chunk_length=1),
    "antsoccer": Domain(NAVIGATION, task=4, chunk_length=1),
    "humanoidmaze": Domain(NAVIGATION, task=1, chunk_length=1, discount=0.995, pessimism=0.0),
    "cube": Domain(MANIPULATION, task=2),
    "scene": Domain(MANIPULATION, task=2, sparse=True),
    "puzzle": Domain(MANIPULATION, task=2, sparse=True),
}
DEFAULT_TASK = {"puzzle-3x3": 4, "puzzle-4x4": 4}  # where it is not the domain's
OGBENCH_NAME = re.compile(
    r"(?P<env>.+?)(-(?P<kind>navigate|stitch|explore|play|noisy))?"
    r"(-singletask(-task(?P<task>[1-5]))?)?(-v0)?",
    re.DOTALL,
)
PIXELS = "visual-"  # OGBench's environments with images
MODULE_AND_ID = re.compile(r"[\w.]+:[\w./-]+")  # such as my_package:MyEnv-v0


class Source(NamedTuple):
    """Where the data and episodes of a run come from."""

    env: str  # such as cube-triple, or gymnasium's id
    dataset: str  # such as cube-triple-play; empty if it is not OGBench's
    task: int  # 1 to 5; of kitchen-<k> it is k
    protocol: dict  # flag -> value, from the QAM paper


def ogbench_environments() -> list[str]:
    """Returns the names of OGBench's environments with states as observations."""
    suffix = "-singletask-v0"
    ids = [id for id in gymnasium.registry if id.endswith(suffix) and "visual" not in id]
    return [id.removesuffix(suffix) for id in ids]


def refuse_name(name: str, known: list[str]) -> None:
    """Raises UserError with the names that are most similar to an unknown one."""
    names = [*known, *ONLINE]
    for env in known:
        kinds = DOMAINS[env.split("-")[0]].kinds
        names += [f"{env}-{kind}" for kind in kinds]
    near = difflib.get_close_matches(name, names, cutoff=0.4)
    ids = [id for id in gymnasium.registry if not id.startswith(PIXELS)]
    near += difflib.get_close_matches(name, ids, n=1, cutoff=0.8)
    if near:
        raise UserError(f"unknown environment {name!r}; did you mean {', '.join(near)}?")
    raise UserError(f"unknown environment {name!r}; known are {', '.join([*known, *ONLINE])}")


def is_gymnasium_id(name: str) -> bool:
    """Returns whether a name is a registered id, or one that the import of a module registers."""
    registered = name in gymnasium.registry and not name.startswith(PIXELS)
    return registered or bool(MODULE_AND_ID.fullmatch(name))


def resolve(name: str) -> Source:
    """Looks up an environment by its short name (cube-triple), dataset (cube-triple-noisy), full
    OGBench name (cube-triple-noisy-singletask-task2-v0), name in ONLINE or gymnasium's id."""
    if name in ONLINE:
        task = int(name[-1]) if name.startswith("kitchen") else 1
        return Source(name, "", task, {})
    known = ogbench_environments()
    match = OGBENCH_NAME.fullmatch(name)
    env = match["env"] if match else name
    if env not in known:
        if is_gymnasium_id(name):
            return Source(name, "", 1, {})
        refuse_name(name, known)
    domain = DOMAINS[env.split("-")[0]]
    kind = match["kind"] or domain.kinds[0]
    if kind not in domain.kinds:
        refuse_name(name, known)
    protocol = domain._asdict()
    del protocol["kinds"], protocol["task"]
    if "giant" in env:
        protocol["discount"] = 0.995
    task = match["task"] or DEFAULT_TASK.get(env, domain.task)
    return Source(env, f"{env}-{kind}", int(task), protocol)


def single_task(name: str, task: int) -> str:
    """Returns the name with which `make_env` makes the environment of one task."""
    source = resolve(name)
    if not source.dataset:
        if task > 1 and name not in ONLINE:
            raise UserError(f"--tasks must be 1, because {name} has one task")
        return name
    return f"{source.env}-singletask-task{task}-v0"


def env_name(args: Any, task: int) -> str:
    """Returns the environment of a task with the arguments that a script's flags give it."""
    if args.eval_episodes == 0 and getattr(args, "online_steps", 1) == 0:
        return args.env  # no episode is played, so it need not exist
    name = single_task(args.env, task)
    limit = dict(max_episode_steps=args.max_episode_steps) if args.max_episode_steps else {}
    try:
        arguments = json.loads(args.env_kwargs or "{}") | limit
    except (ValueError, TypeError) as error:
        text = args.env_kwargs
        raise UserError(f"--env-kwargs must be a JSON object, but is {text!r}: {error}") from None
    return f"{name}?{json.dumps(arguments)}" if arguments else name


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Hides gymnasium's warnings, such as those about spaces in float64."""
    level = gymnasium.logger.min_level
    gymnasium.logger.min_level = gymnasium.logger.ERROR
    try:
        yield
    finally:
        gymnasium.logger.min_level = level


@without_warnings()
def make_env(name: str, **options: Any) -> gymnasium.Env:
    """Makes an environment by its OGBench name, such as "cube-single-singletask-task1-v0", its name
    in ONLINE or its gymnasium id. `?` and arguments of gymnasium.make as JSON may follow.

    `options` are further arguments, such as render_mode. Actions of environments that are not
    OGBench's are rescaled to [-1, 1], and their observations flattened.
    """
    name, _, text = name.partition("?")
    options = json.loads(text or "{}") | options
    if name not in ONLINE and resolve(name).dataset:
        env = create(name, name, options)
        _remove_temporary_model(env)
        return env
    id, arguments = ONLINE.get(name, OnlineEnv(name))
    env = create(name, id, arguments | options)
    if name in ONLINE and name.startswith("kitchen"):
        env = Kitchen(env)
    return adapt(env, name)


def _remove_temporary_model(env: gymnasium.Env) -> None:
    """Removes the XML file that OGBench writes for each maze and leaves behind."""
    path = Path(getattr(env.unwrapped, "fullpath", ""))
    if path.parent == Path(tempfile.gettempdir()):
        path.unlink(missing_ok=True)


def env_sizes(name: str) -> tuple[int, int]:
    """Returns the sizes of observations and actions."""
    env = make_env(name)
    env.close()
    return env.observation_space.shape[0], env.action_space.shape[0]


def seed_of(*parts: int) -> int:
    """Hashes up to four non-negative integers, such as (seed, task, step, episode), to a 32-bit
    seed. Zeros at the end change nothing."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seeds_of(agents: list[tuple[int, int]], *parts: int) -> np.ndarray:
    """Returns a seed per agent, (agents, 1), hashed from its seed, its task and `parts`."""
    return np.array([[seed_of(seed, task, *parts)] for task, seed in agents], np.uint32)


class MultiGoal(gymnasium.Env):
    """A plane with four goals (Haarnoja et al. 2017), in float32, started near the origin.

    The observation is the position. An episode ends within distance 1 of a goal.
    """

    observation_space = gymnasium.spaces.Box(-7, 7, (2,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        """Begins an episode."""
        super().reset(seed=seed)
        noise = self.np_random.standard_normal(2, np.float32)
        self.position = np.clip(np.float32(0.1) * noise, -7, 7)
        return self.position, {}

    def step(self, action: np.ndarray) -> tuple:
        """Moves by the action, which costs energy."""
        action = np.clip(np.float32(action), -1, 1)
        self.position = np.clip(self.position + action, -7, 7)
        distance = ((self.position - GOALS) ** 2).sum(-1).min()  # squared, to the nearest goal
        reached = bool(distance < 1)
        reward = np.float32(10 if reached else 0) - 30 * (action**2).sum() - distance
        return self.position, float(reward), reached, False, {"success": reached}


gymnasium.register("MultiGoal-v0", MultiGoal, max_episode_steps=MULTIGOAL_STEPS)


class Kitchen(gymnasium.Wrapper):
    """Observes only the robot and the objects, (59,).

    The goals never change, and what is achieved repeats positions of objects. The info is reduced
    to success, because its other entries change in later steps.
    """

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = env.observation_space["observation"]

    def reset(self, **arguments: Any) -> tuple:
        """Begins an episode."""
        state, _ = self.env.reset(**arguments)
        return state["observation"], {}

    def step(self, action: np.ndarray) -> tuple:
        """Plays an action."""
        state, reward, terminated, truncated, _ = self.env.step(action)
        return state["observation"], reward, terminated, truncated, {"success": terminated}
