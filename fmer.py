"""FMER: Flow Matching policy optimization with Mirror descent and Entropy constraints (Gao et al.
2026, arXiv:2603.17685).

Online, off-policy. The policy is a flow in an unbounded latent space, squashed by tanh. It improves
by mirror descent: M actions are drawn from the current policy, weighted by softmax(Q / eta), and
the flow is refitted to them; no gradient passes through the ODE. The divergence of the velocity
gives the entropy of the actions, which a multiplier lambda holds at a target; eta is adapted to
keep the effective sample size (ESS) of the weights at a target.

    a = tanh(z_1),  dz/dt = v_theta(z, t, s),  z_0 ~ N(0, I)                            Eq. (1)
    w_i = softmax_i(Q(s, a_i) / eta),  ESS = 1 / sum_i w_i^2                      Eq. (13), (14)
    L(theta) = E sum_i w_i |v_theta(z_t^i, t_i, s) - (z_1^i - z_0^i)|^2                Eq. (11)
               - lambda E [div v_theta - 2 tanh(z_t) . v_theta]                        Eq. (18)

    python fmer.py                                   the plane with four goals, 3 minutes on a CPU
    python fmer.py --env halfcheetah --num-seeds 5   five agents in one program

Shapes: B batch, S observation, d action, M candidates per state (the paper's N), T solver steps;
agents (seeds) trained at once are the leading axis. Equation numbers: the paper's third version.
docs/methods/fmer.md says what the paper leaves open, and what we chose.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

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
    num_candidates: PositiveInt = 8  # Candidates M per state, in updates and evaluations.
    # Candidates sampled per action during training; the best one is executed (0: num_candidates).
    act_candidates: NonNegativeInt = 0
    flow_steps: PositiveInt = 10  # Steps T of the solver from noise to action.
    solver: Literal["euler", "rk2", "rk4"] = "euler"  # Solver of the ODE; rk2 is the midpoint rule.
    squash: Literal["tanh", "clip"] = "tanh"  # Map from latents to actions; clip is an ablation.
    # Largest |z_1| before tanh; the default is atanh(1 - 1e-6).
    latent_clip: PositiveFloat = 7.2543
    # Weights of the candidates; uniform and top1 are ablations of softmax(Q / eta).
    weights: Literal["soft", "uniform", "top1"] = "soft"
    eta_init: PositiveFloat = 0.5  # Initial temperature eta of the weights.
    eta_fixed: NonNegativeFloat = 0.0  # Ablation: eta stays at this value (0: it is tuned).
    # Step size of log eta: an update subtracts this times (ESS - target ESS), counted in
    # candidates. Eta stays in [0.001, 100].
    eta_rate: NonNegativeFloat = 1e-3
    target_ess: UnitInterval = 0.5  # Target ESS as a share of num_candidates (the paper: 4 of 8).
    lambda_init: PositiveFloat = 0.5  # Initial multiplier lambda of the entropy constraint.
    # Step size of log lambda: an update adds this times (target - entropy) per action dimension.
    # Lambda stays in [0.001, 10].
    lambda_rate: NonNegativeFloat = 1e-2
    # Optimiser of log lambda and log eta: plain steps of --lambda-rate and --eta-rate, or Adam with
    # the policy's initial learning rate.
    dual_optimizer: Literal["plain", "adam"] = "plain"
    target_entropy_start: float = 0.0  # Initial target entropy per action dimension.
    target_entropy_end: float = -1.0  # Final target entropy per action dimension.
    # Fraction of the updates after which the target entropy has reached its final value.
    target_entropy_share: PositiveFloat = 0.7
    # Ablation: drop the entropy term from this update on.
    entropy_until: NonNegativeInt = 2**31 - 1
    # Estimate of the divergence; the exact one takes d times as many passes.
    divergence: Literal["hutchinson", "exact"] = "hutchinson"
    # States used in the policy update; "next" reuses the candidates of the TD target.
    actor_states: Literal["current", "next"] = "current"
    # Step size of a moving average of the policy, used for acting and TD targets (0: none).
    policy_ema: UnitInterval = 0.0

    # --- networks and optimiser ---
    hidden_dims: tuple[PositiveInt, ...] = (256, 256, 256)  # Hidden-layer widths of all networks.
    batch_size: PositiveInt = 256  # Batch size B, in transitions.
    actor_lr: PositiveFloat = 3e-4  # Initial learning rate of the policy (Adam).
    # Final policy learning rate. The rate decays linearly between 25 % and 75 % of the updates.
    actor_lr_end: NonNegativeFloat = 3e-5
    critic_lr: PositiveFloat = 3e-4  # Learning rate of the critics (Adam).
    target_rate: UnitInterval = 0.005  # Step size of the critics' averages (target networks).

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
        if self.actor_states == "next" and self.policy_ema:
            problem = "--actor-states next needs candidates of the policy itself"
            raise UserError(f"{problem}; leave out --policy-ema or --actor-states")


# `Args` holds the paper's values and, where the paper states none, those of
# docs/methods/fmer.md. The values for the plane are tuned here, for a CPU.
ENV_DEFAULTS = {
    "multigoal": dict(
        total_steps=15_000,
        warmup_steps=1_000,
        reward_scale=0.1,
        act_candidates=1,
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
    targets: dict  # target networks: averages of critic and, with --policy-ema, policy
    opt_state: dict  # of critic, policy, log_lambda and log_eta
    log_eta: Array  # (): logarithm of the weights' temperature
    log_lambda: Array  # (): logarithm of the entropy's multiplier
    step: Array  # () int32: updates so far
    key: Array  # (2,) uint32: for the random numbers of the updates


def planned_updates(args: Args) -> int:
    """Returns the number of updates in the whole run, for the schedules."""
    steps = args.total_steps - args.warmup_steps
    return max(1, steps // args.env_steps_per_update)


def optimizers(args: Args) -> dict[str, optax.GradientTransformation]:
    """Returns an Adam per network; the policy's rate decays between 25 and 75 % of the updates."""
    start = int(0.25 * planned_updates(args))
    end = int(0.75 * planned_updates(args))
    rate = optax.linear_schedule(
        args.actor_lr,
        args.actor_lr_end,
        transition_steps=max(1, end - start),
        transition_begin=start,
    )
    return dict(critic=optax.adam(args.critic_lr), policy=optax.adam(rate))


