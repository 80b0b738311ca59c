"""The network of LPIPS: VGG16's convolutions with channel weights. The user provides the weights.

Simonyan and Zisserman 2015 (arXiv:1409.1556); Zhang et al. 2018 (arXiv:1801.03924).

The file is an .npz with 'conv1_1/kernel' [3, 3, 3, 64], 'conv1_1/bias' [64], ..., 'conv5_3/bias', and 'lin1' [64] ... 'lin5' [512].
`convert` writes it from two PyTorch files.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.models.common import shard_batch
from ssl_jax.models.conv import LAYOUT, conv
from ssl_jax.models.pretrained.torch_file import read_state_dict
from ssl_jax.models.pretrained.weights_file import check_archive, refused

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # (channels, convolutions); a max-pool precedes all but the first
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1]
TORCHVISION = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # indices of the convolutions in torchvision's `features`

NAMES = [f"conv{stage}_{i}" for stage, (_, convolutions) in enumerate(STAGES, 1) for i in range(1, convolutions + 1)]


def features(weights: dict[str, jax.Array], images: jax.Array, precision: str | None = "highest") -> list[jax.Array]:
    """Images [B, H, W, 3] in [0, 1], H, W >= 16 -> float32 relu1_2, 2_2, 3_3, 4_3, 5_3: [B, H / 2^i, W / 2^i, C].

    Products are float32 in full precision on every accelerator, which differences of nearly equal images need. precision=None is
    the default of the accelerator, several times faster and enough for a training loss.
    """
    x, out = (2 * images.astype(jnp.float32) - 1 - jnp.array(SHIFT)) / jnp.array(SCALE), []
    for stage, (_, convolutions) in enumerate(STAGES, 1):
        if stage > 1:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        for i in range(1, convolutions + 1):
            x = _convolve(x, weights[f"conv{stage}_{i}/kernel"], precision) + weights[f"conv{stage}_{i}/bias"]
            x = shard_batch(jnp.maximum(x, 0))
        out.append(x)
    return out


def lins(weights: dict[str, jax.Array]) -> list[jax.Array]:
    """The channel weights of the five layers."""
    return [weights[f"lin{stage}"] for stage in range(1, len(STAGES) + 1)]


def _convolve(x, kernel, precision):
    return conv(
        x, kernel, (1, 1), "SAME", lhs_dilation=(1, 1), rhs_dilation=(1, 1),
        dimension_numbers=jax.lax.conv_dimension_numbers(x.shape, kernel.shape, LAYOUT), feature_group_count=1,
        precision=precision,
    )  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    """{name: shape} of all arrays in a file."""
    found, before = {}, 3
    for stage, (channels, convolutions) in enumerate(STAGES, 1):
        for i in range(1, convolutions + 1):
            found[f"conv{stage}_{i}/kernel"], found[f"conv{stage}_{i}/bias"] = (3, 3, before, channels), (channels,)
            before = channels
        found[f"lin{stage}"] = (channels,)
    return found


def load(path: str, sha256: str) -> dict[str, np.ndarray]:
    """The weights in `path`, float32.

    Raises:
        UserError: the file is missing (the message says how to create it), has a checksum that does not start with `sha256`, or has
            other arrays.
    """
    if not Path(path).is_file():
        raise UserError(
            f"config.model.perceptual.path={str(path)!r} is no file; create it once from torchvision's vgg16-397923af.pth and the "
            "vgg.pth of LPIPS 0.1, and keep the checksum: python -c \"from ssl_jax.models.pretrained.vgg import convert; "
            "print(convert('vgg16-397923af.pth', 'vgg.pth', 'lpips.npz'))\""
        )
    with refused(Path(path), "no file of weights"), open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not sha256 or not found.startswith(sha256):
        raise UserError(f"the SHA-256 of {path} is {found}, not {sha256!r}; to use this file, set config.model.perceptual.sha256")
    with refused(Path(path), "no .npz file of arrays", "create it with convert"), zipfile.ZipFile(path) as archive:
        check_archive(archive, Path(path))
        with np.load(path, allow_pickle=False) as arrays:
            weights = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    wrong = [name for name, shape in shapes().items() if name not in weights or weights[name].shape != shape]
    if wrong or set(weights) != set(shapes()):
        raise UserError(f"{path} holds no weights of LPIPS: {', '.join(wrong) or 'it has extra arrays'}; create it with convert")
    return weights


def convert(vgg: str, lin: str, path: str) -> str:
    """Write the .npz `path` from state dicts of torchvision's vgg16 and of LPIPS' linear layers; returns its SHA-256.

    Raises:
        UserError: a file is no such state dict, or a channel weight is negative.
    """
    convolutions, linear, weights = read_state_dict(vgg), read_state_dict(lin), {}
    try:
        for name, number in zip(NAMES, TORCHVISION, strict=True):
            weights[f"{name}/kernel"] = convolutions[f"features.{number}.weight"].transpose(2, 3, 1, 0)
            weights[f"{name}/bias"] = convolutions[f"features.{number}.bias"]
        for stage in range(len(STAGES)):
            weights[f"lin{stage + 1}"] = linear[f"lin{stage}.model.1.weight"].reshape(-1)
    except KeyError as error:
        raise UserError(f"{vgg} or {lin} has no {error}; give the files of torchvision's vgg16 and of lpips/weights/v0.1") from error
    if any(weights[f"lin{stage}"].min() < 0 for stage in range(1, len(STAGES) + 1)):
        raise UserError(f"{lin} has negative channel weights, so distances could be negative; give the file of LPIPS 0.1")
    np.savez(path, **{name: array.astype(np.float32) for name, array in weights.items()})
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
