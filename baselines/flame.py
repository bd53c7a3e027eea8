"""FLAME: maximum-entropy flow policies for one-step acting (Li et al. 2026, arXiv:2602.01606), as
the baseline of FMER (Gao et al. 2026, arXiv:2603.17685).

Online, off-policy. The target is the policy proportional to exp(Q / alpha). At a point between a
replayed action and noise, K draws of the noise say which actions could have led there; weighted by
exp(Q / alpha), they give the velocity of the target's own path. A MeanFlow network (Geng et al.
2025, arXiv:2505.13447) learns the average velocity u of that path, so that an action takes one
jump. A run of n shorter jumps through the same network gives the entropy.

    x_t = (1 - t) x + t e,  e ~ N(0, I): noise at t = 1, the action at t = 0         Eq. (FLAME1)
    a = clip(e - u(e, 0, 1, s))                                                      Eq. (FLAME2)
    v = sum_k w_k (e_k - x_k),  w = softmax_k(Q(s, x_k) / alpha)                     Eq. (FLAME4)
    L(theta) = <|u(x_t, r, t, s) - sg(v - (t - r) (du/dx v + du/dt))|^2>             Eq. (FLAME5)
    y = c r + gamma (1 - terminated) (Q_bar(s', a') + alpha H(s'))                   Eq. (FLAME7)

The public code holds many variants and mixes time directions; this is one consistent reading, whose
equation numbers are ours. docs/methods/flame.md says what was chosen, `# ref:` what differs from
that code.

    python baselines/flame.py                        the plane with four goals, 3 minutes on a CPU
    python baselines/flame.py --env halfcheetah --num-seeds 5

Shapes: B batch, S observation, d action, M candidates per state, K proposals per point, n jumps;
arrays passed to `act` and `train_chunk` have a leading axis of agents (seeds) trained at once.
"""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

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
from common.errors import UserError
from common.flags import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Precision,
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
    num_proposals: PositiveInt = 100  # Noise draws K per point, weighted by their actions' values.
    time_min: PositiveFloat = 0.0054  # Earliest time in the policy's loss.
    time_max: PositiveFloat = 0.999  # Latest time in the policy's loss; times are uniform.
    alpha_init: PositiveFloat = 1.0  # Initial temperature alpha.
    alpha_lr: PositiveFloat = 5e-3  # Adam's learning rate of log alpha.
    alpha_steps: PositiveInt = 2_000  # Minimum number of alpha updates, spread over the run.
    # Target entropy H*/d per action dimension; alpha falls while the entropy is above it.
    target_entropy: float = -3.0
    entropy_steps: PositiveInt = 2  # Number n of jumps along which the entropy is measured.
    trace_clip: PositiveFloat = 10.0  # Largest trace of one of these jumps, per action dimension.
    noise_scale: PositiveFloat = 1.0  # Standard deviation of the training noise at alpha = 1.
    policy_delay: PositiveInt = 2  # Critic updates per update of the policy and averages.
    # Weight of -Q(one-step action) in the policy's loss (variant "2" of the code: 1).
    q_gradient: NonNegativeFloat = 1.0

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

    def __post_init__(self):
        if not 0 < self.time_min < self.time_max < 1:
            raise UserError("--time-min and --time-max must be in order, between 0 and 1")


