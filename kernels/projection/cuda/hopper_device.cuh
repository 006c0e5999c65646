// What device.cuh lacks for Hopper: tensor copies (TMA), barriers that count their bytes (mbarrier) and products of
// warp groups (wgmma). Two implementations again: PTX for sm_90a, and tests/emulation/emulation_hopper.h.
//
// Barriers are 8 bytes of shared memory. A warp group is 128 threads from a multiple of 128 on; all of them must call
// what is marked "warp group". Tiles in shared memory are rows of 64 16-bit elements, 128 bytes, whose 16-byte chunks
// stand permuted by the row's number modulo 8 (the 128-byte swizzle); groups of eight rows are 1024-byte aligned.
#pragma once

#include "../projection.h"
#include "device.cuh"

#if defined(__CUDACC__)

#include <cuda.h>

#include <cstdio>
#include <type_traits>

namespace fastres {

using TensorMap = CUtensorMap;

// Host. Describes `size` elements, `stride` of dimensions 1 to 3 apart and contiguous in dimension 0, to be copied in
// boxes of box[0] = 64 by up to 256 elements; what a box has outside is zero. Null, or what went wrong.
inline const char* encode_tensor_map(TensorMap& map, Dtype dtype, const void* base, const int64_t (&size)[4],
                                     const int64_t (&stride)[3], const uint32_t (&box)[4]) {
  // Looked up at run time, so that nothing links libcuda, which machines without a driver lack.
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    cudaGetLastError();  // of a driver that lacks it, or the next launch that succeeds would report it
    return reinterpret_cast<Encode>(function);
  }();
  if (!encode) return "the CUDA driver has no cuTensorMapEncodeTiled: it is older than 12.0";
  const cuuint64_t sizes[4] = {cuuint64_t(size[0]), cuuint64_t(size[1]), cuuint64_t(size[2]), cuuint64_t(size[3])};
  const cuuint64_t strides[3] = {cuuint64_t(stride[0]) * 2, cuuint64_t(stride[1]) * 2, cuuint64_t(stride[2]) * 2};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  // A driver's function: it wants a context, which the runtime's functions make and a thread of autograd's may lack.
  int device;
  cudaError_t without = cudaGetDevice(&device);
  if (without == cudaSuccess) without = cudaSetDevice(device);
  if (without != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(without);
  }
  const CUresult error = encode(
      &map, dtype == Dtype::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4,
      const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error == CUDA_SUCCESS) return nullptr;
  thread_local char text[64];
  std::snprintf(text, sizeof text, "cuTensorMapEncodeTiled refuses the tensor: CUresult %d", static_cast<int>(error));
  return text;
}

// Host. Of the current device.
inline int64_t multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// A phase of the barrier ends with `arrivals` arrivals and the bytes it then expects.
FASTRES_DEVICE void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After barrier_init and before sync_block(): copies may count on the barriers.
FASTRES_DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
FASTRES_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and expects `bytes` of copies in this phase.
FASTRES_DEVICE void barrier_expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the end of the phase of this parity, the first phase having parity 0; of a new barrier, parity 1 has ended.
FASTRES_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!ended);
}

// One thread: copies the box at coordinates c0 to c3 to `target`, 1024-byte aligned, and counts its bytes on `barrier`.
FASTRES_DEVICE void copy_tensor_async(uint32_t target, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2,
                                      int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(target),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
// What this thread wrote to shared memory by store_shared becomes visible to wgmma and to copies.
FASTRES_DEVICE void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// An operand of wgmma at `address`. "K-major" rows hold 64 elements of the depth, and groups of eight rows are
// stride_bytes apart (leading_bytes does not count); "MN-major" rows hold 64 rows or columns of the result, groups of
// eight rows, that is of the depth, are stride_bytes apart and the next 64 rows or columns leading_bytes.
FASTRES_DEVICE uint64_t matrix_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  constexpr uint64_t swizzle_128_bytes = uint64_t{1} << 62;
  return uint64_t{address >> 4} | uint64_t{leading_bytes >> 4} << 16 | uint64_t{stride_bytes >> 4} << 32 |
         swizzle_128_bytes;
}

