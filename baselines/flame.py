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
equation numbers are ours. docs/flame.md says what was chosen, `# ref:` what differs from that code.

    python -m baselines.flame                        the plane with four goals, 3 minutes on a CPU
    python -m baselines.flame --env halfcheetah --num-seeds 5

Shapes: B batch, S observation, d action, N candidates per state, K proposals per point, n jumps;
agents (seeds) trained at once are the leading axis of all that `act` and `train_chunk` see.
"""

import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from tqdm import tqdm

from common.data import Replay, over_agents, spread
from common.envs import MULTIGOAL_STEPS, TRAINING, EnvPool, make_env, multigoal, resolve, seed_of
from common.networks import LECUN, Critic, TimedMLP, mish
from common.run import Precision, Run, ours, parse


@dataclasses.dataclass(frozen=True)
class Args:
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

    # method
    reward_scale: float = 0.2  # c: factor of rewards in the TD target
    num_candidates: int = 32  # N: actions per state, of which the best counts
    num_proposals: int = 100  # K: draws of the noise per point, weighted by their actions' values
    time_min: float = 0.0054  # earliest time in the policy's loss
    time_max: float = 0.999  # latest time, where times are uniform
    alpha_init: float = 1.0  # first temperature of the weights
    alpha_lr: float = 5e-3  # Adam's learning rate of log alpha
    alpha_period: int = 100  # updates from one step of alpha to the next
    target_entropy: float = -1.0  # H*/d: alpha falls while the entropy is above
    entropy_steps: int = 5  # n: jumps of the run that measures the entropy
    trace_clip: float = 10.0  # largest trace of a jump there, per action dimension
    noise_scale: float = 0.01  # deviation of the noise added in training, per alpha
    policy_delay: int = 2  # updates between two of the policy and of the averages
    q_gradient: float = 0.0  # weight of -Q(one-step action) in the policy's loss (variant "2": 1)

    # networks and optimiser
    hidden_dims: tuple[int, ...] = (256, 256, 256)  # of all networks
    batch_size: int = 256  # B: transitions per update
    actor_lr: float = 3e-4  # Adam's learning rate of the policy, at first
    actor_lr_end: float = 3e-5  # and from 37.5 % of the updates on (linear from 12.5 %)
    critic_lr: float = 3e-4  # Adam's learning rate of the critics
    target_rate: float = 0.005  # rate of the moving averages of critics and policy

    def __post_init__(self):
        if not 0 < self.time_min < self.time_max < 1:
            raise SystemExit("--time-min and --time-max must be in order, between 0 and 1")


# The class holds the paper's values as far as they are known (docs/flame.md). The plane and the
# small networks there are for a CPU, tuned here.
ENV_DEFAULTS = {
    "multigoal": dict(
        total_steps=15_000, warmup_steps=1_000, reward_scale=0.1, num_proposals=32, alpha_period=10,
        actor_lr=1e-3, actor_lr_end=1e-3, critic_lr=1e-3, hidden_dims=(64, 64, 64), batch_size=32,
        log_interval=500, eval_interval=5_000, eval_episodes=100, eval_slots=100,
    ),
}  # fmt: skip


@flax.struct.dataclass
class State:
    """Everything that an agent carries from update to update."""

    params: dict  # critic (phi_1, phi_2), policy (theta)
    targets: dict  # moving averages of critic and policy
    opt_state: dict  # of critic, policy and alpha
    log_alpha: jax.Array  # (): temperature of weights and entropy
    step: jax.Array  # () int32: updates so far
    key: jax.Array  # (2,) uint32


def planned_updates(args):
    """Updates of the whole run, which schedules refer to."""
    return max(1, (args.total_steps - args.warmup_steps) // args.env_steps_per_update)


def optimizers(args):
    """Adam for both networks and log alpha; the policy's rate, which counts the policy's own steps,
    falls between two shares of the run."""
    at = [int(share * planned_updates(args) / args.policy_delay) for share in (0.125, 0.375)]
    rate = optax.linear_schedule(args.actor_lr, args.actor_lr_end, max(1, at[1] - at[0]), at[0])
    rates = dict(critic=args.critic_lr, policy=rate, alpha=args.alpha_lr)
    return {name: optax.adam(rate) for name, rate in rates.items()}


def create(args, observation_size, key) -> State:
    """A new agent, whose actions are almost clip(N(0, I)): the last layer starts near 0."""
    key, *keys = jax.random.split(key, 3)
    s, a = jnp.zeros((1, observation_size)), jnp.zeros((1, args.action_size))
    params = dict(
        critic=Critic(args.hidden_dims, 2, False, mish, LECUN).init(keys[0], s, a),
        policy=TimedMLP(args.hidden_dims, scale=0.01).init(keys[1], s, a, 0.0, 0.0),
    )
    log_alpha = jnp.float32(np.log(args.alpha_init))
    opt = optimizers(args)
    opt_state = {name: opt[name].init(x) for name, x in (params | dict(alpha=log_alpha)).items()}
    targets = jax.tree.map(jnp.copy, params)
    return State(params, targets, opt_state, log_alpha, jnp.int32(0), key)


# --- the method ----------------------------------------------------------------------------------


def critic(args, params, observations, actions):
    """Q_1, Q_2: (B, S), (..., B, d) -> (2, ..., B)."""
    return Critic(args.hidden_dims, 2, False, mish, LECUN).apply(params, observations, actions)


def average_velocity(args, params, observations, x, r, t):
    """u(x, r, t, s) over the times from t down to r, so that x_r = x_t - (t - r) u: (B, S),
    (..., B, d), times that broadcast to (..., B) -> (..., B, d)."""
    # Times in [0, 1]: 100 times that, as in fmer.py, makes du/dt of Eq. (FLAME5) blow up.
    return TimedMLP(args.hidden_dims, scale=0.01).apply(params, observations, x, r, t)


def candidates(args, flow, observations, key, count):
    """`count` samples per state, in one jump each: (B, S) -> (N, B, d) in [-1, 1]."""
    # ref: that code draws 0.5 N(0, I) here, but trains with N(0, I)
    noise = jax.random.normal(key, (count, len(observations), args.action_size))
    u = average_velocity(args, flow, observations, noise, 0.0, 1.0)
    return jnp.clip(noise - u, -1, 1)  # Eq. (FLAME2)


def choose(args, state, flow, observations, key, count, noise):
    """The best of `count` samples by the critics, plus noise of deviation `noise`: -> (B, d)."""
    keys = jax.random.split(key)
    actions = candidates(args, flow, observations, keys[0], count)
    q = critic(args, state.params["critic"], observations, actions).min(0)
    best = jnp.take_along_axis(actions, q.argmax(0)[None, :, None], 0)[0]
    return jnp.clip(best + noise * jax.random.normal(keys[1], best.shape), -1, 1)


def sample_actions(args, state, observations, key, mode):
    """(B, S) -> (B, d) in [-1, 1] by the averaged policy: "best" of N samples, in training
    ("explore") with noise; "single" (logged next to it) is one sample."""
    count = 1 if mode == "single" else args.num_candidates
    noise = args.noise_scale * jnp.exp(state.log_alpha) * (mode == "explore")
    return choose(args, state, state.targets["policy"], observations, key, count, noise)


def entropy(args, flow, observations, key):
    """Of the policy before clipping, along one run of n jumps per state: (B, S) -> (B,)."""
    keys = jax.random.split(key, args.entropy_steps + 1)
    x, h = jax.random.normal(keys[0], (len(observations), args.action_size)), 1 / args.entropy_steps
    result = 0.5 * args.action_size * jnp.log(2 * jnp.pi * jnp.e)
    # ref: that code clips to +-10 in all, less than what a policy of 17 dimensions must reach
    limit = args.trace_clip * args.action_size

    def jump(carry, inputs):
        (x, result), (key, t) = carry, inputs
        probe = jax.random.rademacher(key, x.shape, x.dtype)
        u = lambda x: average_velocity(args, flow, observations, x, t - h, t)
        speed, change = jax.jvp(u, (x,), (probe,))
        trace = jnp.clip((probe * change).sum(-1), -limit, limit)
        return (x - h * speed, result - h * trace), None  # Eq. (FLAME6)

    times = 1 - h * jnp.arange(args.entropy_steps)
    (_, result), _ = jax.lax.scan(jump, (x, jnp.full(len(x), result)), (keys[1:], times))
    return result


def critic_loss(args, params, state, batch, next_actions, next_entropy):
    """TD error of both critics against one soft target: next_actions (B, d), next_entropy (B,)."""
    value = critic(args, state.targets["critic"], batch.next_observations, next_actions).min(0)
    # ref: that code subtracts the entropy, and asks itself which sign is right
    value += jnp.exp(state.log_alpha) * next_entropy
    target = args.reward_scale * batch.rewards + args.discount * batch.masks * value  # Eq. (FLAME7)
    q = critic(args, params, batch.observations, batch.actions)
    loss = ((q - target) ** 2).sum(0).mean()
    return loss, dict(critic_loss=loss, q=q.mean(), target=target.mean())


def reweighted_velocity(args, critics, log_alpha, observations, x, t, key):
    """Velocity at x (B, d) and t (B,) of the path to the policy proportional to exp(Q / alpha) on
    the box, and the effective number of proposals: -> (B, d), ()."""
    t = t[:, None]
    low, high = (x - (1 - t)) / t, (x + (1 - t)) / t  # Eq. (FLAME3): then x_k is in the box
    noise = jax.random.truncated_normal(key, low, high, (args.num_proposals, *x.shape))
    actions = jnp.clip((x - t * noise) / (1 - t), -1, 1)  # but for rounding
    q = critic(args, critics, observations, actions).min(0)
    w = jax.nn.softmax((q - q.max(0)) / jnp.exp(log_alpha), 0)  # Eq. (FLAME4)
    return (w[..., None] * (noise - actions)).sum(0), (1 / (w**2).sum(0)).mean()


def meanflow_target(args, flow, observations, x, r, t, v):
    """What u should be at x (B, d) and times r <= t (B,), given the velocity v (B, d) there. It is
    linear in v, so v averaged over proposals does what the average of their targets would."""
    # ref: that code makes one such pass for each of the K proposals
    u = lambda x, t: average_velocity(args, flow, observations, x, r, t)
    _, change = jax.jvp(u, (x, t), (v, jnp.ones_like(t)))
    return v - (t - r)[:, None] * change


def policy_loss(args, params, state, observations, x, r, t, goal, key):
    """Regression of u at x (B, d) and times r <= t (B,) on the goal (B, d)."""
    u = average_velocity(args, params, observations, x, r, t)
    loss = ((u - goal) ** 2).sum(-1).mean()  # Eq. (FLAME5)
    metrics = dict(meanflow_loss=loss)
    if args.q_gradient:
        actions = candidates(args, params, observations, key, 1)[0]
        q = critic(args, state.targets["critic"], observations, actions).min(0)
        loss -= args.q_gradient * q.mean()  # Eq. (FLAME9)
    return loss, metrics


def descend(args, state, name, loss, *inputs):
    """The state after one step of Adam on a loss of params[name], all else being constant."""
    grads, metrics = jax.grad(partial(loss, args), has_aux=True)(state.params[name], state, *inputs)
    updates, opt_state = optimizers(args)[name].update(grads, state.opt_state[name])
    params = state.params | {name: optax.apply_updates(state.params[name], updates)}
    state = state.replace(params=params, opt_state=state.opt_state | {name: opt_state})
    return state, metrics | {f"{name}_grad_norm": optax.global_norm(grads)}


def improve(args, state, batch, key):
    """One step of the policy, then of all averages."""
    keys = jax.random.split(key, 4)
    s, params = batch.observations, state.params
    limits = dict(minval=args.time_min, maxval=args.time_max)
    r, t = jnp.sort(jax.random.uniform(keys[0], (2, len(s)), **limits), 0)
    noise = jax.random.normal(keys[1], batch.actions.shape)
    x = (1 - t[:, None]) * batch.actions + t[:, None] * noise  # Eq. (FLAME1)
    v, ess = reweighted_velocity(args, params["critic"], state.log_alpha, s, x, t, keys[2])
    goal = meanflow_target(args, params["policy"], s, x, r, t, v)
    state, metrics = descend(args, state, "policy", policy_loss, s, x, r, t, goal, keys[3])
    targets = optax.incremental_update(state.params, state.targets, args.target_rate)
    return state.replace(targets=targets), metrics | dict(ess=ess)


def update(args, state, batch):
    """One step of the critics; where they are due, one of the policy and of the averages, given the
    new critics, and one of alpha."""
    key, *keys = jax.random.split(state.key, 4)
    observations, flow = batch.next_observations, state.params["policy"]
    noise = args.noise_scale * jnp.exp(state.log_alpha)
    actions = choose(args, state, flow, observations, keys[0], args.num_candidates, noise)
    h = entropy(args, flow, observations, keys[1])
    state, metrics = descend(args, state, "critic", critic_loss, batch, actions, h)
    metrics |= dict(entropy=h.mean() / args.action_size, alpha=jnp.exp(state.log_alpha))
    step = state.step + 1
    state = state.replace(step=step, key=key)

    # A loop of 0 or 1 rounds: unlike a condition, it spares many agents the work, too. That the key
    # depends on the round keeps the compiler from doing the work before the loop.
    turn = lambda i, carry: improve(args, carry[0], batch, jax.random.fold_in(keys[2], i))
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(turn, 0, (state,))[1])
    due = jnp.where(step % args.policy_delay == 0, 1, 0)
    state, more = jax.lax.fori_loop(0, due, turn, (state, zeros))
    metrics |= {name: args.policy_delay * x for name, x in more.items()}  # right on average

    grads = h.mean() - args.target_entropy * args.action_size  # Eq. (FLAME8)
    old = state.log_alpha, state.opt_state["alpha"]
    updates, opt_alpha = optimizers(args)["alpha"].update(grads, old[1])
    new = jnp.maximum(old[0] + updates, jnp.log(1e-3)), opt_alpha
    new = jax.tree.map(partial(jnp.where, step % args.alpha_period == 0), new, old)
    opt_state = state.opt_state | dict(alpha=new[1])
    return state.replace(log_alpha=new[0], opt_state=opt_state), metrics


MODES = ("best", "single")  # of choosing actions in evaluations, the first one is the method's

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
