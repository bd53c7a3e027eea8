"""Faults in flags: every numeric flag of every script at 0, -1, huge, NaN and no number at all,
contradictions, unknown environments, a machine without enough memory. Whatever a user types ends in
a line that names the flag, never in a traceback."""

import dataclasses
import functools
import importlib
import io
import os
import subprocess
import sys
import time
from typing import get_args, get_origin, get_type_hints

import jax.numpy as jnp
import numpy as np
import pytest

from common.environments import ONLINE, resolve
from common.errors import UserError
from common.flags import Range, launch, parse
from tests.helpers.messages import stops
from tests.helpers.numbers import MAY_BE_0, SIGNED, numbers
from tools import shared_blocks

SCRIPTS = shared_blocks.named("offline") + shared_blocks.named("online")
CHANGES = int(os.environ.get("FAULTS", 300))  # misspelt environments


def module(name):
    return importlib.import_module(name.replace("/", "."))


def refused(name, argv, *words):
    """The flags are refused in one short line with these words. Returns it."""
    script = module(name)
    line = stops(*words, call=lambda: parse(script.Args, script.ENV_DEFAULTS, argv))
    assert len(line) < 500, line
    return line


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_numbers_of_every_flag(name, monkeypatch):
    """At 0, -1, 2**40, 1e30, NaN and infinity, of floats also just below 0: accepted at 0 where the
    table says why, below 0 where the sign means something, else refused in a line with the flag
    (by `parse` or the script's own checks; tyro, which refuses other types, comes next)."""
    script = module(name)
    for flag, x in numbers(script).items():
        dashes = "--" + flag.replace("_", "-")
        values = [0, -1, 2**40] + [-1e-300, 1e30, np.nan, np.inf, -np.inf] * isinstance(x, float)
        for value in map(type(x), values):

            def typed(Args, defaults, argv, flag=flag, value=value):
                tuples = isinstance(getattr(defaults, flag), tuple)
                return dataclasses.replace(defaults, **{flag: (value,) if tuples else value})

            monkeypatch.setattr("common.flags.read_command_line", typed)
            zero = flag in MAY_BE_0 and (name, flag) != ("baselines/rlpd", "online_steps")
            allowed = value == 0 and zero or flag in SIGNED and abs(value) <= 1
            try:
                taken = getattr(parse(script.Args, script.ENV_DEFAULTS, []), flag)
                assert allowed and taken in (value, (value,)), f"{dashes} {value} is accepted"
            except UserError as error:
                line = str(error)
                assert not allowed, line
                assert dashes in line and "\n" not in line, line


def range_of(script, flag):
    """The range beside a flag, None where there is none."""
    annotation = get_type_hints(script.Args, include_extras=True)[flag]
    if get_origin(annotation) is tuple:
        annotation = get_args(annotation)[0]
    found = [x for x in getattr(annotation, "__metadata__", ()) if isinstance(x, Range)]
    assert len(found) <= 1
    return found[0] if found else None


def test_every_flag_has_a_range():
    """Beside it in its script; the flags that may be 0 are those of the table, and those without a
    range the signed ones. The table explains nothing in vain."""
    found = dict(positive=set(), zero=set(), signed=set())
    for name in SCRIPTS:
        for flag in numbers(module(name)):
            allowed = range_of(module(name), flag)
            if allowed is None or allowed.low < 0:
                found["signed"].add(flag)
            elif allowed.low > 0 or allowed.exclusive:
                found["positive"].add(flag)
            else:
                found["zero"].add(flag)
    both = found["positive"] & found["zero"]
    assert found["signed"] == {*SIGNED}
    assert found["zero"] - {*MAY_BE_0} <= {"sigma_max"}  # at least sigma_min
    assert not {*MAY_BE_0} - found["zero"]
    assert both <= {"online_steps"}, both  # which is all of an RLPD run


def distinct():
    """(script, flag) once for each type that a flag has: what tyro does depends on nothing else."""
    seen = {}
    for name in SCRIPTS:
        for flag, x in numbers(module(name)).items():
            seen.setdefault((flag, type(getattr(module(name).Args, flag)), type(x)), (name, flag))
    return list(seen.values())


