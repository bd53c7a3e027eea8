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
from tqdm import tqdm

from common.data import Replay, Shards, locate, over_agents, sample, spread
from common.envs import TRAINING, EnvPool, resolve, seed_of
from common.networks import Critic, Field, TanhGaussian
from common.run import Precision, Run, ours, parse


@dataclasses.dataclass(frozen=True)
class Args:
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

    # method
    edit_scale: float = 0.1  # sigma_a: largest edit of a coordinate; 0 is QAM, without edit policy
    inv_temp: float = 1.0  # tau: inverse temperature of exp(tau Q); 0: the flow is cloned
    pessimism: float = 0.5  # a target's value is mean - this times std over the critics
    flow_steps: int = 10  # T: steps from noise to action, of the flow or the diffusion

    # networks and optimiser
    hidden_dims: tuple[int, ...] = (512, 512, 512, 512)  # of all networks
    num_critics: int = 10  # K: critics in the ensemble
    batch_size: int = 256  # B: chunks per update
    lr: float = 3e-4  # Adam's learning rate
    target_rate: float = 0.005  # rate of the moving averages (target networks)
    grad_clip: float = 1.0  # largest norm of the joint gradient of all networks


# Temperatures and edit scales of the ten domains: launch script of the official repository. The
# point maze is not in the paper: small networks, tuned here for a CPU (benchmarks/README.md).
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
        inv_temp=1.0, edit_scale=0.1, discount=0.995, flow_steps=5, num_critics=2, lr=1e-3,
        hidden_dims=(128, 128), batch_size=128, target_rate=0.01, offline_steps=15_000,
        log_interval=1_000, eval_interval=5_000, eval_slots=50,
    ),
}


@flax.struct.dataclass
class State:
    """Everything that an agent carries from update to update."""

    params: dict  # critic (phi), behavior (beta), policy (theta), edit (omega), log_alpha
    targets: dict  # moving averages of critic and behavior
    opt_state: optax.OptState
    key: jax.Array  # (2,) uint32


def optimizer(args):
    # ref: the papers' text says clipping element by element; code and table: by the joint norm.
    return optax.chain(optax.clip_by_global_norm(args.grad_clip), optax.adam(args.lr))


def create(args, observation_size, key) -> State:
    """A new agent. f_theta is no copy of f_beta: it starts from its own random weights."""
    key, *keys = jax.random.split(key, 4)
    s, a = jnp.zeros((1, observation_size)), jnp.zeros((1, args.chunk_length * args.action_size))
    params = dict(
        critic=Critic(args.hidden_dims, args.num_critics).init(keys[0], s, a),
        behavior=Field(args.hidden_dims).init(keys[1], s, a, 0.0),
        policy=Field(args.hidden_dims).init(keys[2], s, a, 0.0),
    )
    targets = {name: jax.tree.map(jnp.copy, params[name]) for name in ("critic", "behavior")}
    if args.edit_scale > 0:
        actor = TanhGaussian(args.hidden_dims, a.shape[-1])
        params["edit"] = actor.init(jax.random.fold_in(keys[2], 1), s, a)
        params["log_alpha"] = jnp.zeros(())
    return State(params, targets, optimizer(args).init(params), key)


# --- the method ----------------------------------------------------------------------------------


def critic(args, params, observations, actions):
    """Q^1..Q^K: (B, S), (B, A) -> (K, B)."""
    return Critic(args.hidden_dims, args.num_critics).apply(params, observations, actions)


def field(args, params, observations, x, t):
    """Velocity f(s, x, t): (B, S), (..., B, A), t that broadcasts to (..., B) -> (..., B, A)."""
    return Field(args.hidden_dims).apply(params, observations, x, t)


