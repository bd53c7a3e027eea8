"""Cost of an update of several methods relative to QAM's, measured side by side in one process.

    python -m benchmarks.cost --scripts qam meam qam_edit qam_fql
    python -m benchmarks.cost --scripts qam meam --sizes small paper --rounds 30
    python -m benchmarks.cost --scripts qam --sizes small paper --loop --out benchmarks/results/loop

In every round the scripts make their updates one after the other, so that a slower or busier
machine slows all of them. Reports medians over the rounds: milliseconds per update, and the ratio
to the first script in the same round. Random data, one agent. Writes
benchmarks/results/cost-<device>.json. --loop adds one more program: the first script's update in
the loop that most codebases have, a batch from NumPy and a dispatch per update.
"""

import dataclasses
import importlib.metadata
import json
import os
from pathlib import Path

import jax

from analysis.command_line import run_program
from benchmarks import RESULTS
from benchmarks.throughput import Loop, Size, Trained, measure_in_turns
from common.errors import UserError


@dataclasses.dataclass(frozen=True)
class Options:
    scripts: tuple[str, ...] = ("qam", "meam")  # Scripts; ratios are relative to the first one.
    sizes: tuple[Size, ...] = ("paper",)  # Sizes as in benchmarks/throughput.py.
    rounds: int = 15  # Interleaved measurements of each script.
    seconds: float = 0.3  # Approximate duration of a measurement.
    loop: bool = False  # Also measure the first script's update in a plain loop.
    transitions: int = 50_000  # Transitions in the random dataset.
    out: str = str(RESULTS)  # Folder of the JSON file.


def main(options: Options) -> dict:
    """Measures all scripts in turn, prints and writes the results."""
    device = jax.devices()[0].device_kind
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    flags = dataclasses.asdict(options)
    del flags["out"]
    results = dict(
        device=f"{device}, {os.cpu_count()} CPU cores",
        versions=versions,
        options=flags,
        rows=[],
    )
    for size in options.sizes:
        transitions = options.transitions
        measured = [Trained(name, size, transitions=transitions) for name in options.scripts]
        if options.loop and not measured[0].offline:
            raise UserError(f"--loop needs an offline script first, not {options.scripts[0]}")
        names = list(options.scripts)
        if options.loop:
            names.append("plain loop")
            measured.append(Loop(measured[0]))
        for one in measured:
            one.seconds(1)  # compiles
        milliseconds, ratios = measure_in_turns(measured, options.rounds, options.seconds)
        print(f"{size}: {'script':18s} ms/update  times {options.scripts[0]}")
        for i, name in enumerate(names):
            row = dict(size=size, script=name, ms=milliseconds[i])
            results["rows"].append(row | dict(ratio=ratios[i]))
            print(f"{'':{len(size) + 2}s}{name:18s} {row['ms']:9.2f}  {ratios[i]:9.2f}")
    path = Path(options.out, f"cost-{device}.json".replace(" ", "-").lower())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {path}")
    return results


if __name__ == "__main__":
    run_program(main, Options, __doc__)
