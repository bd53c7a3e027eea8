"""Generated parts of the docs: where each equation is, and results beside published numbers.

    python -m tests.pages check     lists what is out of date, or a tag that equations.md lacks
    python -m tests.pages write     writes all of it again

They stand between `<!-- generated: <name> -->` and `<!-- end generated -->`. A method's page has
`equations`: the `# Eq. (n)` tags of its script, named as in docs/equations.md. README.md has
`offline` and `online`, tables of which the last two cells of each method's row are generated.
"""

import ast
import re
import sys
from pathlib import Path

import plot
from tests.shared_blocks import ROOT, named

BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)(<!-- end generated -->\n)", re.DOTALL)
ROW = re.compile(r"^(\| \[`([\w/]+)\.py`\].*\(docs/\w+\.md\) \|).*$", re.MULTILINE)  # a method's
OURS = dict(offline=("methods.csv", "success", 2), online=("plane.csv", "return", 1))


def equations(text: str) -> list[str]:
    """The numbers in every "Eq. (n)" or "Eq. (n), (m)" of a text."""
    groups = re.findall(r"Eqs?\. ((?:\([\w.]+\)(?:, )?)+)", text)
    return [number for group in groups for number in re.findall(r"\(([\w.]+)\)", group)]


def listed(script: str) -> dict[str, str]:
    """Equations of a script's section of docs/equations.md -> what they are."""
    text = (ROOT / "docs/equations.md").read_text()
    section = re.search(rf"^## {re.escape(script)}\.py\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert section, f"docs/equations.md has no section '## {script}.py'"
    return dict(re.findall(r"^\| \(([\w.]+)\) \| (.*?) \|", section[1], re.M))


def tags(script: str) -> dict[tuple[str, str], list[int]]:
    """(equation, function or class at the top level) -> lines with the tag. The header ("") counts
    where the code does not have the equation, a sentence about one never."""
    source = (ROOT / f"{script}.py").read_text()
    nodes = [node for node in ast.parse(source).body if hasattr(node, "name")]
    names = {i: node.name for node in nodes for i in range(node.lineno, node.end_lineno + 1)}
    found = {}
    for i, line in enumerate(source.splitlines(), 1):
        for number in equations(line) if "# Eq" in line or i not in names else ():
            found.setdefault((number, names.get(i, "")), []).append(i)
    coded = {number for number, name in found if name}
    return {key: lines for key, lines in found.items() if key[1] or key[0] not in coded}


def table(script: str) -> str:
    """A line per equation and function, sorted by line numbers."""
    what, lines = listed(script), [["equation", "", "function", "line"]]
    for (number, name), places in tags(script).items():
        assert number in what, f"docs/equations.md has no Eq. ({number}) of {script}.py"
        links = ", ".join(f"[{i}](../{script}.py#L{i})" for i in places)
        lines.append([f"({number})", what[number], f"`{name}`" if name else "header", links])
    return plot.markdown(lines) + "\n"


def ours(kind: str) -> dict[str, str]:
    """label -> result at the end of its runs."""
    file, metric, digits = OURS[kind]
    found = plot.organise(plot.read_results(ROOT / "benchmarks/results" / file), metric)
    rows = plot.summaries(found, plot.panels(found, plot.ALL, metric))
    show = lambda _, x, seeds: f"{plot.cell(x, digits, seeds)}, {seeds} seed" + "s" * (seeds > 1)
    return {label: show(*row[plot.ALL]) for label, row in rows.items()}


def published(kind: str) -> dict[str, str]:
    """`plain` name -> success over all 50 tasks, or HalfCheetah's return; at most 1M steps."""
    if kind == "offline":
        found = plot.read_published("success")[plot.ALL, plot.ALL].items()
        return {plot.plain(x): plot.cell(y[at <= 1_000_000][-1], 3) for x, (at, y) in found}
    rows = plot.read_rows(ROOT / "benchmarks/published/fmer_published.csv")
    rows = [row for row in rows if (row["table"], row["env"]) == ("table2", "HalfCheetah-v5")]
    whole = lambda x: int(float(x) + 0.5)
    return {plot.plain(x["method"]): f"{whole(x['mean'])} ({whole(x['std'])})" for x in rows}


def results(kind: str, text: str) -> str:
    """A table of the README, with the last two cells of its rows written anew."""
    mine, theirs = ours(kind), published(kind)

    def write(row):
        labels = [x for x in mine if x.split(" ")[0] == row[2].split("/")[-1]]
        cells = [mine[x] for x in labels], [theirs.get(plot.plain(x), "-") for x in labels]
        return row[1] + "".join(f" {'<br>'.join(texts) or '-'} |" for texts in cells)

    return ROW.sub(write, text)


def pages() -> dict[Path, tuple[str, str]]:
    """Page -> its text as it is, and as it should be."""
    found, scripts = {}, {Path(x).name: x for x in named("offline") + named("online")}
    for path in [ROOT / "README.md", *(ROOT / f"docs/{name}.md" for name in scripts)]:
        part = lambda x: table(scripts[path.stem]) if path.stem in scripts else results(x[2], x[3])
        old = path.read_text()
        found[path] = old, BLOCK.sub(lambda x: x[1] + part(x) + x[4], old)
    return found


def problems() -> list[str]:
    stale = [path.relative_to(ROOT) for path, (old, new) in pages().items() if old != new]
    return [f"{path} is out of date: python -m tests.pages write" for path in stale]


if __name__ == "__main__":
    if sys.argv[1:] == ["write"]:
        for path, (old, new) in pages().items():
            if old != new:
                path.write_text(new)
                print("wrote", path.relative_to(ROOT))
    elif sys.argv[1:] == ["check"]:
        sys.exit("\n".join(problems()) or None)
    else:
        sys.exit(__doc__)
