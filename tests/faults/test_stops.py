"""Runs that are interrupted by signals and kills, and continued: what they leave equals what an
uninterrupted run leaves, bit by bit (except for the columns `seconds`).

`FAULTS=9 pytest -s tests/faults/test_stops.py -k kills` kills every script, and the collection of a
dataset, so many times, at random moments. (Two kills of most are part of CI:
test_killed_and_continued of tests/runs/test_script_runs.py.)
"""

import fcntl
import os
import pty
import random
import signal
import subprocess
import sys
import termios
import time
from functools import partial

import jax
import numpy as np
import pytest

import fmer
import qam
from common.checkpoints import CHECKPOINT
from common.env_pool import EnvPool
from common.run import Run
from common.signals import SIGNALS, StopRequest, end_of_imports, quiet_imports
from tests.helpers.flags import tiny_args, tiny_online, tiny_ppo
from tests.helpers.runs import assert_same, checkpoint, clean, command, folder_of, rows, start
from tools.shared_blocks import ROOT, named, scripts

KILLS = int(os.environ.get("FAULTS", 0))  # of every script
SCRIPTS = ["qam", "meam", "fmer", "baselines/rlpd", "baselines/ppo", "baselines/sac"]
pytestmark = pytest.mark.usefixtures("quick_compile", "find_modules", "heeded")


def pytest_generate_tests(metafunc):
    if "script" in metafunc.fixturenames:
        metafunc.parametrize("script", SCRIPTS, indirect=True, scope="module")


@pytest.fixture(scope="module")
def args(script, module, dataset_dir):
    """Of a run of seconds: offline and online, on the plane, or in worker processes."""
    if script == "baselines/ppo":
        return tiny_ppo("hopper", eval_interval=48)
    if script in named("online"):
        return tiny_online(module, "hopper" if script == "baselines/sac" else "multigoal")
    apart = dict(online_steps=24, start_training=10) if script == "baselines/rlpd" else {}
    return tiny_args(module, dataset_dir, **apart)


@pytest.fixture(scope="module")
def reference(script, module, args, tmp_path_factory):
    """Folder of an uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("reference"))
        module.main(args)
        return folder_of(script, args)


# --- signals -------------------------------------------------------------------------------------


# Per start of the run: after so many calls of a function a signal comes (then the run is repeated).
MOMENTS = [
    ("chunk", 1),  # nothing is there yet that could be saved
    ("chunk", 2),
    ("play", 2),
    ("chunk", 2),
    ("play", 3),
    ("save", 1),
    ("play", 9),
]


def interrupted(monkeypatch, module, args, kind, calls, number):
    """Runs until a signal comes, in a call of the given kind. -> what SystemExit said, or "" where
    the run is complete before."""
    count = []
    before = signal.getsignal(number)

    def wrap(original):
        def function(*arguments, **more):
            if kind != "save" or str(arguments[1]).endswith(CHECKPOINT):
                count.append(0)
                if len(count) == calls:
                    os.kill(os.getpid(), number)
            return original(*arguments, **more)

        return function

    owners = dict(chunk=(module, "train_chunk"), play=(EnvPool, "step"), save=(os, "replace"))
    with monkeypatch.context() as patch:
        owner, name = owners[kind]
        patch.setattr(owner, name, wrap(getattr(owner, name)))
        try:
            module.main(args)
            return ""
        except SystemExit as error:
            assert len(count) >= calls and signal.getsignal(number) == before
            return str(error)


def test_signals(script, module, args, reference, here, monkeypatch):
    """Each signal while a chunk is trained, environments are stepped, a file is written: the run
    saves what is unsaved first, says how to continue, and the same command does."""
    steps = []
    for i, (kind, calls) in enumerate(MOMENTS):
        said = interrupted(monkeypatch, module, args, kind, calls, SIGNALS[i % 3])
        if not said:
            break
        assert said.endswith("is saved. Repeat the command to continue.") and "\n" not in said
        left = set(os.listdir(folder_of(script, args)))
        if i == 0:
            assert left == {".lock", "config.json", "script.py"}
        else:
            steps.append(checkpoint(folder_of(script, args))["step"])
    assert len(steps) >= 4 and steps == sorted(steps) and 0 < steps[0], steps
    usual = [int(row["step"]) for row in rows(reference, "eval")]  # is saved there in any case
    assert steps[0] not in usual, (steps, usual)
    module.main(args)
    assert_same(folder_of(script, args), reference)


def test_compilations_leave_nothing_unsaved(script, module, args, here, monkeypatch):
    """The first call of `train_chunk` in a phase compiles it. Nothing is unsaved then, so a signal
    does not wait for the compilation."""
    train, requests, unsaved = module.train_chunk, [], {}

    def spy(*arguments):
        shapes = str(jax.tree.map(np.shape, arguments[1:]))
        unsaved.setdefault(shapes, requests[0].unsaved)
        return train(*arguments)

    monkeypatch.setattr(module, "train_chunk", spy)
    monkeypatch.setattr(StopRequest, "install", lambda request: requests.append(request))
    module.main(args)
    two_phases = script in ("qam", "meam")
    assert [*unsaved.values()] == [False] * (2 if two_phases else 1)


def test_ignored_signals_stay_ignored(here, dataset_dir):
    """As in a shell's background, where Ctrl-C is meant for others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Run(qam.__file__, tiny_args(qam, dataset_dir), [(1, 0)], {}, (24,)) as run:
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        for number in (signal.SIGTERM, signal.SIGHUP):
            assert signal.getsignal(number) == run.stop._answer
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


