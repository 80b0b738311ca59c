"""Autoencoders: an encoder maps an image to a code, and a decoder maps the code back to the image.

Four constraints prevent the identity map: a narrow code (deep: Hinton and Salakhutdinov 2006, here from random weights); a sparse
code (L1); input noise that the decoder must remove (denoising: Vincent et al. 2010, JMLR 11); a code that changes little with the
image (contractive: Rifai et al. 2011). `model.encoder` and `model.decoder` choose perceptrons, convolutions or recurrent networks.

Losses are sums over the values of an image. Watch `code_deviation`: it falls to zero if a heavy penalty collapses all codes to one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.augment.views import make_views, output_size
from ssl_jax.engine.method import Method, ModelFns, Phase, Spec
from ssl_jax.errors import UserError
from ssl_jax.models.autoencoders import ACTIVATIONS, build_decoder, build_encoder, to_channels, to_color
from ssl_jax.models.common import create, run
from ssl_jax.objectives import autoencoding


def build(config, stages) -> Method:
    """`config.model`:

    encoder, decoder: networks (see `models.autoencoders`); the decoder 'tied' reuses the weights of a one-layer perceptron.
    channels: 1 for grayscale data (the mean of the three channels), 3 for colors.
    code: its size, and its activation ('linear', 'relu', 'sigmoid', 'tanh').
    loss: 'cross_entropy' or 'squared'.
    corruption: name (key of `CORRUPTIONS`), level, and emphasis: the weights of corrupted and of clean values in the loss.
    sparsity, contraction: weights of the penalties, 0 for none.
    """
    model = config.model
    for name, value, choices in (
        ("loss", model.loss, autoencoding.RECONSTRUCTIONS),
        ("corruption.name", model.corruption.name, autoencoding.CORRUPTIONS),
        ("code.activation", model.code.activation, ACTIVATIONS),
    ):
        if value not in choices:
            raise UserError(f"config.model.{name}={value!r} is unknown; choose {', '.join(choices)}")
    tied = model.decoder.name == "tied"
    if tied and (model.encoder.name != "mlp" or tuple(model.encoder.widths) or model.code.activation != "sigmoid"):
        raise UserError("config.model.decoder.name='tied' needs encoder=dict(name='mlp', widths=()) and code.activation='sigmoid'")
    reconstruction, to_image = autoencoding.RECONSTRUCTIONS[model.loss]
    corrupt = autoencoding.CORRUPTIONS[model.corruption.name]
    if model.corruption.name in ("masking", "salt_and_pepper") and model.corruption.level > 1:
        raise UserError(f"config.model.corruption.level={model.corruption.level} is the share of corrupted values; give at most 1")
    views = make_views(config.views)
    shape = (*output_size(config.views, config.data.image_shape[-3:-1]), model.channels)
    encoder = build_encoder(model.encoder, model.code.size, config.dtype)
    decoder = build_decoder(model.decoder, shape, config.dtype)

    def compute_code(net, state, x, train=False):
        """[B, H, W, C] in [0, 1] -> (layers, code [B, Z], state of the encoder, which only a backbone has)."""
        layers, state = run(encoder, net["encoder"], state, x, train=train)
        return layers, ACTIVATIONS[model.code.activation](layers.pop("out")), state

    def tied_kernel(net):
        return (net["encoder"]["code"]["kernel"],) if tied else ()

    def decode(net, code):
        return run(decoder, net["decoder"], {}, code, *tied_kernel(net), train=False)[0]

    def contraction(net, state, x, code):
        if tied:
            return autoencoding.contraction_of_sigmoid(code, *tied_kernel(net))
        return autoencoding.contraction(lambda x: compute_code(net, state, x)[1], x)

    def init(key, batch, frozen):
        keys = jax.random.split(key, 3)
        x = to_channels(views(batch["image"], keys[0])[:, 0], model.channels)
        params, state = create(encoder, keys[1], x)
        net = {"encoder": params}
        net["decoder"] = create(decoder, keys[2], compute_code(net, state, x)[1], *tied_kernel(net))[0]
        return {"net": net}, state

    def loss(train, state, batch, key):
        net, (views_key, noise_key) = train["net"], jax.random.split(key)
        x = to_channels(views(batch["image"], views_key)[:, 0], model.channels)
        corrupted = corrupt(noise_key, x, model.corruption.level)
        _, code, after = compute_code(net, state.mutable, corrupted, train=True)
        weights = autoencoding.emphasis(x, corrupted, *model.corruption.emphasis)
        logs = {"reconstruction": reconstruction(x, decode(net, code), weights).mean(), "code_deviation": jnp.std(code, 0).mean()}
        total = logs["reconstruction"]
        if model.sparsity:
            logs["sparsity"] = autoencoding.sparsity(code).mean()
            total += model.sparsity * logs["sparsity"]
        if model.contraction:
            logs["contraction"] = contraction(net, state.mutable, corrupted, code).mean()
            total += model.contraction * logs["contraction"]
        return total, (after, logs)

    def encode(params, mutable, images):
        layers, code, _ = compute_code(params["net"], mutable, to_channels(images, model.channels))
        return {"pooled": code, **layers, "code": code}  # a backbone has pooled features of its own

    def reconstruct(params, mutable, images):
        return to_color(to_image(decode(params["net"], encode(params, mutable, images)["code"])))

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(Phase("ae", ("net",), loss),),
        encode=encode,
        views=views,
        fns=ModelFns(reconstruct=reconstruct),
        encoder=("net", "encoder"),
        encoder_stats=("batch_stats",),
    )
