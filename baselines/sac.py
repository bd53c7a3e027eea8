"""SAC: Soft Actor-Critic (Haarnoja et al. 2018, arXiv:1801.01290 and, with the temperature tuned,
arXiv:1812.05905).

Online, off-policy. The return is extended by alpha times the entropy of the policy, a Gaussian
squashed by tanh. Two critics learn the values of that policy, the policy ascends the lower of them
through its own noise, and alpha holds the entropy at a target.

    a = tanh(mu(s) + sigma(s) xi),  xi ~ N(0, I)                                        Eq. (SAC1)
    y = c r + gamma m (min_j Qbar_j(s', a') - alpha log pi(a'|s')),  a' ~ pi            Eq. (SAC3)
    L(Q) = E sum_j (Q_j(s, a) - y)^2                                                    Eq. (SAC4)
    L(pi) = E [alpha log pi(a~|s) - min_j Q_j(s, a~)],  a~ ~ pi                         Eq. (SAC5)
    L(alpha) = -alpha E [log pi(a~|s) + H*],  H* = -d                                   Eq. (SAC6)

Equation numbers are ours, see docs/equations.md; `# ref:` marks what differs from public code.

    python baselines/sac.py                          the plane with four goals, small networks
    python baselines/sac.py --env halfcheetah --num-seeds 5

Shapes: B batch, S observation, d action; agents (seeds) trained at once are the leading axis of all
that `act` and `train_chunk` see.
"""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":  # `python baselines/sac.py` finds common/ next to baselines/
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

from common.data import Replay, over_agents, spread
from common.envs import MULTIGOAL_STEPS, TRAINING, EnvPool, make_env, multigoal, resolve, seed_of
from common.flags import NonNegativeFloat, PositiveFloat, PositiveInt, UnitInterval
from common.networks import LECUN, MLP, Critic
from common.run import Precision, Run, ours, parse


@dataclasses.dataclass(frozen=True)
class Args:
    # --- method ---
    reward_scale: NonNegativeFloat = 1.0  # Factor c of the rewards in the TD target.
    # Critic updates per update of the policy, which then makes as many steps.
    policy_delay: PositiveInt = 2
    # Target entropy H*/d per action dimension; alpha falls while the entropy is above it.
    target_entropy: float = -1.0

    # --- networks and optimiser ---
    hidden_dims: tuple[PositiveInt, ...] = (256, 256)  # Hidden-layer widths of all networks.
    batch_size: PositiveInt = 256  # Batch size B, in transitions.
    actor_lr: PositiveFloat = 3e-4  # Adam's learning rate of the policy.
    critic_lr: PositiveFloat = 1e-3  # Adam's learning rate of the critics.
    alpha_lr: PositiveFloat = 1e-3  # Adam's learning rate of log alpha.
    target_rate: UnitInterval = 0.005  # Step size of the moving average of the critics.

    # --- shared: run arguments ---
    env: str = "multigoal"  # kitchen-1|2|4|7 hopper halfcheetah walker2d humanoid online-ant-xy
    seed: int = 0  # first seed; an agent does not depend on those trained beside it
    num_seeds: int = 1  # agents trained at once: seed, seed + 1, ...
    name: str = "default"  # of the run's folder runs/<script>/<env>/<name>
    run_dir: str = "runs"  # where the folders of all runs are
    total_steps: int = 1_000_000  # environment steps of every agent
    warmup_steps: int = 10_000  # of these, the first ones: uniform actions and no updates
    env_steps_per_update: int = 1  # environment steps from one update to the next
    replay_size: int = 1_000_000  # transitions kept, the oldest are overwritten
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
    # --- end shared ---


# The class holds the values of FMER's comparison (arXiv:2603.17685, table 3). The learning rates
# are lost there, so they are CleanRL's. The values for the plane are for a CPU.
ENV_DEFAULTS = {
    "multigoal": dict(
        total_steps=15_000,
        warmup_steps=1_000,
        reward_scale=0.1,
        actor_lr=1e-3,
        hidden_dims=(64, 64, 64),
        batch_size=32,
        log_interval=500,
        eval_interval=5_000,
        eval_episodes=100,
        eval_slots=100,
    ),
    "online-ant-xy": dict(  # OGBench's expert of the ant, see common/ant.py.
        total_steps=400_000,
        policy_delay=1,
        target_entropy=-0.5,
        actor_lr=1e-4,
        critic_lr=1e-4,
        alpha_lr=1e-4,
        eval_interval=20_000,
    ),
}


@flax.struct.dataclass
class State:
    """Holds everything that an agent carries from update to update."""

    params: dict  # critic (Q_1, Q_2), policy (pi), log_alpha
    targets: dict  # moving averages: critic
    opt_state: dict  # of each of params
    step: Array  # () int32: updates so far
    key: Array  # (2,) uint32


