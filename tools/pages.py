"""Generates parts of the docs: where each equation is, tuned values, results next to published.

    python -m tools.pages check     lists what is out of date, and tags that equations.md lacks
    python -m tools.pages write     writes all of it again

Generated text stands between `<!-- generated: <name> -->` and `<!-- end generated -->`:

- a method's page has `equations`, the `# Eq. (n)` tags of its script, named as in equations.md, and
  `results`, our results next to the published ones;
- docs/methods/tuned.md has `protocol`, `domains` and `small`, the values of ENV_DEFAULTS;
- README.md has `offline` and `online`, tables whose last two cells in each row are generated.
"""

import ast
import re
import sys
from functools import cache
from pathlib import Path

from analysis.evaluations import organise, read_results
from analysis.panels import ALL, DOMAINS, panels
from analysis.published import fmer_domain, plain, read_published
from analysis.runs import read_rows
from analysis.tables import cell, markdown, summaries
from common.environments import resolve
from tools.shared_blocks import ROOT, named

BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n)(.*?)(<!-- end generated -->\n)", re.DOTALL)
ROW = re.compile(r"^(\| \[`([\w/]+)\.py`\].*\(docs/methods/\w+\.md\) \|).*$", re.MULTILINE)
METHODS = "docs/methods"
TUNED = f"{METHODS}/tuned.md"
WRITE = "python -m tools.pages write"

# family -> (file, metric, digits) of our results in the README
OURS = dict(offline=("methods.csv", "success", 2), online=("plane.csv", "return", 1))
# family -> the published results in the README
SHOWN = dict(offline=ALL, online="halfcheetah")
# family -> (file, what it is about) of our results on the pages of the methods
RESULTS = dict(
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
    offline="""Success: mean over seeds [95 % bootstrap interval]. *Ours*: small networks on data
collected here; flags and commands are in [benchmarks](../../benchmarks/offline.md). Nothing of the
papers' size has been run yet. *Published*: 12 seeds on a domain's five tasks after 1M updates; for
RLPD, which has no offline phase, after 500,000 environment steps.""",
    online="""Return. *Ours*: mean over seeds [95 % bootstrap interval]; flags and commands are in
[benchmarks](../../benchmarks/online.md). No run has a million steps yet. *Published*: Table 2 of
the FMER paper, mean (standard deviation) over five seeds of the best evaluation between 900,000
and 1M steps. In the kitchen, published numbers are shares of completed tasks, ours are counts.""",
)


# --- equations -----------------------------------------------------------------------------------


def equations(text: str) -> list[str]:
    """Returns the numbers in every "Eq. (n)" or "Eq. (n), (m)" of a text."""
    groups = re.findall(r"Eqs?\. ((?:\([\w.]+\)(?:, )?)+)", text)
    return [number for group in groups for number in re.findall(r"\(([\w.]+)\)", group)]


