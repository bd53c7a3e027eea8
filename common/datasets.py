"""Finding, reading, checking and labelling OGBench datasets, and their schedule in a run."""

import re
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import jax
import numpy as np
import ogbench.utils
from ogbench.relabel_utils import relabel_dataset

from common.devices import replicate
from common.environments import Source, make_env, resolve
from common.errors import UserError
from common.sampling import Dataset

LARGE = ("puzzle-4x4-play", "cube-quadruple-play")  # the papers use their 100M sets
CACHE = Path(ogbench.utils.DEFAULT_DATASET_DIR).expanduser()
SWAP_INTERVAL = 1000  # updates between two shards, as in the official code
LARGEST_RATIO = 100  # of unpacked to packed bytes; no simulator's data reach it
KEYS = ("observations", "actions", "qpos", "button_states")  # the last one only with buttons
LIMITS = dict(actions=(-1, 1), terminals=(0, 1), button_states=(0, 1))
labelling_env = cache(make_env)  # making one takes as long as labelling a million states
labelling = Lock()  # threads share these environments


def find(source: Source, dataset_dir: str) -> list[Path]:
    """Returns the files of a dataset that are already there.

    These are the sorted shards of a 100M set (only `dataset_dir` may hold them), or the dataset's
    file, or the only one in `dataset_dir` with another name. Without `dataset_dir`, OGBench's cache
    and data/ are searched.
    """
    file = f"{source.dataset}-v0.npz"
    if not dataset_dir:
        return [folder / file for folder in (CACHE, Path("data")) if (folder / file).is_file()][:1]
    folder = Path(dataset_dir).expanduser()
    found = sorted(folder.glob(f"**/{source.dataset}-*.npz"))
    others = [path for path in found if not path.stem.endswith("-val") and path.name != file]
    shards = [path for path in others if re.search(r"-\d+$", path.stem)]
    if shards:
        return shards
    if (folder / file).is_file():
        return [folder / file]
    if len(others) > 1:
        names = "\n  ".join(map(str, others))
        raise UserError(f"no {file} in {folder}, and several other files:\n  {names}")
    return others


def locate(source: Source, dataset_dir: str = "", collect: int = 0) -> list[Path]:
    """Returns the files of a dataset, which is collected or downloaded if it is missing.

    It is collected if `collect` transitions are asked for, or for a point maze. It is downloaded if
    no folder is named.
    """
    paths = find(source, dataset_dir)
    if paths:
        return paths
    folder, file = dataset_dir or "data", f"{source.dataset}-v0.npz"
    try:
        if collect or source.dataset.startswith("pointmaze"):
            from common.collect import collect as collect_dataset

            return [collect_dataset(source.dataset, collect or 200_000, folder)]
        if dataset_dir:
            raise FileNotFoundError("it is not there")
        ogbench.utils.download_datasets([f"{source.dataset}-v0"], CACHE)
        return [CACHE / file]
    except Exception as error:
        raise UserError(
            f"no {file} in {folder} ({error}). Choose one:\n"
            "  pass --dataset-dir FOLDER with OGBench's file or its 100M shards\n"
            f"  put the file into {CACHE}\n"
            "  omit --dataset-dir to download it (needs internet)\n"
            f"  make it: python -m common.collect {source.dataset}, or --collect 1000000"
        ) from None


