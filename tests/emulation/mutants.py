"""Bugs to plant in the CUDA kernels, one at a time in a copy of their sources: each must be found by some kernel case.

An old text must occur once in its file, so this table follows the sources.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in `file`; a case of kernel_cases.CHECKS[check], of the op and path, must then fail.

    kind: what the first failure says, a key of KINDS. quick: among the six of every run of the tests.
    """

    name: str
    kind: str
    old: str
    new: str
    file: str
    op: str
    path: str = "portable"
    check: str = "definition"
    quick: bool = False


KINDS = {
    "values": r"are wrong",
    "bounds": r"out of bounds|between the pixels",
    "unwritten": r"were never written|element .* nobody has written",
    "global": r"race: element|is written twice",
    "race": r"race: shared bytes|still reads|shared bytes .* (under way|nobody has written)",
    "order": r"deadlock|divergent|more arrivals|bytes more were copied|bytes that nobody copies",
    "wgmma": r"never waited for|no async_proxy_fence|descriptor begins within",
    "profile": r"bank conflicts or more sectors",
}

WAIT = "    wait_copies<stages - 2>();\n"
BARRIER = "    sync_block();  // this tile is there for every thread, and the one before it has been used\n"
PREFETCH = "    copy_next();\n"
PROLOGUE = "for (int i = 0; i < stages - 1; ++i) copy_next();"
COMMIT = "    ++next;\n    commit_copies();\n"


def pipeline(file: str, op: str, count: str) -> list[Mutant]:
    """Of a k loop over `count` tiles; those of row_products.cuh and column_products.cuh are alike."""
    mutant = functools.partial(Mutant, kind="race", file=file, op=op)
    return [
        mutant(f"{op}: no wait for copies", old=WAIT + BARRIER, new=BARRIER, quick=op == "wgrad"),
        mutant(f"{op}: waits for a group too few", old=WAIT + BARRIER, new=WAIT.replace("2", "1") + BARRIER),
        mutant(f"{op}: waits after the barrier", old=WAIT + BARRIER, new=BARRIER + WAIT),
        mutant(f"{op}: no barrier in the k loop", old=WAIT + BARRIER, new=WAIT),
        mutant(f"{op}: copies before the barrier", old=BARRIER + PREFETCH, new=PREFETCH + BARRIER),
        mutant(f"{op}: copies a stage too far", old=PROLOGUE, new=PROLOGUE.replace("stages - 1", "stages")),
        mutant(f"{op}: no group without copies", old=COMMIT, new=f"    if (next++ < {count}) commit_copies();\n"),
    ]


rows, columns, tiles = "row_products.cuh", "column_products.cuh", "tiles.cuh"
fprop = functools.partial(Mutant, file=rows, op="fprop")
conv = functools.partial(Mutant, file=rows, op="conv")
dgrad = functools.partial(Mutant, file=rows, op="dgrad")
wgrad = functools.partial(Mutant, file=columns, op="wgrad")
combine = functools.partial(Mutant, file="combine.cu", op="wgrad")
slow = functools.partial(Mutant, kind="profile", op="fprop", check="profile")
ring = functools.partial(Mutant, file="hopper_tiles.cuh", op="fprop", path="hopper")
hopper_rows = functools.partial(Mutant, file="hopper_row_products.cu", op="fprop", path="hopper")
hopper_columns = functools.partial(Mutant, file="hopper_column_products.cu", op="wgrad", path="hopper")

