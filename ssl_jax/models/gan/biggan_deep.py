"""BigGAN-deep (Brock et al. 2019, arXiv:1809.11096, appendix B): bottleneck blocks, two for each resolution. Shortcuts
drop channels in the generator and append projected channels in the discriminator."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.models.common import shard_batch
from ssl_jax.models.gan.biggan import INITS, ConditionalNorm, Features, NonLocal, ProjectionHead, check, to_image
from ssl_jax.models.gan.sngan import downsample, upsample
from ssl_jax.models.gan.spectral import SpectralConv, SpectralDense

GENERATOR = {  # size -> channels at 4 x 4 and after each pair of blocks, in multiples of `channels`; 32 and 64 are not published
    32: (4, 4, 4, 4),
    64: (16, 16, 8, 4, 2),
    128: (16, 16, 8, 4, 2, 1),
    256: (16, 16, 8, 8, 4, 2, 1),
    512: (16, 16, 8, 8, 4, 2, 1, 1),
}
DISCRIMINATOR = {  # size -> channels of the first convolution and after each pair
    32: (4, 4, 4, 4),
    64: (1, 2, 4, 8, 16),
    128: (1, 2, 4, 8, 16, 16),
    256: (1, 2, 4, 8, 8, 16, 16),
    512: (1, 1, 2, 4, 8, 8, 16, 16),
}
BOTTLENECK = 4

# 'tensor' shards the output channels of the first convolution of each pair, the input channels of the second, and the normalization
# between them. A block then has two all-reduces, one on its narrow middle. 'fsdp' shards the other side of each matrix.
TENSOR_RULES = (
    (r"block\d+_\d/conv[13]/kernel", ("fsdp", "tensor")),
    (r"block\d+_\d/conv[13]/bias", ("tensor",)),
    (r"block\d+_\d/conv[24]/kernel", ("tensor", "fsdp")),
    (r"block\d+_\d/norm[24]/(gain|shift)/kernel", ("fsdp", "tensor")),
)


class DeepGenerator(nn.Module):
    """z [B, Z] and labels int32 [B] (None: unconditional) -> images [B, size, size, 3] float32 in [-1, 1].

    (z, embedded label) is the input of the first layer and conditions all normalizations. Fields as in `BigGANGenerator`.
    """

    size: int
    channels: int = 128
    classes: int = 0
    embedding: int = 128
    attention: tuple[int, ...] = (64,)
    initializer: str = "orthogonal"
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        check("biggan_deep generator", self.size, GENERATOR, self.initializer)
        super().__post_init__()

    @nn.compact
    def __call__(self, z: jax.Array, label: jax.Array | None = None, *, train: bool) -> jax.Array:
        kernel_init = INITS[self.initializer]
        widths = [self.channels * m for m in GENERATOR[self.size]]
        label = jnp.zeros(len(z), jnp.int32) if label is None else label
        embed = nn.Embed(max(self.classes, 1), self.embedding, embedding_init=kernel_init, dtype=self.dtype, name="embed")
        condition = jnp.concatenate([z.astype(self.dtype), embed(label)], axis=-1)
        x = SpectralDense(16 * widths[0], kernel_init=kernel_init, dtype=self.dtype, name="project")(condition, train)
        x = x.reshape(-1, 4, 4, widths[0])
        for pair, width in enumerate(widths[1:], 1):
            for half, (channels, up) in enumerate(((x.shape[-1], False), (width, True))):
                block = DeepGeneratorBlock(channels, up, self.initializer, self.dtype, name=f"block{pair}_{half}")
                x = shard_batch(block(x, condition, train))
            if x.shape[1] in self.attention:
                x = NonLocal(self.initializer, self.dtype, name=f"attention{x.shape[1]}")(x, train)
        return to_image(x, self.initializer, self.dtype, train)


class DeepGeneratorBlock(nn.Module):
    """[B, H, W, C] -> [B, H, W, channels], with `up` twice H and W; channels <= C."""

    channels: int
    up: bool
    initializer: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array, train: bool) -> jax.Array:
        hidden = x.shape[-1] // BOTTLENECK
        conv = functools.partial(SpectralConv, kernel_init=INITS[self.initializer], dtype=self.dtype)

        def activate(h, n):
            return nn.relu(ConditionalNorm(self.initializer, self.dtype, name=f"norm{n}")(h, condition, train))

        h = conv(hidden, kernel=1, name="conv1")(activate(x, 1), train)
        h = activate(h, 2)
        h = conv(hidden, name="conv2")(upsample(h) if self.up else h, train)
        h = conv(hidden, name="conv3")(activate(h, 3), train)
        h = conv(self.channels, kernel=1, name="conv4")(activate(h, 4), train)
        x = x[..., : self.channels]
        return h + (upsample(x) if self.up else x)


class DeepDiscriminator(nn.Module):
    """Images [B, size, size, 3] in [-1, 1] and labels int32 [B] -> (logits [B] float32, features).

    Features: 'layer1', 'layer2', ... after each pair of blocks (and attention), 'pooled' [B, C] float32, the rectified sum over
    pixels. Fields as in `BigGANDiscriminator`.
    """

    size: int
    channels: int = 128
    classes: int = 0
    attention: tuple[int, ...] = (64,)
    initializer: str = "orthogonal"
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        check("biggan_deep discriminator", self.size, DISCRIMINATOR, self.initializer)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, label: jax.Array | None = None, *, train: bool) -> tuple[jax.Array, Features]:
        first, *widths = (self.channels * m for m in DISCRIMINATOR[self.size])
        from_image = SpectralConv(first, kernel_init=INITS[self.initializer], dtype=self.dtype, name="from_image")
        x = from_image(x.astype(self.dtype), train)
        features = {}
        for pair, width in enumerate(widths, 1):
            for half, down in enumerate((True, False)):
                x = DeepDiscriminatorBlock(width, down, self.initializer, self.dtype, name=f"block{pair}_{half}")(x, train)
                x = shard_batch(x)
            if x.shape[1] in self.attention:
                x = NonLocal(self.initializer, self.dtype, name=f"attention{x.shape[1]}")(x, train)
            features[f"layer{pair}"] = x
        features["pooled"] = jnp.sum(nn.relu(x), axis=(1, 2), dtype=jnp.float32)
        return ProjectionHead(self.classes, self.initializer, name="head")(features["pooled"], label, train), features


class DeepDiscriminatorBlock(nn.Module):
    """[B, H, W, C] -> [B, H, W, channels], with `down` half of H and W; channels >= C."""

    channels: int
    down: bool
    initializer: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        hidden, missing = self.channels // BOTTLENECK, self.channels - x.shape[-1]
        conv = functools.partial(SpectralConv, kernel_init=INITS[self.initializer], dtype=self.dtype)
        h = conv(hidden, kernel=1, name="conv1")(nn.relu(x), train)
        h = conv(hidden, name="conv2")(nn.relu(h), train)
        h = nn.relu(conv(hidden, name="conv3")(nn.relu(h), train))
        if self.down:
            h, x = downsample(h), downsample(x)
        h = conv(self.channels, kernel=1, name="conv4")(h, train)
        if missing:
            x = jnp.concatenate([x, conv(missing, kernel=1, name="shortcut")(x, train)], axis=-1)
        return h + x
