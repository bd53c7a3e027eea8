"""The one style of all figures: colours, markers and lines of methods, light and dark."""

from typing import NamedTuple

from cycler import cycler

# Colours of the plane's four goals, which the colour-blind can tell apart.
GOAL_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")


class Theme(NamedTuple):
    """Colours of a figure."""

    paper: str
    ink: str
    grid: str
    methods: tuple[str, ...]


# Methods' colours are near Okabe and Ito's, moved until any two are far apart with red- and
# green-blindness and all stand out from the paper.
THEMES = {
    "light": Theme(
        paper="#ffffff",
        ink="#222222",
        grid="#e4e4e4",
        methods=(
            *("#1352C7", "#B19200", "#0CA963", "#AD5E8C"),
            *("#873A00", "#3A9BE6", "#3C2663", "#222222"),
        ),
    ),
    "dark": Theme(
        paper="#12151a",
        ink="#e8e8e8",
        grid="#30353d",
        methods=(
            *("#4675C3", "#EFBD31", "#2AAF7A", "#CF91C0"),
            *("#D3571F", "#C6FFFF", "#7A5BF5", "#F7F7C8"),
        ),
    ),
}
TITLES = {  # of metrics
    "success": "success rate",
    "return": "return",
    "normalized_score": "normalised score",
    "length": "episode length [steps]",
    "q": "mean Q on the data",
    "critic_loss": "critic loss",
}
# Colours of paths in a maze.
SOLVED = GOAL_COLOURS[0]
UNSOLVED = GOAL_COLOURS[1]
TARGET = "#D55E00"
MARKERS = "os^DvPX*"
# Line styles of the first eight methods, of the next eight, and of those after them.
LINES = "-", (0, (1, 1)), (0, (6, 1, 1, 1))
DASHED = (0, (4, 2))  # of what was published


class Look(NamedTuple):
    """How a method is drawn."""

    colour: str
    marker: str
    line: str | tuple


def look(i: int, theme: str) -> Look:
    """Returns the look of the i-th method; no two of 24 look the same."""
    colours = THEMES[theme].methods
    block = i // len(colours)
    colour = colours[i % len(colours)]
    marker = MARKERS[(i + block) % len(MARKERS)]
    line = LINES[block % len(LINES)]
    return Look(colour, marker, line)


def settings(theme: str) -> dict:
    """Returns matplotlib's settings for a theme."""
    paper, ink, grid, methods = THEMES[theme]
    return {
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": ink,
        "xtick.color": ink,
        "ytick.color": ink,
        "figure.facecolor": paper,
        "axes.facecolor": paper,
        "savefig.facecolor": paper,
        "grid.color": grid,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.prop_cycle": cycler(color=methods),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "font.size": 10,
        "axes.titlesize": 10,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "pdf.fonttype": 42,
    }


def thousands(x: float, _: int | None = None) -> str:
    """Shortens a number: 250000 -> 250k, 1500000 -> 1.5M. (The second argument is matplotlib's.)"""
    if abs(x) >= 1e6:
        return f"{x / 1e6:g}M"
    if abs(x) >= 1e3:
        return f"{x / 1e3:g}k"
    return f"{x:g}"
