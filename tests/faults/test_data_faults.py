"""Faults in datasets: of a thousand damaged files each ends in a line that names file and key, or
is read as a slow reader, written here a second time, reads it. FAULTS=100000 tries more of them."""

import collections
import copy
import functools
import io
import os
import pickle
import re
import resource
import struct
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from common import dataset_files, datasets
from common.dataset_files import identify, locate, read
from common.datasets import OfflineDataset
from common.environments import make_env, resolve
from common.errors import UserError
from common.sampling import Replay, sample
from tests.helpers.messages import stops

MUTANTS = int(os.environ.get("FAULTS", 1000))  # a half in arrays, a half in bytes
SOURCES = {name: resolve(name) for name in ("pointmaze-medium", "puzzle-3x3")}
FLOATS = "observations", "actions", "qpos"
TASKS = (1, 3)


# --- the files, and a slow reader of them --------------------------------------------------------


@functools.cache
def environment(name):
    """An environment whose task is set already: one is made per task, not one per file."""
    env = make_env(name)
    env.reset()
    env.reset = lambda: None
    return env


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(dataset_files, "labelling_env", environment)


@pytest.fixture(scope="module")
def real(dataset_dir):
    """Arrays of collected trajectories, two of them cut to 30 states."""
    with np.load(dataset_dir / "pointmaze-medium-navigate-v0.npz") as file:
        rows = [i + j for j in np.flatnonzero(file["terminals"])[:2] for i in range(-29, 1)]
        return {key: file[key][rows] for key in file.files}


def arrays_of(source, rng):
    """Random trajectories, such that goals are reached and buttons as wanted now and then."""
    env = environment(f"{source.env}-singletask-task1-v0").unwrapped
    S, A, Q = env.observation_space.shape[0], env.action_space.shape[0], env.model.nq
    lengths = rng.integers(2, 9, rng.integers(1, 5))
    M, ends = lengths.sum(), np.cumsum(lengths) - 1
    observations, qpos = (np.float32(3 * rng.normal(size=(M, n))) for n in (S, Q))
    actions = np.float32(rng.uniform(-1, 1, (M, A)))
    arrays = dict(observations=observations, actions=actions, qpos=qpos)
    arrays |= dict(terminals=np.isin(np.arange(M), ends))
    if source.env.startswith("puzzle"):
        near = rng.uniform(size=(M, env._num_buttons)) < 0.1
        return arrays | dict(button_states=(env._target_button_states + near) % 2)
    qpos[rng.integers(M)] = env.cur_goal_xy
    return arrays


def slow(arrays, source):
    """What a file says: dict of lists of transitions, a row at a time, in plain Python."""
    out, count = collections.defaultdict(list), len(arrays["terminals"])
    for i in range(count):
        if arrays["terminals"][i]:
            continue
        out["observations"].append([float(x) for x in arrays["observations"][i]])
        out["next"].append([float(x) for x in arrays["observations"][i + 1]])
        out["actions"].append([min(max(float(x), -0.99999), 0.99999) for x in arrays["actions"][i]])
        out["terminals"].append(float(arrays["terminals"][i + 1]))
        for task in TASKS:
            env = environment(f"{source.env}-singletask-task{task}-v0").unwrapped
            if source.env.startswith("puzzle"):
                buttons = zip(arrays["button_states"][i], env._target_button_states)
                unmet = sum(int(x) != int(goal) for x, goal in buttons)
            else:
                far = [float(x) - float(y) for x, y in zip(arrays["qpos"][i], env.cur_goal_xy)]
                unmet = int((far[0] ** 2 + far[1] ** 2) ** 0.5 > env._goal_tol)
            out[f"rewards {task}"].append(-unmet)
            out[f"masks {task}"].append(int(unmet > 0))
    return out