def optimizers(args: Args) -> dict[str, optax.GradientTransformation]:
    """Makes one Adam for each of `params`."""
    return dict(
        critic=optax.adam(args.critic_lr),
        policy=optax.adam(args.actor_lr),
        log_alpha=optax.adam(args.alpha_lr),
    )


def create(args: Args, observation_size: int, key: Array) -> State:
    """Creates a new agent."""
    key, critic_key, policy_key = jax.random.split(key, 3)
    observations = jnp.zeros((1, observation_size))
    actions = jnp.zeros((1, args.action_size))
    critics = Critic(args.hidden_dims, 2, False, nn.relu, LECUN)
    gaussian = MLP(args.hidden_dims, 2 * args.action_size, False, nn.relu, LECUN)
    params = dict(
        critic=critics.init(critic_key, observations, actions),
        policy=gaussian.init(policy_key, observations),
        log_alpha=jnp.zeros(()),  # alpha = 1
    )
    opt_state = {name: adam.init(params[name]) for name, adam in optimizers(args).items()}
    return State(
        params=params,
        targets=dict(critic=jax.tree.map(jnp.copy, params["critic"])),
        opt_state=opt_state,
        step=jnp.int32(0),
        key=key,
    )


# --- the method ----------------------------------------------------------------------------------


def critic(args: Args, params: dict, observations: Array, actions: Array) -> Array:
    """Computes Q_1 and Q_2: (B, S), (B, d) -> (2, B)."""
    critics = Critic(args.hidden_dims, 2, False, nn.relu, LECUN)
    return critics.apply(params, observations, actions)


def policy(args: Args, params: dict, observations: Array) -> tuple[Array, Array]:
    """Computes mean and log-deviation of actions before tanh: (B, S) -> (B, d), (B, d)."""
    gaussian = MLP(args.hidden_dims, 2 * args.action_size, False, nn.relu, LECUN)
    mean, raw = jnp.split(gaussian.apply(params, observations), 2, -1)
    log_std = -5 + 3.5 * (jnp.tanh(raw) + 1)  # ref: in [-5, 2] as in CleanRL; papers: clipped
    return mean, log_std


def sample(args: Args, params: dict, observations: Array, key: Array) -> tuple[Array, Array]:
    """Draws actions, and computes their log-densities: (B, S) -> (B, d), (B,)."""
    mean, log_std = policy(args, params, observations)
    noise = jax.random.normal(key, mean.shape)
    u = mean + jnp.exp(log_std) * noise
    normal = -0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)
    slope = 2 * (jnp.log(2) - u - jax.nn.softplus(-2 * u))  # log(1 - tanh^2 u), for any u
    return jnp.tanh(u), (normal - slope).sum(-1)  # Eq. (SAC1), (SAC2)


def sample_actions(args: Args, state: State, observations: Array, key: Array, mode: str) -> Array:
    """Chooses actions: (B, S) -> (B, d) in [-1, 1]. In training ("explore") they are samples,
    otherwise tanh of the mean."""
    if mode == "explore":
        actions, _ = sample(args, state.params["policy"], observations, key)
        return actions
    mean, _ = policy(args, state.params["policy"], observations)
    return jnp.tanh(mean)


def critic_loss(
    args: Args, params: dict, state: State, batch: Replay, key: Array
) -> tuple[Array, dict]:
    """Computes the TD error of both critics against one target."""
    alpha = jnp.exp(state.params["log_alpha"])
    next_actions, log_prob = sample(args, state.params["policy"], batch.next_observations, key)
    next_q = critic(args, state.targets["critic"], batch.next_observations, next_actions)
    value = next_q.min(0) - alpha * log_prob
    rewards = args.reward_scale * batch.rewards
    target = rewards + args.discount * batch.masks * value  # Eq. (SAC3)
    q = critic(args, params, batch.observations, batch.actions)
    loss = ((q - target) ** 2).sum(0).mean()  # Eq. (SAC4)
    metrics = dict(critic_loss=loss, q=q.mean(), target=target.mean())
    return loss, metrics


def policy_loss(
    args: Args, params: dict, state: State, observations: Array, key: Array
) -> tuple[Array, dict]:
    """Computes the lower value of an action, and its entropy; the gradient passes through the
    action."""
    alpha = jnp.exp(state.params["log_alpha"])
    actions, log_prob = sample(args, params, observations, key)
    q = critic(args, state.params["critic"], observations, actions)
    loss = (alpha * log_prob - q.min(0)).mean()  # Eq. (SAC5)
    entropy = -log_prob.mean() / args.action_size
    return loss, dict(policy_loss=loss, entropy=entropy, alpha=alpha)