class BadDataset(UserError):
    """A dataset file that cannot be used."""

    def __init__(self, path: Path, problem: str):
        super().__init__(f"bad dataset {path}: {' '.join(problem.split())[:500]}")


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of an .npz file without unpickling anything."""
    arrays, key = {}, "it"
    try:
        with np.load(path, allow_pickle=False) as file:
            unpacked = sum(part.file_size for part in file.zip.filelist)
            if unpacked > LARGEST_RATIO * Path(path).stat().st_size:
                raise ValueError(f"unpacked it is more than {LARGEST_RATIO} times as large")
            for part in file.zip.filelist:
                key, stream = part.filename.removesuffix(".npy"), file.zip.open(part)
                arrays[key] = np.lib.format.read_array(stream, allow_pickle=False)
                if stream.read(1):  # reading to the end makes zip compare the checksum
                    raise ValueError("it is longer than its array")
    except Exception as error:  # a cut-off zip, pickled objects, no zip at all, ...
        problem = f"{key} is not readable as an .npz file without pickles ({error})"
        raise BadDataset(path, problem) from None
    return arrays


def check_array(path: Path, key: str, x: np.ndarray, num_rows: int) -> None:
    """Raises BadDataset unless an array has finite numbers within its limits, one row a state."""
    axes = 1 if key == "terminals" else 2
    if x.dtype.kind not in "fiub" or x.ndim != axes or len(x) != num_rows:
        expected = f"{num_rows} rows of numbers in {axes} axes"
        raise BadDataset(path, f"'{key}' is {x.dtype} {x.shape}, expected {expected}")
    low, high = np.float64(LIMITS.get(key, (-1e30, 1e30)))
    least, most = x.min(initial=0), x.max(initial=0)  # NaN if any number is
    inside = low - 1e-4 < least <= most < high + 1e-4
    kind = "integers" if low == 0 else "numbers"
    if not inside or (kind == "integers" and (x % 1).any()):
        expected = f"finite {kind} in [{low:g}, {high:g}]"
        raise BadDataset(path, f"'{key}' is in [{least:.4g}, {most:.4g}], expected {expected}")


def check_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Raises BadDataset if the arrays of a file do not have OGBench's layout."""
    missing = {"terminals", *KEYS[:3]} - set(arrays)
    if missing:
        found = sorted(arrays)
        raise BadDataset(path, f"keys {sorted(missing)} are missing, found {found}")
    for key in ("terminals", *KEYS):
        if key in arrays:
            check_array(path, key, arrays[key], arrays["terminals"].size)
    last = arrays["terminals"].astype(bool)
    if last.all() or not last[-1]:
        ends = "1 in the last row and 0 elsewhere except at the ends of trajectories"
        raise BadDataset(path, f"'terminals' must be {ends}")


def label(path: Path, source: Source, task: int, arrays: dict[str, np.ndarray]) -> None:
    """Adds OGBench's `rewards` and `masks` of a task for all M states to the arrays."""
    env = labelling_env(f"{source.env}-singletask-task{task}-v0")
    expected = [env.observation_space.shape[0], env.action_space.shape[0]]
    expected += [env.unwrapped.model.nq, getattr(env.unwrapped, "_num_buttons", 0)]
    widths = [arrays[key].shape[1] if key in arrays else 0 for key in KEYS]
    if widths != expected:
        where = f"expected {expected} for {source.env}"
        raise BadDataset(path, f"{list(KEYS)} have widths {widths}, {where}")
    with labelling:
        relabel_dataset(source.env, env, arrays)


def read(
    path: Path, source: Source, tasks: tuple[int, ...], sparse: bool, clip: bool = True
) -> Dataset:
    """Reads, checks and labels an OGBench file, in NumPy arrays.

    With `sparse`, rewards are -1 until all is solved, instead of minus the number of unmet goals.
    With `clip`, actions are limited to +-(1 - 1e-5), as the official code does except for shards.
    Raises BadDataset, a line that names file, key and expectation.
    """
    arrays = read_arrays(path)
    check_arrays(path, arrays)
    last = arrays["terminals"].astype(bool)
    rows = np.flatnonzero(~last)  # the last state of a trajectory has no transition of its own
    rewards, masks = [], []
    for task in tasks:
        label(path, source, task, arrays)
        reward = arrays["rewards"][rows]
        rewards.append(np.where(reward != 0, -1, 0) if sparse else reward)
        masks.append(arrays["masks"][rows])
    limit = 1 - 1e-5 if clip else np.inf
    return Dataset(
        observations=np.asarray(arrays["observations"], np.float32),
        rows=np.asarray(rows, np.int32),
        actions=np.clip(np.float32(arrays["actions"][rows]), -limit, limit),
        rewards=np.asarray(rewards, np.float32),
        masks=np.asarray(masks, np.float32),
        terminals=np.asarray(last[rows + 1], np.float32),
    )


