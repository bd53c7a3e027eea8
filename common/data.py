"""OGBench data on the device: finding, checking, sampling chunks, replay. M stored states, N
transitions, S observation size, d action size, H chunk length, A = H d, B batch, C slots."""

import re
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from threading import Lock

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import ogbench.utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ogbench.relabel_utils import relabel_dataset

from common.envs import Source, make_env

LARGE = "puzzle-4x4-play", "cube-quadruple-play"  # of which the papers use the 100M sets
CACHE = Path(ogbench.utils.DEFAULT_DATASET_DIR).expanduser()
labelling_env = cache(make_env)  # making one takes as long as labelling a million states
labelling = Lock()  # one thread at a time: they share these environments


def locate(source: Source, dataset_dir: str = "", collect: int = 0) -> list[Path]:
    """The sorted shards of a 100M set (`dataset_dir` alone may hold them), or the dataset's file:
    there (the only one of another name, too) or, if no folder is named, in OGBench's cache or
    data/; else collected (if asked to, or a point maze); else, without a folder, downloaded."""
    here, file = Path(dataset_dir or "data").expanduser(), f"{source.dataset}-v0.npz"
    found = sorted(here.glob(f"**/{source.dataset}-*.npz")) if dataset_dir else []
    others = [path for path in found if not path.stem.endswith("-val") and path.name != file]
    if shards := [path for path in others if re.search(r"-\d+$", path.stem)]:
        return shards
    for folder in [here] if dataset_dir else [CACHE, here]:
        if (folder / file).is_file():
            return [folder / file]
    if len(others) == 1:
        return others
    try:
        if collect or source.dataset.startswith("pointmaze"):
            import common.collect

            return [common.collect.collect(source.dataset, collect or 200_000, str(here))]
        if dataset_dir:
            raise OSError(f"but {', '.join(map(str, found))}" if found else "nor any other")
        ogbench.utils.download_datasets([f"{source.dataset}-v0"], CACHE)
        return [CACHE / file]
    except KeyboardInterrupt:
        raise SystemExit("Stopped; run the same command again to continue.") from None
    except Exception as e:
        raise SystemExit(
            f"no {file} in {here} ({e}). Provide it: (1) --dataset-dir FOLDER with OGBench's file "
            f"or 100M shards; (2) put it into {CACHE}; (3) download it: have a network, no folder; "
            f"(4) make it: python -m common.collect {source.dataset} or --collect 1000000"
        ) from None


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
    """Reads, checks and labels an OGBench file (executing no pickle) -> NumPy arrays. Exits with a
    line that names file, key and expectation. `sparse`: reward -1 until all is solved, instead of
    -(unmet goals). `clip`: actions to +-(1 - 1e-5), officially done for all files but shards."""
    raw, key = {}, "it"

    def bad(problem):
        raise SystemExit(f"bad dataset {path}: {' '.join(problem.split())[:500]}")

    try:
        with np.load(path, allow_pickle=False) as file:
            if sum(part.file_size for part in file.zip.filelist) > 100 * Path(path).stat().st_size:
                bad("unpacked it is more than 100 times as large, which no simulator's data are")
            for part in file.zip.filelist:
                key, stream = part.filename.removesuffix(".npy"), file.zip.open(part)
                raw[key] = np.lib.format.read_array(stream, allow_pickle=False)
                if stream.read(1):  # else all was read, and zip has compared the checksum
                    raise ValueError("it is longer than its array")
    except Exception as error:  # a cut-off zip, pickled objects, no zip at all, ...
        bad(f"{key} is not readable as an .npz file without pickles ({error})")
    keys = ["observations", "actions", "qpos", "button_states"]
    limits = dict(actions=(-1, 1), terminals=(0, 1), button_states=(0, 1))
    if missing := {"terminals", *keys[:3]} - set(raw):
        bad(f"keys {sorted(missing)} are missing, found {sorted(raw)}")
    for key in ["terminals", *keys[: 3 + ("button_states" in raw)]]:
        x, axes, rows = raw[key], 1 if key == "terminals" else 2, raw["terminals"].size
        if x.dtype.kind not in "fiub" or x.ndim != axes or len(x) != rows:
            bad(f"'{key}' is {x.dtype} {x.shape}, expected {rows} rows of numbers in {axes} axes")
        low, top = np.float64(limits.get(key, (-1e30, 1e30)))  # also where x is of few bits
        least, most = x.min(initial=0), x.max(initial=0)  # without a copy of x
        if not low - 1e-4 < least <= most < top + 1e-4 or low == 0 and (x % 1).any():
            kind = "integers" if low == 0 else "numbers"
            expected = f"finite {kind} in [{low:g}, {top:g}]"
            bad(f"'{key}' is in [{least:.4g}, {most:.4g}], expected {expected}")
    last = raw["terminals"].astype(bool)
    rows = np.flatnonzero(~last)  # the last state of a trajectory has no transition of its own
    if not len(rows) or not last[-1]:
        bad("'terminals' must be 1 in the last row and 0 elsewhere but at the ends of trajectories")
    rewards, masks, widths = [], [], [raw[k].shape[1] if k in raw else 0 for k in keys]
    for task in tasks:
        env = labelling_env(f"{source.env}-singletask-task{task}-v0")
        expected = [env.observation_space.shape[0], env.action_space.shape[0]]
        expected += [env.unwrapped.model.nq, getattr(env.unwrapped, "_num_buttons", 0)]
        if widths != expected:
            bad(f"{keys} have widths {widths}, expected {expected} for {source.env}")
        with labelling:
            relabel_dataset(source.env, env, raw)  # adds the labels of all M states
        reward = raw["rewards"][rows]
        rewards.append(np.where(reward != 0, -1, 0) if sparse else reward)
        masks.append(raw["masks"][rows])
    limit = 1 - 1e-5 if clip else np.inf
    actions = np.clip(np.float32(raw["actions"][rows]), -limit, limit)
    arrays = raw["observations"], rows, actions, rewards, masks, last[rows + 1]
    return Dataset(*(np.asarray(x, np.int32 if x is rows else np.float32) for x in arrays))


