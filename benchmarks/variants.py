"""What the variants of a script's program cost on this machine, in one process, in turns.

    python -m benchmarks.variants --scripts qam meam --sizes small paper

The variants are those of benchmarks/gpu.py, which counts the kernels of a GPU that they save. Here
each is compiled and timed where it runs. In every round each makes its updates once, one after the
other, so that a slower or busier machine slows all of them. Reported are the medians over the
rounds: milliseconds per update, the ratio to the program as it is in the same round, and the ratio
of the seconds that it took to compile. One agent, random data. The rows of a configuration replace
older ones in benchmarks/results/variants.csv.
"""

import dataclasses
import importlib.metadata
import time
from pathlib import Path

from analysis.command_line import run_program
from analysis.runs import read_rows
from benchmarks import RESULTS, as_table, put_row
from benchmarks.gpu import VARIANTS, changed, prepare, refuse_unknown
from benchmarks.throughput import Size, Trained, describe, measure_in_turns

COLUMNS = "script size variant device ms_update ratio compile_s compile_ratio jax".split()
KEY = tuple(COLUMNS[:4])


@dataclasses.dataclass(frozen=True)
class Options:
    scripts: tuple[str, ...] = ("qam", "meam")
    """Scripts such as qam or baselines.fql."""
    sizes: tuple[Size, ...] = ("small", "paper")
    """Sizes of networks, batches and data, as in benchmarks/throughput.py."""
    variants: tuple[str, ...] = ("two-pass", "flat Adam", "unrolled")
    """Variants that are compared with the program as it is."""
    rounds: int = 9
    """Rounds in which every variant is measured once."""
    seconds: float = 1.0
    """Time of a variant in a round, about."""
    out: str = str(RESULTS / "variants.csv")
    """File of the results."""


def compiled(name: str, size: Size, variant: str) -> tuple[Trained, float]:
    """Returns an agent that has made its first update, and the seconds of compiling it."""
    with changed(variant):
        trained = prepare(name, size, 1, variant)
        start = time.perf_counter()
        trained.seconds(1)
        return trained, time.perf_counter() - start - trained.seconds(1)


def compare(name: str, size: Size, options: Options) -> list[dict]:
    """Returns a row per variant; the first is the program as it is."""
    variants = [VARIANTS[0], *options.variants]
    found = [compiled(name, size, variant) for variant in variants]
    programs, compile_seconds = zip(*found, strict=True)
    milliseconds, ratios = measure_in_turns(programs, options.rounds, options.seconds)
    rows = []
    for i, variant in enumerate(variants):
        row = dict(
            script=name.split(".")[-1],
            size=size,
            variant=variant,
            device=describe(),
            ms_update=f"{milliseconds[i]:.3f}",
            ratio=f"{ratios[i]:.3f}",
            compile_s=f"{compile_seconds[i]:.1f}",
            compile_ratio=f"{compile_seconds[i] / compile_seconds[0]:.2f}",
            jax=importlib.metadata.version("jax"),
        )
        rows.append(row)
    return rows


def main(options: Options) -> None:
    """Measures every script and size, and prints the table of all rows."""
    refuse_unknown(options.variants)
    for name in options.scripts:
        for size in options.sizes:
            for row in compare(name, size, options):
                put_row(Path(options.out), row, KEY, COLUMNS)
    print(as_table(read_rows(Path(options.out))))


if __name__ == "__main__":
    run_program(main, Options, __doc__)
