"""Where there is no CUDA, Triton's kernels run in its interpreter, which must be said before triton is imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The tensors of the tests are small: a second thread costs more than it brings, the more so beside other workers.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--all-parts",
        action="store_true",
        help="check the Triton and CUDA kernels for every part and dtype, not for sm_80 and sm_90 without float16 only",
    )
    parser.addoption(
        "--all-mutants", action="store_true", help="plant every known bug in the CUDA kernels, not six of them only"
    )


def pytest_configure(config):
    # What Triton's interpreter does inside numpy, and NaN and infinity there.
    for ignored in (
        "ignore:Conversion of an array with ndim > 0:DeprecationWarning",
        "ignore:invalid value encountered:RuntimeWarning:triton.runtime.interpreter",
    ):
        config.addinivalue_line("filterwarnings", ignored)


@pytest.fixture(scope="session")
def all_parts(pytestconfig) -> bool:
    """Whether everything is compiled that can be."""
    return pytestconfig.getoption("--all-parts")


@pytest.fixture(scope="session")
def compiled(all_parts):
    """`compiled(family)`: the static figures of every case of a family, made once."""
    pytest.importorskip("triton", reason="triton is not installed")
    from fastres import static_checks

    made = {}

    def get(family: str):
        if family not in made:
            requests = static_checks.requests(family, everything=all_parts)
            made[family] = static_checks.figures(requests, static_checks.PARTS if all_parts else (80, 90))
        return made[family]

    return get
