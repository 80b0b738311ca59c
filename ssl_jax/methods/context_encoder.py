"""Context encoders: a network sees an image with a hole and paints what is missing.

Pathak et al. 2016, "Context encoders: feature learning by inpainting" (arXiv:1604.07379): with the squared error alone, as in their
experiments on features, or with an adversary, which judges what is painted, for sharper pictures. Pixels are removed before the
network, so nothing of them can leak. `encode` sees whole images.

Watch `mse`, of the removed pixels in [0, 1]: what continues the border of the hole smoothly needs no understanding of the image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.augment import masks
from ssl_jax.augment.pixels import to_float, to_input
from ssl_jax.augment.views import make_views, output_size
from ssl_jax.engine.method import Method, ModelFns, Phase, Spec
from ssl_jax.errors import UserError
from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.models.build import build as build_by_name
from ssl_jax.models.build import construct
from ssl_jax.models.common import apply, create, init_variables, run
from ssl_jax.models.gan.networks import build_network
from ssl_jax.models.inpainting import InpaintingDecoder
from ssl_jax.objectives.adversarial import GAN_LOSSES, health

GAME = GAN_LOSSES["non_saturating"]


class Holes(NamedTuple):
    """What is hidden from the network."""

    draw: Callable  # (key, count) -> (removed, painted), bool [count or 1, H, W]
    judged: tuple[slice, slice]  # rows and columns that the adversary sees: not the context, if the hole is always at one place


def center(image_hw, size: int, overlap: int = 0):
    """A square of `size` pixels in the center is painted; all but its outermost `overlap` pixels are removed."""
    removed, painted = masks.center_mask(image_hw, size - 2 * overlap), masks.center_mask(image_hw, size)
    top, left = (int(places[0]) for places in np.nonzero(painted))
    return Holes(lambda key, count: (removed[None], painted[None]), (slice(top, top + size), slice(left, left + size)))


def random_region(image_hw, area, cell: int = 16):
    """A region of random shape of each image is removed and painted, see `masks.random_region_masks`."""

    def draw(key, count):
        removed = masks.random_region_masks(key, count, image_hw, area, cell)
        return removed, removed

    jax.eval_shape(lambda: draw(jax.random.key(0), 1))  # refuses what is not possible
    return Holes(draw, (slice(0, image_hw[0]), slice(0, image_hw[1])))


MASKS = {"center": center, "random_region": random_region}


def build(config, stages) -> Method:
    """`config.model`: encoder (see `build_encoder`), map (its layer that the decoder reads), decoder (fields of InpaintingDecoder),
    mask (a name in `MASKS` and its arguments), overlap_weight (of pixels that are painted but not removed), mean and std of the input;
    removed pixels have the mean. adversary: weight, of its part of the loss, from 0 to 1, and discriminator (see `build_network`);
    a weight of 0 leaves it out.
    """
    model, shape = config.model, tuple(config.data.image_shape)
    views = make_views(config.views)
    size = tuple(output_size(config.views, shape[-3:-1]))
    holes = build_by_name(MASKS, "mask", model.mask, image_hw=size)
    weight, judged = model.adversary.weight, holes.judged
    encoder = build_encoder(model.encoder, config.dtype)
    decoder = construct(InpaintingDecoder, "decoder", model.decoder, dtype=config.dtype)
    discriminator = build_network("discriminator", model.adversary.discriminator, judged[0].stop - judged[0].start, 0, config.dtype)
    mean, std = (jnp.asarray(values, jnp.float32) for values in (model.mean, model.std))

    def bottleneck(h):
        if model.map not in h or h[model.map].ndim != 4:
            maps = ", ".join(name for name, x in h.items() if x.ndim == 4)
            raise UserError(f"config.model.map={model.map!r} is no map of the encoder; it has {maps}")
        return h[model.map]

    def paint(net, stats, rgb, removed, train):
        """(whole pictures as the decoder paints them [B, H, W, 3], not clipped, new statistics)."""
        if rgb.shape[1:3] != size:  # the channel-wise layer has a weight for each place
            given = f"{rgb.shape[1]} x {rgb.shape[2]}"
            raise UserError(f"a context encoder paints images of the size of its views, {size[0]} x {size[1]}, and these have {given}")
        x = masks.remove(to_input(rgb, model.mean, model.std), removed, 0.0)
        h, encoder_stats = apply(encoder, net["encoder"], stats["encoder"], x, train)
        out, state = run(decoder, net["decoder"], {"batch_stats": stats["decoder"]}, bottleneck(h), rgb.shape[1:3], train=train)
        return out * std + mean, {"encoder": encoder_stats, "decoder": state["batch_stats"]}

    def init(key, batch, frozen):
        keys = jax.random.split(key, 3)
        x = to_input(views(batch["image"], key)[:, 0], model.mean, model.std)
        params, stats = init_variables(encoder, keys[0], x)
        h, _ = apply(encoder, params, stats, x, train=True)
        decoder_params, state = create(decoder, keys[1], bottleneck(h), x.shape[1:3])
        params = {"net": {"encoder": params, "decoder": decoder_params}}
        mutable = {"batch_stats": {"encoder": stats, "decoder": state["batch_stats"]}}
        if weight:
            params["discriminator"], mutable["discriminator"] = create(discriminator, keys[2], x[:, *judged])
        return params, mutable

    def score(params, state, pictures):
        """(logits [B] of pictures [B, h, w, 3] in [0, 1], new statistics)."""
        (logits, _), state = run(discriminator, params, state, 2 * pictures - 1, train=True)
        return logits, state

    def fill(net, stats, images, key):
        """(views, what is painted, removed, painted, the pictures with it that are judged, new statistics)"""
        views_key, mask_key = jax.random.split(key)
        rgb = views(images, views_key)[:, 0]
        removed, painted = holes.draw(mask_key, len(rgb))
        out, stats = paint(net, stats, rgb, removed, train=True)
        return rgb, out, removed, painted, jnp.where(painted[..., None], out, rgb)[:, *judged], stats

    def discriminator_loss(train, state, batch, key):
        rgb, *_, filled, _ = fill(state.params["net"], state.mutable["batch_stats"], batch["image"], key)
        on_real, new_state = score(train["discriminator"], state.mutable["discriminator"], rgb[:, *judged])
        on_fake, new_state = score(train["discriminator"], new_state, filled)
        return GAME.discriminator(on_real, on_fake), ({"discriminator": new_state}, health(on_real, on_fake))

    def loss(train, state, batch, key):
        rgb, out, removed, painted, filled, stats = fill(train["net"], state.mutable["batch_stats"], batch["image"], key)
        error = jnp.mean((out - rgb) ** 2, -1)
        weights = jnp.where(removed, 1.0, model.overlap_weight) * painted
        whole = jnp.ones(error.shape)
        value = jnp.sum(error * weights) / jnp.sum(whole * painted)
        updates, logs = {"batch_stats": stats}, {"mse": jnp.sum(error * removed) / jnp.sum(whole * removed)}
        if weight:
            on_fake, updates["discriminator"] = score(state.params["discriminator"], state.mutable["discriminator"], filled)
            logs["adversarial"] = GAME.generator(on_fake)
            value = (1 - weight) * value + weight * logs["adversarial"]
        return value, (updates, logs)

    def encode(params, mutable, images):
        x = to_input(images, model.mean, model.std)
        return apply(encoder, params["net"]["encoder"], mutable["batch_stats"]["encoder"], x, train=False)[0]

    def inpaint(params, mutable, images):
        """Random holes are the same in each call."""
        rgb = to_float(images)
        removed = jnp.asarray(holes.draw(jax.random.key(0), len(rgb))[0])
        out, _ = paint(params["net"], mutable["batch_stats"], rgb, removed, train=False)
        return {"pictures": jnp.where(removed[..., None], jnp.clip(out, 0, 1), rgb), "removed": removed}

    def reconstruct(params, mutable, images):
        return inpaint(params, mutable, images)["pictures"]

    return Method(
        inputs={"image": Spec(shape)},
        init=init,
        phases=(*((Phase("d", ("discriminator",), discriminator_loss),) if weight else ()), Phase("inpaint", ("net",), loss)),
        encode=encode,
        views=views,
        fns=ModelFns(reconstruct=reconstruct, inpaint=inpaint),
        encoder=("net", "encoder"),
    )
