"""RotNet: by how many quarter turns was the image rotated? To tell, a network has to know how things usually stand.

Gidaris et al. 2018, "Unsupervised representation learning by predicting image rotations" (arXiv:1803.07728). Every image of a batch
is seen in all orientations. Images are mirrored before they are rotated, never after. `ssgan` gives its discriminator the same
task.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.augment.rotation import rotations
from ssl_jax.engine.method import Method
from ssl_jax.engine.pretext import Task, one_view, pretext_method
from ssl_jax.errors import UserError


def build(config, stages) -> Method:
    """`config.model`: turns, the numbers of counterclockwise quarter turns to tell apart, (0, 1, 2, 3) or two of them; encoder, layer,
    embed, head, mean and std (see `pretext_method`). `config.views`: one recipe, which ends in a square.
    """
    turns, view = tuple(config.model.turns), one_view(config)
    if len(set(turns)) < 2 or len(set(turns)) < len(turns) or not set(turns) <= {0, 1, 2, 3}:
        raise UserError(f"config.model.turns={turns}: give two to four different numbers of quarter turns, such as (0, 1, 2, 3)")

    def ask(images, key):
        """An answer is a place in `turns`."""
        return rotations(view(images, key), turns)

    def join(features, answers):
        return features  # one question for each view

    def draw(views, answers, given):
        """The rotated image, and the image turned back by the given answer."""
        back = jnp.stack([jnp.rot90(views, -k, axes=(2, 3)) for k in turns])  # [answers, B, V, h, w, 3]
        chosen = jax.nn.one_hot(given, len(turns), axis=0)[..., None, None, None]
        return jnp.stack([views, jnp.sum(back * chosen, axis=0)], axis=2)

    return pretext_method(config, Task(len(turns), ask, join, draw))
