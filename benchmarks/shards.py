"""What the swapping of shards costs: time of QAM's training, memory of the host.

    python -m benchmarks.shards                 5 shards of 1M transitions, the official schedule

Makes a set of shards of OGBench's format and size in --folder, once: trajectories of a small
collection (`python -m common.collect`), in another order in every shard, so that labels are valid
and files are as hard to inflate as real ones. Then, in one process:

- read: seconds of a shard (wall, and of the processor), alone, for one task and for five; the peak
  of NumPy's and Python's memory meanwhile (tracemalloc). The unit of all memory is a shard: the
  bytes of those of the file's arrays that are used;
- resident: peak of the process's resident memory while small networks are trained on a single file
  and on shards, above that before the data were read (Linux; 0 elsewhere). On a CPU this has the
  device's copies as well: of shards the one that is trained on and the next one;
- train: rounds of an interval of qam.train_chunk on the next shard, begun by `OfflineDataset.at` as
  in a script, and of as many updates on a single file, in turn. A round of shards ends when the
  load that it began is done, so that it has one. Medians over the rounds; ratio and excess (what
  the swap adds to its interval) are those of a round; `wait` is the time in `OfflineDataset.at`.

On a CPU reading takes the time of its threads from the training; seconds of the processor do not
depend on what else the machine does. Another device waits only where reading (one thread) takes
longer than an interval. Writes benchmarks/results/shards.json.
"""

import dataclasses
import gc
import importlib.metadata
import json
import time
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

import qam
from analysis.command_line import run_program
from benchmarks import RESULTS
from benchmarks.learning import VERSIONS
from benchmarks.throughput import describe
from common import datasets
from common.collect.dataset import collect
from common.dataset_files import read
from common.datasets import OfflineDataset
from common.devices import zero_metrics
from common.environments import resolve
from common.sampling import Replay

USED = ("observations", "actions", "terminals", "qpos", "button_states")
OUT = RESULTS / "shards.json"
SET = "set"  # folders of all shards, and of the first one alone
SINGLE = "single"

SIZES = {  # networks and batches of QAM; `medium` has those of a larger run, for a CPU
    "small": dict(hidden_dims=(128, 128), num_critics=2, flow_steps=5, batch_size=128),
    "medium": dict(hidden_dims=(256, 256, 256, 256), num_critics=4, batch_size=64),
}


@dataclasses.dataclass(frozen=True)
class Options:
    env: str = "puzzle-4x4"
    """Environment of the shards, any for which data can be collected."""
    shards: int = 5
    """Number of files."""
    transitions: int = 1_000_000
    """Transitions in each file, as in the official 100M sets."""
    trajectories: int = 20
    """Trajectories that are collected and repeated."""
    sizes: tuple[Literal["small", "medium"], ...] = ("small", "medium")
    """Sizes that are trained, one agent each."""
    interval: int = 1000
    """Updates on a shard. 1000 is the official schedule."""
    rounds: int = 3
    """Rounds of each size, on shards and on a single file."""
    folder: str = "runs/shards"
    """Folder where the set is made."""
    out: str = str(OUT)
    """File of the results."""


def make(options: Options, source) -> list[Path]:
    """Returns the files of the set, and makes those that are missing.

    A folder next to it has the first one alone.
    """
    folder = Path(options.folder)
    (folder / SET).mkdir(parents=True, exist_ok=True)
    paths = [folder / SET / f"{source.dataset}-v0-{i:03d}.npz" for i in range(options.shards)]
    missing = [path for path in paths if not path.exists()]
    if missing:
        collect_shards(folder, paths, missing, options, source)
    single = folder / SINGLE / paths[0].name
    single.parent.mkdir(exist_ok=True)
    single.unlink(missing_ok=True)
    single.hardlink_to(paths[0])
    return paths


def collect_shards(folder: Path, paths: list, missing: list, options: Options, source) -> None:
    """Makes missing files of the set from a small collection."""
    steps = 1000 * options.trajectories
    trajectories = {}
    with np.load(collect(source.dataset, steps, str(folder / "collected"))) as file:
        for key in file.files:
            x = file[key]
            trajectories[key] = x.reshape(-1, 1001, *x.shape[1:])
    for path in missing:
        rng = np.random.default_rng(paths.index(path))
        write_shard(path, trajectories, rng, options.transitions)
        print(f"made {path}", flush=True)


