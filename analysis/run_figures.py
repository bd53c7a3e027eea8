"""Figures of one run, drawn into its folder: curve.png, and rollouts.png of mazes and the plane."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.files import open_to_write
from analysis.runs import domain_of_run, is_online, read_csv, read_flags, read_rollouts
from analysis.style import (
    GOAL_COLOURS,
    SOLVED,
    TARGET,
    TITLES,
    UNSOLVED,
    settings,
    thousands,
)
from common.environments import GOALS, make_env, resolve

# Metric -> the CSV file that holds it.
TABLES = {
    "success": "eval",
    "return": "eval",
    "normalized_score": "eval",
    "length": "eval",
    "q": "train",
    "critic_loss": "train",
}
PANELS = ("success", "return", "normalized_score", "length", "q", "critic_loss")
COLUMNS = 4  # of panels, at most
ONLINE_TITLES = TITLES | {"q": "mean Q on the batch"}
PLANE_AGENTS = 5  # that are shown at most


def draw_run(folder: Path) -> list[Path]:
    """Draws all figures that the run has data for, and returns their files."""
    flags = read_flags(folder)
    env = flags["env"]
    with plt.rc_context(settings("light")):
        figures = []
        if (folder / "rollouts.npz").exists():
            if "maze" in env and resolve(env).dataset:
                figures.append(draw_maze(folder, env))
            elif env == "multigoal":
                figures.append(draw_plane(folder))
        # Last, because a run goes by the age of this file.
        figures.append(draw_curve(folder, online=is_online(domain_of_run(flags))))
    return [path for path in figures if path is not None]


def _row_of_panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Creates a figure with panels side by side; sizes of a panel are in inches."""
    size = (width * count, height)
    figure, axes = plt.subplots(1, count, figsize=size, layout="constrained", squeeze=False)
    return figure, list(axes[0])


