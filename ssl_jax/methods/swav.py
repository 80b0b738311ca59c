"""SwAV: views of an image are assigned to prototypes, and each view predicts the assignments of the others.

Caron et al. 2020, "Unsupervised learning of visual features by contrasting cluster assignments" (arXiv:2006.09882), algorithm 1.
Assignments use all prototypes equally (Sinkhorn-Knopp) over the global batch. They are made from the first group of views; views of
other sizes (multi-crop) only predict. The loss stays at ln K when all images collapse to one point.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.engine.durations import to_steps
from ssl_jax.engine.method import FEATURES, Method, Phase, Spec
from ssl_jax.engine.siamese import enqueue, siamese
from ssl_jax.errors import UserError
from ssl_jax.objectives.contrastive import unit
from ssl_jax.objectives.joint_embedding import spread
from ssl_jax.objectives.prototypes import entropy, sinkhorn, swapped


def build(config, stages) -> Method:
    """`config.model`: the keys of `siamese`, and

    prototypes: K, their number. They have length 1; the gradient goes through the normalization, and the official code normalizes
      in place.
    frozen: how long they do not learn: '1 epoch'.
    temperature: of predictions. epsilon, iterations: of Sinkhorn-Knopp.
    queue: earlier embeddings that take part in Sinkhorn-Knopp, for batches smaller than K; 0 for none. queue_from: when they begin to.

    Raises:
        UserError: a queue that batches do not fill evenly.
    """
    model, networks = config.model, siamese(config, crops=True)
    size, first = config.batch_size, networks.first
    if model.queue % size:
        raise UserError(f"config.model.queue={model.queue} is no multiple of config.batch_size={size}; give {15 * size}, for example")
    frozen, start = (to_steps(model[key], f"config.model.{key}", size, config.data.examples) for key in ("frozen", "queue_from"))
    start += model.queue // size  # the queue is full

    def init(key, batch, stages):
        keys = jax.random.split(key, 3)
        params, stats = networks.init(keys[0], networks.views(batch["image"], keys[0]))
        width = model.projector["widths"][-1]
        params["net"]["prototypes"] = unit(jax.random.normal(keys[1], (model.prototypes, width)))
        queue = {"rows": jnp.zeros((model.queue, first, width)), "next": jnp.zeros((), jnp.int32)}
        return params, {"batch_stats": stats, **({"queue": queue} if model.queue else {})}

    def loss(train, state, batch, key):
        x = networks.views(batch["image"], key)
        z, h, stats = networks.embed(train["net"], state.mutable["batch_stats"], x, train=True)
        z, prototypes, update = unit(z), unit(train["net"]["prototypes"]), {"batch_stats": stats}
        prototypes = jnp.where(state.step < frozen, jax.lax.stop_gradient(prototypes), prototypes)
        scores = jnp.einsum("bvd,kd->bvk", z, prototypes, precision="highest")
        codes = jnp.stack([sinkhorn(scores[:, i], model.epsilon, model.iterations) for i in range(first)], 1)
        if model.queue:
            rows = jax.lax.stop_gradient(state.mutable["queue"]["rows"])
            earlier = jnp.einsum("bvd,kd->bvk", rows, prototypes, precision="highest")
            together = jnp.concatenate([scores[:, :first], earlier])
            longer = jnp.stack([sinkhorn(together[:, i], model.epsilon, model.iterations)[:size] for i in range(first)], 1)
            codes = jnp.where(state.step >= start, longer, codes)
            update["queue"] = enqueue(state.mutable["queue"], jax.lax.stop_gradient(z[:, :first]))
        logs = {FEATURES: h, "target_spread": spread(z), "code_entropy": entropy(codes).mean()}
        return swapped(codes, scores / model.temperature), (update, logs)

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(Phase("ssl", ("net",), loss),),
        encode=networks.encode,
        views=networks.views,
        encoder=("net", "encoder"),
        couples_batch=True,
    )
