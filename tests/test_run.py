"""Tests of runs: flags and their defaults, the run folder and its lock, logs, checkpoints, and
what is left when writing fails."""

import contextlib
import csv
import dataclasses
import errno
import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fmer
import qam
from common.data import Replay
from common.envs import ONLINE
from common.errors import UserError
from common.run import FREE, Precision, Run, configure, parse, read_checkpoint
from tests import shared_blocks

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Args:
    """A small script's flags."""

    env: str = "pointmaze-medium"
    tasks: tuple[int, ...] = (1,)
    name: str = "default"
    run_dir: str = "runs"
    workers: int = 0
    track: bool = False
    eval_only: bool = False
    compile_cache: str = ""
    precision: Precision = "default"
    log_interval: int = 10
    eval_interval: int = 20
    chunk_length: int = 3
    discount: float = 0.5
    lr: float = 0.25
    hidden_dims: tuple[int, ...] = (8,)


ENV_DEFAULTS = {"cube-triple": dict(lr=0.125, discount=0.75), "pointmaze-medium": dict(lr=0.0625)}


def stops(*words, call, lines=1):
    """`call` ends in SystemExit or UserError, a message of one line that says all of `words`."""
    with pytest.raises((SystemExit, UserError)) as error:
        call()
    message = str(error.value)
    assert message.count("\n") < lines, message
    for word in words:
        assert str(word) in message, f"{word!r} is not in {message!r}"
    return message


# --- flags ---------------------------------------------------------------------------------------


def test_the_precedence_of_defaults():
    """Class, under the domain's protocol, under the script's ENV_DEFAULTS, under the flags."""
    args = configure(Args, ENV_DEFAULTS, "antmaze-giant")
    assert (args.lr, args.discount, args.chunk_length) == (0.25, 0.995, 1)
    args = configure(Args, ENV_DEFAULTS, "cube-triple-noisy-singletask-task4-v0")
    assert (args.lr, args.discount, args.chunk_length, args.tasks) == (0.125, 0.75, 5, (4,))
    assert args.env == "cube-triple-noisy-singletask-task4-v0" and args.hidden_dims == (8,)
    args = configure(Args, ENV_DEFAULTS, "cube-triple", lr=1.0, tasks=(5,))
    assert (args.lr, args.discount, args.tasks) == (1.0, 0.75, (5,))
    assert args == parse(Args, ENV_DEFAULTS, "--env cube-triple --lr 1 --tasks 5".split())


def test_a_flag_that_equals_the_class_default_counts():
    """It beats the protocol and ENV_DEFAULTS, wherever it stands."""
    flags = "--lr 0.25 --discount 0.5 --chunk-length 3 --tasks 1".split()
    for argv in (flags + ["--env", "cube-triple"], ["--env=cube-triple"] + flags):
        args = parse(Args, ENV_DEFAULTS, argv)
        assert args == dataclasses.replace(Args(), env="cube-triple")


def test_both_ways_to_name_the_environment():
    """--env x and --env=x, the last of several; without it, the class's own."""
    both = [parse(Args, ENV_DEFAULTS, f"--env{sign}cube-triple".split()) for sign in " ="]
    assert both[0] == both[1] and both[0].lr == 0.125
    last = parse(Args, ENV_DEFAULTS, "--env scene --env cube-triple".split())
    assert last == both[0]
    none = parse(Args, ENV_DEFAULTS, [])
    assert (none.env, none.lr, none.chunk_length) == ("pointmaze-medium", 0.0625, 5)
    stops("'cube-tripel'", "cube-triple", call=lambda: parse(Args, {}, ["--env", "cube-tripel"]))
    stops("''", call=lambda: parse(Args, {}, ["--env"]))


def test_help_shows_the_environments_defaults(capsys):
    for env, lr, discount in (("cube-triple", "0.125", "0.75"), ("scene", "0.25", "0.99")):
        with pytest.raises(SystemExit):
            parse(Args, ENV_DEFAULTS, ["--env", env, "--help"])
        shown = capsys.readouterr().out
        assert f"default: {lr})" in shown and f"default: {discount})" in shown


def test_all_scripts_defaults_are_possible():
    """Every environment's defaults pass the checks that flags have to pass."""
    for env in [*qam.ENV_DEFAULTS, "cube-single", "antsoccer-arena", "puzzle-4x6", "scene-noisy"]:
        assert parse(qam.Args, qam.ENV_DEFAULTS, ["--env", env]).env == env


