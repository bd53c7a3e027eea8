"""The numeric flags of the scripts: which may be 0, which may be negative."""

# Numbers that may be 0, and what that means.
MAY_BE_0 = dict(
    # all methods
    seed="a seed like any other",
    workers="one per core",
    max_episode_steps="the environment's own limit",
    eval_episodes="no evaluations",
    discount="only the next reward counts",
    target_rate="targets that stay",
    # offline methods
    collect="off",
    offline_steps="online from the start",
    online_steps="offline only",
    pessimism="the mean of the critics",
    rho="no expansion",
    entropy_scale="no entropy",
    path_weight="the policy's average is the anchor",
    inv_temp="behaviour cloning",
    edit_scale="no edits",
    fql_alpha="no one-step policy, or no cloning",
    guidance_coef="no guidance",
    noisy_coef="no guidance",
    bc_coef="no cloning",
    rebrac_alpha="no cloning",
    rlpd_alpha="no cloning",
    expectile="the least of the values",
    actor_noise="none",
    noise_clip="no noise",
    reward_scale="no reward counts",
    # online methods
    act_candidates="as many as in the update",
    eta_fixed="it is tuned",
    eta_rate="it stays",
    target_ess="eta grows for ever",
    lambda_rate="lambda stays",
    entropy_until="no entropy from the start",
    policy_ema="no average",
    actor_lr_end="the policy stops at last",
    start_scale="the chain starts at the mean",
    eval_noise="none",
    move_steps="actions stay",
    move_lr="actions stay",
    move_clip="actions stay",
    q_clip="all weights are the same",
    q_rate="the statistics stay",
    q_gradient="none",
    gae_lambda="one step of TD",
    value_weight="the value is not learnt",
    entropy_weight="no bonus",
    entropy_actions="no bonus",
    entropy_start="no bonus",
    entropy_end="no bonus at last",
    renorm_after="from the start",
    explore_noise="the policy itself",
    target_noise="no smoothing",
    target_noise_clip="no smoothing",
)


SIGNED = "reward_shift target_entropy target_entropy_start target_entropy_end noise_entropy".split()


def numbers(script):
    """flag -> a number of its type; of tuples the first one."""
    found = {}
    for name, value in vars(script.Args()).items():
        x = value[0] if isinstance(value, tuple) else value
        if type(x) in (int, float) and name != "action_size":
            found[name] = x
    return found
