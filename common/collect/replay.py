"""Turns what the agents of an online run have seen into a dataset of Minari.

    python -m common.collect.replay runs/sac/HalfCheetah-v5/default halfcheetah/sac-replay-v0
    python qam.py --dataset minari:halfcheetah/sac-replay-v0

The replay of the run's last checkpoint has the transitions from random to trained behaviour, as far
as --replay-size reaches. Observations are flat, and actions are in the environment's own range.
"""

import copy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

if __name__ == "__main__":
    from common.signals import quiet_imports

    quiet_imports()  # Ctrl-C ends the imports below without a traceback

import gymnasium
import numpy as np
import tyro

from common.checkpoints import CHECKPOINT, PART, join_parts, read_checkpoint
from common.environments import env_name, make_env
from common.errors import UserError
from common.files import read_config
from common.gym_environments import action_box
from common.own_data import load_extra
from common.signals import end_of_imports


def read_replay(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Returns the flags of a run, and the transitions (agents, n, ...) in its replay."""
    flags = read_config(folder)["flags"]
    try:
        numbers = read_checkpoint(folder / CHECKPOINT)["parts"]
        parts = []
        for n in map(int, numbers):
            parts.append((n, read_checkpoint(folder / PART.format(n))["rows"]))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is not a run with a checkpoint: {error!r}") from None
    if "tasks" in flags or not parts:
        raise UserError(f"{folder} has no replay of an online method")
    return flags, join_parts(parts)


def episodes_of(rows: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Yields the episodes of one agent's transitions (n, ...); the last one may be cut off."""
    ends = np.flatnonzero(rows["terminals"]) + 1
    borders = [0, *ends, len(rows["terminals"])]
    for start, end in zip(borders, borders[1:]):
        if end > start:
            yield {name: x[start:end] for name, x in rows.items()}


def buffer_of(number: int, rows: dict[str, np.ndarray], env: gymnasium.Env) -> dict:
    """Returns an episode as the fields of Minari's EpisodeBuffer."""
    states = np.concatenate([rows["observations"], rows["next_observations"][-1:]])
    terminations = rows["masks"] == 0
    truncations = np.zeros_like(terminations)
    truncations[-1] = not terminations[-1]
    return dict(
        id=number,
        observations=states,
        actions=np.float32([env.action(action) for action in rows["actions"]]),
        rewards=rows["rewards"],
        terminations=terminations,
        truncations=truncations,
    )


def convert(
    run: Annotated[str, tyro.conf.Positional],
    dataset: Annotated[str, tyro.conf.Positional],
    first: int = 0,
    scores: tuple[float, float] | None = None,
) -> np.ndarray:
    """Writes the replay of a run as a dataset of Minari, and returns the returns of its episodes.

    Args:
        run: Folder of a run of an online method.
        dataset: Id of the new dataset, such as halfcheetah/sac-replay-v0.
        first: Keep only so many of each agent's transitions, the first ones (0: all).
        scores: Returns that are normalised to 0 and 100.
    """
    minari = load_extra("minari")
    flags, replay = read_replay(Path(run))
    env = make_env(env_name(SimpleNamespace(**flags), 1))
    columns = {name: x for name, x in replay.items() if name != "size"}
    buffers = []
    for agent in range(len(columns["rewards"])):
        rows = {name: x[agent, : first or None] for name, x in columns.items()}
        for episode in episodes_of(rows):
            fields = buffer_of(len(buffers), episode, env)
            buffers.append(minari.data_collector.EpisodeBuffer(**fields))
    spec = copy.deepcopy(env.spec)
    spec.additional_wrappers = ()  # that of the actions is undone, and observations are flat
    size = columns["observations"].shape[-1]
    low, high = scores or (None, None)
    minari.create_dataset_from_buffers(
        dataset,
        buffers,
        env=spec,
        observation_space=gymnasium.spaces.Box(-np.inf, np.inf, (size,)),
        action_space=action_box(env),
        algorithm_name=Path(run).resolve().parent.parent.name,
        ref_min_score=low,
        ref_max_score=high,
    )
    returns = np.array([buffer.rewards.sum() for buffer in buffers])
    print(f"{dataset}: {len(buffers)} episodes, mean return {returns.mean():.1f}")
    return returns


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; a mistake of the user ends in one line."""
    try:
        tyro.cli(convert, description=__doc__, args=args)
    except (UserError, ValueError) as error:  # Minari's, of ids
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")


if __name__ == "__main__":
    end_of_imports()
    main()
