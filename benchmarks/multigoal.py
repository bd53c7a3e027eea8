"""FMER, SAC and DPMD on the plane with four goals: does the policy stay multimodal?

    python -m benchmarks.multigoal                 trains (runs/multigoal/), measures, draws
    python -m benchmarks.multigoal --only FMER     one method

Measures of docs/methods/fmer.md, each with its mean over seeds and 95 % bootstrap interval:
(a) coverage: entropy of the reached goals over 400 episodes, in units of log 4, and the share of
    episodes that reach one; actions are selected as in evaluations;
(b) agreement: share of a grid of 21 x 21 positions whose selected action deviates by less than 30
    degrees from the direction of the nearest goal (positions within 1 of a goal or about equally
    far from two goals are left out);
(c) directions: 400 unselected samples at the origin, share within 45 degrees of each goal.

Writes benchmarks/results/multigoal.json and, with all methods, docs/images/multigoal.png; also
multigoal-picture.json, from which `python plot.py --committed` draws that picture again.
"""

import dataclasses
import json
import shlex
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from analysis.command_line import run_program
from analysis.runs import ROOT
from analysis.statistics import interval
from analysis.style import GOAL_COLOURS, settings
from analysis.tables import cell
from benchmarks import RESULTS
from benchmarks.learning import configuration, launch
from common.agents import TrainedAgents, load_agents
from common.environments import GOALS, MULTIGOAL_STEPS, MultiGoal
from common.errors import UserError

METHODS = {  # label -> module, flags: trained until the return no longer rises
    "FMER": "fmer",
    "SAC": "baselines.sac --total-steps 45000 --eval-interval 15000",
    "DPMD": "baselines.dpmd --total-steps 30000 --eval-interval 15000",
}
EPISODES_SHOWN = 100
TITLES = ("selected actions", "samples at the origin", "100 episodes")  # of the picture's columns
SHOWN = ("coverage", "reached", "agreement", "largest_direction")  # in the printed table


@dataclasses.dataclass(frozen=True)
class Options:
    only: tuple[str, ...] = tuple(METHODS)
    """Methods to run."""
    seeds: int = 5
    """Agents of each method, with seeds 0, 1, ..."""
    run_dir: str = "runs/multigoal"
    """Folder where the run folders are kept."""
    episodes: int = 400
    """Episodes for measure (a), and samples for measure (c)."""
    out: str = str(RESULTS)
    """Folder of the JSON files."""
    picture: str = str(ROOT / "docs/images/multigoal.png")
    """File of the picture."""


# --- agents --------------------------------------------------------------------------------------


def train(command: str, options: Options) -> tuple[TrainedAgents, dict]:
    """Trains agents, or finds them trained; also returns a note of how they were made."""
    module, *flags = shlex.split(command)
    line = [module, *flags, "--num-seeds", str(options.seeds)]
    launch([*line, "--name", "default", "--run-dir", options.run_dir])
    folder = Path(options.run_dir, module.split(".")[-1], "multigoal/default")
    trained = load_agents(folder)
    note = dict(command=shlex.join(["python", "-m", *line]), seconds=trained.seconds)
    return trained, note | configuration(folder)["made_with"]


def choose(script, args, state, positions, seed, age=0, selected=True) -> np.ndarray:
    """Returns actions of all agents at positions (agents or 1, E, 2) -> (agents, E, 2)."""
    mode = script.MODES[0]
    if not selected:
        mode = "single" if "single" in script.MODES else "explore"
    num_agents = len(state.key)
    episodes = positions.shape[1]
    positions = jnp.broadcast_to(positions, (num_agents, episodes, 2))
    seeds = seed + jnp.arange(episodes, dtype=jnp.uint32)
    seeds = jnp.broadcast_to(seeds, (num_agents, episodes))
    ages = jnp.full(seeds.shape, age)
    actions = script.act(args, state, positions, seeds, ages, mode)  # chunks of one action
    return np.asarray(actions)[:, :, 0]


