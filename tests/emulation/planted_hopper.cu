// What planted.cu is for device.cuh, for hopper_device.cuh.
#include <cstring>
#include <string>
#include <utility>

#include "hopper_device.cuh"

namespace fastres {
namespace {

// One fault of pipeline_kernel each, at one of the lines marked "here: <fault>".
enum class Fault {
  none,
  wrong_parity,
  missing_full_wait,
  missing_empty_wait,
  released_early,
  more_arrivals,
  fewer_arrivals,
  fewer_bytes,
  more_bytes,
  no_init_fence,
  no_barrier_after_init,
  no_wgmma_wait,
  no_wgmma_fence,
  sums_read_early,
  descriptor_within_a_group,
  descriptor_beyond_memory,
  misaligned_target,
  wgmma_differs,
  barrier_overwritten,
  tile_read_early,
  one_thread_waits,
};
const char* const names[] = {"none",
                             "wrong_parity",
                             "missing_full_wait",
                             "missing_empty_wait",
                             "released_early",
                             "more_arrivals",
                             "fewer_arrivals",
                             "fewer_bytes",
                             "more_bytes",
                             "no_init_fence",
                             "no_barrier_after_init",
                             "no_wgmma_wait",
                             "no_wgmma_fence",
                             "sums_read_early",
                             "descriptor_within_a_group",
                             "descriptor_beyond_memory",
                             "misaligned_target",
                             "wgmma_differs",
                             "barrier_overwritten",
                             "tile_read_early",
                             "one_thread_waits"};
constexpr int faults = sizeof names / sizeof *names;

constexpr uint32_t tile_bytes = 64 * 128, stage_bytes = 2 * tile_bytes, stages = 2;

struct PipelineArguments {
  TensorMap a, b;  // [64, depth] both
  float* out;      // [64, 64]
  uint32_t tiles;  // depth / 64
};

// out = a b^T. Warp group 0 multiplies, thread 128 has tiles copied.
template <Fault fault>
FASTRES_KERNEL(160, 1)
pipeline_kernel(FASTRES_PARAMETER PipelineArguments p) {
  FASTRES_SHARED(memory);
  const uint32_t t = thread_index(), full = memory, empty = memory + 64, ring = memory + 1024;
  if (t == 0) {
    for (uint32_t s = 0; s < stages; ++s) {
      barrier_init(full + s * 8, 1);
      barrier_init(empty + s * 8, fault == Fault::more_arrivals ? 2 : fault == Fault::fewer_arrivals ? 5 : 4);
    }
    if (fault != Fault::no_init_fence) barrier_init_fence();
  }
  if (fault != Fault::no_barrier_after_init) sync_block();
  if (t == 128) {
    for (uint32_t k = 0; k < p.tiles; ++k) {
      const uint32_t s = k % stages, target = ring + s * stage_bytes, round = k / stages;
      if (k >= stages && fault != Fault::missing_empty_wait) {
        barrier_wait(empty + s * 8, (round - 1) % 2);  // here: more_arrivals fewer_arrivals
      }
      const uint32_t bytes = fault == Fault::fewer_bytes  ? stage_bytes - 64
                             : fault == Fault::more_bytes ? stage_bytes + 64
                                                          : stage_bytes;
      // here: missing_empty_wait fewer_bytes more_bytes no_barrier_after_init
      barrier_expect_bytes(full + s * 8, bytes);
      const uint32_t off = fault == Fault::misaligned_target ? 512 : 0;
      // here: missing_full_wait wrong_parity missing_empty_wait released_early more_arrivals no_init_fence
      // here: no_wgmma_wait misaligned_target one_thread_waits
      copy_tensor_async(target + off, &p.a, full + s * 8, k * 64, 0, 0, 0);
      copy_tensor_async(target + tile_bytes, &p.b, full + s * 8, k * 64, 0, 0, 0);
      if (fault == Fault::tile_read_early) load_shared<float>(target);  // here: tile_read_early
    }
  } else if (t < 128) {
    float sum[32] = {};
    for (uint32_t k = 0; k < p.tiles; ++k) {
      const uint32_t s = k % stages, tile = ring + s * stage_bytes, round = k / stages;
      const bool waits = fault != Fault::missing_full_wait && (fault != Fault::one_thread_waits || t == 1);
      // here: no_barrier_after_init more_arrivals fewer_arrivals
      if (waits) barrier_wait(full + s * 8, (round + (fault == Fault::wrong_parity)) % 2);
      if (fault != Fault::no_wgmma_fence) wgmma_fence();
      for (uint32_t step = 0; step < 4; ++step) {
        uint32_t a = tile + step * 32;
        if (fault == Fault::descriptor_within_a_group) a += 128;
        if (fault == Fault::descriptor_beyond_memory) a += 64 * 1024;
        if (fault == Fault::wgmma_differs && t == 77) a ^= 32;
        const uint64_t descriptor = matrix_descriptor(a, 16, 1024);
        const uint64_t other = matrix_descriptor(tile + tile_bytes + step * 32, 16, 1024);
        // here: missing_full_wait wrong_parity no_wgmma_wait no_wgmma_fence descriptor_within_a_group
        // here: descriptor_beyond_memory wgmma_differs one_thread_waits
        wgmma<bfloat16, 64, false, false>(sum, descriptor, other);
      }
      wgmma_commit();
      if (fault == Fault::released_early && t % 32 == 0) barrier_arrive(empty + s * 8);
      if (fault != Fault::no_wgmma_wait && fault != Fault::sums_read_early) wgmma_wait<0>();
      if (fault == Fault::sums_read_early && k + 1 < p.tiles) wgmma_wait<0>();
      if (fault == Fault::barrier_overwritten) store_shared(full + s * 8, 0.f);  // here: barrier_overwritten
      if (fault != Fault::released_early && t % 32 == 0) barrier_arrive(empty + s * 8);  // here: more_arrivals
    }
    for (uint32_t i = 0; i < 32; ++i) {
      const uint32_t row = t / 32 * 16 + i / 2 % 2 * 8 + t % 32 / 4, column = i / 4 * 8 + t % 4 * 2 + i % 2;
      store_global(p.out + row * 64 + column, sum[i]);
    }
    if (fault == Fault::sums_read_early) wgmma_wait<0>();
  }
}

template <int... i>
void fill_table(void (*(&table)[sizeof...(i)])(PipelineArguments), std::integer_sequence<int, i...>) {
  ((table[i] = pipeline_kernel<static_cast<Fault>(i)>), ...);
}

// ---- Operands that threads write ----

struct WrittenArguments {
  float* out;  // [64, 8]
};
template <bool fenced>
FASTRES_KERNEL(128, 1)
written_operands_kernel(FASTRES_PARAMETER WrittenArguments p) {
  FASTRES_SHARED(memory);
  const uint32_t t = thread_index(), one = pack<bfloat16>(1.f, 1.f);
  for (uint32_t at = t * 16; at < 2 * tile_bytes; at += 128 * 16) {
    store_shared(memory + at, uint4{one, one, one, one});
  }
  if (fenced) async_proxy_fence();
  sync_block();
  float sum[4] = {};
  wgmma_fence();
  const uint64_t a = matrix_descriptor(memory, 16, 1024), b = matrix_descriptor(memory + tile_bytes, 16, 1024);
  wgmma<bfloat16, 8, false, false>(sum, a, b);  // here: written_operands
  wgmma_commit();
  wgmma_wait<0>();
  for (uint32_t i = 0; i < 4; ++i) {
    store_global(p.out + (t / 32 * 16 + i / 2 * 8 + t % 32 / 4) * 8 + t % 4 * 2 + i % 2, sum[i]);
  }
}

// ---- What instructions do ----

struct ProductArguments {
  TensorMap a, b;  // K-major [64, 64] and [n, 64], MN-major [64, 64] and [64, n]
  float* out;      // [64, n]
};
template <class T, int n, bool a_transposed, bool b_transposed>
FASTRES_KERNEL(128, 1)
product_kernel(FASTRES_PARAMETER ProductArguments p) {
  FASTRES_SHARED(memory);
  const uint32_t t = thread_index(), a = memory + 1024, b = a + tile_bytes;
  constexpr uint32_t b_rows = b_transposed ? 64 : n, b_blocks = b_transposed ? (n + 63) / 64 : 1;
  if (t == 0) {
    barrier_init(memory, 1);
    barrier_init_fence();
    barrier_expect_bytes(memory, tile_bytes + b_blocks * b_rows * 128);
    copy_tensor_async(a, &p.a, memory, 0, 0, 0, 0);
    for (uint32_t i = 0; i < b_blocks; ++i) copy_tensor_async(b + i * tile_bytes, &p.b, memory, i * 64, 0, 0, 0);
  }
  sync_block();
  barrier_wait(memory, 0);
  float sum[n / 2] = {};
  wgmma_fence();
  for (uint32_t step = 0; step < 4; ++step) {
    auto descriptor = [&](uint32_t base, bool transposed) {
      return transposed ? matrix_descriptor(base + step * 2048, tile_bytes, 1024)
                        : matrix_descriptor(base + step * 32, 16, 1024);
    };
    wgmma<T, n, a_transposed, b_transposed>(sum, descriptor(a, a_transposed), descriptor(b, b_transposed));
  }
  wgmma_commit();
  wgmma_wait<0>();
  for (uint32_t i = 0; i < n / 2; ++i) {
    const uint32_t row = t / 32 * 16 + i / 2 % 2 * 8 + t % 32 / 4, column = i / 4 * 8 + t % 4 * 2 + i % 2;
    store_global(p.out + row * n + column, sum[i]);
  }
}

template <class T, int n>
const char* run_product(bool a_transposed, bool b_transposed, const ProductArguments& p) {
  auto kernel = a_transposed ? b_transposed ? product_kernel<T, n, true, true> : product_kernel<T, n, true, false>
                : b_transposed ? product_kernel<T, n, false, true>
                               : product_kernel<T, n, false, false>;
  return launch(kernel, 1, 128, 1024 + tile_bytes + 4 * tile_bytes, nullptr, p);
}

struct BoxArguments {
  TensorMap map;
  float* out;
  uint32_t bytes;
  int corner[4];
};
FASTRES_KERNEL(32, 1)
box_kernel(FASTRES_PARAMETER BoxArguments p) {
  FASTRES_SHARED(memory);
  if (thread_index() == 0) {
    barrier_init(memory, 1);
    barrier_init_fence();
    barrier_expect_bytes(memory, p.bytes);
    copy_tensor_async(memory + 1024, &p.map, memory, p.corner[0], p.corner[1], p.corner[2], p.corner[3]);  // here: box
  }
  sync_block();
  barrier_wait(memory, 0);
  for (uint32_t i = thread_index(); i < p.bytes / 4; i += 32) {
    store_global(p.out + i, load_shared<float>(memory + 1024 + i * 4));
  }
}

}  // namespace
}  // namespace fastres

