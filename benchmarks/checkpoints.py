"""What a checkpoint of an online run costs: the replay in parts, or all of it every time.

    python -m benchmarks.checkpoints                five seeds on Humanoid after 100,000 steps

A run with a full-sized network is at --steps and makes --interval more. Measured are its `Run.save`
then (the agents, and what is new of the replay), the same with all of the replay in one file (the
agents, and every transition), and `Run.restore` of either; seconds, bytes written, and the ratio.
Medians over rounds, in turn. Writes benchmarks/results/checkpoints.json.
"""

import contextlib
import dataclasses
import gc
import importlib.metadata
import io
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

from analysis.agents import script_of
from analysis.command_line import run_program
from benchmarks.throughput import describe
from common.data import Replay, spread
from common.envs import ONLINE, make_env
from common.errors import UserError
from common.run import CHECKPOINT, PART, Run, read_checkpoint, sealed

OUT = Path(__file__).resolve().parent / "results/checkpoints.json"


@dataclasses.dataclass(frozen=True)
class Options:
    script: str = "fmer"
    """An online method."""
    env: str = "humanoid"
    """Its environment, which has the sizes of a transition."""
    seeds: int = 5
    """Agents."""
    steps: int = 100_000
    """Environment steps of each agent that are in the replay."""
    interval: int = 10_000
    """Environment steps from one checkpoint to the next."""
    rounds: int = 5
    """Measurements, of which the medians count."""
    out: str = str(OUT)
    """File of the results."""


def measured(call: Callable) -> tuple[float, object]:
    """Returns the seconds of a call, and its result."""
    gc.collect()
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - start, result


def random_transitions(rng, empty: Replay, steps: int) -> dict[str, np.ndarray]:
    """Returns transitions of all agents, arrays (agents, steps, ...)."""
    rows = {}
    for name, x in vars(empty).items():
        if name != "size":
            shape = (len(x), steps, *x.shape[2:])
            rows[name] = rng.random(shape, np.float32)
    return rows


def measure_round(run: Run, state, sizes, rng, options: Options) -> tuple[dict, dict]:
    """Returns the seconds and the megabytes of saving and restoring a run in both ways."""
    empty = Replay.create(options.seeds, 0, sizes)
    total = options.steps + options.interval
    before = options.steps, random_transitions(rng, empty, options.steps)
    new = total, random_transitions(rng, empty, options.interval)
    first = spread(empty.refilled(total, [before]))
    run.save(1, dict(state=state, replay=first))
    replay = spread(empty.refilled(total, [before, new]))

    def save_whole():
        run.write("whole", *sealed(dict(state=state, replay=vars(replay))))

    def restore_parts():
        _, tree = run.restore(dict(state=state, replay=empty))
        return spread(tree["replay"])

    def restore_whole():
        rows = read_checkpoint(run.folder / "whole")["replay"]
        return spread(Replay.create(options.seeds, total, sizes)).append(rows)

    seconds = {}
    seconds["parts_save"], _ = measured(lambda: run.save(2, dict(state=state, replay=replay)))
    seconds["whole_save"], _ = measured(save_whole)
    parts = [run.folder / CHECKPOINT, run.folder / PART.format(total)]
    megabytes = dict(
        parts=sum(path.stat().st_size for path in parts) / 2**20,
        whole=(run.folder / "whole").stat().st_size / 2**20,
    )
    seconds["parts_restore"], _ = measured(restore_parts)
    seconds["whole_restore"], _ = measured(restore_whole)
    return seconds, megabytes


def main(options: Options) -> dict:
    """Measures the rounds, prints and writes the results."""
    script = script_of(options.script)
    if hasattr(script.Args, "tasks") or options.env not in ONLINE:
        raise UserError(f"expected an online method and its environment, not {options.env}")
    env = make_env(options.env)
    sizes = SimpleNamespace(observations=env.observation_space, actions=env.action_space)
    keys = jax.random.split(jax.random.PRNGKey(0), options.seeds)
    args = script.Args(env=options.env, action_size=env.action_space.shape[0])
    create = partial(script.create, args, env.observation_space.shape[0])
    state = spread(jax.jit(jax.vmap(create))(keys))
    agents = [(1, seed) for seed in range(options.seeds)]
    rng = np.random.default_rng(0)
    times = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        for i in range(options.rounds):
            own = dataclasses.replace(args, run_dir=folder, name=f"round-{i}")
            run = Run("checkpoints", own, agents, {})
            seconds, megabytes = measure_round(run, state, sizes, rng, options)
            times.append(seconds)
            for path in run.folder.iterdir():
                path.unlink()
    result = results(options, times, megabytes)
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return result


def results(options: Options, times: list[dict], megabytes: dict) -> dict:
    """Returns what is written: medians over the rounds, and all rounds."""
    rounds = {}
    for name in ("parts_save", "whole_save", "parts_restore", "whole_restore"):
        rounds[name] = [seconds[name] for seconds in times]
    medians = {name: float(np.median(x)) for name, x in rounds.items()}
    flags = dataclasses.asdict(options)
    del flags["out"]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
    return dict(
        device=describe(),
        versions=versions,
        options=flags,
        megabytes=megabytes,
        seconds=medians,
        ratio=dict(
            save=medians["whole_save"] / medians["parts_save"],
            restore=medians["whole_restore"] / medians["parts_restore"],
        ),
        rounds={name: np.round(x, 3).tolist() for name, x in rounds.items()},
    )


if __name__ == "__main__":
    run_program(main, Options, __doc__)
