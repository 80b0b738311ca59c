"""Segmentation: loss, heads and measures against oracles, what is refused, and exports."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from eval_contexts import make_context
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, jaccard_score

from launch import main
from ssl_jax import load
from ssl_jax.augment.views import in_place_view
from ssl_jax.engine.checkpoint import Checkpoints, write_json
from ssl_jax.engine.method import Spec, inference_state
from ssl_jax.engine.sharding import make_mesh
from ssl_jax.errors import UserError
from ssl_jax.evals import run as evals
from ssl_jax.evals.kinds import segmentation, segmentation_linear
from ssl_jax.evals.lib import confusion
from ssl_jax.experiment import config as configs
from ssl_jax.experiment.build import build_experiment
from ssl_jax.experiment.possible import check_examples, checked
from ssl_jax.export import folder, formats
from ssl_jax.export import source as source_module
from ssl_jax.methods import segmentation as method
from ssl_jax.methods.segmentation import wrong_ids
from ssl_jax.models.common import create, run
from ssl_jax.models.tasks.segmentation import build_head, side_by_side, upsample
from ssl_jax.objectives.classification import pixel_cross_entropy

ROOT = pathlib.Path(__file__).parent.parent
RANDOM = np.random.default_rng(0)


# --- the loss


def loop(logits, labels, ignore):
    """(loss, accuracy, valid share) in float64, pixel by pixel."""
    total, right, count = 0.0, 0, 0
    for x, label in zip(logits.reshape(-1, logits.shape[-1]).astype(np.float64), labels.ravel().tolist(), strict=True):
        if label == ignore:
            continue
        count += 1
        total += np.log(np.exp(x - x.max()).sum()) + x.max() - x[label]
        right += x.argmax() == label
    return total / max(count, 1), right / max(count, 1), count / labels.size


@pytest.mark.parametrize("ignore", [255, 4, 0])
def test_pixel_cross_entropy_equals_a_float64_loop_over_valid_pixels(ignore):
    logits = 3 * RANDOM.standard_normal((3, 5, 4, 4)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 4, (3, 5, 4), np.uint8)
    labels[RANDOM.random(labels.shape) < 0.3] = ignore
    value, logs = pixel_cross_entropy(logits, labels, ignore)
    np.testing.assert_allclose([value, logs["accuracy"], logs["valid"]], loop(logits, labels, ignore), rtol=1e-6)


def test_ignored_pixels_have_no_gradient_and_every_valid_pixel_the_same_weight():
    logits = RANDOM.standard_normal((2, 4, 4, 3)).astype(np.float32)
    labels = np.random.default_rng(2).integers(0, 3, (2, 4, 4))
    labels[0, :3] = 255  # one image has few valid pixels
    gradient = np.asarray(jax.grad(lambda x: pixel_cross_entropy(x, labels, 255)[0])(logits))
    assert not gradient[labels == 255].any()
    p = np.asarray(jax.nn.softmax(logits))
    expected = (p - np.eye(3)[np.minimum(labels, 2)]) / (labels != 255).sum()
    np.testing.assert_allclose(gradient[labels != 255], expected[labels != 255], atol=1e-6)


def test_a_batch_without_a_valid_pixel_has_loss_zero_and_no_gradient():
    logits, labels = RANDOM.standard_normal((1, 2, 2, 3)).astype(np.float32), np.full((1, 2, 2), 255)
    value, gradient = jax.value_and_grad(lambda x: pixel_cross_entropy(x, labels, 255)[0])(logits)
    assert value == 0 and not np.any(gradient)


# --- heads


def test_upsampling_keeps_constant_maps_and_has_half_pixel_centers():
    constant = np.broadcast_to(np.float32([1.5, -2.0, 0.25]), (2, 3, 5, 3))
    np.testing.assert_allclose(upsample(constant, (24, 17)), np.broadcast_to(constant[:, :1, :1], (2, 24, 17, 3)), rtol=1e-6)
    line = np.arange(4, dtype=np.float32).reshape(1, 1, 4, 1)
    place = np.clip((np.arange(12) + 0.5) * 4 / 12 - 0.5, 0, 3)
    np.testing.assert_allclose(np.asarray(upsample(line, (1, 12))).ravel(), place, atol=1e-6)


def test_maps_of_several_layers_are_side_by_side_at_the_size_of_the_finest():
    coarse, fine = np.ones((2, 2, 3, 4), np.float32), RANDOM.standard_normal((2, 6, 9, 2)).astype(np.float32)
    joined = np.asarray(side_by_side([coarse, fine]))
    assert joined.shape == (2, 6, 9, 6)
    np.testing.assert_allclose(joined[..., :4], 1, rtol=1e-6)
    np.testing.assert_array_equal(joined[..., 4:], fine)
    assert side_by_side([coarse]) is coarse


def test_linear_head_drops_whole_channels_of_an_image_in_training_only():
    head = build_head(dict(name="linear", dropout=0.5), 4, jnp.float32)
    x = RANDOM.standard_normal((8, 3, 3, 16)).astype(np.float32)
    params, state = create(head, jax.random.key(0), x)
    params = {**params, "classifier": {"kernel": np.eye(16, 4, dtype=np.float32), "bias": np.zeros(4, np.float32)}}
    noisy, _ = run(head, params, state, x, train=True, noise=jax.random.key(1))
    clean, _ = run(head, params, state, x, train=True)
    share = np.asarray(noisy) / np.asarray(clean)
    np.testing.assert_allclose(share, np.broadcast_to(share[:, :1, :1], share.shape), atol=1e-4)
    assert set(np.round(share[:, 0, 0].ravel(), 3).tolist()) == {0.0, 2.0}
    one, two = (run(head, params, state, x, train=False, noise=None)[0] for _ in range(2))
    np.testing.assert_array_equal(one, two)


def test_fcn_head_is_two_convolutions_with_batch_norm_and_a_linear_layer_that_starts_at_zero():
    head = build_head(dict(name="fcn", channels=8), 5, jnp.float32)
    x = RANDOM.standard_normal((2, 6, 6, 3)).astype(np.float32)
    params, state = create(head, jax.random.key(0), x)
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes == {
        "conv1": {"kernel": (3, 3, 3, 8)}, "bn1": {"scale": (8,), "bias": (8,)},
        "conv2": {"kernel": (3, 3, 8, 8)}, "bn2": {"scale": (8,), "bias": (8,)},
        "classifier": {"kernel": (8, 5), "bias": (5,)},
    }  # fmt: skip
    assert not np.any(run(head, params, state, x, train=True)[0])


def test_an_unknown_head_or_field_is_one_line():
    with pytest.raises(UserError, match=r"config\.model\.head\.name has no 'fnc'; did you mean 'fcn'"):
        build_head(dict(name="fnc"), 3, jnp.float32)
    with pytest.raises(UserError, match="has no 'chanels'; did you mean 'channels'"):
        build_head(dict(name="fcn", chanels=3), 3, jnp.float32)


# --- measures


def test_mean_iou_of_a_toy_confusion_matrix():
    """Class 0: 3 / (4 + 5 - 3); class 1: 4 / (6 + 5 - 4)."""
    found = confusion.measures([[3, 1], [2, 4]], ("a", "b"))
    assert found["miou"] == pytest.approx(53.57, abs=5e-3)
    assert (found["iou_a"], found["iou_b"]) == (50, pytest.approx(400 / 7))
    assert (found["accuracy"], found["class_accuracy"]) == (70, pytest.approx(100 * (3 / 4 + 4 / 6) / 2))
    assert (found["accuracy_majority"], found["miou_majority"]) == (60, 30)


def test_confusion_matrix_of_masks_equals_scikit_learn():
    true, found = np.random.default_rng(3).integers(0, 5, (2, 6, 20, 17))
    matrix = np.asarray(confusion.counts(true, found, 5, 255)).sum(0)
    assert not matrix[5].any()
    np.testing.assert_array_equal(matrix[:5], confusion_matrix(true.ravel(), found.ravel(), labels=range(5)))
    iou = jaccard_score(true.ravel(), found.ravel(), average="macro")
    assert confusion.measures(matrix[:5])["miou"] == pytest.approx(100 * iou)


def test_a_class_that_does_not_occur_is_left_out_even_where_it_is_found():
    """scikit-learn's macro average would count class 2 as 0."""
    found = confusion.measures([[3, 0, 1], [0, 4, 0], [0, 0, 0]])
    assert found["miou"] == pytest.approx(100 * (3 / 4 + 1) / 2)
    assert set(found) & {"iou_0", "iou_1", "iou_2"} == {"iou_0", "iou_1"}


