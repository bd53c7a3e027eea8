"""RLPD: Reinforcement Learning with Prior Data (Ball et al., ICML 2023), as the baseline of QAM (Li
and Levine, ICLR 2026, arXiv:2601.14234), whose numbers and code it follows.

It is a soft actor-critic from scratch. There is no offline phase; one half of every batch comes
from the dataset, the other from the agent's own transitions. A temperature holds the entropy of the
tanh-Gaussian policy at a target. QAM's authors add behaviour cloning; alpha = 0 leaves it out.

    batch = B/2 chunks of the dataset + B/2 chunks of the replay                        Eq. (RLPD1)
    L(pi) = <alpha_T log pi(a~|s) - Q(s, a~)>, a~ ~ pi(.|s)                             Eq. (RLPD2)
            - alpha <log pi(a|s)>                                                       Eq. (RLPD4)

Plain equation numbers are those of Li and Levine 2026; numbers with letters are ours, see
docs/equations.md. docs/rlpd.md lists what differs from the original RLPD (`# ref:`).

    python baselines/rlpd.py                   the point maze, small networks
    python baselines/rlpd.py --env cube-double --tasks 1 2 3 4 5 --num-seeds 4

Shapes: B batch, S observation, H chunk length, d action, A = H d flattened chunk, K critics,
N agents (tasks x seeds) trained at once.
"""

import dataclasses
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # `python baselines/x.py` finds common/ next to baselines/
    sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import Array
from tqdm import tqdm

from common.data import Batch, Dataset, Replay, Shards, locate, over_agents, sample, spread
from common.envs import TRAINING, EnvPool, resolve, seed_of
from common.errors import UserError
from common.flags import NonNegativeFloat, PositiveFloat, PositiveInt, UnitInterval
from common.networks import Critic, TanhGaussian
from common.run import Precision, Run, ours, parse


@dataclasses.dataclass(frozen=True)
class Args:
    # --- method ---
    # Weight alpha of behaviour cloning; the original RLPD has none (0).
    rlpd_alpha: NonNegativeFloat = 0.0
    # A target is the mean minus this many standard deviations of the critics.
    pessimism: NonNegativeFloat = 0.5

    # --- networks and optimiser ---
    # Hidden-layer widths of all networks.
    hidden_dims: tuple[PositiveInt, ...] = (512, 512, 512, 512)
    num_critics: PositiveInt = 10  # Number of critics K in the ensemble.
    batch_size: PositiveInt = 256  # Batch size B, in chunks.
    lr: PositiveFloat = 3e-4  # Adam's learning rate.
    target_rate: UnitInterval = 0.005  # Step size of the moving averages (target networks).

    # --- forked: run arguments (no offline phase) ---
    env: str = "pointmaze-medium"  # short name (puzzle-4x4), dataset or full OGBench name
    tasks: tuple[int, ...] = (1,)  # tasks 1..5, trained at once on one copy of the data
    seed: int = 0  # first seed; an agent does not depend on those trained beside it
    num_seeds: int = 1  # seeds per task: seed, seed + 1, ...
    name: str = "default"  # of the run's folder runs/<script>/<env>/<name>
    run_dir: str = "runs"  # where the folders of all runs are
    dataset_dir: str = ""  # OGBench's files or 100M shards (default: OGBench's cache, then data/)
    collect: int = 0  # make a missing dataset: transitions of OGBench's scripted expert
    online_steps: int = 500_000  # environment steps, each with an update
    start_training: int = 5_000  # first environment step that is followed by an update
    log_interval: int = 5_000  # updates between two rows of train.csv (means over them)
    eval_interval: int = 50_000  # updates between two evaluations, each with a checkpoint
    eval_episodes: int = 50  # episodes per evaluation and agent
    eval_slots: int = 10  # environments that share them, per agent; at most 100 in all
    workers: int = 0  # processes that step environments (0: one per core)
    eval_only: bool = False  # evaluate the run's checkpoint and do nothing else
    track: bool = False  # log to Weights & Biases, too
    compile_cache: str = ""  # folder of compiled programs (default: run_dir/.compiled), or none
    precision: Precision = "default"  # of matrix products on a GPU (NVIDIA's default: TF32)
    chunk_length: int = 5  # H: actions chosen at once and played open loop
    discount: float = 0.99  # gamma, per environment step
    sparse: bool = False  # reward -1 until all is done (else minus the number of unmet sub-goals)
    action_size: tyro.conf.Suppress[int] = 0  # d, no flag: read from the dataset
    # --- end forked ---

    def __post_init__(self) -> None:
        if self.batch_size % 2:
            raise UserError("--batch-size must be even, because one half is from the dataset")
        if not self.online_steps:
            raise UserError("--online-steps must be greater than 0: there is no offline phase")
        if self.start_training < self.chunk_length:
            raise UserError("--start-training must be at least --chunk-length, to fill a chunk")


