"""Small Triton kernels with one property each, that the static checks are to find.

As a program it compiles them for the parts that are its arguments and prints [name, part, figures] of each as JSON: it
has to be a process without TRITON_INTERPRET.
"""

import json
import signal
import sys
from dataclasses import asdict

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastres import static_checks


@triton.jit
def rows_in_64_bits(x, y, M, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    at = r[:, None] * C + c[None, :]
    inside = (r < M)[:, None] & (c < C)[None, :]
    tl.store(y + at, tl.load(x + at, mask=inside, other=0.0), mask=inside)


@triton.jit
def rows_in_32_bits(x, y, M, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    at = r[:, None] * C + c[None, :]
    inside = (r < M)[:, None] & (c < C)[None, :]
    tl.store(y + at, tl.load(x + at, mask=inside, other=0.0), mask=inside)


@triton.jit
def counts(x, y, COLUMNS: tl.constexpr, DOWN: tl.constexpr):
    """y = the sum of x's rows 0 to 9, taken upwards by several programs, or downwards."""
    c = tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    if DOWN:
        for row in tl.range(9 - tl.program_id(0), -1, -tl.num_programs(0)):
            total += tl.load(x + row * COLUMNS + c).to(tl.float32)
    else:
        for row in tl.range(tl.program_id(0), 10, tl.num_programs(0)):
            total += tl.load(x + (9 - row) * COLUMNS + c).to(tl.float32)
    tl.store(y + c, total.to(y.dtype.element_ty))


@triton.jit
def product(a, b, y, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SCALE: tl.constexpr, NS: tl.constexpr):
    """y = a b^T, of one tile; with SCALE the operand a is changed on its way, which only registers allow."""
    m, n, k = tl.arange(0, BM).to(tl.int64), tl.arange(0, BN).to(tl.int64), tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for block in tl.range(0, K, BK, num_stages=NS):
        left = tl.load(a + m[:, None] * K + block + k[None, :])
        right = tl.load(b + n[:, None] * K + block + k[None, :])
        if SCALE:
            left = (left.to(tl.float32) * 0.5).to(left.dtype)
        total = tl.dot(left, right.T, total, input_precision="ieee")
    tl.store(y + m[:, None] * BN + n[None, :], total.to(y.dtype.element_ty))


@triton.jit
def product_by_descriptor(a, b, y, K, OUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """The same with descriptors that the host made."""
    total = tl.zeros((BM, BN), tl.float32)
    for block in tl.range(0, K, BK, num_stages=3):
        total = tl.dot(a.load([0, block]), b.load([0, block]).T, total)
    y.store([0, 0], total.to(OUT))


@triton.jit
def boxes_by_descriptor(x, y, N: tl.constexpr, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr):
    n = tl.program_id(0) * N
    y.store([n, 0, 0, 0], x.load([n, 0, 0, 0]))


@triton.jit
def accumulators_that_do_not_fit(x, y, K, SIZE: tl.constexpr):
    r, c = tl.arange(0, SIZE).to(tl.int64), tl.arange(0, SIZE)
    at = r[:, None] * SIZE + c[None, :]
    sums = tl.zeros((SIZE, SIZE), tl.float32)
    squares = tl.zeros((SIZE, SIZE), tl.float32)
    for k in tl.range(0, K):
        value = tl.load(x + at + k).to(tl.float32)
        sums += value
        squares += value * value
    tl.store(y + at, sums * squares)


@triton.jit
def refused(x):
    tl.static_assert(False, "planted")


@triton.constexpr_function
def die():
    getattr(signal, "raise_signal")(9)  # noqa: B009 (Triton refuses a plain call)


@triton.jit
def crashes_the_compiler(x):
    die()


def bf16(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def launch_products(dtype: torch.dtype, m: int = 128, scale: bool = False, stages: int = 3) -> None:
    a, b, y = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((m, 256), (128, 256), (m, 128)))
    product[(1,)](a, b, y, 256, m, 128, 64, scale, stages, num_warps=8)


def launch_copies(kernel) -> None:
    kernel[(32,)](bf16(1000, 64), bf16(1000, 64), 1000, 64, 32, 64)


def launch_descriptors() -> None:
    operands = [TensorDescriptor.from_tensor(bf16(128, 256), [128, 64]) for _ in range(2)]
    result = TensorDescriptor.from_tensor(bf16(128, 128), [128, 128])
    product_by_descriptor[(1,)](*operands, result, 256, tl.bfloat16, BM=128, BN=128, BK=64, num_warps=8)


def launch_boxes() -> None:
    box = [2, 8, 8, 64]
    x, y = (TensorDescriptor.from_tensor(bf16(4, 8, 8, 64), box) for _ in range(2))
    boxes_by_descriptor[(2,)](x, y, *box)


LAUNCHES = {
    "rows in 64 bits": lambda: launch_copies(rows_in_64_bits),
    "rows in 32 bits": lambda: launch_copies(rows_in_32_bits),
    "a loop upwards": lambda: counts[(2,)](bf16(10, 64), bf16(64), 64, False),
    "a loop downwards": lambda: counts[(2,)](bf16(10, 64), bf16(64), 64, True),
    "operands in shared memory": lambda: launch_products(torch.float16),
    "operand in registers": lambda: launch_products(torch.bfloat16, scale=True),
    "float32": lambda: launch_products(torch.float32, m=16),
    "too few rows for HGMMA": lambda: launch_products(torch.float16, m=16),
    "too many stages": lambda: launch_products(torch.float16, stages=9),
    "descriptors": launch_descriptors,
    "descriptors of boxes": launch_boxes,
    "spills": lambda: accumulators_that_do_not_fit[(1,)](bf16(128, 128), bf16(128, 128), 9, 128, num_warps=4),
    "refused": lambda: refused[(1,)](bf16(1)),
    "crash": lambda: crashes_the_compiler[(1,)](bf16(1)),
}


def main(parts: list[int]) -> None:
    names, launches = [], []
    for name, launch in LAUNCHES.items():
        for part in parts:
            with static_checks.recorded(part) as made:
                launch()
            names.append((name, part))
            launches += made
    rows = static_checks.compiled(launches)
    json.dump([[*name, asdict(row)] for name, row in zip(names, rows, strict=True)], sys.stdout)


if __name__ == "__main__":
    main([int(part) for part in sys.argv[1:]])
