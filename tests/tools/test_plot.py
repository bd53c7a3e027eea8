"""Pictures and tables of many runs: statistics against slow or hand-made ones, exact tables, what
is said of missing seeds, published numbers, and what can be seen in the pictures."""

import csv
import itertools
import json
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.stats
from matplotlib.colors import to_rgb

import plot
from analysis import published, run_figures, style
from analysis.comparison import compare
from analysis.evaluations import IGNORED, method_names, organise, read_results, read_runs
from analysis.figures import looks_of
from analysis.statistics import centre, interval
from analysis.tables import markdown_table, table_of
from benchmarks import multigoal
from common.environments import make_env
from common.flags import FREE
from plot import Options, main
from tests.helpers.messages import stops
from tests.helpers.plotted import STEPS, run_folder, score
from tools.shared_blocks import ROOT


def found(*folders, metric="success"):
    return organise(read_runs(folders), metric)


def own_run(root, script, dataset, scores=(1, 2), env="Hopper-v5"):
    """A run on own data with returns and normalised scores of one seed."""
    folder = root / script / env / dataset.replace("/", "-")
    folder.mkdir(parents=True)
    flags = dict(env=env, dataset=dataset, checksum="12345678", tasks=[1], seed=0, num_seeds=1)
    (folder / "config.json").write_text(json.dumps(dict(flags=flags)))
    rows = [f"1,0,{i},1.0,{100 * x},{x}" for i, x in enumerate(scores, 1)]
    head = "task,seed,step,seconds,return,normalized_score"
    (folder / "eval.csv").write_text("\n".join([head, *rows, ""]))
    return folder


@pytest.mark.parametrize("datasets", [["minari:x/y-v0", "minari:x/z-v0"], ["a/x.npz", "b/y.hdf5"]])
def test_own_data_are_domains(tmp_path, datasets):
    """A column each, without a task, and one of all: normalised scores can be compared."""
    folders = [own_run(tmp_path, s, x) for s in ("qam", "fql") for x in datasets]
    comparison = compare(folders)
    names = [x if ":" in x else x.partition("/")[2] for x in datasets]
    assert comparison.metric == "normalized_score"
    assert list(comparison.panels) == [*names, "all"]
    text = markdown_table(table_of(comparison), comparison.metric)
    assert text.startswith("Normalized score, mean") and "| qam | 2.0 | 2.0 | 2.0 |" in text
    assert list(compare(folders, by="task").panels) == [*names, "all"]
    without = own_run(tmp_path, "ifql", "c.npz")
    table = (without / "eval.csv").read_text().replace("normalized_score", "length")
    (without / "eval.csv").write_text(table)
    assert compare([*folders, without]).metric == "return"


# --- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("values, iqm", [
    ([1, 2, 3, 100], 2.5),
    ([5, 1, 9], 5),
    ([-50, 0, 1, 2, 3, 4, 5, 80], 2.5),
    ([0, 0, 1, 4, 5, 9, 9], 19 / 5),
])  # fmt: skip
def test_interquartile_mean(values, iqm):
    """By hand, and scipy's trimmed mean: a quarter at each end, rounded down, is left out."""
    assert centre([np.array(values, float)], iqm=True) == pytest.approx(iqm)
    assert scipy.stats.trim_mean(values, 0.25) == pytest.approx(iqm)
    tasks = np.array_split(np.random.default_rng(0).permutation(values), 2)
    assert centre(tasks, iqm=True) == pytest.approx(iqm)  # of all tasks together
    assert np.isnan(centre([np.array([*values, np.nan], float)], iqm=True))


def test_every_task_counts_the_same_in_a_mean():
    assert centre([np.array([1.0, 1, 1, 1]), np.array([0.0])]) == 0.5


@pytest.mark.parametrize("iqm", [False, True])
def test_bootstrap_interval(iqm):
    """scipy's percentile bootstrap of several samples, and one draw after the other."""
    rng = np.random.default_rng(3)
    parts = [rng.normal(i, 1 + i, 6 + i) for i in range(3)]
    mean, low, high = interval(parts, iqm)
    join = lambda x: scipy.stats.trim_mean(np.concatenate(x), 0.25)
    of = join if iqm else (lambda x: np.mean([part.mean() for part in x]))
    slow = [of([rng.choice(part, len(part)) for part in parts]) for _ in range(1500)]
    np.testing.assert_allclose((low, high), np.percentile(slow, (2.5, 97.5)), atol=0.15)
    assert mean == pytest.approx(of(parts)) and low < mean < high
    if not iqm:
        of = lambda *x, axis: np.mean([part.mean(axis) for part in x], 0)
        library = scipy.stats.bootstrap(parts, of, method="percentile", rng=1)
        library = library.confidence_interval
        np.testing.assert_allclose((low, high), (library.low, library.high), atol=0.05)
    assert interval(parts, iqm) == (mean, low, high)  # a fixed generator


@pytest.mark.parametrize("iqm", [False, True])
def test_bootstrap_is_stratified(iqm):
    """Tasks differ and seeds do not: there is nothing to be unsure of."""
    parts = [np.full(4, float(task)) for task in range(4)]
    assert interval(parts, iqm) == (1.5, 1.5, 1.5)
    assert interval([np.concatenate(parts)], iqm)[1] < 1.2  # as if they were one task


