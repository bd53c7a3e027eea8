"""Scripts from Python: training, and trained agents as functions, loaded from a run's folder
wherever it and its script went."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest

import fmer
import qam
from baselines import ppo, sac
from common.agents import load_agent, load_agents, stored_script, train
from common.checkpoints import read_checkpoint
from common.environments import seed_of
from common.flags import parse
from common.workers import Slot
from tests.helpers.flags import tiny_args, tiny_online, tiny_ppo
from tests.helpers.messages import stops
from tests.helpers.runs import folder_of, quick
from tools.shared_blocks import ROOT

pytestmark = pytest.mark.usefixtures("quick_compile", "one_process")
TASK = 2
SIZE = 2  # of the point maze's observations


@pytest.fixture(scope="module")
def moved(dataset_dir, tmp_path_factory):
    """A folder elsewhere with the run of an agent of qam.py, and its state when it ended."""
    root = tmp_path_factory.mktemp("runs")
    args = tiny_args(qam, dataset_dir, tasks=(TASK,), run_dir=str(root), online_steps=0)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.run.draw_pictures", lambda folder: None)
        evaluate = qam.evaluate
        patch.setattr(qam, "evaluate", lambda *x: seen.append(x) or evaluate(*x))
        qam.main(args)
    target = tmp_path_factory.mktemp("elsewhere") / "mine"
    shutil.move(root / "qam/pointmaze-medium/default", target)
    return target, *seen[-1][:2]  # Args with the size of actions, and State


@pytest.fixture(scope="module")
def observations():
    return np.random.default_rng(0).normal(size=(3, SIZE)).astype(np.float32)


def expected_actions(args, state, observations, seed):
    """Actions of the script itself, of the first agent: (n, S) -> (n, H, d)."""
    seeds = np.full((1, len(observations)), seed, np.uint32)
    ages = np.arange(len(observations), dtype=np.int32)[None]
    return np.asarray(qam.act(args, state, observations[None], seeds, ages))[0]


# --- acting --------------------------------------------------------------------------------------


def test_an_agent_acts_bit_for_bit_as_in_its_run(moved, observations):
    """Loaded from a moved folder, by the source in it."""
    folder, args, state = moved
    agent = load_agent(folder)
    own_source = (folder / "script.py").read_text()
    assert agent.script is not qam and Path(agent.script.__file__).read_text() == own_source
    assert (agent.name, agent.task, agent.seed, agent.step) == ("qam", TASK, 0, 10)
    limit = '{"max_episode_steps": 100}'
    assert agent.env == f"pointmaze-medium-singletask-task{TASK}-v0?{limit}"
    assert (agent.observation_size, agent.action_size) == (SIZE, 2)
    assert vars(agent.args) == vars(args)
    expected = expected_actions(args, state, observations, seed=7)
    actions = agent.act(observations, seed=7)
    assert actions.shape == (3, args.chunk_length, 2) and actions.dtype == np.float32
    np.testing.assert_array_equal(actions, expected)
    one = expected_actions(args, state, observations[:1], seed=7)[0]
    np.testing.assert_array_equal(agent.act(observations[0], seed=7), one)
    np.testing.assert_array_equal(agent.act(observations[0].tolist(), seed=7), one)
    assert np.abs(agent.act(observations, seed=8) - actions).max() > 1e-3


def test_an_agent_in_the_home_folder(moved, monkeypatch):
    """~ is the user's home, as in the flags."""
    folder = moved[0]
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_agent(f"~/{folder.name}").step == 10


def test_rows_have_noise_of_their_own(moved, observations):
    agent = load_agent(moved[0])
    same = agent.act(np.repeat(observations[:1], 3, 0))
    assert np.abs(same[0] - same[1]).max() > 1e-3 and np.abs(same[1] - same[2]).max() > 1e-3


def test_the_state_is_as_the_scripts_functions_take_it(moved, observations):
    """Without an axis of agents, so that a critic can be asked."""
    folder, args, state = moved
    agent = load_agent(folder)
    chunks = agent.act(observations).reshape(3, -1)
    q = agent.script.critic(agent.args, agent.state.params["critic"], observations, chunks)
    params = jax.tree.map(lambda x: x[0], state.params["critic"])
    np.testing.assert_array_equal(q, qam.critic(args, params, observations, chunks))
    assert q.shape == (args.num_critics, 3)