def integrate(args, flow, observations, z):
    """ODE(f; s, z) from noise to action, by T Euler steps: (B, S), (B, A) -> (B, A) in [-1, 1]."""

    def euler(x, t):
        return x + field(args, flow, observations, x, t) / args.flow_steps, None

    x, _ = jax.lax.scan(euler, z, jnp.arange(args.flow_steps) / args.flow_steps)
    return jnp.clip(x, -1, 1)  # only here, not between the steps


def edit(args, params, observations, actions, key):
    """Edited actions and the log-density of their edits e: (B, S), (B, A) -> (B, A), (B,)."""
    actor = TanhGaussian(args.hidden_dims, actions.shape[-1])
    mean, log_std = actor.apply(params, observations, actions)
    noise = jax.random.normal(key, mean.shape)
    u = mean + jnp.exp(log_std) * noise
    log_prob = (-0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)).sum(-1)
    log_prob -= (2 * (jnp.log(2) - u - jax.nn.softplus(-2 * u))).sum(-1)  # of e = tanh(u)
    return jnp.clip(actions + args.edit_scale * jnp.tanh(u), -1, 1), log_prob


def sample_actions(args, state, observations, key):
    """The flow's action a~ = ODE(f_theta; s, z), edited: (B, S) -> (B, A) in [-1, 1]."""
    # ref: with tau = 0 the official code acts with f_beta.
    flow = state.params["policy" if args.inv_temp > 0 else "behavior"]
    z = jax.random.normal(key, (len(observations), args.chunk_length * args.action_size))
    actions = integrate(args, flow, observations, z)
    if args.edit_scale > 0:  # sampled, in evaluations, too
        edit_key = jax.random.fold_in(key, 1)
        actions, _ = edit(args, state.params["edit"], observations, actions, edit_key)
    return actions


def critic_loss(args, params, state, batch, key):
    """TD error of every critic against one pessimistic target.  # Eq. (23), (26)"""
    # ref: a' comes from the online policy; the deviation is the population one (1/K).
    next_actions = sample_actions(args, state, batch.next_observations, key)
    next_q = critic(args, state.targets["critic"], batch.next_observations, next_actions)
    next_value = next_q.mean(0) - args.pessimism * next_q.std(0)
    target = batch.rewards + args.discount**args.chunk_length * batch.masks * next_value
    q = critic(args, params["critic"], batch.observations, batch.actions)
    loss = (batch.valid * (q - target) ** 2).mean()  # Eq. (26)
    return loss, dict(critic_loss=loss, q=q.mean(), q_std=q.std(0).mean(), target=target.mean())


def behavior_loss(args, params, state, batch, key):
    """Flow matching of f_beta on the data: along x_t = (1 - t) z + t a the velocity is a - z."""
    z_key, t_key = jax.random.split(key)
    z = jax.random.normal(z_key, batch.actions.shape)
    t = jax.random.uniform(t_key, batch.valid.shape)
    x = (1 - t[:, None]) * z + t[:, None] * batch.actions
    velocity = field(args, params["behavior"], batch.observations, x, t)
    loss = (batch.valid * ((velocity - (batch.actions - z)) ** 2).mean(-1)).mean()  # Eq. (17)
    return loss, dict(behavior_loss=loss)