# Numbers that may be 0, and what that means; what else some are limited to.
MAY_BE_0 = dict(
    # all methods
    seed="a seed like any other",
    workers="one per core",
    discount="only the next reward counts",
    target_rate="targets that stay",
    # offline methods
    collect="off",
    offline_steps="online from the start",
    online_steps="offline only",
    pessimism="the mean of the critics",
    rho="no expansion",
    entropy_scale="no entropy",
    path_weight="the policy's average is the anchor",
    inv_temp="behaviour cloning",
    edit_scale="no edits",
    fql_alpha="no one-step policy, or no cloning",
    guidance_coef="no guidance",
    noisy_coef="no guidance",
    bc_coef="no cloning",
    rebrac_alpha="no cloning",
    rlpd_alpha="no cloning",
    expectile="the least of the values",
    actor_noise="none",
    noise_clip="no noise",
    # online methods
    reward_scale="no reward counts",
    act_candidates="as many as in the update",
    eta_fixed="it is tuned",
    eta_rate="it stays",
    target_ess="eta grows for ever",
    lambda_rate="lambda stays",
    entropy_until="no entropy from the start",
    policy_ema="no average",
    actor_lr_end="the policy stops at last",
    start_scale="the chain starts at the mean",
    eval_noise="none",
    move_steps="actions stay",
    move_lr="actions stay",
    move_clip="actions stay",
    q_clip="all weights are the same",
    q_rate="the statistics stay",
    q_gradient="none",
    gae_lambda="one step of TD",
    value_weight="the value is not learnt",
    entropy_weight="no bonus",
    entropy_actions="no bonus",
    entropy_start="no bonus",
    entropy_end="no bonus at last",
    renorm_after="from the start",
    explore_noise="the policy itself",
    target_noise="no smoothing",
    target_noise_clip="no smoothing",
)
AT_MOST = dict(tasks=5, discount=1, target_rate=1, policy_ema=1, target_ess=1)
SIGNED = "target_entropy target_entropy_start target_entropy_end noise_entropy".split()


def numbers(script):
    """flag -> a number of its type; of tuples the first one."""
    found = {}
    for name, value in vars(script.Args()).items():
        x = value[0] if isinstance(value, tuple) else value
        if type(x) in (int, float) and name != "action_size":
            found[name] = x
    return found


FITTING = dict(  # values of other flags that neither 1 nor a huge number contradicts
    total_steps=("warmup_steps", 1),
    online_steps=("start_training", 1),
    warmup_steps=("total_steps", 2**31 - 1),
    env_steps_per_update=("total_steps", 2**31 - 1),
)


def flag(script, name, value):
    """The script's value of a flag, or SystemExit."""
    flags = [(name, value)]
    if name in FITTING and hasattr(script.Args, FITTING[name][0]):
        flags.append(FITTING[name])
    argv = [f"--{key.replace('_', '-')}={x}" for key, x in flags]
    value = getattr(parse(script.Args, {}, argv), name)
    return value[0] if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    "script, name",
    [(script, name) for script in (qam, fmer) for name in numbers(script)],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_numbers_that_a_flag_takes(script, name, capsys):
    """Positive numbers, 0 where it means something, negative ones where they do, nothing huge,
    nothing that is not finite: else one line that names the flag and what is possible, or tyro's
    own message."""
    kind, flags = type(numbers(script)[name]), f"--{name.replace('_', '-')} "
    flag = functools.partial(globals()["flag"], script, name)
    assert flag("1") == 1
    if name in MAY_BE_0 or name in SIGNED:
        assert flag("0") == 0
    else:
        stops(flags, "expected", "more than 0", call=lambda: flag("0"))
    top = AT_MOST.get(name, 2**31 - 1)
    assert flag(str(top)) == top
    stops(flags, "expected", f"at most {top}", call=lambda: flag(str(top + 1)))
    stops(flags, "expected", call=lambda: flag(str(10**30)))
    if name in SIGNED:
        assert flag("-1") == -1 and flag(str(-top)) == -top
        stops(flags, "expected", f"{-top}, at most {top}", call=lambda: flag(str(-top - 1)))
    else:
        stops(flags + "-1", "expected", call=lambda: flag("-1"))
    if kind is float:
        for value in ("nan", "inf", "-inf", "1e400", *["-1e-300"] * (name not in SIGNED)):
            stops(flags, "expected", call=lambda value=value: flag(f"{value}"))
    else:
        for value in ("nan", "inf", "0.5", "1e3", "x"):
            with pytest.raises(SystemExit):
                flag(value)
            error = capsys.readouterr().err
            assert value in error and "Traceback" not in error


@pytest.mark.parametrize("name", shared_blocks.named("online"))
def test_numbers_of_online_scripts(name):
    """Of every flag: 1 and 0 are taken or refused in a line that names it; what is negative is
    refused but for entropies, what is not finite always. All environments' defaults are possible.
    """
    script = importlib.import_module(name.replace("/", "."))
    for other, number in numbers(script).items():
        take, dashes = functools.partial(flag, script, other), f"--{other.replace('_', '-')}"
        for value in ("1", "0"):
            try:
                assert take(value) == int(value)
            except SystemExit as error:
                assert dashes in str(error) and "\n" not in str(error)
        if "entropy" not in other or isinstance(number, int) or number > 0:
            stops(dashes, call=lambda take=take: take("-1"))
        elif number < 0:
            assert take("-1") == -1
        if isinstance(number, float):
            stops(dashes, call=lambda take=take: take("nan"))
    for env in ONLINE:
        assert parse(script.Args, script.ENV_DEFAULTS, ["--env", env]).env == env


@pytest.mark.parametrize(
    "script, env, words",
    [
        (fmer, "cube-double", "of the offline methods, this is an online one"),
        (fmer, "cube-triple-noisy-singletask-task2-v0", "of the offline methods"),
        (fmer, "pointmaze-medium", "of the offline methods"),
        (qam, "multigoal", "of the online methods, this is an offline one"),
        (qam, "kitchen-7", "of the online methods"),
    ],
)
def test_environments_of_the_other_family(script, env, words):
    """One line says whose environment it is; --help, too, has no defaults to show."""
    for more in ([], ["--help"]):
        call = lambda more=more: parse(script.Args, script.ENV_DEFAULTS, ["--env", env, *more])
        stops(f"'{env}' is an environment", words, call=call)


