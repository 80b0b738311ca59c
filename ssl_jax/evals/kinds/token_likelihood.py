"""What a prior over tokens knows of held-out images beyond how frequent tokens are, everywhere and at each place.

The frequencies are those of training images, and their cross-entropy with held-out tokens is compared: a prior whose bits per token do
not lie below `bits_position` has learned nothing of how tokens go together.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import Evaluator, Option

STRENGTHS = tuple(10.0 ** (n / 2) for n in range(-2, 9))  # of the unigram within the frequencies at a place


def evaluate(context: Context, *, examples: int = 10000) -> Result:
    """At most the first `examples` images of each split; classes are given to a prior that is conditional.

    bits_per_token: of held-out tokens under the prior. nats: per image.
    bits_unigram: of held-out tokens under their frequencies in training images, one added to each.
    bits_position: the same with frequencies at each place, smoothed by the frequencies everywhere.
    gain: bits_position - bits_per_token.
    """
    nll, held_out = _measured(context, "test", examples)
    known, key = context.pictures.known, ("training tokens", examples)
    if key not in known:  # the tokenizer is frozen
        known[key] = _measured(context, "train", examples)[1]
    train = known[key]
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
        f"prior {held_out.shape[1]} tokens an image, held-out {context.named('test', len(held_out))},"
        f" frequencies of {context.named('train', len(train))}, at places smoothed by {strength:g} of the unigram"
    )
    return Result({name: float(value) for name, value in metrics.items()}, protocol)


EVALUATOR = Evaluator(
    evaluate, {"examples": Option("at most the first so many images of each split", least=2)}, needs=("token_nll",)
)


def _measured(context: Context, split: str, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """nll [N] float64 in nats, tokens [N, T] int64."""

    def encode(images, labels):
        return {"both": _side_by_side(context.pictures.fns.token_nll(images, labels))}

    rows = context.through(encode, split, "both", examples, names=("label",)).x
    return rows[:, 0].astype(np.float64), rows[:, 1:].astype(np.int64)


@jax.jit
def _side_by_side(told):
    return jnp.concatenate([told["nll"][:, None], told["tokens"].astype(jnp.float32)], 1)


def baselines(train: np.ndarray, held_out: np.ndarray) -> tuple[float, float, float]:
    """(bits per held-out token under the unigram, under frequencies at places, strength of the smoothing of those).

    train [N, T], held_out [M, T]: tokens. Unigram: (n + 1) / (N T + K), K the largest token seen + 1. At place t: (n_t + a unigram) /
    (N + a), where `a` is the one of STRENGTHS under which each training image is the most probable when it is left out itself.
    """
    count, places = train.shape
    codes = int(max(train.max(), held_out.max())) + 1
    unigram = (np.bincount(train.ravel(), minlength=codes) + 1) / (train.size + codes)
    at = np.stack([np.bincount(train[:, t], minlength=codes) for t in range(places)])

    def bits(tokens, left_out, strength):
        own = at[np.arange(places), tokens] - left_out
        return -np.mean(np.log2((own + strength * unigram[tokens]) / (count - left_out + strength)))

    strength = min(STRENGTHS, key=functools.partial(bits, train, 1))
    return float(-np.mean(np.log2(unigram[held_out]))), float(bits(held_out, 0, strength)), strength