def alpha_loss(args: Args, params: Array, state: State, entropy: Array) -> tuple[Array, dict]:
    """Computes a loss that raises alpha while the policy's entropy (per dimension) is below its
    target; `params` is log alpha."""
    gap = args.action_size * (entropy - args.target_entropy)
    return jnp.exp(params) * gap, {}  # Eq. (SAC6)


def descend(
    args: Args, state: State, name: str, loss: Callable, *inputs: Any
) -> tuple[State, dict]:
    """Makes one step of Adam on a loss of params[name]; everything else is constant."""
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
    """Makes one step of the critics; at every policy_delay-th update also as many steps of the
    policy and of alpha, with fresh noise; then one of the averages."""
    key, next_key, now_key = jax.random.split(state.key, 3)
    state, metrics = descend(args, state, "critic", critic_loss, batch, next_key)

    def step(i, carry):
        state, sums = carry
        noise_key = jax.random.fold_in(now_key, i)
        state, more = descend(args, state, "policy", policy_loss, batch.observations, noise_key)
        state, _ = descend(args, state, "log_alpha", alpha_loss, more["entropy"])
        return state, jax.tree.map(jnp.add, sums, more)

    # This is a loop that may be empty, because under vmap a condition costs as much as both
    # branches. The means of the policy's metrics over updates are those over the policy's steps.
    due = (state.step + 1) % args.policy_delay == 0
    rounds = jnp.where(due, args.policy_delay, 0)
    names = ("policy_loss", "entropy", "alpha", "policy_grad_norm")
    zeros = dict.fromkeys(names, jnp.zeros(()))
    state, more = jax.lax.fori_loop(0, rounds, step, (state, zeros))

    online = {name: state.params[name] for name in state.targets}
    targets = optax.incremental_update(online, state.targets, args.target_rate)  # Eq. (SAC7)
    state = state.replace(targets=targets, step=state.step + 1, key=key)
    return state, metrics | more


MODES = ("greedy",)  # Ways to choose actions in evaluations.

# --- shared: many agents -------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("args", "mode"))
def act(args, state, observations, seeds, ages, mode):
    """Actions of all agents: (agents, E, S) -> (agents, E, 1, d), a plan of one step. The noise
    depends on nothing but the episode's seed and age in steps, (agents, E) each."""

    def one(state, observation, seed, age):
        key = jax.random.fold_in(jax.random.PRNGKey(seed), age)
        return sample_actions(args, state, observation[None], key, mode)

    return over_agents(jax.vmap(one, (None, 0, 0, 0)))(state, observations, seeds, ages)


def learn(args, state, sums, replay):
    """One update of every agent on its own transitions, drawn uniformly. Adds to the metrics."""

    def one(state, replay):
        key, rows_key = jax.random.split(state.key)
        filled = jnp.minimum(replay.size, len(replay.rewards))
        rows = jax.random.randint(rows_key, (args.batch_size,), 0, filled)
        batch = jax.tree.map(lambda x: x[rows] if x.ndim else x, replay)
        return update(args, state.replace(key=key), batch)

    state, metrics = over_agents(one)(state, replay)
    return state, jax.tree.map(jnp.add, sums, metrics) if sums else metrics


@partial(jax.jit, static_argnames="args", donate_argnames="state")
def train_chunk(args, state, sums, replay, updates):
    """`updates` gradient steps of all agents without leaving the device."""
    return jax.lax.fori_loop(0, updates, lambda _, x: learn(args, *x, replay), (state, sums))


@partial(jax.jit, static_argnames="args", donate_argnames=("state", "replay"))
def train_on_plane(args, state, sums, replay, world, done, steps):
    """The same where the environment is a function, too: steps `done` + 1 to `done` + `steps` of
    all agents in `multigoal` with the updates between them. `world`: position, age, seed."""

    def draw(seed, now):  # a start and a uniform action
        keys = jax.random.split(jax.random.fold_in(jax.random.PRNGKey(~seed), now))
        action = jax.random.uniform(keys[1], (2,), minval=-1, maxval=1)
        return 0.1 * jax.random.normal(keys[0], (2,)), action

    def step(i, carry):
        state, sums, replay, (position, age, seed) = carry
        now, learning = done + i + 1, done + i - args.warmup_steps + 1
        start, action = jax.vmap(draw, (0, None))(seed, now)
        position = jnp.where(age[:, None] == 0, start, position)
        inputs = position[:, None], seed[:, None], jnp.full((len(seed), 1), now)
        plan = act(args, state, *inputs, "explore")
        action = jnp.where(learning > 0, plan[:, 0, 0], action)
        due = (learning > 0) & (learning % args.env_steps_per_update == 0)
        state, sums = jax.lax.cond(due, partial(learn, args), lambda *x: x[:2], state, sums, replay)
        after, reward, reached = multigoal(position, action, jnp)
        over = reached | (age + 1 == MULTIGOAL_STEPS)
        row = dict(observations=position, actions=action, next_observations=after, rewards=reward)
        row |= dict(masks=1.0 - reached, terminals=1.0 * over)
        replay = replay.append({name: x[:, None] for name, x in row.items()})
        return state, sums, replay, (after, jnp.where(over, 0, age + 1), seed)

    return jax.lax.fori_loop(0, steps, step, (state, sums, replay, world))


