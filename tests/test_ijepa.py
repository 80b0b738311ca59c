"""I-JEPA: blocks and context, targets, what gets a gradient, predictions by position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_siamese import begin, load, loss_of

from ssl_jax.augment.patches import blocks, context
from ssl_jax.errors import UserError
from ssl_jax.methods import build_method, ijepa
from ssl_jax.models.backbones.vit import ViT
from ssl_jax.models.jepa import JEPAPredictor

A = np.sin(1 + 8 * np.arange(4)[:, None] + np.arange(8))
B = np.cos(2 + 0.5 * (8 * np.arange(4)[:, None] + np.arange(8)))


def draw(count, grid=(8, 8), target=(3, 3), around=(8, 8), kept=16, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    targets = blocks(keys[0], count, 4, target, grid)
    block = blocks(keys[1], count, 1, around, grid)[:, 0]
    return np.asarray(context(keys[2], block, targets, kept, grid[0] * grid[1])), np.asarray(targets)


def test_context_and_targets_never_meet_and_blocks_are_blocks():
    seen, targets = draw(500)
    for c, t in zip(seen, targets, strict=True):
        assert len(set(c)) == 16 and not set(c) & set(t.ravel()) and (np.diff(c) > 0).all()
        for block in t:
            rows, columns = np.divmod(block, 8)
            assert len(set(block)) == 9 and np.ptp(rows) == np.ptp(columns) == 2


def test_every_patch_can_be_target_and_context():
    """The official sampler never reaches the last row and column."""
    seen, targets = draw(10_000, around=(7, 7), kept=13)
    assert np.bincount(targets.ravel(), minlength=64).min() > 0
    assert np.bincount(seen.ravel(), minlength=64).min() > 0


def test_loss_has_its_golden_values():
    assert ijepa.smooth_l1(A - ijepa.normalized(B)).mean() == pytest.approx(0.5600574892671555, rel=1e-5)
    assert ijepa.smooth_l1(jnp.asarray(ijepa.normalized(B))).mean() == pytest.approx(0.46364614588, rel=1e-5)
    assert ijepa.smooth_l1(jax.random.normal(jax.random.key(0), (400_000,))).mean() == pytest.approx(0.4246602, abs=2e-3)
    found = ijepa.normalized(jax.random.normal(jax.random.key(1), (5, 64)) * 3 + 2)
    np.testing.assert_allclose((found.mean(-1), found.var(-1)), ([0] * 5, [1] * 5), atol=1e-4)


def test_encoder_sees_visible_patches_only():
    vit = ViT("mu/8", pool="gap", position="sincos2d")
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    variables = vit.init(jax.random.key(1), images)
    visible = jnp.array([[0, 5, 6], [1, 2, 15]])
    found = vit.apply(variables, images, visible=visible)
    other = images.at[0, 8:, :8].set(9.0).at[1, :8, :8].set(9.0)  # patches 4, 8, 12 of the first, and 0 of the second
    np.testing.assert_array_equal(vit.apply(variables, other, visible=visible)["tokens"], found["tokens"])
    assert found["tokens"].shape == (2, 3, 32) and "patches" not in found
    everything = vit.apply(variables, images, visible=jnp.tile(jnp.arange(16), (2, 1)))
    np.testing.assert_allclose(everything["tokens"], vit.apply(variables, images)["tokens"], rtol=1e-5, atol=1e-6)


def test_predictions_follow_positions():
    predictor = JEPAPredictor((4, 4), 5, width=16, depth=1, heads=2)
    codes, places = jax.random.normal(jax.random.key(0), (2, 3, 8)), jnp.array([[0, 1, 2], [3, 4, 5]])
    targets = jnp.array([[[6, 7], [10, 11]], [[8, 9], [12, 13]]])
    variables = predictor.init(jax.random.key(1), codes, places, targets)
    found = predictor.apply(variables, codes, places, targets)
    assert found.shape == (2, 2, 2, 5)
    swapped = predictor.apply(variables, codes, places, targets[:, :, ::-1])
    np.testing.assert_allclose(swapped, found[:, :, ::-1], rtol=1e-4, atol=1e-5)
    alone = predictor.apply(variables, codes, places, targets[:, 1:])
    np.testing.assert_allclose(alone, found[:, 1:], rtol=1e-4, atol=1e-5)  # blocks do not see each other
    assert np.abs(found[:, 0, 0] - found[:, 0, 1]).max() > 1e-3


@pytest.mark.full
def test_teacher_has_no_gradient_and_an_untrained_network_knows_nothing():
    method, state = begin("ijepa.py:smoke")

    def of_teacher(net):
        return loss_of(method, state._replace(mutable={"teacher": {"net": net}}))[0]

    assert not any(np.any(x) for x in jax.tree.leaves(jax.jit(jax.grad(of_teacher))(state.mutable["teacher"]["net"])))
    value, (_, logs) = jax.jit(lambda state: loss_of(method, state))(state)
    assert value > 0.4 and logs["target_std"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.model.kept=30"], "kept=30: only 20 patches are surely left outside the targets"),
        (["--config.model.target_size=(7,2)"], r"target_size=\(7, 2\) does not fit into 6 x 6 patches"),
        (["--config.model.encoder.name=resnet"], "I-JEPA hides patches; give 'vit'"),
        (["--config.model.momentum_schedule=step"], "momentum_schedule='step' is unknown; choose cosine, linear, constant"),
    ],
)
def test_bad_configs_are_one_line(overrides, message):
    with pytest.raises(UserError, match=message):
        build_method(load("ijepa.py:smoke", *overrides))
