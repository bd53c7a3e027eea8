"""The papers' experiments as commands, one per line.

    python benchmarks/reproduce.py --list                     names, runs, agents, updates
    python benchmarks/reproduce.py --only meam-table1         prints commands of incomplete runs
    python benchmarks/reproduce.py --only qam-table1 | parallel -j 1
    python benchmarks/reproduce.py --only fmer-table2 --slurm > jobs.sh && sbatch jobs.sh
    python benchmarks/reproduce.py --only meam-table1 --run   runs them here, one after the other

A run is an environment with all its tasks and seeds, in one process (docs/scale.md: on several GPUs
or hosts). Commands continue a run that was interrupted; one that is complete is not listed again,
but with --all. The runs of qam-online begin with those of qam-table1. Domains of 100M transitions
(puzzle-4x4, cube-quadruple) take their shards from --shards, or else the ordinary dataset.
"""

import dataclasses
import importlib
import shlex
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from analysis.command_line import run_program  # noqa: E402
from analysis.panels import DOMAINS  # noqa: E402
from analysis.runs import read_csv  # noqa: E402
from benchmarks.learning import EIGHT_TASKS, METHODS, NINE, labelled  # noqa: E402 (run as a script)
from common.data import LARGE  # noqa: E402
from common.envs import ONLINE  # noqa: E402
from common.errors import UserError  # noqa: E402
from common.run import configure  # noqa: E402

OTHER_DATA = """antmaze-large-stitch humanoidmaze-medium-stitch scene-noisy puzzle-3x3-noisy
    cube-double-noisy cube-triple-noisy""".split()
TASKS, TWELVE, EIGHT, FIVE = "--tasks 1 2 3 4 5", "--num-seeds 12", "--num-seeds 8", "--num-seeds 5"

Run = namedtuple("Run", "experiment module env name flags")  # flags: of the script, a string


def offline(experiment, seeds, more=""):
    """All methods of the QAM paper's comparison on its ten domains."""
    for env in DOMAINS:
        for name, module in list(labelled(METHODS).items())[1:]:  # all but ME-AM
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
    variants |= {f"T{steps}": f"--flow-steps {steps}" for steps in (1, 3, 20, 30)}
    for env in DOMAINS:
        tau = tuned[env]["inv_temp"]
        taus = {f"tau-x{x:g}": f"--inv-temp {x * tau:g}" for x in (0.1, 0.3, 3, 10)}
        task = 1 if "maze" in env else 2
        for name, flags in (variants | taus).items():
            flags = f"{flags} --tasks {task} {TWELVE} --online-steps 500000"
            yield Run("qam-sensitivity", "qam_edit", env, name, flags)


def qam_quality():
    """Li and Levine, data quality: stitch data for locomotion, noisy data for manipulation."""
    scripts, flags = labelled(METHODS), f"{TASKS} {TWELVE} --online-steps 500000"
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


def fmer_ablations():
    """Gao et al., Tables 10 to 15 and Figures 2, 5 and 6: one change at a time. The values of a
    fixed eta, and when the entropy is switched off late, are lost: 0.1, 0.5, 1 and 700,000."""
    everywhere = {f"eta-{eta}": f"--eta-fixed {eta}" for eta in (0.1, 0.5, 1)}
    everywhere |= {"no-entropy": "--entropy-until 0", "no-entropy-late": "--entropy-until 700000"}
    everywhere |= {"uniform": "--weights uniform", "top1": "--weights top1"}
    walker = {"exact": "--divergence exact"} | {f"T{T}": f"--flow-steps {T}" for T in (5, 20, 50)}
    for solver, T in (("rk2", 10), ("rk4", 10), ("rk2", 5), ("rk4", 2)):
        walker[f"{solver}-T{T}"] = f"--solver {solver} --flow-steps {T}"
    candidates = {f"N{N}": f"--num-candidates {N}" for N in (4, 16, 32)}
    clip = {"clip": "--squash clip"}
    changes = {env: everywhere | ({} if "kitchen" in env else clip) for env in EIGHT_TASKS}
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


MAKERS = (qam_table1, qam_online, qam_sensitivity, qam_quality, meam_table1, meam_figure2,
          meam_figure3, fmer_table2, fmer_ablations, fmer_figure3)  # fmt: skip
EXPERIMENTS = {maker.__name__.replace("_", "-"): maker for maker in MAKERS}


