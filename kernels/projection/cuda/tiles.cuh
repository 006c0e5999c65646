// Where the rows of a matrix of pixels lie in memory, and where the chunks of a tile lie in shared memory.
#pragma once

#include "../projection.h"
#include "device.cuh"

namespace fastres {

// Division by a number that the host knows: n / d by a multiplication, exact for n < 2^31.
// Source: Granlund & Montgomery, "Division by invariant integers using multiplication" (1994), figure 4.1.
struct Divisor {
  uint32_t d, factor, shift;
};
inline Divisor divisor(int64_t d) {
  if (d < 1) d = 1;  // of images without pixels there are no rows to find
  uint32_t shift = 0;
  while ((int64_t{1} << shift) < d) ++shift;
  uint64_t factor = ((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1;
  return {static_cast<uint32_t>(d), static_cast<uint32_t>(factor), shift};
}
FASTRES_DEVICE uint32_t divide(uint32_t n, const Divisor& by) { return (multiply_high(n, by.factor) + n) >> by.shift; }

// Row m of a matrix is output pixel (n, ho, wo) of a tensor; strides in elements, those of x times the conv's stride.
struct Rows {
  int64_t n_stride, h_stride, w_stride;
  Divisor image, width;  // output pixels of an image, of its rows
  bool even;             // rows are w_stride apart, across rows of pixels and images too
};
inline Rows rows_of(const Pixels& p, const Shape& s, int64_t stride) {
  int64_t h = s.out_h(), w = s.out_w(), h_stride = p.h_stride * stride, w_stride = p.w_stride * stride;
  bool even = h_stride == w * w_stride && p.n_stride == h * h_stride;
  return {p.n_stride, h_stride, w_stride, divisor(h * w), divisor(w), even};
}
FASTRES_DEVICE int64_t row_offset(const Rows& r, uint32_t m) {
  if (r.even) return m * r.w_stride;
  const uint32_t n = divide(m, r.image), pixel = m - n * r.image.d;
  const uint32_t h = divide(pixel, r.width), w = pixel - h * r.width.d;
  return n * r.n_stride + h * r.h_stride + w * r.w_stride;
}

// Eight 16-bit elements are a chunk of 16 bytes. Chunk `chunk` of row `row`, for rows of `chunks` of them, permuted
// within 128 bytes so that eight rows' chunks of one column fall into different banks.
template <int chunks>
FASTRES_DEVICE uint32_t swizzled(uint32_t row, uint32_t chunk) {
  static_assert(chunks == 4 || chunks % 8 == 0);
  constexpr uint32_t rows_per_line = chunks == 4 ? 2 : 1, permuted = chunks == 4 ? 4 : 8;
  return (row * chunks + (chunk ^ (row / rows_per_line % permuted))) * 16;
}

// Eight elements of a pixel, or of a vector of floats, of which `left` exist.
template <bool vectors, class T>
FASTRES_DEVICE uint4 load_chunk(const T* source, uint32_t left) {
  if constexpr (vectors) return load_global(reinterpret_cast<const uint4*>(source));
  uint32_t word[4] = {};
  FASTRES_UNROLL
  for (uint32_t i = 0; i < 8; ++i) {
    if (i < left) word[i / 2] |= uint32_t{load_global(&source[i].bits)} << i % 2 * 16;
  }
  return {word[0], word[1], word[2], word[3]};
}
template <bool vectors, class T>
FASTRES_DEVICE void store_chunk(T* target, const uint4& chunk, uint32_t left) {
  if constexpr (vectors) {
    store_global(reinterpret_cast<uint4*>(target), chunk);
  } else {
    const uint32_t word[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
    FASTRES_UNROLL
    for (uint32_t i = 0; i < 8; ++i) {
      if (i < left) store_global(&target[i].bits, static_cast<uint16_t>(word[i / 2] >> i % 2 * 16));
    }
  }
}
template <bool vectors>
FASTRES_DEVICE void load_floats(float (&to)[8], const float* source, uint32_t left) {
  if constexpr (vectors) {
    FASTRES_UNROLL
    for (int i = 0; i < 8; i += 4) {
      const float4 four = load_global(reinterpret_cast<const float4*>(source + i));
      to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
    }
  } else {
    FASTRES_UNROLL
    for (uint32_t i = 0; i < 8; ++i) to[i] = i < left ? load_global(source + i) : 0.f;
  }
}

// Copies eight elements of which `left` exist, zeros for the others, to shared memory: asynchronously with `vectors`,
// which demands 16-byte alignment and left a multiple of eight, else one by one.
template <bool vectors, class T>
FASTRES_DEVICE void copy_chunk(uint32_t target, const T* source, uint32_t left) {
  if constexpr (vectors) {
    copy_async(target, source, left > 0);
  } else {
    store_shared(target, load_chunk<false>(source, left));
  }
}

// Whether 16-byte accesses are possible.
inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
inline bool aligned(const Pixels& p) {
  return aligned(p.data) && p.n_stride % 8 == 0 && p.h_stride % 8 == 0 && p.w_stride % 8 == 0;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows. Tensor cores truncate what they add up, so sums of squares come out too small, the more the longer they are:
// docs/arithmetic.md, "The projection shortcut on a GPU".
constexpr int64_t longest_symmetric_split = 4096;

// 227 KiB on compute capability 9.0, 163 on 8.0, but 99 on 8.6, 8.9 and 12.0.
constexpr uint32_t shared_bytes_everywhere = 99 * 1024;

}  // namespace fastres
