"""Learning curves of a committed suite of online methods, beside the published numbers.

    python -m benchmarks.curves halfcheetah          docs/images/halfcheetah.png

Mean return over seeds with its 95 % bootstrap interval, from benchmarks/results/<suite>.csv; dashed
at the right edge, what the FMER paper reports after a million steps (table 2, five seeds).
"""

import csv
import dataclasses
from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import tyro

from benchmarks.learning import ROOT, by_seed, interval
from plot import COLOURS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PUBLISHED = ROOT / "benchmarks/published/fmer_published.csv"


@dataclasses.dataclass(frozen=True)
class Options:
    suite: Annotated[str, tyro.conf.Positional]  # halfcheetah or hopper
    results: str = str(ROOT / "benchmarks/results")  # folder of <suite>.csv
    picture: str = ""  # (default: docs/images/<suite>.png)


def curves(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """label -> steps (n,), returns (n, 3): mean, and the ends of its interval."""
    if not path.exists():
        raise SystemExit(f"there is no {path}; python -m benchmarks.learning {path.stem} makes it")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for label in dict.fromkeys(row["label"] for row in rows):
        steps, returns = by_seed(rows, label)
        found[label] = steps, np.array([interval(values) for values in returns.T])
    return found


def published(suite: str) -> dict[str, float]:
    """method -> mean return of the FMER paper's table 2."""
    with open(PUBLISHED, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["table"] == "table2"]
    return {row["method"]: float(row["mean"]) for row in rows if row["env"].lower()[:-3] == suite}


def draw(suite: str, found: dict, picture: Path) -> None:
    figure, axis = plt.subplots(figsize=(5.5, 3.5), layout="constrained")
    paper = published(suite)
    last = max(steps[-1] for steps, _ in found.values())
    for (label, (steps, returns)), colour in zip(found.items(), COLOURS):
        axis.plot(steps, returns[:, 0], color=colour, label=label)
        axis.fill_between(steps, *returns[:, 1:].T, color=colour, alpha=0.2, lw=0)
        if label in paper:
            axis.plot([0.9 * last, last], [paper[label]] * 2, color=colour, ls="--")
            where = dict(ha="right", va="center", fontsize=7, color=colour)
            axis.annotate(f"{label}, paper, 1M", (0.89 * last, paper[label]), **where)
    axis.set(title=suite, xlabel="environment steps", ylabel="return")
    axis.xaxis.set_major_locator(plt.MaxNLocator(5))
    axis.legend(loc="center left", fontsize=8)
    figure.savefig(picture, dpi=130)
    plt.close(figure)


def main(options: Options) -> None:
    found = curves(Path(options.results, f"{options.suite}.csv"))
    picture = Path(options.picture or ROOT / f"docs/images/{options.suite}.png")
    draw(options.suite, found, picture)
    print(f"drew {picture}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
