"""ReBRAC: Revisited Behavior-Regularized Actor-Critic (Tarasov et al., NeurIPS 2023), as the
baseline of QAM (Li and Levine, ICLR 2026, arXiv:2601.14234), whose numbers and code it follows.

A deterministic policy pi(s) ascends the critic and is held near the data by a squared distance: TD3
(Fujimoto et al., ICML 2018) with behaviour cloning. Dividing the value by its mean size makes one
alpha fit all scales of reward. There is no generative model: where the data act in several ways at
a state, the penalty pulls towards their mean.

    a' = clip(pi_bar(s') + clip(sigma xi, -c, c), -1, 1),   xi ~ N(0, I)              Eq. (ReBRAC1)
    L(pi) = - <Q(s, pi(s))> / <|Q(s, pi(s))|> + alpha <|pi(s) - a|^2>                 Eq. (ReBRAC2)

Plain equation numbers are those of Li and Levine 2026; numbers with letters are ours, see
docs/equations.md. docs/rebrac.md lists what differs from the original ReBRAC (`# ref:`).

    python baselines/rebrac.py                 the point maze, small networks
    python baselines/rebrac.py --env cube-double --tasks 1 2 3 4 5 --num-seeds 4

Shapes: B batch, S observation, H chunk length, d action, A = H d flattened chunk, K critics,
N agents (tasks x seeds) trained at once.
"""

import dataclasses
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # `python baselines/x.py` finds common/ next to baselines/
    sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import Array
from tqdm import tqdm

from common.data import Batch, Replay, Shards, locate, over_agents, sample, spread
from common.envs import TRAINING, EnvPool, resolve, seed_of
from common.flags import NonNegativeFloat, PositiveFloat, PositiveInt, UnitInterval
from common.networks import MLP, Critic
from common.run import Precision, Run, ours, parse


@dataclasses.dataclass(frozen=True)
class Args:
    # --- method ---
    # Weight alpha of behaviour cloning; the normalised value has weight 1.
    rebrac_alpha: NonNegativeFloat = 0.01
    # Standard deviation sigma of the noise on all actions, also in evaluations.
    actor_noise: NonNegativeFloat = 0.0
    noise_clip: NonNegativeFloat = 0.5  # Largest noise c.
    target_delay: PositiveInt = 2  # Updates between two moves of the target networks.
    # A target is the mean minus this many standard deviations of the critics.
    pessimism: NonNegativeFloat = 0.5

    # --- networks and optimiser ---
    # Hidden-layer widths of all networks.
    hidden_dims: tuple[PositiveInt, ...] = (512, 512, 512, 512)
    num_critics: PositiveInt = 10  # Number of critics K in the ensemble.
    batch_size: PositiveInt = 256  # Batch size B, in chunks.
    lr: PositiveFloat = 3e-4  # Adam's learning rate.
    target_rate: UnitInterval = 0.005  # Step size of the moving averages (target networks).

    # --- shared: run arguments ---
    env: str = "pointmaze-medium"  # short name (puzzle-4x4), dataset or full OGBench name
    tasks: tuple[int, ...] = (1,)  # tasks 1..5, trained at once on one copy of the data
    seed: int = 0  # first seed; an agent does not depend on those trained beside it
    num_seeds: int = 1  # seeds per task: seed, seed + 1, ...
    name: str = "default"  # of the run's folder runs/<script>/<env>/<name>
    run_dir: str = "runs"  # where the folders of all runs are
    dataset_dir: str = ""  # OGBench's files or 100M shards (default: OGBench's cache, then data/)
    collect: int = 0  # make a missing dataset: transitions of OGBench's scripted expert
    offline_steps: int = 1_000_000  # gradient updates on the dataset
    online_steps: int = 0  # then environment steps, each with an update (paper: 500,000)
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
    # --- end shared ---


