"""MaskGIT: a bidirectional transformer fills in masked tokens of a frozen tokenizer, many at once.

Chang et al. 2022, "MaskGIT: masked generative image transformer" (arXiv:2202.04200), section 3.

Training: mask a random share of the tokens, from one to all, and predict them. Sampling: start with all tokens masked. Each step
samples all masked tokens, keeps the most confident ones and masks the others again. The noise on the confidence decreases over the
steps. About ten steps make an image.
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

    transformer: fields of `models.tokenizers.prior.Trunk` except codes, length, classes, null and dtype, which follow from the
      rest.
    conditional: the model is given the class of each image.
    schedule: a key of SCHEDULES, for training and sampling.
    least_masked: optional, the least share of tokens that training masks, 0 by default (always at least one token).
    smoothing: of the targets.
    probe_block: index from 0 of the block whose output, without masks, is 'pooled'.
    sampling: steps; choice_temperature, of the noise on the confidence; temperature, top_k, top_p of the tokens.

    The tokenizer is `config.stages.tokenizer`.
    """
    model, sampling, below = config.model, config.model.sampling, stages["tokenizer"].method
    classes = config.data.num_classes if model.conditional else None
    check_model(model, classes, config.data.name)
    sampling_config = check(SamplingConfig(sampling.temperature, sampling.top_k, sampling.top_p))
    views = make_views(config.views)
    sizes = (output_size(part.views, part.data.image_shape[-3:-1]) for part in (config, stages["tokenizer"].config))
    tokenizer = open_tokenizer(below.fns, *sizes)

    def net(frozen):
        codes, length = tokenizer.shape(frozen)
        sizes = dict(codes=codes, length=length, classes=classes or 1, null=False, dtype=config.dtype)
        return construct(MaskedPrior, "transformer", model.transformer, **sizes)

    def init(key, batch, frozen):
        prior = net(frozen["tokenizer"])
        params, _ = create(prior, key, jnp.zeros((len(batch["image"]), prior.length), jnp.int32), train=False)
        return {"net": params}, {}

    def loss(train, state, batch, key):
        views_key, masks_key, dropout_key = jax.random.split(key, 3)
        prior, label = net(state.frozen["tokenizer"]), batch["label"] if classes else None
        tokens = tokenizer.tokens(state.frozen["tokenizer"], views(batch["image"], views_key)[:, 0])
        mask = random_masks(masks_key, tokens.shape, model.schedule, model.get("least_masked", 0.0))
        (logits, _), _ = run(prior, train["net"], {}, jnp.where(mask, prior.codes, tokens), label, dropout_key, train=True)
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

    def sample_latents(key, count):
        seed_key, label_key = jax.random.split(key)
        latents = {"seed": jax.random.key_data(jax.random.split(seed_key, count))}
        return {**latents, "label": jax.random.randint(label_key, (count,), 0, classes)} if classes else latents

    def prepare(params, mutable, key, truncation=None):
        return {"params": params["net"], "tokenizer": mutable["tokenizer"]}

    def fill_in(prepared, latents, prefix):
        """Images [B, h, w, 3] whose tokens begin with `prefix` [B, n]."""
        prior = net(prepared["tokenizer"])

        def predict(tokens):
            return run(prior, prepared["params"], {}, tokens, latents.get("label"), train=False)[0][0]

        tokens = jnp.pad(prefix, ((0, 0), (0, prior.length - prefix.shape[1])), constant_values=prior.codes)
        counts = masked_counts(prior.length - prefix.shape[1], sampling.steps, model.schedule)
        keys = jax.random.wrap_key_data(latents["seed"])
        steps = decode_in_parallel(predict, tokens, prior.codes, counts, keys, sampling.choice_temperature, sampling_config)
        return tokenizer.decode(prepared["tokenizer"], steps[-1])

    def sample(prepared, latents, truncation=None):
        if truncation is not None:
            raise UserError("a token prior has no truncation; set config.model.sampling (temperature, choice_temperature, ...)")
        return fill_in(prepared, latents, jnp.zeros((len(latents["seed"]), 0), jnp.int32))

    def complete(prepared, latents, images):
        """Keep the upper half of the tokens of `images`, and sample the rest."""
        height, width = tokenizer.grid(prepared["tokenizer"])
        return fill_in(prepared, latents, tokenizer.tokens(prepared["tokenizer"], images)[:, : height // 2 * width])

    return Method(
        inputs={"image": Spec(tuple(config.data.image_shape)), **({"label": Spec((), "int32")} if classes else {})},
        init=init,
        phases=(Phase("prior", ("net",), loss),),
        encode=encode,
        views=views,
        sampler=Sampler(sample_latents, prepare, sample, complete=complete),
        notes={
            **below.notes,
            "prior": f"{'class-conditional' if classes else 'unconditional'}, pooled=mean over tokens of block {model.probe_block}",
            "sampling": " ".join((f"schedule={model.schedule}", *(f"{name}={value:g}" for name, value in sampling.items()))),
        },
    )


def decode_in_parallel(
    predict: Callable[[jax.Array], jax.Array],
    tokens: jax.Array,
    mask_id: int,
    counts: tuple[int, ...],
    keys: jax.Array,
    choice_temperature: float,
    config: SamplingConfig = DEFAULT_SAMPLING,
) -> jax.Array:
    """Tokens int32 [B, T] with the same number of masks in each row -> [steps, B, T], the tokens after each step.

    Args:
        predict: tokens -> logits [B, T, codes].
        counts: numbers of masks after each step; the last is 0.
        keys: [B], one for each row.
        choice_temperature: in step t = 1 .. steps the confidence, log p of the sampled token, gets Gumbel noise times
            `choice_temperature` (1 - t / steps); with 0 the most probable samples are kept.
    """
    token_keys, choice_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)

    def step(tokens, index_and_count):
        index, count = index_and_count
        masked, logits = tokens == mask_id, predict(tokens)
        filled = jnp.where(masked, sample_token(logits, token_keys, index, config), tokens)
        noise = choice_temperature * (1 - (index + 1) / len(counts)) * gumbel(choice_keys, index, tokens.shape[1:])
        confidence = jnp.where(masked, noise - token_nll(logits, jnp.where(masked, filled, 0)), jnp.inf)
        tokens = jnp.where(lowest(confidence, count), mask_id, filled)
        return tokens, tokens

    return jax.lax.scan(step, tokens, (jnp.arange(len(counts)), jnp.asarray(counts)))[1]


def check_model(model, classes: int | None, data: str) -> None:
    """Raises UserError for missing classes, an unknown schedule, an impossible share or number of steps, or a missing block."""
    if model.conditional and not classes:
        raise UserError(
            f"config.model.conditional needs labels that are classes, and {data!r} has none; give --config.model.conditional=False"
        )
    if model.schedule not in SCHEDULES:
        raise UserError(f"config.model.schedule={model.schedule!r} is unknown; choose {', '.join(SCHEDULES)}")
    if not 0 <= model.get("least_masked", 0.0) <= 1:
        raise UserError(f"config.model.least_masked={model.least_masked} must be from 0 to 1")
    if model.sampling.steps < 1 or model.sampling.choice_temperature < 0:
        raise UserError("config.model.sampling: steps must be 1 or more, choice_temperature 0 or more")
    if not 0 <= model.probe_block < model.transformer.depth:
        raise UserError(f"config.model.probe_block={model.probe_block} must be at least 0 and below {model.transformer.depth}")
