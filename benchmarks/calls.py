"""What it costs that training comes back to the host about once a second.

    python -m benchmarks.calls                              QAM, small networks
    python -m benchmarks.calls --script meam --updates 100000

A run makes its updates in calls of `train_chunk` that take about a second, so that the progress bar
is true and signals are answered in time. Two costs arise once per call instead of once per update,
and are measured: what a call takes that makes no update, and what the host does between two calls.
The second comes from a real run, one agent on the point maze; its first calls, whose length has not
adapted yet, are left out. Writes benchmarks/results/calls.json: the medians, and the share of both
costs in the time.
"""

import dataclasses
import importlib.metadata
import json
import tempfile
import time
from pathlib import Path
from types import ModuleType

import jax
import numpy as np

from analysis.command_line import run_program
from analysis.scripts import script_of
from benchmarks import RESULTS
from benchmarks.throughput import OFFLINE_SIZES, Trained, describe, timed
from common.agents import train
from common.collect.dataset import collect
from common.errors import UserError

ENV = "pointmaze-medium"
SHORTEST = 0.5  # seconds of a call whose length has adapted


@dataclasses.dataclass(frozen=True)
class Options:
    script: str = "qam"
    """Offline method."""
    updates: int = 30_000
    """Updates of the run."""
    transitions: int = 20_000
    """Transitions of its data, which are collected first."""
    out: str = str(RESULTS / "calls.json")
    """File of the results."""


def clock_calls(script: ModuleType, options: Options, folder: Path) -> np.ndarray:
    """Trains, and returns when each call of `train_chunk` began and ended: (calls, 2), seconds."""
    collect(f"{ENV}-navigate", options.transitions, folder, workers=1)
    small = OFFLINE_SIZES["small"].flags
    known = script.Args.__dataclass_fields__.keys()
    flags = {name: small[name] for name in small.keys() & known}
    del flags["chunk_length"]  # the environment has its own
    flags |= dict(dataset_dir=str(folder), run_dir=str(folder), eval_episodes=0)
    flags |= dict(offline_steps=options.updates, online_steps=0)
    flags |= dict(log_interval=options.updates, eval_interval=options.updates)
    train_chunk = script.train_chunk
    times = []

    def clocked(*inputs):
        began = time.perf_counter()
        result = jax.block_until_ready(train_chunk(*inputs))
        times.append((began, time.perf_counter()))
        return result

    script.train_chunk = clocked
    try:
        train(script, env=ENV, **flags)
    finally:
        script.train_chunk = train_chunk
    return np.array(times)


def summarise(times: np.ndarray, empty: float) -> dict:
    """Returns the medians of the calls whose length has adapted, and the share of both costs.

    `times` are those of `clock_calls`, `empty` the seconds of a call without updates.
    """
    seconds = times[:, 1] - times[:, 0]
    between = times[1:, 0] - times[:-1, 1]
    adapted = seconds[:-1] >= SHORTEST
    adapted[:1] = False  # compiled
    if not adapted.any():
        raise UserError(f"no call took {SHORTEST} s: set --updates higher")
    call = float(np.median(seconds[:-1][adapted]))
    gap = float(np.median(between[adapted]))
    share = (empty + gap) / (call + gap)
    return dict(
        calls=int(adapted.sum()),
        call_s=round(call, 3),
        empty_call_ms=round(1e3 * empty, 3),
        between_calls_ms=round(1e3 * gap, 3),
        share=round(share, 5),
    )


def main(options: Options) -> dict:
    """Measures, prints and writes the results."""
    script = script_of(options.script)
    if not hasattr(script.Args, "offline_steps"):
        raise UserError(f"{options.script} has no offline phase")
    with tempfile.TemporaryDirectory() as folder:
        times = clock_calls(script, options, Path(folder))
    trained = Trained(options.script, "small", transitions=options.transitions)
    trained.seconds(1)  # compiles
    empty = timed(lambda: trained.seconds(0), 1.0)
    versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib")}
    head = dict(script=options.script, device=describe(), versions=versions)
    result = head | summarise(times, empty)
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(result)
    return result


if __name__ == "__main__":
    run_program(main, Options, __doc__)
