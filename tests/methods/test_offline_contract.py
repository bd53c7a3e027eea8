"""What all offline scripts promise alike, each against a second writing: the specification's table
of tuned values, the optimiser, the critics' target and metrics, a new agent's copies, fresh random
numbers, and what acting and training hand on for every agent.

Shapes: N agents, E episodes, B batch, S observation, H chunk of d actions (A = H d), K critics.
"""

import importlib
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.environments import resolve
from common.flags import configure
from common.sampling import Batch, Replay
from tests.helpers import reference
from tools import shared_blocks

pytestmark = pytest.mark.usefixtures("quick_compile")
SCRIPTS = {
    name.split("/")[-1]: importlib.import_module(name.replace("/", "."))
    for name in shared_blocks.named("offline")
}
S = 7
each_script = pytest.mark.parametrize("name", SCRIPTS, ids="{}.py".format)  # one group of tests

# --- tuned values --------------------------------------------------------------------------------

DOMAINS = """scene puzzle-3x3 puzzle-4x4 cube-double cube-triple cube-quadruple
antmaze-large antmaze-giant humanoidmaze-medium humanoidmaze-large""".split()
TUNED = """
qam       inv_temp       1    3    30    1     3     1   10   3     3    3
qam_edit  inv_temp       1    1    0.1   1     3     3   1    10    3    3
qam_edit  edit_scale     0    0.1  0.9   0     0.1   0.1 0.1  0.1   0.1  0.1
qam_fql   inv_temp       1    3    3     1     10    0.3 3    3     1    0.3
qam_fql   fql_alpha      300  0    3     0     300   30  30   30    30   30
meam      inv_temp       1    3    30    1     3     1   10   3     3    3
meam      entropy_scale  0.01 0.03 0.3   0.01  0.03  0.01 0.1 0.03  0.03 0.03
meam      rho            0.1  0.1  0.5   0.1   0.1   0.1 0.1  0.1   0.1  0.1
bam       inv_temp       10   10   30    10    30    10  30   30    10   30
fbrac     fbrac_alpha    100  0.03 0.3   0.1   0.03  1   0.1  0.1   30   10
fql       fql_alpha      300  300  1     300   30    100 3    3     30   30
fawac     inv_temp       6.4  0.8  0.8   0.8   0.8   0.8 6.4  0.8   6.4  0.8
cgql      inv_temp       10   10   10    10    10    10  10   10    10   10
cgql      guidance_coef  0.1  0.1  0.1   0.01  0.1   0.1 0.1  0.1   0.01 0.01
cgql      guidance_coef  0.1  0.1  1     0.01  0.1   0.01 0.1 0.1   0.1  0.1
cgql      guidance_coef  0.1  0.1  1     0.01  0.1   0.01 0.1 0.1   0.1  0.1
cgql      noisy_coef     0    0    0     0     0     0   0    0     0    0
cgql      noisy_coef     0.1  0.1  0.001 0.001 0.001 0.1 0.1  0.001 0.1  0.1
cgql      noisy_coef     0.1 0.001 0.001 0.001 0.001 0.1 0.001 0.001 0.1 0.1
dac       bc_coef        1    1    1     3     0.3   1   0.3  0.3   1    0.3
qsm       inv_temp       3    10   10    1     10    1   10   10    10   10
qsm       bc_coef        30   30   1     10    10    10  10   10    30   30
dsrl      noise_scale    0.4  1    1     1     1.4   1.4 0.8  1.2   0.6  0.8
fedit     edit_scale     0.2  0.2  0.8   0.2   0.3   0.4 0.2  0.3   0.5  0.1
ifql      expectile      0.9  0.95 0.9   0.9   0.95  0.95 0.9 0.8   0.7  0.8
rebrac    rebrac_alpha   0.03 0.1  0.01  0.01  0.01  0.01 0.01 0.01 0.01 0.01
rebrac    actor_noise    0    0    0.2   0     0.2   0.2 0    0     0    0.1
rlpd      rlpd_alpha     0.3  0.01 0     0.1   0     0   0    0.01  0.03 0
"""
COMMON = dict(
    hidden_dims=(512,) * 4, num_critics=10, batch_size=256, lr=3e-4, target_rate=0.005,
    offline_steps=1_000_000, online_steps=0, start_training=5_000, eval_interval=50_000,
    eval_episodes=50, flow_steps=10, grad_clip=1.0, seed=0, num_seeds=1, precision="default",
)  # fmt: skip
OWN = dict(
    meam=dict(
        path_weight=1.0, sigma_min=0.1, sigma_max=1.0, score_gate=True, noisy_expansion=False
    ),
    cgql=dict(guidance="plain"),
    qsm=dict(ancestral=False),
    ifql=dict(num_candidates=32),
    rebrac=dict(noise_clip=0.5, target_delay=2),
    rlpd=dict(online_steps=500_000),
)
CLIPPED = "qam qam_edit qam_fql meam bam dac qsm".split()  # by the joint norm; no other script is
WITHOUT_FLOW = "rebrac rlpd".split()