def identify(paths: list[Path]) -> dict[str, str]:
    """Returns what identifies the content of a dataset: the checksums in its zip directories."""
    checksums = []
    for path in paths:
        with zipfile.ZipFile(path) as archive:
            checksums += [part.CRC for part in archive.infolist()]
    return dict(dataset=f"{zlib.crc32(repr(checksums).encode()):08x}")


def has_room(data: Dataset) -> bool:
    """Returns whether the device can hold two more such datasets with a fifth of its memory left.

    It goes by the largest amount that was ever used. A CPU does not report that, so it has no room.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    free = 0.8 * stats.get("bytes_limit", 0) - stats.get("peak_bytes_in_use", 0)
    return free > 2 * sum(x.nbytes for x in jax.tree.leaves(data))


class OfflineDataset:
    """The dataset of a run on its devices: one file, or shards of a 100M set that take turns.

    The next shard (cyclic) takes over before every 1000th update of a phase is drawn, as in the
    official code. A thread loads it meanwhile. A device with enough room keeps the shards, so that
    each is read once, until an online phase follows, whose replay needs the room.
    """

    def __init__(self, args: Any, num_agents: int):
        source = resolve(args.env)
        paths = locate(source, args.dataset_dir, args.collect)
        if len(paths) == 1 and source.dataset in LARGE:
            print(f"Note: published results use the 100M dataset; this run uses {paths[0].name}.")
        self._one_file = len(paths) == 1

        def load(index):
            data = read(paths[index], source, args.tasks, args.sparse, clip=self._one_file)
            return replicate(data, num_agents)

        self.identity = identify(paths)
        self._offline_steps = getattr(args, "offline_steps", 0)
        self._sparse = args.sparse
        self._load, self._count = load, len(paths)
        self._index, self._data = 0, load(0)
        self._kept, self._loading = {}, {}  # index -> shard; index -> its future
        self._thread = ThreadPoolExecutor(1)
        self.num_transitions, self.action_size = self._data.actions.shape
        self.observation_size = self._data.observations.shape[1]
        longest = np.diff(np.flatnonzero(self._data.terminals), prepend=-1).max()
        if args.chunk_length > longest:  # no chunk would be valid, so nothing would be learned
            raise UserError(
                f"--chunk-length {args.chunk_length} must be at most {longest}, the number of "
                f"transitions of the longest trajectory in {paths[0].name}"
            )

    def at(self, step: int) -> Dataset:
        """Returns the data for the update after `step` steps of the run."""
        if self._one_file:
            return self._data
        online = step >= self._offline_steps
        swaps = (step + 1) // SWAP_INTERVAL
        if online:
            swaps = self._offline_steps // SWAP_INTERVAL
            swaps += (step + 1 - self._offline_steps) // SWAP_INTERVAL
            self._kept.clear()
        index = swaps % self._count
        if index != self._index:
            self._swap(index, keep=not online and has_room(self._data))
        self._prefetch((index + 1) % self._count)
        return self._data

    def updates_until_swap(self, step: int) -> int:
        """Returns for how many offline updates after `step` the data stay."""
        if self._one_file:
            return self._offline_steps - step
        return SWAP_INTERVAL - (step + 1) % SWAP_INTERVAL

    def _prefetch(self, index: int) -> None:
        if index not in self._kept and index not in self._loading:
            self._loading = {index: self._thread.submit(self._load, index)}

    def _swap(self, index: int, keep: bool) -> None:
        jax.block_until_ready(jax.live_arrays())  # or queued chunks keep shards alive
        if keep:
            self._kept[self._index] = self._data
        self._prefetch(index)
        fresh = self._kept.get(index) or self._loading[index].result()
        if jax.tree.map(np.shape, fresh) != jax.tree.map(np.shape, self._data):
            raise UserError(f"bad dataset: shards 0 and {index} have different shapes")
        self._index, self._data = index, fresh

    def relabel(self, transitions: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Labels transitions of the environments like those of the dataset."""
        if self._sparse:
            unsolved = transitions["rewards"] != 0
            transitions["rewards"] = -np.float32(unsolved)
        return transitions