def test_online_scripts_know_no_tasks():
    """And no flag of datasets; protocols of the offline environments do not reach them."""
    args = parse(fmer.Args, fmer.ENV_DEFAULTS, ["--env", "kitchen-4"])
    assert args == dataclasses.replace(fmer.Args(), env="kitchen-4")
    for flag in ("--tasks", "--collect", "--sparse", "--chunk-length"):
        with pytest.raises(SystemExit):
            parse(fmer.Args, fmer.ENV_DEFAULTS, [flag, "1"])


@pytest.mark.parametrize(
    "argv", ["--seeed 1", "--seed", "--lr x", "--sparse 3", "1", "--env=scene x"]
)
def test_what_is_no_flag(argv, capsys):
    """tyro says so, without a traceback."""
    with pytest.raises(SystemExit):
        parse(qam.Args, qam.ENV_DEFAULTS, argv.split())
    assert "Traceback" not in capsys.readouterr().err


def test_intervals_need_not_fit_one_another():
    """Scripts stop at the multiples of both; a flag changes only itself."""
    for argv in ("--log-interval 15 --eval-interval 20", "--log-interval 20 --eval-interval 15"):
        args = parse(Args, ENV_DEFAULTS, argv.split())
        assert f"--log-interval {args.log_interval} --eval-interval {args.eval_interval}" == argv


@pytest.mark.parametrize("argv", [["--tasks"], ["--tasks", "1", "1"]])
def test_tasks_that_are_none_or_twice(argv):
    """No agent, or two whose rows cannot be told apart."""
    stops("--tasks", call=lambda: parse(qam.Args, qam.ENV_DEFAULTS, argv))


# --- the folder ----------------------------------------------------------------------------------

AGENTS = [(1, 0), (1, 1), (4, 0)]
DATA = dict(files=["a.npz"], transitions=100)


@pytest.fixture
def run(tmp_path):
    """A function that begins or continues the run: run(flag=value, ...) -> Run."""

    def begin(data=DATA, **flags):
        gc.collect()  # gives up the lock of a run that is no more
        return Run("script", Args(run_dir=str(tmp_path), **flags), AGENTS, data)

    return begin


def table(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_the_folder_says_what_made_it(run, tmp_path):
    """runs/<script>/<env>/<name>/config.json: flags, dataset, commit, device, versions."""
    folder = run(name="mine", hidden_dims=(4, 4)).folder
    assert folder == tmp_path / "script" / "pointmaze-medium" / "mine"
    config = json.loads((folder / "config.json").read_text())
    assert config["flags"]["hidden_dims"] == [4, 4] and config["flags"]["transitions"] == 100
    made = config["made_with"]
    assert {"jax", "numpy", "ogbench"} <= made["packages"].keys() and made["commit"]
    assert made["python"] == sys.version.split()[0] and "1 x" in made["device"]


def test_the_configuration_is_shown(run, capsys):
    """In one line, but for what changes no result."""
    folder = run(hidden_dims=(4, 4), workers=3).folder
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{folder}: | env pointmaze-medium | tasks [1] |")
    assert "| hidden_dims [4, 4] |" in line and "workers" not in line


def test_an_environment_that_nothing_is_tuned_for(capsys):
    parse(Args, ENV_DEFAULTS, ["--env", "cube-single"])
    assert "nothing is tuned for cube-single" in capsys.readouterr().out
    parse(Args, ENV_DEFAULTS, ["--env", "cube-triple-play-singletask-task2-v0"])
    assert not capsys.readouterr().out


@pytest.mark.parametrize("step, words", [(7, "not complete: 7 of 9"), (9, "is complete: 9 of 9")])
def test_the_end_says_whether_all_is_done(run, capsys, step, words):
    run().finish(step, 9, None)
    assert words in capsys.readouterr().out


def test_another_configuration_is_refused(run):
    """The message names each flag that differs with both values, and nothing is touched."""
    first = run(lr=0.5, hidden_dims=(4, 4))
    first.log("train", 10, metrics())
    folder = first.folder
    del first
    before = (folder / "config.json").read_bytes()
    message = stops(
        folder, "lr: 0.5 there, 0.75 now", "hidden_dims: [4, 4] there, [4] now",
        "transitions: 100 there, 99 now", "--name", lines=9,
        call=lambda: run(DATA | dict(transitions=99), lr=0.75, hidden_dims=(4,)),
    )  # fmt: skip
    assert "discount" not in message and (folder / "config.json").read_bytes() == before
    run(lr=0.5, hidden_dims=(4, 4))
    run(lr=0.75, name="other")


def test_before_anything_is_logged_or_saved_flags_may_change(run):
    """A mistaken flag does not lock the folder for the right one; what made a run then stays."""
    path = run(lr=0.5).folder / "config.json"
    first = run(lr=0.75)
    assert json.loads(path.read_text())["flags"]["lr"] == 0.75
    first.log("train", 10, metrics())
    del first
    path.write_text(path.read_text().replace('"python": "', '"python": "0.'))
    before = path.read_bytes()
    run(lr=0.75)
    assert path.read_bytes() == before


def test_a_renamed_folder_goes_on(run):
    folder = logged(run)[0]
    folder.rename(folder.with_name("renamed"))
    assert run(name="renamed").restore(dict(x=np.zeros(3)))[0] == 20


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "../a"])
def test_names_that_are_no_folder(name):
    stops("--name", call=lambda: parse(Args, ENV_DEFAULTS, ["--name", name]))


