"""The papers' experiments as commands, one per line.

    python benchmarks/reproduce.py --list                     names, runs, agents, updates
    python benchmarks/reproduce.py --only meam-table1         prints commands of incomplete runs
    python benchmarks/reproduce.py --only qam-table1 | parallel -j 1
    python benchmarks/reproduce.py --only fmer-table2 --slurm > jobs.sh && sbatch jobs.sh
    python benchmarks/reproduce.py --only meam-table1 --run   runs them here, one after the other

A run is an environment with all its tasks and seeds, in one process. With --slurm its seeds are
divided: each job of the array trains a few of them, in a run folder of its own, and plot.py joins
the folders (docs/guides/scale.md). Commands continue a run that was interrupted; one that is
complete is not listed again, except with --all. The offline phases of qam-online repeat the runs
of qam-table1. Domains with 100M transitions (puzzle-4x4, cube-quadruple) use the shards in
--shards if it is given, otherwise the ordinary dataset.
"""

import dataclasses
import functools
import importlib
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from analysis.command_line import run_program  # noqa: E402
from analysis.panels import DOMAINS  # noqa: E402
from analysis.runs import read_csv  # noqa: E402
from benchmarks import run_python  # noqa: E402
from benchmarks.learning import EIGHT_TASKS, METHODS, NINE, labelled  # noqa: E402 (run as a script)
from common.datasets import LARGE  # noqa: E402
from common.environments import ONLINE  # noqa: E402
from common.errors import UserError  # noqa: E402
from common.flags import configure, read_command_line  # noqa: E402

OTHER_DATA = """antmaze-large-stitch humanoidmaze-medium-stitch scene-noisy puzzle-3x3-noisy
    cube-double-noisy cube-triple-noisy""".split()
TASKS = "--tasks 1 2 3 4 5"
TWELVE = "--num-seeds 12"
EIGHT = "--num-seeds 8"
FIVE = "--num-seeds 5"


class Run(NamedTuple):
    """A run of a script."""

    experiment: str
    module: str
    env: str
    name: str
    flags: str  # of the script


def offline(experiment: str, seeds: str, more: str = "") -> Iterator[Run]:
    """Yields all methods of the QAM paper's comparison on its ten domains."""
    methods = labelled(METHODS)
    del methods["meam"]  # It is a later paper's.
    for env in DOMAINS:
        for name, module in methods.items():
            yield Run(experiment, module, env, name, f"{TASKS} {seeds} {more}")
        for mode in ("plain", "mse", "linex"):
            flags = f"--guidance {mode} {TASKS} {seeds} {more}"
            yield Run(experiment, "baselines.cgql", env, f"cgql-{mode}", flags)


def qam_table1():
    """Li and Levine, Table 1 and the offline half of the curves: success after 1M updates."""
    yield from offline("qam-table1", TWELVE)


def qam_online():
    """Li and Levine, the whole curves: then 500,000 environment steps; RLPD online only."""
    yield from offline("qam-online", TWELVE, "--online-steps 500000")
    for env in DOMAINS:
        yield Run("qam-online", "baselines.rlpd", env, "rlpd", f"{TASKS} {TWELVE}")


def qam_sensitivity():
    """Li and Levine, sensitivity of QAM-EDIT: one task per domain, offline and online."""
    tuned = importlib.import_module("qam_edit").ENV_DEFAULTS
    variants = {"default": "", "no-clipping": "--grad-clip 1e9", "K2": "--num-critics 2"}
    variants |= {f"T{T}": f"--flow-steps {T}" for T in (1, 3, 20, 30)}
    for env in DOMAINS:
        tau = tuned[env]["inv_temp"]
        taus = {f"tau-x{x:g}": f"--inv-temp {x * tau:g}" for x in (0.1, 0.3, 3, 10)}
        task = 1 if "maze" in env else 2
        for name, flags in (variants | taus).items():
            flags = f"{flags} --tasks {task} {TWELVE} --online-steps 500000"
            yield Run("qam-sensitivity", "qam_edit", env, name, flags)


def qam_quality():
    """Li and Levine, data quality: stitch data for locomotion, noisy data for manipulation."""
    scripts = labelled(METHODS)
    flags = f"{TASKS} {TWELVE} --online-steps 500000"
    for env in OTHER_DATA:
        for name in "qam_edit bam qsm fql dsrl fedit rebrac".split():
            yield Run("qam-quality", scripts[name], env, name, flags)


def meam_table1():
    """Ghanem and Ghogho, Table 1: ME-AM and QAM's variants on two domains."""
    for env in ("puzzle-4x4", "cube-triple"):
        for script in ("meam", "qam", "qam_edit", "qam_fql"):
            yield Run("meam-table1", script, env, script, f"{TASKS} {EIGHT}")


