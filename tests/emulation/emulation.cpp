#include "machine.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <numeric>

namespace fastres::emulation {

Options options;
Counters counters;
Block block;
Thread* current = nullptr;
uint32_t launch_number = 0;
Profile profile;

namespace {

constexpr uint64_t operations_limit = 20'000'000;  // of a launch: a loop that does not end is an error, not a hang

uint64_t operations_at_launch = 0;
std::string error_text;  // what run() returned

}  // namespace

std::string text(Location where) {
  std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

bool same(Location a, Location b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

void fail(const std::string& what, Location where) {
  std::string who;
  if (current) who = " (block " + std::to_string(block.index) + ", thread " + std::to_string(current->index) + ")";
  throw Failure(text(where) + ": " + what + who);
}

uint32_t Block::random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  random_state ^= random_state << 5;
  return random_state;
}

// ---- Threads ----

namespace {

Fiber scheduler;  // to which threads return when none is ready

void switch_to(Thread* from, Thread* to) {
  current = to;
  (from ? from->fiber : scheduler).switch_to(to ? to->fiber : scheduler);
}

Thread* take_ready() {
  if (!block.error.empty() || block.next_ready == block.ready.size()) return nullptr;
  if (options.shuffled) {
    size_t left = block.ready.size() - block.next_ready;
    std::swap(block.ready[block.next_ready], block.ready[block.next_ready + block.random() % left]);
  }
  Thread* next = block.ready[block.next_ready++];
  if (block.next_ready == 4096 || block.next_ready == block.ready.size()) {
    block.ready.erase(block.ready.begin(), block.ready.begin() + static_cast<std::ptrdiff_t>(block.next_ready));
    block.next_ready = 0;
  }
  return next;
}

void leave() {
  ++counters.switches;
  Thread* me = current;
  Thread* next = take_ready();
  if (next != me) switch_to(me, next);
}

void end_of_thread() {
  Thread& me = *current;
  Warp& warp = block.warps[me.index / warp_size];
  if (!me.copies.empty()) fail("copy_async that its thread never waited for", me.copies.front().where);
  hopper_end_of_thread();
  if (warp.arrived) {
    fail(std::string(warp.operation) + " is never reached by lane " + std::to_string(me.index % warp_size) +
             ", which has ended",
         warp.where);
  }
  if (block.arrived) {
    for (auto& t : block.threads) {
      if (t->state == State::waiting && std::strcmp(t->waits_in, "sync_block") == 0) {
        fail("sync_block is never reached by this thread, which has ended", t->where);
      }
    }
  }
  ++warp.ended;
  ++block.ended;
}

void thread_main() {
  try {
    block.body(block.context);
    end_of_thread();
  } catch (const std::exception& e) {
    if (block.error.empty()) block.error = e.what();
  }
  current->state = State::ended;
  for (;;) leave();
}

void prepare(Thread& t, uint32_t index) {
  t.index = index;
  t.state = State::ready;
  t.copies.clear();
  t.groups.clear();
  t.clock = 1;
  t.proxy_fences = 0;
  t.seen.clear();
  t.visits.clear();
  t.fiber.begin(thread_main);
}

std::string deadlock() {
  std::map<std::string, int> waiting;
  for (auto& t : block.threads) {
    if (t->state == State::waiting) ++waiting[t->waits_in + std::string(" at ") + text(t->where)];
  }
  std::string what;
  for (auto& [at, count] : waiting) what += ", " + std::to_string(count) + " threads in " + at;
  if (block.ended) what += ", " + std::to_string(block.ended) + " have ended";
  return "deadlock: " + what.substr(2) + " (block " + std::to_string(block.index) + ")";
}

}  // namespace

void count_operation(Location where) {
  if (++counters.operations - operations_at_launch > operations_limit) fail("the launch does not end", where);
}

void wait(const char* operation, Location where) {
  current->state = State::waiting;
  current->waits_in = operation;
  current->where = where;
  if (options.landing == Landing::random) hopper_progress(false);
  leave();
}

void wake(Thread& t) {
  t.state = State::ready;
  block.ready.push_back(&t);
}

// ---- Profile ----

namespace {

enum class Kind { shared, matrices, global };

// A request is what the lanes of a warp do at a site on their k-th visit.
struct Request {
  uint64_t address[warp_size];
  uint32_t lanes = 0;
};
struct Site {
  std::tuple<std::string, uint32_t, std::string> key;
  Kind kind;
  uint32_t bytes;
  std::vector<std::vector<Request>> of_warp;
};
std::vector<Site> sites;
std::map<std::tuple<const char*, uint32_t, uint32_t, std::string>, size_t> site_index;

void note(const char* what, Kind kind, uint64_t address, uint32_t bytes, Location where) {
  if (!options.profile) return;
  auto [at, fresh] = site_index.try_emplace({where.file_name(), where.line(), where.column(), what}, sites.size());
  if (fresh) {
    std::string place = text(where);
    sites.push_back({{place.substr(0, place.rfind(':')), where.line(), what}, kind, bytes, {}});
  }
  Site& site = sites[at->second];
  site.of_warp.resize(block.warps.size());
  auto& visits = current->visits;
  if (visits.size() <= at->second) visits.resize(at->second + 1);
  auto& requests = site.of_warp[current->index / warp_size];
  uint32_t k = visits[at->second]++;
  if (requests.size() <= k) requests.resize(k + 1);
  requests[k].address[current->index % warp_size] = address;
  requests[k].lanes |= 1u << current->index % warp_size;
}

// Banks are 4 bytes wide. Wide accesses are served 128 bytes of lanes at a time: 8 lanes of 16 bytes. Lanes that want
// the same word share it.
uint64_t conflicts(const Request& r, uint32_t bytes) {
  uint64_t added = 0;
  const uint32_t together = std::min(128 / bytes, warp_size);
  for (uint32_t first = 0; first < warp_size; first += together) {
    std::array<std::vector<uint64_t>, 32> bank;
    for (uint32_t lane = first; lane < first + together; ++lane) {
      if (!(r.lanes >> lane & 1)) continue;
      for (uint64_t word = r.address[lane] / 4; word < (r.address[lane] + bytes) / 4; ++word) {
        auto& words = bank[word % 32];
        if (std::find(words.begin(), words.end(), word) == words.end()) words.push_back(word);
      }
    }
    size_t most = 1;
    for (auto& words : bank) most = std::max(most, words.size());
    added += most - 1;
  }
  return added;
}

void count_sectors(const Request& r, uint32_t bytes, LineProfile& line) {
  std::vector<std::pair<uint64_t, uint64_t>> ranges;
  for (uint32_t lane = 0; lane < warp_size; ++lane) {
    if (r.lanes >> lane & 1) ranges.push_back({r.address[lane], r.address[lane] + bytes});
  }
  std::sort(ranges.begin(), ranges.end());
  uint64_t next_sector = 0;
  for (auto [begin, finish] : ranges) {
    const uint64_t first_sector = std::max(begin / 32, next_sector), last_sector = (finish - 1) / 32;
    if (first_sector <= last_sector) line.sectors += last_sector + 1 - first_sector, next_sector = last_sector + 1;
  }
  line.ideal += (ranges.size() * bytes + 31) / 32;
}

void finish_profile() {
  for (Site& site : sites) {
    LineProfile& line = profile[site.key];
    for (auto& requests : site.of_warp) {
      for (Request& r : requests) {
        ++line.requests;
        if (site.kind == Kind::global) {
          count_sectors(r, site.bytes, line);
        } else {
          line.conflicts += conflicts(r, site.bytes);
        }
      }
    }
    site.of_warp.clear();
  }
}

}  // namespace

// ---- Launch ----

namespace {

void run_block(uint32_t index, uint32_t threads, uint32_t shared_bytes) {
  ++counters.blocks;
  ++block.serial;
  block.index = index;
  block.epoch = 1;
  block.arrived = block.ended = 0;
  block.memory.assign(shared_bytes, 0xff);  // NaN in every dtype
  block.granules.resize(shared_bytes / 4);
  block.crowds.clear();
  block.warps.assign(threads / warp_size, Warp{});
  block.ready.clear();
  block.next_ready = 0;
  block.error.clear();
  block.random_state = (options.seed * 2654435761u + index * 97u) | 1;
  block.hopper.reset();
  block.threads.resize(threads);
  for (uint32_t t = 0; t < threads; ++t) {
    if (!block.threads[t]) block.threads[t] = std::make_unique<Thread>();
    prepare(*block.threads[t], t);
    block.ready.push_back(block.threads[t].get());
  }
  for (;;) {
    while (Thread* next = take_ready()) switch_to(nullptr, next);
    current = nullptr;
    if (!block.error.empty() || block.ended == threads) break;
    bool landed = false;
    try {
      landed = hopper_progress(true);
    } catch (const std::exception& e) {
      block.error = e.what();
      break;
    }
    if (!landed) block.error = deadlock();
  }
  finish_profile();
}

}  // namespace

const char* run(void (*body)(const void*), const void* context, size_t parameter_bytes, int64_t blocks,
                uint32_t threads, uint32_t shared_bytes) {
  auto refuse = [](const std::string& why) {
    error_text = "launch: " + why;
    return error_text.c_str();
  };
  if (blocks < 1 || blocks > std::numeric_limits<int32_t>::max()) return refuse(std::to_string(blocks) + " blocks");
  if (threads < 1 || threads > 1024 || threads % warp_size) return refuse(std::to_string(threads) + " threads");
  if (shared_bytes > shared_limit) return refuse(std::to_string(shared_bytes) + " bytes of shared memory");
  if (parameter_bytes > parameter_limit) return refuse(std::to_string(parameter_bytes) + " bytes of parameters");
  block.body = body;
  block.context = context;
  ++launch_number;
  ++counters.launches;
  operations_at_launch = counters.operations;
  std::vector<uint32_t> order(static_cast<size_t>(blocks));
  std::iota(order.begin(), order.end(), 0);
  if (options.shuffled) {
    block.random_state = (options.seed * 2246822519u) | 1;
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[block.random() % i]);
  }
  for (uint32_t index : order) {
    try {
      run_block(index, threads, (shared_bytes + 3) / 4 * 4);
    } catch (const std::exception& e) {
      block.error = e.what();
    }
    if (!block.error.empty()) {
      error_text = block.error;
      return error_text.c_str();
    }
  }
  return nullptr;
}

// ---- Global memory ----

namespace {

std::vector<Buffer> buffers;
size_t last_buffer = 0;

// The element's number in the order of the indices, and how many follow it without a gap; -1 between pixels.
int64_t ordinal(const Buffer& b, int64_t offset, int64_t& run) {
  int64_t number = 0;
  for (int d = 0; d < 3; ++d) {
    if (b.size[d] == 1) continue;
    const int64_t index = offset / b.stride[d];
    if (index >= b.size[d]) return -1;
    number = number * b.size[d] + index;
    offset -= index * b.stride[d];
  }
  run = b.size[3] - offset;
  return run > 0 ? number * b.size[3] + offset : -1;
}

std::string near(const unsigned char* p) {
  const Buffer* nearest = nullptr;
  int64_t best = 0;
  bool before = false;
  for (const Buffer& b : buffers) {
    const int64_t below = b.base - p, above = p - (b.base + b.bytes);
    const int64_t distance = below > 0 ? below : std::max<int64_t>(above, 0);
    if (!nearest || distance < best) nearest = &b, best = distance, before = below > 0;
  }
  if (!nearest) return "there are no buffers";
  return std::to_string(best) + " bytes " + (before ? "before " : "past the end of ") + nearest->name;
}

bool by_another(const Buffer::Touch& t) {
  return t.launch == launch_number &&
         (t.block != block.index || (t.thread != current->index && t.epoch == block.epoch));
}

void touch(Buffer& b, int64_t first, int64_t count, bool write, Location where) {
  const Buffer::Touch now{launch_number, block.index, current ? current->index : 0, block.epoch};
  for (int64_t i = first; i < first + count; ++i) {
    auto element = [&] { return "element " + std::to_string(i) + " of " + b.name; };
    if (write) {
      if (b.once && b.writes[i].launch) fail(element() + " is written twice", where);
      if (by_another(b.writes[i])) fail("race: " + element() + " is written by another thread too", where);
      if (by_another(b.reads[i])) fail("race: " + element() + " is overwritten, which another thread reads", where);
      b.writes[i] = now;
    } else {
      if (!b.defined && !b.writes[i].launch) fail(element() + " is read, which nobody has written", where);
      if (by_another(b.writes[i])) fail("race: " + element() + " is read, which another thread writes", where);
      b.reads[i] = now;
    }
  }
}

}  // namespace

void clear_buffers() {
  buffers.clear();
  last_buffer = 0;
  launch_number = 0;
}

void add_buffer(Buffer b) {
  int64_t elements = 1, last = 0;
  for (int d = 0; d < 4; ++d) elements *= b.size[d], last += (b.size[d] - 1) * b.stride[d];
  if (elements == 0) return;
  b.bytes = (last + 1) * b.element;
  // Dimensions that lie without a gap become one, so that an access may cross them.
  for (int d = 2; d >= 0; --d) {
    if (b.size[d] == 1 || b.stride[d] != b.size[3]) break;
    b.size[3] *= b.size[d];
    b.size[d] = 1;
  }
  b.nested = true;
  int64_t extent = b.size[3];
  for (int d = 2; d >= 0; --d) {
    if (b.size[d] == 1) continue;
    if (b.stride[d] < extent) b.nested = false;
    extent += (b.size[d] - 1) * b.stride[d];
  }
  if (b.writable) {
    if (!b.nested) throw Failure(b.name + " is written and overlaps itself");
    b.writes.resize(static_cast<size_t>(elements));
    b.reads.resize(static_cast<size_t>(elements));
  }
  buffers.push_back(std::move(b));
}

std::string unwritten() {
  for (const Buffer& b : buffers) {
    if (!b.once || b.defined) continue;
    auto missing = [](const Buffer::Touch& t) { return t.launch == 0; };
    auto first = std::find_if(b.writes.begin(), b.writes.end(), missing);
    if (first == b.writes.end()) continue;
    return std::to_string(std::count_if(first, b.writes.end(), missing)) + " of " + std::to_string(b.writes.size()) +
           " elements of " + b.name + " were never written, the first is " + std::to_string(first - b.writes.begin());
  }
  return {};
}

void touch_global(const void* p, uint32_t bytes, uint32_t alignment, bool write, Location where) {
  const unsigned char* address = static_cast<const unsigned char*>(p);
  if (reinterpret_cast<uintptr_t>(p) % alignment) {
    fail(std::string("misaligned global ") + (write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes",
         where);
  }
  if (!options.bounds) return;
  for (size_t i = 0; i < buffers.size(); ++i) {
    const size_t at = (last_buffer + i) % buffers.size();
    Buffer& b = buffers[at];
    if (address < b.base || address + bytes > b.base + b.bytes) continue;
    last_buffer = at;
    if (write && !b.writable) fail("write to " + b.name + ", which is read-only", where);
    if (!b.nested) return;
    const int64_t offset = (address - b.base) / b.element, count = bytes / b.element;
    int64_t run = 0;
    const int64_t first = ordinal(b, offset, run);
    if (first < 0 || run < count || (address - b.base) % b.element) {
      fail(std::string("global ") + (write ? "write" : "read") + " between the pixels of " + b.name, where);
    }
    if (b.writable) touch(b, first, count, write, where);
    return;
  }
  fail(std::string("global ") + (write ? "write" : "read") + " of " + std::to_string(bytes) + " bytes out of bounds, " +
           near(address),
       where);
}

void touch_global(const void* p, uint32_t bytes, bool write, Location where) {
  count_operation(where);
  touch_global(p, bytes, bytes, write, where);
  note(write ? "store" : "load", Kind::global, reinterpret_cast<uint64_t>(p), bytes, where);
}

// ---- Shared memory ----

void check_range(uint32_t address, uint32_t bytes, uint32_t alignment, Location where) {
  if (address % alignment) {
    fail("misaligned shared access: address " + std::to_string(address) + " is no multiple of " +
             std::to_string(alignment),
         where);
  }
  if (address < shared_base || uint64_t{address} + bytes > shared_base + block.memory.size()) {
    fail("shared access out of bounds: " + std::to_string(bytes) + " bytes at " +
             std::to_string(int64_t{address} - shared_base) + " of " + std::to_string(block.memory.size()),
         where);
  }
}

bool ordered(const Access& a, const Thread& t) {
  if (a.actor < 0 || a.actor == static_cast<int32_t>(t.index)) return true;
  if (a.actor < static_cast<int32_t>(block.threads.size()) && a.epoch < block.epoch) return true;
  return !t.seen.empty() && t.seen[a.actor] >= a.clock;
}

Access access_now(Location where) {
  return {static_cast<int32_t>(current->index), block.epoch, current->clock, where};
}

namespace {

std::string actor(const Access& a) {
  const int32_t threads = static_cast<int32_t>(block.threads.size());
  return (a.actor < threads ? "thread " + std::to_string(a.actor) : "an asynchronous operation") + " at " +
         text(a.where);
}

void add_read(Granule& g, Location where) {
  for (Access& r : g.reads) {
    if (ordered(r, *current)) {
      r = access_now(where);
      return;
    }
  }
  if (g.crowd < 0) {
    g.crowd = static_cast<int32_t>(block.crowds.size());
    block.crowds.push_back({block.epoch, std::vector<uint32_t>(block.threads.size())});
  }
  Crowd& crowd = block.crowds[g.crowd];
  if (crowd.epoch < block.epoch) {
    crowd.epoch = block.epoch;
    std::fill(crowd.clock.begin(), crowd.clock.end(), 0);
  }
  crowd.clock[current->index] = current->clock;
}

void check_read(uint32_t address, uint32_t bytes, Location where) {
  if (!options.races) return;
  for (uint32_t a = address; a < address + bytes; a += 4) {
    Granule& g = block.granule(a);
    if (g.mbarrier) fail("a mbarrier is read as data", where);
    if (g.copying || g.tensor_copying) {
      fail("shared bytes are read while a copy to them is under way, issued at " + text(g.write.where), where);
    }
    if (!g.written) fail("shared bytes are read that nobody has written", where);
    if (!ordered(g.write, *current)) {
      fail("race: shared bytes written by " + actor(g.write) + " are read with no barrier between", where);
    }
    add_read(g, where);
  }
}

}  // namespace

void check_write(uint32_t address, uint32_t bytes, Location where) {
  if (!options.races) return;
  for (uint32_t a = address; a < address + bytes; a += 4) {
    Granule& g = block.granule(a);
    if (g.mbarrier) fail("a mbarrier is overwritten", where);
    if (g.copying || g.tensor_copying) {
      fail("shared bytes are overwritten while a copy to them is under way, issued at " + text(g.write.where), where);
    }
    if (g.wgmma_readers) fail("shared bytes are overwritten that wgmma still reads", where);
    if (!ordered(g.write, *current)) {
      fail("race: shared bytes written by " + actor(g.write) + " are overwritten with no barrier between", where);
    }
    for (const Access& r : g.reads) {
      if (!ordered(r, *current)) {
        fail("race: shared bytes read by " + actor(r) + " are overwritten with no barrier between", where);
      }
    }
    if (g.crowd >= 0 && block.crowds[g.crowd].epoch == block.epoch) {
      const auto& clock = block.crowds[g.crowd].clock;
      for (uint32_t t = 0; t < clock.size(); ++t) {
        if (clock[t] && t != current->index && (current->seen.empty() || current->seen[t] < clock[t])) {
          fail("race: shared bytes read by thread " + std::to_string(t) + " are overwritten with no barrier between",
               where);
        }
      }
    }
  }
}

void clear_reads(Granule& g) {
  g.reads.fill(Access{});
  g.crowd = -1;
}

void mark_written(uint32_t address, uint32_t bytes, Location where) {
  if (!options.races) return;
  for (uint32_t a = address; a < address + bytes; a += 4) {
    Granule& g = block.granule(a);
    g.write = access_now(where);
    clear_reads(g);
    g.written = g.generic = true;
    g.copying = false;
    g.proxy_fences = current->proxy_fences;
  }
}

void read_shared(void* to, uint32_t address, uint32_t bytes, Location where) {
  count_operation(where);
  check_range(address, bytes, bytes, where);
  check_read(address, bytes, where);
  note("load", Kind::shared, address, bytes, where);
  std::memcpy(to, block.at(address), bytes);
}

void write_shared(uint32_t address, const void* from, uint32_t bytes, Location where) {
  count_operation(where);
  check_range(address, bytes, bytes, where);
  check_write(address, bytes, where);
  mark_written(address, bytes, where);
  note("store", Kind::shared, address, bytes, where);
  std::memcpy(block.at(address), from, bytes);
}

// ---- Asynchronous copies ----

namespace {

void land(Copy& copy) {
  if (copy.landed) return;
  if (copy.source) {
    std::memcpy(block.at(copy.target), copy.source, 16);
  } else {
    std::memset(block.at(copy.target), 0, 16);
  }
  copy.landed = true;
}

void land_some() {
  if (options.landing != Landing::random) return;
  for (Copy& copy : current->copies) {
    if (block.random() % 8 == 0) land(copy);
  }
}

}  // namespace

void wait_copies(int open, Location where) {
  count_operation(where);
  land_some();
  Thread& me = *current;
  if (me.groups.size() <= static_cast<size_t>(open)) return;
  const size_t closed = me.groups.size() - open, copies = me.groups[closed - 1];
  for (size_t i = 0; i < copies; ++i) {
    land(me.copies[i]);
    mark_written(me.copies[i].target, 16, me.copies[i].where);
  }
  me.copies.erase(me.copies.begin(), me.copies.begin() + copies);
  me.groups.erase(me.groups.begin(), me.groups.begin() + closed);
  for (size_t& end : me.groups) end -= copies;
}

// ---- Operations of a warp ----

namespace {

// Waits for all lanes; the last to come calls body(argument of every lane).
template <class Argument, class Body>
void collective(const char* operation, Argument& mine, Location where, Body&& body) {
  count_operation(where);
  Warp& warp = block.warps[current->index / warp_size];
  if (warp.ended) fail(std::string(operation) + " is never reached by lanes that have ended", where);
  if (warp.arrived == 0) {
    warp.operation = operation;
    warp.where = where;
  } else if (std::strcmp(warp.operation, operation) != 0 || !same(warp.where, where)) {
    fail(std::string("divergent ") + operation + ": other lanes of the warp are in " + warp.operation + " at " +
             text(warp.where),
         where);
  }
  warp.argument[current->index % warp_size] = &mine;
  if (++warp.arrived < warp_size) {
    wait(operation, where);
    return;
  }
  warp.arrived = 0;
  Argument* lanes[warp_size];
  for (uint32_t i = 0; i < warp_size; ++i) lanes[i] = static_cast<Argument*>(warp.argument[i]);
  body(lanes);
  const uint32_t first = current->index / warp_size * warp_size;
  for (uint32_t t = first; t < first + warp_size; ++t) {
    if (t != current->index) wake(*block.threads[t]);
  }
}

}  // namespace

void load_matrices(uint32_t (&r)[4], uint32_t address, bool transposed, Location where) {
  check_range(address, 16, 16, where);
  check_read(address, 16, where);
  note("load_matrices", Kind::matrices, address, 16, where);
  struct Lane {
    uint32_t address, *r;
  } mine{address, r};
  collective(transposed ? "load_matrices_transposed" : "load_matrices", mine, where, [transposed](Lane** lanes) {
    ++counters.matrix_loads;
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t m[8][8];
      for (int row = 0; row < 8; ++row) std::memcpy(m[row], block.at(lanes[matrix * 8 + row]->address), 16);
      for (uint32_t lane = 0; lane < warp_size; ++lane) {
        const uint32_t i = lane / 4, j = lane % 4 * 2;
        lanes[lane]->r[matrix] =
            transposed ? m[j][i] | uint32_t{m[j + 1][i]} << 16 : m[i][j] | uint32_t{m[i][j + 1]} << 16;
      }
    }
  });
}

void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*value)(uint16_t),
                  Location where) {
  struct Lane {
    float* c;
    const uint32_t* a;
    uint32_t b[2];
    float (*value)(uint16_t);
  } mine{c, a, {b0, b1}, value};
  collective("multiply_add", mine, where, [](Lane** lanes) {
    ++counters.multiply_adds;
    float a[16][16], b[16][8], c[16][8];
    // A fragment's register holds elements (row, column) and (row, column + 1) of A, or (k, n) and (k + 1, n) of B.
    for (uint32_t lane = 0; lane < warp_size; ++lane) {
      const Lane& l = *lanes[lane];
      const uint32_t group = lane / 4, pair = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) {
        float* to = &a[group + i % 2 * 8][pair + i / 2 * 8];
        to[0] = l.value(static_cast<uint16_t>(l.a[i])), to[1] = l.value(static_cast<uint16_t>(l.a[i] >> 16));
      }
      for (int i = 0; i < 2; ++i) {
        b[pair + i * 8][group] = l.value(static_cast<uint16_t>(l.b[i]));
        b[pair + i * 8 + 1][group] = l.value(static_cast<uint16_t>(l.b[i] >> 16));
      }
      for (int i = 0; i < 4; ++i) c[group + i / 2 * 8][pair + i % 2] = l.c[i];
    }
    for (int i = 0; i < 16; ++i) {
      for (int k = 0; k < 16; ++k) {
        for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
      }
    }
    for (uint32_t lane = 0; lane < warp_size; ++lane) {
      const uint32_t group = lane / 4, pair = lane % 4 * 2;
      for (int i = 0; i < 4; ++i) lanes[lane]->c[i] = c[group + i / 2 * 8][pair + i % 2];
    }
  });
}

