"""One-state problems with a known answer: what do QAM and ME-AM converge to?

    python -m benchmarks.bandits

One constant state, one action in [-1, 1], a critic and a data density that are given. The scripts'
own `create` and `update` train everything else; only the script's `critic` is replaced. Closed
forms: QAM's pi_beta exp(tau Q), ME-AM's Eq. (16). Writes docs/images/bandits.png and
benchmarks/results/bandits.json; tests/theory/test_meam_theory.py trains the same problems.

Shapes: N seeds, C late checkpoints, n samples, G points of the grid.
"""

import dataclasses
import importlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from analysis import style
from analysis.command_line import run_program
from analysis.runs import ROOT
from benchmarks import RESULTS
from common.sampling import Batch

GRID = np.linspace(-3, 3, 6001)  # of the closed forms, far beyond the box
STEP = GRID[1] - GRID[0]
BOX = GRID[np.abs(GRID) <= 1]


@dataclasses.dataclass(frozen=True)
class Bandit:
    """Data: a mixture of Gaussians, all modes of one deviation, *not* cut at the box. A mode is
    resolved by T flow steps if std * T >= 4."""

    title: str
    value: Callable  # Q(a), elementwise
    weights: tuple[float, ...]
    means: tuple[float, ...]
    std: float
    inv_temp: float
    flow_steps: int
    threshold: float  # a better action is one above it

    def sample(self, key, batch_size):
        """Draws actions of the data, (B, 1)."""
        mode_key, noise_key = jax.random.split(key)
        logits = jnp.log(jnp.array(self.weights))
        mode = jax.random.categorical(mode_key, logits, shape=(batch_size, 1))
        noise = jax.random.normal(noise_key, mode.shape)
        return jnp.array(self.means)[mode] + self.std * noise

    def data(self):
        """Returns the data's density on the grid, (G,)."""
        z = (GRID[:, None] - np.array(self.means)) / self.std
        density = np.exp(-0.5 * z**2) @ self.weights
        return density / (self.std * np.sqrt(2 * np.pi))

    def law(self, entropy_scale=0.0, path_weight=1.0, box=True):
        """Returns Eq. (16) without expansion on the grid, (G,).

        Outside of the box neither critic nor score have a gradient: there the law continues with
        the prior's shape.
        """
        log_prior = np.log(self.data() + 1e-300)
        total = path_weight + entropy_scale
        inside = np.clip(GRID, -1, 1) if box else GRID
        log_prior_inside = np.interp(inside, GRID, log_prior)
        tilt = self.inv_temp * np.asarray(self.value(inside))
        log_law = (path_weight * log_prior_inside + tilt) / total
        log_law += log_prior - log_prior_inside
        law = np.exp(log_law - log_law.max())
        return law / (law.sum() * STEP)

    def expanded(self, rho):
        """Returns the mass of pi_mix exp(tau Q) at the best action.

        pi_mix has a point of mass rho there: the mode of an expansion actor that has found it. The
        rest has the shape of `law()`.
        """
        value = np.asarray(self.value(np.clip(GRID, -1, 1)))
        tilt = np.exp(self.inv_temp * value)
        rest = (1 - rho) * (self.data() * tilt).sum() * STEP
        point = rho * tilt.max()
        return float(point / (point + rest))

    def share(self, density):
        """Returns the mass of a density on the grid above the threshold."""
        return float(density[GRID > self.threshold].sum() * STEP)


GAUSSIAN = Bandit(  # the specification's problem, .7 of its size: the box cuts almost nothing
    title="one mode",
    value=lambda a: -2 * (a / 0.7 - 0.5) ** 2,
    weights=(1.0,),
    means=(0.0,),
    std=0.35,
    inv_temp=1.0,
    flow_steps=12,
    threshold=0.35,
)
RARE = Bandit(
    title="rare but better action",
    value=lambda a: 1 / (1 + jnp.exp(-8 * a)),
    weights=(0.95, 0.05),
    means=(-0.5, 0.5),
    std=0.25,
    inv_temp=1.0,
    flow_steps=20,
    threshold=0.0,
)
OUTSIDE = Bandit(
    title="best action outside the data",
    value=lambda a: -2 * (a - 0.6) ** 2,
    weights=(1.0,),
    means=(-0.5,),
    std=0.2,
    inv_temp=2.0,
    flow_steps=20,
    threshold=0.3,
)