def check_read(path, source, arrays):
    """The file is read as `arrays` say."""
    data, expected = read(path, source, TASKS), slow(arrays, source)
    found = dict(observations=data.observations[data.rows], actions=data.actions)
    found |= dict(next=data.observations[data.rows + 1], terminals=data.terminals)
    for i, task in enumerate(TASKS):
        found |= {f"rewards {task}": data.rewards[i], f"masks {task}": data.masks[i]}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], np.float32(values), err_msg=f"{path} {name}")


def outcome(path, source, arrays, keys=()):
    """Returns "read" or "refused", both checked; `keys`: the line has to name one of them. What is
    read has an identity, too."""
    begin = time.perf_counter()
    try:
        check_read(path, source, arrays)
        assert len(identify([path])["checksum"]) == 8
    except UserError as error:
        line = str(error)
        assert line.startswith(f"bad dataset {path}: ") and "\n" not in line, line
        assert len(line) < 600 + len(str(path)), line
        assert not keys or any(key in line for key in keys), f"none of {keys} in {line}"
        return "refused"
    finally:
        assert time.perf_counter() - begin < 20
    return "read"


# --- mutants in the arrays -----------------------------------------------------------------------
# Each takes (arrays, rng), changes the dict of arrays, and returns the keys of which one must be
# named when the file is refused, or nothing where the file must be read.


class Payload:
    """Unpickled, it leaves a trace."""

    executed = []

    def __reduce__(self):
        return Payload.executed.append, (1,)


def needed(arrays):
    return [key for key in (*FLOATS, "terminals", "button_states") if key in arrays]


def one(rng, x, value):
    """`x` with `value` in a random place."""
    x = np.array(x, order="C")
    x.flat[rng.integers(x.size)] = value
    return x


def missing(arrays, rng):
    key = rng.choice(needed(arrays))
    del arrays[key]
    return [key]


def wrong_dtype(arrays, rng):
    key = rng.choice(needed(arrays))
    kinds = "c8 U3 S2 M8[s] m8[s] V4".split()
    kind = kinds[rng.integers(len(kinds))]
    arrays[key] = np.zeros(arrays[key].shape, kind)
    return [key]


def structured(arrays, rng):
    key = rng.choice(needed(arrays))
    arrays[key] = np.zeros(arrays[key].shape, [("x", "f4"), ("y", "i2")])
    return [key]


def pickled(arrays, rng):
    key = rng.choice([*needed(arrays), "extra"])
    arrays[key] = np.array([Payload()] * len(arrays["actions"]), object)
    return [key]


def wrong_axes(arrays, rng):
    key = rng.choice(needed(arrays))
    x = arrays[key]
    arrays[key] = [x[..., None], x[None], x.ravel()[0], x[:, None, None]][rng.integers(4)]
    return [key, "terminals"]


def wrong_rows(arrays, rng):
    key = rng.choice(needed(arrays))
    x, cut = arrays[key], rng.integers(1, 3)
    arrays[key] = [x[:-cut], x[cut:], x[:0], np.concatenate([x, x[-cut:]])][rng.integers(4)]
    return [*arrays]


def wrong_width(arrays, rng):
    key = rng.choice([key for key in needed(arrays) if key != "terminals"])
    x = arrays[key]
    arrays[key] = [x[:, 1:], x[:, :0], np.concatenate([x, x[:, :1]], 1)][rng.integers(3)]
    return [key]


def empty(arrays, rng):
    for key, x in arrays.items():
        arrays[key] = x[:0]
    return ["terminals"]


def not_finite(arrays, rng):
    key = rng.choice(needed(arrays))
    value = rng.choice([np.nan, np.inf, -np.inf])
    dtype = rng.choice(["f2", "f4", "f8", ">f4"])
    arrays[key] = one(rng, arrays[key].astype(dtype), value)
    return [key]


def too_large(arrays, rng):
    key = rng.choice(needed(arrays))
    arrays[key] = one(rng, arrays[key].astype("f8"), rng.choice([1e31, -1e39, 1e300]))
    return [key]


def outside_of_the_box(arrays, rng):
    value = rng.choice([-1, 1]) * (1 + 10.0 ** rng.integers(-3, 6))
    arrays["actions"] = one(rng, arrays["actions"].astype(rng.choice(["f4", "f8"])), value)
    return ["actions"]


