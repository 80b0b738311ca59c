"""ViT-VQGAN, stage 1: Transformers encode an image as a grid of tokens and decode it; a discriminator sharpens reconstructions.

Yu et al. 2022, "Vector-quantized image modeling with improved VQGAN" (arXiv:2110.04627), section 3: low-dimensional codes of unit
norm, and a sum of losses: quantization, squared error, logit-Laplace likelihood, perceptual, adversarial. With convolutional
networks, other weights and the adaptive adversarial weight it is VQGAN (Esser et al. 2021, arXiv:2012.09841). A step updates the
tokenizer, then the discriminator, then applies the R1 penalty.

A perceptual loss brings in the supervision of its network: LPIPS brings in the labels of ImageNet. To probe unsupervised features,
train the tokenizer without LPIPS. `Method.notes` records the choice.
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
from ssl_jax.models.tokenizers.networks import build_decoder, build_discriminator, build_encoder, check_decoder
from ssl_jax.objectives import likelihood
from ssl_jax.objectives.adversarial import GAN_LOSSES, health, r1
from ssl_jax.objectives.codebooks import build_quantizer
from ssl_jax.objectives.perceptual import adaptive_weight, feature_distance, random_features, random_kernels


class Perceptual(NamedTuple):
    """A perceptual distance of images."""

    distance: Callable  # (frozen, x, y [B, H, W, 3] in [0, 1]) -> [B]
    read: Callable | None  # () -> the arrays in frozen['perceptual']; None if the distance needs none
    note: str


def build(config, stages) -> Method:
    """`config.model`:

    encoder, decoder, discriminator: networks (see `models.tokenizers.networks`).
    quantizer: see `objectives.codebooks.build_quantizer`.
    squared, absolute, logit_laplace: weights of the pixel losses; with `logit_laplace` > 0 the decoder outputs means and scales.
    perceptual: weight and kind: 'none'; 'vgg_lpips' (path and sha256 of a file, see `models.pretrained.vgg`); 'random_conv', a
      fixed random network; 'self_encoder', the run in `config.stages.encoder`.
    adversarial: weight (0: no discriminator), game (the pair of losses, a key of `GAN_LOSSES`), start (the discriminator's first
      step), adaptive (multiply the weight by `adaptive_weight` at the decoder's last layer).
    r1: weight (gamma, 0 for no penalty) and interval in steps.
    """
    model, adversarial = config.model, config.model.adversarial
    if adversarial.game not in GAN_LOSSES:
        raise UserError(f"config.model.adversarial.game={adversarial.game!r} is unknown; choose {', '.join(GAN_LOSSES)}")
    is_adversarial, laplace = adversarial.weight > 0, model.logit_laplace > 0
    quantizer = build_quantizer(model.quantizer)
    perceptual = build_perceptual(model.perceptual, stages)
    encoder = build_encoder(model.encoder, quantizer.dim, config.dtype)
    decoder = build_decoder(model.decoder, 6 if laplace else 3, config.dtype)
    views = make_views(config.views)
    height, width = output_size(config.views, config.data.image_shape[-3:-1])
    if height != width:
        raise UserError(f"the tokenizer is given images of {height} x {width} pixels; make them square with config.data.ops")
    discriminator = build_discriminator(model.discriminator, height, config.dtype) if is_adversarial else None
    net = tokenizer_functions(encoder, decoder, quantizer, laplace)

    def real_images(batch, key):
        return to_input(views(batch["image"], key)[:, 0], 0.0, 1.0)

    def reconstruct_batch(state, images):
        """Images in [0, 1] -> their reconstructions by the current tokenizer, of about [0, 1], not clipped."""
        params = state.params["tokenizer"]
        tokens = net.tokens(params, state.mutable["codebook"], images)
        return net.to_image(net.decode_codes(params, net.embed(params, state.mutable["codebook"], tokens)))

    adversary = build_adversary(model, discriminator, real_images, reconstruct_batch) if is_adversarial else None

    def init(key, batch, frozen):
        keys = jax.random.split(key, 5)
        x = real_images(batch, keys[0])
        params = {"encoder": create(encoder, keys[1], x)[0]}
        codes = net.encode_image(params, x)["out"]
        params["decoder"] = create(decoder, keys[2], codes)[0]
        check_decoder(functools.partial(net.decode_codes, params), codes, x)
        params["quantizer"], codebook = quantizer.init(keys[3])
        params, mutable = {"tokenizer": params}, {"codebook": codebook}
        if is_adversarial:
            params["discriminator"], mutable["discriminator"] = create(discriminator, keys[4], x)
        return params, mutable

    def reconstruction_loss(state, x, out):
        """(weighted sum of the losses of a decoder's output without the adversarial one, {name: loss})"""
        reconstruction = net.to_image(out)
        logs = {"squared": jnp.mean((reconstruction - x) ** 2), "absolute": jnp.mean(jnp.abs(reconstruction - x))}
        if laplace:
            mean, log_scale = jnp.split(out, 2, -1)
            logs["logit_laplace"] = -jnp.mean(likelihood.logit_laplace(x, mean, jnp.maximum(log_scale, likelihood.LEAST_LOG_SCALE)))
        value = sum(model[name] * logs[name] for name in logs)
        if perceptual:
            logs["perceptual"] = perceptual.distance(state.frozen, x, reconstruction).mean()
            value += model.perceptual.weight * logs["perceptual"]
        return value, logs

    def tokenizer_loss(train, state, batch, key):
        views_key, codes_key = jax.random.split(key)
        params, x = train["tokenizer"], real_images(batch, views_key)
        z = net.encode_image(params, x)["out"]
        quantized = quantizer.train(params["quantizer"], state.mutable["codebook"], z, codes_key, state.step)
        out = net.decode_codes(params, quantized.codes)
        value, logs = reconstruction_loss(state, x, out)
        logs |= {"quantizer": quantized.loss, **quantized.logs}
        if is_adversarial:
            scale = adversarial.weight * (state.step >= adversarial.start)
            logs["adversarial"] = adversary.generator_loss(state, net.to_image(out))
            if adversarial.adaptive:
                logs["adaptive_weight"] = last_layer_weight(params, state, x, quantized.codes)
                scale *= logs["adaptive_weight"]
            value += scale * logs["adversarial"]
        return value + quantized.loss, ({"codebook": quantized.state}, logs)

    def last_layer_weight(params, state, x, codes):
        """`adaptive_weight` from the gradients of both losses with respect to the decoder's last kernel."""
        kernel, codes = params["decoder"]["head"]["kernel"], jax.lax.stop_gradient(codes)

        def decode_with(kernel):
            decoder = {**params["decoder"], "head": {**params["decoder"]["head"], "kernel": kernel}}
            return net.decode_codes({"decoder": decoder}, codes)

        out, vjp = jax.vjp(decode_with, kernel)
        (grad_reconstruction,) = vjp(jax.grad(lambda out: reconstruction_loss(state, x, out)[0])(out))
        (grad_adversarial,) = vjp(jax.grad(lambda out: adversary.generator_loss(state, net.to_image(out)))(out))
        return adaptive_weight(grad_reconstruction, grad_adversarial)

    def encode(params, mutable, images):
        """The encoder's layers, its vectors before quantization as 'out', and 'pooled' [B, W], the mean of 'features'."""
        layers = net.encode_image(params["tokenizer"], images)
        return {**layers, "pooled": layers["features"].mean((1, 2), dtype=jnp.float32)}

    def tokens(params, mutable, images):
        return net.tokens(params["tokenizer"], mutable["codebook"], images)

    def decode(params, mutable, tokens):
        codes = net.embed(params["tokenizer"], mutable["codebook"], tokens)
        return jnp.clip(net.to_image(net.decode_codes(params["tokenizer"], codes)), 0, 1)

    def reconstruct(params, mutable, images):
        return decode(params, mutable, tokens(params, mutable, images))

    def codebook(params, mutable):
        return quantizer.codebook(params["tokenizer"]["quantizer"], mutable["codebook"])

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape))},
        init=init,
        phases=(Phase("tokenizer", ("tokenizer",), tokenizer_loss), *(adversary.phases if is_adversarial else ())),
        encode=encode,
        views=views,
        fns=ModelFns(
            reconstruct=reconstruct,
            tokens=tokens,
            decode=decode,
            codebook=codebook,
            discriminate=adversary.logits if is_adversarial else None,
        ),
        encoder=("tokenizer", "encoder"),
        frozen={"perceptual": perceptual.read} if perceptual and perceptual.read else {},
        couples_batch=is_adversarial or quantizer.couples_batch,
        notes={"tokenizer": f"trained with perceptual={perceptual.note if perceptual else 'none'}"},
    )


