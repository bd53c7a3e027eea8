"""List of every `ref:` remark in the scripts, for the page on correctness.

    python -m tools.refs check     says whether the list is out of date
    python -m tools.refs write     writes it

A remark says where a paper and its official code differ, or where a script differs from both. It
is the part of a comment or of a docstring that follows `ref:`. The list has no line numbers, so
that only a changed remark makes it out of date.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tools.shared_blocks import family

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/internals/correctness.md"
BLOCK = re.compile(r"(<!-- generated: refs -->\n)(.*?)(<!-- end generated -->\n)", re.DOTALL)
MARK = "ref: "


def scripts() -> list[Path]:
    """All scripts of methods."""
    found = [*ROOT.glob("*.py"), *(ROOT / "baselines").glob("*.py")]
    return sorted(path for path in found if "ENV_DEFAULTS" in path.read_text())


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every comment; a comment that goes on in the next line is one."""
    block = []
    last = None
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, column = token.start
        alone = not token.line[:column].strip()
        if block and not (alone and last == line - 1):
            yield block[0][0], " ".join(text for _, text in block)
            block = []
        block.append((line, token.string.lstrip("# ")))
        last = line if alone else None
    if block:
        yield block[0][0], " ".join(text for _, text in block)


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of the docstring of every function and class."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.lineno, " ".join((ast.get_docstring(node) or "").split())


def remarks(path: Path) -> Iterator[tuple[str, str]]:
    """Function and text of every remark of a script."""
    source = path.read_text()
    tree = ast.parse(source)
    for line, text in sorted([*comments(source), *docstrings(tree)]):
        for remark in text.split(MARK)[1:]:
            yield function_at(tree, line), remark.strip().rstrip(".")


def function_at(tree: ast.Module, line: int) -> str:
    """Name of the top-level function or class that contains a line."""
    for node in tree.body:
        if hasattr(node, "name") and node.lineno <= line <= node.end_lineno:
            return node.name
    return ""


def table(paths: list[Path]) -> str:
    """Remarks of scripts as Markdown: text, function, scripts. The most common ones are first."""
    places = {}
    for path in paths:
        for function, remark in remarks(path):
            places.setdefault((remark, function), {})[path] = None
    lines = ["| remark | in | of |", "|---|---|---|"]
    most_common_first = sorted(places.items(), key=lambda place: -len(place[1]))
    for (remark, function), found in most_common_first:
        links = ", ".join(f"[{path.stem}](../../{path.relative_to(ROOT)})" for path in found)
        text = remark.replace("|", r"\|").replace("*", r"\*")
        lines.append(f"| {text} | `{function}` | {links} |")
    return "\n".join(lines) + "\n"


def lists() -> str:
    """The remarks of the offline and of the online scripts."""
    online = [path for path in scripts() if family(path.read_text()) == "online"]
    offline = [path for path in scripts() if path not in online]
    return f"Offline methods:\n\n{table(offline)}\nOnline methods:\n\n{table(online)}"


def written(page: str) -> str:
    """The page with the list as it has to be."""
    return BLOCK.sub(lambda match: match[1] + lists() + match[3], page)


def problems() -> list[str]:
    """What is wrong with the page, a line each."""
    page = PAGE.read_text()
    if len(BLOCK.findall(page)) != 1:
        return [f"{PAGE.relative_to(ROOT)} has no place for the list of remarks"]
    if page != written(page):
        return [f"{PAGE.relative_to(ROOT)} is out of date: python -m tools.refs write"]
    return []


def main(command: list[str]) -> None:
    """Checks or writes the page."""
    if command == ["write"]:
        PAGE.write_text(written(PAGE.read_text()))
    elif command == ["check"]:
        sys.exit("\n".join(problems()) or None)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
