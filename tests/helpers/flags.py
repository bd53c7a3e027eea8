"""Flags of runs that take seconds: of offline scripts, of online ones, and of PPO."""

from baselines import ppo
from common.flags import configure

ENV = "pointmaze-medium"


# Two agents; evaluations and checkpoints at 8, 10, 16 and 24, of which 16 is the online phase's
# sixth step: in the middle of an episode, and of the plan of five actions that began with it.
TINY = dict(
    name="default",
    tasks=(1, 2),
    offline_steps=10,
    online_steps=14,
    start_training=4,
    log_interval=3,
    eval_interval=8,
    eval_episodes=2,
    eval_slots=2,
    max_episode_steps=100,  # in place of 1000, so that evaluations are short
    workers=1,
    hidden_dims=(16, 16),
    num_critics=2,
    flow_steps=3,
    batch_size=16,
)


def tiny_args(module, folder, **flags):
    """An offline script's `Args` for a run of seconds on the dataset in `folder`."""
    flags = {k: v for k, v in TINY.items() if k in module.Args.__dataclass_fields__} | flags
    return configure(module.Args, module.ENV_DEFAULTS, ENV, dataset_dir=str(folder), **flags)


ONLINE_SIZES = dict(  # flags that make any online script small
    name="default",
    num_seeds=2,
    eval_episodes=2,
    eval_slots=2,
    workers=1,
    hidden_dims=(16, 16),
    batch_size=16,
    flow_steps=3,
    diffusion_steps=3,
    num_candidates=4,
)


ONLINE_LENGTHS = dict(
    multigoal=dict(
        seed=1,  # FMER's agents are in an episode at both checkpoints
        total_steps=72,
        warmup_steps=10,
        replay_size=40,
        log_interval=6,
        eval_interval=24,
    ),
    hopper=dict(
        seed=13,  # both agents fall in the random phase, and not in the steps before checkpoints
        total_steps=32,
        warmup_steps=20,
        replay_size=20,
        log_interval=4,
        eval_interval=8,
        eval_episodes=1,
        eval_slots=1,
    ),
)


def tiny_online(module, env="multigoal", **flags):
    """An online script's `Args` for a run of seconds."""
    flags = ONLINE_SIZES | ONLINE_LENGTHS[env] | flags
    flags = {k: v for k, v in flags.items() if k in module.Args.__dataclass_fields__}
    return configure(module.Args, module.ENV_DEFAULTS, env, **flags)


PPO_SIZES = dict(
    name="default",
    num_seeds=2,
    eval_episodes=2,
    eval_slots=2,
    workers=1,
    hidden_dims=(16, 16),
    batch_size=8,
    epochs=2,
)


PPO_LENGTHS = dict(
    multigoal=dict(
        total_steps=100, rollout_steps=24, num_envs=2, log_interval=30, eval_interval=40
    ),
    hopper=dict(
        total_steps=64,
        rollout_steps=16,
        num_envs=1,
        log_interval=16,
        eval_interval=30,
        eval_episodes=1,
        eval_slots=1,
    ),
)


def tiny_ppo(env="multigoal", **flags):
    """PPO's `Args` for a run of seconds."""
    return configure(ppo.Args, ppo.ENV_DEFAULTS, env, **PPO_SIZES | PPO_LENGTHS[env] | flags)
