"""Answers to questions about test images, beside answers without looking: of other images, and of the train split's frequencies.

A number alone says little, because many answers can be guessed from the question (Goyal et al. 2017, arXiv:1612.00837).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.data.vocabulary import PADDING
from ssl_jax.errors import UserError
from ssl_jax.evals.context import Context, Result
from ssl_jax.evals.evaluator import SEED, Evaluator, Option
from ssl_jax.evals.lib.features import extract, side_by_side
from ssl_jax.evals.lib.question_pictures import draw

SHOWN = 8  # questions of the picture
YES_NO = ("yes", "no")
# The kind of a question is the first of these that its words match, else 'other'. The kinds are those of the embedded scenes.
PATTERNS = {
    "color": r"what (is the |is its )?color",
    "count": r"how many|what number",
    "object": r"what (is|shape|object|kind)",
    "presence": r"(is|are) there",
}


class Asked(NamedTuple):
    """Questions of a split, in its order."""

    index: np.ndarray  # int64 [N], of the example in the data, rising
    question: np.ndarray  # int64 [N, T], token ids
    answer: np.ndarray  # int64 [N]; -1: the train split lacks it


def prepare(context: Context, *, examples: int, train_examples: int, **_) -> None:
    """Read the questions, so that one that is too long raises UserError before training; the same for a missing vocabulary."""
    for name in ("question", "answer"):
        if name not in context.model.vocabulary:
            raise UserError(f"the evaluation 'vqa' needs the vocabulary of {name!r}; give --config.data.vocabulary.{name}=None")
    for split, count in (("train", train_examples), ("test", examples)):
        read_questions(context, split, count)


def evaluate(context: Context, *, examples: int = 10_000, train_examples: int = 100_000, seed: int = 0) -> Result:
    """The first `examples` test questions; percent of right answers. An answer that the train split lacks is wrong.

    accuracy: of the model.
    shuffled: of the model where each question is asked about another image of these, drawn once by `seed`.
    by_question: of the most frequent answer to the same question in the train split; to a new question, the majority. It is what can
        be known without looking.
    majority: of the most frequent answer of the train split.
    margin: accuracy - by_question, in points.
    The first three also of groups, as in accuracy_open: yes_no and open (by the true answer), and the kinds of questions in the split
    (by their words, see `PATTERNS`): color, count, object, presence, other.
    """
    train, test = read_questions(context, "train", train_examples), read_questions(context, "test", examples)
    names, words = (context.model.vocabulary[name].tokens for name in ("answer", "question"))
    read, given, prints = answers_of(context, test)
    kept = np.isin(test.index, read)  # an image may be unreadable
    test, given, prints = Asked(*(each[kept] for each in test)), *(each[np.isin(read, test.index)] for each in (given, prints))
    partner = other_images(prints, seed)
    shuffled = np.empty_like(given)
    shuffled[partner] = answers_of(context, test, partner)[1][: len(test.index)]
    majority, by_question = most_frequent(train, test)
    groups = {"": np.ones(len(given), bool), **by_answer(test.answer, names), **by_words(test.question, words)}
    metrics = {}
    for group, rows in groups.items():
        for who, answers in (("accuracy", given), ("shuffled", shuffled), ("by_question", by_question)):
            metrics[f"{who}_{group}" if group else who] = 100 * float((answers == test.answer)[rows].mean())
    metrics["majority"] = 100 * float((majority == test.answer).mean())
    metrics["margin"] = metrics["accuracy"] - metrics["by_question"]
    protocol = (
        f"answers to questions of first of {context.name('test', len(given))}, {len(names)} answers; frequencies of"
        f" {context.name('train', len(train.answer))}; other images seed={seed}"
    )
    return Result(metrics, protocol, picture(context, test, given, names, words))


EVALUATOR = Evaluator(
    evaluate,
    {
        "examples": Option("number of test questions, the first ones", least=2),
        "train_examples": Option("number of train questions whose answers are counted, the first ones", least=1),
        "seed": SEED,
    },
    needs=("answer",),
    data=("question", "answer"),
    smallest={"test": 2},
    prepare=prepare,
)


def read_questions(context: Context, split: str, count: int) -> Asked:
    """The first `count` questions of a split, on every process. Images are not read."""
    cache, key = context.model.cache, ("questions", split, count)
    if key not in cache:
        names = ("question", "answer")
        batches = ({**batch, "image": batch["question"]} for batch in context.batches(split, names))

        @jax.jit
        def rows(question, answer, index):
            return {"rows": in_halves(jnp.concatenate([index[:, None], answer[:, None], question], 1).astype(jnp.int32))}

        whole = from_halves(extract(rows, batches, "rows", context.mesh, context.limit(split, count), ("answer", "_index")).x)
        cache[key] = Asked(whole[:, 0], whole[:, 2:], whole[:, 1])
    return cache[key]


def answers_of(context: Context, asked: Asked, question_of: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """(index of the example in the data, answer of the model, fingerprint of the image), each int64 [N], for readable images.

    About the image of row i of `asked` the question of row `question_of[i]` is asked, int [N]; None: its own.
    """
    own = np.arange(len(asked.index)) if question_of is None else question_of

    def batches() -> Iterator[Mapping[str, np.ndarray]]:
        for batch in context.batches("test", context.model.inputs):
            row = np.minimum(np.searchsorted(asked.index, batch["_index"]), len(own) - 1)  # any, for what is not asked
            yield {**batch, "question": asked.question[own[row]].astype(np.int32)}

    def rows(images, *others):
        *others, index = others
        batch = {"image": images, **dict(zip(context.model.inputs[1:], others, strict=True))}
        answers = jnp.argmax(context.model.fns.answer(batch)["logits"], -1)
        whole = jnp.stack([index.astype(jnp.uint32), answers.astype(jnp.uint32), fingerprint(images)], 1)
        return {"rows": in_halves(whole)}

    names = (*context.model.inputs[1:], "_index")
    return tuple(from_halves(extract(rows, batches(), "rows", context.mesh, len(own), names).x).T)


@jax.jit
def fingerprint(images: jax.Array) -> jax.Array:
    """uint32 [B] of images uint8 [B, H, W, 3]: equal for equal images, hardly ever for others.

    The sum modulo 2**32 of numbers that mix the bits of each value and its place.
    """
    values = images.reshape(len(images), -1).astype(jnp.uint32)
    mixed = (values + 256 * jnp.arange(values.shape[1], dtype=jnp.uint32)) * jnp.uint32(2654435761)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(2246822519)
    return jnp.sum(mixed ^ (mixed >> 13), 1, dtype=jnp.uint32)


@jax.jit
def in_halves(whole: jax.Array) -> jax.Array:
    """Whole numbers [B, N] -> float32 [B, 2 N], which holds their upper and lower 16 bits exactly."""
    return side_by_side(whole >> 16, whole & 0xFFFF)


def from_halves(halves: np.ndarray) -> np.ndarray:
    """The inverse, int64 [B, N]."""
    high, low = np.split(halves.astype(np.int64), 2, axis=1)
    return (high << 16) + low


def other_images(prints: np.ndarray, seed: int) -> np.ndarray:
    """A permutation int [N] that takes no example to one with the same image.

    prints: int [N], equal for equal images. Raises UserError if more than half of the examples have one image.
    """
    generator, count = np.random.default_rng(seed), len(prints)
    _, group, sizes = np.unique(prints, return_inverse=True, return_counts=True)
    most = int(sizes.max())
    if 2 * most > count:
        raise UserError("the evaluation 'vqa' asks about other images, and most test questions are about one image; give more images")
    order = np.lexsort((generator.random(count), generator.permutation(count)[group]))  # image after image, in random order
    partner = np.empty(count, np.int64)
    partner[order] = np.roll(order, -int(generator.integers(most, count - most + 1)))  # farther than the questions about one image
    return partner


def most_frequent(train: Asked, test: Asked) -> tuple[np.ndarray, np.ndarray]:
    """(majority, by_question): answers int [N] to the test questions, see `evaluate`. Ties go to the first in the split."""
    every, counts = Counter(), {}
    for question, answer in zip(map(words_of, train.question), train.answer.tolist(), strict=True):
        if answer >= 0:
            every[answer] += 1
            counts.setdefault(question, Counter())[answer] += 1
    if not every:
        raise UserError("the evaluation 'vqa' counts answers, and the train split has none")
    majority, best = first(every), {question: first(found) for question, found in counts.items()}
    by_question = np.array([best.get(words_of(question), majority) for question in test.question])
    return np.full(len(test.answer), majority), by_question


def first(counts: Counter) -> int:
    """The most frequent answer; of equally frequent ones the one that was counted first."""
    return counts.most_common(1)[0][0]


def words_of(question: np.ndarray) -> tuple[int, ...]:
    """The token ids of a question without padding."""
    return tuple(question[question != PADDING].tolist())


def by_answer(answers: np.ndarray, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """{'yes_no' and 'open': bool [N]} where both exist; {} for data with one of them."""
    is_yes_no = np.isin(answers, [number for number, name in enumerate(names) if name.lower() in YES_NO])
    return {"yes_no": is_yes_no, "open": ~is_yes_no} if 0 < is_yes_no.sum() < len(answers) else {}


def by_words(questions: np.ndarray, words: tuple[str, ...]) -> dict[str, np.ndarray]:
    """{kind: bool [N]} of the kinds of questions that exist, see `PATTERNS`."""
    kinds = np.array([kind_of(text_of(question, words)) for question in questions])
    return {kind: kinds == kind for kind in (*PATTERNS, "other") if (kinds == kind).any()}


def text_of(question: np.ndarray, words: tuple[str, ...]) -> str:
    return " ".join(words[token] for token in words_of(question))


def kind_of(text: str) -> str:
    """The kind of a question by its words: a name of `PATTERNS`, or 'other'."""
    return next((kind for kind, pattern in PATTERNS.items() if re.match(rf"({pattern})\b", text.lower())), "other")


def picture(context: Context, test: Asked, given: np.ndarray, names: tuple[str, ...], words: tuple[str, ...]) -> np.ndarray:
    """uint8 [H, W, 3]: the first questions, their images, and where the model looked."""
    shapes = []

    def rows(batch, _):
        attention = context.model.fns.answer(batch)["attention"]
        shapes[:] = batch["image"].shape[1:], attention.shape[1:]
        return {"rows": side_by_side(batch["image"], attention)}

    found = context.encode_batches(rows, "rows", SHOWN, 0).x
    images, attention = np.split(found, [int(np.prod(shapes[0]))], axis=1)
    texts = [
        (text_of(question, words), names[own], names[true] if true >= 0 else "(not in the train split)")
        for question, own, true in zip(test.question[:SHOWN], given, test.answer, strict=False)  # the first only
    ]
    return draw(images.reshape(-1, *shapes[0]).astype(np.uint8), attention.reshape(-1, *shapes[1]), texts)
