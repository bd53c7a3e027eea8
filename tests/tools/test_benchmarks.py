"""What the tables are made of: the paper's statistic; measures on the plane, with policies whose
answers are known; operations, times and shares of programs and runs."""

import contextlib
import csv
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import meam
from analysis.runs import read_rows
from analysis.scripts import script_of
from baselines import sac
from benchmarks import (
    against,
    ant,
    calls,
    checkpoints,
    cost,
    coverage,
    environments,
    failures,
    gpu,
    gpu_check,
    kernels,
    learning,
    multigoal,
    online_throughput,
    own_data,
    parts,
    precision,
    run_python,
    samples,
    throughput,
    values,
    variants,
)
from benchmarks import stops as stops_benchmark
from benchmarks.learning import SUITES, command_line, keep, kept, online_table, reported, table
from benchmarks.multigoal import grid, measure
from benchmarks.shares import Options as Shares
from benchmarks.shares import main as shares_main
from benchmarks.shares import shares
from benchmarks.values import by_table
from common.agents import load_agent
from common.collect import ant as common_ant
from common.environments import GOALS, make_env
from common.errors import UserError
from common.flags import parse
from common.networks import MLP
from tests.helpers.messages import stops
from tools.shared_blocks import ROOT

AGENTS = 2


def test_reported_statistic():
    """P-1: per seed the best evaluation from 900,000 steps on; deviation with n - 1."""
    steps = np.arange(1, 101) * 10_000
    returns = np.full((5, 100), -1.0)
    returns[:, 88] = 9  # 890,000: too early
    returns[:4, 89] = 1  # 900,000 counts
    returns[4, 99] = 0
    mean, deviation = reported(steps, returns)
    np.testing.assert_allclose([mean, deviation], [0.8, 0.4472], atol=5e-5)


def test_table_of_returns():
    """A row per label, whatever its steps: returns after each third, and the statistic."""
    rows = [
        {"label": label, "task": "1", "seed": seed, "step": str(step),
         "return": str(step / 10 + int(seed))}
        for label, end in (("one", 90), ("two", 30)) for seed in "01"
        for step in range(10, end + 1, 10)
    ]  # fmt: skip
    head, _, first, second = online_table(rows).splitlines()
    assert head == "| | steps | return at 1/3 | at 2/3 | at the end | reported |"
    assert first == "| one | 90 | 3.5 [3.0, 4.0] | 6.5 [6.0, 7.0] | 9.5 [9.0, 10.0] | 9.5 (0.7) |"
    assert second == "| two | 30 | 1.5 [1.0, 2.0] | 2.5 [2.0, 3.0] | 3.5 [3.0, 4.0] | 3.5 (0.7) |"
    alone = online_table([row for row in rows if row["seed"] == "0"]).splitlines()[-1]
    assert alone == "| two | 30 | 1.0 | 2.0 | 3.0 | 3.0 |"  # no interval over one seed


def test_table_of_success():
    """A row per label: each task, all of them with the seeds drawn per task, episode length."""
    rows = [dict(label=label, task=task, seed=seed, step=step, length="30",
                 success=str(int(task) / 4 + int(seed) / 5 * (label == "b")))
            for label in "ab" for task in "12" for seed in "01" for step in "12"]  # fmt: skip
    assert table(rows).splitlines() == [
        "| | task 1 | task 2 | all | episode length |",
        "|---|---|---|---|---|",
        "| a | 0.25 [0.25, 0.25] | 0.50 [0.50, 0.50] | 0.38 [0.38, 0.38] | 30 |",
        "| b | 0.35 [0.25, 0.45] | 0.60 [0.50, 0.70] | 0.47 [0.38, 0.57] | 30 |",
    ]


def test_every_suite_takes_its_flags():
    """Every command line is one that its script takes; own flags have the last word."""
    lines = set()
    for commands, flags, _ in SUITES.values():
        lines |= {tuple(command_line(command, flags)) for command in commands.values()}
    for module, *given in lines:
        script = importlib.import_module(module)
        parse(script.Args, script.ENV_DEFAULTS, given)
    module, *given = command_line("meam --rho 0.3 --num-critics 10", SUITES["puzzle-3x3-small"][1])
    args = parse(meam.Args, meam.ENV_DEFAULTS, given)
    assert (args.rho, args.num_critics, args.hidden_dims) == (0.3, 10, (256, 256))
    assert (args.inv_temp, args.entropy_scale) == (3.0, 0.03)  # the environment's own


def test_ctrl_c_waits_for_the_run(tmp_path):
    """A run of a suite has the time to save; the suite then ends with one line."""
    saved = tmp_path / "saved"
    child = f"""
import pathlib, time
try:
    pathlib.Path({str(tmp_path / "begun")!r}).touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)
    pathlib.Path({str(saved)!r}).touch()
"""
    parent = f"""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
from dataclasses import make_dataclass
from analysis.command_line import run_program
from benchmarks import run_python
run_program(lambda options: run_python(["-c", {child!r}]), make_dataclass("Options", []), "")
"""
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)  # fmt: skip
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the group
    assert process.communicate(timeout=60)[1].strip() == "interrupted"
    assert process.returncode == 1 and saved.exists()


def test_a_run_that_fails_is_named():
    stops("ended with code 3", "exit(3)", call=lambda: run_python(["-c", "exit(3)"]))


def test_trials_leave_committed_results_alone(tmp_path):
    for main, options in [
        (learning.main, learning.Options("methods", only=("qam",), more="--lr 1e-3")),
        (own_data.main, own_data.Options("pendulum", more_sac="--lr 1e-3")),
    ]:
        stops("choose another folder with --out", call=lambda m=main, o=options: m(o))
    stops("has no tasks", call=lambda: learning.main(learning.Options("plane", tasks=(2,))))