def spread(tree, agents: int = 0):
    """Puts arrays (agents, ...) on the devices of this process, to each an equal share of the
    agents: on one device, if no number of them divides the agents. With `agents`, the whole of all
    arrays to each of the devices that so many agents are spread over. Agents do not depend on one
    another, so programs of spread arrays run without any exchange between devices."""
    devices, split = jax.local_devices(), () if agents else ("agents",)
    agents = agents or len(next(iter(jax.tree.leaves(tree)), ()))
    count = max(n for n in range(1, len(devices) + 1) if agents % n == 0)
    mesh = Mesh(np.array(devices[:count]), ("agents",))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*split)) if count > 1 else None)


def over_agents(one, chunk=False):
    """`jax.vmap(one)` over arrays (agents, ...). For a single agent without the axis, which makes
    most scripts' updates slower on a CPU, QAM's by a fifth. If `one` is a `chunk` of many updates,
    a CPU makes those of one agent after those of the other, whose networks its caches keep."""

    def each(*inputs):
        if len(jax.tree.leaves(inputs)[0]) == 1:
            return jax.tree.map(lambda x: x[None], one(*jax.tree.map(lambda x: x[0], inputs)))
        if chunk and jax.default_backend() == "cpu" and jax.local_device_count() == 1:
            return jax.lax.map(lambda x: one(*x), inputs)
        return jax.vmap(one)(*inputs)

    return each


def roomy(data: Dataset) -> bool:
    """Whether the device holds two more such datasets and still keeps a fifth of its memory, by the
    most that was ever used of it. A CPU does not say, so it has no room."""
    stats = jax.local_devices()[0].memory_stats() or {}
    limit, peak = (stats.get(name, 0) for name in ("bytes_limit", "peak_bytes_in_use"))
    return 0.8 * limit - peak > 2 * sum(x.nbytes for x in jax.tree.leaves(data))