# The weights of behaviour cloning in the ten domains come from the launch script of the official
# QAM repository, which defines them, but does not pass them on (docs/rlpd.md). The point maze is
# not in the paper: its networks are small enough for a CPU.
ENV_DEFAULTS = {
    "antmaze-large": dict(rlpd_alpha=0.0),
    "antmaze-giant": dict(rlpd_alpha=0.01),
    "humanoidmaze-medium": dict(rlpd_alpha=0.03),
    "humanoidmaze-large": dict(rlpd_alpha=0.0),
    "scene": dict(rlpd_alpha=0.3),
    "puzzle-3x3": dict(rlpd_alpha=0.01),
    "puzzle-4x4": dict(rlpd_alpha=0.0),
    "cube-double": dict(rlpd_alpha=0.1),
    "cube-triple": dict(rlpd_alpha=0.0),
    "cube-quadruple": dict(rlpd_alpha=0.0),
    "pointmaze-medium": dict(
        rlpd_alpha=0.1,
        discount=0.995,
        num_critics=2,
        lr=1e-3,
        hidden_dims=(128, 128),
        batch_size=128,
        target_rate=0.01,
        online_steps=20_000,
        start_training=1_000,
        log_interval=1_000,
        eval_interval=5_000,
        eval_slots=50,
    ),
}


@flax.struct.dataclass
class State:
    """Holds everything that an agent carries from update to update."""

    params: dict  # critic (phi), actor (pi), log_alpha (temperature alpha_T)
    targets: dict  # moving average of critic
    opt_state: optax.OptState
    key: Array  # (2,) uint32


def optimizer(args: Args) -> optax.GradientTransformation:
    """Returns Adam."""
    return optax.adam(args.lr)


def create(args: Args, observation_size: int, key: Array) -> State:
    """Creates an agent, whose temperature is 1."""
    key, critic_key, actor_key = jax.random.split(key, 3)
    s = jnp.zeros((1, observation_size))
    a = jnp.zeros((1, args.chunk_length * args.action_size))
    params = dict(
        critic=Critic(args.hidden_dims, args.num_critics).init(critic_key, s, a),
        actor=TanhGaussian(args.hidden_dims, a.shape[-1]).init(actor_key, s),
        log_alpha=jnp.zeros(()),
    )
    targets = dict(critic=jax.tree.map(jnp.copy, params["critic"]))
    return State(params, targets, optimizer(args).init(params), key)


# --- the method ----------------------------------------------------------------------------------


def critic(args: Args, params: dict, observations: Array, actions: Array) -> Array:
    """Evaluates the critics Q^1..Q^K: (B, S), (B, A) -> (K, B)."""
    return Critic(args.hidden_dims, args.num_critics).apply(params, observations, actions)


def actor(args: Args, params: dict, observations: Array) -> tuple[Array, Array]:
    """Evaluates pi(.|s), a Gaussian before tanh: (B, S) -> mean, log-deviation (B, A) each."""
    network = TanhGaussian(args.hidden_dims, args.chunk_length * args.action_size)
    return network.apply(params, observations)


def log_density(u: Array, noise: Array, log_std: Array) -> Array:
    """Computes log pi(a|s) of a = tanh(u) with u = mean + std noise: (B, A) each -> (B,)."""
    gaussian = -0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)
    log_slope = 2 * (jnp.log(2) - u - jax.nn.softplus(-2 * u))  # of a = tanh(u)
    return (gaussian - log_slope).sum(-1)  # Eq. (RLPD5)


