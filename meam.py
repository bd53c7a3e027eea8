"""ME-AM: Maximum Entropy Adjoint Matching (Ghanem and Ghogho 2026, arXiv:2605.06156).

The optimum of QAM (Q-learning with Adjoint Matching), pi ~ pi_beta exp(tau Q), inherits two flaws
of the data: a good but rare action stays rare (popularity bias), and where pi_beta = 0 no
temperature helps (support binding). ME-AM trains the base flow on a mixture pi_mix (an expansion
actor replaces a share rho of the data's actions), and adds an entropy bonus to the adjoint's
terminal condition: the score of the policy's moving average, the anchor (v_k, pi_k). It converges
to

    pi(a|s) ~ pi_mix(a|s)^(w / (w + lambda)) exp(tau Q(s, a) / (w + lambda))              Eq. (16)
    g(1) = -tau grad_a Q(s, a) + lambda grad_a log pi_k(a|s)                              Eq. (14)
    v_ref = w v_beta + (1 - w) v_k                                                        Eq. (13)

lambda = 0, w = 1, rho = 0 is QAM. Equation numbers are the paper's; docs/methods/meam.md says where
paper, QAM's official code and this file differ (`# ref:`), and what no source states (*chosen*).

    python meam.py                               the point maze, a few minutes on a CPU
    python meam.py --env puzzle-4x4 --rho 0.5

Shapes: B batch, S observation, H chunk length, d action, A = H d flattened chunk, T flow steps,
K critics, N agents (tasks x seeds) trained at once.
"""

import dataclasses
from functools import partial

if __name__ == "__main__":
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
from common.networks import MLP, Critic, Field, TanhGaussian
from common.run import Run
from common.sampling import Batch, Dataset, Replay, sample


@dataclasses.dataclass(frozen=True)
class Args:
    """The flags of the script; their comments are the help texts."""

    # --- method ---
    rho: UnitInterval = 0.1  # Share of the base flow's targets that come from the expansion actor.
    # Weight lambda of the anchor's score, an entropy bonus: it flattens the base flow's density.
    entropy_scale: NonNegativeFloat = 0.01
    # Weight w of the base flow in the reference field; the rest goes to the anchor.
    path_weight: UnitInterval = 1.0
    # Smallest noise level of the score network, at which the score is evaluated.
    sigma_min: PositiveFloat = 0.1
    sigma_max: NonNegativeFloat = 1.0  # Largest noise level used in training.
    score_gate: bool = True  # Zero the score outside the action box, like the critic's gradient.
    # Ablation: sample the expansions, and limit the critic's gradient to norm 1.
    noisy_expansion: bool = False
    # Inverse temperature tau of exp(tau Q); with 0 only the expansion actor follows Q.
    inv_temp: NonNegativeFloat = 1.0
    # TD targets use the critics' mean minus this many standard deviations.
    pessimism: NonNegativeFloat = 0.5
    flow_steps: PositiveInt = 10  # Euler steps T from noise to action.

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

    def __post_init__(self):
        if self.sigma_min > self.sigma_max:
            raise UserError("--sigma-min is larger than --sigma-max; lower it or raise --sigma-max")


# *Chosen* (docs/methods/meam.md): tau is QAM's and lambda is tau / 100; the paper states rho for
# puzzle-4x4 only. The point maze is not in the paper: its values were tuned here, for small
# networks.
ENV_DEFAULTS = {
    "antmaze-large": dict(inv_temp=10.0, entropy_scale=0.1),
    "antmaze-giant": dict(inv_temp=3.0, entropy_scale=0.03),
    "humanoidmaze-medium": dict(inv_temp=3.0, entropy_scale=0.03),
    "humanoidmaze-large": dict(inv_temp=3.0, entropy_scale=0.03),
    "scene": dict(inv_temp=1.0),
    "puzzle-3x3": dict(inv_temp=3.0, entropy_scale=0.03),
    "puzzle-4x4": dict(
        rho=0.5,
        inv_temp=30.0,
        entropy_scale=0.3,
    ),
    "cube-double": dict(inv_temp=1.0),
    "cube-triple": dict(inv_temp=3.0, entropy_scale=0.03),
    "cube-quadruple": dict(inv_temp=1.0),
    "pointmaze-medium": dict(
        rho=0.02,
        inv_temp=0.3,
        discount=0.995,
        flow_steps=5,
        num_critics=2,
        lr=1e-3,
        hidden_dims=(128, 128),
        batch_size=128,
        target_rate=0.05,
        offline_steps=15_000,
        log_interval=1_000,
        eval_interval=5_000,
        eval_slots=50,
    ),
}