# The weights alpha and deviations sigma of the ten domains come from the launch script of the
# official QAM repository. The point maze is not in the paper: its networks are small enough for a
# CPU (docs/rebrac.md).
ENV_DEFAULTS = {
    "antmaze-large": dict(rebrac_alpha=0.01, actor_noise=0.0),
    "antmaze-giant": dict(rebrac_alpha=0.01, actor_noise=0.0),
    "humanoidmaze-medium": dict(rebrac_alpha=0.01, actor_noise=0.0),
    "humanoidmaze-large": dict(rebrac_alpha=0.01, actor_noise=0.1),
    "scene": dict(rebrac_alpha=0.03, actor_noise=0.0),
    "puzzle-3x3": dict(rebrac_alpha=0.1, actor_noise=0.0),
    "puzzle-4x4": dict(rebrac_alpha=0.01, actor_noise=0.2),
    "cube-double": dict(rebrac_alpha=0.01, actor_noise=0.0),
    "cube-triple": dict(rebrac_alpha=0.01, actor_noise=0.2),
    "cube-quadruple": dict(rebrac_alpha=0.01, actor_noise=0.2),
    "pointmaze-medium": dict(
        rebrac_alpha=0.003,
        actor_noise=0.0,
        discount=0.995,
        num_critics=2,
        lr=1e-3,
        hidden_dims=(128, 128),
        batch_size=128,
        target_rate=0.01,
        offline_steps=15_000,
        log_interval=1_000,
        eval_interval=5_000,
        eval_slots=50,
    ),
}


class Actor(nn.Module):
    """Computes the deterministic policy tanh(MLP(s)): (B, S) -> (B, out).

    Its last kernel starts at a tenth of the usual deviation, so that all first actions are near 0.
    """

    hidden: tuple[int, ...]
    out: int

    @nn.compact
    def __call__(self, observations: Array) -> Array:
        features = MLP(self.hidden[:-1], self.hidden[-1])(observations)
        small = nn.initializers.variance_scaling(0.01, "fan_avg", "uniform")
        u = nn.Dense(self.out, kernel_init=small)(nn.gelu(features))
        return jnp.tanh(u)


@flax.struct.dataclass
class State:
    """Holds everything that an agent carries from update to update."""

    params: dict  # critic (phi), actor (pi)
    targets: dict  # moving averages of both
    opt_state: optax.OptState
    key: Array  # (2,) uint32


def optimizer(args: Args) -> optax.GradientTransformation:
    """Returns Adam."""
    return optax.adam(args.lr)


def create(args: Args, observation_size: int, key: Array) -> State:
    """Creates an agent."""
    key, critic_key, actor_key = jax.random.split(key, 3)
    s = jnp.zeros((1, observation_size))
    a = jnp.zeros((1, args.chunk_length * args.action_size))
    params = dict(
        critic=Critic(args.hidden_dims, args.num_critics).init(critic_key, s, a),
        actor=Actor(args.hidden_dims, a.shape[-1]).init(actor_key, s),
    )
    targets = jax.tree.map(jnp.copy, params)
    return State(params, targets, optimizer(args).init(params), key)


# --- the method ----------------------------------------------------------------------------------


def critic(args: Args, params: dict, observations: Array, actions: Array) -> Array:
    """Evaluates the critics Q^1..Q^K: (B, S), (B, A) -> (K, B)."""
    return Critic(args.hidden_dims, args.num_critics).apply(params, observations, actions)


def actor(args: Args, params: dict, observations: Array) -> Array:
    """Evaluates pi(s): (B, S) -> (B, A) in [-1, 1]."""
    network = Actor(args.hidden_dims, args.chunk_length * args.action_size)
    return network.apply(params, observations)


def perturb(args: Args, actions: Array, key: Array) -> Array:
    """Adds clipped Gaussian noise to actions: (B, A) -> (B, A) in [-1, 1]."""
    noise = args.actor_noise * jax.random.normal(key, actions.shape)
    noise = jnp.clip(noise, -args.noise_clip, args.noise_clip)
    return jnp.clip(actions + noise, -1, 1)


def sample_actions(args: Args, state: State, observations: Array, key: Array) -> Array:
    """Computes pi(s) and adds noise: (B, S) -> (B, A) in [-1, 1]."""
    # ref: the official code keeps the noise in evaluations, too.
    actions = actor(args, state.params["actor"], observations)
    return perturb(args, actions, key)


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
    # ref: no penalty |a' - a'_data|^2 in the target, which the original ReBRAC has.
    next_actions = actor(args, state.targets["actor"], batch.next_observations)
    next_actions = perturb(args, next_actions, key)  # Eq. (ReBRAC1)
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
    """Computes the negative normalised value of pi(s) plus its squared distance from the data."""
    actions = actor(args, params["actor"], batch.observations)
    q = critic(args, state.params["critic"], batch.observations, actions)
    value = pessimistic(args, q)  # ref: here as well, where other baselines take the mean
    value_size = jax.lax.stop_gradient(jnp.abs(value).mean())
    # ref: a sum over coordinates; `valid` masks the distance only.
    errors = ((actions - batch.actions) ** 2).sum(-1)
    distance = (batch.valid * errors).mean()
    loss = -value.mean() / value_size + args.rebrac_alpha * distance  # Eq. (ReBRAC2)
    metrics = dict(
        actor_loss=loss,
        actor_q=value.mean(),
        bc=distance,
        saturated=(jnp.abs(actions) > 0.99).mean(),
    )
    return loss, metrics


