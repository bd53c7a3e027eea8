"""Real runs: how one is started, stopped and continued; how what it left is read and compared."""

import csv
import dataclasses
import gc
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from common.checkpoints import read_checkpoint
from common.run import Run
from tests.helpers.flags import ENV
from tools.shared_blocks import ROOT, named

OFFLINE = named("offline")


class Stop(Exception):
    """Ends a run from within."""


def run_folder(script):
    env = ENV if script in OFFLINE else "multigoal"
    return os.path.abspath(f"runs/{os.path.basename(script)}/{env}/default")


def rows(folder, table):
    """Rows of <table>.csv as written, without the column `seconds`."""
    with open(f"{folder}/{table}.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    return [{name: x for name, x in line.items() if name != "seconds"} for line in lines]


def checkpoint(folder):
    """With the replay put together from its parts, slot by slot: {} where it is empty."""
    content = read_checkpoint(Path(folder) / "checkpoint.msgpack")
    if "replay" in content["tree"]:
        slots, *ends = content["tree"]["replay"].tolist()
        parts = [read_checkpoint(Path(folder) / f"replay-{end}.msgpack") for end in ends]
        content["tree"]["replay"] = replay = {}
        for end, part in zip(ends, parts):
            for name, x in part.items():
                shape = x.shape[0], min(slots, ends[-1]), *x.shape[2:]
                whole = replay.setdefault(name, np.full(shape, np.nan, x.dtype))
                for i in range(x.shape[1]):
                    whole[:, (end - x.shape[1] + i) % slots] = x[:, i]
            replay["size"] = np.full(len(x), end)
    return {name: x for name, x in content.items() if name != "seconds"}


def contents(folder):
    """Name -> bytes of all files in a run folder."""
    names = sorted(name for name in os.listdir(folder) if name != ".lock")
    return {name: open(f"{folder}/{name}", "rb").read() for name in names}


def assert_same(folder, other):
    """Two runs left the same, bit by bit."""
    for table in ("train", "eval"):
        assert rows(folder, table) == rows(other, table)
    one, two = checkpoint(folder), checkpoint(other)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
        assert np.asarray(x).dtype == np.asarray(y).dtype
        np.testing.assert_array_equal(x, y)


def start(script, root):
    """How a script is started: `python qam.py`, but `python -m baselines.fql` (in `root`)."""
    return ["-m", script.replace("/", ".")] if "/" in script else [f"{root}/{script}.py"]


def command(script, args, *more, root=ROOT):
    """The command line of a run with these arguments."""
    line = [sys.executable, *start(script, root)]
    for field in dataclasses.fields(args):
        value, flag = getattr(args, field.name), "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            line.append(flag if value else flag.replace("--", "--no-", 1))
        elif field.name != "action_size":
            line += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return [*line, *more]


def stop_at(monkeypatch, method, table, step):
    """Lets `Run.log` or `Run.save` raise after its work at this step."""
    original = getattr(Run, method)

    def stopping(run, *arguments):
        original(run, *arguments)
        if arguments[: len(table)] == table and arguments[len(table)] >= step:
            raise Stop

    monkeypatch.setattr(Run, method, stopping)


def run_until_stop(module, args):
    """Runs; a Stop from within leaves nothing behind but the run folder."""
    try:
        module.main(args)
        raise AssertionError("the run was not stopped")
    except Stop:
        pass
    gc.collect()  # the folder's lock and the workers


def traced(tree):
    """Whether a call is one for the shapes of its results only."""
    return isinstance(jax.tree.leaves(tree)[0], jax.core.Tracer)


def poisoned(train, agent, calls):
    """`train_chunk` after whose `calls`-th call an agent's numbers are NaN."""
    count = []

    def train_chunk(*arguments):
        state, *rest = train(*arguments)
        count.extend([0] * (not traced(state)))
        spoil = lambda x: x.at[agent].set(jnp.nan) if x.dtype == jnp.float32 else x
        return (jax.tree.map(spoil, state) if len(count) == calls else state), *rest

    return train_chunk


def clean(folder):
    """Environment variables without PYTHONPATH, and with a home in which nothing is yet."""
    drop = ("PYTHONPATH", "JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "MPLCONFIGDIR")
    kept = {name: x for name, x in os.environ.items() if name not in drop}
    return kept | dict(HOME=str(folder), PYTHONDONTWRITEBYTECODE="1")
