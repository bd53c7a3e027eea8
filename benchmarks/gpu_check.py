"""What a quarter of an hour of a GPU decides: updates, variants, shards, evaluations, in order.

    python -m benchmarks.gpu_check                  at most 12 minutes
    python -m benchmarks.gpu_check --tiny           the same with small numbers, on a CPU

Most valuable first: QAM and ME-AM with 1, 40 and 8 agents as they are, with unrolled flows, and
with --precision bfloat16 (benchmarks/gpu.py); the other scripts with 8 agents; swapping shards of a
100M set (benchmarks/shards.py); the share of evaluations in a run of 40 agents on scene. Every row
is written when it is known, so that a cut-off loses nothing; a part that fails is named and the
next one begins; none begins after the time. Writes gpu-check.csv, which has the columns of gpu.csv,
shards.json and shares.json to --out.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import qam
from analysis.command_line import run_program, say
from analysis.runs import read_rows
from analysis.tables import markdown
from benchmarks import RESULTS, gpu, put_row, shards, shares
from benchmarks.throughput import EVERY
from common.errors import in_a_line
from common.files import read_config
from common.flags import parse
from common.run import run_folder

FIRST = ("qam", "meam")
VARIANTS = ("as it is", "unrolled", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Options:
    tiny: bool = False
    """Small networks, few agents and scripts: a trial that ends within 3 minutes on a CPU."""
    minutes: float = 12.0
    """No part begins after this time."""
    out: str = ""
    """Folder of the results. The default is benchmarks/results, with --tiny the folder --work."""
    work: str = "runs/gpu-check"
    """Folder of the data and of the run that is evaluated."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured."""

    agents: tuple[int, ...]  # of the first scripts
    agents_of_others: int
    others: tuple[str, ...]
    update: gpu.Options
    swap: shards.Options
    run: str  # the command line of the run that is evaluated


def plan_of(options: Options) -> Plan:
    """Returns the plan of the paper's sizes, or of the trial."""
    others = tuple(name for name in EVERY if name not in FIRST)
    work = Path(options.work)
    swap = dict(folder=str(work / "shards"), out=str(Path(options.out, "shards.json")))
    line = f"--env scene --run-dir {work} --dataset-dir {work / 'data'} --name shares --overwrite"
    if options.tiny:
        return Plan(
            agents=(2,),
            agents_of_others=2,
            others=("baselines.sac",),
            update=gpu.Options(size="small", seconds=0.1),
            swap=shards.Options(
                **swap, env="cube-single", shards=2, transitions=2_000, trajectories=2,
                sizes=("small",), interval=5, rounds=1,
            ),
            run=f"{line} --collect 1001 --tasks 1 --hidden-dims 16 16 --num-critics 2 "
            "--flow-steps 2 --offline-steps 20 --log-interval 10 --eval-interval 10 "
            "--eval-episodes 1",
        )  # fmt: skip
    return Plan(
        agents=(1, 40, 8),
        agents_of_others=8,
        others=others,
        update=gpu.Options(),
        swap=shards.Options(**swap, sizes=("medium",), rounds=2),
        run=f"{line} --collect 100000 --tasks 1 2 3 4 5 --num-seeds 8 --offline-steps 4000 "
        "--log-interval 1000 --eval-interval 2000",
    )


def parts_of(plan: Plan, options: Options) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yields the name of each part and a function that measures it, most valuable first."""
    for agents in plan.agents:
        for variant in VARIANTS:
            for script in FIRST:
                yield (
                    f"{script}, {agents} agents, {variant}",
                    update_part(script, agents, variant, plan, options),
                )
    for script in plan.others:
        name = f"{script}, {plan.agents_of_others} agents"
        yield name, update_part(script, plan.agents_of_others, VARIANTS[0], plan, options)
    yield "swapping shards", lambda: shards.main(plan.swap)
    yield "share of evaluations", lambda: evaluate(plan, options)


def update_part(
    script: str, agents: int, variant: str, plan: Plan, options: Options
) -> Callable[[], None]:
    """Returns a function that measures an update and writes its row."""

    def measure():
        row = gpu.measure(script, agents, variant, plan.update)
        put_row(Path(options.out, "gpu-check.csv"), row, gpu.KEY, gpu.COLUMNS)

    return measure


def evaluate(plan: Plan, options: Options) -> None:
    """Trains QAM on scene and writes which part of the time its evaluations took."""
    args = parse(qam.Args, qam.ENV_DEFAULTS, plan.run.split())
    qam.main(args)
    folder = run_folder(qam.__file__, args)
    device = read_config(folder)["made_with"]["device"]
    found = shares.shares(folder) | dict(flags=plan.run, device=device)
    Path(options.out, "shares.json").write_text(json.dumps(found, indent=1))
    say(f"evaluations took {100 * found['share']:.0f} % of {found['seconds']:.0f} s")


def main(options: Options) -> None:
    """Measures part by part, and prints the table of the updates."""
    if not options.out:
        out = options.work if options.tiny else str(RESULTS)
        options = dataclasses.replace(options, out=out)
    Path(options.out).mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    skipped = []
    for name, measure in parts_of(plan_of(options), options):
        minutes = (time.monotonic() - began) / 60
        if minutes > options.minutes:
            skipped.append(name)
            continue
        say(f"{minutes:4.1f} min  {name}")
        try:
            measure()
        except Exception as error:  # Out of memory, a compiler's error: the next part may work.
            say(f"failed: {name}: {in_a_line(error)}")
    rows = [
        [row[name] for name in gpu.COLUMNS] for row in read_rows(Path(options.out, "gpu-check.csv"))
    ]
    print(markdown([gpu.COLUMNS, *rows]))
    if skipped:
        say(f"no time was left for: {'; '.join(skipped)}")


if __name__ == "__main__":
    run_program(main, Options, __doc__)