def test_ignored_pixels_are_in_no_sum_and_ids_without_a_class_are_counted_apart():
    true, found = np.array([[[0, 1, 255, 9]]]), np.array([[[0, 0, 1, 1]]])
    matrix = np.asarray(confusion.counts(true, found, 2, 255))[0]
    np.testing.assert_array_equal(matrix, [[1, 0], [1, 0], [0, 1]])


# --- the evaluation


MASKS = np.random.default_rng(4).integers(0, 3, (50, 12, 12, 1)).astype(np.uint8)
MASKS[:, :2] = 255
PICTURES = np.random.default_rng(5).integers(0, 256, (50, 12, 12, 3)).astype(np.uint8)


@jax.jit
def by_brightness(images):
    """Logits of three classes, [B, H, W, 3]; some right, most wrong."""
    level = jnp.floor(images[..., 0].astype(jnp.float32) / 86)
    return -jnp.abs(level[..., None] - jnp.arange(3))


def measure(size=16, mesh=None, masks=MASKS, kind="segmentation", **options):
    columns = {"train": {"mask": masks}, "test": {"mask": masks}}
    context = make_context(PICTURES, size=size, mesh=mesh, columns=columns, segment=by_brightness)
    return evals.run({"own": {"kind": kind, **options}}, context)["own"]


