"""The dataset, the replay buffer and batches on the device, and the drawing of chunks.

M states and T transitions of the dataset, S observation size, d action size, H chunk length,
A = H d, B batch, C capacity of the replay.
"""

from functools import partial
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from common.devices import shard_over_agents


@flax.struct.dataclass
class Dataset:
    """One copy of the data, shared by all agents.

    Next observations are not stored: transition k leads from observations[rows[k]] to
    observations[rows[k] + 1].
    """

    observations: Array  # (M, S), the last state of every trajectory included
    rows: Array  # (T,) int32
    actions: Array  # (T, d)
    rewards: Array  # (tasks, T), of the state before the action, as OGBench labels them
    masks: Array  # (tasks, T), 0 where that state solves the task
    terminals: Array  # (T,), 1 on the last transition of a trajectory (not on success)


@flax.struct.dataclass
class Replay:
    """Transitions of each agent's own environment; the oldest are overwritten."""

    observations: Array  # (agents, C, S)
    next_observations: Array  # (agents, C, S)
    actions: Array  # (agents, C, d)
    rewards: Array  # (agents, C)
    masks: Array  # (agents, C), 1 - terminated: a time limit still bootstraps
    terminals: Array  # (agents, C), terminated or truncated
    size: Array  # (agents,) int32, number of transitions ever appended

    @classmethod
    def create(
        cls, num_agents: int, capacity: int, observation_size: int, action_size: int
    ) -> "Replay":
        """Returns an empty replay, spread over the devices of the agents."""
        shape = num_agents, capacity
        replay = cls(
            observations=jnp.zeros((*shape, observation_size)),
            next_observations=jnp.zeros((*shape, observation_size)),
            actions=jnp.zeros((*shape, action_size)),
            rewards=jnp.zeros(shape),
            masks=jnp.zeros(shape),
            terminals=jnp.zeros(shape),
            size=jnp.zeros(num_agents, jnp.int32),
        )
        return shard_over_agents(replay)

    @partial(jax.jit, donate_argnums=0)
    def append(self, transitions: dict[str, Array]) -> "Replay":
        """Adds arrays (agents, n, ...) in one piece; n divides the capacity."""
        start = self.size[0] % self.rewards.shape[1]
        columns = dict(size=self.size + transitions["rewards"].shape[1])
        for name, old in vars(self).items():  # in a fixed order, or each process compiles it again
            if name != "size":
                columns[name] = jax.lax.dynamic_update_slice_in_dim(
                    old, transitions[name], start, axis=1
                )
        return Replay(**columns)

    def since(self, start: int) -> dict[str, np.ndarray]:
        """Returns the transitions from number `start` on that are still there, oldest first, as
        arrays (agents, n, ...)."""
        size = int(self.size[0])
        capacity = self.rewards.shape[1]
        slots = np.arange(max(start, size - capacity), size) % max(capacity, 1)
        columns = dict(vars(self))
        del columns["size"]
        return {name: np.asarray(x[:, slots]) for name, x in columns.items()}

    def refill(self, transitions: dict[str, np.ndarray]) -> "Replay":
        """Puts back what `since` returned; `transitions` also has the `size` at that time."""
        if not transitions:
            return self
        size = int(transitions["size"])
        capacity = self.rewards.shape[1]
        found = transitions["rewards"].shape[1]
        count = min(found, capacity)
        slots = np.arange(size - count, size) % max(capacity, 1)
        columns = dict(size=jnp.full_like(self.size, size))
        for name in transitions.keys() - columns.keys():
            latest = transitions[name][:, found - count :]
            columns[name] = getattr(self, name).at[:, slots].set(latest)
        return Replay(**columns)


class Batch(NamedTuple):
    """Chunks of H steps of one agent."""

    observations: Array  # (B, S), at the start
    actions: Array  # (B, A), a_0, ..., a_{H-1}
    rewards: Array  # (B,), their discounted sum
    masks: Array  # (B,), 0 if the task was solved on the way
    next_observations: Array  # (B, S), after the last step
    valid: Array  # (B,), 0 if the trajectory ends before the last step


def sample(
    key: Array,
    data: Dataset,
    replay: Replay,
    task_row: Array,
    batch_size: int,
    chunk_length: int,
    discount: float,
) -> Batch:
    """Draws chunks uniformly from the dataset followed by one agent's replay.

    They are drawn exactly as the official sampler draws them. The key is consumed; `task_row` is
    the agent's row of data.rewards. If a trajectory ends inside a chunk, `valid` is 0; rewards,
    masks and next_observations stop at its end, but the actions run on into the next trajectory.
    """
    offline_size = len(data.rows)
    capacity = len(replay.rewards)
    last_start = offline_size + replay.size - chunk_length
    start = jax.random.randint(key, (batch_size,), 0, last_start + 1)
    k = start[:, None] + jnp.arange(chunk_length)  # (B, H) transitions

    def pick(from_data, replayed, k):
        """Takes the values of transitions k: from_data(k), or those of the replay from T on."""
        values = from_data(jnp.minimum(k, offline_size - 1))
        if capacity == 0:
            return values
        slots = jnp.clip(k - offline_size, 0, capacity - 1)
        in_replay = k >= offline_size
        trailing = range(k.ndim, values.ndim)
        return jnp.where(jnp.expand_dims(in_replay, tuple(trailing)), replayed[slots], values)

    terminals = pick(lambda k: data.terminals[k], replay.terminals, k)
    ends_so_far = jnp.cumsum(terminals, axis=1)
    running = ends_so_far == terminals  # (B, H): no earlier transition of the chunk is terminal
    valid = running.astype(jnp.float32)
    length = valid.sum(1).astype(jnp.int32)  # (B,)
    last = start + length - 1
    rewards = pick(lambda k: data.rewards[task_row, k], replay.rewards, k)
    masks = pick(lambda k: data.masks[task_row, k], replay.masks, k)
    discounts = discount ** jnp.arange(chunk_length)
    actions = pick(lambda k: data.actions[k], replay.actions, k)

    def state_before(k):
        return data.observations[data.rows[k]]

    def state_after(k):
        return data.observations[data.rows[k] + 1]

    return Batch(
        observations=pick(state_before, replay.observations, start),
        actions=actions.reshape(batch_size, -1),
        rewards=(discounts * rewards * valid).sum(1),
        masks=jnp.where(valid == 1, masks, 1).min(1),
        next_observations=pick(state_after, replay.next_observations, last),
        valid=valid[:, -1],
    )
