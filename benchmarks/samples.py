"""Samples of a policy at one state while it learns: Figure 7 of the FMER paper, on the plane.

    python -m benchmarks.samples                      FMER after 10,000, 20,000 and 45,000 steps
    python -m benchmarks.samples --script sac         another online method
    python -m benchmarks.samples --steps 1500 3000    other times; the last one is the run's length

Trains agents in a temporary folder and draws unselected actions at the origin at each time. Writes
benchmarks/results/samples-<script>.json, with the share of each seed's samples within 45 degrees of
each goal and the first seed's samples, and their picture docs/images/samples-<script>.png, which
`python plot.py --committed` draws again from that file.
"""

import dataclasses
import json
import tempfile
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import numpy as np

from analysis.command_line import run_program
from analysis.runs import ROOT
from analysis.scripts import script_of
from analysis.style import settings
from benchmarks import RESULTS
from benchmarks.learning import configuration
from benchmarks.multigoal import choose, cosine, draw_samples
from common.environments import GOALS
from common.errors import UserError
from common.flags import configure
from common.run import run_folder


@dataclasses.dataclass(frozen=True)
class Options:
    script: str = "fmer"
    """Online method, such as fmer or sac."""
    steps: tuple[int, ...] = (10_000, 20_000, 45_000)
    """Environment steps after which samples are drawn."""
    seeds: int = 5
    """Agents, with seeds 0, 1, ..."""
    samples: int = 400
    """Samples of each agent."""
    out: str = str(RESULTS)
    """Folder of the JSON file."""
    pictures: str = str(ROOT / "docs/images")
    """Folder of the picture."""


def watch(script: ModuleType, args, steps: tuple[int, ...], samples: int) -> dict[int, np.ndarray]:
    """Trains agents, and returns step -> actions (agents, samples, 2) at the origin."""
    found = {}
    evaluate = script.evaluate_if_due
    origin = np.zeros((1, samples, 2))

    def evaluate_and_draw(args, run, state, envs, step):
        if step in steps:
            found[step] = choose(script, args, state, origin, 3000, selected=False)
        evaluate(args, run, state, envs, step)

    script.evaluate_if_due = evaluate_and_draw
    try:
        script.main(args)
    finally:
        script.evaluate_if_due = evaluate
    return found


def draw(samples: dict[int | str, list], path: Path) -> None:
    """Draws one agent's samples (n, 2) at each step, which is text in a JSON file."""
    with plt.rc_context(settings("light")):
        figure, axes = plt.subplots(
            1, len(samples), figsize=(3 * len(samples), 3.2), squeeze=False, layout="constrained"
        )
        for axis, (step, actions) in zip(axes[0], samples.items(), strict=True):
            draw_samples(axis, np.array(actions))
            axis.set_title(f"{int(step):,} steps", fontsize=11)
            axis.set_aspect("equal")
            axis.tick_params(labelsize=7)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def main(options: Options) -> None:
    """Trains, draws samples, and writes shares and picture."""
    script = script_of(options.script)
    if not hasattr(script.Args, "replay_size"):
        raise UserError(f"{options.script} is not one of the off-policy online methods")
    for folder in (options.out, options.pictures):
        Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        flags = dict(total_steps=max(options.steps), num_seeds=options.seeds)
        flags |= dict(run_dir=folder, name="samples")
        args = configure(script.Args, script.ENV_DEFAULTS, "multigoal", **flags)
        found = watch(script, args, options.steps, options.samples)
        made_with = configuration(run_folder(script.__file__, args))["made_with"]
    shares = {}
    samples = {}
    for step, actions in found.items():
        near = cosine(actions[:, :, None], GOALS) > np.cos(np.pi / 4)  # (agents, samples, goals)
        shares[step] = near.mean(1).round(3).tolist()
        samples[step] = np.float64(actions[0]).round(3).tolist()
        print(f"{step:,} steps: shares towards each goal, per seed: {shares[step]}")
    name = f"samples-{options.script}"
    content = dict(made_with=made_with, goals=GOALS.tolist(), shares=shares, samples=samples)
    Path(options.out, f"{name}.json").write_text(json.dumps(content) + "\n")
    draw(samples, Path(options.pictures, f"{name}.png"))


if __name__ == "__main__":
    run_program(main, Options, __doc__)
