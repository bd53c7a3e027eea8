"""What every script promises, checked on its text and syntax tree: the same flags mean the same,
sections come in the same order, equations are tagged, nothing happens on import; and
how the networks that they share start.
"""

import ast
import importlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from common.environments import ONLINE, resolve
from common.networks import Critic, Field, TanhGaussian
from tests.helpers.runs import clean
from tools import diffs, pages, shared_blocks

ROOT, SCRIPTS = shared_blocks.ROOT, shared_blocks.scripts()
NAMES = [str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in SCRIPTS]
PAPER_DOMAINS = (
    "antmaze-large antmaze-giant humanoidmaze-medium humanoidmaze-large scene puzzle-3x3 "
    "puzzle-4x4 cube-double cube-triple cube-quadruple"
).split()
# flags whose help and default differ within a family on purpose: family -> name -> why
DIFFERENT = dict(
    offline={
        "edit_scale": "in qam_edit.py 0 means no edit policy",
        "fql_alpha": "in qam_fql.py 0 means no one-step policy",
        "flow_steps": "in dac.py and qsm.py they are steps of denoising, not Euler's",
        "inv_temp": "in cgql.py 0 is not behaviour cloning: x / t still guides",
        "online_steps": "RLPD has no offline phase: its length is the run's",
    },
    online={
        "num_candidates": "what candidates are for: the weights, the best action, both",
        "batch_size": "PPO's come from its rollout",
        "max_grad_norm": "of one network, or of both at once",
        "hidden_dims": "SAC-Flow's policy is not an MLP: the widths of the critics alone",
        "target_rate": "which networks have averages",
        "actor_lr": "where the rate falls, this is the first one",
        "policy_delay": "what else comes as seldom as the policy's updates",
        "target_entropy": "whose entropy: of actions, of a path",
    },
)
# flags of online methods with the values of each method's own paper, under the same type and help
OWN_VALUES = """reward_scale critic_lr alpha_lr act_candidates flow_steps diffusion_steps
schedule beta_scale start_scale noise_scale alpha_init alpha_steps""".split()
LOOP = "create_agents act train_step train_chunk evaluate main"
ORDER = dict(
    offline=f"Args ENV_DEFAULTS State create update {LOOP}".split(),
    online=f"Args ENV_DEFAULTS State create sample_actions update MODES {LOOP}".split(),
)
QUIETLY = ["from common.signals import quiet_imports", "quiet_imports()"]
WAY_TO_COMMON = "sys.path.insert(1, str(Path(__file__).resolve().parent.parent))"
APART = ["baselines.ppo"]  # on-policy: no replay, and a loop of its own

each_script = pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)


NUMBERS = dict.fromkeys(("int", "PositiveInt", "NonNegativeInt"), int)
NUMBERS |= dict.fromkeys(("float", "PositiveFloat", "NonNegativeFloat", "UnitInterval"), float)


def help_of(lines, node):
    """The comments above a field, except headings, and the one on its line."""
    above = []
    for line in reversed(lines[: node.lineno - 1]):
        if not line.startswith("    # ") or line.startswith("    # --- "):
            break
        above.insert(0, line.removeprefix("    # "))
    last = lines[node.end_lineno - 1].partition("  # ")[2]
    return " ".join([*above, last]).strip()


def flags(path):
    """field -> (annotation, default, help) of a script's Args."""
    source = path.read_text()
    lines = source.splitlines()
    args = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "Args")
    fields = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    return {
        node.target.id: (
            ast.unparse(node.annotation),
            ast.unparse(node.value),
            help_of(lines, node),
        )
        for node in fields
    }


def test_shared_blocks_are_the_same():
    found = shared_blocks.problems()
    assert not found, "\n\n".join(found)


