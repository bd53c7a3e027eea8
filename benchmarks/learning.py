"""Learning runs on small networks, one command per committed table of results.

    python -m benchmarks.learning methods            every offline method, point maze, task 1
    python -m benchmarks.learning pointmaze          ME-AM, its ablations and QAM, tasks 1 to 5
    python -m benchmarks.learning cube               the same on cube-single (needs its dataset)
    python -m benchmarks.learning cube-task-1        the same on its task 1 alone
    python -m benchmarks.learning bfloat16-pointmaze --precision bfloat16 beside float32
    python -m benchmarks.learning bfloat16-cube      the same on cube-single, task 1
    python -m benchmarks.learning scene-50k --seeds 1          paper size, beside published curves
    python -m benchmarks.learning puzzle-3x3-50k --tasks 1 --only ifql --seeds 1      one of them
    python -m benchmarks.learning puzzle-3x3-small --seeds 3   QAM, ME-AM and edits, task 1
    python -m benchmarks.learning puzzle-4x4         paper size, rho, lambda, sigma_min: for a GPU
    python -m benchmarks.learning cube-double        the same
    python -m benchmarks.learning plane              every online method on multigoal
    python -m benchmarks.learning plane-ablations    FMER with one change at a time, on multigoal
    python -m benchmarks.learning plane-duals        FMER's two readings of the dual step
    python -m benchmarks.learning plane-dpmd         DPMD, and DPMD as published
    python -m benchmarks.learning halfcheetah        every online method but PPO, 100,000 steps
    python -m benchmarks.learning halfcheetah-300k   SAC and TD3, 300,000 steps
    python -m benchmarks.learning halfcheetah-rates  critics at 1e-3 and 3e-4, the other of each
    python -m benchmarks.learning kitchen-1-300k     FMER, SAC, DPMD, 300,000 steps (also -2)
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
from collections.abc import Sequence
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
from benchmarks import RESULTS, refuse_committed, run_python, write_rows
from common.environments import ONLINE
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
OFFLINE = " --offline-steps 16000"
FLOW = " --flow-steps 5"
# These complement QAM and ME-AM in cube-task-1. Values are the QAM paper's for cube-double or,
# where those reduce the method to plain QAM, for cube-triple. ReBRAC has no flow; RLPD has neither
# a flow nor an offline phase.
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
SMALL = "--hidden-dims 128 128 128 --batch-size 64"
SHORT = {"FMER": f"fmer {SMALL}", "SAC": "baselines.sac", "TD3": "baselines.td3"}
# An update of an agent on a CPU core: SAC-Flow 4 ms, FMER and FLAME 15, DIPO 17, DPMD 50, QVPO 105.
GENERATIVE = {
    "SAC-Flow": f"baselines.sac_flow {SMALL}",
    "FLAME": f"baselines.flame {SMALL}",
    "DIPO": f"baselines.dipo {SMALL}",
    "DPMD": f"baselines.dpmd {SMALL}",
    "QVPO": f"baselines.qvpo {SMALL}",
}
# Each with the learning rate of the critics that its defaults, which `halfcheetah` has, are not.
OTHER_RATES = {
    "FMER, 1e-3": f"{SHORT['FMER']} --critic-lr 1e-3",
    "SAC, 3e-4": f"{SHORT['SAC']} --critic-lr 3e-4",
    "TD3, 1e-3": f"{SHORT['TD3']} --critic-lr 1e-3",
}
FEW_TASKS = {  # the kitchen's with one and two tasks
    "FMER": SHORT["FMER"],
    "SAC": f"baselines.sac {SMALL}",
    "DPMD": GENERATIVE["DPMD"],
}
# Figures 2, 5 and 6 and Tables 10 to 15 of the FMER paper; of its fixed eta only three guesses.
FMER_ABLATIONS = {
    "FMER": "fmer",
    "top-1": "fmer --weights top1",
    "uniform weights": "fmer --weights uniform",
    "no entropy": "fmer --entropy-until 0",
    "no entropy from 7,000 on": "fmer --entropy-until 7000",
    "clip": "fmer --squash clip",
    "exact divergence": "fmer --divergence exact",
    "eta = 0.1": "fmer --eta-fixed 0.1",
    "eta = 0.5": "fmer --eta-fixed 0.5",
    "eta = 1": "fmer --eta-fixed 1",
    "4 candidates": "fmer --num-candidates 4",
    "16 candidates": "fmer --num-candidates 16",
    "5 steps": "fmer --flow-steps 5",
    "20 steps": "fmer --flow-steps 20",
    "midpoint rule": "fmer --solver rk2",
    "RK4": "fmer --solver rk4",
    "next states": "fmer --actor-states next",
}
COARSE = {"QAM": "qam", "ME-AM": "meam", "IFQL": "baselines.ifql"}
# With its own rho, ME-AM does not learn cube-single, and there would be nothing to compare.
COARSE_CUBE = {"QAM": "qam", "ME-AM, rho = 0": "meam --rho 0", "IFQL": "baselines.ifql"}
# Methods that leave the data's support in different ways, and two that do not (QAM, IFQL).
EXPANSIONS = {
    "QAM": "qam",
    "QAM-EDIT": "qam_edit",
    "FEdit": "baselines.fedit",
    "IFQL": "baselines.ifql",
    "ME-AM, rho = 0.1": "meam --rho 0.1",
    "ME-AM, rho = 0.3": "meam --rho 0.3",
    "ME-AM, rho = 0.5": "meam --rho 0.5",
    "ME-AM, rho = 0.3, tau = 1": "meam --rho 0.3 --inv-temp 1",
    "ME-AM, rho = 0.3, tau = 10": "meam --rho 0.3 --inv-temp 10",
    "ME-AM, rho = 0.3, lambda = 0.003": "meam --rho 0.3 --entropy-scale 0.003",
    "ME-AM, rho = 0.3, lambda = 0.3": "meam --rho 0.3 --entropy-scale 0.3",
    "QAM, K = 10": "qam --num-critics 10",
    "FEdit, K = 10": "baselines.fedit --num-critics 10",
    "ME-AM, rho = 0.3, K = 10": "meam --rho 0.3 --num-critics 10",
}
# An update of an agent takes 10 to 20 ms of a CPU core; the data take two cores 12 minutes or more.
PUZZLE = """--env puzzle-3x3 --collect 1000000 --hidden-dims 256 256 --num-critics 2
    --flow-steps 5 --batch-size 128 --lr 5e-4 --log-interval 1000 --offline-steps 60000
    --eval-interval 20000"""
DUALS = {"plain": "fmer", "Adam": "fmer --dual-optimizer adam"}
DPMD = {"DPMD": "baselines.dpmd", "as published": "baselines.dpmd --as-published"}
LARGE = "--collect 1000000 --offline-steps 300000"  # transitions; ordinary size, not the 100M set
# As many transitions as the hosted files have; the QAM paper's curves have a point at 50,000.
AT_50K = "--env {} --collect 1000000 --offline-steps 50000 --eval-interval 50000"
# the kitchen's four, MuJoCo's four
EIGHT_TASKS = [env for env in ONLINE if env not in ("multigoal", "online-ant-xy")]


def labelled(scripts: str) -> dict[str, str]:
    """Returns label -> script, from scripts separated by spaces: baselines.fql is fql."""
    return {script.split(".")[-1]: script for script in scripts.split()}


def in_both_precisions(commands: dict[str, str]) -> dict[str, str]:
    """Returns label -> command line, each followed by the same one with --precision bfloat16."""
    both = {}
    for label, command in commands.items():
        both[label] = command
        both[f"{label}, bfloat16"] = f"{command} --precision bfloat16"
    return both


def cube_methods() -> dict[str, str]:
    """Returns CUBE_METHODS with the flags OFFLINE and FLOW, where the method has them."""
    commands = {}
    for label, command in CUBE_METHODS.items():
        if label != "rlpd":
            command += OFFLINE
        if label not in ("rebrac", "rlpd"):
            command += FLOW
        commands[label] = command
    return commands


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
    "cube-methods": (cube_methods(), CUBE, (1,)),
    "bfloat16-pointmaze": (in_both_precisions(COARSE), "", (1,)),
    "bfloat16-cube": (in_both_precisions(COARSE_CUBE), CUBE + OFFLINE + FLOW, (1,)),
    "scene-50k": (labelled(METHODS), AT_50K.format("scene"), (1, 2, 3, 4, 5)),
    "puzzle-3x3-50k": (labelled(METHODS), AT_50K.format("puzzle-3x3"), (1, 2, 3, 4, 5)),
    "puzzle-3x3-small": (EXPANSIONS, PUZZLE, (1,)),
    "puzzle-4x4": (sweep(0.3), f"--env puzzle-4x4 {LARGE}", (1, 2, 3, 4, 5)),
    "cube-double": (sweep(0.01), f"--env cube-double {LARGE}", (1, 2, 3, 4, 5)),
    "plane": (labelled(NINE), "--env multigoal", ()),
    "plane-ablations": (FMER_ABLATIONS, "--env multigoal", ()),
    "plane-duals": (DUALS, "--env multigoal", ()),
    "plane-dpmd": (DPMD, "--env multigoal", ()),
}
FEW = "--env {} --total-steps {} --warmup-steps 5000"
SUITES |= {
    "halfcheetah": (SHORT | GENERATIVE, FEW.format("halfcheetah", 100_000), ()),
    "halfcheetah-300k": (
        {label: SHORT[label] for label in ("SAC", "TD3")},
        FEW.format("halfcheetah", 300_000),
        (),
    ),
    "halfcheetah-rates": (OTHER_RATES, FEW.format("halfcheetah", 100_000), ()),
    "kitchen-1-300k": (FEW_TASKS, FEW.format("kitchen-1", 300_000), ()),
    "kitchen-2-300k": (FEW_TASKS, FEW.format("kitchen-2", 300_000), ()),
    "hopper": (SHORT, FEW.format("hopper", 30_000), ()),
    "kitchen": (SHORT, FEW.format("kitchen-7", 30_000), ()),
}
KITCHENS = [env for env in EIGHT_TASKS if "kitchen" in env]
ROBOTS = [env for env in EIGHT_TASKS if "kitchen" not in env]
SUITES |= {env: (labelled(NINE), f"--env {env}", ()) for env in KITCHENS}
SUITES |= {f"mujoco-{env}": (labelled(NINE), f"--env {env}", ()) for env in ROBOTS}


@dataclasses.dataclass(frozen=True)
class Options:
    suite: Annotated[str, tyro.conf.Positional]
    """What to run: methods, pointmaze, cube, halfcheetah, ..."""
    seeds: int = 4
    """Seeds of each task: 0, 1, ..."""
    only: tuple[str, ...] = ()
    """Labels to run. The default is all."""
    tasks: tuple[int, ...] = ()
    """Tasks of an offline suite to run. The default is all that it has."""
    more: str = ""
    """Further flags of all runs, such as those of a trial in another --out: --more="--lr 1e-3"."""
    dataset_dir: str = ""
    """Folder where the scripts find or make the datasets."""
    run_dir: str = "runs/learning"
    """Folder where the run folders are kept."""
    table: bool = False
    """Run nothing, and print the table of what is committed."""
    out: str = str(RESULTS)
    """Folder of the CSV and JSON files."""


def command_line(command: str, flags: str) -> list[str]:
    """Returns [module, flags ...]: those of the suite first, so that a label's own have the last
    word."""
    module, *own = shlex.split(command)
    return [module, *shlex.split(flags), *own]


def launch(line: list[str]) -> None:
    """Runs a script of this repository in a process of its own: [module, flags ...]."""
    folders = [str(ROOT)]
    if os.environ.get("PYTHONPATH"):
        folders.append(os.environ["PYTHONPATH"])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    run_python(["-m", *line], env=environment)


def configuration(folder: Path) -> dict:
    """Returns config.json of a run with only those packages that matter."""
    config = json.loads((folder / "config.json").read_text())
    packages = config["made_with"]["packages"]
    config["made_with"]["packages"] = {name: packages[name] for name in VERSIONS}
    return config


def portable(folder: Path) -> dict:
    """Returns `configuration` without what only this machine has."""
    config = configuration(folder)
    for flag in ("name", "run_dir", "dataset_dir"):
        config["flags"].pop(flag, None)
    return config


def run(
    label: str, command: str, options: Options, flags: str, tasks: tuple[int, ...]
) -> tuple[dict, list[dict]]:
    """Runs a script. Returns its command line with its configuration, and its evaluations."""
    words = label.replace(",", "").replace(" = ", " ").split()
    name = "-".join([options.suite, *words])
    line = command_line(command, flags)
    module = line[0]
    shown = shlex.join(["python", "-m", *line])
    line += ["--num-seeds", str(options.seeds), "--name", name, "--run-dir", options.run_dir]
    if tasks:
        line += ["--tasks", *map(str, tasks)]
        if options.dataset_dir:
            line += ["--dataset-dir", options.dataset_dir]
    launch(line)
    (folder,) = Path(options.run_dir, module.split(".")[-1]).glob(f"*/{name}")
    rows = read_rows(folder / "eval.csv")
    config = portable(folder)
    config["made_with"]["cores"] = len(os.sched_getaffinity(0))
    return dict(command=shown, config=config), [dict(label=label, **row) for row in rows]


def reported(steps: np.ndarray, returns: np.ndarray) -> tuple[float, float]:
    """Returns the FMER paper's number: mean and deviation (n - 1) over seeds of the best evaluation
    in the last tenth of the steps. steps (n,), returns (seeds, n)."""
    last = steps >= 0.9 * steps.max()
    best = returns[:, last].max(1)
    if len(best) == 1:
        return float(best[0]), 0.0
    return float(best.mean()), float(best.std(ddof=1))


def online_table(rows: list[dict]) -> str:
    """Returns Markdown with a row per label: steps, the return after each third of them as mean
    [interval], and `reported`."""
    lines = [["", "steps", "return at 1/3", "at 2/3", "at the end", "reported"]]
    for label, domains in organise(rows, "return").items():
        (scores,) = domains.values()
        steps = scores.steps
        returns = np.concatenate(list(scores.by_task.values()))  # (seeds, n)
        cells = []
        for share in (1 / 3, 2 / 3, 1):
            nearest = np.argmin(abs(steps - steps[-1] * share))
            cells.append(cell(interval([returns[:, nearest]]), 1, len(returns)))
        best, deviation = reported(steps, returns)
        text = f"{best:.1f}"
        if len(returns) > 1:
            text = f"{text} ({deviation:.1f})"
        lines.append([label, f"{steps[-1]:,}", *cells, text])
    return markdown(lines)


def table(rows: list[dict]) -> str:
    """Returns Markdown with a row per label: success per task and over all, and episode length."""
    if "success" not in rows[0]:
        return online_table(rows)
    success = organise(rows, "success")
    length = organise(rows, "length")
    columns = panels(success, "task", "success")
    lines = [["", *columns, "episode length"]]
    for label, row in summaries(success, columns).items():
        cells = []
        for entry in row.values():
            cells.append(cell(entry.numbers, seeds=entry.seeds) if entry else "")
        (lengths,) = length[label].values()
        last = np.concatenate([scores[:, -1] for scores in lengths.by_task.values()])
        lines.append([label, *cells, f"{last.mean():.0f}"])
    return markdown(lines)


def kept(out: str, suite: str) -> tuple[list[dict], dict]:
    """Reads the rows of <suite>.csv and the runs of <suite>.json, which earlier calls wrote."""
    results = Path(out, f"{suite}.csv")
    if not results.exists():
        return [], {}
    notes = Path(out, f"{suite}.json")
    return read_rows(results), json.loads(notes.read_text())


def keep(
    out: str,
    suite: str,
    label: str,
    note: dict,
    new: list[dict],
    order: Sequence[str] = (),
) -> list[dict]:
    """Writes a label's rows and note in addition to those of other labels, and returns all rows.

    They are in the order of the labels, if it is given.
    """
    rows, runs = kept(out, suite)
    rows = [row for row in rows if row["label"] != label] + new
    if order:
        rows = sorted(rows, key=lambda row: order.index(row["label"]))
    write_rows(Path(out, f"{suite}.csv"), rows)
    Path(out, f"{suite}.json").write_text(json.dumps(runs | {label: note}, indent=1) + "\n")
    return rows


def main(options: Options) -> None:
    """Runs a suite, and prints its table."""
    if options.suite not in SUITES:
        raise UserError(f"there is no suite {options.suite}; choose one of {', '.join(SUITES)}")
    commands, flags, tasks = SUITES[options.suite]
    if options.more:
        refuse_committed(options.out, "--more")
        flags = f"{flags} {options.more}"
    if options.tasks and not tasks:
        raise UserError(f"{options.suite} has no tasks: leave out --tasks")
    if tasks and options.tasks:
        tasks = options.tasks
    unknown = set(options.only) - set(commands)
    if unknown:
        raise UserError(f"no label {', '.join(unknown)}; choose from {', '.join(commands)}")
    rows, _ = kept(options.out, options.suite)
    labels = options.only or commands
    if options.table:
        labels = ()
    for label in labels:
        found = run(label, commands[label], options, flags, tasks)
        rows = keep(options.out, options.suite, label, *found, order=list(commands))
    print(table(rows) if rows else "nothing was run")


if __name__ == "__main__":
    run_program(main, Options, __doc__)