// ---- Numbers ----

namespace {

std::array<float, 65536> float16_table() {
  std::array<float, 65536> table;
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint32_t sign = bits >> 15 << 31, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 31) {
      table[bits] = std::bit_cast<float>(sign | 0x7f800000u | mantissa << 13);
    } else if (exponent) {
      table[bits] = std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
    } else {
      const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
      table[bits] = sign ? -magnitude : magnitude;
    }
  }
  return table;
}
const std::array<float, 65536> float16_values = float16_table();

}  // namespace

float bfloat16_value(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }
float float16_value(uint16_t bits) { return float16_values[bits]; }

uint16_t bfloat16_bits(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t float16_bits(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (value != value) return 0x7fff;
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to 65536 or more
  if (magnitude >= 0x38800000) {
    return static_cast<uint16_t>(sign | ((magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13));
  }
  // Subnormal: adding 0.5 leaves the multiple of 2^-24, rounded to even, in the last bits.
  const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
  return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000));
}

}  // namespace fastres::emulation

namespace fastres {

using emulation::block;
using emulation::current;

uint32_t thread_index() { return current->index; }
uint32_t block_index() { return block.index; }

void sync_block(emulation::Location where) {
  using namespace emulation;
  count_operation(where);
  if (block.ended) fail("sync_block is never reached by threads that have ended", where);
  Warp& warp = block.warps[current->index / warp_size];
  if (warp.at_barrier++ == 0) {
    warp.barrier_where = where;
  } else if (!same(warp.barrier_where, where)) {
    fail("divergent sync_block: other lanes of the warp are in that at " + text(warp.barrier_where), where);
  }
  if (++block.arrived < block.threads.size()) {
    wait("sync_block", where);
    return;
  }
  ++counters.barriers;
  block.arrived = 0;
  ++block.epoch;
  for (Warp& w : block.warps) w.at_barrier = 0;
  hopper_sync();
  for (auto& t : block.threads) {
    if (t.get() != current) wake(*t);
  }
}

float shuffle_xor(float value, int mask, emulation::Location where) {
  using namespace emulation;
  struct Lane {
    float value, result;
    int mask;
  } mine{value, 0, mask};
  if (mask < 0 || mask >= int{warp_size}) fail("shuffle_xor with a mask of " + std::to_string(mask), where);
  collective("shuffle_xor", mine, where, [](Lane** lanes) {
    for (uint32_t i = 0; i < warp_size; ++i) lanes[i]->result = lanes[i ^ lanes[i]->mask]->value;
  });
  return mine.result;
}

void copy_async(uint32_t target, const void* source, bool valid, emulation::Location where) {
  using namespace emulation;
  count_operation(where);
  ++counters.copies;
  if (valid) {
    emulation::touch_global(source, 16, 16, false, where);
    note("copy_async", Kind::global, reinterpret_cast<uint64_t>(source), 16, where);
  }
  check_range(target, 16, 16, where);
  check_write(target, 16, where);
  note("copy_async to shared", Kind::shared, target, 16, where);
  if (options.races) {
    for (uint32_t a = target; a < target + 16; a += 4) {
      Granule& g = block.granule(a);
      g.copying = true;
      g.write = access_now(where);
    }
  }
  current->copies.push_back({target, valid ? static_cast<const unsigned char*>(source) : nullptr, false, where});
  if (options.landing == Landing::early) land(current->copies.back());
  land_some();
}

void commit_copies() {
  current->groups.push_back(current->copies.size());
  emulation::land_some();
}

}  // namespace fastres
