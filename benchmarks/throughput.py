"""Updates per second of a script's jitted training, at the paper's sizes and at small ones.

    python -m benchmarks.throughput --script qam --agents 1 2 4 8

For every number of agents: ms per update of all agents together, ms per agent-update, agent-updates
per second, and compile time apart. In the same process, as the yardstick, the loop that most
codebases have: NumPy sampling and one dispatch per update, one agent. Data are random, which costs
the same as real data. Prints a table, writes benchmarks/results/throughput-<script>-<device>.json.
"""

import dataclasses
import importlib
import importlib.metadata
import json
import os
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from common.data import Batch, Dataset, Replay

SIZES = {  # name -> flags, observation size
    "paper": (dict(chunk_length=5, action_size=5), 46),  # cube-triple, networks as by default
    "small": (
        dict(chunk_length=5, action_size=2, hidden_dims=(128, 128), num_critics=2)
        | dict(batch_size=128, flow_steps=5),
        2,
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    script: str = "qam"  # module to measure, e.g. qam or baselines.fql
    sizes: tuple[str, ...] = ("small", "paper")  # of SIZES
    agents: tuple[int, ...] = (1, 2, 4, 8)  # agents trained in one program
    seconds: float = 5.0  # measured time of each row, at least
    transitions: int = 200_000  # in the random dataset
    out: str = "benchmarks/results"  # folder of the JSON file


def random_dataset(rng, transitions, observation_size, action_size) -> Dataset:
    """Trajectories of 1000 transitions with random content."""
    rows = np.arange(transitions) + np.arange(transitions) // 1000
    normal = rng.standard_normal((rows[-1] + 2, observation_size), np.float32)
    masks = (rng.random((1, transitions)) > 0.01).astype(np.float32)
    return jax.device_put(
        Dataset(
            observations=normal,
            rows=rows.astype(np.int32),
            actions=rng.uniform(-1, 1, (transitions, action_size)).astype(np.float32),
            rewards=-masks,
            masks=masks,
            terminals=(np.arange(transitions) % 1000 == 999).astype(np.float32),
        )
    )


def timed(step, seconds):
    """Median seconds of a call of `step` (which must wait for its result), over >= 5 calls."""
    times = []
    while len(times) < 5 or sum(times) < seconds:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def measure_chunk(script, args, data, agents, seconds):
    """(ms per update of all agents, compile seconds) of `train_chunk`."""
    keys = jax.random.split(jax.random.PRNGKey(0), agents)
    state = jax.jit(jax.vmap(partial(script.create, args, data.observations.shape[-1])))(keys)
    replay, task = Replay.create(agents, 0, data), jnp.zeros(agents, jnp.int32)
    updates = 1

    def step():
        nonlocal state
        state, metrics = script.train_chunk(args, state, data, replay, task, updates)
        jax.block_until_ready(metrics)

    start = time.perf_counter()
    step()
    compile_seconds = time.perf_counter() - start
    one = timed(step, 0)
    updates = max(1, min(1000, int(0.5 / one)))  # chunks of about half a second
    return 1e3 * timed(step, seconds) / updates, compile_seconds - one


def measure_loop(script, args, data, seconds):
    """ms per update of the plain loop: a batch from NumPy, one dispatch per update."""
    host, rng = jax.tree.map(np.asarray, data), np.random.default_rng(0)
    B, H = args.batch_size, args.chunk_length
    following = host.observations[host.rows + 1]  # such codebases store the next observations
    observations = host.observations[host.rows]
    discounts = args.discount ** np.arange(H)
    state = script.create(args, data.observations.shape[-1], jax.random.PRNGKey(0))
    update = jax.jit(script.update, static_argnums=0)

    def step():
        nonlocal state
        k = rng.integers(0, len(host.rows) - H + 1, B)[:, None] + np.arange(H)
        terminals = host.terminals[k]
        valid = (np.cumsum(terminals, 1) == terminals).astype(np.float32)
        batch = Batch(
            observations=observations[k[:, 0]],
            actions=host.actions[k].reshape(B, -1),
            rewards=(host.rewards[0][k] * discounts * valid).sum(1).astype(np.float32),
            masks=np.where(valid == 1, host.masks[0][k], 1).min(1).astype(np.float32),
            next_observations=following[k[:, 0] + valid.sum(1).astype(int) - 1],
            valid=valid[:, -1],
        )
        state, metrics = update(args, state, batch)
        jax.block_until_ready(metrics)

    step()
    return 1e3 * timed(step, seconds)


def main(options: Options) -> dict:
    script = importlib.import_module(options.script)
    device = jax.devices()[0].device_kind
    results = dict(
        script=options.script,
        device=f"{device}, {os.cpu_count()} CPU cores",
        versions={name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        command=f"python -m benchmarks.throughput --script {options.script} "
        f"--agents {' '.join(map(str, options.agents))}",
        rows=[],
    )
    print(f"{options.script} on {results['device']}, jax {results['versions']['jax']}")
    print("size   agents  ms/update  ms/agent-update  agent-updates/s  compile s  speed-up of loop")
    for size in options.sizes:
        flags, observation_size = SIZES[size]
        args = dataclasses.replace(script.Args(), **flags)
        rng = np.random.default_rng(0)
        data = random_dataset(rng, options.transitions, observation_size, args.action_size)
        loop = measure_loop(script, args, data, options.seconds)
        results["rows"].append(dict(size=size, agents=1, way="loop", ms_per_update=loop))
        print(f"{size:6s} {'loop':>6s} {loop:10.2f} {loop:16.2f} {1e3 / loop:16.1f}")
        for agents in options.agents:
            ms, compiling = measure_chunk(script, args, data, agents, options.seconds)
            row = dict(size=size, agents=agents, way="chunk", ms_per_update=ms)
            row |= dict(ms_per_agent_update=ms / agents, compile_seconds=compiling)
            results["rows"].append(row)
            rate = 1e3 * agents / ms
            print(
                f"{size:6s} {agents:6d} {ms:10.2f} {ms / agents:16.2f} {rate:16.1f} "
                f"{compiling:10.1f} {loop * agents / ms:17.2f}",
                flush=True,
            )
    name = f"throughput-{options.script}-{device}".replace(" ", "-").replace(".", "_").lower()
    path = Path(options.out) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1))
    print(f"written to {path}")
    return results


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
