"""Environment steps per second of an online script, and where the time goes.

    python -m benchmarks.online_throughput --script fmer --env halfcheetah --hidden-dims 128 128 128
        --batch-size 64
    python -m benchmarks.online_throughput --table         prints the committed rows

The loop of the scripts' `main` (act, update, environment step beside it, replay) is timed in blocks
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
    script: str = "fmer"  # to measure, e.g. fmer or sac
    env: str = "halfcheetah"
    agents: int = 1  # trained in one program
    hidden_dims: tuple[int, ...] = ()  # of the networks (default: the script's own)
    batch_size: int = 0  # (default: the script's own)
    steps: int = 200  # of a block
    table: bool = False  # measure nothing, print what is committed
    out: str = "benchmarks/results/online-throughput.csv"


def measure(options: Options) -> dict:
    script, agents = script_of(options.script), options.agents
    if agents < 1:
        raise UserError("--agents must be at least 1")
    if hasattr(script.Args, "tasks"):
        raise UserError(f"{options.script} is no online method")
    own = dict(hidden_dims=options.hidden_dims, batch_size=options.batch_size)
    own = {name: x for name, x in own.items() if x}
    args = configure(script.Args, script.ENV_DEFAULTS, options.env, **own)
    env, everyone = make_env(options.env), list(range(agents))
    sizes = SimpleNamespace(observations=env.observation_space, actions=env.action_space)
    args = dataclasses.replace(args, action_size=env.action_space.shape[0])
    keys = jax.random.split(jax.random.PRNGKey(0), agents)
    create = partial(script.create, args, env.observation_space.shape[0])
    state = spread(jax.jit(jax.vmap(create))(keys))
    replay, pool = spread(Replay.create(agents, 100_000, sizes)), EnvPool([options.env] * agents)
    pool.start(everyone, everyone)
    plan = np.zeros((agents, 1, args.action_size), np.float32)
    taken = pool.step(lambda *_: plan, everyone)
    replay = replay.append({name: x[:, None] for name, x in taken.items()})
    shapes = jax.eval_shape(partial(script.learn, args), state, None, replay)[1]
    sums, clock = spread(jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)), 0

    def block(way):
        """Seconds of options.steps steps, or updates."""
        nonlocal state, sums, replay, taken, clock
        jax.block_until_ready((state, replay))
        start = time.perf_counter()
        if way == "update":
            state, sums = script.train_chunk(args, state, sums, replay, options.steps)
        for _ in range(0 if way == "update" else options.steps):
            inputs = np.stack(pool.states), pool.seeds, pool.ages
            plan = np.concatenate(script.act(args, state, *[x[:, None] for x in inputs], "explore"))
            state, sums = script.train_chunk(args, state, sums, replay, 1)
            if way == "loop":
                taken = pool.step(lambda *_: plan, everyone)
            replay = replay.append({name: x[:, None] for name, x in taken.items()})
            if way == "loop":
                over = np.flatnonzero(taken["terminals"]).tolist()
                clock += 1
                pool.start(over, [seed_of(i, clock) for i in over])
        jax.block_until_ready((state, replay))
        return 1e3 * (time.perf_counter() - start) / options.steps

    ways = ("loop", "no env", "update")
    times = np.array([[block(way) for way in ways] for _ in range(6)])[1:]  # the first compiles
    loop, without, update = np.median(times, 0)
    return dict(
        script=script.__name__, env=options.env, agents=agents, hidden_dims=args.hidden_dims,
        batch_size=args.batch_size,
        device=f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        steps_per_s=round(1e3 * agents / loop, 1), updates_per_s=round(1e3 * agents / update, 1),
        waiting=round(max(0, 1 - without / loop), 3), ms_step=round(loop, 3),
        ms_no_env=round(without, 3), ms_update=round(update, 3),
        jax=importlib.metadata.version("jax"),
    )  # fmt: skip


def main(options: Options) -> None:
    path = Path(options.out)
    if not options.table:
        put_row(path, measure(options), KEY, COLUMNS)
    print(as_table(read_rows(path), COLUMNS))


if __name__ == "__main__":
    run_program(main, Options, __doc__)
