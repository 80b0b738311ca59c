"""Files given as weights that hold none, or more than they should."""

import collections
import io
import pickle
import struct
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from ssl_jax.errors import UserError
from ssl_jax.models.pretrained import vgg
from ssl_jax.models.pretrained.arrays import read_arrays


class Storage:
    """Pickles as torch.save pickles a tensor."""

    def __init__(self, key, count, shape, kind="Float"):
        self.key, self.count, self.shape, self.kind = key, count, shape, kind


class Pickler(pickle._Pickler):
    """Writes names of torch without importing it."""

    def save_global(self, obj, name=None):
        self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            return self.save_global(obj)
        if isinstance(obj, Storage):
            strides = tuple(int(np.prod(obj.shape[i + 1 :])) for i in range(len(obj.shape)))
            self.save_global(Global("torch._utils", "_rebuild_tensor_v2"))
            self.write(b"(")
            self.write(b"(")
            for part in ("storage", Global("torch", f"{obj.kind}Storage"), obj.key, "cpu", obj.count):
                self.save(part)
            self.write(b"tQ")
            for part in (0, obj.shape, strides, False):
                self.save(part)
            return self.write(b"tR")
        return super().save(obj, save_persistent_id)


Global = collections.namedtuple("Global", "module name")


def torch_zip(path, value, data=(), compression=zipfile.ZIP_STORED, pickled=None):
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(value)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", buffer.getvalue() if pickled is None else pickled)
        for key, content in data:
            archive.writestr(f"a/data/{key}", content)
    return path


def test_the_files_of_this_test_are_as_torch_writes_them(tmp_path):
    values = np.arange(6, dtype="<f4")
    path = torch_zip(tmp_path / "a.pth", {"w": Storage("0", 6, (2, 3))}, [("0", values.tobytes())])
    np.testing.assert_array_equal(read_arrays(path)["w"], values.reshape(2, 3))


@pytest.fixture
def bomb(tmp_path):
    content = bytes(64 << 20)
    return torch_zip(tmp_path / "bomb.pth", {"w": Storage("0", 16 << 20, (16 << 20,))}, [("0", content)], zipfile.ZIP_DEFLATED)


def test_an_archive_that_inflates_is_refused_before_it_is_read(bomb, tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("it was read"))
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("it was read"))
    assert bomb.stat().st_size < 1 << 20
    with pytest.raises(UserError, match=r"bytes would inflate to 67,108,\d+"):
        read_arrays(bomb)
    with pytest.raises(UserError, match=r"bytes would inflate to 67,108,\d+"):
        read_arrays(bomb.rename(tmp_path / "bomb.npz"))
    with pytest.raises(UserError, match=r"bytes would inflate to 67,108,\d+"):
        vgg.load(str(tmp_path / "bomb.npz"), vgg.hashlib.sha256((tmp_path / "bomb.npz").read_bytes()).hexdigest())


def old_format(*storages):
    """The format before PyTorch 1.6, up to the object."""
    buffer = io.BytesIO()
    for part in (0x1950A86A20F9469CFC6C, 1001, {}, {f"w{i}": Storage(str(i), n, (n,)) for i, n in enumerate(storages)}):
        Pickler(buffer, 2).dump(part)
    return buffer.getvalue() + pickle.dumps([], 2)


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def tensors():
    return b"\x10\0\0\0\0\0\0\0" + b'{"a":{"dtype":"F' + b"32"


BAD = {
    "text.pth": b"hello",
    "empty.pth": b"",
    "other.pth": pickle.dumps({"a": 1}),
    "keys.pth": pickle.dumps({("a", "b"): np.float32}),
    "system.pth": b"cos\nsystem\n(S'echo'\ntR.",
    "recursive.pth": b"(" * 10000 + b"t.",
    "number.pth": b"I" + b"9" * 5000 + b"\n.",
    "many.pth": old_format(*[100] * 8),
    "huge.pth": old_format(1 << 60),
    "negative.pth": old_format(-1),
    "zip.pth": npz(a=np.zeros(3)),
    "cut.pth": npz(a=np.zeros(3))[:-30],
    "text.npz": b"hello",
    "empty.npz": b"",
    "objects.npz": npz(a=np.array([{}], object)),
    "words.npz": npz(a=np.array(["a"])),
    "header.npz": npz(a=np.zeros(3)).replace(b"'shape': (3,)", b"'shape': (8,)"),
    "text.safetensors": b"hello",
    "empty.safetensors": b"",
    "cut.safetensors": tensors(),
    "long.safetensors": struct.pack("<Q", 1 << 60) + b"{}",
    "object.safetensors": struct.pack("<Q", 2) + b"[]",
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_holds_no_weights_is_one_line(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(BAD[name])
    with pytest.raises(UserError) as caught:
        read_arrays(path)
    assert str(caught.value).startswith(f"{path} is no") and "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["pth", "npz", "safetensors"])
def test_a_directory_or_nothing_in_place_of_weights_is_one_line(suffix, tmp_path):
    (tmp_path / f"folder.{suffix}").mkdir()
    for name in ("folder", "nothing"):
        with pytest.raises(UserError, match=rf"{name}\.{suffix} is no file"):
            read_arrays(tmp_path / f"{name}.{suffix}")


def test_a_cut_safetensors_file_is_one_line(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": np.ones(1000, np.float32)}, path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match="is no safetensors file"):
        read_arrays(path)
