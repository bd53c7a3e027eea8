"""Generated parts of the docs: where each equation is, and results beside published numbers.

    python -m tools.pages check     lists what is out of date, or a tag that equations.md lacks
    python -m tools.pages write     writes all of it again

They stand between `<!-- generated: <name> -->` and `<!-- end generated -->`. A method's page has
`equations`: the `# Eq. (n)` tags of its script, named as in docs/equations.md, and `results`: ours
beside the published ones. README.md has `offline` and `online`, tables of which the last two cells
of each method's row are generated.
"""

import ast
import re
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import plot
from common.envs import resolve
from tools.shared_blocks import ROOT, named

BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)(<!-- end generated -->\n)", re.DOTALL)
ROW = re.compile(r"^(\| \[`([\w/]+)\.py`\].*\(docs/\w+\.md\) \|).*$", re.MULTILINE)  # a method's
OURS = dict(offline=("methods.csv", "success", 2), online=("plane.csv", "return", 1))
SHOWN = dict(offline=plot.ALL, online="halfcheetah")  # of what is published, in the README
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
    owners = {}  # line -> function or class
    for node in ast.parse(source).body:
        if hasattr(node, "name"):
            lines = range(node.lineno, node.end_lineno + 1)
            owners.update(dict.fromkeys(lines, node.name))
    found = {}
    for i, line in enumerate(source.splitlines(), 1):
        if "# Eq" in line or i not in owners:
            for number in equations(line):
                key = (number, owners.get(i, ""))
                found.setdefault(key, []).append(i)
    coded = {number for number, name in found if name}
    return {key: lines for key, lines in found.items() if key[1] or key[0] not in coded}


def table(script: str) -> str:
    """Returns a line per equation and function, sorted by line numbers."""
    what = listed(script)
    lines = [["equation", "", "function", "line"]]
    for (number, name), places in tags(script).items():
        assert number in what, f"docs/equations.md has no Eq. ({number}) of {script}.py"
        links = ", ".join(f"[{i}](../{script}.py#L{i})" for i in places)
        function = f"`{name}`" if name else "header"
        lines.append([f"({number})", what[number], function, links])
    return plot.markdown(lines) + "\n"


@cache
def ours(file: str, metric: str, digits: int) -> dict[str, tuple[str, int]]:
    """label -> result at the end of its runs, in words; and the end's step."""
    rows = plot.read_results(ROOT / "benchmarks/results" / file)
    organised = plot.organise(rows, metric)
    summaries = plot.summaries(organised, plot.panels(organised, plot.ALL, metric))
    found = {}
    for label, row in summaries.items():
        step, values, seeds = row[plot.ALL]
        noun = "seed" if seeds == 1 else "seeds"
        found[label] = (f"{plot.cell(values, digits, seeds)}, {seeds} {noun}", step)
    return found


def offline_published() -> dict[str, dict[str, str]]:
    """Domain -> `plain` name -> success after at most 1M steps."""
    theirs = plot.read_published("success")
    found = {}
    for domain in [*plot.DOMAINS, plot.ALL]:
        dataset = domain if domain == plot.ALL else resolve(domain).dataset
        found[domain] = {}
        for method, (steps, values) in theirs[dataset, plot.ALL].items():
            last = values[steps <= 1_000_000][-1]
            found[domain][plot.plain(method)] = plot.cell(last, 3)
    return found


def online_published() -> dict[str, dict[str, str]]:
    """Environment -> `plain` name -> mean (deviation), of FMER's table 2."""
    found = {}
    for row in plot.read_rows(ROOT / "benchmarks/published/fmer_published.csv"):
        if row["table"] == "table2":
            env = row["env"].lower().removesuffix("-v5").replace("-n", "-")
            if "kitchen" in env:
                text = f"{row['mean']} ({row['std']}) %"
            else:
                mean = int(float(row["mean"]) + 0.5)
                deviation = int(float(row["std"]) + 0.5)
                text = f"{mean} ({deviation})"
            found.setdefault(env, {})[plot.plain(row["method"])] = text
    return found


@cache
def published(kind: str) -> dict[str, dict[str, str]]:
    """Domain -> `plain` name -> the published number of a family's methods, in words."""
    return offline_published() if kind == "offline" else online_published()


