"""Decide what the panels of a figure, or the columns of a table, are about."""

from analysis.command_line import say
from analysis.evaluations import Scores
from analysis.runs import has_tasks

# The domains in the QAM paper's order.
DOMAINS = """antmaze-large antmaze-giant humanoidmaze-medium humanoidmaze-large scene puzzle-3x3
    puzzle-4x4 cube-double cube-triple cube-quadruple""".split()
ALL = "all"  # the title of the panel about everything

Pair = tuple[str, int]  # (domain, task)
Found = dict[str, dict[str, Scores]]  # label -> domain -> scores, as of `organise`


def panels(found: Found, by: str, metric: str) -> dict[str, list[Pair]]:
    """Returns title -> the pairs (domain, task) that a panel averages; `by` domain, task or all.

    Where there are several panels and their scores can be compared, a last one is about all pairs.
    """
    pairs = _every_pair(found)
    titles = {}
    if by == "domain":
        titles = _panels_of_domains(pairs)
    elif by == "task":
        titles = _panels_of_tasks(pairs)
    comparable = metric in ("success", "normalized_score") or len(_domains(pairs)) == 1
    if by == ALL or (len(titles) > 1 and comparable):
        titles[ALL] = pairs
    return titles


def with_shared_pairs(found: Found, titles: dict[str, list[Pair]]) -> dict[str, list[Pair]]:
    """Restricts each panel to the pairs that all of its methods have, and reports it.

    A method with none of a panel's pairs does not count for that panel. A panel whose methods have
    no pair in common stays as it is, and one that becomes equal to another panel is dropped.
    """
    restricted = {}
    for title, pairs in titles.items():
        held = {label: _pairs_of(own) & set(pairs) for label, own in found.items()}
        held = {label: own for label, own in held.items() if own}
        common = set.intersection(*held.values())
        if not common or len(common) == len(pairs):
            restricted[title] = pairs
            continue
        shown = [pair for pair in pairs if pair in common]
        lacking = [label for label, own in held.items() if len(own) < len(pairs)]
        say(
            f"The panel {title} shows the {len(shown)} of {len(pairs)} tasks that all methods "
            f"have; others are missing for: {', '.join(lacking)}"
        )
        if shown not in restricted.values():
            restricted[_title_of(shown)] = shown
    return restricted


def _pairs_of(own: dict[str, Scores]) -> set[Pair]:
    """Returns the pairs of a method."""
    return {(domain, task) for domain, scores in own.items() for task in scores.by_task}


def _title_of(pairs: list[Pair]) -> str:
    """Returns the title of a panel about some of the tasks."""
    titles = list(_panels_of_domains(pairs))
    if len(titles) == 1:
        return titles[0]
    return f"{len(pairs)} tasks of {len(titles)} domains"


def _every_pair(found: Found) -> list[Pair]:
    """Returns the pairs that any method has, in order."""
    pairs = set()
    for own in found.values():
        pairs |= _pairs_of(own)
    return sorted(pairs, key=_rank)


def _short(domain: str) -> str:
    """Returns the name without its ordinary kind of data: cube-double-play -> cube-double."""
    return domain.removesuffix("-play").removesuffix("-navigate")


def _rank(pair: Pair) -> tuple:
    """Sorts domains as the paper does, others behind them by name, then tasks."""
    domain, task = pair
    name = _short(domain)
    position = DOMAINS.index(name) if name in DOMAINS else len(DOMAINS)
    return position, domain, task


def _domains(pairs: list[Pair]) -> list[str]:
    """Returns the different domains in their order."""
    return list(dict.fromkeys(domain for domain, _ in pairs))


def _panels_of_domains(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """Returns a panel per domain; its title names the tasks unless there are all five."""
    titles = {}
    for domain in _domains(pairs):
        own = [pair for pair in pairs if pair[0] == domain]
        title = _short(domain)
        if len(own) != 5 and has_tasks(domain):
            word = "task" if len(own) == 1 else "tasks"
            tasks = ", ".join(str(task) for _, task in own)
            title = f"{title}, {word} {tasks}"
        titles[title] = own
    return titles


def _panels_of_tasks(pairs: list[Pair]) -> dict[str, list[Pair]]:
    """Returns a panel per task; its title names the domain only if there are several."""
    several = len(_domains(pairs)) > 1
    titles = {}
    for domain, task in pairs:
        words = []
        if several or not has_tasks(domain):
            words.append(_short(domain))
        if has_tasks(domain):
            words.append(f"task {task}")
        titles[", ".join(words)] = [(domain, task)]
    return titles