@pytest.mark.parametrize("value", ["-1", "1e30", str(2**40), "nan", "x", ""])
def test_numbers_as_they_are_typed(value, capsys):
    """The same through the command line, where tyro refuses what is no number."""
    for name, flag in distinct():
        script, dashes = module(name), "--" + flag.replace("_", "-")
        if value == "-1" and flag in SIGNED:
            continue
        with pytest.raises((SystemExit, UserError)) as error:
            parse(script.Args, script.ENV_DEFAULTS, [dashes, value])
        text = capsys.readouterr().err
        if isinstance(error.value, UserError):
            text = str(error.value)
        assert dashes in text and "Traceback" not in text, text


@pytest.mark.parametrize("name", SCRIPTS)
def test_lists_of_numbers(name, monkeypatch):
    """None, or a bad one behind good ones."""
    script = module(name)
    lists = [flag for flag, x in vars(script.Args()).items() if isinstance(x, tuple)]
    assert "hidden_dims" in lists
    for flag in lists:
        dashes = "--" + flag.replace("_", "-")
        refused(name, [dashes], dashes)
        refused(name, [dashes, "1", "1", "-3"], dashes)


# --- contradictions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, argv, words",
    [
        ("fmer", "--warmup-steps 20001 --total-steps 20000", ("--warmup-steps", "--total-steps")),
        (
            "baselines/sac",
            "--env-steps-per-update 20001",
            ("--env-steps-per-update", "(--total-steps)"),
        ),
        (
            "baselines/sac",
            "--total-steps 500 --env halfcheetah",
            ("--warmup-steps", "at most 500 (--total-steps)", "10000"),
        ),
        ("qam", "--online-steps 100", ("--start-training", "100 (--online-steps)", "5000")),
        ("baselines/rlpd", "--online-steps 100", ("--start-training", "--online-steps")),
        ("baselines/rlpd", "--online-steps 0", ("--online-steps",)),
        ("baselines/bam", "--flow-steps 1", ("--flow-steps",)),
        ("baselines/rlpd", "--batch-size 3", ("--batch-size",)),
        (
            "baselines/rlpd",
            "--chunk-length 9 --start-training 8",
            ("--start-training", "--chunk-length"),
        ),
        ("meam", "--sigma-min 2", ("--sigma-min", "--sigma-max")),
        ("meam", "--sigma-max 0", ("--sigma-min", "--sigma-max")),
        ("baselines/flame", "--time-min 0.999", ("--time-min", "--time-max")),
        ("baselines/flame", "--time-max 1", ("--time-min", "--time-max")),
        ("baselines/ppo", "--batch-size 100", ("--rollout-steps", "--batch-size")),
        ("baselines/ppo", "--num-envs 3", ("--rollout-steps", "--num-envs")),
        ("baselines/ppo", "--total-steps 10", ("--rollout-steps", "--total-steps")),
        ("baselines/cgql", "--guidance-coef 1 2", ("--guidance-coef",)),
        ("fmer", "--actor-states next --policy-ema 0.1", ("--actor-states", "--policy-ema")),
        ("fmer", "--target-ess 1.01", ("--target-ess", "at most 1")),
        ("baselines/dpmd", "--q-rate 1.01", ("--q-rate", "at most 1")),
        ("qam", "--tasks 1 2 1", ("--tasks", "twice")),
        ("qam", "--tasks 6", ("--tasks", "at most 5")),
        ("qam", "--discount 1.01", ("--discount", "at most 1")),
    ],
)
def test_flags_that_contradict_each_other(script, argv, words):
    refused(script, argv.split(), *words)


@pytest.mark.parametrize(
    "script, argv",
    [
        ("fmer", "--eval-slots 50 --eval-episodes 3"),
        ("fmer", "--log-interval 1000000 --eval-interval 7"),
        ("fmer", "--warmup-steps 500 --total-steps 500"),
        ("fmer", "--replay-size 1 --act-candidates 100"),
        ("qam", "--start-training 2000000000"),
        ("qam", "--online-steps 5000"),
        ("qam", "--offline-steps 0 --online-steps 0 --eval-only"),
        ("qam", "--tasks 5 4 3 2 1 --num-seeds 3"),
    ],
)
def test_flags_that_only_seem_to(script, argv):
    """More slots than episodes, intervals that do not fit, phases that are left out."""
    parse(module(script).Args, module(script).ENV_DEFAULTS, argv.split())


