"""An encoder that others have trained: it encodes images, and nothing is left to train.

`config.stages.NAME.weights=FILE` and `launch.py evaluate --weights=FILE` build it from the weights of a file
(`models.pretrained.foreign`), which also say what `config.model` is.
"""

from __future__ import annotations

from ssl_jax.augment.pixels import to_input
from ssl_jax.engine.method import Method, Spec
from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.models.common import apply, init_variables


def build(config, stages) -> Method:
    """`config.model`: encoder, mean and std of the input. Its learned positions are for images of `config.data.image_shape`."""
    model = config.model
    encoder = build_encoder(model.encoder, config.dtype)

    def init(key, batch, frozen):
        params, batch_stats = init_variables(encoder, key, to_input(batch["image"], model.mean, model.std))
        return {"net": {"encoder": params}}, {"batch_stats": {"encoder": batch_stats}}

    def encode(params, mutable, images):
        x = to_input(images, model.mean, model.std)
        return apply(encoder, params["net"]["encoder"], mutable["batch_stats"]["encoder"], x, train=False)[0]

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(),
        encode=encode,
        encoder=("net", "encoder"),
    )