class TokenizerFns(NamedTuple):
    """Pure functions of the tokenizer's parameters {'encoder', 'decoder', 'quantizer'} and of the state of its codebook."""

    encode_image: Callable  # (params, images uint8 or in [0, 1]) -> the encoder's layers; 'out' is quantized next
    decode_codes: Callable  # (params, codes [B, h, w, D]) -> the decoder's output
    to_image: Callable  # output of the decoder -> [B, H, W, 3] of about [0, 1], not clipped
    tokens: Callable  # (params, codebook, images) -> int32 [B, h, w]
    embed: Callable  # (params, codebook, tokens) -> codes [B, h, w, D]


def tokenizer_functions(encoder, decoder, quantizer, laplace: bool) -> TokenizerFns:
    """`laplace`: the decoder outputs mean and scale of a logit-Laplace distribution; otherwise pixels in [-1, 1]."""

    def encode_image(params, images):
        return run(encoder, params["encoder"], {}, to_input(images, 0.5, 0.5), train=True)[0]

    def decode_codes(params, codes):
        return run(decoder, params["decoder"], {}, codes, train=True)[0]

    def to_image(out):
        return likelihood.logit_laplace_image(jnp.split(out, 2, -1)[0]) if laplace else (out + 1) / 2

    def tokens(params, codebook, images):
        return quantizer.tokens(params["quantizer"], codebook, encode_image(params, images)["out"])

    def embed(params, codebook, tokens):
        return quantizer.embed(params["quantizer"], codebook, tokens)

    return TokenizerFns(encode_image, decode_codes, to_image, tokens, embed)


