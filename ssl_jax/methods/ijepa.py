"""I-JEPA: from a part of an image predict what a teacher says of other parts, not their pixels.

Assran et al. 2023, "Self-supervised learning from images with a joint-embedding predictive architecture" (arXiv:2301.08243), section 3.
The encoder sees the context alone; the teacher, a moving average of it, sees the whole image. Images are cropped and not augmented.
A prediction of zeros has the loss .4247, that of no information. Watch `target_std`, which goes to 0 in collapse.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.augment.patches import blocks, context
from ssl_jax.augment.pixels import to_input
from ssl_jax.augment.views import make_views, output_size
from ssl_jax.engine.method import FEATURES, Method, Phase, Spec
from ssl_jax.engine.siamese import follow, momentum_schedule
from ssl_jax.errors import UserError
from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.models.backbones.vit import parse_variant
from ssl_jax.models.build import construct
from ssl_jax.models.common import create, run
from ssl_jax.models.jepa import JEPAPredictor

EPSILON = 1e-5  # of the variance of a target


def build(config, stages) -> Method:
    """`config.model`: encoder (a ViT, see `build_encoder`), predictor (width, depth, heads), momentum and momentum_schedule of the
    teacher, mean and std of the input, and in patches

    targets, target_size: number of target blocks, and (rows, columns) of each.
    context_size: (rows, columns) of the block around the context. kept: patches of it outside all targets that the encoder sees.

    Sizes are fixed, so shapes are static; the official code draws them anew for each batch, and keeps the first patches that all images
    have.

    Raises:
        UserError: an encoder that is no ViT, blocks that do not fit, or more context than is surely left.
    """
    model = config.model
    if model.encoder["name"] != "vit":
        raise UserError(f"config.model.encoder.name={model.encoder['name']!r}: I-JEPA hides patches; give 'vit'")
    size, patch = parse_variant(model.encoder.get("variant", "S/16"))
    views = make_views(config.views)
    height, width = output_size(config.views, config.data.image_shape[-3:-1])
    grid = (height // patch, width // patch)
    patches = grid[0] * grid[1]
    for name in ("target_size", "context_size"):
        if any(side > whole for side, whole in zip(model[name], grid, strict=True)):
            raise UserError(f"config.model.{name}={tuple(model[name])} does not fit into {grid[0]} x {grid[1]} patches; give less")
    left = model.context_size[0] * model.context_size[1] - model.targets * model.target_size[0] * model.target_size[1]
    if model.kept > left:
        raise UserError(f"config.model.kept={model.kept}: only {max(left, 0)} patches are surely left outside the targets; give less")
    encoder = build_encoder(model.encoder, config.dtype)
    predictor = construct(JEPAPredictor, "predictor", model.predictor, grid=grid, outputs=size.width, dtype=config.dtype)

    def masks(key, batch):
        """(context [B, kept], targets [B, T, t])"""
        keys = jax.random.split(key, 3)
        targets = blocks(keys[0], batch, model.targets, tuple(model.target_size), grid)
        around = blocks(keys[1], batch, 1, tuple(model.context_size), grid)[:, 0]
        return context(keys[2], around, targets, model.kept, patches), targets

    def init(key, batch, frozen):
        keys = jax.random.split(key, 4)
        x = to_input(views(batch["image"], keys[0])[:, 0], model.mean, model.std)
        params, _ = create(encoder, keys[1], x)
        seen, targets = masks(keys[3], len(x))
        h, _ = run(encoder, params, {}, x, train=False, visible=seen)
        net = {"encoder": params}
        predictor_params, _ = create(predictor, keys[2], h["tokens"], seen, targets)
        return {"net": net, "predictor": predictor_params}, {"teacher": {"net": jax.tree.map(jnp.copy, net)}}

    def loss(train, state, batch, key):
        views_key, mask_key, drop_key = jax.random.split(key, 3)
        x = to_input(views(batch["image"], views_key)[:, 0], model.mean, model.std)
        seen, targets = masks(mask_key, len(x))
        h, _ = run(encoder, train["net"]["encoder"], {}, x, train=True, key=drop_key, visible=seen)
        predicted, _ = run(predictor, train["predictor"], {}, h["tokens"], seen, targets, train=True)
        whole, _ = run(encoder, state.mutable["teacher"]["net"]["encoder"], {}, x, train=False)
        codes = jax.lax.stop_gradient(whole["tokens"].astype(jnp.float32))
        wanted = jnp.take_along_axis(normalized(codes), targets.reshape(len(x), -1)[..., None], 1).reshape(predicted.shape)
        logs = {FEATURES: h["pooled"][:, None], "target_std": jnp.std(codes, (0, 1)).mean()}
        return smooth_l1(predicted - wanted).mean(), ({}, logs)

    def encode(params, mutable, images):
        """Of the teacher."""
        return run(encoder, mutable["teacher"]["net"]["encoder"], {}, to_input(images, model.mean, model.std), train=False)[0]

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(Phase("ssl", ("net", "predictor"), loss),),
        encode=encode,
        views=views,
        after=follow(momentum_schedule(config)),
        encoder=("teacher", "net", "encoder"),
    )


def normalized(codes: jax.Array) -> jax.Array:
    """Rows [..., D] with mean 0 and variance 1."""
    mean = codes.mean(-1, keepdims=True)
    return (codes - mean) * jax.lax.rsqrt(codes.var(-1, keepdims=True) + EPSILON)


def smooth_l1(x: jax.Array) -> jax.Array:
    """x^2 / 2 up to 1, |x| - 1/2 beyond."""
    return jnp.where(jnp.abs(x) < 1, 0.5 * x * x, jnp.abs(x) - 0.5)
