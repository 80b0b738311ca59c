"""What a discriminator says of real images that it was trained with, and of others: does it know its training set by heart?

Brock et al. 2019 (arXiv:1809.11096), section 4.2: 98 % of the training images are judged real late in training, half of the others.
"""

from __future__ import annotations

import numpy as np

from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import Evaluator, Option


def evaluate(context: Context, *, examples: int = 2048) -> Result:
    """The first `examples` real images of each split, in percent.

    accuracy_train, accuracy_test: images with a positive score, that is judged to be real. Means little for critics (Wasserstein),
    whose scores have no zero.
    train_above_test: pairs of which the training image has the higher score (ties count half); 50 where nothing was memorized.
    """

    def encode(images):
        return {"score": context.pictures.fns.discriminate(images).reshape(-1, 1)}

    train, test = (context.through(encode, split, "score", examples).x[:, 0] for split in ("train", "test"))
    metrics = {
        "accuracy_train": 100 * np.mean(train > 0),
        "accuracy_test": 100 * np.mean(test > 0),
        "train_above_test": 100 * above(train, test),
    }
    splits = f"{context.named('train', len(train))} and {context.named('test', len(test))}"
    protocol = f"judge first of {splits} inference mode, real: score above 0"
    return Result({name: float(value) for name, value in metrics.items()}, protocol)


EVALUATOR = Evaluator(evaluate, {"examples": Option("the first so many images of each split", least=1)}, needs=("discriminate",))


def above(a: np.ndarray, b: np.ndarray) -> float:
    """Share of pairs with a_i > b_j, ties as halves: the area under the ROC curve."""
    b = np.sort(b)
    return float((np.searchsorted(b, a, "left") + np.searchsorted(b, a, "right")).mean() / (2 * len(b)))
