"""Compare the methods of many runs: what plot.py's figures and tables of several runs show."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from analysis.command_line import say
from analysis.evaluations import organise, read_runs
from analysis.panels import Found, Pair, panels, with_shared_pairs
from analysis.published import Published, choose_published, read_published
from common.environments import ONLINE
from common.errors import UserError


@dataclass(frozen=True)
class Comparison:
    """Methods with their scores, and what is shown of them."""

    found: Found
    panels: dict[str, list[Pair]]  # title -> what is averaged in the panel
    metric: str
    iqm: bool  # the interquartile mean instead of the mean
    published: Published
    papers: list[str]  # the methods whose published numbers are shown


def compare(
    paths: list[Path],
    metric: str = "",
    by: str = "domain",
    iqm: bool = False,
    published: Iterable[str] | None = None,
    only: Iterable[str] = (),
) -> Comparison:
    """Reads the evaluations of run folders and CSV files, with the meaning of plot.py's flags."""
    rows = read_runs(paths)
    if not rows:
        raise UserError("There are no evaluations yet; wait for the first one, or give other runs.")
    metric = metric or _usual_metric(rows)
    found = _choose_methods(rows, metric, list(only))
    numbers = {}
    papers = []
    if published is not None:
        numbers = read_published(metric)
        if not numbers:
            raise UserError(f"No published results about {metric}; leave out --published.")
        papers = choose_published(numbers, published or ("own",), found)
    return Comparison(
        found=found,
        panels=with_shared_pairs(found, panels(found, by, metric)),
        metric=metric,
        iqm=iqm,
        published=numbers,
        papers=papers,
    )


def _usual_metric(rows: list[dict]) -> str:
    """Returns success where it was logged, else normalised scores if all runs have them, else
    return; also return if all runs are in the environments of the online papers."""
    if all(row["env"] in ONLINE for row in rows):
        return "return"
    if any(row.get("success", "") != "" for row in rows):
        return "success"
    if all(row.get("normalized_score", "") != "" for row in rows):
        return "normalized_score"
    return "return"


def _choose_methods(rows: list[dict], metric: str, wanted: list[str]) -> Found:
    """Returns the scores of the wanted methods in their order, or of all if none is named.

    Reports those without the metric.
    """
    labels = list(dict.fromkeys(row["label"] for row in rows))
    wanted = wanted or labels
    unknown = [name for name in wanted if name not in labels]
    if unknown:
        raise UserError(f"no method {', '.join(unknown)}; choose --only from {'; '.join(labels)}")
    scores = organise([row for row in rows if row["label"] in wanted], metric)
    skipped = [label for label in wanted if label not in scores]
    if skipped:
        say(f"Skipping methods for which {metric} was not logged: {', '.join(skipped)}")
    return {label: scores[label] for label in wanted if label in scores}
