"""Pictures of run folders: `python plot.py runs/qam/pointmaze-medium/default` draws curve.png and,
for a maze, rollouts.png into every folder that is named. Scripts do so when they end.
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.envs import make_env, resolve

PANELS = {  # metric -> table, title
    "success": ("eval", "success rate"),
    "length": ("eval", "episode length [steps]"),
    "q": ("train", "mean Q on the data"),
    "critic_loss": ("train", "critic loss"),
}


def read_csv(path: Path) -> dict[str, np.ndarray]:
    """Columns of a run's CSV file as float arrays; {} if there is none."""
    rows = list(csv.reader(path.open(newline=""))) if path.exists() else []
    rows = [row for row in rows if len(row) == len(rows[0])]
    return dict(zip(rows[0], np.array(rows[1:], float).T)) if len(rows) > 1 else {}


def draw_curve(folder: Path) -> None:
    """curve.png: one line per agent, coloured by task."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 3), layout="constrained")
    for axis, (metric, (table, title)) in zip(axes, PANELS.items()):
        columns = read_csv(folder / f"{table}.csv")
        axis.set(title=title, xlabel="updates")
        axis.xaxis.set_major_locator(plt.MaxNLocator(4))
        if metric not in columns:
            continue
        agents = sorted(set(zip(columns["task"], columns["seed"])))
        for task, seed in agents:
            mine = (columns["task"] == task) & (columns["seed"] == seed)
            style = dict(color=f"C{int(task) - 1}", marker="o" if table == "eval" else "", ms=3)
            label = f"task {task:.0f}" if seed == agents[0][1] else None
            axis.plot(columns["step"][mine], columns[metric][mine], label=label, **style)
    axes[0].set_ylim(-0.03, 1.03)
    axes[0].legend(fontsize=7, loc="lower right")
    folder_name = "/".join(folder.resolve().parts[-3:])
    figure.suptitle(folder_name, fontsize=9)
    figure.savefig(folder / "curve.png", dpi=120)
    plt.close(figure)


def draw_rollouts(folder: Path) -> None:
    """rollouts.png of a maze: the paths of the last evaluation, a panel per task; solved episodes
    blue, others orange, a dot at each start and a star at the goal."""
    env_name = json.loads((folder / "config.json").read_text())["flags"]["env"]
    if "maze" not in env_name or not (folder / "rollouts.npz").exists():
        return
    rollouts = np.load(folder / "rollouts.npz")
    solved = rollouts["success"].ravel() > 0  # agent after agent
    of_task = np.repeat(rollouts["task"], rollouts["success"].shape[1])
    tasks = sorted(set(of_task.tolist()))
    size = dict(figsize=(3.4 * len(tasks), 3.6), layout="constrained", squeeze=False)
    figure, axes = plt.subplots(1, len(tasks), **size)
    for axis, task in zip(axes[0], tasks):
        maze = make_env(f"{resolve(env_name).env}-singletask-task{task}-v0").unwrapped
        maze.reset(seed=0)
        left, low = maze.ij_to_xy((-0.5, -0.5))
        right, high = maze.ij_to_xy(np.array(maze.maze_map.shape) - 0.5)
        extent = (left, right, low, high)
        axis.imshow(maze.maze_map, origin="lower", extent=extent, cmap="Greys", vmin=0, vmax=2)
        for i in np.flatnonzero(of_task == task):
            path = rollouts[f"path{i}"][:, :2]
            axis.plot(*path.T, color="C0" if solved[i] else "C1", lw=0.8, alpha=0.5)
            axis.plot(*path[0], "o", color="black", ms=2)
        axis.plot(*maze.cur_goal_xy, "*", color="C3", ms=12)
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"task {task}: success {solved[of_task == task].mean():.2f}", fontsize=10)
    figure.savefig(folder / "rollouts.png", dpi=120)
    plt.close(figure)


def draw(folder) -> None:
    """Draws whatever the run folder has data for."""
    draw_curve(Path(folder))
    draw_rollouts(Path(folder))


if __name__ == "__main__":
    for name in sys.argv[1:] or sys.exit(__doc__):
        draw(name)
        print(f"drew {name}/curve.png")
