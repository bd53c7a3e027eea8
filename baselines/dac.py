"""DAC: Diffusion Actor-Critic (Fang et al., ICLR 2025), with chunks of actions, as in the
comparison of QAM (Li and Levine, ICLR 2026, arXiv:2601.14234).

A diffusion policy learns to predict the noise in a noisy action of the data and, in the same
regression, to move its prediction against the critic's gradient at the noisy action. So it imitates
the data's score and is guided at once. No gradient is back-propagated through the denoising chain.

    x = sqrt(abar_i) a + sqrt(1 - abar_i) eps,  i ~ U{1..T},  eps ~ N(0, I)               Eq. (48)
    L(theta) = E[eta |eps - e_theta(s, x, i)|^2 / A                                       Eq. (50)
                 + sqrt(1 - abar_i) grad_x Q(s, x) . e_theta(s, x, i) / A]                Eq. (55)

The best prediction is E[eps | x] - sqrt(1 - abar_i) grad_x Q(s, x) / (2 eta), which would be the
score of pi_beta exp(Q / (2 eta)) if grad Q at noisy actions were that of the noisy value. Equation
numbers are those of Li and Levine 2026, see docs/equations.md. docs/dac.md lists every difference
between the papers, the official QAM code and this file, which follows that code (`# ref:`).

    python baselines/dac.py                    the point maze, a few minutes on a CPU
    python baselines/dac.py --env cube-double --tasks 1 2 3 4 5 --num-seeds 4

Shapes: B batch, S observation, H chunk length, d action, A = H d flattened chunk, T denoising
steps, K critics, N agents (tasks x seeds) trained at once.
"""

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # `python baselines/x.py` finds common/ next to baselines/
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

from common.data import Batch, Replay, Shards, locate, over_agents, sample, spread
from common.envs import TRAINING, EnvPool, resolve, seed_of
from common.flags import NonNegativeFloat, PositiveFloat, PositiveInt, UnitInterval
from common.networks import Critic, Dense
from common.run import Precision, Run, ours, parse


@dataclasses.dataclass(frozen=True)
class Args:
    # --- method ---
    # Weight eta of the denoising loss on the data (behaviour cloning).
    bc_coef: NonNegativeFloat = 1.0
    # A target is the mean minus this many standard deviations of the critics.
    pessimism: NonNegativeFloat = 0.5
    flow_steps: PositiveInt = 10  # Denoising steps T from noise to action.

    # --- networks and optimiser ---
    # Hidden-layer widths of all networks.
    hidden_dims: tuple[PositiveInt, ...] = (512, 512, 512, 512)
    num_critics: PositiveInt = 10  # Number of critics K in the ensemble.
    batch_size: PositiveInt = 256  # Batch size B, in chunks.
    lr: PositiveFloat = 3e-4  # Adam's learning rate.
    target_rate: UnitInterval = 0.005  # Step size of the moving averages (target networks).
    grad_clip: PositiveFloat = 1.0  # Largest norm of the joint gradient of all networks.

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


