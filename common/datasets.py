"""The dataset of a run on its devices: one file, or shards that take turns."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from common.dataset_files import identify, locate, read
from common.devices import replicate
from common.environments import resolve
from common.errors import UserError
from common.sampling import Dataset

LARGE = ("puzzle-4x4-play", "cube-quadruple-play")  # the papers use their 100M sets
SWAP_INTERVAL = 1000  # updates between two shards, as in the official code


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

        self._offline_steps = getattr(args, "offline_steps", 0)
        self._sparse = args.sparse
        self._load = load
        self._count = len(paths)
        self._index = 0
        self._data = load(0)
        self._kept = {}  # index -> shard
        self._loading = {}  # index -> future of the shard that is being read
        self._thread = ThreadPoolExecutor(1)
        self.num_transitions, self.action_size = self._data.actions.shape
        self.observation_size = self._data.observations.shape[1]
        self.identity = identify(paths) | dict(observation_size=self.observation_size)
        files = paths[0].name if self._one_file else f"{len(paths)} files like {paths[0].name}"
        print(f"dataset      {files}, {self.num_transitions:,} transitions")
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
        self._index = index
        self._data = fresh

    def relabel(self, transitions: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Labels transitions of the environments like those of the dataset."""
        if self._sparse:
            unsolved = transitions["rewards"] != 0
            transitions["rewards"] = -np.float32(unsolved)
        return transitions
