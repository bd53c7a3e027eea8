"""Any gymnasium environment whose spaces are flat or can be flattened, as the methods need it.

Worker processes import this module, so it must not import jax.
"""

import contextlib
import io
import os

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Space, Tuple
from gymnasium.wrappers import FlattenObservation, RescaleAction

from common.errors import UserError, in_a_line

# What gymnasium.make raises for what cannot be made; other errors are an environment's own.
ERRORS = (gymnasium.error.Error, ImportError, TypeError, AssertionError, OSError, ValueError)


def ignore_missing_driver() -> None:
    """Lets MuJoCo do without the driver for drawing that MUJOCO_GL names, if that is missing."""
    try:
        import dm_control.mujoco  # noqa: F401 (stricter than mujoco: it looks for a display)
    except Exception:  # its type depends on the driver
        os.environ["MUJOCO_GL"] = "disable"


def create(name: str, id: str, arguments: dict) -> gymnasium.Env:
    """Calls gymnasium.make; raises UserError, with `name` in its message, if that fails."""
    if os.environ.get("MUJOCO_GL", "disable") != "disable" and "render_mode" not in arguments:
        ignore_missing_driver()
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


class Rescale(RescaleAction):
    """Takes actions in [-1, 1]; rounding does not carry them beyond the environment's bounds."""

    def action(self, action: np.ndarray) -> np.ndarray:
        """Returns the environment's action."""
        bounds = self.env.action_space
        return np.clip(super().action(action), bounds.low, bounds.high)


def action_box(env: gymnasium.Env) -> Box:
    """Returns the range of an environment's actions before they are rescaled to [-1, 1]."""
    return env.env.action_space if isinstance(env, RescaleAction) else env.action_space


def is_flat(space: Space) -> bool:
    """Returns whether a space is a Box of floats that is no image, or is made of such spaces."""
    if isinstance(space, Dict | Tuple):
        children = space.values() if isinstance(space, Dict) else space
        return all(map(is_flat, children))
    return isinstance(space, Box) and space.dtype.kind == "f" and len(space.shape) <= 2


def check_actions(actions: Space) -> None:
    """Raises ValueError if the methods cannot work with such actions."""
    flat = isinstance(actions, Box) and is_flat(actions) and len(actions.shape) == 1
    if not flat or not actions.is_bounded() or (actions.low >= actions.high).any():
        supported = "supported is a Box of floats with one axis and finite bounds"
        raise ValueError(f"{in_a_line(actions)}; {supported}")


def check(env: gymnasium.Env, name: str) -> None:
    """Raises UserError if the methods cannot work with the spaces, or an episode need not end."""
    seen = env.observation_space
    if not is_flat(seen):
        raise UserError(
            f"{name} observes {in_a_line(seen)}; supported are a Box of floats that is no image, "
            "and a Dict or Tuple of those: wrap the environment"
        )
    try:
        check_actions(env.action_space)
    except ValueError as error:
        raise UserError(f"{name} has the actions {error}: wrap the environment") from None
    if env.spec.max_episode_steps is None:
        raise UserError(f"{name} has no time limit; give it one with --max-episode-steps")


def adapt(env: gymnasium.Env, name: str) -> gymnasium.Env:
    """Checks an environment, flattens its observations to (S,), rescales actions to [-1, 1]^d."""
    check(env, name)
    if len(env.observation_space.shape or ()) != 1:
        env = FlattenObservation(env)
    return Rescale(env, -1.0, 1.0)
