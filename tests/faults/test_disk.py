"""What a run leaves on the disk, whatever happens to the disk, the folder or the machine."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import common.checkpoints
import meam
from common.checkpoints import CHECKPOINT, PREVIOUS, verified
from common.dataset_files import locate
from common.devices import configured_jax
from common.environments import resolve
from common.files import append_text, move_aside, open_lock, replacing, write_file
from common.flags import parse
from common.run import run_folder
from tests.helpers.damage import rot
from tests.helpers.messages import stops
from tests.helpers.small_run import EVALUATION, go, metrics, restore, save, table
from tools.shared_blocks import ROOT

# --- what reaches the disk, and when -------------------------------------------------------------


@pytest.fixture
def synced(monkeypatch):
    """Names of the files and folders that are brought to the disk, in order."""
    names = []
    fsync = os.fsync

    def note(descriptor):
        names.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    return names


def test_rows_are_on_the_disk_before_the_checkpoint(run, synced):
    """Or a power cut could leave a checkpoint whose rows are gone."""
    first = run()
    restore(first)
    del synced[:]
    go(first, [20])
    folder = first.folder.name
    assert synced[:2] == ["train.csv", folder]
    assert synced[2:] == [f"{CHECKPOINT}.tmp", folder]
    del synced[:]
    first.tables.log("train.csv", 30, metrics())
    assert synced == ["train.csv"]


def test_a_replaced_file_is_on_the_disk_with_its_name(tmp_path, synced):
    write_file(tmp_path / "file", b"new")
    assert synced == ["file.tmp", tmp_path.name]
    append_text(tmp_path / "file", " text")
    assert (tmp_path / "file").read_bytes() == b"new text"


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_file(path, b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"half")
        print(1 / 0)
    assert path.read_bytes() == b"old"


# --- links ---------------------------------------------------------------------------------------


def test_links_are_not_followed(run, tmp_path):
    """At the lock and at files that are about to be written: what they point at stays."""
    folder = run().folder
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (folder / "config.json.tmp").symlink_to(precious)
    (folder / f"{CHECKPOINT}.tmp").symlink_to(precious)
    save(run(), 20)
    assert precious.read_text() == "mine" and not (folder / CHECKPOINT).is_symlink()
    (folder / ".lock").unlink()
    (folder / ".lock").symlink_to(precious)
    stops("cannot use", folder, call=run)
    assert precious.read_text() == "mine"


# --- one process in a folder ---------------------------------------------------------------------


@pytest.mark.parametrize("how", ["moved", "replaced", "removed"])
@pytest.mark.parametrize("write", ["log", "evaluate"])
def test_a_folder_that_is_no_longer_the_own(run, how, write):
    """Nothing is written where another run may be now: the run ends in one line."""
    first = run()
    restore(first)
    go(first, [20])
    folder, aside = first.folder, first.folder.with_name("aside")
    folder.rename(aside)
    if how == "replaced":
        second = run()
        assert second.folder == folder
    if how == "removed":
        shutil.rmtree(aside)
    before = sorted(folder.iterdir()) if folder.exists() else []
    with pytest.raises(Exception) as error:
        if write == "log":
            go(first, [30])
        else:
            first.log_evaluation(20, EVALUATION)
    assert "was moved or replaced" in str(error.value)
    assert (sorted(folder.iterdir()) if folder.exists() else []) == before


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(run, monkeypatch, capsys, code):
    """Gets a warning, and the run goes on."""

    def refuse(*_):
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    first = run()
    restore(first)
    go(first, [20])
    assert "has no file locks" in capsys.readouterr().err
    assert (first.folder / CHECKPOINT).exists()


def test_another_error_of_a_lock_is_named(run, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", refuse)
    stops("cannot use", "Input/output error", call=run)


def test_a_lock_that_waits(tmp_path):
    """Until the other one is closed."""
    first = open_lock(tmp_path / "lock")
    with pytest.raises(BlockingIOError):
        open_lock(tmp_path / "lock")
    first.close()
    open_lock(tmp_path / "lock", wait=True).close()


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [rot, lambda path: path.write_bytes(b"")])
def test_a_checkpoint_that_rotted_does_not_replace_the_good_one(run, capsys, damage):
    """It is read again before it takes the place of the one before it."""
    first = run()
    for step in (10, 20):
        save(first, step)
    damage(first.folder / CHECKPOINT)
    save(first, 30)
    assert "damaged on the disk" in capsys.readouterr().out
    verified(first.folder / CHECKPOINT)
    verified(first.folder / PREVIOUS)
    (first.folder / CHECKPOINT).unlink()
    del first
    assert restore(run()) == (10, 10)


def test_an_error_of_the_disk_is_no_damage(run, monkeypatch):
    """The run does not go back to the checkpoint before, because the latest may be whole."""
    first = run()
    for step in (10, 20):
        save(first, step)
    del first
    read = common.checkpoints.read_checkpoint

    def fail(path):
        if path.name == CHECKPOINT:
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(common.checkpoints, "read_checkpoint", fail)
    stops(CHECKPOINT, "Input/output error", call=lambda: restore(run()))
    monkeypatch.undo()
    assert restore(run()) == (20, 20)


@pytest.mark.parametrize(
    "old, new",
    [
        (b"\n1,1,20,", b"\n1,1,x,"),  # no number
        (b"\n1,1,20,", b"\n1,1,30,"),  # another step than its neighbours
        (b"\n1,1,20,", b"\n1,2,20,"),  # another agent
        (b"\n1,1,20,", b"\n1,1,20,7,"),  # a cell too many
        (b"\n1,1,20,", b"\n\x00\x00\x00\x00"),  # after a power cut
    ],
)
@pytest.mark.parametrize("name", ["train.csv", "eval.csv"])
def test_a_damaged_row_is_named_with_its_line(run, name, old, new):
    """And the table stays as it is, the good rows too."""
    first = run()
    for step in (10, 20, 30):
        first.tables.log(name, step, metrics(step))
    save(first, 30)
    path = first.folder / name
    del first
    damaged = path.read_bytes().replace(old, new)
    path.write_bytes(damaged)
    stops(path, "line 6 ", call=lambda: restore(run()))
    assert path.read_bytes() == damaged


def test_rows_stay_until_others_take_their_place(run):
    """A start that ends before its first row drops none."""
    first = run()
    save(first, 10)
    for step in (10, 20, 30):
        first.tables.log("train.csv", step, metrics(step))
    path = first.folder / "train.csv"
    before = path.read_bytes()
    del first
    second = run()
    restore(second)
    assert path.read_bytes() == before
    second.tables.log("train.csv", 20, metrics(7))
    assert [row[2] for row in table(path)[1:]] == ["10"] * 3 + ["20"] * 3
    assert float(table(path)[4][4]) == 7


def test_an_evaluation_alone_leaves_the_tables(run):
    """Also torn ones, and those with rows after the checkpoint."""
    first = run()
    save(first, 10)
    for name in ("train.csv", "eval.csv"):
        first.tables.log(name, 20, metrics())
    folder = first.folder
    (folder / "train.csv").write_text((folder / "train.csv").read_text() + "1,0,3")
    before = {name: (folder / name).read_bytes() for name in ("train.csv", "eval.csv")}
    del first
    for _ in range(2):
        second = run(eval_only=True)
        restore(second)
        second.log_evaluation(10, EVALUATION)
        del second
    assert len(table(folder / "eval_only.csv")) == 7
    assert before == {name: (folder / name).read_bytes() for name in before}


# --- pictures ------------------------------------------------------------------------------------


def test_pictures_that_a_kill_prevented(run, monkeypatch):
    """The next start draws them; nothing is drawn twice."""
    drawn = []

    def draw(folder):
        assert (folder / "rollouts.npz").exists()
        (folder / "curve.png").write_text("a picture")
        drawn.append(folder)

    monkeypatch.setattr("common.run.draw_pictures", draw)
    first = run(ends=(20,))
    restore(first)
    go(first, [20])
    first.log_evaluation(20, EVALUATION)  # killed before `finish`
    del first
    for _ in range(2):
        second = run(ends=(20,))
        restore(second)
        assert not second.evaluation_due
        second.finish()
        del second
    assert len(drawn) == 1


# --- a new beginning -----------------------------------------------------------------------------


def test_overwriting_keeps_the_old_folder(run, capsys):
    """Under a free name, with everything in it."""
    folder = run(lr=0.5).folder
    for i in (1, 2):
        save(run(lr=0.5), 20)
        first = run(overwrite=True, lr=0.75)
        assert first.folder == folder and restore(first) == (0, 0)
        assert (folder.with_name(f"default.old-{i}") / CHECKPOINT).exists()
        assert f"default.old-{i}" in capsys.readouterr().out
        del first
        shutil.rmtree(folder)
    assert not list(run(overwrite=True).folder.parent.glob("*.old-3"))  # there was none


def test_overwriting_what_has_lost_its_configuration(run):
    first = run()
    save(first, 20)
    (first.folder / "config.json").unlink()
    del first
    stops("no config.json", call=run)
    again = run(overwrite=True)
    assert restore(again) == (0, 0)
    assert (again.folder.with_name("default.old-1") / CHECKPOINT).exists()


def test_what_cannot_be_overwritten(run):
    """A run that another process is in; and an evaluation of what is about to go."""
    first = run()
    save(first, 20)
    stops("in use by another process", call=lambda: run(overwrite=True))
    del first
    stops("--overwrite", "--eval-only", call=lambda: run(overwrite=True, eval_only=True))
    assert restore(run()) == (20, 20)


def test_names_of_moved_folders(tmp_path):
    for name in ("run", "run.old-1", "run.old-3"):
        (tmp_path / name).mkdir()
    assert move_aside(tmp_path / "run") == tmp_path / "run.old-2"


# --- the machine ---------------------------------------------------------------------------------


def program(code, tmp_path, **environment):
    """Runs code in a process of its own, outside the repository, and returns its output."""
    variables = os.environ | dict(PYTHONPATH=str(ROOT)) | environment
    command = [sys.executable, "-c", code]
    options = dict(cwd=tmp_path, env=variables, capture_output=True, text=True)
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("driver", ["nonsense", "glx", "osmesa"])
def test_a_renderer_that_is_not_there(tmp_path, driver):
    """Does not matter where nothing is drawn: in workers, in programs, and in a notebook."""
    code = """
