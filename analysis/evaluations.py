"""Join the evaluations of many runs: name the methods, drop repeated agents, find common steps."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from analysis.command_line import say
from analysis.runs import domain_of_run, read_flags, read_rows, script_name
from common.errors import UserError
from common.flags import FREE

# Flags of config.json that do not make another method.
# `dataset` names the domain.
IGNORED = {"env", "seed", "num_seeds", "tasks", "dataset", "reference_scores", *FREE}


Rows = dict[Path, list[dict]]  # path -> its evaluations
Flags = dict[Path, dict[str, dict]]  # path -> label -> flags, as far as they are known


class Scores(NamedTuple):
    """A method's scores on one domain, at the steps where all of its agents were evaluated."""

    steps: np.ndarray  # (n,)
    by_task: dict[int, np.ndarray]  # task -> (seeds, n)


# --- names of methods ----------------------------------------------------------------------------


def method_names(runs: list[tuple[str, dict]]) -> list[str]:
    """Names each run, given as (script, flags), so that different configurations differ in name.

    A name is the script and those flags that at most half of the script's configurations on this
    domain share.
    """
    groups = {}  # (script, domain) -> {index of the run: its flags}
    for i, (script, flags) in enumerate(runs):
        group = _method_of(script, flags), domain_of_run(flags)
        groups.setdefault(group, {})[i] = _own_flags(flags)
    names = {}
    for (script, _), group in groups.items():
        different = {tuple(own.items()): own for own in group.values()}
        configurations = list(different.values())
        shown_of = dict(zip(different, _shown_flags(configurations), strict=True))
        for i, own in group.items():
            flags = runs[i][1]
            shown = [f"{key} {flags[key]}" for key in shown_of[tuple(own.items())]]
            names[i] = ", ".join([script, *shown])
    return [names[i] for i in range(len(runs))]


def _method_of(script: str, flags: dict) -> str:
    """Returns the script's name; each mode of guidance in cgql.py is a method of its own."""
    mode = flags.get("guidance", "plain")
    if mode == "plain":
        return script
    return f"{script} {mode}"


def _own_flags(flags: dict) -> dict[str, str]:
    """Returns the flags that can make another method, their values as JSON.

    The length of the offline phase is one of them only if an online phase follows.
    """
    own = {key: json.dumps(value) for key, value in flags.items() if key not in IGNORED}
    if flags.get("online_steps") and "offline_steps" in flags:
        own["offline_steps"] = json.dumps(flags["offline_steps"])
    return own


def _shown_flags(configurations: list[dict]) -> list[list[str]]:
    """Returns which flags name each configuration: those whose value at most half of them have.

    Two that would have the same name, because one of them is older and lacks a flag, are named by
    that, too.
    """
    shown = []
    names = []
    for own in configurations:
        rare = []
        for key, value in own.items():
            sharing = [other for other in configurations if other.get(key) == value]
            if 2 * len(sharing) <= len(configurations):
                rare.append(key)
        shown.append(rare)
        names.append({key: own[key] for key in rare})
    for i, own in enumerate(configurations):
        for j, other in enumerate(configurations):
            if i != j and names[i] == names[j]:
                shown[i] += [key for key in own if own[key] != other.get(key)]
    return [list(dict.fromkeys(rare)) for rare in shown]


# --- reading -------------------------------------------------------------------------------------


def read_runs(paths: Iterable[Path]) -> list[dict]:
    """Reads the evaluations of run folders, then of CSV files, with `label` (method) and `env`.

    An agent that several of them hold counts where it comes first.
    """
    paths = list(dict.fromkeys(path.resolve() for path in paths))
    rows_of, flags_of = _read_folders([path for path in paths if path.is_dir()])
    for path in paths:
        if path.is_file():
            rows_of[path], flags_of[path] = _read_file(path)
    _tell_apart(rows_of, flags_of)
    return _without_repeated(rows_of)


def _read_folders(folders: list[Path]) -> tuple[Rows, Flags]:
    """Reads the evaluations of run folders and the flags of their methods."""
    runs = [(script_name(folder), read_flags(folder)) for folder in folders]
    rows_of = {}
    flags_of = {}
    for folder, label, (_, flags) in zip(folders, method_names(runs), runs, strict=True):
        names = dict(label=label, env=domain_of_run(flags))
        rows_of[folder] = [row | names for row in read_rows(folder / "eval.csv")]
        flags_of[folder] = {label: flags}
        if not rows_of[folder]:
            say(f"Skipping {folder}: it has no evaluation yet.")
    return rows_of, flags_of


def read_results(path: Path) -> list[dict]:
    """Reads benchmarks/results/<suite>.csv; <suite>.json says on which domain each label ran."""
    rows, _ = _read_file(path)
    return rows


def _read_file(path: Path) -> tuple[list[dict], dict[str, dict]]:
    """Reads the rows of a file as `read_results` does, and the flags of each of its labels."""
    rows = read_rows(path)
    if not rows or not {"task", "seed", "step"} <= rows[0].keys():
        raise UserError(f"{path} has no evaluations: columns task, seed, step and metrics")
    for row in rows:
        row.setdefault("label", path.stem)
    flags_of = _read_notes(path, {row["label"] for row in rows})
    for row in rows:
        flags = flags_of.get(row["label"])
        row["env"] = domain_of_run(flags) if flags else path.stem
    return rows, flags_of


