"""BigGAN (Brock et al. 2019, arXiv:1809.11096, appendix B) at 32 to 512 pixels.

The table for 32 pixels is that of ajbrock/BigGAN-PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.common import shard_batch
from ssl_jax.models.gan.sngan import downsample, upsample
from ssl_jax.models.gan.spectral import SpectralConv, SpectralDense, SpectralEmbed
from ssl_jax.models.norm import BatchNorm
from ssl_jax.models.pool import max_pool

GENERATOR = {  # size -> channels at 4 x 4 and after each block, in multiples of `channels`
    32: (4, 4, 4, 4),
    64: (16, 16, 8, 4, 2),
    128: (16, 16, 8, 4, 2, 1),
    256: (16, 16, 8, 8, 4, 2, 1),
    512: (16, 16, 8, 8, 4, 2, 1, 1),
}
DISCRIMINATOR = {  # size -> channels after each block; the last one keeps the resolution (at 32 pixels the last two)
    32: (4, 4, 4, 4),
    64: (1, 2, 4, 8, 16),
    128: (1, 2, 4, 8, 16, 16),
    256: (1, 2, 4, 8, 8, 16, 16),
    512: (1, 1, 2, 4, 8, 8, 16, 16),
}
INITS = {"orthogonal": nn.initializers.orthogonal(), "normal": nn.initializers.normal(0.02)}

Features = dict[str, jax.Array]


def check(what: str, size: int, table: Mapping, initializer: str, multiples: tuple[int, ...] = ()) -> None:
    """Raises UserError for a size without table, a size that does not fit `multiples`, and an unknown initializer."""
    if not multiples and size not in table:
        raise UserError(f"{what} has no table for images of {size} pixels; choose {', '.join(map(str, table))}")
    if multiples and size % 2 ** (len(multiples) - 1):
        divisor = 2 ** (len(multiples) - 1)
        raise UserError(f"{what} with {len(multiples)} multiples needs a size that is a multiple of {divisor}, not {size}")
    if initializer not in INITS:
        raise UserError(f"{what} has no initializer {initializer!r}; choose {' or '.join(INITS)}")


class ConditionalNorm(nn.Module):
    """Batch normalization of x [B, H, W, C] with gain 1 + W_g c and bias W_b c for a condition c [B, D]."""

    initializer: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array, train: bool) -> jax.Array:
        linear = functools.partial(
            SpectralDense, x.shape[-1], use_bias=False, kernel_init=INITS[self.initializer], dtype=self.dtype
        )
        x = BatchNorm(use_running_average=not train, use_scale=False, use_bias=False, dtype=self.dtype, name="norm")(x)
        gain, bias = linear(name="gain")(c, train), linear(name="shift")(c, train)
        return x * (1 + gain)[:, None, None] + bias[:, None, None]


class NonLocal(nn.Module):
    """Self-attention over pixels (SAGAN, Zhang et al. 2019, arXiv:1805.08318): x + gamma o, with gamma = 0 at first.

    Keys and values are max-pooled 2 x 2; scores are not divided by the root of their dimension.
    """

    initializer: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        b, h, w, channels = x.shape
        narrow = max(channels // 8, 1)
        conv = functools.partial(SpectralConv, kernel=1, use_bias=False, kernel_init=INITS[self.initializer], dtype=self.dtype)
        queries = conv(narrow, name="query")(x, train).reshape(b, h * w, -1)
        keys = max_pool(conv(narrow, name="key")(x, train), (2, 2), (2, 2)).reshape(b, h * w // 4, -1)
        values = max_pool(conv(max(channels // 2, 1), name="value")(x, train), (2, 2), (2, 2)).reshape(b, h * w // 4, -1)
        scores = jnp.einsum("bqc,bkc->bqk", queries, keys, preferred_element_type=jnp.float32)
        mixed = jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(scores).astype(self.dtype), values).reshape(b, h, w, -1)
        gamma = self.param("gamma", nn.initializers.zeros, (), jnp.float32).astype(self.dtype)
        return x + gamma * conv(channels, name="output")(mixed, train)


class BigGANGenerator(nn.Module):
    """z [B, Z] and labels int32 [B] (None: unconditional) -> images [B, size, size, 3] float32 in [-1, 1].

    z is split into equal chunks, one for the first layer and one for each block. (embedded label, chunk) conditions the block's
    norms.

    Fields:
      size: of the images.
      channels: "ch" of the paper.
      multiples: of `channels`, before and after each block; () means the published table for this size.
      classes: 0 is unconditional: all images share one learned embedding.
      embedding: size of the label embedding, shared by all blocks.
      attention: resolutions with a `NonLocal` after the block.
      initializer: a key of INITS.
      dtype: of the computation; parameters, statistics and norms are float32.
    """

    size: int
    channels: int = 96
    multiples: tuple[int, ...] = ()
    classes: int = 0
    embedding: int = 128
    attention: tuple[int, ...] = ()
    initializer: str = "orthogonal"
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        check("biggan generator", self.size, GENERATOR, self.initializer, self.multiples)
        super().__post_init__()

    @nn.compact
    def __call__(self, z: jax.Array, label: jax.Array | None = None, *, train: bool) -> jax.Array:
        kernel_init = INITS[self.initializer]
        widths = [self.channels * m for m in self.multiples or GENERATOR[self.size]]
        base = self.size >> (len(widths) - 1)
        if z.shape[-1] % len(widths):
            raise UserError(
                f"biggan generator: config.model.latent.size={z.shape[-1]} is no multiple of {len(widths)}, the number of chunks (for "
                f"the first layer and each block) at {self.size} pixels; choose a multiple"
            )
        first, *chunks = jnp.split(z.astype(self.dtype), len(widths), axis=-1)
        label = jnp.zeros(len(z), jnp.int32) if label is None else label
        embed = nn.Embed(max(self.classes, 1), self.embedding, embedding_init=kernel_init, dtype=self.dtype, name="embed")
        label = embed(label)
        x = SpectralDense(base * base * widths[0], kernel_init=kernel_init, dtype=self.dtype, name="project")(first, train)
        x = x.reshape(-1, base, base, widths[0])
        for index, (width, chunk) in enumerate(zip(widths[1:], chunks, strict=True), 1):
            condition = jnp.concatenate([label, chunk], axis=-1)
            x = shard_batch(GeneratorBlock(width, self.initializer, self.dtype, name=f"block{index}")(x, condition, train))
            if x.shape[1] in self.attention:
                x = NonLocal(self.initializer, self.dtype, name=f"attention{x.shape[1]}")(x, train)
        return to_image(x, self.initializer, self.dtype, train)


def to_image(x: jax.Array, init: str, dtype, train: bool) -> jax.Array:
    """The last layers of a generator, in its module scope: batch normalization, ReLU, 3x3 convolution, tanh."""
    x = BatchNorm(use_running_average=not train, dtype=dtype, name="norm", relu=True)(x)
    x = SpectralConv(3, kernel_init=INITS[init], dtype=dtype, name="to_image")(x, train)
    return jnp.tanh(x.astype(jnp.float32))


class GeneratorBlock(nn.Module):
    """[B, H, W, C] -> [B, 2 H, 2 W, channels]."""

    channels: int
    initializer: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array, train: bool) -> jax.Array:
        norm = functools.partial(ConditionalNorm, self.initializer, self.dtype)
        conv = functools.partial(SpectralConv, self.channels, kernel_init=INITS[self.initializer], dtype=self.dtype)
        h = upsample(nn.relu(norm(name="norm1")(x, condition, train)))
        h = nn.relu(norm(name="norm2")(conv(name="conv1")(h, train), condition, train))
        h = conv(name="conv2")(h, train)
        return h + upsample(conv(kernel=1, name="shortcut")(x, train))  # a 1x1 convolution commutes with upsampling


class BigGANTrunk(nn.Module):
    """Images [B, size, size, 3] in [-1, 1] -> 'layer1', 'layer2', ... [B, h, w, C] after each block (and attention), and 'pooled'
    [B, C] float32, the rectified sum over pixels.

    Fields as in `BigGANGenerator`, and
      project_equal: also project the shortcut (1x1) of blocks that halve the resolution at equal channels, at 256 pixels and more.
        BigGAN-PyTorch does, compare_gan does not.
    """

    size: int
    channels: int = 96
    multiples: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    project_equal: bool = True
    initializer: str = "orthogonal"
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        check("biggan discriminator", self.size, DISCRIMINATOR, self.initializer, self.multiples)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> Features:
        multiples, features = self.multiples or DISCRIMINATOR[self.size], {}
        halved = 2 if multiples is DISCRIMINATOR[32] else len(multiples) - 1
        x = x.astype(self.dtype)
        for index, multiple in enumerate(multiples, 1):
            channels, down = self.channels * multiple, index <= halved
            project = x.shape[-1] != channels or (down and self.project_equal)
            block = DiscriminatorBlock(channels, index == 1, down, project, self.initializer, self.dtype, name=f"block{index}")
            x = shard_batch(block(x, train))
            if down and x.shape[1] in self.attention:
                x = NonLocal(self.initializer, self.dtype, name=f"attention{x.shape[1]}")(x, train)
            features[f"layer{index}"] = x
        return {**features, "pooled": jnp.sum(nn.relu(x), axis=(1, 2), dtype=jnp.float32)}


class DiscriminatorBlock(nn.Module):
    """[B, H, W, C] -> [B, H, W, channels], or half of H and W if `down`. The `first` block has no ReLU on its input, the image."""

    channels: int
    first: bool
    down: bool
    project: bool
    initializer: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = functools.partial(SpectralConv, self.channels, kernel_init=INITS[self.initializer], dtype=self.dtype)
        h = conv(name="conv1")(x if self.first else nn.relu(x), train)
        h = conv(name="conv2")(nn.relu(h), train)
        if self.down:
            h, x = downsample(h), downsample(x)
        return h + (conv(kernel=1, name="shortcut")(x, train) if self.project else x)


class ProjectionHead(nn.Module):
    """Pooled features [B, C] and labels int32 [B] -> logits [B] float32: a linear score plus, if classes > 0, the inner product
    with the label's embedding (Miyato and Koyama 2018, arXiv:1802.05637)."""

    classes: int
    initializer: str

    @nn.compact
    def __call__(self, pooled: jax.Array, label: jax.Array | None, train: bool) -> jax.Array:
        kernel_init = INITS[self.initializer]
        logits = SpectralDense(1, kernel_init=kernel_init, name="linear")(pooled, train)[:, 0]
        if self.classes:
            embed = SpectralEmbed(pooled.shape[-1], classes=self.classes, kernel_init=kernel_init, name="embed")
            logits += jnp.sum(embed(label, train) * pooled, axis=-1)
        return logits


class BigGANDiscriminator(nn.Module):
    """Images [B, size, size, 3] in [-1, 1] and labels int32 [B] -> (logits [B] float32, features of `BigGANTrunk`)."""

    size: int
    channels: int = 96
    multiples: tuple[int, ...] = ()
    classes: int = 0
    attention: tuple[int, ...] = ()
    project_equal: bool = True
    initializer: str = "orthogonal"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, label: jax.Array | None = None, *, train: bool) -> tuple[jax.Array, Features]:
        trunk = BigGANTrunk(
            self.size,
            self.channels,
            self.multiples,
            self.attention,
            self.project_equal,
            self.initializer,
            self.dtype,
            name="trunk",
        )
        features = trunk(x, train)
        return ProjectionHead(self.classes, self.initializer, name="head")(features["pooled"], label, train), features