def sample_actions(args: Args, state: State, observations: Array, key: Array) -> Array:
    """Samples a ~ pi(.|s): (B, S) -> (B, A) in [-1, 1]."""
    # ref: sampled in evaluations, too.
    mean, log_std = actor(args, state.params["actor"], observations)
    noise = jax.random.normal(key, mean.shape)
    return jnp.tanh(mean + jnp.exp(log_std) * noise)


def pessimistic(args: Args, q: Array) -> Array:
    """Computes the pessimistic value of K critics, the mean minus deviations: (K, B) -> (B,).

    Unlike q.std(0), whose root has no derivative at 0, this deviation has a gradient of 0 where all
    critics agree, as two often do to the last bit.
    """
    deviation = optax.safe_norm(q - q.mean(0), 0.0, axis=0) / len(q) ** 0.5
    return q.mean(0) - args.pessimism * deviation  # Eq. (26)


# A loss differentiates `params` only; `state` and `batch` are constants. It returns its value and
# its metrics, whose names differ from those of all other losses.


def critic_loss(
    args: Args, params: dict, state: State, batch: Batch, key: Array
) -> tuple[Array, dict]:
    """Computes the TD error of every critic against one pessimistic target."""
    # ref: no entropy in the target; all critics in it, not two at random as in the original RLPD.
    next_actions = sample_actions(args, state, batch.next_observations, key)
    next_q = critic(args, state.targets["critic"], batch.next_observations, next_actions)
    next_value = pessimistic(args, next_q)
    target = batch.rewards + args.discount**args.chunk_length * batch.masks * next_value
    q = critic(args, params["critic"], batch.observations, batch.actions)
    loss = (batch.valid * (q - target) ** 2).mean()  # Eq. (23)
    metrics = dict(
        critic_loss=loss,
        q=q.mean(),
        q_std=q.std(0).mean(),
        target=target.mean(),
    )
    return loss, metrics


def actor_loss(
    args: Args, params: dict, state: State, batch: Batch, key: Array
) -> tuple[Array, dict]:
    """Computes the soft actor-critic loss and that of its temperature, which seeks entropy -A/2."""
    mean, log_std = actor(args, params["actor"], batch.observations)
    noise = jax.random.normal(key, mean.shape)
    u = mean + jnp.exp(log_std) * noise
    log_prob = log_density(u, noise, log_std)
    q = critic(args, state.params["critic"], batch.observations, jnp.tanh(u))
    value = pessimistic(args, q)  # ref: here as well, where other baselines take the mean
    policy_loss = (jnp.exp(state.params["log_alpha"]) * log_prob - value).mean()  # Eq. (RLPD2)
    entropy = -log_prob.mean()
    target_entropy = -0.5 * mean.shape[-1]
    alpha = jnp.exp(params["log_alpha"])
    alpha_loss = alpha * (jax.lax.stop_gradient(entropy) - target_entropy)  # Eq. (RLPD3)
    loss = policy_loss + alpha_loss
    metrics = dict(
        actor_loss=loss,
        actor_q=value.mean(),
        entropy=entropy,
        alpha=alpha,
    )
    return loss, metrics


def cloning_loss(
    args: Args, params: dict, state: State, batch: Batch, key: Array
) -> tuple[Array, dict]:
    """Computes the negative log-likelihood of the actions in both halves of the batch."""
    # ref: added by QAM's authors; the original RLPD has none.
    clipped = jnp.clip(batch.actions, -1 + 1e-5, 1 - 1e-5)
    u = jnp.arctanh(clipped)
    mean, log_std = actor(args, params["actor"], batch.observations)
    noise = (u - mean) / jnp.exp(log_std)
    log_prob = log_density(u, noise, log_std)
    loss = -(batch.valid * log_prob).mean()  # Eq. (RLPD4)
    return args.rlpd_alpha * loss, dict(cloning_loss=loss)


