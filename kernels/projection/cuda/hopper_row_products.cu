// D[m, n] = sum_k A[m, k] B[k, n] on Hopper, the rows m being pixels: projection_fprop (A = x_s, B = weight^T) and
// projection_dgrad (A = [x_s | g], B = [v; u]).
//
// A tile is a box of up to 128 pixels by 256, 128 or 64 columns. One block runs on each multiprocessor and takes one
// tile after another: while sums are written, the copies of the next tile are under way.
#include "hopper_tiles.cuh"

namespace fastres::hopper {
namespace {

struct Operands {
  TensorMap a, b;   // pixels by depth; b [depth, N] for dgrad, [N, depth] for fprop
  uint32_t stages;  // of 64 of the depth; 0: these operands do not take part
};

// out = scale*D + shift + addend (+ slope*input), through relu (fprop) or, with relu, 0 where input <= 0 (dgrad). All
// pixels are output pixels.
struct RowParameters {
  Operands operands[2];
  const float* first_scale;    // one number by which the first operands' product is multiplied, or null
  const float *scale, *shift;  // [N]; for dgrad there is no scale, and shift may be null
  const float* slope;          // [N], for dgrad; may be null
  Pixels addend, input;        // may be none; input: for dgrad, what `relu` and `slope` are about
  bool relu;
  Pixels out;
  Boxes boxes;
  uint32_t columns, column_tiles, tiles, blocks;
};

// Among the four lanes that hold a row's columns: lane i gets v[i] of each, in their order.
FASTRES_DEVICE void transpose(float (&v)[4]) {
  const uint32_t lane = thread_index() % 4;
  FASTRES_UNROLL
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = lane & step;
    FASTRES_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const float received = shuffle_xor(upper ? v[i] : v[i + step], step);
      (upper ? v[i] : v[i + step]) = received;
    }
  }
}

template <class T>
FASTRES_DEVICE void add(float (&v)[8], const uint4& more) {
  const uint32_t word[4] = {more.x, more.y, more.z, more.w};
  FASTRES_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float2 two = unpack<T>(word[i]);
    v[2 * i] += two.x, v[2 * i + 1] += two.y;
  }
}

// A thread's sums of `width` columns from `column` on, of the box at `corner`, from registers to memory. Loads come
// together, before stores that they might alias: the per-channel ones before the first store, a row's before the row's;
// only the slopes come with their chunk.
template <class T, int width, bool scaled>
FASTRES_DEVICE void write_sums(const RowParameters& p, float* sum, const Pixel& corner, uint32_t column) {
  constexpr int pairs = width / 8, chunks = width / 32;
  const uint32_t thread = thread_index();
  if (scaled || p.shift) {
    float2 scale[pairs], shift[pairs];
    FASTRES_UNROLL
    for (int j = 0; j < pairs; ++j) {
      const uint32_t c = column + j * 8 + thread % 4 * 2;
      const uint32_t at = c < p.columns ? c : 0;  // what lies beyond the last is not written: any number will do
      if constexpr (scaled) scale[j] = load_global(reinterpret_cast<const float2*>(p.scale + at));
      shift[j] = load_global(reinterpret_cast<const float2*>(p.shift + at));
    }
    FASTRES_UNROLL
    for (int j = 0; j < pairs; ++j) {
      FASTRES_UNROLL
      for (int i = j * 4; i < j * 4 + 4; i += 2) {
        if constexpr (scaled) sum[i] *= scale[j].x, sum[i + 1] *= scale[j].y;
        sum[i] += shift[j].x, sum[i + 1] += shift[j].y;
      }
    }
  }
  // In wgmma's layout four lanes hold 32 columns of a row in pairs; transposed, each of them holds eight neighbours.
  const uint32_t first = column + thread % 4 * 8;
  FASTRES_UNROLL
  for (int h = 0; h < 2; ++h) {
    const Pixel pixel = pixel_of(p.boxes, corner, thread / 32 * 16 + h * 8 + thread % 32 / 4);
    const bool there = exists(p.boxes, corner, pixel);
    uint4 addend[chunks], input[chunks];
    const T* addend_row = static_cast<const T*>(p.addend.data) + offset_of(p.addend, pixel);
    const T* input_row = static_cast<const T*>(p.input.data) + offset_of(p.input, pixel);
    FASTRES_UNROLL
    for (int j = 0; j < chunks; ++j) {
      const uint32_t c = first + j * 32;
      if (!there || c >= p.columns) continue;
      if (p.addend.data) addend[j] = load_global(reinterpret_cast<const uint4*>(addend_row + c));
      if (p.input.data) input[j] = load_global(reinterpret_cast<const uint4*>(input_row + c));
    }
    T* out_row = static_cast<T*>(p.out.data) + offset_of(p.out, pixel);
    FASTRES_UNROLL
    for (int j = 0; j < chunks; ++j) {
      float v[8];
      FASTRES_UNROLL
      for (int c = 0; c < 2; ++c) {
        float four[4];
        FASTRES_UNROLL
        for (int i = 0; i < 4; ++i) four[i] = sum[(j * 4 + i) * 4 + h * 2 + c];
        transpose(four);
        FASTRES_UNROLL
        for (int i = 0; i < 4; ++i) v[2 * i + c] = four[i];
      }
      const uint32_t c = first + j * 32;
      if (!there || c >= p.columns) continue;
      if (p.addend.data) add<T>(v, addend[j]);
      if (!scaled && p.slope) {
        const float4 low = load_global(reinterpret_cast<const float4*>(p.slope + c));
        const float4 high = load_global(reinterpret_cast<const float4*>(p.slope + c + 4));
        const float2 a = unpack<T>(input[j].x), b = unpack<T>(input[j].y);
        v[0] += low.x * a.x, v[1] += low.y * a.y, v[2] += low.z * b.x, v[3] += low.w * b.y;
        const float2 e = unpack<T>(input[j].z), f = unpack<T>(input[j].w);
        v[4] += high.x * e.x, v[5] += high.y * e.y, v[6] += high.z * f.x, v[7] += high.w * f.y;
      }
      if (scaled && p.relu) {
        FASTRES_UNROLL
        for (int i = 0; i < 8; ++i) v[i] = v[i] < 0 ? 0.f : v[i];
      }
      uint4 packed{pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])};
      if (!scaled && p.relu) {
        packed.x &= relu_mask<T>(input[j].x), packed.y &= relu_mask<T>(input[j].y);
        packed.z &= relu_mask<T>(input[j].z), packed.w &= relu_mask<T>(input[j].w);
      }
      store_global(reinterpret_cast<uint4*>(out_row + c), packed);
    }
  }
}

