"""VQ-VAE: an autoencoder whose code is a grid of tokens, the nearest codes to what the encoder says.

van den Oord, Vinyals and Kavukcuoglu 2017, "Neural discrete representation learning" (arXiv:1711.00937), equation 3: the decoder learns
from the reconstruction, the encoder from it too, with the gradient passed straight through the look-up, and from its distance to the
chosen codes; the codes follow the encoder, by a gradient (equation 3) or as moving averages (appendix A.1). Finite scalar quantisation
(Mentzer et al. 2023, arXiv:2309.15505) and signs (Yu et al. 2023, arXiv:2310.05737) need no codes: `model.quantiser` says which.

A codebook may collapse behind a good reconstruction: watch `usage_of_batch` and `perplexity_of_batch` together.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.augment.views import make_views
from ssl_jax.engine.method import Method, Phase, Spec
from ssl_jax.models.autoencoders import to_channels, to_colour
from ssl_jax.models.common import create, run
from ssl_jax.models.tokenizers import build_decoder, build_encoder
from ssl_jax.objectives.codebooks import build_quantiser

MEAN = 0.5  # networks see images in [-0.5, 0.5]


def build(config, stages) -> Method:
    """`config.model`:

    encoder, decoder: networks (see `models.tokenizers`).
    channels: 1 models greyscale data (the mean of the three channels), 3 colours.
    quantiser: see `objectives.codebooks.build_quantiser`.
    variance: of the pixels in [0, 1], by which the squared error is divided.
    """
    model = config.model
    quantiser = build_quantiser(model.quantiser)
    encoder = build_encoder(model.encoder, quantiser.dim, config.dtype)
    decoder = build_decoder(model.decoder, model.channels, config.dtype)
    views = make_views(config.views)

    def look(net, x):
        """[B, H, W, C] in [0, 1] -> the encoder's layers."""
        return run(encoder, net["encoder"], {}, x - MEAN, train=True)[0]

    def draw(net, codes):
        return run(decoder, net["decoder"], {}, codes, train=True)[0] + MEAN

    def init(key, batch, frozen):
        keys = jax.random.split(key, 4)
        x = to_channels(views(batch["image"], keys[0])[:, 0], model.channels)
        net = {"encoder": create(encoder, keys[1], x)[0]}
        net["decoder"] = create(decoder, keys[2], look(net, x)["out"])[0]
        net["quantiser"], state = quantiser.init(keys[3])
        return {"net": net}, {"codebook": state}

    def loss(train, state, batch, key):
        of_views, of_codes = jax.random.split(key)
        net, x = train["net"], to_channels(views(batch["image"], of_views)[:, 0], model.channels)
        quantised = quantiser.train(net["quantiser"], state.mutable["codebook"], look(net, x)["out"], of_codes, state.step)
        error = jnp.mean((draw(net, quantised.codes) - x) ** 2)
        logs = {"squared_error": error, "quantiser": quantised.loss, **quantised.logs}
        return error / model.variance + quantised.loss, ({"codebook": quantised.state}, logs)

    def encode(params, mutable, images):
        """'pooled' [B, W]: the mean of the encoder's last maps; 'out': what is quantised."""
        layers = look(params["net"], to_channels(images, model.channels))
        return {**layers, "pooled": layers["features"].mean((1, 2), dtype=jnp.float32)}

    def tokens(params, mutable, images):
        z = look(params["net"], to_channels(images, model.channels))["out"]
        return quantiser.tokens(params["net"]["quantiser"], mutable["codebook"], z)

    def decode(params, mutable, tokens):
        codes = quantiser.embed(params["net"]["quantiser"], mutable["codebook"], tokens)
        return to_colour(jnp.clip(draw(params["net"], codes), 0, 1))

    def reconstruct(params, mutable, images):
        return decode(params, mutable, tokens(params, mutable, images))

    def codebook(params, mutable):
        return quantiser.codebook(params["net"]["quantiser"], mutable["codebook"])

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(Phase("vqvae", ("net",), loss),),
        encode=encode,
        fns={"views": views, "reconstruct": reconstruct, "tokens": tokens, "decode": decode, "codebook": codebook},
        couples_batch=quantiser.couples_batch,
        notes={"tokenizer": "trained with perceptual=none"},
    )