def dual_optimizers(args: Args) -> dict[str, optax.GradientTransformation]:
    """Makes the optimisers of log lambda and log eta."""
    if args.dual_optimizer == "adam":
        adam = optax.adam(args.actor_lr)
        return dict(log_lambda=adam, log_eta=adam)
    return dict(log_lambda=optax.sgd(args.lambda_rate), log_eta=optax.sgd(args.eta_rate))


def create(args: Args, observation_size: int, key: Array) -> State:
    """Creates an agent whose initial actions are approximately tanh(N(0, I)).

    The last layer of the flow starts near 0.
    """
    key, critic_key, policy_key = jax.random.split(key, 3)
    observations = jnp.zeros((1, observation_size))
    actions = jnp.zeros((1, args.action_size))
    critics = Critic(args.hidden_dims, 2, layer_norm=False, activation=mish, kernel_init=LECUN)
    network = TimedMLP(args.hidden_dims, scale=0.01)
    params = dict(
        critic=critics.init(critic_key, observations, actions),
        policy=network.init(policy_key, observations, actions, 0.0),
    )
    averaged = ("critic", "policy") if args.policy_ema else ("critic",)
    targets = {name: jax.tree.map(jnp.copy, params[name]) for name in averaged}
    opt_state = {name: adam.init(params[name]) for name, adam in optimizers(args).items()}
    for name, optimizer in dual_optimizers(args).items():
        opt_state[name] = optimizer.init(jnp.zeros(()))
    return State(
        params=params,
        targets=targets,
        opt_state=opt_state,
        log_eta=jnp.float32(np.log(args.eta_fixed or args.eta_init)),
        log_lambda=jnp.float32(np.log(args.lambda_init)),
        step=jnp.int32(0),
        key=key,
    )


# --- the method ----------------------------------------------------------------------------------

# A network is built twice: in `create`, for its parameters, and where it is applied.


def critic(args: Args, params: dict, observations: Array, actions: Array) -> Array:
    """Computes Q_1 and Q_2: (B, S), (..., B, d) -> (2, ..., B)."""
    critics = Critic(args.hidden_dims, 2, layer_norm=False, activation=mish, kernel_init=LECUN)
    return critics.apply(params, observations, actions)


def velocity(args: Args, params: dict, observations: Array, z: Array, t: Array) -> Array:
    """Computes v(z, t, s).

    (B, S), (..., B, d) and t in [0, 1] that broadcasts to (..., B) -> (..., B, d).
    """
    network = TimedMLP(args.hidden_dims, scale=0.01)
    return network.apply(params, observations, z, 100 * t)  # its sinusoids suit times up to 100


