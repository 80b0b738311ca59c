"""Convolutions that are fast on CPUs, by oneDNN where it is installed (elsewhere XLA's own), and transposed ones without zeros."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from ssl_jax.errors import UserError
from ssl_jax.models import onednn
from ssl_jax.models.onednn import FORWARD, INPUT, KERNEL
from ssl_jax.models.portable import is_portable

LAYOUT = ("NHWC", "HWIO", "NHWC")
CHUNK_BYTES = 4 * 2**20  # of unfolded patches: larger chunks leave the cache, smaller ones make matrix products inefficient
LARGEST_KERNEL = 7  # side; each position adds one slice to the compiled program
FEW_PIXELS, MANY_CHANNELS = 49, 64  # where XLA's product of unfolded patches is faster than oneDNN's weight gradient
SMALLEST_PRODUCT, SMALLEST_ROWS = 2**24, 64  # of a dense layer for oneDNN: multiplications, and rows of its input

BACKENDS = ("auto", "xla", "onednn")
_backend = "auto"


def use_convolutions(name: str) -> None:
    """Choose who computes convolutions and dense layers on CPUs in programs that are traced from now on: `config.convolutions`.

    Args:
        name: 'xla', 'onednn', or 'auto' for oneDNN where it is installed.

    Raises:
        UserError: an unknown name, or 'onednn' where it cannot be loaded.
    """
    global _backend
    if name not in BACKENDS:
        raise UserError(f"config.convolutions={name!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if name == "onednn" and isinstance(reason := onednn.load(), str):
        raise UserError(f"config.convolutions='onednn': {reason}; or give auto, which then takes xla")
    _backend = name


def convolutions() -> str:
    """Who computes them, for the provenance of a run: 'onednn', 'xla', or 'xla' and why oneDNN is not used."""
    if _backend == "xla" or jax.default_backend() != "cpu":
        return "xla"
    return f"xla ({reason})" if isinstance(reason := onednn.load(), str) else "onednn"


def _uses_onednn() -> bool:
    return _backend != "xla" and not is_portable() and not isinstance(onednn.load(), str)


def conv(x, kernel, strides, padding, *, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count, precision):
    """`lax.conv_general_dilated`, faster on CPUs, for the field `conv_general_dilated` of Flax's Conv.

    XLA's CPU backend computes the weight gradient as a convolution over the batch and transposes both operands element by element,
    which takes two fifths of a ResNet step. For stride 2 it computes the input gradient on an input with three quarters zeros.

    The rules below replace them if the program is compiled for a CPU, the ambient mesh has one device (or there is none), and the
    convolution of x [B, H, W, C] with kernel [h, w, C, F] has no dilation and no groups. Several devices are excluded because
    chunks of a sharded batch would have to be gathered. Where oneDNN is installed it computes most of them (`use_convolutions`).

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
    padding = tuple((int(low), int(high)) for low, high in padding)
    rows, columns = (
        (size + low + high - k) // stride + 1
        for size, k, stride, (low, high) in zip(x.shape[1:3], kernel.shape[:2], strides, padding, strict=True)
    )
    return _convolve(FORWARD, x, kernel, (x.shape[0], rows, columns, kernel.shape[-1]), strides, padding, precision)


def conv_transpose(x: jax.Array, kernel: jax.Array, stride: int = 2) -> jax.Array:
    """Transposed convolution with 'SAME' padding: x [B, H, W, C], kernel [h, w, C, F] -> [B, stride H, stride W, F].

    Equals PyTorch's ConvTranspose2d (kernel 4, stride 2, padding 1) and the gradient of a convolution with the same kernel, not
    flipped: pixel p of x adds kernel[i] to pixel stride * p + i - (h - stride) // 2 of the output. XLA's way is one convolution
    whose features are the phases of the stride, which multiplies no zeros and has fast gradients.
    """
    shape = (x.shape[0], x.shape[1] * stride, x.shape[2] * stride, kernel.shape[-1])
    padding = tuple(lax.padtype_to_pads(shape[1:3], kernel.shape[:2], (stride, stride), "SAME"))
    kernel = kernel.swapaxes(2, 3)
    if jax.sharding.get_abstract_mesh().size > 1:
        return _by_phases(x, kernel, shape, strides=(stride, stride), padding=padding, precision=None)
    return _convolve(INPUT, x, kernel, shape, (stride, stride), padding, None)


