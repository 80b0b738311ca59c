"""BYOL: a predictor matches the teacher's projection of the other view; the teacher is a moving average of the student.

Grill et al. 2020, "Bootstrap your own latent" (arXiv:2006.07733), equations 1 to 3. There are no negatives. Watch `target_spread`:
it is about 1 for spread-out targets and goes to zero when all images collapse to one point.
"""

from __future__ import annotations

import jax

from ssl_jax.engine.method import FEATURES, Method, Phase, Spec
from ssl_jax.engine.siamese import follow, momentum_schedule, new_teacher, siamese
from ssl_jax.objectives.joint_embedding import negative_cosine, spread


def build(config, stages) -> Method:
    """`config.model`: the keys of `siamese`, with a predictor, and momentum and momentum_schedule of the teacher."""
    networks = siamese(config)

    def init(key, batch, frozen):
        params, stats = networks.init(key, networks.views(batch["image"], key))
        return params, {"batch_stats": stats, "teacher": new_teacher(params, stats)}

    def loss(train, state, batch, key):
        x, teacher = networks.views(batch["image"], key), state.mutable["teacher"]
        z, h, stats = networks.embed(train["net"], state.mutable["batch_stats"], x, train=True)
        p, stats = networks.predict(train, stats, z, train=True)
        targets, _, teacher_stats = networks.embed(teacher["net"], teacher["batch_stats"], x, train=True)
        targets = jax.lax.stop_gradient(targets)
        value = sum(2 + 2 * negative_cosine(p[:, i], targets[:, 1 - i]) for i in (0, 1))  # each view predicts the other
        update = {"batch_stats": stats, "teacher": {**teacher, "batch_stats": teacher_stats}}
        return value, (update, {FEATURES: h, "target_spread": spread(targets)})

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(Phase("ssl", networks.groups, loss),),
        encode=networks.encode,
        views=networks.views,
        after=follow(momentum_schedule(config)),
        encoder=("net", "encoder"),
        couples_batch=True,
    )
