"""Pictures and tables of runs.

    python plot.py runs/qam/pointmaze-medium/default            curve.png, rollouts.png in there
    python plot.py runs/*/cube-double/* --out curves.png        methods side by side
    python plot.py runs/*/*/* --by domain --table table.md table.csv --step 1000000
    python plot.py runs/*/cube-double/* --by task --iqm --published --out tasks.pdf --dark
    python plot.py benchmarks/results/methods.csv --out methods.png
    python plot.py --committed                                  docs/images again

Folders alone: each gets pictures of its own run; scripts do that when they end. With --out or
--table all are compared: folders of one script and the same flags are one method, whatever their
names, seeds and tasks. CSV files of benchmarks/results are read as well.

A number is the mean (--iqm: the interquartile mean) over seeds and tasks, with its 95 % percentile
bootstrap interval, stratified: the seeds of each task are drawn anew, for themselves.
"""

import csv
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from common.envs import GOALS, ONLINE, make_env, resolve

ROOT = Path(__file__).resolve().parent
PANELS = {  # metric -> table, title
    "success": ("eval", "success rate"),
    "length": ("eval", "episode length [steps]"),
    "q": ("train", "mean Q on the data"),
    "critic_loss": ("train", "critic loss"),
}
ONLINE_PANELS = PANELS | {"return": ("eval", "return"), "q": ("train", "mean Q on the batch")}
ONLINE_PANELS = {key: ONLINE_PANELS[key] for key in ("return", "length", "q", "critic_loss")}
DOMAINS = """antmaze-large antmaze-giant humanoidmaze-medium humanoidmaze-large scene puzzle-3x3
    puzzle-4x4 cube-double cube-triple cube-quadruple""".split()  # in the QAM paper's order
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")  # told apart by the colour-blind

# --- one run -------------------------------------------------------------------------------------


def read_csv(path: Path) -> dict[str, np.ndarray]:
    """Columns of a run's CSV file as float arrays; {} if there is none."""
    rows = list(csv.reader(path.open(newline=""))) if path.exists() else []
    rows = [row for row in rows if len(row) == len(rows[0])]
    return dict(zip(rows[0], np.array(rows[1:], float).T)) if len(rows) > 1 else {}


def flags_of(folder: Path) -> dict:
    """The flags of a run."""
    try:
        return json.loads((folder / "config.json").read_text())["flags"]
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(f"{folder}/config.json is damaged or missing: {error!r}") from None


def draw_curve(folder: Path) -> None:
    """curve.png: one line per agent, coloured by task or, of an online method, by seed; panels of
    the metrics that the run has logged."""
    online = flags_of(folder)["env"] in ONLINE
    tables = {name: read_csv(folder / f"{name}.csv") for name in ("eval", "train")}
    panels = ONLINE_PANELS if online else PANELS
    panels = {metric: panels[metric] for metric in panels if metric in tables[panels[metric][0]]}
    if not panels:
        return
    size = dict(figsize=(3.25 * len(panels), 3), layout="constrained", squeeze=False)
    figure, axes = plt.subplots(1, len(panels), **size)
    for axis, (metric, (table, title)) in zip(axes[0], panels.items()):
        columns = tables[table]
        axis.set(title=title, xlabel="environment steps" if online else "updates")
        axis.xaxis.set_major_locator(plt.MaxNLocator(4))
        agents = sorted(set(zip(columns["task"], columns["seed"])))
        for i, (task, seed) in enumerate(agents):
            mine = (columns["task"] == task) & (columns["seed"] == seed)
            colour = i if online else int(task) - 1
            style = dict(color=f"C{colour}", marker="o" if table == "eval" else "", ms=3)
            label = f"task {task:.0f}" if seed == agents[0][1] else None
            label = f"seed {seed:.0f}" if online else label
            axis.plot(columns["step"][mine], columns[metric][mine], label=label, **style)
        if metric == "success":
            axis.set_ylim(-0.03, 1.03)
    axes[0, 0].legend(fontsize=7, loc="best" if online else "lower right")
    folder_name = "/".join(folder.resolve().parts[-3:])
    figure.suptitle(folder_name, fontsize=9)
    figure.savefig(folder / "curve.png", dpi=120)
    plt.close(figure)


