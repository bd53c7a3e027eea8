"""What a GPU makes of a script's update at the paper's sizes: kernels, memory traffic, variants.

    python -m benchmarks.gpu --scripts qam meam --agents 1 8 40 --variants all          on a GPU
    python -m benchmarks.gpu --scripts offline --without-gpu     compiles for an H200, runs nothing

A row per script, number of agents and variant of the program: kernels that an update launches,
gigabytes that it moves if every kernel reads its operands and writes its results once (of arrays
that it only slices or updates in place, that part), and on a GPU the time of an update.
--without-gpu needs jax[cuda13] alone (set JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1) and compiles without
autotuning. The row of a configuration replaces an older one in benchmarks/results/gpu.csv.
"""

import collections
import contextlib
import dataclasses
import importlib.metadata
import math
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from analysis.command_line import run_program
from analysis.runs import read_rows
from analysis.tables import markdown
from benchmarks import RESULTS, put_row
from benchmarks.throughput import (
    EVERY,
    OFFLINE,
    Size,
    Trained,
    describe,
    hours,
    measure_chunk,
)
from common.devices import matmul_precision
from common.errors import UserError

COLUMNS = "script size agents variant device kernels gb ms_update ms_agent_update jax".split()
KEY = tuple(COLUMNS[:5])
PRECISION = "float32", "bfloat16"  # what --precision says
FLAGS = {"no Triton": {"xla_gpu_enable_triton_gemm": False}}  # cuBLAS makes all products
VARIANTS = "as it is", "unrolled", "two-pass", "flat Adam", *PRECISION, *FLAGS
OUT = RESULTS / "gpu.csv"
H200 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 clock_rate_ghz: 1.98 cuda_compute_capability { major: 9 minor: 0 }
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 l2_cache_size: 62914560
  shared_memory_per_block_optin: 232448 memory_bandwidth: 4800000000000
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 device_memory_size: 150000000000
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
} platform_name: "CUDA" device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 minor: 0 }"""
BYTES = {
    **{"f64": 8, "s64": 8, "u64": 8},
    **{"f32": 4, "s32": 4, "u32": 4},
    **{"f16": 2, "bf16": 2},
    **{"u8": 1, "pred": 1},
}
FREE = "parameter get-tuple-element tuple constant bitcast fusion-done copy-done".split()
UPDATE = "dynamic-update-slice"
SLICES = UPDATE, "dynamic-slice", "gather"
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<result>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) "
    r"(?P<operation>[\w\-]+)\((?P<rest>.*)$"
)


@dataclasses.dataclass(frozen=True)
class Options:
    scripts: tuple[str, ...] = ("qam",)
    """Scripts such as qam or fql; or offline; or all."""
    agents: tuple[int, ...] = (40,)
    """Numbers of agents trained in one program."""
    variants: tuple[str, ...] = VARIANTS[:1]
    """Variants of the program, or all."""
    size: Size = "paper"
    """Sizes of networks, batches and transitions."""
    without_gpu: bool = False
    """Compile for an H200 on a machine without a GPU, and run nothing."""
    seconds: float = 1.0
    """Measured time of each row, at least."""
    out: str = str(OUT)
    """File of the results."""


# --- kernels and bytes of a compiled program -----------------------------------------------------


class Instruction(NamedTuple):
    """A line of HLO: result = shape operation(rest."""

    result: str
    shape: str
    operation: str
    rest: str  # what follows the opening bracket
    line: str

    def operands(self) -> list[str]:
        """Returns the names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])


def size(shape: str) -> int:
    """Returns the bytes of an array or a tuple of arrays, as HLO writes its type.

    Work space (s8) is free.
    """
    total = 0
    for kind, axes in re.findall(r"\b(\w+)\[([\d,]*)\]", shape):
        lengths = [int(length) for length in axes.split(",") if length]
        total += BYTES.get(kind, 0) * math.prod(lengths)
    return total


