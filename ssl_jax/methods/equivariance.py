"""Equivariance to egomotion: each motion of the camera moves the features of all images by one linear map.

Jayaraman and Grauman 2015, "Learning image representations tied to ego-motion" (arXiv:1505.02206). For every motion g of a short
list there is a matrix M_g with M_g z(x) close to z(gx). A margin keeps other maps and other images away. Labels, if there are any,
add a cross-entropy. The pairs are windows of single images after known motions (`ssl_jax.augment.motions`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.augment import motions
from ssl_jax.augment.pixels import to_input
from ssl_jax.engine.method import Method, ModelFns, Phase, Spec
from ssl_jax.engine.pretext import other_image
from ssl_jax.errors import UserError
from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.models.build import construct
from ssl_jax.models.common import apply, init_variables
from ssl_jax.models.heads import LinearHead, ProjectionHead
from ssl_jax.objectives.classification import cross_entropy
from ssl_jax.objectives.pairs import distances_after_maps, equivariance


def build(config, stages) -> Method:
    """`config.model`: pairs (size, the pixels of a window; start [4], the limits of the motion of its first view; motions, G different
    ones [4]); encoder; layer, its output that the head reads, where maps are flattened; head (fields of ProjectionHead; its last width
    is that of the features z); margin; supervised (weight of the cross-entropy of labels; 0 needs none); mean and std of the input.
    """
    model, pairs, shape = config.model, config.model.pairs, tuple(config.data.image_shape)
    table = jnp.asarray(pairs.motions, jnp.float32)
    if len(set(map(tuple, pairs.motions))) < len(pairs.motions):
        raise UserError(f"config.model.pairs.motions={tuple(map(tuple, pairs.motions))}: two are the same; give different ones")
    for motion in pairs.motions:
        motions.check_interior(shape[-3:-1], pairs.size, motions.composed_limits(pairs.start, [abs(x) for x in motion]))
    labels = model.supervised.weight > 0
    if labels and not config.data.num_classes:
        raise UserError(
            f"config.model.supervised.weight={model.supervised.weight} needs labels that are classes, and {config.data.name!r} has "
            "none; give --config.model.supervised.weight=0"
        )
    encoder = build_encoder(model.encoder, config.dtype)
    head = construct(ProjectionHead, "head", model.head, dtype=config.dtype)
    classifier = LinearHead(config.data.num_classes or 1)

    def draw(images, key):
        """(windows [B, 2, h, w, 3], numbers of their motions [B], motions of the first windows [B, 4])"""
        motion_key, start_key = jax.random.split(key)
        keys = jax.vmap(lambda example: jax.random.fold_in(motion_key, example))(jnp.arange(len(images)))
        chosen = jax.vmap(lambda k: jax.random.randint(k, (), 0, len(table)))(keys)
        start = motions.draw_motions(start_key, len(images), pairs.start)
        return motions.two_windows(images, start, table[chosen], pairs.size), chosen, start

    def flat(layers):
        if model.layer not in layers:
            raise UserError(f"config.model.layer={model.layer!r} does not exist; the encoder has {', '.join(sorted(layers))}")
        return layers[model.layer].reshape(len(layers[model.layer]), -1)

    def features(net, stats, views, train):
        """(z float32 [B, 2, D], new statistics)"""
        x = to_input(views.reshape(-1, *views.shape[2:]), model.mean, model.std)
        h, encoder_stats = apply(encoder, net["encoder"], stats["encoder"], x, train)
        z, head_stats = apply(head, net["head"], stats["head"], flat(h), train)
        return z[-1].reshape(*views.shape[:2], -1), {"encoder": encoder_stats, "head": head_stats}

    def init(key, batch, frozen):
        keys = jax.random.split(key, 4)
        views, *_ = draw(batch["image"], keys[0])
        x, net, stats = to_input(views.reshape(-1, *views.shape[2:]), model.mean, model.std), {}, {}
        net["encoder"], stats["encoder"] = init_variables(encoder, keys[1], x)
        h, _ = apply(encoder, net["encoder"], stats["encoder"], x, train=True)
        net["head"], stats["head"] = init_variables(head, keys[2], flat(h))
        z, _ = features(net, stats, views, train=True)
        net["maps"] = jnp.tile(jnp.eye(z.shape[-1]), (len(table), 1, 1))
        if labels:
            net["classifier"], _ = init_variables(classifier, keys[3], z[:, 0])
        return {"net": net}, {"batch_stats": stats}

    def loss(train, state, batch, key):
        net = train["net"]
        views, chosen, _ = draw(batch["image"], key)
        z, stats = features(net, state.mutable["batch_stats"], views, train=True)
        distances = distances_after_maps(net["maps"], z[:, 0], z[:, 1])
        foreign = distances_after_maps(net["maps"], z[:, 0], other_image(z[:, 1]))
        foreign = jnp.take_along_axis(foreign, chosen[:, None], 1)[:, 0]
        value, logs = equivariance(distances, chosen, foreign, model.margin)
        logs["chance"] = jnp.float32(1 / len(table))
        if labels:
            logits, _ = apply(classifier, net["classifier"], {}, z[:, 0], train=True)
            error, own = cross_entropy(logits, batch["label"])
            value += model.supervised.weight * error
            logs |= {"label_loss": error, "label_accuracy": own["accuracy"]}
        return value, ({"batch_stats": stats}, logs)

    def encode(params, mutable, images):
        x = to_input(images, model.mean, model.std)
        return apply(encoder, params["net"]["encoder"], mutable["batch_stats"]["encoder"], x, train=False)[0]

    def asked(params, mutable, batch, key):
        """(views, true motions, motions of the first windows, minus the distances [B, G]) in inference mode."""
        views, chosen, start = draw(batch["image"], key)
        z, _ = features(params["net"], mutable["batch_stats"], views, train=False)
        return views, chosen, start, -distances_after_maps(params["net"]["maps"], z[:, 0], z[:, 1])

    def pretext(params, mutable, batch, key):
        """Which map brings the features of the first window nearest to those of the second?"""
        _, chosen, _, logits = asked(params, mutable, batch, key)
        return {"": {"logits": logits[:, None], "answers": chosen[:, None]}}

    def draw_pretext(params, mutable, batch, key):
        """Both windows, and the first beside itself after the motion of the nearest map."""
        views, chosen, start, logits = asked(params, mutable, batch, key)
        given = jnp.argmax(logits, -1)
        answer = motions.two_windows(batch["image"], start, table[given], pairs.size)
        side_by_side = [jnp.concatenate([x[:, 0], x[:, 1]], 2) for x in (views, answer)]
        return {"pictures": jnp.stack(side_by_side, 1), "right": given == chosen}

    return Method(
        inputs={"image": Spec(shape), **({"label": Spec((), "int32")} if labels else {})},
        init=init,
        phases=(Phase("ssl", ("net",), loss),),
        encode=encode,
        views=lambda images, key: draw(images, key)[0],
        fns=ModelFns(pretext=pretext, draw_pretext=draw_pretext),
        encoder=("net", "encoder"),
        couples_batch=True,  # pairs of different images
        notes={"labels": "trained with all labels of its train split"} if labels else {},
    )
