"""Tests of flags: defaults of environments, ranges beside the flags, help, and errors that end in
one line."""

import dataclasses
import functools
import importlib
import re
import subprocess
import sys
from typing import Annotated

import pytest

import fmer
import meam
import qam
from common.environments import ONLINE
from common.errors import UserError
from common.flags import (
    PositiveInt,
    Range,
    Tracking,
    configure,
    launch,
    parse,
)
from tests.helpers.messages import stops
from tests.helpers.numbers import MAY_BE_0, SIGNED, numbers
from tests.helpers.small_run import ENV_DEFAULTS, Args
from tools import shared_blocks

LARGEST = 2**31 - 1

# --- defaults of environments --------------------------------------------------------------------


def test_the_precedence_of_defaults():
    """Class, under the domain's protocol, under the script's ENV_DEFAULTS, under the flags."""
    args = configure(Args, ENV_DEFAULTS, "antmaze-giant")
    assert (args.lr, args.discount, args.chunk_length) == (0.25, 0.995, 1)
    args = configure(Args, ENV_DEFAULTS, "cube-triple-noisy-singletask-task4-v0")
    assert (args.lr, args.discount, args.chunk_length, args.tasks) == (0.125, 0.75, 5, (4,))
    assert args.env == "cube-triple-noisy-singletask-task4-v0" and args.hidden_dims == (8,)
    args = configure(Args, ENV_DEFAULTS, "cube-triple", lr=1.0, tasks=(5,))
    assert (args.lr, args.discount, args.tasks) == (1.0, 0.75, (5,))
    parsed = parse(Args, ENV_DEFAULTS, "--env cube-triple --lr 1 --tasks 5".split())
    assert parsed == dataclasses.replace(args, name="lr=1.0,tasks=5")


def test_a_flag_that_equals_the_class_default_counts():
    """It beats the protocol and ENV_DEFAULTS, wherever it stands."""
    flags = "--lr 0.25 --discount 0.5 --chunk-length 3 --tasks 1 --name x".split()
    for argv in (flags + ["--env", "cube-triple"], ["--env=cube-triple"] + flags):
        args = parse(Args, ENV_DEFAULTS, argv)
        assert args == dataclasses.replace(Args(), env="cube-triple", name="x")


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


def test_all_scripts_defaults_are_possible():
    """Every environment's defaults pass the checks that flags have to pass."""
    others = ["cube-single", "antsoccer-arena", "puzzle-4x6", "scene-noisy"]
    for env in [*qam.ENV_DEFAULTS, *others]:
        assert parse(qam.Args, qam.ENV_DEFAULTS, ["--env", env]).env == env


def test_an_environment_that_nothing_is_tuned_for(capsys):
    parse(Args, ENV_DEFAULTS, ["--env", "cube-single"])
    assert "No tuned hyperparameters for cube-single" in capsys.readouterr().out
    parse(Args, ENV_DEFAULTS, ["--env", "cube-triple-play-singletask-task2-v0"])
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "script, env, words",
    [
        (fmer, "cube-double", "an offline environment; this script is online. Try meam.py"),
        (fmer, "cube-triple-noisy-singletask-task2-v0", "an offline environment"),
        (fmer, "pointmaze-medium", "an offline environment"),
        (qam, "multigoal", "an online environment; this script is offline. Try fmer.py"),
        (qam, "Hopper-v5", "an online environment; this script is offline. Try fmer.py"),
        (qam, "kitchen-7", "an online environment"),
    ],
)
def test_environments_of_the_other_family(script, env, words):
    """One line says whose environment it is; --help, too, has no defaults to show."""
    for more in ([], ["--help"]):
        call = functools.partial(parse, script.Args, script.ENV_DEFAULTS, ["--env", env, *more])
        stops(f"--env {env} is {words}", call=call)


def test_online_scripts_know_no_tasks():
    """And no flag of datasets; protocols of the offline environments do not reach them."""
    args = parse(fmer.Args, fmer.ENV_DEFAULTS, ["--env", "kitchen-4"])
    assert args == dataclasses.replace(fmer.Args(), env="kitchen-4", name="default")
    for flag in ("--tasks", "--collect", "--sparse", "--chunk-length"):
        with pytest.raises(SystemExit):
            parse(fmer.Args, fmer.ENV_DEFAULTS, [flag, "1"])


# --- ranges --------------------------------------------------------------------------------------

AT_MOST = dict(tasks=5, discount=1, target_rate=1, policy_ema=1, target_ess=1)
FITTING = dict(  # values of other flags that neither 1 nor a huge number contradicts
    total_steps=("warmup_steps", 1),
    online_steps=("start_training", 1),
    warmup_steps=("total_steps", LARGEST),
    env_steps_per_update=("total_steps", LARGEST),
)


def dashes(name):
    return "--" + name.replace("_", "-")


