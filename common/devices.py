"""Agents on devices: one array axis for all agents of a run, spread over the local devices."""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BFLOAT16 = "BF16_BF16_F32"  # jax's own "bfloat16" means TF32 on a GPU


def matmul_precision(precision: str) -> contextlib.AbstractContextManager:
    """Returns a context in which matrix products have the precision that --precision names."""
    if precision == "default":
        precision = jax.config.jax_default_matmul_precision
    elif precision == "bfloat16":
        precision = BFLOAT16
    return jax.default_matmul_precision(precision)


def hidden_dtype() -> Any:
    """Returns the dtype of hidden layers: bfloat16 with that precision, else None (the inputs')."""
    return jnp.bfloat16 if jax.config.jax_default_matmul_precision == BFLOAT16 else None


def keep_freed_memory() -> None:
    """Makes this process reuse large blocks of memory that it has freed.

    XLA allocates its working memory in every call. The GNU C library gives freed blocks of 32 MiB
    or more back to the system, so that the pages of the next one have to be cleared. With another C
    library this does nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, as large as versions before 2.35 accept
        mallopt(-3, 2**30)
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


@contextlib.contextmanager
def configured_jax(args: Any) -> Iterator[None]:
    """Applies --precision while the context lasts, and --compile-cache from now on."""
    own = jax.config.jax_compilation_cache_dir
    folder = args.compile_cache or own or Path(args.run_dir, ".compiled")
    folder = None if folder == "none" else os.path.expanduser(folder)
    jax.config.update("jax_compilation_cache_dir", folder)
    reset_cache()  # else jax keeps the folder of the first run in this process
    with matmul_precision(args.precision):
        yield


def agent_devices(num_agents: int) -> list[jax.Device]:
    """Returns as many local devices as can hold equal shares of the agents."""
    devices = jax.local_devices()
    count = max(n for n in range(1, len(devices) + 1) if num_agents % n == 0)
    return devices[:count]


def _put_on_agent_devices(tree: Any, num_agents: int, axes: PartitionSpec) -> Any:
    devices = agent_devices(num_agents)
    if len(devices) == 1:
        return jax.device_put(tree)
    mesh = Mesh(np.array(devices), ("agents",))
    return jax.device_put(tree, NamedSharding(mesh, axes))


def shard_over_agents(tree: Any) -> Any:
    """Shards the leading agent axis of all arrays evenly over the local devices.

    If no number of devices divides the agents, one device holds them all. Agents do not depend on
    one another, so programs on sharded arrays run without communication between devices.
    """
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return tree
    return _put_on_agent_devices(tree, len(leaves[0]), PartitionSpec("agents"))


def replicate(tree: Any, num_agents: int) -> Any:
    """Copies whole arrays to each of the devices that so many agents are sharded over."""
    return _put_on_agent_devices(tree, num_agents, PartitionSpec())


def over_agents(one_agent: Callable, agent_by_agent: bool = False) -> Callable:
    """Maps a function of one agent over arrays with a leading agent axis, like `jax.vmap`.

    A single agent is computed without the axis, which makes most updates faster on a CPU (QAM's by
    a fifth). With `agent_by_agent`, a CPU trains one agent after the other, because its caches then
    keep the networks of one.
    """

    def all_agents(*inputs):
        num_agents = len(jax.tree.leaves(inputs)[0])
        if num_agents == 1:
            outputs = one_agent(*jax.tree.map(lambda x: x[0], inputs))
            return jax.tree.map(lambda x: x[None], outputs)
        one_cpu = jax.default_backend() == "cpu" and jax.local_device_count() == 1
        if agent_by_agent and one_cpu:
            return jax.lax.map(lambda agent: one_agent(*agent), inputs)
        return jax.vmap(one_agent)(*inputs)

    return all_agents


def zero_metrics(update: Callable, *inputs: Any) -> dict[str, jax.Array]:
    """Returns zeros for the metrics of `update` (its second result), with a leading axis of agents.

    `update` takes the inputs of one agent; `inputs` are those of all agents.
    """
    _, metrics = jax.eval_shape(jax.vmap(update), *inputs)
    return shard_over_agents({name: jnp.zeros(x.shape) for name, x in metrics.items()})