def integrate(args: Args, flow: dict, observations: Array, z: Array) -> Array:
    """Solves the ODE from noise to latents of actions in T steps, and clips them.

    (B, S), (..., B, d) -> (..., B, d).
    """
    h = 1 / args.flow_steps
    v = partial(velocity, args, flow, observations)

    def step(z, t):
        k1 = v(z, t)  # Eq. (1)
        if args.solver == "euler":
            return z + h * k1, None  # Eq. (10)
        k2 = v(z + h / 2 * k1, t + h / 2)
        if args.solver == "rk2":
            return z + h * k2, None
        k3 = v(z + h / 2 * k2, t + h / 2)
        k4 = v(z + h * k3, t + h)
        return z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

    times = jnp.arange(args.flow_steps) * h
    z, _ = jax.lax.scan(step, z, times, unroll=10)  # ten steps at once are faster than a loop
    limit = args.latent_clip if args.squash == "tanh" else 1.0
    return jnp.clip(z, -limit, limit)


def candidates(args: Args, flow: dict, observations: Array, key: Array, count: int) -> Array:
    """Draws latents of `count` actions per state: (B, S) -> (count, B, d)."""
    noise = jax.random.normal(key, (count, len(observations), args.action_size))
    return integrate(args, flow, observations, noise)


def squash(args: Args, z: Array) -> Array:
    """Maps latents, which `integrate` has clipped, to actions."""
    return jnp.tanh(z) if args.squash == "tanh" else z


def best(q: Array, actions: Array) -> Array:
    """Picks the action with the highest value: (M, B), (M, B, d) -> (B, d)."""
    index = q.argmax(0)[None, :, None]
    return jnp.take_along_axis(actions, index, 0)[0]


def sample_actions(args: Args, state: State, observations: Array, key: Array, mode: str) -> Array:
    """Draws actions and returns the one with the highest value per state: (B, S) -> (B, d).

    `mode` says how many are drawn: "best" (evaluations) M, "single" (logged alongside) one, and
    "explore" (training) --act-candidates.
    """
    count = args.num_candidates
    if mode == "single":
        count = 1
    elif mode == "explore" and args.act_candidates:
        count = args.act_candidates
    flow = state.targets.get("policy", state.params["policy"])
    actions = squash(args, candidates(args, flow, observations, key, count))
    q = critic(args, state.params["critic"], observations, actions).min(0)
    return best(q, actions)


def critic_loss(
    args: Args, params: dict, state: State, batch: Replay, next_actions: Array
) -> tuple[Array, dict]:
    """Computes the squared TD error of both critics against one target without an entropy term.

    next_actions (M, B, d) are candidates at s'. The critics choose among them and the target
    critics evaluate the choice, as in double Q-learning. `params` are the critics' alone.
    """
    next_observations = batch.next_observations
    next_q = critic(args, state.params["critic"], next_observations, next_actions)
    chosen = best(next_q.min(0), next_actions)
    value = critic(args, state.targets["critic"], next_observations, chosen).min(0)
    rewards = args.reward_scale * batch.rewards
    target = rewards + args.discount * batch.masks * value  # Eq. (20)
    q = critic(args, params, batch.observations, batch.actions)
    loss = ((q - target) ** 2).sum(0).mean()  # Eq. (19)
    metrics = dict(critic_loss=loss, q=q.mean(), target=target.mean())
    return loss, metrics


def weigh(args: Args, q: Array, eta: Array) -> tuple[Array, Array]:
    """Computes the weights of M candidates, which sum to 1, and their effective sample size,
    averaged over the states.

    (M, B) -> (M, B), ().
    """
    # Eq. (13), where V(s) cancels. The maximum is subtracted before the division, so that no digits
    # are lost where eta is small.
    weights = jax.nn.softmax((q - q.max(0)) / eta, 0)
    if args.weights == "uniform":
        weights = jnp.full_like(q, 1 / len(q))
    if args.weights == "top1":
        weights = jax.nn.one_hot(q.argmax(0), len(q), axis=0)
    ess = 1 / (weights**2).sum(0)  # Eq. (14)
    return weights, ess.mean()


def divergence(
    args: Args, flow: dict, observations: Array, z: Array, t: Array, key: Array
) -> tuple[Array, Array]:
    """Computes the latent velocity (M, B, d), and the divergence (M, B) of the velocity in *action*
    space, at z (M, B, d) and t (M, B)."""
    field = partial(velocity, args, flow, observations, t=t)
    if args.divergence == "hutchinson":
        probe = jax.random.rademacher(key, z.shape, z.dtype)
        v, jvp = jax.jvp(field, (z,), (probe,))
        trace = (probe * jvp).sum(-1)  # Eq. (69)
    else:

        def diagonal(unit):
            _, jvp = jax.jvp(field, (z,), (jnp.broadcast_to(unit, z.shape),))
            return (jvp * unit).sum(-1)

        v = field(z)
        trace = jax.vmap(diagonal)(jnp.eye(z.shape[-1])).sum(0)
    if args.squash == "tanh":
        trace -= 2 * (jnp.tanh(z) * v).sum(-1)  # Eq. (17)
    return v, trace


