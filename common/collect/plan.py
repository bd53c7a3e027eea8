"""Which datasets can be made, and what a collection consists of: sizes, settings and files."""

import dataclasses
import difflib
import importlib.metadata
import itertools
import math
import zlib
from pathlib import Path
from typing import NamedTuple

from common.collect.ant import WEIGHTS
from common.errors import UserError


class CollectError(UserError):
    """A dataset that cannot be made as asked for; the message is one line for the user."""


class Size(NamedTuple):
    """The size of a dataset: training episodes, and rows of each episode.

    The last row of an episode is only its final state, so it makes one transition less.
    """

    episodes: int
    rows: int


MANIPULATION_EPISODES = {
    "cube-single": 1000,
    "cube-double": 1000,
    "cube-triple": 3000,
    "cube-quadruple": 5000,
    "scene": 1000,
    "puzzle-3x3": 1000,
    "puzzle-4x4": 1000,
    "puzzle-4x5": 3000,
    "puzzle-4x6": 5000,
}


def _official_sizes() -> dict[str, Size]:
    sizes = {}
    for domain, episodes in MANIPULATION_EPISODES.items():
        for kind in ("play", "noisy"):
            sizes[f"{domain}-{kind}"] = Size(episodes, 1001)
    for agent, maze in itertools.product(
        ("point", "ant"), ("medium", "large", "giant", "teleport")
    ):
        navigate = Size(500, 2001) if maze == "giant" else Size(1000, 1001)
        sizes[f"{agent}maze-{maze}-navigate"] = navigate
        sizes[f"{agent}maze-{maze}-stitch"] = Size(5000, 201)
    return sizes


OFFICIAL = _official_sizes()


def check_name(dataset: str) -> None:
    """Raises CollectError if a dataset cannot be made here."""
    if "explore" in dataset or dataset.startswith(("antsoccer", "humanoidmaze")):
        raise CollectError(f"{dataset} cannot be collected here; it must be downloaded")
    if dataset not in OFFICIAL:
        nearest = ", ".join(difflib.get_close_matches(dataset, OFFICIAL, cutoff=0))
        raise CollectError(f"unknown dataset {dataset!r}; nearest names: {nearest}")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A collection: training episodes 0 to num_train - 1, validation episodes after them."""

    dataset: str  # such as cube-single-play
    num_train: int
    seed: int
    folder: Path

    @property
    def rows(self) -> int:
        """Returns the number of rows of an episode."""
        return OFFICIAL[self.dataset].rows

    @property
    def steps(self) -> int:
        """Returns the number of transitions of an episode."""
        return self.rows - 1

    @property
    def num_all(self) -> int:
        """Returns the number of training and validation episodes."""
        return self.num_train + max(1, self.num_train // 10)

    @property
    def base(self) -> Path:
        """Returns what the paths of all files begin with."""
        return self.folder / f"{self.dataset}-v0"

    def _path(self, ending: str) -> Path:
        return self.folder / f"{self.base.name}{ending}"

    @property
    def train(self) -> Path:
        """Returns the path of the training file."""
        return self._path(".npz")

    @property
    def val(self) -> Path:
        """Returns the path of the validation file."""
        return self._path("-val.npz")

    @property
    def settings_file(self) -> Path:
        """Returns the path of the json file of the settings."""
        return self._path(".json")

    @property
    def parts(self) -> Path:
        """Returns the path of the folder that holds finished blocks during a collection."""
        return self._path(".parts")

    @property
    def lock(self) -> Path:
        """Returns the path of the file that is there, and locked, during a collection."""
        return self._path(".lock")

    @property
    def episodes(self) -> dict[Path, range]:
        """Returns the episodes of the finished files. The validation file is written first."""
        return {
            self.val: range(self.num_train, self.num_all),
            self.train: range(self.num_train),
        }

    def part(self, block: range) -> Path:
        """Returns the path of the part that holds a block of episodes."""
        return self.parts / f"{block.start:06d}-{block.stop:06d}.npz"

    def blocks(self) -> list[range]:
        """Splits all episodes into blocks, the units of parallel work and of resuming.

        No block holds both training and validation episodes.
        """
        size = max(10_000 // self.steps, self.num_train // 100)
        train = range(0, self.num_train, size)
        val = range(self.num_train, self.num_all, size)
        edges = [*train, *val, self.num_all]
        return [range(start, stop) for start, stop in itertools.pairwise(edges)]

    def settings(self) -> dict:
        """Returns everything that the contents of the files depend on."""
        settings = {
            "dataset": self.dataset,
            "episodes": self.num_train,
            "rows_per_episode": self.rows,
            "seed": self.seed,
        }
        for package in ("ogbench", "mujoco", "numpy"):
            settings[package] = importlib.metadata.version(package)
        if self.dataset.startswith("ant"):
            settings["expert"] = zlib.crc32(WEIGHTS.read_bytes())
        return settings


def make_plan(dataset: str, transitions: int | None, folder: str | Path, seed: int) -> Plan:
    """Plans a collection of at least `transitions` training transitions (None: the official size).

    Raises CollectError if the dataset cannot be made here.
    """
    name = dataset.removesuffix("-v0")
    check_name(name)
    num_train, rows = OFFICIAL[name]
    if transitions is not None:
        num_train = math.ceil(transitions / (rows - 1))
    return Plan(dataset=name, num_train=num_train, seed=seed, folder=Path(folder).expanduser())
