"""Fashion-MNIST's four IDX files: finds them, fetches them, checks them, reads them.

Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms", 2017.
60,000 training and 10,000 test images, 28x28 grey, 10 balanced classes, MIT license.
"""

import gzip
import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy

from .errors import UserError

# sha256 of the decompressed files: Debian's and the public .gz files hold the same under different gzip headers.
FILES = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

PACKAGE = "dataset-fashion-mnist"
PACKAGE_SHA256 = "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0"
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"

_SECONDS_PER_COMMAND = 300
_SECONDS_WITHOUT_A_BYTE = 30


class _Unavailable(Exception):
    """Why one way of getting the files did not work."""


def read(folder: Path, part: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The images and labels of `part`, "train" or "t10k".

    Returns:
        uint8 images `[N, H, W]` and uint8 labels `[N]`.

    Raises:
        UserError: a file is missing, damaged, or does not fit the other.
    """
    images = _read_idx(Path(folder) / f"{part}-images-idx3-ubyte.gz", dimensions=3)
    labels = _read_idx(Path(folder) / f"{part}-labels-idx1-ubyte.gz", dimensions=1)
    if len(images) != len(labels):
        raise UserError(
            f"argument --data: {folder} holds {len(images)} {part} images but {len(labels)} labels; "
            "delete the folder, the next run fetches it anew"
        )
    return images, labels


def locate(folder: Path) -> Path | None:
    """Where all four files are: `folder`, `folder/fashion-mnist`, torchvision's `folder/FashionMNIST/raw`, or None."""
    for candidate in (folder, folder / "fashion-mnist", folder / "FashionMNIST" / "raw"):
        if all((candidate / name).is_file() for name in FILES):
            return candidate
    return None


def obtain(folder: Path, offline: bool = False, log: Callable[[str], None] = print) -> Path:
    """The folder that holds the four files, fetched into `folder/fashion-mnist` where they are not there yet.

    Tried in turn: `folder` itself, the Debian package where apt is, the public download. Whatever is fetched has its
    checksums verified first and then appears file by file under its final name, complete.

    Raises:
        UserError: none of these worked; the message lists each with its reason.
    """
    folder = Path(folder)
    found = locate(folder)
    if found is not None:
        return found
    tried = [f"{folder}: not all of {', '.join(FILES)} are there"]
    if offline:
        tried.append("nothing was fetched because of --offline")
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=".fetch-", dir=folder))
        except OSError as error:
            raise UserError(
                f"argument --data: {folder} cannot be written ({error.strerror}); name another folder"
            ) from error
        try:
            for name, fetch in ((f"Debian package {PACKAGE}", _fetch_package), (f"download from {URL}", _fetch_public)):
                log(f"Fashion-MNIST: trying the {name} (31 MB)")
                try:
                    fetch(work)
                    return _place(work, folder / "fashion-mnist")
                except _Unavailable as reason:
                    tried.append(f"{name}: {reason}")
        finally:
            shutil.rmtree(work, ignore_errors=True)
    raise UserError(
        "argument --data: Fashion-MNIST is not to be had. Tried: "
        + "; ".join(tried)
        + f". Put the four files into {folder} by hand, or name a folder that holds them"
    )


def _place(work: Path, target: Path) -> Path:
    for name, digest in FILES.items():
        try:
            content = gzip.decompress((work / name).read_bytes())
        except (OSError, EOFError, zlib.error) as error:
            raise _Unavailable(f"{name} is damaged ({error})") from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise _Unavailable(f"{name} has the wrong checksum")
    target.mkdir(exist_ok=True)
    for name in FILES:
        os.replace(work / name, target / name)
    return target


def _fetch_package(work: Path) -> None:
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise _Unavailable(f"there is no {tool} on this machine")
    try:
        _command("apt-get", "download", PACKAGE, cwd=work)
    except _Unavailable:
        _command("apt-get", "update", cwd=work)
        _command("apt-get", "download", PACKAGE, cwd=work)
    package = next(work.glob("*.deb"), None)
    if package is None:
        raise _Unavailable("apt-get left no package")
    if hashlib.sha256(package.read_bytes()).hexdigest() != PACKAGE_SHA256:
        raise _Unavailable("the package has the wrong checksum")
    _command("dpkg", "-x", package.name, "package", cwd=work)
    for name in FILES:
        source = next((work / "package").rglob(name), None)
        if source is None:
            raise _Unavailable(f"the package lacks {name}")
        os.replace(source, work / name)


def _fetch_public(work: Path) -> None:
    for name in FILES:
        try:
            with (
                urllib.request.urlopen(URL + name, timeout=_SECONDS_WITHOUT_A_BYTE) as answer,
                open(work / name, "wb") as file,
            ):
                shutil.copyfileobj(answer, file)
        except OSError as error:
            raise _Unavailable(f"{name}: {getattr(error, 'reason', error)}") from error


def _command(*words: str, cwd: Path) -> None:
    try:
        subprocess.run(
            words,
            cwd=cwd,
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_SECONDS_PER_COMMAND,
        )
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout or "").strip().splitlines()
        raise _Unavailable(
            f"'{' '.join(words)}' failed: {lines[-1] if lines else f'code {error.returncode}'}"
        ) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Unavailable(f"'{' '.join(words)}' failed: {error}") from error


def _read_idx(path: Path, dimensions: int) -> numpy.ndarray:
    """One gzipped IDX file of bytes: two zeros, the type (8), the rank, the sizes as big-endian int32, the data."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"argument --data: {path} is damaged ({error}); delete it, the next run fetches it anew"
        ) from error
    except OSError as error:
        raise UserError(f"argument --data: {path} cannot be read ({error.strerror}); name another folder") from error
    start = 4 + 4 * dimensions
    sizes = struct.unpack(f">{dimensions}I", content[4:start]) if len(content) >= start else ()
    expected = start + int(numpy.prod(sizes, dtype=numpy.int64))
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) != expected:
        raise UserError(
            f"argument --data: {path} is no IDX file of {dimensions} dimensions; delete it, the next run fetches it"
        )
    return numpy.frombuffer(content, numpy.uint8, offset=start).reshape(sizes)
