"""Learning runs on small networks, one command per committed table of results.

    python -m benchmarks.learning methods            every offline method, point maze, task 1
    python -m benchmarks.learning pointmaze          ME-AM, its ablations and QAM, tasks 1 to 5
    python -m benchmarks.learning cube               the same on cube-single (needs its dataset)
    python -m benchmarks.learning cube-task-1        the same on its task 1 alone
    python -m benchmarks.learning puzzle-4x4         paper size, rho, lambda, sigma_min: for a GPU
    python -m benchmarks.learning cube-double        the same
    python -m benchmarks.learning plane              every online method on multigoal
    python -m benchmarks.learning halfcheetah        FMER (small networks), SAC, TD3, 100,000 steps
    python -m benchmarks.learning halfcheetah-300k   SAC and TD3, 300,000 steps
    python -m benchmarks.learning hopper             FMER, SAC, TD3, 30,000 steps
    python -m benchmarks.learning kitchen            the same on kitchen-7
    python -m benchmarks.learning mujoco-halfcheetah paper size, 1M steps, all nine: for a GPU
    python -m benchmarks.learning kitchen-1          that (also -2, -4, -7, mujoco-hopper, ...)
    python -m benchmarks.learning pointmaze --table  only prints the table of the committed results

A run that is complete is not run again, and an interrupted one continues. All evaluations go to
benchmarks/results/<suite>.csv; commands, flags, versions, device and seconds to <suite>.json. The
table shows the last evaluation: mean success over seeds [95 % bootstrap interval over seeds]; of
the online methods the return, and the FMER paper's statistic: the best evaluation of each seed
within the last tenth of the steps, mean (standard deviation) over seeds.
"""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from analysis.command_line import run_program
from analysis.evaluations import organise
from analysis.panels import panels
from analysis.runs import ROOT, read_rows
from analysis.statistics import interval
from analysis.tables import cell, markdown, summaries
from benchmarks import write_rows
from common.envs import ONLINE
from common.errors import UserError

METHODS = """meam qam qam_edit qam_fql baselines.bam baselines.fbrac baselines.fql baselines.fawac
    baselines.dac baselines.qsm baselines.dsrl baselines.fedit baselines.ifql baselines.rebrac"""
GUIDANCE = ("plain", "mse", "linex")
ABLATIONS = {  # label -> command line
    "QAM": "qam",
    "ME-AM": "meam",
    "ME-AM, rho = 0": "meam --rho 0",
    "ME-AM, lambda = 0": "meam --entropy-scale 0",
    "ME-AM, w = 0.5": "meam --path-weight 0.5",
    "ME-AM, noisy expansion": "meam --noisy-expansion",
}
VERSIONS = "jax jaxlib flax optax numpy ogbench mujoco gymnasium".split()
CUBE = """--env cube-single-play-singletask-v0 --hidden-dims 256 256 --num-critics 2
    --batch-size 128 --lr 5e-4 --log-interval 1000 --eval-interval 16000 --eval-slots 1"""
OFFLINE, FLOW = " --offline-steps 16000", " --flow-steps 5"
# Beside QAM and ME-AM in cube-task-1: the QAM paper's values for cube-double or, where these make
# it QAM, for cube-triple. ReBRAC has no flow, RLPD neither that nor an offline phase.
CUBE_METHODS = {
    "behaviour cloning": "qam --inv-temp 0",
    "qam_edit": "qam_edit --edit-scale 0.1",
    "qam_fql": "qam_fql --fql-alpha 300",
    "bam": "baselines.bam --inv-temp 10",
    "fbrac": "baselines.fbrac --fbrac-alpha 0.1",
    "fql": "baselines.fql --fql-alpha 300",
    "fawac": "baselines.fawac --inv-temp 0.8",
    "dac": "baselines.dac --bc-coef 3",
    "qsm": "baselines.qsm --bc-coef 10",
    "dsrl": "baselines.dsrl",
    "fedit": "baselines.fedit --edit-scale 0.2",
    "ifql": "baselines.ifql",
    "rebrac": "baselines.rebrac",
    "cgql plain": "baselines.cgql --inv-temp 10 --guidance-coef 0.01",
    "cgql mse": "baselines.cgql --guidance mse --inv-temp 10 --guidance-coef 0.01"
    " --noisy-coef 0.001",
    "cgql linex": "baselines.cgql --guidance linex --inv-temp 10 --guidance-coef 0.01"
    " --noisy-coef 0.001",
    "rlpd": "baselines.rlpd --rlpd-alpha 0.1 --online-steps 16000 --start-training 1000",
}
SWEEP = {"QAM": "qam"} | {f"ME-AM, rho = {rho}": f"meam --rho {rho}" for rho in (0, 0.1, 0.3, 0.5)}
SWEEP |= {
    "ME-AM, rho = 0.3, lambda x 0.3": "meam --rho 0.3 --entropy-scale {low}",
    "ME-AM, rho = 0.3, lambda x 3": "meam --rho 0.3 --entropy-scale {high}",
    "ME-AM, rho = 0.3, sigma_min = 0.05": "meam --rho 0.3 --sigma-min 0.05",
    "ME-AM, rho = 0.3, sigma_min = 0.2": "meam --rho 0.3 --sigma-min 0.2",
}


