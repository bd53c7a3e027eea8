"""A pool of environments, and the episodes of an evaluation.

Arrays are always (agents, slots, ...). An episode is determined by its seed and its actions,
whichever process plays it.
"""

from typing import Any

import gymnasium
import numpy as np
from numpy import ndarray

from common.environments import ONLINE
from common.errors import UserError
from common.workers import Slots, Workers, cores

MOST_SLOTS = 100  # of all agents together, because some environments take 170 MiB
# These are stepped in this process, because a step costs less than a message to a worker.
IN_PROCESS = ("multigoal",)
# At most this many of gymnasium's own environments are stepped in this process, too (0.1 to 0.3 ms
# a step). With more of them, several workers are faster.
MOST_IN_PROCESS = 8
Normalization = dict[str, ndarray]  # mean and std (S,) of observations, or nothing
RESULTS = ("rewards", "masks", "terminals", "success")


def normalize(observations: ndarray, mean: ndarray = 0, std: ndarray = 1) -> ndarray:
    """Returns normalised observations (..., S), or unchanged ones without mean and std."""
    return (observations - np.float32(mean)) / np.float32(std)


def is_gymnasiums(name: str) -> bool:
    """Returns whether an environment comes with gymnasium itself."""
    id, _ = ONLINE.get(name, (name, {}))
    spec = gymnasium.registry.get(id)
    return spec is not None and str(spec.entry_point).startswith("gymnasium.envs.")


