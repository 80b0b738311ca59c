"""The evaluation vqa: its floors and groups, questions about other images, its picture, and the published floors of easy-VQA."""

import os
import pathlib
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from ssl_jax.data import render
from ssl_jax.data.catalog import open_data
from ssl_jax.data.pipeline import eval_batches
from ssl_jax.data.vocabulary import Vocabulary, build_vocabulary
from ssl_jax.engine.method import ModelFns, Spec
from ssl_jax.engine.sharding import make_mesh
from ssl_jax.errors import UserError
from ssl_jax.evals import run as evals
from ssl_jax.evals.context import Context, EvaluatedModel
from ssl_jax.evals.kinds import vqa
from ssl_jax.evals.lib.question_pictures import draw

WORDS = ("<padding>", "<unknown>", "?", "bright", "how", "is", "it", "many", "red")
NAMES = ("0", "1", "no", "yes")
IS_BRIGHT, IS_RED, HOW_MANY = (5, 6, 3, 2, 0), (5, 6, 8, 2, 0), (4, 7, 2, 0, 0)
QUESTIONS = np.array([IS_BRIGHT, IS_RED, HOW_MANY], np.int32)


def examples(count, seed):
    """{feature: [count, ...]}: each image is bright or dark, more or less red, and tells the answers of all three questions."""
    rng = np.random.default_rng(seed)
    bright, red, kind = rng.integers(0, 2, count), rng.integers(0, 2, count), rng.integers(0, 3, count)
    image = np.zeros((count, 8, 8, 3), np.uint8)
    image[..., 0], image[..., 1] = (100 * red)[:, None, None], (100 * bright)[:, None, None]
    image[..., 2] = rng.integers(0, 256, (count, 8, 8))
    answer = np.choose(kind, [2 + bright, 2 + red, bright])
    return {"image": image, "question": QUESTIONS[kind], "answer": answer.astype(np.int32)}


def look(batch):
    """A model that answers right, and looks at the top left."""
    bright, red = (batch["image"][:, 0, 0, channel] > 50 for channel in (1, 0))
    asked = jnp.argmax((batch["question"][:, None] == QUESTIONS).all(-1), -1)
    answer = jnp.choose(asked, [2 + bright, 2 + red, 0 + bright], mode="clip")
    attention = jnp.zeros((len(answer), 2, 2)).at[:, 0, 0].set(1)
    return {"logits": jax.nn.one_hot(answer, len(NAMES)), "attention": attention}


def context(train, test, answer=look, size=16, mesh=None, unreadable=()):
    def open_batches(split, names=("image",)):
        data, opened = {"train": train, "test": test}[split], {"image", *names}
        for start in range(0, len(data["answer"]), size):
            rows = np.arange(start, min(start + size, len(data["answer"])))
            fill = size - len(rows)
            valid = np.array([row not in unreadable or "image" not in names for row in rows])
            padded = {name: np.concatenate([data[name][rows], np.zeros((fill, *data[name].shape[1:]), data[name].dtype)])
                      for name in opened & set(names)}  # fmt: skip
            yield {**padded, "_valid": np.pad(valid, (0, fill)), "_index": np.pad(3 * rows, (0, fill)).astype(np.int32)}

    vocabulary = {"question": Vocabulary(WORDS, 4), "answer": Vocabulary(NAMES, 1)}
    fns = ModelFns(answer=jax.jit(answer))
    model = EvaluatedModel(None, {}, fns, ("image", "question", "answer"), vocabulary=vocabulary)
    return Context(None, open_batches, None, mesh, model=model)


def measure(*args, options=(), **kwargs):
    result = evals.run({"vqa": {"kind": "vqa", **dict(options)}}, context(*args, **kwargs))["vqa"]
    return {name.removeprefix("vqa/"): value for name, value in result.metrics.items()}, result