def draw_rollouts(folder: Path) -> None:
    """rollouts.png of a maze: the paths of the last evaluation, a panel per task; solved episodes
    blue, others orange, a dot at each start and a star at the goal."""
    env_name = flags_of(folder)["env"]
    if "maze" not in env_name or not (folder / "rollouts.npz").exists():
        return
    rollouts = np.load(folder / "rollouts.npz")
    solved = rollouts["success"].ravel() > 0  # agent after agent
    of_task = np.repeat(rollouts["task"], rollouts["success"].shape[1])
    tasks = sorted(set(of_task.tolist()))
    size = dict(figsize=(3.4 * len(tasks), 3.6), layout="constrained", squeeze=False)
    figure, axes = plt.subplots(1, len(tasks), **size)
    for axis, task in zip(axes[0], tasks):
        maze = make_env(f"{resolve(env_name).env}-singletask-task{task}-v0").unwrapped
        maze.reset(seed=0)
        left, low = maze.ij_to_xy((-0.5, -0.5))
        right, high = maze.ij_to_xy(np.array(maze.maze_map.shape) - 0.5)
        extent = (left, right, low, high)
        axis.imshow(maze.maze_map, origin="lower", extent=extent, cmap="Greys", vmin=0, vmax=2)
        for i in np.flatnonzero(of_task == task):
            path = rollouts[f"path{i}"][:, :2]
            axis.plot(*path.T, color="C0" if solved[i] else "C1", lw=0.8, alpha=0.5)
            axis.plot(*path[0], "o", color="black", ms=2)
        axis.plot(*maze.cur_goal_xy, "*", color="C3", ms=12)
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"task {task}: success {solved[of_task == task].mean():.2f}", fontsize=10)
    figure.savefig(folder / "rollouts.png", dpi=120)
    plt.close(figure)


def draw_plane(folder: Path) -> None:
    """rollouts.png of multigoal: the paths of the last evaluation over contours of the goal cost, a
    panel for each of up to five agents; coloured by the goal that is reached, grey without one."""
    if flags_of(folder)["env"] != "multigoal" or not (folder / "rollouts.npz").exists():
        return
    rollouts = np.load(folder / "rollouts.npz")
    agents, episodes = rollouts["success"].shape
    shown = min(agents, 5)
    size = dict(figsize=(3.4 * shown, 3.7), layout="constrained", squeeze=False)
    figure, axes = plt.subplots(1, shown, **size)
    x = np.linspace(-7, 7, 201)
    plane = np.stack(np.meshgrid(x, x), -1)[..., None, :]
    cost = np.linalg.norm(plane - GOALS, axis=-1).min(-1) ** 2
    for agent, axis in enumerate(axes[0]):
        axis.contour(x, x, cost, np.arange(1, 8) ** 2, colors="0.85", linewidths=0.7)
        counts = [0] * len(GOALS)
        for i in range(agent * episodes, (agent + 1) * episodes):
            path = rollouts[f"path{i}"]
            distance = np.linalg.norm(path[-1] - GOALS, axis=-1)
            goal, reached = distance.argmin(), distance.min() < 1
            counts[goal] += int(reached)
            style = dict(lw=1, marker="o", ms=2, alpha=0.75, zorder=2 + reached)
            axis.plot(*path.T, color=COLOURS[goal] if reached else "0.55", **style)
        axis.scatter(*GOALS.T, s=200, marker="*", c=COLOURS, edgecolors="black", zorder=4)
        axis.plot(0, 0, "+", color="black", ms=8, zorder=4)
        axis.set(xlim=(-7, 7), ylim=(-7, 7), aspect="equal", xticks=[-5, 0, 5], yticks=[-5, 0, 5])
        numbers = " / ".join(map(str, counts))
        axis.set_title(f"reached {numbers} of {episodes}", fontsize=10)
    figure.savefig(folder / "rollouts.png", dpi=120)
    plt.close(figure)


def draw(folder) -> None:
    """Draws whatever the run folder has data for."""
    draw_curve(Path(folder))
    draw_rollouts(Path(folder))
    draw_plane(Path(folder))


# --- many runs: reading --------------------------------------------------------------------------

# Flags of config.json that do not make another method
IGNORED = """env name seed num_seeds tasks run_dir dataset_dir collect workers eval_slots eval_only
    track compile_cache""".split()


def expand(path: Path) -> list[Path]:
    """The folder, or its share-<i>-of-<n> where several hosts made it (docs/scale.md)."""
    if (path / "config.json").exists() or path.is_file():
        return [path]
    shares = sorted(path.glob("share-*-of-*"))
    if not shares:
        raise SystemExit(f"{path} is no run folder (config.json) and no CSV file of evaluations")
    if len(shares) < (n := int(shares[0].name.split("-")[-1])):
        say(f"{path} holds {len(shares)} of {n} shares")
    return shares


def say(text: str) -> None:
    """A line that does not mix with tables."""
    print(text, file=sys.stderr)


def domain_of(env: str) -> str:
    """cube-double, cube-double-play-singletask-task2-v0, ... -> cube-double-play."""
    return resolve(env).dataset or env


