// Kernels with one fault each, and without it. The line that the emulation must name is marked "here: <kernel>"; of two
// threads that race it names the line that the later one, by the order in which threads run, is at.
#include <cstring>
#include <string>

#include "device.cuh"

namespace fastres {
namespace {

constexpr uint32_t threads = 64;

// in and out: 1024 floats; pixels: 2 of 4 by 4 floats, 8 apart.
struct Arguments {
  const float* in;
  float* out;
  const float* pixels;
};

FASTRES_DEVICE float* mine(const Arguments& p) { return p.out + thread_index(); }

template <bool faulty>
FASTRES_KERNEL(threads, 1)
read_race(FASTRES_PARAMETER Arguments p) {
  FASTRES_SHARED(memory);
  const uint32_t t = thread_index();
  store_shared(memory + t * 4, 1.f);
  if (!faulty) sync_block();
  store_global(mine(p), load_shared<float>(memory + (t ^ 1) * 4));  // here: read_race
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
overwrite_race(FASTRES_PARAMETER Arguments p) {
  FASTRES_SHARED(memory);
  const uint32_t t = thread_index();
  store_shared(memory + t * 4, 1.f);
  sync_block();
  const float other = load_shared<float>(memory + (t ^ 1) * 4);  // here: overwrite_race
  if (!faulty) sync_block();
  store_shared(memory + t * 4, other);  // here: overwrite_race
  store_global(mine(p), other);
}

// 64 readers of one word are more than a granule has places for.
template <bool faulty>
FASTRES_KERNEL(threads, 1)
crowd_race(FASTRES_PARAMETER Arguments p) {
  FASTRES_SHARED(memory);
  const uint32_t t = thread_index();
  if (t == 0) store_shared(memory, 1.f);
  sync_block();
  const float all = load_shared<float>(memory);  // here: crowd_race
  if (!faulty) sync_block();
  if (t == 5) store_shared(memory, 2.f);  // here: crowd_race
  store_global(mine(p), all);
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
write_race(FASTRES_PARAMETER Arguments p) {
  FASTRES_SHARED(memory);
  const uint32_t t = thread_index();
  store_shared(memory + (faulty ? t / 2 : t) * 4, 1.f);  // here: write_race
  sync_block();
  store_global(mine(p), load_shared<float>(memory));
}

// A shuffle makes a warp's lanes meet, but orders no memory.
template <bool faulty>
FASTRES_KERNEL(threads, 1)
race_across_a_shuffle(FASTRES_PARAMETER Arguments p) {
  FASTRES_SHARED(memory);
  const uint32_t t = thread_index();
  store_shared(memory + t * 4, shuffle_xor(1.f, 1));
  const float met = shuffle_xor(1.f, 1);
  if (!faulty) sync_block();
  store_global(mine(p), met + load_shared<float>(memory + (t ^ 1) * 4));  // here: race_across_a_shuffle
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
missing_wait(FASTRES_PARAMETER Arguments p) {
  FASTRES_SHARED(memory);
  const uint32_t t = thread_index();
  copy_async(memory + t * 16, p.in + t * 4, true);
  commit_copies();
  if (!faulty) wait_copies<0>();
  sync_block();
  store_global(mine(p), load_shared<float>(memory + t * 16));  // here: missing_wait
  wait_copies<0>();
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
wait_for_too_few(FASTRES_PARAMETER Arguments p) {
  FASTRES_SHARED(memory);
  const uint32_t t = thread_index();
  for (int i = 0; i < 2; ++i) {
    copy_async(memory + (i * threads + t) * 16, p.in + t * 4, i == 0);
    commit_copies();
  }
  wait_copies<faulty ? 1 : 0>();
  sync_block();
  store_global(mine(p), load_shared<float>(memory + (threads + t) * 16));  // here: wait_for_too_few
  wait_copies<0>();
}

// Every thread has waited for its own copies as it reads another's, but not before the barrier.
template <bool faulty>
FASTRES_KERNEL(threads, 1)
wait_after_the_barrier(FASTRES_PARAMETER Arguments p) {
  FASTRES_SHARED(memory);
  const uint32_t t = thread_index();
  copy_async(memory + t * 16, p.in + t * 4, true);
  commit_copies();
  if (!faulty) wait_copies<0>();
  sync_block();
  if (faulty) wait_copies<0>();
  store_global(mine(p), load_shared<float>(memory + (t ^ 1) * 16));  // here: wait_after_the_barrier
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
copy_overwritten(FASTRES_PARAMETER Arguments p) {
  FASTRES_SHARED(memory);
  const uint32_t t = thread_index();
  copy_async(memory + t * 16, p.in + t * 4, true);
  commit_copies();
  if (!faulty) wait_copies<0>();
  store_shared(memory + t * 16, 1.f);  // here: copy_overwritten
  wait_copies<0>();
  store_global(mine(p), 1.f);
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
copy_not_waited_for(FASTRES_PARAMETER Arguments p) {
  FASTRES_SHARED(memory);
  copy_async(memory + thread_index() * 16, p.in + thread_index() * 4, true);  // here: copy_not_waited_for
  if (!faulty) commit_copies();
  wait_copies<0>();
  store_global(mine(p), 1.f);
}

// The second round's copies overwrite what other threads may still read.
template <bool faulty>
FASTRES_KERNEL(threads, 1)
copy_too_early(FASTRES_PARAMETER Arguments p) {
  FASTRES_SHARED(memory);
  const uint32_t t = thread_index();
  float sum = 0;
  for (int i = 0; i < 2; ++i) {
    copy_async(memory + t * 16, p.in + t * 4, true);  // here: copy_too_early
    commit_copies();
    wait_copies<0>();
    sync_block();
    sum += load_shared<float>(memory + (t ^ 40) * 16);  // here: copy_too_early
    if (!faulty) sync_block();
  }
  store_global(mine(p), sum);
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
read_out_of_bounds(FASTRES_PARAMETER Arguments p) {
  store_global(mine(p), load_global(p.in + 961 - !faulty + thread_index()));  // here: read_out_of_bounds
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
write_out_of_bounds(FASTRES_PARAMETER Arguments p) {
  store_global(mine(p) - faulty, 1.f);  // here: write_out_of_bounds
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
copy_out_of_bounds(FASTRES_PARAMETER Arguments p) {
  FASTRES_SHARED(memory);
  const bool valid = faulty || thread_index() < 10;
  copy_async(memory + thread_index() * 16, p.in + 984 + thread_index() * 4, valid);  // here: copy_out_of_bounds
  commit_copies();
  wait_copies<0>();
  store_global(mine(p), 1.f);
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
read_between_pixels(FASTRES_PARAMETER Arguments p) {
  store_global(mine(p), load_global(p.pixels + thread_index() % 4 + faulty));  // here: read_between_pixels
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
misaligned_global(FASTRES_PARAMETER Arguments p) {
  const float* from = p.in + thread_index() * 4 + faulty;
  store_global(mine(p), load_global(reinterpret_cast<const float4*>(from)).x);  // here: misaligned_global
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
misaligned_shared(FASTRES_PARAMETER Arguments p) {
  FASTRES_SHARED(memory);
  store_shared(memory + thread_index() * 8 + faulty * 4, float2{1, 2});  // here: misaligned_shared
  store_global(mine(p), 1.f);
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
shared_out_of_bounds(FASTRES_PARAMETER Arguments p) {
  FASTRES_SHARED(memory);
  store_shared(memory + 4092 + faulty * 4 - thread_index() * 4, 1.f);  // here: shared_out_of_bounds
  store_global(mine(p), 1.f);
}

// Shared memory does not begin at address 0.
template <bool faulty>
FASTRES_KERNEL(threads, 1)
shared_from_zero(FASTRES_PARAMETER Arguments p) {
  FASTRES_SHARED(memory);
  store_shared((faulty ? 0 : memory) + thread_index() * 4, 1.f);  // here: shared_from_zero
  store_global(mine(p), 1.f);
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
shared_never_written(FASTRES_PARAMETER Arguments p) {
  FASTRES_SHARED(memory);
  if (thread_index() != 63 || !faulty) store_shared(memory + thread_index() * 4, 1.f);
  sync_block();
  store_global(mine(p), load_shared<float>(memory + (63 - thread_index()) * 4));  // here: shared_never_written
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
global_never_written(FASTRES_PARAMETER Arguments p) {
  if (!faulty) store_global(mine(p), 1.f);
  const float before = load_global(mine(p));  // here: global_never_written
  if (faulty) store_global(mine(p), before);
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
global_race(FASTRES_PARAMETER Arguments p) {
  store_global(mine(p), 1.f);
  if (!faulty) sync_block();
  const float other = load_global(p.out + (thread_index() ^ 1));  // here: global_race
  store_global(mine(p) + threads, other);
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
written_twice(FASTRES_PARAMETER Arguments p) {
  store_global(mine(p), 1.f);
  store_global(mine(p) + (faulty ? 0 : threads), 2.f);  // here: written_twice
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
read_only(FASTRES_PARAMETER Arguments p) {
  float* to = faulty ? const_cast<float*>(p.in) + thread_index() : mine(p);
  store_global(to, 1.f);  // here: read_only
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
divergent_shuffle(FASTRES_PARAMETER Arguments p) {
  float value = 1;
  if (faulty && thread_index() % 32 < 16) {
    value = shuffle_xor(value, 1);  // here: divergent_shuffle
  } else {
    value = shuffle_xor(value, 1);  // here: divergent_shuffle
  }
  store_global(mine(p), value);
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
divergent_barrier(FASTRES_PARAMETER Arguments p) {
  if (faulty && thread_index() % 32 < 16) {
    sync_block();  // here: divergent_barrier
  } else {
    sync_block();  // here: divergent_barrier
  }
  store_global(mine(p), 1.f);
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
barrier_not_reached(FASTRES_PARAMETER Arguments p) {
  store_global(mine(p), 1.f);
  if (faulty && thread_index() >= 32) return;
  sync_block();  // here: barrier_not_reached
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
shuffle_not_reached(FASTRES_PARAMETER Arguments p) {
  store_global(mine(p), 1.f);
  if (faulty && thread_index() == 40) return;
  shuffle_xor(1.f, 1);  // here: shuffle_not_reached
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
lanes_wait_for_each_other(FASTRES_PARAMETER Arguments p) {
  if (!faulty || thread_index() != 3) sync_block();  // here: lanes_wait_for_each_other
  shuffle_xor(1.f, 1);  // here: lanes_wait_for_each_other
  if (faulty && thread_index() == 3) sync_block();
  store_global(mine(p), 1.f);
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
endless(FASTRES_PARAMETER Arguments p) {
  FASTRES_SHARED(memory);
  store_shared(memory + thread_index() * 4, 1.f);
  while (faulty) load_shared<float>(memory + thread_index() * 4);  // here: endless
  store_global(mine(p), 1.f);
}

// Profile. A warp's 32 floats are 128 bytes apart, or next to each other.
template <bool faulty>
FASTRES_KERNEL(threads, 1)
bank_conflicts(FASTRES_PARAMETER Arguments p) {
  FASTRES_SHARED(memory);
  const uint32_t lane = thread_index() % 32, warp = thread_index() / 32;
  store_shared(memory + lane * (faulty ? 128 : 4) + warp * 4096, 1.f);  // here: bank_conflicts
  store_global(mine(p), 1.f);
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
matrix_bank_conflicts(FASTRES_PARAMETER Arguments p) {
  FASTRES_SHARED(memory);
  const uint32_t t = thread_index();
  for (int i = 0; i < 4; ++i) store_shared(memory + (i * threads + t) * 16, uint4{0, 0, 0, 0});
  sync_block();
  uint32_t r[4];
  load_matrices(r, memory + t % 8 * (faulty ? 128 : 16) + t / 8 % 4 * 16);  // here: matrix_bank_conflicts
  store_global(mine(p), static_cast<float>(r[0]));
}

template <bool faulty>
FASTRES_KERNEL(threads, 1)
scattered_sectors(FASTRES_PARAMETER Arguments p) {
  store_global(mine(p), load_global(p.in + thread_index() * (faulty ? 8 : 1)));  // here: scattered_sectors
}

using Kernel = void (*)(Arguments);
struct Planted {
  const char* name;
  Kernel good, faulty;
};
#define PLANTED(name) \
  Planted { #name, name<false>, name<true> }
const Planted all[] = {PLANTED(read_race),
                       PLANTED(overwrite_race),
                       PLANTED(crowd_race),
                       PLANTED(write_race),
                       PLANTED(race_across_a_shuffle),
                       PLANTED(missing_wait),
                       PLANTED(wait_for_too_few),
                       PLANTED(wait_after_the_barrier),
                       PLANTED(copy_overwritten),
                       PLANTED(copy_not_waited_for),
                       PLANTED(copy_too_early),
                       PLANTED(read_out_of_bounds),
                       PLANTED(write_out_of_bounds),
                       PLANTED(copy_out_of_bounds),
                       PLANTED(read_between_pixels),
                       PLANTED(misaligned_global),
                       PLANTED(misaligned_shared),
                       PLANTED(shared_out_of_bounds),
                       PLANTED(shared_from_zero),
                       PLANTED(shared_never_written),
                       PLANTED(global_never_written),
                       PLANTED(global_race),
                       PLANTED(written_twice),
                       PLANTED(read_only),
                       PLANTED(divergent_shuffle),
                       PLANTED(divergent_barrier),
                       PLANTED(barrier_not_reached),
                       PLANTED(shuffle_not_reached),
                       PLANTED(lanes_wait_for_each_other),
                       PLANTED(endless),
                       PLANTED(bank_conflicts),
                       PLANTED(matrix_bank_conflicts),
                       PLANTED(scattered_sectors)};

// ---- What instructions do ----

struct FragmentArguments {
  const uint32_t* in;
  uint32_t* out;
};

// in: 32 rows of 16 bytes, those of four 8x8 matrices; out: [32 lanes, 4 registers].
template <bool transposed>
FASTRES_KERNEL(32, 1)
matrices(FASTRES_PARAMETER FragmentArguments p) {
  FASTRES_SHARED(memory);
  const uint32_t lane = thread_index();
  copy_async(memory + lane * 16, p.in + lane * 4, true);
  commit_copies();
  wait_copies<0>();
  sync_block();
  uint32_t r[4];
  if (transposed) {
    load_matrices_transposed(r, memory + lane * 16);
  } else {
    load_matrices(r, memory + lane * 16);
  }
  for (int i = 0; i < 4; ++i) store_global(p.out + lane * 4 + i, r[i]);
}

// in: [32 lanes, 10 registers], four of A, two of B, four floats of C; out: [32 lanes, 4 floats].
template <class T>
FASTRES_KERNEL(32, 1)
fragments(FASTRES_PARAMETER FragmentArguments p) {
  const uint32_t lane = thread_index();
  uint32_t r[10];
  for (int i = 0; i < 10; ++i) r[i] = load_global(p.in + lane * 10 + i);
  const uint32_t a[4] = {r[0], r[1], r[2], r[3]};
  float c[4];
  std::memcpy(c, r + 6, sizeof c);
  multiply_add<T>(c, a, r[4], r[5]);
  std::memcpy(r, c, sizeof c);
  for (int i = 0; i < 4; ++i) store_global(p.out + lane * 4 + i, r[i]);
}

FASTRES_KERNEL(32, 1)
nothing(FASTRES_PARAMETER FragmentArguments) {}

struct TooLarge {
  char bytes[5000];
};
FASTRES_KERNEL(32, 1)
too_large(FASTRES_PARAMETER TooLarge) {}

}  // namespace
}  // namespace fastres

extern "C" {

using namespace fastres;

// The names, separated by spaces.
const char* planted_names() {
  static std::string names;
  names.clear();
  for (const Planted& p : all) names += std::string(names.empty() ? "" : " ") + p.name;
  return names.c_str();
}

const char* planted_run(const char* name, bool faulty, const float* in, float* out, const float* pixels) {
  for (const Planted& p : all) {
    if (std::strcmp(p.name, name) != 0) continue;
    const uint32_t shared = std::strcmp(name, "bank_conflicts") ? 4096 : 8192;
    return launch(faulty ? p.faulty : p.good, 1, threads, shared, nullptr, Arguments{in, out, pixels});
  }
  return "no such kernel";
}

const char* planted_matrices(bool transposed, const uint32_t* in, uint32_t* out) {
  return launch(transposed ? matrices<true> : matrices<false>, 1, 32, 512, nullptr, FragmentArguments{in, out});
}

const char* planted_fragments(bool half, const uint32_t* in, uint32_t* out) {
  return launch(half ? fragments<float16> : fragments<bfloat16>, 1, 32, 0, nullptr, FragmentArguments{in, out});
}

// A launch of nothing, for its limits.
const char* planted_launch(int64_t blocks, uint32_t threads, uint32_t shared_bytes, bool large) {
  if (large) return launch(too_large, blocks, threads, shared_bytes, nullptr, TooLarge{});
  return launch(nothing, blocks, threads, shared_bytes, nullptr, FragmentArguments{});
}

// Pairs of values rounded, of bits widened, and their ReLU masks.
void planted_pack(bool half, int64_t pairs, const float* values, uint32_t* out) {
  for (int64_t i = 0; i < pairs; ++i) {
    out[i] = half ? pack<float16>(values[2 * i], values[2 * i + 1]) : pack<bfloat16>(values[2 * i], values[2 * i + 1]);
  }
}
void planted_unpack(bool half, int64_t pairs, const uint32_t* bits, float* values, uint32_t* masks) {
  for (int64_t i = 0; i < pairs; ++i) {
    const float2 two = half ? unpack<float16>(bits[i]) : unpack<bfloat16>(bits[i]);
    values[2 * i] = two.x, values[2 * i + 1] = two.y;
    masks[i] = half ? relu_mask<float16>(bits[i]) : relu_mask<bfloat16>(bits[i]);
  }
}

}  // extern "C"
