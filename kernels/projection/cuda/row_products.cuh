// D[m, n] = sum_k A[m, k] B[k, n], the rows m being pixels: fprop (A = x_s) and dgrad (A = [x_s | g]).
//
// A block of four warps computes a tile of 128 rows and 128 or 64 columns. Tiles of A and B, 32 deep, pass through
// shared memory in a pipeline of asynchronous copies; ldmatrix and mma.sync take them from there. The rows of A are
// gathered as they are copied, so x_s is never formed. The sums, float32, go through shared memory to the epilogue,
// where a thread holds eight neighbouring channels of a pixel.
#pragma once

#include "tiles.cuh"

namespace fastres {

enum class Output {
  bn,   // out = scale*D + shift (+ addend) (relu)
  raw,  // out = D, and the Welford partials of the rounded out: one per tile of rows
  add,  // out = addend + D + shift (+ slope*input), and 0 where input <= 0 with relu
};

template <class T>
struct Operands {
  const T* a;
  Rows rows;
  const T* b;      // [depth, N] for Output::add, else [N, depth]
  uint32_t depth;  // 0: these operands do not take part
};

template <class T>
struct RowParameters {
  Operands<T> first, second;  // D = first.a first.b + second.a second.b; first only for Output::add
  const float* first_scale;   // one number by which the first product is multiplied, or null
  const T* mask;              // second.a counts where ~(mask <= 0); null: everywhere
  Rows mask_rows;
  const float *scale, *shift;  // [N]; shift may be null
  T* out;
  Rows out_rows;
  const T* addend;  // may be null; for Output::add, out itself
  Rows addend_rows;
  bool relu;           // for Output::bn: of out; for Output::add: out is 0 where input <= 0
  const T* input;      // for Output::add: [M, N], what `relu` and `slope` are about; null where there is neither
  Rows input_rows;
  const float* slope;  // [N]: slope*input is added; may be null
  float *count, *mean, *m2;  // for Output::raw: [tiles of rows], [tiles of rows, N] twice
  uint32_t m, n;
};

// vectors: every row of A, B and out is 16-byte aligned and of a multiple of 8 elements; masked: RowParameters::mask
// may be set.
template <class T_, int columns_, Output output_, bool masked_, bool vectors_>
struct RowConfig {
  using T = T_;
  static constexpr Output output = output_;
  static constexpr bool masked = masked_, vectors = vectors_, two_products = output == Output::add;
  static constexpr int rows = 128, columns = columns_, depth = 32, stages = masked ? 3 : 4;
  static constexpr int warp_rows = 64, warp_columns = columns / 2, threads = 128, blocks_per_sm = 2;

  static constexpr uint32_t a_bytes = rows * depth * 2, b_bytes = columns * depth * 2;
  static constexpr uint32_t stage_bytes = a_bytes * (masked ? 2 : 1) + b_bytes;
  static constexpr int staged_row = columns + 8;  // floats; 8 more let the warps' 8-byte stores miss each other's banks
  static constexpr uint32_t staged_bytes = rows * staged_row * 4;
  static constexpr uint32_t statistics_bytes = output == Output::raw ? rows / warp_rows * columns * 8 : 0;
  static constexpr uint32_t epilogue_bytes = staged_bytes + statistics_bytes;
  static constexpr uint32_t pipeline_bytes = stages * stage_bytes;
  static constexpr uint32_t shared_bytes = pipeline_bytes > epilogue_bytes ? pipeline_bytes : epilogue_bytes;
  static_assert(shared_bytes <= shared_bytes_everywhere);
};

// Mean and sum of squared deviations of this block's rows, column by column, from the sums that the warps hold; each
// warp first for its own rows, then Chan's combination in the order of the warps.
template <class Config>
FASTRES_DEVICE void write_statistics(const RowParameters<typename Config::T>& p,
                                     float (&sum)[Config::warp_rows / 16][Config::warp_columns / 8][4],
                                     uint32_t memory, uint32_t row, uint32_t column) {
  using T = typename Config::T;
  constexpr int warp_rows = Config::warp_rows, columns = Config::columns;
  constexpr uint32_t m2_bytes = Config::statistics_bytes / 2;  // from a mean to its m2
  const uint32_t thread = thread_index(), lane = thread % 32, warp = thread / 32;
  const uint32_t warp_row = warp % 2 * warp_rows, warp_column = warp / 2 * Config::warp_columns;
  auto rows_of_warp = [&](uint32_t first) {
    return row + first >= p.m ? 0u : p.m - row - first < warp_rows ? p.m - row - first : uint32_t{warp_rows};
  };
  const uint32_t rows = rows_of_warp(warp_row);
  FASTRES_UNROLL
  for (int j = 0; j < Config::warp_columns / 8; ++j) {
    FASTRES_UNROLL
    for (int c = 0; c < 2; ++c) {
      float total = 0, m2 = 0;
      FASTRES_UNROLL
      for (int i = 0; i < warp_rows / 16; ++i) {
        FASTRES_UNROLL
        for (int h = 0; h < 2; ++h) {
          float& value = sum[i][j][h * 2 + c];
          value = unpack<T>(pack<T>(value, 0)).x;
          total += value;  // rows past m are zero
        }
      }
      FASTRES_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) total += shuffle_xor(total, mask);
      const float mean = rows ? total / rows : 0.f;
      FASTRES_UNROLL
      for (int i = 0; i < warp_rows / 16; ++i) {
        FASTRES_UNROLL
        for (int h = 0; h < 2; ++h) {
          const float deviation = sum[i][j][h * 2 + c] - mean;
          m2 += lane / 4 + i * 16 + h * 8 < rows ? deviation * deviation : 0.f;
        }
      }
      FASTRES_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) m2 += shuffle_xor(m2, mask);
      if (lane / 4 == 0) {
        const uint32_t at = memory + (warp_row / warp_rows * columns + warp_column + j * 8 + lane * 2 + c) * 4;
        store_shared(at, mean);
        store_shared(at + m2_bytes, m2);
      }
    }
  }
  sync_block();
  const int64_t group = row / Config::rows;
  for (uint32_t c = thread; c < columns && column + c < p.n; c += Config::threads) {
    float count = 0, mean = 0, m2 = 0;
    FASTRES_UNROLL
    for (int w = 0; w < Config::rows / warp_rows; ++w) {
      const float more = static_cast<float>(rows_of_warp(w * warp_rows));
      if (more > 0) {
        const uint32_t at = memory + (w * columns + c) * 4;
        const float delta = load_shared<float>(at) - mean, both = count + more;
        m2 += load_shared<float>(at + m2_bytes) + delta * delta * (count * more / both);
        mean += delta * (more / both);
        count = both;
      }
    }
    store_global(p.mean + group * p.n + column + c, mean);
    store_global(p.m2 + group * p.n + column + c, m2);
    if (column + c == 0) store_global(p.count + group, count);
  }
}