def method_names(runs: list[tuple[str, dict]]) -> list[str]:
    """Of runs (script, flags): the script, and the flags that at most half of its different
    configurations on this domain share. So different configurations have different names."""
    kinds, names = {}, [""] * len(runs)
    for i, (script, flags) in enumerate(runs):
        own = {key: json.dumps(x) for key, x in flags.items() if key not in IGNORED}
        mode = flags.get("guidance", "plain")  # CGQL's: three methods in one script
        script += f" {mode}" * (mode != "plain")
        kinds.setdefault((script, domain_of(flags["env"])), {})[i] = own
    for (script, _), group in kinds.items():
        different = [dict(x) for x in dict.fromkeys(tuple(own.items()) for own in group.values())]
        for i, own in group.items():
            shared = {key: sum(x.get(key) == own[key] for x in different) for key in own}
            rare = [key for key in own if shared[key] < len(different) >= 2 * shared[key]]
            names[i] = ", ".join([script, *(f"{key} {runs[i][1][key]}" for key in rare)])
    return names


def read_runs(paths: list[Path]) -> list[dict]:
    """Rows of all folders' eval.csv, then of all files of results, with `label` and `env` (the
    domain). Of an agent that several have, the first one's count."""
    paths, flags, found = list(dict.fromkeys(path.resolve() for path in paths)), [], {}
    folders = [path for path in paths if path.is_dir()]
    for folder in folders:
        parts = (folder.parent if folder.name.startswith("share-") else folder).parts
        flags.append((parts[-3], flags_of(folder)))
    for folder, label, (_, own) in zip(folders, method_names(flags), flags):
        more = dict(label=label, env=domain_of(own["env"]))
        found[folder] = [row | more for row in read_rows(folder / "eval.csv")]
        if not found[folder]:
            say(f"{folder} has no evaluation yet: left out")
    found |= {path: read_results(path) for path in paths if path.is_file()}
    rows, owner, twice = [], {}, {}
    for path, row in ((path, row) for path, own in found.items() for row in own):
        agent = row["label"], row["env"], row["task"], row["seed"]
        if (first := owner.setdefault(agent, path)) == path:
            rows.append(row)
        else:
            who = f"{row['label']}, " * path.is_file() + f"task {row['task']}, seed {row['seed']}"
            twice.setdefault((path, first), {})[who] = None
    for (path, first), agents in twice.items():
        say(f"{path} repeats {first}, which counts: {'; '.join(agents)}")
    return rows


def read_rows(path: Path) -> list[dict]:
    """A CSV file as dicts; a last line that is being written is left out."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if None not in row and None not in row.values()]


def read_results(path: Path) -> list[dict]:
    """Rows of a benchmarks/results/<suite>.csv; labels' environments are in <suite>.json."""
    try:
        rows, notes = read_rows(path), path.with_suffix(".json")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SystemExit(f"{path} is no CSV file that can be read: {error}") from None
    if not rows or not {"task", "seed", "step"} <= rows[0].keys():
        raise SystemExit(f"{path} has no evaluations: columns task, seed, step and metrics")
    try:
        notes = json.loads(notes.read_text())
        of = lambda note: note.get("config", note).get("flags", {}).get("env")
        envs = {label: of(notes.get(label, notes)) for label in {x.get("label") for x in rows}}
    except (OSError, ValueError, AttributeError):  # there is none, or it is about something else
        envs = {}
    for row in rows:
        env = envs.get(row.get("label"))
        row |= dict(label=row.get("label", path.stem), env=domain_of(env) if env else path.stem)
    return rows


def organise(rows: list[dict], metric: str) -> dict[str, dict[str, tuple]]:
    """Rows with label, task, seed, step, the metric and, of several domains, env -> label -> env ->
    (steps (n,), {task: scores (seeds, n)}). Says which agents lack what others of the method have,
    and keeps the steps that all of them have."""
    agents, found = {}, {}
    for row in rows:
        if row.get(metric, "") == "":
            continue
        key = row["label"], row.get("env", "")
        try:
            agent, step = (int(float(row["task"])), int(float(row["seed"]))), float(row["step"])
            agents.setdefault(key, {}).setdefault(agent, {})[int(step)] = float(row[metric])
        except ValueError as error:
            raise SystemExit(f"{', '.join(key)}: a row is not made of numbers: {error}") from None
    if rows and not agents:
        known = ", ".join(sorted(rows[0].keys() - {"label", "env", "task", "seed", "step"}))
        raise SystemExit(f"nothing was logged as {metric}; there is {known}")
    for (label, env), own in agents.items():
        who = f"{label}, {env}" if env else label
        tasks, seeds = (sorted({agent[i] for agent in own}) for i in (0, 1))
        for task, seed in ((task, seed) for task in tasks for seed in seeds):
            if (task, seed) not in own:
                say(f"{who}: task {task} has no seed {seed}")
        every = sorted(set().union(*own.values()))
        steps = [step for step in every if all(step in scores for scores in own.values())]
        for (task, seed), scores in sorted(own.items()):
            if lacks := [f"{step:,}" for step in every if step not in scores]:
                text = ", ".join(lacks if len(lacks) < 5 else [*lacks[:2], "...", lacks[-1]])
                lacking = f"lacks {len(lacks)} of {len(every)} steps"
                say(f"{who}: task {task}, seed {seed} {lacking}: {text}")
        if not steps:
            raise SystemExit(f"{who}: there is no step that all its seeds have")
        numbers = {task: np.array([[own[agent][step] for step in steps] for agent in sorted(own)
                                   if agent[0] == task]) for task in tasks}  # fmt: skip
        found.setdefault(label, {})[env] = np.array(steps), numbers
    return found


