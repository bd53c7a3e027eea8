"""Your own transitions as a Dataset: .npz and .hdf5 files with D4RL's keys, Minari's datasets."""

import dataclasses
import importlib
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, flatten
from gymnasium.vector.utils import batch_space, iterate

from common.dataset_files import BadDataset, check_array, read_arrays
from common.environments import MINARI, env_name, make_env
from common.errors import UserError, in_a_line
from common.gym_environments import action_box, check_actions
from common.sampling import Dataset

KEYS = ("observations", "actions", "rewards", "terminals")
END_KEYS = ("timeouts", "next_observations")  # at least one of them
OTHER_NAMES = dict(terminations="terminals", truncations="timeouts")  # gymnasium's and Minari's
# Returns of a random and of an expert policy that D4RL publishes, by the first word of its files.
D4RL_SCORES = dict(
    halfcheetah=(-280.178953, 12135.0),
    hopper=(-20.272305, 3234.3),
    walker2d=(1.629008, 4592.3),
    ant=(-325.6, 3879.7),
)
Arrays = dict[str, np.ndarray]


def load_extra(name: str) -> Any:
    """Imports a package that only own data need."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f'{name} is missing: pip install "minari[hdf5]"') from None


def load_minari(name: str) -> Any:
    """Returns a MinariDataset that is on this machine."""
    id = name.removeprefix(MINARI)
    minari = load_extra("minari")
    try:
        return minari.load_dataset(id)
    except (ValueError, OSError) as error:
        raise UserError(f"{in_a_line(error)} Get it with: minari download {id}") from None


def environment_of(minari: Any) -> EnvSpec | None:
    """Returns the environment that a MinariDataset has for evaluations, else that of the data."""
    return getattr(minari, "_eval_env_spec", None) or minari.env_spec


def recorded_in(dataset: str) -> dict:
    """Returns the flags of the environment that belongs to a dataset; for a file, its name."""
    spec = environment_of(load_minari(dataset)) if dataset.startswith(MINARI) else None
    if spec is None:
        return dict(env=Path(dataset).stem)
    package = re.split("[.:]", spec.entry_point)[0]  # its import registers the environment
    return dict(
        env=spec.id if package == "gymnasium" else f"{package}:{spec.id}",
        env_kwargs=json.dumps(spec.kwargs),
        max_episode_steps=int(spec.max_episode_steps or 0),
    )


def read_minari(name: str) -> tuple[Arrays, Box, list, list[str]]:
    """Returns a dataset's arrays, the range of its actions, its reference scores, if any, and what
    is not used of the environment in which it was recorded."""
    minari = load_minari(name)
    actions = minari.action_space
    try:
        check_actions(actions)
    except ValueError as error:
        raise BadDataset(name, f"its actions are {error}") from None
    space = minari.observation_space
    episodes = []
    try:
        for episode in minari.iterate_episodes():
            steps = iterate(batch_space(space, len(episode) + 1), episode.observations)
            states = np.array([flatten(space, state) for state in steps])
            columns = {key: getattr(episode, key) for key in ("actions", "rewards", *OTHER_NAMES)}
            columns["truncations"][-1] = True  # also where the recording was stopped
            columns |= dict(observations=states[:-1], next_observations=states[1:])
            episodes.append(columns)
    except (OSError, ValueError, KeyError) as error:
        raise BadDataset(name, f"it is damaged ({in_a_line(error)})") from None
    if not episodes:
        raise BadDataset(name, "it has no episodes")
    arrays = {}
    for key in episodes[0]:
        arrays[key] = np.concatenate([columns[key] for columns in episodes])
    metadata = minari.storage.metadata
    scores = [metadata.get(f"ref_{end}_score") for end in ("min", "max")]
    wrapped_by = getattr(environment_of(minari), "additional_wrappers", ())
    wrappers = [wrapper.name for wrapper in wrapped_by]
    unused = [f"wrappers of the recorded environment: {', '.join(wrappers)}"] if wrappers else []
    return arrays, actions, scores, unused


def read_file(path: Path) -> Arrays:
    """Reads the arrays of an .npz file, or those at the root of an .hdf5 file."""
    if path.suffix == ".npz":
        return read_arrays(path)
    h5py = load_extra("h5py")
    try:
        with h5py.File(path) as file:
            return {key: np.array(x) for key, x in file.items()}  # of a group, its names
    except OSError as error:
        raise BadDataset(path, f"it is not readable as .npz or .hdf5 ({error})") from None


def check(name: str, arrays: Arrays) -> None:
    """Raises BadDataset unless there are transitions, and it is known where episodes end."""
    missing = sorted({*KEYS} - {*arrays})
    if missing:
        found = f"found {sorted(arrays)}; OGBench's own files are read with --dataset-dir"
        raise BadDataset(name, f"keys {missing} are missing, {found}")
    if not {*END_KEYS} & {*arrays}:
        keys = "'timeouts' or 'truncations', or 'next_observations'"
        raise BadDataset(name, f"it does not say where episodes are cut off: add {keys}")
    if not arrays["rewards"].size:
        raise BadDataset(name, "it has no transitions")
    for key, x in arrays.items():
        check_array(name, key, x, arrays["rewards"].size)
    states = arrays["observations"]
    if states.shape != arrays.get("next_observations", states).shape:
        raise BadDataset(name, "'observations' and 'next_observations' have different widths")


def to_dataset(arrays: Arrays) -> Dataset:
    """Returns the transitions, with the final state of every trajectory after its other states.

    A trajectory ends at `terminals`, at `timeouts`, and where `next_observations` are not what the
    next row observes. Without `next_observations`, a row with a time-out only gives the final
    state; its action is not used, because it is unknown where it led.
    """
    observations = np.float32(arrays["observations"])
    terminals = arrays["terminals"].astype(bool)
    ends = terminals | arrays.get("timeouts", terminals).astype(bool)
    ends[-1] = True
    if "next_observations" in arrays:
        following = np.float32(arrays["next_observations"])
        ends[:-1] |= (following[:-1] != observations[1:]).any(axis=1)
        used = np.ones_like(ends)
    else:
        following = np.roll(observations, -1, axis=0)
        following[terminals] = observations[terminals]  # nothing is expected there
        used = terminals | ~ends
    if not used.any():
        raise UserError("bad dataset: nothing says where its actions led; add 'next_observations'")
    trajectory = (np.cumsum(ends) - ends)[used]
    last = np.append(trajectory[1:] != trajectory[:-1], True)
    rows = np.arange(len(last)) + np.cumsum(last) - last
    states = np.empty((rows[-1] + 2, observations.shape[1]), np.float32)
    states[rows] = observations[used]
    states[rows + 1] = following[used]
    return Dataset(
        observations=states,
        rows=np.int32(rows),
        actions=np.float32(arrays["actions"][used]),
        rewards=np.float32(arrays["rewards"][used])[None],
        masks=np.float32(~terminals[used])[None],
        terminals=np.float32(last),
    )


def action_range(args: Any, arrays: Arrays) -> Box | None:
    """Returns the range of actions in the environment of --env.

    If the environment cannot be made or its sizes differ, raises UserError when episodes are to be
    played; otherwise prints the reason and returns None.
    """
    named = dataclasses.replace(args, eval_episodes=1)  # 0 would mean: no environment
    widths = [arrays[key].shape[1] for key in KEYS[:2]]
    try:
        env = make_env(env_name(named, args.tasks[0]))
        env.close()
        expected = [*env.observation_space.shape, *env.action_space.shape]
        if widths != expected:
            where = f"expected {expected} for {args.env}"
            raise BadDataset(args.dataset, f"{list(KEYS[:2])} have widths {widths}, {where}")
    except UserError as error:
        if args.eval_episodes or args.online_steps:
            raise
        print(f"actions      as they are, in [-1, 1], because {in_a_line(error)}")
        return None
    return action_box(env)


def read_own(args: Any) -> tuple[Dataset, dict]:
    """Reads the data of --dataset, in NumPy arrays; also returns what identifies them.

    Actions are rescaled to [-1, 1] like those of the environment, if it can be made. It has to be
    there only if episodes are to be played.
    """
    if len(args.tasks) > 1:
        raise UserError("--tasks must name one task, because the rewards of --dataset are of one")
    if args.sparse:
        raise UserError("--sparse is about OGBench's rewards; those of --dataset are used as given")
    name = args.dataset
    path = Path(name).expanduser()
    if name.startswith(MINARI):
        found, box, scores, unused = read_minari(name)
    else:
        found = read_file(path)
        box = None
        unused = []
        scores = D4RL_SCORES.get(re.split("[-_]", path.name)[0])
    for other, usual in OTHER_NAMES.items():
        if other in found and usual in found:
            raise BadDataset(name, f"'{other}' and '{usual}' are the same thing: remove one")
    found = {OTHER_NAMES.get(key, key): x for key, x in found.items()}
    arrays = {key: x for key, x in found.items() if key in KEYS + END_KEYS}
    check(name, arrays)
    unused = [*sorted(found.keys() - arrays), *unused]
    print(f"not used     {', '.join(unused) or 'nothing'}")
    checksum = 0
    for key in sorted(arrays):
        checksum = zlib.crc32(np.ascontiguousarray(arrays[key]), checksum)
    played_in = action_range(args, arrays)
    box = box or played_in
    actions = arrays["actions"]
    if box is not None:
        for bounds in (box.low, box.high):  # another range means other actions
            checksum = zlib.crc32(np.ascontiguousarray(bounds), checksum)
        actions = 2 * (actions - box.low) / (box.high - box.low) - 1
    check_array(name, "actions", actions, len(actions), (-1, 1))
    arrays["actions"] = np.clip(actions, -1 + 1e-5, 1 - 1e-5)  # like those of OGBench's files
    data = to_dataset(arrays)
    identity = dict(checksum=f"{checksum:08x}")
    if scores and None not in scores:
        identity["reference_scores"] = [*map(float, scores)]
    return data, identity
