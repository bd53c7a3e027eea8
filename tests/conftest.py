"""What all tests share: no display, compiled programs kept for the session (also for the processes
that tests start), groups of tests that run in one process, a small real dataset, and arguments of
runs that take seconds."""

import atexit
import gc
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from tests import shared_blocks

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("MUJOCO_GL", "disable")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # read when jax is imported; workers inherit it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jax-cache-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

ENV = "pointmaze-medium"
# Two agents; evaluations and checkpoints at 8, 10, 16 and 24, of which 16 is the online phase's
# sixth step: in the middle of an episode, and of the plan of five actions that began with it.
TINY = dict(
    tasks=(1, 2),
    offline_steps=10,
    online_steps=14,
    start_training=4,
    log_interval=3,
    eval_interval=8,
    eval_episodes=2,
    eval_slots=2,
    workers=1,
    hidden_dims=(16, 16),
    num_critics=2,
    flow_steps=3,
    batch_size=16,
)
SLOW = ["theory", "bandit", "runs", "envs"]  # in names of files that start first: ends stay short
ALONE = SLOW[:2]  # their tests share nothing: each may go to another process
SCRIPTS = {str(x.relative_to(ROOT).with_suffix("")) for x in shared_blocks.scripts()}


def group(nodeid):
    """File and, where it is a parameter, script of a test."""
    file, _, name = nodeid.partition("::")
    return " ".join([file, *(x for x in re.split(r"[\[\]-]", name) if x in SCRIPTS)])


def pytest_xdist_auto_num_workers(config):
    """All tests: a process per core. Named files or tests: this process, where `--pdb` works."""
    named = any(".py" in name for name in config.option.file_or_dir)
    return 0 if named else min(8, os.cpu_count() or 1)


def pytest_collection_modifyitems(items):
    def rank(item):
        return next((i for i, word in enumerate(SLOW) if word in item.path.stem), len(SLOW))

    items.sort(key=rank)


def pytest_xdist_make_scheduler(config, log):
    """Tests of a file, and there of a script, run in one process, which makes what they share once.
    (Groups by the mark `xdist_group` are without effect in pytest 9.2 with pytest-xdist 3.8.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            alone = any(word in nodeid.partition("::")[0] for word in ALONE)
            return nodeid if alone else group(nodeid)

    return Groups(config, log) if config.getvalue("dist") == "loadscope" else None


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Forgets compiled programs after each group. All of them together exceed the number of memory
    maps that Linux grants a process (vm.max_map_count), which ends in a segmentation fault."""
    if nextitem is None or group(item.nodeid) != group(nextitem.nodeid):
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory):
    """Folder of 3000 transitions of pointmaze-medium-navigate."""
    from common.collect import collect

    folder = tmp_path_factory.mktemp("data")
    collect("pointmaze-medium-navigate", 3000, folder, workers=1)
    return folder


def tiny_args(module, folder, **flags):
    """A script's `Args` for a run of seconds on the dataset in `folder`."""
    from common.run import configure

    flags = {k: v for k, v in TINY.items() if k in module.Args.__dataclass_fields__} | flags
    return configure(module.Args, module.ENV_DEFAULTS, ENV, dataset_dir=str(folder), **flags)


@pytest.fixture(scope="module")
def quick_compile():
    """Compiles fast and runs slowly, here and in child processes: for programs that run once."""
    import jax

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def find_modules(monkeypatch):
    """`python -m baselines.x` works in any folder."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def float64():
    import jax

    with jax.enable_x64(True):
        yield
