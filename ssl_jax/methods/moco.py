"""MoCo: queries of one view find the key of the other view, which a slowly moving copy of the network computes.

Versions 1 and 2: negatives are a queue of earlier keys. He et al. 2020, "Momentum contrast" (arXiv:1911.05722), algorithm 1; Chen et
al. 2020 (arXiv:2003.04297): a deeper head and stronger views. Version 3: negatives are the keys of the batch, both views are queries,
and queries have a predictor. Chen et al. 2021, "An empirical study of training self-supervised Vision Transformers"
(arXiv:2104.02057), algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ssl_jax.engine.method import FEATURES, Method, Phase, Spec
from ssl_jax.engine.siamese import enqueue, follow, momentum_schedule, new_teacher, siamese
from ssl_jax.errors import UserError
from ssl_jax.objectives.contrastive import info_nce, queue_info_nce, unit
from ssl_jax.objectives.joint_embedding import spread


def build(config, stages) -> Method:
    """`config.model`: the keys of `siamese`; momentum and momentum_schedule of the key network, and

    queue: number of earlier keys that are negatives; 0 takes the keys of the batch.
    symmetric: both views are queries; else the first only.
    groups: BatchNorm normalizes this many parts of a batch separately, and keys are shuffled among them. With one BatchNorm for all
      images the network can tell the positive key by its statistics (the papers have one group a GPU).
    temperature, weight: the loss is `weight` times the cross-entropy, which version 3 multiplies by twice the temperature.

    Raises:
        UserError: a queue that batches do not fill evenly, or groups that do not divide a batch.
    """
    model, networks = config.model, siamese(config)
    pairs = ((0, 1), (1, 0)) if model.symmetric else ((0, 1),)
    added = len(pairs) * config.batch_size
    if model.queue % added:
        raise UserError(f"config.model.queue={model.queue} is no multiple of the {added} keys of a step; give {16 * added} or so")
    if config.batch_size % model.groups or config.batch_size < 2 * model.groups:
        raise UserError(f"config.model.groups={model.groups} do not divide config.batch_size={config.batch_size} into parts of two")
    query_views, key_views = (list(views) for views in zip(*pairs, strict=True))
    embed = in_groups(networks.embed, model.groups)

    def init(key, batch, frozen):
        keys = jax.random.split(key)
        params, stats = networks.init(keys[0], networks.views(batch["image"], keys[0]))
        mutable = {"batch_stats": stats, "teacher": new_teacher(params, stats)}
        if model.queue:
            width = model.projector["widths"][-1]
            mutable["queue"] = {"rows": unit(jax.random.normal(keys[1], (model.queue, width))), "next": jnp.zeros((), jnp.int32)}
        return params, mutable

    def loss(train, state, batch, key):
        views_key, shuffle_key = jax.random.split(key)
        x, teacher = networks.views(batch["image"], views_key), state.mutable["teacher"]
        z, h, stats = embed(train["net"], state.mutable["batch_stats"], x[:, jnp.array(query_views)])
        queries, stats = networks.predict(train, stats, z, train=True)
        order = jax.random.permutation(shuffle_key, len(x)) if model.groups > 1 else jnp.arange(len(x))
        keys, _, teacher_stats = embed(teacher["net"], teacher["batch_stats"], x[:, jnp.array(key_views)][order])
        keys = unit(jax.lax.stop_gradient(keys[jnp.argsort(order)]))
        update = {"batch_stats": stats, "teacher": {**teacher, "batch_stats": teacher_stats}}
        if model.queue:
            queue = state.mutable["queue"]
            parts = [queue_info_nce(queries[:, i], keys[:, i], queue["rows"], model.temperature) for i in range(len(pairs))]
            update["queue"] = enqueue(queue, keys.reshape(-1, keys.shape[-1]))
        else:
            parts = [info_nce(queries[:, i], keys[:, i], model.temperature) for i in range(len(pairs))]
        logs = {**parts[0][1], FEATURES: h, "target_spread": spread(keys)}
        return model.weight * sum(value for value, _ in parts), (update, logs)

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


def in_groups(embed: Callable, groups: int) -> Callable:
    """`embed` in training mode on each of `groups` parts of the batch, with BatchNorm of its own; new statistics are their mean."""
    if groups == 1:
        return lambda net, stats, views: embed(net, stats, views, train=True)

    def grouped(net, stats, views):
        parts = views.reshape(groups, -1, *views.shape[1:])
        z, h, stats = jax.vmap(lambda part: embed(net, stats, part, train=True))(parts)
        return z.reshape(len(views), *z.shape[2:]), h.reshape(len(views), *h.shape[2:]), jax.tree.map(lambda x: x.mean(0), stats)

    return grouped
