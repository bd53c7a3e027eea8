"""What it costs that a run answers signals in time.

    python -m benchmarks.calls                     QAM with small networks on the point maze

A run makes its updates in calls of about a second (`SECONDS_PER_CALL` of common/run.py), so that
the bar moves and Ctrl-C is answered. Beside it, in turns, is the same run with calls that end only
where a row is due. Writes benchmarks/results/calls.json: milliseconds per update between two rows,
the first of which has compiled it, of each round, and the median of their ratios.
"""

import dataclasses
import importlib.metadata
import json
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

from analysis.command_line import run_program
from analysis.scripts import script_of
from benchmarks import RESULTS
from benchmarks.throughput import describe
from common.flags import configure
from common.tables import Tables

SMALL = dict(hidden_dims=(128, 128), num_critics=2, flow_steps=5, batch_size=64)


@dataclasses.dataclass(frozen=True)
class Options:
    script: str = "qam"
    """Offline script, such as qam or meam."""
    updates: int = 20_000
    """Updates between two rows, which are measured."""
    rounds: int = 5
    """Pairs of runs."""
    dataset_dir: str = "data"
    """Folder where the dataset of the point maze is found or made."""
    out: str = str(RESULTS / "calls.json")
    """File of the results."""


def milliseconds(options: Options, seconds_per_call: float) -> float:
    """Trains, and returns the time of an update between the two rows of train.csv."""
    script = script_of(options.script)
    moments = []
    log = Tables.log

    def log_and_note(*arguments):
        moments.append(time.perf_counter())
        log(*arguments)

    with tempfile.TemporaryDirectory() as folder:
        args = configure(
            script.Args,
            script.ENV_DEFAULTS,
            "pointmaze-medium",
            **SMALL,
            name="calls",
            run_dir=folder,
            dataset_dir=options.dataset_dir,
            offline_steps=2 * options.updates,
            log_interval=options.updates,
            eval_interval=2 * options.updates,
            eval_episodes=0,
        )
        with mock.patch("common.run.SECONDS_PER_CALL", seconds_per_call):
            with mock.patch.object(Tables, "log", log_and_note):
                script.main(args)
    first, second = moments
    return 1000 * (second - first) / options.updates


def main(options: Options) -> dict:
    """Measures in turns, prints and writes the results."""
    rounds = []
    for _ in range(options.rounds):
        pair = dict(
            about_a_second=milliseconds(options, 1.0),
            until_a_row=milliseconds(options, float("inf")),
        )
        print(pair, flush=True)
        rounds.append(pair)
    ratios = [pair["about_a_second"] / pair["until_a_row"] for pair in rounds]
    results = dict(
        device=describe(),
        jax=importlib.metadata.version("jax"),
        script=options.script,
        updates=options.updates,
        milliseconds_per_update=rounds,
        ratio=statistics.median(ratios),
    )
    Path(options.out).write_text(json.dumps(results, indent=1) + "\n")
    print(f"ratio {results['ratio']:.4f}")
    return results


if __name__ == "__main__":
    run_program(main, Options, __doc__)
