"""A linear classifier beside a method, on the features of its own training pass: a live sign of what the encoder learns.

It costs no further pass and changes nothing: features are detached, and the loss of the method keeps its value. Its accuracies are of
augmented views in training mode, so they are no results; evaluations are. Grill et al. 2020 (BYOL, arXiv:2006.07733) and solo-learn
train one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.engine.method import FEATURES, Method, Spec
from ssl_jax.errors import UserError
from ssl_jax.objectives.classification import cross_entropy


def with_online_probe(method: Method, classes: int | None) -> Method:
    """`method` with the parameter group 'probe', and with metrics of its first phase:

    probe_loss, probe_accuracy: of the linear classifier, over all views.
    neighbor_accuracy: share of the first views whose nearest other image in the batch, by cosine, has their class.

    Raises:
        UserError: the data have no classes, or (when traced) the method does not report its features.
    """
    if not classes:
        raise UserError("config.online_probe needs labels that are classes, and the data have none; set config.online_probe=0")
    phase, *others = method.phases

    def init(key, batch, frozen):
        params, mutable = method.init(key, batch, frozen)
        features = jax.eval_shape(method.encode, params, {**mutable, **frozen}, batch["image"])["pooled"]
        probe = {"kernel": jnp.zeros((features.shape[-1], classes)), "bias": jnp.zeros(classes)}
        return {**params, "probe": probe}, mutable

    def loss(train, state, batch, key):
        value, (update, metrics) = phase.loss(train, state, batch, key)
        if FEATURES not in metrics:
            raise UserError("config.online_probe: this method does not report the features of its training pass; set it to 0")
        features = jax.lax.stop_gradient(metrics[FEATURES]).astype(jnp.float32)  # [B, V, D]
        logits = jnp.einsum("bvd,dc->bvc", features, train["probe"]["kernel"], precision="highest") + train["probe"]["bias"]
        labels = jnp.broadcast_to(batch["label"][:, None], logits.shape[:2])
        of_probe, logs = cross_entropy(logits.reshape(-1, classes), labels.reshape(-1))
        logs = {
            "probe_loss": of_probe,
            "probe_accuracy": logs["accuracy"],
            "neighbor_accuracy": neighbor_accuracy(features[:, 0], batch["label"]),
        }
        return value + (of_probe - jax.lax.stop_gradient(of_probe)), (update, {**metrics, **logs})

    return method._replace(
        inputs={**method.inputs, "label": Spec((), "int32")},
        init=init,
        phases=(phase._replace(trains=(*phase.trains, "probe"), loss=loss), *others),
        absent={**method.absent, "label": "set config.online_probe=0"},
    )


def optimizers(config) -> dict:
    """`config.optim`, with one for the probe if there is one: AdamW with the constant rate `config.online_probe`."""
    if not config.get("online_probe"):  # earlier runs have no such key
        return config.optim
    return {**config.optim.to_dict(), "probe": dict(name="adamw", lr=config.online_probe, schedule="constant")}


def neighbor_accuracy(features: jax.Array, labels: jax.Array) -> jax.Array:
    """Share of the rows [B, D] whose nearest other row by cosine has the same label [B]."""
    x = features / jnp.linalg.norm(features, axis=-1, keepdims=True).clip(1e-12)
    similarities = jnp.einsum("nd,md->nm", x, x, precision="highest")
    nearest = jnp.argmax(jnp.where(jnp.eye(len(x), dtype=bool), -jnp.inf, similarities), -1)
    return jnp.mean(labels[nearest] == labels)