class Adversary(NamedTuple):
    """The discriminator's phases, and its loss for the tokenizer."""

    generator_loss: Callable  # (state, images [B, H, W, 3] of about [0, 1]) -> scalar
    logits: Callable  # `ModelFns.discriminate`
    phases: tuple[Phase, ...]


def build_adversary(model, discriminator, real_images: Callable, reconstruct_batch: Callable) -> Adversary:
    """The adversarial loss of `config.model.adversarial`, with the penalty of `config.model.r1`.

    Args:
        real_images: (batch, key) -> [B, H, W, 3] in [0, 1].
        reconstruct_batch: (state, images) -> reconstructions [B, H, W, 3] of about [0, 1].
    """
    gan_loss, start = GAN_LOSSES[model.adversarial.game], model.adversarial.start

    def discriminate(params, state, x, train=True):
        """x in [0, 1] -> (logits, new state)"""
        (logits, _), state = run(discriminator, params, state, 2 * x - 1, train=train)
        return logits, state

    def generator_loss(state, images):
        return gan_loss.generator(discriminate(state.params["discriminator"], state.mutable["discriminator"], images)[0])

    def loss(train, state, batch, key):
        real = real_images(batch, key)
        fake = jax.lax.stop_gradient(reconstruct_batch(state, real))
        on_real, new_state = discriminate(train["discriminator"], state.mutable["discriminator"], real)
        on_fake, new_state = discriminate(train["discriminator"], new_state, fake)
        return gan_loss.discriminator(on_real, on_fake), ({"discriminator": new_state}, health(on_real, on_fake))

    def r1_loss(train, state, batch, key):
        """The published weights are for gradients with respect to images in [-1, 1]."""

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
    return Adversary(generator_loss, logits, tuple(phases))


def build_perceptual(spec, stages) -> Perceptual | None:
    """The distance that `config.model.perceptual` describes; None for 'none'.

    Raises:
        UserError: an unknown kind, or a missing stage. `Perceptual.read` raises it for a missing or wrong file.
    """
    if spec.kind == "none":
        return None
    if spec.kind == "vgg_lpips":

        def lpips(frozen, x, y):
            weights = frozen["perceptual"]
            return feature_distance(*(vgg.features(weights, images, precision=None) for images in (x, y)), vgg.lins(weights))

        read = functools.partial(vgg.load, spec.path, spec.sha256)
        return Perceptual(lpips, read, "vgg_lpips (a network trained on ImageNet's labels)")
    if spec.kind == "random_conv":

        def random_distance(frozen, x, y):
            return feature_distance(*(random_features(frozen["perceptual"], images) for images in (x, y)))

        return Perceptual(random_distance, random_kernels, "random_conv")
    if spec.kind == "self_encoder":
        if "encoder" not in stages:
            raise UserError("config.model.perceptual.kind='self_encoder' needs a run; set config.stages.encoder.workdir, .recipe")
        stage = stages["encoder"]

        def encoder_distance(frozen, x, y):
            params, state = frozen["encoder"]["params"], frozen["encoder"]["mutable"]
            return feature_distance(*(feature_maps(stage.method.encode(params, state, images)) for images in (x, y)))

        return Perceptual(encoder_distance, None, f"self_encoder ({stage.config.method})")
    raise UserError(f"config.model.perceptual.kind={spec.kind!r} is unknown; choose none, vgg_lpips, random_conv or self_encoder")


def feature_maps(features: dict[str, jax.Array]) -> list[jax.Array]:
    """The features [B, ..., C] of an encoder that have spatial dimensions. Raises UserError if there are none."""
    found = [features[name] for name in sorted(features) if features[name].ndim > 2]
    if not found:
        raise UserError(f"config.stages.encoder has no spatial features, only {', '.join(sorted(features))}; give another run")
    return found