@flax.struct.dataclass
class State:
    """Holds everything that an agent carries from update to update."""

    params: dict  # critic (phi), behavior (beta), policy (theta), expansion (xi), score (psi), ...
    targets: dict  # moving averages of critic, behavior and policy (the anchor pi_k)
    opt_state: optax.OptState
    key: Array  # (2,) uint32: for the random numbers of the updates


def optimizer(args: Args) -> optax.GradientTransformation:
    """Returns Adam with gradient clipping."""
    # ref: QAM's text clips elementwise; its code and its table clip the global norm.
    clip = optax.clip_by_global_norm(args.grad_clip)
    return optax.chain(clip, optax.adam(args.lr))


def create(args: Args, observation_size: int, key: Array) -> State:
    """Creates an agent with the networks required by the flags.

    v_theta and v_beta start from different weights.
    """
    key, critic_key, behavior_key, policy_key = jax.random.split(key, 4)
    s = jnp.zeros((1, observation_size))
    a = jnp.zeros((1, args.chunk_length * args.action_size))
    params = dict(
        critic=Critic(args.hidden_dims, args.num_critics).init(critic_key, s, a),
        behavior=Field(args.hidden_dims).init(behavior_key, s, a, 0.0),
        policy=Field(args.hidden_dims).init(policy_key, s, a, 0.0),
    )
    averaged = ["critic", "behavior"]
    if args.entropy_scale > 0 or args.path_weight < 1:
        averaged.append("policy")
    targets = {name: jax.tree.map(jnp.copy, params[name]) for name in averaged}
    if args.rho > 0:
        actor = TanhGaussian(args.hidden_dims, a.shape[-1])
        params["expansion"] = actor.init(jax.random.fold_in(behavior_key, 1), s, a)
        params["log_alpha"] = jnp.zeros(())
    if args.entropy_scale > 0:
        network = MLP(args.hidden_dims, a.shape[-1], layer_norm=True)
        inputs = jnp.concatenate([s, a, jnp.zeros((1, 64))], axis=-1)
        params["score"] = network.init(jax.random.fold_in(policy_key, 1), inputs)
    opt_state = optimizer(args).init(params)
    return State(params, targets, opt_state, key)


# --- the method ----------------------------------------------------------------------------------

# A network is built twice: in `create`, for its parameters, and where it is applied.


def critic(args: Args, params: dict, observations: Array, actions: Array) -> Array:
    """Evaluates the critics Q^1..Q^K: (B, S), (B, A) -> (K, B)."""
    return Critic(args.hidden_dims, args.num_critics).apply(params, observations, actions)


def field(args: Args, params: dict, observations: Array, x: Array, t: Array) -> Array:
    """Evaluates a velocity field at (s, x, t).

    (B, S), (..., B, A) and a time that broadcasts to (..., B) -> (..., B, A).
    """
    return Field(args.hidden_dims).apply(params, observations, x, t)


def expansion(args: Args, params: dict, observations: Array, actions: Array) -> tuple[Array, Array]:
    """Evaluates the expansion actor pi_xi(.|s, a), a tanh-squashed Gaussian.

    (B, S), (B, A) -> mean and log std, (B, A) each. The actor also sees the data's action,
    because from the state alone it would collapse to a single mode.
    """
    return TanhGaussian(args.hidden_dims, actions.shape[-1]).apply(params, observations, actions)


