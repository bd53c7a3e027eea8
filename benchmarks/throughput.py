"""Speed of every script's jitted training, at the paper's sizes and at small ones.

    python -m benchmarks.throughput --scripts qam meam --agents 1 8 40
    python -m benchmarks.throughput --scripts all --sizes paper --agents 1 8 40 --no-loop
    python -m benchmarks.throughput --table          prints the committed rows and the projection

A row per script, size and number of agents: milliseconds per update of all agents and per agent's
update, compile time, arithmetic of the matrix products of one agent's update, its share of the
device's peak, memory that the program needs. In the same process, as the yardstick, the loop that
most codebases have: NumPy sampling and one dispatch per update (offline scripts, one agent). Data
are random, which costs the same as real data. Environments and evaluations are not in these
numbers (`python -m benchmarks.shares`, `python -m benchmarks.online_throughput`). The row of a
configuration replaces an older one in benchmarks/results/throughput.csv.
"""

import dataclasses
import importlib.metadata
import os
import time
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from analysis.agents import script_of
from analysis.command_line import run_program
from analysis.runs import read_rows
from analysis.tables import markdown
from benchmarks import write_rows
from common.data import Batch, Dataset, Replay, spread
from common.errors import UserError
from tests.shared_blocks import named

# name -> flags, observation and action size; flags that a script does not have are left out
OFFLINE_SIZES = {
    "paper": (dict(chunk_length=5), 46, 5),  # cube-triple, networks as by default
    "small": (
        dict(chunk_length=5, hidden_dims=(128, 128), num_critics=2, batch_size=128, flow_steps=5),
        2,
        2,
    ),
}
ONLINE_SIZES = {  # halfcheetah, networks as by default; the plane's
    "paper": ({}, 17, 6),
    "small": (dict(hidden_dims=(64, 64, 64), batch_size=32), 2, 2),
}
PEAKS = {"NVIDIA H200": 494.5, "NVIDIA H100 80GB HBM3": 494.5, "NVIDIA A100-SXM4-80GB": 156.0}
KEY = ("script", "size", "way", "agents", "device")
COLUMNS = (*KEY, "ms_update", "ms_agent_update", "compile_s", "gflop", "peak", "memory_mb", "jax")
TABLE_1 = dict(updates=1_000_000, tasks=50, seeds=8)  # of the QAM paper, per method
Size = Literal["small", "paper"]
OUT = Path(__file__).resolve().parent / "results/throughput.csv"


@dataclasses.dataclass(frozen=True)
class Options:
    scripts: tuple[str, ...] = ("qam",)  # e.g. qam or fql; or all
    sizes: tuple[Size, ...] = ("small", "paper")
    agents: tuple[int, ...] = (1, 2, 4, 8)  # agents trained in one program
    seconds: float = 5.0  # measured time of each row, at least
    transitions: int = 200_000  # in the random data
    loop: bool = True  # measure the plain loop, too
    peak: float = 0.0  # TFLOP/s of a device at its default precision (0: those known here)
    table: bool = False  # measure nothing, print what is committed
    out: str = str(OUT)


def random_dataset(rng, transitions, observation_size, action_size) -> Dataset:
    """Trajectories of 1000 transitions with random content."""
    rows = np.arange(transitions) + np.arange(transitions) // 1000
    normal = rng.standard_normal((rows[-1] + 2, observation_size), np.float32)
    masks = (rng.random((1, transitions)) > 0.01).astype(np.float32)
    return Dataset(
        observations=normal,
        rows=rows.astype(np.int32),
        actions=rng.uniform(-1, 1, (transitions, action_size)).astype(np.float32),
        rewards=-masks,
        masks=masks,
        terminals=(np.arange(transitions) % 1000 == 999).astype(np.float32),
    )


