"""The code of docs/guides/python.md and docs/quickstart.ipynb, executed with a small run."""

import functools
import json
import re

import matplotlib.pyplot as plt
import pytest

import common.agents
from tests.helpers.flags import TINY
from tools.shared_blocks import ROOT

PAGE = ROOT / "docs/guides/python.md"
NOTEBOOK = ROOT / "docs/quickstart.ipynb"
SMALL = {name: TINY[name] for name in ("hidden_dims", "num_critics", "flow_steps", "batch_size")}
SMALL |= dict(offline_steps=4, eval_interval=2, eval_episodes=1, eval_slots=1, workers=1)


def cells_of(kind):
    """The sources of the notebook's cells."""
    notebook = json.loads(NOTEBOOK.read_text())
    return ["".join(x["source"]) for x in notebook["cells"] if x["cell_type"] == kind]


@pytest.fixture
def shorter(here, dataset_dir, monkeypatch, quick_compile):
    """`train` with a small network, few steps, and the dataset of the tests."""
    train = common.agents.train

    def train_shortly(script, **flags):
        return train(script, **flags | SMALL | dict(dataset_dir=str(dataset_dir)))

    monkeypatch.setattr(common.agents, "train", functools.wraps(train)(train_shortly))
    yield
    plt.close("all")


def execute(blocks):
    """Executes blocks of code one after the other, and returns the names that they define."""
    names = {}
    for block in blocks:
        exec(compile(block, "block", "exec"), names)
    return names


def test_the_notebook(shorter, capsys):
    """Every cell runs, twice in one process, the second time with what the first one left."""
    assert len(cells_of("code")) == 5
    names = execute(cells_of("code") * 2)
    agent = names["agent"]
    assert names["chunk"].shape == (agent.args.chunk_length, 2) == (5, 2)
    assert names["table"]["step"].tolist() == [2, 4]
    assert names["path"].shape[1] == agent.observation_size and len(names["path"]) > 5
    said = capsys.readouterr().out
    assert (
        "pointmaze-medium-singletask-task1-v0: observations (2,), chunks of actions (5, 2)" in said
    )
    assert re.search(r"success [01] after \d+ steps", said)
    (axes,) = plt.gcf().axes
    assert len(axes.lines) == 4  # one figure outside a notebook: a curve and a path, twice


def test_the_notebook_is_one():
    """Format 4, without outputs; its links exist."""
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4 and notebook["metadata"]["kernelspec"]["name"] == "python3"
    for cell in notebook["cells"]:
        assert cell.keys() >= {"cell_type", "metadata", "source"}
        assert not cell.get("outputs") and cell.get("execution_count") is None
    for target in re.findall(r"\]\(([^)]+)\)", "\n".join(cells_of("markdown"))):
        assert (NOTEBOOK.parent / target).exists(), target


def test_the_page(shorter, capsys):
    """Its blocks run in order; the folder is the one that the page names."""
    text = PAGE.read_text()
    names = execute(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert f"`{names['folder'].parent}/seed=1`" in text and "seed=1" in names["folder"].name
    assert names["q"].shape == (SMALL["num_critics"], 2)
    assert names["over"] and "step" in names["table"]
    assert capsys.readouterr().out.count("pointmaze-medium-singletask-task1-v0 1 1 4") == 1
