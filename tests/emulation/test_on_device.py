"""The CUDA kernels on a GPU: the cases that the emulation runs."""

from __future__ import annotations

import threading

import kernel_cases
import on_device
import pytest
import torch

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

# dgrad's: dx, x, g and out with images 1.2e9 elements apart.
FAR_BYTES = 40e9


@pytest.fixture
def on_gpu():
    """The kernels; a test of a path that this GPU does not run is skipped with the reason."""

    def get(path: str) -> on_device.Kernels:
        if on_device.reason(path) is not None:
            pytest.skip(on_device.reason(path))
        return on_device.Kernels()

    return get


def cases_of(*kinds):
    return [case for op in kernel_cases.OPS for kind in kinds for case in kind(*op)]


@pytest.mark.parametrize("case", cases_of(kernel_cases.definition, kernel_cases.aligned), ids=str)
def test_definition_and_the_same_bits_again(on_gpu, case):
    kernels = on_gpu(case.path)
    first, again = case.run(kernels), case.run(kernels)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("case", cases_of(kernel_cases.far), ids=str)
def test_offsets_beyond_32_bits(on_gpu, case):
    kernels = on_gpu(case.path)
    if torch.cuda.mem_get_info()[0] < FAR_BYTES:
        pytest.skip(f"needs {FAR_BYTES / 1e9:.0f} GB of free GPU memory")
    case.run(kernels)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("path", ["portable", "hopper"])
@pytest.mark.parametrize("c", [24, 27])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nan_reaches_what_depends_on_it_and_nothing_else(on_gpu, dtype, c, path):
    kernel_cases.check_nan(on_gpu(path), dtype, c, path)


@pytest.mark.parametrize("path", ["portable", "hopper"])
def test_a_kernel_may_be_the_first_work_of_a_thread(on_gpu, path):
    """As of autograd's: the thread has no CUDA context until something makes one current."""
    on_gpu(path)
    k = on_device.namespace(path)
    x, g = (torch.ones(2, 8, 8, c, dtype=torch.bfloat16, device="cuda") for c in (24, 40))
    k.projection_wgrad(g, x, 1)  # whose memory the allocator gives the thread, without asking CUDA
    found = []
    thread = threading.Thread(target=lambda: found.append(k.projection_wgrad(g, x, 1)[0]))
    thread.start()
    thread.join()
    assert found and (found[0] == 2 * 8 * 8).all()