def test_evaluation_equals_scikit_learn_on_valid_pixels_and_draws_eight_images():
    result = measure()
    found, true = np.asarray(by_brightness(PICTURES)).argmax(-1), MASKS[..., 0]
    valid = true != 255
    matrix = confusion_matrix(true[valid], found[valid])
    iou = np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    assert result.metrics["own/miou"] == pytest.approx(100 * iou.mean())
    assert result.metrics["own/accuracy"] == pytest.approx(100 * np.mean(found[valid] == true[valid]))
    assert result.picture.shape == (4 * 14 + 2, 8 * 14 + 2, 3)
    assert "at 12x12 pixels, 3 classes of mask, ignore=255; IoU of the 3 classes that occur" in result.protocol


@pytest.mark.full
def test_evaluation_does_not_depend_on_batches_and_devices():
    expected = measure().metrics
    assert measure(size=50).metrics == expected
    mesh = make_mesh({"data": -1, "fsdp": 2}, jax.devices()[:8])
    assert measure(size=24, mesh=mesh).metrics == expected


def test_evaluation_of_some_images_and_with_names():
    some = measure(examples=10, names=("a", "b", "c"))
    assert {"own/iou_a", "own/iou_b", "own/iou_c"} < set(some.metrics)
    assert "test(10)" in some.protocol or "test[:10]" in some.protocol


@pytest.mark.parametrize(
    ("masks", "options", "message"),
    [
        (np.where(MASKS == 2, 7, MASKS).astype(np.uint8), {}, "test image 0 has a 'mask' with a class id from 3 on that is not ignore"),
        (np.full_like(MASKS, 255), {}, "no pixel of .* has a class but ignore=255"),
        (MASKS, {"names": ("a", "b")}, "has 2 names for 3 classes"),
    ],
)  # fmt: skip
def test_evaluation_refuses_masks_without_classes(masks, options, message):
    with pytest.raises(UserError, match=message):
        measure(masks=masks, **options)