def play(script, args, state, episodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Plays -> paths (agents, E, steps + 1, 2), NaN after the end, and reached goals (agents, E).

    The goal is -1 where none was reached.
    """
    rng = np.random.default_rng(0)
    num_agents = len(state.key)
    noise = rng.standard_normal((num_agents, episodes, 2), np.float32)
    position = np.float32(0.1) * noise
    path = [position]
    planes = {}
    for episode in np.ndindex(num_agents, episodes):
        planes[episode] = MultiGoal()
        planes[episode].position = position[episode]
    over = np.zeros((num_agents, episodes), bool)
    goal = np.full((num_agents, episodes), -1)
    for age in range(MULTIGOAL_STEPS):
        action = choose(script, args, state, position, 1000, age)
        position = np.zeros_like(position)
        for episode, plane in planes.items():
            position[episode], _, over[episode], *_ = plane.step(action[episode])
        way = position[..., None, :] - GOALS
        nearest = (way**2).sum(-1).argmin(-1)
        running = goal < 0
        path.append(np.where(running[..., None], position, np.nan))
        goal = np.where(running & over, nearest, goal)
    return np.stack(path, 2), goal


# --- measures ------------------------------------------------------------------------------------


def grid() -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions (n, 2) of measure (b) and the nearest goal (n,)."""
    line = np.linspace(-6, 6, 21, dtype=np.float32)
    x, y = np.meshgrid(line, line)
    positions = np.stack([x.ravel(), y.ravel()], -1)
    distance = np.linalg.norm(positions[:, None] - GOALS, axis=-1)
    from_axes = np.abs(positions)
    from_diagonals = np.abs(from_axes[:, 0] - from_axes[:, 1])
    clear = (distance.min(1) >= 1) & (from_diagonals >= 0.5)
    return positions[clear], distance.argmin(1)[clear]


def cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the cosine of the angle between vectors (..., d)."""
    product = (x * y).sum(-1)
    norm_x = np.linalg.norm(x, axis=-1)
    norm_y = np.linalg.norm(y, axis=-1)
    return product / np.maximum(norm_x * norm_y, 1e-9)


def points_to_goal(action: np.ndarray) -> np.ndarray:
    """Says where actions (..., n, 2) on the grid point within 30 degrees to the nearest goal."""
    positions, nearest = grid()
    return cosine(action, GOALS[nearest] - positions) > np.cos(np.pi / 6)


def measure(script, args, state, episodes: int) -> tuple[dict, dict]:
    """Returns name -> numbers (agents, ...), and what the picture shows of the first agent."""
    path, goal = play(script, args, state, episodes)
    counts = (goal[..., None] == np.arange(4)).sum(1)  # (agents, 4)
    total = counts.sum(1, keepdims=True)
    share = counts / np.maximum(total, 1)
    entropy = -(share * np.log(np.maximum(share, 1e-12))).sum(1)
    positions, _ = grid()
    action = choose(script, args, state, positions[None], 2000)
    origin = np.zeros((1, episodes, 2))
    sample = choose(script, args, state, origin, 3000, selected=False)
    angle_cosine = cosine(sample[:, :, None], GOALS)  # (agents, E, 4)
    directions = (angle_cosine > np.cos(np.pi / 4)).mean(1)
    numbers = dict(
        coverage=entropy / np.log(4),
        reached=(goal >= 0).mean(1),
        goals=(counts > 0).sum(1),
        agreement=points_to_goal(action).mean(1),
        largest_direction=directions.max(1),
        directions=directions,
        counts=counts,
    )
    drawn = dict(
        action=action[0],
        sample=sample[0],
        path=path[0, :EPISODES_SHOWN],
        goal=goal[0, :EPISODES_SHOWN],
    )
    return numbers, drawn


# --- picture -------------------------------------------------------------------------------------


def draw(shown: dict[str, dict], picture: Path | str) -> None:
    """Draws a row per method: selected actions on the plane, samples at the origin, paths."""
    with plt.rc_context(settings("light")):
        figure, axes = plt.subplots(
            len(shown),
            3,
            figsize=(9, 3 * len(shown)),
            layout="constrained",
            squeeze=False,
        )
        for row, label in zip(axes, shown, strict=True):
            draw_row(row, label, shown[label])
        for axis, title in zip(axes[0], TITLES, strict=True):
            axis.set_title(title, fontsize=11)
        figure.savefig(picture, dpi=110)
        plt.close(figure)


def draw_row(row: np.ndarray, label: str, drawn: dict) -> None:
    """Draws a method's three panels."""
    actions, samples, paths = row
    draw_actions(actions, np.array(drawn["action"], float))
    draw_samples(samples, np.array(drawn["sample"], float))
    draw_paths(paths, np.array(drawn["path"], float), drawn["goal"])
    actions.set_ylabel(label, fontsize=12)
    for axis in row:
        axis.set_aspect("equal")
        axis.tick_params(labelsize=7)


def draw_actions(axis, action: np.ndarray) -> None:
    """Draws an arrow at each position of the grid, in the goal's colour if it points there."""
    positions, nearest = grid()
    goal_colours = np.array(GOAL_COLOURS)[nearest]
    colours = np.where(points_to_goal(action), goal_colours, "0.6")
    axis.quiver(
        *positions.T,
        *action.T,
        color=colours,
        angles="xy",
        width=4e-3,
    )
    draw_goals(axis)


def draw_samples(axis, sample: np.ndarray) -> None:
    """Draws samples within the unit circle."""
    angle = np.linspace(0, 2 * np.pi, 100)
    axis.scatter(*sample.T, s=5, alpha=0.5, color="0.3")
    axis.plot(np.cos(angle), np.sin(angle), lw=0.5, color="0.7")
    axis.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))