def _rows_of_panels(count: int) -> tuple[Figure, list[Axes]]:
    """Creates a figure with rows of at most four panels."""
    rows = -(-count // COLUMNS)
    columns = -(-count // rows)
    size = (3.25 * columns, 2.7 * rows + 0.3)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in grid.flat[count:]:
        axis.set_axis_off()
    return figure, list(grid.flat[:count])


def _save(figure: Figure, path: Path) -> Path:
    """Writes a figure and closes it."""
    with open_to_write(path, binary=True) as file:
        figure.savefig(file, dpi=120, format="png")
    plt.close(figure)
    return path


def draw_curve(folder: Path, online: bool) -> Path | None:
    """Draws curve.png: a panel per metric and per loss that was logged, a line per agent.

    Offline, returns are shown only if no success was logged.
    """
    columns_of = {table: read_csv(folder / f"{table}.csv") for table in ("eval", "train")}
    panels = [metric for metric in PANELS if metric in columns_of[TABLES[metric]]]
    if not online and "success" in panels:
        panels.remove("return")
    panels += [name for name in columns_of["train"] if "loss" in name and name not in panels]
    if not panels:
        return None
    figure, axes = _rows_of_panels(len(panels))
    titles = ONLINE_TITLES if online else TITLES
    for axis, metric in zip(axes, panels, strict=True):
        table = TABLES.get(metric, "train")
        marker = "o" if table == "eval" else ""
        _draw_agents(axis, columns_of[table], metric, online, marker)
        axis.set_title(titles.get(metric, metric.replace("_", " ")))
        axis.set_xlabel("environment steps" if online else "updates")
        axis.xaxis.set_major_locator(plt.MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axis.xaxis.set_major_formatter(thousands)
        if metric == "success":
            axis.set_ylim(-0.03, 1.03)
    axes[0].legend(fontsize=7, loc="best" if online else "lower right")
    name = "/".join(folder.resolve().parts[-3:])
    figure.suptitle(name, fontsize=9)
    return _save(figure, folder / "curve.png")


def _draw_agents(axis: Axes, columns: dict, metric: str, online: bool, marker: str) -> None:
    """Draws a line per agent, coloured and labelled by task or, of an online run, by seed."""
    agents = sorted(set(zip(columns["task"], columns["seed"], strict=True)))
    first_seed = agents[0][1]
    for i, (task, seed) in enumerate(agents):
        own = (columns["task"] == task) & (columns["seed"] == seed)
        steps = columns["step"][own]
        (line,) = axis.plot(steps, columns[metric][own], marker=marker, ms=3)
        if online:
            line.set_color(f"C{i}")
            line.set_label(f"seed {seed:.0f}")
        else:
            line.set_color(f"C{int(task) - 1}")
            if seed == first_seed:
                line.set_label(f"task {task:.0f}")


def draw_maze(folder: Path, env: str) -> Path:
    """Draws rollouts.png of a maze: the paths of the last evaluation, a panel per task.

    Solved episodes are blue and others orange; a dot is at each start and a star at the goal.
    """
    rollouts = read_rollouts(folder)
    success = rollouts["success"]  # (agents, episodes)
    solved = success.ravel() > 0
    task_of = np.repeat(rollouts["task"], success.shape[1])
    tasks = sorted(set(task_of.tolist()))
    figure, axes = _row_of_panels(len(tasks), 3.4, 3.6)
    for axis, task in zip(axes, tasks, strict=True):
        maze = make_env(f"{resolve(env).env}-singletask-task{task}-v0").unwrapped
        maze.reset(seed=0)
        _draw_walls(axis, maze)
        for i in np.flatnonzero(task_of == task):
            path = rollouts[f"path{i}"][:, :2]
            colour = SOLVED if solved[i] else UNSOLVED
            axis.plot(*path.T, color=colour, lw=0.8, alpha=0.5)
            axis.plot(*path[0], "o", color="black", ms=2)
        axis.plot(*maze.cur_goal_xy, "*", color=TARGET, ms=12)
        axis.set(xticks=[], yticks=[])
        share = solved[task_of == task].mean()
        axis.set_title(f"task {task}: success {share:.2f}", fontsize=10)
    return _save(figure, folder / "rollouts.png")


def _draw_walls(axis: Axes, maze) -> None:
    """Draws a maze's map in its own coordinates."""
    left, low = maze.ij_to_xy((-0.5, -0.5))
    right, high = maze.ij_to_xy(np.array(maze.maze_map.shape) - 0.5)
    axis.imshow(
        maze.maze_map,
        origin="lower",
        extent=(left, right, low, high),
        cmap="Greys",
        vmin=0,
        vmax=2,
    )


def draw_plane(folder: Path) -> Path:
    """Draws rollouts.png of multigoal: the paths of the last evaluation over the goals' cost.

    There is a panel for each of up to five agents. A path has the colour of the goal that it
    reaches, and is grey if it reaches none; the title counts the goals that were reached.
    """
    rollouts = read_rollouts(folder)
    num_agents, episodes = rollouts["success"].shape
    figure, axes = _row_of_panels(min(num_agents, PLANE_AGENTS), 3.4, 3.7)
    for agent, axis in enumerate(axes):
        _draw_cost(axis)
        first = agent * episodes
        counts = [0] * len(GOALS)
        for i in range(first, first + episodes):
            path = rollouts[f"path{i}"]
            (line,) = axis.plot(*path.T, color="0.55", lw=1, alpha=0.75)
            line.set_marker("o")
            line.set_markersize(2)
            goal = _reached_goal(path)
            if goal is not None:
                counts[goal] += 1
                line.set_color(GOAL_COLOURS[goal])
                line.set_zorder(3)
        _draw_goals(axis)
        numbers = " / ".join(map(str, counts))
        axis.set_title(f"reached {numbers} of {episodes}", fontsize=10)
    return _save(figure, folder / "rollouts.png")


def _reached_goal(path: np.ndarray) -> int | None:
    """Returns the number of the goal where a path (n, 2) ends; None if it ends at no goal."""
    distance = np.linalg.norm(path[-1] - GOALS, axis=-1)
    if distance.min() >= 1:
        return None
    return int(distance.argmin())


def _draw_cost(axis: Axes) -> None:
    """Draws contours of the squared distance to the nearest goal."""
    x = np.linspace(-7, 7, 201)
    plane = np.stack(np.meshgrid(x, x), -1)
    distance = np.linalg.norm(plane[..., None, :] - GOALS, axis=-1)
    cost = distance.min(-1) ** 2
    axis.contour(x, x, cost, np.arange(1, 8) ** 2, colors="0.85", linewidths=0.7)


def _draw_goals(axis: Axes) -> None:
    """Draws the goals as stars and the start as a cross."""
    axis.scatter(*GOALS.T, s=200, marker="*", c=GOAL_COLOURS, edgecolors="black", zorder=4)
    axis.plot(0, 0, "+", color="black", ms=8, zorder=4)
    axis.set(xlim=(-7, 7), ylim=(-7, 7), aspect="equal")
    axis.set(xticks=[-5, 0, 5], yticks=[-5, 0, 5])
