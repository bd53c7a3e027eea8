"""The rules of tools/style.py and of ruff: every file keeps them, and each of them can fail."""

import subprocess
import sys

import pytest

from tools import style
from tools.shared_blocks import ROOT
from tools.style import Source, read

FILES = {str(path.relative_to(ROOT)): path for path in style.checked_files()}
DOCUMENTED = '"""A file."""\n'


def texts(problems):
    return [str(problem) for problem in problems]


def found(rule, text, path="plot.py"):
    """What a rule says of a text."""
    return texts(rule(Source(path, text)))


# --- every file keeps the rules ------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES)
def test_every_file(path):
    problems = style.problems(read(FILES[path]))
    assert not problems, "\n".join(texts(problems))


def test_common_is_small():
    sources = [read(path) for path in style.checked_files()]
    assert not texts(style.common_size(sources))


def test_imports_point_one_way():
    """And nothing imports a test module."""
    problems = texts(style.one_way([read(path) for path in style.all_files()]))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff(command):
    line = [sys.executable, "-m", "ruff", *command, "--quiet", "."]
    answer = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_exceptions():
    """They fit on a screen, and each line of them exists."""
    assert len(style.EXCEPTIONS) <= 40
    for line in style.EXCEPTIONS:
        path, _, code = line.partition(": ")
        assert code in [text.strip() for text in FILES[path].read_text().splitlines()], line


# --- each rule can fail --------------------------------------------------------------------------

HINTED = 'def f(x: int, *more: int) -> int:\n    """Does it."""\n'


@pytest.mark.parametrize(
    "rule, good, bad",
    [
        (style.mean_density, "f(a, b, c, d)\n" * 9, "f(a, b, c, d)\n" + "f(a, b, c, d, e)\n" * 9),
        (style.mean_density, 'def f():\n    """One two."""', "a = [1, 2, 3, 4, 5]"),
        (style.line_density, f"a = [{'1, ' * 20}]", f"a = [b, {'1, ' * 20}]"),
        (style.line_density, f"A = dict(a=[{'1, ' * 20}])", f"A = sum([{'1, ' * 20}])"),
        (style.line_density, f"a = f'{'{x}' * 20}'", f"def f():\n    a = [{'1, ' * 20}]"),
        (style.one_idea, "a = [x for x in y]", "a = [x for x in y if x] if y else []"),
        (style.one_idea, "a = f(b)\nc = [x for x in a]", "a = {x: [y for y in x] for x in b}"),
        (style.one_idea, "for x in (y for y in z):\n    a = b if c else d",
         "f(lambda: a if b else c)"),
        (style.one_idea, "if a := b:\n    c = lambda: 0",
         "def f(x=1 if a else 2, y=lambda: 0): 0"),
        (style.walrus, "while a := f():\n    pass", "while (a := f()) is None:\n    pass"),
        (style.walrus, "if a := f():\n    pass", "b = [a := 1]"),
        (style.packing, "a, b = f()", "a, b = 1, 2"),
        (style.packing, "a = 1, 2", "(a, *b), c = [f(), g()]"),
        (style.statement_forms, "f()", "f() or g()"),
        (style.statement_forms, '"""Text."""', "f(), g()"),
        (style.statement_forms, "def f():\n    yield 1", "f() if a else g()"),
        (style.hidden_names, "import a\ndef f(b):\n    c = b", "import a\ndef f(a):\n    pass"),
        (style.hidden_names, "class A:\n    b: int\n    def c(self): 0\nb = c = 0",
         "b = 0\nclass A:\n    def c(self):\n        b = 1"),
        (style.hidden_names, "import a.b\nc = [b for b in a]", "import a.b\nc = [a for a in b]"),
        (style.hidden_names, "a = 0\ndef f():\n    global a\n    a = 1",
         "def f():\n    def f(): 0"),
        (style.hidden_names, "def f(): f.x = 0", "from a import b\nc = lambda b: b"),
        (style.docstrings, DOCUMENTED + HINTED, HINTED),
        (style.docstrings, DOCUMENTED + "def _f(): 0", DOCUMENTED + "def f(): 0"),
        (style.docstrings, DOCUMENTED + 'class A:\n    """It."""\n    def __init__(self): 0',
         DOCUMENTED + 'class A:\n    """It."""\n    def a(self): 0'),
    ],
)  # fmt: skip
def test_a_rule_can_fail(rule, good, bad):
    assert not found(rule, good)
    assert found(rule, bad)