def write_shard(path: Path, trajectories: dict, rng, transitions: int) -> None:
    """Writes a file of trajectories in random order."""
    count = len(trajectories["terminals"])
    order = rng.integers(0, count, transitions // 1000)
    drawn = {}
    for key, x in trajectories.items():
        drawn[key] = x[order].reshape(-1, *x.shape[2:])
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        np.savez_compressed(file, **drawn)
    part.rename(path)


def resident(peak: bool = False) -> int:
    """Returns the resident bytes of this process, or their peak since `reset_peak`.

    It is 0 where that is unknown.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    name = "VmHWM:" if peak else "VmRSS:"
    for line in status.read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    return 0


def reset_peak() -> None:
    """Lets the peak of `resident` begin again."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


class Training:
    """An agent of QAM, trained as main() of qam.py does it."""

    def __init__(self, size: str, dataset: OfflineDataset):
        sizes = dataset.observation_size, dataset.action_size
        self.args = qam.Args(**SIZES[size], action_size=dataset.action_size)
        self.state = qam.create_agents(self.args, [(1, 0)], dataset.observation_size)
        self.replay = Replay.create(1, 0, *sizes)
        self.task = jnp.zeros(1, jnp.int32)
        step = partial(qam.train_step, self.args, dataset.at(0))
        self.metrics = zero_metrics(step, self.state, self.replay, self.task)

    def updates(self, dataset: OfflineDataset, done: int, count: int) -> tuple:
        """Makes `count` updates after `done`.

        Returns seconds in all, seconds in `OfflineDataset.at`, and seconds of the processor, by all
        threads.
        """
        start = time.perf_counter()
        used = time.process_time()
        waited = 0.0
        end = done + count
        while done < end:
            called = time.perf_counter()
            data = dataset.at(done)
            waited += time.perf_counter() - called
            steps = min(dataset.updates_until_swap(done), end - done)
            inputs = self.state, self.metrics, data, self.replay, self.task, steps
            self.state, self.metrics = qam.train_chunk(self.args, *inputs)
            jax.block_until_ready(self.state)
            done += steps
        wait_for_load(dataset)
        return time.perf_counter() - start, waited, time.process_time() - used


def wait_for_load(dataset: OfflineDataset) -> None:
    """Waits until the shard that is being loaded is there."""
    for load in dataset._loading.values():
        load.result()


def reading(path, source, unit, tasks) -> dict:
    """Returns the seconds and the peak memory of `read`."""
    load = partial(read, path, source, tasks, sparse=True, clip=False)
    load()  # The file is in the page cache, and environments are made.
    start = time.perf_counter()
    used = time.thread_time()
    data = load()
    row = dict(seconds=time.perf_counter() - start, cpu_seconds=time.thread_time() - used)
    kept = sum(x.nbytes for x in jax.tree.leaves(data))
    del data
    tracemalloc.start()
    load()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return row | dict(tasks=len(tasks), peak_shards=peak / unit, dataset_shards=kept / unit)


def memory(training, load, unit, options) -> dict:
    """Returns how far resident memory rises during training, on a single file and on shards.

    The unit is a shard.
    """
    peaks = {}
    for name, folder in dict(single=SINGLE, shards=SET).items():
        gc.collect()
        before = resident()
        reset_peak()
        training.updates(load(folder), 0, 2 * options.interval)
        peaks[name] = (resident(peak=True) - before) / unit
    return peaks


def train(training, single, many, options, first) -> dict:
    """Measures rounds on shards, the first of which is number `first` of the schedule, and on a
    single file."""
    n = options.interval
    times = []
    for i in range(options.rounds):
        on_shards = training.updates(many, (first + i) * n - 1, n)
        on_file = training.updates(single, 0, n)
        pair = (on_shards, on_file)
        times.append(pair)
        print(f"shards, file: seconds, wait, CPU seconds {np.round(pair, 2).tolist()}", flush=True)
    (swapped, waited, used), (alone, _, used_alone) = np.transpose(times, (1, 2, 0))
    return dict(
        ms_shards=1e3 * np.median(swapped) / n,
        ms_single=1e3 * np.median(alone) / n,
        cpu_ms_single=1e3 * np.median(used_alone) / n,
        ratio=np.median(swapped / alone),
        cpu_ratio=np.median(used / used_alone),
        excess_seconds=np.median(swapped - alone),
        excess_cpu_seconds=np.median(used - used_alone),
        wait_seconds=np.median(waited),
        rounds=np.round(times, 3).tolist(),
    )


def main(options: Options) -> dict:
    """Makes the set, measures it, prints and writes the results."""
    source = resolve(options.env)
    datasets.SWAP_INTERVAL = options.interval
    paths = make(options, source)
    with np.load(paths[0]) as file:
        unit = sum(file[key].nbytes for key in USED if key in file.files)
    flags = dataclasses.asdict(options)
    del flags["folder"], flags["out"]
    results = dict(
        device=describe(),
        versions={name: importlib.metadata.version(name) for name in VERSIONS},
        options=flags,
        shard_megabytes=unit / 2**20,
        read=[],
        train={},
    )
    for tasks in ((1,), (1, 2, 3, 4, 5)):
        results["read"].append(reading(paths[0], source, unit, tasks))
    print(results["read"], flush=True)

    def load(folder):
        path = Path(options.folder, folder)
        args = qam.Args(env=options.env, dataset_dir=str(path), tasks=(1,), sparse=True)
        return OfflineDataset(args, 1)

    single = load(SINGLE)
    trained = {size: Training(size, single) for size in options.sizes}
    for training in trained.values():
        training.updates(single, 0, 1)  # compiles
    del single
    results["resident_peak_shards"] = memory(trained[options.sizes[0]], load, unit, options)
    print(results["resident_peak_shards"], flush=True)
    single = load(SINGLE)
    many = load(SET)
    many.at(0)
    wait_for_load(many)
    for i, (size, training) in enumerate(trained.items()):
        first = 1 + i * options.rounds
        results["train"][size] = train(training, single, many, options, first)
        path = Path(options.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(size, json.dumps(results["train"][size]), flush=True)
    return results


if __name__ == "__main__":
    run_program(main, Options, __doc__)