def meam_figure2():
    """Ghanem and Ghogho, Figure 2, on puzzle-4x4: shares rho; flattening without and with the path
    to the anchor; the same where expansions are sampled, with more of them, a larger tau and most
    of the path to the anchor; a small noise floor with a lambda for it. The values are ours."""
    variants = {"full": ""} | {f"rho-{rho}": f"--rho {rho}" for rho in (0, 0.1, 0.3, 0.7)}
    variants |= {"lambda-0": "--entropy-scale 0", "w-0.5": "--path-weight 0.5"}
    noisy = "--noisy-expansion --rho 0.7 --inv-temp 100"
    variants |= {f"noisy-w-{w}": f"{noisy} --path-weight {w}" for w in (1, 0.1)}
    variants["sigma-min-0.01"] = "--sigma-min 0.01 --entropy-scale 0.1"
    for name, flags in variants.items():
        yield Run("meam-figure2", "meam", "puzzle-4x4", name, f"{flags} {TASKS} {EIGHT}".strip())


def meam_figure3():
    """Ghanem and Ghogho, Figure 3: offline, then online, beside QAM and QAM-EDIT."""
    for env in ("puzzle-4x4", "cube-triple"):
        for script in ("meam", "qam", "qam_edit"):
            flags = f"{TASKS} {EIGHT} --online-steps 500000"
            yield Run("meam-figure3", script, env, script, flags)


def fmer_table2():
    """Gao et al., Tables 2 and 7 to 9: nine methods in the kitchen and on MuJoCo, with times."""
    for env in EIGHT_TASKS:
        for name, module in labelled(NINE).items():
            yield Run("fmer-table2", module, env, name, FIVE)


SOLVERS = ("rk2", 10), ("rk4", 10), ("rk2", 5), ("rk4", 2)  # and numbers of flow steps


def fmer_ablations():
    """Gao et al., Tables 10 to 15 and Figures 2, 5 and 6: one change at a time. The values of a
    fixed eta, and when the entropy is switched off late, are lost: 0.1, 0.5, 1 and 700,000."""
    everywhere = {f"eta-{eta}": f"--eta-fixed {eta}" for eta in (0.1, 0.5, 1)}
    everywhere |= {"no-entropy": "--entropy-until 0", "no-entropy-late": "--entropy-until 700000"}
    everywhere |= {"uniform": "--weights uniform", "top1": "--weights top1"}
    walker = {"exact": "--divergence exact"}
    walker |= {f"T{T}": f"--flow-steps {T}" for T in (5, 20, 50)}
    for solver, T in SOLVERS:
        walker[f"{solver}-T{T}"] = f"--solver {solver} --flow-steps {T}"
    candidates = {f"N{N}": f"--num-candidates {N}" for N in (4, 16, 32)}
    changes = {env: dict(everywhere) for env in EIGHT_TASKS}
    for env, variants in changes.items():
        if "kitchen" not in env:
            variants["clip"] = "--squash clip"
    changes["walker2d"] |= walker
    for env in ("walker2d", "humanoid", "kitchen-2", "kitchen-7"):
        changes[env] |= candidates
    for env, variants in changes.items():
        for name, flags in variants.items():
            yield Run("fmer-ablations", "fmer", env, name, f"{flags} {FIVE}")


def fmer_figure3():
    """Gao et al., Figure 3: the plane with four goals. (python -m benchmarks.multigoal measures and
    draws it from runs of its own.)"""
    for name, module in labelled("fmer baselines.sac baselines.dpmd").items():
        yield Run("fmer-figure3", module, "multigoal", name, f"{FIVE} --total-steps 45000")


MAKERS = (
    qam_table1,
    qam_online,
    qam_sensitivity,
    qam_quality,
    meam_table1,
    meam_figure2,
    meam_figure3,
    fmer_table2,
    fmer_ablations,
    fmer_figure3,
)
EXPERIMENTS = {maker.__name__.replace("_", "-"): maker for maker in MAKERS}


@dataclasses.dataclass(frozen=True)
class Options:
    only: tuple[str, ...] = ()
    """Experiments to list. The default is all."""
    list: bool = False
    """Print which experiments there are."""
    dry_run: bool = False
    """Print the commands even with --run."""
    run: bool = False
    """Run the commands here, one after the other."""
    slurm: bool = False
    """Print a Slurm array job instead of the commands."""
    seeds_per_job: int = 4
    """Seeds of a run that one job of the array trains together."""
    all: bool = False
    """List complete runs as well."""
    run_dir: str = "runs"
    """Folder where the run folders are."""
    dataset_dir: str = ""
    """Folder of the ordinary datasets. The default is that of the scripts."""
    shards: str = ""
    """Folder of the 100M shards."""


def runs_of(experiments: Iterable[str]) -> list[Run]:
    """Returns the runs of several experiments."""
    runs = []
    for name in experiments:
        runs += EXPERIMENTS[name]()
    return runs


