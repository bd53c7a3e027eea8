"""Families of scripts: what has to change to make one method from another, as pages of the docs.

    python -m tools.diffs check     lists the pages that are out of date, and families grown apart
    python -m tools.diffs write     writes docs/methods/diffs/<child>.md

A page shows the changed lines without header and tuned values. A family has a budget of changed
lines, so that two scripts that differ by an idea do not come to differ by their wording.
"""

import ast
import difflib
import re
import sys
from pathlib import Path

from tools.shared_blocks import ROOT

FAMILIES = {  # (parent, child) -> most lines that may be added and removed
    ("qam", "meam"): 180,
    ("qam", "qam_edit"): 60,
    ("qam", "qam_fql"): 45,
    ("qam", "baselines/bam"): 70,
    ("qam_fql", "baselines/fql"): 120,
    ("baselines/fql", "baselines/fedit"): 75,
    ("baselines/fql", "baselines/fbrac"): 55,
    ("baselines/dac", "baselines/qsm"): 40,
    ("baselines/sac", "baselines/td3"): 130,
    ("baselines/dpmd", "baselines/qvpo"): 225,  # 15 of them are --as-published
    ("baselines/dpmd", "baselines/dipo"): 235,  # the same
}


def body(script: str) -> list[str]:
    """Returns the lines of a script without its header docstring and ENV_DEFAULTS."""
    source = (ROOT / f"{script}.py").read_text()
    lines = source.splitlines()
    nodes = ast.parse(source).body
    names = [ast.unparse(getattr(node, "targets", [node])[0]) for node in nodes]
    i = names.index("ENV_DEFAULTS")
    before = lines[nodes[0].end_lineno : nodes[i - 1].end_lineno]
    after = lines[nodes[i].end_lineno :]
    return before + after


def diff(parent: str, child: str) -> list[str]:
    """Returns the unified diff of the bodies, without its header lines and line numbers."""
    lines = difflib.unified_diff(body(parent), body(child), lineterm="", n=2)
    return [re.sub("^@@.*", "@@", line) for line in list(lines)[2:]]


def changed(lines: list[str]) -> int:
    """Counts the lines of a diff that are added or removed and not blank."""
    marked = [line[1:].strip() for line in lines if line.startswith(("+", "-"))]
    return len(list(filter(None, marked)))


def page(parent: str, child: str) -> str:
    """Returns the text of docs/methods/diffs/<child>.md."""
    lines = diff(parent, child)
    text = [
        f"# From `{parent}.py` to `{child}.py`",
        "",
        f"{changed(lines)} changed lines, not counting header and tuned values (`ENV_DEFAULTS`). "
        "Written by `python -m tools.diffs write`.",
        "",
        "```diff",
        *lines,
        "```",
        "",
    ]
    return "\n".join(text)


def path(child: str) -> Path:
    """Returns where the page of a script is."""
    return ROOT / "docs/methods/diffs" / f"{Path(child).name}.md"


def problems() -> list[str]:
    """Returns a text for every family that has grown apart, and every page that is out of date."""
    found = []
    for (parent, child), budget in FAMILIES.items():
        size = changed(diff(parent, child))
        if size > budget:
            found.append(f"{parent} -> {child}: {size} changed lines, {budget} allowed")
        target = path(child)
        if not target.exists() or target.read_text() != page(parent, child):
            found.append(f"{target.relative_to(ROOT)} is out of date: python -m tools.diffs write")
    return found


def write() -> None:
    """Writes all pages."""
    path("").parent.mkdir(exist_ok=True)
    for parent, child in FAMILIES:
        path(child).write_text(page(parent, child))
        print(f"{parent} -> {child}: {changed(diff(parent, child))} changed lines")


if __name__ == "__main__":
    if sys.argv[1:] == ["write"]:
        write()
    elif sys.argv[1:] == ["check"]:
        sys.exit("\n".join(problems()) or None)
    else:
        sys.exit(__doc__)
