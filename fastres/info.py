"""What this machine offers, and why not where it does not: `python -m fastres info`."""

import importlib.metadata
import platform
from pathlib import Path

import torch


def machine(device: torch.device | None = None) -> dict[str, str]:
    """The conditions of a measurement on `device` (default: the CPU): hardware, threads, versions."""
    facts = {"device": _cpu()}
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts = {
            "device": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"sm_{properties.major}{properties.minor}",
            "host": facts["device"],
        }
    facts["CPU threads"] = str(torch.get_num_threads())
    facts["python"] = platform.python_version()
    for name in ("torch", "triton"):
        facts[name] = version(name)
    if device is not None and device.type == "cuda":
        facts["cuDNN"] = str(torch.backends.cudnn.version())
    return facts


def version(package: str) -> str:
    """The installed version of `package`, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return name


def gather() -> dict:
    """Everything that `python -m fastres info` shows.

    Returns:
        Plain values: "versions" and "devices" (name to text), "backends" (name to None or the reason why not) and
        "extension" (what the build wrote about the projection extension, with "available" and "cuda_available": None or
        the reason why not).
    """
    import fastres
    from fastres import backends
    from fastres.kernels import projection

    versions = {"fastres": fastres.__version__, "python": platform.python_version()}
    versions |= {
        name: version(name) for name in ("torch", "triton", "numpy", "torchvision", "timm", "rich", "matplotlib")
    }
    versions["CUDA (of torch)"] = torch.version.cuda or "none"
    devices = {"cpu": f"{_cpu()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = machine(torch.device("cuda", index))["device"]
    return {
        "versions": versions,
        "devices": devices,
        "backends": backends.available(),
        "extension": {
            **projection.build_outcome(),
            "available": projection.available(),
            "cuda_available": projection.cuda_available(),
        },
    }


def show() -> None:
    """Prints `gather()` as tables."""
    from fastres.train.console import print_table

    facts = gather()
    print_table("Versions", ["package", "version"], [list(row) for row in facts["versions"].items()])
    print_table("Devices", ["device", "what it is"], [list(row) for row in facts["devices"].items()])
    print_table("Backends", ["backend", "available"], [[name, why or "yes"] for name, why in facts["backends"].items()])
    extension = facts["extension"]
    built = [[name, str(extension[name])] for name in ("library", "compiler", "torch") if extension.get(name)]
    print_table("Projection extension (C++)", ["", ""], [["available", extension["available"] or "yes"], *built])
    compiled = [["nvcc", extension["nvcc"]]] if extension.get("nvcc") else []
    compiled += [["architectures", ", ".join(extension["cuda_architectures"])]] if compiled else []
    available = ["available", extension["cuda_available"] or "yes"]
    print_table("Projection extension, its CUDA kernels", ["", ""], [available, *compiled])
