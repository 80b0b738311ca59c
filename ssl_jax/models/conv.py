"""Convolutions with fast gradients on CPUs (elsewhere XLA's own), and transposed convolutions without inserted zeros."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

LAYOUT = ("NHWC", "HWIO", "NHWC")
CHUNK_BYTES = 4 * 2**20  # of unfolded patches: larger chunks leave the cache, smaller ones make matrix products inefficient
LARGEST_KERNEL = 7  # side; each position adds one slice to the compiled program


def conv(x, kernel, strides, padding, *, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count, precision):
    """`lax.conv_general_dilated` with a faster gradient on CPUs, for the field `conv_general_dilated` of Flax's Conv.

    XLA's CPU backend computes the weight gradient as a convolution over the batch and transposes both operands element by element,
    which takes two fifths of a ResNet step. For stride 2 it computes the input gradient on an input with three quarters zeros.

    The rules `_weight_gradient` and `_input_gradient` replace these gradients if the program is compiled for a CPU, the ambient
    mesh has one device (or there is none), and the convolution of x [B, H, W, C] with kernel [h, w, C, F] has no dilation and no
    groups. Several devices are excluded because chunks of a sharded batch would have to be gathered.

    The rules are reverse-mode differentiable to any order, but have no forward mode: `jax.jvp` raises TypeError.
    """
    layout = lax.conv_dimension_numbers(x.shape, kernel.shape, LAYOUT) if x.ndim == 4 else None
    simple = (
        dimension_numbers == layout
        and feature_group_count == 1
        and {*lhs_dilation, *rhs_dilation} == {1}
        and max(kernel.shape[:2]) <= LARGEST_KERNEL
    )
    if not simple or jax.sharding.get_abstract_mesh().size > 1:
        return lax.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            feature_group_count,
            precision=precision,
        )
    strides = tuple(strides)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    return _conv(x, kernel, strides, tuple((int(low), int(high)) for low, high in padding), precision)


def conv_transpose(x: jax.Array, kernel: jax.Array, stride: int = 2) -> jax.Array:
    """Transposed convolution with 'SAME' padding: x [B, H, W, C], kernel [h, w, C, F] -> [B, stride H, stride W, F].

    Equals PyTorch's ConvTranspose2d (kernel 4, stride 2, padding 1) and the gradient of a convolution with the same kernel, not
    flipped: pixel p of x adds kernel[i] to pixel stride * p + i - (h - stride) // 2 of the output. Computed as one convolution
    whose features are the phases of the stride, which multiplies no zeros and has fast gradients.
    """
    height, width = x.shape[1:3]
    shape = (x.shape[0], height * stride, width * stride, kernel.shape[-1])
    padding = lax.padtype_to_pads(shape[1:3], kernel.shape[:2], (stride, stride), "SAME")
    convolve = _plain if jax.sharding.get_abstract_mesh().size > 1 else _conv
    kernel = kernel.swapaxes(2, 3)
    return _input_gradient(x, kernel, shape, strides=(stride, stride), padding=padding, precision=None, convolve=convolve)


def _plain(x, kernel, strides, padding, precision):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=LAYOUT, precision=precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x, kernel, strides, padding, precision):
    return _plain(x, kernel, strides, padding, precision)


def _forward(x, kernel, strides, padding, precision):
    return _plain(x, kernel, strides, padding, precision), (x, kernel)


def _backward(strides, padding, precision, residuals, g):
    x, kernel = residuals
    default_dx = jax.linear_transpose(lambda x: _plain(x, kernel, strides, padding, precision), x)
    default_dkernel = jax.linear_transpose(lambda kernel: _plain(x, kernel, strides, padding, precision), kernel)
    options = dict(strides=strides, padding=padding, precision=precision)

    def on_cpu(x, kernel, g):
        if strides == (1, 1):
            around = tuple((size - 1 - low, size - 1 - high) for size, (low, high) in zip(kernel.shape[:2], padding, strict=True))
            dx = _conv(g, kernel[::-1, ::-1].swapaxes(2, 3), (1, 1), around, precision)
        else:
            dx = _input_gradient(g, kernel, x.shape, convolve=_conv, **options)
        return dx, _weight_gradient(x, g, size=kernel.shape[:2], **options)

    return lax.platform_dependent(x, kernel, g, cpu=on_cpu, default=lambda x, kernel, g: (*default_dx(g), *default_dkernel(g)))


_conv.defvjp(_forward, _backward)


def _input_gradient(g, kernel, shape, *, strides, padding, precision, convolve):
    """g [B, h, w, F] -> [B, H, W, C] = shape, for strides above 1: one small convolution for every phase of the stride.

    convolve: `_conv` has fast second derivatives (gradient penalties, path lengths); `_plain` is for several devices.

    Row s * m + r of the padded input meets g[m - j] with row s * j + r of the kernel. So phase r is a convolution of `g` with every
    s-th row, and all phases are features of one convolution. XLA inserts zeros into `g` instead and multiplies them.
    """
    (kernel_h, kernel_w, channels, features), (s, t) = kernel.shape, strides
    phases = min(s, kernel_h), min(t, kernel_w)  # the others are zero
    taps = -(-kernel_h // s), -(-kernel_w // t)
    kernel = jnp.pad(kernel, ((0, -kernel_h % s), (0, -kernel_w % t), (0, 0), (0, 0)))
    kernel = kernel.reshape(taps[0], s, taps[1], t, channels, features)[::-1, : phases[0], ::-1, : phases[1]]
    kernel = kernel.transpose(0, 2, 5, 1, 3, 4).reshape(*taps, features, -1)
    rows, columns = (-(-(size + low) // stride) for size, (low, _), stride in zip(shape[1:3], padding, strides, strict=True))
    around = (taps[0] - 1, rows - g.shape[1]), (taps[1] - 1, columns - g.shape[2])
    dx = convolve(g, kernel, (1, 1), around, precision).reshape(-1, rows, columns, *phases, channels)
    dx = jnp.pad(dx, ((0, 0),) * 3 + ((0, s - phases[0]), (0, t - phases[1]), (0, 0)))
    dx = dx.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * s, columns * t, channels)
    (top, _), (left, _) = padding
    return dx[:, top : top + shape[1], left : left + shape[2]]


def _weight_gradient(x, g, *, size, strides, padding, precision):
    """x [B, H, W, C], g [B, h, w, F] -> [*size, C, F]: unfolded patches times `g`, summed over chunks of the batch.

    A whole unfolded batch (9 times `x` for 3x3) is limited by memory traffic; a chunk stays in the cache. There are at least two
    chunks, because XLA does not fuse into a loop: without the loop it recomputes the producer of `x` inside a transposition of `x`.
    """
    batch, *_, channels = x.shape
    rows, columns, features = g.shape[1:]
    positions = [(i, j) for i in range(size[0]) for j in range(size[1])]
    bytes_each = rows * columns * len(positions) * channels * x.dtype.itemsize
    chunk = max(n for n in range(1, max(2, batch)) if batch % n == 0 and (n == 1 or n * bytes_each <= CHUNK_BYTES))

    def unfold(x):
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        ends = [(i + (rows - 1) * strides[0] + 1, j + (columns - 1) * strides[1] + 1) for i, j in positions]
        shifted = [
            lax.slice(x, (0, i, j, 0), (x.shape[0], *end, channels), (1, *strides, 1))
            for (i, j), end in zip(positions, ends, strict=True)
        ]
        return jnp.concatenate(shifted, axis=-1)

    def product(x, g):
        everywhere = ((0, 1, 2), (0, 1, 2))
        if size == (1, 1) and channels > features:
            return lax.dot_general(g, unfold(x), (everywhere, ((), ())), precision, preferred_element_type=jnp.float32).T
        return lax.dot_general(unfold(x), g, (everywhere, ((), ())), precision, preferred_element_type=jnp.float32)

    chunks = (x.reshape(-1, chunk, *x.shape[1:]), g.reshape(-1, chunk, *g.shape[1:]))
    start = jnp.zeros((len(positions) * channels, features), jnp.float32)
    total, _ = lax.scan(lambda total, chunk: (total + product(*chunk), None), start, chunks)
    return total.reshape(*size, channels, features).astype(x.dtype)
