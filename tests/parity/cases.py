"""The 21 cases: which script and options compute what the official code computed for a case, where
its networks, its noise and the parts that it logs are on our side.

`Case.networks` says for each of our networks how the official code names it, and how its arrays are
laid out there. `Case.noise` says for each loss which named draws of the official code it needs.
`Case.logged` says for each part that the official code logs which of our numbers has to equal it:
the sum of the names listed, where `-name` is subtracted, `name()` is the value of a loss, any other
name is one of our metrics, and `invalid` is the share of invalid chunks in the batch.
"""

from dataclasses import dataclass, replace

# How an official network's arrays are laid out: start of an official path -> start of ours.
CRITIC = {"value_net": "/params/VmapMLP_0"}
TIMED_CRITIC = {"mlp": "/params/VmapMLP_0"}
FIELD = {"mlp": "/params/MLP_0"}
ONE_STEP = {"mlp": "/params"}
ACTOR = {"actor_net": "/params/MLP_0", "mean_net": "/params/Dense_0"}
SCALAR = {"log_value": ""}
GAUSSIAN = {
    "MLP_0": "/params/MLP_0",
    "OutputDenseMean": "/params/Dense_0",
    "OutputDenseLogStd": "/params/Dense_1",
}
NOISE_PREDICTOR = {
    "FourierFeatures_0/kernel": "/params/frequencies",
    # The code of the step passes four layers, the MLP behind it has five.
    "MLP_0": "/params",
    "MLP_1/Dense_0": "/params/Dense_4",
    "MLP_1/Dense_1": "/params/Dense_5",
    "MLP_1/Dense_2": "/params/Dense_6",
    "MLP_1/Dense_3": "/params/Dense_7",
    "MLP_1/Dense_4": "/params/Dense_8",
}

# Names of draws that are not normal. All others are.
DISTRIBUTIONS = {"fm_t": "uniform", "n_t": "uniform", "i": "randint"}

# The official actors are distributions of TensorFlow Probability's JAX port. It draws the noise of
# a Gaussian of B rows and A columns as A rows and B columns and transposes it. The files hold these
# numbers in the order in which they were drawn.
DRAWN_TRANSPOSED = {"td_e", "ed_e", "pi_e", "act_e"}

# What the official code logs and our scripts do not: extremes, and terms of losses whose sum is
# compared. (Where a case lists one of these in its `logged`, it is compared.)
NOT_LOGGED = {
    "critic/q_max",
    "critic/q_min",
    "critic/exp_bias",
    "value/v_max",
    "value/v_min",
    "actor/adj_max",
    "actor/adj_mean",
    "actor/adj_std",
    "actor/action_std",
    "actor/actor_loss",
    "actor/alpha_loss",
    "actor/bc_loss",
    "actor/edit_alpha_loss",
    "actor/edit_entropy_loss",
    "actor/edit_q_loss",
}


@dataclass(frozen=True)
class Case:
    """One file of official numbers and how our side repeats them."""

    name: str
    script: str
    flags: dict
    networks: dict
    noise: dict
    logged: dict
    acting: tuple = ("act_z",)  # the noise of `sample_actions`
    updates: int = 2
    # DAC and QSM: the official total loss has this multiple of the share of invalid chunks more.
    invalid_terms: float = 0.0


CRITIC_LOGGED = {"critic/critic_loss": ["critic_loss"], "critic/q_mean": ["q"]}
TD = {"critic_loss": ["td_z"]}
TD_EDITED = {"critic_loss": ["td_z", "td_e"]}
FLOW_MATCHING = {"behavior_loss": ["fm_z", "fm_t"]}
EDITED = {"edit_loss": ["ed_z", "ed_e"]}

# --- QAM, its two variants, and BAM --------------------------------------------------------------