def policy_loss(
    args: Args,
    params: dict,
    state: State,
    observations: Array,
    z1: Array,
    weights: Array,
    key: Array,
) -> tuple[Array, dict]:
    """Computes the weighted flow-matching loss on the candidates' latents, minus the entropy bonus.

    observations (B, S), z1 (M, B, d), weights (M, B). `params` are the policy's alone; no gradient
    passes through the solver.
    """
    time_key, noise_key, probe_key = jax.random.split(key, 3)
    t = jax.random.uniform(time_key, weights.shape)
    z0 = jax.random.normal(noise_key, z1.shape)
    z = (1 - t[..., None]) * z0 + t[..., None] * z1  # Eq. (2)
    v, div = divergence(args, params, observations, z, t, probe_key)
    error = ((v - (z1 - z0)) ** 2).sum(-1)
    matching = (weights * error).sum(0).mean()  # Eq. (11)
    active = state.step < args.entropy_until
    multiplier = jnp.where(active, jnp.exp(state.log_lambda), 0.0)
    loss = matching - multiplier * div.mean()  # Eq. (8), (18)
    # Entropy per dimension: 0.669804 for tanh(z_0) (by quadrature), log(2 pi e) / 2 for z_0.
    initial_entropy = 0.669804 if args.squash == "tanh" else 1.418939
    entropy = initial_entropy * args.action_size + div.mean()  # Eq. (16), (70)
    return loss, dict(matching_loss=matching, entropy=entropy / args.action_size)


def target_entropy(args: Args, step: Array) -> Array:
    """Returns the target H*/d, annealed linearly over the --target-entropy-share of the updates."""
    last_step = args.target_entropy_share * planned_updates(args)
    share = jnp.minimum(step / last_step, 1)
    return args.target_entropy_start * (1 - share) + args.target_entropy_end * share


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


def update(args: Args, state: State, batch: Replay) -> tuple[State, dict]:
    """Updates the critics, then the policy with the new critics, then lambda and eta (by steps on
    their logarithms), then the target networks."""
    key, next_key, current_key, loss_key = jax.random.split(state.key, 4)

    # Update the critics.
    flow = state.targets.get("policy", state.params["policy"])
    next_z1 = candidates(args, flow, batch.next_observations, next_key, args.num_candidates)
    next_actions = squash(args, next_z1)
    state, metrics = descend(args, state, "critic", critic_loss, batch, next_actions)

    # Update the policy, at the batch's states or at the next ones, whose candidates are drawn.
    if args.actor_states == "current":
        observations = batch.observations
        flow = state.params["policy"]
        z1 = candidates(args, flow, observations, current_key, args.num_candidates)
    else:
        observations = batch.next_observations
        z1 = next_z1
    q = critic(args, state.params["critic"], observations, squash(args, z1)).min(0)
    weights, ess = weigh(args, q, jnp.exp(state.log_eta))
    inputs = observations, z1, weights, loss_key
    state, policy_metrics = descend(args, state, "policy", policy_loss, *inputs)

    # Update lambda and eta. The errors take the place of gradients: a positive one lowers lambda or
    # eta.
    entropy = policy_metrics["entropy"]  # per dimension, like the goal
    goal = target_entropy(args, state.step)
    excess = ess - args.target_ess * args.num_candidates
    errors = dict(log_lambda=entropy - goal, log_eta=excess)
    changes = {}
    opt_state = dict(state.opt_state)
    for name, optimizer in dual_optimizers(args).items():
        changes[name], opt_state[name] = optimizer.update(errors[name], opt_state[name])
    log_lambda = state.log_lambda + changes["log_lambda"]  # Eq. (7)
    log_lambda = jnp.clip(log_lambda, jnp.log(1e-3), jnp.log(10.0))
    log_lambda = jnp.where(state.step < args.entropy_until, log_lambda, state.log_lambda)
    log_eta = state.log_eta
    if args.weights == "soft" and not args.eta_fixed:
        log_eta = jnp.clip(log_eta + changes["log_eta"], jnp.log(1e-3), jnp.log(100.0))

    # Update the target networks.
    rates = dict(critic=args.target_rate, policy=args.policy_ema)
    targets = {}
    for name, average in state.targets.items():
        targets[name] = optax.incremental_update(state.params[name], average, rates[name])

    metrics |= policy_metrics
    metrics |= dict(  # lambda and eta as they were before this update
        target_entropy=goal,
        multiplier=jnp.exp(state.log_lambda),
        ess=ess,
        eta=jnp.exp(state.log_eta),
        saturated=(jnp.abs(z1) > 3).mean(),  # tanh(3) = 0.995
    )
    state = state.replace(
        targets=targets,
        opt_state=opt_state,
        log_eta=log_eta,
        log_lambda=log_lambda,
        step=state.step + 1,
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
