"""Makes a film of a run's agent, an animated GIF or an MP4.

    python video.py runs/qam/cube-single-play-singletask-task1-v0/default
    python video.py runs/meam/antmaze-large/default --task 3 --seed 1 --episodes 3 --size 480
    python video.py runs/meam/antmaze-large/default --out film.mp4

The agent of the last checkpoint plays episodes with the seeds of its evaluation, and the video is
written to video-task<task>-seed<seed>.gif in the run's folder. An MP4, which is smaller and has all
colours, needs `pip install imageio-ffmpeg`. MuJoCo renders with OpenGL: EGL, or the backend that
the environment variable MUJOCO_GL names.
"""

import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    from common.signals import quiet_imports

    quiet_imports()  # Ctrl-C ends the imports below without a traceback
    os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo reads it when it is imported.
    try:
        import mujoco  # noqa: F401
    except Exception as cause:  # There are various kinds, where a library is missing.
        sys.exit(
            f"MuJoCo cannot draw with MUJOCO_GL={os.environ['MUJOCO_GL']} ({cause}). egl needs a "
            "driver (Debian: libegl1 libgl1-mesa-dri), osmesa needs libosmesa6, glfw a display"
        )

import numpy as np
import tyro
from PIL import Image

from analysis.command_line import run_program
from analysis.runs import read_flags
from common.agents import Agent, load_agent
from common.environments import seed_of
from common.errors import UserError
from common.workers import Slot


@dataclass(frozen=True)
class Options:
    """The flags of the command."""

    run: Annotated[str, tyro.conf.Positional]
    """Folder of the run."""
    task: int = 0
    """Task of the agent. 0 is the run's first one."""
    seed: int = -1
    """Seed of the agent. -1 is the run's first one."""
    episodes: int = 1
    """Number of the evaluation's episodes to film, from the first one on."""
    every: int = 4
    """Environment steps per frame."""
    fps: int = 20
    """Frames per second of the video."""
    size: int = 320
    """Height and width in pixels."""
    out: str = ""
    """File of the film, .gif or .mp4 (default: video-task<task>-seed<seed>.gif in the folder)."""


def main(options: Options) -> Path:
    """Plays, says how the episodes ended, and writes the film."""
    check_options(options)
    folder = Path(options.run)
    if read_flags(folder)["env"] == "multigoal":
        raise UserError("the plane is not a MuJoCo scene: its episodes are in rollouts.png")
    agent = load_agent(folder, options.task or None, options.seed if options.seed >= 0 else None)
    name = f"video-task{agent.task}-seed{agent.seed}.gif"
    path = Path(options.out or folder / name).expanduser()
    check_writable(path)
    slot = make_slot(agent.env, options.size)
    frames = []
    for episode in range(options.episodes):
        start = seed_of(agent.seed, agent.task, agent.step, episode)
        new, result = film_episode(slot, agent, start, options.every)
        frames += new
        print(f"episode {episode}: {result}")
    save_film(path, frames, options.fps)
    print(f"{path}: {len(frames)} pictures")
    return path


def make_slot(env: str, size: int) -> Slot:
    """Makes an environment, which draws at its own size if it cannot at another."""
    try:
        return Slot(env, render_mode="rgb_array", width=size, height=size)
    except UserError:
        return Slot(env, render_mode="rgb_array")


def check_options(options: Options) -> None:
    """Raises UserError if a number is out of its range."""
    for name in ("episodes", "every", "fps", "size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if options.fps > 50 and not options.out.endswith(".mp4"):
        raise UserError("a GIF has at most 50 pictures per second: lower --fps, or write an .mp4")
    if options.seed < -1:
        raise UserError("--seed must be a seed of the run, or -1 for its first one")


def check_writable(path: Path) -> None:
    """Raises UserError if a film cannot be written there; a file that exists stays as it is."""
    if path.suffix not in (".gif", ".mp4"):
        raise UserError(f"{path} must end with .gif or .mp4")
    if path.suffix == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise UserError(
            f"{path} needs a package: pip install imageio-ffmpeg (or let it end with .gif)"
        )
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as problem:
        raise UserError(f"cannot write {path}: {problem.strerror}; choose another --out") from None


def film_episode(slot: Slot, agent: Agent, seed: int, every: int) -> tuple[list, str]:
    """Plays an episode of one agent, and returns its frames and how it ended.

    There is a frame of the start, of every `every`-th step, and of the end.
    """
    policy = agent.policy(seed)
    (observation,) = slot.start(seed)
    frames = [render(slot)]
    age = 0
    total = 0.0
    over = False
    while not over:
        observation, reward, _, over, success = slot.step(policy(observation))
        age += 1
        total += reward
        if over or age % every == 0:
            frames.append(slot.env.render())
    ending = "" if np.isnan(success) else f"success {success:.0f}, "
    return frames, f"{ending}return {total:.1f}, {age} steps"


def render(slot: Slot) -> np.ndarray:
    """Draws the first frame of an episode, which shows whether MuJoCo can draw at all."""
    try:
        frame = slot.env.render()
    except Exception as problem:  # There are various kinds, depending on the driver.
        gl = os.environ.get("MUJOCO_GL")
        raise UserError(
            f"MuJoCo cannot draw with MUJOCO_GL={gl}: {problem}. Try another of egl, osmesa, glfw"
        ) from None
    if frame is None:
        raise UserError("this environment draws no pictures: its render() returns nothing")
    return frame


def save_film(path: Path, frames: list[np.ndarray], fps: int) -> None:
    """Writes frames as an animated GIF that repeats for ever, or as an MP4."""
    if path.suffix == ".mp4":
        imageio = importlib.import_module("imageio.v2")
        # Players want an even width and height; an odd one is scaled by a pixel.
        imageio.mimwrite(path, frames, format="FFMPEG", fps=fps, macro_block_size=2)
        return
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(path, save_all=True, append_images=others, duration=1000 // fps, loop=0)


if __name__ == "__main__":
    run_program(main, Options, __doc__, renders=True)
