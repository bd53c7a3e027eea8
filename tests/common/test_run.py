"""Tests of runs: what they say and write, what is due when, evaluations, pictures, tables."""

import json
import sys

import jax
import numpy as np
import pytest

from common.checkpoints import read_checkpoint
from common.run import Run
from tests.helpers.messages import stops
from tests.helpers.small_run import (
    AGENTS,
    DATA,
    EVALUATION,
    Args,
    begin,
    content,
    go,
    metrics,
    restore,
    save,
    sums,
    table,
)
from tools.shared_blocks import ROOT

# --- the folder ----------------------------------------------------------------------------------


def test_the_folder_says_what_made_it(run, tmp_path):
    """runs/<script>/<env>/<name>/config.json: flags, dataset, commit, device, versions, an id."""
    folder = run(name="mine", hidden_dims=(4, 4)).folder
    assert folder == tmp_path / "small_run" / "pointmaze-medium" / "mine"
    config = json.loads((folder / "config.json").read_text())
    flags = config["flags"]
    assert flags["hidden_dims"] == [4, 4] and flags["checksum"] == DATA["checksum"]
    made = config["made_with"]
    assert {"jax", "numpy", "ogbench"} <= made["packages"].keys() and made["commit"]
    assert made["python"] == sys.version.split()[0] and "1 x" in made["device"]
    assert len(config["id"]) == 16


def test_without_git_there_is_no_commit(run, monkeypatch, tmp_path):
    """Nor an error: nothing but config.json needs it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    config = json.loads((run().folder / "config.json").read_text())
    assert config["made_with"]["commit"] == ""


def test_the_argument_script_is_a_path(tmp_path):
    """Of which the name counts, as `__file__` of a script in any folder."""
    path = tmp_path / "a/mine.py"
    path.parent.mkdir()
    path.touch()
    script = Run(str(path), Args(run_dir=str(tmp_path), name="x"), AGENTS, DATA, (9,))
    assert script.folder.parent.parent == tmp_path / "mine"


def test_flags_that_lack_the_environments_protocol(run, tmp_path):
    """Args(env=...) alone, in a program that calls `main` without `parse`, starts nothing."""
    stops("Args(...) alone lacks", "cube-triple", call=lambda: run(env="cube-triple", name=""))
    assert not list(tmp_path.iterdir())


def test_a_run_folder_in_the_home_directory(monkeypatch, tmp_path):
    """--run-dir=~/runs, which a shell does not expand."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert begin("~/runs").folder.is_relative_to(tmp_path / "runs")


def test_the_start_says_what_is_trained(run, capsys):
    """Environment, agents, size, device, folder and where it resumes, in aligned lines."""
    first = run()
    restore(first)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["environment", "agents", "device", "folder"]
    assert {line[12] for line in lines} == {" "} and " " not in {line[13] for line in lines}
    assert lines[0].endswith("pointmaze-medium")
    assert lines[1].endswith("3 agents, 2 parameters each")
    assert lines[2].endswith("1 x cpu") and lines[3].endswith(str(first.folder))
    save(first, 20)
    del first
    restore(run())
    assert "resuming from step 20 of 100" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "step, words",
    [(7, "not complete: 7 of 9"), (9, "is complete: 9 of 9"), (12, "is complete: 12 of 12")],
)
def test_the_end_says_whether_all_is_done(run, capsys, step, words):
    first = run(ends=(9,))
    restore(first)
    go(first, [step])
    first.finish()
    assert f"{words} steps" in capsys.readouterr().out


def test_the_precision_of_a_run_ends_with_it(run):
    """Also where a script's `main` is called from Python; other programs keep their precision."""
    option = "jax_default_matmul_precision"
    for name, expected in ("float32", "float32"), ("bfloat16", "BF16_BF16_F32"), ("default", None):
        with run(name=name, precision=name):
            assert getattr(jax.config, option) == expected
        assert getattr(jax.config, option) is None


# --- what is due ---------------------------------------------------------------------------------


def test_rows_are_means_and_sums_begin_again(run):
    """The sums of the updates since the last row, over their number; a row at the multiples of
    log_interval, where it is evaluated, and at the end of a phase, if there was an update."""
    first = run(ends=(25, 50), log_interval=10, eval_interval=20)
    restore(first)
    given = dict(loss=np.float32([3, 6, 9]), updates=np.float32([3, 3, 3]))
    nothing = dict(loss=np.zeros(3), updates=np.zeros(3))
    rows = []
    for step in range(1, 51):
        back = first.log_and_save(step, given if step % 3 else nothing, content(step))
        if not np.asarray(back["updates"]).any() and step % 3:
            assert not np.asarray(back["loss"]).any()
            rows.append(step)
        else:
            assert back is (given if step % 3 else nothing)
        assert first.evaluation_due == (step in (20, 25, 40, 50))
    assert rows == [10, 20, 25, 40, 50]  # 30 had no update
    head, *lines = table(first.folder / "train.csv")
    assert head == ["task", "seed", "step", "seconds", "loss"] and len(lines) == 15
    assert [float(line[4]) for line in lines[:3]] == [1, 2, 3]
    assert read_checkpoint(first.folder / "checkpoint.msgpack")["step"] == 50
    assert read_checkpoint(first.folder / "checkpoint-before.msgpack")["step"] == 40