def test_palette_has_different_colors_and_errors_are_red():
    assert len({tuple(color) for color in segmentation.palette(20).tolist()}) == 20
    image, true, found = np.zeros((2, 2, 3)), np.array([[0, 1], [255, 2]]), np.array([[0, 0], [1, 2]])
    shown = segmentation.column(image, true, found, 3, 255)
    assert (shown[3] == segmentation.WRONG).all(-1).tolist() == [[False, True], [False, False]]
    assert (shown[1] == 255).all(-1).tolist() == [[False, False], [True, False]]


# --- the probe of cells


def test_pixels_belong_to_the_cell_above_them():
    np.testing.assert_array_equal(segmentation_linear.places((4, 6), (2, 3)), np.kron(np.arange(6).reshape(2, 3), np.ones((2, 2))))
    counted = np.bincount(segmentation_linear.places((5, 7), (2, 3)).ravel())
    assert counted.sum() == 35 and counted.min() > 0


def test_confusion_of_cells_equals_that_of_their_pixels():
    counts, found = np.array([[3, 1, 0], [0, 0, 2], [1, 1, 1]]), np.array([0, 1, 2])
    true = np.concatenate([np.repeat(np.arange(3), row) for row in counts])
    pixels = np.repeat(found, counts.sum(1))
    expected = confusion_matrix(true, pixels, labels=range(3))
    np.testing.assert_array_equal(segmentation_linear.of_cells(counts, found, 3), expected)


@pytest.mark.full
def test_probe_of_cells_equals_a_logistic_regression_of_scikit_learn():
    generator = np.random.default_rng(6)
    x = generator.standard_normal((40, 4, 4, 6)).astype(np.float32)
    label = (x @ generator.standard_normal((6, 3)) + generator.standard_normal((40, 4, 4, 3))).argmax(-1)
    masks = np.kron(label, np.ones((3, 3), int))[..., None].astype(np.uint8)
    masks[:, 0] = 255
    pictures = generator.integers(0, 256, (40, 12, 12, 3)).astype(np.uint8)
    pictures[:, 0, 0, 0] = np.arange(40)  # the number of the image, by which the encoder finds its map
    encode = jax.jit(lambda images: {"layer2": jnp.asarray(x)[images[:, 0, 0, 0].astype(int) % 40]})
    columns = {split: {"mask": masks} for split in ("train", "test")}
    context = make_context(pictures, encode=encode, columns=columns)
    options = dict(kind="segmentation_linear", l2=(1e-2,), iterations=500)
    metrics = evals.run({"own": options}, context)["own"].metrics
    rows = (x.reshape(-1, 6) - x.reshape(-1, 6).mean(0)) / x.reshape(-1, 6).std(0)
    fitted = LogisticRegression(C=1 / (1e-2 * len(rows)), tol=1e-8, max_iter=1000).fit(rows, label.ravel())
    found = np.kron(fitted.predict(rows).reshape(label.shape), np.ones((3, 3), int))
    valid = masks[..., 0] != 255
    assert metrics["own/accuracy"] == pytest.approx(100 * np.mean(found[valid] == masks[..., 0][valid]), abs=1)
    assert metrics["own/miou_ceiling"] == 100
    assert metrics["own/miou"] > metrics["own/miou_majority"] + 10


# --- what is refused


def test_views_that_move_pixels_are_refused():
    for name, arguments in (("flip", {}), ("random_crop", {"size": 8}), ("random_resized_crop", {"size": 8})):
        with pytest.raises(UserError, match=f"config.views: {name} moves pixels but not their labels; use config.data.ops"):
            in_place_view((((name, arguments),),))
    with pytest.raises(UserError, match="has 2 recipes"):
        in_place_view(((), ()))
    images = PICTURES[:2]
    np.testing.assert_allclose(in_place_view(((),))(images, jax.random.key(0))[:, 0], images / np.float32(255), atol=1e-7)


