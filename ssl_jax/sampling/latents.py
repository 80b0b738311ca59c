"""Latent variables of generators: sampling, truncation and interpolation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri

from ssl_jax.errors import UserError

KINDS = ("normal", "uniform")


def sample_latents(kind: str, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Independent float32 latents of `shape`: 'normal' is N(0, 1), 'uniform' is U(-1, 1).

    Raises:
        UserError: for another kind.
    """
    if kind not in KINDS:
        raise UserError(f"config.model.latent.kind={kind!r} is unknown; choose {' or '.join(KINDS)}")
    return jax.random.normal(key, shape) if kind == "normal" else jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


def truncate(z: jax.Array, tau: jax.Array | float) -> jax.Array:
    """Map standard normal z monotonically to the standard normal truncated at |z| <= tau; tau <= 0 returns z unchanged.

    The distribution is that of resampling all values beyond tau (Brock et al. 2019, arXiv:1809.11096, section 3.1), but the map
    keeps the correspondence of z and sample for all tau. Elsewhere "truncation" also means tau times the normal truncated at 2
    (the published BigGAN modules), or a normal with smaller variance.
    """
    below = ndtr(-tau)
    p = ndtr(-jnp.abs(z))  # the lower tail, where float32 is precise
    inside = jnp.clip(ndtri(below + p * (1 - 2 * below)), -tau, 0.0)
    return jnp.where(jnp.asarray(tau) > 0, -jnp.sign(z) * inside, z)


def truncate_latents(kind: str, z: jax.Array, truncation: float | None) -> jax.Array:
    """z if `truncation` is None, else `truncate(z, truncation)`.

    Raises:
        UserError: truncation of latents that are not normal.
    """
    if truncation is None:
        return z
    if kind != "normal":
        raise UserError("only normal latents can be truncated (config.model.latent.kind='normal')")
    return truncate(z, truncation)


def lerp(a: jax.Array, b: jax.Array, t: jax.Array) -> jax.Array:
    """Linear interpolation between a and b [N, D] at t [N]; for latents w."""
    return a + (b - a) * t[:, None]


def slerp(a: jax.Array, b: jax.Array, t: jax.Array) -> jax.Array:
    """Spherical interpolation between the directions of a and b [N, D] at t [N], with unit norm; for latents z."""
    a, b = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
    angle = t * jnp.arccos(jnp.clip(jnp.sum(a * b, -1), -1, 1))
    across = b - jnp.sum(a * b, -1, keepdims=True) * a
    across = across / jnp.linalg.norm(across, axis=-1, keepdims=True)
    return a * jnp.cos(angle)[:, None] + across * jnp.sin(angle)[:, None]