def predict_noise(
    args: Args, params: dict, observations: Array, actions: Array, log_sigma: Array
) -> Array:
    """Predicts the noise eps in actions a + sigma eps: (B, S), (B, A), (B,) -> (B, A).

    The score of the noisy density is -eps / sigma. The network eps_psi sees 64 fixed sinusoids of
    log sigma.
    """
    angles = log_sigma[:, None] * jnp.geomspace(0.125, 8, 32)
    inputs = [observations, actions, jnp.sin(angles), jnp.cos(angles)]
    network = MLP(args.hidden_dims, actions.shape[-1], layer_norm=True)
    return network.apply(params, jnp.concatenate(inputs, axis=-1))


def integrate(args: Args, flow: dict, observations: Array, z: Array) -> Array:
    """Solves the flow's ODE from noise z by T Euler steps: (B, S), (B, A) -> (B, A) in [-1, 1]."""

    def euler(x, t):
        velocity = field(args, flow, observations, x, t)
        return x + velocity / args.flow_steps, None

    times = jnp.arange(args.flow_steps) / args.flow_steps
    x, _ = jax.lax.scan(euler, z, times)
    return jnp.clip(x, -1, 1)  # only here, not between the steps


def sample_actions(args: Args, state: State, observations: Array, key: Array) -> Array:
    """Samples a = ODE(v_theta; s, z) with z ~ N(0, I): (B, S) -> (B, A) in [-1, 1]."""
    # ref: if nothing tilts the flow, QAM's official code acts with v_beta.
    name = "policy" if args.inv_temp > 0 or args.entropy_scale > 0 else "behavior"
    z = jax.random.normal(key, (len(observations), args.chunk_length * args.action_size))
    return integrate(args, state.params[name], observations, z)


# Losses are differentiated with respect to `params` only; `state` and `batch` are constants. Each
# returns its value and its metrics, whose names no other loss may use.


def critic_loss(
    args: Args, params: dict, state: State, batch: Batch, key: Array
) -> tuple[Array, dict]:
    """Computes the squared TD error of every critic against one pessimistic target, as in QAM."""
    # ref: a' comes from the current policy, not its average; std divides by K, not by K - 1.
    next_actions = sample_actions(args, state, batch.next_observations, key)
    next_q = critic(args, state.targets["critic"], batch.next_observations, next_actions)
    next_value = next_q.mean(0) - args.pessimism * next_q.std(0)
    target = batch.rewards + args.discount**args.chunk_length * batch.masks * next_value
    q = critic(args, params["critic"], batch.observations, batch.actions)
    loss = (batch.valid * (q - target) ** 2).mean()
    metrics = dict(
        critic_loss=loss,
        q=q.mean(),
        q_std=q.std(0).mean(),
        target=target.mean(),
    )
    return loss, metrics


def expansion_loss(
    args: Args, params: dict, state: State, batch: Batch, key: Array
) -> tuple[Array, dict]:
    """Computes the soft actor-critic loss of pi_xi(.|s, a) and of its temperature alpha."""
    mean, log_std = expansion(args, params["expansion"], batch.observations, batch.actions)
    noise = jax.random.normal(key, mean.shape)
    u = mean + jnp.exp(log_std) * noise
    log_density = -0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)
    log_slope = 2 * (jnp.log(2) - u - jax.nn.softplus(-2 * u))  # log da/du of a = tanh(u)
    log_prob = log_density.sum(-1) - log_slope.sum(-1)
    actions = jnp.tanh(u)
    q = critic(args, state.params["critic"], batch.observations, actions)
    weighted = jnp.exp(state.params["log_alpha"]) * log_prob
    actor_loss = (weighted - q.mean(0)).mean()  # Eq. (9)
    entropy = -log_prob.mean()
    target_entropy = -0.5 * mean.shape[-1]
    alpha = jnp.exp(params["log_alpha"])
    alpha_loss = alpha * (jax.lax.stop_gradient(entropy) - target_entropy)  # Eq. (9), temperature
    move = jnp.abs(jnp.tanh(mean) - batch.actions).mean()
    metrics = dict(
        expansion_entropy=entropy,
        expansion_alpha=alpha,
        expansion_move=move,
    )
    return actor_loss + alpha_loss, metrics


