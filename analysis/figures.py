"""Figures that compare methods: a panel per domain or task, names and a legend."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.command_line import say
from analysis.comparison import Comparison
from analysis.curves import Named, Panel, draw_panel
from analysis.files import open_to_write
from analysis.published import plain, published_curve
from analysis.runs import is_online
from analysis.statistics import curve, shared_scores
from analysis.style import TITLES, Look, look, settings
from common.errors import UserError

GAP = 0.062  # between names at the ends of lines, in heights of the panel
COLUMNS = {1: 1, 2: 2, 3: 3, 4: 2, 5: 3, 6: 3}  # by number of panels; more panels have four
NAMED_LINES = 8  # at most so many lines of a single panel are named at their ends


def write_figure(path: Path, comparison: Comparison, theme: str = "light") -> None:
    """Draws a comparison into a .png, .pdf or .svg file."""
    with plt.rc_context(settings(theme)):
        figure = draw_comparison(comparison, theme)
        with open_to_write(path, binary=True) as file:
            figure.savefig(file, dpi=160, format=path.suffix[1:])
        plt.close(figure)


def looks_of(ours: Iterable[str], papers: Iterable[str], theme: str) -> dict[str, Look]:
    """Returns the look of each method; published numbers look like our method of that name."""
    looks = {}
    same = {}  # name as `plain` makes it -> our label
    for label in ours:
        looks[label] = look(len(looks), theme)
        same.setdefault(plain(label), label)
    unused = itertools.count(len(looks))
    for method in papers:
        if method not in looks:
            known = same.get(plain(method))
            looks[method] = looks[known] if known else look(next(unused), theme)
    return looks


def draw_comparison(comparison: Comparison, theme: str) -> Figure:
    """Draws a panel per title, with a colour, marker and line per method and bands of 95 %.

    Published numbers are dashed. The lines of a single panel are named where they end, if there
    are at most eight of them.
    """
    panels = _contents(comparison)
    if not panels:
        raise UserError("no method has all tasks of a panel; try --by task")
    figure, axes = _create_axes(panels, comparison.metric)
    columns = axes.shape[1]
    looks = looks_of(comparison.found, comparison.papers, theme)
    unit = _unit(panels)
    quantity = TITLES.get(comparison.metric, comparison.metric)
    if comparison.iqm:
        quantity = f"IQM of {quantity}"
    lines = {}
    for i, (title, panel) in enumerate(panels.items()):
        axis = axes.flat[i]
        named = draw_panel(axis, panel, looks, comparison.metric)
        lines |= {one.name: one.line for one in named}
        axis.set_title(title, fontweight="bold")
        if i + columns >= len(panels):
            when = f"after {panel.steps_of_dots()} " if panel.has_dots() else ""
            axis.set_xlabel(f"{when}{unit}")
        if i % columns == 0:
            axis.set_ylabel(quantity)
    if len(panels) == 1 and len(named) <= NAMED_LINES:
        _name_ends(axes[0, 0], named)
    else:
        _draw_legend(figure, lines, len(panels), columns)
    return figure


# --- what there is to draw -----------------------------------------------------------------------


def _contents(comparison: Comparison) -> dict[str, Panel]:
    """Returns the panels that have something to show; reports methods that lack a panel's tasks."""
    panels = {}
    for title, pairs in comparison.panels.items():
        ours = {}
        single = set()
        for label, own in comparison.found.items():
            drawn = curve(own, pairs, comparison.iqm)
            if drawn is None:
                say(f"Skipping {label} in the panel {title}: results for some tasks are missing.")
                continue
            ours[label] = drawn
            _, parts = shared_scores(own, pairs)
            if min(len(part) for part in parts) == 1:
                single.add(label)
        theirs = {}
        for method in comparison.papers:
            drawn = published_curve(comparison.published, method, pairs)
            if drawn is not None:
                theirs[method] = drawn
        if ours or theirs:
            panels[title] = Panel(pairs=pairs, ours=ours, single=single, theirs=theirs)
    return panels


def _unit(panels: dict[str, Panel]) -> str:
    """Returns what is counted along the horizontal axis."""
    online = set()
    for panel in panels.values():
        online |= {is_online(domain) for domain, _ in panel.pairs}
    if online == {True}:
        return "environment steps"
    if online == {False}:
        return "updates"
    return "steps"


# --- figure --------------------------------------------------------------------------------------


def _create_axes(panels: dict[str, Panel], metric: str) -> tuple[Figure, np.ndarray]:
    """Creates a figure with a grid of axes (rows, columns), those without a panel switched off."""
    count = len(panels)
    columns = COLUMNS.get(count, 4)
    rows = -(-count // columns)
    width = 3 * columns
    height = 2.5 * rows + 0.6
    if count == 1:
        (panel,) = panels.values()
        entries = len(panel.ours) + len(panel.theirs)
        width = 5.8
        height = 3.5
        if entries > NAMED_LINES:
            height = max(height, 0.6 + 0.19 * entries)  # of the legend
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(width, height),
        layout="constrained",
        squeeze=False,
        sharey=metric == "success",
    )
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    return figure, axes


def _draw_legend(figure: Figure, lines: dict[str, Line2D], count: int, columns: int) -> None:
    """Draws the legend next to a single panel, or below several."""
    where = "outside lower center"
    across = min(len(lines), 6 if columns > 2 else 3)
    if count == 1:
        where = "outside right upper"
        across = 1
    figure.legend(
        lines.values(), lines.keys(), loc=where, fontsize=8.5, ncol=across, handlelength=2.8
    )


def _name_ends(axis: Axes, named: list[Named]) -> None:
    """Writes names to the right of where lines end; the axis must have its limits."""
    low, high = axis.get_ylim()
    named = sorted(named, key=lambda one: (one.height, one.name))
    heights = []
    for one in named:
        height = (one.height - low) / (high - low)
        heights.append(min(max(height, 0), 1))
    for height, one in zip(_moved_apart(heights), named, strict=True):
        axis.annotate(
            one.name,
            (1.015, height),
            xycoords="axes fraction",
            color=one.line.get_color(),
            va="center",
            fontsize=9,
            annotation_clip=False,
        )


def _moved_apart(heights: list[float]) -> list[float]:
    """Moves sorted heights apart: neighbours that are too near push one another."""
    heights = list(heights)
    for _ in range(200):
        for i in range(len(heights) - 1):
            push = (GAP - heights[i + 1] + heights[i]) / 2
            if push > 0:
                heights[i] -= push
                heights[i + 1] += push
    return heights
