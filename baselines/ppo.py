"""PPO: Proximal Policy Optimization (Schulman et al. 2017, arXiv:1707.06347), as the baseline of
FMER (Gao et al. 2026, arXiv:2603.17685).

Online, on-policy. A Gaussian policy plays a rollout, learns from it for some epochs and throws it
away. The ratio of new to old density is clipped where moving it further would raise the objective;
advantages are generalised estimates (GAE: Schulman et al. 2016, arXiv:1506.02438). Observations and
rewards are normalised by running statistics, which are part of the agent.

    delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t)                       Eq. (PPO1)
    A_t = delta_t + gamma lambda (1 - over_t) A_{t+1},  R_t = A_t + V(s_t)             Eq. (PPO2)
    L(pi) = -<min(rho A, clip(rho, 1 - c, 1 + c) A)>,  rho = pi(a|s) / pi_old(a|s)     Eq. (PPO3)
    L(V) = <max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2)> / 2                Eq. (PPO4)

Equation numbers are ours. Sizes and rates that FMER's paper does not state are those of CleanRL:
docs/ppo.md; `# ref:` marks what differs from it.

    python baselines/ppo.py                          the plane with four goals, 3 minutes on a CPU
    python baselines/ppo.py --env halfcheetah --num-seeds 5

Shapes: B batch, S observation, d action, E environments of an agent, T steps of each in a rollout;
agents (seeds) trained at once are the leading axis of all that `act` and `train_chunk` see.
"""

import dataclasses
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # `python baselines/ppo.py` finds common/ next to baselines/
    sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import Array
from tqdm import tqdm

from common.data import over_agents, spread
from common.envs import TRAINING, EnvPool, make_env, resolve, seed_of
from common.errors import UserError
from common.flags import NonNegativeFloat, PositiveFloat, PositiveInt, UnitInterval
from common.networks import MLP
from common.run import Precision, Run, ours, parse


@dataclasses.dataclass(frozen=True)
class Args:
    # --- method ---
    epochs: PositiveInt = 10  # Passes over the steps of each rollout.
    gae_lambda: UnitInterval = 0.95  # GAE's lambda: 1 is the Monte-Carlo advantage, 0 one-step TD.
    clip_range: PositiveFloat = 0.2  # Clip range c: how far ratios and values may move.
    value_weight: NonNegativeFloat = 0.5  # Weight of the value's loss.
    entropy_weight: NonNegativeFloat = 0.0  # Weight of the policy's entropy.
    normal_clip: PositiveFloat = 10.0  # Largest normalised observation and reward.

    # --- networks and optimiser ---
    hidden_dims: tuple[PositiveInt, ...] = (256, 256)  # Hidden-layer widths of all networks.
    batch_size: PositiveInt = 256  # Batch size B, in steps of the rollout.
    lr: PositiveFloat = 3e-4  # Adam's initial learning rate; it decays linearly to 0.
    max_grad_norm: PositiveFloat = 0.5  # Largest norm of the joint gradient of both networks.

    # --- forked: run arguments (rollouts in place of warm-up and replay) ---
    env: str = "multigoal"  # kitchen-1|2|4|7 hopper halfcheetah walker2d humanoid online-ant-xy
    seed: int = 0  # first seed; an agent does not depend on those trained beside it
    num_seeds: int = 1  # agents trained at once: seed, seed + 1, ...
    name: str = "default"  # of the run's folder runs/<script>/<env>/<name>
    run_dir: str = "runs"  # where the folders of all runs are
    total_steps: int = 1_000_000  # environment steps of every agent
    rollout_steps: int = 2048  # of these, between two phases of learning (whole rollouts only)
    num_envs: int = 1  # environments that share a rollout's steps, per agent
    log_interval: int = 1_000  # steps between two rows of train.csv (means over their updates)
    eval_interval: int = 10_000  # steps between two evaluations, each with a checkpoint
    eval_episodes: int = 10  # episodes per evaluation and agent
    eval_slots: int = 10  # environments that share them, per agent; at most 100 in all
    workers: int = 0  # processes that step environments (0: one per core)
    eval_only: bool = False  # evaluate the run's checkpoint and do nothing else
    track: bool = False  # log to Weights & Biases, too
    compile_cache: str = ""  # folder of compiled programs (default: run_dir/.compiled), or none
    precision: Precision = "default"  # of matrix products on a GPU (NVIDIA's default: TF32)
    discount: float = 0.99  # gamma, per environment step
    action_size: tyro.conf.Suppress[int] = 0  # d, no flag: read from the environment
    # --- end forked ---

    def __post_init__(self):
        for size in (self.batch_size, self.num_envs):
            if self.rollout_steps % max(1, size):
                raise UserError("--rollout-steps must be a multiple of --batch-size and --num-envs")
        if self.total_steps < self.rollout_steps:
            raise UserError("--total-steps must be at least --rollout-steps")


