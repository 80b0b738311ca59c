"""iBOT and DINOv2: the loss of masked patches, masks, heads, gradients of teacher and center."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_siamese import begin, load, loss_of
from torch_reference import require_lightly, require_torch

from ssl_jax.errors import UserError
from ssl_jax.methods import build_method
from ssl_jax.models.backbones.vit import ViT
from ssl_jax.objectives.prototypes import masked_cross_entropy

A = np.sin(1 + 8 * np.arange(4)[:, None] + np.arange(8))
B = np.cos(2 + 0.5 * (8 * np.arange(4)[:, None] + np.arange(8)))


def test_loss_of_patches_is_a_mean_for_each_image_first():
    """Image 0 owns three patches, image 1 one; the fourth place of each is not masked."""
    teacher, student = (np.stack([[x[0], x[1], x[2], x[0]], [x[3], x[0], x[1], x[2]]]) for x in (A, B))
    weights = np.array([[1, 1, 1, 0], [1, 0, 0, 0]])
    value = masked_cross_entropy(jax.nn.softmax(teacher / 0.07), student / 0.1, weights)
    assert value == pytest.approx(9.199432996839692, rel=1e-5)  # the mean over all masked patches would be 8.851656596368018
    nothing = masked_cross_entropy(jax.nn.softmax(teacher), student, 0 * weights)
    assert nothing == 0


@pytest.mark.full
def test_loss_of_patches_equals_lightly():
    lightly, torch = require_lightly(), require_torch()
    rng = np.random.default_rng(0)
    teacher, student = rng.standard_normal((2, 2, 5, 9))
    mask = rng.random((2, 5)) < 0.6
    loss = lightly.IBOTPatchLoss(output_dim=9, teacher_temp=0.07, student_temp=0.1)
    of_masked = dict(teacher_out=torch.tensor(teacher[mask]), student_out=torch.tensor(student[mask]))
    theirs = loss(**of_masked, mask=torch.tensor(mask[..., None]), teacher_temp=0.07).item()
    ours = masked_cross_entropy(jax.nn.softmax(teacher / 0.07), student / 0.1, mask)
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_masked_patches_are_replaced_before_positions():
    vit = ViT("mu/8", pool="cls")
    images, masked = jax.random.normal(jax.random.key(0), (2, 16, 16, 3)), jnp.array([[True, False, False, False], [False] * 4])
    variables = vit.init(jax.random.key(1), images, masked=masked)
    found = vit.apply(variables, images, masked=masked)["tokens"]
    other = vit.apply(variables, images.at[0, :8, :8].set(7.0), masked=masked)["tokens"]
    np.testing.assert_array_equal(found, other)
    np.testing.assert_allclose(found[1], vit.apply(variables, images)["tokens"][1], rtol=1e-5, atol=1e-6)
    assert "mask_token" not in vit.init(jax.random.key(1), images)["params"]


@pytest.mark.full
@pytest.mark.parametrize("name", ["ibot.py:smoke", "ibot.py:smoke_v2"])
def test_teacher_has_no_gradient_and_heads_are_shared_or_not(name):
    method, state = begin(name)

    def of_teacher(net):
        return loss_of(method, state._replace(mutable={**state.mutable, "teacher": {"net": net}}))[0]

    assert not any(np.any(x) for x in jax.tree.leaves(jax.jit(jax.grad(of_teacher))(state.mutable["teacher"]["net"])))
    assert ("patch_head" in state.params["net"]) == name.endswith("v2")
    value, (update, logs) = jax.jit(lambda state: loss_of(method, state))(state)
    moved = [np.abs(update["center"][part]).max() > 0 for part in ("image", "patch")]
    assert moved == [not name.endswith("v2")] * 2 and np.isfinite(value)
    assert logs["patch"] < np.log(24) + 1  # half of the views have masks
    assert ("koleo" in logs) == name.endswith("v2")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.model.encoder.pool=gap"], "give name='vit' and pool='cls'"),
        (["--config.model.centering=mean"], "centering='mean' is unknown; choose softmax or sinkhorn"),
        (["--config.views=((),)"], "the first group of config.views has 1; give two or more"),
    ],
)
def test_bad_configs_are_one_line(overrides, message):
    with pytest.raises(UserError, match=message):
        build_method(load("ibot.py:smoke", *overrides))
