"""Large-scale visual representation pretraining in JAX: every family of methods under one train step."""

__version__ = "0.1.0"


def load(path):
    """The encoder that `python launch.py export` wrote to the folder `path`: `load(path)(images) -> features`.

    `images` are uint8 RGB [B, H, W, 3], any batch; features are {'pooled': [B, D], layers...}. See `ssl_jax.export`.
    """
    from ssl_jax import export  # here, so that `import ssl_jax` stays light

    return export.load(path)
