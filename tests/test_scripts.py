"""Every script, run for real on a tiny OGBench dataset: what a run leaves, that it is reproducible,
that it continues bit for bit after any kind of stop, and that it lives without the repository.
"""

import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import flax.serialization
import jax
import numpy as np
import pytest

from common.collect import collect
from common.run import configure

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["meam", "qam"]
TINY = dict(
    hidden_dims=(16, 16), num_critics=2, flow_steps=2, batch_size=8, offline_steps=40,
    online_steps=30, start_training=5, log_interval=5, eval_interval=20, eval_episodes=2,
    eval_slots=2, workers=1, seed=3,
)  # fmt: skip

each_script = pytest.mark.parametrize("name", SCRIPTS)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A folder with three thousand transitions of pointmaze-medium-navigate."""
    folder = tmp_path_factory.mktemp("data")
    collect("pointmaze-medium-navigate", 3000, str(folder), workers=1)
    return str(folder)


def tiny(name, dataset, run_dir, /, **flags):
    module = importlib.import_module(name)
    flags = TINY | dict(dataset_dir=dataset, run_dir=str(run_dir)) | flags
    return module, configure(module.Args, module.ENV_DEFAULTS, "pointmaze-medium", **flags)


def run(name, dataset, run_dir, /, **flags):
    """Runs the script in this process; returns the run's folder."""
    module, args = tiny(name, dataset, run_dir, **flags)
    module.main(args)
    return Path(run_dir) / name / args.env / args.name


def table(folder, name):
    """Rows of a CSV file as text, without the column of the clock."""
    rows = [line.split(",") for line in (folder / f"{name}.csv").read_text().splitlines()]
    clock = rows[0].index("seconds")
    return [row[:clock] + row[clock + 1 :] for row in rows]


def assert_same_run(one, other):
    """Bit for bit: both tables, and every array of the checkpoint."""
    for name in ("train", "eval"):
        assert table(one, name) == table(other, name)
    restore = flax.serialization.msgpack_restore
    trees = [restore((f / "checkpoint.msgpack").read_bytes())["tree"] for f in (one, other)]
    leaves = [jax.tree_util.tree_leaves_with_path(tree) for tree in trees]
    assert [path for path, _ in leaves[0]] == [path for path, _ in leaves[1]]
    for (path, a), (_, b) in zip(*leaves):
        assert np.array_equal(a, b), path


@pytest.fixture(scope="session")
def finished(dataset, tmp_path_factory):
    """name -> the folder of an uninterrupted tiny run, offline and online."""
    folders = {}

    def get(name):
        if name not in folders:
            folders[name] = run(name, dataset, tmp_path_factory.mktemp("whole"))
        return folders[name]

    return get


@each_script
def test_what_a_run_leaves(name, finished):
    folder = finished(name)
    files = "config.json train.csv eval.csv checkpoint.msgpack rollouts.npz curve.png rollouts.png"
    assert {*files.split()} <= {path.name for path in folder.iterdir()}
    evaluations, training = table(folder, "eval"), table(folder, "train")
    assert [row[2] for row in evaluations[1:]] == ["20", "40", "60", "70"]
    assert [row[2] for row in training[1:]] == [str(s) for s in range(5, 75, 5)]
    assert np.isfinite(np.array(training[1:], float)).all()
    rollouts = np.load(folder / "rollouts.npz")
    assert rollouts["success"].shape == (1, TINY["eval_episodes"])


@each_script
def test_same_command_same_bytes(name, finished, dataset, tmp_path):
    assert_same_run(run(name, dataset, tmp_path), finished(name))


@each_script
@pytest.mark.parametrize("saves", [1, 3], ids=["offline", "online"])
def test_continues_bit_for_bit(name, saves, finished, dataset, tmp_path, monkeypatch):
    """Stopped after its first checkpoint (offline) or its third (in the middle of an online
    episode), the run continues as if it had never stopped; rows after the checkpoint go."""
    module, args = tiny(name, dataset, tmp_path)
    save, count = module.Run.save, []

    def stop(self, step, tree):
        save(self, step, tree)
        count.append(step)
        if len(count) == saves:
            zeros = {"task": np.zeros(1)}
            self.log("eval", step + 1, zeros)  # what a later part of the run had logged
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.Run, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            module.main(args)
    assert_same_run(run(name, dataset, tmp_path), finished(name))


@each_script
def test_killed_at_a_random_moment(name, finished, dataset, tmp_path):
    """SIGKILL twice, at moments drawn at random, then once more to the end."""
    flags = [f"--{k.replace('_', '-')}" for k in TINY]
    values = [" ".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in TINY.values()]
    pairs = [part for flag, value in zip(flags, values) for part in (flag, *value.split())]
    command = [sys.executable, f"{name}.py", *pairs, "--dataset-dir", dataset]
    command += ["--run-dir", str(tmp_path)]
    seed = random.randrange(10**6)
    moments = random.Random(seed)
    print(f"seed of the moments: {seed}")
    for _ in range(2):
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        time.sleep(moments.uniform(3, 25))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    assert_same_run(tmp_path / name / "pointmaze-medium" / "default", finished(name))


