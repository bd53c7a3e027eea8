"""QAM-EDIT: QAM with a bounded edit of its actions (Li and Levine, ICLR 2026, arXiv:2601.14234).

QAM's flow f_theta stays on the support of the data. Here a small tanh-Gaussian policy pi_omega sees
state and flow action, and corrects the action by at most sigma_a per coordinate. It is trained as a
soft actor-critic with a tuned temperature (after EXPO, Dong et al. 2025, arXiv:2507.07986).

    dx = (2 f_theta(s, x, t) - x / t) dt + sigma_t dB,  sigma_t^2 = 2 (1 - t) / t         Eq. (19)
    dg = -g^T grad_x [2 f_beta(s, x, t) - x / t] dt,    g(1) = -tau grad_a Q(s, a)        Eq. (22)
    L(theta) = E int |2 (f_theta - f_beta) / sigma_t + sigma_t g|^2 dt                    Eq. (21)
    L(omega) = E[alpha log pi_omega(e|s, a~) - Q(s, clip(a~ + sigma_a e))],
        a~ = ODE(f_theta; s, z),  e = tanh u ~ pi_omega(.|s, a~)                          Eq. (31)

sigma_a = 0 is QAM. Equation numbers are the paper's; where paper and official code differ, this
file follows the code (`# ref:`), see docs/qam.md and docs/qam_edit.md.

    python qam_edit.py                               the point maze, a few minutes on a CPU
    python qam_edit.py --env cube-double --tasks 1 2 3 4 5

Shapes: B batch, S observation, H chunk length, d action, A = H d flattened chunk, T flow steps,
K critics, N agents (tasks x seeds) trained at once.
"""

import dataclasses
from functools import partial
from pathlib import Path

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
from common.networks import Critic, Field, TanhGaussian
from common.run import Precision, Run, ours, parse


@dataclasses.dataclass(frozen=True)
class Args:
    # --- method ---
    # Largest edit sigma_a of a coordinate; 0 is QAM, without an edit policy.
    edit_scale: NonNegativeFloat = 0.1
    # Inverse temperature tau of exp(tau Q); with 0 the flow is cloned.
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