def flag(script, name, value):
    """The script's value of a flag. Raises UserError."""
    flags = [(name, value)]
    if name in FITTING and hasattr(script.Args, FITTING[name][0]):
        flags.append(FITTING[name])
    argv = [f"{dashes(key)}={x}" for key, x in flags]
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
    take = functools.partial(flag, script, name)
    begin = f"{dashes(name)} must be "
    assert take("1") == 1
    if name in MAY_BE_0 or name in SIGNED:
        assert take("0") == 0
    else:
        stops(begin, call=lambda: take("0"))
    top = AT_MOST.get(name, LARGEST)
    assert take(str(top)) == top
    stops(begin, f"at most {top:,}", f"but is {top + 1}", call=lambda: take(str(top + 1)))
    stops(begin, call=lambda: take(str(10**30)))
    if name in SIGNED:
        assert take("-1") == -1 and take(str(-top)) == -top
        stops(begin, f"at least {-top}", f"at most {top:,}", call=lambda: take(str(-top - 1)))
    else:
        stops(begin, "but is -1", call=lambda: take("-1"))
    if isinstance(numbers(script)[name], float):
        tiny = [] if name in SIGNED else ["-1e-300"]
        for value in ("nan", "inf", "-inf", "1e400", *tiny):
            stops(begin, call=functools.partial(take, value))
    else:
        for value in ("nan", "inf", "0.5", "1e3", "x"):
            with pytest.raises(SystemExit):
                take(value)
            error = capsys.readouterr().err
            assert value in error and "Traceback" not in error


@pytest.mark.parametrize("name", shared_blocks.named("online"))
def test_numbers_of_online_scripts(name):
    """Of every flag: 1 and 0 are taken or refused in a line that names it; what is negative is
    refused except for entropies, what is not finite always. All environments' defaults are
    possible."""
    script = importlib.import_module(name.replace("/", "."))
    for other, number in numbers(script).items():
        take = functools.partial(flag, script, other)
        for value in ("1", "0"):
            try:
                assert take(value) == int(value)
            except UserError as error:
                assert dashes(other) in str(error) and "\n" not in str(error)
        if "entropy" not in other or isinstance(number, int) or number > 0:
            stops(dashes(other), call=functools.partial(take, "-1"))
        elif number < 0:
            assert take("-1") == -1
        if isinstance(number, float):
            stops(dashes(other), call=functools.partial(take, "nan"))
    for env in ONLINE:
        assert parse(script.Args, script.ENV_DEFAULTS, ["--env", env]).env == env


@dataclasses.dataclass(frozen=True)
class Copied:
    """The flags of a copied script, in which somebody has added some."""

    # --- my method's flags, fine-tuned ---
    lr: float = 0.25
    hidden_dims: tuple[PositiveInt, ...] = (8,)
    margin: Annotated[float, Range(-1, 0.5)] = -0.5  # A flag that may be negative.
    strict: Annotated[int, Range(3, "limit", exclusive=True)] = 4
    limit: int = 9
    free: float = 0.0  # One without a range.
    # --- run ---
    env: str = "pointmaze-medium"
    tasks: tuple[int, ...] = (1,)
    name: str = ""
    run_dir: str = "runs"
    workers: int = 0
    track: Tracking = ""
    eval_only: bool = False
    eval_episodes: int = 2
    compile_cache: str = ""
    precision: str = "default"
    log_interval: int = 10
    eval_interval: int = 20
    chunk_length: int = 3
    discount: float = 0.5


@pytest.mark.parametrize(
    "argv, value",
    [
        ("--margin=-1", -1),
        ("--margin 0.5", 0.5),
        ("--margin -0.25", -0.25),
        ("--strict 9", 9),
        ("--strict 1000 --limit 0", 1000),  # 0 switches the other flag's phase off
        ("--strict 1000 --limit 1000", 1000),
        ("--hidden-dims 4 5", (4, 5)),
        ("--free -1e6", -1e6),
        (f"--free {LARGEST}", LARGEST),
    ],
)
def test_a_new_flag_in_a_copied_script(argv, value):
    """Needs nothing but its line, with a range beside it or none."""
    name = argv.split()[0].partition("=")[0][2:].replace("-", "_")
    assert getattr(parse(Copied, {}, argv.split()), name) == value


@pytest.mark.parametrize(
    "argv, message",
    [
        ("--margin=-1.01", "--margin must be at least -1 and at most 0.5, but is -1.01"),
        ("--margin=0.51", "--margin must be at least -1 and at most 0.5, but is 0.51"),
        ("--margin nan", "--margin must be at least -1 and at most 0.5, but is nan"),
        ("--strict 3", "--strict must be greater than 3 and at most 9 (--limit), but is 3"),
        ("--strict 10", "--strict must be greater than 3 and at most 9 (--limit), but is 10"),
        ("--hidden-dims 4 0", "--hidden-dims must be greater than 0"),
        ("--hidden-dims", "--hidden-dims needs at least one value"),
        ("--free inf", "at most 2,147,483,647, but is inf"),
        ("--free -1e10", "--free must be at least -2147483647"),
    ],
)
def test_a_new_flag_out_of_its_range(argv, message):
    stops(message, call=lambda: parse(Copied, {}, argv.split()))


