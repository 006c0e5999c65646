#include <algorithm>
#include <cstring>
#include <deque>
#include <limits>

#include "hopper_device.cuh"
#include "machine.h"

namespace fastres::emulation {

namespace {

constexpr uint32_t group_size = 128, most_barriers = 64, most_groups = 8;

struct Barrier {
  uint32_t number = 0, arrivals = 0, pending = 0, phase = 0;  // phase: how many have ended
  int64_t bytes = 0;                              // still expected in this phase
  bool fenced = false;
  Access init;
  Location expected_at;
  std::vector<uint32_t> arriving, ended;  // clocks of what the arrivals of this phase, and of those ended, are after
};

struct TensorCopy {
  uint32_t target, barrier;
  TensorMap map;
  int corner[4];
  uint32_t bytes() const { return map.box[0] * map.box[1] * map.box[2] * map.box[3] * 2; }
};

// One wgmma of a warp group.
struct Product {
  Wgmma operation;
  std::array<float*, group_size> d{};
  uint32_t issued = 0;
  bool computed = false;
  std::vector<uint32_t> chunks;  // addresses of the 16 bytes each that it reads
};

// Sums that a wgmma under way owns.
struct Sums {
  std::vector<float> value;
  size_t last;  // number of the last wgmma that adds to them
};

struct GroupThread {
  size_t issued = 0;             // wgmma so far
  std::vector<size_t> closed;    // by commits that are not waited for: how many wgmma had been issued
  std::map<float*, Sums> sums;
  bool fenced = false;
};

struct WarpGroup {
  std::deque<Product> products;  // those not retired
  size_t retired = 0;
  uint32_t arrived = 0;
  int open = 0;  // of the wgmma_wait that some threads are in
  Location where;
  std::array<GroupThread, group_size> threads;
};

}  // namespace

struct Hopper {
  std::map<uint32_t, Barrier> barriers;  // by address
  std::vector<std::pair<uint32_t, Thread*>> waiting;
  std::deque<TensorCopy> copies;  // not landed
  std::vector<WarpGroup> groups;
};

namespace {

Hopper& machine() {
  if (!block.hopper) {
    block.hopper = std::make_shared<Hopper>();
    block.hopper->groups.resize(block.threads.size() / group_size);
    for (auto& t : block.threads) t->seen.assign(block.threads.size() + most_barriers + most_groups, 0);
  }
  return *block.hopper;
}

int32_t actor_of(const Barrier& b) { return static_cast<int32_t>(block.threads.size() + b.number); }
int32_t actor_of_group(size_t group) { return static_cast<int32_t>(block.threads.size() + most_barriers + group); }

void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// ---- Barriers ----

Barrier& barrier_at(uint32_t address, Location where) {
  count_operation(where);
  auto found = machine().barriers.find(address);
  if (found == machine().barriers.end()) fail("no mbarrier was initialised here", where);
  if (options.races && !ordered(found->second.init, *current)) {
    const std::string place = text(found->second.init.where);
    fail("race: the mbarrier is used with no barrier after its barrier_init at " + place, where);
  }
  return found->second;
}

void end_phase_if_complete(uint32_t address, Barrier& b) {
  if (b.pending || b.bytes) return;
  ++b.phase;
  b.pending = b.arrivals;
  b.ended = b.arriving;
  b.ended.resize(block.threads.size() + most_barriers + most_groups);
  b.ended[actor_of(b)] = b.phase;
  auto& waiting = machine().waiting;
  for (size_t i = 0; i < waiting.size();) {
    if (waiting[i].first == address) {
      wake(*waiting[i].second);
      waiting.erase(waiting.begin() + static_cast<std::ptrdiff_t>(i));
    } else {
      ++i;
    }
  }
}

void arrive(uint32_t address, Barrier& b, Location where) {
  if (b.pending == 0) fail("more arrivals at the mbarrier in one phase than the " + std::to_string(b.arrivals) +
                           " it was initialised for", where);
  if (b.bytes < 0 && b.pending == 1) {
    fail(std::to_string(-b.bytes) + " bytes more were copied than the mbarrier expects in this phase", where);
  }
  join(b.arriving, current->seen);
  b.arriving[current->index] = current->clock++;
  --b.pending;
  end_phase_if_complete(address, b);
}

// ---- Tensor copies ----

void land(const TensorCopy& copy) {
  const TensorMap& map = copy.map;
  uint32_t target = copy.target;
  int64_t index[4];
  for (uint32_t i3 = 0; i3 < map.box[3]; ++i3) {
    index[3] = copy.corner[3] + int64_t{i3};
    for (uint32_t i2 = 0; i2 < map.box[2]; ++i2) {
      index[2] = copy.corner[2] + int64_t{i2};
      for (uint32_t i1 = 0; i1 < map.box[1]; ++i1) {
        index[1] = copy.corner[1] + int64_t{i1};
        int64_t offset = 0;
        bool row_exists = true;
        for (int d = 1; d < 4; ++d) {
          row_exists &= index[d] >= 0 && index[d] < map.size[d];
          offset += index[d] * map.stride[d - 1];
        }
        for (uint32_t i0 = 0; i0 < map.box[0]; ++i0, target += 2) {
          index[0] = copy.corner[0] + int64_t{i0};
          unsigned char* to = block.at(swizzled(target));
          if (row_exists && index[0] >= 0 && index[0] < map.size[0]) {
            std::memcpy(to, map.base + (offset + index[0]) * 2, 2);
          } else {
            std::memset(to, 0, 2);
          }
        }
      }
    }
  }
  for (uint32_t a = copy.target; a < copy.target + copy.bytes(); a += 4) {
    Granule& g = block.granule(a);
    g.tensor_copying = g.generic = false;
    g.written = true;
    clear_reads(g);
  }
  Barrier& b = machine().barriers.at(copy.barrier);
  b.bytes -= copy.bytes();
  if (b.pending == 0 && b.bytes < 0) {
    throw Failure(text(b.expected_at) + ": " + std::to_string(-b.bytes) +
                  " bytes more were copied than the mbarrier expects in this phase (block " +
                  std::to_string(block.index) + ")");
  }
  end_phase_if_complete(copy.barrier, b);
}

// What exists of the box must lie in buffers.
void check_source(const TensorCopy& copy, Location where) {
  const TensorMap& map = copy.map;
  auto clipped = [&](int d, int64_t& begin, int64_t& end) {
    begin = std::max<int64_t>(copy.corner[d], 0);
    end = std::min<int64_t>(int64_t{copy.corner[d]} + map.box[d], map.size[d]);
  };
  int64_t begin[4], end[4];
  for (int d = 0; d < 4; ++d) clipped(d, begin[d], end[d]);
  if (begin[0] >= end[0]) return;
  for (int64_t i3 = begin[3]; i3 < end[3]; ++i3) {
    for (int64_t i2 = begin[2]; i2 < end[2]; ++i2) {
      for (int64_t i1 = begin[1]; i1 < end[1]; ++i1) {
        const int64_t offset = i3 * map.stride[2] + i2 * map.stride[1] + i1 * map.stride[0] + begin[0];
        touch_global(map.base + offset * 2, static_cast<uint32_t>(end[0] - begin[0]) * 2, 2, false, where);
      }
    }
  }
}

// What a thread wrote must have been fenced before the asynchronous proxy uses it.
void check_proxy(const Granule& g, Location where) {
  if (!g.written || !g.generic || g.write.actor < 0) return;
  if (block.threads[g.write.actor]->proxy_fences == g.proxy_fences) {
    fail("shared bytes written at " + text(g.write.where) + " are used by the asynchronous proxy with no "
         "async_proxy_fence between", where);
  }
}

// ---- wgmma ----

// Where element (mn, k) of an operand lies: mn is the row of A or the column of B.
uint32_t element_address(uint64_t descriptor, bool transposed, uint32_t mn, uint32_t k) {
  const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
  if (transposed) return swizzled(start + mn / 64 * leading + k / 8 * stride + k % 8 * 128 + mn % 64 * 2);
  return swizzled(start + mn / 8 * stride + mn % 8 * 128 + k * 2);
}

void add_chunks(std::vector<uint32_t>& chunks, uint64_t descriptor, bool transposed, uint32_t size, Location where) {
  if (descriptor >> 62 != 1) fail("the wgmma descriptor is not one of matrix_descriptor's", where);
  if ((descriptor << 4 & 0x380) != 0) {
    fail("the wgmma descriptor begins within a group of eight rows, at address " +
             std::to_string((descriptor & 0x3fff) << 4), where);
  }
  for (uint32_t mn = 0; mn < size; mn += transposed ? 8 : 1) {
    for (uint32_t k = 0; k < 16; k += transposed ? 1 : 8) {
      const uint32_t address = element_address(descriptor, transposed, mn, k);
      check_range(address, 16, 16, where);
      chunks.push_back(address);
    }
  }
}

void check_operands(const Product& product, Location where) {
  if (!options.races) return;
  for (uint32_t chunk : product.chunks) {
    for (uint32_t a = chunk; a < chunk + 16; a += 4) {
      const Granule& g = block.granule(a);
      if (g.mbarrier) fail("wgmma reads a mbarrier", where);
      if (g.copying || g.tensor_copying) {
        fail("wgmma reads shared bytes while a copy to them is under way, issued at " + text(g.write.where), where);
      }
      if (!ordered(g.write, *current)) {
        fail("race: wgmma reads shared bytes written at " + text(g.write.where) + " with no barrier between", where);
      }
      check_proxy(g, where);
    }
  }
}

void compute(WarpGroup& group, Product& product) {
  if (product.computed) return;
  product.computed = true;
  ++counters.wgmmas;
  const Wgmma& o = product.operation;
  static float a[64][16], b[16][256], d[64][256];
  auto read = [&](uint64_t descriptor, bool transposed, uint32_t mn, uint32_t k) {
    uint16_t bits;
    std::memcpy(&bits, block.at(element_address(descriptor, transposed, mn, k)), 2);
    return o.value(bits);
  };
  for (uint32_t k = 0; k < 16; ++k) {
    for (uint32_t m = 0; m < 64; ++m) a[m][k] = read(o.a, o.a_transposed, m, k);
    for (uint32_t n = 0; n < static_cast<uint32_t>(o.n); ++n) b[k][n] = read(o.b, o.b_transposed, n, k);
  }
  auto each = [&](auto&& body) {
    for (uint32_t t = 0; t < group_size; ++t) {
      float* sums = group.threads[t].sums.at(product.d[t]).value.data();
      for (int i = 0; i < o.n / 2; ++i) {
        const uint32_t row = t / 32 * 16 + i / 2 % 2 * 8 + t % 32 / 4, column = i / 4 * 8 + t % 4 * 2 + i % 2;
        body(sums[i], d[row][column]);
      }
    }
  };
  each([](float& mine, float& all) { all = mine; });
  for (int m = 0; m < 64; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < o.n; ++n) d[m][n] += a[m][k] * b[k][n];
    }
  }
  each([](float& mine, float& all) { mine = all; });
}

