"""A run's flags, and its folder runs/<script>/<env>/<name>/. The same command goes on from the
checkpoint there; rows that were logged after it are dropped, for they will be written again."""

import contextlib
import csv
import fcntl
import hashlib
import importlib.metadata
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Literal

import flax.serialization
import jax
import numpy as np
import tyro

from common.envs import ONLINE, resolve

POSITIVE = """tasks num_seeds start_training log_interval eval_interval eval_episodes eval_slots lr
chunk_length flow_steps hidden_dims num_critics batch_size grad_clip sigma_min target_delay
num_candidates fbrac_alpha total_steps warmup_steps env_steps_per_update replay_size actor_lr
critic_lr latent_clip eta_init lambda_init target_entropy_share policy_delay alpha_lr
policy_width diffusion_steps beta_scale noise_scale alpha_init alpha_period target_candidates
eval_candidates max_grad_norm target_policy_delay num_proposals time_min time_max entropy_steps
trace_clip rollout_steps num_envs epochs clip_range normal_clip""".split()
AT_MOST = dict.fromkeys("discount target_rate rho path_weight expectile beta_scale".split(), 1)
AT_MOST |= dict(tasks=5, policy_ema=1, gae_lambda=1, target_ess=1, q_rate=1)
AT_MOST |= dict.fromkeys("warmup_steps env_steps_per_update".split(), "total_steps")  # if not 0
AT_MOST |= dict(start_training="online_steps")
SIGNED = "target_entropy target_entropy_start target_entropy_end noise_entropy".split()
Precision = Literal["default", "float32", "bfloat16"]
CHECKPOINT, PREVIOUS, PART = "checkpoint.msgpack", "checkpoint-before.msgpack", "replay-{}.msgpack"
# flags that change no result
FREE = "run_dir name dataset_dir collect workers eval_slots eval_only track compile_cache".split()
TABLES = "train.csv", "eval.csv", "eval_only.csv"


def configure(Args, env_defaults: dict, env: str, **flags):
    """`Args` of an environment: class < domain's protocol < script's ENV_DEFAULTS < `flags`."""
    source, known = resolve(env), Args.__dataclass_fields__
    if (env in ONLINE) == ("tasks" in known):
        kind, other = ("offline", "online") if "tasks" in known else ("online", "offline")
        raise SystemExit(f"'{env}' is an environment of the {other} methods, this is an {kind} one")
    tuned = source.protocol | dict(tasks=(source.task,)) | env_defaults.get(source.env, {})
    return Args(**{k: v for k, v in tuned.items() if k in known} | flags | dict(env=env))


def parse(Args, env_defaults: dict, argv=None):
    """A script's flags, checked; --help shows the defaults of the environment that --env names."""
    argv, env = sys.argv[1:] if argv is None else argv, Args.env
    for flag, value in zip(argv, [*argv[1:], ""]):
        env = value if flag == "--env" else flag[6:] if flag.startswith("--env=") else env
    args = tyro.cli(Args, args=argv, default=configure(Args, env_defaults, env))
    for name, value in vars(args).items():
        top = vars(args).get(limit := AT_MOST.get(name, 2**31 - 1), limit) or 2**31 - 1
        low, least = -top if name in SIGNED else 0, "more than" if name in POSITIVE else "at least"
        for x in value if isinstance(value, tuple) and value else (value,):
            if type(x) in (int, float) and not low <= x <= top or x in (0, ()) and name in POSITIVE:
                why = f"--{name} {x} is out of range: expected {least} {low}, at most {top}"
                why += f" (--{limit})" * (limit != top < 2**31 - 1)
                raise SystemExit(why.replace("_", "-"))
    if len(tasks := getattr(args, "tasks", ())) > len(set(tasks)):
        raise SystemExit("--tasks must name no task twice")
    if hasattr(args, "tasks") and resolve(args.env).env not in env_defaults:
        print(f"nothing is tuned for {args.env}: the flags have the class's defaults")
    if args.name in ("", ".", "..") or "/" in args.name:
        raise SystemExit(f"--name {args.name!r}: expected the name of a folder, without /")
    less = "out of memory: lower --num-seeds, --tasks (agents trained at once) or --batch-size\n"
    full = lambda e: re.search("MemoryError|RESOURCE_EXHAUSTED|Out of memory", repr(e))
    sys.excepthook = lambda *e: sys.stderr.write(less) if full(e[1]) else sys.__excepthook__(*e)
    if args.precision != "default":  # jax's own "bfloat16" means TF32 on a GPU
        name = args.precision.replace("bfloat16", "BF16_BF16_F32")
        jax.config.update("jax_default_matmul_precision", name)
    if (cache := args.compile_cache) or not jax.config.jax_compilation_cache_dir:
        cache = cache or str(Path(args.run_dir, ".compiled"))
        jax.config.update("jax_compilation_cache_dir", None if cache == "none" else cache)
    return args


