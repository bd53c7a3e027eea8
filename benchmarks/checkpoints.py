"""What a checkpoint of an online run costs: the replay in parts, or all of it every time.

    python -m benchmarks.checkpoints                five seeds on Humanoid after 100,000 steps

A run with a full-sized network is at --steps and makes --interval more. Measured are its `Run.save`
then (the agents, and what is new of the replay), the same with all of the replay in one file (the
agents, and every transition), and `Run.restore` of either; seconds, bytes written, and the ratio.
Medians over rounds, in turn. Writes benchmarks/results/checkpoints.json.
"""

import contextlib
import dataclasses
import gc
import importlib.metadata
import io
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

from analysis.agents import script_of
from analysis.command_line import run_program
from benchmarks.throughput import describe
from common.data import Replay, spread
from common.envs import ONLINE, make_env
from common.errors import UserError
from common.run import CHECKPOINT, PART, Run, read_checkpoint, sealed

OUT = Path(__file__).resolve().parent / "results/checkpoints.json"


@dataclasses.dataclass(frozen=True)
class Options:
    script: str = "fmer"  # an online method
    env: str = "humanoid"  # its environment, which has the sizes of a transition
    seeds: int = 5  # agents
    steps: int = 100_000  # environment steps of each that are in the replay
    interval: int = 10_000  # steps from one checkpoint to the next
    rounds: int = 5
    out: str = str(OUT)


def measured(call) -> tuple[float, object]:
    """Seconds of a call, and its result."""
    gc.collect()
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - start, result


def main(options: Options) -> dict:
    script = script_of(options.script)
    if hasattr(script.Args, "tasks") or options.env not in ONLINE:
        raise UserError(f"expected an online method and its environment, not {options.env}")
    env, rng, n = make_env(options.env), np.random.default_rng(0), options.seeds
    S, d = env.observation_space.shape[0], env.action_space.shape[0]
    sizes = SimpleNamespace(observations=env.observation_space, actions=env.action_space)
    keys = jax.random.split(jax.random.PRNGKey(0), n)
    args = script.Args(env=options.env, action_size=d)
    state = spread(jax.jit(jax.vmap(partial(script.create, args, S)))(keys))
    total = options.steps + options.interval
    empty = Replay.create(n, 0, sizes)
    draw = lambda x, steps: rng.random((n, steps, *x.shape[2:]), np.float32)
    rows = lambda steps: {k: draw(x, steps) for k, x in vars(empty).items() if k != "size"}
    times = {name: [] for name in ("parts_save", "whole_save", "parts_restore", "whole_restore")}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = dataclasses.replace(args, run_dir=folder)
        for i in range(options.rounds):
            agents = [(1, seed) for seed in range(n)]
            run = Run("checkpoints", dataclasses.replace(args, name=f"round-{i}"), agents, {})
            made = [(options.steps, rows(options.steps)), (total, rows(options.interval))]
            run.save(1, dict(state=state, replay=spread(empty.refilled(total, made[:1]))))
            replay = spread(empty.refilled(total, made))
            seconds, _ = measured(lambda: run.save(2, dict(state=state, replay=replay)))
            times["parts_save"].append(seconds)
            whole = lambda: run.write("whole", *sealed(dict(state=state, replay=vars(replay))))
            times["whole_save"].append(measured(whole)[0])
            bytes_of = lambda *names: sum((run.folder / x).stat().st_size for x in names)
            new = bytes_of(CHECKPOINT, PART.format(total))
            megabytes = dict(parts=new / 2**20, whole=bytes_of("whole") / 2**20)
            again = lambda: spread(run.restore(dict(state=state, replay=empty))[1]["replay"])
            times["parts_restore"].append(measured(again)[0])
            rows_of = lambda: read_checkpoint(run.folder / "whole")["replay"]
            put = lambda: spread(Replay.create(n, total, sizes)).append(rows_of())
            times["whole_restore"].append(measured(put)[0])
            for path in run.folder.iterdir():
                path.unlink()
    seconds = {name: float(np.median(x)) for name, x in times.items()}
    result = dict(
        device=describe(),
        versions={name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")},
        options={k: v for k, v in vars(options).items() if k != "out"},
        megabytes=megabytes,
        seconds=seconds,
        ratio=dict(
            save=seconds["whole_save"] / seconds["parts_save"],
            restore=seconds["whole_restore"] / seconds["parts_restore"],
        ),
        rounds={name: np.round(x, 3).tolist() for name, x in times.items()},
    )
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return result


if __name__ == "__main__":
    run_program(main, Options, __doc__)
