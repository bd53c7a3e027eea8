"""QSM: Q-Score Matching (Psenka et al., ICML 2024), with a diffusion loss as behaviour cloning and
with chunks of actions, as in the comparison of QAM (Li and Levine, ICLR 2026, arXiv:2601.14234).

A diffusion policy that samples exp(tau Q) would predict the noise from the score tau grad Q. QSM
regresses its prediction onto that gradient at noisy actions of the data. Offline this alone learns
nothing useful, so a second regression, onto the noise itself, is added. No gradient is
back-propagated through the denoising chain.

    x = sqrt(abar_i) a + sqrt(1 - abar_i) eps,  i ~ U{1..T},  eps ~ N(0, I)               Eq. (48)
    L(theta) = E[|-tau grad_x Q(s, x) - e_theta(s, x, i)|^2 / A                           Eq. (49)
                 + eta |eps - e_theta(s, x, i)|^2 / A]                               Eq. (50), (51)

The best prediction is the mean (eta E[eps | x] - tau grad_x Q(s, x)) / (eta + 1), so even at
tau = 0 the predicted noise is too small. Equation numbers are those of Li and Levine 2026, see
docs/methods/equations.md. docs/methods/qsm.md lists every difference between the papers, the
official QAM code and this file, which follows that code (`# ref:`). baselines/dac.py is the same
script except for the loss and the denoising step.

    python baselines/qsm.py                    the point maze, a few minutes on a CPU
    python baselines/qsm.py --env cube-double --tasks 1 2 3 4 5 --num-seeds 4 --ancestral

Shapes: B batch, S observation, H chunk length, d action, A = H d flattened chunk, T denoising
steps, K critics, N agents (tasks x seeds) trained at once.
"""

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # where common/ is
    from common.signals import quiet_imports

    quiet_imports()  # Ctrl-C ends the imports below without a traceback

import flax.linen as nn
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
from common.networks import Critic, Dense
from common.run import Run
from common.sampling import Batch, Dataset, Replay, sample


@dataclasses.dataclass(frozen=True)
class Args:
    """The flags of the script; their comments are the help texts."""

    # --- method ---
    # Inverse temperature tau, the weight of grad Q; 0 is behaviour cloning with too little noise.
    inv_temp: NonNegativeFloat = 1.0
    # Weight eta of the denoising loss on the data (behaviour cloning).
    bc_coef: NonNegativeFloat = 1.0
    # TD targets use the critics' mean minus this many standard deviations.
    pessimism: NonNegativeFloat = 0.5
    flow_steps: PositiveInt = 10  # Denoising steps T from noise to action.
    ancestral: bool = False  # Take the paper's denoising steps instead of the official code's.

    # --- networks and optimiser ---
    # Hidden-layer widths of all networks.
    hidden_dims: tuple[PositiveInt, ...] = (512, 512, 512, 512)
    num_critics: PositiveInt = 10  # Number of critics K in the ensemble.
    batch_size: PositiveInt = 256  # Batch size B, in chunks.
    lr: PositiveFloat = 3e-4  # Adam's learning rate.
    target_rate: UnitInterval = 0.005  # Step size of the moving averages (target networks).
    grad_clip: PositiveFloat = 1.0  # Global-norm threshold of gradient clipping.

    # --- shared: run arguments ---
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
    offline_steps: NonNegativeInt = 1_000_000  # Gradient updates on the dataset.
    # Environment steps after the offline phase (paper: 500,000).
    online_steps: NonNegativeInt = 0
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
    # --- end shared ---


