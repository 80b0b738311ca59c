"""Co-occurrence: are two patches neighbors in one image, or from different images?

Isola et al. 2016, "Learning visual groups from co-occurrences in space and time" (arXiv:1511.06811). One encoder sees each patch by
itself. The classifier's logit is the pointwise mutual information of two patches; as an affinity it groups the patches of an image
into segments. Patches do not overlap, and color operations act on each patch by itself: what all patches of an image share and
those of other images lack would give the answer away.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.augment.pixels import to_float
from ssl_jax.augment.tiles import grid_patches, join_patches, neighbor_pairs
from ssl_jax.engine.method import Method, ModelFns, Phase, Spec
from ssl_jax.engine.pretext import other_image, pretext_network, tile_views
from ssl_jax.errors import UserError
from ssl_jax.objectives.pairs import balanced_pairs


def symmetric(a, b):
    """Features [..., D] of two patches -> [..., 3 D], the same for swapped patches."""
    return jnp.concatenate([a + b, jnp.abs(a - b), a * b], -1)


def build(config, stages) -> Method:
    """`config.model`: grid, tile, jitter and tile_operations (see `tile_views`); stride, pixels between patches of `encode` and of an
    affinity matrix; encoder, layer, embed, head, standardize or mean and std (see `pretext_network`). `config.views`: one recipe
    for the whole image.
    """
    model, shape = config.model, tuple(config.data.image_shape)
    if model.grid < 2:
        raise UserError(f"config.model.grid={model.grid}: a single patch has no neighbor; give 2 or more")
    patches, network = tile_views(config), pretext_network(config, 1)
    first, second, _ = neighbor_pairs(model.grid, model.grid)
    first, second = first[first < second], second[first < second]  # each pair once

    def pairs(features):
        """[B, V, D] -> rows [B, 2 Q, 3 D]: Q pairs of neighbors, and as many with a patch of another image in the same places."""
        together = symmetric(features[:, first], features[:, second])
        return jnp.concatenate([together, symmetric(features[:, first], other_image(features)[:, second])], 1)

    def logits_of(net, stats, images, key, train):
        """(logits [B, 2 Q], new statistics)"""
        features, stats = network.read(net, stats, patches(images, key), train)
        logits, stats = network.answer(net, stats, pairs(features), train)
        return logits[..., 0], stats

    def init(key, batch, frozen):
        keys = jax.random.split(key, 5)
        net, stats = network.init(keys[1:], patches(batch["image"], keys[0]), pairs)
        return {"net": net}, {"batch_stats": stats}

    def loss(train, state, batch, key):
        logits, stats = logits_of(train["net"], state.mutable["batch_stats"], batch["image"], key, train=True)
        value, logs = balanced_pairs(*jnp.split(logits, 2, axis=1))
        return value, ({"batch_stats": stats}, {**logs, "chance": jnp.float32(0.5)})

    def pretext(params, mutable, batch, key):
        """Answer 1: from one image."""
        images = jnp.round(to_float(batch["image"]) * 255).astype(jnp.uint8)
        logits, _ = logits_of(params["net"], mutable["batch_stats"], images, key, train=False)
        answers = jnp.broadcast_to(jnp.arange(logits.shape[1]) < len(first), logits.shape).astype(jnp.int32)
        return {"": {"logits": jnp.stack([jnp.zeros_like(logits), logits], -1), "answers": answers}}

    def affinity(params, mutable, images):
        net, stats = params["net"], mutable["batch_stats"]
        cut = grid_patches(to_float(images), model.tile, model.stride)
        rows, columns = cut.shape[1:3]
        features, _ = network.read(net, stats, cut.reshape(len(images), rows * columns, *cut.shape[3:]), train=False)

        def with_all(one):  # [B, D]; one patch after the other, since all pairs at once would not fit
            return network.answer(net, stats, symmetric(one[:, None], features), train=False)[0][..., 0]

        pmi = jax.lax.map(with_all, features.swapaxes(0, 1)).swapaxes(0, 1)
        margins = [(side - model.tile) % model.stride // 2 for side in images.shape[1:3]]
        places = jnp.stack(jnp.meshgrid(jnp.arange(rows), jnp.arange(columns), indexing="ij"), -1).reshape(-1, 2)
        corners = places * model.stride + jnp.asarray(margins, jnp.int32)
        return {"pmi": pmi, "corners": corners, "size": jnp.int32(model.tile)}

    def encode(params, mutable, images):
        """Patches, as in training: their maps lie side by side, and 'pooled' is their mean."""
        cut = grid_patches(images, model.tile, model.stride)
        h = network.encode(params, mutable, cut.reshape(-1, *cut.shape[3:]))
        return {name: join_patches(x.reshape(*cut.shape[:3], *x.shape[1:])) for name, x in h.items()}

    return Method(
        inputs={"image": Spec(shape)},
        init=init,
        phases=(Phase("ssl", ("net",), loss),),
        encode=encode,
        views=patches,
        fns=ModelFns(pretext=pretext, affinity=affinity),
        encoder=("net", "encoder"),
        reads=network.reads,
        couples_batch=True,  # pairs of different images
    )
