"""Tests of the pictures of online runs: curves, and paths on the plane."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest

from analysis import style
from analysis.run_figures import draw_run


def fake_run(folder, env, tables, agents=1, paths=()):
    """A run folder with `tables`: name -> its metrics, random, and the paths of an evaluation."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    flags = env if isinstance(env, dict) else dict(env=env)
    (folder / "config.json").write_text(json.dumps(dict(flags=flags)))
    for table, metrics in tables.items():
        lines = [",".join(["task", "seed", "step", "seconds", *metrics])]
        for step in (100, 200, 300):
            for seed in range(agents):
                row = 1, seed, step, 1.0, *rng.normal(size=len(metrics))
                lines.append(",".join(map(str, row)))
        (folder / f"{table}.csv").write_text("\n".join(lines) + "\n")
    if paths:
        named = {f"path{i}": np.float32(path) for i, path in enumerate(paths)}
        success = np.zeros((agents, len(paths) // agents))
        np.savez(folder / "rollouts.npz", task=[1] * agents, success=success, **named)
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, kept open."""
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    yield figures
    monkeypatch.undo()
    for figure in figures:
        plt.close(figure)


RETURNS = dict(eval=("return", "length"), train=("policy_loss", "q", "critic_loss", "entropy"))
BOTH = dict(eval=("return", "success", "length"), train=RETURNS["train"])
OWN = dict(env="Hopper-v5", dataset="data/hopper-medium-v2.hdf5", checksum="12345678", tasks=[1])
SHARED = ("episode length", "mean Q", "critic loss", "policy loss")
SCORES = dict(eval=("return", "length", "normalized_score"))


@pytest.mark.parametrize(
    "env, tables, titles",
    [
        ("hopper", RETURNS, ["return", "episode length", "mean Q", "critic loss", "policy loss"]),
        ("my:Env-v0", BOTH, ["success rate", "return", *SHARED]),
        ("kitchen-4", dict(eval=["length", "return"]), ["return", "episode length"]),
        ("multigoal", dict(train=["critic_loss"]), ["critic loss"]),
        ("hopper", dict(train=["value_loss", "loss_of_actor"]), ["value loss", "loss of actor"]),
        ("hopper", {}, []),
        ("scene", BOTH, ["success rate", *SHARED]),
        (OWN, SCORES, ["return", "normalised score", "episode length"]),
        (OWN, BOTH, ["success rate", *SHARED]),
    ],
)
def test_curves(tmp_path, drawn, env, tables, titles):
    """A panel for each metric and each loss that was logged, over environment steps, a line for
    each seed."""
    draw_run(fake_run(tmp_path, env, tables, agents=2))
    axes = [axis for axis in drawn[0].axes if axis.axison] if drawn else []
    offline = env in ("scene", OWN)
    assert len(axes) == len(titles) and (tmp_path / "curve.png").exists() == bool(titles)
    for axis, title in zip(axes, titles):
        assert axis.get_title().startswith(title) and len(axis.lines) == 2
        assert axis.get_xlabel() == ("updates" if offline else "environment steps")
        assert axis.lines[0].get_xdata().tolist() == [100, 200, 300]
    if titles and not offline:
        labels = [text.get_text() for text in axes[0].get_legend().get_texts()]
        assert labels == ["seed 0", "seed 1"]


PATHS = [((0, 0), (2, 0), (4.1, 0)), ((0, 0), (4.5, 0.1)), ((0, 1), (0, 4.5)), ((0, 0), (1, 1))]


@pytest.mark.parametrize("agents, shown", [(1, 1), (2, 2), (7, 5)])
def test_the_planes_picture(tmp_path, drawn, agents, shown):
    """A panel for each of at most five agents, whose title counts the goals; the paths have the
    colours of their goals' stars, or are grey."""
    tables = dict(eval=["return"])
    draw_run(fake_run(tmp_path, "multigoal", tables, agents, PATHS * agents))
    assert (tmp_path / "rollouts.png").stat().st_size > 5000
    axes = drawn[0].axes
    assert [axis.get_title() for axis in axes] == ["reached 2 / 0 / 1 / 0 of 4"] * shown
    for axis in axes:
        colours = [line.get_color() for line in axis.lines if len(line.get_xdata()) > 1]
        right, left, up, down = style.GOAL_COLOURS
        assert colours == [right, right, up, "0.55"]


def test_other_online_runs_have_no_picture_of_the_plane(tmp_path):
    folder = fake_run(tmp_path, "hopper", BOTH, 1, [np.zeros((3, 11))])
    draw_run(folder)
    assert not (folder / "rollouts.png").exists() and (folder / "curve.png").exists()
