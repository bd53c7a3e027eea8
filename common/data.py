"""OGBench data on the device: names and protocols, finding files, checks, chunk sampling, replay.

Shapes: M stored states, N transitions, S observation size, d action size, H chunk length, A = H d
flattened chunk, B batch, C replay slots.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from common.envs import Source, make_env

CACHE = Path("~/.ogbench/data").expanduser()  # where OGBench keeps its downloads
AUTO_COLLECT = 200_000  # transitions of a point maze, which scripts collect by themselves


def locate(source: Source, dataset_dir: str = "", collect: int = 0) -> list[Path]:
    """The dataset's file, or the sorted shards of a 100M set: in `dataset_dir`, else in OGBench's
    cache, else in data/; else collected (`collect` transitions), else downloaded by OGBench."""
    here, file = Path(dataset_dir or "data"), f"{source.dataset}-v0.npz"
    for folder in [here] if dataset_dir else [CACHE, here]:
        if (folder / file).is_file():
            return [folder / file]
    shards = sorted(here.glob(f"**/{source.dataset}-*.npz")) if dataset_dir else []
    if shards := [path for path in shards if not path.stem.endswith("-val")]:
        return shards
    if collect or source.dataset.startswith("pointmaze"):
        command = [sys.executable, "-m", "common.collect", source.dataset, "--dataset-dir", here]
        command += ["--transitions", str(collect or AUTO_COLLECT)]
        root = str(Path(__file__).resolve().parent.parent)
        if subprocess.run(command, env={**os.environ, "PYTHONPATH": root}).returncode:
            raise SystemExit(f"{source.dataset} could not be collected: see above")
        return [here / file]
    problem = f"no {file} in {here}"
    if not dataset_dir:
        try:
            import ogbench.utils

            ogbench.utils.download_datasets([f"{source.dataset}-v0"], CACHE)
            return [CACHE / file]
        except Exception as error:
            problem = f"no {file} in {CACHE} or {here}/, and its download failed ({error})"
    raise SystemExit(
        f"{problem}. Four ways to provide it: (1) --dataset-dir FOLDER, with OGBench's file or the "
        f"shards of a 100M set; (2) put the file into {CACHE}; (3) let OGBench download it: run "
        "again with a network and without --dataset-dir; (4) make it with OGBench's scripted "
        f"experts (not antmaze, humanoidmaze): python -m common.collect {source.dataset}, or here "
        "--collect 1000000"
    )


@flax.struct.dataclass
class Dataset:
    """One copy of the data, shared by all agents. There are no next observations: transition k
    leads from observations[rows[k]] to observations[rows[k] + 1]."""

    observations: jax.Array  # (M, S), the last state of every trajectory included
    rows: jax.Array  # (N,) int32
    actions: jax.Array  # (N, d)
    rewards: jax.Array  # (tasks, N), of the state before the action, as OGBench labels them
    masks: jax.Array  # (tasks, N), 0 where that state solves the task
    terminals: jax.Array  # (N,), 1 on the last transition of a trajectory (not on success)


def read(path: Path, source: Source, tasks, sparse: bool, clip: bool = True) -> Dataset:
    """Reads one OGBench file (no pickle is executed), checks it, and labels it for `tasks` with
    OGBench's own relabelling -> NumPy arrays. Exits with a line that names file, key and what was
    expected. `sparse`: reward -1 unless the task is solved, in place of -(number of unmet goals).
    `clip`: actions to +-(1 - 1e-5), as the official loader does for all files but shards."""
    from ogbench.relabel_utils import relabel_dataset

    def bad(problem):
        raise SystemExit(f"bad dataset {path}: {problem}")

    try:
        with np.load(path, allow_pickle=False) as file:
            raw = {key: file[key] for key in file.files}
    except Exception as error:  # a cut-off zip, pickled objects, no zip at all, ...
        bad(f"not readable as an .npz file without pickles ({error})")
    for key in ("terminals", "observations", "actions", "qpos"):
        if key not in raw:
            bad(f"key '{key}' is missing, found {sorted(raw)}")
        axes, rows = (1 if key == "terminals" else 2), len(np.atleast_1d(raw["terminals"]))
        if raw[key].dtype.kind not in "fiub" or raw[key].ndim != axes or len(raw[key]) != rows:
            found = f"{raw[key].dtype} of shape {raw[key].shape}"
            bad(f"'{key}' is {found}, expected numbers with {axes} axes and {rows} rows")
        if not np.isfinite(raw[key]).all():
            bad(f"'{key}' contains NaN or infinity, expected finite numbers")
    if np.abs(raw["actions"]).max(initial=0) > 1 + 1e-4:
        bad(f"'actions' reach {np.abs(raw['actions']).max():.4g}, expected [-1, 1]")
    last = raw["terminals"].astype(bool)
    rows = np.flatnonzero(~last)  # the last state of a trajectory has no transition of its own
    if not len(rows) or not last[-1]:
        bad("'terminals' must be 1 in the last row and 0 elsewhere but at the ends of trajectories")
    info = {key: raw[key][rows] for key in ("qpos", "button_states") if key in raw}
    rewards, masks, sizes = [], [], (raw["observations"].shape[1:], raw["actions"].shape[1:])
    for task in tasks:
        env = make_env(f"{source.env}-singletask-task{task}-v0")
        if sizes != (expected := (env.observation_space.shape, env.action_space.shape)):
            bad(f"'observations' and 'actions' have sizes {sizes}, {source.env} has {expected}")
        relabel_dataset(source.env, env, info)
        rewards.append(np.where(info["rewards"] != 0, -1, 0) if sparse else info["rewards"])
        masks.append(info["masks"])
    limit = 1 - 1e-5 if clip else np.inf
    actions = np.clip(np.float32(raw["actions"][rows]), -limit, limit)
    arrays = raw["observations"], rows, actions, rewards, masks, last[rows + 1]
    return Dataset(*(np.asarray(x, np.int32 if x is rows else np.float32) for x in arrays))


class Shards:
    """The dataset on the official schedule: one file, or shards of a 100M set, of which the next
    one (cyclic) takes over before every `interval`-th update of a phase is drawn."""

    def __init__(self, paths, source, tasks, sparse, interval=1000):
        load = lambda i: jax.device_put(read(paths[i], source, tasks, sparse, len(paths) == 1))
        self.interval, self._load, self._count = interval, load, len(paths)
        self._index, self._data, self._next = 0, load(0), (0, None)
        self._thread = ThreadPoolExecutor(1)

    def at(self, step: int, swaps: int = 0) -> tuple[Dataset, int]:
        """The data for update `step` (from 1; `swaps`: those of earlier phases), and for how many
        updates from there on they stay. The following shard is loaded meanwhile."""
        if self._count == 1:
            return self._data, sys.maxsize
        index = (swaps + step // self.interval) % self._count
        if index != self._index:
            fresh = self._next[1].result() if self._next[0] == index else self._load(index)
            if jax.tree.map(jnp.shape, fresh) != jax.tree.map(jnp.shape, self._data):
                raise SystemExit(f"bad dataset: shards 0 and {index} have different shapes")
            self._index, self._data = index, fresh
        if self._next[0] != (after := (index + 1) % self._count):
            self._next = after, self._thread.submit(self._load, after)
        return self._data, self.interval - step % self.interval


@flax.struct.dataclass
class Replay:
    """Transitions of each agent's own environment, of which the first `size` are there."""

    observations: jax.Array  # (N, C, S); here N is the number of agents
    next_observations: jax.Array  # (N, C, S)
    actions: jax.Array  # (N, C, d)
    rewards: jax.Array  # (N, C)
    masks: jax.Array  # (N, C), 1 - terminated: a time limit still bootstraps
    terminals: jax.Array  # (N, C), terminated or truncated
    size: jax.Array  # (N,) int32

    @classmethod
    def create(cls, agents: int, capacity: int, data: Dataset) -> "Replay":
        """An empty replay for transitions of the sizes in `data`."""
        widths = [data.observations.shape[-1:]] * 2 + [data.actions.shape[-1:]] + [()] * 3
        slots = [jnp.zeros((agents, capacity, *width)) for width in widths]
        return cls(*slots, size=jnp.zeros(agents, jnp.int32))

    def append(self, rows) -> "Replay":
        """Adds the rows of another `Replay`, or what `EnvPool.step` returns (a row per agent)."""
        names = [name for name in self.__dataclass_fields__ if name != "size"]
        if isinstance(rows, dict):
            new = [rows[name][:, None] for name in names]
        else:
            new = [getattr(rows, name) for name in names]
        slots = _write([getattr(self, name) for name in names], new, self.size[0])
        return Replay(*slots, size=self.size + new[0].shape[1])

    def filled(self) -> "Replay":
        """Without the slots that are still empty."""
        size = int(self.size[0])
        return jax.tree.map(lambda x: x[:, :size] if x.ndim > 1 else x, self)


