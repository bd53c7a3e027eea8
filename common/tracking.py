"""Mirrors a run's numbers and pictures in Weights & Biases or TensorBoard (--track)."""

import contextlib
import importlib
import importlib.metadata
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, in_a_line

PACKAGES = dict(wandb="wandb", tensorboard="tensorboardX")  # of each choice of --track
PICTURES = ("curve.png", "rollouts.png")


def check_installed(choice: str) -> None:
    """Raises UserError if the package that --track needs is missing."""
    package = PACKAGES[choice]
    try:  # Not by an import: W&B's own folder wandb/ can be imported where the package is missing.
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f"--track {choice} needs a package: pip install {package} (or leave out --track)"
        ) from None


def named_numbers(
    table: str, agents: list[tuple[int, int]], metrics: dict[str, np.ndarray]
) -> dict[str, float]:
    """Names the numbers of a table's rows; `metrics` are arrays (agents,) by name.

    <table>/<metric> is the mean over all agents, <table>/task<n>/<metric> the mean over a task's
    seeds where there are several tasks, and seeds/<table>/<metric>/task<n>-seed<m> a single agent
    where there are several.
    """
    tasks = sorted({task for task, _ in agents})
    task_of = np.array([task for task, _ in agents])
    numbers = {}
    for metric, values in metrics.items():
        values = np.asarray(values, float)
        numbers[f"{table}/{metric}"] = values.mean().item()
        if len(tasks) > 1:
            for task in tasks:
                numbers[f"{table}/task{task}/{metric}"] = values[task_of == task].mean().item()
        if len(agents) > 1:
            for (task, seed), value in zip(agents, values.tolist(), strict=True):
                numbers[f"seeds/{table}/{metric}/task{task}-seed{seed}"] = value
    return numbers


class WandbMirror:
    """A run in Weights & Biases. WANDB_* environment variables apply where no flag is given."""

    def __init__(self, args: Any, name: str, config: dict, run_id: str):
        self.wandb = importlib.import_module("wandb")
        self.run = self.wandb.init(
            project=args.wandb_project or os.environ.get("WANDB_PROJECT", "flow-policies"),
            entity=args.wandb_entity or None,
            group=args.wandb_group or None,
            name=name,
            id=run_id,
            resume="allow",
            reinit="create_new",  # Another run of this process stays what it is.
            config=config,
            allow_val_change=True,  # Some flags may differ when a run is continued.
        )
        tags = [*self.run.tags, config["script"], config["env"]]
        self.run.tags = list(dict.fromkeys(tags))
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Logs numbers. The step is one of them, because W&B's own must never go back."""
        self.run.log(numbers | dict(step=step))

    def log_picture(self, step: int, path: Path) -> None:
        """Logs a picture under its file's name."""
        self.run.log({path.stem: self.wandb.Image(str(path)), "step": step})

    def finish(self, failed: bool) -> None:
        """Ends the mirror, and says whether the run ended with an error."""
        self.run.finish(exit_code=int(failed))


class TensorBoardMirror:
    """Event files of TensorBoard in the run's folder."""

    def __init__(self, folder: Path, config: dict):
        tensorboard = importlib.import_module("tensorboardX")
        suffix = f".{time.time_ns()}"  # Otherwise two within a second would be the same file.
        self.writer = tensorboard.SummaryWriter(str(folder), filename_suffix=suffix)
        lines = [f"    {name}: {value}" for name, value in config.items()]
        self.writer.add_text("config", "\n".join(lines))

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Logs numbers by name."""
        for name, number in numbers.items():
            self.writer.add_scalar(name, number, step)

    def log_picture(self, step: int, path: Path) -> None:
        """Logs a picture under its file's name."""
        image = importlib.import_module("PIL.Image")
        pixels = np.asarray(image.open(path).convert("RGB"))
        self.writer.add_image(path.stem, pixels, step, dataformats="HWC")

    def finish(self, failed: bool) -> None:
        """Writes what is left."""
        self.writer.close()


class Tracker:
    """Mirrors a run, if --track asks for it; a failure ends the mirror, not the run."""

    def __init__(self, args: Any, folder: Path, agents: list[tuple[int, int]], config: dict):
        """Begins or continues the mirror of the run in `folder`, which has this config.json."""
        self.folder = folder
        self.agents = agents
        self.choice = args.track
        self.mirror = None
        if self.choice:
            check_installed(self.choice)
            with self._giving_up():
                self.mirror = self._begin(args, config)

    def _begin(self, args: Any, config: dict) -> WandbMirror | TensorBoardMirror:
        script, env, name = self.folder.parts[-3:]
        made_with = {key: x for key, x in config["made_with"].items() if key != "packages"}
        shown = config["flags"] | made_with | dict(script=script)
        if self.choice == "wandb":
            return WandbMirror(args, f"{script}-{env}-{name}", shown, config["id"])
        return TensorBoardMirror(self.folder, shown)

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.mirror = None
            problem = in_a_line(error, most=None)
            print(f"{self.choice} failed; the run continues without it: {problem}", file=sys.stderr)

    def log(self, table: str, step: int, metrics: dict[str, np.ndarray]) -> None:
        """Logs a table's rows of a step; `metrics` are arrays (agents,) by name."""
        if self.mirror is not None:
            with self._giving_up():
                self.mirror.log(step, named_numbers(table, self.agents, metrics))

    def log_pictures(self, step: int) -> None:
        """Logs the pictures that are in the run's folder."""
        for name in PICTURES:
            if self.mirror is not None and (self.folder / name).exists():
                with self._giving_up():
                    self.mirror.log_picture(step, self.folder / name)

    def finish(self, failed: bool = False) -> None:
        """Ends the mirror."""
        if self.mirror is not None:
            with self._giving_up():
                self.mirror.finish(failed)
