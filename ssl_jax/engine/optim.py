"""Optimizers from configs: one optax transformation per parameter group.

Learning-rate multipliers (0 freezes) and the weight-decay mask are (regex, number) lists that must cover every parameter.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from ssl_jax.engine.durations import to_steps
from ssl_jax.engine.sharding import leaf_names, match
from ssl_jax.errors import UserError

# Weight decay (and, under LARS, trust ratios) for weights only, not for biases and normalization parameters.
WEIGHTS_ONLY = ((r"(bias|scale)$", 0.0), (r".*", 1.0))


def schedule(
    kind: str, peak: float, total: int, warmup: int = 0, milestones: Sequence[float] = (), factor: float = 0.1, end: float = 0.0,
    hold: float = 0.0,
):  # fmt: skip
    """step -> learning rate: linear warm-up from 0 over `warmup` steps, `peak` until the fraction `hold` of `total`, then `kind`:

    'cosine', 'linear', 'exponential'  decays to `end` x peak at `total`
    'step'      multiplied by `factor` at each fraction of `total` in `milestones`; those before its begin count at its begin
    'constant'  stays at `peak`

    Raises:
        UserError: an unknown kind, 'exponential' without `end` > 0, or a milestone outside [0, 1].
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
        # optax.join_schedules counts the steps of the tail from `begin`.
        outside = [milestone for milestone in milestones if not 0 <= milestone <= 1]
        if outside:
            raise UserError(f"config.optim: milestone {outside[0]} is no fraction of the run; give numbers from 0 to 1")
        steps = Counter(max(0, round(m * total) - begin) for m in milestones)  # several may fall on one step
        tail = optax.piecewise_constant_schedule(peak, {step: factor**count for step, count in steps.items()})
    elif kind == "constant":
        tail = optax.constant_schedule(peak)
    else:
        raise UserError(f"config.optim: unknown schedule {kind!r}; choose cosine, linear, exponential, step or constant")
    if not begin:
        return tail
    first = optax.linear_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak)
    return optax.join_schedules([first, optax.constant_schedule(peak), tail], [warmup, begin])


