"""Families of scripts: what has to change to make one method from another, as pages of the docs.

    python -m tools.diffs check     lists the pages that are out of date, and families grown apart
    python -m tools.diffs write     writes docs/methods/diffs/<child>.md

A page shows the changed lines without header and tuned values. A family has a budget of changed
lines, so that two scripts that differ by an idea do not come to differ by their wording.
"""

import ast
import difflib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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
    ("baselines/dpmd", "baselines/qvpo"): 210,
    ("baselines/dpmd", "baselines/dipo"): 215,
}


def body(script: str) -> list[str]:
    """Lines of a script without its header docstring and ENV_DEFAULTS."""
    source = (ROOT / f"{script}.py").read_text()
    lines, nodes = source.splitlines(), ast.parse(source).body
    names = [ast.unparse(getattr(node, "targets", [node])[0]) for node in nodes]
    i = names.index("ENV_DEFAULTS")
    return lines[nodes[0].end_lineno : nodes[i - 1].end_lineno] + lines[nodes[i].end_lineno :]


def diff(parent: str, child: str) -> list[str]:
    """Unified diff of the bodies, without its header lines and line numbers."""
    lines = difflib.unified_diff(body(parent), body(child), lineterm="", n=2)
    return ["@@" if line.startswith("@@") else line for line in list(lines)[2:]]


def changed(lines: list[str]) -> int:
    return sum(line[:1] in ("+", "-") and bool(line[1:].strip()) for line in lines)


def page(parent: str, child: str) -> str:
    lines = diff(parent, child)
    return "\n".join([
        f"# From `{parent}.py` to `{child}.py`", "",
        f"{changed(lines)} changed lines, beside header and tuned values (`ENV_DEFAULTS`). Written "
        "by `python -m tools.diffs write`.",
        "", "```diff", *lines, "```", "",
    ])  # fmt: skip


def path(child: str) -> Path:
    return ROOT / "docs/methods/diffs" / f"{Path(child).name}.md"


def problems() -> list[str]:
    found = []
    for (parent, child), budget in FAMILIES.items():
        size = changed(diff(parent, child))
        if size > budget:
            found.append(f"{parent} -> {child}: {size} changed lines, {budget} allowed")
        target = path(child)
        if not target.exists() or target.read_text() != page(parent, child):
            found.append(f"{target.relative_to(ROOT)} is out of date: python -m tools.diffs write")
    return found


if __name__ == "__main__":
    if sys.argv[1:] == ["write"]:
        path("").parent.mkdir(exist_ok=True)
        for parent, child in FAMILIES:
            path(child).write_text(page(parent, child))
            print(f"{parent} -> {child}: {changed(diff(parent, child))} changed lines")
    elif sys.argv[1:] == ["check"]:
        sys.exit("\n".join(problems()) or None)
    else:
        sys.exit(__doc__)
