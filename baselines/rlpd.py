"""RLPD: Reinforcement Learning with Prior Data (Ball et al., ICML 2023), as the baseline of QAM (Li
and Levine, ICLR 2026, arXiv:2601.14234), whose numbers and code it follows.

It is a soft actor-critic from scratch. There is no offline phase; one half of every batch comes
from the dataset, the other from the agent's own transitions. A temperature holds the entropy of the
tanh-Gaussian policy at a target. QAM's authors add behaviour cloning; alpha = 0 leaves it out.

    batch = B/2 chunks of the dataset + B/2 chunks of the replay                        Eq. (RLPD1)
    L(pi) = <alpha_T log pi(a~|s) - Q(s, a~)>, a~ ~ pi(.|s)                             Eq. (RLPD2)
            - alpha <log pi(a|s)>                                                       Eq. (RLPD4)

Plain equation numbers are those of Li and Levine 2026; numbers with letters are ours, see
docs/methods/equations.md. docs/methods/rlpd.md lists what differs from the original RLPD
(`# ref:`).

    python baselines/rlpd.py                   the point maze, small networks
    python baselines/rlpd.py --env cube-double --tasks 1 2 3 4 5 --num-seeds 4

Shapes: B batch, S observation, H chunk length, d action, A = H d flattened chunk, K critics,
N agents (tasks x seeds) trained at once.
"""

import dataclasses
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # where common/ is
    from common.signals import quiet_imports

    quiet_imports()  # Ctrl-C ends the imports below without a traceback

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import Array

from common.datasets import OfflineDataset
from common.devices import over_agents, shard_over_agents, zero_metrics
from common.env_pool import EnvPool, Episodes
from common.environments import TRAINING, env_name, seeds_of
from common.errors import UserError
from common.flags import (
    NonNegativeFloat,
    NonNegativeInt,
    OnlineStep,
    PositiveFloat,
    PositiveInt,
    Precision,
    TaskNumber,
    Tracking,
    UnitInterval,
    launch,
)
from common.networks import Critic, TanhGaussian
from common.run import Run
from common.sampling import Batch, Dataset, Replay, sample


@dataclasses.dataclass(frozen=True)
class Args:
    """The flags of the script; their comments are the help texts."""

    # --- method ---
    # Weight alpha of behaviour cloning; the original RLPD has none (0).
    rlpd_alpha: NonNegativeFloat = 0.0
    # TD targets use the critics' mean minus this many standard deviations.
    pessimism: NonNegativeFloat = 0.5

    # --- networks and optimiser ---
    # Hidden-layer widths of all networks.
    hidden_dims: tuple[PositiveInt, ...] = (512, 512, 512, 512)
    num_critics: PositiveInt = 10  # Number of critics K in the ensemble.
    batch_size: PositiveInt = 256  # Batch size B, in chunks.
    lr: PositiveFloat = 3e-4  # Adam's learning rate.
    target_rate: UnitInterval = 0.005  # Step size of the moving averages (target networks).

    # --- forked: run arguments (no offline phase) ---
    # --- environment and data ---
    # OGBench environment (short, dataset or full name) or, with --dataset, any Gymnasium id.
    env: str = "pointmaze-medium"
    env_kwargs: str = ""  # Arguments of the environment as JSON, such as '{"frame_skip": 2}'.
    max_episode_steps: NonNegativeInt = 0  # Time limit of episodes (0: the environment's own).
    # Tasks 1 to 5, trained at once on one copy of the data (default: OGBench's own choice).
    tasks: tuple[TaskNumber, ...] = (1,)
    # Your own data instead of OGBench's: FILE.npz, FILE.hdf5 or minari:ID (docs/guides/data.md).
    dataset: str = ""
    # Folder with OGBench's file or its 100M shards (default: OGBench's cache, then data/).
    dataset_dir: str = ""
    # Transitions to collect with OGBench's scripted expert if the dataset is missing (0: none).
    collect: NonNegativeInt = 0
    chunk_length: PositiveInt = 5  # Number of actions H chosen at once and executed open loop.
    discount: UnitInterval = 0.99  # Discount factor gamma per environment step.
    # Reward -1 until the task is solved, instead of minus the number of unmet sub-goals.
    sparse: bool = False
    reward_scale: NonNegativeFloat = 1.0  # Factor on all rewards, of data and environments.
    reward_shift: float = 0.0  # Added to all rewards after scaling.
    # Shift and scale observations by the data's mean and standard deviation.
    normalize_observations: bool = False
    action_size: tyro.conf.Suppress[int] = 0  # Size d of an action; not a flag, read from the data.
    # --- run ---
    # First seed: of weights, batches, noise and episodes. An agent's results do not depend on which
    # others are trained with it.
    seed: NonNegativeInt = 0
    num_seeds: PositiveInt = 1  # Seeds per task: seed, seed + 1, ...
    online_steps: NonNegativeInt = 500_000  # Environment steps, each followed by an update.
    start_training: OnlineStep = 5_000  # First environment step that is followed by an update.
    # Interval of evaluations and checkpoints, in steps (offline: updates, online: environment
    # steps).
    eval_interval: PositiveInt = 50_000
    eval_episodes: NonNegativeInt = 50  # Episodes per evaluation and agent (0: no evaluations).
    # Parallel evaluation environments per agent (fewer if all agents together would exceed 100).
    eval_slots: PositiveInt = 10
    eval_only: bool = False  # Evaluate the run's checkpoint and do nothing else.
    overwrite: bool = False  # Start over; the run's old folder is moved aside, not deleted.
    workers: NonNegativeInt = 0  # Environment processes (0: automatic, at most one per core).
    # Precision of matrix products (default: the device's, TF32 on NVIDIA GPUs). With bfloat16,
    # hidden layers are computed in bfloat16, too.
    precision: Precision = "default"
    # Folder of compiled programs; "none" keeps none (default: JAX's own setting, else
    # <run_dir>/.compiled).
    compile_cache: str = ""
    # --- logging ---
    # Run name, as in <run_dir>/<script>/<env>/<name> (default: the changed flags that affect
    # learning).
    name: str = ""
    run_dir: str = "runs"  # Folder of all runs.
    log_interval: PositiveInt = 5_000  # Steps between rows of train.csv (means over the updates).
    # Also log to tensorboard or wandb (Weights & Biases; --track alone means wandb).
    track: Tracking = ""
    wandb_project: str = ""  # W&B project (default: WANDB_PROJECT, else flow-policies).
    wandb_entity: str = ""  # W&B user or team (default: WANDB_ENTITY, else your own).
    wandb_group: str = ""  # W&B group of runs (default: WANDB_RUN_GROUP, else none).
    # --- end forked ---

    def __post_init__(self) -> None:
        if self.batch_size % 2:
            raise UserError("--batch-size must be even, because one half is from the dataset")
        if not self.online_steps:
            raise UserError("--online-steps must be greater than 0: there is no offline phase")
        if self.start_training < self.chunk_length:
            raise UserError("--start-training must be at least --chunk-length, to fill a chunk")


