"""Health checks: rules on the logged metrics that warn of collapse or of slow input, in the log and in the report.

The rules cover the failures that the papers describe, such as Brock et al. 2019 (arXiv:1809.11096, sections 4.1 and 4.2). A rule is
off for methods that do not log its metrics.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

log = logging.getLogger(__name__)
Line = Mapping[str, float]


class Rule(NamedTuple):
    """A symptom of an unhealthy run."""

    message: str  # the warning; may name metrics in braces
    sick: Callable[[Line], bool | None]  # of a logged line; None where the metrics are absent
    patience: int  # steps without a healthy line before the warning


def _ends(line: Line, suffix: str) -> list[float]:
    return [value for name, value in line.items() if name.endswith(suffix)]


def _all(suffixes: tuple[str, ...], test: Callable[[float], bool]) -> Callable[[Line], bool | None]:
    def sick(line):
        values = [_ends(line, suffix) for suffix in suffixes]
        return all(test(value) for group in values for value in group) if all(values) else None

    return sick


def _vanished(line: Line) -> bool | None:
    norms = _ends(line, "/grad_norm/generator"), _ends(line, "/grad_norm/discriminator")
    if not all(norms) or max(norms[0]) == 0:  # a generator without a loss has no gradient by design
        return None
    return max(norms[0]) < 1e-3 * max(norms[1])


def _assigned_alike(line: Line) -> bool | None:
    each, together = _ends(line, "/teacher_entropy"), _ends(line, "/entropy_of_mean")
    return together[0] - each[0] < 0.01 if each and together else None


def _memorized(line: Line) -> bool | None:
    train, test = _ends(line, "judge/accuracy_train"), _ends(line, "judge/accuracy_test")
    return train[0] - test[0] > 30 if train and test else None


RULES = (
    Rule(
        "the discriminator has won: it classifies more than 98 % of real and of fake images correctly; regularize it (R1, spectral "
        "normalization), or lower its learning rate or config.model.discriminator_steps",
        _all(("/accuracy_real", "/accuracy_fake"), lambda x: x > 0.98),
        1000,
    ),
    Rule(
        "the discriminator has collapsed: all logits are nearly equal (standard deviation below 0.001); raise its learning rate, or "
        "weaken its penalty",
        _all(("/logit_std",), lambda x: x < 1e-3),
        200,
    ),
    Rule(
        "the generator collapses: its samples are less than half as diverse as real images; see pictures/",
        _all(("/diversity",), lambda x: x < 0.5),
        1000,
    ),
    Rule(
        "the generator no longer learns: its gradient norm is below a thousandth of the discriminator's; use the non-saturating or "
        "the hinge loss (config.model.game)",
        _vanished,
        1000,
    ),
    Rule(
        "the encoder collapses: the variance of its codes is below 0.01; see reconstructions",
        _all(("/code_variance",), lambda x: x < 0.01),
        1000,
    ),
    Rule(
        "the encoder collapses: the means of its codes are nearly equal for all images (variance below 0.001); see reconstructions",
        _all(("/mean_variance",), lambda x: x < 1e-3),
        1000,
    ),
    Rule(
        "the code collapses: it is nearly equal for all images (standard deviation below 0.001); lower the penalty on it",
        _all(("/code_deviation",), lambda x: x < 1e-3),
        1000,
    ),
    Rule(
        "the embeddings collapse: they point in nearly one direction for all images (target_spread below 0.5; about 1 is healthy); a "
        "predictor, targets without a gradient, or a variance term prevents it",
        _all(("/target_spread",), lambda x: x < 0.5),
        300,
    ),
    Rule(
        "the prototypes collapse: the teacher gives all images the same ones (its mean entropy is that of its mean); check centering "
        "and config.model.teacher_temperature",
        _assigned_alike,
        300,
    ),
    Rule(
        "the teacher collapses: its codes are nearly equal for all images and places (target_std below 0.01); raise "
        "config.model.momentum",
        _all(("/target_std",), lambda x: x < 0.01),
        300,
    ),
    Rule(
        "the posterior collapses: no latent depends on the image; lower config.model.beta or warm it up",
        _all(("/active_units",), lambda x: x < 1),
        1000,
    ),
    Rule(
        "the codebook collapses: fewer than 5 % of the codes occur in a batch; give it unit codes, revival or a smaller size "
        "(config.model.quantizer)",
        _all(("/usage_of_batch",), lambda x: x < 0.05),
        1000,
    ),
    Rule(
        "the images are gray: fewer than 1 % of a batch have colors, so there is nothing to predict; give data in color",
        _all(("/colored",), lambda x: x < 0.01),
        100,
    ),
    Rule(
        "the discriminator memorizes its training images (accuracy 30 points above held-out images); stop early, or augment",
        _memorized,
        0,
    ),
    Rule(
        "the input is too slow: process {time/slowest_input_process:.0f} waits for it {time/slowest_input_wait:.0%} of the time, "
        "which stalls all devices; raise config.data.workers, or prepare smaller images",
        _all(("time/slowest_input_wait",), lambda x: x > 0.5),
        100,
    ),
)


class HealthMonitor:
    """Checks every logged line. Logs one warning when a symptom has lasted for its patience, and one message when it is over."""

    def __init__(self, rules: tuple[Rule, ...] = RULES):
        self.rules, self.since, self.warned = rules, {}, set()
        self.norms: dict[str, list[float]] = {}  # {metric: spectral norms so far}

    def update(self, step: int, line: Line) -> None:
        for rule in self.rules:
            sick = rule.sick(line)
            if sick is None:
                continue
            if not sick:
                self.since.pop(rule.message, None)
                if rule.message in self.warned:
                    self.warned.remove(rule.message)
                    log.info("step %d: over: %s", step, rule.message.format_map(line).partition(":")[0])
                continue
            since = self.since.setdefault(rule.message, step)
            if step - since >= rule.patience and rule.message not in self.warned:
                self.warned.add(rule.message)
                log.warning("step %d: %s", step, rule.message.format_map(line))
        for name, value in line.items():
            if name.startswith("spectral_norm/"):
                before = self.norms.setdefault(name, [])
                if len(before) > 1 and value > 3 * before[-1]:  # early growth is normal
                    log.warning(
                        "step %d: %s jumped from %.3g to %.3g, which precedes the late collapse of large generators; prefer an "
                        "earlier checkpoint", step, name, before[-1], value,
                    )  # fmt: skip
                before.append(value)


@functools.partial(jax.jit, static_argnames="iterations")
def spectral_norms(params: Mapping, iterations: int = 20) -> dict[str, jax.Array]:
    """{'spectral_norm/<group>': largest singular value of the group's kernels}; a kernel is a matrix [-1, C_out].

    Power iteration starts from the vector of ones. The estimate is never above the true value, and close to it where one direction
    dominates, as it does before a collapse.
    """
    return {f"spectral_norm/{group}": jnp.max(jnp.stack([_norm(x, iterations) for x in _kernels(tree)]))
            for group, tree in params.items()}  # fmt: skip


def _kernels(tree):
    return [x.reshape(-1, x.shape[-1]).astype(jnp.float32) for x in jax.tree.leaves(tree) if x.ndim > 1]


@jax.default_matmul_precision("highest")
def _norm(w: jax.Array, iterations: int) -> jax.Array:
    u = jnp.ones(w.shape[-1], jnp.float32) / jnp.sqrt(w.shape[-1])

    def step(_, u):
        u = w.T @ (w @ u)
        return u / (jnp.linalg.norm(u) + 1e-12)

    return jnp.linalg.norm(w @ jax.lax.fori_loop(0, iterations, step, u))
