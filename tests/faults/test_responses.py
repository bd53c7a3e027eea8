"""A run comes back from the device about once a second, and then answers signals: everything is
saved, the run continues, and signals are as before."""

import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from common.signals import SIGNALS
from tests.helpers.small_run import EVALUATION, content, go, restore, sums
from tools.shared_blocks import ROOT

# --- the length of a call ------------------------------------------------------------------------


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


# --- signals -------------------------------------------------------------------------------------


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
