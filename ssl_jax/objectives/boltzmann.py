"""Restricted Boltzmann machines: visible units v in [0, 1], hidden units that are binary or normal, no connections within a side.

A machine is {'kernel': W [V, H], 'hidden_bias': c [H], 'visible_bias': b [V]} with p(v_i = 1 | h) = sigmoid(b + W h)_i and, given
m = c + v W, either p(h_j = 1 | v) = sigmoid(m)_j or h_j ~ N(m_j, 1). Everything is float32.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

Machine = Mapping[str, jax.Array]


def hidden(machine: Machine, v: jax.Array, normal: bool = False) -> jax.Array:
    """Means of the hidden units given v [B, V] -> [B, H]: probabilities where they are binary."""
    m = machine["hidden_bias"] + v @ machine["kernel"]
    return m if normal else jax.nn.sigmoid(m)


def visible(machine: Machine, h: jax.Array) -> jax.Array:
    """Probabilities of the visible units given h [B, H] -> [B, V]."""
    return jax.nn.sigmoid(machine["visible_bias"] + h @ machine["kernel"].T)


def free_energy(machine: Machine, v: jax.Array, normal: bool = False) -> jax.Array:
    """-log of the sum (integral) of exp(-energy) over hidden states, but for what does not depend on v: [B, V] -> [B].

    Its gradient for the weights is minus v times the mean of h given v.
    """
    m = machine["hidden_bias"] + v @ machine["kernel"]
    of_hidden = 0.5 * m**2 if normal else jax.nn.softplus(m)
    return -v @ machine["visible_bias"] - of_hidden.sum(-1)


def contrastive_divergence(machine: Machine, v: jax.Array, key: jax.Array, normal: bool = False) -> tuple[jax.Array, jax.Array]:
    """CD-1 (Hinton 2002, "Training products of experts by minimizing contrastive divergence"): (surrogate [B], v' [B, V]).

    The update <v h> of the data minus <v h> of what one step of the chain v -> h -> v' made of them is the gradient of no function. It
    is that of free energy of v minus free energy of v' where v' is held fixed, which is what this returns: a loss to be descended,
    whose value means little. h is drawn, v' are probabilities, as in Hinton and Salakhutdinov 2006.
    """
    fixed = jax.lax.stop_gradient(dict(machine))
    mean = hidden(fixed, v, normal)
    drawn = mean + jax.random.normal(key, mean.shape) if normal else jax.random.bernoulli(key, mean).astype(jnp.float32)
    again = visible(fixed, drawn)
    return free_energy(machine, v, normal) - free_energy(machine, again, normal), again