QAM = Case(
    name="qam",
    script="qam",
    flags=dict(inv_temp=2.0),
    networks=dict(
        critic=("critic", CRITIC),
        behavior=("actor_slow", FIELD),
        policy=("actor_fast", FIELD),
    ),
    noise=TD | FLOW_MATCHING | {"adjoint_matching_loss": ["x0", "eps"]},
    logged=CRITIC_LOGGED
    | {
        "actor/flow_loss": ["behavior_loss"],
        "actor/adj_loss": ["adjoint_loss"],
        "actor/fast_loss": ["adjoint_matching_loss()"],
    },
)
QAM_TAU0 = replace(QAM, name="qam_tau0", flags=dict(inv_temp=0.0))
QAM_EDIT_OFF = replace(
    QAM, name="qam_edit_off", script="qam_edit", flags=dict(inv_temp=2.0, edit_scale=0.0)
)
QAM_EDIT = replace(
    QAM,
    name="qam_edit",
    script="qam_edit",
    flags=dict(inv_temp=2.0, edit_scale=0.3),
    networks=QAM.networks | dict(edit=("edit_actor", GAUSSIAN), log_alpha=("edit_alpha", SCALAR)),
    noise=QAM.noise | TD_EDITED | EDITED,
    logged=QAM.logged
    | {"actor/edit_entropy": ["edit_entropy"], "actor/edit_alpha": ["edit_alpha"]},
    acting=("act_z", "act_e"),
)
QAM_FQL_OFF = replace(
    QAM, name="qam_fql_off", script="qam_fql", flags=dict(inv_temp=2.0, fql_alpha=0.0)
)
QAM_FQL = replace(
    QAM,
    name="qam_fql",
    script="qam_fql",
    flags=dict(inv_temp=2.0, fql_alpha=3.0),
    networks=QAM.networks | dict(one_step=("one_step_actor", ONE_STEP)),
    noise=QAM.noise | {"one_step_loss": ["d_z"]},
    logged=QAM.logged
    | {
        "actor/fql_distill_loss": ["distillation_loss"],
        "actor/fql_q_loss": ["-one_step_q"],
    },
)
BAM = replace(
    QAM,
    name="bam",
    script="baselines.bam",
    noise=TD | FLOW_MATCHING | {"control_loss": ["x0", "eps"]},
    logged=CRITIC_LOGGED
    | {
        "actor/flow_loss": ["behavior_loss"],
        "actor/bam_loss": ["control_loss"],
        "actor/bc_loss": ["control_cost"],
    },
)
BAM_TAU0 = replace(BAM, name="bam_tau0", flags=dict(inv_temp=0.0))

# --- policies that are flows, or come from one ---------------------------------------------------

FBRAC = Case(
    name="fbrac",
    script="baselines.fbrac",
    flags=dict(fbrac_alpha=0.3),
    networks=dict(critic=("critic", CRITIC), policy=("actor_flow", FIELD)),
    noise=TD | FLOW_MATCHING | {"backprop_loss": ["bp_z"]},
    logged=CRITIC_LOGGED
    | {
        "actor/bc_flow_loss": ["behavior_loss"],
        "actor/actor_loss": ["behavior_loss()", "backprop_loss()"],
    },
)
FQL = Case(
    name="fql",
    script="baselines.fql",
    flags=dict(fql_alpha=3.0),
    networks=dict(
        critic=("critic", CRITIC),
        behavior=("actor_bc_flow", FIELD),
        one_step=("actor_onestep_flow", ONE_STEP),
    ),
    noise=TD | FLOW_MATCHING | {"one_step_loss": ["d_z"]},
    logged=CRITIC_LOGGED
    | {
        "actor/bc_flow_loss": ["behavior_loss"],
        "actor/distill_loss": ["distillation_loss"],
        "actor/actor_loss": ["behavior_loss()", "one_step_loss()"],
    },
)
FAWAC = Case(
    name="fawac",
    script="baselines.fawac",
    flags=dict(inv_temp=6.4),
    networks=dict(
        critic=("critic", CRITIC),
        value=("value", CRITIC),
        policy=("actor", FIELD),
    ),
    noise=TD | {"value_loss": [], "policy_loss": ["fm_z", "fm_t"]},
    logged=CRITIC_LOGGED
    | {"critic/value_loss": ["value_loss"], "actor/actor_loss": ["policy_loss"]},
)
FEDIT = Case(
    name="fedit",
    script="baselines.fedit",
    flags=dict(edit_scale=0.3),
    networks=dict(
        critic=("critic", CRITIC),
        behavior=("actor_bc_flow", FIELD),
        edit=("edit_actor", GAUSSIAN),
        log_alpha=("alpha", SCALAR),
    ),
    noise=TD_EDITED | FLOW_MATCHING | EDITED,
    logged=CRITIC_LOGGED
    | {
        "actor/bc_flow_loss": ["behavior_loss"],
        "actor/edit_entropy": ["edit_entropy"],
        "actor/actor_loss": ["behavior_loss()", "edit_loss()"],
    },
    acting=("act_z", "act_e"),
)
IFQL = Case(
    name="ifql",
    script="baselines.ifql",
    flags=dict(expectile=0.8),
    networks=dict(
        critic=("critic", CRITIC),
        value=("value", CRITIC),
        behavior=("actor_flow", FIELD),
    ),
    noise=FLOW_MATCHING | {"value_loss": [], "critic_loss": []},
    logged={
        "critic/critic_loss": ["critic_loss"],
        "critic/q_mean": ["target"],  # What the official code logs as q is the target.
        "value/value_loss": ["value_loss"],
        "value/v_mean": ["value"],
        "actor/actor_loss": ["behavior_loss"],
    },
    acting=("act_many",),
)

# --- guidance by the critic, in its three forms --------------------------------------------------

