"""The pictures below a folder: read once in a process, by threads, without opening them."""

from __future__ import annotations

import dataclasses
import functools
import os
import stat
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ssl_jax.data.decode import MAGIC_BYTES, MAX_FILE_BYTES, sniff
from ssl_jax.data.source import OWN_ERRORS, one_line, printable, unreadable
from ssl_jax.errors import UserError

# Files of other names are opened, to see whether they begin like an image.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif", ".jp2", ".j2k")
THREADS = 16  # on network disks the latency per folder dominates
RECENT = 0.1  # seconds: a later change of the folder may have the same time stamp

TO_FOLDER, OUT, ABOVE, BROKEN = "link to a folder", "link out of the folder", "link to a folder above it", "broken link"
UNFOLLOWED = (TO_FOLDER, OUT)
NO_PERMISSION = "folder without permission"


@dataclasses.dataclass
class Tree:
    """Pictures by their sorted relative paths, and what was left out."""

    paths: list[str]
    sizes: np.ndarray  # int64 [N], bytes
    folders: list[str]  # relative, '' is the root
    folder_of: np.ndarray  # int32 [N], index into `folders`
    rejected: dict[str, str]  # {relative path: reason}
    stamps: dict[str, int]  # {relative folder: time of its last change, ns}

    @functools.cached_property
    def hashes(self) -> np.ndarray:
        """uint32 [N], of the paths."""
        return np.array([zlib.crc32(path.encode("utf-8", "surrogateescape")) for path in self.paths], np.uint32)


_trees: dict[tuple[str, bool], Tree] = {}
_lock = threading.Lock()


def scan(root: str, follow_links: bool = False) -> Tree:
    """The pictures below `root`, from memory if no folder has changed since the last call. Hidden files are ignored.

    Args:
      follow_links: follow links to folders, and to files out of `root`.

    Raises:
      UserError: `root` itself cannot be read.
      MachineFault: a disk fails, or a folder vanishes.
    """
    key = (os.path.realpath(root), follow_links)
    with _lock:
        tree = _trees.get(key)
        if tree is None or not _unchanged(root, tree):
            began = time.time_ns()
            tree = _scan(root, follow_links)
            _trees.pop(key, None)
            if max(tree.stamps.values()) < began - RECENT * 1e9:
                _trees[key] = tree
        return tree


def _unchanged(root: str, tree: Tree) -> bool:
    try:
        return all(os.stat(os.path.join(root, folder)).st_mtime_ns == stamp for folder, stamp in tree.stamps.items())
    except OSError:
        return False  # the scan says what is wrong


class _Folder(NamedTuple):
    name: str  # relative
    real: tuple[str, ...]  # real paths of the folders above it and its own; one entry if links are not followed
    pictures: list[tuple[str, int]]  # (name, bytes)
    folders: list[tuple[str, tuple[str, ...]]]
    rejected: dict[str, str]
    stamp: int


def _scan(root: str, follow_links: bool) -> Tree:
    inside = os.path.realpath(root)
    found: list[_Folder] = []
    with ThreadPoolExecutor(THREADS) as pool:
        level = [("", (inside,))]
        while level:
            read = list(pool.map(lambda child: _read_folder(root, *child, follow_links), level))
            found += read
            level = [child for folder in read for child in folder.folders]
    found.sort()
    pictures = [
        (f"{folder.name}/{name}" if folder.name else name, size, number)
        for number, folder in enumerate(found)
        for name, size in folder.pictures
    ]
    pictures.sort()
    return Tree(
        [path for path, _, _ in pictures],
        np.array([size for _, size, _ in pictures], np.int64),
        [folder.name for folder in found],
        np.array([number for _, _, number in pictures], np.int32),
        {path: reason for folder in found for path, reason in folder.rejected.items()},
        {folder.name: folder.stamp for folder in found},
    )


def _read_folder(root: str, relative: str, real: tuple[str, ...], follow_links: bool) -> _Folder:
    """One folder. Entries of a usual name cost one `stat` each."""
    full = os.path.join(root, relative)
    pictures, folders, rejected, stamp = [], [], {}, 0
    try:
        stamp = os.stat(full).st_mtime_ns
        with os.scandir(full) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                path = f"{relative}/{name}" if relative else name
                if entry.is_symlink():
                    kind = _linked(entry, real, follow_links)
                else:
                    kind = "folder" if entry.is_dir(follow_symlinks=False) else None
                if kind == "folder":
                    folders.append((path, (*real, os.path.realpath(entry.path)) if follow_links else real))
                    continue
                size, reason = (0, kind) if kind else _file(entry)
                if reason is None:
                    pictures.append((name, size))
                else:
                    rejected[path] = reason
    except OSError as error:
        if error.errno not in OWN_ERRORS or not os.path.isdir(full):
            raise unreadable(full, error) from error
        if not relative:
            raise UserError(f"folder '{printable(root)}' cannot be read ({error.strerror}); give permission to list it") from error
        return _Folder(relative, real, [], [], {relative: NO_PERMISSION}, stamp)
    return _Folder(relative, real, pictures, folders, rejected, stamp)


def _linked(entry: os.DirEntry, real: tuple[str, ...], follow_links: bool) -> str | None:
    """'folder' for a link to follow, None for a file, else why it is left out."""
    try:
        to_folder = entry.is_dir()
        if not to_folder:
            entry.stat()
    except OSError as error:
        if error.errno not in OWN_ERRORS:
            raise
        return "no permission" if isinstance(error, PermissionError) else BROKEN
    if to_folder:
        if not follow_links:
            return TO_FOLDER
        return ABOVE if os.path.realpath(entry.path) in real else "folder"
    if not follow_links and not os.path.realpath(entry.path).startswith(real[0] + os.sep):
        return OUT
    return None


def _file(entry: os.DirEntry) -> tuple[int, str | None]:
    """(bytes, None), or (0, why it is no picture)."""
    try:
        status = entry.stat()
        if not stat.S_ISREG(status.st_mode):
            return 0, "not a file"
        if not status.st_size:
            return 0, "empty file"
        if status.st_size > MAX_FILE_BYTES:
            return 0, f"larger than {MAX_FILE_BYTES >> 20} MiB"
        if entry.name.lower().endswith(EXTENSIONS):
            return status.st_size, None
        with open(entry.path, "rb", buffering=0) as file:
            return status.st_size, sniff(file.read(MAGIC_BYTES))
    except OSError as error:
        if error.errno not in OWN_ERRORS:
            raise
        return 0, "no permission" if isinstance(error, PermissionError) else one_line(error)
