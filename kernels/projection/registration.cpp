// Registers the projection ops through PyTorch's stable ABI: one library for every torch >= 2.11 and every Python.
// Checks arguments (messages name the op and the argument), allocates results, chooses the instruction set.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>

#include "projection.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using fastres::Dtype;
using fastres::Shape;

const fastres::CpuKernels& cpu_kernels() {
#if defined(FASTRES_X86)
  static const fastres::CpuKernels& chosen = []() -> const fastres::CpuKernels& {
    // PyTorch's own variable, so that one setting limits its kernels and these.
    const char* setting = std::getenv("ATEN_CPU_CAPABILITY");
    std::string_view limit = setting ? setting : "";
    bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (has_avx512 && limit != "avx2" && limit != "default") return fastres::avx512::kernels;
    if (has_avx2 && limit != "default") return fastres::avx2::kernels;
    return fastres::baseline::kernels;
  }();
  return chosen;
#else
  return fastres::baseline::kernels;
#endif
}

void parallel_for(int64_t tasks, fastres::Body body, void* context) {
  torch::stable::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

std::string list(std::initializer_list<int64_t> sizes) {
  std::string text = "[";
  for (int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

// Checks on one op's arguments. Failures read "<op>: <argument> must be <what>, has <what it has>".
class Arguments {
 public:
  Arguments(const char* op, const Tensor& x, int64_t stride) : op_(op), acc_(ScalarType::Float) {
    require(x.dim() == 4, "x", "[N, H, W, C]", sizes(x));
    switch (x.scalar_type()) {
      case ScalarType::Float: dtype = Dtype::float32; break;
      case ScalarType::BFloat16: dtype = Dtype::bfloat16; break;
      case ScalarType::Double: dtype = Dtype::float64, acc_ = ScalarType::Double; break;
      default: require(false, "x", "float32, float64 or bfloat16", "another dtype");
    }
    require(x.is_contiguous(), "x", "dense [N, H, W, C] (call .contiguous())", "other strides");
    require(stride >= 1, "stride", "at least 1", std::to_string(stride));
    type_ = x.scalar_type();
    shape = {x.size(0), x.size(1), x.size(2), x.size(3), 0, stride};
  }

  // t must be dense, of x's dtype, and have the sizes described, -1 standing for any.
  void same_dtype(const char* name, const Tensor& t, std::initializer_list<int64_t> wanted,
                  const std::string& described) {
    sized(name, t, wanted, described);
    require(t.scalar_type() == type_, name, "of x's dtype", "another");
  }
  void acc(const char* name, const Tensor& t, std::initializer_list<int64_t> wanted, const std::string& described) {
    sized(name, t, wanted, described);
    const char* wish = acc_ == ScalarType::Double ? "float64, as x is" : "float32";
    require(t.scalar_type() == acc_, name, wish, "another dtype");
  }
  void g(const Tensor& t) {
    std::string pixels = list({shape.n, shape.out_h(), shape.out_w()});
    same_dtype("g", t, {shape.n, shape.out_h(), shape.out_w(), -1}, "[N, Ho, Wo, K] with [N, Ho, Wo] = " + pixels);
    shape.k = t.size(3);
  }
  ScalarType acc_type() const { return acc_; }

  Shape shape{};
  Dtype dtype{};

 private:
  static std::string sizes(const Tensor& t) {
    std::ostringstream text;
    text << '[';
    for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
    text << ']';
    return text.str();
  }
  void sized(const char* name, const Tensor& t, std::initializer_list<int64_t> wanted, const std::string& described) {
    bool fits = t.dim() == static_cast<int64_t>(wanted.size());
    int64_t i = 0;
    for (int64_t size : wanted) fits = fits && (size < 0 || t.size(i) == size), ++i;
    require(fits, name, described, sizes(t));
    require(t.is_contiguous(), name, "dense (call .contiguous())", "other strides");
  }
  void require(bool holds, const char* name, const std::string& wish, const std::string& actual) const {
    if (!holds) throw std::runtime_error(std::string(op_) + ": " + name + " must be " + wish + ", has " + actual);
  }

  const char* op_;
  ScalarType type_{}, acc_;
};

std::tuple<Tensor, Tensor, Tensor> gram_cpu(const Tensor& x, int64_t stride) {
  Arguments a("projection_gram", x, stride);
  int64_t c = a.shape.c;
  Tensor gram = torch::stable::new_empty(x, {c, c}, a.acc_type());
  Tensor total = torch::stable::new_empty(x, {c}, a.acc_type());
  Tensor pivot = torch::stable::new_empty(x, {c}, a.acc_type());
  cpu_kernels().gram(a.dtype, a.shape, x.const_data_ptr(), gram.mutable_data_ptr(), total.mutable_data_ptr(),
                     pivot.mutable_data_ptr(), parallel_for);
  return {gram, total, pivot};
}

Tensor fprop_cpu(const Tensor& x, const Tensor& weight, const Tensor& bn, int64_t stride) {
  Arguments a("projection_fprop", x, stride);
  a.same_dtype("weight", weight, {-1, a.shape.c}, "[K, C] with C = " + std::to_string(a.shape.c));
  a.shape.k = weight.size(0);
  a.acc("bn", bn, {4, a.shape.k}, "[4, K] = " + list({4, a.shape.k}));
  Tensor out = torch::stable::new_empty(x, {a.shape.n, a.shape.out_h(), a.shape.out_w(), a.shape.k});
  cpu_kernels().fprop(a.dtype, a.shape, x.const_data_ptr(), weight.const_data_ptr(), bn.const_data_ptr(),
                      out.mutable_data_ptr(), parallel_for);
  return out;
}

Tensor wgrad_cpu(const Tensor& g, const Tensor& x, int64_t stride) {
  Arguments a("projection_wgrad", x, stride);
  a.g(g);
  Tensor p = torch::stable::new_empty(x, {a.shape.k, a.shape.c}, a.acc_type());
  cpu_kernels().wgrad(a.dtype, a.shape, g.const_data_ptr(), x.const_data_ptr(), p.mutable_data_ptr(), parallel_for);
  return p;
}

void dgrad_cpu(const Tensor& dx, const Tensor& g, const Tensor& x, const Tensor& u, const std::optional<Tensor>& v,
               const std::optional<Tensor>& k, int64_t stride) {
  Arguments a("projection_dgrad", x, stride);
  int64_t c = a.shape.c;
  a.g(g);
  a.same_dtype("dx", dx, {a.shape.n, a.shape.h, a.shape.w, c}, "of x's shape");
  a.same_dtype("u", u, {a.shape.k, c}, "[K, C] = " + list({a.shape.k, c}));
  if (v) a.same_dtype("v", *v, {c, c}, "[C, C] = " + list({c, c}));
  if (k) a.acc("k", *k, {c}, "[C] = " + list({c}));
  cpu_kernels().dgrad(a.dtype, a.shape, dx.mutable_data_ptr(), g.const_data_ptr(), x.const_data_ptr(),
                      u.const_data_ptr(), v ? v->const_data_ptr() : nullptr, k ? k->const_data_ptr() : nullptr,
                      parallel_for);
}

}  // namespace

STABLE_TORCH_LIBRARY(fastres_projection, m) {
  m.def("gram(Tensor x, int stride) -> (Tensor, Tensor, Tensor)");
  m.def("fprop(Tensor x, Tensor weight, Tensor bn, int stride) -> Tensor");
  m.def("wgrad(Tensor g, Tensor x, int stride) -> Tensor");
  m.def("dgrad(Tensor(a!) dx, Tensor g, Tensor x, Tensor u, Tensor? v, Tensor? k, int stride) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastres_projection, CPU, m) {
  m.impl("gram", TORCH_BOX(&gram_cpu));
  m.impl("fprop", TORCH_BOX(&fprop_cpu));
  m.impl("wgrad", TORCH_BOX(&wgrad_cpu));
  m.impl("dgrad", TORCH_BOX(&dgrad_cpu));
}
