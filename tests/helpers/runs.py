"""Real runs: how one is started, stopped and continued; how what it left is read and compared."""

import csv
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from common.checkpoints import CHECKPOINT, Checkpoints, read_checkpoint
from common.tables import Tables
from tests.helpers.flags import ENV
from tools.shared_blocks import ROOT, named

OFFLINE = named("offline")


class Stop(Exception):
    """Ends a run from within."""


def run_folder(script):
    """The folder of a tiny run in the working folder."""
    env = ENV if script in OFFLINE else "multigoal"
    return os.path.abspath(f"runs/{os.path.basename(script)}/{env}/default")


def folder_of(script, args):
    """The folder of a run with these arguments in the working folder."""
    return os.path.abspath(f"runs/{os.path.basename(script)}/{args.env}/{args.name}")


def rows(folder, table):
    """Rows of <table>.csv as written, without the column `seconds`."""
    with open(f"{folder}/{table}.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    return [{name: x for name, x in line.items() if name != "seconds"} for line in lines]


def flags_of(folder):
    """The flags in config.json."""
    return json.loads((Path(folder) / "config.json").read_text())["flags"]


def capacity(folder):
    """The number of transitions that the replay of a run holds."""
    flags = flags_of(folder)
    if "online_steps" in flags:
        return flags["online_steps"]
    return min(flags.get("replay_size", 0), flags["total_steps"])


def join_replay(folder, ends):
    """Puts a replay together from its parts: name -> (agents, n, ...), from the oldest transition
    on, and `size`, the number of all that there were. {} where it is empty."""
    if not ends:
        return {}
    parts = []
    for end in ends:
        part = read_checkpoint(Path(folder) / f"replay-{end}.msgpack")["rows"]
        assert not parts or part["rewards"].shape[1] == end - ends[len(parts) - 1]
        parts.append(part)
    slots = capacity(folder)
    replay = dict(size=ends[-1])
    for name in parts[0]:
        whole = np.concatenate([part[name] for part in parts], 1)
        assert whole.shape[1] >= min(slots, ends[-1])
        replay[name] = whole[:, -slots:]
    return replay


def checkpoint(folder):
    """A run's checkpoint with its replay, without what no two runs have in common."""
    content = read_checkpoint(Path(folder) / CHECKPOINT)
    content["replay"] = join_replay(folder, content.pop("parts").tolist())
    del content["seconds"], content["run"]
    return content


def contents(folder):
    """Name -> bytes of all files in a run folder."""
    names = sorted(name for name in os.listdir(folder) if name != ".lock")
    return {name: (Path(folder) / name).read_bytes() for name in names}


def assert_same_arrays(one, two):
    """Two pytrees are the same, bit by bit."""
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert np.asarray(x).dtype == np.asarray(y).dtype
        np.testing.assert_array_equal(x, y)


def assert_same(folder, other):
    """Two runs left the same, bit by bit."""
    for table in ("train", "eval"):
        assert rows(folder, table) == rows(other, table)
    assert_same_arrays(checkpoint(folder), checkpoint(other))


def start(script, root=ROOT):
    """How a script is started, from any folder."""
    return [f"{root}/{script}.py"]


def copy_out(script, folder):
    """Copies a script and common/, as the README says."""
    (folder / script).parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / f"{script}.py", folder / f"{script}.py")
    shutil.copytree(ROOT / "common", folder / "common")


def command(script, args, *more, root=ROOT):
    """The command line of a run with these arguments."""
    line = [sys.executable, *start(script, root)]
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        flag = "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            line.append(flag if value else flag.replace("--", "--no-", 1))
        elif field.name != "action_size":
            values = value if isinstance(value, tuple) else [value]
            line += [flag, *map(str, values)]
    return [*line, *more]


def stop_at(monkeypatch, file, step):
    """Lets a run raise Stop as soon as it has written to a file, which is a table or the
    checkpoint, at this step or later."""
    log, save = Tables.log, Checkpoints.save

    def stopping_log(tables, table, now, metrics):
        log(tables, table, now, metrics)
        if table == file and now >= step:
            raise Stop

    def stopping_save(checkpoints, content, replay=None):
        save(checkpoints, content, replay)
        if file == CHECKPOINT and content["step"] >= step:
            raise Stop

    monkeypatch.setattr(Tables, "log", stopping_log)
    monkeypatch.setattr(Checkpoints, "save", stopping_save)


def run_until_stop(module, args):
    """Runs; a Stop from within leaves nothing behind except the run folder."""
    try:
        module.main(args)
    except Stop:
        return
    raise AssertionError("the run was not stopped")


def poisoned(train, agent, calls):
    """`train_chunk` after whose `calls`-th call with updates an agent's numbers are NaN."""
    count = []

    def spoil(x):
        return x.at[agent].set(jnp.nan) if x.dtype == jnp.float32 else x

    def train_chunk(*arguments):
        state, metrics = train(*arguments)
        updates = arguments[-1]
        if updates > 0:
            count.append(0)
            if len(count) == calls:
                state = jax.tree.map(spoil, state)
        return state, metrics

    return train_chunk


class FakeEpisodes:
    """In place of `Episodes`: one step ends all, with random results. `played` is a list of its
    seeds and results."""

    def __init__(self, pool, seeds):
        self.pool, self.running = pool, True
        generator = np.random.default_rng(len(self.played))
        self.results = {name: generator.uniform(size=seeds.shape) for name in self.names}
        self.played.append((seeds.tolist(), dict(self.results)))
        self.results["path"] = np.empty(seeds.shape, object)
        for episode in np.ndindex(seeds.shape):
            self.results["path"][episode] = []

    names = ("success", "return", "length")

    def step(self):
        self.running = False


def fake_episodes():
    """A class like `FakeEpisodes` with a list of its own."""
    return type("OwnEpisodes", (FakeEpisodes,), dict(played=[]))


def clean(folder):
    """Environment variables without PYTHONPATH, and with a home in which nothing is yet."""
    drop = ("PYTHONPATH", "JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "MPLCONFIGDIR")
    kept = {name: x for name, x in os.environ.items() if name not in drop}
    return kept | dict(HOME=str(folder), PYTHONDONTWRITEBYTECODE="1")


def quick(folder):
    """Like `clean`, with jax's settings for tests."""
    return clean(folder) | {name: x for name, x in os.environ.items() if name.startswith("JAX_")}


def on_devices(count):
    """Environment variables under which a CPU counts as so many devices."""
    others = os.environ.get("XLA_FLAGS", "")
    flag = f"--xla_force_host_platform_device_count={count}"
    return os.environ | dict(XLA_FLAGS=f"{others} {flag}")