class Trained:
    """Agents of a script of either family on random data, ready to make updates."""

    def __init__(self, name, size, agents=1, transitions=200_000, **flags):
        if agents < 1:
            raise UserError("--agents must be at least 1")
        self.script, rng = script_of(name), np.random.default_rng(0)
        self.offline = hasattr(self.script.Args, "tasks")
        more, S, d = (OFFLINE_SIZES if self.offline else ONLINE_SIZES)[size]
        flags = dict(action_size=d, replay_size=transitions) | more | flags
        known = {key: x for key, x in flags.items() if key in self.script.Args.__dataclass_fields__}
        self.args, self.agents, self.rounds = self.script.Args(**known), agents, 1
        self.train = self.script.train_chunk
        keys = jax.random.split(jax.random.PRNGKey(0), agents)
        create = partial(self.script.create, self.args, S)  # one by one, as baselines/ppo.py says
        self.state = spread(jax.jit(partial(jax.lax.map, create))(keys))
        self.data = random_dataset(rng, transitions if self.offline else 1000, S, d)
        if self.offline:
            self.data, task = spread(self.data, agents), jnp.zeros(agents, jnp.int32)
        if hasattr(self.args, "offline_steps"):  # their replay is empty then
            self.inputs = self.data, spread(Replay.create(agents, 0, self.data)), task
            return
        rollout = getattr(self.args, "rollout_steps", 0)  # PPO learns from rollouts alone
        length = (1, rollout) if rollout else (transitions,)
        if rollout:
            self.rounds = self.args.epochs * (rollout // self.args.batch_size)  # updates of a call
        widths = dict(observations=(S,), next_observations=(S,), actions=(d,))
        widths |= dict(rewards=(), masks=(), terminals=())
        draw = lambda width: rng.uniform(-1, 1, (agents, *length, *width)).astype(np.float32)
        rows = {name: draw(width) for name, width in widths.items()}
        rows |= dict(masks=np.ones_like(rows["masks"]), terminals=np.zeros_like(rows["masks"]))
        if rollout:
            self.inputs = (spread(rows),)
            return
        replay = spread(Replay(**rows, size=np.full(agents, transitions, np.int32)))
        if self.offline:  # RLPD learns from its own transitions, too
            self.inputs = self.data, replay, task
            return
        shapes = jax.eval_shape(partial(self.script.learn, self.args), self.state, None, replay)[1]
        self.sums = spread(jax.tree.map(lambda x: jnp.zeros(x.shape), shapes))
        self.inputs = self.sums, replay

    def call(self, updates):
        """What `train_chunk` is called with."""
        return self.args, self.state, *self.inputs, *((updates,) if self.rounds == 1 else ())

    def seconds(self, updates) -> float:
        """Makes so many updates (PPO: the nearest number that is possible) and waits for them."""
        start = time.perf_counter()
        for _ in range(1 if self.rounds == 1 else max(1, round(updates / self.rounds))):
            self.state, metrics = self.train(*self.call(updates))
        jax.block_until_ready((self.state, metrics))
        return time.perf_counter() - start

    def flops(self) -> float:
        """Of the matrix products of one update of one agent."""
        static = self.script.train_chunk.__wrapped__
        traced = jax.make_jaxpr(partial(static, self.args))(*self.call(1)[1:])
        return products(traced.jaxpr) / self.agents / self.rounds

    def memory(self) -> float:
        """Megabytes of the compiled program: data, agents and what it works with."""
        used = self.train.lower(*self.call(1)).compile().memory_analysis()
        total = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
        return (total - used.alias_size_in_bytes) / 2**20


class Loop:
    """The loop that most codebases have, with the agent and the data of a `Trained`: a batch from
    NumPy, one dispatch per update."""

    def __init__(self, trained):
        self.args, self.update = trained.args, jax.jit(trained.script.update, static_argnums=0)
        self.data, self.rng = jax.tree.map(np.asarray, trained.data), np.random.default_rng(0)
        size = self.data.observations.shape[-1]
        self.state = trained.script.create(trained.args, size, jax.random.PRNGKey(0))
        # such codebases store the next observations
        self.observations = self.data.observations[self.data.rows]
        self.following = self.data.observations[self.data.rows + 1]

    def draw(self):
        """A batch."""
        data, B, H = self.data, self.args.batch_size, self.args.chunk_length
        k = self.rng.integers(0, len(data.rows) - H + 1, B)[:, None] + np.arange(H)
        terminals, discounts = data.terminals[k], self.args.discount ** np.arange(H)
        valid = (np.cumsum(terminals, 1) == terminals).astype(np.float32)
        return Batch(
            observations=self.observations[k[:, 0]],
            actions=data.actions[k].reshape(B, -1),
            rewards=(data.rewards[0][k] * discounts * valid).sum(1).astype(np.float32),
            masks=np.where(valid == 1, data.masks[0][k], 1).min(1).astype(np.float32),
            next_observations=self.following[k[:, 0] + valid.sum(1).astype(int) - 1],
            valid=valid[:, -1],
        )

    def seconds(self, updates) -> float:
        """Makes so many updates, waiting for each."""
        start = time.perf_counter()
        for _ in range(updates):
            self.state, metrics = self.update(self.args, self.state, self.draw())
            jax.block_until_ready(metrics)
        return time.perf_counter() - start


def products(jaxpr) -> float:
    """Floating-point operations of the matrix products in a jaxpr; a loop without a known number of
    rounds counts as one round, a branch as the longest."""
    total = 0
    for equation in jaxpr.eqns:
        name, p = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = p["dimension_numbers"]
            left = equation.invars[0].aval.shape
            size = np.prod([left[i] for i in contracted], initial=1.0)
            total += 2 * size * np.prod(equation.outvars[0].aval.shape, initial=1.0)
            continue
        inner = [x for value in p.values() for x in (value if type(value) is tuple else (value,))]
        inner = [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in inner]
        inner = [products(x) for x in inner if isinstance(x, Jaxpr)]
        total += max(inner, default=0) if name == "cond" else sum(inner) * p.get("length", 1)
    return float(total)


def timed(step, seconds):
    """Median seconds of a call of `step` (which must wait for its result), over >= 5 calls."""
    times = []
    while len(times) < 5 or sum(times) < seconds:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def measure_chunk(trained, seconds):
    """(ms per update of all agents, seconds of a call with one update) of `train_chunk`, which is
    compiled already."""
    one = timed(lambda: trained.seconds(1), 0) / trained.rounds
    updates = max(1, min(1000, int(0.1 * seconds / one)))  # ten chunks
    made = updates if trained.rounds == 1 else max(1, round(updates / trained.rounds))
    made *= trained.rounds
    return 1e3 * timed(lambda: trained.seconds(updates), seconds) / made, one * trained.rounds


def describe() -> str:
    """The devices that a program uses, and the cores."""
    devices = jax.local_devices()
    kind = devices[0].device_kind
    return f"{len(devices)} x {kind}" if len(devices) > 1 else f"{kind}, {os.cpu_count()} CPU cores"


def measure(name, options):
    """Rows of one script."""
    device, version = describe(), importlib.metadata.version("jax")
    peak = 1e12 * (options.peak or PEAKS.get(jax.devices()[0].device_kind, 0))
    peak *= len(jax.local_devices())
    for size in options.sizes:
        row = dict(script=name.split(".")[-1], size=size, device=device, jax=version)
        for agents in options.agents:
            trained = Trained(name, size, agents, options.transitions)
            if options.loop and trained.offline and agents == options.agents[0]:
                one = Loop(trained)
                one.seconds(1)  # compiles
                ms = f"{1e3 * timed(lambda: one.seconds(1), options.seconds):.3f}"
                yield row | dict(way="loop", agents=1, ms_update=ms, ms_agent_update=ms)
            first, flops = trained.seconds(1), trained.flops()  # compiles
            ms, one = measure_chunk(trained, options.seconds)
            new = row | dict(way="chunk", agents=agents, ms_update=f"{ms:.3f}")
            new |= dict(ms_agent_update=f"{ms / agents:.3f}", gflop=f"{flops / 1e9:.3f}")
            new |= dict(memory_mb=f"{trained.memory():.0f}")
            if not jax.config.jax_compilation_cache_dir:  # else it may come from there
                new |= dict(compile_s=f"{first - one:.1f}")
            share = flops * agents / (1e-3 * ms) / peak if peak else 0
            yield new | (dict(peak=f"{share:.3f}") if peak else {})


def table(rows):
    """Markdown: the rows, with the loop's time over the chunk's."""
    lines = [[*COLUMNS, "loop / chunk"]]
    same = lambda x, y: all(x[name] == y[name] for name in ("script", "size", "device"))
    for row in rows:
        loop = [x for x in rows if x["way"] == "loop" and same(x, row) and row["way"] != "loop"]
        ratio = float(loop[0]["ms_update"]) / float(row["ms_agent_update"]) if loop else ""
        lines.append([row[name] for name in COLUMNS] + [f"{ratio:.2f}" if loop else ""])
    return markdown(lines)


def hours(ms_agent_update: float) -> float:
    """Of one device, for a method's rows of the QAM paper's Table 1, updates alone."""
    return ms_agent_update * np.prod([*TABLE_1.values()]) / 3.6e6


def projection(rows):
    """Markdown: hours of one device for a method's rows of the QAM paper's Table 1, from the most
    agents measured at paper size, updates alone."""
    best = {}
    for row in rows:
        if row["way"] == "chunk" and row["size"] == "paper" and row["script"] in OFFLINE:
            key = row["device"], row["script"]
            best[key] = max(best.get(key, row), row, key=lambda row: int(row["agents"]))
    title = "| device | script | agents | hours for 50 tasks x 8 seeds x 1M updates |"
    lines = [title, "|---" * 4 + "|"]
    for (device, script), row in sorted(best.items()):
        needed = hours(float(row["ms_agent_update"]))
        lines.append(f"| {device} | {script} | {row['agents']} | {needed:,.0f} |")
    return "\n".join(lines) if best else ""


OFFLINE = [name.split("/")[-1] for name in named("offline")]
EVERY = [name.replace("/", ".") for kind in ("offline", "online") for name in named(kind)]


def put_row(path: Path, new: dict, key: tuple, columns: tuple) -> None:
    """Writes a row in place of the one with the same key, or at the end, and prints it."""
    new = {name: str(new.get(name, "")) for name in columns}
    rows = [row for row in read_rows(path) if any(row[name] != new[name] for name in key)]
    write_rows(path, [*rows, new], columns)
    print(" ".join(f"{name} {x}" for name, x in new.items() if x), flush=True)


def main(options: Options) -> None:
    path = Path(options.out)
    scripts = EVERY if options.scripts == ("all",) else options.scripts
    for new in (row for name in scripts if not options.table for row in measure(name, options)):
        put_row(path, new, KEY, COLUMNS)
    rows = read_rows(path)
    print(table(rows), projection(rows), sep="\n\n")


if __name__ == "__main__":
    run_program(main, Options, __doc__)
