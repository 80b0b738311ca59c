"""Trained encoders for others: three forms of the same function, each a folder with a card, and the way back.

  safetensors  weights.safetensors under torchvision's or timm's names; PyTorch loads it with strict=True
  orbax        params/: the parameters and statistics of the whole method without its optimizers
  stablehlo    encode.stablehlo + weights.safetensors: a program for CPU, CUDA and TPU with a free batch; needs none of
               the model code. Of a tokenizer there are tokens.stablehlo and decode.stablehlo too

`card.json` beside them tells what the function is, what it expects, how well it did, and a SHA-256 of every file.
Nothing here is unpickled; a card names a method of this package and cannot name other code.
"""

from ssl_jax.export.folder import Encoder, load, write
from ssl_jax.export.formats import FORMATS, NoTorchLayout
from ssl_jax.export.source import TOLERANCES, Source, make_source

__all__ = ["FORMATS", "TOLERANCES", "Encoder", "NoTorchLayout", "Source", "load", "make_source", "write"]
