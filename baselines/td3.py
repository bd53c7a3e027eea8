"""TD3: Twin Delayed Deep Deterministic policy gradient (Fujimoto, van Hoof, Meger 2018,
arXiv:1802.09477).

Online, off-policy. The policy is a function that ascends the first of two critics; noise is added
to its actions in training alone. Three measures keep the critics from overestimating values: the
target uses the lower of both critics, its action is smoothed by clipped noise, and the policy and
all moving averages are updated only at every second update.

    a' = clip(mubar(s') + clip(sigma' xi, -k, k), -1, 1),  xi ~ N(0, I)                 Eq. (TD3.1)
    y = c r + gamma m min_j Qbar_j(s', a')                                              Eq. (TD3.2)
    L(Q) = E sum_j (Q_j(s, a) - y)^2                                                    Eq. (TD3.3)
    L(mu) = -E Q_1(s, mu(s))                                                            Eq. (TD3.4)

Equation numbers are ours, see docs/methods/equations.md; docs/methods/td3.md says what differs from
public code.

    python baselines/td3.py                          the plane with four goals, small networks
    python baselines/td3.py --env halfcheetah --num-seeds 5

Shapes: B batch, S observation, d action; arrays passed to `act` and `train_chunk` have a leading
axis of agents (seeds) trained at once.
"""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # where common/ is
    from common.signals import quiet_imports

    quiet_imports()  # Ctrl-C ends the imports below without a traceback

import flax.linen as nn
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
from common.networks import LECUN, MLP, Critic
from common.run import Run
from common.sampling import Replay


@dataclasses.dataclass(frozen=True)
class Args:
    """The flags of the script; their comments are the help texts."""

    # --- method ---
    reward_scale: NonNegativeFloat = 1.0  # Factor c on the rewards in the TD target.
    policy_delay: PositiveInt = 2  # Critic updates per update of the policy and averages.
    explore_noise: NonNegativeFloat = 0.1  # Standard deviation of the action noise in training.
    target_noise: NonNegativeFloat = 0.2  # Standard deviation of the action noise in the TD target.
    target_noise_clip: NonNegativeFloat = 0.5  # Largest action noise in the TD target.

    # --- networks and optimiser ---
    hidden_dims: tuple[PositiveInt, ...] = (256, 256)  # Hidden-layer widths of all networks.
    batch_size: PositiveInt = 256  # Batch size B, in transitions.
    actor_lr: PositiveFloat = 3e-4  # Adam's learning rate of the policy.
    critic_lr: PositiveFloat = 3e-4  # Learning rate of the critics (Adam).
    target_rate: UnitInterval = 0.005  # Step size of the moving averages of critics and policy.

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