# --- many runs: numbers --------------------------------------------------------------------------

DRAWS = 10_000  # of the bootstrap
ALL = "all"


def centre(parts: list[np.ndarray], iqm: bool = False) -> np.ndarray:
    """Of scores (..., seeds) per task -> (...). The mean, in which every task counts the same; or
    the interquartile mean: without the lowest and the highest quarter of all tasks' runs, rounded
    down (Agarwal et al. 2021)."""
    if not iqm:
        return np.mean([part.mean(-1) for part in parts], 0)
    scores = np.concatenate(parts, -1)
    cut, n = scores.shape[-1] // 4, scores.shape[-1]
    return np.partition(scores, (cut, n - cut - 1), -1)[..., cut : n - cut].mean(-1)


def interval(parts: list[np.ndarray], iqm: bool = False) -> tuple[float, float, float]:
    """`centre` of scores (seeds,) per task, and the ends of its 95 % percentile bootstrap interval:
    each task's seeds are drawn from that task's."""
    rng, parts = np.random.default_rng(0), [np.asarray(part) for part in parts]
    draws = [part[rng.integers(len(part), size=(DRAWS, len(part)))] for part in parts]
    low, high = np.percentile(centre(draws, iqm), (2.5, 97.5))
    return float(centre(parts, iqm)), float(low), float(high)


def panels(found: dict, by: str, metric: str) -> dict[str, list[tuple[str, int]]]:
    """Title -> the (domain, task) that it is about. Where there are several, and scores can be
    compared, a last one is about all of them."""
    every = {(env, task) for own in found.values() for env, (_, x) in own.items() for task in x}
    short = lambda env: env.removesuffix("-play").removesuffix("-navigate")
    order = lambda env: (DOMAINS.index(short(env)) if short(env) in DOMAINS else 99, env)
    every = sorted(every, key=lambda pair: (order(pair[0]), pair[1]))
    domains = list(dict.fromkeys(env for env, _ in every))
    titles = {}
    for domain in domains if by == "domain" else ():
        pairs = [pair for pair in every if pair[0] == domain]
        tasks = f", task{'s' * (len(pairs) > 1)} " + ", ".join(str(task) for _, task in pairs)
        whole = len(pairs) == 5 or domain in ONLINE
        titles[short(domain) + tasks * (not whole)] = pairs
    for domain, task in every if by == "task" else ():
        words = [short(domain)] * (len(domains) > 1) + [f"task {task}"] * (domain not in ONLINE)
        titles[", ".join(words) or domain] = [(domain, task)]
    if by == ALL or (len(titles) > 1 and (metric == "success" or len(domains) == 1)):
        titles[ALL] = every
    return titles


def scores(own: dict, pairs: list[tuple[str, int]]):
    """Of a method's `organise`: steps (n,) that all pairs have, scores (seeds, n) per pair; or None
    where one of the pairs is missing, for means over different tasks cannot be compared."""
    if not all(env in own and task in own[env][1] for env, task in pairs):
        return None
    steps = sorted(set.intersection(*(set(own[env][0].tolist()) for env, _ in pairs)))
    return np.array(steps, int), [own[env][1][task][:, np.isin(own[env][0], steps)]
                                  for env, task in pairs]  # fmt: skip


def curve(own: dict, pairs, iqm: bool = False):
    """steps (n,), numbers (n, 3): `interval` at each step; or None, as `scores`."""
    if (found := scores(own, pairs)) is None or not len(found[0]):
        return None
    steps, parts = found
    return steps, np.array([interval([x[:, i] for x in parts], iqm) for i in range(len(steps))])


# --- published numbers ---------------------------------------------------------------------------


def plain(name: str) -> str:
    """qam_edit, QAM-EDIT -> qamedit; cgql plain -> cgql."""
    return "".join(c for c in name.lower().removesuffix(" plain") if c.isalnum())


def read_published(metric: str) -> dict[tuple, dict]:
    """(domain, task or "all") -> method -> (steps (n,), numbers (n, 3): mean, low, high, NaN where
    not published). QAM's released curves hold success, FMER's tables returns after 1M steps, mean
    and deviation of five seeds; the kitchen's return is the number of accomplished tasks.
    RLPD's steps are those of its own training, which began where the others go online."""
    found, folder = {}, ROOT / "benchmarks/published"
    of = lambda domain, task: found.setdefault((domain, task), {})
    for row in read_rows(folder / "qam_published.csv") if metric == "success" else ():
        start = 1_000_000 if row["method"] == "RLPD" else 0
        steps = [int(name) for name in row if name.isdigit() and row[name]]
        numbers = [float(row[str(step)]) / 100 for step in steps]  # published in percent
        task = ALL if row["task"] == ALL else int(row["task"])
        empty = np.array(steps) - start, np.full((len(steps), 3), np.nan)
        own = of(row["domain"], task).setdefault(row["method"], empty)[1]
        own[:, ("mean", "low", "high").index(row["number"])] = numbers
    kept = [("table2", "return"), ("table7", "accomplished_tasks")]
    for row in read_rows(folder / "fmer_published.csv") if metric == "return" else ():
        if (row["table"], row["metric"]) in kept:
            env = row["env"].lower().removesuffix("-v5").replace("-n", "-")
            numbers = np.array([[float(row["mean"]), np.nan, np.nan]])
            of(env, ALL)[row["method"]] = np.array([1_000_000]), numbers
    return found