def listed(script: str) -> dict[str, str]:
    """Returns number -> name of the equations in a script's section of equations.md."""
    text = (ROOT / METHODS / "equations.md").read_text()
    section = re.search(rf"^## {re.escape(script)}\.py\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert section, f"docs/methods/equations.md has no section '## {script}.py'"
    return dict(re.findall(r"^\| \(([\w.]+)\) \| (.*?) \|", section[1], re.M))


def definitions(source: str) -> dict[int, str]:
    """Returns line number -> name of the top-level function or class that the line is in."""
    found = {}
    for node in ast.parse(source).body:
        if hasattr(node, "name"):
            lines = range(node.lineno, node.end_lineno + 1)
            found |= dict.fromkeys(lines, node.name)
    return found


def tags(script: str) -> dict[tuple[str, str], list[int]]:
    """Returns (equation, function or class) -> lines with its tag.

    The script's header, whose name is "", counts only for equations that the code does not have;
    a sentence inside a function that mentions an equation never counts.
    """
    source = (ROOT / f"{script}.py").read_text()
    names = definitions(source)
    found = {}
    for i, line in enumerate(source.splitlines(), 1):
        in_header = i not in names
        if "# Eq" in line or in_header:
            for number in equations(line):
                found.setdefault((number, names.get(i, "")), []).append(i)
    coded = {number for number, name in found if name}
    return {key: lines for key, lines in found.items() if key[1] or key[0] not in coded}


def equation_table(script: str) -> str:
    """Returns a table with a row per equation and function, in the order of the lines."""
    names = listed(script)
    rows = [["equation", "", "function", "line"]]
    for (number, function), lines in tags(script).items():
        assert number in names, f"docs/methods/equations.md has no Eq. ({number}) of {script}.py"
        links = ", ".join(f"[{i}](../../{script}.py#L{i})" for i in lines)
        where = f"`{function}`" if function else "header"
        rows.append([f"({number})", names[number], where, links])
    return markdown(rows) + "\n"


# --- tuned values --------------------------------------------------------------------------------


def literal(node: ast.expr):
    """Returns the value of an expression of constants, tuples, dicts and calls of `dict`."""
    code = compile(ast.Expression(node), "ENV_DEFAULTS", "eval")
    return eval(code, {"__builtins__": {}, "dict": dict})


def env_defaults(script: str) -> dict[str, dict]:
    """Returns ENV_DEFAULTS of a script: environment -> flag -> value."""
    for node in ast.parse((ROOT / f"{script}.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ENV_DEFAULTS":
            return literal(node.value)
    raise AssertionError(f"{script}.py has no ENV_DEFAULTS")


def class_defaults(script: str) -> dict[str, str]:
    """Returns flag -> default in the class Args of a script, as it is written there."""
    for node in ast.parse((ROOT / f"{script}.py").read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            return {item.target.id: ast.unparse(item.value) for item in fields if item.value}
    raise AssertionError(f"{script}.py has no class Args")


def shown(value) -> str:
    """Returns a value as the command line takes it: (64, 64) is "64 64"."""
    if isinstance(value, tuple):
        return " ".join(shown(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def flag(name: str) -> str:
    """Returns a field's flag."""
    return "--" + name.replace("_", "-")


def command_line(values: dict) -> str:
    """Returns flags and values as one would pass them."""
    words = [f"{flag(name)} {shown(value)}" for name, value in values.items()]
    return f"`{' '.join(words)}`"


def protocol_table() -> str:
    """Returns a table of the flags that a domain's protocol sets for all offline methods."""
    protocols = {}
    for domain in DOMAINS:
        known = resolve(domain)
        protocols[domain] = known.protocol | dict(tasks=known.task)
    names = list(next(iter(protocols.values())))
    rows = [["domain", *(f"`{flag(name)}`" for name in names)]]
    for domain, values in protocols.items():
        rows.append([domain, *(shown(values[name]) for name in names)])
    return markdown(rows) + "\n"


def domain_table() -> str:
    """Returns a table with a row per offline method and tuned flag, and a column per domain."""
    rows = [["script", "flag", *DOMAINS]]
    for script in named("offline"):
        defaults = class_defaults(script)
        tuned = env_defaults(script)
        names = [name for domain in DOMAINS for name in tuned.get(domain, {})]
        for name in dict.fromkeys(names):
            default = shown(ast.literal_eval(defaults[name]))
            cells = []
            for domain in DOMAINS:
                known = name in tuned.get(domain, {})
                cells.append(shown(tuned[domain][name]) if known else f"*{default}*")
            rows.append([f"`{script}.py`", f"`{flag(name)}`", *cells])
    return markdown(rows) + "\n"


def small_table() -> str:
    """Returns a table of all other environments: what their scripts share, then each script's."""
    tuned = {}  # environment -> script -> {flag: value}
    for script in named("offline") + named("online"):
        for environment, values in env_defaults(script).items():
            if environment not in DOMAINS:
                tuned.setdefault(environment, {})[script] = values
    rows = [["environment", "script", "flags"]]
    for environment, scripts in tuned.items():
        items = [set(values.items()) for values in scripts.values()]
        common = set.intersection(*items) if len(scripts) > 1 else set()
        if common:
            first = next(iter(scripts.values()))
            shared = {name: first[name] for name in first if (name, first[name]) in common}
            rows.append([environment, "all", command_line(shared)])
        for script, values in scripts.items():
            own = {name: values[name] for name in values if (name, values[name]) not in common}
            rows.append([environment, f"`{script}.py`", command_line(own)])
    return markdown(rows) + "\n"


# --- results -------------------------------------------------------------------------------------


@cache
def ours(file: str, metric: str, digits: int) -> dict[str, tuple[str, int]]:
    """Returns label -> (result at the end of its runs, in words, and the number of steps)."""
    found = organise(read_results(ROOT / "benchmarks/results" / file), metric)
    rows = summaries(found, panels(found, ALL, metric))
    results = {}
    for label, row in rows.items():
        step, numbers, seeds = row[ALL]
        word = "seed" if seeds == 1 else "seeds"
        results[label] = (f"{cell(numbers, digits, seeds)}, {seeds} {word}", step)
    return results


def published_offline() -> dict[str, dict[str, str]]:
    """Returns domain -> method -> success after at most 1M steps."""
    found = {}
    curves = read_published("success")
    for domain in [*DOMAINS, ALL]:
        dataset = domain if domain == ALL else resolve(domain).dataset
        found[domain] = {}
        for method, (steps, values) in curves[dataset, ALL].items():
            text = cell(values[steps <= 1_000_000][-1], 3)
            if plain(method) == "rlpd":
                text += ", online"
            found[domain][plain(method)] = text
    return found


def published_online() -> dict[str, dict[str, str]]:
    """Returns environment -> method -> entry of the FMER paper's Table 2."""
    found = {}
    for row in read_rows(ROOT / "benchmarks/published/fmer_published.csv"):
        if row["table"] != "table2":
            continue
        environment = fmer_domain(row["env"])
        text = f"{row['mean']} ({row['std']}) %"
        if "kitchen" not in environment:
            mean = int(float(row["mean"]) + 0.5)
            deviation = int(float(row["std"]) + 0.5)
            text = f"{mean} ({deviation})"
        found.setdefault(environment, {})[plain(row["method"])] = text
    return found


@cache
def published(kind: str) -> dict[str, dict[str, str]]:
    """Returns environment -> method, by its `plain` name -> published result."""
    return published_offline() if kind == "offline" else published_online()


def labels_of(script: str, labels) -> list[str]:
    """Returns the labels that belong to a script, as "ME-AM" or "cgql plain" do."""
    name = Path(script).name
    same = plain(name)
    return [label for label in labels if name == label.split(" ")[0] or plain(label) == same]


def result_table(script: str) -> str:
    """Returns a method's results for its own page: ours, and what was published."""
    kind = next(kind for kind in RESULTS if script in named(kind))
    file, metric, digits = OURS[kind]
    labels = labels_of(script, ours(file, metric, digits))
    unit = "updates" if "offline_steps" in class_defaults(script) else "environment steps"

    def with_variant(label, text):
        """Puts "mse: " before the result of "cgql mse", where a script has several variants."""
        return f"{label.partition(' ')[2]}: {text}" if len(labels) > 1 else text

    rows = {}  # environment -> [ours, published]
    for file, where in RESULTS[kind]:
        found = ours(file, metric, digits)
        texts = []
        for label in labels_of(script, found):
            result, steps = found[label]
            texts.append(with_variant(label, f"{result}, {steps:,} {unit}"))
        if texts:
            link = f"([{file}](../../benchmarks/results/{file}))"
            above = [rows[where][0]] if where in rows else []
            rows[where] = ["<br>".join([*above, *texts]) + f" {link}", "-"]
    for domain, theirs in published(kind).items():
        known = [label for label in labels if plain(label) in theirs]
        if known:
            where = "all 50 tasks" if domain == ALL else domain
            texts = [with_variant(label, theirs[plain(label)]) for label in known]
            rows.setdefault(where, ["-", "-"])[1] = "<br>".join(texts)
    lines = [["", "ours", "published"]]
    lines += [[where, *row] for where, row in rows.items()]
    return f"{EXPLAINED[kind]}\n\n{markdown(lines)}\n"


def readme_table(kind: str, text: str) -> str:
    """Returns a table of the README, with new text in the last two cells of each row."""
    mine = ours(*OURS[kind])
    theirs = published(kind)[SHOWN[kind]]

    def fill(row):
        labels = labels_of(row[2], mine)
        our_cell = "<br>".join(mine[label][0] for label in labels) or "-"
        their_cell = "<br>".join(theirs.get(plain(label), "-") for label in labels) or "-"
        return f"{row[1]} {our_cell} | {their_cell} |"

    return ROW.sub(fill, text)


# --- pages ---------------------------------------------------------------------------------------


def part(path: Path, block: re.Match, scripts: dict[str, str]) -> str:
    """Returns the generated text for one block of a page."""
    name = block[2]
    if name in ("equations", "results"):
        make = equation_table if name == "equations" else result_table
        return make(scripts[path.stem])
    if name in ("offline", "online"):
        return readme_table(name, block[3])
    tables = dict(protocol=protocol_table, domains=domain_table, small=small_table)
    return tables[name]()


def pages() -> dict[Path, tuple[str, str]]:
    """Returns page -> (its text as it is, and as it should be)."""
    ours.cache_clear()
    published.cache_clear()
    scripts = {Path(script).name: script for script in named("offline") + named("online")}
    paths = [ROOT / "README.md", ROOT / TUNED]
    paths += [ROOT / METHODS / f"{name}.md" for name in scripts]
    found = {}
    for path in paths:
        old = path.read_text()
        new = old
        for block in BLOCK.finditer(old):
            text = block[1] + part(path, block, scripts) + block[4]
            new = new.replace(block[0], text)
        found[path] = old, new
    return found


def problems() -> list[str]:
    """Returns a line for each page that is out of date."""
    stale = [path.relative_to(ROOT) for path, (old, new) in pages().items() if old != new]
    return [f"{path} is out of date: {WRITE}" for path in stale]


def write() -> None:
    """Writes every page that is out of date."""
    for path, (old, new) in pages().items():
        if old != new:
            path.write_text(new)
            print("wrote", path.relative_to(ROOT))


if __name__ == "__main__":
    command = sys.argv[1:]
    if command == ["write"]:
        write()
    elif command == ["check"]:
        sys.exit("\n".join(problems()) or None)
    else:
        sys.exit(__doc__)
