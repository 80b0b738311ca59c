"""Heads on top of an encoder: projection and linear classification."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.models.activations import gelu
from ssl_jax.models.backbones.layers import conv_relu
from ssl_jax.models.common import Dense
from ssl_jax.models.norm import BatchNorm
from ssl_jax.objectives.contrastive import unit


class ProjectionHead(nn.Module):
    """Linear layers with BatchNorm and ReLU between them; the projector or predictor of joint-embedding methods.

    The defaults are SimCLR's head: no linear bias, and BatchNorm after every layer. The output has BatchNorm with a scale only, no
      ReLU.

    Fields:
      widths: of the linear layers; the last is the output's.
      batch_norm: BatchNorm and ReLU after each hidden layer; else ReLU only, and linear layers have biases.
      last_batch_norm: BatchNorm on the output too; it needs `batch_norm`.
      last_scale: the BatchNorm on the output has a scale (SimSiam's has none); it never has an offset.
      bias: linear layers have biases although BatchNorm follows.
      last_bias: `bias` for the last layer; None means as the others.
      kernel_std: kernels start as N(0, kernel_std), 0.01 in SimCLR's code; None is Flax's default (fan-in normal).
      dtype: of the computation; parameters, statistics and the output are float32.
    """

    widths: tuple[int, ...] = (2048, 128)
    batch_norm: bool = True
    last_batch_norm: bool = True
    last_scale: bool = True
    bias: bool = False
    last_bias: bool | None = None
    kernel_std: float | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """[B, D] -> (x, hidden 1, ..., output [B, widths[-1]] in float32).

        Hidden activations [B, widths[i]] are those after the ReLU; SimCLR v2 fine-tunes from element 1.
        """
        bias = self.bias or not self.batch_norm
        last_bias = bias if self.last_bias is None else self.last_bias
        init = nn.initializers.lecun_normal() if self.kernel_std is None else nn.initializers.normal(self.kernel_std)

        out = [x]
        for index, width in enumerate(self.widths, start=1):
            last = index == len(self.widths)
            x = Dense(
                width,
                use_bias=last_bias if last else bias,
                kernel_init=init,
                dtype=self.dtype,
                name=f"linear{index}",
            )(x)
            if self.batch_norm and (self.last_batch_norm or not last):
                x = BatchNorm(
                    use_running_average=not train,
                    use_bias=not last,
                    use_scale=self.last_scale or not last,
                    dtype=self.dtype,
                    name=f"bn{index}",
                )(x)
            x = x.astype(jnp.float32) if last else nn.relu(x)
            out.append(x)
        return tuple(out)


class PrototypeHead(nn.Module):
    """DINO's head: linear layers with GELU, a bottleneck of length 1, and its similarities to prototypes.

    Caron et al. 2021 (arXiv:2104.14294), section 3.1 and appendix C.

    Fields:
      widths: of the hidden layers. bottleneck: of the last layer before the prototypes. prototypes: their number K.
      last_scale: each prototype has a learned length; else 1.
    """

    widths: tuple[int, ...] = (2048, 2048)
    bottleneck: int = 256
    prototypes: int = 65536
    last_scale: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        """[B, D] -> (x, hidden 1, ..., bottleneck [B, bottleneck], logits [B, K] in float32)."""
        out, init = [x], nn.initializers.truncated_normal(0.02)
        for index, width in enumerate((*self.widths, self.bottleneck), start=1):
            x = Dense(width, kernel_init=init, dtype=self.dtype, name=f"linear{index}")(x)
            x = x if index > len(self.widths) else gelu(x)
            out.append(x)
        x = unit(x)
        kernel = self.param("prototypes", nn.initializers.truncated_normal(0.02), (self.prototypes, self.bottleneck), jnp.float32)
        logits = jnp.matmul(x, unit(kernel).T, precision="highest")
        if self.last_scale:
            logits = logits * self.param("scale", nn.initializers.ones, (self.prototypes,), jnp.float32)
        return (*out, logits)


class LinearHead(nn.Module):
    """One linear layer to logits, in float32: params are {'kernel': [D, classes], 'bias': [classes]}.

    `zero_init` starts at uniform probabilities; otherwise the kernel is N(0, std), or a fan-in normal if `std` is None. `norm`
    normalizes the input first (parameters 'norm'): MAE fine-tunes with it, after the mean of the patches.
    """

    classes: int
    zero_init: bool = True
    std: float | None = None
    norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[B, D] -> logits [B, classes] float32; `train` changes nothing."""
        normal = nn.initializers.lecun_normal() if self.std is None else nn.initializers.normal(self.std)
        init = nn.initializers.zeros if self.zero_init else normal
        if self.norm:
            x = nn.LayerNorm(epsilon=1e-6, name="norm")(x.astype(jnp.float32))
        kernel = self.param("kernel", init, (x.shape[-1], self.classes), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.classes,), jnp.float32)
        return jnp.matmul(x.astype(jnp.float32), kernel, precision="highest") + bias


class ConvolutionalHead(nn.Module):
    """A 3x3 and two 1x1 convolutions with BatchNorm and ReLU, the mean over space and a linear layer: RotNet's classifier of maps."""

    classes: int
    channels: int = 192

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[B, h, w, C] -> logits [B, classes] float32."""
        for index, kernel in enumerate((3, 1, 1), 1):
            x = conv_relu(x, self.channels, kernel, name=f"conv{index}", train=train, dtype=jnp.float32)
        return LinearHead(self.classes, zero_init=False, name="linear")(x.mean((1, 2)))


class AttentiveHead(nn.Module):
    """One learned query attends to the tokens of an image, and a linear layer reads the result: the attentive probe of CAPI.

    Keys and values are linear maps of normalized tokens. There are D / 64 heads, as in facebookresearch/capi; a single one if 64 does
    not divide D.
    """

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[B, N, D] -> logits [B, classes] float32; `train` changes nothing."""
        width = x.shape[-1]
        heads = width // 64 if width % 64 == 0 else 1
        x = nn.LayerNorm(epsilon=1e-6, use_scale=False, use_bias=False)(x.astype(jnp.float32))  # the maps below can scale
        query = self.param("query", nn.initializers.normal(0.02), (heads, width // heads), jnp.float32)
        key, value = (Dense(width, name=name)(x).reshape(*x.shape[:2], heads, -1) for name in ("key", "value"))
        scores = jnp.einsum("hd,bnhd->bhn", query, key) * (width // heads) ** -0.5
        pooled = jnp.einsum("bhn,bnhd->bhd", jax.nn.softmax(scores), value).reshape(len(x), width)
        return LinearHead(self.classes, name="linear")(pooled)
