"""Mixup and CutMix: pairs of images of a batch become one, and so do their labels.

Zhang et al. 2018 (arXiv:1710.09412) and Yun et al. 2019 (arXiv:1905.04899), with the rules of timm's `Mixup`, mode 'batch', which
DeiT and MAE fine-tune with: one draw per batch, the partner is the image at the same place from the end, and label smoothing is part
of the targets.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError


def check_mix(mixup: float, cutmix: float) -> None:
    """Raises UserError if neither of the two mixes anything."""
    if not (mixup > 0 or cutmix > 0):
        raise UserError("config.model.mix: mixup=0 and cutmix=0 mix nothing; make one of them positive, or remove config.model.mix")


def mix(
    images: jax.Array, labels: jax.Array, key: jax.Array, classes: int, smoothing: float = 0.0, mixup: float = 0.8,
    cutmix: float = 1.0, p: float = 1.0, switch: float = 0.5,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Images float [B, H, W, C] and labels int [B] -> (mixed images, soft targets float32 [B, classes] that sum to 1).

    Args:
        smoothing: weight in [0, 1) of the uniform distribution in the targets; do not smooth again in the loss.
        mixup, cutmix: alpha of Beta(alpha, alpha), the distribution of the share of the first image; 0 disables one of the two.
        p: probability that a batch is mixed at all.
        switch: probability of CutMix where both are enabled.
    """
    weights = draw_weights(key, images.shape[1:3], mixup, cutmix, p, switch)
    return blend(images, weights), soft_targets(labels, weights.mean(), classes, smoothing)


def draw_weights(key: jax.Array, hw: tuple[int, int], mixup: float, cutmix: float, p: float, switch: float) -> jax.Array:
    """The weight of the first image in each pixel, float32 [H, W]: constant (mixup), or 0 in a box and 1 outside (CutMix)."""
    keys = jax.random.split(key, 5)
    weights = jnp.ones(hw)
    if mixup > 0:
        weights = jnp.full(hw, jax.random.beta(keys[0], mixup, mixup))
    if cutmix > 0:
        center = [jax.random.randint(k, (), 0, side) for k, side in zip(jax.random.split(keys[1]), hw, strict=True)]
        cut = outside_box(hw, jax.random.beta(keys[2], cutmix, cutmix), center)
        weights = jnp.where(jax.random.uniform(keys[3]) < switch, cut, weights) if mixup > 0 else cut
    return jnp.where(jax.random.uniform(keys[4]) < p, weights, 1.0)


def outside_box(hw: tuple[int, int], share: jax.Array, center) -> jax.Array:
    """float32 [H, W]: 0 in the box around `center` = (row, column) that covers 1 - `share` of the image where no border cuts it.

    Its half sides are rounded down, as in timm. What a border cuts off is kept: the mean of the result is the share to use.
    """
    inside = []
    for side, middle in zip(hw, center, strict=True):
        half = jnp.floor(side * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
        place = jnp.arange(side)
        inside.append((place >= middle - half) & (place < middle + half))
    return 1.0 - (inside[0][:, None] & inside[1][None, :]).astype(jnp.float32)


def blend(images: jax.Array, weights: jax.Array) -> jax.Array:
    """w x_i + (1 - w) x_(B - 1 - i) for images [B, H, W, C] and weights [H, W]."""
    weights = weights[..., None].astype(images.dtype)
    return weights * images + (1 - weights) * images[::-1]


def soft_targets(labels: jax.Array, share: jax.Array, classes: int, smoothing: float = 0.0) -> jax.Array:
    """float32 [B, classes]: `share` of the own label int [B] and the rest of the partner's, both smoothed."""
    one_hot = jax.nn.one_hot(labels, classes, dtype=jnp.float32)
    smooth = (1 - smoothing) * one_hot + smoothing / classes
    return share * smooth + (1 - share) * smooth[::-1]
