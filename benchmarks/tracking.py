"""Reads what a run logged to Weights & Biases in offline mode, and draws it.

    WANDB_MODE=offline python baselines/sac.py --num-seeds 3 --total-steps 5000 --track
    python -m benchmarks.tracking wandb/offline-run-* benchmarks/results/tracking.json

keeps the run's name, configuration and numbers; `python plot.py --committed` draws them into
docs/images/tracking.png.
"""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt

from analysis.style import settings, thousands

HEADER = 7  # bytes at the beginning of the file, and of each piece of a record
BLOCK = 32_768  # bytes that no piece crosses
SECTIONS = {  # of W&B's page -> the panels that the picture shows
    "eval": ("eval/return", "eval/length"),
    "seeds/eval": ("seeds/eval/return/task1-seed", "seeds/eval/length/task1-seed"),
    "train": ("train/critic_loss", "train/q"),
}


def records(content: bytes) -> Iterator[bytes]:
    """Splits a .wandb file, which has the format of LevelDB's logs, into its records."""
    position = HEADER
    record = b""
    while position + HEADER <= len(content):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        position += HEADER
        record += content[position : position + length]
        position += length
        if kind in (1, 4):  # a whole record, or the last piece of one
            yield record
            record = b""


def read_offline(folder: Path) -> dict:
    """Reads a folder offline-run-*.

    Returns project, entity, group, name, id and tags; `config`; `history`, what each call logged;
    and `exit_code`, None if the run was not finished.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    found = dict(config={}, history=[], exit_code=None)
    for content in records(path.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            found |= dict(project=run.project, entity=run.entity, group=run.run_group)
            found |= dict(name=run.display_name, id=run.run_id, tags=list(run.tags))
            found["config"] |= values_of(run.config.update, "key")
        elif kind == "history":
            found["history"].append(values_of(record.history.item, "nested_key"))
        elif kind == "exit":
            found["exit_code"] = record.exit.exit_code
    return found


def values_of(items: list, name: str) -> dict:
    """Returns the values of a record's items by name, without W&B's own."""
    values = {}
    for item in items:
        key = item.key or "/".join(getattr(item, name))
        if not key.startswith("_"):
            values[key] = json.loads(item.value_json)
    return values


def kept(run: dict) -> str:
    """Returns what the picture needs of a run, as JSON; numbers with five digits."""
    shown = [prefix for prefixes in SECTIONS.values() for prefix in prefixes]
    history = []
    for logged in run["history"]:
        row = {}
        for key, value in logged.items():
            if key == "step" or key.startswith(tuple(shown)):
                row[key] = float(f"{value:.5g}")
        history.append(row)
    keys = sorted(set().union(*run["history"]))
    chosen = {key: run[key] for key in ("project", "name", "tags", "config")}
    return json.dumps(chosen | dict(keys=keys, history=history), indent=1)


def draw(run: dict, path: Path) -> None:
    """Draws a row of panels for each section; a panel has the lines that begin with its name."""
    columns = max(map(len, SECTIONS.values()))
    with plt.rc_context(settings("light")):
        figure, axes = plt.subplots(
            len(SECTIONS), columns, figsize=(7, 6.2), layout="constrained", squeeze=False
        )
        for row, (section, panels) in zip(axes, SECTIONS.items(), strict=True):
            for axis, panel in zip(row, panels, strict=True):
                draw_panel(axis, run["history"], panel)
            row[0].set_ylabel(section, fontweight="bold")
        for axis in axes[-1]:
            axis.set_xlabel("step")
        figure.suptitle(f"{run['project']} / {run['name']}", fontsize=10)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def draw_panel(axis: plt.Axes, history: list[dict], panel: str) -> None:
    """Draws all logged numbers whose names begin with the panel's name."""
    keys = {key for row in history for key in row if key.startswith(panel)}
    if panel in keys:
        keys = {panel}
    for key in sorted(keys):
        rows = [row for row in history if key in row]
        steps = [row["step"] for row in rows]
        axis.plot(steps, [row[key] for row in rows], label=key.rpartition("/")[2])
    axis.set_title(panel.removesuffix("/task1-seed"))
    axis.xaxis.set_major_formatter(thousands)
    if len(keys) > 1:
        axis.legend(fontsize=7)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    folder, target = sys.argv[1:]
    Path(target).write_text(kept(read_offline(Path(folder))))
