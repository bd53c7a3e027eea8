"""Tests of benchmarks/watch.py: what a process has, and what grows."""

import subprocess
import sys
import threading
import time

import psutil
import pytest

from analysis.runs import read_csv
from benchmarks.watch import Options, main, measure, slopes
from common.errors import UserError

GROWING = """
import subprocess, sys, time
held = bytearray(64 * 2**20)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
files = [open("/dev/null") for _ in range(5)]
print("ready", flush=True)
sys.stdin.readline()
child.kill(), child.wait()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts file descriptors")
def test_a_process_and_its_children(tmp_path):
    """Memory, files and processes as they are; rows until the process ends."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen([sys.executable, "-c", GROWING], **pipes)
    assert process.stdout.readline() == "ready\n"
    watched = psutil.Process(process.pid)
    row = measure(watched)
    assert 64 < row["memory"] < 120 and 1 < row["workers_memory"] < 60
    assert row["processes"] == 2 and row["files"] >= 8  # the five, and those of any process
    process.communicate("\n")
    with pytest.raises(psutil.NoSuchProcess):
        measure(watched)
    with pytest.raises(UserError, match=f"no process {process.pid}"):
        main(Options(pid=process.pid, out=str(tmp_path / "rows.csv")))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts file descriptors")
def test_until_the_process_ends(tmp_path):
    """A row per interval; a file that is there is not overwritten."""
    line = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    process = subprocess.Popen(line, stdin=subprocess.PIPE)

    def end():
        """As soon as there are two rows."""
        for _ in range(600):
            if len(read_csv(tmp_path / "rows.csv").get("seconds", ())) >= 2:
                break
            time.sleep(0.1)
        process.communicate()

    reaper = threading.Thread(target=end)
    reaper.start()
    options = Options(pid=process.pid, out=str(tmp_path / "rows.csv"), interval=0.1)
    main(options)
    reaper.join()
    rows = read_csv(tmp_path / "rows.csv")
    assert [*rows] == ["seconds", "memory", "workers_memory", "files", "processes"]
    assert len(rows["seconds"]) >= 2 and (rows["processes"] == 1).all()
    with pytest.raises(UserError, match="already exists"):
        main(options)


def test_slopes(tmp_path):
    """Of the second half: what grows at first and stays is no leak."""
    rows = ["seconds,memory,files"]
    rows += [f"{60 * i},{100 + min(i, 10) * 50},{8 + i}" for i in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join(rows) + "\n")
    assert slopes(tmp_path / "rows.csv") == pytest.approx(dict(memory=0, files=60), abs=1e-6)
