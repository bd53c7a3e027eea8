"""The rules that the files of this repository keep, so that a reader can trust their form.

    python -m tools.style                  reports on scripts, common/, analysis/ and tools/
    python -m tools.style meam.py common   the same for these files and folders

A rule is a function from a `Source` to its `Problem`s; RULES lists them. docs/internals/design.md
says why they are there. The tests run the same functions (tests/tools/test_style.py), and ruff adds
the limits of a function's complexity and length (pyproject.toml).
"""

import ast
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tools.shared_blocks import ROOT, scripts

MEAN_TOKENS = 11.0  # per line of code, at most
LINE_TOKENS = 30  # in any line except those of data tables, at most
SCRIPT_TOKENS = 4_950  # with the flags for own environments and data
COMMON_TOKENS = 20_000  # of common/ as a whole, without what is imported only where it is asked for
APART = ("common/collect", "common/own_data.py", "common/agents.py")  # beginnings of these paths

# "file: line of code" -> the reason why this line may break a rule. At most a screen of them.
EXCEPTIONS: dict[str, str] = {}

BLANK = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.COMMENT,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DENSE = (*COMPREHENSIONS, ast.IfExp, ast.NamedExpr, ast.Lambda)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
SCOPES = (*FUNCTIONS, ast.Lambda, *COMPREHENSIONS)
SEQUENCES = (ast.Tuple, ast.List)
LITERALS = (ast.Constant, ast.UnaryOp, ast.unaryop, ast.expr_context, ast.keyword)
DATA = (*LITERALS, *SEQUENCES, ast.Dict, ast.Set)
DATA_CALLS = ("dict", "np.array", "np.float32")


@dataclass(frozen=True)
class Problem:
    """A line that breaks a rule."""

    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


@dataclass(frozen=True)
class Source:
    """A file's text under its path in the repository, such as common/run.py."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text)

    @cached_property
    def tokens(self) -> Counter[int]:
        """Line number -> number of tokens, of lines with code. Docstrings do not count."""
        return count_tokens(self.text)

    @property
    def mean(self) -> float:
        """Tokens per line of code."""
        return self.tokens.total() / max(1, len(self.tokens))

    def problem(self, line: int, text: str) -> Problem:
        """What is wrong with a line of this file."""
        return Problem(self.path, line, text)

    def excused(self, problem: Problem) -> bool:
        """Whether EXCEPTIONS lists the problem's line."""
        line = self.text.splitlines()[problem.line - 1]
        return f"{self.path}: {line.strip()}" in EXCEPTIONS


Rule = Callable[[Source], Iterator[Problem]]


# --- density -------------------------------------------------------------------------------------


def count_tokens(text: str) -> Counter[int]:
    """Counts the tokens of each line; a string is one token, on whichever line it begins."""
    found: Counter[int] = Counter()
    opened = 0  # f-strings, which are several tokens since Python 3.12
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        inside = opened > 0
        if name == "FSTRING_START":
            opened += 1
        elif name == "FSTRING_END":
            opened -= 1
        documentation = name == "STRING" and token.string.startswith(('"""', 'r"""'))
        if not inside and not documentation and token.type not in BLANK:
            found[token.start[0]] += 1
    return found


def is_data(node: ast.AST) -> bool:
    """Whether an expression is made of literals alone, and of DATA_CALLS with literals in them."""
    parts = ast.iter_child_nodes(node)
    if isinstance(node, ast.Call):
        if ast.unparse(node.func) not in DATA_CALLS:
            return False
        parts = [*node.args, *node.keywords]
    elif not isinstance(node, DATA):
        return False
    return all(map(is_data, parts))