def dense(x, kernel, dimension_numbers, precision=None, preferred_element_type=None):
    """`lax.dot_general`, faster on CPUs, for the field `dot_general` of Flax's Dense: x [..., C], kernel [C, F] -> [..., F]."""
    simple = dimension_numbers == (((x.ndim - 1,), (0,)), ((), ())) and kernel.ndim == 2 and preferred_element_type is None
    rows = math.prod(x.shape[:-1])
    # A batch of any size, in an exported program, has no number of rows.
    worthwhile = isinstance(rows, int) and rows * kernel.size >= SMALLEST_PRODUCT and rows >= SMALLEST_ROWS
    if not simple or not worthwhile or jax.sharding.get_abstract_mesh().size > 1 or not _uses_onednn():
        return lax.dot_general(x, kernel, dimension_numbers, precision, preferred_element_type)
    # A convolution of one row of pixels with a 1x1 kernel.
    pixels, kernel = x.reshape(1, 1, rows, -1), kernel[None, None]
    y = _convolve(FORWARD, pixels, kernel, (1, 1, rows, kernel.shape[-1]), (1, 1), ((0, 0), (0, 0)), precision)
    return y.reshape(*x.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4, 5, 6))
def _convolve(role, a, b, shape, strides, padding, precision):
    """One of y = conv(x, kernel) and its gradients for x and kernel, from the other two; `shape` is that of the result.

    All three are derivatives of the same number, sum(y * conv(x, kernel)), which is linear in each of x, kernel and y. So each
    one's gradients are the other two, and any order of differentiation stays within these three.

    Args:
        role: FORWARD (a = x, b = kernel), INPUT (a = y, b = kernel) or KERNEL (a = x, b = y).
    """
    options = dict(shape=shape, strides=strides, padding=padding, precision=precision)
    on_cpu = functools.partial(_by_onednn if _uses_onednn() else _by_xla_on_cpu, role, **options)
    return lax.platform_dependent(a, b, cpu=on_cpu, default=functools.partial(_by_xla, role, **options))


def _forward(role, a, b, shape, strides, padding, precision):
    return _convolve(role, a, b, shape, strides, padding, precision), (a, b)


def _backward(role, shape, strides, padding, precision, operands, g):
    a, b = operands

    def gradient(role, a, b, like):
        return _convolve(role, a, b, like.shape, strides, padding, precision)

    if role == FORWARD:  # x, kernel -> y
        return gradient(INPUT, g, b, a), gradient(KERNEL, a, g, b)
    if role == INPUT:  # y, kernel -> x
        return gradient(FORWARD, g, b, a), gradient(KERNEL, g, a, b)
    return gradient(INPUT, b, g, a), gradient(FORWARD, a, g, b)  # x, y -> kernel


_convolve.defvjp(_forward, _backward)


def _by_xla(role, a, b, *, shape, strides, padding, precision):
    """Whatever XLA makes of a convolution and its transpositions."""

    def forward(x, kernel):
        return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=LAYOUT, precision=precision)

    if role == FORWARD:
        return forward(a, b)
    result = jax.ShapeDtypeStruct(shape, a.dtype)
    if role == INPUT:
        return jax.linear_transpose(lambda x: forward(x, b), result)(a)[0]
    return jax.linear_transpose(lambda kernel: forward(a, kernel), result)(b)[0]


def _by_xla_on_cpu(role, a, b, *, shape, strides, padding, precision):
    """The same from the products and convolutions that are fast on CPUs."""
    options = dict(strides=strides, padding=padding, precision=precision)
    if role == KERNEL:
        return _weight_gradient(a, b, size=shape[:2], **options)
    if role == FORWARD:
        return _by_xla(role, a, b, shape=shape, **options)
    if strides != (1, 1):
        return _by_phases(a, b, shape, **options)
    around = tuple((size - 1 - low, size - 1 - high) for size, (low, high) in zip(b.shape[:2], padding, strict=True))
    flipped = b[::-1, ::-1].swapaxes(2, 3)
    return _by_xla(FORWARD, a, flipped, shape=shape, strides=(1, 1), padding=around, precision=precision)


def _by_onednn(role, a, b, *, shape, strides, padding, precision):
    """oneDNN where it can and is faster (figures: docs/performance.md)."""
    unfolds = role == KERNEL and not onednn.load().avx512 and _unfolding_is_faster(shape, b.shape, strides)
    if unfolds or not onednn.can_convolve(role, a, b, shape, strides, padding):
        return _by_xla_on_cpu(role, a, b, shape=shape, strides=strides, padding=padding, precision=precision)
    return onednn.convolve(role, a, b, shape, strides, padding)


def _unfolding_is_faster(kernel, y, strides) -> bool:
    """For weight gradients of small feature maps, and of strided convolutions of many channels, without AVX-512."""
    few = math.prod(y[1:3]) <= FEW_PIXELS or (strides != (1, 1) and kernel[2] >= MANY_CHANNELS)
    return few and math.prod(kernel[:2]) > 1


def _by_phases(g, kernel, shape, *, strides, padding, precision):
    """g [B, h, w, F] -> [B, H, W, C] = shape, for strides above 1: one small convolution for every phase of the stride.

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
    dx = lax.conv_general_dilated(g, kernel, (1, 1), around, dimension_numbers=LAYOUT, precision=precision)
    dx = dx.reshape(-1, rows, columns, *phases, channels)
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