# The weights of behaviour cloning in the ten domains come from the launch script of the official
# QAM repository, which defines them, but does not pass them on (docs/methods/rlpd.md). The point
# maze is not in the paper: its networks are small enough for a CPU.
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
    key: Array  # (2,) uint32: for the random numbers of the updates


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

# A network is built twice: in `create`, for its parameters, and where it is applied.


def critic(args: Args, params: dict, observations: Array, actions: Array) -> Array:
    """Evaluates the critics Q^1..Q^K: (B, S), (B, A) -> (K, B)."""
    return Critic(args.hidden_dims, args.num_critics).apply(params, observations, actions)


def actor(args: Args, params: dict, observations: Array) -> tuple[Array, Array]:
    """Evaluates pi(.|s), a Gaussian before tanh: (B, S) -> mean, log std (B, A) each."""
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
    """Computes the pessimistic value of K critics, mean - pessimism * std: (K, B) -> (B,).

    Where all critics agree exactly (two often do), this std has gradient 0, whereas the square root
    in q.std(0) has no derivative.
    """
    deviation = optax.safe_norm(q - q.mean(0), 0.0, axis=0) / len(q) ** 0.5
    return q.mean(0) - args.pessimism * deviation  # Eq. (26)


# Losses are differentiated with respect to `params` only; `state` and `batch` are constants. Each
# returns its value and its metrics, whose names no other loss may use.