# --- reading -------------------------------------------------------------------------------------


def test_seeds_of_several_folders_are_joined(tmp_path):
    """Other seeds, names, tasks: one method. Other flags: another one, named by them."""
    a = run_folder(tmp_path, name="a", seeds=(0, 1))
    b = run_folder(tmp_path, name="b", seeds=(2, 3), run_dir="elsewhere", env="cube-double-play")
    c = run_folder(tmp_path, name="c", inv_temp=0.5)
    d = run_folder(tmp_path, name="d", script="meam")
    steps, numbers = found(a, b, d)["qam"]["cube-double-play"]
    assert steps.tolist() == [100, 200] and sorted(numbers) == [1, 2]
    np.testing.assert_allclose(numbers[2][:, 1], [score(2, seed, 200) for seed in range(4)])
    assert list(found(a, b, d)) == ["qam", "meam"]
    assert list(found(a, c)) == ["qam", "qam, inv_temp 0.5"]
    assert len(list(organise(read_results(a / "eval.csv"), "success"))) == 1


def test_names_of_methods():
    """Flags that most configurations share are not shown; CGQL's modes are methods; domains do not
    mix; different configurations never have one name."""
    run = lambda script="meam", env="scene", **flags: (script, dict(env=env, **flags))
    runs = [run(rho=0.5, w=1), run(rho=0.5, w=1, seed=3), run(rho=0.5, w=0.5), run(rho=0.1, w=1),
            run(env="cube-double", rho=0.3, w=1), run("cgql", guidance="mse"),
            run("cgql", guidance="plain"), run("qam", rho=1, w=2),
            run("qam", rho=1, w=3)]  # fmt: skip
    assert method_names(runs) == [
        "meam", "meam", "meam, w 0.5", "meam, rho 0.1", "meam", "cgql mse", "cgql", "qam, w 2",
        "qam, w 3"]  # fmt: skip
    combinations = [run(a=a, b=b, c=c) for a, b, c in itertools.product((1, 2), (1, 2, 3), (1, 2))]
    assert len(set(method_names(combinations))) == 12
    versions = [run(tau=1), run(tau=1, rho=2), run(tau=3, rho=2)]  # the first one has no rho yet
    assert method_names(versions) == ["meam", "meam, rho 2", "meam, tau 3"]
    assert set(FREE) <= set(IGNORED)


def test_a_run_that_was_moved(tmp_path):
    """config.json says which script it is of, wherever the folder lies."""
    folder = run_folder(tmp_path, "dac").rename(tmp_path / "anything")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | dict(script="dac")))
    assert list(found(folder)) == ["dac"]


def test_files_with_other_flags(tmp_path):
    """A label of a file is not joined with an earlier one that has other flags."""
    folder = run_folder(tmp_path / "runs", seeds=(9,), inv_temp=99)
    table = tmp_path / "methods.csv"
    table.write_text("label,task,seed,step,success\nqam,1,0,100,0.75\n")
    flags = dict(env="cube-double", lr=3e-4, inv_temp=1)
    table.with_suffix(".json").write_text(json.dumps(dict(qam=dict(flags=flags))))
    assert list(found(folder, table)) == ["qam", "qam, methods"]
    flags |= dict(inv_temp=99)
    table.with_suffix(".json").write_text(json.dumps(dict(qam=dict(flags=flags))))
    assert list(found(folder, table)) == ["qam"]


def test_lengths_of_runs():
    """A longer run is the same method. A longer offline phase before an online one is another."""
    run = lambda **steps: ("qam", dict(env="scene", **steps))
    longer = [run(offline_steps=5, online_steps=0), run(offline_steps=9, online_steps=0)]
    assert method_names(longer) == ["qam", "qam"]
    both = [run(offline_steps=5, online_steps=5), run(offline_steps=9, online_steps=5)]
    assert method_names(both) == ["qam, offline_steps 5", "qam, offline_steps 9"]
    assert method_names([both[0], run(offline_steps=5, online_steps=9)]) == ["qam", "qam"]


def test_how_a_run_is_evaluated_or_tracked_makes_no_method():
    """Nor where it is stored and on how many processes it runs."""
    run = lambda **flags: ("qam", dict(env="scene", lr=1, **flags))
    first = dict(eval_episodes=50, eval_slots=10, eval_interval=5, log_interval=5, workers=0)
    second = dict(eval_episodes=9, eval_slots=2, eval_interval=1, log_interval=1, workers=3)
    first |= dict(track="", wandb_group="", eval_only=False, run_dir="a", num_seeds=1)
    second |= dict(track="wandb", wandb_group="b", eval_only=True, run_dir="c", num_seeds=2)
    assert method_names([run(**first), run(**second)]) == ["qam", "qam"]