def test_the_default_of_a_new_flag_is_checked_too():
    """A default of ENV_DEFAULTS as well, where nothing is typed."""
    env_defaults = {"pointmaze-medium": dict(margin=2.0)}
    stops("--margin", "but is 2.0", call=lambda: parse(Copied, env_defaults, []))


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


def test_own_data_of_no_environment():
    """As of `--env "$UNSET"`."""
    stops("--env needs the name", call=lambda: parse(meam.Args, {}, ["--dataset=x.npz", "--env="]))


def test_own_data_without_a_value(capsys):
    """The message is that of every flag, not of the first look at the command line."""
    with pytest.raises(SystemExit):
        parse(meam.Args, meam.ENV_DEFAULTS, ["--dataset"])
    said = capsys.readouterr()
    assert "--dataset" in said.out + said.err and "[--env" not in said.out + said.err


# --- help ----------------------------------------------------------------------------------------


def shown(script, argv, capsys):
    """What --help shows, without boxes and line breaks."""
    with pytest.raises(SystemExit) as end:
        parse(script.Args, script.ENV_DEFAULTS, [*argv, "--help"])
    assert end.value.code in (0, None)
    words = re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out)
    return " ".join(words.split())


@pytest.fixture
def this_script():
    """This file as a script."""
    return sys.modules[__name__]


def test_help_shows_the_environments_defaults(capsys, this_script):
    for env, lr, discount in (("cube-triple", "0.125", "0.75"), ("scene", "0.25", "0.99")):
        text = shown(this_script, ["--env", env], capsys)
        assert f"default: {lr})" in text and f"default: {discount})" in text


def test_help_begins_with_the_header_and_has_groups(capsys, monkeypatch):
    """The paragraphs of the docstring before its commands, then a box for each group of flags, in
    the order of the class; the comments, on a flag's line or above it, are the help."""
    monkeypatch.setenv("COLUMNS", "100")  # one box below the other
    text = shown(meam, [], capsys)
    assert "ME-AM: Maximum Entropy Adjoint Matching" in text
    assert "pi(a|s) ~ pi_mix(a|s)" in text
    assert "python meam.py" not in text and "Shapes: B batch" not in text
    words = ["method options", "--rho", "--flow-steps"]
    words += ["networks-and-optimiser options", "--hidden-dims", "--grad-clip"]
    words += ["environment-and-data options", "--env", "--sparse"]
    words += [" run options", "--seed", "--compile-cache"]
    words += ["logging options", "--name", "--track"]
    places = [text.index(word) for word in words]
    assert places == sorted(places)
    assert "Share of the base flow's targets that come from the expansion actor." in text
    assert "Tasks 1 to 5, trained at once on one copy of the data (default" in text
    assert "action-size" not in text


def test_help_of_comments_over_several_lines(capsys, this_script):
    text = shown(this_script, [], capsys)
    assert "Hidden-layer widths of all networks." in text and "Learning rate." in text


# --- the end of a script -------------------------------------------------------------------------

ENDS = """
import sys
from common.errors import UserError
from common.flags import launch
from tests.helpers.small_run import Args, ENV_DEFAULTS

def main(args):
    print("begun", args.name)
    {}

launch(main, Args, ENV_DEFAULTS)
"""


@pytest.mark.parametrize(
    "line, code, said",
    [
        ("pass", 0, ""),
        ("raise UserError('the flag is wrong')", 1, "error: the flag is wrong"),
        ("raise KeyboardInterrupt", 1, "\ninterrupted"),
        ("raise MemoryError", 1, "error: out of memory. Lower --num-seeds"),
        ("raise SystemExit('it is saved')", 1, "it is saved"),
        ("raise ValueError('a bug')", 1, "Traceback"),
    ],
)
def test_how_a_script_ends(line, code, said, tmp_path):
    """A mistake, Ctrl-C and a lack of memory in one line; a bug in a traceback; what was printed
    is there in any case."""
    command = [sys.executable, "-c", ENDS.format(line)]
    end = subprocess.run(command, cwd=shared_blocks.ROOT, capture_output=True, text=True)
    assert (end.returncode, end.stdout) == (code, "begun default\n")
    assert end.stderr.startswith(said) and ("Traceback" in end.stderr) == (said == "Traceback")
    assert said == "Traceback" or end.stderr.strip().count("\n") == 0


def test_a_mistake_in_the_flags_ends_in_a_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", "--lr", "nan"])
    with pytest.raises(SystemExit, match="^error: --lr must be .* but is nan$"):
        launch(print, Args, ENV_DEFAULTS)
