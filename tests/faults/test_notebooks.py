"""Runs in a process that does other things as well, such as a notebook: imports change nothing, an
interrupted cell can be run again, runs know nothing of each other."""

import dataclasses
import signal
import subprocess
import sys

import pytest

import fmer
from common.agents import train
from common.errors import UserError
from tests.helpers.flags import tiny_online
from tests.helpers.runs import assert_same, checkpoint, folder_of, quick
from tools.shared_blocks import ROOT

pytestmark = pytest.mark.usefixtures("quick_compile", "heeded")


def test_a_cell_that_is_interrupted_is_run_again(here, monkeypatch):
    """Signals and the folder's lock are given back; the same call continues to the same end."""
    flags = {k: v for k, v in vars(tiny_online(fmer)).items() if k not in ("action_size", "name")}
    with monkeypatch.context() as patch:
        train_chunk = fmer.train_chunk
        calls = []

        def interrupt(*inputs):
            calls.append(0)
            if len(calls) == 30:
                signal.raise_signal(signal.SIGINT)
            return train_chunk(*inputs)

        patch.setattr(fmer, "train_chunk", interrupt)
        with pytest.raises(SystemExit, match="is saved. Repeat the command to continue."):
            train(fmer, **flags)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    folder = train(fmer, **flags)
    whole = train(fmer, **flags, name="whole")
    assert folder != whole and ",total-steps=72," in folder.name
    assert_same(folder, whole)


GLOBAL_STATE = """
import logging, os, signal, sys, warnings
import flax, gymnasium, jax, matplotlib, numpy, ogbench, optax, tyro

def state():
    return dict(
        environment=dict(os.environ),
        path=list(sys.path),
        hooks=(sys.excepthook, sys.displayhook),
        signals=[signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        warnings=repr(warnings.filters),
        gymnasium=gymnasium.logger.min_level,
        logging=(logging.root.level, list(logging.root.handlers)),
        random=repr(numpy.random.get_state()),
        numpy=(numpy.geterr(), numpy.get_printoptions()),
        jax=dict(jax.config.values),
        matplotlib=dict(matplotlib.rcParams),
        folder=(os.getcwd(), os.listdir()),
    )

before = state()
import {}
import common.agents
after = state()
assert before == after, [name for name in before if before[name] != after[name]]
"""


def test_importing_changes_no_global_state(tmp_path):
    """Of the process: in a notebook, everything else goes on as before."""
    names = "meam, qam, qam_edit, qam_fql, fmer, baselines.fql, baselines.rlpd, baselines.ppo"
    code = GLOBAL_STATE.format(names)
    environment = quick(tmp_path) | dict(PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", code]
    how = dict(cwd=tmp_path, capture_output=True, text=True, env=environment)
    answer = subprocess.run(command, **how)
    assert answer.returncode == 0, answer.stderr


def test_importing_changes_no_settings():
    """Of matplotlib: its backend is chosen only where plot.py is the program."""
    code = "import matplotlib\nbefore = matplotlib.rcParams.copy()\n"
    code += "import plot, video, benchmarks.bandits, benchmarks.multigoal\n"
    code += "assert dict.__eq__(before, matplotlib.rcParams.copy())\n"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_two_runs_in_one_process(here, monkeypatch):
    """One after the other, and one within the other: neither knows of the other, and handlers of
    signals are in the end what they were. Two runs in one folder are refused."""
    mine = lambda *_: None
    signal.signal(signal.SIGTERM, mine)
    args = tiny_online(fmer, name="first")
    inner = dataclasses.replace(args, name="second")
    original, seen = fmer.evaluate, []

    def evaluate(*arguments):
        if not seen:
            seen.append(signal.getsignal(signal.SIGTERM))
            with pytest.raises(UserError, match="in use by another process"):
                fmer.main(args)
            fmer.main(inner)
            assert signal.getsignal(signal.SIGTERM) == seen[0] != mine
        return original(*arguments)

    monkeypatch.setattr(fmer, "evaluate", evaluate)
    fmer.main(args)
    assert signal.getsignal(signal.SIGTERM) == mine
    fmer.main(dataclasses.replace(args, name="third"))
    for other in ("second", "third"):
        other = dataclasses.replace(args, name=other)
        assert_same(folder_of("fmer", args), folder_of("fmer", other))


def test_main_again_after_an_error(here, monkeypatch):
    """In a notebook, which keeps the last errors with all that they refer to: an interrupted run
    and a refused one hold neither the folder nor the signals."""
    args = tiny_online(fmer)
    original, calls = fmer.train_chunk, []

    def interrupt(*arguments):
        calls.append(0)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(fmer, "train_chunk", interrupt)
        with pytest.raises(KeyboardInterrupt) as first:
            fmer.main(args)
    assert checkpoint(folder_of("fmer", args))["step"] == 24
    with pytest.raises(UserError, match="critic_lr") as second:
        fmer.main(dataclasses.replace(args, critic_lr=0.5))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert len(fmer.main(args)) == 3 * 2
    assert first.tb and second.tb
    whole = dataclasses.replace(args, name="whole")
    fmer.main(whole)
    assert_same(folder_of("fmer", args), folder_of("fmer", whole))
