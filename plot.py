"""Pictures of run folders: `python plot.py runs/qam/pointmaze-medium/default` draws curve.png and,
for a maze or the plane of four goals, rollouts.png into every folder that is named. Scripts do so
when they end.
"""

import csv
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.envs import GOALS, ONLINE, make_env, resolve

PANELS = {  # metric -> table, title
    "success": ("eval", "success rate"),
    "length": ("eval", "episode length [steps]"),
    "q": ("train", "mean Q on the data"),
    "critic_loss": ("train", "critic loss"),
}
ONLINE_PANELS = PANELS | {"return": ("eval", "return"), "q": ("train", "mean Q on the batch")}
ONLINE_PANELS = {key: ONLINE_PANELS[key] for key in ("return", "length", "q", "critic_loss")}
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")  # told apart by the colour-blind


def read_csv(path: Path) -> dict[str, np.ndarray]:
    """Columns of a run's CSV file as float arrays; {} if there is none."""
    rows = list(csv.reader(path.open(newline=""))) if path.exists() else []
    rows = [row for row in rows if len(row) == len(rows[0])]
    return dict(zip(rows[0], np.array(rows[1:], float).T)) if len(rows) > 1 else {}


def flags_of(folder: Path) -> dict:
    """The flags of a run."""
    return json.loads((folder / "config.json").read_text())["flags"]


def draw_curve(folder: Path) -> None:
    """curve.png: one line per agent, coloured by task or, of an online method, by seed; panels of
    the metrics that the run has logged."""
    online = flags_of(folder)["env"] in ONLINE
    tables = {name: read_csv(folder / f"{name}.csv") for name in ("eval", "train")}
    panels = ONLINE_PANELS if online else PANELS
    panels = {metric: panels[metric] for metric in panels if metric in tables[panels[metric][0]]}
    if not panels:
        return
    size = dict(figsize=(3.25 * len(panels), 3), layout="constrained", squeeze=False)
    figure, axes = plt.subplots(1, len(panels), **size)
    for axis, (metric, (table, title)) in zip(axes[0], panels.items()):
        columns = tables[table]
        axis.set(title=title, xlabel="environment steps" if online else "updates")
        axis.xaxis.set_major_locator(plt.MaxNLocator(4))
        agents = sorted(set(zip(columns["task"], columns["seed"])))
        for i, (task, seed) in enumerate(agents):
            mine = (columns["task"] == task) & (columns["seed"] == seed)
            colour = i if online else int(task) - 1
            style = dict(color=f"C{colour}", marker="o" if table == "eval" else "", ms=3)
            label = f"task {task:.0f}" if seed == agents[0][1] else None
            label = f"seed {seed:.0f}" if online else label
            axis.plot(columns["step"][mine], columns[metric][mine], label=label, **style)
        if metric == "success":
            axis.set_ylim(-0.03, 1.03)
    axes[0, 0].legend(fontsize=7, loc="best" if online else "lower right")
    folder_name = "/".join(folder.resolve().parts[-3:])
    figure.suptitle(folder_name, fontsize=9)
    figure.savefig(folder / "curve.png", dpi=120)
    plt.close(figure)


def draw_rollouts(folder: Path) -> None:
    """rollouts.png of a maze: the paths of the last evaluation, a panel per task; solved episodes
    blue, others orange, a dot at each start and a star at the goal."""
    env_name = flags_of(folder)["env"]
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


def draw_plane(folder: Path) -> None:
    """rollouts.png of multigoal: the paths of the last evaluation over contours of the goal cost, a
    panel for each of up to five agents; coloured by the goal that is reached, grey without one."""
    if flags_of(folder)["env"] != "multigoal" or not (folder / "rollouts.npz").exists():
        return
    rollouts = np.load(folder / "rollouts.npz")
    agents, episodes = rollouts["success"].shape
    shown = min(agents, 5)
    size = dict(figsize=(3.4 * shown, 3.7), layout="constrained", squeeze=False)
    figure, axes = plt.subplots(1, shown, **size)
    x = np.linspace(-7, 7, 201)
    plane = np.stack(np.meshgrid(x, x), -1)[..., None, :]
    cost = np.linalg.norm(plane - GOALS, axis=-1).min(-1) ** 2
    for agent, axis in enumerate(axes[0]):
        axis.contour(x, x, cost, np.arange(1, 8) ** 2, colors="0.85", linewidths=0.7)
        counts = [0] * len(GOALS)
        for i in range(agent * episodes, (agent + 1) * episodes):
            path = rollouts[f"path{i}"]
            distance = np.linalg.norm(path[-1] - GOALS, axis=-1)
            goal, reached = distance.argmin(), distance.min() < 1
            counts[goal] += int(reached)
            style = dict(lw=1, marker="o", ms=2, alpha=0.75, zorder=2 + reached)
            axis.plot(*path.T, color=COLOURS[goal] if reached else "0.55", **style)
        axis.scatter(*GOALS.T, s=200, marker="*", c=COLOURS, edgecolors="black", zorder=4)
        axis.plot(0, 0, "+", color="black", ms=8, zorder=4)
        axis.set(xlim=(-7, 7), ylim=(-7, 7), aspect="equal", xticks=[-5, 0, 5], yticks=[-5, 0, 5])
        numbers = " / ".join(map(str, counts))
        axis.set_title(f"reached {numbers} of {episodes}", fontsize=10)
    figure.savefig(folder / "rollouts.png", dpi=120)
    plt.close(figure)


def draw(folder) -> None:
    """Draws whatever the run folder has data for."""
    draw_curve(Path(folder))
    draw_rollouts(Path(folder))
    draw_plane(Path(folder))


if __name__ == "__main__":
    for name in sys.argv[1:] or sys.exit(__doc__):
        draw(name)
        print(f"drew {name}/curve.png")