class Fusion:
    """A fused computation, and the bytes that it moves."""

    def __init__(self, body: list[Instruction]):
        self.instructions = {one.result: one for one in body}
        self.origin = {}  # result of a bitcast -> the array that it shows
        self.uses = collections.defaultdict(list)  # array -> (instruction, place of the operand)
        for one in body:
            operands = one.operands()
            if one.operation == "bitcast":
                self.origin[one.result] = self.source(operands[0])
                continue
            for place, name in enumerate(operands):
                self.uses[self.source(name)].append((one, place))
        self.root = next(one.result for one in body if "ROOT" in one.line)

    def source(self, name: str) -> str:
        """Returns the array that a bitcast shows, or the array itself."""
        return self.origin.get(name, name)

    def read(self, name: str) -> int:
        """Returns the bytes read of a parameter: of one that is only sliced, the slices."""
        uses = self.uses[name]
        if all(one.operation in SLICES and place == 0 for one, place in uses):
            return sum(size(one.shape) for one, _ in uses if one.operation != UPDATE)
        return size(self.instructions[name].shape)

    def written(self, name: str) -> int:
        """Returns the bytes written for a result: of an update in place, the update."""
        one = self.instructions[self.source(name)]
        operands = one.operands()
        if one.operation == "tuple":
            return sum(self.written(operand) for operand in operands)
        if one.operation == UPDATE:
            return size(self.instructions[operands[1]].shape)
        return size(one.shape)

    def traffic(self) -> int:
        """Returns the bytes that the computation reads and writes."""
        total = self.written(self.root)
        for one in self.instructions.values():
            if one.operation == "parameter":
                total += self.read(one.result)
        return total


def program(text: str) -> tuple[int, int]:
    """Returns the kernels and bytes of a compiled program.

    A loop without a known number of rounds counts as one round.
    """
    bodies = {}
    body = []
    for line in text.splitlines():
        computation = COMPUTATION.match(line)
        instruction = INSTRUCTION.match(line)
        if computation:
            is_entry, name = computation.groups()
            body = bodies.setdefault("entry" if is_entry else name, [])
        elif instruction:
            body.append(Instruction(**instruction.groupdict(), line=line))
    return _count(bodies, "entry")


def _count(bodies: dict[str, list[Instruction]], name: str) -> tuple[int, int]:
    """Returns the kernels and bytes of a computation."""
    kernels = 0
    moved = 0
    shape_of = {one.result: one.shape for one in bodies[name]}
    for one in bodies[name]:
        if one.operation in FREE:
            continue
        inner = re.search(r"(?:body|to_apply|calls)=%?([\w.\-]+)", one.line)
        if one.operation in ("while", "call"):
            inner_kernels, inner_moved = _count(bodies, inner[1])
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"', one.line)
            rounds = int(known[1]) if known else 1
            kernels += rounds * inner_kernels
            moved += rounds * inner_moved
            continue
        kernels += 1
        if one.operation.startswith("fusion"):
            moved += Fusion(bodies[inner[1]]).traffic()
            continue
        moved += size(one.shape)
        moved += sum(size(shape_of.get(operand, "")) for operand in one.operands())
    return kernels, moved


# --- measuring -----------------------------------------------------------------------------------


def refuse_unknown(variants: Iterable[str]) -> None:
    """Raises UserError if there is no such variant."""
    unknown = set(variants) - set(VARIANTS)
    if unknown:
        raise UserError(f"no variant {', '.join(unknown)}; choose from {', '.join(VARIANTS)}")


@contextlib.contextmanager
def changed(variant: str):
    """While the context lasts, programs are traced as this variant."""
    scan = jax.lax.scan
    norm = nn.LayerNorm
    adam = optax.adam
    precision = variant if variant in PRECISION else "default"
    try:
        if variant == "unrolled":  # Ten steps from noise to action are one piece of program.
            jax.lax.scan = partial(scan, unroll=10)
        if variant == "two-pass":  # LayerNorm's variance is the mean of (x - mean)^2.
            nn.LayerNorm = partial(norm, use_fast_variance=False)
        if variant == "flat Adam":  # All parameters are one vector for it.
            optax.adam = lambda *arguments: optax.flatten(adam(*arguments))
        with matmul_precision(precision):
            yield
    finally:
        jax.lax.scan = scan
        nn.LayerNorm = norm
        optax.adam = adam


def prepare(name: str, size: Size, agents: int, variant: str) -> Trained:
    """Returns agents with an untraced program. Call this and the program inside `changed`."""
    trained = Trained(name, size, agents)
    train = trained.script.train_chunk.__wrapped__

    def own(*inputs):  # A new function: jax cannot reuse the trace of another variant.
        return train(*inputs)

    flags = FLAGS.get(variant)
    trained.train = jax.jit(own, static_argnums=0, donate_argnums=(1, 2), compiler_options=flags)
    return trained