def published_curve(published: dict, method: str, pairs):
    """As `curve`. Of what is not one task, one domain or all fifty tasks: means alone."""
    domains = dict.fromkeys(env for env, _ in pairs)
    whole = all(env in ONLINE or len([x for x in pairs if x[0] == env]) == 5 for env in domains)
    keys = [(env, ALL) for env in domains] if whole else list(pairs)
    keys = [(ALL, ALL)] if whole and len(pairs) == 50 else keys
    name = {plain(x): x for key in keys for x in published.get(key, ())}.get(plain(method))
    if not all(name in published.get(key, ()) for key in keys):
        return None
    each = [published[key][name] for key in keys]
    if len(each) == 1:
        return each[0]
    means = np.mean([numbers[:, 0] for _, numbers in each], 0)
    return each[0][0], np.stack([means, *[np.full_like(means, np.nan)] * 2], 1)


def choose_published(published: dict, names, labels) -> list[str]:
    """Methods: `own` are those that there are labels of, with whatever flags, `all` are all."""
    known = {plain(name): name for own in published.values() for name in own}
    labels = [label.split(",")[0] for label in labels]
    chosen = []
    for name in names:
        if name in ("own", ALL):
            chosen += [x for key, x in known.items() if name == ALL or key in map(plain, labels)]
        elif plain(name) in known:
            chosen.append(known[plain(name)])
        else:
            there = ", ".join(known.values())
            raise SystemExit(f"nothing is published of {name}; there is {there}")
    return list(dict.fromkeys(chosen))


# --- tables --------------------------------------------------------------------------------------


def markdown(lines: list[list[str]]) -> str:
    """A table, the head first."""
    texts = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([texts[0].replace("|  |", "| |", 1), "|---" * len(lines[0]) + "|", *texts[1:]])


def cell(numbers, digits: int = 2, seeds: int = 2) -> str:
    """mean [low, high]; without an interval where there is none, or one seed alone."""
    mean, low, high = numbers
    known = bool(seeds > 1 and np.isfinite(low))
    return f"{mean:.{digits}f}" + f" [{low:.{digits}f}, {high:.{digits}f}]" * known


def summaries(found: dict, columns: dict, step: int = 0, iqm: bool = False) -> dict:
    """method -> column -> (step, `interval`, least number of seeds per task) at `step`, or else the
    last one; None where the method lacks the column's tasks, or the step."""
    table = {}
    for label, own in found.items():
        for title, pairs in columns.items():
            steps, parts = scores(own, pairs) or ([], [])
            at = np.flatnonzero(np.asarray(steps) == step) if step else range(len(steps))[-1:]
            entry = None
            if len(at):
                last = [part[:, at[0]] for part in parts]
                entry = int(steps[at[0]]), interval(last, iqm), min(map(len, last))
            table.setdefault(label, {})[title] = entry
    return table


def published_summaries(published: dict, methods, columns: dict, step: int) -> dict:
    """The same of the papers, at `step` if it was published, or else after 1M steps; 0 seeds."""
    table = {}
    for method in methods:
        row = {}
        for title, pairs in columns.items():
            steps, numbers = published_curve(published, method, pairs) or ([], [])
            at = [i for wanted in (step, 1_000_000) for i in np.flatnonzero(steps == wanted)]
            row[title] = (int(steps[at[0]]), tuple(numbers[at[0]].tolist()), 0) if at else None
        when = " and ".join(sorted({thousands(entry[0]) for entry in row.values() if entry}))
        if when:
            table[f"{method}, published at {when}"] = row
    return table


def most(values: dict[str, str]) -> str:
    """{a: 4, b: 4, c: 3} -> 4 (c: 3)."""
    common = Counter(values.values()).most_common(1)[0][0]
    others = ", ".join(f"{name}: {value}" for name, value in values.items() if value != common)
    return common + f" ({others})" * bool(others)