// The oldest wgmma is done: what it read may be overwritten by whoever is ordered after this.
void retire(size_t number, WarpGroup& group) {
  Product& product = group.products.front();
  if (product.issued != group_size) {
    fail("not all threads of the warp group issued this wgmma", product.operation.where);
  }
  compute(group, product);
  ++group.retired;
  const Access read{actor_of_group(number), block.epoch, static_cast<uint32_t>(group.retired), product.operation.where};
  if (options.races) {
    for (uint32_t chunk : product.chunks) {
      for (uint32_t a = chunk; a < chunk + 16; a += 4) {
        Granule& g = block.granule(a);
        --g.wgmma_readers;
        size_t place = 0;
        while (place + 1 < g.reads.size() && g.reads[place].actor >= 0 && g.reads[place].actor != read.actor) ++place;
        g.reads[place] = read;
      }
    }
  }
  group.products.pop_front();
}

}  // namespace

void wgmma(float* d, const Wgmma& operation) {
  count_operation(operation.where);
  const size_t number = current->index / group_size;
  if (number >= machine().groups.size()) fail("wgmma by threads that are no warp group", operation.where);
  WarpGroup& group = machine().groups[number];
  GroupThread& me = group.threads[current->index % group_size];
  if (!me.fenced) fail("wgmma with no wgmma_fence before", operation.where);
  const size_t mine = me.issued++ - group.retired;
  if (mine == group.products.size()) {
    Product& fresh = group.products.emplace_back();
    fresh.operation = operation;
    add_chunks(fresh.chunks, operation.a, operation.a_transposed, 64, operation.where);
    add_chunks(fresh.chunks, operation.b, operation.b_transposed, static_cast<uint32_t>(operation.n), operation.where);
    std::sort(fresh.chunks.begin(), fresh.chunks.end());
    fresh.chunks.erase(std::unique(fresh.chunks.begin(), fresh.chunks.end()), fresh.chunks.end());
    if (options.races) {
      for (uint32_t chunk : fresh.chunks) {
        for (uint32_t a = chunk; a < chunk + 16; a += 4) ++block.granule(a).wgmma_readers;
      }
    }
  }
  Product& product = group.products[mine];
  const Wgmma& others = product.operation;
  if (others.a != operation.a || others.b != operation.b || !same(others.where, operation.where)) {
    fail("wgmma differs within the warp group, other threads are at " + text(others.where), operation.where);
  }
  if (current->index % warp_size == 0) check_operands(product, operation.where);
  auto [sums, fresh] = me.sums.try_emplace(d);
  if (fresh) {
    sums->second.value.assign(d, d + operation.n / 2);
    std::fill(d, d + operation.n / 2, std::numeric_limits<float>::quiet_NaN());
  }
  sums->second.last = me.issued;
  product.d[current->index % group_size] = d;
  if (++product.issued < group_size) return;
  const bool now = options.landing == Landing::early || (options.landing == Landing::random && block.random() % 2);
  // In their order: those before add to the same sums.
  for (size_t i = 0; now && i <= mine; ++i) compute(group, group.products[i]);
}