// From the sums in shared memory to `out`. A thread writes the same eight columns of several rows; what it needs of
// four of them is asked for before the first is written, so that these loads wait together.
template <class Config>
FASTRES_DEVICE void write_tile(const RowParameters<typename Config::T>& p, uint32_t memory, uint32_t row,
                               uint32_t column) {
  using T = typename Config::T;
  constexpr bool vectors = Config::vectors;
  constexpr uint32_t chunks = Config::columns / 8, rows_at_once = Config::threads / chunks, batch = 4;
  static_assert(Config::threads % chunks == 0 && Config::rows % (rows_at_once * batch) == 0);
  const uint32_t c = thread_index() % chunks * 8, n = column + c;
  if (n >= p.n) return;
  const uint32_t left = p.n - n;
  float scale[8], shift[8] = {};
  if constexpr (Config::output == Output::bn) load_floats<vectors>(scale, p.scale + n, left);
  if (Config::output != Output::raw && p.shift) load_floats<vectors>(shift, p.shift + n, left);
  float slope[8] = {};
  if (Config::output == Output::add && p.slope) load_floats<vectors>(slope, p.slope + n, left);

  FASTRES_NO_UNROLL
  for (uint32_t r = thread_index() / chunks; r < Config::rows; r += rows_at_once * batch) {
    uint4 addend[batch] = {}, input[batch] = {};
    FASTRES_UNROLL
    for (uint32_t i = 0; i < batch; ++i) {
      const uint32_t m = row + r + i * rows_at_once;
      if (m >= p.m) continue;
      if (Config::output != Output::raw && p.addend) {
        addend[i] = load_chunk<vectors>(p.addend + row_offset(p.addend_rows, m) + n, left);
      }
      if (Config::output == Output::add && p.input) {
        input[i] = load_chunk<vectors>(p.input + row_offset(p.input_rows, m) + n, left);
      }
    }
    FASTRES_UNROLL
    for (uint32_t i = 0; i < batch; ++i) {
      const uint32_t tile_row = r + i * rows_at_once, m = row + tile_row;
      if (m >= p.m) continue;
      // Lanes whose first halves would share banks with those of the lanes four below begin with the second half.
      const uint32_t swapped = c / 32 % 2 * 4, at = memory + (tile_row * Config::staged_row + c) * 4;
      const float4 one = load_shared<float4>(at + swapped * 4), two = load_shared<float4>(at + (4 - swapped) * 4);
      const float4 low = swapped ? two : one, high = swapped ? one : two;
      float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      const uint32_t more[4] = {addend[i].x, addend[i].y, addend[i].z, addend[i].w};
      const uint32_t inputs[4] = {input[i].x, input[i].y, input[i].z, input[i].w};
      uint32_t word[4];
      FASTRES_UNROLL
      for (int pair = 0; pair < 4; ++pair) {
        FASTRES_UNROLL
        for (int e = 2 * pair; e < 2 * pair + 2; ++e) {
          if constexpr (Config::output == Output::bn) v[e] *= scale[e];
          if constexpr (Config::output != Output::raw) v[e] += shift[e];
        }
        if constexpr (Config::output != Output::raw) {
          const float2 two_more = unpack<T>(more[pair]);
          v[2 * pair] += two_more.x, v[2 * pair + 1] += two_more.y;
        }
        if (Config::output == Output::add && p.slope) {
          const float2 two_inputs = unpack<T>(inputs[pair]);
          v[2 * pair] += slope[2 * pair] * two_inputs.x, v[2 * pair + 1] += slope[2 * pair + 1] * two_inputs.y;
        }
        if (Config::output == Output::bn && p.relu) {
          FASTRES_UNROLL
          for (int e = 2 * pair; e < 2 * pair + 2; ++e) v[e] = v[e] < 0 ? 0.f : v[e];
        }
        word[pair] = pack<T>(v[2 * pair], v[2 * pair + 1]);
        if (Config::output == Output::add && p.relu) word[pair] &= relu_mask<T>(inputs[pair]);
      }
      const uint4 chunk{word[0], word[1], word[2], word[3]};
      store_chunk<vectors>(p.out + row_offset(p.out_rows, m) + n, chunk, left);
    }
  }
}

