"""Egomotion: how did the camera move between two views? A softmax over bins for each axis of the motion.

Agrawal et al. 2015, "Learning to see by moving" (arXiv:1505.01596), section 3. One encoder sees each view by itself (their base
CNN), and a head reads the features of both (their top CNN). Pairs come with the data, or are windows of single images after known
motions (`ssl_jax.augment.motions`), as in their experiment on digits. A motion is that of the second camera in the frame of the
first, which no change of the world's frame alters; the difference of two poses in the world is not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.augment import motions
from ssl_jax.augment.pixels import to_float
from ssl_jax.engine.method import Method, ModelFns, Phase, Spec
from ssl_jax.engine.pretext import pretext_network
from ssl_jax.errors import UserError
from ssl_jax.models.build import build as build_by_name
from ssl_jax.objectives.classification import cross_entropy

SYNTHETIC = "for pairs of windows of single images take --config=configs/egomotion.py:synthetic"


def of_data(image_shape, length: int = 4):
    """Pairs of the data: features image, image2 and motion, `length` numbers."""
    inputs = {"image": Spec(image_shape), "image2": Spec(image_shape), "motion": Spec((length,), "float32")}

    def draw(batch, key):
        return to_float(jnp.stack([batch["image"], batch["image2"]], 1)), batch["motion"]

    return inputs, draw, length


def synthetic(image_shape, size: int, start, limits, whole_pixels: bool = False):
    """Two windows of `size` pixels of each image: after a motion within `start` [4], and after one more within `limits` [4]."""
    motions.check_interior(image_shape[-3:-1], size, motions.composed_limits(start, limits))

    def draw(batch, key):
        keys, count = jax.random.split(key), len(batch["image"])
        motion = motions.draw_motions(keys[1], count, limits, whole_pixels)
        return motions.two_windows(batch["image"], motions.draw_motions(keys[0], count, start), motion, size), motion

    return {"image": Spec(image_shape)}, draw, 4


PAIRS = {"data": of_data, "synthetic": synthetic}


def build(config, stages) -> Method:
    """`config.model`: pairs (a name in `PAIRS` and its arguments), axes (for each of the first numbers of a motion its name, limit and
    number of bins, see `bin_motions`); encoder, layer, embed, head, mean and std (see `pretext_network`).
    """
    model, shape = config.model, tuple(config.data.image_shape)
    inputs, draw, length = build_by_name(PAIRS, "pairs", model.pairs, image_shape=shape)
    names, limits, bins = zip(*model.axes, strict=True)
    if len(names) > length or len(set(names)) < len(names):
        raise UserError(f"config.model.axes={tuple(names)} are not different names of the {length} numbers of a motion; give those")
    starts = [sum(bins[:axis]) for axis in range(len(bins))]
    network = pretext_network(config, sum(bins))

    def answers_of(motion):
        return motions.bin_motions(motion[:, : len(names)], limits, bins)

    def both(features):
        return features.reshape(len(features), 1, -1)  # one row [B, 1, 2 D] for all axes

    def logits_of(net, stats, views, train):
        """({axis: logits [B, bins]}, new statistics)"""
        features, stats = network.read(net, stats, views, train)
        logits, stats = network.answer(net, stats, both(features), train)
        return {name: logits[:, 0, start : start + size] for name, start, size in zip(names, starts, bins, strict=True)}, stats

    def init(key, batch, frozen):
        keys = jax.random.split(key, 5)
        net, stats = network.init(keys[1:], draw(batch, keys[0])[0], both)
        return {"net": net}, {"batch_stats": stats}

    def loss(train, state, batch, key):
        views, motion = draw(batch, key)
        logits, stats = logits_of(train["net"], state.mutable["batch_stats"], views, train=True)
        total, logs = 0.0, {}
        for axis, (name, answers) in enumerate(zip(names, answers_of(motion).T, strict=True)):
            value, own = cross_entropy(logits[name], answers)
            total += value
            logs |= {f"accuracy_{name}": own["accuracy"], f"chance_{name}": jnp.float32(1 / bins[axis])}
        return total, ({"batch_stats": stats}, logs)

    def asked(params, mutable, batch, key):
        """({axis: logits [B, bins]}, motions [B, ...]) in inference mode."""
        views, motion = draw(batch, key)
        return logits_of(params["net"], mutable["batch_stats"], views, train=False)[0], motion

    def pretext(params, mutable, batch, key):
        logits, motion = asked(params, mutable, batch, key)
        return {
            name: {"logits": logits[name][:, None], "answers": answers[:, None]}
            for name, answers in zip(names, answers_of(motion).T, strict=True)
        }

    def motion_fn(params, mutable, batch, key):
        """The mean of the centers of the bins, with the probability of each."""
        logits, motion = asked(params, mutable, batch, key)
        found = {}
        for axis, (name, limit, size) in enumerate(model.axes):
            centers = limit * ((2 * jnp.arange(size) + 1) / size - 1)
            found[name] = {"predicted": jax.nn.softmax(logits[name]) @ centers, "true": motion[:, axis]}
        return found

    return Method(
        inputs=inputs,
        init=init,
        phases=(Phase("ssl", ("net",), loss),),
        encode=network.encode,
        views=None if "image2" in inputs else lambda images, key: draw({"image": images}, key)[0],
        fns=ModelFns(pretext=pretext, motion=motion_fn),
        encoder=("net", "encoder"),
        reads=network.reads,
        absent=dict.fromkeys(("image2", "motion"), SYNTHETIC),
    )