// b_transposed: B is [depth, N].
template <class T, int width, bool b_transposed>
FASTRES_KERNEL(threads, 1)
row_products_kernel(FASTRES_PARAMETER RowParameters p) {
  FASTRES_SHARED(memory);
  using Ring = Pipeline<width>;
  Ring ring{memory};
  ring.init(p.boxes.pixels, 128, Ring::a_bytes);
  sync_block();
  if (thread_index() >= copier) {
    shrink_registers<copier_registers>();
    if (thread_index() == copier) {
      const uint32_t bytes = p.boxes.pixels * 128 + Ring::b_bytes;
      for (uint32_t tile = block_index(); tile < p.tiles; tile += p.blocks) {
        const uint32_t box = tile / p.column_tiles;
        const int column = (tile - box * p.column_tiles) * width;
        const Pixel corner = corner_of(p.boxes, box);
        for (int source = 0; source < 2; ++source) {
          const Operands& from = p.operands[source];
          for (uint32_t k = 0; k < from.stages; ++k) {
            const int depth = k * block_side;
            ring.produce(bytes, [&](uint32_t stage, uint32_t full) {
              copy_tensor_async(stage, &from.a, full, depth, corner.w, corner.h, corner.n);
              for (int block = 0; block < width; block += block_side) {
                const uint32_t target = stage + Ring::a_bytes + block / block_side * block_bytes;
                if constexpr (b_transposed) {
                  copy_tensor_async(target, &from.b, full, column + block, depth, 0, 0);
                } else {
                  copy_tensor_async(target, &from.b, full, depth, column + block, 0, 0);
                }
              }
            });
          }
        }
      }
    }
  } else {
    grow_registers<multiplier_registers>();
    const uint32_t a_of_group = thread_index() / 128 * block_bytes;
    for (uint32_t tile = block_index(); tile < p.tiles; tile += p.blocks) {
      float sum[width / 2] = {};
      FASTRES_NO_UNROLL
      for (int source = 0; source < 2; ++source) {
        if (p.operands[source].stages == 0) continue;
        ring.consume(p.operands[source].stages, [&](uint32_t stage) {
          FASTRES_UNROLL
          for (int step = 0; step < 4; ++step) {  // 16 of the depth
            const uint64_t a = matrix_descriptor(stage + a_of_group + step * 32, 16, 1024);
            const uint64_t b =
                b_transposed ? matrix_descriptor(stage + Ring::a_bytes + step * 2048, block_bytes, 1024)
                             : matrix_descriptor(stage + Ring::a_bytes + step * 32, 16, 1024);
            wgmma<T, width, false, b_transposed>(sum, a, b);
          }
        });
        wgmma_done(sum);
        if (source == 0 && p.first_scale) {
          const float scale = load_global(p.first_scale);
          FASTRES_UNROLL
          for (int i = 0; i < width / 2; ++i) sum[i] *= scale;
        }
      }
      const uint32_t box = tile / p.column_tiles;
      const uint32_t column = (tile - box * p.column_tiles) * width;
      constexpr int part = width < 128 ? width : 128;  // columns whose numbers the registers can hold beside the sums
      FASTRES_UNROLL
      for (int first = 0; first < width; first += part) {
        write_sums<T, part, !b_transposed>(p, sum + first / 2, corner_of(p.boxes, box), column + first);
      }
    }
  }
}

