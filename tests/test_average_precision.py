"""COCO's and VOC's average precision: twelve golden numbers, pycocotools on random boxes, and cases with a known answer."""

import contextlib
import io

import numpy as np
import pytest

from ssl_jax.evals.lib.average_precision import Found, Truth, coco, overlaps, voc, voc_area

GOLDEN = (
    0.533941037, 0.8676367637, 0.4834983498, 0.4901756247, 0.6315346535, -1,
    0.3482142857, 0.65625, 0.65625, 0.5791666667, 0.725, -1,
)  # fmt: skip  pycocotools 2.0.11


def corners(boxes):
    """(x, y, width, height) -> (ymin, xmin, ymax, xmax)."""
    x, y, w, h = np.asarray(boxes, np.float64).reshape(-1, 4).T
    return np.stack([y, x, y + h, x + w], 1)


def golden_case():
    """Per image: rows (x, y, w, h), label, crowd, area of the truth; rows (x, y, w, h), label, score of the detections."""
    s = lambda i: np.sin(1 + i)  # noqa: E731
    truths, found = [], []
    for image in range(4):
        truth, boxes = [], []
        for j in range(4):
            i, label = 4 * image + j, j % 2
            w, h = np.round([10 + 30 * abs(s(i)), 10 + 40 * abs(s(2 * i + 1))], 3)
            x, y = np.round([50 * abs(s(3 * i + 2)), 40 * abs(s(5 * i + 3))], 3)
            truth.append(((x, y, w, h), label, i == 5, round(w * h, 3)))
            d = 3 * s(7 * i)
            score = round(0.5 + 0.4 * s(11 * i), 4)
            boxes.append((np.round([x + d, y - d, w * (1 + 0.1 * s(i + 0.5)), h], 3), label, score))
            if j == 0:
                boxes.append(((x, y, w, h), 0, 0.3))
            if j == 3:
                boxes.append(((5, 5, 20, 20), 1, 0.6))
        truths.append(truth)
        found.append(boxes)
    return truths, found


def ours(truths, found, classes):
    """`coco` of such rows."""
    return coco(*records(truths, found), classes)


def records(truths, found):
    return [
        Truth(corners([t[0] for t in truth]), np.array([t[1] for t in truth], int), np.array([t[2] for t in truth], bool),
              np.array([t[3] for t in truth], float))
        for truth in truths
    ], [
        Found(corners([b[0] for b in boxes]), np.array([b[1] for b in boxes], int), np.array([b[2] for b in boxes], float))
        for boxes in found
    ]  # fmt: skip


def pycocotools_stats(truths, found, classes):
    """(the twelve numbers, AP50 of each class) of pycocotools."""
    api, evaluation = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    api, rows, detections = api.COCO(), [], []
    for image, (truth, boxes) in enumerate(zip(truths, found, strict=True)):
        for box, label, crowd, area in truth:
            rows.append(dict(id=len(rows) + 1, image_id=image, category_id=label, bbox=list(map(float, box)), area=float(area),
                             iscrowd=int(crowd)))  # fmt: skip
        detections += [
            dict(image_id=image, category_id=label, bbox=list(map(float, box)), score=float(score)) for box, label, score in boxes
        ]
    api.dataset = dict(images=[dict(id=i) for i in range(len(truths))], annotations=rows,
                       categories=[dict(id=i) for i in range(classes)])  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
        found = evaluation.COCOeval(api, api.loadRes(detections), "bbox")
        found.evaluate()
        found.accumulate()
        found.summarize()
    return found.stats, found.eval["precision"][0, :, :, 0, 2].mean(0)


def random_case(seed, images=12, classes=3):
    """Objects of all sizes, crowds among them; detections near objects and anywhere, with equal scores among them."""
    rng = np.random.default_rng(seed)
    truths, found = [], []
    for _ in range(images):
        truth = []
        for _ in range(rng.integers(0, 8)):
            w, h = rng.uniform(5, 150, 2)
            area = w * h * rng.uniform(0.4, 1)  # of a mask
            truth.append(((*rng.uniform(0, 300, 2), w, h), int(rng.integers(classes)), bool(rng.random() < 0.15), area))
        boxes = [
            (np.array(box) + rng.normal(0, 0.06, 4) * np.tile(box[2:], 2), label, round(0.3 + 0.7 * rng.random(), 1))
            for box, label, *_ in truth for _ in range(rng.integers(0, 4))
        ]  # fmt: skip
        boxes += [
            ((*rng.uniform(0, 300, 2), *rng.uniform(5, 150, 2)), int(rng.integers(classes)), round(0.5 * rng.random(), 1))
            for _ in range(rng.integers(0, 8))
        ]
        truths.append(truth)
        found.append([boxes[i] for i in rng.permutation(len(boxes))])
    return truths, found


