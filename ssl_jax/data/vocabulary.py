"""Texts as token ids: 0 is padding, 1 an unknown word, then the words of the train split in sorted order.

A phrase is one class as a whole, and so is a label: its number counts from 0, and -1 is a phrase that the train split lacks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ssl_jax.data.decode import CorruptImage
from ssl_jax.data.sources import Source
from ssl_jax.errors import UserError

PADDING, UNKNOWN = 0, 1
SPECIAL = ("<padding>", "<unknown>")
_WORD = re.compile(r"\w+|[^\w\s]")


class Vocabulary(NamedTuple):
    """Vocabulary of one feature: of words (from 2 on, see `SPECIAL`), or of phrases or names of classes (from 0 on).

    Token i is `tokens[i]`; `longest` counts the tokens of the longest text in the train split, 1 for phrases and classes.
    """

    tokens: tuple[str, ...]
    longest: int


def split_words(text: str | bytes) -> list[str]:
    """Lowercase words; each punctuation mark is one word."""
    return _WORD.findall(as_phrase(text).lower())


def as_phrase(text: str | bytes) -> str:
    """The whole text, as it is."""
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)


def build_vocabulary(source: Source, names: Sequence[str]) -> dict[str, Vocabulary]:
    """{name: vocabulary} of the features `names`: texts, phrases, or labels, whose classes the data name.

    Reads the source once, without its images; not if all of them are labels.

    Raises:
      UserError: an unknown feature, or one that has no words.
    """
    kinds = {name: source.features[name].kind if name in source.features else "missing" for name in names}
    for name, kind in kinds.items():
        if kind not in ("text", "phrase") and name not in source.class_names:
            texts = [n for n, feature in source.features.items() if feature.kind in ("text", "phrase")]
            there = ", ".join([*texts, *source.class_names]) or "no texts"
            raise UserError(f"config.data.vocabulary: '{name}' of data '{source.name}' is {kind}; there are {there}")
    read = [name for name in names if name not in source.class_names]
    words, longest, texts = {name: set() for name in read}, dict.fromkeys(read, 0), source.select(tuple(read))
    for index in range(len(texts) if read else 0):
        try:
            example = texts[index]
        except CorruptImage:  # the pipeline names it when it reads the image
            continue
        for name in read:
            for text in np.asarray(example[name], object).ravel():
                found = [as_phrase(text)] if kinds[name] == "phrase" else split_words(text)
                words[name].update(found)
                longest[name] = max(longest[name], len(found))
    special = {name: () if kinds[name] == "phrase" else SPECIAL for name in read}
    found = {name: Vocabulary((*special[name], *sorted(words[name])), longest[name]) for name in read}
    return {name: found[name] if name in found else Vocabulary(source.class_names[name], 1) for name in names}


class Tokenizer:
    """text -> int32 [length], padded with 0."""

    def __init__(self, vocabulary: Vocabulary):
        self._ids = {word: i for i, word in enumerate(vocabulary.tokens)}

    def __call__(self, text: str | bytes, length: int, where: str = "a text") -> np.ndarray:
        """Raises UserError, which begins with `where`, for a text with more words than `length`."""
        out = np.full(length, PADDING, np.int32)
        ids = [self._ids.get(word, UNKNOWN) for word in split_words(text)]
        if len(ids) > length:
            raise UserError(f"{where} has {len(ids)} words, more than the declared {length}; declare more")
        out[: len(ids)] = ids
        return out


class Numbers:
    """phrase -> its number in the vocabulary, int32; -1 for a phrase that the train split lacks."""

    def __init__(self, vocabulary: Vocabulary):
        self._ids = {phrase: i for i, phrase in enumerate(vocabulary.tokens)}

    def __call__(self, phrase: str | bytes) -> np.ndarray:
        return np.asarray(self._ids.get(as_phrase(phrase), -1), np.int32)


def to_json(vocabulary: Mapping[str, Vocabulary]) -> dict:
    return {name: {"tokens": list(each.tokens), "longest": each.longest} for name, each in vocabulary.items()}


def from_json(values: Mapping) -> dict[str, Vocabulary]:
    return {name: Vocabulary(tuple(each["tokens"]), each["longest"]) for name, each in values.items()}
