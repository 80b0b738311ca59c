"""A deep autoencoder, pretrained as a stack of restricted Boltzmann machines.

Hinton and Salakhutdinov 2006, "Reducing the dimensionality of data with neural networks" (Science 313). Machines train one after
the other, each in its own window of steps, on the hidden probabilities of the machine below. The last machine has normal hidden
units, the code. Unrolled, each machine is one layer of an encoder and, transposed, one layer of a decoder. Fine-tuning then trains
this autoencoder to reconstruct images.

The autoencoder's weights are those of the unrolled machines plus an offset that starts at zero. Training the offset equals training
copies of the weights, without a copy between stages. So each parameter group has one phase and one optimizer.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.augment.views import make_views, output_size
from ssl_jax.engine.method import Method, ModelFns, Phase, Spec
from ssl_jax.errors import UserError
from ssl_jax.models.autoencoders import MLPDecoder, MLPEncoder, to_channels, to_color
from ssl_jax.models.common import create, run
from ssl_jax.objectives import autoencoding, boltzmann

STD = 0.1  # of the initial weights


def build(config, stages) -> Method:
    """`config.model`:

    widths: of the hidden layers, (1000, 500, 250) in the paper; code_size: of the code.
    channels: 1 for grayscale data (the mean of the three channels), 3 for colors.
    windows: (first step, end step), end excluded, of each of the len(widths) + 1 machines.
    tuning_start: the first step of fine-tuning.
    """
    model = config.model
    sizes = (*model.widths, model.code_size)
    if len(model.windows) != len(sizes):
        raise UserError(f"config.model.windows has {len(model.windows)} windows for {len(sizes)} machines; give each one")
    views = make_views(config.views)
    shape = (*output_size(config.views, config.data.image_shape[-3:-1]), model.channels)
    encoder = MLPEncoder(model.code_size, tuple(model.widths), "sigmoid", config.dtype)
    decoder = MLPDecoder(shape, tuple(model.widths)[::-1], "sigmoid", dtype=config.dtype)
    names = [f"rbm{k}" for k in range(1, len(sizes) + 1)]

    def autoencoder(params):
        """The weights of the unrolled machines plus the offset in params['net']."""
        return jax.tree.map(jnp.add, unroll([params[name] for name in names]), params["net"])

    def compute_code(net, x):
        layers, _ = run(encoder, net["encoder"], {}, x, train=False)
        return layers, layers.pop("out")

    def decode(net, code):
        return run(decoder, net["decoder"], {}, code, train=False)[0]

    def input_images(batch, key):
        return to_channels(views(batch["image"], key)[:, 0], model.channels)

    def init(key, batch, frozen):
        keys = jax.random.split(key, len(sizes) + 2)
        x = input_images(batch, keys[0])
        net = {"encoder": create(encoder, keys[0], x)[0], "decoder": create(decoder, keys[1], jnp.zeros((1, model.code_size)))[0]}
        params, below = {"net": jax.tree.map(jnp.zeros_like, net)}, x[0].size
        for name, size, key in zip(names, sizes, keys[2:], strict=True):
            kernel = STD * jax.random.normal(key, (below, size))
            params[name] = {"kernel": kernel, "hidden_bias": jnp.zeros(size), "visible_bias": jnp.zeros(below)}
            below = size
        return params, {}

    def pretraining(index):
        """The loss of machine `index`, whose input is the hidden probabilities of the machine below."""

        def loss(train, state, batch, key):
            views_key, chain_key = jax.random.split(key)
            v = input_images(batch, views_key).reshape(len(batch["image"]), -1)
            for name in names[:index]:
                v = boltzmann.hidden(state.params[name], v)
            is_last = index == len(names) - 1
            value, reconstruction = boltzmann.contrastive_divergence(train[names[index]], v, chain_key, normal=is_last)
            return value.mean(), ({}, {"squared_error": autoencoding.squared(v, reconstruction).mean()})

        return loss

    def tuning(train, state, batch, key):
        x = input_images(batch, key)
        net = autoencoder({**state.params, **train})
        _, code = compute_code(net, x)
        out = decode(net, code)
        logs = {
            "squared_error": autoencoding.squared(x, jax.nn.sigmoid(out)).mean(), "code_deviation": jnp.std(code, 0).mean(),
        }  # fmt: skip
        return autoencoding.cross_entropy(x, out).mean(), ({}, logs)

    def in_window(first, end):
        return lambda step: (first <= step) & (step < end)

    def encode(params, mutable, images):
        layers, code = compute_code(autoencoder(params), to_channels(images, model.channels))
        return {**layers, "code": code, "pooled": code}

    def reconstruct(params, mutable, images):
        return to_color(jax.nn.sigmoid(decode(autoencoder(params), encode(params, mutable, images)["code"])))

    windows = [in_window(*window) for window in model.windows]
    machines = (Phase(name, (name,), pretraining(k), when=windows[k]) for k, name in enumerate(names))
    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(*machines, Phase("tuning", ("net",), tuning, when=lambda step: step >= model.tuning_start)),
        encode=encode,
        views=views,
        fns=ModelFns(reconstruct=reconstruct),
    )


def unroll(machines: list[boltzmann.Machine]) -> dict:
    """Machines, the one on the images first -> the parameters of `MLPEncoder` and, mirrored and transposed, of `MLPDecoder`."""
    inward = [f"linear{k}" for k in range(1, len(machines))] + ["code"]
    outward = [f"linear{k}" for k in range(1, len(machines))] + ["image"]
    return {
        "encoder": {name: {"kernel": m["kernel"], "bias": m["hidden_bias"]} for name, m in zip(inward, machines, strict=True)},
        "decoder": {
            name: {"kernel": m["kernel"].T, "bias": m["visible_bias"]} for name, m in zip(outward, machines[::-1], strict=True)
        },
    }  # fmt: skip
