"""What coarse products do to learning: TF32 and bfloat16 in software, on any device.

    python -m benchmarks.precision --scripts qam meam --seeds 4

A GPU rounds both operands of every product to 10 bits of mantissa with `--precision default` (TF32,
where it has that) and to 7 with bfloat16, in losses, derivatives and samplers alike, and adds in
float32. Here the same is done before each product, which a CPU then computes in float32. (The
derivative of rounding rounds as well, so that derivatives are a little coarser than a GPU's.) A row
per evaluation goes to benchmarks/results/precision.csv, flags and versions to precision.json; a run
that is complete is not run again.
"""

import contextlib
import dataclasses
from pathlib import Path

import jax

from analysis.command_line import run_program
from analysis.runs import read_rows
from analysis.scripts import script_of
from benchmarks.learning import keep, portable, table
from common.errors import UserError
from common.flags import configure

BITS = dict(float32=23, tf32=10, bfloat16=7)  # of the operands' mantissas


@dataclasses.dataclass(frozen=True)
class Options:
    scripts: tuple[str, ...] = ("qam", "meam")
    """Offline methods, with their default flags."""
    precisions: tuple[str, ...] = tuple(BITS)
    """Any of float32, tf32, bfloat16."""
    seeds: int = 4
    """Seeds: 0, 1, ..."""
    dataset_dir: str = ""
    """Folder where the dataset is or is made."""
    run_dir: str = "runs/precision"
    """Folder where the run folders are kept."""
    out: str = str(Path(__file__).resolve().parent / "results")
    """Folder of the CSV and JSON files."""


@contextlib.contextmanager
def rounded(bits: int):
    """Inside the context, traced programs round the operands of all their matrix products."""
    product = jax.lax.dot_general_p
    bind = product.bind

    def bind_rounded(*operands, **how):
        operands = [jax.lax.reduce_precision(x, 8, bits) for x in operands]
        return bind(*operands, **how)

    product.bind = bind_rounded
    jax.clear_caches()
    try:
        yield
    finally:
        product.bind = bind
        jax.clear_caches()


def main(options: Options) -> None:
    """Trains each script in each precision, and prints the table."""
    unknown = set(options.precisions) - set(BITS)
    if unknown:
        known = ", ".join(BITS)
        raise UserError(f"no precision {', '.join(sorted(unknown))}; choose from {known}")
    rows = []
    for name in options.scripts:
        script = script_of(name)
        name = script.__name__.split(".")[-1]  # of its folders
        for precision in options.precisions:
            args = configure(
                script.Args,
                script.ENV_DEFAULTS,
                script.Args.env,
                num_seeds=options.seeds,
                name=precision,
                run_dir=options.run_dir,
                dataset_dir=options.dataset_dir,
            )
            with rounded(BITS[precision]):
                script.main(args)
            folder = Path(args.run_dir, name, args.env, precision)
            label = f"{name}, {precision}"
            new = [dict(label=label, **row) for row in read_rows(folder / "eval.csv")]
            rows = keep(options.out, "precision", label, portable(folder), new)
    print(table(rows))


if __name__ == "__main__":
    run_program(main, Options, __doc__)