CTRL_C = """
import os, signal
os.kill(os.getpid(), signal.SIGINT)
raise ImportError("nothing happened")
"""


PROGRAMS = {path.stem: [path] for path in [*scripts(), ROOT / "plot.py", ROOT / "video.py"]}
PROGRAMS |= {name: ["-m", name] for name in ("common.collect", "common.collect.replay")}


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_during_imports(program, tmp_path):
    """It ends the program without a traceback, unless it is ignored, as in a shell's background."""
    for first in ("flax", "gymnasium", "matplotlib", "tyro"):  # what they import first
        (tmp_path / f"{first}.py").write_text(CTRL_C)
    line = [sys.executable, *PROGRAMS[program]]
    options = dict(env=os.environ | dict(PYTHONPATH=str(tmp_path)), capture_output=True, cwd=ROOT)
    ended = subprocess.run(line, **options)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, b"", b"")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited
    ended = subprocess.run(line, **options)
    assert ended.returncode == 1 and b"nothing happened" in ended.stderr


def test_ctrl_c_after_imports():
    """It raises KeyboardInterrupt again, which `launch` answers in one line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    quiet_imports()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    end_of_imports()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


STUCK = """
import os, runpy, sys, time
def fsync(file):
    if "checkpoint" in os.readlink(f"/proc/self/fd/{file}"):
        time.sleep(600)
os.fsync = fsync
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_the_second_signal_ends_at_once(here):
    """Where saving takes forever: the first one of a kind is answered, the second one kills. (Not
    of SIGHUP: a terminal that is closed sends it more than once.)"""
    args = tiny_online(fmer)
    line = [sys.executable, "-c", STUCK, *command("fmer", args)[1:]]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    while not os.path.exists(f"{folder_of('fmer', args)}/{CHECKPOINT}.tmp"):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    for number in (signal.SIGHUP, signal.SIGTERM):
        process.send_signal(number)
        line = ""
        while "saving" not in line:
            line = process.stderr.readline()
            assert line, "the process has ended"
        assert f"{number.name}: saving after this step; repeat it to end at once" in line
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == -signal.SIGTERM
    assert not os.path.exists(f"{folder_of('fmer', args)}/{CHECKPOINT}")


def test_ctrl_c(here, dataset_dir):
    """Ctrl-C reaches the whole group of processes, the workers of environments as well: the run
    saves all the same, and ends with one line."""
    script = "qam"
    args = tiny_args(qam, dataset_dir, online_steps=3000, log_interval=500, eval_interval=3008)
    line = command(script, args)
    how = dict(stderr=subprocess.PIPE, text=True, start_new_session=True)
    process = subprocess.Popen(line, **how)
    while not os.path.exists(f"{folder_of(script, args)}/eval.csv"):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=120)[1].strip().splitlines()
    assert process.returncode == 1 and "Traceback" not in "\n".join(said)
    assert "is saved. Repeat the command to continue." in said[-1]
    assert 8 < checkpoint(folder_of(script, args))["step"] < 3008


