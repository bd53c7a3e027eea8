"""The generated parts of the docs are up to date, and what makes them stale is seen."""

import re
import shutil

import pytest

from analysis import published
from tests import pages
from tests.pages import BLOCK, ROOT, ROW, named

SCRIPTS = named("offline") + named("online")


def test_pages_are_up_to_date():
    found = pages.problems()
    assert not found, "\n".join(found)


def test_every_page_has_its_parts():
    """And the README's tables every script, in its family's; each has both cells."""
    for path, (text, _) in pages.pages().items():
        blocks = {x[2]: x[3] for x in BLOCK.finditer(text)}
        kinds = ["offline", "online"], ["equations", "results"]
        expected = kinds[path.name != "README.md"]
        assert [*blocks] == expected and text.count("<!-- end generated -->") == len(blocks), path
        for kind in blocks.keys() & {"offline", "online"}:
            assert sorted(row[2] for row in ROW.finditer(blocks[kind])) == sorted(named(kind))
            assert {line.count("|") for line in blocks[kind].splitlines()} == {7}, kind
            empty = [row[2] for row in ROW.finditer(blocks[kind]) if " - |" in row[0]]
            assert empty == ["meam"] * (kind == "offline")
    assert len(pages.pages()) == len(SCRIPTS) + 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_lines(script):
    """Every equation has a line in the table; it has the tag, and is in the function."""
    lines, found = (ROOT / f"{script}.py").read_text().splitlines(), pages.tags(script)
    assert {number for number, _ in found} == pages.listed(script).keys()
    for (number, name), places in found.items():
        for i in places:
            above = [x[1] for y in lines[:i] if (x := re.match(r"(?:def|class) (\w+)", y))]
            assert number in pages.equations(lines[i - 1]) and [name] == (above or [""])[-1:]
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
    ("docs/qam.md", "../qam.py#L", "../qam.py#L1", "docs/qam.md"),
    ("docs/equations.md", "| (RLPD1) | batch |", "| (RLPD1) | halves |", "docs/rlpd.md"),
    ("baselines/sac.py", "\ndef critic_loss", "\n\ndef critic_loss", "docs/sac.md"),
    ("baselines/sac.py", "def critic_loss", "def loss_of_critics", "docs/sac.md"),
    ("baselines/sac.py", "  # Eq. (SAC7)", "  # no tag", "docs/sac.md"),
    ("README.md", "| 12332 (904) |", "| 12332 (905) |", "README.md"),
    ("benchmarks/results/methods.csv", "\nmeam,1,0,15000,", "\nmeam,1,0,15000,1,0.5,",
     "README.md docs/meam.md"),
    ("benchmarks/published/fmer_published.csv", "12332.38", "12352.38",
     "README.md docs/fmer.md"),
    ("benchmarks/published/qam_published.csv", "all,all,FQL,mean,", "all,all,FQL,low,",
     "README.md docs/fql.md"),
    ("benchmarks/results/halfcheetah.csv", ",2997.4", ",3997.4", "docs/td3.md"),
])  # fmt: skip
def test_what_is_stale_is_seen(copy, file, old, new, stale):
    """By one change; writing repairs it."""
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new, 1))
    expected = [f"{page} is out of date: python -m tests.pages write" for page in stale.split()]
    assert pages.problems() == expected
    for path, (_, written) in pages.pages().items():
        path.write_text(written)
    assert pages.problems() == []


def test_a_tag_without_entry_is_seen(copy):
    path = copy / "qam.py"
    path.write_text(path.read_text().replace("# Eq. (17)", "# Eq. (17), (170)"))
    with pytest.raises(AssertionError, match=r"equations.md has no Eq. \(170\) of qam.py"):
        pages.problems()
