"""DINO: every view of an image predicts how a teacher assigns the large views to prototypes; the teacher follows the student.

Caron et al. 2021, "Emerging properties in self-supervised Vision Transformers" (arXiv:2104.14294), algorithm 1. Two things prevent
collapse. Centering subtracts a running mean from the teacher's logits, else one prototype wins for all images. Sharpening, a low
temperature of the teacher, prevents equal probabilities of all prototypes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.engine.durations import to_steps
from ssl_jax.engine.method import FEATURES, Method, Phase, Spec
from ssl_jax.engine.siamese import follow, momentum_schedule, new_teacher, siamese
from ssl_jax.models.heads import PrototypeHead
from ssl_jax.objectives.prototypes import entropy, swapped


def build(config, stages) -> Method:
    """`config.model`: encoder, projector (fields of PrototypeHead), mean and std; momentum and momentum_schedule of the teacher, and

    temperature: of the student. teacher_temperature rises linearly to teacher_temperature_end in the first teacher_warmup of the run.
    center_momentum: of the running mean of the teacher's logits; 1 does not center.
    frozen: how long prototypes do not learn: '1 epoch'.
    """
    model, networks = config.model, siamese(config, crops=True, head=PrototypeHead)
    first, size = networks.first, config.batch_size
    warmup, frozen = (to_steps(model[key], f"config.model.{key}", size, config.data.examples) for key in ("teacher_warmup", "frozen"))

    def teacher_temperature(step):
        share = jnp.minimum(1.0, step / max(1, warmup))
        return model.teacher_temperature + share * (model.teacher_temperature_end - model.teacher_temperature)

    def init(key, batch, stages):
        params, stats = networks.init(key, networks.views(batch["image"], key))
        return params, {
            "batch_stats": stats, "teacher": new_teacher(params, stats), "center": jnp.zeros(model.projector["prototypes"]),
        }  # fmt: skip

    def loss(train, state, batch, key):
        views_key, drop_key = jax.random.split(key)
        views, teacher, net = networks.views(batch["image"], views_key), state.mutable["teacher"], train["net"]
        large = next(iter(views.values())) if hasattr(views, "values") else views[:, :first]
        prototypes = net["projector"]["prototypes"]
        prototypes = jnp.where(state.step < frozen, jax.lax.stop_gradient(prototypes), prototypes)
        net = {**net, "projector": {**net["projector"], "prototypes": prototypes}}
        student, h, stats = networks.embed(net, state.mutable["batch_stats"], views, train=True, key=drop_key)
        logits, _, teacher_stats = networks.embed(teacher["net"], teacher["batch_stats"], large, train=True)
        logits, center = jax.lax.stop_gradient(logits), state.mutable["center"]
        targets = jax.nn.softmax((logits - center) / teacher_temperature(state.step))
        momentum = model.center_momentum
        update = {
            "batch_stats": stats, "teacher": {**teacher, "batch_stats": teacher_stats},
            "center": momentum * center + (1 - momentum) * logits.mean((0, 1)),
        }  # fmt: skip
        logs = {FEATURES: h, "teacher_entropy": entropy(targets).mean(), "entropy_of_mean": entropy(targets.mean((0, 1)))}
        return swapped(targets, student / model.temperature), (update, logs)

    def encode(params, mutable, images):
        """Of the teacher."""
        teacher = mutable["teacher"]
        return networks.encode({"net": teacher["net"]}, teacher, images)

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(Phase("ssl", ("net",), loss),),
        encode=encode,
        views=networks.views,
        after=follow(momentum_schedule(config)),
        encoder=("teacher", "net", "encoder"),
        encoder_stats=("teacher", "batch_stats", "encoder"),
        couples_batch=True,
    )