@each_script
def test_a_finished_run_is_left_alone(name, finished, dataset, capsys):
    folder = finished(name)
    before = {path.name: path.read_bytes() for path in folder.glob("*.[cm]s*")}
    assert run(name, dataset, folder.parent.parent.parent) == folder
    assert "70 of 70 steps" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in folder.glob("*.[cm]s*")}


@each_script
def test_another_configuration_is_refused(name, finished, dataset):
    with pytest.raises(SystemExit, match="inv_temp: .* there, 7.0 now"):
        run(name, dataset, finished(name).parent.parent.parent, inv_temp=7.0)


@each_script
def test_eval_only(name, finished, dataset, tmp_path):
    """It adds one evaluation of the checkpoint, equal to the run's last one, and trains nothing."""
    shutil.copytree(finished(name).parent.parent, tmp_path / name)
    folder = run(name, dataset, tmp_path, eval_only=True)
    assert table(folder, "eval_only")[-1] == table(folder, "eval")[-1]
    assert table(folder, "train") == table(finished(name), "train")


@each_script
def test_eval_only_needs_a_checkpoint(name, dataset, tmp_path):
    with pytest.raises(SystemExit, match="no checkpoint"):
        run(name, dataset, tmp_path, eval_only=True)


@each_script
def test_copied_out(name, dataset, tmp_path):
    """The script and common/ alone, in an empty folder, in a clean interpreter."""
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    shutil.copytree(ROOT / "common", tmp_path / "common")
    flags = "--offline-steps 4 --log-interval 2 --eval-interval 4 --eval-episodes 1 --workers 1 "
    flags += "--hidden-dims 16 16"
    command = [sys.executable, f"{name}.py", *flags.split(), "--dataset-dir", dataset]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=300)
    assert (tmp_path / "runs" / name / "pointmaze-medium" / "default" / "eval.csv").exists()


@each_script
def test_help(name, tmp_path):
    """Names every flag, writes nothing."""
    command = [sys.executable, str(ROOT / f"{name}.py"), "--help"]
    text = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    module = importlib.import_module(name)
    for field in module.Args.__dataclass_fields__:
        assert field == "action_size" or f"--{field.replace('_', '-')}" in text
    assert not list(tmp_path.iterdir())


@each_script
def test_a_diverging_run_stops(name, dataset, tmp_path):
    """It names metric, agent and step, and the checkpoint stays."""
    run(name, dataset, tmp_path, online_steps=0, offline_steps=20, lr=1e-3)
    path = tmp_path / name / "pointmaze-medium" / "default" / "checkpoint.msgpack"
    before = path.read_bytes()
    message = r"\w+ of task 1, seed 3 is not finite at step \d+"
    with pytest.raises(SystemExit, match=message):
        run(name, dataset, tmp_path, name="far", online_steps=0, lr=1e30, grad_clip=1e30)
    assert path.read_bytes() == before


@each_script
def test_agents_do_not_depend_on_each_other(name, dataset, tmp_path):
    """Two tasks and two seeds in one program: every agent equals the same one trained alone. After
    a few updates, for rounding differs between batched and single matrix products."""
    short = dict(offline_steps=6, online_steps=0, log_interval=2, eval_interval=6, eval_episodes=1)
    together = run(name, dataset, tmp_path / "all", tasks=(1, 4), num_seeds=2, **short)
    rows = {tuple(row[:3]): row[3:] for row in table(together, "train")[1:]}
    assert len(rows) == 4 * 3
    for task, seed in ((1, 4), (4, 3)):
        flags = short | dict(tasks=(task,), seed=seed, name=f"{task}-{seed}")
        alone = run(name, dataset, tmp_path / "alone", **flags)
        for row in table(alone, "train")[1:]:
            both = np.array(row[3:], float), np.array(rows[tuple(row[:3])], float)
            np.testing.assert_allclose(*both, rtol=2e-3, atol=1e-4)


@each_script
def test_compiles_once_and_stays_on_the_device(name, dataset, tmp_path, monkeypatch):
    """Chunks of any length, logged and evaluated, use one executable of `train_chunk` and one of
    `act`; inside a chunk nothing moves between host and device."""
    module, args = tiny(name, dataset, tmp_path, online_steps=0, eval_interval=15)
    module.train_chunk.clear_cache()
    module.act.clear_cache()
    chunk = module.train_chunk

    def guarded(args, *inputs):
        inputs = jax.device_put(inputs)
        with jax.transfer_guard("disallow"):
            return jax.block_until_ready(chunk(args, *inputs))

    monkeypatch.setattr(module, "train_chunk", guarded)
    module.main(args)
    assert (chunk._cache_size(), module.act._cache_size()) == (1, 1)