def test_offline_and_online_runs_together(tmp_path, capsys):
    """Success, whichever comes first, and a line on those that have none."""
    offline = run_folder(tmp_path, name="z")
    online = tmp_path / "fmer" / "hopper" / "a"
    online.mkdir(parents=True)
    config = dict(flags=dict(env="hopper", num_seeds=1, seed=0))
    (online / "config.json").write_text(json.dumps(config))
    (online / "eval.csv").write_text("task,seed,step,seconds,return,length\n1,0,200,1.0,5.0,9.0\n")
    for paths in ((online, offline), (offline, online)):
        table = tmp_path / "table.csv"
        main(Options(tuple(map(str, paths)), table=(str(table),)))
        assert "qam" in table.read_text() and "fmer" not in table.read_text()
        assert "success was not logged: fmer" in capsys.readouterr().err


def test_missing_seeds_are_named(tmp_path, capsys):
    """One line for each (task, seed), and the steps that all have are used."""
    without = [(1, 1, 300), (2, 0, 100), (2, 0, 300), *((1, 0, x) for x in range(500, 2000, 100))]
    run_folder(tmp_path, "meam", name="a", steps=range(100, 2000, 100), without=without)
    run_folder(tmp_path, "meam", name="b", tasks=(2,), seeds=(4,), steps=range(100, 2000, 100))
    steps, numbers = found(*tmp_path.glob("*/*/*"))["meam"]["cube-double-play"]
    assert steps.tolist() == [200, 400]
    assert numbers[1].shape == (2, 2) and numbers[2].shape == (3, 2)
    assert capsys.readouterr().err.splitlines() == [
        "meam, cube-double-play: task 1 has no seed 4",
        "meam, cube-double-play: task 1, seed 0 lacks 15 of 19 steps: 500, 600, ..., 1,900",
        "meam, cube-double-play: task 1, seed 1 lacks 1 of 19 steps: 300",
        "meam, cube-double-play: task 2, seed 0 lacks 2 of 19 steps: 100, 300",
    ]


def test_no_common_step(tmp_path):
    a = run_folder(tmp_path, name="a", steps=(100,))
    b = run_folder(tmp_path, name="b", steps=(150,), seeds=(2,))
    words = "qam, cube-double-play", "no step was evaluated for all tasks and seeds"
    stops(*words, call=lambda: found(a, b))


def test_agents_that_are_there_twice(tmp_path, capsys):
    """The first folder counts, and a line says so."""
    a, b = run_folder(tmp_path, name="a"), run_folder(tmp_path, name="b", shift=0.5, seeds=(1, 2))
    numbers = found(a, b)["qam"]["cube-double-play"][1][1]
    np.testing.assert_allclose(numbers[:, 0], [0.1, 0.15, 0.2 + 0.5])
    said = capsys.readouterr().err.splitlines()
    agents = "task 1, seed 1; task 2, seed 1"
    assert said == [f"Skipping agents of {b} that {a} holds as well: {agents}"]


def test_files_that_have_the_same_agents(tmp_path, capsys):
    """As of folders, and of both. Other seeds are joined, the same file counts once."""
    head, a, b, c = "label,task,seed,step,success\n", *(tmp_path / f"{x}.csv" for x in "abc")
    a.write_text(head + "one,1,0,100,0.25\n")
    b.write_text(head + "one,1,0,100,0.75\none,1,1,100,0.5\n")
    for path in (a, b):
        path.with_suffix(".json").write_text('{"flags": {"env": "cube-double"}}')
    numbers = found(a, b, a)["one"]["cube-double-play"][1][1]
    np.testing.assert_allclose(numbers[:, 0], [0.25, 0.5])
    said = capsys.readouterr().err.splitlines()
    assert said == [f"Skipping agents of {b} that {a} holds as well: one, task 1, seed 0"]
    folder = run_folder(tmp_path, tasks=(1,), seeds=(0,))
    c.write_text(head + "qam,1,0,100,0.75\n")
    c.with_suffix(".json").write_text('{"flags": {"env": "cube-double"}}')
    numbers = found(c, folder)["qam"]["cube-double-play"][1][1]
    np.testing.assert_allclose(numbers, [[score(1, 0, step) for step in STEPS]])
    said = capsys.readouterr().err.splitlines()
    assert said == [f"Skipping agents of {c} that {folder} holds as well: qam, task 1, seed 0"]


def test_a_run_that_has_just_begun(tmp_path, capsys):
    """Nothing was evaluated, or the last line is being written, if only its last number."""
    a, b = run_folder(tmp_path, name="a"), run_folder(tmp_path, name="b", seeds=(2,))
    (b / "eval.csv").unlink()
    with open(a / "eval.csv", "a") as file:
        file.write("1,0,300,1.0,0.5,9")
    assert found(a, b)["qam"]["cube-double-play"][0].tolist() == [100, 200]
    assert capsys.readouterr().err == f"Skipping {b}: it has no evaluation yet.\n"


# --- published numbers ---------------------------------------------------------------------------