template <class T, int width, bool b_transposed>
const char* run(RowParameters& p, void* stream) {
  p.column_tiles = static_cast<uint32_t>(divide_up(p.columns, width));
  p.tiles = p.boxes.count * p.column_tiles;
  const int64_t most = multiprocessors();
  p.blocks = p.tiles < most ? p.tiles : static_cast<uint32_t>(most);
  return launch(row_products_kernel<T, width, b_transposed>, p.blocks, threads, Pipeline<width>::shared_bytes, stream,
                p);
}

template <class T, bool b_transposed>
const char* choose(RowParameters& p, void* stream) {
  if (p.columns <= 64) return run<T, 64, b_transposed>(p, stream);
  return p.columns <= 128 ? run<T, 128, b_transposed>(p, stream) : run<T, 256, b_transposed>(p, stream);
}

template <bool b_transposed>
const char* choose(Dtype dtype, RowParameters& p, void* stream) {
  if (dtype == Dtype::bfloat16) return choose<bfloat16, b_transposed>(p, stream);
  return choose<float16, b_transposed>(p, stream);
}

bool supported(const Shape& s) { return s.rows() > 0 && s.c > 0 && s.c % 8 == 0 && s.k > 0 && s.k % 8 == 0; }

uint32_t stages_of(int64_t depth) { return static_cast<uint32_t>(divide_up(depth, block_side)); }

}  // namespace

const char* fprop(const FpropArguments& a, void* stream) {
  const Shape& s = a.shape;
  const Pixels x = strided(a.x, s);
  if (!a.bn || !supported(s) || !describable(x) || !aligned(a.weight) || !aligned(a.bn) || !aligned(a.residual) ||
      !aligned(a.out)) {
    return portable::fprop(a, stream);
  }
  RowParameters p{};
  p.boxes = boxes_of(s, 128);
  p.columns = static_cast<uint32_t>(s.k);
  p.operands[0].stages = stages_of(s.c);
  const char* error = encode_pixels(p.operands[0].a, a.dtype, x, s.c, p.boxes);
  if (!error) error = encode_matrix(p.operands[0].b, a.dtype, a.weight, s.k, s.c);
  if (error) return error;
  p.scale = a.bn + 2 * s.k, p.shift = a.bn + 3 * s.k;
  p.addend = a.residual, p.relu = a.relu, p.out = a.out;
  return choose<false>(a.dtype, p, stream);
}

const char* dgrad(const DgradArguments& a, void* stream) {
  const Shape& s = a.shape;
  const Pixels x = strided(a.x, s);
  if (a.out.data || !supported(s) || !describable(a.g) || (a.v && !describable(x)) || !aligned(x) || !aligned(a.dx) ||
      !aligned(a.u) || !aligned(a.v) || !aligned(a.k) || !aligned(a.d)) {
    return portable::dgrad(a, stream);
  }
  RowParameters p{};
  p.boxes = boxes_of(s, 128);
  p.columns = static_cast<uint32_t>(s.c);
  const char* error = nullptr;
  if (a.v) {
    p.operands[0].stages = stages_of(s.c);
    error = encode_pixels(p.operands[0].a, a.dtype, x, s.c, p.boxes);
    if (!error) error = encode_matrix(p.operands[0].b, a.dtype, a.v, s.c, s.c);
    p.first_scale = a.v_scale;
  }
  p.operands[1].stages = stages_of(s.k);
  if (!error) error = encode_pixels(p.operands[1].a, a.dtype, a.g, s.k, p.boxes);
  if (!error) error = encode_matrix(p.operands[1].b, a.dtype, a.u, s.k, s.c);
  if (error) return error;
  p.shift = a.k, p.out = strided(a.dx, s), p.addend = p.out;
  p.relu = a.relu, p.slope = a.d;
  if (a.relu || a.d) p.input = x;
  return choose<true>(a.dtype, p, stream);
}

}  // namespace fastres::hopper