def mixture(args: Args, state: State, batch: Batch, key: Array) -> Array:
    """Draws the base flow's targets: the data's actions or, with probability rho, expansions."""
    if args.rho == 0:
        return batch.actions
    # Not 0 or 1: behavior_loss splits the key, which may give fold_in(key, 0) and fold_in(key, 1).
    choice_key, noise_key = jax.random.split(jax.random.fold_in(key, 2))
    mean, log_std = expansion(args, state.params["expansion"], batch.observations, batch.actions)
    u = mean
    if args.noisy_expansion:
        u += jnp.exp(log_std) * jax.random.normal(noise_key, u.shape)
    replaced = jax.random.bernoulli(choice_key, args.rho, (len(u), 1))
    return jnp.where(replaced, jnp.tanh(u), batch.actions)  # Eq. (10); the paper's mode: tanh(mean)


def behavior_loss(
    args: Args, params: dict, state: State, batch: Batch, key: Array
) -> tuple[Array, dict]:
    """Computes the flow-matching loss of v_beta, with actions of the mixture as targets."""
    z_key, t_key = jax.random.split(key)
    actions = mixture(args, state, batch, key)
    z = jax.random.normal(z_key, actions.shape)
    t = jax.random.uniform(t_key, batch.valid.shape)
    x = (1 - t[:, None]) * z + t[:, None] * actions
    velocity = field(args, params["behavior"], batch.observations, x, t)
    errors = ((velocity - (actions - z)) ** 2).mean(-1)
    loss = (batch.valid * errors).mean()  # Eq. (2)
    return loss, dict(behavior_loss=loss)


def score_loss(
    args: Args, params: dict, state: State, batch: Batch, key: Array
) -> tuple[Array, dict]:
    """Computes the denoising loss on the anchor's actions ODE(v_k; s, z), log-uniform in sigma."""
    z_key, sigma_key, noise_key = jax.random.split(key, 3)
    z = jax.random.normal(z_key, batch.actions.shape)
    actions = integrate(args, state.targets["policy"], batch.observations, z)
    log_sigma = jax.random.uniform(
        sigma_key,
        batch.valid.shape,
        minval=jnp.log(args.sigma_min),
        maxval=jnp.log(args.sigma_max),
    )
    noise = jax.random.normal(noise_key, actions.shape)
    noisy = actions + jnp.exp(log_sigma)[:, None] * noise
    predicted = predict_noise(args, params["score"], batch.observations, noisy, log_sigma)
    errors = (predicted - noise) ** 2
    loss = errors.mean()  # Eq. (15), mean over the coordinates: *chosen*
    return loss, dict(score_loss=loss)


def weighted_score(args: Args, state: State, observations: Array, actions: Array) -> Array:
    """Estimates lambda grad_a log pi_k(a|s) at noise level sigma_min: (B, S), (B, A) -> (B, A).

    With --score-gate, components outside of the action box are 0.
    """
    if args.entropy_scale == 0:
        return jnp.zeros_like(actions)
    query = actions
    weight = args.entropy_scale
    if args.score_gate:
        query = jnp.clip(actions, -1, 1)
        weight = jnp.where(jnp.abs(actions) <= 1, args.entropy_scale, 0.0)
    log_sigma = jnp.full(len(actions), jnp.log(args.sigma_min))
    noise = predict_noise(args, state.params["score"], observations, query, log_sigma)
    score = -noise / args.sigma_min
    return score * weight