def test_published_success():
    """Of the paper: QAM after 1M steps 44.4 [43.6, 45.2] on all tasks, 64.2 [62.2, 66.2] on
    cube-double; RLPD after 500,000 steps of its own 60.0. Means of tasks are those of domains."""
    papers = published.read_published("success")
    every = [(env, task) for env, task in papers if env != "all" and task != "all"]
    assert len(every) == 50
    of = lambda method, pairs: published.published_curve(papers, method, pairs)
    steps, numbers = of("qam", every)
    assert steps.tolist() == list(range(50_000, 1_500_001, 50_000))
    np.testing.assert_allclose(numbers[19], [0.444, 0.436, 0.452])
    double = [pair for pair in every if pair[0] == "cube-double-play"]
    np.testing.assert_allclose(of("QAM", double)[1][19], [0.642, 0.622, 0.662])
    steps, numbers = of("rlpd", every)
    assert steps.tolist() == list(range(50_000, 500_001, 50_000))
    np.testing.assert_allclose(numbers[-1], [0.6, 0.593, 0.608], atol=1e-9)
    for method in ("QAM-EDIT", "CGQL-Linex", "ReBRAC"):
        tasks = np.mean([of(method, [pair])[1][:, 0] for pair in double], 0)
        np.testing.assert_allclose(of(method, double)[1][:, 0], tasks, atol=1.01e-3)
        some = of(method, every[:10])[1]
        np.testing.assert_allclose(some[:, 0], np.mean(
            [of(method, every[i : i + 5])[1][:, 0] for i in (0, 5)], 0))  # fmt: skip
        assert np.isnan(some[:, 1:]).all() and np.isfinite(of(method, every)[1]).all()
    assert of("meam", every) is None and of("qam", [("pointmaze-medium-navigate", 1)]) is None
    assert sum(path.stat().st_size for path in (ROOT / "benchmarks/published").iterdir()) < 1e6


def test_published_returns():
    """FMER's table 2 on MuJoCo, accomplished tasks of its table 7 in the kitchen."""
    papers = published.read_published("return")
    assert len(papers) == 8 and {len(own) for own in papers.values()} == {9}
    steps, numbers = published.published_curve(papers, "sac", [("halfcheetah", 1)])
    assert steps.tolist() == [1_000_000] and numbers[0, 0] == 10295.33
    assert published.published_curve(papers, "sac_flow", [("kitchen-4", 4)])[1][0, 0] < 4
    assert published.published_curve(papers, "PPO", [("kitchen-7", 7)])[1][0, 0] == 0.6


def test_methods_of_published_curves():
    papers = published.read_published("success")
    labels = ["meam", "qam_edit", "QAM, tau 3", "cgql plain"]
    choose = lambda *names: published.choose_published(papers, names, labels)
    assert sorted(choose("own")) == ["CGQL", "QAM", "QAM-EDIT"] and len(choose("all")) == 17
    assert sorted(choose("dsrl", "own", "QAM")) == ["CGQL", "DSRL", "QAM", "QAM-EDIT"]
    stops("No published meam results are available", "QAM-EDIT", call=lambda: choose("meam"))
    committed = ROOT / "benchmarks/results/halfcheetah.csv"
    assert compare([committed], published=(), only=("SAC",)).papers == ["SAC"]


def test_fifty_tasks_of_other_domains():
    """The paper's mean over its 50 tasks is that of its own ten domains only."""
    papers = published.read_published("success")
    others = [(f"domain-{i}", task) for i in range(10) for task in range(1, 6)]
    assert published.published_curve(papers, "QAM", others) is None


# --- tables --------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    """QAM on two domains, QAM-EDIT on one; on the first QAM has three seeds."""
    run_folder(tmp_path / "runs", env="cube-double", seeds=(0, 1, 2), tasks=(1, 2, 3, 4, 5))
    run_folder(tmp_path / "runs", env="scene", seeds=(0, 1), tasks=(2,), steps=(100, 200, 300))
    run_folder(tmp_path / "runs", "qam_edit", "scene", tasks=(2,), shift=0.4, seeds=(0,))
    return tuple(sorted(map(str, tmp_path.glob("runs/*/*/*"))))


def test_table_of_domains(tmp_path, runs, capsys):
    """Rows are methods, columns domains in the paper's order; what is not there is a dash, and one
    seed has no interval. The CSV has each number for itself. There is no column of all, because the
    only task that both have is that of a column already."""
    names = tuple(str(tmp_path / f"new/table.{end}") for end in ("md", "csv"))
    main(Options(paths=runs, table=names))
    half = lambda x: f"{x:.2f}"
    double = interval([[score(task, seed, 200) for seed in (0, 1, 2)] for task in range(1, 6)])
    cell = "{} [{}, {}]".format(*map(half, double))
    assert (tmp_path / "new/table.md").read_text() == "\n".join([
        "Success, mean [95 % bootstrap interval]. Steps: 200 and 300 (qam_edit: 200). "
        "Seeds: 2 (qam_edit: 1).",
        "",
        "| | scene, task 2 | cube-double |",
        "|---|---|---|",
        f"| qam | 0.28 [0.25, 0.30] | {cell} |",
        "| qam_edit | 0.60 | - |",
        "",
    ])  # fmt: skip
    with open(names[1], newline="") as file:
        head, first, second = csv.reader(file)
    assert head[:6] == ["method", "scene, task 2", "scene, task 2 low", "scene, task 2 high",
                        "scene, task 2 step", "scene, task 2 seeds"]  # fmt: skip
    assert first[:6] == ["qam", "0.275", "0.25", "0.3", "300", "2"]
    assert second == ["qam_edit", "0.6", "", "", "200", "1", *[""] * 5]
    np.testing.assert_allclose([float(x) for x in first[6:9]], double, atol=5e-5)
    assert capsys.readouterr().out == f"wrote {names[0]}\nwrote {names[1]}\n"