@pytest.mark.full
def test_accuracies_and_floors_equal_a_loop():
    train, test = examples(90, 0), examples(70, 1)
    test["question"][3] = (5, 6, 1, 2, 0)  # of new words: only the majority is known
    test["answer"][5] = -1  # an answer that training lacks
    found, result = measure(train, test)
    counts = Counter(train["answer"].tolist())
    order = train["answer"].tolist()
    majority = min(counts, key=lambda a: (-counts[a], order.index(a)))
    right = {"accuracy": [], "majority": [], "by_question": []}
    given = np.asarray(look(test)["logits"]).argmax(1)
    for row, (question, answer) in enumerate(zip(test["question"].tolist(), test["answer"].tolist(), strict=True)):
        same = Counter(a for q, a in zip(train["question"].tolist(), train["answer"].tolist(), strict=True) if q == question)
        best = min(same, key=lambda a: (-same[a], list(same).index(a))) if same else majority
        for who, guess in (("accuracy", given[row]), ("majority", majority), ("by_question", best)):
            right[who].append(guess == answer)
    yes_no = np.isin(test["answer"], [2, 3])
    count = np.array([q[0] == 4 for q in test["question"].tolist()])
    for who, hits in right.items():
        ends = [""] if who == "majority" else ["", "_yes_no", "_open", "_count", "_other"]
        for end, rows in (("", yes_no | True), ("_yes_no", yes_no), ("_open", ~yes_no), ("_count", count), ("_other", ~count)):
            if end in ends:
                np.testing.assert_allclose(found[who + end], 100 * np.mean(np.array(hits)[rows]), rtol=1e-9)
    assert 95 < found["accuracy"] < 100 and found["margin"] == found["accuracy"] - found["by_question"]
    assert result.protocol == "answers to questions of first of test(70), 4 answers; frequencies of train(90); other images seed=0"


def test_answers_about_other_images_equal_a_loop():
    test = examples(70, 1)
    found, _ = measure(examples(90, 0), test)
    prints = np.asarray(vqa.fingerprint(test["image"])).astype(np.int64)
    partner = vqa.other_images(prints, 0)
    asked = {**test, "question": test["question"][partner]}
    elsewhere = np.asarray(look(asked)["logits"]).argmax(1)
    right = [elsewhere[i] == test["answer"][partner[i]] for i in range(70)]
    np.testing.assert_allclose(found["shuffled"], 100 * np.mean(right), rtol=1e-9)
    assert found["accuracy"] == 100 and 30 < found["shuffled"] < 70
    again, _ = measure(examples(90, 0), test, options={"seed": 1})
    assert again["shuffled"] != found["shuffled"] and again["accuracy"] == 100


@pytest.mark.full
def test_devices_and_batch_sizes_change_no_figure():
    train, test = examples(90, 0), examples(70, 1)
    one, _ = measure(train, test)
    for devices, size in ((8, 16), (2, 64)):
        mesh = make_mesh({"data": -1, "fsdp": 2, "tensor": 1}, jax.devices()[:devices])
        assert measure(train, test, mesh=mesh, size=size)[0] == one


@pytest.mark.full
def test_unreadable_images_are_left_out():
    test = examples(40, 1)
    found, result = measure(examples(90, 0), test, unreadable=(0, 17, 39))
    kept = [row for row in range(40) if row not in (0, 17, 39)]
    expected, _ = measure(examples(90, 0), {name: x[kept] for name, x in test.items()})
    assert found == expected and "test(37)" in result.protocol
    limited, result = measure(examples(90, 0), test, options={"examples": 18}, unreadable=(0, 17, 39))
    expected, _ = measure(examples(90, 0), {name: x[1:17] for name, x in test.items()})
    assert limited == expected and "test(16)" in result.protocol


@pytest.mark.parametrize("images", [2, 5, 64])
def test_every_question_is_asked_about_another_image(images):
    rng = np.random.default_rng(images)
    prints = rng.permutation(np.arange(64) % images)
    partner = vqa.other_images(prints, 3)
    assert sorted(partner) == list(range(64)) and (prints[partner] != prints).all()
    np.testing.assert_array_equal(vqa.other_images(prints, 3), partner)
    with pytest.raises(UserError, match="most test questions are about one image"):
        vqa.other_images(np.append(np.zeros(66, int), prints + 1), 0)


