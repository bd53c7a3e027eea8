"""DPMD: Diffusion Policy Mirror Descent (Ma et al. 2025, arXiv:2502.00361).

Online, off-policy. The policy is a denoising diffusion over actions. One step of mirror descent,
pi_{k+1} ~ pi_k exp(Q / alpha), is a weighted regression: the policy's own actions (the best of M)
are noised and denoised again, weighted by exp(Q / alpha); no gradient passes through the chain.
Gaussian noise of size 0.1 alpha is added to actions in training, and alpha falls to where the
entropy of that noise meets a target: it depends on alpha alone, so this is a schedule.

    x_i = sqrt(abar_i) a + sqrt(1 - abar_i) eps,  eps ~ N(0, I)                       Eq. (DDPM1)
    L(theta) = E w |e_theta(s, x_i, i) - eps|^2 / d                                   Eq. (DDPM2)
    a = clip(best of M chains + 0.1 alpha xi),  w = exp(clip((Q - m) / sigma) / alpha)
                                                                               Eq. (DPMD1), (DPMD3)

Equation numbers are ours; (DDPM1) to (DDPM4) are the diffusion of Ho et al. 2020
(arXiv:2006.11239), written alike in qvpo.py and dipo.py. docs/methods/dpmd.md lists what differs
from the public code (`# ref:`).

    python baselines/dpmd.py                                   the plane with four goals, on a CPU
    python baselines/dpmd.py --env halfcheetah --num-seeds 5   five agents in one program

Shapes: B batch, S observation, d action, M candidates per state, T diffusion steps; arrays passed
to `act` and `train_chunk` have a leading axis of agents (seeds) trained at once.
"""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

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

from common.devices import keep_freed_memory, over_agents, shard_over_agents, zero_metrics
from common.env_pool import EnvPool, Episodes
from common.environments import TRAINING, env_name, env_sizes, resolve, seeds_of
from common.flags import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Precision,
    Range,
    StepOfRun,
    Tracking,
    UnitInterval,
    launch,
)
from common.networks import LECUN, Critic, TimedMLP, mish
from common.run import Run
from common.sampling import Replay