def test_table_of_tasks_at_a_step(tmp_path, runs):
    """With the published numbers: at the same step, else after 1M."""
    name = str(tmp_path / "table.md")
    double = tuple(run for run in runs if "double" in run)
    main(Options(paths=double, table=(name,), by="task", step=100, iqm=True, published=()))
    text, _, head, _, row, paper = (tmp_path / "table.md").read_text().splitlines()
    assert text == "Success, interquartile mean [95 % bootstrap interval]. Steps: 100. Seeds: 3."
    assert head == "| | task 1 | task 2 | task 3 | task 4 | task 5 | all |"
    assert row.startswith("| qam | 0.15 [0.10, 0.20] | 0.20 [0.15, 0.25] | 0.25 ")
    assert row.split(" | ")[-1].startswith("0.25 [")
    assert paper.startswith("| QAM, published at 1M | 0.8") and "0.64 [0.62, 0.66]" in paper
    stops("at step 150", call=lambda: main(Options(paths=double, table=(name,), step=150)))


def test_only_some_methods(tmp_path, runs):
    name = str(tmp_path / "table.md")
    main(Options(paths=runs, table=(name,), only=("qam_edit",)))
    assert (tmp_path / "table.md").read_text().count("\n|") == 3
    call = lambda: main(Options(paths=runs, table=(name,), only=("sac",)))
    stops("no method sac", "qam; qam_edit", call=call)


def test_tables_of_committed_results(tmp_path, capsys):
    """Those of the benchmarks' page are drawn from the same rows."""
    page = (ROOT / "benchmarks/offline.md").read_text()
    name = str(tmp_path / "table.md")
    for suite, by in (("methods", "domain"), ("pointmaze", "task")):
        file = ROOT / f"benchmarks/results/{suite}.csv"
        main(Options(paths=(str(file),), table=(name,), by=by))
        rows = (tmp_path / "table.md").read_text().splitlines()[4:]
        assert len(rows) == len(json.loads(file.with_suffix(".json").read_text())) >= 5
        for row in rows:
            assert row.removesuffix(" |") + " | " in page, row
    assert capsys.readouterr().err == ""


# --- pictures ------------------------------------------------------------------------------------

rgb = lambda colour: np.round(255 * np.array(to_rgb(colour))).astype(int)


def shown(path, colour):
    """Share of a PNG's pixels that have a colour."""
    pixels = np.round(255 * plt.imread(path)[..., :3]).astype(int)
    return (abs(pixels - rgb(colour)).max(-1) <= 2).mean()


@pytest.fixture
def figure(monkeypatch):
    """The figures that are drawn, kept open."""
    figures, close = [], plt.close
    monkeypatch.setattr(plt, "close", figures.append)
    yield figures
    for one in figures:
        close(one)


@pytest.mark.parametrize("dark", [False, True])
def test_colours_of_a_picture(tmp_path, runs, dark):
    """The paper is white or dark, methods have the first colours, nothing of the other theme."""
    path = tmp_path / "a.png"
    main(Options(paths=runs, out=str(path), dark=dark))
    (light, _, _, colours), (night, _, _, others) = style.THEMES["light"], style.THEMES["dark"]
    colours, paper, other = (others, night, light) if dark else (colours, light, night)
    assert shown(path, paper) > 0.6 and shown(path, other) < 0.02
    assert all(shown(path, colour) > 5e-4 for colour in colours[:2])
    assert shown(path, colours[4]) == 0


SIGHT = {  # Machado, Oliveira and Fernandes 2009, severity 1, of linear RGB
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "all colours": np.eye(3),
}  # fmt: skip


def linear(colour):
    c = np.array(to_rgb(colour))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(light):
    """CIELAB of linear RGB."""
    xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    t = np.array(xyz) @ np.clip(light, 0, 1) / (0.9505, 1, 1.089)
    x, y, z = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("name", style.THEMES)
def test_colours_are_told_apart(name):
    """By the colour-blind, too: a distance of 25 in CIELAB between any two; and a contrast of 3
    (WCAG's for graphics) to the paper. No two of 24 methods look the same."""
    paper, ink, _, colours = style.THEMES[name]
    for sight in SIGHT.values():
        seen = [lab(np.array(sight) @ linear(colour)) for colour in colours]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 25
    luminance = lambda colour: linear(colour) @ [0.2126, 0.7152, 0.0722] + 0.05
    for colour, least in [(ink, 7), *((colour, 2.95) for colour in colours)]:
        bright, dim = sorted((luminance(colour), luminance(paper)), reverse=True)
        assert bright / dim >= least, colour