@dataclasses.dataclass(frozen=True)
class Options:
    only: tuple[str, ...] = ()  # experiments (default: all)
    list: bool = False  # what there is
    dry_run: bool = False  # print the commands even with --run
    run: bool = False  # run them here, one after the other
    slurm: bool = False  # print an array job instead
    all: bool = False  # complete runs, too
    run_dir: str = "runs"  # where the run folders are
    dataset_dir: str = ""  # of the ordinary datasets (default: as for the scripts)
    shards: str = ""  # folder of the 100M shards


def line(run, options):
    """The command of a run, as a list."""
    flags = f"--env {run.env} --name {run.experiment}-{run.name} {run.flags}".split()
    flags += ["--run-dir", options.run_dir]
    data = options.shards if options.shards and f"{run.env}-play" in LARGE else options.dataset_dir
    if data and run.env not in ONLINE:
        flags += ["--dataset-dir", data]
    where = [f"{run.module}.py"] if "." not in run.module else ["-m", run.module]
    return ["python", *where, *flags]


def arguments(run):
    """A run's `Args`, as its script would have them."""
    script, words = importlib.import_module(run.module), shlex.split(run.flags)
    args = configure(script.Args, script.ENV_DEFAULTS, run.env)
    return tyro.cli(script.Args, args=["--env", run.env, *words], default=args)


def steps(args):
    """Length of a run."""
    return getattr(args, "total_steps", 0) or getattr(args, "offline_steps", 0) + args.online_steps


def complete(run, options):
    """Whether the run's last evaluation is there."""
    name = f"{run.experiment}-{run.name}"
    folder = Path(options.run_dir, run.module.split(".")[-1], run.env, name)
    table = read_csv(folder / "eval.csv")
    rollout = getattr(args := arguments(run), "rollout_steps", 1)  # PPO ends with a whole rollout
    return bool(table) and max(table["step"]) >= steps(args) // rollout * rollout


def slurm(commands):
    """An array job with an element per command."""
    return "\n".join([
        "#!/bin/bash",
        f"#SBATCH --array=0-{len(commands) - 1}",
        "#SBATCH --gpus=1 --cpus-per-task=16 --mem=64G --time=24:00:00 --requeue",
        "#SBATCH --signal=TERM@120",  # to the step: the run saves, the next job continues it
        "commands=(", *(f"    {shlex.quote(command)}" for command in commands), ")",
        'eval "srun ${commands[$SLURM_ARRAY_TASK_ID]}"',
    ])  # fmt: skip


def listing(runs):
    """Markdown: a row per experiment."""
    title = "| experiment | runs | agents | updates or steps, in millions | what |"
    rows = [title, "|---" * 5 + "|"]
    for name, maker in EXPERIMENTS.items():
        found = [arguments(run) for run in runs if run.experiment == name]
        count = [len(getattr(args, "tasks", (1,))) * args.num_seeds for args in found]
        work = sum(n * steps(args) for n, args in zip(count, found)) / 1e6
        about = " ".join(maker.__doc__.split())
        rows.append(f"| {name} | {len(found)} | {sum(count):,} | {work:,.0f} | {about} |")
    return "\n".join(rows)


def main(options):
    if unknown := set(options.only) - set(EXPERIMENTS):
        known = ", ".join(EXPERIMENTS)
        raise UserError(f"no experiment {', '.join(sorted(unknown))}; choose from {known}")
    chosen = options.only or tuple(EXPERIMENTS)
    runs = [run for name in chosen for run in EXPERIMENTS[name]()]
    if options.list:
        return print(listing([run for maker in MAKERS for run in maker()]))
    todo = [run for run in runs if options.all or not complete(run, options)]
    commands = [line(run, options) for run in todo]
    if len(todo) < len(runs):
        print(f"{len(runs) - len(todo)} of {len(runs)} runs are complete", file=sys.stderr)
    if options.run and not options.dry_run:
        for i, command in enumerate(commands):
            print(f"[{i + 1} of {len(commands)}] {shlex.join(command)}", flush=True)
            subprocess.run([sys.executable, *command[1:]], cwd=ROOT, check=True)
    elif commands:
        texts = [shlex.join(command) for command in commands]
        print(slurm(texts) if options.slurm else "\n".join(texts))


if __name__ == "__main__":
    run_program(main, Options, __doc__)
