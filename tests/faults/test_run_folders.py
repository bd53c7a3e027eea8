"""Whose a run's folder is: its name, what may differ when it is continued, one process at a time in
it, and what is said of folders that are damaged or of something else."""

import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.flags import FREE, name_of_run, parse
from tests.helpers.messages import stops
from tests.helpers.small_run import (
    DATA,
    ENV_DEFAULTS,
    EVALUATION,
    Args,
    begin,
    content,
    go,
    left_at_20,
    logged,
    metrics,
    restore,
    save,
    sums,
)
from tools.shared_blocks import ROOT

# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, name",
    [
        ("", "default"),
        ("--env scene", "default"),
        ("--env cube-triple --lr 0.125", "default"),  # which is the default there
        ("--env scene --lr 0.125", "lr=0.125"),
        ("--lr 0.5 --hidden-dims 4 5", "lr=0.5,hidden-dims=4-5"),
        ("--hidden-dims 4 5 --lr 0.5", "lr=0.5,hidden-dims=4-5"),
        ("--workers 3 --run-dir elsewhere --track --eval-only --log-interval 7", "default"),
        ("--chunk-length 2 --precision float32", "precision=float32,chunk-length=2"),
        ("--lr 0.5 --name mine", "mine"),
    ],
)
def test_the_name_says_what_was_changed(argv, name):
    """The flags that differ from the environment's defaults and could change an agent."""
    assert parse(Args, ENV_DEFAULTS, argv.split()).name == name


def test_names_are_names_of_folders():
    """Without a slash, and no longer than a file system allows."""

    @dataclasses.dataclass(frozen=True)
    class Flags:
        path: str = ""
        numbers: tuple = ()

    assert name_of_run(Flags("a/b_c"), Flags()) == "path=a-b-c"
    long = [name_of_run(Flags(numbers=(*range(500), seed)), Flags()) for seed in (1, 2)]
    assert len(set(long)) == 2 and max(map(len, long)) < 200


@pytest.mark.parametrize("name", [".", "..", "a/b", "/a", "../a"])
def test_names_that_are_no_folder(name):
    stops("--name", call=lambda: parse(Args, ENV_DEFAULTS, ["--name", name]))


def test_flags_that_change_no_agent():
    """The number of workers, where the runs and the data are, ..."""
    assert {"workers", "run_dir", "dataset_dir", "eval_slots", "eval_only", "track"} <= {*FREE}
    assert {"wandb_project", "wandb_entity", "wandb_group"} <= {*FREE}
    assert not {"env", "tasks", "seed", "lr", "total_steps", "batch_size"} & {*FREE}


# --- the same run, or another one ----------------------------------------------------------------


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