def test_class_ids_that_are_no_class_are_named():
    assert wrong_ids(np.array([0, 1, 255]), 2, 255) == ""
    assert wrong_ids(np.array([0, 3, 255]), 2, 255).startswith("has class id 3, and config.model.classes=2")
    assert wrong_ids(np.array([11, 3]), 11, 11) == ""


def save_stage(workdir):
    """A run of configs/simclr.py:smoke with its initial weights."""
    experiment = build_experiment(configs.load(f"{ROOT}/configs/simclr.py:smoke", ("--config.batch_size=32",)), jax.devices()[:1])
    saved = Checkpoints(workdir / "checkpoints")
    saved.save(experiment.run.init(), configs.plain(experiment.config))
    saved.close()
    write_json(workdir / "config.json", configs.plain(experiment.config))
    return str(workdir)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return save_stage(tmp_path_factory.mktemp("stage"))


def experiment_of(stage, *overrides):
    flags = (f"--config.stages.backbone.workdir={stage}", "--config.batch_size=16", *overrides)
    return build_experiment(configs.load(f"{ROOT}/configs/segmentation.py:smoke", flags), jax.devices()[:1])


def test_unset_classes_are_refused():
    config = ml_collections.ConfigDict({"model": {"classes": None}, "data": {"image_shape": (8, 8, 3)}})
    with pytest.raises(UserError, match=r"config.model.classes is not set; give .* --config.model.classes=N"):
        method.build(config, {})


@pytest.mark.full
def test_method_refuses_other_maps_crops_and_ids(stage):
    for override, message in (
        ("--config.model.maps=('layer9',)", "config.model.maps has 'layer9', and the encoder has the maps"),
        ("--config.model.backbone=thawed", "config.model.backbone='thawed' is unknown; choose frozen or trained"),
        ("--config.data.ops=(('random_resized_crops', dict(size=48)),)", "reads one crop of an image|makes 2 crops"),
        ("--config.data.features={'mask': 'image2'}", "input 'mask'"),
    ):
        with pytest.raises(UserError, match=message):
            experiment_of(stage, override)
    experiment = experiment_of(stage, "--config.model.classes=2")
    with pytest.raises(UserError, match=r"'mask' of example \d+ has class id 2, and config.model.classes=2"):
        check_examples(experiment)
    batch = {"mask": np.full((2, 48, 48, 1), 2, np.uint8)}
    with pytest.raises(UserError, match=r"'mask' in a training batch of 'scenes:.*' has class id 2"):
        next(checked([batch], experiment))
    check_examples(experiment_of(stage))


@pytest.mark.full
def test_frozen_backbone_stays_and_trained_backbone_starts_as_a_copy(stage):
    frozen, trained = experiment_of(stage), experiment_of(stage, "--config.model.backbone=trained")
    images = RANDOM.integers(0, 256, (2, 48, 48, 3), np.uint8)
    outputs = []
    for experiment in (frozen, trained):
        state = experiment.run.init()
        outputs.append(jax.device_get(experiment.encode(state.params, inference_state(state), images)))
        logits = experiment.fns.segment(state.params, inference_state(state), images)
        assert logits.shape == (2, 48, 48, 3) and not np.any(logits)  # the loss starts at ln 3
    assert set(frozen.run.abstract.params["net"]) == {"head"}
    assert set(trained.run.abstract.params["net"]) == {"head", "backbone"}
    for name, x in outputs[1].items():  # the frozen one also has the layers of SimCLR's head
        np.testing.assert_allclose(x, outputs[0][name], rtol=1e-5, atol=1e-6)


@pytest.mark.full
def test_last_map_of_a_frozen_backbone_is_its_last_and_not_that_of_the_alphabet(stage):
    """A tree of layers would be sorted by name, and end with 'stem'."""
    shapes = [
        experiment_of(stage, f"--config.model.maps=('{name}',)").run.abstract.params["net"]["head"]["conv1"]["kernel"].shape
        for name in ("last", "layer4", "stem")
    ]
    assert shapes[0] == shapes[1] != shapes[2]


