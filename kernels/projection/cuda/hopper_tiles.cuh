// What the Hopper kernels share: boxes of pixels, and the pipeline of stages in shared memory between the thread that
// has tiles copied and the warp groups that multiply them.
#pragma once

#include "hopper_device.cuh"
#include "tiles.cuh"

namespace fastres::hopper {

// Two warp groups multiply, 64 rows of the result each; thread `copier`, alone in the third, has tiles copied.
constexpr uint32_t threads = 384, copier = 256;
// setmaxnreg: the kernels begin with 65536 / 384 registers a thread, rounded down to 168.
constexpr int copier_registers = 40, multiplier_registers = 232;

// A block of a tile in shared memory: 64 rows of 64 elements.
constexpr uint32_t block_side = 64, block_bytes = 64 * 128;

// Output pixels are copied, and sums written, in boxes of w x h x n of them. Boxes at the edges stand over.
struct Boxes {
  Divisor w, h;
  uint32_t n, pixels;
  Divisor across, down;  // boxes in a row of an image, rows of boxes in an image
  uint32_t count;
  uint32_t out_w, out_h, images;
};

// As few boxes of at most `most` pixels as possible; among those the widest.
inline Boxes boxes_of(const Shape& s, int64_t most) {
  const int64_t out_w = s.out_w(), out_h = s.out_h();
  int64_t best[3] = {1, 1, 1}, fewest = INT64_MAX;
  for (int64_t w = 1; w <= out_w && w <= most; ++w) {
    for (int64_t h = 1; h <= out_h && w * h <= most; ++h) {
      const int64_t fit = most / (w * h), n = fit < s.n ? fit : s.n;
      const int64_t count = divide_up(out_w, w) * divide_up(out_h, h) * divide_up(s.n, n);
      if (count <= fewest) fewest = count, best[0] = w, best[1] = h, best[2] = n;
    }
  }
  auto narrow = [](int64_t value) { return static_cast<uint32_t>(value); };
  return {divisor(best[0]),
          divisor(best[1]),
          narrow(best[2]),
          narrow(best[0] * best[1] * best[2]),
          divisor(divide_up(out_w, best[0])),
          divisor(divide_up(out_h, best[1])),
          narrow(fewest),
          narrow(out_w),
          narrow(out_h),
          narrow(s.n)};
}

struct Pixel {
  uint32_t w, h, n;
};
// The first pixel of a box.
FASTRES_DEVICE Pixel corner_of(const Boxes& b, uint32_t box) {
  const uint32_t row = divide(box, b.across), image = divide(row, b.down);
  return {(box - row * b.across.d) * b.w.d, (row - image * b.down.d) * b.h.d, image * b.n};
}
// The index-th pixel of the box at `corner`, and whether it exists.
FASTRES_DEVICE Pixel pixel_of(const Boxes& b, const Pixel& corner, uint32_t index) {
  const uint32_t row = divide(index, b.w), image = divide(row, b.h);
  return {corner.w + index - row * b.w.d, corner.h + row - image * b.h.d, corner.n + image};
}
FASTRES_DEVICE bool exists(const Boxes& b, const Pixel& corner, const Pixel& p) {
  return p.w < b.out_w && p.h < b.out_h && p.n < b.images && p.n - corner.n < b.n;
}

// The output pixels of a tensor that has all pixels.
inline Pixels strided(const Pixels& p, const Shape& s) {
  return {p.data, p.n_stride, p.h_stride * s.stride, p.w_stride * s.stride};
}
FASTRES_DEVICE int64_t offset_of(const Pixels& p, const Pixel& at) {
  return at.n * p.n_stride + at.h * p.h_stride + at.w * p.w_stride;
}

// Whether copies can read it.
inline bool describable(const Pixels& p) {
  auto good = [](int64_t stride) { return stride > 0 && stride < int64_t{1} << 39; };
  return aligned(p) && good(p.n_stride) && good(p.h_stride) && good(p.w_stride);
}

inline const char* encode_pixels(TensorMap& map, Dtype dtype, const Pixels& p, int64_t channels, const Boxes& b) {
  return encode_tensor_map(map, dtype, p.data, {channels, b.out_w, b.out_h, b.images},
                           {p.w_stride, p.h_stride, p.n_stride}, {block_side, b.w.d, b.h.d, b.n});
}
inline const char* encode_matrix(TensorMap& map, Dtype dtype, const void* data, int64_t rows, int64_t columns) {
  return encode_tensor_map(map, dtype, data, {columns, rows, 1, 1}, {columns, rows * columns, rows * columns},
                           {block_side, block_side, 1, 1});
}

// The ring of stages. A stage holds 2 blocks of A, one for each warp group, and then width / 64 of B. `full` ends a
// phase when its stage has been copied, `empty` when all eight warps have multiplied it. The copier and each warp keep
// their own place in the ring.
template <int width>
struct Pipeline {
  static constexpr uint32_t a_bytes = 2 * block_bytes, b_bytes = width / block_side * block_bytes;
  static constexpr uint32_t stage_bytes = a_bytes + b_bytes, stages = 192 * 1024 / stage_bytes, warps = 8;
  static constexpr uint32_t head_bytes = 1024;  // the barriers; keeps the stages aligned
  static constexpr uint32_t shared_bytes = head_bytes + stages * stage_bytes;
  static_assert(stages >= 4 && stages * 16 <= head_bytes && shared_bytes <= 227 * 1024);

