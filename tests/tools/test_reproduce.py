"""The papers' experiments as commands: which there are, that every script takes its flags, which
are complete, and what comes out."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import reproduce
from common.errors import UserError
from tools.shared_blocks import ROOT

ALL = [run for maker in reproduce.MAKERS for run in maker()]
OPTIONS = reproduce.Options()


def of(name):
    return [run for run in ALL if run.experiment == name]


def test_what_there_is():
    """Methods times domains, as the papers count them."""
    assert len(of("qam-table1")) == 16 * 10  # QAM's three, ten baselines, three of CGQL
    assert len(of("qam-online")) == 17 * 10 and len(of("qam-quality")) == 7 * 6
    assert len(of("qam-sensitivity")) == 11 * 10 and len(of("meam-table1")) == 4 * 2
    assert len(of("fmer-table2")) == 9 * 8
    assert len({(run.module, run.env, run.experiment, run.name) for run in ALL}) == len(ALL)


def test_every_script_takes_its_flags():
    """All of them parse; tasks, seeds and lengths are the papers'."""
    seeds = dict(qam=12, meam=8, fmer=5)
    for run in ALL:
        args = reproduce.arguments(run)
        assert args.env == run.env and args.num_seeds == seeds[run.experiment.partition("-")[0]]
        if run.experiment in ("qam-table1", "meam-table1"):
            assert args.tasks == (1, 2, 3, 4, 5) and reproduce.steps(args) == 1_000_000
        if run.experiment == "fmer-table2":
            assert reproduce.steps(args) == 1_000_000
    scene = [run for run in of("qam-sensitivity") if run.env == "scene"]
    scene = {run.name: reproduce.arguments(run) for run in scene}
    assert scene["tau-x3"].inv_temp == pytest.approx(3 * scene["default"].inv_temp)
    assert scene["default"].tasks == (2,)


def test_the_command():
    """As the documents have it: the whole list of runs, as shell lines."""
    command = "python benchmarks/reproduce.py --only meam-table1 --dry-run".split()
    line = [sys.executable, *command[1:]]
    output = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.splitlines() == [
        f"python {script}.py --env {env} --name meam-table1-{script} --tasks 1 2 3 4 5 "
        "--num-seeds 8 --run-dir runs"
        for env in ("puzzle-4x4", "cube-triple")
        for script in ("meam", "qam", "qam_edit", "qam_fql")
    ]


def test_baselines_are_modules_and_shards_are_for_large_domains():
    options = reproduce.Options(dataset_dir="small", shards="large")
    for run in of("qam-table1"):
        line = reproduce.line(run, options)
        baseline = run.module.startswith("baselines.")
        assert line[1:3] == ["-m", run.module] if baseline else line[1] == f"{run.module}.py"
        large = run.env in ("puzzle-4x4", "cube-quadruple")
        assert line[-2:] == ["--dataset-dir", "large" if large else "small"]
    assert "--dataset-dir" not in reproduce.line(of("fmer-table2")[0], options)


def finished(folder, run, step):
    path = Path(folder, run.module.split(".")[-1], run.env, f"{run.experiment}-{run.name}")
    path.mkdir(parents=True, exist_ok=True)
    (path / "eval.csv").write_text(f"task,seed,step,seconds,x\n1,0,50000,1,0\n1,0,{step},2,0\n")


def test_complete_runs_are_left_out(tmp_path, capsys):
    """By their last evaluation; PPO's run ends with the last whole rollout."""
    runs = of("meam-table1")
    options = reproduce.Options(only=("meam-table1",), run_dir=str(tmp_path))
    finished(tmp_path, runs[0], 950_000)
    finished(tmp_path, runs[1], 1_000_000)
    reproduce.main(options)
    output = capsys.readouterr()
    assert output.out.splitlines()[0].startswith("python meam.py --env puzzle-4x4")
    assert output.out.splitlines()[1].startswith("python qam_edit.py --env puzzle-4x4")
    assert len(output.out.splitlines()) == 7 and "1 of 8 runs are complete" in output.err
    reproduce.main(reproduce.Options(only=("meam-table1",), run_dir=str(tmp_path), all=True))
    assert len(capsys.readouterr().out.splitlines()) == 8
    (ppo,) = [run for run in of("fmer-table2") if (run.env, run.name) == ("hopper", "ppo")]
    args = reproduce.arguments(ppo)
    finished(tmp_path, ppo, args.total_steps // args.rollout_steps * args.rollout_steps)
    assert args.total_steps % args.rollout_steps and reproduce.complete(ppo, options)


def test_run_goes_one_by_one(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(reproduce, "run_python", lambda words, cwd: called.append(words))
    flags = dict(only=("fmer-figure3",), run_dir=str(tmp_path))
    reproduce.main(reproduce.Options(run=True, dry_run=True, **flags))
    assert not called
    reproduce.main(reproduce.Options(run=True, **flags))
    assert len(called) == 3 and called[1][:2] == ["-m", "baselines.sac"]


def test_array_job(tmp_path, capsys):
    """Job i of the array runs command i, quotes and all: a few seeds of a run."""
    flags = dict(only=("fmer-figure3",), run_dir=f"{tmp_path}/a b", slurm=True, seeds_per_job=3)
    reproduce.main(reproduce.Options(**flags))
    job = capsys.readouterr().out
    assert "#SBATCH --array=0-5\n" in job
    shell = 'python() { printf "%s|" "$@"; }\nsrun() { "$@"; }\nSLURM_ARRAY_TASK_ID=5\n' + job
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    words = done.stdout.split("|")
    assert words[:4] == ["-m", "baselines.dpmd", "--env", "multigoal"]
    assert words[4:10] == ["--name", "fmer-figure3-dpmd-seeds-3", "--seed", "3", "--num-seeds", "2"]
    assert words[-2] == f"{tmp_path}/a b"


@pytest.mark.parametrize("seeds_per_job", [1, 4, 5, 7])
def test_parts_of_a_run(tmp_path, capsys, seeds_per_job):
    """Together they have each seed once; those that are complete are left out, one by one."""
    for run in of("fmer-figure3") + of("meam-table1")[:1]:
        parts = reproduce.split_seeds(run, seeds_per_job)
        seeds = []
        for part in parts:
            args = reproduce.arguments(part)
            seeds += range(args.seed, args.seed + args.num_seeds)
            assert args.num_seeds <= seeds_per_job
        assert seeds == list(range(reproduce.arguments(run).num_seeds))
        assert len({part.name for part in parts}) == len(parts)
    finished(tmp_path, reproduce.split_seeds(of("fmer-figure3")[0], seeds_per_job)[0], 45_000)
    flags = dict(only=("fmer-figure3",), run_dir=str(tmp_path), seeds_per_job=seeds_per_job)
    reproduce.main(reproduce.Options(slurm=True, **flags))
    output = capsys.readouterr()
    assert "fmer-figure3-fmer-seeds-0 " not in output.out and "1 of " in output.err
    assert "fmer-figure3-sac-seeds-0 " in output.out


def test_list_and_bad_names(capsys):
    reproduce.main(reproduce.Options(list=True))
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + len(reproduce.EXPERIMENTS)
    assert rows[2].startswith("| qam-table1 | 160 | 9,600 | 9,600 |")
    with pytest.raises(UserError, match="no experiment qam-table9; choose from qam-table1"):
        reproduce.main(reproduce.Options(only=("qam-table9",)))
