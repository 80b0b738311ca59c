"""VICReg: embeddings of two views agree, every dimension varies over the batch, and no two dimensions vary together.

Bardes et al. 2022, "VICReg: variance-invariance-covariance regularization" (arXiv:2105.04906), algorithm 1. Neither negatives nor a
teacher, and embeddings are not normalized. `variance` is .99 when all images collapse to one point.
"""

from __future__ import annotations

from ssl_jax.engine.method import FEATURES, Method, Phase, Spec
from ssl_jax.engine.siamese import siamese
from ssl_jax.objectives.joint_embedding import spread, vicreg


def build(config, stages) -> Method:
    """`config.model`: the keys of `siamese`, and weights: invariance, variance and covariance (25, 25 and 1 in the paper)."""
    networks, weights = siamese(config), config.model.weights

    def init(key, batch, frozen):
        params, stats = networks.init(key, networks.views(batch["image"], key))
        return params, {"batch_stats": stats}

    def loss(train, state, batch, key):
        x = networks.views(batch["image"], key)
        z, h, stats = networks.embed(train["net"], state.mutable["batch_stats"], x, train=True)
        terms = vicreg(z[:, 0], z[:, 1])._asdict()
        value = sum(weights[name] * term for name, term in terms.items())
        return value, ({"batch_stats": stats}, {**terms, FEATURES: h, "target_spread": spread(z)})

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(Phase("ssl", ("net",), loss),),
        encode=networks.encode,
        views=networks.views,
        encoder=("net", "encoder"),
        couples_batch=True,
    )