void wgmma_wait(int open, Location where) {
  count_operation(where);
  const size_t number = current->index / group_size;
  if (number >= machine().groups.size()) fail("wgmma_wait by threads that are no warp group", where);
  WarpGroup& group = machine().groups[number];
  if (group.arrived == 0) {
    group.where = where;
  } else if (!same(group.where, where)) {
    fail("divergent wgmma_wait: other threads of the warp group are in that at " + text(group.where), where);
  }
  if (++group.arrived < group_size) {
    wait("wgmma_wait", where);
  } else {
    group.arrived = 0;
    const std::vector<size_t>& closed = group.threads[0].closed;
    const size_t done = closed.size() > static_cast<size_t>(open) ? closed[closed.size() - 1 - open] : 0;
    for (GroupThread& t : group.threads) {
      if (t.closed != closed) fail("wgmma_commit differs within the warp group", where);
    }
    while (group.retired < done) retire(number, group);
    for (uint32_t t = 0; t < group_size; ++t) {
      GroupThread& thread = group.threads[t];
      std::erase_if(thread.closed, [&](size_t end) { return end <= group.retired; });
      std::erase_if(thread.sums, [&](auto& sums) {
        if (sums.second.last > group.retired) return false;
        std::copy(sums.second.value.begin(), sums.second.value.end(), sums.first);
        return true;
      });
      if (open == 0) thread.fenced = false;
      Thread& fiber = *block.threads[number * group_size + t];
      fiber.seen[actor_of_group(number)] = static_cast<uint32_t>(group.retired);
      if (&fiber != current) wake(fiber);
    }
  }
}