  uint32_t memory, index = 0, parity = 0;

  FASTRES_DEVICE uint32_t full() const { return memory + index * 16; }
  FASTRES_DEVICE uint32_t empty() const { return memory + index * 16 + 8; }
  FASTRES_DEVICE uint32_t stage() const { return memory + head_bytes + index * stage_bytes; }
  FASTRES_DEVICE void advance() {
    if (++index == stages) index = 0, parity ^= 1;
  }

  // All threads, before a sync_block(). Boxes of `pixels` leave the other rows of each `rows` in the first `bytes` of a
  // stage as they are: zero, from here on.
  FASTRES_DEVICE void init(uint32_t pixels, uint32_t rows, uint32_t bytes) const {
    if (thread_index() == 0) {
      for (uint32_t i = 0; i < stages; ++i) {
        barrier_init(memory + i * 16, 1);
        barrier_init(memory + i * 16 + 8, warps);
      }
      barrier_init_fence();
    }
    const uint32_t chunks = (rows - pixels) * 8, pieces = bytes / (rows * 128);
    for (uint32_t i = thread_index(); i < stages * pieces * chunks; i += threads) {
      const uint32_t piece = i / chunks, chunk = i - piece * chunks;
      store_shared(memory + head_bytes + piece / pieces * stage_bytes + (piece % pieces * rows + pixels) * 128 +
                       chunk * 16,
                   uint4{0, 0, 0, 0});
    }
    async_proxy_fence();
  }

  // The copier: waits for a stage and calls copy(stage, full), whose copies have `bytes` together.
  template <class Copy>
  FASTRES_DEVICE void produce(uint32_t bytes, const Copy& copy) {
    barrier_wait(empty(), parity ^ 1);
    barrier_expect_bytes(full(), bytes);
    copy(stage(), full());
    advance();
  }

  // warp group: calls multiply(stage), which begins wgmma, on each of the next `count` stages; at least one. (A way
  // around the loop would reach the last wait with other sums, and ptxas would wait after every wgmma.)
  template <class Multiply>
  FASTRES_DEVICE void consume(uint32_t count, const Multiply& multiply) {
    uint32_t used = 0, i = 0;
    auto release = [&] {
      if (thread_index() % 32 == 0) barrier_arrive(used);
    };
    do {
      barrier_wait(full(), parity);
      wgmma_fence();
      multiply(stage());
      wgmma_commit();
      wgmma_wait<1>();  // this stage is being multiplied, the one before has been
      if (i > 0) release();
      used = empty();
      advance();
    } while (++i < count);
    wgmma_wait<0>();
    release();
  }
};

}  // namespace fastres::hopper