def boxes(figure, texts):
    figure.canvas.draw()
    return [text.get_window_extent() for text in texts if text.get_text()]


def apart(boxes):
    return not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_one_panel_names_its_lines(tmp_path, figure):
    """Lines hold the means, bands the intervals; names do not overlap, though lines end at nearly
    the same height, and have their lines' colours. Published curves are dashed, up to our end."""
    steps = (50_000, 100_000, 150_000)
    for i, script in enumerate(("qam", "fql", "dsrl", "meam")):
        run_folder(tmp_path, script, tasks=(1,), seeds=(0, 1, 2), steps=steps, shift=i / 1e3 - 75)
    folders = tuple(map(str, tmp_path.glob("*/*/*")))
    main(Options(paths=folders, out=str(tmp_path / "a.pdf"), published=("qam",)))
    (axis,) = figure[0].axes
    lines = {line.get_label(): line for line in axis.lines}
    assert set(lines) == {"qam", "fql", "dsrl", "meam", "QAM, published"}
    assert axis.get_title() == "cube-double, task 1" and axis.get_xlabel() == "updates"
    names = {text.get_text(): text for text in axis.texts}
    for name, line in lines.items():
        assert names[name].get_color() == line.get_color()
    assert apart(boxes(figure[0], axis.texts)) and figure[0].legends == []
    assert len({line.get_color() for line in lines.values()}) == 4  # QAM's twice
    expected = [np.mean([score(1, seed, step) for seed in range(3)]) - 75 for step in steps]
    np.testing.assert_allclose(lines["qam"].get_ydata(), expected)
    dashed = lines["QAM, published"]
    assert dashed.get_linestyle() == "--" and dashed.get_xdata().tolist() == list(steps)
    assert dashed.get_color() == lines["qam"].get_color()
    assert len(axis.collections) == 5
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_small_multiples(tmp_path, figure):
    """A panel per task and one of the tasks that all have; the legend is beneath them; letters have
    at least 8 points; a method without a panel's task is left out there."""
    run_folder(tmp_path, tasks=range(1, 6))
    run_folder(tmp_path, "meam", tasks=(1, 2, 3), seeds=(0,))
    folders = tuple(map(str, tmp_path.glob("*/*/*")))
    main(Options(paths=folders, out=str(tmp_path / "a.svg"), by="task", iqm=True, dark=True))
    axes = [axis for axis in figure[0].axes if axis.lines]
    assert [axis.get_title() for axis in axes] == [
        *(f"task {i}" for i in range(1, 6)),
        "cube-double, tasks 1, 2, 3",
    ]
    assert [len(axis.lines) for axis in axes] == [2, 2, 2, 1, 1, 2]
    assert axes[0].get_ylabel() == "IQM of success rate" and not axes[1].get_ylabel()
    bands = [len(axis.collections) for axis in axes]
    assert bands == [1] * 6  # one seed alone has none
    (legend,) = figure[0].legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert sorted(texts) == ["meam", "qam"]
    figure[0].canvas.draw()
    below = legend.get_window_extent()
    assert all(not below.overlaps(axis.get_tightbbox()) for axis in axes)
    for axis in axes:
        texts = [axis.title, axis.xaxis.label, *axis.get_xticklabels(), *axis.get_yticklabels()]
        assert min(text.get_fontsize() for text in texts) >= 8


def test_tasks_that_all_methods_have(tmp_path, figure, capsys):
    """A panel is about these, and a line says which methods lack others; methods that have no task
    in common are left as they are."""
    run_folder(tmp_path, tasks=(1, 2, 3))
    run_folder(tmp_path, "meam", tasks=(3, 2), shift=0.1)
    run_folder(tmp_path, "fql", env="scene", tasks=(4,))
    run_folder(tmp_path, "ifql", env="scene", tasks=(5,))
    folders = tuple(map(str, sorted(tmp_path.glob("*/*/*"))))
    main(Options(paths=folders, out=str(tmp_path / "a.png")))
    titles = {axis.get_title(): axis for axis in figure[0].axes if axis.get_title()}
    assert list(titles) == ["cube-double, tasks 2, 3"]
    heights = {line.get_label(): line.get_ydata() for line in titles.popitem()[1].lines}
    expected = [np.mean([score(task, seed, 200) for task in (2, 3) for seed in (0, 1)])]
    assert heights["qam"][-1] == pytest.approx(expected[0]) and set(heights) == {"qam", "meam"}
    said = capsys.readouterr().err.splitlines()
    assert said[0] == (
        "The panel cube-double, tasks 1, 2, 3 shows the 2 of 3 tasks that all methods have; others "
        "are missing for: meam"
    )
    skipped = [line for line in said if line.startswith("Skipping") and "scene" in line]
    assert len(skipped) == 4  # nobody has both tasks


