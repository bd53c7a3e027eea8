"""Where the time of runs went: training or evaluation.

    python -m benchmarks.shares runs/qam/pointmaze-medium/default ...

Evaluation is the time from a row of train.csv to the rows of eval.csv at the same step; the rest,
compilation and environment steps between updates included, counts as training. A run that was
continued counts from its start, with the time that was not lost.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from analysis.command_line import run_program
from analysis.runs import read_csv
from analysis.tables import markdown
from common.errors import UserError


@dataclass(frozen=True)
class Options:
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""


def shares(folder: Path) -> dict[str, float]:
    """Returns a run's seconds in all, its seconds of evaluation, and their share."""
    train = read_csv(folder / "train.csv")
    evaluation = read_csv(folder / "eval.csv")
    if not (train and evaluation):
        raise UserError(f"{folder} needs rows in both train.csv and eval.csv")
    trained = dict(zip(train["step"], train["seconds"], strict=True))
    ended = dict(zip(evaluation["step"], evaluation["seconds"], strict=True))
    spent = sum(end - trained[step] for step, end in ended.items() if step in trained)
    total = max(ended.values())
    return dict(seconds=total, evaluation=spent, share=spent / total)


def main(options: Options) -> None:
    """Prints a row per run."""
    if not options.folders:
        raise UserError("name the folders of runs")
    lines = [["run", "seconds", "evaluation", "share"]]
    for folder in options.folders:
        found = shares(folder)
        name = "/".join(folder.resolve().parts[-3:])
        seconds = f"{found['seconds']:.0f}"
        evaluation = f"{found['evaluation']:.0f}"
        lines.append([name, seconds, evaluation, f"{found['share']:.3f}"])
    print(markdown(lines))


if __name__ == "__main__":
    run_program(main, Options, __doc__)