BANDITS = {"GAUSSIAN": GAUSSIAN, "RARE": RARE, "OUTSIDE": OUTSIDE}
NETWORKS = dict(hidden_dims=(64, 64), batch_size=128, lr=3e-3, target_rate=0.003)


def settings(script, bandit, **flags):
    """Returns arguments of the script for this bandit: small networks, no critic to learn.

    Averages are slow, because the anchor and its score oscillate at rates above .005.
    """
    chosen = NETWORKS | dict(num_critics=1, chunk_length=1, action_size=1)
    chosen |= dict(flow_steps=bandit.flow_steps, inv_temp=bandit.inv_temp)
    if hasattr(script.Args, "rho"):  # ME-AM's additions are off unless `flags` has them.
        chosen |= dict(rho=0.0, entropy_scale=0.0)
    return dataclasses.replace(script.Args(), **(chosen | flags))


def train(script, bandit, seeds=(0,), updates=3000, late=10, samples=4096, **flags):
    """Trains an agent per seed -> actions (C, N, n), not clipped, at `late` checkpoints.

    The returned checkpoints are in the last 40 % of the updates. There the learning rate falls to
    0.3 and then 0.1 of its initial value. Samples come from the policy's moving average if there is
    one, else from the policy. Checkpoints are equally spaced, and early ones are not returned;
    updates after the last multiple of the spacing are left out (none of 3000).
    """
    args = settings(script, bandit, **flags)
    every = max(1, int(0.4 * updates) // late)
    checkpoints = updates // every  # also early ones, so that the update is compiled once

    def step(state, i):
        """Makes update number i."""
        key, batch_key = jax.random.split(state.key)
        decay = jnp.where(i < 0.6 * updates, 1, jnp.where(i < 0.8 * updates, 0.3, 0.1))
        decayed = dataclasses.replace(args, lr=args.lr * decay)  # traced, never a static argument
        batch = draw_batch(bandit, batch_key, args.batch_size)
        return script.update(decayed, state.replace(key=key), batch)[0], None

    def one(key):
        """Trains one agent, and draws its samples at each checkpoint."""

        def checkpoint(state, i):
            numbers = updates + i * every + jnp.arange(every)
            state, _ = jax.lax.scan(step, state, numbers)
            sample_key = jax.random.fold_in(key, late + i)
            return state, draw_samples(script, args, state, sample_key, samples)

        state = script.create(args, 1, key)
        _, actions = jax.lax.scan(checkpoint, state, jnp.arange(-checkpoints, 0))
        return actions[-late:]

    def critic(args, params, observations, actions):
        """Stands in for the script's critic, which has nothing to learn."""
        return bandit.value(actions).T

    with mock.patch.object(script, "critic", critic):
        keys = jnp.stack([jax.random.PRNGKey(seed) for seed in seeds])
        actions = jax.jit(jax.vmap(one, out_axes=1))(keys)
    return np.asarray(actions)


def draw_batch(bandit, key, batch_size) -> Batch:
    """Draws a batch of the data: one constant state, no reward."""
    ones = jnp.ones(batch_size)
    state = jnp.zeros((batch_size, 1))
    return Batch(
        observations=state,
        actions=bandit.sample(key, batch_size),
        rewards=0 * ones,
        masks=ones,
        next_observations=state,
        valid=ones,
    )


def draw_samples(script, args, state, key, samples):
    """Draws actions (n,) of the policy by Euler's method."""
    flow = state.targets.get("policy", state.params["policy"])
    observations = jnp.zeros((samples, 1))
    x = jax.random.normal(key, (samples, 1))
    for i in range(args.flow_steps):
        t = i / args.flow_steps
        x = x + script.field(args, flow, observations, x, t) / args.flow_steps
    return x[:, 0]


def discrete_gaussian(bandit, entropy_scale=0.0, path_weight=1.0, floor=0.0):
    """Returns the mean and deviation that T steps reach instead of Eq. (16).

    Data are N(0, std^2), the critic is quadratic, fields v = k x + b fit without error, scores are
    exact, and there is no box. This is the scheme's own error (the memoryless SDE, the adjoint and
    Euler's ODE in T steps), apart from all learning.
    """
    T = bandit.flow_steps
    variance = bandit.std**2
    dt = 1 / T
    t = np.arange(T + 1) / T
    values = [float(bandit.value(x)) for x in (-0.5, 0.0, 0.5)]
    below, middle, above = (bandit.inv_temp * value for value in values)
    slope = above - below  # of tau Q
    curvature = 4 * (above - 2 * middle + below)
    data_variance = (1 - t) ** 2 + t**2 * variance
    base_slope = (t * variance - (1 - t)) / data_variance
    base = np.stack([base_slope, 0 * t], axis=-1)
    sigma2 = 2 * (1 - t + dt) / (t + dt)
    v = base.copy()
    for _ in range(1000):
        mean, std = ode_moments(v, dt)
        score = 1 / (std**2 + floor**2)
        ref = path_weight * base + (1 - path_weight) * v
        means, cov = sde_moments(v, ref, sigma2, t, dt)
        # The adjoint at the end is gain * x_T + offset.
        gain = -curvature - entropy_scale * score
        offset = -slope + entropy_scale * score * mean
        new = v.copy()
        factor = 1.0
        for i in reversed(range(T)):
            factor *= 1 + dt * (2 * ref[i + 1, 0] - 1 / (t[i] + dt))
            k = cov[T, i] / cov[i, i]  # E[x_T | x_i] = means[T] + k (x_i - means[i])
            expected_offset = gain * (means[T] - k * means[i]) + offset
            adjoint = np.array([gain * k, expected_offset])
            new[i] = ref[i] - 0.5 * sigma2[i] * factor * adjoint
        new[T] = 2 * new[T - 1] - new[T - 2]  # asked at t = 1, never trained there
        v = v + 0.2 * (new - v)
    return mean, abs(std)


def ode_moments(v, dt):
    """Returns mean and deviation of the samples of Euler's ODE along fields v (T + 1, 2)."""
    mean = 0.0
    std = 1.0
    for k, b in v[:-1]:
        mean = mean + dt * (k * mean + b)
        std = std * (1 + dt * k)
    return mean, std


def sde_moments(v, ref, sigma2, t, dt):
    """Returns means (T + 1,) and covariances (T + 1, T + 1) of the memoryless SDE's states."""
    T = len(v) - 1
    means = np.zeros(T + 1)
    cov = np.zeros((T + 1, T + 1))
    cov[0, 0] = 1
    for i in range(T):
        if i == T - 1:  # The last step has no noise.
            k, b = ref[i]
            noise = 0
        else:
            k, b = 2 * v[i] - (1 / (t[i] + dt), 0)
            noise = dt * sigma2[i]
        means[i + 1] = means[i] + dt * (k * means[i] + b)
        covariance = (1 + dt * k) * cov[i, : i + 1]
        cov[i + 1, : i + 1] = covariance
        cov[: i + 1, i + 1] = covariance
        cov[i + 1, i + 1] = (1 + dt * k) ** 2 * cov[i, i] + noise
    return means, cov


# --- table and figure ----------------------------------------------------------------------------

ROWS = {  # bandit -> label, script, flags
    "RARE": [
        ("QAM", "qam", {}),
        ("ME-AM, lambda=0.5", "meam", dict(entropy_scale=0.5)),
        ("ME-AM, lambda=1", "meam", dict(entropy_scale=1.0)),
        ("ME-AM, lambda=0.5, w=0.5", "meam", dict(entropy_scale=0.5, path_weight=0.5)),
    ],
    "OUTSIDE": [
        ("QAM", "qam", {}),
        ("ME-AM, rho=0.1", "meam", dict(rho=0.1)),
        ("ME-AM, rho=0.3", "meam", dict(rho=0.3)),
    ],
}
DRAWN = {  # in addition to QAM
    "RARE": ("ME-AM, lambda=1", "ME-AM flattens the data's density (λ = 1)"),
    "OUTSIDE": ("ME-AM, rho=0.3", "ME-AM mixes improved actions into the data (ρ = 0.3)"),
}
BLUE = "#0072B2"  # These are Okabe and Ito's.
ORANGE = "#D55E00"
GREY = "#999999"
EDGES = np.linspace(-1.5, 1.5, 121)


@dataclasses.dataclass(frozen=True)
class Options:
    seeds: int = 3
    """Agents per row, with seeds 0, 1, ..."""
    updates: int = 3000
    """Updates of each agent."""
    image: str = str(ROOT / "docs/images/bandits.png")
    """File of the picture."""
    out: str = str(RESULTS / "bandits.json")
    """File of the results."""


def moments(density) -> tuple[float, float]:
    """Returns mean and deviation of a density on the grid."""
    mean = (density * GRID).sum() * STEP
    variance = (density * (GRID - mean) ** 2).sum() * STEP
    return float(mean), float(np.sqrt(variance))


def measure(name: str, label: str, script: str, flags: dict, options: Options) -> dict:
    """Trains one row: its numbers per seed, the closed form's, and a histogram."""
    start = time.process_time()
    bandit = BANDITS[name]
    module = importlib.import_module(script)
    actions = train(module, bandit, range(options.seeds), options.updates, **flags)
    shares = (actions > bandit.threshold).mean(-1)  # (C, N)
    row = dict(
        bandit=name,
        label=label,
        script=script,
        flags=flags,
        cpu_seconds=round(time.process_time() - start, 1),
        share=shares.mean(0).tolist(),
        share_std_over_checkpoints=shares.std(0).tolist(),
        mean=actions.mean((0, 2)).tolist(),
        std=actions.std(-1).mean(0).tolist(),
        outside_of_box=(np.abs(actions) > 1).mean((0, 2)).tolist(),
    )
    row |= closed_form(bandit, flags)
    histogram, _ = np.histogram(actions, EDGES, density=True)
    row["histogram"] = histogram.round(4).tolist()
    reached = f"{np.mean(row['share']):.3f} (seeds {np.round(row['share'], 3)})"
    print(f"{name:8s} {label:26s} share {reached}, law {row['law_share']:.3f}", flush=True)
    return row


def closed_form(bandit: Bandit, flags: dict) -> dict:
    """Returns what the closed form says of a row."""
    rho = flags.get("rho", 0)
    if rho:
        point = bandit.expanded(rho)
        rest = bandit.share(bandit.law())
        return dict(law_share=point + (1 - point) * rest, law_point=point)
    law = bandit.law(**flags)
    mean, std = moments(law)
    return dict(law_mean=mean, law_std=std, law_share=bandit.share(law))


# --- picture -------------------------------------------------------------------------------------


def draw(rows: list[dict], path: Path | str) -> None:
    """Draws a column per bandit: the critic, and below it what the data, QAM and ME-AM do."""
    with plt.rc_context(style.settings("light")):
        figure, axes = plt.subplots(
            2,
            2,
            sharex=True,
            figsize=(9.2, 5.2),
            layout="constrained",
            gridspec_kw=dict(height_ratios=(1, 3)),
        )
        for column, name in zip(axes.T, DRAWN, strict=True):
            top, axis = column
            shown, what = DRAWN[name]
            bandit = BANDITS[name]
            own = {row["label"]: row for row in rows if row["bandit"] == name}
            draw_critic(top, bandit)
            axis.set_title(what, fontsize=10)
            draw_densities(axis, bandit, {label: own[label] for label in ("QAM", shown)})
        axes[0, 0].set_ylabel("critic")
        axes[1, 0].set_ylabel("density")
        handles, labels = axes[1, 0].get_legend_handles_labels()
        below = dict(loc="outside lower center", ncol=5, frameon=False, fontsize=9)
        figure.legend(handles, labels, **below)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def draw_critic(axis, bandit: Bandit) -> None:
    """Draws the critic inside of the box."""
    q = np.asarray(bandit.value(BOX))
    axis.plot(BOX, q, color="black", lw=1.5)
    axis.set_title(bandit.title.capitalize(), fontsize=12, fontweight="bold")
    low = q.min() - 0.08 * np.ptp(q)
    high = q.max() + 0.1 * np.ptp(q)
    axis.set(ylim=(low, high), yticks=[])


def draw_densities(axis, bandit: Bandit, rows: dict[str, dict]) -> None:
    """Draws the data's density and, of each row, samples and the closed form."""
    middle = (EDGES[1:] + EDGES[:-1]) / 2
    data = bandit.data()
    height = 0
    axis.fill_between(GRID, data, color=GREY, alpha=0.45, lw=0, label="data")
    for (label, row), colour in zip(rows.items(), (BLUE, ORANGE), strict=True):
        method = label.split(",")[0]
        dashed = dict(color=colour, lw=1.6, ls=(0, (4, 2)))
        point = row.get("law_point", 0)
        if point:
            law = bandit.law() * (1 - point)
            top = point  # its line is as high as all else; the histogram's peak there is cut
        else:
            law = bandit.law(**row["flags"])
            top = max(row["histogram"])
        height = max(height, law.max(), data.max(), top)
        axis.plot(middle, row["histogram"], color=colour, lw=2, label=f"{method}, samples")
        axis.plot(GRID, law, label=f"{method}, closed form", **dashed)
        if point:
            draw_point(axis, bandit, point, height, dashed)
    axis.set(xlabel="action", xlim=(-1.25, 1.25), ylim=(0, 1.1 * height))


def draw_point(axis, bandit: Bandit, point: float, height: float, dashed: dict) -> None:
    """Draws the closed form's point of mass at the best action."""
    q = np.asarray(bandit.value(BOX))
    best = BOX[q.argmax()]
    axis.vlines(best, 0, 1.1 * height, **dashed)
    text = f"closed form:\n{point:.0%} of all\nmass is here"
    axis.text(best + 0.13, height, text, color=dashed["color"], va="top", fontsize=9)


def main(options: Options) -> dict:
    """Trains and draws all rows."""
    rows = []
    for name, variants in ROWS.items():
        for label, script, flags in variants:
            rows.append(measure(name, label, script, flags, options))
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    problems = {name: description(BANDITS[name]) for name in ROWS}
    results = dict(
        command=f"python -m benchmarks.bandits --seeds {options.seeds} --updates {options.updates}",
        device=f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
        versions=versions,
        seeds=list(range(options.seeds)),
        updates=options.updates,
        settings=problems,
        networks=NETWORKS,
        histogram_edges=EDGES.round(4).tolist(),
        rows=rows,
    )
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(results))
    draw(rows, options.image)
    print(f"written to {options.out} and {options.image}")
    return results


def description(bandit: Bandit) -> dict:
    """Returns a bandit's numbers for the results."""
    return dict(
        weights=bandit.weights,
        means=bandit.means,
        std=bandit.std,
        inv_temp=bandit.inv_temp,
        flow_steps=bandit.flow_steps,
        threshold=bandit.threshold,
    )


if __name__ == "__main__":
    run_program(main, Options, __doc__)
