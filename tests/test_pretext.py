"""Rotation, relative patches and jigsaw puzzles: labels, losses against float64, what a network could cheat with, bad input."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eval_contexts import make_context, smooth

from ssl_jax.augment.permutations import permutation_set
from ssl_jax.augment.tiles import standardize
from ssl_jax.engine.method import State
from ssl_jax.engine.pretext import mosaic
from ssl_jax.errors import UserError
from ssl_jax.evals import run as evals
from ssl_jax.methods import build_method

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 48, 48, 3), np.uint8)
METHODS = {"rotation": 4, "relative_patch": 8, "jigsaw": 72}
every_method = pytest.mark.parametrize(("name", "answers"), METHODS.items())


def load(name, size=48, recipe="smoke", **changes):
    """(config, method) with a network that compiles at once: one layer on the views; recipe='' keeps that of the config."""
    config = importlib.import_module(f"configs.{name}").get_config("smoke")
    with config.unlocked():
        config.data.image_shape, config.dtype = (size, size, 3), "float32"
        if recipe == "smoke":
            config.model.encoder = dict(name="mlp", widths=(5,), batch_norm=False)
            config.model.embed = config.model.head = dict(widths=())
        config.update_from_flattened_dict(changes)
    return config, build_method(config)


def start(method, images=IMAGES):
    batch = {"image": jnp.asarray(images)}
    params, mutable = jax.jit(method.init)(jax.random.key(0), batch, {})
    return State(jnp.int32(0), params, {}, mutable, {}), batch


def with_random_classifier(state):
    """The classifier starts at zero; random weights tell the answers apart."""
    classifier = state.params["net"]["classifier"]
    kernel = jnp.asarray(np.random.default_rng(1).standard_normal(classifier["kernel"].shape), jnp.float32)
    return state._replace(params={"net": {**state.params["net"], "classifier": {**classifier, "kernel": kernel}}})


def plain(config):
    """The method without random crops, mirrored images, gray images and jitter."""
    with config.unlocked():
        config.views = ((),)
        if "jitter" in config.model:
            config.model.jitter = 0
    return build_method(config)


def call(method, function, state, images, key=0):
    """`fns.pretext` or `fns.draw_pretext`, as NumPy arrays."""
    batch = {"image": jnp.asarray(images)}
    out = jax.device_get(jax.jit(getattr(method.fns, function))(state.params, state.mutable, batch, jax.random.key(key)))
    return out[""] if function == "pretext" else out


def bound(method, state):
    """The functions of a pretext task with the weights of `state`, for `make_context`."""
    functions = {"pretext": method.fns.pretext, "draw_pretext": method.fns.draw_pretext}
    return {name: functools.partial(jax.jit(f), state.params, state.mutable) for name, f in functions.items()}


def loop(logits, answers):
    """(mean cross-entropy, share of right answers) of logits [B, Q, C] in float64, question after question."""
    losses, hits = [], []
    for row, answer in zip(logits.astype(np.float64).reshape(-1, logits.shape[-1]), answers.ravel(), strict=True):
        losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[answer])
        hits.append(row.argmax() == answer)
    return np.mean(losses), np.mean(hits)


@pytest.mark.parametrize("recipe", ["smoke", pytest.param("", marks=pytest.mark.full)])
@every_method
def test_loss_starts_at_the_logarithm_of_the_number_of_answers(name, answers, recipe):
    _, method = load(name, recipe=recipe)
    state, batch = start(method)
    value, (_, logs) = jax.jit(method.phases[0].loss)(state.params, state, batch, jax.random.key(1))
    np.testing.assert_allclose(value, np.log(answers), rtol=1e-6)
    np.testing.assert_allclose(logs["chance"], 1 / answers, rtol=1e-6)


@every_method
@pytest.mark.full
def test_loss_and_accuracy_equal_a_float64_loop_over_the_questions(name, answers):
    """A network without batch statistics answers in training as in inference, and a key always asks the same questions."""
    _, method = load(name)
    state, batch = start(method)
    state = with_random_classifier(state)
    loss, accuracy = loop(**call(method, "pretext", state, IMAGES, key=1))
    value, (_, logs) = jax.jit(method.phases[0].loss)(state.params, state, batch, jax.random.key(1))
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    np.testing.assert_allclose(logs["accuracy"], accuracy, rtol=1e-6)
    assert loss > 1.03 * np.log(answers)


@pytest.mark.parametrize("name", ["rotation", "relative_patch"])  # whose questions are not drawn at random
def test_evaluation_equals_a_float64_loop_beside_chance(name):
    config, _ = load(name)
    method = plain(config)
    state = with_random_classifier(start(method)[0])
    loss, accuracy = loop(**call(method, "pretext", state, IMAGES))
    found = evals.run({"own": {"kind": "pretext"}}, make_context(IMAGES, **bound(method, state)))["own"]
    expected = {"accuracy": 100 * accuracy, "chance": 100 / METHODS[name], "loss": loss, "loss_chance": np.log(METHODS[name])}
    assert {f"own/{key}": pytest.approx(value, rel=1e-5) for key, value in expected.items()} == found.metrics
    assert f"pretext {METHODS[name]} questions with {METHODS[name]} answers an image" in found.protocol


def test_rotation_answers_are_counterclockwise_quarter_turns():
    config, _ = load("rotation", 32)
    method, images = plain(config), IMAGES[:, :32, :32]
    views = np.asarray(method.views(jnp.asarray(images), jax.random.key(0)))
    answers = call(method, "pretext", start(method, images)[0], images)["answers"]
    for image, of_image, turns in zip(images, views, answers, strict=True):
        for view, turn in zip(of_image, turns, strict=True):
            np.testing.assert_allclose(view, np.rot90(image, turn) / 255, atol=1e-6)


@pytest.mark.parametrize("variant", ["", "smoke", "two", "cifar10_small", "cifar10_nin", "imagenet_alexnet", "imagenet_r50"])
@pytest.mark.full
def test_recipes_mirror_images_before_they_are_rotated(variant):
    """`config.views` run before the rotation; nothing runs after it, so the views of one image are rotations of one another."""
    config = importlib.import_module("configs.rotation").get_config(variant)
    assert ("flip", {"p": 0.5}) in [(name, dict(arguments)) for name, arguments in config.views[0]]
    if variant in ("smoke", "two"):
        config, method = load("rotation", **{"model.turns": tuple(config.model.turns)})
        views = np.asarray(method.views(jnp.asarray(IMAGES), jax.random.key(3)))
        for view, turns in enumerate(config.model.turns):
            np.testing.assert_array_equal(views[:, view], np.rot90(views[:, 0], turns, axes=(1, 2)))


def test_relative_patch_answers_are_directions_row_by_row():
    config, _ = load("relative_patch")
    method = plain(config)
    answers = call(method, "pretext", start(method)[0], IMAGES)["answers"]
    np.testing.assert_array_equal(answers, np.tile(np.arange(8), (len(IMAGES), 1)))
    views = method.views(jnp.asarray(IMAGES), jax.random.key(0))
    np.testing.assert_allclose(views[:, 1], IMAGES[:, 2:14, 18:30] / 255, atol=1e-6)  # answer 1: above the center


def test_relative_patch_head_reads_the_center_and_then_the_neighbor():
    config, _ = load("relative_patch")
    method = plain(config)
    state = with_random_classifier(start(method)[0])
    patches = method.views(jnp.asarray(IMAGES), jax.random.key(0))
    features = [np.asarray(method.encode(state.params, state.mutable, patches[:, i])["pooled"]) for i in range(9)]
    kernel = np.asarray(state.params["net"]["classifier"]["kernel"])
    for question, neighbor in enumerate((0, 1, 2, 3, 5, 6, 7, 8)):
        expected = np.concatenate([features[4], features[neighbor]], 1) @ kernel
        logits = call(method, "pretext", state, IMAGES)["logits"][:, question]
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_jigsaw_head_reads_the_tiles_in_the_order_of_the_permutation():
    config, _ = load("jigsaw")
    method, permutations = plain(config), permutation_set("affine")
    state = with_random_classifier(start(method)[0])
    out = call(method, "pretext", state, IMAGES, key=2)
    tiles = method.views(jnp.asarray(IMAGES), jax.random.key(2))
    features = np.stack([np.asarray(method.encode(state.params, state.mutable, tiles[:, i])["pooled"]) for i in range(9)], 1)
    kernel = np.asarray(state.params["net"]["classifier"]["kernel"])
    assert len(np.unique(out["answers"])) > 10
    for image, (answers, logits) in enumerate(zip(out["answers"], out["logits"], strict=True)):
        for answer, row in zip(answers, logits, strict=True):
            slots = np.concatenate([features[image, permutations[answer][slot]] for slot in range(9)])
            np.testing.assert_allclose(row, slots @ kernel, rtol=1e-4, atol=1e-4)


@every_method
def test_pictures_show_the_question_and_the_given_answer(name, answers):
    config, _ = load(name, 32 if name == "rotation" else 48)
    method = plain(config)
    images = IMAGES[:, : config.data.image_shape[0], : config.data.image_shape[1]]
    drawn = call(method, "draw_pretext", start(method, images)[0], images)
    asked, given, right = *drawn["pictures"].swapaxes(0, 1), drawn["right"]
    if name == "rotation":  # the classifier at zero answers 0: not rotated
        np.testing.assert_allclose(given, asked, atol=1e-6)
        np.testing.assert_array_equal(right, np.arange(6) % 4 == 0)
    if name == "relative_patch":
        np.testing.assert_array_equal(right, np.arange(6) % 8 == 0)
        np.testing.assert_allclose(asked[right], given[right], atol=1e-6)
        assert np.abs(asked - given)[~right].max(axis=(1, 2, 3)).min() > 0.1
        np.testing.assert_allclose(given[:, :12, :12], asked[np.arange(6)[:, None, None], *corner(np.arange(6))], atol=1e-6)
    if name == "jigsaw":  # answer 0 is the solved puzzle
        np.testing.assert_allclose(given, asked, atol=1e-6)


def test_a_jigsaw_picture_is_solved_by_the_right_answer():
    """Two permutations, so that a random classifier is right for some of the puzzles."""
    config, _ = load("jigsaw", **{"model.permutations.kind": "min", "model.permutations.count": 2})
    method = plain(config)
    drawn = call(method, "draw_pretext", with_random_classifier(start(method)[0]), IMAGES)
    whole = np.asarray(mosaic(method.views(jnp.asarray(IMAGES), jax.random.key(0))))
    assert 0 < drawn["right"].sum() < len(IMAGES)
    for image, solved, right in zip(whole, drawn["pictures"][:, 1], drawn["right"], strict=True):
        assert np.allclose(solved, image, atol=1e-6) == right


def corner(directions):
    """Index arrays of the patch in each direction in a picture of 3 x 3 tiles with 12 pixels and a line."""
    place = np.array([0, 1, 2, 3, 5, 6, 7, 8])[directions]
    rows, columns = (13 * x[:, None] + np.arange(12) for x in np.divmod(place, 3))
    return rows[:, :, None].reshape(-1, 12, 1), columns[:, None, :].reshape(-1, 1, 12)


def test_a_mosaic_has_the_tiles_row_by_row_with_gray_lines():
    tiles = np.random.default_rng(0).random((2, 4, 3, 5, 3)).astype(np.float32)
    picture = np.asarray(mosaic(jnp.asarray(tiles)))
    assert picture.shape == (2, 8, 12, 3)
    np.testing.assert_array_equal(picture[:, 4:7, :5], tiles[:, 2])
    np.testing.assert_array_equal(picture[:, 3], 0.5)


def test_encoders_of_tiles_standardize_each_image():
    _, method = load("jigsaw")
    state = start(method)[0]
    brighter = (IMAGES // 2 + 100).astype(np.uint8)
    ours, theirs = (method.encode(state.params, state.mutable, x[:, :12, :12])["pooled"] for x in (IMAGES // 2, brighter))
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    assert np.isfinite(standardize(jnp.zeros((1, 4, 4, 3)))).all()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("rotation", {"data.image_shape": (48, 32, 3), "views": ((),)}, "rotations need square images, not 48 x 32"),
        ("rotation", {"model.turns": (0, 0)}, "give two to four different numbers of quarter turns"),
        ("rotation", {"views": ((), ())}, "asks about one view of an image; config.views has 2"),
        ("rotation", {"model.layer": "layer9"}, "config.model.layer='layer9' does not exist; the encoder has layer1, pooled"),
        ("relative_patch", {"model.tile": 16}, "tiles of 16 pixels with a jitter of 2 do not fit images of 48 x 48"),
        ("relative_patch", {"model.grid": 4}, "a patch has eight neighbors on a grid of 3"),
        ("jigsaw", {"model.tile": 20}, "do not fit"),
        ("jigsaw", {"model.permutations.kind": "hamming"}, "unknown permutation set 'hamming'; choose from average, min"),
        ("jigsaw", {"model.permutations.count": 100}, "has 72 permutations, not 100"),
    ],
)
def test_bad_input_is_one_line(name, changes, message):
    with pytest.raises(UserError) as error:  # noqa: PT012 from `build`, or from tracing `init`
        config, method = load(name, **changes)
        jax.eval_shape(method.init, jax.random.key(0), {"image": jax.ShapeDtypeStruct((4, *config.data.image_shape), "uint8")}, {})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_picture_of_the_evaluation_has_a_frame_for_each_answer():
    config, _ = load("rotation", 12)
    method = plain(config)
    images = smooth(0, 25)
    state = start(method, images)[0]
    picture = evals.run({"own": {"kind": "pretext"}}, make_context(images, **bound(method, state)))["own"].picture
    assert picture.shape == (2 + 4 * 18, 2 + 10 * 18, 3)
    frames = picture[[20 + 1, 56 + 1]][:, 2 + 18 * np.arange(10)]  # of the answers of both rows
    green = (frames == (38, 140, 70)).all(-1).ravel()
    np.testing.assert_array_equal(green, np.arange(20) % 16 % 4 == 0)  # batches of 16: image i of a batch is asked question i mod 4


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_white_noise_stays_at_chance(name):
    """Fresh white noise in each step has no answer. Anything above chance would be a leak of views, batch statistics or keys."""
    import optax

    config, method = load(name, recipe="")
    if name == "jigsaw":
        with config.unlocked():
            config.model.permutations = dict(kind="min", count=9)
        method = build_method(config)
    rng = np.random.default_rng(0)
    state, _ = start(method, rng.integers(0, 256, (32, 48, 48, 3), np.uint8))
    optimizer = optax.adam(2e-3)

    @jax.jit
    def step(params, mutable, opt, images, key):
        def loss(params):
            return method.phases[0].loss(params, state._replace(params=params, mutable=mutable), {"image": images}, key)

        (value, (mutable, logs)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt = optimizer.update(gradient, opt)
        return optax.apply_updates(params, updates), mutable, opt, logs["accuracy"], value

    params, mutable, opt, found = state.params, state.mutable, optimizer.init(state.params), []
    for i in range(200):
        images = rng.integers(0, 256, (32, 48, 48, 3), np.uint8)
        params, mutable, opt, accuracy, _ = step(params, mutable, opt, images, jax.random.key(i))
        found.append(float(accuracy))
    chance = 1 / (9 if name == "jigsaw" else METHODS[name])
    questions = 100 * 32 * {"rotation": 4, "relative_patch": 8, "jigsaw": 4}[name]
    assert abs(np.mean(found[100:]) - chance) < 4 * np.sqrt(chance * (1 - chance) / questions)
