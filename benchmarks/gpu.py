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
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from analysis.command_line import run_program
from analysis.runs import read_rows
from analysis.tables import markdown
from benchmarks.throughput import EVERY, OFFLINE, Trained, describe, hours, measure_chunk, put_row
from common.errors import UserError

COLUMNS = "script agents variant device kernels gb ms_update ms_agent_update jax".split()
KEY = tuple(COLUMNS[:4])
PRECISION = {"float32": "float32", "bfloat16": "BF16_BF16_F32"}  # of the products
FLAGS = {"no Triton": {"xla_gpu_enable_triton_gemm": False}}  # cuBLAS makes all products
VARIANTS = "as it is", "unrolled", "two-pass", "bfloat16 layers", *PRECISION, *FLAGS
OUT = Path(__file__).resolve().parent / "results/gpu.csv"
H200 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 clock_rate_ghz: 1.98 cuda_compute_capability { major: 9 minor: 0 }
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 l2_cache_size: 62914560
  shared_memory_per_block_optin: 232448 memory_bandwidth: 4800000000000
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 device_memory_size: 150000000000
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
} platform_name: "CUDA" device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 minor: 0 }"""
BYTES = dict(f64=8, s64=8, u64=8, f32=4, s32=4, u32=4, f16=2, bf16=2, u8=1, pred=1)
FREE = "parameter get-tuple-element tuple constant bitcast fusion-done copy-done".split()
SLICES = "dynamic-update-slice", "dynamic-slice", "gather"
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")


@dataclasses.dataclass(frozen=True)
class Options:
    scripts: tuple[str, ...] = ("qam",)  # e.g. qam or fql; or offline; or all
    agents: tuple[int, ...] = (40,)  # agents trained in one program
    variants: tuple[str, ...] = VARIANTS[:1]  # or all
    without_gpu: bool = False  # compile for an H200, on a machine without a GPU
    seconds: float = 1.0  # measured time of each row, at least
    out: str = str(OUT)


def size(shape: str) -> int:
    """Bytes of an array or a tuple of arrays, as HLO writes its type; work space (s8) is free."""
    arrays = re.findall(r"\b(\w+)\[([\d,]*)\]", shape)
    number = lambda axes: math.prod(int(n) for n in axes.split(",") if n)
    return sum(BYTES.get(kind, 0) * number(axes) for kind, axes in arrays)


def names(rest: str) -> list[str]:
    """The operands, from what follows an instruction's opening bracket."""
    return re.findall(r"%([\w.\-]+)", rest.split("), ")[0])


def traffic(body: list[tuple]) -> int:
    """Bytes that a fused computation reads and writes: of an array of which it only takes slices,
    these; of one that it updates in place, the update."""
    of = {result: (shape, operation, names(rest)) for result, shape, operation, rest, _ in body}
    origin, uses = {}, collections.defaultdict(list)
    for result, (shape, operation, operands) in of.items():
        if operation == "bitcast":
            origin[result] = origin.get(operands[0], operands[0])
            continue
        for place, x in enumerate(operands):
            uses[origin.get(x, x)].append((operation, place, shape))

    def read(x):
        if all(operation in SLICES and place == 0 for operation, place, _ in uses[x]):
            return sum(size(shape) for operation, _, shape in uses[x] if operation != SLICES[0])
        return size(of[x][0])

    def written(x):
        shape, operation, operands = of[origin.get(x, x)]
        if operation == "tuple":
            return sum(map(written, operands))
        return size(of[operands[1]][0] if operation == SLICES[0] else shape)

    read_in = sum(read(x) for x, (_, operation, _) in of.items() if operation == "parameter")
    return read_in + written(next(result for result, *_, line in body if "ROOT" in line))


def program(text: str) -> tuple[int, int]:
    """Kernels and bytes of a compiled program, a loop without a known number of rounds once."""
    bodies, body = {}, []
    for line in text.splitlines():
        if found := COMPUTATION.match(line):
            body = bodies.setdefault("entry" if found[1] else found[2], [])
        elif found := INSTRUCTION.match(line):
            body.append((*found.groups(), line))

    def count(name):
        kernels, moved, shapes = 0, 0, {result: shape for result, shape, *_ in bodies[name]}
        for _, shape, operation, rest, line in bodies[name]:
            inner = re.search(r"(?:body|to_apply|calls)=%?([\w.\-]+)", line)
            if operation in ("while", "call"):
                rounds = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                more = [(int(rounds[1]) if rounds else 1) * x for x in count(inner[1])]
                kernels, moved = kernels + more[0], moved + more[1]
            elif operation not in FREE:
                kernels += 1
                if operation.startswith("fusion"):
                    moved += traffic(bodies[inner[1]])
                else:
                    moved += size(shape) + sum(size(shapes.get(x, "")) for x in names(rest))
        return kernels, moved

    return count("entry")


