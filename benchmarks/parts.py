"""Where the time of an update goes: each loss with its gradient alone, next to the whole update.

    python -m benchmarks.parts --scripts qam meam

A row per script, size and part, for one agent on random data: milliseconds (median), the arithmetic
of its matrix products, and the rate. Parts are compiled one by one: what they share makes the whole
cheaper than their sum, the optimiser's step and the moving averages make it dearer. `sample` is the
drawing of the batch. Writes benchmarks/results/parts.csv.
"""

import dataclasses
import importlib.metadata
from functools import partial
from pathlib import Path

import jax

from analysis.command_line import run_program
from benchmarks.throughput import Size, Trained, describe, products, put_row, timed
from common.data import sample
from common.errors import UserError

COLUMNS = ("script", "size", "part", "device", "ms", "gflop", "gflop_per_s", "jax")
OUT = Path(__file__).resolve().parent / "results/parts.csv"


@dataclasses.dataclass(frozen=True)
class Options:
    scripts: tuple[str, ...] = ("qam", "meam")  # offline methods
    sizes: tuple[Size, ...] = ("small", "paper")  # see benchmarks/throughput.py
    seconds: float = 3.0  # measured time of each part, at least
    transitions: int = 50_000  # in the random data
    out: str = str(OUT)


def parts(trained) -> dict:
    """Name -> (function, arguments) of an offline script: losses with their gradients, the batch,
    the update."""
    script, args = trained.script, trained.args
    one = lambda tree: jax.tree.map(lambda x: x[0], tree)
    state, (data, replay, task) = one(trained.state), trained.inputs
    sizes = args.batch_size, args.chunk_length, args.discount
    draw = lambda key: sample(key, data, one(replay), task[0], *sizes)
    batch = jax.jit(draw)(state.key)
    found = {"sample": (draw, (state.key,))}
    for name, loss in vars(script).items():
        if name.endswith("_loss"):
            function = jax.value_and_grad(partial(loss, args), has_aux=True)
            found[name] = function, (state.params, state, batch, state.key)
    return found | {"update": (partial(script.update, args), (state, batch))}


def measure(name, size, options):
    """Rows of a script."""
    trained = Trained(name, size, transitions=options.transitions)
    if not trained.offline:
        raise UserError(f"{name} is no offline method: its updates have other parts")
    name = trained.script.__name__  # of fql and of baselines.fql
    for part, (function, arguments) in parts(trained).items():
        compiled = jax.jit(function).lower(*arguments).compile()
        step = lambda compiled=compiled, inputs=arguments: jax.block_until_ready(compiled(*inputs))
        step()
        seconds = timed(step, options.seconds)
        flops = products(jax.make_jaxpr(function)(*arguments).jaxpr)
        row = dict(script=name, size=size, part=part, device=describe(), ms=f"{1e3 * seconds:.3f}")
        row |= dict(gflop=f"{flops / 1e9:.4f}", gflop_per_s=f"{flops / 1e9 / seconds:.1f}")
        yield row | dict(jax=importlib.metadata.version("jax"))


def main(options: Options) -> None:
    for name in options.scripts:
        for size in options.sizes:
            for row in measure(name, size, options):
                put_row(Path(options.out), row, COLUMNS[:4], COLUMNS)


if __name__ == "__main__":
    run_program(main, Options, __doc__)