def markdown_table(table: dict, metric: str, iqm: bool = False) -> str:
    """What the numbers are, and a row per method, a column per panel."""
    seeds, steps, lines = {}, {}, [["", *next(iter(table.values()))]]
    for label, row in table.items():
        ours = [entry for entry in row.values() if entry and entry[2]]
        if ours:
            steps[label] = " and ".join(f"{x:,}" for x in sorted({entry[0] for entry in ours}))
            seeds[label] = str(min(entry[2] for entry in ours))
        digits = 2 if metric == "success" else 1
        lines.append([label, *(cell(x[1], digits, x[2] or 2) if x else "-" for x in row.values())])
    what = "interquartile mean" if iqm else "mean"
    text = f"{metric.capitalize()}, {what} [95 % bootstrap interval]. "
    return text + f"Steps: {most(steps)}. Seeds: {most(seeds)}.\n\n{markdown(lines)}\n"


def csv_table(table: dict) -> list[list]:
    """A row per method: for each panel number, ends of its interval, step and seeds."""
    names = ("", " low", " high", " step", " seeds")
    titles = next(iter(table.values()))
    lines = [["method", *(title + name for title in titles for name in names)]]
    for label, row in table.items():
        cells = [[*np.round(x[1], 4).tolist(), x[0], x[2] or ""] if x else [""] * 5
                 for x in row.values()]  # fmt: skip
        lines.append([label, *("" if x != x else x for entry in cells for x in entry)])
    return lines


# --- curves --------------------------------------------------------------------------------------

THEMES = {  # paper, ink, lines of the grid, and methods' colours: near Okabe and Ito's, moved until
    # any two are far apart with red- and green-blindness and all stand out from the paper
    "light": ("#ffffff", "#222222", "#e4e4e4", ("#1352C7", "#B19200", "#0CA963", "#AD5E8C",
                                                "#873A00", "#3A9BE6", "#3C2663", "#222222")),
    "dark": ("#12151a", "#e8e8e8", "#30353d", ("#4675C3", "#EFBD31", "#2AAF7A", "#CF91C0",
                                               "#D3571F", "#C6FFFF", "#7A5BF5", "#F7F7C8")),
}  # fmt: skip
MARKERS = "os^DvPX*"
LINES = "-", (0, (1, 1)), (0, (6, 1, 1, 1))  # of the first eight methods, the next, ...


def theme(name: str) -> dict:
    """matplotlib's settings."""
    paper, ink, grid, _ = THEMES[name]
    inked = "text.color axes.labelcolor axes.edgecolor xtick.color ytick.color".split()
    return dict.fromkeys(inked, ink) | {
        "figure.facecolor": paper, "axes.facecolor": paper, "savefig.facecolor": paper,
        "grid.color": grid, "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
        "axes.spines.right": False, "legend.frameon": False, "font.size": 10, "axes.titlesize": 10,
        "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "pdf.fonttype": 42,
    }  # fmt: skip


def thousands(x: float, _=None) -> str:
    """250000 -> 250k, 1500000 -> 1.5M."""
    size, unit = (1e6, "M") if abs(x) >= 1e6 else (1e3, "k") if abs(x) >= 1e3 else (1, "")
    return f"{x / size:g}{unit}"


def label_ends(axis, ends: list[tuple[float, str, str]]) -> None:
    """Names (y, text, colour) to the right of where lines end, moved apart where they would
    overlap; the axis must have its limits."""
    (low, high), gap = axis.get_ylim(), 0.062  # in heights of the panel
    ends = sorted(ends)
    heights = [min(max((y - low) / (high - low), 0), 1) for y, _, _ in ends]
    for _ in range(200):  # neighbours that are too near push one another
        for i in range(len(heights) - 1):
            if (push := (gap - heights[i + 1] + heights[i]) / 2) > 0:
                heights[i], heights[i + 1] = heights[i] - push, heights[i + 1] + push
    for height, (_, text, colour) in zip(heights, ends):
        style = dict(color=colour, va="center", fontsize=9, annotation_clip=False)
        axis.annotate(text, (1.015, height), xycoords="axes fraction", **style)


def draw_published(axis, steps, numbers, method, colour, last):
    """Published numbers (n, 3) up to our last step, dashed; where they are later, one of them at
    the right edge: after 1M steps, or the last. Returns an entry of `label_ends` and the line."""
    name, style = f"{method}, published", dict(color=colour, lw=1.4, ls=(0, (4, 2)))
    shown = steps <= last
    if shown.sum() > 1:
        steps, numbers = steps[shown], numbers[shown]
        line = axis.plot(steps, numbers[:, 0], label=name, **style)[0]
        axis.fill_between(steps, *numbers[:, 1:].T, color=colour, alpha=0.1, lw=0)
        return (numbers[-1, 0], name, colour), line
    at = np.flatnonzero(steps == 1_000_000)[0] if 1_000_000 in steps else -1
    name, height = f"{name} at {thousands(steps[at])}", numbers[at, 0]
    edge = dict(transform=axis.get_yaxis_transform())  # x in widths of the panel
    line = axis.plot([0.86, 0.99], [height] * 2, label=name, **style, **edge)[0]
    return (height, name, colour), line


