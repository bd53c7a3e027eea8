"""Any gymnasium environment whose spaces are flat or can be flattened, as the methods need it.

Worker processes import this module, so it must not import jax.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import gymnasium
from gymnasium.spaces import Box, Dict, Space, Tuple
from gymnasium.wrappers import FlattenObservation, RescaleAction

from common.errors import UserError

ERRORS = (gymnasium.error.Error, ImportError, TypeError, AssertionError)  # of gymnasium.make


def in_a_line(text: Any) -> str:
    """Returns a text, or what describes an object, without line breaks and not too long."""
    return " ".join(str(text).split())[:300]


def create(name: str, id: str, arguments: dict) -> gymnasium.Env:
    """Calls gymnasium.make; raises UserError where there is no such environment. `name` is ours."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # gymnasium_robotics' deprecations
            return gymnasium.make(id, disable_env_checker=True, **arguments)
    except ERRORS as error:
        if "robotics" in id and isinstance(error, ImportError | AssertionError):
            problem = (  # AssertionError: joints, since mujoco 3.12
                f"{name} needs gymnasium-robotics>=1.4,<1.5 and mujoco<3.12: "
                f"pip install -r requirements.txt ({type(error).__name__})"
            )
        else:
            problem = f"gymnasium cannot make {name}: {in_a_line(error)}"
        raise UserError(problem) from error


def leaves(space: Space) -> Iterator[Space]:
    """Yields the spaces inside Dict and Tuple spaces, in the order in which they are flattened."""
    if isinstance(space, Dict | Tuple):
        parts = space.values() if isinstance(space, Dict) else space
        for part in parts:
            yield from leaves(part)
    else:
        yield space


def check(env: gymnasium.Env, name: str) -> None:
    """Raises UserError if the methods cannot work with the spaces, or an episode need not end."""
    for space in leaves(env.observation_space):
        if not isinstance(space, Box) or space.dtype.kind != "f" or len(space.shape) > 2:
            raise UserError(
                f"{name} observes {in_a_line(space)}; supported are Box spaces of floats, and Dict "
                "and Tuple of them, but no images: wrap the environment"
            )
    actions = env.action_space
    flat = isinstance(actions, Box) and actions.dtype.kind == "f" and len(actions.shape) == 1
    if not flat or not actions.is_bounded() or (actions.low >= actions.high).any():
        raise UserError(
            f"{name} has the actions {in_a_line(actions)}; supported is a Box of floats with one "
            "axis and finite bounds: wrap the environment"
        )
    if env.spec.max_episode_steps is None:
        raise UserError(f"{name} has no time limit; give it one with --max-episode-steps")


def adapt(env: gymnasium.Env, name: str) -> gymnasium.Env:
    """Checks an environment, flattens its observations to (S,), rescales actions to [-1, 1]^d."""
    check(env, name)
    if len(env.observation_space.shape or ()) != 1:
        env = FlattenObservation(env)
    return RescaleAction(env, -1.0, 1.0)