def test_a_policy_plays_the_episodes_of_the_evaluation(moved):
    """A chunk is played open loop; the next one is chosen with the noise of its step."""
    folder, args, state = moved
    agent = load_agent(folder)
    with np.load(folder / "rollouts.npz") as file:
        paths = [file["path0"], file["path1"]]
    slot = Slot(agent.env)
    for episode, path in enumerate(paths):
        seed = seed_of(agent.seed, agent.task, agent.step, episode)
        policy = agent.policy(seed)
        (observation,) = slot.start(seed)
        for visited in path[:12]:
            observation, *_ = slot.step(policy(observation))
            np.testing.assert_allclose(observation, visited, atol=1e-4)
        assert policy.age == 12 and len(policy.plan) == 3


@pytest.mark.parametrize("module", [fmer, sac, ppo], ids=lambda module: module.__name__)
def test_online_agents(module, here):
    """Of several agents the one that is asked for, in the script's first mode, one action at a
    time."""
    args = tiny_ppo() if module is ppo else tiny_online(module)
    seen = []
    evaluate = module.evaluate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "evaluate", lambda *x: seen.append(x) or evaluate(*x))
        module.main(args)
    args, state = seen[-1][:2]
    folder = folder_of(module.__name__.split(".")[-1], args)
    agent = load_agent(folder, seed=args.seed + 1)
    assert (agent.env, agent.observation_size, agent.action_size) == ("multigoal", 2, 2)
    last = jax.tree.map(lambda x: x[1:], state)
    observation = np.float32([0.5, -1])
    where = observation[None, None], np.uint32([[3]]), np.int32([[0]])
    (expected,) = np.asarray(module.act(args, last, *where, module.MODES[0]))
    np.testing.assert_array_equal(agent.act(observation, seed=3), expected[0])
    np.testing.assert_array_equal(agent.policy(3)(observation), expected[0, 0])
    assert load_agents(folder).agents == [(1, args.seed), (1, args.seed + 1)]
    stops("no agent of task 1, seed 9", "(1, ", call=lambda: load_agent(folder, seed=9))
    stops("no agent of task 4", call=lambda: load_agent(folder, task=4))


# --- the script in the folder --------------------------------------------------------------------

ACT = """
import numpy as np
from common.agents import load_agent
agent = load_agent("kept")
print(agent.name, agent.act(np.linspace(-1, 1, 2), seed=5).tobytes().hex())
"""