def test_fingerprints_differ_between_images_and_not_between_copies():
    images = np.random.default_rng(0).integers(0, 256, (500, 8, 8, 3), np.uint8)
    images[1] = images[0]
    images[2] = np.flip(images[0], 0)
    images[3], images[3, 0, 0, 0] = images[0], images[0, 0, 0, 0] ^ 1
    prints = np.asarray(vqa.fingerprint(images))
    assert prints[0] == prints[1] and len(set(prints.tolist())) == 499


def test_kind_of_a_question_follows_from_its_words():
    for seed in range(60):
        question, answer = render.question_and_answer(seed % 12, seed % 6, seed % 4, np.random.default_rng(seed))
        names = {"color": render.COLORS, "object": render.CLASSES, "count": "0123", "presence": ("yes", "no")}
        assert answer in names[vqa.kind_of(question)]
    for text, kind in (
        ("How many cubes are left of the ball ?", "count"), ("what is the color of the shape ?", "color"),
        ("is there not a blue shape ?", "presence"), ("what shape is present ?", "object"),
        ("does the image contain a circle ?", "other"), ("what is it made of ?", "object"), ("", "other"),
    ):  # fmt: skip
        assert vqa.kind_of(text) == kind, text


def test_missing_vocabulary_and_data_without_answers_are_one_line():
    opened = context(examples(20, 0), examples(20, 1))
    opened.model = opened.model._replace(vocabulary={"question": Vocabulary(WORDS, 4)})
    with pytest.raises(UserError, match=r"needs the vocabulary of 'answer'; give --config.data.vocabulary.answer=None"):
        evals.check_needs({"vqa": {"kind": "vqa"}}, opened)
    train = examples(20, 0)
    train["answer"][:] = -1
    with pytest.raises(UserError, match="counts answers, and the train split has none"):
        measure(train, examples(20, 1))


def test_picture_shows_eight_questions_with_both_answers():
    test = examples(20, 1)
    test["answer"][0] = -1
    _, result = measure(examples(90, 0), test)
    assert result.picture.dtype == np.uint8 and result.picture.ndim == 3
    images = np.zeros((3, 8, 8, 3), np.uint8)
    texts = [("what is it " * 20, "a", "b"), ("is it ?", "yes", "yes"), ("is it ?", "no", "yes")]
    picture = draw(images, np.ones((3, 2, 2)) / 4, texts)
    green, red = ((picture == color).all(-1).any() for color in ((0, 110, 40), (180, 0, 0)))
    assert green and red and not (draw(images[1:2], np.ones((1, 2, 2)), texts[1:2]) == (180, 0, 0)).all(-1).any()


# --- real data


@pytest.mark.full
def test_floors_of_easy_vqa_are_the_published_ones():
    """66.61 overall, 83.25 for yes and no, 21.71 for open answers; 'no' alone gives 36.0."""
    if not pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "none", "easy_vqa").is_dir():
        pytest.skip("needs easy_vqa, prepared below $TFDS_DATA_DIR")
    config = common.base("vqa")
    config.data.name = "easy_vqa"
    train, test = (open_data(config.data, split) for split in ("train", "test"))
    vocabulary, asked = build_vocabulary(train, ["question", "answer"]), []
    inputs = {"question": Spec((12,), "int32"), "answer": Spec((), "int32")}
    for source in (train, test):
        batches = list(eval_batches(source, (), 256, inputs=inputs, vocabulary=vocabulary))
        rows = [np.concatenate([batch[name][batch["_valid"]] for batch in batches]) for name in ("_index", "question", "answer")]
        asked.append(vqa.Asked(*(x.astype(np.int64) for x in rows)))
    answers = asked[1].answer
    yes_no, found = vqa.by_answer(answers, vocabulary["answer"].tokens)["yes_no"], vqa.most_frequent(*asked)
    majority, by_question = (100 * (each == answers) for each in found)
    figures = [by_question.mean(), by_question[yes_no].mean(), by_question[~yes_no].mean(), majority.mean()]
    np.testing.assert_allclose(figures, [66.61, 83.25, 21.71, 36.0], atol=0.03)
    assert len(answers) == 3986 and len(vocabulary["answer"].tokens) == 13
