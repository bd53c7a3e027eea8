"""Environment steps per second of an online script, and where the time goes.

    python -m benchmarks.online_throughput --script fmer --env halfcheetah --hidden-dims 128 128 128
        --batch-size 64
    python -m benchmarks.online_throughput --table         prints the committed rows
    for env in humanoid halfcheetah; do for script in fmer sac td3 ppo dipo dpmd qvpo sac_flow flame
        do python -m benchmarks.online_throughput --script $script --env $env; done; done
                                                           as the FMER paper's Tables 8 and 9

The loop of the scripts' `main` (act, update, environment step alongside, replay) is timed in blocks
of `--steps`, alternating with the same loop without environments (their last answer again), with as
many updates in one program, and with a reference: the loop of CleanRL's scripts (a NumPy replay,
and act, step, store, one jitted update, one after the other) around the script's own functions.
`waiting` is the share of the loop's time that the loop without environments saves. Medians of five
blocks each, after compilation. The row of a configuration replaces an older one in
benchmarks/results/online-throughput.csv.

PPO has no replay: its blocks are whole rollouts, an environment step of its loop takes its share of
the epochs that follow a rollout, an update is a minibatch, and there is no time without
environments and no reference.
"""

import dataclasses
import importlib.metadata
import inspect
import os
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

from analysis.command_line import run_program
from analysis.runs import read_rows
from analysis.scripts import script_of
from benchmarks import RESULTS, as_table, put_row
from common.devices import keep_freed_memory, zero_metrics
from common.env_pool import EnvPool
from common.environments import TRAINING, env_sizes, make_env, seeds_of
from common.errors import UserError
from common.flags import configure
from common.sampling import Replay

KEY = ("script", "env", "agents", "hidden_dims", "batch_size", "device")
COLUMNS = (
    *KEY,
    "steps_per_s",
    "updates_per_s",
    "waiting",
    "ms_step",
    "ms_no_env",
    "ms_update",
    "ms_reference",
    "jax",
)


@dataclasses.dataclass(frozen=True)
class Options:
    script: str = "fmer"
    """Script to measure, such as fmer or sac."""
    env: str = "halfcheetah"
    """Environment."""
    agents: int = 1
    """Agents trained in one program."""
    hidden_dims: tuple[int, ...] = ()
    """Hidden-layer widths of all networks. The default is the script's own."""
    batch_size: int = 0
    """Batch size. The default is the script's own."""
    steps: int = 200
    """Steps of a block."""
    table: bool = False
    """Measure nothing, and print what is committed."""
    out: str = str(RESULTS / "online-throughput.csv")
    """File of the results."""


WAYS = ("loop", "no env", "update", "reference")


class Agents:
    """Agents of an online script, as its main creates them."""

    def __init__(self, script, args, agents: int):
        self.sizes = env_sizes(args.env)
        observation_size, action_size = self.sizes
        self.script = script
        self.args = dataclasses.replace(args, action_size=action_size)
        self.agents = [(1, seed) for seed in range(agents)]
        self.clock = 0
        self.state = script.create_agents(self.args, self.agents, observation_size)

    def zero_metrics(self, data) -> dict:
        """Returns sums of metrics to begin with, of updates on a replay or a rollout."""
        return zero_metrics(partial(self.script.train_step, self.args), self.state, data)


class Training(Agents):
    """Agents in their environments, trained as the script's main does it."""

    def __init__(self, script, args, agents: int):
        super().__init__(script, args, agents)
        self.replay = Replay.create(agents, 100_000, *self.sizes)
        self.metrics = self.zero_metrics(self.replay)
        self.envs = EnvPool([args.env] * agents)
        self.envs.reset(seeds_of(self.agents, 0))
        self.envs.set_actions(np.zeros((agents, 1, 1, self.args.action_size), np.float32))
        self.transitions = self.envs.step()
        self.replay = self.replay.append(self.transitions)

    def update(self, count: int) -> None:
        """Makes updates in one program."""
        self.state, self.metrics = self.script.train_chunk(
            self.args, self.state, self.metrics, self.replay, count
        )

    def step(self, with_env: bool) -> None:
        """Acts, makes an update and, at the same time, an environment step.

        Without environments the last transitions are appended again.
        """
        inputs = self.envs.observations, self.envs.seeds, self.envs.ages
        actions = self.script.act(self.args, self.state, *inputs, "explore")
        self.update(1)
        self.envs.set_actions(actions)
        if with_env:
            self.transitions = self.envs.step()
        self.replay = self.replay.append(self.transitions)
        if with_env:
            self.clock += 1
            ended = self.transitions["terminals"] > 0
            if ended.any():
                seeds = seeds_of(self.agents, self.clock, TRAINING)
                self.envs.reset(seeds, where=ended)

    def block(self, way: str, steps: int) -> float:
        """Returns the milliseconds of a step of the loop, or of an update."""
        jax.block_until_ready((self.state, self.replay))
        start = time.perf_counter()
        if way == "update":
            self.update(steps)
        else:
            for _ in range(steps):
                self.step(with_env=way == "loop")
        jax.block_until_ready((self.state, self.replay))
        return 1e3 * (time.perf_counter() - start) / steps