def draw_panel(axis, ours: dict, theirs: dict, look: dict, metric: str):
    """`ours`: method -> (steps, numbers (n, 3), whether there is an interval); `theirs`: `curve`s
    that were published. Returns entries of `label_ends` and the legend's name -> line."""
    ends, handles = [], {}
    last = max([steps[-1] for steps, _, _ in ours.values()], default=1_000_000)
    dots = ours and all(len(steps) == 1 for steps, _, _ in ours.values())  # one evaluation each
    for i, (label, (steps, numbers, known)) in enumerate(ours.items()):
        colour, marker, line = look[plain(label)]
        style = dict(color=colour, marker=marker, ms=4.5, mec=plt.rcParams["axes.facecolor"])
        style |= dict(mew=0.5, lw=1.8, ls=line, markevery=max(1, len(steps) // 8), label=label)
        if dots:
            style |= dict(ls="", ms=7)
            if known:
                axis.vlines(i, *numbers[0, 1:], color=colour, lw=2.5, alpha=0.6)
        elif known:
            alpha = 0.2 if len(ours) < 6 else 0.1
            axis.fill_between(steps, *numbers[:, 1:].T, color=colour, alpha=alpha, lw=0)
        handles[label] = axis.plot([i] if dots else steps, numbers[:, 0], **style)[0]
        ends.append((numbers[-1, 0], label, colour))
    for method, own in theirs.items():
        end, line = draw_published(axis, *own, method, look[plain(method)][0], 0 if dots else last)
        ends.append(end)
        handles[line.get_label()] = line
    if metric == "success":
        axis.set_ylim(-0.03, 1.03)
    else:
        axis.yaxis.set_major_formatter(thousands)
    if dots:
        axis.set(xticks=[], xlim=(-0.7, len(ours) - 0.3 + 0.7 * bool(theirs)))
    else:
        axis.set_xlim(0, 1.02 * last)
        axis.xaxis.set_major_locator(plt.MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
        axis.xaxis.set_major_formatter(thousands)
    return ends, handles, f"after {thousands(last)} " * bool(dots)


def draw_curves(found: dict, titles: dict, metric: str, *, iqm=False, published=None, papers=(),
                dark=False):  # fmt: skip
    """The figure: a panel per title, a colour, marker and line per method, bands of 95 %; dashed,
    what was published of `papers`. In one panel up to eight lines are named where they end."""
    colours, published = THEMES["dark" if dark else "light"][3], published or {}
    names = list(dict.fromkeys(plain(name) for name in (*found, *papers)))
    look = {name: (colours[i % 8], MARKERS[(i + i // 8) % 8], LINES[i // 8 % 3])
            for i, name in enumerate(names)}  # fmt: skip
    panels, handles = {}, {}
    for title, pairs in titles.items():
        ours = {label: curve(own, pairs, iqm) for label, own in found.items()}
        for label in [label for label, own in ours.items() if own is None]:
            say(f"{label} has not all of {title}: left out there")
            del ours[label]
        for label, own in ours.items():
            seeds = min(len(part) for part in scores(found[label], pairs)[1])
            ours[label] = *own, seeds > 1
        theirs = {method: published_curve(published, method, pairs) for method in papers}
        theirs = {method: own for method, own in theirs.items() if own}
        if ours or theirs:
            panels[title] = ours, theirs
    if not panels:
        raise SystemExit("no method has all tasks of a panel; try --by task")
    count = len(panels)
    columns = count if count <= 3 else 2 if count == 4 else 3 if count <= 6 else 4
    lines = -(-count // columns)
    entries = max(len(ours) + len(theirs) for ours, theirs in panels.values())
    size = (3 * columns, 2.5 * lines + 0.6)
    if count == 1:
        size = 5.8, max(3.5, 0.6 + 0.19 * entries * (entries > 8))
    figure, axes = plt.subplots(lines, columns, figsize=size, layout="constrained",
                                squeeze=False, sharey=metric == "success")  # fmt: skip
    for axis in axes.flat[count:]:
        axis.set_axis_off()
    online = {env in ONLINE for title in panels for env, _ in titles[title]}
    unit = "steps" if len(online) > 1 else "environment steps" if online == {True} else "updates"
    for i, (axis, (title, (ours, theirs))) in enumerate(zip(axes.flat, panels.items())):
        ends, more, when = draw_panel(axis, ours, theirs, look, metric)
        handles |= more
        axis.set_title(title, fontweight="bold")
        if i + columns >= count:
            axis.set_xlabel(when + unit)
        if i % columns == 0:
            axis.set_ylabel("IQM of " * iqm + PANELS.get(metric, ("", metric))[1])
    if count == 1 and len(ends) <= 8:
        label_ends(axes[0, 0], ends)
    else:
        where = "outside right upper" if count == 1 else "outside lower center"
        across = 1 if count == 1 else min(len(handles), 6 if columns > 2 else 3)
        figure.legend(handles.values(), handles, loc=where, fontsize=8.5, ncol=across,
                      handlelength=2.8)  # fmt: skip
    return figure


# --- command line --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    paths: Annotated[tuple[str, ...], tyro.conf.Positional] = ()  # run folders, or results' CSV
    out: str = ""  # picture of all: .png, .pdf or .svg
    table: tuple[str, ...] = ()  # tables of all: .md, .csv
    metric: str = ""  # column of eval.csv (default: success, of online methods return)
    by: Literal["domain", "task", "all"] = "domain"  # what a panel, or a column, is
    iqm: bool = False  # interquartile mean instead of the mean
    published: tuple[str, ...] | None = None  # papers' means: of ours (no value), all, or names
    only: tuple[str, ...] = ()  # methods, in this order (default: all)
    step: int = 0  # of the table (default: the last one)
    dark: bool = False  # light on dark
    committed: bool = False  # draw the pictures of docs/images again


def compare(options: Options) -> None:
    """Picture and tables of all runs together."""
    paths = [path for name in options.paths for path in expand(Path(name))]
    targets = [(options.out, (".png", ".pdf", ".svg"))] * bool(options.out)
    for name, ends in targets + [(name, (".md", ".csv")) for name in options.table]:
        if Path(name).suffix not in ends:
            raise SystemExit(f"{name} must end with {' or '.join(ends)}")
        if any(Path(name).resolve() == path.resolve() for path in paths):
            raise SystemExit(f"{name} is read: choose another file to write")
    if not (rows := read_runs(paths)):
        raise SystemExit("there are no evaluations")
    online = all(row["env"] in ONLINE for row in rows)
    success = not online and any(row.get("success", "") != "" for row in rows)
    metric = options.metric or ("success" if success else "return")
    labels = list(dict.fromkeys(row["label"] for row in rows))
    if unknown := [name for name in options.only if name not in labels]:
        raise SystemExit(f"no method {', '.join(unknown)}; there is {'; '.join(labels)}")
    wanted = options.only or labels
    found = organise([row for row in rows if row["label"] in wanted], metric)
    if without := [label for label in wanted if label not in found]:
        say(f"left out, for {metric} was not logged: {', '.join(without)}")
    found = {label: found[label] for label in wanted if label in found}
    titles = panels(found, options.by, metric)
    published = {} if options.published is None else read_published(metric)
    if options.published is not None and not published:
        raise SystemExit(f"nothing is published about {metric}")
    papers = choose_published(published, options.published or ("own",), labels)
    if options.table:
        table = summaries(found, titles, options.step, options.iqm)
        last = [entry[0] for row in table.values() for entry in row.values() if entry]
        if not last:
            when = f" at step {options.step:,}" * bool(options.step)
            raise SystemExit(f"no method has all tasks of a column{when}; try --by task")
        table |= published_summaries(published, papers, titles, max(last))
    for name in options.table:
        with writing(name) as file:
            if name.endswith(".md"):
                file.write(markdown_table(table, metric, options.iqm))
            else:
                csv.writer(file, lineterminator="\n").writerows(csv_table(table))
    if options.out:
        with plt.rc_context(theme("dark" if options.dark else "light")):
            style = dict(iqm=options.iqm, published=published, papers=papers, dark=options.dark)
            figure = draw_curves(found, titles, metric, **style)
            with writing(options.out, "b") as file:
                figure.savefig(file, dpi=160, format=Path(options.out).suffix[1:])
            plt.close(figure)


def committed(images: Path = ROOT / "docs/images") -> None:
    """The pictures of docs/images, from files of benchmarks/results and benchmarks/published."""
    from benchmarks import bandits, multigoal  # these load jax

    results = ROOT / "benchmarks/results"
    file, picture = str(results / "halfcheetah.csv"), str(images / "halfcheetah.png")
    compare(Options(paths=(file,), out=picture, published=()))
    rows = json.loads((results / "bandits.json").read_text())["rows"]
    bandits.draw(rows, images / "bandits.png")
    drawn = json.loads((results / "multigoal-picture.json").read_text())
    multigoal.draw(drawn, images / "multigoal.png")


def writing(name: str, kind: str = ""):
    """The file, open; its folder is made."""
    try:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        return open(name, "w" + kind, **({} if kind else dict(newline="")))
    except OSError as error:
        raise SystemExit(f"cannot write {name}: {error.strerror}") from None


def main(options: Options) -> None:
    if options.committed:
        return committed()
    if not options.paths:
        raise SystemExit("name run folders, before all flags: some take what follows them as their "
                         "values; --help says more")  # fmt: skip
    if options.out or options.table:
        compare(options)
        for name in (*([options.out] if options.out else []), *options.table):
            print(f"wrote {name}")
        return
    for path in [path for name in options.paths for path in expand(Path(name))]:
        if path.is_file():
            raise SystemExit(f"{path} is a file of results: --out or --table say what to make")
        draw(path)
        print(f"drew {path}/curve.png")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