@pytest.mark.parametrize("how", ["pipe", "terminal"])
def test_nobody_reads_any_more(here, how):
    """Ctrl-C ends `| tee` first, and a terminal that is closed sends SIGHUP: the run saves."""
    args = tiny_online(fmer, total_steps=100_000, log_interval=5, eval_interval=100_000)
    reader, theirs = os.pipe() if how == "pipe" else pty.openpty()
    take_terminal = partial(fcntl.ioctl, theirs, termios.TIOCSCTTY, 0)
    process = subprocess.Popen(
        command("fmer", args),
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        start_new_session=True,
        preexec_fn=take_terminal if how == "terminal" else None,
    )
    os.close(theirs)
    while not os.path.exists(f"{folder_of('fmer', args)}/train.csv"):
        assert process.poll() is None
        time.sleep(0.01)
    os.close(reader)
    if how == "pipe":
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 1
    assert checkpoint(folder_of("fmer", args))["step"] > 0


COMPILING = """
import os, runpy, signal, sys, threading, time
main = threading.main_thread().ident
def interrupt():
    seen = 0  # looks in a row that found jax's compiler at work
    while seen < 5:
        time.sleep(0.02)
        frame = sys._current_frames()[main]
        seen = seen + 1 if frame.f_code.co_filename.endswith("jax/_src/compiler.py") else 0
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_ctrl_c_during_a_compilation(here):
    """jax goes on compiling in a thread, and must not crash at the end of the process."""
    import baselines.sac as sac

    line = [sys.executable, "-c", COMPILING, *command("baselines/sac", tiny_online(sac))[1:]]
    ended = subprocess.run(line, env=clean(here), capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.endswith("is saved. Repeat the command to continue.\n")
    assert ended.stderr.count("\n") == 1


# --- kills ---------------------------------------------------------------------------------------

MORTAL = """
import os, runpy, sys, threading, time
from common.run import Run
delay, slow, restore, fsync = float(sys.argv.pop(1)), float(sys.argv.pop(1)), Run.restore, os.fsync
os.fsync = lambda file: (time.sleep(slow), fsync(file))  # as over a network
def then_die(run, tree):
    result = restore(run, tree)
    timer = threading.Timer(delay, os.kill, (os.getpid(), 9))
    timer.daemon = True
    timer.start()
    return result
Run.restore = then_die
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


@pytest.mark.skipif(not KILLS, reason="FAULTS=8 for 8 kills of each script; others are in CI")
def test_kills(script, args, reference, here):
    """SIGKILL at random moments after the run's start or continuation, half of them while writing
    takes long, and the same command again."""
    generator = random.Random(script)
    flags = command(script, args)[1 + len(start(script, ROOT)) :]
    for kill in range(KILLS + 1):
        delay = generator.uniform(0, 3) if kill < KILLS else 1e6
        slow = f"{0.4 * (kill % 2)}"
        line = [sys.executable, "-c", MORTAL, f"{delay}", slow, script.replace("/", "."), *flags]
        process = subprocess.run(line, capture_output=True, text=True)
        print(f"{script}: exit code {process.returncode}, at most {delay:.2f} s after its start")
    assert process.returncode == 0, process.stderr
    assert_same(folder_of(script, args), reference)


def test_kills_of_a_collection(tmp_path):
    """SIGKILL at random moments of a collection, its workers still at work: the same command goes
    on, and the files are those of a collection that nobody killed."""
    generator, files = random.Random(0), []
    line = [sys.executable, "-m", "common.collect", "pointmaze-medium-stitch", "--workers", "2"]
    line += ["--transitions", "20000", "--dataset-dir"]
    for folder, kills in ((tmp_path / "whole", 0), (tmp_path / "killed", KILLS or 2)):
        for kill in range(kills + 1):
            delay = generator.uniform(0, 3) if kill < kills else 1e6
            pipes = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            process = subprocess.Popen([*line, str(folder)], **pipes)
            said = process.stdout.readline()
            assert "Collecting" in said or "already there" in said, process.stderr.read()
            try:
                process.communicate(timeout=delay)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            if kills:
                print(f"collect: exit code {process.returncode}, at most {delay:.2f} s after")
        assert process.returncode == 0
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(files[0]) == 3 and files[0] == files[1]
