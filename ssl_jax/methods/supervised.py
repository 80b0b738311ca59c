"""Supervised classification, and fine-tuning of pretrained encoders: cross-entropy on labels.

The encoder is one of three: a new one (`model.encoder`), also with the weights that `config.warm_start` loads; a copy of that of the
stage 'backbone' (`model.backbone='trained'`); or that encoder as it is ('frozen').

The classifier's input is the pooled features. With `model.head_layers = n` > 0 it is the n-th hidden layer of a projection head
(`model.head`), which is trained too: SimCLR v2's fine-tuning from the middle of the head (Chen et al. 2020b, section 2). The layers
of that head above the n-th stay unused. With `model.pool = 'mean_norm'` it is the mean of the patches of a ViT's last block, with a
normalization of its own instead of the encoder's (He et al. 2022, arXiv:2111.06377, MAE's code).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssl_jax.augment.mixup import check_mix, mix
from ssl_jax.augment.views import make_views
from ssl_jax.engine.backbone import open_backbone, own_encoder
from ssl_jax.engine.method import Method, Phase, Spec
from ssl_jax.errors import UserError
from ssl_jax.models.build import construct
from ssl_jax.models.common import apply, init_variables
from ssl_jax.models.heads import LinearHead, ProjectionHead
from ssl_jax.objectives.classification import cross_entropy, soft_cross_entropy

POOLS = ("pooled", "mean_norm")
MIX, DROP = np.uint32(2**31), np.uint32(2**31 + 1)  # numbers of random keys, above those of the examples of a batch


def build(config, stages) -> Method:
    """`config.model`: encoder, mean and std of the input, or backbone (with a stage of that name); head (ProjectionHead fields),
    head_layers, pool, head_std (of the classifier's first weights), smoothing, mix (arguments of `mix`), drop_path, ema.decay."""
    model = config.model
    if not config.data.num_classes:
        raise UserError(
            f"config.method='supervised' needs labels that are classes, and {config.data.name!r} has none; put the images of each "
            "class into a folder of its own, or train another method"
        )
    staged, mixing = "backbone" in stages, model.get("mix") or {}
    encoder = open_backbone(config, stages) if staged else own_encoder(config)
    _check(model, staged)
    head = construct(ProjectionHead, "head", model.head, dtype=config.dtype) if model.head_layers else None
    if mixing:
        check_mix(mixing["mixup"], mixing["cutmix"])
    pool, std, decay = model.get("pool", "pooled"), model.get("head_std", 0.0), model.get("ema", {}).get("decay", 0.0)
    classifier = LinearHead(config.data.num_classes, zero_init=not std, std=std, norm=pool == "mean_norm")
    views = make_views(config.views)

    def read(net, stats, frozen, images, train, key=None):
        """(features dict, classifier input [B, D], new batch statistics)"""
        h, stats = encoder.read(net, stats, frozen, images, train, key)
        if pool == "mean_norm":
            return h, mean_of_last_block(h), stats
        if not model.head_layers:
            return h, h["pooled"], stats
        z, head_stats = apply(head, net["head"], stats["head"], h["pooled"], train)
        return h, z[model.head_layers], {**stats, "head": head_stats}

    def init(key, batch, frozen):
        keys = jax.random.split(key, 3)
        images = views(batch["image"], key)[:, 0]
        params, stats = encoder.init(frozen) if staged else encoder.init(keys[0], images)
        h, _ = encoder.read(params, stats, frozen, images, train=False)
        if model.head_layers:
            params["head"], stats["head"] = init_variables(head, keys[1], h["pooled"])
        _, top, _ = read(params, stats, frozen, images, train=False)
        params["classifier"], _ = init_variables(classifier, keys[2], top)
        mutable = {"batch_stats": stats}
        if decay:
            mutable["ema"] = {"net": jax.tree.map(jnp.copy, params), "batch_stats": jax.tree.map(jnp.copy, stats)}
        return {"net": params}, mutable

    def loss(train, state, batch, key):
        images, labels = views(batch["image"], key)[:, 0], batch["label"]
        if mixing:
            images, targets = mix(images, labels, jax.random.fold_in(key, MIX), config.data.num_classes, model.smoothing, **mixing)
        drop_key = jax.random.fold_in(key, DROP) if model.get("drop_path") else None
        _, top, stats = read(train["net"], state.mutable["batch_stats"], state.frozen, images, True, drop_key)
        logits, _ = apply(classifier, train["net"]["classifier"], {}, top, train=True)
        value, logs = soft_cross_entropy(logits, targets) if mixing else cross_entropy(logits, labels, model.smoothing)
        return value, ({"batch_stats": stats}, logs)

    def average(state):
        # At the first step a copy: a warm start has replaced the weights after `init`.
        now = {"net": state.params["net"], "batch_stats": state.mutable["batch_stats"]}
        ema = optax.incremental_update(now, state.mutable["ema"], jnp.where(state.step == 0, 1.0, 1 - decay))
        return {**state.mutable, "ema": ema}

    def encode(params, mutable, images):
        net, stats = (mutable["ema"]["net"], mutable["ema"]["batch_stats"]) if decay else (params["net"], mutable["batch_stats"])
        h, top, _ = read(net, stats, mutable, images, train=False)
        logits, _ = apply(classifier, net["classifier"], {}, top, train=False)
        return {**h, "logits": logits}

    where = ("ema",) if decay else ()
    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape)), "label": Spec((), "int32")},
        init=init,
        phases=(Phase("sup", ("net",), loss),),
        encode=encode,
        views=views,
        encoder=encoder.encoder and (*where, *encoder.encoder),
        encoder_stats=(*where, *encoder.encoder_stats),
        **({"after": average} if decay else {}),
    )


def mean_of_last_block(layers) -> jax.Array:
    """float32 [B, D]: the mean of the patches of a ViT's last block, before the normalization of its output.

    Raises:
        UserError: the encoder is no ViT.
    """
    blocks = [name for name in layers if name.startswith("block")]
    if not blocks or "patches" not in layers:
        raise UserError(f"config.model.pool='mean_norm' needs a ViT, and the encoder has {', '.join(layers)}; give 'pooled'")
    rows, columns = layers["patches"].shape[1:3]
    last = layers[max(blocks, key=lambda name: int(name.removeprefix("block")))]
    return last[:, -rows * columns :].mean(axis=1, dtype=jnp.float32)


def _check(model, staged: bool) -> None:
    """Raises UserError for parts of `config.model` that do not fit together."""
    pool = model.get("pool", "pooled")
    if pool not in POOLS:
        raise UserError(f"config.model.pool={pool!r} is unknown; choose {' or '.join(POOLS)}")
    if staged and model.head_layers:
        raise UserError(
            f"config.model.head_layers={model.head_layers} reads a projection head, which a stage does not give; use "
            "config.warm_start, as in configs/supervised.py:finetune, or head_layers=0"
        )
    if model.head_layers and pool != "pooled":
        raise UserError(f"config.model.pool={pool!r} leaves no place for config.model.head_layers={model.head_layers}; give 0 of them")
    if model.head_layers and model.head_layers > len(model.head.widths):
        raise UserError(
            f"config.model.head_layers={model.head_layers}: config.model.head has {len(model.head.widths)} layers; give that at most"
        )
