"""Runs whose agents are spread over devices: the rows of a run on one device."""

import csv
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.flags import ENV, ONLINE_LENGTHS, ONLINE_SIZES, TINY
from tests.helpers.runs import on_devices
from tools.shared_blocks import ROOT

OFFLINE = TINY | dict(env=ENV, num_seeds=2)  # of tasks 1 and 2: four agents
ONLINE = ONLINE_SIZES | ONLINE_LENGTHS["multigoal"]
pytestmark = pytest.mark.usefixtures("quick_compile")


def flags(script, **more):
    """Command line of a tiny run."""
    known = __import__(script).Args.__dataclass_fields__
    values = (ONLINE if "fmer" in script else OFFLINE) | more
    line = [sys.executable, "-m", script]
    for name, value in values.items():
        value = value if isinstance(value, tuple) else (value,)
        line += ["--" + name.replace("_", "-"), *map(str, value)] if name in known else []
    return line


def start(folder, line, devices=1):
    folder.mkdir(exist_ok=True)
    env = on_devices(devices) | dict(PYTHONPATH=str(ROOT))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(line, cwd=folder, env=env, **pipes)


def finish(*processes):
    for process in processes:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output


def table(folder, name):
    """(task, seed, step) -> the numbers of a row, times left out; of all run folders together."""
    found = {}
    for path in folder.rglob(f"{name}.csv"):
        with open(path, newline="") as file:
            _, *rows = csv.reader(file)
        found |= {tuple(map(int, row[:3])): np.array(row[4:], float) for row in rows}
    return found


@pytest.fixture(scope="module", params=["qam", "fmer"])
def script(request):
    return request.param


@pytest.fixture(scope="module")
def one(script, tmp_path_factory, dataset_dir):
    """Folder of a run on one device."""
    folder = tmp_path_factory.mktemp("one")
    finish(start(folder, flags(script, dataset_dir=dataset_dir)))
    return folder


def assert_close(left, right):
    assert left and left.keys() == right.keys()
    for agent in left:  # another number of agents in a program may round differently
        np.testing.assert_allclose(left[agent], right[agent], rtol=2e-3, atol=1e-4)


def test_agents_on_several_devices(script, one, tmp_path, dataset_dir):
    """Two or four agents, eight devices: the rows of training are those of one device."""
    finish(start(tmp_path, flags(script, dataset_dir=dataset_dir), devices=8))
    assert_close(table(one, "train"), table(tmp_path, "train"))
    assert table(one, "eval").keys() == table(tmp_path, "eval").keys()


def test_a_run_goes_on_with_other_devices(one, script, tmp_path, dataset_dir):
    """The first third on one device, the rest on several: checkpoints know no devices."""
    code = f"""
import sys
import {script} as module
from common.checkpoints import Checkpoints
from common.flags import launch

save = Checkpoints.save

def save_once(*inputs):
    save(*inputs)
    sys.exit(0)

Checkpoints.save = save_once
launch(module.main, module.Args, module.ENV_DEFAULTS)
"""
    whole = flags(script, dataset_dir=dataset_dir)
    finish(start(tmp_path, [sys.executable, "-c", code, *whole[3:]]))
    first = table(tmp_path, "train")
    finish(start(tmp_path, whole, devices=8))
    assert 0 < len(first) < len(table(tmp_path, "train"))
    assert_close(table(one, "train"), table(tmp_path, "train"))
