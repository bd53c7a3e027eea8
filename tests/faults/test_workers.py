"""Processes that play episodes: what they import, what becomes of them, and what is said when one
of them fails."""

import gc
import os
import subprocess
import sys
import time

import psutil
import pytest

from common.env_pool import EnvPool
from tests.helpers.environments import DEADLY, TOY, column, noise, step
from tools.shared_blocks import ROOT


def ended(processes, seconds=10):
    """Whether all of them end within some seconds (a zombie has ended)."""

    def runs(process):
        try:
            return process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    until = time.time() + seconds
    while any(map(runs, processes)) and time.time() < until:
        time.sleep(0.05)
    return not any(map(runs, processes))


def test_workers_import_nothing_of_the_current_directory(tmp_path):
    """A common/ or a numpy.py there are not ours."""
    here, scripts = tmp_path / "here", tmp_path / "scripts"
    (here / "common").mkdir(parents=True)
    scripts.mkdir()
    (here / "common/__init__.py").write_text("raise SystemExit('the wrong common')")
    (here / "numpy.py").write_text("raise SystemExit('the wrong numpy')")
    (scripts / "script.py").write_text(
        f"""
import numpy as np
from common.env_pool import EnvPool
pool = EnvPool(["{TOY}"], 1, 1)
pool.reset(np.array([[5]], np.uint32))
print(pool.observations[0, 0, :2].tolist())
"""
    )
    process = subprocess.run(
        [sys.executable, str(scripts / "script.py")],
        cwd=here,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (process.stdout, process.stderr) == ("[5.0, 0.0]\n", "")


def test_an_environment_that_raises(new_pool):
    """RuntimeError with the traceback."""
    pool = new_pool([TOY])
    pool.reset(column(5))
    pool.set_actions([[[[-1, 0]]]])
    with pytest.raises(RuntimeError, match="(?s)worker failed.*ValueError: the toy is broken"):
        pool.step()
    with pytest.raises(RuntimeError, match="(?s)worker failed.*no-such-env"):
        new_pool(["no-such-env-v0"]).reset(column(0))


def test_a_worker_that_dies_at_work(new_pool):
    """RuntimeError with the exit code, at once."""
    pool = new_pool([TOY])
    pool.reset(column(5))
    pool.set_actions([[[[0, DEADLY]]]])
    with pytest.raises(RuntimeError, match="worker failed: process .* died with exit code -9"):
        pool.step()


def test_a_worker_that_is_killed_between_two_steps(new_pool):
    """The same when it dies while nothing is asked of it, as by the out-of-memory killer."""
    before = psutil.Process().children()
    pool = new_pool([TOY])
    pool.reset(column(5))
    (worker,) = set(psutil.Process().children()) - set(before)
    worker.kill()
    assert ended([worker])
    with pytest.raises(RuntimeError, match="died with exit code -9"):
        step(pool, noise(1, 2))


def test_the_workers_end_with_the_pool(new_pool):
    before = set(psutil.Process().children())
    pool = new_pool([TOY] * 3, 1, 2)
    assert not set(psutil.Process().children()) - before  # they start when they are needed
    pool.reset(column(5, 6, 7))
    workers = set(psutil.Process().children()) - before
    assert len(workers) == 2
    del pool
    gc.collect()
    assert ended(workers)


def test_workers_do_not_outlive_their_parent():
    """Also when it is killed without a chance to close them."""
    code = f"""
import time
import numpy as np
import psutil
from common.env_pool import EnvPool
pool = EnvPool(["{TOY}"] * 2, 1, 2)
pool.reset(np.array([[5], [6]], np.uint32))
print(*(child.pid for child in psutil.Process().children()), flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2 and all(worker.is_running() for worker in workers)
    parent.kill()
    parent.communicate()
    assert ended(workers)


def test_workers_do_not_answer_signals(new_pool):
    """Ctrl-C reaches the whole group of processes; only the parent process answers it."""
    before = set(psutil.Process().children())
    pool = EnvPool([TOY], 1, 1)
    pool.reset(column(50))
    (worker,) = set(psutil.Process().children()) - before
    for number in (1, 2, 15):
        worker.send_signal(number)
    time.sleep(0.1)
    assert step(pool, noise(1, 2))["next_observations"][0, 0, 1] == 1