@pytest.mark.parametrize("kind", shared_blocks.CANONICAL)
def test_shared_blocks_see_a_changed_character(monkeypatch, tmp_path, kind):
    """The check itself fails for one changed character, and `write` repairs it, in each family by
    the family's own text."""
    canonical = {k: tmp_path / path.name for k, path in shared_blocks.CANONICAL.items()}
    (tmp_path / "baselines").mkdir()
    for k, path in shared_blocks.CANONICAL.items():
        canonical[k].write_text(path.read_text())
    source, name = canonical[kind].read_text(), canonical[kind].name
    paths = [*canonical.values(), tmp_path / "qam_edit.py"]
    paths[-1].write_text(source.replace("Trains all agents", "Trains an agent"))
    monkeypatch.setattr(shared_blocks, "ROOT", tmp_path)
    monkeypatch.setattr(shared_blocks, "CANONICAL", canonical)
    monkeypatch.setattr(shared_blocks, "TOP_LEVEL", paths)
    (problem,) = shared_blocks.problems()
    assert f"qam_edit.py: block 'evaluate and main' differs from {name}" in problem
    assert shared_blocks.write() == ["qam_edit.py"]
    assert not shared_blocks.problems() and paths[-1].read_text() == source
    emptied = shared_blocks.canonical_blocks()[kind]["many agents"]["text"]
    paths[-1].write_text(source.replace(emptied, ""))
    assert shared_blocks.write() == ["qam_edit.py"] and paths[-1].read_text() == source
    block = shared_blocks.blocks(source)["many agents"][0]
    fork = block.replace("# --- shared:", "# --- forked:").replace("end shared", "end forked")
    paths[-1].write_text(source.replace(block, fork))
    assert shared_blocks.problems() == ["qam_edit.py: fork of 'many agents' is not listed in FORKS"]


def test_families_of_scripts():
    """Told by the text: an online script has the flag --total-steps, the environment of no task and
    no dataset; every script is in one family, and a family's own script in it."""
    for kind, path in shared_blocks.CANONICAL.items():
        assert path.stem in shared_blocks.named(kind)
    offline, online = (shared_blocks.named(kind) for kind in ("offline", "online"))
    assert sorted(offline + online) == sorted(name.replace(".", "/") for name in NAMES)
    for name in offline + online:
        known = flags(ROOT / f"{name}.py").keys()
        assert ("total_steps" in known) == (name in online)
        assert ({"tasks", "dataset_dir"} <= known) == (name in offline)
    assert shared_blocks.family("total_steps: int = 1") == "offline"  # no field of a class
    for kind in ("int", "PositiveInt"):
        assert shared_blocks.family(f"class Args:\n    total_steps: {kind} = 1") == "online"


def test_the_optimisers_step_is_the_same():
    """`descend` of online scripts, character for character; SAC-Flow's also carries statistics."""
    text = {}
    for path in SCRIPTS:
        if found := re.search(r"^def descend\(.*?(?=\n\n\n)", path.read_text(), re.M | re.S):
            text[path.stem] = found[0]
    assert sorted(text) == "dipo dpmd flame fmer qvpo sac sac_flow td3".split()
    assert text.pop("sac_flow") != text["fmer"]
    assert len(set(text.values())) == 1 and text["fmer"].count("\n") == 12


@pytest.mark.parametrize("module", ["tools.shared_blocks", "tools.diffs", "tools.pages"])
def test_check_command_succeeds(module):
    """`check` ends with status 0 where there is nothing to say."""
    line = [sys.executable, "-m", module, "check"]
    answer = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (0, "")


def test_families():
    """Scripts that differ by an idea differ by no more, and the docs show the difference."""
    found = diffs.problems()
    assert not found, "\n".join(found)


@pytest.mark.parametrize("kind", DIFFERENT)
def test_flags_mean_the_same_everywhere(kind):
    """A flag has the same type, default and help in every script of a family, unless DIFFERENT says
    why not, and the same type in both."""
    seen = {}
    for name in shared_blocks.named(kind):
        for flag, (annotation, default, comment) in flags(ROOT / f"{name}.py").items():
            own = flag in OWN_VALUES and kind == "online"
            entry = annotation, None if own else default, comment
            entry = entry[:1] if flag in DIFFERENT[kind] else entry
            assert seen.setdefault(flag, entry) == entry, f"{name}.py: --{flag}"
    assert DIFFERENT[kind].keys() <= seen.keys()


@each_script
def test_flags_are_explained_and_typed(path):
    module = importlib.import_module(NAMES[SCRIPTS.index(path)])
    for name, (annotation, _, comment) in flags(path).items():
        assert len(comment) > 10, f"--{name} has no help"
        kind = (NUMBERS | dict(bool=bool, str=str)).get(annotation)
        assert kind is None or type(getattr(module.Args, name)) is kind, name


@each_script
def test_sections_come_in_order(path):
    body = ast.parse(path.read_text()).body
    targets = [getattr(n, "name", None) or ast.unparse(getattr(n, "targets", [n])[0]) for n in body]
    order = ORDER[shared_blocks.family(path.read_text())]
    if NAMES[SCRIPTS.index(path)] in APART:
        assert {"Args", "ENV_DEFAULTS", "State", "create", "act", "evaluate", "main"} <= {*targets}
        order = [name for name in order if name in targets]
    assert [name for name in targets if name in order] == order