def test_steps_of_several_at_once(run):
    """As of PPO, whose steps may leap over the multiples."""
    first = run(log_interval=10, eval_interval=20)
    restore(first)
    due = []
    for step in range(7, 100, 7):
        first.log_and_save(step, sums(step), content(step))
        due += [step] * first.evaluation_due
    assert due == [21, 42, 63, 84]
    steps = {int(row[2]) for row in table(first.folder / "train.csv")[1:]}
    assert steps == {14, 21, 35, 42, 56, 63, 70, 84, 91}


def test_evaluations_alone_are_due_at_once(run):
    """And go into a table of their own; what `finish` returns are the run's."""
    first = run()
    restore(first)
    go(first, [20])
    first.log_evaluation(20, EVALUATION)
    folder = first.folder
    del first
    before = (folder / "eval.csv").read_bytes()
    second = run(eval_only=True)
    restore(second)
    assert second.evaluation_due
    second.log_evaluation(20, EVALUATION)
    rows = second.finish()
    assert (folder / "eval.csv").read_bytes() == before
    head, *lines = table(folder / "eval_only.csv")
    assert len(lines) == 3 and [row["step"] for row in rows] == ["20"] * 3


def test_an_evaluation_alone_needs_episodes(run):
    restore(run())
    stops("give it --eval-episodes", call=lambda: run(eval_only=True, eval_episodes=0))


def test_an_evaluation_is_a_row_per_agent(run, capsys):
    """Of means over the episodes; the line shows the mean of the score."""
    first = run(ends=(20,))
    restore(first)
    go(first, [20])
    first.log_evaluation(20, EVALUATION)
    assert "step 20: success 0.50" in capsys.readouterr().out
    rows = first.finish()
    assert [(row["task"], row["seed"]) for row in rows] == [("1", "0"), ("1", "1"), ("4", "0")]
    assert [float(row["success"]) for row in rows] == [0.5, 0, 1]
    assert [float(row["return"]) for row in rows] == [-4, -4, -1.5]
    assert [float(row["length"]) for row in rows] == [4, 4, 1.5]
    with np.load(first.folder / "rollouts.npz") as file:
        assert file["task"].tolist() == [1, 1, 4]
        np.testing.assert_array_equal(file["success"], EVALUATION["success"])
        np.testing.assert_array_equal(file["path3"], np.float32([[1, 1], [1, 1]]))
        assert "path6" not in file


def test_success_that_is_reported_in_some_episodes(run):
    """The first evaluation says whether there is the column; where there is, no report is a
    failure. All rows have the columns of the first ones."""
    some = np.float64([[1, np.nan], [np.nan, np.nan], [1, 1]])
    none, results = np.full((3, 2), np.nan), {}
    for name, first, second in (("yes", some, none), ("no", none, some)):
        begun = run(name=name)
        restore(begun)
        for step, success in ((20, first), (40, second)):
            go(begun, [step])
            begun.log_evaluation(step, EVALUATION | dict(success=success))
        results[name] = begun.tables.read("eval.csv")
        del begun
        restore(run(name=name))  # no row is damaged
    found = [float(row["success"]) for row in results["yes"]]
    assert found == [0.5, 0, 1, 0, 0, 0]
    assert "success" not in results["no"][0] and len(results["no"]) == 6


def test_a_run_without_evaluations_has_no_rows(run):
    first = run()
    restore(first)
    go(first, [10])
    assert first.finish() == []


PLOT = (ROOT / "plot.py").read_text()


@pytest.mark.parametrize("text, count", [(PLOT, 1), ("# of one's own", 0)], ids=["ours", "another"])
def test_the_picture_is_drawn_where_it_is_missing(run, monkeypatch, tmp_path, text, count):
    """By our plot.py, not by another one next to a copied script; once."""
    first, drawn = run(ends=(20,)), []
    restore(first)
    (tmp_path / "plot.py").write_text(text)
    monkeypatch.setattr("common.run.__file__", str(tmp_path / "common" / "run.py"))
    monkeypatch.setattr("common.run.subprocess.run", lambda *x, **_: drawn.append(x))
    first.finish()
    assert not drawn  # there is nothing to draw
    for i in (1, 2):
        first.log_evaluation(20, EVALUATION)
        first.finish()
        assert len(drawn) == i * count
        (first.folder / "curve.png").touch()
        first.finish()
        assert len(drawn) == i * count


# --- tables --------------------------------------------------------------------------------------


def test_a_row_per_agent_under_one_header(run):
    """Numbers lose no digit."""
    first = run()
    for step in (10, 20):
        first.tables.log("train.csv", step, metrics(step))
    head, *rows = table(first.folder / "train.csv")
    assert head == ["task", "seed", "step", "seconds", "loss", "q"] and len(rows) == 6
    for i, row in enumerate(rows):
        task, seed, step, seconds, loss, q = map(float, row)
        assert (task, seed) == AGENTS[i % 3] and step == (10, 20)[i // 3]
        assert loss == step + i % 3 / 3 and q == step + i % 3 and 0 <= seconds < 60


def test_time_goes_on_after_a_restart(run):
    """The column `seconds` counts what the earlier processes took."""
    first = run()
    restore(first)
    first.tables.start -= 1000
    go(first, [20])
    del first
    second = run()
    restore(second)
    second.tables.log("train.csv", 30, metrics())
    assert 1000 <= float(table(second.folder / "train.csv")[-1][3]) < 1010