# `Args` holds the paper's values as far as they are known (docs/methods/flame.md). The values
# for the plane are tuned here, with small networks for a CPU.
ENV_DEFAULTS = {
    "multigoal": dict(
        total_steps=15_000,
        warmup_steps=1_000,
        reward_scale=0.1,
        num_proposals=32,
        target_entropy=-1.0,
        entropy_steps=5,
        noise_scale=0.01,
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
    targets: dict  # moving averages of critic and policy
    opt_state: dict  # of critic, policy and alpha
    log_alpha: Array  # (): temperature of weights and entropy
    step: Array  # () int32: updates so far
    key: Array  # (2,) uint32: for the random numbers of the updates


def planned_updates(args: Args) -> int:
    """Returns the number of updates in the whole run, for the schedules."""
    steps = args.total_steps - args.warmup_steps
    return max(1, steps // args.env_steps_per_update)


def optimizers(args: Args) -> dict[str, optax.GradientTransformation]:
    """Returns one Adam per network and one for log alpha; the policy's learning rate decays between
    25 % and 75 % of its own updates."""
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
    """Creates a new agent, whose actions are almost clip(N(0, I)): the last layer starts near 0."""
    key, critic_key, policy_key = jax.random.split(key, 3)
    observations = jnp.zeros((1, observation_size))
    actions = jnp.zeros((1, args.action_size))
    critics = Critic(args.hidden_dims, 2, layer_norm=False, activation=mish, kernel_init=LECUN)
    network = TimedMLP(args.hidden_dims, scale=0.01, scale_waves=True)
    params = dict(
        critic=critics.init(critic_key, observations, actions),
        policy=network.init(policy_key, observations, actions, 0.0, 0.0),
    )
    log_alpha = jnp.float32(np.log(args.alpha_init))
    trained = params | dict(alpha=log_alpha)
    opt_state = {name: adam.init(trained[name]) for name, adam in optimizers(args).items()}
    return State(
        params=params,
        targets=jax.tree.map(jnp.copy, params),
        opt_state=opt_state,
        log_alpha=log_alpha,
        step=jnp.int32(0),
        key=key,
    )


# --- the method ----------------------------------------------------------------------------------

# A network is built twice: in `create`, for its parameters, and where it is applied.


def critic(args: Args, params: dict, observations: Array, actions: Array) -> Array:
    """Computes Q_1 and Q_2: (B, S), (..., B, d) -> (2, ..., B)."""
    critics = Critic(args.hidden_dims, 2, layer_norm=False, activation=mish, kernel_init=LECUN)
    return critics.apply(params, observations, actions)


def average_velocity(
    args: Args, params: dict, observations: Array, x: Array, r: Array, t: Array
) -> Array:
    """Computes u(x, r, t, s) over the times from t down to r, so that x_r = x_t - (t - r) u:
    (B, S), (..., B, d), times that broadcast to (..., B) -> (..., B, d)."""
    # Times are in [0, 1]; 100 times that, as in fmer.py, makes du/dt of Eq. (FLAME5) blow up.
    network = TimedMLP(args.hidden_dims, scale=0.01, scale_waves=True)
    return network.apply(params, observations, x, r, t)


def candidates(args: Args, flow: dict, observations: Array, key: Array, count: int) -> Array:
    """Draws `count` actions per state, in one jump each: (B, S) -> (count, B, d) in [-1, 1]."""
    # ref: the public code draws 0.5 N(0, I) here, but trains with N(0, I)
    noise = jax.random.normal(key, (count, len(observations), args.action_size))
    u = average_velocity(args, flow, observations, noise, 0.0, 1.0)
    return jnp.clip(noise - u, -1, 1)  # Eq. (FLAME2)


def best(q: Array, actions: Array) -> Array:
    """Picks the action with the highest value: (M, B), (M, B, d) -> (B, d)."""
    index = q.argmax(0)[None, :, None]
    return jnp.take_along_axis(actions, index, 0)[0]


def choose(
    args: Args,
    state: State,
    flow: dict,
    observations: Array,
    key: Array,
    count: int,
    noise: Array | float,
) -> Array:
    """Chooses the best of `count` actions by the critics, and adds noise of deviation `noise`:
    (B, S) -> (B, d) in [-1, 1]."""
    candidates_key, noise_key = jax.random.split(key)
    actions = candidates(args, flow, observations, candidates_key, count)
    q = critic(args, state.params["critic"], observations, actions).min(0)
    chosen = best(q, actions)
    return jnp.clip(chosen + noise * jax.random.normal(noise_key, chosen.shape), -1, 1)


def sample_actions(args: Args, state: State, observations: Array, key: Array, mode: str) -> Array:
    """Chooses actions by the averaged policy: (B, S) -> (B, d) in [-1, 1]. "best" is the best of M
    samples, "explore" (in training) adds noise, "single" (logged alongside) is one sample."""
    count = 1 if mode == "single" else args.num_candidates
    noise = 0.0
    if mode == "explore":
        noise = args.noise_scale * jnp.exp(state.log_alpha)
    return choose(args, state, state.targets["policy"], observations, key, count, noise)


def entropy(args: Args, flow: dict, observations: Array, key: Array) -> Array:
    """Estimates the entropy of the policy before clipping, along one run of n jumps per state:
    (B, S) -> (B,)."""
    B = len(observations)
    d = args.action_size
    h = 1 / args.entropy_steps
    keys = jax.random.split(key, args.entropy_steps + 1)
    x = jax.random.normal(keys[0], (B, d))
    result = jnp.full(B, 0.5 * d * jnp.log(2 * jnp.pi * jnp.e))
    # ref: the public code clips the trace to +-10 in all, too tight for 17 action dimensions
    limit = args.trace_clip * d

    def jump(carry, inputs):
        x, result = carry
        key, t = inputs
        probe = jax.random.rademacher(key, x.shape, x.dtype)
        field = partial(average_velocity, args, flow, observations, r=t - h, t=t)
        u, jvp = jax.jvp(field, (x,), (probe,))
        trace = jnp.clip((probe * jvp).sum(-1), -limit, limit)
        return (x - h * u, result - h * trace), None  # Eq. (FLAME6)

    times = 1 - h * jnp.arange(args.entropy_steps)
    last, _ = jax.lax.scan(jump, (x, result), (keys[1:], times))
    return last[1]


def critic_loss(
    args: Args,
    params: dict,
    state: State,
    batch: Replay,
    next_actions: Array,
    next_entropy: Array,
) -> tuple[Array, dict]:
    """Computes the squared TD error of both critics against one soft target: next_actions (B, d),
    next_entropy (B,)."""
    next_q = critic(args, state.targets["critic"], batch.next_observations, next_actions)
    # ref: the public code subtracts the entropy; a comment there asks which sign is right
    value = next_q.min(0) + jnp.exp(state.log_alpha) * next_entropy
    rewards = args.reward_scale * batch.rewards
    target = rewards + args.discount * batch.masks * value  # Eq. (FLAME7)
    q = critic(args, params, batch.observations, batch.actions)
    loss = ((q - target) ** 2).sum(0).mean()
    metrics = dict(critic_loss=loss, q=q.mean(), target=target.mean())
    return loss, metrics


def reweighted_velocity(
    args: Args,
    critics: dict,
    log_alpha: Array,
    observations: Array,
    x: Array,
    t: Array,
    key: Array,
) -> tuple[Array, Array]:
    """Computes the velocity at x (B, d) and t (B,) of the path to the policy proportional to
    exp(Q / alpha) on the box, and the effective number of proposals: -> (B, d), ()."""
    t = t[:, None]
    low = (x - (1 - t)) / t  # Eq. (FLAME3): for noise in [low, high], x_k is in the box
    high = (x + (1 - t)) / t
    noise = jax.random.truncated_normal(key, low, high, (args.num_proposals, *x.shape))
    actions = jnp.clip((x - t * noise) / (1 - t), -1, 1)  # clips rounding errors alone
    q = critic(args, critics, observations, actions).min(0)
    weights = jax.nn.softmax((q - q.max(0)) / jnp.exp(log_alpha), 0)  # Eq. (FLAME4)
    v = (weights[..., None] * (noise - actions)).sum(0)
    ess = 1 / (weights**2).sum(0)
    return v, ess.mean()


def meanflow_target(
    args: Args, flow: dict, observations: Array, x: Array, r: Array, t: Array, v: Array
) -> Array:
    """Computes what u should be at x (B, d) and times r <= t (B,), given the velocity v (B, d)
    there. It is linear in v, so v averaged over proposals does what the average of their targets
    would."""

    def u(x, t):
        return average_velocity(args, flow, observations, x, r, t)

    # ref: the public code makes one such pass for each of the K proposals
    _, jvp = jax.jvp(u, (x, t), (v, jnp.ones_like(t)))
    return v - (t - r)[:, None] * jvp


def policy_loss(
    args: Args,
    params: dict,
    state: State,
    observations: Array,
    x: Array,
    r: Array,
    t: Array,
    goal: Array,
    key: Array,
) -> tuple[Array, dict]:
    """Computes the regression of u at x (B, d) and times r <= t (B,) on the goal (B, d)."""
    u = average_velocity(args, params, observations, x, r, t)
    loss = ((u - goal) ** 2).sum(-1).mean()  # Eq. (FLAME5)
    metrics = dict(meanflow_loss=loss)
    if args.q_gradient:
        actions = candidates(args, params, observations, key, 1)[0]
        q = critic(args, state.targets["critic"], observations, actions).min(0)
        loss -= args.q_gradient * q.mean()  # Eq. (FLAME9)
    return loss, metrics


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


def improve(args: Args, state: State, batch: Replay, key: Array) -> tuple[State, dict]:
    """Makes one step of the policy, then one of all averages."""
    time_key, noise_key, proposals_key, loss_key = jax.random.split(key, 4)
    observations = batch.observations
    times = jax.random.uniform(
        time_key, (2, len(observations)), minval=args.time_min, maxval=args.time_max
    )
    r, t = jnp.sort(times, 0)
    noise = jax.random.normal(noise_key, batch.actions.shape)
    x = (1 - t[:, None]) * batch.actions + t[:, None] * noise  # Eq. (FLAME1)
    critics = state.params["critic"]
    v, ess = reweighted_velocity(args, critics, state.log_alpha, observations, x, t, proposals_key)
    goal = meanflow_target(args, state.params["policy"], observations, x, r, t, v)
    state, metrics = descend(
        args, state, "policy", policy_loss, observations, x, r, t, goal, loss_key
    )
    targets = optax.incremental_update(state.params, state.targets, args.target_rate)
    return state.replace(targets=targets), metrics | dict(ess=ess)


def update(args: Args, state: State, batch: Replay) -> tuple[State, dict]:
    """Updates the critics and, when they are due, the policy (with the new critics), the averages,
    and alpha."""
    key, next_key, entropy_key, policy_key = jax.random.split(state.key, 4)

    # Update the critics.
    observations = batch.next_observations
    flow = state.params["policy"]
    noise = args.noise_scale * jnp.exp(state.log_alpha)
    actions = choose(args, state, flow, observations, next_key, args.num_candidates, noise)
    h = entropy(args, flow, observations, entropy_key)
    state, metrics = descend(args, state, "critic", critic_loss, batch, actions, h)
    metrics |= dict(entropy=h.mean() / args.action_size, alpha=jnp.exp(state.log_alpha))
    step = state.step + 1
    state = state.replace(step=step, key=key)

    # Update the policy and the averages, in a loop of 0 or 1 rounds: under vmap, lax.cond would
    # compute both branches, while a loop of 0 rounds costs nothing. The round is folded into the
    # key so that the compiler cannot hoist the work out of the loop.
    def turn(i, carry):
        state, _ = carry
        return improve(args, state, batch, jax.random.fold_in(policy_key, i))

    shapes = jax.eval_shape(turn, 0, (state, None))[1]
    zeros = jax.tree.map(jnp.zeros_like, shapes)
    rounds = jnp.where(step % args.policy_delay == 0, 1, 0)
    state, more = jax.lax.fori_loop(0, rounds, turn, (state, zeros))
    # Scaled, because means over all updates should be means over the policy's updates.
    metrics |= {name: args.policy_delay * x for name, x in more.items()}

    # Update alpha.
    excess = h.mean() - args.target_entropy * args.action_size  # Eq. (FLAME8)
    old = dict(log_alpha=state.log_alpha, moments=state.opt_state["alpha"])
    adam = optimizers(args)["alpha"]
    change, moments = adam.update(excess, old["moments"])
    log_alpha = jnp.maximum(state.log_alpha + change, jnp.log(1e-3))
    new = dict(log_alpha=log_alpha, moments=moments)
    due = step % max(1, planned_updates(args) // args.alpha_steps) == 0
    new = jax.tree.map(partial(jnp.where, due), new, old)
    opt_state = state.opt_state | dict(alpha=new["moments"])
    return state.replace(log_alpha=new["log_alpha"], opt_state=opt_state), metrics


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
