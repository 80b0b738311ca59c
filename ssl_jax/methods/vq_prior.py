"""Vector-quantized image modeling: an autoregressive transformer over the tokens of a frozen tokenizer.

Yu et al. 2022, "Vector-quantized image modeling with improved VQGAN" (arXiv:2110.04627), sections 4.1 and 4.2: augmented images become
tokens within the step, the model learns the next token in raster order, of a class or of no class; pictures are sampled tokens,
decoded. The features of an image are the mean over its tokens of a block's normalized output; those in the middle are the best.
Classes may be left out of training now and then, so that one model knows both distributions and samples can be guided (Ho &
Salimans 2021).
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

    transformer: fields of `models.tokenizers.prior.Trunk` but for codes, length, classes, null and dtype, which follow from the rest.
    conditional: the model is told the class of each image.
    label_dropout: probability with which it is told none, in training; with 0 it does not know what that is.
    smoothing: of the targets.
    probe_block: whose output 'pooled' is, from 0.
    sampling: temperature, top_k, top_p (see `sampling.tokens.SamplingConfig`), and guidance, 1 for none.

    The tokenizer is `config.stages.tokenizer`.
    """
    model, below = config.model, stages["tokenizer"].method
    classes = config.data.num_classes if model.conditional else None
    check_model(model, classes, config.data.name)
    sharpening = check(SamplingConfig(model.sampling.temperature, model.sampling.top_k, model.sampling.top_p))
    guidance, views = model.sampling.guidance, make_views(config.views)
    sizes = (output_size(of.views, of.data.image_shape[-3:-1]) for of in (config, stages["tokenizer"].config))
    tokenizer = open_tokenizer(below.fns, *sizes)

    def net(frozen):
        codes, length = tokenizer.shape(frozen)
        given = dict(codes=codes, length=length, classes=classes or 1, null=model.label_dropout > 0, dtype=config.dtype)
        return construct(CausalPrior, "transformer", model.transformer, **given)

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
        of_views, of_labels, of_dropout = jax.random.split(key, 3)
        prior, label = net(state.frozen["tokenizer"]), batch["label"] if classes else None
        tokens = tokenizer.tokens(state.frozen["tokenizer"], views(batch["image"], of_views)[:, 0])
        if model.label_dropout:
            label = jnp.where(jax.random.bernoulli(of_labels, model.label_dropout, label.shape), classes, label)
        (logits, _), _ = run(prior, train["net"], {}, tokens, label, of_dropout, train=True)
        logs = {
            "bits_per_token": token_nll(logits, tokens).mean() / math.log(2),
            "unigram_bits": unigram_bits(tokens, prior.codes),  # of this batch: a model that stays above it has learned nothing
        }
        return token_nll(logits, tokens, model.smoothing).mean(), ({}, logs)

    def encode(params, mutable, images):
        _, _, features = forward(params, mutable, images)
        return by_layer(features, model.probe_block)

    def likelihood(params, mutable, images, labels):
        label = jnp.maximum(labels, 0) if classes else None  # padding has -1
        tokens, logits, _ = forward(params, mutable, images, label)
        return {"nll": token_nll(logits, tokens).sum(-1), "tokens": tokens}

    def latents(key, count):
        of_seed, of_label = jax.random.split(key)
        drawn = {"seed": jax.random.key_data(jax.random.split(of_seed, count))}
        return {**drawn, "label": jax.random.randint(of_label, (count,), 0, classes)} if classes else drawn

    def prepare(params, mutable, key, truncation=None):
        """Matrices in the type that they are multiplied in: every token has to read all of them."""

        def cast(path, x):
            return x.astype(config.dtype) if "kernel" in jax.tree_util.keystr(path) else x

        return {"params": jax.tree_util.tree_map_with_path(cast, params["net"]), "tokenizer": mutable["tokenizer"]}

    def go_on(prepared, drawn, prefix):
        """Pictures whose tokens begin with `prefix` [B, n]. With guidance the model sees each sequence with its class and without."""
        prior, label = net(prepared["tokenizer"]), drawn.get("label")
        twice = guidance != 1

        def call(method, tokens, *args):
            tokens = jnp.repeat(tokens, 2, 0) if twice else tokens
            (logits, cache), _ = run(prior, prepared["params"], {}, tokens, *args, train=False, method=method)
            return guided(logits, guidance) if twice else logits, cache

        labels = jnp.stack([label, jnp.full_like(label, classes)], 1).reshape(-1) if twice else label
        tokens = autoregress(
            lambda prefix: call("prefill", prefix, labels),
            lambda token, index, cache: call("decode", token, index, cache),
            prefix, prior.length, jax.random.wrap_key_data(drawn["seed"]), sharpening,
        )  # fmt: skip
        return tokenizer.pictures(prepared["tokenizer"], tokens)

    def sample(prepared, drawn, truncation=None):
        if truncation is not None:
            raise UserError("a prior over tokens has no truncation; set config.model.sampling (temperature, top_k, top_p, guidance)")
        return go_on(prepared, drawn, jnp.zeros((len(drawn["seed"]), 0), jnp.int32))

    def complete(prepared, drawn, images):
        """The upper half of the tokens is that of `images`."""
        height, width = tokenizer.grid(prepared["tokenizer"])
        return go_on(prepared, drawn, tokenizer.tokens(prepared["tokenizer"], images)[:, : height // 2 * width])

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape)), **({"label": Spec((), "int32")} if classes else {})},
        init=init,
        phases=(Phase("prior", ("net",), loss),),
        encode=encode,
        views=views,
        fns=ModelFns(token_nll=likelihood),
        sampler=Sampler(latents, prepare, sample, complete=complete),
        notes={
            **below.notes,
            "prior": f"{'class-conditional' if classes else 'unconditional'}, pooled=normalized output of block {model.probe_block}, "
            "mean over places (the start and all tokens but the last)",
            "sampling": " ".join(f"{name}={value:g}" for name, value in model.sampling.items()),
        },
    )


def check_model(model, classes: int | None, data: str) -> None:
    """UserError for what a model cannot be told, and for a block that is not there."""
    if model.conditional and not classes:
        raise UserError(f"config.model.conditional needs labels, and {data!r} has none; set it to False")
    if not 0 <= model.label_dropout < 1 or (model.label_dropout and not classes):
        raise UserError(f"config.model.label_dropout={model.label_dropout} must be in [0, 1), and 0 without classes")
    if model.sampling.guidance != 1 and not model.label_dropout:
        raise UserError(f"config.model.sampling.guidance={model.sampling.guidance} needs a model trained with label_dropout > 0")
    if not 0 <= model.probe_block < model.transformer.depth:
        raise UserError(f"config.model.probe_block={model.probe_block} must be at least 0 and below {model.transformer.depth}")
