"""Where the time of an update goes: each loss with its gradient alone, next to the whole update.

    python -m benchmarks.parts --scripts qam meam

A row per script, size and part, for one agent on random data: milliseconds (median), the arithmetic
of its matrix products, and the rate. Parts are compiled one by one: what they share makes the whole
cheaper than their sum, the optimiser's step and the moving averages make it dearer. `sample` is the
drawing of the batch. Writes benchmarks/results/parts.csv.
"""

import dataclasses
import importlib.metadata
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax

from analysis.command_line import run_program
from benchmarks import RESULTS, put_row
from benchmarks.throughput import Size, Trained, describe, products, timed
from common.errors import UserError
from common.sampling import sample

COLUMNS = ("script", "size", "part", "device", "ms", "gflop", "gflop_per_s", "jax")
OUT = RESULTS / "parts.csv"


@dataclasses.dataclass(frozen=True)
class Options:
    scripts: tuple[str, ...] = ("qam", "meam")
    """Offline methods."""
    sizes: tuple[Size, ...] = ("small", "paper")
    """Sizes as in benchmarks/throughput.py."""
    seconds: float = 3.0
    """Measured time of each part, at least."""
    transitions: int = 50_000
    """Transitions in the random data."""
    out: str = str(OUT)
    """File of the results."""


def first_agent(tree):
    """Returns the arrays of the first agent."""
    return jax.tree.map(lambda x: x[0], tree)


def parts(trained: Trained) -> dict[str, tuple]:
    """Returns name -> (function, arguments) of an offline script.

    The parts are the batch, the losses with their gradients, and the update.
    """
    script = trained.script
    args = trained.args
    state = first_agent(trained.state)
    data, replay, task = trained.inputs
    replay = first_agent(replay)

    def draw(key):
        return sample(key, data, replay, task[0], args.batch_size, args.chunk_length, args.discount)

    batch = jax.jit(draw)(state.key)
    found = {"sample": (draw, (state.key,))}
    for name, loss in vars(script).items():
        if name.endswith("_loss"):
            function = jax.value_and_grad(partial(loss, args), has_aux=True)
            found[name] = function, (state.params, state, batch, state.key)
    found["update"] = partial(script.update, args), (state, batch)
    return found


def measure(name: str, size: Size, options: Options) -> Iterator[dict]:
    """Yields the rows of a script."""
    trained = Trained(name, size, transitions=options.transitions)
    if not trained.offline:
        raise UserError(f"{name} is not an offline method; only those are split into these parts")
    name = trained.script.__name__  # of fql and of baselines.fql
    for part, (function, arguments) in parts(trained).items():
        compiled = jax.jit(function).lower(*arguments).compile()
        step = partial(call_and_wait, compiled, arguments)
        step()
        seconds = timed(step, options.seconds)
        gflop = products(jax.make_jaxpr(function)(*arguments).jaxpr) / 1e9
        yield dict(
            script=name,
            size=size,
            part=part,
            device=describe(),
            ms=f"{1e3 * seconds:.3f}",
            gflop=f"{gflop:.4f}",
            gflop_per_s=f"{gflop / seconds:.1f}",
            jax=importlib.metadata.version("jax"),
        )


def call_and_wait(function: Callable, arguments: tuple) -> None:
    """Calls a function on the device, and waits for its result."""
    jax.block_until_ready(function(*arguments))


def main(options: Options) -> None:
    """Measures each script at each size."""
    for name in options.scripts:
        for size in options.sizes:
            for row in measure(name, size, options):
                put_row(Path(options.out), row, COLUMNS[:4], COLUMNS)


if __name__ == "__main__":
    run_program(main, Options, __doc__)
