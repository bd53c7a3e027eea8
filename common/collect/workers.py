"""Worker processes that collect blocks of episodes.

A worker is a fresh interpreter that imports this module and nothing of the calling script, which
therefore needs no `if __name__ == "__main__":` and loads jax only once. Modules in the current
directory are not imported.
"""

import os
import subprocess
import sys
import threading
import traceback
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

from common.collect.episodes import collect_episode, make_collection_env
from common.collect.plan import CollectError, Plan
from common.collect.storage import write_arrays

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import sys
sys.path.insert(0, {root!r})
from common.collect.workers import serve
serve({descriptor})
"""


class Worker:
    """A worker process, from the side of its parent. Leaving the context ends it at once."""

    def __init__(self, plan: Plan):
        self.connection, theirs = Pipe()
        code = CODE.format(root=str(ROOT), descriptor=theirs.fileno())
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            env=os.environ | {"MUJOCO_GL": "disable"},  # Nothing is drawn, so no driver is needed.
            stdin=subprocess.PIPE,  # It closes when the parent dies, and then the worker ends.
            pass_fds=[theirs.fileno()],
            process_group=0,  # Ctrl-C reaches the parent alone, which decides when to stop.
        )
        theirs.close()
        self.send(plan)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.connection.close()

    def send(self, message: Plan | range) -> None:
        """Sends the plan, or a block to collect."""
        with suppress(OSError):  # The worker has died, as `receive` will find.
            self.connection.send(message)

    def receive(self) -> range:
        """Returns the block that was collected.

        Raises CollectError if the worker died, and the worker's own error if it failed.
        """
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            code = self.process.wait()
            raise CollectError(
                f"a worker process died with exit code {code} (-9 often means out of memory); "
                "run the same command again to continue, with fewer --workers if it recurs"
            ) from None
        if isinstance(answer, BaseException):
            raise answer
        return answer


def collect_blocks(plan: Plan, blocks: Sequence[range], num_workers: int) -> Iterator[range]:
    """Collects blocks of episodes in worker processes; yields each one when its part is written.

    Raises CollectError if a worker dies, and the worker's error if it fails.
    """
    waiting = list(reversed(blocks))
    with ExitStack() as stack:
        workers = {}
        for _ in range(min(num_workers, len(blocks))):
            worker = stack.enter_context(Worker(plan))
            worker.send(waiting.pop())
            workers[worker.connection] = worker
        while workers:
            for connection in wait(list(workers)):
                worker = workers[connection]
                yield worker.receive()
                if waiting:
                    worker.send(waiting.pop())
                else:
                    del workers[connection]


# --- In the worker ---


def serve(descriptor: int) -> None:
    """Collects the blocks that the parent sends through a file descriptor, until that ends."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    connection = Connection(descriptor)
    with suppress(EOFError, ConnectionError):  # The parent has died.
        _answer(connection)


def _answer(connection: Connection) -> None:
    plan = connection.recv()
    env = make_collection_env(plan.dataset)
    while True:
        block = connection.recv()
        try:
            episodes = [collect_episode(env, plan.dataset, plan.seed, i) for i in block]
            write_arrays(plan.part(block), episodes, zipfile.ZIP_STORED)
            answer = block
        except OSError as error:
            answer = error
        except Exception:
            answer = RuntimeError(f"a worker failed:\n{traceback.format_exc()}")
        connection.send(answer)


def _exit_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # Nothing is ever sent: it returns when the pipe is closed.
    os._exit(1)