def draw_paths(axis, paths: np.ndarray, goals: list[int]) -> None:
    """Draws paths in the colours of the goals that they reach, grey without one."""
    for path, goal in zip(paths, goals, strict=True):
        colour = GOAL_COLOURS[int(goal)] if goal >= 0 else "0.5"
        axis.plot(*path.T, lw=0.7, alpha=0.6, color=colour)
    draw_goals(axis)


def draw_goals(axis) -> None:
    """Draws the four goals, and sets the limits of the plane."""
    axis.scatter(
        *GOALS.T,
        marker="*",
        s=90,
        color=GOAL_COLOURS,
        edgecolor="black",
        zorder=3,
    )
    axis.set(xlim=(-7, 7), ylim=(-7, 7))


def kept(shown: dict[str, dict]) -> str:
    """Returns what the picture is drawn from as JSON: three decimals, null after the episode."""
    rounded = {}
    for label, drawn in shown.items():
        rounded[label] = {}
        for name, numbers in drawn.items():
            numbers = np.round(np.float64(numbers), 3)
            rounded[label][name] = np.where(np.isnan(numbers), None, numbers).tolist()
    return json.dumps(rounded) + "\n"


def main(options: Options) -> None:
    """Trains, measures and draws the methods, and prints a table."""
    unknown = set(options.only) - set(METHODS)
    if unknown:
        raise UserError(f"no method {', '.join(unknown)}; choose from {', '.join(METHODS)}")
    path = Path(options.out, "multigoal.json")
    shown = {}
    results = {}
    if path.exists():
        results = json.loads(path.read_text())
    print("| | goals used | coverage | reached | agreement | largest direction at the origin |")
    print("|---" * 6 + "|")
    for label in options.only:
        trained, note = train(METHODS[label], options)
        numbers, shown[label] = measure(
            trained.script, trained.args, trained.state, options.episodes
        )
        rounded = {name: np.round(x, 4).tolist() for name, x in numbers.items()}
        results[label] = note | rounded
        path.write_text(json.dumps(results, indent=1) + "\n")
        goals = " ".join(map(str, numbers["goals"]))
        cells = [label, goals]
        cells += [cell(interval([numbers[name]])) for name in SHOWN]
        print("| " + " | ".join(cells) + " |", flush=True)
    if set(shown) == set(METHODS):
        Path(options.out, "multigoal-picture.json").write_text(kept(shown))
        draw(shown, options.picture)


if __name__ == "__main__":
    run_program(main, Options, __doc__)