# The class holds FMER's and CleanRL's values. The values for the plane are tuned here, with
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
    key: Array  # (2,) uint32


@flax.struct.dataclass
class Batch:
    """Holds steps to learn from."""

    observations: Array  # (B, S), normalised
    actions: Array  # (B, d), as drawn
    log_prob: Array  # (B,), when they were drawn
    values: Array  # (B,), V(s) before learning
    advantages: Array  # (B,)
    returns: Array  # (B,)


def planned_updates(args: Args) -> int:
    """Counts the updates of the whole run, which the learning rate refers to."""
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


def network(args: Args, out: int, gain: float) -> MLP:
    """Makes ReLU layers of orthogonal weights, the last one's scaled by `gain`."""
    orthogonal = jax.nn.initializers.orthogonal
    return MLP(args.hidden_dims, out, False, jax.nn.relu, orthogonal(2**0.5), orthogonal(gain))


def policy(args: Args, params: dict, observations: Array) -> tuple[Array, Array]:
    """Computes the Gaussian pi(.|s): (..., S), normalised -> mean (..., d), log-deviation (d,)."""
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
    """Chooses actions: (B, S) -> (B, d). They are the mean, in [-1, 1], or in training ("explore")
    a sample, which is not clipped yet: its density is that of the Gaussian."""
    observations = normalise(args, state.statistics, observations)
    mean, log_std = policy(args, state.params["policy"], observations)
    if mode == "explore":
        return mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)
    return jnp.clip(mean, -1, 1)


def discounted(args: Args, start: Array, rewards: Array, terminals: Array) -> tuple[Array, Array]:
    """Sums the discounted rewards since the beginning of the episode, from `start` (E,) on:
    (E, T) -> the sums after the last step (E,), where an ended episode counts 0, and all (E, T)."""

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
    """Computes GAE: (E, T) each -> (E, T). next_values are those of the observations that a step
    led to, also where the clock ended an episode: it goes on in V, but no advantage comes from
    beyond."""
    # ref: CleanRL takes V = 0 after a time-out, too
    delta = rewards + args.discount * masks * next_values - values  # Eq. (PPO1)

    def step(after, inputs):
        delta, over = inputs
        after = delta + args.discount * args.gae_lambda * (1 - over) * after  # Eq. (PPO2)
        return after, after

    start = jnp.zeros_like(delta[:, 0])
    _, result = jax.lax.scan(step, start, (delta.T, terminals.T), reverse=True)
    return result.T


def prepare(args: Args, state: State, rollout: dict) -> tuple[State, Batch]:
    """Includes the rollout, (E, T, ...) each, in the agent's statistics, and makes one batch of all
    its steps. ref: CleanRL moves the statistics at every step, also while it plays."""
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

    # The policy that has played saw the old statistics.
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
    """Computes the clipped objective, with advantages of mean 0 and deviation 1 over the batch."""
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
    """Computes the squared error, the larger one of V and of V moved by no more than the clip
    range."""
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


@partial(jax.jit, static_argnames=("args", "mode"))
def act(args, state, observations, seeds, ages, mode):
    """Actions of all agents: (agents, E, S) -> (agents, E, 1, d), a plan of one step. The noise
    depends on nothing but the episode's seed and age in steps, (agents, E) each."""

    def one(state, observation, seed, age):
        key = jax.random.fold_in(jax.random.PRNGKey(seed), age)
        return sample_actions(args, state, observation[None], key, mode)

    return over_agents(jax.vmap(one, (None, 0, 0, 0)))(state, observations, seeds, ages)


def learn(args, state, rollout):
    """All epochs of one agent, each over the whole rollout in a new order -> means of metrics."""
    state, steps = prepare(args, state, rollout)
    key, *keys = jax.random.split(state.key, args.epochs + 1)
    orders = [jax.random.permutation(key, args.rollout_steps) for key in keys]
    minibatches = jnp.stack(orders).reshape(-1, args.batch_size)
    one = lambda state, rows: update(args, state, jax.tree.map(lambda x: x[rows], steps))
    state, metrics = jax.lax.scan(one, state.replace(key=key), minibatches)
    error = steps.advantages.var() / (steps.returns.var() + 1e-8)
    return state, jax.tree.map(jnp.mean, metrics) | dict(explained=1 - error)


@partial(jax.jit, static_argnames="args", donate_argnames="state")
def train_chunk(args, state, rollout):
    """What all agents learn from a rollout, name -> (agents, E, T, ...), without leaving the
    device. Returns the state and the metrics."""
    return over_agents(partial(learn, args))(state, rollout)


# --- end forked ---

# --- forked: evaluate and main (rollouts, evaluated and saved at their ends) ---------------------


def evaluate(args, policy, pool, agents, step):
    """Exactly args.eval_episodes episodes of every agent, seeded by (seed, task, step, episode):
    the same for every method. Returns (agents, episodes) arrays, see `EnvPool.play`."""
    episodes = range(args.eval_episodes)
    seeds = [[seed_of(seed, task, step, e) for e in episodes] for task, seed in agents]
    return pool.play(policy, np.array(seeds, np.uint32))


