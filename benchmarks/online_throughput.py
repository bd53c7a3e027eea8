"""Environment steps per second of an online script, and where the time goes.

    python -m benchmarks.online_throughput --script fmer --env halfcheetah --hidden-dims 128 128 128
        --batch-size 64
    python -m benchmarks.online_throughput --table         prints the committed rows

The loop of the scripts' `main` (act, update, environment step alongside, replay) is timed in blocks
of `--steps`, alternating with the same loop without environments (their last answer again) and with
as many updates in one program. The share of the second that is missing in the first is the time
spent waiting for environments. Medians of five blocks each, after compilation. The row of a
configuration replaces an older one in benchmarks/results/online-throughput.csv.
"""

import dataclasses
import importlib.metadata
import os
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from analysis.agents import script_of
from analysis.command_line import run_program
from analysis.runs import read_rows
from benchmarks import as_table
from benchmarks.throughput import put_row
from common.data import Replay, spread
from common.envs import EnvPool, make_env, seed_of
from common.errors import UserError
from common.run import configure

KEY = ("script", "env", "agents", "hidden_dims", "batch_size", "device")
COLUMNS = (
    *KEY,
    "steps_per_s",
    "updates_per_s",
    "waiting",
    "ms_step",
    "ms_no_env",
    "ms_update",
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
    out: str = "benchmarks/results/online-throughput.csv"
    """File of the results."""


WAYS = ("loop", "no env", "update")


class Training:
    """Agents of an online script in their environments, trained as the script's main does it."""

    def __init__(self, script, args, agents: int):
        env = make_env(args.env)
        self.script = script
        self.args = dataclasses.replace(args, action_size=env.action_space.shape[0])
        self.everyone = list(range(agents))
        self.clock = 0
        keys = jax.random.split(jax.random.PRNGKey(0), agents)
        create = partial(script.create, self.args, env.observation_space.shape[0])
        self.state = spread(jax.jit(jax.vmap(create))(keys))
        self.pool = EnvPool([args.env] * agents)
        self.pool.start(self.everyone, self.everyone)
        self.taken = self.env_step(np.zeros((agents, 1, self.args.action_size), np.float32))
        sizes = SimpleNamespace(observations=env.observation_space, actions=env.action_space)
        self.replay = spread(Replay.create(agents, 100_000, sizes))
        self.append()
        learn = partial(script.learn, self.args)
        shapes = jax.eval_shape(learn, self.state, None, self.replay)[1]
        self.sums = spread(jax.tree.map(lambda x: jnp.zeros(x.shape), shapes))

    def env_step(self, plan: np.ndarray) -> dict:
        """Makes an environment step of each agent with actions (agents, 1, d)."""
        return self.pool.step(lambda *_: plan, self.everyone)

    def append(self) -> None:
        """Appends the last transitions to the replay."""
        new = {name: x[:, None] for name, x in self.taken.items()}
        self.replay = self.replay.append(new)

    def update(self, count: int) -> None:
        """Makes updates in one program."""
        self.state, self.sums = self.script.train_chunk(
            self.args, self.state, self.sums, self.replay, count
        )

    def step(self, with_env: bool) -> None:
        """Acts, makes an update and, at the same time, an environment step.

        Without environments the last transitions are appended again.
        """
        observations = np.stack(self.pool.states)[:, None]
        seeds = self.pool.seeds[:, None]
        ages = self.pool.ages[:, None]
        plan = self.script.act(self.args, self.state, observations, seeds, ages, "explore")
        plan = np.concatenate(plan)
        self.update(1)
        if with_env:
            self.taken = self.env_step(plan)
        self.append()
        if with_env:
            over = np.flatnonzero(self.taken["terminals"]).tolist()
            self.clock += 1
            self.pool.start(over, [seed_of(i, self.clock) for i in over])

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


def measure(options: Options) -> dict:
    """Returns a row."""
    script = script_of(options.script)
    if options.agents < 1:
        raise UserError("--agents must be at least 1")
    if hasattr(script.Args, "tasks"):
        raise UserError(f"{options.script} is no online method")
    flags = dict(hidden_dims=options.hidden_dims, batch_size=options.batch_size)
    flags = {name: x for name, x in flags.items() if x}
    args = configure(script.Args, script.ENV_DEFAULTS, options.env, **flags)
    training = Training(script, args, options.agents)
    times = []
    for _ in range(6):
        times.append([training.block(way, options.steps) for way in WAYS])
    loop, without, update = np.median(times[1:], 0)  # The first round compiles.
    return dict(
        script=script.__name__,
        env=options.env,
        agents=options.agents,
        hidden_dims=args.hidden_dims,
        batch_size=args.batch_size,
        device=f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        steps_per_s=round(1e3 * options.agents / loop, 1),
        updates_per_s=round(1e3 * options.agents / update, 1),
        waiting=round(max(0, 1 - without / loop), 3),
        ms_step=round(loop, 3),
        ms_no_env=round(without, 3),
        ms_update=round(update, 3),
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