class Shards:
    """The dataset on the official schedule: one file, or shards of a 100M set, of which the next
    one (cyclic) takes over before every `interval`-th update of a phase is drawn. A copy is on each
    of the devices that `agents` are spread over. A device that has room keeps the shards, so that
    each is read once, until an online phase follows, whose replay needs the room."""

    def __init__(self, paths, source, tasks, sparse, chunk_length, agents=1, interval=1000):
        if len(paths) == 1 and source.dataset in LARGE:
            print(f"published numbers of {source.env} are on its 100M set, this is {paths[0].name}")
        load = lambda i: spread(read(paths[i], source, tasks, sparse, len(paths) == 1), agents)
        self.interval, self._load, self._count = interval, load, len(paths)
        self._index, self._data, self._next, self._kept = 0, load(0), (None, None), {}
        self._thread = ThreadPoolExecutor(1)
        longest = np.diff(np.flatnonzero(self._data.terminals), prepend=-1).max()
        if chunk_length > longest:  # no chunk would be valid, and nothing be learned
            raise SystemExit(
                f"--chunk-length {chunk_length}: the longest trajectory of {paths[0].name} has "
                f"{longest} transitions"
            )

    def at(self, step: int, swaps: int = 0) -> tuple[Dataset, int]:
        """The data for update `step` (from 1; `swaps`: those of earlier phases), and for how many
        updates from there on they stay. The following shard is loaded meanwhile."""
        if self._count == 1:
            return self._data, 2**31
        index = (swaps + step // self.interval) % self._count
        if swaps:
            self._kept.clear()
        if index != self._index:
            jax.block_until_ready(jax.live_arrays())  # a loop ahead of its device piles up shards
            if not swaps and roomy(self._data):
                self._kept[self._index] = self._data
            if index not in self._kept and self._next[0] != index:  # a jump: by the thread, too
                self._next = index, self._thread.submit(self._load, index)
            fresh = self._kept[index] if index in self._kept else self._next[1].result()
            if jax.tree.map(jnp.shape, fresh) != jax.tree.map(jnp.shape, self._data):
                raise SystemExit(f"bad dataset: shards 0 and {index} have different shapes")
            self._index, self._data = index, fresh
        after = (index + 1) % self._count
        if after not in self._kept and self._next[0] != after:
            self._next = after, self._thread.submit(self._load, after)
        return self._data, self.interval - step % self.interval


@flax.struct.dataclass
class Replay:
    """Transitions of each agent's own environment: `size` so far, the oldest are overwritten."""

    observations: jax.Array  # (N, C, S); here N is the number of agents
    next_observations: jax.Array  # (N, C, S)
    actions: jax.Array  # (N, C, d)
    rewards: jax.Array  # (N, C)
    masks: jax.Array  # (N, C), 1 - terminated: a time limit still bootstraps
    terminals: jax.Array  # (N, C), terminated or truncated
    size: jax.Array  # (N,) int32

    @classmethod
    def create(cls, agents: int, capacity: int, data) -> "Replay":
        """An empty replay for data.observations and data.actions, arrays or gymnasium's spaces."""
        widths = [data.observations.shape[-1:]] * 2 + [data.actions.shape[-1:]] + [()] * 3
        slots = [jnp.zeros((agents, capacity, *width)) for width in widths]
        return cls(*slots, size=jnp.zeros(agents, jnp.int32))

    def since(self, start: int) -> dict:
        """The transitions from number `start` on that are still there, the oldest first: name of
        the field -> (N, n, ...) in NumPy."""
        size, slots = int(self.size[0]), self.rewards.shape[1]
        k = np.arange(max(start, size - slots), size) % max(slots, 1)
        return {name: np.asarray(x[:, k]) for name, x in vars(self).items() if name != "size"}

    def refilled(self, slots: int, parts) -> "Replay":
        """Another one, in NumPy, of so many slots, with what is in `parts`: (number of transitions
        at its end, rows from `since`) in turn. ValueError where one does not follow the other."""
        full = lambda x: np.zeros((len(x), slots, *x.shape[2:])[: x.ndim], x.dtype)
        replay, size = jax.tree.map(full, self), None
        for end, rows in parts:
            start = end - rows["rewards"].shape[1]
            if size not in (None, start):
                raise ValueError(f"its replay has a gap between {size} and {start}")
            at, size = start % slots, end
            for name, x in rows.items():  # up to the ring's end, and on from its beginning
                vars(replay)[name][:, at : at + end - start] = x[:, : slots - at]
                vars(replay)[name][:, : max(0, at + end - start - slots)] = x[:, slots - at :]
        return replay.replace(size=np.full_like(replay.size, size or 0))

    @partial(jax.jit, donate_argnums=0)
    def append(self, rows: dict) -> "Replay":
        """Adds `rows`: name of the field -> (N, n, ...), in one piece (n divides the capacity)."""
        start = self.size[0] % self.rewards.shape[1]
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        slots = {name: put(old, rows[name]) for name, old in vars(self).items() if name != "size"}
        return Replay(**slots, size=self.size + rows["rewards"].shape[1])


Batch = namedtuple("Batch", "observations actions rewards masks next_observations valid")


def sample(key, data: Dataset, replay: Replay, task, batch_size, chunk_length, discount) -> Batch:
    """Chunks of H steps, uniform over the dataset followed by the replay (of one agent), exactly as
    the official sampler draws them. `task`: the agent's row of rewards. The key is consumed. ->
    observations (B, S) at the start; actions (B, A), a_0, ..., a_{H-1}; rewards (B,), their
    discounted sum; masks (B,), 0 if the task was solved on the way; next_observations (B, S) after
    the last step; valid (B,), 0 if the trajectory ends before the last step. Then the actions run
    on into the following trajectory, while everything else stops at the end of its own."""
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
