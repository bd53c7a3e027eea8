"""Agents spread over devices and over processes: the numbers of one device, programs that exchange
nothing, and a place for compiled programs."""

import csv
import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qam
from common.data import Batch
from common.run import ours
from tests.helpers.flags import ENV, ONLINE_LENGTHS, ONLINE_SIZES, TINY
from tools.shared_blocks import ROOT

EIGHT = dict(XLA_FLAGS="--xla_force_host_platform_device_count=8")
OFFLINE = TINY | dict(env=ENV, num_seeds=2)  # of tasks 1 and 2: four agents
ONLINE = ONLINE_SIZES | ONLINE_LENGTHS["multigoal"]
pytestmark = pytest.mark.usefixtures("quick_compile")


def flags(script, **more):
    """Command line of a tiny run."""
    known = __import__(script).Args.__dataclass_fields__
    values = (ONLINE if "fmer" in script else OFFLINE) | more
    line = [sys.executable, "-m", script]
    for name, value in values.items():
        value = value if isinstance(value, tuple) else (value,)
        line += ["--" + name.replace("_", "-"), *map(str, value)] if name in known else []
    return line


def start(folder, line, **variables):
    folder.mkdir(exist_ok=True)
    env = os.environ | dict(PYTHONPATH=str(ROOT)) | variables
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(line, cwd=folder, env=env, **pipes)


def finish(*processes):
    for process in processes:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output


def table(folder, name):
    """(task, seed, step) -> the numbers of a row, times left out; of all run folders together."""
    found = {}
    for path in folder.rglob(f"{name}.csv"):
        with open(path, newline="") as file:
            _, *rows = csv.reader(file)
        found |= {tuple(map(int, row[:3])): np.array(row[4:], float) for row in rows}
    return found


@pytest.fixture(scope="module", params=["qam", "fmer"])
def script(request):
    return request.param


@pytest.fixture(scope="module")
def one(script, tmp_path_factory, dataset_dir):
    """Folder of a run on one device."""
    folder = tmp_path_factory.mktemp("one")
    finish(start(folder, flags(script, dataset_dir=dataset_dir)))
    return folder


def assert_close(left, right):
    assert left and left.keys() == right.keys()
    for agent in left:  # another number of agents in a program may round differently
        np.testing.assert_allclose(left[agent], right[agent], rtol=2e-3, atol=1e-4)


def test_agents_on_several_devices(script, one, tmp_path, dataset_dir):
    """Two or four agents, eight devices: the rows of training are those of one device."""
    finish(start(tmp_path, flags(script, dataset_dir=dataset_dir), **EIGHT))
    assert_close(table(one, "train"), table(tmp_path, "train"))
    assert table(one, "eval").keys() == table(tmp_path, "eval").keys()


def test_a_run_goes_on_with_other_devices(one, script, tmp_path, dataset_dir):
    """The first third on one device, the rest on several: checkpoints know no devices."""
    code = f"""
import sys, {script} as module
from common.run import Run
save = Run.save
Run.save = lambda *inputs: save(*inputs) or sys.exit(0)
module.main(module.parse(module.Args, module.ENV_DEFAULTS))
"""
    whole = flags(script, dataset_dir=dataset_dir)
    finish(start(tmp_path, [sys.executable, "-c", code, *whole[3:]]))
    first = table(tmp_path, "train")
    finish(start(tmp_path, whole, **EIGHT))
    assert 0 < len(first) < len(table(tmp_path, "train"))
    assert_close(table(one, "train"), table(tmp_path, "train"))


def test_agents_on_several_hosts(script, one, tmp_path, dataset_dir):
    """Two processes share the agents and keep folders of their own."""
    line = flags(script, dataset_dir=dataset_dir)
    finish(*(start(tmp_path, line, SHARE_OF_AGENTS=f"{i}/2") for i in range(2)))
    folders = sorted(tmp_path.rglob("share-*"))
    assert [path.name for path in folders] == ["share-0-of-2", "share-1-of-2"]
    agents = [{key[:2] for key in table(path, "train")} for path in folders]
    assert not agents[0] & agents[1] and len(agents[0]) == len(agents[1]) > 0
    assert_close(table(one, "train"), table(tmp_path, "train"))


