"""Tests of devices: agents spread over them, programs that exchange nothing, the precision of
products, and a place for compiled programs."""

import ctypes
import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meam
from common.devices import configured_jax, over_agents, shard_over_agents, zero_metrics
from common.flags import parse
from common.sampling import Batch
from tests.helpers.runs import on_devices
from tools.shared_blocks import ROOT

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("agents", [1, 2])
@pytest.mark.parametrize("chunk", [False, True])
def test_one_agent_has_no_axis(agents, chunk):
    """The numbers of a function of each agent, which is vmapped only if there are several."""
    x, y, seen = jnp.arange(3.0 * agents).reshape(agents, 3), jnp.arange(agents), []

    def one(tree, y):
        seen.append(isinstance(tree["x"], jax.core.Tracer))  # else an array, without the axis
        return dict(dot=tree["x"] @ tree["x"], y=y)

    found = over_agents(one, chunk)(dict(x=x), y)
    np.testing.assert_array_equal(found["dot"], (np.array(x) ** 2).sum(1))
    np.testing.assert_array_equal(found["y"], y)
    assert seen == [agents > 1]


@pytest.mark.parametrize(
    ("chunk", "backend", "devices", "sequential"),
    [
        (True, "cpu", 1, True),
        (False, "cpu", 1, False),
        (True, "gpu", 1, False),
        (True, "cpu", 8, False),
    ],
)
def test_chunks_on_a_cpu(monkeypatch, chunk, backend, devices, sequential):
    """There, on a single device, many updates of one agent come after those of the other: a loop
    whose product is one agent's."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_device_count", lambda: devices)
    x = jnp.ones((3, 4, 4))
    text = str(jax.make_jaxpr(over_agents(lambda x: x @ x, chunk))(x))
    assert ("scan" in text, "f32[4,4] = dot_general" in text) == (sequential, sequential)


PROGRAMS = """
import ctypes
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import meam
from common.devices import replicate, shard_over_agents, zero_metrics
from common.sampling import Dataset, Replay

assert jax.device_count() == 8
args = dataclasses.replace(
    meam.Args(), chunk_length=5, action_size=2, hidden_dims=(16, 16), num_critics=2, batch_size=8,
    flow_steps=3
)
rng = np.random.default_rng(0)
data = Dataset(
    observations=np.float32(rng.normal(size=(2001, 2))),
    rows=np.arange(2000, dtype=np.int32),
    actions=np.float32(rng.uniform(-1, 1, (2000, 2))),
    rewards=-np.ones((2, 2000), np.float32),
    masks=np.ones((2, 2000), np.float32),
    terminals=np.float32(np.arange(2000) % 100 == 99),
)
data = replicate(data, 8)
state = shard_over_agents(meam.create_agents(args, [(1, seed) for seed in range(8)], 2))
replay = Replay.create(8, 10, 2, 2)
rows = jnp.zeros(8, jnp.int32)
metrics = zero_metrics(partial(meam.train_step, args, data), state, replay, rows)
inputs = args, state, metrics, data, replay, rows, 3
text = meam.train_chunk.lower(*inputs).compile().as_text()
for word in "all-gather all-reduce all-to-all collective-permute reduce-scatter".split():
    assert word not in text, word
for x in jax.tree.leaves((state, metrics, replay)):
    assert [s.data.shape[0] for s in x.addressable_shards] == [1] * 8, x.sharding
state, metrics = meam.train_chunk(*inputs)
for x in jax.tree.leaves((state, metrics)):
    assert [s.data.shape[0] for s in x.addressable_shards] == [1] * 8, x.sharding
for x in jax.tree.leaves(data):
    assert [s.data.shape for s in x.addressable_shards] == [x.shape] * 8
inputs = np.zeros((8, 3, 2), np.float32), np.zeros((8, 3), np.uint32), np.zeros((8, 3), np.int32)
text = meam.act.lower(args, state, *inputs).compile().as_text()
assert "all-gather" not in text and meam.act(args, state, *inputs).sharding.num_devices == 8
odd = shard_over_agents(jnp.zeros((6, 2)))  # on six of the eight
assert [s.data.shape[0] for s in odd.addressable_shards] == [1] * 6
ten = shard_over_agents(jnp.zeros((10, 2)))
assert [s.data.shape[0] for s in ten.addressable_shards] == [2] * 5
assert shard_over_agents(jnp.zeros((11, 2))).sharding.num_devices == 1
assert replicate(jnp.zeros((11, 2)), 11).sharding.num_devices == 1
six = replicate(dict(x=jnp.zeros((5, 2))), 6)["x"]
assert [s.data.shape for s in six.addressable_shards] == [(5, 2)] * 6
"""


def test_programs_exchange_nothing(tmp_path):
    """Training and acting of eight agents on eight devices: each holds one agent and a copy of the
    data, before and after, and the compiled program has no communication between devices."""
    env = on_devices(8) | dict(PYTHONPATH=str(ROOT))
    line = [sys.executable, "-c", PROGRAMS]
    answer = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


def test_nothing_to_spread():
    """A tree without arrays."""
    assert shard_over_agents({}) == {} and shard_over_agents(dict(x=None)) == dict(x=None)


def test_sums_that_start_at_zero():
    """A number per agent for each metric of `update`, of the metric's name."""
    seen = []

    def update(state, replay):
        seen.append(state.shape)
        return state + 1, dict(loss=(state * replay).sum(), updates=jnp.ones(()))

    found = zero_metrics(update, jnp.ones((3, 4)), jnp.ones((3, 4)))
    assert seen == [(4,)] and list(found) == ["loss", "updates"]
    assert all(x.shape == (3,) and x.dtype == jnp.float32 and not x.any() for x in found.values())