def outside_of_the_box_as_integers(arrays, rng):
    dtype = rng.choice(["i1", "i2", "i4", "i8", "u1", "u8"])
    limits = np.iinfo(dtype)
    x = np.zeros(arrays["actions"].shape, dtype)
    arrays["actions"] = one(rng, x, [2, limits.max, limits.min or 2][rng.integers(3)])
    return ["actions"]


def no_terminal(arrays, rng):
    x = arrays["terminals"] != 0
    last = np.arange(len(x)) == len(x) - 1
    arrays["terminals"] = [0 * x, x & ~last, x | True][rng.integers(3)].astype(
        rng.choice([bool, "f4"])
    )
    return ["terminals"]


def strange_terminals(arrays, rng):
    value = rng.choice([0.5, 2, -1, 1e-5, 255])
    arrays["terminals"] = one(rng, arrays["terminals"].astype("f8"), value)
    return ["terminals"]


def swapped_terminals(arrays, rng):
    """Ones where an episode goes on."""
    arrays["terminals"] = arrays["terminals"] == 0
    return ["terminals"]


def strange_buttons(arrays, rng):
    x = arrays.get("button_states", arrays["actions"])  # a maze has none
    arrays["button_states"] = one(rng, x.astype("f8"), rng.choice([2, -1, 0.5, 9]))
    return ["button_states"]


def swapped_keys(arrays, rng):
    keys = ["observations", "actions"]
    arrays |= dict(zip(keys, [arrays[key] for key in keys[::-1]]))
    arrays["actions"] = one(
        rng, arrays["actions"].astype("f8"), 7
    )  # where a maze's states are all near 0
    return keys


def other_floats(arrays, rng):
    key = rng.choice(FLOATS)
    arrays[key] = arrays[key].astype(rng.choice(["f2", ">f2", ">f4", "f8", ">f8", np.longdouble]))


def whole_numbers(arrays, rng):
    key = rng.choice(FLOATS)
    kind = rng.choice(["i1", ">i2", "i8", "u1", "u8"] + ["?"] * (key != "qpos"))
    arrays[key] = np.abs(np.round(arrays[key])).astype(kind)


def other_flags(arrays, rng):
    key = rng.choice([key for key in needed(arrays) if key not in FLOATS])
    arrays[key] = arrays[key].astype(rng.choice(["?", "i1", "u2", ">i4", "u8", "f2", ">f8"]))


def other_order(arrays, rng):
    for key in FLOATS:
        arrays[key] = np.asfortranarray(arrays[key])


def more_keys(arrays, rng):
    values = np.full(3, np.nan), np.array(["text"]), np.zeros(0), np.zeros((2, 2, 2), "c8")
    for i, value in enumerate(values):
        arrays[f"extra {i}"] = value
    arrays["qvel"] = np.full(arrays["qpos"].shape, np.inf)


def shuffled_keys(arrays, rng):
    for key in rng.permutation([*arrays]):
        arrays[key] = arrays.pop(key)


def on_the_edge(arrays, rng):
    value = rng.choice([-1, 1]) * rng.choice([1, 1.00005, 0.999999, 0.99999])
    arrays["actions"] = one(rng, arrays["actions"], value)


def states_alone(arrays, rng):
    """Trajectories of a single state, which have no transition."""
    x = arrays["terminals"] != 0
    x[rng.integers(len(x) - 1)] = True
    x[:1] = False
    arrays["terminals"] = x


REFUSED = [missing, wrong_dtype, structured, pickled, wrong_axes, wrong_rows, wrong_width, empty]
REFUSED += [not_finite, too_large, outside_of_the_box, outside_of_the_box_as_integers, no_terminal]
REFUSED += [strange_terminals, swapped_terminals, strange_buttons, swapped_keys]
READ = [other_floats, whole_numbers, other_flags, other_order, more_keys, shuffled_keys]
READ += [on_the_edge, states_alone]


