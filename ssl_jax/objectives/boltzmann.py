"""Restricted Boltzmann machines with visible units v in [0, 1] and binary or normal hidden units h.

A machine is {'kernel': W [V, H], 'hidden_bias': c [H], 'visible_bias': b [V]} with p(v_i = 1 | h) = sigmoid(b + W h)_i and, given
m = c + v W, either p(h_j = 1 | v) = sigmoid(m)_j or h_j ~ N(m_j, 1). Everything is float32, with
products in full precision on every accelerator.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

Machine = Mapping[str, jax.Array]


@jax.default_matmul_precision("highest")
def hidden(machine: Machine, v: jax.Array, normal: bool = False) -> jax.Array:
    """Means of the hidden units given v [B, V] -> [B, H]; for binary units, the probabilities."""
    m = machine["hidden_bias"] + v @ machine["kernel"]
    return m if normal else jax.nn.sigmoid(m)


@jax.default_matmul_precision("highest")
def visible(machine: Machine, h: jax.Array) -> jax.Array:
    """Probabilities of the visible units given h [B, H] -> [B, V]."""
    return jax.nn.sigmoid(machine["visible_bias"] + h @ machine["kernel"].T)


@jax.default_matmul_precision("highest")
def free_energy(machine: Machine, v: jax.Array, normal: bool = False) -> jax.Array:
    """-log of the sum (integral) of exp(-energy) over hidden states, up to a constant: [B, V] -> [B].

    Its gradient with respect to the kernel is -v times the mean of h given v.
    """
    m = machine["hidden_bias"] + v @ machine["kernel"]
    hidden_term = 0.5 * m**2 if normal else jax.nn.softplus(m)
    return -v @ machine["visible_bias"] - hidden_term.sum(-1)


def contrastive_divergence(machine: Machine, v: jax.Array, key: jax.Array, normal: bool = False) -> tuple[jax.Array, jax.Array]:
    """CD-1 (Hinton 2002, "Training products of experts by minimizing contrastive divergence"): (surrogate [B], v' [B, V]).

    One step of the chain v -> h -> v' samples h and takes the probabilities of v', as in Hinton and Salakhutdinov 2006. The
    update, <v h> of the data minus <v h> of v', is the negative gradient of F(v) - F(v') with v' held constant. That difference
    of free energies is the surrogate loss; its value has no meaning.
    """
    fixed = jax.lax.stop_gradient(dict(machine))
    mean = hidden(fixed, v, normal)
    h = mean + jax.random.normal(key, mean.shape) if normal else jax.random.bernoulli(key, mean).astype(jnp.float32)
    reconstructed = visible(fixed, h)
    return free_energy(machine, v, normal) - free_energy(machine, reconstructed, normal), reconstructed
