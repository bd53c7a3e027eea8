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

    python baselines/flame.py                        the plane with four goals, 3 minutes on a CPU
    python baselines/flame.py --env halfcheetah --num-seeds 5

Shapes: B batch, S observation, d action, M candidates per state, K proposals per point, n jumps;
agents (seeds) trained at once are the leading axis of all that `act` and `train_chunk` see.
"""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __name__ == "__main__":  # `python baselines/flame.py` finds common/ next to baselines/
    sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

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
from common.errors import UserError
from common.flags import NonNegativeFloat, PositiveFloat, PositiveInt, UnitInterval
from common.networks import LECUN, Critic, TimedMLP, mish
from common.run import Precision, Run, ours, parse


@dataclasses.dataclass(frozen=True)
class Args:
    # --- method ---
    reward_scale: NonNegativeFloat = 0.2  # Factor c of the rewards in the TD target.
    num_candidates: PositiveInt = 32  # Candidate actions M per state; the best one is used.
    num_proposals: PositiveInt = 100  # Noise draws K per point, weighted by their actions' values.
    time_min: PositiveFloat = 0.0054  # Earliest time in the policy's loss.
    time_max: PositiveFloat = 0.999  # Latest time in the policy's loss; times are uniform.
    alpha_init: PositiveFloat = 1.0  # Initial temperature alpha of the weights.
    alpha_lr: PositiveFloat = 5e-3  # Adam's learning rate of log alpha.
    alpha_period: PositiveInt = 100  # Critic updates per step of alpha.
    # Target entropy H*/d per action dimension; alpha falls while the entropy is above it.
    target_entropy: float = -1.0
    entropy_steps: PositiveInt = 5  # Number n of jumps along which the entropy is measured.
    trace_clip: PositiveFloat = 10.0  # Largest trace of one of these jumps, per action dimension.
    noise_scale: PositiveFloat = 0.01  # Standard deviation of the training noise, per alpha.
    policy_delay: PositiveInt = 2  # Critic updates per update of the policy and averages.
    # Weight of -Q(one-step action) in the policy's loss (variant "2" of the code: 1).
    q_gradient: NonNegativeFloat = 0.0

    # --- networks and optimiser ---
    hidden_dims: tuple[PositiveInt, ...] = (256, 256, 256)  # Hidden-layer widths of all networks.
    batch_size: PositiveInt = 256  # Batch size B, in transitions.
    actor_lr: PositiveFloat = 3e-4  # Adam's initial learning rate of the policy.
    # Final policy learning rate. The rate decays linearly between 12.5 % and 37.5 % of the updates.
    actor_lr_end: NonNegativeFloat = 3e-5
    critic_lr: PositiveFloat = 3e-4  # Adam's learning rate of the critics.
    target_rate: UnitInterval = 0.005  # Step size of the moving averages of critics and policy.

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

    def __post_init__(self):
        if not 0 < self.time_min < self.time_max < 1:
            raise UserError("--time-min and --time-max must be in order, between 0 and 1")


# The class holds the paper's values as far as they are known (docs/flame.md). The values for
# the plane are tuned here, with small networks for a CPU.
ENV_DEFAULTS = {
    "multigoal": dict(
        total_steps=15_000,
        warmup_steps=1_000,
        reward_scale=0.1,
        num_proposals=32,
        alpha_period=10,
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
    key: Array  # (2,) uint32


def planned_updates(args: Args) -> int:
    """Counts the updates of the whole run, which schedules refer to."""
    steps = args.total_steps - args.warmup_steps
    return max(1, steps // args.env_steps_per_update)


def optimizers(args: Args) -> dict[str, optax.GradientTransformation]:
    """Makes one Adam for each network and for log alpha; the policy's rate falls between two shares
    of the run, counted in its own updates."""
    start = int(0.125 * planned_updates(args) / args.policy_delay)
    end = int(0.375 * planned_updates(args) / args.policy_delay)
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
    critics = Critic(args.hidden_dims, 2, False, mish, LECUN)
    flow = TimedMLP(args.hidden_dims, scale=0.01)
    params = dict(
        critic=critics.init(critic_key, observations, actions),
        policy=flow.init(policy_key, observations, actions, 0.0, 0.0),
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


def critic(args: Args, params: dict, observations: Array, actions: Array) -> Array:
    """Computes Q_1 and Q_2: (B, S), (..., B, d) -> (2, ..., B)."""
    critics = Critic(args.hidden_dims, 2, False, mish, LECUN)
    return critics.apply(params, observations, actions)


def average_velocity(
    args: Args, params: dict, observations: Array, x: Array, r: Array, t: Array
) -> Array:
    """Computes u(x, r, t, s) over the times from t down to r, so that x_r = x_t - (t - r) u:
    (B, S), (..., B, d), times that broadcast to (..., B) -> (..., B, d)."""
    # Times are in [0, 1]; 100 times that, as in fmer.py, makes du/dt of Eq. (FLAME5) blow up.
    flow = TimedMLP(args.hidden_dims, scale=0.01)
    return flow.apply(params, observations, x, r, t)


def candidates(args: Args, flow: dict, observations: Array, key: Array, count: int) -> Array:
    """Draws `count` actions per state, in one jump each: (B, S) -> (count, B, d) in [-1, 1]."""
    # ref: that code draws 0.5 N(0, I) here, but trains with N(0, I)
    noise = jax.random.normal(key, (count, len(observations), args.action_size))
    u = average_velocity(args, flow, observations, noise, 0.0, 1.0)
    return jnp.clip(noise - u, -1, 1)  # Eq. (FLAME2)


def best(q: Array, actions: Array) -> Array:
    """Picks the action of the highest value: (M, B), (M, B, d) -> (B, d)."""
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
    # ref: that code clips to +-10 in all, less than what a policy of 17 dimensions must reach
    limit = args.trace_clip * d

    def jump(carry, inputs):
        x, result = carry
        key, t = inputs
        probe = jax.random.rademacher(key, x.shape, x.dtype)
        field = partial(average_velocity, args, flow, observations, r=t - h, t=t)
        u, change = jax.jvp(field, (x,), (probe,))
        trace = jnp.clip((probe * change).sum(-1), -limit, limit)
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
    """Computes the TD error of both critics against one soft target: next_actions (B, d),
    next_entropy (B,)."""
    next_q = critic(args, state.targets["critic"], batch.next_observations, next_actions)
    # ref: that code subtracts the entropy, and asks itself which sign is right
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
    low = (x - (1 - t)) / t  # Eq. (FLAME3): between low and high x_k is in the box
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

    # ref: that code makes one such pass for each of the K proposals
    _, change = jax.jvp(u, (x, t), (v, jnp.ones_like(t)))
    return v - (t - r)[:, None] * change


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
    """Makes one step of the critics; where they are due, one of the policy and of the averages,
    given the new critics, and one of alpha."""
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

    # Update the policy and the averages. This is a loop of 0 or 1 rounds: unlike a condition, it
    # spares many agents the work, too. That the key depends on the round keeps the compiler from
    # doing the work before the loop.
    def turn(i, carry):
        state, _ = carry
        return improve(args, state, batch, jax.random.fold_in(policy_key, i))

    shapes = jax.eval_shape(turn, 0, (state, None))[1]
    zeros = jax.tree.map(jnp.zeros_like, shapes)
    rounds = jnp.where(step % args.policy_delay == 0, 1, 0)
    state, more = jax.lax.fori_loop(0, rounds, turn, (state, zeros))
    # The means over updates are those over the policy's steps.
    metrics |= {name: args.policy_delay * x for name, x in more.items()}

    # Update alpha.
    excess = h.mean() - args.target_entropy * args.action_size  # Eq. (FLAME8)
    old = dict(log_alpha=state.log_alpha, moments=state.opt_state["alpha"])
    adam = optimizers(args)["alpha"]
    change, moments = adam.update(excess, old["moments"])
    log_alpha = jnp.maximum(state.log_alpha + change, jnp.log(1e-3))
    new = dict(log_alpha=log_alpha, moments=moments)
    due = step % args.alpha_period == 0
    new = jax.tree.map(partial(jnp.where, due), new, old)
    opt_state = state.opt_state | dict(alpha=new["moments"])
    return state.replace(log_alpha=new["log_alpha"], opt_state=opt_state), metrics


MODES = ("best", "single")  # Ways to choose evaluation actions; the first one is the method's.

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
