"""What a measurement depends on besides the code that was timed."""

from __future__ import annotations

import datetime
import os
import shutil
import subprocess
from pathlib import Path

import torch

from fastres import info, plan

COMPARED = (
    *("device", "driver", "torch", "triton", "cuDNN", "CPU threads", "commit", "settings"),
    plan.ENVIRONMENT_VARIABLE,
)
"""Where two runs differ in one of these, their rows do not belong into one file."""


def gather(device: torch.device) -> dict[str, str]:
    """Names to texts: the machine, versions, commit, date and settings. What cannot be found out is left out."""
    facts = info.machine(device)
    found = {"driver": _driver(device), "commit": _commit(), "clocks": clocks(device)}
    facts |= {name: text for name, text in found.items() if text}
    facts["date"] = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    facts["settings"] = _settings()
    facts[plan.ENVIRONMENT_VARIABLE] = os.environ.get(plan.ENVIRONMENT_VARIABLE) or "not set"
    return facts


def clocks(device: torch.device) -> str | None:
    """The clock of a GPU's multiprocessors now; None on a CPU and where it cannot be read."""
    if device.type != "cuda":
        return None
    megahertz = _nvidia_smi(device, "clocks.sm")
    return f"SM {megahertz} MHz" if megahertz else None


def clock_note(before: str | None, after: str | None) -> str | None:
    """One text of two readings of `clocks`."""
    if before is None or after is None:
        return before or after
    return f"{before} before, {after.removeprefix('SM ')} after; as found, not locked"


def _driver(device: torch.device) -> str | None:
    return _nvidia_smi(device, "driver_version") if device.type == "cuda" else None


def _nvidia_smi(device: torch.device, field: str) -> str | None:
    # By its UUID: CUDA_VISIBLE_DEVICES numbers devices anew, nvidia-smi does not.
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    if uuid is None:
        return None
    identity = "GPU-" + str(uuid).removeprefix("GPU-")
    text = _output(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", f"--id={identity}"])
    return text.splitlines()[0].strip() if text else None


def _commit() -> str | None:
    root = Path(info.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    commit = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    # Results may be kept in the checkout; they change no figure.
    paths = ["--", ".", ":!benchmarks/results"]
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", *paths])
    return commit and commit.strip() + ("-dirty" if changed else "")


def _output(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def _settings() -> str:
    return ", ".join(
        f"{name} {'on' if on else 'off'}"
        for name, on in {
            "TF32 in matrix products": torch.backends.cuda.matmul.allow_tf32,
            "TF32 in cuDNN": torch.backends.cudnn.allow_tf32,
            "cudnn.benchmark": torch.backends.cudnn.benchmark,
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        }.items()
    )