def update(args: Args, state: State, batch: Batch) -> tuple[State, dict]:
    """Makes one gradient step on the sum of all losses, all at the parameters before the step."""
    key, *keys = jax.random.split(state.key, 4)
    losses = [critic_loss, actor_loss, cloning_loss]

    def total_loss(params):
        total = 0.0
        metrics = {}
        for loss, loss_key in zip(losses, keys, strict=True):
            value, loss_metrics = loss(args, params, state, batch, loss_key)
            total += value
            metrics |= loss_metrics
        return total, metrics

    grads, metrics = jax.grad(total_loss, has_aux=True)(state.params)
    metrics["grad_norm"] = optax.global_norm(grads)
    updates, opt_state = optimizer(args).update(grads, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    # ref: the targets move towards the parameters from before this step.
    online = {name: state.params[name] for name in state.targets}
    targets = optax.incremental_update(online, state.targets, args.target_rate)
    return State(params, targets, opt_state, key), metrics


# --- forked: many agents (batches from two sources) -----------------------------------------------


@partial(jax.jit, static_argnames="args")
def act(args, state, observations, seeds, ages):
    """Chunks of actions for all agents: (N, E, S) -> (N, E, H, d). The noise depends on nothing
    but the episode's seed and age in steps, (N, E) each."""

    def one(state, observation, seed, age):
        key = jax.random.fold_in(jax.random.PRNGKey(seed), age)
        actions = sample_actions(args, state, observation[None], key)
        return actions.reshape(args.chunk_length, args.action_size)

    return over_agents(jax.vmap(one, (None, 0, 0, 0)))(state, observations, seeds, ages)


def sample_halves(key, args, data, replay, task):
    """Half of a batch from the dataset, half from the replay of one agent.  # Eq. (RLPD1)"""
    keys, sizes = jax.random.split(key), (args.batch_size // 2, args.chunk_length, args.discount)
    empty = jax.tree.map(lambda x: x[:0] if x.ndim else 0 * x, replay)
    old = sample(keys[0], data, empty, task, *sizes)
    first = Dataset(  # `sample` asks for a dataset before the replay: the replay's first transition
        observations=jnp.stack([replay.observations[0], replay.next_observations[0]]),
        rows=jnp.zeros(1, jnp.int32),
        actions=replay.actions[:1],
        rewards=replay.rewards[None, :1],
        masks=replay.masks[None, :1],
        terminals=replay.terminals[:1],
    )
    rest = jax.tree.map(lambda x: x[1:] if x.ndim else x - 1, replay)
    new = sample(keys[1], first, rest, 0, *sizes)
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), old, new)


@partial(jax.jit, static_argnames="args", donate_argnames="state")
def train_chunk(args, state, data, replay, task, updates):
    """`updates` gradient steps of all agents without leaving the device. `state`, `replay` and
    `task` (row of data.rewards) have a leading axis N. Returns the state and the sums of the
    metrics over the updates."""

    def one(state, replay, task):
        def step(state):
            key, batch_key = jax.random.split(state.key)
            batch = sample_halves(batch_key, args, data, replay, task)
            return update(args, state.replace(key=key), batch)

        def body(_, carry):
            state, metrics = step(carry[0])
            return state, jax.tree.map(jnp.add, carry[1], metrics)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(step, state)[1])
        return jax.lax.fori_loop(0, updates, body, (state, zeros))

    return over_agents(one)(state, replay, task)


# --- end forked ---

# --- forked: evaluate and main (no offline phase, random first actions) --------------------------


def evaluate(args, policy, pool, agents, step):
    """Exactly args.eval_episodes episodes of every agent, seeded by (seed, task, step, episode):
    the same for every method. Returns (N, episodes) arrays, see `EnvPool.play`."""
    episodes = range(args.eval_episodes)
    seeds = [[seed_of(seed, task, step, e) for e in episodes] for task, seed in agents]
    return pool.play(policy, np.array(seeds, np.uint32))