# --- end shared ---

# --- shared: evaluate and main -------------------------------------------------------------------


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
    sizes = SimpleNamespace(observations=env.observation_space, actions=env.action_space)
    S, d = env.observation_space.shape[0], env.action_space.shape[0]
    args = dataclasses.replace(args, action_size=d)
    run = Run(Path(__file__).stem, args, agents, {})
    keys = jnp.stack([jax.random.fold_in(jax.random.PRNGKey(seed), task) for task, seed in agents])
    state = jax.jit(jax.vmap(partial(create, args, S)))(keys)
    capacity, count = min(args.replay_size, args.total_steps), len(agents)
    replay = Replay.create(count, capacity, sizes)
    size = sum(x.size for x in jax.tree.leaves(state.params)) // count
    print(f"{count} agents of {size:,} parameters, replay of {capacity:,} transitions")

    def policy(*inputs, mode):  # flat over agents and environments, for the pools
        inputs = [x.reshape(count, -1, *x.shape[1:]) for x in inputs]
        return np.concatenate(act(args, state, *inputs, mode))

    def explore(_, seeds, ages):  # uniform; without the 1, age 0 would repeat the reset's draws
        draw = lambda at: np.random.default_rng((*at, 1)).uniform(-1, 1, (1, d))
        return np.float32([draw(at) for at in zip(seeds, ages)])

    plane, names, everyone = args.env == "multigoal", [args.env] * count, range(count)
    eval_pool = EnvPool(names, args.workers, min(args.eval_slots, args.eval_episodes))
    pool = EnvPool([] if plane else names, args.workers)
    first = [seed_of(seed, task, 0) for task, seed in agents]
    world = np.zeros((count, S), np.float32), np.zeros(count, np.int32), np.array(first, np.uint32)
    shapes = jax.eval_shape(partial(learn, args), state, None, Replay.create(count, 1, sizes))[1]
    zeros = spread(jax.tree.map(lambda x: jnp.zeros(x.shape), shapes))
    keep = lambda *means: dict(
        state=state, replay=replay, pool=pool.save(), world=world, means=means
    )
    done, saved = run.restore(keep(zeros, 0))
    state, replay, world = spread((saved["state"], saved.pop("replay"), saved["world"]))
    sums, updates = spread(saved["means"][0]), saved["means"][1]
    order = np.arange(max(0, done - capacity), done) % capacity  # from the oldest on
    pool.load(saved["pool"], np.asarray(replay.actions)[:, order[: done * (not plane)]])

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

    total, result, steps = args.total_steps, None, 1
    halts = lambda: done == total or done % args.eval_interval == 0
    due = lambda n: max(0, n - args.warmup_steps) // args.env_steps_per_update  # updates until n
    bar = tqdm(initial=done, total=total, unit="step", dynamic_ncols=True, disable=None)
    while run.last["eval"] < total and not args.eval_only:
        if run.last["eval"] < done and halts():
            result = report("eval")
            continue
        if plane:
            steps = min(n - done % n for n in (args.log_interval, args.eval_interval, total))
            carry = state, sums, replay, world
            state, sums, replay, world = train_on_plane(args, *carry, done, steps)
        else:
            if not done:
                pool.start(everyone, first)
            choose = partial(policy, mode="explore") if done >= args.warmup_steps else explore
            plan = choose(np.stack(pool.states), pool.seeds, pool.ages)
            # The device works on the update while the environments make their step.
            state, sums = train_chunk(args, state, sums, replay, due(done + 1) - due(done))
            taken = pool.step(lambda *_: plan, everyone)
            replay = replay.append({name: x[:, None] for name, x in taken.items()})
            over = np.flatnonzero(taken["terminals"]).tolist()
            pool.start(over, [seed_of(*agents[i][::-1], done + 1, TRAINING) for i in over])
        done, updates = done + steps, updates + due(done + steps) - due(done)
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
