"""Means over seeds and tasks, with 95 % bootstrap intervals.

A number is the mean or the interquartile mean (IQM) over seeds and tasks. Its interval is the
percentile bootstrap, stratified by task: seeds are resampled within each task.
"""

from typing import NamedTuple

import numpy as np

from analysis.evaluations import Scores
from analysis.panels import Pair

DRAWS = 10_000  # of the bootstrap


class Curve(NamedTuple):
    """Numbers over steps."""

    steps: np.ndarray  # (n,)
    numbers: np.ndarray  # (n, 3): mean, low and high end of its interval


def centre(parts: list[np.ndarray], iqm: bool = False) -> np.ndarray:
    """Returns the centre of scores (..., seeds), one array per task -> (...).

    It is the mean, in which every task counts the same, or the interquartile mean: without the
    lowest and the highest quarter of all tasks' runs, rounded down (Agarwal et al. 2021). Both are
    NaN where a score is.
    """
    if not iqm:
        return np.mean([part.mean(-1) for part in parts], 0)
    scores = np.concatenate(parts, -1)
    num_scores = scores.shape[-1]
    cut = num_scores // 4
    ends = cut, num_scores - cut - 1
    middle = np.partition(scores, ends, -1)[..., cut : num_scores - cut]
    unknown = np.isnan(scores).any(-1)  # NumPy sorts NaN to the top, where it would be cut off
    return np.where(unknown, np.nan, middle.mean(-1))


def interval(parts: list[np.ndarray], iqm: bool = False) -> tuple[float, float, float]:
    """Returns `centre` of scores (seeds,), one array per task, and the ends of its interval."""
    rng = np.random.default_rng(0)
    parts = [np.asarray(part) for part in parts]
    draws = []
    for part in parts:
        drawn = rng.integers(len(part), size=(DRAWS, len(part)))
        draws.append(part[drawn])
    low, high = np.percentile(centre(draws, iqm), (2.5, 97.5))
    return float(centre(parts, iqm)), float(low), float(high)


def shared_scores(own: dict[str, Scores], pairs: list[Pair]) -> tuple | None:
    """Returns the steps (n,) that all pairs have, and scores (seeds, n) for each pair.

    It is None if the method lacks a pair, because means over different tasks cannot be compared.
    """
    steps_of = []
    for domain, task in pairs:
        if domain not in own or task not in own[domain].by_task:
            return None
        steps_of.append(set(own[domain].steps.tolist()))
    steps = sorted(set.intersection(*steps_of))
    parts = []
    for domain, task in pairs:
        scores = own[domain]
        shared = np.isin(scores.steps, steps)
        parts.append(scores.by_task[task][:, shared])
    return np.array(steps, int), parts


def curve(own: dict[str, Scores], pairs: list[Pair], iqm: bool = False) -> Curve | None:
    """Returns `interval` over the pairs at each step; None if a pair or all steps are missing."""
    shared = shared_scores(own, pairs)
    if shared is None:
        return None
    steps, parts = shared
    if len(steps) == 0:
        return None
    numbers = []
    for i in range(len(steps)):
        at_step = [part[:, i] for part in parts]
        numbers.append(interval(at_step, iqm))
    return Curve(steps, np.array(numbers))
