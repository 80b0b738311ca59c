"""Inputs of methods beside image and label: image pairs, masks, boxes, points, texts, and views of several sizes."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from configs import common
from ssl_jax.augment import views as views_module
from ssl_jax.augment.views import SIZES, check_recipes, make_views, output_size
from ssl_jax.data import catalog
from ssl_jax.data.features import Feature, after_host_ops, from_tfds, rename_features
from ssl_jax.data.pipeline import TrainBatches, eval_batches
from ssl_jax.data.render import ANSWERS
from ssl_jax.data.sources import Source, open_source
from ssl_jax.engine import loop
from ssl_jax.engine.method import Method, Phase, Spec
from ssl_jax.errors import UserError
from ssl_jax.experiment import abstract as abstract_module
from ssl_jax.experiment import build as build_module
from ssl_jax.experiment import config as configs
from ssl_jax.experiment.abstract import build_abstract
from ssl_jax.experiment.build import build_experiment
from ssl_jax.experiment.contexts import encode_views_of, model_context
from ssl_jax.experiment.training import save_views

MANY = 6  # padded number of boxes per image
SIDE = 48

# --- four methods that need more than an image and its label


def mean(images):
    return images.astype(jnp.float32).mean((1, 2)) / 255


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def egomotion(weights, batch):
    return jnp.mean((jnp.concatenate([mean(batch["image"]), mean(batch["image2"])], 1) @ weights["w"] - batch["motion"]) ** 2)


def segmentation(weights, batch):
    return cross_entropy(batch["image"] / 255.0 @ weights["w"], batch["mask"][..., 0].astype(jnp.int32)).mean()


def detection(weights, batch):
    out, valid = (mean(batch["image"]) @ weights["w"]).reshape(-1, MANY, 4 + 13), batch["boxes_valid"]
    loss = jnp.sum((out[..., :4] - batch["boxes"]) ** 2, -1) + cross_entropy(out[..., 4:], batch["labels"])
    return jnp.sum(jnp.where(valid, loss, 0)) / jnp.sum(valid)


def vqa(weights, batch):
    words = jnp.sum(weights["words"][batch["question"]] * (batch["question"] > 0)[..., None], 1)
    return cross_entropy(jnp.concatenate([mean(batch["image"]), words], 1) @ weights["w"], batch["answer"]).mean()


IMAGE = {"image": Spec((SIDE, SIDE, 3))}
BOXES = {"boxes": Spec((MANY, 4), "float32"), "boxes_valid": Spec((MANY,), "bool"), "labels": Spec((MANY,), "int32")}
STUBS = {
    "egomotion": ({**IMAGE, "image2": Spec((SIDE, SIDE, 3)), "motion": Spec((4,), "float32")}, egomotion, lambda _: {"w": (6, 4)}),
    "segmentation": ({**IMAGE, "mask": Spec((SIDE, SIDE, 1))}, segmentation, lambda _: {"w": (3, 3)}),
    "detection": ({**IMAGE, **BOXES}, detection, lambda _: {"w": (3, MANY * 17)}),
    "vqa": (
        {**IMAGE, "question": Spec((8,), "int32"), "answer": Spec((), "int32")}, vqa,
        lambda data: {"words": (data.vocabulary["question"], 5), "w": (8, len(ANSWERS))},
    ),
}  # fmt: skip


def build_stub(config, inputs=None):
    declared, loss, shapes = STUBS[config.method]

    def init(key, batch, frozen):
        return {"net": {name: jax.random.normal(key, shape) * 0.1 for name, shape in shapes(config.data).items()}}, {}

    return Method(
        inputs={**declared, **(inputs or {})},
        init=init,
        phases=(Phase("task", ("net",), lambda train, state, batch, key: (loss(train["net"], batch), ({}, {}))),),
        encode=lambda params, mutable, images: {"pooled": mean(images)},
    )


@pytest.fixture
def stub(monkeypatch):
    """(kind, *overrides, inputs) -> the config of a stub on the embedded scenes, with `inputs` as additional inputs."""

    def configured(kind, *overrides, inputs=None):
        for module in (build_module, abstract_module):
            monkeypatch.setattr(module, "build_method", functools.partial(build_stub, inputs=inputs))
        config = common.base(kind)
        config.data.name, config.batch_size, config.total, config.eval_batch_size = "scenes/tiny", 16, "3 steps", 40
        config.optim = dict(net=dict(name="sgd", lr=0.1, schedule="constant"))
        config.evals = {}
        if kind == "detection":
            config.data.features = dict(boxes="objects/bbox", labels="objects/label")
        if kind == "vqa":
            config.data.vocabulary = dict(question=None)
        return configs.apply_overrides(config.lock(), overrides)

    return configured


@pytest.mark.parametrize("kind", STUBS)
def test_method_trains_on_the_inputs_that_it_declares(kind, stub):
    config = stub(kind)
    experiment = build_experiment(config, jax.devices()[:2])
    batch = {name: x for name, x in experiment.batches[0].items() if name != "_skipped"}
    assert {name: Spec(x.shape[1:], x.dtype.name) for name, x in batch.items()} == experiment.method.inputs
    state = experiment.run.init()
    for on_device in loop.to_device([batch, batch], experiment.run.mesh, ahead=1):
        state, metrics = experiment.run.step(state, on_device, experiment.run.root)
    assert np.isfinite(float(metrics["task/loss"]))
    rehearsed = build_abstract(config, jax.devices()[:2], "cpu")
    assert rehearsed.example == {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}


def test_rehearsal_knows_the_features_of_scenes_without_data(stub, monkeypatch):
    monkeypatch.setattr(catalog, "open_data", None)  # nothing is opened
    for kind in STUBS:
        config = stub(kind, "--config.data.name=scenes")
        assert set(build_abstract(config, jax.devices()[:2], "cpu").example) == set(STUBS[kind][0])
    from_catalog = catalog.facts(config.data)
    monkeypatch.undo()
    train = open_source("scenes/tiny", "train")
    from_files = catalog.read_facts(config.data, train, catalog.build_vocabulary(train, ["question"]))
    assert (from_catalog.features, from_catalog.vocabulary) == (from_files.features, from_files.vocabulary)


def test_rehearsal_takes_unknown_features_from_config_data_specs(stub):
    overrides = ("--config.data.name=elsewhere", "--config.data.examples=64", "--config.data.image_shape=(48,48,3)")
    with pytest.raises(UserError, match=r"input 'image2' uint8 \(48, 48, 3\): no such feature; did you mean 'image'"):
        build_abstract(stub("egomotion", *overrides), jax.devices()[:2], "cpu")
    overrides += ("--config.data.specs.image2=((48,48,3),'uint8')", "--config.data.specs.motion=((4,),'float32')")
    assert len(build_abstract(stub("egomotion", *overrides), jax.devices()[:2], "cpu").example) == 3


def test_unavailable_input_is_a_one_line_error_that_lists_features(stub):
    cases = [
        ("segmentation", {"depth": Spec((48, 48, 1), "float32")}, r"'depth' float32 \(48, 48, 1\): no such feature; the data have"),
        ("segmentation", {"mask": Spec((48, 48, 1), "int32")}, r"'mask' int32 .* the data have it as uint8 \(48, 48, 1\) \(mask\)"),
        ("egomotion", {"motion": Spec((6,), "float32")}, r"'motion' float32 \(6\): the data have it as float32 \(4\)"),
        ("egomotion", {"question": Spec((8,), "int32")}, r"it is text; add the key 'question' to config.data.vocabulary"),
        ("egomotion", {"objects/bbox": Spec((4, 4), "float32")}, r"rows are padded; ask for 'objects/bbox_valid' bool \(\?\)"),
        ("vqa", {"question": Spec((5,), "int32")}, r"input 'question' has 5 tokens; the longest text has 6"),
    ]  # fmt: skip
    for kind, inputs, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            build_experiment(stub(kind, inputs=inputs), jax.devices()[:2])
        assert "\n" not in str(caught.value)
    shorter = stub("detection", inputs={name: spec._replace(shape=(2, *spec.shape[1:])) for name, spec in BOXES.items()})
    with pytest.raises(UserError, match=r"example \d+: '(boxes|labels)' has [34] rows, more than the declared 2"):
        build_experiment(shorter, jax.devices()[:2]).batches[0]


def test_random_host_crops_refuse_motions(stub):
    crops = (("random_resized_crop", dict(size=SIDE)),)
    config = stub("egomotion")
    with config.unlocked():
        config.data.ops = crops
    with pytest.raises(UserError, match=r"'motion' float32 \(4\): it may be in pixels of the whole image, which random_resized"):
        build_experiment(config, jax.devices()[:2])
    config = stub("egomotion", "--config.data.kinds.motion=plain")
    with config.unlocked():
        config.data.ops = crops
    build_experiment(config, jax.devices()[:2])


# --- names


def test_config_data_features_renames_features(stub):
    swapped = ("image=image2", "image2=image", "label=answer", "segments=mask")
    config = stub("segmentation", *(f"--config.data.features.{pair}" for pair in swapped), inputs={"segments": Spec((48, 48, 1))})
    experiment, plain = build_experiment(config, jax.devices()[:2]), open_source("scenes/tiny", "train")
    assert experiment.config.data.num_classes == len(ANSWERS)
    source = experiment.batches.source
    swapped_names = {"image": "image2", "image2": "image", "label": "answer"}
    assert {name: source[3][name] for name in swapped_names} == {name: plain[3][own] for name, own in swapped_names.items()}
    batch = experiment.batches[0]
    np.testing.assert_array_equal(batch["segments"], batch["mask"])
    assert configs.from_plain(configs.plain(experiment.config)).data.features["label"] == "answer"
    with pytest.raises(UserError, match=r"config.data.features: data 'scenes/tiny' has no feature 'color' for 'label'; it has"):
        build_experiment(stub("segmentation", "--config.data.features.label=color"), jax.devices()[:2])
    with pytest.raises(UserError, match=r"config.data.kinds.mask='area' is unknown; choose image, mask, boxes"):
        build_experiment(stub("segmentation", "--config.data.kinds.mask=area"), jax.devices()[:2])


def test_kind_of_a_feature_follows_its_tfds_type():
    import tensorflow_datasets as tfds

    found = from_tfds(tfds.features.FeaturesDict({
        "image": tfds.features.Image(shape=(None, None, 1)), "image2": tfds.features.Image(shape=(9, 9, 1)),
        "depth": tfds.features.Image(shape=(9, 9, 1), dtype=np.float32),
        "clip": tfds.features.Sequence(tfds.features.Image(shape=(9, 9, 3)), length=5),
        "parts": {"box": tfds.features.BBoxFeature(), "names": tfds.features.Sequence(tfds.features.Text())},
        "corners": tfds.features.Tensor(shape=(4, 2), dtype=np.float64), "image/id": np.int64,
    }))  # fmt: skip
    _, features = rename_features({"/".join(path): each for path, each in found.items()}, {}, {"corners": "points"}, "odd")
    assert features == {
        "clip": Feature((5, 9, 9, 3), "uint8", "image"), "corners": Feature((4, 2), "float32", "points"),
        "depth": Feature((9, 9, 1), "float32", "mask"), "image": Feature((None, None, 3), "uint8", "image"),
        "image/id": Feature((), "int32"), "image2": Feature((9, 9, 1), "uint8", "mask"),
        "parts/box": Feature((4,), "float32", "boxes"), "parts/names": Feature((None,), "object", "text"),
    }  # fmt: skip
    assert after_host_ops(features, (), {"parts/names": 7})["parts/names"] == Feature((None, None), "int32", "text")


# --- host geometry


class Rectangles(Source):
    """Gray images with one bright rectangle, its mask, its box, a second box, and two of its corners as points."""

    features = {  # noqa: RUF012
        "image": Feature((None, None, 3), "uint8", "image"), "image2": Feature((None, None, 3), "uint8", "image"),
        "mask": Feature((None, None, 1), "uint8", "mask"), "boxes": Feature((None, 4), "float32", "boxes"),
        "points": Feature((2, 2), "float32", "points"), "clip": Feature((3, None, None, 3), "uint8", "image"),
    }  # fmt: skip
    num_classes = label_names = image_shape = None
    name, split = "rectangles", "train"

    def __len__(self):
        return 12

    def select(self, features):
        return self

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        size = rng.integers(60, 90, 2)
        top, left = (rng.uniform(0.1, 0.5, 2) * size).astype(int)
        height, width = (rng.uniform(0.2, 0.4, 2) * size).astype(int)
        image = np.full((*size, 3), 40, np.uint8)
        image[top : top + height, left : left + width] = 200
        box = np.array([top, left, top + height, left + width]) / np.tile(size, 2)
        return {
            "image": image, "image2": image[::-1].copy(), "mask": (image[..., :1] > 99).astype(np.uint8),
            "points": box.reshape(2, 2), "boxes": [box, [0, 0, 0.02, 0.02]], "clip": np.stack([image] * 3),
        }  # fmt: skip


GEOMETRY = {
    "image": None, "image2": None, "mask": None, "boxes": Spec((3, 4), "float32"), "boxes_valid": Spec((3,), "bool"),
    "points": None, "points_valid": None, "clip": None,
}  # fmt: skip


@pytest.mark.parametrize("ops", [
    ("resize_crop", dict(resize=40, crop=32, interpolation="bilinear")),
    ("resize_crop", dict(resize=40, crop=32, interpolation="bilinear", flip=1.0)),
    ("random_resized_crop", dict(size=40, area=(0.3, 1.0), flip=0.5, interpolation="bilinear")),
    ("random_resized_crops", dict(size=40, crops=3, area=(0.1, 0.6), flip=0.5, interpolation="bilinear")),
    ("resize", dict(height=56, width=40, flip=0.5, interpolation="bilinear")),
], ids=["center", "flipped center", "random", "three crops", "whole"])  # fmt: skip
def test_masks_boxes_and_points_follow_image_crops(ops):
    batches = TrainBatches(Rectangles(), [ops], 12, seed=5, inputs=GEOMETRY)
    batch = batches[0]
    repeated = TrainBatches(Rectangles(), [ops], 12, seed=5, inputs=GEOMETRY)[0]
    assert all(np.array_equal(x, repeated[name]) for name, x in batch.items())
    crops = 3 if ops[0].endswith("crops") else 1
    height, width = (ops[1].get(side, ops[1].get("size", 32)) for side in ("height", "width"))
    shapes = {name: x.shape for name, x in batch.items() if name != "_skipped"}
    lead = (12, 3) if crops == 3 else (12,)
    assert shapes["image"] == (*lead, height, width, 3) and shapes["mask"] == (*lead, height, width, 1)
    assert (shapes["boxes"], shapes["boxes_valid"]) == ((*lead, 3, 4), (*lead, 3))
    assert shapes["clip"] == (12, 3, *lead[1:], height, width, 3)
    flat = {name: batch[name].reshape(12 * crops, *batches.spec[name][0][len(lead) - 1 :]) for name in GEOMETRY if name != "clip"}
    inside = 0
    for image, mask, boxes, valid, points, points_valid in zip(
        *(flat[name] for name in ("image", "mask", "boxes", "boxes_valid", "points", "points_valid")), strict=True
    ):
        bright = image[..., 0] > 120
        assert np.mean(bright != (mask[..., 0] > 0)) < 0.03  # they differ along edges only
        assert not valid[2] and (boxes[~valid] == 0).all()
        if not valid[0]:
            continue
        inside += 1
        rows, columns = np.flatnonzero(mask.any((1, 2))), np.flatnonzero(mask.any((0, 2)))
        expected = np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]) / np.tile((height, width), 2)
        np.testing.assert_allclose(boxes[0], expected, atol=1.01 / min(height, width))
        for (y, x), is_inside in zip(points, points_valid, strict=True):
            if min(abs(n) for n in (y, x, 1 - y, 1 - x)) > 1e-6:
                assert is_inside == (0 <= y <= 1 and 0 <= x <= 1)
        if points_valid.all():
            np.testing.assert_allclose(sorted(points[:, 1]), boxes[0, 1::2], atol=1e-6)
            np.testing.assert_allclose(points[:, 0], boxes[0, ::2], atol=1e-6)
    assert inside > 6 * crops
    np.testing.assert_array_equal(batch["clip"][:, 0], batch["image"])


def test_host_ops_refuse_images_of_different_sizes_in_one_example(monkeypatch):
    read = Rectangles.__getitem__
    monkeypatch.setattr(Rectangles, "__getitem__", lambda self, i: {**read(self, i), "image2": np.zeros((30, 30, 3), np.uint8)})
    ops = [("resize_crop", dict(resize=40, crop=32))]
    with pytest.raises(UserError, match=r"'image2' of example \d+ has \(30, 30\) pixels and 'image' \("):
        TrainBatches(Rectangles(), ops, 4, 0, inputs=("image", "image2"))[0]


# --- texts


def test_vocabulary_is_built_once_and_read_on_resume(stub, tmp_path):
    experiment = build_experiment(stub("vqa"), jax.devices()[:2], tmp_path)
    saved = json.loads((tmp_path / "vocabulary.json").read_text())["question"]
    tokens = saved["tokens"]
    assert tokens[:3] == ["<padding>", "<unknown>", "?"] and experiment.config.data.vocabulary.question == len(tokens)
    batch, source = experiment.batches[0], open_source("scenes/tiny", "train")
    texts = {source[i]["question"].decode() for i in range(len(source))}
    for row in batch["question"]:
        words = [tokens[i] for i in row if i]
        assert " ".join(words).replace(" ?", "?") in texts
    order = [tokens[0], tokens[1], *reversed(tokens[2:])]  # another order, to see that the file is read
    (tmp_path / "vocabulary.json").write_text(json.dumps({"question": {"tokens": order, "longest": 6}}))
    resumed = build_experiment(configs.from_plain(configs.plain(experiment.config)), jax.devices()[:2], tmp_path)
    np.testing.assert_array_equal(resumed.batches[0]["question"] > 0, batch["question"] > 0)
    assert [order[i] for i in resumed.batches[0]["question"][0] if i] == [tokens[i] for i in batch["question"][0] if i]
    for other in (experiment.config, stub("vqa", "--config.data.vocabulary.question=99")):
        (tmp_path / "vocabulary.json").write_text(json.dumps({"question": {"tokens": tokens[:5], "longest": 6}}))
        with pytest.raises(UserError, match=r"config.data.vocabulary.question=\d+, but .*vocabulary.json has 5 words"):
            build_experiment(other, jax.devices()[:2], tmp_path)
    with pytest.raises(UserError, match=r"config.data.vocabulary: 'mask' of data 'scenes/tiny' is mask; there are question"):
        build_experiment(stub("vqa", "--config.data.vocabulary.mask=None"), jax.devices()[:2])


# --- evaluations


def test_evaluations_read_features_by_name(stub):
    experiment = build_experiment(stub("detection"), jax.devices()[:2])
    opened = model_context(experiment, experiment.run.abstract)
    *_, last = opened.batches("test", ("image", "mask", "boxes", "boxes_valid"))
    assert set(last) == {"image", "mask", "boxes", "boxes_valid", "_valid", "_index"}
    assert last["_valid"].sum() == 96 % 40 and not last["mask"][~last["_valid"]].any()
    assert last["boxes"].shape == (40, MANY, 4) and last["boxes_valid"].any(1).sum() == 16
    areas = jax.jit(lambda images, masks, motions: {"area": jnp.stack([jnp.mean(masks > 0, (1, 2, 3)), motions[:, 1]], 1)})
    found = opened.encode_with(areas, "test", "area", names=("mask", "motion"))
    source = open_source("scenes/tiny", "test")
    whole = eval_batches(source, (), 96, inputs=("mask", "motion"))[0]
    np.testing.assert_allclose(found.x[:, 0], (whole["mask"] > 0).mean((1, 2, 3)), atol=1e-6)
    columns = opened.columns("test", ("label", "motion"), 50)
    np.testing.assert_array_equal(columns["motion"], whole["motion"][:50])
    assert columns["label"].dtype == np.int32 and len(columns["label"]) == 50
    with pytest.raises(UserError, match=r"'objects/bbox' of data 'scenes/tiny' is a list .*; ask for a length"):
        next(iter(opened.batches("test", ("objects/bbox",))))


# --- views of several sizes

LARGE = (("random_resized_crop", {"size": 24}), ("flip", {}))
SMALL = (("random_resized_crop", {"size": 12, "area": (0.05, 0.3)}), ("flip", {}))


def test_views_of_several_sizes_form_groups():
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    key, groups = jax.random.key(1), {"local": (SMALL,) * 4, "global": [LARGE, LARGE]}
    views = jax.jit(make_views(groups))(images, key)
    assert {name: x.shape for name, x in views.items()} == {"global": (3, 2, 24, 24, 3), "local": (3, 4, 12, 12, 3)}
    np.testing.assert_array_equal(views["global"], jax.jit(make_views([LARGE, LARGE]))(images, key))  # views 0 and 1
    all_small = jax.jit(make_views([SMALL] * 6))(images, key)
    np.testing.assert_allclose(views["local"], all_small[:, 2:], atol=1e-6)  # views 2 to 5, in another program
    assert output_size(groups, (32, 32)) == {"global": (24, 24), "local": (12, 12)}
    with pytest.raises(UserError, match=r"group 'local': views\[0\]\[0\]: unknown operation 'flop'"):
        make_views({"global": [LARGE], "local": [[("flop", {})]]})
    with pytest.raises(UserError, match=r"differ in size.*make groups of one size each"):
        output_size([LARGE, SMALL], (32, 32))


@pytest.mark.full
def test_groups_of_views_are_saved_and_encoded(stub, tmp_path):
    views = make_views({"global": [LARGE] * 2, "local": [SMALL] * 3})
    experiment = build_experiment(stub("segmentation"), jax.devices()[:2])
    method = experiment.method._replace(views=views)
    save_views(experiment._replace(method=method), tmp_path)
    picture = Image.open(tmp_path / "pictures" / "views.png")
    assert picture.width % (8 * (24 + 2) + 2) == 0 and picture.height % (5 * (24 + 2) + 2) == 0  # a column per image
    images, key = experiment.batches[0]["image"], jax.random.key(0)
    pooled = jax.jit(encode_views_of(method))(None, None, images, key)
    np.testing.assert_allclose(pooled[:, 3], mean(jax.jit(views)(images, key)["local"][:, 1]), atol=1e-5)
    assert pooled.shape == (16, 5, 3)


def test_output_size_of_views_matches_every_operation(monkeypatch):
    def cutout(image, key, size):
        """Keeps the size of the image, although an argument is called size."""
        return image.at[:size, :size].set(0)

    monkeypatch.setitem(views_module.OPERATIONS, "cutout", cutout)
    assert output_size([[("random_resized_crop", {"size": 24}), ("cutout", {"size": 8})]], (32, 32)) == (24, 24)
    image, key = jax.ShapeDtypeStruct((32, 30, 3), jnp.float32), jax.eval_shape(lambda: jax.random.key(0))
    for name, operation in views_module.OPERATIONS.items():  # the declared size is the size of the result
        ((_, arguments),) = check_recipes([[(name, {"size": 8} if name in (*SIZES, "cutout") else {})]])[0]
        traced = jax.eval_shape(functools.partial(operation, **arguments), image, key)
        assert traced.shape[:2] == output_size([[(name, arguments)]], (32, 30)), name
