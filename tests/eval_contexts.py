"""Small image sets and evaluation contexts for tests."""

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.engine.method import ModelFns
from ssl_jax.evals.context import Context, EvaluatedModel, Extractor


def smooth(seed, count, size=12, gray=False):
    """uint8 [count, size, size, 3] with few large principal components."""
    generator = np.random.default_rng(seed)
    basis = np.random.default_rng(99).standard_normal((6, size * size * 3)) * np.linspace(3, 1, 6)[:, None]
    x = 127 + 12 * generator.standard_normal((count, 6)) @ basis + 6 * generator.standard_normal((count, size * size * 3))
    x = x.reshape(count, size, size, 3)
    return np.clip(np.round(np.repeat(x[..., :1], 3, -1) if gray else x), 0, 255).astype(np.uint8)


def make_context(train, test=None, encode=None, labels=None, size=16, mesh=None, columns=None, **functions):
    """A context of images; the padding of the last batch has extreme values. `opened` lists the passes over the data."""
    images, labels = {"train": train, "test": train if test is None else test}, labels or {}
    opened = []

    def open_batches(split, names=()):
        opened.append(split)
        extra = {name: columns[split][name] for name in names if name in (columns or {}).get(split, ())}
        for start in range(0, len(images[split]), size):
            part = images[split][start : start + size]
            fill = size - len(part)
            own = labels.get(split, np.full(len(images[split]), -1))[start : start + size]
            yield {
                "image": np.concatenate([part, np.full((fill, *part.shape[1:]), 255, part.dtype)]),
                "label": np.concatenate([own, np.full(fill, 7)]).astype(np.int32),
                "_valid": np.arange(size) < len(part),
                **{name: np.resize(x[start : start + size], (size, *x.shape[1:])) for name, x in extra.items()},
            }

    fns = {name: functions.pop(name) for name in ModelFns._fields if name in functions}
    encode = encode or jax.jit(lambda x: {"pooled": x.reshape(len(x), -1).astype(jnp.float32)})
    context = Context(encode, open_batches, None, mesh, model=EvaluatedModel(None, {}, ModelFns(**fns))._replace(**functions))
    context.opened = opened
    return context


def levels(images):
    return images.astype(np.float64) / 255


to_floats = jax.jit(lambda x: x / 255.0 if x.dtype == jnp.uint8 else x)


def means(spec="means", mode="none"):
    return Extractor(spec, 3, jax.jit(lambda images: {"pooled": jnp.mean(images.astype(jnp.float32), (1, 2))}), 0, "f" * 64, mode)
