"""Tests of --track: what Weights & Biases (offline) and TensorBoard get, under which names, who may
say where it goes, what happens when they fail or are missing, and the command lines of sweeps."""

import ast
import functools
import itertools
import json
import os
import re
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import wandb
import yaml
from PIL import Image
from tensorboardX.proto.event_pb2 import Event
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

import meam
from benchmarks.tracking import read_offline
from common.flags import parse
from common.tracking import named_numbers
from tests.helpers.messages import stops
from tests.helpers.small_run import AGENTS, begin, metrics, restore, save, table
from tools.shared_blocks import ROOT

VARIABLES = ("WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_GROUP", "WANDB_TAGS", "WANDB_RUN_ID")


@pytest.fixture
def run(tmp_path):
    """A function that begins or continues the run: run(flag=value, ...) -> Run."""
    return functools.partial(begin, tmp_path / "runs")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """W&B in offline mode; a function that reads what the runs so far have logged, by date."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # W&B reads its environment once.

    def read():
        wandb.teardown()  # Only its end has surely written everything to the files.
        return [read_offline(path) for path in sorted(tmp_path.glob("wandb/offline-run-*"))]

    yield read
    wandb.teardown()


# --- names ---------------------------------------------------------------------------------------


def test_names_of_numbers():
    """Means over all agents and, of several tasks, over each task's seeds; every agent's own."""
    loss = np.float32([1, 2, 6])
    assert named_numbers("train", [(1, 0), (1, 1), (4, 0)], dict(loss=loss)) == {
        "train/loss": 3,
        "train/task1/loss": 1.5,
        "train/task4/loss": 6,
        "seeds/train/loss/task1-seed0": 1,
        "seeds/train/loss/task1-seed1": 2,
        "seeds/train/loss/task4-seed0": 6,
    }
    assert named_numbers("eval", [(2, 5), (2, 6)], dict(success=loss[:2])) == {
        "eval/success": 1.5,
        "seeds/eval/success/task2-seed5": 1,
        "seeds/eval/success/task2-seed6": 2,
    }
    assert named_numbers("eval", [(1, 0)], dict(success=loss[:1])) == {"eval/success": 1}


# --- Weights & Biases ----------------------------------------------------------------------------


def picture(folder):
    """A file in the place of the curve."""
    Image.new("RGB", (8, 4), "red").save(folder / "curve.png")


def test_a_run_in_wandb(run, offline, monkeypatch):
    """Numbers by step, name, script, commit and flags, tags, the curve at the end; it is finished,
    with an error where there was one, and continues under its id."""
    monkeypatch.setattr("common.run.draw_pictures", picture)
    with run(track="wandb", lr=0.5, name="mine") as first:
        restore(first)
        first.tables.log("train.csv", 10, metrics(10))
        first.tables.log("eval.csv", 10, metrics(1))
        save(first, 10)
        first.finish()
    (found,) = offline()
    assert (
        found["name"] == "small_run-pointmaze-medium-mine" and found["project"] == "flow-policies"
    )
    assert found["id"] == first.checkpoints.run and found["exit_code"] == 0
    assert found["tags"] == ["small_run", "pointmaze-medium"]
    made = json.loads((first.folder / "config.json").read_text())["made_with"]
    config = found["config"]
    assert config["script"] == "small_run" and config["commit"] == made["commit"] != ""
    assert config["lr"] == 0.5 and config["hidden_dims"] == [8] and config["checksum"] == "1234abcd"
    train, evaluation, curve = found["history"]
    assert train["step"] == evaluation["step"] == 10 and "train/loss" not in evaluation
    assert train["train/loss"] == pytest.approx(10 + 1 / 3)
    assert train["seeds/train/q/task4-seed0"] == 12
    assert evaluation["eval/task1/loss"] == pytest.approx(1 + 1 / 6)
    assert curve["curve/_type"] == "image-file" and curve["curve/width"] == 8
    with pytest.raises(ZeroDivisionError):
        with run(track="wandb", lr=0.5, name="mine", eval_episodes=7) as second:
            restore(second)
            second.tables.log("train.csv", 5, metrics(5))  # before the last one: nothing is lost
            print(1 / 0)
    _, found = offline()
    assert found["id"] == first.checkpoints.run and found["exit_code"] == 1
    assert found["history"][0]["step"] == 5 and found["config"]["eval_episodes"] == 7


def test_the_environment_says_where_it_goes(run, offline, monkeypatch):
    """Where no flag does."""
    for name, value in zip(VARIABLES, ("project", "entity", "group", "a,b"), strict=False):
        monkeypatch.setenv(name, value)
    with run(track="wandb", name="a"):
        pass
    flags = dict(wandb_project="mine", wandb_entity="us", wandb_group="ours")
    with run(track="wandb", name="b", **flags):
        pass
    found = {one["project"]: one for one in offline()}  # their order within a second is random
    first, second = found["project"], found["mine"]
    keys = ("project", "entity", "group")
    assert [first[key] for key in keys] == ["project", "entity", "group"]
    assert [second[key] for key in keys] == ["mine", "us", "ours"]
    assert first["tags"] == second["tags"] == ["a", "b", "small_run", "pointmaze-medium"]


def test_two_runs_in_one_process(run, offline):
    """Also at once, and next to a run of somebody's own, each gets its own numbers."""
    own = wandb.init(project="own")
    with run(track="wandb", name="a") as first, run(track="wandb", name="b") as second:
        first.tables.log("train.csv", 10, metrics(1))
        second.tables.log("train.csv", 10, metrics(2))
        first.tables.log("train.csv", 20, metrics(3))
        own.log(dict(x=1))
    own.finish()
    steps = {}
    for found in offline():
        steps[found["name"]] = [row.get("step") for row in found["history"]]
    assert steps.pop("small_run-pointmaze-medium-a") == [10, 20]
    assert steps.pop("small_run-pointmaze-medium-b") == [10]
    assert list(steps.values()) == [[None]]


