"""Texts as token ids: 0 is padding, 1 an unknown word, then the words of the train split in sorted order."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from ssl_jax.data.sources import Source
from ssl_jax.errors import UserError

PADDING, UNKNOWN = 0, 1
SPECIAL = ("<padding>", "<unknown>")
_WORD = re.compile(r"\w+|[^\w\s]")


class Vocabulary(NamedTuple):
    """Vocabulary of one feature. Token i is `tokens[i]`; `longest` counts the tokens of the longest text in the train split."""

    tokens: tuple[str, ...]
    longest: int


def split_words(text: str | bytes) -> list[str]:
    """Lowercase words; each punctuation mark is one word."""
    return _WORD.findall((text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)).lower())


def build_vocabulary(source: Source, names: Sequence[str]) -> dict[str, Vocabulary]:
    """{name: vocabulary} of the text features `names`. Reads the source once, without its images.

    Raises:
      UserError: an unknown feature, or one that is not text.
    """
    for name in names:
        kind = source.features[name].kind if name in source.features else "missing"
        if kind != "text":
            texts = ", ".join(n for n, feature in source.features.items() if feature.kind == "text") or "no texts"
            raise UserError(f"config.data.vocabulary: '{name}' of data '{source.name}' is {kind}; there are {texts}")
    words, longest, texts = {name: set() for name in names}, dict.fromkeys(names, 0), source.select(tuple(names))
    for index in range(len(texts) if names else 0):
        example = texts[index]
        for name in names:
            for text in np.asarray(example[name], object).ravel():
                found = split_words(text)
                words[name].update(found)
                longest[name] = max(longest[name], len(found))
    return {name: Vocabulary((*SPECIAL, *sorted(words[name])), longest[name]) for name in names}


class Tokenizer:
    """text -> int32 [length], padded with 0. Longer texts, which other splits may have, are truncated."""

    def __init__(self, vocabulary: Vocabulary):
        self._ids = {word: i for i, word in enumerate(vocabulary.tokens)}

    def __call__(self, text: str | bytes, length: int) -> np.ndarray:
        out = np.full(length, PADDING, np.int32)
        ids = [self._ids.get(word, UNKNOWN) for word in split_words(text)[:length]]
        out[: len(ids)] = ids
        return out


def to_json(vocabulary: Mapping[str, Vocabulary]) -> dict:
    return {name: {"tokens": list(each.tokens), "longest": each.longest} for name, each in vocabulary.items()}


def from_json(values: Mapping) -> dict[str, Vocabulary]:
    return {name: Vocabulary(tuple(each["tokens"]), each["longest"]) for name, each in values.items()}