def update(args: Args, state: State, batch: Batch) -> tuple[State, dict]:
    """Makes one gradient step on the sum of all losses, all at the parameters before the step.

    Every `target_delay`-th step moves the targets.
    """
    key, *keys = jax.random.split(state.key, 3)
    losses = [critic_loss, actor_loss]

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
    # ref: the delay is the targets' only; the papers' text says that it is the actor's.
    # ref: the targets move towards the parameters from before this step.
    moved = optax.incremental_update(state.params, state.targets, args.target_rate)
    count = optax.tree_utils.tree_get(opt_state, "count")  # of updates, with this one
    targets = optax.periodic_update(moved, state.targets, count, args.target_delay)  # Eq. (ReBRAC3)
    return State(params, targets, opt_state, key), metrics


# --- shared: many agents -------------------------------------------------------------------------


@partial(jax.jit, static_argnames="args")
def act(args, state, observations, seeds, ages):
    """Chunks of actions for all agents: (N, E, S) -> (N, E, H, d). The noise depends on nothing
    but the episode's seed and age in steps, (N, E) each."""

    def one(state, observation, seed, age):
        key = jax.random.fold_in(jax.random.PRNGKey(seed), age)
        actions = sample_actions(args, state, observation[None], key)
        return actions.reshape(args.chunk_length, args.action_size)

    return over_agents(jax.vmap(one, (None, 0, 0, 0)))(state, observations, seeds, ages)


@partial(jax.jit, static_argnames="args", donate_argnames="state")
def train_chunk(args, state, data, replay, task, updates):
    """`updates` gradient steps of all agents without leaving the device. `state`, `replay` and
    `task` (row of data.rewards) have a leading axis N. Returns the state and the sums of the
    metrics over the updates."""

    def one(state, replay, task):
        def step(state):
            key, batch_key = jax.random.split(state.key)
            sizes = args.batch_size, args.chunk_length, args.discount
            batch = sample(batch_key, data, replay, task, *sizes)
            return update(args, state.replace(key=key), batch)

        def body(_, carry):
            state, metrics = step(carry[0])
            return state, jax.tree.map(jnp.add, carry[1], metrics)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(step, state)[1])
        return jax.lax.fori_loop(0, updates, body, (state, zeros))

    return over_agents(one, chunk=not replay.rewards.size)(state, replay, task)


# --- end shared ---

# --- shared: evaluate and main -------------------------------------------------------------------


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
    replay = Replay.create(N, 0, data)
    size = sum(x.size for x in jax.tree.leaves(state.params)) // N
    print(f"{N} agents of {size:,} parameters, {len(data.rows):,} transitions")

    def policy(*inputs):  # flat over agents and environments, for the pools
        inputs = [x.reshape(N, -1, *x.shape[1:]) for x in inputs]
        return np.concatenate(act(args, state, *inputs))

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

    total, result, (sums, updates) = args.offline_steps + args.online_steps, None, saved["means"]
    halts = lambda: done in (args.offline_steps, total) or done % args.eval_interval == 0
    bar = tqdm(initial=done, total=total, unit="update", dynamic_ncols=True, disable=None)
    while run.last["eval"] < total and not args.eval_only:
        if run.last["eval"] < done and halts():
            result = report("eval")
            continue
        if done < args.offline_steps:
            data, stays = shards.at(done + 1)
            limit = min(n - done % n for n in (args.log_interval, args.eval_interval))
            steps = trained = min(limit, stays, args.offline_steps - done)
        else:
            now = done - args.offline_steps + 1  # the environment step that every agent takes
            data, _ = shards.at(now, args.offline_steps // shards.interval)
            if replay.rewards.shape[1] < args.online_steps:
                replay = spread(Replay.create(N, args.online_steps, data))
            if now == 1:
                pool.start(everyone, [seed_of(seed, task, 0) for task, seed in agents])
            taken = pool.step(policy, everyone)
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
# --- end shared ---
