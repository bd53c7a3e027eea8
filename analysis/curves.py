"""Draw one panel of a figure that compares methods: curves, dots and published numbers."""

from dataclasses import dataclass
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from analysis.panels import Pair
from analysis.published import OFFLINE_STEPS
from analysis.statistics import Curve
from analysis.style import DASHED, Look, thousands


class Named(NamedTuple):
    """A line of a panel with its name, and the height where it ends."""

    height: float
    name: str
    line: Line2D


@dataclass(frozen=True)
class Panel:
    """What one panel shows."""

    pairs: list[Pair]
    ours: dict[str, Curve]
    single: set[str]  # methods of one seed alone, which have no interval
    theirs: dict[str, Curve]  # published method -> numbers

    def has_dots(self) -> bool:
        """Says whether each of our methods was evaluated only once."""
        return bool(self.ours) and all(len(own.steps) == 1 for own in self.ours.values())

    def steps_of_dots(self) -> str:
        """Returns when our methods were evaluated, where that was once: 50k, or 50k to 100k."""
        first = min(own.steps[-1] for own in self.ours.values())
        if first == self.last_step():
            return thousands(first)
        return f"{thousands(first)} to {thousands(self.last_step())}"

    def last_step(self) -> int:
        """Returns the last step of our methods, or where published results usually end."""
        return max((own.steps[-1] for own in self.ours.values()), default=OFFLINE_STEPS)


def opacity_of_bands(num_methods: int) -> float:
    """Returns the opacity of intervals, 0 above eight methods: they would hide the lines."""
    if num_methods > 8:
        return 0
    return 0.2 if num_methods < 6 else 0.1


def draw_panel(axis: Axes, panel: Panel, looks: dict[str, Look], metric: str) -> list[Named]:
    """Draws a panel's methods and sets its limits and ticks."""
    alpha = opacity_of_bands(len(panel.ours))
    dots = panel.has_dots()
    named = []
    for i, (label, own) in enumerate(panel.ours.items()):
        known = label not in panel.single
        if dots:
            line = _draw_dot(axis, i, own, looks[label], known)
        else:
            line = _draw_line(axis, own, looks[label], alpha if known else 0)
        line.set_label(label)
        named.append(Named(own.numbers[-1, 0], label, line))
    for method, theirs in panel.theirs.items():
        colour = looks[method].colour
        until = 0 if dots else panel.last_step()
        named.append(_draw_published(axis, theirs, method, colour, until))
    _format_axis(axis, panel, metric)
    return named


def _draw_line(axis: Axes, own: Curve, how: Look, alpha: float) -> Line2D:
    """Draws a curve; its band has the opacity `alpha`, 0 for none."""
    if alpha:
        low, high = own.numbers[:, 1:].T
        axis.fill_between(own.steps, low, high, color=how.colour, alpha=alpha, lw=0)
    (line,) = axis.plot(
        own.steps,
        own.numbers[:, 0],
        color=how.colour,
        ls=how.line,
        lw=1.8,
        marker=how.marker,
        ms=4.5,
        mec=plt.rcParams["axes.facecolor"],
        mew=0.5,
        markevery=max(1, len(own.steps) // 8),
    )
    return line


def _draw_dot(axis: Axes, x: int, own: Curve, how: Look, known: bool) -> Line2D:
    """Draws a single evaluation, with its interval if that is known."""
    mean, low, high = own.numbers[0]
    if known:
        axis.vlines(x, low, high, color=how.colour, lw=2.5, alpha=0.6)
    (line,) = axis.plot(
        [x],
        [mean],
        color=how.colour,
        ls="",
        marker=how.marker,
        ms=7,
        mec=plt.rcParams["axes.facecolor"],
        mew=0.5,
    )
    return line


def _draw_published(axis: Axes, theirs: Curve, method: str, colour: str, until: int) -> Named:
    """Draws published numbers dashed, up to our last step.

    If they are later than that, one of them is at the right edge: after 1M steps, or the last.
    """
    style = dict(color=colour, lw=1.4, ls=DASHED)
    name = f"{method}, published"
    shown = theirs.steps <= until
    if shown.sum() > 1:
        steps = theirs.steps[shown]
        mean, low, high = theirs.numbers[shown].T
        (line,) = axis.plot(steps, mean, label=name, **style)
        axis.fill_between(steps, low, high, color=colour, alpha=0.1, lw=0)
        return Named(mean[-1], name, line)
    at = len(theirs.steps) - 1
    if OFFLINE_STEPS in theirs.steps:
        (at,) = np.flatnonzero(theirs.steps == OFFLINE_STEPS)
    name = f"{name} at {thousands(theirs.steps[at])}"
    height = theirs.numbers[at, 0]
    across = axis.get_yaxis_transform()  # x in widths of the panel
    ends = [0.86, 0.99]
    (line,) = axis.plot(ends, [height, height], label=name, transform=across, **style)
    return Named(height, name, line)


def _format_axis(axis: Axes, panel: Panel, metric: str) -> None:
    """Sets the limits and ticks of a panel."""
    if metric == "success":
        axis.set_ylim(-0.03, 1.03)
    else:
        axis.yaxis.set_major_formatter(thousands)
    if panel.has_dots():
        right = len(panel.ours) - 0.3
        if panel.theirs:
            right += 0.7
        axis.set(xticks=[], xlim=(-0.7, right))
        return
    axis.set_xlim(0, 1.02 * panel.last_step())
    axis.xaxis.set_major_locator(plt.MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axis.xaxis.set_major_formatter(thousands)