@contextlib.contextmanager
def changed(variant: str):
    """What is traced meanwhile is traced as this variant."""
    scan, norm, dense = jax.lax.scan, nn.LayerNorm, nn.Dense
    precision = PRECISION.get(variant, jax.config.jax_default_matmul_precision)
    try:
        if variant == "unrolled":  # ten steps from noise to action are one piece of program
            jax.lax.scan = lambda *inputs, **options: scan(*inputs, unroll=10, **options)
        if variant == "two-pass":  # LayerNorm's variance is the mean of (x - mean)^2
            nn.LayerNorm = partial(norm, use_fast_variance=False)
        if variant == "bfloat16 layers":  # every layer computes and leaves bfloat16
            nn.LayerNorm, nn.Dense = (partial(f, dtype=jnp.bfloat16) for f in (norm, dense))
        with jax.default_matmul_precision(precision):
            yield
    finally:
        jax.lax.scan, nn.LayerNorm, nn.Dense = scan, norm, dense


def shapes(trained: Trained, agents: int, device) -> list:
    """What `train_chunk` is called with for so many agents on a device that need not exist, from
    the same for one agent."""

    def abstract(tree):  # all but the data and the number of updates have an axis of agents
        shape = lambda x: (agents, *x.shape[1:]) if x.ndim and tree is not trained.data else x.shape
        place = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
        return jax.tree.map(lambda x: place(shape(x), x.dtype), jax.tree.map(jnp.asarray, tree))

    return [abstract(tree) for tree in trained.call(1)[1:]]


def measure(name: str, agents: int, variant: str, options: Options) -> dict:
    """A row."""
    row = dict(script=name.split(".")[-1], agents=agents, variant=variant)
    row |= dict(jax=importlib.metadata.version("jax"), device=describe())
    trained = Trained(name, "paper", 1 if options.without_gpu else agents)
    train, flags = trained.script.train_chunk.__wrapped__, FLAGS.get(variant)
    own = lambda *inputs: train(*inputs)  # no trace of another variant is known of it
    trained.train = jax.jit(own, static_argnums=0, donate_argnums=1, compiler_options=flags)
    inputs = trained.call(1)
    if options.without_gpu:
        target = dict(platform="cuda", topology="1x1x1", target_config=H200)
        (device,) = topologies.get_topology_desc(**target).devices
        row["device"] = f"for {device.device_kind}, not run"
        inputs = [trained.args, *shapes(trained, agents, device)]
    with changed(variant):
        compiled = trained.train.lower(*inputs).compile()
        kernels, moved = (x / trained.rounds for x in program(compiled.as_text()))
        row |= dict(kernels=f"{kernels:.0f}", gb=f"{moved / 1e9:.2f}")
        if not options.without_gpu:
            trained.seconds(1)
            ms, _ = measure_chunk(trained, options.seconds)
            row |= dict(ms_update=f"{ms:.3f}", ms_agent_update=f"{ms / agents:.3f}")
    return row


def estimates(rows: list[dict]) -> str:
    """Markdown: what an update of 40 agents would take of the scripts that were not run, in
    proportion to its bytes, by QAM's time; hours of a method in the QAM paper's Table 1."""
    rows = [x for x in rows if (x["agents"], x["variant"]) == ("40", VARIANTS[0])]
    known = [float(x["ms_update"]) for x in rows if x["ms_update"] and x["script"] == "qam"]
    ahead = {x["script"]: float(x["gb"]) for x in rows if not x["ms_update"]}
    run = {x["script"] for x in rows if x["ms_update"]}
    lines = [["script", "GB", "ms per agent-update", "hours"]]
    for script, gb in ahead.items() if known and "qam" in ahead else ():
        ms = known[0] / ahead["qam"] * gb / 40
        if script in OFFLINE and script not in run:
            lines.append([script, f"{gb:g}", f"{ms:.3f}", f"{hours(ms):.0f}"])
    return markdown(lines) if lines[1:] else ""


def main(options: Options) -> None:
    variants = VARIANTS if options.variants == ("all",) else options.variants
    if unknown := set(variants) - set(VARIANTS):
        raise UserError(f"no variant {', '.join(unknown)}; choose from {', '.join(VARIANTS)}")
    if min(options.agents, default=1) < 1:
        raise UserError("--agents must be at least 1")
    groups = dict(all=EVERY, offline=[x for x in EVERY if x.split(".")[-1] in OFFLINE])
    if options.without_gpu:  # what the scripts ask
        jax.default_backend = lambda: "gpu"
    for name in [y for x in options.scripts for y in groups.get(x, [x])]:
        for agents in options.agents:
            for variant in variants:
                row = measure(name, agents, variant, options)
                put_row(Path(options.out), row, KEY, COLUMNS)
    rows = read_rows(Path(options.out))
    print(markdown([COLUMNS, *([row[name] for name in COLUMNS] for row in rows)]), estimates(rows),
          sep="\n\n")  # fmt: skip


if __name__ == "__main__":
    run_program(main, Options, __doc__)