def specified(name, domain):
    """flag -> value of a script in a domain: common, the domain's protocol, the script's own."""
    flags = COMMON | resolve(domain).protocol | OWN.get(name, {})
    flags = {k: v for k, v in flags.items() if k != "grad_clip" or name in CLIPPED}
    flags = {k: v for k, v in flags.items() if k != "flow_steps" or name not in WITHOUT_FLOW}
    if name == "rlpd":
        del flags["offline_steps"]
    rows = [row.split() for row in TUNED.strip().splitlines()]
    for _, flag, *row in (row for row in rows if row[0] == name):
        value = float(row[DOMAINS.index(domain)])
        if name == "cgql" and flag != "inv_temp":  # one row for each kind of guidance
            value = (*flags.get(flag, ()), value)
        flags[flag] = value
    return flags


@each_script
def test_tuned_values(name):
    """Every flag of the method and its training has the specification's value in all ten domains;
    those of own environments and data change nothing; the flags left are those of files and
    logs."""
    rest = """env tasks name run_dir dataset_dir collect log_interval eval_slots workers eval_only
    overwrite track wandb_project wandb_entity wandb_group compile_cache action_size""".split()
    neutral = dict(dataset="", env_kwargs="", max_episode_steps=0)
    neutral |= dict(normalize_observations=False, reward_scale=1, reward_shift=0)
    for domain in DOMAINS:
        args = vars(configure(SCRIPTS[name].Args, SCRIPTS[name].ENV_DEFAULTS, domain))
        found = {k: v for k, v in args.items() if k not in rest}
        assert found == specified(name, domain) | neutral, domain


def test_the_table_is_complete():
    """Ten numbers in every row, of scripts that exist."""
    rows = [row.split() for row in TUNED.strip().splitlines()]
    assert {len(row) for row in rows} == {12} and {row[0] for row in rows} == set(SCRIPTS)


# --- optimiser -----------------------------------------------------------------------------------


@each_script
def test_optimizer(float64, name):
    """Adam with rates 0.9 and 0.999 and 1e-8 beside the root, over steps with large, small and no
    gradients; where the method clips, the norm of all networks together is at most grad_clip."""
    rng, args = np.random.default_rng(0), SimpleNamespace(lr=0.01, grad_clip=0.5)
    params = dict(a=rng.normal(size=(3, 2)), b=rng.normal(size=4))
    adam = SCRIPTS[name].optimizer(args)
    state, m, v = adam.init(params), dict(a=0.0, b=0.0), dict(a=0.0, b=0.0)
    for step, scale in enumerate((1e-8, 1.0, 0.01, 30.0, 0.0), 1):
        grads = {k: scale * rng.normal(size=x.shape) for k, x in params.items()}
        updates, state = adam.update(grads, state, params)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        assert scale != 0.01 or 0 < norm < args.grad_clip
        if name in CLIPPED and norm > args.grad_clip:
            grads = {k: g * args.grad_clip / norm for k, g in grads.items()}
        for k, g in grads.items():
            m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.999 * v[k] + 0.001 * g**2
            root = np.sqrt(v[k] / (1 - 0.999**step)) + 1e-8
            expected = -args.lr * m[k] / (1 - 0.9**step) / root
            np.testing.assert_allclose(updates[k], expected, rtol=1e-5)