@pytest.mark.full
@pytest.mark.parametrize("backbone", ["frozen", "trained"])
def test_export_of_a_segmentation_is_a_program_from_images_to_logits(stage, backbone, tmp_path):
    experiment = experiment_of(stage, f"--config.model.backbone={backbone}")
    state = experiment.run.init()
    kernel = state.params["net"]["head"]["classifier"]["kernel"]
    state.params["net"]["head"]["classifier"]["kernel"] = kernel + np.float32(0.3) * RANDOM.standard_normal(kernel.shape)
    saved = Checkpoints(tmp_path / "checkpoints")
    saved.save(state._replace(step=state.step + 8), configs.plain(experiment.config))
    saved.close()
    write_json(tmp_path / "config.json", configs.plain(experiment.config))
    assert main(["export", f"--workdir={tmp_path}", "--step=8"]) == 0
    images = RANDOM.integers(0, 256, (3, 48, 48, 3), np.uint8)
    expected = np.asarray(experiment.fns.segment(state.params, inference_state(state), images))
    assert np.ptp(expected) > 0.1
    forms = {path.name for path in (tmp_path / "export").iterdir() if not path.name.startswith(".")}
    assert forms == {"orbax", "stablehlo"} | ({"safetensors"} if backbone == "trained" else set())
    for form in ("orbax", "stablehlo"):
        export = load(tmp_path / "export" / form)
        np.testing.assert_allclose(export.segment(images), expected, rtol=1e-4, atol=1e-4)
        assert export.card["tasks"] == {
            "segment": {"takes": {"": ["uint8", "b", 48, 48, 3]}, "gives": {"": ["float32", "b", 48, 48, 3]}}
        }
        assert export.card["encoder"]["name"] == "resnet"
    if backbone == "trained":
        with pytest.raises(UserError, match="has no function 'segment'; export a run of configs/segmentation"):
            load(tmp_path / "export" / "safetensors").segment(images)
    card = tmp_path / "export" / "stablehlo" / "card.json"
    changed = json.loads(card.read_text())
    changed["tasks"]["segment"]["gives"][""][-1] = 7
    card.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"segment\.stablehlo is not the function of its card"):
        load(card.parent)


@pytest.mark.full
def test_a_task_that_takes_a_batch_is_exported_as_a_program_of_named_inputs(stage, tmp_path, monkeypatch):
    """What a method that answers questions needs beside one entry in TASKS and its own probe."""
    monkeypatch.setitem(formats.TASKS, "answer", ("image", "question"))
    experiment = experiment_of(stage)
    state = jax.device_get(experiment.run.init())

    def answer(params, mutable, batch):
        words = batch["question"].sum(1, keepdims=True).astype(jnp.float32)
        return {"logits": words * jnp.arange(3.0) + batch["image"].mean((1, 2)), "attention": batch["image"][..., 0] / 255.0}

    plain = experiment.method
    method = plain._replace(inputs={**plain.inputs, "question": Spec((5,), "int32")}, fns=plain.fns._replace(answer=answer))
    monkeypatch.setattr(source_module, "build_method", lambda config: method)
    source = source_module.make_source(experiment.config, state.params, inference_state(state))
    about = {"step": 0, "total_steps": 1, "metrics": {}, "protocols": {}, "versions": {}}
    card = folder.write(tmp_path / "export", "stablehlo", source, about)
    assert card["tasks"]["answer"] == {
        "takes": {"image": ["uint8", "b", 48, 48, 3], "question": ["int32", "b", 5]},
        "gives": {"attention": ["float32", "b", 48, 48], "logits": ["float32", "b", 3]},
    }
    batch = {"image": PICTURES[:4, :1, :1].repeat(48, 1).repeat(48, 2), "question": np.arange(20, dtype=np.int32).reshape(4, 5)}
    found = load(tmp_path / "export").functions["answer"](batch)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found, answer(None, None, batch))