@pytest.mark.parametrize("fails", ["import", "init", "log", "finish", ""])
def test_a_failure_ends_the_mirror_alone(run, monkeypatch, capsys, fails):
    """One line says so, and the run goes on."""
    steps, finished = [], []

    def log(numbers):
        if fails == "log" and numbers["step"] == 20:
            raise OSError("no route\nto host")
        steps.append(numbers["step"])

    def finish(exit_code):
        if fails == "finish":
            raise OSError("no route to host")
        finished.append(exit_code)

    def init(**_):
        if fails == "init":
            raise RuntimeError("not logged in")
        return SimpleNamespace(log=log, finish=finish, tags=(), define_metric=lambda *_, **__: None)

    broken = None if fails == "import" else SimpleNamespace(init=init)
    monkeypatch.setitem(sys.modules, "wandb", broken)
    with run(track="wandb") as first:
        for step in (10, 20, 30):
            first.tables.log("train.csv", step, metrics(step))
    assert steps == {"import": [], "init": [], "log": [10]}.get(fails, [10, 20, 30])
    assert finished == [0] * (fails == "")
    said = [x for x in capsys.readouterr().err.splitlines() if "wandb failed" in x]
    assert len(said) == bool(fails)
    if fails == "log":
        assert said == ["wandb failed; the run continues without it: no route to host"]
    assert len(table(first.folder / "train.csv")) == 10


# --- packages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice, package", [("wandb", "wandb"), ("tensorboard", "tensorboardX")])
def test_a_missing_package(run, monkeypatch, choice, package):
    """One line before anything is trained, with what to install; the folder is free again. Folders
    that wandb itself made in the current directory are not taken for the package."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [])
        stops(f"--track {choice}", f"pip install {package}", call=lambda: run(track=choice))
    run()


# --- TensorBoard ---------------------------------------------------------------------------------


def events(folder):
    """The events in a folder: each has its length (8 bytes), a checksum (4), bytes, a checksum."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack_from("<Q", content)
            event = Event()
            event.ParseFromString(content[12 : 12 + length])
            content = content[16 + length :]
            for value in event.summary.value:
                yield value.tag, event.step, value