def sweep(entropy_scale):
    """The sweep around an environment's own lambda."""
    scales = dict(low=f"{0.3 * entropy_scale:g}", high=f"{3 * entropy_scale:g}")
    return {label: command.format(**scales) for label, command in SWEEP.items()}


NINE = """fmer baselines.sac baselines.td3 baselines.ppo baselines.dipo baselines.dpmd
    baselines.qvpo baselines.sac_flow baselines.flame"""
SMALL = "fmer --hidden-dims 128 128 128 --batch-size 64"  # an update on a CPU core in 15 to 30 ms
SHORT = {"FMER": SMALL, "SAC": "baselines.sac", "TD3": "baselines.td3"}
LARGE = "--collect 1000000 --offline-steps 300000"  # transitions; ordinary size, not the 100M set
# the kitchen's four, MuJoCo's four
EIGHT_TASKS = [env for env in ONLINE if env not in ("multigoal", "online-ant-xy")]
labelled = lambda scripts: {script.split(".")[-1]: script for script in scripts.split()}
SUITES = {  # suite -> (label -> command line, flags of all, tasks)
    "methods": (
        {"behaviour cloning": "qam --inv-temp 0"}
        | labelled(METHODS)
        | {f"cgql {mode}": f"baselines.cgql --guidance {mode}" for mode in GUIDANCE}
        | {"rlpd": "baselines.rlpd"},
        "",
        (1,),
    ),
    "pointmaze": (ABLATIONS, "--offline-steps 10000 --eval-interval 10000", (1, 2, 3, 4, 5)),
    "cube": (ABLATIONS, CUBE + OFFLINE + FLOW, (1, 2, 3, 4, 5)),
    "cube-task-1": (
        ABLATIONS
        | {"ME-AM, rho = 0.02": "meam --rho 0.02"}
        | {"ME-AM, rho = 0, lambda = 0.05": "meam --rho 0 --entropy-scale 0.05"},
        CUBE + OFFLINE + FLOW,
        (1,),
    ),
    "cube-methods": (
        {
            label: line + OFFLINE * (label != "rlpd") + FLOW * (label not in ("rebrac", "rlpd"))
            for label, line in CUBE_METHODS.items()
        },
        CUBE,
        (1,),
    ),
    "puzzle-4x4": (sweep(0.3), f"--env puzzle-4x4 {LARGE}", (1, 2, 3, 4, 5)),
    "cube-double": (sweep(0.01), f"--env cube-double {LARGE}", (1, 2, 3, 4, 5)),
    "plane": (labelled(NINE), "--env multigoal", ()),
}
FEW = "--env {} --total-steps {} --warmup-steps 5000"
SUITES |= {
    "halfcheetah": (SHORT, FEW.format("halfcheetah", 100_000), ()),
    "halfcheetah-300k": (
        {label: SHORT[label] for label in ("SAC", "TD3")},
        FEW.format("halfcheetah", 300_000),
        (),
    ),
    "hopper": (SHORT, FEW.format("hopper", 30_000), ()),
    "kitchen": (SHORT, FEW.format("kitchen-7", 30_000), ()),
}
SUITES |= {
    env if "kitchen" in env else f"mujoco-{env}": (labelled(NINE), f"--env {env}", ())
    for env in EIGHT_TASKS
}


@dataclasses.dataclass(frozen=True)
class Options:
    suite: Annotated[str, tyro.conf.Positional]  # methods, pointmaze, cube, halfcheetah, ...
    seeds: int = 4  # per task: 0, 1, ...
    only: tuple[str, ...] = ()  # labels to run (default: all)
    dataset_dir: str = ""  # where the scripts find or make the datasets
    run_dir: str = "runs/learning"  # where the run folders are kept
    table: bool = False  # run nothing, print the table of what is committed
    out: str = str(ROOT / "benchmarks/results")  # folder of CSV and JSON


