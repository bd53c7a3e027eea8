"""Where the time of an update goes on a CPU, kernel by kernel, and how far it is from the peak.

    taskset -c 0 python -m benchmarks.kernels --scripts qam meam
    python -m benchmarks.kernels --table             prints the committed rows

Traces `train_chunk` of one agent on random data with jax's profiler, and adds up the kernels of the
compiled program by what they are: matrix products (with what XLA fuses into them), copies and
transposes, random numbers, and the rest, which is element by element: activations, LayerNorm, Adam
and the moving averages. The peak is that of NumPy's BLAS on a large product, in the same process.
On several cores kernels that run side by side are counted side by side, so use one. The row of a
configuration replaces an older one in benchmarks/results/kernels.csv.
"""

import collections
import dataclasses
import gzip
import importlib.metadata
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from analysis.command_line import run_program
from analysis.runs import read_rows
from benchmarks import RESULTS, as_table, put_row
from benchmarks.throughput import Size, Trained, describe, timed
from common.devices import keep_freed_memory
from common.errors import UserError

KINDS = ("products", "copies", "random numbers", "element by element")
KEY = ("script", "size", "kind", "device")
COLUMNS = (*KEY, "ms", "share", "gflop_per_s", "peak_gflop_per_s", "jax")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\(")
CONTAINERS = ("while", "call", "conditional")  # the kernels within are counted themselves


@dataclasses.dataclass(frozen=True)
class Options:
    scripts: tuple[str, ...] = ("qam", "meam")
    """Scripts of either family."""
    sizes: tuple[Size, ...] = ("paper",)
    """Sizes as in benchmarks/throughput.py."""
    updates: int = 5
    """Updates that are traced."""
    transitions: int = 50_000
    """Transitions in the random data."""
    table: bool = False
    """Measure nothing, and print what is committed."""
    out: str = str(RESULTS / "kernels.csv")
    """File of the results."""


def kinds_of(text: str) -> dict[str, str]:
    """Returns the kind of every kernel in the text of a compiled program."""
    kinds = {}
    for line in text.splitlines():
        instruction = INSTRUCTION.match(line)
        if not instruction:
            continue
        name, operation = instruction.groups()
        if operation in CONTAINERS:
            continue
        if operation in ("dot", "convolution") or name.startswith("ynn_fusion"):
            kinds[name] = "products"  # XLA's library of products is called YNN
        elif "threefry" in line or "random" in line or operation.startswith("rng"):
            kinds[name] = "random numbers"
        elif re.match(r"(wrapped_)?(copy|transpose|bitcast)", name):
            kinds[name] = "copies"
        else:
            kinds[name] = "element by element"
    return kinds


def traced_seconds(trained: Trained, updates: int) -> dict[str, float]:
    """Returns the seconds of each kernel in one update, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for _ in range(updates):
                trained.seconds(1)
        (path,) = Path(folder).glob("**/perfetto_trace.json.gz")
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
    seconds = collections.Counter()
    for event in events:
        if event.get("ph") == "X":
            seconds[event["name"]] += 1e-6 * event.get("dur", 0) / updates
    return seconds


def blas_peak(size: int = 2048) -> float:
    """Returns the GFLOP/s of NumPy's BLAS."""
    left, right = np.random.default_rng(0).normal(size=(2, size, size)).astype(np.float32)
    seconds = timed(lambda: left @ right, 1.0)
    return 2e-9 * size**3 / seconds


def measure(name: str, size: Size, options: Options) -> Iterator[dict]:
    """Yields a row for each kind of kernel, and one for the whole update."""
    if jax.default_backend() != "cpu":
        raise UserError("this measures CPUs only; on a GPU, use benchmarks/gpu.py")
    trained = Trained(name, size, transitions=options.transitions)
    trained.seconds(2)
    whole = timed(lambda: trained.seconds(1), 2.0)
    kinds = kinds_of(trained.train.lower(*trained.call(1)).compile().as_text())
    spent = collections.Counter()
    for kernel, seconds in traced_seconds(trained, options.updates).items():
        if kernel in kinds:
            spent[kinds[kernel]] += seconds
    gflop = 1e-9 * trained.flops()
    peak = blas_peak()
    common = dict(
        script=name.split(".")[-1],
        size=size,
        device=f"{describe()}, {len(os.sched_getaffinity(0))} used",
        peak_gflop_per_s=round(peak),
        jax=importlib.metadata.version("jax"),
    )
    traced = sum(spent.values())
    for kind in KINDS:
        row = common | dict(kind=kind, ms=round(1e3 * spent[kind], 3))
        row["share"] = round(spent[kind] / traced, 3)
        if kind == "products":
            row["gflop_per_s"] = round(gflop / spent[kind])
        yield row
    yield common | dict(kind="update", ms=round(1e3 * whole, 3), gflop_per_s=round(gflop / whole))


def main(options: Options) -> None:
    """Measures scripts, and prints all rows."""
    path = Path(options.out)
    if not options.table:
        keep_freed_memory()
        for name in options.scripts:
            for size in options.sizes:
                for row in measure(name, size, options):
                    put_row(path, row, KEY, COLUMNS)
    print(as_table(read_rows(path), COLUMNS))


if __name__ == "__main__":
    run_program(main, Options, __doc__)