def packed(arrays, compress):
    stream = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(stream, **arrays)
    return stream.getvalue()


def test_mutants_of_arrays(tmp_path):
    """Up to two harmless changes, then none or a harmful one. Whatever the types, the order and the
    further keys, a file is read as it says; a harmful change is refused by its key."""
    path, counts, made = tmp_path / "mutant.npz", collections.Counter(), collections.Counter()
    for i in range(MUTANTS // 2):
        rng = np.random.default_rng((0, i))
        source = SOURCES[rng.choice([*SOURCES])]
        arrays, keys = arrays_of(source, rng), []
        harmless = list(rng.choice(READ, rng.integers(3), replace=False))
        harmful = [REFUSED[i // 3 % len(REFUSED)]] if i % 3 else []
        for change in harmless + harmful:
            keys = change(arrays, rng) or keys
            made[change] += 1
        path.write_bytes(packed(arrays, rng.uniform() < 0.5))
        names = [change.__name__ for change in harmless + harmful]
        result = outcome(path, source, arrays, keys)
        assert result == ("refused" if harmful else "read"), f"mutant {i} {names}: {result}"
        counts[result] += 1
    print(*(f"{n} {name}" for name, n in counts.items()))
    assert set(made) == {*REFUSED, *READ} or MUTANTS < 500
    assert not Payload.executed


# --- mutants of bytes ----------------------------------------------------------------------------


def parts(content):
    """Where a zip's local headers, arrays' headers and directory begin."""
    found = [
        m.start() for m in re.finditer(rb"PK\x03\x04|\x93NUMPY|PK\x01\x02|PK\x05\x06", content)
    ]
    return found or [0]


def damaged(content, rng):
    """Bytes with a random fault, every second one near a header."""
    size, kind = len(content), rng.integers(9)
    at = int(rng.integers(size))
    if rng.uniform() < 0.5:
        at = min(size - 1, int(rng.choice(parts(content)) + rng.integers(60)))
    more = min(size, at + 1 + int(2 ** rng.uniform(0, 12)))
    old, new = content[at:more], bytearray(content)
    if kind < 3:
        new[at] ^= 1 << rng.integers(8)
    elif kind == 3:
        new[at] = rng.integers(256)
    elif kind == 4:
        new = content[:at] if rng.uniform() < 0.5 else content[at:]
    elif kind == 5:
        new[at:more] = b""
    elif kind == 6:
        new[at:more] = rng.bytes(len(old)) if rng.uniform() < 0.5 else bytes(len(old))
    elif kind == 7:
        new[at:at] = old
    else:
        to = int(rng.integers(size))
        new[to : to + len(old)] = old
    return bytes(new)


def test_mutants_of_bytes(tmp_path, real):
    """Cut, changed, doubled and missing bytes in a small file with real rows: what is read is what
    was written."""
    path, counts, source = (
        tmp_path / "mutant.npz",
        collections.Counter(),
        resolve("pointmaze-medium"),
    )
    files = [packed(real, compress) for compress in (False, True)]
    path.write_bytes(files[1])
    assert outcome(path, source, real) == "read"
    for i in range(MUTANTS // 2):
        rng = np.random.default_rng((1, i))
        path.write_bytes(damaged(files[i % 2], rng))
        counts[outcome(path, source, real)] += 1
    print(*(f"{n} {name}" for name, n in counts.items()))
    assert counts["refused"] > counts["read"] > 0  # dates, permissions and so on do not matter


def member(file, name, content):
    """A part of a zip, as it is."""
    file.writestr(zipfile.ZipInfo(name), content)


def npy(header, content=bytes(64), version=b"\1\0"):
    """An .npy file with any header."""
    header = header.encode("latin1")
    size = struct.pack("<H" if version[0] == 1 else "<I", len(header))
    return b"\x93NUMPY" + version + size + header + content


HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (4, 2)}"
HEADERS = dict(
    smaller_numbers=HEADER.replace("f4", "f2"),
    fewer_rows=HEADER.replace("(4", "(3"),
    no_rows=HEADER.replace("(4", "(0"),
    more_rows=HEADER.replace("(4", "(5"),
    huge=HEADER.replace("(4", "(1000000000000"),
    beyond_64_bits=HEADER.replace("(4", "(10**30".replace("10**30", "1" + "0" * 30)),
    nothing_but_many=HEADER.replace("f4", "S0").replace("(4", "(1000000000000"),
    negative=HEADER.replace("(4", "(-4"),
    fraction=HEADER.replace("(4", "(4.0"),
    a_power=HEADER.replace("(4", "(9**9**9"),
    code=HEADER.replace("'<f4'", "__import__('os').getpid()"),
    objects=HEADER.replace("<f4", "|O"),
    no_type=HEADER.replace("<f4", "<q9"),
    list_of_types=HEADER.replace("'<f4'", "[('x', '<f4'), ('x', '<f4')]"),
    order=HEADER.replace("False", "2"),
    more=HEADER.replace("}", ", 'more': 1}"),
    less="{'descr': '<f4', 'fortran_order': False}",
    no_dict="(4, 2)",
    nothing="",
    nested="(" * 9000,
    long=HEADER + " " * 60000,
    zeros="\0" * 100,
    lines=HEADER.replace("(4", "\n\n(x"),
)


@pytest.mark.parametrize("case", HEADERS)
@pytest.mark.parametrize("key", ["observations", "qpos"])
def test_headers_of_arrays(case, key, tmp_path):
    """An array with a strange header, under a right checksum: numpy's complaints of several lines
    become one, and bytes that no array uses are found."""
    path, data = tmp_path / "headers.npz", np.zeros((4, 2), np.float32)
    arrays = dict.fromkeys(FLOATS, data) | dict(terminals=np.arange(4) == 3)
    path.write_bytes(packed({k: x for k, x in arrays.items() if k != key}, True))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    content = bytes(32) if case != "more_rows" else bytes(39)
    with zipfile.ZipFile(path, "a") as file:
        member(file, f"{key}.npy", npy(HEADERS[case], content))
    assert outcome(path, SOURCES["pointmaze-medium"], arrays, [key]) == "refused"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB


def test_parts_that_are_no_arrays(tmp_path):
    """Text, a pickle, an archive, a newer version of the format, nothing: under the name of a key,
    with and without .npy, or under another one. Nothing is unpickled."""
    arrays = dict.fromkeys(FLOATS, np.zeros((4, 2))) | dict(terminals=np.arange(4) == 3)
    pickles = [pickle.dumps(Payload(), protocol) for protocol in range(5)]
    contents = [b"", b"text", npy(HEADER, version=b"\4\0"), packed(arrays, True), *pickles]
    for i, content in enumerate(contents):
        for name in ("observations.npy", "observations", "readme.txt"):
            path, key = tmp_path / f"{i}.npz", name.removesuffix(".npy")
            path.write_bytes(packed({k: x for k, x in arrays.items() if k != key}, True))
            with zipfile.ZipFile(path, "a") as file:
                member(file, name, content)
            assert outcome(path, SOURCES["pointmaze-medium"], arrays, [key]) == "refused"
        (tmp_path / "alone").write_bytes(content)  # in place of the file
        if i != 3:
            assert outcome(tmp_path / "alone", SOURCES["pointmaze-medium"], arrays) == "refused"
    assert not Payload.executed


# --- bombs ---------------------------------------------------------------------------------------


def peak(call):
    """Bytes that Python and numpy held at most during the call."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def bomb(path, zeros, noise=0, says=None):
    """A file with a key of so many zeros, packed to a thousandth, and one that cannot be packed;
    `says`: the size of the zeros in the directory."""
    arrays = dict.fromkeys(FLOATS, np.zeros((4, 2))) | dict(terminals=np.arange(4) == 3)
    path.write_bytes(packed(arrays | dict(noise=np.frombuffer(os.urandom(noise), "u1")), True))
    header = npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({zeros},)}}", b"")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("extra.npy", header + bytes(zeros))
        if says:  # with the checksum of that many bytes
            file.filelist[-1].file_size = says
            file.filelist[-1].CRC = zlib.crc32((header + bytes(zeros))[:says])
    return arrays


@pytest.mark.parametrize("says", [None, 2**45])
def test_bombs_are_not_unpacked(says, tmp_path):
    """The directory's sizes are looked at before anything is read."""
    path = tmp_path / "bomb.npz"
    arrays = bomb(path, 50_000_000, says=says)
    assert path.stat().st_size < 100_000

    def call():
        assert outcome(path, SOURCES["pointmaze-medium"], arrays, ["100 times"]) == "refused"

    assert peak(call) < 5_000_000


def test_many_names_for_the_same_bytes(tmp_path):
    """A bomb whose parts overlap: each of them is counted."""
    path = tmp_path / "bomb.npz"
    arrays = bomb(path, 100_000, 2_000)
    assert outcome(path, SOURCES["pointmaze-medium"], arrays) == "read"
    with zipfile.ZipFile(path, "a") as file:
        file.filelist += [copy.copy(file.filelist[-1]) for _ in range(100)]
        member(file, "last.npy", npy(HEADER, bytes(32)))  # else no directory is written
    assert outcome(path, SOURCES["pointmaze-medium"], arrays, ["100 times"]) == "refused"


@pytest.mark.parametrize("noise, result", [(30_000, "read"), (10_000, "refused")])
def test_data_that_pack_well_are_no_bombs(noise, result, tmp_path):
    """Packed to a sixtieth, they are read; to a hundred-and-sixtieth, they are not."""
    arrays = bomb(tmp_path / "large.npz", 2_000_000, noise)
    assert outcome(tmp_path / "large.npz", SOURCES["pointmaze-medium"], arrays) == result


@pytest.mark.parametrize("says", [50, 200, 5000])
def test_a_directory_that_promises_too_little(says, tmp_path):
    """No more is unpacked than promised, even with the checksum of that."""
    path = tmp_path / "bomb.npz"
    arrays = bomb(path, 20_000_000, says=says)

    def call():
        assert outcome(path, SOURCES["pointmaze-medium"], arrays, ["extra"]) == "refused"

    assert peak(call) < 25_000_000  # 20 MB are what the header asks for, and nobody fills


# --- shards, folders, train and validation -------------------------------------------------------


def dataset(folder, tasks=(1,), chunk_length=1):
    """The dataset of a run on the files of a folder."""
    args = SimpleNamespace(
        env="pointmaze-medium",
        dataset="",
        dataset_dir=str(folder),
        collect=0,
        reward_scale=1,
        reward_shift=0,
        normalize_observations=False,
        tasks=tasks,
        sparse=False,
        chunk_length=chunk_length,
        offline_steps=10**6,
        online_steps=0,
        eval_episodes=0,
    )
    return OfflineDataset(args, 1)


@pytest.mark.parametrize("seed", range(6))
def test_one_bad_shard_of_many(seed, tmp_path, monkeypatch):
    """Those before it train; at its turn the run ends in the line of this file."""
    monkeypatch.setattr(datasets, "SWAP_INTERVAL", 1)
    rng = np.random.default_rng(seed)
    paths = [tmp_path / f"pointmaze-medium-navigate-v0-00{i}.npz" for i in range(8)]
    source, bad = SOURCES["pointmaze-medium"], int(rng.integers(2, 8))
    arrays = arrays_of(source, rng)
    for path in paths:
        path.write_bytes(packed(arrays, True))
    change = [missing, wrong_dtype, pickled, not_finite, outside_of_the_box, no_terminal][seed]
    keys = change(arrays, rng)
    paths[bad].write_bytes(packed(arrays, True))
    data = dataset(tmp_path)
    for step in range(bad - 1):  # the first update is drawn from shard 1
        data.at(step)
    line = stops(f"bad dataset {paths[bad]}", call=lambda: data.at(bad - 1))
    assert any(key in line for key in keys), line


def located(source, folder, *words):
    return stops(*words, folder, lines=5, call=lambda: locate(resolve(source), str(folder)))


def test_a_folder_with_validation_files_alone(tmp_path):
    """They are not trained on, and the line says that they are there; a point maze is not collected
    next to them either."""
    for name in ("cube-single-play", "pointmaze-medium-navigate"):
        (tmp_path / f"{name}-v0-val.npz").touch()
    located("cube-single", tmp_path, "cube-single-play-v0-val.npz", "cube-single-play-v0.npz")
    located("pointmaze-medium", tmp_path, "pointmaze-medium-navigate")
    assert len([*tmp_path.iterdir()]) == 2


def test_folders_that_are_none(tmp_path):
    """A file in place of the folder, or a folder that cannot be made."""
    (tmp_path / "file.npz").touch()
    for folder in (tmp_path / "file.npz", tmp_path / "file.npz" / "sub"):
        located("cube-single", folder, "--dataset-dir")
        located("pointmaze-medium", folder)


@pytest.mark.parametrize("length", [3, 4, 2**31 - 1])
def test_chunks_longer_than_every_trajectory(length, tmp_path):
    """Refused: none of them would be valid, and nothing be learned."""
    arrays = dict.fromkeys(FLOATS, np.zeros((7, 2))) | dict(terminals=np.isin(np.arange(7), (3, 6)))
    path = tmp_path / "pointmaze-medium-navigate-v0-short.npz"
    path.write_bytes(packed(arrays, True))
    if length > 3:
        words = f"--chunk-length {length} must be at most 3", path.name
        stops(*words, call=lambda: dataset(tmp_path, chunk_length=length))
        return
    data = dataset(tmp_path, chunk_length=length).at(0)
    replay = jax.tree.map(lambda x: x[0], Replay.create(1, 0, 2, 2))
    draw = jax.jit(lambda key: sample(key, data, replay, 0, 64, length, 0.9))
    assert {0.0, 1.0} == set(draw(jax.random.PRNGKey(0)).valid.tolist())


# --- bring your own ------------------------------------------------------------------------------


def test_the_documented_way_to_bring_your_own(tmp_path, monkeypatch):
    """The code in docs/guides/data.md, run on trajectories of the environment, writes a file that
    is found and read; it is short."""
    text = (Path(__file__).parents[2] / "docs/guides/data.md").read_text()
    code = re.search(r"^    import os.*?(?=^\S)", text, re.M | re.S)[0].rstrip()
    lines = [line[4:] for line in code.splitlines()]
    assert len(lines) <= 15
    env, source = environment("cube-single-singletask-task2-v0"), resolve("cube-single")
    rng, trajectories, positions = np.random.default_rng(0), [], env.unwrapped.model.nq
    S, A = env.observation_space.shape[0], env.action_space.shape[0]
    for length in (4, 2, 5):
        rows = [(rng.normal(size=S), 1.5 * rng.normal(size=A), np.zeros(positions))] * length
        trajectories.append([tuple(rng.permutation(x) for x in row) for row in rows])
    monkeypatch.chdir(tmp_path)
    exec("\n".join(lines), dict(my_trajectories=trajectories))
    (path,) = locate(source, "mine")
    data = read(path, source, (2,))
    before = np.concatenate([[row[0] for row in x[:-1]] for x in trajectories])
    after = np.concatenate([[row[0] for row in x[1:]] for x in trajectories])
    actions = np.concatenate([[row[1] for row in x[:-1]] for x in trajectories])
    np.testing.assert_array_equal(data.observations[data.rows], np.float32(before))
    np.testing.assert_array_equal(data.observations[data.rows + 1], np.float32(after))
    clipped = np.clip(np.float32(actions), -0.99999, 0.99999)
    np.testing.assert_array_equal(data.actions, np.float32(clipped))
    assert data.terminals.tolist() == [0, 0, 1, 1, 0, 0, 0, 1]