def main(args):
    """Trains all agents and leaves a run folder, see common/run.py. Returns its evaluations."""
    source = resolve(args.env)
    agents = ours([(task, args.seed + i) for task in args.tasks for i in range(args.num_seeds)])
    names = [f"{source.env}-singletask-task{task}-v0" for task, _ in agents]
    paths, N = locate(source, args.dataset_dir, args.collect), len(agents)
    shards = Shards(paths, source, args.tasks, args.sparse, args.chunk_length, N)
    data, _ = shards.at(0)
    args = dataclasses.replace(args, action_size=data.actions.shape[-1])
    files = dict(files=[path.name for path in paths], transitions=len(data.rows))
    run = Run(Path(__file__).stem, args, agents, files)
    keys = jnp.stack([jax.random.fold_in(jax.random.PRNGKey(seed), task) for task, seed in agents])
    state = jax.jit(jax.vmap(partial(create, args, data.observations.shape[-1])))(keys)
    task = jnp.array([args.tasks.index(task) for task, _ in agents])
    replay = Replay.create(N, args.online_steps, data)
    size = sum(x.size for x in jax.tree.leaves(state.params)) // N
    print(f"{N} agents of {size:,} parameters, {len(data.rows):,} transitions")

    def policy(*inputs):  # flat over agents and environments, for the pools
        inputs = [x.reshape(N, -1, *x.shape[1:]) for x in inputs]
        return np.concatenate(act(args, state, *inputs))

    # One uniform action in place of a chunk: the same distribution. Without the 1, age 0 would
    # repeat the reset's draws.
    def explore(_, seeds, ages):
        draw = lambda at: np.random.default_rng((*at, 1)).uniform(-1, 1, (1, args.action_size))
        return np.float32([draw(at) for at in zip(seeds, ages)])

    eval_pool = EnvPool(names, args.workers, min(args.eval_slots, args.eval_episodes))
    pool, everyone = EnvPool(names if args.online_steps else [], args.workers), range(N)
    shapes = jax.eval_shape(partial(train_chunk, args), state, data, replay, task, 0)[1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
    keep = lambda *means: dict(state=state, replay=replay, pool=pool.save(), means=means)
    done, saved = run.restore(keep(zeros, 0))
    state, replay = spread((saved["state"], saved.pop("replay")))
    pool.load(saved["pool"], np.asarray(replay.actions)[:, : int(replay.size[0])])

    @run.saved()
    def report(table):
        result = evaluate(args, policy, eval_pool, agents, done)
        scores = {name: x.mean(1) for name, x in result.items() if name != "path"}
        run.log(table, done, scores)
        bar.write(f"{done:,} updates: success {scores['success'].mean():.2f}")
        return result

    total, result, (sums, updates) = args.online_steps, None, saved["means"]
    halts = lambda: done == total or done % args.eval_interval == 0
    bar = tqdm(initial=done, total=total, unit="update", dynamic_ncols=True, disable=None)
    while run.last["eval"] < total and not args.eval_only:
        if run.last["eval"] < done and halts():
            result = report("eval")
            continue
        now = done + 1  # the environment step that every agent takes
        data, _ = shards.at(now)
        if now == 1:
            pool.start(everyone, [seed_of(seed, task, 0) for task, seed in agents])
        taken = pool.step(explore if now < args.start_training else policy, everyone)
        taken["rewards"] = -1.0 * (taken["rewards"] != 0) if args.sparse else taken["rewards"]
        replay = replay.append({name: x[:, None] for name, x in taken.items()})
        over = np.flatnonzero(taken["terminals"]).tolist()
        pool.start(over, [seed_of(*agents[i][::-1], now, TRAINING) for i in over])
        steps, trained = 1, int(now >= args.start_training)
        state, metrics = train_chunk(args, state, data, replay, task, trained)
        sums = jax.tree.map(jnp.add, sums, metrics)
        done, updates = done + steps, updates + trained
        bar.update(steps)
        if updates and (halts() or done % args.log_interval == 0):
            run.log("train", done, {name: value / updates for name, value in sums.items()})
            sums, updates = zeros, 0
        if halts() or run.stopping:
            run.save(done, keep(sums, updates))
    if args.eval_only:
        result = report("eval_only")
    bar.close()
    run.finish(done, total, result)
    return result


if __name__ == "__main__":
    main(parse(Args, ENV_DEFAULTS))
# --- end forked ---
