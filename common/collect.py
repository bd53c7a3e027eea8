"""Make OGBench datasets locally with OGBench's official settings and scripted experts, for AntMaze
with an ant of our own (common/ant.py).

    python -m common.collect pointmaze-medium-navigate --transitions 200000 --workers 2

Every episode is seeded by itself: neither the workers nor an interruption change the files.
"""

import difflib
import fcntl
import functools
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import zipfile
import zlib
from concurrent import futures
from pathlib import Path

import gymnasium
import numpy as np
import ogbench  # noqa: F401  (registers the environments)
import tqdm
import tyro

from common.ant import WEIGHTS, walk
from common.environments import cores

# Official (training episodes, rows per episode); the last row is only the final state.
EPISODES = dict.fromkeys(("cube-single", "cube-double", "scene", "puzzle-3x3", "puzzle-4x4"), 1000)
EPISODES |= {"cube-triple": 3000, "cube-quadruple": 5000, "puzzle-4x5": 3000, "puzzle-4x6": 5000}
MAZES = [f"{x}maze-{y}" for x in ("point", "ant") for y in "medium large giant teleport".split()]
OFFICIAL = {f"{d}-{kind}": (n, 1001) for d, n in EPISODES.items() for kind in ("play", "noisy")}
OFFICIAL |= {f"{m}-navigate": (500, 2001) if "giant" in m else (1000, 1001) for m in MAZES}
OFFICIAL |= {f"{m}-stitch": (5000, 201) for m in MAZES}
P_STACK = {"single": (0, 0), "double": (0, 0.25), "triple": (0.05, 0.35), "quadruple": (0.1, 0.5)}
KEYS = ("observations", "actions", "terminals", "qpos", "qvel", "button_states")
STATES = ("prev_qpos", "prev_qvel", "prev_button_states")  # of info; the last with buttons only


class CollectError(Exception):
    """A request that cannot be carried out; the message is one line for the user."""


@functools.cache
def make_env(dataset, rows=None):
    """Make the environment that a dataset is collected in (``rows`` shortens its episodes)."""
    gymnasium.logger.min_level = gymnasium.logger.ERROR  # harmless warnings about box dtypes
    extra = {} if "maze" in dataset else {"mode": "data_collection"}
    extra["max_episode_steps"] = rows or OFFICIAL[dataset][1]
    return gymnasium.make(f"{dataset.rsplit('-', 1)[0]}-v0", terminate_at_goal=False, **extra)


def collect_episode(env, dataset, seed, episode):
    """Return the arrays of an episode, a row per step; they depend on nothing but the arguments."""
    policy_of = _maze_policy if "maze" in dataset else _manipulation_policy
    for retry in itertools.count():
        words = np.random.SeedSequence([seed, episode, retry]).generate_state(2)
        np.random.seed(words[0])  # the mazes and the oracles draw from numpy's global generator
        policy = policy_of(env, dataset, int(words[1]))
        ob, action = next(policy)
        rows, done = [], False
        while not done:
            next_ob, _, terminated, truncated, info = env.step(action)
            done = terminated or truncated
            rows.append([ob, action, done, *(info[key] for key in STATES if key in info)])
            ob, action = policy.send((next_ob, info))
        columns = {key: np.array(column) for key, column in zip(KEYS, zip(*rows))}
        y, z = columns["qpos"][:, 15:17].T if dataset.startswith("scene") else (0, 1)
        # Redo a scene whose block left the table to the right or, outside the drawer, to the left.
        if not np.any((y >= 0.29) | ((y <= -0.3) & ((z < 0.06) | (z > 0.08)))):
            return {k: v.astype("f4") if v.dtype == float else v for k, v in columns.items()}


def search_of(maze):
    """(cell, cell) -> the place to go to next on the shortest way, and all cells' distances."""
    # Cached, as it depends only on the two cells and searching the maze is slow.
    xy = maze.ij_to_xy
    return functools.cache(lambda start, goal: maze.get_oracle_subgoal(xy(start), xy(goal)))


def heading(maze, search):
    """The unit direction from where the agent is to the next cell on the way to its goal."""
    xy = maze.get_xy()
    direction = search(maze.xy_to_ij(xy), maze.xy_to_ij(maze.cur_goal_xy))[0] - xy
    return direction / (np.linalg.norm(direction) + 1e-6)


