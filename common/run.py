"""A run's folder runs/<script>/<env>/<name>/: flags, tables, checkpoints, progress and signals.

The same command continues from the checkpoint there. Rows that were logged after it are dropped,
because they will be written again.
"""

import contextlib
import csv
import fcntl
import importlib.metadata
import io
import json
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from common.checkpoints import CHECKPOINT, PREVIOUS, Checkpoints, write_file
from common.errors import UserError
from common.flags import FREE

TABLES = ("train.csv", "eval.csv", "eval_only.csv")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SECONDS_PER_CALL = 1.0  # so that the progress bar and signals are answered in time


def environment_info() -> dict:
    """Returns commit, device and versions that a run is made with."""
    folder = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True)
    return dict(
        commit=git.stdout.strip(),
        device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        python=sys.version.split()[0],
        packages={d.name: d.version for d in importlib.metadata.distributions()},
    )


class StopRequest:
    """Remembers a signal until everything is saved; where nothing is unsaved, exits at once.

    A second signal ends the program as if it was not handled.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.requested = False
        self.unsaved = False  # whether there is work that a checkpoint would save
        self.handlers = {}  # signal -> what was there before

    def install(self) -> None:
        with contextlib.suppress(ValueError):  # not the main thread: signals stay as they are
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self.handlers[number] = signal.signal(number, self._answer)

    def restore(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def _answer(self, number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        self.requested = True
        if not self.unsaved:
            self.leave()
        name = signal.Signals(number).name
        print(f"\n{name}: saving after this step; repeat it to end at once", file=sys.stderr)

    def leave(self) -> None:
        """Ends the program, because everything is saved."""
        raise SystemExit(f"{self.folder} is saved. Repeat the command to continue.")


class Run:
    """The folder of a run, as a context: it is locked, and signals are answered with a checkpoint.

    Attributes: `agents`, the (task, seed) of each; `evaluation_due`, whether an evaluation follows
    the step that was just logged.
    """

    def __init__(self, script: str, args: Any, agents: list, data: dict, ends: tuple[int, ...]):
        """Begins or continues a run.

        `script` is the path of the script, `data` identifies the dataset, and `ends` are the steps
        at which the phases of the run end.
        """
        name = args.name or "default"
        self.folder = Path(args.run_dir).expanduser() / Path(script).stem / args.env / name
        self.args, self.agents, self.ends = args, agents, ends
        self.score, self.unit = "return", "step"
        if hasattr(args, "tasks"):
            self.score, self.unit = "success", "update"
        self.start = time.time()
        self.step, self.updates_per_call, self.call_began = 0, 1, 0.0
        self.evaluation_due, self.rollouts = False, None
        self.last_row = dict.fromkeys(TABLES, 0)  # step of each table's last row
        self.lost = set()  # agents with metrics that are not finite
        self.wandb = None
        self.stop = StopRequest(self.folder)
        with self._files(".lock"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / ".lock", "w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.folder} is in use by another process") from None
        flags = json.loads(json.dumps(vars(args) | data))
        id = self._check_same_flags(flags)
        self.checkpoints = Checkpoints(self.folder, id)
        config = dict(id=id, flags=flags, made_with=environment_info())
        self._write("config.json", json.dumps(config, indent=1).encode())
        if args.track:
            with self._tracking():
                wandb = importlib.import_module("wandb")
                self.wandb = wandb.init(project="flow-policies", name=name, config=flags, id=id)

    def __enter__(self):
        self.stop.install()
        return self

    def __exit__(self, *_):
        self.stop.restore()
        self._lock.close()

    @contextlib.contextmanager
    def _files(self, name):
        try:
            yield
        except (OSError, ValueError, LookupError, TypeError) as error:
            problem = f"cannot use {self.folder / name}: {error}"
            raise UserError(f"{problem}. Fix this, then rerun the same command.") from None

    @contextlib.contextmanager
    def _tracking(self):
        try:
            yield
        except Exception as error:  # of any kind, because the run is worth more than its mirror
            self.wandb = None
            print(f"W&B failed; the run continues without it: {error}", file=sys.stderr)

    def _check_same_flags(self, flags: dict) -> str:
        """Returns the id of the run; refuses to continue one with other flags."""
        begun = any((self.folder / name).exists() for name in (CHECKPOINT, PREVIOUS, *TABLES))
        if not begun:
            return uuid.uuid4().hex[:16]
        with self._files("config.json"):
            config = json.loads((self.folder / "config.json").read_text())
            old, id = config["flags"], config["id"]
        defaults = json.loads(json.dumps(vars(type(self.args)())))  # for flags newer than the run
        old = defaults | old
        keys = [key for key in old | flags if key not in FREE and old.get(key) != flags.get(key)]
        differences = [f"\n  {key}: {old.get(key)} there, {flags.get(key)} now" for key in keys]
        if differences:
            raise UserError(
                f"{self.folder} holds a run with another configuration:{''.join(differences)}\n"
                "To start another run, give it a --name; to continue that one, repeat its flags."
            )
        return id

    def _write(self, name: str, content: bytes) -> None:
        with self._files(name):
            write_file(self.folder / name, content)

    def restore(self, content: dict) -> tuple[int, dict]:
        """Returns the step and the content of the last checkpoint, (0, `content`) without one.

        The content has the pytrees that `log_and_save` gets, and `replay`, the transitions in it as
        arrays (agents, n, ...). Rows of the tables after the checkpoint are dropped.
        """
        like = content | dict(step=0, seconds=0.0, evaluation_due=False)
        with self._files("the checkpoints"):
            found = self.checkpoints.restore(like, with_replay=not self.args.eval_only)
        if found is None and self.args.eval_only:
            raise UserError(f"{self.folder} holds no checkpoint that could be evaluated")
        found = found or like | dict(replay={})
        self.step = found["step"]
        self.start -= found["seconds"]
        for table in TABLES:
            if (self.folder / table).exists():
                self._cut_table(table)
        last_evaluation = self.last_row["eval.csv"]
        self.evaluation_due = found["evaluation_due"] and last_evaluation < self.step
        if self.args.eval_only:
            self.evaluation_due = True
        if self.step:
            print(f"resuming from step {self.step:,}")
        self.bar = tqdm(
            initial=self.step, total=self.ends[-1], unit=self.unit, dynamic_ncols=True, disable=None
        )
        return self.step, found

    def _cut_table(self, table: str) -> None:
        """Drops the rows after the checkpoint, and steps without a row for every agent."""
        path = self.folder / table
        with self._files(table):
            header, *lines = path.read_text().splitlines(keepends=True) or [""]
            steps = []
            for line in lines:
                whole = line.endswith("\n")
                steps.append(int(line.split(",")[2]) if whole else self.step + 1)
        if lines and not self.step and table != "train.csv":  # they would be dropped
            raise UserError(
                f"{self.folder} has results but no checkpoint to continue from: move it away, or "
                "start another run with a --name"
            )
        num_rows = len(lines) // len(self.agents) * len(self.agents)
        kept = [i for i in range(num_rows) if steps[i] <= self.step]
        if kept:
            text = "".join([header, *(lines[i] for i in kept)])
            self._write(table, text.encode())
            self.last_row[table] = max(steps[i] for i in kept)
        else:
            path.unlink()

    def updates_until_due(self, step: int) -> int:
        """Returns for how many updates nothing is due, at most for about a second of work."""
        self.call_began = time.time()
        limits = [self.updates_per_call]
        limits += [end - step for end in self.ends if end > step]
        for interval in (self.args.log_interval, self.args.eval_interval):
            limits.append(interval - step % interval)
        return min(limits)

    def _adapt_call(self, updates: int) -> None:
        seconds = time.time() - self.call_began
        self.call_began = 0.0
        if seconds < SECONDS_PER_CALL / 2 and updates == self.updates_per_call:
            self.updates_per_call *= 2
        elif seconds > SECONDS_PER_CALL * 2 and updates > 1:
            self.updates_per_call = updates // 2

    def _passed(self, interval: int, step: int) -> bool:
        return step // interval > self.step // interval

    def log_and_save(self, step: int, metrics: dict, content: dict, replay: Any = None) -> dict:
        """Logs and saves after a step where it is due, and sets `evaluation_due`.

        `metrics` are sums over the updates since the last row, with their number under "updates".
        Returns the sums to go on with: zeros after a row. Exits after saving if a signal came.
        """
        if self.call_began:  # the bar must not run ahead of the device
            jax.block_until_ready(metrics)
            self._adapt_call(step - self.step)
        self.evaluation_due = step in self.ends or self._passed(self.args.eval_interval, step)
        row_due = self.evaluation_due or self._passed(self.args.log_interval, step)
        self.bar.update(step - self.step)
        self.step, self.stop.unsaved = step, True
        if row_due and metrics["updates"][0] > 0:
            updates = int(metrics["updates"][0])
            means = {name: x / updates for name, x in metrics.items() if name != "updates"}
            self.log("train.csv", step, means)
            metrics = jax.tree.map(jnp.zeros_like, metrics)
        if self.evaluation_due or self.stop.requested:
            seconds, due = time.time() - self.start, self.evaluation_due
            content = content | dict(step=step, seconds=seconds, evaluation_due=due)
            with self._files("the checkpoint"):
                self.checkpoints.save(content | dict(metrics=metrics), replay)
            self.stop.unsaved = False
            if self.stop.requested:
                self.stop.leave()
        return metrics

    def log_evaluation(self, step: int, results: dict[str, np.ndarray]) -> None:
        """Logs the means of results (agents, episodes) and keeps the paths for `finish`."""
        means = {name: x.mean(1) for name, x in results.items() if name != "path"}
        if self.score != "success":
            del means["success"]
        self.log("eval_only.csv" if self.args.eval_only else "eval.csv", step, means)
        self.bar.write(f"{step:,} {self.unit}s: {self.score} {means[self.score].mean():.2f}")
        self.evaluation_due, self.rollouts = False, results

    def log(self, table: str, step: int, metrics: dict) -> None:
        """Appends a row per agent to a table; `metrics` are arrays (agents,) by name.

        Reports agents with metrics that are not finite, and stops when no other agent is left.
        """
        values = np.array(list(metrics.values()), float)
        names = list(metrics)
        for metric, agent in np.argwhere(~np.isfinite(values)):
            task, seed = self.agents[agent]
            problem = f"{names[metric]} of task {task}, seed {seed} is not finite at step {step}"
            new = agent not in self.lost
            self.lost.add(agent)
            if len(self.lost) == len(self.agents):
                raise UserError(f"{problem}: {self.folder} stays as it was")
            if new:
                print(f"\n{problem}: this agent is lost, the others go on", file=sys.stderr)
        path = self.folder / table
        rows = []
        if not path.exists():
            rows.append(["task", "seed", "step", "seconds", *names])
        seconds = round(time.time() - self.start, 1)
        for (task, seed), numbers in zip(self.agents, values.T, strict=True):
            rows.append([task, seed, step, seconds, *numbers])
            if self.wandb:
                prefix = f"{path.stem}/task{task}-seed{seed}"
                with self._tracking():
                    entries = zip(names, numbers, strict=True)
                    self.wandb.log({f"{prefix}/{name}": x for name, x in entries}, step=step)
        with self._files(table), open(path, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        self.last_row[table] = step

    def finish(self) -> list[dict]:
        """Keeps the paths of the last evaluation, draws the pictures, returns the evaluations."""
        self.bar.close()
        if self.rollouts:
            self._write("rollouts.npz", self._pack_rollouts())
        plot = Path(__file__).resolve().parents[1] / "plot.py"
        if self.rollouts or not (self.folder / "curve.png").exists():
            if plot.exists() and b"def draw_rollouts" in plot.read_bytes():  # not one of your own
                subprocess.run([sys.executable, plot, self.folder], check=False)
        state = "complete" if self.step >= self.ends[-1] else "not complete"
        print(f"{self.folder} is {state}: {self.step:,} of {self.ends[-1]:,} {self.unit}s")
        table = self.folder / "eval.csv"
        with self._files("eval.csv"), open(table, newline="") as file:
            return list(csv.DictReader(file))

    def _pack_rollouts(self) -> bytes:
        arrays = dict(task=[task for task, _ in self.agents], success=self.rollouts["success"])
        for i, path in enumerate(self.rollouts["path"].flat):
            arrays[f"path{i}"] = np.array(path)
        content = io.BytesIO()
        np.savez(content, **arrays)
        return content.getvalue()