@partial(jax.jit, donate_argnums=0)
def _write(slots, new, start):
    put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
    return [put(x, y) for x, y in zip(slots, new)]


class Batch(NamedTuple):
    """Chunks of H steps, see `sample`."""

    observations: jax.Array  # (B, S), at the start of the chunk
    actions: jax.Array  # (B, A), time-major: a_0, ..., a_{H-1}
    rewards: jax.Array  # (B,), discounted sum over the chunk
    masks: jax.Array  # (B,), 0 if the task was solved in the chunk
    next_observations: jax.Array  # (B, S), at the end of the chunk
    valid: jax.Array  # (B,), 0 if the trajectory ends before the chunk's last step


def sample(key, data: Dataset, replay: Replay, task, batch_size, chunk_length, discount) -> Batch:
    """Chunks drawn uniformly from the dataset followed by the replay (of one agent), exactly as
    the official sampler draws them. `task`: the agent's row of rewards. The key is consumed.

    Invalid chunks stay in the batch: their actions run on into the following trajectory, while
    reward, mask and next observation stop at the end of their own."""
    N, slots = len(data.rows), len(replay.rewards)
    start = jax.random.randint(key, (batch_size,), 0, N + replay.size - chunk_length + 1)
    k = start[:, None] + jnp.arange(chunk_length)  # (B, H)

    def pick(offline, online, k):
        old = offline(jnp.minimum(k, N - 1))
        if not slots:
            return old
        new = online[jnp.clip(k - N, 0, slots - 1)]
        return jnp.where((k >= N).reshape(k.shape + (1,) * (new.ndim - k.ndim)), new, old)

    terminals = pick(lambda k: data.terminals[k], replay.terminals, k)
    valid = (jnp.cumsum(terminals, axis=1) == terminals).astype(jnp.float32)  # (B, H): not over yet
    last = start + valid.sum(1).astype(jnp.int32) - 1
    rewards = pick(lambda k: data.rewards[task, k], replay.rewards, k)
    masks = pick(lambda k: data.masks[task, k], replay.masks, k)
    states, rows = data.observations, data.rows
    return Batch(
        observations=pick(lambda k: states[rows[k]], replay.observations, start),
        actions=pick(lambda k: data.actions[k], replay.actions, k).reshape(batch_size, -1),
        rewards=(discount ** jnp.arange(chunk_length) * rewards * valid).sum(1),
        masks=jnp.where(valid == 1, masks, 1).min(1),
        next_observations=pick(lambda k: states[rows[k] + 1], replay.next_observations, last),
        valid=valid[:, -1],
    )
