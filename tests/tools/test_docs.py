"""What the documents say exists: links and anchors, result files, and commands with their flags."""

import importlib
import re
import shlex
import sys

import pytest
import tyro
from matplotlib.mathtext import MathTextParser

from common.errors import UserError
from common.flags import parse
from tools.shared_blocks import ROOT

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
PAGES += sorted((ROOT / "benchmarks").rglob("*.md"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
OWN = ("--help", "-h")  # flags of the command line itself
PARSER = MathTextParser("path")
each_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def anchors(path):
    """GitHub's names of a page's headings, or of a script's lines."""
    if path.suffix == ".py":
        return {f"L{i}" for i, _ in enumerate(path.read_text().splitlines(), 1)}
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    plain = [re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", x)) for x in headings]
    return {x.strip().lower().replace(" ", "-") for x in plain}


@each_page
def test_links(page):
    text = page.read_text()
    pictures = re.findall(r'<img src="([^"]+)"', text)
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + pictures:
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def formulas(text):
    """The LaTeX between dollars, outside of code."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    text = re.sub(r"^\n(?: {4}.*\n)+|`[^`\n]*`", "", text, flags=re.M)
    return [x[0] or x[1] for x in re.findall(r"\$\$(.+?)\$\$|\$([^$]+?)\$", text, re.S)]


@each_page
def test_formulas(page):
    """Every formula can be parsed, and has nothing that GitHub would take for Markdown: a bar
    (of a table), a star, a backslash before punctuation, or an underscore that begins emphasis."""
    for formula in formulas(page.read_text()):
        assert not re.search(r"[|*]|\\[^A-Za-z]", formula), formula
        assert not re.search(r"(?<![A-Za-z0-9 ])_|(?<! )_(?![A-Za-z0-9])", formula), formula
        PARSER.parse(f"${' '.join(formula.split())}$")


def test_formulas_are_found():
    assert len(formulas((ROOT / "docs/methods/equations.md").read_text())) > 300
    assert formulas("`$a$` costs $x _i$,\n\n    $ code\n\nand $$y$$.") == ["x _i", "y"]


@each_page
def test_result_files(page):
    """Named files of benchmarks/results exist."""
    place = r"(?:(?<!/)|(?<=benchmarks/))results/"
    for name in re.findall(place + r"([\w.-]+\.(?:csv|json))", page.read_text()):
        assert (ROOT / "benchmarks/results" / name).exists(), name


def test_pages_that_code_names():
    """A comment, docstring or message that names a page of the docs names one that exists."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("*/*/*.py")]:
        for name in re.findall(r"docs/[\w/-]+\.md", path.read_text()):
            assert (ROOT / name).exists(), f"{path.relative_to(ROOT)}: {name}"


def test_every_result_file_is_explained():
    """It or the file of rows that it lies beside is named."""
    text = "".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"(?<![\w.-])([\w-]+)\.(?:csv|json)", text))
    for path in sorted((ROOT / "benchmarks/results").iterdir()):
        assert path.stem in named, path.name


@pytest.fixture(autouse=True)
def own_data(monkeypatch):
    """Datasets of Minari that a command names need not be here."""
    monkeypatch.setattr("common.own_data.recorded_in", lambda name: dict(env="Ant-v5"))


def commands(page):
    """Lines of code blocks that begin with python, as words, without comments; continued lines in
    one; of chained commands each."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in fenced for line in block.splitlines()]
    lines += re.findall(r"^ {4}(\S.*)$", text, re.M)
    for line in lines:
        for part in line.split(" && "):
            if part.startswith("python "):
                yield shlex.split(re.split(r"\s{2,}|\s#", part.strip())[0])


def resolved(words):
    """(module, flags) of a command, or None where it is not ours."""
    if words[1] == "-m":
        return words[2], words[3:]
    return words[1].removesuffix(".py").replace("/", "."), words[2:]


@each_page
def test_commands(page):
    """The module exists, and its command line takes the flags and their values."""
    for words in commands(page):
        name, flags = resolved(words)
        if name in ("pytest", "venv", "collect", "act"):  # the last two are a reader's own
            continue
        module, flags = importlib.import_module(name), [x for x in flags if x not in OWN]
        if hasattr(module, "Args"):
            hook = sys.excepthook
            parse(module.Args, module.ENV_DEFAULTS, flags)
            sys.excepthook = hook
        elif hasattr(module, "Options"):
            tyro.cli(module.Options, args=flags)


def test_commands_are_found():
    """The search finds the README's own commands, and those of every script's page."""
    found = [" ".join(words) for words in commands(ROOT / "README.md")]
    assert "python meam.py" in found and "python meam.py --env puzzle-4x4 --rho 0.5" in found
    for path in (ROOT / "docs/methods").glob("*.md"):
        module = path.stem if (ROOT / f"{path.stem}.py").exists() else f"baselines.{path.stem}"
        if (ROOT / f"{module.replace('.', '/')}.py").exists():
            assert module in [resolved(words)[0] for words in commands(path)], path.name


@pytest.mark.parametrize("check, text", [
    (test_links, "[a](nothing.md)"),
    (test_links, "# Here\n[a](#there)"),
    (test_links, f"[a]({ROOT}/qam.py#L9999)"),
    (test_links, '<img src="nothing.png" width="9">'),
    (test_formulas, "the field $f_\\theta$"),
    (test_formulas, "| $\\pi(a | s)$ |"),
    (test_formulas, "$\\frac{1}{2$"),
    (test_formulas, "$\\nocommand$"),
    (test_result_files, "`results/nothing.csv`"),
    (test_result_files, "`benchmarks/results/nothing.json`"),
    (test_commands, "    python qam.py --no-such-flag 3   a comment"),
    (test_commands, "```bash\npython -m baselines.sac --num-seeds five\n```"),
    (test_commands, "    python -m baselines.dpmd --warmup-steps 30000"),
    (test_commands, "    python -m benchmarks.learning --suites plane"),
    (test_commands, "    python -m benchmarks.nothing"),
])  # fmt: skip
def test_what_is_wrong_is_seen(tmp_path, check, text):
    page = tmp_path / "page.md"
    page.write_text(text + "\n")
    with pytest.raises((SystemExit, UserError, AssertionError, ImportError, ValueError)):
        check(page)
