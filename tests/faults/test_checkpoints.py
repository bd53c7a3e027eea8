"""Tests of checkpoints: bit by bit, damaged, of another run, a replay in parts, and what is left
when writing fails."""

import contextlib
import errno
import functools
import os
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.checkpoints import Checkpoints, check_same_arrays, join_parts, read_checkpoint
from common.sampling import Replay
from tests.helpers.messages import stops
from tests.helpers.small_run import content, go, metrics, restore, same_bits, save, table

# --- a state -------------------------------------------------------------------------------------


@flax.struct.dataclass
class State:
    params: dict
    opt_state: optax.OptState
    key: jax.Array


def saved(seed):
    """A tree like a script's: two agents' networks, Adam with clipping, keys, a pool."""
    keys = jax.random.split(jax.random.PRNGKey(seed), 2)
    params = {"critic": {"params": {"Dense_0": {"kernel": jax.random.normal(keys[0], (2, 3, 4))}}}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    opt_state = optimizer.init(params)
    for _ in range(seed):
        _, opt_state = optimizer.update(params, opt_state)
    envs = dict(
        seeds=np.array([1, 2**32 - seed - 1], np.uint32),
        ages=np.array([3, seed], np.int32),
        plans=np.full((seed, 2), np.float32(np.pi)),
        nothing=np.zeros((2, 0, 5), np.float32),
    )
    sums = dict(
        values=np.float32([np.nan, -0.0, np.inf, 1e-45]),
        half=jnp.bfloat16([1.5, seed]),
        updates=jnp.int32(seed),
        flags=np.arange(3) > 1,
    )
    return dict(state=State(params, opt_state, keys), envs=envs, metrics=sums, step=seed)


@pytest.fixture
def new(tmp_path):
    """A function that opens the checkpoints of a folder, of the run "one"."""
    return lambda id="one": Checkpoints(tmp_path, id)


def test_a_checkpoint_comes_back_bit_by_bit(new):
    """Optax states, keys, nested dicts, empty arrays, NaN and -0; the template's values do not
    matter, nor the lengths of the environments' arrays."""
    assert new().restore(saved(1)) is None
    first = new()
    first.save(saved(5))
    first.save(saved(3))
    found = new().restore(saved(1))
    assert found.pop("replay") == {} and found.pop("step") == 3
    expected = saved(3)
    del expected["step"]
    same_bits(found, expected)


def changed(tree, kind):
    """A template of other shapes or types, or of another structure."""
    kernel = tree["state"].params["critic"]["params"]["Dense_0"]
    if kind == "shape":
        kernel["kernel"] = kernel["kernel"][..., :3]
    elif kind == "axes":
        kernel["kernel"] = kernel["kernel"][0]
    elif kind == "dtype":
        kernel["kernel"] = np.float64(kernel["kernel"])
    elif kind == "key":
        tree["state"] = tree["state"].replace(key=np.int32(tree["state"].key))
    elif kind == "metrics":
        tree["metrics"]["values"] = tree["metrics"]["values"][:3]
    elif kind == "more":
        kernel["bias"] = kernel["kernel"]
    elif kind == "less":
        del tree["metrics"]["flags"]
    elif kind == "entry":
        tree["other"] = np.zeros(3)
    return tree


@pytest.mark.parametrize("kind", "shape axes dtype key metrics more less entry".split())
def test_a_checkpoint_of_something_else(new, kind, tmp_path):
    """Of other networks or metrics: refused in one line, not continued with wrong numbers."""
    new().save(saved(2))
    path = tmp_path / "checkpoint.msgpack"
    before = path.read_bytes()
    words = f"{path} is damaged, or of another version", "start over with --overwrite"
    stops(*words, call=lambda: new().restore(changed(saved(2), kind)))
    assert path.read_bytes() == before


def test_what_same_arrays_are():
    """Of the same shapes and types, on the device or not."""
    check_same_arrays(dict(x=jnp.zeros(3)), dict(x=np.ones(3, np.float32)))
    for other in (np.zeros(3), np.zeros(3, np.int32), np.zeros((3, 1), np.float32)):
        with pytest.raises(ValueError, match="other shapes or types"):
            check_same_arrays(dict(x=jnp.zeros(3)), dict(x=other))


def test_a_checkpoint_of_another_run_is_refused(new, tmp_path):
    """Copied into the folder, or left there: not taken for a damaged one, and not overwritten, even
    where the one before it is this run's."""
    mine = new()
    mine.save(saved(1))
    content = (tmp_path / "checkpoint.msgpack").read_bytes()
    new("other").save(saved(2))
    names = [f"checkpoint{before}.msgpack" for before in ("", "-before")]
    assert (tmp_path / names[1]).read_bytes() == content
    words = tmp_path / names[0], "belongs to another run; move it away"
    stops(*words, call=lambda: new().restore(saved(1)))
    (tmp_path / names[0]).unlink()
    assert new().restore(saved(1)) is not None
    stops(tmp_path / names[1], "belongs to another run", call=lambda: new("x").restore(saved(1)))


def test_the_id_of_a_run(run):
    """Is in config.json: a folder whose checkpoint was exchanged is not continued."""
    first, second = run(), run(name="second")
    for one in (first, second):
        save(one, 20)
    assert first.checkpoints.run != second.checkpoints.run
    path = first.folder / "checkpoint.msgpack"
    assert read_checkpoint(path)["run"] == first.checkpoints.run
    path.write_bytes((second.folder / "checkpoint.msgpack").read_bytes())
    stops(path, "belongs to another run", call=lambda: restore(first))


# --- damage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_write_that_fails_leaves_the_old_file(run, monkeypatch, function, code):
    """One line with the file and the reason; then the run continues from the old checkpoint."""

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    first = run()
    save(first, 10)
    before = (first.folder / "checkpoint.msgpack").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        words = "checkpoint.msgpack", first.folder, os.strerror(code)
        stops(*words, call=functools.partial(save, first, 20))
    assert (first.folder / "checkpoint.msgpack").read_bytes() == before
    del first
    second = run()
    assert restore(second) == (10, 10)
    save(second, 20)
    assert sorted(path.name for path in second.folder.iterdir() if path.name[0] != ".") == [
        "checkpoint-before.msgpack",
        "checkpoint.msgpack",
        "config.json",
        "script.py",
    ]


def damages(content):
    """The content cut off at several places, and with one bit flipped in many."""
    yield from (content[:kept] for kept in (0, 1, 10, 31, 32, 100, len(content) // 2, -1))
    generator = np.random.default_rng(0)
    for at in generator.integers(len(content), size=100):
        yield content[:at] + bytes([content[at] ^ 1 << generator.integers(8)]) + content[at + 1 :]


def test_a_damaged_checkpoint(new, tmp_path):
    """One line that names the file; it is left as it is."""
    new().save(saved(2))
    path = tmp_path / "checkpoint.msgpack"
    for damage in damages(path.read_bytes()):
        path.write_bytes(damage)
        stops(path, "damaged", call=lambda: new().restore(saved(2)))
        assert path.read_bytes() == damage


def test_the_checkpoint_before_a_damaged_one(run, capsys):
    """Is taken, and a line says so; rows after it are dropped."""
    first = run(eval_interval=10)
    restore(first)
    go(first, [10, 20])
    path = first.folder / "checkpoint.msgpack"
    log = (first.folder / "train.csv").read_bytes()
    del first
    for damage in [*damages(path.read_bytes())][::4]:
        path.write_bytes(damage)
        (path.parent / "train.csv").write_bytes(log)
        second = run(eval_interval=10)
        capsys.readouterr()
        assert restore(second) == (10, 10) and second.tables.last_row["train.csv"] == 10
        said = capsys.readouterr().out.splitlines()
        damaged = [line for line in said if "damaged" in line]
        assert len(damaged) == 1 and damaged[0].startswith(f"{path} is damaged")
        assert "step 10" in damaged[0] and "resuming from step 10 of 100" in said
        second.tables.log("train.csv", 15, metrics())
        assert [row[2] for row in table(path.parent / "train.csv")[1::3]] == ["10", "15"]
        del second
    path.unlink()  # as if the power had failed between the two renamings
    assert restore(run(eval_interval=10)) == (10, 10)


def test_an_evaluation_after_the_checkpoint_before(run):
    """Its rows are there: it is not due again, while that of the damaged one is dropped."""
    first = run()
    restore(first)
    for step in (20, 40):
        go(first, [step])
        assert first.evaluation_due
        first.tables.log("eval.csv", step, metrics())
    path = first.folder / "checkpoint.msgpack"
    del first
    path.write_bytes(b"")
    second = run()
    assert restore(second) == (20, 20) and not second.evaluation_due
    second.tables.log("eval.csv", 30, metrics())
    assert {row[2] for row in table(path.parent / "eval.csv")[1:]} == {"20", "30"}


# --- a replay in parts ---------------------------------------------------------------------------


def empty(capacity):
    """The empty replay of two agents."""
    return Replay.create(2, capacity, 3, 2)


def played(replay, count):
    """Adds `count` more transitions, which hold their numbers."""
    for _ in range(count):
        number = np.float32(replay.size[0])
        rows = {}
        for name, x in vars(replay).items():
            if name != "size":
                rows[name] = np.full((2, 1, *x.shape[2:]), number)
        replay = replay.append(rows)
    return replay


def state(number):
    """What a script saves; a checkpoint's step is its number."""
    return dict(state=dict(x=np.full(3, number)), metrics=dict(updates=np.zeros(2)), step=number)


def parts(folder):
    """Number of transitions that each file holds of a replay."""
    found = {}
    for path in folder.glob("replay-*.msgpack"):
        number = path.stem.removeprefix("replay-")
        if number.isdigit():
            found[int(number)] = read_checkpoint(path)["rows"]["rewards"].shape[1]
    return found


@pytest.fixture
def begun(new, tmp_path):
    """The folder of a run with checkpoints at 3, 5 and 9 transitions of 100, and its replay."""
    first, replay = new(), empty(100)
    for number, count in ((10, 3), (20, 2), (30, 4)):
        replay = played(replay, count)
        first.save(state(number), replay)
    return tmp_path, jax.device_get(replay)


def restored(checkpoints, capacity=100):
    """Restores a checkpoint: its number and the replay."""
    found = checkpoints.restore(state(0))
    return found["state"]["x"][0], empty(capacity).refill(found["replay"])


def test_a_checkpoint_writes_what_is_new_of_the_replay(begun, new, tmp_path):
    """Each part once; the run continues with all of it, and adds to it. A checkpoint of the same
    replay adds nothing, one of an empty replay has no part."""
    folder, replay = begun
    assert parts(folder) == {3: 3, 5: 2, 9: 4}
    second = new()
    number, again = restored(second)
    assert number == 30
    same_bits(again, replay)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("replay-*")}
    second.save(state(30), again)
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("replay-*")}
    second.save(state(40), played(again, 1))
    assert parts(folder) == {3: 3, 5: 2, 9: 4, 10: 1}
    other = Checkpoints(tmp_path / "empty", "two")
    other.folder.mkdir()
    other.save(state(10), empty(0))
    assert not parts(other.folder)
    number, replay = restored(other, 0)
    assert number == 10 and replay.size.tolist() == [0, 0]


def test_parts_have_the_id_of_the_run(begun, new):
    """A part of another run, under the name of this one's, is refused."""
    folder, replay = begun
    path = folder / "replay-5.msgpack"
    assert read_checkpoint(path)["run"] == "one"
    elsewhere = Checkpoints(folder / "elsewhere", "two")
    elsewhere.folder.mkdir()
    elsewhere.save(state(1), played(empty(100), 3))
    elsewhere.save(state(2), played(played(empty(100), 3), 2))
    path.write_bytes((elsewhere.folder / path.name).read_bytes())
    stops(path, "belongs to another run", call=lambda: restored(new()))


def test_the_replay_of_a_later_phase(begun, new, tmp_path):
    """A script that begins without a replay goes on with the one that is there, or with none, where
    the first checkpoint of that phase is damaged."""
    same_bits(restored(new())[1], begun[1])
    first = Checkpoints(tmp_path / "phases", "two")
    first.folder.mkdir()
    first.save(state(10), empty(0))
    first.save(state(20), played(empty(9), 2))
    (first.folder / "replay-2.msgpack").write_bytes(b"")
    number, replay = restored(first, 0)
    assert number == 10 and replay.rewards.shape == (2, 0)
    assert replay.size.tolist() == [0, 0]


def test_a_shorter_later_phase(begun, new):
    """--online-steps that are fewer than there were: the latest transitions are kept, or none."""
    whole = jax.device_get(begun[1])
    short = restored(new(), 4)[1]
    assert short.size.tolist() == [9, 9]
    same_bits(short.since(0), {k: x[:, 5:9] for k, x in vars(whole).items() if k != "size"})
    assert restored(new(), 0)[1].rewards.shape == (2, 0)


def test_an_evaluation_needs_no_replay(begun, new):
    """--eval-only reads no part."""
    folder, _ = begun
    for path in folder.glob("replay-*"):
        path.unlink()
    found = new().restore(state(0), with_replay=False)
    assert found["state"]["x"].tolist() == [30] * 3 and found["replay"] == {}
    stops("replay-3.msgpack", call=lambda: new().restore(state(0)))


def test_an_evaluation_needs_no_metrics(begun, new):
    """Those of a script that has one more are no obstacle."""
    like = state(0)
    like["metrics"] = like["metrics"] | dict(another=np.zeros(3))
    found = new().restore(like, with_replay=False)
    assert found["metrics"].keys() == like["metrics"].keys()
    stops("other shapes or types", call=lambda: new().restore(like))


def test_eval_only_reads_no_part(run):
    first = run()
    restore(first)
    first.log_and_save(20, metrics() | dict(updates=np.ones(3)), content(20), played(empty(9), 2))
    assert parts(first.folder) == {2: 2}
    folder = first.folder
    del first
    (folder / "replay-2.msgpack").unlink()
    assert restore(run(eval_only=True)) == (20, 20)


def test_parts_that_are_overwritten_are_removed(new, monkeypatch, tmp_path):
    """Once neither checkpoint needs them, with what killed writes left; other files stay, and what
    cannot be removed."""
    first, replay = new(), empty(5)
    names = "of-mine.msgpack", "3.csv", "x.npz", "3.msgpack.bak"
    others = [tmp_path / f"replay-{name}" for name in names]
    for name in ("77.msgpack", "2.msgpack.tmp"):
        (tmp_path / f"replay-{name}").touch()
    for path in others:
        path.touch()
    sizes = {
        3: [3],
        6: [3, 6],
        7: [3, 6, 7],
        8: [3, 6, 7, 8],
        9: [6, 7, 8, 9],
        19: [6, 7, 8, 9, 19],
        20: [19, 20],
    }
    for size, expected in sizes.items():
        replay = played(replay, size - int(replay.size[0]))
        first.save(state(size), replay)
        assert sorted(parts(tmp_path)) == expected
        same_bits(restored(new(), 5)[1], jax.device_get(replay))
    assert parts(tmp_path) == {19: 5, 20: 1}
    names = {path.name for path in tmp_path.glob("replay*")}
    assert names == {path.name for path in others} | {"replay-19.msgpack", "replay-20.msgpack"}

    unlink = Path.unlink

    def busy(path, **options):
        if path.suffix == ".tmp":
            return unlink(path, **options)
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(Path, "unlink", busy)
    for _ in range(2):
        replay = played(replay, 7)
        first.save(state(30), replay)
    assert sorted(parts(tmp_path)) == [19, 20, 27, 34]


def test_a_damaged_part(begun, new, capsys):
    """Of the last checkpoint alone: the one before is taken. Of both, or missing: one line that
    names both checkpoints and the part, and everything stays."""
    folder, _ = begun
    latest, oldest = folder / "replay-9.msgpack", folder / "replay-3.msgpack"
    whole = latest.read_bytes(), oldest.read_bytes()
    for damage in [*damages(whole[0])][::6]:
        latest.write_bytes(damage)
        number, replay = restored(new())
        assert number == 20
        assert replay.size.tolist() == [5, 5]
        assert replay.rewards[0, :5].tolist() == [0, 1, 2, 3, 4]
        said = capsys.readouterr().out
        assert "checkpoint.msgpack is damaged" in said and "step 20" in said
    latest.write_bytes(whole[0])
    for damage in (whole[1][:-1], whole[1][:40], None):
        if damage is None:
            oldest.unlink()
        else:
            oldest.write_bytes(damage)
        words = "checkpoint.msgpack", "checkpoint-before.msgpack", "replay-3.msgpack"
        stops(*words, call=lambda: restored(new()))
        assert oldest.exists() == (damage is not None) and latest.read_bytes() == whole[0]


def test_parts_have_to_join():
    """Without a gap, and in their order."""
    rows = lambda n: dict(rewards=np.zeros((2, n)), actions=np.ones((2, n, 3)))  # noqa: E731
    joined = join_parts([(3, rows(3)), (5, rows(2)), (9, rows(4))])
    assert joined["actions"].shape == (2, 9, 3) and joined["size"] == 9
    assert join_parts([(9, rows(4))])["rewards"].shape == (2, 4)
    assert join_parts([]) == {}
    for wrong in ([(3, rows(3)), (9, rows(4))], [(5, rows(2)), (3, rows(3))]):
        with pytest.raises(ValueError, match="its replay has a gap between"):
            join_parts(wrong)


def test_on_from_the_checkpoint_before(begun, new):
    """The damaged one's part is written again where the run comes by."""
    folder, replay = begun
    (folder / "replay-9.msgpack").write_bytes(b"")
    second = new()
    _, again = restored(second)
    second.save(state(30), played(again, 4))
    assert parts(folder) == {3: 3, 5: 2, 9: 4}
    same_bits(restored(new())[1], replay)


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_damaged_checkpoint_replaces_no_good_one(begun, new, monkeypatch, done):
    """Killed after so many renamings, when it had gone on from the one before: that one is still
    there, or the new one already."""
    folder, _ = begun
    (folder / "checkpoint.msgpack").write_bytes(b"")
    second, replace, calls = new(), os.replace, []
    _, replay = restored(second)
    replay = played(replay, 4)

    def killed(*paths):
        if len(calls) == done:
            raise KeyboardInterrupt
        calls.append(paths)
        replace(*paths)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        second.save(state(30), replay)
    number, replay = restored(new())
    assert (number, replay.size[0]) == ((30, 9) if done == 2 else (20, 5))


def test_a_part_that_cannot_be_written(begun, new, monkeypatch):
    """One line with file and reason, and the run continues from the old checkpoint."""
    folder, replay = begun

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    second = new()
    _, again = restored(second)
    call = functools.partial(second.save, state(40), played(again, 1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        stops("replay-10.msgpack", folder, call=call)
    number, again = restored(new())
    assert number == 30
    same_bits(again, replay)