def critic_loss(
    args: Args, params: dict, state: State, batch: Batch, key: Array
) -> tuple[Array, dict]:
    """Computes the squared TD error of every critic against one pessimistic target."""
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
    """Takes one gradient step on the sum of the losses, and moves the target networks."""
    key, *keys = jax.random.split(state.key, 4)
    losses = [critic_loss, actor_loss, cloning_loss]

    def total_loss(params):
        total = 0.0
        metrics = {}
        for loss_fn, loss_key in zip(losses, keys, strict=True):
            loss, loss_metrics = loss_fn(args, params, state, batch, loss_key)
            total += loss
            metrics |= loss_metrics
        return total, metrics

    grads, metrics = jax.grad(total_loss, has_aux=True)(state.params)
    metrics["grad_norm"] = optax.global_norm(grads)
    updates, opt_state = optimizer(args).update(grads, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    # ref: the targets move towards the parameters from before this step.
    current = {name: state.params[name] for name in state.targets}
    targets = optax.incremental_update(current, state.targets, args.target_rate)
    return State(params, targets, opt_state, key), metrics


# --- forked: many agents (batches from two sources) -----------------------------------------------

# A fork of the block that offline scripts share. In a copy of this file, edit it freely.


def create_agents(args: Args, agents: list, observation_size: int) -> State:
    """Creates an agent for every (task, seed); all arrays get a leading agent axis."""
    keys = [jax.random.fold_in(jax.random.PRNGKey(seed), task) for task, seed in agents]
    return create_all(args, observation_size, jnp.stack(keys))


@partial(jax.jit, static_argnames=("args", "observation_size"))
def create_all(args: Args, observation_size: int, keys: Array) -> State:
    """Creates an agent for each of the keys, (N, 2)."""
    return jax.vmap(partial(create, args, observation_size))(keys)


@partial(jax.jit, static_argnames="args")
def act(args: Args, state: State, observations: Array, seeds: Array, ages: Array) -> Array:
    """Chooses chunks of actions for all agents: (N, slots, S) -> (N, slots, H, d).

    The noise depends only on the episode's seed and age in steps, (N, slots) each.
    """

    def act_once(state, observation, seed, age):
        key = jax.random.fold_in(jax.random.PRNGKey(seed), age)
        actions = sample_actions(args, state, observation[None], key)
        return actions.reshape(args.chunk_length, args.action_size)

    act_in_slots = jax.vmap(act_once, in_axes=(None, 0, 0, 0))
    # `over_agents` is `jax.vmap`, with the agents spread over the devices.
    return over_agents(act_in_slots)(state, observations, seeds, ages)


def take(replay: Replay, rows: slice, size: Array) -> Replay:
    """Returns the given rows of one agent's replay, as a replay of `size` transitions."""
    columns = {name: x[rows] for name, x in vars(replay).items() if name != "size"}
    return Replay(**columns, size=size)


def sample_halves(key: Array, args: Args, data: Dataset, replay: Replay, task_row: Array) -> Batch:
    """Draws half of a batch from the dataset and half from one agent's replay.  # Eq. (RLPD1)"""
    data_key, replay_key = jax.random.split(key)
    sizes = args.batch_size // 2, args.chunk_length, args.discount
    empty = take(replay, slice(0), 0 * replay.size)
    old = sample(data_key, data, empty, task_row, *sizes)
    # `sample` needs a dataset before the replay: it gets the replay's first transition.
    first = Dataset(
        observations=jnp.stack([replay.observations[0], replay.next_observations[0]]),
        rows=jnp.zeros(1, jnp.int32),
        actions=replay.actions[:1],
        rewards=replay.rewards[None, :1],
        masks=replay.masks[None, :1],
        terminals=replay.terminals[:1],
    )
    rest = take(replay, slice(1, None), replay.size - 1)
    new = sample(replay_key, first, rest, 0, *sizes)
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y]), old, new)


@partial(jax.jit, static_argnames="args")  # zero_metrics and train_chunk share one trace
def train_step(
    args: Args, data: Dataset, state: State, replay: Replay, task_row: Array
) -> tuple[State, dict]:
    """Makes one update of one agent on a batch from the data and its replay."""
    key, batch_key = jax.random.split(state.key)
    batch = sample_halves(batch_key, args, data, replay, task_row)
    state, metrics = update(args, state.replace(key=key), batch)
    return state, metrics | dict(updates=jnp.ones(()))  # the divisor of the means in train.csv


@partial(jax.jit, static_argnames="args", donate_argnames=("state", "metrics"))
def train_chunk(
    args: Args,
    state: State,
    metrics: dict,
    data: Dataset,
    replay: Replay,
    task_rows: Array,
    updates: int,
) -> tuple[State, dict]:
    """Performs `updates` updates of all agents without leaving the device.

    `state`, `metrics`, `replay` and `task_rows` (each agent's row of data.rewards) have a leading
    axis N. Adds the metrics of each update to `metrics`.
    """

    def one_agent(state, metrics, replay, task_row):
        def body(_, carry):
            state, sums = carry
            state, latest = train_step(args, data, state, replay, task_row)
            return state, jax.tree.map(jnp.add, sums, latest)

        return jax.lax.fori_loop(0, updates, body, (state, metrics))

    return over_agents(one_agent)(state, metrics, replay, task_rows)


# --- end forked ---

# --- forked: evaluate and main (no offline phase, random first actions) --------------------------


