"""One-state problems with a known answer: what do QAM and ME-AM converge to?

    python -m benchmarks.bandits

One constant state, one action in [-1, 1], a critic and a data density that are given. The scripts'
own `create` and `update` train everything else; only the script's `critic` is replaced. Closed
forms: QAM's pi_beta exp(tau Q), ME-AM's Eq. (16). Writes docs/images/bandits.png and
benchmarks/results/bandits.json; tests/test_meam_theory.py trains the same problems.

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
import numpy as np

from analysis.command_line import run_program
from common.data import Batch

GRID = np.linspace(-3, 3, 6001)  # of the closed forms, far beyond the box
STEP = GRID[1] - GRID[0]


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
        """Actions of the data, (B, 1)."""
        mode_key, noise_key = jax.random.split(key)
        logits = jnp.log(jnp.array(self.weights))
        mode = jax.random.categorical(mode_key, logits, shape=(batch_size, 1))
        return jnp.array(self.means)[mode] + self.std * jax.random.normal(noise_key, mode.shape)

    def data(self):
        """The data's density on the grid, (G,)."""
        z = (GRID[:, None] - np.array(self.means)) / self.std
        return (np.exp(-0.5 * z**2) @ self.weights) / (self.std * np.sqrt(2 * np.pi))

    def law(self, entropy_scale=0.0, path_weight=1.0, box=True):
        """Eq. (16) without expansion on the grid, (G,). Outside of the box neither critic nor score
        have a gradient: there the law continues with the prior's shape."""
        log_prior = np.log(self.data() + 1e-300)
        total = path_weight + entropy_scale
        inside = np.clip(GRID, -1, 1) if box else GRID
        log_law = path_weight * np.interp(inside, GRID, log_prior)
        log_law = (log_law + self.inv_temp * np.asarray(self.value(inside))) / total
        log_law += log_prior - np.interp(inside, GRID, log_prior)
        law = np.exp(log_law - log_law.max())
        return law / (law.sum() * STEP)

    def expanded(self, rho):
        """Mass of pi_mix exp(tau Q) at the best action, where pi_mix has a point of mass rho: the
        mode of an expansion actor that has found it. The rest has the shape of `law()`."""
        tilt = np.exp(self.inv_temp * np.asarray(self.value(np.clip(GRID, -1, 1))))
        rest = (1 - rho) * (self.data() * tilt).sum() * STEP
        return float(rho * tilt.max() / (rho * tilt.max() + rest))

    def share(self, density):
        """Mass of a density on the grid above the threshold."""
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


def settings(script, bandit, **flags):
    """Arguments of the script for this bandit: small networks, no critic to learn, slow averages,
    because the anchor and its score oscillate at rates above .005."""
    small = dict(hidden_dims=(64, 64), num_critics=1, batch_size=128, lr=3e-3, target_rate=0.003)
    shape = dict(chunk_length=1, action_size=1, flow_steps=bandit.flow_steps)
    off = dict(rho=0.0, entropy_scale=0.0) if hasattr(script.Args, "rho") else {}
    flags = small | shape | off | dict(inv_temp=bandit.inv_temp) | flags
    return dataclasses.replace(script.Args(), **flags)


