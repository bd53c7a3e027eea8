"""Tests of runs: the folder and its lock, what is due when, tables, signals, pictures."""

import functools
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

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
    logged,
    metrics,
    restore,
    save,
    sums,
    table,
)
from tools.shared_blocks import ROOT


@pytest.fixture
def run(tmp_path):
    """A function that begins or continues the run: run(flag=value, ...) -> Run."""
    return functools.partial(begin, tmp_path)


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


def test_flags_that_lack_the_environments_protocol(run, tmp_path):
    """Args(env=...) alone, in a program that calls `main` without `parse`, starts nothing."""
    stops(
        "these flags lack what belongs to cube-triple", call=lambda: run(env="cube-triple", name="")
    )
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
    assert f"{words} updates" in capsys.readouterr().out


def test_another_configuration_is_refused(run):
    """The message names each flag that differs with both values, and nothing is touched."""
    first = run(lr=0.5, hidden_dims=(4, 4))
    first.tables.log("train.csv", 10, metrics())
    folder = first.folder
    del first
    before = (folder / "config.json").read_bytes()
    other = dict(checksum="other")
    message = stops(
        folder,
        "lr: 0.5 there, 0.75 now",
        "hidden_dims: [4, 4] there, [4] now",
        "checksum: 1234abcd there, other now",
        "--name",
        lines=9,
        call=lambda: run(other, lr=0.75, hidden_dims=(4,)),
    )
    assert "discount" not in message and (folder / "config.json").read_bytes() == before
    run(lr=0.5, hidden_dims=(4, 4))
    run(lr=0.75, name="other")


def test_another_dataset_of_the_same_size_and_name_is_refused(run):
    """Its checksum is part of what a run is."""
    save(run(DATA), 20)
    stops(
        "checksum: 1234abcd there, 1234abce now",
        lines=4,
        call=lambda: run(dict(checksum="1234abce")),
    )
    run(DATA)


def test_before_anything_is_logged_or_saved_flags_may_change(run):
    """A mistaken flag does not lock the folder for the right one; what made a run then stays."""
    path = run(lr=0.5).folder / "config.json"
    first = run(lr=0.75)
    assert json.loads(path.read_text())["flags"]["lr"] == 0.75
    first.tables.log("train.csv", 10, metrics())
    del first
    path.write_text(path.read_text().replace('"python": "', '"python": "0.'))
    before = path.read_bytes()
    run(lr=0.75)
    assert path.read_bytes() == before


def test_flags_that_change_no_agent_may_differ(run):
    """config.json has those of the last start, the id and what made the run stay."""
    first = run(workers=1, eval_interval=20)
    save(first, 20)
    path, id = first.folder / "config.json", first.checkpoints.run
    del first
    second = run(workers=2, eval_interval=30, eval_episodes=7)
    assert second.folder == path.parent and second.checkpoints.run == id
    restore(second)
    config = json.loads(path.read_text())
    assert (config["flags"]["workers"], config["flags"]["eval_interval"]) == (2, 30)
    assert config["id"] == id


def test_an_evaluation_changes_no_configuration(run):
    """--eval-only of more episodes, which are not those of the run."""
    first = run()
    save(first, 20)
    path = first.folder / "config.json"
    del first
    before = path.read_bytes()
    restore(run(eval_only=True, eval_episodes=50))
    assert path.read_bytes() == before


def test_a_renamed_folder_goes_on(run):
    folder = logged(run)[0]
    folder.rename(folder.with_name("renamed"))
    assert restore(run(name="renamed")) == (20, 20)


def test_other_files_in_the_folder_stay(run):
    """Whatever they look like."""
    folder, _ = logged(run)
    (folder / "notes.csv").write_text("who,what,count\nme,x,500\n")
    (folder / "empty.csv").write_text("a,b,c\n")
    restore(run())
    assert (folder / "notes.csv").read_text() == "who,what,count\nme,x,500\n"
    assert (folder / "empty.csv").exists()


def test_results_without_a_checkpoint_are_not_overwritten(run):
    """A run has evaluations only after a checkpoint: somebody has removed it."""
    folder, contents = logged(run, "eval.csv")
    (folder / "checkpoint.msgpack").unlink()
    stops(folder, "no checkpoint", "--name", call=lambda: restore(run()))
    assert (folder / "eval.csv").read_bytes() == contents[2]


