"""The Inception network against torch-fidelity with equal random weights, its weight files, and resizing against loops."""

import hashlib
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from test_torch_layout import randomize
from torch_reference import require_torch, require_torch_fidelity

from ssl_jax.errors import UserError
from ssl_jax.evals.lib.resize import resize, to_size
from ssl_jax.experiment import extractors
from ssl_jax.experiment.extractors import open_extractor
from ssl_jax.models.pretrained import inception, torch_file


@pytest.fixture(scope="module")
def fidelity():
    return require_torch_fidelity("feature_extractor_inceptionv3")


@pytest.fixture(scope="module")
def reference(fidelity, tmp_path_factory):
    """(torch-fidelity's network with random weights and statistics, the file that they are in)."""
    torch = require_torch()
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    blank = type("Blank", (fidelity.FeatureExtractorInceptionV3,), {"load_state_dict": lambda self, state: None})
    torch.save({}, path)
    network = randomize(blank("blank", ["2048"], feature_extractor_weights_path=path))
    torch.save(network.state_dict(), path)
    names = ["2048", "logits_unbiased", "logits"]
    return fidelity.FeatureExtractorInceptionV3("random", names, feature_extractor_weights_path=path), path


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def pictures(seed, batch, height, width):
    return np.random.default_rng(seed).integers(0, 256, (batch, height, width, 3), np.uint8)


@pytest.mark.full
def test_inception_features_and_logits_equal_torch_fidelity(reference, monkeypatch):
    network, path = reference
    torch = require_torch()
    images = pictures(0, 2, 40, 32)
    with torch.no_grad():
        pooled, unbiased, logits = (x.numpy() for x in network(torch.tensor(images.transpose(0, 3, 1, 2))))
    ours = open_extractor(f"inception:{path}@{digest(path)[:12]}", "legacy")
    got = ours.encode(images)
    assert (ours.dim, ours.classes) == (2048, 1008) == (pooled.shape[1], logits.shape[1])
    assert np.std(pooled) > 0.01
    for value, expected in ((got["pooled"], pooled), (got["logits"], unbiased)):
        assert np.abs(value - expected).max() < 5e-6 * np.abs(expected).max()  # rounding of float32 sums
    assert np.abs(logits - unbiased).max() > 0.1  # the bias, which the inception score omits
    seen = []
    monkeypatch.setattr(extractors, "run", lambda module, params, state, x, train: (seen.append(x), state))
    black_and_white = np.array([0, 255], np.uint8).reshape(2, 1, 1, 1)
    for mode in ("legacy", "pytorch_fid", "clean"):
        extractors._encode_inception.__wrapped__({"params": {}, "batch_stats": {}}, mode, black_and_white)
    ends = [[float(x[0].mean()), float(x[1].mean())] for x in seen]
    assert ends == [[-1, pytest.approx(127 / 128)], [-1, 1], [-1, pytest.approx(127 / 128)]]


@pytest.mark.full
def test_inception_parameter_count():
    variables = jax.eval_shape(inception.InceptionV3().init, jax.random.key(0), jnp.zeros((1, 299, 299, 3)))
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == 23_850_960 - 1008  # torchvision's without the biases of 'fc'
    assert len(jax.tree.leaves(variables["batch_stats"])) == 2 * 94
    with pytest.raises(ValueError, match="no training mode"):
        inception.InceptionV3().apply(variables, jnp.zeros((1, 299, 299, 3)), train=True)


def test_torch_weight_files_are_read_without_pytorch_or_rejected(tmp_path):
    torch = require_torch()
    state = {"a.weight": torch.randn(3, 4, 2), "b": torch.tensor(7), "c": torch.ones(5).double(), "d": torch.randn(9)[2:6]}
    for zipped in (True, False):  # the current format, and that before PyTorch 1.6, as in the published file
        path = tmp_path / f"{zipped}.pth"
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        found = torch_file.read_state_dict(path)
        assert {name: value.dtype for name, value in found.items()} == {name: value.numpy().dtype for name, value in state.items()}
        for name, value in state.items():
            np.testing.assert_array_equal(found[name], value)
    turned = {"a": torch.ones(2, 3).T}
    wrong = {"module": (torch.nn.Linear(2, 2), "uses torch.nn"), "turned": (turned, "not contiguous"), "list": ([1], "other contents")}
    for name, (value, message) in wrong.items():
        torch.save(value, tmp_path / name)
        with pytest.raises(UserError, match=rf"{name} is not a dictionary of tensors .*{message}"):
            torch_file.read_state_dict(tmp_path / name)
    (tmp_path / "cut").write_bytes((tmp_path / "False.pth").read_bytes()[:-20])
    (tmp_path / "text").write_bytes(b"hello")
    for name in ("cut", "text"):
        with pytest.raises(UserError, match=f"{name} is not a dictionary of tensors"):
            torch_file.read_state_dict(tmp_path / name)