def scale_by_rate(rate) -> optax.GradientTransformationExtraArgs:
    """Updates times -rate(step), where `step` is the step of the run.

    optax would count updates instead. That count runs ahead for a group that is updated several times in a step, and lags for a
    lazy one.
    """

    def update(updates, state, params=None, *, step, **_):
        return jax.tree.map(lambda u: -rate(step) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def scheduled_decay(weight, mask) -> optax.GradientTransformationExtraArgs:
    """Updates plus weight(step) * mask * weights; `mask` is a tree of numbers."""

    def update(updates, state, params=None, *, step, **_):
        return jax.tree.map(lambda u, w, d: u + weight(step) * d * w, updates, params, mask), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def _decay_schedule(spec: Mapping, total: int) -> Callable:
    """`weight_decay`, or a half cosine from it to `weight_decay_end` over the run (DINO, arXiv:2104.14294, appendix)."""
    start, end = spec["weight_decay"], spec["weight_decay_end"]
    if end is None:
        return lambda step: start
    return lambda step: end + (start - end) * (1 + jnp.cos(jnp.pi * step / total)) / 2


def clip_each(norm: float) -> optax.GradientTransformation:
    """Each array is scaled down to `norm` by itself, as in DINO; `clip_norm` scales all by their common norm."""

    def clip(x):
        return x * jnp.minimum(1.0, norm / (jnp.linalg.norm(x.ravel()) + 1e-6))

    return optax.stateless(lambda updates, _: jax.tree.map(clip, updates))


def _core(spec: Mapping, rate, adapt, add_decay) -> list[optax.GradientTransformation]:
    """The transformations from gradients to updates, including the learning rate."""
    kind = spec["name"]
    if kind == "sgd":
        return [add_decay, optax.trace(spec["momentum"], spec["nesterov"]), scale_by_rate(rate)]
    if kind == "lars":
        # LARS (You et al. 2017) as in SimCLR's code: the rate is inside the momentum, and only `adapt`ed leaves get the trust
        # ratio. With the rate outside, as in other codebases, results differ under a schedule.
        trust = optax.masked(optax.scale_by_trust_ratio(trust_coefficient=spec["trust"]), adapt)
        return [add_decay, trust, scale_by_rate(rate), optax.trace(spec["momentum"])]
    if kind == "adafactor":
        # The factored second moment and update clipping of Shazeer & Stern 2018 (arXiv:1804.04235), with a first moment in bfloat16
        # and without scaling by parameters (Zhai et al. 2022, arXiv:2106.04560, section 3.4).
        first = [optax.ema(spec["b1"], debias=False, accumulator_dtype=jnp.bfloat16)] if spec["b1"] else []
        second = optax.scale_by_factored_rms(decay_rate=spec["power"], min_dim_size_to_factor=spec["factored_from"])
        return [second, optax.clip_by_block_rms(spec["threshold"]), *first, add_decay, scale_by_rate(rate)]
    moments = optax.scale_by_adam(spec["b1"], spec["b2"], spec["eps"])
    if kind == "adam":
        return [add_decay, moments, scale_by_rate(rate)]
    return [moments, add_decay, scale_by_rate(rate)]  # decoupled decay (Loshchilov & Hutter 2019, algorithm 2)


DEFAULTS = {
    "sgd": dict(momentum=0.9, nesterov=False),
    "lars": dict(momentum=0.9, trust=0.001),
    "adam": dict(b1=0.9, b2=0.999, eps=1e-8),
    "adamw": dict(b1=0.9, b2=0.999, eps=1e-8),
    # power: the second moment decays by 1 - t^-power at step t. factored_from: a matrix is factored if both sides are at least this
    # large.
    "adafactor": dict(b1=0.9, power=0.8, threshold=1.0, factored_from=128),
}
COMMON = dict(
    lr=None, lr_scale="none", schedule="cosine", warmup="0 steps", milestones=(), factor=0.1, end=0.0, hold=0.0, weight_decay=0.0,
    weight_decay_mask=WEIGHTS_ONLY, lr_multipliers=((r".*", 1.0),), clip_norm=None,
    clip_tensor_norm=None, weight_decay_end=None,
)  # fmt: skip


def base_rate(spec: Mapping, batch_size: int) -> float:
    """Peak learning rate after batch scaling: 'none', 'linear' (x B / 256) or 'sqrt' (x sqrt(B)); SimCLR, appendix B.1."""
    scales = {"none": 1.0, "linear": batch_size / 256, "sqrt": math.sqrt(batch_size)}
    if spec["lr_scale"] not in scales:
        raise UserError(f"config.optim: unknown lr_scale {spec['lr_scale']!r}; choose {', '.join(scales)}")
    if spec["lr"] is None or not spec["lr"] > 0:
        raise UserError(f"config.optim: lr={spec['lr']} must be positive; to freeze parameters, set lr_multipliers=((regex, 0.0), ...)")
    return spec["lr"] * scales[spec["lr_scale"]]


def resolve(spec: Mapping, group: str) -> dict:
    """`spec` with defaults filled in. Raises UserError for an unknown optimizer or option."""
    kind = spec.get("name")
    if kind not in DEFAULTS:
        raise UserError(f"config.optim.{group}.name={kind!r} is unknown; choose {', '.join(DEFAULTS)}")
    defaults = {"name": kind, **COMMON, **DEFAULTS[kind]}
    unknown = sorted(set(spec) - set(defaults))
    if unknown:
        raise UserError(f"config.optim.{group}.{unknown[0]} is not an option of {kind}; options: {', '.join(sorted(defaults))}")
    return {**defaults, **spec}


def make_optimizer(group: str, spec: Mapping, params, total: int, batch_size: int, examples: int):
    """The optax transformation for one parameter group, and its learning-rate schedule (step -> rate).

    `weight_decay_mask` and `lr_multipliers` are (regex, number) lists on 'group/module/leaf' names that must cover every parameter.
    A multiplier of 0 freezes. Arrays that are never trained belong in `State.frozen`, which has no optimizer moments.

    Args:
        params: arrays or shapes of the group.
        total: steps of the run.
        batch_size, examples: of a step and of an epoch, to convert durations.

    Raises:
        UserError: an unknown optimizer or option, a rule that matches nothing, or a parameter that no rule matches.
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
        given = spec[key] is not COMMON[key]  # rules of the defaults may match nothing in some models
        return jax.tree.unflatten(structure, match(spec[key], names, f"config.optim.{group}.{key}", all_used=given))

    decay, multipliers = tree("weight_decay_mask"), tree("lr_multipliers")
    add_decay = scheduled_decay(_decay_schedule(spec, total), decay)
    chain = [optax.clip_by_global_norm(spec["clip_norm"])] if spec["clip_norm"] else []
    chain += [clip_each(spec["clip_tensor_norm"])] if spec["clip_tensor_norm"] else []
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
    pairs = {g: make_optimizer(g, config[g], params[g], total, batch_size, examples) for g in params}
    return {g: optimizer for g, (optimizer, _) in pairs.items()}, {g: rate for g, (_, rate) in pairs.items()}