# A policy resets the environment, yields (observation, action) and is sent (observation, info).
def _maze_policy(env, dataset, env_seed):
    maze, navigate = env.unwrapped, dataset.endswith("navigate")
    search = search_of(maze)
    wall = maze.maze_map == 1
    free = [tuple(cell) for cell in np.argwhere(~wall)]
    start = free[np.random.randint(len(free))]
    if navigate:  # goals are junctions, corners and dead ends, not cells of straight hallways
        walls_i, walls_j = (np.roll(wall, 1, k).astype(int) + np.roll(wall, -1, k) for k in (0, 1))
        goals = [cell for cell in free if abs(walls_i - walls_j)[cell] != 2]
    else:
        goals = [cell for cell in free if search(start, start)[1][cell] == 4] or [start]
    task = {"init_ij": start, "goal_ij": goals[np.random.randint(len(goals))]}
    ob, info = env.reset(seed=env_seed, options={"task_info": task})
    while True:
        direction = heading(maze, search)
        if dataset.startswith("ant"):
            action = walk(ob, direction) + np.random.normal(0, 0.2, 8)
        else:
            action = direction + np.random.normal(0, 0.5, 2)
        ob, info = yield ob, np.clip(action, -1, 1)
        if navigate and info["success"]:
            goal = maze.ij_to_xy(goals[np.random.randint(len(goals))])
            # set_goal(goal_ij=...) draws the same goal but puts NaN into the target marker.
            maze.set_goal(goal_xy=maze.add_noise(goal))


def _manipulation_policy(env, dataset, env_seed):
    domain, kind = dataset.rsplit("-", 1)
    style = "plan" if kind == "play" else "markov"
    agents = {}  # their defaults are official; new ones do not remember an earlier episode
    for task in ("cube", "button", "drawer", "window"):
        module = importlib.import_module(f"ogbench.manipspace.oracles.{style}.{task}_{style}")
        grip = {"gripper_always_closed": domain.startswith("puzzle")} if task == "button" else {}
        agents[task] = getattr(module, f"{task.title()}{style.title()}Oracle")(env=env, **grip)
    p_random = 0 if kind == "play" else 0.2 if domain.startswith("puzzle") else 0.1
    p_stack = np.random.uniform(*P_STACK.get(domain.split("-")[-1], (0.5, 0.5)))
    xi = np.random.uniform(0, 0.1) if kind == "noisy" else 0
    ob, info = env.reset(seed=env_seed)
    if domain == "scene":
        # The scene keeps the targets of earlier episodes, and a Markov oracle acts once on the
        # target before its own: start every episode from the same targets.
        scene = env.unwrapped
        scene._target_button_states[:] = scene._target_button = 0
        scene._target_drawer_pos = scene.model.site("drawer_handle_center_target").pos[1] = 0.0
        scene._target_window_pos = scene.model.site("window_handle_center_target").pos[0] = 0.0
        ob, info = env.reset(seed=env_seed)
    agent = agents[info["privileged/target_task"]]
    agent.reset(ob, info)
    while True:
        if np.random.rand() < p_random:
            action = np.random.uniform(-1, 1, 5)
        else:
            action = agent.select_action(ob, info) + xi * np.random.normal(0, [1, 1, 1, 3, 10])
        ob, info = yield ob, np.clip(action, -1, 1)
        if agent.done:
            agent_ob, agent_info = env.unwrapped.set_new_target(p_stack=p_stack)
            agent = agents[agent_info["privileged/target_task"]]
            agent.reset(agent_ob, agent_info)


def _start_worker(parent):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    os.environ.setdefault("MUJOCO_GL", "disable")  # nothing is rendered, no display is needed
    # The pipe closes when the parent stops or dies: leave at once, in the middle of a block.
    threading.Thread(target=lambda: (parent.poll(None), os._exit(1)), daemon=True).start()


def _collect_block(dataset, seed, block, path):
    env = make_env(dataset)
    _write(path, [collect_episode(env, dataset, seed, i) for i in block], zipfile.ZIP_STORED)
    return len(block)


def _write(path, sources, compression):
    """Join the arrays of the sources in an npz file, which exists whole or not at all."""
    tmp = path.with_name(f"{path.name}.tmp")
    with zipfile.ZipFile(tmp, "w", compression) as archive:
        for key in sources[0]:  # one at a time: np.savez would hold the whole dataset in memory
            array = np.concatenate([source[key] for source in sources])
            with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array)
    os.replace(tmp, path)


