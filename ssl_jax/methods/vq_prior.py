"""Vector-quantized image modeling: an autoregressive transformer over the tokens of a frozen tokenizer.

Yu et al. 2022, "Vector-quantized image modeling with improved VQGAN" (arXiv:2110.04627), sections 4.1 and 4.2.

The training step tokenizes augmented images, and the model learns to predict the next token in raster order, with or without the
class. The tokenizer decodes sampled tokens to images. The features of an image are the mean over tokens of a block's normalized
output; middle blocks are the best. Training may drop classes at random (`label_dropout`): the model then learns both distributions,
and guidance mixes them (Ho and Salimans 2021).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from ssl_jax.augment.views import make_views, output_size
from ssl_jax.engine.method import Method, ModelFns, Phase, Sampler, Spec
from ssl_jax.errors import UserError
from ssl_jax.models.build import construct
from ssl_jax.models.common import create, run
from ssl_jax.models.tokenizers.frozen_tokenizer import open_tokenizer
from ssl_jax.models.tokenizers.prior import CausalPrior, by_layer
from ssl_jax.objectives.tokens import token_nll, unigram_bits
from ssl_jax.sampling.tokens import SamplingConfig, autoregress, check, guided


def build(config, stages) -> Method:
    """`config.model`:

    transformer: fields of `models.tokenizers.prior.Trunk` except codes, length, classes, null and dtype, which follow from the
      rest.
    conditional: the model is given the class of each image.
    label_dropout: probability of replacing the class by the null class in training; with 0 there is no null class.
    smoothing: of the targets.
    probe_block: index from 0 of the block whose output is 'pooled'.
    sampling: temperature, top_k, top_p (see `sampling.tokens.SamplingConfig`), and guidance, 1 for none.

    The tokenizer is `config.stages.tokenizer`.
    """
    model, below = config.model, stages["tokenizer"].method
    classes = config.data.num_classes if model.conditional else None
    check_model(model, classes, config.data.name)
    sampling_config = check(SamplingConfig(model.sampling.temperature, model.sampling.top_k, model.sampling.top_p))
    guidance, views = model.sampling.guidance, make_views(config.views)
    sizes = (output_size(part.views, part.data.image_shape[-3:-1]) for part in (config, stages["tokenizer"].config))
    tokenizer = open_tokenizer(below.fns, *sizes)

    def net(frozen):
        codes, length = tokenizer.shape(frozen)
        sizes = dict(codes=codes, length=length, classes=classes or 1, null=model.label_dropout > 0, dtype=config.dtype)
        return construct(CausalPrior, "transformer", model.transformer, **sizes)

    def forward(params, mutable, images, label=None):
        """(tokens, logits, features)"""
        frozen = mutable["tokenizer"]
        tokens = tokenizer.tokens(frozen, images)
        return tokens, *run(net(frozen), params["net"], {}, tokens, label, train=False)[0]

    def init(key, batch, frozen):
        prior = net(frozen["tokenizer"])
        params, _ = create(prior, key, jnp.zeros((len(batch["image"]), prior.length), jnp.int32), train=False)
        return {"net": params}, {}

    def loss(train, state, batch, key):
        views_key, labels_key, dropout_key = jax.random.split(key, 3)
        prior, label = net(state.frozen["tokenizer"]), batch["label"] if classes else None
        tokens = tokenizer.tokens(state.frozen["tokenizer"], views(batch["image"], views_key)[:, 0])
        if model.label_dropout:
            label = jnp.where(jax.random.bernoulli(labels_key, model.label_dropout, label.shape), classes, label)
        (logits, _), _ = run(prior, train["net"], {}, tokens, label, dropout_key, train=True)
        logs = {
            "bits_per_token": token_nll(logits, tokens).mean() / math.log(2),
            "unigram_bits": unigram_bits(tokens, prior.codes),  # of this batch: the entropy that a model without context reaches
        }
        return token_nll(logits, tokens, model.smoothing).mean(), ({}, logs)

    def encode(params, mutable, images):
        _, _, features = forward(params, mutable, images)
        return by_layer(features, model.probe_block)

    def likelihood(params, mutable, images, labels):
        label = jnp.maximum(labels, 0) if classes else None  # padding has label -1
        tokens, logits, _ = forward(params, mutable, images, label)
        return {"nll": token_nll(logits, tokens).sum(-1), "tokens": tokens}

    def sample_latents(key, count):
        seed_key, label_key = jax.random.split(key)
        latents = {"seed": jax.random.key_data(jax.random.split(seed_key, count))}
        return {**latents, "label": jax.random.randint(label_key, (count,), 0, classes)} if classes else latents

    def prepare(params, mutable, key, truncation=None):
        """Cast kernels to the compute type once: every sampled token reads all of them."""

        def cast(path, x):
            return x.astype(config.dtype) if "kernel" in jax.tree_util.keystr(path) else x

        return {"params": jax.tree_util.tree_map_with_path(cast, params["net"]), "tokenizer": mutable["tokenizer"]}

    def sample_after(prepared, latents, prefix):
        """Images [B, h, w, 3] whose tokens begin with `prefix` [B, n]. Guidance runs each sequence with and without its class."""
        prior, label = net(prepared["tokenizer"]), latents.get("label")
        is_guided = guidance != 1

        def call(method, tokens, *args):
            tokens = jnp.repeat(tokens, 2, 0) if is_guided else tokens
            (logits, cache), _ = run(prior, prepared["params"], {}, tokens, *args, train=False, method=method)
            return guided(logits, guidance) if is_guided else logits, cache

        labels = jnp.stack([label, jnp.full_like(label, classes)], 1).reshape(-1) if is_guided else label
        tokens = autoregress(
            lambda prefix: call("prefill", prefix, labels),
            lambda token, index, cache: call("decode", token, index, cache),
            prefix, prior.length, jax.random.wrap_key_data(latents["seed"]), sampling_config,
        )  # fmt: skip
        return tokenizer.decode(prepared["tokenizer"], tokens)

    def sample(prepared, latents, truncation=None):
        if truncation is not None:
            raise UserError("a token prior has no truncation; set config.model.sampling (temperature, top_k, top_p, guidance)")
        return sample_after(prepared, latents, jnp.zeros((len(latents["seed"]), 0), jnp.int32))

    def complete(prepared, latents, images):
        """Keep the upper half of the tokens of `images`, and sample the rest."""
        height, width = tokenizer.grid(prepared["tokenizer"])
        return sample_after(prepared, latents, tokenizer.tokens(prepared["tokenizer"], images)[:, : height // 2 * width])

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape)), **({"label": Spec((), "int32")} if classes else {})},
        init=init,
        phases=(Phase("prior", ("net",), loss),),
        encode=encode,
        views=views,
        fns=ModelFns(token_nll=likelihood),
        sampler=Sampler(sample_latents, prepare, sample, complete=complete),
        notes={
            **below.notes,
            "prior": f"{'class-conditional' if classes else 'unconditional'}, pooled=normalized output of block {model.probe_block}, "
            "mean over places (the start and all tokens but the last)",
            "sampling": " ".join(f"{name}={value:g}" for name, value in model.sampling.items()),
        },
    )


def check_model(model, classes: int | None, data: str) -> None:
    """Raises UserError for options that need classes or label dropout, or a block that does not exist."""
    if model.conditional and not classes:
        flags = "--config.model.conditional=False"
        flags += " --config.model.label_dropout=0" if model.label_dropout else ""
        flags += " --config.model.sampling.guidance=1" if model.sampling.guidance != 1 else ""
        raise UserError(f"config.model.conditional needs labels that are classes, and {data!r} has none; give {flags}")
    if not 0 <= model.label_dropout < 1 or (model.label_dropout and not classes):
        raise UserError(f"config.model.label_dropout={model.label_dropout} must be in [0, 1), and 0 without classes")
    if model.sampling.guidance != 1 and not model.label_dropout:
        raise UserError(f"config.model.sampling.guidance={model.sampling.guidance} needs a model trained with label_dropout > 0")
    if not 0 <= model.probe_block < model.transformer.depth:
        raise UserError(f"config.model.probe_block={model.probe_block} must be at least 0 and below {model.transformer.depth}")
