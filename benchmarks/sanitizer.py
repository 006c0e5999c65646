"""NVIDIA's compute-sanitizer over the projection extension's CUDA kernels, where it is installed and runs.

Every form of every kernel, bfloat16 and float16, on small shapes: memcheck for accesses outside of memory, racecheck
for races in shared memory. Exit code 1 when it finds something, 0 when it finds nothing or cannot run here, which is
then said.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

TOOLS = ("memcheck", "racecheck")

TRIVIAL = "import torch; torch.zeros(8, device='cuda').add_(1).cpu()"

KERNELS = """
import torch
from fastres import backends, cases
from fastres.kernels import projection
from fastres.measure.kernels import launchers

for namespace, reason in (
    ("projection", projection.cuda_available()),
    ("projection.hopper", backends.reason("projection.hopper")),
):
    if reason is not None:
        print(f"not checked: {namespace}: {reason}")
        continue
    k = launchers(namespace)
    for case in cases.BY_FAMILY["projection"]:
        for dtype in (torch.bfloat16, torch.float16):
            for n, h, w, c, k_ in ((4, 9, 8, 24, 48), (3, 14, 14, 264, 136), (2, 9, 7, 27, 33)):
                sizes = {"n": n, "h": h, "w": w, "c": c, "k": k_}
                case.run(k, case.make(cases.Maker(dtype, "cuda"), **sizes))
torch.cuda.synchronize()
"""


def main() -> int:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("not checked: compute-sanitizer is not installed")
        return 0
    # The extension's kernels alone: PyTorch's own would take most of the time.
    options = ["--error-exitcode", "1", "--kernel-name", "kernel_substring=fastres"]
    found = 0
    for tool in TOOLS:
        command = [sanitizer, "--tool", tool, *options, sys.executable, "-c"]
        if tool == TOOLS[0] and subprocess.run([*command, TRIVIAL]).returncode:
            print("not checked: compute-sanitizer does not run on this device")
            return 0
        found |= subprocess.run([*command, KERNELS]).returncode
    return int(found != 0)


if __name__ == "__main__":
    sys.exit(main())