@each_script
def test_importing_does_nothing(path):
    """Only definitions and constants at the top level, and, where the script is started, quiet
    imports and the way of baselines to common/; no script imports another one."""
    body = ast.parse(path.read_text()).body
    assert ast.get_docstring(ast.parse(path.read_text()))
    (started,) = [node for node in body[1:-1] if isinstance(node, ast.If)]
    assert ast.unparse(started.test) == "__name__ == '__main__'" and not started.orelse
    expected = [WAY_TO_COMMON] if path.parent.name == "baselines" else []
    assert [ast.unparse(node) for node in started.body] == expected + QUIETLY
    for node in body[1:-1]:
        if node is started:
            continue
        kinds = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.Assign)
        assert isinstance(node, kinds), ast.unparse(node)[:80]
        if isinstance(node, ast.Assign):
            calls = [n for n in ast.walk(node) if isinstance(n, ast.Call)]
            assert all(ast.unparse(call.func) == "dict" for call in calls)
        if isinstance(node, ast.ImportFrom):
            own = {name.split(".")[-1] for name in NAMES} | {"baselines"}
            assert node.module.split(".")[0] not in own
    assert ast.unparse(body[-1]).startswith("if __name__ == '__main__':")


def test_imports_in_a_fresh_interpreter(tmp_path):
    """Importing one script after the other prints and writes nothing, starts no device and no
    process."""
    check = f"""
import importlib, os, sys
sys.path.insert(0, {str(ROOT)!r})
for name in {NAMES}:
    importlib.import_module(name)
    from jax._src import xla_bridge
    assert not xla_bridge.backends_are_initialized(), name
    assert not {{"wandb", "matplotlib"}} & set(sys.modules), name
    assert not open(f"/proc/self/task/{{os.getpid()}}/children").read(), name
"""
    line = [sys.executable, "-c", check]
    answer = subprocess.run(line, cwd=tmp_path, env=clean(tmp_path), capture_output=True, text=True)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
    assert not list(tmp_path.rglob("*"))


@each_script
def test_equations_are_tagged_and_listed(path):
    listed = pages.listed(str(path.relative_to(ROOT).with_suffix("")))
    assert set(pages.equations(path.read_text())) == listed.keys()


@each_script
def test_environment_defaults(path):
    """Offline: all ten domains of the paper and the embedded default; online: the plane at least,
    and none but the online environments. Every key is a flag."""
    module = importlib.import_module(NAMES[SCRIPTS.index(path)])
    if shared_blocks.family(path.read_text()) == "online":
        assert module.Args.env == "multigoal" and "multigoal" in module.ENV_DEFAULTS
        assert set(module.ENV_DEFAULTS) <= set(ONLINE)
    else:
        assert {*PAPER_DOMAINS, module.Args.env} <= set(module.ENV_DEFAULTS)
    for env, values in module.ENV_DEFAULTS.items():
        assert resolve(env).env == env
        assert set(values) <= set(flags(path)), env


@pytest.mark.parametrize("name", shared_blocks.named("online"))
def test_modes_of_evaluations(name):
    """At least one, none of which is the one of training."""
    modes = importlib.import_module(name.replace("/", ".")).MODES
    assert isinstance(modes, tuple) and len(set(modes)) == len(modes) > 0
    assert all(type(mode) is str and mode.isidentifier() for mode in modes)
    assert "explore" not in modes


def test_how_offline_networks_start():
    """Kernels are uniform in +-sqrt(6 / (inputs + outputs)), those of different critics independent
    of one another; biases are 0, scales of LayerNorm 1."""
    s, a = jnp.zeros((1, 40)), jnp.zeros((1, 20))
    bodies = Critic((128, 128), 3), Field((128, 128)), TanhGaussian((128, 128), 20)
    for body, inputs in zip(bodies, ((s, a), (s, a, 0.0), (s, a))):
        params = jax.jit(body.init)(jax.random.PRNGKey(0), *inputs)
        for path, x in jax.tree_util.tree_leaves_with_path(params):
            name = jax.tree_util.keystr(path)
            if "kernel" not in name:
                assert (x == ("scale" in name)).all(), name
                continue
            limit = (6 / sum(x.shape[-2:])) ** 0.5
            law = "uniform", (-limit, 2 * limit)
            assert scipy.stats.kstest(np.ravel(x), *law).pvalue > 1e-3, name
            if x.ndim == 3:
                together = np.corrcoef(np.reshape(x, (3, -1))) - np.eye(3)
                assert x.shape[0] == 3 and np.abs(together).max() < 5 / x[0].size ** 0.5, name