def test_a_copied_and_renamed_script(tmp_path, dataset_dir):
    """In a project of its own: after a run its script is edited, then removed, and the run moved.
    The agent is the same; a run that is continued says that its script has changed."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=ignored)
    script = tmp_path / "renamed.py"
    shutil.copy(ROOT / "qam.py", script)
    flags = "--offline-steps 2 --eval-interval 2 --eval-episodes 1 --workers 1 --hidden-dims 8 "
    flags += f"--num-critics 2 --flow-steps 2 --batch-size 8 --dataset-dir {dataset_dir}"

    def python(*words):
        how = dict(cwd=tmp_path, capture_output=True, text=True, env=quick(tmp_path))
        answer = subprocess.run([sys.executable, *words], **how)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    def actions():
        return load_agent(folder).act(np.linspace(-1, 1, 2), seed=5)

    assert "is not the script" not in python("renamed.py", *flags.split(), "--name", "run")
    folder = tmp_path / "runs/renamed/pointmaze-medium/run"
    first = actions()
    config = json.loads((folder / "config.json").read_text())

    script.write_text(
        script.read_text().replace("return jnp.clip(x, -1, 1)", "return jnp.ones_like(x)")
    )
    np.testing.assert_array_equal(actions(), first)
    again = python("renamed.py", *flags.split(), "--name", "run")
    assert again.count("renamed.py is not the script that") == 1
    changed = json.loads((folder / "config.json").read_text())
    assert changed["source_sha256"] != config["source_sha256"]
    assert changed | dict(source_sha256=config["source_sha256"]) == config
    assert (actions() == 1).all() and np.abs(first).min() < 1  # the run is the changed script's

    script.unlink()
    shutil.copy(ROOT / "qam.py", folder / "script.py")
    folder.rename(tmp_path / "kept")
    assert python("-c", ACT).split() == ["renamed", first.tobytes().hex()]
    assert not list((tmp_path / "kept").glob("__pycache__"))


def test_a_script_of_your_own_choice(moved, observations):
    """Instead of the stored source, which is then not run."""
    folder = moved[0]
    agent = load_agent(folder, script=qam)
    assert agent.script is qam
    np.testing.assert_array_equal(agent.act(observations), load_agent(folder).act(observations))


def test_the_same_source_is_one_module(moved, tmp_path, observations):
    """So that two of its runs share compiled programs."""
    shutil.copytree(moved[0], tmp_path / "copy")
    one, two = load_agent(moved[0]), load_agent(tmp_path / "copy")
    assert one.script is two.script
    one.act(observations)
    count = one.script.act._cache_size()
    two.act(observations)
    assert two.script.act._cache_size() == count


def test_a_script_that_raises_leaves_no_module(moved, tmp_path):
    shutil.copytree(moved[0], tmp_path / "copy")
    (tmp_path / "copy/script.py").write_text("import nothing_of_this_name\n")
    before = set(sys.modules)
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
            load_agent(tmp_path / "copy")
    assert not [name for name in set(sys.modules) - before if name.startswith("qam_")]


# --- mistakes ------------------------------------------------------------------------------------


def test_observations_of_another_shape(moved):
    agent = load_agent(moved[0])
    policy = agent.policy()
    for wrong, shape in ((np.zeros(5), "(5,)"), (0.0, "(1,)")):
        stops(f"has shape (2,), not {shape}", call=lambda wrong=wrong: agent.act(wrong))
    for wrong, shape in ((np.zeros((4, 3)), "(3,)"), (np.zeros((1, 4, SIZE)), "(4, 2)")):
        stops(f"has shape (2,), not {shape}", call=lambda wrong=wrong: agent.act(wrong))
    for wrong in (np.zeros(5), np.zeros((4, 3)), np.zeros((1, SIZE)), 0.0):
        words = f"has shape (2,), not {np.shape(wrong)}"
        stops(words, call=lambda wrong=wrong: policy(wrong))


def test_folders_that_cannot_be_loaded(moved, tmp_path):
    """One line that says why."""
    copy = tmp_path / "copy"
    stops(copy, "is not a run folder: it has no config.json", call=lambda: load_agent(copy))
    shutil.copytree(moved[0], copy)
    path = copy / "config.json"
    text = path.read_text()
    config = json.loads(text)
    for damaged in ("", "[]", "{}", '{"flags": 3}'):
        path.write_text(damaged)
        stops(path, "is damaged", call=lambda: load_agent(copy))
    del config["script"]
    path.write_text(json.dumps(config))
    stops(copy, "an earlier version: repeat its command", call=lambda: load_agent(copy))
    path.write_text(text)
    (copy / "script.py").rename(copy / "away")
    stops(copy / "script.py", "No such file", call=lambda: load_agent(copy))
    (copy / "away").rename(copy / "script.py")
    content = bytearray((copy / "checkpoint.msgpack").read_bytes())
    content[99] ^= 1
    (copy / "checkpoint.msgpack").write_bytes(content)
    (copy / "checkpoint-before.msgpack").unlink()
    stops(copy, "no checkpoint that can be read", call=lambda: load_agent(copy))
    (copy / "checkpoint.msgpack").unlink()
    stops(copy, "no checkpoint that can be read", call=lambda: load_agent(copy))


def test_the_checkpoint_before_a_damaged_one(moved, tmp_path, capsys):
    """Is loaded, and a note says so."""
    copy = tmp_path / "copy"
    shutil.copytree(moved[0], copy)
    (copy / "checkpoint.msgpack").write_bytes(b"")
    before = read_checkpoint(copy / "checkpoint-before.msgpack")
    assert load_agent(copy).step == before["step"]
    assert "checkpoint-before.msgpack is used instead" in capsys.readouterr().out


def test_annotations_as_text(tmp_path):
    """A script that imports them from __future__ can be loaded."""
    source = (ROOT / "qam.py").read_text()
    begin = source.index("import dataclasses")
    text = f"{source[:begin]}from __future__ import annotations\n\n{source[begin:]}"
    (tmp_path / "script.py").write_text(text)
    assert stored_script(tmp_path, "annotated").Args().chunk_length == 5


def test_a_script_that_does_not_fit(moved, tmp_path):
    """Another network in common/, say: its parameters are not silently taken for it. The message
    names the run's own script, also where another run has the same one."""
    other = ModuleType("other")
    vars(other).update(vars(qam))

    def create(args, *inputs):
        return qam.create(dataclasses.replace(args, hidden_dims=(9, 9)), *inputs)

    other.create = create
    stops(
        f"checkpoint.msgpack does not fit {qam.__file__}",
        call=lambda: load_agent(moved[0], script=other),
    )
    load_agent(moved[0])
    copy = tmp_path / "copy"
    shutil.copytree(moved[0], copy)
    config = json.loads((copy / "config.json").read_text())
    config["flags"]["hidden_dims"] = [9, 9]
    (copy / "config.json").write_text(json.dumps(config))
    stops(f"does not fit {copy / 'script.py'}", call=lambda: load_agent(copy))


