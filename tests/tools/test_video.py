"""Films of runs: of the agent that was asked for, from its evaluation's seeds, every n-th step."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image

import qam
import video
from baselines import sac
from common.errors import UserError
from common.flags import parse
from common.workers import Slot
from tests.helpers.flags import tiny_args
from tools.shared_blocks import ROOT

SIZE = 16


class Pictured(Slot):
    """An environment whose pictures need no OpenGL: a bar that grows by a row with every one."""

    count, visited = 0, []  # of all

    def __init__(self, name, render_mode, width, height):
        assert (render_mode, width, height) == ("rgb_array", SIZE, SIZE)
        super().__init__(name)
        self.env.render = self.picture

    def picture(self):
        Pictured.count += 1
        return np.uint8(np.indices((SIZE, SIZE, 3))[0] < Pictured.count % SIZE) * 255

    def step(self, action):
        result = super().step(action)
        self.visited.append(result[0])
        return result


@pytest.fixture
def pictured(monkeypatch):
    monkeypatch.setattr(video, "Slot", Pictured)
    monkeypatch.setattr(Pictured, "count", 0)
    monkeypatch.setattr(Pictured, "visited", [])


@pytest.fixture(scope="module")
def offline(dataset_dir, tmp_path_factory, quick_compile):
    """Folder of a run with tasks 2 and 1, seeds 3 and 4."""
    root = tmp_path_factory.mktemp("runs")
    flags = dict(tasks=(2, 1), seed=3, num_seeds=2, offline_steps=3, online_steps=0)
    qam.main(tiny_args(qam, dataset_dir, run_dir=str(root), **flags))
    return root / "qam/pointmaze-medium/default"


def test_offline(offline, pictured, capsys):
    """Task 1, seed 4 is the last of four agents; both of its episodes go where the evaluation's
    went (rounding apart, which 100 steps among walls may magnify)."""
    options = dict(task=1, seed=4, episodes=2, every=10, size=SIZE)
    path = video.main(video.Options(str(offline), **options))
    assert path == offline / "video-task1-seed4.gif"
    rollouts = np.load(offline / "rollouts.npz")
    visited, expected = Pictured.visited, [rollouts[f"path{i}"] for i in (6, 7)]
    assert len(visited) == sum(map(len, expected))
    for own, other in zip((visited[:50], visited[len(expected[0]) :][:50]), expected):
        np.testing.assert_allclose(own, other[:50], atol=1e-3)
    assert not np.allclose(expected[0][:50], expected[1][:50], atol=1e-3)
    with Image.open(path) as pictures:  # one at the start, one after every ten steps
        assert pictures.n_frames == Pictured.count == 2 * 11
        assert (pictures.size, pictures.info["duration"]) == ((SIZE, SIZE), 50)
    assert "episode 1: success 0, return -100.0, 100 steps" in capsys.readouterr().out


def test_online(tmp_path, pictured, capsys):
    """The first agent, acting as in evaluations; the last picture is of the last step; --out."""
    flags = "--env hopper --total-steps 8 --warmup-steps 4 --hidden-dims 8 --workers 1 --seed 2"
    flags += " --eval-interval 8 --eval-episodes 1 --batch-size 4 --name default --run-dir"
    sac.main(parse(sac.Args, sac.ENV_DEFAULTS, [*flags.split(), str(tmp_path)]))
    folder, out = tmp_path / "sac/hopper/default", tmp_path / "film.gif"
    video.main(video.Options(str(folder), every=1000, size=SIZE, out=str(out)))
    expected = np.load(folder / "rollouts.npz")["path0"]
    np.testing.assert_allclose(Pictured.visited, expected, atol=1e-3)
    with Image.open(out) as pictures:
        assert pictures.n_frames == 2
    assert f"{len(expected)} steps" in capsys.readouterr().out


def test_mp4(offline, tmp_path, pictured):
    """The same pictures, at the same rate."""
    out = tmp_path / "film.mp4"
    video.main(video.Options(str(offline), every=10, fps=10, size=SIZE, out=str(out)))
    assert iio.imread(out).shape == (11, SIZE, SIZE, 3)
    assert iio.immeta(out)["fps"] == 10


def test_mp4_without_its_package(offline, tmp_path, monkeypatch, pictured):
    """A line says what to install, before anything is played."""
    monkeypatch.setattr(video.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"film.mp4 needs a package: pip install imageio-ffmpeg"):
        video.main(video.Options(str(offline), size=SIZE, out=str(tmp_path / "film.mp4")))
    assert not Pictured.count and not any(tmp_path.iterdir())


def test_without_the_other_commands(tmp_path):
    """Neither plot.py nor benchmarks/ nor a script need to be there, nor is matplotlib imported."""
    for name in ("common", "analysis"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "video.py", tmp_path)
    code = "import sys, video; print({'matplotlib', 'imageio_ffmpeg'} & {*sys.modules})"
    line = [sys.executable, "-c", code]
    answer = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert (answer.stdout, answer.stderr) == ("set()\n", "")


def test_refusals(offline, tmp_path, pictured):
    """One line for what cannot be filmed."""
    for options, answer in (
        (dict(task=3), r"no agent of task 3, seed 3 .*\(2, 3\), \(2, 4\), \(1, 3\), \(1, 4\)"),
        (dict(seed=5), "no agent of task 2, seed 5"),
        (dict(every=0), "--every must be at least 1"),
        (dict(fps=60), "a GIF has at most 50 pictures per second"),
        (dict(seed=-5), "--seed must be a seed of the run"),
        (dict(out=str(tmp_path / "film.foo")), "film.foo must end with .gif or .mp4"),
        (dict(out=str(offline / "config.json/film.gif")), "cannot write .*film.gif: "),
    ):
        with pytest.raises(UserError, match=answer):
            video.main(video.Options(str(offline), size=SIZE, **options))
    with pytest.raises(UserError, match="is not a run folder: it has no config.json"):
        video.main(video.Options(str(tmp_path)))
    assert not Pictured.count  # nothing was played
    text = (offline / "config.json").read_text()
    copy = tmp_path / "qam/pointmaze-medium/copy"
    copy.mkdir(parents=True)
    (copy / "config.json").write_text(text)
    with pytest.raises(UserError, match="has no checkpoint that can be read"):
        video.main(video.Options(str(copy), size=SIZE))
    assert not any(tmp_path.glob("film*"))
    (copy / "config.json").write_text(text.replace('"pointmaze-medium"', '"multigoal"'))
    with pytest.raises(UserError, match="the plane is not a MuJoCo scene"):
        video.main(video.Options(str(copy)))


def test_an_environment_that_draws_nothing():
    slot = SimpleNamespace(env=SimpleNamespace(render=lambda: None))
    with pytest.raises(UserError, match="this environment draws no pictures"):
        video.render(slot)


@pytest.mark.parametrize("gl", ["egl", "osmesa", "glfw"])
def test_with_opengl(offline, tmp_path, monkeypatch, gl):
    """MuJoCo's pictures where a driver is installed; else one line says what is missing."""
    monkeypatch.setenv("MUJOCO_GL", gl)
    out = tmp_path / "film.gif"
    line = [sys.executable, ROOT / "video.py", offline, "--every", "500", "--size", "64"]
    answer = subprocess.run([*line, "--out", out], capture_output=True, text=True)
    if answer.returncode:
        assert f"MuJoCo cannot draw with MUJOCO_GL={gl}" in answer.stderr.splitlines()[-1]
        assert "Traceback" not in answer.stderr
    else:
        with Image.open(out) as pictures:
            assert pictures.size == (64, 64) and np.ptp(np.asarray(pictures.convert("L"))) > 50
