"""What importing the package brings with it, and its version."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

import fastres


def modules_after(code: str) -> set[str]:
    """Top-level names in sys.modules of a fresh Python that ran `code`; the last line says whether CUDA was touched."""
    report = "import sys; print(*sys.modules); t = sys.modules.get('torch'); print(t and t.cuda.is_initialized())"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    *_, modules, cuda = done.stdout.splitlines()
    assert cuda in ("None", "False")
    return {name.split(".")[0] for name in modules.split()}


HEAVY = {"triton", "torchvision", "matplotlib", "rich", "timm", "PIL"}


def test_the_package_alone_imports_nothing():
    assert not modules_after("import fastres") & {*HEAVY, "torch", "numpy"}


def test_using_it_imports_torch_only():
    code = (
        "import fastres, warnings\n"
        "model = fastres.models.cifar_resnet20()\n"
        "fastres.explain(fastres.convert(fastres.revert(model)))\n"
        "fastres.nn.Bottleneck, fastres.functional.bottleneck, fastres.plan, fastres.backends"
    )
    modules = modules_after(code)
    assert "torch" in modules
    assert not modules & HEAVY


def test_convert_is_the_function_whatever_was_imported_first():
    assert "torch" in modules_after("import fastres.conversion, fastres.explanation, fastres; fastres.convert.__name__")


@pytest.mark.parametrize("name", fastres.__all__)
def test_every_public_name_is_there(name):
    assert getattr(fastres, name) is not None
    assert name in dir(fastres)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fastres' has no attribute 'covert'"):
        fastres.covert  # noqa: B018


def test_version_is_the_installed_one():
    assert fastres.__version__ == importlib.metadata.version("fastres")