import numpy as np
from common.env_pool import EnvPool
pool = EnvPool(["cube-single-singletask-task1-v0"], 1, 1)
pool.reset(np.array([[0]], np.uint32))
print(pool.observations.shape)
"""
    assert program(code, tmp_path, MUJOCO_GL=driver) == "(1, 1, 28)\n"
    code = """
import sys
import qam
from common.environments import make_env
from common.flags import launch
sys.argv = ["qam.py", "--env", "cube-single"]
def main(args):
    print(make_env("cube-single-singletask-task1-v0").reset(seed=0)[0].shape)
launch(main, qam.Args, qam.ENV_DEFAULTS)
"""
    assert program(code, tmp_path, MUJOCO_GL=driver).endswith("(28,)\n")
    code = """
import dataclasses
import sys
from analysis.command_line import run_program
from common.environments import make_env
Options = dataclasses.make_dataclass("Options", [("flag", int, 0)])
sys.argv = ["program"]
run_program(lambda _: print(make_env("Hopper-v5").reset(seed=0)[0].shape), Options, "A program.")
"""
    assert program(code, tmp_path, MUJOCO_GL=driver) == "(11,)\n"
    code = """
from common.environments import make_env
for name in ("Hopper-v5", "cube-single-singletask-task1-v0"):
    print(make_env(name).reset(seed=0)[0].shape)