@dataclasses.dataclass(frozen=True)
class Args:
    """The flags of the script; their comments are the help texts."""

    # --- method ---
    reward_scale: NonNegativeFloat = 0.2  # Factor c on the rewards in the TD target.
    num_candidates: PositiveInt = 32  # Candidate actions M per state; the best one is used.
    diffusion_steps: PositiveInt = 20  # Diffusion steps T from noise to action.
    schedule: Literal["linear", "cosine"] = "linear"  # Schedule of the diffusion's noise.
    # Factor kappa of the linear schedule.
    beta_scale: Annotated[float, Range(0, 1, exclusive=True)] = 0.8
    start_scale: NonNegativeFloat = 0.5  # Standard deviation of the noise that chains start from.
    noise_scale: PositiveFloat = 0.1  # Standard deviation of the training noise at alpha = 1.
    alpha_init: PositiveFloat = 5.0  # Initial temperature alpha.
    alpha_lr: PositiveFloat = 7e-3  # Adam's learning rate of log alpha.
    alpha_steps: PositiveInt = 800  # Minimum number of alpha updates, spread over the run.
    # Target entropy H*/d of the training noise, per action dimension.
    noise_entropy: float = -0.9
    q_clip: NonNegativeFloat = 3.0  # Largest |(Q - m) / sigma| in a weight.
    q_rate: UnitInterval = 1e-3  # Step size of the running mean m and deviation sigma of Q.
    policy_delay: PositiveInt = 2  # Critic updates per update of the policy and averages.
    # Repeat two slips of the public code: its normalisation, and a second step of the critics.
    as_published: bool = False

    # --- networks and optimiser ---
    hidden_dims: tuple[PositiveInt, ...] = (256, 256, 256)  # Hidden-layer widths of all networks.
    batch_size: PositiveInt = 256  # Batch size B, in transitions.
    actor_lr: PositiveFloat = 3e-4  # Initial learning rate of the policy (Adam).
    # Final policy learning rate. The rate decays linearly between 25 % and 75 % of the updates.
    actor_lr_end: NonNegativeFloat = 3e-5
    critic_lr: PositiveFloat = 3e-4  # Learning rate of the critics (Adam).
    target_rate: UnitInterval = 0.005  # Step size of the moving averages of critics and policy.

    # --- shared: run arguments ---
    # --- environment ---
    # multigoal, kitchen-1|2|4|7, hopper, halfcheetah, walker2d, humanoid, online-ant-xy, or
    # the id of any Gymnasium environment (Ant-v5, my_package:MyEnv-v0).
    env: str = "multigoal"
    env_kwargs: str = ""  # Arguments of the environment as JSON, such as '{"frame_skip": 2}'.
    max_episode_steps: NonNegativeInt = 0  # Time limit of episodes (0: the environment's own).
    discount: UnitInterval = 0.99  # Discount factor gamma per environment step.
    action_size: tyro.conf.Suppress[int] = 0  # Size d of an action; not a flag, read from the env.
    # --- run ---
    # First seed: of weights, batches, noise and episodes. An agent's results do not depend on which
    # others are trained with it.
    seed: NonNegativeInt = 0
    num_seeds: PositiveInt = 1  # Agents trained at once: seed, seed + 1, ...
    total_steps: PositiveInt = 1_000_000  # Environment steps of every agent.
    # Initial steps with uniformly random actions and no updates.
    warmup_steps: StepOfRun = 10_000
    env_steps_per_update: StepOfRun = 1  # Environment steps per update.
    replay_size: PositiveInt = 1_000_000  # Capacity in transitions; the oldest are overwritten.
    eval_interval: PositiveInt = 10_000  # Interval of evaluations and checkpoints, in steps.
    eval_episodes: NonNegativeInt = 10  # Episodes per evaluation and agent (0: no evaluations).
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
    log_interval: PositiveInt = 1_000  # Steps between rows of train.csv (means over the updates).
    # Also log to tensorboard or wandb (Weights & Biases; --track alone means wandb).
    track: Tracking = ""
    wandb_project: str = ""  # W&B project (default: WANDB_PROJECT, else flow-policies).
    wandb_entity: str = ""  # W&B user or team (default: WANDB_ENTITY, else your own).
    wandb_group: str = ""  # W&B group of runs (default: WANDB_RUN_GROUP, else none).
    # --- end shared ---


# `Args` holds the values of docs/methods/dpmd.md. The values for the plane are tuned here, with
# small networks for a CPU.
ENV_DEFAULTS = {
    "multigoal": dict(
        total_steps=15_000,
        warmup_steps=1_000,
        reward_scale=0.1,
        num_candidates=8,
        actor_lr=1e-3,
        actor_lr_end=1e-3,
        critic_lr=1e-3,
        hidden_dims=(64, 64, 64),
        batch_size=32,
        log_interval=500,
        eval_interval=5_000,
        eval_episodes=100,
        eval_slots=100,
    ),
}


@flax.struct.dataclass
class State:
    """Holds everything that an agent carries from update to update."""

    params: dict  # critic (phi_1, phi_2), policy (theta)
    targets: dict  # moving averages: critic, and the policy that acts
    opt_state: dict  # of critic, policy and alpha
    log_alpha: Array  # (): logarithm of alpha, which scales weights and noise
    q_mean: Array  # (): m, running mean of Q
    q_std: Array  # (): sigma, running deviation of Q
    step: Array  # () int32: updates so far
    key: Array  # (2,) uint32: for the random numbers of the updates