def evaluate(args: Args, state: State, envs: EnvPool, agents: list, step: int) -> dict:
    """Plays exactly args.eval_episodes episodes with every agent.

    They are seeded by (seed, task, step, episode), the same for every method. Returns arrays
    (N, episodes), see `Episodes`.
    """
    seeds = [seeds_of(agents, step, i) for i in range(args.eval_episodes)]
    episodes = Episodes(envs, np.concatenate(seeds, axis=1))
    while episodes.running:
        if envs.need_actions():
            envs.set_actions(act(args, state, envs.observations, envs.seeds, envs.ages))
        episodes.step()
    return episodes.results


def evaluate_if_due(args: Args, run: Run, state: State, envs: EnvPool, step: int) -> None:
    """Evaluates the agents if `run.log_and_save` or `run.restore` has set `run.evaluation_due`."""
    if run.evaluation_due and args.eval_episodes:
        results = evaluate(args, state, envs, run.agents, step)
        run.log_evaluation(step, results)


def main(args: Args) -> list[dict]:
    """Trains all agents in their environments, with the dataset next to the replay.

    After every step `run.log_and_save` does what is due. Every --log-interval steps it appends the
    means of `metrics` to train.csv and returns zeroed sums in their place. Every --eval-interval
    steps, and at the end, it saves a checkpoint and marks an evaluation as due. After a signal,
    such as Ctrl-C, it saves a checkpoint and exits. A stopped run continues from its last
    checkpoint. Returns the rows of eval.csv.
    """
    # An agent is a (task, seed) pair. All arrays but the data have a leading axis of agents.
    agents = [(task, args.seed + i) for task in args.tasks for i in range(args.num_seeds)]
    dataset = OfflineDataset(args, len(agents))
    sizes = dataset.observation_size, dataset.action_size
    args = dataclasses.replace(args, action_size=dataset.action_size)
    with Run(__file__, args, agents, dataset.identity, ends=(args.online_steps,)) as run:
        # Set up. `metrics` are sums over the updates since the last logged row.
        state = create_agents(args, agents, dataset.observation_size)
        replay = Replay.create(len(agents), args.online_steps, *sizes)
        task_rows = jnp.array([args.tasks.index(task) for task, _ in agents])
        metrics = zero_metrics(partial(train_step, args, dataset.at(0)), state, replay, task_rows)
        env_names = [env_name(args, task) for task, _ in agents]
        eval_envs = EnvPool(env_names, args.eval_slots, args.workers, dataset.normalization)
        envs = EnvPool(env_names, 1, args.workers, dataset.normalization)

        # Continue from the last checkpoint. `saved` is its content: state, metrics, envs, and the
        # replay's transitions so far. Without a checkpoint, it is what is passed here and an empty
        # replay.
        step, saved = run.restore(dict(state=state, metrics=metrics, envs=envs.save()))
        state, metrics = shard_over_agents((saved["state"], saved["metrics"]))
        # Due with --eval-only, or if the run stopped between a checkpoint and its evaluation.
        evaluate_if_due(args, run, state, eval_envs, step)
        if args.eval_only:
            return run.finish()
        replay = replay.refill(saved["replay"])
        if step > 0:  # play the interrupted episodes again
            actions = saved["replay"]["actions"]  # (N, steps, d), without the axis of slots
            envs.load(saved["envs"], actions[:, None])
        else:
            envs.reset(seeds_of(agents, 0))  # seeds of step 0, which no evaluation uses

        # Every agent makes one environment step and, from --start-training on, one update.
        while step < args.online_steps:
            env_step = step + 1
            training = env_step >= args.start_training
            if envs.need_actions():
                if training:  # a chunk of actions is played open loop
                    plans = act(args, state, envs.observations, envs.seeds, envs.ages)
                else:  # single actions, with the same distribution as uniform chunks
                    plans = envs.random_actions(args.action_size)
                envs.set_actions(plans)
            transitions = dataset.relabel(envs.step())  # rewards as those of the dataset
            replay = replay.append(transitions)
            ended = transitions["terminals"] > 0  # solved or timed out; `masks` tell which
            if ended.any():
                envs.reset(seeds_of(agents, env_step, TRAINING), where=ended)
            # `updates` is 0 at first. The program is still compiled in the first of these steps,
            # when nothing is unsaved yet and a signal can end the run at once.
            updates = 1 if training else 0
            data = dataset.at(step)
            state, metrics = train_chunk(args, state, metrics, data, replay, task_rows, updates)
            step = env_step
            content = dict(state=state, envs=envs.save())  # saved with metrics and replay
            metrics = run.log_and_save(step, metrics, content, replay)
            evaluate_if_due(args, run, state, eval_envs, step)
        return run.finish()


if __name__ == "__main__":
    launch(main, Args, ENV_DEFAULTS)
# --- end forked ---
