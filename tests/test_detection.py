"""Detection: boxes, targets, losses and decoding against float64 loops and closed forms, the method, and its evaluation."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eval_contexts import make_context

from ssl_jax.engine.method import Stage, State
from ssl_jax.errors import UserError
from ssl_jax.evals import run as evals
from ssl_jax.methods import build_method
from ssl_jax.objectives import boxes as geometry
from ssl_jax.objectives import detection

SIZE = (48, 64)  # pixels of an image
point_losses, fcos_losses = jax.jit(detection.point_losses), jax.jit(detection.fcos_losses, static_argnums=3)
heat_map, assign = jax.jit(detection.heat_map, static_argnums=(3, 4)), jax.jit(detection.assign, static_argnums=3)


def random_boxes(seed, count, least=0.02):
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 0.7, (count, 2))
    return np.concatenate([low, np.minimum(low + rng.uniform(least, 0.5, (count, 2)), 1)], 1).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------- boxes


def overlap_loop(a, b):
    """(IoU, GIoU) of two boxes in float64."""
    a, b = np.float64(a), np.float64(b)
    shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return shared / union, shared / union - (hull - union) / hull


def test_generalized_overlap_equals_a_float64_loop():
    a, b = random_boxes(0, 200), random_boxes(1, 200)
    expected = np.array([overlap_loop(*pair) for pair in zip(a, b, strict=True)])
    np.testing.assert_allclose(geometry.iou(a, b), expected[:, 0], atol=1e-6)
    np.testing.assert_allclose(geometry.giou(a, b), expected[:, 1], atol=1e-5)
    assert (expected[:, 0] == 0).sum() > 20 < (expected[:, 0] > 0.1).sum()
    np.testing.assert_allclose(geometry.giou(a, a), 1, atol=1e-5)


@pytest.mark.full
def test_generalized_overlap_equals_torchvision():
    try:
        from torchvision.ops import generalized_box_iou
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    import torch

    a, b = random_boxes(0, 50), random_boxes(1, 50)
    theirs = generalized_box_iou(*(torch.tensor(x[:, [1, 0, 3, 2]]) for x in (a, b))).numpy()
    np.testing.assert_allclose(geometry.giou(a[:, None], b[None]), theirs, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.2, 0.6])
def test_suppression_equals_a_loop(threshold):
    boxes = np.concatenate([random_boxes(0, 60), random_boxes(0, 60) + np.float32(0.02)])
    boxes, labels = boxes[np.random.default_rng(1).permutation(120)], np.random.default_rng(2).integers(0, 2, 120)
    kept = []
    for i in range(120):
        if all(labels[i] != labels[j] or overlap_loop(boxes[i], boxes[j])[0] <= threshold for j in kept):
            kept.append(i)
    stays = jax.jit(geometry.suppress)(boxes, labels, threshold)
    assert np.flatnonzero(stays).tolist() == kept
    assert 20 < len(kept) < 110


def test_a_box_is_decoded_exactly_from_every_place_inside():
    boxes, places = random_boxes(0, 30), np.asarray(geometry.centers_of_cells(12, 16))
    distances = np.asarray(geometry.to_distances(places[:, None], boxes[None]))
    inside = (distances > 0).all(-1)
    expected = np.broadcast_to(boxes, (len(places), *boxes.shape))
    np.testing.assert_allclose(geometry.from_distances(places[:, None], distances), expected, atol=1e-6)
    by_hand = (places[:, None] > boxes[:, :2]).all(-1) & (places[:, None] < boxes[:, 2:]).all(-1)
    np.testing.assert_array_equal(inside, by_hand)
    assert 100 < inside.sum() < 4000


# --------------------------------------------------------------------------------------------------------------- points


def test_radii_of_a_square_of_32_and_the_overlaps_at_them():
    moved, shrunk, grown = (float(r) for r in detection.radii(jnp.float32(32), jnp.float32(32), 0.7))
    np.testing.assert_allclose([moved, shrunk, grown], [2.960, 2.613, 3.124], atol=5e-4)
    box = np.array([0, 0, 32, 32.0])
    for corners in (box + moved, box + shrunk * np.array([1, 1, -1, -1]), box - grown * np.array([1, 1, -1, -1])):
        np.testing.assert_allclose(overlap_loop(box, corners)[0], 0.7, atol=1e-5)


def test_radii_of_an_oblong():
    for r, corners in zip(detection.radii(jnp.float32(10), jnp.float32(40), 0.5), (
        lambda r: [r, r, 10 + r, 40 + r], lambda r: [r, r, 10 - r, 40 - r], lambda r: [-r, -r, 10 + r, 40 + r],
    ), strict=True):  # fmt: skip
        np.testing.assert_allclose(overlap_loop([0, 0, 10, 40], corners(float(r)))[0], 0.5, atol=1e-5)


def test_heat_is_one_at_the_centers_of_objects_only():
    boxes, labels = random_boxes(3, 6, least=0.2), np.array([0, 1, 2, 0, 1, 2])
    usable = np.array([1, 1, 1, 1, 1, 0], bool)
    heat = np.asarray(heat_map(boxes, labels, usable, (96, 128), 3))
    centers = np.floor((boxes[:, :2] + boxes[:, 2:]) / 2 * (96, 128)).astype(int)
    peaks = {(y, x, label) for (y, x), label, own in zip(centers.tolist(), labels.tolist(), usable, strict=True) if own}
    assert {tuple(place) for place in np.argwhere(heat == 1).tolist()} == peaks
    assert heat.min() == 0 and heat.max() == 1 and ((heat > 0) & (heat < 1)).sum() > 20


def test_heat_falls_as_a_gaussian_of_a_sixth_of_its_width():
    box = np.array([[0.25, 0.25, 0.75, 0.75]], np.float32)  # 16 x 16 cells: the smallest radius is 1.3
    heat = np.asarray(heat_map(box, np.array([0]), np.array([True]), (32, 32), 1))[..., 0]
    np.testing.assert_allclose(heat[16, 16:19], [1, np.exp(-1 / (2 * 0.5**2)), 0], atol=1e-6)
    np.testing.assert_allclose(heat[15, 15], np.exp(-2 / (2 * 0.5**2)), rtol=1e-5)


def targets(seed=0, count=5, padding=0, classes=3):
    """Targets of two images, with padding of several kinds behind them."""
    boxes = np.stack([random_boxes(seed + i, count, 0.1) for i in range(2)])
    labels = np.random.default_rng(seed).integers(0, classes, (2, count)).astype(np.int32)
    valid = np.ones((2, count), bool)
    if padding:
        kinds = np.array([[0.2, 0.2, 0.9, 0.9], [0.9, 0.1, 0.1, 0.9], [0.5, 0.1, 0.5, 0.9], [0, 0, 0, 0]], np.float32)
        boxes = np.concatenate([boxes, np.tile(kinds, (2, 1, 1))], 1)
        labels = np.concatenate([labels, np.full((2, 4), 1, np.int32)], 1)
        valid = np.concatenate([valid, np.tile([False, True, True, False], (2, 1))], 1)  # padding, inverted, empty, zeros
    return detection.targets_of(boxes, labels, valid)


def point_outputs(seed=0, classes=3, shape=(12, 16)):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal((2, *shape, n)), jnp.float32) for name, n in
            (("heat", classes), ("size", 2), ("offset", 2))}  # fmt: skip


def test_point_losses_equal_a_float64_loop_over_objects_and_cells():
    shape = (60, 80)  # fine enough for heat around the peaks
    outputs, objects = point_outputs(shape=shape), targets()
    found = point_losses(outputs, objects)
    heat, size, offset, count = 0.0, 0.0, 0.0, objects.boxes.shape[0] * objects.boxes.shape[1]
    for image in range(2):
        wanted = np.asarray(heat_map(*(x[image] for x in objects[:3]), shape, 3), np.float64)
        assert ((wanted > 0) & (wanted < 1)).sum() > 20
        p = 1 / (1 + np.exp(-np.float64(outputs["heat"][image])))
        for place, y in np.ndenumerate(wanted):
            heat -= (1 - p[place]) ** 2 * np.log(p[place]) if y == 1 else (1 - y) ** 4 * p[place] ** 2 * np.log(1 - p[place])
        for box in np.float64(objects.boxes[image]):
            center = (box[:2] + box[2:]) / 2 * shape
            y, x = np.floor(center).astype(int)
            size += np.abs(outputs["size"][image, y, x] - (box[2:] - box[:2]) * shape).sum()
            offset += np.abs(outputs["offset"][image, y, x] - (center - (y, x))).sum()
    np.testing.assert_allclose([found["heat"], found["size"], found["offset"]], np.array([heat, size, offset]) / count, rtol=1e-4)


@pytest.mark.full
def test_padding_inverted_and_empty_boxes_change_no_loss():
    outputs = point_outputs()
    plain, padded = (point_losses(outputs, targets(padding=n)) for n in (0, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plain, padded)
    outputs, grid = fcos_outputs()
    plain, padded = (fcos_losses(outputs, targets(padding=n), grid, SIZE) for n in (0, 1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plain, padded)


@pytest.mark.full
def test_an_image_of_padding_alone_has_finite_losses_and_gradients():
    nothing = detection.targets_of(np.zeros((2, 3, 4), np.float32), np.zeros((2, 3), np.int32), np.zeros((2, 3), bool))
    fcos, grid = fcos_outputs()
    for outputs, losses in (
        (point_outputs(), lambda x: point_losses(x, nothing)),
        (fcos, lambda x: fcos_losses(x, nothing, grid, SIZE)),
    ):
        gradients = jax.jit(jax.grad(lambda x, losses=losses: sum(losses(x).values())))(outputs)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
        assert not any(np.any(gradients[name]) for name in gradients if name in ("size", "offset", "distances"))
        assert any(np.any(x) for x in gradients.values())


@pytest.mark.full
def test_places_in_ignored_boxes_are_no_background():
    boxes = np.tile(np.array([[0.0, 0.0, 1, 1]], np.float32), (2, 1, 1))
    fcos, grid = fcos_outputs()
    for ignored, zero in (([[True]] * 2, True), ([[False]] * 2, False)):
        crowd = detection.targets_of(boxes, np.zeros((2, 1), np.int32), np.ones((2, 1), bool), np.array(ignored))
        losses = point_losses(point_outputs(), crowd), fcos_losses(fcos, crowd, grid, SIZE)
        assert (sum(float(x) for each in losses for x in each.values()) == 0) == zero


def perfect_points(objects, classes=3, shape=(12, 16)):
    """Outputs that say exactly what the objects are."""
    heat = np.stack([heat_map(*(x[i] for x in objects[:3]), shape, classes) for i in range(2)])
    logits = np.where(heat == 1, 8.0, np.log(np.clip(heat, 1e-4, 0.9)) - 1)
    cell, offset, size = detection.cells_of(objects.boxes, shape)
    outputs = {"heat": jnp.asarray(logits, jnp.float32), "size": np.zeros((2, *shape, 2), np.float32),
               "offset": np.zeros((2, *shape, 2), np.float32)}  # fmt: skip
    for i in range(2):
        outputs["size"][i, cell[i, :, 0], cell[i, :, 1]] = size[i]
        outputs["offset"][i, cell[i, :, 0], cell[i, :, 1]] = offset[i]
    return outputs


def as_found(boxes, labels):
    return sorted([int(label), *np.round(box.astype(float), 4).tolist()] for label, box in zip(labels, np.asarray(boxes), strict=True))


def test_found_points_are_the_objects_that_the_outputs_encode():
    objects = targets(seed=5)
    found = jax.device_get(jax.jit(detection.find_points, static_argnums=1)(perfect_points(objects), 20))
    for i in range(2):
        best = found["scores"][i] > 0.99
        assert as_found(found["boxes"][i][best], found["labels"][i][best]) == as_found(objects.boxes[i], objects.labels[i])
        assert (np.diff(found["scores"][i]) <= 0).all()


# ----------------------------------------------------------------------------------------------------------------- FCOS


def fcos_outputs(seed=0, classes=3):
    rng, shapes = np.random.default_rng(seed), [(12, 16), (6, 8), (3, 4)]
    grid = detection.grid_of(shapes, SIZE, (1.5, 3.0))
    outputs = {"class": rng.standard_normal((2, len(grid.places), classes)), "distances": rng.uniform(0.1, 3, (2, len(grid.places), 4))}
    return {name: jnp.asarray(x, jnp.float32) for name, x in outputs.items()}, grid


def assign_loop(boxes, size=SIZE, shapes=((12, 16), (6, 8), (3, 4)), reach=(1.5, 3.0)):
    """[(box or None)] for each place."""
    found = []
    for level, (rows, columns) in enumerate(shapes):
        stride = size[0] / rows
        low, high = (0 if level == 0 else reach[0] * stride), (np.inf if level == 2 else reach[1] * stride)
        for row in range(rows):
            for column in range(columns):
                own = []
                for n, (top, left, bottom, right) in enumerate(np.float64(boxes)):
                    y, x = (row + 0.5) / rows, (column + 0.5) / columns
                    center = int((top + bottom) / 2 * rows), int((left + right) / 2 * columns)
                    half = np.hypot((bottom - top) * size[0], (right - left) * size[1]) / 2
                    near = abs(row - center[0]) <= 1 and abs(column - center[1]) <= 1
                    if top < y < bottom and left < x < right and near and low <= half < high:
                        own.append(((bottom - top) * (right - left), n))
                found.append(min(own)[1] if own else None)
    return found


def test_places_belong_to_the_smallest_box_around_them_of_the_sizes_of_their_map():
    boxes = random_boxes(7, 12, 0.1)
    grid = fcos_outputs()[1]
    owner, positive = assign(boxes, np.ones(12, bool), grid, SIZE)
    expected = assign_loop(boxes)
    assert [int(own) if there else None for own, there in zip(owner, positive, strict=True)] == expected
    assert len({*expected}) > 8


@pytest.mark.full
def test_fcos_losses_equal_a_float64_loop_over_places():
    objects = targets(seed=2, count=6)
    outputs, grid = fcos_outputs()
    found = fcos_losses(outputs, objects, grid, SIZE)
    classes, boxes, count = 0.0, 0.0, 0
    for image in range(2):
        for place, own in enumerate(assign_loop(objects.boxes[image])):
            p = 1 / (1 + np.exp(-np.float64(outputs["class"][image, place])))
            for label in range(3):
                right = own is not None and objects.labels[image, own] == label
                classes -= 0.25 * (1 - p[label]) ** 2 * np.log(p[label]) if right else 0.75 * p[label] ** 2 * np.log(1 - p[label])
            if own is not None:
                d, cell, at = (np.float64(x) for x in (outputs["distances"][image, place], grid.cell[place], grid.places[place]))
                box = np.concatenate([at - d[:2] * cell, at + d[2:] * cell])
                boxes, count = boxes + 1 - overlap_loop(box, objects.boxes[image, own])[1], count + 1
    assert count > 10
    np.testing.assert_allclose([found["class"], found["box"]], [classes / count, boxes / count], rtol=1e-4)


def test_fcos_finds_the_objects_that_its_outputs_encode_once_each():
    boxes = np.array([[0.1, 0.1, 0.4, 0.35], [0.5, 0.5, 0.95, 0.9], [0.1, 0.6, 0.4, 0.85]], np.float32)
    objects = detection.targets_of(np.stack([boxes] * 2), np.tile([0, 1, 2], (2, 1)), np.ones((2, 3), bool))
    _, grid = fcos_outputs()
    owner, positive = assign(boxes, np.ones(3, bool), grid, SIZE)
    logits = np.full((2, len(owner), 3), -8.0, np.float32)
    logits[:, np.flatnonzero(positive), np.asarray(owner)[positive]] = 4
    distances = np.maximum(geometry.to_distances(grid.places, boxes[owner]) / jnp.tile(grid.cell, 2), 0.1)
    outputs = {"class": jnp.asarray(logits), "distances": jnp.stack([distances] * 2)}
    assert (np.bincount(np.asarray(owner)[positive]) > 1).all()  # several places find each object
    assert float(fcos_losses(outputs, objects, grid, SIZE)["box"]) < 1e-4
    found = jax.device_get(jax.jit(detection.find_fcos, static_argnums=(2, 3, 4))(outputs, grid, 100, 0.6, 50))
    for i in range(2):
        best = found["scores"][i] > 0.9
        assert as_found(found["boxes"][i][best], found["labels"][i][best]) == as_found(boxes, [0, 1, 2])
        assert (np.diff(found["scores"][i]) <= 0).all()


# --------------------------------------------------------------------------------------------------------------- method


def load(variant="smoke", **changes):
    """(config, method) on an untrained backbone of one small network."""
    config = importlib.import_module("configs.detection").get_config(variant)
    below = importlib.import_module("configs.simclr").get_config("smoke")
    with config.unlocked(), below.unlocked():
        for each in (config, below):
            each.data.image_shape, each.dtype = (48, 48, 3), "float32"
        below.model.encoder.width = 0.125
        config.data.classes.box_label = 3
        config.stages.backbone.config = below
        for key, value in changes.items():
            config.model[key] = value
    return config, build_method(config), Stage(below, build_method(below))


def batch_of(method, seed=0, size=4):
    rng = np.random.default_rng(seed)
    objects = method.inputs["boxes"].shape[0]
    return {
        "image": rng.integers(0, 256, (size, 48, 48, 3), np.uint8),
        "boxes": np.stack([random_boxes(seed + i, objects, 0.1) for i in range(size)]),
        "boxes_valid": np.ones((size, objects), bool),
        "box_label": rng.integers(0, 3, (size, objects)).astype(np.int32),
        **({"box_ignored": np.zeros((size, objects), bool)} if "box_ignored" in method.inputs else {}),
    }


def started(method, below):
    batch = batch_of(method)
    frozen = {"backbone": dict(zip(("params", "mutable"), jax.jit(below.method.init)(jax.random.key(0), batch, {}), strict=True))}
    params, mutable = jax.jit(method.init)(jax.random.key(1), batch, frozen)
    return State(jnp.int32(0), params, {}, mutable, frozen), batch


@pytest.mark.full
@pytest.mark.parametrize("variant", ["smoke", "fcos"])
def test_losses_fall_and_detections_follow_the_contract(variant):
    _, method, below = load(variant, objects=2, detections=30)
    state, batch = started(method, below)
    gradient = jax.jit(jax.value_and_grad(method.phases[0].loss, has_aux=True))
    params, losses = state.params, []
    for _ in range(25):
        (value, (mutable, logs)), grads = gradient(params, state, batch, jax.random.key(0))
        rate = 0.1 / max(np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads))), 1)
        params, state = jax.tree.map(lambda p, g, rate=rate: p - rate * g, params, grads), state._replace(mutable=mutable)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    assert float(logs["objects"]) == 2
    found = jax.device_get(jax.jit(method.fns.detect)(params, {**state.mutable, **state.frozen}, batch["image"]))
    assert {name: x.shape for name, x in found.items()} == {"boxes": (4, 30, 4), "scores": (4, 30), "labels": (4, 30)}
    assert (np.diff(found["scores"]) <= 0).all() and found["scores"].min() >= 0 and found["scores"].max() <= 1
    assert found["boxes"].min() >= 0 and found["boxes"].max() <= 1 and set(np.unique(found["labels"])) <= {0, 1, 2}


@pytest.mark.full
def test_a_frozen_backbone_has_no_parameters_in_the_run_and_a_trained_one_is_a_copy():
    _, method, below = load()
    state, batch = started(method, below)
    assert set(state.params["net"]) == {"head"}
    mutable = {**state.mutable, **state.frozen}
    ours = jax.jit(method.encode)(state.params, mutable, batch["image"])
    weights = state.frozen["backbone"]
    theirs = jax.jit(below.method.encode)(weights["params"], weights["mutable"], batch["image"])
    np.testing.assert_array_equal(ours["pooled"], theirs["pooled"])
    _, method, below = load("smoke", backbone="trained")
    state, batch = started(method, below)
    ours, theirs = state.params["net"]["backbone"], state.frozen["backbone"]["params"]["net"]["encoder"]
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert method.encoder == ("net", "backbone")


@pytest.mark.full
def test_padding_of_a_batch_changes_no_loss_of_the_method():
    _, method, below = load()
    state, batch = started(method, below)
    batch["boxes_valid"][:, 3:] = False
    loss = jax.jit(method.phases[0].loss)
    first = loss(state.params, state, batch, jax.random.key(0))[0]
    batch["boxes"][:, 3:], batch["box_label"][:, 3:] = 0.5, 2
    assert loss(state.params, state, batch, jax.random.key(0))[0] == first


@functools.cache
def shapes_below():
    _, method, below = load()
    return dict(zip(("params", "mutable"), jax.eval_shape(below.method.init, jax.random.key(0), batch_of(method), {}), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(maps=("layer4", "layer2")), "give them from fine to coarse"),
        (dict(maps=("layer9",)), "config.model.layer='layer9' is no map of the backbone"),
        (dict(head=dict(name="points", width=16, stride=8)), "config.model.head.stride=8 makes a grid of 6 x 6 cells"),
        (dict(head=dict(name="fcos", width=12)), "config.model.head.width=12 must be a multiple of 8"),
        (dict(head=dict(name="rcnn")), "config.model.head.name has no 'rcnn'; valid: points, fcos"),
        (dict(backbone="thawed"), "config.model.backbone='thawed' is unknown; choose frozen or trained"),
    ],
)
def test_impossible_heads_are_one_line(changes, message):
    def build():
        method = load("smoke", **changes)[1]
        jax.eval_shape(method.init, jax.random.key(1), batch_of(method), {"backbone": shapes_below()})

    with pytest.raises(UserError, match=message.replace("(", r"\(")) as raised:
        build()
    assert "\n" not in str(raised.value)


def test_unknown_number_of_classes_is_one_line():
    config, *_ = load()
    with config.unlocked():
        config.data.classes.box_label = None
    with pytest.raises(UserError, match=r"give --config.data.classes.box_label=N"):
        build_method(config)


# ----------------------------------------------------------------------------------------------------------- evaluation

NAMES = {"box_label": ("ring", "two words")}


def evaluation(truths, labels, found, ignored=None, split_train=None, **options):
    """The result for images [N, 24, 32] with `truths` [N, M, 4] and `found` {'boxes', 'scores', 'labels'} [N, K]."""
    count = len(truths)
    images = np.arange(count, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 24, 32, 3), np.uint8)
    columns = {"boxes": np.float32(truths), "boxes_valid": np.asarray(truths).max(-1) > 0, "box_label": np.int32(labels)}
    columns |= {} if ignored is None else {"box_ignored": np.asarray(ignored)}
    found = {name: jnp.asarray(x) for name, x in found.items()}

    def detect(images):  # the number of an image is its color
        return {name: x[jnp.minimum(images[:, 0, 0, 0], count - 1)] for name, x in found.items()}

    inputs = ("image", *columns)
    train = columns if split_train is None else {**columns, **split_train}
    context = make_context(
        images, detect=jax.jit(detect), size=4, columns={"train": train, "test": columns}, inputs=inputs, class_names=NAMES
    )
    return evals.run({"d": {"kind": "detection", **options}}, context)["d"]


def two_images(shift=0.0):
    truths = np.array([[[0.1, 0.1, 0.5, 0.5], [0, 0, 0, 0]], [[0.2, 0.2, 0.8, 0.6], [0.5, 0.7, 0.9, 0.95]]])
    labels = np.array([[0, 1], [1, 0]])  # the label of padding counts for nothing
    boxes = np.stack([truths[0][[0, 0]], truths[1]]) + np.array([0, 0, shift, 0])
    return truths, labels, {"boxes": np.float32(boxes), "scores": np.float32([[0.9, 0.0], [0.8, 0.7]]),
                            "labels": np.int32([[0, 1], [1, 0]])}  # fmt: skip


def test_perfect_detections_have_an_average_precision_of_100():
    result = evaluation(*two_images(), voc="11_points")
    expected = {"d/ap": 100, "d/ap50": 100, "d/ap75": 100, "d/ar": 100, "d/ap_small": 100, "d/ap50_ring": 100,
                "d/ap50_two_words": 100, "d/voc_ap50": 100}  # fmt: skip
    assert result.metrics == pytest.approx(expected)
    assert "24x32 pixels" in result.protocol and "voc=11_points" in result.protocol and "\n" not in result.protocol
    assert result.picture.shape[2] == 3 and len(np.unique(result.picture.reshape(-1, 3), axis=0)) > 5


def test_average_precision_of_shifted_detections_equals_that_of_the_library():
    from ssl_jax.evals.lib.average_precision import Found, Truth, coco

    truths, labels, found = two_images(0.1)
    scale = np.array([24, 32, 24, 32])
    expected = coco(
        [Truth(truths[0][:1] * scale, labels[0][:1], np.zeros(1, bool)), Truth(truths[1] * scale, labels[1], np.zeros(2, bool))],
        [Found(found["boxes"][i][: 1 + i] * scale, found["labels"][i][: 1 + i], found["scores"][i][: 1 + i]) for i in range(2)],
        2,
    )
    metrics = evaluation(truths, labels, found).metrics
    assert 10 < metrics["d/ap"] < 90
    for name, ours in (("ap", "ap"), ("ap75", "ap75"), ("ar100", "ar"), ("ap_small", "ap_small")):
        np.testing.assert_allclose(metrics[f"d/{ours}"], 100 * expected.stats[name], rtol=1e-6)


def test_ignored_objects_need_not_be_found():
    truths, labels, found = two_images()
    found["scores"][1, 1] = 0  # the second object of the second image is not found
    assert evaluation(truths, labels, found).metrics["d/ap50_ring"] < 60
    assert evaluation(truths, labels, found, [[False, False], [False, True]]).metrics["d/ap50_ring"] == pytest.approx(100)


def test_only_the_first_examples_are_measured():
    truths, labels, found = two_images()
    metrics = evaluation(truths, labels, found, examples=1).metrics
    assert "d/ap50_ring" in metrics and "d/ap50_two_words" not in metrics


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_without_objects_is_one_line(split):
    truths, labels, found = two_images()
    some, none = ({"boxes_valid": np.full((2, 2), there)} for there in (True, False))
    with pytest.raises(UserError, match=f"needs objects, and no example of {split} has one") as raised:
        evaluation(0 * truths if split == "test" else truths, labels, found, split_train=none if split == "train" else some)
    assert "\n" not in str(raised.value)


def test_a_label_beyond_the_names_is_one_line():
    truths, labels, found = two_images()
    with pytest.raises(UserError, match="'box_label' is 2 somewhere, and the data name 2 classes"):
        evaluation(truths, labels + np.array([[2], [0]]), found)
