"""FMER, SAC and DPMD on the plane with four goals: does a policy keep several ways open?

    python -m benchmarks.multigoal                 trains (runs/multigoal/), measures, draws
    python -m benchmarks.multigoal --only FMER     one method

Measures of docs/fmer.md, each with its mean over seeds and 95 % bootstrap interval:
(a) coverage: entropy of the reached goals over 400 episodes, in units of log 4, and the share of
    episodes that reach one; actions are selected as in evaluations;
(b) agreement: share of a grid of 21 x 21 positions whose selected action points within 30 degrees
    to the nearest goal (positions within 1 of a goal or nearly as far from two are left out);
(c) directions: 400 unselected samples at the origin, share within 45 degrees of each goal.

Writes benchmarks/results/multigoal.json and, with all methods, docs/images/multigoal.png; also
multigoal-picture.json, from which `python plot.py --committed` draws that picture again.
"""

import dataclasses
import json
import shlex
from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np

from analysis.agents import load_agents
from analysis.command_line import run_program
from analysis.runs import ROOT
from analysis.statistics import interval
from analysis.style import GOAL_COLOURS
from benchmarks.learning import configuration, launch
from common.envs import GOALS, MULTIGOAL_STEPS, multigoal
from common.errors import UserError

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = {  # label -> module, flags: trained until the return no longer rises
    "FMER": "fmer",
    "SAC": "baselines.sac --total-steps 45000 --eval-interval 15000",
    "DPMD": "baselines.dpmd --total-steps 30000 --eval-interval 15000",
}


@dataclasses.dataclass(frozen=True)
class Options:
    only: tuple[str, ...] = tuple(METHODS)  # methods to run
    seeds: int = 5
    run_dir: str = "runs/multigoal"  # where the run folders are kept
    episodes: int = 400  # for (a), and as many samples for (c)
    out: str = str(ROOT / "benchmarks/results")
    picture: str = str(ROOT / "docs/images/multigoal.png")


def train(command, options):
    """Trains, or finds trained -> the script's module, its arguments and the agents' state."""
    module, *flags = shlex.split(command)
    line = [module, *flags, "--num-seeds", str(options.seeds), "--run-dir", options.run_dir]
    launch(line)
    folder = Path(options.run_dir, module.split(".")[-1], "multigoal/default")
    (script, args, state, saved), config = load_agents(folder, 2), configuration(folder)
    command = shlex.join(["python", "-m", *line[:-2]])
    note = dict(command=command, seconds=saved["seconds"])
    note |= {name: config["made_with"][name] for name in ("device", "python", "packages")}
    return script, args, state, note


def choose(script, args, state, positions, seed, age=0, selected=True):
    """Actions of all agents at positions (agents or 1, E, 2) -> (agents, E, 2)."""
    modes = script.MODES
    mode = modes[0] if selected else "single" if "single" in modes else "explore"
    agents = len(state.key)
    positions = jnp.broadcast_to(positions, (agents, *positions.shape[1:]))
    seeds = seed + jnp.arange(positions.shape[1], dtype=jnp.uint32) * jnp.ones(
        (agents, 1), "uint32"
    )
    ages = jnp.full(seeds.shape, age)
    return np.asarray(script.act(args, state, positions, seeds, ages, mode))[:, :, 0]


def play(script, args, state, episodes):
    """Paths (agents, E, steps + 1, 2), NaN after the end, and goals reached (agents, E) or -1."""
    rng, agents = np.random.default_rng(0), len(state.key)
    position = 0.1 * rng.standard_normal((agents, episodes, 2), np.float32)
    path, goal = [position], np.full((agents, episodes), -1)
    for age in range(MULTIGOAL_STEPS):
        action = choose(script, args, state, position, 1000, age)
        position, _, over = multigoal(position, action)
        nearest = ((position[..., None, :] - GOALS) ** 2).sum(-1).argmin(-1)
        path.append(np.where(goal[..., None] < 0, position, np.nan))
        goal = np.where((goal < 0) & over, nearest, goal)
    return np.stack(path, 2), goal


def grid():
    """Positions (n, 2) of measure (b) and the nearest goal (n,)."""
    x, y = np.meshgrid(*[np.linspace(-6, 6, 21, dtype=np.float32)] * 2)
    positions = np.stack([x.ravel(), y.ravel()], -1)
    distance = np.linalg.norm(positions[:, None] - GOALS, axis=-1)
    clear = np.abs(np.abs(positions[:, 0]) - np.abs(positions[:, 1])) >= 0.5
    keep = (distance.min(1) >= 1) & clear
    return positions[keep], distance.argmin(1)[keep]