def test_an_evaluation_without_a_checkpoint(run, tmp_path):
    """A mistaken name leaves no folder."""
    stops("no checkpoint that could be evaluated", call=lambda: restore(run(eval_only=True)))
    assert not list(tmp_path.iterdir())
    run()  # makes one
    stops("no checkpoint that could be evaluated", call=lambda: restore(run(eval_only=True)))


def test_the_start_of_training_is_free_until_the_online_phase(run):
    """Nothing depends on it before: a finished offline run may get a short online phase."""
    first = run(start_training=50)
    save(first, 20)
    folder = first.folder
    del first
    assert restore(run(start_training=5)) == (20, 20)
    (folder / "replay-1.msgpack").touch()
    stops("start_training: 5 there, 50 now", lines=3, call=lambda: run(start_training=50))


def test_a_flag_that_is_newer_than_the_run(run):
    """Had its default there, by which the run may be continued."""
    first = run()
    first.tables.log("train.csv", 10, metrics())
    path = first.folder / "config.json"
    del first
    config = json.loads(path.read_text())
    assert config["flags"].pop("precision") == "default"
    path.write_text(json.dumps(config))
    words = path.parent, "precision: default there, float32 now"
    stops(*words, lines=4, call=lambda: run(precision="float32"))
    run()


def test_a_damaged_configuration(run):
    folder = logged(run)[0]
    for text in ('{"flags": {"lr"', "{}", "[]", "", '{"flags": {}}', '{"flags": {"env": "scene"}}'):
        (folder / "config.json").write_text(text)
        stops(folder, "config.json", call=run)
        assert (folder / "config.json").read_text() == text


def test_a_folder_that_cannot_be_written(run, tmp_path):
    """A file in its place, a folder without permission: one line, no traceback."""
    (tmp_path / "small_run").write_text("")
    stops("cannot use", tmp_path / "small_run", call=run)
    (tmp_path / "small_run").unlink()
    (tmp_path / "small_run").mkdir()
    if os.geteuid():  # root may write everywhere
        (tmp_path / "small_run").chmod(0o555)
        stops("cannot use", tmp_path / "small_run", "Permission denied", call=run)
        (tmp_path / "small_run").chmod(0o755)
    if Path("/proc/self").exists():
        stops("cannot use", "/proc/self", call=lambda: begin("/proc/self"))


# --- one process at a time -----------------------------------------------------------------------


def test_a_second_process_is_refused(run, tmp_path):
    """While the first one is there; its lock is gone with it, however it ends."""
    first = run()
    code = f"""
from common.flags import launch
from tests.helpers.small_run import Args, begin
launch(lambda args: begin({str(tmp_path)!r}), Args, {{}})
"""
    command = [sys.executable, "-c", code]
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 1 and str(first.folder) in second.stderr
    assert "another process" in second.stderr and second.stderr.count("\n") == 1
    del first
    gc.collect()
    killed = code.replace("launch(", "import os\nlaunch(").replace(
        "),", ") + os.kill(os.getpid(), 9),", 1
    )
    assert subprocess.run([sys.executable, "-c", killed], cwd=ROOT).returncode == -9
    run()


def test_after_an_error_the_folder_is_free_and_signals_are_as_before(run):
    """The error is held here, and with it everything that it refers to."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError) as error:
        with run() as first:
            restore(first)
            assert signal.getsignal(signal.SIGTERM) != before
            stops("another process", call=run)
            print(1 / 0)
    assert signal.getsignal(signal.SIGTERM) == before
    assert run().folder == first.folder and error


# --- what is due ---------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets, in place of the time."""
    clock = SimpleNamespace(now=0.0)
    for module in ("run", "tables"):
        fake = SimpleNamespace(time=lambda: clock.now)
        monkeypatch.setattr(f"common.{module}.time", fake)
    return clock


def calls(run, clock, begin, end, rate):
    """Lengths of the calls from one step to another on a device with so many updates per second."""
    lengths = []
    step = begin
    while step < end:
        updates = run.updates_until_due(step)
        clock.now += updates / rate
        step += updates
        run.log_and_save(step, sums(), content())
        lengths.append(updates)
    assert step == end
    return lengths


