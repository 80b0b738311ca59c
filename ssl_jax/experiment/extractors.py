"""Feature extractors by name: random convolutions, Inception v3 from a file, or an encoder that `launch.py export` wrote."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import ssl_jax
from ssl_jax.engine.sharding import put_global, to_host
from ssl_jax.errors import UserError
from ssl_jax.evals.context import Extractor
from ssl_jax.evals.lib.real_features import INCEPTION
from ssl_jax.evals.lib.resize import Resize, resize, to_size
from ssl_jax.export.card import CARD, sha256
from ssl_jax.models.common import run
from ssl_jax.models.pretrained import inception
from ssl_jax.models.pretrained.arrays import read_arrays
from ssl_jax.objectives.perceptual import CHANNELS, random_features, random_kernels

PUBLISHED = "6726825d"  # SHA-256 of pt_inception-2015-12-05-6726825d.pth begins with this


@functools.lru_cache(maxsize=4)
def open_extractor(spec: str, mode: Resize = "legacy", mesh: Mesh | None = None) -> Extractor:
    """The extractor that `spec` names, with its weights on all devices of `mesh`.

    'random_conv': three random convolutions with fixed weights; needs no file.
    'inception:/path/to/pt_inception-2015-12-05-6726825d.pth': the network of the Frechet inception distance, in the file that
        pytorch-fid and torch-fidelity download. 'inception:/path@HEX' takes another file (.pth, .safetensors or .npz) whose SHA-256
        begins with HEX; its distances are not called FID.
    '/path/to/folder': an export of `launch.py export`, in any format.

    Args:
        mode: how images are resized to the 299 pixels of Inception; the other extractors ignore it.

    Raises:
        UserError: an unknown name, a missing file, another checksum, or weights of another network.
    """
    if spec == "random_conv":
        return _random_convolutions(mesh)
    if spec.startswith("inception:"):
        path, _, digest = spec.removeprefix("inception:").partition("@")
        return _inception(Path(path).expanduser(), digest.lower() or PUBLISHED, mode, mesh)
    folder = Path(spec).expanduser()
    if not os.path.isfile(folder / CARD):
        raise UserError(
            f"extractor {spec!r} is unknown; choose 'random_conv', 'inception:/path/to/pt_inception-2015-12-05-{PUBLISHED}.pth', "
            "or a folder that `launch.py export` wrote"
        )
    return _exported(folder, mesh)


def _random_convolutions(mesh) -> Extractor:
    return Extractor("random_conv", CHANNELS[-1], functools.partial(_encode_random, _put(random_kernels(), mesh)))


@jax.jit
def _encode_random(kernels, images):
    return {"pooled": random_features(kernels, images.astype(jnp.float32) / 255)[-1].mean((1, 2))}


def _inception(path: Path, expected: str, mode: Resize, mesh) -> Extractor:
    if not path.is_file():
        raise UserError(f"there is no file {path}; give the Inception weights that pytorch-fid or torch-fidelity download")
    digest = sha256(path)
    if not digest.startswith(expected):
        raise UserError(
            f"the SHA-256 of {path} begins with {digest[:8]}, not with {expected[:8]}; copy the file again, or use this one: "
            f"inception:{path}@{digest[:8]}"
        )
    published = digest.startswith(PUBLISHED)
    weights = _put(inception.from_torch(read_arrays(path)), mesh)
    name = INCEPTION if published else "inception-v3"
    return Extractor(name, 2048, functools.partial(_encode_inception, weights, mode), 1008, digest, mode)


@functools.partial(jax.jit, static_argnums=1)
def _encode_inception(weights, mode, images):
    x = resize(images, (inception.SIZE, inception.SIZE), mode)
    x = x / 127.5 - 1 if mode == "pytorch_fid" else (x - 128) / 128  # as pytorch-fid and torch-fidelity do
    return run(inception.InceptionV3(), weights["params"], {"batch_stats": weights["batch_stats"]}, x, train=False)[0]


def _exported(folder: Path, mesh) -> Extractor:
    encoder = ssl_jax.load(folder)
    card = encoder.card
    if "pooled" not in card["features"]:
        raise UserError(f"extractor {str(folder)!r} has no feature 'pooled'; export an encoder that has one")
    height, width = card["input"]["height"], card["input"]["width"]

    def encode(images):
        # On one device, since exported programs run on one; at the size that the encoder was evaluated with.
        images = jax.device_put(to_host(images, mesh))
        if images.shape[1:3] != (height, width):
            images = to_size(images, (height, width))
        return {"pooled": _put(jax.device_get(encoder(images)["pooled"]), mesh)}

    network = (card["encoder"] or {}).get("name")
    name = "-".join(part for part in (card["method"], network, f"step{card['step']}") if part)
    return Extractor(name, int(card["features"]["pooled"][-1]), encode, 0, sha256(folder / CARD), f"clean to {height}x{width}")


def _put(tree, mesh):
    if mesh is None:
        return jax.device_put(tree)
    return jax.tree.map(lambda x: put_global(np.asarray(x), NamedSharding(mesh, PartitionSpec())), tree)
