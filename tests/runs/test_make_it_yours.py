"""The walk of docs/guides/make-it-yours.md: copy a script out with common/, change it, run it."""

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/guides/make-it-yours.md"
TINY = (
    "--offline-steps 4 --log-interval 2 --eval-interval 4 --eval-episodes 1 --eval-slots 1 "
    "--workers 1 --hidden-dims 8 8 --num-critics 2 --flow-steps 2 --batch-size 8"
).split()


def diffs() -> list[tuple[str, str]]:
    """Returns the old and the new text of every diff on the page."""
    found = []
    for block in re.findall(r"```diff\n(.*?)```", PAGE.read_text(), re.DOTALL):
        lines = block.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] != "+")
        new = "".join(line[1:] for line in lines if line[0] != "-")
        found.append((old, new))
    return found


@pytest.fixture
def project(tmp_path):
    """Returns a folder with a copy of meam.py, changed as on the page, and of common/."""
    text = (ROOT / "meam.py").read_text()
    for old, new in diffs():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (tmp_path / "meam.py").write_text(text)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=ignored)
    return tmp_path


def run(project, *flags):
    """Runs the copied script and returns what it prints."""
    command = [sys.executable, str(project / "meam.py"), *flags]
    answer = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_the_page_has_all_kinds_of_changes():
    assert len(diffs()) == 8


def test_changed_copy_runs(project, dataset_dir, quick_compile):
    """The new flags set values, the new metric, loss and network are columns of train.csv."""
    flags = ["--conservatism", "0.5", "--value-offset", "-2", "--dataset-dir", str(dataset_dir)]
    run(project, *TINY, *flags)
    (folder,) = (project / "runs/meam/pointmaze-medium").iterdir()
    assert folder.name.startswith("conservatism=0.5,value-offset=-2.0")
    with open(folder / "train.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "4"]
    for row in rows:
        assert float(row["q_max"]) >= float(row["q"])
        assert 0 < float(row["value_loss"]) < 10
        assert float(row["conservative_loss"]) != 0


def test_changed_copy_explains_its_flags(project):
    shown = " ".join(run(project, "--help").split())
    assert "Weight of the penalty on values of random actions." in shown
    assert "--value-offset FLOAT" in shown