// warp group: before the first wgmma, and whenever anything else has touched the sums since.
FASTRES_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// warp group: closes a group of wgmma; wgmma_wait<N> waits until at most the N latest groups are under way.
FASTRES_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
FASTRES_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// After the wgmma_wait behind which d is used: the compiler, which does not know that wgmma runs on, must not move that
// in front of the wait.
template <int size>
FASTRES_DEVICE void wgmma_done(float (&d)[size]) {
  FASTRES_UNROLL
  for (int i = 0; i < size; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The assembler wants every register of d by name, %0 to %(N / 2 - 1), and an operand for each of them: ten names given
// the tens digit, sixteen operands given the first index. a, b and what is transposed are the four operands after d.
#define FASTRES_TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9"
#define FASTRES_NAMES_4 "%0,%1,%2,%3"
#define FASTRES_NAMES_32 FASTRES_TEN() "," FASTRES_TEN(1) "," FASTRES_TEN(2) ",%30,%31"
#define FASTRES_NAMES_64                                                                                       \
  FASTRES_TEN() "," FASTRES_TEN(1) "," FASTRES_TEN(2) "," FASTRES_TEN(3) "," FASTRES_TEN(4) "," FASTRES_TEN(5) \
  ",%60,%61,%62,%63"
#define FASTRES_NAMES_128                                                                                          \
  FASTRES_TEN() "," FASTRES_TEN(1) "," FASTRES_TEN(2) "," FASTRES_TEN(3) "," FASTRES_TEN(4) "," FASTRES_TEN(5) "," \
  FASTRES_TEN(6) "," FASTRES_TEN(7) "," FASTRES_TEN(8) "," FASTRES_TEN(9) "," FASTRES_TEN(10) "," FASTRES_TEN(11)  \
  ",%120,%121,%122,%123,%124,%125,%126,%127"
#define FASTRES_D_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FASTRES_D_16(i) FASTRES_D_4(i), FASTRES_D_4(i + 4), FASTRES_D_4(i + 8), FASTRES_D_4(i + 12)
#define FASTRES_D_32 FASTRES_D_16(0), FASTRES_D_16(16)
#define FASTRES_D_64 FASTRES_D_16(0), FASTRES_D_16(16), FASTRES_D_16(32), FASTRES_D_16(48)
#define FASTRES_D_128                                                                                        \
  FASTRES_D_16(0), FASTRES_D_16(16), FASTRES_D_16(32), FASTRES_D_16(48), FASTRES_D_16(64), FASTRES_D_16(80), \
  FASTRES_D_16(96), FASTRES_D_16(112)
#define FASTRES_WGMMA(type, n, names, a_name, b_name, a_transposed_name, b_transposed_name, ...)                    \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" names "}, " a_name ", " b_name   \
               ", 1, 1, 1, " a_transposed_name ", " b_transposed_name ";"                                           \
               : __VA_ARGS__                                                                                        \
               : "l"(a), "l"(b), "n"(a_transposed), "n"(b_transposed)                                               \
               : "memory")
#define FASTRES_WGMMA_OF(type)                                                                     \
  do {                                                                                             \
    if constexpr (N == 8) {                                                                        \
      FASTRES_WGMMA(type, "8", FASTRES_NAMES_4, "%4", "%5", "%6", "%7", FASTRES_D_4(0));           \
    } else if constexpr (N == 64) {                                                                \
      FASTRES_WGMMA(type, "64", FASTRES_NAMES_32, "%32", "%33", "%34", "%35", FASTRES_D_32);       \
    } else if constexpr (N == 128) {                                                               \
      FASTRES_WGMMA(type, "128", FASTRES_NAMES_64, "%64", "%65", "%66", "%67", FASTRES_D_64);      \
    } else {                                                                                       \
      FASTRES_WGMMA(type, "256", FASTRES_NAMES_128, "%128", "%129", "%130", "%131", FASTRES_D_128); \
    }                                                                                              \
  } while (false)

// warp group: d += a b for a 64x16 and b 16xN, each K-major or, transposed, MN-major. It runs on until wgmma_wait; till
// then d and the operands must not be touched. d[j * 4 + h * 2 + c] is row warp % 4 * 16 + h * 8 + lane / 4, column
// j * 8 + lane % 4 * 2 + c.
template <class T, int N, bool a_transposed, bool b_transposed>
FASTRES_DEVICE void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b) {
  static_assert(N == 8 || N == 64 || N == 128 || N == 256);
  if constexpr (std::is_same_v<T, bfloat16>) {
    FASTRES_WGMMA_OF("bf16");
  } else {
    FASTRES_WGMMA_OF("f16");
  }
}

#undef FASTRES_TEN
#undef FASTRES_NAMES_4
#undef FASTRES_NAMES_32
#undef FASTRES_NAMES_64
#undef FASTRES_NAMES_128
#undef FASTRES_D_4
#undef FASTRES_D_16
#undef FASTRES_D_32
#undef FASTRES_D_64
#undef FASTRES_D_128
#undef FASTRES_WGMMA
#undef FASTRES_WGMMA_OF

// warp group: N registers for each of its threads from here on. Those that one group gives up, others may take.
template <int N>
FASTRES_DEVICE void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
FASTRES_DEVICE void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

}  // namespace fastres

#else
#include "emulation_hopper.h"
#endif
