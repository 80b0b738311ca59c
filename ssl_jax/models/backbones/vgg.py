"""VGG-16 (Simonyan and Zisserman 2015, arXiv:1409.1556); its layers are the hypercolumns of colorization (arXiv:1603.06668)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.backbones.layers import conv_relu, require_size, scaled
from ssl_jax.models.common import shard_batch
from ssl_jax.models.pool import max_pool

GROUPS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels; a 2x2 max-pool ends each group


class VGG(nn.Module):
    """Images to feature maps, with the layers of torchvision's vgg16.

    Fields:
      width: multiplies all channels; 0.125 for laptops.
      batch_norm: after each convolution, which then has no bias.
      fc: channels of 'fc6', a 7x7 convolution on 'pool5' with padding, and 'fc7', 1x1; 4096 in the paper, 0 for none. At the center
        of a 7x7 map they are the fully connected layers of the paper.
      dtype: of the computation; parameters and statistics are float32.

    Raises UserError for impossible fields and for images under 32 pixels.
    """

    width: float = 1.0
    batch_norm: bool = True
    fc: int = 0
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        scaled((64,), self.width, "vgg")
        if self.fc < 0:
            raise UserError(f"vgg fc={self.fc} is negative; give the channels of fc6 and fc7, or 0 for none")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> dict[str, jax.Array]:
        """[B, H, W, C] -> 'conv1_1' .. 'conv5_3' [B, h, w, D] after the ReLU, 'pool5', 'fc6' and 'fc7' if any, 'pooled' [B, D].

        'pooled', in float32, is the mean of the last map. Maps of group g have side H / 2^(g - 1), 'pool5' and after it H / 32.
        """
        options = dict(train=train, dtype=self.dtype, batch_norm=self.batch_norm)
        out, x = {}, images.astype(self.dtype)
        for group, channels in enumerate(GROUPS, 1):
            for index, features in enumerate(scaled(channels, self.width, "vgg"), 1):
                x = conv_relu(x, features, 3, name=f"conv{group}_{index}", **options)
                out[f"conv{group}_{index}"] = x = shard_batch(x)
            require_size(x, 2, "vgg", images)
            x = max_pool(x, (2, 2), (2, 2))
        out["pool5"] = x
        if self.fc:
            out["fc6"] = x = shard_batch(conv_relu(x, self.fc, 7, name="fc6", **options))
            out["fc7"] = x = shard_batch(conv_relu(x, self.fc, 1, name="fc7", **options))
        return {**out, "pooled": jnp.mean(x, axis=(1, 2), dtype=jnp.float32)}