def test_what_is_stored(moved):
    """Script, its source's checksum, agents and sizes; the flags of the run are its own."""
    folder, args, _ = moved
    config = json.loads((folder / "config.json").read_text())
    assert (config["script"], config["agents"]) == ("qam", [[TASK, 0]])
    assert (folder / "script.py").read_bytes() == (ROOT / "qam.py").read_bytes()
    assert len(config["source_sha256"]) == 64
    flags = config["flags"]
    assert (flags["observation_size"], flags["action_size"]) == (SIZE, 2)
    assert read_checkpoint(folder / "checkpoint.msgpack")["step"] == 10


def test_a_run_of_an_earlier_version_is_completed(here, monkeypatch):
    """Repeating its command adds what is missing, and changes nothing else."""
    args = tiny_online(fmer)
    fmer.main(args)
    folder = here / "runs/fmer/multigoal/default"
    path = folder / "config.json"
    config = json.loads(path.read_text())
    old = {name: config[name] for name in ("id", "flags", "made_with")}
    del old["flags"]["observation_size"]
    path.write_text(json.dumps(old))
    (folder / "script.py").unlink()
    checkpoint = (folder / "checkpoint.msgpack").read_bytes()
    fmer.main(args)
    assert json.loads(path.read_text()) == config | dict(
        flags=config["flags"] | dict(observation_size=2)
    )
    assert (folder / "checkpoint.msgpack").read_bytes() == checkpoint
    assert load_agent(folder).observation_size == 2


# --- training from Python ------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch):
    """A list of the flags that a script's `main` is called with, instead of running."""
    found = []
    monkeypatch.setattr(qam, "main", found.append)
    return found


@pytest.mark.parametrize(
    "flags, argv",
    [
        (dict(), ""),
        (dict(env="antmaze-giant"), "--env antmaze-giant"),
        (
            dict(env="cube-triple", lr=1, tasks=[2, np.int64(3)], discount=np.float64(0.5)),
            "--env cube-triple --lr 1 --tasks 2 3 --discount 0.5",
        ),
        (dict(sparse=True, eval_only=False, name="-x", run_dir="a b"), "--sparse --name=-x"),
        (dict(name=None, dataset_dir=None, track=False), ""),
    ],
)
def test_flags_mean_what_they_mean_on_the_command_line(started, flags, argv):
    """The environment's protocol, the types, and the name of the run."""
    folder = train(qam, **flags)
    (args,) = started
    expected = parse(qam.Args, qam.ENV_DEFAULTS, argv.split())
    assert args == dataclasses.replace(expected, run_dir=flags.get("run_dir", "runs"))
    assert folder == Path(args.run_dir, "qam", expected.env, expected.name)


def test_the_protocol_is_applied(started):
    train(qam, env="antmaze-giant", inv_temp=2.0)
    (args,) = started
    assert (args.chunk_length, args.discount, args.inv_temp) == (1, 0.995, 2.0)
    assert (args.name, args.batch_size) == ("inv-temp=2.0", qam.Args.batch_size)


def test_what_cannot_be_trained(started, capsys):
    """An error of the user, which is no end of the program."""
    stops("unknown environment 'cube-tripel'", call=lambda: train(qam, env="cube-tripel"))
    stops("--lr must be greater than 0", call=lambda: train(qam, lr=-1.0))
    stops("--tasks needs at least one value", call=lambda: train(qam, tasks=[]))
    for wrong in (dict(lr="fast"), dict(learning_rate=0.1)):
        stops("qam cannot take these flags", wrong, call=lambda wrong=wrong: train(qam, **wrong))
    assert "--learning-rate" in capsys.readouterr().err
    assert not started