def test_coco_average_precision_of_the_golden_example():
    truths, found = golden_case()
    np.testing.assert_allclose(list(ours(truths, found, 2).stats.values()), GOLDEN, atol=1e-8)


@pytest.mark.parametrize("seed", range(4))
def test_coco_average_precision_equals_pycocotools_on_random_boxes(seed):
    truths, found = random_case(seed)
    result, (stats, ap50) = ours(truths, found, 3), pycocotools_stats(truths, found, 3)
    np.testing.assert_allclose(list(result.stats.values()), stats, atol=1e-6)
    np.testing.assert_allclose(result.ap50, ap50, atol=1e-6)
    assert 0.05 < result.stats["ap"] < 0.95


def test_only_the_best_hundred_detections_of_a_class_count():
    truth = [(((0, 0, 10, 10), 0, False, 100.0))]
    wrong = [((50, 50, 10, 10), 0, 0.9)] * 100
    assert ours([truth], [[*wrong[:99], ((0, 0, 10, 10), 0, 0.5)]], 1).stats["ar100"] == 1
    assert ours([truth], [[*wrong, ((0, 0, 10, 10), 0, 0.5)]], 1).stats["ar100"] == 0


def test_average_precision_is_minus_one_without_objects_and_zero_without_detections():
    truth = [((0, 0, 10, 10), 0, False, 100.0)]
    result = ours([truth], [[]], 2)
    assert (result.stats["ap"], result.stats["ar100"], result.stats["ap_large"]) == (0, 0, -1)
    assert result.ap50.tolist() == [0, -1]


def test_overlap_of_a_crowd_is_over_the_area_of_the_detection():
    boxes, truth = np.array([[0, 0, 2, 2.0]]), np.array([[0, 0, 4, 4.0], [1, 0, 3, 2], [2, 2, 3, 3]])
    np.testing.assert_allclose(overlaps(boxes, truth)[0], [4 / 16, 2 / 6, 0])
    np.testing.assert_allclose(overlaps(boxes, truth, np.array([True, False, True]))[0], [1, 2 / 6, 0])


def test_voc_average_precision_of_right_wrong_right_by_both_rules():
    right = np.array([True, False, True])
    assert round(voc_area(right, 3, "11_points"), 4) == 0.5455
    assert round(voc_area(right, 3, "all_points"), 4) == 0.5556
    assert voc_area(np.ones(10, bool), 10, "11_points") == voc_area(np.ones(10, bool), 10, "all_points") == 1


def voc_case(found, ignored=(False, False), rule="all_points"):
    truth = Truth(corners([(0, 0, 10, 10), (20, 20, 10, 10)]), np.zeros(2, int), np.array(ignored))
    boxes = Found(corners([box for box, _ in found]), np.zeros(len(found), int), np.array([score for _, score in found]))
    return voc([truth], [boxes], 1, rule)[0]


def test_a_second_detection_of_an_object_is_wrong():
    first, again, second = ((0, 0, 10, 10), 0.9), ((0, 0, 10, 10), 0.8), ((20, 20, 10, 10), 0.7)
    assert voc_case([first, second]) == 1
    np.testing.assert_allclose(voc_case([first, again, second]), 0.5 + 0.5 * 2 / 3)
    truth = [((0, 0, 10, 10), 0, False, 100.0), ((20, 20, 10, 10), 0, False, 100.0)]
    coco_rows = [(box, 0, score) for box, score in (first, again, second)]
    np.testing.assert_allclose(ours([truth], [coco_rows], 1).stats["ap50"], (51 + 50 * 2 / 3) / 101)


def test_a_difficult_object_is_neither_right_nor_wrong():
    hard, other = ((20, 20, 10, 10), 0.9), ((0, 0, 10, 10), 0.8)
    assert voc_case([hard, other], (False, True)) == 1  # as without it
    assert voc_case([other], (False, True)) == 1  # nor does it have to be found
    assert voc_case([hard, hard], (False, True)) == 0
    assert voc_case([hard], (True, True)) == -1