class EnvPool:
    """Environments of all agents, `slots` for each (fewer where there would be more than `most`).

    Attributes that policies need: `observations` (agents, slots, S), `seeds` (agents, slots) and
    `ages` (agents, slots), the number of steps in the running episodes.
    """

    def __init__(
        self,
        names: list[str],
        slots: int = 1,
        workers: int = 0,
        normalization: Normalization | None = None,
        most: int = MOST_SLOTS,
    ):
        """Prepares environments: one name per agent; at most `workers` processes (0: automatic).

        Their observations are normalised if `normalization` says how.
        """
        self.normalization = normalization or {}
        slots = min(slots, max(1, most // max(1, len(names))))
        shape = (len(names), slots)
        self.shape = shape
        self.active = np.ones(shape, bool)  # the slots that play
        self.seeds = np.zeros(shape, np.uint32)
        self.ages = np.zeros(shape, np.int32)
        self.observations = np.zeros((*shape, 0), np.float32)
        self.states = self.observations  # as the environments give them, not normalised
        self.plans = np.zeros((*shape, 0, 0), np.float32)  # the actions that were set last
        self.played = np.zeros(shape, np.int32)  # how many actions of each plan were played
        self._names = [name for name in names for _ in range(slots)]
        self._num_workers = min(workers or cores(), len(self._names))
        few = workers == 0 and len(self._names) <= MOST_IN_PROCESS
        ids = [name.partition("?")[0] for name in names]
        self._in_process = all(id in IN_PROCESS or few and is_gymnasiums(id) for id in ids)
        self._slots = None  # they are made when they are first used

    def _call(self, method: str, where: ndarray, *arguments: ndarray) -> list[tuple]:
        """Calls a method of the slots in the mask `where`, each with its rows of the arguments."""
        jobs = []
        for agent, slot in np.argwhere(where):
            index = int(agent * self.shape[1] + slot)
            rows = tuple(values[agent, slot] for values in arguments)
            jobs.append((index, method, rows))
        results = self._make_slots().run(jobs)
        self._observe(where, [observation for observation, *_ in results])
        return results

    def _make_slots(self) -> Slots | Workers:
        if self._slots is None:
            if self._in_process:
                self._slots = Slots(self._names)
            else:
                self._slots = Workers(self._names, self._num_workers)
        return self._slots

    def _observe(self, where: ndarray, observations: list[ndarray]) -> None:
        if not observations:
            return
        if self.observations.shape[-1] == 0:  # the first time
            size = observations[0].size
            self.states = np.zeros((*self.shape, size), np.float32)
            self.observations = self.states.copy()
        self.states[where] = observations
        self.observations[where] = normalize(self.states[where], **self.normalization)

    def reset(self, seeds: ndarray, where: ndarray | None = None) -> None:
        """Begins an episode with each seed (agents, slots), only in the mask `where` if given."""
        if where is None:
            where = np.ones(self.shape, bool)
        self._call("start", where, seeds)
        self.seeds[where] = seeds[where]
        self.ages[where] = 0
        self.played[where] = self.plans.shape[2]  # the new episodes need actions

    @property
    def _used_up(self) -> ndarray:
        """The mask of slots that have played all of their actions."""
        return self.played >= self.plans.shape[2]

    def need_actions(self) -> bool:
        """Returns whether an active slot has played all of its actions."""
        waiting = self._used_up & self.active
        return bool(waiting.any())

    def set_actions(self, plans: Any) -> None:
        """Hands plans (agents, slots, H, d) to the slots that have played all of their actions."""
        plans = np.nan_to_num(np.asarray(plans))  # an agent may have diverged
        used_up = self._used_up
        if plans.shape != self.plans.shape:
            self.plans = np.zeros(plans.shape, np.float32)
        self.plans[used_up] = plans[used_up]
        self.played[used_up] = 0

    def random_actions(self, action_size: int) -> ndarray:
        """Returns uniform actions (agents, slots, 1, d), drawn from each episode's seed and age."""
        actions = np.zeros((*self.shape, 1, action_size), np.float32)
        for slot in np.ndindex(self.shape):
            # Without the 1, age 0 would repeat the random numbers of the environment's reset.
            generator = np.random.default_rng((self.seeds[slot], self.ages[slot], 1))
            actions[slot] = generator.uniform(-1, 1, (1, action_size))
        return actions

    def step(self) -> dict[str, ndarray]:
        """Plays the next action of each active slot.

        Returns float32 arrays (agents, slots, ...): observations, actions, next_observations,
        rewards, masks (0 where the task, not the clock, ended the episode), terminals (1 where the
        episode ended) and success.
        """
        active = self.active
        last = self.plans.shape[2] - 1
        index = np.minimum(self.played, last)  # slots that do not play may have none left
        actions = np.take_along_axis(self.plans, index[..., None, None], axis=2)
        actions = actions.squeeze(2)
        transitions = dict(
            observations=self.observations.copy(),
            actions=actions,
        )
        results = self._call("step", active, actions)
        transitions["next_observations"] = np.zeros_like(self.observations)
        transitions["next_observations"][active] = self.observations[active]  # set by `_call`
        for i, name in enumerate(RESULTS, start=1):
            column = np.zeros(self.shape, np.float32)
            column[active] = [result[i] for result in results]
            transitions[name] = column
        self.ages[active] += 1
        self.played[active] += 1
        return transitions

    def save(self) -> dict[str, ndarray]:
        """Returns what `load` needs besides the actions that were played, and the normalisation."""
        return dict(
            seeds=self.seeds,
            ages=self.ages,
            plans=self.plans,
            played=self.played,
            **self.normalization,
        )

    def load(self, saved: dict[str, ndarray], actions: ndarray) -> None:
        """Plays the running episodes again; `actions` (agents, slots, steps, d) are the latest."""
        self.seeds = np.array(saved["seeds"])
        self.ages = np.array(saved["ages"])
        self.plans = np.array(saved["plans"])
        self.played = np.array(saved["played"])
        if self.ages.max(initial=0) > actions.shape[2]:
            raise UserError(
                "an episode is longer than the replay, so the run cannot be continued: start "
                "another one with a larger --replay-size"
            )
        self._call("replay", self.active, self.seeds, self.ages, actions)


class Episodes:
    """Plays exactly one episode per seed (agents, episodes); an agent's slots share its episodes.

    `results` has success, return and length (agents, episodes), and path, an object array of lists
    with the visited states.
    """

    def __init__(self, pool: EnvPool, seeds: ndarray):
        self.pool = pool
        self.seeds = seeds
        paths = np.empty(seeds.shape, object)
        for episode in np.ndindex(seeds.shape):
            paths[episode] = []
        self.results = {
            "success": np.zeros(seeds.shape),
            "return": np.zeros(seeds.shape),
            "length": np.zeros(seeds.shape),
            "path": paths,
        }
        agents, slots = pool.shape
        self.numbers = np.tile(np.arange(slots), (agents, 1))  # of the episode in each slot
        self._begin(np.ones(pool.shape, bool))

    def _begin(self, where: ndarray) -> None:
        """Begins the next episodes in the slots `where`, if their agents have any left."""
        num_episodes = self.seeds.shape[1]
        self.pool.active = self.numbers < num_episodes
        numbers = np.minimum(self.numbers, num_episodes - 1)
        seeds = np.take_along_axis(self.seeds, numbers, axis=1)
        self.pool.reset(seeds, where & self.pool.active)

    @property
    def running(self) -> bool:
        """Whether an episode is not over yet."""
        return bool(self.pool.active.any())

    def step(self) -> None:
        """Plays a step in every active slot, and begins the next episodes."""
        transitions = self.pool.step()
        active = self.pool.active
        agents, _ = np.nonzero(active)
        episodes = agents, self.numbers[active]
        self.results["success"][episodes] = transitions["success"][active]
        self.results["return"][episodes] += transitions["rewards"][active]
        self.results["length"][episodes] += 1
        paths = self.results["path"][episodes]
        for path, state in zip(paths, self.pool.states[active], strict=True):
            path.append(state)
        ended = active & (transitions["terminals"] > 0)
        if ended.any():
            self.numbers[ended] += self.pool.shape[1]
            self._begin(ended)