class Rollouts(Agents):
    """Agents of PPO, which play a rollout and then learn from it as in the script's main."""

    def __init__(self, script, args, agents: int):
        super().__init__(script, args, agents)
        observation_size, _ = self.sizes
        rollout = script.empty_rollout(self.args, agents, observation_size)
        self.metrics = self.zero_metrics(rollout)
        self.envs = EnvPool([args.env] * agents, args.num_envs, most=args.num_envs * agents)
        self.envs.reset(script.episode_seeds(self.args, self.agents, 0))
        self.rollout = self.play()

    def play(self) -> dict:
        """Returns the next rollout of all agents."""
        rollout, _ = self.script.collect_rollout(
            self.args, self.state, self.envs, self.agents, self.clock
        )
        self.clock += self.args.rollout_steps
        return rollout

    def learn(self) -> None:
        """Makes all epochs over the last rollout."""
        self.state, self.metrics = self.script.train_chunk(
            self.args, self.state, self.metrics, self.rollout
        )

    def block(self, way: str, steps: int) -> float:
        """Returns the milliseconds of an environment step of the loop, or of an update."""
        if way == "no env":
            return np.nan
        args = self.args
        rollouts = max(1, steps // args.rollout_steps)
        jax.block_until_ready(self.state)
        start = time.perf_counter()
        for _ in range(rollouts):
            if way == "loop":
                self.rollout = self.play()
            self.learn()
        jax.block_until_ready(self.state)
        seconds = time.perf_counter() - start
        updates = args.epochs * (args.rollout_steps // args.batch_size)
        in_a_rollout = args.rollout_steps if way == "loop" else updates
        return 1e3 * seconds / (rollouts * in_a_rollout)


class Reference:
    """One agent in CleanRL's loop. DIPO's update also needs the replay, so it has no reference."""

    def __init__(self, script, args, capacity: int = 100_000):
        observation_size, action_size = env_sizes(args.env)
        args = dataclasses.replace(args, action_size=action_size)
        self.batch_size = args.batch_size
        self.env = make_env(args.env)
        self.observation, _ = self.env.reset(seed=0)
        self.random = np.random.default_rng(0)
        self.key = jax.random.PRNGKey(0)
        self.size = 0
        self.columns = dict(
            observations=np.zeros((capacity, observation_size), np.float32),
            next_observations=np.zeros((capacity, observation_size), np.float32),
            actions=np.zeros((capacity, action_size), np.float32),
            rewards=np.zeros(capacity, np.float32),
            masks=np.zeros(capacity, np.float32),
            terminals=np.zeros(capacity, np.float32),
        )
        self.state = script.create(args, observation_size, self.key)
        self.act = jax.jit(partial(script.sample_actions, args, mode="explore"))
        self.update = jax.jit(partial(script.update, args), donate_argnums=0)

    def step(self) -> None:
        """Acts, steps the environment, stores the transition and makes an update."""
        self.key, key = jax.random.split(self.key)
        observation = np.float32(self.observation)
        action = np.asarray(self.act(self.state, observation[None], key))[0]
        self.observation, reward, terminated, truncated, _ = self.env.step(action)
        transition = dict(
            observations=observation,
            next_observations=self.observation,
            actions=action,
            rewards=reward,
            masks=not terminated,
            terminals=terminated or truncated,
        )
        row = self.size % len(self.columns["rewards"])
        for name, value in transition.items():
            self.columns[name][row] = value
        self.size += 1
        if terminated or truncated:
            self.observation, _ = self.env.reset()
        filled = min(self.size, len(self.columns["rewards"]))
        rows = self.random.integers(filled, size=self.batch_size)
        batch = {name: column[rows] for name, column in self.columns.items()}
        self.state, _ = self.update(self.state, Replay(**batch, size=np.int32(filled)))

    def block(self, steps: int) -> float:
        """Returns the milliseconds of a step."""
        jax.block_until_ready(self.state)
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        jax.block_until_ready(self.state)
        return 1e3 * (time.perf_counter() - start) / steps


def known(number: float) -> float | str:
    """Returns a rounded number for a cell, which is empty where nothing was measured (NaN)."""
    return "" if np.isnan(number) else round(float(number), 3)


def measure(options: Options) -> dict:
    """Returns a row."""
    script = script_of(options.script)
    if options.agents < 1:
        raise UserError("--agents must be at least 1")
    if not hasattr(script.Args, "total_steps"):
        raise UserError(f"{options.script} is not an online method")
    flags = dict(hidden_dims=options.hidden_dims, batch_size=options.batch_size)
    flags = {name: x for name, x in flags.items() if x}
    args = configure(script.Args, script.ENV_DEFAULTS, options.env, **flags)
    keep_freed_memory()
    has_replay = hasattr(args, "replay_size")
    training = (Training if has_replay else Rollouts)(script, args, options.agents)
    reference = None
    update_arguments = inspect.signature(script.update).parameters
    if options.agents == 1 and has_replay and "replay" not in update_arguments:
        reference = Reference(script, args)
    times = []
    for _ in range(6):
        row = [training.block(way, options.steps) for way in WAYS[:3]]
        row.append(reference.block(options.steps) if reference else np.nan)
        times.append(row)
    loop, without, update, as_cleanrl = np.median(times[1:], 0)  # The first round compiles.
    return dict(
        script=script.__name__,
        env=options.env,
        agents=options.agents,
        hidden_dims=args.hidden_dims,
        batch_size=args.batch_size,
        device=f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        steps_per_s=round(1e3 * options.agents / loop, 1),
        updates_per_s=round(1e3 * options.agents / update, 1),
        waiting=known(np.maximum(0, 1 - without / loop)),
        ms_step=known(loop),
        ms_no_env=known(without),
        ms_update=known(update),
        ms_reference=known(as_cleanrl),
        jax=importlib.metadata.version("jax"),
    )


def main(options: Options) -> None:
    """Measures a configuration, and prints all rows."""
    path = Path(options.out)
    if not options.table:
        put_row(path, measure(options), KEY, COLUMNS)
    print(as_table(read_rows(path), COLUMNS))


if __name__ == "__main__":
    run_program(main, Options, __doc__)
