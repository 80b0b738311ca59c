"""Supervised classification, and fine-tuning of pretrained encoders: cross-entropy on labels.

The classifier's input is the pooled features. With `model.head_layers = n` > 0 it is the n-th hidden layer of a projection head
(`model.head`), which is trained too: SimCLR v2's fine-tuning from the middle of the head (Chen et al. 2020b, section 2). The layers
of that head above the n-th stay unused. `config.warm_start` loads pretrained weights.
"""

from __future__ import annotations

import jax

from ssl_jax.augment.pixels import to_input
from ssl_jax.augment.views import make_views
from ssl_jax.engine.method import Method, Phase, Spec
from ssl_jax.errors import UserError
from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.models.build import construct
from ssl_jax.models.common import apply, init_variables
from ssl_jax.models.heads import LinearHead, ProjectionHead
from ssl_jax.objectives.classification import cross_entropy


def build(config, stages) -> Method:
    """`config.model`: encoder, head (ProjectionHead fields), head_layers, smoothing, mean and std of the input."""
    model = config.model
    if not config.data.num_classes:
        raise UserError(
            f"config.method='supervised' needs labels that are classes, and {config.data.name!r} has none; put the images of each "
            "class into a folder of its own, or train another method"
        )
    encoder = build_encoder(model.encoder, config.dtype)
    head = construct(ProjectionHead, "head", model.head, dtype=config.dtype)
    if model.head_layers and model.head_layers > len(model.head.widths):
        raise UserError(
            f"config.model.head_layers={model.head_layers}: config.model.head has {len(model.head.widths)} layers; give that at most"
        )
    classifier = LinearHead(config.data.num_classes)
    views = make_views(config.views)

    def features(net, stats, x, train):
        """(features dict, classifier input [B, D], new batch statistics)"""
        h, encoder_stats = apply(encoder, net["encoder"], stats["encoder"], x, train)
        if not model.head_layers:
            return h, h["pooled"], {**stats, "encoder": encoder_stats}
        z, head_stats = apply(head, net["head"], stats["head"], h["pooled"], train)
        return h, z[model.head_layers], {"encoder": encoder_stats, "head": head_stats}

    def init(key, batch, frozen):
        keys = jax.random.split(key, 3)
        x = views(batch["image"], key)[:, 0]
        params, stats = {}, {}
        params["encoder"], stats["encoder"] = init_variables(encoder, keys[0], x)
        h, _ = apply(encoder, params["encoder"], stats["encoder"], x, train=True)
        if model.head_layers:
            params["head"], stats["head"] = init_variables(head, keys[1], h["pooled"])
        _, top, _ = features(params, stats, x, train=True)
        params["classifier"], _ = init_variables(classifier, keys[2], top)
        return {"net": params}, {"batch_stats": stats}

    def loss(train, state, batch, key):
        x = to_input(views(batch["image"], key)[:, 0], model.mean, model.std)
        _, top, stats = features(train["net"], state.mutable["batch_stats"], x, train=True)
        logits, _ = apply(classifier, train["net"]["classifier"], {}, top, train=True)
        value, logs = cross_entropy(logits, batch["label"], model.smoothing)
        return value, ({"batch_stats": stats}, logs)

    def encode(params, mutable, images):
        net = params["net"]
        x = to_input(images, model.mean, model.std)
        h, top, _ = features(net, mutable["batch_stats"], x, train=False)
        logits, _ = apply(classifier, net["classifier"], {}, top, train=False)
        return {**h, "logits": logits}

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape)), "label": Spec((), "int32")},
        init=init,
        phases=(Phase("sup", ("net",), loss),),
        encode=encode,
        views=views,
        encoder=("net", "encoder"),
    )
