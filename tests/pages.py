"""Generated parts of the docs: where each equation is, and results beside published numbers.

    python -m tests.pages check     lists what is out of date, or a tag that equations.md lacks
    python -m tests.pages write     writes all of it again

They stand between `<!-- generated: <name> -->` and `<!-- end generated -->`. A method's page has
`equations`: the `# Eq. (n)` tags of its script, named as in docs/equations.md, and `results`: ours
beside the published ones. README.md has `offline` and `online`, tables of which the last two cells
of each method's row are generated.
"""

import ast
import re
import sys
from functools import cache
from pathlib import Path

from analysis.evaluations import organise, read_results
from analysis.panels import ALL, DOMAINS, panels
from analysis.published import plain, read_published
from analysis.runs import read_rows
from analysis.tables import cell, markdown, summaries
from common.envs import resolve
from tests.shared_blocks import ROOT, named

BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)(<!-- end generated -->\n)", re.DOTALL)
ROW = re.compile(r"^(\| \[`([\w/]+)\.py`\].*\(docs/\w+\.md\) \|).*$", re.MULTILINE)  # a method's
OURS = dict(offline=("methods.csv", "success", 2), online=("plane.csv", "return", 1))
SHOWN = dict(offline=ALL, online="halfcheetah")  # of what is published, in the README
RESULTS = dict(  # (file, what it is about)
    offline=[
        ("methods.csv", "pointmaze-medium, task 1"),
        ("cube-task-1.csv", "cube-single, task 1"),
        ("cube-methods.csv", "cube-single, task 1"),
        ("cube.csv", "cube-single, tasks 1 to 5"),
    ],
    online=[
        ("plane.csv", "multigoal"),
        ("hopper.csv", "hopper"),
        ("halfcheetah.csv", "halfcheetah"),
        ("halfcheetah-300k.csv", "halfcheetah"),
        ("kitchen.csv", "kitchen-7"),
    ],
)
EXPLAINED = dict(
    offline="""Success, mean over seeds [95 % bootstrap interval]. *Ours*: small networks, data
collected here; flags and commands in [benchmarks](../benchmarks/README.md). Nothing of the paper's
size has been run yet. *Published*: 12 seeds of a domain's five tasks after 1M updates (RLPD, which
has no offline phase: after 500,000 environment steps).""",
    online="""Return. *Ours*: mean over seeds [95 % bootstrap interval]; flags and commands in
[benchmarks](../benchmarks/README.md). No run has a million steps yet. *Published*: table 2 of
FMER's paper, mean (deviation) of five seeds, of each the best evaluation from 900,000 of 1M steps
on; in the kitchen the share of completed tasks (of ours: their number).""",
)


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
    return markdown(lines) + "\n"


@cache
def ours(file: str, metric: str, digits: int) -> dict[str, tuple[str, int]]:
    """label -> result at the end of its runs, in words; and the end's step."""
    found = organise(read_results(ROOT / "benchmarks/results" / file), metric)
    rows = summaries(found, panels(found, ALL, metric))
    show = lambda x, seeds: f"{cell(x, digits, seeds)}, {seeds} seed" + "s" * (seeds > 1)
    ends = {label: row[ALL] for label, row in rows.items()}
    return {label: (show(x, seeds), step) for label, (step, x, seeds) in ends.items()}


@cache
def published(kind: str) -> dict[str, dict[str, str]]:
    """Domain -> `plain` name -> success after at most 1M steps, or FMER's table 2."""
    found = {}
    if kind == "offline":
        theirs = read_published("success")
        for domain in [*DOMAINS, ALL]:
            own = theirs[domain if domain == ALL else resolve(domain).dataset, ALL]
            ends = {x: y[at <= 1_000_000][-1] for x, (at, y) in own.items()}
            found[domain] = {plain(x): cell(y, 3) for x, y in ends.items()}
        return found
    rows = read_rows(ROOT / "benchmarks/published/fmer_published.csv")
    for row in (row for row in rows if row["table"] == "table2"):
        domain = row["env"].lower().removesuffix("-v5").replace("-n", "-")
        numbers = row["mean"], row["std"]
        if "kitchen" not in domain:
            numbers = (int(float(x) + 0.5) for x in numbers)
        text = "{} ({})".format(*numbers) + " %" * ("kitchen" in domain)
        found.setdefault(domain, {})[plain(row["method"])] = text
    return found


def labels_of(script: str, labels) -> list[str]:
    """Those of a script, as in "ME-AM" or "cgql plain"."""
    name = Path(script).name
    return [x for x in labels if name == x.split(" ")[0] or plain(x) == plain(name)]


def beside(script: str) -> str:
    """A method's results on its own page: ours, and what was published."""
    kind = next(kind for kind in RESULTS if script in named(kind))
    labels = labels_of(script, ours(*OURS[kind]))
    variant = lambda x: x.partition(" ")[2] + ": " if len(labels) > 1 else ""
    rows = {}  # domain -> [ours, published]
    for file, where in RESULTS[kind]:
        found = ours(file, *OURS[kind][1:])
        texts = ["{}{}, {:,} steps".format(variant(x), *found[x]) for x in labels_of(script, found)]
        if texts:
            link = f"([{file}](../benchmarks/results/{file}))"
            above = [rows[where][0]] if where in rows else []
            rows[where] = ["<br>".join([*above, *texts]) + f" {link}", "-"]
    for domain, theirs in published(kind).items():
        known = [x for x in labels if plain(x) in theirs]
        if texts := [variant(x) + theirs[plain(x)] for x in known]:
            where = "all 50 tasks" if domain == ALL else domain
            rows.setdefault(where, ["-", "-"])[1] = "<br>".join(texts)
    lines = [["", "ours", "published"], *([where, *row] for where, row in rows.items())]
    return f"{EXPLAINED[kind]}\n\n{markdown(lines)}\n"


def results(kind: str, text: str) -> str:
    """A table of the README, with the last two cells of its rows written anew."""
    mine, theirs = ours(*OURS[kind]), published(kind)[SHOWN[kind]]

    def write(row):
        labels = labels_of(row[2], mine)
        cells = [mine[x][0] for x in labels], [theirs.get(plain(x), "-") for x in labels]
        return row[1] + "".join(f" {'<br>'.join(texts) or '-'} |" for texts in cells)

    return ROW.sub(write, text)


def pages() -> dict[Path, tuple[str, str]]:
    """Page -> its text as it is, and as it should be."""
    ours.cache_clear(), published.cache_clear()
    found, scripts = {}, {Path(x).name: x for x in named("offline") + named("online")}
    for path in [ROOT / "README.md", *(ROOT / f"docs/{name}.md" for name in scripts)]:
        own = scripts.get(path.stem)
        make = dict(equations=table, results=beside)
        part = lambda x: make[x[2]](own) if own else results(x[2], x[3])
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
