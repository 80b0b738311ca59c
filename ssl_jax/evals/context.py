"""The input of an evaluator: cached features by split and layer, and the functions of the model. It hides the method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ssl_jax.data.vocabulary import Vocabulary
from ssl_jax.engine.method import ModelFns
from ssl_jax.engine.sharding import put_global
from ssl_jax.errors import UserError
from ssl_jax.evals.lib.features import Features, extract, pixel_encode

Split = Literal["train", "test"]
AnySplit = Literal["train", "test", "bank"]  # the bank trains classifiers; it is the train split unless the data name another
OpenBatches = Callable[..., Iterable[Mapping[str, np.ndarray]]]  # (split) or (split, feature names) -> batches
PIXEL_LAYERS = ("pooled", "normalized")  # the layers of `pixel_encode`


class Result(NamedTuple):
    """The result of one evaluation."""

    metrics: dict[str, float]  # accuracies in percent
    protocol: str  # one line; two numbers are comparable only if their protocols agree
    picture: np.ndarray | None = None  # uint8 [H, W, 3]


class Extractor(NamedTuple):
    """A fixed network that maps images to features for comparison."""

    name: str
    dim: int
    encode: Callable  # uint8 [B, H, W, 3] of any size -> {'pooled': float32 [B, dim]}; with classes also 'logits': [B, classes]
    classes: int = 0  # 0: no logits
    sha256: str = ""  # checksum of the weights; '' without a weight file
    resize: str = "none"  # how `encode` resizes images for the network


class EvaluatedModel(NamedTuple):
    """The functions of a model that evaluations use beside its features; None where the method does not provide one."""

    extractor: Callable[[str, str], Extractor]  # (specification, resize) -> the network
    cache: dict  # results that do not change within a run, such as features of real images
    fns: ModelFns = ModelFns()  # functions of the method with params and mutable bound: fns.reconstruct(images)
    inputs: tuple[str, ...] = ("image",)  # the features of the data in a batch of the method, the image first
    codes: int | None = None  # size of the codebook
    class_names: Mapping[str, tuple[str, ...]] = {}  # {feature: names of its classes}, of the features that declare them
    samples: Callable | None = None
    # (count, seed, truncation[, labels]) -> uint8 batches [B, H, W, 3]; `labels` int [count] replace the sampled ones
    sampled_labels: Callable | None = None  # (count, seed) -> int32 [count]: the classes that `samples` are conditioned on
    vocabulary: Mapping[str, Vocabulary] = {}  # {feature: words of a text, or names of classes} of `config.data.vocabulary`
    between: Callable | None = None  # (space, seed, t [N] in [0, 1]) -> float32 batches [B, H, W, 3] in about [0, 1]: decoded
    # latents at position t of the path between two random latents

    def offered(self, name: str) -> Any:
        """The field `name` of this record or of `fns`; None where the method does not provide it."""
        return getattr(self.fns if name in ModelFns._fields else self, name)


class Context:
    """Cached features of one frozen encoder.

    encode: a jitted function with parameters bound, images uint8 [B, H, W, 3] -> {layer: array}.
    open_batches: 'train', 'bank' or 'test' -> batches with 'image', '_valid' and, for labeled data, 'label'. Images are not
        augmented. With feature names as second argument, batches have those features and '_valid'.
    split_names: {'train': ..., 'test': ...}, the names of the splits in the data set, for the protocol. Without 'bank' the train
        split is the bank.
    limits: {'train': n, 'test': n} uses only the first n examples, and the protocol says so. The order of the data must then not
        follow the classes.
    layers: the layers to choose from; an evaluation that asks for another gets the first. None: those of the encoder.
    encode_views: (images uint8 [B, H, W, 3], key) -> [B, V, D], features of V augmented views; None: alignment is not measured.
    model: None for features without a model, such as raw pixels; evaluations that need a model are skipped.
    notes: facts about the model that every protocol names, {'tokenizer': 'trained with ...'}.
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
        model: EvaluatedModel | None = None,
        notes: Mapping[str, str] | None = None,
    ):
        self.mesh, self.layers, self.model, self.notes = mesh, layers, model, dict(notes or {})
        self.encode, self._open_batches, self._encode_views = encode, open_batches, encode_views
        self._split_names = dict(split_names or {"train": "train", "test": "test"})
        self._limits = dict(limits or {})
        self._features: dict[tuple[str, str], Features] = {}
        self._views: dict[tuple[int, int], np.ndarray] = {}
        self._images: jax.ShapeDtypeStruct | None = None

    def features(self, split: AnySplit, layer: str = "pooled") -> Features:
        """x [N, D], y [N] of a split. The first call encodes; later calls read the cache."""
        split = self.own(split)
        if (split, layer) not in self._features:
            batches = self.batches(split)
            self._features[split, layer] = extract(self.encode, batches, layer, self.mesh, self.limit(split))
        return self._features[split, layer]

    def name(self, split: AnySplit, count: int | None = None) -> str:
        """'train(50000)', or 'train[:8000](8000)' where a limit applies; None: the examples that `features` has encoded."""
        split = self.own(split)
        if count is None:
            count = next(len(features.y) for (done, _), features in self._features.items() if done == split)
        limited = f"[:{count}]" if count == self._limits.get(split) else ""
        return f"{self._split_names[split]}{limited}({count})"

    def limit(self, split: AnySplit, count: int | None = None) -> int | None:
        """The number of examples to use, at most `count`; None: all."""
        return min((n for n in (count, self._limits.get(self.own(split))) if n is not None), default=None)

    def own(self, split: AnySplit) -> AnySplit:
        """`split`; 'train' for a bank that is the train split."""
        return "train" if split == "bank" and "bank" not in self._split_names else split

    def batches(self, split: AnySplit, names: Sequence[str] | None = None) -> Iterable[Mapping[str, np.ndarray]]:
        """Batches of this process with the features `names` of the data (None: images and labels) and '_valid' [B].

        Lists have the length that the method declares; `NAME_valid` marks their valid rows, as in training batches.

        Raises:
          UserError: the data have no such feature; the message lists their features.
        """
        split = self.own(split)
        return self._open_batches(split) if names is None else self._open_batches(split, tuple(names))

    def encode_with(
        self, encode: Callable, split: AnySplit, layer: str, count: int | None = None, names: Sequence[str] = ()
    ) -> Features:
        """Output `layer` of another function than the encoder, for all images of a split or the first `count`; not cached.

        `names`: features of the data that `encode` takes after the images, such as ("label",).
        """
        read = None if set(names) <= {"label"} else ("image", *names)
        return extract(encode, self.batches(split, read), layer, self.mesh, self.limit(split, count), names)

    def columns(self, split: AnySplit, names: Sequence[str], count: int) -> dict[str, np.ndarray]:
        """{name: [N, ...]}: numeric features of the first `count` examples, on every process. Integers must be below 2**24."""
        first = next(iter(self.batches(split, ("image", *names))))
        sizes = [int(np.prod(first[name].shape[1:])) for name in names]

        @jax.jit
        def side_by_side(images, *columns):
            return {"all": jnp.concatenate([x.reshape(len(x), -1).astype(jnp.float32) for x in columns], 1)}

        rows = self.encode_with(side_by_side, split, "all", count, names).x
        parts = np.split(rows, np.cumsum(sizes)[:-1], axis=1)
        return {
            name: part.reshape(len(part), *first[name].shape[1:]).astype(first[name].dtype)
            for name, part in zip(names, parts, strict=True)
        }

    def with_batch_keys(self, function: Callable, seed: int) -> Callable:
        """Bind the keys of (images, key, ...) -> ... for one call of `encode_with`; batch i has the key fold_in(key(seed), i)."""

        def with_key(images, *others):
            nonlocal batch
            numbers = np.array([seed, batch], np.uint32)
            whole = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())
            key = _batch_key(jax.device_put(numbers) if whole is None else put_global(numbers, whole))
            batch += 1
            return function(images, key, *others)

        batch = 0
        return with_key

    def encode_batches(self, function: Callable, layer: str, count: int | None, seed: int) -> Features:
        """Output `layer` of (batch, key) -> {layer: array} for the first `count` test examples; not cached.

        A batch has the inputs of the method. That of number i has the key fold_in(key(seed), i).
        """
        names = self.model.inputs[1:]

        def of_columns(images, key, *others):
            return function({"image": images, **dict(zip(names, others, strict=True))}, key)

        return self.encode_with(self.with_batch_keys(of_columns, seed), "test", layer, count, names)

    def images(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype of a batch of images, for `jax.eval_shape`."""
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
            # One flat row per example, so that `extract` handles sharding, padding and counting.
            views = self._encode_views(images, key)
            shape.append(views.shape[1:])
            return {"views": views.reshape(len(views), -1)}

        shape = []
        flat = extract(self.with_batch_keys(rows, seed), self.batches("test"), "views", self.mesh, examples).x
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
    """Raw pixels as features: layer 'pooled' in [0, 1], layer 'normalized' with ImageNet mean and std removed.

    Evaluations of any other layer get 'pooled', so that every config has a pixel baseline.
    """
    return Context(pixel_encode, open_batches, split_names, mesh, None, limits, PIXEL_LAYERS)


def require_labels(bank: Features, what: str) -> None:
    """Raises UserError if a bank cannot train a classifier: its labels are missing (negative), or it has one class."""
    if bank.y.min() < 0:
        raise UserError(f"{what} needs labels and the train split has none; give --config.data.bank_split=NAME of a labeled split")
    if bank.y.min() == bank.y.max():
        raise UserError(f"{what} needs at least two classes in the train split; check the split and its limit")