MUTANTS = [
    *pipeline(rows, "fprop", "tiles"),
    *pipeline(columns, "wgrad", "count"),
    # row_products.cuh: which elements
    fprop(
        "the depth's last tile left out",
        "values",
        "; tile < tiles; ++tile) {\n    wait",
        "; tile + 1 < tiles; ++tile) {\n    wait",
    ),
    fprop(
        "the depth's tiles rounded down",
        "values",
        "first_tiles + (p.second.depth + depth - 1) / depth;",
        "first_tiles + p.second.depth / depth;",
    ),
    fprop("half of a tile's depth", "values", "k < depth / 16; ++k", "k < depth / 16 - 1; ++k"),
    fprop("reads a row too many", "bounds", "= m >= p.m ? -1 : first", "= m > p.m ? -1 : first", quick=True),
    fprop("reads channels past the last", "bounds", "offset[i] >= 0 && k < all ?", "offset[i] >= 0 ?"),
    fprop("reads weights past the last", "bounds", "k >= all || n >= p.n ? 0", "k >= all ? 0"),
    fprop(
        "writes a row too many",
        "bounds",
        "m = row + tile_row;\n      if (m >= p.m) continue;",
        "m = row + tile_row;\n      if (m > p.m) continue;",
    ),
    fprop("writes columns past the last", "bounds", "  if (n >= p.n) return;\n", ""),
    fprop("adds the addend of another row", "values", "m = row + r + i * rows_at_once;", "m = row + r;"),
    # its barriers
    fprop(
        "the epilogue reuses memory without a barrier",
        "race",
        "  wait_copies<0>();\n  sync_block();  // from here",
        "  wait_copies<0>();  // from here",
        quick=True,
    ),
    fprop(
        "no barrier between staging and writing",
        "race",
        "  sync_block();\n  write_tile<Config>",
        "  write_tile<Config>",
    ),
    conv(
        "no barrier before statistics are combined",
        "race",
        "  sync_block();\n  const int64_t group",
        "  const int64_t group",
    ),
    # its layouts
    fprop(
        "copies swizzled otherwise than loads",
        "values",
        "const uint32_t at = swizzled<a_chunks>(thread / a_chunks + i * a_rows, chunk);",
        "const uint32_t at = ((thread / a_chunks + i * a_rows) * a_chunks + chunk) * 16;",
    ),
    fprop(
        "quadrants of A's fragment exchanged",
        "values",
        "(warp_row + i * 16 + lane % 16, k * 2 + lane / 16)",
        "(warp_row + i * 16 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2)",
    ),
    fprop(
        "B's registers exchanged",
        "values",
        "b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]",
        "b[j / 2][j % 2], b[j / 2][j % 2 + 2]",
        quick=True,
    ),
    fprop("the halves of staged columns exchanged", "values", "low = swapped ? two : one", "low = swapped ? one : two"),
    # its statistics
    conv(
        "rows past the last count in m2",
        "values",
        "h * 8 < rows ? deviation * deviation",
        "h * 8 < 64 ? deviation * deviation",
    ),
    conv("every warp counts as if it were full", "values", "return row + first >= p.m ? 0u :", "return true ? 64u :"),
    conv(
        "a step of the shuffles left out",
        "values",
        "(int mask = 4; mask < 32; mask *= 2) total",
        "(int mask = 8; mask < 32; mask *= 2) total",
    ),
    conv("a shuffle by half of a warp", "order", "m2 += shuffle_xor(m2", "if (lane < 16) m2 += shuffle_xor(m2"),
    conv("statistics of what is not rounded", "values", "value = unpack<T>(pack<T>(value, 0)).x;", ""),
    # its second operands
    dgrad("rows of the first operands kept", "bounds", "next == 0 || next == first_tiles", "next == 0"),
    dgrad("scales the first product a tile late", "values", "tile + 1 == first_tiles &&", "tile == first_tiles &&"),
    dgrad("multiplies neighbours by one slope", "values", "slope[2 * pair + 1] * two", "slope[2 * pair] * two"),
    dgrad("masks the first operands", "race", "if (p.mask && !in_first(tile)) {", "if (p.mask) {"),
    # what is slow only
    slow("staged rows share their banks", old="staged_row = columns + 8", new="staged_row = columns", file=rows),
    slow("staged columns read in order", old="swapped = c / 32 % 2 * 4,", new="swapped = 0,", file=rows),
    slow(
        "scale and shift loaded one by one",
        old="const float* source, uint32_t left) {\n  if constexpr (vectors) {",
        new="const float* source, uint32_t left) {\n  if constexpr (false) {",
        file=tiles,
    ),
    slow("no swizzle", old="(chunk ^ (row / rows_per_line % permuted))", new="chunk", file=tiles, quick=True),
    # tiles.cuh
    fprop("division rounds down", "bounds", "/ d + 1;", "/ d;", file=tiles),
    fprop("reads an odd channel too many", "bounds", "if (i < left) word", "if (i <= left) word", file=tiles),
    fprop(
        "row offsets of 32 bits",
        "bounds",
        "return n * r.n_stride + h * r.h_stride + w * r.w_stride;",
        "return static_cast<int32_t>(n * r.n_stride + h * r.h_stride + w * r.w_stride);",
        file=tiles,
        check="far",
    ),
    fprop("images taken for even", "bounds", " && p.n_stride == h * h_stride;", ";", file=tiles, check="far"),
    # column_products.cuh, combine.cu
    wgrad(
        "reads pixels past the last", "bounds", "first + r < p.m && channel < p.i", "first + r <= p.m && channel < p.i"
    ),
    wgrad(
        "a split takes the next one's first tile", "values", "p.splits) - first_tile;", "p.splits) - first_tile + 1;"
    ),
    wgrad("every warp writes column sums", "global", "lane % 4 == 0 && i % 2 == warp / 2", "lane % 4 == 0"),
    wgrad(
        "quadrants of A's transposed fragment exchanged",
        "values",
        "(k * 16 + lane % 8 + lane / 16 * 8, chunk)",
        "(k * 16 + lane % 16, chunk)",
    ),
    wgrad("Gram's tiles below the diagonal", "unwritten", "    tile_column += tile_row;\n", "", op="gram"),
    combine("a split left out", "values", "split < p.of.splits;", "split + 1 < p.of.splits;"),
    combine("lanes' sums added before they are there", "race", "  sync_block();\n", ""),
    combine("a symmetric block not transposed", "global", "offset(across, down)", "offset(down, across)", op="gram"),
    combine("columns of a block share their banks", "profile", "(column ^ row)", "column", op="gram", check="profile"),
    # hopper_tiles.cuh
    ring("no wait for a full stage", "race", "      barrier_wait(full(), parity);\n", ""),
    ring("the other phase of a full stage", "race", "barrier_wait(full(), parity)", "barrier_wait(full(), parity ^ 1)"),
    ring("no wait for an empty stage", "order", "    barrier_wait(empty(), parity ^ 1);\n", "", quick=True),
    ring("the other phase of an empty stage", "order", "wait(empty(), parity ^ 1)", "wait(empty(), parity)"),
    ring(
        "releases the stage in use",
        "order",
        "      if (i > 0) release();\n      used = empty();\n",
        "      used = empty();\n      if (i > 0) release();\n",
    ),
    ring("releases a stage before wgmma_wait", "race", "      wgmma_wait<1>();", "      "),
    ring("no final wgmma_wait", "wgmma", "    wgmma_wait<0>();\n", ""),
    ring("every lane releases a stage", "order", "if (thread_index() % 32 == 0) barrier_arrive", "barrier_arrive"),
    ring("empty after two arrivals", "order", "memory + i * 16 + 8, warps)", "memory + i * 16 + 8, 2)"),
    ring("zeros are not fenced", "wgmma", "    async_proxy_fence();\n", ""),
    ring("rows beyond the box are not zeroed", "values", "i < stages * pieces * chunks", "i < 0", op="wgrad"),
    ring("a box's width taken for its height", "unwritten", "row = divide(index, b.w)", "row = divide(index, b.h)"),
    ring("the last stage is not multiplied", "values", "while (++i < count)", "while (++i + 1 < count)"),
    # hopper_row_products.cu, hopper_column_products.cu
    hopper_rows(
        "expects the bytes of a full box", "order", "p.boxes.pixels * 128 + Ring::b_bytes", "Ring::stage_bytes"
    ),
    hopper_rows(
        "steps of twice the depth", "wgmma", "stage + a_of_group + step * 32", "stage + a_of_group + step * 64"
    ),
    hopper_rows(
        "groups of eight rows too close",
        "values",
        "a_of_group + step * 32, 16, 1024",
        "a_of_group + step * 32, 16, 512",
    ),
    hopper_rows(
        "half of a transposition",
        "values",
        "(int step = 1; step < 4; step *= 2)",
        "(int step = 2; step < 4; step *= 2)",
    ),
    hopper_rows("reads scales past the last", "bounds", "at = c < p.columns ? c : 0;", "at = c;"),
    hopper_rows(
        "scales both products", "values", "source == 0 && p.first_scale", "source == 1 && p.first_scale", op="dgrad"
    ),
    hopper_rows("takes four slopes twice", "values", "p.slope + c + 4", "p.slope + c", op="dgrad"),
    hopper_columns(
        "blocks of columns not where they are",
        "values",
        "b = matrix_descriptor(stage + Ring::a_bytes + step * 2048, block_bytes, 1024)",
        "b = matrix_descriptor(stage + Ring::a_bytes + step * 2048, 1024, 1024)",
    ),
    hopper_columns("expects A's bytes on the diagonal", "order", "(diagonal ? 0 : 2)", "2", op="gram"),
]
