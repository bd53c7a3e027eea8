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
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from analysis.command_line import run_program
from analysis.runs import read_rows
from analysis.scripts import script_of
from analysis.tables import markdown
from benchmarks import RESULTS, put_row
from common.devices import replicate, shard_over_agents, zero_metrics
from common.errors import UserError
from common.sampling import Batch, Dataset, Replay
from tools.shared_blocks import named


class SizeOf(NamedTuple):
    """What is measured under the name of a size; flags that a script does not have are left out."""

    flags: dict
    observation_size: int
    action_size: int


OFFLINE_SIZES = {
    # cube-triple, with the networks that are the default
    "paper": SizeOf(dict(chunk_length=5), 46, 5),
    "small": SizeOf(
        dict(chunk_length=5, hidden_dims=(128, 128), num_critics=2, batch_size=128, flow_steps=5),
        2,
        2,
    ),
}
ONLINE_SIZES = {
    # halfcheetah, with the networks that are the default
    "paper": SizeOf({}, 17, 6),
    # the plane, with its networks
    "small": SizeOf(dict(hidden_dims=(64, 64, 64), batch_size=32), 2, 2),
}
PEAKS = {"NVIDIA H200": 494.5, "NVIDIA H100 80GB HBM3": 494.5, "NVIDIA A100-SXM4-80GB": 156.0}
KEY = ("script", "size", "way", "agents", "device")
COLUMNS = (*KEY, "ms_update", "ms_agent_update", "compile_s", "gflop", "peak", "memory_mb", "jax")
TABLE_1 = dict(updates=1_000_000, tasks=50, seeds=8)  # of the QAM paper, per method
Size = Literal["small", "paper"]
OUT = RESULTS / "throughput.csv"
OFFLINE = [name.split("/")[-1] for name in named("offline")]
EVERY = [name.replace("/", ".") for name in named("offline") + named("online")]