def test_a_call_takes_about_a_second(run, clock):
    """It is doubled until it takes half a second, and halved when it takes more than two."""
    first = run(ends=(10**6,), log_interval=10**5, eval_interval=10**5)
    restore(first)
    lengths = calls(first, clock, 0, 639, rate=100)
    assert lengths == [1, 2, 4, 8, 16, 32, *[64] * 9]
    lengths = calls(first, clock, 639, 639 + 64 + 32 + 160, rate=10)
    assert lengths == [64, 32, *[16] * 10]
    lengths = calls(first, clock, 895, 895 + 496 + 3 * 512, rate=1e3)
    assert lengths == [16, 32, 64, 128, 256, *[512] * 3]


def test_calls_on_a_slow_device(run, clock):
    """A single update takes long: that is the least."""
    first = run()
    restore(first)
    assert calls(first, clock, 0, 5, rate=0.01) == [1] * 5


def test_calls_end_where_something_is_due(run, clock):
    """At the multiples of both intervals and at the ends of the phases, however fast it is; a call
    that was cut there tells nothing of the right length."""
    first = run(ends=(50, 75), log_interval=30, eval_interval=20)
    restore(first)
    lengths = calls(first, clock, 0, 75, rate=1e9)
    assert set(np.cumsum(lengths)) >= {20, 30, 40, 50, 60, 75}
    assert lengths == [1, 2, 4, 8, 5, 10, 10, 10, 10, 15]
    assert first.updates_per_call == 16
    assert first.updates_until_due(75) == 5  # nothing ends after the last phase


def test_steps_without_calls_are_not_measured(run, clock):
    """Those of an online phase, which asks for no number of updates."""
    first = run()
    restore(first)
    clock.now += 1000
    go(first, range(1, 9))
    assert first.updates_per_call == 1


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


def test_sums_go_on_after_a_restart(run):
    """A checkpoint between two rows has the sums since the last one."""
    first = run(log_interval=30, eval_interval=20)
    restore(first)
    go(first, [20])  # evaluated: with a row
    first.stop.requested = True
    with pytest.raises(SystemExit):
        first.log_and_save(25, sums(3, updates=5), content(25))
    del first
    _, found = run(log_interval=30).restore(content() | dict(metrics=sums()))
    np.testing.assert_array_equal(found["metrics"]["updates"], [5, 5, 5])
    np.testing.assert_array_equal(found["metrics"]["q"], [3, 4, 5])


def test_an_evaluation_that_a_stop_prevented(run):
    """Between the checkpoint and the evaluation's rows, or in the middle of these, it is due again;
    after them it is not, nor after a checkpoint without one."""
    first = run()
    restore(first)
    assert not first.evaluation_due
    go(first, [10, 20])
    assert first.evaluation_due
    path = first.folder / "eval.csv"
    del first
    second = run()
    assert restore(second) == (20, 20) and second.evaluation_due
    second.log_evaluation(20, EVALUATION)
    assert not second.evaluation_due
    del second
    whole = path.read_text()
    for kept, due in ((4, False), (3, True), (2, True), (1, True)):
        path.write_text("".join(whole.splitlines(keepends=True)[:kept]))
        third = run()
        restore(third)
        assert third.evaluation_due == due
        del third
    path.write_text(whole)
    fourth = run()
    restore(fourth)
    fourth.stop.requested = True
    with pytest.raises(SystemExit):
        go(fourth, [23])
    del fourth
    fifth = run()
    assert restore(fifth) == (23, 23) and not fifth.evaluation_due


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


def left_at_20(run):
    """The folder of a run that is no more, with a checkpoint of step 20."""
    first = run()
    restore(first)
    go(first, [20])
    return first.folder


def test_a_torn_row_of_an_evaluation_alone(run):
    """Is dropped by the next --eval-only, as the rows of the other tables are."""
    folder = left_at_20(run)
    for _ in range(2):
        again = run(eval_only=True)
        restore(again)
        again.log_evaluation(20, EVALUATION)
        again.finish()
        again.lock.close()
        path = folder / "eval_only.csv"
        path.write_bytes(path.read_bytes()[:-3])
    lines = table(path)
    assert len(lines) == 4 and {len(line) for line in lines} == {len(lines[0])}


