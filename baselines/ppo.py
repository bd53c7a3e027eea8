"""PPO: Proximal Policy Optimization (Schulman et al. 2017, arXiv:1707.06347), as the baseline of
FMER (Gao et al. 2026, arXiv:2603.17685).

Online, on-policy. A Gaussian policy plays a rollout, learns from it for some epochs and throws it
away. The ratio of new to old density is clipped, so that nothing is gained by moving it further;
advantages are generalised estimates (GAE: Schulman et al. 2016, arXiv:1506.02438). Observations and
rewards are normalised by running statistics, which are part of the agent.

    delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t)                       Eq. (PPO1)
    A_t = delta_t + gamma lambda (1 - over_t) A_{t+1},  R_t = A_t + V(s_t)             Eq. (PPO2)
    L(pi) = -<min(rho A, clip(rho, 1 - c, 1 + c) A)>,  rho = pi(a|s) / pi_old(a|s)     Eq. (PPO3)
    L(V) = <max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2)> / 2                Eq. (PPO4)

<x> is the mean over a minibatch. Equation numbers are ours. Sizes and rates that FMER's paper does
not state are those of CleanRL: docs/methods/ppo.md; `# ref:` marks what differs from it.

    python baselines/ppo.py                          the plane with four goals, 3 minutes on a CPU
    python baselines/ppo.py --env halfcheetah --num-seeds 5

Shapes: B batch, S observation, d action, E environments of an agent, T steps of each in a rollout;
arrays passed to `act` and `train_chunk` have a leading axis of agents (seeds) trained at once.
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
    Tracking,
    UnitInterval,
    launch,
)
from common.networks import MLP
from common.run import Run


@dataclasses.dataclass(frozen=True)
class Args:
    """The flags of the script; their comments are the help texts."""

    # --- method ---
    epochs: PositiveInt = 10  # Passes over the steps of each rollout.
    gae_lambda: UnitInterval = 0.95  # GAE's lambda: 1 is the Monte-Carlo advantage, 0 one-step TD.
    clip_range: PositiveFloat = 0.2  # Clip range c: how far ratios and values may move.
    value_weight: NonNegativeFloat = 0.5  # Weight of the value's loss.
    entropy_weight: NonNegativeFloat = 0.0  # Weight of the policy's entropy.
    normal_clip: PositiveFloat = 10.0  # Largest size of a normalised observation or reward.

    # --- networks and optimiser ---
    hidden_dims: tuple[PositiveInt, ...] = (256, 256)  # Hidden-layer widths of all networks.
    batch_size: PositiveInt = 256  # Batch size B, in steps of the rollout.
    lr: PositiveFloat = 3e-4  # Adam's initial learning rate; it decays linearly to 0.
    max_grad_norm: PositiveFloat = 0.5  # Largest norm of the joint gradient of both networks.

    # --- forked: run arguments (rollouts instead of warm-up and replay) ---
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
    # Environment steps per agent in a rollout; a run ends after the last whole rollout.
    rollout_steps: PositiveInt = 2048
    num_envs: PositiveInt = 1  # Environments per agent that share a rollout's steps.
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
    # --- end forked ---

    def __post_init__(self):
        for size in (self.batch_size, self.num_envs):
            if self.rollout_steps % max(1, size):
                raise UserError("--rollout-steps must be a multiple of --batch-size and --num-envs")
        if self.total_steps < self.rollout_steps:
            raise UserError("--total-steps must be at least --rollout-steps")


# `Args` holds FMER's and CleanRL's values. The values for the plane are tuned here, with
# small networks for a CPU.
ENV_DEFAULTS = {
    "multigoal": dict(
        total_steps=60_000,
        rollout_steps=512,
        num_envs=4,
        hidden_dims=(64, 64),
        batch_size=64,
        lr=1e-3,
        log_interval=2_000,
        eval_interval=20_000,
        eval_episodes=100,
        eval_slots=100,
    ),
}


@flax.struct.dataclass
class State:
    """Holds everything that an agent carries from rollout to rollout."""

    params: dict  # policy (mean, log_std), value
    opt_state: optax.OptState
    statistics: dict  # count, mean, variance so far, of observations and of discounted returns
    returns: Array  # (E,): discounted returns so far of the running episodes
    key: Array  # (2,) uint32: for the random numbers of the updates


@flax.struct.dataclass
class Batch:
    """Holds steps to learn from."""

    observations: Array  # (B, S), normalised
    actions: Array  # (B, d), as drawn
    log_prob: Array  # (B,), when they were drawn
    values: Array  # (B,), V(s) before learning
    advantages: Array  # (B,)
    returns: Array  # (B,), advantages + values: the targets of V


def planned_updates(args: Args) -> int:
    """Counts the updates of the whole run, over which the learning rate decays."""
    rollouts = args.total_steps // args.rollout_steps
    minibatches = args.rollout_steps // args.batch_size
    return rollouts * args.epochs * minibatches


def optimizer(args: Args) -> optax.GradientTransformation:
    """Makes one Adam for both networks; its rate falls to 0, linearly in the updates."""
    rate = optax.linear_schedule(args.lr, 0.0, planned_updates(args))
    clip = optax.clip_by_global_norm(args.max_grad_norm)
    return optax.chain(clip, optax.adam(rate, eps=1e-5))


def create(args: Args, observation_size: int, key: Array) -> State:
    """Creates a new agent, whose actions are almost N(0, I)."""
    key, policy_key, value_key = jax.random.split(key, 3)
    observations = jnp.zeros((1, observation_size))
    mean = network(args, args.action_size, 0.01).init(policy_key, observations)
    params = dict(
        policy=dict(mean=mean, log_std=jnp.zeros(args.action_size)),
        value=network(args, 1, 1.0).init(value_key, observations),
    )
    statistics = dict(
        observations=(jnp.zeros(()), jnp.zeros(observation_size), jnp.ones(observation_size)),
        returns=(jnp.zeros(()), jnp.zeros(()), jnp.ones(())),
    )
    return State(
        params=params,
        opt_state=optimizer(args).init(params),
        statistics=statistics,
        returns=jnp.zeros(args.num_envs),
        key=key,
    )


# --- the method ----------------------------------------------------------------------------------

# A network is built twice: in `create`, for its parameters, and where it is applied.


def network(args: Args, out: int, gain: float) -> MLP:
    """Makes a ReLU network with orthogonal initial weights, the last layer's scaled by `gain`."""
    orthogonal = jax.nn.initializers.orthogonal
    return MLP(args.hidden_dims, out, False, jax.nn.relu, orthogonal(2**0.5), orthogonal(gain))