def test_other_files_in_the_folder_stay(run):
    """Whatever they look like."""
    folder, _ = logged(run)
    (folder / "notes.csv").write_text("who,what,count\nme,x,500\n")
    (folder / "empty.csv").write_text("a,b,c\n")
    run().restore(dict(x=np.zeros(3)))
    assert (folder / "notes.csv").read_text() == "who,what,count\nme,x,500\n"
    assert (folder / "empty.csv").exists()


def test_results_without_a_checkpoint_are_not_overwritten(run):
    """A run has evaluations only after a checkpoint: somebody has removed it."""
    folder, contents = logged(run, "eval")
    (folder / "checkpoint.msgpack").unlink()
    stops(folder, "no checkpoint", "--name", call=lambda: run().restore(dict(x=np.zeros(3))))
    assert (folder / "eval.csv").read_bytes() == contents[2]


def test_signals_are_given_back(run):
    before = [signal.default_int_handler, signal.SIG_DFL]
    for number, handler in zip((2, 15), before):
        signal.signal(number, handler)
    first = run()
    first.restore({})
    assert signal.getsignal(15) != before[1]
    first.finish(1, 1, None)
    assert [signal.getsignal(x) for x in (2, 15)] == before


@pytest.mark.parametrize("text, calls", [("from analysis import runs", 1), ("# of one's own", 0)])
def test_the_picture_is_drawn_where_it_is_missing(run, monkeypatch, tmp_path, text, calls):
    """By our plot.py, not by another one beside a copied script; once."""
    first, drawn = run(), []
    (tmp_path / "plot.py").write_text(text)
    monkeypatch.setattr("common.run.__file__", str(tmp_path / "common" / "run.py"))
    monkeypatch.setattr("common.run.subprocess.run", lambda *x, **_: drawn.append(x))
    first.finish(9, 9, None)
    assert len(drawn) == calls
    (first.folder / "curve.png").touch()
    first.finish(9, 9, None)
    assert len(drawn) == calls


def test_a_flag_that_is_newer_than_the_run(run):
    """Had its default there, by which the run may be continued."""
    first = run()
    first.log("train", 10, metrics())
    path = first.folder / "config.json"
    del first
    config = json.loads(path.read_text())
    assert config["flags"].pop("precision") == "default"
    path.write_text(json.dumps(config))
    run()
    stops(path.parent, "precision: default there, float32 now", lines=4,
          call=lambda: run(precision="float32"))  # fmt: skip


def test_flags_that_change_no_result_may_differ(run):
    """The number of workers, where the runs and the data are, ..."""
    assert {"workers", "run_dir", "dataset_dir", "eval_slots", "eval_only", "track"} <= {*FREE}
    assert not {"env", "tasks", "seed", "lr", "offline_steps", "eval_interval"} & {*FREE}
    folder = run(workers=1).folder
    assert run(workers=2).folder == folder


def test_a_second_process_is_refused(run, tmp_path):
    """While the first one is there; its lock is gone with it, however it ends."""
    first = run()
    code = f"""
from tests.test_run import AGENTS, DATA, Args, Run
Run("script", Args(run_dir={str(tmp_path)!r}), AGENTS, DATA)
"""
    command = [sys.executable, "-c", code]
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 1 and str(first.folder) in second.stderr
    assert "another process" in second.stderr and second.stderr.count("\n") == 1
    del first
    gc.collect()
    killed = code + "import os; os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", killed], cwd=ROOT).returncode == -9
    run()


# --- logs ----------------------------------------------------------------------------------------


def metrics(offset=0.0):
    return dict(loss=offset + np.arange(3) / 3, q=jnp.arange(3) + jnp.float32(offset))


