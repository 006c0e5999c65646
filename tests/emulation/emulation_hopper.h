// The host half of hopper_device.cuh; see machine.h for what is checked.
//
// A tensor copy lands when nothing else can run (late), as it is issued (early) or anywhere between; wgmma computes as
// it is waited for, as its last thread issues it, or either. Until they are waited for, the sums are NaN.
#pragma once

#include "emulation.h"

namespace fastres {

struct alignas(64) TensorMap {
  const unsigned char* base;
  int64_t size[4], stride[3];  // in elements of two bytes
  uint32_t box[4];
};

// Makes the checks of cuTensorMapEncodeTiled.
const char* encode_tensor_map(TensorMap& map, Dtype dtype, const void* base, const int64_t (&size)[4],
                              const int64_t (&stride)[3], const uint32_t (&box)[4]);

// So few that a block has several tiles in most tests.
inline int64_t multiprocessors() { return 3; }

void barrier_init(uint32_t barrier, uint32_t arrivals,
                  emulation::Location where = emulation::Location::current());
void barrier_init_fence();
void barrier_arrive(uint32_t barrier, emulation::Location where = emulation::Location::current());
void barrier_expect_bytes(uint32_t barrier, uint32_t bytes,
                          emulation::Location where = emulation::Location::current());
void barrier_wait(uint32_t barrier, uint32_t parity, emulation::Location where = emulation::Location::current());

void copy_tensor_async(uint32_t target, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2, int c3,
                       emulation::Location where = emulation::Location::current());
void async_proxy_fence();

// Encoded as wgmma wants it, so that kernels may add to it.
inline uint64_t matrix_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  constexpr uint64_t swizzle_128_bytes = uint64_t{1} << 62;
  return uint64_t{address >> 4} | uint64_t{leading_bytes >> 4} << 16 | uint64_t{stride_bytes >> 4} << 32 |
         swizzle_128_bytes;
}

namespace emulation {

struct Wgmma {
  uint64_t a, b;
  int n;
  bool a_transposed, b_transposed;
  float (*value)(uint16_t);
  Location where;
};
void wgmma(float* d, const Wgmma& operation);
void wgmma_wait(int open, Location where);

}  // namespace emulation

void wgmma_fence();
void wgmma_commit(emulation::Location where = emulation::Location::current());
template <int N>
void wgmma_wait(emulation::Location where = emulation::Location::current()) {
  emulation::wgmma_wait(N, where);
}
template <int size>
void wgmma_done(float (&)[size]) {}
template <class T, int N, bool a_transposed, bool b_transposed>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, emulation::Location where = emulation::Location::current()) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  emulation::wgmma(d, {a, b, N, a_transposed, b_transposed, emulation::value_of<T>, where});
}

template <int N>
void grow_registers() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
}
template <int N>
void shrink_registers() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256);
}

}  // namespace fastres