def launch(line):
    """Runs a script of this repository in a process of its own: [module, flags ...]."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    subprocess.run([sys.executable, "-m", *line], check=True, env=os.environ | {"PYTHONPATH": path})


def configuration(folder):
    """config.json of a run: of the packages, those that matter."""
    config = json.loads((folder / "config.json").read_text())
    packages = config["made_with"]["packages"]
    config["made_with"]["packages"] = {name: packages[name] for name in VERSIONS}
    return config


def portable(folder):
    """`configuration` without what is of this machine."""
    config = configuration(folder)
    for flag in ("name", "run_dir", "dataset_dir"):
        config["flags"].pop(flag, None)
    return config


def run(label, command, options, flags, tasks):
    """One run of a script. Returns its command line, configuration and evaluations."""
    module, *own = shlex.split(command)
    name = f"{options.suite}-{'-'.join(c for c in label.replace(',', '').split() if c != '=')}"
    line = [module, *shlex.split(flags), *own]
    line += ["--tasks", *map(str, tasks)] if tasks else []
    line += ["--num-seeds", str(options.seeds), "--name", name, "--run-dir", options.run_dir]
    line += ["--dataset-dir", options.dataset_dir] if options.dataset_dir and tasks else []
    launch(line)
    (folder,) = Path(options.run_dir, module.split(".")[-1]).glob(f"*/{name}")
    rows = read_rows(folder / "eval.csv")
    config = portable(folder)
    config["made_with"]["cores"] = len(os.sched_getaffinity(0))
    shown = shlex.join(["python", "-m", module, *shlex.split(flags), *own])
    return dict(command=shown, config=config), [dict(label=label, **row) for row in rows]


def reported(steps, returns):
    """The FMER paper's number: per seed, the maximum of the evaluations in the last tenth of the
    steps. steps (n,), returns (seeds, n) -> mean and deviation (n - 1) over seeds."""
    best = returns[:, steps >= 0.9 * steps.max()].max(1)
    return float(best.mean()), float(best.std(ddof=1)) if len(best) > 1 else 0.0


def online_table(rows):
    """Markdown: a row per label; steps, return after each third of them (mean [interval]), and
    `reported`."""
    lines = [["", "steps", "return at 1/3", "at 2/3", "at the end", "reported"]]
    for label, (own,) in ((label, x.values()) for label, x in organise(rows, "return").items()):
        steps, returns = own[0], np.concatenate([*own[1].values()])  # (seeds, n)
        thirds = [np.argmin(abs(steps - steps[-1] * share)) for share in (1 / 3, 2 / 3, 1)]
        cells = [cell(interval([returns[:, i]]), 1, len(returns)) for i in thirds]
        best, deviation = reported(steps, returns)
        cells.append(f"{best:.1f}" + f" ({deviation:.1f})" * (len(returns) > 1))
        lines.append([label, f"{steps[-1]:,}", *cells])
    return markdown(lines)


def table(rows):
    """Markdown: a row per label; success per task and over all, mean [interval]; length."""
    if "success" not in rows[0]:
        return online_table(rows)
    success, length = organise(rows, "success"), organise(rows, "length")
    columns = panels(success, "task", "success")
    lines = [["", *columns, "episode length"]]
    for label, row in summaries(success, columns).items():
        cells = [cell(x[1], seeds=x[2]) if x else "" for x in row.values()]
        last = np.concatenate([x[:, -1] for x in length[label][""][1].values()])
        lines.append([label, *cells, f"{last.mean():.0f}"])
    return markdown(lines)


def kept(out, suite):
    """Rows of <suite>.csv and runs of <suite>.json, of earlier calls."""
    results, notes = (Path(out, f"{suite}.{end}") for end in ("csv", "json"))
    return (read_rows(results), json.loads(notes.read_text())) if results.exists() else ([], {})


def keep(out, suite, label, run, new, order=()):
    """Puts a label's rows and run beside those of other labels (in the order of the labels, where
    it is given). Returns all rows."""
    rows, runs = kept(out, suite)
    rows = [row for row in rows if row["label"] != label] + new
    rows = sorted(rows, key=lambda row: order.index(row["label"]) if order else 0)
    write_rows(Path(out, f"{suite}.csv"), rows)
    Path(out, f"{suite}.json").write_text(json.dumps(runs | {label: run}, indent=1) + "\n")
    return rows


def main(options):
    if options.suite not in SUITES:
        raise UserError(f"there is no suite {options.suite}; choose one of {', '.join(SUITES)}")
    commands, flags, tasks = SUITES[options.suite]
    if unknown := set(options.only) - set(commands):
        raise UserError(f"no label {', '.join(unknown)}; choose from {', '.join(commands)}")
    rows, _ = kept(options.out, options.suite)
    for label in () if options.table else options.only or commands:
        found = run(label, commands[label], options, flags, tasks)
        rows = keep(options.out, options.suite, label, *found, order=list(commands))
    print(table(rows) if rows else "nothing was run")


if __name__ == "__main__":
    run_program(main, Options, __doc__)
