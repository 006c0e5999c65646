// The machine that emulation.h and emulation_hopper.h run kernels on: one block at a time, its threads as fibers.
//
// What it checks, always:
//   - global accesses: inside a registered buffer, between the pixels of a strided one, aligned, no writes to inputs,
//     no element written twice, no reads of what nobody wrote, no element touched by two threads of a launch of which
//     one writes (but for threads of one block with a sync_block between them);
//   - shared accesses: inside the block's memory, aligned;
//   - operations of a warp that not all its lanes reach, barriers that some threads never reach, deadlock;
//   - copies, and on Hopper wgmma groups, that nobody waits for;
//   - limits of a launch: threads, shared memory, parameters.
// and, with Options::races:
//   - shared bytes that are read and were never written (they start as NaN), or while a copy to them is under way;
//   - races: two threads touch the same bytes, one of them writes, and nothing orders them. Only sync_block does, and
//     on Hopper the mbarriers, followed by vector clocks: the verdict depends on no schedule. Operations of a warp
//     order no memory;
//   - on Hopper: memory that wgmma still reads overwritten, generic writes that the async proxy uses without a fence.
// What it cannot: weaker things than these of CUDA's memory model, reading accumulators while wgmma runs other than by
// their values (NaN until they have been waited for), and where machine and kernel share a wrong idea of an
// instruction.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "device.cuh"
#include "fibers.h"

namespace fastres::emulation {

constexpr uint32_t warp_size = 32, shared_limit = 227 * 1024, parameter_limit = 4096;

// When asynchronous copies (and wgmma) take place: as late as is legal, as they are issued, or anywhere between.
enum class Landing { late, early, random };

struct Options {
  Landing landing = Landing::late;
  bool shuffled = false;  // threads and blocks in an order drawn from the seed, instead of round robin
  uint32_t seed = 1;
  bool races = true;
  bool bounds = true;  // checks of global accesses
  bool profile = false;
};

struct Counters {
  uint64_t launches = 0, blocks = 0, operations = 0, switches = 0, barriers = 0;
  uint64_t multiply_adds = 0, matrix_loads = 0, copies = 0, tensor_copies = 0, wgmmas = 0;
};

// Of one line of a kernel. Cycles that bank conflicts add; sectors of 32 bytes, and how few would hold the bytes that
// the lanes ask for.
struct LineProfile {
  uint64_t requests = 0, conflicts = 0, sectors = 0, ideal = 0;
};

// A tensor [sizes] in global memory, strides in elements.
struct Buffer {
  std::string name;
  const unsigned char* base;
  std::array<int64_t, 4> size, stride;
  int64_t element;
  bool writable;
  bool defined;  // readable before it has been written
  bool once;     // elements may be written only once

  int64_t bytes = 0;    // from the first element to the end of the last
  bool nested = false;  // offsets tell the indices
  struct Touch {
    uint32_t launch = 0, block = 0, thread = 0, epoch = 0;
  };
  std::vector<Touch> writes, reads;  // of writable ones, by the elements' order
};

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn]] void fail(const std::string& what, Location where);
std::string text(Location where);
bool same(Location a, Location b);

// Who touched bytes, and when: by the sync_blocks passed before, and by a clock that ticks as the actor releases a
// mbarrier. Actors are the threads, then the mbarriers for the copies that arrive at them, then the warp groups for
// what their wgmma read.
struct Access {
  int32_t actor = -1;
  uint32_t epoch = 0, clock = 0;
  Location where;
};

// Four bytes of shared memory.
struct Granule {
  Access write;
  std::array<Access, 4> reads;
  uint64_t serial = 0;          // of the block for which it was reset
  int32_t crowd = -1;           // in Block::crowds: more reads
  uint32_t proxy_fences = 0;    // of the thread that wrote, by then
  uint16_t wgmma_readers = 0;   // groups under way
  bool written = false, copying = false, tensor_copying = false, mbarrier = false;
  bool generic = false;         // written by a thread, not by a tensor copy
};
struct Crowd {
  uint32_t epoch = 0;
  std::vector<uint32_t> clock;  // by thread; 0: has not read
};

struct Copy {
  uint32_t target;
  const unsigned char* source;  // null: zeros
  bool landed;
  Location where;
};

enum class State : uint8_t { ready, waiting, ended };

struct Thread {
  Fiber fiber;
  uint32_t index = 0;
  State state = State::ready;
  const char* waits_in = "";  // of a waiting one
  Location where;
  std::vector<Copy> copies;     // in order of issue
  std::vector<size_t> groups;   // for each open group, how many of `copies` came before its end
  uint32_t clock = 1, proxy_fences = 0;
  std::vector<uint32_t> seen;   // up to which clock this thread is ordered after each actor; empty without mbarriers
  std::vector<uint32_t> visits; // profile: of each site
};

struct Warp {
  uint32_t arrived = 0, ended = 0, at_barrier = 0;
  const char* operation = "";
  Location where, barrier_where;
  void* argument[warp_size];
};

struct Hopper;  // emulation_hopper.cpp

struct Block {
  uint64_t serial = 0;  // of all blocks that ever ran
  uint32_t index = 0, epoch = 1, arrived = 0, ended = 0;
  void (*body)(const void*) = nullptr;
  const void* context = nullptr;
  std::vector<unsigned char> memory;
  std::vector<Granule> granules;
  std::vector<Crowd> crowds;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  std::vector<Thread*> ready;
  size_t next_ready = 0;
  std::string error;
  uint32_t random_state = 1;
  std::shared_ptr<Hopper> hopper;

  unsigned char* at(uint32_t address) { return memory.data() + (address - shared_base); }
  Granule& granule(uint32_t address) {
    Granule& g = granules[(address - shared_base) / 4];
    if (g.serial != serial) g = Granule{}, g.serial = serial;
    return g;
  }
  uint32_t random();
};

extern Options options;
extern Counters counters;
extern Block block;
extern Thread* current;
extern uint32_t launch_number;

// Profile by file, line and what was done there.
using Profile = std::map<std::tuple<std::string, uint32_t, std::string>, LineProfile>;
extern Profile profile;

// Buffers
void clear_buffers();
void add_buffer(Buffer buffer);
std::string unwritten();  // empty, or which output has elements that nobody wrote
void touch_global(const void* p, uint32_t bytes, uint32_t alignment, bool write, Location where);

// Shared memory
void check_range(uint32_t address, uint32_t bytes, uint32_t alignment, Location where);
bool ordered(const Access& access, const Thread& thread);
Access access_now(Location where);
void check_write(uint32_t address, uint32_t bytes, Location where);
void mark_written(uint32_t address, uint32_t bytes, Location where);
void clear_reads(Granule& granule);

// Scheduling
void count_operation(Location where);
void wait(const char* operation, Location where);
void wake(Thread& thread);

// emulation_hopper.cpp
void hopper_sync();                // sync_block also orders what came by mbarriers
bool hopper_progress(bool idle);   // lets a copy land, if there is one; idle: no thread can run
void hopper_end_of_thread();

}  // namespace fastres::emulation
