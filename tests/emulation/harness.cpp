// C functions for Python: options and buffers of the machine, and the kernels of projection.h on registered buffers.
// Those that can fail return null, or what went wrong, valid until the next call.
#include <cstring>
#include <exception>

#include "projection.h"
#include "machine.h"

// A library may be linked from some of the kernels' sources only.
namespace fastres::portable {
[[gnu::weak]] int64_t fprop_partials(const Shape&);
[[gnu::weak]] int64_t gram_workspace(const Shape&);
[[gnu::weak]] int64_t wgrad_workspace(const Shape&);
[[gnu::weak]] const char* fprop(const FpropArguments&, void*);
[[gnu::weak]] const char* gram(const GramArguments&, void*);
[[gnu::weak]] const char* wgrad(const WgradArguments&, void*);
[[gnu::weak]] const char* dgrad(const DgradArguments&, void*);
}  // namespace fastres::portable
namespace fastres::hopper {
[[gnu::weak]] int64_t gram_workspace(const Shape&);
[[gnu::weak]] int64_t wgrad_workspace(const Shape&);
[[gnu::weak]] const char* fprop(const FpropArguments&, void*);
[[gnu::weak]] const char* gram(const GramArguments&, void*);
[[gnu::weak]] const char* wgrad(const WgradArguments&, void*);
[[gnu::weak]] const char* dgrad(const DgradArguments&, void*);
}  // namespace fastres::hopper

namespace {

using namespace fastres;
using emulation::Buffer;

std::string answer;

// What a kernel may do with a tensor.
enum class Use { input, output, inout, workspace };

void add(const char* name, const void* data, std::array<int64_t, 4> size, std::array<int64_t, 4> stride,
         int64_t element, Use use) {
  if (!data) return;
  Buffer b{};
  b.name = name;
  b.base = static_cast<const unsigned char*>(data);
  b.size = size;
  b.stride = stride;
  b.element = element;
  b.writable = use != Use::input;
  b.defined = use == Use::input || use == Use::inout;
  b.once = use == Use::output || use == Use::inout;
  emulation::add_buffer(std::move(b));
}
void add_dense(const char* name, const void* data, int64_t elements, int64_t element, Use use) {
  add(name, data, {1, 1, 1, elements}, {0, 0, 0, 1}, element, use);
}
// The pixels of p that the projection reads or writes, `stride` apart; those between must not be touched.
void add_pixels(const char* name, const Pixels& p, const Shape& s, int64_t channels, int64_t stride, Use use) {
  add(name, p.data, {s.n, s.out_h(), s.out_w(), channels}, {p.n_stride, p.h_stride * stride, p.w_stride * stride, 1}, 2,
      use);
}

template <class Prepare, class Run>
const char* guarded(Prepare&& prepare, Run&& run) {
  try {
    emulation::clear_buffers();
    prepare();
    if (const char* error = run()) {
      answer = error;
      return answer.c_str();
    }
    answer = emulation::unwritten();
  } catch (const std::exception& e) {
    answer = e.what();
  }
  return answer.empty() ? nullptr : answer.c_str();
}

template <class Arguments>
const char* call(const char* (*kernel)(const Arguments&, void*), const Arguments& a) {
  return kernel ? kernel(a, nullptr) : "this library was linked without the kernel";
}

}  // namespace

