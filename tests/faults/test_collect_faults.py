"""Collections that meet damaged files, power cuts, dying workers, Ctrl-C and unusual scripts."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from common.collect import dataset as dataset_module
from common.collect import storage, workers
from common.collect.__main__ import main
from common.collect.plan import make_plan
from common.collect.storage import exclusive, find_damage, replacing
from tests.helpers.damage import rot
from tools.shared_blocks import ROOT

MAZE = "pointmaze-medium-stitch"
SIZE = 2000  # 10 training episodes and one for validation, each in a part
NUM_ROWS = 2010  # of the training file


def collect(folder, **options):
    return dataset_module.collect(MAZE, SIZE, folder, seed=3, workers=1, **options)


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """A folder with a whole collection."""
    folder = tmp_path_factory.mktemp("collected")
    collect(folder)
    return folder


@pytest.fixture
def copy(collected, tmp_path):
    """A copy of it, for tests that damage something."""
    folder = tmp_path / "copy"
    shutil.copytree(collected, folder)
    return folder


@pytest.fixture
def in_parts(copy, monkeypatch):
    """A folder whose collection was interrupted before the parts were joined."""
    shutil.rmtree(copy)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dataset_module, "write_arrays", interrupt)
        with pytest.raises(KeyboardInterrupt):
            collect(copy)
    return copy


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- Damaged files ---


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def foreign(path):
    path.write_bytes(b"something else, " * 1000)


def no_arrays(path):
    with zipfile.ZipFile(path, "w"):
        pass


def fewer_rows(path):
    with np.load(path) as file:
        arrays = {key: file[key][:-1] for key in file}
    np.savez(path, **arrays)


def no_arrays_inside(path):
    with zipfile.ZipFile(path, "w") as archive:
        for key in storage.KEYS:
            archive.writestr(f"{key}.npy", b"no array")


DAMAGES = [cut, empty, foreign, no_arrays, fewer_rows, no_arrays_inside]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_all_kinds_is_found(collected, tmp_path, damage):
    path = tmp_path / "file.npz"
    shutil.copyfile(collected / f"{MAZE}-v0.npz", path)
    assert find_damage(path, NUM_ROWS) == find_damage(path, NUM_ROWS, read_all=True) == ""
    damage(path)
    assert find_damage(path, NUM_ROWS)


def test_reading_all_finds_any_changed_byte(collected, tmp_path):
    path = tmp_path / "file.npz"
    shutil.copyfile(collected / f"{MAZE}-v0.npz", path)
    rot(path)
    assert find_damage(path, NUM_ROWS, read_all=True)


def test_an_io_error_is_no_damage(tmp_path):
    with pytest.raises(IsADirectoryError):
        find_damage(tmp_path, NUM_ROWS)


@pytest.mark.parametrize("name", [f"{MAZE}-v0.npz", f"{MAZE}-v0-val.npz"])
@pytest.mark.parametrize("damage", [cut, empty, rot])
def test_a_damaged_file_is_named_and_made_again(collected, copy, capsys, name, damage):
    damage(copy / name)
    collect(copy)
    output = capsys.readouterr().out
    assert f"{copy / name} is damaged" in output and "already there" not in output
    assert contents(copy) == contents(collected)


def test_damaged_parts_are_named_and_made_again(collected, in_parts, capsys):
    parts = sorted((in_parts / f"{MAZE}-v0.parts").iterdir())
    assert len(parts) == 2
    rot(parts[0])  # which only reading it all finds
    collect(in_parts)
    output = capsys.readouterr().out
    assert f"{parts[0]} is damaged" in output and f"{parts[1]} is damaged" not in output
    assert "11 episodes of 200 steps, 1 done" in output
    assert contents(in_parts) == contents(collected)


DAMAGED_SETTINGS = [b"", b"{", b"[1]", b"\xff\xfe\x00", b"\0" * 200]


@pytest.mark.parametrize("text", DAMAGED_SETTINGS)
def test_damaged_settings_of_finished_files(collected, copy, capsys, text):
    """They are made again if the files begin as the settings say, and else refused."""
    settings = copy / f"{MAZE}-v0.json"
    settings.write_bytes(text)
    collect(copy)
    output = capsys.readouterr().out
    assert f"{settings} is damaged" in output and "already there" in output
    assert contents(copy) == contents(collected)
    settings.write_bytes(text)
    assert main([MAZE, "--transitions", str(SIZE), "--seed", "4", "--dataset-dir", str(copy)]) == 2
    assert "other settings" in capsys.readouterr().err
    assert contents(copy) == contents(collected) | {settings.name: text}


@pytest.mark.parametrize("text", DAMAGED_SETTINGS)
def test_damaged_settings_of_parts(collected, in_parts, capsys, text):
    """Nobody knows the settings of the parts then: they are made again."""
    settings = in_parts / f"{MAZE}-v0.json"
    settings.write_bytes(text)
    collect(in_parts)
    output = capsys.readouterr().out
    assert f"{settings} is damaged" in output and "steps, 0 done" in output
    assert contents(in_parts) == contents(collected)


# --- Power cuts ---


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "settings.json"
    path.write_bytes(b"old")
    with pytest.raises(OSError), replacing(path) as file:
        file.write(b"new, but n")
        raise OSError(errno.ENOSPC, "no space left")
    assert path.read_bytes() == b"old"
    with replacing(path) as file:
        file.write(b"new")
    assert contents(tmp_path) == {"settings.json": b"new"}


def test_links_are_not_followed(tmp_path):
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    for name in ("file.tmp", "file.lock"):
        (tmp_path / name).symlink_to(target)
    with replacing(tmp_path / "file") as file:
        file.write(b"new")
    with pytest.raises(OSError), exclusive(tmp_path / "file.lock"):
        pass
    assert target.read_bytes() == b"precious" and (tmp_path / "file").read_bytes() == b"new"


def test_parts_are_removed_when_all_is_on_the_disk(in_parts, monkeypatch):
    """Each file is flushed before it gets its name, and the folder afterwards; parts go last."""
    events = []
    sync, replace, rmtree = os.fsync, os.replace, shutil.rmtree

    def logged_sync(descriptor):
        events.append(("sync", os.path.realpath(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def logged_replace(source, target):
        events.append(("replace", str(target)))
        replace(source, target)

    def logged_rmtree(path, **options):
        events.append(("remove", str(path)))
        rmtree(path, **options)

    monkeypatch.setattr(os, "fsync", logged_sync)
    monkeypatch.setattr(os, "replace", logged_replace)
    monkeypatch.setattr(shutil, "rmtree", logged_rmtree)
    collect(in_parts)
    expected = []
    for name in (f"{MAZE}-v0-val.npz", f"{MAZE}-v0.npz"):
        path = str(in_parts / name)
        expected += [("sync", f"{path}.tmp"), ("replace", path), ("sync", str(in_parts))]
    assert events == [*expected, ("remove", str(in_parts / f"{MAZE}-v0.parts"))]


def test_settings_are_there_before_parts(tmp_path, monkeypatch):
    """Else, after a cut, nobody would know what settings the parts have."""

    def collect_nothing(*_):
        settings = json.loads((tmp_path / f"{MAZE}-v0.json").read_bytes())
        assert settings["seed"] == 3
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(dataset_module, "collect_blocks", collect_nothing)
    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path)
    assert not (tmp_path / f"{MAZE}-v0.lock").exists()


# --- One process at a time ---


def test_a_waiting_process_locks_the_file_that_is_there(tmp_path, monkeypatch):
    """The lock that it waited for was removed by the process that held it."""
    path, flock, calls = tmp_path / "lock", fcntl.flock, []

    def remove_first(descriptor, operation):
        calls.append(operation)
        if len(calls) == 1:
            path.unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with exclusive(path):
        assert path.exists() and len(calls) == 2
    assert not path.exists()


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with exclusive(tmp_path / "lock"):
        pass
    assert "has no file locks" in capsys.readouterr().err


# --- Processes ---


def test_a_worker_that_dies_gives_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workers, "CODE", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert main([MAZE, "--transitions", "200", "--dataset-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "died with exit code -9" in error and error.count("\n") == 1


def test_a_worker_that_cannot_write_gives_one_line(tmp_path, capsys):
    plan = make_plan(MAZE, 200, tmp_path, 0)
    plan.settings_file.write_text(json.dumps(plan.settings()))
    plan.part(plan.blocks()[0]).with_suffix(".npz.tmp").mkdir(parents=True)
    assert main([MAZE, "--transitions", "200", "--dataset-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert ".npz.tmp" in error and error.count("\n") == 1


def run_python(code, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-c", code]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_a_script_without_main_guard(tmp_path):
    """It works, and is not run again by the workers, not even in a folder full of strange names."""
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong numpy')")
    (tmp_path / "common").mkdir()
    (tmp_path / "common/__init__.py").write_text("raise SystemExit('the wrong common')")
    script = tmp_path / "unguarded_script.py"
    script.write_text(
        "from common.collect.dataset import collect\n"
        f"print('begins')\nprint('has', collect('{MAZE}', 200, 'data', workers=2))\n"
    )
    process = subprocess.run(
        [sys.executable, "-P", str(script)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "MUJOCO_GL": "egl"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("begins") == 1
    assert f"has data/{MAZE}-v0.npz" in process.stdout


def test_ctrl_c_in_a_collection_that_a_script_started(tmp_path):
    """One line; the workers have gone when the script has."""
    command = [sys.executable, "-u", "-m", "qam", "--env", "pointmaze-medium", "--workers", "1"]
    command += ["--collect", "2000000", "--dataset-dir", "data", "--run-dir", "runs"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that runs the tests in the background has its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while True:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        if "Collecting" in line:
            break
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)  # returns once the workers have gone, too
    assert process.returncode == 1
    assert error.split() == ["interrupted"]


def test_training_scripts_do_not_import_what_collects(tmp_path):
    process = run_python(
        "import sys, qam; print([x for x in sys.modules if 'collect.' in x])", ROOT
    )
    assert process.stdout == "[]\n", process.stderr


def test_the_ant_is_imported_without_jax(tmp_path):
    """Workers of training runs import it by the environment's name."""
    code = (
        "import sys, gymnasium\n"
        "env = gymnasium.make('common.collect.ant:OnlineAntXY-v0', disable_env_checker=True)\n"
        "print(env.observation_space.shape, env.spec.max_episode_steps, 'jax' in sys.modules)\n"
    )
    process = run_python(code, tmp_path)
    assert process.stdout == "(29,) 1000 False\n", process.stderr
