"""Environments by name, and a pool of them in worker processes, which import this module: no jax
here. An episode is fixed by its seed and its actions, whichever process plays it."""

import contextlib
import difflib
import io
import os
import re
import subprocess
import sys
import traceback
from collections import namedtuple
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import gymnasium
import numpy as np
import ogbench  # noqa: F401 (registers the environments)
from gymnasium.wrappers import RescaleAction

gymnasium.logger.min_level = gymnasium.logger.ERROR  # float64 boxes are fine

GOALS = np.float32([(5, 0), (-5, 0), (0, 5), (0, -5)])  # of the plane `multigoal`
MULTIGOAL_STEPS = 30
TRAINING = 2**31  # in a training episode's seed, where evaluations have the episode's number
KITCHEN = ("light switch", "slide cabinet", "bottom burner", "microwave", "kettle", "top burner",
           "hinge cabinet")  # kitchen-<k>: the first k  # fmt: skip

# The online methods' environments: name -> gymnasium's id, arguments
ONLINE = {"multigoal": ("MultiGoal-v0", {})}
_kitchen = lambda k: ("gymnasium_robotics:FrankaKitchen-v1", dict(tasks_to_complete=KITCHEN[:k]))
ONLINE |= {f"kitchen-{k}": _kitchen(k) for k in (1, 2, 4, 7)}
ONLINE |= {x.lower(): (f"{x}-v5", {}) for x in ("Hopper", "HalfCheetah", "Walker2d", "Humanoid")}
ONLINE |= {"online-ant-xy": ("common.ant:OnlineAntXY-v0", {})}  # of OGBench's expert

# env "cube-triple", dataset "cube-triple-play", task 1..5, protocol {flag: value}
Source = namedtuple("Source", "env dataset task protocol")


def resolve(name: str) -> Source:
    """Of a short name (cube-triple), dataset (cube-triple-noisy) or full OGBench name (cube-triple-
    noisy-singletask-task2-v0), with OGBench's default task and the QAM paper's flags, or exits.
    Of a name in ONLINE, which has no dataset: kitchen-k is task k, all others task 1."""
    if name in ONLINE:
        return Source(name, "", int(name[8:]) if name.startswith("kitchen") else 1, {})
    names = [i.removesuffix("-singletask-v0") for i in gymnasium.registry]
    known = [i for i in names if f"{i}-singletask-v0" in gymnasium.registry and "visual" not in i]
    kind = "-navigate|-stitch|-explore|-play|-noisy"
    pattern = rf"(?s)(.+?)({kind})?(?:-singletask(?:-task([1-5]))?)?(?:-v0)?"
    env, kind, task = re.fullmatch(pattern, name or "-").groups()
    slow = "giant" in env or "humanoid" in env
    maze = lambda x: "maze" in x or "soccer" in x
    kinds = lambda x: ["-navigate", "-stitch", "-explore"] if maze(x) else ["-play", "-noisy"]
    if env not in known or (kind or kinds(env)[0]) not in kinds(env):
        names = [*known, *ONLINE, *(other + kind for other in known for kind in kinds(other))]
        near = difflib.get_close_matches(name, names, cutoff=0.4) or [*known, *ONLINE]
        raise SystemExit(f"unknown environment {name!r}; did you mean {', '.join(near)}?")
    default = 4 if "soccer" in env or env in ("puzzle-3x3", "puzzle-4x4") else 1 if maze(env) else 2
    protocol = dict(chunk_length=1 if env.startswith(("ant", "humanoid")) else 5,
                    discount=0.995 if slow else 0.99, pessimism=0.0 if "humanoid" in env else 0.5,
                    sparse="scene" in env or "puzzle" in env)  # fmt: skip
    return Source(env, env + (kind or kinds(env)[0]), int(task or default), protocol)


def make_env(name: str, **options):
    """A gymnasium environment by its OGBench name, e.g. "cube-single-singletask-task1-v0", or its
    name in ONLINE: then actions in [-1, 1]^d are mapped to its box. Exits if it cannot be made.
    `options`: more arguments of gymnasium.make, such as render_mode."""
    os.environ.setdefault("MUJOCO_GL", "disable")  # look for a display only where one is wanted
    if name not in ONLINE:
        return gymnasium.make(name, disable_env_checker=True, **options)
    id, arguments = ONLINE[name]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # gymnasium_robotics' news of other ids
            env = gymnasium.make(id, disable_env_checker=True, **arguments, **options)
    except (ImportError, AssertionError) as error:  # the latter, of joints, from mujoco 3.12 on
        needs = "gymnasium-robotics>=1.4,<1.5 and mujoco<3.12: pip install -r requirements.txt"
        raise SystemExit(f"{name} needs {needs} ({type(error).__name__})") from error
    return RescaleAction(Kitchen(env) if arguments else env, -1.0, 1.0)