def shapes(trained: Trained, agents: int, device) -> list:
    """Returns the shapes of the arguments of `train_chunk` for `agents` agents on a device.

    They are derived from those of `trained`, which has one agent. The device need not exist.
    """
    place = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))

    def alone(x):
        x = jnp.asarray(x)
        return place(x.shape, x.dtype)

    def with_agents(x):
        x = jnp.asarray(x)
        if x.ndim == 0:  # the number of updates
            return place(x.shape, x.dtype)
        return place((agents, *x.shape[1:]), x.dtype)

    found = []
    for tree in trained.call(1)[1:]:
        abstract = alone if tree is trained.data else with_agents
        found.append(jax.tree.map(abstract, tree))
    return found


def measure(name: str, agents: int, variant: str, options: Options) -> dict:
    """Returns a row."""
    row = dict(
        script=name.split(".")[-1],
        agents=agents,
        variant=variant,
        jax=importlib.metadata.version("jax"),
        device=describe(),
    )
    with changed(variant):
        trained = prepare(name, options.size, 1 if options.without_gpu else agents, variant)
        inputs = trained.call(1)
        if options.without_gpu:
            target = dict(platform="cuda", topology="1x1x1", target_config=H200)
            (device,) = topologies.get_topology_desc(**target).devices
            row["device"] = f"for {device.device_kind}, not run"
            inputs = [trained.args, *shapes(trained, agents, device)]
        compiled = trained.train.lower(*inputs).compile()
        kernels, moved = program(compiled.as_text())
        row["kernels"] = f"{kernels / trained.rounds:.0f}"
        row["gb"] = f"{moved / trained.rounds / 1e9:.2f}"
        if not options.without_gpu:
            trained.seconds(1)
            ms, _ = measure_chunk(trained, options.seconds)
            row["ms_update"] = f"{ms:.3f}"
            row["ms_agent_update"] = f"{ms / agents:.3f}"
    return row


def estimates(rows: list[dict]) -> str:
    """Returns Markdown with estimated times of the scripts that were compiled with 40 agents but
    not run: QAM's time, scaled by the bytes moved, and the hours for the QAM paper's Table 1."""
    own = [row for row in rows if (row["agents"], row["variant"]) == ("40", VARIANTS[0])]
    run = [row for row in own if row["ms_update"]]
    gigabytes = {row["script"]: float(row["gb"]) for row in own if not row["ms_update"]}
    known = [float(row["ms_update"]) for row in run if row["script"] == "qam"]
    if not known or "qam" not in gigabytes:
        return ""
    done = {row["script"] for row in run}
    lines = []
    for script, gb in gigabytes.items():
        ms = known[0] / gigabytes["qam"] * gb / 40
        if script in OFFLINE and script not in done:
            lines.append([script, f"{gb:g}", f"{ms:.3f}", f"{hours(ms):.0f}"])
    if not lines:
        return ""
    return markdown([["script", "GB", "ms per agent-update", "hours"], *lines])


def scripts_of(options: Options) -> list[str]:
    """Returns the scripts that the options name, one by one or as a group."""
    offline = [name for name in EVERY if name.split(".")[-1] in OFFLINE]
    groups = dict(all=EVERY, offline=offline)
    found = []
    for name in options.scripts:
        found += groups.get(name, [name])
    return found


def main(options: Options) -> None:
    """Measures each script, and prints the table of all rows."""
    variants = VARIANTS if options.variants == ("all",) else options.variants
    refuse_unknown(variants)
    if min(options.agents, default=1) < 1:
        raise UserError("--agents must be at least 1")
    if options.without_gpu:  # The scripts ask for it.
        jax.default_backend = partial(str, "gpu")
    for name in scripts_of(options):
        for agents in options.agents:
            for variant in variants:
                row = measure(name, agents, variant, options)
                put_row(Path(options.out), row, KEY, COLUMNS)
    rows = read_rows(Path(options.out))
    lines = [COLUMNS]
    for row in rows:
        lines.append([row[name] for name in COLUMNS])
    print(markdown(lines), estimates(rows), sep="\n\n")


if __name__ == "__main__":
    run_program(main, Options, __doc__)
