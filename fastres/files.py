"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replaces a text file atomically."""
    with replacing(path) as file:
        file.write(text.encode())


class replacing:
    """A binary file that takes `path`'s place when the block ends well, and vanishes when it does not."""

    def __init__(self, path: Path):
        self._path = Path(path)

    def __enter__(self):
        self._file = tempfile.NamedTemporaryFile(dir=self._path.parent, prefix=f".{self._path.name}-", delete=False)
        return self._file

    def __exit__(self, kind, error, traceback):
        with self._file as file:
            if kind is None:
                file.flush()
                os.fsync(file.fileno())
        if kind is not None:
            os.unlink(self._file.name)
            return
        os.chmod(self._file.name, 0o666 & ~_umask())
        os.replace(self._file.name, self._path)
        _sync_folder(self._path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself survive a power cut, where folders can be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
