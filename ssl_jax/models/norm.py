"""Batch normalization, with the sum and the ReLU that follow it, under one rule of differentiation."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp


class BatchNorm(nn.Module):
    """Batch normalization (Ioffe and Szegedy 2015, arXiv:1502.03167): [..., C] -> [..., C].

    Statistics are float32 and over all axes but the last, of the global batch, because the step is one global program.
    Momentum 0.9 is PyTorch's 0.1. The running variance is biased; PyTorch's is unbiased (times n / (n - 1) with
    n = batch * height * width). Parameters 'scale' and 'bias', and batch statistics 'mean' and 'var', are as in Flax's BatchNorm.

    Fields:
      relu: followed by a ReLU.
      dtype: of the result; parameters and statistics are float32.
    """

    use_running_average: bool
    relu: bool = False
    dtype: jnp.dtype = jnp.float32
    use_scale: bool = True
    use_bias: bool = True
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        """`residual`, of the shape of x, is added before the ReLU."""
        width = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(width, jnp.float32))
        var = self.variable("batch_stats", "var", lambda: jnp.ones(width, jnp.float32))
        scale = self.param("scale", self.scale_init, width, jnp.float32) if self.use_scale else jnp.ones(width, jnp.float32)
        bias = self.param("bias", self.bias_init, width, jnp.float32) if self.use_bias else jnp.zeros(width, jnp.float32)
        if self.use_running_average:
            return _affine(x, mean.value, jax.lax.rsqrt(var.value + self.epsilon), scale, bias, residual, self.relu, self.dtype)
        y, batch_mean, batch_var = _normalize(x, residual, scale, bias, self.relu, self.epsilon, self.dtype)
        if not self.is_initializing():
            mean.value = self.momentum * mean.value + (1 - self.momentum) * jax.lax.stop_gradient(batch_mean)
            var.value = self.momentum * var.value + (1 - self.momentum) * jax.lax.stop_gradient(batch_var)
        return y


def _affine(x, mean, rstd, scale, bias, residual, relu, dtype):
    y = (x.astype(jnp.float32) - mean) * (rstd * scale) + bias
    if residual is not None:
        y = y + residual.astype(jnp.float32)
    return (jnp.maximum(y, 0) if relu else y).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _normalize(x, residual, scale, bias, relu, epsilon, dtype):
    """(y, mean, variance). Nothing is differentiated through the statistics that are returned."""
    return _forward(x, residual, scale, bias, relu, epsilon, dtype)[0]


def _forward(x, residual, scale, bias, relu, epsilon, dtype):
    axes = tuple(range(x.ndim - 1))
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axes)
    var = jnp.maximum(jnp.mean(x32 * x32, axes) - mean * mean, 0.0)  # both sums in one pass over x
    rstd = jax.lax.rsqrt(var + epsilon)
    y = _affine(x, mean, rstd, scale, bias, residual, relu, dtype)
    # Where ReLU was active is seen from x, unless a residual was added.
    return (y, mean, var), (x, residual, y if relu and residual is not None else None, scale, bias, mean, rstd)


def _backward(relu, epsilon, dtype, kept, cotangents):
    """With x' the normalized x and sums over pixels: dx = rstd * scale * (g - sum(g) / n - x' * sum(g * x') / n)."""
    x, residual, y, scale, bias, mean, rstd = kept
    axes, n = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    g = cotangents[0].astype(jnp.float32)
    normalized = (x.astype(jnp.float32) - mean) * rstd
    if relu:
        g = jnp.where((normalized * scale + bias if y is None else y) > 0, g, 0)
    sum_g, sum_gx = jnp.sum(g, axes), jnp.sum(g * normalized, axes)
    dx = (rstd * scale) * (g - sum_g / n - normalized * (sum_gx / n))
    return dx.astype(x.dtype), None if residual is None else g.astype(residual.dtype), sum_gx, sum_g


_normalize.defvjp(_forward, _backward)