void hopper_sync() {
  if (!block.hopper) return;
  const size_t first = block.threads.size();
  std::vector<uint32_t> all(block.threads[0]->seen.begin() + static_cast<std::ptrdiff_t>(first),
                            block.threads[0]->seen.end());
  for (auto& t : block.threads) {
    for (size_t i = 0; i < all.size(); ++i) all[i] = std::max(all[i], t->seen[first + i]);
  }
  for (auto& t : block.threads) std::copy(all.begin(), all.end(), t->seen.begin() + static_cast<std::ptrdiff_t>(first));
}

bool hopper_progress(bool idle) {
  if (!block.hopper) return false;
  auto& copies = machine().copies;
  if (copies.empty()) {
    if (!idle) return false;
    for (auto& [address, b] : machine().barriers) {
      if (b.pending == 0 && b.bytes > 0) {
        throw Failure(text(b.expected_at) + ": the mbarrier expects " + std::to_string(b.bytes) +
                      " bytes that nobody copies (block " + std::to_string(block.index) + ")");
      }
    }
    return false;
  }
  if (!idle && block.random() % 8) return false;
  const bool any = options.shuffled || options.landing == Landing::random;
  const size_t which = any ? block.random() % copies.size() : 0;
  const TensorCopy copy = copies[which];
  copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(which));
  land(copy);
  return true;
}

void hopper_end_of_thread() {
  if (!block.hopper) return;
  const size_t number = current->index / group_size;
  if (number >= machine().groups.size()) return;
  WarpGroup& group = machine().groups[number];
  if (group.threads[current->index % group_size].issued > group.retired) {
    fail("wgmma that its thread never waited for", group.products.front().operation.where);
  }
  if (group.arrived) fail("wgmma_wait is never reached by this thread, which has ended", group.where);
}

}  // namespace fastres::emulation

