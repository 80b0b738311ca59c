"""Export trained encoders in three forms, each a folder with a card, and load them.

  safetensors  weights.safetensors with torchvision's or timm's names; PyTorch loads it with strict=True
  orbax        params/: parameters and statistics of the whole method, without optimizers
  stablehlo    encode.stablehlo + weights.safetensors: a program for CPU, CUDA and TPU with a free batch size; it needs no
               model code. Tokenizers also have tokens.stablehlo and decode.stablehlo, a segmentation has
               segment.stablehlo

`card.json` describes the function, its input and its metrics, and holds a SHA-256 of every file. Nothing is unpickled; a card can
only name methods of this package.
"""

from ssl_jax.export.folder import Encoder, load, write
from ssl_jax.export.formats import FORMATS, NoTorchLayout
from ssl_jax.export.source import TOLERANCES, Source, make_source

__all__ = ["FORMATS", "TOLERANCES", "Encoder", "NoTorchLayout", "Source", "load", "make_source", "write"]
