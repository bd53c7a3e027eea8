"""A run's folder runs/<script>/<env>/<name>/: flags, tables, checkpoints, progress and signals.

The same command continues from the checkpoint there. Rows that were logged after it are dropped,
because they will be written again.
"""

import functools
import hashlib
import importlib.metadata
import io
import json
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from common.checkpoints import CHECKPOINT, PREVIOUS, Checkpoints
from common.devices import configured_jax
from common.environments import ONLINE
from common.errors import UserError
from common.files import FolderLock, file_errors, move_aside, read_config, write_file
from common.flags import FREE
from common.signals import StopRequest
from common.tables import TABLES, Tables
from common.tracking import Tracker

SCRIPT = "script.py"  # the source of a run's script, from which its agents are loaded
RESULTS = (CHECKPOINT, PREVIOUS, *TABLES)  # files from which a run continues
SECONDS_PER_CALL = 1.0  # between updates of the progress bar, and between checks for signals


@functools.cache
def installed_packages() -> dict[str, str]:
    """Returns name -> version of all packages; cached, because this takes a tenth of a second."""
    return {package.name: package.version for package in importlib.metadata.distributions()}


def environment_info() -> dict:
    """Returns commit, device and versions that a run is made with."""
    git = subprocess.run(
        "git rev-parse HEAD",  # prints nothing without git
        shell=True,
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return dict(
        commit=git.stdout.strip(),
        device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        python=sys.version.split()[0],
        packages=installed_packages(),
    )


def refuse_other_flags(folder: Path, old: dict, new: dict) -> None:
    """Raises UserError if a run has other flags, except those that change no result."""
    free = FREE
    if not any(folder.glob("replay-*.msgpack")):  # no online phase has begun
        free += ("start_training",)
    differences = []
    for flag in old | new:
        if flag not in free and old.get(flag) != new.get(flag):
            reason = " (the schedules are shares of it)" if flag == "total_steps" else ""
            differences.append(f"\n  {flag}: {old.get(flag)} there, {new.get(flag)} now{reason}")
    if differences:
        raise UserError(
            f"{folder} holds a run with another configuration:{''.join(differences)}\n"
            "To start another run, give it a --name; to continue that one, repeat its flags."
        )


def pack_rollouts(agents: list[tuple[int, int]], results: dict[str, np.ndarray]) -> bytes:
    """Returns the paths of an evaluation as an .npz file."""
    arrays = dict(task=[task for task, _ in agents], success=results["success"])
    for i, path in enumerate(results["path"].flat):
        arrays[f"path{i}"] = np.array(path)
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def describe_scores(name: str, scores: np.ndarray) -> str:
    """Returns a line with the mean of scores (agents, episodes), and its 95 % bootstrap interval.

    Episodes are resampled within each agent, so the interval says how exact the evaluation is, not
    how much seeds differ.
    """
    count, episodes = scores.shape
    draws = np.random.default_rng(0).integers(episodes, size=(1000, count, episodes))
    resampled = np.take_along_axis(scores[None], draws, axis=2)
    low, high = np.percentile(resampled.mean((1, 2)), [2.5, 97.5])
    text = f"{name:12} {scores.mean():.2f} [{low:.2f}, {high:.2f}]"
    return f"{text} (mean of {count * episodes} episodes, 95 % bootstrap interval)"


def run_folder(script: str, args: Any) -> Path:
    """Returns runs/<script>/<env>/<name>. Raises UserError if the flags have no name."""
    if not args.name:
        raise UserError(
            f"Args(...) alone lacks the defaults of {args.env}. Use `train` of common.agents or "
            "`parse` of common.flags."
        )
    env = args.env.replace("/", "-")  # of ids with a namespace
    return Path(args.run_dir).expanduser() / Path(script).stem / env / args.name


def draw_pictures(folder: Path) -> None:
    """Lets plot.py draw a run's curve and rollouts, if it is next to common/."""
    plot = Path(__file__).resolve().parents[1] / "plot.py"
    if plot.exists() and b"from analysis" in plot.read_bytes():  # not one of your own
        subprocess.run([sys.executable, plot, folder], check=False)


def as_json(values: dict) -> dict:
    """Returns values as a JSON file would give them back: tuples become lists."""
    return json.loads(json.dumps(values))


class Run:
    """The folder of a run, as a context manager: locks it, and saves when a signal comes.

    `evaluation_due` says whether an evaluation follows the step that was just logged.
    """

    def __init__(self, script: str, args: Any, agents: list, data: dict, ends: tuple):
        """Begins or continues a run.

        `script` is the path of the script, `agents` has the (task, seed) of each, `data` identifies
        the dataset, and `ends` are the steps at which the phases of the run end.
        """
        self.args = args
        self.agents = agents
        self.ends = ends
        self.reference_scores = data.get("reference_scores")  # returns that are 0 and 100
        self.folder = run_folder(script, args)
        if args.eval_only and not args.eval_episodes:
            raise UserError("--eval-only without episodes does nothing: give it --eval-episodes")
        if args.eval_only and not self._has_any(CHECKPOINT, PREVIOUS):
            raise UserError(f"{self.folder} holds no checkpoint that could be evaluated")
        self.lock = FolderLock(self.folder)
        flags = as_json(vars(args) | data)
        try:
            if args.overwrite:
                self._begin_anew()
            config = self._configure(Path(script), flags)
            self.tracker = Tracker(args, self.folder, agents, config)
        except BaseException:
            self.lock.close()  # a notebook keeps the error, and with it this object
            raise
        self.checkpoints = Checkpoints(self.folder, config["id"])
        self.tables = Tables(self.folder, agents, self.tracker)
        without = ", without --overwrite," if args.overwrite else ""
        self.stop = StopRequest(f"{self.folder} is saved. Repeat the command{without} to continue.")
        self.jax_configuration = configured_jax(args)
        self.step = 0
        self.updates_per_call = 1
        self.call_began = None
        self.bar = tqdm(disable=True)  # until `restore` knows the step
        self.evaluation_due = False
        self.last_scores = None  # the name of the score and its values (agents, episodes)

    def __enter__(self) -> "Run":
        self.jax_configuration.__enter__()
        self.stop.install()
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        self.stop.restore()
        self.bar.close()  # so that what is printed next has a line of its own
        self.jax_configuration.__exit__(None, None, None)
        try:  # It may wait for a network until somebody interrupts it.
            self.tracker.finish(failed=kind is not None)
        finally:
            self.lock.close()

    def _has_any(self, *names: str) -> bool:
        """Returns whether the folder has one of these files."""
        return any((self.folder / name).exists() for name in names)

    def _begin_anew(self) -> None:
        """Moves the old folder aside."""
        if self.args.eval_only:
            raise UserError("--overwrite and --eval-only exclude each other")
        if self._has_any("config.json", *RESULTS):
            aside = move_aside(self.folder)
            self.lock.close()
            self.lock = FolderLock(self.folder)
            print(f"moved {self.folder} to {aside}")

    def _configure(self, script: Path, flags: dict) -> dict:
        """Returns what config.json will have; refuses to continue a run with other flags.

        The script's source is saved next to it; a note is printed if it has changed. A continued
        run writes both files only in `restore`, once its checkpoint is read.
        """
        with file_errors(script):
            source = script.read_bytes()
        digest = hashlib.sha256(source).hexdigest()
        now = dict(flags=flags, script=script.stem, source_sha256=digest, agents=self.agents)
        config = dict(id=uuid.uuid4().hex[:16], **now, made_with=environment_info())
        continues = self._has_any(*RESULTS)
        if continues:
            old = read_config(self.folder)
            if "id" not in old:
                raise UserError(f"{self.folder / 'config.json'} is damaged: it lacks the run's id")
            defaults = as_json(vars(type(self.args)()))
            old_flags = defaults | old["flags"]  # some flags may be newer than the run
            refuse_other_flags(self.folder, old_flags, flags)
            config = old | now
            if old.get("source_sha256", digest) != digest:
                print(f"Note: {script} is not the script that {self.folder} was made with so far.")
        self.new_files = {SCRIPT: source, "config.json": json.dumps(config, indent=1).encode()}
        if not continues:
            self._write_new_files()
        return config

    def _write_new_files(self) -> None:
        """Writes the script's source and config.json, once."""
        if not self.args.eval_only:
            for name, content in self.new_files.items():
                write_file(self.folder / name, content)
        self.new_files = {}

    def restore(self, content: dict) -> tuple[int, dict]:
        """Returns the step and the content of the last checkpoint, (0, `content`) without one.

        The content has the pytrees that `log_and_save` gets, and `replay`, the transitions in it as
        arrays (agents, n, ...). Rows of the tables after the checkpoint are dropped.
        """
        like = content | dict(step=0, seconds=0.0, evaluation_due=False)
        found = self.checkpoints.restore(like, with_replay=not self.args.eval_only)
        if found is None:
            found = like | dict(replay={})
        self.step = found["step"]
        self._check_phase(found["replay"])
        self.tables.start -= found["seconds"]
        if self.args.eval_only:
            self.tables.plan_cut("eval_only.csv", self.step)
        else:
            self.tables.continue_from(self.step)
        self._write_new_files()
        evaluated = self.tables.last_row["eval.csv"] >= self.step
        self.evaluation_due = self.args.eval_only or (found["evaluation_due"] and not evaluated)
        self._describe(content["state"])
        self.bar = tqdm(
            initial=self.step, total=self.ends[-1], unit="step", dynamic_ncols=True, disable=None
        )
        return self.step, found

    def _check_phase(self, replay: dict) -> None:
        """Refuses --offline-steps that do not fit the updates that the run has made."""
        if self.args.eval_only or not hasattr(self.args, "offline_steps"):
            return
        updates = self.step - replay.get("size", 0)  # in the offline phase
        if replay and self.args.offline_steps != updates:
            raise UserError(
                f"--offline-steps must stay {updates}: the online phase of {self.folder} has "
                "begun. To start another run, give it a --name."
            )
        if self.args.offline_steps < updates:
            raise UserError(
                f"--offline-steps must be at least {updates}, because {self.folder} has made so "
                "many updates. To start another run, give it a --name."
            )

    def _describe(self, state: Any) -> None:
        """Prints what the run trains, on what and where."""
        count = len(self.agents)
        parameters = sum(x.size for x in jax.tree.leaves(state.params)) // count
        agents = "agent" if count == 1 else "agents"
        print(f"environment  {self.args.env}")
        print(f"agents       {count} {agents}, {parameters:,} parameters each")
        print(f"device       {jax.device_count()} x {jax.devices()[0].device_kind}")
        print(f"folder       {self.folder}")
        if self.step:
            print(f"resuming from step {self.step:,} of {self.ends[-1]:,}")

    def updates_until_due(self, step: int) -> int:
        """Returns how many updates the next call makes, and starts its clock.

        They pass no step at which something is due, and take about a second.
        """
        self.call_began = time.time()
        limits = [self.updates_per_call]
        limits += [end - step for end in self.ends if end > step]
        for interval in (self.args.log_interval, self.args.eval_interval):
            limits.append(interval - step % interval)
        return min(limits)

    def _adapt_call(self, updates: int) -> None:
        """Makes the next calls longer or shorter, by how long this one took."""
        seconds = time.time() - self.call_began
        self.call_began = None
        if seconds < SECONDS_PER_CALL / 2 and updates == self.updates_per_call:
            self.updates_per_call *= 2
        elif seconds > SECONDS_PER_CALL * 2 and updates > 1:
            self.updates_per_call = updates // 2

    def _passes(self, interval: int, step: int) -> bool:
        """Returns whether a multiple of `interval` lies between the last step and this one."""
        return step // interval > self.step // interval

    def log_and_save(self, step: int, metrics: dict, content: dict, replay: Any = None) -> dict:
        """Logs and saves after a step where it is due, and sets `evaluation_due`.

        `metrics` are sums over the updates since the last row, with their number under "updates".
        Returns the sums to go on with: zeros after a row. Exits after saving if a signal came.
        """
        if self.call_began is not None:  # the bar must not run ahead of the device
            jax.block_until_ready(metrics)
            self._adapt_call(step - self.step)
        self.evaluation_due = step in self.ends or self._passes(self.args.eval_interval, step)
        row_due = self.evaluation_due or self._passes(self.args.log_interval, step)
        self.bar.update(step - self.step)
        self.step = step
        self.stop.unsaved = True
        if row_due or self.stop.requested:
            self.lock.check()
        if row_due and metrics["updates"][0] > 0:
            metrics = self._log_means(step, metrics)
        if self.evaluation_due or self.stop.requested:
            seconds = time.time() - self.tables.start
            content = content | dict(step=step, seconds=seconds, metrics=metrics)
            content["evaluation_due"] = self.evaluation_due
            self.checkpoints.save(content, replay)
            self.stop.unsaved = False
            if self.stop.requested:
                self.stop.leave()
        return metrics

    def _log_means(self, step: int, metrics: dict) -> dict:
        updates = int(metrics["updates"][0])
        means = {name: x / updates for name, x in metrics.items() if name != "updates"}
        self.tables.log("train.csv", step, means)
        losses = {name: f"{x.mean():.3g}" for name, x in means.items() if "loss" in name}
        self.bar.set_postfix(losses, refresh=False)
        return jax.tree.map(jnp.zeros_like, metrics)

    def log_evaluation(self, step: int, results: dict[str, np.ndarray]) -> None:
        """Logs the means of results (agents, episodes), and keeps the scores for `finish`.

        At the end of a run and with --eval-only, also saves the visited states in rollouts.npz. The
        first evaluation decides whether the environment reports success; where it does, an episode
        without a report is a failure.
        """
        table = "eval_only.csv" if self.args.eval_only else "eval.csv"
        reported = not np.isnan(results["success"]).all()
        columns = self.tables.columns(table)
        if columns:
            reported = "success" in columns
        results = results | dict(success=np.nan_to_num(results["success"]))
        means = {name: x.mean(1) for name, x in results.items() if name != "path"}
        if self.args.env in ONLINE or not reported:
            del means["success"]  # of ONLINE, returns are published
        score = "success" if "success" in means else "return"
        shown = [score]
        if self.reference_scores:
            low, high = self.reference_scores
            means["normalized_score"] = 100 * (means["return"] - low) / (high - low)
            shown.append("normalized_score")
        self.lock.check()
        if self.args.eval_only or step >= self.ends[-1]:
            # Before the row of the table, which says that the evaluation is done.
            write_file(self.folder / "rollouts.npz", pack_rollouts(self.agents, results))
        self.tables.log(table, step, means)
        scores = ", ".join(f"{name} {means[name].mean():.2f}" for name in shown)
        self.bar.write(f"step {step:,}: {scores}")
        self.evaluation_due = False
        self.last_scores = (score, results[score])

    def _pictures_are_old(self) -> bool:
        picture = self.folder / "curve.png"
        drawn = picture.stat().st_mtime if picture.exists() else 0.0
        sources = [self.folder / name for name in ("train.csv", "eval.csv", "rollouts.npz")]
        return any(path.exists() and path.stat().st_mtime > drawn for path in sources)

    def finish(self) -> list[dict[str, str]]:
        """Draws the pictures, says how the run ended, and returns the rows of eval.csv."""
        self.bar.close()
        if self._pictures_are_old():
            draw_pictures(self.folder)
        self.tracker.log_pictures(self.step)
        if self.last_scores:
            print(describe_scores(*self.last_scores))
        total = max(self.ends[-1], self.step)  # the flags may ask for fewer steps than were made
        state = "complete" if self.step == total else "not complete"
        print(f"{self.folder} is {state}: {self.step:,} of {total:,} steps")
        return self.tables.read("eval.csv")