CGQL_PLAIN = Case(
    name="cgql_plain",
    script="baselines.cgql",
    flags=dict(guidance="plain", inv_temp=3.0, guidance_coef=(0.2,), noisy_coef=(0.7,)),
    networks=dict(critic=("critic", TIMED_CRITIC), behavior=("actor", FIELD)),
    noise=TD | FLOW_MATCHING,
    logged=CRITIC_LOGGED | {"actor/flow_loss": ["behavior_loss"]},
)
CGQL_MSE = replace(
    CGQL_PLAIN,
    name="cgql_mse",
    flags=CGQL_PLAIN.flags | dict(guidance="mse"),
    noise=CGQL_PLAIN.noise | {"noisy_critic_loss": ["n_z", "n_t"]},
    logged=CGQL_PLAIN.logged | {"critic/noisy_critic_loss": ["noisy_loss"]},
)
CGQL_LINEX = replace(CGQL_MSE, name="cgql_linex", flags=CGQL_PLAIN.flags | dict(guidance="linex"))

# --- diffusion -----------------------------------------------------------------------------------

# The official code does not multiply the loss of a chunk by `valid`. It raises the loss to the
# power `valid`: an invalid chunk counts with the constant 1 where ours counts with 0. No gradient
# sees this. Their losses equal ours plus the share of invalid chunks, once for each of the two
# terms of the policy's loss, the second of which has the weight `bc_coef`.
DAC = Case(
    name="dac",
    script="baselines.dac",
    flags=dict(bc_coef=3.0),
    networks=dict(critic=("critic", CRITIC), policy=("actor", NOISE_PREDICTOR)),
    noise={"critic_loss": ["td_x", "td_dn"], "policy_loss": ["i", "n"]},
    logged={
        "critic/critic_loss": ["critic_loss"],
        "critic/q": ["q"],
        "actor/actor_loss": ["guidance_loss", "invalid"],
    },
    acting=("act_x", "act_dn"),
    invalid_terms=1 + 3.0,
)
QSM = replace(
    DAC,
    name="qsm",
    script="baselines.qsm",
    flags=dict(bc_coef=3.0, inv_temp=2.0),
    logged=DAC.logged | {"actor/actor_loss": ["matching_loss", "invalid"]},
)

# --- Gaussian and deterministic actors -----------------------------------------------------------

DSRL = Case(
    name="dsrl",
    script="baselines.dsrl",
    flags=dict(noise_scale=1.4),
    networks=dict(
        critic=("critic", CRITIC),
        behavior=("actor_bc_flow", FIELD),
        latent_critic=("z_critic", CRITIC),
        latent=("actor", GAUSSIAN),
        log_alpha=("alpha", SCALAR),
    ),
    noise=FLOW_MATCHING
    | {
        "critic_loss": ["td_e"],
        "distillation_loss": ["ds_z"],
        "latent_loss": ["pi_e"],
    },
    logged=CRITIC_LOGGED
    | {
        "critic/distill_loss": ["distillation_loss"],
        "critic/total_loss": ["critic_loss()", "distillation_loss()"],
        "actor/flow_loss": ["behavior_loss"],
        "actor/alpha": ["latent_alpha"],
        "actor/entropy": ["latent_entropy"],
        "actor/q": ["latent_q"],
        "actor/total_loss": ["behavior_loss()", "latent_loss()"],
    },
    acting=("act_e",),
)
REBRAC = Case(
    name="rebrac",
    script="baselines.rebrac",
    flags=dict(rebrac_alpha=0.1, actor_noise=0.4),
    networks=dict(critic=("critic", CRITIC), actor=("actor", ACTOR)),
    noise={"critic_loss": ["td_n"], "actor_loss": []},
    logged=CRITIC_LOGGED | {"actor/mse": ["bc"], "actor/total_loss": ["actor_loss"]},
    acting=("act_n",),
    updates=4,  # The targets move at every second one.
)
RLPD = Case(
    name="rlpd",
    script="baselines.rlpd",
    flags=dict(rlpd_alpha=0.1),
    networks=dict(
        critic=("critic", CRITIC),
        actor=("actor", GAUSSIAN),
        log_alpha=("alpha", SCALAR),
    ),
    noise={"critic_loss": ["td_e"], "actor_loss": ["pi_e"], "cloning_loss": []},
    logged=CRITIC_LOGGED
    | {
        "actor/alpha": ["alpha"],
        "actor/entropy": ["entropy"],
        "actor/q": ["actor_q"],
        "actor/bc_loss": ["cloning_loss()"],
        "actor/total_loss": ["actor_loss()", "cloning_loss()"],
    },
    acting=("act_e",),
)

CASES = {x.name: x for x in list(globals().values()) if isinstance(x, Case)}