def multigoal(position, action, xp=np):
    """A step of the plane with four goals (Haarnoja et al. 2017): (..., 2), (..., 2) -> next
    position (..., 2), reward (...), terminated (...), in NumPy or, with xp=jax.numpy, jax."""
    action = xp.clip(action, -1, 1)
    position = xp.clip(position + action, -7, 7)
    cost = ((position[..., None, :] - GOALS) ** 2).sum(-1).min(-1)  # of the nearest goal
    terminated = cost < 1
    return position, xp.float32(10) * terminated - 30 * (action**2).sum(-1) - cost, terminated


class MultiGoal(gymnasium.Env):
    """`multigoal` in float32, from near the origin; observes the position."""

    observation_space, action_space = (gymnasium.spaces.Box(-x, x, (2,)) for x in (7, 1))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        xi = self.np_random.standard_normal(2, np.float32)
        self.position = np.clip(np.float32(0.1) * xi, -7, 7)
        return self.position, {}

    def step(self, action):
        self.position, reward, over = multigoal(self.position, np.float32(action))
        return self.position, float(reward), bool(over), False, {"success": bool(over)}


gymnasium.register("MultiGoal-v0", MultiGoal, max_episode_steps=MULTIGOAL_STEPS)


class Kitchen(gymnasium.Wrapper):
    """Observes the robot and the objects alone, (59,): the goals never change, and what is achieved
    repeats positions of objects. Of infos only success: the others change with later steps."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = env.observation_space["observation"]

    def reset(self, **arguments):
        return self.env.reset(**arguments)[0]["observation"], {}

    def step(self, action):
        state, reward, terminated, truncated, _ = self.env.step(action)
        return state["observation"], reward, terminated, truncated, {"success": terminated}


def cores() -> int:
    """The processor's cores that this process may use, fewer under Slurm or taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def seed_of(*parts: int) -> int:
    """A 32-bit seed from non-negative integers such as (seed, task, step, episode). Up to four;
    zeros at the end change nothing."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class Slot:
    """An environment in a worker; mazes draw from the global generator, so each keeps its state."""

    def __init__(self, name, **options):
        self.env = make_env(name, **options)

    def start(self, seed):
        np.random.seed(seed)
        observation = self.env.reset(seed=int(seed))[0]
        self.generator = np.random.get_state()
        return np.float32(observation)

    def step(self, action):
        np.random.set_state(self.generator)
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.generator = np.random.get_state()
        flags = reward, not terminated, terminated or truncated, info.get("success", 0)
        return np.float32(observation), *flags


def work(pipe: int) -> None:
    """A worker: answers [(slot, method, arguments), ...] with the results, or a traceback."""
    connection = Connection(pipe)
    try:
        names, slots = connection.recv(), {}
        while True:
            jobs, answer = connection.recv(), []
            try:
                for slot, method, arguments in jobs:
                    slots[slot] = slots.get(slot) or Slot(names[slot])
                    answer.append(getattr(slots[slot], method)(*arguments))
            except Exception:
                answer = traceback.format_exc()
            connection.send(answer)
    except (EOFError, OSError, KeyboardInterrupt):
        pass  # the parent is gone, or goes


class EnvPool:
    """Environments in worker processes: of each name `each` in turn, fewer where that makes more
    than 100 (some take 170 MiB). Slot i is in worker i % workers (0: one per core), a fresh
    interpreter that imports this module alone: jax does not survive a fork."""

    def __init__(self, names: list[str], workers: int = 0, each: int = 1):
        names = [x for x in names for _ in range(min(each, 100 // len(names) or 1))]
        self.names, self._workers, n = names, [], len(names)
        self.states, self.plans = [np.zeros(())] * n, [()] * n  # the actions still to be played
        self.seeds, self.ages = np.zeros(n, np.uint32), np.zeros(n, np.int32)
        paths = filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        for _ in range(min(workers or cores(), n)):
            ours, theirs = Pipe()
            # Signals, which may go to the whole group of processes, are the parent's to answer.
            code = "import signal; [signal.signal(x, signal.SIG_IGN) for x in (2, 15)]\n"
            code += f"from common.envs import work; work({theirs.fileno()})"
            pipe = dict(env=env, pass_fds=[theirs.fileno()])
            self._workers.append((ours, subprocess.Popen([sys.executable, "-c", code], **pipe)))
            theirs.close()
            ours.send(names)

    def call(self, method: str, arguments: dict[int, tuple]) -> dict:
        """Slot.<method>: {slot: arguments} -> {slot: result}; RuntimeError if a worker fails."""
        jobs, results = {}, {}
        for slot, values in arguments.items():
            jobs.setdefault(slot % len(self._workers), []).append((slot, method, values))
        for worker, batch in jobs.items():
            with contextlib.suppress(OSError):  # of a dead worker, from which recv fails, too
                self._workers[worker][0].send(batch)
        for worker, batch in jobs.items():
            connection, process = self._workers[worker]
            try:
                answer = connection.recv()
            except (EOFError, OSError):
                answer = f"process {process.pid} died: exit code {process.wait()} (-9: no memory?)"
            if isinstance(answer, str):
                names = {self.names[slot] for slot, *_ in batch}
                raise RuntimeError(f"environment worker with {sorted(names)}: {answer}")
            results |= {slot: result for (slot, *_), result in zip(batch, answer)}
        return results

    def start(self, slots: list[int], seeds: list[int]) -> None:
        """Begins an episode in each of `slots`."""
        first = self.call("start", {i: (seed,) for i, seed in zip(slots, seeds)})
        for i in slots:
            self.states[i], self.plans[i] = first[i], ()
        self.seeds[slots], self.ages[slots] = seeds, 0

    def step(self, policy, slots: list[int]) -> dict:
        """One step of n = len(slots) of them -> (n, ...) arrays: observations, next_observations,
        actions, rewards, masks (0 where the task, not the clock, ended the episode), terminals (1
        where it ended), success. Where a plan is used up, the next H actions are asked for:
        `policy(observations (all, S), episodes' seeds (all,), ages (all,)) -> (all, H, d)`."""
        if not all(len(self.plans[i]) for i in slots):
            actions = policy(np.stack(self.states), self.seeds, self.ages)
            actions = np.nan_to_num(actions)  # of an agent that has diverged, beside others
            self.plans = [plan if len(plan) else new for plan, new in zip(self.plans, actions)]
        before, actions = [self.states[i] for i in slots], [self.plans[i][0] for i in slots]
        results = self.call("step", {i: (action,) for i, action in zip(slots, actions)})
        for i in slots:
            self.states[i], self.plans[i] = results[i][0], self.plans[i][1:]
        self.ages[slots] += 1
        names = "observations actions next_observations rewards masks terminals success".split()
        columns = before, actions, *zip(*(results[i] for i in slots))
        return {name: np.array(x, np.float32) for name, x in zip(names, columns)}

    def play(self, policy, seeds: np.ndarray) -> dict[str, np.ndarray]:
        """Plays exactly one episode per seed, (agents, E): -> success, return, length (agents, E),
        and path, (agents, E) lists of the visited states. The pool has as many slots for each
        agent, agent after agent; they share the agent's episodes."""
        out = {key: np.zeros(seeds.shape) for key in ("success", "return", "length")}
        out["path"] = np.frompyfunc(lambda _: [], 1, 1)(seeds)
        width = len(self.names) // len(seeds)  # slots per agent, at most E
        at = [(i // width, i % width) for i in range(len(self.names))]  # (agent, episode) of slots
        while live := [i for i, (_, e) in enumerate(at) if e < seeds.shape[1]]:
            fresh = [i for i in live if not out["length"][at[i]]]
            self.start(fresh, [seeds[at[i]] for i in fresh])
            steps = self.step(policy, live)
            for n, i in enumerate(live):
                out["success"][at[i]] = steps["success"][n]
                out["return"][at[i]] += steps["rewards"][n]
                out["length"][at[i]] += 1
                out["path"][at[i]].append(steps["next_observations"][n])
                at[i] = at[i][0], at[i][1] + width * int(steps["terminals"][n])
        return out

    def save(self) -> dict:
        """What `load` needs, but for the actions of the running episodes."""
        plans = {str(i): np.array(plan, np.float32) for i, plan in enumerate(self.plans)}
        return dict(seeds=self.seeds, ages=self.ages, plans=plans)

    def load(self, saved: dict, actions: np.ndarray) -> None:
        """Plays the running episodes again; actions (n, steps, d): the latest that were played."""
        if saved["ages"].max(initial=0) > actions.shape[1]:
            raise SystemExit("an episode is longer than the replay: the run cannot be continued")
        self.start(list(range(len(self.names))), list(saved["seeds"]))
        for i, age in enumerate(saved["ages"]):
            self.plans[i] = actions[i, actions.shape[1] - age :]
            for _ in range(age):
                self.step(None, [i])
            self.plans[i] = saved["plans"][str(i)]

    def close(self) -> None:
        """Ends the workers, as the end of the pool or of the program does."""
        self._workers.clear()