def adjoint_matching_loss(args, params, state, batch, key):
    """Regression of f_theta onto what the lean adjoint asks for. Only `params` is differentiated:
    SDE, critic gradient and adjoint see `state`. ref: not masked by `batch.valid`."""
    T, s = args.flow_steps, batch.observations
    t, dt = jnp.arange(T) / T, 1 / T
    sigma = jnp.sqrt(2 * (1 - t + dt) / (t + dt))  # ref: t + dt for t, finite at t = 0
    behavior = partial(field, args, state.targets["behavior"], s)

    def forward(x, step):
        t, sigma, noise = step
        drift = 2 * field(args, state.params["policy"], s, x, t) - x / (t + dt)
        return x + dt * drift + jnp.sqrt(dt) * sigma * noise, x  # Eq. (24)

    start_key, noise_key = jax.random.split(key)
    x = jax.random.normal(start_key, batch.actions.shape)
    noise = jax.random.normal(noise_key, (T - 1, *x.shape))
    x, path = jax.lax.scan(forward, x, (t[:-1], sigma[:-1], noise))
    path = jnp.concatenate([path, x[None]])  # (T, B, A): x_0 .. x_{T-1}
    x = x + dt * behavior(x, t[-1])  # ref: the last step is an Euler step of the behaviour flow

    def value(x):  # ref: target critics, their mean; no gradient outside of the box
        return critic(args, state.targets["critic"], s, jnp.clip(x, -1, 1)).mean(0).sum()

    tilt = args.inv_temp * jax.grad(value)(x)

    def backward(g, step):
        x, t = step
        # ref: the state of time t goes with the field of time t + dt
        _, vjp = jax.vjp(lambda x: 2 * behavior(x, t + dt) - x / (t + dt), x)
        g = g + dt * vjp(g)[0]  # Eq. (25)
        return g, g

    _, adjoint = jax.lax.scan(backward, -tilt, (path, t), reverse=True)  # (T, B, A)

    t, sigma = t[:, None], sigma[:, None, None]
    change = field(args, params["policy"], s, path, t) - behavior(path, t)
    errors = 2 * change / sigma + sigma * adjoint
    loss = (errors**2).sum((0, 2)).mean()  # Eq. (21); ref: sums over time and coordinates, no dt
    norm = lambda g: jnp.linalg.norm(g, axis=-1).mean()
    norms = dict(tilt_norm=norm(tilt), adjoint_norm=norm(adjoint[0]))
    return loss, dict(adjoint_loss=loss, outside=(jnp.abs(x) > 1).mean(), **norms)


def edit_loss(args, params, state, batch, key):
    """Soft actor-critic on edits of the flow's actions, with its temperature alpha."""
    z_key, edit_key = jax.random.split(key)
    z = jax.random.normal(z_key, batch.actions.shape)
    flow_actions = integrate(args, state.params["policy"], batch.observations, z)
    actions, log_prob = edit(args, params["edit"], batch.observations, flow_actions, edit_key)
    q = critic(args, state.params["critic"], batch.observations, actions).mean(0)
    entropy, target = -log_prob.mean(), -0.5 * actions.shape[-1]
    alpha = jnp.exp(params["log_alpha"])
    loss = (jnp.exp(state.params["log_alpha"]) * log_prob - q).mean()  # Eq. (31)
    # ref: the submission has no entropy term; code and later text have FEdit's constraint.
    loss += alpha * (jax.lax.stop_gradient(entropy) - target)  # Eq. (78)
    size = jnp.abs(actions - flow_actions).mean()
    return loss, dict(edit_entropy=entropy, edit_alpha=alpha, edit_size=size)


def update(args, state, batch):
    """One gradient step on the sum of all losses, all at the parameters before the step."""
    key, *keys = jax.random.split(state.key, 4)
    losses = [critic_loss, behavior_loss, adjoint_matching_loss]
    if args.edit_scale > 0:
        losses.append(edit_loss)
        keys.append(jax.random.fold_in(keys[0], 2))  # 1 is the edit's in the critic's target

    def total_loss(params):
        results = [f(args, params, state, batch, k) for f, k in zip(losses, keys)]
        metrics = {name: value for _, more in results for name, value in more.items()}
        return sum(loss for loss, _ in results), metrics

    grads, metrics = jax.grad(total_loss, has_aux=True)(state.params)
    metrics["grad_norm"] = optax.global_norm(grads)
    updates, opt_state = optimizer(args).update(grads, state.opt_state)
    # ref: the targets move towards the parameters from before this step.
    online = {name: state.params[name] for name in state.targets}
    targets = optax.incremental_update(online, state.targets, args.target_rate)
    params = optax.apply_updates(state.params, updates)
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
