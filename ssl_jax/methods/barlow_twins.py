"""Barlow Twins: the cross-correlation of the embeddings of two views should be the identity matrix.

Zbontar et al. 2021, "Barlow Twins: self-supervised learning via redundancy reduction" (arXiv:2103.03230), algorithm 1. Neither
negatives nor a teacher. `on_diagonal` is the width of the embedding when all images collapse to one point.
"""

from __future__ import annotations

from ssl_jax.engine.method import FEATURES, Method, Phase, Spec
from ssl_jax.engine.siamese import siamese
from ssl_jax.objectives.joint_embedding import barlow_twins, spread


def build(config, stages) -> Method:
    """`config.model`: the keys of `siamese`, and weights: off_diagonal, and scale of the whole loss.

    The official code averages gradients over devices that have only a part of the matrix, so they are 1 / devices of the true ones.
    Its rate of biases and BatchNorm was tuned with that; `weights.scale` stands for it.
    """
    networks, weights = siamese(config), config.model.weights

    def init(key, batch, frozen):
        params, stats = networks.init(key, networks.views(batch["image"], key))
        return params, {"batch_stats": stats}

    def loss(train, state, batch, key):
        x = networks.views(batch["image"], key)
        z, h, stats = networks.embed(train["net"], state.mutable["batch_stats"], x, train=True)
        value, logs = barlow_twins(z[:, 0], z[:, 1], weights.off_diagonal)
        return weights.scale * value, ({"batch_stats": stats}, {**logs, FEATURES: h, "target_spread": spread(z)})

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(Phase("ssl", ("net",), loss),),
        encode=networks.encode,
        views=networks.views,
        encoder=("net", "encoder"),
        couples_batch=True,
    )
