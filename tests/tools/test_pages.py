"""The generated parts of the docs are up to date, and what makes them stale is seen."""

import ast
import importlib
import re
import shutil

import pytest

from analysis import published
from analysis.panels import DOMAINS
from tools import pages
from tools.pages import BLOCK, ROOT, ROW, named

SCRIPTS = named("offline") + named("online")


def test_pages_are_up_to_date():
    found = pages.problems()
    assert not found, "\n".join(found)


PARTS = {"README.md": ["offline", "online"], "tuned.md": ["protocol", "domains", "small"]}


def test_every_page_has_its_parts():
    """The README's tables also have every script of their family, with both cells."""
    found = pages.pages()
    assert len(found) == len(SCRIPTS) + 2
    for path, (text, _) in found.items():
        blocks = {block[2]: block[3] for block in BLOCK.finditer(text)}
        assert list(blocks) == PARTS.get(path.name, ["equations", "results"]), path
        assert text.count("<!-- end generated -->") == len(blocks), path


@pytest.mark.parametrize("kind, without_number", [("offline", ["meam"]), ("online", [])])
def test_tables_of_the_readme(kind, without_number):
    """They have a row with both cells for every script of the family."""
    text = (ROOT / "README.md").read_text()
    blocks = {block[2]: block[3] for block in BLOCK.finditer(text)}
    rows = list(ROW.finditer(blocks[kind]))
    assert sorted(row[2] for row in rows) == sorted(named(kind))
    assert {line.count("|") for line in blocks[kind].splitlines()} == {7}
    assert [row[2] for row in rows if " - |" in row[0]] == without_number


@pytest.mark.parametrize("script", SCRIPTS)
def test_tuned_values(script):
    """The values and defaults that are read from a script's text are those of its module."""
    module = importlib.import_module(script.replace("/", "."))
    assert pages.env_defaults(script) == module.ENV_DEFAULTS
    defaults = pages.class_defaults(script)
    for environment, values in module.ENV_DEFAULTS.items():
        assert values.keys() <= defaults.keys(), environment
    assert ast.literal_eval(defaults["seed"]) == module.Args.seed


def tuned_rows():
    """The tables of tuned.md: (script, flag) -> domain -> value, and (environment, script) ->
    flags."""
    text = (ROOT / pages.TUNED).read_text()
    tables = {}
    for block in BLOCK.finditer(text):
        tables[block[2]] = [row.strip("| ").split(" | ") for row in block[3].splitlines()]
    head, _, *rows = tables["domains"]
    domains = {tuple(row[:2]): dict(zip(head[2:], row[2:], strict=True)) for row in rows}
    small = {tuple(row[:2]): row[2].strip("`") + " " for row in tables["small"][2:]}
    return domains, small


@pytest.mark.parametrize("script", SCRIPTS)
def test_tuned_page_has_every_value(script):
    domains, small = tuned_rows()
    for environment, values in pages.env_defaults(script).items():
        shared = small.get((environment, "all"), "")
        own = small.get((environment, f"`{script}.py`"), "")
        for name, value in values.items():
            flag = pages.flag(name)
            text = pages.shown(value)
            if environment in DOMAINS:
                assert domains[f"`{script}.py`", f"`{flag}`"][environment] == text
            else:
                assert f"{flag} {text} " in shared + own, (environment, name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_lines(script):
    """Every equation has a line in the table; the line has the tag, and is in the function."""
    lines = (ROOT / f"{script}.py").read_text().splitlines()
    found = pages.tags(script)
    assert {number for number, _ in found} == pages.listed(script).keys()
    for (number, name), places in found.items():
        for i in places:
            starts = [re.match(r"(?:def|class) (\w+)", line) for line in lines[:i]]
            above = [""] + [start[1] for start in starts if start]
            assert number in pages.equations(lines[i - 1])
            assert name == above[-1]
    first = [places[0] for places in found.values()]
    assert first == sorted(first)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of what the pages are made from."""
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(published, "ROOT", tmp_path)
    for name in ("docs", "baselines", "benchmarks/results", "benchmarks/published"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in [ROOT / "README.md", *ROOT.glob("*.py")]:
        shutil.copy(path, tmp_path)
    return tmp_path


@pytest.mark.parametrize("file, old, new, stale", [
    ("docs/methods/qam.md", "../qam.py#L", "../qam.py#L1", "docs/methods/qam.md"),
    ("docs/methods/equations.md", "| (RLPD1) | batch |", "| (RLPD1) | halves |",
     "docs/methods/rlpd.md"),
    ("baselines/sac.py", "\ndef critic_loss", "\n\ndef critic_loss", "docs/methods/sac.md"),
    ("baselines/sac.py", "def critic_loss", "def loss_of_critics", "docs/methods/sac.md"),
    ("baselines/sac.py", "  # Eq. (SAC7)", "  # no tag", "docs/methods/sac.md"),
    ("README.md", "| 12332 (904) |", "| 12332 (905) |", "README.md"),
    ("benchmarks/results/methods.csv", "\nmeam,1,0,15000,", "\nmeam,1,0,15000,1,0.5,",
     "README.md docs/methods/meam.md"),
    ("benchmarks/published/fmer_published.csv", "12332.38", "12352.38",
     "README.md docs/methods/fmer.md"),
    ("benchmarks/published/qam_published.csv", "all,all,FQL,mean,", "all,all,FQL,low,",
     "README.md docs/methods/fql.md"),
    ("qam.py", '"scene": dict(inv_temp=1.0)', '"scene": dict(inv_temp=2.0)',
     "docs/methods/tuned.md"),
    ("fmer.py", "total_steps=15_000", "total_steps=15_001", "docs/methods/tuned.md"),
    ("benchmarks/results/halfcheetah.csv", ",2997.4", ",3997.4", "docs/methods/td3.md"),
])  # fmt: skip
def test_what_is_stale_is_seen(copy, file, old, new, stale):
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new, 1))
    expected = [f"{page} is out of date: {pages.WRITE}" for page in stale.split()]
    assert pages.problems() == expected


def test_writing_repairs_what_is_stale(copy):
    script = copy / "baselines/sac.py"
    script.write_text(script.read_text().replace("def critic_loss", "def loss_of_critics"))
    assert pages.problems()
    for path, (_, written) in pages.pages().items():
        path.write_text(written)
    assert pages.problems() == []


def test_a_tag_without_entry_is_seen(copy):
    path = copy / "qam.py"
    path.write_text(path.read_text().replace("# Eq. (17)", "# Eq. (17), (170)"))
    with pytest.raises(AssertionError, match=r"equations.md has no Eq. \(170\) of qam.py"):
        pages.problems()
