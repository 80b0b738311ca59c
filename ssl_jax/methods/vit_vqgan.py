"""ViT-VQGAN, stage 1: a Transformer makes a grid of tokens of an image and the image of them; a discriminator sharpens it.

Yu et al. 2022, "Vector-quantized image modeling with improved VQGAN" (arXiv:2110.04627), section 3: codes of few dimensions and unit
norm, and a sum of losses: codes, squared error, logit-Laplace likelihood, features of a fixed network, adversarial. With other
networks, weights and the adaptive adversarial weight it is VQGAN (Esser et al. 2021, arXiv:2012.09841). Order of updates: tokenizer,
discriminator, its gradient penalty.

A perceptual term brings in what its network was trained with, in LPIPS the labels of ImageNet: tokens whose features are to be probed
come from a tokenizer without one, and `Method.notes` says which it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ssl_jax.augment.pixels import to_input
from ssl_jax.augment.views import make_views, output_size
from ssl_jax.engine.method import Method, ModelFns, Phase, Spec, every
from ssl_jax.errors import UserError
from ssl_jax.models.common import create, run
from ssl_jax.models.pretrained import vgg
from ssl_jax.models.tokenizers.networks import build_decoder, build_discriminator, build_encoder
from ssl_jax.objectives import likelihood
from ssl_jax.objectives.adversarial import GAN_LOSSES, health, r1
from ssl_jax.objectives.codebooks import build_quantizer
from ssl_jax.objectives.perceptual import adaptive_weight, feature_distance, random_features, random_kernels


class Perceptual(NamedTuple):
    """A distance of pictures in [0, 1]: (frozen, x, y [B, H, W, 3]) -> [B]; `read` gives what it finds in frozen['perceptual']."""

    distance: Callable
    read: Callable | None
    note: str


def build(config, stages) -> Method:
    """`config.model`:

    encoder, decoder, discriminator: networks (see `models.tokenizers.networks`).
    quantizer: see `objectives.codebooks.build_quantizer`.
    squared, absolute, logit_laplace: weights of the losses of pixels; with the last the decoder gives a mean and a scale of each.
    perceptual: weight and kind: 'none'; 'vgg_lpips' (path and sha256 of a file, see `models.pretrained.vgg`); 'random_conv', a fixed random
      network; 'self_encoder', the run that `config.stages.encoder` names.
    adversarial: weight (0: no discriminator), game (key of `GAMES`), start (step of the first update of the discriminator, and of its
      effect), adaptive (the weight is times `adaptive_weight` of the decoder's last layer).
    r1: weight (gamma) and interval in steps; no penalty where the weight is 0.
    """
    model, adversarial = config.model, config.model.adversarial
    if adversarial.game not in GAN_LOSSES:
        raise UserError(f"config.model.adversarial.game={adversarial.game!r} is unknown; choose {', '.join(GAN_LOSSES)}")
    plays, laplace = adversarial.weight > 0, model.logit_laplace > 0
    quantizer = build_quantizer(model.quantizer)
    perceptual = open_perceptual(model.perceptual, stages)
    encoder = build_encoder(model.encoder, quantizer.dim, config.dtype)
    decoder = build_decoder(model.decoder, 6 if laplace else 3, config.dtype)
    views = make_views(config.views)
    height, width = output_size(config.views, config.data.image_shape[-3:-1])
    if height != width:
        raise UserError(f"the tokenizer is given images of {height} x {width} pixels; make them square with config.data.ops")
    discriminator = build_discriminator(model.discriminator, height, config.dtype) if plays else None
    net = networks_of(encoder, decoder, quantizer, laplace)

    def real_images(batch, key):
        return to_input(views(batch["image"], key)[:, 0], 0.0, 1.0)

    def reconstructed(state, images):
        """Pictures of about [0, 1] that the present tokenizer makes of images in [0, 1]."""
        params = state.params["tokenizer"]
        tokens = net.tokens(params, state.mutable["codebook"], images)
        return net.picture(net.decode_codes(params, net.embed(params, state.mutable["codebook"], tokens)))

    game = open_game(model, discriminator, real_images, reconstructed) if plays else None

    def init(key, batch, frozen):
        keys = jax.random.split(key, 5)
        x = real_images(batch, keys[0])
        params = {"encoder": create(encoder, keys[1], x)[0]}
        params["decoder"] = create(decoder, keys[2], net.encode_image(params, x)["out"])[0]
        params["quantizer"], codebook = quantizer.init(keys[3])
        params, mutable = {"tokenizer": params}, {"codebook": codebook}
        if plays:
            params["discriminator"], mutable["discriminator"] = create(discriminator, keys[4], x)
        return params, mutable

    def reconstruction(state, x, out):
        """(the weighted sum of all losses of a decoder's output but the adversarial one, each of them)"""
        again = net.picture(out)
        logs = {"squared": jnp.mean((again - x) ** 2), "absolute": jnp.mean(jnp.abs(again - x))}
        if laplace:
            mean, log_scale = jnp.split(out, 2, -1)
            logs["logit_laplace"] = -jnp.mean(likelihood.logit_laplace(x, mean, jnp.maximum(log_scale, likelihood.LEAST_LOG_SCALE)))
        value = sum(model[name] * logs[name] for name in logs)
        if perceptual:
            logs["perceptual"] = perceptual.distance(state.frozen, x, again).mean()
            value += model.perceptual.weight * logs["perceptual"]
        return value, logs

    def tokenizer_loss(train, state, batch, key):
        of_views, of_codes = jax.random.split(key)
        params, x = train["tokenizer"], real_images(batch, of_views)
        z = net.encode_image(params, x)["out"]
        quantized = quantizer.train(params["quantizer"], state.mutable["codebook"], z, of_codes, state.step)
        out = net.decode_codes(params, quantized.codes)
        value, logs = reconstruction(state, x, out)
        logs |= {"quantizer": quantized.loss, **quantized.logs}
        if plays:
            scale = adversarial.weight * (state.step >= adversarial.start)
            logs["adversarial"] = game.generator_loss(state, net.picture(out))
            if adversarial.adaptive:
                logs["adaptive_weight"] = balance(params, state, x, quantized.codes)
                scale *= logs["adaptive_weight"]
            value += scale * logs["adversarial"]
        return value + quantized.loss, ({"codebook": quantized.state}, logs)

    def balance(params, state, x, codes):
        """`adaptive_weight` of the gradients by the decoder's last kernel."""
        kernel, codes = params["decoder"]["head"]["kernel"], jax.lax.stop_gradient(codes)

        def last(kernel):
            decoder = {**params["decoder"], "head": {**params["decoder"]["head"], "kernel": kernel}}
            return net.decode_codes({"decoder": decoder}, codes)

        out, pull = jax.vjp(last, kernel)
        (first,) = pull(jax.grad(lambda out: reconstruction(state, x, out)[0])(out))
        (second,) = pull(jax.grad(lambda out: game.generator_loss(state, net.picture(out)))(out))
        return adaptive_weight(first, second)

    def encode(params, mutable, images):
        """'pooled' [B, W]: the mean of the encoder's output before it is projected; 'out': what is quantized."""
        layers = net.encode_image(params["tokenizer"], images)
        return {**layers, "pooled": layers["features"].mean((1, 2), dtype=jnp.float32)}

    def tokens(params, mutable, images):
        return net.tokens(params["tokenizer"], mutable["codebook"], images)

    def decode(params, mutable, tokens):
        codes = net.embed(params["tokenizer"], mutable["codebook"], tokens)
        return jnp.clip(net.picture(net.decode_codes(params["tokenizer"], codes)), 0, 1)

    def reconstruct(params, mutable, images):
        return decode(params, mutable, tokens(params, mutable, images))

    def codebook(params, mutable):
        return quantizer.codebook(params["tokenizer"]["quantizer"], mutable["codebook"])

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(Phase("tokenizer", ("tokenizer",), tokenizer_loss), *(game.phases if plays else ())),
        encode=encode,
        views=views,
        fns=ModelFns(
            reconstruct=reconstruct, tokens=tokens, decode=decode, codebook=codebook, discriminate=game.logits if plays else None
        ),
        encoder=("tokenizer", "encoder"),
        frozen={"perceptual": perceptual.read} if perceptual and perceptual.read else {},
        couples_batch=plays or quantizer.couples_batch,
        notes={"tokenizer": f"trained with perceptual={perceptual.note if perceptual else 'none'}"},
    )


class Networks(NamedTuple):
    """Functions of the parameters of the tokenizer, {'encoder', 'decoder', 'quantizer'}, and of the state of its codebook."""

    encode_image: Callable  # (params, images uint8 or in [0, 1]) -> the encoder's layers; 'out' is what is quantized
    decode_codes: Callable  # (params, codes [B, h, w, D]) -> the decoder's output
    picture: Callable  # output of the decoder -> [B, H, W, 3] of about [0, 1], not clipped
    tokens: Callable  # (params, codebook, images) -> int32 [B, h, w]
    embed: Callable  # (params, codebook, tokens) -> codes [B, h, w, D]


def networks_of(encoder, decoder, quantizer, laplace: bool) -> Networks:
    """`laplace`: the decoder gives the mean and the scale of a logit-Laplace distribution; else pixels in [-1, 1]."""

    def encode_image(params, images):
        return run(encoder, params["encoder"], {}, to_input(images, 0.5, 0.5), train=True)[0]

    def decode_codes(params, codes):
        return run(decoder, params["decoder"], {}, codes, train=True)[0]

    def picture(out):
        """Raw, without an activation, but for the mean of the logit-Laplace."""
        return likelihood.logit_laplace_image(jnp.split(out, 2, -1)[0]) if laplace else (out + 1) / 2

    def tokens(params, codebook, images):
        return quantizer.tokens(params["quantizer"], codebook, encode_image(params, images)["out"])

    def embed(params, codebook, tokens):
        return quantizer.embed(params["quantizer"], codebook, tokens)

    return Networks(encode_image, decode_codes, picture, tokens, embed)


class Game(NamedTuple):
    """What the discriminator adds: its phases, and a loss of the tokenizer."""

    generator_loss: Callable  # (state, pictures [B, H, W, 3] of about [0, 1]) -> scalar
    logits: Callable  # `ModelFns.discriminate`
    phases: tuple[Phase, ...]


def open_game(model, discriminator, real_images: Callable, reconstructed: Callable) -> Game:
    """The game of `config.model.adversarial`, with the penalty of `config.model.r1`.

    real_images: (batch, key) -> [B, H, W, 3] in [0, 1]. reconstructed: (state, images) -> what the tokenizer makes of them.
    """
    game, start = GAN_LOSSES[model.adversarial.game], model.adversarial.start

    def discriminate(params, state, x, train=True):
        """x in [0, 1] -> (logits, new state)"""
        (logits, _), state = run(discriminator, params, state, 2 * x - 1, train=train)
        return logits, state

    def generator_loss(state, pictures):
        return game.generator(discriminate(state.params["discriminator"], state.mutable["discriminator"], pictures)[0])

    def loss(train, state, batch, key):
        real = real_images(batch, key)
        fake = jax.lax.stop_gradient(reconstructed(state, real))
        on_real, moved = discriminate(train["discriminator"], state.mutable["discriminator"], real)
        on_fake, moved = discriminate(train["discriminator"], moved, fake)
        return game.discriminator(on_real, on_fake), ({"discriminator": moved}, health(on_real, on_fake))

    def r1_loss(train, state, batch, key):
        """Of images in [-1, 1], as in the published game."""

        def score(x):
            return discriminate(train["discriminator"], state.mutable["discriminator"], (x + 1) / 2)[0]

        penalty = r1(score, 2 * real_images(batch, key) - 1)
        return model.r1.interval * model.r1.weight * penalty, ({}, {"penalty": penalty})

    def logits(params, mutable, images):
        logits, _ = discriminate(params["discriminator"], mutable["discriminator"], to_input(images, 0.0, 1.0), train=False)
        return logits.reshape(len(logits), -1).mean(-1)

    def started(step):
        return step >= start

    phases = [Phase("d", ("discriminator",), loss, when=started if start else None)]
    if model.r1.weight:
        phases.append(Phase("r1", ("discriminator",), r1_loss, when=lambda step: started(step) & every(model.r1.interval)(step)))
    return Game(generator_loss, logits, tuple(phases))


def open_perceptual(spec, stages) -> Perceptual | None:
    """The distance that `config.model.perceptual` describes; None for 'none'.

    Raises:
        UserError: an unknown kind, no such stage; `read` of the result, a missing or wrong file.
    """
    if spec.kind == "none":
        return None
    if spec.kind == "vgg_lpips":

        def lpips(frozen, x, y):
            weights = frozen["perceptual"]
            return feature_distance(vgg.features(weights, x), vgg.features(weights, y), vgg.lins(weights))

        read = functools.partial(vgg.load, spec.path, spec.sha256)
        return Perceptual(lpips, read, "vgg_lpips (a network trained on ImageNet's labels)")
    if spec.kind == "random_conv":

        def random(frozen, x, y):
            return feature_distance(*(random_features(frozen["perceptual"], images) for images in (x, y)))

        return Perceptual(random, random_kernels, "random_conv")
    if spec.kind == "self_encoder":
        if "encoder" not in stages:
            raise UserError("config.model.perceptual.kind='self_encoder' needs a run; set config.stages.encoder.workdir and .recipe")
        stage = stages["encoder"]

        def of_encoder(frozen, x, y):
            params, state = frozen["encoder"]["params"], frozen["encoder"]["mutable"]
            return feature_distance(*(maps(stage.method.encode(params, state, images)) for images in (x, y)))

        return Perceptual(of_encoder, None, f"self_encoder ({stage.config.method})")
    raise UserError(f"config.model.perceptual.kind={spec.kind!r} is unknown; choose none, vgg_lpips, random_conv or self_encoder")


def maps(features: dict[str, jax.Array]) -> list[jax.Array]:
    """Those features of an encoder that have places: [B, ..., C]. UserError where there are none."""
    found = [features[name] for name in sorted(features) if features[name].ndim > 2]
    if not found:
        raise UserError(f"config.stages.encoder has no features with places, only {', '.join(sorted(features))}; give another run")
    return found
