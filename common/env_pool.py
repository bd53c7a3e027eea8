"""A pool of environments, and the episodes of an evaluation.

Arrays are always (agents, slots, ...). An episode is determined by its seed and its actions,
whichever process plays it.
"""

from typing import Any

import numpy as np

from common.errors import UserError
from common.workers import Slots, Worker, cores

MOST_SLOTS = 100  # in all, because some environments take 170 MiB
IN_PROCESS = ("multigoal",)  # a step is cheaper than a message to a worker
RESULTS = ("next_observations", "rewards", "masks", "terminals", "success")


class EnvPool:
    """Environments of all agents, `slots` for each (fewer if they would be more than 100 in all).

    Attributes that policies need: `observations` (agents, slots, S), `seeds` (agents, slots) and
    `ages` (agents, slots), the number of steps in the running episodes.
    """

    def __init__(self, names: list[str], slots: int = 1, workers: int = 0):
        """Prepares environments: one name per agent; `workers` processes (0: one per core)."""
        slots = min(slots, max(1, MOST_SLOTS // max(1, len(names))))
        self.shape = (len(names), slots)
        self.seeds = np.zeros(self.shape, np.uint32)
        self.ages = np.zeros(self.shape, np.int32)
        self.observations = np.zeros((*self.shape, 0), np.float32)
        self.plans = np.zeros((*self.shape, 0, 0), np.float32)  # the last actions that were set
        self.positions = np.zeros(self.shape, np.int32)  # of the next action in each plan
        self.active = np.ones(self.shape, bool)  # the slots that play
        slot_names = [name for name in names for _ in range(slots)]
        self._local, self._workers = None, []
        if set(names) <= set(IN_PROCESS):
            self._local = Slots(slot_names)
        else:
            count = min(workers or cores(), len(slot_names))
            self._workers = [Worker(slot_names) for _ in range(count)]

    def _call(self, method: str, where: np.ndarray, *arguments: np.ndarray) -> list[tuple]:
        """Calls a method of the slots in the mask `where` with their rows of the arguments."""
        indices = np.flatnonzero(where)
        columns = [values.reshape(where.size, *values.shape[2:]) for values in arguments]
        jobs = [(int(i), method, tuple(column[i] for column in columns)) for i in indices]
        if self._local:
            return self._local.run(jobs)
        shares = [[] for _ in self._workers]
        for job in jobs:
            shares[job[0] % len(shares)].append(job)
        busy = [i for i, share in enumerate(shares) if share]
        for i in busy:
            self._workers[i].send(shares[i])
        results = {}
        for i in busy:
            for job, result in zip(shares[i], self._workers[i].receive(), strict=True):
                results[job[0]] = result
        return [results[i] for i in indices]

    def _observe(self, where: np.ndarray, observations: list[np.ndarray]) -> None:
        if observations:
            size = observations[0].size
            if self.observations.shape[-1] != size:
                self.observations = np.zeros((*self.shape, size), np.float32)
            self.observations[where] = observations

    def reset(self, seeds: np.ndarray, where: np.ndarray | None = None) -> None:
        """Begins an episode with each seed (agents, slots), only in the mask `where` if given."""
        if where is None:
            where = np.ones(self.shape, bool)
        results = self._call("start", where, seeds)
        self._observe(where, [result[0] for result in results])
        self.seeds[where] = seeds[where]
        self.ages[where] = 0
        self.positions[where] = self.plans.shape[2]

    def need_actions(self) -> bool:
        """Returns whether an active slot has played all of its actions."""
        used_up = self.positions >= self.plans.shape[2]
        return bool((used_up & self.active).any())

    def set_actions(self, plans: Any) -> None:
        """Hands plans (agents, slots, H, d) to the slots that have played all of their actions."""
        plans = np.nan_to_num(np.asarray(plans))  # an agent may have diverged
        used_up = self.positions >= self.plans.shape[2]
        if plans.shape != self.plans.shape:
            self.plans = np.zeros(plans.shape, np.float32)
        self.plans[used_up] = plans[used_up]
        self.positions[used_up] = 0

    def random_actions(self, action_size: int) -> np.ndarray:
        """Returns uniform actions (agents, slots, 1, d), drawn from each episode's seed and age."""
        actions = np.zeros((*self.shape, 1, action_size), np.float32)
        for slot in np.ndindex(self.shape):
            # Without the 1, age 0 would repeat the random numbers of the environment's reset.
            generator = np.random.default_rng((self.seeds[slot], self.ages[slot], 1))
            actions[slot] = generator.uniform(-1, 1, (1, action_size))
        return actions

    def step(self) -> dict[str, np.ndarray]:
        """Plays the next action of each active slot.

        Returns float32 arrays (agents, slots, ...): observations, actions, next_observations,
        rewards, masks (0 where the task, not the clock, ended the episode), terminals (1 where the
        episode ended) and success.
        """
        agents, slots = np.indices(self.shape)
        last = self.plans.shape[2] - 1
        actions = self.plans[agents, slots, np.minimum(self.positions, last)]
        results = self._call("step", self.active, actions)
        transitions = dict(observations=self.observations.copy(), actions=actions)
        for name, values in zip(RESULTS, zip(*results, strict=True), strict=True):
            rows = np.array(values, np.float32)
            transitions[name] = np.zeros((*self.shape, *rows.shape[1:]), np.float32)
            transitions[name][self.active] = rows
        self._observe(self.active, [result[0] for result in results])
        self.ages[self.active] += 1
        self.positions[self.active] += 1
        return transitions

    def save(self) -> dict[str, np.ndarray]:
        """Returns everything `load` needs except the actions that were played."""
        return dict(seeds=self.seeds, ages=self.ages, plans=self.plans, positions=self.positions)

    def load(self, saved: dict[str, np.ndarray], actions: np.ndarray) -> None:
        """Plays the running episodes again; `actions` (agents, slots, steps, d) are the latest."""
        self.seeds, self.ages, self.plans, self.positions = (
            np.array(saved[name]) for name in ("seeds", "ages", "plans", "positions")
        )
        steps = actions.shape[2]
        if self.ages.max() > steps:
            raise UserError("an episode is longer than the replay, so the run cannot be continued")
        everywhere = np.ones(self.shape, bool)
        results = self._call("replay", everywhere, self.seeds, self.ages, actions)
        self._observe(everywhere, [result[0] for result in results])


class Episodes:
    """Plays exactly one episode per seed (agents, episodes); an agent's slots share its episodes.

    `results` has success, return and length (agents, episodes), and path, an object array of lists
    with the visited states.
    """

    def __init__(self, pool: EnvPool, seeds: np.ndarray):
        self.pool, self.seeds = pool, seeds
        self.results = {name: np.zeros(seeds.shape) for name in ("success", "return", "length")}
        self.results["path"] = np.empty(seeds.shape, object)
        for index in np.ndindex(seeds.shape):
            self.results["path"][index] = []
        self.numbers = np.indices(pool.shape)[1]  # of the episode that each slot plays
        self._begin(np.ones(pool.shape, bool))

    def _begin(self, where: np.ndarray) -> None:
        """Begins the episodes of the slots `where`, if the agent has any left."""
        num_episodes = self.seeds.shape[1]
        self.pool.active = self.numbers < num_episodes
        rows = np.indices(self.pool.shape)[0]
        seeds = self.seeds[rows, np.minimum(self.numbers, num_episodes - 1)]
        self.pool.reset(seeds, where & self.pool.active)

    @property
    def running(self) -> bool:
        return bool(self.pool.active.any())

    def step(self) -> None:
        """Plays a step in every active slot, and begins the next episodes."""
        transitions = self.pool.step()
        for agent, slot in np.argwhere(self.pool.active):
            index = agent, self.numbers[agent, slot]
            self.results["success"][index] = transitions["success"][agent, slot]
            self.results["return"][index] += transitions["rewards"][agent, slot]
            self.results["length"][index] += 1
            self.results["path"][index].append(transitions["next_observations"][agent, slot])
        ended = self.pool.active & (transitions["terminals"] > 0)
        if ended.any():
            self.numbers = self.numbers + ended * self.pool.shape[1]
            self._begin(ended)
