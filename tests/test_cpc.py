"""Contrastive predictive coding: what each prediction may read, the loss against float64 loops, no leak, learning, bad input."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from launch import main
from ssl_jax.augment.tiles import join_patches
from ssl_jax.engine.method import State
from ssl_jax.engine.pretext import mosaic
from ssl_jax.errors import UserError
from ssl_jax.methods import build_method
from ssl_jax.methods.cpc import TURNS, places
from ssl_jax.models.cpc import ContextNet
from ssl_jax.objectives.contrastive import patch_info_nce

STEPS = {"down": (1, 0), "up": (-1, 0), "right": (0, 1), "left": (0, -1)}  # (row, column) from a context to what it predicts
GRID, PATCH = 5, 4
SMALL = dict(name="resnet_v2", depth=10, width=0.125, stem="cifar", groups=2, norm="layer", last_norm=False)


def load(variant="smoke", size=GRID * PATCH, **changes):
    """The config with patches that do not overlap, a small network, and views that are the images."""
    config = importlib.import_module("configs.cpc").get_config(variant)
    with config.unlocked():
        config.data.image_shape, config.dtype = (size, size, 3), "float32"
        if variant == "smoke":
            config.views = ((),)
            config.model.update(dict(patch=PATCH, stride=PATCH, patch_operations=(), directions=("down",), offsets=(1,)))
            config.model.encoder = SMALL
            config.model.context = dict(channels=16, blocks=1)
        config.update_from_flattened_dict(changes)
    return config


def pictures(count=4, seed=0, size=GRID * PATCH):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def start(config, images, predicting=True):
    """(method, state); with `predicting` the maps W_k, which start at zero, are random."""
    method = build_method(config)
    params, mutable = jax.jit(method.init)(jax.random.key(0), {"image": jnp.asarray(images)}, {})
    for number, direction in enumerate(config.model.directions if predicting else ()):
        kernel = params["net"][direction]["ahead"]["kernel"]
        params["net"][direction]["ahead"]["kernel"] = jax.random.normal(jax.random.key(7 + number), kernel.shape)
    return method, State(jnp.int32(0), params, {}, mutable, {})


def answer(method, state, images):
    batch = {"image": jnp.asarray(images)}
    return jax.device_get(jax.jit(method.fns.pretext)(state.params, state.mutable, batch, jax.random.key(0)))[""]


def first_loss(method, state, images):
    value, (_, logs) = jax.jit(method.phases[0].loss)(state.params, state, {"image": jnp.asarray(images)}, jax.random.key(1))
    return float(value), logs


# --- the objective


def loop(predictions, targets):
    """(mean loss, share of hits), prediction after prediction in float64."""
    offset, keys = targets.shape[1] - predictions.shape[1], targets.astype(np.float64).reshape(-1, targets.shape[-1])
    losses, hits = [], []
    for image, row, column in np.ndindex(predictions.shape[:3]):
        scores = keys @ predictions[image, row, column].astype(np.float64)
        place = (image * targets.shape[1] + row + offset) * targets.shape[2] + column
        losses.append(np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[place])
        hits.append(scores.argmax() == place)
    return np.mean(losses), np.mean(hits)


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_patch_info_nce_equals_a_float64_loop(offset):
    rng = np.random.default_rng(offset)
    targets = rng.standard_normal((3, 4, 5, 6)).astype(np.float32)
    predictions = (targets[:, offset:] + rng.standard_normal((3, 4 - offset, 5, 6))).astype(np.float32)
    loss, logs = jax.jit(patch_info_nce)(predictions, targets)
    expected, accuracy = loop(predictions, targets)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(logs["accuracy"], accuracy, rtol=1e-6)
    assert 0 < accuracy < 1


@pytest.mark.full
def test_each_prediction_means_the_patch_offset_rows_below():
    """Places of a batch of 2 with 4 x 3 patches, two rows ahead: 6 to 11 and 18 to 23."""
    targets = jnp.eye(24).reshape(2, 4, 3, 24)
    predictions = 100 * jnp.eye(24)[jnp.array([*range(6, 12), *range(18, 24)])].reshape(2, 2, 3, 24)
    loss, logs = patch_info_nce(predictions, targets)
    assert float(loss) == pytest.approx(0, abs=1e-6) and logs["accuracy"] == 1
    assert patch_info_nce(predictions[::-1], targets)[1]["accuracy"] == 0


@pytest.mark.full
def test_every_patch_of_the_batch_is_a_negative():
    """The gradient reaches all targets, also those of rows that are never predicted, and of other images."""
    targets = jax.random.normal(jax.random.key(0), (2, 4, 3, 5))
    predictions = jax.random.normal(jax.random.key(1), (2, 1, 3, 5))
    gradient = jax.grad(lambda z: patch_info_nce(predictions[:1], z[:1])[0])(targets)
    assert np.all(np.abs(gradient[0]).max(-1) > 0) and not np.any(gradient[1])
    gradient = jax.grad(lambda z: patch_info_nce(predictions, z)[0])(targets)
    assert np.all(np.abs(gradient).max(-1) > 0)


@pytest.mark.full
def test_predictions_of_zero_have_the_loss_of_guessing():
    loss, logs = patch_info_nce(jnp.zeros((16, 3, 6, 4)), jax.random.normal(jax.random.key(0), (16, 6, 6, 4)))
    assert float(loss) == pytest.approx(6.3561, abs=1e-4) == pytest.approx(np.log(16 * 36), abs=1e-4)
    assert logs["accuracy"] == 0


# --- the method


@pytest.mark.parametrize("direction", ["down", "left", "up", "right"])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.full
def test_a_prediction_reads_only_its_context(direction, blocks):
    """One patch after another is changed, and each score is compared. A score depends on the patch that it is about, and on the
    patches that the context of the prediction may read: none ahead of its row, as many rows behind it and columns beside it as there
    are blocks. All other scores stay the same to the last bit.
    """
    offsets, step = (1, 2), np.array(STEPS[direction])
    config = load(**{"model.directions": (direction,), "model.offsets": offsets, "model.context.blocks": blocks})
    image = pictures(1)[0]
    changed = np.repeat(image[None], 1 + GRID**2, 0)
    for place, (row, column) in enumerate(np.ndindex(GRID, GRID), 1):
        top, left = row * PATCH, column * PATCH
        changed[place, top : top + PATCH, left : left + PATCH] = pictures(1, 1 + place)[0, :PATCH, :PATCH]
    found = answer(*start(config, changed), changed)
    depends = found["logits"][1:] != found["logits"][0]  # [patch, question, patch it is about]
    cells = np.array(list(np.ndindex(GRID, GRID)))
    offset_of = np.repeat(offsets, [(GRID - k) * GRID for k in offsets])
    for question, (place, offset) in enumerate(zip(found["answers"][0], offset_of, strict=True)):
        away = cells[place] - offset * step - cells  # from each patch to the context
        behind, beside = away @ step, np.abs(away @ step[::-1])
        read = (behind >= 0) & (behind <= blocks) & (beside <= blocks)
        about_itself = np.eye(GRID**2, dtype=bool)
        assert not (depends[:, question] & ~(read[:, None] | about_itself)).any()
        assert depends[:, question][about_itself].all()
        # A small change may be lost in the rounding of one score, but not of all.
        np.testing.assert_array_equal((depends[:, question] & ~about_itself).any(1), read)


@pytest.mark.full
def test_loss_starts_at_the_logarithm_of_the_number_of_patches():
    config = load(**{"model.directions": tuple(TURNS), "model.offsets": (2, 3)})
    loss, logs = first_loss(*start(config, pictures(), predicting=False), pictures())
    np.testing.assert_allclose(loss, np.log(4 * GRID**2), rtol=1e-6)
    np.testing.assert_allclose(logs["chance"], 1 / (4 * GRID**2), rtol=1e-6)


@pytest.mark.parametrize("target_dim", [0, 8])
@pytest.mark.full
def test_loss_of_one_image_equals_a_loop_over_its_questions(target_dim):
    """Candidates are then the patches of this image, as in the evaluation. Directions and offsets weigh the same."""
    offsets = (1, 3)
    config = load(**{"model.directions": ("down", "left"), "model.offsets": offsets, "model.target_dim": target_dim})
    method, state = start(config, pictures(1))
    found = answer(method, state, pictures(1))
    logits = found["logits"][0].astype(np.float64)
    own, most = logits[np.arange(len(logits)), found["answers"][0]], logits.max(1)
    losses = np.log(np.exp(logits - most[:, None]).sum(1)) + most - own
    ends = np.cumsum([(GRID - k) * GRID for k in offsets * 2])
    assert ends[-1] == len(losses)
    loss, logs = first_loss(method, state, pictures(1))
    np.testing.assert_allclose(loss, np.mean([part.mean() for part in np.split(losses, ends[:-1])]), rtol=1e-5)
    hits = logits.argmax(1) == found["answers"][0]
    np.testing.assert_allclose(logs["accuracy"], np.mean([part.mean() for part in np.split(hits, ends[:-1])]), rtol=1e-5)


@pytest.mark.full
def test_training_loss_of_a_batch_equals_a_loop_over_latents_of_single_images():
    """Each image is encoded alone and in inference mode, so nothing but the negatives comes from other images."""
    config = load(**{"model.offsets": (1, 2), "model.embedding_scale": 0.5})
    method, state = start(config, pictures())
    alone = [jax.jit(method.encode)(state.params, state.mutable, pictures()[i : i + 1])["latents"] for i in range(4)]
    z, part = np.concatenate(alone), state.params["net"]["down"]
    contexts = np.asarray(ContextNet(16, 1).apply({"params": part["context"]}, jnp.asarray(z)), np.float64)
    targets, predictions = (
        x.astype(np.float64) @ np.asarray(part[name]["kernel"], np.float64) + np.asarray(part[name]["bias"])
        for name, x in (("project", z), ("ahead", contexts))
    )
    width = config.model.target_dim
    found = [loop(0.5 * predictions[:, :-k, :, i * width : (i + 1) * width], targets) for i, k in enumerate((1, 2))]
    loss, logs = first_loss(method, state, pictures())
    np.testing.assert_allclose((loss, logs["accuracy"]), np.mean(found, 0), rtol=1e-5)


@pytest.mark.full
def test_another_image_changes_the_negatives_and_nothing_else():
    """Without batch statistics the latents, contexts and scores of an image are its own; the loss compares with all images."""
    first, second = pictures(2), np.concatenate([pictures(1), pictures(1, 5)])
    method, state = start(load(), first)
    np.testing.assert_array_equal(answer(method, state, first)["logits"][0], answer(method, state, second)["logits"][0])
    assert abs(first_loss(method, state, first)[0] - first_loss(method, state, second)[0]) > 1e-3


LARGEST = pytest.param("imagenet_r161", marks=pytest.mark.full)


@pytest.mark.full
@pytest.mark.parametrize("variant", ["", "smoke", "cifar10_small", "imagenet_v1", "imagenet_r50", LARGEST])
def test_no_recipe_has_batch_statistics(variant):
    """Through which the patches of a batch would tell about each other."""
    size = {"": 48, "smoke": 48, "cifar10_small": 32, "imagenet_v1": 256}.get(variant, 260)
    config = importlib.import_module("configs.cpc").get_config(variant)
    with config.unlocked():
        config.data.image_shape, config.dtype = (size, size, 3), "float32"
    method = build_method(config)
    _, mutable = jax.eval_shape(method.init, jax.random.key(0), {"image": method.inputs["image"].batch(2)}, {})
    assert mutable == {"batch_stats": {"encoder": {}}}


@pytest.mark.full
def test_it_learns_stripes():
    """Upright stripes: the patches of a column are equal, and columns and images differ."""
    images = np.repeat(pictures(16)[:, :1], GRID * PATCH, 1)
    method, state = start(load(**{"model.offsets": (2, 3)}), images, predicting=False)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, opt, key):
        def loss(params):
            return method.phases[0].loss(params, state, {"image": images}, key)

        (value, (_, logs)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt = optimizer.update(gradient, opt)
        return optax.apply_updates(params, updates), opt, value, logs["accuracy"]

    params, opt, losses = state.params, optimizer.init(state.params), []
    for number in range(80):
        params, opt, value, _ = step(params, opt, jax.random.key(number))
        losses.append(float(value))
    assert losses[0] == pytest.approx(np.log(16 * GRID**2), rel=1e-5)
    assert losses[-1] < np.log(GRID) + 0.7, "ln 5 is best: the five patches of a column are equal"


@pytest.mark.full
def test_features_are_those_of_the_patches():
    method, state = start(load(), pictures())
    encode = jax.jit(lambda images: method.encode(state.params, state.mutable, images))
    whole, corner = encode(pictures()), encode(pictures()[:, PATCH : 2 * PATCH, :PATCH])  # a patch is an image, too
    np.testing.assert_allclose(whole["latents"][:, 1, 0], corner["pooled"], atol=1e-5)
    np.testing.assert_allclose(whole["pooled"], whole["latents"].mean((1, 2)), atol=1e-5)
    np.testing.assert_allclose(whole["layer1"][:, PATCH : 2 * PATCH, :PATCH], corner["layer1"], atol=1e-5)
    assert whole["layer2"].shape[1:3] == (GRID * PATCH // 2,) * 2
    tokens = np.arange(2 * 2 * 3 * 4 * 5).reshape(2, 2, 3, 4, 5)
    np.testing.assert_array_equal(join_patches(jnp.asarray(tokens)), tokens.reshape(2, 24, 5))


def test_answers_are_places_of_the_grid_that_is_not_turned():
    found = {direction: places((4, 3), (direction,), (2,)) for direction in TURNS}
    assert {name: sorted(answers) for name, (answers, _) in found.items()} == {
        "down": list(range(6, 12)), "up": list(range(6)), "right": [2, 5, 8, 11], "left": [0, 3, 6, 9],
    }  # fmt: skip
    answers, seen = found["down"]
    np.testing.assert_array_equal(answers, range(6, 12))
    np.testing.assert_array_equal([np.flatnonzero(row).max() for row in seen], [2, 2, 2, 5, 5, 5])
    for answers, seen in found.values():
        assert not seen[np.arange(len(answers)), answers].any()


@pytest.mark.full
def test_pictures_show_what_a_context_may_read_and_all_scores():
    config = load(**{"model.offsets": (2,)})
    method, state = start(config, pictures())
    drawn = jax.device_get(jax.jit(method.fns.draw_pretext)(state.params, state.mutable, {"image": pictures()}, jax.random.key(0)))
    found = answer(method, state, pictures())
    which = 11 * np.arange(4) % (3 * GRID)
    right = found["logits"][np.arange(4), which].argmax(1) == found["answers"][0, which]
    np.testing.assert_array_equal(drawn["right"], right)
    cut = np.asarray(method.views(jnp.asarray(pictures()), jax.random.key(0)))
    image, rows = 1, PATCH + 1  # question 11 has its context in row 2
    picture = np.asarray(mosaic(jnp.asarray(cut)))
    np.testing.assert_allclose(drawn["pictures"][image, 0, : 3 * rows], picture[image, : 3 * rows], atol=1e-6)
    below = drawn["pictures"][image, 0, 3 * rows : 4 * rows - 1].reshape(PATCH, GRID, rows, 3)[:, :, :-1]
    np.testing.assert_allclose(below, 0.9, atol=1e-6)
    place = found["answers"][0, 11]
    top, left = place // GRID * rows, place % GRID * rows
    assert np.allclose(drawn["pictures"][image, :, top, left : left + PATCH], (1.0, 0.55, 0.0))


@pytest.mark.full
def test_sample_draws_questions_and_answers(tmp_path):
    only = "--config.evals={'pretext': {'kind': 'pretext'}}"
    flags = [only, "--config.best_metric=", "--config.total=1 step", "--config.baselines=()"]
    assert main(["train", "--config=configs/cpc.py:smoke", f"--workdir={tmp_path}", *flags]) == 0
    assert main(["sample", f"--workdir={tmp_path}"]) == 0
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["pretext.png"]
    assert np.asarray(Image.open(tmp_path / "samples" / "pretext.png")).std() > 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.patch": 64}, "patches of 64 pixels with stride 4 do not fit images of 20 x 20 pixels"),
        ({"model.offsets": (2, 5)}, "config.model.offsets=(2, 5) reach beyond the grid of 5 x 5 patches; give offsets of at most 4"),
        ({"model.patch": 20}, "config.model.offsets=(1,) reach beyond the grid of 1 x 1 patches; use larger views, smaller"),
        ({"model.offsets": (2, 2)}, "config.model.offsets=(2, 2): give numbers of rows, each at most once"),
        ({"model.directions": ("down", "back")}, "choose from down, left, up, right, each at most once"),
        ({"model.directions": ("up", "up")}, "config.model.directions=('up', 'up'): choose from"),
        ({"model.patch_operations": (("random_crop", dict(size=3)),)}, "end in ('random_crop', dict(size=4))"),
        ({"model.patch_operations": (("blurr", {}),)}, "unknown operation 'blurr'"),
        ({"model.context.blocks": 0}, "context network with channels=16, blocks=0 is empty"),
        ({"views": ((), ())}, "asks about one view of an image; config.views has 2"),
    ],
)
def test_bad_input_is_one_line(changes, message):
    with pytest.raises(UserError) as error:
        build_method(load(**changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_offsets_to_the_side_are_bounded_by_the_columns():
    config = load(**{"data.image_shape": (20, 12, 3), "model.offsets": (3,)})
    build_method(config)
    with config.unlocked():
        config.model.directions = ("down", "right")
    with pytest.raises(UserError, match="the grid of 5 x 3 patches; give offsets of at most 2"):
        build_method(config)


def test_images_need_not_be_square():
    images = pictures(2)[:, :, :12]
    config = load(**{"data.image_shape": (20, 12, 3), "model.directions": ("down", "left"), "model.offsets": (1, 2)})
    method = build_method(config)
    params, mutable = jax.eval_shape(method.init, jax.random.key(0), {"image": images}, {})
    asked, drawn = (
        jax.eval_shape(function, params, mutable, {"image": images}, jax.random.key(0))
        for function in (method.fns.pretext, method.fns.draw_pretext)
    )
    assert asked[""]["logits"].shape == (2, 4 * 3 + 3 * 3 + 2 * 5 + 1 * 5, 15)
    assert drawn["pictures"].shape == (2, 2, 25, 15, 3)
