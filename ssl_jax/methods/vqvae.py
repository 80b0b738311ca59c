"""VQ-VAE: an autoencoder whose code is a grid of tokens, the indices of the codes nearest to the encoder's vectors.

van den Oord, Vinyals and Kavukcuoglu 2017, "Neural discrete representation learning" (arXiv:1711.00937), equation 3.

Decoder and encoder learn from the reconstruction, whose gradient passes straight through the quantization. The encoder also learns
from its distance to the chosen codes. The codes follow the encoder by a gradient (equation 3) or as moving averages (appendix A.1).
`model.quantizer` also offers finite scalar quantization (Mentzer et al. 2023, arXiv:2309.15505) and signs (Yu et al. 2023,
arXiv:2310.05737), which have no codebook to learn.

A good reconstruction can hide a collapsed codebook: watch `usage_of_batch` and `perplexity_of_batch` together.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ssl_jax.augment.views import make_views
from ssl_jax.engine.method import Method, ModelFns, Phase, Spec
from ssl_jax.models.autoencoders import to_channels, to_color
from ssl_jax.models.common import create, run
from ssl_jax.models.tokenizers.networks import build_decoder, build_encoder, check_decoder
from ssl_jax.objectives.codebooks import build_quantizer

MEAN = 0.5  # networks see images in [-0.5, 0.5]


def build(config, stages) -> Method:
    """`config.model`:

    encoder, decoder: networks (see `models.tokenizers.networks`).
    channels: 1 models grayscale data (the mean of the three channels), 3 colors.
    quantizer: see `objectives.codebooks.build_quantizer`.
    variance: of the data's pixels in [0, 1]; it divides the squared error.
    """
    model = config.model
    quantizer = build_quantizer(model.quantizer)
    encoder = build_encoder(model.encoder, quantizer.dim, config.dtype)
    decoder = build_decoder(model.decoder, model.channels, config.dtype)
    views = make_views(config.views)

    def encode_image(net, x):
        """[B, H, W, C] in [0, 1] -> the encoder's layers."""
        return run(encoder, net["encoder"], {}, x - MEAN, train=True)[0]

    def decode_codes(net, codes):
        return run(decoder, net["decoder"], {}, codes, train=True)[0] + MEAN

    def init(key, batch, frozen):
        keys = jax.random.split(key, 4)
        x = to_channels(views(batch["image"], keys[0])[:, 0], model.channels)
        net = {"encoder": create(encoder, keys[1], x)[0]}
        codes = encode_image(net, x)["out"]
        net["decoder"] = create(decoder, keys[2], codes)[0]
        check_decoder(functools.partial(decode_codes, net), codes, x)
        net["quantizer"], state = quantizer.init(keys[3])
        return {"net": net}, {"codebook": state}

    def loss(train, state, batch, key):
        views_key, codes_key = jax.random.split(key)
        net, x = train["net"], to_channels(views(batch["image"], views_key)[:, 0], model.channels)
        quantized = quantizer.train(net["quantizer"], state.mutable["codebook"], encode_image(net, x)["out"], codes_key, state.step)
        error = jnp.mean((decode_codes(net, quantized.codes) - x) ** 2)
        logs = {"squared_error": error, "quantizer": quantized.loss, **quantized.logs}
        return error / model.variance + quantized.loss, ({"codebook": quantized.state}, logs)

    def encode(params, mutable, images):
        """The encoder's layers, its vectors before quantization as 'out', and 'pooled' [B, W], the mean of 'features'."""
        layers = encode_image(params["net"], to_channels(images, model.channels))
        return {**layers, "pooled": layers["features"].mean((1, 2), dtype=jnp.float32)}

    def tokens(params, mutable, images):
        z = encode_image(params["net"], to_channels(images, model.channels))["out"]
        return quantizer.tokens(params["net"]["quantizer"], mutable["codebook"], z)

    def decode(params, mutable, tokens):
        codes = quantizer.embed(params["net"]["quantizer"], mutable["codebook"], tokens)
        return to_color(jnp.clip(decode_codes(params["net"], codes), 0, 1))

    def reconstruct(params, mutable, images):
        return decode(params, mutable, tokens(params, mutable, images))

    def codebook(params, mutable):
        return quantizer.codebook(params["net"]["quantizer"], mutable["codebook"])

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(Phase("vqvae", ("net",), loss),),
        encode=encode,
        views=views,
        fns=ModelFns(reconstruct=reconstruct, tokens=tokens, decode=decode, codebook=codebook),
        encoder=("net", "encoder"),
        couples_batch=quantizer.couples_batch,
        notes={"tokenizer": "trained with perceptual=none"},
    )
