"""The command line of a script: ranges of flags, defaults of each environment, one-line errors."""

import argparse
import dataclasses
import functools
import inspect
import os
import re
import sys
import zlib
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro

from common.environments import OGBENCH_NAME, resolve
from common.errors import UserError
from common.signals import Stopped, end_of_imports, say

LARGEST = 2**31 - 1
LONGEST_NAME = 180  # of a run, before it is cut and gets a checksum
# Flags that cannot change what an agent learns. A run may be continued with other values of them.
FREE = (
    *("name", "run_dir", "dataset_dir", "collect", "workers", "compile_cache"),
    *("track", "wandb_project", "wandb_entity", "wandb_group"),
    *("eval_only", "overwrite", "eval_slots", "eval_episodes", "eval_interval", "log_interval"),
    *("offline_steps", "online_steps"),  # no schedule of an offline method depends on them
    "observation_size",  # not a flag, but stored with them, except by earlier versions
)


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low`, itself excluded if `exclusive`, to `high`, a number or another flag."""

    low: float = -LARGEST
    high: float | str = LARGEST
    exclusive: bool = False


PositiveInt = Annotated[int, Range(0, exclusive=True)]
PositiveFloat = Annotated[float, Range(0, exclusive=True)]
NonNegativeInt = Annotated[int, Range(0)]
NonNegativeFloat = Annotated[float, Range(0)]
UnitInterval = Annotated[float, Range(0, 1)]
TaskNumber = Annotated[int, Range(1, 5)]
OnlineStep = Annotated[int, Range(1, "online_steps")]
StepOfRun = Annotated[int, Range(1, "total_steps")]
Precision = Literal["default", "float32", "bfloat16"]
Tracker = Literal["", "wandb", "tensorboard"]  # "" is none


def read_tracking(words: list[str]) -> str:
    """Reads what follows --track, at most one word; without one it is wandb."""
    if len(words) > 1:
        raise ValueError("choose one of wandb and tensorboard")
    return words[0] if words else "wandb"


Tracking = Annotated[
    Tracker,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[{wandb,tensorboard}]",
        choices=get_args(Tracker),
        instance_from_str=read_tracking,
        is_instance=get_args(Tracker).__contains__,
        str_from_instance=lambda value: [value],
    ),
]


def configure(Args: type, env_defaults: dict, env: str = "", **flags: Any) -> Any:
    """Returns `Args` for an environment; without one, for that of the flag `dataset`.

    In increasing priority: the defaults of the class, the protocol of the environment (as the
    papers evaluate on it), the script's ENV_DEFAULTS, and `flags`.
    """
    known = [field.name for field in dataclasses.fields(Args)]
    offline = "tasks" in known
    if flags.get("dataset"):
        return configure_own(Args, env_defaults, env, flags)
    source = resolve(env)
    if offline != bool(source.dataset):
        if offline:
            advice = "this script is offline. Try fmer.py or baselines/sac.py, or give a --dataset."
            raise UserError(f"--env {env} is an online environment; {advice}")
        advice = "this script is online. Try meam.py or qam.py."
        raise UserError(f"--env {env} is an offline environment; {advice}")
    values = source.protocol | dict(tasks=(source.task,)) | env_defaults.get(source.env, {})
    values = {name: value for name, value in values.items() if name in known}
    return Args(**values | flags | dict(env=env))


def configure_own(Args: type, env_defaults: dict, env: str, flags: dict) -> Any:
    """Returns `Args` for data of the user's own, for which no protocol is known."""
    from common.own_data import recorded_in  # nothing else needs it

    if os.path.isdir(flags["dataset"]):
        raise UserError(f"--dataset {flags['dataset']} is a folder: give a file in it")
    values = dict(env=env) if env else recorded_in(flags["dataset"])
    name = OGBENCH_NAME.fullmatch(values["env"])
    if name["task"]:
        values["tasks"] = (int(name["task"]),)
    return Args(**env_defaults.get(name["env"], {}) | values | flags)


def check_range(flag: str, value: float, allowed: Range, args: Any) -> None:
    """Raises UserError if a flag's value is outside its range."""
    high = allowed.high
    if isinstance(high, str):
        high = getattr(args, high) or LARGEST  # 0 switches the other flag's phase off
    high_enough = value > allowed.low if allowed.exclusive else value >= allowed.low
    if high_enough and value <= high:
        return
    least = "greater than" if allowed.exclusive else "at least"
    most = f"{high:,}" if high == LARGEST else f"{high}"
    if isinstance(allowed.high, str):
        most += f" (--{allowed.high})"
    text = f"--{flag} must be {least} {allowed.low} and at most {most}, but is {value}"
    raise UserError(text.replace("_", "-"))


def check_ranges(args: Any) -> None:
    """Checks every number among the flags against the range in its annotation."""
    for flag, annotation in get_type_hints(type(args), include_extras=True).items():
        values = getattr(args, flag)
        if values == ():
            raise UserError(f"--{flag.replace('_', '-')} needs at least one value")
        if isinstance(values, tuple):
            annotation = get_args(annotation)[0]
        else:
            values = (values,)
        ranges = [x for x in getattr(annotation, "__metadata__", ()) if isinstance(x, Range)]
        for value in values:
            if type(value) in (int, float):
                check_range(flag, value, ranges[0] if ranges else Range(), args)


@functools.cache
def describe_flags(Args: type) -> dict[str, tuple[str, str]]:
    """Reads each flag's group and help from the comments of the class.

    `# --- group ---` begins a group. The comment on a flag's line, or above it, is its help.
    """
    described = {}
    group = "other"
    above = []
    for line in inspect.getsource(Args).splitlines():
        code, _, comment = line.strip().partition("# ")
        flag = re.match(r"(\w+): ", code)
        heading = re.fullmatch(r"--- (.+) -+", comment)
        if heading:
            group = heading[1]
            above = []
        elif flag:
            text = " ".join([*above, comment])
            described[flag[1]] = (group, text.strip())
            above = []
        elif comment:
            above.append(comment)
    return described


def read_command_line(Args: type, defaults: Any, argv: list[str]) -> Any:
    """Lets tyro parse `argv`; --help shows the groups of flags in boxes."""
    described = describe_flags(Args)
    hints = get_type_hints(Args, include_extras=True)
    groups = {}
    for field in dataclasses.fields(Args):
        group, text = described[field.name]
        annotation = Annotated[hints[field.name], tyro.conf.arg(help=text)]
        default = dataclasses.field(default=getattr(defaults, field.name))
        group = re.sub(r"\W", "_", group)  # the name of a class
        groups.setdefault(group, []).append((field.name, annotation, default))
    boxes = []
    for group, fields in groups.items():
        box = dataclasses.make_dataclass(group, fields)
        boxes.append((group, box, dataclasses.field(default_factory=box)))
    header = inspect.getmodule(Args).__doc__ or ""
    parsed = tyro.cli(
        dataclasses.make_dataclass("Flags", boxes),
        args=argv,
        description=header.split("\n\n    python")[0],
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
    )
    flags = {}
    for box in vars(parsed).values():
        flags |= vars(box)
    return Args(**flags)


def name_of_run(args: Any, defaults: Any) -> str:
    """Returns a run's name, made of the flags that differ from the environment's defaults."""
    parts = []
    for flag, value in vars(args).items():
        if flag != "env" and flag not in FREE and value != getattr(defaults, flag):
            text = str(value)
            if isinstance(value, tuple):
                text = "-".join(map(str, value))
            text = re.sub(r'[{}" ]', "", text)  # of JSON
            parts.append(f"{flag}={text}".replace("_", "-").replace("/", "-"))
    name = ",".join(parts) or "default"
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}-{zlib.crc32(name.encode()):08x}"
    return name


def as_command_line(flags: dict) -> list[str]:
    """Returns flags as words of a command line: dict(lr=0.1, tasks=(1, 2), sparse=False).

    None is the flag's default; `track` may be False, too.
    """
    words = []
    for name, value in flags.items():
        if value is None or (name == "track" and not value):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list | tuple):
            words += [f"--{flag}", *map(str, value)]
        else:
            words.append(f"--{flag}={value}")
    return words


def parse(Args: type, env_defaults: dict, argv: list[str] | None = None) -> Any:
    """Reads and checks the flags of a script; `argv` defaults to the command line."""
    import jax  # here, because plot.py reads FREE and needs no jax

    if jax.config.jax_enable_x64:
        raise UserError("the scripts compute in float32: unset JAX_ENABLE_X64")
    argv = sys.argv[1:] if argv is None else argv
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--env", nargs="?", const="")
    first_look.add_argument("--dataset", nargs="?")
    look = first_look.parse_known_args(argv)[0]
    own = dict(dataset=look.dataset) if look.dataset and hasattr(Args, "dataset") else {}
    env = look.env
    if env is None:
        env = "" if own else Args.env
    defaults = configure(Args, env_defaults, env, **own)
    args = read_command_line(Args, defaults, argv)
    check_ranges(args)
    if not args.env:
        raise UserError("--env needs the name of an environment")
    tasks = getattr(args, "tasks", ())
    if len(tasks) > len(set(tasks)):
        raise UserError("--tasks must not name a task twice")
    if args.name in (".", "..") or "/" in args.name:
        raise UserError(f"--name {args.name!r} must be the name of a folder, without /")
    if not args.name:
        if own:
            defaults = dataclasses.replace(defaults, dataset="")  # it belongs in the name
        args = dataclasses.replace(args, name=name_of_run(args, defaults))
    tuned = OGBENCH_NAME.fullmatch(args.env)["env"] if own else resolve(env).env
    if tasks and tuned not in env_defaults:
        print(f"No tuned hyperparameters for {args.env}; using the defaults.")
    return args


def launch(main: Callable, Args: type, env_defaults: dict) -> None:
    """Runs a script from the command line; a mistake of the user ends in one line."""
    end_of_imports()
    sys.stdout.reconfigure(line_buffering=True)  # also where it is a file
    os.environ["MUJOCO_GL"] = "disable"  # nothing is drawn, so no driver is needed
    try:
        main(parse(Args, env_defaults))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
    except Stopped as stopped:
        say(str(stopped))
        os._exit(1)  # jax would crash at Python's own exit if it is still compiling in a thread
    except Exception as error:
        if re.search("MemoryError|RESOURCE_EXHAUSTED|Out of memory", repr(error)):
            sys.exit(
                "error: out of memory. Lower --num-seeds or --batch-size, or train fewer tasks."
            )
        raise