def line(run: Run, options: Options) -> list[str]:
    """Returns the command of a run, word by word."""
    flags = f"--env {run.env} --name {run.experiment}-{run.name} {run.flags}".split()
    flags += ["--run-dir", options.run_dir]
    data = options.dataset_dir
    if options.shards and f"{run.env}-play" in LARGE:
        data = options.shards
    if data and run.env not in ONLINE:
        flags += ["--dataset-dir", data]
    where = [f"{run.module}.py"]
    if "." in run.module:
        where = ["-m", run.module]
    return ["python", *where, *flags]


@functools.cache
def arguments(run: Run):
    """Returns a run's `Args`, as its script would have them."""
    script = importlib.import_module(run.module)
    words = ["--env", run.env, *shlex.split(run.flags)]
    defaults = configure(script.Args, script.ENV_DEFAULTS, run.env)
    return read_command_line(script.Args, defaults, words)


def steps(args) -> int:
    """Returns the length of a run: environment steps, or updates and environment steps."""
    if hasattr(args, "total_steps"):
        return args.total_steps
    return getattr(args, "offline_steps", 0) + args.online_steps


def complete(run: Run, options: Options) -> bool:
    """Says whether the run's last evaluation is there."""
    name = f"{run.experiment}-{run.name}"
    folder = Path(options.run_dir, run.module.split(".")[-1], run.env, name)
    table = read_csv(folder / "eval.csv")
    if not table:
        return False
    args = arguments(run)
    rollout = getattr(args, "rollout_steps", 1)  # PPO ends with a whole rollout.
    last = steps(args) // rollout * rollout
    return max(table["step"]) >= last


def split_seeds(run: Run, seeds_per_job: int) -> list[Run]:
    """Returns runs of a few seeds each, which together are the run."""
    num_seeds = int(re.search(r"--num-seeds (\d+)", run.flags)[1])
    parts = []
    for first in range(0, num_seeds, seeds_per_job):
        count = min(seeds_per_job, num_seeds - first)
        seeds = f"--seed {first} --num-seeds {count}"
        flags = re.sub(r"--num-seeds \d+", seeds, run.flags)
        parts.append(run._replace(name=f"{run.name}-seeds-{first}", flags=flags))
    return parts


def slurm(commands: list[str]) -> str:
    """Returns an array job that runs each command in a job of its own."""
    quoted = [f"    {shlex.quote(command)}" for command in commands]
    return "\n".join(
        [
            "#!/bin/bash",
            f"#SBATCH --array=0-{len(commands) - 1}",
            "#SBATCH --gpus=1 --cpus-per-task=16 --mem=64G --time=24:00:00 --requeue",
            "#SBATCH --signal=TERM@120",  # to the step: the run saves, the next job continues it
            "commands=(",
            *quoted,
            ")",
            'eval "srun ${commands[$SLURM_ARRAY_TASK_ID]}"',
        ]
    )


def listing(runs: list[Run]) -> str:
    """Returns Markdown with a row per experiment."""
    title = "| experiment | runs | agents | updates or steps, in millions | what |"
    rows = [title, "|---" * 5 + "|"]
    for name, maker in EXPERIMENTS.items():
        found = [arguments(run) for run in runs if run.experiment == name]
        agents = 0
        work = 0
        for args in found:
            num_agents = len(getattr(args, "tasks", (1,))) * args.num_seeds
            agents += num_agents
            work += num_agents * steps(args)
        about = " ".join(maker.__doc__.split())
        rows.append(f"| {name} | {len(found)} | {agents:,} | {work / 1e6:,.0f} | {about} |")
    return "\n".join(rows)


def main(options: Options) -> None:
    """Prints or runs the commands of the experiments."""
    unknown = sorted(set(options.only) - set(EXPERIMENTS))
    if unknown:
        known = ", ".join(EXPERIMENTS)
        raise UserError(f"no experiment {', '.join(unknown)}; choose from {known}")
    if options.list:
        print(listing(runs_of(EXPERIMENTS)))
        return
    if options.seeds_per_job < 1:
        raise UserError("--seeds-per-job must be at least 1")
    runs = runs_of(options.only or EXPERIMENTS)
    if options.slurm:
        runs = [part for run in runs for part in split_seeds(run, options.seeds_per_job)]
    todo = [run for run in runs if options.all or not complete(run, options)]
    commands = [line(run, options) for run in todo]
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are complete", file=sys.stderr)
    if options.run and not options.dry_run:
        for i, command in enumerate(commands):
            print(f"[{i + 1} of {len(commands)}] {shlex.join(command)}", flush=True)
            run_python(command[1:], cwd=ROOT)
    elif commands:
        texts = [shlex.join(command) for command in commands]
        if options.slurm:
            print(slurm(texts))
        else:
            print("\n".join(texts))


if __name__ == "__main__":
    run_program(main, Options, __doc__)
