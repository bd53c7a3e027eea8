"""The walk of docs/guides/own-project.md: its files are written into a folder with a copy of qam.py
and common/, and its commands are run there, with smaller numbers."""

import csv
import os
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from tools.shared_blocks import ROOT

PAGE = (ROOT / "docs/guides/own-project.md").read_text()
TINY = (
    "--offline-steps 4 --log-interval 2 --eval-interval 4 --eval-episodes 2 --eval-slots 2 "
    "--workers 1 --start-training 2 --hidden-dims 8 8 --flow-steps 2 --batch-size 8"
).split()


def blocks(language):
    """The texts of the page's blocks in a language."""
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return [text.replace("\\\n", " ") for text in found]  # of a command that goes on


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with the copies and the page's files; Minari's datasets are kept there, too."""
    pytest.importorskip("minari")
    pytest.importorskip("h5py")
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "qam.py", folder)
    shutil.copytree(
        ROOT / "common", folder / "common", ignore=shutil.ignore_patterns("__pycache__")
    )
    for text in blocks("python"):
        name = re.match(r"# (\w+\.py)\n", text)[1]
        (folder / name).write_text(text.replace("range(300)", "range(20)"))
    return folder


def run(project, command):
    """Runs a command of the page; scripts get the small numbers, which come last and so win."""
    _, script, *flags = command.split()
    if script == "qam.py":
        flags += TINY
    if "--online-steps" in flags:
        flags += ["--online-steps", "6"]
    line = [sys.executable, script, *flags]
    environment = os.environ | dict(MINARI_DATASETS_PATH=str(project / "minari"))
    answer = subprocess.run(line, cwd=project, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def film(folder, project):
    """The page's last command."""
    (line,) = re.findall(r"    PYTHONPATH=. python (.*)\n", PAGE)
    path, run_folder, *flags = line.split()
    assert path.endswith("/video.py") and project / run_folder == folder
    command = [sys.executable, str(ROOT / "video.py"), run_folder, *flags]
    subprocess.run(command, cwd=project, env=os.environ | dict(PYTHONPATH="."), check=True)


def test_the_page(project, quick_compile):
    """The scripted policy's data, offline training, and the same run continued online."""
    commands = "".join(blocks("bash")).splitlines()
    scripts = [line.split()[1] for line in commands]
    assert scripts == ["collect.py", "qam.py", "qam.py", "act.py"]
    said = [run(project, line) for line in commands]
    assert "resuming from step 4 of 10" in said[2]
    folder = project / "runs/qam/my_env:Puck-v0/puck"
    with open(folder / "eval.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["4", "8", "10"]
    assert list(rows[0])[4:] == ["success", "return", "length"]
    assert all(row["length"] == "50.0" for row in rows)
    assert said[3] == "success False after 50 steps\n"
    film(folder, project)
    with Image.open(folder / "video-task1-seed0.gif") as drawn:
        assert drawn.size == (120, 120) and drawn.n_frames > 1  # equal pictures are joined


def test_the_environment(project):
    """It is solved by the page's policy without its noise, and draws itself."""
    code = """
import gymnasium, numpy as np
env = gymnasium.make("my_env:Puck-v0", render_mode="rgb_array")
state, _ = env.reset(seed=0)
for age in range(50):
    state, reward, over, late, info = env.step(np.clip(-state[:2] - 1.5 * state[2:], -2, 2))
    if over:
        break
assert info["success"] and reward == 0 and age > 10, age
assert env.render().shape == (120, 120, 3)
"""
    subprocess.run([sys.executable, "-c", code], cwd=project, check=True)
