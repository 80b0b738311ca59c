"""The accuracy of a model's own scores against counted ranks."""

import jax
import numpy as np
import pytest

from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context
from ssl_jax.evals.kinds import classifier


def test_classifier_accuracy_equals_counted_ranks():
    scores, labels = np.random.default_rng(0).standard_normal((40, 7)), np.random.default_rng(1).integers(0, 7, 40)
    batch = {"image": scores[:, None, None].astype(np.float32), "label": labels, "_valid": np.ones(40, bool)}
    context = Context(jax.jit(lambda x: {"logits": x[:, 0, 0], "pooled": -x[:, 0, 0]}), lambda split: iter([batch]))
    metrics, protocol, _ = classifier.evaluate(context)
    ranks = np.array([(row > row[label]).sum() for row, label in zip(scores, labels, strict=True)])
    assert metrics == pytest.approx({f"top{k}": 100 * np.mean(ranks < k) for k in (1, 5)})
    assert protocol == "classifier layer=logits of test(40), nothing fitted"
    with pytest.raises(UserError, match="classifier needs a model with 'scores'; this has logits, pooled"):
        classifier.prepare(context, layer="scores")