extern "C" {

void emulation_options(int landing, bool shuffled, uint32_t seed, bool races, bool bounds, bool profile) {
  emulation::options = {static_cast<emulation::Landing>(landing), shuffled, seed, races, bounds, profile};
  emulation::counters = {};
  emulation::profile.clear();
}

const char* emulation_counters() {
  const emulation::Counters& c = emulation::counters;
  auto entry = [](const char* name, uint64_t value) {
    return "\"" + std::string(name) + "\": " + std::to_string(value) + ", ";
  };
  answer = "{" + entry("launches", c.launches) + entry("blocks", c.blocks) + entry("operations", c.operations) +
           entry("switches", c.switches) + entry("barriers", c.barriers) + entry("multiply_adds", c.multiply_adds) +
           entry("matrix_loads", c.matrix_loads) + entry("copies", c.copies) +
           entry("tensor_copies", c.tensor_copies) + entry("wgmmas", c.wgmmas);
  answer.replace(answer.size() - 2, 2, "}");
  return answer.c_str();
}

// A JSON list of [file, line, what, requests, conflicts, sectors, ideal].
const char* emulation_profile() {
  answer = "[";
  for (const auto& [key, line] : emulation::profile) {
    if (answer.size() > 1) answer += ", ";
    answer += "[\"" + std::get<0>(key) + "\", " + std::to_string(std::get<1>(key)) + ", \"" + std::get<2>(key) + "\"";
    for (uint64_t value : {line.requests, line.conflicts, line.sectors, line.ideal}) {
      answer += ", " + std::to_string(value);
    }
    answer += "]";
  }
  answer += "]";
  return answer.c_str();
}

// For kernels of tests: buffers by hand.
void emulation_clear() { emulation::clear_buffers(); }
void emulation_add(const char* name, const void* data, const int64_t* size, const int64_t* stride, int64_t element,
                   int use) {
  add(name, data, {size[0], size[1], size[2], size[3]}, {stride[0], stride[1], stride[2], stride[3]}, element,
      static_cast<Use>(use));
}
const char* emulation_unwritten() {
  answer = emulation::unwritten();
  return answer.empty() ? nullptr : answer.c_str();
}

// -1: the library was linked without it.
int64_t projection_size(const char* what, bool hopper_path, const Shape* s) {
  int64_t (*size)(const Shape&) = nullptr;
  if (std::strcmp(what, "fprop_partials") == 0) size = portable::fprop_partials;
  if (std::strcmp(what, "gram_workspace") == 0) {
    size = hopper_path ? hopper::gram_workspace : portable::gram_workspace;
  }
  if (std::strcmp(what, "wgrad_workspace") == 0) {
    size = hopper_path ? hopper::wgrad_workspace : portable::wgrad_workspace;
  }
  return size ? size(*s) : -1;
}

const char* projection_fprop(bool hopper_path, int dtype, const Shape* s, const Pixels* x, const void* weight,
                             const float* bn, const Pixels* residual, bool relu, const Pixels* out, float* count,
                             float* mean, float* m2) {
  auto prepare = [&] {
    add_pixels("x", *x, *s, s->c, s->stride, Use::input);
    add_dense("weight", weight, s->k * s->c, 2, Use::input);
    add_dense("bn", bn, 4 * s->k, 4, Use::input);
    add_pixels("residual", *residual, *s, s->k, 1, Use::input);
    add_pixels("out", *out, *s, s->k, 1, Use::output);
    if (!bn) {
      const int64_t partials = portable::fprop_partials(*s);
      add_dense("count", count, partials, 4, Use::output);
      add_dense("mean", mean, partials * s->k, 4, Use::output);
      add_dense("m2", m2, partials * s->k, 4, Use::output);
    }
  };
  const FpropArguments a{static_cast<Dtype>(dtype), *s, *x, weight, bn, *residual, relu, *out, count, mean, m2};
  return guarded(prepare, [&] { return call(hopper_path ? hopper::fprop : portable::fprop, a); });
}

const char* projection_gram(bool hopper_path, int dtype, const Shape* s, const Pixels* x, float* gram, float* total,
                            float* workspace) {
  auto prepare = [&] {
    add_pixels("x", *x, *s, s->c, s->stride, Use::input);
    add_dense("gram", gram, s->c * s->c, 4, Use::output);
    add_dense("total", total, s->c, 4, Use::output);
    add_dense("workspace", workspace, projection_size("gram_workspace", hopper_path, s), 4, Use::workspace);
  };
  const GramArguments a{static_cast<Dtype>(dtype), *s, *x, gram, total, workspace};
  return guarded(prepare, [&] { return call(hopper_path ? hopper::gram : portable::gram, a); });
}

const char* projection_wgrad(bool hopper_path, int dtype, const Shape* s, const Pixels* g, const Pixels* x,
                             const Pixels* out, float* p, float* sum, float* workspace) {
  auto prepare = [&] {
    add_pixels("g", *g, *s, s->k, 1, Use::input);
    add_pixels("x", *x, *s, s->c, s->stride, Use::input);
    add_pixels("out", *out, *s, s->k, 1, Use::input);
    add_dense("p", p, s->k * s->c, 4, Use::output);
    add_dense("sum", sum, s->k, 4, Use::output);
    add_dense("workspace", workspace, projection_size("wgrad_workspace", hopper_path, s), 4, Use::workspace);
  };
  const WgradArguments a{static_cast<Dtype>(dtype), *s, *g, *x, *out, p, sum, workspace};
  return guarded(prepare, [&] { return call(hopper_path ? hopper::wgrad : portable::wgrad, a); });
}

const char* projection_dgrad(bool hopper_path, int dtype, const Shape* s, const Pixels* dx, const Pixels* g,
                             const Pixels* x, const Pixels* out, const void* u, const void* v, const float* k,
                             const float* v_scale, const float* d, bool relu) {
  auto prepare = [&] {
    add_pixels("dx", *dx, *s, s->c, s->stride, Use::inout);
    add_pixels("g", *g, *s, s->k, 1, Use::input);
    add_pixels("x", *x, *s, s->c, s->stride, Use::input);
    add_pixels("out", *out, *s, s->k, 1, Use::input);
    add_dense("u", u, s->k * s->c, 2, Use::input);
    add_dense("v", v, s->c * s->c, 2, Use::input);
    add_dense("k", k, s->c, 4, Use::input);
    add_dense("v_scale", v_scale, 1, 4, Use::input);
    add_dense("d", d, s->c, 4, Use::input);
  };
  const DgradArguments a{static_cast<Dtype>(dtype), *s, *dx, *g, *x, *out, u, v, k, v_scale, d, relu};
  return guarded(prepare, [&] { return call(hopper_path ? hopper::dgrad : portable::dgrad, a); });
}

}  // extern "C"