def test_tasks_of_several_domains_that_all_methods_have(tmp_path, figure):
    """The panel of all says of how many."""
    for script, tasks in (("qam", (1, 2)), ("meam", (2, 3))):
        for env in ("cube-double", "scene"):
            run_folder(tmp_path, script, env, tasks=tasks)
    folders = tuple(map(str, sorted(tmp_path.glob("*/*/*"))))
    main(Options(paths=folders, out=str(tmp_path / "a.png")))
    titles = [axis.get_title() for axis in figure[0].axes if axis.get_title()]
    assert titles == ["scene, task 2", "cube-double, task 2", "2 tasks of 2 domains"]


@pytest.mark.parametrize("count, bands", [(5, 5), (8, 8), (9, 0)])
def test_bands_of_few_methods_alone(tmp_path, figure, count, bands):
    """More than eight would hide one another and the lines."""
    for i in range(count):
        run_folder(tmp_path, f"method{i:02d}", tasks=(1,), shift=i / 100)
    main(Options(paths=tuple(map(str, tmp_path.glob("*/*/*"))), out=str(tmp_path / "a.png")))
    assert len(figure[0].axes[0].collections) == bands


def test_many_methods(tmp_path, figure):
    """No two of 24 methods look alike; the legend is beside the panel."""
    for i in range(24):
        run_folder(tmp_path, f"method{i:02d}", tasks=(1,), shift=i / 100)
    main(Options(paths=tuple(map(str, tmp_path.glob("*/*/*"))), out=str(tmp_path / "a.png")))
    (axis,) = figure[0].axes
    looks = {(x.get_color(), x.get_marker(), str(x.get_linestyle())) for x in axis.lines}
    by_colour = {(x.get_color(), x._unscaled_dash_pattern) for x in axis.lines}
    assert len(looks) == 24 and len(by_colour) > 8
    figure[0].canvas.draw()
    (legend,) = figure[0].legends
    box = legend.get_window_extent()
    assert not box.overlaps(axis.get_tightbbox()) and box.y0 >= 0


def test_single_evaluations_are_dots(tmp_path, figure):
    """One evaluation is no curve: the mean with its interval, method beside method."""
    run_folder(tmp_path, steps=(10_000,), shift=-5)
    run_folder(tmp_path, "meam", steps=(10_000,), shift=-4.9)
    main(Options(paths=tuple(map(str, tmp_path.glob("*/*/*"))), out=str(tmp_path / "a.png")))
    (axis,) = figure[0].axes
    assert [line.get_xdata()[0] for line in axis.lines] == [0, 1]
    assert axis.get_xlabel() == "after 10k updates" and len(axis.collections) == 2
    run_folder(tmp_path, "fql", steps=(50_000,))
    main(Options(paths=tuple(map(str, tmp_path.glob("*/*/*"))), out=str(tmp_path / "a.png")))
    assert figure[-1].axes[0].get_xlabel() == "after 10k to 50k updates"


def test_labels_that_differ_by_a_sign_look_different():
    looks = looks_of(["rho = 1", "rho = -1", "QAM"], ["qam", "FQL"], "light")
    assert len({str(looks[name]) for name in ("rho = 1", "rho = -1", "QAM", "FQL")}) == 4
    assert looks["qam"] == looks["QAM"]


def test_one_published_number(figure, tmp_path):
    """What was published after 1M steps is a dash at the right edge, and says so."""
    path = ROOT / "benchmarks/results/halfcheetah.csv"
    main(Options(paths=(str(path),), out=str(tmp_path / "a.png"), published=()))
    (axis,) = figure[0].axes
    heights = {line.get_label(): line.get_ydata()[-1] for line in axis.lines}
    assert heights["SAC, published at 1M"] == 10295.33 and round(heights["SAC"], 1) == 5928.4
    assert axis.get_ylim()[1] > 10295 and axis.get_xlabel() == "environment steps"
    assert axis.get_xlim()[1] < 110_000 and apart(boxes(figure[0], axis.texts))


def test_the_mazes_picture(tmp_path, figure):
    """A panel per task: the paths of its agents, blue where solved and else orange, a dot where
    each begins, a star at the task's goal, and walls where the maze has them."""
    (tmp_path / "config.json").write_text(json.dumps(dict(flags=dict(env="pointmaze-medium"))))
    rng, success = np.random.default_rng(0), np.array([[0, 1], [0, 0], [1, 0]])
    paths = {f"path{i}": rng.uniform(0, 20, (3 + i, 2)) for i in range(6)}
    np.savez(tmp_path / "rollouts.npz", task=[3, 1, 3], success=success, **paths)
    run_figures.draw_run(tmp_path)
    assert (tmp_path / "rollouts.png").stat().st_size > 5000
    axes = figure[0].axes
    titles = [axis.get_title() for axis in axes]
    assert titles == ["task 1: success 0.00", "task 3: success 0.50"]
    for axis, task, own in zip(axes, (1, 3), ([2, 3], [0, 1, 4, 5])):
        *lines, star = axis.lines
        assert len(lines) == 2 * len(own)
        for i, line, dot in zip(own, lines[::2], lines[1::2]):
            path = paths[f"path{i}"]
            np.testing.assert_array_equal(np.array(line.get_data()).T, path)
            assert line.get_color() == (style.SOLVED if success.flat[i] else style.UNSOLVED)
            assert np.ravel(dot.get_data()).tolist() == path[0].tolist() and dot.get_marker() == "o"
        maze = make_env(f"pointmaze-medium-singletask-task{task}-v0").unwrapped
        maze.reset()
        assert np.ravel(star.get_data()).tolist() == [*maze.cur_goal_xy]
        assert star.get_marker() == "*"
        (image,) = axis.images
        np.testing.assert_array_equal(image.get_array(), maze.maze_map)
        (left, right, low, high), (rows, columns) = image.get_extent(), maze.maze_map.shape
        for i, j in np.ndindex(rows, columns):  # from below, with cells around their centres
            x, y = maze.ij_to_xy((i, j))
            assert (x - left) / (right - left) * columns == pytest.approx(j + 0.5)
            assert (y - low) / (high - low) * rows == pytest.approx(i + 0.5)
        assert image.origin == "lower"


