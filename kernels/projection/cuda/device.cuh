// The device operations that the projection kernels use, each with two implementations: PTX where nvcc compiles this
// file, and a host emulation (tests/emulation/emulation.h) where a C++ compiler does. Kernels use nothing else of CUDA,
// so that the same source runs, and is checked, on a CPU.
//
// Shared memory is addressed in bytes by uint32_t. A warp is 32 threads; all of them must call what is marked "warp".
#pragma once

#include <cstdint>

namespace fastres {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

}  // namespace fastres

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define FASTRES_KERNEL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)
#define FASTRES_PARAMETER const __grid_constant__
#define FASTRES_DEVICE __device__ __forceinline__
#define FASTRES_UNROLL _Pragma("unroll")
#define FASTRES_NO_UNROLL _Pragma("unroll 1")
// Declares `name`, the address of the block's dynamic shared memory, 1024-byte aligned.
#define FASTRES_SHARED(name)                                        \
  extern __shared__ __align__(1024) unsigned char name##_memory[]; \
  const uint32_t name = static_cast<uint32_t>(__cvta_generic_to_shared(name##_memory))

namespace fastres {

FASTRES_DEVICE uint32_t thread_index() { return threadIdx.x; }
FASTRES_DEVICE uint32_t block_index() { return blockIdx.x; }
FASTRES_DEVICE void sync_block() { __syncthreads(); }
FASTRES_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
FASTRES_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }  // warp

// Copies 16 bytes from global to shared memory asynchronously; zeros without `valid`, when source is not read.
FASTRES_DEVICE void copy_async(uint32_t target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target),
               "l"(__cvta_generic_to_global(source)), "r"(valid ? 16 : 0)
               : "memory");
}
// Closes a group of this thread's copies; wait_copies<N> waits until at most its N latest groups are under way.
FASTRES_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
FASTRES_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// warp: four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
FASTRES_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
FASTRES_DEVICE void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// warp: c += a b, for a 16x16 row-major, b 16x8 column-major and c 16x8 in the fragment layout of mma.m16n8k16.
// Volatile, so that no compiler moves it to where only some lanes come by.
template <class T>
FASTRES_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
FASTRES_DEVICE void multiply_add<bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
FASTRES_DEVICE void multiply_add<float16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// float2, float4 and uint4 are CUDA's vectors. V is float, float4 or uint4, the address aligned to its size.
template <class V>
FASTRES_DEVICE V load_shared(uint32_t address);
template <>
FASTRES_DEVICE float load_shared<float>(uint32_t address) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
  return v;
}
template <>
FASTRES_DEVICE float4 load_shared<float4>(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
FASTRES_DEVICE void store_shared(uint32_t address, float v) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(v) : "memory");
}
FASTRES_DEVICE void store_shared(uint32_t address, float2 v) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(v.x), "f"(v.y) : "memory");
}
FASTRES_DEVICE void store_shared(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// V is uint16_t, float, float2, float4 or uint4. Coherent: dx is read and written by one kernel.
template <class V>
FASTRES_DEVICE V load_global(const V* p) {
  return *p;
}
template <class V>
FASTRES_DEVICE void store_global(V* p, V v) {
  *p = v;
}

// Two floats rounded to nearest even, and back; `low` is the half at the lower address.
template <class T>
FASTRES_DEVICE uint32_t pack(float low, float high);
template <>
FASTRES_DEVICE uint32_t pack<bfloat16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <>
FASTRES_DEVICE uint32_t pack<float16>(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
template <class T>
FASTRES_DEVICE float2 unpack(uint32_t v);
template <>
FASTRES_DEVICE float2 unpack<bfloat16>(uint32_t v) {
  return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)};
}
template <>
FASTRES_DEVICE float2 unpack<float16>(uint32_t v) {
  return {__half2float(__ushort_as_half(v & 0xffff)), __half2float(__ushort_as_half(v >> 16))};
}

// 0xffff in each half where ~(value <= 0), PyTorch's ReLU mask: NaN passes.
template <class T>
FASTRES_DEVICE uint32_t relu_mask(uint32_t v);
template <>
FASTRES_DEVICE uint32_t relu_mask<bfloat16>(uint32_t v) {
  const __nv_bfloat16 zero = __ushort_as_bfloat16(0);
  return __hgtu2_mask(*reinterpret_cast<const __nv_bfloat162*>(&v), __nv_bfloat162{zero, zero});
}
template <>
FASTRES_DEVICE uint32_t relu_mask<float16>(uint32_t v) {
  const __half zero = __ushort_as_half(0);
  return __hgtu2_mask(*reinterpret_cast<const __half2*>(&v), __half2{zero, zero});
}

// Runs kernel(p) on `blocks` blocks; returns null, or what went wrong.
template <class P>
const char* launch(void (*kernel)(P), int64_t blocks, uint32_t threads, uint32_t shared_bytes, void* stream,
                   const P& p) {
  if (shared_bytes > 48 * 1024) {
    cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                             cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) {
      cudaGetLastError();  // or the next launch that succeeds would report it
      return cudaGetErrorString(error);
    }
  }
  kernel<<<static_cast<uint32_t>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(p);
  cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastres

#else
#include "emulation.h"
#endif
