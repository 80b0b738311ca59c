"""Discriminator and encoder of BigBiGAN (Donahue and Simonyan 2019, arXiv:1907.02544, section 2 and appendix A).

The generator is BigGAN's without labels (`models.gan.biggan`). The published discriminator has H of 29.6 M and J of 36.7 M
parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.models.backbones.encoders import build_encoder
from ssl_jax.models.build import build
from ssl_jax.models.common import shard_batch
from ssl_jax.models.gan.biggan import INITS, BigGANTrunk
from ssl_jax.models.gan.spectral import SpectralDense
from ssl_jax.models.norm import BatchNorm


class ResidualMLP(nn.Module):
    """H and J: a linear layer, `layers` - 1 residual steps h + linear(ReLU(h)), and a ReLU, all spectrally normalized."""

    width: int = 2048
    layers: int = 8
    initializer: str = "orthogonal"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, h: jax.Array, train: bool) -> jax.Array:
        """[B, D] -> [B, width]."""
        for i in range(1, self.layers + 1):
            layer = SpectralDense(self.width, kernel_init=INITS[self.initializer], dtype=self.dtype, name=f"linear{i}")
            h = layer(h, train) if i == 1 else h + layer(nn.relu(h), train)
        return shard_batch(nn.relu(h))


class JointDiscriminator(nn.Module):
    """Scores of images, of latents and of pairs: s_x = a F(x), s_z = b H(z), s_xz = c J(F(x), H(z)).

    Fields:
      size: of the images in pixels.
      channels, multiples, attention: of F, BigGAN's trunk.
      width, layers: of H and J.
      initializer: a key of INITS.
      dtype: of the computation; parameters, norms and scores are float32.
    """

    size: int
    channels: int = 96
    multiples: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    width: int = 2048
    layers: int = 8
    initializer: str = "orthogonal"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, z: jax.Array, train: bool) -> dict[str, jax.Array]:
        """x [B, size, size, 3] in [-1, 1], z [B, Z] -> 'x', 'z', 'xz' [B] float32."""
        trunk = BigGANTrunk(
            self.size, self.channels, self.multiples, self.attention, initializer=self.initializer, dtype=self.dtype, name="F"
        )
        f = trunk(x, train)["pooled"]
        mlp = {name: ResidualMLP(self.width, self.layers, self.initializer, self.dtype, name=name) for name in "HJ"}
        h = mlp["H"](z, train)
        j = mlp["J"](jnp.concatenate([f, h.astype(jnp.float32)], axis=-1), train)

        def score(name, features):
            head = SpectralDense(1, kernel_init=INITS[self.initializer], name=f"score_{name}")
            return head(features.astype(jnp.float32), train)[:, 0]

        return {"x": score("x", f), "z": score("z", h), "xz": score("xz", j)}


class Encoder(nn.Module):
    """E: a residual or reversible network, and an MLP to a normal distribution of codes; with batch normalization, not spectral.

    Fields: `backbone` images -> {'pooled': [B, D], ...}; `latent` size of a code; `widths` of the hidden layers of the MLP.
    """

    backbone: nn.Module
    latent: int
    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> dict[str, jax.Array]:
        """x [B, H, W, 3] -> the backbone's features, and 'crelu' [B, 2 D], 'mean' and 'deviation' [B, latent], float32.

        'crelu', the published features, is (ReLU(p), ReLU(-p)) of p = batch-normalized 'pooled'.
        """
        out = self.backbone(x, train)
        norm = BatchNorm(use_running_average=not train, use_bias=False, use_scale=False, name="crelu")
        unit = norm(out["pooled"])
        h = out["pooled"]
        for i, width in enumerate(self.widths, 1):
            h = nn.Dense(width, use_bias=False, kernel_init=nn.initializers.he_normal(), precision="highest", name=f"linear{i}")(h)
            h = BatchNorm(use_running_average=not train, name=f"bn{i}", relu=True)(h)
        mean, raw = jnp.split(nn.Dense(2 * self.latent, precision="highest", name="code")(h), 2, axis=-1)
        crelu = jnp.concatenate([nn.relu(unit), nn.relu(-unit)], axis=-1)
        return {**out, "crelu": crelu, "mean": mean, "deviation": nn.softplus(raw)}


def build_discriminator(spec: Mapping, size: int, dtype) -> JointDiscriminator:
    """The discriminator of `config.model.discriminator`, fields of `JointDiscriminator`. Raises UserError for an unknown field."""
    return build({"joint": JointDiscriminator}, "discriminator", {"name": "joint", **spec}, size=size, dtype=dtype)


def build_bigbigan_encoder(spec: Mapping, latent: int, dtype) -> Encoder:
    """The encoder of `config.model.encoder`: the fields of `build_encoder`, and 'head', the widths of the MLP."""
    fields = dict(spec)
    widths = tuple(fields.pop("head"))
    return Encoder(build_encoder(fields, dtype), latent, widths)