def test_programs_exchange_nothing(tmp_path):
    """Training and acting of eight agents on eight devices: each holds one agent and a copy of the
    data, before and after, and the compiled program has no communication between devices."""
    code = """
import dataclasses, jax, jax.numpy as jnp, numpy as np, qam
from functools import partial
from benchmarks.throughput import random_dataset
from common.data import Replay, spread
args = dataclasses.replace(qam.Args(), chunk_length=5, action_size=2, hidden_dims=(16, 16),
                           num_critics=2, batch_size=8, flow_steps=3)
data = spread(random_dataset(np.random.default_rng(0), 2000, 2, 2), 8)
keys = jax.random.split(jax.random.PRNGKey(0), 8)
state = spread(jax.jit(jax.vmap(partial(qam.create, args, 2)))(keys))
replay, task = spread(Replay.create(8, 10, data)), jnp.zeros(8, jnp.int32)
text = qam.train_chunk.lower(args, state, data, replay, task, 3).compile().as_text()
for word in "all-gather all-reduce all-to-all collective-permute reduce-scatter".split():
    assert word not in text, word
state, metrics = qam.train_chunk(args, state, data, replay, task, 3)
for x in jax.tree.leaves((state, metrics, replay)):
    assert [s.data.shape[0] for s in x.addressable_shards] == [1] * 8, x.sharding
for x in jax.tree.leaves(data):
    assert [s.data.shape for s in x.addressable_shards] == [x.shape] * 8
inputs = np.zeros((8, 3, 2), np.float32), np.zeros((8, 3), np.uint32), np.zeros((8, 3), np.int32)
text = qam.act.lower(args, state, *inputs).compile().as_text()
assert "all-gather" not in text and qam.act(args, state, *inputs).sharding.num_devices == 8
odd = spread(jnp.zeros((6, 2)))  # six of the eight
assert [s.data.shape[0] for s in odd.addressable_shards] == [1] * 6
assert [s.data.shape[0] for s in spread(jnp.zeros((10, 2))).addressable_shards] == [2] * 5
assert spread(jnp.zeros((11, 2))).sharding.num_devices == 1
"""
    finish(start(tmp_path, [sys.executable, "-c", code], **EIGHT))


def test_shares_of_hosts(monkeypatch):
    """All agents, each once, in shares that differ by no more than one; too few are refused."""
    agents, shares = [(1, seed) for seed in range(5)], []
    assert ours(agents) == agents
    for i in range(3):
        monkeypatch.setenv("SHARE_OF_AGENTS", f"{i}/3")
        shares.append(ours(agents))
    assert sorted(sum(shares, [])) == agents and [len(x) for x in shares] == [2, 2, 1]
    with pytest.raises(SystemExit, match="2 agents are too few for 3 processes"):
        ours(agents[:2])


@pytest.mark.parametrize("text", ["2/2", "1", "1/", "/2", "-1/2", "a/b", "0/0"])
def test_shares_that_are_none(monkeypatch, text):
    monkeypatch.setenv("SHARE_OF_AGENTS", text)
    with pytest.raises(SystemExit, match=f"SHARE_OF_AGENTS={text}: expected 0/2, 1/2"):
        ours([(1, 0), (1, 1)])


def test_precision_of_products(monkeypatch):
    """What --precision asks a device for, of every product and of those of derivatives; a CPU
    computes in float32 all the same."""
    option, gradients = "jax_default_matmul_precision", []
    batch = Batch(*[jnp.ones((4, 2))] * 2, *[jnp.ones(4)] * 2, jnp.ones((4, 2)), jnp.ones(4))
    for name, text in ("default", ""), ("float32", "HIGHEST"), ("bfloat16", "bf16"):
        line = f"--precision {name} --hidden-dims 8 --num-critics 2 --chunk-length 1".split()
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # parse sets it
        args = qam.parse(qam.Args, qam.ENV_DEFAULTS, line)
        args = dataclasses.replace(args, action_size=2)
        try:
            state = qam.create(args, 2, jax.random.PRNGKey(0))
            loss = lambda *inputs, args=args: qam.critic_loss(args, *inputs)[0]
            step = jax.jit(jax.grad(loss)).lower(state.params, state, batch, state.key)
            gradients.append(jax.tree.leaves(step.compile()(state.params, state, batch, state.key)))
        finally:
            jax.config.update(option, None)
        products = [x for x in step.as_text().splitlines() if "stablehlo.dot_general" in x]
        assert len(products) == 9 and all(text in x for x in products)
        assert name != "default" or not any("HIGHEST" in x or "bf16" in x for x in products)
    for one in gradients[1:]:
        assert all(np.array_equal(x, y) for x, y in zip(one, gradients[0], strict=True))


def compiled(folder):
    return sorted(path.name for path in folder.rglob("*-cache"))


def test_compiled_programs_are_kept(tmp_path):
    """Beside the run folders; a second run adds none; elsewhere or not at all, if asked."""
    ask = dict(JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    drop = {**os.environ}
    drop.pop("JAX_COMPILATION_CACHE_DIR", None)
    code = """
import sys, fmer, jax
args = fmer.parse(fmer.Args, fmer.ENV_DEFAULTS, sys.argv[1:])
jax.jit(lambda x: x @ x)(jax.numpy.ones((3, 3)))
"""

    def run(*argv):
        line = [sys.executable, "-c", code, *argv]
        variables = drop | ask | dict(PYTHONPATH=str(ROOT))
        subprocess.run(line, cwd=tmp_path, env=variables, check=True)

    run()
    first = compiled(tmp_path / "runs/.compiled")
    assert any("lambda" in name for name in first)
    run()
    assert compiled(tmp_path) == first
    run("--run-dir", "elsewhere", "--compile-cache", "cache")
    assert len(compiled(tmp_path / "cache")) == len(first)
    assert not (tmp_path / "elsewhere").exists()
    run("--run-dir", "third", "--compile-cache", "none")
    assert not (tmp_path / "third").exists() and not (tmp_path / "none").exists()
