"""Config to optax: one optimizer per parameter group; multipliers of the learning rate (0 freezes) and a mask of weight decay are
(regex, number) lists that must cover every parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from ssl_jax.engine.durations import to_steps
from ssl_jax.engine.sharding import leaf_names, match
from ssl_jax.errors import UserError

# Decay (and, under LARS, layer-wise rates) for weights only: biases and normalization parameters are left alone.
WEIGHTS_ONLY = ((r"(bias|scale)$", 0.0), (r".*", 1.0))


def schedule(
    kind: str, peak: float, total: int, warmup: int = 0, milestones: Sequence[float] = (), factor: float = 0.1, end: float = 0.0,
    hold: float = 0.0,
):  # fmt: skip
    """step -> rate: linear warm-up from 0 over `warmup` steps, then `peak` up to the fraction `hold` of `total`, then one of

    'cosine', 'linear', 'exponential'  down to `end` x peak at `total`
    'step'      x `factor` at each fraction of `total` in `milestones`
    'constant'
    """
    begin = max(warmup, round(hold * total))
    left = max(1, total - begin)
    if kind == "cosine":
        tail = optax.cosine_decay_schedule(peak, left, alpha=end)
    elif kind == "linear":
        tail = optax.linear_schedule(peak, end * peak, left)
    elif kind == "exponential":
        if not end > 0:
            raise UserError(f"config.optim: the schedule 'exponential' never reaches end={end}; give end > 0")
        tail = optax.exponential_decay(peak, left, end, end_value=end * peak)
    elif kind == "step":
        # optax joins schedules at `begin` and counts the tail from there.
        tail = optax.piecewise_constant_schedule(peak, {max(0, round(m * total) - begin): factor for m in milestones})
    elif kind == "constant":
        tail = optax.constant_schedule(peak)
    else:
        raise UserError(f"config.optim: unknown schedule {kind!r}; choose cosine, linear, exponential, step or constant")
    if not begin:
        return tail
    first = optax.linear_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak)
    return optax.join_schedules([first, optax.constant_schedule(peak), tail], [warmup, begin])


def descend(rate) -> optax.GradientTransformationExtraArgs:
    """Updates times -rate(step), with the step of the run: a group that is updated several times in a step (or not in each) has
    the rate of the step all the same, which a count of updates would not give.
    """

    def update(updates, state, params=None, *, step, **_):
        return jax.tree.map(lambda u: -rate(step) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _core(spec: Mapping, rate, adapt, add_decay) -> list[optax.GradientTransformation]:
    """Gradients to updates, rate included."""
    kind = spec["name"]
    if kind == "sgd":
        return [add_decay, optax.trace(spec["momentum"], spec["nesterov"]), descend(rate)]
    if kind == "lars":
        # The rate goes inside the momentum and only `adapt`ed leaves get the trust ratio: SimCLR's LARS (You et al. 2017;
        # other codebases put the rate outside, which differs under a schedule).
        trust = optax.masked(optax.scale_by_trust_ratio(trust_coefficient=spec["trust"]), adapt)
        return [add_decay, trust, descend(rate), optax.trace(spec["momentum"])]
    if kind == "adafactor":
        # Of Shazeer & Stern 2018 (arXiv:1804.04235) the factored second moment and the clipping of each update's mean square, with a
        # first moment of half the size; no scaling by parameters (Zhai et al. 2022, arXiv:2106.04560, section 3.4).
        first = [optax.ema(spec["b1"], debias=False, accumulator_dtype=jnp.bfloat16)] if spec["b1"] else []
        second = optax.scale_by_factored_rms(decay_rate=spec["power"], min_dim_size_to_factor=spec["factored_from"])
        return [second, optax.clip_by_block_rms(spec["threshold"]), *first, add_decay, descend(rate)]
    moments = optax.scale_by_adam(spec["b1"], spec["b2"], spec["eps"])
    if kind == "adam":
        return [add_decay, moments, descend(rate)]
    return [moments, add_decay, descend(rate)]  # decoupled decay (Loshchilov & Hutter 2019, algorithm 2)


DEFAULTS = {
    "sgd": dict(momentum=0.9, nesterov=False),
    "lars": dict(momentum=0.9, trust=0.001),
    "adam": dict(b1=0.9, b2=0.999, eps=1e-8),
    "adamw": dict(b1=0.9, b2=0.999, eps=1e-8),
    # power: the second moment of step t decays by 1 - t^-power. factored_from: the size from which both sides of a matrix are.
    "adafactor": dict(b1=0.9, power=0.8, threshold=1.0, factored_from=128),
}
COMMON = dict(
    lr=None, lr_scale="none", schedule="cosine", warmup="0 steps", milestones=(), factor=0.1, end=0.0, hold=0.0, weight_decay=0.0,
    weight_decay_mask=WEIGHTS_ONLY, lr_multipliers=((r".*", 1.0),), clip_norm=None,
)  # fmt: skip


def base_rate(spec: Mapping, batch_size: int) -> float:
    """Peak learning rate after batch scaling: 'none', 'linear' (x B / 256) or 'sqrt' (x sqrt(B)); SimCLR, appendix B.1."""
    scales = {"none": 1.0, "linear": batch_size / 256, "sqrt": math.sqrt(batch_size)}
    if spec["lr_scale"] not in scales:
        raise UserError(f"config.optim: unknown lr_scale {spec['lr_scale']!r}; choose {', '.join(scales)}")
    if spec["lr"] is None or not spec["lr"] > 0:
        raise UserError(f"config.optim: lr={spec['lr']} must be positive; to freeze parameters give lr_multipliers=((regex, 0.0), ...)")
    return spec["lr"] * scales[spec["lr_scale"]]


def resolve(spec: Mapping, group: str) -> dict:
    """`spec` with defaults filled in. Raises UserError for an unknown optimizer or option."""
    kind = spec.get("name")
    if kind not in DEFAULTS:
        raise UserError(f"config.optim.{group}.name={kind!r} is unknown; choose {', '.join(DEFAULTS)}")
    known = {"name": kind, **COMMON, **DEFAULTS[kind]}
    unknown = sorted(set(spec) - set(known))
    if unknown:
        raise UserError(f"config.optim.{group}.{unknown[0]} is no option of {kind}; options: {', '.join(sorted(known))}")
    return {**known, **spec}


def make_optimizer(group: str, spec: Mapping, params, total: int, batch_size: int, examples: int):
    """The optax transformation for one parameter group, and its learning-rate schedule (step -> rate).

    `weight_decay_mask` and `lr_multipliers` are (regex, number) lists on 'group/module/leaf' names that must cover every parameter; a
    multiplier of 0 freezes (what is never trained belongs in `State.frozen`, which costs no moments).
    """
    spec = resolve(spec, group)
    warmup = to_steps(spec["warmup"], f"config.optim.{group}.warmup", batch_size, examples)
    if warmup > total:
        raise UserError(f"config.optim.{group}: warm-up of {warmup} steps is longer than the run of {total}; shorten it")
    rate = schedule(
        spec["schedule"], base_rate(spec, batch_size), total, warmup, spec["milestones"], spec["factor"], spec["end"],
        spec["hold"],
    )
    names = [f"{group}/{name}" for name in leaf_names(params)]
    structure = jax.tree.structure(params)

    def tree(key):
        given = spec[key] is not COMMON[key]  # the defaults need not hit everything in every model
        return jax.tree.unflatten(structure, match(spec[key], names, f"config.optim.{group}.{key}", all_used=given))

    decay, multipliers = tree("weight_decay_mask"), tree("lr_multipliers")
    add_decay = optax.stateless(
        lambda updates, weights: jax.tree.map(lambda u, w, d: u + spec["weight_decay"] * d * w, updates, weights, decay)
    )
    chain = [optax.clip_by_global_norm(spec["clip_norm"])] if spec["clip_norm"] else []
    chain += _core(spec, rate, jax.tree.map(bool, decay), add_decay)
    if any(m != 1 for m in jax.tree.leaves(multipliers)):
        chain.append(optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, multipliers)))
    return optax.chain(*chain), rate


def make_optimizers(config: Mapping, params: Mapping, total: int, batch_size: int, examples: int):
    """({group: transformation}, {group: schedule}) for `config.optim`.

    Raises:
        UserError: if its groups are not those of `params`.
    """
    if set(config) != set(params):
        raise UserError(f"config.optim has groups {sorted(config)}, the method trains {sorted(params)}; give each one an optimizer")
    made = {g: make_optimizer(g, config[g], params[g], total, batch_size, examples) for g in params}
    return {g: m[0] for g, m in made.items()}, {g: m[1] for g, m in made.items()}