def collect(
    dataset: str,
    transitions: int | None = None,
    dataset_dir: str = "data",
    seed: int = 0,
    workers: int | None = None,
) -> Path:
    """Make an OGBench dataset with OGBench's scripted experts; after an interruption, continue it.

    Processes are spawned, so a calling script needs ``if __name__ == "__main__":``. Returns the
    path of the training file, beside which lie its -val file and a json of the settings. Raises
    CollectError for bad arguments or files with other settings in the way.

    Args:
        dataset: name, such as pointmaze-medium-navigate or cube-single-play
        transitions: training transitions, rounded up to whole episodes (default: the official
            size); a tenth as many episodes, at least one, come on top for validation
        dataset_dir: folder of the files, made if needed
        seed: seed of the dataset
        workers: number of processes (default: one per core); does not change the contents
    """
    name = dataset.removesuffix("-v0")
    if "explore" in name or name.startswith(("antsoccer", "humanoidmaze")):
        raise CollectError(f"{name} cannot be made here, it must be downloaded")
    if name not in OFFICIAL:
        near = ", ".join(difflib.get_close_matches(name, OFFICIAL, cutoff=0))
        raise CollectError(f"unknown dataset {name!r}; nearest names: {near}")
    workers = cores() if workers is None else workers
    limits = {"transitions": (transitions, 1), "workers": (workers, 1), "seed": (seed, 0)}
    for option, (value, least) in limits.items():
        if value is not None and value < least:
            raise CollectError(f"--{option} must be at least {least}, got {value}")

    num_train, rows = OFFICIAL[name]
    steps = rows - 1  # the loader drops the last row of each episode
    num_train = num_train if transitions is None else -(-transitions // steps)
    num_all = num_train + max(1, num_train // 10)
    settings = {"dataset": name, "episodes": num_train, "rows_per_episode": rows, "seed": seed}
    settings |= {lib: importlib.metadata.version(lib) for lib in ("ogbench", "mujoco", "numpy")}
    settings |= {"expert": zlib.crc32(WEIGHTS.read_bytes())} if name.startswith("ant") else {}
    base = f"{Path(dataset_dir).expanduser()}/{name}-v0"
    train, val, parts, sidecar = (Path(base + e) for e in (".npz", "-val.npz", ".parts", ".json"))
    train.parent.mkdir(parents=True, exist_ok=True)
    with open(sidecar, "a") as lock:  # a second process waits until the first has made the files
        fcntl.flock(lock, fcntl.LOCK_EX)
        if train.exists() or val.exists() or parts.exists():
            old = json.loads(sidecar.read_text() or "{}")
            differ = [f"{k}: {old.get(k)}, now {v}" for k, v in settings.items() if old.get(k) != v]
            if differ:
                old or sidecar.unlink()  # it was empty, so made by the lock
                advice = f"use those, another --dataset-dir, or move {base}* away"
                raise CollectError(f"{base} has other settings ({'; '.join(differ)}): {advice}")
        if train.exists() and val.exists():
            print(f"{train} and {val} are already there.")
            shutil.rmtree(parts, ignore_errors=True)
            return train

        parts.mkdir(exist_ok=True)
        sidecar.write_text(json.dumps(settings, indent=2))
        size = max(10_000 // steps, num_train // 100)  # the unit of parallel work and of resuming
        edges = [*range(0, num_train, size), *range(num_train, num_all, size), num_all]
        blocks = {parts / f"{i:06d}-{j:06d}.npz": range(i, j) for i, j in itertools.pairwise(edges)}
        todo = {path: block for path, block in blocks.items() if not path.exists()}
        done = num_all - sum(len(block) for block in todo.values())
        print(f"Collecting {base}: {num_all} episodes of {steps} steps, {done} done", flush=True)
        context = multiprocessing.get_context("spawn")
        reader, writer = context.Pipe(duplex=False)
        pool = futures.ProcessPoolExecutor(workers, context, _start_worker, (reader,))
        bar = tqdm.tqdm(total=num_all * steps, initial=done * steps, unit=" steps", disable=None)
        with bar, pool, writer:
            jobs = [pool.submit(_collect_block, name, seed, b, part) for part, b in todo.items()]
            for job in futures.as_completed(jobs):
                bar.update(job.result() * steps)
        for path, episodes in ((val, range(num_train, num_all)), (train, range(num_train))):
            chosen = [np.load(part) for part, block in blocks.items() if block[0] in episodes]
            _write(path, chosen, zipfile.ZIP_DEFLATED)
        shutil.rmtree(parts)
        print(f"Wrote {train} ({num_train * steps} transitions) and {val}")
        return train


def main(args=None):
    """Run the command line and return its exit code."""
    try:
        tyro.cli(collect, args=args, config=(tyro.conf.PositionalRequiredArgs,))
    except (CollectError, OSError, futures.BrokenExecutor) as error:
        print(f"collect: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped; run the same command again to continue.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