def share() -> tuple[int, int]:
    """(i, n) of the environment variable SHARE_OF_AGENTS=i/n, else (0, 1): one of n processes on as
    many hosts, each of which trains every n-th agent (docs/scale.md)."""
    text = os.environ.get("SHARE_OF_AGENTS") or "0/1"
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise SystemExit(f"SHARE_OF_AGENTS={text}: expected 0/2, 1/2, or so: which of how many")
    return int(i), int(n)


def ours(agents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Of all agents those that this process trains."""
    i, n = share()
    if n > len(agents):
        raise SystemExit(f"{len(agents)} agents are too few for {n} processes")
    return agents[i::n]


def sealed(tree) -> tuple[bytes, bytes]:
    """A pytree of arrays as bytes, and their checksum."""
    content = flax.serialization.to_bytes(jax.device_get(tree))
    return content, hashlib.sha256(content).digest()


def read_checkpoint(path: Path) -> dict:
    """A checkpoint, or a part of its replay, as nested dicts of arrays. Raises OSError, or
    ValueError where it is damaged."""
    content = path.read_bytes()
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:  # the file's last 32 bytes
        raise ValueError(f"the checksum of {path.name} is wrong")
    return flax.serialization.msgpack_restore(content[:-32])


class Run:
    """The folder of a run: refuses another configuration, logs, saves and restores. SIGINT and
    SIGTERM are answered with a checkpoint, a second one as usual."""

    stopping = safe = ""  # of this process: the signal that came; what to say if all is saved
    handlers = {}  # signal -> what was there before

    def __init__(self, script: str, args, agents: list[tuple[int, int]], data: dict):
        """`agents`: (task, seed) of each; `data`: what identifies the dataset."""
        self.agents, self.folder = agents, Path(args.run_dir) / script / args.env / args.name
        if share() != (0, 1):
            self.folder /= "share-{}-of-{}".format(*share())
        self.start, self.wandb, self.eval_only = time.time(), None, args.eval_only
        self.last, self.lost = defaultdict(int), set()  # step of each table's last row; agents
        self.parts = []  # of the replay in the last checkpoint: how many transitions each ends at
        self.damaged = False  # the last checkpoint is, the one before it is in use
        here = dict(cwd=Path(__file__).parent, shell=True, capture_output=True, text=True)
        made_with = dict(
            commit=subprocess.run("git rev-parse HEAD", **here).stdout.strip(),
            device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            python=sys.version.split()[0],
            packages={d.name: d.version for d in importlib.metadata.distributions()},
        )
        config = json.loads(json.dumps(dict(flags=vars(args) | data, made_with=made_with)))
        path, new = self.folder / "config.json", config["flags"]
        defaults = json.loads(json.dumps(vars(type(args)())))  # for flags newer than the run
        with self._writing("(in use by another process, or config.json damaged?)"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / ".lock", "w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # before the first of these is there, another configuration may have the folder
            begun = any((self.folder / x).exists() for x in (CHECKPOINT, PREVIOUS, *TABLES))
            old = defaults | json.loads(path.read_text())["flags"] if begun else new
        free = FREE + ["eval_episodes"] * args.eval_only
        keys = [key for key in old | new if key not in free and old.get(key) != new.get(key)]
        if differ := "".join(f"\n  {k}: {old.get(k)} there, {new.get(k)} now" for k in keys):
            raise SystemExit(
                f"{self.folder} holds a run with another configuration:{differ}\nTo start "
                "another run, give it a --name; to continue that one, repeat its flags."
            )
        if not begun:
            self.write("config.json", json.dumps(config, indent=1).encode())
        print(f"{self.folder}:", *(f"{k} {v}" for k, v in new.items() if k not in FREE), sep=" | ")
        if args.track:
            with self._tracking():
                wandb = importlib.import_module("wandb")
                self.wandb = wandb.init(project="flow-policies", name=args.name, config=new)

    @contextlib.contextmanager
    def _writing(self, name):
        try:
            yield
        except (OSError, ValueError, LookupError) as error:
            problem = f"cannot use {self.folder} {name}: {error}"
            raise SystemExit(f"{problem}. Mend that and repeat the command to continue.") from None

    @contextlib.contextmanager
    def _tracking(self):
        try:
            yield
        except Exception as error:  # of whatever kind: the run is worth more than its mirror
            self.wandb = None
            print(f"W&B failed, the run goes on without it: {error}", file=sys.stderr)

    @classmethod
    def _stop(cls, number, _):
        signal.signal(number, cls.handlers[number])
        cls.stopping = signal.Signals(number).name
        if cls.safe:
            raise SystemExit(cls.safe)
        print(f"\n{cls.stopping}: saving after this chunk; again: at once", file=sys.stderr)

    @contextlib.contextmanager
    def saved(self):
        """Around what changes nothing that was just saved: a signal ends the program at once."""
        try:
            Run.safe = f"{self.folder} is saved. Repeat the command to continue."
            if Run.stopping:
                raise SystemExit(Run.safe)
            yield
        finally:
            Run.safe = ""

    def write(self, name: str, *content: bytes) -> None:
        """Writes a file: at any moment either the old or the new one is there, whole."""
        path, new = self.folder / name, self.folder / f"{name}.tmp"
        with self._writing(name):
            with open(new, "wb") as file:
                file.writelines(content)
                file.flush()
                os.fsync(file.fileno())
            if name == CHECKPOINT and path.exists() and not self.damaged:
                os.replace(path, self.folder / PREVIOUS)
            os.replace(new, path)

    def log(self, table: str, step: int, metrics: dict) -> None:
        """Appends a row per agent to <table>.csv; `metrics`: name -> (agents,) numbers. Says whose
        are not finite; if all agents are lost, exits and leaves the last checkpoint as it is."""
        values, path = np.array([*metrics.values()], float), self.folder / f"{table}.csv"
        for metric, agent in np.argwhere(~np.isfinite(values)):
            who = "{} of task {}, seed {}".format([*metrics][metric], *self.agents[agent])
            who, new = f"{who} is not finite at step {step}", agent not in self.lost
            self.lost.add(agent)
            if len(self.lost) == len(self.agents):
                raise SystemExit(f"{who}: {self.folder} stays as it was")
            if new:
                print(f"\n{who}: this agent is lost, the others go on", file=sys.stderr)
        rows = [["task", "seed", "step", "seconds", *metrics]] * (not path.exists())
        for (task, seed), numbers in zip(self.agents, values.T):
            rows.append([task, seed, step, round(time.time() - self.start, 1), *numbers])
            if self.wandb:
                names = [f"{table}/task{task}-seed{seed}/{name}" for name in metrics]
                with self._tracking():
                    self.wandb.log(dict(zip(names, numbers)), step=step)
        with self._writing(path.name), open(path, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        self.last[table] = step

    def save(self, step: int, tree: dict) -> None:
        """Writes the checkpoint: the step and a dict of pytrees of arrays. The one before it is
        kept. Of a `replay` only what is new is written, to a file more that both refer to."""
        parts = before = self.parts
        if replay := tree.get("replay"):
            end, slots, start = int(replay.size[0]), replay.rewards.shape[1], max(before, default=0)
            if end > start:
                self.write(PART.format(end), *sealed(replay.since(start)))
                parts = [x for x in before if x > end - slots] + [end]
            tree = tree | dict(replay=np.array([slots, *parts]))
        content = dict(step=step, seconds=time.time() - self.start, tree=tree)
        self.write(CHECKPOINT, *sealed(content))
        self.parts, self.damaged, needed = parts, False, [PART.format(x) for x in before + parts]
        part = re.compile(r"replay-\d+\.msgpack(\.tmp)?")  # .tmp: of a write that was killed
        for path in self.folder.iterdir() if replay else ():
            if part.fullmatch(path.name) and path.name not in needed:
                with contextlib.suppress(OSError):  # it takes room, and does no other harm
                    path.unlink()
        with self.saved():
            pass  # leaves, if it was asked to

    def restore(self, tree):
        """(step, tree) of the checkpoint, or of the one before if it is damaged; (0, `tree`)
        without one. Drops rows after it. From here on, signals are answered with a checkpoint."""
        content, errors, replay = dict(step=0, seconds=0.0, tree=tree), [], tree.get("replay")
        like = content | dict(tree={k: None if k == "replay" else x for k, x in tree.items()})
        for path in filter(Path.exists, (self.folder / CHECKPOINT, self.folder / PREVIOUS)):
            try:
                found = flax.serialization.from_state_dict(like, read_checkpoint(path))
                if self.eval_only:  # which needs neither, and a replay may be large
                    found["tree"] |= {k: x for k, x in tree.items() if k in ("replay", "pool")}
                elif replay:
                    slots, *self.parts = found["tree"]["replay"].tolist()
                    read = lambda end: (end, read_checkpoint(self.folder / PART.format(end)))
                    found["tree"]["replay"] = replay.refilled(slots, map(read, self.parts))
                content, self.damaged = found, bool(errors)
                break
            except MemoryError:
                raise
            except Exception as error:  # whatever msgpack and flax make of a damaged file
                errors.append(f"{path} is damaged, or of another version ({error})")
        else:
            if errors:
                raise SystemExit(f"{' and '.join(errors)}; move it away to start anew")
        if errors:
            print(f"{errors[0]}: going on from the one before, step {content['step']:,}")
        step = content["step"]
        if self.eval_only and not step:
            raise SystemExit(f"{self.folder} holds no checkpoint that could be evaluated")
        for table in filter(Path.exists, (self.folder / x for x in TABLES)):
            with self._writing(table.name):
                head, *lines = table.read_text().splitlines(keepends=True) or [""]
                steps = [int(x.split(",")[2]) if x[-1:] == "\n" else step + 1 for x in lines]
            if lines and not step and table.name != "train.csv":  # else they would be dropped
                raise SystemExit(
                    f"{self.folder} has results but no checkpoint to go on from: move it away, or "
                    "start another run with a --name"
                )
            whole = len(steps) // len(self.agents) * len(self.agents)  # no step with rows missing
            old = [x for x, at in zip(lines[:whole], steps) if at <= step]
            self.write(table.name, "".join([head, *old]).encode()) if old else table.unlink()
            self.last[table.stem] = max(steps[: len(old)], default=0)
        self.start -= content["seconds"]
        Run.stopping = ""
        with contextlib.suppress(ValueError):  # not the main thread: signals stay as they are
            for number in signal.SIGINT, signal.SIGTERM:
                if (before := signal.getsignal(number)) not in (signal.SIG_IGN, Run._stop):
                    Run.handlers[number] = before
                    signal.signal(number, Run._stop)
        return step, content["tree"]

    def finish(self, step: int, total: int, result: dict | None) -> None:
        """Keeps the paths of an evaluation (`EnvPool.play`) in rollouts.npz, draws the folder."""
        for number, before in Run.handlers.items():
            signal.signal(number, before)
        if result:
            paths = {f"path{i}": np.array(path) for i, path in enumerate(result["path"].flat)}
            info = dict(task=[task for task, _ in self.agents], success=result["success"])
            np.savez(content := io.BytesIO(), **info, **paths)
            self.write("rollouts.npz", content.getvalue())
        plot = Path(__file__).parent.parent / "plot.py"
        if result or not (self.folder / "curve.png").exists():  # killed before it was drawn
            if plot.exists() and b"from analysis" in plot.read_bytes():  # not one of your own
                subprocess.run([sys.executable, plot, self.folder], check=False)
        print(f"{self.folder} is {'not ' * (step < total)}complete: {step:,} of {total:,} steps")