"""
    assert program(code, tmp_path, MUJOCO_GL=driver) == "(11,)\n(28,)\n"


def test_a_missing_renderer_is_said_where_something_is_drawn(tmp_path):
    """An environment that is asked for pictures is not made without them."""
    code = """
from common.environments import make_env
try:
    make_env("Hopper-v5", render_mode="rgb_array")
except Exception as error:
    print(error)
"""
    assert "MUJOCO_GL: nonsense" in program(code, tmp_path, MUJOCO_GL="nonsense")


def test_models_of_mazes_are_removed(tmp_path):
    """OGBench writes an XML file for each maze that it makes."""
    code = """
from common.environments import make_env
env = make_env("pointmaze-medium-singletask-task1-v0")
env.reset(seed=0)
env.step(env.action_space.sample())
print(env.unwrapped.fullpath)
"""
    (tmp_path / "temporary").mkdir()
    path = program(code, tmp_path, TMPDIR=str(tmp_path / "temporary")).strip()
    assert Path(path).parent == tmp_path / "temporary"
    assert not list((tmp_path / "temporary").iterdir())


def test_a_user_without_a_home(tmp_path):
    """As in containers: HOME is not set and the number of the user has no name."""
    code = """
import os, pwd
del os.environ["HOME"]
def unknown(number):
    raise KeyError("uid not found")
pwd.getpwuid = unknown
import meam
from common.flags import parse
print(parse(meam.Args, meam.ENV_DEFAULTS, []).env)
"""
    assert program(code, tmp_path) == "pointmaze-medium\n"


def test_too_many_open_files(tmp_path):
    """Workers that cannot start: one line that says what to lower."""
    code = """
import resource
from common.errors import UserError
from common.workers import Workers
resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))
try:
    Workers(["multigoal"], 20)
except UserError as error:
    print(error)
"""
    message = program(code, tmp_path)
    assert "Too many open files" in message and "--workers" in message and message.count("\n") == 1


def test_float64_is_refused_at_once(tmp_path):
    code = """
import fmer
from common.errors import UserError
from common.flags import parse
try:
    parse(fmer.Args, fmer.ENV_DEFAULTS, [])
except UserError as error:
    print(error)
"""
    assert "JAX_ENABLE_X64" in program(code, tmp_path, JAX_ENABLE_X64="1")


def test_paths_in_the_home_directory(monkeypatch, tmp_path):
    """A shell leaves --run-dir=~/runs as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    line = ["--run-dir=~/runs", "--dataset-dir=~/data", "--compile-cache=~/cache"]
    args = parse(meam.Args, meam.ENV_DEFAULTS, line)
    assert run_folder("meam.py", args).is_relative_to(tmp_path / "runs")
    source = resolve(args.env)
    file = tmp_path / "data" / f"{source.dataset}-v0.npz"
    file.parent.mkdir()
    file.touch()
    assert locate(source, args.dataset_dir) == [file]
    before = jax.config.jax_compilation_cache_dir
    try:
        with configured_jax(args):
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
