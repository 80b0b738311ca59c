"""Colorization: a network sees an image in gray and predicts the distribution of its colors at every place.

Zhang et al. 2016, "Colorful image colorization" (arXiv:1603.08511): bins of a and b of Lab, where rare colors weigh more. Larsson et
al. 2016 and 2017, "Learning representations for automatic colorization" (arXiv:1603.06668) and "Colorization as a proxy task for
visual understanding" (arXiv:1703.04044): local histograms of hue and chroma. Both predict from hypercolumns.

Watch `nll`, the mean of -log p(color) in nats: the entropy of the frequent colors (`nll_of_frequencies`) needs no image. `encode`
takes RGB as every method; its network sees the gray channel only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ssl_jax.augment import hue, lab
from ssl_jax.augment.pixels import block_means, to_float
from ssl_jax.augment.views import make_views, output_size
from ssl_jax.engine.method import Method, ModelFns, Phase, Spec
from ssl_jax.errors import UserError
from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.models.build import build as build_by_name
from ssl_jax.models.build import construct
from ssl_jax.models.common import apply, create, init_variables, run
from ssl_jax.models.hypercolumns import HypercolumnHead, read_maps
from ssl_jax.objectives import histograms


class Target(NamedTuple):
    """What is predicted. rgb is float32 [B, H, W, 3] in [0, 1], logits are [B, H / stride, W / stride, outputs]."""

    outputs: int
    gray: Callable  # rgb -> the input of the encoder, [B, H, W, 1]
    reads: str  # the same in words, see `Method.reads`
    loss: Callable  # (logits, rgb, mutable, step) -> (loss, (update of mutable, metrics))
    decode: Callable  # (logits, rgb) -> rgb with the predicted colors
    mutable: dict = {}  # noqa: RUF012 (never changed)


LIGHTNESS = "L / 50 - 1 of CIE Lab (sRGB, D65), one channel"
AB_SCALE = 110.0  # of regression: a and b become about -1 to 1


def lightness(rgb):
    return lab.rgb_to_lab(rgb)[..., :1] / 50 - 1


def ab_bins(stride: int, grid: float, neighbors: int, sigma: float, rebalance: float) -> Target:
    """Zhang et al.: the bins nearest to the mean a and b of a cell of stride x stride pixels.

    Args:
        grid: side of a bin.
        neighbors, sigma: of the soft code, see `lab.soft_encode`.
        rebalance: share of the uniform distribution in the frequencies by which a color is weighted; 1 weights all colors equally.
    """
    bins = lab.ab_bins(grid)
    count = len(bins)

    def loss(logits, rgb, mutable, step):
        """The mean over places of weight times cross-entropy; gray images weigh 0. Weights have mean 1 in the data so far."""
        ab = block_means(lab.rgb_to_lab(rgb)[..., 1:], stride)
        codes = lab.nearest_bin(ab, bins)
        colored = jnp.broadcast_to(lab.has_color(ab)[:, None, None], codes.shape).astype(jnp.float32)
        weights = lab.rebalancing_weights(mutable["frequencies"], rebalance)[codes]
        each = histograms.soft_cross_entropy(logits, lab.soft_encode(ab, bins, neighbors, sigma))
        batch = histograms.bin_frequencies(codes.ravel(), count, colored.ravel())
        frequencies = histograms.update_frequencies(mutable["frequencies"], batch, step)

        def mean(x):
            return jnp.sum(x * colored) / jnp.maximum(jnp.sum(colored), 1)

        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), codes[..., None], -1)[..., 0]
        logs = {"nll": -mean(log_p), "nll_of_frequencies": histograms.entropy(frequencies), "colored": jnp.mean(colored),
                "accuracy": mean(jnp.argmax(logits, -1) == codes)}  # fmt: skip
        return jnp.mean(weights * colored * each), ({"frequencies": frequencies}, logs)

    def decode(logits, rgb):
        ab = lab.annealed_mean(logits, bins)
        ab = jax.image.resize(ab, (*rgb.shape[:3], 2), "bilinear")
        return lab.lab_to_rgb(jnp.concatenate([lab.rgb_to_lab(rgb)[..., :1], ab], -1))

    return Target(count, lightness, LIGHTNESS, loss, decode, {"frequencies": jnp.full(count, 1 / count)})


def hue_chroma(stride: int, bins: int, window: int, hue_weight: float) -> Target:
    """Larsson et al.: histograms of hue and of chroma in windows of window x window pixels, whose centers are those of the cells."""
    if window < stride or (window - stride) % 2:
        raise UserError(f"config.model.target.window={window} must be config.model.stride={stride} plus 0, 2, 4, ...")
    margin = (window - stride) // 2

    def loss(logits, rgb, mutable, step):
        """hue_weight * chroma * KL(hue) + possible chroma * KL(chroma): black and white have no chroma, and gray has no hue."""
        padded = jnp.pad(rgb, ((0, 0), (margin, margin), (margin, margin), (0, 0)), "edge")
        of_hue, of_chroma = (histograms.divergence(part, hue.local_histograms(values, bins, window, stride))
                             for part, values in zip(jnp.split(logits, 2, -1), hue.hue_chroma(padded), strict=True))  # fmt: skip
        cells = block_means(jnp.stack([hue.hue_chroma(rgb)[1], hue.possible_chroma(jnp.mean(rgb, -1))], -1), stride)
        logs = {"hue": jnp.mean(of_hue), "chroma": jnp.mean(of_chroma), "colored": jnp.mean(jnp.max(cells[..., 0], (1, 2)) > 0.05)}
        return jnp.mean(hue_weight * cells[..., 0] * of_hue + cells[..., 1] * of_chroma), ({}, logs)

    def decode(logits, rgb):
        shares = (jax.nn.softmax(part) for part in jnp.split(logits, 2, -1))
        shares = [jax.image.resize(part, (*rgb.shape[:3], bins), "bilinear") for part in shares]
        return hue.expected_color(jnp.mean(rgb, -1), *shares)

    def gray(rgb):
        return 2 * jnp.mean(rgb, -1, keepdims=True) - 1

    return Target(2 * bins, gray, "2 m - 1 for the mean m of red, green and blue, one channel", loss, decode)


def ab_regression(stride: int) -> Target:
    """The mean a and b of a cell by least squares, against which Zhang et al. compare their bins: unsure predictions become gray."""

    def loss(logits, rgb, mutable, step):
        ab = block_means(lab.rgb_to_lab(rgb)[..., 1:], stride)
        colored = jnp.mean(lab.has_color(ab).astype(jnp.float32))
        return jnp.mean((logits - ab / AB_SCALE) ** 2), ({}, {"colored": colored})

    def decode(logits, rgb):
        ab = jax.image.resize(AB_SCALE * logits, (*rgb.shape[:3], 2), "bilinear")
        return lab.lab_to_rgb(jnp.concatenate([lab.rgb_to_lab(rgb)[..., :1], ab], -1))

    return Target(2, lightness, LIGHTNESS, loss, decode)


TARGETS = {"ab_bins": ab_bins, "ab_regression": ab_regression, "hue_chroma": hue_chroma}


def build(config, stages) -> Method:
    """`config.model`: encoder (see `build_encoder`; its images have one channel), maps (names of the layers of the hypercolumn), head
    (fields of HypercolumnHead), stride (pixels between predictions), target (a name in `TARGETS` and its arguments).
    """
    model, shape = config.model, tuple(config.data.image_shape)
    if shape[-1] != 3:
        had = f"{config.data.name!r} has images of {shape[-1]} channel"
        raise UserError(f"config.method='colorization' needs images in color, and {had}")
    views = make_views(config.views)
    height, width = output_size(config.views, shape[-3:-1])
    if height % model.stride or width % model.stride:
        raise UserError(f"config.model.stride={model.stride} does not divide views of {height} x {width} pixels; use a divisor")
    target = build_by_name(TARGETS, "target", model.target, stride=model.stride)
    encoder = build_encoder(model.encoder, config.dtype)
    head = construct(HypercolumnHead, "head", model.head, outputs=target.outputs, dtype=config.dtype)

    def grid(rgb):
        return tuple(max(1, side // model.stride) for side in rgb.shape[1:3])

    def predict(net, stats, rgb, train):
        h, stats = apply(encoder, net["encoder"], stats["encoder"], target.gray(rgb), train)
        return run(head, net["head"], {}, read_maps(h, model.maps), grid(rgb), train=train)[0], {"encoder": stats}

    def init(key, batch, frozen):
        keys = jax.random.split(key)
        rgb = views(batch["image"], key)[:, 0]
        params, stats = init_variables(encoder, keys[0], target.gray(rgb))
        h, _ = apply(encoder, params, stats, target.gray(rgb), train=True)
        head_params, _ = create(head, keys[1], read_maps(h, model.maps), grid(rgb))
        return {"net": {"encoder": params, "head": head_params}}, {"batch_stats": {"encoder": stats}, **target.mutable}

    def loss(train, state, batch, key):
        rgb = views(batch["image"], key)[:, 0]
        logits, stats = predict(train["net"], state.mutable["batch_stats"], rgb, train=True)
        value, (update, logs) = target.loss(logits, rgb, state.mutable, state.step)
        return value, ({"batch_stats": stats, **update}, logs)

    def encode(params, mutable, images):
        gray = target.gray(to_float(images))
        return apply(encoder, params["net"]["encoder"], mutable["batch_stats"]["encoder"], gray, train=False)[0]

    def reconstruct(params, mutable, images):
        """The lightness of the images with predicted colors."""
        rgb = to_float(images)
        return target.decode(predict(params["net"], mutable["batch_stats"], rgb, train=False)[0], rgb)

    return Method(
        inputs={"image": Spec(shape)},
        init=init,
        phases=(Phase("color", ("net",), loss),),
        encode=encode,
        views=views,
        fns=ModelFns(reconstruct=reconstruct),
        encoder=("net", "encoder"),
        reads=target.reads,
    )
