"""How long a run of the paper's size takes to answer Ctrl-C.

    python -m benchmarks.stops                              ME-AM, three signals at random moments
    python -m benchmarks.stops --script fmer --signals 5

Trains one agent with the class's networks and batches (those of the papers) on a task that needs no
download, sends SIGINT after a random time, and measures until the process has ended with its
checkpoint written. The same command then continues the run for the next signal. Writes
benchmarks/results/stops.json: seconds until the end, and the size of the checkpoint.
"""

import dataclasses
import importlib.metadata
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from analysis.command_line import run_program
from analysis.runs import ROOT
from analysis.scripts import script_of
from benchmarks import RESULTS
from benchmarks.throughput import describe
from common.checkpoints import CHECKPOINT
from common.errors import UserError

LONGEST = 300  # seconds until a run that does not stop is killed
SIZES = ("hidden_dims", "num_critics", "batch_size", "flow_steps")


@dataclasses.dataclass(frozen=True)
class Options:
    script: str = "meam"
    """Script, such as meam or fmer."""
    signals: int = 3
    """Number of signals."""
    earliest: float = 10.0
    """Seconds of training before a signal, at least."""
    latest: float = 40.0
    """Seconds of training before a signal, at most."""
    seed: int = 0
    """Seed of the random moments."""
    out: str = str(RESULTS / "stops.json")
    """File of the results."""


def command_of(options: Options, folder: Path) -> list[str]:
    """Returns the command of a run that does not end by itself."""
    script = script_of(options.script)
    line = [sys.executable, "-m", script.__name__, "--run-dir", str(folder), "--name", "stops"]
    for flag in SIZES:  # not those that are tuned for a small environment
        values = getattr(script.Args, flag, None)
        if values is not None:
            values = values if isinstance(values, tuple) else (values,)
            line += [f"--{flag}".replace("_", "-"), *map(str, values)]
    steps = "--offline-steps" if hasattr(script.Args, "offline_steps") else "--total-steps"
    return [*line, steps, "1000000", "--log-interval", "20", "--eval-interval", "1000000"]


def wait_for_rows(process: subprocess.Popen, table: Path, rows: int) -> None:
    """Waits until a table has more than so many rows. Raises UserError if the process ends."""
    while not table.exists() or table.read_text().count("\n") <= rows:
        if process.poll() is not None:
            raise UserError(f"the run ended with exit code {process.returncode}")
        time.sleep(0.05)


def stop_once(command: list[str], folder: Path, moment: float) -> dict:
    """Starts or continues the run, sends SIGINT at a moment, and returns what it took."""
    table = folder / "train.csv"
    rows = table.read_text().count("\n") if table.exists() else 1
    # A shell's background jobs ignore SIGINT, and their children would, too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    signal.signal(signal.SIGINT, before)
    wait_for_rows(process, table, rows)
    time.sleep(moment)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    try:
        process.wait(LONGEST)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()  # it writes to a folder that is about to be removed
        raise UserError(f"the run did not stop within {LONGEST} s of SIGINT") from None
    seconds = time.monotonic() - began
    size = (folder / CHECKPOINT).stat().st_size / 2**20
    found = dict(after=round(moment, 1), seconds=round(seconds, 2), checkpoint_mib=round(size))
    print(found, flush=True)
    return found


def main(options: Options) -> None:
    """Sends the signals, prints and writes the results."""
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as work:
        command = command_of(options, Path(work))
        name = options.script.split(".")[-1]
        env = script_of(options.script).Args.env
        folder = Path(work, name, env, "stops")
        found = []
        for _ in range(options.signals):
            moment = rng.uniform(options.earliest, options.latest)
            found.append(stop_once(command, folder, moment))
    versions = {package: importlib.metadata.version(package) for package in ("jax", "jaxlib")}
    result = dict(script=name, device=describe(), versions=versions, stops=found)
    Path(options.out).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    run_program(main, Options, __doc__)
