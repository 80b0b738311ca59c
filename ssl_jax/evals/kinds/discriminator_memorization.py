"""Memorization of the training set: the scores of a discriminator on real training images and on real test images.

Brock et al. 2019 (arXiv:1809.11096), section 4.2: late in training the discriminator takes 98 % of the training images for
real, but only half of the held-out images.
"""

from __future__ import annotations

import numpy as np

from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import Evaluator, Option


def evaluate(context: Context, *, examples: int = 2048) -> Result:
    """The first `examples` real images of each split, in percent.

    accuracy_train, accuracy_test: images with a positive score, which means real. Not meaningful for Wasserstein critics, whose
        scores have no zero.
    train_above_test: pairs in which the training image has the higher score (ties count half); 50 without memorization.
    """

    def encode(images):
        return {"score": context.model.fns.discriminate(images).reshape(-1, 1)}

    train, test = (context.encode_with(encode, split, "score", examples).x[:, 0] for split in ("train", "test"))
    metrics = {
        "accuracy_train": 100 * np.mean(train > 0),
        "accuracy_test": 100 * np.mean(test > 0),
        "train_above_test": 100 * above(train, test),
    }
    splits = f"{context.name('train', len(train))} and {context.name('test', len(test))}"
    protocol = f"judge first of {splits} inference mode, real: score above 0"
    return Result({name: float(value) for name, value in metrics.items()}, protocol)


EVALUATOR = Evaluator(
    evaluate, {"examples": Option("number of images of each split, the first ones", least=1)}, needs=("discriminate",)
)


def above(a: np.ndarray, b: np.ndarray) -> float:
    """Share of pairs with a_i > b_j, where ties count half: the area under the ROC curve."""
    b = np.sort(b)
    return float((np.searchsorted(b, a, "left") + np.searchsorted(b, a, "right")).mean() / (2 * len(b)))
