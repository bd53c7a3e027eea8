"""The page on correctness lists every `ref:` remark of the scripts."""

import re

import pytest

from tools import refs
from tools.shared_blocks import named

SCRIPT = '''"""Header, which follows the code (`# ref:`)."""

ENV_DEFAULTS = {}


def policy(x):
    """The policy. ref: noisy in
    evaluations, too."""
    y = x + 1  # Eq. (3); ref: no factor
    # It is clipped. ref: the paper
    # does not say so.
    # ref: *twice* | once
    return y  # a comment


class Network:
    # ref: no layer norm
    width = 3
'''


def test_page_is_up_to_date():
    assert refs.problems() == []


def test_each_family_has_its_list():
    """PPO's remark is in the second list, QAM's and RLPD's are in the first."""
    offline, online = refs.lists().split("Online methods:")
    for kind, part, other in (("offline", offline, online), ("online", online, offline)):
        for script in named(kind):
            assert f"({script}.py)" not in other.replace("../", "")
        assert any(f"({script}.py)" in part.replace("../", "") for script in named(kind))


def test_every_mark_of_a_script_is_found():
    """As many as a search in the text finds, except in the headers, which explain the mark."""
    for path in refs.scripts():
        body = path.read_text().split('"""', 2)[2]
        assert len(list(refs.remarks(path))) == len(re.findall(r"ref:\s", body)), path.name


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """One script and a page that has the place for the list."""
    monkeypatch.setattr(refs, "ROOT", tmp_path)
    monkeypatch.setattr(refs, "PAGE", tmp_path / "page.md")
    (tmp_path / "method.py").write_text(SCRIPT)
    refs.PAGE.write_text("# A\n<!-- generated: refs -->\n<!-- end generated -->\nB\n")
    return tmp_path


def test_remarks_in_comments_and_docstrings(repository):
    assert list(refs.remarks(repository / "method.py")) == [
        ("policy", "noisy in evaluations, too"),
        ("policy", "no factor"),
        ("policy", "the paper does not say so"),
        ("policy", "*twice* | once"),
        ("Network", "no layer norm"),
    ]


def test_a_changed_remark_makes_the_page_out_of_date(repository):
    assert refs.problems()
    refs.main(["write"])
    assert refs.problems() == []
    page = refs.PAGE.read_text()
    assert page.startswith("# A\n") and page.endswith("\nB\n")
    assert r"| \*twice\* \| once | `policy` | [method](../../method.py) |" in page

    (repository / "method.py").write_text("\n" + SCRIPT)  # Other lines are the same remarks.
    assert refs.problems() == []
    (repository / "method.py").write_text(SCRIPT.replace("no factor", "a factor"))
    with pytest.raises(SystemExit, match="out of date: python -m tools.refs write"):
        refs.main(["check"])


def test_a_page_without_a_place_is_seen(repository):
    refs.PAGE.write_text("# A\n")
    with pytest.raises(SystemExit, match="no place"):
        refs.main(["check"])