@pytest.mark.parametrize(
    "bad",
    [
        HINTED.replace("x: int", "x"),
        HINTED.replace("*more: int", "*more"),
        HINTED.replace(" -> int", ""),
        "class A:\n" + "    def f(self, x) -> int:\n        return x\n",
    ],
)
def test_type_hints(bad):
    """In scripts and common/ alone."""
    assert not found(style.type_hints, HINTED, "common/a.py")
    assert not found(style.type_hints, bad, "plot.py")
    assert found(style.type_hints, bad, "common/a.py") and found(style.type_hints, bad, "qam.py")


def test_sizes():
    """Of a script, and of common/ without what counts apart. Docstrings and comments are free."""
    half = "a = [1, 2]\n" * (style.COMMON_TOKENS // 14)
    script = "a = [1, 2]\n" * (style.SCRIPT_TOKENS // 7)
    assert not found(style.script_size, f'"""One\ntwo."""\n{script}# three', "qam.py")
    assert not found(style.script_size, script * 2, "common/a.py")
    assert found(style.script_size, script + "a = [1, 2]", "qam.py")
    kept = [
        Source(f"common/{name}.py", half) for name in ("a", "agents", "own_data", "collect/b", "c")
    ]
    assert not texts(style.common_size(kept))
    assert texts(style.common_size([*kept, Source("common/d.py", "a = [1, 2]\n" * 2)]))


IMPORTS = {  # a tree that is right
    "common/a.py": "import numpy",
    "qam.py": "from common.a import x",
    "baselines/fql.py": "def f():\n    import common.a",
    "analysis/a.py": "from common import a",
    "plot.py": "from analysis import a",
    "benchmarks/b.py": "import plot\nimport qam",
    "tests/helpers/a.py": "from tools import t",
    "tests/test_a.py": "from tests.helpers import a\nfrom tests.helpers.a import b\nimport plot",
    "tools/t.py": "from analysis.a import x\nimport json, re",
}


@pytest.mark.parametrize("path, line, words", [
    ("common/a.py", "import qam", "common must not import qam"),
    ("common/a.py", "def f():\n    from analysis.a import x", "common must not import analysis.a"),
    ("qam.py", "from baselines import fql", "qam must not import baselines.fql"),
    ("baselines/fql.py", "from qam import x", "baselines.fql must not import qam"),
    ("analysis/a.py", "import plot", "analysis must not import plot"),
    ("analysis/a.py", "import qam", "analysis must not import qam"),
    ("qam.py", "from analysis.a import x", "qam must not import analysis.a"),
    ("plot.py", "from benchmarks import b", "benchmarks -> plot -> benchmarks"),
    ("tools/t.py", "import tests.helpers.a", "tools must not import tests.helpers.a"),
    ("tests/test_b.py", "from tests import test_a", "test_a is a test module"),
    ("tests/test_b.py", "from tests.test_a import x", "test_a is a test module"),
    ("common/b.py", "import common.c", "common.b -> common.c -> common.b"),
])  # fmt: skip
def test_imports_can_be_wrong(path, line, words):
    tree = IMPORTS | {
        "common/c.py": "from common import b",
        "common/b.py": "",
        "tests/test_b.py": "",
    }
    sources = [Source(name, text) for name, text in tree.items()]
    assert not texts(style.one_way(sources))
    wrong = [Source(name, text) for name, text in (tree | {path: line}).items()]
    assert words in "\n".join(texts(style.one_way(wrong)))


BRANCHES = "def f(x):\n" + "    if x:\n        x = g(x)\n" * 10 + "    return x\n"
LONG = "def f(x):\n" + "    x = g(x)\n" * 51 + "    return x\n"


@pytest.mark.parametrize(
    "text, rule",
    [(BRANCHES, "C901"), (LONG, "PLR0915"), ("f = lambda x: x\n", "E731"), ("import os\n", "F401")],
    ids=["branches", "length", "lambda", "import"],
)
def test_ruff_can_fail(text, rule):
    line = [sys.executable, "-m", "ruff", "check", "--stdin-filename", str(ROOT / "a.py"), "-"]
    answer = subprocess.run(line, cwd=ROOT, input=text, capture_output=True, text=True)
    assert answer.returncode == 1 and rule in answer.stdout, answer.stdout


def test_reports(monkeypatch, capsys):
    """A line per file, one more per problem; an exception silences a line."""
    source = Source("plot.py", DOCUMENTED + "a, b = 1, 2\n")
    assert style.report(source).splitlines()[1].endswith("plot.py:2: a tuple assigned to a tuple")
    monkeypatch.setattr(style, "EXCEPTIONS", {"plot.py: a, b = 1, 2": "a test"})
    assert not style.problems(source) and "0 problems" in style.report(source)
    style.main(["tools/style.py"])
    assert capsys.readouterr().out.startswith("tools/style.py")