# The ten domains have temperatures and edit scales of the official launch script. The values of the
# point maze, which is not in the paper, were tuned here (benchmarks/README.md).
ENV_DEFAULTS = {
    "antmaze-large": dict(inv_temp=1.0, edit_scale=0.1),
    "antmaze-giant": dict(inv_temp=10.0, edit_scale=0.1),
    "humanoidmaze-medium": dict(inv_temp=3.0, edit_scale=0.1),
    "humanoidmaze-large": dict(inv_temp=3.0, edit_scale=0.1),
    "scene": dict(inv_temp=1.0, edit_scale=0.0),
    "puzzle-3x3": dict(inv_temp=1.0, edit_scale=0.1),
    "puzzle-4x4": dict(inv_temp=0.1, edit_scale=0.9),
    "cube-double": dict(inv_temp=1.0, edit_scale=0.0),
    "cube-triple": dict(inv_temp=3.0, edit_scale=0.1),
    "cube-quadruple": dict(inv_temp=3.0, edit_scale=0.1),
    "pointmaze-medium": dict(
        inv_temp=1.0,
        edit_scale=0.1,
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

    params: dict  # critic (phi), behavior (beta), policy (theta), edit (omega), log_alpha
    targets: dict  # moving averages of critic and behavior
    opt_state: optax.OptState
    key: Array  # (2,) uint32


def optimizer(args: Args) -> optax.GradientTransformation:
    """Returns Adam with a clipped gradient."""
    # ref: the papers' text clips element by element; code and table clip the joint norm.
    clip = optax.clip_by_global_norm(args.grad_clip)
    return optax.chain(clip, optax.adam(args.lr))


def create(args: Args, observation_size: int, key: Array) -> State:
    """Creates an agent. f_theta is not a copy of f_beta: it has random weights of its own."""
    key, critic_key, behavior_key, policy_key = jax.random.split(key, 4)
    s = jnp.zeros((1, observation_size))
    a = jnp.zeros((1, args.chunk_length * args.action_size))
    params = dict(
        critic=Critic(args.hidden_dims, args.num_critics).init(critic_key, s, a),
        behavior=Field(args.hidden_dims).init(behavior_key, s, a, 0.0),
        policy=Field(args.hidden_dims).init(policy_key, s, a, 0.0),
    )
    targets = {name: jax.tree.map(jnp.copy, params[name]) for name in ("critic", "behavior")}
    if args.edit_scale > 0:
        actor = TanhGaussian(args.hidden_dims, a.shape[-1])
        params["edit"] = actor.init(jax.random.fold_in(policy_key, 1), s, a)
        params["log_alpha"] = jnp.zeros(())
    return State(params, targets, optimizer(args).init(params), key)


# --- the method ----------------------------------------------------------------------------------


def critic(args: Args, params: dict, observations: Array, actions: Array) -> Array:
    """Evaluates the critics Q^1..Q^K: (B, S), (B, A) -> (K, B)."""
    return Critic(args.hidden_dims, args.num_critics).apply(params, observations, actions)


def field(args: Args, params: dict, observations: Array, x: Array, t: Array) -> Array:
    """Evaluates a velocity field at (s, x, t).

    (B, S), (..., B, A) and a time that broadcasts to (..., B) -> (..., B, A).
    """
    return Field(args.hidden_dims).apply(params, observations, x, t)


def integrate(args: Args, flow: dict, observations: Array, z: Array) -> Array:
    """Solves the flow's ODE from noise z by T Euler steps: (B, S), (B, A) -> (B, A) in [-1, 1]."""

    def euler(x, t):
        velocity = field(args, flow, observations, x, t)
        return x + velocity / args.flow_steps, None

    times = jnp.arange(args.flow_steps) / args.flow_steps
    x, _ = jax.lax.scan(euler, z, times)
    return jnp.clip(x, -1, 1)  # only here, not between the steps


def edit(
    args: Args, params: dict, observations: Array, actions: Array, key: Array
) -> tuple[Array, Array]:
    """Edits actions and computes the log-density of the edits e: (B, S), (B, A) -> (B, A), (B,)."""
    actor = TanhGaussian(args.hidden_dims, actions.shape[-1])
    mean, log_std = actor.apply(params, observations, actions)
    noise = jax.random.normal(key, mean.shape)
    u = mean + jnp.exp(log_std) * noise
    log_density = -0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)
    log_slope = 2 * (jnp.log(2) - u - jax.nn.softplus(-2 * u))  # of e = tanh(u)
    log_prob = log_density.sum(-1) - log_slope.sum(-1)
    edited = jnp.clip(actions + args.edit_scale * jnp.tanh(u), -1, 1)
    return edited, log_prob


def sample_actions(args: Args, state: State, observations: Array, key: Array) -> Array:
    """Edits the flow's action a~ = ODE(f_theta; s, z): (B, S) -> (B, A) in [-1, 1]."""
    # ref: with tau = 0 the official code acts with f_beta.
    name = "policy" if args.inv_temp > 0 else "behavior"
    z = jax.random.normal(key, (len(observations), args.chunk_length * args.action_size))
    actions = integrate(args, state.params[name], observations, z)
    if args.edit_scale > 0:  # the edit is sampled in evaluations, too
        edit_key = jax.random.fold_in(key, 1)
        actions, _ = edit(args, state.params["edit"], observations, actions, edit_key)
    return actions


# A loss differentiates `params` only; `state` and `batch` are constants. It returns its value and
# its metrics, whose names differ from those of all other losses.


def critic_loss(
    args: Args, params: dict, state: State, batch: Batch, key: Array
) -> tuple[Array, dict]:
    """Computes the TD error of every critic against one pessimistic target."""
    # ref: a' comes from the online policy; the deviation is the population one (1/K).
    next_actions = sample_actions(args, state, batch.next_observations, key)
    next_q = critic(args, state.targets["critic"], batch.next_observations, next_actions)
    next_value = next_q.mean(0) - args.pessimism * next_q.std(0)
    target = batch.rewards + args.discount**args.chunk_length * batch.masks * next_value  # Eq. (23)
    q = critic(args, params["critic"], batch.observations, batch.actions)
    loss = (batch.valid * (q - target) ** 2).mean()  # Eq. (26)
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


def adjoint_matching_loss(
    args: Args, params: dict, state: State, batch: Batch, key: Array
) -> tuple[Array, dict]:
    """Regresses the policy's flow onto the velocity that the lean adjoint asks for.

    Only this regression sees `params`; the SDE and the whole adjoint see `state`.
    ref: not masked by `batch.valid`.
    """
    s = batch.observations
    T = args.flow_steps
    dt = 1 / T
    times = jnp.arange(T) / T
    sigmas = jnp.sqrt(2 * (1 - times + dt) / (times + dt))  # ref: t + dt for t, finite at t = 0
    reference = partial(field, args, state.targets["behavior"], s)

    def forward(x, step):
        t, sigma, noise = step
        velocity = field(args, state.params["policy"], s, x, t)
        drift = 2 * velocity - x / (t + dt)
        next_x = x + dt * drift + jnp.sqrt(dt) * sigma * noise  # Eq. (24)
        return next_x, x

    start_key, noise_key = jax.random.split(key)
    x = jax.random.normal(start_key, batch.actions.shape)
    noise = jax.random.normal(noise_key, (T - 1, *x.shape))
    steps = times[:-1], sigmas[:-1], noise
    x, path = jax.lax.scan(forward, x, steps)
    path = jnp.concatenate([path, x[None]])  # (T, B, A): x_0 .. x_{T-1}
    # ref: the last step is an Euler step of the reference flow.
    end = x + dt * reference(x, times[-1])

    def value(actions):  # ref: target critics, their mean; no gradient outside the box
        clipped = jnp.clip(actions, -1, 1)
        return critic(args, state.targets["critic"], s, clipped).mean(0).sum()

    gradient = jax.grad(value)(end)
    tilt = args.inv_temp * gradient
    terminal_adjoint = -tilt

    def backward(adjoint, step):
        x, t = step

        def drift(x):  # ref: the state of time t goes with the field of time t + dt
            return 2 * reference(x, t + dt) - x / (t + dt)

        _, vjp = jax.vjp(drift, x)
        adjoint += dt * vjp(adjoint)[0]  # Eq. (25)
        return adjoint, adjoint

    _, adjoint = jax.lax.scan(backward, terminal_adjoint, (path, times), reverse=True)  # (T, B, A)

    t = times[:, None]
    sigma = sigmas[:, None, None]
    change = field(args, params["policy"], s, path, t) - reference(path, t)
    errors = 2 * change / sigma + sigma * adjoint
    loss = (errors**2).sum((0, 2)).mean()  # Eq. (21); ref: sums over time and coordinates, no dt

    def norm(vectors):
        return jnp.linalg.norm(vectors, axis=-1).mean()

    metrics = dict(
        adjoint_loss=loss,
        outside=(jnp.abs(end) > 1).mean(),
        tilt_norm=norm(tilt),
        adjoint_norm=norm(adjoint[0]),
    )
    return loss, metrics


def edit_loss(
    args: Args, params: dict, state: State, batch: Batch, key: Array
) -> tuple[Array, dict]:
    """Computes the soft actor-critic loss of the edit policy and of its temperature alpha."""
    z_key, edit_key = jax.random.split(key)
    z = jax.random.normal(z_key, batch.actions.shape)
    flow_actions = integrate(args, state.params["policy"], batch.observations, z)
    actions, log_prob = edit(args, params["edit"], batch.observations, flow_actions, edit_key)
    q = critic(args, state.params["critic"], batch.observations, actions).mean(0)
    actor_loss = (jnp.exp(state.params["log_alpha"]) * log_prob - q).mean()  # Eq. (31)
    entropy = -log_prob.mean()
    target_entropy = -0.5 * actions.shape[-1]
    alpha = jnp.exp(params["log_alpha"])
    # ref: the submission has no entropy term; code and later text have FEdit's constraint.
    alpha_loss = alpha * (jax.lax.stop_gradient(entropy) - target_entropy)  # Eq. (78)
    size = jnp.abs(actions - flow_actions).mean()
    metrics = dict(edit_entropy=entropy, edit_alpha=alpha, edit_size=size)
    return actor_loss + alpha_loss, metrics


def update(args: Args, state: State, batch: Batch) -> tuple[State, dict]:
    """Makes one gradient step on the sum of all losses, all at the parameters before the step."""
    key, *keys = jax.random.split(state.key, 4)
    losses = [critic_loss, behavior_loss, adjoint_matching_loss]
    if args.edit_scale > 0:
        losses.append(edit_loss)
        keys.append(jax.random.fold_in(keys[0], 2))  # 1 is the edit's in the critic's target

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