# `Args` holds the values of FMER's comparison (arXiv:2603.17685, table 3). The learning rates
# are illegible in our copy of it, so they are CleanRL's. The values for the plane are for a CPU.
ENV_DEFAULTS = {
    "multigoal": dict(
        total_steps=15_000,
        warmup_steps=1_000,
        reward_scale=0.1,
        actor_lr=1e-3,
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

    params: dict  # critic (Q_1, Q_2), policy (mu)
    targets: dict  # moving averages: critic, policy
    opt_state: dict  # of each of params
    step: Array  # () int32: updates so far
    key: Array  # (2,) uint32: for the random numbers of the updates


def optimizers(args: Args) -> dict[str, optax.GradientTransformation]:
    """Makes one Adam for each of `params`."""
    return dict(critic=optax.adam(args.critic_lr), policy=optax.adam(args.actor_lr))


def create(args: Args, observation_size: int, key: Array) -> State:
    """Creates a new agent."""
    key, critic_key, policy_key = jax.random.split(key, 3)
    observations = jnp.zeros((1, observation_size))
    actions = jnp.zeros((1, args.action_size))
    critics = Critic(args.hidden_dims, 2, layer_norm=False, activation=nn.relu, kernel_init=LECUN)
    network = MLP(args.hidden_dims, args.action_size, False, nn.relu, LECUN)
    params = dict(
        critic=critics.init(critic_key, observations, actions),
        policy=network.init(policy_key, observations),
    )
    opt_state = {name: adam.init(params[name]) for name, adam in optimizers(args).items()}
    return State(
        params=params,
        targets=jax.tree.map(jnp.copy, params),
        opt_state=opt_state,
        step=jnp.int32(0),
        key=key,
    )


# --- the method ----------------------------------------------------------------------------------

# A network is built twice: in `create`, for its parameters, and where it is applied.


def critic(args: Args, params: dict, observations: Array, actions: Array) -> Array:
    """Computes Q_1 and Q_2: (B, S), (B, d) -> (2, B)."""
    critics = Critic(args.hidden_dims, 2, layer_norm=False, activation=nn.relu, kernel_init=LECUN)
    return critics.apply(params, observations, actions)


def policy(args: Args, params: dict, observations: Array) -> Array:
    """Computes mu: (B, S) -> (B, d) in [-1, 1]."""
    network = MLP(args.hidden_dims, args.action_size, False, nn.relu, LECUN)
    return jnp.tanh(network.apply(params, observations))


def sample_actions(args: Args, state: State, observations: Array, key: Array, mode: str) -> Array:
    """Chooses actions: (B, S) -> (B, d) in [-1, 1]. In training ("explore") they are mu with noise,
    otherwise mu."""
    actions = policy(args, state.params["policy"], observations)
    if mode == "explore":
        noise = args.explore_noise * jax.random.normal(key, actions.shape)
        return jnp.clip(actions + noise, -1, 1)
    return actions


def critic_loss(
    args: Args, params: dict, state: State, batch: Replay, key: Array
) -> tuple[Array, dict]:
    """Computes the squared TD error of both critics against one target."""
    next_actions = policy(args, state.targets["policy"], batch.next_observations)
    noise = args.target_noise * jax.random.normal(key, next_actions.shape)
    noise = jnp.clip(noise, -args.target_noise_clip, args.target_noise_clip)
    next_actions = jnp.clip(next_actions + noise, -1, 1)  # Eq. (TD3.1)
    next_q = critic(args, state.targets["critic"], batch.next_observations, next_actions)
    value = next_q.min(0)
    rewards = args.reward_scale * batch.rewards
    target = rewards + args.discount * batch.masks * value  # Eq. (TD3.2)
    q = critic(args, params, batch.observations, batch.actions)
    loss = ((q - target) ** 2).sum(0).mean()  # Eq. (TD3.3)
    metrics = dict(critic_loss=loss, q=q.mean(), target=target.mean())
    return loss, metrics


def policy_loss(args: Args, params: dict, state: State, observations: Array) -> tuple[Array, dict]:
    """Computes minus the first critic's value of the action, through which the gradient passes."""
    actions = policy(args, params, observations)
    q = critic(args, state.params["critic"], observations, actions)[0]
    loss = -q.mean()  # Eq. (TD3.4)
    return loss, dict(policy_loss=loss, abs_action=jnp.abs(actions).mean())


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
    """Makes one step of the critics; at every policy_delay-th update also one of the policy, then
    one of the averages."""
    key, next_key = jax.random.split(state.key)
    state, metrics = descend(args, state, "critic", critic_loss, batch, next_key)

    def step(_, carry):
        state, _ = carry
        state, more = descend(args, state, "policy", policy_loss, batch.observations)
        targets = optax.incremental_update(state.params, state.targets, args.target_rate)
        state = state.replace(targets=targets)  # Eq. (TD3.5)
        return state, jax.tree.map(lambda x: args.policy_delay * x, more)

    # A loop that may have no rounds, because under vmap `lax.cond` would always run both branches.
    # The metrics are scaled by policy_delay, so that their mean over all updates is that over
    # the policy's steps.
    due = (state.step + 1) % args.policy_delay == 0
    names = ("policy_loss", "abs_action", "policy_grad_norm")
    zeros = dict.fromkeys(names, jnp.zeros(()))
    state, more = jax.lax.fori_loop(0, jnp.int32(due), step, (state, zeros))
    state = state.replace(step=state.step + 1, key=key)
    return state, metrics | more


MODES = ("greedy",)  # Ways to choose actions in evaluations.

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