extern "C" {

using namespace fastres;

const char* planted_faults() {
  static std::string list;
  list.clear();
  for (const char* name : names) list += std::string(list.empty() ? "" : " ") + name;
  return list.c_str();
}

const char* planted_pipeline(const char* fault, const void* a, const void* b, float* out, int64_t tiles) {
  void (*table[faults])(PipelineArguments);
  fill_table(table, std::make_integer_sequence<int, faults>());
  const int64_t size[4] = {tiles * 64, 64, 1, 1}, stride[3] = {tiles * 64, tiles * 4096, tiles * 4096};
  PipelineArguments p{};
  const char* error = encode_tensor_map(p.a, Dtype::bfloat16, a, size, stride, {64, 64, 1, 1});
  if (!error) error = encode_tensor_map(p.b, Dtype::bfloat16, b, size, stride, {64, 64, 1, 1});
  if (error) return error;
  p.out = out;
  p.tiles = static_cast<uint32_t>(tiles);
  for (int i = 0; i < faults; ++i) {
    if (std::strcmp(names[i], fault) == 0) return launch(table[i], 1, 160, 1024 + stages * stage_bytes, nullptr, p);
  }
  return "no such fault";
}

const char* planted_written_operands(bool fenced, float* out) {
  const WrittenArguments p{out};
  auto kernel = fenced ? written_operands_kernel<true> : written_operands_kernel<false>;
  return launch(kernel, 1, 128, 2 * tile_bytes, nullptr, p);
}

const char* planted_product(bool half, int n, bool a_transposed, bool b_transposed, const void* a, const void* b,
                            float* out) {
  const Dtype dtype = half ? Dtype::float16 : Dtype::bfloat16;
  const int64_t b_columns = b_transposed ? n : 64, b_rows = b_transposed ? 64 : n;
  ProductArguments p{};
  const char* error = encode_tensor_map(p.a, dtype, a, {64, 64, 1, 1}, {64, 4096, 4096}, {64, 64, 1, 1});
  if (!error) {
    const int64_t all = b_columns * b_rows;
    error = encode_tensor_map(p.b, dtype, b, {b_columns, b_rows, 1, 1}, {b_columns, all, all},
                              {64, static_cast<uint32_t>(b_rows), 1, 1});
  }
  if (error) return error;
  p.out = out;
  auto run = [&]<class T>(T) {
    return n == 8    ? run_product<T, 8>(a_transposed, b_transposed, p)
           : n == 64 ? run_product<T, 64>(a_transposed, b_transposed, p)
                     : run_product<T, 256>(a_transposed, b_transposed, p);
  };
  return half ? run(float16{}) : run(bfloat16{});
}

const char* planted_box(const void* base, const int64_t* size, const int64_t* stride, const uint32_t* box,
                        const int* corner, float* out) {
  BoxArguments p{};
  const char* error = encode_tensor_map(p.map, Dtype::bfloat16, base, {size[0], size[1], size[2], size[3]},
                                        {stride[0], stride[1], stride[2]}, {box[0], box[1], box[2], box[3]});
  if (error) return error;
  p.out = out;
  p.bytes = box[0] * box[1] * box[2] * box[3] * 2;
  std::memcpy(p.corner, corner, sizeof p.corner);
  return launch(box_kernel, 1, 32, 1024 + p.bytes, nullptr, p);
}

}  // extern "C"
