"""Calls of the CUDA kernels whose results are known: what their tests run, and what the planted bugs must fail."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import torch
from emulated import Kernels
from torch import Tensor

from fastres.kernels import reference
from fastres.numerics import assert_sums, unit_roundoff

# n, h, w, c, k, stride. Rows that no tile's size divides, single pixels, an empty batch, channels of no multiple of 8
# and of less than a tile. Tiles of the depth are 32 wide, or 64 on Hopper, with stages for up to 4, or 8.
SIZES = [
    (1, 7, 7, 24, 40, 2),
    (2, 9, 9, 200, 264, 3),  # 7 tiles of C; two tiles of columns
    (2, 9, 8, 27, 33, 2),
    (1, 1, 1, 64, 64, 2),
    (3, 15, 13, 72, 136, 2),  # two tiles of rows, the second ragged
    (0, 5, 5, 16, 8, 2),
    (1, 8, 8, 8, 8, 1),
    (1, 14, 11, 320, 24, 1),
    (1, 7, 7, 130, 27, 2),
    (5, 7, 7, 64, 128, 2),
    (2, 17, 5, 16, 280, 3),
    (1, 5, 6, 3, 5, 1),
]
# Columns and rows of a GEMM in more than one tile, and sums over pixels in several splits and many tiles.
LARGE = [(1, 38, 35, 40, 72, 1), (2, 24, 27, 136, 24, 1), (1, 40, 34, 72, 200, 1)]
# Deep enough that Hopper's stages are used a second time, where tiles have 256, 128 and 64 columns.
DEEP = [(1, 5, 5, 456, 136, 2), (1, 5, 5, 584, 72, 2), (1, 5, 5, 704, 64, 2), (1, 4, 5, 64, 720, 2)]

FAR = 1_200_000_000
MAP_NORESERVE = 0x4000  # mmap.MAP_NORESERVE on Linux, which Python 3.10 does not name


@dataclass(frozen=True)
class Case:
    """A kernel on inputs drawn from a seed; `words` are the optional arguments that are given.

    layout: "dense"; "view", parts of larger tensors, whose rest must not matter; "unaligned", dense but no multiple of
    16 bytes from the start of memory; "far", images 1.2e9 elements apart, so that offsets exceed 32 bits.
    """

    op: str
    sizes: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    path: str = "portable"
    words: tuple[str, ...] = ()
    layout: str = "dense"

    def __str__(self) -> str:
        n, h, w, c, k, stride = self.sizes
        size = f"{n}x{h}x{w}x{c}-to-{k}-stride{stride}"
        return "-".join([self.op, self.path, str(self.dtype)[6:], size, self.layout, *self.words])

    def run(self, kernels: Kernels) -> dict[str, Tensor]:
        """The results, checked against the definition."""
        return getattr(self, f"_{self.op}")(kernels, Inputs(self))

    def _fprop(self, kernels: Kernels, t: Inputs) -> dict[str, Tensor]:
        residual = t.residual if "residual" in self.words else None
        relu = "relu" in self.words
        into = t.output() if self.layout != "dense" else None
        out = kernels.projection_fprop(t.x, t.weight, t.bn, t.stride, residual, relu, self.path, into)
        exact = reference.projection_fprop(*doubles(t.x, t.weight, t.bn), t.stride, double(residual), relu)
        magnitudes = reference.projection_fprop(*absolutes(t.x, t.weight, t.bn), t.stride, absolute(residual))
        assert_sums(out, exact, magnitudes, t.c)
        return {"out": out}

    def _conv(self, kernels: Kernels, t: Inputs) -> dict[str, Tensor]:
        into = t.output() if self.layout != "dense" else None
        y, count, mean, m2 = kernels.projection_conv(t.x, t.weight, t.stride, self.path, into)
        exact, magnitudes = (t.rows(of(t.x)) @ of(t.weight).T for of in (double, absolute))
        assert_sums(y.flatten(0, 2), exact, magnitudes, t.c)
        check_statistics(y, count, mean, m2)
        return {"y": y, "count": count, "mean": mean, "m2": m2}

    def _gram(self, kernels: Kernels, t: Inputs) -> dict[str, Tensor]:
        gram, total = kernels.projection_gram(t.x, t.stride, self.path)
        rows = t.rows(t.x)
        assert_sums(gram, rows.T @ rows, rows.abs().T @ rows.abs(), len(rows))
        assert_sums(total, rows.sum(0), rows.abs().sum(0), len(rows))
        expect(torch.equal(gram, gram.T), "gram is not symmetric")
        return {"gram": gram, "total": total}

    def _wgrad(self, kernels: Kernels, t: Inputs) -> dict[str, Tensor]:
        out = t.out if "out" in self.words else None
        p, total = kernels.projection_wgrad(t.g, t.x, t.stride, out, "sum" in self.words, self.path)
        exact = reference.projection_wgrad(*doubles(t.g, t.x), t.stride, double(out))
        magnitudes = reference.projection_wgrad(*absolutes(t.g, t.x), t.stride, double(out))
        assert_sums(p, exact[0], magnitudes[0], t.g.shape[:3].numel())
        if total is None:
            return {"p": p}
        assert_sums(total, exact[1], magnitudes[1], t.g.shape[:3].numel())
        return {"p": p, "sum": total}

    def _dgrad(self, kernels: Kernels, t: Inputs) -> dict[str, Tensor]:
        k = t.k if "k" in self.words else None
        out = t.out if "out" in self.words else None
        relu = "relu" in self.words
        v_scale = t.v_scale if "v_scale" in self.words else None
        d = t.d if "d" in self.words else None
        exact, magnitudes = t.dx.double(), t.dx.double().abs()
        for result, of in ((exact, double), (magnitudes, absolute)):
            scaled = of(t.v) if v_scale is None or t.v is None else of(t.v) * of(v_scale)
            reference.projection_dgrad(
                result, of(t.g), of(t.x), of(t.u), scaled, of(k), t.stride, double(out), relu and of is double, d=of(d)
            )
        before = t.dx.clone()
        kernels.projection_dgrad(t.dx, t.g, t.x, t.u, t.v, k, t.stride, out, relu, v_scale, d, self.path)
        strided = (slice(None), slice(None, None, t.stride), slice(None, None, t.stride))
        assert_sums(t.dx[strided], exact[strided], magnitudes[strided], t.c + t.g.shape[3] + 1)
        between = torch.ones(t.dx.shape, dtype=torch.bool)
        between[strided] = False
        expect(torch.equal(t.dx[between], before[between]), "dx changed between the strided pixels")
        return {"dx": t.dx}


class Inputs:
    """Arguments of all kernels; sums' terms have mixed signs, channels different scales, and `out` zeros and NaN."""

    def __init__(self, case: Case):
        n, h, w, self.c, k, self.stride = case.sizes
        self.generator = torch.Generator().manual_seed(hash(case.sizes) % 2**31)
        self.dtype, self.layout = case.dtype, case.layout
        spread = torch.logspace(-1, 1, self.c)
        self.x = self._pixels(n, h, w, self.c, spread)
        self.size = (*self.x[:, :: self.stride, :: self.stride].shape[:3], k)
        self.g, self.residual = self._pixels(*self.size), self._pixels(*self.size)
        self.out = self._pixels(*self.size)
        values = self.out.flatten().clone()
        values[::5], values[1::7], values[2::11] = 0.0, -0.0, torch.nan
        self.out.copy_(values.view(self.size))
        self.dx = self._pixels(n, h, w, self.c)
        self.weight, self.u = (self._dense((k, self.c)) for _ in range(2))
        self.v = self._dense((self.c, self.c)) if "v" in case.words else None
        self.bn, self.k, self.d, self.v_scale = (self._normal(*size) for size in ((4, k), (self.c,), (self.c,), ()))

    def output(self) -> Tensor:
        """Memory of the layout for a tensor `[N, Ho, Wo, K]`."""
        return self._pixels(*self.size, torch.nan)

    def rows(self, t: Tensor) -> Tensor:
        """The strided pixels, float64."""
        return t[:, :: self.stride, :: self.stride].double().flatten(0, 2)

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator)

    def _dense(self, size: tuple[int, int]) -> Tensor:
        """A matrix, contiguous in every layout."""
        shift = 1 if self.layout == "unaligned" else 0
        memory = torch.full([size[0] * size[1] + shift], torch.nan, dtype=self.dtype)
        return memory[shift:].view(size).copy_(self._normal(*size))

    def _pixels(self, n: int, h: int, w: int, c: int, scale: Tensor | float = 1.0) -> Tensor:
        values = self._normal(n, h, w, c) * scale
        if self.layout == "far":
            size = ((n - 1) * FAR + h * w * c) * self.dtype.itemsize
            # Address space of which only the touched pages are there.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
            around = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=self.dtype)
            return around.as_strided((n, h, w, c), (FAR, w * c, c, 1)).copy_(values)
        if self.layout == "view":
            # Wider by multiples of eight elements: 16-byte accesses stay possible.
            around = torch.full([n, h + 3, w + 2, (c + 7) // 8 * 8 + 24], torch.nan, dtype=self.dtype)
            return around[:, 1 : h + 1, 2:, 8 : c + 8].copy_(values)
        return self._dense((n * h * w, c)).view(n, h, w, c).copy_(values)


def expect(condition: bool | Tensor, otherwise: str) -> None:
    """An assertion with words, which a planted bug is recognised by; pytest adds none outside test modules."""
    if not condition:
        raise AssertionError(otherwise)


def double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def absolute(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double().abs()


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [t.double() for t in tensors]


def absolutes(*tensors: Tensor) -> list[Tensor]:
    return [t.double().abs() for t in tensors]


def check_statistics(y: Tensor, count: Tensor, mean: Tensor, m2: Tensor) -> None:
    """Welford partials, combined in float64, against those of y, as it was rounded.

    A partial's mean has as many roundings as it has rows, of at most their largest value, and enters its own m2 and
    the combination's between partials by the product with a deviation.
    """
    rows = y.double().flatten(0, 2)
    total, mean, m2 = len(rows), mean.double(), m2.double()
    expect(count.sum() == total and (count > 0).all(), f"partials of {count.tolist()} rows are wrong, of {total}")
    if not total:
        return
    weights = count.double()[:, None] / total
    ours = (weights * mean).sum(0)
    roundings = (count.max().double() + 12) * unit_roundoff(torch.float32)
    of_mean = roundings * rows.abs().amax(0)
    expect(((ours - rows.mean(0)).abs() <= of_mean).all(), "the partials' means are wrong")
    exact = (rows - rows.mean(0)).square().sum(0)
    combined = m2.sum(0) + (weights * (mean - ours).square()).sum(0) * total
    bound = roundings * exact + 4 * of_mean * (total * exact).sqrt() + 4 * total * of_mean.square()
    expect(((combined - exact).abs() <= bound).all(), "the partials' m2 are wrong")


def forms(op: str) -> list[tuple[str, ...]]:
    """Combinations of an operation's optional arguments."""
    return {
        "fprop": [(), ("residual",), ("relu",), ("residual", "relu")],
        "conv": [()],
        "gram": [()],
        "wgrad": [("out", "sum"), ("sum",), ("out",), ()],
        "dgrad": [
            ("v", "k", "out"),
            ("v", "k"),
            ("k", "out", "relu"),
            ("v", "k", "v_scale", "d"),
            (),
            ("v", "out", "relu", "v_scale"),
            ("v", "k", "relu"),
            ("v", "k", "d", "relu"),
            ("v", "k", "d", "out"),
        ],
    }[op]


OPS = [(op, path) for op in ("fprop", "conv", "gram", "wgrad", "dgrad") for path in ("portable", "hopper")]
OPS.remove(("conv", "hopper"))  # There is none.


def forms_of(op: str, path: str) -> list[tuple[str, ...]]:
    """Those that the path has; a masked g is the portable one's."""
    return [words for words in forms(op) if path == "portable" or "out" not in words]


def definition(op: str, path: str) -> list[Case]:
    """All sizes in both dtypes; layouts and optional arguments take turns."""
    words = forms_of(op, path)
    layouts = ["dense", "view", "unaligned"] if path == "portable" else ["dense", "view"]
    sizes = SIZES + LARGE + (DEEP if path == "hopper" and op in ("fprop", "dgrad") else [])
    chosen = []
    for i, size in enumerate(sizes):
        for j, dtype in enumerate((torch.bfloat16, torch.float16)):
            chosen.append(
                Case(op, size, dtype, path, words[(i + j) % len(words)], layouts[(i // 2 + j) % len(layouts)])
            )
    if path == "hopper":  # More tiles than run at a time.
        chosen += {
            "fprop": [Case(op, (1, 1, 2, 8, 33_800, 1), path=path)],
            "dgrad": [Case(op, (1, 1, 2, 33_800, 8, 1), path=path)],
        }.get(op, [])
    return chosen


def far(op: str, path: str) -> list[Case]:
    """Offsets beyond 32 bits, by vectors and one by one."""
    words = {"fprop": ("residual",), "wgrad": ("sum",), "dgrad": ("v", "relu")}.get(op, ())
    sizes = ((torch.bfloat16, (3, 5, 5, 24, 16, 2)), (torch.float16, (3, 4, 5, 27, 9, 1)))
    chosen = [Case(op, size, dtype, path, words, "far") for dtype, size in sizes]
    if op in ("wgrad", "dgrad") and path == "portable":
        chosen.append(Case(op, (3, 5, 5, 24, 16, 2), torch.bfloat16, path, (*words, "out"), "far"))
    return chosen


def aligned(op: str, path: str) -> list[Case]:
    """Sizes that are multiples of the tiles', aligned memory: every access is a vector."""
    sizes = [(1, 32, 32, columns, columns, 2) for columns in (64, 256)]
    return [Case(op, size, path=path, words=words) for size in sizes for words in forms_of(op, path)]


def check_profile(kernels: Kernels, case: Case) -> None:
    with kernels.options(profile=True):
        case.run(kernels)
        lines = kernels.profile()
    expect(lines, "nothing was counted")
    wasteful = [line for line in lines if line.conflicts or line.sectors > line.ideal]
    if wasteful:
        raise AssertionError("bank conflicts or more sectors than are needed:\n" + "\n".join(map(str, wasteful)))


def check_definition(kernels: Kernels, case: Case) -> None:
    case.run(kernels)


def check_nan(kernels: Kernels, dtype: torch.dtype, c: int, path: str) -> None:
    """NaN reaches what depends on it and nothing else."""
    k = 40
    generator = torch.Generator().manual_seed(0)
    x, g, dx = (torch.randn(size, generator=generator).to(dtype) for size in ((2, 6, 5, c), (2, 3, 3, k), (2, 6, 5, c)))
    weight, v = (torch.randn(size, generator=generator).to(dtype) for size in ((k, c), (c, c)))
    bn, shift = torch.randn(4, k, generator=generator), torch.randn(c, generator=generator)
    x[1, 1, 1] = torch.nan  # a pixel between the strided ones
    x[0, 2, 4, 13] = torch.nan
    gram, total = kernels.projection_gram(x, 2, path)
    assert gram[13].isnan().all() and gram.isnan().sum() == 2 * c - 1 and total.isnan().nonzero().tolist() == [[13]]
    for out in (
        kernels.projection_fprop(x, weight, bn, 2, path=path),
        kernels.projection_fprop(x, weight, bn, 2, g, True, path),
        kernels.projection_conv(x, weight, 2)[0],
    ):
        assert out[0, 1, 2].isnan().all() and out.isnan().sum() == k
    p, sum_g = kernels.projection_wgrad(g, x, 2, path=path)
    assert p[:, 13].isnan().all() and p.isnan().sum() == k and sum_g.isfinite().all()
    for relu in (False, True):
        after = dx.clone()
        kernels.projection_dgrad(after, g, x, weight, v, shift, 2, relu=relu, path=path)
        # The mask of x_s > 0 turns what is NaN to zero, but not where x_s is NaN itself.
        nan = torch.ones(c, dtype=torch.bool) if not relu else ~(x[0, 2, 4] <= 0)
        assert torch.equal(after[0, 2, 4].isnan(), nan) and after.isnan().sum() == nan.sum()

    mask = torch.randn(2, 3, 3, k, generator=generator).to(dtype)
    g[0, 0, 0, 5], mask[0, 0, 0, 5] = torch.nan, -1  # masked
    mask[1, 2, 2, 7] = torch.nan  # lets g through
    clean = x.nan_to_num(nan=1.0)
    p, sum_g = kernels.projection_wgrad(g, clean, 2, mask, path=path)
    exact = reference.projection_wgrad(g.nan_to_num(nan=0).double(), clean.double(), 2, mask.double())
    torch.testing.assert_close(p.double(), exact[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sum_g.double(), exact[1], atol=1e-4, rtol=1e-4)
    g[1, 2, 2, 7] = torch.nan
    p, sum_g = kernels.projection_wgrad(g, clean, 2, mask, path=path)
    assert p[7].isnan().all() and p.isnan().sum() == c and sum_g.isnan().nonzero().tolist() == [[7]]
    after = dx.clone()
    kernels.projection_dgrad(after, g, clean, weight, v, shift, 2, mask, path=path)
    assert after[1, 4, 4].isnan().all() and after.isnan().sum() == c


CHECKS = {
    "definition": (definition, check_definition),
    "far": (far, check_definition),
    "profile": (aligned, check_profile),
}
