"""Sources of images: the embedded scenes, any prepared TFDS dataset, a folder of images, alone or with masks or annotations.

A source has random access and returns *encoded* images, so that the reader decides how much to decode. It can be pickled
(worker processes reopen their files). It never imports TensorFlow, because it reads TFDS through ArrayRecord.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from ssl_jax.data import clevr, coco, norb
from ssl_jax.data.folders import FolderSource
from ssl_jax.data.mask_folders import MaskFolder, find_pairs
from ssl_jax.data.prepared import TfdsSource, contents, find_prepared, prepared_directory
from ssl_jax.data.scan import scan
from ssl_jax.data.source import Source
from ssl_jax.errors import UserError

EMBEDDED = "scenes"

__all__ = ["EMBEDDED", "FolderSource", "MaskFolder", "Source", "TfdsSource", "is_folder_of_images", "is_path", "open_source"]


def is_path(name: str) -> bool:
    """Whether `config.data.name` is a path rather than the name of a dataset."""
    return name.startswith(("/", ".", "~"))


def is_folder_of_images(name: str, data_dir: str = "") -> bool:
    """Whether `open_source` reads this as a folder of images."""
    named = name.partition("/")[0] == EMBEDDED or name == norb.NAME
    return not named and os.path.isdir(os.path.expanduser(name)) and _prepared(name, _data_dir(data_dir)) is None


def _data_dir(data_dir: str) -> str:
    return os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def _prepared(name: str, data_dir: str) -> str | None:
    """The prepared TFDS directory of a dataset, or None."""
    return (None if is_path(name) else find_prepared(data_dir, name)) or prepared_directory(os.path.expanduser(name))


def open_source(
    name: str,
    split: str,
    data_dir: str = "",
    names: Mapping[str, str] = {},
    kinds: Mapping[str, str] = {},
    follow_links: bool = False,
) -> Source:
    """Open a split of a dataset.

    Args:
      name: 'scenes' (embedded, prepared on first use; 'scenes/tiny' for tests), 'smallnorb/pairs' (see `norb`),
        'clevr/questions' (see `clevr`), a TFDS name
        ('cifar10', 'ds/config', 'ds:1.2.0') that is prepared below `data_dir`, the path of a prepared TFDS directory, or the
        path of a folder of images: alone, with masks (`MaskFolder`), or with annotations if `names` has features of them (`coco`).
      split: TFDS syntax ('train', 'train[:90%]', 'train+test') for TFDS; 'all', 'train', 'test' or the name of a split's
        folder for folders.
      data_dir: TFDS data directory; '' is $TFDS_DATA_DIR, else TFDS's own default (for 'scenes': a cache directory).
      names: {name in the batch: feature of the dataset}; other features keep their own names.
      kinds: {name in the batch: kind}, overriding the type of the feature; see `ssl_jax.data.features`.
      follow_links: in a folder of images, follow links to folders, and to files out of it.

    Raises:
      UserError: missing data, feature, split or image, or an interrupted preparation.
      MachineFault: a disk fails.
    """
    for given, key in ((name, "name"), (data_dir, "data_dir")):
        if "://" in given:
            raise UserError(
                f"config.data.{key}='{given}' is a URL, and data are read from files; mount the bucket (as by gcsfuse) or copy the "
                "data, and give the path"
            )
    if name.partition("/")[0] == EMBEDDED:
        from ssl_jax.data import scenes  # imports a renderer that nothing else needs

        return TfdsSource(scenes.prepare(data_dir, name.partition("/")[2] or "full").data_dir, split, name, names, kinds)
    data_dir = _data_dir(data_dir)
    if name in (norb.NAME, clevr.NAME):
        if names or kinds:
            raise UserError(f"config.data.features and kinds are fixed for '{name}'; leave them empty")
        wrapped = norb.NorbPairs if name == norb.NAME else clevr.ClevrQuestions
        return wrapped(open_source(name.partition("/")[0], split, data_dir))
    path, directory = os.path.expanduser(name), _prepared(name, data_dir)
    if directory is not None:
        return TfdsSource(directory, split, name, names, kinds)
    if os.path.isdir(path) and any(feature in coco.FEATURES and feature != "image" for feature in names.values()):
        return coco.CocoSource(path, split, names, kinds)
    if os.path.isdir(path):
        tree = scan(os.path.abspath(path), follow_links)
        if pairs := find_pairs(tree):
            return MaskFolder(path, split, pairs, names, kinds)
        return FolderSource(path, split, names, kinds, follow_links, tree)
    if os.path.isfile(path):
        raise UserError(f"data '{name}' is a file; unpack it if it is an archive, and give its folder")
    if is_path(name):
        raise UserError(f"data '{name}': no such folder; give a folder of images or a prepared TFDS directory")
    raise UserError(
        f"data '{name}' is not prepared in data_dir '{data_dir}' (there: {contents(data_dir)}); prepare it once where "
        f"TensorFlow is installed: tfds build {name} --data_dir {data_dir} --file_format array_record, "
        f"or give data_dir, or name='{EMBEDDED}'"
    )