# --- agents --------------------------------------------------------------------------------------

AVERAGED = dict.fromkeys(SCRIPTS, {"critic"})
AVERAGED |= dict.fromkeys("qam qam_edit qam_fql bam cgql dsrl".split(), {"critic", "behavior"})
AVERAGED |= dict(meam={"critic", "behavior", "policy"}, rebrac={"critic", "actor"})


NOISY = dict(cgql=dict(guidance="mse"), meam=dict(noisy_expansion=True, path_weight=0.5))


def arguments(name, **flags):
    """A script, and arguments whose sizes all differ: H 3, d 2, K 4, T 5, B 8; S is 7."""
    script = SCRIPTS[name]
    flags = dict(chunk_length=3, action_size=2, num_critics=4, flow_steps=5, batch_size=8) | flags
    flags = {flag: x for flag, x in flags.items() if hasattr(script.Args, flag)}
    return script, reference.arguments(script, **flags)


def make_batch(args):
    """Random chunks; some ended the task, and others end too early."""
    rng, B, A = np.random.default_rng(0), args.batch_size, args.chunk_length * args.action_size
    states, actions = rng.normal(size=(2, B, S)), rng.uniform(-1, 1, (B, A))
    masks, valid = 1.0 * (np.arange(B) % 4 != 1), 1.0 * (np.arange(B) % 3 != 2)
    return Batch(states[0], actions, rng.normal(size=B), masks, states[1], valid)


@each_script
def test_new_agent(float64, name):
    """Targets are equal copies of the networks that have an average, and of no others; no two
    networks or critics start alike, nor do two agents; the temperature is 1, the key a fresh one,
    and Adam's moments are 0."""
    script, args = SCRIPTS[name], reference.arguments(SCRIPTS[name])
    create, key = jax.jit(partial(script.create, args, reference.S)), jax.random.PRNGKey(0)
    state = create(key)
    leaves = lambda tree: [np.asarray(x) for x in jax.tree.leaves(tree)]
    assert set(state.targets) == AVERAGED[name]
    for network, tree in state.targets.items():
        jax.tree.map(np.testing.assert_array_equal, tree, state.params[network])
    assert not any(x.any() for x in leaves(state.opt_state))
    kernels = [x for x in leaves(state.params) if x.ndim > 1 and x.std() > 0]
    kernels = [y for x in kernels for y in (x if x.ndim == 3 else [x])]  # of each critic
    assert len({x.tobytes() for x in kernels}) == len(kernels) >= 3 * args.num_critics
    others = {x.tobytes() for x in leaves(create(jax.random.PRNGKey(1)).params) if x.ndim == 2}
    assert others and others.isdisjoint(x.tobytes() for x in leaves(state.params) if x.std() > 0)
    assert state.params.get("log_alpha", 0) == 0
    assert not np.array_equal(state.key, key) and np.any(state.key)


