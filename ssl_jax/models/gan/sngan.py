"""The residual generator and discriminator of SNGAN (Miyato et al. 2018, arXiv:1802.05957, table 4) for small images.

Flavors: 'miyato' is the paper's (pfnet-research/sngan_projection). 'gulrajani' is the critic of WGAN-GP (Gulrajani et al. 2017,
arXiv:1704.00028), which averages over pixels. 'compare_gan' is google/compare_gan's, which SS-GAN uses. Generators upsample by
repeating pixels, where compare_gan's code inserts zeros.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.common import Conv, shard_batch
from ssl_jax.models.gan.spectral import SpectralConv, SpectralDense
from ssl_jax.models.norm import BatchNorm

GENERATORS = ("miyato", "compare_gan")
DISCRIMINATORS = ("miyato", "gulrajani", "compare_gan")
NORMS = ("spectral", "none")
glorot = functools.partial(nn.initializers.variance_scaling, mode="fan_avg", distribution="uniform")


def upsample(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, 2 H, 2 W, C], nearest neighbor."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def downsample(x: jax.Array) -> jax.Array:
    """[B, H, W, C] -> [B, H / 2, W / 2, C]: the mean of each 2 x 2 pixels."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def _check(what: str, flavor: str, flavors: tuple[str, ...]) -> None:
    if flavor not in flavors:
        raise UserError(f"{what} has no flavor {flavor!r}; choose {' or '.join(flavors)}")


class SNGANGenerator(nn.Module):
    """z [B, Z] -> images [B, size, size, 3] float32 in [-1, 1].

    Fields:
      size: of the images: a multiple of 2^stages (32 and 48 were published, with three stages).
      channels: of every layer.
      flavor: 'compare_gan' has 3x3 shortcuts, 'miyato' 1x1.
      dtype: of the computation; parameters and statistics are float32.
    """

    size: int = 32
    channels: int = 256
    stages: int = 3
    flavor: str = "miyato"
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        _check("sngan generator", self.flavor, GENERATORS)
        if self.size % 2**self.stages:
            raise UserError(f"sngan generator: {self.size} pixels are no multiple of 2^{self.stages}; choose other stages")
        super().__post_init__()

    @nn.compact
    def __call__(self, z: jax.Array, train: bool) -> jax.Array:
        base = self.size >> self.stages
        x = nn.Dense(base * base * self.channels, kernel_init=glorot(1.0), dtype=self.dtype, name="project")(z.astype(self.dtype))
        x = x.reshape(-1, base, base, self.channels)
        shortcut_kernel = 3 if self.flavor == "compare_gan" else 1
        for stage in range(self.stages):
            x = GeneratorBlock(self.channels, shortcut_kernel, self.dtype, name=f"block{stage + 1}")(x, train)
        x = BatchNorm(use_running_average=not train, dtype=self.dtype, name="norm", relu=True)(x)
        return jnp.tanh(Conv(3, (3, 3), kernel_init=glorot(1.0), dtype=self.dtype, name="to_image")(x).astype(jnp.float32))


class GeneratorBlock(nn.Module):
    """[B, H, W, C] -> [B, 2 H, 2 W, channels]: two normalized 3x3 convolutions beside a shortcut."""

    channels: int
    shortcut_kernel: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = functools.partial(BatchNorm, use_running_average=not train, dtype=self.dtype)
        conv = functools.partial(Conv, self.channels, dtype=self.dtype)
        h = upsample(nn.relu(norm(name="norm1")(x)))
        h = conv((3, 3), kernel_init=glorot(2.0), name="conv1")(h)
        h = conv((3, 3), kernel_init=glorot(2.0), name="conv2")(nn.relu(norm(name="norm2")(h)))
        shortcut = conv((self.shortcut_kernel,) * 2, kernel_init=glorot(1.0), name="shortcut")
        # A 1x1 convolution and nearest-neighbor upsampling commute.
        x = upsample(shortcut(x)) if self.shortcut_kernel == 1 else shortcut(upsample(x))
        return shard_batch(x + h)


class SNGANDiscriminator(nn.Module):
    """Images [B, H, W, 3] in [-1, 1] -> (logits [B] float32, features), H and W multiples of 4.

    Features: 'pooled' [B, channels] float32, the input of the linear head; 'layer1' .. 'layer4' [B, h, w, channels], after each
      block.

    Fields:
      norm: 'spectral', or 'none' (with a gradient penalty).
      flavor: 'miyato' sums over pixels and projects shortcuts (1x1) where shapes differ; 'gulrajani' does so too, but averages
        over pixels and has a bias in the head; 'compare_gan' averages, has that bias, and projects all shortcuts (3x3).
    """

    channels: int = 128
    norm: str = "spectral"
    flavor: str = "miyato"
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        _check("sngan discriminator", self.flavor, DISCRIMINATORS)
        if self.norm not in NORMS:
            raise UserError(f"sngan discriminator has no norm {self.norm!r}; choose {' or '.join(NORMS)}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        sums, project_all, x, features = self.flavor == "miyato", self.flavor == "compare_gan", x.astype(self.dtype), {}
        for index in range(4):
            x = DiscriminatorBlock(
                self.channels,
                first=index == 0,
                down=index < 2,
                shortcut_kernel=3 if project_all else 1 if index < 2 else 0,
                norm=self.norm,
                dtype=self.dtype,
                name=f"block{index + 1}",
            )(x, train)
            features[f"layer{index + 1}"] = x
        x = nn.relu(x).astype(jnp.float32)
        features["pooled"] = x.sum((1, 2)) if sums else x.mean((1, 2))
        head = dict(use_bias=not sums, kernel_init=glorot(1.0), name="head")
        pooled = features["pooled"]
        if self.norm == "spectral":
            logits = SpectralDense(1, **head)(pooled, train)
        else:
            logits = nn.Dense(1, precision="highest", **head)(pooled)
        return logits[:, 0], features


class DiscriminatorBlock(nn.Module):
    """[B, H, W, C] -> [B, H, W, channels], or half of H and W: two 3x3 convolutions beside a shortcut.

    The `first` block has no ReLU on its input, the image. shortcut_kernel=0: no projection.
    """

    channels: int
    first: bool
    down: bool
    shortcut_kernel: int
    norm: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def conv(x, kernel, gain, name):
            fields = dict(kernel_init=glorot(gain), dtype=self.dtype, name=name)
            if self.norm == "spectral":
                return SpectralConv(self.channels, kernel=kernel, **fields)(x, train)
            return Conv(self.channels, (kernel, kernel), **fields)(x)

        h = conv(x if self.first else nn.relu(x), 3, 2.0, "conv1")
        h = conv(nn.relu(h), 3, 2.0, "conv2")
        h = downsample(h) if self.down else h
        if self.down and self.shortcut_kernel <= 1:  # a 1x1 convolution and mean pooling commute
            x = downsample(x)
        if self.shortcut_kernel:
            x = conv(x, self.shortcut_kernel, 1.0, "shortcut")
        if self.down and self.shortcut_kernel > 1:
            x = downsample(x)
        return shard_batch(x + h)
