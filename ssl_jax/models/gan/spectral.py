"""Spectral normalization (Miyato et al. 2018, arXiv:1802.05957) with its power iteration as explicit state.

The state is the collection 'spectral', separate from batch statistics, which are recomputed and averaged by other rules. It depends
on kernels and previous state only, so it is equal on all devices and needs no averaging.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.models.common import Conv

EPSILON = 1e-12  # added to the norms in the power iteration


def _unit(x: jax.Array) -> jax.Array:
    return x / (jnp.linalg.norm(x) + EPSILON)


@jax.default_matmul_precision("highest")
def power_step(kernel: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One iteration on kernel [..., C_out] as a matrix [-1, C_out]: (estimate of its largest singular value, new u [C_out]).

    All products are float32 in full precision on every accelerator, for any type of the network.

    The estimate v^T W u is differentiable with respect to W; the vectors are constants. It never exceeds the true value.
    """
    w = kernel.reshape(-1, kernel.shape[-1]).astype(jnp.float32)
    left = _unit(jax.lax.stop_gradient(w) @ u)
    right = _unit(left @ jax.lax.stop_gradient(w))
    return left @ w @ right, right


class _Spectral(nn.Module):
    """Divides the kernel of a layer by its spectral norm; subclasses define the layer.

    With train=True each call advances the iteration by one step. With train=False the step is used but not stored, so that moving
    averages of weights are divided by their own norm; the estimate is then half a step ahead of training.
    """

    features: int
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.orthogonal()
    dtype: jnp.dtype = jnp.float32

    def _normalized(self, shape: tuple[int, ...], train: bool, name: str = "kernel") -> jax.Array:
        kernel = self.param(name, self.kernel_init, shape, jnp.float32)
        u = self.variable("spectral", "u", lambda: _unit(jax.random.normal(self.make_rng("params"), (shape[-1],))))
        sigma, new = power_step(kernel, u.value)
        if train and not self.is_initializing():
            u.value = new
        return (kernel / sigma).astype(self.dtype)

    def _with_bias(self, x: jax.Array) -> jax.Array:
        if not self.use_bias:
            return x
        return x + self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)


class SpectralDense(_Spectral):
    """x [..., C] -> [..., features]."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        kernel = self._normalized((x.shape[-1], self.features), train)
        return self._with_bias(jnp.matmul(x.astype(self.dtype), kernel, precision="highest"))


class SpectralEmbed(_Spectral):
    """Integer labels [...] -> rows [..., features] of a table [classes, features], normalized as a matrix."""

    classes: int = 1

    @nn.compact
    def __call__(self, labels: jax.Array, train: bool) -> jax.Array:
        return self._normalized((self.classes, self.features), train, "embedding")[labels]


class SpectralConv(_Spectral):
    """x [B, H, W, C] -> [B, H / stride, W / stride, features], 'SAME' padding.

    As published, the norm is that of the [kernel * kernel * C, features] matrix: up to `kernel` times smaller than the operator
    norm of the convolution.
    """

    kernel: int = 3
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        w = self._normalized((self.kernel, self.kernel, x.shape[-1], self.features), train)
        conv = Conv(self.features, (self.kernel, self.kernel), strides=self.stride, use_bias=False, dtype=self.dtype, parent=None)
        return self._with_bias(conv.apply({"params": {"kernel": w}}, x))
