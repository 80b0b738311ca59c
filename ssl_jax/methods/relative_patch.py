"""Relative patch location: in which of eight directions from the center patch does the other patch lie?

Doersch et al. 2015, "Unsupervised visual representation learning by context prediction" (arXiv:1505.05192). One encoder sees both
patches of a pair by themselves. Gaps and jitter keep it from matching edges, and color operations from reading the place in the
photograph off the aberration of the lens. As in Kolesnikov et al. 2019 (arXiv:1901.09005) the pairs of an image are the center
of a 3 x 3 grid and its eight neighbors, so each of the nine patches passes the encoder once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.augment.tiles import DIRECTIONS, neighbor_pairs
from ssl_jax.engine.method import Method
from ssl_jax.engine.pretext import Task, mosaic, pretext_method, tile_views
from ssl_jax.errors import UserError

CENTER = 4  # of a 3 x 3 grid
BLANK = 0.9  # gray level of the places that a picture leaves empty


def build(config, stages) -> Method:
    """`config.model`: grid (3), tile, jitter and tile_operations (see `tile_views`); encoder, layer, embed, head, standardize or mean
    and std (see `pretext_method`). `config.views`: one recipe for the whole image.
    """
    if config.model.grid != 3:
        raise UserError(f"config.model.grid={config.model.grid}: a patch has eight neighbors on a grid of 3, so give 3")
    views = tile_views(config)
    first, second, direction = (x[neighbor_pairs(3, 3)[0] == CENTER] for x in neighbor_pairs(3, 3))

    def ask(images, key):
        """Answers are directions: 0 up left, 1 up, ... 7 down right."""
        patches = views(images, key)
        return patches, jnp.broadcast_to(direction, (len(patches), len(direction)))

    def join(features, answers):
        """The center's features, then the neighbor's."""
        return jnp.concatenate([features[:, first], features[:, second]], -1)

    def draw(patches, answers, given):
        """Both patches of a pair in their places, and with the neighbor where the given answer puts it."""

        def picture(directions):
            place = jax.nn.one_hot(jnp.asarray(second)[directions], 9)[..., None, None, None]  # neighbors are in order of direction
            center = jax.nn.one_hot(CENTER, 9)[:, None, None, None]
            return mosaic(place * patches[:, second, None] + center * patches[:, first, None] + BLANK * (1 - place - center))

        return jnp.stack([picture(answers), picture(given)], 2)

    return pretext_method(config, Task(len(DIRECTIONS), ask, join, draw))