def _read_notes(path: Path, labels: Iterable[str]) -> dict[str, dict]:
    """Reads the flags of each label from <suite>.json beside <suite>.csv; {} if there is none."""
    flags_of = {}
    try:
        notes = json.loads(path.with_suffix(".json").read_text())
        for label in labels:
            note = notes.get(label, notes)
            flags = note.get("config", note).get("flags", {})
            if flags.get("env"):
                flags_of[label] = flags
    except (OSError, ValueError, AttributeError):  # The file may be about something else.
        return {}
    return flags_of


def _tell_apart(rows_of: Rows, flags_of: Flags) -> None:
    """Adds its name to a file's labels that an earlier path has for another configuration."""
    known = {}  # (label, domain) -> flags
    for path, rows in rows_of.items():
        renamed = {}
        for label, env in dict.fromkeys((row["label"], row["env"]) for row in rows):
            if label not in flags_of[path]:
                continue
            own = _own_flags(flags_of[path][label])
            first = known.setdefault((label, env), own)
            shared = own.keys() & first.keys()
            if any(own[key] != first[key] for key in shared):
                renamed[label] = f"{label}, {path.stem}"
        for row in rows:
            row["label"] = renamed.get(row["label"], row["label"])


def _without_repeated(rows_of: Rows) -> list[dict]:
    """Joins the rows of all paths, each agent from the first path that holds it; reports others."""
    kept = []
    owner = {}  # agent -> the path from which it counts
    repeated = {}  # (path, first path) -> agents of both
    for path, rows in rows_of.items():
        for row in rows:
            agent = row["label"], row["env"], row["task"], row["seed"]
            first = owner.setdefault(agent, path)
            if first == path:
                kept.append(row)
                continue
            agents = repeated.setdefault((path, first), [])
            if agent not in agents:
                agents.append(agent)
    for (path, first), agents in repeated.items():
        names = []
        for label, _, task, seed in agents:
            name = f"task {task}, seed {seed}"
            names.append(f"{label}, {name}" if path.is_file() else name)
        say(f"Skipping agents of {path} that {first} holds as well: {'; '.join(names)}")
    return kept


# --- scores by method ----------------------------------------------------------------------------


def organise(rows: list[dict], metric: str) -> dict[str, dict[str, Scores]]:
    """Returns label -> domain -> `Scores` in a metric, from rows as `read_runs` returns them.

    Reports which agents lack what others of the method have.
    """
    found = {}
    for (label, env), agents in _scores_by_agent(rows, metric).items():
        name = f"{label}, {env}" if env else label
        steps = _common_steps(name, agents)
        if not steps:
            raise UserError(
                f"{name}: no step was evaluated for all tasks and seeds; leave out some of the runs"
            )
        scores_of = {}
        for (task, _), scores in sorted(agents.items()):
            scores_of.setdefault(task, []).append([scores[step] for step in steps])
        by_task = {task: np.array(scores) for task, scores in scores_of.items()}
        found.setdefault(label, {})[env] = Scores(np.array(steps), by_task)
    return found


def _scores_by_agent(rows: list[dict], metric: str) -> dict[tuple, dict]:
    """Returns (label, domain) -> (task, seed) -> step -> score; skips rows without the metric."""
    groups = {}
    for row in rows:
        if row.get(metric, "") == "":
            continue
        group = row["label"], row.get("env", "")
        try:
            agent = int(float(row["task"])), int(float(row["seed"]))
            step = int(float(row["step"]))
            score = float(row[metric])
        except ValueError as error:
            raise UserError(f"{', '.join(group)}: a row is not made of numbers: {error}") from None
        agents = groups.setdefault(group, {})
        agents.setdefault(agent, {})[step] = score
    if rows and not groups:
        known = sorted(rows[0].keys() - {"label", "env", "task", "seed", "step"})
        raise UserError(f"{metric} was not logged; choose a --metric from {', '.join(known)}")
    return groups


def _common_steps(name: str, agents: dict[tuple, dict]) -> list[int]:
    """Returns the steps at which all of a method's agents were evaluated, and reports the rest."""
    tasks = sorted({task for task, _ in agents})
    seeds = sorted({seed for _, seed in agents})
    for task in tasks:
        for seed in seeds:
            if (task, seed) not in agents:
                say(f"{name}: task {task} has no seed {seed}")
    every = sorted(set().union(*agents.values()))
    for (task, seed), scores in sorted(agents.items()):
        lacking = [f"{step:,}" for step in every if step not in scores]
        if lacking:
            count = f"{len(lacking)} of {len(every)}"
            shown = lacking if len(lacking) < 5 else [*lacking[:2], "...", lacking[-1]]
            say(f"{name}: task {task}, seed {seed} lacks {count} steps: {', '.join(shown)}")
    return sorted(set.intersection(*(set(scores) for scores in agents.values())))
