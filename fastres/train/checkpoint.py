"""Checkpoints: one file, complete or not there, read without running any code in it."""

from pathlib import Path

import torch

from fastres.files import replacing

from .errors import UserError

FORMAT = 1
KEYS = ("format", "options", "epoch", "step", "trainers", "rng")


def save(path: Path, contents: dict) -> None:
    """Writes `contents` to a temporary file beside `path`, flushes it to the disk and puts it in `path`'s place.

    Whatever happens on the way, `path` is the old checkpoint or the new one.

    Args:
        contents: `KEYS` less `format`: tensors and plain values only.

    Raises:
        UserError: the disk is full, or the folder not writable.
    """
    try:
        with replacing(path) as file:
            torch.save({"format": FORMAT, **contents}, file)
    except OSError as error:
        raise UserError(
            f"argument --out: {path} cannot be written ({error.strerror}); make room, or name another folder"
        ) from error


def load(path: Path) -> dict:
    """What `save` was given.

    Raises:
        UserError: the file is missing, damaged, or not a checkpoint of this program.
    """
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"argument --resume: there is no {path}; name a checkpoint, or leave --resume out") from error
    except IsADirectoryError as error:
        raise UserError(f"argument --resume: {path} is a folder; name the checkpoint in it") from error
    except PermissionError as error:
        raise UserError(f"argument --resume: {path} cannot be read ({error.strerror})") from error
    except Exception as error:  # zip, pickle and tensor readers each raise their own kinds
        raise UserError(
            f"argument --resume: {path} is damaged or no checkpoint ({_first_line(error)}); "
            "name another one, or leave --resume out"
        ) from error
    missing = [key for key in KEYS if not isinstance(contents, dict) or key not in contents]
    if missing:
        raise UserError(
            f"argument --resume: {path} is no checkpoint of fastres train (it lacks {', '.join(missing)}); "
            "name one that it wrote"
        )
    if contents["format"] != FORMAT:
        raise UserError(
            f"argument --resume: {path} has format {contents['format']}, this version reads format {FORMAT}; "
            "resume it with the version that wrote it"
        )
    return contents


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:120] if lines else type(error).__name__
