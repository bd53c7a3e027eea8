"""CGQL: Classifier-Guided Q-Learning, with CGQL-MSE and CGQL-Linex, the baselines of QAM (Li and
Levine, ICLR 2026, arXiv:2601.14234), after classifier guidance (Dhariwal and Nichol 2021).

A flow f_beta imitates the data, and there is no other policy: when an action is sampled, the
velocity that would generate exp(tau Q) is added to the flow's. This velocity follows from a score,
which is approximated by tau grad Q at the noisy action. --guidance chooses the critic: `plain` asks
the critic of clean actions; `mse` and `linex` also train it on noisy actions, and ask it at their
time.

    v = f_beta(s, x, t) + vartheta ((1 - t) tau grad_x Q(s, x, 1) + x) / t           Eq. (61), (62)
    v = f_beta(s, x, t) + vartheta ((1 - t) tau grad_x Q(s, x, t) + x) / t                Eq. (73)

Equation numbers are the paper's, see docs/equations.md. docs/cgql.md lists every difference between
the paper, the official code and this file, which follows the official code (`# ref:`).

    python baselines/cgql.py                   the point maze, a few minutes on a CPU
    python baselines/cgql.py --env cube-double --guidance linex --tasks 1 2 3 4 5 --num-seeds 4

Shapes: B batch, S observation, H chunk length, d action, A = H d flattened chunk, T flow steps,
K critics, N agents (tasks x seeds) trained at once.
"""

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Literal

if __name__ == "__main__":  # `python baselines/x.py` finds common/ next to baselines/
    sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax import Array
from tqdm import tqdm

from common.data import Batch, Replay, Shards, locate, over_agents, sample, spread
from common.envs import TRAINING, EnvPool, resolve, seed_of
from common.errors import UserError
from common.flags import NonNegativeFloat, PositiveFloat, PositiveInt, UnitInterval
from common.networks import Critic, Field
from common.run import Precision, Run, ours, parse


@dataclasses.dataclass(frozen=True)
class Args:
    # --- method ---
    # Which critic guides: that of clean actions, or one trained on noisy actions by either loss.
    guidance: Literal["plain", "mse", "linex"] = "plain"
    # Weight vartheta of the guidance: one value, or one each for plain, mse and linex; 0 clones.
    guidance_coef: tuple[NonNegativeFloat, ...] = (0.1,)
    # Weight varrho of the loss at noisy actions: one value, or one each; `plain` does not use it.
    noisy_coef: tuple[NonNegativeFloat, ...] = (0.1,)
    # Inverse temperature tau of exp(tau Q), whose score guides.
    inv_temp: NonNegativeFloat = 1.0
    # A target is the mean minus this many standard deviations of the critics.
    pessimism: NonNegativeFloat = 0.5
    flow_steps: PositiveInt = 10  # Euler steps T from noise to action.

    # --- networks and optimiser ---
    # Hidden-layer widths of all networks.
    hidden_dims: tuple[PositiveInt, ...] = (512, 512, 512, 512)
    num_critics: PositiveInt = 10  # Number of critics K in the ensemble.
    batch_size: PositiveInt = 256  # Batch size B, in chunks.
    lr: PositiveFloat = 3e-4  # Adam's learning rate.
    target_rate: UnitInterval = 0.005  # Step size of the moving averages (target networks).

    # --- shared: run arguments ---
    env: str = "pointmaze-medium"  # short name (puzzle-4x4), dataset or full OGBench name
    tasks: tuple[int, ...] = (1,)  # tasks 1..5, trained at once on one copy of the data
    seed: int = 0  # first seed; an agent does not depend on those trained beside it
    num_seeds: int = 1  # seeds per task: seed, seed + 1, ...
    name: str = "default"  # of the run's folder runs/<script>/<env>/<name>
    run_dir: str = "runs"  # where the folders of all runs are
    dataset_dir: str = ""  # OGBench's files or 100M shards (default: OGBench's cache, then data/)
    collect: int = 0  # make a missing dataset: transitions of OGBench's scripted expert
    offline_steps: int = 1_000_000  # gradient updates on the dataset
    online_steps: int = 0  # then environment steps, each with an update (paper: 500,000)
    start_training: int = 5_000  # first environment step that is followed by an update
    log_interval: int = 5_000  # updates between two rows of train.csv (means over them)
    eval_interval: int = 50_000  # updates between two evaluations, each with a checkpoint
    eval_episodes: int = 50  # episodes per evaluation and agent
    eval_slots: int = 10  # environments that share them, per agent; at most 100 in all
    workers: int = 0  # processes that step environments (0: one per core)
    eval_only: bool = False  # evaluate the run's checkpoint and do nothing else
    track: bool = False  # log to Weights & Biases, too
    compile_cache: str = ""  # folder of compiled programs (default: run_dir/.compiled), or none
    precision: Precision = "default"  # of matrix products on a GPU (NVIDIA's default: TF32)
    chunk_length: int = 5  # H: actions chosen at once and played open loop
    discount: float = 0.99  # gamma, per environment step
    sparse: bool = False  # reward -1 until all is done (else minus the number of unmet sub-goals)
    action_size: tyro.conf.Suppress[int] = 0  # d, no flag: read from the dataset
    # --- end shared ---

    def __post_init__(self) -> None:
        if self.flow_steps < 2:
            raise UserError("--flow-steps must be at least 2, because the first step is not guided")
        lengths = {len(self.guidance_coef), len(self.noisy_coef)}
        if not lengths <= {1, 3}:
            raise UserError("--guidance-coef and --noisy-coef must have one value or three each")