def train(script, bandit, seeds=(0,), updates=3000, late=10, samples=4096, **flags):
    """Trains an agent per seed -> actions (C, N, n), not clipped, at `late` checkpoints in the last
    40 % of the updates. The learning rate falls to .3 and .1 of it in the last two fifths. Samples
    are the moving average's, where there is one, else the policy's."""
    args = settings(script, bandit, **flags)
    every = max(1, int(0.4 * updates) // late)
    early = updates - every * late

    def step(state, i):
        key, batch_key = jax.random.split(state.key)
        actions, ones = bandit.sample(batch_key, args.batch_size), jnp.ones(args.batch_size)
        s = jnp.zeros((args.batch_size, 1))
        batch = Batch(s, actions, 0 * ones, ones, s, ones)
        decay = jnp.where(i < 0.6 * updates, 1, jnp.where(i < 0.8 * updates, 0.3, 0.1))
        decayed = dataclasses.replace(args, lr=args.lr * decay)  # traced, never a static argument
        return script.update(decayed, state.replace(key=key), batch)[0], None

    def draw(state, key):
        flow = state.targets.get("policy", state.params["policy"])
        s, x = jnp.zeros((samples, 1)), jax.random.normal(key, (samples, 1))
        for i in range(args.flow_steps):
            t = i / args.flow_steps
            x = x + script.field(args, flow, s, x, t) / args.flow_steps
        return x[:, 0]

    def one(key):
        def checkpoint(state, c):
            state, _ = jax.lax.scan(step, state, early + c * every + jnp.arange(every))
            return state, draw(state, jax.random.fold_in(key, c))

        state, _ = jax.lax.scan(step, script.create(args, 1, key), jnp.arange(early))
        return jax.lax.scan(checkpoint, state, jnp.arange(late))

    def critic(args, params, observations, actions):
        return bandit.value(actions).T

    with mock.patch.object(script, "critic", critic):
        keys = jnp.stack([jax.random.PRNGKey(seed) for seed in seeds])
        _, actions = jax.jit(jax.vmap(one, out_axes=(0, 1)))(keys)
    return np.asarray(actions)


def discrete_gaussian(bandit, entropy_scale=0.0, path_weight=1.0, floor=0.0):
    """Mean and deviation that T steps reach instead of Eq. (16): data N(0, std^2), a quadratic
    critic, fields v = k x + b that fit without error, exact scores, no box. The scheme's own error
    (the memoryless SDE, the adjoint and Euler's ODE in T steps), apart from all learning."""
    T, lam, w, variance = bandit.flow_steps, entropy_scale, path_weight, bandit.std**2
    dt, t = 1 / T, np.arange(T + 1) / T
    below, middle, above = (bandit.inv_temp * float(bandit.value(x)) for x in (-0.5, 0.0, 0.5))
    slope, curvature = above - below, 4 * (above - 2 * middle + below)  # of tau Q
    base = np.stack([(t * variance - (1 - t)) / ((1 - t) ** 2 + t**2 * variance), 0 * t], axis=-1)
    sigma2, v = 2 * (1 - t + dt) / (t + dt), base.copy()
    for _ in range(1000):
        mean, std = 0.0, 1.0  # of the anchor's samples
        for k, b in v[:T]:
            mean, std = mean + dt * (k * mean + b), std * (1 + dt * k)
        ref, score = w * base + (1 - w) * v, 1 / (std**2 + floor**2)
        means, cov = np.zeros(T + 1), np.zeros((T + 1, T + 1))  # of the SDE's x_0, ..., x_T
        cov[0, 0] = 1
        for i in range(T):
            last = i == T - 1
            k, b = ref[i] if last else 2 * v[i] - (1 / (t[i] + dt), 0)
            means[i + 1] = means[i] + dt * (k * means[i] + b)
            cov[i + 1, : i + 1] = cov[: i + 1, i + 1] = (1 + dt * k) * cov[i, : i + 1]
            noise = 0 if last else dt * sigma2[i]
            cov[i + 1, i + 1] = (1 + dt * k) ** 2 * cov[i, i] + noise
        gain, offset = -curvature - lam * score, -slope + lam * score * mean  # of g(1)
        new, factor = v.copy(), 1.0
        for i in reversed(range(T)):
            factor *= 1 + dt * (2 * ref[i + 1, 0] - 1 / (t[i] + dt))
            k = cov[T, i] / cov[i, i]  # E[x_T | x_i] = means[T] + k (x_i - means[i])
            g = np.array([gain * k, gain * (means[T] - k * means[i]) + offset])
            new[i] = ref[i] - 0.5 * sigma2[i] * factor * g
        new[T] = 2 * new[T - 1] - new[T - 2]  # asked at t = 1, never trained there
        v = v + 0.2 * (new - v)
    return mean, abs(std)


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
DRAWN = {  # beside QAM
    "RARE": ("ME-AM, lambda=1", "ME-AM flattens the data's density (λ = 1)"),
    "OUTSIDE": ("ME-AM, rho=0.3", "ME-AM mixes improved actions into the data (ρ = 0.3)"),
}
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"  # Okabe and Ito
EDGES = np.linspace(-1.5, 1.5, 121)


@dataclasses.dataclass(frozen=True)
class Options:
    seeds: int = 3  # agents per row, seeds 0, 1, ...
    updates: int = 3000  # of each
    image: str = "docs/images/bandits.png"
    out: str = "benchmarks/results/bandits.json"


def moments(density):
    mean = (density * GRID).sum() * STEP
    return float(mean), float(np.sqrt((density * (GRID - mean) ** 2).sum() * STEP))


def measure(name, label, script, flags, options) -> dict:
    """Trains one row: its numbers per seed, the closed form's, and a histogram."""
    bandit, start = globals()[name], time.process_time()
    module, seeds = importlib.import_module(script), range(options.seeds)
    actions = train(module, bandit, seeds, options.updates, **flags)
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
    if rho := flags.get("rho", 0):
        point = bandit.expanded(rho)
        row |= dict(law_share=point + (1 - point) * bandit.share(bandit.law()), law_point=point)
    else:
        law = bandit.law(**flags)
        row |= dict(zip(("law_mean", "law_std"), moments(law)), law_share=bandit.share(law))
    row["histogram"] = np.histogram(actions, EDGES, density=True)[0].round(4).tolist()
    reached = f"{np.mean(row['share']):.3f} (seeds {np.round(row['share'], 3)})"
    print(f"{name:8s} {label:26s} share {reached}, law {row['law_share']:.3f}", flush=True)
    return row


def draw(rows, path):
    """Two columns, a bandit each: the critic, and below it what the data, QAM and ME-AM do."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 2, sharex=True, figsize=(9.2, 5.2), layout="constrained",
                                gridspec_kw=dict(height_ratios=(1, 3)))  # fmt: skip
    middle, inside = (EDGES[1:] + EDGES[:-1]) / 2, np.abs(GRID) <= 1
    for column, (name, (shown, what)) in enumerate(DRAWN.items()):
        bandit, (top, axis), height = globals()[name], axes[:, column], 0
        q = np.asarray(bandit.value(GRID[inside]))
        top.plot(GRID[inside], q, color="black", lw=1.5)
        top.set_title(bandit.title.capitalize(), fontsize=12, fontweight="bold")
        axis.set_title(what, fontsize=10)
        axis.fill_between(GRID, bandit.data(), color=GREY, alpha=0.45, lw=0, label="data")
        for label, color in (("QAM", BLUE), (shown, ORANGE)):
            row = next(r for r in rows if (r["bandit"], r["label"]) == (name, label))
            point, method = row.get("law_point", 0), label.split(",")[0]
            law = bandit.law() * (1 - point) if point else bandit.law(**row["flags"])
            style = dict(color=color, lw=1.6, ls=(0, (4, 2)))
            axis.plot(middle, row["histogram"], color=color, lw=2, label=f"{method}, samples")
            axis.plot(GRID, law, label=f"{method}, closed form", **style)
            height = max(height, law.max(), bandit.data().max(), point or max(row["histogram"]))
            if point:
                best = GRID[inside][q.argmax()]
                axis.vlines(best, 0, 1.1 * height, **style)
                text = f"closed form:\n{point:.0%} of all\nmass is here"
                axis.text(best + 0.13, height, text, color=color, va="top", fontsize=9)
        axis.set(xlabel="action", xlim=(-1.25, 1.25), ylim=(0, 1.1 * height))
        top.set(ylim=(q.min() - 0.08 * np.ptp(q), q.max() + 0.1 * np.ptp(q)), yticks=[])
    axes[0, 0].set_ylabel("critic")
    axes[1, 0].set_ylabel("density")
    figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncol=5,
                  frameon=False, fontsize=9)  # fmt: skip
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(options: Options) -> dict:
    results = dict(
        command=f"python -m benchmarks.bandits --seeds {options.seeds} --updates {options.updates}",
        device=f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
        versions={name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        seeds=list(range(options.seeds)),
        updates=options.updates,
        settings={
            name: dict(weights=b.weights, means=b.means, std=b.std, inv_temp=b.inv_temp)
            | dict(flow_steps=b.flow_steps, threshold=b.threshold)
            for name, b in ((name, globals()[name]) for name in ROWS)
        },
        networks=dict(hidden_dims=(64, 64), batch_size=128, lr=3e-3, target_rate=0.003),
        histogram_edges=EDGES.round(4).tolist(),
        rows=[measure(name, *row, options) for name, rows in ROWS.items() for row in rows],
    )
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(results))
    draw(results["rows"], options.image)
    print(f"written to {options.out} and {options.image}")
    return results


if __name__ == "__main__":
    run_program(main, Options, __doc__)
