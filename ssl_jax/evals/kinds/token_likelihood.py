"""Cross-entropy of a token prior on held-out images, against the frequencies of tokens overall and at each position.

The baselines are token frequencies of training images. A prior with no fewer bits per token than `bits_position` has learned
nothing about the dependence between tokens.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import Evaluator, Option

STRENGTHS = tuple(10.0 ** (n / 2) for n in range(-2, 9))  # candidate pseudo-counts of the unigram at each position


def evaluate(context: Context, *, examples: int = 10000) -> Result:
    """At most the first `examples` images of each split. A conditional prior gets the classes of the images.

    bits_per_token: cross-entropy of held-out tokens under the prior, in bits.
    nats: cross-entropy per image under the prior, in nats.
    bits_unigram: cross-entropy under the token frequencies in training images, with one added to each count.
    bits_position: cross-entropy under the token frequencies at each position, smoothed by the overall frequencies.
    gain: bits_position - bits_per_token.
    """
    nll, held_out = _nll_and_tokens(context, "test", examples)
    cache, key = context.model.cache, ("training tokens", examples)
    if key not in cache:  # the tokenizer is frozen
        cache[key] = _nll_and_tokens(context, "train", examples)[1]
    train = cache[key]
    unigram, position, strength = baselines(train, held_out)
    bits = np.mean(nll) / (np.log(2) * held_out.shape[1])
    metrics = {
        "bits_per_token": bits,
        "nats": np.mean(nll),
        "bits_unigram": unigram,
        "bits_position": position,
        "gain": position - bits,
    }
    protocol = (
        f"prior {held_out.shape[1]} tokens an image, held-out {context.name('test', len(held_out))},"
        f" frequencies of {context.name('train', len(train))}, at places smoothed by {strength:g} of the unigram"
    )
    return Result({name: float(value) for name, value in metrics.items()}, protocol)


EVALUATOR = Evaluator(
    evaluate, {"examples": Option("largest number of images of each split, the first ones", least=2)}, needs=("token_nll",)
)


def _nll_and_tokens(context: Context, split: str, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """nll [N] float64 in nats, tokens [N, T] int64."""

    def encode(images, labels):
        return {"both": _side_by_side(context.model.fns.token_nll(images, labels))}

    rows = context.encode_with(encode, split, "both", examples, names=("label",)).x
    return rows[:, 0].astype(np.float64), rows[:, 1:].astype(np.int64)


@jax.jit
def _side_by_side(outputs):
    return jnp.concatenate([outputs["nll"][:, None], outputs["tokens"].astype(jnp.float32)], 1)


def baselines(train: np.ndarray, held_out: np.ndarray) -> tuple[float, float, float]:
    """(bits per held-out token under the unigram, bits under the frequencies per position, smoothing strength a).

    train [N, T], held_out [M, T]: tokens. Unigram: (n + 1) / (N T + K), where K is the largest token + 1. At position t:
    (n_t + a unigram) / (N + a), where `a` in STRENGTHS minimizes the leave-one-out cross-entropy of the training images.
    """
    count, positions = train.shape
    codes = int(max(train.max(), held_out.max())) + 1
    unigram = (np.bincount(train.ravel(), minlength=codes) + 1) / (train.size + codes)
    at = np.stack([np.bincount(train[:, t], minlength=codes) for t in range(positions)])

    def bits(tokens, left_out, strength):
        own = at[np.arange(positions), tokens] - left_out
        return -np.mean(np.log2((own + strength * unigram[tokens]) / (count - left_out + strength)))

    strength = min(STRENGTHS, key=functools.partial(bits, train, 1))
    return float(-np.mean(np.log2(unigram[held_out]))), float(bits(held_out, 0, strength)), strength