def test_a_run_in_tensorboard(run, monkeypatch):
    """The same names; configuration and curve; a continued run adds to it."""
    monkeypatch.setattr("common.run.draw_pictures", picture)
    with run(track="tensorboard") as first:
        restore(first)
        first.tables.log("train.csv", 10, metrics(10))
        first.finish()
    with run(track="tensorboard") as second:
        second.tables.log("train.csv", 20, metrics(20))
    found = {(tag, step): value for tag, step, value in events(first.folder)}
    logged = {(tag, step) for tag, step in found if "/" in tag and "config" not in tag}
    names = named_numbers("train", AGENTS, metrics())
    assert logged == {(name, step) for name in names for step in (10, 20)}
    assert found["train/loss", 20].simple_value == pytest.approx(20 + 1 / 3)
    (text,) = {x.tensor.string_val[0] for (tag, _), x in found.items() if "config" in tag}
    assert b"lr: 0.25" in text and b"script: small_run" in text
    image = found["curve", 0].image
    assert (image.width, image.height) == (8, 4)


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, choice",
    [
        ("", ""),
        ("--track", "wandb"),
        ("--track --seed 3", "wandb"),
        ("--track wandb", "wandb"),
        ("--track=tensorboard", "tensorboard"),
        ("--track=", ""),
    ],
)
def test_what_follows_track(argv, choice):
    assert parse(meam.Args, meam.ENV_DEFAULTS, argv.split()).track == choice


@pytest.mark.parametrize("argv", ["--track wb", "--track wandb tensorboard"])
def test_what_must_not_follow_track(argv, capsys):
    with pytest.raises(SystemExit):
        parse(meam.Args, meam.ENV_DEFAULTS, argv.split())
    assert "tensorboard" in capsys.readouterr().err


def sweep_commands(sweep, folder):
    """The command lines that W&B's agent makes of a sweep's grid, as the words after `python`."""
    program = folder / "python"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'import sys; print(sys.argv[1:])' $*")
    program.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    choices = {name: x.get("values", [x.get("value")]) for name, x in sweep["parameters"].items()}
    for values in itertools.product(*choices.values()):
        chosen = {name: dict(value=x) for name, x in zip(choices, values, strict=True)}
        macros = create_sweep_command_args(dict(args=chosen))
        words = []
        for word in sweep["command"]:
            macro = re.fullmatch(r"\$\{(\w+)\}", word)
            words += macros[macro[1]] if macro else [word]
        done = subprocess.run(words, env=dict(PATH=path), capture_output=True, text=True)
        yield dict(zip(choices, values, strict=True)), ast.literal_eval(done.stdout)


def test_the_sweep_of_the_page(tmp_path):
    """Every command that an agent makes of it is understood, with lists, switches and numbers."""
    page = (ROOT / "docs/guides/tracking.md").read_text()
    sweep = yaml.safe_load(re.search(r"```yaml\n(.*?)```", page, re.S)[1])
    names = set()
    for chosen, (script, *flags) in sweep_commands(sweep, tmp_path):
        assert script == sweep["program"] == "meam.py"
        args = parse(meam.Args, meam.ENV_DEFAULTS, flags)
        assert (args.env, args.track, args.tasks) == ("scene", "wandb", (1, 2))
        assert args.hidden_dims == tuple(map(int, chosen["hidden_dims"].split()))
        assert (args.rho, args.sparse) == (chosen["rho"], False)
        assert args.noisy_expansion == chosen["noisy_expansion"]
        assert args.offline_steps == chosen["offline_steps"] == 100_000
        names.add(args.name)
    assert len(names) == 8
    assert sweep["metric"]["name"] in named_numbers("eval", [(1, 0)], dict(success=np.ones(1)))
    assert parse(meam.Args, meam.ENV_DEFAULTS, ["--env", "scene"]).sparse
