"""Offline methods on data that are not OGBench's: the replays of SAC in gymnasium's environments.

    python -m benchmarks.own_data pendulum               Pendulum-v1, 10,000 transitions
    python -m benchmarks.own_data inverted-pendulum      InvertedPendulum-v5, 10,000
    python -m benchmarks.own_data halfcheetah            HalfCheetah-v5, 100,000
    python -m benchmarks.own_data pendulum --table       only prints the committed table

The first call trains SAC and writes its replay as a dataset of Minari, with episodes from random to
trained. Every method then learns from it. Results go to benchmarks/results/own-<set>.csv and .json,
like those of benchmarks.learning. The table has the return at the end, mean over seeds [95 %
bootstrap interval], and the same as a normalised score: 0 is the mean of the data's random
episodes, 100 the last evaluation of SAC.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro

from analysis.command_line import run_program
from analysis.evaluations import organise
from analysis.runs import read_rows
from analysis.statistics import interval
from analysis.tables import cell, markdown
from benchmarks import RESULTS, learning, refuse_committed
from common.collect.replay import convert
from common.errors import UserError
from common.own_data import load_minari

METHODS = {  # label -> command line
    "behaviour cloning": "qam --inv-temp 0 --flow-steps 5",
    "qam": "qam --flow-steps 5",
    "meam": "meam --flow-steps 5",
    "fql": "baselines.fql --flow-steps 5",
    "ifql": "baselines.ifql --flow-steps 5",
    "rebrac": "baselines.rebrac",
}
SMALL = "--hidden-dims 128 128 --num-critics 2 --batch-size 128 --lr 1e-3"
LARGER = "--hidden-dims 256 256 --num-critics 2 --batch-size 128 --lr 5e-4"
SHORT = "--offline-steps 5000 --eval-interval 2500 --eval-episodes 20 --log-interval 500"
LONG = "--offline-steps 10000 --eval-interval 5000 --eval-episodes 10 --log-interval 1000"
SCALED = "--chunk-length 1 --reward-scale 0.1"


class Set(NamedTuple):
    """A dataset and what is done with it."""

    env: str
    warmup_steps: int  # random ones, at the start of the data
    sac: str  # flags of the run whose replay is the dataset
    flags: str  # of all methods


SETS = {
    "pendulum": Set(
        "Pendulum-v1",
        1_000,
        "--total-steps 10000 --hidden-dims 128 128 --batch-size 128 --actor-lr 1e-3",
        f"{SCALED} {SMALL} {SHORT}",
    ),
    "inverted-pendulum": Set(
        "InvertedPendulum-v5",
        1_000,
        "--total-steps 10000 --hidden-dims 128 128 --batch-size 128 --actor-lr 1e-3",
        f"{SCALED} {SMALL} {SHORT}",
    ),
    "halfcheetah": Set(
        "HalfCheetah-v5",
        5_000,
        "--total-steps 100000",
        f"{SCALED} --normalize-observations {LARGER} {LONG}",
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of the command."""

    set: Annotated[str, tyro.conf.Positional]
    """Which data: pendulum, inverted-pendulum or halfcheetah."""
    seeds: int = 3
    """Seeds of each method: 0, 1, ..."""
    only: tuple[str, ...] = ()
    """Labels to run. The default is all."""
    more: str = ""
    """Further flags of all methods, such as "--offline-steps 100": for trying."""
    more_sac: str = ""
    """Further flags of SAC."""
    run_dir: str = "runs/own-data"
    """Folder where the run folders are kept."""
    table: bool = False
    """Run nothing, and print the table of what is committed."""
    out: str = str(RESULTS)
    """Folder of the CSV and JSON files."""


def make_dataset(options: Options) -> dict:
    """Trains SAC and writes its replay as a dataset; returns its id and what is in it."""
    chosen = SETS[options.set]
    line = f"{chosen.sac} --warmup-steps {chosen.warmup_steps} {options.more_sac}".split()
    command = ["baselines.sac", "--env", chosen.env, *line]
    learning.launch([*command, "--name", "data", "--run-dir", options.run_dir])
    folder = Path(options.run_dir, "sac", chosen.env, "data")
    last = read_rows(folder / "eval.csv")[-1]
    final = float(last["return"])
    id = f"{options.set}/sac-{int(last['step'])}-v0"
    try:
        load_minari(id)
    except UserError:
        # Twice: the random episodes have to be known before their mean can be written.
        draft = f"{options.set}/random-{chosen.warmup_steps}-v0"
        random = convert(str(folder), draft, first=chosen.warmup_steps).mean()
        convert(str(folder), id, scores=(float(random), final))
    data = load_minari(id)
    returns = np.array([episode.rewards.sum() for episode in data])
    best = np.sort(returns)[-max(1, len(returns) // 10) :]
    return dict(
        dataset=f"minari:{id}",
        command=" ".join(["python", "-m", *command]),
        transitions=int(data.total_steps),
        episodes=len(returns),
        mean_return=float(returns.mean()),
        best_tenth=float(best.mean()),
        sac=final,
    )


def table(rows: list[dict], data: dict) -> str:
    """Returns Markdown with the data's returns, and a row per method."""
    lines = [["", "return", "normalised score"]]
    kinds = {"the data": "mean_return", "their best tenth": "best_tenth", "SAC at its end": "sac"}
    for label, key in kinds.items():
        lines.append([label, f"{data[key]:.1f}", ""])
    scores = organise(rows, "normalized_score")
    for label, domains in organise(rows, "return").items():
        cells = []
        for found in (domains, scores[label]):
            (own,) = found.values()
            last = own.by_task[1][:, -1]
            cells.append(cell(interval([last]), 1, len(last)))
        lines.append([label, *cells])
    return markdown(lines)


def run_methods(options: Options, labels: Sequence[str]) -> None:
    """Makes the dataset if it is missing, runs the methods, and keeps what they logged."""
    suite = f"own-{options.set}"
    data = make_dataset(options)
    learning.keep(options.out, suite, "data", data, [])
    flags = f"--dataset {data['dataset']} {SETS[options.set].flags} {options.more}"
    own = learning.Options(suite, seeds=options.seeds, run_dir=options.run_dir)
    for label in labels:
        note, rows = learning.run(label, METHODS[label], own, flags, ())
        learning.keep(options.out, suite, label, note, rows)


def main(options: Options) -> None:
    """Runs the methods on one of the sets, and prints its table."""
    if options.set not in SETS:
        raise UserError(f"there is no set {options.set}; choose one of {', '.join(SETS)}")
    unknown = set(options.only) - set(METHODS)
    if unknown:
        raise UserError(f"no label {', '.join(unknown)}; choose from {', '.join(METHODS)}")
    if options.more or options.more_sac:
        refuse_committed(options.out, "--more")
    if not options.table:
        run_methods(options, options.only or list(METHODS))
    rows, notes = learning.kept(options.out, f"own-{options.set}")
    print(table(rows, notes["data"]) if rows else "nothing was run")


if __name__ == "__main__":
    run_program(main, Options, __doc__)
