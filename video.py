"""A film of a run's agent, as an animated GIF.

    python video.py runs/qam/cube-single-play-singletask-task1-v0/default
    python video.py runs/meam/antmaze-large/default --task 3 --seed 1 --episodes 3 --size 480

plays with the last checkpoint, from the seeds of its evaluation, and writes video-task3-seed1.gif
into the run's folder. MuJoCo draws with OpenGL: EGL, or what the variable MUJOCO_GL names.
"""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    os.environ.setdefault("MUJOCO_GL", "egl")  # which mujoco reads when it is imported
    try:
        import mujoco  # noqa: F401
    except Exception as error:  # of various kinds, where a library is missing
        raise SystemExit(
            f"MuJoCo cannot draw with MUJOCO_GL={os.environ['MUJOCO_GL']} ({error}). egl needs a "
            "driver (Debian: libegl1 libgl1-mesa-dri), osmesa needs libosmesa6, glfw a display"
        ) from None

import flax.serialization
import jax
import numpy as np
import tyro
from PIL import Image

from benchmarks import script_of
from common.envs import ONLINE, Slot, resolve, seed_of
from common.run import CHECKPOINT, read_checkpoint
from plot import flags_of


@dataclass(frozen=True)
class Options:
    run: Annotated[str, tyro.conf.Positional]  # folder of the run
    task: int = 0  # of the agent (0: the run's first one)
    seed: int = -1  # of the agent (-1: the run's first one)
    episodes: int = 1  # as many of the evaluation's, from the first one on
    every: int = 4  # steps from one picture to the next
    fps: int = 20  # pictures per second of the film
    size: int = 320  # height and width in pixels
    out: str = ""  # file (default: video-task<task>-seed<seed>.gif in the run's folder)

    def __post_init__(self):
        for name in ("episodes", "every", "fps", "size"):
            if getattr(self, name) < 1:
                raise SystemExit(f"--{name} must be at least 1")


def restored(folder: Path, observation_size: int):
    """A run's script, its arguments, the agents' state at the checkpoint, (agents, ...), and the
    checkpoint's step and seconds."""
    folder = folder.resolve()
    run = folder.parent if folder.name.startswith("share-") else folder  # of several hosts
    try:
        script = script_of(run.parent.parent.name)
    except SystemExit as error:
        raise SystemExit(f"{folder} is not runs/<script>/<env>/<name>: {error}") from None
    flags = {k: tuple(x) if isinstance(x, list) else x for k, x in flags_of(folder).items()}
    args = script.Args(**{k: flags[k] for k in script.Args.__dataclass_fields__ if k in flags})
    try:
        saved = read_checkpoint(folder / CHECKPOINT)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder} has no checkpoint that can be read: {error}") from None
    keys = jax.random.split(jax.random.PRNGKey(0), len(saved["tree"]["state"]["key"]))
    create = partial(script.create, args, observation_size)
    like = jax.eval_shape(jax.vmap(create), keys)
    state = flax.serialization.from_state_dict(like, saved["tree"]["state"])
    return script, args, state, {name: saved[name] for name in ("step", "seconds")}


def check(path: Path) -> None:
    """Exits if a film cannot be written there; of a file that is there nothing changes."""
    if path.suffix.lower() != ".gif":
        raise SystemExit(f"{path} must end with .gif")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        path.open("ab").close()
        there or path.unlink()
    except OSError as error:
        raise SystemExit(f"cannot write {path}: {error.strerror}") from None


def film(options: Options) -> Path:
    """Plays, says how the episodes ended, and writes the film."""
    folder, flags = Path(options.run), flags_of(Path(options.run))
    source, online = resolve(flags["env"]), flags["env"] in ONLINE
    if flags["env"] == "multigoal":
        raise SystemExit("the plane is not a MuJoCo scene: its episodes are in rollouts.png")
    tasks = flags.get("tasks", [source.task])
    agents = [(task, flags["seed"] + i) for task in tasks for i in range(flags["num_seeds"])]
    if folder.name.startswith("share-"):  # share-<i>-of-<n>: every n-th agent from the i-th on
        _, i, _, n = folder.name.split("-")
        agents = agents[int(i) :: int(n)]
    task = options.task or agents[0][0]
    seed = agents[0][1] if options.seed < 0 else options.seed
    if (task, seed) not in agents:
        raise SystemExit(f"no agent of task {task}, seed {seed} in {folder}: it has {agents}")
    path = Path(options.out or folder / f"video-task{task}-seed{seed}.gif")
    check(path)  # before there is something to lose
    name = flags["env"] if online else f"{source.env}-singletask-task{task}-v0"
    pixels = dict(width=options.size, height=options.size)
    slot = Slot(name, render_mode="rgb_array", **pixels)
    script, args, state, saved = restored(folder, slot.env.observation_space.shape[0])
    state = jax.tree.map(lambda x: x[[agents.index((task, seed))]], state)
    mode, frames = script.MODES[:1] if online else (), []
    for episode in range(options.episodes):
        start = seed_of(seed, task, int(saved["step"]), episode)
        observation, over, age, total = slot.start(start), False, 0, 0.0
        try:
            frames.append(slot.env.render())
        except Exception as error:  # of the driver, whatever it is
            gl = os.environ.get("MUJOCO_GL")
            raise SystemExit(f"MuJoCo cannot draw with MUJOCO_GL={gl}: {error}") from None
        while not over:
            at = np.uint32([[start]]), np.int32([[age]])
            plan = np.asarray(script.act(args, state, observation[None, None], *at, *mode))[0, 0]
            for action in plan:
                observation, reward, _, over, success = slot.step(action)
                age, total = age + 1, total + reward
                if over or age % options.every == 0:
                    frames.append(slot.env.render())
                if over:
                    break
        print(f"episode {episode}: success {success:.0f}, return {total:.1f}, {age} steps")
    first, *others = map(Image.fromarray, frames)
    first.save(path, save_all=True, append_images=others, duration=1000 // options.fps, loop=0)
    print(f"{path}: {len(frames)} pictures")
    return path


if __name__ == "__main__":
    film(tyro.cli(Options, description=__doc__))