def planned_updates(args: Args) -> int:
    """Returns the number of updates in the whole run, for the schedules."""
    steps = args.total_steps - args.warmup_steps
    return max(1, steps // args.env_steps_per_update)


def optimizers(args: Args) -> dict[str, optax.GradientTransformation]:
    """Makes one Adam for each network and for log alpha; the policy's rate decays from 25 to 75 %
    of its own updates."""
    steps = planned_updates(args) / args.policy_delay
    start = int(0.25 * steps)
    end = int(0.75 * steps)
    rate = optax.linear_schedule(args.actor_lr, args.actor_lr_end, max(1, end - start), start)
    return dict(
        critic=optax.adam(args.critic_lr),
        policy=optax.adam(rate),
        alpha=optax.adam(args.alpha_lr),
    )


def create(args: Args, observation_size: int, key: Array) -> State:
    """Creates a new agent."""
    key, critic_key, policy_key = jax.random.split(key, 3)
    observations = jnp.zeros((1, observation_size))
    actions = jnp.zeros((1, args.action_size))
    critics = Critic(args.hidden_dims, 2, layer_norm=False, activation=mish, kernel_init=LECUN)
    denoiser = TimedMLP(args.hidden_dims, scale_waves=True)
    params = dict(
        critic=critics.init(critic_key, observations, actions),
        policy=denoiser.init(policy_key, observations, actions, 0),
    )
    log_alpha = jnp.float32(np.log(args.alpha_init))
    trained = params | dict(alpha=log_alpha)
    opt_state = {name: adam.init(trained[name]) for name, adam in optimizers(args).items()}
    return State(
        params=params,
        targets=jax.tree.map(jnp.copy, params),
        opt_state=opt_state,
        log_alpha=log_alpha,
        q_mean=jnp.float32(0),
        q_std=jnp.float32(1),
        step=jnp.int32(0),
        key=key,
    )


# --- the method ----------------------------------------------------------------------------------

# A network is built twice: in `create`, for its parameters, and where it is applied.


def critic(args: Args, params: dict, observations: Array, actions: Array) -> Array:
    """Computes Q_1 and Q_2: (B, S), (..., B, d) -> (2, ..., B)."""
    critics = Critic(args.hidden_dims, 2, layer_norm=False, activation=mish, kernel_init=LECUN)
    return critics.apply(params, observations, actions)


def predict_noise(args: Args, params: dict, observations: Array, x: Array, i: Array) -> Array:
    """Computes e(s, x, i): (B, S), (..., B, d), steps i that broadcast to (..., B) ->
    (..., B, d)."""
    denoiser = TimedMLP(args.hidden_dims, scale_waves=True)
    return denoiser.apply(params, observations, x, i)


def noise_schedule(args: Args) -> tuple[np.ndarray, np.ndarray]:
    """Computes beta_i and abar_i of the steps i = 0 ... T - 1, from the action to noise: (T,) each.

    They are NumPy's float64, because abar_0 is near 1.
    """
    T = args.diffusion_steps
    if args.schedule == "linear":
        beta = args.beta_scale * np.linspace(1e-4, 0.999, T)  # Eq. (DDPM4)
    else:
        share = (np.arange(T + 1) / T + 0.008) / 1.008
        f = np.cos(share * np.pi / 2) ** 2
        beta = np.minimum(1 - f[1:] / f[:-1], 0.999)
    return beta, np.cumprod(1 - beta)


def denoise(
    args: Args, policy: dict, observations: Array, key: Array, count: int, noise: float = 1.0
) -> Array:
    """Draws actions by `count` chains per state: (B, S) -> (count, B, d) in [-1, 1].

    `noise` is a factor of the noise that each step adds.
    """
    beta, abar = noise_schedule(args)
    before = np.append(1.0, abar[:-1])  # abar_{i-1}
    signal = jnp.asarray(np.sqrt(abar))
    spread = jnp.asarray(np.sqrt(1 - abar))
    to_clean = jnp.asarray(beta * np.sqrt(before) / (1 - abar))
    to_x = jnp.asarray((1 - before) * np.sqrt(1 - beta) / (1 - abar))
    std = jnp.asarray(np.sqrt(beta * (1 - before) / (1 - abar)))  # 0 at i = 0
    keys = jax.random.split(key, args.diffusion_steps + 1)
    x = jax.random.normal(keys[-1], (count, len(observations), args.action_size))

    def step(x, inputs):
        i, key = inputs
        eps = predict_noise(args, policy, observations, x, i)
        clean = (x - spread[i] * eps) / signal[i]
        mean = to_clean[i] * jnp.clip(clean, -1, 1) + to_x[i] * x
        xi = jax.random.normal(key, x.shape)
        return mean + noise * std[i] * xi, None  # Eq. (DDPM3)

    inputs = jnp.arange(args.diffusion_steps), keys[:-1]
    x, _ = jax.lax.scan(step, args.start_scale * x, inputs, reverse=True)
    return jnp.clip(x, -1, 1)


def best(q: Array, actions: Array) -> Array:
    """Picks the action with the highest value: (M, B), (M, B, d) -> (B, d)."""
    index = q.argmax(0)[None, :, None]
    return jnp.take_along_axis(actions, index, 0)[0]


def choose(
    args: Args,
    state: State,
    policy: dict,
    observations: Array,
    key: Array,
    count: int,
    noise: float,
) -> Array:
    """Chooses the best of `count` actions, and adds noise: (B, S) -> (B, d) in [-1, 1].

    `noise` is a factor of the noise of training.
    """
    chain_key, noise_key = jax.random.split(key)
    actions = denoise(args, policy, observations, chain_key, count)
    q = critic(args, state.params["critic"], observations, actions).min(0)
    xi = jax.random.normal(noise_key, (len(observations), args.action_size))
    size = noise * args.noise_scale * jnp.exp(state.log_alpha)
    # ref: clipped after the noise, so that the replay holds what was executed
    return jnp.clip(best(q, actions) + size * xi, -1, 1)  # Eq. (DPMD1)


def sample_actions(args: Args, state: State, observations: Array, key: Array, mode: str) -> Array:
    """Chooses actions by the averaged policy: (B, S) -> (B, d) in [-1, 1]. "explore" (in training)
    adds noise, "best" does not; "single" (logged alongside) takes one chain per state, no noise."""
    count = 1 if mode == "single" else args.num_candidates
    noise = 1.0 if mode == "explore" else 0.0
    return choose(args, state, state.targets["policy"], observations, key, count, noise)


def critic_loss(
    args: Args, params: dict, state: State, batch: Replay, next_actions: Array
) -> tuple[Array, dict]:
    """Computes the squared TD error of both critics against one target; next_actions (B, d)."""
    next_q = critic(args, state.targets["critic"], batch.next_observations, next_actions)
    value = next_q.min(0)
    rewards = args.reward_scale * batch.rewards
    target = rewards + args.discount * batch.masks * value  # Eq. (DPMD2)
    q = critic(args, params, batch.observations, batch.actions)
    loss = ((q - target) ** 2).sum(0).mean()
    metrics = dict(critic_loss=loss, q=q.mean(), target=target.mean())
    return loss, metrics


def weigh(args: Args, state: State, q: Array) -> Array:
    """Computes weights, not normalised, of actions from their values: (B,) -> (B,)."""
    if args.as_published:  # ref: the public code lacks the brackets
        normal = q - state.q_mean / state.q_std
    else:
        normal = (q - state.q_mean) / state.q_std
    normal = jnp.clip(normal, -args.q_clip, args.q_clip)
    return jnp.exp(normal / jnp.exp(state.log_alpha))  # Eq. (DPMD3)


def policy_loss(
    args: Args,
    params: dict,
    state: State,
    observations: Array,
    actions: Array,
    weights: Array,
    key: Array,
) -> tuple[Array, dict]:
    """Computes the weighted loss of denoising actions, averaged over all components.

    observations (B, S), actions (..., B, d), weights (..., B).
    """
    step_key, noise_key = jax.random.split(key)
    i = jax.random.randint(step_key, weights.shape, 0, args.diffusion_steps)
    noise = jax.random.normal(noise_key, actions.shape)
    _, abar = noise_schedule(args)
    signal = jnp.asarray(np.sqrt(abar))[i][..., None]
    spread = jnp.asarray(np.sqrt(1 - abar))[i][..., None]
    x = signal * actions + spread * noise  # Eq. (DDPM1)
    error = (predict_noise(args, params, observations, x, i) - noise) ** 2
    loss = (weights[..., None] * error).mean()  # Eq. (DDPM2)
    return loss, dict(policy_loss=loss)


def alpha_gradient(args: Args, state: State) -> Array:
    """Computes d/d log alpha of log alpha (H - H*), where H, the entropy of the noise added in
    training, is held constant. It is linear in log alpha and depends on nothing else, so alpha
    takes the same path in every run."""
    log_std = jnp.log(args.noise_scale) + state.log_alpha
    entropy = log_std + 0.5 * float(np.log(2 * np.pi * np.e))  # per dimension
    return args.action_size * (entropy - args.noise_entropy)  # Eq. (DPMD4)


def descend(
    args: Args, state: State, name: str, loss: Callable, *inputs: Any
) -> tuple[State, dict]:
    """Takes one Adam step on a loss of params[name]; everything else is constant."""
    gradient = jax.grad(partial(loss, args), has_aux=True)
    grads, metrics = gradient(state.params[name], state, *inputs)
    updates, opt_state = optimizers(args)[name].update(grads, state.opt_state[name])
    new_params = optax.apply_updates(state.params[name], updates)
    state = state.replace(
        params=state.params | {name: new_params},
        opt_state=state.opt_state | {name: opt_state},
    )
    return state, metrics | {f"{name}_grad_norm": optax.global_norm(grads)}


def repeat_step(args: Args, before: State, state: State, *inputs: Any) -> State:
    """Takes a second Adam step of the critics with the gradient of the first one, at `before`."""
    gradient = jax.grad(partial(critic_loss, args), has_aux=True)
    grads, _ = gradient(before.params["critic"], before, *inputs)
    updates, opt_state = optimizers(args)["critic"].update(grads, state.opt_state["critic"])
    new_params = optax.apply_updates(state.params["critic"], updates)
    return state.replace(
        params=state.params | dict(critic=new_params),
        opt_state=state.opt_state | dict(critic=opt_state),
    )


def update(args: Args, state: State, batch: Replay) -> tuple[State, dict]:
    """Steps the critics. Every policy_delay-th update also steps the policy, on the actions of the
    TD target with weights from the critics' new values, and then the averages. At least alpha_steps
    updates, evenly spread over the run, also step alpha."""
    key, next_key, loss_key = jax.random.split(state.key, 3)

    # Update the critics.
    observations = batch.next_observations
    policy = state.params["policy"]
    actions = choose(args, state, policy, observations, next_key, args.num_candidates, 1.0)
    before = state
    state, metrics = descend(args, state, "critic", critic_loss, batch, actions)
    q = critic(args, state.params["critic"], observations, actions).min(0)
    weights = weigh(args, state, q)
    if args.as_published:  # ref: the public code applies the gradient twice
        state = repeat_step(args, before, state, batch, actions)

    # Update the policy and the averages: a step that is kept at every policy_delay-th update.
    after, more = descend(
        args, state, "policy", policy_loss, observations, actions, weights, loss_key
    )
    targets = optax.incremental_update(after.params, state.targets, args.target_rate)
    after = after.replace(targets=targets)
    step = state.step + 1
    state = optax.periodic_update(after, state, step, args.policy_delay)

    # Update alpha.
    old = dict(log_alpha=state.log_alpha, moments=state.opt_state["alpha"])
    adam = optimizers(args)["alpha"]
    change, moments = adam.update(alpha_gradient(args, state), old["moments"])
    new = dict(log_alpha=state.log_alpha + change, moments=moments)
    period = max(1, planned_updates(args) // args.alpha_steps)
    new = optax.periodic_update(new, old, step, period)

    # Update the statistics of Q.
    q_mean = state.q_mean + args.q_rate * (q.mean() - state.q_mean)  # Eq. (DPMD5)
    q_std = state.q_std + args.q_rate * (q.std() - state.q_std)

    metrics |= more
    metrics |= dict(
        alpha=jnp.exp(state.log_alpha),
        q_mean=state.q_mean,
        q_std=state.q_std,
        weight=weights.mean(),
        ess_share=weights.mean() ** 2 / (weights**2).mean(),
    )
    state = state.replace(
        opt_state=state.opt_state | dict(alpha=new["moments"]),
        log_alpha=new["log_alpha"],
        q_mean=q_mean,
        q_std=q_std,
        step=step,
        key=key,
    )
    return state, metrics


MODES = ("best", "single")  # Ways to choose evaluation actions; the first one is the method's.

# --- shared: many agents -------------------------------------------------------------------------

# The shared blocks are the same in all online scripts; a tool keeps them in sync. They need
# `Args`, `State`, `create`, `update`, `sample_actions`, `MODES` and `ENV_DEFAULTS`. In a copy, edit
# them freely.


def create_agents(args: Args, agents: list, observation_size: int) -> State:
    """Creates an agent for every (task, seed); all arrays get a leading agent axis."""
    keys = [jax.random.fold_in(jax.random.PRNGKey(seed), task) for task, seed in agents]
    return create_all(args, observation_size, jnp.stack(keys))


@partial(jax.jit, static_argnames=("args", "observation_size"))
def create_all(args: Args, observation_size: int, keys: Array) -> State:
    """Creates an agent for each of the keys, (N, 2)."""
    return jax.vmap(partial(create, args, observation_size))(keys)


@partial(jax.jit, static_argnames=("args", "mode"))
def act(
    args: Args, state: State, observations: Array, seeds: Array, ages: Array, mode: str
) -> Array:
    """Chooses actions for all agents: (agents, slots, S) -> (agents, slots, 1, d).

    The noise depends only on the episode's seed and age in steps, (agents, slots) each.
    """

    def act_once(state, observation, seed, age):
        key = jax.random.fold_in(jax.random.PRNGKey(seed), age)
        # The batch's axis, of length 1, serves as the axis of action chunks that `EnvPool` expects.
        return sample_actions(args, state, observation[None], key, mode)

    act_in_slots = jax.vmap(act_once, in_axes=(None, 0, 0, 0))
    # `over_agents` is `jax.vmap`, with the agents spread over the devices.
    return over_agents(act_in_slots)(state, observations, seeds, ages)


@partial(jax.jit, static_argnames="args")  # zero_metrics and train_chunk share one trace
def train_step(args: Args, state: State, replay: Replay) -> tuple[State, dict]:
    """Makes one update of one agent on transitions drawn uniformly from its replay.

    The batch is a Replay of B rows with
    - observations (B, S), next_observations (B, S), actions (B, d), rewards (B,),
    - masks (B,), 0 where the episode terminated, else 1, also at a time limit,
    - terminals (B,), 1 where the episode ended, by termination or at a time limit.
    """
    key, rows_key = jax.random.split(state.key)
    filled = jnp.minimum(replay.size, len(replay.rewards))  # `size` counts overwritten rows, too
    rows = jax.random.randint(rows_key, (args.batch_size,), 0, filled)
    columns = {name: x[rows] for name, x in vars(replay).items() if name != "size"}
    batch = replay.replace(**columns)
    state, metrics = update(args, state.replace(key=key), batch)
    return state, metrics | dict(updates=jnp.ones(()))  # the divisor of the means in train.csv


@partial(jax.jit, static_argnames="args", donate_argnames=("state", "metrics"))
def train_chunk(
    args: Args, state: State, metrics: dict, replay: Replay, updates: int
) -> tuple[State, dict]:
    """Performs `updates` updates of all agents without leaving the device.

    Adds the metrics of each update to `metrics`.
    """

    def body(_, carry):
        state, sums = carry
        state, latest = over_agents(partial(train_step, args))(state, replay)
        return state, jax.tree.map(jnp.add, sums, latest)

    return jax.lax.fori_loop(0, updates, body, (state, metrics))


# --- end shared ---

# --- shared: evaluate and main -------------------------------------------------------------------


def evaluate(args: Args, state: State, envs: EnvPool, agents: list, step: int) -> dict:
    """Plays exactly args.eval_episodes episodes with every agent, in each of the MODES.

    They are seeded by (seed, task, step, episode), the same for every method. Returns arrays
    (agents, episodes), see `Episodes`; results of other modes are prefixed with the mode.
    """
    seeds = [seeds_of(agents, step, i) for i in range(args.eval_episodes)]
    results = {}
    for mode in MODES:
        episodes = Episodes(envs, np.concatenate(seeds, axis=1))
        while episodes.running:
            envs.set_actions(act(args, state, envs.observations, envs.seeds, envs.ages, mode))
            episodes.step()
        if mode == MODES[0]:
            results = episodes.results
        else:
            results[f"{mode}_return"] = episodes.results["return"]
            results[f"{mode}_length"] = episodes.results["length"]
    return results


def evaluate_if_due(args: Args, run: Run, state: State, envs: EnvPool, step: int) -> None:
    """Evaluates the agents if `run.log_and_save` or `run.restore` has set `run.evaluation_due`."""
    if run.evaluation_due and args.eval_episodes:
        results = evaluate(args, state, envs, run.agents, step)
        run.log_evaluation(step, results)


def main(args: Args) -> list[dict]:
    """Trains all agents in their environments.

    After every step `run.log_and_save` does what is due. Every --log-interval steps it appends the
    means of `metrics` to train.csv and returns zeroed sums in their place. Every --eval-interval
    steps, and at the end, it saves a checkpoint and marks an evaluation as due. After a signal,
    such as Ctrl-C, it saves a checkpoint and exits. A stopped run continues from its last
    checkpoint. Returns the rows of eval.csv.
    """
    keep_freed_memory()
    # An agent is a (task, seed) pair. All arrays have a leading axis of agents.
    task = resolve(args.env).task  # 1, or k of kitchen-<k>
    agents = [(task, args.seed + i) for i in range(args.num_seeds)]
    env = env_name(args, task)
    sizes = env_sizes(env)
    observation_size, action_size = sizes
    args = dataclasses.replace(args, action_size=action_size)
    data = dict(observation_size=observation_size)
    with Run(__file__, args, agents, data, ends=(args.total_steps,)) as run:
        # Set up. `metrics` are sums over the updates since the last logged row.
        state = create_agents(args, agents, observation_size)
        capacity = min(args.replay_size, args.total_steps)
        replay = Replay.create(len(agents), capacity, *sizes)
        metrics = zero_metrics(partial(train_step, args), state, replay)
        env_names = [env] * len(agents)
        eval_envs = EnvPool(env_names, args.eval_slots, args.workers)
        envs = EnvPool(env_names, 1, args.workers)

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
            actions = saved["replay"]["actions"]  # (agents, steps, d), without the axis of slots
            envs.load(saved["envs"], actions[:, None])
        else:
            envs.reset(seeds_of(agents, 0))  # seeds of step 0, which no evaluation uses

        # An iteration is one environment step of every agent. Updates begin after the warm-up.
        while step < args.total_steps:
            if step < args.warmup_steps:
                actions = envs.random_actions(action_size)  # drawn from each episode's seed and age
            else:
                inputs = envs.observations, envs.seeds, envs.ages
                actions = act(args, state, *inputs, "explore")
            step = step + 1
            learning_steps = step - args.warmup_steps
            update_due = learning_steps > 0 and learning_steps % args.env_steps_per_update == 0
            updates = 1 if update_due else 0
            # The update is dispatched before the environments step, so the two overlap; it does
            # not see this step's transition. During the warm-up `updates` is 0. The program is
            # still compiled in the first step, when nothing is unsaved yet and a signal can end the
            # run at once.
            state, metrics = train_chunk(args, state, metrics, replay, updates)
            envs.set_actions(actions)  # waits for `act`, not for the update
            transitions = envs.step()
            replay = replay.append(transitions)
            ended = transitions["terminals"] > 0  # terminated or timed out; `masks` tell which
            if ended.any():
                envs.reset(seeds_of(agents, step, TRAINING), where=ended)
            content = dict(state=state, envs=envs.save())  # saved with metrics and replay
            metrics = run.log_and_save(step, metrics, content, replay)
            evaluate_if_due(args, run, state, eval_envs, step)
        return run.finish()


if __name__ == "__main__":
    launch(main, Args, ENV_DEFAULTS)
# --- end shared ---
