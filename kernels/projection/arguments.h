// Checks on the arguments of the projection ops, on a CPU and on a GPU. Failures read
// "<op>: <argument> must be <what>, has <what it has>"; no text is made where there is none.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "projection.h"

namespace fastres {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One call of an op. The constructor checks x, stride and hopper, the function with the op's name what else it has.
class Arguments {
 public:
  enum class Place { cpu, cuda };
  using Optional = std::optional<Tensor>;

  Arguments(const char* op, Place place, const Tensor& x, int64_t stride, bool hopper)
      : op(op), cuda_(place == Place::cuda) {
    require(!cuda_ || x.is_cuda(), "x", "on a CUDA device", "another");
    if (cuda_) device = x.get_device_index();
    require(cuda_ || !hopper, "hopper", "False on a CPU", "True");
    if (x.dim() != 4) fail("x", "[N, H, W, C]", sizes(x));
    type_ = x.scalar_type();
    dtype = dtype_of(type_);
    pixels("x", x);
    if (x.size(3) < 1) fail("x", "of at least one channel", sizes(x));
    if (stride < 1) fail("stride", "at least 1", std::to_string(stride));
    shape = {x.size(0), x.size(1), x.size(2), x.size(3), 0, stride};
    if (cuda_ && shape.rows() >= int64_t(1) << 31)
      fail("x", "of fewer than 2^31 strided pixels", std::to_string(shape.rows()));
  }

  // bn is null where the output shall be raw.
  void fprop(const Tensor& weight, const Tensor* bn, const Optional& residual) {
    dense("weight", weight, "[K, C]", {any, shape.c});
    shape.k = weight.size(0);
    if (bn) acc("bn", *bn, "[4, K]", {4, shape.k});
    if (residual) output("residual", *residual);
  }
  void wgrad(const Tensor& g, const Optional& out) { gradient(g, out); }
  void dgrad(const Tensor& dx, const Tensor& g, const Tensor& u, const Optional& v, const Optional& k,
             const Optional& out, const Optional& v_scale, const Optional& d) {
    gradient(g, out);
    sized("dx", dx, "[N, H, W, C]", {shape.n, shape.h, shape.w, shape.c});
    pixels("dx", dx);
    require(!overlaps(dx), "dx", "without elements that share memory (call .contiguous())", "some");
    dense("u", u, "[K, C]", {shape.k, shape.c});
    if (v) dense("v", *v, "[C, C]", {shape.c, shape.c});
    if (k) acc("k", *k, "[C]", {shape.c});
    if (d) acc("d", *d, "[C]", {shape.c});
    if (!v_scale) return;
    require(cuda_, "v_scale", "None on a CPU", "a value");
    require(v.has_value(), "v_scale", "None without v", "a value");
    acc("v_scale", *v_scale, "a scalar", {});
  }

  ScalarType acc_type() const { return type_ == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

  const char* op;
  int32_t device = -1;  // index of x's CUDA device
  Shape shape{};
  Dtype dtype{};

 private:
  static constexpr int64_t any = -1;
  using Sizes = std::initializer_list<int64_t>;

  Dtype dtype_of(ScalarType type) const {
    if (type == ScalarType::BFloat16) return Dtype::bfloat16;
    if (cuda_) {
      require(type == ScalarType::Half, "x", "bfloat16 or float16 on CUDA (float32 runs through the library)",
              type == ScalarType::Float ? "float32" : "another dtype");
      return Dtype::float16;
    }
    require(type == ScalarType::Float || type == ScalarType::Double, "x", "float32, float64 or bfloat16 on a CPU",
            "another dtype");
    return type == ScalarType::Float ? Dtype::float32 : Dtype::float64;
  }

  // On x's device, of the sizes `wanted`, which `letters` name.
  void sized(const char* name, const Tensor& t, const char* letters, Sizes wanted) const {
    if (cuda_ && !(t.is_cuda() && t.get_device_index() == device))
      fail(name, "on x's device, cuda:" + std::to_string(device), "another");
    bool fits = t.dim() == static_cast<int64_t>(wanted.size());
    int64_t i = 0;
    for (int64_t size : wanted) fits = fits && (size == any || t.size(i) == size), ++i;
    if (!fits) fail(name, letters + (" = " + list(wanted)), sizes(t));
  }
  void contiguous(const char* name, const Tensor& t) const {
    require(t.is_contiguous(), name, "dense (call .contiguous())", "other strides");
  }
  // The layout and dtype of [N, H, W, channels]: on CUDA only the channels need be dense.
  void pixels(const char* name, const Tensor& t) const {
    require(t.scalar_type() == type_, name, "of x's dtype", "another");
    if (!cuda_) return contiguous(name, t);
    if (t.stride(3) != 1 && t.size(3) > 1)
      fail(name, "[N, H, W, C] with dense channels (call .contiguous())", "a stride of " + std::to_string(t.stride(3)));
  }
  void dense(const char* name, const Tensor& t, const char* letters, Sizes wanted) const {
    sized(name, t, letters, wanted);
    require(t.scalar_type() == type_, name, "of x's dtype", "another");
    contiguous(name, t);
  }
  void acc(const char* name, const Tensor& t, const char* letters, Sizes wanted) const {
    sized(name, t, letters, wanted);
    const char* wish = acc_type() == ScalarType::Double ? "float64, as x is" : "float32";
    require(t.scalar_type() == acc_type(), name, wish, "another dtype");
    contiguous(name, t);
  }
  void gradient(const Tensor& g, const Optional& out) {
    sized("g", g, "[N, Ho, Wo, K]", {shape.n, shape.out_h(), shape.out_w(), any});
    pixels("g", g);
    shape.k = g.size(3);
    if (out) output("out", *out);
  }
  void output(const char* name, const Tensor& t) const {
    sized(name, t, "[N, Ho, Wo, K]", {shape.n, shape.out_h(), shape.out_w(), shape.k});
    pixels(name, t);
  }

  // Whether two elements may lie at the same address; never in what slicing and permuting a dense tensor gives.
  static bool overlaps(const Tensor& t) {
    std::array<std::pair<int64_t, int64_t>, 4> dimensions;
    for (int64_t i = 0; i < 4; ++i) dimensions[i] = {t.stride(i), t.size(i)};
    std::sort(dimensions.begin(), dimensions.end());
    int64_t last = 0;  // offset of the last element in the dimensions seen
    for (auto [stride, size] : dimensions) {
      if (size <= 1) continue;
      if (stride <= last) return true;
      last += (size - 1) * stride;
    }
    return false;
  }

  void require(bool holds, const char* name, const char* wish, const char* actual) const {
    if (!holds) fail(name, wish, actual);
  }
  [[noreturn]] void fail(const char* name, const std::string& wish, const std::string& actual) const {
    throw std::runtime_error(std::string(op) + ": " + name + " must be " + wish + ", has " + actual);
  }
  template <class List>
  static std::string list(const List& sizes) {
    std::string text;
    for (int64_t size : sizes) text += (text.empty() ? "" : ", ") + (size == any ? "any" : std::to_string(size));
    return "[" + text + "]";
  }
  static std::string sizes(const Tensor& t) {
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
    return list(sizes);
  }

  bool cuda_;
  ScalarType type_{};
};

}  // namespace fastres
