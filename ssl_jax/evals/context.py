"""What an evaluator sees: features by split and layer, computed once, and nothing of the method behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssl_jax.engine.sharding import put_global
from ssl_jax.errors import UserError
from ssl_jax.evals.lib.features import Features, extract, pixel_encode

Split = Literal["train", "test"]
OpenBatches = Callable[..., Iterable[Mapping[str, np.ndarray]]]  # (split) or (split, names of features) -> batches


class Result(NamedTuple):
    """What an evaluator returns."""

    metrics: dict[str, float]  # accuracies in percent
    protocol: str  # one line: everything that has to agree before two numbers may be compared
    picture: np.ndarray | None = None  # uint8 [H, W, 3], where one tells more than the numbers


class Extractor(NamedTuple):
    """A fixed network whose features pictures are compared in."""

    name: str
    dim: int
    encode: Callable  # uint8 [B, H, W, 3], any size -> {'pooled': float32 [B, dim], and 'logits': float32 [B, classes] if there are}
    classes: int = 0
    sha256: str = ""  # of the weights; '' where there are none
    resize: str = "none"  # how `encode` brings images to the size of the network


class EvaluatedModel(NamedTuple):
    """What evaluations of a model are given beside its features; None where its method does not offer it.

    Images are uint8 [B, H, W, 3] or float32 in [0, 1]; pictures float32 [B, h, w, 3] in [0, 1].
    """

    samples: Callable | None  # (count, seed, truncation[, labels]) -> uint8 batches [B, H, W, 3]; labels [count] instead of those drawn
    judge: Callable | None  # uint8 [B, H, W, 3] -> logits [B]: how real an image is
    extractor: Callable[[str, str], Extractor]  # (specification, resize) -> the network
    known: dict  # features of real images: they do not change within a run
    reconstruct: Callable | None = None  # images -> pictures: what the code of an image gives
    log_prob: Callable | None = None  # (images, key, k) -> {'elbo': [B], 'iwae': [B]} in nats, ['dimensions': scalar]
    tokens: Callable | None = None  # images -> int32 [B, h, w] below `codes`
    codes: int | None = None  # size of the codebook
    decode: Callable | None = None  # tokens -> pictures
    token_nll: Callable | None = None  # (images, labels [B]) -> {'nll': [B] nats summed over tokens, 'tokens': int32 [B, T]}
    traverse: Callable | None = None  # (images [N, ...], values [V]) -> pictures [N, Z, V, h, w, 3]
    sampled_labels: Callable | None = None  # (count, seed) -> int32 [count]: the classes that `samples` were made for
    between: Callable | None = None  # (space, seed, place [N]) -> float32 batches [B, H, W, 3] of about [0, 1], on the ways of latents


class Context:
    """Cached features of one frozen encoder.

    encode: jitted and bound to its parameters, images uint8 [B, H, W, 3] -> {layer: array}.
    open_batches: 'train' (bank) or 'test' (query) -> batches with 'image', 'label' (where there are some) and '_valid', without
        augmentation; with names of features as second argument, batches with those and '_valid'.
    split_names: {'train': ..., 'test': ...} as the data calls them, for the protocol.
    limits: {'train': n, 'test': n} uses the first n examples only, and the protocol says so; the data must come in an
        order that does not follow the classes then.
    layers: the layers to choose from; an evaluation that asks for another gets the first. None: the encoder's own.
    encode_views: (images uint8 [B, H, W, 3], key) -> [B, V, D], features of V augmented views; None: no alignment.
    pictures: None for features that belong to no model, such as raw pixels; evaluations of pictures are left out.
    notes: what every protocol has to name of the model, {'tokenizer': 'trained with ...'}.
    """

    def __init__(
        self,
        encode: Callable,
        open_batches: OpenBatches,
        split_names: Mapping[str, str] | None = None,
        mesh: Mesh | None = None,
        encode_views: Callable | None = None,
        limits: Mapping[str, int] | None = None,
        layers: tuple[str, ...] | None = None,
        pictures: EvaluatedModel | None = None,
        notes: Mapping[str, str] | None = None,
    ):
        self.mesh, self.layers, self.pictures, self.notes = mesh, layers, pictures, dict(notes or {})
        self.encode, self._open_batches, self._encode_views = encode, open_batches, encode_views
        self._split_names = dict(split_names or {"train": "train", "test": "test"})
        self._limits = dict(limits or {})
        self._features: dict[tuple[str, str], Features] = {}
        self._views: dict[tuple[int, int], np.ndarray] = {}
        self._images: jax.ShapeDtypeStruct | None = None

    def features(self, split: Split, layer: str = "pooled") -> Features:
        """x [N, D], y [N] of a split; the first call encodes, later ones are free."""
        if (split, layer) not in self._features:
            batches = self.batches(split)
            self._features[split, layer] = extract(self.encode, batches, layer, self.mesh, self.limit(split))
        return self._features[split, layer]

    def name(self, split: Split) -> str:
        """'train(50000)', or 'train[:8000](8000)' where a limit applies; call after `features`."""
        return self.named(split, next(len(features.y) for (done, _), features in self._features.items() if done == split))

    def named(self, split: Split, count: int) -> str:
        """The same for `count` examples that were read by `through`."""
        limited = f"[:{count}]" if count == self._limits.get(split) else ""
        return f"{self._split_names[split]}{limited}({count})"

    def limit(self, split: Split, count: int | None = None) -> int | None:
        """How many examples to use of those that are there, at most `count`; None: all."""
        return min((n for n in (count, self._limits.get(split)) if n is not None), default=None)

    def batches(self, split: Split, names: Sequence[str] | None = None) -> Iterable[Mapping[str, np.ndarray]]:
        """Batches of this process with the features `names` of the data (None: images and labels) and '_valid' [B].

        Lists are as long as the method declares them; `NAME_valid` says which rows are there, as for methods.

        Raises:
          UserError: the data have no such feature; the line lists what they have.
        """
        return self._open_batches(split) if names is None else self._open_batches(split, tuple(names))

    def through(
        self, encode: Callable, split: Split, layer: str, count: int | None = None, names: Sequence[str] = ()
    ) -> Features:
        """Features of the images of a split, all of them or the first `count`, by another function than the encoder; not kept.

        `names`: features of the data that `encode` is given after the images, such as ("label",).
        """
        asked = None if set(names) <= {"label"} else ("image", *names)
        return extract(encode, self.batches(split, asked), layer, self.mesh, self.limit(split, count), names)

    def columns(self, split: Split, names: Sequence[str], count: int) -> dict[str, np.ndarray]:
        """{name: [N, ...]} of numbers of the data, of the first `count` examples, on every process; whole numbers below 2**24."""
        first = next(iter(self.batches(split, ("image", *names))))
        sizes = [int(np.prod(first[name].shape[1:])) for name in names]

        @jax.jit
        def side_by_side(images, *columns):
            return {"all": jnp.concatenate([x.reshape(len(x), -1).astype(jnp.float32) for x in columns], 1)}

        rows = self.through(side_by_side, split, "all", count, names).x
        parts = np.split(rows, np.cumsum(sizes)[:-1], axis=1)
        return {
            name: part.reshape(len(part), *first[name].shape[1:]).astype(first[name].dtype)
            for name, part in zip(names, parts, strict=True)
        }

    def keyed(self, function: Callable, seed: int) -> Callable:
        """A function for one use in `through` out of (images, key, ...) -> ...; the key of batch i is fold_in(key(seed), i)."""

        def with_key(images, *others):
            nonlocal batch
            numbers = np.array([seed, batch], np.uint32)
            whole = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())
            key = _batch_key(jax.device_put(numbers) if whole is None else put_global(numbers, whole))
            batch += 1
            return function(images, key, *others)

        batch = 0
        return with_key

    def images(self) -> jax.ShapeDtypeStruct:
        """Shape and type of a batch of images, for `jax.eval_shape`."""
        if self._images is None:
            images = next(iter(self.batches("test")))["image"]
            self._images = jax.ShapeDtypeStruct(images.shape, images.dtype)
        return self._images

    def views(self, examples: int = 1024, seed: int = 0) -> np.ndarray | None:
        """Features [N, V, D] of augmented views of the first test images, N <= `examples`; None without `encode_views`.

        The key of batch i is fold_in(key(seed), i).
        """
        if self._encode_views is None:
            return None
        if (examples, seed) not in self._views:
            self._views[examples, seed] = self._extract_views(examples, seed)
        return self._views[examples, seed]

    def _extract_views(self, examples, seed):
        def rows(images, key):
            # One flat row per example: placement, padding and counting stay those of `extract`.
            views = self._encode_views(images, key)
            shape.append(views.shape[1:])
            return {"views": views.reshape(len(views), -1)}

        shape = []
        flat = extract(self.keyed(rows, seed), self.batches("test"), "views", self.mesh, examples).x
        return flat.reshape(len(flat), *shape[0])


@jax.jit
def _batch_key(numbers):
    return jax.random.fold_in(jax.random.key(numbers[0]), numbers[1])


def pixel_context(
    open_batches: OpenBatches,
    split_names: Mapping[str, str] | None = None,
    mesh: Mesh | None = None,
    limits: Mapping[str, int] | None = None,
) -> Context:
    """Raw pixels behind the same interface: layer 'pooled' in [0, 1], 'normalized' without ImageNet mean and std.

    Evaluations of any other layer are given 'pooled', so that the floor can be measured for every config.
    """
    return Context(pixel_encode, open_batches, split_names, mesh, None, limits, ("pooled", "normalized"))


def require_labels(bank: Features, what: str) -> None:
    """UserError when a bank cannot train a classifier: labels missing (negative), or only one class."""
    if bank.y.min() < 0:
        raise UserError(f"{what} needs labels and the train split has none; use kind='representation' instead")
    if bank.y.min() == bank.y.max():
        raise UserError(f"{what} needs at least two classes in the train split; check the split and its limit")
