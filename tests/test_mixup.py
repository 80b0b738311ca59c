"""Mixup and CutMix against loops in NumPy and against timm; cross-entropy with soft targets against PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from torch_reference import require_timm, require_torch

from ssl_jax.augment import mixup
from ssl_jax.errors import UserError
from ssl_jax.objectives.classification import cross_entropy, soft_cross_entropy

LABELS = np.array([2, 0, 1, 1], np.int32)


def batch(count=4, height=9, width=7):
    return np.random.default_rng(0).random((count, height, width, 3)).astype(np.float32)


def loop(images, labels, weights, classes, smoothing):
    """Image i and the i-th from the end, pixel by pixel; float64."""
    out, targets, share = np.zeros(images.shape), np.zeros((len(images), classes)), weights.mean()
    for i in range(len(images)):
        j = len(images) - 1 - i
        for y in range(images.shape[1]):
            for x in range(images.shape[2]):
                out[i, y, x] = weights[y, x] * images[i, y, x] + (1 - weights[y, x]) * images[j, y, x]
        for label, part in ((labels[i], share), (labels[j], 1 - share)):
            for c in range(classes):
                targets[i, c] += part * (smoothing / classes + (1 - smoothing) * (c == label))
    return out, targets


@pytest.mark.full
@pytest.mark.parametrize(("alphas", "smoothing"), [((0.8, 0.0), 0.0), ((0.0, 1.0), 0.1), ((0.8, 1.0), 0.1)])
def test_mixed_images_and_targets_equal_a_loop(alphas, smoothing):
    images, key = batch(), jax.random.key(3)
    found, targets = mixup.mix(images, LABELS, key, 3, smoothing, *alphas)
    weights = np.asarray(mixup.draw_weights(key, images.shape[1:3], *alphas, 1.0, 0.5), np.float64)
    expected, soft = loop(images, LABELS, weights, 3, smoothing)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(targets, soft, atol=1e-6)
    np.testing.assert_allclose(targets.sum(1), 1, atol=1e-6)
    assert np.abs(np.asarray(found) - images).max() > 0.01


def test_box_of_cutmix_is_timms():
    """`rand_bbox` of timm for given shares and centers: half sides rounded down, cut at the border, the share is what is left."""
    generator, (height, width) = np.random.default_rng(1), (20, 33)
    box = jax.jit(lambda share, row, column: mixup.outside_box((height, width), share, (row, column)))
    for _ in range(200):
        share, row, column = generator.random(), generator.integers(height), generator.integers(width)
        cut_h, cut_w = (int(side * np.sqrt(1 - share)) for side in (height, width))
        top, bottom = np.clip([row - cut_h // 2, row + cut_h // 2], 0, height)
        left, right = np.clip([column - cut_w // 2, column + cut_w // 2], 0, width)
        expected = np.ones((height, width))
        expected[top:bottom, left:right] = 0
        found = np.asarray(box(share, row, column))
        np.testing.assert_array_equal(found, expected)
        assert found.mean() == pytest.approx(1 - (bottom - top) * (right - left) / (height * width))


@pytest.mark.full
def test_shares_have_timms_distribution():
    """Quantiles of the share of the first image, and how often a batch is mixed by CutMix or not at all."""
    require_timm()
    from timm.data.mixup import Mixup

    np.random.seed(0)  # timm draws from NumPy's global generator
    draw = jax.jit(jax.vmap(lambda key: mixup.draw_weights(key, (32, 32), 0.8, 1.0, 0.75, 0.5)))
    weights = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    shares, cut = weights.mean((1, 2)), (weights.min((1, 2)) == 0) & (weights.max((1, 2)) == 1)
    theirs, boxes = Mixup(0.8, 1.0, prob=0.75, switch_prob=0.5, label_smoothing=0.0, num_classes=10), []
    import torch

    for _ in range(4000):
        x = torch.zeros(2, 1, 32, 32)
        x[0] = 1
        boxes.append(theirs(x, torch.zeros(2, dtype=torch.long))[0][0, 0].numpy())
    boxes = np.stack(boxes)
    for ours, other in ((shares, boxes.mean((1, 2))), (shares[cut], boxes[_cut(boxes)].mean((1, 2)))):
        for q in (10, 25, 50, 75):
            assert abs(np.percentile(ours, q) - np.percentile(other, q)) < 0.05
    assert abs((shares == 1).mean() - (boxes.mean((1, 2)) == 1).mean()) < 0.04
    assert abs(cut.mean() - _cut(boxes).mean()) < 0.03


def _cut(weights):
    return (weights.min((1, 2)) == 0) & (weights.max((1, 2)) == 1)


def test_targets_equal_timms():
    require_timm()
    import torch
    from timm.data.mixup import mixup_target

    theirs = mixup_target(torch.from_numpy(LABELS).long(), 5, 0.3, 0.1)
    np.testing.assert_allclose(mixup.soft_targets(LABELS, jnp.float32(0.3), 5, 0.1), theirs.numpy(), atol=1e-6)


def test_soft_cross_entropy_equals_pytorchs():
    torch = require_torch()
    generator = np.random.default_rng(0)
    logits, targets = generator.normal(size=(6, 5)).astype(np.float32), generator.dirichlet(np.ones(5), 6).astype(np.float32)
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(targets)).item()
    loss, logs = soft_cross_entropy(logits, targets)
    assert float(loss) == pytest.approx(expected, abs=1e-6)
    assert float(logs["accuracy"]) == pytest.approx((logits.argmax(1) == targets.argmax(1)).mean())


@pytest.mark.full
def test_smoothed_targets_without_mixing_are_label_smoothing():
    """Smoothing is in the targets, so the loss must not smooth again."""
    images, labels = batch(), LABELS
    same, targets = mixup.mix(images, labels, jax.random.key(0), 3, 0.1, p=0.0)
    np.testing.assert_array_equal(same, images)
    logits = np.random.default_rng(2).normal(size=(4, 3)).astype(np.float32)
    np.testing.assert_allclose(soft_cross_entropy(logits, targets)[0], cross_entropy(logits, labels, 0.1)[0], rtol=1e-6)


def test_mix_of_nothing_is_refused():
    with pytest.raises(UserError, match="mixup=0 and cutmix=0 mix nothing"):
        mixup.check_mix(0.0, 0.0)
