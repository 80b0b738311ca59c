"""Masked autoencoder: a ViT sees a quarter of the patches of an image, and a small decoder paints the others.

He et al. 2022, "Masked autoencoders are scalable vision learners" (arXiv:2111.06377), section 3. The encoder never sees masked patches,
nor a token in their place. The loss is a mean over masked patches.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.augment.patches import patchify, random_order, unpatchify
from ssl_jax.augment.pixels import to_float, to_input
from ssl_jax.augment.views import make_views, output_size
from ssl_jax.engine.method import FEATURES, Method, ModelFns, Phase, Spec
from ssl_jax.errors import UserError
from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.models.backbones.vit import parse_variant
from ssl_jax.models.build import construct
from ssl_jax.models.common import create, run
from ssl_jax.models.mae import MAEDecoder

NORM_EPSILON = 1e-6  # of the variance of a patch


def build(config, stages) -> Method:
    """`config.model`: encoder (a ViT, see `build_encoder`), decoder (width, depth, heads), mask_ratio, the share of patches that is
    hidden; norm_pix: targets are patches with mean 0 and variance 1; mean and std of the input.

    Raises:
        UserError: an encoder that is no ViT, patches that do not tile the views, or a mask that leaves or hides nothing.
    """
    model = config.model
    if model.encoder["name"] != "vit":
        raise UserError(f"config.model.encoder.name={model.encoder['name']!r}: masked autoencoders hide patches; give 'vit'")
    _, patch = parse_variant(model.encoder.get("variant", "S/16"))
    views = make_views(config.views)
    size = output_size(config.views, config.data.image_shape[-3:-1])
    grid = (size[0] // patch, size[1] // patch)
    count = grid[0] * grid[1]
    visible = int(count * (1 - model.mask_ratio))
    if not 0 < visible < count:
        raise UserError(f"config.model.mask_ratio={model.mask_ratio} leaves {visible} of {count} patches; give a value between 0 and 1")
    encoder = build_encoder(model.encoder, config.dtype)
    decoder = construct(MAEDecoder, "decoder", model.decoder, grid=grid, outputs=patch * patch * 3, dtype=config.dtype)

    def init(key, batch, frozen):
        keys = jax.random.split(key, 3)
        x = to_input(views(batch["image"], keys[0])[:, 0], model.mean, model.std)
        params, _ = create(encoder, keys[1], x)
        order = random_order(keys[0], len(x), count)
        h, _ = run(encoder, params, {}, x, train=False, visible=order[:, :visible])
        return {"net": {"encoder": params, "decoder": create(decoder, keys[2], h["tokens"], order, visible)[0]}}, {}

    def paint(net, x, order, train, key=None):
        """x [B, h, w, 3] as the network reads it -> (what the decoder says of each patch [B, N, P], features [B, D])."""
        h, _ = run(encoder, net["encoder"], {}, x, train=train, key=key, visible=order[:, :visible])
        return run(decoder, net["decoder"], {}, h["tokens"], order, visible, train=train)[0], h["pooled"]

    def loss(train, state, batch, key):
        views_key, mask_key, drop_key = jax.random.split(key, 3)
        x = to_input(views(batch["image"], views_key)[:, 0], model.mean, model.std)
        order = random_order(mask_key, len(x), count)
        painted, h = paint(train["net"], x, order, True, drop_key)
        errors = jnp.mean((painted - target(patchify(x, patch), model.norm_pix)) ** 2, -1)
        hidden = jnp.take_along_axis(errors, order[:, visible:], 1)
        of_visible = jnp.take_along_axis(errors, order[:, :visible], 1).mean()
        return hidden.mean(), ({}, {FEATURES: h[:, None], "of_visible": of_visible})

    def encode(params, mutable, images):
        return run(encoder, params["net"]["encoder"], {}, to_input(images, model.mean, model.std), train=False)[0]

    def inpaint(params, mutable, images):
        """The same random masks in each call. With normalized targets a patch gets back its true mean and deviation."""
        rgb = to_float(images)
        x = to_input(rgb, model.mean, model.std)
        order = random_order(jax.random.key(0), len(x), count)
        (painted, _), true = paint(params["net"], x, order, False), patchify(x, patch)
        if model.norm_pix:
            mean, deviation = statistics(true)
            painted = painted * deviation + mean
        hidden = jnp.zeros((len(x), count)).at[jnp.arange(len(x))[:, None], order[:, visible:]].set(1.0)
        removed = unpatchify(jnp.repeat(hidden[..., None], patch * patch, -1), patch, grid)[..., 0] > 0
        pictures = unpatchify(painted, patch, grid) * jnp.asarray(model.std) + jnp.asarray(model.mean)
        return {"pictures": jnp.where(removed[..., None], jnp.clip(pictures, 0, 1), rgb), "removed": removed}

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(Phase("mae", ("net",), loss),),
        encode=encode,
        views=views,
        fns=ModelFns(inpaint=inpaint),
        encoder=("net", "encoder"),
        notes={"painted": "with the true mean and deviation of each patch"} if model.norm_pix else {},
    )


def statistics(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mean, deviation) [..., 1] over the values of each patch [..., P], with the unbiased variance of the official code."""
    return patches.mean(-1, keepdims=True), jnp.sqrt(patches.var(-1, ddof=1, keepdims=True) + NORM_EPSILON)


def target(patches: jax.Array, norm_pix: bool) -> jax.Array:
    """What the decoder is to say of patches [..., P]."""
    if not norm_pix:
        return patches
    mean, deviation = statistics(patches)
    return (patches - mean) / deviation
