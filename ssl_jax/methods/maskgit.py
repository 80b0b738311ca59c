"""MaskGIT: a bidirectional transformer fills in masked tokens of a frozen tokenizer, many at once.

Chang et al. 2022, "MaskGIT: masked generative image transformer" (arXiv:2202.04200), section 3. Training: a random share of the tokens,
from all of them to one, is masked and predicted. Sampling: all are masked; each step draws all that are still masked, keeps those that
it is most confident of, and masks the others again, with less and less noise on the confidence. Some ten steps make a picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ssl_jax.augment.views import make_views, output_size
from ssl_jax.engine.method import Method, Phase, Sampler, Spec
from ssl_jax.errors import UserError
from ssl_jax.models.build import construct
from ssl_jax.models.common import create, run
from ssl_jax.models.tokenizers.frozen_tokenizer import open_tokenizer
from ssl_jax.models.tokenizers.prior import MaskedPrior, by_layer
from ssl_jax.objectives.tokens import SCHEDULES, lowest, masked_counts, masked_mean, random_masks, token_nll
from ssl_jax.sampling.tokens import DEFAULT_SAMPLING, SamplingConfig, check, gumbel, sample_token


def build(config, stages) -> Method:
    """`config.model`:

    transformer: fields of `models.tokenizers.prior.Trunk` but for codes, length, classes, null and dtype, which follow from the rest.
    conditional: the model is told the class of each image.
    schedule: a key of SCHEDULES; of training and sampling.
    smoothing: of the targets.
    probe_block: whose output 'pooled' is, from 0; nothing is masked then.
    sampling: steps; choice_temperature, of the noise on the confidence; temperature, top_k, top_p of the tokens.

    The tokenizer is `config.stages.tokenizer`.
    """
    model, sampling, below = config.model, config.model.sampling, stages["tokenizer"].method
    classes = config.data.num_classes if model.conditional else None
    check_model(model, classes, config.data.name)
    sharpening = check(SamplingConfig(sampling.temperature, sampling.top_k, sampling.top_p))
    views = make_views(config.views)
    sizes = (output_size(of.views, of.data.image_shape[-3:-1]) for of in (config, stages["tokenizer"].config))
    tokenizer = open_tokenizer(below.fns, *sizes)

    def net(frozen):
        codes, length = tokenizer.shape(frozen)
        given = dict(codes=codes, length=length, classes=classes or 1, null=False, dtype=config.dtype)
        return construct(MaskedPrior, "transformer", model.transformer, **given)

    def init(key, batch, frozen):
        prior = net(frozen["tokenizer"])
        params, _ = create(prior, key, jnp.zeros((len(batch["image"]), prior.length), jnp.int32), train=False)
        return {"net": params}, {}

    def loss(train, state, batch, key):
        of_views, of_masks, of_dropout = jax.random.split(key, 3)
        prior, label = net(state.frozen["tokenizer"]), batch["label"] if classes else None
        tokens = tokenizer.tokens(state.frozen["tokenizer"], views(batch["image"], of_views)[:, 0])
        mask = random_masks(of_masks, tokens.shape, model.schedule)
        (logits, _), _ = run(prior, train["net"], {}, jnp.where(mask, prior.codes, tokens), label, of_dropout, train=True)
        logs = {
            "bits_per_masked_token": masked_mean(token_nll(logits, tokens), mask) / math.log(2),
            "accuracy": masked_mean(1.0 * (logits.argmax(-1) == tokens), mask),
            "masked": mask.mean(),
        }
        return masked_mean(token_nll(logits, tokens, model.smoothing), mask), ({}, logs)

    def encode(params, mutable, images):
        frozen = mutable["tokenizer"]
        (_, features), _ = run(net(frozen), params["net"], {}, tokenizer.tokens(frozen, images), train=False)
        return by_layer(features, model.probe_block)

    def latents(key, count):
        of_seed, of_label = jax.random.split(key)
        drawn = {"seed": jax.random.key_data(jax.random.split(of_seed, count))}
        return {**drawn, "label": jax.random.randint(of_label, (count,), 0, classes)} if classes else drawn

    def prepare(params, mutable, key, truncation=None):
        return {"params": params["net"], "tokenizer": mutable["tokenizer"]}

    def fill_in(prepared, drawn, known):
        """Pictures whose tokens begin with `known` [B, n]."""
        prior = net(prepared["tokenizer"])

        def logits_of(tokens):
            return run(prior, prepared["params"], {}, tokens, drawn.get("label"), train=False)[0][0]

        tokens = jnp.pad(known, ((0, 0), (0, prior.length - known.shape[1])), constant_values=prior.codes)
        counts = masked_counts(prior.length - known.shape[1], sampling.steps, model.schedule)
        keys = jax.random.wrap_key_data(drawn["seed"])
        done = decode_in_parallel(logits_of, tokens, prior.codes, counts, keys, sampling.choice_temperature, sharpening)
        return tokenizer.pictures(prepared["tokenizer"], done[-1])

    def sample(prepared, drawn, truncation=None):
        if truncation is not None:
            raise UserError("a prior over tokens has no truncation; set config.model.sampling (temperature, choice_temperature, ...)")
        return fill_in(prepared, drawn, jnp.zeros((len(drawn["seed"]), 0), jnp.int32))

    def complete(prepared, drawn, images):
        """The upper half of the tokens is that of `images`."""
        height, width = tokenizer.grid(prepared["tokenizer"])
        return fill_in(prepared, drawn, tokenizer.tokens(prepared["tokenizer"], images)[:, : height // 2 * width])

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape)), **({"label": Spec((), "int32")} if classes else {})},
        init=init,
        phases=(Phase("prior", ("net",), loss),),
        encode=encode,
        views=views,
        sampler=Sampler(latents, prepare, sample, complete=complete),
        notes={
            **below.notes,
            "prior": f"{'class-conditional' if classes else 'unconditional'}, pooled=mean over tokens of block {model.probe_block}",
            "sampling": " ".join((f"schedule={model.schedule}", *(f"{name}={value:g}" for name, value in sampling.items()))),
        },
    )


def decode_in_parallel(
    logits_of: Callable[[jax.Array], jax.Array],
    tokens: jax.Array,
    mask_id: int,
    counts: tuple[int, ...],
    keys: jax.Array,
    choice_temperature: float,
    sharpening: SamplingConfig = DEFAULT_SAMPLING,
) -> jax.Array:
    """int32 [B, T] with equally many masks in each row -> [steps, B, T], what is known after each of len(counts) steps.

    logits_of: tokens -> [B, T, codes]. counts: of masks after each step; the last is 0. keys [B]. In step t the confidence, log p of
    what was drawn, has Gumbel noise times `choice_temperature` (1 - t / steps); with 0 the most probable draws are kept.
    """
    of_tokens, of_choice = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)

    def step(tokens, now):
        index, left = now
        masked, logits = tokens == mask_id, logits_of(tokens)
        filled = jnp.where(masked, sample_token(logits, of_tokens, index, sharpening), tokens)
        noise = choice_temperature * (1 - (index + 1) / len(counts)) * gumbel(of_choice, index, tokens.shape[1:])
        confidence = jnp.where(masked, noise - token_nll(logits, jnp.where(masked, filled, 0)), jnp.inf)
        tokens = jnp.where(lowest(confidence, left), mask_id, filled)
        return tokens, tokens

    return jax.lax.scan(step, tokens, (jnp.arange(len(counts)), jnp.asarray(counts)))[1]


def check_model(model, classes: int | None, data: str) -> None:
    """UserError for classes that are not there, an unknown schedule, impossible steps, and a block that is not there."""
    if model.conditional and not classes:
        raise UserError(f"config.model.conditional needs labels, and {data!r} has none; set it to False")
    if model.schedule not in SCHEDULES:
        raise UserError(f"config.model.schedule={model.schedule!r} is unknown; choose {', '.join(SCHEDULES)}")
    if model.sampling.steps < 1 or model.sampling.choice_temperature < 0:
        raise UserError("config.model.sampling: steps must be 1 or more, choice_temperature 0 or more")
    if not 0 <= model.probe_block < model.transformer.depth:
        raise UserError(f"config.model.probe_block={model.probe_block} must be at least 0 and below {model.transformer.depth}")