def test_a_row_per_agent_under_one_header(run):
    """Numbers lose no digit."""
    first = run()
    for step in (10, 20):
        first.log("train", step, metrics(step))
    head, *rows = table(first.folder / "train.csv")
    assert head == ["task", "seed", "step", "seconds", "loss", "q"] and len(rows) == 6
    for i, row in enumerate(rows):
        task, seed, step, seconds, loss, q = map(float, row)
        assert (task, seed) == AGENTS[i % 3] and step == (10, 20)[i // 3]
        assert loss == step + i % 3 / 3 and q == step + i % 3 and 0 <= seconds < 60


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_stop_the_run(run, bad, capsys):
    """An agent that has such numbers is named once and is lost; when all are, the line names
    metric, task, seed, step and folder, and nothing is logged."""
    first, values = run(), metrics()
    values["q"] = np.array([0, 0, bad])
    first.save(5, dict(x=np.ones(3)))
    for step in (5, 10):
        first.log("train", step, values)
    (line,) = capsys.readouterr().err.split("\n")[1:-1]
    assert (
        line == "q of task 4, seed 0 is not finite at step 5: this agent is lost, the others go on"
    )
    assert [row[-1] for row in table(first.folder / "train.csv")[1:]] == [
        "0.0",
        "0.0",
        str(bad),
    ] * 2
    before = {path: path.read_bytes() for path in first.folder.iterdir()}
    values["loss"] = np.array([bad, 0, 0])
    values["q"] = np.array([0, bad, 0])  # the last one, in the order of the metrics
    words = "q of", "task 1", "seed 1", "step 15", first.folder
    stops(*words, call=lambda: first.log("train", 15, values))
    assert before == {path: path.read_bytes() for path in first.folder.iterdir()}


@pytest.mark.parametrize("fails", ["init", "log", ""])
def test_weights_and_biases(run, monkeypatch, capsys, fails):
    """Gets every number of every agent; when it fails, one line says so, and the run goes on."""
    seen = []

    def log(numbers, step):
        if fails == "log" and step == 20:
            raise OSError("no route to host")
        seen.append((step, numbers))

    def init(**arguments):
        if fails == "init":
            raise RuntimeError("not logged in")
        return SimpleNamespace(log=log)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    first = run(track=True)
    for step in (10, 20, 30):
        first.log("train", step, metrics(step))
    steps = dict(init=[], log=[10])[fails] if fails else [10, 20, 30]
    assert [step for step, _ in seen] == [step for step in steps for _ in AGENTS]
    if seen:
        expected = {"train/task1-seed1/loss": 10 + 1 / 3, "train/task1-seed1/q": 11.0}
        assert seen[1][1] == pytest.approx(expected)
    said = capsys.readouterr().err
    assert said.count("W&B failed, the run goes on without it: no") == bool(fails)
    assert len(table(first.folder / "train.csv")) == 10


def logged(run, name="train"):
    """Rows of steps 10, 20, 30 and a checkpoint of step 20 -> the files' bytes after each step."""
    first, contents = run(), []
    for step in (10, 20, 30):
        first.log(name, step, metrics(step))
        contents.append((first.folder / f"{name}.csv").read_bytes())
        if step == 20:
            first.save(step, dict(x=np.ones(3)))
    return first.folder, contents


@pytest.mark.parametrize("name", ["train", "eval"])
def test_rows_after_the_checkpoint_are_dropped(run, name):
    """Those before it are kept byte for byte, and the log goes on as if nothing had happened."""
    folder, contents = logged(run, name)
    second = run()
    assert second.restore(dict(x=np.zeros(3)))[0] == 20
    assert (folder / f"{name}.csv").read_bytes() == contents[1]
    second.log(name, 30, metrics(30))
    strip = lambda path: [row[:3] + row[4:] for row in path]
    (folder / "whole").write_bytes(contents[2])
    assert strip(table(folder / f"{name}.csv")) == strip(table(folder / "whole"))


def test_a_continued_log_has_no_row_twice_or_missing(run):
    """Read as a table."""
    folder, _ = logged(run)
    second = run()
    second.restore(dict(x=np.zeros(3)))
    for step in (30, 40):
        second.log("train", step, metrics(step))
    head, *rows = table(folder / "train.csv")
    assert [int(row[2]) for row in rows] == [10] * 3 + [20] * 3 + [30] * 3 + [40] * 3
    assert all(len(row) == len(head) for row in rows)


def test_without_a_checkpoint_the_log_begins_anew(run):
    first = run()
    first.log("train", 10, metrics())
    folder = first.folder
    del first
    second = run()
    tree = dict(x=np.zeros(3))
    assert second.restore(tree) == (0, tree)
    second.log("train", 10, metrics())
    assert len(table(folder / "train.csv")) == 4 and table(folder / "train.csv")[0][0] == "task"


def test_a_torn_line_is_dropped(run):
    """Wherever the last rows were cut off, the ones before the checkpoint come back."""
    folder, contents = logged(run)
    second = run()
    for cut in range(len(contents[1]), len(contents[2])):
        (folder / "train.csv").write_bytes(contents[2][:cut])
        assert second.restore(dict(x=np.zeros(3)))[0] == 20
        assert len(table(folder / "train.csv")) == 7, contents[2][len(contents[1]) : cut]


@pytest.mark.parametrize("torn", ["", "task,seed,st", "task,seed,step,seconds,loss,q"])
def test_a_torn_header_is_written_again(run, torn):
    """As after a full disk, when the file was created and nothing could be written into it."""
    folder = run().folder
    (folder / "train.csv").write_text(torn)
    second = run()
    second.restore(dict(x=np.zeros(3)))
    second.log("train", 10, metrics())
    head, *rows = table(folder / "train.csv")
    assert head == ["task", "seed", "step", "seconds", "loss", "q"] and len(rows) == 3


# --- checkpoints ---------------------------------------------------------------------------------


@flax.struct.dataclass
class State:
    params: dict
    opt_state: optax.OptState
    key: jax.Array


def state(seed):
    """A tree like a script's: two agents' networks, Adam with clipping, keys, a pool."""
    keys = jax.random.split(jax.random.PRNGKey(seed), 2)
    params = {"critic": {"params": {"Dense_0": {"kernel": jax.random.normal(keys[0], (2, 3, 4))}}}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    opt_state = optimizer.init(params)
    for _ in range(seed):
        _, opt_state = optimizer.update(params, opt_state)
    pool = dict(
        seeds=np.array([1, 2**32 - seed - 1], np.uint32),
        ages=np.array([3, seed], np.int32),
        plans={"0": np.zeros((0, 2), np.float32), "1": np.full((seed, 2), np.float32(np.pi))},
    )
    extra = dict(
        empty=np.zeros((2, 0, 5), np.float32), size=jnp.int32(seed), flags=np.arange(3) > 1
    )
    bits = dict(values=np.float32([np.nan, -0.0, np.inf, 1e-45]), half=jnp.bfloat16([1.5, seed]))
    return dict(state=State(params, opt_state, keys), pool=pool, extra=extra, bits=bits)


def same(first, second):
    """Equal in structure, types, shapes and bits."""
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second)):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_a_checkpoint_comes_back_bit_by_bit(run):
    """Optax states, keys, nested dicts, empty arrays, NaN and -0; the template's values and the
    lengths of its arrays do not matter."""
    first = run()
    first.save(7, state(5))
    first.save(70, state(3))
    del first
    step, tree = run().restore(state(1))
    assert step == 70
    same(tree, state(3))


