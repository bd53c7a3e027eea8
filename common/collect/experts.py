"""OGBench's scripted experts, as generators.

A policy resets the environment, yields (observation, action), is sent the next (observation, info)
and yields again, without an end. Mazes, oracles and policies draw from numpy's global generator.
"""

import functools
import importlib
from collections.abc import Callable, Generator

import gymnasium
import numpy as np

from common.collect.ant import walk

Policy = Generator[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, dict], None]
Cell = tuple[int, int]

NOISE_POINT = 0.5  # standard deviation of the noise that is added to an expert's actions
NOISE_ANT = 0.2
NOISE_ARM = [1, 1, 1, 3, 10]  # relative to the scale that an episode draws

# The probability that a new target is on top of another cube is drawn from this range.
STACKING = {
    "cube-single": (0, 0),
    "cube-double": (0, 0.25),
    "cube-triple": (0.05, 0.35),
    "cube-quadruple": (0.1, 0.5),
}
OTHER_STACKING = (0.5, 0.5)


# --- Mazes ---


def subgoal_search(maze: gymnasium.Env) -> Callable:
    """Returns a function (start cell, goal cell) -> (subgoal, distances).

    The subgoal (2,) is the position of the next cell on the shortest way to the goal; the distances
    (rows, columns) are those of all cells from the goal. Results are cached, because a search is
    slow.
    """

    @functools.cache
    def search(start: Cell, goal: Cell) -> tuple[np.ndarray, np.ndarray]:
        return maze.get_oracle_subgoal(maze.ij_to_xy(start), maze.ij_to_xy(goal))

    return search


def heading(maze: gymnasium.Env, search: Callable) -> np.ndarray:
    """Returns the unit direction (2,) from the agent to the next cell on the way to its goal."""
    position = maze.get_xy()
    start = maze.xy_to_ij(position)
    goal = maze.xy_to_ij(maze.cur_goal_xy)
    subgoal, _ = search(start, goal)
    direction = subgoal - position
    return direction / (np.linalg.norm(direction) + 1e-6)


def _choose(cells: list[Cell]) -> Cell:
    return cells[np.random.randint(len(cells))]


def _free_cells(maze: gymnasium.Env) -> list[Cell]:
    return [tuple(cell) for cell in np.argwhere(maze.maze_map != 1)]


def _landmarks(maze: gymnasium.Env) -> list[Cell]:
    """Lists the junctions, corners and dead ends: free cells that are no straight hallways."""
    wall = (maze.maze_map == 1).astype(int)
    walls_along_i = np.roll(wall, 1, axis=0) + np.roll(wall, -1, axis=0)
    walls_along_j = np.roll(wall, 1, axis=1) + np.roll(wall, -1, axis=1)
    straight = abs(walls_along_i - walls_along_j) == 2
    return [cell for cell in _free_cells(maze) if not straight[cell]]


def _four_cells_away(maze: gymnasium.Env, search: Callable, start: Cell) -> list[Cell]:
    """Lists the cells at a distance of four from `start`; `start` itself if there are none."""
    _, distances = search(start, start)
    cells = [cell for cell in _free_cells(maze) if distances[cell] == 4]
    return cells or [start]


def maze_policy(env: gymnasium.Env, dataset: str, env_seed: int) -> Policy:
    """Walks along shortest ways: from goal to goal (navigate) or to one goal (stitch)."""
    maze = env.unwrapped
    is_navigate = dataset.endswith("navigate")
    search = subgoal_search(maze)
    start = _choose(_free_cells(maze))
    if is_navigate:
        goals = _landmarks(maze)
    else:
        goals = _four_cells_away(maze, search, start)
    task = {"init_ij": start, "goal_ij": _choose(goals)}
    ob, info = env.reset(seed=env_seed, options={"task_info": task})
    while True:
        direction = heading(maze, search)
        if dataset.startswith("ant"):
            action = walk(ob, direction) + np.random.normal(0, NOISE_ANT, 8)
        else:
            action = direction + np.random.normal(0, NOISE_POINT, 2)
        ob, info = yield ob, np.clip(action, -1, 1)
        if is_navigate and info["success"]:
            goal = maze.ij_to_xy(_choose(goals))
            # set_goal(goal_ij=...) draws the same goal but puts NaN into the target marker.
            maze.set_goal(goal_xy=maze.add_noise(goal))


# --- The robot arm ---


def _make_oracles(env: gymnasium.Env, domain: str, style: str) -> dict:
    """Makes an oracle for each kind of target; their defaults are the official settings."""
    oracles = {}
    for target in ("cube", "button", "drawer", "window"):
        module = importlib.import_module(f"ogbench.manipspace.oracles.{style}.{target}_{style}")
        make_oracle = getattr(module, f"{target.title()}{style.title()}Oracle")
        options = {}
        if target == "button":
            options["gripper_always_closed"] = domain.startswith("puzzle")
        oracles[target] = make_oracle(env=env, **options)
    return oracles


def _forget_targets(scene: gymnasium.Env) -> None:
    """Sets all targets of a scene to 0.

    A scene keeps the targets of earlier episodes, and a Markov oracle acts once on the target
    before its own. So every episode has to start from the same targets.
    """
    scene._target_button_states[:] = 0
    scene._target_button = 0
    scene._target_drawer_pos = 0.0
    scene._target_window_pos = 0.0
    scene.model.site("drawer_handle_center_target").pos[1] = 0.0
    scene.model.site("window_handle_center_target").pos[0] = 0.0


def _random_action_probability(domain: str, kind: str) -> float:
    if kind == "play":
        return 0
    if domain.startswith("puzzle"):
        return 0.2
    return 0.1


def manipulation_policy(env: gymnasium.Env, dataset: str, env_seed: int) -> Policy:
    """Moves to target after target: by plans (play) or by noisy Markov oracles (noisy)."""
    domain, kind = dataset.rsplit("-", 1)
    style = "plan" if kind == "play" else "markov"
    oracles = _make_oracles(env, domain, style)  # new ones do not remember an earlier episode
    p_random = _random_action_probability(domain, kind)
    p_stack = np.random.uniform(*STACKING.get(domain, OTHER_STACKING))
    noise_scale = 0
    if kind == "noisy":
        noise_scale = np.random.uniform(0, 0.1)
    ob, info = env.reset(seed=env_seed)
    if domain == "scene":
        _forget_targets(env.unwrapped)
        ob, info = env.reset(seed=env_seed)
    oracle = oracles[info["privileged/target_task"]]
    oracle.reset(ob, info)
    while True:
        if np.random.rand() < p_random:
            action = np.random.uniform(-1, 1, 5)
        else:
            action = oracle.select_action(ob, info)
            action = action + noise_scale * np.random.normal(0, NOISE_ARM)
        ob, info = yield ob, np.clip(action, -1, 1)
        if oracle.done:
            target_ob, target_info = env.unwrapped.set_new_target(p_stack=p_stack)
            oracle = oracles[target_info["privileged/target_task"]]
            oracle.reset(target_ob, target_info)