# --- environments --------------------------------------------------------------------------------


@functools.cache
def known():
    line = stops("known are ", call=lambda: resolve("~"))
    return line.split("known are ")[1].split(", ")


def misspelt(name, rng):
    """A letter more, less, other, or two exchanged."""
    at, letter = rng.integers(len(name)), chr(97 + rng.integers(26))
    changes = [name[:at] + letter + name[at:], name[:at] + name[at + 1 :]]
    changes += [name[:at] + letter + name[at + 1 :]]
    changes += [name[:at] + name[at + 1 : at + 2] + name[at] + name[at + 2 :]]
    return changes[rng.integers(4)]


def test_misspelt_environments():
    """The nearest names are offered, and what was meant is among them, or its like: `kitchen1-` is
    as near to kitchen-2 as to kitchen-1."""
    assert len(known()) > 25 and set(ONLINE) <= set(known())
    for i in range(CHANGES):
        rng = np.random.default_rng(i)
        meant = known()[rng.integers(len(known()))]
        script, name = "fmer" if meant in ONLINE else "qam", misspelt(meant, rng)
        try:
            resolve(name)  # another one's name
        except UserError:
            like = meant.rpartition("-")[0] or meant
            line = refused(script, ["--env", name], f"'{name}'", "did you mean", like)
            assert line == refused(script, [f"--env={name}"])


@pytest.mark.parametrize(
    "name",
    ["", " ", "-", "~", "cube", "CUBE-DOUBLE", "cube-double-play-singletask-task6-v0", "ünïcode"]
    + ["cube-double/../scene", "a" * 20_000, "-play" * 4000, "cube\ndouble", "%s{0}", "kitchen-3"],
)
def test_strange_environments(name):
    """No traceback, no search of minutes."""
    begin = time.perf_counter()
    line = stops("unknown environment", call=lambda: resolve(name))
    assert "did you mean" in line or "known are" in line
    assert time.perf_counter() - begin < 5


# --- memory, and whole programs ------------------------------------------------------------------


def broken_program():
    """What a CPU's program says in the middle of a call."""
    raise RuntimeError("INTERNAL: Error dispatching computation: Out of memory allocating 9")


LACKS = dict(device=lambda: jnp.zeros(2**55), host=lambda: np.zeros(2**55), program=broken_program)


@pytest.mark.parametrize("kind", LACKS)
def test_a_lack_of_memory(kind, monkeypatch):
    """Of a device or the host: one line with the flags that would help. Everything else is shown
    as ever."""
    script = module("qam")
    monkeypatch.setattr(sys, "argv", ["qam.py"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(SystemExit) as error:
        launch(lambda args: LACKS[kind](), script.Args, script.ENV_DEFAULTS)
    line = str(error.value)
    assert line.startswith("error: out of memory") and "\n" not in line
    assert "--num-seeds" in line and "--batch-size" in line
    with pytest.raises(IndexError):
        launch(lambda args: [][1], script.Args, script.ENV_DEFAULTS)


MANY = "--num-seeds 50 --hidden-dims 8 --eval-slots 1 --eval-episodes 1 --workers 1"


@pytest.mark.parametrize(
    "command, word",
    [
        ("qam.py --env cube-tripel", "cube-triple"),
        ("-m baselines.sac --discount 2", "--discount"),
        (f"fmer.py {MANY} --replay-size {2**31 - 1} --total-steps {2**31 - 1}", "--num-seeds"),
    ],
)
def test_programs_end_in_a_line(command, word, tmp_path):
    """As a user sees it: nothing on stderr but the line, and not the exit status of success. The
    last one asks for terabytes, which no machine grants."""
    line = [sys.executable, *command.split(), "--run-dir", str(tmp_path)]
    done = subprocess.run(line, cwd=shared_blocks.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert word in done.stderr
