"""Draws figures and writes tables of runs.

    python plot.py runs/qam/pointmaze-medium/default            curve.png and rollouts.png in there
    python plot.py runs/*/cube-double/* --out curves.png        several methods in one figure
    python plot.py runs/*/*/* --by domain --table table.md table.csv --step 1000000
    python plot.py runs/*/cube-double/* --by task --iqm --published --out tasks.pdf --dark
    python plot.py benchmarks/results/methods.csv --out methods.png
    python plot.py --committed                                  docs/images again

Without --out and --table, the figures of each run are drawn into its own folder, as scripts do when
they finish. With either flag, all runs are compared: folders with the same script and flags are one
method, whatever their names, seeds and tasks. A panel, or a table column, covers the tasks that all
of its methods have. CSV files from benchmarks/results can be given as well.

A number is the mean (--iqm: the interquartile mean) over seeds and tasks, with a 95 % percentile
bootstrap interval, stratified by task: seeds are resampled within each task.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

if __name__ == "__main__":
    from common.signals import quiet_imports

    quiet_imports()  # Ctrl-C ends the imports below without a traceback

import matplotlib
import tyro

from analysis.command_line import run_program
from analysis.comparison import compare
from analysis.figures import write_figure
from analysis.run_figures import draw_run
from analysis.runs import ROOT, RUN_TABLES, check_run
from analysis.tables import table_of, write_table
from common.errors import UserError

PICTURES = (".png", ".pdf", ".svg")
TABLES = (".md", ".csv")


@dataclass(frozen=True)
class Options:
    """The flags of the command."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Run folders or CSV files of results. They come before all flags."""
    out: str = ""
    """Write a figure of all runs to this .png, .pdf or .svg file."""
    table: tuple[str, ...] = ()
    """Write tables of all runs to these .md and .csv files."""
    metric: str = ""
    """Column of eval.csv to show (default: success if logged, else normalized_score or return)."""
    by: Literal["domain", "task", "all"] = "domain"
    """Make a panel or column for each of these."""
    iqm: bool = False
    """Use the interquartile mean instead of the mean."""
    published: tuple[str, ...] | None = None
    """Overlay published results: of the plotted methods (no value), of 'all', or of those named."""
    only: tuple[str, ...] = ()
    """Show only these methods, in this order."""
    step: int = 0
    """Use the evaluations at this step in the table. The default is the last one."""
    dark: bool = False
    """Draw on a dark background."""
    committed: bool = False
    """Draw the pictures of docs/images again from the committed results."""


def main(options: Options) -> None:
    """Draws or writes what the options ask for."""
    if options.committed:
        draw_committed(ROOT / "docs/images")
        return
    if not options.paths:
        raise UserError("There are no run folders. Put them before the flags; see --help.")
    paths = [Path(name) for name in options.paths]
    for path in paths:
        check_run(path)
    if options.out or options.table:
        compare_runs(options, paths)
    else:
        draw_each(paths)


def draw_each(paths: list[Path]) -> None:
    """Draws the figures of each run into its own folder."""
    for path in paths:
        if path.is_file():
            raise UserError(f"{path} is a file of results: say with --out or --table what to make")
        figures = draw_run(path)
        for figure in figures:
            print(f"drew {figure}")
        if not figures:
            print(f"{path} has nothing to draw yet")


def compare_runs(options: Options, paths: list[Path]) -> None:
    """Writes a figure and tables of all runs together."""
    tables = [Path(name).expanduser() for name in options.table]
    picture = Path(options.out).expanduser()
    if options.out:
        check_target(picture, PICTURES, paths)
    for path in tables:
        check_target(path, TABLES, paths)
    comparison = compare(
        paths,
        metric=options.metric,
        by=options.by,
        iqm=options.iqm,
        published=options.published,
        only=options.only,
    )
    if tables:
        table = table_of(comparison, options.step)
        for path in tables:
            write_table(path, table, comparison)
    if options.out:
        write_figure(picture, comparison, "dark" if options.dark else "light")
        print(f"wrote {picture}")
    for path in tables:
        print(f"wrote {path}")


def check_target(target: Path, suffixes: tuple[str, ...], sources: list[Path]) -> None:
    """Raises UserError if a file has another ending, or is one of those that are read."""
    if target.suffix not in suffixes:
        raise UserError(f"{target} must end with {' or '.join(suffixes)}")
    read = [path.resolve() for path in sources]
    if target.resolve() in read:
        raise UserError(f"{target} is read as a source: choose another file to write")
    if target.resolve().parent in read and target.name in RUN_TABLES:
        raise UserError(f"{target} has the results of a run: choose another file to write")


def draw_committed(images: Path) -> None:
    """Draws the pictures of docs/images from benchmarks/results and benchmarks/published."""
    # These are slow to import: they load jax.
    from benchmarks import bandits, multigoal, samples, tracking

    results = ROOT / "benchmarks/results"
    comparison = compare([results / "halfcheetah.csv"], published=("own",))
    write_figure(images / "halfcheetah.png", comparison)
    rows = json.loads((results / "bandits.json").read_text())["rows"]
    bandits.draw(rows, images / "bandits.png")
    drawn = json.loads((results / "multigoal-picture.json").read_text())
    multigoal.draw(drawn, images / "multigoal.png")
    kept = json.loads((results / "samples-fmer.json").read_text())
    samples.draw(kept["samples"], images / "samples-fmer.png")
    tracked = json.loads((results / "tracking.json").read_text())
    tracking.draw(tracked, images / "tracking.png")


if __name__ == "__main__":
    matplotlib.use("Agg")  # No figure is shown on a screen.
    run_program(main, Options, __doc__)
