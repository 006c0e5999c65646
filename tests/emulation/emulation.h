// The host half of device.cuh: the same operations on a CPU, with checks that a GPU does not make.
//
// A block's threads are fibers. An operation that is marked "warp" in device.cuh waits for the 32 lanes, the last of
// which does it for all; sync_block() waits for the block. What is wrong is an exception, which ends the launch with
// a message that names the kernel's line: every operation takes the place it was called from. See machine.h for what
// is checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

#define FASTRES_KERNEL(threads, blocks_per_sm) void
#define FASTRES_PARAMETER const
#define FASTRES_DEVICE inline
#define FASTRES_UNROLL
#define FASTRES_NO_UNROLL
#define FASTRES_SHARED(name) const uint32_t name = ::fastres::emulation::shared_base

namespace fastres {

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulation {

using Location = std::source_location;

// A block's memory does not begin at address 0 on a GPU either.
constexpr uint32_t shared_base = 1024;

const char* run(void (*body)(const void* context), const void* context, size_t parameter_bytes, int64_t blocks,
                uint32_t threads, uint32_t shared_bytes);
void wait_copies(int open, Location where);
void load_matrices(uint32_t (&r)[4], uint32_t address, bool transposed, Location where);
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*value)(uint16_t),
                  Location where);
void read_shared(void* to, uint32_t address, uint32_t bytes, Location where);
void write_shared(uint32_t address, const void* from, uint32_t bytes, Location where);
void touch_global(const void* p, uint32_t bytes, bool write, Location where);

float bfloat16_value(uint16_t bits);
float float16_value(uint16_t bits);
uint16_t bfloat16_bits(float value);
uint16_t float16_bits(float value);

template <class T>
constexpr auto value_of = &bfloat16_value;
template <>
inline constexpr auto value_of<float16> = &float16_value;
template <class T>
constexpr auto bits_of = &bfloat16_bits;
template <>
inline constexpr auto bits_of<float16> = &float16_bits;

}  // namespace emulation

uint32_t thread_index();
uint32_t block_index();
void sync_block(emulation::Location where = emulation::Location::current());
inline uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
float shuffle_xor(float value, int mask, emulation::Location where = emulation::Location::current());

void copy_async(uint32_t target, const void* source, bool valid,
                emulation::Location where = emulation::Location::current());
void commit_copies();
template <int N>
void wait_copies(emulation::Location where = emulation::Location::current()) {
  emulation::wait_copies(N, where);
}

inline void load_matrices(uint32_t (&r)[4], uint32_t address,
                          emulation::Location where = emulation::Location::current()) {
  emulation::load_matrices(r, address, false, where);
}
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t address,
                                     emulation::Location where = emulation::Location::current()) {
  emulation::load_matrices(r, address, true, where);
}
template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  emulation::Location where = emulation::Location::current()) {
  emulation::multiply_add(c, a, b0, b1, emulation::value_of<T>, where);
}

template <class V>
V load_shared(uint32_t address, emulation::Location where = emulation::Location::current()) {
  V v;
  emulation::read_shared(&v, address, sizeof(V), where);
  return v;
}
inline void store_shared(uint32_t address, float v, emulation::Location where = emulation::Location::current()) {
  emulation::write_shared(address, &v, sizeof v, where);
}
inline void store_shared(uint32_t address, float2 v, emulation::Location where = emulation::Location::current()) {
  emulation::write_shared(address, &v, sizeof v, where);
}
inline void store_shared(uint32_t address, uint4 v, emulation::Location where = emulation::Location::current()) {
  emulation::write_shared(address, &v, sizeof v, where);
}

template <class V>
V load_global(const V* p, emulation::Location where = emulation::Location::current()) {
  emulation::touch_global(p, sizeof(V), false, where);
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
void store_global(V* p, V v, emulation::Location where = emulation::Location::current()) {
  emulation::touch_global(p, sizeof(V), true, where);
  __builtin_memcpy(p, &v, sizeof(V));
}

template <class T>
uint32_t pack(float low, float high) {
  return emulation::bits_of<T>(low) | uint32_t{emulation::bits_of<T>(high)} << 16;
}
template <class T>
float2 unpack(uint32_t v) {
  return {emulation::value_of<T>(static_cast<uint16_t>(v)), emulation::value_of<T>(static_cast<uint16_t>(v >> 16))};
}
template <class T>
uint32_t relu_mask(uint32_t v) {
  const float2 two = unpack<T>(v);
  return (two.x <= 0 ? 0 : 0xffffu) | (two.y <= 0 ? 0 : 0xffff0000u);
}

template <class P>
const char* launch(void (*kernel)(P), int64_t blocks, uint32_t threads, uint32_t shared_bytes, void*, const P& p) {
  struct Call {
    void (*kernel)(P);
    const P& p;
  } call{kernel, p};
  auto body = [](const void* context) {
    const Call& call = *static_cast<const Call*>(context);
    call.kernel(call.p);
  };
  return emulation::run(body, &call, sizeof(P), blocks, threads, shared_bytes);
}

}  // namespace fastres
