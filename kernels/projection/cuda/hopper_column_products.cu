// D[i, j] = sum_m A[m, i] B[m, j] on Hopper, the rows m being pixels: projection_wgrad (A = g, B = x_s) and
// projection_gram (A = B = x_s).
//
// A tile of 128 by 256, 128 or 64 of D is summed over boxes of up to 64 pixels, which are shared out in splits;
// combine.cu adds these up. wgmma reads both operands transposed. Column sums of A cost one more product, by ones.
#include <type_traits>

#include "combine.h"
#include "hopper_tiles.cuh"

namespace fastres::hopper {
namespace {

constexpr uint32_t tile_rows = 128;
constexpr int64_t box_pixels = 64;  // the depth of a stage

struct ColumnParameters {
  TensorMap a, b;
  bool symmetric;  // a and b are the same: only tiles that reach above the diagonal are computed
  Boxes boxes;
  uint32_t splits, rows, columns;  // of D
  float* parts;                    // [splits, rows, columns]
  float* sums;                     // [splits, rows], the column sums of A; may be null
};

// Of a column of tiles; tiles_of() counts the same ones.
FASTRES_DEVICE uint32_t rows_of_tiles(const ColumnParameters& p, uint32_t tile_column, uint32_t width) {
  const uint32_t reach = p.symmetric ? (tile_column + 1) * width : p.rows;
  return ((reach < p.rows ? reach : p.rows) + tile_rows - 1) / tile_rows;
}

constexpr uint32_t ones_bytes = 1024;  // by which column sums are multiplied, behind the stages
template <int width>
constexpr uint32_t shared_bytes = Pipeline<width>::shared_bytes + ones_bytes;

template <class T, int width>
FASTRES_KERNEL(threads, 1)
column_products_kernel(FASTRES_PARAMETER ColumnParameters p) {
  static_assert(shared_bytes<width> <= 227 * 1024);
  FASTRES_SHARED(memory);
  using Ring = Pipeline<width>;
  Ring ring{memory};
  const uint32_t ones = memory + Ring::shared_bytes;
  if (thread_index() < ones_bytes / 16) {
    const uint32_t two = pack<T>(1.f, 1.f);
    store_shared(ones + thread_index() * 16, uint4{two, two, two, two});
  }
  ring.init(p.boxes.pixels, block_side, Ring::stage_bytes);
  sync_block();

  uint32_t tile_row = block_index() / p.splits, tile_column = 0;
  while (tile_row >= rows_of_tiles(p, tile_column, width)) tile_row -= rows_of_tiles(p, tile_column++, width);
  const uint32_t split = block_index() % p.splits, row = tile_row * tile_rows, column = tile_column * width;
  const uint32_t begin = uint64_t{p.boxes.count} * split / p.splits;
  const uint32_t end = uint64_t{p.boxes.count} * (split + 1) / p.splits;
  // On the diagonal of a symmetric product, A's tile is half of B's and need not be copied.
  const bool diagonal = p.symmetric && row < column + width && column < row + tile_rows;
  const bool with_sums = p.sums && (p.symmetric ? diagonal : column == 0);

  if (thread_index() >= copier) {
    shrink_registers<copier_registers>();
    if (thread_index() == copier) {
      const uint32_t box_bytes = p.boxes.pixels * 128;
      const uint32_t bytes = box_bytes * (width / block_side + (diagonal ? 0 : 2));
      for (uint32_t box = begin; box < end; ++box) {
        const Pixel corner = corner_of(p.boxes, box);
        ring.produce(bytes, [&](uint32_t stage, uint32_t full) {
          auto copy = [&](const TensorMap& map, uint32_t first, uint32_t channels, uint32_t target) {
            for (uint32_t c = 0; c < channels; c += block_side, target += block_bytes) {
              copy_tensor_async(target, &map, full, first + c, corner.w, corner.h, corner.n);
            }
          };
          if (!diagonal) copy(p.a, row, tile_rows, stage);
          copy(p.b, column, width, stage + Ring::a_bytes);
        });
      }
    }
  } else {
    grow_registers<multiplier_registers>();
    const uint32_t thread = thread_index(), group = thread / 128;
    // Where B's tile has 64 columns, so has D, and the second group's rows are beyond it: it multiplies the first's.
    const uint32_t block_in_b = ((row - column) / block_side + group) % (width / block_side);
    const uint32_t a_of_group = diagonal ? Ring::a_bytes + block_in_b * block_bytes : group * block_bytes;
    float sum[width / 2] = {}, column_sum[4] = {};
    auto consume = [&](auto sums) {
      ring.consume(end - begin, [&](uint32_t stage) {
        FASTRES_UNROLL
        for (int step = 0; step < 4; ++step) {  // 16 pixels
          const uint64_t a = matrix_descriptor(stage + a_of_group + step * 2048, block_bytes, 1024);
          const uint64_t b = matrix_descriptor(stage + Ring::a_bytes + step * 2048, block_bytes, 1024);
          wgmma<T, width, true, true>(sum, a, b);
          if constexpr (decltype(sums)::value) {
            wgmma<T, 8, true, false>(column_sum, a, matrix_descriptor(ones, 16, 1024));
          }
        }
      });
    };
    if (with_sums) {
      consume(std::true_type{});
    } else {
      consume(std::false_type{});
    }
    wgmma_done(sum);
    wgmma_done(column_sum);
    FASTRES_UNROLL
    for (int h = 0; h < 2; ++h) {
      const uint32_t i = row + thread / 32 * 16 + h * 8 + thread % 32 / 4;
      if (i >= p.rows) continue;
      const int64_t at = int64_t{split} * p.rows + i;
      FASTRES_UNROLL
      for (int pair = 0; pair < width / 8; ++pair) {
        const uint32_t j = column + pair * 8 + thread % 4 * 2;
        if (j >= p.columns) continue;
        store_global(reinterpret_cast<float2*>(p.parts + at * p.columns + j),
                     float2{sum[pair * 4 + h * 2], sum[pair * 4 + h * 2 + 1]});
      }
      if (with_sums && thread % 4 == 0) store_global(p.sums + at, column_sum[h * 2]);
    }
  }
}

int64_t width_of(int64_t columns) { return columns <= 64 ? 64 : columns <= 128 ? 128 : 256; }

int64_t tiles_of(int64_t rows, int64_t columns, bool symmetric) {
  const int64_t width = width_of(columns);
  int64_t tiles = 0;
  for (int64_t end = width; end < columns + width; end += width) {
    tiles += divide_up(symmetric && end < rows ? end : rows, tile_rows);
  }
  return tiles;
}

// As many as the 132 multiprocessors of an H100 or H200 run at a time: fixed, so that the order of the sums does not
// depend on the GPU. None is so short that adding the splits up would show, nor, in a symmetric product, so long that
// truncated sums do (longest_symmetric_split).
int64_t splits_of(const Boxes& boxes, int64_t tiles, bool symmetric) {
  const int64_t least = symmetric ? divide_up(boxes.count * box_pixels, longest_symmetric_split) : 1;
  const int64_t wanted = larger(132 / tiles, least), most = divide_up(boxes.count, 16);
  return wanted < most ? wanted : most;
}

template <class T>
const char* run(const ColumnParameters& p, int64_t blocks, void* stream) {
  if (width_of(p.columns) == 64) {
    return launch(column_products_kernel<T, 64>, blocks, threads, shared_bytes<64>, stream, p);
  }
  if (width_of(p.columns) == 128) {
    return launch(column_products_kernel<T, 128>, blocks, threads, shared_bytes<128>, stream, p);
  }
  return launch(column_products_kernel<T, 256>, blocks, threads, shared_bytes<256>, stream, p);
}

// D to `result` and the column sums to `sums`, which may be null.
const char* column_products(ColumnParameters& p, Dtype dtype, float* workspace, float* result, float* sums,
                            void* stream) {
  const int64_t tiles = tiles_of(p.rows, p.columns, p.symmetric), splits = splits_of(p.boxes, tiles, p.symmetric);
  const int64_t size = int64_t{p.rows} * p.columns;
  p.splits = static_cast<uint32_t>(splits);
  p.parts = workspace;
  if (sums) p.sums = workspace + splits * size;
  const int64_t blocks = tiles * splits;
  const char* error = dtype == Dtype::bfloat16 ? run<bfloat16>(p, blocks, stream) : run<float16>(p, blocks, stream);
  if (error) return error;
  return combine({.parts = p.parts,
                  .sums = p.sums,
                  .result = result,
                  .total = sums,
                  .splits = splits,
                  .rows = p.rows,
                  .columns = p.columns,
                  .symmetric = p.symmetric},
                 stream);
}

int64_t workspace_of(const Shape& s, int64_t rows, int64_t columns, bool symmetric) {
  if (s.rows() == 0 || rows == 0 || columns == 0) return 0;
  return splits_of(boxes_of(s, box_pixels), tiles_of(rows, columns, symmetric), symmetric) * rows * (columns + 1);
}

}  // namespace

int64_t gram_workspace(const Shape& s) {
  return larger(workspace_of(s, s.c, s.c, true), portable::gram_workspace(s));
}
int64_t wgrad_workspace(const Shape& s) {
  return larger(workspace_of(s, s.k, s.c, false), portable::wgrad_workspace(s));
}

const char* gram(const GramArguments& a, void* stream) {
  const Shape& s = a.shape;
  const Pixels x = strided(a.x, s);
  if (s.rows() == 0 || s.c == 0 || s.c % 8 != 0 || !describable(x) || !aligned(a.workspace)) {
    return portable::gram(a, stream);
  }
  ColumnParameters p{};
  p.symmetric = true;
  p.boxes = boxes_of(s, box_pixels);
  p.rows = p.columns = static_cast<uint32_t>(s.c);
  const char* error = encode_pixels(p.b, a.dtype, x, s.c, p.boxes);
  if (error) return error;
  p.a = p.b;
  return column_products(p, a.dtype, a.workspace, a.gram, a.total, stream);
}

const char* wgrad(const WgradArguments& a, void* stream) {
  const Shape& s = a.shape;
  const Pixels x = strided(a.x, s);
  const bool channels = s.c > 0 && s.c % 8 == 0 && s.k > 0 && s.k % 8 == 0;
  if (a.out.data || s.rows() == 0 || !channels || !describable(x) || !describable(a.g) || !aligned(a.workspace)) {
    return portable::wgrad(a, stream);
  }
  ColumnParameters p{};
  p.boxes = boxes_of(s, box_pixels);
  p.rows = static_cast<uint32_t>(s.k), p.columns = static_cast<uint32_t>(s.c);
  const char* error = encode_pixels(p.a, a.dtype, a.g, s.k, p.boxes);
  if (!error) error = encode_pixels(p.b, a.dtype, x, s.c, p.boxes);
  if (error) return error;
  return column_products(p, a.dtype, a.workspace, a.p, a.sum, stream);
}

}  // namespace fastres::hopper