def labels_of(script: str, labels: Iterable[str]) -> list[str]:
    """Returns those of a script, as in "ME-AM" or "cgql plain"."""
    name = Path(script).name
    plain = plot.plain(name)
    return [x for x in labels if name == x.split(" ")[0] or plot.plain(x) == plain]


def variant(label: str, labels: list[str]) -> str:
    """Returns what tells a label from the script's others, as in "plain: "; "" for one alone."""
    if len(labels) == 1:
        return ""
    return label.partition(" ")[2] + ": "


def own_results(script: str, kind: str, labels: list[str]) -> dict[str, str]:
    """Where a method was run -> its results there, with links to their files."""
    found = {}
    for file, where in RESULTS[kind]:
        results_there = ours(file, *OURS[kind][1:])
        texts = []
        for label in labels_of(script, results_there):
            result, step = results_there[label]
            texts.append(f"{variant(label, labels)}{result}, {step:,} steps")
        if texts:
            texts[-1] += f" ([{file}](../benchmarks/results/{file}))"
            above = [found[where]] if where in found else []
            found[where] = "<br>".join(above + texts)
    return found


def beside(script: str) -> str:
    """A method's results on its own page: ours, and what was published."""
    kind = "offline" if script in named("offline") else "online"
    labels = labels_of(script, ours(*OURS[kind]))
    mine = own_results(script, kind, labels)
    rows = {where: [text, "-"] for where, text in mine.items()}  # domain -> [ours, published]
    for domain, theirs in published(kind).items():
        known = [label for label in labels if plot.plain(label) in theirs]
        texts = [variant(label, labels) + theirs[plot.plain(label)] for label in known]
        if texts:
            where = "all 50 tasks" if domain == plot.ALL else domain
            rows.setdefault(where, ["-", "-"])[1] = "<br>".join(texts)
    lines = [["", "ours", "published"]]
    lines.extend([where, *row] for where, row in rows.items())
    return f"{EXPLAINED[kind]}\n\n{plot.markdown(lines)}\n"


def results(kind: str, text: str) -> str:
    """Returns a table of the README, with the last two cells of its rows written again."""
    mine = ours(*OURS[kind])
    theirs = published(kind)[SHOWN[kind]]

    def cells(row: re.Match) -> str:
        labels = labels_of(row[2], mine)
        first = "<br>".join(mine[label][0] for label in labels)
        second = "<br>".join(theirs.get(plot.plain(label), "-") for label in labels)
        return f"{row[1]} {first or '-'} | {second or '-'} |"

    return ROW.sub(cells, text)


def generated(script: str | None, name: str, old: str) -> str:
    """Returns the text of a generated block: of a method's page, or (no script) of the README."""
    if script is None:
        return results(name, old)
    return table(script) if name == "equations" else beside(script)


def pages() -> dict[Path, tuple[str, str]]:
    """Page -> its text as it is, and as it should be."""
    ours.cache_clear()
    published.cache_clear()
    methods = {Path(script).name: script for script in named("offline") + named("online")}
    found = {}
    for page in [ROOT / "README.md", *(ROOT / f"docs/{name}.md" for name in methods)]:
        script = methods.get(page.stem)

        def rewrite(block: re.Match, script: str | None = script) -> str:
            return block[1] + generated(script, block[2], block[3]) + block[4]

        text = page.read_text()
        found[page] = (text, BLOCK.sub(rewrite, text))
    return found


def stale() -> dict[Path, str]:
    """Page that is out of date -> the text that it should have."""
    return {page: new for page, (old, new) in pages().items() if old != new}


def problems() -> list[str]:
    """Returns a text for every page that is out of date."""
    names = [page.relative_to(ROOT) for page in stale()]
    return [f"{name} is out of date: python -m tools.pages write" for name in names]


def write() -> None:
    """Writes the pages that are out of date."""
    for page, text in stale().items():
        page.write_text(text)
        print("wrote", page.relative_to(ROOT))


if __name__ == "__main__":
    if sys.argv[1:] == ["write"]:
        write()
    elif sys.argv[1:] == ["check"]:
        sys.exit("\n".join(problems()) or None)
    else:
        sys.exit(__doc__)
