"""Does a game between networks still go on, and do the devices have something to do? Rules on the logged metrics; a sick run says so
in the log and in its report.

The signatures are those of Brock et al. 2019 (arXiv:1809.11096, sections 4.1 and 4.2) and of the failures that every paper on the
subject describes. Metrics that a method does not log are not watched.
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


class Sign(NamedTuple):
    """`sick(line)` is None where the metrics are absent; a warning is given after `patience` steps without a healthy line. `message`
    may name metrics in braces.
    """

    message: str
    sick: Callable[[Line], bool | None]
    patience: int


def _ends(line: Line, suffix: str) -> list[float]:
    return [value for name, value in line.items() if name.endswith(suffix)]


def _all(suffixes: tuple[str, ...], test: Callable[[float], bool]) -> Callable[[Line], bool | None]:
    def sick(line):
        values = [_ends(line, suffix) for suffix in suffixes]
        return all(test(value) for group in values for value in group) if all(values) else None

    return sick


def _vanished(line: Line) -> bool | None:
    norms = _ends(line, "/grad_norm/generator"), _ends(line, "/grad_norm/discriminator")
    if not all(norms) or max(norms[0]) == 0:  # a generator without a loss is not meant to learn
        return None
    return max(norms[0]) < 1e-3 * max(norms[1])


def _memorized(line: Line) -> bool | None:
    train, test = _ends(line, "judge/accuracy_train"), _ends(line, "judge/accuracy_test")
    return train[0] - test[0] > 30 if train and test else None


SIGNS = (
    Sign(
        "the discriminator has won: more than 98 % of real and of fake are judged right; regularize it (R1, spectral normalization), "
        "or lower its rate or config.model.discriminator_steps",
        _all(("/accuracy_real", "/accuracy_fake"), lambda x: x > 0.98),
        1000,
    ),
    Sign(
        "the discriminator has given up: all its logits are alike (deviation below 0.001); raise its rate, or weaken its penalty",
        _all(("/logit_std",), lambda x: x < 1e-3),
        200,
    ),
    Sign(
        "the generator collapses: its samples differ from each other less than half as much as real images do; see pictures/",
        _all(("/diversity",), lambda x: x < 0.5),
        1000,
    ),
    Sign(
        "the generator no longer learns: its gradient is a thousandth of the discriminator's; use the non-saturating or the hinge game",
        _vanished,
        1000,
    ),
    Sign(
        "the encoder collapses: the variance of its codes is below 0.01; see reconstructions",
        _all(("/code_variance",), lambda x: x < 0.01),
        1000,
    ),
    Sign(
        "the encoder collapses: the means of its codes are the same for all images (variance below 0.001); see reconstructions",
        _all(("/mean_variance",), lambda x: x < 1e-3),
        1000,
    ),
    Sign(
        "the code collapses: all images have nearly the same (deviation below 0.001); lower the penalty on it",
        _all(("/code_deviation",), lambda x: x < 1e-3),
        1000,
    ),
    Sign(
        "the posterior collapses: no latent depends on the image; lower config.model.beta, or warm it up",
        _all(("/active_units",), lambda x: x < 1),
        1000,
    ),
    Sign(
        "the codebook collapses: fewer than 5 % of the codes occur in a batch; give it unit codes, revival or a smaller size "
        "(config.model.quantizer)",
        _all(("/usage_of_batch",), lambda x: x < 0.05),
        1000,
    ),
    Sign(
        "the discriminator knows its training images by heart (30 points better on them than on others); stop early, or augment",
        _memorized,
        0,
    ),
    Sign(
        "the input is too slow: process {time/slowest_input_process:.0f} waits for it {time/slowest_input_wait:.0%} of the time, and "
        "all devices with it; raise config.data.workers, or prepare smaller images",
        _all(("time/slowest_input_wait",), lambda x: x > 0.5),
        100,
    ),
)


class Watch:
    """Reads every logged line; warns once of each sign that has lasted, and says so when it is over."""

    def __init__(self, signs: tuple[Sign, ...] = SIGNS):
        self.signs, self.since, self.warned = signs, {}, set()
        self.norms: dict[str, list[float]] = {}  # spectral norms so far

    def update(self, step: int, line: Line) -> None:
        for sign in self.signs:
            sick = sign.sick(line)
            if sick is None:
                continue
            if not sick:
                self.since.pop(sign.message, None)
                if sign.message in self.warned:
                    self.warned.remove(sign.message)
                    log.info("step %d: over: %s", step, sign.message.format_map(line).partition(":")[0])
                continue
            since = self.since.setdefault(sign.message, step)
            if step - since >= sign.patience and sign.message not in self.warned:
                self.warned.add(sign.message)
                log.warning("step %d: %s", step, sign.message.format_map(line))
        for name, value in line.items():
            if name.startswith("spectral_norm/"):
                before = self.norms.setdefault(name, [])
                if len(before) > 1 and value > 3 * before[-1]:  # the first ones grow anyhow
                    log.warning(
                        "step %d: %s jumped from %.3g to %.3g, as before the late collapse of large generators; prefer an earlier "
                        "checkpoint", step, name, before[-1], value,
                    )  # fmt: skip
                before.append(value)


@functools.partial(jax.jit, static_argnames="iterations")
def spectral_norms(params: Mapping, iterations: int = 20) -> dict[str, jax.Array]:
    """{'spectral_norm/<group>': largest singular value among the kernels of a group}, as [-1, C_out] matrices.

    By power iteration from the vector of ones: never above the true value, and near it where one direction dominates, which is the
    case to be seen.
    """
    return {f"spectral_norm/{group}": jnp.max(jnp.stack([_norm(x, iterations) for x in _kernels(tree)]))
            for group, tree in params.items()}  # fmt: skip


def _kernels(tree):
    return [x.reshape(-1, x.shape[-1]).astype(jnp.float32) for x in jax.tree.leaves(tree) if x.ndim > 1]


def _norm(w: jax.Array, iterations: int) -> jax.Array:
    u = jnp.ones(w.shape[-1], jnp.float32) / jnp.sqrt(w.shape[-1])

    def step(_, u):
        u = w.T @ (w @ u)
        return u / (jnp.linalg.norm(u) + 1e-12)

    return jnp.linalg.norm(w @ jax.lax.fori_loop(0, iterations, step, u))
