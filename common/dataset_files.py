"""Finding, reading, checking and labelling the files of OGBench datasets."""

import os
import re
import zipfile
import zlib
from functools import cache
from pathlib import Path
from threading import Lock

import numpy as np
import ogbench.utils
from ogbench.relabel_utils import relabel_dataset

from common.environments import Source, make_env, without_warnings
from common.errors import UserError, in_a_line
from common.sampling import Dataset

CACHE = Path(os.path.expanduser(ogbench.utils.DEFAULT_DATASET_DIR))  # Path fails without a home
LARGEST_RATIO = 100  # of unpacked to packed bytes; no simulator's data reach it
KEYS = ("observations", "actions", "qpos", "button_states")  # the last one only with buttons
VECTORS = ("terminals", "timeouts", "rewards")  # the others have two axes
LIMITS = dict.fromkeys(("terminals", "timeouts", "button_states"), (0, 1))
LARGEST = 1e30  # numbers beyond this are refused
# Keys that OGBench's files do not have: they say that rewards and ends are the file's own.
OWN_KEYS = {"rewards", "timeouts", "truncations", "terminations", "next_observations"}
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
        candidates = [CACHE / file, Path("data") / file]
        return [path for path in candidates if path.is_file()][:1]
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
    folder = dataset_dir or "data"
    file = f"{source.dataset}-v0.npz"
    try:
        if collect or source.dataset.startswith("pointmaze"):
            from common.collect import dataset

            return [dataset.collect(source.dataset, collect or 200_000, folder)]
        if dataset_dir:
            found = sorted(path.name for path in Path(folder).expanduser().glob("*.npz"))
            raise FileNotFoundError(f"only {', '.join(found)}" if found else "it is not there")
        ogbench.utils.download_datasets([f"{source.dataset}-v0"], CACHE)
        return [CACHE / file]
    except Exception as error:
        raise UserError(
            f"no {file} in {folder} ({error}). Choose one:\n"
            "  pass --dataset-dir FOLDER with OGBench's file or its 100M shards\n"
            f"  put the file into {CACHE}\n"
            "  run without --dataset-dir where there is internet: it is downloaded\n"
            f"  make it: python -m common.collect {source.dataset}, or --collect 1000000"
        ) from None


class BadDataset(UserError):
    """A dataset file that cannot be used."""

    def __init__(self, path: Path, problem: str):
        super().__init__(f"bad dataset {path}: {in_a_line(problem, most=500)}")


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of an .npz file without unpickling anything."""
    arrays = {}
    key = "it"
    try:
        with np.load(path, allow_pickle=False) as file:
            unpacked = sum(part.file_size for part in file.zip.filelist)
            if unpacked > LARGEST_RATIO * Path(path).stat().st_size:
                raise ValueError(f"unpacked it is more than {LARGEST_RATIO} times as large")
            for part in file.zip.filelist:
                key = part.filename.removesuffix(".npy")
                stream = file.zip.open(part)
                arrays[key] = np.lib.format.read_array(stream, allow_pickle=False)
                if stream.read(1):  # reading to the end makes zip compare the checksum
                    raise ValueError("it is longer than its array")
    except Exception as error:  # a cut-off zip, pickled objects, no zip at all, ...
        problem = f"{key} is not readable as an .npz file without pickles ({error})"
        raise BadDataset(path, problem) from None
    return arrays


def check_array(
    path: Path, key: str, x: np.ndarray, num_rows: int, limits: tuple = (-LARGEST, LARGEST)
) -> None:
    """Raises BadDataset unless an array has finite numbers within its limits, one row a state."""
    axes = 1 if key in VECTORS else 2
    if x.dtype.kind not in "fiub" or x.ndim != axes or len(x) != num_rows:
        expected = f"{num_rows} rows of numbers in {axes} axes"
        raise BadDataset(path, f"'{key}' is {x.dtype} {x.shape}, expected {expected}")
    low, high = np.float64(LIMITS.get(key, limits))
    least = x.min(initial=0)  # NaN if any number is
    most = x.max(initial=0)
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
    own = sorted(OWN_KEYS & set(arrays))
    if own:
        advice = "use the file's own rewards and ends with --dataset, or remove the keys"
        raise BadDataset(path, f"keys {own} are not OGBench's: {advice}")
    for key in ("terminals", *KEYS):
        if key in arrays:
            limits = (-1, 1) if key == "actions" else (-LARGEST, LARGEST)
            check_array(path, key, arrays[key], arrays["terminals"].size, limits)
    last = arrays["terminals"].astype(bool)
    if last.all() or not last[-1]:
        ends = "1 in the last row and 0 elsewhere except at the ends of trajectories"
        raise BadDataset(path, f"'terminals' must be {ends}")


def label(path: Path, source: Source, task: int, arrays: dict[str, np.ndarray]) -> None:
    """Adds OGBench's `rewards` and `masks` of a task for all M states to the arrays."""
    env = labelling_env(f"{source.env}-singletask-task{task}-v0")
    with without_warnings():
        expected = [env.observation_space.shape[0], env.action_space.shape[0]]
    expected += [env.unwrapped.model.nq, getattr(env.unwrapped, "_num_buttons", 0)]
    widths = [0, 0, 0, 0]
    for i, key in enumerate(KEYS):
        if key in arrays:
            widths[i] = arrays[key].shape[1]
    if widths != expected:
        where = f"expected {expected} for {source.env}"
        raise BadDataset(path, f"{list(KEYS)} have widths {widths}, {where}")
    with labelling, without_warnings():
        relabel_dataset(source.env, env, arrays)


def read(path: Path, source: Source, tasks: tuple[int, ...], clip: bool = True) -> Dataset:
    """Reads, checks and labels an OGBench file, in NumPy arrays.

    Rewards are minus the number of unmet goals. With `clip`, actions are limited to +-(1 - 1e-5),
    as the official code does except for shards. Raises BadDataset, whose line names the file, the
    key and what was expected.
    """
    arrays = read_arrays(path)
    check_arrays(path, arrays)
    last = arrays["terminals"].astype(bool)
    rows = np.flatnonzero(~last)  # the last state of a trajectory has no transition of its own
    rewards = []
    masks = []
    for task in tasks:
        label(path, source, task, arrays)
        rewards.append(arrays["rewards"][rows])
        masks.append(arrays["masks"][rows])
    limit = 1 - 1e-5 if clip else np.inf
    return Dataset(
        observations=np.float32(arrays["observations"]),
        rows=np.int32(rows),
        actions=np.clip(np.float32(arrays["actions"][rows]), -limit, limit),
        rewards=np.float32(rewards),
        masks=np.float32(masks),
        terminals=np.float32(last[rows + 1]),
    )


def identify(paths: list[Path]) -> dict[str, str]:
    """Returns what identifies the content of a dataset: the checksums in its zip directories."""
    checksums = []
    for path in paths:
        try:
            with zipfile.ZipFile(path) as archive:
                checksums += [part.CRC for part in archive.infolist()]
        except Exception as error:  # as in `read_arrays`
            raise BadDataset(path, f"it is not readable as an .npz file ({error})") from None
    return dict(checksum=f"{zlib.crc32(repr(checksums).encode()):08x}")