@dataclasses.dataclass(frozen=True)
class Options:
    scripts: tuple[str, ...] = ("qam",)
    """Scripts such as qam or fql; or all."""
    sizes: tuple[Size, ...] = ("small", "paper")
    """Sizes of networks, batches and transitions."""
    agents: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of agents trained in one program."""
    seconds: float = 5.0
    """Measured time of each row, at least."""
    transitions: int = 200_000
    """Transitions in the random data."""
    loop: bool = True
    """Measure the plain loop as well."""
    peak: float = 0.0
    """Peak TFLOP/s of a device at its default precision (0: looked up in PEAKS)."""
    table: bool = False
    """Measure nothing, and print what is committed."""
    out: str = str(OUT)
    """File of the results."""


# --- what is measured ----------------------------------------------------------------------------


def random_dataset(rng, transitions: int, observation_size: int, action_size: int) -> Dataset:
    """Returns trajectories of 1000 transitions with random content."""
    number = np.arange(transitions)
    rows = number + number // 1000  # each trajectory has one more observation
    observations = rng.standard_normal((rows[-1] + 2, observation_size), np.float32)
    masks = (rng.random((1, transitions)) > 0.01).astype(np.float32)
    return Dataset(
        observations=observations,
        rows=rows.astype(np.int32),
        actions=rng.uniform(-1, 1, (transitions, action_size)).astype(np.float32),
        rewards=-masks,
        masks=masks,
        terminals=(number % 1000 == 999).astype(np.float32),
    )


def random_transitions(rng, shape: tuple, observation_size: int, action_size: int) -> dict:
    """Returns transitions of an online method, arrays (*shape, ...)."""
    widths = dict(
        observations=(observation_size,),
        next_observations=(observation_size,),
        actions=(action_size,),
        rewards=(),
        masks=(),
        terminals=(),
    )
    rows = {}
    for name, width in widths.items():
        rows[name] = rng.uniform(-1, 1, (*shape, *width)).astype(np.float32)
    rows["masks"] = np.ones_like(rows["masks"])
    rows["terminals"] = np.zeros_like(rows["terminals"])
    return rows


class Trained:
    """Agents of a script of either family on random data, ready to make updates."""

    def __init__(self, name: str, size: Size, agents=1, transitions=200_000, **flags):
        if agents < 1:
            raise UserError("--agents must be at least 1")
        self.agents = agents
        self.script = script_of(name)
        self.train = self.script.train_chunk
        self.offline = hasattr(self.script.Args, "tasks")
        more, S, d = (OFFLINE_SIZES if self.offline else ONLINE_SIZES)[size]
        flags = dict(action_size=d, replay_size=transitions) | more | flags
        fields = self.script.Args.__dataclass_fields__
        known = {key: x for key, x in flags.items() if key in fields}
        self.args = self.script.Args(**known)
        keys = jax.random.split(jax.random.PRNGKey(0), agents)
        create = partial(self.script.create, self.args, S)  # one by one, as baselines/ppo.py says
        self.state = shard_over_agents(jax.jit(partial(jax.lax.map, create))(keys))
        rng = np.random.default_rng(0)
        self.data = random_dataset(rng, transitions if self.offline else 1000, S, d)
        self.rounds = 1  # updates of a call that cannot make fewer
        self.inputs = self._inputs(rng, transitions, S, d)
        self.metrics = self._zero_metrics()

    def _inputs(self, rng, transitions: int, S: int, d: int) -> tuple:
        """Returns the arrays that `train_chunk` takes after state and metrics."""
        agents = self.agents
        if self.offline:
            self.data = replicate(self.data, agents)
            task = jnp.zeros(agents, jnp.int32)
        if hasattr(self.args, "offline_steps"):  # Their replay is empty then.
            return self.data, Replay.create(agents, 0, S, d), task
        if hasattr(self.args, "rollout_steps"):  # PPO learns from rollouts alone.
            steps = self.args.rollout_steps
            self.rounds = self.args.epochs * (steps // self.args.batch_size)
            return (shard_over_agents(random_transitions(rng, (agents, 1, steps), S, d)),)
        rows = random_transitions(rng, (agents, transitions), S, d)
        sizes = np.full(agents, transitions, np.int32)
        replay = shard_over_agents(Replay(**rows, size=sizes))
        if self.offline:  # RLPD learns from its own transitions as well.
            return self.data, replay, task
        return (replay,)

    def _zero_metrics(self) -> dict:
        """Returns the sums of metrics before the first update."""
        step = partial(self.script.train_step, self.args)
        inputs = self.inputs
        if self.offline:
            step = partial(step, self.data)
            inputs = inputs[1:]  # without the data, which has no axis of agents
        return zero_metrics(step, self.state, *inputs)

    def call(self, updates: int) -> tuple:
        """Returns what `train_chunk` is called with."""
        inputs = (self.args, self.state, self.metrics, *self.inputs)
        if self.rounds > 1:
            return inputs
        return (*inputs, updates)

    def seconds(self, updates: int) -> float:
        """Makes so many updates (PPO: the nearest possible number) and returns their time."""
        calls = 1
        if self.rounds > 1:
            calls = max(1, round(updates / self.rounds))
        start = time.perf_counter()
        for _ in range(calls):
            self.state, self.metrics = self.train(*self.call(updates))
        jax.block_until_ready((self.state, self.metrics))
        return time.perf_counter() - start

    def flops(self) -> float:
        """Returns the operations of the matrix products of one update of one agent."""
        static = self.script.train_chunk.__wrapped__
        traced = jax.make_jaxpr(partial(static, self.args))(*self.call(1)[1:])
        return products(traced.jaxpr) / self.agents / self.rounds

    def memory(self) -> float:
        """Returns the megabytes of the compiled program: data, agents and what it works with."""
        used = self.train.lower(*self.call(1)).compile().memory_analysis()
        total = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
        return (total - used.alias_size_in_bytes) / 2**20


class Loop:
    """The loop that most codebases have, with the agent and the data of a `Trained`: a batch from
    NumPy, one dispatch per update."""

    def __init__(self, trained: Trained):
        self.args = trained.args
        self.update = jax.jit(trained.script.update, static_argnums=0)
        self.data = jax.tree.map(np.asarray, trained.data)
        self.rng = np.random.default_rng(0)
        size = self.data.observations.shape[-1]
        self.state = trained.script.create(trained.args, size, jax.random.PRNGKey(0))
        # Such codebases store the next observations.
        self.observations = self.data.observations[self.data.rows]
        self.following = self.data.observations[self.data.rows + 1]

    def draw(self) -> Batch:
        """Draws a batch."""
        data = self.data
        H = self.args.chunk_length
        first = self.rng.integers(0, len(data.rows) - H + 1, self.args.batch_size)
        chunk = first[:, None] + np.arange(H)
        terminals = data.terminals[chunk]
        valid = (np.cumsum(terminals, 1) == terminals).astype(np.float32)
        discounts = self.args.discount ** np.arange(H)
        rewards = (data.rewards[0][chunk] * discounts * valid).sum(1)
        masks = np.where(valid == 1, data.masks[0][chunk], 1)
        last = first + valid.sum(1).astype(int) - 1
        return Batch(
            observations=self.observations[first],
            actions=data.actions[chunk].reshape(len(first), -1),
            rewards=rewards.astype(np.float32),
            masks=masks.min(1).astype(np.float32),
            next_observations=self.following[last],
            valid=valid[:, -1],
        )

    def seconds(self, updates: int) -> float:
        """Makes so many updates, waiting for each, and returns their time."""
        start = time.perf_counter()
        for _ in range(updates):
            self.state, metrics = self.update(self.args, self.state, self.draw())
            jax.block_until_ready(metrics)
        return time.perf_counter() - start


# --- measuring -----------------------------------------------------------------------------------


def products(jaxpr) -> float:
    """Returns the floating-point operations of the matrix products in a jaxpr.

    A loop without a known number of rounds counts as one round, a branch as the longest.
    """
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            total += _operations(equation)
            continue
        inner = [products(part) for part in _inner_jaxprs(equation)]
        if name == "cond":
            total += max(inner, default=0)
        else:
            total += sum(inner) * equation.params.get("length", 1)
    return float(total)


def _operations(equation) -> float:
    """Returns the operations of a dot_general: a multiplication and an addition per element."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    out = equation.outvars[0].aval.shape
    size = np.prod([left[axis] for axis in contracted], initial=1.0)
    return 2 * size * np.prod(out, initial=1.0)


