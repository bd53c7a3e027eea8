"""Tables of methods, in Markdown and as CSV."""

import csv
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from analysis.comparison import Comparison
from analysis.files import open_to_write
from analysis.panels import Found, Pair
from analysis.published import OFFLINE_STEPS, Published, published_curve
from analysis.statistics import interval, shared_scores
from analysis.style import thousands
from common.errors import UserError


class Entry(NamedTuple):
    """A number of a table."""

    step: int
    numbers: tuple[float, float, float]  # centre, low and high end of its interval
    seeds: int  # the least number per task; 0 if published


Table = dict[str, dict[str, Entry | None]]  # method -> column -> entry
Columns = dict[str, list[Pair]]  # title -> what is averaged


# --- text ----------------------------------------------------------------------------------------


def markdown(lines: list[list[str]]) -> str:
    """Returns a Markdown table of lines of cells, the head first."""
    head, *rows = ["| " + " | ".join(line) + " |" for line in lines]
    head = head.replace("|  |", "| |", 1)
    rule = "|---" * len(lines[0]) + "|"
    return "\n".join([head, rule, *rows])


def cell(numbers: Iterable[float], digits: int = 2, seeds: int = 2) -> str:
    """Returns "mean [low, high]", without the interval where there is none, or of one seed."""
    mean, low, high = numbers
    text = f"{mean:.{digits}f}"
    if seeds <= 1 or not np.isfinite(low):
        return text
    return f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


# --- numbers -------------------------------------------------------------------------------------


def summaries(found: Found, columns: Columns, step: int = 0, iqm: bool = False) -> Table:
    """Returns each method's entries at `step`, or at the last step if it is 0.

    An entry is None where the method lacks the step or one of the column's tasks.
    """
    table = {}
    for label, own in found.items():
        table[label] = {title: _entry(own, pairs, step, iqm) for title, pairs in columns.items()}
    return table


def _entry(own: dict, pairs: list[Pair], step: int, iqm: bool) -> Entry | None:
    """Returns a method's entry in one column."""
    shared = shared_scores(own, pairs)
    if shared is None:
        return None
    steps, parts = shared
    if step == 0 and len(steps) > 0:
        step = steps[-1]
    if step not in steps:
        return None
    (at,) = np.flatnonzero(steps == step)
    scores = [part[:, at] for part in parts]
    seeds = min(len(part) for part in scores)
    return Entry(int(step), interval(scores, iqm), seeds)


def published_summaries(
    published: Published, methods: list[str], columns: Columns, step: int
) -> Table:
    """Returns the papers' entries at `step` if they were published there, else after 1M steps."""
    table = {}
    for method in methods:
        row = {}
        for title, pairs in columns.items():
            row[title] = _published_entry(published, method, pairs, step)
        steps = sorted({thousands(entry.step) for entry in row.values() if entry})
        if steps:
            when = " and ".join(steps)
            table[f"{method}, published at {when}"] = row
    return table


def _published_entry(
    published: Published, method: str, pairs: list[Pair], step: int
) -> Entry | None:
    """Returns a published method's entry in one column."""
    curve = published_curve(published, method, pairs)
    if curve is None:
        return None
    for wanted in (step, OFFLINE_STEPS):
        if wanted in curve.steps:
            (at,) = np.flatnonzero(curve.steps == wanted)
            return Entry(wanted, tuple(curve.numbers[at].tolist()), 0)
    return None


def table_of(comparison: Comparison, step: int = 0) -> Table:
    """Returns the entries of a comparison's methods and papers."""
    columns = comparison.panels
    table = summaries(comparison.found, columns, step, comparison.iqm)
    steps = []
    for row in table.values():
        steps += [entry.step for entry in row.values() if entry]
    if not steps:
        when = f" at step {step:,}" if step else ""
        raise UserError(f"no method has all tasks of a column{when}; try --by task")
    papers = published_summaries(comparison.published, comparison.papers, columns, max(steps))
    return table | papers


# --- files ---------------------------------------------------------------------------------------


def write_table(path: Path, table: Table, comparison: Comparison) -> None:
    """Writes a .md or .csv file."""
    if path.suffix == ".md":
        text = markdown_table(table, comparison.metric, comparison.iqm)
        with open_to_write(path) as file:
            file.write(text)
    else:
        with open_to_write(path) as file:
            csv.writer(file, lineterminator="\n").writerows(csv_table(table))


def markdown_table(table: Table, metric: str, iqm: bool = False) -> str:
    """Returns a sentence about the numbers, and a row per method with a column per panel."""
    steps = {}
    seeds = {}
    digits = 2 if metric == "success" else 1
    titles = next(iter(table.values()))
    lines = [["", *titles]]
    for label, row in table.items():
        ours = [entry for entry in row.values() if entry and entry.seeds]
        if ours:
            own_steps = sorted({entry.step for entry in ours})
            steps[label] = " and ".join(f"{step:,}" for step in own_steps)
            seeds[label] = str(min(entry.seeds for entry in ours))
        lines.append([label, *(_table_cell(entry, digits) for entry in row.values())])
    what = "interquartile mean" if iqm else "mean"
    return (
        f"{metric.replace('_', ' ').capitalize()}, {what} [95 % bootstrap interval]. "
        f"Steps: {_most(steps)}. Seeds: {_most(seeds)}.\n\n{markdown(lines)}\n"
    )


def _table_cell(entry: Entry | None, digits: int) -> str:
    """Returns an entry's text. Published intervals (0 seeds) are over several seeds."""
    if entry is None:
        return "-"
    return cell(entry.numbers, digits, entry.seeds or 2)


def _most(values: dict[str, str]) -> str:
    """Returns the most common value, then the others: {a: 4, b: 4, c: 3} -> 4 (c: 3)."""
    ((common, _),) = Counter(values.values()).most_common(1)
    others = [f"{name}: {value}" for name, value in values.items() if value != common]
    if not others:
        return common
    return f"{common} ({', '.join(others)})"


def csv_table(table: Table) -> list[list]:
    """Returns a row per method: for each panel centre, low, high, step and seeds."""
    head = ["method"]
    for title in next(iter(table.values())):
        head += [title, f"{title} low", f"{title} high", f"{title} step", f"{title} seeds"]
    lines = [head]
    for label, row in table.items():
        line = [label]
        for entry in row.values():
            line += _csv_cells(entry)
        lines.append(line)
    return lines


def _csv_cells(entry: Entry | None) -> list:
    """Returns an entry's five cells; what is not known is empty, as the interval of one seed is."""
    if entry is None:
        return [""] * 5
    numbers = np.round(entry.numbers, 4)
    if entry.seeds == 1:
        numbers[1:] = np.nan
    cells = numbers.tolist()
    for i, number in enumerate(cells):
        if np.isnan(number):
            cells[i] = ""
    return [*cells, entry.step, entry.seeds or ""]
