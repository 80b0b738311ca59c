"""VQ-VAE: an autoencoder whose code is a grid of tokens, the nearest codes to what the encoder says.

van den Oord, Vinyals and Kavukcuoglu 2017, "Neural discrete representation learning" (arXiv:1711.00937), equation 3: the decoder learns
from the reconstruction, the encoder from it too, with the gradient passed straight through the look-up, and from its distance to the
chosen codes; the codes follow the encoder, by a gradient (equation 3) or as moving averages (appendix A.1). Finite scalar quantization
(Mentzer et al. 2023, arXiv:2309.15505) and signs (Yu et al. 2023, arXiv:2310.05737) need no codes: `model.quantizer` says which.

A codebook may collapse behind a good reconstruction: watch `usage_of_batch` and `perplexity_of_batch` together.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.augment.views import make_views
from ssl_jax.engine.method import Method, ModelFns, Phase, Spec
from ssl_jax.models.autoencoders import to_channels, to_color
from ssl_jax.models.common import create, run
from ssl_jax.models.tokenizers.networks import build_decoder, build_encoder
from ssl_jax.objectives.codebooks import build_quantizer

MEAN = 0.5  # networks see images in [-0.5, 0.5]


def build(config, stages) -> Method:
    """`config.model`:

    encoder, decoder: networks (see `models.tokenizers.networks`).
    channels: 1 models grayscale data (the mean of the three channels), 3 colors.
    quantizer: see `objectives.codebooks.build_quantizer`.
    variance: of the pixels in [0, 1], by which the squared error is divided.
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
        net["decoder"] = create(decoder, keys[2], encode_image(net, x)["out"])[0]
        net["quantizer"], state = quantizer.init(keys[3])
        return {"net": net}, {"codebook": state}

    def loss(train, state, batch, key):
        of_views, of_codes = jax.random.split(key)
        net, x = train["net"], to_channels(views(batch["image"], of_views)[:, 0], model.channels)
        quantized = quantizer.train(net["quantizer"], state.mutable["codebook"], encode_image(net, x)["out"], of_codes, state.step)
        error = jnp.mean((decode_codes(net, quantized.codes) - x) ** 2)
        logs = {"squared_error": error, "quantizer": quantized.loss, **quantized.logs}
        return error / model.variance + quantized.loss, ({"codebook": quantized.state}, logs)

    def encode(params, mutable, images):
        """'pooled' [B, W]: the mean of the encoder's last maps; 'out': what is quantized."""
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