# The weights of the ten domains come from the launch script of the official QAM repository and from
# its paper. The point maze is not in the paper: its networks are small enough for a CPU
# (docs/dac.md).
ENV_DEFAULTS = {
    "antmaze-large": dict(bc_coef=0.3),
    "antmaze-giant": dict(bc_coef=0.3),
    "humanoidmaze-medium": dict(bc_coef=1.0),
    "humanoidmaze-large": dict(bc_coef=0.3),
    "scene": dict(bc_coef=1.0),
    "puzzle-3x3": dict(bc_coef=1.0),
    "puzzle-4x4": dict(bc_coef=1.0),
    "cube-double": dict(bc_coef=3.0),
    "cube-triple": dict(bc_coef=0.3),
    "cube-quadruple": dict(bc_coef=1.0),
    "pointmaze-medium": dict(
        bc_coef=1.0,
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

    params: dict  # critic (phi), policy (theta)
    targets: dict  # moving average of critic
    opt_state: optax.OptState
    key: Array  # (2,) uint32


def optimizer(args: Args) -> optax.GradientTransformation:
    """Returns Adam with a clipped gradient."""
    # ref: the papers' text clips element by element; code and table clip the joint norm.
    clip = optax.clip_by_global_norm(args.grad_clip)
    return optax.chain(clip, optax.adam(args.lr))


def create(args: Args, observation_size: int, key: Array) -> State:
    """Creates an agent. The policy has no target copy."""
    key, critic_key, policy_key = jax.random.split(key, 3)
    s = jnp.zeros((1, observation_size))
    a = jnp.zeros((1, args.chunk_length * args.action_size))
    params = dict(
        critic=Critic(args.hidden_dims, args.num_critics).init(critic_key, s, a),
        policy=NoisePredictor(args.hidden_dims).init(policy_key, s, a, 1),
    )
    targets = dict(critic=jax.tree.map(jnp.copy, params["critic"]))
    return State(params, targets, optimizer(args).init(params), key)


# --- the method ----------------------------------------------------------------------------------


class NoisePredictor(nn.Module):
    """Computes e(s, x, i): (B, S), (B, A), step i that broadcasts to (B,) -> (B, A).

    Sines and cosines of i with trainable frequencies pass through an MLP of their own. The
    activation is Mish, without LayerNorm.
    """

    hidden: Sequence[int]

    @nn.compact
    def __call__(self, observations: Array, x: Array, i: Array) -> Array:
        # ref: i is the integer 1..T itself, not i / T
        frequencies = self.param("frequencies", nn.initializers.normal(0.2), (32,))
        steps = jnp.broadcast_to(i, x.shape[:-1])[..., None]
        angles = 2 * jnp.pi * steps * frequencies
        code = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)
        for width in self.hidden[:-1]:
            code = jax.nn.mish(Dense(width)(code))
        code = Dense(self.hidden[-1])(code)  # linear
        y = jnp.concatenate([x, observations, code], -1)
        for width in self.hidden:
            y = jax.nn.mish(Dense(width)(y))
        return Dense(x.shape[-1])(y)


def critic(args: Args, params: dict, observations: Array, actions: Array) -> Array:
    """Evaluates the critics Q^1..Q^K: (B, S), (B, A) -> (K, B)."""
    return Critic(args.hidden_dims, args.num_critics).apply(params, observations, actions)


def predict_noise(args: Args, params: dict, observations: Array, x: Array, i: Array) -> Array:
    """Evaluates e(s, x, i): (B, S), (B, A), step i of (B,) or () -> (B, A)."""
    return NoisePredictor(args.hidden_dims).apply(params, observations, x, i)


def schedule(args: Args) -> tuple[Array, Array]:
    """Computes a variance-preserving schedule, whose noise rate rises from 0.1 to 10.

    Returns abar_i, the share of the action's variance that is left after step i, and beta_i, the
    variance that step i adds: (T + 1,) each, where i = 0 has 1 and 0.
    """
    T = args.flow_steps
    i = jnp.arange(1, T + 1)
    rise = (10 - 0.1) * (2 * i - 1) / (2 * T**2)
    beta = 1 - jnp.exp(-0.1 / T - rise)  # Eq. (47)
    beta = jnp.concatenate([jnp.zeros(1), beta])
    abar = jnp.cumprod(1 - beta)  # Eq. (48)
    return abar, beta


def denoise(
    args: Args, policy: dict, observations: Array, x: Array, i: Array, noise: Array
) -> Array:
    """Samples x_{i-1} from its mean, given x_i and the estimate of the action, plus noise."""
    abar, beta = schedule(args)
    predicted = predict_noise(args, policy, observations, x, i)
    # ref: the estimate of the action itself; the paper prints the mean of x_{i-1}
    clean = (x - jnp.sqrt(1 - abar[i]) * predicted) / jnp.sqrt(abar[i])
    clean = jnp.clip(clean, -1, 1)  # Eq. (56)
    clean_weight = jnp.sqrt(abar[i - 1]) * beta[i]
    noisy_weight = jnp.sqrt(1 - beta[i]) * (1 - abar[i - 1])
    mean = (clean_weight * clean + noisy_weight * x) / (1 - abar[i])
    # ref: the deviation is sqrt(beta_i), not the posterior's. The last step adds no noise.
    deviation = jnp.where(i > 1, jnp.sqrt(beta[i]), 0)
    return mean + deviation * noise  # Eq. (57)


def sample_actions(args: Args, state: State, observations: Array, key: Array) -> Array:
    """Denoises a = x_0 from x_T ~ N(0, I) in T steps: (B, S) -> (B, A) in [-1, 1]."""
    start_key, noise_key = jax.random.split(key)
    action_size = args.chunk_length * args.action_size
    start = jax.random.normal(start_key, (len(observations), action_size))
    noises = jax.random.normal(noise_key, (args.flow_steps, *start.shape))
    countdown = jnp.arange(args.flow_steps, 0, -1)

    def step(x, inputs):
        i, noise = inputs
        return denoise(args, state.params["policy"], observations, x, i, noise), None

    x, _ = jax.lax.scan(step, start, (countdown, noises))
    return jnp.clip(x, -1, 1)  # rounding: x_0 is the clipped estimate


# A loss differentiates `params` only; `state` and `batch` are constants. It returns its value and
# its metrics, whose names differ from those of all other losses.


def critic_loss(
    args: Args, params: dict, state: State, batch: Batch, key: Array
) -> tuple[Array, dict]:
    """Computes the TD error of every critic against one pessimistic target."""
    # ref: a' comes from the online policy; the deviation is the population one (1/K).
    next_actions = sample_actions(args, state, batch.next_observations, key)
    next_q = critic(args, state.targets["critic"], batch.next_observations, next_actions)
    next_value = next_q.mean(0) - args.pessimism * next_q.std(0)  # Eq. (26)
    target = batch.rewards + args.discount**args.chunk_length * batch.masks * next_value
    q = critic(args, params["critic"], batch.observations, batch.actions)
    loss = (batch.valid * (q - target) ** 2).mean()  # Eq. (23)
    metrics = dict(
        critic_loss=loss,
        q=q.mean(),
        q_std=q.std(0).mean(),
        target=target.mean(),
    )
    return loss, metrics


def policy_loss(
    args: Args, params: dict, state: State, batch: Batch, key: Array
) -> tuple[Array, dict]:
    """Computes the denoising loss on the data's actions, and the guidance at the noisy ones."""
    step_key, noise_key = jax.random.split(key)
    i = jax.random.randint(step_key, batch.valid.shape, 1, args.flow_steps + 1)
    noise = jax.random.normal(noise_key, batch.actions.shape)
    abar_of_steps, _ = schedule(args)
    abar = abar_of_steps[i][:, None]
    x = jnp.sqrt(abar) * batch.actions + jnp.sqrt(1 - abar) * noise  # Eq. (48)

    def value(actions):  # ref: target critics, their mean; outside the box, too
        return critic(args, state.targets["critic"], batch.observations, actions).mean(0).sum()

    gradient = jax.grad(value)(x)
    predicted = predict_noise(args, params["policy"], batch.observations, x, i)
    errors = ((noise - predicted) ** 2).mean(-1)
    # ref: the official code raises an invalid sample's loss to the power 0: the same gradient.
    denoising = (batch.valid * errors).mean()  # Eq. (50)
    # ref: the factor sqrt(1 - abar) is in the code, not in the QAM paper's formula.
    pull = (jnp.sqrt(1 - abar) * gradient * predicted).mean(-1)
    guidance = (batch.valid * pull).mean()  # Eq. (55)
    loss = args.bc_coef * denoising + guidance
    metrics = dict(
        denoising_loss=denoising,
        guidance_loss=guidance,
        gradient_norm=jnp.linalg.norm(gradient, axis=-1).mean(),
        policy_loss=loss,
    )
    return loss, metrics


def update(args: Args, state: State, batch: Batch) -> tuple[State, dict]:
    """Makes one gradient step on the sum of all losses, all at the parameters before the step."""
    key, *keys = jax.random.split(state.key, 3)
    losses = [critic_loss, policy_loss]

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