def _inner_jaxprs(equation) -> list[Jaxpr]:
    """Returns the functions, loops and branches that an equation runs."""
    found = []
    for value in equation.params.values():
        for part in value if type(value) is tuple else (value,):
            if isinstance(part, ClosedJaxpr):
                part = part.jaxpr
            if isinstance(part, Jaxpr):
                found.append(part)
    return found


def timed(step: Callable, seconds: float) -> float:
    """Returns the median time of a call of `step`, which must wait for its result.

    Makes at least five calls, and goes on until they have taken `seconds`.
    """
    times = []
    while len(times) < 5 or sum(times) < seconds:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def measure_in_turns(
    programs: Sequence[Trained | Loop], rounds: int, seconds: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns milliseconds per update of each program, and the ratios to the first one's time.

    In every round each program makes the same number of updates, which takes the first one about
    `seconds`. Ratios are computed within a round; both results are medians over the rounds.
    Programs must be compiled already.
    """
    updates = max(1, round(seconds / programs[0].seconds(1)))
    times = []
    for _ in range(rounds):
        times.append([program.seconds(updates) for program in programs])
    times = np.array(times)  # (rounds, programs)
    ratios = np.median(times / times[:, :1], axis=0)
    return 1e3 * np.median(times, axis=0) / updates, ratios


def measure_chunk(trained: Trained, seconds: float) -> tuple[float, float]:
    """Returns milliseconds per update of all agents, and seconds of a call with one update.

    `train_chunk` must be compiled already.
    """
    call = timed(lambda: trained.seconds(1), 0)
    one = call / trained.rounds
    updates = max(1, min(1000, int(0.1 * seconds / one)))  # ten chunks
    made = updates
    if trained.rounds > 1:
        made = max(1, round(updates / trained.rounds)) * trained.rounds
    chunk = timed(lambda: trained.seconds(updates), seconds)
    return 1e3 * chunk / made, call


def describe() -> str:
    """Names the devices that a program uses, and the cores."""
    devices = jax.local_devices()
    kind = devices[0].device_kind
    if len(devices) > 1:
        return f"{len(devices)} x {kind}"
    return f"{kind}, {os.cpu_count()} CPU cores"


def peak_of(options: Options) -> float:
    """Returns the operations per second of all devices together; 0 if they are not known."""
    devices = jax.local_devices()
    teraflops = options.peak or PEAKS.get(devices[0].device_kind, 0)
    return 1e12 * teraflops * len(devices)


def measure(name: str, options: Options) -> Iterator[dict]:
    """Yields the rows of one script."""
    for size in options.sizes:
        common = dict(
            script=name.split(".")[-1],
            size=size,
            device=describe(),
            jax=importlib.metadata.version("jax"),
        )
        for agents in options.agents:
            trained = Trained(name, size, agents, options.transitions)
            if options.loop and trained.offline and agents == options.agents[0]:
                yield common | measure_loop(trained, options)
            yield common | measure_agents(trained, options)


def measure_loop(trained: Trained, options: Options) -> dict:
    """Returns the numbers of the plain loop with one agent."""
    loop = Loop(trained)
    loop.seconds(1)  # It compiles.
    ms = f"{1e3 * timed(lambda: loop.seconds(1), options.seconds):.3f}"
    return dict(way="loop", agents=1, ms_update=ms, ms_agent_update=ms)


def measure_agents(trained: Trained, options: Options) -> dict:
    """Returns the numbers of all agents trained in one program."""
    agents = trained.agents
    first = trained.seconds(1)  # It compiles.
    flops = trained.flops()
    ms, one = measure_chunk(trained, options.seconds)
    row = dict(
        way="chunk",
        agents=agents,
        ms_update=f"{ms:.3f}",
        ms_agent_update=f"{ms / agents:.3f}",
        gflop=f"{flops / 1e9:.3f}",
        memory_mb=f"{trained.memory():.0f}",
    )
    if not jax.config.jax_compilation_cache_dir:  # Otherwise the program may come from there.
        row["compile_s"] = f"{first - one:.1f}"
    peak = peak_of(options)
    if peak:
        share = flops * agents / (1e-3 * ms) / peak
        row["peak"] = f"{share:.3f}"
    return row


# --- tables --------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    """Returns Markdown with the rows, and the loop's time over the chunk's."""
    loops = {}  # (script, size, device) -> ms per update
    for row in rows:
        if row["way"] == "loop":
            key = row["script"], row["size"], row["device"]
            loops.setdefault(key, float(row["ms_update"]))
    lines = [[*COLUMNS, "loop / chunk"]]
    for row in rows:
        key = row["script"], row["size"], row["device"]
        ratio = ""
        if key in loops and row["way"] != "loop":
            ratio = f"{loops[key] / float(row['ms_agent_update']):.2f}"
        cells = [row[name] for name in COLUMNS]
        lines.append([*cells, ratio])
    return markdown(lines)


def hours(ms_agent_update: float) -> float:
    """Returns the hours of one device for a method's rows of the QAM paper's Table 1.

    Only updates are counted.
    """
    return ms_agent_update * np.prod([*TABLE_1.values()]) / 3.6e6


def projection(rows: list[dict]) -> str:
    """Returns Markdown with the hours of one device for a method's rows of the QAM paper's Table 1.

    They come from the most agents measured at paper size, updates alone.
    """
    best = {}  # (device, script) -> row
    for row in rows:
        if row["way"] == "chunk" and row["size"] == "paper" and row["script"] in OFFLINE:
            key = row["device"], row["script"]
            other = best.setdefault(key, row)
            if int(row["agents"]) > int(other["agents"]):
                best[key] = row
    if not best:
        return ""
    lines = [["device", "script", "agents", "hours for 50 tasks x 8 seeds x 1M updates"]]
    for (device, script), row in sorted(best.items()):
        needed = hours(float(row["ms_agent_update"]))
        lines.append([device, script, row["agents"], f"{needed:,.0f}"])
    return markdown(lines)


def main(options: Options) -> None:
    """Measures scripts, and prints the table of all rows and the projection."""
    path = Path(options.out)
    scripts = EVERY if options.scripts == ("all",) else options.scripts
    if not options.table:
        for name in scripts:
            for row in measure(name, options):
                put_row(path, row, KEY, COLUMNS)
    rows = read_rows(path)
    print(table(rows), projection(rows), sep="\n\n")


if __name__ == "__main__":
    run_program(main, Options, __doc__)