def test_time_goes_on_after_a_restart(run):
    """The column `seconds` counts what the earlier processes took."""
    first = run()
    first.start -= 1000
    first.save(10, {})
    del first
    second = run()
    second.restore({})
    second.log("train", 20, metrics())
    assert 1000 <= float(table(second.folder / "train.csv")[1][3]) < 1010


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_write_that_fails_leaves_the_old_file(run, monkeypatch, function, code):
    """One line with the file and the reason; then the run continues from the old checkpoint."""

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    first = run()
    first.save(10, dict(x=np.arange(3)))
    before = (first.folder / "checkpoint.msgpack").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        save = functools.partial(first.save, 20, dict(x=np.zeros(3, int)))
        stops("checkpoint.msgpack", first.folder, os.strerror(code), call=save)
    assert (first.folder / "checkpoint.msgpack").read_bytes() == before
    del first, save
    second = run()
    step, tree = second.restore(dict(x=np.zeros(3, int)))
    assert step == 10 and tree["x"].tolist() == [0, 1, 2]
    second.save(20, tree)
    assert sorted(path.name for path in second.folder.iterdir() if path.name[0] != ".") == [
        "checkpoint-before.msgpack",
        "checkpoint.msgpack",
        "config.json",
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_stops_the_log_in_one_line(run):
    first = run()
    (first.folder / "train.csv").symlink_to("/dev/full")
    log = lambda: first.log("train", 10, metrics())
    stops("train.csv", first.folder, os.strerror(errno.ENOSPC), call=log)


def damages(content):
    """The content cut off at several places, and with one bit flipped in many."""
    yield from (content[:kept] for kept in (0, 1, 10, 31, 32, 100, len(content) // 2, -1))
    generator = np.random.default_rng(0)
    for at in generator.integers(len(content), size=100):
        yield content[:at] + bytes([content[at] ^ 1 << generator.integers(8)]) + content[at + 1 :]


def test_a_damaged_checkpoint(run):
    """One line that names the file; it is left as it is."""
    first = run()
    first.save(10, state(2))
    path = first.folder / "checkpoint.msgpack"
    for content in damages(path.read_bytes()):
        path.write_bytes(content)
        stops(path, "damaged", call=lambda: first.restore(state(2)))
        assert path.read_bytes() == content


def test_the_checkpoint_before_a_damaged_one(run, capsys):
    """Is taken, and a line says so; rows after it are dropped."""
    first = run()
    for step in (10, 20):
        first.log("train", step, metrics(step))
        first.save(step, state(step // 10))
    path = first.folder / "checkpoint.msgpack"
    log = (first.folder / "train.csv").read_bytes()
    capsys.readouterr()
    for content in damages(path.read_bytes()):
        path.write_bytes(content)
        (first.folder / "train.csv").write_bytes(log)
        step, tree = first.restore(state(3))
        assert step == 10 and first.last["train"] == 10
        same(tree, state(1))
        assert len(table(first.folder / "train.csv")) == 4
        said = capsys.readouterr().out
        assert f"{path} is damaged" in said and "step 10" in said and said.count("\n") == 1
    path.unlink()  # as if the power had failed between the two renamings
    assert first.restore(state(3))[0] == 10


# --- a replay in parts ---------------------------------------------------------------------------


SPACES = SimpleNamespace(observations=np.zeros(3), actions=np.zeros(2))


def played(replay, count):
    """`count` more transitions, the numbers of which they hold."""
    for _ in range(count):
        rows = {name: np.float32(replay.size[0]) for name in vars(replay) if name != "size"}
        shape = lambda name, replay=replay: (2, 1, *getattr(replay, name).shape[2:])
        replay = replay.append({name: np.full(shape(name), x) for name, x in rows.items()})
    return replay


def parts(folder):
    """Number of transitions that each file holds of a replay."""
    read = lambda path: read_checkpoint(path)["rewards"].shape[1]
    paths = [path for path in folder.glob("replay-*.msgpack") if path.stem[7:].isdigit()]
    return {int(path.stem[7:]): read(path) for path in paths}


@pytest.fixture
def begun(run):
    """A run with checkpoints at 3, 5 and 9 transitions of 100."""
    first, replay = run(), Replay.create(2, 100, SPACES)
    for step, count in ((10, 3), (20, 2), (30, 4)):
        replay = played(replay, count)
        first.save(step, dict(x=np.full(3, step), replay=replay))
    return first.folder, jax.device_get(replay)


def restored(run, slots=100):
    return run().restore(dict(x=np.zeros(3), replay=Replay.create(2, slots, SPACES)))


def test_a_checkpoint_writes_what_is_new_of_the_replay(begun, run):
    """Each part once; the run continues with all of it, and adds to it. A checkpoint of the same
    replay adds nothing, one of an empty replay has no part."""
    folder, replay = begun
    assert parts(folder) == {3: 3, 5: 2, 9: 4}
    second = run()
    step, tree = second.restore(dict(x=np.zeros(3), replay=Replay.create(2, 100, SPACES)))
    assert step == 30 and tree["x"].tolist() == [30] * 3
    same(tree["replay"], replay)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("replay-*")}
    second.save(30, tree)
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("replay-*")}
    second.save(40, tree | dict(replay=played(tree["replay"], 1)))
    assert parts(folder) == {3: 3, 5: 2, 9: 4, 10: 1}
    empty = run(name="empty")
    empty.save(10, dict(replay=Replay.create(2, 0, SPACES)))
    assert not parts(empty.folder)
    step, tree = empty.restore(dict(replay=Replay.create(2, 0, SPACES)))
    assert step == 10 and tree["replay"].size.tolist() == [0, 0]


def test_the_replay_of_a_later_phase(begun, run, tmp_path):
    """A script that begins with a replay without slots goes on with the one that is there, or with
    none, where the first checkpoint of that phase is damaged."""
    same(restored(run, slots=0)[1]["replay"], begun[1])
    first = run(name="two phases")
    first.save(10, dict(x=np.ones(3), replay=Replay.create(2, 0, SPACES)))
    first.save(20, dict(x=np.ones(3), replay=played(Replay.create(2, 9, SPACES), 2)))
    (first.folder / "replay-2.msgpack").write_bytes(b"")
    step, tree = first.restore(dict(x=np.zeros(3), replay=Replay.create(2, 0, SPACES)))
    assert step == 10 and tree["replay"].rewards.shape == (2, 0)
    assert tree["replay"].size.tolist() == [0, 0]


def test_an_evaluation_needs_no_replay(begun, run):
    """--eval-only reads no part, and plays no running episode to its step."""
    folder, _ = begun
    for path in folder.glob("replay-*"):
        path.unlink()
    tree = dict(x=np.zeros(3), replay=Replay.create(2, 100, SPACES), pool=dict(ages=np.zeros(2)))
    other = run(name="pool")
    other.save(10, tree | dict(pool=dict(ages=np.ones(2))))
    del other
    step, found = run(name="pool", eval_only=True).restore(tree)
    assert step == 10 and found["pool"]["ages"].tolist() == [0, 0]
    assert found["replay"] is tree["replay"]
    del tree["pool"]
    step, found = run(eval_only=True).restore(tree)
    assert step == 30 and found["x"].tolist() == [30] * 3


def test_parts_that_are_overwritten_are_removed(run, monkeypatch):
    """Once neither checkpoint needs them, with what killed writes left; other files stay, and what
    cannot be removed. Without a replay nothing is removed."""
    first, replay = run(), Replay.create(2, 5, SPACES)
    names = "of-mine.msgpack", "3.csv", "x.npz", "3.msgpack.bak"
    others = [first.folder / f"replay-{name}" for name in names]
    for name in ("77.msgpack", "2.msgpack.tmp"):
        (first.folder / f"replay-{name}").touch()
    for path in others:
        path.touch()
    first.save(0, {})
    assert (first.folder / "replay-77.msgpack").exists()
    sizes = {
        3: [3],
        6: [3, 6],
        7: [3, 6, 7],
        8: [3, 6, 7, 8],
        9: [6, 7, 8, 9],
        19: [6, 7, 8, 9, 19],
    }
    for size, expected in (sizes | {20: [19, 20]}).items():
        replay = played(replay, size - int(replay.size[0]))
        first.save(size, dict(replay=replay))
        assert sorted(parts(first.folder)) == expected
        again = first.restore(dict(replay=Replay.create(2, 5, SPACES)))[1]["replay"]
        same(again, jax.device_get(replay))
    assert parts(first.folder) == {19: 5, 20: 1}
    names = {path.name for path in first.folder.glob("replay*")}
    assert names == {path.name for path in others} | {"replay-19.msgpack", "replay-20.msgpack"}

    def busy(path, **_):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(Path, "unlink", busy)
    for _ in range(2):
        replay = played(replay, 7)
        first.save(30, dict(replay=replay))
    assert sorted(parts(first.folder)) == [19, 20, 27, 34]


def test_a_damaged_part(begun, run, capsys):
    """Of the last checkpoint alone: the one before is taken. Of both, or missing: one line that
    names both checkpoints and the part, and everything stays."""
    folder, _ = begun
    new, old = folder / "replay-9.msgpack", folder / "replay-3.msgpack"
    whole = new.read_bytes(), old.read_bytes()
    for content in [*damages(whole[0])][::6]:
        new.write_bytes(content)
        step, tree = restored(run)
        assert step == 20 and tree["x"].tolist() == [20] * 3
        assert tree["replay"].size.tolist() == [5, 5]
        assert tree["replay"].rewards[0, :5].tolist() == [0, 1, 2, 3, 4]
        said = capsys.readouterr().out
        assert "checkpoint.msgpack is damaged" in said and "step 20" in said
    new.write_bytes(whole[0])
    for content in (whole[1][:-1], whole[1][:40], None):
        old.unlink() if content is None else old.write_bytes(content)
        words = "checkpoint.msgpack", "checkpoint-before.msgpack", "replay-3.msgpack"
        stops(*words, call=lambda: restored(run))
        assert old.exists() == (content is not None) and new.read_bytes() == whole[0]


def test_on_from_the_checkpoint_before(begun, run):
    """The damaged one's part is written again where the run comes by."""
    folder, replay = begun
    (folder / "replay-9.msgpack").write_bytes(b"")
    second = run()
    step, tree = second.restore(dict(x=np.zeros(3), replay=Replay.create(2, 100, SPACES)))
    second.save(30, tree | dict(replay=played(tree["replay"], 4)))
    del second
    assert parts(folder) == {3: 3, 5: 2, 9: 4}
    same(restored(run)[1]["replay"], replay)


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_damaged_checkpoint_replaces_no_good_one(begun, run, monkeypatch, done):
    """Killed after so many renamings, when it had gone on from the one before: that one is still
    there, or the new one already."""
    folder, _ = begun
    (folder / "checkpoint.msgpack").write_bytes(b"")
    second, replace, calls = run(), os.replace, []
    template = lambda: dict(x=np.zeros(3), replay=Replay.create(2, 100, SPACES))
    step, tree = second.restore(template())
    tree["replay"] = played(jax.tree.map(jnp.array, tree["replay"]), 4)

    def killed(*paths):
        if len(calls) == done:
            raise KeyboardInterrupt
        calls.append(paths)
        replace(*paths)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        second.save(30, tree)
    step, tree = second.restore(template())
    assert (step, tree["replay"].size[0]) == ((30, 9) if done == 2 else (20, 5))


def test_a_part_that_cannot_be_written(begun, run, monkeypatch):
    """One line with file and reason, and the run continues from the old checkpoint."""
    folder, replay = begun

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    second = run()
    step, tree = second.restore(dict(x=np.zeros(3), replay=Replay.create(2, 100, SPACES)))
    save = functools.partial(second.save, 40, dict(replay=played(tree["replay"], 1)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        stops("replay-10.msgpack", folder, call=save)
    del second, save
    step, tree = restored(run)
    assert step == 30
    same(tree["replay"], replay)


@pytest.mark.parametrize("bad", [b"1,0,x,0.1,0.5,0.5", b"1,1", b"\xff"])
def test_a_damaged_row(run, bad):
    """A row that is not the last and has no step: one line that names the file, which stays."""
    folder, contents = logged(run)
    damaged = contents[1].replace(b"\n1,1,10,", b"\n" + bad + b"\n1,1,10,")
    (folder / "train.csv").write_bytes(damaged)
    stops(folder, "train.csv", call=lambda: run().restore(dict(x=np.zeros(3))))
    assert (folder / "train.csv").read_bytes() == damaged


def test_rows_of_some_agents_alone_are_dropped(run):
    """An evaluation is logged after its checkpoint: stopped within its rows, it is not there."""
    first = run()
    first.save(20, dict(x=np.ones(3)))
    for step in (10, 20):
        first.log("eval", step, metrics(step))
    lines = (first.folder / "eval.csv").read_text().splitlines(keepends=True)
    for rows in range(4, 8):
        (first.folder / "eval.csv").write_text("".join(lines[:rows]))
        first.last.clear()
        first.restore(dict(x=np.zeros(3)))
        assert first.last["eval"] == (20 if rows == 7 else 10)
        kept = (first.folder / "eval.csv").read_text().splitlines(keepends=True)
        assert kept == lines[: 7 if rows == 7 else 4]


def test_a_checkpoint_of_something_else(run):
    """Whose tree does not fit."""
    first = run()
    first.save(10, dict(x=np.ones(3)))
    path = first.folder / "checkpoint.msgpack"
    stops(path, call=lambda: first.restore(dict(y=np.ones(3))))


def test_a_damaged_configuration(run):
    folder = logged(run)[0]
    (folder / "config.json").write_text('{"flags": {"lr"')
    stops(folder, "config.json", call=run)


def test_a_folder_that_cannot_be_written(run, tmp_path):
    """A file in its place, a folder without permission: one line, no traceback."""
    (tmp_path / "script").write_text("")
    stops("cannot use", tmp_path / "script", call=run)
    (tmp_path / "script").unlink()
    (tmp_path / "script").mkdir()
    if os.geteuid():  # root may write everywhere
        (tmp_path / "script").chmod(0o555)
        stops("cannot use", tmp_path / "script", "Permission denied", call=run)
        (tmp_path / "script").chmod(0o755)
    if Path("/proc/self").exists():
        args = Args(run_dir="/proc/self")
        stops("cannot use", "/proc/self", call=lambda: Run("script", args, AGENTS, DATA))
