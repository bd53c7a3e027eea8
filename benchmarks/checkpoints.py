"""What a checkpoint of an online run costs: the replay in parts, or all of it every time.

    python -m benchmarks.checkpoints                five seeds on Humanoid after 100,000 steps

A run with a full-sized network is at --steps and makes --interval more. Measured are its
`Checkpoints.save` then (the agents, and what is new in the replay), the same with all of the replay
in one file (the agents, and every transition), and restoring from either; seconds, bytes written,
and the ratio. Medians over rounds, in turn. Writes benchmarks/results/checkpoints.json.
"""

import dataclasses
import gc
import importlib.metadata
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from analysis.command_line import run_program
from analysis.scripts import script_of
from benchmarks import RESULTS
from benchmarks.throughput import describe
from common.checkpoints import CHECKPOINT, PART, Checkpoints, pack, read_checkpoint
from common.environments import ONLINE, env_sizes
from common.errors import UserError
from common.files import write_file
from common.sampling import Replay

OUT = RESULTS / "checkpoints.json"


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


def measure_round(
    folder: Path, state: Any, sizes: tuple[int, int], rng, options: Options
) -> tuple[dict, dict]:
    """Returns the seconds and the megabytes of saving and restoring a run in both ways."""
    total = options.steps + options.interval
    content = dict(state=state, metrics={})
    checkpoints = Checkpoints(folder, "benchmark")
    replay = Replay.create(options.seeds, total, *sizes)
    first = random_transitions(rng, replay, options.steps)
    second = random_transitions(rng, replay, options.interval)
    replay = replay.append(first)
    checkpoints.save(content, replay)
    replay = replay.append(second)

    def save_parts():
        checkpoints.save(content, replay)

    def save_whole():
        write_file(folder / "whole", pack(dict(state=state, replay=vars(replay))))

    def restore_parts():
        found = checkpoints.restore(content)
        empty = Replay.create(options.seeds, total, *sizes)
        return empty.refill(found["replay"])

    def restore_whole():
        rows = read_checkpoint(folder / "whole")["replay"]
        empty = Replay.create(options.seeds, total, *sizes)
        return empty.append(rows)

    seconds = {}
    seconds["parts_save"], _ = measured(save_parts)
    seconds["whole_save"], _ = measured(save_whole)
    parts = [folder / CHECKPOINT, folder / PART.format(total)]
    megabytes = dict(
        parts=sum(path.stat().st_size for path in parts) / 2**20,
        whole=(folder / "whole").stat().st_size / 2**20,
    )
    seconds["parts_restore"], _ = measured(restore_parts)
    seconds["whole_restore"], _ = measured(restore_whole)
    return seconds, megabytes


def main(options: Options) -> dict:
    """Measures the rounds, prints and writes the results."""
    script = script_of(options.script)
    if hasattr(script.Args, "tasks") or options.env not in ONLINE:
        what = f"{options.script} and {options.env}"
        raise UserError(f"expected an online method and its environment, not {what}")
    if options.rounds < 1:
        raise UserError("--rounds must be at least 1")
    sizes = env_sizes(options.env)
    observation_size, action_size = sizes
    args = script.Args(env=options.env, action_size=action_size)
    agents = [(1, seed) for seed in range(options.seeds)]
    state = script.create_agents(args, agents, observation_size)
    rng = np.random.default_rng(0)
    times = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            seconds, megabytes = measure_round(Path(folder), state, sizes, rng, options)
        times.append(seconds)
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
