"""The papers' published numbers, from benchmarks/published."""

from collections.abc import Iterable

import numpy as np

from analysis.panels import ALL, Pair
from analysis.runs import ROOT, read_rows
from analysis.statistics import Curve
from common.environments import ONLINE
from common.errors import UserError

Published = dict[tuple, dict[str, Curve]]  # (domain, task or "all") -> method -> numbers
OFFLINE_STEPS = 1_000_000  # updates in the papers; steps in FMER's tables
# Tables of FMER's paper: (table, metric of the table) for the metric `return`.
RETURN_TABLES = ("table2", "return"), ("table7", "accomplished_tasks")


def plain(name: str) -> str:
    """Returns the name by which methods are compared: qam_edit, QAM-EDIT -> qamedit.

    CGQL's plain mode is the paper's CGQL: "cgql plain" -> cgql.
    """
    name = name.lower().removesuffix(" plain")
    return "".join(letter for letter in name if letter.isalnum())


def read_published(metric: str) -> Published:
    """Reads what was published about a metric; {} if there is nothing.

    Numbers are mean, low and high, NaN where they were not published.
    """
    if metric == "success":
        return _read_success()
    if metric == "return":
        return _read_returns()
    return {}


def _read_success() -> Published:
    """Reads QAM's released curves. RLPD's steps are those of its own training, which began where
    the others go online."""
    found = {}
    for row in read_rows(ROOT / "benchmarks/published/qam_published.csv"):
        columns = [name for name in row if name.isdigit() and row[name]]
        steps = np.array([int(name) for name in columns])
        percent = np.array([float(row[name]) for name in columns])
        if row["method"] == "RLPD":
            steps = steps - OFFLINE_STEPS
        task = ALL if row["task"] == ALL else int(row["task"])
        methods = found.setdefault((row["domain"], task), {})
        empty = Curve(steps, np.full((len(steps), 3), np.nan))
        numbers = methods.setdefault(row["method"], empty).numbers
        kind = ("mean", "low", "high").index(row["number"])
        numbers[:, kind] = percent / 100
    return found


def _read_returns() -> Published:
    """Reads FMER's tables: returns after 1M steps, the mean of five seeds. The kitchen's return is
    the number of accomplished tasks."""
    found = {}
    for row in read_rows(ROOT / "benchmarks/published/fmer_published.csv"):
        if (row["table"], row["metric"]) in RETURN_TABLES:
            numbers = np.array([[float(row["mean"]), np.nan, np.nan]])
            methods = found.setdefault((fmer_domain(row["env"]), ALL), {})
            methods[row["method"]] = Curve(np.array([OFFLINE_STEPS]), numbers)
    return found


def fmer_domain(env: str) -> str:
    """Returns our name of an environment in FMER's tables: Hopper-v5, kitchen-n2 -> kitchen-2."""
    return env.lower().removesuffix("-v5").replace("-n", "-")


def published_curve(published: Published, method: str, pairs: list[Pair]) -> Curve | None:
    """Returns a method's published numbers on the pairs; None if some are missing.

    Where they are joined from several tasks or domains, there are means without intervals.
    """
    keys = _keys_of(published, pairs)
    names = {}
    for key in keys:
        names |= {plain(name): name for name in published.get(key, {})}
    name = names.get(plain(method))
    curves = []
    for key in keys:
        methods = published.get(key, {})
        if name not in methods:
            return None
        curves.append(methods[name])
    if len(curves) == 1:
        return curves[0]
    numbers = np.full_like(curves[0].numbers, np.nan)
    numbers[:, 0] = np.mean([curve.numbers[:, 0] for curve in curves], 0)
    return Curve(curves[0].steps, numbers)


def _keys_of(published: Published, pairs: list[Pair]) -> list[tuple]:
    """Returns the fewest keys of `Published` that make up the pairs: all, domains or tasks."""
    tasks_of = {}
    for domain, task in pairs:
        tasks_of.setdefault(domain, []).append(task)
    for domain, tasks in tasks_of.items():
        if domain not in ONLINE and len(tasks) != 5:
            return list(pairs)
    domains = [(domain, ALL) for domain in tasks_of]
    if len(pairs) == 50 and all(key in published for key in domains):
        return [(ALL, ALL)]
    return domains


def choose_published(
    published: Published, names: Iterable[str], labels: Iterable[str]
) -> list[str]:
    """Returns the published methods named by `names`: "own" are those among `labels`, "all" all."""
    known = {}
    for methods in published.values():
        known |= {plain(name): name for name in methods}
    own = {plain(label.split(",")[0]) for label in labels}
    chosen = []
    for name in names:
        if name == ALL:
            chosen += known.values()
        elif name == "own":
            chosen += [method for key, method in known.items() if key in own]
        elif plain(name) in known:
            chosen.append(known[plain(name)])
        else:
            others = ", ".join(known.values())
            raise UserError(f"No published {name} results are available; choose from {others}")
    return list(dict.fromkeys(chosen))