def test_a_pickle_cannot_run_code(tmp_path):
    class Run:
        def __reduce__(self):
            return print, ("ran",)

    (tmp_path / "bad.pth").write_bytes(pickle.dumps(Run()))
    with pytest.raises(UserError, match=r"it uses builtins\.print"):
        torch_file.read_state_dict(tmp_path / "bad.pth")


def test_extractors_reject_missing_files_wrong_checksums_and_other_weights(tmp_path):
    path = tmp_path / "weights.npz"
    with pytest.raises(UserError, match=f"there is no file {path}"):
        open_extractor(f"inception:{path}")
    np.savez(path, **{"fc.weight": np.zeros((1000, 2048), np.float32)})
    with pytest.raises(UserError, match=rf"begins with {digest(path)[:8]}, not with 6726825d; .*: inception:{path}@{digest(path)[:8]}"):
        open_extractor(f"inception:{path}")
    with pytest.raises(UserError, match=r"not those of the Inception network of 2015-12-05: .* is missing \(471 such entries"):
        open_extractor(f"inception:{path}@{digest(path)[:8]}")
    with pytest.raises(UserError, match="'vgg' is unknown; choose 'random_conv', 'inception:/path"):
        open_extractor("vgg")


def test_only_the_published_weights_get_the_name_required_for_fid(monkeypatch, tmp_path):
    """All formats give equal arrays; the checksum decides the name."""
    open_extractor.cache_clear()
    state = {"fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}
    save_file(state, tmp_path / "w.safetensors")
    np.savez(tmp_path / "w.npz", **state)
    given = []
    monkeypatch.setattr(inception, "from_torch", lambda found: given.append(found) or {})
    for name in ("w.safetensors", "w.npz"):
        checksum = digest(tmp_path / name)
        spec = f"inception:{tmp_path / name}"
        assert open_extractor(f"{spec}@{checksum[:8].upper()}").name == "inception-v3"
        monkeypatch.setattr(extractors, "PUBLISHED", checksum[:8])
        opened = open_extractor(spec, "clean")
        assert (opened.name, opened.dim, opened.sha256, opened.resize) == ("inception-2015-12-05", 2048, checksum, "clean")
    assert len(given) == 4
    for found in given:
        np.testing.assert_array_equal(found["fc.weight"], state["fc.weight"])


# --- resizing


def loop(image, size, position):
    """Bilinear interpolation at `position(i, length, out)`, one pixel at a time, with repeated borders."""
    out = np.zeros((*size, 3))
    for i in range(size[0]):
        for j in range(size[1]):
            for a, weight_a in _two(position(i, image.shape[0], size[0]), image.shape[0]):
                for b, weight_b in _two(position(j, image.shape[1], size[1]), image.shape[1]):
                    out[i, j] += weight_a * weight_b * image[a, b]
    return out


def _two(at, length):
    at = min(max(at, 0), length - 1)
    low = int(np.floor(at))
    return [(low, 1 - (at - low)), (min(low + 1, length - 1), at - low)]


@pytest.mark.parametrize("size", [(11, 9), (4, 5)])
@pytest.mark.parametrize(
    ("mode", "position"),
    [("legacy", lambda i, length, out: i * length / out), ("pytorch_fid", lambda i, length, out: (i + 0.5) * length / out - 0.5)],
)
def test_bilinear_resizes_equal_slow_loops(mode, position, size):
    images = pictures(1, 2, 8, 7)
    expected = np.stack([loop(image.astype(np.float64), size, position) for image in images])
    np.testing.assert_allclose(resize(images, size, mode), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("size", [(299, 299), (20, 12)])
def test_clean_resize_equals_pillow_on_floats(size):
    images = pictures(2, 1, 48, 32)
    channels = [Image.fromarray(images[0, ..., c].astype(np.float32)).resize(size[::-1], Image.BICUBIC) for c in range(3)]
    expected = np.clip(np.stack(channels, -1), 0, 255)
    np.testing.assert_allclose(resize(images, size, "clean")[0], expected, rtol=0, atol=3e-3)


def test_resizes_equal_torch_fidelity_and_pytorch(fidelity):
    torch = require_torch()
    tensorflow = fidelity.interpolate_bilinear_2d_like_tensorflow1x
    images = pictures(3, 2, 33, 40)
    x = torch.tensor(images.transpose(0, 3, 1, 2)).float()
    for mode, theirs in (
        ("legacy", tensorflow(x, size=(299, 299), align_corners=False)),
        ("pytorch_fid", torch.nn.functional.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False)),
    ):
        np.testing.assert_allclose(resize(images, (299, 299), mode), theirs.numpy().transpose(0, 2, 3, 1), rtol=0, atol=5e-4)


def test_to_size_rounds_to_uint8():
    images = pictures(4, 2, 20, 30)
    images[0] = np.where(np.arange(30)[:, None] < 15, 0, 255)  # overshoots beyond both ends
    expected = np.round(np.asarray(resize(images, (31, 17), "clean")))
    np.testing.assert_array_equal(to_size(images, (31, 17)), expected)
    assert (expected.min(), expected.max()) == (0, 255)
