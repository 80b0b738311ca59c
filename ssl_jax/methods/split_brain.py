"""Split-brain autoencoders: one half of the encoder predicts the colors from the lightness, the other the lightness from the colors.

Zhang et al. 2017, "Split-brain autoencoders: unsupervised learning by cross-channel prediction" (arXiv:1611.09842). The halves share
nothing; the features are the layers of both, concatenated. Each half predicts from hypercolumns, as classes or as numbers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.augment import lab
from ssl_jax.augment.pixels import block_means, to_float
from ssl_jax.augment.views import make_views, output_size
from ssl_jax.engine.method import Method, ModelFns, Phase, Spec
from ssl_jax.errors import UserError
from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.models.build import construct
from ssl_jax.models.common import apply, create, init_variables, run
from ssl_jax.models.hypercolumns import HypercolumnHead, read_maps
from ssl_jax.objectives.classification import cross_entropy

HALVES = ("lightness", "color")  # by what they see; each predicts what the other sees
LOSSES = ("classification", "regression")


def scaled(rgb):
    """RGB, float32 in [0, 1], [B, H, W, 3] -> {'lightness': [B, H, W, 1], 'color': [B, H, W, 2]}, L and ab of Lab in about [-1, 1]."""
    x = lab.rgb_to_lab(rgb)
    return {"lightness": x[..., :1] / 50 - 1, "color": x[..., 1:] / 110}


def build(config, stages) -> Method:
    """`config.model`: encoder (of each half, so half as wide as usual; see `build_encoder`), maps (names of the layers of the
    hypercolumns), head (fields of HypercolumnHead), stride (pixels between predictions), loss (a name in `LOSSES`), grid (side of a
    bin of a and b), levels (number of bins of the lightness).
    """
    model, shape = config.model, tuple(config.data.image_shape)
    if model.loss not in LOSSES:
        raise UserError(f"config.model.loss={model.loss!r} is unknown; choose {', '.join(LOSSES)}")
    if shape[-1] != 3:
        had = f"{config.data.name!r} has images of {shape[-1]} channel"
        raise UserError(f"config.method='split_brain' needs images in color, and {had}")
    views = make_views(config.views)
    height, width = output_size(config.views, shape[-3:-1])
    if height % model.stride or width % model.stride:
        raise UserError(f"config.model.stride={model.stride} does not divide views of {height} x {width} pixels; use a divisor")
    bins, classify = lab.ab_bins(model.grid), model.loss == "classification"
    outputs = {"lightness": len(bins), "color": model.levels} if classify else {"lightness": 2, "color": 1}
    encoder = build_encoder(model.encoder, config.dtype)
    heads = {half: construct(HypercolumnHead, "head", model.head, outputs=outputs[half], dtype=config.dtype) for half in HALVES}

    def grid(x):
        return tuple(max(1, side // model.stride) for side in x.shape[1:3])

    def features(net, stats, x, train):
        """({half: layers}, new statistics)."""
        found = {half: apply(encoder, net[half], stats[half], x[half], train) for half in HALVES}
        return tuple({half: each[i] for half, each in found.items()} for i in (0, 1))

    def predict(net, h, x, train):
        """{half: [B, H / stride, W / stride, outputs], predicted from what this half sees}."""
        return {half: run(heads[half], net[half], {}, read_maps(h[half], model.maps), grid(x[half]), train=train)[0] for half in HALVES}

    def init(key, batch, frozen):
        encoders, stats, predictors, x = {}, {}, {}, scaled(views(batch["image"], key)[:, 0])
        for half, half_key in zip(HALVES, jax.random.split(key), strict=True):
            keys = jax.random.split(half_key)
            encoders[half], stats[half] = init_variables(encoder, keys[0], x[half])
            h, _ = apply(encoder, encoders[half], stats[half], x[half], train=True)
            predictors[half], _ = create(heads[half], keys[1], read_maps(h, model.maps), grid(x[half]))
        return {"net": {"encoder": encoders, "head": predictors}}, {"batch_stats": {"encoder": stats}}

    def loss(train, state, batch, key):
        x = scaled(views(batch["image"], key)[:, 0])
        h, stats = features(train["net"]["encoder"], state.mutable["batch_stats"]["encoder"], x, train=True)
        out = predict(train["net"]["head"], h, x, train=True)
        ab, lightness = block_means(x["color"], model.stride), block_means(x["lightness"], model.stride)
        if classify:
            level = jnp.clip(jnp.floor((lightness[..., 0] + 1) / 2 * model.levels), 0, model.levels - 1).astype(jnp.int32)
            codes = {"lightness": lab.nearest_bin(110 * ab, bins), "color": level}
            losses = {half: cross_entropy(out[half].reshape(-1, outputs[half]), codes[half].ravel()) for half in HALVES}
            logs = {f"accuracy_from_{half}": accuracy["accuracy"] for half, (_, accuracy) in losses.items()}
            losses = {half: value for half, (value, _) in losses.items()}
        else:
            losses, logs = {"lightness": jnp.mean((out["lightness"] - ab) ** 2), "color": jnp.mean((out["color"] - lightness) ** 2)}, {}
        logs |= {f"loss_from_{half}": value for half, value in losses.items()}
        return losses["lightness"] + losses["color"], ({"batch_stats": {"encoder": stats}}, logs)

    def encode(params, mutable, images):
        h, _ = features(params["net"]["encoder"], mutable["batch_stats"]["encoder"], scaled(to_float(images)), train=False)
        whole = {name: jnp.concatenate([h[half][name] for half in HALVES], -1) for name in h["lightness"]}
        return {**whole, **{half: h[half]["pooled"] for half in HALVES}}

    def reconstruct(params, mutable, images):
        """What each half predicts of the other, as one picture."""
        rgb = to_float(images)
        x = scaled(rgb)
        h, _ = features(params["net"]["encoder"], mutable["batch_stats"]["encoder"], x, train=False)
        out = predict(params["net"]["head"], h, x, train=False)
        ab, lightness = 110 * out["lightness"], 50 * (out["color"] + 1)
        if classify:
            centers = (jnp.arange(model.levels) + 0.5) * (100 / model.levels)
            ab, lightness = lab.annealed_mean(out["lightness"], bins), jax.nn.softmax(out["color"]) @ centers[:, None]
        return lab.lab_to_rgb(jax.image.resize(jnp.concatenate([lightness, ab], -1), rgb.shape, "bilinear"))

    return Method(
        inputs={"image": Spec(shape)},
        init=init,
        phases=(Phase("split", ("net",), loss),),
        encode=encode,
        views=views,
        fns=ModelFns(reconstruct=reconstruct),
        encoder=("net", "encoder"),
        reads="of CIE Lab (sRGB, D65): L / 50 - 1 for one half of the encoder, (a, b) / 110 for the other",
    )