def main(args):
    """Trains all agents and leaves a run folder, see common/run.py. Returns its evaluations."""
    source, env = resolve(args.env), make_env(args.env)
    agents = ours([(source.task, args.seed + i) for i in range(args.num_seeds)])
    S, d = env.observation_space.shape[0], env.action_space.shape[0]
    args = dataclasses.replace(args, action_size=d)
    run = Run(Path(__file__).stem, args, agents, {})
    keys = jnp.stack([jax.random.fold_in(jax.random.PRNGKey(seed), task) for task, seed in agents])
    # One agent after the other, for on a CPU with few cores jaxlib's orthogonal matrices of several
    # agents at once wait for one another for ever (jax 0.10: blocked threads of one pool).
    state = jax.jit(partial(jax.lax.map, partial(create, args, S)))(keys)
    count, E, T = len(agents), args.num_envs, args.rollout_steps // args.num_envs
    size = sum(x.size for x in jax.tree.leaves(state.params)) // count
    print(f"{count} agents of {size:,} parameters, rollouts of {args.rollout_steps:,} steps")

    def policy(*inputs, mode):  # flat over agents and environments, for the pools
        inputs = [x.reshape(count, -1, *x.shape[1:]) for x in inputs]
        return np.concatenate(act(args, state, *inputs, mode))

    names, everyone = [args.env] * count, range(count * E)
    eval_pool = EnvPool(names, args.workers, min(args.eval_slots, args.eval_episodes))
    pool = EnvPool(names * E, args.workers)
    begun = lambda i, step: seed_of(*agents[i // E][::-1], step + i % E, TRAINING)
    seeds = lambda step, who: [begun(i, step) for i in who]
    past = np.zeros((count * E, 0, d), np.float32)  # the actions of the running episodes
    widths = dict(observations=(S,), next_observations=(S,), actions=(d,))
    widths |= dict.fromkeys(("rewards", "masks", "terminals", "success"), ())
    empty = {name: np.zeros((count, E, T, *width), np.float32) for name, width in widths.items()}
    shapes = jax.eval_shape(partial(train_chunk, args), state, empty)[1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
    keep = lambda *means: dict(state=state, pool=pool.save(), past=past, means=means)
    done, saved = run.restore(keep(zeros, 0))
    state, past = spread(saved["state"]), saved["past"]
    pool.load(saved["pool"], past)

    @run.saved()
    def report(table):
        scores, result = {}, None
        for mode in MODES:
            played = evaluate(args, partial(policy, mode=mode), eval_pool, agents, done)
            prefix, result = (f"{mode}_", result) if result else ("", played)
            scores |= {prefix + name: played[name].mean(1) for name in ("return", "length")}
        run.log(table, done, scores)
        bar.write(f"{done:,} steps: return {scores['return'].mean():.1f}")
        return result

    steps = args.rollout_steps
    total, result, (sums, rollouts) = args.total_steps // steps * steps, None, saved["means"]
    due = lambda interval: done == total or done // interval > (done - steps) // interval
    bar = tqdm(initial=done, total=total, unit="step", dynamic_ncols=True, disable=None)
    while run.last["eval"] < total and not args.eval_only:
        if run.last["eval"] < done and due(args.eval_interval):
            result = report("eval")
            continue
        rows = []
        if not done:
            pool.start(everyone, seeds(0, everyone))
        for _ in range(T):
            plan = policy(np.stack(pool.states), pool.seeds, pool.ages, mode="explore")
            taken = pool.step(lambda *_: np.clip(plan, -1, 1), everyone)
            rows.append(taken | dict(past=taken["actions"], actions=plan[:, 0]))
            done += E
            over = np.flatnonzero(taken["terminals"]).tolist()
            pool.start(over, seeds(done, over))
            bar.update(E)
        rollout = {name: np.stack([row[name] for row in rows], 1) for name in rows[0]}
        past = np.concatenate([past, rollout.pop("past")], 1)
        past = past[:, past.shape[1] - pool.ages.max() :]
        rollout = {name: x.reshape(count, E, *x.shape[1:]) for name, x in rollout.items()}
        state, metrics = train_chunk(args, state, rollout)
        sums, rollouts = jax.tree.map(jnp.add, sums, metrics), rollouts + 1
        if due(args.eval_interval) or due(args.log_interval):
            run.log("train", done, {name: value / rollouts for name, value in sums.items()})
            sums, rollouts = zeros, 0
        if due(args.eval_interval) or run.stopping:
            run.save(done, keep(sums, rollouts))
    if args.eval_only:
        result = report("eval_only")
    bar.close()
    run.finish(done, total, result)
    return result


if __name__ == "__main__":
    main(parse(Args, ENV_DEFAULTS))
# --- end forked ---
