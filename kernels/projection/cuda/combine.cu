// Adds up split sums. In a file of its own, for all architectures: kernels of several other files use it.
#include "combine.h"

#include "tiles.cuh"

namespace fastres {
namespace {

// A block adds up 64 elements, four threads to each: these take every fourth split, and their sums are added in order.
// In a symmetric matrix the 64 are a block of 8x8, which is written twice, the second time transposed.
constexpr uint32_t elements = 64, lanes = 4, threads = elements * lanes, side = 8;

struct CombineParameters {
  Partials of;
  int64_t size;                   // rows * columns
  uint32_t matrix_blocks, edges;  // blocks that the matrix takes; edges of a symmetric one, in 8x8 blocks
};

FASTRES_KERNEL(threads, 4)
combine_kernel(FASTRES_PARAMETER CombineParameters p) {
  FASTRES_SHARED(memory);
  const uint32_t e = thread_index() % elements, lane = thread_index() / elements;
  const bool of_matrix = block_index() < p.matrix_blocks, square = of_matrix && p.of.symmetric;
  const float* parts = of_matrix ? p.of.parts : p.of.sums;
  const int64_t size = of_matrix ? p.size : p.of.rows;
  uint32_t down = 0, across = block_index();
  if (square) {
    while (across >= p.edges - down) across -= p.edges - down, ++down;
    across += down;
  }
  const uint32_t i = e / side, j = e % side;
  auto offset = [&](uint32_t block_row, uint32_t block_column) {  // of element (i, j); -1 beyond the matrix
    const uint32_t row = block_row * side + i, column = block_column * side + j;
    return row < p.of.rows && column < p.of.rows ? int64_t{row} * p.of.rows + column : int64_t{-1};
  };
  const uint32_t block = of_matrix ? block_index() : block_index() - p.matrix_blocks;
  int64_t at = square ? offset(down, across) : int64_t{block} * elements + e;
  if (at >= size) at = -1;

  float sum = 0;
  if (at >= 0) {
    for (int64_t split = lane; split < p.of.splits; split += lanes) sum += load_global(parts + split * size + at);
  }
  // Permuted within rows of 8, so that rows and columns of an 8x8 block lie in different banks.
  auto place = [&](uint32_t row, uint32_t column) { return memory + (row * side + (column ^ row)) * 4; };
  store_shared(place(i, j) + lane * elements * 4, sum);
  sync_block();
  auto whole = [&](uint32_t row, uint32_t column) {
    float total = 0;
    FASTRES_UNROLL
    for (uint32_t l = 0; l < lanes; ++l) total += load_shared<float>(place(row, column) + l * elements * 4);
    return total;
  };
  if (lane == 0 && at >= 0) {
    const bool mirrored = square && down == across && i > j;
    store_global((of_matrix ? p.of.result : p.of.total) + at, mirrored ? whole(j, i) : whole(i, j));
  }
  if (lane == 1 && square && down != across) {
    at = offset(across, down);
    if (at >= 0) store_global(p.of.result + at, whole(j, i));
  }
}

}  // namespace

const char* combine(const Partials& p, void* stream) {
  const int64_t edges = divide_up(p.rows, side), size = p.rows * p.columns;
  const int64_t matrix_blocks = p.symmetric ? edges * (edges + 1) / 2 : divide_up(size, elements);
  const int64_t blocks = matrix_blocks + (p.total ? divide_up(p.rows, elements) : 0);
  if (blocks == 0) return nullptr;
  const CombineParameters parameters{p, size, static_cast<uint32_t>(matrix_blocks), static_cast<uint32_t>(edges)};
  return launch(combine_kernel, blocks, threads, threads * 4, stream, parameters);
}

}  // namespace fastres