template <class Config>
FASTRES_KERNEL(Config::threads, Config::blocks_per_sm)
row_products_kernel(FASTRES_PARAMETER RowParameters<typename Config::T> p) {
  using T = typename Config::T;
  constexpr int stages = Config::stages, depth = Config::depth;
  constexpr int a_chunks = depth / 8, a_rows = Config::threads / a_chunks, a_copies = Config::rows / a_rows;
  // B's tile has the depth as its rows where B is [depth, N], else the columns.
  constexpr bool b_by_depth = Config::output == Output::add;
  constexpr int b_chunks = (b_by_depth ? Config::columns : depth) / 8, b_rows = Config::threads / b_chunks;
  constexpr int b_copies = (b_by_depth ? depth : Config::columns) / b_rows;
  constexpr int fragments_m = Config::warp_rows / 16, fragments_n = Config::warp_columns / 8;

  FASTRES_SHARED(memory);
  const uint32_t thread = thread_index(), lane = thread % 32, warp = thread / 32;
  const uint32_t warp_row = warp % 2 * Config::warp_rows, warp_column = warp / 2 * Config::warp_columns;
  const uint32_t column_tiles = (p.n + Config::columns - 1) / Config::columns;
  const uint32_t row = block_index() / column_tiles * Config::rows;
  const uint32_t column = block_index() % column_tiles * Config::columns;
  const uint32_t first_tiles = Config::two_products ? (p.first.depth + depth - 1) / depth : 0;
  const uint32_t tiles = first_tiles + (p.second.depth + depth - 1) / depth;
  auto in_first = [&](uint32_t tile) { return Config::two_products ? tile < first_tiles : false; };

  // This thread copies the same chunk of several rows of each tile; where these rows lie, it works out once.
  int64_t offset[a_copies], mask_offset[a_copies];
  auto locate = [&](bool first) {
    FASTRES_UNROLL
    for (int i = 0; i < a_copies; ++i) {
      const uint32_t m = row + thread / a_chunks + i * a_rows;
      offset[i] = m >= p.m ? -1 : first ? row_offset(p.first.rows, m) : row_offset(p.second.rows, m);
      if constexpr (Config::masked) {
        if (p.mask && !first) mask_offset[i] = m >= p.m ? -1 : row_offset(p.mask_rows, m);
      }
    }
  };
  auto copy = [&](uint32_t tile) {
    const bool first = in_first(tile);
    const uint32_t all = first ? p.first.depth : p.second.depth;
    const uint32_t tile_depth = (first ? tile : tile - first_tiles) * depth;
    const T* a = first ? p.first.a : p.second.a;
    const T* b = first ? p.first.b : p.second.b;
    const uint32_t stage = memory + tile % stages * Config::stage_bytes;
    {
      const uint32_t chunk = thread % a_chunks, k = tile_depth + chunk * 8;
      FASTRES_UNROLL
      for (int i = 0; i < a_copies; ++i) {
        const uint32_t at = swizzled<a_chunks>(thread / a_chunks + i * a_rows, chunk);
        const uint32_t left = offset[i] >= 0 && k < all ? all - k : 0;
        copy_chunk<Config::vectors>(stage + at, left ? a + offset[i] + k : b, left);
        if constexpr (Config::masked) {
          if (p.mask && !first) {
            const uint32_t target = stage + Config::a_bytes + Config::b_bytes + at;
            copy_chunk<Config::vectors>(target, left ? p.mask + mask_offset[i] + k : b, left);
          }
        }
      }
    }
    const uint32_t chunk = thread % b_chunks;
    FASTRES_UNROLL
    for (int i = 0; i < b_copies; ++i) {
      const uint32_t r = thread / b_chunks + i * b_rows;
      const uint32_t k = tile_depth + (b_by_depth ? r : chunk * 8), n = column + (b_by_depth ? chunk * 8 : r);
      const uint32_t left = k >= all || n >= p.n ? 0 : b_by_depth ? p.n - n : all - k;
      const int64_t at = b_by_depth ? int64_t{k} * p.n + n : int64_t{n} * all + k;
      copy_chunk<Config::vectors>(stage + Config::a_bytes + swizzled<b_chunks>(r, chunk), left ? b + at : b, left);
    }
  };
  uint32_t next = 0;
  auto copy_next = [&] {
    if (next < tiles) {
      if (next == 0 || next == first_tiles) locate(in_first(next));
      copy(next);
    }
    ++next;
    commit_copies();
  };
  FASTRES_UNROLL
  for (int i = 0; i < stages - 1; ++i) copy_next();

  float sum[fragments_m][fragments_n][4] = {};
  FASTRES_NO_UNROLL
  for (uint32_t tile = 0; tile < tiles; ++tile) {
    wait_copies<stages - 2>();
    sync_block();  // this tile is there for every thread, and the one before it has been used
    copy_next();
    const uint32_t stage_a = memory + tile % stages * Config::stage_bytes, stage_b = stage_a + Config::a_bytes;
    FASTRES_UNROLL
    for (int k = 0; k < depth / 16; ++k) {
      uint32_t a[fragments_m][4], b[fragments_n / 2][4];
      FASTRES_UNROLL
      for (int i = 0; i < fragments_m; ++i) {
        const uint32_t at = swizzled<a_chunks>(warp_row + i * 16 + lane % 16, k * 2 + lane / 16);
        load_matrices(a[i], stage_a + at);
        if constexpr (Config::masked) {
          if (p.mask && !in_first(tile)) {
            uint32_t mask[4];
            load_matrices(mask, stage_b + Config::b_bytes + at);
            FASTRES_UNROLL
            for (int e = 0; e < 4; ++e) a[i][e] &= relu_mask<T>(mask[e]);
          }
        }
      }
      FASTRES_UNROLL
      for (int j = 0; j < fragments_n / 2; ++j) {
        const uint32_t n = warp_column + j * 16;
        if constexpr (b_by_depth) {
          load_matrices_transposed(b[j], stage_b + swizzled<b_chunks>(k * 16 + lane % 16, n / 8 + lane / 16));
        } else {
          load_matrices(b[j], stage_b + swizzled<b_chunks>(n + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
        }
      }
      FASTRES_UNROLL
      for (int i = 0; i < fragments_m; ++i) {
        FASTRES_UNROLL
        for (int j = 0; j < fragments_n; ++j) {
          multiply_add<T>(sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
    if (Config::two_products && tile + 1 == first_tiles && p.first_scale) {
      const float scale = load_global(p.first_scale);
      FASTRES_UNROLL
      for (int i = 0; i < fragments_m; ++i) {
        FASTRES_UNROLL
        for (int j = 0; j < fragments_n; ++j) {
          FASTRES_UNROLL
          for (int e = 0; e < 4; ++e) sum[i][j][e] *= scale;
        }
      }
    }
  }
  wait_copies<0>();
  sync_block();  // from here on the pipeline's memory is the epilogue's

  if constexpr (Config::output == Output::raw) {
    write_statistics<Config>(p, sum, memory + Config::staged_bytes, row, column);
  }
  FASTRES_UNROLL
  for (int i = 0; i < fragments_m; ++i) {
    FASTRES_UNROLL
    for (int j = 0; j < fragments_n; ++j) {
      FASTRES_UNROLL
      for (int h = 0; h < 2; ++h) {
        const uint32_t r = warp_row + i * 16 + h * 8 + lane / 4, c = warp_column + j * 8 + lane % 4 * 2;
        store_shared(memory + (r * Config::staged_row + c) * 4, float2{sum[i][j][h * 2], sum[i][j][h * 2 + 1]});
      }
    }
  }
  sync_block();
  write_tile<Config>(p, memory, row, column);
}

template <class Config>
const char* row_products(const RowParameters<typename Config::T>& p, void* stream) {
  const int64_t blocks = divide_up(p.m, Config::rows) * divide_up(p.n, Config::columns);
  if (blocks == 0) return nullptr;
  return launch(row_products_kernel<Config>, blocks, Config::threads, Config::shared_bytes, stream, p);
}

}  // namespace fastres