def policy(args: Args, params: dict, observations: Array) -> tuple[Array, Array]:
    """Computes the Gaussian pi(.|s): (..., S), normalised -> mean (..., d), log std (d,)."""
    mean = network(args, args.action_size, 0.01).apply(params["mean"], observations)
    return mean, params["log_std"]


def value(args: Args, params: dict, observations: Array) -> Array:
    """Computes V(s): (..., S), normalised -> (...)."""
    return network(args, 1, 1.0).apply(params, observations)[..., 0]


def log_density(mean: Array, log_std: Array, actions: Array) -> Array:
    """Computes log pi(a|s): (..., d) each -> (...)."""
    xi = (actions - mean) / jnp.exp(log_std)
    normal = -0.5 * xi**2 - log_std
    return (normal - 0.5 * jnp.log(2 * jnp.pi)).sum(-1)


def normalise(args: Args, statistics: dict, observations: Array) -> Array:
    """Shifts and scales observations to zero mean and unit variance, within limits."""
    _, mean, variance = statistics["observations"]
    x = (observations - mean) / jnp.sqrt(variance + 1e-8)
    return jnp.clip(x, -args.normal_clip, args.normal_clip)


def merge(old: tuple[Array, Array, Array], x: Array) -> tuple[Array, Array, Array]:
    """Computes count, mean and variance of what `old` has seen and of the rows of x (n, ...)."""
    count, mean, variance = old
    n = len(x)
    share = n / (count + n)
    shift = x.mean(0) - mean
    within = (1 - share) * variance + share * x.var(0)
    between = share * (1 - share) * shift**2
    return count + n, mean + share * shift, within + between  # Eq. (PPO5)


def sample_actions(args: Args, state: State, observations: Array, key: Array, mode: str) -> Array:
    """Chooses actions: (B, S) -> (B, d). In evaluations they are the mean, clipped to [-1, 1]; in
    training ("explore") a sample, not clipped, so that its density is the Gaussian's."""
    observations = normalise(args, state.statistics, observations)
    mean, log_std = policy(args, state.params["policy"], observations)
    if mode == "explore":
        return mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
    return jnp.clip(mean, -1, 1)


