"""Questions and answers as numbers: CLEVR a question at a time, answers that are phrases or labels, and bad input."""

import numpy as np
import pytest
from small_data import picture_feature, png, prepare

from ssl_jax.data.features import Feature, mismatch
from ssl_jax.data.pipeline import TrainBatches, eval_batches
from ssl_jax.data.reader import Reader
from ssl_jax.data.sources import open_source
from ssl_jax.data.vocabulary import Vocabulary, build_vocabulary
from ssl_jax.engine.method import Method, Spec
from ssl_jax.errors import UserError
from ssl_jax.experiment.vocabulary import check_lengths

COLORS_8 = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")
ANSWERS = ("yes", "no", *map(str, range(11)), *COLORS_8, "cube", "sphere", "cylinder", "rubber", "metal", "small", "large")


@pytest.fixture(scope="module")
def clevr_dir(tmp_path_factory):
    """TFDS's clevr with images of ten, ten and eight questions, whose answers are all 28; TFDS orders them as it likes."""
    import tensorflow_datasets as tfds

    root = tmp_path_factory.mktemp("clevr")
    text = tfds.features.Text()
    features = {"image": picture_feature(), "question_answer": tfds.features.Sequence({"question": text, "answer": text})}

    def row(image, start, count):
        return {
            "image": png(image),
            "question_answer": [{"question": f"What about thing {n}?", "answer": ANSWERS[n]} for n in range(start, start + count)],
        }

    test = [{"image": png(9), "question_answer": [{"question": "Strange words?", "answer": "orange"}]}]
    prepare(root, "clevr", features, {
        "train": [row(0, 0, 10), row(1, 10, 10), row(2, 20, 8)], "validation": test, "gap": [row(3, 0, 0), row(0, 0, 10)],
        "many": [row(4, 0, 11)],
    })  # fmt: skip
    return str(root)


def test_vocabulary_of_clevr_has_28_answers_and_each_question_is_an_example(clevr_dir):
    source = open_source("clevr/questions", "train", clevr_dir)
    assert len(source) == 30 and {name: each.kind for name, each in source.features.items()} == {
        "image": "image", "question": "text", "answer": "phrase"
    }  # fmt: skip
    vocabulary = build_vocabulary(source, ["question", "answer"])
    assert len(vocabulary["answer"].tokens) == 28 and set(vocabulary["answer"].tokens) == set(ANSWERS)
    inputs = {"image": Spec((16, 16, 3)), "question": Spec((6,), "int32"), "answer": Spec((), "int32")}
    seen, pictures = [], {}
    for batch in eval_batches(source, (), 8, inputs=inputs, vocabulary=vocabulary):
        for row in np.flatnonzero(batch["_valid"]):
            words = [vocabulary["question"].tokens[token] for token in batch["question"][row] if token]
            assert words[:3] == ["what", "about", "thing"]
            seen.append(int(words[3]))
            assert vocabulary["answer"].tokens[batch["answer"][row]] == ANSWERS[seen[-1]]
            pictures.setdefault(seen[-1] // 10, set()).add(batch["image"][row].tobytes())
    assert sorted(seen) == [*range(20), 20, 20, 21, 21, *range(22, 28)]  # the image with eight repeats its first two
    assert [len(pictures[image]) for image in range(3)] == [1, 1, 1] and len(set.union(*pictures.values())) == 3


def test_image_without_questions_is_left_out(clevr_dir):
    source = open_source("clevr/questions", "gap", clevr_dir)
    vocabulary = build_vocabulary(source, ["question", "answer"])
    assert len(vocabulary["answer"].tokens) == 10
    batches = eval_batches(source, (), 20, inputs={"image": None, "answer": Spec((), "int32")}, vocabulary=vocabulary)
    (batch,) = batches
    assert batch["_valid"].sum() == 10 and set(batches.skipped.values()) == {"the image has no questions"}


def test_epoch_of_clevr_asks_every_question_once(clevr_dir):
    source = open_source("clevr/questions", "train", clevr_dir)
    vocabulary = build_vocabulary(source, ["question", "answer"])
    inputs = {"image": None, "question": Spec((6,), "int32"), "answer": Spec((), "int32")}
    batches = TrainBatches(source, (), 5, 0, inputs=inputs, vocabulary=vocabulary)
    answers = np.concatenate([batches[step]["answer"] for step in range(6)])
    assert sorted(set(answers)) == list(range(28)) and len(answers) == 30 and not np.array_equal(answers, np.sort(answers))


def test_answers_and_words_that_training_lacks(clevr_dir):
    vocabulary = build_vocabulary(open_source("clevr/questions", "train", clevr_dir), ["question", "answer"])
    inputs = {"question": Spec((6,), "int32"), "answer": Spec((), "int32")}
    (batch,) = eval_batches(open_source("clevr/questions", "validation", clevr_dir), (), 10, inputs=inputs, vocabulary=vocabulary)
    assert set(batch["answer"]) == {-1}
    assert batch["question"][0].tolist() == [1, 1, vocabulary["question"].tokens.index("?"), 0, 0, 0]


def test_bad_questions_are_one_line(clevr_dir):
    train = open_source("clevr/questions", "train", clevr_dir)
    vocabulary = build_vocabulary(train, ["question", "answer"])
    with pytest.raises(UserError, match=r"'clevr/questions', question 0 of image 0: 'question' has 5 words, more than the declared 4"):
        Reader(train, (), {"question": Spec((4,), "int32")}, vocabulary).read(0, (0, 0))
    with pytest.raises(UserError, match="input 'question' has 4 tokens; the longest text has 5"):
        check_lengths(Method({"question": Spec((4,), "int32"), "answer": Spec((), "int32")}, None, (), None), vocabulary)
    with pytest.raises(UserError, match="question 0 of image 0 has 11 questions; an image of CLEVR has at most 10"):
        open_source("clevr/questions", "many", clevr_dir)[0]
    with pytest.raises(UserError, match=r"config\.data\.features and kinds are fixed for 'clevr/questions'"):
        open_source("clevr/questions", "train", clevr_dir, kinds={"answer": "text"})


def test_names_of_classes_are_the_vocabulary_of_a_label():
    source = open_source("scenes/tiny", "train")
    found = build_vocabulary(source, ["answer"])["answer"]
    assert found == Vocabulary(source.class_names["answer"], 1) and len(found.tokens) == 24
    assert found.tokens[:2] == ("yes", "no")


def test_text_where_a_class_is_asked_for_names_the_remedy():
    features = {"answer": Feature((None,), "int32", "text"), "image": Feature((8, 8, 3), "uint8", "image")}
    reason = mismatch({"answer": ((), "int32")}, features)
    assert reason.endswith("it is text of several words; --config.data.kinds.answer=phrase makes each text one class")
    raw = {"answer": Feature((), "object", "phrase")}
    assert "add the key 'answer' to config.data.vocabulary" in mismatch({"answer": ((), "int32")}, raw)