def test_a_refused_script_leaves_the_one_that_was_there(run):
    """So that the agent can still be loaded."""
    folder = left_at_20(run)
    (folder / "script.py").write_text("# as it was")
    before = (folder / "config.json").read_bytes()
    second = run()
    other = content() | dict(metrics=sums())
    other["state"] = other["state"].replace(params=dict(x=np.zeros((3, 9), np.float32)))
    stops("other shapes or types", call=lambda: second.restore(other))
    assert (folder / "script.py").read_text() == "# as it was"
    assert (folder / "config.json").read_bytes() == before


def test_another_column(run):
    """A changed script with another metric does not write under the old names."""
    first = run()
    restore(first)
    first.tables.log("eval.csv", 20, dict(success=np.ones(3)))
    before = (first.folder / "eval.csv").read_bytes()
    log = lambda: first.tables.log("eval.csv", 40, dict(success=np.ones(3), best=np.ones(3)))
    stops("has the columns ['success'], not", "another --name", call=log)
    assert (first.folder / "eval.csv").read_bytes() == before


def test_an_interrupted_start_gives_the_lock_back(run, monkeypatch):
    """Although a notebook keeps its traceback."""

    def wait(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("common.run.Tracker", wait)
        with pytest.raises(KeyboardInterrupt) as kept:
            run()
    restore(run())
    assert kept.traceback


def test_an_evaluation_alone_needs_episodes(run):
    restore(run())
    stops("give it --eval-episodes", call=lambda: run(eval_only=True, eval_episodes=0))


def test_an_evaluation_is_a_row_per_agent(run, capsys):
    """Of means over the episodes; the line shows the mean of the score."""
    first = run(ends=(20,))
    restore(first)
    go(first, [20])
    first.log_evaluation(20, EVALUATION)
    assert "20 updates: success 0.50" in capsys.readouterr().out
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


def test_a_longer_run_continues_a_finished_one(run):
    """It is evaluated where the shorter one ended, and goes on."""
    first = run(ends=(50,))
    restore(first)
    go(first, [20, 40, 50])
    first.log_evaluation(50, EVALUATION)
    del first
    second = run(ends=(70,))
    assert restore(second) == (50, 50) and not second.evaluation_due
    go(second, [60, 70])
    assert second.evaluation_due


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


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_stop_the_run(run, bad, capsys):
    """An agent that has such numbers is named once and is lost; when all are, the line names
    metric, task, seed, step and folder, and nothing is logged."""
    first, values = run(), metrics()
    values["q"] = np.array([0, 0, bad])
    save(first, 5)
    for step in (5, 10):
        first.tables.log("train.csv", step, values)
    (line,) = capsys.readouterr().err.split("\n")[1:-1]
    lost = "q of task 4, seed 0 is not finite at step 5"
    assert line == f"{lost}: this agent is lost, the others go on"
    last_column = [row[-1] for row in table(first.folder / "train.csv")[1:]]
    assert last_column == ["0.0", "0.0", str(bad)] * 2
    before = {path: path.read_bytes() for path in first.folder.iterdir()}
    values["loss"] = np.array([bad, 0, 0])
    values["q"] = np.array([0, bad, 0])  # the last one, in the order of the metrics
    words = "q of", "task 1", "seed 1", "step 15", first.folder
    stops(*words, call=lambda: first.tables.log("train.csv", 15, values))
    assert before == {path: path.read_bytes() for path in first.folder.iterdir()}


@pytest.mark.parametrize("name", ["train.csv", "eval.csv"])
def test_rows_after_the_checkpoint_are_dropped(run, name):
    """Those before it are kept byte for byte, and the log goes on as if nothing had happened."""
    folder, contents = logged(run, name)
    second = run()
    assert restore(second)[0] == 20
    second.tables.log(name, 30, metrics(30))
    (folder / "whole").write_bytes(contents[2])
    continued, whole = ([row[:3] + row[4:] for row in table(folder / x)] for x in (name, "whole"))
    assert continued == whole


def test_a_continued_log_has_no_row_twice_or_missing(run):
    """Read as a table."""
    folder, _ = logged(run)
    second = run()
    restore(second)
    for step in (30, 40):
        second.tables.log("train.csv", step, metrics(step))
    head, *rows = table(folder / "train.csv")
    assert [int(row[2]) for row in rows] == [10] * 3 + [20] * 3 + [30] * 3 + [40] * 3
    assert all(len(row) == len(head) for row in rows)


def test_without_a_checkpoint_the_log_begins_again(run):
    first = run()
    first.tables.log("train.csv", 10, metrics())
    folder = first.folder
    del first
    second = run()
    step, found = second.restore(content(7) | dict(metrics=sums()))
    assert step == 0 and found["state"].params["x"][0, 0] == 7 and found["replay"] == {}
    second.tables.log("train.csv", 10, metrics())
    assert len(table(folder / "train.csv")) == 4 and table(folder / "train.csv")[0][0] == "task"


def test_a_torn_line_is_dropped(run):
    """Wherever the last rows were cut off, the ones before the checkpoint come back."""
    folder, contents = logged(run)
    second = run()
    for cut in range(len(contents[1]), len(contents[2])):
        (folder / "train.csv").write_bytes(contents[2][:cut])
        restore(second)
        second.tables.log("train.csv", 30, metrics(30))
        rows = table(folder / "train.csv")
        assert [row[2] for row in rows[1:]] == ["10"] * 3 + ["20"] * 3 + ["30"] * 3, cut


@pytest.mark.parametrize("torn", ["", "task,seed,st", "task,seed,step,seconds,loss,q"])
def test_a_torn_header_is_written_again(run, torn):
    """As after a full disk, when the file was created and nothing could be written into it."""
    folder = run().folder
    (folder / "train.csv").write_text(torn)
    second = run()
    restore(second)
    second.tables.log("train.csv", 10, metrics())
    head, *rows = table(folder / "train.csv")
    assert head == ["task", "seed", "step", "seconds", "loss", "q"] and len(rows) == 3


@pytest.mark.parametrize("bad", [b"1,0,x,0.1,0.5,0.5", b"1,1", b"\xff"])
def test_a_damaged_row(run, bad):
    """A row that is not the last and has no step: one line that names the file, which stays."""
    folder, contents = logged(run)
    damaged = contents[1].replace(b"\n1,1,10,", b"\n" + bad + b"\n1,1,10,")
    (folder / "train.csv").write_bytes(damaged)
    stops(folder, "train.csv", call=lambda: restore(run()))
    assert (folder / "train.csv").read_bytes() == damaged


@pytest.mark.parametrize("step", ["90", "1e1", "10.5", "-10", "inf", "nan"])
def test_a_damaged_step(run, step):
    """Also one that is a number: steps are whole and never decrease."""
    folder, contents = logged(run)
    rows = contents[1].decode().replace(",10,", f",{step},")
    (folder / "train.csv").write_text(rows)
    stops(folder, "train.csv", "is damaged", call=lambda: restore(run()))
    assert (folder / "train.csv").read_text() == rows


def test_rows_of_some_agents_alone_are_dropped(run):
    """An evaluation is logged after its checkpoint: stopped within its rows, it is not there."""
    first = run()
    for step in (10, 20):
        first.tables.log("eval.csv", step, metrics(step))
    path = first.folder / "eval.csv"
    lines = path.read_text().splitlines(keepends=True)
    for rows in range(4, 8):
        path.write_text("".join(lines[:rows]))
        first.tables.continue_from(20)
        assert first.tables.last_row["eval.csv"] == (20 if rows == 7 else 10)
        first.tables.log("eval.csv", 30, metrics())
        kept = path.read_text().splitlines(keepends=True)[:-3]
        assert kept == lines[: 7 if rows == 7 else 4]


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_stops_the_log_in_one_line(run):
    first = run()
    (first.folder / "train.csv").symlink_to("/dev/full")
    words = "train.csv", first.folder, "No space left on device"
    stops(*words, call=lambda: first.tables.log("train.csv", 10, metrics()))


# --- signals -------------------------------------------------------------------------------------


@pytest.fixture
def heeded():
    """Signals as in a terminal: a shell that runs the tests in the background has them ignored."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_the_middle(run, heeded, number, capsys):
    """The step is finished and saved, and the run ends with a line; then signals are as before, the
    folder is free, and the run continues from this step."""
    before = signal.getsignal(number)
    with pytest.raises(SystemExit, match="small_run.* is saved. Repeat the command to continue.$"):
        with run() as first:
            restore(first)
            go(first, [1, 2])
            os.kill(os.getpid(), number)
            assert first.stop.requested
            assert f"{number.name}: saving after this step" in capsys.readouterr().err
            go(first, [3])
            raise AssertionError("the run was not stopped")
    assert signal.getsignal(number) == before
    assert restore(run()) == (3, 3)


def test_a_stop_of_a_run_that_began_anew(run, heeded):
    """The same command would begin anew again."""
    with pytest.raises(SystemExit, match="Repeat the command, without --overwrite, to continue.$"):
        with run(overwrite=True) as first:
            restore(first)
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("steps", [[], [1, 20]])
def test_a_signal_where_nothing_is_unsaved(run, heeded, number, steps):
    """Before the first step, and between a checkpoint and the next step, as in an evaluation, the
    run ends at once."""
    before = signal.getsignal(number)
    with pytest.raises(SystemExit, match="is saved. Repeat the command to continue.$"):
        with run() as first:
            restore(first)
            go(first, steps)
            os.kill(os.getpid(), number)
            raise AssertionError("the run was not stopped")
    assert signal.getsignal(number) == before
    assert restore(run())[0] == (20 if steps else 0)


def test_a_signal_in_the_middle_of_a_write(run, heeded, monkeypatch):
    """It waits for the end of the checkpoint."""
    replace, calls = os.replace, []

    def signalled(*paths):
        calls.append(paths)
        os.kill(os.getpid(), signal.SIGTERM)
        replace(*paths)

    with pytest.raises(SystemExit, match="is saved"):
        with run() as first:
            restore(first)
            go(first, [1])
            monkeypatch.setattr(os, "replace", signalled)
            go(first, [20])
    monkeypatch.undo()
    assert len(calls) == 1 and restore(run()) == (20, 20)


def test_a_second_signal_ends_at_once(tmp_path):
    """As if nobody handled it."""
    code = f"""
import os, signal
from tests.helpers.small_run import begin, go, restore
signal.signal(signal.SIGTERM, signal.SIG_DFL)
with begin({str(tmp_path)!r}) as run:
    restore(run)
    go(run, [1])
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("and here", flush=True)
"""
    command = [sys.executable, "-c", code]
    end = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert end.returncode == -signal.SIGTERM
    assert "still here" in end.stdout and "and here" not in end.stdout


def test_signals_are_given_back(run, heeded):
    before = [signal.getsignal(number) for number in SIGNALS]
    with run() as first:
        assert all(signal.getsignal(x) == first.stop._answer for x in SIGNALS)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_ignored_signals_stay_ignored(run, heeded):
    """As in a shell's background, where Ctrl-C is meant for others, and under nohup."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with run() as first:
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == first.stop._answer
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_a_run_in_another_thread(run, heeded):
    """Has no say in signals, and works."""
    before = [signal.getsignal(number) for number in SIGNALS]
    seen = []

    def work():
        with run() as first:
            restore(first)
            go(first, [20])
            seen.append([signal.getsignal(number) for number in SIGNALS])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before] and restore(run())[0] == 20


def test_the_argument_script_is_a_path(tmp_path):
    """Of which the name counts, as `__file__` of a script in any folder."""
    path = tmp_path / "a/mine.py"
    path.parent.mkdir()
    path.touch()
    script = Run(str(path), Args(run_dir=str(tmp_path), name="x"), AGENTS, DATA, (9,))
    assert script.folder.parent.parent == tmp_path / "mine"


def test_the_precision_of_a_run_ends_with_it(run):
    """Also where a script's `main` is called from Python; other programs keep their precision."""
    option = "jax_default_matmul_precision"
    for name, expected in ("float32", "float32"), ("bfloat16", "BF16_BF16_F32"), ("default", None):
        with run(name=name, precision=name):
            assert getattr(jax.config, option) == expected
        assert getattr(jax.config, option) is None