@each_script
def test_every_draw_has_its_own_key(name):
    """In an update no key is drawn from twice or split twice, and the key that it leaves is
    neither one of them nor the one that came in."""
    script, args = arguments(name, **NOISY.get(name, {}))
    state = jax.eval_shape(partial(script.create, args, S), jax.random.PRNGKey(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    drawn, split = [], []

    def spy(name, seen):
        function = getattr(jax.random, name)
        return lambda key, *rest, **more: seen.append(key) or function(key, *rest, **more)

    def keys(key, batch):
        with pytest.MonkeyPatch.context() as patch:
            for draw in ("normal", "uniform", "bernoulli", "randint"):
                patch.setattr(jax.random, draw, spy(draw, drawn))
            patch.setattr(jax.random, "split", spy("split", split))
            new, _ = script.update(args, state.replace(key=key), batch)
        return jnp.stack([new.key, *drawn]), jnp.stack(split)

    batch, key = jax.tree.map(jnp.float32, make_batch(args)), jax.random.PRNGKey(5)
    draws, splits = ([*map(tuple, np.asarray(x))] for x in jax.jit(keys)(key, batch))
    assert len(set(draws)) == len(draws) > 1 and len(set(splits)) == len(splits)
    assert splits[0] == tuple(np.asarray(key))
    assert not {*draws} & {*splits}


@each_script
def test_critics_target_and_metrics(float64, monkeypatch, name):
    """The temporal difference on tables of values in place of networks, in NumPy: gamma^H, the mean
    less the population deviation over critics, the mask of solved and of broken chunks, and what
    the metrics q, q_std and target are means of."""
    script, args = arguments(name, pessimism=0.7, discount=0.9)
    batch, K, B = make_batch(args), args.num_critics, args.batch_size
    rng = np.random.default_rng(1)
    q, target_q, v = rng.normal(size=(K, B)), rng.normal(size=(K, B)), rng.normal(size=(B,))
    monkeypatch.setattr(script, "critic", lambda args, params, s, a, *t: params)
    monkeypatch.setattr(script, "sample_actions", lambda args, state, s, key: 0 * batch.actions)
    if name == "ifql":
        monkeypatch.setattr(script, "value", lambda args, params, s: params)
    if name == "rebrac":
        monkeypatch.setattr(script, "actor", lambda args, params, s: 0 * batch.actions)
    params = dict(critic=jnp.asarray(q), value=jnp.asarray(v))
    state = script.State(
        params, dict(critic=jnp.asarray(target_q), actor=None), None, jax.random.PRNGKey(0)
    )
    grad = jax.value_and_grad(script.critic_loss, argnums=1, has_aux=True)
    (loss, metrics), grads = grad(args, params, state, batch, jax.random.PRNGKey(0))

    y, total, slopes = np.zeros(B), 0, np.zeros((K, B))
    for b in range(B):
        mean = sum(target_q[:, b]) / K
        deviation = (sum((x - mean) ** 2 for x in target_q[:, b]) / K) ** 0.5
        value = v[b] if name == "ifql" else mean - 0.7 * deviation
        y[b] = batch.rewards[b] + 0.9 * 0.9 * 0.9 * batch.masks[b] * value
        for k in range(K):
            total += batch.valid[b] * (q[k, b] - y[b]) ** 2 / (K * B)
            slopes[k, b] = 2 * batch.valid[b] * (q[k, b] - y[b]) / (K * B)
    np.testing.assert_allclose(loss, total, rtol=1e-9)
    np.testing.assert_allclose(grads["critic"], slopes, rtol=1e-9, atol=1e-12)
    assert not np.any(grads["value"])
    spread = np.mean([np.std(q[:, b]) for b in range(B)])
    expected = dict(critic_loss=total, q=q.mean(), q_std=spread, target=y.mean())
    assert metrics.keys() == expected.keys()
    for key, x in expected.items():
        np.testing.assert_allclose(metrics[key], x, rtol=1e-7, err_msg=key)


# --- many agents ---------------------------------------------------------------------------------


@each_script
def test_acting(monkeypatch, name):
    """Every agent's own state meets its own observations, one episode at a time, with the noise of
    the episode's seed and age alone; a chunk's rows are its actions in order."""
    script, args = arguments(name)
    H, d, N, E = args.chunk_length, args.action_size, 2, 5

    def sampled(args, state, observations, key):
        noise = jax.random.normal(key, (len(observations), H * d))
        return noise + 10 * observations.sum(-1, keepdims=True) + 1000 * state.params

    monkeypatch.setattr(script, "sample_actions", sampled)
    rng = np.random.default_rng(0)
    observations = np.float32(rng.normal(size=(N, E, S)))
    seeds = np.array([[1, 1, 2, 2**32 - 1, 1], [3, 1, 2, 0, 3]], np.uint32)
    ages = np.array([[0, 5, 0, 0, 0], [0, 5, 1000, 0, 3]], np.int32)
    state = script.State(jnp.arange(2.0), None, None, jnp.zeros((2, 2), jnp.uint32))
    found = script.act.__wrapped__(args, state, observations, seeds, ages)
    assert found.shape == (N, E, H, d)
    for n in range(N):
        for e in range(E):
            key = jax.random.fold_in(jax.random.PRNGKey(seeds[n, e]), ages[n, e])
            flat = np.asarray(jax.random.normal(key, (1, H * d)))[0]
            flat = flat + 10 * observations[n, e].sum() + 1000 * n
            expected = [flat[h * d : h * d + d] for h in range(H)]
            np.testing.assert_allclose(found[n, e], expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("slots", [0, 1])
@each_script
def test_training(monkeypatch, name, slots):
    """Every update of every agent gets a batch of its own replay and task, of the flags' sizes,
    drawn with a key of its own, and leaves its key to the next; the metrics are summed. Offline,
    where the replay has no slots, as online."""
    script, args = arguments(name, discount=0.9)
    sizes = args.batch_size, args.chunk_length, args.discount

    def sampled(key, data, replay, task, *rest):
        assert (data, rest) == ("data", sizes)
        return dict(key=key, replay=replay.size, task=task)

    def halves(key, own, data, replay, task):
        assert own is args
        return sampled(key, data, replay, task, *sizes)

    def update(args, state, batch):
        words = lambda key: jnp.stack([key >> 16, key & 0xFFFF]).astype(float)
        row = dict(key=words(state.key), batch_key=words(batch["key"]))
        row |= dict(replay=1.0 * batch["replay"], task=1.0 * batch["task"], one=1.0)
        return state.replace(params=state.params + 1, key=state.key ^ 5), row

    if name == "rlpd":
        monkeypatch.setattr(script, "sample_halves", halves)
    else:
        monkeypatch.setattr(script, "sample", sampled)
    monkeypatch.setattr(script, "update", update)
    keys, task = jax.random.split(jax.random.PRNGKey(3), 2), jnp.array([2, 0])
    replay = Replay(*[jnp.zeros((2, slots))] * 6, size=jnp.array([7, 9]))
    state = script.State(jnp.array([0.0, 10.0]), (), (), keys)
    shapes = dict(key=(2, 2, 2), batch_key=(2, 2, 2), replay=(2,), task=(2,), one=(2,))
    before = {word: jnp.zeros(shape) for word, shape in shapes.items()}
    before["updates"] = jnp.array([10.0, 20.0])  # of earlier calls, since the last row
    # Without jit, which would not take a word for the data.
    monkeypatch.setattr(script, "train_step", script.train_step.__wrapped__)
    train_chunk = script.train_chunk.__wrapped__
    new, sums = train_chunk(args, state, before, "data", replay, task, 3)
    assert sums["updates"].tolist() == [13, 23]
    words = lambda key: np.float64([np.asarray(key) >> 16, np.asarray(key) & 0xFFFF])
    for n in range(2):
        key, expected = keys[n], dict(key=0, batch_key=0)
        for _ in range(3):
            key, batch_key = jax.random.split(key)
            expected["key"] += words(key)
            expected["batch_key"] += words(batch_key)
            key = key ^ 5
        expected |= dict(replay=3 * replay.size[n], task=3 * task[n], one=3)
        for word, x in expected.items():
            np.testing.assert_array_equal(sums[word][n], x, err_msg=word)
        assert np.array_equal(new.key[n], key) and new.params[n] == 3 + 10 * n
