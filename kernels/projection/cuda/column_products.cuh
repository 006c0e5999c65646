// D[i, j] = sum_m A[m, i] B[m, j], the rows m being pixels: wgrad (A = g, B = x_s) and Gram (A = B = x_s).
//
// The sum over the pixels is split among blocks, each with a tile of D; combine.cu adds the splits up.
// Both operands have the depth as rows, so ldmatrix transposes them on the way to mma.sync. Column sums of A cost one
// more product, by ones, and no shuffles.
#pragma once

#include "combine.h"
#include "tiles.cuh"

namespace fastres {

template <class T>
struct ColumnParameters {
  const T *a, *b;  // [M, I] and [M, J]; the same for a Gram matrix
  const T* mask;   // a counts where ~(mask <= 0); null: everywhere
  Rows a_rows, b_rows, mask_rows;
  uint32_t m, i, j, splits;
  float* parts;  // [splits, I, J]
  float* sums;   // [splits, I], the column sums of the masked a; may be null
};

// symmetric: a and b are the same, and only tiles on and above the diagonal are computed. vectors, masked: as in
// row_products.cuh.
template <class T_, int rows_, int columns_, bool symmetric_, bool masked_, bool vectors_>
struct ColumnConfig {
  using T = T_;
  static constexpr bool symmetric = symmetric_, masked = masked_, vectors = vectors_;
  static constexpr int rows = rows_, columns = columns_, depth = 32;
  // Where one tile is the whole of a symmetric D, A's is always B's too, and leaves room for more stages.
  static constexpr bool one_tile = symmetric && rows == 64;
  static constexpr int stages = one_tile ? 8 : masked ? 3 : 4;
  static constexpr int warp_rows = rows / 2, warp_columns = columns / 2, threads = 128, blocks_per_sm = 2;

  static constexpr uint32_t a_bytes = rows * depth * 2, b_bytes = one_tile ? 0 : columns * depth * 2;
  static constexpr uint32_t stage_bytes = a_bytes * (masked ? 2 : 1) + b_bytes, shared_bytes = stages * stage_bytes;
  static_assert(shared_bytes <= shared_bytes_everywhere);
  static_assert(!symmetric || rows == columns);