def fake(choose):
    """A script whose policy is `choose`: positions (..., 2), ages -> actions."""

    def act(args, state, observations, seeds, ages, mode):
        return jnp.asarray(choose(np.asarray(observations), mode))[:, :, None]

    state = SimpleNamespace(key=np.zeros((AGENTS, 2)))
    return SimpleNamespace(act=act, MODES=("best", "single")), None, state


def to_goal(positions, goals):
    """Steps of at most 0.5 towards goals."""
    way = goals - positions
    norm = np.maximum(np.linalg.norm(way, axis=-1, keepdims=True), 1e-6)
    return np.float32(way / norm * np.minimum(0.5, norm))


def test_measures_of_the_nearest_goal():
    """Goes to the nearest goal from everywhere, and in all four directions at random at the origin
    (samples alternate): full agreement, coverage near 1, a quarter in each direction."""

    def choose(positions, mode):
        if mode == "single":
            return np.tile(0.5 * GOALS / 5, (AGENTS, positions.shape[1] // 4, 1))
        nearest = np.linalg.norm(positions[..., None, :] - GOALS, axis=-1).argmin(-1)
        return to_goal(positions, GOALS[nearest])

    numbers, shown = measure(*fake(choose), 400)
    np.testing.assert_array_equal(numbers["agreement"], 1)
    np.testing.assert_array_equal(numbers["directions"], np.full((AGENTS, 4), 0.25))
    np.testing.assert_array_equal(numbers["largest_direction"], 0.25)
    np.testing.assert_array_equal(numbers["reached"], 1)
    assert (numbers["coverage"] > 0.98).all() and (numbers["goals"] == 4).all()
    assert numbers["counts"].sum(1).tolist() == [400] * AGENTS
    path, goal = shown["path"], shown["goal"]
    ends = [one[np.isfinite(one[:, 0])][-1] for one in path]
    assert (np.linalg.norm(np.array(ends) - GOALS[goal], axis=-1) < 1).all()


def test_measures_of_one_goal():
    """Goes to (5, 0) from everywhere: no coverage, one direction, a quarter of the grid agrees (and
    a little more: goals that lie behind the nearest one). Standing still reaches nothing."""
    always = lambda positions, mode: to_goal(positions, GOALS[0])
    numbers, _ = measure(*fake(always), 40)
    np.testing.assert_allclose(numbers["coverage"], 0, atol=1e-9)
    np.testing.assert_array_equal(numbers["goals"], 1)
    np.testing.assert_array_equal(numbers["directions"], [[1, 0, 0, 0]] * AGENTS)
    positions, nearest = grid()
    assert (nearest == 0).mean() == 0.25
    assert (numbers["agreement"] >= 0.25).all() and (numbers["agreement"] < 0.5).all()
    numbers, _ = measure(*fake(lambda positions, mode: 0 * positions), 40)
    np.testing.assert_array_equal(numbers["reached"], 0)
    np.testing.assert_array_equal(numbers["agreement"], 0)


def test_grid():
    """Positions of the grid, without those near a goal and near the diagonals."""
    positions, nearest = grid()
    assert np.abs(positions).max() == 6 and len(positions) == len(nearest)
    assert (np.linalg.norm(positions - GOALS[nearest], axis=1) >= 1).all()
    assert (np.abs(np.abs(positions[:, 0]) - np.abs(positions[:, 1])) >= 0.5).all()
    assert len(positions) == 21**2 - (2 * 21 - 1) - 4 * 7  # diagonals; around each goal


def test_operations_of_products():
    """2 m n k for each product of matrices: in batches, in loops of known length, in called
    functions, in the longer branch; a loop of unknown length counts as one round."""
    x, w = jnp.ones((7, 5)), jnp.ones((5, 5))
    one = 2 * 7 * 5 * 5
    count = lambda f, *inputs: throughput.products(jax.make_jaxpr(f)(*inputs).jaxpr)
    assert count(lambda x, w: jnp.tanh(x @ w) + 1, x, w) == one
    assert count(jax.vmap(lambda x: x @ w), jnp.ones((3, 7, 5))) == 3 * one
    loop = lambda x: jax.lax.scan(lambda x, _: (jax.jit(jnp.dot)(x, w), None), x, None, 4)[0]
    assert count(loop, x) == 4 * one
    rounds = lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: loop(x), x)
    assert count(rounds, x, 9) == 4 * one
    branch = lambda x, on: jax.lax.cond(on, loop, lambda x: x @ w, x)
    assert count(branch, x, True) == 4 * one
    assert count(jax.grad(lambda x: (x @ w).sum()), x) == 2 * one  # the value, and one transposed


@pytest.mark.parametrize("name", ["baselines.td3", "baselines.rlpd"])
def test_speed_of_a_script(quick_compile, tmp_path, name):
    """Rows of a script of each kind, with the loop for an offline one; measured again, a row
    replaces the old one; the arithmetic is that of the shapes."""
    path = tmp_path / "speed.csv"
    flags = dict(scripts=(name,), sizes=("small",), seconds=0.0, transitions=2000, out=str(path))
    for agents in (1, 2), (2,):
        throughput.main(throughput.Options(agents=agents, peak=1.0, **flags))
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    ways = ["loop"] * (name == "baselines.rlpd") + ["chunk"] * 2
    assert sorted(row["way"] for row in rows) == sorted(ways)
    chunks = [row for row in rows if row["way"] == "chunk"]
    assert [row["agents"] for row in chunks] == ["1", "2"]
    assert chunks[0]["gflop"] == chunks[1]["gflop"] and float(chunks[0]["memory_mb"]) > 0
    for row in chunks:
        np.testing.assert_allclose(
            float(row["ms_agent_update"]) * int(row["agents"]), float(row["ms_update"]), atol=2e-3
        )
    assert len(throughput.table(rows).splitlines()) == 2 + len(rows)
    assert throughput.projection(rows) == ""  # of small sizes nothing is projected


def test_cost_beside_the_plain_loop(quick_compile, tmp_path):
    """A row for the script and one for its loop, whose batches are the sampler's: of trajectories
    of 1000 transitions with rewards of -1, H = 5 discounted ones, but for chunks across an end."""
    flags = dict(scripts=("baselines.rebrac",), sizes=("small",), rounds=2, seconds=0.0, loop=True)
    rows = cost.main(cost.Options(transitions=3000, out=str(tmp_path), **flags))["rows"]
    assert [row["script"] for row in rows] == ["baselines.rebrac", "plain loop"]
    assert rows[0]["ratio"] == 1 and min(row["ms"] for row in rows) > 0
    loop = throughput.Loop(throughput.Trained("baselines.rebrac", "small", 1, 3000))
    loop.data = loop.data.replace(rewards=np.full((1, 3000), -1, np.float32))
    batch = loop.draw()
    assert batch.observations.shape == batch.next_observations.shape == (128, 2)
    assert batch.actions.shape == (128, 10)
    full = -(0.99 ** np.arange(5)).sum()
    np.testing.assert_allclose(batch.rewards[batch.valid == 1], full, rtol=1e-6)
    assert (batch.rewards[batch.valid == 0] > full).all()


def test_updates_of_ppo(quick_compile):
    """PPO's unit is a rollout: 2 epochs of 64 steps in batches of 32 are four updates. Each further
    one adds the gradients of the networks 2-64-64-64-2 and 2-64-64-64-1."""
    flags = dict(rollout_steps=64, batch_size=32)
    trained = throughput.Trained("baselines.ppo", "small", 2, 100, epochs=2, **flags)
    assert trained.rounds == 4 and trained.seconds(8) > 0
    more = throughput.Trained("baselines.ppo", "small", 1, 100, epochs=4, **flags)
    h = 64
    of_both = 3 * (2 * h + 2 * h * h + 2 * h) + 3 * (2 * h + 2 * h * h + h) - 2 * 2 * h
    assert more.rounds == 8 and 8 * more.flops() - 4 * trained.flops() == 4 * 2 * 32 * of_both


def test_operations_of_td3():
    """One update at small size, layer by layer: policy 2-64-64-64-2, two critics 4-64-64-64-1,
    batch 32. The gradient of a network costs two forward passes, without its inputs' gradient one
    first layer less; the policy's asks both critics for that of the actions, not of weights."""
    trained = throughput.Trained("baselines.td3", "small", 1, 100)
    h = 64
    mu, q = 2 * h + 2 * h * h + h * 2, 2 * (4 * h + 2 * h * h + h)
    of_critics = mu + q + (3 * q - 2 * 4 * h)
    of_policy = (3 * mu - 2 * h) + 2 * q
    assert trained.flops() == 2 * 32 * (of_critics + of_policy)


def test_kernels_of_a_program():
    """A loop of ten rounds of three kernels, one before it. Arrays of 4 x 4 numbers: before, one in
    and one out; a product, two in, one out, without work space; a fusion, one in and one out; one
    that takes a slice of 4 numbers and puts 4 into another array of 4 x 4."""
    text = """HloModule m
%fused (p: f32[4,4]) -> f32[4,4] {
  %p = f32[4,4]{1,0} parameter(0)
  ROOT %double = f32[4,4]{1,0} add(%p, %p)
}
%put (p.1: f32[4,4], p.2: f32[16], i: s32[]) -> f32[4,4] {
  %p.1 = f32[4,4]{1,0} parameter(0)
  %p.2 = f32[16]{0} parameter(1)
  %i = s32[] parameter(2)
  %rows = f32[4,4]{1,0} bitcast(%p.2)
  %row = f32[1,4]{1,0} dynamic-slice(%rows, %i, %i), dynamic_slice_sizes={1,4}
  ROOT %new = f32[4,4]{1,0} dynamic-update-slice(%p.1, %row, %i, %i)
}
%body (state: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %state = (s32[], f32[4,4]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state), index=0
  %x = f32[4,4]{1,0} get-tuple-element(%state), index=1
  %dot = (f32[4,4]{1,0}, s8[1024]{0}) custom-call(%x, %x), custom_call_target="gemm"
  %y = f32[4,4]{1,0} get-tuple-element(%dot), index=0
  %flat = f32[16]{0} bitcast(%y)
  %w = f32[4,4]{1,0} fusion(%x, %flat, %i.1), kind=kLoop, calls=%put
  ROOT %z = f32[4,4]{1,0} fusion(%w), kind=kLoop, calls=%fused
}
ENTRY %main (x: f32[4,4]) -> f32[4,4] {
  %x.1 = f32[4,4]{1,0} parameter(0)
  %copy = f32[4,4]{1,0} copy(%x.1)
  %loop = (s32[], f32[4,4]{1,0}) while(%copy), body=%body, config={"known_trip_count":{"n":"10"}}
}
"""
    row, index = 4 * 4, 4
    assert gpu.program(text) == (1 + 10 * 3, 64 * (2 + 10 * (3 + 2)) + 10 * (2 * row + index))


def test_variants_of_a_program():
    """Each changes what is traced, where it is meant, and nothing afterwards."""

    body = MLP((4,), 4, layer_norm=True)
    weights = body.init(jax.random.PRNGKey(0), jnp.ones((4, 4)))

    def program(x):
        step = lambda x, _: (x + body.apply(weights, x), None)
        optimizer = optax.adam(0.1)
        updates, _ = optimizer.update(weights, optimizer.init(weights))
        return jax.lax.scan(step, x, None, 20), updates

    def traced():
        return str(jax.make_jaxpr(lambda x: program(x))(jnp.ones((4, 4))))

    before, seen = traced(), {}
    for variant in gpu.VARIANTS:
        with gpu.changed(variant):
            seen[variant] = traced()
        assert traced() == before
    assert all(seen[variant] == before for variant in ("as it is", *gpu.FLAGS))
    assert "unroll=1\n" in before and "unroll=10\n" in seen["unrolled"]
    assert seen["bfloat16"].count("bf16[4,4] = dot_general") == 1  # the hidden layer
    assert len({*seen.values()}) == len(gpu.VARIANTS) - len(gpu.FLAGS)


def test_variants_in_turns(tmp_path):
    """A row each; Adam on one vector learns what Adam on every array does."""
    out = tmp_path / "variants.csv"
    options = dict(scripts=("td3",), sizes=("small",), rounds=1, seconds=0.01, out=str(out))
    variants.main(variants.Options(**options, variants=("flat Adam",)))
    plain, flat = read_rows(out)
    assert (plain["variant"], plain["ratio"], plain["compile_ratio"]) == (
        "as it is",
        "1.000",
        "1.00",
    )
    assert flat["variant"] == "flat Adam" and float(flat["ms_update"]) > 0
    one, other = (variants.compiled("td3", "small", name)[0] for name in ("as it is", "flat Adam"))
    sizes = [len(jax.tree.leaves(agent.state.opt_state)) for agent in (one, other)]
    assert sizes[0] > sizes[1]
    kept = [jax.tree.leaves(agent.state.params) for agent in (one, other)]
    for x, y in zip(*kept, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
    stops("no variant nope", call=lambda: variants.main(variants.Options(variants=("nope",))))


def test_the_check_on_a_gpu(monkeypatch, tmp_path, capsys):
    """Most valuable first; a row is written at once, a part that fails costs no other."""
    clock, done = SimpleNamespace(now=0.0), []

    def measure(script, agents, variant, options):
        clock.now += 60
        done.append((script, agents, variant))
        if variant == "unrolled":
            raise MemoryError("too many kernels")
        return dict(script=script, agents=agents, variant=variant, kernels="5")

    monkeypatch.setattr(gpu_check.gpu, "measure", measure)
    monkeypatch.setattr(gpu_check.shards, "main", done.append)
    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(gpu_check, "evaluate", lambda *_: done.append("evaluate"))
    gpu_check.main(gpu_check.Options(out=str(tmp_path), minutes=100))
    assert done[:3] == [("qam", 1, "as it is"), ("meam", 1, "as it is"), ("qam", 1, "unrolled")]
    assert [agents for _, agents, _ in done[:18:6]] == [1, 40, 8]
    assert len(done) == 18 + 23 + 2 and done[-1] == "evaluate"
    assert {agents for _, agents, _ in done[18:-2]} == {8}
    rows = read_rows(tmp_path / "gpu-check.csv")
    assert len(rows) == 12 + 23 and {row["kernels"] for row in rows} == {"5"}
    assert capsys.readouterr().err.count("failed: ") == 6
    del done[:]
    gpu_check.main(gpu_check.Options(out=str(tmp_path), minutes=2.5))
    assert len(done) == 3 and "no time was left for: meam, 1 agents" in capsys.readouterr().err


def test_shapes_of_many_agents():
    """What `train_chunk` takes for three agents, from one: the data and the count have no axis."""
    trained = throughput.Trained("baselines.rebrac", "small", 1, 100)
    inputs = gpu.shapes(trained, 3, jax.devices()[0])
    state, metrics, data, replay, task, updates = inputs
    assert {x.shape[0] for x in jax.tree.leaves((state, metrics, replay, task))} == {3}
    assert data.actions.shape == trained.data.actions.shape and updates.shape == ()
    kept = jax.eval_shape(trained.train, trained.args, *inputs)
    assert jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, (state, metrics))


def test_estimated_times():
    """In proportion to the bytes of QAM's program, of which the time is known: 100 GB for 30 ms of
    40 agents, so 50 GB are 15 ms: 0.375 ms for an agent, 400M of which are 41.7 hours."""
    common = dict(agents="40", variant="as it is")
    rows = [common | dict(script="qam", device="NVIDIA H200", gb="110", ms_update="30")]
    ahead = common | dict(device="for NVIDIA H200, not run", ms_update="")
    rows += [ahead | dict(script="qam", gb="100"), ahead | dict(script="fql", gb="50")]
    rows += [rows[2] | dict(variant="unrolled", gb="1"), rows[2] | dict(agents="1", gb="1")]
    assert gpu.estimates(rows).splitlines()[2:] == ["| fql | 50 | 0.375 | 42 |"]
    assert gpu.estimates(rows[1:]) == ""


def test_projected_hours():
    """The row with the most agents counts: 10 ms x 1M x 50 x 8 are 1,111 hours."""
    row = dict(script="qam", size="paper", way="chunk", device="x", ms_agent_update="10")
    rows = [row | dict(agents="8"), row | dict(agents="1", ms_agent_update="20")]
    assert throughput.projection(rows).splitlines()[-1] == "| x | qam | 8 | 1,111 |"


def test_share_of_evaluation(tmp_path):
    """Evaluations of 5 and 15 of 100 seconds."""
    head = "task,seed,step,seconds,x\n"
    (tmp_path / "train.csv").write_text(head + "1,0,5,20,0\n1,0,10,45,0\n1,0,20,85,0\n")
    (tmp_path / "eval.csv").write_text(head + "1,0,10,50,0\n1,0,20,100,0\n")
    assert shares(tmp_path) == dict(seconds=100, evaluation=20, share=0.2)
    with pytest.raises(UserError, match="needs rows in both"):
        shares(tmp_path / "nothing")


def test_names_of_scripts(tmp_path):
    """With and without the package; others, and what else cannot be measured, end in a line."""
    assert script_of("fql") is script_of("baselines.fql") and script_of("qam").__name__ == "qam"
    out = str(tmp_path / "rows.csv")
    speed = lambda **flags: throughput.main(throughput.Options(sizes=("small",), out=out, **flags))
    online = lambda **x: online_throughput.main(online_throughput.Options(out=out, **x))
    for words, call in (
        ("there is no script 'nope'", lambda: speed(scripts=("nope",))),
        ("there is no script 'plot'", lambda: speed(scripts=("plot",))),
        ("there is no script 'nope'", lambda: online(script="nope")),
        ("fql is not an online method", lambda: online(script="fql")),
        ("rlpd is not an online method", lambda: online(script="rlpd")),
        ("sac is not an offline method", lambda: parts.main(parts.Options(("sac",), out=out))),
        ("--agents must be at least 1", lambda: speed(agents=(0,))),
        ("--agents must be at least 1", lambda: online(agents=0)),
        ("--agents must be at least 1", lambda: gpu.main(gpu.Options(agents=(0,), out=out))),
        ("unknown environment 'nope'",
         lambda: environments.main(environments.Options(("nope",), out=out))),
        ("name the folders of runs", lambda: shares_main(Shares(()))),
    ):  # fmt: skip
        stops(words, call=call)
    assert not any(tmp_path.iterdir())


def test_seconds_until_a_run_has_stopped(tmp_path, monkeypatch):
    """Of runs that are continued each time, with networks of the paper's size by default."""
    out = tmp_path / "stops.json"
    options = stops_benchmark.Options("td3", 2, earliest=0, latest=0.1, out=str(out))
    whole = stops_benchmark.command_of(options, tmp_path)
    assert whole[1:3] == ["-m", "baselines.td3"]
    assert whole[whole.index("--hidden-dims") :][1:3] == ["256", "256"]
    small = ["--hidden-dims", "8", "--warmup-steps", "5", "--log-interval", "5", "--workers", "1"]
    command_of = stops_benchmark.command_of
    monkeypatch.setattr(stops_benchmark, "command_of", lambda *x: [*command_of(*x), *small])
    stops_benchmark.main(options)
    found = json.loads(out.read_text())
    assert found["script"] == "td3" and len(found["stops"]) == 2
    for stop in found["stops"]:
        assert 0 <= stop["after"] <= 0.1 and 0 < stop["seconds"] < 60
    monkeypatch.setattr(stops_benchmark, "command_of", lambda *x: [*command_of(*x), "--nope"])
    stops("the run ended with exit code", call=lambda: stops_benchmark.main(options))


def test_what_calls_cost(quick_compile, tmp_path, monkeypatch):
    """By hand, of calls that took long enough, without the first one; and of a short run."""
    times = np.array([[0, 9], [9.5, 10.5], [10.6, 12.6], [12.7, 12.8], [13, 14]])
    found = calls.summarise(times, 0.05)
    assert found.pop("share") == pytest.approx(0.15 / 1.6, abs=1e-5)
    assert found == dict(calls=2, call_s=1.5, empty_call_ms=50.0, between_calls_ms=100.0)
    stops("no call took 0.5 s", call=lambda: calls.summarise(times[:2], 0.05))
    stops("no offline phase", call=lambda: calls.main(calls.Options(script="fmer")))
    monkeypatch.setattr(calls, "SHORTEST", 0)
    out = tmp_path / "calls.json"
    options = calls.Options(updates=40, transitions=2000, out=str(out))
    result = calls.main(options)
    assert json.loads(out.read_text()) == result
    assert result["calls"] > 3 and 0 < result["share"] < 1


def test_where_the_time_of_an_update_goes(tmp_path):
    """Kernels by what they are; their times fit the whole update, and products the arithmetic."""
    text = """
ENTRY %main (x: f32[4]) -> f32[4] {
  %dot.1 = f32[4,4]{1,0} dot(%x, %y), lhs_contracting_dims={1}
  %ynn_fusion.2 = f32[4,4]{1,0} fusion(%x), kind=kCustom, calls=%called
  %copy.3 = f32[4]{0} copy(%x)
  %loop = (s32[], f32[4]{0}) while(%copy.3), body=%body
  %add_fusion = u32[4]{0} fusion(%x), calls=%f, metadata={op_name="jit(g)/threefry2x32"}
  ROOT %multiply_fusion.4 = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
}
"""
    assert kernels.kinds_of(text) == {
        "dot.1": "products",
        "ynn_fusion.2": "products",
        "copy.3": "copies",
        "add_fusion": "random numbers",
        "multiply_fusion.4": "element by element",
    }
    out = tmp_path / "rows.csv"
    options = dict(updates=2, transitions=100, out=str(out))
    kernels.main(kernels.Options(("rebrac",), ("small",), **options))
    rows = {row["kind"]: row for row in read_rows(out)}
    assert list(rows) == [*kernels.KINDS, "update"]
    shares = [float(rows[kind]["share"]) for kind in kernels.KINDS]
    assert abs(sum(shares) - 1) < 0.01 and shares[0] > 0.1
    assert all(float(row["ms"]) > 0 for row in rows.values())


def test_in_turns_with_another_checkout(tmp_path, monkeypatch):
    """The medians of both, and their ratio; what cannot be measured is a line."""
    other = tmp_path / "other"
    subprocess.run(["git", "init", "-q", str(other)], check=True)
    author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    commit = ["git", "-C", str(other), *author, "commit", "-q", "--allow-empty", "-m", "empty"]
    subprocess.run(commit, check=True)
    monkeypatch.setattr(against, "ROOT", other)  # a copy of the project may be no checkout
    out = tmp_path / "rows.csv"
    options = against.Options(str(other), "throughput --scripts qam", out=str(out))
    for words, flags in (
        (": cannot measure this", {}),
        ("there is no benchmark 'nope'", dict(command="nope --flag")),
        ("is not a checkout", dict(checkout=str(tmp_path))),
        ("--turns must be at least 1", dict(turns=0)),
    ):
        wrong = dataclasses.replace(options, **flags)
        stops(words, call=lambda wrong=wrong: against.main(wrong))
    asked = []
    times = iter((4, 3, 2, 9, 5, 1))  # before, after, before, ...

    def measure_in(checkout, command):
        asked.append((checkout, command))
        ms = str(next(times))
        key = dict(script="qam", size="small", way="chunk", agents="1")
        return [key | dict(device="cpu", jax="1", ms_update=ms)]

    monkeypatch.setattr(against, "measure_in", measure_in)
    against.main(options)
    assert asked == [(str(other), options.command), (other, options.command)] * 3
    (row,) = read_rows(out)
    assert row["row"] == "script=qam size=small way=chunk agents=1"
    assert (row["ms_before"], row["ms_after"], row["ratio"]) == ("4.0", "3.0", "0.75")
    assert row["before"] == row["after"] and len(row["before"]) == 7


def test_online_loop_next_to_a_plain_one(tmp_path):
    """A row with the times of all ways; the plain loop has stored and learnt what it has seen."""
    out = tmp_path / "rows.csv"
    options = dict(script="sac", env="multigoal", steps=3, out=str(out))
    online_throughput.main(online_throughput.Options(**options))
    (row,) = read_rows(out)
    assert min(float(row[name]) for name in ("ms_step", "ms_update", "ms_reference")) > 0
    reference = online_throughput.Reference(sac, parse(sac.Args, sac.ENV_DEFAULTS, []), 20)
    before = jax.tree.map(np.asarray, reference.state)
    reference.block(40)
    assert reference.size == 40 and reference.state.step == 40
    columns = reference.columns
    assert np.isin(columns["terminals"], (0, 1)).all() and columns["terminals"].any()
    assert (columns["masks"][columns["terminals"] == 0] == 1).all()
    going_on = np.flatnonzero(columns["terminals"][:-1] == 0)
    later = going_on[going_on != 40 % 20 - 1] + 1  # the row after it, not across the ring's end
    moved = columns["next_observations"][later - 1] == columns["observations"][later]
    assert moved.all()
    assert not np.array_equal(
        jax.tree.leaves(before.params)[0], jax.tree.leaves(reference.state.params)[0]
    )


def test_ppos_loop_in_the_same_table(tmp_path):
    """Times of a step and of an update; what PPO does not have is left empty."""
    out = tmp_path / "rows.csv"
    options = dict(script="ppo", env="multigoal", agents=2, out=str(out))
    online_throughput.main(online_throughput.Options(**options))
    (row,) = read_rows(out)
    assert min(float(row["ms_step"]), float(row["ms_update"])) > 0
    assert row["ms_no_env"] == row["waiting"] == row["ms_reference"] == ""


def test_the_plane_with_four_goals(tmp_path, monkeypatch, capsys):
    """`benchmarks.multigoal` trains, measures all seeds, and writes numbers and picture."""
    tiny = "--total-steps 6 --warmup-steps 2 --eval-episodes 1 --hidden-dims 8"
    monkeypatch.setattr(multigoal, "METHODS", {"SAC": f"baselines.sac {tiny}"})
    picture = tmp_path / "picture.png"
    folders = dict(run_dir=str(tmp_path / "runs"), out=str(tmp_path), picture=str(picture))
    multigoal.main(multigoal.Options(only=("SAC",), seeds=2, episodes=3, **folders))
    note = json.loads((tmp_path / "multigoal.json").read_text())["SAC"]
    assert np.shape(note["counts"]) == (2, 4) and note["command"].startswith("python -m baselines")
    assert (tmp_path / "multigoal-picture.json").exists() and picture.exists()
    assert "| SAC | " in capsys.readouterr().out


def test_samples_while_learning(tmp_path, capsys):
    """Shares per seed and goal at the times asked for, and a picture; the script is as before."""
    evaluate = sac.evaluate_if_due
    options = dict(script="sac", steps=(1005, 1060), seeds=2, samples=99)
    folders = dict(out=str(tmp_path), pictures=str(tmp_path))
    samples.main(samples.Options(**options, **folders))
    content = json.loads((tmp_path / "samples-sac.json").read_text())
    found = content["shares"]
    assert [*found] == ["1005", "1060"] and np.shape(found["1005"]) == (2, 4)
    assert found["1005"] != found["1060"] and (tmp_path / "samples-sac.png").exists()
    assert np.shape(content["samples"]["1060"]) == (99, 2) and "commit" in content["made_with"]
    assert sac.evaluate_if_due is evaluate
    stops("fql is not one", call=lambda: samples.main(samples.Options("fql", **folders)))


def test_what_checkpoints_cost(tmp_path):
    """Parts write what is new, the whole everything: in bytes, by the sizes of hopper's rows."""
    out = tmp_path / "checkpoints.json"
    sizes = dict(seeds=2, steps=30_000, interval=300, rounds=1)
    stops("and nope", call=lambda: checkpoints.main(checkpoints.Options(env="nope")))
    found = checkpoints.main(checkpoints.Options("sac", "hopper", out=str(out), **sizes))
    assert json.loads(out.read_text()) == found and min(found["seconds"].values()) > 0
    row = 2 * 4 * (2 * 11 + 3 + 3) / 2**20
    more = found["megabytes"]["whole"] - found["megabytes"]["parts"]
    assert more == pytest.approx(30_000 * row, abs=0.01)


def test_what_the_mazes_data_cover(tmp_path):
    """A dataset with a state at the start of task 1; of another maze's, and none: a line."""
    env = make_env("pointmaze-medium-singletask-task1-v0").unwrapped
    start = env.ij_to_xy(tuple(env.task_infos[0]["init_ij"]))
    data, out = tmp_path / "pointmaze-medium-navigate-v0.npz", tmp_path / "coverage.json"
    rest = dict(qpos=[start, start], actions=np.zeros((2, 2)), terminals=np.array([0, 1]))
    np.savez(data, observations=np.array([start, start]), **rest)
    coverage.main(coverage.Options(data, str(out)))
    found = json.loads(out.read_text())
    assert (found["dataset"], found["states"], found["visited"]) == (data.name, 2, 1)
    assert found["tasks"][0]["at_start"] == 2 and found["tasks"][0]["at_goal"] == 0
    (damaged := tmp_path / "pointmaze-medium-stitch-v0.npz").write_bytes(data.read_bytes()[:100])
    stops("is not readable", call=lambda: coverage.main(coverage.Options(damaged, str(out))))
    before, other = out.read_bytes(), data.rename(tmp_path / "pointmaze-large-navigate-v0.npz")
    for path in (data, other):
        call = lambda path=path: coverage.main(coverage.Options(path, str(out)))
        stops("expected an existing file pointmaze-medium-*.npz", call=call)
    assert out.read_bytes() == before


def test_values_of_a_task_that_is_there(tmp_path):
    for env, words in (
        ("cube-single", "is not a point maze"),
        ("pointmaze-medium", "it has [1, 2]"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(dict(flags=dict(env=env, tasks=[1, 2]))))
        stops(words, call=lambda: values.measure(values.Options(str(tmp_path), task=4)))


def test_values_by_table():
    """A corridor of ten squares, seen one step at a time in two halves, and another one beside it
    without a goal: the discounted number of steps to the goal, and none at all."""
    along = lambda y, x: np.stack([x + 0.5, np.full(len(x), y + 0.5)], 1)
    parts = [along(0, np.arange(6)), along(0, np.arange(5, 10)), along(2, np.arange(10))]
    ends = np.concatenate([np.arange(len(part)) == len(part) - 1 for part in parts]).astype(int)
    value = by_table(np.concatenate(parts), ends, np.array([9.5, 0.5]), 0.1, 1, 0.9)
    left = 9 - np.r_[np.arange(6), np.arange(5, 10)]
    np.testing.assert_allclose(value[:11], -(1 - 0.9**left) / 0.1)
    np.testing.assert_allclose(value[11:], -10)


def test_parts_of_an_update(tmp_path, quick_compile):
    """The losses and nothing else are what an update computes: their products add up to its."""
    path = tmp_path / "parts.csv"
    options = dict(sizes=("small",), seconds=0, transitions=2000, out=str(path))
    parts.main(parts.Options(scripts=("meam",), **options))
    gflop = {row["part"]: float(row["gflop"]) for row in read_rows(path)}
    update, losses = gflop.pop("update"), "critic behavior adjoint_matching score expansion"
    assert gflop.pop("sample") == 0
    assert gflop.keys() == {f"{name}_loss" for name in losses.split()}
    assert sum(gflop.values()) == pytest.approx(update, rel=1e-3) and min(gflop.values()) > 0


def test_what_environments_cost(tmp_path):
    """A row each, in the order asked for; one whose model is large takes more memory."""
    path = tmp_path / "environments.csv"
    environments.main(environments.Options(envs=("multigoal", "humanoid"), out=str(path)))
    plane, humanoid = read_rows(path)
    assert (plane["env"], plane["observation"], plane["action"]) == ("multigoal", "2", "2")
    assert (humanoid["env"], humanoid["observation"], humanoid["action"]) == (
        "humanoid",
        "348",
        "17",
    )
    assert float(humanoid["memory_mib"]) > max(0.5, abs(float(plane["memory_mib"])))
    assert float(humanoid["ms_step"]) > float(plane["ms_step"]) > 0 < float(humanoid["make_s"])
    assert "mujoco " in plane["made_with"]


def test_where_failed_episodes_go(tmp_path):
    """Two tasks of two agents with two episodes: one of task 1 stays in its cell, one visits two,
    the others succeed; of task 2 none fails. Gradients are those of the last row."""
    start, step = np.zeros(2), np.array([[0.0, 0], [4, 0], [4, 1]])  # cells are 4 wide
    paths = [start[None], step, step, step, *[step] * 4]
    success = np.array([[0, 0], [1, 1], [1, 1], [1, 1]])
    (tmp_path / "config.json").write_text('{"flags": {"env": "pointmaze-medium"}}')
    lines = ["task,seed,step,tilt_norm", "1,0,5,9", "1,1,5,9", "2,0,5,9", "2,1,5,9"]
    lines += ["1,0,10,1", "1,1,10,2", "2,0,10,3", "2,1,10,4"]
    (tmp_path / "train.csv").write_text("\n".join(lines) + "\n")
    paths = {f"path{i}": path for i, path in enumerate(paths)}
    np.savez(tmp_path / "rollouts.npz", task=[1, 1, 2, 2], success=success, **paths)
    out = tmp_path / "failures.csv"
    failures.main(failures.Options((tmp_path,), out=str(out)))
    first, second = read_rows(out)
    expected = dict(task="1", success="0.500", failed="2", never_left="0.500", cells="1.50")
    assert first == dict(run=tmp_path.name, tilt_norm="1.500") | expected
    expected = dict(task="2", success="1.000", failed="0", never_left="", cells="")
    assert second == dict(run=tmp_path.name, tilt_norm="3.500") | expected
    train = (tmp_path / "train.csv").read_text().replace("tilt_norm", "q")  # as of ReBRAC
    (tmp_path / "train.csv").write_text(train)
    failures.main(failures.Options((tmp_path,), out=str(out)))
    assert [row["tilt_norm"] for row in read_rows(out)] == ["", ""]
    before = out.read_bytes()
    with pytest.raises(UserError, match="folders"):
        failures.main(failures.Options((), out=str(out)))
    for name, env in (("cube", "cube-single"), ("unfinished", "pointmaze-medium")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(f'{{"flags": {{"env": "{env}"}}}}')
        call = lambda folder=folder: failures.main(failures.Options((folder,), out=str(out)))
        stops(f"{name} is not a complete point-maze run", call=call)
    assert out.read_bytes() == before


def test_results_of_other_labels_stay(tmp_path):
    """A label's rows replace its own of before, in the order that is asked for."""
    row = lambda label, score: dict(label=label, success=score)
    for label, score in (("b", "1"), ("a", "2"), ("b", "3")):
        rows = keep(tmp_path, "some", label, dict(run=score), [row(label, score)], order=["a", "b"])
    assert rows == [row("a", "2"), row("b", "3")]
    assert kept(tmp_path, "some") == (rows, dict(b=dict(run="3"), a=dict(run="2")))
    assert keep(tmp_path, "some", "c", {}, [row("c", "4")]) == [*rows, row("c", "4")]


def test_rounded_products():
    """Operands have so many bits, also in derivatives; afterwards all is as before."""

    def coarse(x, bits):  # to the nearest number with `bits` bits after the leading one
        mantissa, exponent = np.frexp(np.float64(x))
        return np.ldexp(np.round(mantissa * 2 ** (bits + 1)), exponent - bits - 1)

    x, y = jax.random.normal(jax.random.PRNGKey(0), (2, 3, 8, 8))
    product = lambda x, y: jax.vmap(jnp.matmul)(x, y)
    slope = lambda x, y: jax.jit(jax.grad(lambda x: (product(x, y) ** 2).sum()))(x)
    plain = product(x, y), slope(x, y)
    for bits in precision.BITS.values():
        with precision.rounded(bits):
            z, dx = jax.jit(product)(x, y), slope(x, y)
        np.testing.assert_allclose(z, coarse(x, bits) @ coarse(y, bits), atol=1e-5)
        expected = coarse(2 * z, bits) @ coarse(y, bits).swapaxes(1, 2)
        np.testing.assert_allclose(dx, expected, atol=1e-5 + 2.0 ** (4 - bits))
        assert bits < 23 or all(map(np.array_equal, (z, dx), plain))
    assert all(map(np.array_equal, (product(x, y), slope(x, y)), plain))


def test_the_ants_expert_is_a_runs_policy(tmp_path, monkeypatch):
    """`walk` with what is kept of a run of sac.py gives the mode of its policy."""
    monkeypatch.setattr(common_ant, "WEIGHTS", tmp_path / "ant.npz")
    flags = "--env online-ant-xy --total-steps 30 --warmup-steps 20 --hidden-dims 16 8 --workers 1"
    flags += " --eval-interval 30 --eval-episodes 1 --batch-size 4 --replay-size 30 --name default"
    sac.main(parse(sac.Args, sac.ENV_DEFAULTS, [*flags.split(), "--run-dir", str(tmp_path)]))
    folder = tmp_path / "sac/online-ant-xy/default"
    ant.keep(folder, common_ant.WEIGHTS)
    agent = load_agent(folder)
    states = np.random.default_rng(0).normal(size=(5, 31))  # with x and y, and a direction
    observations = np.float32(states[:, 2:])
    expected = sac.sample_actions(agent.args, agent.state, observations, None, "eval")
    actions = np.stack([common_ant.walk(x[:29], x[29:]) for x in states])
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(actions, expected, atol=1e-5)
    kept = dict(run=str(folder), episodes=1, mazes=())
    common_ant.WEIGHTS.write_text("before")
    for out, text in ((folder / "config.json/rows.csv", "before"), (tmp_path / "rows.csv", "")):
        with contextlib.suppress(OSError):  # the first cannot be written
            ant.main(ant.Options(out=str(out), **kept))
        assert (common_ant.WEIGHTS.read_bytes() == b"before") == bool(text)
    assert common_ant.WEIGHTS == tmp_path / "ant.npz" and len(read_rows(tmp_path / "rows.csv")) == 1
    before, config = common_ant.WEIGHTS.read_bytes(), folder / "config.json"
    config.write_text(config.read_text().replace('"online-ant-xy"', '"hopper"'))
    stops("is a run on hopper", call=lambda: ant.main(ant.Options(**kept)))
    assert common_ant.WEIGHTS.read_bytes() == before


def test_what_the_ants_expert_can(tmp_path, capsys):
    """The kept one is fast and stands; a row for the plane, two for a maze."""
    ant.main(ant.Options(episodes=1, out=str(tmp_path / "ant.csv"), mazes=("medium",)))
    plane, quiet, noisy = read_rows(tmp_path / "ant.csv")
    assert float(plane["speed"]) > 1 and plane["falls"] == "0"
    assert (quiet["noise"], noisy["noise"]) == ("0.0", "0.2") and noisy["place"] == "antmaze-medium"
    assert float(quiet["success"]) >= 0.8 and 100 < int(quiet["steps"]) < 1000
    assert "| plane |" in capsys.readouterr().out