def cosine(x, y):
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return (x * y).sum(-1) / np.maximum(norms, 1e-9)


def measure(script, args, state, episodes):
    """name -> (agents, ...) numbers; and what the picture shows of the first agent."""
    path, goal = play(script, args, state, episodes)
    counts = (goal[..., None] == np.arange(4)).sum(1)  # (agents, 4)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    entropy = -(share * np.log(np.maximum(share, 1e-12))).sum(1) / np.log(4)
    positions, nearest = grid()
    action = choose(script, args, state, positions[None], 2000)
    agreement = (cosine(action, GOALS[nearest] - positions) > np.cos(np.pi / 6)).mean(1)
    sample = choose(script, args, state, np.zeros((1, episodes, 2)), 3000, selected=False)
    directions = (cosine(sample[:, :, None], GOALS) > np.cos(np.pi / 4)).mean(1)  # (agents, 4)
    numbers = dict(coverage=entropy, reached=(goal >= 0).mean(1), goals=(counts > 0).sum(1))
    numbers |= dict(agreement=agreement, largest_direction=directions.max(1))
    numbers |= dict(directions=directions, counts=counts)
    drawn = dict(action=action[0], sample=sample[0], path=path[0, :100], goal=goal[0, :100])
    return numbers, drawn


def draw(shown, picture):
    """A row per method: selected actions on the plane, samples at the origin, paths."""
    size = dict(figsize=(9, 3 * len(shown)), layout="constrained", squeeze=False)
    figure, axes = plt.subplots(len(shown), 3, **size)
    circle = np.linspace(0, 2 * np.pi, 100)
    positions, nearest = grid()
    for row, (label, drawn) in zip(axes, shown.items()):
        names = ("action", "sample", "path")
        action, sample, path = (np.array(drawn[name], float) for name in names)
        right = cosine(action, GOALS[nearest] - positions) > np.cos(np.pi / 6)
        color = np.where(right, np.array(GOAL_COLOURS)[nearest], "0.6")
        row[0].quiver(*positions.T, *action.T, color=color, angles="xy", width=4e-3)
        row[1].scatter(*sample.T, s=5, alpha=0.5, color="0.3")
        row[1].plot(np.cos(circle), np.sin(circle), lw=0.5, color="0.7")
        for one, end in zip(path, drawn["goal"]):
            row[2].plot(*one.T, lw=0.7, alpha=0.6, color=GOAL_COLOURS[int(end)] if end >= 0 else "0.5")
        for axis in (row[0], row[2]):
            axis.scatter(*GOALS.T, marker="*", s=90, color=GOAL_COLOURS, edgecolor="black", zorder=3)
            axis.set(xlim=(-7, 7), ylim=(-7, 7))
        row[1].set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
        row[0].set_ylabel(label, fontsize=12)
        for axis in row:
            axis.set_aspect("equal")
            axis.tick_params(labelsize=7)
    for axis, title in zip(axes[0], ("selected actions", "samples at the origin", "100 episodes")):
        axis.set_title(title, fontsize=11)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def kept(shown) -> str:
    """What the picture is drawn from, as JSON: three decimals, null after an episode's end."""
    numbers = lambda x: np.where(np.isnan(x), None, np.round(np.float64(x), 3)).tolist()
    drawn = {label: {name: numbers(x) for name, x in own.items()} for label, own in shown.items()}
    return json.dumps(drawn) + "\n"


def main(options: Options) -> None:
    if unknown := set(options.only) - set(METHODS):
        raise UserError(f"no method {', '.join(unknown)}; choose from {', '.join(METHODS)}")
    path, shown = Path(options.out, "multigoal.json"), {}
    results = json.loads(path.read_text()) if path.exists() else {}
    print("| | goals used | coverage | reached | agreement | largest direction at the origin |")
    print("|---" * 6 + "|")
    for label in options.only:
        script, args, state, note = train(METHODS[label], options)
        numbers, shown[label] = measure(script, args, state, options.episodes)
        results[label] = note | {name: np.round(x, 4).tolist() for name, x in numbers.items()}
        path.write_text(json.dumps(results, indent=1) + "\n")
        names = ("coverage", "reached", "agreement", "largest_direction")
        cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*interval([numbers[name]])) for name in names]
        goals = " ".join(map(str, numbers["goals"]))
        print("| " + " | ".join([label, goals, *cells]) + " |", flush=True)
    if set(shown) == set(METHODS):
        Path(options.out, "multigoal-picture.json").write_text(kept(shown))
        draw(shown, options.picture)


if __name__ == "__main__":
    run_program(main, Options, __doc__)