def table_lines(tree: ast.Module) -> set[int]:
    """Returns the lines of module-level assignments of literals, such as ENV_DEFAULTS."""
    found: set[int] = set()
    for node in tree.body:
        value = getattr(node, "value", None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and value and is_data(value):
            found.update(range(node.lineno, node.end_lineno + 1))
    return found


def mean_density(source: Source) -> Iterator[Problem]:
    """A file has at most MEAN_TOKENS tokens per line of code in the mean."""
    if source.mean > MEAN_TOKENS:
        yield source.problem(1, f"{source.mean:.1f} tokens per line, at most {MEAN_TOKENS}")


def line_density(source: Source) -> Iterator[Problem]:
    """A line has at most LINE_TOKENS tokens, except in a data table."""
    tables = table_lines(source.tree)
    for line, count in source.tokens.items():
        if count > LINE_TOKENS and line not in tables:
            yield source.problem(line, f"{count} tokens in a line, at most {LINE_TOKENS}")


def script_size(source: Source) -> Iterator[Problem]:
    """A method's script has at most SCRIPT_TOKENS tokens."""
    total = source.tokens.total()
    if is_script(source.path) and total > SCRIPT_TOKENS:
        yield source.problem(1, f"{total} tokens in a script, at most {SCRIPT_TOKENS}")


def common_size(sources: list[Source]) -> Iterator[Problem]:
    """common/ without the parts in APART has at most COMMON_TOKENS tokens."""
    own = [x for x in sources if x.path.startswith("common/")]
    kept = [x for x in own if not x.path.startswith(APART)]
    total = sum(source.tokens.total() for source in kept)
    if total > COMMON_TOKENS:
        yield Problem("common", 1, f"{total} tokens in all, at most {COMMON_TOKENS}")


# --- one idea per line ---------------------------------------------------------------------------


def statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """Yields all statements, also those inside others."""
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            yield node


def expressions(statement: ast.AST) -> Iterator[ast.AST]:
    """Yields all nodes of a statement, without the statements inside it."""
    for child in ast.iter_child_nodes(statement):
        if not isinstance(child, ast.stmt):
            yield child
            yield from expressions(child)


def one_idea(source: Source) -> Iterator[Problem]:
    """A statement has at most one comprehension, conditional expression, walrus or lambda."""
    for statement in statements(source.tree):
        dense = [node for node in expressions(statement) if isinstance(node, DENSE)]
        if len(dense) > 1:
            names = ", ".join(type(node).__name__ for node in dense)
            yield source.problem(
                statement.lineno, f"more than one of these in a statement: {names}"
            )


def walrus(source: Source) -> Iterator[Problem]:
    """A walrus is the whole test of an `if` or a `while`."""
    for statement in statements(source.tree):
        test = statement.test if isinstance(statement, ast.If | ast.While) else None
        for node in expressions(statement):
            if isinstance(node, ast.NamedExpr) and node is not test:
                yield source.problem(node.lineno, "a walrus that is not the whole test of if/while")


def packing(source: Source) -> Iterator[Problem]:
    """No assignment has a tuple on both sides: each value has a line of its own."""
    for statement in statements(source.tree):
        if isinstance(statement, ast.Assign) and isinstance(statement.value, SEQUENCES):
            if any(isinstance(target, SEQUENCES) for target in statement.targets):
                yield source.problem(statement.lineno, "a tuple assigned to a tuple")


def statement_forms(source: Source) -> Iterator[Problem]:
    """An expression that is a statement is a call (or `yield`): no `or`, no tuple of calls."""
    allowed = (ast.Call, ast.Yield, ast.YieldFrom, ast.Await, ast.Constant)
    for statement in statements(source.tree):
        if isinstance(statement, ast.Expr) and not isinstance(statement.value, allowed):
            kind = type(statement.value).__name__
            yield source.problem(
                statement.lineno, f"a statement that is a {kind}: use `if`, or lines"
            )


# --- names ---------------------------------------------------------------------------------------


def bound_name(node: ast.AST) -> str | None:
    """Returns the name that a node binds in the scope that it is in, or None."""
    if isinstance(node, ast.Name):
        return node.id if isinstance(node.ctx, ast.Store) else None
    if isinstance(node, ast.alias):
        return node.asname or node.name.partition(".")[0]
    if isinstance(node, ast.arg):
        return node.arg
    return getattr(node, "name", None)


def names_in(node: ast.AST, scope: str = "module") -> Iterator[tuple[str, int, str]]:
    """Yields (scope, line, name) of all names bound in a tree; scope: module, class or function."""
    if isinstance(node, SCOPES):
        scope = "function"
    elif isinstance(node, ast.ClassDef):
        scope = "class"
    for child in ast.iter_child_nodes(node):
        name = bound_name(child)
        if name and name != "_":
            yield scope, getattr(child, "lineno", 0), name
        yield from names_in(child, scope)


def hidden_names(source: Source) -> Iterator[Problem]:
    """No parameter and no local name hides an imported or top-level name of its module."""
    found = list(names_in(source.tree))
    outer = {name for scope, _, name in found if scope == "module"}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            outer.difference_update(node.names)
    for scope, line, name in found:
        if scope == "function" and name in outer:
            yield source.problem(line, f"{name!r} hides the module's own name")


def public(tree: ast.Module) -> Iterator[ast.AST]:
    """Yields public functions and classes of the top level, and the methods of these classes."""
    for node in tree.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(method, FUNCTIONS) and not method.name.startswith("_"):
                    yield method


def parameters(function: ast.FunctionDef) -> list[ast.arg]:
    """Returns all parameters of a function except self and cls."""
    own = function.args
    several = [own.vararg, own.kwarg]
    named = [*own.posonlyargs, *own.args, *own.kwonlyargs, *filter(None, several)]
    return [parameter for parameter in named if parameter.arg not in ("self", "cls")]


def type_hints(source: Source) -> Iterator[Problem]:
    """Public functions of scripts and of common/ say the types of parameters and results."""
    if not is_script(source.path) and not source.path.startswith("common/"):
        return
    for function in public(source.tree):
        if isinstance(function, FUNCTIONS):
            bare = [x.arg for x in parameters(function) if x.annotation is None]
            if function.returns is None:
                bare.append("its result")
            if bare:
                names = ", ".join(bare)
                yield source.problem(function.lineno, f"{function.name}: no type of {names}")


def docstrings(source: Source) -> Iterator[Problem]:
    """Files, public functions and public classes have a docstring."""
    if source.tree.body and not ast.get_docstring(source.tree):
        yield source.problem(1, "no docstring of the file")
    for node in public(source.tree):
        if not ast.get_docstring(node):
            yield source.problem(node.lineno, f"{node.name}: no docstring")


# --- imports -------------------------------------------------------------------------------------

# A file imports files of its own part, and of parts with a lower rank. Among tools and commands
# (rank 2) a part may import another one, but not in a circle. Every script is a part of its own.
RANKS = dict(common=0, analysis=1, plot=2, video=2, benchmarks=2, tools=2, tests=3)
SCRIPT_RANK = 1


def is_script(path: str) -> bool:
    """Whether a path is that of a method's script."""
    return ROOT / path in scripts()


def module_of(path: str) -> str:
    """Returns the dotted name of a file: common/run.py is common.run."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def part_of(module: str) -> str:
    """Returns the part of the repository that a module belongs to; a script is its own part."""
    first = module.partition(".")[0]
    return module if first == "baselines" else first


def imported(source: Source, known: set[str]) -> Iterator[tuple[int, str]]:
    """Yields (line, module) of every import of a module in `known`, also inside functions."""
    for node in ast.walk(source.tree):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            submodules = [member for member in members if member in known]
            found = submodules if len(submodules) == len(members) else [node.module, *submodules]
        for module in found:
            if module in known:
                yield node.lineno, module


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Returns the names along a circle of a graph, the first one again at the end, or []."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(edges.get(name, ())):
            found = search(other, [*path, name])
            if found:
                return found
        done.add(name)
        return []

    for start in sorted(edges):
        found = search(start, [])
        if found:
            return found
    return []


def one_way(sources: list[Source]) -> Iterator[Problem]:
    """Imports point one way, without circles, and nothing imports a test module."""
    known = {module_of(source.path) for source in sources}
    modules: dict[str, set[str]] = {}
    parts: dict[str, set[str]] = {}
    for source in sources:
        own = module_of(source.path)
        part = part_of(own)
        rank = RANKS.get(part, SCRIPT_RANK)
        for line, module in imported(source, known):
            other = part_of(module)
            modules.setdefault(own, set()).add(module)
            if other != part:
                parts.setdefault(part, set()).add(other)
                others = RANKS.get(other, SCRIPT_RANK)
                if others > rank or others == rank != RANKS["tools"]:
                    yield source.problem(line, f"{part} must not import {module}")
            if module.rpartition(".")[2].startswith(("test_", "conftest")):
                yield source.problem(line, f"{module} is a test module: move it to tests/helpers")
    for edges in (modules, parts):
        found = circle(edges)
        if found:
            yield Problem(found[0], 1, f"imports in a circle: {' -> '.join(found)}")


# --- all of it -----------------------------------------------------------------------------------

RULES: list[Rule] = [
    mean_density,
    line_density,
    script_size,
    one_idea,
    walrus,
    packing,
    statement_forms,
    hidden_names,
    type_hints,
    docstrings,
]


def read(path: Path) -> Source:
    """Reads a file of the repository."""
    return Source(str(path.relative_to(ROOT)), path.read_text())


def checked_files() -> list[Path]:
    """Returns the files that all rules apply to: all Python files except tests and benchmarks."""
    found = [*scripts(), ROOT / "plot.py", ROOT / "video.py"]
    for folder in ("common", "analysis", "tools"):
        found.extend(sorted((ROOT / folder).rglob("*.py")))
    return found


def all_files() -> list[Path]:
    """Returns all Python files, whose imports are checked."""
    others = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    return checked_files() + sorted(others)


def problems(source: Source) -> list[Problem]:
    """Returns what breaks the rules for single files, in the order of lines."""
    found = [problem for rule in RULES for problem in rule(source)]
    kept = [problem for problem in found if not source.excused(problem)]
    return sorted(kept, key=lambda problem: problem.line)


def report(source: Source) -> str:
    """Describes a file in a line, and each of its problems in one more."""
    found = problems(source)
    longest = max(source.tokens.values(), default=0)
    size = f"{source.tokens.total():6,} tokens, mean {source.mean:4.1f}, longest {longest:2}"
    lines = [f"{source.path:28} {size}, {len(found)} problems", *map(str, found)]
    return "\n    ".join(lines)


def main(names: list[str]) -> bool:
    """Prints the report of all files, or of those named; returns whether there is no problem."""
    chosen = [read(path) for path in checked_files()]
    if names:
        beginnings = tuple(names)
        chosen = [source for source in chosen if source.path.startswith(beginnings)]
        if not chosen:
            sys.exit(f"none of the files that are checked begins with {' or '.join(names)}")
    for source in chosen:
        print(report(source))
    if names:
        shared = []
    else:
        everything = [read(path) for path in all_files()]
        shared = [*common_size(everything), *one_way(everything)]
        print(*shared, sep="\n")
    return not shared and not any(map(problems, chosen))


if __name__ == "__main__":
    sys.exit(not main(sys.argv[1:]))
