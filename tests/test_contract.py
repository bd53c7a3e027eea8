"""What every script promises, checked on its text and syntax tree: the same flags mean the same,
sections come in the same order, equations are tagged, nothing happens on import, files stay short.
"""

import ast
import importlib
import re
import subprocess
import sys

import pytest

from common.envs import resolve
from tests import diffs, shared_blocks

ROOT, SCRIPTS = shared_blocks.ROOT, shared_blocks.scripts()
NAMES = [str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in SCRIPTS]
PAPER_DOMAINS = (
    "antmaze-large antmaze-giant humanoidmaze-medium humanoidmaze-large scene puzzle-3x3 "
    "puzzle-4x4 cube-double cube-triple cube-quadruple"
).split()
# flags that differ between scripts on purpose: name -> why
DIFFERENT = {
    "edit_scale": "in qam_edit.py 0 means no edit policy",
    "fql_alpha": "in qam_fql.py 0 means no one-step policy",
    "inv_temp": "in cgql.py 0 is not behaviour cloning: x / t still guides",
    "online_steps": "RLPD has no offline phase: its length is the run's",
}
ORDER = "Args ENV_DEFAULTS State create update act train_chunk evaluate main".split()

each_script = pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)


def flags(path):
    """field -> (annotation, default, comment) of a script's Args."""
    source = path.read_text()
    lines = source.splitlines()
    args = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "Args")
    fields = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    return {
        node.target.id: (
            ast.unparse(node.annotation),
            ast.unparse(node.value),
            lines[node.end_lineno - 1].partition("  # ")[2],
        )
        for node in fields
    }


def equations(text):
    """The numbers in every "Eq. (n)" or "Eq. (n), (m)" of a text."""
    groups = re.findall(r"Eqs?\. ((?:\([\w.]+\)(?:, )?)+)", text)
    return {number for group in groups for number in re.findall(r"\(([\w.]+)\)", group)}


def test_shared_blocks_are_the_same():
    found = shared_blocks.problems()
    assert not found, "\n\n".join(found)


def test_shared_blocks_see_a_changed_character(monkeypatch, tmp_path):
    """The check itself fails for one changed character, and `write` repairs it."""
    source = shared_blocks.CANONICAL.read_text()
    (tmp_path / "baselines").mkdir()
    (tmp_path / "qam.py").write_text(source)
    (tmp_path / "qam_edit.py").write_text(source.replace("Trains all agents", "Trains an agent"))
    monkeypatch.setattr(shared_blocks, "ROOT", tmp_path)
    monkeypatch.setattr(shared_blocks, "CANONICAL", tmp_path / "qam.py")
    paths = [tmp_path / "qam.py", tmp_path / "qam_edit.py"]
    monkeypatch.setattr(shared_blocks, "TOP_LEVEL", paths)
    (problem,) = shared_blocks.problems()
    assert "qam_edit.py: block 'evaluate and main' differs" in problem
    assert shared_blocks.write() == ["qam_edit.py"]
    assert not shared_blocks.problems() and paths[1].read_text() == source


@pytest.mark.parametrize("module", ["tests.shared_blocks", "tests.diffs"])
def test_check_command_succeeds(module):
    """`check` ends with status 0 where there is nothing to say."""
    line = [sys.executable, "-m", module, "check"]
    answer = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (0, "")


def test_families():
    """Scripts that differ by an idea differ by no more, and the docs show the difference."""
    found = diffs.problems()
    assert not found, "\n".join(found)


def test_sizes():
    """A script has at most 480 lines, common/ 600, collect.py 250."""
    sizes = {path.name: len(path.read_text().splitlines()) for path in SCRIPTS}
    assert max(sizes.values()) <= 480, sizes
    common = {p.name: len(p.read_text().splitlines()) for p in (ROOT / "common").glob("*.py")}
    assert common.pop("collect.py") <= 250
    assert sum(common.values()) <= 600, common


def test_flags_mean_the_same_everywhere():
    """A flag has the same type, default and help in every script, unless DIFFERENT says why not."""
    seen = {}
    for path in SCRIPTS:
        for name, entry in flags(path).items():
            if name not in DIFFERENT:
                assert seen.setdefault(name, entry) == entry, f"{path.name}: --{name}"


@each_script
def test_flags_are_explained_and_typed(path):
    module = importlib.import_module(NAMES[SCRIPTS.index(path)])
    for name, (annotation, _, comment) in flags(path).items():
        assert len(comment) > 10, f"--{name} has no help"
        kind = {"int": int, "float": float, "bool": bool, "str": str}.get(annotation)
        assert kind is None or type(getattr(module.Args, name)) is kind, name


@each_script
def test_sections_come_in_order(path):
    body = ast.parse(path.read_text()).body
    targets = [getattr(n, "name", None) or ast.unparse(getattr(n, "targets", [n])[0]) for n in body]
    assert [name for name in targets if name in ORDER] == ORDER


@each_script
def test_importing_does_nothing(path):
    """Only definitions and constants at the top level; no script imports another one."""
    body = ast.parse(path.read_text()).body
    assert ast.get_docstring(ast.parse(path.read_text()))
    for node in body[1:-1]:
        kinds = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.Assign)
        assert isinstance(node, kinds), ast.unparse(node)[:80]
        if isinstance(node, ast.Assign):
            calls = [n for n in ast.walk(node) if isinstance(n, ast.Call)]
            assert all(ast.unparse(call.func) == "dict" for call in calls)
        if isinstance(node, ast.ImportFrom):
            own = {name.split(".")[-1] for name in NAMES} | {"baselines"}
            assert node.module.split(".")[0] not in own
    assert ast.unparse(body[-1]).startswith("if __name__ == '__main__':")


@each_script
def test_equations_are_tagged_and_listed(path):
    text = (ROOT / "docs/equations.md").read_text()
    name = str(path.relative_to(ROOT))
    section = re.search(rf"^## {re.escape(name)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert section, f"docs/equations.md has no section '## {name}'"
    listed = {row for row in re.findall(r"^\| \(([\w.]+)\) \|", section[1], re.M)}
    assert equations(path.read_text()) == listed


@each_script
def test_environment_defaults(path):
    """All ten domains of the paper and the embedded default; every key is a flag."""
    module = importlib.import_module(NAMES[SCRIPTS.index(path)])
    assert {*PAPER_DOMAINS, module.Args.env} <= set(module.ENV_DEFAULTS)
    for env, values in module.ENV_DEFAULTS.items():
        assert resolve(env).env == env
        assert set(values) <= set(flags(path)), env