def discounted(args: Args, start: Array, rewards: Array, terminals: Array) -> tuple[Array, Array]:
    """Sums discounted rewards since the beginning of each episode: (E, T) -> (E,), (E, T).

    `start` (E,) are the sums before the rollout. Returns those after it, 0 where the episode has
    ended, and those at every step.
    """

    def step(total, inputs):
        reward, over = inputs
        total = args.discount * total + reward
        return total * (1 - over), total

    last, totals = jax.lax.scan(step, start, (rewards.T, terminals.T))
    return last, totals.T


def advantages(
    args: Args,
    rewards: Array,
    masks: Array,
    terminals: Array,
    values: Array,
    next_values: Array,
) -> Array:
    """Computes GAE: (E, T) each -> (E, T).

    `next_values` are V at the next observations. A time-out bootstraps from them like any other
    step, but no advantage carries over from the next episode.
    """
    # ref: CleanRL takes V = 0 after a time-out, as after a termination
    delta = rewards + args.discount * masks * next_values - values  # Eq. (PPO1)

    def step(after, inputs):
        delta, over = inputs
        after = delta + args.discount * args.gae_lambda * (1 - over) * after  # Eq. (PPO2)
        return after, after

    start = jnp.zeros_like(delta[:, 0])
    _, result = jax.lax.scan(step, start, (delta.T, terminals.T), reverse=True)
    return result.T


def prepare(args: Args, state: State, rollout: dict) -> tuple[State, Batch]:
    """Updates the agent's statistics with a rollout, arrays (E, T, ...), and makes one batch of all
    its steps. ref: CleanRL updates the statistics at every step, also while acting."""
    observations = rollout["observations"]
    terminals = rollout["terminals"]
    old = state.statistics
    steps = args.rollout_steps
    returns, totals = discounted(args, state.returns, rollout["rewards"], terminals)
    new = dict(
        observations=merge(old["observations"], observations.reshape(steps, -1)),
        returns=merge(old["returns"], totals.reshape(steps)),
    )
    _, _, variance = new["returns"]
    rewards = rollout["rewards"] / jnp.sqrt(variance + 1e-8)  # Eq. (PPO6)
    rewards = jnp.clip(rewards, -args.normal_clip, args.normal_clip)

    normal = normalise(args, new, observations)
    next_normal = normalise(args, new, rollout["next_observations"])
    values = value(args, state.params["value"], normal)
    next_values = value(args, state.params["value"], next_normal)
    gae = advantages(args, rewards, rollout["masks"], terminals, values, next_values)

    # The acting policy saw observations normalised by the old statistics.
    seen = normalise(args, old, observations)
    mean, log_std = policy(args, state.params["policy"], seen)
    batch = Batch(
        observations=normal,
        actions=rollout["actions"],
        log_prob=log_density(mean, log_std, rollout["actions"]),
        values=values,
        advantages=gae,
        returns=gae + values,
    )
    batch = jax.tree.map(lambda x: x.reshape(steps, *x.shape[2:]), batch)
    return state.replace(statistics=new, returns=returns), batch


def policy_loss(args: Args, params: dict, batch: Batch) -> tuple[Array, dict]:
    """Computes the clipped objective, with advantages of mean 0 and std 1 over the batch."""
    mean, log_std = policy(args, params, batch.observations)
    log_ratio = log_density(mean, log_std, batch.actions) - batch.log_prob
    ratio = jnp.exp(log_ratio)
    near = jnp.clip(ratio, 1 - args.clip_range, 1 + args.clip_range)
    A = batch.advantages
    A = (A - A.mean()) / (A.std() + 1e-8)
    loss = -jnp.minimum(ratio * A, near * A).mean()  # Eq. (PPO3)
    entropy = (log_std + 0.5 * jnp.log(2 * jnp.pi * jnp.e)).sum()
    metrics = dict(
        policy_loss=loss,
        entropy=entropy / log_std.size,
        clipped=(near != ratio).mean(),
        kl=(ratio - 1 - log_ratio).mean(),
    )
    return loss - args.entropy_weight * entropy, metrics