# The temperatures and weights of the ten domains come from the launch script of the official QAM
# repository and from its paper. The point maze is not in the paper: its networks are small enough
# for a CPU (docs/methods/qsm.md).
ENV_DEFAULTS = {
    "antmaze-large": dict(inv_temp=10.0, bc_coef=10.0),
    "antmaze-giant": dict(inv_temp=10.0, bc_coef=10.0),
    "humanoidmaze-medium": dict(inv_temp=10.0, bc_coef=30.0),
    "humanoidmaze-large": dict(inv_temp=10.0, bc_coef=30.0),
    "scene": dict(inv_temp=3.0, bc_coef=30.0),
    "puzzle-3x3": dict(inv_temp=10.0, bc_coef=30.0),
    "puzzle-4x4": dict(inv_temp=10.0, bc_coef=1.0),
    "cube-double": dict(inv_temp=1.0, bc_coef=10.0),
    "cube-triple": dict(inv_temp=10.0, bc_coef=10.0),
    "cube-quadruple": dict(inv_temp=1.0, bc_coef=10.0),
    "pointmaze-medium": dict(
        inv_temp=3.0,
        bc_coef=10.0,
        discount=0.995,
        flow_steps=5,
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


@flax.struct.dataclass
class State:
    """Holds everything that an agent carries from update to update."""

    params: dict  # critic (phi), policy (theta)
    targets: dict  # moving average of critic
    opt_state: optax.OptState
    key: Array  # (2,) uint32: for the random numbers of the updates


def optimizer(args: Args) -> optax.GradientTransformation:
    """Returns Adam with a clipped gradient."""
    # ref: QAM's text clips elementwise; its code and its table clip the global norm.
    clip = optax.clip_by_global_norm(args.grad_clip)
    return optax.chain(clip, optax.adam(args.lr))


def create(args: Args, observation_size: int, key: Array) -> State:
    """Creates an agent. The policy has no target copy."""
    key, critic_key, policy_key = jax.random.split(key, 3)
    s = jnp.zeros((1, observation_size))
    a = jnp.zeros((1, args.chunk_length * args.action_size))
    params = dict(
        critic=Critic(args.hidden_dims, args.num_critics).init(critic_key, s, a),
        policy=NoisePredictor(args.hidden_dims).init(policy_key, s, a, 1),
    )
    targets = dict(critic=jax.tree.map(jnp.copy, params["critic"]))
    return State(params, targets, optimizer(args).init(params), key)


# --- the method ----------------------------------------------------------------------------------

# A network is built twice: in `create`, for its parameters, and where it is applied.


class NoisePredictor(nn.Module):
    """Computes e(s, x, i): (B, S), (B, A), step i that broadcasts to (B,) -> (B, A).

    Sines and cosines of i with trainable frequencies pass through an MLP of their own. The
    activation is Mish, without LayerNorm.
    """

    hidden: Sequence[int]

    @nn.compact
    def __call__(self, observations: Array, x: Array, i: Array) -> Array:
        # ref: i is the integer 1..T itself, not i / T
        frequencies = self.param("frequencies", nn.initializers.normal(0.2), (32,))
        steps = jnp.broadcast_to(i, x.shape[:-1])[..., None]
        angles = 2 * jnp.pi * steps * frequencies
        code = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
        for width in self.hidden[:-1]:
            code = jax.nn.mish(Dense(width)(code))
        code = Dense(self.hidden[-1])(code)  # linear
        y = jnp.concatenate([x, observations, code], -1)
        for width in self.hidden:
            y = jax.nn.mish(Dense(width)(y))
        return Dense(x.shape[-1])(y)


def critic(args: Args, params: dict, observations: Array, actions: Array) -> Array:
    """Evaluates the critics Q^1..Q^K: (B, S), (B, A) -> (K, B)."""
    return Critic(args.hidden_dims, args.num_critics).apply(params, observations, actions)


def predict_noise(args: Args, params: dict, observations: Array, x: Array, i: Array) -> Array:
    """Evaluates e(s, x, i): (B, S), (B, A), step i of (B,) or () -> (B, A)."""
    return NoisePredictor(args.hidden_dims).apply(params, observations, x, i)


def schedule(args: Args) -> tuple[Array, Array]:
    """Computes a variance-preserving schedule, whose noise rate rises from 0.1 to 10.

    Returns abar_i, the share of the action's variance that is left after step i, and beta_i, the
    variance that step i adds: (T + 1,) each, where i = 0 has 1 and 0.
    """
    T = args.flow_steps
    i = jnp.arange(1, T + 1)
    rise = (10 - 0.1) * (2 * i - 1) / (2 * T**2)
    beta = 1 - jnp.exp(-0.1 / T - rise)  # Eq. (47)
    beta = jnp.concatenate([jnp.zeros(1), beta])
    abar = jnp.cumprod(1 - beta)  # Eq. (48)
    return abar, beta


def denoise(
    args: Args, policy: dict, observations: Array, x: Array, i: Array, noise: Array
) -> Array:
    """Takes a denoising step from x_i to x_{i-1}: towards the action, with noise, into the box."""
    abar, beta = schedule(args)
    predicted = predict_noise(args, policy, observations, x, i)
    if args.ancestral:
        scale = beta[i] / jnp.sqrt(1 - abar[i])
        mean = (x - scale * predicted) / jnp.sqrt(1 - beta[i])
    else:  # ref: the code goes to the estimate of the action itself, in every step
        mean = (x - jnp.sqrt(1 - abar[i]) * predicted) / jnp.sqrt(abar[i])
    # The last step adds no noise.
    deviation = jnp.where(i > 1, jnp.sqrt(beta[i]), 0)
    return jnp.clip(mean + deviation * noise, -1, 1)  # Eq. (52)


def sample_actions(args: Args, state: State, observations: Array, key: Array) -> Array:
    """Denoises a = x_0 from x_T ~ N(0, I) in T steps: (B, S) -> (B, A) in [-1, 1]."""
    start_key, noise_key = jax.random.split(key)
    action_size = args.chunk_length * args.action_size
    start = jax.random.normal(start_key, (len(observations), action_size))
    noises = jax.random.normal(noise_key, (args.flow_steps, *start.shape))
    countdown = jnp.arange(args.flow_steps, 0, -1)

    def step(x, inputs):
        i, noise = inputs
        return denoise(args, state.params["policy"], observations, x, i, noise), None

    x, _ = jax.lax.scan(step, start, (countdown, noises))
    return x


# Losses are differentiated with respect to `params` only; `state` and `batch` are constants. Each
# returns its value and its metrics, whose names no other loss may use.


def critic_loss(
    args: Args, params: dict, state: State, batch: Batch, key: Array
) -> tuple[Array, dict]:
    """Computes the squared TD error of every critic against one pessimistic target."""
    # ref: a' comes from the current policy, not its average; std divides by K, not by K - 1.
    next_actions = sample_actions(args, state, batch.next_observations, key)
    next_q = critic(args, state.targets["critic"], batch.next_observations, next_actions)
    next_value = next_q.mean(0) - args.pessimism * next_q.std(0)  # Eq. (26)
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


def policy_loss(
    args: Args, params: dict, state: State, batch: Batch, key: Array
) -> tuple[Array, dict]:
    """Regresses onto the critic's gradient at noisy actions, and onto their noise."""
    step_key, noise_key = jax.random.split(key)
    i = jax.random.randint(step_key, batch.valid.shape, 1, args.flow_steps + 1)
    noise = jax.random.normal(noise_key, batch.actions.shape)
    abar_of_steps, _ = schedule(args)
    abar = abar_of_steps[i][:, None]
    x = jnp.sqrt(abar) * batch.actions + jnp.sqrt(1 - abar) * noise  # Eq. (48)

    def value(actions):  # ref: mean of the target critics; outside the box, too
        return critic(args, state.targets["critic"], batch.observations, actions).mean(0).sum()

    gradient = jax.grad(value)(x)
    predicted = predict_noise(args, params["policy"], batch.observations, x, i)
    errors = ((noise - predicted) ** 2).mean(-1)
    # ref: the official code raises an invalid sample's loss to the power 0: the same gradient.
    denoising = (batch.valid * errors).mean()  # Eq. (50)
    # ref: the code's sign; the paper prints +tau grad Q, which would lead downhill.
    score_errors = ((-args.inv_temp * gradient - predicted) ** 2).mean(-1)
    matching = (batch.valid * score_errors).mean()  # Eq. (49)
    loss = matching + args.bc_coef * denoising  # Eq. (51)
    metrics = dict(
        denoising_loss=denoising,
        matching_loss=matching,
        gradient_norm=jnp.linalg.norm(gradient, axis=-1).mean(),
        policy_loss=loss,
    )
    return loss, metrics


def update(args: Args, state: State, batch: Batch) -> tuple[State, dict]:
    """Takes one gradient step on the sum of the losses, and moves the target networks."""
    key, *keys = jax.random.split(state.key, 3)
    losses = [critic_loss, policy_loss]

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


# --- shared: many agents -------------------------------------------------------------------------

# The shared blocks are the same in all offline scripts; a tool keeps them in sync. They need
# `Args`, `State`, `create`, `update`, `sample_actions` and `ENV_DEFAULTS`. In a copy, edit them
# freely.


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


@partial(jax.jit, static_argnames="args")  # zero_metrics and train_chunk share one trace
def train_step(
    args: Args, data: Dataset, state: State, replay: Replay, task_row: Array
) -> tuple[State, dict]:
    """Makes one update of one agent, on chunks drawn uniformly from the dataset and its own replay
    together.

    `sample` returns a Batch with
    - observations (B, S), next_observations (B, S) H steps later, and actions (B, A),
    - rewards (B,), discounted and summed over the H steps,
    - masks (B,), 0 if the task is solved within the H steps, else 1,
    - valid (B,), 0 if the trajectory ends before the H steps do, else 1.
    """
    key, batch_key = jax.random.split(state.key)
    batch = sample(
        batch_key, data, replay, task_row, args.batch_size, args.chunk_length, args.discount
    )
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

    # Offline, a CPU trains one agent at a time, so that its caches hold just that agent's networks.
    offline = replay.rewards.size == 0  # in that phase, `main` passes a replay of capacity 0
    all_agents = over_agents(one_agent, agent_by_agent=offline)
    return all_agents(state, metrics, replay, task_rows)


# --- end shared ---

# --- shared: evaluate and main -------------------------------------------------------------------


def evaluate(args: Args, state: State, envs: EnvPool, agents: list, step: int) -> dict:
    """Plays exactly args.eval_episodes episodes with every agent.

    They are seeded by (seed, task, step, episode), the same for every method. Returns arrays
    (N, episodes), see `Episodes`.
    """
    seeds = [seeds_of(agents, step, i) for i in range(args.eval_episodes)]
    episodes = Episodes(envs, np.concatenate(seeds, axis=1))
    while episodes.running:
        if envs.need_actions():  # only slots whose chunk is used up take a new one
            envs.set_actions(act(args, state, envs.observations, envs.seeds, envs.ages))
        episodes.step()
    return episodes.results


def evaluate_if_due(args: Args, run: Run, state: State, envs: EnvPool, step: int) -> None:
    """Evaluates the agents if `run.log_and_save` or `run.restore` has set `run.evaluation_due`."""
    if run.evaluation_due and args.eval_episodes:
        results = evaluate(args, state, envs, run.agents, step)
        run.log_evaluation(step, results)


def main(args: Args) -> list[dict]:
    """Trains all agents, first on the dataset, then in their environments.

    In every iteration `run.log_and_save` does what is due. Every --log-interval steps it appends
    the means of `metrics` to train.csv and returns zeroed sums in their place. Every
    --eval-interval steps, and at the end of each phase, it saves a checkpoint and marks an
    evaluation as due. After a signal, such as Ctrl-C, it saves a checkpoint and exits. A stopped
    run continues from its last checkpoint. Returns the rows of eval.csv.
    """
    # An agent is a (task, seed) pair. All arrays but the data have a leading axis of agents.
    agents = [(task, args.seed + i) for task in args.tasks for i in range(args.num_seeds)]
    dataset = OfflineDataset(args, len(agents))
    sizes = dataset.observation_size, dataset.action_size
    args = dataclasses.replace(args, action_size=dataset.action_size)
    total_steps = args.offline_steps + args.online_steps
    ends = args.offline_steps, total_steps
    with Run(__file__, args, agents, dataset.identity, ends=ends) as run:
        # Set up. The replay is empty while offline; `metrics` are sums since the last logged row.
        state = create_agents(args, agents, dataset.observation_size)
        replay = Replay.create(len(agents), 0, *sizes)
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

        # Offline phase: a call makes updates for about a second, or until something is due.
        while step < args.offline_steps:
            data = dataset.at(step)  # the current shard of a 100M dataset, else all data
            updates = min(run.updates_until_due(step), dataset.updates_until_swap(step))
            state, metrics = train_chunk(args, state, metrics, data, replay, task_rows, updates)
            step = step + updates
            content = dict(state=state, envs=envs.save())  # saved with metrics and replay
            metrics = run.log_and_save(step, metrics, content, replay)
            evaluate_if_due(args, run, state, eval_envs, step)

        # Online phase: in each iteration every agent makes one environment step and, from
        # --start-training on, one update on the dataset and its replay.
        replay = Replay.create(len(agents), args.online_steps, *sizes)
        replay = replay.refill(saved["replay"])
        if step > args.offline_steps:  # play the interrupted episodes again
            actions = saved["replay"]["actions"]  # (N, steps, d), without the axis of slots
            envs.load(saved["envs"], actions[:, None])
        elif args.online_steps:
            envs.reset(seeds_of(agents, 0))  # seeds of step 0, which no evaluation uses
        while step < total_steps:
            if envs.need_actions():  # a chunk, played open loop, is used up or its episode ended
                envs.set_actions(act(args, state, envs.observations, envs.seeds, envs.ages))
            transitions = dataset.relabel(envs.step())  # rewards as those of the dataset
            replay = replay.append(transitions)
            env_step = step - args.offline_steps + 1
            ended = transitions["terminals"] > 0  # solved or timed out; `masks` tell which
            if ended.any():
                envs.reset(seeds_of(agents, env_step, TRAINING), where=ended)
            # `updates` is 0 at first. The program is still compiled in the first of these steps,
            # when nothing is unsaved yet and a signal can end the run at once.
            updates = 1 if env_step >= args.start_training else 0
            data = dataset.at(step)
            state, metrics = train_chunk(args, state, metrics, data, replay, task_rows, updates)
            step = step + 1
            content = dict(state=state, envs=envs.save())
            metrics = run.log_and_save(step, metrics, content, replay)
            evaluate_if_due(args, run, state, eval_envs, step)
        return run.finish()


if __name__ == "__main__":
    launch(main, Args, ENV_DEFAULTS)
# --- end shared ---
