"""A run's flags, and its folder runs/<script>/<env>/<name>/. The same command goes on from the
checkpoint there; rows that were logged after it are dropped, for they will be written again."""

import contextlib
import csv
import fcntl
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path

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
AT_MOST |= dict(warmup_steps="total_steps", start_training="online_steps")  # if not 0
SIGNED = "target_entropy target_entropy_start target_entropy_end noise_entropy".split()
# flags that change no result
FREE = "run_dir dataset_dir collect workers eval_slots eval_only track compile_cache".split()


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
    less = "out of memory: lower --num-seeds, --tasks (agents trained at once) or --batch-size\n"
    full = lambda error: isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
    sys.excepthook = lambda *e: sys.stderr.write(less) if full(e[1]) else sys.__excepthook__(*e)
    cache = getattr(args, "compile_cache", "")
    if cache or not jax.config.jax_compilation_cache_dir:
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


class Run:
    """The folder of a run: refuses another configuration, logs, saves and restores."""

    def __init__(self, script: str, args, agents: list[tuple[int, int]], data: dict):
        """`agents`: (task, seed) of each; `data`: what identifies the dataset."""
        self.agents, self.folder = agents, Path(args.run_dir) / script / args.env / args.name
        if share() != (0, 1):
            self.folder /= "share-{}-of-{}".format(*share())
        self.start, self.wandb = time.time(), None
        made_with = dict(
            commit=subprocess.getoutput(f"git -C '{Path(__file__).parent}' rev-parse HEAD 2>&-"),
            device=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            python=sys.version.split()[0],
            packages={d.name: d.version for d in importlib.metadata.distributions()},
        )
        config = json.loads(json.dumps(dict(flags=vars(args) | data, made_with=made_with)))
        path, new = self.folder / "config.json", config["flags"]
        with self._writing("(in use by another process, or config.json damaged?)"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / ".lock", "w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            old = json.loads(path.read_text())["flags"] if path.exists() else new
        free = FREE + ["eval_episodes"] * args.eval_only
        keys = [key for key in old | new if key not in free and old.get(key) != new.get(key)]
        if differ := "".join(f"\n  {k}: {old.get(k)} there, {new.get(k)} now" for k in keys):
            raise SystemExit(
                f"{self.folder} holds a run with another configuration:{differ}\nTo start "
                "another run, give it a --name; to continue that one, repeat its flags."
            )
        if not path.exists():
            self.write("config.json", json.dumps(config, indent=1).encode())
        if args.track:
            wandb = importlib.import_module("wandb")
            self.wandb = wandb.init(project="flow-policies", name=args.name, config=new)

    @contextlib.contextmanager
    def _writing(self, name):
        try:
            yield
        except (OSError, ValueError, KeyError) as error:
            problem = f"cannot use {self.folder} {name}: {error}"
            raise SystemExit(f"{problem}. Mend that and repeat the command to continue.") from None

    def write(self, name: str, content: bytes) -> None:
        """Writes a file: at any moment either the old or the new one is there, whole."""
        with self._writing(name):
            with open(self.folder / f"{name}.tmp", "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(self.folder / f"{name}.tmp", self.folder / name)

    def log(self, table: str, step: int, metrics: dict) -> None:
        """Appends a row per agent to <table>.csv; `metrics`: name -> (agents,) numbers. Exits if
        one of them is not finite, with the last checkpoint left as it is."""
        values, path = np.array([*metrics.values()], float), self.folder / f"{table}.csv"
        for metric, agent in np.argwhere(~np.isfinite(values)):
            who = "{} of task {}, seed {}".format([*metrics][metric], *self.agents[agent])
            raise SystemExit(f"{who} is not finite at step {step}: {self.folder} stays as it was")
        rows = [["task", "seed", "step", "seconds", *metrics]] * (not path.exists())
        for (task, seed), numbers in zip(self.agents, values.T):
            rows.append([task, seed, step, round(time.time() - self.start, 1), *numbers])
            if self.wandb:
                names = [f"{table}/task{task}-seed{seed}/{name}" for name in metrics]
                self.wandb.log(dict(zip(names, numbers)), step=step)
        with self._writing(path.name), open(path, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)

    def save(self, step: int, tree) -> None:
        """Writes the checkpoint: the step and any pytree of arrays."""
        content = dict(step=step, seconds=time.time() - self.start, tree=tree)
        self.write("checkpoint.msgpack", flax.serialization.to_bytes(jax.device_get(content)))

    def restore(self, tree):
        """(step, tree) of the checkpoint, or (0, `tree`) without one. Drops rows after it."""
        path, content = self.folder / "checkpoint.msgpack", dict(step=0, seconds=0.0, tree=tree)
        if path.exists():
            try:
                content = flax.serialization.from_bytes(content, path.read_bytes())
            except Exception as e:
                raise SystemExit(f"{path} is damaged ({e}); move it away to start anew") from None
        for table in self.folder.glob("*.csv"):
            head, *lines = table.read_text().splitlines(keepends=True) or [""]
            old = [x for x in lines if x[-1:] == "\n" and int(x.split(",")[2]) <= content["step"]]
            self.write(table.name, "".join([head, *old]).encode()) if old else table.unlink()
        self.start -= content["seconds"]
        return content["step"], content["tree"]

    def finish(self, result: dict) -> None:
        """Keeps the paths of an evaluation (`EnvPool.play`) in rollouts.npz, draws the folder."""
        paths = {f"path{i}": np.array(path) for i, path in enumerate(result["path"].flat)}
        info = dict(task=[task for task, _ in self.agents], success=result["success"])
        with self._writing("rollouts.npz"):
            np.savez(self.folder / "rollouts.npz", **info, **paths)
        if (plot := Path(__file__).parent.parent / "plot.py").exists():
            subprocess.run([sys.executable, plot, self.folder], check=False)
