"""Jigsaw puzzles: the tiles of an image are shuffled by one of N permutations; by which?

Noroozi and Favaro 2016, "Unsupervised learning of visual representations by solving jigsaw puzzles" (arXiv:1603.09246). One encoder
sees each tile by itself; only the head sees all nine, in their shuffled order. Features of shuffled tiles are shuffled features, so
each tile passes the encoder once for several puzzles of its image (as in Kolesnikov et al. 2019, arXiv:1901.09005).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ssl_jax.augment.permutations import inverse_permutations, permutation_set, permute
from ssl_jax.engine.method import Method
from ssl_jax.engine.pretext import Task, mosaic, pretext_method, tile_views


def build(config, stages) -> Method:
    """`config.model`: grid, tile, jitter and tile_operations (see `tile_views`); permutations, dict(kind=, count=) (see
    `permutation_set`); puzzles, how many of each image; encoder, layer, embed, head, standardize or mean and std (see
    `pretext_method`). `config.views`: one recipe for the whole image.
    """
    model, views = config.model, tile_views(config)
    permutations = permutation_set(model.permutations.kind, model.permutations.count, model.grid**2)
    inverse = inverse_permutations(permutations)

    def shuffled(tiles, rows, answers):
        """[B, N, ...] and answers [B, Q] -> [B, Q, N, ...]"""
        return jax.vmap(permute, (None, None, 1), 1)(tiles, rows, answers)

    def ask(images, key):
        """Views are the tiles in their places; an answer is the number of a permutation."""
        views_key, answers_key = jax.random.split(key)
        keys = jax.vmap(lambda example: jax.random.fold_in(answers_key, example))(jnp.arange(len(images)))
        draw_answers = jax.vmap(lambda k: jax.random.randint(k, (model.puzzles,), 0, len(permutations)))
        return views(images, views_key), draw_answers(keys)

    def join(features, answers):
        """Features of all tiles, in the order of the puzzle."""
        return shuffled(features, permutations, answers).reshape(*answers.shape, -1)

    def draw(tiles, answers, given):
        """The puzzle, and the tiles put back as the given answer says."""
        puzzles = shuffled(tiles, permutations, answers)
        solved = jax.vmap(permute, (1, None, 1), 1)(puzzles, inverse, given)
        return jnp.stack([mosaic(puzzles), mosaic(solved)], 2)

    return pretext_method(config, Task(len(permutations), ask, join, draw))
