"""Large-scale visual representation pretraining in JAX: all methods share one train step."""

from ssl_jax.version import VERSION as __version__

__all__ = ["__version__", "load"]


def load(path):
    """Load the encoder that `python launch.py export` wrote to the folder `path`: `load(path)(images) -> features`.

    `images` are uint8 RGB [B, H, W, 3] for any B; features are {'pooled': [B, D], layers...}. See `ssl_jax.export`.
    """
    from ssl_jax import export  # imported here so that `import ssl_jax` stays fast

    return export.load(path)
