"""The same kernels on a GPU: `emulated.Kernels`' functions through the extension's ops, on CPU tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fastres import backends

# What lies around a tensor is copied with it up to this size; beyond, it is address space that is mostly not there.
_WHOLE_STORAGE = 2**28


def reason(path: str) -> str | None:
    """Why a path cannot run on this machine's GPU, None where it can."""
    extension = backends.load("projection")
    return extension.cuda_available() if path == "portable" else backends.reason("projection.hopper")


class Kernels:
    """Functions with the names and signatures of `emulated.Kernels`'; results come back to the CPU."""

    @contextlib.contextmanager
    def options(self, **options) -> Iterator[None]:
        """A GPU has an order of its own."""
        yield

    def projection_fprop(self, x, weight, bn, stride, residual=None, relu=False, path="portable", into=None) -> Tensor:
        arguments = (_there(x), _there(weight), _there(bn), stride, _there(residual), relu)
        return namespace(path).projection_fprop(*arguments).cpu()

    def projection_conv(self, x, weight, stride, path="portable", into=None) -> tuple[Tensor, ...]:
        y, stats = namespace(path).projection_conv(_there(x), _there(weight), stride)
        return y.cpu(), *(part.cpu() for part in stats)

    def projection_gram(self, x, stride, path="portable") -> tuple[Tensor, Tensor]:
        moments = namespace(path).projection_gram(_there(x), stride)
        assert not moments.pivot.any()
        return moments.gram.cpu(), moments.total.cpu()

    def projection_wgrad(self, g, x, stride, out=None, with_sum=True, path="portable") -> tuple[Tensor, Tensor | None]:
        p, total = namespace(path).projection_wgrad(_there(g), _there(x), stride, _there(out), with_sum)
        return p.cpu(), None if total is None else total.cpu()

    def projection_dgrad(
        self, dx, g, x, u, v, k, stride, out=None, relu=False, v_scale=None, d=None, path="portable"
    ) -> None:  # fmt: skip
        moved = _there(dx)
        g, x, u, v, k, out, v_scale, d = map(_there, (g, x, u, v, k, out, v_scale, d))
        namespace(path).projection_dgrad(moved, g, x, u, v, k, stride, out, relu, v_scale, d)
        _storage(dx).copy_(_storage(moved)) if _small(dx) else dx.copy_(moved)


def namespace(path: str):
    why = reason(path)
    if why is not None:
        raise RuntimeError(why)
    return backends.load("projection" if path == "portable" else "projection.hopper")


def _small(t: Tensor) -> bool:
    return t.untyped_storage().nbytes() <= _WHOLE_STORAGE


def _storage(t: Tensor) -> Tensor:
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())


def _there(t: Tensor | None) -> Tensor | None:
    """The tensor on the GPU, laid out in its memory as it is here."""
    if t is None:
        return None
    if _small(t):
        around = _storage(t).cuda()
    else:
        around = torch.empty(t.untyped_storage().nbytes() // t.element_size(), dtype=t.dtype, device="cuda")
    there = around.as_strided(t.shape, t.stride(), t.storage_offset())
    return there if _small(t) else there.copy_(t)
