"""Environments in fresh Python processes, and what these processes do.

Worker processes import this module, so it must not import jax.
"""

import os
import subprocess
import sys
import traceback
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np

from common.environments import make_env
from common.errors import UserError

# Signals may reach the whole group of processes. Only the parent process answers them.
WORKER = """
import signal, sys
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
sys.path.insert(0, sys.argv[1])
from common.workers import work
work(int(sys.argv[2]))
"""


def cores() -> int:
    """Returns the number of cores that this process may use (fewer under Slurm or taskset)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


class GlobalGenerator:
    """One slot's state of NumPy's global generator, which mazes draw from."""

    playing: ClassVar["GlobalGenerator | None"] = None  # the one whose state NumPy has now

    def __init__(self):
        self.state = None  # where the numbers go on, while another one is playing

    def take(self) -> None:
        """Goes on with this state; as this is slow, only if another slot has played since."""
        before = GlobalGenerator.playing
        if before is self:
            return
        if before:
            before.state = np.random.get_state()
        if self.state:
            np.random.set_state(self.state)
        GlobalGenerator.playing = self


class Slot:
    """One environment."""

    def __init__(self, name: str, **options: Any):
        self.env = make_env(name, **options)
        self.generator = GlobalGenerator()

    def start(self, seed: int) -> tuple:
        """Begins an episode and returns a tuple with its first observation."""
        self.generator.take()
        np.random.seed(seed)
        observation, _ = self.env.reset(seed=int(seed))
        return (np.float32(observation),)

    def step(self, action: np.ndarray) -> tuple:
        """Returns next observation, reward, mask (0 where the task, not the clock, ended the
        episode), whether the episode ended, and success (NaN where none is reported)."""
        self.generator.take()
        observation, reward, terminated, truncated, info = self.env.step(action)
        ended = terminated or truncated
        success = info.get("success", info.get("is_success", np.nan))
        # Environments that compute with arrays return them as arrays of one number.
        reward = np.asarray(reward, float).item()
        success = np.asarray(success, float).item()
        return np.float32(observation), reward, not terminated, ended, success

    def replay(self, seed: int, age: int, actions: np.ndarray) -> tuple:
        """Plays the last `age` actions again and returns a tuple with the last observation."""
        result = self.start(seed)
        for action in actions[len(actions) - age :]:
            result = self.step(action)
        return result


class Slots:
    """The environments of one process, made when they are first used."""

    def __init__(self, names: list[str]):
        self.names = names
        self.slots = {}

    def run(self, jobs: list[tuple[int, str, tuple]]) -> list[tuple]:
        """Calls a method of each slot: [(slot, method, arguments), ...] -> results."""
        results = []
        for index, method, arguments in jobs:
            if index not in self.slots:
                self.slots[index] = Slot(self.names[index])
            results.append(getattr(self.slots[index], method)(*arguments))
        return results


def work(pipe: int) -> None:
    """Answers the jobs that arrive in a worker process with their results or a traceback."""
    gymnasium.logger.min_level = gymnasium.logger.ERROR  # of this process alone
    connection = Connection(pipe)
    try:
        names, path = connection.recv()
        sys.path += path  # of the parent process, for modules of environments
        slots = Slots(names)
        while True:
            jobs = connection.recv()
            try:
                answer = slots.run(jobs)
            except Exception:
                answer = traceback.format_exc()
            connection.send(answer)
    except (EOFError, OSError):
        pass  # the parent process ended


class Worker:
    """A fresh Python process with environments, because jax does not survive a fork."""

    def __init__(self, names: list[str]):
        self.connection, theirs = Pipe()
        root = str(Path(__file__).resolve().parents[1])
        command = [sys.executable, "-P", "-c", WORKER, root, str(theirs.fileno())]
        # Nothing is drawn there, so a missing driver does not matter.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MUJOCO_GL": "disable"}
        self.process = subprocess.Popen(
            command,
            env=environment,
            pass_fds=[theirs.fileno()],
            process_group=0,  # Ctrl-C does not reach it, not even before it ignores signals
        )
        theirs.close()
        self.connection.send((names, [folder or os.getcwd() for folder in sys.path]))

    def send(self, jobs: list[tuple]) -> None:
        """Hands jobs to the process, which begins with them at once."""
        try:
            self.connection.send(jobs)
        except OSError:
            pass  # the process died; `receive` says so

    def receive(self) -> list[tuple]:
        """Waits for the results of the jobs. Raises RuntimeError if they failed."""
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            code = self.process.wait()
            answer = f"process {self.process.pid} died with exit code {code} (-9: out of memory?)"
        if isinstance(answer, str):
            raise RuntimeError(f"an environment worker failed: {answer}")
        return answer


class Workers:
    """Environments in several processes; slot i is in worker i modulo their number."""

    def __init__(self, names: list[str], count: int):
        try:
            self.workers = [Worker(names) for _ in range(count)]
        except OSError as error:  # of open files, processes or memory
            raise UserError(f"cannot start {count} workers ({error}): lower --workers") from None

    def run(self, jobs: list[tuple[int, str, tuple]]) -> list[tuple]:
        """Calls a method of each slot, like `Slots.run`. Raises RuntimeError if a worker fails."""
        count = len(self.workers)
        shares = {}
        for job in jobs:
            shares.setdefault(job[0] % count, []).append(job)
        for worker, share in shares.items():
            self.workers[worker].send(share)
        answers = {worker: iter(self.workers[worker].receive()) for worker in shares}
        return [next(answers[slot % count]) for slot, *_ in jobs]