namespace fastres {

using namespace emulation;

const char* encode_tensor_map(TensorMap& map, Dtype dtype, const void* base, const int64_t (&size)[4],
                              const int64_t (&stride)[3], const uint32_t (&box)[4]) {
  if (dtype != Dtype::bfloat16 && dtype != Dtype::float16) return "encode_tensor_map: the dtype is not 16 bits wide";
  if (reinterpret_cast<uintptr_t>(&map) % 64) return "encode_tensor_map: the map is not aligned to 64 bytes";
  if (reinterpret_cast<uintptr_t>(base) % 16) return "encode_tensor_map: the tensor is not aligned to 16 bytes";
  for (int64_t s : size) {
    if (s < 1 || s > int64_t{1} << 32) return "encode_tensor_map: a size is not between 1 and 2^32";
  }
  for (int64_t s : stride) {
    if (s < 0 || s * 2 >= int64_t{1} << 40 || s * 2 % 16) {
      return "encode_tensor_map: a stride is no multiple of 16 bytes below 2^40";
    }
  }
  for (uint32_t b : box) {
    if (b < 1 || b > 256) return "encode_tensor_map: a side of the box is not between 1 and 256";
  }
  if (box[0] != 64) return "encode_tensor_map: the box is not 64 elements wide";
  map.base = static_cast<const unsigned char*>(base);
  std::copy(size, size + 4, map.size);
  std::copy(stride, stride + 3, map.stride);
  std::copy(box, box + 4, map.box);
  return nullptr;
}

void barrier_init(uint32_t barrier, uint32_t arrivals, Location where) {
  count_operation(where);
  check_range(barrier, 8, 8, where);
  if (arrivals < 1 || arrivals >= 1u << 20) fail("a mbarrier for " + std::to_string(arrivals) + " arrivals", where);
  if (machine().barriers.count(barrier)) fail("the mbarrier is initialised twice", where);
  if (machine().barriers.size() == most_barriers) fail("more mbarriers than the emulation has room for", where);
  check_write(barrier, 8, where);
  Barrier b;
  b.number = static_cast<uint32_t>(machine().barriers.size());
  b.arrivals = b.pending = arrivals;
  b.init = access_now(where);
  machine().barriers.emplace(barrier, std::move(b));
  block.granule(barrier).mbarrier = block.granule(barrier + 4).mbarrier = true;
}

void barrier_init_fence() {
  for (auto& [address, b] : machine().barriers) {
    if (b.init.actor == static_cast<int32_t>(current->index)) b.fenced = true;
  }
}

void barrier_arrive(uint32_t barrier, Location where) { arrive(barrier, barrier_at(barrier, where), where); }

void barrier_expect_bytes(uint32_t barrier, uint32_t bytes, Location where) {
  Barrier& b = barrier_at(barrier, where);
  b.expected_at = where;
  b.bytes += bytes;
  arrive(barrier, b, where);
}

void barrier_wait(uint32_t barrier, uint32_t parity, Location where) {
  const Barrier& b = barrier_at(barrier, where);
  if (parity > 1) fail("barrier_wait for parity " + std::to_string(parity), where);
  while (b.phase % 2 == parity) {
    machine().waiting.push_back({barrier, current});
    wait("barrier_wait", where);
  }
  join(current->seen, b.ended);
}

void copy_tensor_async(uint32_t target, const TensorMap* map, uint32_t barrier, int c0, int c1, int c2, int c3,
                       Location where) {
  Barrier& b = barrier_at(barrier, where);
  ++counters.tensor_copies;
  const TensorCopy copy{target, barrier, *map, {c0, c1, c2, c3}};
  if (target % 1024) fail("the target of copy_tensor_async is not 1024-byte aligned", where);
  check_range(target, copy.bytes(), 1024, where);
  check_source(copy, where);
  if (!b.fenced) fail("copy_tensor_async to a mbarrier without barrier_init_fence", where);
  if (options.races) {
    for (uint32_t a = target; a < target + copy.bytes(); a += 4) check_proxy(block.granule(a), where);
  }
  check_write(target, copy.bytes(), where);
  for (uint32_t a = target; a < target + copy.bytes(); a += 4) {
    Granule& g = block.granule(a);
    g.tensor_copying = true;
    g.write = {actor_of(b), block.epoch, b.phase + 1, where};
  }
  machine().copies.push_back(copy);
  if (options.landing == Landing::early) {
    machine().copies.pop_back();
    land(copy);
  }
}

void async_proxy_fence() { ++current->proxy_fences; }

void wgmma_fence() {
  machine();
  const size_t number = current->index / group_size;
  if (number < machine().groups.size()) machine().groups[number].threads[current->index % group_size].fenced = true;
}

void wgmma_commit(Location where) {
  count_operation(where);
  const size_t number = current->index / group_size;
  if (number >= machine().groups.size()) fail("wgmma_commit by threads that are no warp group", where);
  GroupThread& me = machine().groups[number].threads[current->index % group_size];
  me.closed.push_back(me.issued);
}

}  // namespace fastres
