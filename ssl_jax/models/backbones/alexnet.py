"""AlexNet (Krizhevsky et al. 2012) in the forms of the papers on pretext tasks.

One tower (Krizhevsky 2014, arXiv:1404.5997; torchvision; RotNet, arXiv:1803.07728, with BatchNorm), or the wider two towers of
Caffe's reference network (jigsaw, arXiv:1603.09246; colorization, arXiv:1603.08511; split-brain, arXiv:1611.09842).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.errors import UserError
from ssl_jax.models.backbones.layers import conv_relu, kernel_init, require_size, scaled
from ssl_jax.models.common import shard_batch
from ssl_jax.models.norm import BatchNorm
from ssl_jax.models.pool import max_pool

FORMS = {"one_tower": (64, 192, 384, 256, 256), "two_towers": (96, 256, 384, 384, 256)}  # channels of conv1 .. conv5
NORMS = ("batch", "lrn", "none")


class AlexNet(nn.Module):
    """Images to feature maps.

    Fields:
      form: a key of FORMS: the channels of the five convolutions.
      width: multiplies all channels; 0.5 is one half of split-brain.
      norm: 'batch' after each layer; 'lrn', local response normalization after the first two max-pools (Caffe's order); or 'none'.
      groups: of the channels in conv2, conv4 and conv5; 2 is the network on two GPUs, of which all others are a simplification.
      conv1: kernel side, stride and padding of the first layer, in pixels: (11, 4, 2) is torchvision's and RotNet's for 224 pixels,
        (11, 4, 0) Caffe's for 227, (11, 2, 0) jigsaw's for tiles of 64, (5, 1, 2) ours for 32. The parameters are the same for all
        strides and paddings, so a network trained on tiles can read whole images.
      fc: widths of fully connected layers on 'pool5', (4096, 4096) in the papers, without dropout. They fix the image size.
      dtype: of the computation; parameters and statistics are float32.

    Raises UserError for impossible fields and for images too small for the pools.
    """

    form: str = "one_tower"
    width: float = 1.0
    norm: str = "batch"
    groups: int = 1
    conv1: tuple[int, int, int] = (11, 4, 2)
    fc: tuple[int, ...] = ()
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        for field, value, valid in (("form", self.form, tuple(FORMS)), ("norm", self.norm, NORMS), ("groups", self.groups, (1, 2))):
            if value not in valid:
                raise UserError(f"alexnet has no {field} {value!r}; choose one of {', '.join(map(str, valid))}")
        scaled(FORMS[self.form], self.width, "alexnet", self.groups)
        first = tuple(self.conv1)
        if len(first) != 3 or min(first[:2]) < 1 or first[2] < 0:
            raise UserError(f"alexnet conv1={first} is not (kernel, stride, padding), such as (11, 4, 2)")
        if any(width < 1 for width in self.fc):
            raise UserError(f"alexnet fc widths {tuple(self.fc)} are not valid; give positive widths, or () for none")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> dict[str, jax.Array]:
        """[B, H, W, C] -> 'conv1' .. 'conv5' [B, h, w, C] after the ReLU and before a pool, 'pool5', 'fc6' .. [B, D], 'pooled' [B, D].

        'pooled', in float32, is the last fully connected layer, or the mean of 'pool5'.
        """
        channels = scaled(FORMS[self.form], self.width, "alexnet", self.groups)
        kernels, (kernel, stride, padding) = (None, 5, 3, 3, 3), self.conv1
        options = dict(train=train, dtype=self.dtype, batch_norm=self.norm == "batch")
        out, x = {}, images.astype(self.dtype)
        for index, features in enumerate(channels, 1):
            if index == 1:
                x = conv_relu(x, features, kernel, stride=stride, padding=padding, name="conv1", **options)
            else:
                groups = 1 if index == 3 else self.groups
                x = conv_relu(x, features, kernels[index - 1], groups=groups, name=f"conv{index}", **options)
            out[f"conv{index}"] = x = shard_batch(x)
            if index in (1, 2, 5):
                require_size(x, 3, f"alexnet with conv1={tuple(self.conv1)}", images)
                x = max_pool(x, (3, 3), (2, 2))
            if self.norm == "lrn" and index < 3:
                x = local_response_norm(x)
        out["pool5"] = x
        if not self.fc:
            return {**out, "pooled": jnp.mean(x, axis=(1, 2), dtype=jnp.float32)}
        x = x.reshape(len(x), -1)
        if self.has_variable("params", "fc6") and self.get_variable("params", "fc6")["kernel"].shape[0] != x.shape[1]:
            raise UserError(f"alexnet with fc={tuple(self.fc)} takes images of the size it was trained on, not {images.shape[1:3]}")
        for index, features in enumerate(self.fc, 6):
            x = nn.Dense(features, use_bias=self.norm != "batch", kernel_init=kernel_init, dtype=self.dtype, name=f"fc{index}")(x)
            if self.norm == "batch":
                x = BatchNorm(use_running_average=not train, dtype=self.dtype, name=f"fc{index}_bn")(x)
            out[f"fc{index}"] = x = shard_batch(nn.relu(x))
        return {**out, "pooled": x.astype(jnp.float32)}


def local_response_norm(x: jax.Array, size: int = 5, alpha: float = 1e-4, beta: float = 0.75) -> jax.Array:
    """x / (1 + alpha * mean of squares of `size` neighboring channels)^beta; x [B, h, w, C], Caffe's and PyTorch's constants.

    Channels beyond the ends count as zeros in the mean.
    """
    squares = jnp.pad(jnp.square(x.astype(jnp.float32)), ((0, 0),) * 3 + ((size // 2, size // 2),))
    mean = sum(squares[..., i : i + x.shape[-1]] for i in range(size)) / size
    return (x / (1 + alpha * mean) ** beta).astype(x.dtype)
