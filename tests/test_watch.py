"""Tests of benchmarks/watch.py: what a process has, and what grows."""

import subprocess
import sys

import pytest

from benchmarks.watch import Options, family, main, measure, slopes

GROWING = """
import subprocess, sys, time
held = bytearray(64 * 2**20)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
files = [open("/dev/null") for _ in range(5)]
print("ready", flush=True)
sys.stdin.readline()
child.kill(), child.wait()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_process_and_its_children(tmp_path):
    """Memory, files and processes as they are; rows until the process ends."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", GROWING], **pipes)
    assert process.stdout.readline() == "ready\n"
    row = measure(process.pid)
    assert 64 < row["memory"] < 120 and 1 < row["workers_memory"] < 60
    assert row["processes"] == 2 and row["files"] >= 8  # the five, and those of any process
    assert family(process.pid)[0] == process.pid and len(family(process.pid)) == 2
    process.communicate("\n")
    with pytest.raises(OSError):
        measure(process.pid)
    main(Options(pid=process.pid, out=str(tmp_path / "rows.csv")))
    with pytest.raises(SystemExit, match="is there already"):
        main(Options(pid=process.pid, out=str(tmp_path / "rows.csv")))


def test_slopes(tmp_path):
    """Of the second half: what grows at first and stays is no leak."""
    rows = ["seconds,memory,files"]
    rows += [f"{60 * i},{100 + min(i, 10) * 50},{8 + i}" for i in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join(rows) + "\n")
    assert slopes(tmp_path / "rows.csv") == pytest.approx(dict(memory=0, files=60), abs=1e-6)