def adjoint_matching_loss(
    args: Args, params: dict, state: State, batch: Batch, key: Array
) -> tuple[Array, dict]:
    """Regresses the policy's flow onto the target velocity given by the lean adjoint.

    Only this regression sees `params`; the SDE and the whole adjoint see `state`.
    ref: this loss is not masked by `batch.valid`.
    """
    s = batch.observations
    T = args.flow_steps
    dt = 1 / T
    times = jnp.arange(T) / T
    sigmas = jnp.sqrt(2 * (1 - times + dt) / (times + dt))  # ref: 2 (1 - t) / t is infinite at 0

    def reference(x, t):
        base = field(args, state.targets["behavior"], s, x, t)
        if args.path_weight == 1:
            return base
        anchor = field(args, state.targets["policy"], s, x, t)
        return args.path_weight * base + (1 - args.path_weight) * anchor  # Eq. (13)

    def forward(x, step):
        t, sigma, noise = step
        velocity = field(args, state.params["policy"], s, x, t)
        drift = 2 * velocity - x / (t + dt)
        next_x = x + dt * drift + jnp.sqrt(dt) * sigma * noise  # Eq. (3)
        return next_x, x

    start_key, noise_key = jax.random.split(key)
    x = jax.random.normal(start_key, batch.actions.shape)
    noise = jax.random.normal(noise_key, (T - 1, *x.shape))
    steps = times[:-1], sigmas[:-1], noise
    x, path = jax.lax.scan(forward, x, steps)
    path = jnp.concatenate([path, x[None]])  # (T, B, A): x_0 .. x_{T-1}
    # ref: the last step is an Euler step of the reference flow.
    end = x + dt * reference(x, times[-1])

    def value(actions):  # ref: mean of the target critics; no gradient outside the box
        clipped = jnp.clip(actions, -1, 1)
        return critic(args, state.targets["critic"], s, clipped).mean(0).sum()

    gradient = jax.grad(value)(end)
    if args.noisy_expansion:  # the ablation also limits the norm of the critic's gradient to 1
        length = jnp.linalg.norm(gradient, axis=-1, keepdims=True)
        gradient /= jnp.maximum(1, length)
    tilt = args.inv_temp * gradient
    score = weighted_score(args, state, s, end)
    terminal_adjoint = score - tilt  # Eq. (14)

    def backward(adjoint, step):
        x, t = step

        def drift(x):  # ref: the field of time t + dt at the state of time t
            return 2 * reference(x, t + dt) - x / (t + dt)

        _, vjp = jax.vjp(drift, x)
        adjoint += dt * vjp(adjoint)[0]  # Eq. (5)
        return adjoint, adjoint

    _, adjoint = jax.lax.scan(backward, terminal_adjoint, (path, times), reverse=True)  # (T, B, A)

    t = times[:, None]
    sigma = sigmas[:, None, None]
    control = 2 * (field(args, params["policy"], s, path, t) - reference(path, t)) / sigma
    errors = control + sigma * adjoint
    loss = (errors**2).sum((0, 2)).mean()  # Eq. (6); ref: sums over time and coordinates, no dt

    def norm(vectors):
        return jnp.linalg.norm(vectors, axis=-1).mean()

    metrics = dict(
        adjoint_loss=loss,
        outside=(jnp.abs(end) > 1).mean(),
        tilt_norm=norm(tilt),
        score_norm=norm(score),
        adjoint_norm=norm(adjoint[0]),
    )
    metrics["score_ratio"] = metrics["score_norm"] / jnp.maximum(metrics["tilt_norm"], 1e-8)
    return loss, metrics


def update(args: Args, state: State, batch: Batch) -> tuple[State, dict]:
    """Takes one gradient step on the sum of the losses, and moves the target networks."""
    key, *keys = jax.random.split(state.key, 4)
    losses = [critic_loss, behavior_loss, adjoint_matching_loss]
    if args.rho > 0:
        losses.append(expansion_loss)
    if args.entropy_scale > 0:
        losses.append(score_loss)
    # The first three losses draw the same numbers as in qam.py; the rest fold their keys.
    for i in range(3, len(losses)):
        keys.append(jax.random.fold_in(keys[0], i - 2))

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
