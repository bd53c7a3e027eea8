"""What all tests share: no display, compiled programs kept for the session (also for the processes
that tests start), groups of tests that run in one process, and fixtures of several areas."""

import atexit
import functools
import gc
import importlib
import os
import re
import shutil
import signal
import sys
import tempfile

import pytest

from tools.shared_blocks import ROOT, scripts

sys.path.insert(0, str(ROOT))
pytest.register_assert_rewrite("tests.helpers")
os.environ.setdefault("MUJOCO_GL", "disable")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # read when jax is imported; workers inherit it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jax-cache-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# Parts of paths of the files that start first, so that no process is left alone with a long one.
SLOW = ["theory/", "runs/", "environments.py", "env_pool.py"]
ALONE = "theory/"  # their tests share nothing: each may go to another process
SCRIPTS = {str(x.relative_to(ROOT).with_suffix("")) for x in scripts()}


def file(nodeid):
    """Path of a test's file in the repository, such as tests/runs/test_script_runs.py."""
    return nodeid.partition("::")[0]


def group(nodeid):
    """File and, where it is a parameter, script of a test."""
    words = re.split(r"[\[\]-]", nodeid.partition("::")[2])
    return " ".join([file(nodeid), *(word for word in words if word in SCRIPTS)])


def pytest_xdist_auto_num_workers(config):
    """All tests: a process per core. Named files or tests: this process, where `--pdb` works."""
    named = any(".py" in name for name in config.option.file_or_dir)
    return 0 if named else min(8, os.cpu_count() or 1)


@pytest.hookimpl(tryfirst=True)  # before `-m quick` selects
def pytest_collection_modifyitems(items):
    from tests.helpers.quick import is_quick

    def rank(item):
        return next((i for i, word in enumerate(SLOW) if word in file(item.nodeid)), len(SLOW))

    for item in items:
        if is_quick(item.nodeid):
            item.add_marker("quick")
    items.sort(key=rank)


def pytest_xdist_make_scheduler(config, log):
    """Runs tests of the same file and script in one process, which makes what they share once.
    (The mark `xdist_group` has no effect in pytest 9.2 with pytest-xdist 3.8.)"""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return nodeid if ALONE in file(nodeid) else group(nodeid)

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
    from common.collect.dataset import collect

    folder = tmp_path_factory.mktemp("data")
    collect("pointmaze-medium-navigate", 3000, folder, workers=1)
    return folder


# Turning this option off selects XLA's older code generator for fused loops. It compiles three
# times faster if other optimisations are off, too, and more slowly if they are on.
OLD_LOOPS = "xla_cpu_use_fusion_emitters"


@functools.cache
def has_old_loops():
    """Whether this version of jaxlib knows the option."""
    import jax

    try:
        jax.jit(lambda x: x).lower(0.0).compile({OLD_LOOPS: False})
    except RuntimeError:
        return False
    return True


@pytest.fixture(scope="module")
def quick_compile():
    """Compiles fast and runs slowly, here and in child processes: for programs that run once."""
    import jax
    from jax._src import compiler

    get_options = compiler.get_compile_options

    def get_quick_options(*args, env_options_overrides=None, **kwargs):
        options = dict(env_options_overrides or {})
        if jax.config.read("jax_disable_most_optimizations"):
            options[OLD_LOOPS] = False
        return get_options(*args, env_options_overrides=options, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        if has_old_loops():
            patch.setattr(compiler, "get_compile_options", get_quick_options)
            patch.setenv("XLA_FLAGS", f"--{OLD_LOOPS}=false {os.environ.get('XLA_FLAGS', '')}")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def optimised(quick_compile):
    """Undoes `quick_compile` for a test whose program runs long or is compared bit for bit."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def one_process():
    """Lets runs with `--workers 1` step their environments here, with the same results: a process
    takes longer to start than the few steps of a test."""
    from common.workers import Slots, Workers

    def slots_or_workers(names, count):
        return Slots(names) if count == 1 else Workers(names, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.env_pool.Workers", slots_or_workers)
        yield


@pytest.fixture
def find_modules(monkeypatch):
    """`python -m baselines.x` works in any folder."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def float64():
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder, which relative run folders are in, and no pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("common.run.draw_pictures", lambda folder: None)
    return tmp_path


@pytest.fixture
def heeded():
    """Signals as in a terminal: a shell that runs the tests in the background has them ignored."""
    from common.signals import SIGNALS

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run(tmp_path):
    """A function that begins or continues the small run: run(flag=value, ...) -> Run."""
    from tests.helpers.small_run import begin

    return functools.partial(begin, tmp_path)


@pytest.fixture(scope="module")
def script(request):
    """Path of a script without .py, by which a module's tests are parametrized."""
    return request.param


@pytest.fixture(scope="module")
def module(script):
    """The script's module."""
    return importlib.import_module(script.replace("/", "."))


@pytest.fixture
def new_pool():
    """EnvPool; the workers end with their pool."""
    from common.env_pool import EnvPool

    return EnvPool