def value_loss(args: Args, params: dict, batch: Batch) -> tuple[Array, dict]:
    """Computes the larger of two squared errors: of V, and of V moved from its old value by no more
    than the clip range."""
    V = value(args, params, batch.observations)
    change = jnp.clip(V - batch.values, -args.clip_range, args.clip_range)
    error = (V - batch.returns) ** 2
    near_error = (batch.values + change - batch.returns) ** 2
    loss = 0.5 * jnp.maximum(error, near_error).mean()  # Eq. (PPO4)
    metrics = dict(critic_loss=loss, q=V.mean(), target=batch.returns.mean())
    return args.value_weight * loss, metrics


def update(args: Args, state: State, batch: Batch) -> tuple[State, dict]:
    """Makes one step of both networks on a minibatch."""

    def total_loss(params):
        policy_part, metrics = policy_loss(args, params["policy"], batch)
        value_part, more = value_loss(args, params["value"], batch)
        return policy_part + value_part, metrics | more

    grads, metrics = jax.grad(total_loss, has_aux=True)(state.params)
    updates, opt_state = optimizer(args).update(grads, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    metrics |= dict(grad_norm=optax.global_norm(grads))
    return state.replace(params=params, opt_state=opt_state), metrics


MODES = ("mean",)  # Ways to choose actions in evaluations.

# --- forked: many agents (all epochs of a rollout at once) ---------------------------------------

# A fork of the block that online scripts share. In a copy of this file, edit it freely.


def create_agents(args: Args, agents: list, observation_size: int) -> State:
    """Creates an agent for every (task, seed); all arrays get a leading agent axis."""
    keys = [jax.random.fold_in(jax.random.PRNGKey(seed), task) for task, seed in agents]
    return create_all(args, observation_size, jnp.stack(keys))


@partial(jax.jit, static_argnames=("args", "observation_size"))
def create_all(args: Args, observation_size: int, keys: Array) -> State:
    """Creates an agent for each of the keys, (N, 2)."""
    # One agent at a time: on a CPU with few cores, the orthogonal initialisers of several agents
    # deadlock (jaxlib 0.10: they block each other's threads in one pool).
    return jax.lax.map(partial(create, args, observation_size), keys)


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
def train_step(args: Args, state: State, rollout: dict) -> tuple[State, dict]:
    """Makes all epochs of one agent, each over the whole rollout in a new order.

    Returns the state and the means of the metrics.
    """
    state, steps = prepare(args, state, rollout)
    key, *keys = jax.random.split(state.key, args.epochs + 1)
    orders = [jax.random.permutation(order_key, args.rollout_steps) for order_key in keys]
    minibatches = jnp.stack(orders).reshape(-1, args.batch_size)

    def update_on(state, rows):
        return update(args, state, jax.tree.map(lambda x: x[rows], steps))

    state, metrics = jax.lax.scan(update_on, state.replace(key=key), minibatches)
    # The advantages are returns minus values: the part of the returns that V does not explain.
    unexplained = steps.advantages.var() / (steps.returns.var() + 1e-8)
    means = jax.tree.map(jnp.mean, metrics)
    return state, means | dict(explained=1 - unexplained, updates=jnp.ones(()))


@partial(jax.jit, static_argnames="args", donate_argnames=("state", "metrics"))
def train_chunk(args: Args, state: State, metrics: dict, rollout: dict) -> tuple[State, dict]:
    """Learns from a rollout of all agents, and adds the metrics to `metrics`.

    The rollout has arrays (agents, num_envs, T, ...) by name.
    """
    state, new_metrics = over_agents(partial(train_step, args))(state, rollout)
    return state, jax.tree.map(jnp.add, metrics, new_metrics)


# --- end forked ---

# --- forked: evaluate and main (rollouts, evaluated and saved at their ends) ---------------------


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


def empty_rollout(args: Args, num_agents: int, observation_size: int) -> dict[str, Array]:
    """Returns a rollout of zeros, (agents, num_envs, T, ...) by name."""
    shape = num_agents, args.num_envs, args.rollout_steps // args.num_envs
    rollout = dict.fromkeys(("rewards", "masks", "terminals"), jnp.zeros(shape))
    observations = jnp.zeros((*shape, observation_size))
    rollout |= dict(observations=observations, next_observations=observations)
    return rollout | dict(actions=jnp.zeros((*shape, args.action_size)))


def episode_seeds(args: Args, agents: list, step: int) -> np.ndarray:
    """Returns the seeds (agents, num_envs) of episodes that begin after `step`."""
    seeds = [seeds_of(agents, step + i, TRAINING) for i in range(args.num_envs)]
    return np.concatenate(seeds, axis=1)


def collect_rollout(
    args: Args, state: State, envs: EnvPool, agents: list, step: int
) -> tuple[dict, np.ndarray]:
    """Plays a rollout that begins after `step`, with the current policies.

    Returns arrays (agents, num_envs, T, ...) by name, with actions as they were sampled, and the
    actions that were played, which are clipped.
    """
    rows = []
    for _ in range(args.rollout_steps // args.num_envs):
        inputs = envs.observations, envs.seeds, envs.ages
        sampled = np.asarray(act(args, state, *inputs, "explore"))
        envs.set_actions(np.clip(sampled, -1, 1))
        transitions = envs.step()
        step = step + args.num_envs
        ended = transitions["terminals"] > 0
        if ended.any():
            envs.reset(episode_seeds(args, agents, step), where=ended)
        rows.append(transitions | dict(played=transitions["actions"], actions=sampled[:, :, 0]))
    rollout = {}
    for name in rows[0].keys() - {"success"}:
        rollout[name] = np.stack([row[name] for row in rows], axis=2)
    played = rollout.pop("played")
    return rollout, played


def main(args: Args) -> list[dict]:
    """Trains all agents in their environments.

    After every rollout `run.log_and_save` does what is due. Every --log-interval steps it appends
    the means of `metrics` to train.csv and returns zeroed sums in their place. Every
    --eval-interval steps, and at the end, it saves a checkpoint and marks an evaluation as due.
    After a signal, such as Ctrl-C, it saves a checkpoint and exits. A stopped run continues from
    its last checkpoint. Returns the rows of eval.csv.
    """
    keep_freed_memory()
    # An agent is a (task, seed) pair. All arrays have a leading axis of agents.
    task = resolve(args.env).task
    agents = [(task, args.seed + i) for i in range(args.num_seeds)]
    env = env_name(args, task)
    observation_size, action_size = env_sizes(env)
    args = dataclasses.replace(args, action_size=action_size)
    data = dict(observation_size=observation_size)
    total_steps = args.total_steps // args.rollout_steps * args.rollout_steps
    with Run(__file__, args, agents, data, ends=(total_steps,)) as run:
        # Set up. `metrics` are sums over the updates since the last logged row.
        state = create_agents(args, agents, observation_size)
        rollout = empty_rollout(args, len(agents), observation_size)
        metrics = zero_metrics(partial(train_step, args), state, rollout)
        env_names = [env] * len(agents)
        eval_envs = EnvPool(env_names, args.eval_slots, args.workers)
        envs = EnvPool(env_names, args.num_envs, args.workers, most=args.num_envs * len(agents))
        played = np.zeros((*envs.shape, 0, action_size), np.float32)  # in the running episodes

        # Continue from the last checkpoint. `saved` is its content: state, metrics, envs, and the
        # actions played. Without one, it is what is passed here.
        content = dict(state=state, metrics=metrics, envs=envs.save(), played=played)
        step, saved = run.restore(content)
        state, metrics = shard_over_agents((saved["state"], saved["metrics"]))
        # Due with --eval-only, or if the run stopped between a checkpoint and its evaluation.
        evaluate_if_due(args, run, state, eval_envs, step)
        if args.eval_only:
            return run.finish()
        played = saved["played"]
        if step > 0:  # play the interrupted episodes again
            envs.load(saved["envs"], played)
        else:
            envs.reset(episode_seeds(args, agents, 0))

        # Every agent plays a rollout, then learns from it.
        while step < total_steps:
            rollout, new_actions = collect_rollout(args, state, envs, agents, step)
            state, metrics = train_chunk(args, state, metrics, rollout)
            step = step + args.rollout_steps
            played = np.concatenate([played, new_actions], axis=2)
            played = played[:, :, played.shape[2] - envs.ages.max() :]
            content = dict(state=state, envs=envs.save(), played=played)
            metrics = run.log_and_save(step, metrics, content)
            evaluate_if_due(args, run, state, eval_envs, step)
        return run.finish()


if __name__ == "__main__":
    launch(main, Args, ENV_DEFAULTS)
# --- end forked ---
