"""Makes a whole dataset: plans it, collects what is missing, and joins the parts."""

import json
import shutil
import zipfile
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import tqdm

from common.collect.episodes import collect_episode, make_collection_env
from common.collect.plan import CollectError, Plan, make_plan
from common.collect.storage import exclusive, find_damage, write_arrays
from common.collect.workers import collect_blocks
from common.env_pool import cores
from common.files import replacing


def collect(
    dataset: str,
    transitions: int | None = None,
    dataset_dir: str = "data",
    seed: int = 0,
    workers: int | None = None,
) -> Path:
    """Makes an OGBench dataset with OGBench's scripted experts, or continues an interrupted one.

    Args:
        dataset: Name, such as pointmaze-medium-navigate or cube-single-play.
        transitions: Training transitions, rounded up to whole episodes (default: the official
            size). A tenth as many episodes, at least one, are made in addition for validation.
        dataset_dir: Folder of the files, created if needed.
        seed: Seed of the dataset.
        workers: Number of processes (default: one per core). It does not change the contents.

    Returns:
        The path of the training file. The -val file and a json file of the settings are next to it.

    Raises:
        CollectError: An argument is wrong, or files with other settings are in the way.
    """
    num_workers = cores() if workers is None else workers
    plan = make_plan(dataset, transitions, dataset_dir, seed)
    _check_least("transitions", transitions, 1)
    _check_least("workers", num_workers, 1)
    _check_least("seed", seed, 0)
    plan.folder.mkdir(parents=True, exist_ok=True)
    with exclusive(plan.lock):  # A second process waits until the first has made the files.
        _check_settings(plan)
        if _is_finished(plan):
            print(f"{plan.train} and {plan.val} are already there.")
        else:
            _collect_parts(plan, num_workers)
            _join_parts(plan)
            num_transitions = plan.num_train * plan.steps
            print(f"Wrote {plan.train} ({num_transitions} transitions) and {plan.val}")
        # The parts go last, because the files that replace them are on the disk only now.
        shutil.rmtree(plan.parts, ignore_errors=True)
    return plan.train


def _check_least(flag: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise CollectError(f"--{flag} must be at least {least}, got {value}")


# --- What is already there ---


def _check_settings(plan: Plan) -> None:
    """Writes the settings; raises CollectError if files with other settings are there.

    A damaged settings file is reported and written again. Parts next to it are removed, because
    their settings are unknown. Finished files are kept if their first episode is the one that the
    present settings produce.
    """
    has_finished_files = plan.train.exists() or plan.val.exists()
    found = _read_settings(plan.settings_file)
    if found is None:
        if has_finished_files:
            _check_first_episode(plan)
        shutil.rmtree(plan.parts, ignore_errors=True)
        print(f"{plan.settings_file} is made again.", flush=True)
    elif has_finished_files or plan.parts.exists():
        _compare_settings(plan, found)
    if found != plan.settings():
        with replacing(plan.settings_file) as file:
            file.write(json.dumps(plan.settings(), indent=2).encode())


def _read_settings(path: Path) -> dict | None:
    """Reads a settings file: {} if there is none; names a damaged one and returns None."""
    if not path.exists():
        return {}
    try:
        settings = json.loads(path.read_bytes())
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
    except ValueError as error:
        print(f"{path} is damaged ({error}).", flush=True)
        return None
    return settings


def _compare_settings(plan: Plan, found: dict) -> None:
    differences = []
    for key, value in plan.settings().items():
        if found.get(key) != value:
            differences.append(f"{key}: {found.get(key, 'unknown')}, now {value}")
    if differences:
        raise CollectError(
            f"{plan.base} was made with other settings ({'; '.join(differences)}): use those, "
            f"choose another --dataset-dir, or move {plan.base}* away"
        )


def _check_first_episode(plan: Plan) -> None:
    """Raises CollectError unless a finished file begins with the episode of the settings."""
    env = make_collection_env(plan.dataset)
    for path, episodes in plan.episodes.items():
        if not _is_whole(path, len(episodes) * plan.rows):
            continue
        expected = collect_episode(env, plan.dataset, plan.seed, episodes.start)
        with np.load(path) as file:
            if all(np.array_equal(file[key][: plan.rows], expected[key]) for key in expected):
                return
    raise CollectError(
        f"{plan.base} was made with other settings or package versions: use those, choose "
        f"another --dataset-dir, or move {plan.base}* away"
    )


def _is_finished(plan: Plan) -> bool:
    is_finished = True
    for path, episodes in plan.episodes.items():
        if not _is_whole(path, len(episodes) * plan.rows, read_all=True):
            is_finished = False  # The loop goes on, to name all damaged files.
    return is_finished


def _is_whole(path: Path, num_rows: int, read_all: bool = False) -> bool:
    """Tells whether a file is there, and whole; names a damaged one."""
    if not path.exists():
        return False
    damage = find_damage(path, num_rows, read_all)
    if damage:
        print(f"{path} is damaged ({damage}).", flush=True)
    return not damage


# --- What is missing ---


def _collect_parts(plan: Plan, num_workers: int) -> None:
    """Collects the blocks whose parts are missing or damaged."""
    plan.parts.mkdir(exist_ok=True)
    missing = []
    for block in plan.blocks():
        if not _is_whole(plan.part(block), len(block) * plan.rows, read_all=True):
            missing.append(block)
    num_done = plan.num_all - sum(map(len, missing))
    size = f"{plan.num_all} episodes of {plan.steps} steps"
    print(f"Collecting {plan.base}: {size}, {num_done} done", flush=True)
    total = plan.num_all * plan.steps
    # disable=None draws the bar on a terminal only.
    bar = tqdm.tqdm(total=total, initial=num_done * plan.steps, unit=" steps", disable=None)
    with bar, closing(collect_blocks(plan, missing, num_workers)) as finished_blocks:
        for block in finished_blocks:
            bar.update(len(block) * plan.steps)


def _join_parts(plan: Plan) -> None:
    """Writes the finished files."""
    for path, episodes in plan.episodes.items():
        with ExitStack() as stack:
            parts = []
            for block in plan.blocks():
                if block.start in episodes:
                    part = stack.enter_context(np.load(plan.part(block)))
                    parts.append(part)
            write_arrays(path, parts, zipfile.ZIP_DEFLATED)