def test_precision_of_products():
    """What --precision asks a device for, of every product and of those of derivatives. Without
    bfloat16 a CPU computes in float32 all the same; with it hidden layers leave bfloat16."""
    gradients = {}
    random = np.random.default_rng(0)
    rows = random.normal(size=(3, 4, 2)).astype(np.float32)
    batch = Batch(*rows[:2], *[jnp.ones(4)] * 2, rows[2], jnp.ones(4))
    for name, text in ("default", ""), ("float32", "HIGHEST"), ("bfloat16", "bf16"):
        line = f"--precision {name} --hidden-dims 8 --num-critics 2 --chunk-length 1".split()
        args = parse(meam.Args, meam.ENV_DEFAULTS, line)
        args = dataclasses.replace(args, action_size=2)
        with configured_jax(args):
            state = meam.create(args, 2, jax.random.PRNGKey(0))
            loss = lambda *inputs, args=args: meam.critic_loss(args, *inputs)[0]
            step = jax.jit(jax.grad(loss)).lower(state.params, state, batch, state.key)
            grads = step.compile()(state.params, state, batch, state.key)
        gradients[name] = np.concatenate([x.ravel() for x in jax.tree.leaves(grads)])
        products = [x for x in step.as_text().splitlines() if "stablehlo.dot_general" in x]
        assert len(products) == 9 and all(text in x for x in products)
        assert name != "default" or not any("HIGHEST" in x or "bf16" in x for x in products)
        in_bfloat16 = sum(x.endswith("xbf16>") for x in products)
        # the hidden layers of field, target critics and critics, and the critics' derivative
        assert in_bfloat16 == (4 if name == "bfloat16" else 0)
    np.testing.assert_array_equal(gradients["float32"], gradients["default"])
    coarse = gradients["bfloat16"]
    assert coarse.dtype == np.float32 and np.isfinite(coarse).all()
    error = np.linalg.norm(coarse - gradients["default"]) / np.linalg.norm(gradients["default"])
    assert 1e-4 < error < 3e-2, error


def compiled(folder):
    return sorted(path.name for path in folder.rglob("*-cache"))


def test_compiled_programs_are_kept(tmp_path):
    """Beside the run folders; a second run adds none; elsewhere or not at all, if asked."""
    ask = dict(JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    drop = {**os.environ}
    drop.pop("JAX_COMPILATION_CACHE_DIR", None)
    code = """
import sys
import jax
import fmer
from common.devices import configured_jax
from common.flags import parse
with configured_jax(parse(fmer.Args, fmer.ENV_DEFAULTS, sys.argv[1:])):
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


def test_a_second_run_has_its_own_cache(tmp_path):
    """jax alone would keep the folder of the first one."""
    code = """
import os, types
import jax
from common.devices import configured_jax

for folder in ("first", "none", "second"):
    flags = types.SimpleNamespace(compile_cache=folder, run_dir="runs", precision="default")
    with configured_jax(flags):
        jax.jit(lambda x: x + len(folder))(1.0)
print(*sorted(os.listdir()))
"""
    ask = dict(JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    variables = os.environ | ask | dict(PYTHONPATH=str(ROOT))
    line = [sys.executable, "-c", code]
    answer = subprocess.run(line, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert answer.stdout == "first second\n", answer.stderr


def test_freed_memory_is_kept():
    """64 MiB that were freed are taken again without new pages from the system."""
    code = """
import ctypes, resource
from common.devices import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
size = 2**26

def use():
    block = libc.malloc(ctypes.c_size_t(size))
    ctypes.memset(block, 1, size)
    libc.free(ctypes.c_void_p(block))

keep_freed_memory()
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        pytest.skip("the C library is not GNU's")
    line = [sys.executable, "-c", code]
    variables = {**os.environ} | dict(PYTHONPATH=str(ROOT))
    found = subprocess.run(line, env=variables, check=True, capture_output=True, text=True)
    assert int(found.stdout) < 10
