"""Spectral clustering of a symmetric affinity matrix (Shi and Malik 2000; Ng, Jordan and Weiss 2002)."""

from __future__ import annotations

import warnings

import numpy as np
import scipy.linalg
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning


def eigenvectors(affinity: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(values [count], vectors [N, count]), smallest first, of the normalized Laplacian I - D^-1/2 A D^-1/2.

    affinity: [N, N], 0 or larger; the mean of it and its transpose is used, in float64. The smallest value is 0, once for each
    component of the graph. A node without any affinity has its own.
    """
    weights = (affinity + affinity.T).astype(np.float64) / 2
    scale = 1 / np.sqrt(np.maximum(weights.sum(1), 1e-12))
    laplacian = np.eye(len(weights)) - scale[:, None] * weights * scale
    return scipy.linalg.eigh(laplacian, subset_by_index=(0, count - 1))


def fiedler_vector(affinity: np.ndarray) -> np.ndarray:
    """The second eigenvector [N], each entry divided by the root of its node's degree: its sign cuts the graph in two."""
    degree = np.maximum((affinity.sum(0) + affinity.sum(1)) / 2, 1e-12)
    return eigenvectors(affinity, 2)[1][:, 1] / np.sqrt(degree)


def segments(affinity: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """int32 [N]: `count` clusters of the nodes by k-means of the first eigenvectors, whose rows have length 1."""
    _, vectors = eigenvectors(affinity, count)
    rows = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different nodes than clusters
        return KMeans(count, n_init=4, random_state=seed).fit_predict(rows).astype(np.int32)
