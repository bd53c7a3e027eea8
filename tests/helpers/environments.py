"""A toy environment, a policy, episodes of it, and a comparison, for the tests of environments."""

import os
import signal

import gymnasium
import numpy as np

from common.env_pool import Episodes

DEADLY = -31 / 32  # a second coordinate with which the process dies; float32 has this number


class Toy(gymnasium.Env):
    """An episode of seed % 100 steps that succeeds if seed // 100 is odd, and is cut off otherwise;
    from seed 1000 on it also looks like a success after the first step, which does not count.
    Observes (seed, age, the action, a draw from the global generator)."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (5,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def observe(self, action):
        return np.array([self.seed, self.age, *action, np.random.uniform()])

    def reset(self, *, seed=None, options=None):
        self.seed, self.age = seed, 0
        return self.observe([0, 0]), {}

    def step(self, action):
        if action[0] == -1:
            raise ValueError("the toy is broken")
        if action[1] == DEADLY:
            os.kill(os.getpid(), signal.SIGKILL)
        self.age += 1
        over, good = self.age == self.seed % 100, self.seed // 100 % 2 == 1
        success = over and good
        info = dict(success=success or self.age == 1 and self.seed > 1000)
        return self.observe(action), success - 1, success, over and not good, info


gymnasium.register("Toy-v0", Toy, max_episode_steps=1000)
TOY = "tests.helpers.environments:Toy-v0"  # a worker imports this module, and so has it, too


def noise(H, d):
    """A policy: numbers that depend on the episode's seed and age alone."""

    def policy(observations, seeds, ages):
        plans = np.zeros((*seeds.shape, H, d), np.float32)
        for slot in np.ndindex(seeds.shape):
            generator = np.random.default_rng([seeds[slot], ages[slot]])
            plans[slot] = generator.uniform(-1, 1, (H, d))
        return plans

    return policy


def step(pool, policy):
    """Makes a step as the scripts do: a chunk of actions is played open loop."""
    if pool.need_actions():
        pool.set_actions(policy(pool.observations, pool.seeds, pool.ages))
    return pool.step()


def play(pool, policy, seeds):
    """Plays an episode per seed (agents, episodes) and returns their results."""
    episodes = Episodes(pool, np.asarray(seeds, np.uint32))
    while episodes.running:
        if pool.need_actions():
            pool.set_actions(policy(pool.observations, pool.seeds, pool.ages))
        episodes.step()
    return episodes.results


def same(first, second):
    """Equal bit by bit; of episodes, paths too."""
    assert first.keys() == second.keys()
    for name in first:
        for x, y in zip(np.ravel(first[name]), np.ravel(second[name]), strict=True):
            assert np.array_equal(x, y, equal_nan=name == "success"), name  # NaN: none is reported


def column(*seeds):
    """Seeds of agents with a slot each."""
    return np.array(seeds, np.uint32)[:, None]