def blocks(path, n=32):
    """A PNG's mean colours of squares of n pixels: text that is set in another way changes them
    little (by 0.04 from matplotlib 3.9 to 3.11), a line that is missing by 0.07 or more."""
    pixels = plt.imread(path)[..., :3]
    high, wide = (size // n * n for size in pixels.shape[:2])
    return pixels[:high, :wide].reshape(high // n, n, wide // n, n, 3).mean((1, 3))


def test_committed_pictures(tmp_path):
    """All are what their files give: the same size, and the same ink everywhere."""
    plot.draw_committed(tmp_path)
    names = {path.name for path in (ROOT / "docs/images").iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == names
    for name in names:
        old, new = (blocks(folder / name) for folder in (ROOT / "docs/images", tmp_path))
        assert old.shape == new.shape and abs(old - new).max() < 0.055, name


def test_the_planes_picture_from_its_file(tmp_path):
    """What `benchmarks.multigoal` keeps is enough to draw the same again."""
    rng = np.random.default_rng(0)
    n = len(multigoal.grid()[0])
    path = rng.uniform(-5, 5, (100, 31, 2))
    path[::2, 7:] = np.nan
    one = dict(action=rng.uniform(-1, 1, (n, 2)), sample=rng.uniform(-1, 1, (400, 2)))
    one |= dict(path=path, goal=rng.integers(-1, 4, 100))
    text = multigoal.kept(dict(A=one))
    kept = json.loads(text)
    assert kept["A"]["path"][0][7] == [None, None] and len(text) < 2e5
    multigoal.draw(dict(A=one), tmp_path / "a.png")
    multigoal.draw(kept, tmp_path / "b.png")
    first, second = (plt.imread(tmp_path / f"{name}.png") for name in "ab")
    assert (abs(first - second).max(-1) > 0.2).mean() < 3e-3


def test_one_style(tmp_path, figure):
    """A run's own figures and the comparisons have the colours, grids and fonts of the theme."""
    run = run_folder(tmp_path, env="pointmaze-medium", tasks=(2,))
    np.savez(run / "rollouts.npz", task=[2], success=[[1]], path0=np.ones((3, 2)))
    run_figures.draw_run(run)
    main(Options(paths=(str(run),), out=str(tmp_path / "a.png")))
    wanted = style.settings("light")
    colours = [style.THEMES["light"].methods[i] for i in (1, 0)]  # by task, by method
    assert len(figure) == 3
    for one in figure:
        axis = one.axes[0]
        assert one.get_facecolor() == plt.matplotlib.colors.to_rgba(wanted["figure.facecolor"])
        assert not axis.spines["top"].get_visible()
        assert axis.title.get_fontsize() == wanted["axes.titlesize"]
    for one, colour in zip(figure[1:], colours, strict=True):  # the first one is the maze
        with plt.rc_context(wanted):
            assert rgb(one.axes[0].lines[0].get_color()).tolist() == rgb(colour).tolist()
        assert one.axes[0].xaxis.get_gridlines()[0].get_visible()


# --- the command line ----------------------------------------------------------------------------


def test_folders_alone(tmp_path, capsys):
    """Each gets its own picture, and nothing else happens; without metrics there is none."""
    a, b = run_folder(tmp_path, name="a"), run_folder(tmp_path, name="b", seeds=(2,))
    main(Options(paths=(str(a), str(b))))
    assert capsys.readouterr().out == f"drew {a}/curve.png\ndrew {b}/curve.png\n"
    assert {path.name for path in b.iterdir()} == {"config.json", "eval.csv", "curve.png"}


def test_drawing_needs_no_jax():
    """Whose import takes longer than the pictures that every run draws at its end."""
    code = "import sys, plot; print('jax' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_as_a_command(tmp_path):
    """In a process of its own: another metric; errors without a traceback."""
    run_folder(tmp_path)
    command = [sys.executable, "plot.py", *map(str, tmp_path.glob("*/*/*"))]
    flags = ["--metric", "return", "--iqm", "--published", "--table", str(tmp_path / "a.md")]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == f"wrote {tmp_path}/a.md\n", done.stderr
    assert "| qam | 200.0 [200.0, 200.0] |" in (tmp_path / "a.md").read_text()
    done = subprocess.run([*command, "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "nothing is not" in done.stderr