  static int64_t tiles(int64_t i, int64_t j) {
    const int64_t down = divide_up(i, rows), across = divide_up(j, columns);
    return symmetric ? down * (down + 1) / 2 : down * across;
  }
};

template <class Config>
FASTRES_KERNEL(Config::threads, Config::blocks_per_sm)
column_products_kernel(FASTRES_PARAMETER ColumnParameters<typename Config::T> p) {
  using T = typename Config::T;
  constexpr int stages = Config::stages, depth = Config::depth;
  constexpr int a_chunks = Config::rows / 8, a_rows = Config::threads / a_chunks, a_copies = depth / a_rows;
  constexpr int b_chunks = Config::columns / 8, b_rows = Config::threads / b_chunks, b_copies = depth / b_rows;
  constexpr int fragments_m = Config::warp_rows / 16, fragments_n = Config::warp_columns / 8;
  // The two warps that hold the same columns of A share out the sums of their blocks of 16.
  constexpr int sum_fragments = fragments_m / 2;

  FASTRES_SHARED(memory);
  const uint32_t thread = thread_index(), lane = thread % 32, warp = thread / 32;
  const uint32_t warp_row = warp % 2 * Config::warp_rows, warp_column = warp / 2 * Config::warp_columns;
  const uint32_t down = (p.i + Config::rows - 1) / Config::rows, across = (p.j + Config::columns - 1) / Config::columns;
  const uint32_t tiles = Config::symmetric ? down * (down + 1) / 2 : down * across;
  const uint32_t split = block_index() / tiles;
  uint32_t tile_row = 0, tile_column = block_index() % tiles;
  if constexpr (Config::symmetric) {
    while (tile_column >= down - tile_row) tile_column -= down - tile_row, ++tile_row;
    tile_column += tile_row;
  } else {
    tile_row = tile_column / across, tile_column %= across;
  }
  const uint32_t row = tile_row * Config::rows, column = tile_column * Config::columns;
  const bool diagonal = Config::one_tile || (Config::symmetric && row == column);  // where A's tile is B's too
  const bool with_sums = p.sums && (Config::symmetric ? diagonal : column == 0);
  // Whole tiles are shared out: no split is empty, and their lengths differ by one tile at most.
  const uint64_t all_tiles = (uint64_t{p.m} + depth - 1) / depth;
  const uint32_t first_tile = all_tiles * split / p.splits;
  const uint32_t count = static_cast<uint32_t>(all_tiles * (split + 1) / p.splits) - first_tile;

  auto copy = [&](uint32_t tile) {
    const uint32_t stage = memory + tile % stages * Config::stage_bytes, first = (first_tile + tile) * depth;
    FASTRES_UNROLL
    for (int i = 0; i < a_copies; ++i) {
      const uint32_t r = thread / a_chunks + i * a_rows, chunk = thread % a_chunks, channel = row + chunk * 8;
      const uint32_t left = first + r < p.m && channel < p.i ? p.i - channel : 0;
      const uint32_t target = stage + swizzled<a_chunks>(r, chunk);
      copy_chunk<Config::vectors>(target, left ? p.a + row_offset(p.a_rows, first + r) + channel : p.a, left);
      if constexpr (Config::masked) {
        if (p.mask) {
          const T* source = left ? p.mask + row_offset(p.mask_rows, first + r) + channel : p.mask;
          copy_chunk<Config::vectors>(target + Config::a_bytes + Config::b_bytes, source, left);
        }
      }
    }
    if constexpr (!Config::one_tile) {
      if (diagonal) return;
      FASTRES_UNROLL
      for (int i = 0; i < b_copies; ++i) {
        const uint32_t r = thread / b_chunks + i * b_rows, chunk = thread % b_chunks, channel = column + chunk * 8;
        const uint32_t left = first + r < p.m && channel < p.j ? p.j - channel : 0;
        copy_chunk<Config::vectors>(stage + Config::a_bytes + swizzled<b_chunks>(r, chunk),
                                    left ? p.b + row_offset(p.b_rows, first + r) + channel : p.b, left);
      }
    }
  };
  uint32_t next = 0;
  auto copy_next = [&] {
    if (next < count) copy(next);
    ++next;
    commit_copies();
  };
  FASTRES_UNROLL
  for (int i = 0; i < stages - 1; ++i) copy_next();

  float sum[fragments_m][fragments_n][4] = {}, column_sum[sum_fragments][4] = {};
  const uint32_t ones = pack<T>(1.f, 1.f);
  FASTRES_NO_UNROLL
  for (uint32_t tile = 0; tile < count; ++tile) {
    wait_copies<stages - 2>();
    sync_block();  // this tile is there for every thread, and the one before it has been used
    copy_next();
    const uint32_t stage_a = memory + tile % stages * Config::stage_bytes;
    const uint32_t stage_b = diagonal ? stage_a : stage_a + Config::a_bytes;
    FASTRES_UNROLL
    for (int k = 0; k < depth / 16; ++k) {
      uint32_t a[fragments_m][4], b[fragments_n / 2][4];
      FASTRES_UNROLL
      for (int i = 0; i < fragments_m; ++i) {
        const uint32_t chunk = (warp_row + i * 16) / 8 + lane / 8 % 2;
        const uint32_t at = swizzled<a_chunks>(k * 16 + lane % 8 + lane / 16 * 8, chunk);
        load_matrices_transposed(a[i], stage_a + at);
        if constexpr (Config::masked) {
          if (p.mask) {
            uint32_t mask[4];
            load_matrices_transposed(mask, stage_a + Config::a_bytes + Config::b_bytes + at);
            FASTRES_UNROLL
            for (int e = 0; e < 4; ++e) a[i][e] &= relu_mask<T>(mask[e]);
          }
        }
      }
      FASTRES_UNROLL
      for (int j = 0; j < fragments_n / 2; ++j) {
        const uint32_t chunk = (warp_column + j * 16) / 8 + lane / 16;
        load_matrices_transposed(b[j], stage_b + swizzled<b_chunks>(k * 16 + lane % 16, chunk));
      }
      FASTRES_UNROLL
      for (int i = 0; i < fragments_m; ++i) {
        FASTRES_UNROLL
        for (int j = 0; j < fragments_n; ++j) {
          multiply_add<T>(sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
      if (with_sums) {
        FASTRES_UNROLL
        for (uint32_t i = 0; i < fragments_m; ++i) {
          if (i % 2 == warp / 2) multiply_add<T>(column_sum[i / 2], a[i], ones, ones);
        }
      }
    }
  }
  wait_copies<0>();

  float* parts = p.parts + int64_t{split} * p.i * p.j;
  FASTRES_UNROLL
  for (uint32_t i = 0; i < fragments_m; ++i) {
    FASTRES_UNROLL
    for (uint32_t h = 0; h < 2; ++h) {
      const uint32_t r = row + warp_row + i * 16 + h * 8 + lane / 4;
      if (r >= p.i) continue;
      FASTRES_UNROLL
      for (int j = 0; j < fragments_n; ++j) {
        const uint32_t c = column + warp_column + j * 8 + lane % 4 * 2;
        float* to = parts + int64_t{r} * p.j + c;
        if constexpr (Config::vectors) {
          if (c < p.j) store_global(reinterpret_cast<float2*>(to), float2{sum[i][j][h * 2], sum[i][j][h * 2 + 1]});
        } else {
          if (c < p.j) store_global(to, sum[i][j][h * 2]);
          if (c + 1 < p.j) store_global(to + 1, sum[i][j][h * 2 + 1]);
        }
      }
      if (with_sums && lane % 4 == 0 && i % 2 == warp / 2) {
        store_global(p.sums + int64_t{split} * p.i + r, column_sum[i / 2][h * 2]);
      }
    }
  }
}

// How many splits give each of the 132 multiprocessors of an H100 or H200 two blocks, and no third: fixed, so that the
// order of the sums does not depend on the GPU. No split is so short that adding the splits up would show, nor, in a
// symmetric product, so long that truncated sums do. An empty product has none.
inline int64_t splits_of(int64_t rows, int64_t tiles, bool symmetric) {
  if (tiles == 0) return 0;
  const int64_t least = symmetric ? divide_up(rows, longest_symmetric_split) : 1;
  const int64_t wanted = larger(264 / tiles, least), most = divide_up(rows, 512);
  return wanted < most ? wanted : most;
}

// p.parts and p.sums are workspaces; `total` may be null.
template <class Config>
const char* column_products(ColumnParameters<typename Config::T> p, float* result, float* total, void* stream) {
  const int64_t tiles = Config::tiles(p.i, p.j), splits = splits_of(p.m, tiles, Config::symmetric);
  p.splits = static_cast<uint32_t>(splits);
  p.sums = total ? p.parts + splits * p.i * p.j : nullptr;
  if (splits > 0) {
    const char* error =
        launch(column_products_kernel<Config>, tiles * splits, Config::threads, Config::shared_bytes, stream, p);
    if (error) return error;
  }
  return combine({.parts = p.parts,
                  .sums = p.sums,
                  .result = result,
                  .total = total,
                  .splits = splits,
                  .rows = p.i,
                  .columns = p.j,
                  .symmetric = Config::symmetric},
                 stream);
}

}  // namespace fastres
