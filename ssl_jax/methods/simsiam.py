"""SimSiam: a predictor matches the projection of the other view, which gets no gradient.

Chen and He 2021, "Exploring simple Siamese representation learning" (arXiv:2011.10566), algorithm 1: BYOL without a teacher. Watch
`target_spread`: it is about 1 for spread-out targets and goes to zero when all images collapse to one point.
"""

from __future__ import annotations

import jax

from ssl_jax.engine.method import FEATURES, Method, Phase, Spec
from ssl_jax.engine.siamese import siamese
from ssl_jax.objectives.joint_embedding import negative_cosine, spread


def build(config, stages) -> Method:
    """`config.model`: the keys of `siamese`, with a predictor, and stop_gradient; without it all embeddings collapse."""
    networks = siamese(config)
    targets_of = jax.lax.stop_gradient if config.model.stop_gradient else lambda z: z

    def init(key, batch, frozen):
        params, stats = networks.init(key, networks.views(batch["image"], key))
        return params, {"batch_stats": stats}

    def loss(train, state, batch, key):
        x = networks.views(batch["image"], key)
        z, h, stats = networks.embed(train["net"], state.mutable["batch_stats"], x, train=True)
        p, stats = networks.predict(train, stats, z, train=True)
        value = negative_cosine(p, targets_of(z)[:, ::-1])  # each view predicts the other
        return value, ({"batch_stats": stats}, {FEATURES: h, "target_spread": spread(z)})

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(Phase("ssl", networks.groups, loss),),
        encode=networks.encode,
        views=networks.views,
        encoder=("net", "encoder"),
        couples_batch=True,
    )