# The coefficients of the ten domains, for plain, mse and linex, come from the launch script of the
# official repository and from the paper. The point maze is not in the paper: its networks are small
# enough for a CPU (docs/cgql.md).
ENV_DEFAULTS = {
    "antmaze-large": dict(
        inv_temp=10.0,
        guidance_coef=(0.1, 0.1, 0.1),
        noisy_coef=(0.0, 0.1, 0.001),
    ),
    "antmaze-giant": dict(
        inv_temp=10.0,
        guidance_coef=(0.1, 0.1, 0.1),
        noisy_coef=(0.0, 0.001, 0.001),
    ),
    "humanoidmaze-medium": dict(
        inv_temp=10.0,
        guidance_coef=(0.01, 0.1, 0.1),
        noisy_coef=(0.0, 0.1, 0.1),
    ),
    "humanoidmaze-large": dict(
        inv_temp=10.0,
        guidance_coef=(0.01, 0.1, 0.1),
        noisy_coef=(0.0, 0.1, 0.1),
    ),
    "scene": dict(
        inv_temp=10.0,
        guidance_coef=(0.1, 0.1, 0.1),
        noisy_coef=(0.0, 0.1, 0.1),
    ),
    "puzzle-3x3": dict(
        inv_temp=10.0,
        guidance_coef=(0.1, 0.1, 0.1),
        noisy_coef=(0.0, 0.1, 0.001),
    ),
    "puzzle-4x4": dict(
        inv_temp=10.0,
        guidance_coef=(0.1, 1.0, 1.0),
        noisy_coef=(0.0, 0.001, 0.001),
    ),
    "cube-double": dict(
        inv_temp=10.0,
        guidance_coef=(0.01, 0.01, 0.01),
        noisy_coef=(0.0, 0.001, 0.001),
    ),
    "cube-triple": dict(
        inv_temp=10.0,
        guidance_coef=(0.1, 0.1, 0.1),
        noisy_coef=(0.0, 0.001, 0.001),
    ),
    "cube-quadruple": dict(
        inv_temp=10.0,
        guidance_coef=(0.1, 0.01, 0.01),
        noisy_coef=(0.0, 0.1, 0.1),
    ),
    "pointmaze-medium": dict(
        inv_temp=10.0,
        guidance_coef=(0.1, 0.1, 0.1),
        noisy_coef=(0.0, 0.1, 0.1),
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

    params: dict  # critic (phi), behavior (beta)
    targets: dict  # moving averages of critic and behavior
    opt_state: optax.OptState
    key: Array  # (2,) uint32


def optimizer(args: Args) -> optax.GradientTransformation:
    """Returns Adam."""
    return optax.adam(args.lr)


def create(args: Args, observation_size: int, key: Array) -> State:
    """Creates an agent.

    The critic takes a time in every mode; at time 1 actions are clean.
    """
    key, critic_key, behavior_key = jax.random.split(key, 3)
    s = jnp.zeros((1, observation_size))
    a = jnp.zeros((1, args.chunk_length * args.action_size))
    t = jnp.zeros((1, 1))
    params = dict(
        critic=Critic(args.hidden_dims, args.num_critics).init(critic_key, s, a, t),
        behavior=Field(args.hidden_dims).init(behavior_key, s, a, 0.0),
    )
    targets = jax.tree.map(jnp.copy, params)
    return State(params, targets, optimizer(args).init(params), key)


# --- the method ----------------------------------------------------------------------------------


def critic(args: Args, params: dict, observations: Array, actions: Array, t: Array) -> Array:
    """Evaluates the critics Q^1..Q^K of actions at time t.

    (B, S), (B, A) and a time that broadcasts to (B,) -> (K, B).
    """
    network = Critic(args.hidden_dims, args.num_critics)
    t = jnp.broadcast_to(t, actions.shape[:-1])[..., None]
    return network.apply(params, observations, actions, t)


def field(args: Args, params: dict, observations: Array, x: Array, t: Array) -> Array:
    """Evaluates a velocity field at (s, x, t).

    (B, S), (..., B, A) and a time that broadcasts to (..., B) -> (..., B, A).
    """
    return Field(args.hidden_dims).apply(params, observations, x, t)


def coefficient(args: Args, values: tuple[float, ...]) -> float:
    """Returns the value for this run's guidance, where `values` has one for all or one for each."""
    if len(values) == 1:
        return values[0]
    kinds = ("plain", "mse", "linex")
    return values[kinds.index(args.guidance)]


def guide(args: Args, state: State, observations: Array, x: Array, t: Array) -> Array:
    """Computes the velocity that would generate exp(tau Q), at a time t > 0.

    (B, S), (B, A), () -> (B, A).
    """
    time = 1.0 if args.guidance == "plain" else t

    def value(actions):  # ref: online critics, their mean; x is not clipped
        return critic(args, state.params["critic"], observations, actions, time).mean(0).sum()

    gradient = jax.grad(value)(x)
    return ((1 - t) * args.inv_temp * gradient + x) / t  # Eq. (61), (73)


def integrate(args: Args, state: State, observations: Array, z: Array) -> Array:
    """Solves the ODE of the guided flow by T Euler steps: (B, S), (B, A) -> (B, A) in [-1, 1]."""
    base = state.targets["behavior"]
    weight = coefficient(args, args.guidance_coef)

    def euler(x, t):
        velocity = field(args, base, observations, x, t)
        velocity += weight * guide(args, state, observations, x, t)  # Eq. (62)
        return x + velocity / args.flow_steps, None

    # The first step, at t = 0, is not guided.
    velocity = field(args, base, observations, z, 0.0)
    x = z + velocity / args.flow_steps
    times = jnp.arange(1, args.flow_steps) / args.flow_steps
    x, _ = jax.lax.scan(euler, x, times)
    return jnp.clip(x, -1, 1)  # only here, not between the steps


def sample_actions(args: Args, state: State, observations: Array, key: Array) -> Array:
    """Samples a = ODE(v; s, z) with z ~ N(0, I): (B, S) -> (B, A) in [-1, 1]."""
    z = jax.random.normal(key, (len(observations), args.chunk_length * args.action_size))
    return integrate(args, state, observations, z)


# A loss differentiates `params` only; `state` and `batch` are constants. It returns its value and
# its metrics, whose names differ from those of all other losses.


def critic_loss(
    args: Args, params: dict, state: State, batch: Batch, key: Array
) -> tuple[Array, dict]:
    """Computes the TD error of every critic against one pessimistic target."""
    # ref: the deviation is the population one (1/K).
    next_actions = sample_actions(args, state, batch.next_observations, key)
    next_q = critic(args, state.targets["critic"], batch.next_observations, next_actions, 1.0)
    next_value = next_q.mean(0) - args.pessimism * next_q.std(0)  # Eq. (26)
    target = batch.rewards + args.discount**args.chunk_length * batch.masks * next_value
    q = critic(args, params["critic"], batch.observations, batch.actions, 1.0)
    loss = (batch.valid * (q - target) ** 2).mean()  # Eq. (23)
    metrics = dict(
        critic_loss=loss,
        q=q.mean(),
        q_std=q.std(0).mean(),
        target=target.mean(),
    )
    return loss, metrics


def behavior_loss(
    args: Args, params: dict, state: State, batch: Batch, key: Array
) -> tuple[Array, dict]:
    """Matches f_beta to the data: along x_t = (1 - t) z + t a the velocity is a - z."""
    z_key, t_key = jax.random.split(key)
    actions = batch.actions
    z = jax.random.normal(z_key, actions.shape)
    t = jax.random.uniform(t_key, batch.valid.shape)
    x = (1 - t[:, None]) * z + t[:, None] * actions
    velocity = field(args, params["behavior"], batch.observations, x, t)
    errors = ((velocity - (actions - z)) ** 2).mean(-1)
    loss = (batch.valid * errors).mean()  # Eq. (17)
    return loss, dict(behavior_loss=loss)


def noisy_critic_loss(
    args: Args, params: dict, state: State, batch: Batch, key: Array
) -> tuple[Array, dict]:
    """Trains every critic at a noisy action on its target copy's value of the clean one.

    It learns the mean of this value over all clean actions (mse), or (1 / tau) log of the mean of
    exp(tau Q) (linex).
    """
    z_key, t_key = jax.random.split(key)
    z = jax.random.normal(z_key, batch.actions.shape)
    t = jax.random.uniform(t_key, batch.valid.shape)
    x = (1 - t[:, None]) * z + t[:, None] * batch.actions
    clean_q = critic(args, state.targets["critic"], batch.observations, batch.actions, 1.0)
    noisy_q = critic(args, params["critic"], batch.observations, x, t)
    if args.guidance == "mse":
        errors = (noisy_q - clean_q) ** 2  # Eq. (72)
    else:  # ref: the paper prints the two cases the other way round
        delta = args.inv_temp * (clean_q - noisy_q)
        linex = jnp.exp(jnp.minimum(delta, 5)) + args.inv_temp * noisy_q
        errors = jnp.where(delta > 5, delta, linex)  # Eq. (71)
    loss = (batch.valid * errors).mean()
    return coefficient(args, args.noisy_coef) * loss, dict(noisy_loss=loss)


def update(args: Args, state: State, batch: Batch) -> tuple[State, dict]:
    """Makes one gradient step on the sum of all losses, all at the parameters before the step."""
    key, *keys = jax.random.split(state.key, 4)
    losses = [critic_loss, behavior_loss, noisy_critic_loss]
    if args.guidance == "plain":  # no critic sees noisy actions
        losses.pop()
        keys.pop()

    def total_loss(params):
        total = 0.0
        metrics = {}
        for loss, loss_key in zip(losses, keys, strict=True):
            value, loss_metrics = loss(args, params, state, batch, loss_key)
            total += value
            metrics |= loss_metrics
        return total, metrics

    grads, metrics = jax.grad(total_loss, has_aux=True)(state.params)
    metrics["grad_norm"] = optax.global_norm(grads)
    updates, opt_state = optimizer(args).update(grads, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    # ref: the targets move towards the parameters from before this step.
    online = {name: state.params[name] for name in state.targets}
    targets = optax.incremental_update(online, state.targets, args.target_rate)
    return State(params, targets, opt_state, key), metrics


# --- shared: many agents -------------------------------------------------------------------------


@partial(jax.jit, static_argnames="args")
def act(args, state, observations, seeds, ages):
    """Chunks of actions for all agents: (N, E, S) -> (N, E, H, d). The noise depends on nothing
    but the episode's seed and age in steps, (N, E) each."""

    def one(state, observation, seed, age):
        key = jax.random.fold_in(jax.random.PRNGKey(seed), age)
        actions = sample_actions(args, state, observation[None], key)
        return actions.reshape(args.chunk_length, args.action_size)

    return over_agents(jax.vmap(one, (None, 0, 0, 0)))(state, observations, seeds, ages)


@partial(jax.jit, static_argnames="args", donate_argnames="state")
def train_chunk(args, state, data, replay, task, updates):
    """`updates` gradient steps of all agents without leaving the device. `state`, `replay` and
    `task` (row of data.rewards) have a leading axis N. Returns the state and the sums of the
    metrics over the updates."""

    def one(state, replay, task):
        def step(state):
            key, batch_key = jax.random.split(state.key)
            sizes = args.batch_size, args.chunk_length, args.discount
            batch = sample(batch_key, data, replay, task, *sizes)
            return update(args, state.replace(key=key), batch)

        def body(_, carry):
            state, metrics = step(carry[0])
            return state, jax.tree.map(jnp.add, carry[1], metrics)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), jax.eval_shape(step, state)[1])
        return jax.lax.fori_loop(0, updates, body, (state, zeros))

    return over_agents(one, chunk=not replay.rewards.size)(state, replay, task)


# --- end shared ---

# --- shared: evaluate and main -------------------------------------------------------------------


def evaluate(args, policy, pool, agents, step):
    """Exactly args.eval_episodes episodes of every agent, seeded by (seed, task, step, episode):
    the same for every method. Returns (N, episodes) arrays, see `EnvPool.play`."""
    episodes = range(args.eval_episodes)
    seeds = [[seed_of(seed, task, step, e) for e in episodes] for task, seed in agents]
    return pool.play(policy, np.array(seeds, np.uint32))


def main(args):
    """Trains all agents and leaves a run folder, see common/run.py. Returns its evaluations."""
    source = resolve(args.env)
    agents = ours([(task, args.seed + i) for task in args.tasks for i in range(args.num_seeds)])
    names = [f"{source.env}-singletask-task{task}-v0" for task, _ in agents]
    paths, N = locate(source, args.dataset_dir, args.collect), len(agents)
    shards = Shards(paths, source, args.tasks, args.sparse, args.chunk_length, N)
    data, _ = shards.at(0)
    args = dataclasses.replace(args, action_size=data.actions.shape[-1])
    files = dict(files=[path.name for path in paths], transitions=len(data.rows))
    run = Run(Path(__file__).stem, args, agents, files)
    keys = jnp.stack([jax.random.fold_in(jax.random.PRNGKey(seed), task) for task, seed in agents])
    state = jax.jit(jax.vmap(partial(create, args, data.observations.shape[-1])))(keys)
    task = jnp.array([args.tasks.index(task) for task, _ in agents])
    replay = Replay.create(N, 0, data)
    size = sum(x.size for x in jax.tree.leaves(state.params)) // N
    print(f"{N} agents of {size:,} parameters, {len(data.rows):,} transitions")

    def policy(*inputs):  # flat over agents and environments, for the pools
        inputs = [x.reshape(N, -1, *x.shape[1:]) for x in inputs]
        return np.concatenate(act(args, state, *inputs))

    eval_pool = EnvPool(names, args.workers, min(args.eval_slots, args.eval_episodes))
    pool, everyone = EnvPool(names if args.online_steps else [], args.workers), range(N)
    shapes = jax.eval_shape(partial(train_chunk, args), state, data, replay, task, 0)[1]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
    keep = lambda *means: dict(state=state, replay=replay, pool=pool.save(), means=means)
    done, saved = run.restore(keep(zeros, 0))
    state, replay = spread((saved["state"], saved.pop("replay")))
    pool.load(saved["pool"], np.asarray(replay.actions)[:, : int(replay.size[0])])

    @run.saved()
    def report(table):
        result = evaluate(args, policy, eval_pool, agents, done)
        scores = {name: x.mean(1) for name, x in result.items() if name != "path"}
        run.log(table, done, scores)
        bar.write(f"{done:,} updates: success {scores['success'].mean():.2f}")
        return result

    total, result, (sums, updates) = args.offline_steps + args.online_steps, None, saved["means"]
    halts = lambda: done in (args.offline_steps, total) or done % args.eval_interval == 0
    bar = tqdm(initial=done, total=total, unit="update", dynamic_ncols=True, disable=None)
    while run.last["eval"] < total and not args.eval_only:
        if run.last["eval"] < done and halts():
            result = report("eval")
            continue
        if done < args.offline_steps:
            data, stays = shards.at(done + 1)
            limit = min(n - done % n for n in (args.log_interval, args.eval_interval))
            steps = trained = min(limit, stays, args.offline_steps - done)
        else:
            now = done - args.offline_steps + 1  # the environment step that every agent takes
            data, _ = shards.at(now, args.offline_steps // shards.interval)
            if replay.rewards.shape[1] < args.online_steps:
                replay = spread(Replay.create(N, args.online_steps, data))
            if now == 1:
                pool.start(everyone, [seed_of(seed, task, 0) for task, seed in agents])
            taken = pool.step(policy, everyone)
            taken["rewards"] = -1.0 * (taken["rewards"] != 0) if args.sparse else taken["rewards"]
            replay = replay.append({name: x[:, None] for name, x in taken.items()})
            over = np.flatnonzero(taken["terminals"]).tolist()
            pool.start(over, [seed_of(*agents[i][::-1], now, TRAINING) for i in over])
            steps, trained = 1, int(now >= args.start_training)
        state, metrics = train_chunk(args, state, data, replay, task, trained)
        sums = jax.tree.map(jnp.add, sums, metrics)
        done, updates = done + steps, updates + trained
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
