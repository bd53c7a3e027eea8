"""The dataset of a run on its devices: one file, or shards that take turns."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from common.dataset_files import identify, locate, read
from common.devices import replicate
from common.env_pool import normalize
from common.environments import env_name, make_env, resolve
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

    As in the official code, the next shard (cyclically) takes over just before the batch of every
    1000th update of a phase is drawn. A thread loads it in advance. A device with enough memory
    keeps the shards, so that each is read only once, until an online phase needs the room.
    """

    def __init__(self, args: Any, num_agents: int):
        self._args = args
        self._num_agents = num_agents
        if args.dataset:
            from common.own_data import read_own  # nothing else needs it

            self._paths = [Path(args.dataset)]
            data, self.identity = read_own(args)
        else:
            self._source = resolve(args.env)
            played = env_name(args, args.tasks[0])
            if "?" in played:  # it has arguments: check them before training starts
                make_env(played)
            self._paths = locate(self._source, args.dataset_dir, args.collect)
            self.identity = identify(self._paths)
            data = self._read(0)
            if self._one_file and self._source.dataset in LARGE:
                name = self._paths[0].name
                print(f"Note: published results use the 100M dataset; this run uses {name}.")
        self.normalization = {}  # mean and standard deviation (S,) of the first file, or nothing
        if args.normalize_observations:
            x = data.observations
            exact = np.float64  # sums of a million float32 are not
            self.normalization = dict(
                mean=np.float32(x.mean(0, exact)),
                std=np.float32(x.std(0, exact) + 1e-3),
            )
        self._offline_steps = getattr(args, "offline_steps", 0)
        self._index = 0
        self._data = self._put(data)
        self._kept = {}  # index -> shard
        self._loading = {}  # index -> future of the shard that is being read
        self._thread = ThreadPoolExecutor(1)
        self.num_transitions, self.action_size = self._data.actions.shape
        self.observation_size = self._data.observations.shape[1]
        self.identity["observation_size"] = self.observation_size
        self._describe(data)

    def _describe(self, data: Dataset) -> None:
        """Prints what there is, and what cannot be learned from it."""
        name = self._paths[0].name
        files = name if self._one_file else f"{len(self._paths)} files like {name}"
        print(f"dataset      {files}, {self.num_transitions:,} transitions")
        for task, rewards, masks in zip(self._args.tasks, data.rewards, data.masks):
            if masks.all() and np.ptp(self._label(rewards)) == 0:
                print(f"Note: nothing in {name} solves task {task}: its rewards teach nothing.")
        longest = np.diff(np.flatnonzero(data.terminals), prepend=-1).max()
        if self._args.chunk_length > longest:  # no chunk would be valid: nothing would be learned
            raise UserError(
                f"--chunk-length {self._args.chunk_length} must be at most {longest}, the number "
                f"of transitions of the longest trajectory in {name}"
            )

    @property
    def _one_file(self) -> bool:
        return len(self._paths) == 1

    def _read(self, index: int) -> Dataset:
        return read(self._paths[index], self._source, self._args.tasks, clip=self._one_file)

    def _put(self, data: Dataset) -> Dataset:
        """Puts arrays on the devices, with rewards and observations as the agents see them."""
        data = data.replace(rewards=self._label(data.rewards))
        if self.normalization:
            data = data.replace(observations=normalize(data.observations, **self.normalization))
        return replicate(data, self._num_agents)

    def _load(self, index: int) -> Dataset:
        return self._put(self._read(index))

    def _label(self, rewards: np.ndarray) -> np.ndarray:
        args = self._args
        if args.sparse:  # -1 until all is solved, instead of minus the number of unmet goals
            rewards = -np.float32(rewards != 0)
        if (args.reward_scale, args.reward_shift) != (1, 0):
            rewards = np.float32(args.reward_scale * rewards + args.reward_shift)
        return rewards

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
        index = swaps % len(self._paths)
        if index != self._index:
            self._swap(index, keep=not online and has_room(self._data))
        self._prefetch((index + 1) % len(self._paths))
        return self._data

    def updates_until_swap(self, step: int) -> int:
        """Returns how many offline updates after `step` use the same data."""
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
        return transitions | dict(rewards=self._label(transitions["rewards"]))
