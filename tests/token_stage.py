"""A tokenizer without a network: a token is the color of COLORS nearest to the mean of a square of pixels."""

import types

import jax.numpy as jnp
import numpy as np

from ssl_jax.augment.pixels import to_input
from ssl_jax.engine.method import Method, ModelFns, Spec, Stage

PATCH, CODES = 4, 12
COLORS = np.random.default_rng(0).uniform(size=(CODES, 3)).astype(np.float32)
FROZEN = {"tokenizer": {"params": {"net": {"codes": jnp.asarray(COLORS)}}, "mutable": {}}}


def tokens(params, mutable, images):
    x = to_input(images, 0.0, 1.0)
    n, h, w, _ = x.shape
    x = x.reshape(n, h // PATCH, PATCH, w // PATCH, PATCH, 3).mean((2, 4))
    return jnp.argmin(jnp.sum((x[..., None, :] - params["net"]["codes"]) ** 2, -1), -1).astype(jnp.int32)


def decode(params, mutable, tokens):
    return jnp.repeat(jnp.repeat(params["net"]["codes"][tokens], PATCH, 1), PATCH, 2)


def codebook(params, mutable):
    return params["net"]["codes"]


STAGE = Stage(
    types.SimpleNamespace(views=((),), data=types.SimpleNamespace(image_shape=(16, 16, 3))),
    Method(
        inputs={"image": Spec((16, 16, 3))},
        init=lambda key, batch, frozen: ({"net": {"codes": jnp.asarray(COLORS)}}, {}),
        phases=(),
        encode=lambda params, mutable, images: {},
        fns=ModelFns(tokens=tokens, decode=decode, codebook=codebook),
        notes={"tokenizer": "colors of squares"},
    ),
)


def images_of_tokens(tokens):
    """uint8 images [B, 16, 16, 3] whose tokens are `tokens` [B, 4, 4]."""
    return np.round(np.repeat(np.repeat(COLORS[tokens], PATCH, 1), PATCH, 2) * 255).astype(np.uint8)
