"""The checkpoint of a run, the one before it, and the parts of its replay, in checksummed files."""

import contextlib
import hashlib
import re
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import numpy as np

from common.errors import UserError
from common.files import write_file
from common.sampling import Replay

CHECKPOINT = "checkpoint.msgpack"
PREVIOUS = "checkpoint-before.msgpack"
PART = "replay-{}.msgpack"  # with the number of transitions at its end
PART_FILE = re.compile(r"replay-\d+\.msgpack(\.tmp)?")  # .tmp: the write of it was killed
DIGEST = hashlib.sha256().digest_size


def pack(tree: Any) -> bytes:
    """Returns a pytree of arrays as bytes that end in their checksum."""
    content = flax.serialization.to_bytes(jax.device_get(tree))
    return content + hashlib.sha256(content).digest()


def verified(path: Path) -> bytes:
    """Reads what `pack` made, without its checksum.

    Raises OSError, or ValueError if the file is damaged.
    """
    packed = path.read_bytes()
    content = packed[:-DIGEST]
    if hashlib.sha256(content).digest() != packed[-DIGEST:]:
        raise ValueError(f"the checksum of {path.name} is wrong")
    return content


def read_checkpoint(path: Path) -> dict:
    """Reads a checkpoint, or a part of its replay, as nested dicts of arrays.

    Raises what `verified` raises.
    """
    return flax.serialization.msgpack_restore(verified(path))


def join_parts(parts: list[tuple[int, dict]]) -> dict[str, np.ndarray]:
    """Joins a replay's parts, each with the number of transitions at its end.

    Raises ValueError if one does not follow the other.
    """
    if not parts:
        return {}
    for (before, _), (end, rows) in zip(parts, parts[1:]):
        start = end - rows["rewards"].shape[1]
        if start != before:
            raise ValueError(f"its replay has a gap between {before} and {start}")
    joined = dict(size=np.int64(parts[-1][0]))
    for name in parts[0][1]:
        columns = [rows[name] for _, rows in parts]
        joined[name] = np.concatenate(columns, axis=1)
    return joined


def check_same_arrays(expected: Any, found: Any) -> None:
    """Raises ValueError if shapes or dtypes of two pytrees differ."""

    def kind(x):
        return np.shape(x), np.result_type(x)

    if jax.tree.map(kind, expected) != jax.tree.map(kind, found):
        raise ValueError("its arrays have other shapes or types than this run's")


class Checkpoints:
    """The checkpoints in a run folder. Those of another run are refused."""

    def __init__(self, folder: Path, run: str):
        """`run` identifies the run."""
        self.folder = folder
        self.run = run
        self.parts = []  # numbers of transitions at the ends of the replay's parts
        self.damaged = False  # the latest checkpoint was, and the previous one is in use

    def save(self, content: dict, replay: Replay | None = None) -> None:
        """Writes a checkpoint and keeps the one before it.

        Only the replay's new transitions are written, as a new part; the older parts are reused.
        """
        before = self.parts
        parts = before
        if replay is not None:
            start = max(before, default=0)
            end = int(replay.size[0])
            if end > start:
                part = dict(run=self.run, rows=replay.since(start))
                write_file(self.folder / PART.format(end), pack(part))
                oldest = end - replay.rewards.shape[1]
                parts = [number for number in before if number > oldest] + [end]
        keep = self.folder / PREVIOUS if self._latest_is_good() else None
        content = content | dict(run=self.run, parts=np.array(parts, np.int64))
        write_file(self.folder / CHECKPOINT, pack(content), keep)
        self.parts = parts
        self.damaged = False
        self._remove_parts_except(before + parts)

    def _latest_is_good(self) -> bool:
        """Checks the latest checkpoint again, because it is about to replace the one before it."""
        path = self.folder / CHECKPOINT
        if self.damaged or not path.exists():
            return False
        try:
            verified(path)
        except (OSError, ValueError) as error:
            print(f"{path} was damaged on the disk ({error}); the checkpoint before it is kept")
            return False
        return True

    def _remove_parts_except(self, needed: list[int]) -> None:
        names = [PART.format(part) for part in needed]
        for path in self.folder.iterdir():
            if PART_FILE.fullmatch(path.name) and path.name not in names:
                with contextlib.suppress(OSError):  # it takes room and does no other harm
                    path.unlink()

    def _read(self, name: str) -> dict:
        path = self.folder / name
        try:
            content = read_checkpoint(path)
        except FileNotFoundError:
            raise
        except OSError as error:  # the file may be whole
            raise UserError(f"cannot read {path}: {error}; fix this and rerun") from None
        if content["run"] != self.run:
            raise UserError(f"{path} belongs to another run; move it away")
        return content

    def restore(self, like: dict, with_replay: bool = True) -> dict | None:
        """Reads the latest checkpoint, or the one before it if the latest is damaged.

        `like` is a content of the same structure; arrays of its `state` and `metrics` have to
        match. Returns the content with the joined replay, or None if there is no checkpoint.
        With `with_replay=False`, for evaluations, the replay is empty and the metrics are `like`'s.
        """
        errors = []
        for path in (self.folder / CHECKPOINT, self.folder / PREVIOUS):
            if not path.exists():
                continue
            try:
                content = self._read(path.name)
                parts = content["parts"].tolist()
                if not with_replay:
                    content["metrics"] = like["metrics"]
                for name in ("state", "metrics"):
                    expected = flax.serialization.to_state_dict(like[name])
                    check_same_arrays(expected, content[name])
                found = flax.serialization.from_state_dict(like, content)
                rows = []
                if with_replay:
                    rows = [(part, self._read(PART.format(part))["rows"]) for part in parts]
                found["replay"] = join_parts(rows)
            except (MemoryError, UserError):
                raise
            except Exception as error:  # whatever msgpack and flax make of a damaged file
                errors.append(f"{path} is damaged, or of another version ({error})")
                continue
            self.parts = parts
            self.damaged = bool(errors)
            if errors:
                print(f"{errors[0]}: continuing from the previous one, step {found['step']:,}")
            return found
        if errors:
            raise UserError(
                f"{' and '.join(errors)}; start over with --overwrite, or start another run with a "
                "--name"
            )
        return None
